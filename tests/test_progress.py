"""A bar for a loop: what it shows and when, and that nothing else changes because of it."""

from __future__ import annotations

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
from interpreter import needs_reference_counts
from loops import ENTER, Enter
from manual_clock import ManualClock

SILENT = {"Save": Event(every_n_seconds=5), "Log": Event(every_n_steps=7)}


class Bar:
    """Stands in for tqdm: it writes down what it is told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.total = arguments["total"]
        self.n = self.initial = arguments["initial"]
        self.shown: list[float] = []
        self.desc = ""
        self.description = ""
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

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    Bar.made = []
    yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock of the bars; not that of the loops."""
    clock = ManualClock()
    monkeypatch.setattr(progress, "perf_counter", clock)
    return clock


# When it moves


def test_it_moves_ten_times_a_second_whatever_the_speed_of_the_steps(clock: ManualClock) -> None:
    loop = Loop(range(5000), max_epochs=1, progress=Bar)
    for step, _ in loop:
        clock.advance(0.001 if step < 3000 else 0.05)
    (bar,) = Bar.made
    quick = [step for step in bar.shown if 10 < step < 3000]
    slow = [step for step in bar.shown if step > 3500]
    assert {later - step for step, later in itertools.pairwise(quick)} <= {99, 100, 101}
    assert {later - step for step, later in itertools.pairwise(slow)} <= {1, 2, 3}
    assert bar.n == 5000


def test_steps_in_between_read_no_clock(clock: ManualClock) -> None:
    loop = Loop(range(500_000), max_epochs=1, progress=Bar)
    for _ in loop:
        clock.advance(0.00001)
    assert clock.readings < 170  # 50 that move the bar, and at least 100
    assert len(Bar.made[0].shown) < 70


@pytest.mark.parametrize(
    "limit", [{"max_epochs": 1}, {"max_steps": 100_000}, {"max_seconds": 9000}]
)
def test_it_goes_on_moving_where_steps_become_slower(
    clock: ManualClock, limit: dict[str, Any]
) -> None:
    own = ManualClock()
    loop = Loop(range(100_000), clock=own, progress=Bar, **limit)
    moved = []
    for step, _ in loop:
        if step == 23_000:
            break
        seconds = 1e-6 if step < 20_000 else 1
        clock.advance(seconds)
        own.advance(seconds)
        moved.append(len(Bar.made[0].shown))
    # within a hundredth of the bar, and then every second
    assert moved[21_010] > moved[20_000]
    assert moved[22_900] - moved[21_200] == 1700


@pytest.mark.parametrize("enter", ENTER.values(), ids=ENTER)
def test_no_event_changes_because_a_bar_is_shown(clock: ManualClock, enter: Enter) -> None:
    def trace(**arguments: Any) -> tuple[list[Any], int]:
        own = ManualClock()
        loop = Loop(range(40), SILENT, max_epochs=2, clock=own, **arguments)
        found = []
        for batch, events in enter(loop):
            found.append((batch, sorted(map(str, events)), loop.state.elapsed))
            own.advance(1)
            clock.advance(0.03)
        return found, own.readings

    assert trace(progress=Bar) == trace()


# What it shows


def test_steps_with_their_total_and_the_epoch() -> None:
    loop = Loop(range(10), max_epochs=3, progress=Bar)
    descriptions = []
    for _ in loop:
        descriptions.append(Bar.made[0].description)
    (bar,) = Bar.made
    assert (bar.arguments["unit"], bar.total, bar.n) == ("step", 30, 30)
    assert descriptions[0] == "epoch 0"
    assert bar.description == "epoch 2"
    assert bar.is_closed


def test_a_total_that_is_known_later_or_never() -> None:
    loop = Loop(lambda: range(10), max_epochs=2, progress=Bar)
    totals = [Bar.made[0].total for _ in loop]
    assert totals[-1] == 20
    for _ in Loop(iter(range(10)), max_epochs=1, progress=Bar):
        assert Bar.made[1].total is None
    assert Bar.made[1].n == 10


def test_max_steps_is_a_total() -> None:
    list(Loop(range(10), max_steps=25, progress=Bar))
    assert (Bar.made[0].total, Bar.made[0].n) == (25, 25)


def test_seconds_under_max_seconds() -> None:
    clock = ManualClock()
    loop = Loop(range(10), max_seconds=20, clock=clock, progress=Bar)
    for _ in loop:
        clock.advance(1.5)
    (bar,) = Bar.made
    assert (bar.arguments["unit"], bar.total, bar.n) == ("s", 20, 20)
    assert bar.postfix == {"step": 15}


def test_lists_of_batches_are_steps() -> None:
    list(Loop(range(10), max_epochs=2, batches_per_step=4, progress=Bar))
    assert (Bar.made[0].total, Bar.made[0].n) == (6, 6)


