"""The loop and its source: what is fetched when, lengths, errors, leaving and entering again."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dloop import (
    DataExhaustedError,
    DataLengthError,
    Event,
    Loop,
    LoopError,
    LoopEvents,
    LoopState,
    LoopWarning,
)

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)
NOT_ONCE_MORE = "an iterator that had ended was asked again"


class Batches:
    """The iterator of one epoch: notes every request, and refuses any after its end.

    What it finds among the batches that is an exception it raises; an interrupt only once.
    """

    def __init__(self, batches: Iterable[Any], notes: list[str]) -> None:
        self.batches = iter(batches)
        self.notes = notes
        self.ended = False
        self.closed = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        assert not self.ended, NOT_ONCE_MORE
        try:
            batch = next(self.batches)
        except StopIteration:
            self.ended = True
            self.notes.append("end")
            raise
        if isinstance(batch, KeyboardInterrupt) and batch.__traceback__ is not None:
            return next(self)
        if isinstance(batch, BaseException):
            self.notes.append("error")
            raise batch
        self.notes.append(f"next {batch}")
        return batch

    def close(self) -> None:
        self.closed = True


class Loader:
    """A loader without a length; each epoch takes the next of the given lists."""

    def __init__(self, *epochs: Iterable[Any]) -> None:
        self.epochs = epochs
        self.notes: list[str] = []
        self.iterators: list[Batches] = []

    def __iter__(self) -> Batches:
        self.notes.append("iter")
        epoch = self.epochs[len(self.iterators) % len(self.epochs)]
        self.iterators.append(Batches(epoch, self.notes))
        return self.iterators[-1]


class Sized(Loader):
    """A loader that promises a length, which may be wrong."""

    def __init__(self, *epochs: Iterable[Any], promise: int) -> None:
        super().__init__(*epochs)
        self.promise = promise

    def __len__(self) -> int:
        return self.promise


def single_pass(batches: Iterable[Any]) -> Batches:
    return Batches(batches, [])


def run(loop: Loop[Any], notes: list[str]) -> list[str]:
    """Run to the end: what was asked of the source, and when, with each step's marks."""
    for batch, events in loop:
        letters = "E" * (EPOCH_END in events) + "T" * (TRAINING_END in events)
        notes.append(f"body {batch} {letters}".rstrip())
    return notes


def batches_of(loop: Loop[Any]) -> list[Any]:
    return [batch for batch, _ in loop]


# What is fetched when


def test_nothing_is_iterated_before_the_first_request() -> None:
    loader = Loader([0, 1])
    loop = Loop(loader, max_epochs=1)
    run = iter(loop)
    assert loader.notes == []
    next(run)
    assert loader.notes != []


def test_without_a_length_the_loop_looks_one_batch_ahead() -> None:
    loader = Loader([0, 1])
    assert run(Loop(loader, max_epochs=2), loader.notes) == [
        *["iter", "next 0", "next 1", "body 0", "end", "body 1 E"],
        *["iter", "next 0", "next 1", "body 0", "end", "body 1 ET"],
    ]


def test_a_length_is_trusted_and_at_an_epochs_end_the_iterator_is_asked_once_more() -> None:
    loader = Sized([0, 1, 2], promise=3)
    assert run(Loop(loader, max_epochs=2), loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1", "next 2", "body 2 E", "end"],
        *["iter", "next 0", "body 0", "next 1", "body 1", "next 2", "body 2 ET", "end"],
    ]


def test_max_steps_fetches_nothing_after_the_last_step_of_a_sized_loader() -> None:
    loader = Sized([0, 1, 2], promise=3)
    assert run(Loop(loader, max_steps=5), loader.notes)[-5:] == [
        *["iter", "next 0", "body 0", "next 1", "body 1 T"],
    ]


@pytest.mark.parametrize(
    "given_",
    [
        {"max_steps": 2},
        {"max_seconds": 2},
        {"max_epochs": 1},
        {"max_epochs": 9, "stop_when": Event(at_step=1)},
    ],
    ids=repr,
)
@pytest.mark.parametrize("lookahead", [None, False])
def test_whatever_ends_the_run_at_an_epochs_end_its_iterator_is_asked_once_more(
    given_: dict[str, Any], lookahead: bool | None
) -> None:
    loader = Sized([0, 1], promise=2)
    loop = Loop(loader, clock=iter(range(9)).__next__, lookahead=lookahead, **given_)
    ended = ["iter", "next 0", "body 0", "next 1", "body 1 ET", "end"]
    assert run(loop, loader.notes) == ended


def test_stop_at_an_epochs_end_has_the_last_request_too() -> None:
    loader = Sized([0, 1], promise=2)
    loop = Loop(loader, max_epochs=9)
    loop.stop()
    assert run(loop, loader.notes) == ["iter", "next 0", "body 0 T"]
    loop.restart()
    loader.notes.clear()
    for batch, _ in loop:
        loader.notes.append(f"body {batch}")
        loop.stop()
    assert loader.notes == ["iter", "next 0", "body 0", "next 1", "body 1", "end"]


def test_who_leaves_at_the_last_batch_makes_no_last_request() -> None:
    loader = Sized([0, 1], promise=2)
    with Loop(loader, max_epochs=1) as loop:
        for _, events in loop:
            if TRAINING_END in events:
                break
    assert loader.notes == ["iter", "next 0", "next 1"]
    loader = Sized([0, 1], promise=2)
    loop = Loop(loader, max_epochs=2)
    for _, events in loop:
        if EPOCH_END in events:
            loop.close()
            break
    assert loader.notes == ["iter", "next 0", "next 1"]


def test_a_loader_that_does_something_at_its_end_does_it_after_the_last_body() -> None:
    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[int]:
            notes.append("begins")
            yield from range(2)
            notes.append("ends")

    notes: list[str] = []
    assert run(Loop(Loader(), max_epochs=2), notes) == [
        *["begins", "body 0", "body 1 E", "ends"],
        *["begins", "body 0", "body 1 ET", "ends"],
    ]


@pytest.mark.parametrize("sizes", [2, (2, 1), 64], ids=repr)
def test_the_last_request_comes_before_the_next_list(sizes: Any) -> None:
    loader = Sized([0, 1], promise=2)
    for batches, _ in Loop(loader, max_epochs=2).chunks(sizes):
        loader.notes.append(f"body {batches}")
    epoch = ["iter", "next 0", "next 1", "body [0, 1]", "end"]
    assert loader.notes == epoch * 2


def test_a_callable_is_called_after_the_last_request() -> None:
    notes: list[str] = []

    def source() -> Sized:
        notes.append("call")
        loader = Sized([0], promise=1)
        loader.notes = notes
        return loader

    epoch = ["call", "iter", "next 0"]
    expected = [*epoch, "body 0 E", "end", *epoch, "body 0 ET", "end"]
    assert run(Loop(source, max_epochs=2), notes) == expected


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_seconds": 3}])
def test_a_stream_is_taken_exactly_when_asked_for(limit: dict[str, int]) -> None:
    stream = single_pass(range(9))
    loop = Loop(stream, clock=iter(range(9)).__next__, **limit)  # type: ignore[arg-type]
    assert run(loop, stream.notes) == [
        *["next 0", "body 0", "next 1", "body 1", "next 2", "body 2 T"],
    ]


def test_the_length_of_a_stream_says_nothing_where_no_epoch_is_at_stake() -> None:
    class SizedStream(Batches):
        def __len__(self) -> int:
            return 2

    stream = SizedStream(range(9), [])
    notes = run(Loop(stream, max_steps=3), stream.notes)
    assert notes == ["next 0", "body 0", "next 1", "body 1", "next 2", "body 2 T"]


def test_the_one_epoch_of_a_stream_is_looked_ahead() -> None:
    stream = single_pass([0, 1])
    loop = Loop(stream, max_epochs=1)
    assert run(loop, stream.notes) == ["next 0", "next 1", "body 0", "end", "body 1 ET"]
    assert loop.stop_reason == "max_epochs"


def test_a_given_length_cuts_epochs_and_is_never_looked_beyond() -> None:
    loader = Loader([0, 1, 2, 3])
    assert run(Loop(loader, max_epochs=2, dataloader_len=2), loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1 E"],
        *["iter", "next 0", "body 0", "next 1", "body 1 ET"],
    ]


def test_an_endless_stream_has_epochs_of_the_given_length() -> None:
    stream = single_pass(iter(range(10**9)))
    assert run(Loop(stream, max_epochs=2, dataloader_len=2), stream.notes) == [
        *["next 0", "body 0", "next 1", "body 1 E", "next 2", "body 2", "next 3", "body 3 ET"],
    ]
    stream = single_pass(iter(range(10**9)))
    assert run(Loop(stream, max_steps=3, dataloader_len=2), stream.notes) == [
        *["next 0", "body 0", "next 1", "body 1 E", "next 2", "body 2 T"],
    ]


