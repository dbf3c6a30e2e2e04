"""Lists of batches, and the steps to the next event: section 3 of the contract, rule 11."""

from __future__ import annotations

import _thread
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import DataLengthError, Event, Loop, LoopError, LoopEvents, LoopState, LoopWarning

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
BOTH = {EPOCH_END, TRAINING_END}
HUGE = 2**62
SIZES: list[Any] = [1, 2, 3, 5, 64, HUGE, (1,), (4, 2, 1), (1, 3), (8, 1), {1, 2, 7}]


class Batches:
    """The iterator of one epoch: notes every request, and refuses any after its end."""

    def __init__(self, batches: Iterable[Any], notes: list[str]) -> None:
        self.batches = iter(batches)
        self.notes = notes
        self.ended = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        assert not self.ended, "an iterator that had ended was asked again"
        try:
            batch = next(self.batches)
        except StopIteration:
            self.ended = True
            self.notes.append("end")
            raise
        self.notes.append(f"next {batch!r}")
        if isinstance(batch, BaseException):
            raise batch
        return batch


class Loader:
    """A loader without a length; each epoch takes the next of the given lists."""

    def __init__(self, *epochs: Iterable[Any]) -> None:
        self.epochs = cycle(epochs)
        self.notes: list[str] = []

    def __iter__(self) -> Batches:
        return Batches(next(self.epochs), self.notes)


class Sized(Loader):
    """A loader that promises a length, which may be wrong."""

    def __init__(self, *epochs: Iterable[Any], promise: int) -> None:
        super().__init__(*epochs)
        self.promise = promise

    def __len__(self) -> int:
        return self.promise


