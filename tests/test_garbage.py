"""Loops are freed with all that they refer to, by reference counts or the garbage collector."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cores import CORES
from dloop import Event, Loop, LoopEvents, LoopState
from interpreter import CPYTHON, needs_reference_counts

pytestmark = pytest.mark.usefixtures("uncompiled", "small_collections")


class Source:
    """A loader; `held` may refer to anything."""

    held: Any = None

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class SizedSource(Source):
    def __len__(self) -> int:
        return 5


class CalledSource:
    held: Any = None

    def __call__(self) -> Iterator[int]:
        return iter(range(5))


class OnceSource:
    held: Any = None

    def __iter__(self) -> OnceSource:
        return self

    def __next__(self) -> int:
        return 0


KINDS: list[Callable[[], Any]] = [Source, SizedSource, CalledSource, OnceSource]
EVENTS = {
    "Steps": Event(every_n_steps=2) | LoopEvents.TRAINING_END,
    "Timer": Event(every_n_seconds=3600),
    "Condition": Event(lambda state: state.elapsed < 0),
}


def leave_unused(loop: Loop[Any]) -> None:
    assert loop.state.global_step == -1


def leave_in_the_middle(loop: Loop[Any]) -> None:
    for _, events in loop:
        if "Steps" in events:
            break


def leave_and_enter_again(loop: Loop[Any]) -> None:
    old = iter(loop)
    next(old)
    leave_in_the_middle(loop)


def keep_a_pair_and_a_state(loop: Loop[Any]) -> None:
    kept.append((next(iter(loop)), loop.state))


def finish(loop: Loop[Any]) -> None:
    assert len(list(loop)) == 5


def restart(loop: Loop[Any]) -> None:
    leave_in_the_middle(loop)
    loop.restart()
    leave_in_the_middle(loop)


def close(loop: Loop[Any]) -> None:
    with loop:
        leave_in_the_middle(loop)


def fail(loop: Loop[Any]) -> None:
    try:
        for _ in loop:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


kept: list[Any] = []
WAYS = [
    *[leave_unused, leave_in_the_middle, leave_and_enter_again, keep_a_pair_and_a_state],
    *[finish, restart, close, fail],
]


@needs_reference_counts
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("events", [{}, EVENTS], ids=["no events", "events"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", WAYS)
def test_deleting_a_loop_frees_its_source_at_once(
    leave: Callable[[Loop[Any]], None], kind: Callable[[], Any], events: dict[str, Any]
) -> None:
    events = {**events, "Steps": Event(every_n_steps=2)}
    source = kind()
    reference = weakref.ref(source)
    loop = Loop(source, events, max_steps=5)
    leave(loop)
    del source
    assert reference() is not None, "the loop refers to its source"
    del loop
    assert reference() is None
    kept.clear()


@needs_reference_counts
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("kind", KINDS)
def test_an_iterator_keeps_the_source_of_its_deleted_loop_until_it_is_deleted(
    kind: Callable[[], Any],
) -> None:
    source = kind()
    reference = weakref.ref(source)
    iterator = iter(Loop(source, EVENTS, max_steps=5))
    del source
    assert len([batch for batch, _ in iterator]) == 5
    del iterator
    assert reference() is None


@needs_reference_counts
@pytest.mark.usefixtures("no_collector")
def test_deleting_a_loop_in_the_middle_of_a_run_closes_its_generator() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append("closed")

    loop = Loop(source, EVENTS, max_epochs=2)
    leave_in_the_middle(loop)
    assert closed == []
    del loop
    assert closed == ["closed"]


@needs_reference_counts
@pytest.mark.usefixtures("no_collector")
def test_deleting_a_loop_frees_conditions_and_its_last_state_the_clock() -> None:
    class Callee:
        def __call__(self, state: LoopState | None = None) -> float:
            return 0

    parts = [Callee() for _ in range(3)]
    references = [weakref.ref(part) for part in parts]
    loop = Loop(
        range(5),
        {"Steps": Event(parts[0], every_n_steps=2)},
        max_steps=5,
        stop_when=Event(parts[1]),
        clock=parts[2],
    )
    leave_in_the_middle(loop)
    state = loop.state
    del parts, loop
    assert [reference() for reference in references[:2]] == [None, None]
    assert state.elapsed == 0
    del state
    assert references[2]() is None


def cycle_by_the_source(source: Any) -> Loop[Any]:
    loop = Loop(source, EVENTS, max_steps=5)
    source.held = loop
    return loop


def cycle_by_an_iterator(source: Any) -> Loop[Any]:
    loop = Loop(source, EVENTS, max_steps=5)
    source.held = iter(loop)
    return loop


def cycle_by_a_condition(source: Any) -> Loop[Any]:
    loop: Loop[Any] = Loop(
        source, {"Steps": Event(lambda state: loop.stop_reason is not None)}, max_steps=5
    )
    return loop


def cycle_by_stop_when(source: Any) -> Loop[Any]:
    loop: Loop[Any] = Loop(
        source, EVENTS, max_steps=5, stop_when=Event(lambda state: loop.global_step > 9)
    )
    return loop


def cycle_by_the_clock(source: Any) -> Loop[Any]:
    loop: Loop[Any] = Loop(source, EVENTS, max_steps=5, clock=lambda: loop.global_step)
    return loop


def cycle_by_a_subclass(source: Any) -> Loop[Any]:
    class Own(Loop[Any]):
        pass

    loop = Own(source, EVENTS, max_steps=5)
    source.held = loop
    return loop


CYCLES = [
    *[cycle_by_the_source, cycle_by_an_iterator, cycle_by_a_condition],
    *[cycle_by_stop_when, cycle_by_the_clock, cycle_by_a_subclass],
]


@pytest.mark.parametrize("taken", [0, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", CYCLES)
def test_a_loop_in_a_reference_cycle_is_collected(
    tie: Callable[[Any], Loop[Any]], kind: Callable[[], Any], taken: int
) -> None:
    source = kind()
    reference = weakref.ref(source)
    loop = tie(source)
    for _ in islice(source.held if tie is cycle_by_an_iterator else loop, taken):
        pass
    del loop, source
    gc.collect()
    assert reference() is None


def test_a_batch_that_refers_to_the_loop_is_collected() -> None:
    class Batch:
        loop: Any = None

    batches = [Batch(), Batch(), Batch()]
    references = [weakref.ref(batch) for batch in batches]
    loop = Loop(partial(iter, batches), {"E": Event(every_n_steps=1)}, max_steps=9)
    for batch in batches:
        batch.loop = loop
    for batch, _ in loop:
        if batch is batches[1]:
            break
    del loop, batch, batches
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


# In separate processes, where nothing else allocates memory


def measure(core: str, program: str) -> Any:
    """Run the program in a process with this core; return what it prints as JSON."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([tests, *(entry for entry in sys.path if entry)])
    text = f"CORE = {core!r}\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MANY_LOOPS = """
