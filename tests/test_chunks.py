"""Loop.chunks (DESIGN.md 3.11) and Loop.steps_to_next_event."""

from __future__ import annotations

import _thread
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import DataLengthError, Event, Loop, LoopError, LoopEvents, LoopState, LoopWarning
from interpreter import needs_reference_counts
from manual_clock import ManualClock
from recording_loaders import Batch, RecordingBatches, RecordingLoader, SizedLoader

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
BOTH = {EPOCH_END, TRAINING_END}
HUGE = 2**62
SIZES: list[Any] = [1, 2, 3, 5, 64, HUGE, (1,), (4, 2, 1), (1, 3), (8, 1), {1, 2, 7}]


class HoldsAt:
    """A condition that holds at some steps, and records the states that it is called with."""

    def __init__(self, *steps: int) -> None:
        self.true_at = steps
        self.states: list[LoopState] = []

    def __call__(self, state: LoopState) -> bool:
        self.states.append(state)
        return state.global_step in self.true_at

    @property
    def called_at(self) -> list[int]:
        return [state.global_step for state in self.states]


def lists_of(loop: Loop[Any], sizes: Any) -> list[list[Any]]:
    return [batches for batches, _ in loop.chunks(sizes)]


def lists_and_events(loop: Loop[Any], sizes: Any) -> list[tuple[list[Any], set[Any]]]:
    return [(batches, set(events)) for batches, events in loop.chunks(sizes)]


# Sizes


@pytest.mark.parametrize(
    "sizes",
    [True, False, None, "3", "", 2.0, 1.5, {"a"}, [1, 2.0], (1, "4"), [1, True], [1, None]],
    ids=repr,
)
def test_sizes_of_the_wrong_type_are_refused_at_once(sizes: Any) -> None:
    with pytest.raises(TypeError, match="sizes") as caught:
        Loop(range(5), max_epochs=1).chunks(sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [0, -1, -HUGE, [], (), set(), [2, 4], (64, 8), [1, 0], (4, 1, -2), {2}], ids=repr
)
def test_sizes_below_1_or_without_1_are_refused_at_once(sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes") as caught:
        Loop(range(5), max_epochs=1).chunks(sizes)
    assert "\n" not in str(caught.value)


def test_refused_sizes_leave_the_older_iterator_valid() -> None:
    loop = Loop(range(3), max_epochs=1)
    iterator = iter(loop)
    next(iterator)
    with pytest.raises(ValueError, match="sizes"):
        loop.chunks(0)
    assert [batch for batch, _ in iterator] == [1, 2]


def test_a_size_may_be_anything_with_index_and_sizes_any_collection() -> None:
    class Two:
        def __index__(self) -> int:
            return 2

    expected = [[0, 1], [2, 3], [4]]
    sizes: Any
    for sizes in (2, Two(), [Two(), 1], (2, 1), (1, 2), [1, 2, 2], {1, 2}, frozenset({1, 2})):
        assert lists_of(Loop(range(5), max_epochs=1), sizes) == expected
    for sizes in (range(1, 3), dict.fromkeys([2, 1])):
        assert lists_of(Loop(range(5), max_epochs=1), sizes) == expected


def test_changing_the_sizes_afterwards_has_no_effect() -> None:
    sizes = [1, 2]
    chunks = Loop(range(6), max_epochs=1).chunks(sizes)
    sizes.append(3)
    assert next(chunks)[0] == [0, 1]
    sizes.clear()
    assert [batches for batches, _ in chunks] == [[2, 3], [4, 5]]


# Lists


def test_a_list_ends_at_an_event() -> None:
    loop = Loop(range(7), {"Log": Event(every_n_steps=4)}, max_epochs=2)
    assert lists_and_events(loop, 3) == [
        *(([0, 1, 2], set()), ([3], {"Log"}), ([4, 5, 6], {EPOCH_END})),
        *(([0], {"Log"}), ([1, 2, 3], set()), ([4], {"Log"}), ([5, 6], BOTH)),
    ]


def test_a_list_has_the_largest_of_the_sizes_that_fits() -> None:
    loop = Loop(range(30), {"Log": Event(every_n_steps=15)}, max_epochs=1)
    found = lists_and_events(loop, (8, 2, 1))
    assert [len(batches) for batches, _ in found] == [8, 2, 2, 2, 1] * 2
    assert [batch for batches, _ in found for batch in batches] == list(range(30))
    assert [events for _, events in found if events] == [{"Log"}, {"Log", *BOTH}]


@pytest.mark.parametrize("lookahead", [None, True])
def test_lookahead_finds_the_end_of_an_epoch_of_unknown_length(lookahead: bool | None) -> None:
    loader = RecordingLoader(range(7), range(2))
    loop = Loop(loader, max_epochs=2, lookahead=lookahead)
    assert lists_and_events(loop, (4, 2, 1)) == [
        *(([0, 1, 2, 3], set()), ([4, 5], set()), ([6], {EPOCH_END})),
        ([0, 1], BOTH),
    ]


def test_max_steps_ends_the_list_and_no_batch_beyond_it_is_fetched() -> None:
    stream = RecordingBatches(range(9), [])
    assert lists_and_events(Loop(stream, max_steps=5), 64) == [(list(range(5)), {TRAINING_END})]
    assert next(stream) == 5


def test_an_unexpected_end_of_an_epoch_ends_the_list_without_an_event() -> None:
    loop = Loop(RecordingLoader(range(3)), max_steps=5, lookahead=False)
    assert lists_and_events(loop, 64) == [([0, 1, 2], set()), ([0, 1], {TRAINING_END})]


def test_lists_end_at_the_promised_length() -> None:
    loop = Loop(SizedLoader(range(5), promise=3), max_epochs=1)
    with pytest.warns(LoopWarning, match="had more than the 3 batches"):
        assert lists_and_events(loop, 64) == [([0, 1, 2], BOTH)]


def test_lists_of_a_stream_end_at_dataloader_len() -> None:
    loop = Loop(RecordingBatches(range(99), []), max_epochs=2, dataloader_len=3)
    assert lists_and_events(loop, 2) == [
        *(([0, 1], set()), ([2], {EPOCH_END})),
        *(([3, 4], set()), ([5], BOTH)),
    ]


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 9}])
@pytest.mark.parametrize(
    ("sizes", "lengths"), [(HUGE, [9]), ((HUGE, 1), [1] * 9), ((1, HUGE, 8), [8, 1])], ids=repr
)
def test_a_huge_size_is_only_an_upper_bound(sizes: Any, lengths: list[int], limit: Any) -> None:
    def generator() -> Iterator[int]:
        yield from range(9)

    for source in (range(9), RecordingLoader(range(9)), generator, generator()):
        found = lists_of(Loop(source, **limit), sizes)
        assert [len(batches) for batches in found] == lengths
        assert [batch for batches in found for batch in batches] == list(range(9))


