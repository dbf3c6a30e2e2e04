"""Event as a value, and the arguments that Event and Loop refuse."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, LoopState

TOP = 2**62
NAMESPACE = {"Event": Event, "LoopEvents": LoopEvents}
STEP_CRITERIA = ("every_n_steps", "at_step")
TIME_CRITERIA = ("every_n_seconds", "at_time")
LAUNCH_CRITERIA = STEP_CRITERIA + TIME_CRITERIA

steps = st.integers(0, 5) | st.integers(0, TOP)
counts = st.integers(1, 5) | st.integers(1, TOP)
periods = st.integers(1, 5) | st.sampled_from([0.5, 1.0, 1e-9]) | st.floats(1e-9, 4e9)
times = st.integers(0, 5) | st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 4e9)


def one_or_several(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return items | st.lists(items, min_size=1, max_size=4)


CRITERIA: dict[str, st.SearchStrategy[Any]] = {
    "every_n_steps": counts,
    "at_step": one_or_several(steps),
    "every_n_seconds": periods,
    "at_time": one_or_several(times),
    "at_timestamp": one_or_several(times),
    "every_n_epochs": counts,
    "at_epoch": one_or_several(steps),
}


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.sets(st.sampled_from(sorted(CRITERIA)), min_size=1, max_size=3))
    given_: dict[str, Any] = {name: draw(CRITERIA[name]) for name in sorted(names)}
    if draw(st.booleans()):
        given_["from_step"] = draw(st.integers(0, 10))
    if draw(st.booleans()):
        given_["until_step"] = given_.get("from_step", 0) + draw(st.integers(1, 10))
    if "every_n_steps" in names and draw(st.booleans()):
        given_["first_at_step"] = draw(steps)
    if names.intersection(STEP_CRITERIA) and draw(st.booleans()):
        given_["per_epoch"] = True
    elif names.intersection(LAUNCH_CRITERIA) and draw(st.booleans()):
        given_["per_launch"] = True
    return given_


def event_values() -> st.SearchStrategy[Event]:
    return arguments().map(lambda given_: Event(**given_))


def joined_values() -> st.SearchStrategy[Any]:
    marks = st.sampled_from(list(LoopEvents))
    return st.builds(lambda a, b, c: a | b | c, event_values(), event_values(), marks)


def meaning_of(given_: dict[str, Any]) -> dict[str, Any]:
    """The arguments without defaults, and collections without order and repeats."""
    meaning = {}
    for name, value in given_.items():
        if isinstance(value, list):
            value = tuple(sorted(set(value)))
            value = value[0] if len(value) == 1 else value
        if name != "from_step" or value != 0:
            meaning[name] = value
    return meaning


def is_first(state: LoopState) -> bool:
    return state.global_step == 0


class Index:
    """An integer such as NumPy's: not an int, but it has `__index__`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


# The value


@given(event_values() | joined_values())
def test_the_repr_evaluates_to_an_equal_event(event: Any) -> None:
    again = eval(repr(event), NAMESPACE)
    assert again == event
    assert hash(again) == hash(event)
    assert repr(again) == repr(event)


@pytest.mark.parametrize(
    "text",
    [
        "Event(every_n_steps=16)",
        "Event(every_n_steps=16, from_step=100)",
        "Event(at_step=0, per_epoch=True)",
        "Event(at_step=(3, 5), every_n_seconds=0.5, until_step=9)",
        "Event(every_n_steps=16) | LoopEvents.TRAINING_END",
        "Event(at_time=(1, 2.5), per_launch=True) | Event(every_n_epochs=2)",
    ],
)
def test_the_repr_shows_arguments_that_are_not_defaults_in_signature_order(text: str) -> None:
    assert repr(eval(text, NAMESPACE)) == text


def test_the_repr_shows_the_condition_function_too() -> None:
    text = repr(Event(is_first, every_n_steps=2))
    assert text.startswith("Event(") and "is_first" in text and "every_n_steps=2" in text


