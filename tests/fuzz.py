"""Fuzzing: arguments, states and files made of random bytes run, or give a documented error.

Each target makes a loop, or a state to load, and a few calls from the bytes, and runs them with
both cores. Only documented errors may be raised, with messages of one line, and both cores must do
the same. `test_fuzz.py` tries random bytes. `python -m fuzz TARGET`, in this folder and with
atheris installed, searches for bytes that reach new branches of dloop's Python files. Further
arguments are libFuzzer's, such as `-runs=100000`, or the file of an earlier failure.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

if __name__ == "__main__":  # before dloop is imported anywhere else, to count its branches
    import atheris

    with atheris.instrument_imports(include=["dloop"]):
        import dloop._core_py
        import dloop.loop
        import dloop.state  # noqa: F401

from cores import CORES, use_core
from dloop import Event, Loop, LoopEvents, LoopWarning, batched

DOCUMENTED = (TypeError, ValueError, RuntimeError, KeyError)
"""LoopError and its subclasses are RuntimeErrors; KeyError is of `steps_since` and `trigger`."""

Trace = list[Any]


class Bytes:
    """Choices made by the bytes in turn; after the last byte, always the first option."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1] if self.place <= len(self.data) else 0

    def pick(self, options: Any) -> Any:
        return options[self.byte() % len(options)]

    def one_in(self, n: int) -> bool:
        return self.byte() % n == n - 1

    def whole(self) -> int:
        """Mostly a small number, else one at the limits of a number type."""
        kind = self.byte() % 8
        if kind < 5:
            return self.byte() % 12
        if kind == 5:
            return int.from_bytes(bytes(self.byte() for _ in range(8)), "big", signed=True)
        return self.pick(BOUNDS) + self.byte() % 3 - 1


# ------------------------------------------------------------------------------- random arguments


class NoRepr:
    """An object whose repr raises."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


class Index:
    """A whole number with a repr of two lines."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index(\n{self.value})"


BOUNDS = (0, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64, 10**9, -(2**62), -(2**63), 10**5000)
FLOATS = (
    0.5,
    1.0,
    2.5,
    1e-9,
    1e-10,
    5e-324,
    1e9,
    4.7e9,
    1e300,
    -1.0,
    0.0,
    float("nan"),
    float("inf"),
)
STRANGE: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: False,
    str,
    lambda: "a\nb",
    lambda: "7",
    lambda: b"7",
    list,
    dict,
    lambda: {1: 2},
    object,
    NoRepr,
    lambda: 1j,
    lambda: Fraction(7, 2),
    lambda: Decimal("2.5"),
    lambda: Decimal("nan"),
    lambda: Decimal("1e400"),
    lambda: iter([1, 3]),
    lambda: iter(()),
    lambda: range(4),
    lambda: LoopEvents.EPOCH_END,
    lambda: Event(at_step=1),
    lambda: abs,
    lambda: int,
)
NAMES: tuple[Any, ...] = ("a", "b", 0, False, None, ("c", 1), "EPOCH_END", "a\nb", 2.5, frozenset())
STEPS = (
    *("every_n_steps", "at_step", "every_n_epochs", "at_epoch"),
    *("first_at_step", "from_step", "until_step"),
)
COUNTS = ("every_n", "at")
OTHERS = ("per_epoch", "per_launch", "condition_function", "wait_for")
SECONDS = ("every_n_seconds", "at_time", "at_timestamp")


def value(chosen: Bytes, seconds: bool = False) -> Any:
    """Mostly a number from 1 to 12, else any value."""
    if not chosen.one_in(8):
        return 1 + chosen.byte() % 12
    kind = chosen.byte() % 16
    if kind < 9:
        return chosen.pick(FLOATS) if seconds and kind % 2 else chosen.whole()
    if kind < 11:
        return Index(chosen.whole())
    if kind < 14:
        return [value(chosen, seconds) for _ in range(chosen.byte() % 4)]
    return chosen.pick(STRANGE)()


