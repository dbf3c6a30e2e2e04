"""Events and the limit, checked and compiled: names to bits, periods to ints, seconds to ns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from . import _backend, checks
from .errors import annotate, warn
from .events import BaseEvent, Event, LoopEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import Any, SupportsFloat, SupportsIndex

    from ._core import ConditionRow, StepRow, TimeRow

NEVER = 2**63 - 1


class Names:
    """The names of a loop's events by their bits.

    The event sets of a loop refer to this alone, so that keeping one keeps nothing else alive.
    """

    def __init__(self, names: list[Hashable]) -> None:
        self._names = names
        self._first = tuple(names[:12])
        self._places = {name: place for place, name in enumerate(names)}
        self._unknown_asked: set[Hashable] = set()

    def __getitem__(self, bit: int) -> Hashable:
        return self._names[bit.bit_length() - 1]

    def set_maker(self) -> Callable[[int], frozenset[Hashable]]:
        """A function that gives the set of the names whose bits it is given."""
        return partial(
            _backend.core.make_event_set,
            self._names,
            self._places,
            self._first,
            self._warn_of_unknown,
        )

    def _warn_of_unknown(self, name: Hashable) -> None:
        if name in self._unknown_asked:
            return
        self._unknown_asked.add(name)
        from difflib import get_close_matches  # seldom needed

        spelled = {str(each): each for each in self._names}
        near = get_close_matches(str(name), spelled, n=1)
        hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
        warn(f"{name!r} is no event of this loop{hint}")


class Schedule:
    """What is due when: the events mapping, `stop_when` and the limit as the cores take them.

    A name's bit is `1 << place`: the LoopEvents members come first, then the names in the order of
    the mapping, and last, where there is one, `stop_when`. Rows are as `_core.pyi` tells.
    """

    def __init__(
        self,
        events: Mapping[Any, BaseEvent] | None,
        stop_when: BaseEvent | None,
        max_epochs: SupportsIndex | None,
        max_steps: SupportsIndex | None,
        max_seconds: SupportsFloat | None,
    ) -> None:
        self.max_epochs = _limit("max_epochs", max_epochs, checks.count)
        self.max_steps = _limit("max_steps", max_steps, checks.count)
        self.max_time = _limit("max_seconds", max_seconds, _period)
        _check_one_limit(max_epochs=max_epochs, max_steps=max_steps, max_seconds=max_seconds)

        names: list[Hashable] = list(LoopEvents)
        self.steps: list[StepRow] = []
        self.epoch_steps: list[StepRow] = []
        self.times: list[TimeRow] = []
        self.conditions: list[ConditionRow] = []
        self._epochs: list[tuple[int, Event]] = []
        self._at_end: dict[LoopEvents, int] = {
            member: 1 << place for place, member in enumerate(LoopEvents)
        }
        self.events = dict(_checked_events(events))
        for name, event in self.events.items():
            self._add(1 << len(names), event, self.conditions)
            names.append(name)
        self.names = list(self.events)
        self._names = Names(names)
        self.event_set = self._names.set_maker()
        self.stop_bit = 0
        self.stop_conditions: list[ConditionRow] = []
        if stop_when is not None:
            self._add_stop(1 << len(names), stop_when)
        self.all_conditions = self.stop_conditions + self.conditions
        self.stop_when = stop_when
        self.timed = max_seconds is not None or bool(self.times)
        self.on_exception = 0

    def _add_stop(self, bit: int, stop_when: BaseEvent) -> None:
        if not isinstance(stop_when, BaseEvent):
            raise TypeError(f"stop_when={checks.shown(stop_when)}: pass an Event")
        self.stop_bit = bit
        self._add(bit, stop_when, self.stop_conditions)

    def _add(self, bit: int, event: BaseEvent, conditions: list[ConditionRow]) -> None:
        for part in event.parts:
            if isinstance(part, LoopEvents):
                self._at_end[part] |= bit
            else:
                self._add_criteria(bit, part, conditions)

    def _add_criteria(self, bit: int, event: Event, conditions: list[ConditionRow]) -> None:
        start = event.from_step
        stop = NEVER if event.until_step is None else event.until_step
        if event.condition_function is not None:
            conditions.append((bit, event.condition_function, start, stop))
        steps = self.epoch_steps if event.per_epoch else self.steps
        if event.every_n_steps is not None:
            steps.append((bit, event.every_n_steps, (), start, stop))
        if event.at_step is not None:
            steps.append((bit, 0, _several(event.at_step), start, stop))
        if event.every_n_seconds is not None:
            period = _period("every_n_seconds", event.every_n_seconds)
            self.times.append((bit, period, (), event.per_launch, start, stop))
        if event.at_time is not None:
            points = tuple(map(checks.nanoseconds, _several(event.at_time)))
            self.times.append((bit, 0, points, event.per_launch, start, stop))
        if event.every_n_epochs is not None or event.at_epoch is not None:
            self._epochs.append((bit, event))

    @property
    def on_training_end(self) -> int:
        """The bits of all that is due at the last step."""
        return self.due_with(LoopEvents.TRAINING_END)

    def due_with(self, member: LoopEvents) -> int:
        """The bits of a member of LoopEvents and of all that is joined with it."""
        return self._at_end[member] & ~self.stop_bit

    def name_of_timer(self, number: int) -> Hashable:
        """The name of the event of a row of `times`; None for `stop_when`."""
        bit = self.times[number][0]
        return None if bit == self.stop_bit else self._names[bit]

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
        bits = self._at_end[LoopEvents.EPOCH_END]
        for bit, event in self._epochs:
            in_window = event.from_step <= step and (
                event.until_step is None or step < event.until_step
            )
            every, at = event.every_n_epochs, event.at_epoch
            if in_window and (
                (every is not None and (epoch + 1) % every == 0)
                or (at is not None and epoch in _several(at))
            ):
                bits |= bit
        return bits

    def blame(self, exception: Exception, bit: int) -> None:
        """Note on `exception` whose condition raised it."""
        if bit == self.stop_bit:
            annotate(exception, "in the condition of stop_when")
        else:
            annotate(exception, f"in the condition of event {self._names[bit]!r}")


def _checked_events(
    events: Mapping[Any, BaseEvent] | None,
) -> Mapping[Any, BaseEvent]:
    if events is None:
        return {}
    if not isinstance(events, Mapping):
        raise TypeError(f"events={checks.shown(events)}: pass a mapping of names to Events")
    for name, event in events.items():
        if isinstance(name, LoopEvents):
            raise ValueError(
                f"events: {name!r} is dloop's own; it is in the sets without being asked for"
            )
        if not isinstance(event, BaseEvent):
            raise TypeError(f"events[{checks.shown(name)}]={checks.shown(event)}: pass an Event")
    return events


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