@given(arguments(), arguments())
def test_events_are_equal_exactly_if_their_arguments_mean_the_same(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    a, b = Event(**first), Event(**second)
    assert a == Event(**first)
    assert (a == b) == (meaning_of(first) == meaning_of(second))
    assert (a != b) == (meaning_of(first) != meaning_of(second))


@given(arguments())
def test_events_that_differ_in_one_argument_are_not_equal(given_: dict[str, Any]) -> None:
    event = Event(**given_)
    window = {"until_step": given_.get("until_step", 10**6) + 1}
    assert event != Event(**{**given_, **window})
    assert event != Event(is_first, **given_)
    assert event != Event(**{**given_, "every_n_epochs": given_.get("every_n_epochs", 7) % 7 + 1})


@given(arguments(), st.randoms())
def test_the_order_of_arguments_and_items_changes_neither_equality_nor_hash(
    given_: dict[str, Any], random: Any
) -> None:
    shuffled = {}
    for name, value in given_.items():
        if isinstance(value, list):
            value = value + value[:1]
            random.shuffle(value)
        shuffled[name] = value
    assert Event(**shuffled) == Event(**given_)
    assert len({Event(**shuffled), Event(**given_)}) == 1


def test_events_with_the_same_condition_are_equal() -> None:
    assert Event(is_first) == Event(is_first)
    assert hash(Event(is_first)) == hash(Event(is_first))
    assert Event(is_first) != Event(lambda state: state.global_step == 0)


@dataclass
class Every:
    """A condition that is a dataclass: it has no hash, and equals others of the same period."""

    __name__ = "every"
    period: int

    def __call__(self, state: LoopState) -> bool:
        return state.global_step % self.period == 0


def test_a_condition_needs_no_hash() -> None:
    condition = Every(2)
    with pytest.raises(TypeError, match="unhashable"):
        hash(condition)
    event = Event(condition, at_step=1)
    assert hash(event) == hash(Event(condition, at_step=1))
    assert event == Event(condition, at_step=1)
    assert len({event, Event(condition, at_step=1), Event(condition)}) == 2
    assert {event: 1}[Event(condition, at_step=1)] == 1


def test_conditions_without_a_hash_are_compared_by_identity() -> None:
    condition, equal = Every(2), Every(2)
    assert condition == equal
    assert Event(condition) != Event(equal)
    assert len({Event(condition), Event(equal)}) == 2


def test_events_with_a_condition_without_a_hash_can_be_joined() -> None:
    condition = Every(2)
    joined = Event(condition) | Event(at_step=3) | LoopEvents.EPOCH_END
    assert joined == LoopEvents.EPOCH_END | Event(at_step=3) | Event(condition)
    assert hash(joined) == hash(LoopEvents.EPOCH_END | Event(at_step=3) | Event(condition))
    assert Event(condition) | Event(condition) == Event(condition)
    assert Event(condition) | Event(Every(2)) != Event(condition)
    events = {"A": joined, "B": Event(Every(3)) | Event(Every(4))}
    found = [set(due) - set(LoopEvents) for _, due in Loop(range(9), events, max_steps=6)]
    assert found == [{"A", "B"}, set(), {"A"}, {"A", "B"}, {"A", "B"}, set()]


def test_an_event_is_not_equal_to_objects_of_other_types() -> None:
    event = Event(every_n_steps=3)
    assert event != 3
    assert event != "Event(every_n_steps=3)"
    assert event != event | LoopEvents.EPOCH_END
    assert (event == 3) is False


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_a_collection_is_stored_as_a_sorted_tuple_without_repeats(values: list[int]) -> None:
    expected: Any = tuple(sorted(set(values)))
    if len(expected) == 1:
        expected = expected[0]
    for kind in (list, tuple, set, frozenset, dict.fromkeys):
        assert Event(at_step=kind(values)).at_step == expected
        assert Event(at_epoch=kind(values)).at_epoch == expected
        assert Event(at_time=kind(values)).at_time == expected


def test_a_range_is_a_collection() -> None:
    assert Event(at_step=range(6, 0, -2)).at_step == (2, 4, 6)
    assert Event(at_step=range(5, 6)) == Event(at_step=5)


def test_attributes_have_the_names_and_values_of_the_parameters() -> None:
    event = Event(is_first, every_n_steps=2, at_time=(2.5, 1), until_step=8, per_launch=True)
    assert event.condition_function is is_first
    assert event.every_n_steps == 2
    assert event.at_time == (1, 2.5)
    assert event.until_step == 8
    assert event.per_launch is True
    assert event.per_epoch is False
    assert event.at_step is event.every_n_seconds is event.every_n_epochs is event.at_epoch is None


@pytest.mark.parametrize(
    "name",
    ["condition_function", *CRITERIA, "from_step", "until_step", "per_epoch", "something_new"],
)
def test_no_attribute_can_be_assigned_or_deleted(name: str) -> None:
    event = Event(is_first, every_n_steps=3)
    with pytest.raises(AttributeError):
        setattr(event, name, 5)
    with pytest.raises(AttributeError):
        delattr(event, name)
    assert event == Event(is_first, every_n_steps=3)


def test_no_attribute_of_a_joined_event_can_be_assigned() -> None:
    joined = Event(every_n_steps=3) | LoopEvents.EPOCH_END
    for name in ("every_n_steps", "something_new"):
        with pytest.raises(AttributeError):
            setattr(joined, name, 5)


def test_changing_the_collection_afterwards_does_not_change_the_event() -> None:
    steps = [3, 5]
    event = Event(at_step=steps)
    steps.append(7)
    assert event == Event(at_step=(3, 5))


@given(event_values() | joined_values(), st.sampled_from(range(pickle.HIGHEST_PROTOCOL + 1)))
def test_an_event_can_be_pickled(event: Any, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(event, protocol))
    assert again == event
    assert hash(again) == hash(event)
    assert repr(again) == repr(event)


@given(event_values() | joined_values())
def test_an_event_can_be_copied(event: Any) -> None:
    assert copy.copy(event) == event
    assert copy.deepcopy(event) == event


def test_an_event_with_an_importable_condition_can_be_pickled_and_copied() -> None:
    event = Event(is_first, every_n_seconds=2)
    assert pickle.loads(pickle.dumps(event)) == event
    assert copy.deepcopy(event) == event


@pytest.mark.parametrize("name", [*STEP_CRITERIA, "every_n_epochs", "at_epoch", "until_step"])
def test_anything_with_index_is_a_step_count(name: str) -> None:
    criterion = {"every_n_steps": 9} if name == "until_step" else {}
    event = Event(**criterion, **{name: Index(3)})
    assert event == Event(**criterion, **{name: 3})
    assert hash(event) == hash(Event(**criterion, **{name: 3}))
    assert repr(event) == repr(Event(**criterion, **{name: 3}))


def test_the_items_of_a_collection_may_be_anything_with_index() -> None:
    assert Event(at_step=[Index(5), 3, Index(3)]) == Event(at_step=(3, 5))


class Array:
    """A collection such as a NumPy array: it has `__index__` and `__float__` too, which raise."""

    def __iter__(self) -> Iterator[Index]:
        return iter([Index(5), Index(3)])

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: int) -> Index:
        return [Index(5), Index(3)][at]

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def __float__(self) -> float:
        raise TypeError("only length-1 arrays can be converted to Python scalars")


