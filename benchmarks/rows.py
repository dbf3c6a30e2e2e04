"""The rows of the table; each compares dloop with an alternative.

Both sides of a row return what they have seen, so that the tests can check that they do the same.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import islice, repeat
from typing import Any, NamedTuple

import dloop._core_py
from dloop import Event, Loop, LoopEvents, LoopState, _backend

from .floor import compiled

STEP_EVENTS = {
    "OptimizerStep": Event(every_n_steps=16),
    "Log": Event(every_n_steps=100),
    "DropLR": Event(at_step=10_000),
}
EVENTS = {
    **STEP_EVENTS,
    "Checkpoint": Event(every_n_seconds=3600),
    "Warn": Event(at_time=50 * 60),
}


class Side(NamedTuple):
    """`make` prepares the argument of `run` from the items; only `run` is timed."""

    make: Callable[[list[int]], Any]
    run: Callable[[Any], int]


class Row(NamedTuple):
    """dloop and a rival over the same items; `target` and `stretch` are the aims for the ratio."""

    name: str
    ours: Side
    rival: Side
    target: float | None = None
    stretch: float | None = None
    steps: int = 200_000
    needs: str | None = None
    """The package of the rival."""


class Cost(NamedTuple):
    """A measurement without a rival; `target` and `stretch` are the aims for its value."""

    name: str
    unit: str
    measure: Callable[[], float]
    target: float
    stretch: float | None = None
    once: bool = False
    """Whether to measure only once, since every round gives the same."""


def as_it_is(data: list[int]) -> list[int]:
    return data


def loop_with(events: dict[Any, Event]) -> Callable[[list[int]], Loop[int]]:
    return lambda data: Loop(data, events, max_epochs=1)


def last_batch(pairs: Iterable[tuple[Any, object]]) -> Any:
    """Only iteration. Pairs are unpacked, as in real loops, which lets zip reuse its tuple."""
    for batch, _events in pairs:  # noqa: B007
        pass
    return batch


def with_repeat(data: list[int]) -> Iterator[tuple[int, None]]:
    """The cheapest way to yield pairs."""
    return zip(data, repeat(None))


# Five events and EPOCH_END: conditions written by hand, and the same with dloop


def by_hand(data: list[int]) -> int:
    perf = time.perf_counter
    t0 = last = perf()
    warned = False
    n = 0
    for step, batch in enumerate(data):  # noqa: B007 (as it is usually written)
        now = perf()
        if (step + 1) % 16 == 0:
            n += 1
        if (step + 1) % 100 == 0:
            n += 1
        if step == 10_000:
            n += 1
        if now - last >= 3600:
            last = now
            n += 1
        if not warned and now - t0 >= 3000:
            warned = True
            n += 1
        if step == len(data) - 1:
            n += 1
    return n


def six_checks(pairs: Iterable[tuple[int, AbstractSet[object]]]) -> int:
    n = 0
    for _batch, events in pairs:
        if "OptimizerStep" in events:
            n += 1
        if "Log" in events:
            n += 1
        if "DropLR" in events:
            n += 1
        if "Checkpoint" in events:
            n += 1
        if "Warn" in events:
            n += 1
        if LoopEvents.EPOCH_END in events:
            n += 1
    return n


def six_checks_under_one(pairs: Iterable[tuple[int, AbstractSet[object]]]) -> int:
    n = 0
    for _batch, events in pairs:
        if events:
            if "OptimizerStep" in events:
                n += 1
            if "Log" in events:
                n += 1
            if "DropLR" in events:
                n += 1
            if "Checkpoint" in events:
                n += 1
            if "Warn" in events:
                n += 1
            if LoopEvents.EPOCH_END in events:
                n += 1
    return n


# Many events


def many(number: int) -> dict[Any, Event]:
    """Events of slightly different periods."""
    return {name: Event(every_n_steps=10_000 + name) for name in range(number)}


# A source without a length: the next batch is fetched first, to know which one is the last


def without_length(data: list[int]) -> Loop[int]:
    return Loop(partial(iter, data), max_epochs=1)


def with_last(data: list[int]) -> Iterator[tuple[int, bool]]:
    batches = iter(data)
    batch = next(batches)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True


# Short epochs


def epochs_of(length: int) -> Callable[[list[int]], Loop[int]]:
    def loop(data: list[int]) -> Loop[int]:
        events = {"Log": Event(every_n_steps=100)}
        return Loop(data[:length], events, max_epochs=len(data) // length)

    return loop


def two_checks(loop: Loop[int]) -> int:
    n = 0
    for _batch, events in loop:
        if events:
            if "Log" in events:
                n += 1
            if LoopEvents.EPOCH_END in events:
                n += 1
    return n


def epochs_by_hand(data: list[int], length: int) -> int:
    batches = data[:length]
    n = global_step = 0
    for _epoch in range(len(data) // length):
        for step, _batch in enumerate(batches):
            if (global_step + 1) % 100 == 0:
                n += 1
            if step == len(batches) - 1:
                n += 1
            global_step += 1
    return n


# Something is counted in each step


def with_a_counter(data: list[int]) -> Loop[int]:
    return Loop(data, {"Log": Event(every_n=10**9, of="tokens")}, max_epochs=1)


def counted(loop: Loop[int]) -> int:
    for _batch, _events in loop:
        loop.count("tokens", 3)
    return loop.counts["tokens"]


class Tally:
    """What counts in hand-written code."""

    def __init__(self) -> None:
        self.total = 0

    def count(self, name: str, n: int) -> None:
        self.total += n


def tallied(loop: Loop[int]) -> int:
    tally = Tally()
    for _batch, _events in loop:
        tally.count("tokens", 3)
    return tally.total


# Lists of batches


def chunks_of_64(data: list[int]) -> Iterator[tuple[list[int], object]]:
    return Loop(data, {"Log": Event(every_n_steps=1000)}, max_epochs=1).chunks(64)


def last_of_chunks(chunks: Iterator[tuple[list[int], object]]) -> int:
    for batches, _events in chunks:  # noqa: B007
        pass
    return batches[-1]


def last_of_slices(data: list[int]) -> int:
    rest = iter(data)
    while batches := list(islice(rest, 64)):
        last = batches
    return last[-1]


# A condition


class State:
    """The state that hand-written code would pass to a condition."""

    __slots__ = ("elapsed", "epoch", "epoch_end", "epoch_step", "global_step", "training_end")

    def __init__(
        self,
        epoch: int,
        global_step: int,
        epoch_step: int,
        epoch_end: bool,
        training_end: bool,
        elapsed: float,
    ) -> None:
        self.epoch = epoch
        self.global_step = global_step
        self.epoch_step = epoch_step
        self.epoch_end = epoch_end
        self.training_end = training_end
        self.elapsed = elapsed


def condition(state: State | LoopState) -> bool:
    return state.global_step == 7


def condition_by_hand(data: list[int]) -> int:
    n = 0
    for step, _batch in enumerate(data):
        if condition(State(0, step, step, step == len(data) - 1, False, 0.0)):
            n += 1
    return n


def condition_check(loop: Loop[int]) -> int:
    n = 0
    for _batch, events in loop:
        if "Custom" in events:
            n += 1
    return n


# The core in Python


@contextmanager
def core_in_python() -> Iterator[None]:
    """Loops that are created inside use the core in Python, also later."""
    before = _backend.core
    _backend.core = dloop._core_py
    try:
        yield
    finally:
        _backend.core = before


def in_python(side: Side) -> Side:
    """`side` with the core in Python."""

    def make(data: list[int]) -> Any:
        with core_in_python():
            return side.make(data)

    return Side(make, side.run)


# Costs


def import_milliseconds() -> float:
    """The time of `import dloop` without that of starting the interpreter."""

    def start(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return 1e3 * (start("import dloop") - start("pass"))


def loop_microseconds(loops: int = 1000) -> float:
    """The time of a whole run over one batch."""
    began = time.perf_counter()
    for _ in range(loops):
        for _pair in Loop([None], EVENTS, max_epochs=1):
            pass
    return 1e6 * (time.perf_counter() - began) / loops


def memory_growth(epoch: int = 10_000, epochs: int = 1001) -> float:
    """How many more bytes are allocated at the end of any epoch than after a fifth of them.

    By then Python's free lists are full. The last epoch does not count, since TRAINING_END needs
    one more set of events.
    """
    data = [None] * epoch
    held = array("q", [0] * epochs)  # a list would allocate ints
    tracemalloc.start()
    loop = Loop(data, EVENTS, max_epochs=epochs)
    for _batch, events in loop:
        if LoopEvents.EPOCH_END in events:
            held[loop.epoch] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return max(held[epochs // 5 : -1]) - held[epochs // 5]


# The floor


def over_floor(side: Side, kind: str = "Floor") -> Side:
    """`side` with the floor, which yields the events of the loop's first step at each step."""

    def make(data: list[int]) -> Any:
        _batch, events = next(iter(side.make(data)))
        return getattr(compiled(), kind)(data, events, len(data))

    return Side(make, side.run)


