"""One loop is gone over in one thread. What else is tried gives an error, or the right steps."""

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

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

Enter = Callable[[Loop[Any]], Iterator[Any]]
ENTER: dict[str, Enter] = {"steps": iter, "lists": lambda loop: loop.chunks(2)}


def refused(core: str, enter: str) -> Any:
    """The error of asking an iterator for a step in a step of its own."""
    if (core, enter) == ("python", "steps"):  # it may be a generator
        return pytest.raises((ValueError, LoopError), match=r"already executing|in use")
    return pytest.raises(LoopError, match="this loop is in use")


def flat(pairs: Any) -> list[Any]:
    batches: list[Any] = []
    for batch, _events in pairs:
        batches += batch if isinstance(batch, list) else [batch]
    return batches


class Asking:
    """Parts of a loop, one of which calls `ask` at some point."""

    def __init__(self, part: str, at: int) -> None:
        self.part = part
        self.at = at
        self.ask: Callable[[], object] = int
        self.asked = 0

    def call(self, part: str) -> None:
        if part == self.part:
            self.asked += 1
            if self.asked == self.at:
                self.ask()

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
        return self.asked

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
def test_a_step_asks_for_no_other(core: str, part: str, at: int, enter: str) -> None:
    asking = Asking(part, at)
    loop = asking.loop()
    pairs = ENTER[enter](loop)

    def ask() -> None:
        before = loop.global_step, loop.state
        with refused(core, enter):
            next(pairs)
        assert (loop.global_step, loop.state) == before

    asking.ask = ask
    assert flat(pairs) == [*range(6), *range(6)]
    assert asking.asked >= at
    assert loop.global_step == 11
    assert loop.stop_reason == "max_epochs"


@by_entry
@pytest.mark.parametrize("other", list(ENTER))
@by_part
def test_a_step_enters_the_loop_no_other_way(part: str, at: int, enter: str, other: str) -> None:
    asking = Asking(part, at)
    loop = asking.loop()

    def ask() -> None:
        with pytest.raises(LoopError, match="this loop is in use"):
            ENTER[other](loop)

    asking.ask = ask
    assert flat(ENTER[enter](loop)) == [*range(6), *range(6)]
    assert asking.asked >= at


@by_entry
def test_what_a_step_was_refused_ends_the_run_where_nobody_catches_it(
    core: str, enter: str
) -> None:
    asking = Asking("next", 3)
    loop = asking.loop()
    pairs = ENTER[enter](loop)
    asking.ask = lambda: next(pairs)
    with refused(core, enter):
        flat(pairs)
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="ended with an exception"):
        iter(loop)


@by_entry
def test_a_body_may_ask_for_the_next_step(enter: str) -> None:
    loop = Loop(range(6), {"E": Event(every_n_steps=4)}, max_epochs=1)
    pairs = ENTER[enter](loop)
    found = []
    for pair in pairs:
        found.append(pair)
        found += [next(pairs, (None, frozenset()))]
    assert [batch for batch in flat(found) if batch is not None] == list(range(6))


@by_entry
@pytest.mark.parametrize("part", ["condition", "clock"])
def test_an_interrupted_step_lets_the_next_one_be_made(part: str, enter: str) -> None:
    asking = Asking(part, 3)

    def strike() -> None:
        raise KeyboardInterrupt

    asking.ask = strike
    loop = asking.loop()
    batches = []
    with pytest.raises(KeyboardInterrupt):
        for pair in ENTER[enter](loop):
            batches += flat([pair])
    batches += flat(ENTER[enter](loop))
    assert batches == [*range(6), *range(6)]


@by_entry
def test_an_iterator_that_was_interrupted_is_refused_in_a_step_too(enter: str) -> None:
    def strike() -> None:
        asking.ask, asking.at = ask, 3
        raise KeyboardInterrupt

    def ask() -> None:
        with pytest.raises(LoopError, match="this loop is in use"):
            next(pairs)

    asking = Asking("condition", 2)
    asking.ask = strike
    pairs = ENTER[enter](asking.loop())
    batches = []
    with pytest.raises(KeyboardInterrupt):
        while True:
            batches += flat([next(pairs)])
    batches += flat(pairs)
    assert batches == [*range(6), *range(6)]
    assert asking.asked > 3


