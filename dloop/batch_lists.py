"""`batched`: a loader of lists of batches, so that one step takes a whole accumulation window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar, overload

from . import checks, loaders

Item = TypeVar("Item")


@overload
def batched(loader: Iterable[Item], n: int) -> Iterable[list[Item]]: ...
@overload
def batched(loader: Callable[[], Iterable[Item]], n: int) -> Callable[[], Iterable[list[Item]]]: ...
def batched(loader: Any, n: int) -> Any:
    """Return a loader whose batches are lists of `n` batches of another.

    The last list of an epoch may be shorter. `len()` counts lists; `set_epoch`, state and
    end are those of `loader`. A single-pass `loader` stays single-pass.

    Args:
        loader: any iterable, or a callable that returns one for each epoch.
        n: how many batches make a list.

    Raises:
        TypeError: `loader` is neither, or `n` is not a whole number.
        ValueError: `n` is below 1.

    Example:
        >>> from dloop import Loop, batched
        >>> [batch for batch, events in Loop(batched(range(5), 2), max_epochs=1)]
        [[0, 1], [2, 3], [4]]
    """
    size = checks.count("n", n)
    if not loaders.is_iterable(loader):
        if not callable(loader):
            raise TypeError(f"loader={checks.shown(loader)}: pass an iterable, or a callable")
        return BatchedLoads(loader, size)
    loaders.refuse_no_batches("loader", loader)
    if loaders.is_single_pass(loader):
        return BatchLists(iter(loader), size)
    return Batched(loader, size)


class BatchedLoads(loaders.Lists):
    """A callable that returns a loader of lists for each epoch."""

    def __call__(self) -> Any:
        """Return the loader of lists of the next epoch."""
        return batched(self.lists_of(), self.size)


class Batched(loaders.Lists):
    """A loader of lists."""

    def __iter__(self) -> Iterator[list[Any]]:
        return BatchLists(iter(self.lists_of), self.size)

    def indexed_from(self, count: int, lists: Iterator[Any]) -> Iterator[list[Any]] | None:
        """Return fresh `lists` from the `count`-th on; None if the loader is not indexed."""
        if not isinstance(lists, BatchLists):  # it has a state
            return None
        batches = loaders.indexed_from(count * self.size, self.lists_of, lists.lists_of)
        return None if batches is None else BatchLists(batches, self.size)


class BatchLists(loaders.Lists):
    """The lists of an iterator. An exception leaves what was gathered in here.

    Attributes:
        has_ended: whether the iterator did, which a short list finds out.
    """

    def __init__(self, batches: Iterator[Any], size: int) -> None:
        super().__init__(batches, size)
        self._gathered: list[Any] = []
        self.has_ended = False

    def __iter__(self) -> BatchLists:
        return self

    def __next__(self) -> list[Any]:
        if not self.has_ended:
            self._gathered.extend(islice(self.lists_of, self.size - len(self._gathered)))
            self.has_ended = len(self._gathered) < self.size
        if not self._gathered:
            raise StopIteration
        gathered, self._gathered = self._gathered, []
        return gathered
