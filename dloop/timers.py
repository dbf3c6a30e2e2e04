"""The time criteria of a run: when each was last due, and which are due at a step."""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .agreement import Delivered
    from .schedule import TimeRow

NEVER = 2**63 - 1


class Timers:
    """Which time criteria are due. An immutable value, all times in nanoseconds.

    Times are training time, or for rows that are `per_launch` the time since this process began.

    Args:
        rows: the criteria, as `Schedule.times` has them.
        lasts: when each point was last due, or for a period the event; -1 if it never was.
        step: the next step.

    Attributes:
        next_time: the training time at which the next is due, of those whose first step has come.
        next_launch_time: the same, of those that are `per_launch`.
        next_start: the first step of the next of those whose first step has not come.
    """

    __slots__ = ("_rows", "lasts", "next_launch_time", "next_start", "next_time")

    def __init__(self, rows: Sequence[TimeRow], lasts: tuple[int, ...], step: int) -> None:
        self._rows = rows
        self.lasts = lasts
        next_times = [NEVER, NEVER]
        for row, last in zip(rows, lasts):
            if row.start <= step < row.stop:
                next_times[row.per_launch] = min(next_times[row.per_launch], _due(row, last))
        self.next_time, self.next_launch_time = next_times
        self.next_start = min([row.start for row in rows if row.start > step], default=NEVER)

    def due_at(self, step: int, times: tuple[int, int]) -> int:
        """The bits of those that are due at `step`, at its training time and its launch time."""
        bits = 0
        for row, last in zip(self._rows, self.lasts):
            if row.start <= step < row.stop and _due(row, last) <= times[row.per_launch]:
                bits |= 1 << row.place
        return bits

    def after(self, step: int, times: tuple[int, int], bits: int) -> Timers:
        """What comes after `step`, at which the events of `bits` are due, for whatever reason."""
        lasts = list(self.lasts)
        for number, row in enumerate(self._rows):
            time = times[row.per_launch]
            if row.period:
                is_due = bool(bits >> row.place & 1)
            else:
                is_due = row.start <= step < row.stop and _due(row, lasts[number]) <= time
            if is_due:
                lasts[number] = time
        return Timers(self._rows, tuple(lasts), step + 1)

    # The same, where processes agree: `due` has a number for each row. That of a period is whether
    # it is due, that of points is how many of them were reached.

    def to_ask_for(self, step: int, times: tuple[int, int]) -> list[int]:
        """What is due at `step`, as far as this process knows."""
        return [
            0
            if not row.start <= step < row.stop
            else int(_due(row, last) <= times[row.per_launch])
            if row.period
            else bisect_right(row.points, times[row.per_launch])
            for row, last in zip(self._rows, self.lasts)
        ]

    def bits_of(self, due: Sequence[int]) -> int:
        """The bits of the events of which anything new is due."""
        bits = 0
        for row, last, number in zip(self._rows, self.lasts, due):
            if number > (0 if row.period else bisect_right(row.points, last)):
                bits |= 1 << row.place
        return bits

    def after_agreement(
        self, step: int, times: tuple[int, int], bits: int, delivered: Delivered | None
    ) -> Timers:
        """What comes after `step`, where this was delivered and the events of `bits` are due."""
        lasts = list(self.lasts)
        due = () if delivered is None else delivered.rows
        for number, row in enumerate(self._rows):
            if row.period:
                if bits >> row.place & 1:
                    lasts[number] = times[row.per_launch]
            elif due and due[number]:
                lasts[number] = max(lasts[number], row.points[due[number] - 1])
        return Timers(self._rows, tuple(lasts), step + 1)


def _due(row: TimeRow, last: int) -> int:
    """The time at which `row` is due, which was last due at `last`."""
    if row.period:
        return max(last, 0) + row.period
    place = bisect_right(row.points, last)
    return NEVER if place == len(row.points) else row.points[place]
