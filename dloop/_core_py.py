"""Every step of a run, in Python; `_core.pyx` does the same, compiled.

Up to `Engine.quiet_until` no event can fire: such a step is a fetch, an increment and a pair. Every
other step is decided in `Engine.decide`. Where the batches end, `Run.next_epoch` is called.

The core knows ints, bits and callables. `schedule.py` says what the places and bits of events are.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain, islice
from math import inf
from threading import get_ident
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

from . import errors
from .errors import NEVER

if TYPE_CHECKING:
    from ._core import Agreement, Bar, Pair, Run, Sizes
    from .clock import Clock
    from .schedule import ConditionRow, CounterRows, Ends, Schedule, StepRow, Timers

MOST_SETS = 4096
"""How many event sets are kept ready."""
EPOCH = 2
"""The origin of rows whose step numbers count within the epoch."""


class NoEvents(frozenset):  # type: ignore[type-arg]
    """The set of events of a quiet step: empty."""

    __slots__ = ()

    def __getitem__(self, name: object) -> NoReturn:
        raise errors.no_mapping(name)

    def __getattr__(self, name: str) -> NoReturn:
        raise errors.no_attribute(name)

    def __repr__(self) -> str:
        return repr(frozenset(self))

    def __reduce__(self) -> tuple[object, ...]:
        return frozenset, (list(self),)


class EventSet(NoEvents):
    """The events of a step. `in` calls `on_unknown(name)` for a name unknown to the loop."""

    __slots__ = ("_known", "_names", "_on_unknown", "bits")

    _names: frozenset[Hashable]
    _known: dict[Hashable, int] | None  # None in a set that is not a step's
    _on_unknown: Callable[[Hashable], object]
    bits: int

    def __new__(cls, names: Iterable[Hashable] = ()) -> EventSet:
        events = super().__new__(cls, names)
        events._names = frozenset(events)
        events._known = None
        return events

    def __contains__(self, name: Hashable) -> bool:
        if name in self._names:
            return True
        if self._known is not None and name not in self._known:
            self._on_unknown(name)
        return False


QUIET = NoEvents()


class EventSets:
    """The event sets of a run, made when first needed, and the steps at which names fired last.

    Args:
        names: the names by place.
        places: the place of each name.
        on_unknown: called with a name that is neither.
    """

    def __init__(
        self,
        names: list[Hashable],
        places: dict[Hashable, int],
        on_unknown: Callable[[Hashable], object],
    ) -> None:
        self._names = names
        self._places = places
        self._on_unknown = on_unknown
        self._sets: dict[int, Any] = {0: QUIET}
        # by name, the last two steps at which it fired
        self._fired: dict[Hashable, tuple[int, int]] = dict.fromkeys(names, (-1, -1))

    def of(self, bits: int) -> Any:
        """Return the set of the names whose bits are given."""
        events = self._sets.get(bits)
        if events is None:
            if len(self._sets) >= MOST_SETS:
                self._sets = {0: QUIET}
            fired = [name for place, name in enumerate(self._names) if bits >> place & 1]
            events = self._sets[bits] = EventSet(fired)
            events.bits = bits
            events._known = self._places
            events._on_unknown = self._on_unknown
        return events

    def mark(self, events: Any, step: int) -> None:
        """Remember that `events` fired at `step`."""
        for name in events:
            latest = self._fired[name][0]
            if latest != step:
                self._fired[name] = step, latest

    def last_step(self, name: Hashable, end: int) -> int:
        """Return the latest step before `end` at which the name fired, or -1.

        `end` is the latest step, or the one after it.
        """
        latest, before = self._fired[name]
        return latest if latest < end else before


_FIELDS = ("epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed")


@dataclass(slots=True, eq=False, repr=False)
class LoopState:
    """Where a run is: the argument of conditions, and `loop.state`.

    Attributes:
        epoch: the epoch, from 0.
        global_step: the step, from 0 across epochs; -1 before the first.
        epoch_step: the step within its epoch, from 0; -1 before the first.
        epoch_end: whether the step has the last batch of its epoch.
        training_end: whether the step is the last of the run.
        elapsed: training time in seconds, as read for the step if an event or a limit needs time,
            else read when first used. Far from the next timer, the compiled core reads a coarse
            clock, which is some milliseconds behind.
        steps_done: `global_step + 1`.

    Example:
        >>> from dloop import Event, Loop
        >>> seventh = Event(lambda state: state.global_step == 7)
        >>> loop = Loop(range(10), max_epochs=1, events={"Seventh": seventh})
        >>> [loop.state.steps_done for batch, events in loop if "Seventh" in events]
        [8]
    """

    epoch: int
    global_step: int
    epoch_step: int
    epoch_end: bool
    training_end: bool
    _elapsed: int  # in nanoseconds; -1 if it was not read
    _clock: Clock

    @property
    def elapsed(self) -> float:
        if self._elapsed < 0:
            self._elapsed = self._clock.now()
        return self._elapsed / 1e9

    @property
    def steps_done(self) -> int:
        return self.global_step + 1

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in _FIELDS])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LoopState):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        values = ", ".join([f"{name}={value!r}" for name, value in zip(_FIELDS, self._values())])
        return f"LoopState({values})"


class Trigger:
    """Fires at the steps of a row."""

    def __init__(self, row: StepRow, launch: int) -> None:
        self.row = row
        self.bit = 1 << row.place
        self.period, self.stop = row.period, row.stop
        self.origin = (0, launch, 0)[row.origin]  # the step that counts as 0

    def step_after(self, step: int) -> int:
        """Return the step at which this fires again, after it did at `step`."""
        if not self.period:
            return self.row.next_step(step + 1, self.origin)
        return NEVER if self.period >= self.stop - (step - self.origin) else step + self.period


class Agenda:
    """The next step at which anything has a say, apart from the clock and conditions.

    Attributes:
        epoch_last: the last step of the epoch, if it is known.
        last_step: the last step of the run by `max_steps`, or by a fraction of the epoch.
        bar: what is called at `bar_step`.
        interrupted_at: the place, in steps, at which the fetch of a single-pass source was.
        agreement: what lets processes agree, or None; `every`: its period in steps, or 0.
        requests: what was requested since the latest step: bits, and a reason to stop or None.
        dues: for each step criterion, the next step at which it is met; one more is never due.
        stop_bits: the bits of `stop_when`; `event_bits`: those of names.
        is_plain: whether there is no `stop_when`, and no part that waits.
    """

    def __init__(self, schedule: Schedule, launch: int, agreement: Agreement | None) -> None:
        self._triggers = [Trigger(row, launch) for row in schedule.steps]
        self.dues = [NEVER]
        self.epoch_last = NEVER
        self.last_step = NEVER if schedule.max_steps == NEVER else schedule.max_steps - 1
        self.bar: Bar | None = None
        self.bar_step = NEVER
        self.interrupted_at = -2
        self.stop_bits, self.event_bits = schedule.stop_bits, schedule.event_bits
        self.is_plain = not schedule.stop_bits and not schedule.waits
        self.agreement = agreement
        self.every = 0 if agreement is None else agreement.every
        self.requests: list[tuple[int, str | None]] = []

    def begin_epoch(
        self, step: int, epoch: int, epoch_start: int, length: int | None, ends: Ends
    ) -> None:
        """Plan from `step` on, in an epoch that begins at `epoch_start`."""
        last = NEVER if length is None else epoch_start + length - 1
        if length is None and ends.is_single_pass:
            last = self.epoch_last  # a stream's end outlasts finish_epoch()
        self.epoch_last = last if last >= step else NEVER
        for trigger in self._triggers:
            if trigger.row.origin == EPOCH:
                trigger.origin = epoch_start
            if trigger.row.fraction is not None:
                first = epoch_start - trigger.origin
                trigger.row = trigger.row.in_epoch(epoch, ends.length, first)
        if ends.needs_length:
            last = ends.last_step(epoch, epoch_start)
            self.last_step = last if last >= step else NEVER
        dues = [trigger.row.next_step(step, trigger.origin) for trigger in self._triggers]
        self.dues = [*dues, NEVER]

    def triggers_at(self, step: int) -> tuple[int, list[int]]:
        """Return the bits of the step criteria that are met at `step`, and the dues after it."""
        bits, dues = 0, self.dues.copy()
        for number, trigger in enumerate(self._triggers):
            if dues[number] == step:
                bits |= trigger.bit
                dues[number] = trigger.step_after(step)
        return bits, dues

    def next_due(self, step: int, dues: list[int] | None = None) -> int:
        """Return the next step after `step` at which anything but the bar has a say."""
        due = min(self.dues if dues is None else dues)
        if due > self.epoch_last:
            due = self.epoch_last
        if due > self.last_step:
            due = self.last_step
        return min(due, step + self.every - (step + 1) % self.every) if self.every else due


class Conditions:
    """The condition functions of a run.

    Attributes:
        start: the first step at which any of them is called; `stop`: one after the last.
        answered: the step up to which they were called while a list is gathered.
        answer: the bits of those that were true at that step.
        origins: the steps that windows count from: the run's, the launch's and the epoch's first.
    """

    def __init__(self, schedule: Schedule, launch: int, agreement: Agreement | None) -> None:
        self._events = schedule.conditions
        self._stops = schedule.stop_conditions
        if agreement is not None:  # then `stop_when` fires at an agreement
            self._events, self._stops = [*self._stops, *self._events], []
        self._agreement = agreement
        self.origins = [0, launch, 0]
        self.answered = -1
        self.answer = 0
        self.start = self.stop = 0

    def begin_epoch(self, epoch_start: int) -> None:
        """Count windows that are per epoch from `epoch_start`."""
        self.origins[EPOCH] = epoch_start
        self.start, self.stop = NEVER, 0
        for _, _, _, origin, start, stop in [*self._events, *self._stops]:
            self.start = min(self.start, self.origins[origin] + start)
            self.stop = max(self.stop, self.origins[origin] + stop)

    def ask(self, state: LoopState, stops: bool) -> int:
        """Call those of `stop_when`, then the others; return the bits of the true ones.

        Processes that agree keep them for the next exchange, and none is true now.

        Args:
            state: their argument; training_end is true for the others if `stop_when` fires.
            stops: whether `stop_when` fires by another criterion.
        """
        step = state.global_step
        if step <= self.answered:
            return self.answer if step == self.answered else 0
        bits = self._true_ones(self._stops, state) if self._stops else 0
        if bits or stops:
            state.training_end = True  # for those that follow
        bits |= self._true_ones(self._events, state)
        if self._agreement is not None:
            self._agreement.keep(step, bits)
            return 0
        return bits

    def _true_ones(self, rows: list[ConditionRow], state: Any) -> int:
        bits, step, whose = 0, state.global_step, ""
        try:
            for place, function, whose, origin, start, stop in rows:  # noqa: B007
                if start <= step - self.origins[origin] < stop and function(state):
                    bits |= 1 << place
        except Exception as exception:
            failure = errors.not_stop(exception)
            errors.annotate(failure, f"in the condition of {whose}")
            raise failure  # noqa: B904 (it is mostly the exception itself)
        return bits


class Alarm:
    """The time criteria, and the reading of the clock at which the next of them can be met.

    Attributes:
        timed: whether each step reads the clock; processes that agree do so at agreements alone.
        last: the reading of the latest step, later by the pauses since then.
    """

    __slots__ = ("clock", "last", "max_time", "next_reading", "timed", "timer_bits", "timers")

    def __init__(self, clock: Clock, timers: Timers, schedule: Schedule, is_alone: bool) -> None:
        self.clock = clock
        self.last = 0
        self.timed = schedule.timed and is_alone
        self.max_time = schedule.max_time
        self.timer_bits = schedule.timer_bits
        self.set(timers)

    def set(self, timers: Timers) -> None:
        """Wait for these timers, or for the same ones after a pause."""
        self.next_reading = self.reading_of(timers)
        self.timers = timers

    def reading_of(self, timers: Timers) -> int:
        """Return the reading at which the next of these timers, or the limit, is reached."""
        elapsed = min(timers.next_time, self.max_time)
        return self.clock.reading_at(elapsed, timers.next_launch_time)


NO_BATCHES: Iterable[Any] = iter(())


class Counter:
    """How much bodies have counted of one thing.

    Attributes:
        total: the sum; `before`: the sum before the step `at`, at which it was counted last.
        due: the sum from which one of the criteria `rows` is met; infinity if there is none.
    """

    def __init__(self, total: int, rows: CounterRows | None) -> None:
        self.rows: Any = rows  # without rows, nothing is ever due
        self.total = self.before = total
        self.at = -1
        self.due: float = inf if rows is None else rows.due_after(total)


class Decided:
    """The latest step that was decided, or the latest list; steps after it are quiet.

    Attributes:
        step: that step; `size`: how many steps were made with it.
        events: those of that step.
        epoch_end, training_end: as in its LoopState.
        state: the LoopState that was made last.
        timers: the time criteria before it; `waiting`: the bits that waited before it.
    """

    def __init__(self, state: LoopState, timers: Timers) -> None:
        self.state = state
        self.step, self.size = state.global_step, 1
        self.events: Any = QUIET
        self.epoch_end, self.training_end = state.epoch_end, False
        self.timers, self.waiting = timers, 0


class Engine:
    """Where a run is, what comes next, and the decision of each step.

    Args:
        schedule: the events and limits.
        clock: keeps training time.
        timers: the time criteria.
        state: the latest step before the run begins.
        agreement: lets processes agree, or None.

    Attributes:
        step: the latest step; `decided`: the latest one that was not quiet.
        epoch: the epoch of the next step; `epoch_start`: its first step.
        batches: the iterator that steps fetch from; an empty one if something else comes first.
        opened: the iterator of the open epoch.
        in_hand: batches that were fetched, but whose steps were not made.
        counters: what bodies have counted, by name.
        quiet_until: the last step that is known to be quiet.
        turn: the number of the current iterator; `thread`: the thread that made it.
        over_at: the step whose body has ended without a next step.
    """

    def __init__(
        self,
        schedule: Schedule,
        clock: Clock,
        timers: Timers,
        state: LoopState,
        agreement: Agreement | None = None,
    ) -> None:
        launch = state.global_step + 1
        self.agenda = Agenda(schedule, launch, agreement)
        self.conditions = Conditions(schedule, launch, agreement)
        names = schedule.names
        self.sets = EventSets(names.names, names.places, names.warn_of_unknown)
        self.ends = schedule.ends(launch)
        self._checked_count = schedule.checked_count
        self.counters = {name: Counter(0, rows) for name, rows in schedule.counters.items()}
        self.alarm = Alarm(clock, timers, schedule, agreement is None)
        self.step = self.over_at = state.global_step
        self.decided = Decided(state, timers)
        self.epoch = state.epoch + state.epoch_end
        self.epoch_start = launch if state.epoch_end else launch - state.epoch_step - 1
        self.conditions.origins[EPOCH] = self.epoch_start
        self.batches = self.opened = NO_BATCHES
        self.in_hand: list[Any] = []
        self.quiet_until = -1
        self.turn = self.thread = 0

    # Epochs

    def begin_epoch(self, batches: Iterable[Any], length: int | None) -> None:
        """Fetch from `batches`, the rest of an epoch of this length, if it is known."""
        self.opened = batches
        self.agenda.begin_epoch(self.step + 1, self.epoch, self.epoch_start, length, self.ends)
        self.conditions.begin_epoch(self.epoch_start)
        self.alarm.set(self.alarm.timers.in_epoch(self.epoch_start))
        self.look_ahead()

    def end_epoch(self) -> None:
        """Let the next step be the first of the next epoch."""
        self.latest_state()  # while the epoch is that of the step
        if not self.agenda.is_plain:
            self.ends.waits.end_epoch(self.step, self.conditions.origins)
        self.epoch, self.epoch_start = self.epoch + 1, self.step + 1

    def ends_in(self, count: int) -> None:
        """Let the epoch end with the `count`-th batch from the one that is being fetched on."""
        last = self.step + len(self.in_hand) + count
        if last == self.agenda.interrupted_at:
            raise errors.interrupted()
        self.agenda.epoch_last = min(self.agenda.epoch_last, last)
        self.quiet_until = -1

    @property
    def ended_epoch(self) -> bool:
        """Whether the latest step was the last of its epoch, and that was not ended yet."""
        return self.decided.epoch_end and self.decided.step >= self.epoch_start

    def drop_iterator(self) -> None:
        """Forget the iterator of the epoch."""
        self.batches = self.opened = NO_BATCHES
        self.quiet_until = -1

    def drop_batches(self) -> None:
        """Forget the iterator and what is in hand."""
        self.drop_iterator()
        self.in_hand = []

    # What the latest step was

    @property
    def current_epoch(self) -> int:
        """The epoch of the step that is being made; of the latest step, if none is."""
        return self.epoch if self._is_in_use() else self.latest_state().epoch

    def state_at(self, step: int, epoch_end: bool, training_end: bool, elapsed: int) -> LoopState:
        """Return the LoopState of a step of the epoch."""
        in_epoch, clock = step - self.epoch_start, self.alarm.clock
        return LoopState(self.epoch, step, in_epoch, epoch_end, training_end, elapsed, clock)

    def latest_state(self) -> LoopState:
        """Return the LoopState of the latest step, the same object as long as it is that."""
        step, decided, clock = self.step, self.decided, self.alarm.clock
        state = decided.state
        is_decided = decided.step == step
        ends = is_decided and decided.epoch_end, is_decided and decided.training_end
        elapsed = clock.elapsed(self.alarm.last) if self.alarm.timed else -1
        if state.global_step == step:
            if (state.epoch_end, state.training_end) == ends:
                return state
            elapsed = state._elapsed
        decided.state = self.state_at(step, *ends, elapsed)
        return decided.state

    def latest_events(self) -> Any:
        """Return the events of the latest step."""
        return self.decided.events if self.decided.step == self.step else QUIET

    # What bodies change

    def amend(self, bits: int, epoch_end: bool, reason: str | None) -> Any:
        """Let the latest step have more events, and end its epoch or the run; return its events.

        Raises:
            LoopError: its body has ended, or this is another thread.
        """
        self.check_body()
        decided, ends, step = self.decided, self.ends, self.step
        was_end = decided.step == step and decided.epoch_end
        if decided.step == step and decided.events:
            bits |= decided.events.bits
        if epoch_end and not was_end:
            bits |= ends.bits_at(step, self.epoch, self.epoch_start)
            reason = ends.by_epochs(self.epoch)
        reason = ends.first_reason([reason, ends.stop_reason])
        epoch_end |= was_end
        reading, dues = self.alarm.last, self.agenda.dues
        events = self._conclude(step, bits, reason, epoch_end, reading, False, dues, 0)
        if self.agenda.agreement is not None:
            self.agenda.agreement.amend(step, bits, epoch_end, reason)
        return events

    def count(self, name: str, n: int = 1) -> Any:
        """Add to a counter in the body of the latest step; return its events.

        Raises:
            LoopError: as `amend`.
            TypeError, ValueError: an argument is wrong.
        """
        self.check_body()
        if type(n) is not int or n < 0 or not isinstance(name, str):
            n = self._checked_count(name, n)
        counter = self.counters.get(name)
        if counter is None:
            counter = self.counters[name] = Counter(0, None)
        total, due, events = counter.total + n, counter.due, self.latest_events()
        if total >= due:
            bits = counter.rows.bits_at(counter.total, total, self.step, self.conditions.origins)
            due = counter.rows.due_after(total)
            events = self.amend(bits, False, None) if bits else events
        if counter.at != self.step:
            counter.at, counter.before = self.step, counter.total
        counter.total, counter.due = total, due
        return events

    def check_body(self) -> None:
        """Raise LoopError unless the body of the latest step runs in this thread."""
        if self.over_at == self.step or self.thread != get_ident() or self._is_in_use():
            raise errors.no_body()

    def end_body(self) -> None:
        """Let the latest step not be changed any more."""
        self.over_at = self.step

    # The decision

    def look_ahead(self) -> None:
        """Find out how far the next steps are quiet, and where their batches come from."""
        self.batches = NO_BATCHES if self.in_hand else self.opened
        self.quiet_until = self._quiet_after(
            self.step, self.agenda.dues, self.alarm.timers.next_start
        )
        if self.agenda.requests:
            self.quiet_until = -1

    def _quiet_after(self, step: int, dues: list[int], next_start: int) -> int:
        """Return how far the steps after `step` are quiet, but for the clock."""
        agenda, conditions = self.agenda, self.conditions
        asks = step + 1 < conditions.stop
        if asks and step + 1 >= conditions.start:
            return step
        until = agenda.next_due(step, dues)
        if until > agenda.bar_step:
            until = agenda.bar_step
        if until > next_start:
            until = next_start
        if asks and until > conditions.start:
            until = conditions.start
        return until - 1

    def jump(self, step: int) -> Any:
        """Make the steps up to `step`, before which nothing is scheduled; return its events."""
        return self.decide(None, self.turn, step - self.step, 0)

    def make(self, run: Run, turn: int, count: int, reading: int) -> Any:
        """Make the next `count` steps; return the events of the last. The others have none."""
        last = self.step + count
        if last > self.quiet_until or reading >= self.alarm.next_reading:
            return self.decide(run, turn, count, reading)
        if self.alarm.timed:
            self.alarm.last = reading
        rest, decided = self.in_hand[count:], self.decided
        self.batches = NO_BATCHES if rest else self.opened
        decided.step, decided.size, decided.events = last, count, QUIET
        decided.epoch_end = decided.training_end = False
        decided.timers, decided.waiting = self.alarm.timers, self.ends.waits.waiting
        self.step, self.in_hand = last, rest
        return QUIET

    def decide(self, run: Run | None, turn: int, count: int, reading: int) -> Any:
        """Make the next `count` steps; return the events of the last one.

        The steps are made as a whole, or not at all if anything raises.
        """
        agenda, ends, alarm = self.agenda, self.ends, self.alarm
        step = self.step + count
        epoch_end = step == agenda.epoch_last
        requests = len(agenda.requests)
        stop: str | None = None
        is_due = False
        bits, dues = 0, agenda.dues
        if step in dues:
            bits, dues = agenda.triggers_at(step)
        reason = ends.by_steps if step == agenda.last_step else None
        if epoch_end:
            bits |= ends.bits_at(step, self.epoch, self.epoch_start)
            reason = reason or ends.by_epochs(self.epoch) or ends.by_source
        if agenda.agreement is not None:
            more, stop, is_due = agenda.agreement.read(step, reason is not None)
            bits |= more
            agenda.epoch_last = min(agenda.epoch_last, agenda.agreement.end)
        elif requests:
            more, stop = ends.of_requests(agenda.requests[:requests])
            bits |= more
        if alarm.timed:
            is_due = reading >= alarm.next_reading or step >= alarm.timers.next_start
        if is_due:
            times = self.times_at(reading)
            bits |= alarm.timers.due_at(step, times)
            reason = "max_seconds" if times[0] >= alarm.max_time else reason
        reason = stop or reason
        if self.conditions.start <= step < self.conditions.stop:
            elapsed = alarm.clock.elapsed(reading) if alarm.timed else -1
            state = self.state_at(step, epoch_end, reason is not None, elapsed)
            bits |= self.conditions.ask(state, bool(bits & agenda.stop_bits))
        if turn != self.turn and run is not None:  # the loop was closed or restarted
            run.check(turn)
        if agenda.bar is not None and step >= agenda.bar_step:
            agenda.bar_step = agenda.bar.at_step(step)
        if agenda.agreement is not None and reason is None:
            agenda.agreement.begin(
                step, agenda.requests[:requests], alarm.clock, self.counters, agenda.epoch_last
            )
        return self._conclude(step, bits, reason, epoch_end, reading, is_due, dues, requests)

    def _conclude(
        self,
        step: int,
        bits: int,
        reason: str | None,
        epoch_end: bool,
        reading: int,
        is_due: bool,
        dues: list[int],
        requests: int,
    ) -> Any:
        """Make the steps up to `step`, at which `bits` are met; return its events."""
        agenda, ends, alarm, decided = self.agenda, self.ends, self.alarm, self.decided
        end = None
        if reason is not None or bits > agenda.event_bits or ends.waits.waiting:
            end = ends.after(step, bits, reason, self.conditions.origins)
            bits, reason, _, _ = end
        timers, next_reading = alarm.timers, alarm.next_reading
        if is_due or bits & alarm.timer_bits:
            timers = timers.after(step, self.times_at(reading), bits, is_due)
            next_reading = alarm.reading_of(timers)
        bits &= agenda.event_bits
        events = QUIET
        if bits:
            events = self.sets.of(bits)
            self.sets.mark(events, step)
        in_hand = self.in_hand
        if in_hand:
            is_over = reason is not None or (epoch_end and not ends.is_single_pass)
            in_hand = [] if is_over else in_hand[step - self.step :]
        until = self._quiet_after(step, dues, timers.next_start)
        # From here on nothing is called: the steps are made as a whole
        if alarm.timed:
            alarm.last = reading
        if decided.step != step:
            decided.step, decided.size = step, step - self.step or 1
            decided.timers = alarm.timers
            if not agenda.is_plain:
                decided.waiting = ends.waits.waiting
        decided.events, decided.epoch_end = events, epoch_end
        decided.training_end = reason is not None
        if end is not None:
            _, ends.stop_reason, ends.finished, ends.waits.waiting = end
        if epoch_end or reason is not None:
            self.opened = NO_BATCHES
            self.conditions.answered = step
        self.batches = NO_BATCHES if in_hand else self.opened
        alarm.timers, alarm.next_reading, agenda.dues = timers, next_reading, dues
        self.step, self.in_hand = step, in_hand
        self.quiet_until = until
        if requests:
            del agenda.requests[:requests]
        if agenda.requests:
            self.quiet_until = -1
        return events

    def times_at(self, reading: int) -> tuple[int, int]:
        """Return the times of training and of the launch, at a reading or as agreed on."""
        agreement = self.agenda.agreement
        if agreement is not None:
            return agreement.now, agreement.launch_now
        return self.alarm.clock.times_at(reading)

    # Iterators

    def ahead(self, batches: Iterator[Any], count: int) -> Lookahead:
        """Return an iterator that fetches so many batches ahead, to find the end of the epoch."""
        return Lookahead(batches, self, count)

    def steps(self, run: Run, keep_alive: object) -> Iterator[Pair]:
        """Return a new iterator over steps, in place of the current one."""
        steps = Steps(self, run, self._enter(), keep_alive)
        return lasting(steps.pairs, steps.lives)

    def lists(self, run: Run, sizes: Sizes, keep_alive: object) -> Iterator[Pair]:
        """Return a new iterator over lists of steps, in place of the current one."""
        lists = Lists(self, run, self._enter(), keep_alive, sizes)
        return lasting(lists.pairs, lists.lives)

    def _enter(self) -> int:
        if self._is_in_use():
            raise errors.in_use()
        self.turn += 1
        self.thread = get_ident()
        self.look_ahead()
        self.quiet_until = -1
        return self.turn

    def _is_in_use(self) -> bool:
        """Return whether this is called from within a step that is being made."""
        frame = sys._getframe(1)
        steps, lists = Steps.pairs.__code__, Lists.pairs.__code__
        while frame.f_back is not None:
            frame = frame.f_back
            makes_steps = frame.f_code is steps or frame.f_code is lists
            if makes_steps and frame.f_locals["engine"] is self:
                return True
        return False


def lasting(generate: Callable[[None], Iterator[Any]], lives: list[None]) -> Iterator[Any]:
    """Return an iterator that continues with a new generator after an exception ended one.

    Args:
        generate: makes a generator. It adds to `lives` as it begins, and clears them at its end.
        lives: one for each generator that can be made. No Python is called in between, so that no
            interrupt can strike there.
    """
    return chain.from_iterable(map(generate, lives))


MISSING: Any = object()


class Lookahead:
    """Fetches batches ahead, and tells the engine which is the last of the epoch."""

    __slots__ = ("_batches", "_count", "_engine", "_first", "_held", "_is_over", "_ring")

    def __init__(self, batches: Iterator[Any], engine: Engine, count: int) -> None:
        self._batches: Iterable[Any] = batches
        self._engine: Callable[[], Any] = ref(engine)  # which refers to this
        self._count = count
        self._ring = [MISSING] * count  # `_held` of its places are in use, from `_first` on
        self._first = self._held = 0
        self._is_over = False  # whether the iterator has ended or failed

    def batches_ahead(self) -> int:
        """Return how many batches were fetched ahead."""
        return self._held

    def batches_left(self) -> int | None:
        """Fetch ahead; return how many batches there are, or None if the end was not found."""
        self._fill()
        return self._held if self._batches is NO_BATCHES else None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; each iterator continues where the one before was left."""
        self._fill()
        ring, count, first = self._ring, self._count, self._first
        if self._held == count:
            try:
                # A batch comes out of `for`, where no signal can strike before it has a name
                for batch in self._batches:
                    ring[first], batch = batch, ring[first]
                    first = first + 1 if first + 1 < count else 0
                    self._first = first
                    yield (batch, batch := MISSING)[0]
                self._end()
            except Exception as error:
                self._batches, self._is_over = raising(error), True
        while self._held:
            batch, ring[first] = ring[first], MISSING
            first = first + 1 if first + 1 < count else 0
            self._first, self._held = first, self._held - 1
            yield (batch, batch := MISSING)[0]
        yield from self._batches

    def _fill(self) -> None:
        """Fetch ahead; the end, or an error, comes after the batches that are held."""
        while self._held < self._count and not self._is_over:
            place = (self._first + self._held) % self._count
            try:
                for self._ring[place] in self._batches:  # noqa: B020
                    self._held += 1
                    break
                else:
                    self._end()
            except Exception as error:
                self._batches, self._is_over = raising(error), True

    def _end(self) -> None:
        if self._held:
            self._engine().ends_in(self._held)
        self._batches, self._is_over = NO_BATCHES, True


