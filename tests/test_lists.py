"""Lists of batches: `loop.chunks(n)`, which makes many steps at once, and `dloop.batched`."""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents, LoopState, batched
from interpreter import needs_reference_counts
from loops import ENTER, flat, resumed
from manual_clock import ManualClock
from recording_loaders import Batch, RecordingBatches, RecordingLoader, SizedLoader
from stateful_loaders import StatefulLoader

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
BOTH = {EPOCH_END, TRAINING_END}
HUGE = 2**62


def lists_of(loop: Loop[Any], sizes: Any) -> list[list[Any]]:
    return [batches for batches, _ in loop.chunks(sizes)]


def pairs_of(loop: Loop[Any], sizes: Any) -> list[tuple[list[Any], set[Any]]]:
    return [(batches, set(events)) for batches, events in loop.chunks(sizes)]


# Sizes


def test_wrong_sizes_leave_the_older_iterator_valid() -> None:
    loop = Loop(range(3), max_epochs=1)
    steps = iter(loop)
    next(steps)
    with pytest.raises(ValueError, match=r"^sizes="):
        loop.chunks(0)
    assert [batch for batch, _ in steps] == [1, 2]


def test_sizes_are_a_number_or_any_collection_of_numbers() -> None:
    kinds: list[Any] = [2, [2, 1], (1, 2), {1, 2}, range(1, 3), dict.fromkeys([2, 1])]
    for sizes in kinds:
        assert lists_of(Loop(range(5), max_epochs=1), sizes) == [[0, 1], [2, 3], [4]]
    for source in (range(9), RecordingLoader(range(9)), iter(range(9))):  # only an upper bound
        assert lists_of(Loop(source, max_epochs=1), HUGE) == [list(range(9))]
    assert [len(each) for each in lists_of(Loop(range(9), max_epochs=1), (1, HUGE, 8))] == [8, 1]


# Where lists end


def test_lists_end_at_limits_and_no_batch_beyond_is_fetched() -> None:
    stream = RecordingBatches(range(9), [])
    assert pairs_of(Loop(stream, max_steps=5), 64) == [(list(range(5)), {TRAINING_END})]
    assert next(stream) == 5
    unsized = Loop(RecordingLoader(range(3)), max_steps=5, lookahead=False)
    assert pairs_of(unsized, 64) == [([0, 1, 2], set()), ([0, 1], {TRAINING_END})]
    cut = Loop(RecordingBatches(range(99), []), max_epochs=2, dataloader_len=3)
    assert pairs_of(cut, 2) == [
        *(([0, 1], set()), ([2], {EPOCH_END})),
        *(([3, 4], set()), ([5], BOTH)),
    ]


# Pairs, counters and iterators


def test_each_list_is_a_new_list_that_the_body_may_change() -> None:
    kept = []
    for batches, _ in Loop(range(9), max_epochs=1).chunks((4, 1)):
        assert type(batches) is list
        kept.append(batches[:])
        batches.clear()
    assert kept == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    pairs = list(Loop(range(3), {"A": Event(at_step=1)}, max_epochs=1).chunks(2))
    assert pairs == [([0, 1], {"A"}), ([2], BOTH)]


# stop() and trigger()


def test_a_request_while_a_list_is_gathered_is_met_by_its_last_step() -> None:
    def batches() -> Iterator[int]:
        for number in range(12):
            if number in (1, 6):
                thread = threading.Thread(target=requests.pop(0))
                thread.start()
                thread.join()
            yield number

    loop = Loop(batches, {"E": Event()}, max_epochs=1, dataloader_len=12)
    requests: list[Callable[[], None]] = [lambda: loop.trigger("E"), loop.stop]
    assert pairs_of(loop, 4) == [([0, 1, 2, 3], {"E"}), ([4, 5, 6, 7], {TRAINING_END})]


# Errors and interrupts: nothing of an unfinished list is yielded


@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize(("sizes", "done"), [(64, 0), (3, 3), ((4, 2, 1), 4)])
@pytest.mark.parametrize("place", ["dataloader", "condition"])
def test_an_error_ends_the_run_before_the_list_and_a_resume_yields_it_all(
    place: str, sizes: Any, done: int, lookahead: bool | None
) -> None:
    def fail(state: LoopState) -> bool:
        if state.global_step == 5 and place == "condition":
            raise wrong
        return False

    wrong = OSError("disk")
    batches = [0, 1, 2, 3, 4, wrong if place == "dataloader" else 5, 6, 7]
    loader = SizedLoader(batches, promise=8)
    loop = Loop(loader, {"Fail": Event(fail)}, max_epochs=1, lookahead=lookahead)
    lists = loop.chunks(sizes)
    found = [next(lists)[0] for _ in range(done > 0)]
    with pytest.raises(OSError):
        next(lists)
    assert found == [list(range(done))] * (done > 0)
    assert (loop.stop_reason, loop.steps_done) == ("exception", done)
    again = resumed(Loop(range(8), max_epochs=1), loop.state_dict())
    assert flat(again.chunks(sizes)) == list(range(done, 8))


# Time


