"""When events fire: section 2 of the contract, rule by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, LoopState

TOP = 2**62
EPOCH_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def epochs_of(lengths: list[int]) -> Callable[[], Iterator[int]]:
    """A callable whose epochs have these lengths, which no `len()` tells."""
    epochs = iter(lengths)
    return lambda: iter(range(next(epochs)))


def fires(event: Any, lengths: list[int], *, clock: Callable[[], Any] | None = None) -> list[int]:
    """The global steps at which the event fires in a run of epochs of these lengths."""
    loop = Loop(epochs_of(lengths), {"E": event}, max_epochs=len(lengths), clock=clock)
    return [loop.global_step for _, events in loop if "E" in events]


def fires_at_times(event: Any, readings: Iterable[Any], start: Any = 0) -> list[int]:
    """The same for one step per reading of the clock; each must be read exactly once."""
    script = [start, *readings]
    clock = iter(script)
    loop = Loop(lambda: [0, 0, 0], {"E": event}, max_steps=len(script) - 1, clock=clock.__next__)
    fired = [loop.global_step for _, events in loop if "E" in events]
    assert list(clock) == []
    return fired


def places(lengths: list[int]) -> list[tuple[int, int, int, bool]]:
    """Epoch, global step, epoch step, and whether the epoch ends there, of every step."""
    found = []
    for epoch, length in enumerate(lengths):
        found += [(epoch, len(found) + at, at, at == length - 1) for at in range(length)]
    return found


class Clock:
    """A clock that stands still until somebody sets it on, and counts its readings."""

    def __init__(self, now: float = 0) -> None:
        self.now = now
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now


# Steps


def test_sixteen_steps_are_over_at_15_31_and_47() -> None:
    assert fires(Event(every_n_steps=16), [50]) == [15, 31, 47]
    assert fires(Event(every_n_steps=16), [7] * 8) == [15, 31, 47]


@given(st.integers(1, 12), EPOCH_LENGTHS)
def test_every_n_steps_counts_on_across_epochs(n: int, lengths: list[int]) -> None:
    expected = [step for step in range(sum(lengths)) if (step + 1) % n == 0]
    assert fires(Event(every_n_steps=n), lengths) == expected


@given(st.integers(1, 12), EPOCH_LENGTHS)
def test_every_n_steps_per_epoch_starts_afresh_in_every_epoch(n: int, lengths: list[int]) -> None:
    expected = [step for _, step, at, _ in places(lengths) if (at + 1) % n == 0]
    assert fires(Event(every_n_steps=n, per_epoch=True), lengths) == expected


@given(st.sets(st.integers(0, 40), min_size=1), EPOCH_LENGTHS)
def test_at_step_fires_when_the_global_step_is_one_of_them(
    steps: set[int], lengths: list[int]
) -> None:
    expected = [step for step in range(sum(lengths)) if step in steps]
    assert fires(Event(at_step=steps), lengths) == expected


@given(st.sets(st.integers(0, 9), min_size=1), EPOCH_LENGTHS)
def test_at_step_per_epoch_fires_at_these_steps_of_every_epoch(
    steps: set[int], lengths: list[int]
) -> None:
    expected = [step for _, step, at, _ in places(lengths) if at in steps]
    assert fires(Event(at_step=steps, per_epoch=True), lengths) == expected


def test_at_step_0_per_epoch_marks_the_start_of_every_epoch() -> None:
    assert fires(Event(at_step=0, per_epoch=True), [3, 1, 2]) == [0, 3, 4]


@pytest.mark.parametrize("per_epoch", [False, True])
@given(
    n=st.integers(1, 9),
    steps=st.sets(st.integers(0, 20), min_size=1),
    start=st.integers(0, 20),
    width=st.integers(1, 20),
    lengths=EPOCH_LENGTHS,
)
def test_a_window_bounds_step_criteria_by_the_global_step_and_moves_nothing(
    per_epoch: bool, n: int, steps: set[int], start: int, width: int, lengths: list[int]
) -> None:
    window: Any = {"from_step": start, "until_step": start + width, "per_epoch": per_epoch}
    every, at_steps = [], []
    for _, step, epoch_step, _ in places(lengths):
        counter = epoch_step if per_epoch else step
        if start <= step < start + width:
            every += [step] * ((counter + 1) % n == 0)
            at_steps += [step] * (counter in steps)
    assert fires(Event(every_n_steps=n, **window), lengths) == every
    assert fires(Event(at_step=steps, **window), lengths) == at_steps
    both = fires(Event(every_n_steps=n, at_step=steps, **window), lengths)
    assert both == sorted({*every, *at_steps})


def test_from_step_is_in_the_window_and_until_step_is_not() -> None:
    assert fires(Event(every_n_steps=1, from_step=3, until_step=6), [10]) == [3, 4, 5]
    assert fires(Event(every_n_steps=1, from_step=8), [10]) == [8, 9]
    assert fires(Event(every_n_steps=1, until_step=1), [10]) == [0]


@pytest.mark.parametrize(
    "event",
    [
        Event(every_n_steps=TOP),
        Event(at_step=[TOP - 1, TOP]),
        Event(every_n_steps=TOP - 1, per_epoch=True),
        Event(every_n_steps=1, from_step=TOP),
        Event(every_n_steps=TOP, from_step=TOP - 1, until_step=TOP),
        Event(at_epoch=TOP),
        Event(every_n_epochs=TOP),
        Event(every_n_seconds=TOP // 10**9),
        Event(at_time=TOP // 10**9),
        Event(lambda state: True, from_step=TOP),
    ],
    ids=range(10),
)
def test_what_is_farthest_away_never_comes(event: Event) -> None:
    assert fires(event, [3] * 5) == []


def test_the_farthest_steps_do_not_disturb_the_near_ones() -> None:
    assert fires(Event(every_n_steps=TOP, at_step=[2, TOP]), [3, 3]) == [2]
    assert fires(Event(at_time=[3, TOP // 10**9]), [5], clock=iter(range(9)).__next__) == [2]


# Epochs


@given(st.integers(1, 5), EPOCH_LENGTHS)
def test_every_n_epochs_fires_on_the_last_batch_of_these_epochs(n: int, lengths: list[int]) -> None:
    expected = [step for epoch, step, _, end in places(lengths) if end and (epoch + 1) % n == 0]
    assert fires(Event(every_n_epochs=n), lengths) == expected


@given(st.sets(st.integers(0, 9), min_size=1), EPOCH_LENGTHS)
def test_at_epoch_fires_on_the_last_batch_of_these_epochs(
    wanted: set[int], lengths: list[int]
) -> None:
    expected = [step for epoch, step, _, end in places(lengths) if end and epoch in wanted]
    assert fires(Event(at_epoch=wanted), lengths) == expected


def test_an_epoch_that_is_cut_has_no_last_batch() -> None:
    loop = Loop([0, 1, 2], {"E": Event(every_n_epochs=1, at_epoch=[0, 1])}, max_steps=5)
    assert [loop.global_step for _, events in loop if "E" in events] == [2]


def test_a_window_bounds_epoch_criteria() -> None:
    assert fires(Event(every_n_epochs=1, from_step=3, until_step=8), [3, 3, 3]) == [5]
    assert fires(Event(at_epoch=[0, 2], from_step=3), [3, 3, 3]) == [8]


# Several criteria, several parts


@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 3), EPOCH_LENGTHS)
def test_an_event_with_several_criteria_fires_when_any_is_due(
    n: int, k: int, epochs: int, lengths: list[int]
) -> None:
    expected = [
        step
        for epoch, step, _, end in places(lengths)
        if (step + 1) % n == 0 or step == k or (end and (epoch + 1) % epochs == 0)
    ]
    event = Event(every_n_steps=n, at_step=k, every_n_epochs=epochs)
    assert fires(event, lengths) == expected


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), EPOCH_LENGTHS)
def test_of_joined_events_each_part_keeps_its_own_window(
    n: int, m: int, edge: int, lengths: list[int]
) -> None:
    expected = [
        step
        for _, step, at, end in places(lengths)
        if ((step + 1) % n == 0 and step <= edge) or ((at + 1) % m == 0 and step > edge) or end
    ]
    before = Event(every_n_steps=n, until_step=edge + 1)
    after = Event(every_n_steps=m, per_epoch=True, from_step=edge + 1)
    assert fires(before | after | LoopEvents.EPOCH_END, lengths) == expected


def test_an_event_joined_with_training_end_fires_at_the_last_batch_too() -> None:
    assert fires(Event(every_n_steps=4) | LoopEvents.TRAINING_END, [3, 3]) == [3, 5]
    assert fires(Event(every_n_steps=3) | LoopEvents.TRAINING_END, [3, 3]) == [2, 5]


# Time


def test_missed_periods_never_come_in_a_burst_and_the_next_counts_from_that_reading() -> None:
    assert fires_at_times(Event(every_n_seconds=10), [0, 9, 10, 35, 36, 44, 45, 46]) == [2, 3, 6]


@given(
    st.integers(1, 9),
    st.lists(st.integers(0, 12), min_size=1, max_size=30),
    st.integers(0, 15),
    st.integers(1, 30),
    st.integers(-100, 100),
)
def test_every_n_seconds_fires_when_so_long_has_passed_since_it_was_last_due(
    period: int, pauses: list[int], start: int, width: int, origin: int
) -> None:
    expected, readings, now, last = [], [], 0, 0
    for step, pause in enumerate(pauses):
        now += pause
        readings.append(origin + now)
        if start <= step < start + width and now - last >= period:
            expected.append(step)
            last = now
    event = Event(every_n_seconds=period, from_step=start, until_step=start + width)
    assert fires_at_times(event, readings, origin) == expected


@given(
    st.sets(st.integers(0, 60), min_size=1, max_size=6),
    st.lists(st.integers(0, 12), min_size=1, max_size=30),
    st.integers(0, 15),
    st.integers(1, 30),
)
def test_at_time_fires_once_for_each_time(
    times: set[int], pauses: list[int], start: int, width: int
) -> None:
    expected, readings, now, left = [], [], 0, set(times)
    for step, pause in enumerate(pauses):
        now += pause
        readings.append(now)
        if start <= step < start + width and any(time <= now for time in left):
            expected.append(step)
            left = {time for time in left if time > now}
    event = Event(at_time=times, from_step=start, until_step=start + width)
    assert fires_at_times(event, readings) == expected


def test_times_that_pass_in_one_step_fire_together_once() -> None:
    assert fires_at_times(Event(at_time=[5, 6, 20]), [4, 7, 8, 19, 20, 21]) == [1, 4]


def test_time_0_comes_with_the_first_step() -> None:
    assert fires_at_times(Event(at_time=0), [0, 0, 1]) == [0]


def test_a_timer_that_came_due_before_its_window_fires_at_the_windows_first_step() -> None:
    assert fires_at_times(Event(at_time=1, from_step=3), [1, 2, 3, 4, 5]) == [3]
    assert fires_at_times(Event(every_n_seconds=2, from_step=3), [2, 4, 6, 7, 8, 9]) == [3, 5]


def test_a_timer_that_comes_due_after_its_window_never_fires() -> None:
    assert fires_at_times(Event(at_time=3, until_step=2), [1, 2, 3, 4]) == []
    assert fires_at_times(Event(every_n_seconds=3, until_step=2), [1, 2, 3, 9]) == []


def test_a_timer_is_not_reset_by_other_criteria() -> None:
    event = Event(every_n_seconds=10, every_n_steps=4)
    assert fires_at_times(event, [3, 6, 8, 9, 10, 11, 12, 13, 20]) == [3, 4, 7, 8]


def test_a_timer_due_together_with_a_step_criterion_has_fired() -> None:
    event = Event(every_n_steps=2, every_n_seconds=10)
    assert fires_at_times(event, [1, 11, 12, 13, 20, 21]) == [1, 3, 5]
    event = Event(every_n_steps=2, at_time=10)
    assert fires_at_times(event, [1, 11, 12, 13, 20, 21]) == [1, 3, 5]


def test_a_timer_due_together_with_a_condition_has_fired() -> None:
    event = Event(lambda state: state.global_step == 1, every_n_seconds=10)
    assert fires_at_times(event, [1, 11, 12, 20, 21]) == [1, 4]


def test_a_period_and_a_time_in_one_event_do_not_disturb_each_other() -> None:
    assert fires_at_times(Event(every_n_seconds=10, at_time=14), [5, 10, 15, 20, 21]) == [1, 2, 3]


def test_joined_timers_count_each_for_itself() -> None:
    event = Event(every_n_seconds=10) | Event(every_n_seconds=4, until_step=3)
    assert fires_at_times(event, [4, 8, 12, 16, 20, 22]) == [0, 1, 2, 5]


@pytest.mark.parametrize("criterion", [{"every_n_seconds": 4}, {"at_time": [3, 9]}])
def test_in_a_fresh_run_times_per_launch_are_the_times_of_the_training(criterion: Any) -> None:
    readings = [2, 3, 4, 8, 9, 11, 13]
    plain = fires_at_times(Event(**criterion), readings)
    assert fires_at_times(Event(**criterion, per_launch=True), readings) == plain != []


def test_seconds_are_compared_in_whole_nanoseconds() -> None:
    tenths = [step * 0.1 for step in range(1, 300)]
    assert fires_at_times(Event(every_n_seconds=0.1), tenths) == list(range(299))
    assert fires_at_times(Event(at_time=0.3), [0.1, 0.2, 0.1 + 0.2 - 1e-12, 0.4]) == [2]
    assert fires_at_times(Event(every_n_seconds=1), [0.999999999, 1.0]) == [1]


def test_a_period_below_a_nanosecond_counts_as_one() -> None:
    assert fires_at_times(Event(every_n_seconds=1e-12), [0, 1e-9, 1e-9, 2e-9]) == [1, 3]


def test_large_clock_readings_lose_no_nanoseconds() -> None:
    day = 4_000_000_000
    readings = [Fraction(1, 2), day, day, day + 1]
    assert fires_at_times(Event(at_time=day), readings) == [1]
    assert fires_at_times(Event(every_n_seconds=1), readings) == [1, 3]


def test_a_clock_may_return_anything_that_is_a_number() -> None:
    readings = [1, 2.5, Fraction(7, 2), 4]
    assert fires_at_times(Event(every_n_seconds=1.25), readings) == [1, 3]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(-50, 50))
def test_a_clock_that_goes_backwards_stands_still(readings: list[int], origin: int) -> None:
    clock = iter([origin, *(origin + reading for reading in readings)])
    event = {"E": Event(every_n_seconds=10**6)}
    loop = Loop(lambda: [0], event, max_steps=len(readings), clock=clock.__next__)
    seen = [loop.state.elapsed for _ in loop]
    assert seen == [float(max(readings[: at + 1])) for at in range(len(readings))]


def test_time_starts_with_the_first_request_and_not_with_the_loop() -> None:
    clock = Clock(100)
    loop = Loop([0] * 3, {"E": Event(at_time=7)}, max_epochs=1, clock=clock)
    assert clock.readings == 0
    clock.now = 200
    run = iter(loop)
    clock.now = 300
    fired = []
    for _, events in run:
        fired.append("E" in events)
        assert loop.state.elapsed == clock.now - 300
        clock.now += 5
    assert fired == [False, False, True]


class Slow:
    """A loader whose every part takes its time; `notes` tells what was done when."""

    def __init__(self, notes: list[str], clock: Clock, length: int) -> None:
        self.notes = notes
        self.clock = clock
        self.length = length

    def set_epoch(self, epoch: int) -> None:
        self.notes.append("set_epoch")
        self.clock.now += 1000

    def __iter__(self) -> Iterator[int]:
        self.notes.append("iter")
        self.clock.now += 100
        return self.batches()

    def batches(self) -> Iterator[int]:
        for batch in range(self.length):
            self.notes.append(f"batch {batch}")
            self.clock.now += 1
            yield batch
        self.notes.append("end")


class SizedSlow(Slow):
    def __len__(self) -> int:
        return self.length


def run_slowly(kind: type[Slow], event: Event, epochs: int = 1) -> tuple[list[str], list[float]]:
    notes: list[str] = []
    clock = Clock()

    def note() -> float:
        notes.append("clock")
        return clock()

    loop = Loop(kind(notes, clock, 2), {"E": event}, max_epochs=epochs, clock=note)
    elapsed = []
    for batch, _ in loop:
        notes.append(f"body {batch}")
        elapsed.append(loop.state.elapsed)
    return notes, elapsed


def test_the_clock_is_read_after_all_fetching_just_before_the_batch_is_handed_over() -> None:
    notes, elapsed = run_slowly(SizedSlow, Event(every_n_seconds=9))
    first = ["set_epoch", "iter", "clock", "batch 0", "clock", "body 0"]
    assert notes == [*first, "batch 1", "clock", "body 1", "end"]
    assert elapsed == [1.0, 2.0]


def test_looking_ahead_is_fetching_too() -> None:
    notes, elapsed = run_slowly(Slow, Event(at_time=9))
    first = ["set_epoch", "iter", "clock", "batch 0", "batch 1", "clock", "body 0"]
    assert notes == [*first, "end", "clock", "body 1"]
    assert elapsed == [2.0, 2.0]


def test_opening_a_later_epoch_is_training_time() -> None:
    _, elapsed = run_slowly(SizedSlow, Event(every_n_seconds=9), epochs=2)
    assert elapsed == [1.0, 2.0, 1103.0, 1104.0]


def test_where_nothing_needs_time_the_clock_is_read_only_when_somebody_looks() -> None:
    clock = Clock(50)
    loop = Loop([0] * 9, {"E": Event(every_n_steps=2)}, max_epochs=1, clock=clock)
    for _ in loop:
        clock.now += 1
    assert clock.readings == 1
    loop.restart()
    looks = []
    for batch, _ in enumerate(loop):
        clock.now += 1
        if batch % 4 == 0:
            looks += [loop.state.elapsed, loop.state.elapsed]
            clock.now += 0.5
            looks.append(loop.state.elapsed)
    assert looks == [1.0, 1.0, 1.0, 5.5, 5.5, 5.5, 10.0, 10.0, 10.0]
    assert clock.readings == 1 + 1 + 3


@pytest.mark.parametrize(
    "given_",
    [
        {"max_seconds": 100},
        {"max_steps": 4, "events": {"E": Event(every_n_seconds=9, from_step=10**6)}},
        {"max_steps": 4, "events": {"E": Event(at_time=0, until_step=1)}},
        {"max_steps": 4, "stop_when": Event(at_time=9)},
        {"max_steps": 4, "events": {"E": Event(at_step=9) | Event(at_time=9, per_launch=True)}},
    ],
    ids=range(5),
)
def test_one_reading_a_step_serves_everything_that_needs_time(given_: dict[str, Any]) -> None:
    readings = iter([0, 1, 2, 3, 100])
    states = []

    def look(state: LoopState) -> bool:
        states.append((state.elapsed, state.elapsed))
        return False

    events = {"Look": Event(look), "Two": Event(every_n_seconds=2), **given_.pop("events", {})}
    loop = Loop([0] * 4, events, clock=readings.__next__, **given_)
    seen = [loop.state.elapsed for _ in loop]
    assert seen == [1.0, 2.0, 3.0, 100.0]
    assert states == [(elapsed, elapsed) for elapsed in seen]
    assert list(readings) == []


@pytest.mark.parametrize("bad", ["12", None, True, [1.0]])
def test_a_clock_that_returns_no_number_ends_the_run(bad: Any) -> None:
    loop = Loop([0] * 3, max_seconds=5, clock=iter([0, 1, bad]).__next__)
    run = iter(loop)
    next(run)
    with pytest.raises(TypeError, match="clock") as caught:
        next(run)
    assert repr(bad) in str(caught.value)
    assert loop.stop_reason == "exception"
    assert loop.global_step == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300, 10**400])
def test_a_clock_that_returns_no_time_ends_the_run(bad: Any) -> None:
    loop = Loop([0] * 3, max_seconds=5, clock=iter([0, bad]).__next__)
    with pytest.raises(ValueError, match="clock"):
        next(iter(loop))
    assert loop.stop_reason == "exception"


# Conditions


def test_a_condition_sees_the_state_of_every_step_once() -> None:
    seen: list[LoopState] = []
    clock = iter([5, 5.5, 6, 7, 8, 9])
    loop = Loop(
        [0, 0, 0],
        {"E": Event(seen.append), "Timer": Event(every_n_seconds=9)},
        max_steps=5,
        clock=clock.__next__,
    )
    assert not any("E" in events for _, events in loop)
    fields = [
        (state.epoch, state.global_step, state.epoch_step, state.epoch_end, state.training_end)
        for state in seen
    ]
    assert fields == [
        (0, 0, 0, False, False),
        (0, 1, 1, False, False),
        (0, 2, 2, True, False),
        (1, 3, 0, False, False),
        (1, 4, 1, False, True),
    ]
    assert [state.elapsed for state in seen] == [0.5, 1.0, 2.0, 3.0, 4.0]
    assert [state.steps_done for state in seen] == [1, 2, 3, 4, 5]


class Truth:
    """An answer like those of array libraries: no bool, but with a truth."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


