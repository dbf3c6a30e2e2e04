# cython: language_level=3, cdivision=True, binding=False, auto_pickle=False
# cython: freethreading_compatible=True
"""The steps between decisions, compiled; `_core_py.py` is the same in Python.

In most steps only step triggers, the clock and conditions can have a say. The stepper makes these
on its own, up to the step that `Token.until` names; every other step is a decision of `run.py`. Up
to `Token.quiet_until` nothing is due: such a step is a fetch, an increment and a pair.

The core knows ints, bits and callables. Each event has a place, and its bit is `1 << place`.
"""

from bisect import bisect_left

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.set cimport PySet_Contains, PySet_GET_SIZE
from cpython.time cimport PyTime_PerfCounterRaw
from cython cimport critical_section, freelist
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from . import errors
from .missing import MISSING as _MISSING

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
# How far the coarse clock may be behind, in ns, with plenty to spare
cdef int64_t BEHIND = 4 * min(coarse_resolution(), NEVER >> 3)
cdef object MISSING = _MISSING
cdef int MOST_SETS = 4096  # how many event sets are kept ready
cdef int FIRST = 12  # how many names are compared by identity
cdef int WORD = 64  # how many places have their bits in a word


cdef class NoEvents(frozenset):
    """The set of events of a quiet step: empty, and it answers `in` without hashing."""

    def __contains__(self, name):
        return PySet_GET_SIZE(self) and PySet_Contains(self, name)

    def __repr__(self):
        return "frozenset()"

    def __reduce__(self):
        return frozenset, ()


cdef class EventSet(frozenset):
    """The events of a step at which something is due.

    Asked for a name that the loop does not know, it calls `on_unknown(name)`.
    """

    cdef dict _places  # of all names that are known; None in a set that somebody else made
    cdef tuple _first  # the names at the first places
    cdef uint64_t _bits  # of the places that fit into a word
    cdef object _on_unknown
    cdef list _due  # the places of its names

    def __contains__(self, name):
        cdef Py_ssize_t place
        cdef PyObject *known
        if self._places is None:
            return PySet_Contains(self, name)
        for place in range(PyTuple_GET_SIZE(self._first)):
            # mostly it is the very object that the loop was given: no need to hash it
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

    def __repr__(self):
        return f"EventSet({set(self)!r})"

    def __reduce__(self):
        return frozenset, (list(self),)


cdef NoEvents QUIET = NoEvents()


cdef class EventSets:
    """The event sets of a run, each made when it is first needed, and when names were last due.

    Args:
        names: the names of all events, by place.
        places: the place of each name.
        on_unknown: called with a name that a set is asked for and that is none of these.
    """

    cdef list _names
    cdef dict _places
    cdef tuple _first
    cdef object _on_unknown
    cdef dict _sets
    cdef int64_t *_latest  # by place, the latest step at which the name was due, or -1
    cdef int64_t *_before  # and the one before that

    def __init__(self, list names, dict places, on_unknown):
        self._names = names
        self._places = places
        self._first = tuple(names[:FIRST])
        self._on_unknown = on_unknown
        self._sets = {0: QUIET}
        cdef Py_ssize_t place
        cdef size_t size = (len(names) + 1) * sizeof(int64_t)
        self._latest = <int64_t *>PyMem_Realloc(self._latest, size)
        self._before = <int64_t *>PyMem_Realloc(self._before, size)
        if self._latest is NULL or self._before is NULL:
            raise MemoryError
        for place in range(len(names)):
            self._latest[place] = self._before[place] = -1

    def __dealloc__(self):
        PyMem_Free(self._latest)
        PyMem_Free(self._before)

    cpdef object of(self, bits):
        """The set of the names whose bits are given."""
        events = self._sets.get(bits)
        if events is None:
            if len(self._sets) >= MOST_SETS:
                self._sets = {0: QUIET}
            due = []
            rest = bits
            while rest:
                due.append(rest.bit_length() - 1)
                rest ^= <object>1 << due[-1]
            events = self._sets[bits] = self.make(due)
        return events

    cdef EventSet make(self, list due):
        """A new set of the names at these places."""
        cdef Py_ssize_t place
        cdef list names = self._names
        cdef EventSet events = EventSet.__new__(EventSet, [names[place] for place in due])
        events._due = due
        events._places = self._places
        events._first = self._first
        events._on_unknown = self._on_unknown
        for place in due:
            if place < WORD:
                events._bits |= <uint64_t>1 << place
        return events

    cpdef object mark(self, events, int64_t step):
        """Note that `step` has these events, of which there are some."""
        self.mark_set(<EventSet?>events, step)

    cdef inline int mark_set(self, EventSet events, int64_t step) except -1:
        cdef Py_ssize_t place
        for place in events._due:
            self.mark_place(place, step)
        return 0

    cdef inline void mark_place(self, Py_ssize_t place, int64_t step) noexcept:
        if self._latest[place] != step:
            self._before[place] = self._latest[place]
            self._latest[place] = step

    cpdef int64_t last_step(self, name, int64_t end) except -2:
        """The latest step before `end` at which the name was due; -1 if there is none.

        `end` is the latest step that was handed over, or the one after it.
        """
        cdef Py_ssize_t place = self._places[name]
        cdef int64_t latest = self._latest[place]
        return latest if latest < end else self._before[place]

    def last_steps(self, int64_t end):
        """The same, by name, of all names that were due before `end`."""
        steps = {name: self.last_step(name, end) for name in self._names}
        return {name: step for name, step in steps.items() if step >= 0}


