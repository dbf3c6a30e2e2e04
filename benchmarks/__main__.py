"""What dloop costs per step, beside what a person would write or take instead.

Each row compares dloop with its rival in one process, run in turns; shown are medians and the
spread (half the range between the quartiles, in percent). `--json` prints all of it for machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from statistics import median, quantiles
from typing import Any, NamedTuple

import dloop
from dloop import Event, Loop, LoopEvents

STEPS = 200_000
DATA = list(range(STEPS))

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


def by_hand() -> None:
    """The conditions of the example, as a person writes them."""
    data = DATA
    perf = time.perf_counter
    t0 = last = perf()
    warned = False
    n = 0
    for step, batch in enumerate(data):  # noqa: B007 (as it is written)
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


def by_dloop() -> None:
    """The same with dloop."""
    n = 0
    for _batch, events in Loop(DATA, EVENTS, max_epochs=1):
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


def over_zip() -> None:
    """The cheapest way to hand over pairs."""
    for _pair in zip(DATA, repeat(None)):
        pass


def over(events: dict[Any, Event]) -> Callable[[], None]:
    """Iteration alone."""

    def run() -> None:
        for _pair in Loop(DATA, events, max_epochs=1):
            pass

    return run


class State:
    """What a person would hand to a condition."""

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


def condition(state: Any) -> bool:
    """One that never holds."""
    return False


def condition_by_hand() -> None:
    """A small object for every step, and a call."""
    n = 0
    for step, _batch in enumerate(DATA):
        if condition(State(0, step, step, step == len(DATA) - 1, False, 0.0)):
            n += 1


def condition_by_dloop() -> None:
    """The same with dloop."""
    n = 0
    for _batch, events in Loop(DATA, {"Custom": Event(condition)}, max_epochs=1):
        if "Custom" in events:
            n += 1


def loops() -> None:
    """Short runs: what making a Loop costs."""
    for _ in range(1000):
        for _pair in Loop([None], EVENTS, max_epochs=1):
            pass


def many(number: int) -> dict[Any, Event]:
    """Events of slightly different periods."""
    return {name: Event(every_n_steps=10_000 + name) for name in range(number)}


class Row(NamedTuple):
    """dloop, its rival, and the ratio that is wanted at most."""

    name: str
    ours: Callable[[], None]
    rival: Callable[[], None]
    target: float
    stretch: float


ROWS = [
    Row("five events and EPOCH_END, six checks / by hand", by_dloop, by_hand, 0.40, 0.33),
    Row("iteration, step events / zip", over(STEP_EVENTS), over_zip, 2.2, 1.8),
    Row("iteration, with timers / zip", over(EVENTS), over_zip, 3.2, 2.4),
    Row("1,000 events / 5 events", over(many(1000)), over(many(5)), 1.3, 1.1),
    Row("a condition per step / by hand", condition_by_dloop, condition_by_hand, 0.5, 0.4),
]


def ns_per(function: Callable[[], None], number: int) -> float:
    """The time of one call, divided by `number`."""
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / number


def summary(times: list[float]) -> dict[str, float]:
    """The median, and the spread in percent of it."""
    low, middle, high = quantiles(times, n=4)
    return {"median": middle, "spread": 50 * (high - low) / middle}


def compare(row: Row, rounds: int) -> dict[str, Any]:
    """Run the two in turns."""
    pairs = [(ns_per(row.ours, STEPS), ns_per(row.rival, STEPS)) for _ in range(rounds)]
    return {
        "name": row.name,
        "times": [summary(list(times)) for times in zip(*pairs)],
        "ratio": median(ours / rival for ours, rival in pairs),
        "target": row.target,
        "stretch": row.stretch,
    }


def import_milliseconds(rounds: int) -> dict[str, float]:
    """The time of `import dloop` above that of a bare start of the interpreter."""

    def start(code: str) -> float:
        return ns_per(lambda: subprocess.run([sys.executable, "-c", code], check=True), 10**6)

    return summary([start("import dloop") - start("pass") for _ in range(rounds)])


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="how often to run each")
    asked = parser.parse_args()

    rows = [compare(row, asked.rounds) for row in ROWS]
    made = summary([ns_per(loops, 1000) / 1000 for _ in range(asked.rounds)])
    imported = import_milliseconds(asked.rounds)
    machine = (
        f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    )
    if asked.json:
        about = {"machine": machine, "backend": dloop.BACKEND}
        print(json.dumps({**about, "rows": rows, "loop_us": made, "import_ms": imported}))
        return
    print(f"{machine}, {dloop.BACKEND} core, {STEPS} steps, medians of {asked.rounds} rounds\n")
    print(f"{'':48}{'ns per step':>16}{'rival':>14}{'ratio':>7}{'target':>8}{'stretch':>8}")
    for row in rows:
        shown = [
            f"{each['median']:7.1f} ±{each['spread']:2.0f}%" for each in (row["ours"], row["rival"])
        ]
        print(
            f"{row['name']:48}{shown[0]:>16}{shown[1]:>14}{row['ratio']:7.2f}"
            f"{row['target']:8.2f}{row['stretch']:8.2f}"
        )
    print(f"a Loop with five events, made and run over one batch: {made['median']:.1f} µs")
    print(f"import dloop: {imported['median']:.1f} ms")


if __name__ == "__main__":
    main()
