"""One step: counters, triggers, bitmask. The core in Python; `_core.pyx` is the same, compiled.

The core knows ints, bits and callables. It keeps the number of the last step at which nothing can
be due, `quiet_until`, and up to there a step is a batch, an increment and a pair. Every other step
goes through `_take` (get its batch) and `_hand_over` (find what is due).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial
from heapq import heappush, heapreplace
from itertools import chain
from time import perf_counter_ns

from . import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from typing import Any

    from ._core import Plan, Source

    Pair = tuple[Any, frozenset[Hashable]]
    Agenda = list[tuple[int, int]]

NEVER = 2**63 - 1
UNREAD = -NEVER
LONGEST = 2**62 - 1
"""The training time, in nanoseconds, at which it stands still."""


class NoEvents(frozenset):  # type: ignore[type-arg]
    """The set of events of a quiet step."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EventSet()"

    def __reduce__(self) -> tuple[object, ...]:
        return frozenset, ()


class EventSet(frozenset):  # type: ignore[type-arg]
    """The events of a step on which something is due.

    Asked for a name that is not among `known`, it calls `on_unknown(name)`.
    """

    __slots__ = ("_known", "_on_unknown")

    _known: frozenset[Hashable]
    _on_unknown: Callable[[Hashable], object]

    def __contains__(self, name: Hashable) -> bool:
        if frozenset.__contains__(self, name):
            return True
        if name not in self._known:
            self._on_unknown(name)
        return False

    def __repr__(self) -> str:
        return f"EventSet({set(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return frozenset, (list(self),)


def make_event_set(
    names: Iterable[Hashable],
    known: frozenset[Hashable],
    on_unknown: Callable[[Hashable], object],
) -> EventSet:
    """The EventSet of `names`."""
    events = EventSet(names)
    events._known = known
    events._on_unknown = on_unknown
    return events


QUIET = NoEvents()
MISSING: Any = object()


def make_agenda() -> Agenda:
    """Numbered things by when they are due: a binary heap, whose last entry is never due."""
    return [(NEVER, -1)]


class Clock:
    """Training time in nanoseconds: monotonic, from `start`, on top of what was `saved`."""

    __slots__ = ("last", "saved", "started", "tick")

    def __init__(self, tick: Callable[[], int] | None, saved: int) -> None:
        self.tick: Callable[[], int] = perf_counter_ns if tick is None else tick
        self.saved = saved
        self.started = 0
        self.last = 0

    def start(self) -> None:
        self.started = self.last = self.tick()

    def elapsed(self, reading: int) -> int:
        """The training time at `reading`; a clock that went backwards has stood still."""
        if reading > self.last:
            self.last = reading
        return min(self.saved + (self.last - self.started), LONGEST)


_FIELDS = ("epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed")


class LoopState:
    """Where a run is: what conditions are given at each step, and what `loop.state` returns.

    Attributes:
        epoch: the epoch, from 0.
        global_step: the step, from 0, across epochs; -1 before the first.
        epoch_step: the step within its epoch, from 0; -1 before the first.
        epoch_end: whether the step has the last batch of its epoch.
        training_end: whether the step is the last of the run.
        elapsed: training time in seconds: the step's reading of the clock where an event or a
            limit needs time, else read when it is first looked at.
        steps_done: `global_step + 1`.

    Example:
        >>> from dloop import Event, Loop
        >>> seventh = Event(lambda state: state.global_step == 7)
        >>> loop = Loop(range(10), max_epochs=1, events={"Seventh": seventh})
        >>> [loop.state.steps_done for batch, events in loop if "Seventh" in events]
        [8]
    """

    __slots__ = (
        "_clock",
        "_elapsed",
        "_epoch",
        "_epoch_end",
        "_epoch_step",
        "_global_step",
        "_training_end",
    )

    def __init__(
        self,
        epoch: int,
        global_step: int,
        epoch_step: int,
        epoch_end: bool,
        training_end: bool,
        elapsed: int,
        clock: Clock,
    ) -> None:
        self._epoch = epoch
        self._global_step = global_step
        self._epoch_step = epoch_step
        self._epoch_end = epoch_end
        self._training_end = training_end
        self._elapsed = elapsed
        self._clock = clock

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def global_step(self) -> int:
        return self._global_step

    @property
    def epoch_step(self) -> int:
        return self._epoch_step

    @property
    def epoch_end(self) -> bool:
        return self._epoch_end

    @property
    def training_end(self) -> bool:
        return self._training_end

    @property
    def elapsed(self) -> float:
        if self._elapsed < 0:
            self._elapsed = self._clock.elapsed(self._clock.tick())
        return self._elapsed / 1e9

    @property
    def steps_done(self) -> int:
        return self._global_step + 1

    def at_training_end(self) -> LoopState:
        """The same, for the last step of the run."""
        return LoopState(
            self._epoch,
            self._global_step,
            self._epoch_step,
            self._epoch_end,
            True,
            self._elapsed,
            self._clock,
        )

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