def epochs(chosen: Bytes) -> Any:
    """A number of epochs, or a fraction."""
    return chosen.pick((0.25, 0.3, 1 / 3, 1.5)) if chosen.one_in(3) else value(chosen, True)


def condition(chosen: Bytes) -> Callable[[Any], Any]:
    answers = [chosen.pick((False, True, None, "x", 0)) for _ in range(1 + chosen.byte() % 3)]
    raises_at = chosen.byte() if chosen.one_in(4) else -1

    def ask(state: Any) -> Any:
        if state.global_step == raises_at:
            raise (ValueError, StopIteration, LookupError)[raises_at % 3]("a condition's own")
        return answers[state.global_step % len(answers)]

    return ask


def event(chosen: Bytes) -> Any:
    arguments: dict[str, Any] = {}
    for _ in range(1 + chosen.byte() % 3):
        name = chosen.pick((*STEPS, *SECONDS, *COUNTS, *OTHERS))
        if name == "condition_function":
            arguments[name] = condition(chosen)
        elif name == "wait_for":
            member_or_strange = chosen.pick((lambda: LoopEvents.EPOCH_END, *STRANGE))()
            arguments[name] = chosen.pick(NAMES) if chosen.byte() % 4 else member_or_strange
        elif name.startswith("per_"):
            arguments[name] = chosen.pick((True, False)) if chosen.byte() % 8 else None
            if arguments[name]:
                arguments[f"every_n_{'steps' if name == 'per_epoch' else 'seconds'}"] = 3
        else:
            whole_or_not = epochs(chosen) if name == "every_n_epochs" else None
            arguments[name] = whole_or_not or value(chosen, name in SECONDS)
        if name in COUNTS:
            arguments["of"] = chosen.pick(("n", "n", "a\nb", 3))
    made = Event(**arguments)
    if chosen.one_in(4):
        made = made | chosen.pick(list(LoopEvents))
    if chosen.one_in(6):
        made = made | event(chosen)
    return made


class Loader:
    """A loader whose batches are numbered across epochs; `promise` is for `len()`."""

    def __init__(self, length: int, promise: object) -> None:
        self.length = length
        self.promise = promise
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            self.taken += 1
            yield self.taken


class Sized(Loader):
    def __len__(self) -> int:
        return self.promise  # type: ignore[return-value]


class Stateful(Loader):
    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if type(state) is not dict or type(state.get("taken")) is not int:
            raise ValueError("this is no state of the loader's")
        self.taken = state["taken"]


def dataloader(chosen: Bytes) -> Any:
    length = chosen.byte() % 9
    promise = length if chosen.byte() % 4 else value(chosen)
    kind = chosen.byte() % 8
    if kind == 0:
        return list(range(length))
    if kind == 1:
        return iter(range(length))
    if kind == 2:
        return lambda: iter(range(length))
    if kind == 3:
        return chosen.pick(STRANGE)()
    return (Loader, Sized, Stateful, Sized)[kind - 4](length, promise)


def loop(chosen: Bytes) -> Loop[Any]:
    loader = dataloader(chosen)
    events = {chosen.pick(NAMES): event(chosen) for _ in range(chosen.byte() % 4)}
    limits = ("max_epochs", "max_steps", "max_seconds")
    limit = chosen.pick(limits)
    seconds = limit == "max_seconds"
    arguments: dict[str, Any] = {limit: value(chosen, seconds)}
    if limit == "max_epochs":
        arguments[limit] = epochs(chosen)
    if chosen.one_in(8):
        arguments[chosen.pick(limits)] = value(chosen)
    if chosen.one_in(4):
        arguments["stop_when"] = event(chosen)
    if chosen.one_in(4):
        arguments["dataloader_len"] = value(chosen)
    if chosen.one_in(4):
        arguments["lookahead"] = chosen.pick((True, False, None, 1))
    if chosen.one_in(4):
        arguments["start_step"] = chosen.byte() % 20
        arguments["fast_forward"] = chosen.one_in(2)
    if chosen.one_in(4):
        arguments["on_exception"] = chosen.pick(("event", "raise", "raise ", None))
    arguments["clock"] = clock(chosen)
    if chosen.one_in(4):
        loader = batched(loader, value(chosen))
    return Loop(loader, events, **arguments)


