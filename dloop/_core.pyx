# cython: language_level=3, cdivision=True, binding=False, auto_pickle=False
# cython: freethreading_compatible=True, boundscheck=False, wraparound=False
"""Every step of a run, compiled; `_core_py.py` does the same in Python.

Up to `Engine.quiet_until` no event can fire: such a step is a fetch, an increment and a pair. Every
other step is decided in `Engine.decide`. Where the batches end, `Run.next_epoch` is called.

The core knows ints, bits and callables. `schedule.py` says what the places and bits of events are.
"""

from bisect import bisect_right
from math import inf
from time import perf_counter_ns
from weakref import ref

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF
from cpython.set cimport PySet_Contains, PySet_GET_SIZE
from cpython.time cimport PyTime_PerfCounterRaw
from cython cimport critical_section, final, freelist
from libc.math cimport frexp
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from . import errors

cdef extern from "Python.h":
    ctypedef PyObject *(*iternextfunc)(PyObject *)
    ctypedef struct PyTypeObject:
        iternextfunc tp_iternext
    PyTypeObject *Py_TYPE(object)
    PyObject *PyErr_Occurred()
    int PyErr_ExceptionMatches(object)
    PyObject *PyDict_GetItemWithError(object, object) except? NULL
    PyObject *PyTuple_GET_ITEM(object, Py_ssize_t)
    Py_ssize_t PyTuple_GET_SIZE(object)
    void PyErr_Clear()

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>
    static int64_t coarse_clock(void) {
    #ifdef CLOCK_MONOTONIC_COARSE
        struct timespec time;
        if (clock_gettime(CLOCK_MONOTONIC_COARSE, &time) == 0)
            return time.tv_sec * (int64_t)1000000000 + time.tv_nsec;
    #endif
        return INT64_MAX;
    }
    """
    # What perf_counter read at the kernel's last tick, for a quarter of the price; INT64_MAX on
    # systems without such a clock
    int64_t coarse_clock() noexcept

cdef int64_t NEVER = INT64_MAX
cdef int64_t BEHIND = 40_000_000  # the coarse clock is at most so many ns behind: 4 ticks of 10 ms
cdef int EPOCH = 2  # the origin of rows whose step numbers count within the epoch
cdef int MOST_SETS = 4096  # how many event sets are kept ready
cdef int FIRST = 12  # how many names are compared by identity
cdef int WORD = 64  # how many places have their bits in a word


cdef class NoEvents(frozenset):
    """The set of events of a quiet step: empty, and it answers `in` without hashing."""

    def __contains__(self, name):
        return PySet_GET_SIZE(self) and PySet_Contains(self, name)

    def __getitem__(self, name):
        raise errors.no_mapping(name)

    def __getattr__(self, name):
        raise errors.no_attribute(name)

    def __repr__(self):
        return repr(frozenset(self))

    def __reduce__(self):
        return frozenset, (list(self),)


cdef class EventSet(NoEvents):
    """The events of a step. `in` calls `on_unknown(name)` for a name unknown to the loop."""

    cdef dict _places  # of all names that are known; None in a set that is not a step's
    cdef tuple _first  # the names at the first places
    cdef uint64_t _bits  # of the places that fit into a word
    cdef object _on_unknown
    cdef list _fired  # the places of its names
    cdef object _sum  # the bits of all of them
    cdef bint _restarts  # whether a period in seconds begins anew
    cdef Py_ssize_t _only  # the place, if there is only one name; else -1

    def __contains__(self, name):
        cdef Py_ssize_t place
        cdef PyObject *known
        if self._places is None:
            return PySet_Contains(self, name)
        for place in range(PyTuple_GET_SIZE(self._first)):
            # It is mostly the very object that the loop was given: no need to hash it
            if <PyObject *>name is PyTuple_GET_ITEM(self._first, place):
                return (self._bits >> place) & 1
        known = PyDict_GetItemWithError(self._places, name)
        if known is NULL:
            self._on_unknown(name)
            return False
        place = <object>known
        if place < WORD:
            return (self._bits >> place) & 1
        return PySet_Contains(self, name)


cdef NoEvents QUIET = NoEvents()


@final
cdef class EventSets:
    """The event sets of a run, made when first needed, and the steps at which names fired last.

    Args:
        names: the names by place.
        places: the place of each name.
        on_unknown: called with a name that is neither.
    """

    cdef list _names
    cdef dict _places
    cdef tuple _first
    cdef object _on_unknown
    cdef object _timer_bits  # of the names that have a period in seconds
    cdef dict _sets
    cdef int64_t *_latest  # by place, the step at which the name fired last, or -1
    cdef int64_t *_before  # and the one before that

    def __cinit__(self, list names, dict places, on_unknown, timer_bits):
        self._timer_bits = timer_bits
        self._names = names
        self._places = places
        self._first = tuple(names[:FIRST])
        self._on_unknown = on_unknown
        self._sets = {0: QUIET}
        cdef Py_ssize_t place
        cdef size_t size = (len(names) + 1) * sizeof(int64_t)
        self._latest = <int64_t *>PyMem_Malloc(size)
        self._before = <int64_t *>PyMem_Malloc(size)
        if self._latest is NULL or self._before is NULL:
            raise MemoryError
        for place in range(len(names)):
            self._latest[place] = self._before[place] = -1

    def __dealloc__(self):
        PyMem_Free(self._latest)
        PyMem_Free(self._before)

    cpdef object of(self, bits):
        """Return the set of the names whose bits are given."""
        cdef PyObject *known = PyDict_GetItemWithError(self._sets, bits)
        return <object>known if known is not NULL else self.make(bits)

    cdef object make(self, bits):
        cdef EventSet events
        cdef Py_ssize_t place
        if len(self._sets) >= MOST_SETS:
            self._sets = {0: QUIET}
        places = []
        rest = bits
        while rest:
            place = rest.bit_length() - 1
            places.append(place)
            rest ^= <object>1 << place
        events = EventSet.__new__(EventSet, [self._names[place] for place in places])
        events._fired = places
        events._sum = bits
        events._restarts = bits & self._timer_bits
        events._only = places[0] if len(places) == 1 else -1
        events._places = self._places
        events._first = self._first
        events._on_unknown = self._on_unknown
        for place in places:
            if place < WORD:
                events._bits |= <uint64_t>1 << place
        self._sets[bits] = events
        return events

    cdef inline int mark(self, EventSet events, int64_t step) except -1:
        """Remember that `events` fired at `step`."""
        cdef Py_ssize_t place = events._only
        if place < 0:
            for place in events._fired:
                self.mark_place(place, step)
        else:
            self.mark_place(place, step)
        return 0

    cdef inline void mark_place(self, Py_ssize_t place, int64_t step) noexcept:
        if self._latest[place] != step:
            self._before[place] = self._latest[place]
            self._latest[place] = step

    cpdef int64_t last_step(self, name, int64_t end) except -2:
        """Return the latest step before `end` at which the name fired, or -1.

        `end` is the latest step, or the one after it.
        """
        cdef Py_ssize_t place = self._places[name]
        cdef int64_t latest = self._latest[place]
        return latest if latest < end else self._before[place]


cdef tuple _FIELDS = (
    "epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed"
)


@freelist(8)
@final
cdef class LoopState:
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

    cdef readonly int64_t epoch
    cdef readonly int64_t global_step
    cdef readonly int64_t epoch_step
    cdef readonly bint epoch_end
    cdef readonly bint training_end
    cdef int64_t _elapsed  # in nanoseconds; -1 if it was not read
    cdef object _clock

    def __init__(
        self,
        int64_t epoch,
        int64_t global_step,
        int64_t epoch_step,
        bint epoch_end,
        bint training_end,
        int64_t elapsed,
        clock,
    ):
        self.epoch = epoch
        self.global_step = global_step
        self.epoch_step = epoch_step
        self.epoch_end = epoch_end
        self.training_end = training_end
        self._elapsed = elapsed
        self._clock = clock

    @property
    def elapsed(self):
        if self._elapsed < 0:
            self._elapsed = self._clock.now()
        return self._elapsed / 1e9

    @property
    def steps_done(self):
        return self.global_step + 1

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


cdef struct Entry:
    int64_t due
    Py_ssize_t number


@final
cdef class Heap:
    """Numbers by when they are due, the first on top; -1 is never due."""

    cdef Entry *heap
    cdef Py_ssize_t size

    def __cinit__(self, Py_ssize_t count):
        self.heap = <Entry *>PyMem_Malloc((count + 1) * sizeof(Entry))
        if self.heap is NULL:
            raise MemoryError
        self.heap[0] = Entry(NEVER, -1)
        self.size = 1

    def __dealloc__(self):
        PyMem_Free(self.heap)

    cdef int fill(self, list dues) except -1:
        """Hold numbers by when they are due; a sorted array is a heap."""
        cdef Py_ssize_t place
        for place, (due, number) in enumerate(sorted(dues)):
            self.heap[place] = Entry(due, number)
        self.size = len(dues)
        return 0

    cdef void replace_top(self, int64_t due, Py_ssize_t number) noexcept:
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


@final
cdef class Trigger:
    """Fires at the steps of a row."""

    cdef object row, bit
    cdef object events  # the set of this event alone, once it was needed
    cdef int64_t period, stop
    cdef int64_t origin  # the step that counts as 0

    def __init__(self, row, int64_t launch):
        self.row = row
        self.bit = 1 << row.place
        self.period, self.stop = row.period, row.stop
        self.origin = (0, launch, 0)[row.origin]

    cdef inline int64_t step_after(self, int64_t step) except -1:
        """Return the step at which this fires again, after it did at `step`."""
        if not self.period:
            return self.point_after(step)
        return NEVER if self.period >= self.stop - (step - self.origin) else step + self.period

    cdef int64_t point_after(self, int64_t step) except -1:
        """Return the same for a row of points. It calls no Python, since it ends a decision."""
        points = self.row.points
        place = bisect_right(points, step - self.origin)
        cdef int64_t count = points[place] if place < len(points) else NEVER
        return NEVER if count >= self.stop else self.origin + count


@final
cdef class Agenda:
    """The next step at which anything has a say, apart from the clock and conditions.

    Attributes:
        epoch_last: the last step of the epoch, if it is known.
        last_step: the last step of the run by `max_steps`, or by a fraction of the epoch.
        bar: what is called at `bar_step`.
        interrupted_at: the place, in steps, at which the fetch of a single-pass source was.
        agreement: what lets processes agree, or None; `every`: its period in steps, or 0.
        requests: what was requested since the latest step: bits, and a reason to stop or None.
        stop_bits: the bits of `stop_when`; `event_bits`: those of names.
    """

    cdef list _triggers
    cdef Heap _heap
    cdef bint _is_per_epoch  # whether a trigger counts within the epoch
    cdef Trigger only  # the first that fires at the step that was looked at last
    cdef public int64_t epoch_last
    cdef int64_t last_step
    cdef public object bar
    cdef public int64_t bar_step
    cdef public int64_t interrupted_at
    cdef readonly object agreement
    cdef int64_t every
    cdef public list requests
    cdef object stop_bits
    cdef object event_bits
    cdef bint is_plain  # without a `stop_when`, and without parts that wait

    def __init__(self, schedule, int64_t launch, agreement):
        cdef Trigger trigger
        self._triggers = [Trigger(row, launch) for row in schedule.steps]
        self._heap = Heap.__new__(Heap, len(self._triggers))
        for trigger in self._triggers:
            self._is_per_epoch |= trigger.row.origin == EPOCH
        self.epoch_last = self.bar_step = NEVER
        self.interrupted_at = -2
        self.last_step = NEVER if schedule.max_steps == NEVER else schedule.max_steps - 1
        self.requests = []
        self.stop_bits = schedule.stop_bits
        self.event_bits = schedule.event_bits
        self.is_plain = not schedule.stop_bits and not schedule.waits
        self.agreement = agreement
        self.every = 0 if agreement is None else agreement.every

    cpdef object begin_epoch(self, int64_t step, epoch, int64_t epoch_start, length, ends):
        """Plan from `step` on, in an epoch that begins at `epoch_start`."""
        cdef Py_ssize_t number
        cdef Trigger trigger
        cdef int64_t last = NEVER if length is None else epoch_start + <int64_t>length - 1
        if length is None and ends.is_single_pass:
            last = self.epoch_last  # a stream's end outlasts finish_epoch()
        self.epoch_last = last if last >= step else NEVER
        if ends.needs_length:
            last = ends.last_step(epoch, epoch_start)
            self.last_step = last if last >= step else NEVER
        elif self._heap.size > 1 and not self._is_per_epoch:
            return
        dues = [(NEVER, -1)]
        for number, trigger in enumerate(self._triggers):
            if trigger.row.origin == EPOCH:
                trigger.origin = epoch_start
            if trigger.row.fraction is not None:
                first = epoch_start - trigger.origin
                trigger.row = trigger.row.in_epoch(epoch, ends.length, first)
            dues.append((trigger.row.next_step(step, trigger.origin), number))
        self._heap.fill(dues)

    cdef inline object bits_at(self, int64_t step):
        """Return the bits of the step criteria that are met at `step`, before which none is."""
        cdef Entry *heap = self._heap.heap
        cdef Py_ssize_t size = self._heap.size
        cdef Py_ssize_t entry
        self.only = None
        if heap[0].due > step:
            return 0
        self.only = <Trigger>self._triggers[heap[0].number]
        bits = self.only.bit
        if (size > 1 and heap[1].due <= step) or (size > 2 and heap[2].due <= step):
            entries = [1, 2]
            for entry in entries:
                if entry < size and heap[entry].due <= step:
                    bits |= (<Trigger>self._triggers[heap[entry].number]).bit
                    entries += (2 * entry + 1, 2 * entry + 2)
        return bits

    cdef inline int advance(self, int64_t step) except -1:
        """Let the triggers that fire at `step` wait for their next step."""
        cdef Py_ssize_t number
        while self._heap.heap[0].due <= step:
            number = self._heap.heap[0].number
            self._heap.replace_top((<Trigger>self._triggers[number]).step_after(step), number)
        return 0

    cpdef inline int64_t next_due(self, int64_t step) noexcept:
        """Return the next step after `step` at which anything but the bar has a say."""
        cdef int64_t due = min(min(self._heap.heap[0].due, self.epoch_last), self.last_step)
        if self.every:
            due = min(due, step + self.every - (step + 1) % self.every)
        return due


@final
cdef class Condition:
    """A condition function, and the window in which it is called."""

    cdef object bit, function, whose
    cdef int origin
    cdef int64_t start, stop

    def __init__(self, row):
        place, self.function, self.whose, self.origin, self.start, self.stop = row
        self.bit = 1 << place


@final
cdef class Conditions:
    """The condition functions of a run.

    Attributes:
        start: the first step at which any of them is called; `stop`: one after the last.
        answered: the step up to which they were called while a list is gathered.
        answer: the bits of those that were true at that step.
        origins: the steps that windows count from: the run's, the launch's and the epoch's first.
    """

    cdef list _events
    cdef list _stops
    cdef object _agreement
    cdef readonly int64_t[3] origins
    cdef int64_t start
    cdef int64_t stop
    cdef int64_t answered
    cdef object answer

    def __init__(self, schedule, int64_t launch, agreement):
        self._events = list(map(Condition, schedule.conditions))
        self._stops = list(map(Condition, schedule.stop_conditions))
        if agreement is not None:  # then `stop_when` fires at an agreement
            self._events, self._stops = [*self._stops, *self._events], []
        self._agreement = agreement
        self.origins = (0, launch, 0)
        self.start = NEVER
        self.answered = -1
        self.answer = 0

    cdef int begin_epoch(self, int64_t epoch_start) except -1:
        """Count windows that are per epoch from `epoch_start`."""
        self.origins[EPOCH] = epoch_start
        cdef Condition row
        cdef int64_t origin
        self.start, self.stop = NEVER, 0
        for row in [*self._events, *self._stops]:
            origin = self.origins[row.origin]
            self.start = min(self.start, origin + row.start)
            self.stop = max(self.stop, origin + min(row.stop, NEVER - origin))
        return 0

    cdef object ask(self, LoopState state, bint stops):
        """Call those of `stop_when`, then the others; return the bits of the true ones.

        Processes that agree keep them for the next exchange, and none is true now.

        Args:
            state: their argument; training_end is true for the others if `stop_when` fires.
            stops: whether `stop_when` fires by another criterion.
        """
        cdef int64_t step = state.global_step
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

    cdef object _true_ones(self, list rows, LoopState state):
        cdef Condition row = None
        cdef int64_t count
        bits = 0
        try:
            for row in rows:
                count = state.global_step - self.origins[row.origin]
                if row.start <= count < row.stop and row.function(state):
                    bits |= row.bit
        except Exception as exception:
            failure = errors.not_stop(exception)
            errors.annotate(failure, f"in the condition of {row.whose}")
            raise failure
        return bits


@final
cdef class Alarm:
    """The time criteria, and the reading of the clock at which the next of them can be met.

    Attributes:
        timed: whether each step reads the clock; processes that agree do so at agreements alone.
        last: the reading of the latest step, later by the pauses since then.
    """

    cdef readonly object clock
    cdef object tick  # None for the real clock
    cdef public int64_t last
    cdef bint timed
    cdef bint has_timers
    cdef int64_t max_time
    cdef public object timers
    cdef int64_t next_start  # the next step at which a window of theirs opens
    cdef int64_t next_reading
    cdef int64_t coarse_until  # up to this reading the coarse clock is enough

    def __init__(self, clock, timers, schedule, bint is_alone):
        self.clock = clock
        self.tick = None if clock.tick is perf_counter_ns else clock.tick
        self.timed = schedule.timed and is_alone
        self.has_timers = schedule.timed
        self.max_time = schedule.max_time
        self.set(timers)

    cpdef object set(self, timers):
        """Wait for these timers, or for the same ones after a pause."""
        self.wait_for(timers, timers.next_start, self.reading_of(timers))

    cdef int64_t reading_of(self, timers) except? -1:
        """Return the reading at which the next of these timers, or the limit, is reached."""
        elapsed = min(timers.next_time, self.max_time)
        return self.clock.reading_at(elapsed, timers.next_launch_time)

    cdef void wait_for(self, timers, int64_t start, int64_t reading) noexcept:
        """Wait for these timers; the next is reached at `reading`, or may be from `start` on."""
        self.timers = timers
        self.next_start = start
        self.next_reading = reading
        self.coarse_until = reading - BEHIND if reading > BEHIND else 0
        if self.tick is not None or self.coarse_until <= self.last:
            self.coarse_until = 0

    cdef inline int64_t read(self) except? -1:
        """Return a reading, a coarse one if no timer is near."""
        cdef int64_t reading = coarse_clock() if self.coarse_until else NEVER
        if reading >= self.coarse_until:
            reading = PyTime_PerfCounterRaw() if self.tick is None else self.tick()
        return max(reading, self.last)  # the coarse clock may be behind

    cdef inline bint is_early(self) noexcept:
        """Whether the coarse clock says that nothing can be due; its reading is the step's."""
        cdef int64_t reading
        if not self.coarse_until:
            return False
        reading = coarse_clock()
        if reading >= self.coarse_until:
            return False
        if reading > self.last:  # it may be behind
            self.last = reading
        return True


