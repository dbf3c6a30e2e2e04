"""One step: counters, triggers, bitmask. The core in Python; `_core.pyx` is the same, compiled.

The core knows ints, bits and callables. It keeps the number of the last step at which nothing can
be due, `quiet_until`, and up to there a step is a batch, an increment and a pair. Every other step
goes through `_take` (get its batch) and `_hand_over` (find what is due). A list of batches goes
through `_gather` (get them) and, for its last, `_hand_over`.
"""

from __future__ import annotations

from _thread import RLock
from bisect import bisect_left, bisect_right
from functools import partial
from heapq import heappush, heapreplace
from itertools import chain, islice
from sys import maxsize
from time import perf_counter_ns
from types import FunctionType, WrapperDescriptorType
from weakref import ref

from . import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from typing import Any

    from ._core import Plan, Source
    from .errors import LoopError

    Pair = tuple[Any, frozenset[Hashable]]
    Sizes = int | tuple[int, ...]
    Agenda = list[tuple[int, int]]

NEVER = 2**63 - 1
UNREAD = -NEVER
WRITTEN_IN_C: Any = () if issubclass(FunctionType, WrapperDescriptorType) else WrapperDescriptorType
"""The type of an `__iter__` that is; PyPy tells no difference, and nothing counts as it there."""
LONGEST = 2**62 - 1
"""The training time, in nanoseconds, at which it stands still."""


class EventSet(frozenset):  # type: ignore[type-arg]
    """The events of a step on which something is due.

    Asked for a name that has none of the `places`, it calls `on_unknown(name)`.
    """

    __slots__ = ("_names", "_on_unknown", "_places", "before", "last")

    _names: frozenset[Hashable]
    _places: dict[Hashable, int] | None  # None in a set that somebody else made
    _on_unknown: Callable[[Hashable], object]
    last: int  # the latest step with these events, -1 if there was none
    before: int  # and the one before it

    def __new__(cls, names: Iterable[Hashable] = ()) -> EventSet:
        events = super().__new__(cls, names)
        events._names = frozenset(events)
        events._places = None
        events.last = events.before = -1
        return events

    def __contains__(self, name: Hashable) -> bool:
        if name in self._names:
            return True
        if self._places is not None and name not in self._places:
            self._on_unknown(name)
        return False

    def __repr__(self) -> str:
        return f"EventSet({set(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return frozenset, (list(self),)


def make_event_set(
    names: list[Hashable],
    places: dict[Hashable, int],
    first: tuple[Hashable, ...],
    on_unknown: Callable[[Hashable], object],
    bits: int,
) -> EventSet:
    """The EventSet of those `names` whose bits are given.

    All names have `places`; `first` are those at the first of them.
    """
    due = []
    while bits:
        place = bits.bit_length() - 1
        due.append(names[place])
        bits ^= 1 << place
    events = EventSet(due)
    events._places = places
    events._on_unknown = on_unknown
    return events


QUIET: frozenset[Hashable] = frozenset()
MISSING: Any = object()
NOTHING = 0
"""The bits of no event."""


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
        """The training time at `reading`."""
        elapsed = self.saved + reading - self.started
        return elapsed if elapsed < LONGEST else LONGEST


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
            limit needs time, else read when it is first looked at. Where nothing comes due for
            long, the compiled core may read the system's coarse clock, some milliseconds behind.
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

    def __reduce__(self) -> tuple[object, ...]:
        return restored_state, (*self._values()[:-1], round(self.elapsed * 1e9))

    def __repr__(self) -> str:
        values = ", ".join([f"{name}={value!r}" for name, value in zip(_FIELDS, self._values())])
        return f"LoopState({values})"


def restored_state(
    epoch: int,
    global_step: int,
    epoch_step: int,
    epoch_end: bool,
    training_end: bool,
    elapsed: int,
) -> LoopState:
    """The LoopState that was copied or pickled; its time is known."""
    clock = Clock(None, 0)
    return LoopState(epoch, global_step, epoch_step, epoch_end, training_end, elapsed, clock)


class StepTrigger:
    """Due at every `period`-th step, or at `points` where there is no period."""

    __slots__ = ("bit", "events", "origin", "period", "points", "start", "stop")

    def __init__(
        self, bit: int, period: int, points: tuple[int, ...], start: int, stop: int
    ) -> None:
        self.bit = bit
        self.period = period
        self.points = points
        self.start = start
        self.stop = stop
        self.origin = 0  # the global step that counts as 0
        self.events: frozenset[Hashable] | None = None  # of a step at which this alone is due

    def due_from(self, step: int) -> int:
        """The first global step from `step` on at which this is due."""
        count = max(step, self.start) - self.origin
        if self.period:
            rest = (count + 1) % self.period
            count += self.period - rest if rest else 0
        else:
            place = bisect_left(self.points, count)
            if place == len(self.points):
                return NEVER
            count = self.points[place]
        return NEVER if count >= self.stop - self.origin else self.origin + count

    def due_after(self, step: int) -> int:
        """The global step at which this is due again, after it was at `step`."""
        if not self.period:
            return self.due_from(step + 1)
        return NEVER if self.period >= self.stop - step else step + self.period


