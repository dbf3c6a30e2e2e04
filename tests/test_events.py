"""Events as values: equality, repr, copies, and joining with `|`."""

from __future__ import annotations

import copy
import pickle
from datetime import timedelta
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents, LoopState
from loops import fired

pytestmark = pytest.mark.no_core

TOP = 2**62
NAMESPACE = {"Event": Event, "LoopEvents": LoopEvents}
EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


def is_first(state: LoopState) -> bool:
    return state.global_step == 0


VALUES: list[Event] = [
    Event(),
    Event(every_n_steps=16),
    Event(every_n_steps=16, first_at_step=0, from_step=100),
    Event(at_step=0, per_epoch=True),
    Event(at_step=(3, 5), every_n_seconds=0.5, until_step=9),
    Event(every_n_epochs=2, at_epoch=3, at_timestamp=(3, 4.5)),
    EPOCH_END,
    Event(every_n_steps=16) | TRAINING_END,
    Event(at_time=(1, 2.5), per_launch=True) | Event(every_n_epochs=2),
    EPOCH_END | TRAINING_END,
]
values = pytest.mark.parametrize("event", VALUES, ids=repr)


# Values


@values
def test_the_repr_evaluates_to_an_equal_event(event: Event) -> None:
    again = eval(repr(event), NAMESPACE)
    assert again == event
    assert hash(again) == hash(event)
    assert repr(again) == repr(event)


def test_the_repr_shows_what_differs_from_the_defaults_in_the_signatures_order() -> None:
    event = Event(until_step=9, per_epoch=False, at_step=[5, 3], every_n_seconds=0.5)
    assert repr(event) == "Event(at_step=(3, 5), every_n_seconds=0.5, until_step=9)"
    assert "is_first" in repr(Event(is_first))


@pytest.mark.parametrize("event", [*VALUES, Event(is_first, at_step=1)], ids=str)
def test_an_event_can_be_copied_and_pickled(event: Event) -> None:
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    pickled = [pickle.loads(pickle.dumps(event, protocol)) for protocol in protocols]
    for again in (*pickled, copy.copy(event), copy.deepcopy(event)):
        assert again == event
        assert hash(again) == hash(event)


def test_events_are_equal_if_their_arguments_mean_the_same() -> None:
    assert len(set(VALUES)) == len(VALUES)
    assert all(value == value for value in VALUES)
    assert Event(at_step=[5, 3, 3], from_step=0) == Event(from_step=None, at_step=range(3, 7, 2))
    assert Event(at_step=[3]) == Event(at_step=3) != Event(at_step=3, until_step=9)
    assert Event(at_step=3) != Event(at_epoch=3)
    assert Event(every_n_seconds=2) == Event(every_n_seconds=timedelta(seconds=2))
    assert Event(at_step=3) != 3
    assert Event(at_step=3) != "Event(at_step=3)"


def test_conditions_are_compared_by_identity_and_need_no_hash() -> None:
    class Condition:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        def __call__(self, state: LoopState) -> bool:
            return True

    condition = Condition()
    assert Event(condition) == Event(condition)
    assert len({Event(condition), Event(condition), Event(Condition()), Event(is_first)}) == 3


@values
def test_an_event_does_not_change(event: Event) -> None:
    before = repr(event)
    for name in ("every_n_steps", "condition_function", "per_epoch", "parts", "something_new"):
        with pytest.raises(AttributeError):
            setattr(event, name, 5)
        with pytest.raises(AttributeError):
            delattr(event, name)
    assert repr(event) == before


def test_attributes_have_the_names_and_values_of_the_parameters() -> None:
    event = Event(is_first, every_n_steps=2, at_time=(2.5, 1), until_step=8, per_launch=True)
    assert event.condition_function is is_first
    assert (event.every_n_steps, event.at_time, event.until_step) == (2, (1, 2.5), 8)
    assert (event.per_launch, event.per_epoch, event.from_step) == (True, False, 0)
    assert event.at_step is event.every_n_seconds is event.at_epoch is event.first_at_step is None


def test_none_switches_a_criterion_or_a_modifier_off() -> None:
    off = Event(None, every_n_steps=None, first_at_step=0, from_step=3, per_epoch=True)
    assert off == Event() == Event(at_time=None, per_launch=True)
    assert repr(off) == "Event()"
    assert fired(Loop(range(5), {"Off": off, "None": None}, max_epochs=2), "Off") == []
    modifiers = ("first_at_step", "from_step", "until_step", "per_epoch", "per_launch")
    assert Event(every_n_steps=3, **dict.fromkeys(modifiers)) == Event(every_n_steps=3)  # type: ignore[arg-type]
    assert Event(every_n_steps=3, at_epoch=None) == Event(every_n_steps=3)


# Joined Events


def test_a_joined_event_has_parts_and_no_criteria_of_its_own() -> None:
    a, b = Event(every_n_steps=3, from_step=2), Event(at_time=5)
    joined = a | b | EPOCH_END
    assert type(joined) is Event
    assert joined.parts == (a, b, EPOCH_END)
    assert joined.every_n_steps is joined.at_time is joined.until_step is None
    assert joined.from_step == 0
    assert a.parts == (a,)
    assert EPOCH_END.parts == (EPOCH_END,)


def test_joining_ignores_order_grouping_and_repeats() -> None:
    a, b, c = Event(every_n_steps=3), Event(at_step=5), EPOCH_END
    joined = (a | b) | c
    for other in (a | (b | c), c | b | a, (a | b) | (b | c), joined | a, joined | joined):
        assert other == joined
        assert hash(other) == hash(joined)
    assert a | a is a
    assert a | Event(every_n_steps=3) is a
    assert a | b != a | Event(at_step=6)
    assert a | b != a | b | c
    assert a | b != a
    assert EPOCH_END | TRAINING_END != EPOCH_END


@pytest.mark.parametrize("other", [3, "Log", None, {"Log"}, is_first, LoopEvents], ids=repr)
def test_only_events_can_be_joined(other: Any) -> None:
    for event in (Event(every_n_steps=3), Event(every_n_steps=3) | EPOCH_END, EPOCH_END):
        with pytest.raises(TypeError):
            event | other
        with pytest.raises(TypeError):
            other | event


def test_members_are_events_and_stay_themselves_when_copied_or_pickled() -> None:
    members = list(LoopEvents)
    assert [repr(member).partition(".")[2] for member in members] == [
        *("EPOCH_END", "TRAINING_END", "INTERRUPT", "EXCEPTION"),
    ]
    for member in members:
        assert isinstance(member, Event)
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy([member])[0] is copy.copy(member) is member
        assert member != Event()
    assert len({*members, Event()}) == 5