def test_an_array_is_a_collection() -> None:
    assert Event(at_step=Array()) == Event(at_step=(3, 5))
    assert Event(at_epoch=Array()) == Event(at_epoch=(3, 5))


@pytest.mark.parametrize("value", [Fraction(1, 2), Decimal("0.5"), 0.5])
def test_anything_with_float_is_a_number_of_seconds(value: Any) -> None:
    assert Event(every_n_seconds=value) == Event(every_n_seconds=0.5)
    assert Event(at_time=value) == Event(at_time=0.5)
    assert Event(at_time=[value, 0.5]) == Event(at_time=0.5)


# Joined events


@given(event_values(), event_values(), event_values())
def test_joining_is_commutative_associative_and_ignores_repeats(
    a: Event, b: Event, c: Event
) -> None:
    joined = (a | b) | c
    for other in (a | (b | c), c | b | a, (a | b) | (b | c), joined | a):
        assert other == joined
        assert hash(other) == hash(joined)


def test_an_event_joined_with_itself_or_an_equal_one_is_the_event() -> None:
    event = Event(every_n_steps=3)
    assert event | event is event
    assert event | Event(every_n_steps=3) is event
    for joined in (event | LoopEvents.EPOCH_END, event | Event(at_step=1)):
        assert joined | event == joined | joined == joined


