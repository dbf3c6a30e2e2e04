"""The steps between decisions, in Python; `_core.pyx` is the same, compiled.

In most steps only step triggers, the clock and conditions can have a say. The stepper makes these
on its own, up to the step that `Token.until` names; every other step is a decision of `run.py`. Up
to `Token.quiet_until` nothing is due: such a step is a fetch, an increment and a pair.

The core knows ints, bits and callables. Each event has a place, and its bit is `1 << place`.
"""

from __future__ import annotations

from _thread import RLock
from bisect import bisect_left
from functools import partial
from heapq import heapify, heapreplace
from itertools import chain, islice
from time import perf_counter_ns
from weakref import ref

from . import errors
from .missing import MISSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from typing import Any

    from ._core import ConditionRow, Run, Sizes, StepRow

    Pair = tuple[Any, frozenset[Hashable]]

NEVER = 2**63 - 1
LONGEST = 2**62 - 1
"""The training time, in nanoseconds, at which it stands still."""
MOST_SETS = 4096
"""How many event sets are kept ready."""


class EventSet(frozenset):  # type: ignore[type-arg]
    """The events of a step at which something is due.

    Asked for a name that the loop does not know, it calls `on_unknown(name)`.
    """

    __slots__ = ("_known", "_names", "_on_unknown", "due")

    _names: frozenset[Hashable]
    _known: dict[Hashable, int] | None  # None in a set that somebody else made
    _on_unknown: Callable[[Hashable], object]
    due: list[int]  # the places of its names

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

    def __repr__(self) -> str:
        return f"EventSet({set(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return frozenset, (list(self),)


QUIET: frozenset[Hashable] = frozenset()


class EventSets:
    """The event sets of a run, each made when it is first needed, and when names were last due.

    Args:
        names: the names of all events, by place.
        places: the place of each name.
        on_unknown: called with a name that a set is asked for and that is none of these.
    """

    __slots__ = ("_before", "_latest", "_names", "_on_unknown", "_places", "_sets")

    def __init__(
        self,
        names: list[Hashable],
        places: dict[Hashable, int],
        on_unknown: Callable[[Hashable], object],
    ) -> None:
        self._names = names
        self._places = places
        self._on_unknown = on_unknown
        self._sets: dict[int, frozenset[Hashable]] = {0: QUIET}
        # By place, the latest step at which the name was due, -1 if there is none
        self._latest = [-1] * len(names)
        self._before = [-1] * len(names)  # and the one before that

    def of(self, bits: int) -> Any:
        """The set of the names whose bits are given."""
        events = self._sets.get(bits)
        if events is None:
            if len(self._sets) >= MOST_SETS:
                self._sets = {0: QUIET}
            due = []
            rest = bits
            while rest:
                due.append(rest.bit_length() - 1)
                rest ^= 1 << due[-1]
            events = self._sets[bits] = self.make(due)
        return events

    def make(self, due: list[int]) -> EventSet:
        """A new set of the names at these places."""
        events = EventSet([self._names[place] for place in due])
        events.due = due
        events._known = self._places
        events._on_unknown = self._on_unknown
        return events

    def mark(self, events: Any, step: int) -> None:
        """Note that `step` has these events, of which there are some."""
        for place in events.due:
            self.mark_place(place, step)

    def mark_place(self, place: int, step: int) -> None:
        """Note that the event at `place` is due at `step`."""
        latest = self._latest
        if latest[place] != step:
            self._before[place] = latest[place]
            latest[place] = step

    def last_step(self, name: Hashable, end: int) -> int:
        """The latest step before `end` at which the name was due; -1 if there is none.

        `end` is the latest step that was handed over, or the one after it.
        """
        place = self._places[name]
        latest = self._latest[place]
        return latest if latest < end else self._before[place]

    def last_steps(self, end: int) -> dict[Hashable, int]:
        """The same, by name, of all names that were due before `end`."""
        steps = {name: self.last_step(name, end) for name in self._names}
        return {name: step for name, step in steps.items() if step >= 0}