def test_lookahead_true_looks_at_every_step_and_ignores_len() -> None:
    expected = ["iter", "next 0", "next 1", "body 0", "end", "body 1 ET"]
    loader = Sized([0, 1], promise=7)
    assert run(Loop(loader, max_epochs=1, lookahead=True), loader.notes) == expected
    loader = Sized([0, 1], promise=1)
    assert run(Loop(loader, max_epochs=1, lookahead=True), loader.notes) == expected


def test_lookahead_true_forces_a_stream() -> None:
    stream = single_pass(range(9))
    assert run(Loop(stream, max_steps=2, lookahead=True), stream.notes) == [
        *["next 0", "next 1", "body 0", "next 2", "body 1 T"],
    ]


def test_lookahead_false_takes_exactly_n_batches_and_trusts_the_length() -> None:
    loader = Sized([0, 1], promise=2)
    loop = Loop(loader, max_steps=4, lookahead=False)
    assert run(loop, loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1 E", "end"],
        *["iter", "next 0", "body 0", "next 1", "body 1 ET", "end"],
    ]
    loader = Sized([0, 1], promise=2)
    loop = Loop(loader, max_steps=3, lookahead=False)
    assert run(loop, loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1 E", "end"],
        *["iter", "next 0", "body 0 T"],
    ]


def test_lookahead_false_without_a_length_gives_no_epochs_end() -> None:
    loader = Loader([0, 1])
    assert run(Loop(loader, max_steps=3, lookahead=False), loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1", "end"],
        *["iter", "next 0", "body 0 T"],
    ]


def test_lookahead_false_without_a_length_still_counts_epochs() -> None:
    loop = Loop(Loader([0, 1], [2]), max_steps=4, lookahead=False)
    places = [(loop.epoch, loop.global_step, loop.epoch_step) for _ in loop]
    assert places == [(0, 0, 0), (0, 1, 1), (1, 2, 0), (2, 3, 0)]


@given(LENGTHS, st.sampled_from([None, True]), st.booleans())
def test_every_batch_is_handed_over_exactly_once_and_in_order(
    lengths: list[int], lookahead: bool | None, sized: bool
) -> None:
    epochs = [[object() for _ in range(length)] for length in lengths]
    requests = iter(epochs)

    def source() -> Any:
        return next(requests) if sized else iter(next(requests))

    loop = Loop(source, max_epochs=len(lengths), lookahead=lookahead)
    wanted = [batch for epoch in epochs for batch in epoch]
    handed = batches_of(loop)
    assert all(batch is other for batch, other in zip(handed, wanted, strict=True))


def test_batches_may_be_anything() -> None:
    odd = [None, False, (), StopIteration, NotImplemented, LoopEvents.EPOCH_END]
    for lookahead in (None, True):
        for source in (odd, lambda: iter(odd)):
            handed = batches_of(Loop(source, max_epochs=1, lookahead=lookahead))
            assert all(batch is other for batch, other in zip(handed, odd, strict=True))


# Kinds of sources


def test_a_callable_gives_a_fresh_iterable_for_each_epoch() -> None:
    calls: list[list[int]] = []

    def source() -> list[int]:
        calls.append([len(calls)] * 2)
        return calls[-1]

    loop = Loop(source, max_epochs=3)
    assert calls == []
    assert batches_of(loop) == [0, 0, 1, 1, 2, 2]
    assert len(calls) == 3


def test_a_generator_function_is_a_source_of_many_epochs() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2

    loop = Loop(source, max_steps=5)
    assert run(loop, []) == ["body 1", "body 2 E", "body 1", "body 2 E", "body 1 T"]


def test_an_iterable_that_can_be_called_is_iterated() -> None:
    class Both(Loader):
        def __call__(self) -> list[int]:
            raise AssertionError("called")

    assert batches_of(Loop(Both([1, 2]), max_epochs=1)) == [1, 2]


def test_a_sequence_without_iter_is_iterable() -> None:
    class Old:
        def __getitem__(self, at: int) -> int:
            if at > 2:
                raise IndexError
            return at

    source: Any = Old()
    assert batches_of(Loop(source, max_epochs=2)) == [0, 1, 2, 0, 1, 2]


# Lengths that prove wrong


@pytest.mark.parametrize("lookahead", [None, False])
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 4}], ids=repr)
def test_what_is_more_than_the_length_is_dropped_with_a_warning_in_each_epoch(
    limit: dict[str, int], lookahead: bool | None
) -> None:
    loader = Sized([0, 1, 2, 3], promise=2)
    loop = Loop(loader, lookahead=lookahead, **limit)  # type: ignore[arg-type]
    with pytest.warns(LoopWarning) as caught:
        notes = run(loop, loader.notes)
    assert [str(warning.message) for warning in caught] == [
        f"epoch {epoch} had more than the 2 batches that len(dataloader) promised;"
        " the rest is dropped; pass lookahead=True to use it"
        for epoch in (0, 1)
    ]
    assert notes == [
        *["iter", "next 0", "body 0", "next 1", "body 1 E", "next 2"],
        *["iter", "next 0", "body 0", "next 1", "body 1 ET", "next 2"],
    ]


def test_every_loop_warns_of_its_own_longer_source() -> None:
    loader = Sized([0, 1], promise=1)
    for _ in range(2):
        with pytest.warns(LoopWarning, match="had more than the 1 batches"):
            assert batches_of(Loop(loader, max_epochs=1)) == [0]


@pytest.mark.parametrize(
    ("given_", "what"),
    [({}, "len(dataloader)"), ({"lookahead": False}, "len(dataloader)")]
    + [({"dataloader_len": 3, "lookahead": mode}, "dataloader_len") for mode in (None, False)],
)
def test_a_shorter_source_is_an_error_that_names_both_numbers(
    given_: dict[str, Any], what: str
) -> None:
    loader = Sized([0, 1, 2], [3, 4], promise=3)
    loop = Loop(loader, max_epochs=9, **given_)
    notes: list[str] = []
    with pytest.raises(DataLengthError) as caught:
        run(loop, notes)
    assert str(caught.value) == (
        f"epoch 1 ended after 2 of the 3 batches that {what} promised;"
        " pass lookahead=True to go by the data itself"
    )
    assert notes == ["body 0", "body 1", "body 2 E", "body 3", "body 4"]
    assert loop.stop_reason == "exception"


def test_lookahead_true_is_the_way_out_of_wrong_lengths() -> None:
    for promise in (1, 3):
        loader = Sized([0, 1], promise=promise)
        loop = Loop(loader, max_epochs=2, lookahead=True)
        assert run(loop, []) == ["body 0", "body 1 E", "body 0", "body 1 ET"]


def test_a_single_pass_source_with_a_length_is_never_asked_for_more() -> None:
    class SizedStream(Batches):
        def __len__(self) -> int:
            return 2

    stream = SizedStream(range(9), [])
    notes = run(Loop(stream, max_epochs=1), stream.notes)
    assert notes == ["next 0", "body 0", "next 1", "body 1 ET"]
    assert next(stream) == 2


class Unknown(Loader):
    """A loader whose `len()` raises."""

    def __init__(self, *epochs: Iterable[Any], error: BaseException) -> None:
        super().__init__(*epochs)
        self.error = error
        self.asked = 0

    def __len__(self) -> int:
        self.asked += 1
        raise self.error


LOOKED_AHEAD = ["iter", "next 0", "next 1", "body 0", "end", "body 1 E"]


@pytest.mark.parametrize("error", [TypeError("no length"), NotImplementedError("no length")])
def test_a_len_that_does_not_know_is_no_length(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Unknown([0, 1], error=error)
    with caplog.at_level(logging.INFO, "dloop"):
        notes = run(Loop(loader, max_epochs=2), loader.notes)
    assert notes == [*LOOKED_AHEAD, *LOOKED_AHEAD[:-1], "body 1 ET"]
    assert caplog.records == []


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by nought"), OSError("disk"), StopIteration()]
)
def test_a_len_that_fails_is_no_length_and_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Unknown([0, 1], error=error)
    with caplog.at_level(logging.INFO, "dloop"):
        notes = run(Loop(loader, max_epochs=2), loader.notes)
    assert notes == [*LOOKED_AHEAD, *LOOKED_AHEAD[:-1], "body 1 ET"]
    assert caplog.records
    assert {(record.name, record.levelno) for record in caplog.records} == {("dloop", logging.INFO)}
    assert "len" in caplog.records[0].getMessage()