cdef object NO_BATCHES = iter(())


@final
cdef class Counter:
    """How much bodies have counted of one thing.

    Attributes:
        total: the sum; `before`: the sum before the step `at`, at which it was counted last.
        due: the sum from which one of the criteria `rows` is met; infinity if there is none.
    """

    cdef readonly object total, before
    cdef readonly int64_t at
    cdef object due, rows

    def __init__(self, total, rows):
        self.rows = rows
        self.total = self.before = total
        self.at = -1
        self.due = inf if rows is None else rows.due_after(total)


@final
cdef class Decided:
    """The latest step that was decided, or the latest list; steps after it are quiet.

    Attributes:
        step: that step; `size`: how many steps were made with it.
        events: those of that step.
        epoch_end, training_end: as in its LoopState.
        state: the LoopState that was made last.
        timers: the time criteria before it; `waiting`: the bits that waited before it.
    """

    cdef readonly int64_t step, size
    cdef object events
    cdef bint epoch_end, training_end
    cdef readonly object timers, waiting
    cdef LoopState state

    def __init__(self, LoopState state, timers):
        self.state = state
        self.step = state.global_step
        self.size = 1
        self.waiting = 0
        self.events = QUIET
        self.epoch_end = state.epoch_end
        self.timers = timers


@final
cdef class Engine:
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
        busy: whether a step is being made: what that calls may not request another.
    """

    cdef readonly Agenda agenda
    cdef readonly Conditions conditions
    cdef readonly EventSets sets
    cdef readonly object ends
    cdef readonly Alarm alarm
    cdef object _checked_count
    cdef readonly dict counters
    cdef readonly Decided decided
    cdef readonly int64_t step
    cdef readonly int64_t epoch
    cdef public int64_t epoch_start
    cdef object batches
    cdef object opened
    cdef readonly list in_hand
    cdef public int64_t quiet_until
    cdef public int64_t turn
    cdef unsigned long thread
    cdef int64_t over_at
    cdef bint busy
    cdef object __weakref__

    def __init__(
        self, schedule, clock, timers, LoopState state not None, agreement=None
    ):
        cdef int64_t launch = state.global_step + 1
        self.agenda = Agenda(schedule, launch, agreement)
        self.conditions = Conditions(schedule, launch, agreement)
        names = schedule.names
        self.sets = EventSets(
            names.names, names.places, names.warn_of_unknown, schedule.timer_bits
        )
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
        self.in_hand = []
        self.quiet_until = -1

    # Epochs

    def begin_epoch(self, batches, length):
        """Fetch from `batches`, the rest of an epoch of this length, if it is known."""
        self.opened = batches
        self.agenda.begin_epoch(self.step + 1, self.epoch, self.epoch_start, length, self.ends)
        self.conditions.begin_epoch(self.epoch_start)
        if self.alarm.has_timers:
            self.alarm.set(self.alarm.timers.in_epoch(self.epoch_start))
        self.look_ahead()

    def end_epoch(self):
        """Let the next step be the first of the next epoch."""
        self.latest_state()  # while the epoch is that of the step
        if not self.agenda.is_plain:
            self.ends.waits.end_epoch(self.step, self.conditions.origins)
        self.epoch += 1
        self.epoch_start = self.step + 1

    cpdef object ends_in(self, Py_ssize_t count):
        """Let the epoch end with the `count`-th batch from the one that is being fetched on."""
        cdef int64_t last = self.step + len(self.in_hand) + count
        if last == self.agenda.interrupted_at:
            raise errors.interrupted()
        self.agenda.epoch_last = min(self.agenda.epoch_last, last)
        self.quiet_until = -1

    @property
    def ended_epoch(self):
        """Whether the latest step was the last of its epoch, and that was not ended yet."""
        return self.decided.epoch_end and self.decided.step >= self.epoch_start

    cpdef object drop_iterator(self):
        """Forget the iterator of the epoch."""
        self.batches = self.opened = NO_BATCHES
        self.quiet_until = -1

    def drop_batches(self):
        """Forget the iterator and what is in hand."""
        self.drop_iterator()
        self.in_hand = []

    # What the latest step was

    @property
    def current_epoch(self):
        """The epoch of the step that is being made; of the latest step, if none is."""
        return self.epoch if self.busy else self.latest_state().epoch

    cdef LoopState state_at(self, int64_t step, bint epoch_end, bint training_end, int64_t elapsed):
        """Return the LoopState of a step of the epoch."""
        cdef LoopState state = LoopState.__new__(LoopState)
        state.epoch = self.epoch
        state.global_step = step
        state.epoch_step = step - self.epoch_start
        state.epoch_end = epoch_end
        state.training_end = training_end
        state._elapsed = elapsed
        state._clock = self.alarm.clock
        return state

    @critical_section
    def latest_state(self):
        """Return the LoopState of the latest step, the same object as long as it is that."""
        cdef Decided decided = self.decided
        cdef LoopState state = decided.state
        cdef Alarm alarm = self.alarm
        cdef bint is_decided = decided.step == self.step
        cdef bint epoch_end = is_decided and decided.epoch_end
        cdef bint training_end = is_decided and decided.training_end
        cdef int64_t elapsed = alarm.clock.elapsed(alarm.last) if alarm.timed else -1
        if state.global_step == self.step:
            if state.epoch_end == epoch_end and state.training_end == training_end:
                return state
            elapsed = state._elapsed
        decided.state = self.state_at(self.step, epoch_end, training_end, elapsed)
        return decided.state

    cpdef object latest_events(self):
        """Return the events of the latest step."""
        return self.decided.events if self.decided.step == self.step else QUIET

    # What bodies change

    cpdef object amend(self, bits, bint epoch_end, reason):
        """Let the latest step have more events, and end its epoch or the run; return its events.

        Raises:
            LoopError: its body has ended, or this is another thread.
        """
        self.check_body()
        cdef Decided decided = self.decided
        cdef int64_t step = self.step
        cdef bint was_end = decided.step == step and decided.epoch_end
        ends = self.ends
        if decided.step == step and decided.events is not QUIET:
            bits |= (<EventSet>decided.events)._sum
        if epoch_end and not was_end:
            bits |= ends.bits_at(step, self.epoch, self.epoch_start)
            reason = ends.by_epochs(self.epoch)
        reason = ends.first_reason([reason, ends.stop_reason])
        epoch_end |= was_end
        events = self.conclude(step, bits, reason, epoch_end, self.alarm.last, False, 0)
        if self.agenda.agreement is not None:
            self.agenda.agreement.amend(step, bits, epoch_end, reason)
        return events

    def count(self, name, n=1):
        """Add to a counter in the body of the latest step; return its events.

        Raises:
            LoopError: as `amend`.
            TypeError, ValueError: an argument is wrong.
        """
        self.check_body()
        if type(n) is not int or n < 0 or not isinstance(name, str):
            n = self._checked_count(name, n)
        cdef PyObject *known = PyDict_GetItemWithError(self.counters, name)
        cdef Counter counter
        if known is NULL:
            counter = self.counters[name] = Counter(0, None)
        else:
            counter = <Counter>known
        total, due, events = counter.total + n, counter.due, self.latest_events()
        if total >= due:
            bits = counter.rows.bits_at(
                counter.total, total, self.step, self.conditions.origins
            )
            due = counter.rows.due_after(total)
            events = self.amend(bits, False, None) if bits else events
        if counter.at != self.step:
            counter.at = self.step
            counter.before = counter.total
        counter.total = total
        counter.due = due
        return events

    cdef int check_body(self) except -1:
        """Raise LoopError unless the body of the latest step runs in this thread."""
        if self.over_at == self.step or self.busy or self.thread != PyThread_get_thread_ident():
            raise errors.no_body()
        return 0

    cpdef object end_body(self):
        """Let the latest step not be changed any more."""
        self.over_at = self.step

    # The decision

    cdef inline void look_ahead(self) noexcept:
        """Find out how far the next steps are quiet, and where their batches come from."""
        cdef int64_t step = self.step
        cdef int64_t until = min(self.agenda.next_due(step), self.agenda.bar_step)
        until = min(until, self.alarm.next_start)
        if step + 1 < self.conditions.stop:
            until = min(until, max(step + 1, self.conditions.start))
        self.batches = NO_BATCHES if self.in_hand else self.opened
        self.quiet_until = -1 if self.agenda.requests else until - 1

    def jump(self, int64_t step):
        """Make the steps up to `step`, before which nothing is scheduled; return its events."""
        return self.decide(None, self.turn, step - self.step, 0)

    cdef object make(self, run, int64_t turn, int64_t count):
        """Make the next `count` steps; return the events of the last. The others have none."""
        cdef Alarm alarm = self.alarm
        cdef Decided decided = self.decided
        cdef int64_t reading = alarm.read() if alarm.timed else 0
        if self.step + count > self.quiet_until or (
            alarm.timed and reading >= alarm.next_reading
        ):
            return self.decide(run, turn, count, reading)
        if alarm.timed:
            alarm.last = reading
        if self.in_hand:
            self.in_hand = self.in_hand[count:]
            self.batches = NO_BATCHES if self.in_hand else self.opened
        self.step += count
        if count > 1:
            decided.step = self.step
            decided.size = count
            decided.events = QUIET
            decided.epoch_end = decided.training_end = False
            decided.timers = alarm.timers
            decided.waiting = self.ends.waits.waiting
        return QUIET

    cdef object decide(self, run, int64_t turn, int64_t count, int64_t reading):
        """Make the next `count` steps; return the events of the last one.

        The steps are made as a whole, or not at all if anything raises.
        """
        cdef Agenda agenda = self.agenda
        cdef Alarm alarm = self.alarm
        cdef int64_t step = self.step + count
        cdef bint epoch_end = step == agenda.epoch_last
        cdef Py_ssize_t requests = len(agenda.requests)
        cdef bint is_due = False
        cdef int64_t elapsed
        stop = None
        reason = self.ends.by_steps if step == agenda.last_step else None
        bits = agenda.bits_at(step)
        if epoch_end:
            bits |= self.ends.bits_at(step, self.epoch, self.epoch_start)
            reason = reason or self.ends.by_epochs(self.epoch) or self.ends.by_source
        if agenda.agreement is not None:
            more, stop, is_due = agenda.agreement.read(step, reason is not None)
            bits |= more
            agenda.epoch_last = min(agenda.epoch_last, <int64_t>agenda.agreement.end)
        elif requests:
            more, stop = self.ends.of_requests(agenda.requests[:requests])
            bits |= more
        if alarm.timed:
            is_due = reading >= alarm.next_reading or step >= alarm.next_start
        if is_due:
            times = self.times_at(reading)
            bits |= alarm.timers.due_at(step, times)
            if <int64_t>times[0] >= alarm.max_time:
                reason = "max_seconds"
        if stop is not None:
            reason = stop
        if self.conditions.start <= step < self.conditions.stop:
            elapsed = alarm.clock.elapsed(reading) if alarm.timed else -1
            state = self.state_at(step, epoch_end, reason is not None, elapsed)
            bits |= self.conditions.ask(state, bits & agenda.stop_bits)
        if turn != self.turn and run is not None:  # the loop was closed or restarted
            run.check(turn)
        if step >= agenda.bar_step and agenda.bar is not None:
            agenda.bar_step = agenda.bar.at_step(step)
        if agenda.agreement is not None and reason is None:
            agenda.agreement.begin(
                step, agenda.requests[:requests], alarm.clock, self.counters, agenda.epoch_last
            )
        return self.conclude(step, bits, reason, epoch_end, reading, is_due, requests)

    cdef inline object conclude(
        self,
        int64_t step,
        bits,
        reason,
        bint epoch_end,
        int64_t reading,
        bint is_due,
        Py_ssize_t requests,
    ):
        """Make the steps up to `step`, at which `bits` are met; return its events."""
        cdef Agenda agenda = self.agenda
        cdef Alarm alarm = self.alarm
        cdef Decided decided = self.decided
        cdef bint ends = False
        cdef bint restarts
        cdef int64_t next_start = NEVER
        cdef int64_t next_reading = NEVER
        end = timers = None
        if reason is None and (
            agenda.is_plain or (bits <= agenda.event_bits and not self.ends.waits.waiting)
        ):
            events = self.events_of(bits)
            restarts = events is not QUIET and (<EventSet>events)._restarts
        else:
            end = self.ends.after(step, bits, reason, self.conditions.origins)
            bits = end[0]
            ends = end[1] is not None
            events = self.sets.of(bits & agenda.event_bits)
            restarts = bits & self.sets._timer_bits
        if is_due or restarts:
            timers = alarm.timers.after(step, self.times_at(reading), bits, is_due)
            next_start, next_reading = timers.next_start, alarm.reading_of(timers)
        if events is not QUIET:
            self.sets.mark(<EventSet>events, step)
        # From here on no Python is called: the steps are made as a whole
        agenda.advance(step)
        if alarm.timed:
            alarm.last = reading
        if decided.step != step:
            decided.step = step
            decided.size = max(1, step - self.step)
            if alarm.has_timers:
                decided.timers = alarm.timers
            if not agenda.is_plain:
                decided.waiting = self.ends.waits.waiting
        decided.events = events
        decided.epoch_end = epoch_end
        decided.training_end = ends
        if timers is not None:
            alarm.wait_for(timers, next_start, next_reading)
        if end is not None:
            _, self.ends.stop_reason, self.ends.finished, self.ends.waits.waiting = end
        if epoch_end or ends:
            self.opened = NO_BATCHES
            self.conditions.answered = step
        if self.in_hand:
            self.in_hand = self.in_hand[step - self.step:]
            if ends or (epoch_end and not self.ends.is_single_pass):
                self.in_hand = []
        self.step = step
        if requests:
            del agenda.requests[:requests]
        self.look_ahead()
        return events

    cdef inline object events_of(self, bits):
        """Return the set of events of `bits`; a trigger that fires alone keeps its own."""
        cdef Trigger only = self.agenda.only
        if only is None or bits is not only.bit:
            return self.sets.of(bits) if bits else QUIET
        if only.events is None:
            only.events = self.sets.of(bits)
        return only.events

    cdef tuple times_at(self, int64_t reading):
        """Return the times of training and of the launch, at a reading or as agreed on."""
        if self.agenda.agreement is not None:
            return self.agenda.agreement.now, self.agenda.agreement.launch_now
        return self.alarm.clock.times_at(reading)

    # Iterators

    def ahead(self, batches, count):
        """Return an iterator that fetches so many batches ahead, to find the end of the epoch."""
        return Lookahead(batches, self, count)

    def steps(self, run, keep_alive):
        """Return a new iterator over steps, in place of the current one."""
        cdef Steps steps = Steps.__new__(Steps, self, run, self.enter(), keep_alive)
        return steps

    def lists(self, run, sizes, keep_alive):
        """Return a new iterator over lists of steps, in place of the current one."""
        cdef Lists lists = Lists.__new__(Lists, self, run, self.enter(), keep_alive)
        lists.sizes = sizes
        return lists

    @critical_section
    cdef int64_t enter(self) except -1:
        if self.busy:
            raise errors.in_use()
        self.turn += 1
        self.thread = PyThread_get_thread_ident()
        self.look_ahead()
        self.quiet_until = -1
        return self.turn


@final
cdef class Lookahead:
    """Fetches batches ahead, and tells the engine which is the last of the epoch."""

    cdef object _batches
    cdef object _engine
    cdef Py_ssize_t _count
    cdef list _ring  # `_held` of its places are in use, from `_first` on
    cdef Py_ssize_t _first
    cdef Py_ssize_t _held
    cdef bint _is_over  # whether the iterator has ended or failed

    def __init__(self, batches not None, Engine engine not None, Py_ssize_t count):
        self._batches = batches
        self._engine = ref(engine)  # which refers to this
        self._count = count
        self._ring = [None] * count

    def batches_ahead(self):
        """Return how many batches were fetched ahead."""
        return self._held

    def batches_left(self):
        """Fetch ahead; return how many batches there are, or None if the end was not found."""
        self._fill()
        return self._held if self._batches is NO_BATCHES else None

    def __iter__(self):
        return self

    def __next__(self):
        cdef PyObject *fetched
        if self._held < self._count:
            self._fill()
        if self._held == self._count:
            fetched = Py_TYPE(self._batches).tp_iternext(<PyObject *>self._batches)
            if fetched is not NULL:
                batch = self._ring[self._first]
                self._ring[self._first] = <object>fetched
                Py_DECREF(<object>fetched)
                self._first = 0 if self._first == self._count - 1 else self._first + 1
                return batch
            self._end()
        if not self._held:
            return next(self._batches)
        batch = self._ring[self._first]
        self._ring[self._first] = None
        self._first = 0 if self._first == self._count - 1 else self._first + 1
        self._held -= 1
        return batch

    cdef int _fill(self) except -1:
        """Fetch ahead; the end, or an error, comes after the batches that are held."""
        cdef PyObject *fetched
        while self._held < self._count and not self._is_over:
            fetched = Py_TYPE(self._batches).tp_iternext(<PyObject *>self._batches)
            if fetched is NULL:
                self._end()
            else:
                self._ring[(self._first + self._held) % self._count] = <object>fetched
                Py_DECREF(<object>fetched)
                self._held += 1
        return 0

    cdef int _end(self) except -1:
        try:
            end_or_error()
            if self._held:
                self._engine().ends_in(self._held)
            self._batches = NO_BATCHES
        except Exception as error:
            self._batches = raising(error)
        self._is_over = True
        return 0


def raising(error):
    """Return an iterator that raises `error`."""
    raise error
    yield


cdef class Steps:
    """An iterator over the steps of a run, good until the loop is entered again.

    Attributes:
        keep_alive: what is freed with the iterator.
    """

    cdef Engine engine
    cdef object run
    cdef int64_t turn
    cdef object keep_alive
    cdef bint over

    def __cinit__(self, Engine engine not None, run not None, int64_t turn, keep_alive):
        self.engine = engine
        self.run = run
        self.turn = turn
        self.keep_alive = keep_alive

    def __iter__(self):
        return self

    def __next__(self):
        # `engine` has no local name: that would count references at every step
        cdef PyObject *fetched
        while True:
            with critical_section(self.engine):
                if self.engine.turn != self.turn or self.engine.busy:
                    self.refuse()
                self.engine.busy = True
                batches = self.engine.batches  # alive during the fetch, whatever happens in it
                fetched = Py_TYPE(batches).tp_iternext(<PyObject *>batches)
                if fetched is not NULL:
                    batch = <object>fetched
                    Py_DECREF(batch)
                    if self.engine.step < self.engine.quiet_until and (
                        not self.engine.alarm.timed or self.engine.alarm.is_early()
                    ):
                        self.engine.step += 1
                        self.engine.busy = False
                        return batch, QUIET
            if fetched is not NULL:
                return batch, self.take(batch)
            pair = self.without_fetch()
            if pair is not None:
                return pair

    cdef object take(self, batch):
        """Make the step of `batch`; return its events. If that fails, the batch stays in hand."""
        try:
            events = self.engine.make(self.run, self.turn, 1)
        except BaseException as exception:
            if self.engine.turn == self.turn:
                self.engine.in_hand, self.engine.batches = [batch], NO_BATCHES
            self.engine.busy = False
            self.engine.end_body()
            self.run.fail_step(exception, self.turn)
            raise
        self.engine.busy = False
        return events

    cdef object without_fetch(self):
        """Make the step of a batch in hand, or open the next epoch; return a pair or None."""
        self.engine.end_body()
        try:
            if not self.has_ended() or not self.engine.in_hand or self.run.is_between_epochs:
                return self.next_epoch()
            batch = self.engine.in_hand[0]
            return batch, self.make_in_hand(1)
        finally:
            self.engine.busy = False

    cdef bint has_ended(self) except -1:
        """Whether the latest fetch gave nothing since the batches end; False after an error."""
        try:
            end_or_error()
        except BaseException as exception:
            if not self.run.continues_after(exception, self.turn):
                raise
            return False
        return True

    cdef object make_in_hand(self, int64_t count):
        """Make the steps of so many batches in hand; return the events of the last."""
        try:
            return self.engine.make(self.run, self.turn, count)
        except BaseException as exception:
            self.run.fail_step(exception, self.turn)
            raise

    cdef object next_epoch(self):
        """Open the next epoch, or end; return the step of an error that is an event, or None."""
        if self.over:
            raise StopIteration
        try:
            return self.run.next_epoch(self.turn)
        except StopIteration:
            self.over = True
            self.keep_alive = None
            raise

    cdef int refuse(self) except -1:
        """Raise why this iterator may not continue."""
        if self.over:
            raise StopIteration
        if self.engine.busy:
            raise errors.in_use()
        self.run.check(self.turn)
        return 0


@final
cdef class Lists(Steps):
    """An iterator over lists: each ends where an event fires, or at the end of its epoch."""

    cdef object sizes

    def __next__(self):
        while True:
            with critical_section(self.engine):
                if self.engine.turn != self.turn or self.engine.busy or self.over:
                    self.refuse()
                self.engine.busy = True
            try:
                self.run.check(self.turn)
                self.engine.end_body()
                pair = self.next_list()
            finally:
                self.engine.busy = False
            if pair is not None:
                return pair

    cdef object next_list(self):
        cdef Engine engine = self.engine
        cdef int64_t most, size
        if engine.in_hand and self.run.is_between_epochs:
            return self.next_epoch()
        most = self.gather()
        if not most or not engine.in_hand:
            return self.next_epoch()
        size = fitting(self.sizes, min(most, <int64_t>len(engine.in_hand)))
        batches = engine.in_hand if size == len(engine.in_hand) else engine.in_hand[:size]
        return batches, self.make_in_hand(size)

    cdef int64_t gather(self) except -1:
        """Fetch the batches of a list; return how many steps it may have."""
        cdef Engine engine = self.engine
        cdef Conditions conditions = engine.conditions
        cdef list in_hand = engine.in_hand
        cdef int64_t due = engine.agenda.next_due(engine.step)
        cdef int64_t step = engine.step
        cdef int64_t last
        cdef PyObject *fetched
        batches = engine.opened
        fetch = Py_TYPE(batches).tp_iternext
        if conditions.answer and conditions.answered > step:
            due = min(due, conditions.answered)
        if engine.agenda.requests and engine.agenda.agreement is None:
            due = step + 1
        last = step + fitting(self.sizes, min(due, NEVER - 1) - step)
        while step < last:
            if step - engine.step >= len(in_hand):
                fetched = fetch(<PyObject *>batches)
                if fetched is NULL:
                    if self.has_ended():
                        engine.opened = NO_BATCHES  # it is not asked again
                    break
                in_hand.append(<object>fetched)
                Py_DECREF(<object>fetched)
            step += 1
            if step == engine.agenda.epoch_last:
                break
            if conditions.start <= step < conditions.stop and step < last and self.fires(step):
                return step - engine.step
        return last - engine.step

    cdef bint fires(self, int64_t step) except -1:
        """Call the conditions of a step before the list's last; whether the list ends there."""
        cdef Engine engine = self.engine
        cdef Conditions conditions = engine.conditions
        if step <= conditions.answered:
            return False
        try:
            found = conditions.ask(engine.state_at(step, False, False, -1), False)
        except BaseException as exception:
            self.run.fail_step(exception, self.turn)
            raise
        conditions.answered = step
        conditions.answer = found
        return found != 0