class Clock:
    """Training time in nanoseconds: monotonic, from `start`, on top of what was `saved`."""

    __slots__ = ("last", "launched", "paused", "saved", "started", "tick", "ticking")

    def __init__(self, tick: Callable[[], int] | None, saved: int) -> None:
        self.tick: Callable[[], int] = perf_counter_ns if tick is None else tick
        self.saved = saved
        self.ticking = False  # whether it was started
        self.launched = 0  # the reading at which it was
        self.started = 0  # the same, later by all that it was paused
        self.paused: int | None = None  # the reading at which it was stopped
        self.last = 0  # the reading of the latest step, where steps need one

    def start(self) -> None:
        """Begin to count."""
        self.launched = self.started = self.last = self.tick()
        self.ticking = True

    def pause(self) -> None:
        """Let training time stand still."""
        self.paused = self.tick()

    def go_on(self) -> None:
        """Let training time go on."""
        if self.paused is not None:
            pause = self.tick() - self.paused
            self.started += pause
            self.last += pause
            self.paused = None

    def elapsed(self, reading: int) -> int:
        """The training time at `reading`."""
        elapsed = self.saved + reading - self.started
        return elapsed if elapsed < LONGEST else LONGEST

    def now(self) -> int:
        """The training time now."""
        if not self.ticking:
            return self.saved
        return self.elapsed(self.tick() if self.paused is None else self.paused)

    def reading_at(self, elapsed: int) -> int:
        """The reading at which that much training time has passed."""
        return NEVER if elapsed == NEVER else elapsed - self.saved + self.started


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
            self._elapsed = self._clock.now()
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
        from .state import loop_state  # not of this core: it is loaded as that of the running one

        return loop_state, (*self._values()[:-1], round(self.elapsed * 1e9))

    def __repr__(self) -> str:
        values = ", ".join([f"{name}={value!r}" for name, value in zip(_FIELDS, self._values())])
        return f"LoopState({values})"


class StepTrigger:
    """Due at every `period`-th step from `first` on, or at `points` where there is no period."""

    __slots__ = (
        "events",
        "first",
        "origin",
        "period",
        "place",
        "points",
        "start",
        "stop",
        "takes_decision",
    )

    def __init__(
        self, place: int, period: int, first: int, points: tuple[int, ...], start: int, stop: int
    ) -> None:
        self.place = place
        self.period = period
        self.first = first
        self.points = points
        self.start = start
        self.stop = stop
        self.origin = 0  # the global step that counts as 0
        self.takes_decision = False  # whether a step at which it is due does
        self.events: EventSet | None = None  # of a step at which this alone is due

    def due_from(self, step: int) -> int:
        """The first global step from `step` on at which this is due."""
        count = max(step, self.start) - self.origin
        if self.period and count <= self.first:
            count = self.first
        elif self.period:
            rest = (count - self.first) % self.period
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


