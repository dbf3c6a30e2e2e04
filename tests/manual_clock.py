"""A clock that tests set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class ManualClock:
    """A clock that shows `now`, and counts its readings."""

    def __init__(self, now: float = 0) -> None:
        self.now = now
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def one_second_each(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; fetching one takes a second."""
        for batch in batches:
            self.now += 1
            yield batch
