"""Events as values: arguments and their checks, equality, repr, copies, and joining with `|`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import inf, nan
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


def test_joined_events_and_members_stand_wherever_an_event_can() -> None:
    events = {
        "Both": Event(every_n_steps=4) | EPOCH_END,
        "Ends": EPOCH_END | TRAINING_END,
        "Member": EPOCH_END,
    }
    loop = Loop(range(3), events, max_steps=7)
    steps = [(loop.global_step, due & set(events)) for _, due in loop if due]
    ends = {"Both", "Ends", "Member"}
    assert steps == [(2, ends), (3, {"Both"}), (5, ends), (6, {"Ends"})]
    assert [batch for batch, _ in Loop(range(3), max_steps=7, stop_when=EPOCH_END)] == [0, 1, 2]


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


# What arguments may be


class Index:
    """A whole number such as NumPy's: not an int, but it has `__index__`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


class Array:
    """A collection such as a NumPy array: its `__index__` and `__float__` raise."""

    def __iter__(self) -> Iterator[Index]:
        return iter([Index(5), Index(3)])

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def __float__(self) -> float:
        raise TypeError("only length-1 arrays can be converted to Python scalars")


class Scalar:
    """A NumPy array without dimensions: it has `__iter__`, which raises."""

    ndim = 0

    def __iter__(self) -> Iterator[int]:
        raise TypeError("iteration over a 0-d array")

    def __index__(self) -> int:
        return 7


def test_anything_with_index_is_a_whole_number() -> None:
    assert Event(every_n_steps=Index(3), until_step=Index(9)) == Event(
        every_n_steps=3, until_step=9
    )
    assert Event(at_step=[Index(5), 3, Index(3)]) == Event(at_step=(3, 5))
    assert Event(at_step=Array()) == Event(at_step=(3, 5))  # type: ignore[arg-type]
    assert Event(at_step=Scalar()) == Event(at_step=7)
    assert type(Event(at_step=Scalar()).at_step) is int


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset, dict.fromkeys, iter])
def test_any_collection_becomes_a_sorted_tuple_without_repeats(kind: Callable[..., Any]) -> None:
    assert Event(at_step=kind([5, 3, 3])).at_step == (3, 5)
    assert Event(at_epoch=kind([5, 3, 3])).at_epoch == (3, 5)
    assert Event(at_time=kind([5, 3, 3])).at_time == (3, 5)
    assert Event(at_timestamp=kind([3, 3])).at_timestamp == 3


@pytest.mark.parametrize(
    "half", [Fraction(1, 2), Decimal("0.5"), 0.5, timedelta(milliseconds=500)], ids=repr
)
def test_durations_are_numbers_of_seconds_or_timedeltas(half: Any) -> None:
    assert Event(every_n_seconds=half) == Event(every_n_seconds=0.5)
    assert Event(at_time=[half, 0.5]) == Event(at_time=0.5)
    assert len(list(Loop([0], max_seconds=half, clock=iter([0, 0.4, 0.5]).__next__))) == 2


def test_a_moment_is_seconds_of_unix_time_or_an_aware_datetime() -> None:
    aware = datetime(2026, 11, 26, 12, 0, 0, 500_000, tzinfo=timezone(timedelta(hours=1)))
    event = Event(at_timestamp=[aware, 3])
    assert event.at_timestamp == (3, aware.timestamp())
    assert event == Event(at_timestamp=[aware.timestamp(), 3])


