"""What a plan says of a run before it: DESIGN.md, section 5."""

from __future__ import annotations

import re
import signal
import time
import warnings
from collections.abc import Hashable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dloop import Event, Loop, LoopError, LoopEvents, LoopState, LoopWarning
from dloop.plan import Plan, PlanRow
from dloop.progressions import Pattern, Union, progression

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
SVG = "{http://www.w3.org/2000/svg}"


class Unsized:
    """A loader whose length nobody knows."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class WithSetEpoch(Unsized):
    """A loader whose epochs may be of different lengths; it counts how often it was told one."""

    told = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.told += 1


class Stream:
    """A single-pass loader without an end."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        self.given += 1
        return self.given


class AtLast(Unsized):
    """A stream that says itself which batch is its last."""

    end_of_dataloader = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return 0


def holds(state: LoopState) -> bool:
    return False


def row_of(event: Any, loader: Any = None, **limits: Any) -> PlanRow:
    """The row of an event in a run over ten batches three times, or as `limits` say."""
    loader = range(10) if loader is None else loader
    return Loop(loader, {"E": event}, **(limits or {"max_epochs": 3})).plan().rows[0]


def warnings_of(event: Any, loader: Any = None, **limits: Any) -> list[str]:
    loader = range(10) if loader is None else loader
    return [*Loop(loader, {"E": event}, **(limits or {"max_epochs": 3})).plan().warnings]


# The plan and the run


periods = st.integers(1, 9)
points = st.sets(st.integers(0, 30), min_size=1, max_size=4)


@st.composite
def step_events(draw: Any) -> Event:
    """An Event of step and epoch criteria."""
    criteria = {
        "every_n_steps": periods,
        "at_step": points,
        "every_n_epochs": st.integers(1, 4),
        "at_epoch": st.sets(st.integers(0, 5), min_size=1, max_size=2),
    }
    names = draw(st.sets(st.sampled_from(sorted(criteria)), min_size=1, max_size=3))
    values = {name: draw(criteria[name]) for name in sorted(names)}
    if draw(st.booleans()):
        values["from_step"] = draw(st.integers(0, 15))
    if draw(st.booleans()):
        values["until_step"] = values.get("from_step", 0) + draw(st.integers(1, 25))
    if names & {"every_n_steps", "at_step"}:
        count_by = draw(st.sampled_from((None, "per_epoch", "per_launch")))
        if count_by is not None:
            values[count_by] = True
    if "every_n_steps" in names and draw(st.booleans()):
        values["first_at_step"] = draw(st.integers(0, 12))
    return Event(**values)


@st.composite
def joined_events(draw: Any) -> Any:
    parts = draw(st.lists(step_events(), min_size=1, max_size=draw(st.sampled_from((1, 2, 6)))))
    members = draw(st.sets(st.sampled_from((EPOCH_END, TRAINING_END)), max_size=2))
    joined = parts[0]
    for part in (*parts[1:], *sorted(members, key=repr)):
        joined = joined | part
    return joined


@st.composite
def loops(draw: Any) -> tuple[Loop[Any], bool]:
    """A loop, and whether the length of its epochs is known."""
    length = draw(st.integers(1, 11))
    kind = draw(st.sampled_from(("sized", "unsized", "callable", "stream", "sized", "sampler")))
    loader: Any = {
        "sized": range(length),
        "unsized": Unsized(length),
        "callable": lambda: iter(range(length)),
        "stream": Stream(),
        "sampler": WithSetEpoch(length),
    }[kind]
    arguments: dict[str, Any] = {}
    if kind == "stream" or draw(st.booleans()):
        arguments["max_steps"] = draw(st.integers(1, 45))
    else:
        arguments["max_epochs"] = draw(st.integers(1, 6))
    if kind == "sized" and draw(st.booleans()):
        arguments["dataloader_len"] = draw(st.integers(1, length))
    if kind == "stream" and draw(st.booleans()):
        arguments["dataloader_len"] = length
    if draw(st.booleans()):
        arguments["start_step"] = draw(st.integers(0, 20))
    if draw(st.booleans()):
        arguments["batches_per_step"] = draw(st.integers(1, 4))
    if draw(st.integers(0, 3)) == 0:
        arguments["stop_when"] = draw(joined_events())
    events = {name: draw(joined_events()) for name in range(draw(st.integers(1, 3)))}
    return Loop(loader, events, **arguments), kind in ("sized", "stream", "sampler")


def fired(loop: Loop[Any]) -> tuple[list[int], dict[Hashable, list[int]]]:
    """The steps of a run, and those at which each of its events fires."""
    steps: list[int] = []
    found: dict[Hashable, list[int]] = {name: [] for name in (*loop.events, *LoopEvents)}
    for _, events in loop:
        steps.append(loop.global_step)
        for name in events:
            found[name].append(loop.global_step)
    return steps, found


