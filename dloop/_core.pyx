# cython: language_level=3, cdivision=True, binding=False, auto_pickle=False
# cython: freethreading_compatible=True
"""One step: counters, triggers, bitmask. The compiled core; `_core_py.py` is the same in Python.

The core knows ints, bits and callables. It keeps the number of the last step at which nothing can
be due, `quiet_until`, and up to there a step is a batch, an increment and a pair. Every other step
goes through `_take` (get its batch) and `_hand_over` (find what is due). A list of batches goes
through `_gather` (get them) and, for its last, `_hand_over`.
"""

from bisect import bisect_left, bisect_right

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.set cimport PySet_Contains, PySet_GET_SIZE
from cpython.time cimport PyTime_PerfCounterRaw
from cython cimport critical_section, freelist
from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memset

from . import errors

cdef extern from "Python.h":
    ctypedef PyObject *(*iternextfunc)(PyObject *)
    ctypedef struct PyTypeObject:
        iternextfunc tp_iternext
    PyTypeObject *Py_TYPE(object)
    PyObject *PyErr_Occurred()
    int PyErr_ExceptionMatches(object)
    PyObject *PyDict_GetItemWithError(object, object) except? NULL
    list PyList_New(Py_ssize_t)
    void Py_SET_SIZE(object, Py_ssize_t)
    PyObject *PyTuple_GET_ITEM(object, Py_ssize_t)
    Py_ssize_t PyTuple_GET_SIZE(object)
    void PyErr_Clear()

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    #ifdef CLOCK_MONOTONIC_COARSE
    static int64_t in_nanoseconds(int failed, const struct timespec *time) {
        return failed ? INT64_MAX : time->tv_sec * (int64_t)1000000000 + time->tv_nsec;
    }
    static int64_t coarse_clock(void) {
        struct timespec time;
        return in_nanoseconds(clock_gettime(CLOCK_MONOTONIC_COARSE, &time), &time);
    }
    static int64_t coarse_resolution(void) {
        struct timespec time;
        return in_nanoseconds(clock_getres(CLOCK_MONOTONIC_COARSE, &time), &time);
    }
    #else
    #define coarse_clock() INT64_MAX
    #define coarse_resolution() INT64_MAX
    #endif
    """
    # What Python's perf_counter read at the kernel's last tick, for a quarter of the price;
    # INT64_MAX where there is no such clock
    int64_t coarse_clock() noexcept
    int64_t coarse_resolution() noexcept

cdef int64_t NEVER = INT64_MAX
cdef int64_t LONGEST = (<int64_t>1 << 62) - 1  # the training time at which it stands still, in ns
cdef int64_t UNREAD = -INT64_MAX
# How far the coarse clock may be behind, in ns, with plenty to spare
cdef int64_t BEHIND = 4 * min(coarse_resolution(), NEVER >> 3)


cdef class NoEvents(frozenset):
    """The set of events of a quiet step: empty, and it answers `in` without hashing."""

    def __contains__(self, name):
        return PySet_GET_SIZE(self) and PySet_Contains(self, name)

    def __repr__(self):
        return "frozenset()"

    def __reduce__(self):
        return frozenset, ()


cdef class EventSet(frozenset):
    """The events of a step on which something is due.

    Asked for a name that has none of the `places`, it calls `on_unknown(name)`.
    """

    cdef dict _places  # None in a set that somebody else made
    cdef tuple _first  # the names at the first places
    cdef bytes _bits
    cdef object _on_unknown
    cdef int64_t last  # the latest step with these events, -1 if there was none
    cdef int64_t before  # and the one before it

    def __cinit__(self, names=()):
        self.last = self.before = -1

    def __contains__(self, name):
        cdef Py_ssize_t place
        cdef PyObject *known
        if self._places is None:
            return PySet_Contains(self, name)
        for place in range(PyTuple_GET_SIZE(self._first)):
            # mostly it is the very object that the loop was given: no need to hash it
            if <PyObject *>name is PyTuple_GET_ITEM(self._first, place):
                break
        else:
            known = PyDict_GetItemWithError(self._places, name)
            if known is NULL:
                self._on_unknown(name)
                return False
            place = <object>known
        return (PyBytes_AS_STRING(self._bits)[place >> 3] >> (place & 7)) & 1

    def __repr__(self):
        return f"EventSet({set(self)!r})"

    def __reduce__(self):
        return frozenset, (list(self),)


def make_event_set(list names, dict places, tuple first, on_unknown, bits):
    """The EventSet of those `names` whose bits are given.

    All names have `places`; `first` are those at the first of them.
    """
    cdef Py_ssize_t size = len(names) // 8 + 1
    cdef Py_ssize_t place
    cdef bytes flags = PyBytes_FromStringAndSize(NULL, size)
    cdef char *octets = PyBytes_AS_STRING(flags)
    memset(octets, 0, size)
    due = []
    while bits:
        place = bits.bit_length() - 1
        due.append(names[place])
        octets[place >> 3] |= 1 << (place & 7)
        bits ^= <object>1 << place
    cdef EventSet events = EventSet.__new__(EventSet, due)
    events._places = places
    events._first = first
    events._bits = flags
    events._on_unknown = on_unknown
    return events


cdef NoEvents QUIET = NoEvents()
cdef object MISSING = object()
cdef object NOTHING = 0  # the bits of no event


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
        """The training time at `reading`."""
        cdef int64_t since = reading - self.started
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

    def __reduce__(self):
        return restored_state, (*self._values()[:-1], round(self.elapsed * 1e9))

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


def restored_state(
    int64_t epoch,
    int64_t global_step,
    int64_t epoch_step,
    bint epoch_end,
    bint training_end,
    int64_t elapsed,
):
    """The LoopState that was copied or pickled; its time is known."""
    clock = Clock(None, 0)
    return make_state(epoch, global_step, epoch_step, epoch_end, training_end, elapsed, clock)


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
        cdef Entry *heap = self.heap
        cdef Py_ssize_t last = self.size - 1
        cdef Py_ssize_t place = 0
        cdef Py_ssize_t child = 1
        while child <= last:
            if child < last:  # an addition, since no processor could foretell a branch
                child += heap[child + 1].due < heap[child].due
            if heap[child].due >= due:
                break
            heap[place] = heap[child]
            place = child
            child = 2 * place + 1
        heap[place] = Entry(due, number)

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
    cdef int64_t origin  # the global step that counts as 0
    cdef object events  # the set of a step at which this alone is due

    def __init__(self, bit, int64_t period, tuple points, int64_t start, int64_t stop):
        self.bit = bit
        self.period = period
        self.points = points
        self.start = start
        self.stop = stop
        self.origin = 0
        self.events = None

    cdef int64_t due_from(self, int64_t step) except -1:
        """The first global step from `step` on at which this is due."""
        cdef int64_t count = max(step, self.start) - self.origin
        cdef int64_t rest
        if self.period:
            rest = (count + 1) % self.period
            count += self.period - rest if rest else 0
        else:
            place = bisect_left(self.points, count)
            if place == len(self.points):
                return NEVER
            count = self.points[place]
        return NEVER if count >= self.stop - self.origin else self.origin + count

    cdef int64_t due_after(self, int64_t step) except -1:
        """The global step at which this is due again, after it was at `step`."""
        if not self.period:
            return self.due_from(step + 1)
        return NEVER if self.period >= self.stop - step else step + self.period


cdef class TimeTrigger:
    """Due `period` after it was last due, or once at each of `points`, in nanoseconds."""

    cdef object bit
    cdef int64_t last  # the training time at which it was last due
    cdef int64_t period
    cdef tuple points
    cdef int64_t origin
    cdef int64_t start
    cdef int64_t stop

    def __init__(
        self, bit, int64_t period, tuple points, int64_t origin, int64_t start, int64_t stop
    ):
        self.last = -1
        self.bit = bit
        self.period = period
        self.points = points
        self.origin = origin
        self.start = start
        self.stop = stop

    cdef int64_t due(self) except -1:
        """The training time at which this is due next."""
        if self.last < 0:
            return self.origin + (self.period or self.points[0])
        if self.period:
            return self.last + self.period
        place = bisect_right(self.points, self.last - self.origin)
        return NEVER if place == len(self.points) else self.origin + self.points[place]


cdef class Condition:
    """A function that is asked at each step from `start` up to `stop`."""

    cdef object bit
    cdef object function
    cdef int64_t start
    cdef int64_t stop

    def __init__(self, bit, function, int64_t start, int64_t stop):
        self.bit = bit
        self.function = function
        self.start = start
        self.stop = stop


cdef class Turn:
    """The right of one iterator to go on: what its quiet steps look at.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        plain_until: the last step that can be neither an epoch's last nor, but for the time and
            triggers, the run's.
        size: the number of steps that are handed over at once.
        size_before: the same, of the iterator before.
        step_before: the latest step of that one.
    """

    cdef int64_t quiet_until
    cdef int64_t plain_until
    cdef int64_t size
    cdef int64_t size_before
    cdef int64_t step_before

    def __cinit__(self, int64_t size_before=1, int64_t step_before=-1):
        self.size = 1
        self.size_before = size_before
        self.step_before = step_before
        self.ask_attention()

    cdef inline void ask_attention(self) noexcept:
        """Let the next step be neither quiet nor plain."""
        self.quiet_until = self.plain_until = -1


cdef Turn OVER = Turn()  # that of an iterator which has come to its end, where it stays


cdef class Core:
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

    cdef object plan
    cdef object source
    cdef Clock clock
    cdef readonly bint started
    cdef Turn turn

    # The latest step, as it was handed over
    cdef readonly int64_t step
    cdef readonly int64_t epoch
    cdef readonly int64_t epoch_start
    cdef readonly bint epoch_end
    cdef bint training_end
    cdef LoopState latest
    cdef readonly object stop_reason
    cdef readonly object error
    cdef readonly object owed  # the error, as long as it is to be told and raised
    cdef bint told
    cdef readonly object stop_asked  # why, as a stop_reason
    cdef object stop_bits
    cdef bint finished
    cdef readonly bint closed
    cdef bint entered  # a step is being made: what it calls may not ask for another

    # The epoch that batches are drawn from, ahead of the latest step while a step is made
    cdef int64_t drawing
    cdef int64_t draws_from
    cdef object batches
    cdef int64_t looks_from
    cdef int64_t ends_at
    cdef bint ended
    cdef bint lost  # whether an interrupt has ended the epoch's iterator

    # What was fetched and not handed over, in this order, and what is known of the next step
    cdef object held
    cdef list gathered
    cdef Py_ssize_t settled  # of the gathered, those at whose steps nothing but time is left to ask
    cdef object found  # the bits of conditions that held at the step after those
    cdef LoopState asked  # what conditions were given last
    cdef object ahead
    cdef object deferred
    cdef object unowed  # what was deferred and is a condition's: it becomes no event
    cdef object bits
    cdef int64_t reading
    cdef int64_t last_before  # the clock's last reading before that of a step not handed over

    cdef bint timed
    cdef bint once
    cdef int64_t last_step
    cdef int64_t max_epochs
    cdef int64_t max_time
    cdef object stop_bit
    cdef bint has_stop
    cdef list conditions
    cdef list stop_conditions
    cdef int64_t conditions_from
    cdef int64_t conditions_until
    cdef dict sets
    cdef dict forgotten  # when names were last due in sets that are gone
    cdef list step_triggers
    cdef Py_ssize_t global_triggers  # how many of them, in front, do not count anew in each epoch
    cdef list time_triggers
    cdef Agenda step_agenda
    cdef Agenda time_agenda
    cdef Agenda openings  # of timers that wait for their first step
    cdef StepTrigger lone  # that which put the first of the bits
    # The timers of the latest step that had any, each with the time at which it was due before
    cdef list fired
    cdef int64_t fired_at
    cdef int64_t next_reading
    cdef int64_t coarse_until

    def __init__(
        self,
        plan,
        source,
        Clock clock,
        int64_t epoch=0,
        int64_t epoch_steps=0,
        int64_t steps=0,
        bint epoch_end=False,
        lasts=(),
    ):
        cdef TimeTrigger timer
        self.plan = plan
        self.source = source
        self.clock = clock
        self.started = False
        self.turn = Turn()

        self.step = steps - 1
        self.epoch = epoch
        self.epoch_start = steps - epoch_steps
        self.epoch_end = epoch_end
        self.training_end = False
        self.latest = None
        self.stop_reason = None
        self.error = None
        self.owed = None
        self.told = False
        self.stop_asked = None
        self.stop_bits = NOTHING
        self.finished = False
        self.closed = False
        self.entered = False

        self.drawing = epoch
        self.draws_from = self.epoch_start
        self.batches = None
        self.looks_from = NEVER
        self.ends_at = NEVER
        self.ended = False
        self.lost = False

        self.held = MISSING
        self.gathered = []
        self.settled = 0
        self.found = None
        self.asked = None
        self.ahead = MISSING
        self.deferred = None
        self.unowed = None
        self.bits = NOTHING
        self.reading = UNREAD
        self.last_before = UNREAD

        self.timed = plan.timed
        self.once = source.once
        self.last_step = plan.max_steps - 1
        self.max_epochs = plan.max_epochs
        self.max_time = plan.max_time
        self.stop_bit = plan.stop_bit
        self.has_stop = bool(plan.stop_bit)
        self.conditions = [Condition(*each) for each in plan.conditions]
        self.stop_conditions = [Condition(*each) for each in plan.stop_conditions]
        self.conditions_from = min([start for _, _, start, _ in plan.all_conditions], default=NEVER)
        self.conditions_until = max([stop for _, _, _, stop in plan.all_conditions], default=0)
        self.sets = {NOTHING: QUIET}
        self.forgotten = {}
        self.step_triggers = [StepTrigger(*each) for each in plan.steps]
        self.global_triggers = len(self.step_triggers)
        self.step_triggers += [StepTrigger(*each) for each in plan.epoch_steps]
        self.time_triggers = [
            TimeTrigger(bit, period, points, clock.saved if per_launch else 0, start, stop)
            for bit, period, points, per_launch, start, stop in plan.times
        ]
        self.lone = None
        self.fired = []
        self.fired_at = -1
        for timer, last in zip(self.time_triggers, lasts):
            timer.last = last
        self._schedule_from(steps, self.draws_from)
        self._schedule_timers()

    @critical_section
    def steps(self, rider=None):
        """A new iterator on the run, in place of any older one; it keeps `rider` till its end."""
        cdef Steps steps = Steps.__new__(Steps, self)
        steps.rider = rider
        steps.turn = self._enter()
        return steps

    @critical_section
    def lists(self, sizes, rider=None):
        """A new iterator over lists of batches, in place of any older one.

        `sizes` is their greatest length, or the tuple of their lengths, from the greatest to 1.
        """
        cdef Lists lists = Lists.__new__(Lists, self)
        lists.rider = rider
        lists.sizes = sizes
        lists.turn = self._enter()
        return lists

    @critical_section
    def close(self):
        """Let go of the source; no iterator goes on from here."""
        self.closed = True
        self._change_turns()
        self._let_go()

    @critical_section
    def leave(self):
        """Let go of the source, and let every iterator be one that was replaced."""
        self._change_turns()
        self._let_go()

    @critical_section
    def steps_to_next_event(self, int64_t epoch_len):
        """The steps up to the next for which anything is scheduled; None if there is none.

        Epochs that were not opened yet are taken to have `epoch_len` batches.
        """
        cdef int64_t step = self.step + 1
        cdef int64_t epoch_end
        if self.closed or self.stop_reason is not None:
            return None
        if self.batches is None or (self.epoch_end and self.drawing == self.epoch):
            start = step if self.epoch_end else self.draws_from
            self._schedule_from(step, start)
            epoch_end = start + min(epoch_len, NEVER - start) - 1
        else:
            epoch_end = self._promised_end()
        cdef int64_t due = self._foreseen(epoch_end)
        return None if due >= NEVER - 1 else due - self.step

    @critical_section
    def ask_stop(self, reason, bits):
        """Let the next step be the last, with the events of `bits` among its own."""
        if self.stop_asked is None or (bits and not self.stop_bits):
            self.stop_asked = reason
            self.stop_bits = bits
        self.turn.ask_attention()

    @critical_section
    def fail(self, exception):
        """End the run with an error that is not the core's own; it is told, and then raised."""
        self._fail(exception)
        self.owed = exception

    @critical_section
    def elapsed(self):
        """The training time now, in nanoseconds; the clock is read where it was started."""
        return self.clock.elapsed(self.clock.tick()) if self.started else self.clock.saved

    @property
    @critical_section
    def latest_size(self):
        """How many steps were handed over at once, last."""
        cdef Turn turn = self.turn
        return turn.size if self.step > turn.step_before else turn.size_before

    @critical_section
    def fetched_ahead(self):
        """How many batches were fetched and not handed over."""
        return len(self.gathered) + (self.held is not MISSING) + (self.ahead is not MISSING)

    @critical_section
    def is_out_of_time(self):
        """Whether the latest step came when the time was up, or later."""
        return self.timed and self._handed_over_at() >= self.max_time

    @critical_section
    def timer_lasts(self, step_done):
        """When each timer was last due, or -1; before the latest step, unless that is done."""
        cdef TimeTrigger timer
        lasts = {timer: timer.last for timer in self.time_triggers}
        if not step_done and self.fired_at == self.step:
            lasts.update(self.fired)
        return list(lasts.values())

    @critical_section
    def last_steps(self, int64_t before):
        """The latest step before `before` of each name that was due at one."""
        cdef EventSet events
        cdef int64_t last
        steps = dict(self.forgotten)
        for events in self._made_sets():
            last = events.last if events.last < before else events.before
            if last >= 0:
                for name in events:
                    steps[name] = max(last, steps.get(name, -1))
        return steps

    cdef list _made_sets(self):
        cdef StepTrigger trigger
        lone = [trigger.events for trigger in self.step_triggers]
        return [each for each in (*lone, *self.sets.values()) if isinstance(each, EventSet)]

    @property
    @critical_section
    def state(self):
        """The LoopState of the latest step, the same object while that step lasts."""
        cdef int64_t now
        cdef LoopState latest = self.latest
        cdef int64_t step = self.step
        if latest is None or latest.global_step != step:
            now = self.clock.saved
            if self.started:
                now = self._handed_over_at() if self.timed else -1
            self.latest = latest = make_state(
                self.epoch,
                step,
                step - self.epoch_start,
                self.epoch_end,
                self.training_end,
                now,
                self.clock,
            )
        return latest

    cdef int64_t _handed_over_at(self) noexcept:
        """The training time of the latest step, also where the next one failed after it read."""
        cdef int64_t before = self.last_before
        return self.clock.elapsed(self.clock.last if before == UNREAD else before)

    cdef object _next_pair(self, Turn turn):
        """A step that may not be quiet; MISSING when the run is over."""
        if turn is OVER:
            return MISSING
        self._begin(turn)
        if self.owed is not None:
            return self._tell()
        self.entered = True
        try:
            if not self._take_or_owe():
                self.entered = False
                return self._tell() if self.owed is not None else MISSING
            events = self._hand_over(0)
            self._arm(len(self.gathered) > 0)
            batch, self.held = self.held, MISSING
            self.entered = False
            return batch, events
        except BaseException as exception:
            self.entered = False
            self._fail(exception)
            raise

    cdef object _next_list(self, Turn turn, sizes):
        """A list of batches and the events at its last; MISSING when the run is over."""
        cdef int64_t size
        if turn is OVER:
            return MISSING
        self._begin(turn)
        if self.owed is not None:
            return self._tell()
        self.entered = True
        try:
            size = self._gather(sizes)
            if not size:
                self.entered = False
                return self._tell() if self.owed is not None else MISSING
            events = self._hand_over(size - 1)
            self._arm(size < len(self.gathered))
            turn.size = size
            batches, self.gathered = self.gathered, list_with_room(min(size, 4096))
            if size < len(batches):
                batches, self.gathered = batches[:size], batches[size:]
            self.entered = False
            return batches, events
        except BaseException as exception:
            self.entered = False
            self._fail(exception)
            raise

    cdef object _stumble(self, Turn turn):
        """What comes of a quiet step whose batch did not come: the epoch's end, or an error."""
        try:
            end_or_error()
        except BaseException as exception:
            self.entered = False
            if self._owes(exception):
                return self._tell()
            self._fail(exception)
            raise
        self.entered = False
        self.ended = True
        return self._next_pair(turn)

    cdef bint _take_or_owe(self) except -1:
        """`_take`, or owe an error that it met and that becomes an event."""
        try:
            return self._take()
        except Exception as exception:
            if not self._owes(exception):
                raise
            return False

    cdef bint _owes(self, exception) except -1:
        """Whether an error of the source becomes an event, and then let it end the run."""
        if not self.plan.on_exception or not isinstance(exception, Exception) or self.closed:
            return False
        if exception is self.unowed:
            return False
        self.fail(exception)
        return True

    cdef object _tell(self):
        """The last step of a run that failed; then the error itself."""
        if not self.told:
            self.told = True
            return None, self._events(self.plan.on_exception | self.stop_bits)
        exception, self.owed = self.owed, None
        raise errors.not_stop(exception)

    cdef int64_t _ask_clock(self, batch) except? -1:
        """The user's clock at the quiet step of `batch`, which is kept where that fails."""
        try:
            return self.clock.tick()
        except BaseException as exception:
            self.entered = False
            self.held = batch
            self._fail(exception)
            raise

    cdef inline int _keep(self, batch) except -1:
        """Have the batch in hand, for a step that is not quiet."""
        if self.batches is not None:  # else the loop was left during the fetch
            self.held = batch
        return 0

    cdef Turn _enter(self):
        self._begin(self.turn)
        if self.training_end or self.finished:
            raise errors.finished()
        return self._change_turns()

    cdef Turn _change_turns(self):
        self.turn.ask_attention()
        self.turn = Turn.__new__(Turn, self.latest_size, self.step)
        return self.turn

    cdef inline int _begin(self, Turn turn) except -1:
        """Raise where `turn` gives no right to make a step, or one is being made."""
        self._refuse(turn)
        if self.entered:
            raise errors.in_use()
        return 0

    cdef int _refuse(self, Turn turn) except -1:
        """Raise where `turn` gives no right to go on."""
        if self.closed:
            raise errors.closed()
        if self.turn is not turn:
            raise errors.replaced()
        if self.error is not None and self.owed is None:
            raise errors.failed(self.error)
        return 0

    cdef int _fail(self, exception) except -1:
        """Let `exception` end the run, unless it only interrupts it."""
        if isinstance(exception, Exception):
            self.error = exception
            self.stop_reason = "exception"
            self._let_go()
            self.source.forget()
        else:
            self._take_back(exception)
        return 0

    cdef int _take_back(self, exception) except -1:
        """Let what an interrupted step has taken from the agendas be there again."""
        cdef TimeTrigger timer
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
        return 0

    cdef int64_t _taken(self) except -1:
        """How many batches of the epoch that is drawn from were fetched."""
        return self.step + 1 - self.draws_from + <int64_t>self.fetched_ahead()

    cdef int _let_go(self) except -1:
        self.turn.ask_attention()
        self.batches = None
        self.held = self.ahead = MISSING
        self.gathered = []
        self.settled = 0
        self.found = None
        return 0

    cdef bint _take(self) except -1:
        """Have the next step's batch in hand: kept, looked at before, or fetched.

        Returns False when the run is over.
        """
        cdef int64_t taken
        if self.lost:
            self._open_epoch()
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
        if self.gathered:
            self.held = self.gathered.pop(0)
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
                self.held = next(self.batches, MISSING)
                if self.held is not MISSING:
                    return True
            taken = self.step + 1 - self.draws_from
            if not self.source.goes_on_after(self.drawing, taken, self.step):
                self.stop_reason = "exhausted"
                self._finish()
                return False
            self._leave_epoch()

    cdef int64_t _gather(self, sizes) except -1:
        """Gather the batches of a list: nothing but time can be due before the step of its last.

        Returns how many they are; 0 when the run is over.
        """
        cdef int64_t most
        cdef int64_t size
        cdef int64_t free
        if self.lost or self.training_end or self.held is not MISSING or not self.gathered:
            if not self._take_or_owe():
                return 0
            self.gathered.insert(0, self.held)
            self.held = MISSING
        cdef list gathered = self.gathered
        most = self._foreseen(self._promised_end()) - self.step
        size = 1 if self.stop_asked is not None else fitting(sizes, most)
        free = min(size - 1, self._free_until() - (self.step + 1))
        while True:
            if self.batches is None:
                raise self._left()
            self.settled = max(self.settled, min(free, len(gathered)))
            if self.settled >= size - 1 and len(gathered) >= size:
                break
            if self.settled < len(gathered):
                if self._closes():
                    break
                self.settled += 1
            elif not self._fetch(max(free, self.settled + 1)):
                break
        self.turn.ask_attention()
        if self.stop_asked is not None:
            return 1
        return fitting(sizes, min(size, len(gathered)))

    cdef bint _closes(self) except -1:
        """Whether the list has to end with the first batch whose step is not settled."""
        cdef int64_t step = self.step + 1 + self.settled
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
                del self.gathered[self.settled:]
                return True
            if found is not NOTHING:
                self.found = found
                return True
        return False

    cdef bint _fetch(self, int64_t count) except -1:
        """Gather up to `count` batches in all; False where the source gives no more."""
        cdef list gathered = self.gathered
        cdef PyObject *fetched
        cdef iternextfunc fetch
        if self.ahead is not MISSING:
            gathered.append(self.ahead)
            self.ahead = MISSING
            return True
        if self.deferred is None and not self.ended:
            batches = self.batches
            fetch = Py_TYPE(batches).tp_iternext
            try:
                while len(gathered) < count:
                    fetched = fetch(<PyObject *>batches)
                    if fetched is NULL:
                        end_or_error()
                        self.ended = True
                        break
                    gathered.append(<object>fetched)
                    Py_DECREF(<object>fetched)
                else:
                    return True
            except Exception as exception:
                self.deferred = exception
        self.settled = len(gathered)
        return False

    cdef int _open_epoch(self) except -1:
        batches, self.looks_from, self.ends_at = self.source.open_epoch(self.drawing, self._taken())
        if self.global_triggers < len(self.step_triggers):
            self._schedule_from(self.step + 1, self.draws_from)
        self.batches = batches
        self.lost = False
        return 0

    cdef int _schedule_from(self, int64_t step, int64_t epoch_start) except -1:
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        cdef Agenda agenda = make_agenda()
        for number, trigger in enumerate(self.step_triggers):
            if number >= self.global_triggers:
                trigger.origin = epoch_start
            agenda.push(trigger.due_from(step), number)
        self.step_agenda = agenda
        return 0

    cdef int _schedule_timers(self) except -1:
        cdef Py_ssize_t number
        cdef TimeTrigger timer
        self.time_agenda = make_agenda()
        self.openings = make_agenda()
        for number, timer in enumerate(self.time_triggers):
            if timer.start <= self.step + 1:
                self.time_agenda.push(timer.due(), number)
            else:
                self.openings.push(timer.start, number)
        self.next_reading = UNREAD
        self.coarse_until = 0
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
            self.gathered = []
            self.source.finish(self.epoch, self.stop_reason)
        return 0

    cdef int _look_ahead(self, int64_t step) except -1:
        """Fetch the batch after that of `step`, or learn that there is none, where that is due."""
        if (
            step - self.draws_from < self.looks_from
            or self.ended
            or self.deferred is not None
            or self.ahead is not MISSING
        ):
            return 0
        try:
            self.ahead = next(self.batches, MISSING)
            self.ended = self.ahead is MISSING
        except Exception as exception:
            self.deferred = exception
        return 0

    cdef inline int _trigger(self, int64_t step) except -1:
        """Add the bits of the triggers that are due at `step`."""
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        cdef Agenda agenda = self.step_agenda
        while agenda.heap[0].due <= step:
            number = agenda.heap[0].number
            trigger = <StepTrigger>self.step_triggers[number]
            if self.bits is NOTHING:
                self.lone = trigger
                self.bits = trigger.bit
            else:
                self.bits |= trigger.bit
            agenda.replace(trigger.due_after(step), number)
        return 0

    cdef object _hand_over(self, int64_t passed):
        """Find what is due at the step after `passed` others, and let these steps be done."""
        cdef int64_t step = self.step + 1 + passed
        cdef bint settled = self.settled > passed
        cdef bint plain = step <= self.turn.plain_until
        if not plain and not settled:
            self._look_ahead(step)
        cdef int64_t now = self._read_clock() if self.timed else -1
        self._trigger(step)
        if self.timed and (
            self.clock.last >= self.next_reading or step >= self.openings.heap[0].due
        ):
            self._look_at_timers(step, now)
        bits = self.bits
        if not plain or now >= self.max_time or (self.has_stop and bits & self.stop_bit):
            events = self._judge(step, bits, now, settled)
        elif self.conditions_from <= step < self.conditions_until:
            bits = bits | self._ask(step, False, False, NOTHING, now)
            events = self._events(bits)
            self.latest = self.asked
        else:
            events = self._events(bits)
        if self.batches is None:
            raise self._left()
        self.bits = NOTHING
        self.last_before = UNREAD
        self.step = step
        if events is not QUIET and (<EventSet>events).last != step:
            (<EventSet>events).before = (<EventSet>events).last
            (<EventSet>events).last = step
        return events

    cdef object _judge(self, int64_t step, bits, int64_t now, bint settled):
        """The events of a step that may be the last of its epoch, or of the run."""
        cdef bint epoch_end = not settled and (
            self.ended or step - self.draws_from == self.ends_at
        )
        cdef LoopState state = None
        if epoch_end:
            bits = bits | self.plan.on_epoch_end(self.drawing, step)
        reason = self._limit_reached(step, epoch_end, now)
        if self.found is not None and not settled:
            bits = bits | self.found
        elif self.conditions_from <= step < self.conditions_until and not settled:
            stops = bits & self.stop_bit
            bits = bits | self._ask(step, epoch_end, reason is not None, stops, now)
            state = self.asked
        if bits & self.stop_bit:
            bits = bits ^ self.stop_bit
            reason = self.stop_asked or "stop_when"
        if self.stop_asked is not None:
            bits = bits | self.stop_bits
        cdef bint training_end = reason is not None
        if training_end:
            bits = bits | self.plan.on_training_end
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

    cdef object _left(self):
        """The error where the user's code has closed or restarted the loop in a step."""
        self._let_go()
        return errors.closed() if self.closed else errors.replaced()

    cdef int64_t _read_clock(self) except -1:
        """The training time of a step that is not quiet."""
        cdef Clock clock = self.clock
        if self.reading == UNREAD:
            self.reading = clock.tick()
        if self.last_before == UNREAD:
            self.last_before = clock.last
        clock.last = self.reading
        self.reading = UNREAD
        return clock.elapsed(clock.last)

    cdef int _look_at_timers(self, int64_t step, int64_t now) except -1:
        """Add the bits of those that are due, and find out up to what reading none is."""
        cdef Py_ssize_t number
        cdef TimeTrigger timer
        cdef Agenda agenda = self.time_agenda
        while self.openings.heap[0].due <= step:
            number = self.openings.heap[0].number
            timer = <TimeTrigger>self.time_triggers[number]
            agenda.push(timer.due(), number)
            self.openings.replace(NEVER, number)
        while agenda.heap[0].due <= now:
            number = agenda.heap[0].number
            timer = <TimeTrigger>self.time_triggers[number]
            if step < timer.stop:
                self.bits |= timer.bit
                if self.fired_at != step:
                    self.fired_at = step
                    self.fired = []
                self.fired.append((timer, timer.last))
                timer.last = now
                agenda.replace(timer.due(), number)
            else:
                agenda.replace(NEVER, number)
        cdef Clock clock = self.clock
        cdef int64_t due = min(agenda.heap[0].due, self.max_time) - clock.saved
        self.next_reading = NEVER if due > NEVER - max(clock.started, 0) else clock.started + due
        self.coarse_until = self.next_reading - BEHIND
        if clock._tick is not None or self.coarse_until <= clock.last:
            self.coarse_until = 0
        return 0

    cdef object _limit_reached(self, int64_t step, bint epoch_end, int64_t now):
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

    cdef object _ask(self, int64_t step, bint epoch_end, bint limit_reached, stops, int64_t now):
        """The bits of those conditions that hold at `step`; leaves the LoopState in `asked`."""
        cdef LoopState state = make_state(
            self.drawing, step, step - self.draws_from, epoch_end, limit_reached, now, self.clock
        )
        found = NOTHING
        if self.has_stop:
            found = self._fulfilled(self.stop_conditions, state)
            if (stops or found) and not limit_reached:
                state = state.at_training_end()
        self.asked = state
        others = self._fulfilled(self.conditions, state)
        return others if found is NOTHING else found | others

    cdef object _fulfilled(self, list conditions, LoopState state):
        """The bits of those conditions that hold in `state`."""
        cdef Condition condition
        cdef bint asked
        bits = bit = NOTHING
        try:
            for condition in conditions:
                bit = condition.bit
                asked = condition.start <= state.global_step < condition.stop
                if asked and condition.function(state):
                    bits |= bit
        except Exception as exception:
            failure = errors.not_stop(exception)
            self.plan.blame(failure, bit)
            raise failure
        return bits

    cdef object _events(self, bits):
        cdef StepTrigger lone = self.lone
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

    cdef int64_t _promised_end(self) noexcept:
        """The epoch's last step as far as a length is promised; else one that is gone, or NEVER."""
        cdef int64_t last = min(self.looks_from, self.ends_at)
        return self.draws_from + last if last < NEVER else NEVER

    cdef int64_t _foreseen(self, int64_t epoch_end) noexcept:
        """The next step for which anything is scheduled."""
        cdef int64_t due = min(self.step_agenda.heap[0].due, self.last_step)
        return min(due, epoch_end) if epoch_end > self.step else due

    cdef int64_t _free_until(self) noexcept:
        """The next step, or a later one, at which conditions or a look ahead decide."""
        cdef int64_t step = self.step + 1
        cdef int64_t looks = self._promised_end()
        if step < self.conditions_until:
            looks = min(looks, max(step, self.conditions_from))
        return max(step, looks)

    cdef int64_t _plain_until(self) noexcept:
        """The last of the steps from the next one on that are plain, or -1."""
        cdef int64_t step = self.step + 1
        cdef int64_t special = self._promised_end()
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

    cdef void _arm(self, bint some_left) noexcept:
        """Find out up to where nothing can be due, but by the time.

        That is nowhere where `some_left` of what was gathered goes before what is to be fetched.
        """
        cdef Turn turn = self.turn
        cdef int64_t step = self.step + 1
        cdef int64_t last
        if step > turn.plain_until:
            turn.plain_until = -1 if some_left else self._plain_until()
        last = min(turn.plain_until, self.openings.heap[0].due - 1)
        if step < self.conditions_until:
            last = min(last, max(step, self.conditions_from) - 1)
        turn.quiet_until = min(last, self.step_agenda.heap[0].due - 1)