def test_a_negative_length_is_no_length() -> None:
    loader = Sized([0, 1], promise=-1)
    assert run(Loop(loader, max_epochs=1), loader.notes) == [*LOOKED_AHEAD[:-1], "body 1 ET"]


def test_a_len_that_fails_is_not_asked_where_it_does_not_count() -> None:
    for given_ in ({"lookahead": True}, {"dataloader_len": 2}):
        arguments: dict[str, Any] = given_
        loader = Unknown([0, 1], error=OSError("disk"))
        batches_of(Loop(loader, max_epochs=2, **arguments))
        assert loader.asked == 0


def test_max_epochs_without_looking_ahead_refuses_a_len_that_fails() -> None:
    loader = Unknown([0, 1], error=OSError("disk"))
    with pytest.raises(ValueError, match="lookahead"):
        Loop(loader, max_epochs=1, lookahead=False)
    assert loader.notes == []


def test_a_length_that_is_too_long_for_len_is_never_reached() -> None:
    assert batches_of(Loop(range(2**70), max_steps=3)) == [0, 1, 2]


class IterableDataset:
    """What PyTorch's is: the name, and a `__getitem__` that its base class has."""

    def __getitem__(self, at: int) -> Any:
        raise NotImplementedError


class Subset(IterableDataset):
    pass


class Stream:
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated by itself")


@pytest.mark.parametrize("dataset", [Stream(), IterableDataset(), Subset()])
@pytest.mark.parametrize("promise", [0, 1, 3, 9])
def test_a_loader_over_an_iterable_style_data_set_has_no_length(dataset: Any, promise: int) -> None:
    loader = Sized([0, 1, 2], promise=promise)
    loader.dataset = dataset  # type: ignore[attr-defined]
    assert run(Loop(loader, max_epochs=1), loader.notes) == [
        *["iter", "next 0", "next 1", "body 0", "next 2", "body 1", "end", "body 2 ET"],
    ]


@pytest.mark.parametrize("dataset", [None, [1, 2], {"a": 1}])
def test_a_loader_over_any_other_data_set_has_its_length(dataset: Any) -> None:
    loader = Sized([0, 1, 2], promise=3)
    loader.dataset = dataset  # type: ignore[attr-defined]
    assert run(Loop(loader, max_epochs=1), loader.notes)[:3] == ["iter", "next 0", "body 0"]


# Loaders that say themselves which batch is an epoch's last


class SaysItsEnd(Loader):
    """Like a loader of Accelerate: it sets `end_of_dataloader` before it hands over the last."""

    end_of_dataloader = False

    def __init__(self, *epochs: Iterable[Any], says: int | None = None) -> None:
        super().__init__(*epochs)
        self.says = says  # after how many batches, if that is not the last

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        epoch = list(self.epochs[(len(self.iterators) - 1) % len(self.epochs)])
        last = len(epoch) if self.says is None else self.says
        return self.told(batches, last)

    def told(self, batches: Batches, last: int) -> Iterator[Any]:
        self.end_of_dataloader = False
        for number, batch in enumerate(batches, 1):
            self.end_of_dataloader = self.end_of_dataloader or number == last
            yield batch


class SizedSaysItsEnd(SaysItsEnd):
    def __len__(self) -> int:
        raise AssertionError("its length says nothing")


EPOCH_OF_TWO = ["iter", "next 0", "body 0", "next 1", "body 1 E", "end"]
LAST_EPOCH_OF_TWO = [*EPOCH_OF_TWO[:-2], "body 1 ET", "end"]


@pytest.mark.parametrize("lookahead", [None, False])
@pytest.mark.parametrize("kind", [SaysItsEnd, SizedSaysItsEnd])
@pytest.mark.parametrize("called", [False, True])
def test_a_loader_that_says_its_end_is_asked_and_nothing_is_looked_ahead(
    called: bool, kind: type[SaysItsEnd], lookahead: bool | None
) -> None:
    loader = kind([0, 1])
    source: Any = (lambda: loader) if called else loader
    loop = Loop(source, max_epochs=2, lookahead=lookahead)
    assert run(loop, loader.notes) == [*EPOCH_OF_TWO, *LAST_EPOCH_OF_TWO]


def test_a_loader_that_says_its_end_may_have_epochs_of_any_length() -> None:
    loop = Loop(SaysItsEnd([0, 1], [2], [3, 4, 5]), max_steps=7)
    assert run(loop, []) == [
        *["body 0", "body 1 E", "body 2 E", "body 3", "body 4", "body 5 E", "body 0 T"],
    ]


@pytest.mark.parametrize("sizes", [3, (4, 2, 1), 64], ids=repr)
def test_a_loader_that_says_its_end_closes_lists(sizes: Any) -> None:
    loader = SaysItsEnd(range(5), range(2))
    ends = []
    seen = []
    loop = Loop(loader, max_epochs=2)
    for batches, events in loop.chunks(sizes):
        seen += batches
        ends += [loop.global_step] * (EPOCH_END in events)
    assert seen == [*range(5), *range(2)]
    assert ends == [4, 6]


def test_lookahead_true_is_refused_for_a_loader_that_says_its_end() -> None:
    loader = SaysItsEnd([0, 1])
    with pytest.raises(ValueError, match="lookahead") as caught:
        Loop(loader, max_epochs=1, lookahead=True)
    assert "\n" not in str(caught.value)
    loop = Loop(lambda: loader, max_epochs=1, lookahead=True)
    with pytest.raises(ValueError, match="lookahead"):
        next(iter(loop))
    assert loader.notes == []


def test_a_given_length_goes_before_what_a_loader_says() -> None:
    loader = SaysItsEnd([0, 1, 2, 3], says=1)
    loop = Loop(loader, max_epochs=2, dataloader_len=2)
    assert run(loop, loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1 E"],
        *["iter", "next 0", "body 0", "next 1", "body 1 ET"],
    ]


@pytest.mark.parametrize("value", [None, 0, 1, "yes", lambda: True])
def test_what_is_no_bool_says_nothing(value: Any) -> None:
    loader = Loader([0, 1])
    loader.end_of_dataloader = value  # type: ignore[attr-defined]
    assert run(Loop(loader, max_epochs=1), loader.notes) == [*LOOKED_AHEAD[:-1], "body 1 ET"]


def test_what_a_loader_gives_after_its_end_is_dropped_with_a_warning() -> None:
    loader = SaysItsEnd([0, 1, 2, 3], says=2)
    with pytest.warns(LoopWarning) as caught:
        notes = run(Loop(loader, max_epochs=2), loader.notes)
    assert [str(warning.message) for warning in caught] == [
        f"epoch {epoch} had more batches after the one at which its loader's end_of_dataloader"
        " was true; the rest is dropped"
        for epoch in (0, 1)
    ]
    assert notes == [*EPOCH_OF_TWO[:-1], "next 2", *LAST_EPOCH_OF_TWO[:-1], "next 2"]


def test_a_loader_that_ends_without_having_said_so_is_an_error() -> None:
    loop = Loop(SaysItsEnd([0, 1], says=9), max_epochs=2)
    notes: list[str] = []
    with pytest.raises(DataLengthError) as caught:
        run(loop, notes)
    assert str(caught.value) == (
        "epoch 0 ended after 2 batches, but its loader's end_of_dataloader did not say so;"
        " pass dataloader_len"
    )
    assert notes == ["body 0", "body 1"]
    assert loop.stop_reason == "exception"


def test_a_loader_that_says_its_end_without_a_batch_is_an_error() -> None:
    with pytest.raises(DataExhaustedError, match="epoch 0 has no batch"):
        batches_of(Loop(SaysItsEnd([]), max_epochs=1))


# Sources without batches, and sources that run dry


def test_a_length_of_0_is_refused_without_iterating() -> None:
    loader = Sized([0], promise=0)
    loop = Loop(loader, max_epochs=1)
    with pytest.raises(DataExhaustedError) as caught:
        next(iter(loop))
    assert str(caught.value) == "epoch 0 has no batch: len(dataloader) is 0"
    assert loader.notes == []
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize(
    "source", [Loader([]), lambda: iter(()), iter([]), Sized([], promise=2)], ids=range(4)
)
@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 1}])
def test_a_source_without_a_batch_is_an_error(source: Any, limit: dict[str, int]) -> None:
    with pytest.raises(DataExhaustedError) as caught:
        batches_of(Loop(source, **limit))  # type: ignore[arg-type]
    text = "epoch 0 has no batch: the dataloader is empty or was consumed before"
    assert str(caught.value) == text