def timed(clock: ManualClock, events: Any, **limit: Any) -> Loop[Any]:
    """A loop over ten batches; fetching one takes a second."""
    return Loop(
        lambda: clock.one_second_each(range(10)), events, clock=clock, dataloader_len=10, **limit
    )


def test_the_clock_is_read_once_per_list_at_its_last_batch() -> None:
    clock = ManualClock()
    loop = timed(clock, {"T": Event(every_n_seconds=4)}, max_epochs=1)
    found = [
        (batches[-1], loop.state.elapsed, "T" in events, clock.readings)
        for batches, events in loop.chunks(3)
    ]
    # the first reading is the start
    assert found == [(2, 3.0, False, 2), (5, 6.0, True, 3), (8, 9.0, False, 4), (9, 10.0, True, 5)]
    loop = timed(ManualClock(), {}, max_seconds=5)
    assert pairs_of(loop, 4) == [([0, 1, 2, 3], set()), ([4, 5, 6, 7], {TRAINING_END})]
    assert loop.stop_reason == "max_seconds"


@needs_reference_counts
@pytest.mark.parametrize("sizes", [1, 4, 64, (4, 2, 1), (8, 1)], ids=repr)
@pytest.mark.parametrize("lookahead", [None, True])
def test_the_batches_of_a_list_are_freed_when_the_body_deletes_it(
    lookahead: bool | None, sizes: Any
) -> None:
    def nine() -> Iterator[Batch]:
        return (Batch() for _ in range(9))

    events = {"C": Event(lambda state: state.global_step in (2, 5)), "S": Event(every_n_steps=4)}
    count = 0
    for batches, _ in Loop(nine, events, max_epochs=1, lookahead=lookahead).chunks(sizes):
        references = [weakref.ref(batch) for batch in batches]
        del batches
        assert [reference() for reference in references] == [None] * len(references)
        count += len(references)
    assert count == 9
    for batched_batches, _ in Loop(batched(nine, 2), max_epochs=1):
        references = [weakref.ref(batch) for batch in batched_batches]
        del batched_batches
        assert [reference() for reference in references] == [None] * len(references)


# batched


def test_length_epochs_and_state_are_passed_through() -> None:
    class Epochs(list[int]):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    loop = Loop(batched(Epochs(range(10)), 4), max_epochs=2)
    assert [(len(loop), loop.steps_to_next_event()) for _ in loop] == [
        *((5, 2), (4, 1), (3, 3), (2, 2), (1, 1), (0, None)),
    ]
    assert epochs == [0, 1]
    loops = [Loop(batched(StatefulLoader(10), 3), max_epochs=1) for _ in range(2)]
    seen = [batch for batch, _ in itertools.islice(loops[0], 2)]
    loops[1].load_state_dict(loops[0].state_dict())
    seen += [batch for batch, _ in loops[1]]
    assert [len(batch) for batch in seen] == [3, 3, 3, 1]
    assert sorted(itertools.chain(*seen)) == list(range(10))


def test_a_single_pass_source_stays_single_pass_and_is_taken_as_it_is_needed() -> None:
    taken: list[int] = []
    loop = Loop(batched(map(taken.append, itertools.count()), 3), max_steps=9)
    next(iter(loop))
    assert taken == [0, 1, 2]
    ending = Loop(batched(iter(range(7)), 3), max_steps=9)
    with pytest.warns(match="exhausted after global_step 2"):
        assert [batch for batch, _ in ending] == [[0, 1, 2], [3, 4, 5], [6]]
    cut = Loop(batched(itertools.count(), 2), max_epochs=2, dataloader_len=2)
    assert pairs_of(cut, 9) == [([[0, 1], [2, 3]], {EPOCH_END}), ([[4, 5], [6, 7]], BOTH)]
    looked_ahead = Loop(batched(iter(range(7)), 3), max_epochs=1)
    ends = [(batch, TRAINING_END in events) for batch, events in looked_ahead]
    assert ends == [([0, 1, 2], False), ([3, 4, 5], False), ([6], True)]


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("at", [0, 2, 3, 8, 9])
def test_an_interrupt_within_a_list_loses_nothing(at: int, sized: bool, enter: str) -> None:
    batches: list[Any] = list(range(10))
    batches.insert(at, KeyboardInterrupt())
    loader = SizedLoader(batches, promise=10) if sized else RecordingLoader(batches)
    loop: Loop[Any] = Loop(batched(loader, 4), max_epochs=2)
    found: list[Any] = []
    for _ in range(2):
        try:
            for each, _events in ENTER[enter](loop):
                found += [each] if enter == "steps" else each
        except KeyboardInterrupt:
            continue
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


def test_an_interrupted_single_pass_source_keeps_what_was_gathered() -> None:
    batches = [0, 1, 2, 3, KeyboardInterrupt(), 4, 5, 6]
    loop: Loop[Any] = Loop(batched(RecordingBatches(batches, []), 3), max_steps=2)
    steps = iter(loop)
    assert next(steps)[0] == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert [batch for batch, _ in loop] == [[3, 4, 5]]


def test_a_copy_of_batched_gives_the_same_lists() -> None:
    for source in (range(5), iter(range(5))):
        assert list(copy.copy(batched(source, 2))) == [[0, 1], [2, 3], [4]]