def test_the_truth_of_a_conditions_answer_counts() -> None:
    answers: list[Any] = [True, False, 1, 0, None, "yes", "", [0], [], Truth(True), Truth(False)]
    event = Event(lambda state: answers[state.global_step])
    assert fires(event, [11]) == [0, 2, 5, 7, 9]


def test_conditions_are_called_in_order_of_registration_after_stop_when() -> None:
    calls: list[str] = []

    def note(name: str) -> Event:
        return Event(lambda state: calls.append(name))

    events = {"b": note("b"), "a": note("a1") | note("a2"), "c": note("c")}
    for _ in Loop([0, 0], events, max_epochs=1, stop_when=note("stop")):
        calls.append("body")
    assert calls == ["stop", "b", "a1", "a2", "c", "body"] * 2


def test_a_condition_is_called_at_every_step_whatever_else_is_due() -> None:
    calls: list[int] = []

    def note(state: LoopState) -> bool:
        calls.append(state.global_step)
        return True

    event = Event(note, every_n_steps=1, every_n_epochs=1) | LoopEvents.EPOCH_END
    assert fires(event | Event(every_n_steps=2), [2, 2]) == [0, 1, 2, 3]
    assert calls == [0, 1, 2, 3]


def test_two_names_of_one_event_call_its_condition_once_each() -> None:
    calls: list[int] = []
    event = Event(lambda state: calls.append(state.global_step))
    list(Loop([0, 0], {"a": event, "b": event}, max_epochs=1))
    assert calls == [0, 0, 1, 1]


