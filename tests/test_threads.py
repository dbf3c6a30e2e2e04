"""Requests from within a step or from other threads give an error or the right steps."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from weakref import ref

import pytest

from dloop import Event, Loop, LoopError, LoopEvents
from loops import ENTER, flat

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def refused(core: str, enter: str) -> Any:
    """The error of next() on an iterator that is making a step."""
    if (core, enter) == ("python", "steps"):  # the iterator may be a generator
        return pytest.raises((ValueError, LoopError), match=r"already executing|in use")
    return pytest.raises(LoopError, match="this loop is in use")


class Parts:
    """A loader, a condition and a clock; the `at`-th call of the named `part` calls `action`."""

    def __init__(self, part: str, at: int) -> None:
        self.part = part
        self.at = at
        self.action: Callable[[], object] = int
        self.calls = 0

    def call(self, part: str) -> None:
        if part == self.part:
            self.calls += 1
            if self.calls == self.at:
                self.action()

    def __iter__(self) -> Iterator[int]:
        self.call("iter")
        for number in range(6):
            self.call("next")
            yield number

    def __len__(self) -> int:
        self.call("len")
        return 6

    def set_epoch(self, epoch: int) -> None:
        self.call("set_epoch")

    def condition(self, state: object) -> bool:
        self.call("condition")
        return False

    def clock(self) -> int:
        self.call("clock")
        return self.calls

    def loop(self) -> Loop[Any]:
        events = {"C": Event(self.condition, at_step=5)} if self.part == "condition" else {}
        timed = {"T": Event(at_time=10**6)} if self.part == "clock" else {}
        return Loop(self, {**events, **timed}, max_epochs=2, clock=self.clock)


PARTS = [
    (part, at)
    for part in ("next", "iter", "len", "set_epoch", "condition", "clock")
    for at in (1, 2, 4)
    if at < 3 or part in ("next", "condition", "clock")
]
by_part = pytest.mark.parametrize(("part", "at"), PARTS)
by_entry = pytest.mark.parametrize("enter", list(ENTER))


@by_entry
@by_part
def test_next_on_the_same_iterator_within_a_step_is_refused(
    core: str, part: str, at: int, enter: str
) -> None:
    parts = Parts(part, at)
    loop = parts.loop()
    pairs = ENTER[enter](loop)

    def request() -> None:
        before = loop.global_step, loop.state
        with refused(core, enter):
            next(pairs)
        assert (loop.global_step, loop.state) == before

    parts.action = request
    assert flat(pairs) == [*range(6), *range(6)]
    assert parts.calls >= at
    assert loop.global_step == 11
    assert loop.stop_reason == "max_epochs"


@by_entry
@pytest.mark.parametrize("other", list(ENTER))
@by_part
def test_entering_the_loop_within_a_step_is_refused(
    part: str, at: int, enter: str, other: str
) -> None:
    parts = Parts(part, at)
    loop = parts.loop()

    def request() -> None:
        with pytest.raises(LoopError, match="this loop is in use"):
            ENTER[other](loop)

    parts.action = request
    assert flat(ENTER[enter](loop)) == [*range(6), *range(6)]
    assert parts.calls >= at


@by_entry
def test_an_uncaught_refusal_within_a_step_ends_the_run(core: str, enter: str) -> None:
    parts = Parts("next", 3)
    loop = parts.loop()
    pairs = ENTER[enter](loop)
    parts.action = lambda: next(pairs)
    with refused(core, enter):
        flat(pairs)
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="ended with an exception"):
        iter(loop)


@by_entry
def test_the_body_may_call_next_on_the_iterator(enter: str) -> None:
    loop = Loop(range(6), {"E": Event(every_n_steps=4)}, max_epochs=1)
    pairs = ENTER[enter](loop)
    found = []
    for pair in pairs:
        found.append(pair)
        found += [next(pairs, (None, frozenset()))]
    assert [batch for batch in flat(found) if batch is not None] == list(range(6))


@by_entry
@pytest.mark.parametrize("part", ["condition", "clock"])
def test_after_an_interrupted_step_the_loop_can_be_entered(part: str, enter: str) -> None:
    parts = Parts(part, 3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    parts.action = interrupt
    loop = parts.loop()
    batches = []
    with pytest.raises(KeyboardInterrupt):
        for pair in ENTER[enter](loop):
            batches += flat([pair])
    batches += flat(ENTER[enter](loop))
    assert batches == [*range(6), *range(6)]


@by_entry
def test_next_within_a_step_is_refused_after_an_interrupt_too(enter: str) -> None:
    def interrupt() -> None:
        parts.action, parts.at = request, 3
        raise KeyboardInterrupt

    def request() -> None:
        with pytest.raises(LoopError, match="this loop is in use"):
            next(pairs)

    parts = Parts("condition", 2)
    parts.action = interrupt
    pairs = ENTER[enter](parts.loop())
    batches = []
    with pytest.raises(KeyboardInterrupt):
        while True:
            batches += flat([next(pairs)])
    batches += flat(pairs)
    assert batches == [*range(6), *range(6)]
    assert parts.calls > 3


# ---------------------------------------------------------------------------------------- threads


@pytest.fixture
def switching() -> Iterator[None]:
    """Python switches between threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], object], threads: int = 4) -> None:
    """Run `work` in several threads at once; an error of one of them is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for error in errors:
        raise error


def numbers(steps: int) -> Iterator[int]:
    for number in range(steps):
        for _ in range(number % 7):
            pass
        yield number


STEPS = 3000
SOURCES: dict[str, Callable[[], Any]] = {
    "a generator": lambda: numbers(STEPS),
    "a list": lambda: list(range(STEPS)),
}
EVENTS: dict[str, dict[str, Event]] = {
    "quiet": {},
    "events": {"E": Event(every_n_steps=3), "C": Event(lambda state: state.global_step % 5 == 4)},
    "timers": {"T": Event(every_n_seconds=7)},
}


@pytest.mark.usefixtures("switching")
@by_entry
@pytest.mark.parametrize("events", list(EVENTS))
@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("shared", ["an iterator", "a loop"])
def test_threads_that_share_an_iterator_or_loop_get_each_batch_once_or_an_error(
    core: str, shared: str, source: str, events: str, enter: str
) -> None:
    if FREE_THREADED and core == "python":
        pytest.skip("without the GIL, generators cannot be shared by threads")
    seconds = count()
    loop = Loop(SOURCES[source](), EVENTS[events], max_steps=STEPS, clock=lambda: next(seconds))
    pairs = ENTER[enter](loop)
    batches: list[list[int]] = [[] for _ in range(4)]
    ends: list[int] = []

    def work(number: int) -> None:
        own = pairs
        while loop.stop_reason is None:
            try:
                if shared == "a loop":
                    own = ENTER[enter](loop)
                batch, due = next(own)
            except StopIteration:
                return
            except (LoopError, ValueError) as error:
                assert any(
                    text in str(error)
                    for text in ("in use", "already executing", "was replaced", "is finished")
                ), error
                continue
            batches[number] += batch if isinstance(batch, list) else [batch]
            if LoopEvents.TRAINING_END in due:
                ends.append(number)

    in_threads(work)
    handed_over = sorted(batch for own in batches for batch in own)
    assert handed_over == list(range(STEPS))
    assert loop.global_step == STEPS - 1
    assert loop.stop_reason == "max_steps"
    assert len(ends) == 1


@pytest.mark.usefixtures("switching")
@by_entry
def test_other_threads_may_read_a_loops_state_and_stop_it(enter: str) -> None:
    steps = 5_000_000  # takes some seconds if the loop is not stopped
    loop = Loop(numbers(steps), EVENTS["events"], max_steps=steps, dataloader_len=100)

    def work(number: int) -> None:
        if not number:
            for _ in ENTER[enter](loop):
                pass
            return
        try:
            for _ in range(200):
                before = loop.state.global_step
                assert -1 <= before <= loop.global_step < steps
                assert len(loop) <= steps
        finally:
            if number == 1:
                loop.stop()

    in_threads(work)
    assert loop.stop_reason == "stop"


@by_entry
def test_state_dict_while_another_thread_continues_is_consistent_or_refused(enter: str) -> None:
    parts = Parts("clock", 3)
    loop = Loop(range(9), max_epochs=1, clock=parts.clock)
    pairs = ENTER[enter](loop)
    next(pairs)
    before = loop.global_step
    assert loop.state_dict()["steps"] == before + 1

    def continue_in_thread() -> None:
        thread = threading.Thread(target=next, args=(pairs,))
        thread.start()
        thread.join()

    parts.action = continue_in_thread
    with contextlib.suppress(LoopError):
        assert loop.state_dict()["steps"] in (before + 1, loop.global_step + 1)
    assert loop.global_step > before


@pytest.mark.usefixtures("switching")
@by_entry
def test_each_thread_can_iterate_over_its_own_loops(enter: str) -> None:
    event = Event(every_n_steps=3) | LoopEvents.EPOCH_END

    def work(number: int) -> None:
        for _ in range(20):
            loop = Loop(range(50 + number), {"E": event}, max_epochs=2)
            fired = sum("E" in due for _batch, due in ENTER[enter](loop))
            steps = 2 * (50 + number)
            both = sum((end + 1) % 3 == 0 for end in (steps // 2 - 1, steps - 1))
            assert fired == steps // 3 + 2 - both

    in_threads(work)


@pytest.mark.no_core
@pytest.mark.skipif(not FREE_THREADED, reason="this Python has a GIL")
def test_importing_the_compiled_core_does_not_enable_the_gil() -> None:
    code = "import sys, dloop._core; sys.exit(sys._is_gil_enabled())"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


@by_entry
def test_a_generator_that_restarts_its_loop_begins_a_new_run(enter: str) -> None:
    def batches() -> Iterator[int]:
        for number in range(9):
            if number == 2 and not tried:
                tried.append(number)
                loop.restart()  # cannot close this generator
            yield number

    tried: list[int] = []
    loop = Loop(batches, max_epochs=1, dataloader_len=9)
    with pytest.raises(LoopError, match="replaced"):
        flat(ENTER[enter](loop))
    assert tried
    assert loop.global_step == -1
    assert flat(ENTER[enter](loop)) == list(range(9))


@by_entry
@pytest.mark.parametrize(("part", "at"), [("next", 3), ("clock", 3), ("condition", 3)])
def test_no_step_comes_after_close_within_a_step(part: str, at: int, enter: str) -> None:
    parts = Parts(part, at)
    loop = parts.loop()

    parts.action = loop.close
    steps = []
    with pytest.raises(LoopError, match="closed"):
        for batch, _events in ENTER[enter](loop):
            steps.append(batch)
            assert parts.calls < at


@pytest.mark.usefixtures("uncompiled")
@by_entry
def test_a_batch_that_is_fetched_while_the_loop_is_closed_is_freed(enter: str) -> None:
    class Batch:
        def __init__(self) -> None:
            made.append(ref(self))

    class Batches:
        def __iter__(self) -> Iterator[Batch]:
            return self

        def __next__(self) -> Batch:
            if len(made) == 5:
                loop.close()
            return Batch()

    made: list[ref[Batch]] = []
    loop = Loop(Batches(), max_steps=99)
    with contextlib.suppress(LoopError):
        for _ in ENTER[enter](loop):
            del _
    assert len(made) == 6
    gc.collect()
    assert made[-1]() is None


@pytest.mark.parametrize("enter", list(ENTER))
def test_the_type_of_an_iterator_cannot_be_used_without_a_loop(core: str, enter: str) -> None:
    kind = type(ENTER[enter](Loop([1], max_epochs=1)))
    if (core, enter) == ("python", "steps"):  # the iterator may be of a standard type
        with contextlib.suppress(TypeError):
            assert list(kind()) == []
    else:
        with pytest.raises(TypeError):
            kind()
