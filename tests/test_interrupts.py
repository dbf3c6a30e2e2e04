"""Ctrl-C inside dloop: wherever it strikes, entering the loop again goes on with nothing lost.

A profiler raises KeyboardInterrupt at the k-th call or return within dloop's own Python code, for
every k: those are the points at which CPython looks for signals.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import dloop
from dloop import Event, Loop

OURS = str(Path(dloop.__file__).parent)

Enter = Callable[[Loop[Any]], Iterator[tuple[Any, Any]]]
ENTER: dict[str, Enter] = {
    "steps": iter,
    "lists of up to 3": lambda loop: loop.chunks(3),
    "lists of 4, 2 or 1": lambda loop: loop.chunks((4, 2, 1)),
}


class Batches:
    """An iterator of its own kind, written in Python."""

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
ASKED = {"A": Event(every_n_steps=3), "C": Event(lambda state: state.global_step % 5 == 4)}
TIMED = {"A": Event(every_n_steps=3), "T": Event(every_n_seconds=4)}


class Counting(Loop[Any]):
    """A loop that is told how many batches it has handed over."""

    handed_over = 0


def over(loader: Loader, events: dict[str, Event], **arguments: Any) -> Counting:
    """A loop whose time is the number of batches that were handed over."""
    loop = Counting(loader, events, clock=lambda: loop.handed_over, **arguments)
    return loop


LOOPS: dict[str, Callable[[], Counting]] = {
    "sized": lambda: over(Sized(), EVENTS, max_epochs=2),
    "unsized": lambda: over(Loader(), EVENTS, max_epochs=2),
    "never looked ahead": lambda: over(Sized(), EVENTS, max_epochs=2, lookahead=False),
    "max_steps": lambda: over(Sized(), EVENTS, max_steps=10),
    "a condition": lambda: over(Sized(), ASKED, max_epochs=2),
    "stop_when": lambda: over(Sized(), ASKED, max_epochs=2, stop_when=Event(at_step=11)),
    "timers": lambda: over(Sized(), TIMED, max_epochs=2),
    "timers, unsized": lambda: over(Loader(), TIMED, max_epochs=2),
    "max_seconds": lambda: over(Sized(), TIMED, max_seconds=10),
}


@dataclass
class Striking:
    """Counts the points of one run, and strikes at one of them."""

    at: int
    points: int = 0
    steps: list[Any] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    struck: str = "nowhere"

    def look(self, frame: Any, event: str, _argument: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(OURS):
            return
        self.points += 1
        if self.points == self.at:
            self.struck = f"{frame.f_code.co_name}, line {frame.f_lineno}, {event}"
            raise KeyboardInterrupt

    def run(self, loop: Counting, enter: Enter, enter_again: bool) -> None:
        pairs = enter(loop)
        for _ in range(2):
            try:
                sys.setprofile(self.look)
                for batch, events in pairs:
                    sys.setprofile(None)
                    self.note(loop, batch, events)
                    sys.setprofile(self.look)
                return
            except KeyboardInterrupt:
                sys.setprofile(None)
            finally:
                sys.setprofile(None)
            if loop.stop_reason is not None:  # nothing but the end of the for was missing
                return
            pairs = enter(loop) if enter_again else pairs

    def note(self, loop: Counting, batch: Any, events: Any) -> None:
        self.batches += batch if isinstance(batch, list) else [batch]
        loop.handed_over = len(self.batches)
        if events:  # quiet lists may be cut otherwise after an interrupt
            self.steps.append((sorted(map(str, events)), loop.state, loop.state.elapsed))


# Python's own handler of SIGINT has no frame: the innermost is where it struck
Striking.look = FunctionType(Striking.look.__code__, {**globals(), "__name__": "dloop.here"})


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Where no references are counted, the collector closes generators, which is to be struck."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("make", LOOPS.values(), ids=list(LOOPS))
def test_an_interrupt_anywhere_loses_nothing(make: Callable[[], Counting], enter: Enter) -> None:
    calm = Striking(at=0)
    calm.run(make(), enter, True)
    assert calm.points
    for point in range(1, calm.points + 1):
        for enter_again in (True, False):
            struck = Striking(at=point)
            struck.run(make(), enter, enter_again)
            assert struck.batches == calm.batches, struck.struck
            assert struck.steps == calm.steps, struck.struck


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("step", [0, 1, 5, 6])
def test_a_condition_may_leave_the_run_at_any_step(step: int, leave: str, enter: Enter) -> None:
    def condition(state: dloop.LoopState) -> None:
        if state.global_step == step:
            getattr(loop, leave)()

    loop = Loop(range(7), {"C": Event(condition)}, max_epochs=1)
    batches: list[Any] = []
    with pytest.raises(dloop.LoopError, match="closed" if leave == "close" else "entered again"):
        for batch, _events in enter(loop):
            batches += batch if isinstance(batch, list) else [batch]
    assert batches == list(range(7))[: len(batches)]
    assert len(batches) <= step


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("kind", [Loader, Sized])
@pytest.mark.parametrize("fetch", range(7))
def test_a_dataloader_may_leave_the_run_at_any_fetch(
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
    batches: list[Any] = []
    with pytest.raises(dloop.LoopError, match="closed" if leave == "close" else "entered again"):
        for batch, _events in enter(loop):
            batches += batch if isinstance(batch, list) else [batch]
    assert [place for _, place in batches] == list(range(7))[: len(batches)]
    assert len(batches) <= fetch


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("leave", ["close", "restart"])
@pytest.mark.parametrize("reading", [0, 1, 3])
def test_a_clock_may_leave_the_run(reading: int, leave: str, enter: Enter) -> None:
    readings = 0

    def clock() -> int:
        nonlocal readings
        readings += 1
        if readings == reading + 1:
            getattr(loop, leave)()
        return readings

    loop = Loop(range(7), {"T": Event(every_n_seconds=2)}, max_epochs=1, clock=clock)
    with pytest.raises(dloop.LoopError):
        for batch, _events in enter(loop):
            assert batch in range(7) or batch


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
def test_a_step_that_is_made_again_reads_the_clock_again(enter: Enter) -> None:
    now = [0]
    struck: list[int] = []

    def condition(state: dloop.LoopState) -> None:
        if state.global_step == 2 and not struck:
            struck.append(1)
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
def test_an_iterator_that_has_ended_stays_so_after_a_restart(enter: Enter) -> None:
    loop = Loop(range(3), max_epochs=1)
    pairs = enter(loop)
    assert len(list(pairs)) <= 3
    loop.restart()
    assert list(pairs) == []


@pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_interrupt_of_a_source_that_has_closed_the_loop_comes_out(at: int, enter: Enter) -> None:
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
def test_an_error_that_is_false_is_an_error(enter: Enter) -> None:
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
def test_a_second_interrupt_while_the_first_is_noted_lets_the_run_go_on(enter: Enter) -> None:
    struck: list[str] = []

    def batches() -> Iterator[int]:
        for number in range(9):
            if number == 7 and not struck:
                struck.append("fetch")
                raise KeyboardInterrupt
            yield number

    def strike(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and "after_fetch" in frame.f_code.co_name and len(struck) == 1:
            struck.append("note")
            raise KeyboardInterrupt

    loop = Loop(batches, max_epochs=1, dataloader_len=9)
    seen: list[int] = []

    def cell() -> None:
        for batch, _ in enter(loop):
            seen.extend(batch if isinstance(batch, list) else [batch])

    try:
        sys.setprofile(strike)
        with pytest.raises(KeyboardInterrupt):
            cell()
    finally:
        sys.setprofile(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dloop.LoopWarning)  # of what is fetched again
        try:
            cell()
        except dloop.DataLengthError:  # the note was lost, and with it that the iterator is
            assert len(struck) == 2
            return
    assert seen == list(range(9))


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_what_a_condition_raises_after_it_has_left_the_loop_comes_out(leave: str) -> None:
    asked: list[int] = []

    def condition(state: dloop.LoopState) -> None:
        asked.append(state.global_step)
        if state.global_step == 3:
            getattr(loop, leave)()
            raise OSError("disk")

    loop = Loop(range(8), {"C": Event(condition), "E": Event(at_step=3)}, max_epochs=1)
    with pytest.raises(OSError, match="disk"):
        next(loop.chunks(4))
    assert asked == [0, 1, 2, 3]
