"""The program that callgrind measures: each case with two numbers of steps, in one process.

`benchmarks.instructions` runs this as a file, so that it imports the installed dloop and not one in
the current folder. The instructions between two calls of `mark` are counted.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

from dloop import BACKEND, Event, Loop, _backend

SHORT = 10_000
LONG = 30_000


class Case(NamedTuple):
    """`make` prepares a run of a number of steps; only `run` is counted."""

    name: str
    make: Callable[[int], Any]
    run: Callable[[Any], None]


def mark() -> None:
    """Begin a new part: callgrind does so at getppid, which nothing else calls."""
    os.getppid()


def loop_with(events: dict[Any, Event]) -> Callable[[int], Loop[None]]:
    # A list creates no batches; it is longer than the run, so that no epoch ends.
    return lambda steps: Loop([None] * (LONG + 1), events, max_steps=steps)


def loop_without_length(steps: int) -> Loop[None]:
    return Loop(partial(repeat, None), FAR, max_steps=steps)


def lists_of_64(steps: int) -> Iterable[object]:
    return loop_with(FAR)(steps).chunks(64)


def epochs_of_10(steps: int) -> Loop[None]:
    return Loop([None] * 10, FAR, max_epochs=steps // 10)


def go_through(pairs: Iterable[object]) -> None:
    for _pair in pairs:
        pass


def many(number: int) -> dict[Any, Event]:
    return {name: Event(every_n_steps=10_000 + name) for name in range(number)}


def set_of_step(step: int) -> Callable[[int], tuple[AbstractSet[object], int]]:
    """The events of step 0, which has none, or 1, at which `Log` fires; and the number of lookups.

    The members of LoopEvents are hashed by their addresses, which differ between environments.
    Among many names they are unlikely to collide with the name that is looked up.
    """
    events = {"Log": Event(every_n_steps=2), "Save": Event(every_n_steps=1000), **many(1000)}
    sets = [due for _batch, due in Loop(range(4), events, max_steps=3)]
    return lambda steps: (sets[step], steps // 5)


def ask_for_log(asked: tuple[AbstractSet[object], int]) -> None:
    events, times = asked
    for _ in repeat(None, times):  # five, so that the loop itself counts little
        found = "Log" in events
        found = "Log" in events
        found = "Log" in events
        found = "Log" in events
        found = "Log" in events  # noqa: F841


def ask_for_save(asked: tuple[AbstractSet[object], int]) -> None:
    events, times = asked
    for _ in repeat(None, times):
        found = "Save" in events
        found = "Save" in events
        found = "Save" in events
        found = "Save" in events
        found = "Save" in events  # noqa: F841


FAR = {"Log": Event(every_n_steps=10**6), "Save": Event(at_step=10**6)}
TIMERS = {"Checkpoint": Event(every_n_seconds=10**6), "Warn": Event(at_time=10**6)}

CASES = [
    Case("quiet step", loop_with(FAR), go_through),
    Case("quiet step, with timers", loop_with({**FAR, **TIMERS}), go_through),
    Case("step at which one event fires", loop_with({"Log": Event(every_n_steps=1)}), go_through),
    Case(
        "step at which one event fires, with timers",
        loop_with({"Log": Event(every_n_steps=1), **TIMERS}),
        go_through,
    ),
    Case("quiet step, source without a length", loop_without_length, go_through),
    Case("quiet step, in lists of 64", lists_of_64, go_through),
    Case("step, epochs of 10", epochs_of_10, go_through),
    Case("'in' on the empty set", set_of_step(0), ask_for_log),
    Case("'in' on a full set, which has it", set_of_step(1), ask_for_log),
    Case("'in' on a full set, which has it not", set_of_step(1), ask_for_save),
    Case("step, 5 events every 10,000 + i", loop_with(many(5)), go_through),
    Case("step, 1,000 events every 10,000 + i", loop_with(many(1000)), go_through),
]


def main() -> None:
    """Run each case with both numbers of steps, after a first run that lets Python specialise."""
    for case in CASES:
        case.run(case.make(SHORT))
        for steps in (SHORT, LONG):
            made = case.make(steps)
            gc.collect()
            mark()
            case.run(made)
            mark()
    core: Any = _backend.core
    about = {"core": BACKEND, "file": core.__file__, "steps": LONG - SHORT}
    print(json.dumps({**about, "cases": [case.name for case in CASES]}))


if __name__ == "__main__":
    main()