def clock(chosen: Bytes) -> Callable[[], Any]:
    unit = chosen.pick((1, 0.25, 0, 1e-9, 2**40, -1))
    wrong_at = chosen.byte() if chosen.one_in(8) else -1
    wrong = value(chosen, True) if wrong_at >= 0 else None
    readings = 0

    def read() -> Any:
        nonlocal readings
        readings += 1
        return wrong if readings == wrong_at else readings * unit

    return read


# --------------------------------------------------------------------------------- random calls


def checked(made: BaseException | warnings.WarningMessage) -> tuple[str, str]:
    """Check that an error or a warning is documented and has one line; return type and text."""
    error = made.message if isinstance(made, warnings.WarningMessage) else made
    if not isinstance(error, (*DOCUMENTED, LoopWarning)) and "'s own" not in str(error):
        raise AssertionError(f"{type(error).__name__} is not documented") from error
    text = str(error)
    assert text, type(error)
    assert "\n" not in text, text
    assert "Exceeds the limit" not in text, "an int of too many digits for Python to show"
    return type(error).__name__, text


def steps(made: Loop[Any], chosen: Bytes, trace: Trace) -> None:
    """Make some steps, with random calls in between."""
    for _ in range(1 + chosen.byte() % 3):
        try:
            iterate(made, chosen, trace)
        except Exception as error:
            trace.append(checked(error))
        trace.append(made.stop_reason)
        if chosen.one_in(4):
            attempt(made, chosen, trace)


def iterate(made: Loop[Any], chosen: Bytes, trace: Trace) -> None:
    pairs = iter(made) if chosen.byte() % 4 else made.chunks(value(chosen))
    for _ in range(1 + chosen.byte() % 24):
        pair = next(pairs, None)
        if pair is None:
            trace.append("the end")
            return
        batch, events = pair
        trace.append((batch, sorted(map(str, events)), repr(made.state)))
        for name in events:
            assert name in events
        if chosen.one_in(8):
            attempt(made, chosen, trace)


def attempt(made: Loop[Any], chosen: Bytes, trace: Trace) -> None:
    try:
        trace.append(call(made, chosen))
    except Exception as error:
        trace.append(checked(error))


def call(made: Loop[Any], chosen: Bytes) -> Any:
    kind = chosen.byte() % 16
    if kind == 0:
        made.stop()
    elif kind == 1:
        made.restart()
    elif kind == 2:
        made.close()
    elif kind == 3:
        return len(made) if chosen.one_in(2) else made.steps_to_next_event()
    elif kind == 4:
        return made.steps_since(chosen.pick(NAMES))
    elif kind == 5:
        return made.state_dict(chosen.one_in(2))
    elif kind == 6:
        made.load_state_dict(made.state_dict())
    elif kind == 8:
        made.trigger(chosen.pick(NAMES))
    elif kind == 9:
        return made.lap(chosen.pick(NAMES))
    elif kind == 10:
        with made.pause_clock():
            return repr(made)
    elif kind == 11:
        made.pause_clock().__enter__()
    elif kind == 12:
        return sorted(map(str, made.finish()))
    elif kind == 13:
        return sorted(map(str, made.finish_epoch()))
    elif kind in (14, 15):
        name = chosen.pick(("n", "n", "m", "a\nb", 3, []))
        return sorted(map(str, made.count(name, value(chosen)))), dict(made.counts)
    else:
        with made, made.guard():
            raise ValueError("a body's own")
    return kind


def traced(run: Callable[[Trace], None]) -> Trace:
    """What `run` appends to its trace, the error that ends it, and its warnings."""
    trace: Trace = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(trace)
        except Exception as error:
            trace.append(checked(error))
    return [*trace, [checked(warning) for warning in caught]]


