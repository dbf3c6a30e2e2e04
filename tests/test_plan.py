"""What a plan tells about a run before it."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Hashable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dloop.plan
from dloop import Event, Loop, LoopError, LoopEvents, LoopState, LoopWarning
from dloop.plan import PlanRow
from loops import after
from oracle import World
from plans import EPOCH_CRITERIA, STEP_CRITERIA, Draw, Plan, draw_parts, event_of

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


def unsized(length: int) -> Callable[[], Iterator[int]]:
    """A loader without a length."""
    return lambda: iter(range(length))


class Stream:
    """A single-pass loader without an end. It counts the batches that were taken."""

    taken = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken


def holds(state: LoopState) -> bool:
    return False


def plan_of(event: Any, loader: Any = None, **arguments: Any) -> dloop.plan.Plan:
    """The plan of a run over ten batches, three times, or as the arguments say."""
    loader = range(10) if loader is None else loader
    return Loop(loader, {"E": event}, **(arguments or {"max_epochs": 3})).plan()


def row_of(event: Any, loader: Any = None, **arguments: Any) -> PlanRow:
    return plan_of(event, loader, **arguments).rows[0]


def fired(loop: Loop[Any]) -> tuple[list[int], dict[Hashable, list[int]]]:
    """The steps of a run, and those at which each event fires."""
    steps: list[int] = []
    found: dict[Hashable, list[int]] = {name: [] for name in (*loop.events, *LoopEvents)}
    for _, events in loop:
        steps.append(loop.global_step)
        for name in events:
            found[name].append(loop.global_step)
    return steps, found


# A plan against the run


SCHEDULED = st.sets(st.sampled_from(sorted({**STEP_CRITERIA, **EPOCH_CRITERIA})), min_size=1)


def event(draw: Draw, name: str, may_wait: bool = False) -> Event | None:
    """An Event that counts steps or epochs, and may wait for another."""
    parts = draw_parts(draw, may_wait=may_wait, criteria=SCHEDULED)
    return event_of(name, parts, World(Plan(), ()))


@st.composite
def loops(draw: Any) -> tuple[Loop[Any], bool]:
    """Loops whose end is known, and whether the lengths of their epochs are."""
    length = draw(st.integers(1, 7))
    arguments: dict[str, Any] = {}
    loader: Any = range(length)
    kind = draw(st.sampled_from(("sized", "cut", "unsized", "stream", "stream in epochs")))
    if kind in ("cut", "stream in epochs"):
        arguments["dataloader_len"] = draw(st.integers(1, length))
    if "stream" in kind:
        loader = Stream()
    if kind == "unsized":
        loader = unsized(length)
    if kind in ("stream", "unsized") or draw(st.booleans()):
        arguments["max_steps"] = draw(st.integers(1, 45))
    else:
        arguments["max_epochs"] = draw(st.integers(1, 6))
    if kind != "unsized" and draw(st.booleans()):
        arguments["start_step"] = draw(st.integers(0, 20))
    if draw(st.integers(0, 3)) == 0:
        arguments["stop_when"] = event(draw, "stop_when")
    names = ("A", "B", "C", "D")[: draw(st.integers(2, 4))]
    events = {name: event(draw, name, may_wait=name in "CD") for name in names}
    return Loop(loader, events, **arguments), kind != "unsized"


@settings(max_examples=100)
@given(loops())
def test_a_plan_tells_what_the_run_then_does(drawn: tuple[Loop[Any], bool]) -> None:
    loop, has_length = drawn
    plan = loop.plan()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopWarning)
            steps, found = fired(loop)
    except LoopError:  # the run was finished before it began
        return
    assert plan.steps == len(steps) or (plan.steps is None and not has_length)
    assert not steps or steps[0] == plan.first_step
    never = [warning for warning in plan.warnings if "never fires" in warning]
    for row in plan.rows:
        expected = found[row.name]
        assert row.at_least <= len(expected)
        if has_length:
            assert row.times == len(expected)
            assert row.first == tuple(expected[:3])
            assert row.last == (expected[-1] if expected else None)
        if row.times == 0 and plan.first_step == 0 and row.name in loop.events:
            assert any(warning.startswith(f"{row.name!r}: ") for warning in never)


def test_everything_is_known_if_lengths_are() -> None:
    plan = plan_of(Event(every_n_steps=4) | EPOCH_END)
    assert (plan.first_step, plan.steps, plan.epochs, plan.steps_per_epoch) == (0, 30, 3, 10)
    when = "every 4 steps or at the end of every epoch"
    assert plan.rows[0] == PlanRow("E", when, 9, 9, (3, 7, 9), 29, 0)
    assert plan.rows[1][2:] == (3, 3, (9, 19, 29), 29, 0)
    assert plan.rows[2] == PlanRow(TRAINING_END, "at the end of training", 1, 1, (29,), 29, 0)


def test_a_plan_changes_nothing() -> None:
    stream = Stream()
    loop = Loop(stream, {"Log": Event(every_n_steps=3)}, max_steps=5)
    plan = loop.plan()
    assert stream.taken == 0
    for _ in loop:
        assert loop.plan().rows == plan.rows
    assert stream.taken == 5


def test_what_is_left_over_after_the_last_period() -> None:
    assert row_of(Event(every_n_steps=4)).left_over == 2
    assert row_of(Event(every_n_steps=3, per_epoch=True)).left_over == 1
    assert row_of(Event(every_n_steps=4) | TRAINING_END).left_over == 0
    assert row_of(Event(every_n_steps=4, first_at_step=0)).left_over == 0
    assert row_of(Event(every_n_steps=4, until_step=20)).left_over == 0
    assert "3, 7, 11 ... 27, leaves 2 over" in str(plan_of(Event(every_n_steps=4)))


# What is not known


@pytest.mark.parametrize(
    ("event", "at_least"),
    [
        (Event(holds), 0),
        (Event(every_n_seconds=600), 0),
        (Event(every_n_steps=2) | Event(at_time=1), 15),
        (TRAINING_END | Event(holds), 1),
    ],
)
def test_timers_and_conditions_are_left_open(event: Event, at_least: int) -> None:
    row = row_of(event)
    assert (row.times, row.at_least) == (None, at_least)
    assert f"  {f'>= {at_least}' if at_least else '?'}" in str(plan_of(event))


@pytest.mark.parametrize("limit", [{"max_seconds": 5}, {"stop_when": Event(holds)}])
def test_without_a_known_end_a_few_steps_are_told(limit: dict[str, Any]) -> None:
    plan = plan_of(Event(every_n_steps=4), **limit)
    assert (plan.steps, plan.epochs) == (None, None)
    assert plan.rows[0][2:] == (None, 0, (3, 7, 11), None, 0)
    assert plan.rows[1].first == (9, 19, 29)
    assert (plan.rows[2].times, plan.rows[2].first) == (1, ())
    assert row_of(Event(at_step=10**12), **limit).first == (10**12,)
    assert plan_of(Event(at_step=10**12), **limit).warnings == ()
    assert row_of(None, **limit).times == 0


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 30}])
def test_what_depends_on_an_unknown_length_is_left_open(limit: dict[str, Any]) -> None:
    for event in (EPOCH_END, Event(at_epoch=1), Event(every_n_steps=2, per_epoch=True)):
        plan = plan_of(event, unsized(10), **limit)
        assert (plan.rows[0].times, plan.rows[0].first) == (None, ())
        assert plan.warnings == (
            "the length of an epoch is not known; with dataloader_len, a plan tells more",
        )
    row = row_of(Event(every_n_steps=4), unsized(10), **limit)
    assert (row.times, row.first) == (7 if "max_steps" in limit else None, (3, 7, 11))


def test_a_stream_has_no_epochs() -> None:
    plan = plan_of(EPOCH_END | Event(every_n_steps=2, per_epoch=True), Stream(), max_steps=5)
    assert (plan.rows[0].times, plan.rows[0].first, plan.rows[1].times) == (2, (1, 3), 0)
    assert plan.warnings == (
        "'E': LoopEvents.EPOCH_END never fires, this dataloader is a stream without epochs",
    )


def test_an_iterator_that_is_looked_ahead_in_has_an_epoch_of_unknown_length() -> None:
    plan = plan_of(EPOCH_END, Stream(), max_steps=5, lookahead=True)
    assert plan.rows[0].times is None
    assert plan.warnings == (
        "the length of an epoch is not known; with dataloader_len, a plan tells more",
    )


def test_stop_when_ends_the_run_that_is_planned() -> None:
    plan = plan_of(Event(at_step=20), max_steps=20, stop_when=Event(holds))
    assert plan.summary == "at most 20 steps, 0 to 19; epochs of 10 steps"
    assert plan.warnings[0].endswith("the run ends at step 19 at the latest")
    stop_when = Event(at_step=14) | Event(every_n_epochs=2)
    plan = Loop(range(10), max_epochs=3, stop_when=stop_when).plan()
    assert plan.summary == "15 steps, 0 to 14; 2 epochs of 10 steps"
    plan = Loop(range(10), stop_when=Event(at_epoch=1)).plan()
    assert plan.summary == "20 steps, 0 to 19; 2 epochs of 10 steps"


# Long runs


def test_an_event_that_fires_often_leaves_with_at_least() -> None:
    events = {
        "Log": Event(every_n_steps=1),
        "Save": Event(every_n_steps=10**8),
        "Late": Event(at_step=10**12),
    }
    plan = Loop(range(1000), events, max_steps=10**12).plan()
    assert [row.times for row in plan.rows] == [None, 10_000, 0, None, 1]
    assert [row.at_least for row in plan.rows] == [100_000, 10_000, 0, 100_000, 1]
    assert [row.last for row in plan.rows] == [None, 10**12 - 1, None, None, 10**12 - 1]
    assert plan.warnings == (
        "'Late': at_step=1000000000000 never fires, the run ends at step 999,999,999,999",
    )


def test_after_a_million_firings_all_events_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dloop.plan, "MOST_IN_ALL", 1000)
    events = {name: Event(every_n_steps=1) | Event(at_epoch=10**9) for name in range(20)}
    plan = Loop(range(10), events, max_steps=10**6).plan()
    assert [row.times for row in plan.rows] == [None] * 21 + [1]
    assert [len(row.first) for row in plan.rows] == [3] * 21 + [1]
    assert not any("never" in warning for warning in plan.warnings)


# Words


NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event(every_n_steps=1), "every step"),
        (Event(every_n_steps=2000, first_at_step=1000), "every 2,000 steps, first at step 1,000"),
        (Event(at_step=[1, 2], per_launch=True), "at steps 1 and 2 of this launch"),
        (Event(at_step=range(5)), "at steps 0, 1, 2 and 2 more"),
        (Event(every_n_epochs=2), "at the end of every 2 epochs"),
        (Event(every_n_seconds=timedelta(minutes=1)), "every 60 s"),
        (Event(at_time=[3, 600], per_launch=True), "at 3 s and 600 s of this launch"),
        (Event(at_timestamp=NOON), f"at {NOON.astimezone().isoformat(' ', 'seconds')}"),
        (Event(lambda state: True), "when its condition is true"),
        (Event(holds, at_step=5), "when holds() is true or at step 5"),
        (
            Event(every_n_seconds=2, until_step=4, per_epoch=True),
            "every 2 s, before step 4 of each epoch",
        ),
        (
            Event(every_n_steps=2, from_step=4, until_step=9) | TRAINING_END,
            "(every 2 steps, from step 4 and before step 9) or at the end of training",
        ),
        (LoopEvents.INTERRUPT | LoopEvents.EXCEPTION, "on an interrupt or on an exception"),
        (None, "never"),
    ],
)
def test_an_event_in_words(event: Any, expected: str) -> None:
    assert row_of(event).when == expected


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (Loop([1], max_epochs=1), "1 step, 0; 1 epoch of 1 step"),
        (Loop(Stream(), max_steps=5), "5 steps, 0 to 4"),
        (
            Loop(range(5), max_seconds=2.5),
            "until max_seconds=2.5, steps not known; epochs of 5 steps",
        ),
        (Loop(unsized(5), max_epochs=2), "until max_epochs=2, steps not known"),
        (Loop(Stream(), stop_when=Event(holds)), "until stop_when, steps not known"),
        (Loop(range(5), max_steps=9, start_step=9), "no step is left"),
    ],
)
def test_the_run_in_words(loop: Loop[Any], expected: str) -> None:
    assert loop.plan().summary == expected


# Warnings


LATE = "never fires, the run ends at step 29"
LATE_IN_EPOCHS = f"{LATE}, and an epoch has 10 steps"


@pytest.mark.parametrize(
    ("event", "arguments", "expected"),
    [
        (Event(at_step=[3, 30, 40]), {}, f"at_step=30 and 40 {LATE}"),
        (Event(every_n_steps=40) | TRAINING_END, {}, f"every_n_steps=40 {LATE}"),
        (Event(every_n_steps=2, from_step=30), {}, f"every_n_steps=2, from_step=30 {LATE}"),
        (
            Event(at_step=[3, 12], per_launch=True),
            {"max_steps": 30, "start_step": 20},
            f"at_step=12, per_launch=True {LATE}",
        ),
        (
            Event(at_step=[3, 12], per_epoch=True),
            {},
            f"at_step=12, per_epoch=True {LATE_IN_EPOCHS}",
        ),
        (Event(at_epoch=[0, 3, 7]), {}, f"at_epoch=3 and 7 {LATE_IN_EPOCHS}"),
        (Event(at_time=[20, 40]), {"max_seconds": 30}, "at_time=40 is beyond max_seconds=30"),
        (LoopEvents.INTERRUPT, {}, "LoopEvents.INTERRUPT never fires, this Loop has no signals"),
    ],
)
def test_what_never_fires_is_told(event: Any, arguments: dict[str, Any], expected: str) -> None:
    assert plan_of(event, **arguments).warnings == (f"'E': {expected}",)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        (Event(every_n_steps=5), {}),
        (None, {}),
        (Event(at_step=2), {"max_epochs": 3, "start_step": 5}),
        (Event(every_n_steps=2, until_step=4), {"max_epochs": 3, "start_step": 5}),
        (Event(at_time=30), {"max_seconds": 30}),
        (LoopEvents.EXCEPTION, {"max_epochs": 3, "on_exception": "event"}),
        (LoopEvents.INTERRUPT, {"max_epochs": 3, "signals": signal.SIGTERM}),
    ],
)
def test_what_is_in_order_is_not_warned_of(event: Any, arguments: dict[str, Any]) -> None:
    assert plan_of(event, **arguments).warnings == ()


def test_a_signal_that_ends_workers_too_is_told() -> None:
    loader = Stream()
    loader.num_workers = 2  # type: ignore[attr-defined]
    arguments: dict[str, Any] = {"max_steps": 5, "signals": signal.SIGTERM}
    (warning,) = Loop(loader, **arguments).plan().warnings
    assert "may end the dataloader's workers too; pass on_exception='event'" in warning
    assert Loop(loader, on_exception="event", **arguments).plan().warnings == ()


def test_an_order_that_cannot_repeat_is_told() -> None:
    class RandomSampler:
        generator = None

    loader = Stream()
    loader.sampler = RandomSampler()  # type: ignore[attr-defined]
    (warning,) = Loop(loader, max_steps=5).plan().warnings
    assert "may shuffle in another order" in warning


def test_stop_when_that_never_fires_is_told() -> None:
    plan = Loop(range(10), max_steps=9, stop_when=Event(at_step=9)).plan()
    assert plan.warnings == ("stop_when never fires, the run ends at step 8",)
    plan = Loop(range(10), stop_when=Event(at_step=2, from_step=5)).plan()
    assert plan.warnings == ("stop_when never fires, no step meets it",)


def test_runs_without_a_step_are_told() -> None:
    plan = plan_of(Event(at_step=0), max_steps=9, start_step=9)
    assert plan.warnings == ("the run is finished",)
    assert [row.times for row in plan.rows] == [0, 0, 0]
    plan = plan_of(Event(at_step=0), [], max_epochs=1)
    assert plan.warnings == ("the dataloader is empty: its len() is 0",)


@pytest.mark.parametrize(("done", "ends"), [(5, (9, 14)), (7, (11, 16))])
def test_a_run_resumes_in_the_next_epoch_if_epochs_have_become_shorter(
    done: int, ends: tuple[int, ...]
) -> None:
    state = after(done, Loop(range(10), max_epochs=3))
    again = Loop(range(5), max_epochs=3)
    with pytest.warns(LoopWarning, match="has 5 batches and not 10 as before"):
        again.load_state_dict(state)
    plan = again.plan()
    assert (plan.epochs, plan.rows[0].first) == (2, ends)


def test_names_of_the_same_definition_are_told() -> None:
    both = Event(every_n_steps=5) | TRAINING_END
    events = {"A": both, 7: TRAINING_END | Event(every_n_steps=5), "Off": None, "Off too": None}
    assert Loop(range(10), events, max_epochs=1).plan().warnings == (
        "'A' and 7 have the same definition: every 5 steps or at the end of training",
    )


# The table


def test_the_table() -> None:
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
    assert repr(plan) == f"<Plan: {plan.summary}; 4 rows, 0 warnings>"
