"""Timers with the real clock, for which the compiled core has its own code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from time import perf_counter

from dloop import Event, Loop


def many_batches() -> Iterator[int]:
    """More batches than any run here takes, but not infinitely many."""
    return iter(range(10**8))


def test_a_timer_fires_when_its_period_has_passed_and_not_before() -> None:
    events = {"Tick": Event(every_n_seconds=0.1), "Often": Event(every_n_steps=3)}
    loop = Loop(many_batches(), events, max_seconds=0.35)
    began = perf_counter()
    ticks = [loop.state.elapsed for _, due in loop if "Tick" in due]
    assert perf_counter() - began >= 0.35
    assert loop.state.elapsed >= 0.35
    assert len(ticks) >= 1
    readings = [round(tick * 1e9) for tick in [0.0, *ticks]]  # a difference of floats is rounded
    assert all(later - tick >= 100_000_000 for tick, later in itertools.pairwise(readings))


def test_each_at_time_fires_once_and_max_seconds_ends_the_run() -> None:
    at_times = (0, 0.05, 0.1)
    loop = Loop(many_batches(), {"Now": Event(at_time=at_times)}, max_seconds=0.15)
    times = [loop.state.elapsed for _, due in loop if "Now" in due]
    assert 1 <= len(times) <= 3  # on a busy machine several fire together
    assert times == sorted(set(times))
    assert all(at_time <= time for at_time, time in zip(at_times, times))
    assert loop.stop_reason == "max_seconds"


def test_a_timer_with_from_step_fires_at_that_step() -> None:
    loop = Loop(range(100_000), {"Late": Event(at_time=0, from_step=70_000)}, max_epochs=1)
    assert [step for step, due in loop if "Late" in due] == [70_000]


def test_elapsed_never_decreases_while_no_timer_is_due() -> None:
    events = {"Hourly": Event(every_n_seconds=3600), "Often": Event(every_n_steps=5)}
    loop = Loop(range(20_000), events, max_epochs=1)
    began = perf_counter()
    times = [loop.state.elapsed for _ in loop]
    assert times == sorted(times)
    assert 0 < times[-1] <= perf_counter() - began


def test_the_elapsed_of_a_state_does_not_change() -> None:
    loop = Loop(range(9), {"Hourly": Event(every_n_seconds=3600)}, max_epochs=1)
    seen = [(loop.state, loop.state.elapsed) for _ in loop]
    assert [state.elapsed for state, _ in seen] == [elapsed for _, elapsed in seen]


def test_elapsed_never_decreases_in_conditions() -> None:
    times: list[float] = []
    events = {
        "Hourly": Event(every_n_seconds=3600),
        "Seen": Event(lambda state: times.append(state.elapsed)),
    }
    for _ in Loop(range(5000), events, max_epochs=1):
        pass
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1]
