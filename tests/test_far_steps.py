"""Counters near 2**62, which nobody reaches by counting: the run begins there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents

MOST = 2**62
STEPS = 40


def loop_at(counters: dict[str, int], loop: Loop[Any]) -> Loop[Any]:
    """`loop`, loaded with the state of a run that has come so far."""
    loop.load_state_dict({**loop.state_dict(), **counters, "windows": []})
    return loop


def fired(events: dict[str, Event], steps: int, epoch_steps: int, length: int) -> list[set[Any]]:
    """The event sets of a run that begins with so many steps done."""
    loop = Loop(list(range(length)), events, max_seconds=1e9, clock=lambda: 0)
    loop_at({"epoch": 5, "steps": steps, "epoch_steps": epoch_steps}, loop)
    return [set(due) for _, (_, due) in zip(range(STEPS), loop)]


@given(
    begin=st.integers(MOST - 3 * STEPS, MOST - STEPS - 1),
    done=st.integers(0, 10),
    period=st.one_of(st.integers(1, 20), st.integers(MOST - 3 * STEPS, MOST)),
    at=st.lists(st.integers(MOST - 3 * STEPS, MOST), min_size=1),
    start=st.integers(MOST - 3 * STEPS, MOST - 1),
    per_epoch=st.booleans(),
)
def test_far_steps_follow_the_same_formulas(
    begin: int, done: int, period: int, at: list[int], start: int, per_epoch: bool
) -> None:
    events = {
        "every": Event(every_n_steps=period, per_epoch=per_epoch),
        "at": Event(at_step=at, until_step=MOST),
        "late": Event(every_n_steps=2, from_step=start),
        "long": Event(every_n_steps=MOST),
    }
    length = 11
    found = fired(events, begin, done, length)
    for offset, names in enumerate(found):
        step = begin + offset
        epoch_step = (done + offset) % length
        expected: set[Any] = set()
        if ((epoch_step if per_epoch else step) + 1) % period == 0:
            expected.add("every")
        if step in at:
            expected.add("at")
        if step >= start and (step + 1) % 2 == 0:
            expected.add("late")
        if (step + 1) % MOST == 0:
            expected.add("long")
        if epoch_step == length - 1:
            expected.add(LoopEvents.EPOCH_END)
        assert names == expected


@pytest.mark.parametrize("begin", [MOST - STEPS, MOST - 3, MOST])
def test_no_counter_overflows_at_the_end_of_what_can_be_asked_for(begin: int) -> None:
    events = {
        "long": Event(every_n_steps=MOST),
        "last": Event(at_step=MOST, per_epoch=True),
        "late": Event(every_n_steps=MOST, from_step=MOST, per_epoch=True),
        "seconds": Event(every_n_seconds=MOST / 1e9, from_step=MOST),
    }
    found = fired(events, begin, 3, 11)
    expected = [{"long"} if (begin + offset + 1) % MOST == 0 else set() for offset in range(STEPS)]
    assert [names - {LoopEvents.EPOCH_END} for names in found] == expected


@given(now=st.floats(0, 4.6e9), period=st.integers(MOST - 2000, MOST))
def test_training_time_stands_still_before_it_overflows(now: float, period: int) -> None:
    readings = iter([-4.6e9, now, 4.6e9])
    loop: Loop[int] = Loop(
        range(9),
        {"timer": Event(every_n_seconds=period / 1e9)},
        max_steps=9,
        clock=lambda: next(readings),
    )
    loop_at({"elapsed": MOST - 2000}, loop)
    steps = iter(loop)
    next(steps)
    elapsed = loop.state.elapsed
    assert elapsed == (MOST - 1) / 1e9
    next(steps)
    assert loop.state.elapsed == elapsed
