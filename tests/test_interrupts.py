"""Ctrl-C inside dloop: after it, at any point, the loop continues and no batch or event is lost.

A profiler raises KeyboardInterrupt at the k-th call or return within dloop's own Python code, for
every k: CPython handles signals at these points.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import dloop
from dloop import Event, Loop, LoopError
from loops import Enter, flat

pytestmark = pytest.mark.usefixtures("small_collections")

DLOOP_FOLDER = str(Path(dloop.__file__).parent)

ENTER: dict[str, Enter] = {
    "steps": iter,
    "lists of up to 3": lambda loop: loop.chunks(3),
    "lists of 4, 2 or 1": lambda loop: loop.chunks((4, 2, 1)),
}


class Batches:
    """An iterator that is not a generator, and can go on after an exception."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.left = list(range(loader.length))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[int, int]:
        if not self.left:
            raise StopIteration
        self.loader.fetched += 1
        return self.loader.epoch, self.left.pop(0)


@dataclass
class Loader:
    length: int = 7
    fetched: int = 0
    epoch: int = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Batches:
        return Batches(self)


class Sized(Loader):
    def __len__(self) -> int:
        return self.length


EVENTS = {"A": Event(every_n_steps=3), "P": Event(every_n_steps=2, per_epoch=True)}
CONDITION = {"A": Event(every_n_steps=3), "C": Event(lambda state: state.global_step % 5 == 4)}
TIMED = {"A": Event(every_n_steps=3), "T": Event(every_n_seconds=4)}


class CountingLoop(Loop[Any]):
    """A loop with a count of the batches that it has handed over, which the test keeps."""

    handed_over = 0


def over(loader: Loader, events: dict[str, Event], **arguments: Any) -> CountingLoop:
    """A loop whose clock shows the number of batches that were handed over."""
    loop = CountingLoop(loader, events, clock=lambda: loop.handed_over, **arguments)
    return loop


LOOPS: dict[str, Callable[[], CountingLoop]] = {
    "sized": lambda: over(Sized(), EVENTS, max_epochs=2),
    "unsized": lambda: over(Loader(), EVENTS, max_epochs=2),
    "never looked ahead": lambda: over(Sized(), EVENTS, max_epochs=2, lookahead=False),
    "max_steps": lambda: over(Sized(), EVENTS, max_steps=10),
    "a condition": lambda: over(Sized(), CONDITION, max_epochs=2),
    "stop_when": lambda: over(Sized(), CONDITION, max_epochs=2, stop_when=Event(at_step=11)),
    "timers": lambda: over(Sized(), TIMED, max_epochs=2),
    "timers, unsized": lambda: over(Loader(), TIMED, max_epochs=2),
    "max_seconds": lambda: over(Sized(), TIMED, max_seconds=10),
    "agreement": lambda: over(Sized(), CONDITION, max_epochs=2, sync=list, sync_every=2),
    "a profile": lambda: over(Sized(), EVENTS, max_epochs=2, profile=True),
    "a profile, unsized": lambda: over(Loader(), EVENTS, max_epochs=2, profile=True),
}


