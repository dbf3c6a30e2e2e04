"""Events and the limit, checked and compiled: names to places, periods to ints, seconds to ns."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping

from . import _backend, checks
from .errors import annotate, warn
from .events import BaseEvent, Event, LoopEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

    from ._core import ConditionRow, EventSets, StepRow
    from .state import Position

    class TimeRow(NamedTuple):
        """A time criterion: a period or points in nanoseconds, in a window of global steps."""

        place: int
        period: int
        points: tuple[int, ...]
        per_launch: bool
        start: int
        stop: int
else:
    # typing would take longer to import than all of dloop
    TimeRow = namedtuple("TimeRow", "place period points per_launch start stop")

NEVER = 2**63 - 1
MOST_UNKNOWN = 1000
"""How many unknown names a loop warns of."""


class Names:
    """The names of a loop's events, by place.

    The event sets of a loop refer to this alone, so that keeping one keeps nothing else alive.
    """

    def __init__(self, names: list[Hashable]) -> None:
        self.names = names
        self.places = {name: place for place, name in enumerate(names)}
        self._unknown: set[Hashable] = set()

    def warn_of_unknown(self, name: Hashable) -> None:
        """Warn, once for each name, that the loop has no such event."""
        if name in self._unknown or len(self._unknown) == MOST_UNKNOWN:
            return
        self._unknown.add(name)
        warn(self.unknown(name))

    def unknown(self, name: Hashable) -> str:
        """Words for a name that no event of the loop has, with the nearest that one has."""
        from difflib import get_close_matches  # seldom needed

        spelled = {str(each): each for each in self.names}
        near = get_close_matches(str(name), spelled, n=1)
        hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
        return f"{name!r} is no event of this loop{hint}"


class Schedule:
    """What is due when: the events mapping, `stop_when` and the limit as the cores take them.

    Each name has a place: the LoopEvents members come first, then the names in the order of the
    mapping, and last, where there is one, `stop_when`. Its bit is `1 << place`. Rows of steps and
    conditions are as `_core.pyi` tells.
    """

    def __init__(
        self,
        events: Mapping[Any, BaseEvent | None] | None,
        stop_when: BaseEvent | None,
        max_epochs: SupportsIndex | None,
        max_steps: SupportsIndex | None,
        max_seconds: SupportsFloat | None,
    ) -> None:
        self.max_epochs = _limit("max_epochs", max_epochs, checks.count)
        self.max_steps = _limit("max_steps", max_steps, checks.count)
        self.max_time = _limit("max_seconds", max_seconds, _period)
        _check_one_limit(max_epochs=max_epochs, max_steps=max_steps, max_seconds=max_seconds)

        self.events = _checked_events(events)
        self._names = Names([*LoopEvents, *self.events])
        self.steps: list[StepRow] = []
        self.launch_steps: list[StepRow] = []
        self.epoch_steps: list[StepRow] = []
        self.times: list[TimeRow] = []
        self.timestamps: list[tuple[int, tuple[float, ...], int, int]] = []
        self.timer_bits = 0  # of the events that have a period in seconds
        self.conditions: list[ConditionRow] = []
        self.stop_conditions: list[ConditionRow] = []
        self._epochs: list[tuple[int, Event]] = []
        self._joined: dict[LoopEvents, list[int]] = {
            member: [place] for place, member in enumerate(LoopEvents)
        }
        for name, event in self.events.items():
            self._add(self._names.places[name], event, self.conditions)
        self.stop_place = len(self._names.names)
        self.stop_when = stop_when
        if stop_when is not None:
            if not isinstance(stop_when, BaseEvent):
                raise TypeError(f"stop_when={checks.shown(stop_when)}: pass an Event")
            self._add(self.stop_place, stop_when, self.stop_conditions)
        self.stop_bit = 0 if stop_when is None else 1 << self.stop_place
        self.decision_bits = self.stop_bit | self.timer_bits
        self.timed = max_seconds is not None or bool(self.times or self.timestamps)
        self._due_with = {member: _bits(places) for member, places in self._joined.items()}
        self.on_training_end = self.due_with(LoopEvents.TRAINING_END)

    def event_sets(self) -> EventSets:
        """The event sets of a new run."""
        names = self._names
        return _backend.core.EventSets(names.names, names.places, names.warn_of_unknown)

    def _add(self, place: int, event: BaseEvent, conditions: list[ConditionRow]) -> None:
        for part in event.parts:
            if isinstance(part, LoopEvents):
                self._joined[part].append(place)
            else:
                self._add_criteria(place, part, conditions)

    def _add_criteria(self, place: int, event: Event, conditions: list[ConditionRow]) -> None:
        start = event.from_step
        stop = NEVER if event.until_step is None else event.until_step
        if event.condition_function is not None:
            conditions.append((place, event.condition_function, start, stop))
        steps = self.launch_steps if event.per_launch else self.steps
        if event.per_epoch:
            steps = self.epoch_steps
        if event.every_n_steps is not None:
            first = event.every_n_steps - 1 if event.first_at_step is None else event.first_at_step
            steps.append((place, event.every_n_steps, first, (), start, stop))
        if event.at_step is not None:
            steps.append((place, 0, 0, _several(event.at_step), start, stop))
        if event.every_n_seconds is not None:
            period = _period("every_n_seconds", event.every_n_seconds)
            self.times.append(TimeRow(place, period, (), event.per_launch, start, stop))
            self.timer_bits |= 1 << place
        if event.at_time is not None:
            points = tuple(map(checks.nanoseconds, _several(event.at_time)))
            self.times.append(TimeRow(place, 0, points, event.per_launch, start, stop))
        if event.at_timestamp is not None:
            self.timestamps.append((place, _several(event.at_timestamp), start, stop))
        if event.every_n_epochs is not None or event.at_epoch is not None:
            self._epochs.append((place, event))

    def bit_of(self, name: Hashable) -> int:
        """The bit of an event.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self.events:
            raise self.unknown(name)
        return 1 << self._names.places[name]

    def unknown(self, name: Hashable) -> KeyError:
        """The error for a name that is none of the mapping's."""
        if isinstance(name, LoopEvents):
            return KeyError(f"{name!r} comes by itself; pass a name of the events mapping")
        return KeyError(self._names.unknown(name))

    def names_of(self, bits: int) -> list[Hashable]:
        """The names of the events of `bits`; TRAINING_END stands for `stop_when`."""
        names = [name for name in self.events if bits & self.bit_of(name)]
        return [*names, LoopEvents.TRAINING_END] if bits & self.stop_bit else names

    def bits_of(self, names: list[Hashable]) -> int:
        """The bits of the events of these names, as `names_of` has them; others are left out."""
        bits = self.stop_bit if LoopEvents.TRAINING_END in names else 0
        return bits | _bits([self._names.places[name] for name in names if name in self.events])

    def due_with(self, member: LoopEvents) -> int:
        """The bits of a member of LoopEvents and of all that is joined with it."""
        bits = self._due_with[member]
        return bits if member is LoopEvents.EPOCH_END else bits & ~self.stop_bit

    def timers_from(self, position: Position) -> list[int]:
        """When each row of `times` was last due; those of an event that is new count from here."""
        left = {name: list(timers) for name, timers in position.timers.items()}
        lasts = []
        for number, row in enumerate(self.times):
            saved = left.get(self.name_of_timer(number))
            kind, last = saved.pop(0) if saved else ("", -1)
            if kind != ("every" if row.period else "at"):
                last = position.elapsed or -1
            lasts.append(-1 if row.per_launch else last)
        return lasts

    def times_of_launch(self, now: float) -> list[TimeRow]:
        """The rows of a launch at this moment of the wall clock: `times`, then `at_timestamp`s."""
        rows = list(self.times)
        for place, moments, start, stop in self.timestamps:
            points = tuple([max(0, checks.nanoseconds(moment - now)) for moment in moments])
            rows.append(TimeRow(place, 0, points, True, start, stop))
        return rows

    def name_of_timer(self, number: int) -> Hashable:
        """The name of the event of a row of `times`; None for `stop_when`."""
        place = self.times[number].place
        return None if place == self.stop_place else self._names.names[place]

    @property
    def limit(self) -> tuple[str, int]:
        """The limit's name, and its steps, epochs or nanoseconds."""
        if self.max_steps < NEVER:
            return "max_steps", self.max_steps
        if self.max_epochs < NEVER:
            return "max_epochs", self.max_epochs
        return "max_seconds", self.max_time

    def on_epoch_end(self, epoch: int, step: int) -> int:
        """The bits of all that is due because `step` is the last of `epoch`."""
        bits = self._due_with[LoopEvents.EPOCH_END]
        for place, event in self._epochs:
            in_window = event.from_step <= step and (
                event.until_step is None or step < event.until_step
            )
            every, at = event.every_n_epochs, event.at_epoch
            if in_window and (
                (every is not None and (epoch + 1) % every == 0)
                or (at is not None and epoch in _several(at))
            ):
                bits |= 1 << place
        return bits

    def blame(self, exception: Exception, place: int) -> None:
        """Note on `exception` whose condition raised it."""
        if place == self.stop_place:
            annotate(exception, "in the condition of stop_when")
        else:
            annotate(exception, f"in the condition of event {self._names.names[place]!r}")