def test_lists_of_steps_are_as_many_steps() -> None:
    loop = Loop(range(10), max_epochs=2, progress=Bar)
    list(loop.chunks(4))
    assert (Bar.made[0].total, Bar.made[0].n) == (20, 20)


def test_a_resumed_run_starts_where_it_is() -> None:
    loop = Loop(range(10), max_epochs=2)
    for batch, _ in loop:
        if batch == 6:
            break
    resumed = Loop(range(10), max_epochs=2, progress=Bar)
    resumed.load_state_dict(loop.state_dict())
    list(resumed)
    (bar,) = Bar.made
    assert (bar.arguments["initial"], bar.total, bar.n) == (7, 20, 20)


def test_a_resumed_run_starts_at_the_time_that_was() -> None:
    clock = ManualClock()
    loop = Loop(range(10), max_seconds=20, clock=clock)
    for batch, _ in loop:
        clock.advance(1)
        if batch == 6:
            break
    resumed = Loop(range(10), max_seconds=20, clock=clock, progress=Bar)
    resumed.load_state_dict(loop.state_dict())
    for _ in resumed:
        clock.advance(1)
    assert (Bar.made[0].arguments["initial"], Bar.made[0].n) == (7, 20)


def test_what_the_user_shows_behind_it(clock: ManualClock) -> None:
    loop = Loop(range(10), max_epochs=1, progress=Bar)
    for step, _ in loop:
        clock.advance(1)
        loop.progress.set_postfix(loss=step)
    assert Bar.made[0].postfix == {"loss": 9}


def test_without_a_bar_a_postfix_is_taken_too() -> None:
    for arguments in ({}, {"progress": False}, {"progress": None}):
        loop = Loop(range(3), max_epochs=1, **arguments)  # type: ignore[call-overload]
        for _ in loop:
            loop.progress.set_postfix(loss=1)
    assert Bar.made == []


# How it ends


@needs_reference_counts
@pytest.mark.parametrize("way", ["break", "raise", "stop", "close", "with", "source", "restart"])
def test_it_is_closed_on_any_exit(way: str) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        if way == "source":
            raise OSError
        yield from range(5)

    def body() -> None:
        for step, (_batch, _) in enumerate(loop):
            if step == 3:
                if way in ("break", "with"):
                    return
                if way == "raise":
                    raise ZeroDivisionError
                if way == "stop":
                    loop.stop()
                if way == "close":
                    loop.close()
                if way == "restart":
                    loop.restart()
                    return

    loop = Loop(source, max_epochs=1, progress=Bar)
    if way == "with":
        with loop:
            body()
    elif way in ("raise", "source", "close"):
        with pytest.raises((ZeroDivisionError, OSError, RuntimeError)):
            body()
    else:
        body()
    gc.collect()  # PyPy counts no references
    assert [bar.is_closed for bar in Bar.made] == [True]


def test_a_run_that_is_left_and_entered_again_goes_on_in_another_bar() -> None:
    loop = Loop(range(10), max_epochs=1, progress=Bar)
    for batch, _ in loop:
        if batch == 3:
            break
    list(loop)
    gc.collect()
    first, second = Bar.made
    assert (first.n, first.is_closed) == (3, True)
    assert (second.arguments["initial"], second.n, second.is_closed) == (4, 10, True)


def test_a_loop_that_is_entered_while_it_is_gone_over_has_one_bar() -> None:
    loop = Loop(range(10), max_epochs=1, progress=Bar)
    iterator = iter(loop)
    next(iterator)
    list(loop)
    del iterator
    gc.collect()
    assert [bar.is_closed for bar in Bar.made] == [True, True]
    assert Bar.made[1].n == 10


# Which bar


def test_a_bar_that_is_given_is_closed_with_the_run_alone() -> None:
    bar = Bar(total=None, initial=0)
    loop = Loop(range(10), max_epochs=1, progress=bar)
    for batch, _ in loop:
        if batch == 3:
            break
    gc.collect()
    assert not bar.is_closed
    list(loop)
    assert (bar.total, bar.n, bar.is_closed) == (10, 10, True)
    assert Bar.made == [bar]


def test_a_bar_that_is_given_starts_where_a_resumed_run_does() -> None:
    bar = Bar(total=None, initial=0)
    initial = []
    for _ in Loop(range(10), max_epochs=1, start_step=4, progress=bar):
        initial.append(bar.initial)  # tqdm has the speed from there on
    assert (initial, bar.n) == ([4] * 6, 10)


def test_a_bar_that_is_given_shows_seconds_as_it_is() -> None:
    bar = Bar(total=3, initial=0)
    clock = ManualClock()
    for _ in Loop(range(9), max_seconds=2, clock=clock, progress=bar):
        clock.advance(1)
    assert (bar.n, bar.total, bar.is_closed) == (2, 3, True)