@pytest.mark.parametrize("lookahead", [None, True])
def test_a_later_epoch_without_a_batch_is_an_error_that_names_it(lookahead: bool | None) -> None:
    handed = []
    with pytest.raises(DataExhaustedError, match=r"^epoch 2 has no batch: "):
        for batch, _ in Loop(Loader([0], [1], []), max_epochs=5, lookahead=lookahead):
            handed.append(batch)
    assert handed == [0, 1]


def test_a_callable_that_returns_the_same_iterator_again_is_found_out() -> None:
    stream = iter([0, 1])
    with pytest.raises(DataExhaustedError, match=r"^epoch 1 has no batch: .* consumed before"):
        batches_of(Loop(lambda: stream, max_epochs=2))


def test_a_stream_that_runs_dry_ends_the_run_with_a_warning() -> None:
    stream = single_pass([0, 1, 2])
    loop = Loop(stream, max_steps=9)
    reasons = []
    with pytest.warns(LoopWarning) as caught:
        for _, events in loop:
            reasons.append(loop.stop_reason)
            assert not events
    assert [str(warning.message) for warning in caught] == [
        "the dataloader ran dry at global_step 2, before the run's limit"
    ]
    assert reasons == [None, None, None]
    assert loop.stop_reason == "exhausted"
    assert stream.notes == ["next 0", "next 1", "next 2", "end"]
    assert not loop.state.training_end
    with pytest.raises(LoopError, match="finished"):
        iter(loop)


def test_a_stream_that_runs_dry_under_lookahead_ends_with_its_last_batch() -> None:
    stream = single_pass([0, 1, 2])
    loop = Loop(stream, {"Save": Event(at_step=0) | TRAINING_END}, max_steps=9, lookahead=True)
    seen = []
    with pytest.warns(LoopWarning) as caught:
        for _, events in loop:
            seen.append((set(events), loop.stop_reason))
    assert seen == [
        ({"Save"}, None),
        (set(), None),
        ({"Save", EPOCH_END, TRAINING_END}, "exhausted"),
    ]
    assert [str(warning.message) for warning in caught] == [
        "the dataloader ran dry at global_step 2, before the run's limit"
    ]


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({"max_steps": 3}, "max_steps"),
        ({"max_steps": 9, "stop_when": Event(at_step=2)}, "stop_when"),
    ],
)
def test_a_stream_that_ends_where_training_ends_anyway_is_not_dry(
    given_: dict[str, Any], reason: str
) -> None:
    loop = Loop(single_pass([0, 1, 2]), lookahead=True, **given_)
    assert run(loop, []) == ["body 0", "body 1", "body 2 ET"]
    assert loop.stop_reason == reason


def test_a_stream_that_runs_dry_between_given_epochs_ends_the_run_with_a_warning() -> None:
    loop = Loop(single_pass(range(4)), max_epochs=3, dataloader_len=2)
    notes: list[str] = []
    with pytest.warns(LoopWarning, match="ran dry at global_step 3"):
        run(loop, notes)
    assert notes == ["body 0", "body 1 E", "body 2", "body 3 E"]
    assert loop.stop_reason == "exhausted"


def test_a_stream_that_runs_dry_within_a_given_epoch_is_an_error() -> None:
    loop = Loop(single_pass(range(5)), max_epochs=3, dataloader_len=2)
    with pytest.raises(DataLengthError, match=r"^epoch 2 ended after 1 of the 2 batches"):
        batches_of(loop)


# set_epoch


class Part:
    """A piece of a loader: notes each `set_epoch` under its name."""

    def __init__(self, name: str, calls: list[tuple[str, int]], **parts: Any) -> None:
        self.name = name
        self.calls = calls
        self.__dict__.update(parts)

    def set_epoch(self, epoch: int) -> None:
        self.calls.append((self.name, epoch))


class PartLoader(Part):
    def __iter__(self) -> Iterator[int]:
        self.calls.append(("iter", -1))
        return iter([1, 2])

    def __len__(self) -> int:
        self.calls.append(("len", -1))
        return 2


def test_set_epoch_reaches_every_part_once_per_epoch_in_order() -> None:
    calls: list[tuple[str, int]] = []
    data = Part("data", calls)
    inner = Part("inner sampler", calls, dataset=data)
    batch_sampler = Part("batch sampler", calls, sampler=inner)
    loader = PartLoader(
        "loader", calls, dataset=data, batch_sampler=batch_sampler, sampler=Part("sampler", calls)
    )
    data.dataset = loader  # type: ignore[attr-defined]
    # A cycle, and an object that is reached twice; neither has a __getitem__, so no len() either.
    assert batches_of(Loop(loader, max_epochs=2)) == [1, 2, 1, 2]
    names = ["loader", "sampler", "batch sampler", "inner sampler", "data"]
    expected = [(name, epoch) for epoch in (0, 1) for name in names]
    assert [call for call in calls if call[1] >= 0] == expected


def test_an_epoch_is_set_before_its_length_is_read_and_its_iterator_made() -> None:
    calls: list[tuple[str, int]] = []
    loop = Loop(PartLoader("loader", calls), max_epochs=2)
    calls.clear()
    batches_of(loop)
    expected = [("loader", 0), ("len", -1), ("iter", -1), ("loader", 1), ("len", -1), ("iter", -1)]
    assert list(dict.fromkeys(calls[:3])) == expected[:3]
    assert calls == expected


def test_a_length_that_depends_on_the_epoch_is_read_afresh() -> None:
    class Growing:
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return self.epoch + 1

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.epoch + 1))

    assert run(Loop(Growing(), max_epochs=3), []) == [
        *["body 0 E", "body 0", "body 1 E", "body 0", "body 1", "body 2 ET"],
    ]


def test_set_epoch_reaches_parts_that_loaders_without_it_hold() -> None:
    calls: list[tuple[str, int]] = []
    loader = Loader([0])
    loader.sampler = Part("sampler", calls)  # type: ignore[attr-defined]
    batches_of(Loop(loader, max_epochs=3))
    assert calls == [("sampler", 0), ("sampler", 1), ("sampler", 2)]


def test_set_epoch_is_called_on_what_a_callable_returned() -> None:
    calls: list[tuple[str, int]] = []
    made = iter(["first", "second"])
    assert batches_of(Loop(lambda: PartLoader(next(made), calls), max_epochs=2)) == [1, 2, 1, 2]
    assert [call for call in calls if call[1] >= 0] == [("first", 0), ("second", 1)]


def test_attributes_that_cannot_be_followed_do_no_harm() -> None:
    loader = Loader([0, 1])
    loader.__dict__.update(set_epoch=None, sampler=None, batch_sampler=3, dataset=[1])
    assert batches_of(Loop(loader, max_epochs=1)) == [0, 1]


# Exceptions from the source


@pytest.mark.parametrize(
    ("source", "before"),
    [
        (lambda wrong: Loader([wrong]), []),
        (lambda wrong: Loader([0, 1, wrong, 3]), ["body 0", "body 1"]),
        (lambda wrong: Sized([0, 1, wrong, 3], promise=4), ["body 0", "body 1"]),
        # in the last request
        (lambda wrong: Sized([0, 1, wrong], promise=2), ["body 0", "body 1 E"]),
        (lambda wrong: SaysItsEnd([0, 1, wrong], says=2), ["body 0", "body 1 E"]),
        (lambda wrong: Loader([0], [1, wrong]), ["body 0 E", "body 1"]),
        (lambda wrong: lambda: Batches([0, wrong], []), ["body 0"]),
    ],
    ids=range(7),
)
def test_an_exception_of_the_source_comes_out_unchanged_and_ends_the_run(
    source: Callable[[Exception], Any], before: list[str]
) -> None:
    wrong = OSError("disk")
    loop = Loop(source(wrong), max_epochs=2)
    notes: list[str] = []
    iterator = iter(loop)
    with pytest.raises(OSError) as caught:
        run(loop, notes)
    assert caught.value is wrong
    assert wrong.args == ("disk",) and wrong.__cause__ is None
    assert notes == before
    assert loop.stop_reason == "exception"
    assert loop.global_step == len(before) - 1
    with pytest.raises(LoopError, match="replaced"):
        next(iterator)


def test_an_exception_after_the_last_batch_of_the_run_comes_out() -> None:
    wrong = OSError("disk")
    loop = Loop(Sized([0, 1, wrong], promise=2), max_epochs=1, on_exception="event")
    notes: list[str] = []
    with pytest.raises(OSError) as caught:
        run(loop, notes)
    assert caught.value is wrong
    assert notes == ["body 0", "body 1 ET"]
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="ended with an exception"):
        iter(loop)