def _checked_events(events: Mapping[Any, BaseEvent | None] | None) -> dict[Any, BaseEvent]:
    if events is None:
        return {}
    if not isinstance(events, Mapping):
        raise TypeError(f"events={checks.shown(events)}: pass a mapping of names to Events")
    for name, event in events.items():
        if isinstance(name, LoopEvents):
            raise ValueError(
                f"events: {name!r} is dloop's own; it is in the sets without being asked for"
            )
        if event is not None and not isinstance(event, BaseEvent):
            raise TypeError(
                f"events[{checks.shown(name)}]={checks.shown(event)}: pass an Event, or None"
            )
    return {
        name: Event(every_n_steps=None) if event is None else event
        for name, event in events.items()
    }


def _check_one_limit(**limits: object) -> None:
    given = [(name, value) for name, value in limits.items() if value is not None]
    if len(given) != 1:
        got = ", ".join([f"{name}={checks.shown(value)}" for name, value in given])
        raise ValueError(
            "exactly one stopping condition is needed: max_epochs, max_steps or max_seconds; "
            f"got {got or 'none'}"
        )


def _limit(name: str, value: object, check: Callable[[str, object], int]) -> int:
    return NEVER if value is None else check(name, value)


def _period(name: str, value: object) -> int:
    return max(1, checks.nanoseconds(checks.seconds(name, value)))


def _several(points: checks.Number | tuple[checks.Number, ...]) -> tuple[checks.Number, ...]:
    return points if isinstance(points, tuple) else (points,)


def _bits(places: list[int]) -> int:
    bits = 0
    for place in places:
        bits |= 1 << place
    return bits