import gc, json, sys
from cores import use_core
from dloop import Event, Loop, LoopError, LoopEvents

data = [0, 1, 2]
timed = {"Timer": Event(every_n_seconds=3600), "Time": Event(at_time=[1, 9])}
events = {"a": Event(every_n_steps=2) | LoopEvents.TRAINING_END, "b": Event(lambda state: True)}

def wrong(state):
    raise ValueError

def once(n):
    kind = n % 5
    if kind == 0:
        for batch, due in Loop(data, events, max_epochs=1):
            "a" in due
    elif kind == 1:
        for batch, due in Loop(lambda: iter(data), {**events, **timed}, max_steps=5):
            if "a" in due:
                break
    elif kind == 2:
        loop = Loop(data, {"c": Event(wrong)}, max_steps=5)
        try:
            list(loop)
        except ValueError:
            pass
        try:
            iter(loop)
        except LoopError:
            pass
    elif kind == 3:
        with Loop(iter(data), max_steps=2, lookahead=True) as loop:
            states = [loop.state for _ in loop]
            repr(states[0])
    else:
        loop = Loop(data, max_steps=2, stop_when=Event(at_step=0))
        loop.restart()
        list(loop)

def run(count):
    for n in range(count):
        once(n)
    gc.collect()
    return sys.getallocatedblocks()