# ---------------------------------------------------------------------------------------- threads


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], object], threads: int = 4) -> None:
    """Let so many threads begin `work` at once; raises what one of them raised."""
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
def test_threads_that_share_get_each_batch_once_or_an_error(
    core: str, shared: str, source: str, events: str, enter: str
) -> None:
    if FREE_THREADED and core == "python":
        pytest.skip("generators of such builds are not for several threads")
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

    together(work)
    handed_over = sorted(batch for own in batches for batch in own)
    assert handed_over == list(range(STEPS))
    assert loop.global_step == STEPS - 1
    assert loop.stop_reason == "max_steps"
    assert len(ends) == 1


@pytest.mark.usefixtures("switching")
@by_entry
def test_a_loop_may_be_looked_at_and_stopped_from_other_threads(enter: str) -> None:
    steps = 5_000_000  # which takes some seconds, should it not be stopped
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

    together(work)
    assert loop.stop_reason == "stop"


@by_entry
def test_a_state_during_which_another_thread_goes_on_is_of_one_step_or_refused(enter: str) -> None:
    asking = Asking("clock", 3)
    loop = Loop(range(9), max_epochs=1, clock=asking.clock)
    pairs = ENTER[enter](loop)
    next(pairs)
    before = loop.global_step
    assert loop.state_dict()["steps"] == before + 1

    def go_on() -> None:
        thread = threading.Thread(target=next, args=(pairs,))
        thread.start()
        thread.join()

    asking.ask = go_on
    with contextlib.suppress(LoopError):
        assert loop.state_dict()["steps"] in (before + 1, loop.global_step + 1)
    assert loop.global_step > before


@pytest.mark.usefixtures("switching")
@by_entry
def test_each_thread_goes_over_loops_of_its_own(enter: str) -> None:
    event = Event(every_n_steps=3) | LoopEvents.EPOCH_END

    def work(number: int) -> None:
        for _ in range(20):
            loop = Loop(range(50 + number), {"E": event}, max_epochs=2)
            fired = sum("E" in due for _batch, due in ENTER[enter](loop))
            steps = 2 * (50 + number)
            both = sum((end + 1) % 3 == 0 for end in (steps // 2 - 1, steps - 1))
            assert fired == steps // 3 + 2 - both

    together(work)


@pytest.mark.no_core
@pytest.mark.skipif(not FREE_THREADED, reason="this Python has a lock for all threads")
def test_the_compiled_core_needs_no_lock_for_all_threads() -> None:
    code = "import sys, dloop._core; sys.exit(sys._is_gil_enabled())"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


@by_entry
def test_a_restart_that_fails_in_a_step_loses_nothing(enter: str) -> None:
    def batches() -> Iterator[int]:
        for number in range(9):
            if number == 2 and not tried:
                tried.append(number)
                with pytest.raises(ValueError, match="already executing"):
                    loop.restart()  # whose last act is to close this generator
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
def test_no_step_comes_after_a_close(part: str, at: int, enter: str) -> None:
    asking = Asking(part, at)
    loop = asking.loop()

    def close() -> None:
        with contextlib.suppress(ValueError):  # of the generator that is to close itself
            loop.close()

    asking.ask = close
    steps = []
    with pytest.raises(LoopError, match="closed"):
        for batch, _events in ENTER[enter](loop):
            steps.append(batch)
            assert asking.asked < at


@pytest.mark.usefixtures("uncompiled")
@by_entry
def test_a_batch_that_comes_when_the_loop_was_closed_is_let_go(enter: str) -> None:
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
def test_an_iterator_of_no_loop_is_refused_or_empty(core: str, enter: str) -> None:
    kind = type(ENTER[enter](Loop([1], max_epochs=1)))
    if (core, enter) == ("python", "steps"):  # it may be one of the standard library
        with contextlib.suppress(TypeError):
            assert list(kind()) == []
    else:
        with pytest.raises(TypeError):
            kind()
