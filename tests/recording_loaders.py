"""Loaders that record what is asked of them, or have epochs of given lengths; a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any


class Batch:
    """A batch that weak references can refer to."""


class RecordingBatches:
    """The iterator of one epoch: records every request, and refuses any after its end.

    What it finds among the batches that is an exception it raises; an interrupt only once.
    """

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
        if isinstance(batch, KeyboardInterrupt) and batch.__traceback__ is not None:
            return next(self)
        self.requests.append(f"next {batch!r}")
        if isinstance(batch, BaseException):
            raise batch
        return batch


class RecordingLoader:
    """A loader without a length; each epoch takes the next of `epochs`."""

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