with use_core(CORE):
    run(1_000)
    before = run(1_000)
    after = run(100_000)
print(json.dumps(after - before))
"""

MANY_STEPS = """
import gc, itertools, json, sys
from cores import use_core
from dloop import Event, Loop

steps = 10_000_000
batch = object()
events = {"Thousand": Event(every_n_steps=1000), "Last": Event(at_step=steps - 1)}
blocks, thousands, wrong, last = [], 0, 0, None
with use_core(CORE):
    loop = Loop(lambda: itertools.repeat(batch), events, max_steps=steps)
    for handed, due in loop:
        if due:
            if "Thousand" in due:
                thousands += 1
                state = loop.state
                wrong += state.global_step != thousands * 1000 - 1
                wrong += state.epoch_step != state.global_step
                if thousands in (1000, 9999):
                    del state
                    gc.collect()
                    blocks.append(sys.getallocatedblocks())
            if "Last" in due:
                last = loop.global_step
print(json.dumps({
    "grown": blocks[1] - blocks[0],
    "thousands": thousands,
    "wrong": wrong,
    "last": last,
    "global_step": loop.global_step,
    "epoch": loop.epoch,
    "same": handed is batch,
    "stop_reason": loop.stop_reason,
}))
"""

MANY_EPOCHS = """
import gc, json, sys
from cores import use_core
from dloop import Event, Loop, LoopEvents

blocks, ends, fired = [], 0, 0
seconds = iter(range(10**9))
events = {
    "Epochs": Event(every_n_epochs=10),
    "Timer": Event(every_n_seconds=7),
    "Condition": Event(lambda state: state.epoch_step == 1),
}
with use_core(CORE):
    loop = Loop(lambda: [0, 1, 2], events, max_epochs=100_000, clock=seconds.__next__)
    for _, due in loop:
        if LoopEvents.EPOCH_END in due:
            ends += 1
            if ends in (10_000, 99_000):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
        fired += ("Epochs" in due) + ("Timer" in due) + ("Condition" in due)
print(json.dumps({
    "grown": blocks[1] - blocks[0],
    "ends": ends,
    "fired": fired,
    "global_step": loop.global_step,
    "elapsed": loop.state.elapsed,
}))
"""


EVERY_WAY = """
import copy, gc, itertools, json, os, pickle, signal, sys, sysconfig, tempfile, warnings
from cores import use_core
from dloop import Event, Loop, LoopError, LoopEvents, StateError

warnings.simplefilter("ignore")
folder = tempfile.mkdtemp()
path = os.path.join(folder, "run.json")
clock = itertools.count().__next__
EVENTS = {
    "Steps": Event(every_n_steps=2) | LoopEvents.TRAINING_END,
    "Epochs": Event(every_n_epochs=2),
    "Points": Event(at_step=[1, 4], at_time=[2, 5], from_step=1),
    "Timer": Event(every_n_seconds=3),
    ("a", 1): Event(lambda state: state.epoch_step == 1, per_epoch=True, at_step=0),
}

class Stateful:
    at = 0
    def __iter__(self):
        while self.at < 4:
            self.at += 1
            yield [self.at]
        self.at = 0
    def __len__(self):
        return 4
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]

def fails(after):
    yield from ([n] for n in range(after))
    raise OSError("disk")

def make(source=None, **arguments):
    limit = {} if "max_steps" in arguments else {"max_epochs": 2}
    source = (lambda: ([n] for n in range(4))) if source is None else source
    return Loop(source, EVENTS, clock=clock, **{**limit, **arguments})

def refused(kind, ask, *arguments, **named):
    try:
        ask(*arguments, **named)
    except kind:
        return
    raise AssertionError("nothing was raised")

def steps():
    for batch, due in make():
        "Steps" in due, "unknown" in due, repr(due), due | {1}, hash(due)

