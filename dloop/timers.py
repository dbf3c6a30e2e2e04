"""The time criteria of a run: when each was last due, and which are due at a step."""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schedule import TimeRow

NEVER = 2**63 - 1


class Timers:
    """Which time criteria are due. An immutable value, all times in nanoseconds.

    Args:
        rows: the criteria, as `Schedule.times` has them.
        launch: the training time at which this process began.
        lasts: the training time at which each was last due, or -1.
        step: the next step.

    Attributes:
        next_time: the training time at which the next is due, of those whose first step has come.
        next_start: the first step of the next of those whose first step has not come.
    """

    __slots__ = ("_launch", "_rows", "lasts", "next_start", "next_time")

    def __init__(
        self, rows: Sequence[TimeRow], launch: int, lasts: tuple[int, ...], step: int
    ) -> None:
        self._rows = rows
        self._launch = launch
        self.lasts = lasts
        self.next_time = min(
            [
                self._due(row, last)
                for row, last in zip(rows, lasts)
                if row.start <= step < row.stop
            ],
            default=NEVER,
        )
        self.next_start = min([row.start for row in rows if row.start > step], default=NEVER)

    def _due(self, row: TimeRow, last: int) -> int:
        """The training time at which `row` is due, which was last due at `last`."""
        origin = self._launch if row.per_launch else 0
        if row.period:
            return (origin if last < 0 else last) + row.period
        place = 0 if last < 0 else bisect_right(row.points, last - origin)
        return NEVER if place == len(row.points) else origin + row.points[place]

    def at(self, step: int, now: int) -> tuple[int, Timers]:
        """The bits of those that are due at `step`, at the training time `now`; and what is then.

        Nothing is, where `now` is below `next_time` and `step` below `next_start`.
        """
        bits = 0
        lasts = list(self.lasts)
        for number, row in enumerate(self._rows):
            if row.start <= step < row.stop and self._due(row, lasts[number]) <= now:
                bits |= 1 << row.place
                lasts[number] = now
        return bits, Timers(self._rows, self._launch, tuple(lasts), step + 1)