def test_an_error_met_ahead_comes_though_its_step_was_interrupted() -> None:
    struck: list[int] = []

    def condition(state: LoopState) -> bool:
        if state.global_step == 1 and not struck:
            struck.append(1)
            raise KeyboardInterrupt
        return False

    loop = Loop(Loader([0, 1, OSError("disk")]), {"C": Event(condition)}, max_epochs=1)
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    with pytest.raises(OSError, match="disk"):
        seen.extend(batch for batch, _ in loop)
    assert seen == [0, 1]


@pytest.mark.parametrize("lookahead", [None, True])
def test_of_the_errors_of_an_epoch_after_entering_again_the_second_is_believed(
    lookahead: bool | None,
) -> None:
    loader = Sized([0, 1, 2, OSError("disk")], promise=9)
    loop = Loop(loader, max_epochs=1, lookahead=lookahead)
    seen = [next(iter(loop))[0]]
    with pytest.raises(OSError, match="disk"):
        seen.extend(batch for batch, _ in loop)
    assert seen == [0, 1, 2]
    assert len(loader.iterators) == 2


class Tells(Loader):
    """A loader that says which batch is its last, as Accelerate's do; rightly or not."""

    end_of_dataloader = False

    def __init__(self, *batches: Any, last: Any) -> None:
        super().__init__(batches)
        self.last = last

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.end_of_dataloader = False
        for batch in super().__iter__():
            self.end_of_dataloader = batch == self.last
            yield batch


def test_a_loader_that_says_which_batch_is_its_last_is_asked() -> None:
    loader = Tells(0, 1, 2, last=2)
    assert run(Loop(loader, max_epochs=1), loader.notes) == [
        *["iter", "next 0", "body 0", "next 1", "body 1", "next 2", "body 2 ET", "end"],
    ]


def test_a_loader_that_does_not_say_its_last_batch_is_an_error() -> None:
    notes: list[str] = []
    with pytest.raises(DataLengthError, match="ended after 2 batches, but its loader's end_of"):
        run(Loop(Tells(0, 1, last=5), max_epochs=1), notes)
    assert notes == ["body 0", "body 1"]


def test_batches_after_the_one_that_was_said_to_be_the_last_are_dropped_with_a_warning() -> None:
    with pytest.warns(LoopWarning, match="epoch 0 had more batches after the one"):
        assert batches_of(Loop(Tells(0, 1, 2, last=1), max_epochs=1)) == [0, 1]


def test_a_loader_that_looks_ahead_itself_refuses_lookahead() -> None:
    with pytest.raises(ValueError, match="lookahead=True: this dataloader looks ahead itself"):
        Loop(Tells(0, last=0), max_epochs=1, lookahead=True)


@pytest.mark.parametrize("lookahead", [None, True, False])
def test_after_an_exception_asking_for_more_raises_from_the_first(lookahead: bool | None) -> None:
    wrong = OSError("disk")
    source = Sized([0, wrong, 2, 3], promise=4)
    loop = Loop(source, max_epochs=1, lookahead=lookahead)
    iterator = iter(loop)
    next(iterator)
    with pytest.raises(OSError):
        next(iterator)
    for ask in (next, next, lambda _: iter(loop), lambda _: batches_of(loop)):
        with pytest.raises(LoopError) as caught:
            ask(iterator)
        text = "this run ended with an exception; restart() begins a new one"
        assert str(caught.value) == text
        assert caught.value.__cause__ is wrong
    assert source.notes == ["iter", "next 0", "error"]


def test_an_exception_met_while_looking_ahead_comes_after_the_batch_in_hand() -> None:
    loader = Loader([0, 1, OSError("disk")])
    loop = Loop(loader, {"Log": Event(every_n_steps=2)}, max_epochs=1)
    iterator = iter(loop)
    next(iterator)
    batch, events = next(iterator)
    assert (batch, events) == (1, {"Log"})
    assert loader.notes[-1] == "error"
    assert loop.stop_reason is None
    with pytest.raises(OSError):
        next(iterator)


def test_an_exception_met_while_looking_beyond_the_last_step_never_comes() -> None:
    loop = Loop(Loader([0, 1, OSError("disk")]), max_steps=2)
    assert run(loop, []) == ["body 0", "body 1 T"]
    assert loop.stop_reason == "max_steps"


def asked_once_more(*wrong: Any) -> Sized:
    """A loader whose last request in each epoch, and what comes after it, is this."""
    return Sized([0, 1, *wrong], promise=2)


@pytest.mark.parametrize("on_exception", ["raise", "event"])
def test_an_error_in_the_last_request_of_a_run_ends_it_as_a_failure(on_exception: str) -> None:
    wrong = OSError("disk")
    loop = Loop(asked_once_more(wrong), max_epochs=1, on_exception=on_exception)
    iterator = iter(loop)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    assert loop.stop_reason == "max_epochs"
    with pytest.raises(OSError) as caught:  # it becomes no event: the last step has gone by
        next(iterator)
    assert caught.value is wrong
    assert loop.stop_reason == "exception"
    assert loop.state.training_end
    for ask in (lambda: next(iterator), lambda: iter(loop)):
        with pytest.raises(LoopError) as later:
            ask()
        assert later.value.__cause__ is wrong
    loop.restart()
    assert next(iter(loop))[0] == 0


def test_an_error_in_the_last_request_of_an_epoch_becomes_an_event() -> None:
    loop = Loop(asked_once_more(OSError("disk")), max_epochs=2, on_exception="event")
    steps = []
    with pytest.raises(OSError, match="disk"):
        for batch, events in loop:
            steps.append((batch, set(events)))
    assert steps == [
        *((0, set()), (1, {EPOCH_END})),
        (None, {LoopEvents.EXCEPTION, TRAINING_END}),
    ]