def test_a_condition_is_not_called_outside_its_window() -> None:
    calls: list[int] = []
    event = Event(lambda state: calls.append(state.global_step), from_step=2, until_step=5)
    assert fires(event, [4, 4]) == []
    assert calls == [2, 3, 4]


def test_a_condition_that_holds_fires_beside_other_criteria() -> None:
    event = Event(lambda state: state.global_step == 7, every_n_steps=5)
    assert fires(event, [12]) == [4, 7, 9]


def test_conditions_see_the_end_of_training_that_stop_when_decides() -> None:
    before: list[bool] = []
    after: list[bool] = []
    stop = Event(lambda state: (before.append(state.training_end), state.global_step == 2)[1])
    watch = Event(lambda state: after.append(state.training_end))
    loop = Loop([0] * 9, {"Watch": watch}, max_epochs=1, stop_when=stop)
    assert [loop.state.training_end for _ in loop] == [False, False, True]
    assert before == [False, False, False]
    assert after == [False, False, True]


def test_stop_when_sees_the_end_that_the_limit_decides() -> None:
    seen: list[bool] = []
    list(Loop([0] * 3, max_steps=3, stop_when=Event(lambda s: seen.append(s.training_end))))
    assert seen == [False, False, True]


def test_stop_when_and_the_other_conditions_agree_on_the_time() -> None:
    clock = Clock()
    looks: list[float] = []

    def look(state: LoopState) -> bool:
        clock.now += 1
        looks.append(state.elapsed)
        return True

    loop = Loop([0], {"E": Event(look)}, max_steps=9, stop_when=Event(look), clock=clock)
    for _ in loop:
        looks.append(loop.state.elapsed)
    assert looks == [1.0, 1.0, 1.0]
    assert clock.readings == 2


