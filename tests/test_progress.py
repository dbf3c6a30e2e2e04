"""A bar for a loop: what it shows and when, and that nothing else changes because of it."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dloop import Event, Loop, progress
from frameworks import needed
from interpreter import CPYTHON
from manual_clock import ManualClock


class Bar:
    """Stands in for tqdm, and remembers what it is told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.total = arguments["total"]
        self.n = self.initial = arguments["initial"]
        self.shown: list[float] = []
        self.lines: list[str] = []
        self.desc = self.description = ""
        self.postfix: dict[str, Any] = {}
        self.is_closed = False
        Bar.made.append(self)

    def update(self, steps: float) -> None:
        assert not self.is_closed
        self.n += steps
        self.shown.append(self.n)

    def set_description(self, text: str, refresh: bool) -> None:
        self.description = text

    def set_postfix(self, values: dict[str, Any], refresh: bool) -> None:
        self.postfix = values

    def write(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    Bar.made = []
    yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock of the bars; loops have another."""
    clock = ManualClock(1000)
    monkeypatch.setattr(progress, "perf_counter", clock)
    return clock


# When it moves


def test_it_moves_ten_times_a_second_at_any_speed(clock: ManualClock) -> None:
    loop = Loop(range(5000), max_epochs=1, progress=Bar)
    for step, _ in loop:
        clock.advance(0.001 if step < 3000 else 0.05)
    (bar,) = Bar.made
    quick = [step for step in bar.shown if 10 < step < 3000]
    slow = [step for step in bar.shown if step > 3500]
    assert {later - step for step, later in itertools.pairwise(quick)} <= {99, 100, 101}
    assert {later - step for step, later in itertools.pairwise(slow)} <= {1, 2, 3}
    assert bar.n == 5000


def test_other_steps_cost_nothing(clock: ManualClock) -> None:
    loop = Loop(range(500_000), max_epochs=1, progress=Bar)
    for _ in loop:
        clock.advance(0.00001)
    assert clock.readings < 170  # 50 that move the bar, and at least 100
    assert len(Bar.made[0].shown) < 70


@pytest.mark.parametrize("size", [None, 1, 7])
def test_no_event_changes_because_of_a_bar(clock: ManualClock, size: int | None) -> None:
    def trace(**arguments: Any) -> tuple[list[Any], int]:
        own = ManualClock(1000)
        events = {"Save": Event(every_n_seconds=5), "Log": Event(every_n_steps=7)}
        loop = Loop(range(40), events, max_epochs=2, clock=own, **arguments)
        found = []
        for batch, fired in loop if size is None else loop.chunks(size):
            found.append((batch, sorted(map(str, fired)), loop.state.elapsed))
            own.advance(1)
            clock.advance(0.03)
        return found, own.readings

    assert trace(progress=Bar) == trace()


# What it shows


def test_steps_with_their_total_and_the_epoch() -> None:
    descriptions = []
    for _ in Loop(range(10), max_epochs=3, progress=Bar):
        descriptions.append(Bar.made[0].description)
    (bar,) = Bar.made
    assert (bar.arguments["unit"], bar.total, bar.n) == ("step", 30, 30)
    assert (descriptions[0], bar.description) == ("epoch 0", "epoch 2")
    assert bar.is_closed


def test_a_stream_has_no_epoch_to_show() -> None:
    list(Loop(iter(range(10)), max_steps=5, progress=Bar))
    assert (Bar.made[0].description, Bar.made[0].total, Bar.made[0].n) == ("", 5, 5)


def test_seconds_under_max_seconds() -> None:
    clock = ManualClock(1000)
    for _ in Loop(range(10), max_seconds=20, clock=clock, progress=Bar):
        clock.advance(1.5)
    (bar,) = Bar.made
    assert (bar.arguments["unit"], bar.total, bar.n) == ("s", 20, 20)
    assert bar.postfix == {"step": 15}


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_seconds": 20}])
def test_a_resumed_run_starts_where_it_was(limit: dict[str, Any]) -> None:
    clock = ManualClock(1000)
    loop = Loop(range(10), clock=clock, **limit)
    for batch, _ in loop:
        clock.advance(1)
        if batch == 6:
            break
    resumed = Loop(range(10), clock=clock, progress=Bar, **limit)
    resumed.load_state_dict(loop.state_dict())
    for _ in resumed:
        clock.advance(1)
    assert (Bar.made[0].arguments["initial"], Bar.made[0].n) == (7, 20)


def test_a_postfix_is_shown_behind_the_bar(clock: ManualClock) -> None:
    loop = Loop(range(10), max_epochs=1, progress=Bar)
    for step, _ in loop:
        clock.advance(1)
        loop.progress.set_postfix({"lr": 1}, loss=step)
    assert Bar.made[0].postfix == {"lr": 1, "loss": 9}


def test_lines_are_printed_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(range(2), max_epochs=1, progress=Bar)
    for step, _ in loop:
        loop.progress.write("step", step)
    loop.progress.write("the", "end")
    assert Bar.made[0].lines == ["step 0", "step 1"]
    assert capsys.readouterr().out == "the end\n"


# How it ends


@pytest.mark.parametrize("way", ["break", "error"])
def test_it_is_closed_as_the_loop_is_left(way: str) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError

    with contextlib.suppress(OSError):
        for _ in Loop(source, max_epochs=1, progress=Bar):
            if way == "break":
                break
    for _ in range(0 if CPYTHON else 4):  # PyPy frees one after the other
        gc.collect()
    assert [bar.is_closed for bar in Bar.made] == [True]


def test_a_loop_that_is_entered_twice_has_one_open_bar() -> None:
    loop = Loop(range(10), max_epochs=1, progress=Bar)
    iterator = iter(loop)
    next(iterator)
    newer = iter(loop)
    assert [bar.is_closed for bar in Bar.made] == [True, False]
    del iterator
    gc.collect()
    assert [bar.is_closed for bar in Bar.made] == [True, False]
    list(newer)
    assert Bar.made[1].n == 10


# Which bar


@pytest.mark.parametrize(
    ("is_terminal", "is_notebook", "most"),
    [(True, False, 1000), (False, False, 20), (False, True, 1000)],
)
def test_true_takes_tqdm_and_spares_files(
    is_terminal: bool,
    is_notebook: bool,
    most: int,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tqdm(Bar):
        fp = SimpleNamespace(isatty=lambda: is_terminal)

    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Tqdm))
    for _ in Loop(range(500), max_epochs=1, progress=True):
        clock.advance(0.2)
    (bar,) = Bar.made
    assert most / 50 < len(bar.shown) <= most


def test_a_bar_may_be_given() -> None:
    bar = Bar(total=None, initial=0)
    bar.desc = "train: "
    list(Loop(range(9), max_epochs=2, progress=bar))
    assert (bar.total, bar.n, bar.description, bar.is_closed) == (18, 18, "train: epoch 1", True)
    assert Bar.made == [bar]


def test_a_function_decides_how_its_bar_looks() -> None:
    given: list[dict[str, Any]] = []

    def make(**arguments: Any) -> Bar:
        given.append(arguments)
        bar = Bar(**arguments)
        bar.desc = "train: "
        return bar

    list(Loop(range(9), max_epochs=2, progress=make))
    assert given == [{"total": 18, "initial": 0, "mininterval": 0, "miniters": 1}]
    assert Bar.made[0].description == "train: epoch 1"


@pytest.mark.parametrize(("rank", "bars"), [("0", 1), ("1", 0)])
def test_rank_0_alone_shows_a_bar(rank: str, bars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    list(Loop(range(3), max_epochs=1, progress=Bar))
    assert len(Bar.made) == bars


@pytest.mark.no_core
def test_what_makes_no_bar_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="progress=3: pass True, False, a tqdm, or a callable"):
        Loop(range(3), max_epochs=1, progress=3)
    with pytest.raises(TypeError, match="it returned None; let it return a tqdm"):
        next(iter(Loop(range(9), max_epochs=1, progress=lambda **_: None)))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'dloop\[progress\]'"):
        Loop(range(3), max_epochs=1, progress=True)


@pytest.mark.real
def test_tqdm_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: ManualClock
) -> None:
    needed("tqdm")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    loop = Loop(range(1000), max_epochs=1, progress=True)
    for step, _ in loop:
        clock.advance(0.1)
        loop.progress.set_postfix(loss=0.25)
        if step == 5:
            loop.progress.write("step", step)
    printed = file.getvalue()
    assert capsys.readouterr().out == "step 5\n"
    assert "epoch 0: 100%" in printed
    assert "1000/1000" in printed
    assert "loss=0.25" in printed
    assert printed.count("\r") < 20  # each update takes a line of a file


def test_an_iterator_that_goes_on_after_an_interrupt_shows_no_bar() -> None:
    def source() -> Iterator[int]:
        yield 0
        if strikes:
            raise strikes.pop()
        yield 1

    strikes = [KeyboardInterrupt()]
    pairs = iter(Loop(source, max_epochs=1, progress=Bar))
    with pytest.raises(KeyboardInterrupt):
        next(pairs)
    assert [batch for batch, _ in pairs] == [0, 1]
    assert [bar.is_closed for bar in Bar.made] == [True]


def test_a_loop_that_is_left_before_its_first_step_shows_none() -> None:
    loop = Loop(range(3), max_epochs=1, progress=Bar)
    iter(loop)
    loop.close()
    assert [bar.shown for bar in Bar.made] == [[]]
