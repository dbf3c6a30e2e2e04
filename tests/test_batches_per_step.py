"""Steps that take a list of batches: where lists end, resumes, interrupts and errors."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dloop import DataLengthError, Event, Loop, LoopError, LoopEvents, LoopWarning, StateError
from loops import ENTER, flat
from recording_loaders import RecordingLoader, SizedLoader

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
LENGTH = 10
SIZES = [1, 3, 5, 10, 11]


class Tells:
    """A loader that says which batch is its last, as Accelerate's do."""

    end_of_dataloader = False

    def __iter__(self) -> Iterator[int]:
        for number in range(LENGTH):
            self.end_of_dataloader = number == LENGTH - 1
            yield number


class Stateful:
    """A loader without a length, whose state is its place."""

    def __init__(self) -> None:
        self.place = self.begin = 0

    def __iter__(self) -> Iterator[int]:
        begin, self.begin = self.begin, 0
        for number in range(begin, LENGTH):
            self.place = number + 1
            yield number

    def state_dict(self) -> int:
        return self.place % LENGTH

    def load_state_dict(self, place: int) -> None:
        self.begin = place


class SizedStateful(Stateful):
    def __len__(self) -> int:
        return LENGTH


def unsized() -> Iterator[int]:
    yield from range(LENGTH)


def stream() -> Iterator[int]:
    return (number % LENGTH for number in itertools.count())


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "len()": (lambda: list(range(LENGTH)), {}),
    "len(), looked ahead": (lambda: list(range(LENGTH)), {"lookahead": True}),
    "dataloader_len": (lambda: unsized, {"dataloader_len": LENGTH}),
    "no length": (lambda: unsized, {}),
    "says its last": (Tells, {}),
    "a state": (Stateful, {}),
    "a state and a length": (SizedStateful, {}),
    "a stream in epochs": (stream, {"dataloader_len": LENGTH}),
}
sources = pytest.mark.parametrize("source", SOURCES)
sizes = pytest.mark.parametrize("size", SIZES)


def a_loop(source: str, size: int, **arguments: Any) -> Loop[Any]:
    load, given = SOURCES[source]
    limit = {} if "max_steps" in arguments else {"max_epochs": 3}
    return Loop(load(), batches_per_step=size, **{**limit, **given, **arguments})


def lists_of(size: int) -> list[list[int]]:
    """The lists of one epoch."""
    return [list(range(begin, min(begin + size, LENGTH))) for begin in range(0, LENGTH, size)]


@sources
@sizes
def test_an_epoch_is_handed_over_in_lists(source: str, size: int) -> None:
    loop = a_loop(source, size)
    steps = [(batches, loop.epoch, loop.epoch_step, set(events)) for batches, events in loop]
    lists = lists_of(size)
    assert [step[:3] for step in steps] == [
        (batches, epoch, number) for epoch in range(3) for number, batches in enumerate(lists)
    ]
    last = len(lists) - 1
    ends = [(epoch, number, events) for _, epoch, number, events in steps if events]
    assert ends == [
        *((epoch, last, {EPOCH_END}) for epoch in range(2)),
        (2, last, {EPOCH_END, TRAINING_END}),
    ]


@sources
@sizes
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("step_done", [True, False])
def test_a_run_in_many_lives_is_that_of_one_life(
    source: str, size: int, steps: int, step_done: bool
) -> None:
    seen: list[list[int]] = []
    state = None
    for _ in range(40):
        loop = a_loop(source, size)
        if state is not None:
            loop.load_state_dict(state)
        for batches, _ in itertools.islice(loop, steps + (not step_done)):
            seen.append(batches)
        if loop.stop_reason is not None:
            break
        state = json.loads(json.dumps(loop.state_dict(step_done)))
        if not step_done:
            del seen[-1]
    assert seen == lists_of(size) * 3


@sources
@sizes
def test_max_steps_counts_lists_and_may_end_within_an_epoch(source: str, size: int) -> None:
    loop = a_loop(source, size, max_steps=4)
    steps = [(batches, set(events)) for batches, events in loop]
    assert [batches for batches, _ in steps] == (lists_of(size) * 4)[:4]
    assert TRAINING_END in steps[-1][1]


@sources
@sizes
@pytest.mark.parametrize("chunk", [2, (3, 1)])
def test_chunks_hand_over_lists_of_lists(source: str, size: int, chunk: Any) -> None:
    loop = a_loop(source, size, events={"Second": Event(every_n_steps=2)})
    found = []
    for lists, events in loop.chunks(chunk):
        found += lists
        assert ("Second" in events) == (loop.global_step % 2 == 1)
    assert found == lists_of(size) * 3


def test_how_many_steps_are_to_come() -> None:
    loop = a_loop("len()", 4, events={"Last": Event(every_n_epochs=1)})
    assert len(loop) == 9
    assert [(len(loop), loop.steps_to_next_event()) for _ in loop] == [
        *((8, 2), (7, 1), (6, 3), (5, 2), (4, 1), (3, 3), (2, 2), (1, 1), (0, None)),
    ]


@pytest.mark.parametrize("lookahead", [None, True])
def test_a_stream_of_which_the_end_is_seen_has_its_last_list_at_the_training_end(
    lookahead: bool | None,
) -> None:
    limit: dict[str, int] = {"max_epochs": 1} if lookahead is None else {"max_steps": 9}
    loop: Loop[Any] = Loop(iter(range(7)), batches_per_step=3, lookahead=lookahead, **limit)  # type: ignore[arg-type]
    found = []
    with pytest.warns(LoopWarning, match="ran dry") if lookahead else contextlib.nullcontext():
        for batches, events in loop:
            found.append((batches, TRAINING_END in events))
    assert found == [([0, 1, 2], False), ([3, 4, 5], False), ([6], True)]


