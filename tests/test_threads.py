"""Requests from within a step or from other threads give an error or the right steps."""

from __future__ import annotations

import gc
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from itertools import count
from weakref import ref

import pytest

from dloop import Event, Loop, LoopError, LoopEvents
from loops import ENTER, flat
from parts import Parts
from recording_loaders import Batch

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
by_entry = pytest.mark.parametrize("enter", list(ENTER))
IN_USE = r"making a step|already executing"
"""In the message of a refusal; the second is that of Python's generators."""


by_part = pytest.mark.parametrize(
    ("part", "at"),
    [("next", 1), ("next", 4), ("iter", 2), ("len", 1), ("set_epoch", 2)]
    + [("condition", 2), ("condition", 4), ("clock", 1), ("clock", 4)],
)


# Within a step


@by_entry
@by_part
def test_within_a_step_the_next_and_a_new_iterator_are_refused(
    part: str, at: int, enter: str
) -> None:
    def request() -> None:
        before = loop.global_step, loop.state
        with pytest.raises((LoopError, ValueError), match=IN_USE):
            next(steps)
        for other in ENTER.values():
            with pytest.raises(LoopError, match="making a step"):
                other(loop)
        assert (loop.global_step, loop.state) == before

    parts = Parts(part, at)
    parts.action = request
    loop = parts.loop()
    steps = ENTER[enter](loop)
    assert flat(steps) == [*range(6), *range(6)]
    assert parts.calls >= at
    assert (loop.global_step, loop.stop_reason) == (11, "max_epochs")


@by_entry
@pytest.mark.usefixtures("uncompiled")
def test_a_batch_that_is_fetched_while_the_loop_is_closed_is_freed(enter: str) -> None:
    def make() -> Batch:
        if len(made) == 5:
            loop.close()
        batch = Batch()
        made.append(ref(batch))
        return batch

    made: list[ref[Batch]] = []
    loop = Loop(iter(make, None), max_steps=99)
    steps = ENTER[enter](loop)
    with pytest.raises(LoopError, match="closed"):
        while True:
            next(steps)
    assert len(made) == 6
    gc.collect()
    assert made[-1]() is None


# Threads


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


STEPS = 1500
EVENTS: dict[str, dict[str, Event]] = {
    "quiet": {},
    "events": {"E": Event(every_n_steps=3), "C": Event(lambda state: state.global_step % 5 == 4)},
    "timers": {"T": Event(every_n_seconds=7)},
}


@pytest.mark.usefixtures("switching")
@by_entry
@pytest.mark.parametrize("events", list(EVENTS))
@pytest.mark.parametrize("source", ["generator", "list"])
def test_threads_that_share_an_iterator_get_each_batch_once_or_an_error(
    core: str, source: str, events: str, enter: str
) -> None:
    if FREE_THREADED and core == "python":
        pytest.skip("without the GIL, generators cannot be shared by threads")
    seconds = count()
    loader = numbers(STEPS) if source == "generator" else list(range(STEPS))
    loop = Loop(loader, EVENTS[events], max_steps=STEPS, clock=lambda: next(seconds))
    steps = ENTER[enter](loop)
    batches: list[list[int]] = [[] for _ in range(4)]
    ends: list[int] = []

    def work(number: int) -> None:
        while loop.stop_reason is None:
            try:
                batch, names = next(steps)
            except StopIteration:
                return
            except (LoopError, ValueError) as error:
                assert re.search(IN_USE, str(error)), error
                continue
            batches[number] += batch if isinstance(batch, list) else [batch]
            if LoopEvents.TRAINING_END in names:
                ends.append(number)

    in_threads(work)
    assert sorted(batch for own in batches for batch in own) == list(range(STEPS))
    assert (loop.global_step, loop.stop_reason) == (STEPS - 1, "max_steps")
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