def test_an_error_in_the_last_request_is_logged_after_the_loop_was_entered_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = asked_once_more(OSError("disk"))
    loop = Loop(loader, max_epochs=2)
    for _, events in loop:
        if EPOCH_END in events:
            break
    with caplog.at_level(logging.INFO, "dloop"):
        assert next(iter(loop))[0] == 0
    assert loader.notes == ["iter", "next 0", "next 1", "error", "iter", "next 0"]
    assert "disk" in caplog.text or "OSError" in caplog.text
    assert {(record.name, record.levelno) for record in caplog.records} == {("dloop", logging.INFO)}


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which would end pytest where a test fails."""


def test_an_interrupt_in_the_last_request_of_an_epoch_is_not_made_up_for() -> None:
    loader = asked_once_more(Interrupt())
    loop = Loop(loader, max_epochs=2)
    iterator = iter(loop)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(Interrupt):
        next(iterator)
    assert loop.stop_reason is None
    assert next(iterator)[0] == 0
    assert (loop.epoch, loop.global_step) == (1, 2)
    assert loader.notes == ["iter", "next 0", "next 1", "error", "iter", "next 0"]


def test_an_interrupt_in_the_last_request_of_a_run_leaves_it_finished() -> None:
    loader = asked_once_more(Interrupt())
    loop = Loop(loader, max_epochs=1)
    iterator = iter(loop)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(Interrupt):
        next(iterator)
    assert loop.stop_reason == "max_epochs"
    assert list(iterator) == []
    with pytest.raises(LoopError, match="this run is finished"):
        iter(loop)
    assert loader.notes == ["iter", "next 0", "next 1", "error"]


class Fails(Loader):
    """A loader of which one method fails from the second epoch on."""

    def __init__(self, where: str, wrong: BaseException) -> None:
        super().__init__([0, 1])
        self.where = where
        self.wrong = wrong

    def check(self, where: str) -> None:
        if where == self.where and self.iterators:
            raise self.wrong

    def set_epoch(self, epoch: int) -> None:
        self.check("set_epoch")

    def __len__(self) -> int:
        self.check("len")
        return 2

    def __iter__(self) -> Batches:
        self.check("iter")
        return super().__iter__()

    def call(self) -> Loader:
        self.check("call")
        return self


@pytest.mark.parametrize("where", ["set_epoch", "iter", "call"])
def test_an_exception_while_an_epoch_is_opened_comes_out_unchanged(where: str) -> None:
    wrong = OSError("disk")
    loader = Fails(where, wrong)
    loop = Loop(loader.call if where == "call" else loader, max_epochs=2)
    notes: list[str] = []
    with pytest.raises(OSError) as caught:
        run(loop, notes)
    assert caught.value is wrong
    assert notes == ["body 0", "body 1 E"]
    assert (loop.stop_reason, loop.global_step) == ("exception", 1)
    with pytest.raises(LoopError) as later:
        iter(loop)
    assert later.value.__cause__ is wrong


@pytest.mark.parametrize("where", ["set_epoch", "iter", "call"])
def test_a_stray_stop_iteration_does_not_end_the_loop_in_silence(where: str) -> None:
    loader = Fails(where, StopIteration("stray"))
    loop = Loop(loader.call if where == "call" else loader, max_epochs=2)
    with pytest.raises(RuntimeError) as caught:
        batches_of(loop)
    assert caught.value.__cause__ is loader.wrong


def raise_stop_iteration(state: LoopState | None = None) -> bool:
    raise StopIteration("stray")


@pytest.mark.parametrize(
    "given_",
    [
        {"max_steps": 3, "events": {"Log": Event(raise_stop_iteration)}},
        {"max_steps": 3, "stop_when": Event(raise_stop_iteration)},
        {"max_steps": 3, "clock": raise_stop_iteration},
        {"max_seconds": 3, "clock": iter([0, 1]).__next__},
    ],
    ids=range(4),
)
def test_a_stray_stop_iteration_of_a_callable_does_not_end_the_loop_in_silence(
    given_: dict[str, Any],
) -> None:
    loop = Loop([0] * 9, **given_)
    with pytest.raises(RuntimeError) as caught:
        batches_of(loop)
    assert isinstance(caught.value.__cause__, StopIteration)
    assert loop.stop_reason == "exception"


# Leaving the for early, and entering it again


@pytest.mark.parametrize("lookahead", [None, True])
@given(lengths=LENGTHS, pauses=st.lists(st.integers(1, 4), max_size=9))
def test_leaving_and_entering_again_changes_nothing(
    lookahead: bool | None, lengths: list[int], pauses: list[int]
) -> None:
    def new() -> Loop[Any]:
        epochs = iter(range(length) for length in lengths)
        events = {"Three": Event(every_n_steps=3), "Timer": Event(every_n_seconds=2.5)}
        clock = iter(range(99)).__next__
        source = map(iter, epochs).__next__
        return Loop(source, events, max_epochs=len(lengths), lookahead=lookahead, clock=clock)

    def take(loop: Loop[Any], at_most: int = 10**9) -> Iterator[Any]:
        for _, (batch, events) in zip(range(at_most), loop, strict=False):
            yield batch, frozenset(events), loop.state

    expected = list(take(new()))
    loop, found = new(), []
    for pause in pauses:
        if loop.stop_reason is None:
            for batch, events in loop:
                found.append((batch, frozenset(events), loop.state))
                pause -= 1
                if pause == 0:
                    break
    if loop.stop_reason is None:
        found += take(loop)
    assert found == expected


@pytest.mark.parametrize("wrong", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_an_exception_in_the_body_leaves_the_run_as_it_was(wrong: type[BaseException]) -> None:
    loader = Loader([0, 1, 2])
    loop = Loop(loader, max_epochs=1)
    with pytest.raises(wrong):
        for batch, _ in loop:
            if batch == 1:
                raise wrong
    assert loop.stop_reason is None
    assert loop.global_step == 1
    assert batches_of(loop) == [2]
    assert loader.notes == ["iter", "next 0", "next 1", "next 2", "end"]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("lookahead", [None, True, False])
def test_an_interrupted_fetch_loses_neither_batch_nor_event(
    lookahead: bool | None, at: int
) -> None:
    batches: list[Any] = [0, 1, 2]
    batches.insert(at, KeyboardInterrupt())
    loader = Sized(batches, promise=3)
    loop = Loop(loader, {"E": Event(every_n_steps=2)}, max_epochs=1, lookahead=lookahead)
    handed: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        for batch, events in loop:
            handed.append((batch, set(events)))
    assert loop.stop_reason is None
    assert loop.global_step == len(handed) - 1
    for batch, events in loop:
        handed.append((batch, set(events)))
    assert handed == [(0, set()), (1, {"E"}), (2, {EPOCH_END, TRAINING_END})]
    assert loader.notes.count("error") == 1


def test_the_same_iterator_goes_on_after_an_interrupted_fetch() -> None:
    iterator = iter(Loop(Loader([0, KeyboardInterrupt(), 1]), max_epochs=1))
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert [batch for batch, _ in iterator] == [0, 1]


@pytest.mark.parametrize("where", ["condition", "stop_when", "clock"])
def test_an_interrupted_condition_or_clock_loses_neither_batch_nor_event(where: str) -> None:
    pending = [1, 2]
    loader = Sized(range(3), promise=3)

    def interrupt(part: str, step: int) -> None:
        if part == where and step in pending:
            pending.remove(step)
            raise KeyboardInterrupt

    def condition(state: LoopState) -> bool:
        interrupt("condition", state.global_step)
        return state.global_step == 2

    def stop_when(state: LoopState) -> None:
        interrupt("stop_when", state.global_step)

    def clock() -> float:
        fetched = sum(note.startswith("next") for note in loader.notes)
        interrupt("clock", fetched - 1)
        return 5 * fetched

    events = {"C": Event(condition), "S": Event(at_step=1), "T": Event(every_n_seconds=10)}
    loop = Loop(loader, events, max_epochs=1, stop_when=Event(stop_when), clock=clock)
    handed: list[Any] = []
    for _ in range(3):
        try:
            handed += ((batch, loop.global_step, set(due)) for batch, due in loop)
        except KeyboardInterrupt:
            assert loop.stop_reason is None
    assert pending == []
    assert handed == [(0, 0, set()), (1, 1, {"S", "T"}), (2, 2, {"C", EPOCH_END, TRAINING_END})]
    assert loader.notes == ["iter", "next 0", "next 1", "next 2", "end"]


@pytest.mark.parametrize("where", ["set_epoch", "len", "iter", "call"])
def test_an_interrupted_opening_of_an_epoch_is_made_up_for(where: str) -> None:
    loader = Fails(where, KeyboardInterrupt())
    loop = Loop(loader.call if where == "call" else loader, max_epochs=2)
    handed: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        for batch, _ in loop:
            handed.append((loop.epoch, batch))
    loader.where = "nowhere"
    for batch, _ in loop:
        handed.append((loop.epoch, batch))
    assert handed == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_entering_again_takes_over_from_the_older_iterator() -> None:
    loader = Sized(range(5), promise=5)
    loop = Loop(loader, max_epochs=1)
    old = iter(loop)
    next(old)
    new = iter(loop)
    for _ in range(2):
        with pytest.raises(LoopError) as caught:
            next(old)
        assert str(caught.value) == "this iterator was replaced: the loop was entered again"
    assert loader.notes == ["iter", "next 0"]
    assert [batch for batch, _ in new] == [1, 2, 3, 4]
    with pytest.raises(LoopError):
        next(old)


def test_a_loop_inside_its_own_body_takes_over() -> None:
    loop = Loop(range(5), max_epochs=1)
    inner: list[int] = []
    with pytest.raises(LoopError, match="replaced"):
        for _ in loop:
            for batch, _ in loop:
                inner.append(batch)
                if batch == 2:
                    break
    assert inner == [1, 2]
    assert batches_of(loop) == [3, 4]


def test_the_iterator_is_its_own_iterator() -> None:
    loop = Loop(range(4), max_epochs=1)
    iterator = iter(loop)
    assert iter(iterator) is iterator
    next(iterator)
    assert [batch for batch, _ in iterator] == [1, 2, 3]


# Iterators that an exception has ended, which nobody can see


class Mapped:
    """Each iterator is a map over a generator; some of all the fetches raise something."""

    def __init__(self, length: int, raises: dict[int, BaseException]) -> None:
        self.length = length
        self.raises = raises
        self.fetches = 0
        self.iterators = 0

    def fetch(self) -> None:
        self.fetches += 1
        error = self.raises.get(self.fetches - 1)
        if error is not None:
            raise error

    def generate(self) -> Iterator[int]:
        for number in range(self.length):
            self.fetch()
            yield number
        self.fetch()

    def __iter__(self) -> Iterator[int]:
        self.iterators += 1
        return map(int, self.generate())


class SizedMapped(Mapped):
    def __len__(self) -> int:
        return self.length


MAPPED: dict[str, Callable[..., Any]] = {
    "an iterable": lambda *given_: (source := Mapped(*given_), source),
    "an iterable with a length": lambda *given_: (source := SizedMapped(*given_), source),
    "a callable": lambda *given_: (source := Mapped(*given_), source.__iter__),
    "a callable of a loader": lambda *given_: (source := SizedMapped(*given_), lambda: source),
}
mapped = pytest.mark.parametrize("kind", MAPPED)
entered = pytest.mark.parametrize("sizes", [None, 2, (3, 1)], ids=repr)


def cell(loop: Loop[Any], sizes: Any, seen: list[Any], ends: list[int]) -> None:
    """Enter the loop, as a cell of a notebook does that is run again."""
    for batch, events in loop if sizes is None else loop.chunks(sizes):
        seen += [batch] if sizes is None else batch
        ends += [loop.global_step] * (EPOCH_END in events)


@mapped
@entered
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("at", range(9))
def test_an_iterator_that_an_interrupt_has_ended_is_made_anew(
    kind: str, sizes: Any, lookahead: bool | None, at: int
) -> None:
    source, dataloader = MAPPED[kind](3, {at: KeyboardInterrupt()})
    loop = Loop(dataloader, max_epochs=2, lookahead=lookahead)
    seen: list[Any] = []
    ends: list[int] = []
    try:
        cell(loop, sizes, seen, ends)
    except KeyboardInterrupt:
        if loop.stop_reason is None:
            cell(loop, sizes, seen, ends)
    assert seen == [0, 1, 2] * 2
    assert ends == [2, 5]
    assert loop.stop_reason == "max_epochs"
    assert source.fetches > at - 1


@pytest.mark.parametrize("size", [None, 2, 3])
@pytest.mark.parametrize("at", range(6))
def test_an_epoch_may_have_a_length_when_it_is_opened_anew(at: int, size: int | None) -> None:
    batches: list[Any] = list(range(6))
    batches.insert(at, KeyboardInterrupt())
    loaders = iter([Loader(batches), list(range(6))])
    loop: Loop[Any] = Loop(lambda: next(loaders), max_epochs=1, batches_per_step=size)
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    seen += [batch for batch, _ in loop]
    whole = list(range(6))
    assert seen == (whole if size is None else [whole[i : i + size] for i in range(0, 6, size)])
    assert loop.stop_reason == "max_epochs"


@mapped
@entered
def test_an_iterator_that_is_made_anew_after_an_interrupt_may_fail(kind: str, sizes: Any) -> None:
    # 0, 1, the interrupt; anew 0, and at what was batch 1 the second failure
    source, dataloader = MAPPED[kind](5, {2: KeyboardInterrupt(), 4: OSError("disk")})
    loop = Loop(dataloader, max_epochs=2)
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        cell(loop, sizes, seen, [])
    with pytest.raises(OSError):
        cell(loop, sizes, seen, [])
    assert seen == list(range(len(seen)))
    assert source.iterators == 2
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 9}])
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("wrong", [None, OSError("disk")], ids=["ends", "fails"])
def test_a_single_pass_source_that_an_interrupt_has_ended_is_an_error(
    limit: dict[str, int], lookahead: bool | None, wrong: Exception | None
) -> None:
    batches: list[Any] = [0, 1, 2, KeyboardInterrupt(), *([] if wrong is None else [wrong])]
    loop = Loop(single_pass(batches), lookahead=lookahead, **limit)  # type: ignore[arg-type]
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        cell(loop, None, seen, [])
    with pytest.raises(LoopError, match="single-pass") as caught:
        cell(loop, None, seen, [])
    assert wrong is None or caught.value.__cause__ is wrong
    assert seen == [0, 1, 2]
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="restart"):
        iter(loop)


class Workers:
    """A loader with workers: once they are killed, its iterator fails at every fetch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.iterators = 0
        self.killed = False
        self.stays_broken = False

    def __iter__(self) -> Iterator[int]:
        self.iterators += 1
        self.killed = self.stays_broken
        return WorkersIterator(self)