def raising(error: Exception) -> Iterator[Any]:
    """Return an iterator that raises `error`."""
    raise error
    yield


class Steps:
    """Makes the steps of an iterator, good until the loop is entered again.

    Args:
        engine: makes the steps.
        run: opens epochs.
        turn: the number of the iterator.
        keep_alive: what is freed with the iterator.
    """

    def __init__(self, engine: Engine, run: Run, turn: int, keep_alive: object) -> None:
        self._engine = engine
        self._run = run
        self._turn = turn
        self._keep_alive = keep_alive
        self._over = False
        self.lives = [None, None]

    def pairs(self, _: None) -> Iterator[Pair]:
        """Yield the next steps."""
        self.lives.append(None)
        # A pair is yielded without a name for its batch, so that the body's `del batch` frees it. A
        # batch comes out of `for`, where no signal can strike between its arrival and its name.
        engine, run, turn, alarm = self._engine, self._run, self._turn, self._engine.alarm
        timed, tick = alarm.timed, alarm.clock.tick
        reading = 0
        batch: Any = QUIET
        while not self._over:
            run.check(turn)
            batches, step = engine.batches, engine.step
            has_more = True
            try:
                for batch in batches:
                    if timed:
                        reading = tick()
                    if step < engine.quiet_until and reading < alarm.next_reading:
                        if timed:
                            alarm.last = reading
                        engine.step = step = step + 1
                        yield batch, (batch := QUIET)
                    else:
                        events = engine.decide(run, turn, 1, reading)
                        step += 1
                        yield batch, (batch := QUIET) or events  # QUIET is false
                    if engine.batches is not batches or engine.turn != turn:
                        break
                else:
                    has_more = False
            except GeneratorExit:
                raise
            except BaseException as exception:
                batches = NO_BATCHES  # the traceback must not keep the iterator alive
                if batch is not QUIET:  # its step was not made
                    if engine.turn == turn:
                        engine.in_hand, engine.batches = [batch], NO_BATCHES
                    batch = QUIET
                    engine.end_body()
                    run.fail_step(exception, turn)
                    raise
                engine.end_body()
                if not run.continues_after(exception, turn):
                    raise
            if has_more:
                continue
            engine.end_body()
            if engine.in_hand and not run.is_between_epochs:
                batch = engine.in_hand[0]
                events = self._make(1)
                yield batch, (batch := QUIET) or events
            else:
                pair = self._next_epoch()
                if pair is not None:
                    yield pair
        self.lives.clear()

    def _make(self, count: int) -> Any:
        """Make the steps of so many batches in hand; return the events of the last."""
        alarm = self._engine.alarm
        try:
            reading = alarm.clock.tick() if alarm.timed else 0
            return self._engine.make(self._run, self._turn, count, reading)
        except BaseException as exception:
            self._run.fail_step(exception, self._turn)
            raise

    def _next_epoch(self) -> Pair | None:
        """Open the next epoch, or end; return the step of an error that is an event, or None."""
        try:
            return self._run.next_epoch(self._turn)
        except StopIteration:
            self._over = True
            self._keep_alive = None
            return None