def test_each_list_is_a_new_list_that_the_user_may_change() -> None:
    kept = []
    for batches, _ in Loop(range(9), max_epochs=1).chunks((4, 1)):
        assert type(batches) is list
        kept.append(batches[:])
        batches.clear()
    assert kept == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    pairs = list(Loop(range(3), {"A": Event(at_step=1)}, max_epochs=1).chunks(2))
    assert pairs == [([0, 1], {"A"}), ([2], BOTH)]


def test_the_events_of_a_list_have_the_type_of_those_of_single_steps() -> None:
    def loop() -> Loop[int]:
        return Loop(range(6), {"Log": Event(every_n_steps=2)}, max_epochs=1)

    single = {type(events) for _, events in loop()}
    assert {type(events) for _, events in loop().chunks(2)} <= single
    with pytest.warns(LoopWarning, match="Log"):
        assert [events for _, events in loop().chunks(2) if "Lok" in events] == []


def test_nothing_is_iterated_before_the_first_request() -> None:
    loader = RecordingLoader(range(3))
    chunks = Loop(loader, max_epochs=1).chunks(2)
    assert loader.requests == []
    assert iter(chunks) is chunks
    next(chunks)
    assert loader.requests == ["next 0", "next 1", "next 2"]


def test_state_and_counters_are_those_of_the_lists_last_step() -> None:
    loop = Loop(range(5), max_epochs=2)
    places = [
        (loop.epoch, loop.global_step, loop.epoch_step, loop.state.epoch_end)
        for _ in loop.chunks((3, 1))
    ]
    assert places == [
        *((0, 2, 2, False), (0, 3, 3, False), (0, 4, 4, True)),
        *((1, 7, 2, False), (1, 8, 3, False), (1, 9, 4, True)),
    ]
    assert loop.state.training_end
    assert loop.state.steps_done == 10


def test_len_counts_the_batches_still_to_come_in_lists() -> None:
    loop = Loop(range(10), {"C": Event(HoldsAt(2))}, max_epochs=1)
    # a condition holds at the third batch: the list of two comes first, the third is queued
    left = [(len(batches), len(loop)) for batches, _ in loop.chunks((4, 2, 1))]
    assert left == [(2, 8), (1, 7), (4, 3), (2, 1), (1, 0)]


# The same events as in single steps


@dataclass(frozen=True)
class Run:
    """A random run without time criteria."""

    lengths: list[int]
    promise: int | None
    limit: dict[str, Any]
    steps: dict[str, Any]
    epochs: dict[str, Any]
    rests: list[int]
    period: int
    stop_when: dict[str, Any] | None

    def loop(self) -> tuple[Loop[Any], list[tuple[int, ...]]]:
        """A loop, and the (epoch, global_step, epoch_step) of each call of its condition."""
        calls: list[tuple[int, ...]] = []

        def condition(state: LoopState) -> bool:
            calls.append((state.epoch, state.global_step, state.epoch_step))
            return state.global_step % self.period in self.rests

        start = 0
        epochs = []
        for length in self.lengths:
            epochs.append(range(start, start + length))
            start += length
        loader = (
            RecordingLoader(*epochs)
            if self.promise is None
            else SizedLoader(*epochs, promise=self.promise)
        )
        loop: Loop[Any] = Loop(
            loader,
            {
                "Steps": Event(**self.steps),
                "Epochs": Event(**self.epochs) | LoopEvents.TRAINING_END,
                "Condition": Event(condition, from_step=2),
            },
            stop_when=None if self.stop_when is None else Event(**self.stop_when),
            **self.limit,
        )
        return loop, calls


@st.composite
def step_criteria(draw: Any, first: int = 0) -> dict[str, Any]:
    start = draw(st.integers(0, 9))
    windows: list[dict[str, Any]] = [
        {},
        {"from_step": start},
        {"from_step": start, "until_step": start + draw(st.integers(1, 9))},
    ]
    criterion = draw(
        st.sampled_from(
            [
                {"every_n_steps": draw(st.integers(first + 1, 12))},
                {"at_step": draw(st.sets(st.integers(first, 20), min_size=1, max_size=4))},
            ]
        )
    )
    per_epoch = {"per_epoch": draw(st.booleans())}
    return {**criterion, **per_epoch, **draw(st.sampled_from(windows))}