class WorkersIterator:
    def __init__(self, loader: Workers) -> None:
        self.loader = loader
        self.place = 0

    def __iter__(self) -> WorkersIterator:
        return self

    def __next__(self) -> int:
        if self.loader.killed:
            raise RuntimeError("a worker is dead")
        if self.place == self.loader.length:
            raise StopIteration
        self.place += 1
        return self.place - 1


class SizedWorkers(Workers):
    def __len__(self) -> int:
        return self.length


def train(loop: Loop[Any], seen: list[Any], strike: Callable[[], object]) -> None:
    """A cell whose body is interrupted at the third step, which kills the loader's workers."""
    for batch, _ in loop:
        seen.append(batch)
        if len(seen) == 3:
            strike()
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [Workers, SizedWorkers])
def test_workers_that_an_interrupt_in_the_body_has_killed_are_made_anew(
    kind: type[Workers],
) -> None:
    loader = kind(5)
    loop = Loop(loader, max_epochs=2)
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        train(loop, seen, lambda: setattr(loader, "killed", True))
    train(loop, seen, int)
    assert seen == [0, 1, 2, 3, 4] * 2
    assert loader.iterators == 3


@pytest.mark.parametrize("kind", [Workers, SizedWorkers])
def test_workers_that_fail_again_are_an_error(kind: type[Workers]) -> None:
    loader = kind(5)
    loop = Loop(loader, max_epochs=2)
    seen: list[Any] = []

    def strike() -> None:
        loader.killed = loader.stays_broken = True

    with pytest.raises(KeyboardInterrupt):
        train(loop, seen, strike)
    with pytest.raises(RuntimeError, match="a worker is dead"):
        train(loop, seen, int)
    assert loader.iterators == 2
    assert loop.stop_reason == "exception"


def test_an_error_without_an_interrupt_is_believed() -> None:
    loader = Workers(5)
    loop = Loop(loader, max_epochs=2)
    with pytest.raises(RuntimeError, match="a worker is dead"):
        for batch, _ in loop:
            loader.killed = batch == 2
    assert loader.iterators == 1


def test_workers_whose_death_shows_some_batches_later_are_made_anew() -> None:
    """As with PyTorch's, which have batches ready in advance."""
    loader = SizedWorkers(5)
    loop = Loop(loader, max_epochs=2)
    seen = [next(iter(loop))[0]]
    for batch, _ in loop:
        seen.append(batch)
        loader.killed = len(seen) == 3
    assert seen == [0, 1, 2, 3, 4] * 2
    assert loader.iterators == 3


def test_an_error_in_an_epoch_after_the_one_that_was_left_is_believed() -> None:
    loader = SizedWorkers(5)
    loop = Loop(loader, max_epochs=2)
    next(iter(loop))
    with pytest.raises(RuntimeError, match="a worker is dead"):
        for _ in loop:
            loader.killed = loop.global_step == 6
    assert loader.iterators == 2


@pytest.mark.parametrize("lookahead", [None, True])
def test_an_end_is_believed_after_the_loop_was_entered_again(lookahead: bool | None) -> None:
    loader = Loader([0, 1, 2])
    loop = Loop(loader, max_epochs=1, lookahead=lookahead)
    next(iter(loop))
    assert batches_of(loop) == [1, 2]
    assert loader.notes == ["iter", "next 0", "next 1", "next 2", "end"]


# How far set_epoch is looked for


class Bottomless:
    """Has every attribute, each another such object, like a MagicMock. There are not too many."""

    made = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        Bottomless.made += 1
        assert Bottomless.made < 5000, "its attributes are followed without end"
        self.__dict__[name] = Bottomless()
        return self.__dict__[name]

    def __call__(self, *_: Any) -> None:
        """As `set_epoch`."""


class BottomlessLoader(Bottomless):
    def __iter__(self) -> Iterator[int]:
        return iter([0, 1])


def test_a_loader_that_has_every_attribute_is_followed_few_levels() -> None:
    Bottomless.made = 0
    assert batches_of(Loop(BottomlessLoader(), max_epochs=2)) == [0, 1, 0, 1]


def test_set_epoch_is_found_a_few_levels_down() -> None:
    calls: list[tuple[str, int]] = []
    below = Part("third", calls)
    for name in ("second", "first"):
        below = Part(name, calls, dataset=below)
    loader = Loader([0])
    loader.dataset = below  # type: ignore[attr-defined]
    batches_of(Loop(loader, max_epochs=1))
    assert calls == [("first", 0), ("second", 0), ("third", 0)]


# with


def test_leaving_the_with_closes_the_sources_iterator_and_ends_the_run() -> None:
    loader = Loader(range(5))
    with Loop(loader, max_epochs=2) as loop:
        assert isinstance(loop, Loop)
        iterator = iter(loop)
        next(iterator)
        assert not loader.iterators[0].closed
    assert loader.iterators[0].closed
    for ask in (lambda: next(iterator), lambda: iter(loop)):
        with pytest.raises(LoopError) as caught:
            ask()
        assert str(caught.value) == "this loop was closed; restart() begins a new run"


def test_the_with_gives_the_loop_itself() -> None:
    loop = Loop([0], max_steps=1)
    with loop as given_:
        assert given_ is loop


def test_leaving_the_with_closes_generators() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append("closed")

    with Loop(source, max_epochs=1) as loop:
        kept = iter(loop)
        next(kept)
        assert closed == []
    assert closed == ["closed"]