def test_the_greatest_and_smallest_values_are_accepted() -> None:
    Event(every_n_steps=TOP, at_step=[0, TOP], at_epoch=TOP, first_at_step=TOP)
    Event(every_n_steps=1, from_step=TOP - 1, until_step=TOP)
    Event(every_n_seconds=TOP // 10**9, at_time=[0, 0.0, TOP // 10**9])
    events = {"Often": Event(every_n_seconds=1e-300)}
    assert fired(Loop(range(2), events, max_epochs=1, clock=iter([0, 1, 2]).__next__), "Often")


# What is refused


class bool_:  # noqa: N801
    """NumPy's bool under its name: not a bool, but it converts to numbers."""

    def __index__(self) -> int:
        return 1

    def __float__(self) -> float:
        return 1.0

    def __repr__(self) -> str:
        return "np.True_"


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NOT_WHOLE: list[Any] = [True, 1.0, "3", object, Fraction(3), bool_(), 1j]
NOT_SECONDS: list[Any] = [True, "3", 1j, object, bool_()]
BAD_SECONDS: list[Any] = [-0.5, nan, inf, TOP // 10**9 + 1, 1e300, 10**400, -timedelta(seconds=1)]
REFUSED: list[tuple[type[Exception], dict[str, Any]]] = [
    *[(TypeError, {"every_n_steps": value}) for value in [*NOT_WHOLE, [3]]],
    *[(TypeError, {"every_n_steps": 2, "until_step": value}) for value in [*NOT_WHOLE, [3]]],
    *[(TypeError, {"at_step": value}) for value in NOT_WHOLE],
    *[(TypeError, {"at_epoch": [0, value]}) for value in NOT_WHOLE],
    *[(TypeError, {"every_n_seconds": value}) for value in [*NOT_SECONDS, Array()]],
    *[(TypeError, {"at_time": [5, value]}) for value in NOT_SECONDS],
    *[(TypeError, {"at_timestamp": value}) for value in [*NOT_SECONDS, datetime(2026, 11, 26)]],
    *[(TypeError, {"condition_function": value}) for value in (3, "Log", [is_first])],
    *[(TypeError, {"every_n_steps": 2, name: 1}) for name in ("per_epoch", "per_launch")],
    *[(ValueError, {"every_n_epochs": value}) for value in (0, -1, TOP + 1, Index(0), 10**400)],
    *[(ValueError, {"every_n_steps": 2, "until_step": value}) for value in (0, TOP + 1)],
    *[(ValueError, {"at_step": value}) for value in (-1, TOP + 1, Index(-1), [5, -1], [])],
    *[(ValueError, {"every_n_seconds": value}) for value in [0, *BAD_SECONDS]],
    *[(ValueError, {"at_time": value}) for value in [(), *BAD_SECONDS]],
    (ValueError, {"at_timestamp": -1}),
    (ValueError, {"of": "n", "at": 0}),
    (TypeError, {"every_n": 3, "of": 3}),
    *[(TypeError, {"at_step": 3, "wait_for": value}) for value in (Event(), [])],
    # modifiers that change nothing, or contradict each other
    *[(ValueError, {name: 2, "per_epoch": True}) for name in ("every_n_epochs", "at_time")],
    *[(ValueError, {name: 2, "per_launch": True}) for name in ("at_epoch", "at_timestamp")],
    (ValueError, {"condition_function": is_first, "per_launch": True}),
    (ValueError, {"at_step": 2, "first_at_step": 7}),
    (ValueError, {"every_n": 3, "of": "n", "per_launch": True}),
    (ValueError, {"every_n": 3, "of": "n", "first_at_step": 2}),
    (ValueError, {"every_n_steps": 2, "from_step": 5, "until_step": 5}),
    (ValueError, {"every_n_steps": 2, "per_epoch": True, "per_launch": True}),
]


@pytest.mark.parametrize(("kind", "arguments"), REFUSED, ids=repr)
def test_an_error_names_parameter_and_value_in_one_line(
    kind: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        Event(**arguments)
    name, value = list(arguments.items())[-1]
    shown = value[-1] if isinstance(value, list) and value else value
    text = str(caught.value)
    assert text.startswith(f"{name}=") and repr(shown)[:50] in text
    assert "\n" not in text and len(text) < 300


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("every", "every_n_steps"),
        ("every_n_step", "every_n_steps"),
        ("seconds", "every_n_seconds"),
        ("every_n_minutes", "every_n_seconds"),
        ("epoch", "at_epoch"),
        ("condition", "condition_function"),
        ("untill_step", "until_step"),
    ],
)
def test_an_unknown_argument_names_the_one_that_was_meant(wrong: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"^{wrong}= is no argument; did you mean {meant}=\?$"):
        Event(**{wrong: 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "of_steps"), [("every_n", "every_n_steps"), ("at", "at_step")])
def test_a_count_of_nothing_names_the_count_of_steps(name: str, of_steps: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=3: add of=, a .*, or use {of_steps}=$"):
        Event(**{name: 3})  # type: ignore[arg-type]


def test_an_error_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"every_n_seconds=.*np\.True_.*: pass .*number of seconds"):
        Event(every_n_seconds=bool_())
    with pytest.raises(TypeError, match=r"every_n_steps=<.*NoRepr.*: pass a whole number from 1"):
        Event(every_n_steps=NoRepr())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"at_timestamp=.* a datetime with a time zone"):
        Event(at_timestamp=datetime(2026, 11, 26))
    with pytest.raises(TypeError, match=r"condition_function=3: .*name the criterion"):
        Event(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"first_at_step=7: .*add one of every_n_steps"):
        Event(at_step=2, first_at_step=7)
    with pytest.raises(ValueError, match=r"of=.* add one of every_n, at$"):
        Event(at_step=2, of="n")
