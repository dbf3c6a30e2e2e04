"""Training time: what the clock has read since the run began, without pauses."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

from .errors import NEVER

LONGEST = 2**62 - 1
"""The training time, in nanoseconds, at which it stops growing."""


class Clock:
    """Training time in nanoseconds.

    Attributes:
        saved: the training time at the start.
        tick: returns a reading of the clock, which never runs backwards.
        ticking: whether training has begun; `launched`: the reading at that moment.
    """

    def __init__(self, tick: Callable[[], int] | None, saved: int) -> None:
        self.tick: Callable[[], int] = perf_counter_ns if tick is None else tick
        self.saved = saved
        self.ticking = False
        self.launched = 0
        self._started = 0  # `launched`, later by all pauses
        self._paused = NEVER  # the reading at which the pause began, or 0 before the start

    def start(self) -> None:
        """Start counting."""
        self.launched = self._started = self.tick()
        if self._paused < NEVER:
            self._paused = self.launched
        self.ticking = True

    def pause(self) -> None:
        """Stop counting until `resume`."""
        self._paused = self.tick() if self.ticking else 0

    def resume(self, last: int) -> int:
        """Count on after a pause; return the reading `last`, later by the pause."""
        pause = self.tick() - self._paused if self.ticking else 0
        last = min(last, self._paused) + pause  # it may have been read in the pause
        self._paused = NEVER
        self._started += pause
        return last

    def elapsed(self, reading: int) -> int:
        """Return the training time at a reading."""
        return min(self.saved + min(reading, self._paused) - self._started, LONGEST)

    def times_at(self, reading: int) -> tuple[int, int]:
        """Return the training time and the time of the launch at a reading."""
        return self.elapsed(reading), reading - self.launched

    def now(self) -> int:
        """Return the training time now."""
        return self.elapsed(self.tick()) if self.ticking else self.saved

    def reading_at(self, elapsed: int, launch_time: int) -> int:
        """Return the first reading at which this training time, or time of the launch, is over."""
        return min(elapsed - self.saved + self._started, launch_time + self.launched, NEVER)
