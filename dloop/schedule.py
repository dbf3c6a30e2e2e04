"""Events compiled for the core: names to bits, steps to ints, seconds to nanoseconds; timers.

Each name has a place: the members of LoopEvents come first, then the names of the mapping, then two
for `stop_when`. The bit of a place is `1 << place`, and the events of a step are a sum of bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checks
from .errors import NEVER, annotate, warn
from .events import Event, LoopEvents, Member

if TYPE_CHECKING:
    from ._core import LoopState

RUN, LAUNCH, EPOCH = 0, 1, 2
"""What step numbers count from: the run's, the launch's, or the epoch's first step."""
MOST_UNKNOWN = 1000
"""How many unknown names a loop warns of."""


class StepRow(NamedTuple):
    """A step or epoch criterion: a period from a first number on, or points (the period is 0)."""

    place: int
    period: int
    first: int
    points: tuple[int, ...]
    origin: int
    start: int
    stop: int


class TimeRow(NamedTuple):
    """A time criterion: a period or points in nanoseconds of training or launch time."""

    place: int
    period: int
    points: tuple[int, ...]
    per_launch: bool
    origin: int
    start: int
    stop: int


class ConditionRow(NamedTuple):
    """A condition."""

    place: int
    function: Callable[[LoopState], object]
    origin: int
    start: int
    stop: int


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
        epochs: criteria that count epochs, in a window of steps.
        times: criteria that count training or launch time.
        timestamps: rows of `at_timestamp`, whose points are seconds of Unix time.
        conditions: those of events; `stop_conditions`: those of `stop_when`.
        timer_bits: of the names that have a period in seconds.
        stop_bits: of `stop_when`: of criteria that count over launches, and of those that do not.
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
        self.max_epochs = NEVER if max_epochs is None else checks.count("max_epochs", max_epochs)
        self.max_steps = NEVER if max_steps is None else checks.count("max_steps", max_steps)
        self.max_time = NEVER if max_seconds is None else _period("max_seconds", max_seconds)
        self.events = _checked_events(events)
        self.stop_when = stop_when
        if stop_when is not None and not isinstance(stop_when, Event):
            raise TypeError(f"stop_when={checks.shown(stop_when)}: pass an Event")
        self.names = Names([*LoopEvents, *self.events])
        self.steps: list[StepRow] = []
        self.epochs: list[StepRow] = []
        self.times: list[TimeRow] = []
        self.timestamps: list[TimeRow] = []
        self.conditions: list[ConditionRow] = []
        self.stop_conditions: list[ConditionRow] = []
        self.timer_bits = 0
        self._joined = {member: 1 << place for place, member in enumerate(LoopEvents)}
        self.stop_place = len(self.names.names)
        self.stop_bits = 0 if stop_when is None else 0b11 << self.stop_place
        for place, event in enumerate(self.events.values(), len(self._joined)):
            self._add(place, event, self.conditions)
        if stop_when is not None:
            self._add(self.stop_place, stop_when, self.stop_conditions)
        self.timed = max_seconds is not None or bool(self.times or self.timestamps)
        self.on_epoch_end = self.bits_with(LoopEvents.EPOCH_END)
        self.on_training_end = self.bits_with(LoopEvents.TRAINING_END)

    def _add(self, place: int, event: Event, conditions: list[ConditionRow]) -> None:
        for part in event.parts:
            if isinstance(part, Member):
                self._joined[part] |= 1 << place
                continue
            of_launch = place + 1 if place == self.stop_place else place
            counted = of_launch if part.per_launch else place
            self._add_steps(counted, part)
            self._add_epochs(place, part)
            self._add_times(counted, of_launch, part)
            if part.condition_function is not None:
                conditions.append(ConditionRow(place, part.condition_function, *_window(part)))

    def _add_steps(self, place: int, event: Event) -> None:
        window = _window(event)
        if event.every_n_steps is not None:
            first = event.every_n_steps - 1 if event.first_at_step is None else event.first_at_step
            self.steps.append(StepRow(place, event.every_n_steps, first, (), *window))
        if event.at_step is not None:
            self.steps.append(StepRow(place, 0, 0, several(event.at_step), *window))

    def _add_epochs(self, place: int, event: Event) -> None:
        if event.every_n_epochs is not None:
            every = event.every_n_epochs
            self.epochs.append(StepRow(place, every, every - 1, (), *_window(event)))
        if event.at_epoch is not None:
            self.epochs.append(StepRow(place, 0, 0, several(event.at_epoch), *_window(event)))

    def _add_times(self, place: int, of_launch: int, event: Event) -> None:
        window = event.per_launch, *_window(event)
        if event.every_n_seconds is not None:
            period = _period("every_n_seconds", event.every_n_seconds)
            self.times.append(TimeRow(place, period, (), *window))
            self.timer_bits |= 1 << place
        if event.at_time is not None:
            points = tuple(map(checks.nanoseconds, several(event.at_time)))
            self.times.append(TimeRow(place, 0, points, *window))
        if event.at_timestamp is not None:
            points = tuple(map(checks.nanoseconds, several(event.at_timestamp)))
            self.timestamps.append(TimeRow(of_launch, 0, points, True, *_window(event)))

    def ends(self, launch: int) -> Ends:
        """Return the ends of a new run, whose first step is `launch`."""
        return Ends(self, launch)

    def bits_with(self, member: Event) -> int:
        """Return the bits of a member of LoopEvents and of all names that it is joined with."""
        bits = self._joined[member]
        return bits if member is LoopEvents.EPOCH_END else bits & ~self.stop_bits

    def bit_of(self, name: Hashable) -> int:
        """Return the bit of a name of the mapping.

        Raises:
            KeyError: the loop has no such event.
        """
        if name in self.events:
            return 1 << self.names.places[name]
        if isinstance(name, Member):
            raise KeyError(f"{name!r} fires by itself; pass a name of the events mapping")
        raise KeyError(self.names.unknown(name))

    @property
    def limit(self) -> tuple[str, int] | None:
        """The limit's name, and its steps, epochs or nanoseconds."""
        limits = {
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

    def blame(self, exception: Exception, place: int) -> None:
        """Add a note to `exception` that names the condition which raised it."""
        of_stop = place >= self.stop_place
        whose = "stop_when" if of_stop else f"event {self.names.names[place]!r}"
        annotate(exception, f"in the condition of {whose}")


class Ends:
    """The limits, what fires at the ends of epochs and of the run, and how the run ended.

    Attributes:
        dries: whether the run ends with its epoch, since the source is single-pass.
        final: the last step of the run, once it was made; -2 before.
        stop_reason: why it is the last.
        finished: the reason for which a resumed run does not train on either.
    """

    def __init__(self, schedule: Schedule, launch: int) -> None:
        self._rows = schedule.epochs
        self._launch = launch  # the first step of the launch
        self._max_epochs = schedule.max_epochs
        self._on_epoch_end = schedule.on_epoch_end
        self.on_training_end = schedule.on_training_end
        self.dries = False
        self.final = -2
        self.stop_reason: str | None = None
        self.finished: str | None = None

    def bits_at(self, step: int, epoch: int, epoch_start: int) -> int:
        """Return the bits of all that fires since `step` is the last of `epoch`."""
        bits = self._on_epoch_end
        for row in self._rows:
            origins = 0, self._launch, epoch_start
            is_open = row.start <= step - origins[row.origin] < row.stop
            fires = (epoch - row.first) % row.period == 0 if row.period else epoch in row.points
            if is_open and fires:
                bits |= 1 << row.place
        return bits

    def by_epochs(self, epoch: int) -> str | None:
        """Return the reason why the run ends with `epoch`, if it does."""
        if epoch + 1 >= self._max_epochs:
            return "max_epochs"
        return "exhausted" if self.dries else None


class Timers:
    """When each time criterion fired last, and when the next one can. An immutable value.

    All times are pairs: training time, and time since this launch began, in nanoseconds.

    Args:
        rows: the criteria.
        lasts: by row, the time at which a period began anew, or the latest point that fired; -1 if
            there was none.
        step: the next step.
        origins: the first steps of the run (0), the launch and the epoch.
        before: `lasts` before the latest step.

    Attributes:
        next_time: the training time from which a criterion can fire; `next_launch_time`: likewise.
        next_start: the next step at which a window opens.
    """

    __slots__ = (
        "_before", "_origins", "_rows", "_step", "lasts", "next_launch_time", "next_start",
        "next_time",
    )  # fmt: skip

    def __init__(
        self,
        rows: Sequence[TimeRow],
        lasts: tuple[int, ...],
        step: int,
        origins: tuple[int, int, int],
        before: tuple[int, ...] | None = None,
    ) -> None:
        self._rows = rows
        self._step = step
        self._origins = origins
        self._before = lasts if before is None else before
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
            if self._is_open(row, step) and _next_time(row, last) <= times[row.per_launch]:
                bits |= 1 << row.place
        return bits

    def after(self, step: int, times: tuple[int, int], bits: int) -> Timers:
        """Return the timers after `step`, at which the events of `bits` fire."""
        lasts = list(self.lasts)
        for number, row in enumerate(self._rows):
            time = times[row.per_launch]
            if row.period:
                fires = bool(bits >> row.place & 1)
            else:
                fires = self._is_open(row, step) and _next_time(row, lasts[number]) <= time
            if fires:
                lasts[number] = time
        before = self._before if self._step == step + 1 else self.lasts
        return Timers(self._rows, tuple(lasts), step + 1, self._origins, before)

    def in_epoch(self, first: int) -> Timers:
        """Return the timers in an epoch whose first step is `first`."""
        if all(row.origin != EPOCH for row in self._rows):
            return self
        origins = 0, self._origins[1], first
        return Timers(self._rows, self.lasts, self._step, origins, self._before)

    def with_timestamps(self, rows: Sequence[TimeRow]) -> Timers:
        """Return the timers with the rows of a launch, which begin with those that are here."""
        lasts = self.lasts + (-1,) * (len(rows) - len(self.lasts))
        return Timers(rows, lasts, self._step, self._origins)

    def saved_after(self, steps: int) -> list[tuple[TimeRow, int]]:
        """Return each criterion that outlasts a launch, with its last time after `steps` steps.

        Those are all the steps of the run, or the ones before the latest step or list.
        """
        lasts = self.lasts if self._step <= steps else self._before
        return [(row, last) for row, last in zip(self._rows, lasts) if not row.per_launch]

    def _is_open(self, row: TimeRow, step: int) -> bool:
        return row.start <= step - self._origins[row.origin] < row.stop


def _next_time(row: TimeRow, last: int) -> int:
    """Return the time from which `row` can fire, after it did at `last`."""
    if row.period:
        return max(last, 0) + row.period
    place = bisect_right(row.points, last)
    return NEVER if place == len(row.points) else row.points[place]


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
        if event is not None and not isinstance(event, Event):
            raise TypeError(
                f"events[{checks.shown(name)}]={checks.shown(event)}: pass an Event, or None"
            )
        other = keys.setdefault(key_of(name), name)
        if other is not name:
            raise ValueError(
                f"events: {other!r} and {name!r} would be the same name in a state; rename one"
            )
    return {name: Event() if event is None else event for name, event in events.items()}


def key_of(name: Hashable) -> str:
    """Return the string that stands for a name in states."""
    return name if isinstance(name, str) else repr(name)