class Triggers:
    """What counts steps: which triggers are due at a step, and the next step at which any is.

    Args:
        rows: those that count global steps.
        launch_rows: those that count from this launch.
        epoch_rows: those that count anew in each epoch.
        decision_bits: the bits of events whose steps take a decision.
        launch: the first step of this launch.
        step: the first step.
        epoch_start: the first step of its epoch.
    """

    __slots__ = ("_agenda", "_in_epochs", "_triggers")

    def __init__(
        self,
        rows: list[StepRow],
        launch_rows: list[StepRow],
        epoch_rows: list[StepRow],
        decision_bits: int,
        launch: int,
        step: int,
        epoch_start: int,
    ) -> None:
        # The number of the first that counts anew in each epoch
        self._in_epochs = len(rows) + len(launch_rows)
        self._triggers = [StepTrigger(*row) for row in (*rows, *launch_rows, *epoch_rows)]
        for trigger in self._triggers:
            trigger.takes_decision = bool(decision_bits >> trigger.place & 1)
        for trigger in self._triggers[len(rows) :]:
            trigger.origin = launch
        self._agenda: list[tuple[int, int]]  # when each is due and its number, as a heap
        self.schedule(step, epoch_start)

    def schedule(self, step: int, epoch_start: int) -> None:
        """Begin at `step`, in an epoch whose first step is `epoch_start`."""
        agenda = [(NEVER, -1)]
        for number, trigger in enumerate(self._triggers):
            if number >= self._in_epochs:
                trigger.origin = epoch_start
            agenda.append((trigger.due_from(step), number))
        heapify(agenda)
        self._agenda = agenda

    def next_epoch(self, step: int, epoch_start: int) -> None:
        """The same, where all that does not count in epochs goes on."""
        if self._in_epochs < len(self._triggers):
            self.schedule(step, epoch_start)

    def next_due(self) -> int:
        """The next step at which any is due."""
        return self._agenda[0][0]

    def only_due_at(self, step: int) -> StepTrigger | None:
        """The only one that is due at `step`, before which none is; None if there are more."""
        agenda = self._agenda
        if agenda[1][0] <= step or (len(agenda) > 2 and agenda[2][0] <= step):
            return None
        return self._triggers[agenda[0][1]]

    def bits_at(self, step: int) -> int:
        """The bits of those that are due at `step`, before which none is."""
        agenda = self._agenda
        if agenda[0][0] > step:
            return 0
        bits = 0
        entries = [0]
        for entry in entries:
            if entry < len(agenda) and agenda[entry][0] <= step:
                bits |= 1 << self._triggers[agenda[entry][1]].place
                entries += (2 * entry + 1, 2 * entry + 2)
        return bits

    def advance(self, step: int) -> None:
        """Let `step` be done. Where that is interrupted, `schedule` makes up for it."""
        agenda = self._agenda
        while agenda[0][0] <= step:
            number = agenda[0][1]
            heapreplace(agenda, (self._triggers[number].due_after(step), number))


class Condition:
    """A function that is asked at each step from `start` up to `stop`."""

    __slots__ = ("function", "place", "start", "stop")

    def __init__(
        self, place: int, function: Callable[[Any], object], start: int, stop: int
    ) -> None:
        self.place = place
        self.function = function
        self.start = start
        self.stop = stop


class Conditions:
    """The condition functions of a run, those of `stop_when` first.

    Args:
        rows: those of events.
        stop_rows: those of `stop_when`.
        blame: called with what a function raised and its place, before that is raised on.
    """

    __slots__ = ("_blame", "_events", "_stops", "start", "stop")

    def __init__(
        self,
        rows: list[ConditionRow],
        stop_rows: list[ConditionRow],
        blame: Callable[[Exception, int], None],
    ) -> None:
        self._events = [Condition(*row) for row in rows]
        self._stops = [Condition(*row) for row in stop_rows]
        self._blame = blame
        self.start = min([row[2] for row in (*rows, *stop_rows)], default=NEVER)
        self.stop = max([row[3] for row in (*rows, *stop_rows)], default=0)

    def ask(self, state: LoopState, stops: bool) -> tuple[int, LoopState]:
        """The bits of those that hold, and the state that those of events were given.

        `stops` says that `stop_when` ends the run at this step, whatever its functions say.
        """
        bits = self._holding(self._stops, state) if self._stops else 0
        if (bits or stops) and not state._training_end:
            state = state.at_training_end()
        return bits | self._holding(self._events, state), state

    def _holding(self, conditions: list[Condition], state: LoopState) -> int:
        bits = place = 0
        step = state._global_step
        try:
            for condition in conditions:
                place = condition.place
                if condition.start <= step < condition.stop and condition.function(state):
                    bits |= 1 << place
        except Exception as exception:
            failure = errors.not_stop(exception)
            self._blame(failure, place)
            raise failure  # noqa: B904 (mostly it is the exception itself)
        return bits


