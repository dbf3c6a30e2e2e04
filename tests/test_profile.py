"""Where the time of a run goes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dloop._core_py
from cores import use_core
from dloop import Event, Loop, LoopError, LoopEvents, profile
from manual_clock import ManualClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[ManualClock]:
    """The clock of profiles in the Python core; the compiled one reads the real clock."""
    clock = ManualClock(7)

    def nanoseconds() -> int:
        return round(clock() * 1e9)

    monkeypatch.setattr(profile, "perf_counter_ns", nanoseconds)
    monkeypatch.setattr(profile, "time_ns", lambda: 1_000_000_000)
    monkeypatch.setattr(dloop._core_py, "perf_counter_ns", nanoseconds)
    monkeypatch.setattr("dloop.loop.perf_counter_ns", nanoseconds)
    with use_core("python"):
        yield clock


def batches(clock: ManualClock, count: int, seconds: float) -> Callable[[], Iterator[int]]:
    """What makes batches that take so many seconds each."""

    def generate() -> Iterator[int]:
        for batch in range(count):
            clock.advance(seconds)
            yield batch

    return generate


def near(value: float) -> Any:
    """The value of a histogram, whose bins are 3 % wide."""
    return pytest.approx(value, rel=0.04)


# Both cores, by the real clock


def test_waits_bodies_and_pauses_by_the_real_clock() -> None:
    def slow() -> Iterator[int]:
        for batch in range(20):
            time.sleep(0.002)
            yield batch

    loop = Loop(slow, {"Eval": Event(at_step=7)}, max_steps=20, profile=True)
    for _, events in loop:
        time.sleep(0.001)
        if "Eval" in events:
            with loop.pause_clock(), loop.pause_clock():
                time.sleep(0.03)
    found = loop.profile
    assert found.steps == 20
    assert 0.04 <= found.waiting < 0.4
    assert 0.02 <= found.bodies < 0.2
    assert 0.03 <= found.paused < 0.3
    assert found.total == found.waiting + found.bodies + found.paused
    assert 0.002 <= found.waits[0] <= found.waits[1] <= found.waits[2] <= found.waits[3] < 0.1
    assert found.body_times[3] >= 0.031
    (cost,) = [cost for cost in found.events if cost.names == ("Eval",)]
    assert cost.times == 1
    assert 0.02 < cost.seconds < 0.3


def test_lists_are_as_many_steps() -> None:
    loop = Loop(range(20), {"Log": Event(every_n_steps=6)}, max_epochs=1, profile=True)
    lists = list(loop.chunks(4))
    assert loop.profile.steps == 20
    trace = loop.profile._timings.last_steps()
    assert [step["size"] for step, _ in trace] == [len(batches) for batches, _ in lists]


def test_the_run_is_the_same() -> None:
    def trace(**arguments: Any) -> list[Any]:
        log = {"Log": Event(every_n_steps=3)}
        loop = Loop(lambda: iter(range(7)), log, max_epochs=2, clock=int, **arguments)
        return [(batch, sorted(map(str, events)), loop.state_dict()) for batch, events in loop]

    assert trace(profile=True) == trace()


def test_an_older_iterator_says_that_it_was_replaced() -> None:
    loop = Loop(range(10), max_epochs=1, profile=True)
    older = iter(loop)
    next(older)
    newer = iter(loop)
    next(newer)
    with pytest.raises(LoopError, match="iterator"):
        next(older)
    assert len(list(newer)) == 8
    assert loop.profile.steps == 10


def test_a_step_that_stands_for_an_exception_is_no_step() -> None:
    def source() -> Iterator[int]:
        yield from range(20)
        raise OSError

    loop = Loop(source, max_epochs=1, profile=True, on_exception="event")
    with pytest.raises(OSError):
        list(loop)
    assert loop.profile.steps == loop.state.steps_done == 20


def test_event_sets_are_bounded() -> None:
    events = {number: Event(at_step=number) for number in range(500)}
    loop = Loop([0] * 600, events, max_epochs=1, profile=True)
    list(loop)
    assert 190 <= len(loop.profile.events) <= 200
    assert "event (10 of " in str(loop.profile)


@pytest.mark.no_core
def test_a_loop_without_a_profile_says_so() -> None:
    with pytest.raises(LoopError, match="made without profile=True"):
        Loop(range(3), max_epochs=1).profile  # noqa: B018


# The Python core, by a scripted clock


@pytest.mark.no_core
def test_it_can_be_read_at_any_time(clock: ManualClock) -> None:
    loop = Loop(batches(clock, 10, 1), max_steps=10, profile=True)
    assert (loop.profile.total, loop.profile.steps, loop.profile.events) == (0, 0, [])
    assert loop.profile.waits == (0, 0, 0, 0)
    assert "0 steps in 0 ns: 0.0 a second" in str(loop.profile)
    with loop.pause_clock():  # before the first step
        clock.advance(1)
    for _ in loop:
        clock.advance(2)
        if loop.global_step == 4:
            assert (loop.profile.steps, loop.profile.bodies) == (4, 8)
    assert (loop.profile.steps, loop.profile.bodies, loop.profile.paused) == (10, 20, 0)


@pytest.mark.no_core
def test_a_body_ends_where_the_loop_is_left(clock: ManualClock) -> None:
    events = {"Eval": Event(every_n_steps=2)}
    loop = Loop(batches(clock, 10, 0.5), events, max_steps=10, profile=True)
    while loop.stop_reason is None:
        for _, fired in loop:
            clock.advance(1)
            if "Eval" in fired:
                clock.advance(2)
                break
        gc.collect()
        clock.advance(1000)
    found = loop.profile
    assert (found.steps, found.waiting, found.bodies) == (10, 5, 20)
    assert sum(cost.times for cost in found.events) == 5


@pytest.mark.no_core
@pytest.mark.parametrize("nanoseconds", [0, 1, 31, 32, 63, 64, 65, 1000, 10**6, 12345678901, 2**62])
def test_a_duration_is_right_within_three_percent(nanoseconds: int) -> None:
    durations: Any = dloop._core_py.Durations()
    durations.add(nanoseconds)
    assert profile._quantile(durations, 0.5) == pytest.approx(nanoseconds / 1e9, rel=0.032)


@pytest.mark.no_core
def test_events_cost_what_is_above_a_quiet_step(clock: ManualClock) -> None:
    events = {"Log": Event(every_n_steps=10), "Save": Event(every_n_steps=50)}
    loop = Loop([0] * 100, events, max_steps=100, profile=True)
    for _, fired in loop:
        clock.advance(1)
        if "Log" in fired:
            clock.advance(0.5)
        if "Save" in fired:
            clock.advance(19)
    costs = {cost.names: (cost.times, cost.seconds) for cost in loop.profile.events}
    assert costs == {
        ("Log",): (8, near(0.5)),
        ("Log", "Save"): (1, near(19.5)),
        (LoopEvents.EPOCH_END, "Log", "Save", LoopEvents.TRAINING_END): (1, near(19.5)),
    }
    shares = [cost.share for cost in loop.profile.events]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(43 / loop.profile.total, rel=0.04)


@pytest.mark.no_core
def test_the_table(clock: ManualClock) -> None:
    assert (
        str(profiled(clock))
        == """\
