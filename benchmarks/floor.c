/* The floor: iterators that do no more than any iterator over batches and events must do.

Floor compares the number of its steps with a limit, fetches a batch, counts it and yields a new pair.
The events are always the same. FloorWithClock also reads a coarse clock in each step and compares the
reading with a limit. Both end at a limit. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <time.h>
#endif

typedef struct {
    PyObject_HEAD
    PyObject *source; /* an iterator */
    PyObject *events;
    iternextfunc fetch;
    long long steps;
    long long max_steps;
    int64_t end_time; /* nanoseconds of the coarse clock */
} Floor;

static int64_t
coarse_time(void)
{
#ifdef _WIN32
    return (int64_t)GetTickCount64() * 1000000;
#else
    struct timespec now;
#ifdef CLOCK_MONOTONIC_COARSE
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
#else
    clock_gettime(CLOCK_MONOTONIC, &now);
#endif
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
#endif
}

static inline PyObject *
next_pair(Floor *self, int with_clock)
{
    PyObject *batch, *pair;

    if (self->steps >= self->max_steps) {
        return NULL;
    }
    batch = self->fetch(self->source);
    if (batch == NULL) {
        return NULL;
    }
    self->steps++;
    pair = with_clock && coarse_time() >= self->end_time ? NULL : PyTuple_New(2);
    if (pair == NULL) {
        Py_DECREF(batch);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, batch);
    Py_INCREF(self->events);
    PyTuple_SET_ITEM(pair, 1, self->events);
    return pair;
}

static PyObject *
floor_next(PyObject *self)
{
    return next_pair((Floor *)self, 0);
}

static PyObject *
floor_with_clock_next(PyObject *self)
{
    return next_pair((Floor *)self, 1);
}

/* Floor(source, events, max_steps) */
static PyObject *
floor_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *source, *events;
    long long max_steps;
    Floor *self;

    if (!PyArg_ParseTuple(args, "OOL", &source, &events, &max_steps)) {
        return NULL;
    }
    source = PyObject_GetIter(source);
    if (source == NULL) {
        return NULL;
    }
    self = (Floor *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(source);
        return NULL;
    }
    Py_INCREF(events);
    self->source = source;
    self->events = events;
    self->fetch = Py_TYPE(source)->tp_iternext;
    self->max_steps = max_steps;
    self->end_time = INT64_MAX;
    return (PyObject *)self;
}

static int
floor_traverse(PyObject *object, visitproc visit, void *arg)
{
    Floor *self = (Floor *)object;

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->source);
    Py_VISIT(self->events);
    return 0;
}

static void
floor_dealloc(PyObject *object)
{
    Floor *self = (Floor *)object;
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    Py_XDECREF(self->source);
    Py_XDECREF(self->events);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyType_Slot floor_slots[] = {
    {Py_tp_new, floor_new},
    {Py_tp_traverse, floor_traverse},
    {Py_tp_dealloc, floor_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, floor_next},
    {0, NULL},
};

static PyType_Slot floor_with_clock_slots[] = {
    {Py_tp_new, floor_new},
    {Py_tp_traverse, floor_traverse},
    {Py_tp_dealloc, floor_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, floor_with_clock_next},
    {0, NULL},
};

static PyType_Spec floor_spec = {
    "floor.Floor", sizeof(Floor), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, floor_slots,
};

static PyType_Spec floor_with_clock_spec = {
    "floor.FloorWithClock", sizeof(Floor), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    floor_with_clock_slots,
};

static int
add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);
    int result = type == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)type);

    Py_XDECREF(type);
    return result;
}

static int
floor_exec(PyObject *module)
{
    if (add_type(module, &floor_spec) < 0) {
        return -1;
    }
    return add_type(module, &floor_with_clock_spec);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, floor_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef floor_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "floor",
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit_floor(void)
{
    return PyModuleDef_Init(&floor_module);
}
