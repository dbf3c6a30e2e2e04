"""What arguments may be; wrong ones are refused in one line, with what to pass instead."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import inf, nan
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents, batched, sync
from loops import fired
from recording_loaders import RecordingLoader

pytestmark = pytest.mark.no_core

TOP = 2**62


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


@pytest.mark.parametrize(("name", "of_steps"), [("every_n", "every_n_steps"), ("at", "at_step")])
def test_a_count_of_nothing_names_the_count_of_steps(name: str, of_steps: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=3: add of=, a .*, or use {of_steps}=$"):
        Event(**{name: 3})  # type: ignore[arg-type]


class Untouched:
    """A loader that fails if it is iterated or measured."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated when the loop was made")

    __len__ = __iter__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Untouched()"


def loop(**arguments: Any) -> Loop[Any]:
    return Loop(**{"dataloader": Untouched(), **arguments})


def lists(sizes: Any) -> Iterator[Any]:
    return Loop([1], max_epochs=1).chunks(sizes)


EVENT = Event(every_n_steps=1)
OF_EVENTS: list[tuple[type[Exception], dict[str, Any]]] = [
    *[(TypeError, {"every_n_steps": value}) for value in [*NOT_WHOLE, [3]]],
    *[(TypeError, {"every_n_steps": 2, "until_step": value}) for value in [*NOT_WHOLE, [3]]],
    *[(TypeError, {"at_step": value}) for value in NOT_WHOLE],
    *[(TypeError, {"at_epoch": [0, value]}) for value in NOT_WHOLE],
    *[(TypeError, {"every_n_seconds": value}) for value in [*NOT_SECONDS, Array()]],
    *[(TypeError, {"at_time": [5, value]}) for value in NOT_SECONDS],
    *[(TypeError, {"at_timestamp": value}) for value in [*NOT_SECONDS, datetime(2026, 11, 26)]],
    *[(TypeError, {"condition_function": value}) for value in (3, "Log", [bool])],
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
    (ValueError, {"condition_function": bool, "per_launch": True}),
    (ValueError, {"at_step": 2, "first_at_step": 7}),
    (ValueError, {"every_n": 3, "of": "n", "per_launch": True}),
    (ValueError, {"every_n": 3, "of": "n", "first_at_step": 2}),
    (ValueError, {"every_n_steps": 2, "from_step": 5, "until_step": 5}),
    (ValueError, {"every_n_steps": 2, "per_epoch": True, "per_launch": True}),
]
OF_LOOPS: list[tuple[type[Exception], dict[str, Any]]] = [
    *[(TypeError, {"max_epochs": value}) for value in (True, "3", [3], 1j)],
    *[(TypeError, {"max_steps": 1, "dataloader_len": value}) for value in (True, 1.0, [3])],
    *[(TypeError, {"max_seconds": value}) for value in (True, "3", [3], 1j)],
    *[(TypeError, {"max_steps": 1, "events": value}) for value in ([EVENT], EVENT, "Log")],
    *[(TypeError, {"max_steps": 1, "stop_when": value}) for value in (3, "Log", bool, [EVENT])],
    *[(TypeError, {"max_steps": 1, "lookahead": value}) for value in (0, "no", 1.0)],
    *[(TypeError, {"max_steps": 1, name: "no"}) for name in ("start_step", "fast_forward")],
    *[(TypeError, {"max_steps": 1, name: 3}) for name in ("clock", "sync", "state_file")],
    *[(TypeError, {"max_steps": 1, "state_file": value}) for value in (1.5, b"a", ["a"])],
    *[(TypeError, {"max_steps": 1, name: ()}) for name in ("progress", "profile")],
    *[(TypeError, {"max_steps": 1, "sync": value}) for value in (max, True)],
    *[(TypeError, {"max_steps": 1, "signals": value}) for value in ("SIGTERM", 1.5, True)],
    *[(TypeError, {"max_steps": 1, "signals": value}) for value in (["SIGTERM"], [1.5])],
    (TypeError, {"max_steps": 1, "profile": "all"}),
    *[(ValueError, {"max_steps": value}) for value in (0, -1, 2**62 + 1, 10**400)],
    *[(ValueError, {"max_steps": 1, "dataloader_len": value}) for value in (0, -1)],
    *[(ValueError, {"max_epochs": value}) for value in (0, -0.5, 1e-7, float("nan"), 1e300)],
    *[(ValueError, {"max_seconds": value}) for value in (0, -0.5, float("nan"), 1e300)],
    (ValueError, {"max_steps": 1, "start_step": -1}),
    (ValueError, {"max_steps": 1, "on_exception": "ignore"}),
    *[(ValueError, {"max_steps": 1, "signals": value}) for value in (10**6, -1, 0)],
    *[(ValueError, {"max_steps": 1, "profile": value}) for value in (0, -1)],
    (ValueError, {"max_epochs": 1, "dataloader_len": 3, "lookahead": True}),
    (TypeError, {"max_steps": 1, "dataloader": 3}),
    (TypeError, {"max_steps": 1, "dataloader": None}),
]
OTHERS: list[tuple[Callable[..., Any], type[Exception], dict[str, Any]]] = [
    *[(lists, TypeError, {"sizes": value}) for value in (True, None, "3", 2.0)],
    *[(lists, TypeError, {"sizes": value}) for value in (["a"], [1, 2.0], [1, True])],
    *[
        (lists, ValueError, {"sizes": value})
        for value in (0, -1, [], {2}, (64, 8), [1, 0], TOP + 1)
    ],
    (batched, ValueError, {"loader": range(3), "n": 0}),
    (batched, TypeError, {"loader": range(3), "n": 2.0}),
    (batched, TypeError, {"n": 2, "loader": 3}),
    (sync.maximum, ValueError, {"function": max, "every": 0}),
    (sync.maximum, TypeError, {"every": 5, "function": 3}),
]
REFUSED = [
    *[(Event, *row) for row in OF_EVENTS],
    *[(loop, *row) for row in OF_LOOPS],
    *OTHERS,
]