class Lists(Steps):
    """Makes lists of steps: each list ends where an event fires, or at the end of its epoch."""

    def __init__(
        self, engine: Engine, run: Run, turn: int, keep_alive: object, sizes: Sizes
    ) -> None:
        super().__init__(engine, run, turn, keep_alive)
        self._sizes = sizes

    def pairs(self, _: None) -> Iterator[Pair]:
        """Yield the next lists."""
        self.lives.append(None)
        engine = self._engine
        while not self._over:
            self._run.check(self._turn)
            engine.end_body()
            most = 0 if engine.in_hand and self._run.is_between_epochs else self._gather()
            if most and engine.in_hand:
                size = fitting(self._sizes, min(most, len(engine.in_hand)))
                batches: Any = engine.in_hand[:size]
                events = self._make(size)
                yield batches, (batches := QUIET) or events
            else:
                pair = self._next_epoch()
                if pair is not None:
                    yield pair
        self.lives.clear()

    def _gather(self) -> int:
        """Fetch the batches of a list; return how many steps it may have."""
        engine = self._engine
        conditions, agenda = engine.conditions, engine.agenda
        room = agenda.next_due(engine.step) - engine.step
        if conditions.answer and conditions.answered > engine.step:
            room = min(room, conditions.answered - engine.step)
        if agenda.requests and agenda.agreement is None:
            room = 1
        most = fitting(self._sizes, room)
        step, last = engine.step, engine.step + most
        while step < last:
            asks = step + 1 < conditions.stop and conditions.start < last
            is_known = agenda.epoch_last < NEVER  # else the next batch may be the last
            count = 1 if asks or not is_known else last - step
            missing = step + count - engine.step - len(engine.in_hand)
            if missing > 0 and not self._fetch(missing):
                break
            step += count
            if step == agenda.epoch_last:
                break
            if asks and step < last and self._fires(step):
                return step - engine.step
        return most

    def _fetch(self, count: int) -> bool:
        """Have so many more batches in hand. False if the iterator has ended or was dropped."""
        engine = self._engine
        before = len(engine.in_hand)
        try:
            engine.in_hand.extend(islice(engine.opened, count))
        except BaseException as exception:
            if not self._run.continues_after(exception, self._turn):
                raise
            return False
        if len(engine.in_hand) == before + count:
            return True
        engine.opened = NO_BATCHES  # it is not asked again
        return False

    def _fires(self, step: int) -> bool:
        """Call the conditions of a step before the list's last; whether the list ends there."""
        engine, conditions = self._engine, self._engine.conditions
        if not max(conditions.start, conditions.answered + 1) <= step < conditions.stop:
            return False
        try:
            found = conditions.ask(engine.state_at(step, False, False, -1), False)
        except BaseException as exception:
            self._run.fail_step(exception, self._turn)
            raise
        conditions.answered, conditions.answer = step, found
        return found != 0