def test_an_event_and_a_loop_event_join_in_either_order() -> None:
    event, member = Event(every_n_steps=3), LoopEvents.TRAINING_END
    assert event | member == member | event
    assert hash(event | member) == hash(member | event)
    assert (event | LoopEvents.EPOCH_END) | member == member | (LoopEvents.EPOCH_END | event)


def test_joined_events_with_different_parts_are_not_equal() -> None:
    a, b = Event(every_n_steps=3), Event(every_n_steps=4)
    assert a | b != a | Event(every_n_steps=5)
    assert a | b != a | b | LoopEvents.EPOCH_END
    assert a | LoopEvents.EPOCH_END != a | LoopEvents.TRAINING_END


@pytest.mark.parametrize(
    "join",
    [
        lambda: LoopEvents.EPOCH_END | LoopEvents.TRAINING_END,
        lambda: Event(every_n_steps=3) | 3,
        lambda: "Log" | Event(every_n_steps=3),
        lambda: LoopEvents.EPOCH_END | None,
        lambda: (Event(every_n_steps=3) | LoopEvents.EPOCH_END) | {"Log"},
    ],
)
def test_only_events_and_loop_events_can_be_joined_and_not_loop_events_alone(
    join: Callable[[], object],
) -> None:
    with pytest.raises(TypeError):
        join()


# Refused arguments: keyword arguments, of which the last is wrong; type of the error; wrong value

NOT_COUNTS: list[Any] = [True, False, 1.0, "3", b"3", 1 + 0j, object, Fraction(3)]
NOT_SECONDS: list[Any] = [True, False, "3", b"3", 1 + 0j, object]
NO_PERIOD: list[Any] = [0, -1, TOP + 1, 10**30, Index(0)]
NO_STEP: list[Any] = [-1, TOP + 1, 10**30, Index(-1)]
BAD_SECONDS: list[Any] = [
    -1,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    TOP // 10**9 + 1,
    4611686018.5,
    1e300,
    10**30,
    Fraction(-1, 2),
]


NAIVE = datetime(2026, 11, 26)