class Clock:
    """A clock that stands still until somebody sets it on, and counts its readings."""

    def __init__(self) -> None:
        self.now = 0
        self.readings = 0

    def __call__(self) -> int:
        self.readings += 1
        return self.now

    def tell(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches that take a second each."""
        for batch in batches:
            self.now += 1
            yield batch


class Asked:
    """A condition that holds at some steps, and notes where it is called."""

    def __init__(self, *holds_at: int) -> None:
        self.holds_at = holds_at
        self.states: list[LoopState] = []

    def __call__(self, state: LoopState) -> bool:
        self.states.append(state)
        return state.global_step in self.holds_at

    @property
    def steps(self) -> list[int]:
        return [state.global_step for state in self.states]


def lists_of(loop: Loop[Any], sizes: Any) -> list[list[Any]]:
    return [batches for batches, _ in loop.chunks(sizes)]


def handed(loop: Loop[Any], sizes: Any) -> list[tuple[list[Any], set[Any]]]:
    return [(batches, set(events)) for batches, events in loop.chunks(sizes)]


# What may be asked for


@pytest.mark.parametrize(
    "sizes",
    [True, False, None, "3", "", 2.0, 1.5, {"a"}, [1, 2.0], (1, "4"), [1, True], [1, None]],
    ids=repr,
)
def test_sizes_of_the_wrong_kind_are_refused_at_once(sizes: Any) -> None:
    with pytest.raises(TypeError, match="sizes") as caught:
        Loop(range(5), max_epochs=1).chunks(sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [0, -1, -HUGE, [], (), set(), [2, 4], (64, 8), [1, 0], (4, 1, -2), {2}], ids=repr
)
def test_sizes_that_cannot_be_are_refused_at_once(sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes") as caught:
        Loop(range(5), max_epochs=1).chunks(sizes)
    assert "\n" not in str(caught.value)


def test_what_is_refused_changes_nothing() -> None:
    loop = Loop(range(3), max_epochs=1)
    iterator = iter(loop)
    next(iterator)
    with pytest.raises(ValueError, match="sizes"):
        loop.chunks(0)
    assert [batch for batch, _ in iterator] == [1, 2]


def test_a_size_is_anything_that_is_a_whole_number() -> None:
    class Two:
        def __index__(self) -> int:
            return 2

    expected = [[0, 1], [2, 3], [4]]
    sizes: Any
    for sizes in (2, Two(), [Two(), 1], (2, 1), (1, 2), [1, 2, 2], {1, 2}, frozenset({1, 2})):
        assert lists_of(Loop(range(5), max_epochs=1), sizes) == expected
    for sizes in (range(1, 3), dict.fromkeys([2, 1])):
        assert lists_of(Loop(range(5), max_epochs=1), sizes) == expected


def test_later_changes_to_the_sizes_change_nothing() -> None:
    sizes = [1, 2]
    chunks = Loop(range(6), max_epochs=1).chunks(sizes)
    sizes.append(3)
    assert next(chunks)[0] == [0, 1]
    sizes.clear()
    assert [batches for batches, _ in chunks] == [[2, 3], [4, 5]]


# Lists


def test_a_list_ends_with_an_event() -> None:
    loop = Loop(range(7), {"Log": Event(every_n_steps=4)}, max_epochs=2)
    assert handed(loop, 3) == [
        *(([0, 1, 2], set()), ([3], {"Log"}), ([4, 5, 6], {EPOCH_END})),
        *(([0], {"Log"}), ([1, 2, 3], set()), ([4], {"Log"}), ([5, 6], BOTH)),
    ]


def test_a_list_has_the_largest_of_the_sizes_that_fits() -> None:
    loop = Loop(range(30), {"Log": Event(every_n_steps=15)}, max_epochs=1)
    found = handed(loop, (8, 2, 1))
    assert [len(batches) for batches, _ in found] == [8, 2, 2, 2, 1] * 2
    assert [batch for batches, _ in found for batch in batches] == list(range(30))
    assert [events for _, events in found if events] == [{"Log"}, {"Log", *BOTH}]


@pytest.mark.parametrize("lookahead", [None, True])
def test_the_end_of_an_epoch_of_unknown_length_is_seen_by_the_look(lookahead: bool | None) -> None:
    loader = Loader(range(7), range(2))
    loop = Loop(loader, max_epochs=2, lookahead=lookahead)
    assert handed(loop, (4, 2, 1)) == [
        *(([0, 1, 2, 3], set()), ([4, 5], set()), ([6], {EPOCH_END})),
        ([0, 1], BOTH),
    ]


def test_max_steps_is_foreseen_and_no_batch_too_many_is_fetched() -> None:
    stream = Batches(range(9), [])
    assert handed(Loop(stream, max_steps=5), 64) == [(list(range(5)), {TRAINING_END})]
    assert next(stream) == 5


def test_an_epoch_that_nobody_foresaw_to_end_ends_its_list_without_an_event() -> None:
    loop = Loop(Loader(range(3)), max_steps=5, lookahead=False)
    assert handed(loop, 64) == [([0, 1, 2], set()), ([0, 1], {TRAINING_END})]


def test_lists_have_no_batches_beyond_the_length() -> None:
    loop = Loop(Sized(range(5), promise=3), max_epochs=1)
    with pytest.warns(LoopWarning, match="had more than the 3 batches"):
        assert handed(loop, 64) == [([0, 1, 2], BOTH)]


def test_an_endless_stream_can_have_epochs_in_lists() -> None:
    loop = Loop(Batches(range(99), []), max_epochs=2, dataloader_len=3)
    assert handed(loop, 2) == [
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

    for source in (range(9), Loader(range(9)), generator, generator()):
        found = lists_of(Loop(source, **limit), sizes)
        assert [len(batches) for batches in found] == lengths
        assert [batch for batches in found for batch in batches] == list(range(9))


def test_what_is_handed_over_is_a_list_of_the_users_own() -> None:
    kept = []
    for batches, _ in Loop(range(9), max_epochs=1).chunks((4, 1)):
        assert type(batches) is list
        kept.append(batches[:])
        batches.clear()
    assert kept == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    pairs = list(Loop(range(3), {"A": Event(at_step=1)}, max_epochs=1).chunks(2))
    assert pairs == [([0, 1], {"A"}), ([2], BOTH)]


def test_the_events_of_a_list_are_the_sets_that_single_steps_have() -> None:
    def loop() -> Loop[int]:
        return Loop(range(6), {"Log": Event(every_n_steps=2)}, max_epochs=1)

    single = {type(events) for _, events in loop()}
    assert {type(events) for _, events in loop().chunks(2)} <= single
    with pytest.warns(LoopWarning, match="Log"):
        assert [events for _, events in loop().chunks(2) if "Lok" in events] == []


def test_nothing_is_iterated_before_the_first_request() -> None:
    loader = Loader(range(3))
    chunks = Loop(loader, max_epochs=1).chunks(2)
    assert loader.notes == []
    assert iter(chunks) is chunks
    next(chunks)
    assert loader.notes == ["next 0", "next 1", "next 2"]


def test_the_loop_tells_of_the_last_step_of_the_list() -> None:
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


def test_len_counts_the_batches_that_are_still_to_come() -> None:
    loop = Loop(range(10), {"C": Event(Asked(2))}, max_epochs=1)
    # the third batch closes the first gathering: two fit, and one is kept
    left = [(len(batches), len(loop)) for batches, _ in loop.chunks((4, 2, 1))]
    assert left == [(2, 8), (1, 7), (4, 3), (2, 1), (1, 0)]


# The same run as in single steps


@dataclass(frozen=True)
class Run:
    """What decides when things are due, without a clock."""

    lengths: list[int]
    promise: int | None
    limit: dict[str, Any]
    steps: dict[str, Any]
    epochs: dict[str, Any]
    rests: list[int]
    period: int
    stop_when: dict[str, Any] | None

    def loop(self) -> tuple[Loop[Any], list[tuple[int, ...]]]:
        """A loop, and where its condition is called: epoch, step, and the epoch's step."""
        calls: list[tuple[int, ...]] = []

        def condition(state: LoopState) -> bool:
            calls.append((state.epoch, state.global_step, state.epoch_step))
            return state.global_step % self.period in self.rests

        start = 0
        epochs = []
        for length in self.lengths:
            epochs.append(range(start, start + length))
            start += length
        loader = Loader(*epochs) if self.promise is None else Sized(*epochs, promise=self.promise)
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
        before = done  # the `for` is left after so many lists, and entered again
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
def test_the_next_list_ends_at_the_latest_at_the_next_event(run: Run, n: int) -> None:
    loop, _ = replace(run, rests=[]).loop()
    coming = loop.steps_to_next_event()
    for batches, _ in loop.chunks(n):
        if run.promise is not None:
            assert len(batches) == min(n, coming or 0)
        elif coming is not None:  # the ends of epochs are not foreseen
            assert len(batches) <= min(n, coming)
        coming = loop.steps_to_next_event()
    assert coming is None


# Going from one to the other


def test_lists_after_single_steps_and_single_steps_after_lists_go_on_with_the_run() -> None:
    loop = Loop(range(8), max_epochs=1)
    assert next(iter(loop))[0] == 0
    assert next(loop.chunks(3))[0] == [1, 2, 3]
    assert next(iter(loop))[0] == 4
    assert handed(loop, 64) == [([5, 6, 7], BOTH)]


@pytest.mark.parametrize("old", [None, 2])
@pytest.mark.parametrize("new", [None, 2])
def test_entering_again_takes_over_from_the_older_iterator(old: Any, new: Any) -> None:
    loop = Loop(range(9), max_epochs=1)
    older = iter(loop) if old is None else loop.chunks(old)
    next(older)
    newer = iter(loop) if new is None else loop.chunks(new)
    with pytest.raises(LoopError, match="replaced"):
        next(older)
    next(newer)
    with pytest.raises(LoopError, match="replaced"):
        next(older)


def test_what_an_older_list_left_goes_into_the_next_lists_or_single_steps() -> None:
    def begin() -> Loop[int]:
        """Three are kept, of which the last closes the gathering."""
        loop = Loop(range(9), {"C": Event(Asked(6))}, max_epochs=1)
        assert next(loop.chunks((8, 4, 1)))[0] == [0, 1, 2, 3]
        return loop

    assert [(batch, set(events)) for batch, events in begin()] == [
        *((4, set()), (5, set()), (6, {"C"}), (7, set()), (8, BOTH)),
    ]
    assert handed(begin(), 2) == [([4, 5], set()), ([6], {"C"}), ([7, 8], BOTH)]
    assert handed(begin(), 64) == [([4, 5, 6], {"C"}), ([7, 8], BOTH)]
    loop = begin()
    loop.restart()
    assert lists_of(loop, 64)[0] == list(range(7))


def finished() -> Loop[Any]:
    loop = Loop(range(3), max_epochs=1)
    lists_of(loop, 2)
    return loop


def failed() -> Loop[Any]:
    loop = Loop(Loader([OSError("disk")]), max_epochs=1)
    with pytest.raises(OSError):
        lists_of(loop, 2)
    return loop


def closed() -> Loop[Any]:
    with Loop(range(3), max_epochs=1) as loop:
        next(loop.chunks(2))
    return loop


@pytest.mark.parametrize("end", [finished, failed, closed])
def test_a_run_that_is_over_is_not_entered_by_lists_either(end: Callable[[], Loop[Any]]) -> None:
    loop = end()
    with pytest.raises(LoopError) as plain:
        iter(loop)
    with pytest.raises(LoopError) as listed:
        loop.chunks(2)
    assert str(listed.value) == str(plain.value)
    assert loop.steps_to_next_event() is None
    loop.restart()
    assert loop.chunks(2) is not None


def test_an_iterator_that_is_through_stays_through() -> None:
    chunks = Loop(range(3), max_epochs=1).chunks(2)
    assert len(list(chunks)) == 2
    assert list(chunks) == list(chunks) == []


def test_leaving_the_with_closes_the_source_and_what_was_kept() -> None:
    ended: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            ended.append("closed")

    with Loop(source, {"C": Event(Asked(2))}, max_epochs=1) as loop:
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
    asked, other = Asked(4, 5, 9), Asked(5)
    events = {"A": Event(asked), "B": Event(other), "S": Event(every_n_steps=6)}
    loop = Loop(range(9), events, max_epochs=2, lookahead=lookahead)
    fired = [(loop.global_step, set(names)) for _, names in loop.chunks(sizes) if names]
    assert asked.steps == other.steps == list(range(18))
    assert fired == [
        *((4, {"A"}), (5, {"A", "B", "S"}), (8, {EPOCH_END}), (9, {"A"}), (11, {"S"})),
        (17, {"S", *BOTH}),
    ]


def test_a_condition_that_holds_closes_the_list() -> None:
    def loop() -> Loop[int]:
        return Loop(range(7), {"C": Event(Asked(3))}, max_epochs=1)

    assert handed(loop(), 64) == [([0, 1, 2, 3], {"C"}), ([4, 5, 6], BOTH)]
    assert handed(loop(), (3, 1)) == [([0, 1, 2], set()), ([3], {"C"}), ([4, 5, 6], BOTH)]
    # what is kept is cut in the same way
    assert handed(loop(), (64, 2, 1)) == [
        *(([0, 1], set()), ([2, 3], {"C"})),
        *(([4, 5], set()), ([6], BOTH)),
    ]


def test_a_condition_is_not_called_outside_of_its_window() -> None:
    asked = Asked()
    events = {"C": Event(asked, from_step=2, until_step=5)}
    lists_of(Loop(range(9), events, max_epochs=1), 64)
    assert asked.steps == [2, 3, 4]


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
    for loader in (range(3), Loader(range(3))):
        asked = Asked()
        lists_of(Loop(loader, {"C": Event(asked)}, max_epochs=1), 64)
        flags = [(state.epoch_end, state.training_end) for state in asked.states]
        assert flags == [(False, False), (False, False), (True, True)]


def test_stop_when_ends_the_list_and_training_and_the_others_see_it() -> None:
    asked = Asked()
    loop = Loop(range(9), {"C": Event(asked)}, max_epochs=1, stop_when=Event(Asked(3)))
    assert handed(loop, 64) == [([0, 1, 2, 3], {TRAINING_END})]
    assert [state.training_end for state in asked.states] == [False, False, False, True]
    assert loop.stop_reason == "stop_when"


def test_a_stop_when_that_holds_at_a_kept_batch_ends_training_there() -> None:
    loop = Loop(range(9), max_epochs=1, stop_when=Event(Asked(3)))
    reasons = [(batches, loop.stop_reason) for batches, _ in loop.chunks((8, 3, 1))]
    assert reasons == [([0, 1, 2], None), ([3], "stop_when")]


def test_what_a_condition_raises_comes_after_what_was_gathered_before() -> None:
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
def test_with_every_size_the_same_batches_come_before_what_a_condition_raises(
    sizes: Any, at: int, promise: int | None, by: str
) -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == at:
            raise OSError("disk")
        return False

    loader = Loader(range(4)) if promise is None else Sized(range(4), promise=promise)
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


def test_timers_are_judged_once_for_a_list_that_a_condition_has_shortened() -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 3:
            raise OSError("disk")
        return False

    clock = Clock()
    events = {"T": Event(every_n_seconds=4), "Fail": Event(fail), "Due": Event(at_step=3)}
    loop = timed(clock, events, max_epochs=1)
    chunks = loop.chunks(4)
    # four batches were fetched when the clock was read, and three of them are handed over
    assert next(chunks) == ([0, 1, 2], {"T"})
    assert loop.state.elapsed == 4.0
    assert clock.readings == 2
    with pytest.raises(OSError, match="disk"):
        next(chunks)


def test_time_that_is_up_at_a_list_that_a_condition_has_shortened_ends_the_run() -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 3:
            raise OSError("disk")
        return False

    loop = timed(Clock(), {"Fail": Event(fail)}, max_seconds=4)
    assert handed(loop, 4) == [([0, 1, 2], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [None, 3, 64, (4, 2, 1)], ids=repr)
def test_an_exception_of_a_signals_handler_in_a_fetch_leaves_no_condition_unasked(
    at: int, sizes: Any
) -> None:
    def handle(*_: object) -> None:
        raise ConnectionError("preempted")

    # `interrupt_main` notes the signal, as when it arrives in C code; the handler runs soon after
    numbers = chain(range(at), map(_thread.interrupt_main, [signal.SIGTERM]), range(at + 1, 9))
    asked = Asked()
    loop = Loop(numbers, {"C": Event(asked)}, max_steps=9)
    found: list[Any] = []
    former = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(ConnectionError, match="preempted"):
            for batch, _ in loop if sizes is None else loop.chunks(sizes):
                found += [batch] if sizes is None else batch
    finally:
        signal.signal(signal.SIGTERM, former)
    assert asked.steps[: len(found)] == list(range(len(found)))
    assert len(found) <= len(asked.steps) + 1


@pytest.mark.parametrize(("close", "text"), [(True, "closed"), (False, "replaced")])
def test_a_condition_may_close_or_restart_the_loop(close: bool, text: str) -> None:
    def end(state: LoopState) -> bool:
        if state.global_step == 2:
            loop.close() if close else loop.restart()
        return False

    loop: Loop[int] = Loop(range(5), {"End": Event(end)}, max_epochs=1)
    with pytest.raises(LoopError, match=text):
        lists_of(loop, 4)


# Errors and interrupts


@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(64, [[0, 1, 2]]), (2, [[0, 1], [2]]), ((8, 2, 1), [[0, 1], [2]]), ((8, 1), [[0], [1], [2]])],
    ids=repr,
)
def test_an_error_of_the_source_comes_after_what_was_gathered(
    lookahead: bool | None, sizes: Any, expected: list[list[int]]
) -> None:
    wrong = OSError("disk")
    loader = Sized([0, 1, 2, wrong, 4], promise=5)
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
    assert len(loader.notes) == 4