def quiet_steps():
    rare = {"Rare": Event(every_n_steps=10), "Late": Event(at_time=10**6)}
    for events in ({}, rare):
        list(Loop(([n] for n in range(9)), events, max_steps=9))
        list(Loop(([n] for n in range(9)), rare, max_steps=9, clock=clock).chunks(4))

def lists():
    loop = make()
    for batches, due in loop.chunks(3):
        "Steps" in due
    for batches, due in make().chunks((2, 1)):
        break

def left_and_entered_again():
    loop = make()
    older = iter(loop)
    next(older)
    for _ in zip(range(2), loop):
        pass
    next(loop.chunks(2))
    refused(LoopError, next, older)
    for _ in loop:
        pass
    refused(LoopError, iter, loop)

def restarted():
    loop = make()
    for _ in range(2):
        list(itertools.islice(loop, 3))
        loop.restart()
    loop.close()
    refused(LoopError, iter, loop)

def states():
    loop = make(Stateful(), max_steps=9)
    list(itertools.islice(loop, 6))
    saved = loop.state_dict()
    redone = loop.state_dict(step_done=False)
    for state in (saved, redone, json.loads(json.dumps(saved))):
        again = make(Stateful(), max_steps=9)
        again.load_state_dict(state)
        list(again)
        again.steps_since("Steps"), again.steps_to_next_event()
    refused(LoopError, again.load_state_dict, saved)
    refused(StateError, make().load_state_dict, {**saved, "steps": "x"})
    pickle.loads(pickle.dumps(copy.copy(loop.state))), hash(loop.state), repr(loop.state)

def files():
    for _ in range(2):
        loop = make(Stateful(), max_steps=9, state_file=path)
        next(iter(loop))
        loop.save_state()
    os.unlink(path)
    with open(path, "w") as file:
        file.write("{}")
    refused(StateError, make, state_file=path)
    os.unlink(path)

def signals():
    loop = make(signals=(signal.SIGTERM,))
    for batch, due in loop:
        if batch == [2] and not loop.stop_requested:
            signal.raise_signal(signal.SIGTERM)
    with make(signals=(signal.SIGTERM,)) as loop:
        next(iter(loop))
        older = iter(loop)

def stops():
    loop = make(stop_when=Event(lambda state: state.global_step == 3))
    list(loop)
    loop = make()
    for _ in loop:
        loop.stop()

def errors():
    loop = make(lambda: fails(3))
    refused(OSError, list, loop)
    refused(LoopError, iter, loop)
    refused(OSError, list, make(lambda: fails(3)).chunks(2))
    refused(ZeroDivisionError, list, Loop([1], {"e": Event(lambda state: 1 / 0)}, max_epochs=1))
    refused(LoopError, list, make([1, 2], dataloader_len=3))
    refused(LoopError, list, make(()))
    refused(TypeError, list, make(lambda: None))
    refused(TypeError, Loop, [1], EVENTS, max_epochs=1, clock=3)
    refused(ValueError, list, Loop([1], EVENTS, max_epochs=1, clock=lambda: float("nan")))
    refused(TypeError, make().chunks, "x")

def errors_as_events():
    refused(OSError, list, make(lambda: fails(3), on_exception="event"))
    refused(OSError, list, make(lambda: fails(3), on_exception="event").chunks(2))
    def left():
        with make(on_exception="event") as loop:
            for batch, due in loop:
                with loop.guard():
                    raise OSError("body")
                break
    refused(OSError, left)

def interrupted():
    def batches():
        yield [0]
        yield [1]
        raise KeyboardInterrupt
    loop = make(lambda: batches(), max_steps=9)
    refused(KeyboardInterrupt, list, loop)
    for enter in (iter, lambda loop: loop.chunks(3)):
        loop = Loop([1, 2], {"e": Event(interrupt)}, max_epochs=1)
        refused(KeyboardInterrupt, list, enter(loop))

def interrupt(state):
    raise KeyboardInterrupt

def in_cycles():
    source = Stateful()
    source.loop = make(source)
    source.iterator = iter(source.loop)
    next(source.iterator)

