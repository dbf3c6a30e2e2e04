"""When events fire: DESIGN.md, section 2, rule by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, LoopState
from manual_clock import ManualClock
from recording_loaders import epochs_of

TOP = 2**62
EPOCH_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def fires(event: Any, lengths: list[int], *, clock: Callable[[], Any] | None = None) -> list[int]:
    """The global steps at which the event fires in a run of epochs of these lengths."""
    loop = Loop(epochs_of(lengths, sized=False), {"E": event}, max_epochs=len(lengths), clock=clock)
    return [loop.global_step for _, events in loop if "E" in events]


def fires_at_times(event: Any, readings: Iterable[Any], start: Any = 0) -> list[int]:
    """The same with one step per clock reading; every reading must be used exactly once."""
    times = [start, *readings]
    clock = iter(times)
    loop = Loop(lambda: [0, 0, 0], {"E": event}, max_steps=len(times) - 1, clock=clock.__next__)
    fired = [loop.global_step for _, events in loop if "E" in events]
    assert list(clock) == []
    return fired


def positions(lengths: list[int]) -> list[tuple[int, int, int, bool]]:
    """For every step: epoch, global step, epoch step, and whether the epoch ends there."""
    found = []
    for epoch, length in enumerate(lengths):
        found += [(epoch, len(found) + at, at, at == length - 1) for at in range(length)]
    return found


# Steps


def test_every_16_steps_fires_at_global_steps_15_31_and_47() -> None:
    assert fires(Event(every_n_steps=16), [50]) == [15, 31, 47]
    assert fires(Event(every_n_steps=16), [7] * 8) == [15, 31, 47]


@given(st.integers(1, 12), EPOCH_LENGTHS)
def test_every_n_steps_counts_across_epochs(n: int, lengths: list[int]) -> None:
    expected = [step for step in range(sum(lengths)) if (step + 1) % n == 0]
    assert fires(Event(every_n_steps=n), lengths) == expected


@given(st.integers(1, 12), EPOCH_LENGTHS)
def test_every_n_steps_per_epoch_counts_from_each_epochs_start(n: int, lengths: list[int]) -> None:
    expected = [step for _, step, at, _ in positions(lengths) if (at + 1) % n == 0]
    assert fires(Event(every_n_steps=n, per_epoch=True), lengths) == expected


@given(st.sets(st.integers(0, 40), min_size=1), EPOCH_LENGTHS)
def test_at_step_fires_at_these_global_steps(steps: set[int], lengths: list[int]) -> None:
    expected = [step for step in range(sum(lengths)) if step in steps]
    assert fires(Event(at_step=steps), lengths) == expected


@given(st.sets(st.integers(0, 9), min_size=1), EPOCH_LENGTHS)
def test_at_step_per_epoch_fires_at_these_steps_of_every_epoch(
    steps: set[int], lengths: list[int]
) -> None:
    expected = [step for _, step, at, _ in positions(lengths) if at in steps]
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
def test_a_window_limits_step_criteria_by_global_step_without_shifting_them(
    per_epoch: bool, n: int, steps: set[int], start: int, width: int, lengths: list[int]
) -> None:
    window: Any = {"from_step": start, "until_step": start + width, "per_epoch": per_epoch}
    every, at_steps = [], []
    for _, step, epoch_step, _ in positions(lengths):
        counter = epoch_step if per_epoch else step
        if start <= step < start + width:
            every += [step] * ((counter + 1) % n == 0)
            at_steps += [step] * (counter in steps)
    assert fires(Event(every_n_steps=n, **window), lengths) == every
    assert fires(Event(at_step=steps, **window), lengths) == at_steps
    both = fires(Event(every_n_steps=n, at_step=steps, **window), lengths)
    assert both == sorted({*every, *at_steps})


def test_a_window_includes_from_step_and_excludes_until_step() -> None:
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
def test_the_greatest_counts_and_times_do_not_fire_in_a_short_run(event: Event) -> None:
    assert fires(event, [3] * 5) == []


def test_the_greatest_steps_and_times_do_not_affect_the_near_ones() -> None:
    assert fires(Event(every_n_steps=TOP, at_step=[2, TOP]), [3, 3]) == [2]
    assert fires(Event(at_time=[3, TOP // 10**9]), [5], clock=iter(range(9)).__next__) == [2]


# Epochs


@given(st.integers(1, 5), EPOCH_LENGTHS)
def test_every_n_epochs_fires_on_the_last_batch_of_these_epochs(n: int, lengths: list[int]) -> None:
    expected = [step for epoch, step, _, end in positions(lengths) if end and (epoch + 1) % n == 0]
    assert fires(Event(every_n_epochs=n), lengths) == expected


@given(st.sets(st.integers(0, 9), min_size=1), EPOCH_LENGTHS)
def test_at_epoch_fires_on_the_last_batch_of_these_epochs(
    wanted: set[int], lengths: list[int]
) -> None:
    expected = [step for epoch, step, _, end in positions(lengths) if end and epoch in wanted]
    assert fires(Event(at_epoch=wanted), lengths) == expected


def test_an_epoch_that_the_limit_cuts_fires_no_epoch_criteria() -> None:
    loop = Loop([0, 1, 2], {"E": Event(every_n_epochs=1, at_epoch=[0, 1])}, max_steps=5)
    assert [loop.global_step for _, events in loop if "E" in events] == [2]


def test_a_window_limits_epoch_criteria() -> None:
    assert fires(Event(every_n_epochs=1, from_step=3, until_step=8), [3, 3, 3]) == [5]
    assert fires(Event(at_epoch=[0, 2], from_step=3), [3, 3, 3]) == [8]


# Several criteria, and joined events


@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 3), EPOCH_LENGTHS)
def test_an_event_with_several_criteria_fires_when_any_of_them_is_due(
    n: int, k: int, epochs: int, lengths: list[int]
) -> None:
    expected = [
        step
        for epoch, step, _, end in positions(lengths)
        if (step + 1) % n == 0 or step == k or (end and (epoch + 1) % epochs == 0)
    ]
    event = Event(every_n_steps=n, at_step=k, every_n_epochs=epochs)
    assert fires(event, lengths) == expected


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), EPOCH_LENGTHS)
def test_joined_events_keep_their_own_windows(
    n: int, m: int, edge: int, lengths: list[int]
) -> None:
    expected = [
        step
        for _, step, at, end in positions(lengths)
        if ((step + 1) % n == 0 and step <= edge) or ((at + 1) % m == 0 and step > edge) or end
    ]
    before = Event(every_n_steps=n, until_step=edge + 1)
    after = Event(every_n_steps=m, per_epoch=True, from_step=edge + 1)
    assert fires(before | after | LoopEvents.EPOCH_END, lengths) == expected


def test_an_event_joined_with_training_end_fires_at_the_last_batch_too() -> None:
    assert fires(Event(every_n_steps=4) | LoopEvents.TRAINING_END, [3, 3]) == [3, 5]
    assert fires(Event(every_n_steps=3) | LoopEvents.TRAINING_END, [3, 3]) == [2, 5]


# Time


def test_missed_periods_fire_once_and_the_next_period_starts_at_that_reading() -> None:
    assert fires_at_times(Event(every_n_seconds=10), [0, 9, 10, 35, 36, 44, 45, 46]) == [2, 3, 6]


@given(
    st.integers(1, 9),
    st.lists(st.integers(0, 12), min_size=1, max_size=30),
    st.integers(0, 15),
    st.integers(1, 30),
    st.integers(-100, 100),
)
def test_every_n_seconds_fires_when_that_time_has_passed_since_it_was_last_due(
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


def test_at_time_0_fires_at_the_first_step() -> None:
    assert fires_at_times(Event(at_time=0), [0, 0, 1]) == [0]


def test_a_timer_due_before_its_window_fires_at_the_windows_first_step() -> None:
    assert fires_at_times(Event(at_time=1, from_step=3), [1, 2, 3, 4, 5]) == [3]
    assert fires_at_times(Event(every_n_seconds=2, from_step=3), [2, 4, 6, 7, 8, 9]) == [3, 5]


def test_a_timer_due_after_its_window_never_fires() -> None:
    assert fires_at_times(Event(at_time=3, until_step=2), [1, 2, 3, 4]) == []
    assert fires_at_times(Event(every_n_seconds=3, until_step=2), [1, 2, 3, 9]) == []


def test_a_timer_begins_anew_with_other_criteria() -> None:
    event = Event(every_n_seconds=10, every_n_steps=4)
    assert fires_at_times(event, [3, 6, 8, 9, 10, 11, 12, 13, 20, 23]) == [3, 7, 9]


def test_a_timer_due_together_with_a_step_criterion_counts_as_fired() -> None:
    event = Event(every_n_steps=2, every_n_seconds=10)
    assert fires_at_times(event, [1, 11, 12, 13, 20, 21]) == [1, 3, 5]
    event = Event(every_n_steps=2, at_time=10)
    assert fires_at_times(event, [1, 11, 12, 13, 20, 21]) == [1, 3, 5]


def test_a_timer_due_together_with_a_condition_counts_as_fired() -> None:
    event = Event(lambda state: state.global_step == 1, every_n_seconds=10)
    assert fires_at_times(event, [1, 11, 12, 20, 21]) == [1, 4]


def test_a_period_begins_anew_with_a_time_in_the_same_event() -> None:
    assert fires_at_times(Event(every_n_seconds=10, at_time=14), [5, 10, 15, 20, 25]) == [1, 2, 4]


def test_joined_timers_begin_anew_together() -> None:
    event = Event(every_n_seconds=10) | Event(every_n_seconds=4, until_step=3)
    assert fires_at_times(event, [4, 8, 10, 16, 18, 22]) == [0, 1, 4]


@pytest.mark.parametrize("criterion", [{"every_n_seconds": 4}, {"at_time": [3, 9]}])
def test_in_a_new_run_per_launch_makes_no_difference(criterion: Any) -> None:
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


def test_large_clock_readings_are_exact_to_the_nanosecond() -> None:
    day = 4_000_000_000
    readings = [Fraction(1, 2), day, day, day + 1]
    assert fires_at_times(Event(at_time=day), readings) == [1]
    assert fires_at_times(Event(every_n_seconds=1), readings) == [1, 3]


def test_a_clock_may_return_any_real_number() -> None:
    readings = [1, 2.5, Fraction(7, 2), 4]
    assert fires_at_times(Event(every_n_seconds=1.25), readings) == [1, 3]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(-50, 50))
def test_elapsed_stays_constant_while_the_clock_goes_backwards(
    readings: list[int], origin: int
) -> None:
    clock = iter([origin, *(origin + reading for reading in readings)])
    event = {"E": Event(every_n_seconds=10**6)}
    loop = Loop(lambda: [0], event, max_steps=len(readings), clock=clock.__next__)
    seen = [loop.state.elapsed for _ in loop]
    assert seen == [float(max(readings[: at + 1])) for at in range(len(readings))]


def test_time_starts_at_the_first_request_not_when_the_loop_is_created() -> None:
    clock = ManualClock(100)
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
    """A loader whose every call advances the clock; `log` records the calls in order."""

    def __init__(self, log: list[str], clock: ManualClock, length: int) -> None:
        self.log = log
        self.clock = clock
        self.length = length

    def set_epoch(self, epoch: int) -> None:
        self.log.append("set_epoch")
        self.clock.now += 1000

    def __iter__(self) -> Iterator[int]:
        self.log.append("iter")
        self.clock.now += 100
        return self.batches()

    def batches(self) -> Iterator[int]:
        for batch in range(self.length):
            self.log.append(f"batch {batch}")
            self.clock.now += 1
            yield batch
        self.log.append("end")


class SizedSlow(Slow):
    def __len__(self) -> int:
        return self.length


def run_slowly(kind: type[Slow], event: Event, epochs: int = 1) -> tuple[list[str], list[float]]:
    log: list[str] = []
    clock = ManualClock()

    def record() -> float:
        log.append("clock")
        return clock()

    loop = Loop(kind(log, clock, 2), {"E": event}, max_epochs=epochs, clock=record)
    elapsed = []
    for batch, _ in loop:
        log.append(f"body {batch}")
        elapsed.append(loop.state.elapsed)
    return log, elapsed


def test_the_clock_is_read_after_fetching_just_before_the_batch_is_handed_over() -> None:
    log, elapsed = run_slowly(SizedSlow, Event(every_n_seconds=9))
    first = ["set_epoch", "iter", "clock", "batch 0", "clock", "body 0"]
    assert log == [*first, "batch 1", "clock", "body 1", "end"]
    assert elapsed == [1.0, 2.0]


def test_with_lookahead_the_clock_is_read_after_the_next_batch_is_fetched() -> None:
    log, elapsed = run_slowly(Slow, Event(at_time=9))
    first = ["set_epoch", "iter", "clock", "batch 0", "batch 1", "clock", "body 0"]
    assert log == [*first, "end", "clock", "body 1"]
    assert elapsed == [2.0, 2.0]


def test_the_time_to_begin_a_later_epoch_counts_as_training_time() -> None:
    _, elapsed = run_slowly(SizedSlow, Event(every_n_seconds=9), epochs=2)
    assert elapsed == [1.0, 2.0, 1103.0, 1104.0]


def test_without_time_criteria_the_clock_is_read_only_when_elapsed_is() -> None:
    clock = ManualClock(50)
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
def test_all_time_criteria_and_conditions_of_a_step_share_one_reading(
    given_: dict[str, Any],
) -> None:
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
def test_a_clock_that_returns_no_finite_time_ends_the_run(bad: Any) -> None:
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
    """A condition's result that is no bool but has a truth value, as arrays have."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