def test_an_error_waits_for_single_steps_too() -> None:
    loop = Loop(Sized([0, 1, 2, OSError("disk")], promise=9), max_epochs=1)
    assert next(loop.chunks((8, 2, 1)))[0] == [0, 1]
    batches: list[int] = []
    with pytest.raises(OSError, match="disk"):
        for batch, _ in loop:
            batches.append(batch)
    assert batches == [2]


def test_a_length_that_is_too_long_is_told_after_what_was_gathered() -> None:
    chunks = Loop(Sized(range(3), promise=5), max_epochs=1).chunks(64)
    assert next(chunks) == ([0, 1, 2], set())
    with pytest.raises(DataLengthError, match="after 3 of the 5"):
        next(chunks)


def test_a_stream_that_runs_dry_tells_so_after_its_last_list() -> None:
    loop = Loop(Batches(range(5), []), max_steps=9)
    with pytest.warns(LoopWarning, match="dry at global_step 4"):
        assert handed(loop, 3) == [([0, 1, 2], set()), ([3, 4], set())]
    assert loop.stop_reason == "exhausted"


@pytest.mark.parametrize("at", [0, 2, 3, 5])
@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize("again", [None, 2, 64, (3, 1)], ids=repr)
def test_an_interrupted_fetch_loses_neither_batch_nor_event(
    at: int, lookahead: bool | None, again: Any
) -> None:
    batches: list[Any] = [*range(6)]
    batches.insert(at, KeyboardInterrupt())
    asked = Asked()
    events = {"S": Event(at_step=4), "C": Event(asked)}
    loop = Loop(Sized(batches, promise=6), events, max_epochs=1, lookahead=lookahead)
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
    assert asked.steps == list(range(6))


