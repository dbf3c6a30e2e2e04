"""What several test files use: loaders, a clock, ways to enter a loop, marks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import pytest

from dloop import Loop

CPYTHON = sys.implementation.name == "cpython"

Enter = Callable[[Loop[Any]], Iterator[tuple[Any, Any]]]
ENTER: dict[str, Enter] = {"steps": iter, "lists": lambda loop: loop.chunks(2)}
"""The ways to iterate over a loop, by name."""

needs_reference_counts = pytest.mark.skipif(not CPYTHON, reason="needs reference counts")


class RecordingBatches:
    """The iterator of one epoch: records every request, and refuses any after its end."""

    def __init__(self, batches: Iterable[Any], requests: list[str]) -> None:
        self.batches = iter(batches)
        self.requests = requests
        self.ended = False

    def __iter__(self) -> RecordingBatches:
        return self

    def __next__(self) -> Any:
        assert not self.ended, "an iterator was asked for a batch after its end"
        try:
            batch = next(self.batches)
        except StopIteration:
            self.ended = True
            self.requests.append("end")
            raise
        self.requests.append(f"next {batch!r}")
        if isinstance(batch, BaseException):
            raise batch
        return batch


class RecordingLoader:
    """A loader without a length; each epoch takes the next of `epochs`. Exceptions are raised."""

    def __init__(self, *epochs: Iterable[Any]) -> None:
        self.epochs = cycle(epochs)
        self.requests: list[str] = []

    def __iter__(self) -> RecordingBatches:
        return RecordingBatches(next(self.epochs), self.requests)


class SizedLoader(RecordingLoader):
    """A loader whose `len()` is `promise`, which may be wrong."""

    def __init__(self, *epochs: Iterable[Any], promise: int) -> None:
        super().__init__(*epochs)
        self.promise = promise

    def __len__(self) -> int:
        return self.promise


def epochs_of(lengths: Iterable[int], *, sized: bool) -> Callable[[], Iterable[int]]:
    """A callable whose epochs have these lengths, over and over; `sized`: they have a `len()`."""
    epochs = cycle(lengths)
    return lambda: range(next(epochs)) if sized else iter(range(next(epochs)))


class ManualClock:
    """A clock that shows `now`, and counts its readings."""

    def __init__(self, now: float = 0) -> None:
        self.now = now
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now

    def one_second_each(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; fetching one takes a second."""
        for batch in batches:
            self.now += 1
            yield batch


class Batch:
    """A batch that weak references can refer to."""


def flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """The batches of `pairs`, where a batch may be a list of batches."""
    batches: list[Any] = []
    for batch, _events in pairs:
        batches += batch if isinstance(batch, list) else [batch]
    return batches