@settings(max_examples=400)
@given(loops())
def test_a_plan_says_what_the_run_then_does(drawn: tuple[Loop[Any], bool]) -> None:
    loop, has_length = drawn
    plan = loop.plan()
    text = str(plan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LoopWarning)
            steps, found = fired(loop)
    except (LoopWarning, LoopError):  # what goes wrong is no part of a plan
        return
    assert loop.plan().rows == plan.rows or not has_length
    assert max(map(len, text.splitlines())) <= 80
    if plan.steps is not None:
        assert plan.steps == len(steps)
    assert (plan.steps is not None) >= has_length
    assert plan.most_steps is None or len(steps) <= plan.most_steps
    assert not steps or steps[0] == plan.first_step
    for row in plan.rows:
        times = len(found[row.name])
        assert row.at_least <= times
        assert row.at_most is None or times <= row.at_most
        if has_length:
            assert row.times == times
            assert row.first == tuple(found[row.name][:3])
            assert row.last == (found[row.name][-1] if times else None)


@settings(max_examples=60)
@given(st.lists(step_events(), min_size=9, max_size=14, unique=True), st.integers(1, 8))
def test_a_union_of_many_parts_may_be_left_open(parts: list[Event], length: int) -> None:
    union: Any = parts[0]
    for part in parts[1:]:
        union = union | part
    loop = Loop(range(length), {"E": union}, max_steps=40)
    row = loop.plan().rows[0]
    _, found = fired(loop)
    assert row.at_least <= len(found["E"])
    assert row.at_most is not None
    assert len(found["E"]) <= row.at_most
    assert [part.when for part in row.parts] == [row_of(part).when for part in parts]
    assert (row.first, row.last) == (tuple(found["E"][:3]), found["E"][-1] if found["E"] else None)