def test_the_with_never_closes_an_iterator_that_is_the_users_own() -> None:
    stream = single_pass(range(5))
    with Loop(stream, max_steps=5) as loop:
        next(iter(loop))
    assert not stream.closed
    assert next(stream) == 1


def test_the_with_swallows_nothing() -> None:
    loader = Loader(range(5))
    with pytest.raises(ZeroDivisionError), Loop(loader, max_epochs=1) as loop:
        for _ in loop:
            raise ZeroDivisionError
    assert loader.iterators[0].closed


def test_a_with_around_a_run_that_came_to_its_end_or_never_began_is_quiet() -> None:
    with Loop([0, 1], max_epochs=1) as loop:
        assert batches_of(loop) == [0, 1]
    assert loop.stop_reason == "max_epochs"
    with Loop([0, 1], max_epochs=1):
        pass


def test_restart_begins_a_new_run_of_a_closed_loop() -> None:
    loop = Loop([0, 1], max_epochs=1)
    with loop:
        next(iter(loop))
    loop.restart()
    assert batches_of(loop) == [0, 1]


# Subclasses


def test_a_loop_can_be_subclassed() -> None:
    class Named(Loop[int]):
        def __init__(self, source: Iterable[int], name: str, **given_: Any) -> None:
            super().__init__(source, **given_)
            self.name = name

        def __iter__(self) -> Iterator[Any]:
            self.entered = True
            return super().__iter__()

    loop = Named([1, 2], "mine", max_epochs=1)
    assert batches_of(loop) == [1, 2]
    assert (loop.name, loop.entered, loop.stop_reason) == ("mine", True, "max_epochs")


def test_the_errors_are_runtime_errors_and_loop_errors() -> None:
    assert issubclass(LoopError, RuntimeError)
    assert issubclass(DataLengthError, LoopError)
    assert issubclass(DataExhaustedError, LoopError)
    assert issubclass(LoopWarning, UserWarning)


@pytest.mark.parametrize("strike", ["set_epoch", "iter", "call"])
def test_an_interrupted_start_of_an_epoch_is_made_up_for(strike: str) -> None:
    strikes = [KeyboardInterrupt]

    class Interrupted:
        def __init__(self, place: str) -> None:
            self.place = place

        def reach(self, place: str, epoch: int) -> None:
            if place == self.place and epoch and strikes:
                raise strikes.pop()

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch
            self.reach("set_epoch", epoch)

        def __iter__(self) -> Iterator[int]:
            self.reach("iter", self.epoch)
            return iter([0, 1, 2])

    calls: list[int] = []

    def load() -> Interrupted:
        calls.append(len(calls))
        loader = Interrupted("")
        if len(calls) > 1 and strikes:
            raise strikes.pop()
        return loader

    loop = Loop(load if strike == "call" else Interrupted(strike), max_steps=6, lookahead=False)
    batches: list[int] = []
    iterator = iter(loop)
    for _ in range(3):
        batches.append(next(iterator)[0])
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    batches += [batch for batch, _ in iterator]
    assert batches == [0, 1, 2, 0, 1, 2]
    assert not strikes


@pytest.mark.parametrize("struck", range(1, 7))
def test_a_clock_that_is_interrupted_loses_no_batch(struck: int) -> None:
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        if readings == struck + 1:
            raise KeyboardInterrupt
        return float(readings)

    loop = Loop(range(6), {"Rare": Event(every_n_seconds=1000)}, max_epochs=1, clock=clock)
    batches: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for batch, _ in loop:
            batches.append(batch)
    assert batches == list(range(struck - 1))
    batches += [batch for batch, _ in loop]
    assert batches == list(range(6))


def test_an_endless_length_does_not_hide_the_limit() -> None:
    class Endless(list[int]):
        def __len__(self) -> int:
            return sys.maxsize

    loaders = iter([[0, 1], Endless(range(50))])
    asked: list[int] = []
    holds = Event(lambda state: asked.append(state.global_step))
    loop = Loop(lambda: next(loaders), {"Ask": holds}, max_steps=10)
    assert len(list(loop)) == 10
    assert asked == list(range(10))


@pytest.mark.parametrize(("close", "text"), [(True, "closed"), (False, "replaced")])
def test_a_condition_may_close_or_restart_the_loop(close: bool, text: str) -> None:
    def end(state: LoopState) -> bool:
        if state.global_step == 2:
            loop.close() if close else loop.restart()
        return False

    loop: Loop[int] = Loop(range(5), {"End": Event(end)}, max_epochs=1)
    batches: list[int] = []
    with pytest.raises(LoopError, match=text):
        for batch, _ in loop:
            batches.append(batch)
    assert batches == [0, 1]


def test_after_a_failed_step_the_state_has_the_reading_of_the_one_before() -> None:
    readings = iter(range(0, 1000, 10))

    def fail(state: LoopState) -> bool:
        raise OSError("disk")

    loop = Loop(
        range(9), {"Fail": Event(fail, from_step=3)}, max_seconds=500, clock=readings.__next__
    )
    with pytest.raises(OSError, match="disk"):
        list(loop)
    assert (loop.state.global_step, loop.state.elapsed) == (2, 30.0)


def test_how_many_batches_come_goes_by_the_length_and_none_come_after_closing() -> None:
    loop = Loop(Sized([0, 1, 2, 3, 4], promise=3), max_epochs=1)
    with pytest.warns(LoopWarning, match="had more than the 3"):
        assert [len(loop) for _ in loop] == [2, 1, 0]
    many = Loop([1, 2, 3], max_epochs=2**62, stop_when=Event(at_step=5))
    assert len(list(many)) == 6
    with Loop([1, 2, 3], max_epochs=1) as closed:
        next(iter(closed))
        assert len(closed) == 2
    assert len(closed) == 0


def test_a_loop_that_is_only_made_does_not_ask_for_the_length() -> None:
    loader = Unknown([0, 1], error=OSError("disk"))
    loop = Loop(loader, max_steps=1)
    iter(loop)
    assert loader.asked == 0
    assert next(iter(loop))[0] == 0


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="reference counts")
@pytest.mark.parametrize("end", ["limit", "error", "condition", "epoch"])
def test_the_iterator_of_an_epoch_is_let_go_with_it(end: str) -> None:
    notes: list[str] = []

    def load() -> Iterator[int]:
        notes.append("open")
        try:
            yield from range(4)
            raise OSError("disk")
        finally:
            notes.append("close")

    if end == "limit":
        list(Loop(load, max_steps=2))
        assert notes == ["open", "close"]
    elif end == "error":
        with pytest.raises(OSError, match="disk"):
            list(Loop(load, max_steps=9))
        assert notes == ["open", "close"]
    elif end == "condition":

        def fail(state: LoopState) -> bool:
            raise OSError("disk")

        loop = Loop(load, {"Fail": Event(fail)}, max_steps=9)
        with pytest.raises(OSError, match="disk"):
            next(iter(loop))
        assert notes == ["open", "close"]
    else:
        list(Loop(load, max_epochs=2, dataloader_len=3))
        assert notes == ["open", "close"] * 2


def test_a_callable_that_forgets_to_return_is_told_so() -> None:
    loop: Loop[int] = Loop(cast(Any, lambda: None), max_steps=1)
    with pytest.raises(TypeError, match=r"dataloader\(\) returned None"):
        next(iter(loop))


def test_an_interrupt_while_a_set_is_made_loses_no_firing() -> None:
    class Name:
        strikes = 1

        def __hash__(self) -> int:
            if self.strikes and armed:
                self.strikes = 0
                raise KeyboardInterrupt
            return 1

    armed: list[bool] = []
    name = Name()
    loop = Loop(range(9), {name: Event(every_n_steps=3)}, max_steps=9)
    armed.append(True)
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for step, _ in loop:
            steps.append(step)
    found = {step: name in due for step, due in loop}
    assert steps == [0, 1]
    assert [step for step, fired in found.items() if fired] == [2, 5, 8]


def test_an_interrupt_while_a_short_epoch_is_judged_hides_nothing() -> None:
    loop = Loop(iter([1, 2]), max_steps=9)
    assert [batch for _, (batch, _) in zip(range(2), loop)] == [1, 2]
    with warnings.catch_warnings():
        struck = iter([KeyboardInterrupt, None])

        def show(*_: object, **__: object) -> None:
            strike = next(struck)
            if strike is not None:
                raise strike

        warnings.simplefilter("always")
        warnings.showwarning = show
        with pytest.raises(KeyboardInterrupt):
            list(loop)
        assert list(loop) == []
    assert loop.stop_reason == "exhausted"
    assert next(struck, "both were asked") == "both were asked"