def event_refusals() -> Iterator[tuple[dict[str, Any], type[Exception], Any]]:
    for name in ("every_n_steps", "every_n_epochs"):
        yield from (({name: value}, TypeError, value) for value in [*NOT_COUNTS, [3], (3, 4)])
        yield from (({name: value}, ValueError, value) for value in NO_PERIOD)
    for name in ("at_step", "at_epoch"):
        yield from (({name: value}, TypeError, value) for value in NOT_COUNTS)
        yield from (({name: [0, value]}, TypeError, value) for value in [*NOT_COUNTS, None, [3]])
        yield from (({name: value}, ValueError, value) for value in NO_STEP)
        yield from (({name: [5, value]}, ValueError, value) for value in NO_STEP)
        yield from (({name: empty}, ValueError, empty) for empty in ([], (), set(), range(0)))
    for value in [*NOT_SECONDS, [3.0]]:
        yield {"every_n_seconds": value}, TypeError, value
    for value in [0, 0.0, *BAD_SECONDS]:
        yield {"every_n_seconds": value}, ValueError, value
    for value in NOT_SECONDS:
        yield {"at_time": value}, TypeError, value
        yield {"at_time": (5, value)}, TypeError, value
    for value in BAD_SECONDS:
        yield {"at_time": value}, ValueError, value
        yield {"at_time": (5, value)}, ValueError, value
    yield from (({"at_time": empty}, ValueError, empty) for empty in ([], (), set()))
    for name in ("from_step", "until_step"):
        for value in [*NOT_COUNTS, [3]]:
            yield {"every_n_steps": 2, name: value}, TypeError, value
        yield from (({"every_n_steps": 2, name: value}, ValueError, value) for value in NO_STEP)
    yield {"every_n_steps": 2, "until_step": 0}, ValueError, 0
    yield {"every_n_steps": 2, "from_step": 5, "until_step": 5}, ValueError, 5
    yield {"every_n_steps": 2, "from_step": 5, "until_step": 4}, ValueError, 4
    for name in ("per_epoch", "per_launch"):
        for value in (1, 0, "yes"):
            yield {"every_n_steps": 2, "every_n_seconds": 2, name: value}, TypeError, value
    for name in (*TIME_CRITERIA, "every_n_epochs", "at_epoch"):
        yield {name: 2, "per_epoch": True}, ValueError, True
    for name in ("at_timestamp", "every_n_epochs", "at_epoch"):
        yield {name: 2, "per_launch": True}, ValueError, True
    for name in ("at_step", *TIME_CRITERIA, "at_timestamp", "every_n_epochs", "at_epoch"):
        yield {name: 2, "first_at_step": 7}, ValueError, 7
    yield {"every_n_steps": 2, "per_epoch": True, "per_launch": True}, ValueError, True
    for value in [*NOT_COUNTS, [3]]:
        yield {"every_n_steps": 2, "first_at_step": value}, TypeError, value
    yield from (
        ({"every_n_steps": 2, "first_at_step": value}, ValueError, value) for value in NO_STEP
    )
    for value in NOT_SECONDS:
        yield {"at_timestamp": value}, TypeError, value
        yield {"at_timestamp": (5, value)}, TypeError, value
    for value in [*BAD_SECONDS, NAIVE]:
        yield {"at_timestamp": value}, ValueError, value
        yield {"at_timestamp": (5, value)}, ValueError, value
    yield {"condition_function": is_first, "per_epoch": True}, ValueError, True
    yield {"condition_function": is_first, "per_launch": True}, ValueError, True
    yield from (
        ({"condition_function": value}, TypeError, value) for value in (3, "Log", [is_first])
    )


# None is off


def test_the_signature_shows_none_for_what_is_not_given() -> None:
    assert repr(inspect.signature(Event).parameters["every_n_steps"].default) == "None"


@pytest.mark.parametrize("name", [*CRITERIA, "condition_function"])
def test_a_criterion_that_is_none_is_as_if_it_had_not_been_given(name: str) -> None:
    for other, value in (("every_n_steps", 3), ("at_epoch", (1, 2))):
        if name != other:
            assert Event(**{other: value, name: None}) == Event(**{other: value})


@pytest.mark.parametrize("name", [*CRITERIA, "condition_function"])
def test_all_events_of_which_nothing_is_left_are_equal(name: str) -> None:
    off = Event(**{name: None})
    for other in (
        Event(every_n_steps=None),
        Event(every_n_steps=None, first_at_step=0, from_step=3, until_step=5),
        Event(at_step=None, every_n_seconds=None, per_launch=True),
        Event(at_step=None, per_epoch=True),
    ):
        assert off == other
        assert hash(off) == hash(other)
        assert eval(repr(other), NAMESPACE) == other
        assert pickle.loads(pickle.dumps(other)) == other
    assert off != Event(every_n_steps=1)