def fitting(sizes: Sizes, most: int) -> int:
    """Return the greatest allowed length that is at most `most`; `sizes` end with 1."""
    if isinstance(sizes, int):
        return min(most, sizes)
    for size in sizes:
        if size <= most:
            return size
    return 1


class Durations:
    """A histogram of durations in nanoseconds; its bins are 3 % wide."""

    def __init__(self) -> None:
        self.bins = [0] * (64 << 5)  # 32 from one power of two to the next
        self.count = self.total = self.longest = 0

    def add(self, duration: int) -> None:
        """Add one."""
        shift = max(0, duration.bit_length() - 6)
        self.bins[(shift << 5) + (duration >> shift)] += 1
        self.count += 1
        self.total += duration
        self.longest = max(self.longest, duration)


class Timings:
    """What a profile measures, in nanoseconds. A step counts once its body has ended."""

    def __init__(self, last_steps: int) -> None:
        self.waits, self.bodies = Durations(), Durations()
        self.costs: dict[Set[Hashable], Durations] = {}  # the bodies of each set of events
        self.steps = self.fruitless = 0  # requests that yielded nothing
        self.turn = 0  # the number of the iterator that is timed
        self.step = self.epoch = self.before = self.asked = 0
        self.began = -1  # between bodies
        self.events: Set[Hashable] = QUIET
        self._ring: deque[tuple[dict[str, int], Set[Hashable]]] = deque(maxlen=last_steps)

    def end_body(self, reading: int, engine: Engine) -> None:
        """Count the step whose body ends now, if there is one."""
        began, self.began = self.began, -1
        if began < 0:
            return
        size = self.step - self.before  # 0 if it stands for an exception
        if size and engine.step == self.step:
            self.events = engine.latest_events()  # the body may have changed them
        numbers = {"step": self.step, "size": size, "epoch": self.epoch}
        numbers |= {"asked": self.asked, "began": began, "ended": reading}
        self._ring.append((numbers, self.events))
        self.waits.add(began - self.asked)
        self.bodies.add(reading - began)
        self.steps += size
        cost = self.costs.get(self.events)
        if cost is None and len(self.costs) < 200:
            cost = self.costs[self.events] = Durations()
        if cost is not None:
            cost.add(reading - began)

    def last_steps(self) -> list[tuple[dict[str, int], Set[Hashable]]]:
        """Return the last steps, the oldest first: numbers by name, and the events."""
        return list(self._ring)