def test_a_union_that_is_left_open_shows_its_parts() -> None:
    primes = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151)
    union: Any = Event(every_n_steps=primes[0])
    for prime in primes[1:]:
        union = union | Event(every_n_steps=prime)
    plan = Loop(range(10), {"E": union}, max_steps=10**15).plan()
    row = plan.rows[0]
    assert row.times is None
    assert row.at_least == 10**15 // 101
    assert row.at_most == sum(10**15 // prime for prime in primes)
    assert [part.times for part in row.parts] == [10**15 // prime for prime in primes]
    shown = " ".join(str(plan).split())
    assert "E any of 11: 9,900,990,099,009 to" in shown
    assert shown.count("- every") == 11
    by_epochs: Any = Event(every_n_epochs=primes[0])
    for prime in primes[1:]:
        by_epochs = by_epochs | Event(every_n_epochs=prime)
    row = row_of(by_epochs, Unsized(1), max_epochs=10**15)
    assert (row.at_least, row.at_most) == (
        10**15 // 101,
        sum(10**15 // prime for prime in primes),
    )
    eight: Any = Event(every_n_steps=primes[0])
    for prime in primes[1:8]:
        eight = eight | Event(every_n_steps=prime)
    repeats = 1
    others = 1
    for prime in primes[:8]:
        repeats *= prime
        others *= prime - 1
    assert row_of(eight, max_steps=3 * repeats).times == 3 * (repeats - others)


def test_a_million_million_steps_take_milliseconds() -> None:
    events = {
        "Log": Event(every_n_steps=100),
        "Eval": Event(every_n_steps=7, per_epoch=True) | Event(every_n_steps=64) | TRAINING_END,
        "Save": Event(every_n_steps=6, per_epoch=True) | Event(every_n_steps=9) | EPOCH_END,
    }
    loop = Loop(range(1000), events, max_steps=10**12)
    begun = time.perf_counter()
    rows = loop.plan().rows
    assert time.perf_counter() - begun < 0.5
    assert [row.times for row in rows[3:]] == [10**9, 1]
    assert rows[0][2:6] == (10**10, 10**10, (99, 199, 299), 10**12 - 1)
    # "Eval" repeats after 8 epochs, "Save" after 9
    repeated, nine, rest = (
        Loop(range(1000), events, max_epochs=epochs).plan().rows for epochs in (8, 9, 1)
    )
    assert rows[1].times == 125_000_000 * repeated[1].at_least
    assert rows[2].times == 111_111_111 * nine[2].at_least + rest[2].at_least


def test_the_run_goes_on_as_if_it_had_not_been_asked() -> None:
    loader = WithSetEpoch(4)
    loop = Loop(loader, {"Log": Event(every_n_steps=3)}, max_epochs=2)
    plan = loop.plan()
    assert loader.told == 0
    assert loop.global_step == -1
    batches = []
    for batch, _ in loop:
        assert loop.plan().rows == plan.rows
        batches.append(batch)
    assert batches == [0, 1, 2, 3] * 2
    assert loader.told == 2
    assert loop.plan().rows == plan.rows
    stream = Stream()
    Loop(stream, {"Log": Event(every_n_steps=3)}, max_steps=2).plan()
    assert stream.given == 0


def test_a_plan_of_a_resumed_run_begins_where_it_goes_on() -> None:
    events = {"Log": Event(every_n_steps=4), "Start": Event(at_step=0, per_launch=True)}
    first = Loop(range(10), events, max_epochs=3)
    for _ in first:
        if first.global_step == 13:
            break
    resumed = Loop(range(10), events, max_epochs=3)
    resumed.load_state_dict(first.state_dict())
    plan = resumed.plan()
    assert (plan.first_step, plan.steps, plan.epochs, plan.steps_per_epoch) == (14, 16, 2, 10)
    assert plan.summary == "16 steps, 14 to 29; 2 epochs of 10 steps"
    assert (plan.rows[0].first, plan.rows[0].last) == ((15, 19, 23), 27)
    assert plan.rows[1].first == (14,)
    assert fired(resumed)[1]["Log"] == [15, 19, 23, 27]


# Words


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event(every_n_steps=1), "every step"),
        (Event(every_n_steps=2000, first_at_step=1000), "every 2,000 steps, first at step 1,000"),
        (Event(every_n_steps=2, per_epoch=True), "every 2 steps of each epoch"),
        (Event(every_n_steps=2, per_launch=True), "every 2 steps of this launch"),
        (Event(at_step=[1, 2]), "at steps 1 and 2"),
        (Event(at_step=range(4)), "at steps 0, 1, 2 and 3"),
        (Event(at_step=range(5)), "at steps 0, 1, 2 and 2 more"),
        (Event(every_n_epochs=1), "at the end of every epoch"),
        (Event(every_n_epochs=2), "at the end of every 2 epochs"),
        (Event(at_epoch=2), "at the end of epoch 2"),
        (Event(every_n_seconds=2.5), "every 2.5 s"),
        (Event(at_time=[3, 600], per_launch=True), "at 3 s and 600 s of this launch"),
        (Event(lambda state: True), "when its condition holds"),
        (Event(holds), "when holds() holds"),
        (Event(every_n_steps=2, at_step=5), "every 2 steps or at step 5"),
        (Event(every_n_steps=2, from_step=4), "every 2 steps, from step 4"),
        (
            Event(every_n_steps=2, from_step=4, until_step=9) | TRAINING_END,
            "(every 2 steps, from step 4 and before step 9) or at the end of training",
        ),
        (
            EPOCH_END | Event(at_step=1) | LoopEvents.INTERRUPT | LoopEvents.EXCEPTION,
            "at the end of every epoch or at step 1 or on an interrupt or on an exception",
        ),
        (None, "off"),
    ],
)
def test_an_event_in_words(event: Any, expected: str) -> None:
    assert row_of(event).when == expected


def test_a_moment_of_the_wall_clock_in_words() -> None:
    moment = datetime(2031, 5, 7, 12, 30, tzinfo=timezone.utc)
    shown = moment.astimezone().isoformat(" ", "seconds")
    assert row_of(Event(at_timestamp=moment)).when == f"at {shown}"
    assert row_of(Event(at_timestamp=[moment.timestamp(), 0])).when.endswith(f" and {shown}")


# How often, where it is not known


@pytest.mark.parametrize(
    ("event", "limits", "expected"),
    [
        (Event(holds), {"max_steps": 5}, (0, None)),
        (Event(every_n_seconds=600), {"max_seconds": 3600}, (0, 6)),
        (Event(every_n_seconds=600, per_launch=True), {"max_seconds": 3600}, (0, None)),
        (Event(every_n_seconds=600), {"max_steps": 5}, (0, None)),
        (Event(at_time=[1, 2]), {"max_steps": 5}, (0, 2)),
        (Event(at_time=[1, 2], from_step=5), {"max_steps": 5}, (0, 0)),
        (Event(at_timestamp=5), {"max_steps": 5}, (0, 1)),
        (Event(every_n_steps=2) | Event(at_time=1), {"max_steps": 5}, (2, 3)),
        (Event(every_n_steps=2) | Event(holds), {"max_steps": 5}, (2, None)),
        (Event(every_n_steps=2), {"max_seconds": 5}, (0, None)),
        (Event(every_n_steps=2, first_at_step=0), {"max_seconds": 5}, (1, None)),
        (Event(at_step=[0, 7]), {"max_seconds": 5}, (1, 2)),
        (Event(every_n_steps=2, until_step=7), {"max_seconds": 5}, (0, 3)),
        (TRAINING_END | Event(at_step=7), {"max_seconds": 5}, (1, 2)),
        (Event(at_step=3) | LoopEvents.INTERRUPT, {"max_steps": 5}, (1, 1)),
    ],
)
def test_bounds_of_what_is_not_known(
    event: Any, limits: dict[str, Any], expected: tuple[int, int | None]
) -> None:
    row = row_of(event, **limits)
    assert (row.at_least, row.at_most) == expected
    assert row.times == (expected[0] if expected[0] == expected[1] else None)


