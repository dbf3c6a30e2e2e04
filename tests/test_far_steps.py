"""Counters and times near 2**62, reached by loading a state."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, StateError

GREATEST = 2**62
STEPS = 40
LENGTH = 11  # of an epoch


def resumed(make: Callable[[], Loop[Any]], steps: int, **changes: Any) -> Loop[Any]:
    """A loop that continues after `steps` steps, in epochs of LENGTH batches."""
    epoch, epoch_steps = divmod(steps - 1, LENGTH)
    epoch_steps += 1
    first = make()
    for _ in itertools.islice(first, epoch_steps):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    assert state["epoch_steps"] == epoch_steps
    never = [[name, -1] for name, _ in state["windows"]]
    loop = make()
    loop.load_state_dict({**state, "epoch": epoch, "steps": steps, "windows": never, **changes})
    assert (loop.epoch, loop.global_step) == (epoch, steps - 1)
    return loop


def fired(events: dict[str, Event], steps: int) -> list[set[Any]]:
    """The events of the first STEPS steps of a run that continues after `steps` steps."""

    def make() -> Loop[Any]:
        return Loop(range(LENGTH), events, max_epochs=GREATEST, clock=lambda: 0)

    return [set(due) for _, due in itertools.islice(resumed(make, steps), STEPS)]


@given(
    begin=st.integers(GREATEST - 3 * STEPS, GREATEST - STEPS - 1),
    period=st.one_of(st.integers(1, 20), st.integers(GREATEST - 3 * STEPS, GREATEST)),
    at=st.lists(st.integers(GREATEST - 3 * STEPS, GREATEST), min_size=1),
    start=st.integers(GREATEST - 3 * STEPS, GREATEST - 1),
    per_epoch=st.booleans(),
)
def test_step_criteria_fire_at_the_right_steps_near_the_greatest(
    begin: int, period: int, at: list[int], start: int, per_epoch: bool
) -> None:
    events = {
        "every": Event(every_n_steps=period, per_epoch=per_epoch),
        "at": Event(at_step=at, until_step=GREATEST),
        "late": Event(every_n_steps=2, from_step=start),
        "long": Event(every_n_steps=GREATEST),
    }
    for offset, names in enumerate(fired(events, begin)):
        step = begin + offset
        epoch_step = step % LENGTH
        expected: set[Any] = set()
        if ((epoch_step if per_epoch else step) + 1) % period == 0:
            expected.add("every")
        if step in at:
            expected.add("at")
        if step >= start and (step + 1) % 2 == 0:
            expected.add("late")
        if (step + 1) % GREATEST == 0:
            expected.add("long")
        if epoch_step == LENGTH - 1:
            expected.add(LoopEvents.EPOCH_END)
        assert names == expected


@pytest.mark.parametrize("begin", [GREATEST - STEPS, GREATEST - 3, GREATEST - 1, GREATEST])
def test_no_counter_overflows_at_the_greatest_steps(begin: int) -> None:
    events = {
        "long": Event(every_n_steps=GREATEST),
        "last": Event(at_step=GREATEST, per_epoch=True),
        "late": Event(every_n_steps=GREATEST, from_step=GREATEST, per_epoch=True),
        "seconds": Event(every_n_seconds=GREATEST / 1e9, from_step=GREATEST),
    }
    # a state this far may be refused
    with contextlib.suppress(StateError) if begin >= GREATEST - 1 else contextlib.nullcontext():
        found = [names - {LoopEvents.EPOCH_END} for names in fired(events, begin)]
        steps = range(begin, begin + STEPS)
        assert found == [{"long"} if (step + 1) % GREATEST == 0 else set() for step in steps]


@pytest.mark.parametrize("left", [1, 2, STEPS])
@pytest.mark.parametrize("sizes", [None, 7, (4, 1)], ids=repr)
def test_a_run_with_the_greatest_max_steps_ends(left: int, sizes: Any) -> None:
    def make() -> Loop[Any]:
        return Loop(range(LENGTH), {"Two": Event(every_n_steps=2)}, max_steps=GREATEST)

    loop = resumed(make, GREATEST - left)
    assert len(loop) == left
    assert loop.steps_to_next_event() == 2 - left % 2
    steps = 0
    for batches, events in loop if sizes is None else loop.chunks(sizes):
        steps += 1 if sizes is None else len(batches)
        assert (LoopEvents.TRAINING_END in events) == (steps == left)
        assert len(loop) == left - steps
    assert steps == left
    assert (loop.global_step, loop.stop_reason) == (GREATEST - 1, "max_steps")
    json.dumps(loop.state_dict())


GREATEST_TIME = GREATEST // 10**9  # seconds


@given(
    saved=st.integers(GREATEST - 2000, GREATEST - 1),
    start=st.sampled_from([-GREATEST_TIME, -GREATEST_TIME + 1, 0, 5]),
    later=st.sampled_from([0, 1, 2 * GREATEST_TIME - 1, 2 * GREATEST_TIME]),
    period=st.integers(GREATEST - 2000, GREATEST),
)
def test_training_time_stays_constant_instead_of_overflowing(
    saved: int, start: int, later: int, period: int
) -> None:
    readings = itertools.chain(
        [0] * 3, [start], itertools.repeat(min(GREATEST_TIME, start + later))
    ).__next__

    def make() -> Loop[Any]:
        events = {"timer": Event(every_n_seconds=period / 1e9), "often": Event(every_n_seconds=1)}
        return Loop(range(LENGTH), events, max_epochs=GREATEST, clock=readings)

    loop = resumed(make, 1, elapsed=saved)
    steps = iter(loop)
    next(steps)
    elapsed = loop.state.elapsed
    assert saved / 1e9 <= elapsed <= GREATEST / 1e9
    for _ in range(3):
        next(steps)
        assert elapsed <= loop.state.elapsed <= GREATEST / 1e9
    if later > 1:
        assert loop.state.elapsed == elapsed
    again = make()
    again.load_state_dict(json.loads(json.dumps(loop.state_dict())))
    assert again.global_step == 4