@st.composite
def runs(draw: Any) -> Run:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    right = len(set(lengths)) == 1
    return Run(
        lengths=lengths,
        promise=draw(st.sampled_from([None, lengths[0]])) if right else None,
        limit=draw(
            st.sampled_from(
                [{"max_epochs": draw(st.integers(1, 4))}, {"max_steps": draw(st.integers(1, 40))}]
            )
        ),
        steps=draw(step_criteria()),
        epochs=draw(st.sampled_from([{"every_n_epochs": 2}, {"at_epoch": {0, 2}}])),
        rests=draw(st.lists(st.integers(0, 8), max_size=2)),
        period=draw(st.integers(1, 9)),
        stop_when=draw(st.none() | step_criteria(first=5)),
    )


def states(loop: Loop[Any]) -> tuple[object, ...]:
    state = loop.state
    return (
        *(state.epoch, state.global_step, state.epoch_step, state.epoch_end, state.training_end),
        *(loop.epoch, loop.global_step, loop.epoch_step, loop.stop_reason),
    )


@given(
    run=runs(),
    entries=st.lists(
        st.tuples(st.none() | st.sampled_from(SIZES), st.integers(1, 5)), min_size=1, max_size=4
    ),
)
def test_every_event_fires_at_the_step_at_which_it_fires_in_single_steps(
    run: Run, entries: list[tuple[Any, int]]
) -> None:
    loop, calls = run.loop()
    single = [(batch, set(events), states(loop)) for batch, events in loop]

    chunked, chunked_calls = run.loop()
    done = 0
    for sizes, count in cycle(entries):
        if chunked.stop_reason is not None:
            break
        before = done
        entered = iter(chunked) if sizes is None else chunked.chunks(sizes)
        for handed_over, events in islice(entered, count):
            batches = [handed_over] if sizes is None else handed_over
            if isinstance(sizes, int):
                assert 1 <= len(batches) <= sizes
            elif sizes is not None:
                assert len(batches) in sizes
            steps = single[done : done + len(batches)]
            done += len(batches)
            assert batches == [batch for batch, _, _ in steps]
            assert [due for _, due, _ in steps[:-1]] == [set()] * (len(steps) - 1)
            assert (set(events), states(chunked)) == steps[-1][1:]
        assert done > before
    assert done == len(single)
    assert chunked_calls == calls
    assert chunked.stop_reason == loop.stop_reason


@given(run=runs(), n=st.integers(1, 20))
def test_a_list_is_no_longer_than_steps_to_next_event(run: Run, n: int) -> None:
    loop, _ = replace(run, rests=[]).loop()
    coming = loop.steps_to_next_event()
    for batches, _ in loop.chunks(n):
        if run.promise is not None:
            assert len(batches) == min(n, coming or 0)
        elif coming is not None:  # without a length, an epoch may end before
            assert len(batches) <= min(n, coming)
        coming = loop.steps_to_next_event()
    assert coming is None


# Switching between lists and single steps


def test_lists_and_single_steps_continue_the_same_run() -> None:
    loop = Loop(range(8), max_epochs=1)
    assert next(iter(loop))[0] == 0
    assert next(loop.chunks(3))[0] == [1, 2, 3]
    assert next(iter(loop))[0] == 4
    assert lists_and_events(loop, 64) == [([5, 6, 7], BOTH)]


@pytest.mark.parametrize("old", [None, 2])
@pytest.mark.parametrize("new", [None, 2])
def test_entering_again_replaces_the_older_iterator(old: Any, new: Any) -> None:
    loop = Loop(range(9), max_epochs=1)
    older = iter(loop) if old is None else loop.chunks(old)
    next(older)
    newer = iter(loop) if new is None else loop.chunks(new)
    with pytest.raises(LoopError, match="replaced"):
        next(older)
    next(newer)
    with pytest.raises(LoopError, match="replaced"):
        next(older)


def test_queued_batches_come_in_the_next_lists_or_single_steps() -> None:
    def begin() -> Loop[int]:
        """Seven batches are gathered, and a list of four handed over: three are queued."""
        loop = Loop(range(9), {"C": Event(HoldsAt(6))}, max_epochs=1)
        assert next(loop.chunks((8, 4, 1)))[0] == [0, 1, 2, 3]
        return loop

    assert [(batch, set(events)) for batch, events in begin()] == [
        *((4, set()), (5, set()), (6, {"C"}), (7, set()), (8, BOTH)),
    ]
    assert lists_and_events(begin(), 2) == [([4, 5], set()), ([6], {"C"}), ([7, 8], BOTH)]
    assert lists_and_events(begin(), 64) == [([4, 5, 6], {"C"}), ([7, 8], BOTH)]
    loop = begin()
    loop.restart()
    assert lists_of(loop, 64)[0] == list(range(7))


def finished() -> Loop[Any]:
    loop = Loop(range(3), max_epochs=1)
    lists_of(loop, 2)
    return loop


def failed() -> Loop[Any]:
    loop = Loop(RecordingLoader([OSError("disk")]), max_epochs=1)
    with pytest.raises(OSError):
        lists_of(loop, 2)
    return loop


def closed() -> Loop[Any]:
    with Loop(range(3), max_epochs=1) as loop:
        next(loop.chunks(2))
    return loop


@pytest.mark.parametrize("end", [finished, failed, closed])
def test_chunks_of_a_run_that_is_over_raises_as_iter_does(end: Callable[[], Loop[Any]]) -> None:
    loop = end()
    with pytest.raises(LoopError) as plain:
        iter(loop)
    with pytest.raises(LoopError) as listed:
        loop.chunks(2)
    assert str(listed.value) == str(plain.value)
    assert loop.steps_to_next_event() is None
    loop.restart()
    assert loop.chunks(2) is not None


