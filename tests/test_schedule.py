"""When events fire: criteria, modifiers, limits and timers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents
from loops import ENTER, fired, resumed
from manual_clock import ManualClock
from recording_loaders import epochs_of

TOP = 2**62
EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


def fires(event: Event, *lengths: int, sized: bool = True) -> list[int]:
    """The steps at which the event fires in a run with epochs of these lengths."""
    return fired(Loop(epochs_of(lengths, sized=sized), {"E": event}, max_epochs=len(lengths)), "E")


def fires_at_times(event: Event, readings: Iterable[Any], start: Any = 0) -> list[int]:
    """The same with one step per clock reading; every reading must be used exactly once."""
    times = [start, *readings]
    clock = iter(times)
    loop = Loop(lambda: [0, 0, 0], {"E": event}, max_steps=len(times) - 1, clock=clock.__next__)
    steps = fired(loop, "E")
    assert list(clock) == []
    return steps


def ticks(stride: float = 1) -> Callable[[], float]:
    """A clock that starts at 0 and advances by `stride` with every reading."""
    return map(stride.__mul__, itertools.count()).__next__


# Steps


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("event", "lengths", "expected"),
    [
        (Event(every_n_steps=16), [50], [15, 31, 47]),
        (Event(every_n_steps=16), [7] * 8, [15, 31, 47]),
        (Event(every_n_steps=1), [2, 1], [0, 1, 2]),
        (Event(every_n_steps=4, first_at_step=0), [5, 5], [0, 4, 8]),
        (Event(every_n_steps=4, first_at_step=5), [5, 5], [5, 9]),
        (Event(every_n_steps=TOP, first_at_step=9), [5, 5], [9]),
        (Event(at_step=[1, 3, 40]), [2, 4], [1, 3]),
        (Event(at_step=0, every_n_steps=3), [4, 4], [0, 2, 5]),
        # per epoch
        (Event(every_n_steps=2, per_epoch=True), [5, 2, 3], [1, 3, 6, 8]),
        (Event(every_n_steps=3, first_at_step=1, per_epoch=True), [5, 1, 5], [1, 4, 7, 10]),
        (Event(at_step=[0, 2], per_epoch=True), [3, 1, 2], [0, 2, 3, 4]),
        # windows
        (Event(every_n_steps=1, from_step=3, until_step=6), [4, 4], [3, 4, 5]),
        (Event(every_n_steps=4, from_step=1, until_step=8), [10], [3, 7]),
        (Event(every_n_steps=4, first_at_step=0, from_step=1), [10], [4, 8]),
        (Event(at_step=[1, 6], every_n_steps=5, from_step=2), [10], [4, 6, 9]),
        (Event(every_n_steps=1, until_step=1), [3], [0]),
        (Event(every_n_steps=1, from_step=1, until_step=3, per_epoch=True), [4, 4], [1, 2, 5, 6]),
        (Event(at_step=[0, 3], from_step=1, per_epoch=True), [4, 4], [3, 7]),
        # far away
        (Event(every_n_steps=TOP, at_step=[2, TOP]), [3, 3], [2]),
        (Event(every_n_steps=1, from_step=TOP), [3, 3], []),
        (Event(every_n_steps=TOP - 1, per_epoch=True), [3, 3], []),
        # epochs
        (Event(every_n_epochs=2), [3, 1, 2, 2], [3, 7]),
        (Event(at_epoch=[0, 2, TOP]), [3, 1, 2, 2], [2, 5]),
        (Event(every_n_epochs=1, from_step=3, until_step=8), [3, 3, 3], [5]),
        (Event(at_epoch=[0, 2], from_step=3), [3, 3, 3], [8]),
        (Event(every_n_epochs=1, from_step=2, per_epoch=True), [3, 2, 4], [2, 8]),
        # joined
        (Event(every_n_steps=4) | TRAINING_END, [3, 3], [3, 5]),
        (Event(every_n_steps=3) | EPOCH_END, [3, 2], [2, 4]),
        (EPOCH_END, [3, 2], [2, 4]),
        (EPOCH_END | TRAINING_END, [3, 2], [2, 4]),
        (Event(every_n_steps=2, until_step=4) | Event(at_step=[0, 4]), [9], [0, 1, 3, 4]),
        (Event(every_n_steps=2, per_epoch=True) | Event(every_n_steps=4), [3, 3], [1, 3, 4]),
        (Event() | Event(at_step=2), [5], [2]),
        (Event(), [5], []),
    ],
    ids=str,
)
def test_the_steps_at_which_an_event_fires(
    event: Event, lengths: list[int], expected: list[int], sized: bool
) -> None:
    assert fires(event, *lengths, sized=sized) == expected


@pytest.mark.parametrize(
    ("period", "lengths", "expected"),
    [
        (0.25, [8, 4], [1, 3, 5, 7, 8, 9, 10, 11]),
        (0.25, [10], [2, 4, 7, 9]),
        (0.3, [10, 10], [2, 5, 8, 11, 14, 17]),
        (0.1, [3], [0, 1, 2]),  # at most once a step
        (1.5, [4, 4, 4], [5, 11]),
        (2.0, [3, 3], [5]),
        (Fraction(2, 3), [6, 6], [3, 7, 11]),
        (2.75, [4, 4, 4], [10]),
    ],
)
def test_a_fraction_fires_within_epochs_of_known_length(
    period: Any, lengths: list[int], expected: list[int]
) -> None:
    assert fires(Event(every_n_epochs=period), *lengths) == expected


@pytest.mark.parametrize("length", [1, 2, 7, 100, 997])
def test_all_reciprocals_end_on_the_epochs_last_batch(length: int) -> None:
    for n in range(1, 100):
        steps = fires(Event(every_n_epochs=1 / n), length, length)
        assert {length - 1, 2 * length - 1} <= {*steps}
        assert len(steps) == 2 * min(n, length)


@pytest.mark.parametrize(
    ("limit", "length", "steps"),
    [(1.5, 4, 6), (1.5, 5, 8), (0.1, 4, 1), (1 / 3, 9, 3), (2.0, 4, 8), (0.5, 1, 1)],
)
def test_a_run_can_end_within_an_epoch(limit: float, length: int, steps: int) -> None:
    loop = Loop(range(length), max_epochs=limit)
    assert len(loop) == steps
    lasts = [TRAINING_END in events for _, events in loop]
    assert lasts == [False] * (steps - 1) + [True]
    assert loop.stop_reason == "max_epochs"
    again = resumed(Loop(range(length), max_epochs=limit), loop.state_dict())
    assert list(again) == []
    longer = resumed(Loop(range(length), max_epochs=limit + 1), loop.state_dict())
    assert len(list(longer)) == length


def test_a_fraction_needs_the_length_of_the_epoch() -> None:
    for arguments in (
        {"max_epochs": 0.5},
        {"max_epochs": 1, "events": {"E": Event(every_n_epochs=0.5)}},
    ):
        with pytest.raises(ValueError, match=r"length of epoch 0 is not known.*dataloader_len"):
            next(iter(Loop(lambda: iter(range(9)), **arguments)))  # type: ignore[arg-type]
    loop = Loop(lambda: iter(range(9)), {"E": Event(every_n_epochs=0.5)}, max_epochs=1)
    assert loop.steps_to_next_event() is None


def test_step_numbers_and_windows_of_a_launch_count_from_its_first_step() -> None:
    events = {
        "First": Event(at_step=0, per_launch=True),
        "WarmUp": Event(every_n_steps=3, first_at_step=1, until_step=6, per_launch=True),
        "Late": Event(lambda state: True, from_step=8, per_launch=True, at_step=9),
        "Ends": Event(every_n_epochs=1, from_step=4, per_launch=True),
    }
    loop, before = [Loop(range(10), events, max_epochs=2) for _ in range(2)]
    for _ in itertools.islice(before, 7):
        pass
    loop.load_state_dict(before.state_dict())
    steps = [(loop.global_step, due & set(events)) for _, due in loop if due & set(events)]
    late = [(step, {"Late"}) for step in range(15, 19)]
    assert steps == [
        *[(7, {"First"}), (8, {"WarmUp"}), (11, {"WarmUp"})],
        *[*late, (19, {"Late", "Ends"})],
    ]
    loop.restart()
    assert fired(loop, "WarmUp") == [1, 4]


# Far steps


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("left", [1, 2, 40])
def test_a_run_up_to_the_greatest_step_fires_at_the_right_steps(left: int, enter: str) -> None:
    events = {
        "Three": Event(every_n_steps=3),
        "Epoch": Event(every_n_steps=5, per_epoch=True),
        "Long": Event(every_n_steps=TOP),
        "Late": Event(every_n_steps=1, from_step=TOP - 2, until_step=TOP),
    }
    loop = Loop(range(11), events, max_steps=TOP, start_step=TOP - left)
    assert len(loop) == left
    found: dict[int, set[Any]] = {}
    for _, due in ENTER[enter](loop):
        if due:
            found[loop.global_step] = set(due)
    expected: dict[int, set[Any]] = {}
    for step in range(TOP - left, TOP):
        rules = {
            "Three": (step + 1) % 3 == 0,
            "Epoch": (step % 11 + 1) % 5 == 0,
            "Long": step == TOP - 1,
            "Late": step >= TOP - 2,
            EPOCH_END: step % 11 == 10,
            TRAINING_END: step == TOP - 1,
        }
        if any(rules.values()):
            expected[step] = {name for name, is_due in rules.items() if is_due}
    assert found == expected
    assert (loop.global_step, loop.stop_reason) == (TOP - 1, "max_steps")


# Time


@pytest.mark.parametrize(
    ("event", "readings", "expected"),
    [
        # missed periods fire once, and the next period starts at that reading
        (Event(every_n_seconds=10), [0, 9, 10, 35, 36, 44, 45, 46], [2, 3, 6]),
        # each time fires once; those that pass together fire together
        (Event(at_time=[5, 6, 20]), [4, 7, 8, 19, 20, 21], [1, 4]),
        (Event(at_time=0), [0, 0, 1], [0]),
        # windows
        (Event(at_time=1, from_step=3), [1, 2, 3, 4, 5], [3]),
        (Event(every_n_seconds=2, from_step=3), [2, 4, 6, 7, 8, 9], [3, 5]),
        (Event(at_time=3, until_step=2), [1, 2, 3, 4], []),
        (Event(every_n_seconds=3, until_step=2), [1, 2, 3, 9], []),
        (Event(at_time=[1, 5], from_step=2, per_epoch=True), [1, 2, 3, 4, 5, 6], [2, 5]),
        (Event(every_n_seconds=1, from_step=2, per_epoch=True), [1, 2, 3, 4, 5, 6], [2, 5]),
        # a period starts anew whenever the event fires, whatever made it fire
        (
            Event(every_n_seconds=10, every_n_steps=4),
            [3, 6, 8, 9, 10, 11, 12, 13, 20, 23],
            [3, 7, 9],
        ),
        (Event(every_n_seconds=10, every_n_steps=2), [1, 11, 12, 13, 20, 21], [1, 3, 5]),
        (Event(every_n_seconds=10, at_time=14), [5, 10, 15, 20, 25], [1, 2, 4]),
        (Event(every_n_seconds=10) | Event(at_step=0), [4, 8, 10, 14, 15], [0, 3]),
        (Event(every_n_seconds=10) | EPOCH_END, [1, 2, 3, 12, 13, 14], [2, 4, 5]),
        (Event(every_n_seconds=10) | TRAINING_END, [1, 2, 3], [2]),
        (
            Event(every_n_seconds=10) | Event(every_n_seconds=4, until_step=3),
            [4, 8, 10, 16, 18, 22],
            [0, 1, 4],
        ),
        (Event(every_n_seconds=5, from_step=3) | Event(at_step=1), [1, 2, 3, 6, 7], [1, 4]),
        (
            Event(lambda state: state.global_step == 1, every_n_seconds=10),
            [1, 11, 12, 20, 21],
            [1, 4],
        ),
        # but a time is a time
        (Event(every_n_steps=2, at_time=10), [1, 11, 12, 13, 20, 21], [1, 3, 5]),
        (Event(every_n_steps=2, at_time=10), [1, 2, 10, 13], [1, 2, 3]),
        # in a run that was not resumed, a launch is the run
        (Event(every_n_seconds=4, per_launch=True), [2, 3, 4, 8, 9, 11, 13], [2, 3, 6]),
        (Event(at_time=[3, 9], per_launch=True), [2, 3, 4, 8, 9, 11, 13], [1, 4]),
        # exact to the nanosecond
        (Event(every_n_seconds=0.1), [step * 0.1 for step in range(1, 50)], list(range(49))),
        (Event(at_time=0.3), [0.1, 0.2, 0.1 + 0.2 - 1e-12, 0.4], [2]),
        (Event(every_n_seconds=1), [0.999999999, 1.0], [1]),
        (Event(every_n_seconds=1e-12), [0, 1e-9, 1e-9, 2e-9], [1, 3]),
        (Event(at_time=4 * 10**9), [Fraction(1, 2), 4 * 10**9, 4 * 10**9 + 1], [1]),
        (Event(every_n_seconds=1.25), [1, 2.5, Fraction(7, 2), 4], [1, 3]),
        # a clock that goes backwards stands still
        (Event(every_n_seconds=2), [1, 3, 0, 1, 4, 5, 6], [1, 5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 100])
def test_the_steps_at_which_a_timer_fires(
    event: Event, readings: list[Any], expected: list[int], start: int
) -> None:
    if start and any(isinstance(reading, float) for reading in readings):
        start = -1  # keeps the nanoseconds exact
    assert fires_at_times(event, [start + reading for reading in readings], start) == expected


def test_a_moment_of_the_wall_clock_fires_once_in_each_launch() -> None:
    now = time.time()
    clock = ManualClock()
    events = {
        "Aware": Event(at_timestamp=datetime.fromtimestamp(now + 1000, timezone.utc)),
        "Two": Event(at_timestamp=[now + 500, now + 1000]),
        "Past": Event(at_timestamp=[5, now - 1000]),
        "Windowed": Event(at_timestamp=5, from_step=2),
    }
    state = Loop(range(5), events, max_epochs=2, clock=clock).state_dict()
    for _ in range(2):
        loop = Loop(range(5), events, max_epochs=2, clock=clock)
        loop.load_state_dict(state)
        steps: list[tuple[int, object]] = []
        for _, due in loop:
            steps += [(loop.global_step, name) for name in due & set(events)]
            clock.advance(400)  # the wall clock is read once, as training begins
        assert sorted(steps) == [  # type: ignore[type-var]
            *[(0, "Past"), (2, "Two"), (2, "Windowed"), (3, "Aware"), (3, "Two")],
        ]


# When the clock is read


def test_without_time_criteria_the_clock_is_read_only_when_elapsed_is() -> None:
    clock = ManualClock(50)
    loop = Loop([0] * 9, {"E": Event(every_n_steps=2)}, max_epochs=1, clock=clock)
    looks = []
    for batch, _ in enumerate(loop):
        clock.now += 1
        if batch % 4 == 0:
            looks.append(loop.state.elapsed)
            clock.now += 0.5
            looks.append(loop.state.elapsed)
    assert looks == [1.0, 1.0, 5.5, 5.5, 10.0, 10.0]
    assert clock.readings == 1 + 3


@pytest.mark.parametrize(
    ("bad", "kind"),
    [("12", TypeError), (None, TypeError), (True, TypeError), ([1.0], TypeError)]
    + [(float("nan"), ValueError), (-float("inf"), ValueError), (10**400, ValueError)],
    ids=["str", "None", "bool", "list", "nan", "inf", "huge"],
)
def test_a_clock_that_returns_no_time_ends_the_run(bad: Any, kind: type[Exception]) -> None:
    loop = Loop([0] * 3, max_seconds=5, clock=iter([0, 1, bad]).__next__)
    steps = iter(loop)
    next(steps)
    with pytest.raises(kind, match=r"^clock\(\) returned .*: return a "):
        next(steps)
    assert (loop.stop_reason, loop.global_step) == ("exception", 0)


# The real clock, for which the compiled core has its own code


def test_a_real_timer_fires_when_its_period_has_passed_and_not_before() -> None:
    events = {
        "Tick": Event(every_n_seconds=0.02),
        "Once": Event(at_time=[0, 0.03]),
        "Often": Event(every_n_steps=3),
    }
    loop = Loop(iter(range(10**8)), events, max_seconds=0.08)
    began = time.perf_counter()
    ticks, once = [0.0], []
    for _, due in loop:
        if "Tick" in due:
            ticks.append(loop.state.elapsed)
        if "Once" in due:
            once.append(loop.state.elapsed)
    assert time.perf_counter() - began >= 0.08
    assert loop.state.elapsed >= 0.08
    assert loop.stop_reason == "max_seconds"
    assert len(ticks) > 1
    nanoseconds = [round(tick * 1e9) for tick in ticks]
    assert all(later - tick >= 20_000_000 for tick, later in itertools.pairwise(nanoseconds))
    assert len(once) in (1, 2)  # on a busy machine, both fire together
    assert once[-1] >= 0.03


def test_a_real_timer_fires_at_the_step_at_which_its_window_opens() -> None:
    events = {"Late": Event(at_time=0, from_step=30_000), "Hourly": Event(every_n_seconds=3600)}
    assert fired(Loop(range(40_000), events, max_epochs=1), "Late") == [30_000]


def test_real_time_never_runs_backwards_in_bodies_and_conditions() -> None:
    times: list[float] = []
    events = {
        "Hourly": Event(every_n_seconds=3600),
        "Seen": Event(lambda state: times.append(state.elapsed)),
    }
    loop = Loop(range(3000), events, max_epochs=1)
    states = []
    for _ in loop:
        times.append(loop.state.elapsed)
        states.append((loop.state, loop.state.elapsed))
    assert times == sorted(times)
    assert [state.elapsed for state, _ in states] == [elapsed for _, elapsed in states]


# Limits


def ends(loop: Loop[Any]) -> list[str]:
    """For each step "E" if EPOCH_END fires, and "T" if TRAINING_END does."""
    return ["E" * (EPOCH_END in due) + "T" * (TRAINING_END in due) for _, due in loop]


@pytest.mark.parametrize(
    ("limit", "lengths", "expected"),
    [
        ({"max_steps": 4}, [2, 3], ["", "E", "", "T"]),
        ({"max_steps": 5}, [2, 3], ["", "E", "", "", "ET"]),
        ({"max_steps": 1}, [1], ["ET"]),
        ({"max_epochs": 2}, [2, 3], ["", "E", "", "", "ET"]),
        ({"max_epochs": 3}, [1], ["E", "E", "ET"]),
        ({"max_seconds": 5}, [3], ["", "", "E", "", "T"]),
        ({"max_seconds": 6}, [3], ["", "", "E", "", "", "ET"]),
        ({"max_seconds": 2.5}, [1], ["E", "E", "ET"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("sized", [True, False])
def test_a_limit_ends_the_run(
    limit: dict[str, Any], lengths: list[int], expected: list[str], sized: bool
) -> None:
    loop = Loop(epochs_of(lengths, sized=sized), clock=ticks(), **limit)
    assert ends(loop) == expected
    assert [loop.stop_reason] == list(limit)


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_epochs": 1}, {"max_seconds": 3}])
def test_the_limit_comes_before_stop_when_at_the_same_step(limit: dict[str, Any]) -> None:
    for event in (Event(at_step=2), Event(lambda state: state.training_end), TRAINING_END):
        loop = Loop([0] * 3, stop_when=event, clock=ticks(), **limit)
        assert [loop.stop_reason for _ in loop] == [None, None, *limit]


def test_a_timer_that_was_another_criterion_counts_from_the_resume() -> None:
    clock = ManualClock()
    loop = Loop(range(20), {"T": Event(at_time=1)}, max_epochs=1, clock=clock)
    for _ in itertools.islice(loop, 5):
        clock.advance(1)
    again = Loop(range(20), {"T": Event(every_n_seconds=3)}, max_epochs=1, clock=clock)
    resumed(again, loop.state_dict())
    assert fired(again, "T", lambda _: clock.advance(1)) == [8, 11, 14, 17]


def test_a_pause_that_spans_steps_is_not_counted() -> None:
    clock = ManualClock()
    loop = Loop(range(9), {"T": Event(every_n_seconds=99)}, max_epochs=1, clock=clock)
    steps = iter(loop)
    next(steps)
    clock.advance(1)
    with loop.pause_clock():
        next(steps)
        clock.advance(10)
        next(steps)
        clock.advance(1)
    assert loop.state.elapsed == 1
    clock.advance(1)
    next(steps)
    assert loop.state.elapsed == 2


def test_a_pause_around_the_whole_run_counts_nothing() -> None:
    clock = ManualClock(7)
    loop = Loop(range(9), max_epochs=1, clock=clock)
    with loop.pause_clock():
        for _ in itertools.islice(loop, 3):
            clock.advance(1)
    assert loop.lap("a").seconds == 0