def test_a_modifier_bears_upon_what_is_left() -> None:
    event = Event(every_n_steps=None, first_at_step=0, at_time=5)
    assert event == Event(at_time=5)
    assert repr(event) == "Event(at_time=5)"
    assert Event(at_step=None, at_time=5, per_launch=True).per_launch is True


def test_a_modifier_that_is_none_has_its_default() -> None:
    modifiers = ("first_at_step", "from_step", "until_step", "per_epoch", "per_launch")
    assert Event(every_n_steps=3, **dict.fromkeys(modifiers)) == Event(every_n_steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["at_step", "at_epoch", "at_time", "at_timestamp"])
def test_the_error_of_a_point_that_should_be_off_names_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=-1: .* None switches it off$"):
        Event(**{name: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", [date(2026, 11, 27), datetime(2026, 11, 27)])
def test_a_moment_without_a_time_zone_is_refused(moment: Any) -> None:
    with pytest.raises(ValueError, match=r"^at_timestamp=.*; pass an aware datetime, or seconds"):
        Event(at_timestamp=moment)


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_epochs", "every_n_seconds"])
@pytest.mark.parametrize("value", [0, -1])
def test_the_error_of_a_period_that_should_be_off_names_none(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}: .* None switches it off$"):
        Event(**{name: value})


def test_an_event_with_nothing_given_is_refused() -> None:
    for given_ in ({}, {"from_step": 3}, {"per_epoch": None}):
        with pytest.raises(ValueError, match=r"^Event\(\): pass at least one of "):
            Event(**given_)  # type: ignore[arg-type]


@given(given_=arguments(), names=st.sets(st.sampled_from([*CRITERIA])))
def test_what_is_off_never_makes_an_event_another(given_: dict[str, Any], names: set[str]) -> None:
    assert Event(**{**dict.fromkeys(names), **given_}) == Event(**given_)


def test_a_moment_is_given_in_seconds_or_as_an_aware_datetime() -> None:
    aware = datetime(2026, 11, 26, 12, 0, 0, 500_000, tzinfo=timezone(timedelta(hours=1)))
    event = Event(at_timestamp=[aware, 3])
    assert event.at_timestamp == (3, aware.timestamp())
    assert event == Event(at_timestamp=[aware.timestamp(), 3, 3])
    assert eval(repr(event), NAMESPACE) == event


def assert_names(caught: Any, parameter: str, kind: type[Exception], value: Any) -> None:
    """The error is of exactly this type, and has one line that names parameter and value."""
    text = str(caught.value)
    assert caught.type is kind
    assert parameter in text
    assert repr(value) in text
    assert "\n" not in text


@pytest.mark.parametrize(("given_", "kind", "value"), list(event_refusals()))
def test_an_events_error_names_the_wrong_parameter_and_value_in_one_line(
    given_: dict[str, Any], kind: type[Exception], value: Any
) -> None:
    with pytest.raises(kind) as caught:
        Event(**given_)
    assert_names(caught, list(given_)[-1], kind, value)


@pytest.mark.parametrize("name", [*CRITERIA, "from_step", "until_step"])
def test_an_event_refuses_ints_of_too_many_digits_to_print_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Event(**{"every_n_steps": 1, name: 10**400})
    assert caught.type is ValueError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "max_seconds"])
def test_a_loop_refuses_ints_of_too_many_digits_to_print_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Loop([1], **{name: 10**400})  # type: ignore[arg-type]
    assert caught.type is ValueError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given_", [{}, {"from_step": 3}, {"until_step": 3}], ids=repr)
def test_an_event_without_a_criterion_is_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        Event(**given_)
    assert "\n" not in str(caught.value)


def test_only_the_condition_function_can_be_given_by_position() -> None:
    with pytest.raises(TypeError):
        Event(is_first, 3)
    with pytest.raises(TypeError, match="every_n_stepz"):
        Event(every_n_stepz=3)