def test_an_exhausted_iterator_stays_exhausted() -> None:
    chunks = Loop(range(3), max_epochs=1).chunks(2)
    assert len(list(chunks)) == 2
    assert list(chunks) == list(chunks) == []


def test_leaving_the_with_closes_the_source_while_a_batch_is_queued() -> None:
    ended: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            ended.append("closed")

    with Loop(source, {"C": Event(HoldsAt(2))}, max_epochs=1) as loop:
        chunks = loop.chunks((8, 2, 1))
        assert next(chunks)[0] == [0, 1]
        assert ended == []
    assert ended == ["closed"]
    with pytest.raises(LoopError, match="closed"):
        next(chunks)


# Conditions


@pytest.mark.parametrize("sizes", SIZES, ids=repr)
@pytest.mark.parametrize("lookahead", [None, True])
def test_conditions_are_called_once_for_every_batch_in_order(
    sizes: Any, lookahead: bool | None
) -> None:
    condition, other = HoldsAt(4, 5, 9), HoldsAt(5)
    events = {"A": Event(condition), "B": Event(other), "S": Event(every_n_steps=6)}
    loop = Loop(range(9), events, max_epochs=2, lookahead=lookahead)
    fired = [(loop.global_step, set(names)) for _, names in loop.chunks(sizes) if names]
    assert condition.called_at == other.called_at == list(range(18))
    assert fired == [
        *((4, {"A"}), (5, {"A", "B", "S"}), (8, {EPOCH_END}), (9, {"A"}), (11, {"S"})),
        (17, {"S", *BOTH}),
    ]


def test_a_condition_that_holds_ends_the_list() -> None:
    def loop() -> Loop[int]:
        return Loop(range(7), {"C": Event(HoldsAt(3))}, max_epochs=1)

    assert lists_and_events(loop(), 64) == [([0, 1, 2, 3], {"C"}), ([4, 5, 6], BOTH)]
    assert lists_and_events(loop(), (3, 1)) == [([0, 1, 2], set()), ([3], {"C"}), ([4, 5, 6], BOTH)]
    # queued batches are divided in the same way
    assert lists_and_events(loop(), (64, 2, 1)) == [
        *(([0, 1], set()), ([2, 3], {"C"})),
        *(([4, 5], set()), ([6], BOTH)),
    ]


def test_a_condition_is_not_called_outside_of_its_window() -> None:
    condition = HoldsAt()
    events = {"C": Event(condition, from_step=2, until_step=5)}
    lists_of(Loop(range(9), events, max_epochs=1), 64)
    assert condition.called_at == [2, 3, 4]


def test_a_condition_sees_its_own_step_and_the_loop_before_the_list() -> None:
    seen: list[tuple[int, ...]] = []

    def look(state: LoopState) -> None:
        seen.append((state.epoch, state.global_step, state.epoch_step, loop.global_step))

    loop = Loop(range(3), {"Look": Event(look)}, max_epochs=2)
    for _ in loop.chunks(64):
        pass
    assert seen == [
        *((0, 0, 0, -1), (0, 1, 1, -1), (0, 2, 2, -1)),
        *((1, 3, 0, 2), (1, 4, 1, 2), (1, 5, 2, 2)),
    ]


def test_only_the_condition_of_the_last_step_sees_that_the_epoch_ends() -> None:
    for loader in (range(3), RecordingLoader(range(3))):
        condition = HoldsAt()
        lists_of(Loop(loader, {"C": Event(condition)}, max_epochs=1), 64)
        flags = [(state.epoch_end, state.training_end) for state in condition.states]
        assert flags == [(False, False), (False, False), (True, True)]


def test_stop_when_ends_list_and_run_and_later_conditions_see_training_end() -> None:
    condition = HoldsAt()
    loop = Loop(range(9), {"C": Event(condition)}, max_epochs=1, stop_when=Event(HoldsAt(3)))
    assert lists_and_events(loop, 64) == [([0, 1, 2, 3], {TRAINING_END})]
    assert [state.training_end for state in condition.states] == [False, False, False, True]
    assert loop.stop_reason == "stop_when"


def test_a_stop_when_that_holds_at_a_queued_batch_ends_the_run_there() -> None:
    loop = Loop(range(9), max_epochs=1, stop_when=Event(HoldsAt(3)))
    reasons = [(batches, loop.stop_reason) for batches, _ in loop.chunks((8, 3, 1))]
    assert reasons == [([0, 1, 2], None), ([3], "stop_when")]


def test_an_error_of_a_condition_is_raised_after_the_batches_before_it() -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 3:
            raise OSError("disk")
        return False

    loop = Loop(range(9), {"Fail": Event(fail)}, max_epochs=1)
    found: list[Any] = []
    with pytest.raises(OSError, match="disk") as caught:
        for batches, events in loop.chunks((8, 2, 1)):
            found.append((batches, set(events), loop.stop_reason))
    assert found == [([0, 1], set(), None), ([2], set(), None)]
    assert "'Fail'" in str(getattr(caught.value, "__notes__", ""))
    assert (loop.stop_reason, loop.global_step) == ("exception", 2)
    with pytest.raises(LoopError):
        loop.chunks(2)


