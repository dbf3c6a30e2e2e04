"""Events compiled for the core: names to bits, steps to ints, seconds to nanoseconds; timers.

Each name has a place: the members of LoopEvents come first, then the names of the mapping, then two
for `stop_when`. The bit of a place is `1 << place`, and the events of a step are a sum of bits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from functools import reduce
from math import inf
from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checks
from .errors import NEVER, warn
from .events import Event, LoopEvents, Member, checked_counter

if TYPE_CHECKING:
    from ._core import LoopState

RUN, LAUNCH, EPOCH = 0, 1, 2
"""What step numbers count from: the run's, the launch's, or the epoch's first step."""
MOST_UNKNOWN = 1000
"""How many unknown names a loop warns of."""


class StepRow(NamedTuple):
    """A step or epoch criterion: a period from a first number on, or points (the period is 0).

    `fraction` is a period in epochs that is no whole number; each epoch has its own points.
    """

    place: int
    period: int
    first: int
    points: tuple[int, ...]
    origin: int
    start: int
    stop: int
    fraction: Fraction | None = None

    def next_step(self, step: int, origin: int) -> int:
        """Return the first step from `step` on at which this is met; `origin` counts as 0."""
        count = max(step - origin, self.start)
        if not self.period:
            place = bisect_left(self.points, count)
            count = NEVER if place == len(self.points) else self.points[place]
        elif count <= self.first:
            count = self.first
        else:
            count += -(count - self.first) % self.period
        return NEVER if count >= self.stop else origin + count

    def in_epoch(self, epoch: int, length: int | None, first: int) -> StepRow:
        """Return the row with its points in an epoch; they count from `first`."""
        points = [first + point for point in self.points_in(epoch, length)]
        return self._replace(points=tuple(points))

    def points_in(self, epoch: int, length: int | None) -> Sequence[int]:
        """Return the steps of an epoch at which a multiple of the fraction is reached."""
        if self.fraction is None or length is None:
            return range(0)
        if self.fraction * length <= 1:
            return range(length)
        above, below = self.fraction.as_integer_ratio()
        numbers = range(epoch // self.fraction + 1, (epoch + 1) // self.fraction + 1)
        return [-(-(n * above - epoch * below) * length // below) - 1 for n in numbers]


def steps_up_to(epochs: Fraction | int, length: int) -> int:
    """Return how many steps reach so many epochs of this length."""
    return -(-epochs.numerator * length // epochs.denominator)


class TimeRow(NamedTuple):
    """A time criterion: a period or points in nanoseconds of training or launch time.

    `owner` is the place of its event, which is another than its own if it waits.
    """

    place: int
    owner: int
    period: int
    points: tuple[int, ...]
    per_launch: bool
    origin: int
    start: int
    stop: int


class ConditionRow(NamedTuple):
    """A condition, and the event that it belongs to, in words."""

    place: int
    function: Callable[[LoopState], object]
    whose: str
    origin: int
    start: int
    stop: int


class CounterRow(NamedTuple):
    """A criterion of a counter: a period, or points (the period is 0)."""

    bit: int
    period: int
    points: tuple[int, ...]
    origin: int
    start: int
    stop: int

    def next_after(self, total: int) -> float:
        """Return the first sum above `total` at which this is met; infinity if there is none."""
        if self.period:
            return total - total % self.period + self.period
        place = bisect_right(self.points, total)
        return inf if place == len(self.points) else self.points[place]


class CounterRows(list[CounterRow]):
    """The criteria of one counter."""

    def due_after(self, total: int) -> float:
        """Return the first sum above `total` at which one is met; infinity if there is none."""
        return min([row.next_after(total) for row in self], default=inf)

    def bits_at(self, before: int, total: int, step: int, origins: Sequence[int]) -> int:
        """Return the bits of those that are met at `step`, in which the sum grew."""
        bits = 0
        for row in self:
            if is_open(row, step, origins) and row.next_after(before) <= total:
                bits |= row.bit
        return bits


def is_open(row: StepRow | TimeRow | CounterRow, step: int, origins: Sequence[int]) -> bool:
    """Return whether the window of a criterion is open at `step`."""
    return row.start <= step - origins[row.origin] < row.stop


class WaitRow(NamedTuple):
    """A part of an event that waits: the bits of the part, of its event, and of what it awaits."""

    bit: int
    owner: int
    awaited: int
    origin: int
    start: int
    stop: int


class Waits:
    """The parts of events that wait for others.

    Attributes:
        waiting: the bits of those that were met and did not fire yet.
    """

    def __init__(self, rows: list[WaitRow]) -> None:
        self.rows = rows
        self.waiting = 0
        self._bits = sum([row.bit for row in rows])

    def end_epoch(self, step: int, origins: Sequence[int]) -> None:
        """Forget those whose window is over at `step`, the last of an epoch."""
        self.waiting = self.open_at(step, self.waiting, origins)

    def settle(self, step: int, bits: int, origins: Sequence[int]) -> tuple[int, int]:
        """Return the bits that fire at `step`, where `bits` are met, and those that wait after."""
        if not self.waiting and not bits & self._bits:
            return bits, 0
        waiting = self.open_at(step, self.waiting, origins) | bits & self._bits
        for row in self.rows:
            can_fire = step - origins[row.origin] >= row.start
            if can_fire and waiting & row.bit and bits & row.awaited:
                bits |= row.owner
        for row in self.rows:
            if bits & row.owner:
                waiting &= ~row.bit
        return bits, waiting

    def open_at(self, step: int, waiting: int, origins: Sequence[int]) -> int:
        """Return the bits of those that wait and whose window is not over at `step`."""
        over = [row.bit for row in self.rows if step - origins[row.origin] >= row.stop]
        return waiting & ~sum(over)


class Names:
    """The names of a loop's events, by place. Event sets refer to this, and to nothing else."""

    def __init__(self, names: Iterable[Hashable]) -> None:
        self.names = list(names)
        self.places = {name: place for place, name in enumerate(self.names)}
        self._unknown: set[Hashable] = set()

    def warn_of_unknown(self, name: Hashable) -> None:
        """Warn, once for each name, that the loop has no such event."""
        if name not in self._unknown and len(self._unknown) < MOST_UNKNOWN:
            self._unknown.add(name)
            warn(self.unknown(name))

    def unknown(self, name: Hashable) -> str:
        """Return a message about an unknown name, with the nearest known one."""
        spelled = {str(each): each for each in self.names}
        near = get_close_matches(str(name), spelled, n=1)
        hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
        return f"{name!r} is not an event of this loop{hint}"


class Schedule:
    """The events and the limit of a loop, checked and compiled.

    Attributes:
        events: the Events by name.
        names: their names by place.
        steps: criteria that count steps.
        epochs: criteria that count epochs, in a window of steps; `steps` has the fractions too.
        times: criteria that count training or launch time.
        timestamps: rows of `at_timestamp`, whose points are seconds of Unix time.
        conditions: those of events; `stop_conditions`: those of `stop_when`.
        counters: criteria of counters, by the counter's name.
        waits: the parts that wait for other events.
        places: how many places there are; those from `stop_place + 2` on are of parts that wait.
        timer_bits: the bits of places with a period in seconds, and of their events.
        stop_bits: two bits of `stop_when`: for criteria that outlast a launch, and for others.
        timed: whether each step has to know the time.
    """

    def __init__(
        self,
        events: Mapping[Any, Event | None] | None,
        stop_when: Event | None,
        max_epochs: object,
        max_steps: object,
        max_seconds: object,
    ) -> None:
        self.max_epochs: int | Fraction = NEVER
        if max_epochs is not None:
            self.max_epochs = exact(checks.epochs("max_epochs", max_epochs))
        self.max_steps = NEVER if max_steps is None else checks.count("max_steps", max_steps)
        self.max_time = NEVER if max_seconds is None else _period("max_seconds", max_seconds)
        self.events = _checked_events(events)
        self.stop_when = stop_when
        if stop_when is not None:
            _check_event("stop_when", stop_when)
        self.names = Names([*LoopEvents, *self.events])
        self.steps: list[StepRow] = []
        self.epochs: list[StepRow] = []
        self.times: list[TimeRow] = []
        self.timestamps: list[TimeRow] = []
        self.conditions: list[ConditionRow] = []
        self.stop_conditions: list[ConditionRow] = []
        self.counters: dict[str, CounterRows] = {}
        self.timer_bits = 0
        self._joined = {member: 1 << place for place, member in enumerate(LoopEvents)}
        self.stop_place = len(self.names.names)
        self.places = self.stop_place + 2
        self.stop_bits = 0 if stop_when is None else 0b11 << self.stop_place
        self.waits: list[WaitRow] = []
        for place, event in enumerate(self.events.values(), len(self._joined)):
            self._add(place, event, self.conditions)
        if stop_when is not None:
            self._add(self.stop_place, stop_when, self.stop_conditions)
        self.timed = max_seconds is not None or bool(self.times or self.timestamps)

    def _add(self, owner: int, event: Event, conditions: list[ConditionRow]) -> None:
        for part in event.parts:
            if isinstance(part, Member):
                self._joined[part] |= 1 << owner
                continue
            place = of_launch = self._place_of(part, owner)
            if owner == self.stop_place:
                of_launch = self._place_of(part, owner + 1)
            counted = of_launch if part.per_launch else place
            self._add_steps(counted, part)
            self._add_epochs(place, part)
            self._add_times(counted, of_launch, owner, part)
            self._add_counter(place, part)
            if part.condition_function is not None:
                of_stop = owner == self.stop_place
                whose = "stop_when" if of_stop else f"event {self.names.names[owner]!r}"
                row = ConditionRow(place, part.condition_function, whose, *_window(part))
                conditions.append(row)

    def _place_of(self, part: Event, owner: int) -> int:
        """Return the place of an event's part: the event's own, or another if the part waits.

        Raises:
            ValueError: it waits for no event of the loop, or for one that waits.
        """
        name = part.wait_for
        if name is None:
            return owner
        if not isinstance(name, Member) and name not in self.events:
            raise ValueError(f"wait_for={checks.shown(name)}: {self.names.unknown(name)}")
        if any(each.wait_for is not None for each in self.events.get(name, Event()).parts):
            raise ValueError(
                f"wait_for={checks.shown(name)}: that event waits itself; name one that does not"
            )
        place, self.places = self.places, self.places + 1
        awaited = 1 << self.names.places[name]
        self.waits.append(WaitRow(1 << place, 1 << owner, awaited, *_window(part)))
        return place

    def _add_steps(self, place: int, event: Event) -> None:
        window = _window(event)
        if event.every_n_steps is not None:
            first = event.every_n_steps - 1 if event.first_at_step is None else event.first_at_step
            self.steps.append(StepRow(place, event.every_n_steps, first, (), *window))
        if event.at_step is not None:
            self.steps.append(StepRow(place, 0, 0, several(event.at_step), *window))

    def _add_epochs(self, place: int, event: Event) -> None:
        every = None if event.every_n_epochs is None else exact(event.every_n_epochs)
        if isinstance(every, int):
            self.epochs.append(StepRow(place, every, every - 1, (), *_window(event)))
        elif every is not None:
            row = StepRow(place, 0, 0, (), *_window(event), every)
            self.epochs.append(row)
            self.steps.append(row)
        if event.at_epoch is not None:
            self.epochs.append(StepRow(place, 0, 0, several(event.at_epoch), *_window(event)))

    def _add_times(self, place: int, of_launch: int, owner: int, event: Event) -> None:
        window = event.per_launch, *_window(event)
        if event.every_n_seconds is not None:
            period = _period("every_n_seconds", event.every_n_seconds)
            self.times.append(TimeRow(place, owner, period, (), *window))
            self.timer_bits |= 1 << place | 1 << owner
        if event.at_time is not None:
            points = tuple(map(checks.nanoseconds, several(event.at_time)))
            self.times.append(TimeRow(place, owner, 0, points, *window))
        if event.at_timestamp is not None:
            points = tuple(map(checks.nanoseconds, several(event.at_timestamp)))
            self.timestamps.append(TimeRow(of_launch, owner, 0, points, True, *_window(event)))

    def _add_counter(self, place: int, event: Event) -> None:
        if event.of is None:
            return
        rows = self.counters.setdefault(event.of, CounterRows())
        if event.every_n is not None:
            rows.append(CounterRow(1 << place, event.every_n, (), *_window(event)))
        if event.at is not None:
            rows.append(CounterRow(1 << place, 0, several(event.at), *_window(event)))

    @property
    def event_bits(self) -> int:
        """The bits of the members of LoopEvents and of the names."""
        return (1 << self.stop_place) - 1

    @staticmethod
    def checked_count(name: object, n: object) -> int:
        """Return `n`, which a body counts of `name`.

        Raises:
            TypeError: `name` is no str, or `n` is no whole number.
            ValueError: `n` is out of range.
        """
        checked_counter("name", name)
        return checks.count("n", n, 0)

    def ends(self, launch: int) -> Ends:
        """Return the ends of a new run, whose first step is `launch`."""
        return Ends(self, launch)

    def bits_with(self, member: Event) -> int:
        """Return the bits of a member of LoopEvents and of all names that it is joined with."""
        bits = self._joined[member]
        return bits if member is LoopEvents.EPOCH_END else bits & ~self.stop_bits

    def bit_of(self, name: Hashable) -> int:
        """Return the bit with which a name fires, or the bits of its parts that wait.

        Raises:
            KeyError: the loop has no such event.
        """
        if name in self.events:
            bit = 1 << self.names.places[name]
            return sum([row.bit for row in self.waits if row.owner == bit]) or bit
        if isinstance(name, Member):
            raise KeyError(f"{name!r} fires by itself; pass a name of the events mapping")
        raise KeyError(self.names.unknown(name))

    @property
    def limit(self) -> tuple[str, int | Fraction] | None:
        """The limit's name, and its steps, epochs or nanoseconds."""
        limits: dict[str, int | Fraction] = {
            "max_steps": self.max_steps,
            "max_epochs": self.max_epochs,
            "max_seconds": self.max_time,
        }
        return next(((name, limit) for name, limit in limits.items() if limit < NEVER), None)

    def times_of_launch(self, now: int) -> list[TimeRow]:
        """Return all time criteria of a launch that begins at `now`, in ns of Unix time."""
        moments = [
            row._replace(points=tuple([max(0, point - now) for point in row.points]))
            for row in self.timestamps
        ]
        return [*self.times, *moments]


REASONS = (
    "exception", "finish", "a signal", "stop", "max_seconds", "max_steps", "max_epochs",
    "stop_when", "exhausted",
)  # fmt: skip
"""Why a run ends; of several that apply, `Loop.stop_reason` is the first."""


class Ends:
    """The limits, what fires at the ends of epochs and of the run, and how the run ended.

    Attributes:
        is_single_pass: whether the source is.
        needs_length: whether anything is a fraction of an epoch, whose length has to be known.
        length: the steps of the open epoch, if that is so.
        by_source: "exhausted" if the run ends with the source's epoch; else None.
        waits: the parts of events that wait for others.
        stop_reason: why the run ends, from its last step on.
        finished: the reason for which a resumed run does not train on either.
    """

    def __init__(self, schedule: Schedule, launch: int) -> None:
        self._rows = schedule.epochs
        self._launch = launch  # the first step of the launch
        self._max_epochs = schedule.max_epochs
        self._max_steps = schedule.max_steps
        self._stop_bits = schedule.stop_bits
        self._on_epoch_end = schedule.bits_with(LoopEvents.EPOCH_END)
        self.on_training_end = schedule.bits_with(LoopEvents.TRAINING_END)
        self.is_single_pass = False
        fractions = [row for row in schedule.epochs if row.fraction is not None]
        self.needs_length = isinstance(schedule.max_epochs, Fraction) or bool(fractions)
        self.length: int | None = None
        self.by_source: str | None = None
        self.waits = Waits(schedule.waits)
        self.stop_reason: str | None = None
        self.finished: str | None = None

    def bits_at(self, step: int, epoch: int, epoch_start: int) -> int:
        """Return the bits of all that fires since `step` is the last of `epoch`."""
        bits = self._on_epoch_end
        for row in self._rows:
            origins = 0, self._launch, epoch_start
            if row.fraction is not None:
                before = epoch + Fraction(step - epoch_start, self.length or NEVER)
                fires = (epoch + 1) // row.fraction > before // row.fraction
            else:
                fires = (epoch - row.first) % row.period == 0 if row.period else epoch in row.points
            if fires and is_open(row, step, origins):
                bits |= 1 << row.place
        return bits

    def by_epochs(self, epoch: int) -> str | None:
        """Return the reason why the run ends with `epoch`, if it does."""
        return "max_epochs" if epoch + 1 >= self._max_epochs else None

    def last_step(self, epoch: int, epoch_start: int) -> int:
        """Return the last step by `max_steps`, or by a fraction of `epoch`; NEVER if neither is."""
        left = self._max_epochs - epoch
        if self.length is None or left >= 1:
            return self._max_steps - 1 if self._max_steps < NEVER else NEVER
        return epoch_start + steps_up_to(left, self.length) - 1

    @property
    def by_steps(self) -> str:
        """The reason to end with that step."""
        return "max_epochs" if self._max_steps == NEVER else "max_steps"

    @staticmethod
    def first_reason(reasons: Iterable[str | None]) -> str | None:
        """Return the reason that counts, of those that are not None."""
        found = [each for each in reasons if each is not None]
        ranks = [REASONS.index(each if each in REASONS else "a signal") for each in found]
        return min(zip(ranks, found), key=lambda each: each[0], default=(0, None))[1]

    def of_requests(self, requests: Sequence[tuple[int, str | None]]) -> tuple[int, str | None]:
        """Return the bits that were requested, and the reason to end, if there is one."""
        bits = [bits for bits, _ in requests]
        return reduce(or_, bits, 0), self.first_reason([reason for _, reason in requests])

    def after(
        self, step: int, bits: int, reason: str | None, origins: Sequence[int]
    ) -> tuple[int, str | None, str | None, int]:
        """Return what follows if `bits` are met at `step`: whether the run ends, what waits.

        Returns the bits that fire, the reason to end, the one for a resumed run, and the bits that
        wait.
        """
        bits, waiting = self.waits.settle(step, bits, origins)
        finished = self.finished
        if bits & self._stop_bits:
            reason = self.first_reason([reason, "stop_when"])
        if reason == "finish":
            finished = reason
        elif bits & self._stop_bits & self._stop_bits >> 1:  # its criterion outlasts the launch
            finished = "stop_when"
        if reason is not None:  # what waits for TRAINING_END fires too
            bits, waiting = self.waits.settle(step, bits | self.on_training_end, origins)
        return bits, reason, finished, waiting


class Timers:
    """When each time criterion fired last, and when the next one can. An immutable value.

    All times are pairs: training time, and time since this launch began, in nanoseconds.

    Args:
        rows: the criteria.
        lasts: by row, the time at which a period began anew, or the latest point that fired; -1 if
            there was none.
        step: the next step.
        origins: the first steps of the run (0), the launch and the epoch.

    Attributes:
        next_time: the training time from which a criterion can fire.
        next_launch_time: the time of the launch from which one can.
        next_start: the next step at which a window opens.
    """

    def __init__(
        self,
        rows: Sequence[TimeRow],
        lasts: tuple[int, ...],
        step: int,
        origins: tuple[int, int, int],
    ) -> None:
        self._rows = rows
        self._step = step
        self._origins = origins
        self.lasts = lasts
        next_times = [NEVER, NEVER]
        self.next_start = NEVER
        for row, last in zip(rows, lasts):
            count = step - origins[row.origin]
            if count < row.start:
                self.next_start = min(self.next_start, origins[row.origin] + row.start)
            elif count < row.stop:
                next_times[row.per_launch] = min(next_times[row.per_launch], _next_time(row, last))
        self.next_time, self.next_launch_time = next_times

    def due_at(self, step: int, times: tuple[int, int]) -> int:
        """Return the bits of the criteria that are met at `step`."""
        bits = 0
        for row, last in zip(self._rows, self.lasts):
            if is_open(row, step, self._origins) and _next_time(row, last) <= times[row.per_launch]:
                bits |= 1 << row.place
        return bits

    def after(self, step: int, times: tuple[int, int], bits: int, is_due: bool) -> Timers:
        """Return the timers after `step`, at which the events of `bits` fire.

        Unless `is_due`, nothing was asked of the criteria with points.
        """
        lasts = list(self.lasts)
        for number, row in enumerate(self._rows):
            time = times[row.per_launch]
            if row.period:
                fires = bool(bits & (1 << row.place | 1 << row.owner))
            else:
                can_fire = is_due and is_open(row, step, self._origins)
                fires = can_fire and _next_time(row, lasts[number]) <= time
            if fires:
                lasts[number] = time
        return Timers(self._rows, tuple(lasts), step + 1, self._origins)

    def in_epoch(self, first: int) -> Timers:
        """Return the timers in an epoch whose first step is `first`."""
        if all(row.origin != EPOCH for row in self._rows):
            return self
        origins = 0, self._origins[1], first
        return Timers(self._rows, self.lasts, self._step, origins)

    def with_timestamps(self, rows: Sequence[TimeRow]) -> Timers:
        """Return the timers with the rows of a launch, which begin with those that are here."""
        lasts = self.lasts + (-1,) * (len(rows) - len(self.lasts))
        return Timers(rows, lasts, self._step, self._origins)

    def saved(self) -> list[tuple[TimeRow, int]]:
        """Return each criterion that outlasts a launch, with its last time."""
        return [(row, last) for row, last in zip(self._rows, self.lasts) if not row.per_launch]


def _next_time(row: TimeRow, last: int) -> int:
    """Return the time from which `row` can fire, after it did at `last`."""
    if row.period:
        return max(last, 0) + row.period
    place = bisect_right(row.points, last)
    return NEVER if place == len(row.points) else row.points[place]


def exact(epochs: float) -> int | Fraction:
    """Return a number of epochs as the fraction that is meant: 0.1 as one tenth."""
    return epochs if isinstance(epochs, int) else Fraction(epochs).limit_denominator(10**6)


def several(points: Any) -> tuple[Any, ...]:
    """Return the points of a criterion, which holds a single one as it is."""
    return points if isinstance(points, tuple) else (points,)


def _window(event: Event) -> tuple[int, int, int]:
    origin = EPOCH if event.per_epoch else LAUNCH if event.per_launch else RUN
    return origin, event.from_step, NEVER if event.until_step is None else event.until_step


def _period(name: str, value: object) -> int:
    return max(1, checks.nanoseconds(checks.seconds(name, value)))


def _checked_events(events: Mapping[Any, Event | None] | None) -> dict[Any, Event]:
    if events is None:
        return {}
    if not isinstance(events, Mapping):
        raise TypeError(f"events={checks.shown(events)}: pass a mapping of names to Events")
    keys: dict[str, Hashable] = {}
    for name, event in events.items():
        if isinstance(name, Member):
            raise ValueError(f"events: {name!r} fires by itself; pass another name")
        if event is not None:
            _check_event(f"events[{checks.shown(name)}]", event)
        other = keys.setdefault(key_of(name), name)
        if other is not name:
            raise ValueError(
                f"events: {other!r} and {name!r} would be the same name in a state; rename one"
            )
    return {name: Event() if event is None else event for name, event in events.items()}


def _check_event(name: str, value: object) -> None:
    if isinstance(value, Event):
        return
    meant = "an Event, or None"
    if callable(value):
        meant = "Event(function), which fires when function(state) is true"
    elif isinstance(value, int):
        meant = f"Event(every_n_steps={value}), or Event(at_step={value})"
    raise TypeError(f"{name}={checks.shown(value)}: pass {meant}")


def key_of(name: Hashable) -> str:
    """Return the string that stands for a name in states."""
    return name if isinstance(name, str) else repr(name)
