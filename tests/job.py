"""What the real loops work on: data, a model of one weight, a disk, a clock and a journal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from manual_clock import ManualClock


class Killed(BaseException):
    """The process is gone."""


class Job:
    """Writes down what a loop does, and when. A new life of it has the disk, and nothing else.

    Args:
        clock: the clock that it sets forward.
        seconds: what batches take, in turns.
        slow_fetch: that is to fetch them, else to train on them.
        strikes: by life, the moment at which something strikes, and whether that is a SIGTERM (or
            else the end). Moments are counted in each life: fetches, evaluations, logs and saves.
    """

    def __init__(
        self,
        clock: ManualClock,
        seconds: list[int],
        slow_fetch: bool,
        strikes: list[tuple[int, bool]],
    ) -> None:
        self.clock = clock
        self.journal: list[tuple[Any, ...]] = []
        self.disk: dict[str, Any] = {}
        self.weight = 1.0
        self._seconds = seconds
        self._slow_fetch = slow_fetch
        self._strikes = strikes
        self._strike: tuple[int, bool] | None = None
        self._moment = 0

    def begin_life(self, number: int) -> None:
        """Begin a life."""
        self._moment = 0
        self._strike = self._strikes[number] if number < len(self._strikes) else None
        self.journal.append(("life", number))

    def _do(self, *what: Any, seconds: int = 0) -> None:
        self.journal.append(what)
        self.clock.advance(seconds)
        self._moment += 1
        if self._strike == (self._moment - 1, False):
            raise Killed
        if self._strike == (self._moment - 1, True):
            signal.raise_signal(signal.SIGTERM)

    def fetch(self, number: int) -> float:
        """The batch of this number."""
        seconds = self._seconds[number % len(self._seconds)]
        self._do("fetch", number, seconds=seconds if self._slow_fetch else 0)
        return 1.0 + number % 7

    def stream(self) -> Iterator[float]:
        """An endless stream of batches, always the same."""
        number = 0
        while True:
            yield self.fetch(number)
            number += 1

    def train(self, batches: list[float], learning_rate: float = 0.25) -> None:
        """Make a step with the mean gradient of the batches."""
        gradient = sum(self.weight - batch for batch in batches) / len(batches)
        self.weight -= learning_rate * gradient
        self.journal.append(("train", len(batches), learning_rate, self.weight))
        if not self._slow_fetch:
            self.clock.advance(self._seconds[int(sum(batches)) % len(self._seconds)])

    def act(self, *what: Any) -> None:
        """Do something else that takes no time."""
        self._do(*what, self.weight)

    def evaluate(self, *what: Any) -> None:
        """Look for a minute how good the model is."""
        self._do("evaluate", *what, self.weight, seconds=60)

    def save(self, **what: Any) -> None:
        """Write a checkpoint."""
        self._do("save", self.weight)
        self.disk = {"weight": self.weight, **what}

    def load(self) -> dict[str, Any]:
        """The latest checkpoint; the model is as it was then."""
        self.weight = self.disk.get("weight", 1.0)
        return self.disk