class TimedSteps:
    """An iterator that yields what `steps` yields. It keeps nothing but the time."""

    turn = 0  # until it is timed

    def __init__(self, steps: Iterator[Pair], engine: Engine, timings: Timings) -> None:
        self.steps, self.engine, self.timings = steps, engine, timings
        # One call in C makes a step and a reading: no interrupt can strike between the two
        self.timed = map(slice, steps, iter(perf_counter_ns, None))
        timings.end_body(perf_counter_ns(), engine)
        timings.turn += 1
        self.turn = timings.turn

    def __iter__(self) -> TimedSteps:
        return self

    def __next__(self) -> Pair:
        timings, engine = self.timings, self.engine
        if self.turn != timings.turn:
            return next(self.steps)  # which was replaced, and says so
        asked = perf_counter_ns()
        timings.end_body(asked, engine)
        timings.before = engine.step
        try:
            for timed in self.timed:
                # From here on no call and no jump lets an interrupt strike, and lose the pair
                pair = timed.start
                timings.events, timings.step, timings.epoch = pair[1], engine.step, engine.epoch
                timings.asked, timings.began = asked, timed.stop
                return pair
            raise StopIteration
        except BaseException:
            timings.fruitless += perf_counter_ns() - asked
            raise

    def __del__(self) -> None:
        if self.turn and self.turn == self.timings.turn:
            self.timings.end_body(perf_counter_ns(), self.engine)