class StepTrigger:
    """Due at every `period`-th step, or at `points` where there is no period."""

    __slots__ = ("bit", "period", "points", "start", "stop")

    def __init__(
        self, bit: int, period: int, points: tuple[int, ...], start: int, stop: int
    ) -> None:
        self.bit = bit
        self.period = period
        self.points = points
        self.start = start
        self.stop = stop

    def due_from(self, step: int, origin: int) -> int:
        """The first global step from `step` on at which this is due, counting from `origin`."""
        count = max(step, self.start) - origin
        if self.period:
            rest = (count + 1) % self.period
            count += self.period - rest if rest else 0
        else:
            place = bisect_left(self.points, count)
            if place == len(self.points):
                return NEVER
            count = self.points[place]
        if count >= self.stop - origin:
            return NEVER
        return origin + count


class TimeTrigger:
    """Due `period` after it was last due, or once at each of `points`, in nanoseconds."""

    __slots__ = ("bit", "origin", "period", "points", "start", "stop")

    def __init__(
        self, bit: int, period: int, points: tuple[int, ...], origin: int, start: int, stop: int
    ) -> None:
        self.bit = bit
        self.period = period
        self.points = points
        self.origin = origin
        self.start = start
        self.stop = stop

    def first_due(self) -> int:
        return self.origin + (self.period or self.points[0])

    def due_after(self, now: int) -> int:
        """The training time at which this is due again, after it was at `now`."""
        if self.period:
            return now + self.period
        place = bisect_right(self.points, now - self.origin)
        return NEVER if place == len(self.points) else self.origin + self.points[place]


class Turn:
    """The right of one iterator to go on: what its quiet steps look at.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        plain_until: the last step at which nothing but step and time triggers can be due.
    """

    __slots__ = ("plain_until", "quiet_until")

    def __init__(self) -> None:
        self.ask_attention()

    def ask_attention(self) -> None:
        """Let the next step be neither quiet nor plain."""
        self.quiet_until = self.plain_until = -1