class Lookahead:
    """Fetches one batch ahead. It ends before the last batch, which it then holds.

    Each `iter` goes on where the one before was left, by an exception too.

    Attributes:
        held: the batch that was fetched ahead, or MISSING.
    """

    __slots__ = ("_batches", "held")

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.held: Any = MISSING

    def __iter__(self) -> Iterator[Any]:
        if self.held is MISSING:
            for self.held in self._batches:  # noqa: B020
                break
            else:
                return
        batch = self.held
        for self.held in self._batches:  # noqa: B020
            # without a name for the batch: the body's `del batch` frees it
            yield (batch, batch := QUIET)[0]
            batch = self.held


def fitting(sizes: Sizes, most: int) -> int:
    """The greatest of `sizes` (descending, the last is 1) that is within `most`.

    Where `sizes` is one number, all lengths up to it are allowed.
    """
    if isinstance(sizes, int):
        return min(most, sizes)
    for size in sizes[:-1]:
        if size <= most:
            return size
    return 1


class Token:
    """Says which iterator is the current one, and how far it goes without a decision.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        until: the last step before the next decision.
        over: whether the iterator has come to its end, where it stays.
    """

    __slots__ = ("over", "quiet_until", "until")

    def __init__(self) -> None:
        self.over = False
        self.set_back()

    def set_back(self) -> None:
        """Let the next step be a decision."""
        self.quiet_until = self.until = -1