@pytest.mark.parametrize("sizes", [1, 2, 3, 4, 5, (2, 1), (4, 2, 1), (4, 3, 1), (8, 1)], ids=repr)
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("promise", [None, 4])
@pytest.mark.parametrize("by", ["event", "stop_when"])
def test_the_same_batches_precede_an_error_of_a_condition_with_every_size(
    sizes: Any, at: int, promise: int | None, by: str
) -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == at:
            raise OSError("disk")
        return False

    loader = (
        RecordingLoader(range(4)) if promise is None else SizedLoader(range(4), promise=promise)
    )
    events = {"Fail": Event(fail), "Due": Event(at_step=at), "Before": Event(at_step=5)}
    stop_when = Event(fail) if by == "stop_when" else None
    loop: Loop[Any] = Loop(loader, events, max_epochs=2, stop_when=stop_when)
    found: list[int] = []
    due: dict[int, set[Any]] = {}
    with pytest.raises(OSError, match="disk"):
        for batches, names in loop.chunks(sizes):
            assert loop.stop_reason is None
            if not isinstance(sizes, int):
                assert len(batches) in sizes
            found += batches
            if names:
                due[loop.global_step] = set(names)
    assert found == [*range(4), *range(4)][:at]
    assert due == {step: names for step, names in ((3, {EPOCH_END}), (5, {"Before"})) if step < at}
    assert (loop.stop_reason, loop.global_step) == ("exception", at - 1)


def test_timers_are_checked_once_for_a_list_that_an_error_has_shortened() -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 3:
            raise OSError("disk")
        return False

    clock = ManualClock()
    events = {"T": Event(every_n_seconds=4), "Fail": Event(fail), "Due": Event(at_step=3)}
    loop = timed(clock, events, max_epochs=1)
    chunks = loop.chunks(4)
    # four batches were fetched when the clock was read, and three of them are handed over
    assert next(chunks) == ([0, 1, 2], {"T"})
    assert loop.state.elapsed == 4.0
    assert clock.readings == 2
    with pytest.raises(OSError, match="disk"):
        next(chunks)


def test_max_seconds_ends_the_run_at_a_list_that_an_error_has_shortened() -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 3:
            raise OSError("disk")
        return False

    loop = timed(ManualClock(), {"Fail": Event(fail)}, max_seconds=4)
    assert lists_and_events(loop, 4) == [([0, 1, 2], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [None, 3, 64, (4, 2, 1)], ids=repr)
def test_after_an_exception_of_a_signal_handler_each_batch_had_its_conditions_called(
    at: int, sizes: Any
) -> None:
    def handle(*_: object) -> None:
        raise ConnectionError("preempted")

    # interrupt_main() simulates a signal in C code: the handler runs a little later
    numbers = chain(range(at), map(_thread.interrupt_main, [signal.SIGTERM]), range(at + 1, 9))
    condition = HoldsAt()
    loop = Loop(numbers, {"C": Event(condition)}, max_steps=9)
    found: list[Any] = []
    former = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(ConnectionError, match="preempted"):
            for batch, _ in loop if sizes is None else loop.chunks(sizes):
                found += [batch] if sizes is None else batch
    finally:
        signal.signal(signal.SIGTERM, former)
    assert condition.called_at[: len(found)] == list(range(len(found)))
    assert len(found) <= len(condition.called_at) + 1


# Errors and interrupts


@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(64, [[0, 1, 2]]), (2, [[0, 1], [2]]), ((8, 2, 1), [[0, 1], [2]]), ((8, 1), [[0], [1], [2]])],
    ids=repr,
)
def test_an_error_of_the_source_is_raised_after_the_batches_before_it(
    lookahead: bool | None, sizes: Any, expected: list[list[int]]
) -> None:
    wrong = OSError("disk")
    loader = SizedLoader([0, 1, 2, wrong, 4], promise=5)
    loop = Loop(loader, max_epochs=1, lookahead=lookahead)
    chunks = loop.chunks(sizes)
    for batches in expected:
        assert next(chunks) == (batches, set())
        assert loop.stop_reason is None
    with pytest.raises(OSError) as caught:
        next(chunks)
    assert caught.value is wrong
    assert (loop.stop_reason, loop.global_step) == ("exception", 2)
    with pytest.raises(LoopError) as after:
        next(chunks)
    assert after.value.__cause__ is wrong
    assert len(loader.requests) == 4


def test_single_steps_after_a_list_get_the_queued_batch_before_the_error() -> None:
    loop = Loop(SizedLoader([0, 1, 2, OSError("disk")], promise=9), max_epochs=1)
    assert next(loop.chunks((8, 2, 1)))[0] == [0, 1]
    batches: list[int] = []
    with pytest.raises(OSError, match="disk"):
        for batch, _ in loop:
            batches.append(batch)
    assert batches == [2]


def test_data_length_error_is_raised_after_the_batches_before_it() -> None:
    chunks = Loop(SizedLoader(range(3), promise=5), max_epochs=1).chunks(64)
    assert next(chunks) == ([0, 1, 2], set())
    with pytest.raises(DataLengthError, match="after 3 of the 5"):
        next(chunks)


def test_an_exhausted_stream_warns_after_its_last_list() -> None:
    loop = Loop(RecordingBatches(range(5), []), max_steps=9)
    with pytest.warns(LoopWarning, match="dry at global_step 4"):
        assert lists_and_events(loop, 3) == [([0, 1, 2], set()), ([3, 4], set())]
    assert loop.stop_reason == "exhausted"