cdef class Steps:
    """An iterator on a run, good until the run is entered again."""

    cdef Core core
    cdef Turn turn
    cdef object rider

    def __cinit__(self, Core core not None):
        self.core = core
        self.turn = OVER

    def __iter__(self):
        return self

    def __next__(self):
        # `core` is not given a local name: that would count references at every step
        cdef PyObject *fetched
        cdef int64_t reading = NEVER
        with critical_section(self.core):
            if self.core.entered or self.core.step >= self.turn.quiet_until:
                return self._or_end(self.core._next_pair(self.turn))
            self.core.entered = True
            batches = self.core.batches  # alive during the fetch, whatever happens in it
            fetched = Py_TYPE(batches).tp_iternext(<PyObject *>batches)
            if fetched is NULL:
                return self._or_end(self.core._stumble(self.turn))
            batch = <object>fetched
            Py_DECREF(batch)
            if self.core.step >= self.turn.quiet_until:  # a stop was asked for during the fetch
                self.core._keep(batch)
                self.core.entered = False
                return self._or_end(self.core._next_pair(self.turn))
            if self.core.timed:
                if self.core.coarse_until:
                    reading = coarse_clock()
                if reading >= self.core.coarse_until:
                    if self.core.clock._tick is None:
                        reading = PyTime_PerfCounterRaw()
                    else:
                        reading = self.core._ask_clock(batch)
                    if reading >= self.core.next_reading or self.core.step >= self.turn.quiet_until:
                        self.core._keep(batch)
                        self.core.reading = reading
                        self.core.entered = False
                        return self._or_end(self.core._next_pair(self.turn))
                if reading > self.core.clock.last:  # the coarse clock lags behind
                    self.core.clock.last = reading
            self.core.step += 1
            self.core.entered = False
            return batch, QUIET

    cdef inline object _or_end(self, pair):
        if pair is MISSING:
            self.turn = OVER
            self.rider = None
            raise StopIteration
        return pair


cdef class Lists(Steps):
    """An iterator over lists of a run's batches."""

    cdef object sizes

    def __next__(self):
        with critical_section(self.core):
            return self._or_end(self.core._next_list(self.turn, self.sizes))


cdef int64_t fitting(sizes, int64_t most) except -1:
    """The greatest of `sizes`, or of all up to it where it is one number, that is within `most`."""
    if isinstance(sizes, int):
        return min(most, <int64_t>sizes)
    for size in sizes[:-1]:
        if size <= most:
            return size
    return 1


cdef list list_with_room(Py_ssize_t room):
    """An empty list that takes as many items without being moved."""
    made = PyList_New(room)
    Py_SET_SIZE(made, 0)
    return made


cdef int end_or_error() except -1:
    """What an iterator meant that gave nothing: its end, or the error that is raised here."""
    if PyErr_Occurred() is NULL:
        return 0
    if not PyErr_ExceptionMatches(StopIteration):
        return -1
    PyErr_Clear()
    return 0