def test_a_clock_that_is_agreed_upon_has_no_bound() -> None:
    arguments = {"max_seconds": 3600, "sync": list[int], "sync_every": 5}
    assert row_of(Event(every_n_seconds=600), **arguments).at_most is None


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (EPOCH_END | Event(every_n_epochs=2), (5, 5)),
        (Event(every_n_epochs=2), (2, 2)),
        (Event(every_n_epochs=2) | TRAINING_END, (3, 3)),
        (Event(every_n_epochs=2) | Event(at_epoch=[0, 9]) | LoopEvents.INTERRUPT, (3, 3)),
        (Event(every_n_epochs=2, from_step=5), (0, None)),
        (Event(at_epoch=[0, 1], from_step=5), (0, 2)),
        (Event(every_n_epochs=2) | Event(at_time=3), (2, 3)),
        (Event(at_step=1, per_epoch=True), (0, None)),
        (Event(at_step=2), (0, 1)),
        (Event(every_n_steps=None), (0, 0)),
    ],
)
def test_ends_of_epochs_are_counted_where_their_length_is_not_known(
    event: Any, expected: tuple[int, int | None]
) -> None:
    row = row_of(event, Unsized(3), max_epochs=5)
    assert (row.at_least, row.at_most) == expected
    plan = Loop(Unsized(3), max_epochs=5).plan()
    assert (plan.steps, plan.most_steps, plan.epochs) == (None, None, 5)
    assert plan.summary == "max_epochs=5, steps not known; 5 epochs of unknown length"


def test_stop_when_ends_the_run_that_is_planned() -> None:
    plan = Loop(range(10), max_epochs=3, stop_when=Event(at_step=14) | TRAINING_END).plan()
    assert plan.summary == "15 steps, 0 to 14; 2 epochs of 10 steps"
    plan = Loop(range(10), max_epochs=3, stop_when=Event(at_step=14, at_time=1)).plan()
    assert (plan.steps, plan.most_steps, plan.epochs) == (None, 15, None)
    assert plan.summary == "at most 15 steps; epochs of 10 steps"
    event = Event(every_n_steps=4)
    row = row_of(event, max_epochs=3, stop_when=Event(holds))
    assert (row.at_least, row.at_most, row.first, row.last) == (0, 7, (3, 7, 11), None)
    plan = Loop(Unsized(10), max_epochs=3, stop_when=Event(holds)).plan()
    assert (plan.epochs, plan.rows[-2].times) == (None, None)
    plan = Loop(Unsized(10), max_epochs=3, stop_when=Event(at_epoch=1)).plan()
    assert (plan.epochs, plan.rows[-2].times) == (2, 2)


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (Loop([1], max_epochs=1), "1 step, 0; 1 epoch of 1 step"),
        (Loop(Stream(), max_steps=5), "5 steps, 0 to 4"),
        (Loop(Unsized(5), max_steps=5), "5 steps, 0 to 4"),
        (Loop(AtLast(5), max_steps=5), "5 steps, 0 to 4"),
        (Loop(range(9), max_steps=5), "5 steps, 0 to 4; 1 epoch of 9 steps"),
        (
            Loop(WithSetEpoch(2), max_steps=4),
            "4 steps, 0 to 3; 2 epochs of 2 steps (if all are as long as the next)",
        ),
        (Loop(range(5), max_seconds=2.5), "max_seconds=2.5, steps not known; epochs of 5 steps"),
        (
            Loop(range(5), max_steps=9, start_step=3, stop_when=Event(holds)),
            "at most 6 steps, from 3 on; epochs of 5 steps",
        ),
        (Loop(range(5), max_steps=9, start_step=9), "no step is left"),
        (
            Loop(range(5), max_epochs=2**62),
            f"max_epochs={2**62:.15g}, steps not known; epochs of 5 steps",
        ),
    ],
)
def test_the_run_in_words(loop: Loop[Any], expected: str) -> None:
    assert loop.plan().summary == expected