@pytest.mark.parametrize("at", [0, 2, 3, 5])
@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize("again", [None, 2, 64, (3, 1)], ids=repr)
def test_an_interrupted_fetch_loses_neither_batch_nor_event(
    at: int, lookahead: bool | None, again: Any
) -> None:
    batches: list[Any] = [*range(6)]
    batches.insert(at, KeyboardInterrupt())
    condition = HoldsAt()
    events = {"S": Event(at_step=4), "C": Event(condition)}
    loop = Loop(SizedLoader(batches, promise=6), events, max_epochs=1, lookahead=lookahead)
    found: list[int] = []
    due: dict[int, set[Any]] = {}

    def run(sizes: Any) -> None:
        for handed_over, names in iter(loop) if sizes is None else loop.chunks(sizes):
            found.extend([handed_over] if sizes is None else handed_over)
            assert loop.global_step == loop.state.global_step == found[-1]
            if names:
                due[loop.global_step] = set(names)

    with pytest.raises(KeyboardInterrupt):
        run(4)
    assert loop.stop_reason is None
    assert loop.global_step == len(found) - 1
    run(again)
    assert found == list(range(6))
    assert due == {4: {"S"}, 5: BOTH}
    assert condition.called_at == list(range(6))


def test_the_same_iterator_continues_after_an_interrupted_fetch() -> None:
    chunks = Loop(RecordingLoader([0, 1, KeyboardInterrupt(), 2, 3]), max_epochs=1).chunks(3)
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert [batches for batches, _ in chunks] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("interrupted_at", range(6))
@pytest.mark.parametrize("again", [None, 2, 64, (3, 1)], ids=repr)
def test_an_interrupted_condition_is_called_again_for_its_own_batch_only(
    interrupted_at: int, again: Any
) -> None:
    calls: list[int] = []

    def condition(state: LoopState) -> bool:
        calls.append(state.global_step)
        if calls.count(interrupted_at) == 1 and state.global_step == interrupted_at:
            raise KeyboardInterrupt
        return state.global_step == 4

    loop = Loop(range(6), {"C": Event(condition)}, max_epochs=1)
    found: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for batches, _ in loop.chunks(4):
            found += batches
    assert loop.stop_reason is None
    assert loop.global_step == len(found) - 1
    for handed_over, _ in iter(loop) if again is None else loop.chunks(again):
        found.extend([handed_over] if again is None else handed_over)
    assert found == list(range(6))
    assert calls == sorted([*range(6), interrupted_at])


@pytest.mark.parametrize("interrupted_at", [1, 2, 3])
def test_an_interrupted_clock_loses_no_batch(interrupted_at: int) -> None:
    clock = ManualClock()

    def read() -> int:
        if clock() == 0 and clock.readings == interrupted_at:
            raise KeyboardInterrupt
        return 0

    loop = Loop(range(6), {"Rare": Event(every_n_seconds=9)}, max_epochs=1, clock=read)
    found: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for batches, _ in loop.chunks(4):
            found += batches
    for batches, _ in loop.chunks(4):
        found += batches
    assert found == list(range(6))


def test_a_clock_that_fails_ends_the_run() -> None:
    def readings() -> Iterator[int]:
        yield from (0, 1)
        raise OSError("no time")

    events = {"T": Event(every_n_seconds=5)}
    loop = Loop(range(9), events, max_epochs=1, clock=readings().__next__)
    chunks = loop.chunks(3)
    assert next(chunks)[0] == [0, 1, 2]
    with pytest.raises(OSError, match="no time"):
        next(chunks)
    assert (loop.stop_reason, loop.global_step) == ("exception", 2)