@pytest.mark.parametrize(
    ("name", "where"), [("Log", "event 'Log'"), (("a", 1), "event ('a', 1)"), (None, "stop_when")]
)
def test_what_a_condition_raises_comes_out_with_a_note_and_ends_the_run(
    name: Any, where: str
) -> None:
    wrong = ZeroDivisionError("my own")

    def condition(state: LoopState) -> bool:
        if state.global_step == 2:
            raise wrong
        return False

    events = {"Other": Event(every_n_steps=1)}
    if name is None:
        loop = Loop(iter(range(9)), events, max_steps=9, stop_when=Event(condition))
    else:
        loop = Loop(iter(range(9)), {**events, name: Event(condition)}, max_steps=9)
    handed = []
    with pytest.raises(ZeroDivisionError) as caught:
        for batch, _ in loop:
            handed.append(batch)
    assert caught.value is wrong
    assert wrong.args == ("my own",)
    assert wrong.__notes__ == [f"in the condition of {where}"]  # type: ignore[attr-defined]
    assert handed == [0, 1]
    assert (loop.global_step, loop.stop_reason) == (1, "exception")


def test_an_answer_without_a_truth_is_an_error_of_the_condition() -> None:
    class Ambiguous:
        def __bool__(self) -> bool:
            raise ValueError("ambiguous")

    loop = Loop([0], {"Log": Event(lambda state: Ambiguous())}, max_steps=1)
    with pytest.raises(ValueError, match="ambiguous") as caught:
        next(iter(loop))
    assert caught.value.__notes__ == ["in the condition of event 'Log'"]  # type: ignore[attr-defined]