def test_a_condition_fires_if_its_result_is_true_in_a_boolean_context() -> None:
    answers: list[Any] = [True, False, 1, 0, None, "yes", "", [0], [], Truth(True), Truth(False)]
    event = Event(lambda state: answers[state.global_step])
    assert fires(event, [11]) == [0, 2, 5, 7, 9]


def test_conditions_are_called_after_stop_when_in_the_order_of_the_events() -> None:
    calls: list[str] = []

    def record(name: str) -> Event:
        return Event(lambda state: calls.append(name))

    events = {"b": record("b"), "a": record("a1") | record("a2"), "c": record("c")}
    for _ in Loop([0, 0], events, max_epochs=1, stop_when=record("stop")):
        calls.append("body")
    assert calls == ["stop", "b", "a1", "a2", "c", "body"] * 2


def test_a_condition_is_called_at_every_step_even_if_another_criterion_is_due() -> None:
    calls: list[int] = []

    def record(state: LoopState) -> bool:
        calls.append(state.global_step)
        return True

    event = Event(record, every_n_steps=1, every_n_epochs=1) | LoopEvents.EPOCH_END
    assert fires(event | Event(every_n_steps=2), [2, 2]) == [0, 1, 2, 3]
    assert calls == [0, 1, 2, 3]


def test_an_event_under_two_names_has_its_condition_called_twice_per_step() -> None:
    calls: list[int] = []
    event = Event(lambda state: calls.append(state.global_step))
    list(Loop([0, 0], {"a": event, "b": event}, max_epochs=1))
    assert calls == [0, 0, 1, 1]


