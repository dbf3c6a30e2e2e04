"""The batches of an epoch in lists, so that several micro-batches are one step."""

from __future__ import annotations

from itertools import islice

NEVER = 2**63 - 1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class BatchLists:
    """Lists of `size` batches. The last of an epoch may be shorter.

    Args:
        batches: the iterator to fetch from.
        size: how many batches a list has.
        end: how many batches the epoch has, where that is known.
        given: how many of them were given before.
        has_finder: whether `batches` ends before the epoch's last batch, which another holds.

    Attributes:
        gathered: the batches of the next list that were fetched; an exception leaves them here.
        fell_short: whether the batches have ended before the epoch's length.
    """

    __slots__ = (
        "_end",
        "_has_finder",
        "batches",
        "fell_short",
        "gathered",
        "given",
        "size",
    )

    def __init__(
        self, batches: Iterator[Any], size: int, end: int, given: int, has_finder: bool
    ) -> None:
        self.batches = batches
        self.size = size
        self._end = end
        self.given = given
        self._has_finder = has_finder
        self.gathered: list[Any] = []
        self.fell_short = False

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        gathered = self.gathered
        wanted = min(self.size, self._end - self.given)
        gathered.extend(islice(self.batches, wanted - len(gathered)))
        if len(gathered) < wanted:
            self.batches = iter(())  # it has ended, and is not asked again
            self.fell_short = self._end < NEVER
        if not gathered or (self._has_finder and len(gathered) < wanted):
            raise StopIteration
        self.given += len(gathered)
        self.gathered = []
        return gathered
