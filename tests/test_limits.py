"""Limits, stop_when, stop_reason, len(), and restart()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import Event, Loop, LoopError, LoopEvents, LoopState
from recording_loaders import epochs_of

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
EPOCH_LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def marks(loop: Loop[Any]) -> list[str]:
    """For each step "E" if EPOCH_END is due, and "T" if TRAINING_END is."""
    return ["E" * (EPOCH_END in due) + "T" * (TRAINING_END in due) for _, due in loop]


def ticks(stride: float = 1) -> Callable[[], float]:
    """A clock that starts at 0 and advances by `stride` with every reading."""
    return (step * stride for step in range(10**9)).__next__


# Limits


@given(EPOCH_LENGTHS, st.integers(1, 30))
def test_max_steps_ends_the_run_after_that_many_steps_whatever_the_epochs(
    lengths: list[int], n: int
) -> None:
    loop = Loop(epochs_of(lengths, sized=True), max_steps=n)
    epoch_ends, total = set(), 0
    while total < n:
        total += lengths[len(epoch_ends) % len(lengths)]
        epoch_ends.add(total)
    expected = ["E" * (step + 1 in epoch_ends) + "T" * (step + 1 == n) for step in range(n)]
    assert marks(loop) == expected
    assert loop.stop_reason == "max_steps"


@given(EPOCH_LENGTHS, st.integers(1, 8))
def test_max_epochs_ends_the_run_at_the_last_batch_of_that_epoch(
    lengths: list[int], n: int
) -> None:
    loop = Loop(epochs_of(lengths, sized=True), max_epochs=n)
    expected = []
    for epoch in range(n):
        expected += [""] * (lengths[epoch % len(lengths)] - 1) + ["E"]
    expected[-1] = "ET"
    assert marks(loop) == expected
    assert loop.stop_reason == "max_epochs"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 30))
def test_max_seconds_ends_the_run_at_the_first_step_at_or_after_the_limit(
    pauses: list[int], limit: int
) -> None:
    pauses = [*pauses, limit]
    readings = [sum(pauses[: step + 1]) for step in range(len(pauses))]
    last = next(step for step, reading in enumerate(readings) if reading >= limit)
    clock = iter([0, *readings])
    loop = Loop([0], max_seconds=limit, clock=clock.__next__)
    assert marks(loop) == ["E"] * last + ["ET"]
    assert loop.stop_reason == "max_seconds"
    assert list(clock) == readings[last + 1 :]


def test_max_seconds_is_compared_in_whole_nanoseconds() -> None:
    tenths = iter([0.0, 0.1, 0.2, 0.1 + 0.2 - 1e-12, 0.4])
    assert len(list(Loop([0], max_seconds=0.3, clock=tenths.__next__))) == 3


def test_max_seconds_in_the_middle_of_an_epoch_does_not_fire_epoch_end() -> None:
    assert marks(Loop([0] * 3, max_seconds=5, clock=ticks())) == ["", "", "E", "", "T"]


def test_max_steps_at_an_epochs_end_fires_epoch_end_and_training_end() -> None:
    assert marks(Loop([0] * 3, max_steps=6)) == ["", "", "E", "", "", "ET"]


# stop_when


@pytest.mark.parametrize(
    ("event", "last"),
    [
        (Event(at_step=4), 4),
        (Event(every_n_steps=3), 2),
        (Event(at_epoch=1), 5),
        (Event(every_n_epochs=3), 8),
        (Event(at_time=5), 4),
        (Event(at_time=5, per_launch=True), 4),
        (Event(every_n_seconds=4), 3),
        (Event(every_n_seconds=4, from_step=6), 6),
        (Event(lambda state: state.global_step >= 7), 7),
        (Event(lambda state: state.elapsed >= 7, at_step=50), 6),
        (Event(at_step=8) | Event(at_step=3), 3),
        (Event(at_step=4) | EPOCH_END, 2),
        (Event(at_step=4, from_step=5) | EPOCH_END, 2),
        (Event(at_step=4) | TRAINING_END, 4),
    ],
    ids=range(14),
)
def test_stop_when_ends_the_run_at_the_step_on_which_it_fires(event: Any, last: int) -> None:
    loop = Loop([0] * 3, max_steps=100, stop_when=event, clock=ticks())
    expected = ["E" if step % 3 == 2 else "" for step in range(last + 1)]
    expected[-1] += "T"
    assert marks(loop) == expected
    assert loop.stop_reason == "stop_when"
    assert loop.state.training_end


def test_the_condition_of_stop_when_is_called_even_where_another_criterion_is_due() -> None:
    calls: list[int] = []
    stop = Event(lambda state: calls.append(state.global_step), at_step=1)
    assert marks(Loop([0] * 9, max_epochs=1, stop_when=stop)) == ["", "T"]
    assert calls == [0, 1]


def test_stop_when_combines_with_each_limit() -> None:
    stop = Event(at_step=1)
    for limit in ("max_steps", "max_epochs", "max_seconds"):
        given_: dict[str, Any] = {limit: 50}
        loop = Loop([0] * 9, stop_when=stop, **given_)
        assert marks(loop) == ["", "T"]


def test_if_stop_when_never_fires_the_limit_ends_the_run() -> None:
    loop = Loop([0] * 3, max_steps=4, stop_when=Event(at_step=9) | TRAINING_END)
    assert marks(loop) == ["", "", "E", "T"]
    assert loop.stop_reason == "max_steps"


def test_events_joined_with_training_end_fire_where_stop_when_ends_it() -> None:
    events = {"Save": Event(every_n_steps=4) | TRAINING_END, "Quiet": Event(at_step=99)}
    loop = Loop([0] * 9, events, max_epochs=5, stop_when=Event(at_step=5))
    assert [loop.global_step for _, due in loop if "Save" in due] == [3, 5]


# stop_reason


def test_the_stop_reason_can_be_read_in_the_body_of_the_last_step() -> None:
    for given_, reason in (
        ({"max_steps": 3}, "max_steps"),
        ({"max_epochs": 1}, "max_epochs"),
        ({"max_seconds": 3, "clock": ticks()}, "max_seconds"),
        ({"max_steps": 9, "stop_when": Event(at_step=2)}, "stop_when"),
    ):
        arguments: dict[str, Any] = given_
        loop = Loop([0] * 3, **arguments)
        assert loop.stop_reason is None
        assert [loop.stop_reason for _ in loop] == [None, None, reason]
        assert loop.stop_reason == reason


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_epochs": 1}, {"max_seconds": 3}])
def test_stop_when_takes_precedence_over_a_limit_reached_at_the_same_step(
    limit: dict[str, Any],
) -> None:
    for event in (Event(at_step=2), Event(lambda state: state.training_end)):
        loop = Loop([0] * 3, stop_when=event, clock=ticks(), **limit)
        assert len(list(loop)) == 3
        assert loop.stop_reason == "stop_when"


def test_an_error_of_the_body_does_not_end_the_run() -> None:
    loop = Loop(range(3), max_steps=3)
    with pytest.raises(ZeroDivisionError):
        for _ in loop:
            raise ZeroDivisionError
    assert loop.stop_reason is None
    assert [batch for batch, _ in loop] == [1, 2]


def test_the_stop_reason_after_an_error_of_the_source_is_exception() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise OSError("disk")

    loop = Loop(source, max_steps=5, stop_when=Event(at_step=4))
    with pytest.raises(OSError):
        list(loop)
    assert loop.stop_reason == "exception"


# len and bool


@pytest.mark.parametrize("entered_again", [False, True])
def test_len_under_max_steps_is_the_number_of_steps_left(entered_again: bool) -> None:
    loop = Loop(iter(range(9)), max_steps=5)
    assert len(loop) == 5
    left = []
    for _ in loop:
        left.append(len(loop))
        if entered_again:
            break
    left += [len(loop) for _ in loop] if entered_again else []
    assert left == [4, 3, 2, 1, 0]
    assert len(loop) == 0


@given(st.integers(1, 5), st.integers(1, 5))
def test_len_under_max_epochs_is_the_number_of_batches_left(length: int, epochs: int) -> None:
    total = length * epochs
    expected = list(range(total - 1, -1, -1))
    sized = Loop([0] * length, max_epochs=epochs)
    assert len(sized) == total
    assert [len(sized) for _ in sized] == expected
    given_len = Loop(lambda: iter([0] * 9), max_epochs=epochs, dataloader_len=length)
    assert len(given_len) == total
    assert [len(given_len) for _ in given_len] == expected


def test_len_with_a_callable_is_known_once_its_epoch_has_begun() -> None:
    loop = Loop(lambda: [0] * 3, max_epochs=2)
    with pytest.raises(TypeError):
        len(loop)
    assert [len(loop) for _ in loop] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "given_", [{"max_epochs": 2}, {"max_seconds": 9}, {"max_epochs": 2, "lookahead": True}]
)
def test_len_raises_type_error_if_it_is_not_known(given_: dict[str, Any]) -> None:
    loop = Loop(lambda: iter([0, 0]), clock=ticks(), **given_)
    with pytest.raises(TypeError):
        len(loop)
    next(iter(loop))
    with pytest.raises(TypeError):
        len(loop)


def test_len_of_a_run_that_is_over_is_0() -> None:
    stopped = Loop([0] * 3, max_steps=9, stop_when=Event(at_step=1))
    assert [len(stopped) for _ in stopped] == [8, 0]
    timed = Loop(lambda: iter([0]), max_seconds=1, clock=ticks())
    list(timed)
    assert len(timed) == 0


def test_a_loop_is_always_true() -> None:
    loop = Loop([0], max_steps=1)
    assert loop
    list(loop)
    assert len(loop) == 0
    assert loop
    assert Loop(lambda: iter([0]), max_epochs=1)


# After the end, and restart


def test_an_exhausted_iterator_stays_exhausted() -> None:
    loop = Loop([0], max_steps=2)
    run = iter(loop)
    assert len(list(run)) == 2
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(run)


def test_a_finished_run_cannot_be_entered_again() -> None:
    loop = Loop([0], max_steps=2)
    list(loop)
    for _ in range(2):
        with pytest.raises(LoopError) as caught:
            iter(loop)
        assert str(caught.value) == "this run is finished; restart() begins a new one"


def test_a_run_that_was_left_at_its_last_batch_is_finished() -> None:
    loop = Loop([0], max_steps=2)
    for _, events in loop:
        if TRAINING_END in events:
            break
    with pytest.raises(LoopError, match="this run is finished"):
        iter(loop)


def test_restart_begins_a_new_run_with_the_same_arguments() -> None:
    calls: list[int] = []
    events = {
        "Steps": Event(every_n_steps=4),
        "Period": Event(every_n_seconds=3),
        "Time": Event(at_time=2),
        "Condition": Event(lambda state: calls.append(state.global_step)),
    }
    clock = ticks()
    loop = Loop([0] * 3, events, max_steps=8, stop_when=Event(at_time=7), clock=clock)

    def run() -> list[tuple[int, frozenset[Any], LoopState]]:
        return [(batch, frozenset(due), loop.state) for batch, due in loop]

    first = run()
    assert len(first) == 7
    assert loop.stop_reason == "stop_when"
    loop.restart()
    assert loop.stop_reason is None
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, -1, -1)
    assert len(loop) == 8
    assert run() == first
    assert calls == [*range(7), *range(7)]


def test_restart_in_the_middle_of_a_run_begins_with_the_first_batch() -> None:
    loop = Loop([5, 6, 7], max_epochs=1)
    old = iter(loop)
    next(old)
    loop.restart()
    with pytest.raises(LoopError):
        next(old)
    assert [batch for batch, _ in loop] == [5, 6, 7]
    with pytest.raises(LoopError):
        next(old)


def test_restart_after_an_exception_begins_a_new_run() -> None:
    failures = [OSError("once")]

    def source() -> Iterator[int]:
        yield 1
        if failures:
            raise failures.pop()
        yield 2

    loop = Loop(source, max_epochs=1)
    with pytest.raises(OSError):
        list(loop)
    loop.restart()
    assert [batch for batch, _ in loop] == [1, 2]
    assert loop.stop_reason == "max_epochs"


def test_a_validation_loop_can_be_restarted_for_every_use() -> None:
    validation = Loop([1, 2, 3], max_epochs=1)
    totals = []
    for _, events in Loop([0] * 2, max_epochs=3):
        if EPOCH_END in events:
            validation.restart()
            totals.append(sum(batch for batch, _ in validation))
    assert totals == [6, 6, 6]