100 steps in 11 s: 9.1 a second

           time  share   median     95%     99%  longest
-------  ------  -----  -------  ------  ------  -------
waiting  100 ms   0.9%     1 ms    1 ms    1 ms     1 ms
bodies   900 ms   8.2%  9.04 ms  1.01 s  1.01 s   1.01 s
paused     10 s  90.9%

event (2 of 2)           steps  over a quiet one  share
-----------------------  -----  ----------------  -----
Save <1>                     9               1 s  81.8%
Save <1> + TRAINING_END      1               1 s   9.1%"""
    )


def test_without_a_step_the_table_has_no_events() -> None:
    assert "event" not in str(Loop([1], max_epochs=1, profile=True).profile)


def profiled(clock: ManualClock) -> profile.Profile:
    """Of 100 steps that wait for 1 ms and take 9 ms; every tenth is paused for a second."""
    loop = Loop(
        batches(clock, 200, 0.001),
        {"Save <1>": Event(every_n_steps=10)},
        max_steps=100,
        lookahead=False,
        profile=True,
    )
    for _, fired in loop:
        clock.advance(0.009)
        if fired:
            with loop.pause_clock():
                clock.advance(1)
    return loop.profile


# The trace


@pytest.mark.no_core
def test_a_trace_of_the_last_steps(clock: ManualClock, tmp_path: Path) -> None:
    events = {"Log": Event(at_step=4)}
    loop = Loop(batches(clock, 9, 0.25), events, max_steps=6, lookahead=False, profile=2)
    for batch, fired in loop:
        clock.advance(1)
        if batch in (0, 4):
            with loop.pause_clock():
                clock.advance(2 if "Log" in fired else 0)
    loop.profile.save_trace(tmp_path / "trace.json")
    assert repr(loop.profile).startswith("<Profile: 6 steps")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (events[0]["ph"], events[0]["args"]) == ("M", {"name": "rank 0"})
    # as the Trace Event Format has them: microseconds
    found = [(each["name"], each["ph"], each["ts"], each.get("dur")) for each in events[1:]]
    began = 1e6 + 5 * 0.25e6 + 4e6  # the fifth body
    assert found == [
        ("wait", "X", began - 0.25e6, 0.25e6),
        ("body", "X", began, 3e6),
        ("Log", "i", began, None),
        ("wait", "X", began + 3e6, 0.25e6),
        ("body", "X", began + 3.25e6, 1e6),
        ("TRAINING_END", "i", began + 3.25e6, None),
        ("pause", "X", began + 1e6, 2e6),
    ]
    assert [event["args"] for event in events[1:3]] == [{"step": 4, "epoch": 0}] * 2


@pytest.mark.no_core
@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ns"),
        (2.3456e-6, "2.35 µs"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (90, "1.5 min"),
        (-7200, "-2 h"),
    ],
)
def test_durations_are_spelled_in_three_digits(seconds: float, text: str) -> None:
    assert profile.spelled(seconds) == text


@pytest.mark.no_core
def test_a_pause_counts_as_far_as_it_is_in_a_body(clock: ManualClock) -> None:
    loop = Loop(range(3), max_epochs=1, profile=True)
    with loop.pause_clock():
        clock.advance(5)
        pairs = iter(loop)
        next(pairs)
        clock.advance(1)
    next(pairs)
    assert loop.profile.paused == 1