def test_an_error_of_the_body_does_not_end_the_run() -> None:
    loop = Loop(range(5), max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        for _ in loop.chunks(2):
            raise ZeroDivisionError
    assert lists_of(loop, 2) == [[2, 3], [4]]


# Time


def timed(clock: ManualClock, events: Any, **limit: Any) -> Loop[Any]:
    """A loop over ten batches; fetching one takes a second."""
    return Loop(
        lambda: clock.one_second_each(range(10)), events, clock=clock, dataloader_len=10, **limit
    )


def test_the_clock_is_read_once_for_every_list() -> None:
    clock = ManualClock()
    loop = timed(clock, {"T": Event(every_n_seconds=4)}, max_epochs=1)
    found = [
        (batches[-1], loop.state.elapsed, "T" in events, clock.readings)
        for batches, events in loop.chunks(3)
    ]
    # the first reading is the start
    assert found == [(2, 3.0, False, 2), (5, 6.0, True, 3), (8, 9.0, False, 4), (9, 10.0, True, 5)]


def test_without_time_criteria_the_clock_is_read_only_when_elapsed_is() -> None:
    clock = ManualClock()
    loop = timed(clock, {"S": Event(every_n_steps=4)}, max_epochs=1)
    for _ in loop.chunks(3):
        assert clock.readings == 1
    assert loop.state.elapsed == loop.state.elapsed == 10.0
    assert clock.readings == 2


def test_timers_are_checked_at_a_lists_last_step_and_missed_periods_are_skipped() -> None:
    def due(event: Event, sizes: Any) -> list[int]:
        loop = timed(ManualClock(), {"T": event}, max_epochs=1)
        return [loop.global_step for _, events in loop.chunks(sizes) if "T" in events]

    assert due(Event(every_n_seconds=1), 4) == [3, 7, 9]
    assert due(Event(at_time=[1, 2, 6]), 4) == [3, 7]
    assert due(Event(every_n_seconds=4), (3, 1)) == [5, 9]
    # and so are the windows of timers
    assert due(Event(every_n_seconds=1, until_step=4), 4) == [3]
    assert due(Event(every_n_seconds=1, until_step=3), 4) == []
    assert due(Event(every_n_seconds=1, from_step=5, until_step=9), 4) == [7]


def test_max_seconds_ends_training_with_the_list_that_reaches_it() -> None:
    clock = ManualClock()
    loop = timed(clock, {}, max_seconds=5)
    assert lists_and_events(loop, 4) == [([0, 1, 2, 3], set()), ([4, 5, 6, 7], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


@pytest.mark.parametrize("by", ["max_seconds", "stop_when"])
def test_queued_batches_are_dropped_when_time_ends_the_run(by: str) -> None:
    clock = ManualClock()
    condition = HoldsAt(2)
    events = {"C": Event(condition), "End": Event(at_step=99) | TRAINING_END}
    if by == "max_seconds":
        loop = timed(clock, events, max_seconds=3)
    else:
        loop = timed(clock, events, max_epochs=1, stop_when=Event(at_time=3))
    # three batches are gathered and two of them handed over, after three seconds
    assert lists_and_events(loop, (8, 2, 1)) == [([0, 1], {"End", TRAINING_END})]
    assert (loop.stop_reason, loop.global_step) == (by, 1)
    assert loop.state.training_end
    assert condition.called_at == [0, 1, 2]
    with pytest.raises(LoopError, match="finished"):
        loop.chunks(2)


def test_an_error_of_a_later_batch_is_not_raised_when_time_ends_the_run() -> None:
    clock = ManualClock()

    def source() -> Iterator[int]:
        yield from clock.one_second_each(range(3))
        raise OSError("disk")

    loop = Loop(source, max_seconds=3, clock=clock, lookahead=False)
    assert lists_and_events(loop, 64) == [([0, 1, 2], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


def test_a_condition_that_reads_elapsed_reads_the_clock_at_its_own_batch() -> None:
    clock = ManualClock()
    seen: list[float] = []

    def look(state: LoopState) -> None:
        seen.append(state.elapsed)
        seen.append(state.elapsed)

    lists_of(timed(clock, {"Look": Event(look)}, max_epochs=1), 5)
    assert seen == [float(second) for second in range(1, 11) for _ in range(2)]
    assert clock.readings == 11


# References to batches and lists


def nine_batches() -> Iterator[Batch]:
    for _ in range(9):
        yield Batch()


class SizedBatches:
    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Batch]:
        return nine_batches()


@needs_reference_counts
@pytest.mark.parametrize("sizes", [1, 2, 4, 64, (4, 2, 1), (8, 1)], ids=repr)
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("source", [SizedBatches, nine_batches], ids=["sized", "unsized"])
def test_the_batches_of_a_list_are_freed_when_the_body_deletes_it(
    sizes: Any, lookahead: bool | None, source: Callable[[], Any]
) -> None:
    events = {"C": Event(HoldsAt(2, 5)), "S": Event(every_n_steps=4)}
    count = 0
    loader = source() if source is SizedBatches else source
    for batches, _ in Loop(loader, events, max_epochs=1, lookahead=lookahead).chunks(sizes):
        references = [weakref.ref(batch) for batch in batches]
        del batches
        assert [reference() for reference in references] == [None] * len(references)
        count += len(references)
    assert count == 9


@needs_reference_counts
def test_the_body_has_the_only_reference_to_its_list() -> None:
    for batches, _ in Loop(range(9), max_epochs=1).chunks(4):
        local_list: list[int] = []
        assert sys.getrefcount(batches) == sys.getrefcount(local_list)


@needs_reference_counts
def test_queued_batches_are_freed_when_time_ends_the_run() -> None:
    clock = ManualClock()
    references: list[weakref.ref[Batch]] = []

    def make_batch() -> Batch:
        batch = Batch()
        references.append(weakref.ref(batch))
        return batch

    def source() -> Iterator[Batch]:
        for _ in clock.one_second_each(range(9)):
            yield make_batch()

    loop = Loop(source, {"C": Event(HoldsAt(2))}, max_seconds=3, clock=clock, lookahead=False)
    assert [len(batches) for batches, _ in loop.chunks((8, 2, 1))] == [2]
    assert [reference() for reference in references] == [None] * 3


# Steps to the next event


def steps_to_next_event(events: Any = None, loader: Any = range(10), **limit: Any) -> int | None:
    return Loop(loader, events, **(limit or {"max_epochs": 9})).steps_to_next_event()


def test_before_the_first_batch_the_first_step_is_counted() -> None:
    assert steps_to_next_event({"A": Event(every_n_steps=3)}) == 3
    assert steps_to_next_event({"A": Event(at_step=[4, 7])}) == 5
    assert steps_to_next_event({"A": Event(at_step=0)}) == 1
    assert steps_to_next_event() == 10
    assert steps_to_next_event({"A": Event(every_n_steps=12)}) == 10
    assert steps_to_next_event({"A": Event(every_n_steps=3), "B": Event(at_step=1)}) == 2
    assert steps_to_next_event({"A": Event(at_step=5) | Event(every_n_steps=4)}) == 4


def test_limits_and_stop_when_count_if_their_step_is_known() -> None:
    assert steps_to_next_event(max_steps=4) == 4
    assert steps_to_next_event({"A": Event(at_step=7)}, max_steps=4) == 4
    assert steps_to_next_event(max_seconds=4) == 10
    assert steps_to_next_event(max_epochs=1, stop_when=Event(at_step=2)) == 3
    assert steps_to_next_event(loader=lambda: iter([0]), max_steps=HUGE) == HUGE


def test_windows_are_respected() -> None:
    assert steps_to_next_event({"A": Event(every_n_steps=2, from_step=5)}) == 6
    assert steps_to_next_event({"A": Event(every_n_steps=2, from_step=6)}) == 8
    assert steps_to_next_event({"A": Event(every_n_steps=4, until_step=3)}) == 10
    assert steps_to_next_event({"A": Event(at_step=[1, 6], from_step=2)}) == 7


@pytest.mark.parametrize(
    "event",
    [
        Event(every_n_seconds=1),
        Event(at_time=0),
        Event(lambda state: True),
        Event(every_n_epochs=1),
        Event(at_epoch=0),
        Event(every_n_steps=4, until_step=3),
    ],
    ids=["every_n_seconds", "at_time", "condition", "every_n_epochs", "at_epoch", "window"],
)
def test_the_result_is_none_if_no_step_is_scheduled(event: Event) -> None:
    loop = Loop(RecordingLoader(range(3)), {"A": event}, max_epochs=2)
    assert loop.steps_to_next_event() is None
    assert [loop.steps_to_next_event() for _ in loop] == [None] * 6


def test_the_end_of_each_epoch_of_known_length_counts() -> None:
    loop = Loop(range(3), max_epochs=2)
    assert [loop.steps_to_next_event() for _ in loop] == [2, 1, 3, 2, 1, None]
    given_len = Loop(RecordingLoader(range(9)), max_epochs=2, dataloader_len=3)
    assert given_len.steps_to_next_event() == 3
    assert [given_len.steps_to_next_event() for _ in given_len] == [2, 1, 3, 2, 1, None]
    ignored = Loop(range(3), max_epochs=1, lookahead=True)
    assert [ignored.steps_to_next_event() for _ in ignored] == [None] * 3


def test_a_length_that_is_too_short_counts_as_promised() -> None:
    loop = Loop(SizedLoader(range(4), promise=2), max_epochs=2)
    with pytest.warns(LoopWarning, match="had more than the 2 batches"):
        found = [loop.steps_to_next_event() for _ in loop]
    assert found == [1, 2, 1, None]


def test_after_an_interrupted_fetch_the_length_of_its_epoch_counts() -> None:
    loop = Loop(SizedLoader([0, 1, KeyboardInterrupt(), 2, 3, 4], promise=5), max_epochs=1)
    chunks = loop.chunks((4, 1))
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert loop.steps_to_next_event() == 5
    assert lists_and_events(loop, (4, 1)) == [([0, 1, 2, 3], set()), ([4], BOTH)]


def test_the_length_of_a_callables_epoch_is_known_once_it_is_open() -> None:
    loop = Loop(lambda: [0, 0, 0], max_epochs=2)
    assert loop.steps_to_next_event() is None
    assert [loop.steps_to_next_event() for _ in loop] == [2, 1, 3, 2, 1, None]


def test_per_epoch_criteria_count_within_the_epoch() -> None:
    events = {"A": Event(every_n_steps=3, per_epoch=True)}
    sized = Loop(range(4), events, max_epochs=2)
    assert sized.steps_to_next_event() == 3
    assert [sized.steps_to_next_event() for _ in sized] == [2, 1, 1, 3, 2, 1, 1, None]
    # an epoch of unknown length is taken to go on
    unsized = Loop(RecordingLoader(range(4)), events, max_epochs=2)
    assert unsized.steps_to_next_event() == 3
    assert [unsized.steps_to_next_event() for _ in unsized] == [2, 1, 3, 3, 2, 1, 3, None]
    late = {"A": Event(at_step=1, per_epoch=True, from_step=3)}
    windowed = Loop(range(4), late, max_epochs=2)
    assert [windowed.steps_to_next_event() for _ in windowed] == [3, 2, 1, 2, 1, 2, 1, None]


def test_steps_are_counted_from_the_lists_last_step_not_from_queued_ones() -> None:
    events = {"S": Event(at_step=8), "C": Event(HoldsAt(2))}
    loop = Loop(range(10), events, max_epochs=1)
    found = [(len(batches), loop.steps_to_next_event()) for batches, _ in loop.chunks((8, 2, 1))]
    assert found == [(2, 7), (1, 6), (2, 4), (2, 2), (2, 1), (1, None)]


def test_there_is_no_next_event_after_the_end() -> None:
    loop = Loop(range(3), max_epochs=1)
    list(loop)
    assert loop.steps_to_next_event() is None
    loop.restart()
    assert loop.steps_to_next_event() == 3


def test_steps_to_next_event_uses_neither_source_nor_clock() -> None:
    loader, clock = SizedLoader(range(3), promise=3), ManualClock()
    loop = Loop(loader, {"T": Event(every_n_seconds=1)}, max_epochs=1, clock=clock)
    assert loop.steps_to_next_event() == 3
    assert (loader.requests, clock.readings) == ([], 0)
    for _ in loop:
        before = (len(loader.requests), clock.readings)
        loop.steps_to_next_event()
        assert (len(loader.requests), clock.readings) == before


@given(run=runs())
def test_the_next_event_comes_after_the_steps_that_were_returned(run: Run) -> None:
    loop, _ = replace(run, rests=[]).loop()
    distances = [(-1, loop.steps_to_next_event())]
    fired = []
    for _, events in loop:
        distances.append((loop.global_step, loop.steps_to_next_event()))
        if events:
            fired.append(loop.global_step)
    assert distances.pop()[1] is None
    for step, distance in distances:
        following = next(at for at in fired if at > step)
        if run.promise is not None:
            assert distance == following - step
        elif distance is not None:  # without a length, an epoch may end before
            assert distance >= following - step


def test_an_empty_loader_has_no_next_event() -> None:
    assert Loop([], max_epochs=1).steps_to_next_event() is None