def test_the_place_of_start_step_is_open_where_lengths_are() -> None:
    plan = Loop(Unsized(3), {"E": Event(at_epoch=1)}, max_epochs=5, start_step=4).plan()
    assert (plan.steps, plan.epochs, plan.rows[-1].at_least) == (None, None, 0)
    plan = Loop(WithSetEpoch(3), {"E": Event(at_epoch=2)}, max_epochs=5, start_step=4).plan()
    assert (plan.first_step, plan.steps, plan.epochs) == (4, 11, 4)
    assert plan.rows[0].first == (8,)


def test_an_epoch_that_is_shorter_than_what_was_done_of_it_is_over() -> None:
    first = Loop(range(9), max_epochs=3)
    for _ in first:
        if first.global_step == 6:
            break
    resumed = Loop(range(4), max_epochs=3)
    with pytest.warns(LoopWarning, match="length"):
        resumed.load_state_dict(first.state_dict())
    plan = resumed.plan()
    assert (plan.first_step, plan.steps, plan.epochs) == (7, 8, 2)


# Warnings


@pytest.mark.parametrize(
    ("event", "limits", "expected"),
    [
        (Event(every_n_steps=5), {}, []),
        (Event(at_step=30), {}, ["'E': at_step=30 never fires, the run ends at step 29"]),
        (
            Event(at_step=1000, per_launch=True),
            {"max_steps": 3000, "start_step": 2000},
            ["'E': at_step=1000, per_launch=True never fires, the run ends at step 2,999"],
        ),
        (
            Event(at_step=[3, 30, 40]),
            {},
            ["'E': at_step=(3, 30, 40) never fires at 30 and 40, the run ends at step 29"],
        ),
        (
            Event(at_step=[3, 12], per_epoch=True),
            {},
            ["'E': at_step=(3, 12), per_epoch=True never fires at 12, an epoch has 10 steps"],
        ),
        (
            Event(at_step=[3, 12], per_launch=True),
            {"max_steps": 30, "start_step": 20},
            ["'E': at_step=(3, 12), per_launch=True never fires at 12, the run ends at step 29"],
        ),
        (
            Event(every_n_steps=40) | TRAINING_END,
            {},
            ["'E': every_n_steps=40 never fires, the run has 30 steps"],
        ),
        (
            Event(every_n_steps=5, first_at_step=40),
            {},
            ["'E': every_n_steps=5 never fires, the run ends at step 29"],
        ),
        (
            Event(every_n_steps=11, per_epoch=True),
            {},
            ["'E': every_n_steps=11, per_epoch=True never fires, an epoch has 10 steps"],
        ),
        (
            Event(every_n_steps=8, per_epoch=True) | TRAINING_END,
            {"max_steps": 5},
            ["'E': every_n_steps=8, per_epoch=True never fires, the run ends at step 4"],
        ),
        (
            Event(every_n_steps=2, at_time=3, from_step=30),
            {},
            [
                "'E': every_n_steps=2 never fires, the run ends at step 29, before from_step=30",
                "'E': at_time=3 never fires, the run ends at step 29, before from_step=30",
            ],
        ),
        (
            Event(holds, from_step=30),
            {},
            ["'E': condition_function never fires, the run ends at step 29, before from_step=30"],
        ),
        (
            Event(at_step=2, from_step=5, until_step=9),
            {},
            ["'E': at_step=2 never fires, its window has no such step"],
        ),
        (Event(at_step=2), {"max_epochs": 3, "start_step": 5}, []),
        (Event(at_epoch=0), {"max_epochs": 3, "start_step": 15}, []),
        (Event(every_n_steps=2, until_step=4), {"max_epochs": 3, "start_step": 5}, []),
        (
            Event(at_epoch=3),
            {},
            ["'E': at_epoch=3 never fires, the run ends at step 29, in epoch 2"],
        ),
        (
            Event(at_epoch=[0, 3, 7]),
            {},
            ["'E': at_epoch=(0, 3, 7) never fires at 3 and 7, the run ends at step 29"],
        ),
        (
            Event(at_epoch=[0, 1]),
            {"max_steps": 19},
            ["'E': at_epoch=(0, 1) never fires at 1, the run ends at step 18"],
        ),
        (
            EPOCH_END | Event(at_step=0),
            {"max_steps": 5},
            ["'E': LoopEvents.EPOCH_END never fires, the run ends at step 4, in epoch 0"],
        ),
        (
            Event(at_step=20),
            {"max_steps": 20, "stop_when": Event(holds)},
            ["'E': at_step=20 never fires, the run ends at step 19 at the latest"],
        ),
        (
            Event(every_n_steps=30),
            {"max_steps": 20, "stop_when": Event(holds)},
            ["'E': every_n_steps=30 never fires, the run ends at step 19 at the latest"],
        ),
        (
            Event(every_n_steps=4),
            {},
            [
                "'E': 2 steps are left over after its last window; join LoopEvents.TRAINING_END "
                "to use them"
            ],
        ),
        (Event(every_n_steps=4) | TRAINING_END, {}, []),
        (Event(every_n_steps=4) | EPOCH_END, {}, []),
        (Event(every_n_steps=4, first_at_step=0), {}, []),
        (Event(every_n_steps=4, until_step=20), {}, []),
        (
            Event(every_n_steps=3, per_epoch=True),
            {},
            [
                "'E': 1 step is left over at the end of each epoch; join LoopEvents.EPOCH_END "
                "to use them"
            ],
        ),
        (Event(every_n_steps=3, per_epoch=True) | EPOCH_END, {}, []),
        (Event(every_n_steps=3, per_epoch=True, from_step=11), {}, []),
        (
            Event(every_n_steps=3, per_epoch=True),
            {"max_steps": 5},
            [
                "'E': 2 steps are left over after its last window; join LoopEvents.TRAINING_END "
                "to use them"
            ],
        ),
        (
            Event(at_time=40),
            {"max_seconds": 30},
            ["'E': at_time=40 is past max_seconds=30, and fires only if the last step is as late"],
        ),
        (
            Event(at_time=[20, 40]),
            {"max_seconds": 30},
            [
                "'E': at_time=(20, 40); 40 is past max_seconds=30, and fires only if the last "
                "step is as late"
            ],
        ),
        (
            Event(every_n_seconds=31) | EPOCH_END,
            {"max_seconds": 30},
            [
                "'E': every_n_seconds=31 is past max_seconds=30, and fires only if the last step "
                "is as late"
            ],
        ),
        (Event(at_time=40, per_launch=True), {"max_seconds": 30}, []),
        (Event(at_time=30), {"max_seconds": 30}, []),
        (None, {}, ["'E' is off: it is never due"]),
        (
            Event(every_n_steps=None) | LoopEvents.INTERRUPT,
            {},
            ["'E': LoopEvents.INTERRUPT never fires, this Loop has no signals"],
        ),
        (
            Event(at_step=0) | LoopEvents.INTERRUPT,
            {"max_epochs": 3, "signals": [signal.SIGTERM]},
            [],
        ),
        (
            Event(at_step=0) | LoopEvents.EXCEPTION,
            {},
            ["'E': LoopEvents.EXCEPTION never fires, this Loop has no on_exception=\"event\""],
        ),
        (
            Event(at_step=0) | LoopEvents.EXCEPTION,
            {"max_epochs": 3, "on_exception": "event"},
            [],
        ),
        (
            Event(at_step=0),
            {"max_steps": 9, "start_step": 9},
            ["the run is over: it has reached max_steps=9"],
        ),
        (
            Event(at_step=0),
            {"max_steps": 9, "stop_when": Event(at_step=9)},
            ["stop_when: at_step=9 never fires, the run ends at step 8"],
        ),
        (Event(at_step=0), {"max_steps": 9, "stop_when": Event(at_step=5)}, []),
    ],
)
def test_warnings_of_an_event(event: Any, limits: dict[str, Any], expected: list[str]) -> None:
    assert warnings_of(event, **limits) == expected