@dataclass
class InterruptedRun:
    """Counts the points of one run, and raises KeyboardInterrupt at one of them."""

    at: int
    points: int = 0
    steps: list[Any] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    interrupted_at: str = "nowhere"

    def profile(self, frame: Any, event: str, _argument: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(
            DLOOP_FOLDER
        ):
            return
        self.points += 1
        if self.points == self.at:
            self.interrupted_at = f"{frame.f_code.co_name}, line {frame.f_lineno}, {event}"
            raise KeyboardInterrupt

    def run(self, loop: CountingLoop, enter: Enter, enter_again: bool) -> None:
        pairs = enter(loop)
        for _ in range(2):
            try:
                sys.setprofile(self.profile)
                for batch, events in pairs:
                    sys.setprofile(None)
                    self.record(loop, batch, events)
                    sys.setprofile(self.profile)
                return
            except KeyboardInterrupt:
                sys.setprofile(None)
            finally:
                sys.setprofile(None)
            if enter_again:
                try:
                    pairs = enter(loop)
                except LoopError:  # interrupted after the last step
                    return

    def record(self, loop: CountingLoop, batch: Any, events: Any) -> None:
        self.batches += batch if isinstance(batch, list) else [batch]
        loop.handed_over = len(self.batches)
        if events:  # lists without events may have other lengths after an interrupt
            self.steps.append((sorted(map(str, events)), loop.state, loop.state.elapsed))


# Python's own handler of SIGINT has no frame, so that dloop's frame is the innermost. With this
# `__name__`, dloop takes the frame of `profile` for one of its own.
InterruptedRun.profile = FunctionType(
    InterruptedRun.profile.__code__, {**globals(), "__name__": "dloop.here"}
)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("make", LOOPS.values(), ids=list(LOOPS))
def test_after_an_interrupt_at_any_point_all_batches_and_events_come(
    make: Callable[[], CountingLoop], enter: Enter
) -> None:
    undisturbed = InterruptedRun(at=0)
    undisturbed.run(make(), enter, True)
    assert undisturbed.points
    for point in range(1, undisturbed.points + 1):
        for enter_again in (True, False):
            interrupted = InterruptedRun(at=point)
            interrupted.run(make(), enter, enter_again)
            assert interrupted.batches == undisturbed.batches, interrupted.interrupted_at
            assert interrupted.steps == undisturbed.steps, interrupted.interrupted_at


def batches_before_error(loop: Loop[Any], enter: Enter, leave: str) -> list[Any]:
    """The batches that came before the LoopError about a `close` or `restart` within a step."""
    batches: list[Any] = []
    with pytest.raises(dloop.LoopError, match="closed" if leave == "close" else "entered again"):
        for batch, _events in enter(loop):
            batches += batch if isinstance(batch, list) else [batch]
    return batches


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("step", [0, 1, 2, 5, 6])
def test_a_condition_may_close_or_restart_the_loop_at_any_step(
    step: int, leave: str, enter: Enter
) -> None:
    def condition(state: dloop.LoopState) -> None:
        if state.global_step == step:
            getattr(loop, leave)()

    loop = Loop(range(7), {"C": Event(condition)}, max_epochs=1)
    batches = batches_before_error(loop, enter, leave)
    assert batches == list(range(7))[: len(batches)]
    assert len(batches) <= step


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("kind", [Loader, Sized])
@pytest.mark.parametrize("fetch", range(7))
def test_a_dataloader_may_close_or_restart_the_loop_at_any_fetch(
    fetch: int, kind: type[Loader], leave: str, enter: Enter
) -> None:
    class Leaving(Batches):
        def __next__(self) -> tuple[int, int]:
            if self.loader.fetched == fetch:
                getattr(loop, leave)()
            return super().__next__()

    class LeavingLoader(kind):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Batches:
            return Leaving(self)

    loop: Loop[Any] = Loop(LeavingLoader(), max_epochs=1)
    batches = batches_before_error(loop, enter, leave)
    assert [place for _, place in batches] == list(range(7))[: len(batches)]
    assert len(batches) <= fetch


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("reading", [0, 1, 3])
def test_a_clock_may_close_or_restart_the_loop(reading: int, leave: str, enter: Enter) -> None:
    readings = 0

    def clock() -> int:
        nonlocal readings
        readings += 1
        if readings == reading + 1:
            getattr(loop, leave)()
        return readings

    loop = Loop(range(7), {"T": Event(every_n_seconds=2)}, max_epochs=1, clock=clock)
    batches = batches_before_error(loop, enter, leave)
    assert batches == list(range(7))[: len(batches)]
    assert len(batches) < 7


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
def test_a_step_that_is_repeated_reads_the_clock_again(enter: Enter) -> None:
    now = [0]
    interrupts: list[int] = []

    def condition(state: dloop.LoopState) -> None:
        if state.global_step == 2 and not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt

    events = {"C": Event(condition), "T": Event(at_time=100)}
    loop = Loop(range(3), events, max_epochs=1, clock=lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        for _ in enter(loop):
            pass
    now[0] = 200
    ((_, due),) = list(enter(loop))
    assert "T" in due
    assert loop.state.elapsed == 200


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
def test_an_exhausted_iterator_stays_exhausted_after_a_restart(enter: Enter) -> None:
    loop = Loop(range(3), max_epochs=1)
    pairs = enter(loop)
    assert flat(pairs) == [0, 1, 2]
    loop.restart()
    assert list(pairs) == []


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_interrupt_of_a_source_that_has_closed_the_loop_is_raised(at: int, enter: Enter) -> None:
    def batches() -> Iterator[int]:
        for number in range(9):
            if number == at:
                loop.close()
                raise KeyboardInterrupt
            yield number

    loop: Loop[Any] = Loop(batches(), max_steps=9)
    with pytest.raises(KeyboardInterrupt), contextlib.suppress(ValueError):
        for _ in enter(loop):
            pass
    with pytest.raises(dloop.LoopError, match="closed"):
        iter(loop)


class FalseError(Exception):
    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
def test_an_error_whose_truth_value_is_false_is_raised(enter: Enter) -> None:
    def batches() -> Iterator[int]:
        yield from range(2)
        raise FalseError

    for lookahead in (None, True):
        seen: list[Any] = []
        with pytest.raises(FalseError):
            for batch, _ in enter(Loop(batches, max_epochs=2, lookahead=lookahead)):
                seen += batch if isinstance(batch, list) else [batch]
        assert seen == [0, 1]


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
def test_after_a_second_interrupt_in_the_handling_of_the_first_the_run_continues(
    enter: Enter,
) -> None:
    interrupts: list[str] = []

    def batches() -> Iterator[int]:
        for number in range(9):
            if number == 4 and not interrupts:
                interrupts.append("fetch")
                raise KeyboardInterrupt
            yield number

    def interrupt(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and "after_fetch" in frame.f_code.co_name and len(interrupts) == 1:
            interrupts.append("handling")
            raise KeyboardInterrupt

    loop = Loop(batches, max_epochs=1, dataloader_len=9)
    seen: list[int] = []

    def run() -> None:
        for batch, _ in enter(loop):
            seen.extend(batch if isinstance(batch, list) else [batch])

    try:
        sys.setprofile(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        sys.setprofile(None)
    assert interrupts == ["fetch", "handling"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dloop.LoopWarning)  # batches are fetched again
        try:
            run()
        except dloop.DataLengthError:  # the loop does not know of the interrupted fetch
            return
    assert seen == list(range(9))


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_an_error_of_a_condition_that_has_closed_or_restarted_the_loop_is_raised(
    leave: str,
) -> None:
    calls: list[int] = []

    def condition(state: dloop.LoopState) -> None:
        calls.append(state.global_step)
        if state.global_step == 3:
            getattr(loop, leave)()
            raise OSError("disk")

    loop = Loop(range(8), {"C": Event(condition), "E": Event(at_step=3)}, max_epochs=1)
    with pytest.raises(OSError, match="disk"):
        next(loop.chunks(4))
    assert calls == [0, 1, 2, 3]