def with_a_bar(data: list[int]) -> Loop[int]:
    tqdm: Any = import_module("tqdm").tqdm
    return Loop(data, STEP_EVENTS, max_epochs=1, progress=partial(tqdm, file=io.StringIO()))


def with_a_profile(data: list[int]) -> Loop[int]:
    return Loop(data, STEP_EVENTS, max_epochs=1, profile=True)


BY_HAND = Side(as_it_is, by_hand)
ZIP = Side(with_repeat, last_batch)
SIX_CHECKS = Side(loop_with(EVENTS), six_checks)
SIX_CHECKS_UNDER_ONE = Side(loop_with(EVENTS), six_checks_under_one)
STEPS_ALONE = Side(loop_with(STEP_EVENTS), last_batch)
TIMERS_ALONE = Side(loop_with(EVENTS), last_batch)
EVERY_STEP = Side(loop_with({"Log": Event(every_n_steps=1)}), last_batch)
CONDITION = Side(loop_with({"Custom": Event(condition)}), condition_check)
CONDITION_BY_HAND = Side(as_it_is, condition_by_hand)
NO_LENGTH = Side(without_length, last_batch)
WITH_LAST = Side(with_last, last_batch)
EPOCHS = Side(epochs_of(10), two_checks)
EPOCHS_BY_HAND = Side(as_it_is, partial(epochs_by_hand, length=10))
EPOCHS_OF_1 = Side(epochs_of(1), two_checks)
EPOCHS_OF_1_BY_HAND = Side(as_it_is, partial(epochs_by_hand, length=1))
CHUNKS = Side(chunks_of_64, last_of_chunks)
SLICES = Side(as_it_is, last_of_slices)