WAYS = [
    quiet_steps, steps, lists, left_and_entered_again, restarted, states, files, signals, stops,
    errors, errors_as_events, interrupted, in_cycles,
]

# Without the GIL, part of what a collection frees is only released by the next one, since another
# thread might still read it.
COLLECTIONS = 2 if sysconfig.get_config_var("Py_GIL_DISABLED") else 1

def counts():
    for _ in range(COLLECTIONS):
        gc.collect()
    return sys.getallocatedblocks(), getattr(sys, "gettotalrefcount", int)()

grown = {}
with use_core(CORE):
    for way in WAYS:
        for _ in range(12):  # caches are full after some rounds; a leak grows in each
            before = counts()
            for _ in range(80):
                way()
            grown[way.__name__] = [now - then for now, then in zip(counts(), before)]
            if max(grown[way.__name__]) < 40:
                break
os.rmdir(folder)
print(json.dumps(grown))
"""


@pytest.mark.parametrize("other", [None, 2])
@pytest.mark.parametrize("sizes", [None, 2])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("where", ["fetch", "condition", "clock"])
def test_an_older_iterator_may_be_collected_in_the_middle_of_a_step(
    where: str, at: int, sizes: int | None, other: int | None
) -> None:
    def reach(place: str, count: int) -> None:
        if place == where and count == at:
            older.clear()
            gc.collect()

    def source() -> Iterator[int]:
        for number in range(16):
            reach("fetch", number)
            yield number

    def condition(state: LoopState) -> None:
        reach("condition", state.global_step)

    def clock() -> float:
        reach("clock", next(readings))
        return 0

    def enter(size: int | None) -> Iterator[Any]:
        return iter(loop) if size is None else loop.chunks(size)

    readings = iter(range(-1, 99))
    events = {"Four": Event(every_n_steps=4)}
    if where == "condition":
        events["C"] = Event(condition, at_step=99)
    if where == "clock":
        events["T"] = Event(every_n_seconds=99)
    loop = Loop(source, events, max_epochs=1, dataloader_len=16, clock=clock)
    older = [enter(other)]
    next(older[0])
    fired = [loop.global_step for _, due in enter(sizes) if "Four" in due]
    assert older == []
    assert fired == [3, 7, 11, 15]


@pytest.mark.no_core
@pytest.mark.skipif(not CPYTHON, reason="counts allocated blocks, and references in a debug build")
@pytest.mark.parametrize("core_name", CORES)
def test_no_use_of_a_loop_leaks_memory_or_references(core_name: str) -> None:
    grown = measure(core_name, EVERY_WAY)
    assert len(grown) == 13
    assert {way: counts for way, counts in grown.items() if max(counts) >= 40} == {}


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.skipif(not CPYTHON, reason="counts allocated blocks")
@pytest.mark.parametrize("core_name", CORES)
def test_a_hundred_thousand_loops_leak_no_memory(core_name: str) -> None:
    assert measure(core_name, MANY_LOOPS) < 500


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.skipif(not CPYTHON, reason="counts allocated blocks")
@pytest.mark.parametrize("core_name", CORES)
def test_ten_million_steps_are_counted_exactly_and_leak_no_memory(core_name: str) -> None:
    found = measure(core_name, MANY_STEPS)
    assert found.pop("grown") < 500
    assert found == {
        "thousands": 10_000,
        "wrong": 0,
        "last": 9_999_999,
        "global_step": 9_999_999,
        "epoch": 0,
        "same": True,
        "stop_reason": "max_steps",
    }


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.skipif(not CPYTHON, reason="counts allocated blocks")
@pytest.mark.parametrize("core_name", CORES)
def test_a_hundred_thousand_epochs_are_counted_exactly_and_leak_no_memory(core_name: str) -> None:
    found = measure(core_name, MANY_EPOCHS)
    assert found.pop("grown") < 500
    assert found == {
        "ends": 100_000,
        "fired": 10_000 + 300_000 // 7 + 100_000,
        "global_step": 299_999,
        "elapsed": 300_000.0,
    }