class File:
    """Stands in for a terminal, or a file."""

    def __init__(self, is_terminal: bool) -> None:
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "is_notebook", "most"),
    [(True, False, 1000), (False, False, 20), (False, True, 1000)],
)
def test_true_takes_the_tqdm_that_suits_and_spares_files(
    is_terminal: bool,
    is_notebook: bool,
    most: int,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    class Tqdm(Bar):
        fp = File(is_terminal)

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Tqdm))
    for _ in Loop(range(500), max_epochs=1, progress=True):
        clock.advance(0.2)
    (bar,) = Bar.made
    assert most / 50 < len(bar.shown) <= most


@pytest.mark.parametrize(("rank", "bars"), [("0", 1), ("1", 0)])
def test_rank_0_alone_shows_a_bar(rank: str, bars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    list(Loop(range(3), max_epochs=1, progress=Bar))
    assert len(Bar.made) == bars


@pytest.mark.no_core
def test_tqdm_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'dloop\[progress\]'"):
        Loop(range(3), max_epochs=1, progress=True)


@pytest.mark.no_core
def test_what_is_no_bar_is_refused() -> None:
    with pytest.raises(TypeError, match="progress=3: pass True, False, a tqdm"):
        Loop(range(3), max_epochs=1, progress=3)


def test_tqdm_itself_in_a_file(monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> None:
    needed("tqdm")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    loop = Loop(range(1000), max_epochs=1, progress=True)
    for _ in loop:
        clock.advance(0.1)
        loop.progress.set_postfix(loss=0.25)
    printed = file.getvalue()
    assert "epoch 0: 100%" in printed
    assert "1000/1000" in printed
    assert "loss=0.25" in printed
    assert printed.count("\r") < 20  # in a file a line is added now and then


def test_tqdm_around_a_loop_has_the_total() -> None:
    needed("tqdm")
    from tqdm import tqdm

    loop = Loop(range(10), max_epochs=3)
    bar = tqdm(loop, file=io.StringIO())
    assert bar.total == 30
    assert len(list(bar)) == 30


# What may be passed


def test_a_callable_decides_how_its_bar_looks() -> None:
    given: list[dict[str, Any]] = []

    def make(**arguments: Any) -> Bar:
        given.append(arguments)
        bar = Bar(**arguments)
        bar.desc = "train: "
        return bar

    list(Loop(range(9), max_epochs=2, progress=make))
    assert given == [{"total": 18, "initial": 0, "mininterval": 0, "miniters": 1}]
    assert Bar.made[0].description == "train: epoch 1"


@pytest.mark.parametrize("made", [None, 3, Bar])
def test_a_callable_that_makes_no_bar_is_told_so(made: Any) -> None:
    loop = Loop(range(9), max_epochs=1, progress=lambda **_: made)
    with pytest.raises(TypeError, match=r"it returned .*; let it return a tqdm"):
        next(iter(loop))


def test_a_postfix_may_be_a_mapping() -> None:
    loop = Loop(range(9), max_epochs=1, progress=Bar)
    for batch, _ in loop:
        loop.progress.set_postfix({"loss": batch}, lr=1)
    assert Bar.made[0].postfix == {"loss": 8, "lr": 1}


def test_the_total_is_known_from_the_start() -> None:
    loop = Loop(range(9), max_epochs=2, start_step=3, progress=Bar)
    next(iter(loop))
    assert (Bar.made[0].arguments["total"], Bar.made[0].arguments["initial"]) == (18, 3)


# How it ends


@needs_reference_counts
def test_a_run_that_an_error_ends_has_not_reached_its_total() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError

    with pytest.raises(OSError):
        list(Loop(source, max_steps=10, lookahead=False, progress=Bar))
    (bar,) = Bar.made
    assert (bar.n, bar.total, bar.is_closed) == (5, 10, True)


@needs_reference_counts
def test_a_run_that_is_left_in_its_last_body_is_done() -> None:
    for batch, _ in Loop(range(9), max_epochs=1, progress=Bar):
        if batch == 8:
            break
    assert (Bar.made[0].n, Bar.made[0].total) == (9, 9)


@needs_reference_counts
def test_a_bar_that_is_given_is_closed_where_an_error_ends_the_run() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError

    bar = Bar(total=10, initial=0)
    with pytest.raises(OSError):
        list(Loop(source, max_steps=10, progress=bar))
    assert bar.is_closed


def test_the_bar_of_a_run_that_begins_anew_stays_as_it_was() -> None:
    loop = Loop(range(9), max_epochs=1, progress=Bar)
    older = iter(loop)
    for _ in range(4):
        next(older)
    loop.restart()
    list(loop)
    assert min(Bar.made[0].shown) >= 0
    assert Bar.made[1].n == 9
    assert all(bar.is_closed for bar in Bar.made)


def test_a_bar_that_is_given_gets_the_seconds_as_its_total() -> None:
    clock = ManualClock()
    bar = Bar(total=None, initial=0)
    for _ in Loop(range(9), max_seconds=2, clock=clock, progress=bar):
        clock.advance(0.123456)
        assert bar.n == round(bar.n, 1)
    assert (bar.n, bar.total) == (2, 2)