def test_warnings_of_lengths() -> None:
    assert warnings_of(Event(at_step=0), [], max_epochs=1) == [
        "the dataloader is empty: its len() is 0"
    ]
    events = {
        "A": Event(at_step=0),
        "B": Event(every_n_steps=2, per_epoch=True),
        "C": Event(at_epoch=1),
        "D": Event(at_epoch=5),
        "E": Event(at_epoch=[1, 5]),
    }
    assert Loop(Unsized(3), events, max_epochs=5).plan().warnings == (
        "the length of an epoch is not known, which leaves open the number of steps and 'B'; "
        "dataloader_len would tell",
        "'D': at_epoch=5 never fires, the run ends with epoch 4",
        "'E': at_epoch=(1, 5) never fires at 5, the run ends with epoch 4",
    )
    assert Loop(Unsized(3), events, max_steps=5).plan().warnings == (
        "the length of an epoch is not known, which leaves open 'B', 'C', 'D' and 'E'; "
        "dataloader_len would tell",
    )
    assert warnings_of(Event(at_step=0), Unsized(3), max_steps=5) == []
    assert warnings_of(EPOCH_END | Event(at_step=0), Stream(), max_steps=5) == [
        "'E': LoopEvents.EPOCH_END never fires, this dataloader is a stream, whose epoch does "
        "not end"
    ]