def assert_cores_agree(run: Callable[[Trace], None]) -> None:
    """Both cores give the same trace."""
    traces = []
    for core in CORES:
        with use_core(core):
            traces.append(re.sub("0x[0-9a-f]+", "an address", repr(traced(run))))
    assert len(set(traces)) == 1, "\n\n".join(traces)


# -------------------------------------------------------------------------------------- the targets


def arguments(data: bytes) -> None:
    """Loops with random arguments."""

    def run(trace: Trace) -> None:
        chosen = Bytes(data)
        steps(loop(chosen), chosen, trace)

    assert_cores_agree(run)


PLANS: tuple[Callable[..., Loop[Any]], ...] = (
    lambda **more: Loop(
        Sized(5, 5),
        {"a": Event(every_n_steps=3) | LoopEvents.EPOCH_END, ("b", 1): Event(at_time=[2, 9])},
        max_epochs=4,
        **more,
    ),
    lambda **more: Loop(Stateful(4, 4), {None: Event(every_n_seconds=2.5)}, max_steps=20, **more),
    lambda **more: Loop(
        list(range(6)), {7: Event(every_n_steps=2, per_epoch=True)}, max_seconds=30, **more
    ),
    lambda **more: Loop(iter(range(50)), {"a": Event(at_epoch=2)}, max_steps=20, **more),
    lambda **more: Loop(
        range(7),
        {"a": Event(every_n_steps=4), "b": Event(every_n_steps=3, wait_for="a")},
        stop_when=Event(at=30, of="n"),
        max_epochs=9,
        **more,
    ),
)


def planned(number: int, **more: Any) -> Loop[Any]:
    seconds = iter(range(10_000))
    return PLANS[number](clock=seconds.__next__, **more)


@cache
def saved(number: int, taken: int) -> str:
    """The state of a plan after `taken` steps, as JSON."""
    made = planned(number)
    for _, _ in zip(range(taken), made):
        made.count("n", 2)
    return json.dumps(made.state_dict())


def plain(chosen: Bytes, depth: int = 0) -> Any:
    """A random value that a state may contain."""
    kind = chosen.byte() % (11 if depth < 3 else 8)
    if kind < 4:
        return chosen.whole()
    if kind == 4:
        return chosen.pick(FLOATS)
    if kind < 8:
        return chosen.pick(
            (None, True, False, "", "str", "int", "a", "every", "at", "tuple", "at_time")
        )
    if kind == 8:
        keys = ("state", "at", "whole", "taken", "events", "limit", "version", "", 7)
        return {chosen.pick(keys): plain(chosen, depth + 1) for _ in range(chosen.byte() % 4)}
    if kind == 9:
        return tuple(plain(chosen, depth + 1) for _ in range(chosen.byte() % 3))
    return [plain(chosen, depth + 1) for _ in range(chosen.byte() % 4)]


def damage(state: Any, chosen: Bytes) -> Any:
    """`state` with one value replaced, repeated or deleted."""
    if not isinstance(state, (dict, list)) or not state or chosen.one_in(6):
        return plain(chosen)
    key = chosen.pick(list(state) if isinstance(state, dict) else range(len(state)))
    if chosen.one_in(8):
        del state[key]
    elif chosen.one_in(8) and isinstance(state, list):
        state.append(deepcopy(state[key]))
    else:
        state[key] = damage(state[key], chosen)
    return state


def states(data: bytes) -> None:
    """States with random changes."""

    def run(trace: Trace) -> None:
        chosen = Bytes(data)
        number = chosen.byte() % len(PLANS)
        state: Any = json.loads(saved(number, chosen.byte() % 22))
        for _ in range(chosen.byte() % 4):
            state = damage(state, chosen)
        made = planned(chosen.byte() % len(PLANS) if chosen.one_in(4) else number)
        made.load_state_dict(state)
        steps(made, chosen, trace)

    assert_cores_agree(run)


TARGETS = {target.__name__: target for target in (arguments, states)}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