class Stepper:
    """Makes the steps between decisions.

    Args:
        triggers: what counts steps.
        conditions: what is asked at each step.
        sets: the event sets.
        clock: keeps training time.
        timed: whether each step has to read the clock.
        decision_bits: the bits of events whose steps take a decision.
        state: where the run begins.

    Attributes:
        step: the latest step that was handed over.
        size: how many steps were handed over with it.
        state: the LoopState of that step, or of an earlier one.
        epoch: the epoch of the next step.
        epoch_start: the first step of that epoch.
        epoch_end: the latest step that was the last of an epoch, of those handed over here.
        training_end: the last step of the run, once it was handed over.
        batches: the iterator to fetch from; an empty one after it has ended.
        queue: the batches that were fetched and not handed over.
        reading: what the clock said for the step that is being made, or None.
        answers: the bits of the conditions that hold at that step, and the state that they were
            given, if that is its final one; None as long as they were not asked.
        next_reading: the reading at which the time is due to be looked at.
    """

    __slots__ = (
        "_generator",
        "_lock",
        "_making",
        "answers",
        "batches",
        "clock",
        "conditions",
        "decision_bits",
        "epoch",
        "epoch_end",
        "epoch_start",
        "next_reading",
        "queue",
        "reading",
        "sets",
        "size",
        "state",
        "step",
        "timed",
        "token",
        "training_end",
        "triggers",
    )

    def __init__(
        self,
        triggers: Triggers,
        conditions: Conditions,
        sets: EventSets,
        clock: Clock,
        timed: bool,
        decision_bits: int,
        state: LoopState,
    ) -> None:
        self.triggers = triggers
        self.conditions = conditions
        self.sets = sets
        self.clock = clock
        self.timed = timed
        self.decision_bits = decision_bits
        self.state = state
        self.step = state.global_step
        self.size = 0
        self.epoch = state.epoch + state.epoch_end
        self.epoch_start = state.global_step + 1
        if not state.epoch_end:
            self.epoch_start -= state.epoch_step + 1
        self.epoch_end = self.training_end = -1
        self.token = Token()
        self._lock = RLock()
        self._generator: ref[Any] | None = None  # the one that began to make steps last
        self._making: object = None  # the mark of a list that is being made
        self.batches: Iterator[Any] = iter(())
        self.queue: list[Any] = []
        self.reading: int | None = None
        self.answers: tuple[int, LoopState | None] | None = None
        self.next_reading = NEVER

    def state_at(self, step: int, epoch_end: bool, training_end: bool, elapsed: int) -> LoopState:
        """The LoopState of a step of the epoch, at so many nanoseconds of training time."""
        epoch_step = step - self.epoch_start
        return LoopState(self.epoch, step, epoch_step, epoch_end, training_end, elapsed, self.clock)

    def latest_state(self) -> LoopState:
        """The LoopState of the latest step, the same object while that step lasts."""
        step = self.step
        if self.state._global_step != step:
            elapsed = self.elapsed_at(self.clock.last)
            self.state = self.state_at(
                step, step == self.epoch_end, step == self.training_end, elapsed
            )
        return self.state

    def elapsed_at(self, reading: int) -> int:
        """The training time of a step; -1 where steps do not read the clock."""
        return self.clock.elapsed(reading) if self.timed else -1

    def steps(self, run: Run, keep_alive: object) -> Iterator[Pair]:
        """A new iterator, in place of the current one. It keeps an object alive till its end."""
        token = self._enter()
        next_pair = partial(self._next_pair, run, token)
        next_pair.keep_alive = keep_alive  # type: ignore[attr-defined]
        return chain(self._new_generator(run, token), iter(next_pair, MISSING))

    def lists(self, run: Run, sizes: Sizes, keep_alive: object) -> Iterator[Pair]:
        """A new iterator over lists of batches."""
        next_list = partial(self._next_list, run, sizes, self._enter())
        # no argument: the frame of an error would keep it
        next_list.keep_alive = keep_alive  # type: ignore[attr-defined]
        return iter(next_list, MISSING)

    def _enter(self) -> Token:
        with self._lock:
            self._refuse_while_busy()
            self.token.set_back()
            self.token = Token()
            return self.token

    def _refuse_while_busy(self) -> None:
        """Raise where a step is being made: here, or in the generator that was started last."""
        generator = None if self._generator is None else self._generator()
        if self._making is not None or (generator is not None and generator.gi_running):
            raise errors.in_use()

    def _new_generator(self, run: Run, token: Token) -> Iterator[Pair]:
        """A generator that makes steps, and has a reference to itself."""
        own: list[ref[Any]] = []
        generator = self._make_steps(run, token, own)
        own.append(ref(generator))
        return generator

    def _next_pair(self, run: Run, token: Token) -> Pair:
        """The next pair, where an exception has ended the generator; MISSING at the end."""
        while not token.over:
            for pair in self._new_generator(run, token):
                return pair
        return MISSING  # type: ignore[no-any-return]

    def _make_steps(self, run: Run, token: Token, own: list[ref[Any]]) -> Iterator[Pair]:
        with self._lock:
            self._refuse_while_busy()
            self._generator = own[0]
        # A pair is yielded without a name for its batch: the body's `del batch` frees it. A batch
        # comes out of `for`, where a signal cannot strike between its arrival and its name.
        batch: Any = QUIET
        clock = self.clock
        timed = self.timed
        tick = clock.tick
        reading = -NEVER
        while in_hand := run.fetch(token):
            if in_hand > 0:
                yield run.hand_over(token, None, 1)
            step = self.step
            next_reading = self.next_reading
            if step >= token.until:
                continue
            try:
                for batch in self.batches:
                    if timed:
                        reading = tick()
                    if step < token.quiet_until and reading < next_reading:
                        if timed:
                            clock.last = reading
                        self.step = step = step + 1
                        yield batch, (batch := QUIET)
                    else:
                        events = self._fire(token, step + 1, 1, reading)
                        if events is None:
                            self.queue, batch = [batch], QUIET
                            if timed:
                                self.reading = reading
                            break
                        step += 1
                        yield batch, (batch := QUIET) or events
                    if step >= token.until:
                        break
                else:
                    self.batches = iter(())
            except BaseException as exception:
                if batch is not QUIET:
                    self.queue, batch = [batch], QUIET
                    run.fail_step(token, exception)
                    raise
                if not run.goes_on_after_fetch(token, exception):
                    raise
        token.over = True

    def _next_list(self, run: Run, sizes: Sizes, token: Token) -> Pair:
        """The next list and the events at its last step; MISSING at the end."""
        mark = object()
        try:
            run.check(token)
            with self._lock:
                self._refuse_while_busy()
                self._making = mark
            while True:  # once more where an epoch was opened
                pair = self._list_before_decision(run, sizes, token)
                if pair is not None:
                    return pair
                in_hand = run.gather(token, sizes)
                if not in_hand:
                    return MISSING  # type: ignore[no-any-return]
                if in_hand > 0:
                    return run.hand_over(token, sizes, in_hand)
        finally:
            if self._making is mark:
                self._making = None

    def _list_before_decision(self, run: Run, sizes: Sizes, token: Token) -> Pair | None:
        """A list whose steps take no decision. None where one does: what was fetched is queued."""
        conditions = self.conditions
        step = self.step
        last = step + (sizes if isinstance(sizes, int) else sizes[0])
        last = min(last, self.triggers.next_due())
        if last > token.until or (conditions.start <= last and step < conditions.stop):
            return None
        size = fitting(sizes, last - step)
        step += size
        reading = -NEVER
        events: Any = None
        batches: list[Any] = []
        try:
            batches.extend(islice(self.batches, size))
            if len(batches) < size:
                self.batches = iter(())
            else:
                if self.timed:
                    reading = self.clock.tick()
                if reading < self.next_reading and step <= token.quiet_until:
                    if self.timed:
                        self.clock.last = reading
                    self.step = step
                    self.size = size
                    return batches, QUIET
                events = self._fire(token, step, size, reading)
        except BaseException as exception:
            self.queue, token.until, token.quiet_until = batches, -1, -1
            if len(batches) == size:
                run.fail_step(token, exception)
                raise
            if not run.goes_on_after_fetch(token, exception):
                raise
            return None
        if events is not None:
            return batches, events
        self.queue, token.until, token.quiet_until = batches, -1, -1
        if self.timed and len(batches) == size:
            self.reading = reading
        return None

    def _fire(self, token: Token, step: int, size: int, reading: int) -> Any:
        """Make a step at which step triggers and conditions alone have a say; return its events.

        None where it takes a decision, and nothing is done.
        """
        conditions = self.conditions
        triggers = self.triggers
        only: StepTrigger | None = None
        asked: LoopState | None = None
        bits = found = 0
        if step > token.until or reading >= self.next_reading:
            return None
        if triggers.next_due() <= step:
            only = triggers.only_due_at(step)
            if only is None:
                bits = triggers.bits_at(step)
                if bits & self.decision_bits:
                    return None
            elif only.takes_decision:
                return None
        if conditions.start <= step < conditions.stop:
            asked = self.state_at(step, False, False, self.elapsed_at(reading))
            found, asked = conditions.ask(asked, False)
            if found & self.decision_bits:
                self.answers = found, asked
                return None
        events: Any
        if found:
            if only is not None:
                bits = 1 << only.place
                only = None
            events = self.sets.of(bits | found)
        elif only is not None:
            events = only.events
            if events is None:
                events = only.events = self.sets.make([only.place])
        else:
            events = self.sets.of(bits) if bits else QUIET
        if token is not self.token:  # the loop was closed or restarted in a condition
            return None
        triggers.advance(step)
        quiet_until = triggers.next_due() - 1
        if step + 1 < conditions.stop and conditions.start <= quiet_until:
            quiet_until = step if conditions.start <= step else conditions.start - 1
        if only is not None:
            self.sets.mark_place(only.place, step)
        elif events is not QUIET:
            self.sets.mark(events, step)
        if asked is not None:
            self.state = asked
        if self.timed:
            self.clock.last = reading
        self.step = step
        self.size = size
        # it may have been set back just now
        token.quiet_until = quiet_until if quiet_until < token.until else token.until
        return events