cdef class Clock:
    """Training time in nanoseconds: monotonic, from `start`, on top of what was `saved`."""

    cdef object _tick
    cdef readonly int64_t saved
    cdef readonly bint ticking  # whether it was started
    cdef readonly int64_t launched  # the reading at which it was
    cdef readonly int64_t started  # the same, later by all that it was paused
    cdef readonly object paused  # the reading at which it was stopped, or None
    cdef public int64_t last  # the reading of the latest step, where steps need one

    def __init__(self, tick, int64_t saved):
        self._tick = tick
        self.saved = saved
        self.ticking = False
        self.launched = self.started = 0
        self.last = 0

    cdef inline int64_t read(self) except? -1:
        if self._tick is None:
            return PyTime_PerfCounterRaw()
        return self._tick()

    def tick(self):
        """A reading."""
        return self.read()

    def start(self):
        """Begin to count."""
        self.launched = self.started = self.last = self.read()
        self.ticking = True

    def pause(self):
        """Let training time stand still."""
        self.paused = self.read()

    def go_on(self):
        """Let training time go on."""
        cdef int64_t pause
        if self.paused is not None:
            pause = self.read() - <int64_t>self.paused
            self.started += pause
            self.last += pause
            self.paused = None

    cpdef int64_t elapsed(self, int64_t reading) noexcept:
        """The training time at `reading`."""
        cdef int64_t since = reading - self.started
        return LONGEST if since > LONGEST - self.saved else self.saved + since

    cpdef int64_t now(self) except? -1:
        """The training time now."""
        if not self.ticking:
            return self.saved
        return self.elapsed(self.read() if self.paused is None else <int64_t>self.paused)

    cpdef int64_t reading_at(self, int64_t elapsed) noexcept:
        """The reading at which that much training time has passed."""
        cdef int64_t left = elapsed - self.saved
        return NEVER if left > NEVER - max(self.started, 0) else self.started + left


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

    def __init__(
        self,
        int64_t epoch,
        int64_t global_step,
        int64_t epoch_step,
        bint epoch_end,
        bint training_end,
        int64_t elapsed,
        Clock clock,
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

    cdef LoopState at_training_end(self):
        """The same, for the last step of the run."""
        cdef LoopState state = LoopState.__new__(LoopState)
        state.epoch = self.epoch
        state.global_step = self.global_step
        state.epoch_step = self.epoch_step
        state.epoch_end = self.epoch_end
        state.training_end = True
        state._elapsed = self._elapsed
        state._clock = self._clock
        return state

    cdef tuple _values(self):
        return tuple([getattr(self, name) for name in _FIELDS])

    def __eq__(self, other):
        if not isinstance(other, LoopState):
            return NotImplemented
        return self._values() == (<LoopState>other)._values()

    def __hash__(self):
        return hash(self._values())

    def __reduce__(self):
        from .state import loop_state  # not of this core: it is loaded as that of the running one

        return loop_state, (*self._values()[:-1], round(self.elapsed * 1e9))

    def __repr__(self):
        values = ", ".join([f"{name}={value!r}" for name, value in zip(_FIELDS, self._values())])
        return f"LoopState({values})"


cdef struct Entry:
    int64_t due
    Py_ssize_t number


cdef class Agenda:
    """Numbered things by when they are due: a binary heap. One more entry is never due."""

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
    """Due at every `period`-th step from `first` on, or at `points` where there is no period."""

    cdef Py_ssize_t place
    cdef int64_t period
    cdef int64_t first
    cdef tuple points
    cdef int64_t start
    cdef int64_t stop
    cdef int64_t origin  # the global step that counts as 0
    cdef bint takes_decision  # whether a step at which it is due does
    cdef EventSet events  # the set of a step at which this alone is due

    def __init__(
        self,
        Py_ssize_t place,
        int64_t period,
        int64_t first,
        tuple points,
        int64_t start,
        int64_t stop,
    ):
        self.place = place
        self.period = period
        self.first = first
        self.points = points
        self.start = start
        self.stop = stop
        self.origin = 0
        self.takes_decision = False
        self.events = None

    cdef int64_t due_from(self, int64_t step) except -1:
        """The first global step from `step` on at which this is due."""
        cdef int64_t count = max(step, self.start) - self.origin
        cdef int64_t rest
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

    cdef int64_t due_after(self, int64_t step) except -1:
        """The global step at which this is due again, after it was at `step`."""
        if not self.period:
            return self.due_from(step + 1)
        return NEVER if self.period >= self.stop - step else step + self.period


cdef class Triggers:
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

    cdef Py_ssize_t _in_epochs  # the number of the first that counts anew in each epoch
    cdef list _triggers
    cdef Agenda _agenda

    def __init__(
        self,
        list rows,
        list launch_rows,
        list epoch_rows,
        decision_bits,
        int64_t launch,
        int64_t step,
        int64_t epoch_start,
    ):
        cdef StepTrigger trigger
        self._in_epochs = len(rows) + len(launch_rows)
        self._triggers = [StepTrigger(*row) for row in (*rows, *launch_rows, *epoch_rows)]
        for trigger in self._triggers:
            trigger.takes_decision = bool(decision_bits >> <object>trigger.place & 1)
        for trigger in self._triggers[len(rows) :]:
            trigger.origin = launch
        self.schedule(step, epoch_start)

    cpdef object schedule(self, int64_t step, int64_t epoch_start):
        """Begin at `step`, in an epoch whose first step is `epoch_start`."""
        cdef Py_ssize_t number
        cdef StepTrigger trigger
        cdef Agenda agenda = make_agenda()
        for number, trigger in enumerate(self._triggers):
            if number >= self._in_epochs:
                trigger.origin = epoch_start
            agenda.push(trigger.due_from(step), number)
        self._agenda = agenda

    def next_epoch(self, int64_t step, int64_t epoch_start):
        """The same, where all that does not count in epochs goes on."""
        if self._in_epochs < len(self._triggers):
            self.schedule(step, epoch_start)

    cpdef int64_t next_due(self) noexcept:
        """The next step at which any is due."""
        return self._agenda.heap[0].due

    cdef StepTrigger only_due_at(self, int64_t step):
        """The only one that is due at `step`, before which none is; None if there are more."""
        cdef Entry *heap = self._agenda.heap
        cdef Py_ssize_t size = self._agenda.size
        if (size > 1 and heap[1].due <= step) or (size > 2 and heap[2].due <= step):
            return None
        return <StepTrigger>self._triggers[heap[0].number]

    cpdef object bits_at(self, int64_t step):
        """The bits of those that are due at `step`, before which none is."""
        cdef Agenda agenda = self._agenda
        cdef Py_ssize_t entry
        if agenda.heap[0].due > step:
            return 0
        cdef object bits = 0
        cdef list entries = [0]
        for entry in entries:
            if entry < agenda.size and agenda.heap[entry].due <= step:
                bits |= <object>1 << (<StepTrigger>self._triggers[agenda.heap[entry].number]).place
                entries.append(2 * entry + 1)
                entries.append(2 * entry + 2)
        return bits

    cpdef object advance(self, int64_t step):
        """Let `step` be done. Where that is interrupted, `schedule` makes up for it."""
        cdef Py_ssize_t number
        cdef Agenda agenda = self._agenda
        while agenda.heap[0].due <= step:
            number = agenda.heap[0].number
            agenda.replace((<StepTrigger>self._triggers[number]).due_after(step), number)


cdef class Condition:
    """A function that is asked at each step from `start` up to `stop`."""

    cdef Py_ssize_t place
    cdef object function
    cdef int64_t start
    cdef int64_t stop

    def __init__(self, Py_ssize_t place, function, int64_t start, int64_t stop):
        self.place = place
        self.function = function
        self.start = start
        self.stop = stop


cdef class Conditions:
    """The condition functions of a run, those of `stop_when` first.

    Args:
        rows: those of events.
        stop_rows: those of `stop_when`.
        blame: called with what a function raised and its place, before that is raised on.
    """

    cdef list _events
    cdef list _stops
    cdef object _blame
    cdef readonly int64_t start
    cdef readonly int64_t stop
    cdef LoopState asked  # what those of events were given last

    def __init__(self, list rows, list stop_rows, blame):
        self._events = [Condition(*row) for row in rows]
        self._stops = [Condition(*row) for row in stop_rows]
        self._blame = blame
        self.start = min([row[2] for row in (*rows, *stop_rows)], default=NEVER)
        self.stop = max([row[3] for row in (*rows, *stop_rows)], default=0)

    def ask(self, LoopState state, bint stops):
        """The bits of those that hold, and the state that those of events were given.

        `stops` says that `stop_when` ends the run at this step, whatever its functions say.
        """
        found = self.holding(state, stops)
        return found, self.asked

    cdef object holding(self, LoopState state, bint stops):
        """The bits of those that hold; `asked` is the state that those of events were given."""
        bits = self._holding(self._stops, state) if self._stops else 0
        if (bits or stops) and not state.training_end:
            state = state.at_training_end()
        others = self._holding(self._events, state)
        self.asked = state
        return bits | others if bits else others

    cdef object _holding(self, list conditions, LoopState state):
        cdef Condition condition
        cdef Py_ssize_t place = 0
        cdef int64_t step = state.global_step
        cdef bint holds
        bits = 0
        try:
            for condition in conditions:
                place = condition.place
                holds = condition.start <= step < condition.stop
                if holds and condition.function(state):
                    bits |= <object>1 << place
        except Exception as exception:
            failure = errors.not_stop(exception)
            self._blame(failure, place)
            raise failure
        return bits


cdef class Lookahead:
    """Fetches one batch ahead. It ends before the last batch, which it then holds.

    Attributes:
        held: the batch that was fetched ahead, or MISSING.
    """

    cdef object _batches
    cdef public object held

    def __init__(self, batches not None):
        self._batches = batches
        self.held = MISSING

    def __iter__(self):
        return self

    def __next__(self):
        with critical_section(self):
            if self.held is MISSING:
                self.held = self.fetch()
            following = self.fetch()
            batch, self.held = self.held, following
            return batch

    cdef inline object fetch(self):
        batches = self._batches
        cdef PyObject *fetched = Py_TYPE(batches).tp_iternext(<PyObject *>batches)
        if fetched is NULL:
            end_or_error()
            raise StopIteration
        batch = <object>fetched
        Py_DECREF(batch)
        return batch


cdef class Token:
    """Says which iterator is the current one, and how far it goes without a decision.

    Attributes:
        quiet_until: the last step that is known to be quiet.
        until: the last step before the next decision.
        over: whether the iterator has come to its end, where it stays.
    """

    cdef public int64_t quiet_until
    cdef public int64_t until
    cdef bint over

    def __cinit__(self):
        self.set_back()

    cpdef object set_back(self):
        """Let the next step be a decision."""
        self.quiet_until = self.until = -1


cdef class Stepper:
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

    cdef readonly Triggers triggers
    cdef readonly Conditions conditions
    cdef readonly EventSets sets
    cdef readonly Clock clock
    cdef readonly bint timed
    cdef object decision_bits
    cdef bint has_decision_bits
    cdef public LoopState state
    cdef public int64_t step
    cdef public int64_t size
    cdef public int64_t epoch
    cdef public int64_t epoch_start
    cdef public int64_t epoch_end
    cdef public int64_t training_end
    cdef public Token token
    cdef public object batches
    cdef public list queue
    cdef public object reading
    cdef public tuple answers
    cdef int64_t _next_reading
    cdef int64_t coarse_until  # up to where the coarse clock will do
    cdef bint busy  # a step is being made: what it calls may not ask for another

    def __init__(
        self,
        Triggers triggers not None,
        Conditions conditions not None,
        EventSets sets not None,
        Clock clock not None,
        bint timed,
        decision_bits,
        LoopState state not None,
    ):
        self.triggers = triggers
        self.conditions = conditions
        self.sets = sets
        self.clock = clock
        self.timed = timed
        self.decision_bits = decision_bits
        self.has_decision_bits = bool(decision_bits)
        self.state = state
        self.step = state.global_step
        self.size = 0
        self.epoch = state.epoch + state.epoch_end
        self.epoch_start = state.global_step + 1
        if not state.epoch_end:
            self.epoch_start -= state.epoch_step + 1
        self.epoch_end = self.training_end = -1
        self.token = Token.__new__(Token)
        self.batches = iter(())
        self.queue = []
        self.reading = None
        self.answers = None
        self.next_reading = NEVER
        self.busy = False

    @property
    def next_reading(self):
        return self._next_reading

    @next_reading.setter
    def next_reading(self, int64_t reading):
        self._next_reading = reading
        self.coarse_until = reading - BEHIND if reading > BEHIND else 0
        if self.clock._tick is not None or self.coarse_until <= self.clock.last:
            self.coarse_until = 0

    cpdef LoopState state_at(
        self, int64_t step, bint epoch_end, bint training_end, int64_t elapsed
    ):
        """The LoopState of a step of the epoch, at so many nanoseconds of training time."""
        cdef LoopState state = LoopState.__new__(LoopState)
        state.epoch = self.epoch
        state.global_step = step
        state.epoch_step = step - self.epoch_start
        state.epoch_end = epoch_end
        state.training_end = training_end
        state._elapsed = elapsed
        state._clock = self.clock
        return state

    @critical_section
    def latest_state(self):
        """The LoopState of the latest step, the same object while that step lasts."""
        cdef int64_t step = self.step
        if self.state.global_step != step:
            self.state = self.state_at(
                step,
                step == self.epoch_end,
                step == self.training_end,
                self.elapsed_at(self.clock.last),
            )
        return self.state

    cdef inline int64_t elapsed_at(self, int64_t reading) noexcept:
        """The training time of a step; -1 where steps do not read the clock."""
        return self.clock.elapsed(reading) if self.timed else -1

    @critical_section
    def steps(self, run, keep_alive):
        """A new iterator, in place of the current one. It keeps an object alive till its end."""
        cdef Steps steps = Steps.__new__(Steps, self, run)
        steps.keep_alive = keep_alive
        steps.token = self._enter()
        return steps

    @critical_section
    def lists(self, run, sizes, keep_alive):
        """A new iterator over lists of batches."""
        cdef Lists lists = Lists.__new__(Lists, self, run)
        lists.keep_alive = keep_alive
        lists.sizes = sizes
        lists.most = sizes if isinstance(sizes, int) else sizes[0]
        lists.token = self._enter()
        return lists

    cdef Token _enter(self):
        if self.busy:
            raise errors.in_use()
        self.token.set_back()
        self.token = Token.__new__(Token)
        return self.token

    cdef inline bint is_early(self) noexcept:
        """Whether the coarse clock says that no time has come; its reading is the step's."""
        cdef int64_t reading
        if not self.coarse_until:
            return False
        reading = coarse_clock()
        if reading >= self.coarse_until:
            return False
        if reading > self.clock.last:  # it may lag behind
            self.clock.last = reading
        return True

    cdef inline bint is_quiet(self, Token token, int64_t step, int64_t *reading) except -1:
        """Whether nothing is due at `step`; what the clock says there, where steps need it."""
        if self.timed:
            reading[0] = coarse_clock() if self.coarse_until else NEVER
            if reading[0] >= self.coarse_until:
                reading[0] = self.clock.read()
            reading[0] = max(reading[0], self.clock.last)  # the coarse clock lags behind
            if reading[0] >= self._next_reading:
                return False
        return step <= token.quiet_until

    cdef object fire(self, Token token, int64_t step, int64_t size, int64_t reading):
        """Make a step at which step triggers and conditions alone have a say; return its events.

        None where it takes a decision, and nothing is done.
        """
        cdef Conditions conditions = self.conditions
        cdef Triggers triggers = self.triggers
        cdef StepTrigger only = None
        cdef LoopState asked = None
        cdef object found = 0
        cdef object bits = 0
        if step > token.until or (self.timed and reading >= self._next_reading):
            return None
        if triggers.next_due() <= step:
            only = triggers.only_due_at(step)
            if only is None:
                bits = triggers.bits_at(step)
                if self.has_decision_bits and bits & self.decision_bits:
                    return None
            elif only.takes_decision:
                return None
        if conditions.start <= step < conditions.stop:
            asked = self.state_at(step, False, False, self.elapsed_at(reading))
            found = conditions.holding(asked, False)
            if self.has_decision_bits and found & self.decision_bits:
                self.answers = found, conditions.asked
                return None
        if found:
            if only is not None:
                bits = <object>1 << only.place
                only = None
            events = self.sets.of(bits | found)
        elif only is not None:
            if only.events is None:
                only.events = self.sets.make([only.place])
            events = only.events
        else:
            events = self.sets.of(bits) if bits else QUIET
        if token is not self.token:  # the loop was closed or restarted in a condition
            return None
        triggers.advance(step)
        token.quiet_until = min(triggers.next_due() - 1, token.until)
        if step + 1 < conditions.stop:
            token.quiet_until = min(token.quiet_until, max(step, conditions.start - 1))
        if only is not None:
            self.sets.mark_place(only.place, step)
        elif events is not QUIET:
            self.sets.mark_set(<EventSet>events, step)
        if asked is not None:
            self.state = asked
        if self.timed:
            self.clock.last = reading
        self.step = step
        self.size = size
        return events


cdef class Steps:
    """An iterator on a run, good until the run is entered again."""

    cdef Stepper stepper
    cdef object run
    cdef object sizes  # of lists; None where the steps are single ones
    cdef Token token
    cdef object keep_alive

    def __cinit__(self, Stepper stepper not None, run not None):
        self.stepper = stepper
        self.run = run

    def __iter__(self):
        return self

    def __next__(self):
        # `stepper` is not given a local name: that would count references at every step
        cdef PyObject *fetched
        with critical_section(self.stepper):
            if self.stepper.step >= self.token.until or self.stepper.busy:
                self.begin_decision()
            else:
                self.stepper.busy = True
                batches = self.stepper.batches  # alive during the fetch, whatever happens in it
                fetched = Py_TYPE(batches).tp_iternext(<PyObject *>batches)
                if fetched is NULL:
                    self.end_fetch()
                else:
                    batch = <object>fetched
                    Py_DECREF(batch)
                    if self.stepper.step < self.token.quiet_until and (
                        not self.stepper.timed or self.stepper.is_early()
                    ):
                        self.stepper.step += 1
                        self.stepper.busy = False
                        return batch, QUIET
                    pair = self.hand_over(batch)
                    if pair is not None:
                        return pair
        return self.decide()

    cdef object hand_over(self, batch):
        """A step at which the clock, triggers and conditions may have a say.

        None where it takes a decision, with the batch in the queue.
        """
        cdef Stepper stepper = self.stepper
        cdef Token token = self.token
        cdef int64_t step = stepper.step + 1
        cdef int64_t reading = 0
        try:
            if stepper.is_quiet(token, step, &reading):
                if stepper.timed:
                    stepper.clock.last = reading
                stepper.step = step
                stepper.busy = False
                return batch, QUIET
            events = stepper.fire(token, step, 1, reading)
        except BaseException as exception:
            stepper.queue = [batch]
            stepper.busy = False
            self.run.fail_step(token, exception)
            raise
        if events is not None:
            stepper.busy = False
            return batch, events
        stepper.queue = [batch]
        if stepper.timed:
            stepper.reading = reading
        return None

    cdef int begin_decision(self) except -1:
        """Mark the next step as the one that is being made."""
        if self.token.over:
            raise StopIteration
        if self.stepper.busy:
            raise errors.in_use()
        self.stepper.busy = True
        return 0

    cdef int end_fetch(self) except -1:
        """A fetch gave no batch, but an end, or an error, after which the run may go on."""
        try:
            end_or_error()
            self.stepper.batches = iter(())
        except BaseException as exception:
            try:
                if not self.run.goes_on_after_fetch(self.token, exception):
                    raise
            except BaseException:
                self.stepper.busy = False
                raise
        return 0

    cdef object decide(self):
        """A step that takes a decision, or the first of an epoch that was opened.

        It is made outside of the critical section: that it is marked keeps other threads out.
        """
        cdef Token token = self.token
        cdef int64_t in_hand
        token.set_back()  # until it is made, whatever interrupts it
        try:
            if self.sizes is None:
                in_hand = self.run.fetch(token)
            else:
                in_hand = self.run.gather(token, self.sizes)
            if in_hand > 0:
                return self.run.hand_over(token, self.sizes, in_hand)
            token.over = in_hand == 0
        finally:
            with critical_section(self.stepper):
                self.stepper.busy = False
                if token.over:
                    self.keep_alive = None
        if token.over:
            raise StopIteration
        return next(self)  # an epoch was opened


cdef class Lists(Steps):
    """An iterator over lists of a run's batches."""

    cdef int64_t most

    def __next__(self):
        cdef int64_t size
        with critical_section(self.stepper):
            size = self.size_before_decision()
            if size:
                pair = self.gather(size)
                if pair is not None:
                    return pair
            else:
                self.begin_decision()
        return self.decide()

    cdef int64_t size_before_decision(self) except -1:
        """The size of a list whose steps take no decision; 0 where there is none."""
        cdef Stepper stepper = self.stepper
        cdef int64_t last
        if stepper.busy or stepper.step >= self.token.until:
            return 0
        last = stepper.step + min(self.most, NEVER - max(stepper.step, 0))
        last = min(last, stepper.triggers.next_due())
        if last > self.token.until or (
            stepper.conditions.start <= last and stepper.step < stepper.conditions.stop
        ):
            return 0
        return fitting(self.sizes, last - stepper.step)

    cdef object gather(self, int64_t size):
        """A list of so many batches, whose steps take no decision, but for the time.

        None where there has to be one, with what was fetched in the queue.
        """
        cdef Stepper stepper = self.stepper
        cdef Token token = self.token
        cdef list gathered = list_with_room(min(size, 4096))
        cdef int64_t step = stepper.step + size
        cdef int64_t reading = 0
        cdef bint fetching = True
        cdef PyObject *fetched
        cdef iternextfunc fetch
        batches = stepper.batches
        fetch = Py_TYPE(batches).tp_iternext
        stepper.busy = True
        try:
            while len(gathered) < size:
                fetched = fetch(<PyObject *>batches)
                if fetched is NULL:
                    end_or_error()
                    stepper.batches = iter(())
                    break
                gathered.append(<object>fetched)
                Py_DECREF(<object>fetched)
            else:
                fetching = False
                if stepper.is_quiet(token, step, &reading):
                    if stepper.timed:
                        stepper.clock.last = reading
                    stepper.step = step
                    stepper.size = size
                    stepper.busy = False
                    return gathered, QUIET
                events = stepper.fire(token, step, size, reading)
                if events is not None:
                    stepper.busy = False
                    return gathered, events
        except BaseException as exception:
            stepper.queue = gathered
            try:
                if not fetching:
                    self.run.fail_step(token, exception)
                    raise
                if not self.run.goes_on_after_fetch(token, exception):
                    raise
            except BaseException:
                stepper.busy = False
                raise
            return None
        stepper.queue = gathered
        if not fetching and stepper.timed:
            stepper.reading = reading
        return None


cpdef int64_t fitting(sizes, int64_t most) except -1:
    """The greatest of `sizes` (descending, the last is 1) that is within `most`.

    Where `sizes` is one number, all lengths up to it are allowed.
    """
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