def test_an_epoch_that_is_past_is_no_mistake() -> None:
    first = Loop(Unsized(2), {"E": Event(at_epoch=0)}, max_epochs=3)
    for _ in first:
        if first.global_step == 2:
            break
    resumed = Loop(Unsized(2), {"E": Event(at_epoch=0)}, max_epochs=3)
    resumed.load_state_dict(first.state_dict())
    plan = resumed.plan()
    assert plan.rows[0].times == 0
    assert plan.warnings == (
        "the length of an epoch is not known, which leaves open the number of steps; "
        "dataloader_len would tell",
    )


def test_processes_may_have_other_lengths() -> None:
    arguments = {"max_epochs": 1, "sync": list[int], "sync_every": 5}
    assert warnings_of(Event(at_step=0), range(10), **arguments) == [
        "an epoch is as long as its shortest on all processes; this plan has the length on this one"
    ]
    assert warnings_of(Event(at_step=0), dataloader_len=10, **arguments) == []


def test_names_of_the_same_definition() -> None:
    events = {
        "A": Event(every_n_steps=5) | TRAINING_END,
        7: TRAINING_END | Event(every_n_steps=5),
        "B": Event(every_n_steps=5),
        "C": Event(holds),
        "D": Event(holds),
        "Off": None,
        "Off too": None,
    }
    assert Loop(range(10), events, max_epochs=1).plan().warnings == (
        "'Off' is off: it is never due",
        "'Off too' is off: it is never due",
        "'A' and 7 have the same definition: every 5 steps or at the end of training",
        "'C' and 'D' have the same definition: when holds() holds",
    )


# Table and drawing


MANY: dict[Any, Any] = {
    "Log": Event(every_n_steps=100),
    ("eval", 1): Event(every_n_steps=500, first_at_step=0) | TRAINING_END,
    "a name <of> sixty characters & more, as configurations have" + "!" * 20: EPOCH_END
    | Event(every_n_seconds=600),
    "two\nlines": Event(holds),
    " ": Event(at_step=[7, 10**11]),
    "Stop": Event(every_n_epochs=3) | Event(every_n_steps=7, from_step=500),
}


def plans() -> dict[str, Plan]:
    return {
        "epochs": Loop(range(1000), MANY, max_epochs=3).plan(),
        "far": Loop(range(1000), MANY, max_steps=10**18).plan(),
        "seconds": Loop(range(1000), MANY, max_seconds=60).plan(),
        "stopped": Loop(range(1000), MANY, max_epochs=3, stop_when=Event(holds)).plan(),
        "unknown": Loop(Unsized(1000), MANY, max_epochs=3).plan(),
        "nothing": Loop(range(9), MANY, max_steps=5, start_step=5).plan(),
        "no events": Loop(Unsized(9), max_seconds=5).plan(),
        "short": Loop(range(3), {"A": Event(every_n_steps=1)}, max_epochs=1).plan(),
    }


def test_the_table_of_a_plan() -> None:
    plan = Loop(
        range(250),
        {"Log": Event(every_n_steps=100), "Save": Event(every_n_seconds=60) | EPOCH_END},
        max_epochs=20,
    ).plan()
    assert (
        str(plan)
        == """\
5,000 steps, 0 to 4,999; 20 epochs of 250 steps

event         when                                fires  at steps
------------  ----------------------------------  -----  -----------------------
Log           every 100 steps                        50  99, 199, 299 ... 4,999
Save          every 60 s or at the end of every   >= 20  249, 499, 749 ... 4,999
              epoch
EPOCH_END     at the end of every epoch              20  249, 499, 749 ... 4,999
TRAINING_END  at the end of training                  1  4,999"""
    )
    assert repr(plan) == (
        "<Plan: 5,000 steps, 0 to 4,999; 20 epochs of 250 steps; 4 rows, 0 warnings>"
    )


def test_letters_that_are_two_columns_wide_are_counted_so() -> None:
    events = {"評価": Event(every_n_steps=100), "保存" * 40: Event(at_step=7)}
    lines = str(Loop(range(500), events, max_epochs=1).plan()).splitlines()
    shown = [re.sub("[評価保存]", "##", line) for line in lines]  # as many columns, one a letter
    assert max(map(len, shown)) <= 80
    assert shown[4].index("every 100") == shown[5].index("at step 7") == shown[2].index("when")


@pytest.mark.parametrize("name", plans())
def test_no_line_is_wider_than_80_columns(name: str) -> None:
    text = str(plans()[name])
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


@pytest.mark.parametrize("name", plans())
def test_drawings_are_well_formed_and_accessible(name: str, tmp_path: Path) -> None:
    plan = plans()[name]
    path = tmp_path / "plan.svg"
    plan.save_svg(path)
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
    assert root.findtext(f"{SVG}title") == f"Plan: {plan.summary}"
    described = root.findtext(f"{SVG}desc") or ""
    assert all(row.when in described for row in plan.rows)
    assert len(root.findall(f"{SVG}g")) == len(plan.rows)
    assert "prefers-color-scheme" in text
    assert len(text) < 20_000
    in_page = plan._repr_html_()
    drawn, _, listed = in_page.partition("</svg>")
    ElementTree.fromstring(drawn + "</svg>")
    assert "<style" not in drawn
    assert listed.count("<li>") == len(plan.warnings)