def test_the_same_iterator_goes_on_after_an_interrupted_fetch() -> None:
    chunks = Loop(Loader([0, 1, KeyboardInterrupt(), 2, 3]), max_epochs=1).chunks(3)
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert [batches for batches, _ in chunks] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("struck", range(6))
@pytest.mark.parametrize("again", [None, 2, 64, (3, 1)], ids=repr)
def test_an_interrupted_condition_judges_only_its_own_batch_anew(struck: int, again: Any) -> None:
    calls: list[int] = []

    def condition(state: LoopState) -> bool:
        calls.append(state.global_step)
        if calls.count(struck) == 1 and state.global_step == struck:
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
    assert calls == sorted([*range(6), struck])


@pytest.mark.parametrize("struck", [1, 2, 3])
def test_an_interrupted_clock_loses_no_batch(struck: int) -> None:
    clock = Clock()

    def read() -> int:
        if clock() == 0 and clock.readings == struck:
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


def test_what_a_body_raises_does_not_end_the_run() -> None:
    loop = Loop(range(5), max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        for _ in loop.chunks(2):
            raise ZeroDivisionError
    assert lists_of(loop, 2) == [[2, 3], [4]]


# Time


def timed(clock: Clock, events: Any, **limit: Any) -> Loop[Any]:
    """Ten batches that take a second each."""
    return Loop(lambda: clock.tell(range(10)), events, clock=clock, dataloader_len=10, **limit)


def test_the_clock_is_read_once_for_every_list() -> None:
    clock = Clock()
    loop = timed(clock, {"T": Event(every_n_seconds=4)}, max_epochs=1)
    found = [
        (batches[-1], loop.state.elapsed, "T" in events, clock.readings)
        for batches, events in loop.chunks(3)
    ]
    # one reading is the start
    assert found == [(2, 3.0, False, 2), (5, 6.0, True, 3), (8, 9.0, False, 4), (9, 10.0, True, 5)]


def test_where_nothing_needs_the_time_it_is_read_when_somebody_looks() -> None:
    clock = Clock()
    loop = timed(clock, {"S": Event(every_n_steps=4)}, max_epochs=1)
    for _ in loop.chunks(3):
        assert clock.readings == 1
    assert loop.state.elapsed == loop.state.elapsed == 10.0
    assert clock.readings == 2


def test_timers_are_judged_at_the_last_step_of_a_list_and_do_not_come_in_a_burst() -> None:
    def due(event: Event, sizes: Any) -> list[int]:
        loop = timed(Clock(), {"T": event}, max_epochs=1)
        return [loop.global_step for _, events in loop.chunks(sizes) if "T" in events]

    assert due(Event(every_n_seconds=1), 4) == [3, 7, 9]
    assert due(Event(at_time=[1, 2, 6]), 4) == [3, 7]
    assert due(Event(every_n_seconds=4), (3, 1)) == [5, 9]
    # the windows of timers are looked at where timers are
    assert due(Event(every_n_seconds=1, until_step=4), 4) == [3]
    assert due(Event(every_n_seconds=1, until_step=3), 4) == []
    assert due(Event(every_n_seconds=1, from_step=5, until_step=9), 4) == [7]


def test_max_seconds_ends_training_with_the_list_that_reaches_it() -> None:
    clock = Clock()
    loop = timed(clock, {}, max_seconds=5)
    assert handed(loop, 4) == [([0, 1, 2, 3], set()), ([4, 5, 6, 7], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


@pytest.mark.parametrize("by", ["max_seconds", "stop_when"])
def test_what_was_kept_is_dropped_when_time_ends_the_run(by: str) -> None:
    clock = Clock()
    asked = Asked(2)
    events = {"C": Event(asked), "End": Event(at_step=99) | TRAINING_END}
    if by == "max_seconds":
        loop = timed(clock, events, max_seconds=3)
    else:
        loop = timed(clock, events, max_epochs=1, stop_when=Event(at_time=3))
    # the third batch closes; two fit, and when they are handed over, three seconds have gone
    assert handed(loop, (8, 2, 1)) == [([0, 1], {"End", TRAINING_END})]
    assert (loop.stop_reason, loop.global_step) == (by, 1)
    assert loop.state.training_end
    assert asked.steps == [0, 1, 2]
    with pytest.raises(LoopError, match="finished"):
        loop.chunks(2)


def test_an_error_that_waits_does_not_come_when_time_ends_the_run() -> None:
    clock = Clock()

    def source() -> Iterator[int]:
        yield from clock.tell(range(3))
        raise OSError("disk")

    loop = Loop(source, max_seconds=3, clock=clock, lookahead=False)
    assert handed(loop, 64) == [([0, 1, 2], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


def test_a_condition_that_looks_at_the_time_reads_the_clock_where_it_looks() -> None:
    clock = Clock()
    seen: list[float] = []

    def look(state: LoopState) -> None:
        seen.append(state.elapsed)
        seen.append(state.elapsed)

    lists_of(timed(clock, {"Look": Event(look)}, max_epochs=1), 5)
    assert seen == [float(second) for second in range(1, 11) for _ in range(2)]
    assert clock.readings == 11


# What is held


class Batch:
    """A batch that can be watched."""


def batches_to_watch() -> Iterator[Batch]:
    for _ in range(9):
        yield Batch()


class SizedBatches:
    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Batch]:
        return batches_to_watch()


CPYTHON = pytest.mark.skipif(sys.implementation.name != "cpython", reason="reference counts")


@CPYTHON
@pytest.mark.parametrize("sizes", [1, 2, 4, 64, (4, 2, 1), (8, 1)], ids=repr)
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("source", [SizedBatches, batches_to_watch], ids=["sized", "unsized"])
def test_nothing_keeps_the_batches_of_a_list_that_the_body_deleted(
    sizes: Any, lookahead: bool | None, source: Callable[[], Any]
) -> None:
    events = {"C": Event(Asked(2, 5)), "S": Event(every_n_steps=4)}
    count = 0
    loader = source() if source is SizedBatches else source
    for batches, _ in Loop(loader, events, max_epochs=1, lookahead=lookahead).chunks(sizes):
        watched = [weakref.ref(batch) for batch in batches]
        del batches
        assert [one() for one in watched] == [None] * len(watched)
        count += len(watched)
    assert count == 9


@CPYTHON
def test_nothing_keeps_the_list_itself() -> None:
    for batches, _ in Loop(range(9), max_epochs=1).chunks(4):
        lonely: list[int] = []
        assert sys.getrefcount(batches) == sys.getrefcount(lonely)


@CPYTHON
def test_batches_that_are_dropped_are_let_go() -> None:
    clock = Clock()
    watched: list[weakref.ref[Batch]] = []

    def watch() -> Batch:
        batch = Batch()
        watched.append(weakref.ref(batch))
        return batch

    def source() -> Iterator[Batch]:
        for _ in clock.tell(range(9)):
            yield watch()

    loop = Loop(source, {"C": Event(Asked(2))}, max_seconds=3, clock=clock, lookahead=False)
    assert [len(batches) for batches, _ in loop.chunks((8, 2, 1))] == [2]
    assert [one() for one in watched] == [None] * 3


# Steps to the next event


def coming(events: Any = None, loader: Any = range(10), **limit: Any) -> int | None:
    return Loop(loader, events, **(limit or {"max_epochs": 9})).steps_to_next_event()


def test_before_the_first_batch_the_first_step_counts_too() -> None:
    assert coming({"A": Event(every_n_steps=3)}) == 3
    assert coming({"A": Event(at_step=[4, 7])}) == 5
    assert coming({"A": Event(at_step=0)}) == 1
    assert coming() == 10
    assert coming({"A": Event(every_n_steps=12)}) == 10
    assert coming({"A": Event(every_n_steps=3), "B": Event(at_step=1)}) == 2
    assert coming({"A": Event(at_step=5) | Event(every_n_steps=4)}) == 4


def test_limits_and_stop_when_count_where_their_step_is_known() -> None:
    assert coming(max_steps=4) == 4
    assert coming({"A": Event(at_step=7)}, max_steps=4) == 4
    assert coming(max_seconds=4) == 10
    assert coming(max_epochs=1, stop_when=Event(at_step=2)) == 3
    assert coming(loader=lambda: iter([0]), max_steps=HUGE) == HUGE


def test_windows_are_respected() -> None:
    assert coming({"A": Event(every_n_steps=2, from_step=5)}) == 6
    assert coming({"A": Event(every_n_steps=2, from_step=6)}) == 8
    assert coming({"A": Event(every_n_steps=4, until_step=3)}) == 10
    assert coming({"A": Event(at_step=[1, 6], from_step=2)}) == 7


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
def test_none_where_no_step_is_scheduled(event: Event) -> None:
    loop = Loop(Loader(range(3)), {"A": event}, max_epochs=2)
    assert loop.steps_to_next_event() is None
    assert [loop.steps_to_next_event() for _ in loop] == [None] * 6


def test_the_promised_end_of_the_epoch_counts_and_after_it_that_of_the_next() -> None:
    loop = Loop(range(3), max_epochs=2)
    assert [loop.steps_to_next_event() for _ in loop] == [2, 1, 3, 2, 1, None]
    told = Loop(Loader(range(9)), max_epochs=2, dataloader_len=3)
    assert told.steps_to_next_event() == 3
    assert [told.steps_to_next_event() for _ in told] == [2, 1, 3, 2, 1, None]
    ignored = Loop(range(3), max_epochs=1, lookahead=True)
    assert [ignored.steps_to_next_event() for _ in ignored] == [None] * 3


def test_a_length_that_is_too_short_counts_as_it_is() -> None:
    loop = Loop(Sized(range(4), promise=2), max_epochs=2)
    with pytest.warns(LoopWarning, match="had more than the 2 batches"):
        found = [loop.steps_to_next_event() for _ in loop]
    assert found == [1, 2, 1, None]


def test_after_an_interrupted_fetch_the_length_of_its_epoch_counts_no_more() -> None:
    loop = Loop(Sized([0, 1, KeyboardInterrupt(), 2, 3, 4], promise=5), max_epochs=1)
    chunks = loop.chunks((4, 1))
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert loop.steps_to_next_event() is None
    # the end that the look finds is the epoch's
    assert handed(loop, (4, 1)) == [([0, 1, 2, 3], set()), ([4], BOTH)]


def test_the_length_of_a_callables_epoch_is_known_once_it_is_open() -> None:
    loop = Loop(lambda: [0, 0, 0], max_epochs=2)
    assert loop.steps_to_next_event() is None
    assert [loop.steps_to_next_event() for _ in loop] == [2, 1, 3, 2, 1, None]


def test_per_epoch_counts_in_the_epoch() -> None:
    events = {"A": Event(every_n_steps=3, per_epoch=True)}
    sized = Loop(range(4), events, max_epochs=2)
    assert sized.steps_to_next_event() == 3
    assert [sized.steps_to_next_event() for _ in sized] == [2, 1, 1, 3, 2, 1, 1, None]
    # an epoch of unknown length counts as if it went on
    unsized = Loop(Loader(range(4)), events, max_epochs=2)
    assert unsized.steps_to_next_event() == 3
    assert [unsized.steps_to_next_event() for _ in unsized] == [2, 1, 3, 3, 2, 1, 3, None]
    late = {"A": Event(at_step=1, per_epoch=True, from_step=3)}
    windowed = Loop(range(4), late, max_epochs=2)
    assert [windowed.steps_to_next_event() for _ in windowed] == [3, 2, 1, 2, 1, 2, 1, None]


def test_a_list_is_counted_from_its_last_step_whatever_is_kept() -> None:
    events = {"S": Event(at_step=8), "C": Event(Asked(2))}
    loop = Loop(range(10), events, max_epochs=1)
    found = [(len(batches), loop.steps_to_next_event()) for batches, _ in loop.chunks((8, 2, 1))]
    assert found == [(2, 7), (1, 6), (2, 4), (2, 2), (2, 1), (1, None)]


def test_there_is_no_next_event_after_the_end() -> None:
    loop = Loop(range(3), max_epochs=1)
    list(loop)
    assert loop.steps_to_next_event() is None
    loop.restart()
    assert loop.steps_to_next_event() == 3


def test_asking_touches_neither_source_nor_clock() -> None:
    loader, clock = Sized(range(3), promise=3), Clock()
    loop = Loop(loader, {"T": Event(every_n_seconds=1)}, max_epochs=1, clock=clock)
    assert loop.steps_to_next_event() == 3
    assert (loader.notes, clock.readings) == ([], 0)
    for _ in loop:
        before = (len(loader.notes), clock.readings)
        loop.steps_to_next_event()
        assert (len(loader.notes), clock.readings) == before


@given(run=runs())
def test_the_next_event_comes_when_it_was_told_to(run: Run) -> None:
    loop, _ = replace(run, rests=[]).loop()
    told = [(-1, loop.steps_to_next_event())]
    fired = []
    for _, events in loop:
        told.append((loop.global_step, loop.steps_to_next_event()))
        if events:
            fired.append(loop.global_step)
    assert told.pop()[1] is None
    for step, distance in told:
        following = next(at for at in fired if at > step)
        if run.promise is not None:
            assert distance == following - step
        elif distance is not None:  # the ends of epochs are not foreseen
            assert distance >= following - step


def test_an_empty_loader_has_no_next_event() -> None:
    assert Loop([], max_epochs=1).steps_to_next_event() is None