class TimeTrigger:
    """Due `period` after it was last due, or once at each of `points`, in nanoseconds."""

    __slots__ = ("bit", "last", "origin", "period", "points", "start", "stop")

    def __init__(
        self, bit: int, period: int, points: tuple[int, ...], origin: int, start: int, stop: int
    ) -> None:
        self.last = -1  # the training time at which it was last due
        self.bit = bit
        self.period = period
        self.points = points
        self.origin = origin
        self.start = start
        self.stop = stop

    def due(self) -> int:
        """The training time at which this is due next."""
        if self.last < 0:
            return self.origin + (self.period or self.points[0])
        if self.period:
            return self.last + self.period
        place = bisect_right(self.points, self.last - self.origin)
        return NEVER if place == len(self.points) else self.origin + self.points[place]


class Condition:
    """A function that is asked at each step from `start` up to `stop`."""

    __slots__ = ("bit", "function", "start", "stop")

    def __init__(self, bit: int, function: Callable[[Any], object], start: int, stop: int) -> None:
        self.bit = bit
        self.function = function
        self.start = start
        self.stop = stop


class Turn:
    """The right of one iterator to go on: what its quiet steps look at.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        fires_until: the last step at which triggers and the time alone can have a say.
        plain_until: the last step that can be neither an epoch's last nor, but for the time and
            triggers, the run's.
        size: the number of steps that are handed over at once.
        size_before: the same, of the iterator before.
        step_before: the latest step of that one.
    """

    __slots__ = (
        "fires_until",
        "plain_until",
        "quiet_until",
        "size",
        "size_before",
        "step_before",
    )

    def __init__(self, size_before: int = 1, step_before: int = -1) -> None:
        self.size = 1
        self.size_before = size_before
        self.step_before = step_before
        self.ask_attention()

    def ask_attention(self) -> None:
        """Let the next step be neither quiet nor plain."""
        self.quiet_until = self.fires_until = self.plain_until = -1