def lane(plan: Plan, number: int) -> ElementTree.Element:
    root = ElementTree.fromstring(plan._repr_html_().partition("</svg>")[0] + "</svg>")
    return root.findall(f"{SVG}g")[number]


def test_a_tick_for_each_firing_and_a_band_where_they_are_close() -> None:
    events = {"Few": Event(every_n_steps=20), "All": Event(every_n_steps=1), "Off": None}
    plan = Loop(range(100), events, max_epochs=10).plan()
    few, every, off = (
        [each.get("d", "") for each in lane(plan, number).findall(f"{SVG}path")[1:]]
        for number in range(3)
    )
    assert [path.count("v14") for path in few] == [50]
    assert [path.count("M") for path in every] == [1]
    assert off == []


def test_a_lane_says_why_it_is_empty() -> None:
    events = {"T": Event(at_time=5), "C": Event(holds), "B": Event(holds, at_time=5)}
    notes = [
        [text.text for text in lane(Loop([1], events, max_epochs=1).plan(), number).iter()][-2]
        for number in range(3)
    ]
    assert notes == ["by the clock", "by a condition", "by the clock, by a condition"]


# Progressions


@st.composite
def patterns(draw: Any, epoch_start: int, length: int) -> Pattern:
    start = epoch_start + draw(st.integers(0, 40))
    stop = start + draw(st.integers(0, 150))
    kind = draw(st.sampled_from(("steps", "places", "points")))
    if kind == "steps":
        steps = progression(draw(st.integers(0, 40)), draw(st.integers(1, 20)), start, stop)
        return Pattern(steps, None, epoch_start, length)
    if kind == "points":
        places = tuple(sorted(draw(st.sets(st.integers(0, length - 1), max_size=4))))
        return Pattern(range(start, stop), places, epoch_start, length)
    every = range(draw(st.integers(0, length)), length, draw(st.integers(1, 8)))
    return Pattern(range(start, stop), every, epoch_start, length)


@settings(max_examples=300)
@given(st.data())
def test_unions_have_the_steps_of_their_patterns(data: st.DataObject) -> None:
    epoch_start = data.draw(st.integers(0, 9))
    length = data.draw(st.integers(1, 15))
    drawn = data.draw(st.lists(patterns(epoch_start, length), max_size=5))
    points = data.draw(st.sets(st.integers(epoch_start, 150), max_size=4))
    union = Union(drawn, points)
    expected = {
        step
        for step in range(epoch_start, 250)
        if step in points or any(pattern.has(step) for pattern in drawn)
    }
    for pattern in drawn:
        for step in range(epoch_start, 250):
            place = (step - epoch_start) % length
            in_epoch = pattern.places is None or place in pattern.places
            assert pattern.has(step) == (step in pattern.steps and in_epoch)
    assert union.size(2**10) == len(expected)
    assert list(union.from_on(epoch_start)) == sorted(expected)
    assert bool(union) == bool(expected)
    for step in (epoch_start, 60, 250):
        assert union.last_before(step) == max(
            [each for each in expected if each < step], default=None
        )


def test_nothing_is_left_over_where_it_is_not_known() -> None:
    def unsized() -> Iterator[int]:
        return iter(range(3))

    for event in (
        Event(every_n_steps=20) | LoopEvents.EPOCH_END,
        Event(every_n_steps=20, every_n_epochs=1),
        Event(every_n_steps=20) | Event(holds),
    ):
        warnings = Loop(unsized, {"A": event}, max_steps=36).plan().warnings
        assert [warning for warning in warnings if "left over" in warning] == []


@pytest.mark.no_core
@pytest.mark.parametrize("steps", [10**15, 2**62])
def test_runs_of_any_length_are_drawn(steps: int) -> None:
    events = {"a" * 32: Event(every_n_steps=1, at_time=(5,))}
    drawn = Loop(range(9), events, max_steps=steps).plan()._repr_html_()
    ElementTree.fromstring(drawn.partition("</svg>")[0] + "</svg>")


@pytest.mark.no_core
def test_a_name_with_control_characters_is_drawn() -> None:
    class Name:
        def __repr__(self) -> str:
            return "x\x1b[31m\x00"

    drawn = Loop(range(9), {Name(): Event(every_n_steps=2)}, max_epochs=1).plan()._repr_html_()
    ElementTree.fromstring(drawn.partition("</svg>")[0] + "</svg>")
