"""Timers by the real clock, which the compiled core reads in two ways that no script can show."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from dloop import Event, Loop


def enough() -> Iterator[int]:
    """Batches for longer than any run here takes, but not for ever."""
    return iter(range(10**8))


def test_a_timer_comes_when_its_time_has_come_and_not_before() -> None:
    events = {"Tick": Event(every_n_seconds=0.1), "Often": Event(every_n_steps=3)}
    loop = Loop(enough(), events, max_seconds=0.35)
    began = perf_counter()
    ticks = [loop.state.elapsed for _, due in loop if "Tick" in due]
    assert perf_counter() - began >= 0.35
    assert loop.state.elapsed >= 0.35
    assert len(ticks) >= 1
    assert all(later - tick >= 0.1 for tick, later in zip([0.0, *ticks], ticks))


def test_every_moment_comes_once_and_the_run_ends_by_the_clock() -> None:
    moments = (0, 0.05, 0.1)
    loop = Loop(enough(), {"Now": Event(at_time=moments)}, max_seconds=0.15)
    times = [loop.state.elapsed for _, due in loop if "Now" in due]
    assert 1 <= len(times) <= 3  # those that a busy machine slept through come together
    assert times == sorted(set(times))
    assert all(moment <= time for moment, time in zip(moments, times))
    assert loop.stop_reason == "max_seconds"


def test_a_timer_that_waits_for_its_first_step_fires_there() -> None:
    loop = Loop(range(100_000), {"Late": Event(at_time=0, from_step=70_000)}, max_epochs=1)
    assert [step for step, due in loop if "Late" in due] == [70_000]


def test_elapsed_never_goes_back_with_timers_that_are_far_off() -> None:
    events = {"Hourly": Event(every_n_seconds=3600), "Often": Event(every_n_steps=5)}
    loop = Loop(range(20_000), events, max_epochs=1)
    began = perf_counter()
    times = [loop.state.elapsed for _ in loop]
    assert times == sorted(times)
    assert 0 < times[-1] <= perf_counter() - began


def test_a_state_keeps_the_time_that_it_told() -> None:
    loop = Loop(range(9), {"Hourly": Event(every_n_seconds=3600)}, max_epochs=1)
    told = [(loop.state, loop.state.elapsed) for _ in loop]
    assert [state.elapsed for state, _ in told] == [elapsed for _, elapsed in told]


def test_elapsed_never_goes_back_in_conditions_either() -> None:
    times: list[float] = []
    events = {
        "Hourly": Event(every_n_seconds=3600),
        "Seen": Event(lambda state: times.append(state.elapsed)),
    }
    for _ in Loop(range(5000), events, max_epochs=1):
        pass
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1]