cdef int64_t fitting(sizes, int64_t most) except -1:
    """Return the greatest allowed length that is at most `most`; `sizes` end with 1."""
    if isinstance(sizes, int):
        return min(most, <int64_t>sizes)
    for size in sizes:
        if size <= most:
            return size
    return 1


cdef int end_or_error() except -1:
    """Raise the error of a fetch that gave nothing, unless it is the end."""
    if PyErr_Occurred() is NULL:
        return 0
    if not PyErr_ExceptionMatches(StopIteration):
        return -1
    PyErr_Clear()
    return 0


cdef struct TimedStep:
    int64_t step, size, epoch, asked, began, ended  # the last three are clock readings


@final
cdef class Durations:
    """A histogram of durations in nanoseconds; its bins are 3 % wide."""

    cdef readonly int64_t count, total, longest
    cdef readonly int64_t bins[64 << 5]  # 32 from one power of two to the next

    cdef void add(self, int64_t duration) noexcept:
        cdef int power, shift
        frexp(<double>duration, &power)
        shift = max(0, power - 6)
        self.bins[(shift << 5) + (duration >> shift)] += 1
        self.count += 1
        self.total += duration
        self.longest = max(self.longest, duration)


@final
cdef class Timings:
    """What a profile measures, in nanoseconds. A step counts once its body has ended."""

    cdef readonly Durations waits, bodies
    cdef readonly dict costs  # the bodies of each set of events
    cdef readonly int64_t steps, fruitless  # requests that yielded nothing
    cdef int64_t turn  # the number of the iterator that is timed
    cdef TimedStep now  # `began` is -1 between bodies
    cdef object events, memory
    cdef TimedStep *ring  # the last steps, and their events
    cdef list ring_events

    def __cinit__(self, Py_ssize_t last_steps):
        self.waits, self.bodies, self.costs = Durations(), Durations(), {}
        self.now.began = -1
        self.ring_events = [None] * last_steps
        self.memory = bytearray(sizeof(TimedStep) * last_steps)
        self.ring = <TimedStep *><char *>self.memory

    @critical_section
    cdef int end_body(self, int64_t reading, Engine engine) except -1:
        """Count the step whose body ends now, if there is one."""
        cdef int64_t began = self.now.began
        cdef Py_ssize_t place = self.bodies.count % len(self.ring_events)
        if began < 0:
            return 0
        if self.now.size and engine.decided.step == self.now.step == engine.step:
            self.events = engine.decided.events  # the body may have changed them
        self.now.ended = reading
        self.ring[place] = self.now
        self.ring_events[place] = events = self.events
        self.now.began = -1
        self.waits.add(began - self.now.asked)
        self.bodies.add(reading - began)
        self.steps += self.now.size
        cost = self.costs.get(events)
        if cost is None and len(self.costs) < 200:
            cost = self.costs[events] = Durations()
        if cost is not None:
            (<Durations>cost).add(reading - began)
        return 0

    @property
    def began(self):
        """When the current body began; -1 between bodies."""
        return self.now.began

    def last_steps(self):
        """Return the last steps, the oldest first: numbers by name, and the events."""
        cdef int64_t room = len(self.ring_events), end = self.bodies.count
        places = [number % room for number in range(max(0, end - room), end)]
        return [(self.ring[place], self.ring_events[place]) for place in places]