def test_a_note_joins_the_notes_that_are_there() -> None:
    wrong = ValueError("noted before")
    wrong.__notes__ = ["mine"]  # type: ignore[attr-defined]

    def condition(state: LoopState) -> bool:
        raise wrong

    with pytest.raises(ValueError):
        next(iter(Loop([0], {"Log": Event(condition)}, max_steps=1)))
    assert wrong.__notes__ == ["mine", "in the condition of event 'Log'"]  # type: ignore[attr-defined]


# The state


def test_the_state_before_the_first_batch() -> None:
    clock = Clock()
    loop = Loop([0], max_seconds=9, clock=clock)
    state = loop.state
    assert (state.epoch, state.global_step, state.epoch_step) == (0, -1, -1)
    assert (state.epoch_end, state.training_end, state.elapsed) == (False, False, 0.0)
    assert state.steps_done == 0
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, -1, -1)
    assert clock.readings == 0


@given(EPOCH_LENGTHS, st.booleans())
def test_loop_state_is_the_state_of_the_latest_step(lengths: list[int], conditions: bool) -> None:
    given_: list[LoopState] = []
    events = {"E": Event(given_.append)} if conditions else {}
    loop = Loop(epochs_of(lengths), events, max_epochs=len(lengths))
    seen = []
    for _ in loop:
        state = loop.state
        assert loop.state is state
        assert (loop.epoch, loop.global_step, loop.epoch_step) == (
            state.epoch,
            state.global_step,
            state.epoch_step,
        )
        assert state.steps_done == state.global_step + 1
        assert not conditions or given_[-1] is state
        seen.append((state.epoch, state.global_step, state.epoch_step, state.epoch_end))
    assert seen == places(lengths)
    assert loop.global_step == sum(lengths) - 1
    assert loop.state.training_end