FLOOR_ROWS = [
    Row(
        "six checks / the floor with a coarse clock, six checks",
        SIX_CHECKS,
        over_floor(SIX_CHECKS, "FloorWithClock"),
        1.1,
    ),
    Row("iteration, step events / the floor", STEPS_ALONE, over_floor(STEPS_ALONE), 1.1),
    Row(
        "iteration, with timers / the floor with a coarse clock",
        TIMERS_ALONE,
        over_floor(TIMERS_ALONE, "FloorWithClock"),
        1.1,
    ),
    Row("an event in every step / the floor", EVERY_STEP, over_floor(EVERY_STEP), 2.7, 1.8),
]

ROWS = [
    Row("five events and EPOCH_END, six checks / by hand", SIX_CHECKS, BY_HAND, 0.40, 0.33),
    Row("six checks under one 'if events:' / by hand", SIX_CHECKS_UNDER_ONE, BY_HAND, 0.25),
    *FLOOR_ROWS,
    Row("iteration, step events / zip", STEPS_ALONE, ZIP),
    Row("iteration, with timers / zip", TIMERS_ALONE, ZIP),
    Row(
        "1,000 events / 5 events",
        Side(loop_with(many(1000)), last_batch),
        Side(loop_with(many(5)), last_batch),
        1.3,
        1.1,
    ),
    Row("a condition per step / by hand", CONDITION, CONDITION_BY_HAND, 0.5, 0.4),
    Row(
        "a count per step / a method call",
        Side(with_a_counter, counted),
        Side(loop_with({}), tallied),
        1.5,
    ),
    Row("no length / by hand, one fetched ahead", NO_LENGTH, WITH_LAST, 0.7),
    Row("epochs of 10 batches / by hand", EPOCHS, EPOCHS_BY_HAND, 3.5),
    Row("epochs of 1 batch / by hand", EPOCHS_OF_1, EPOCHS_OF_1_BY_HAND, 10.0, steps=20_000),
    Row("chunks(64), per batch / islice in lists of 64", CHUNKS, SLICES, 2.0, 0.9),
    Row("the core in Python: six checks / by hand", in_python(SIX_CHECKS), BY_HAND, 1.2, 1.0),
    Row("the core in Python: no length / by hand, one ahead", in_python(NO_LENGTH), WITH_LAST, 4.0),
    Row(
        "the core in Python: a condition per step / by hand",
        in_python(CONDITION),
        CONDITION_BY_HAND,
        4.0,
    ),
    Row("the core in Python: chunks(64) / islice", in_python(CHUNKS), SLICES, 6.0),
    Row("with a bar / without", Side(with_a_bar, last_batch), STEPS_ALONE, 1.05, needs="tqdm"),
    Row(
        "the same in a run of 4 million steps",
        Side(with_a_bar, last_batch),
        STEPS_ALONE,
        1.05,
        steps=4_000_000,
        needs="tqdm",
    ),
    Row("with a profile / without", Side(with_a_profile, last_batch), STEPS_ALONE, 7.0),
]

COSTS = [
    Cost("import dloop, above a bare start", "ms", import_milliseconds, 60, 30),
    Cost("a Loop with five events, over one batch", "µs", loop_microseconds, 60, 25),
    Cost("growth over 10 million steps", "bytes", memory_growth, 1000, once=True),
]