class Core:
    """One run: from the source's batches to pairs of a batch and its events.

    Args:
        plan: what is due when, and the limits.
        source: opens epochs and judges their ends.
        clock: keeps training time.
        epoch: the epoch to begin in.
        epoch_steps: steps of that epoch that are done.
        steps: steps that are done in all.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        clock: Clock,
        epoch: int = 0,
        epoch_steps: int = 0,
        steps: int = 0,
    ) -> None:
        self.plan = plan
        self.source = source
        self.clock = clock
        self.started = False
        self.turn = Turn()

        # The latest step, as it was handed over
        self.step = steps - 1
        self.epoch = epoch
        self.epoch_start = steps - epoch_steps
        self.epoch_end = False
        self.training_end = False
        self.latest: LoopState | None = None
        self.stop_reason: str | None = None
        self.error: BaseException | None = None
        self.finished = False
        self.closed = False

        # The epoch that batches are drawn from, ahead of the latest step while a step is made
        self.drawing = epoch
        self.draws_from = self.epoch_start
        self.batches: Iterator[Any] | None = None
        self.looks_from = NEVER
        self.ends_at = NEVER
        self.ended = False

        # What was fetched and not handed over, and what is known of its step
        self.held = MISSING
        self.ahead = MISSING
        self.deferred: Exception | None = None
        self.bits = 0
        self.reading = UNREAD
        self.last_before = UNREAD  # the clock's last before the reading of a step not handed over

        self.timed = plan.timed
        self.last_step = plan.max_steps - 1
        self.max_time = plan.max_time
        self.stop_bit = plan.stop_bit
        self.conditions_from = min([start for _, _, start, _ in plan.all_conditions], default=NEVER)
        self.conditions_until = max([stop for _, _, _, stop in plan.all_conditions], default=0)
        self.sets: dict[int, frozenset[Hashable]] = {0: QUIET}
        self.step_triggers = [StepTrigger(*each) for each in plan.steps]
        self.epoch_triggers = [StepTrigger(*each) for each in plan.epoch_steps]
        self.time_triggers = [
            TimeTrigger(bit, period, points, clock.saved if per_launch else 0, start, stop)
            for bit, period, points, per_launch, start, stop in plan.times
        ]
        self.step_agenda = make_agenda()
        self.epoch_agenda = make_agenda()
        self.time_agenda = make_agenda()
        for number, trigger in enumerate(self.step_triggers):
            heappush(self.step_agenda, (trigger.due_from(steps, 0), number))
        for number, timer in enumerate(self.time_triggers):
            if timer.start <= steps:
                heappush(self.time_agenda, (timer.first_due(), number))
            else:
                heappush(self.step_agenda, (timer.start, len(self.step_triggers) + number))
        self.next_reading = NEVER

    def steps(self) -> Iterator[Pair]:
        """A new iterator on the run, in place of any older one."""
        self._refuse(self.turn)
        if self.training_end or self.finished:
            raise errors.finished()
        turn = self._change_turns()
        return chain(self._walk(turn), iter(partial(self._again, turn), MISSING))

    def close(self) -> None:
        """Let go of the source; no iterator goes on from here."""
        self.closed = True
        self.leave()

    def leave(self) -> None:
        """Let go of the source, and let every iterator be one that was replaced."""
        self._change_turns()
        self._let_go()

    @property
    def state(self) -> LoopState:
        """The LoopState of the latest step, the same object while that step lasts."""
        if self.latest is None or self.latest.global_step != self.step:
            now = self.clock.saved
            if self.started:
                now = self._handed_over_at() if self.timed else -1
            self.latest = LoopState(
                self.epoch,
                self.step,
                self.step - self.epoch_start,
                self.epoch_end,
                self.training_end,
                now,
                self.clock,
            )
        return self.latest

    def _handed_over_at(self) -> int:
        """The training time of the latest step, also where the next one failed after it read."""
        last = self.clock.last
        self.clock.last = last if self.last_before == UNREAD else self.last_before
        now = self.clock.elapsed(self.clock.last)
        self.clock.last = last
        return now

    def _walk(self, turn: Turn) -> Iterator[Pair]:
        # A pair is yielded without a name for its batch: the body's `del batch` frees it. A batch
        # comes out of `for`, where a signal cannot strike between its arrival and its name.
        batch: Any = QUIET
        try:
            while self.turn is turn and self._take():
                yield self._hand_over()
                if self.step >= turn.quiet_until:
                    continue
                if not self.timed:
                    for batch in self.batches:  # type: ignore[union-attr]
                        self.step += 1
                        yield batch, (batch := QUIET)
                        if self.step >= turn.quiet_until:
                            break
                    else:
                        self.ended = True
                    continue
                clock = self.clock
                tick = clock.tick
                for batch in self.batches:  # type: ignore[union-attr]
                    reading = tick()
                    if reading >= self.next_reading:
                        self.held, batch = batch, QUIET
                        self.reading = reading
                        break
                    if reading > clock.last:
                        clock.last = reading
                    self.step += 1
                    yield batch, (batch := QUIET)
                    if self.step >= turn.quiet_until:
                        break
                else:
                    self.ended = True
        except BaseException as exception:
            if batch is not QUIET:
                self.held = batch
            self._fail(exception)
            raise

    def _again(self, turn: Turn) -> Pair:
        """What an iterator gives whose `_walk` is over: mostly its end."""
        self._refuse(turn)
        for pair in self._walk(turn):
            return pair
        return MISSING  # type: ignore[no-any-return]

    def _change_turns(self) -> Turn:
        self.turn.ask_attention()
        self.turn = Turn()
        return self.turn

    def _refuse(self, turn: Turn) -> None:
        """Raise where `turn` gives no right to go on."""
        if self.closed:
            raise errors.closed()
        if self.turn is not turn:
            raise errors.replaced()
        if self.error is not None:
            raise errors.failed(self.error)

    def _fail(self, exception: BaseException) -> None:
        """Let `exception` end the run, unless it only interrupts it."""
        if isinstance(exception, Exception):
            self.error = exception
            self.stop_reason = "exception"
            self._let_go()
            self.source.forget()

    def _let_go(self) -> None:
        self.turn.ask_attention()
        self.batches = None
        self.held = self.ahead = MISSING

    def _take(self) -> bool:
        """Have the next step's batch in hand: kept, looked at before, or fetched.

        Returns False when the run is over.
        """
        if self.held is not MISSING:
            return True
        if self.step < self.turn.plain_until and not self.ended:
            for self.held in self.batches:  # type: ignore[union-attr]  # noqa: B020
                return True
            self.ended = True
        if self.training_end or self.finished:
            self._finish()
            return False
        if self.deferred is not None:
            raise self.deferred
        if self.ahead is not MISSING:
            self.held, self.ahead = self.ahead, MISSING
            return True
        if self.epoch_end and self.drawing == self.epoch:
            self._leave_epoch()
        while True:
            if self.batches is None:
                self._open_epoch()
            if not self.started:
                self.clock.start()
                self.started = True
            if not self.ended:
                for self.held in self.batches:  # type: ignore[union-attr]  # noqa: B020
                    return True
            taken = self.step + 1 - self.draws_from
            if not self.source.goes_on_after(self.drawing, taken, self.step):
                self.stop_reason = "exhausted"
                self._finish()
                return False
            self._leave_epoch()

    def _open_epoch(self) -> None:
        batches, self.looks_from, self.ends_at = self.source.open_epoch(self.drawing)
        self.epoch_agenda = make_agenda()
        for number, trigger in enumerate(self.epoch_triggers):
            due = trigger.due_from(self.step + 1, self.draws_from)
            heappush(self.epoch_agenda, (due, number))
        self.batches = chain(_Once(batches))

    def _leave_epoch(self) -> None:
        self.turn.ask_attention()
        self.batches = None
        self.ended = False
        self.drawing += 1
        self.draws_from = self.step + 1

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self.turn.ask_attention()
            self.batches = None
            self.source.finish(self.epoch, self.stop_reason)

    def _look_ahead(self) -> None:
        """Fetch the batch after the one in hand, or learn that there is none."""
        if self.ended or self.deferred is not None or self.ahead is not MISSING:
            return
        try:
            for self.ahead in self.batches:  # type: ignore[union-attr]  # noqa: B020
                return
            self.ended = True
        except Exception as exception:
            self.deferred = exception

    def _hand_over(self) -> Pair:
        """Find what is due at the step of the batch in hand, and let the step be done."""
        step = self.step + 1
        epoch_step = step - self.draws_from
        plain = step <= self.turn.plain_until
        if not plain and epoch_step >= self.looks_from:
            self._look_ahead()
        now = self._read_clock() if self.timed else -1
        epoch_end = not plain and (self.ended or epoch_step == self.ends_at)
        bits = self._due(step, epoch_end, now)
        if plain and now < self.max_time and not bits & self.stop_bit:
            events = self._events(bits)
            self._arm()
            self.bits = 0
            self.last_before = UNREAD
            self.step = step
            batch, self.held = self.held, MISSING
            return batch, events

        reason = self._limit_reached(step, epoch_end, now)
        state = None
        plan = self.plan
        if self.stop_bit:
            if plan.stop_conditions:
                state = self._state_of(step, epoch_end, reason is not None, now)
                bits |= self._fulfilled(plan.stop_conditions, step, state)
            if bits & self.stop_bit:
                bits ^= self.stop_bit
                if reason is None and state is not None:
                    state = state.at_training_end()
                reason = "stop_when"
        training_end = reason is not None
        if self.conditions_from <= step < self.conditions_until:
            if state is None:
                state = self._state_of(step, epoch_end, training_end, now)
            bits |= self._fulfilled(plan.conditions, step, state)
        if training_end:
            bits |= plan.on_training_end
        if epoch_step == self.looks_from and self.ahead is not MISSING:
            self.source.goes_past_promise(self.drawing)
        if reason == "exhausted":
            self.source.ran_dry(step)
        events = self._events(bits)
        if self.held is MISSING:  # a condition, or the source, has closed the loop
            raise errors.closed() if self.closed else errors.replaced()

        self.epoch = self.drawing
        self.epoch_start = self.draws_from
        self.epoch_end = epoch_end
        self.training_end = training_end
        self.stop_reason = reason
        self.latest = state
        self._find_plain(step + 1)
        self._arm()
        self.bits = 0
        self.last_before = UNREAD
        self.step = step
        batch, self.held = self.held, MISSING
        return batch, events

    def _read_clock(self) -> int:
        reading = self.reading
        self.reading = UNREAD
        if self.last_before == UNREAD:
            self.last_before = self.clock.last
        return self.clock.elapsed(self.clock.tick() if reading == UNREAD else reading)

    def _due(self, step: int, epoch_end: bool, now: int) -> int:
        """The bits of all that step counts, epochs and the time make due at `step`."""
        agenda = self.step_agenda
        while agenda[0][0] <= step:
            number = agenda[0][1]
            if number < len(self.step_triggers):
                trigger = self.step_triggers[number]
                self.bits |= trigger.bit
                heapreplace(agenda, (trigger.due_from(step + 1, 0), number))
            else:  # the window of a timer opens
                opened = number - len(self.step_triggers)
                heappush(self.time_agenda, (self.time_triggers[opened].first_due(), opened))
                heapreplace(agenda, (NEVER, number))
        agenda = self.epoch_agenda
        while agenda[0][0] <= step:
            number = agenda[0][1]
            trigger = self.epoch_triggers[number]
            self.bits |= trigger.bit
            heapreplace(agenda, (trigger.due_from(step + 1, self.draws_from), number))
        agenda = self.time_agenda
        while agenda[0][0] <= now:
            number = agenda[0][1]
            timer = self.time_triggers[number]
            if step < timer.stop:
                self.bits |= timer.bit
                heapreplace(agenda, (timer.due_after(now), number))
            else:
                heapreplace(agenda, (NEVER, number))
        if epoch_end:
            return self.bits | self.plan.on_epoch_end(self.drawing, step)
        return self.bits

    def _limit_reached(self, step: int, epoch_end: bool, now: int) -> str | None:
        if step == self.last_step:
            return "max_steps"
        if epoch_end and self.drawing + 1 >= self.plan.max_epochs:
            return "max_epochs"
        if now >= self.max_time:
            return "max_seconds"
        if self.ended and self.source.once:
            return "exhausted"
        return None

    def _state_of(self, step: int, epoch_end: bool, training_end: bool, now: int) -> LoopState:
        return LoopState(
            self.drawing, step, step - self.draws_from, epoch_end, training_end, now, self.clock
        )

    def _fulfilled(
        self,
        conditions: Iterable[tuple[int, Callable[[Any], object], int, int]],
        step: int,
        state: LoopState,
    ) -> int:
        """The bits of those conditions that hold in `state`."""
        bits = 0
        for bit, condition, start, stop in conditions:
            if start <= step < stop:
                try:
                    if condition(state):
                        bits |= bit
                except Exception as exception:
                    failure = errors.not_stop(exception)
                    self.plan.blame(failure, bit)
                    raise failure  # noqa: B904 (mostly it is the exception itself)
        return bits

    def _events(self, bits: int) -> frozenset[Hashable]:
        events = self.sets.get(bits)
        if events is None:
            if len(self.sets) >= 4096:
                self.sets = {0: QUIET}
            events = self.sets[bits] = self.plan.event_set(bits)
        return events

    def _find_plain(self, step: int) -> None:
        """Find out up to where, from `step` on, nothing but triggers can be due."""
        if self.training_end or self.epoch_end or self.ahead is not MISSING:
            self.turn.plain_until = -1
            return
        last = min(self.looks_from, self.ends_at)  # the epoch goes on at least up to there
        special = self.draws_from + last if last < NEVER else NEVER
        if step < self.conditions_until:
            special = min(special, max(step, self.conditions_from))
        self.turn.plain_until = min(special, self.last_step) - 1

    def _arm(self) -> None:
        """Find out up to where, and up to what reading of the clock, nothing can be due."""
        due = min(self.step_agenda[0][0], self.epoch_agenda[0][0]) - 1
        self.turn.quiet_until = min(due, self.turn.plain_until)
        if self.timed:
            clock = self.clock
            due = min(self.time_agenda[0][0], self.max_time)
            self.next_reading = clock.last + due - clock.elapsed(clock.last)


class _Once:
    """Hands over an iterator without asking it for itself, which `chain` would do at each step."""

    __slots__ = ("batches",)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches
