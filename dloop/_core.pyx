# cython: language_level=3, cdivision=True, binding=False, auto_pickle=False
"""One step: counters, triggers, bitmask. The compiled core; `_core_py.py` is the same in Python.

The core knows ints, bits and callables. It keeps the number of the last step at which nothing can
be due, `quiet_until`, and up to there a step is a batch, an increment and a pair. Every other step
goes through `_take` (get its batch) and `_hand_over` (find what is due).
"""

from bisect import bisect_left, bisect_right

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.set cimport PySet_Contains
from cpython.time cimport PyTime_PerfCounterRaw
from cython cimport freelist
from libc.stdint cimport INT64_MAX, int64_t

from . import errors

cdef extern from "Python.h":
    ctypedef PyObject *(*iternextfunc)(PyObject *)
    ctypedef struct PyTypeObject:
        iternextfunc tp_iternext
    PyTypeObject *Py_TYPE(object)
    PyObject *PyErr_Occurred()
    int PyErr_ExceptionMatches(object)
    void PyErr_Clear()

cdef int64_t NEVER = INT64_MAX
cdef int64_t LONGEST = (<int64_t>1 << 62) - 1  # the training time at which it stands still, in ns
cdef int64_t UNREAD = -INT64_MAX


cdef class NoEvents(frozenset):
    """The set of events of a quiet step: empty, and it answers `in` without looking."""

    def __contains__(self, name):
        return False

    def __repr__(self):
        return "EventSet()"

    def __reduce__(self):
        return frozenset, ()


cdef class EventSet(frozenset):
    """The events of a step on which something is due.

    Asked for a name that is not among `known`, it calls `on_unknown(name)`.
    """

    cdef object _known
    cdef object _on_unknown

    def __contains__(self, name):
        if PySet_Contains(self, name):
            return True
        if not PySet_Contains(self._known, name):
            self._on_unknown(name)
        return False

    def __repr__(self):
        return f"EventSet({set(self)!r})"

    def __reduce__(self):
        return frozenset, (list(self),)


def make_event_set(names, known, on_unknown):
    """The EventSet of `names`."""
    cdef EventSet events = EventSet.__new__(EventSet, names)
    events._known = known
    events._on_unknown = on_unknown
    return events


cdef NoEvents QUIET = NoEvents()
cdef object MISSING = object()


cdef class Clock:
    """Training time in nanoseconds: monotonic, from `start`, on top of what was `saved`."""

    cdef object _tick
    cdef readonly int64_t saved
    cdef readonly int64_t started
    cdef int64_t last

    def __init__(self, tick, int64_t saved):
        self._tick = tick
        self.saved = saved
        self.started = 0
        self.last = 0

    cdef inline int64_t tick(self) except? -1:
        if self._tick is None:
            return PyTime_PerfCounterRaw()
        return self._tick()

    cdef int start(self) except -1:
        self.started = self.last = self.tick()
        return 0

    cdef int64_t elapsed(self, int64_t reading) noexcept:
        """The training time at `reading`; a clock that went backwards has stood still."""
        if reading > self.last:
            self.last = reading
        cdef int64_t since = self.last - self.started
        return LONGEST if since > LONGEST - self.saved else self.saved + since


cdef tuple _FIELDS = (
    "epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed"
)


@freelist(8)
cdef class LoopState:
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

    cdef readonly int64_t epoch
    cdef readonly int64_t global_step
    cdef readonly int64_t epoch_step
    cdef readonly bint epoch_end
    cdef readonly bint training_end
    cdef int64_t _elapsed
    cdef Clock _clock

    @property
    def elapsed(self):
        if self._elapsed < 0:
            self._elapsed = self._clock.elapsed(self._clock.tick())
        return self._elapsed / 1e9

    @property
    def steps_done(self):
        return self.global_step + 1

    cdef LoopState at_training_end(self):
        """The same, for the last step of the run."""
        return make_state(
            self.epoch,
            self.global_step,
            self.epoch_step,
            self.epoch_end,
            True,
            self._elapsed,
            self._clock,
        )

    cdef tuple _values(self):
        return tuple([getattr(self, name) for name in _FIELDS])

    def __eq__(self, other):
        if not isinstance(other, LoopState):
            return NotImplemented
        return self._values() == (<LoopState>other)._values()

    def __hash__(self):
        return hash(self._values())

    def __repr__(self):
        values = ", ".join([f"{name}={value!r}" for name, value in zip(_FIELDS, self._values())])
        return f"LoopState({values})"


cdef LoopState make_state(
    int64_t epoch,
    int64_t global_step,
    int64_t epoch_step,
    bint epoch_end,
    bint training_end,
    int64_t elapsed,
    Clock clock,
):
    cdef LoopState state = LoopState.__new__(LoopState)
    state.epoch = epoch
    state.global_step = global_step
    state.epoch_step = epoch_step
    state.epoch_end = epoch_end
    state.training_end = training_end
    state._elapsed = elapsed
    state._clock = clock
    return state


cdef struct Entry:
    int64_t due
    Py_ssize_t number


cdef class Agenda:
    """Numbered things by when they are due: a binary heap, whose last entry is never due."""

    cdef Entry *heap
    cdef Py_ssize_t size
    cdef Py_ssize_t room

    def __dealloc__(self):
        PyMem_Free(self.heap)

    cdef int push(self, int64_t due, Py_ssize_t number) except -1:
        if self.size == self.room:
            self._grow()
        cdef Py_ssize_t place = self.size
        self.size += 1
        while place and self.heap[(place - 1) // 2].due > due:
            self.heap[place] = self.heap[(place - 1) // 2]
            place = (place - 1) // 2
        self.heap[place] = Entry(due, number)
        return 0

    cdef void replace(self, int64_t due, Py_ssize_t number) noexcept:
        """Put this in the place of the first."""
        cdef Py_ssize_t place = 0
        cdef Py_ssize_t child = 1
        while child < self.size:
            if child + 1 < self.size and self.heap[child + 1].due < self.heap[child].due:
                child += 1
            if self.heap[child].due >= due:
                break
            self.heap[place] = self.heap[child]
            place = child
            child = 2 * place + 1
        self.heap[place] = Entry(due, number)

    cdef int _grow(self) except -1:
        cdef Py_ssize_t room = 2 * self.room + 8
        cdef Entry *heap = <Entry *>PyMem_Realloc(self.heap, room * sizeof(Entry))
        if heap is NULL:
            raise MemoryError
        self.heap = heap
        self.room = room
        return 0


cdef Agenda make_agenda():
    cdef Agenda agenda = Agenda.__new__(Agenda)
    agenda.push(NEVER, -1)
    return agenda


cdef class StepTrigger:
    """Due at every `period`-th step, or at `points` where there is no period."""

    cdef object bit
    cdef int64_t period
    cdef tuple points
    cdef int64_t start
    cdef int64_t stop

    def __init__(self, bit, int64_t period, tuple points, int64_t start, int64_t stop):
        self.bit = bit
        self.period = period
        self.points = points
        self.start = start
        self.stop = stop

    cdef int64_t due_from(self, int64_t step, int64_t origin) except -1:
        """The first global step from `step` on at which this is due, counting from `origin`."""
        cdef int64_t count = max(step, self.start) - origin
        cdef int64_t rest
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


cdef class TimeTrigger:
    """Due `period` after it was last due, or once at each of `points`, in nanoseconds."""

    cdef object bit
    cdef int64_t period
    cdef tuple points
    cdef int64_t origin
    cdef int64_t start
    cdef int64_t stop

    def __init__(
        self, bit, int64_t period, tuple points, int64_t origin, int64_t start, int64_t stop
    ):
        self.bit = bit
        self.period = period
        self.points = points
        self.origin = origin
        self.start = start
        self.stop = stop

    cdef int64_t first_due(self) except -1:
        return self.origin + (self.period or self.points[0])

    cdef int64_t due_after(self, int64_t now) except -1:
        """The training time at which this is due again, after it was at `now`."""
        if self.period:
            return now + self.period
        place = bisect_right(self.points, now - self.origin)
        return NEVER if place == len(self.points) else self.origin + self.points[place]


cdef class Turn:
    """The right of one iterator to go on: what its quiet steps look at.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        plain_until: the last step at which nothing but step and time triggers can be due.
    """

    cdef int64_t quiet_until
    cdef int64_t plain_until

    def __cinit__(self):
        self.ask_attention()

    cdef inline void ask_attention(self) noexcept:
        """Let the next step be neither quiet nor plain."""
        self.quiet_until = self.plain_until = -1


cdef class Core:
    """One run: from the source's batches to pairs of a batch and its events.

    Args:
        plan: what is due when, and the limits.
        source: opens epochs and judges their ends.
        clock: keeps training time.
        epoch: the epoch to begin in.
        epoch_steps: steps of that epoch that are done.
        steps: steps that are done in all.
    """

    cdef object plan
    cdef object source
    cdef Clock clock
    cdef bint started
    cdef Turn turn

    # The latest step, as it was handed over
    cdef readonly int64_t step
    cdef readonly int64_t epoch
    cdef readonly int64_t epoch_start
    cdef bint epoch_end
    cdef bint training_end
    cdef LoopState latest
    cdef readonly object stop_reason
    cdef object error
    cdef bint finished
    cdef readonly bint closed

    # The epoch that batches are drawn from, ahead of the latest step while a step is made
    cdef int64_t drawing
    cdef int64_t draws_from
    cdef object batches
    cdef int64_t looks_from
    cdef int64_t ends_at
    cdef bint ended

    # What was fetched and not handed over, and what is known of its step
    cdef object held
    cdef object ahead
    cdef object deferred
    cdef object bits
    cdef int64_t reading
    cdef int64_t last_before  # the clock's last reading before that of a step not handed over

    cdef bint timed
    cdef bint once
    cdef int64_t last_step
    cdef int64_t max_epochs
    cdef int64_t max_time
    cdef object stop_bit
    cdef list stop_conditions
    cdef list conditions
    cdef int64_t conditions_from
    cdef int64_t conditions_until
    cdef dict sets
    cdef list step_triggers
    cdef list epoch_triggers
    cdef list time_triggers
    cdef Agenda step_agenda
    cdef Agenda epoch_agenda
    cdef Agenda time_agenda
    cdef int64_t next_reading

    def __init__(
        self,
        plan,
        source,
        Clock clock,
        int64_t epoch=0,
        int64_t epoch_steps=0,
        int64_t steps=0,
    ):
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        cdef TimeTrigger timer
        self.plan = plan
        self.source = source
        self.clock = clock
        self.started = False
        self.turn = Turn()

        self.step = steps - 1
        self.epoch = epoch
        self.epoch_start = steps - epoch_steps
        self.epoch_end = False
        self.training_end = False
        self.latest = None
        self.stop_reason = None
        self.error = None
        self.finished = False
        self.closed = False

        self.drawing = epoch
        self.draws_from = self.epoch_start
        self.batches = None
        self.looks_from = NEVER
        self.ends_at = NEVER
        self.ended = False

        self.held = MISSING
        self.ahead = MISSING
        self.deferred = None
        self.bits = 0
        self.reading = UNREAD
        self.last_before = UNREAD

        self.timed = plan.timed
        self.once = source.once
        self.last_step = plan.max_steps - 1
        self.max_epochs = plan.max_epochs
        self.max_time = plan.max_time
        self.stop_bit = plan.stop_bit
        self.stop_conditions = plan.stop_conditions
        self.conditions = plan.conditions
        self.conditions_from = min([start for _, _, start, _ in plan.all_conditions], default=NEVER)
        self.conditions_until = max([stop for _, _, _, stop in plan.all_conditions], default=0)
        self.sets = {0: QUIET}
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
            self.step_agenda.push(trigger.due_from(steps, 0), number)
        for number, timer in enumerate(self.time_triggers):
            if timer.start <= steps:
                self.time_agenda.push(timer.first_due(), number)
            else:
                self.step_agenda.push(timer.start, len(self.step_triggers) + number)
        self.next_reading = NEVER

    def steps(self):
        """A new iterator on the run, in place of any older one."""
        self._refuse(self.turn)
        if self.training_end or self.finished:
            raise errors.finished()
        cdef Steps steps = Steps.__new__(Steps)
        steps.core = self
        steps.turn = self._change_turns()
        return steps

    def close(self):
        """Let go of the source; no iterator goes on from here."""
        self.closed = True
        self.leave()

    def leave(self):
        """Let go of the source, and let every iterator be one that was replaced."""
        self._change_turns()
        self._let_go()

    @property
    def state(self):
        """The LoopState of the latest step, the same object while that step lasts."""
        cdef int64_t now
        if self.latest is None or self.latest.global_step != self.step:
            now = self.clock.saved
            if self.started:
                now = self._handed_over_at() if self.timed else -1
            self.latest = make_state(
                self.epoch,
                self.step,
                self.step - self.epoch_start,
                self.epoch_end,
                self.training_end,
                now,
                self.clock,
            )
        return self.latest

    cdef int64_t _handed_over_at(self) noexcept:
        """The training time of the latest step, also where the next one failed after it read."""
        cdef int64_t last = self.clock.last
        self.clock.last = last if self.last_before == UNREAD else self.last_before
        now = self.clock.elapsed(self.clock.last)
        self.clock.last = last
        return now

    cdef object _special(self, Turn turn):
        """A step that may not be quiet; MISSING when the run is over."""
        if turn is None:
            return MISSING
        self._refuse(turn)
        try:
            return self._hand_over() if self._take() else MISSING
        except BaseException as exception:
            self._fail(exception)
            raise

    cdef object _stumble(self, Turn turn):
        """What comes of a quiet step whose batch did not come: the epoch's end, or an error."""
        try:
            if PyErr_Occurred() is not NULL:
                if not PyErr_ExceptionMatches(StopIteration):
                    raise_pending()
                PyErr_Clear()
        except BaseException as exception:
            self._fail(exception)
            raise
        self.ended = True
        return self._special(turn)

    cdef int64_t _ask_clock(self, batch) except? -1:
        """The user's clock at the quiet step of `batch`, which is kept where that fails."""
        try:
            return self.clock.tick()
        except BaseException as exception:
            self.held = batch
            self._fail(exception)
            raise

    cdef Turn _change_turns(self):
        self.turn.ask_attention()
        self.turn = Turn.__new__(Turn)
        return self.turn

    cdef int _refuse(self, Turn turn) except -1:
        """Raise where `turn` gives no right to go on."""
        if self.closed:
            raise errors.closed()
        if self.turn is not turn:
            raise errors.replaced()
        if self.error is not None:
            raise errors.failed(self.error)
        return 0

    cdef int _fail(self, exception) except -1:
        """Let `exception` end the run, unless it only interrupts it."""
        if isinstance(exception, Exception):
            self.error = exception
            self.stop_reason = "exception"
            self._let_go()
            self.source.forget()
        return 0

    cdef int _let_go(self) except -1:
        self.turn.ask_attention()
        self.batches = None
        self.held = self.ahead = MISSING
        return 0

    cdef bint _take(self) except -1:
        """Have the next step's batch in hand: kept, looked at before, or fetched.

        Returns False when the run is over.
        """
        cdef int64_t taken
        if self.held is not MISSING:
            return True
        if self.step < self.turn.plain_until and not self.ended:
            self.held = next(self.batches, MISSING)
            if self.held is not MISSING:
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
                self.held = next(self.batches, MISSING)
                if self.held is not MISSING:
                    return True
            taken = self.step + 1 - self.draws_from
            if not self.source.goes_on_after(self.drawing, taken, self.step):
                self.stop_reason = "exhausted"
                self._finish()
                return False
            self._leave_epoch()

    cdef int _open_epoch(self) except -1:
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        batches, self.looks_from, self.ends_at = self.source.open_epoch(self.drawing)
        cdef int64_t due
        self.epoch_agenda = make_agenda()
        for number, trigger in enumerate(self.epoch_triggers):
            due = trigger.due_from(self.step + 1, self.draws_from)
            self.epoch_agenda.push(due, number)
        self.batches = batches
        return 0

    cdef int _leave_epoch(self) except -1:
        self.turn.ask_attention()
        self.batches = None
        self.ended = False
        self.drawing += 1
        self.draws_from = self.step + 1
        return 0

    cdef int _finish(self) except -1:
        if not self.finished:
            self.finished = True
            self.turn.ask_attention()
            self.batches = None
            self.source.finish(self.epoch, self.stop_reason)
        return 0

    cdef int _look_ahead(self) except -1:
        """Fetch the batch after the one in hand, or learn that there is none."""
        if self.ended or self.deferred is not None or self.ahead is not MISSING:
            return 0
        try:
            self.ahead = next(self.batches, MISSING)
            self.ended = self.ahead is MISSING
        except Exception as exception:
            self.deferred = exception
        return 0

    cdef object _hand_over(self):
        """Find what is due at the step of the batch in hand, and let the step be done."""
        cdef int64_t step = self.step + 1
        cdef int64_t epoch_step = step - self.draws_from
        cdef bint plain = step <= self.turn.plain_until
        if not plain and epoch_step >= self.looks_from:
            self._look_ahead()
        cdef int64_t now = self._read_clock() if self.timed else -1
        cdef bint epoch_end = not plain and (self.ended or epoch_step == self.ends_at)
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
        cdef LoopState state = None
        if self.stop_bit:
            if self.stop_conditions:
                state = self._state_of(step, epoch_end, reason is not None, now)
                bits |= self._fulfilled(self.stop_conditions, step, state)
            if bits & self.stop_bit:
                bits ^= self.stop_bit
                if reason is None and state is not None:
                    state = state.at_training_end()
                reason = "stop_when"
        cdef bint training_end = reason is not None
        if self.conditions_from <= step < self.conditions_until:
            if state is None:
                state = self._state_of(step, epoch_end, training_end, now)
            bits |= self._fulfilled(self.conditions, step, state)
        if training_end:
            bits |= self.plan.on_training_end
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

    cdef int64_t _read_clock(self) except -1:
        cdef int64_t reading = self.reading
        self.reading = UNREAD
        if self.last_before == UNREAD:
            self.last_before = self.clock.last
        return self.clock.elapsed(self.clock.tick() if reading == UNREAD else reading)

    cdef object _due(self, int64_t step, bint epoch_end, int64_t now):
        """The bits of all that step counts, epochs and the time make due at `step`."""
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        cdef TimeTrigger timer
        cdef Agenda agenda = self.step_agenda
        while agenda.heap[0].due <= step:
            number = agenda.heap[0].number
            if number < len(self.step_triggers):
                trigger = self.step_triggers[number]
                self.bits |= trigger.bit
                agenda.replace(trigger.due_from(step + 1, 0), number)
            else:  # the window of a timer opens
                timer = self.time_triggers[number - len(self.step_triggers)]
                self.time_agenda.push(timer.first_due(), number - len(self.step_triggers))
                agenda.replace(NEVER, number)
        agenda = self.epoch_agenda
        while agenda.heap[0].due <= step:
            number = agenda.heap[0].number
            trigger = self.epoch_triggers[number]
            self.bits |= trigger.bit
            agenda.replace(trigger.due_from(step + 1, self.draws_from), number)
        agenda = self.time_agenda
        while agenda.heap[0].due <= now:
            number = agenda.heap[0].number
            timer = self.time_triggers[number]
            if step < timer.stop:
                self.bits |= timer.bit
                agenda.replace(timer.due_after(now), number)
            else:
                agenda.replace(NEVER, number)
        if epoch_end:
            return self.bits | self.plan.on_epoch_end(self.drawing, step)
        return self.bits

    cdef object _limit_reached(self, int64_t step, bint epoch_end, int64_t now):
        if step == self.last_step:
            return "max_steps"
        if epoch_end and self.drawing + 1 >= self.max_epochs:
            return "max_epochs"
        if now >= self.max_time:
            return "max_seconds"
        if self.ended and self.once:
            return "exhausted"
        return None

    cdef LoopState _state_of(self, int64_t step, bint epoch_end, bint training_end, int64_t now):
        return make_state(
            self.drawing, step, step - self.draws_from, epoch_end, training_end, now, self.clock
        )

    cdef object _fulfilled(self, list conditions, int64_t step, LoopState state):
        """The bits of those conditions that hold in `state`."""
        cdef int64_t start
        cdef int64_t stop
        bits = 0
        for bit, condition, start, stop in conditions:
            if start <= step < stop:
                try:
                    if condition(state):
                        bits |= bit
                except Exception as exception:
                    failure = errors.not_stop(exception)
                    self.plan.blame(failure, bit)
                    raise failure
        return bits

    cdef object _events(self, bits):
        events = self.sets.get(bits)
        if events is None:
            if len(self.sets) >= 4096:
                self.sets = {0: QUIET}
            events = self.sets[bits] = self.plan.event_set(bits)
        return events

    cdef void _find_plain(self, int64_t step) noexcept:
        """Find out up to where, from `step` on, nothing but triggers can be due."""
        if self.training_end or self.epoch_end or self.ahead is not MISSING:
            self.turn.plain_until = -1
            return
        cdef int64_t last = min(self.looks_from, self.ends_at)  # the epoch goes on up to there
        cdef int64_t special = self.draws_from + last if last < NEVER else NEVER
        if step < self.conditions_until:
            special = min(special, max(step, self.conditions_from))
        self.turn.plain_until = min(special, self.last_step) - 1

    cdef void _arm(self) noexcept:
        """Find out up to where, and up to what reading of the clock, nothing can be due."""
        cdef Clock clock = self.clock
        cdef int64_t due = min(self.step_agenda.heap[0].due, self.epoch_agenda.heap[0].due) - 1
        self.turn.quiet_until = min(due, self.turn.plain_until)
        if self.timed:
            due = min(self.time_agenda.heap[0].due, self.max_time) - clock.elapsed(clock.last)
            self.next_reading = NEVER if due > NEVER - max(clock.last, 0) else clock.last + due


cdef class Steps:
    """An iterator on a run, good until the run is entered again."""

    cdef Core core
    cdef Turn turn  # None once it has come to its end, where it stays

    def __iter__(self):
        return self

    def __next__(self):
        # `core` is not given a local name: that would count references at every step
        cdef PyObject *fetched
        cdef int64_t reading
        if self.turn is None or self.core.step >= self.turn.quiet_until:
            return self._pair_or_end(self.core._special(self.turn))
        batches = self.core.batches  # alive during the fetch, whatever happens in it
        fetched = Py_TYPE(batches).tp_iternext(<PyObject *>batches)
        if fetched is NULL:
            return self._pair_or_end(self.core._stumble(self.turn))
        batch = <object>fetched
        Py_DECREF(batch)
        if self.core.timed:
            if self.core.clock._tick is None:
                reading = PyTime_PerfCounterRaw()
            else:
                reading = self.core._ask_clock(batch)
            if reading >= self.core.next_reading:
                self.core.held = batch
                self.core.reading = reading
                return self._pair_or_end(self.core._special(self.turn))
            if reading > self.core.clock.last:
                self.core.clock.last = reading
        self.core.step += 1
        return batch, QUIET

    cdef inline object _pair_or_end(self, pair):
        if pair is MISSING:
            self.turn = None
            raise StopIteration
        return pair


cdef int raise_pending() except -1:
    return -1