def test_a_condition_is_not_called_outside_its_window() -> None:
    calls: list[int] = []
    event = Event(lambda state: calls.append(state.global_step), from_step=2, until_step=5)
    assert fires(event, [4, 4]) == []
    assert calls == [2, 3, 4]


def test_a_condition_fires_in_addition_to_other_criteria() -> None:
    event = Event(lambda state: state.global_step == 7, every_n_steps=5)
    assert fires(event, [12]) == [4, 7, 9]


def test_conditions_see_training_end_where_stop_when_fires() -> None:
    before: list[bool] = []
    after: list[bool] = []
    stop = Event(lambda state: (before.append(state.training_end), state.global_step == 2)[1])
    watch = Event(lambda state: after.append(state.training_end))
    loop = Loop([0] * 9, {"Watch": watch}, max_epochs=1, stop_when=stop)
    assert [loop.state.training_end for _ in loop] == [False, False, True]
    assert before == [False, False, False]
    assert after == [False, False, True]


def test_stop_when_sees_training_end_at_the_limits_last_step() -> None:
    seen: list[bool] = []
    list(Loop([0] * 3, max_steps=3, stop_when=Event(lambda s: seen.append(s.training_end))))
    assert seen == [False, False, True]


def test_stop_when_conditions_and_body_see_the_same_elapsed() -> None:
    clock = ManualClock()
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
def test_an_error_of_a_condition_is_raised_with_a_note_and_ends_the_run(
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
    batches = []
    with pytest.raises(ZeroDivisionError) as caught:
        for batch, _ in loop:
            batches.append(batch)
    assert caught.value is wrong
    assert wrong.args == ("my own",)
    assert wrong.__notes__ == [f"in the condition of {where}"]  # type: ignore[attr-defined]
    assert batches == [0, 1]
    assert (loop.global_step, loop.stop_reason) == (1, "exception")


def test_an_error_in_bool_of_the_result_is_an_error_of_the_condition() -> None:
    class Ambiguous:
        def __bool__(self) -> bool:
            raise ValueError("ambiguous")

    loop = Loop([0], {"Log": Event(lambda state: Ambiguous())}, max_steps=1)
    with pytest.raises(ValueError, match="ambiguous") as caught:
        next(iter(loop))
    assert caught.value.__notes__ == ["in the condition of event 'Log'"]  # type: ignore[attr-defined]


def test_a_note_is_added_to_existing_notes() -> None:
    wrong = ValueError("noted before")
    wrong.__notes__ = ["mine"]  # type: ignore[attr-defined]

    def condition(state: LoopState) -> bool:
        raise wrong

    with pytest.raises(ValueError):
        next(iter(Loop([0], {"Log": Event(condition)}, max_steps=1)))
    assert wrong.__notes__ == ["mine", "in the condition of event 'Log'"]  # type: ignore[attr-defined]


# LoopState


def test_the_state_before_the_first_batch() -> None:
    clock = ManualClock()
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
    loop = Loop(epochs_of(lengths, sized=False), events, max_epochs=len(lengths))
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
    assert seen == positions(lengths)
    assert loop.global_step == sum(lengths) - 1
    assert loop.state.training_end


def test_a_state_does_not_change_with_later_steps() -> None:
    loop = Loop([0] * 4, max_seconds=3, clock=iter(range(5)).__next__)
    states = [loop.state for _ in loop]
    assert [(state.global_step, state.elapsed) for state in states] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    "field",
    ["epoch", "global_step", "epoch_step", "epoch_end", "training_end", "elapsed", "steps_done"],
)
def test_no_attribute_of_a_state_can_be_assigned(field: str) -> None:
    loop = Loop([0], max_steps=1)
    next(iter(loop))
    before = getattr(loop.state, field)
    with pytest.raises(AttributeError):
        setattr(loop.state, field, 5)
    assert getattr(loop.state, field) == before


def test_states_compare_hash_and_print_by_their_values() -> None:
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


def test_one_event_can_be_used_in_several_loops_at_once() -> None:
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


def test_one_event_under_two_names_has_two_timers() -> None:
    event = Event(every_n_seconds=2)
    events = {"a": event, "b": event, "c": event | Event(at_step=0)}
    loop = Loop([0] * 4, events, max_epochs=1, clock=iter(range(5)).__next__)
    fired = [events & {"a", "b", "c"} for _, events in loop]
    assert fired == [{"c"}, {"a", "b"}, {"c"}, {"a", "b"}]
