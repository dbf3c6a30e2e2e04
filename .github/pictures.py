"""Draws the README's pictures: a plan, and the profile of a run whose clock is scripted.

python .github/pictures.py FOLDER

The same code draws the same pictures, so that CI sees whether the repository's are current.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ["DLOOP_BACKEND"] = "python"  # whose clock can be replaced

from dloop import Event, Loop, LoopEvents, _core_py, profile

STEPS = 1000


class Clock:
    """A clock that a script advances."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def seconds(self) -> float:
        """What the loop reads."""
        return self.nanoseconds / 1e9

    def advance(self, milliseconds: float) -> None:
        """Let time pass."""
        self.nanoseconds += round(milliseconds * 1e6)


def main(folder: Path) -> None:
    """Draw both."""
    clock = Clock()
    chance = random.Random(0)

    def batches() -> Iterator[int]:
        clock.advance(900)  # workers start
        for batch in range(STEPS):
            clock.advance(chance.lognormvariate(1, 0.9))
            yield batch

    loop = Loop(
        batches,
        {
            "OptimizerStep": Event(every_n_steps=4) | LoopEvents.TRAINING_END,
            "Warmup": Event(every_n_steps=25, until_step=400),
            "Log": Event(every_n_steps=100),
            "Eval": Event(every_n_steps=500, first_at_step=0) | LoopEvents.TRAINING_END,
            "DropLR": Event(at_step=(1500, 2500)),
            "Checkpoint": Event(every_n_seconds=30) | LoopEvents.TRAINING_END,
        },
        max_epochs=3,
        dataloader_len=STEPS,
        clock=clock.seconds,
        profile=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    loop.plan().save_svg(folder / "plan.svg")
    modules = (
        patch.object(_core_py, "perf_counter_ns", lambda: clock.nanoseconds),
        patch.object(profile, "perf_counter_ns", lambda: clock.nanoseconds),
        patch("dloop.loop.perf_counter_ns", lambda: clock.nanoseconds),
    )
    with modules[0], modules[1], modules[2]:
        for _, events in loop:
            clock.advance(chance.gauss(38, 1.5))
            if "OptimizerStep" in events:
                clock.advance(chance.gauss(9, 0.5))
            if "Checkpoint" in events:
                clock.advance(chance.gauss(1500, 100))
            if "Eval" in events:
                with loop.pause_clock():
                    clock.advance(4000)
        loop.profile.save_svg(folder / "profile.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