@pytest.mark.parametrize(
    ("make", "kind", "arguments"), REFUSED, ids=lambda each: getattr(each, "__name__", repr(each))
)
def test_an_error_names_parameter_and_value_in_one_line(
    make: Callable[..., Any], kind: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        make(**arguments)
    name, value = list(arguments.items())[-1]
    shown = value[-1] if isinstance(value, list) and value else value
    text = str(caught.value)
    assert text.startswith(f"{name}=") and repr(shown)[:50] in text
    assert "\n" not in text and len(text) < 300


def test_an_error_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"every_n_seconds=.*np\.True_.*: pass .*number of seconds"):
        Event(every_n_seconds=bool_())
    with pytest.raises(TypeError, match=r"every_n_steps=<.*NoRepr.*: pass a whole number from 1"):
        Event(every_n_steps=NoRepr())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"at_timestamp=.* a datetime with a time zone"):
        Event(at_timestamp=datetime(2026, 11, 26))
    with pytest.raises(TypeError, match=r"condition_function=3: .*name the criterion"):
        Event(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"signals=.*: pass members of signal, such as "):
        Loop([1], max_epochs=1, signals="SIGTERM")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="signals="):
        Loop([1], max_epochs=1, signals=getattr(signal, "SIGKILL", 9))
    with pytest.raises(TypeError, match=r"sync=.*torch_distributed"):
        Loop([1], max_epochs=1, sync=max)
    with pytest.raises(ValueError, match=r"first_at_step=7: .*add one of every_n_steps"):
        Event(at_step=2, first_at_step=7)
    with pytest.raises(ValueError, match=r"of=.* add one of every_n, at$"):
        Event(at_step=2, of="n")


@pytest.mark.parametrize(
    ("make", "wrong", "meant"),
    [
        (Event, "every", "every_n_steps"),
        (Event, "every_n_step", "every_n_steps"),
        (Event, "seconds", "every_n_seconds"),
        (Event, "every_n_minutes", "every_n_seconds"),
        (Event, "epoch", "at_epoch"),
        (Event, "condition", "condition_function"),
        (Event, "untill_step", "until_step"),
        (loop, "epochs", "max_epochs"),
        (loop, "steps", "max_steps"),
        (loop, "max_step", "max_steps"),
        (loop, "loader", "dataloader"),
        (loop, "callbacks", "events"),
        (loop, "steps_per_epoch", "dataloader_len"),
        (loop, "on_exeption", "on_exception"),
        (loop, "checkpoint", "state_file"),
    ],
)
def test_an_unknown_argument_names_the_one_that_was_meant(
    make: Callable[..., Any], wrong: str, meant: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{wrong}= is no argument; did you mean {meant}=\?$"):
        make(**{wrong: 3})
    with pytest.raises(TypeError, match=r"^zzz= is no argument$"):
        make(zzz=3)


# What only a Loop refuses


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({}, "none"),
        ({"max_steps": None}, "none"),
        ({"max_epochs": 3, "max_steps": 5}, "max_epochs=3, max_steps=5"),
        ({"max_steps": 5, "max_seconds": 2, "stop_when": Event()}, "max_steps=5, max_seconds=2"),
    ],
    ids=str,
)
def test_a_loop_needs_exactly_one_limit_or_a_stop_when(arguments: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=rf"^pass exactly one of .* stop_when; got {got}$"):
        Loop(Untouched(), **arguments)
    assert Loop(Untouched(), stop_when=Event(at_step=3)).stop_reason is None


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (5, r"Event\(every_n_steps=5\), or Event\(at_step=5\)"),
        (bool, r"Event\(function\), which fires when function\(state\) is true"),
        ("Log", "an Event, or None"),
    ],
)
def test_what_is_no_event_names_the_form_that_was_meant(value: Any, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"^events\['A'\]=.*: pass {meant}$"):
        Loop(Untouched(), {"A": value}, max_epochs=1)
    with pytest.raises(TypeError, match=rf"^stop_when=.*: pass {meant}$"):
        Loop(Untouched(), stop_when=value)


def test_a_table_is_named_by_its_type() -> None:
    class Table:
        def __repr__(self) -> str:
            return "   a  b\n0  1  2\n1  3  4"

    with pytest.raises(TypeError, match=r"^max_steps=<Table>: pass a whole number"):
        Loop(Untouched(), max_steps=Table())  # type: ignore[arg-type]


def test_a_member_cannot_be_a_name() -> None:
    with pytest.raises(ValueError, match=r"^events: LoopEvents\.EPOCH_END fires by itself"):
        Loop(Untouched(), {LoopEvents.EPOCH_END: Event()}, max_steps=1)


def test_an_epoch_needs_a_known_end_under_max_epochs() -> None:
    unsized = RecordingLoader([1, 2])
    with pytest.raises(ValueError, match=r"^lookahead=False: .*dataloader_len"):
        Loop(unsized, max_epochs=1, lookahead=False)
    assert Loop(unsized, max_steps=1, lookahead=False)
    assert Loop(unsized, max_epochs=1, lookahead=False, dataloader_len=2)
    untouched = iter([1, 2, 3])
    with pytest.raises(ValueError, match=r"^max_epochs=2: .*single-pass.*dataloader_len"):
        Loop(untouched, max_epochs=2)
    assert list(untouched) == [1, 2, 3]