class Core:
    """One run: from the source's batches to pairs of a batch and its events.

    Args:
        plan: what is due when, and the limits.
        source: opens epochs and judges their ends.
        clock: keeps training time.
        epoch: the epoch to begin in.
        epoch_steps: steps of that epoch that are done.
        steps: steps that are done in all.
        epoch_end: whether that epoch is complete.
        lasts: for each timer the training time at which it was last due, or -1.
    """

    __slots__ = (
        "__weakref__",
        "ahead",
        "asked",
        "batches",
        "bits",
        "clock",
        "closed",
        "conditions",
        "conditions_from",
        "conditions_until",
        "deferred",
        "drawing",
        "draws_from",
        "ended",
        "ends_at",
        "entering",
        "epoch",
        "epoch_end",
        "epoch_start",
        "error",
        "finished",
        "fired",
        "fired_at",
        "forgotten",
        "found",
        "gathered",
        "global_triggers",
        "held",
        "last_before",
        "last_step",
        "latest",
        "lone",
        "looks_from",
        "lost",
        "making",
        "max_epochs",
        "max_time",
        "next_reading",
        "once",
        "openings",
        "owed",
        "plan",
        "reading",
        "sets",
        "settled",
        "source",
        "started",
        "step",
        "step_agenda",
        "step_triggers",
        "stop_asked",
        "stop_bit",
        "stop_bits",
        "stop_conditions",
        "stop_reason",
        "time_agenda",
        "time_triggers",
        "timed",
        "told",
        "training_end",
        "turn",
        "unowed",
        "walking",
    )

    def __init__(
        self,
        plan: Plan,
        source: Source,
        clock: Clock,
        epoch: int = 0,
        epoch_steps: int = 0,
        steps: int = 0,
        epoch_end: bool = False,
        lasts: Iterable[int] = (),
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
        self.epoch_end = epoch_end
        self.training_end = False
        self.latest: LoopState | None = None
        self.stop_reason: str | None = None
        self.error: Exception | None = None
        self.owed: Exception | None = None  # the error, as long as it is to be told and raised
        self.told = False
        self.stop_asked: str | None = None  # why, as a stop_reason
        self.stop_bits = NOTHING
        self.finished = False
        self.closed = False
        self.making: object = None  # the mark of a step in the making; it may not ask for another
        self.entering = RLock()
        self.walking: ref[Any] | None = None  # the latest `_walk`

        # The epoch that batches are drawn from, ahead of the latest step while a step is made
        self.drawing = epoch
        self.draws_from = self.epoch_start
        self.batches: Iterator[Any] | None = None
        self.looks_from = NEVER
        self.ends_at = NEVER
        self.ended = False
        self.lost = False  # whether an interrupt has ended the epoch's iterator

        # What was fetched and not handed over, in this order, and what is known of the next step
        self.held = MISSING
        self.gathered: list[Any] = []
        # of the gathered, those at whose steps nothing but time is left to ask
        self.settled = 0
        self.found: int | None = None  # the bits of conditions that held at the step after those
        self.asked: LoopState | None = None  # what conditions were given last
        self.ahead = MISSING
        self.deferred: Exception | None = None
        # what was deferred and is a condition's: it becomes no event
        self.unowed: Exception | None = None
        self.bits = NOTHING
        self.reading = UNREAD
        self.last_before = UNREAD  # the clock's last before the reading of a step not handed over

        self.timed = plan.timed
        self.once = source.once
        self.last_step = plan.max_steps - 1
        self.max_epochs = plan.max_epochs
        self.max_time = plan.max_time
        self.stop_bit = plan.stop_bit
        self.conditions = [Condition(*each) for each in plan.conditions]
        self.stop_conditions = [Condition(*each) for each in plan.stop_conditions]
        self.conditions_from = min([start for _, _, start, _ in plan.all_conditions], default=NEVER)
        self.conditions_until = max([stop for _, _, _, stop in plan.all_conditions], default=0)
        self.sets: dict[int, frozenset[Hashable]] = {NOTHING: QUIET}
        self.forgotten: dict[Hashable, int] = {}  # when names were last due in sets that are gone
        self.step_triggers = [StepTrigger(*each) for each in plan.steps]
        # how many of them, in front, do not count anew in each epoch
        self.global_triggers = len(self.step_triggers)
        self.step_triggers += [StepTrigger(*each) for each in plan.epoch_steps]
        self.time_triggers = [
            TimeTrigger(bit, period, points, clock.saved if per_launch else 0, start, stop)
            for bit, period, points, per_launch, start, stop in plan.times
        ]
        self.lone: StepTrigger | None = None  # that which put the first of the bits
        # the timers of the latest step that had any, each with the time at which it was due before
        self.fired: list[tuple[TimeTrigger, int]] = []
        self.fired_at = -1
        for timer, last in zip(self.time_triggers, lasts):
            timer.last = last
        self._schedule_from(steps, self.draws_from)
        self._schedule_timers()

    def steps(self, rider: object = None) -> Iterator[Pair]:
        """A new iterator on the run, in place of any older one; it keeps `rider` till its end."""
        turn = Turn(self.latest_size, self.step)
        walk = self._walk(turn, rider)
        self._enter(turn, ref(walk))
        return chain(walk, iter(partial(self._again, turn), MISSING))

    def lists(self, sizes: Sizes, rider: object = None) -> Iterator[Pair]:
        """A new iterator over lists of batches, in place of any older one.

        `sizes` is their greatest length, or the tuple of their lengths, from the greatest to 1.
        """
        turn = Turn(self.latest_size, self.step)
        self._enter(turn, None)
        next_list = partial(self._next_list, turn, sizes)
        next_list.rider = rider  # type: ignore[attr-defined]
        return iter(next_list, MISSING)

    def close(self) -> None:
        """Let go of the source; no iterator goes on from here."""
        self.closed = True
        self.leave()

    def leave(self) -> None:
        """Let go of the source, and let every iterator be one that was replaced."""
        self._change_turns()
        self._let_go()

    def steps_to_next_event(self, epoch_len: int) -> int | None:
        """The steps up to the next for which anything is scheduled; None if there is none.

        Epochs that were not opened yet are taken to have `epoch_len` batches.
        """
        step = self.step + 1
        if self.closed or self.stop_reason is not None:
            return None
        if self.batches is None or (self.epoch_end and self.drawing == self.epoch):
            start = step if self.epoch_end else self.draws_from
            self._schedule_from(step, start)
            epoch_end = start + epoch_len - 1
        else:
            epoch_end = self._promised_end()
        due = self._foreseen(epoch_end)
        return None if due >= NEVER - 1 else due - self.step

    def ask_stop(self, reason: str, bits: int) -> None:
        """Let the next step be the last, with the events of `bits` among its own."""
        if self.stop_asked is None or (bits and not self.stop_bits):
            self.stop_asked = reason
            self.stop_bits = bits
        self.turn.ask_attention()

    def fail(self, exception: Exception) -> None:
        """End the run with an error that is not the core's own; it is told, and then raised."""
        self._fail(exception)
        self.owed = exception

    def elapsed(self) -> int:
        """The training time now, in nanoseconds; the clock is read where it was started."""
        clock = self.clock
        return clock.elapsed(clock.tick()) if self.started else clock.saved

    @property
    def latest_size(self) -> int:
        """How many steps were handed over at once, last."""
        turn = self.turn
        return turn.size if self.step > turn.step_before else turn.size_before

    def fetched_ahead(self) -> int:
        """How many batches were fetched and not handed over."""
        return len(self.gathered) + (self.held is not MISSING) + (self.ahead is not MISSING)

    def is_out_of_time(self) -> bool:
        """Whether the latest step came when the time was up, or later."""
        return self.timed and self._handed_over_at() >= self.max_time

    def timer_lasts(self, step_done: bool) -> list[int]:
        """When each timer was last due, or -1; before the latest step, unless that is done."""
        lasts = {timer: timer.last for timer in self.time_triggers}
        if not step_done and self.fired_at == self.step:
            lasts.update(self.fired)
        return list(lasts.values())

    def last_steps(self, before: int) -> dict[Hashable, int]:
        """The latest step before `before` of each name that was due at one."""
        steps = dict(self.forgotten)
        for events in self._made_sets():
            last = events.last if events.last < before else events.before
            if last >= 0:
                for name in events:
                    steps[name] = max(last, steps.get(name, -1))
        return steps

    def _made_sets(self) -> list[EventSet]:
        lone = [trigger.events for trigger in self.step_triggers]
        return [each for each in (*lone, *self.sets.values()) if isinstance(each, EventSet)]

    @property
    def state(self) -> LoopState:
        """The LoopState of the latest step, the same object while that step lasts."""
        latest = self.latest
        step = self.step  # first: what else tells of a step is set before it, in any thread
        if latest is None or latest.global_step != step:
            now = self.clock.saved
            if self.started:
                now = self._handed_over_at() if self.timed else -1
            self.latest = latest = LoopState(
                self.epoch,
                step,
                step - self.epoch_start,
                self.epoch_end,
                self.training_end,
                now,
                self.clock,
            )
        return latest

    def _handed_over_at(self) -> int:
        """The training time of the latest step, also where the next one failed after it read."""
        before = self.last_before
        return self.clock.elapsed(self.clock.last if before == UNREAD else before)

    def _walk(self, turn: Turn, rider: object = None) -> Iterator[Pair]:
        # A pair is yielded without a name for its batch: the body's `del batch` frees it. A batch
        # comes out of `for`, where a signal cannot strike between its arrival and its name.
        batch: Any = QUIET
        timed = self.timed
        clock = self.clock
        tick = clock.tick
        reading = UNREAD
        try:
            while self.turn is turn and self.owed is None and self._take():
                yield self._next_pair()
                step = self.step
                next_reading = self.next_reading if timed else NEVER
                if step >= turn.plain_until:
                    continue
                for batch in self.batches:  # type: ignore[union-attr]
                    if timed:
                        reading = tick()
                    if step < turn.quiet_until and reading < next_reading:
                        if timed:
                            clock.last = reading
                        self.step = step = step + 1
                        yield batch, (batch := QUIET)
                    elif step < turn.fires_until and reading < next_reading:
                        self.last_before = clock.last
                        clock.last = reading
                        step += 1
                        events = self._fire(turn, step)
                        yield batch, (batch := QUIET) or events
                    else:
                        if timed:
                            self.reading = reading
                        self.held, batch = batch, QUIET
                        yield self._next_pair()
                        step = self.step
                        next_reading = self.next_reading if timed else NEVER
                    if step >= turn.plain_until:
                        break
                else:
                    self.ended = True
        except BaseException as exception:
            rider = None  # noqa: F841 (the exception keeps this frame)
            fetching = batch is QUIET and self.held is MISSING
            if batch is not QUIET:
                self.held = batch
            if not (fetching and self._owes(exception)):
                self._fail(exception)
                raise

    def _owes(self, exception: BaseException) -> bool:
        """Whether an error of the source becomes an event, and then let it end the run."""
        if not self.plan.on_exception or not isinstance(exception, Exception) or self.closed:
            return False
        if exception is self.unowed:
            return False
        self.fail(exception)
        return True

    def _tell(self) -> Pair:
        """The last step of a run that failed; then the error itself."""
        if not self.told:
            self.told = True
            return None, self._events(self.plan.on_exception | self.stop_bits)
        exception, self.owed = self.owed, None
        raise errors.not_stop(exception)  # type: ignore[arg-type]

    def _fire(self, turn: Turn, step: int) -> Any:
        """The events of a step at which triggers alone are due, which is done."""
        self._trigger(step)
        events = self._events(self.bits)
        self.bits = NOTHING
        self.last_before = UNREAD
        self.step = step
        events.before = events.last
        events.last = step
        due = self.step_agenda[0][0]
        turn.quiet_until = due - 1 if due <= turn.fires_until else turn.fires_until
        return events

    def _trigger(self, step: int) -> None:
        """Add the bits of the triggers that are due at `step`."""
        agenda = self.step_agenda
        while agenda[0][0] <= step:
            number = agenda[0][1]
            trigger = self.step_triggers[number]
            if self.bits:
                self.bits |= trigger.bit
            else:
                self.lone = trigger
                self.bits = trigger.bit
            heapreplace(agenda, (trigger.due_after(step), number))

    def _next_pair(self) -> Pair:
        """The batch in hand, and its events."""
        events = self._pass_on(0, bool(self.gathered))
        batch, self.held = self.held, MISSING
        return batch, events

    def _again(self, turn: Turn) -> Pair:
        """What an iterator gives whose `_walk` is over: mostly its end."""
        mark = object()
        try:
            self._begin(turn, mark)
            if self.owed is None:
                for pair in self._walk(turn):
                    return pair
            return self._tell() if self.owed is not None else MISSING
        finally:
            if self.making is mark:
                self.making = None

    def _next_list(self, turn: Turn, sizes: Sizes) -> Pair:
        """A list of batches and the events at its last; MISSING when the run is over."""
        mark = object()
        try:
            self._begin(turn, mark)
            if self.owed is not None:
                return self._tell()
            try:
                size = self._gather(sizes)
                if not size:
                    return self._tell() if self.owed is not None else MISSING  # type: ignore[no-any-return]
                events = self._pass_on(size - 1, size < len(self.gathered))
                turn.size = size
                batches: Any
                batches, self.gathered = self.gathered[:size], self.gathered[size:]
                # without a name for the list: an error that was met keeps this frame alive
                return batches, (batches := QUIET) or events
            except BaseException as exception:
                self._fail(exception)
                raise
        finally:
            if self.making is mark:
                self.making = None

    def _enter(self, turn: Turn, walking: ref[Any] | None) -> None:
        """Let it be the turn of another iterator, unless the one before is making a step."""
        with self.entering:
            self._refuse(self.turn)
            if self.training_end or self.finished:
                raise errors.finished()
            before = self.turn, self.walking
            # Looked at afterwards: from here on the older one ends, whatever thread resumes it
            self.turn, self.walking = turn, walking
            before[0].ask_attention()
            if self._makes_step(before[1]):
                self.turn, self.walking = before
                raise errors.in_use()

    def _change_turns(self) -> Turn:
        self.turn.ask_attention()
        self.turn = Turn(self.latest_size, self.step)
        return self.turn

    def _makes_step(self, walking: ref[Any] | None) -> bool:
        """Whether a step is being made.

        What a generator calls cannot resume it: that raises ValueError.
        """
        walk = None if walking is None else walking()
        return self.making is not None or (walk is not None and walk.gi_running)

    def _begin(self, turn: Turn, mark: object) -> None:
        """Let `mark` be the step that is made; raise where another is, or `turn` gives no right."""
        with self.entering:
            self._refuse(turn)
            if self.making is not None:
                raise errors.in_use()
            self.making = mark

    def _refuse(self, turn: Turn) -> None:
        """Raise where `turn` gives no right to go on."""
        if self.closed:
            raise errors.closed()
        if self.turn is not turn:
            raise errors.replaced()
        if self.error is not None and self.owed is None:
            raise errors.failed(self.error)

    def _fail(self, exception: BaseException) -> None:
        """Let `exception` end the run, unless it only interrupts it."""
        if isinstance(exception, Exception):
            self.error = exception
            self.stop_reason = "exception"
            self._let_go()
            self.source.forget()
        else:
            self._take_back(exception)

    def _take_back(self, exception: BaseException) -> None:
        """Let what an interrupted step has taken from the agendas be there again."""
        self.turn.ask_attention()
        if self.fired_at > self.step:
            for timer, last in self.fired:
                timer.last = last
            self.fired = []
        self.bits = NOTHING
        self._schedule_from(self.step + 1, self.draws_from)
        self._schedule_timers()
        if self.batches is not None and not self.ended and self.deferred is None:
            self.lost |= self.source.is_lost(exception, self.drawing, self._taken())
            if self.looks_from < NEVER and self.source.promise is None:
                self.looks_from = -1

    def _taken(self) -> int:
        """How many batches of the epoch that is drawn from were fetched."""
        return self.step + 1 - self.draws_from + self.fetched_ahead()

    def _let_go(self) -> None:
        self.turn.ask_attention()
        self.batches = None
        self.held = self.ahead = MISSING
        self.gathered = []
        self.settled = 0
        self.found = None

    def _take(self) -> bool:
        """Have the next step's batch in hand: kept, looked at before, or fetched.

        Returns False when the run is over.
        """
        if self.lost:
            self._open_epoch()
        if self.held is not MISSING:
            return True
        if self.step < self.turn.plain_until and not self.ended:
            for self.held in self.batches:  # type: ignore[union-attr]  # noqa: B020
                return True
            self.ended = True
        if self.training_end or self.finished:
            self._finish()
            return False
        if self.gathered:
            self.held = self.gathered[0]
            del self.gathered[0]
            return True
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
            if self.batches is None:
                raise self._left()
            if not self.ended:
                for self.held in self.batches:  # noqa: B020
                    return True
            taken = self.step + 1 - self.draws_from
            if not self.source.goes_on_after(self.drawing, taken, self.step):
                self.stop_reason = "exhausted"
                self._finish()
                return False
            self._leave_epoch()

    def _take_or_owe(self) -> bool:
        """`_take`, or owe an error that it met and that becomes an event."""
        try:
            return self._take()
        except Exception as exception:
            if not self._owes(exception):
                raise
            return False

    def _gather(self, sizes: Sizes) -> int:
        """Gather the batches of a list: nothing but time can be due before the step of its last.

        Returns how many they are; 0 when the run is over.
        """
        if self.lost or self.training_end or self.held is not MISSING or not self.gathered:
            if not self._take_or_owe():
                return 0
            self.gathered, self.held = [self.held, *self.gathered], MISSING
        most = self._foreseen(self._promised_end()) - self.step
        size = 1 if self.stop_asked is not None else fitting(sizes, most)
        free = min(size - 1, self._free_until() - (self.step + 1))
        while True:
            if self.batches is None:
                raise self._left()
            self.settled = max(self.settled, min(free, len(self.gathered)))
            if self.settled >= size - 1 and len(self.gathered) >= size:
                break
            if self.settled < len(self.gathered):
                if self._closes():
                    break
                self.settled += 1
            elif not self._fetch(max(free, self.settled + 1)):
                break
        self.turn.ask_attention()
        if self.stop_asked is not None:
            return 1
        return fitting(sizes, min(size, len(self.gathered)))

    def _closes(self) -> bool:
        """Whether the list has to end with the first batch whose step is not settled."""
        step = self.step + 1 + self.settled
        if self.found is not None:
            return True
        self._look_ahead(step)
        if self.ended:
            return True
        if self.conditions_from <= step < self.conditions_until:
            try:
                found = self._ask(step, False, False, NOTHING, -1)
            except Exception as exception:
                if not self.settled:
                    raise
                self.deferred = self.unowed = exception
                del self.gathered[self.settled :]
                return True
            if found:
                self.found = found
                return True
        return False

    def _fetch(self, count: int) -> bool:
        """Gather up to `count` batches in all; False where the source gives no more."""
        there = len(self.gathered)
        if self.ahead is not MISSING:
            self.gathered[there:] = (self.ahead,)
            self.ahead = MISSING
            return True
        if self.deferred is None and not self.ended:
            wanted = min(count - there, maxsize)
            try:
                self.gathered.extend(islice(self.batches, wanted))  # type: ignore[arg-type]
                if len(self.gathered) >= count:
                    return True
                self.ended = True
            except Exception as exception:
                self.deferred = exception
        self.settled = len(self.gathered)
        return False

    def _open_epoch(self) -> None:
        batches, self.looks_from, self.ends_at = self.source.open_epoch(self.drawing, self._taken())
        if self.global_triggers < len(self.step_triggers):
            self._schedule_from(self.step + 1, self.draws_from)
        written_in_c = isinstance(getattr(type(batches), "__iter__", None), WRITTEN_IN_C)
        self.batches = batches if written_in_c else chain(_Once(batches))
        self.lost = False

    def _schedule_from(self, step: int, epoch_start: int) -> None:
        agenda = make_agenda()
        for number, trigger in enumerate(self.step_triggers):
            if number >= self.global_triggers:
                trigger.origin = epoch_start
            heappush(agenda, (trigger.due_from(step), number))
        self.step_agenda = agenda

    def _schedule_timers(self) -> None:
        self.time_agenda = make_agenda()
        self.openings = make_agenda()  # of timers that wait for their first step
        for number, timer in enumerate(self.time_triggers):
            if timer.start <= self.step + 1:
                heappush(self.time_agenda, (timer.due(), number))
            else:
                heappush(self.openings, (timer.start, number))
        self.next_reading = UNREAD

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
            self.gathered = []
            self.source.finish(self.epoch, self.stop_reason)

    def _look_ahead(self, step: int) -> None:
        """Fetch the batch after that of `step`, or learn that there is none, where that is due."""
        if (
            step - self.draws_from < self.looks_from
            or self.ended
            or self.deferred is not None
            or self.ahead is not MISSING
        ):
            return
        try:
            for self.ahead in self.batches:  # type: ignore[union-attr]  # noqa: B020
                return
            self.ended = True
        except Exception as exception:
            self.deferred = exception

    def _pass_on(self, passed: int, some_left: bool) -> Any:
        """Hand over, and arm; a signal that strikes in between leaves all as it was."""
        before = (
            self.step,
            self.epoch,
            self.epoch_start,
            self.epoch_end,
            self.training_end,
            self.stop_reason,
            self.latest,
            self.settled,
            self.found,
        )
        try:
            events = self._hand_over(passed)
            self._arm(some_left)
        except BaseException:
            (
                self.step,
                self.epoch,
                self.epoch_start,
                self.epoch_end,
                self.training_end,
                self.stop_reason,
                self.latest,
                self.settled,
                self.found,
            ) = before
            raise
        return events

    def _hand_over(self, passed: int) -> Any:
        """Find what is due at the step after `passed` others, and let these steps be done."""
        step = self.step + 1 + passed
        settled = self.settled > passed
        plain = step <= self.turn.plain_until
        if not plain and not settled:
            self._look_ahead(step)
        now = self._read_clock() if self.timed else -1
        self._trigger(step)
        if self.timed and (self.clock.last >= self.next_reading or step >= self.openings[0][0]):
            self._look_at_timers(step, now)
        bits = self.bits
        if not plain or now >= self.max_time or bits & self.stop_bit:
            events = self._judge(step, bits, now, settled)
        elif self.conditions_from <= step < self.conditions_until:
            bits |= self._ask(step, False, False, NOTHING, now)
            events = self._events(bits)
            self.latest = self.asked
        else:
            events = self._events(bits)
        if self.batches is None:
            raise self._left()
        self.bits = NOTHING
        self.last_before = UNREAD
        self.step = step
        if events is not QUIET and events.last != step:
            events.before = events.last
            events.last = step
        return events

    def _judge(self, step: int, bits: int, now: int, settled: bool) -> Any:
        """The events of a step that may be the last of its epoch, or of the run."""
        epoch_end = not settled and (self.ended or step - self.draws_from == self.ends_at)
        state = None
        if epoch_end:
            bits |= self.plan.on_epoch_end(self.drawing, step)
        reason = self._limit_reached(step, epoch_end, now)
        if self.found is not None and not settled:
            bits |= self.found
        elif self.conditions_from <= step < self.conditions_until and not settled:
            stops = bits & self.stop_bit
            bits |= self._ask(step, epoch_end, reason is not None, stops, now)
            state = self.asked
        if bits & self.stop_bit:
            bits ^= self.stop_bit
            reason = self.stop_asked or "stop_when"
        if self.stop_asked is not None:
            bits |= self.stop_bits
        training_end = reason is not None
        if training_end:
            bits |= self.plan.on_training_end
        if not settled and step - self.draws_from == self.looks_from and self.ahead is not MISSING:
            self.source.goes_past_promise(self.drawing)
        if reason == "exhausted":
            self.source.ran_dry(step)
        events = self._events(bits)
        if self.batches is None:
            raise self._left()
        self.turn.ask_attention()
        self.epoch = self.drawing
        self.epoch_start = self.draws_from
        self.epoch_end = epoch_end
        self.training_end = training_end
        self.stop_reason = reason
        self.latest = state
        if settled:
            self.settled -= step - self.step
        else:
            self.settled = 0
            self.found = None
        return events

    def _left(self) -> LoopError:
        """The error where the user's code has closed or restarted the loop in a step."""
        self._let_go()
        return errors.closed() if self.closed else errors.replaced()

    def _read_clock(self) -> int:
        """The training time of a step that is not quiet."""
        clock = self.clock
        if self.reading == UNREAD:
            self.reading = clock.tick()
        if self.last_before == UNREAD:
            self.last_before = clock.last
        clock.last = self.reading
        self.reading = UNREAD
        return clock.elapsed(clock.last)

    def _look_at_timers(self, step: int, now: int) -> None:
        """Add the bits of those that are due, and find out up to what reading none is."""
        agenda = self.time_agenda
        while self.openings[0][0] <= step:
            number = self.openings[0][1]
            timer = self.time_triggers[number]
            heappush(agenda, (timer.due(), number))
            heapreplace(self.openings, (NEVER, number))
        while agenda[0][0] <= now:
            number = agenda[0][1]
            timer = self.time_triggers[number]
            if step < timer.stop:
                self.bits |= timer.bit
                if self.fired_at != step:
                    self.fired_at = step
                    self.fired = []
                self.fired.append((timer, timer.last))
                timer.last = now
                heapreplace(agenda, (timer.due(), number))
            else:
                heapreplace(agenda, (NEVER, number))
        due = min(agenda[0][0], self.max_time)
        self.next_reading = self.clock.started + due - self.clock.saved

    def _limit_reached(self, step: int, epoch_end: bool, now: int) -> str | None:
        if self.stop_asked is not None:
            return self.stop_asked
        if step == self.last_step:
            return "max_steps"
        if epoch_end and self.drawing + 1 >= self.max_epochs:
            return "max_epochs"
        if now >= self.max_time:
            return "max_seconds"
        if epoch_end and self.ended and self.once:
            return "exhausted"
        return None

    def _ask(self, step: int, epoch_end: bool, limit_reached: bool, stops: int, now: int) -> int:
        """The bits of those conditions that hold at `step`; leaves the LoopState in `asked`."""
        state = LoopState(
            self.drawing, step, step - self.draws_from, epoch_end, limit_reached, now, self.clock
        )
        found = NOTHING
        if self.stop_bit:
            found = self._fulfilled(self.stop_conditions, state)
            if (stops or found) and not limit_reached:
                state = state.at_training_end()
        self.asked = state
        return found | self._fulfilled(self.conditions, state)

    def _fulfilled(self, conditions: list[Condition], state: LoopState) -> int:
        """The bits of those conditions that hold in `state`."""
        bits = bit = NOTHING
        try:
            for condition in conditions:
                bit = condition.bit
                asked = condition.start <= state._global_step < condition.stop
                if asked and condition.function(state):
                    bits |= bit
        except Exception as exception:
            failure = errors.not_stop(exception)
            self.plan.blame(failure, bit)
            raise failure  # noqa: B904 (mostly it is the exception itself)
        return bits

    def _events(self, bits: int) -> Any:
        lone = self.lone
        if lone is not None and bits is lone.bit:
            if lone.events is None:
                lone.events = self.plan.event_set(bits)
            return lone.events
        events = self.sets.get(bits)
        if events is None:
            if len(self.sets) >= 4096:
                self.forgotten = self.last_steps(NEVER)
                self.sets = {NOTHING: QUIET}
            events = self.sets[bits] = self.plan.event_set(bits)
        return events

    def _promised_end(self) -> int:
        """The epoch's last step as far as a length is promised; else one that is gone, or NEVER."""
        last = min(self.looks_from, self.ends_at)
        return self.draws_from + last if last < NEVER else NEVER

    def _foreseen(self, epoch_end: int) -> int:
        """The next step for which anything is scheduled."""
        due = min(self.step_agenda[0][0], self.last_step)
        return min(due, epoch_end) if epoch_end > self.step else due

    def _free_until(self) -> int:
        """The next step, or a later one, at which conditions or a look ahead decide."""
        step = self.step + 1
        looks = self._promised_end()
        if step < self.conditions_until:
            looks = min(looks, max(step, self.conditions_from))
        return max(step, looks)

    def _plain_until(self) -> int:
        """The last of the steps from the next one on that are plain, or -1."""
        step = self.step + 1
        special = self._promised_end()
        if (
            self.training_end
            or self.stop_asked is not None
            or self.epoch_end
            or self.ended
            or self.ahead is not MISSING
            or self.deferred is not None
        ):
            return -1
        if self.stop_conditions and step < self.conditions_until:
            special = min(special, max(step, self.conditions_from))
        return min(special, self.last_step) - 1

    def _arm(self, some_left: bool) -> None:
        """Find out up to where nothing can be due, but by the time.

        That is nowhere where `some_left` of what was gathered goes before what is to be fetched.
        """
        turn = self.turn
        step = self.step + 1
        if step > turn.plain_until:
            turn.plain_until = -1 if some_left else self._plain_until()
        last = min(turn.plain_until, self.openings[0][0] - 1)
        if step < self.conditions_until:
            last = min(last, max(step, self.conditions_from) - 1)
        turn.fires_until = -1 if self.stop_bit else last
        turn.quiet_until = min(last, self.step_agenda[0][0] - 1)
        if self.stop_asked is not None:  # it may be a signal that came just now
            turn.ask_attention()


def fitting(sizes: Sizes, most: int) -> int:
    """The greatest of `sizes`, or of all up to it where it is one number, that is within `most`."""
    if isinstance(sizes, int):
        return min(most, sizes)
    for size in sizes[:-1]:
        if size <= most:
            return size
    return 1


class _Once:
    """Hands over an iterator, for `chain`, without asking it for itself.

    A `for` asks, and a core goes over the same iterator with many: those would be seen by an
    `__iter__` that is written in Python. This one is not, lest a signal strike in it.
    """

    __slots__ = ("__iter__",)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.__iter__ = [batches].pop