@final
cdef class TimedSteps:
    """An iterator that yields what `steps` yields. It keeps nothing but the time."""

    cdef object steps
    cdef Engine engine
    cdef Timings timings
    cdef int64_t turn

    def __cinit__(self, steps, Engine engine not None, Timings timings not None):
        self.steps, self.engine, self.timings = steps, engine, timings
        timings.end_body(PyTime_PerfCounterRaw(), engine)
        timings.turn += 1
        self.turn = timings.turn

    def __iter__(self):
        return self

    def __next__(self):
        cdef TimedStep now
        cdef PyObject *pair
        cdef int64_t before = self.engine.step
        if self.turn != self.timings.turn:
            return next(self.steps)  # which was replaced, and says so
        now.asked = PyTime_PerfCounterRaw()
        self.timings.end_body(now.asked, self.engine)
        pair = Py_TYPE(self.steps).tp_iternext(<PyObject *>self.steps)
        now.began = PyTime_PerfCounterRaw()
        if pair is NULL:
            self.timings.fruitless += now.began - now.asked
            end_or_error()
            raise StopIteration
        now.step, now.epoch = self.engine.step, self.engine.epoch
        now.size = now.step - before  # 0 if it stands for an exception
        # No interrupt can strike from here on, and lose the pair
        with critical_section(self.timings):
            self.timings.now = now
            self.timings.events = <object>PyTuple_GET_ITEM(<object>pair, 1)
        result = <object>pair
        Py_DECREF(result)
        return result

    def __del__(self):
        if self.turn and self.turn == self.timings.turn:
            self.timings.end_body(PyTime_PerfCounterRaw(), self.engine)