def test_a_kept_state_does_not_change() -> None:
    loop = Loop([0] * 4, max_seconds=3, clock=iter(range(5)).__next__)
    states = [loop.state for _ in loop]
    assert [(state.global_step, state.elapsed) for state in states] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    "field",
    ["epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed", "steps_done"],
)
def test_a_state_is_frozen(field: str) -> None:
    loop = Loop([0], max_steps=1)
    next(iter(loop))
    before = getattr(loop.state, field)
    with pytest.raises(AttributeError):
        setattr(loop.state, field, 5)
    assert getattr(loop.state, field) == before


def test_states_are_values() -> None:
    def states() -> list[LoopState]:
        loop = Loop([0, 0], max_seconds=1, clock=iter([0, 0.5, 1.5]).__next__)
        return [loop.state for _ in loop]

    first, second = states(), states()
    assert first == second
    assert [hash(state) for state in first] == [hash(state) for state in second]
    assert first[0] != first[1]
    assert first[0] != 3
    assert repr(first[0]) == (
        "LoopState(epoch=0, global_step=0, epoch_step=0, epoch_end=False, training_end=False,"
        " elapsed=0.5)"
    )
    assert repr(first[1]) == (
        "LoopState(epoch=0, global_step=1, epoch_step=1, epoch_end=True, training_end=True,"
        " elapsed=1.5)"
    )


# One Event, many loops


def test_one_event_serves_many_loops_at_once() -> None:
    event = Event(every_n_seconds=4, at_time=5, at_step=0)
    ticks = [iter(range(0, 90, stride)).__next__ for stride in (1, 2, 3)]
    loops = [Loop([0] * 9, {"E": event}, max_epochs=1, clock=tick) for tick in ticks]
    fired: list[list[int]] = [[], [], []]
    for _ in range(9):
        for loop, found in zip(loops, fired, strict=True):
            _, events = next(iter(loop))
            found += [loop.global_step] * ("E" in events)
    alone = [fires_at_times(event, range(stride, 10 * stride, stride)) for stride in (1, 2, 3)]
    assert fired == alone
    assert len({tuple(found) for found in fired}) == 3


def test_one_event_under_two_names_keeps_two_timers() -> None:
    event = Event(every_n_seconds=2)
    events = {"a": event, "b": event, "c": event | Event(at_step=0)}
    loop = Loop([0] * 4, events, max_epochs=1, clock=iter(range(5)).__next__)
    fired = [events & {"a", "b", "c"} for _, events in loop]
    assert fired == [{"c"}, {"a", "b", "c"}, set(), {"a", "b", "c"}]