@pytest.mark.parametrize(
    "given_",
    [
        {"every_n_steps": TOP},
        {"at_step": [0, TOP]},
        {"at_epoch": TOP},
        {"every_n_steps": 1, "from_step": TOP - 1, "until_step": TOP},
        {"every_n_seconds": TOP // 10**9},
        {"every_n_seconds": 4611686018.25},
        {"every_n_seconds": 1e-300},
        {"at_time": [0, 0.0, TOP // 10**9]},
    ],
    ids=repr,
)
def test_the_greatest_and_smallest_values_are_accepted(given_: dict[str, Any]) -> None:
    loop = Loop([1], {"Log": Event(**given_)}, max_steps=1, stop_when=Event(**given_))
    assert len(list(loop)) == 1


class Untouched:
    """A loader that fails if it is iterated."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated when the loop was created")

    def __repr__(self) -> str:
        return "Untouched()"


def loop_refusals() -> Iterator[tuple[dict[str, Any], type[Exception], Any]]:
    for name in ("max_epochs", "max_steps", "dataloader_len"):
        rest = {"max_steps": 3} if name == "dataloader_len" else {}
        yield from (({**rest, name: value}, TypeError, value) for value in [*NOT_COUNTS, [3]])
        yield from (({**rest, name: value}, ValueError, value) for value in NO_PERIOD)
    yield from (({"max_seconds": value}, TypeError, value) for value in [*NOT_SECONDS, [3]])
    yield from (({"max_seconds": value}, ValueError, value) for value in [0, 0.0, *BAD_SECONDS])
    event = Event(every_n_steps=1)
    for events in ([event], event, "Log", 3, {"Log"}):
        yield {"max_steps": 1, "events": events}, TypeError, events
    for value in (3, "Log", is_first, [event], LoopEvents.EPOCH_END, Event):
        yield {"max_steps": 1, "stop_when": value}, TypeError, value
    for value in (0, 1, "no", 1.0):
        yield {"max_steps": 1, "lookahead": value}, TypeError, value
    yield from (({"max_steps": 1, "clock": value}, TypeError, value) for value in (3, "now"))
    for value in (3, None, object()):
        yield {"max_steps": 1, "dataloader": value}, TypeError, value


@pytest.mark.parametrize(("given_", "kind", "value"), list(loop_refusals()))
def test_a_loops_error_names_the_wrong_parameter_and_value_in_one_line(
    given_: dict[str, Any], kind: type[Exception], value: Any
) -> None:
    with pytest.raises(kind) as caught:
        Loop(**{"dataloader": Untouched(), **given_})
    assert_names(caught, list(given_)[-1], kind, value)


@pytest.mark.parametrize("value", [3, is_first, LoopEvents.EPOCH_END, [Event(at_step=1)]])
@pytest.mark.parametrize("name", ["Log", 7, ("a", 1)])
def test_values_of_the_events_mapping_that_are_no_events_are_refused(name: Any, value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Loop(Untouched(), {"Fine": Event(every_n_steps=1), name: value}, max_steps=1)
    text = str(caught.value)
    assert repr(name) in text and repr(value) in text and "\n" not in text


@pytest.mark.parametrize("member", list(LoopEvents))
def test_a_loop_event_is_refused_as_a_name(member: LoopEvents) -> None:
    with pytest.raises(ValueError) as caught:
        Loop(Untouched(), {member: Event(every_n_steps=1)}, max_steps=1)
    text = str(caught.value)
    assert "events" in text and repr(member) in text and "\n" not in text


class TwoLines(int):
    def __repr__(self) -> str:
        return f"{int(self)}\nsteps"


@pytest.mark.parametrize(
    ("given_", "got"),
    [
        ({}, "none"),
        ({"max_steps": None}, "none"),
        ({"max_epochs": 3, "max_steps": 5}, "max_epochs=3, max_steps=5"),
        ({"max_steps": 5, "max_seconds": 0.5}, "max_steps=5, max_seconds=0.5"),
        (
            {"max_seconds": 2, "max_steps": 5, "max_epochs": 3},
            "max_epochs=3, max_steps=5, max_seconds=2",
        ),
        ({"stop_when": Event(at_step=3)}, "none"),
        ({"max_steps": TwoLines(5), "max_epochs": 3}, "max_epochs=3, max_steps=5 steps"),
    ],
    ids=repr,
)
def test_a_loop_needs_exactly_one_stopping_condition(given_: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError) as caught:
        Loop(Untouched(), **given_)
    assert str(caught.value) == (
        f"exactly one stopping condition is needed: max_epochs, max_steps or max_seconds; got {got}"
    )


@pytest.mark.parametrize(
    "given_",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "lookahead": True},
        {"max_epochs": 2, "lookahead": True, "dataloader_len": 3},
        {"max_epochs": 1, "lookahead": False},
    ],
    ids=repr,
)
def test_max_epochs_of_a_single_pass_source_without_dataloader_len_is_refused(
    given_: dict[str, Any],
) -> None:
    untouched = iter([1, 2, 3])
    with pytest.raises(ValueError, match="dataloader_len") as caught:
        Loop(untouched, **given_)
    assert "\n" not in str(caught.value)
    assert list(untouched) == [1, 2, 3]


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 3}, {"max_seconds": 3}])
def test_lookahead_and_dataloader_len_are_refused_together(limit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lookahead") as caught:
        Loop(Untouched(), dataloader_len=3, lookahead=True, **limit)
    assert "dataloader_len" in str(caught.value)
    assert "\n" not in str(caught.value)
    for lookahead in (None, False):
        assert Loop(Untouched(), dataloader_len=3, lookahead=lookahead, **limit)


def test_max_epochs_without_lookahead_and_length_is_refused() -> None:
    with pytest.raises(ValueError, match="dataloader_len") as caught:
        Loop(Untouched(), max_epochs=1, lookahead=False)
    assert "\n" not in str(caught.value)


def test_limits_may_be_anything_with_index() -> None:
    assert len(list(Loop([1, 2], max_steps=Index(3)))) == 3
    assert len(list(Loop([1, 2], max_epochs=Index(2)))) == 4
    assert len(list(Loop(iter([1, 2, 3]), max_epochs=1, dataloader_len=Index(2)))) == 2


def test_the_error_names_a_value_whose_repr_raises_by_its_type() -> None:
    class NoRepr:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    with pytest.raises(TypeError, match=r"every_n_steps=<.*NoRepr.*: pass a whole number"):
        Event(every_n_steps=cast(Any, NoRepr()))


def test_a_zero_dimensional_array_is_a_number() -> None:
    class ZeroDimensional:
        ndim = 0

        def __iter__(self) -> Iterator[int]:
            raise TypeError("iteration over a 0-d array")

        def __index__(self) -> int:
            return 7

    assert Event(at_step=cast(Any, ZeroDimensional())) == Event(at_step=7)


def test_an_object_whose_float_raises_is_refused_as_seconds() -> None:
    class Several:
        def __float__(self) -> float:
            raise TypeError("only arrays of one element become floats")

    with pytest.raises(TypeError, match=r"every_n_seconds=<.*: pass a finite number of seconds"):
        Event(every_n_seconds=Several())


@pytest.mark.no_core
def test_loop_events_have_names_and_stay_themselves_when_copied_or_pickled() -> None:
    names = ["EPOCH_END", "TRAINING_END", "INTERRUPT", "EXCEPTION"]
    assert [member.name for member in LoopEvents] == names
    for member in LoopEvents:
        assert repr(member) == f"LoopEvents.{member.name}"
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member
        with pytest.raises(AttributeError):
            member.name = "other"  # type: ignore[misc]