def test_a_stream_is_taken_when_it_is_asked_for() -> None:
    taken: list[int] = []
    loop = Loop(map(taken.append, itertools.count()), max_steps=9, batches_per_step=3)
    next(iter(loop))
    assert taken == [0, 1, 2]


# Interrupts and errors


def interrupted(at: int) -> list[Any]:
    batches: list[Any] = list(range(LENGTH))
    batches.insert(at, KeyboardInterrupt())
    return batches


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("at", range(LENGTH + 1))
@pytest.mark.parametrize("sized", [True, False])
@sizes
def test_an_interrupt_while_a_list_is_gathered_loses_nothing(
    size: int, sized: bool, at: int, enter: str
) -> None:
    batches = interrupted(at)
    loader = SizedLoader(batches, promise=LENGTH) if sized else RecordingLoader(batches)
    loop: Loop[Any] = Loop(loader, max_epochs=2, batches_per_step=size)
    found: list[Any] = []
    for _ in range(3):
        try:
            for each, _events in ENTER[enter](loop):
                found += [each] if enter == "steps" else each
        except KeyboardInterrupt:
            continue
        break
    assert found == lists_of(size) * 2


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 9}])
def test_an_interrupt_of_a_stream_loses_nothing(limit: dict[str, int]) -> None:
    class Stream:
        left: Iterator[Any] = iter(interrupted(4))

        def __iter__(self) -> Stream:
            return self

        def __next__(self) -> Any:
            batch = next(self.left)
            if isinstance(batch, KeyboardInterrupt):
                raise batch
            return batch

    Stream.left = iter(interrupted(4))
    loop: Loop[Any] = Loop(Stream(), batches_per_step=3, dataloader_len=LENGTH, **limit)  # type: ignore[arg-type]
    pairs = iter(loop)
    found = [next(pairs)[0]]
    with pytest.raises(KeyboardInterrupt):
        next(pairs)
    found += [batches for batches, _ in itertools.islice(loop, 3)]
    assert found == lists_of(3)


def test_a_stream_that_an_interrupt_has_ended_is_an_error_after_the_short_list() -> None:
    def batches() -> Iterator[int]:
        yield from range(4)
        raise KeyboardInterrupt

    loop: Loop[Any] = Loop(batches(), max_steps=9, batches_per_step=3)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    pairs = iter(loop)
    assert next(pairs)[0] == [3]
    with pytest.raises(LoopError, match="single-pass"):
        next(pairs)


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("lookahead", [None, True])
def test_an_error_comes_after_the_short_list_that_was_gathered_before_it(
    lookahead: bool | None, enter: str
) -> None:
    loader = SizedLoader([0, 1, 2, 3, OSError("disk")], promise=9)
    loop: Loop[Any] = Loop(loader, max_epochs=1, batches_per_step=3, lookahead=lookahead)
    found: list[Any] = []
    with pytest.raises(OSError, match="disk"):
        for each, events in ENTER[enter](loop):
            found.append(each)
            assert not events
    assert (
        flat(zip(found, found)) == [0, 1, 2, 3] if enter == "steps" else found == [[[0, 1, 2], [3]]]
    )


def test_an_epoch_that_ends_early_is_an_error_after_the_short_list() -> None:
    loop: Loop[Any] = Loop(SizedLoader(range(4), promise=9), max_epochs=1, batches_per_step=3)
    pairs = iter(loop)
    assert [next(pairs) for _ in range(2)] == [([0, 1, 2], set()), ([3], set())]
    with pytest.raises(DataLengthError, match="after 4 of the 9 batches"):
        next(pairs)


def test_an_error_of_an_epoch_that_was_left_is_not_believed_and_the_list_goes_on() -> None:
    errors = [OSError("a worker is dead")]

    class Workers:
        def __len__(self) -> int:
            return LENGTH

        def __iter__(self) -> Iterator[int]:
            for number in range(LENGTH):
                if number == 4 and errors:
                    raise errors.pop()
                yield number

    loop: Loop[Any] = Loop(Workers(), max_epochs=1, batches_per_step=3)
    found = [next(iter(loop))[0]]
    found += [batches for batches, _ in loop]
    assert found == lists_of(3)


def test_a_plain_for_ends_the_iterator_and_so_does_a_loop_of_lists() -> None:
    loader = SizedLoader(range(LENGTH), promise=LENGTH)
    list(Loop(loader, max_epochs=1, batches_per_step=4))
    assert loader.requests[-1] == "end"


def test_batches_that_were_given_are_not_kept() -> None:
    loop: Loop[Any] = Loop([[1], [2], [3]], max_epochs=1, batches_per_step=2)
    for batches, _ in loop:
        batches.clear()
    assert loop.stop_reason == "max_epochs"


# States and arguments


def test_a_state_of_another_size_is_refused() -> None:
    loop = a_loop("len()", 3)
    next(iter(loop))
    for size in (2, None):
        again: Loop[Any] = Loop(range(LENGTH), max_epochs=3, batches_per_step=size)
        with pytest.raises(StateError, match=f"batches_per_step={size}: .* saved with 3"):
            again.load_state_dict(loop.state_dict())


def test_a_state_from_before_there_were_lists_is_one_of_single_batches() -> None:
    loop = Loop(range(LENGTH), max_epochs=1)
    next(iter(loop))
    state = loop.state_dict()
    del state["batches_per_step"]
    again = Loop(range(LENGTH), max_epochs=1)
    again.load_state_dict(state)
    assert next(iter(again))[0] == 1


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_what_is_no_size_is_refused(value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^batches_per_step={value}: "):
        Loop(range(3), max_epochs=1, batches_per_step=value)
