"""Any loader as epochs of batches: what is fetched when, lengths, ends, epochs, and places in them.

Most loaders here are those of a library, written out in short.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from dloop import DataExhaustedError, DataLengthError, Event, Loop, LoopError, LoopEvents, batched
from interpreter import needs_reference_counts
from loops import ENTER, after, fired, flat, resumed
from manual_clock import ManualClock
from recording_loaders import RecordingBatches, RecordingLoader, SizedLoader
from told import warnings_of, with_warnings

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


class TellsItsLast(RecordingLoader):
    """As Accelerate's: `end_of_dataloader` is true from the batch `last` on."""

    end_of_dataloader = False

    def __init__(self, *epochs: Iterable[Any], last: Any = None) -> None:
        super().__init__(*epochs)
        self.last = last

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = list(next(self.epochs))
        last = batches[-1] if self.last is None and batches else self.last
        self.end_of_dataloader = False
        for batch in RecordingBatches(batches, self.requests):
            self.end_of_dataloader = self.end_of_dataloader or batch == last
            yield batch


def stream(batches: Iterable[Any]) -> RecordingBatches:
    return RecordingBatches(batches, [])


def marked(batch: Any, events: Any) -> str:
    marks = "E" * (EPOCH_END in events) + "T" * (TRAINING_END in events)
    return f"body {batch} {marks}".rstrip()


def bodies(loop: Loop[Any]) -> list[str]:
    """Each step's batch, and whether it is the last of its epoch (E) and of the run (T)."""
    return [marked(*pair) for pair in loop]


def requests(loader: Any, **arguments: Any) -> str:
    """What a run does: `f0` fetches batch 0, `f.` finds the end, `0ET` is a step with its marks."""
    with contextlib.suppress(OSError):
        for batch, events in Loop(loader, **arguments):
            loader.requests.append(marked(batch, events))
    short = {"next ": "f", "end": "f.", "body ": "", " ": ""}
    text = "|".join(loader.requests)
    for long, letter in short.items():
        text = text.replace(long, letter)
    return text.replace("|", " ")


# What is fetched when

TWO = {"max_epochs": 2}
FETCHES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "without a length: one ahead": (
        lambda: RecordingLoader([0, 1]), TWO, "f0 f1 0 f. 1E f0 f1 0 f. 1ET",
    ),
    "an exception met ahead comes after the batches before it": (
        lambda: RecordingLoader([0, 1, OSError()]), TWO, "f0 f1 0 fOSError() 1",
    ),
    "a length is trusted, and the end asked for once more": (
        lambda: SizedLoader([0, 1], promise=2), TWO, "f0 0 f1 1E f. f0 0 f1 1ET f.",
    ),
    "lookahead=False too": (
        lambda: SizedLoader([0, 1], promise=2), {**TWO, "lookahead": False},
        "f0 0 f1 1E f. f0 0 f1 1ET f.",
    ),
    "nothing after the last step within an epoch": (
        lambda: SizedLoader([0, 1], promise=2), {"max_steps": 3}, "f0 0 f1 1E f. f0 0T",
    ),
    "once more after a run's last step, by steps": (
        lambda: SizedLoader([0, 1], promise=2), {"max_steps": 2}, "f0 0 f1 1ET f.",
    ),
    "once more after a run's last step, by stop_when": (
        lambda: SizedLoader([0, 1], promise=2), {"stop_when": Event(at_step=1)}, "f0 0 f1 1ET f.",
    ),
    "a stream: exactly on request": (
        lambda: stream(range(9)), {"max_steps": 3}, "f0 0 f1 1 f2 2T",
    ),
    "a stream's one epoch: ahead": (
        lambda: stream([0, 1]), {"max_epochs": 1}, "f0 f1 0 f. 1ET",
    ),
    "a stream with lookahead=True: ahead": (
        lambda: stream(range(9)), {"max_steps": 2, "lookahead": True}, "f0 f1 0 f2 1T",
    ),
    "a stream cut into epochs": (
        lambda: stream(itertools.count()), {**TWO, "dataloader_len": 2}, "f0 0 f1 1E f2 2 f3 3ET",
    ),
    "a loader cut: nothing beyond": (
        lambda: RecordingLoader(range(4)), {**TWO, "dataloader_len": 2}, "f0 0 f1 1E f0 0 f1 1ET",
    ),
    "lookahead=True ignores a length": (
        lambda: SizedLoader([0, 1], promise=7), {"max_epochs": 1, "lookahead": True},
        "f0 f1 0 f. 1ET",
    ),
    "lookahead=False without a length: no epoch's end": (
        lambda: RecordingLoader([0, 1]), {"max_steps": 3, "lookahead": False}, "f0 0 f1 1 f. f0 0T",
    ),
    "end_of_dataloader: nothing ahead": (
        lambda: TellsItsLast([0, 1], [2]), TWO, "f0 0 f1 1E f. f2 2ET f.",
    ),
    "end_of_dataloader and lookahead=False": (
        lambda: TellsItsLast([0, 1]), {**TWO, "lookahead": False}, "f0 0 f1 1E f. f0 0 f1 1ET f.",
    ),
    "dataloader_len comes before end_of_dataloader": (
        lambda: TellsItsLast(range(4), last=1), {"max_epochs": 1, "dataloader_len": 3},
        "f0 0 f1 1 f2 2ET",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FETCHES)
def test_what_is_fetched_when(case: str) -> None:
    load, arguments, expected = FETCHES[case]
    assert requests(load(), **arguments) == expected


# Kinds of sources


class Table:
    """As a pandas DataFrame; those of Polars and PyArrow have the same attributes."""

    columns = ("a", "b")

    def __dataframe__(self) -> None:
        raise AssertionError("nobody needs it")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"a": 1}, "its keys would be the batches"), (Table(), "its columns would be the batches")],
    ids=["dict", "table"],
)
def test_what_would_yield_keys_or_columns_is_refused(wrong: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^dataloader=.*{text}"):
        Loop(wrong, max_epochs=1)
    with pytest.raises(TypeError, match=rf"^dataloader\(\)=.*{text}"):
        next(iter(Loop(lambda: wrong, max_epochs=1)))
    with pytest.raises(TypeError, match=f"^loader=.*{text}"):
        batched(wrong, 2)


# Lengths and ends


def test_more_batches_than_the_length_are_dropped_with_a_warning_in_each_epoch() -> None:
    loader = SizedLoader([0, 1, 2, 3], promise=2)
    fetched, warned = with_warnings(lambda: requests(loader, max_epochs=2))
    assert fetched == "f0 0 f1 1E f2 f0 0 f1 1ET f2"
    assert warned == [
        f"epoch {epoch} has more batches than len(dataloader) said; they are dropped; "
        "pass lookahead=True to get them"
        for epoch in (0, 1)
    ]
    assert warnings_of(lambda: list(Loop(loader, max_epochs=2, lookahead=True))) == []


SHORTER: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "len()": (lambda: SizedLoader([0, 1, 2], [3, 4], promise=3), {"max_epochs": 4}, 2),
    "dataloader_len": (
        lambda: RecordingLoader([0, 1, 2], [3, 4]),
        {"max_epochs": 4, "dataloader_len": 3},
        2,
    ),
    "a stream with a length": (lambda: SizedStream([0, 1], promise=3), {"max_epochs": 1}, 2),
}


class SizedStream(RecordingBatches):
    """A single-pass source with a `len()`."""

    def __init__(self, batches: Iterable[Any], promise: int) -> None:
        super().__init__(batches, [])
        self.promise = promise

    def __len__(self) -> int:
        return self.promise


@pytest.mark.parametrize("case", SHORTER)
def test_a_shorter_epoch_is_an_error_with_advice_that_works(case: str) -> None:
    load, arguments, taken = SHORTER[case]
    loop = Loop(load(), **arguments)
    with pytest.raises(DataLengthError) as caught:
        flat(loop)
    assert f"ended after {taken} batches" in str(caught.value)
    assert "promised 3" in str(caught.value)
    assert loop.stop_reason == "exception"
    advice = str(caught.value).rpartition("; pass ")[2]
    if advice.startswith("lookahead=True"):
        arguments = {**arguments, "lookahead": True}
    else:
        assert advice.startswith(f"dataloader_len={taken}")
        arguments = {**arguments, "dataloader_len": taken}
    assert flat(Loop(load(), **arguments))[:2] == [0, 1]


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("enter", ENTER)
def test_a_stream_that_ends_in_a_cut_epoch_is_an_error_when_resumed_too(
    enter: str, done: int
) -> None:
    def make() -> Loop[int]:
        return Loop(iter(range(5)), max_epochs=9, dataloader_len=2)

    loop = make()
    found = flat(itertools.islice(ENTER[enter](loop), done))
    again = resumed(make(), loop.state_dict())
    advice = "pass a single-pass dataloader with all batches of the run"
    with pytest.raises(DataLengthError, match=f"epoch 2 ended after 1 batches, .*; {advice}"):
        for pair in ENTER[enter](again):
            found += flat([pair])
    assert found == [0, 1, 2, 3, 4]


class UnknownLength(RecordingLoader):
    """A loader whose `len()` raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([0, 1])
        self.error = error

    def __len__(self) -> int:
        raise self.error


@pytest.mark.parametrize("error", [TypeError("no"), NotImplementedError("no"), OSError("disk")])
def test_a_len_that_raises_is_no_length(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dloop"):
        assert requests(UnknownLength(error), max_epochs=1) == "f0 f1 0 f. 1ET"
    assert ("disk" in caplog.text) == isinstance(error, OSError)
    with pytest.raises(ValueError, match=r"^lookahead=False"):
        Loop(UnknownLength(error), max_epochs=1, lookahead=False)


@pytest.mark.parametrize("length", [2**63, 2**70])
def test_a_range_that_is_too_long_for_len_is_never_exhausted(length: int) -> None:
    assert flat(Loop(range(length), max_steps=3)) == [0, 1, 2]


class IterableDataset:
    """What PyTorch's is: the name, and a `__getitem__` that its base class has."""

    def __getitem__(self, at: int) -> Any:
        raise NotImplementedError


class Stream:
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated by itself")


@pytest.mark.parametrize("dataset", [Stream(), IterableDataset(), [1, 2], {"a": 1}, None])
def test_the_length_over_an_iterable_style_data_set_is_a_guess(dataset: Any) -> None:
    loader = SizedLoader([0, 1, 2], promise=3)
    loader.dataset = dataset  # type: ignore[attr-defined]
    is_guess = isinstance(dataset, (Stream, IterableDataset))
    expected = "f0 f1 0 f2 1 f. 2ET" if is_guess else "f0 0 f1 1 f2 2ET f."
    assert requests(loader, max_epochs=1) == expected


def test_lookahead_true_is_refused_where_something_else_ends_the_epochs() -> None:
    with pytest.raises(ValueError, match=r"^lookahead=True.*dataloader_len"):
        Loop([1], max_epochs=1, lookahead=True, dataloader_len=1)
    with pytest.raises(ValueError, match=r"^lookahead=True.*end_of_dataloader"):
        Loop(TellsItsLast([0]), max_epochs=1, lookahead=True)
    with pytest.raises(ValueError, match=r"^lookahead=True.*end_of_dataloader"):
        next(iter(Loop(lambda: TellsItsLast([0]), max_epochs=1, lookahead=True)))


def test_a_loader_that_tells_its_last_batch_counts_fractions_by_its_length() -> None:
    class Sized(TellsItsLast):
        def __len__(self) -> int:
            return 8

    loop = Loop(Sized(range(8)), {"E": Event(every_n_epochs=0.5)}, max_epochs=2)
    assert fired(loop, "E") == [3, 7, 11, 15]


def test_an_end_of_dataloader_that_was_too_early_or_never_true() -> None:
    early = Loop(TellsItsLast(range(4), last=1), max_epochs=2)
    seen, warned = with_warnings(lambda: flat(early))
    assert seen == [0, 1, 0, 1]
    assert warned == [
        f"epoch {epoch} has more batches than end_of_dataloader said; they are dropped"
        for epoch in (0, 1)
    ]
    never = Loop(TellsItsLast([0, 1], last=9), max_epochs=2)
    with pytest.raises(DataLengthError, match=r"end_of_dataloader was not true.*dataloader_len"):
        flat(never)
    assert never.global_step == 1


@pytest.mark.parametrize(
    "load",
    [lambda: RecordingLoader([]), lambda: lambda: iter(()), lambda: stream([]), lambda: [],
     lambda: SizedLoader([], promise=2), lambda: SizedLoader([0], promise=0),
     lambda: TellsItsLast([]), lambda: batched([], 2)],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 1}], ids=str)
def test_an_epoch_without_a_batch_is_an_error(load: Any, limit: dict[str, int]) -> None:
    loop = Loop(load(), **limit)
    with pytest.raises(DataExhaustedError, match=r"^epoch 0 has no batch: the dataloader is empty"):
        flat(loop)
    assert loop.stop_reason == "exception"


def test_a_stream_that_runs_dry_ends_the_run_with_a_warning() -> None:
    source = stream([0, 1, 2])
    loop = Loop(source, max_steps=9)
    steps, warned = with_warnings(lambda: bodies(loop))
    assert steps == ["body 0", "body 1", "body 2"]
    assert warned == ["the dataloader is exhausted after global_step 2, before the run's limit"]
    assert (loop.stop_reason, loop.state.training_end) == ("exhausted", False)
    with pytest.raises(LoopError, match="this run has ended"):
        iter(loop)


@needs_reference_counts
@pytest.mark.parametrize("end", ["limit", "error", "condition", "cut"])
def test_the_iterator_of_an_epoch_is_freed_with_it(end: str) -> None:
    notes: list[str] = []

    def load() -> Iterator[int]:
        notes.append("open")
        try:
            yield from range(4)
            raise OSError("disk")
        finally:
            notes.append("close")

    def fail(state: object) -> bool:
        raise OSError("disk")

    limit = {"limit": {"max_steps": 2}, "cut": {"max_epochs": 2, "dataloader_len": 3}}
    condition = fail if end == "condition" else None
    loop = Loop(load, {"Fail": Event(condition)}, **limit.get(end, {"max_steps": 9}))
    with contextlib.suppress(OSError):
        list(loop)
    assert notes == ["open", "close"] * (2 if end == "cut" else 1)
    assert loop.stop_reason is not None


# Set_epoch


class Part:
    """A part of a loader: notes each `set_epoch` under its name."""

    def __init__(self, name: str, calls: list[Any], **parts: Any) -> None:
        self.name = name
        self.calls = calls
        self.__dict__.update(parts)

    def set_epoch(self, epoch: int) -> None:
        self.calls.append((self.name, epoch))


class PartLoader(Part):
    def __iter__(self) -> Iterator[int]:
        self.calls.append("iter")
        return iter([1, 2])

    def __len__(self) -> int:
        self.calls.append("len")
        return 2


class DataSet(Part):
    """A part that has items."""

    def __getitem__(self, place: int) -> Any:
        raise AssertionError("the items of a data set are never looked at")


def test_set_epoch_reaches_every_part_once_before_len_and_iter() -> None:
    calls: list[Any] = []
    data = DataSet("data", calls)
    inner = Part("inner", calls, dataset=data)
    loader = PartLoader(
        "loader", calls, dataset=data, batch_sampler=Part("b", calls, sampler=inner)
    )
    data.dataset = loader  # type: ignore[attr-defined]  # a cycle
    loop = Loop(loader, max_epochs=2)
    assert calls == []
    flat(loop)
    for epoch, begin in ((0, 0), (1, 6)):
        names = [("loader", epoch), ("b", epoch), ("inner", epoch), ("data", epoch)]
        assert sorted(calls[begin : begin + 4]) == sorted(names)
        assert calls[begin + 4 : begin + 6] == ["len", "iter"]
    assert len(calls) == 12


def test_set_epoch_reaches_what_is_kept_in_lists_tuples_and_dicts_of_a_callables_loader() -> None:
    calls: list[Any] = []
    data = DataSet("concat", calls, datasets=[Part("first", calls), Part("second", calls)])
    samplers = {"a": Part("a", calls), "b": [Part("never", calls)]}
    inner = RecordingLoader([0])
    of_batches = [Part("of batches", calls)]
    sampler = Part("sampler", calls, samplers=samplers, batch_samplers=of_batches)
    inner.dataset, inner.sampler = data, sampler  # type: ignore[attr-defined]
    loader = RecordingLoader([0])
    loader.loaders = (inner, [1, 2], inner)  # type: ignore[attr-defined]
    loader.iterables = {"same": data, "other": Part("iterable", calls)}  # type: ignore[attr-defined]
    flat(Loop(lambda: batched(loader, 2), max_epochs=2))
    for epoch in range(2):
        names = ["a", "concat", "first", "iterable", "of batches", "sampler", "second"]
        assert sorted(calls[7 * epoch : 7 * epoch + 7]) == [(name, epoch) for name in names]
    assert len(calls) == 14


# Callables know their epoch


def test_a_callable_can_ask_for_the_epoch_to_come() -> None:
    def generator() -> Iterator[str]:
        yield from sets[loop.epoch]

    def load_set() -> str:
        return sets[loop.epoch]

    sets = ["ab", "cd", "ef"]
    for load in (generator, load_set):
        loop = Loop(load, max_epochs=3)
        assert flat(loop) == [*"abcdef"]
        assert loop.epoch == 2
    loop.restart()
    assert flat(loop) == [*"abcdef"]
    for done in range(1, 6):
        loop.restart()
        again = Loop(lambda: sets[again.epoch], max_epochs=3)  # noqa: B023
        again.load_state_dict(after(done, loop))
        assert flat(again) == [*"abcdef"][done:]


def test_a_callable_with_set_epoch_is_told_its_epoch() -> None:
    class Load(Part):
        def __call__(self) -> list[int]:
            self.calls.append("call")
            return [1, 2]

    for wrapped in (lambda load: load, lambda load: batched(load, 2)):
        calls: list[Any] = []
        flat(Loop(wrapped(Load("load", calls)), max_epochs=2))
        assert calls == [("load", 0), "call", ("load", 1), "call"]


def test_the_epoch_is_that_of_the_latest_step_again_if_a_callable_fails() -> None:
    def load() -> list[int]:
        if loop.epoch == 1:
            raise OSError
        return [1, 2]

    loop = Loop(load, max_epochs=2)
    with pytest.raises(OSError):
        flat(loop)
    assert loop.epoch == 0


# Another batch size


class OfSamples:
    """A loader of a sequence: it is indexed, and has a batch size."""

    shape = ()

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples = samples
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __getitem__(self, place: int) -> list[int]:
        batch = range(self.samples)[place * self.batch_size :][: self.batch_size]
        if not batch:
            raise IndexError
        return [*batch]


def of_batches(size: int) -> Any:
    return batched(list(range(24)), size)


def of_samples(size: int) -> Any:
    return OfSamples(24, size)


def from_callable(size: int) -> Any:
    return lambda: OfSamples(24, size)


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("load", [of_batches, of_samples, from_callable])
@pytest.mark.parametrize(("before", "now"), [(2, 6), (6, 2), (4, 8), (3, 4), (8, 3), (4, 4)])
def test_a_run_of_another_batch_size_continues_at_the_same_sample(
    load: Callable[[int], Any], before: int, now: int, lookahead: bool | None
) -> None:
    def make(size: int) -> Loop[Any]:
        return Loop(load(size), max_epochs=2, lookahead=lookahead)

    for done in range(1, 24 // before):
        state = after(24 // before + done, make(before))
        loop = make(now)

        found, warned = with_warnings(lambda: flat(resumed(loop, state)))  # noqa: B023
        again = done * before % now
        assert found == [*range(done * before - again, 24)]
        assert [f"{again} samples come again" in text for text in warned] == [True] * (again > 0)
        assert loop.steps_done == 24 // before + done - (-len(found) // now)
        assert loop.epoch_step == -(-24 // now) - 1


def test_an_interrupt_on_the_way_to_the_sample_loses_nothing() -> None:
    batches: list[Any] = [[*range(at, at + 6)] for at in range(0, 24, 6)]
    loader = SizedLoader([batches[0], KeyboardInterrupt(), *batches[1:]], promise=4)
    loader.batch_size = 6  # type: ignore[attr-defined]
    sampler = type("Sequential", (), {"__module__": "torch.utils.data.sampler"})()
    sampler.batch_size, sampler.sampler = 6, sampler
    loader.batch_sampler = sampler  # type: ignore[attr-defined]
    state = after(6, Loop(of_samples(2), max_epochs=1))
    again = resumed(Loop(lambda: loader, max_epochs=1), state)
    with pytest.raises(KeyboardInterrupt):
        flat(again)
    assert flat(again) == [*range(12, 24)]
    assert (again.epoch_step, again.global_step) == (3, 7)


def test_an_incomplete_batch_that_is_dropped_leaves_the_epoch_its_end() -> None:
    class DropsLast(OfSamples):
        def __len__(self) -> int:
            return self.samples // self.batch_size

        def __getitem__(self, place: int) -> list[int]:
            if place >= len(self):
                raise IndexError
            return super().__getitem__(place)

    state = after(9, Loop(DropsLast(100, 10), max_epochs=1))
    again = Loop(DropsLast(100, 45), max_epochs=1)
    (warned,) = warnings_of(lambda: again.load_state_dict(state))
    assert "45 samples come again" in warned
    assert [EPOCH_END in events for _, events in again] == [True]


def test_another_length_warns_where_the_batch_size_is_not_known() -> None:
    state = after(3, Loop([[0, 1], [2, 3], [4, 5], [6, 7]], max_epochs=1))
    again = Loop([[0], [1], [2], [3], [4], [5], [6], [7]], max_epochs=1)
    (warned,) = warnings_of(lambda: again.load_state_dict(state))
    assert "has 8 batches and not 4 as before" in warned


def test_a_fraction_that_is_passed_already_ends_the_run_as_it_is_resumed() -> None:
    for enter in (None, 3):
        state = after(3, Loop(lambda: OfSamples(8, 4), max_epochs=9))
        again = resumed(Loop(lambda: OfSamples(8, 1), max_epochs=1.4), {**state, "epoch_len": None})
        found = [*again] if enter is None else [*again.chunks(enter)]
        assert (found, again.stop_reason) == ([], "max_epochs")


def test_odd_attributes_are_not_parts() -> None:
    class Odd:
        calls: list[int]

        def __init__(self, answer: Callable[[Any], Any]) -> None:
            self.calls, self.answer = [], answer

        def __getattr__(self, name: str) -> Any:
            return self.answer(self) if not name.startswith("__") else getattr(object(), name)

        def set_epoch(self, epoch: int) -> None:
            self.calls.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    def fails(_: Any) -> Any:
        raise RuntimeError

    for answer in (lambda odd: odd, lambda odd: None, fails):
        odd = Odd(answer)
        if answer is fails:
            odd.end_of_dataloader = None  # type: ignore[attr-defined]
            odd.dataset, odd.state_dict, odd.get_state = None, None, None  # type: ignore[attr-defined]
        assert flat(Loop(odd, max_epochs=2, lookahead=None)) == [1, 2, 1, 2]
        assert odd.calls == [0, 1]


@pytest.mark.filterwarnings("ignore::dloop.LoopWarning")
def test_a_place_that_the_loader_goes_to_by_itself_stays_the_same_batch() -> None:
    class Grouped(SizedLoader):
        batch_size = 2

    class Other(Grouped):
        batch_size = 3

    state = after(3, Loop(Grouped(range(9), promise=9), max_epochs=1))
    again = Loop(Other(range(9), promise=9), max_epochs=1)
    (warned,) = warnings_of(lambda: again.load_state_dict(state))
    assert "a step takes 3 samples and not 2 as before: samples may come twice or never" in warned
    assert flat(again) == [*range(3, 9)]


@pytest.mark.filterwarnings("ignore::dloop.LoopWarning")
def test_a_length_that_was_given_holds_for_a_stream_in_other_lists() -> None:
    state = after(2, Loop(batched(iter(range(99)), 2), max_steps=20, dataloader_len=3))
    again = resumed(Loop(batched(iter(range(99)), 3), max_steps=6, dataloader_len=3), state)
    assert [(again.epoch, EPOCH_END in events) for _, events in again] == [
        (0, True), (1, False), (1, False), (1, True),
    ]  # fmt: skip


def test_numbers_of_processes_count_in_samplers_alone() -> None:
    def load(preprocesses: int) -> OfSamples:
        loader = OfSamples(24, 2)
        loader.num_processes = preprocesses  # type: ignore[attr-defined]
        loader.dataset = DataSet("data", [], num_replicas=preprocesses)  # type: ignore[attr-defined]
        return loader

    state = after(3, Loop(load(4), max_epochs=1))
    again = Loop(load(8), max_epochs=1)
    assert warnings_of(lambda: again.load_state_dict(state)) == []
    assert flat(again) == [*range(6, 24)]


def test_parts_without_an_end_are_followed_a_few_levels_deep() -> None:
    class Endless(list):  # type: ignore[type-arg]
        @property
        def dataset(self) -> Any:
            return Endless(self)

    assert flat(Loop(Endless([1, 2]), max_epochs=1)) == [1, 2]


# Start_step

LENGTH = 5
STARTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "list": (lambda: list(range(LENGTH)), {}),
    "loader": (lambda: SizedLoader(range(LENGTH), promise=LENGTH), {}),
    "cut": (lambda: list(range(LENGTH + 2)), {"dataloader_len": LENGTH}),
    "callable, cut": (lambda: lambda: iter(range(LENGTH)), {"dataloader_len": LENGTH}),
    "cut stream": (lambda: itertools.count(), {"dataloader_len": LENGTH}),
}
EVENTS = {"Second": Event(every_n_steps=2), "Late": Event(at_step=1, per_epoch=True)}


def begun(source: str, start_step: int, **limit: int) -> Loop[Any]:
    load, arguments = STARTS[source]
    limits: Any = limit or {"max_epochs": 3}
    clock = ManualClock()
    return Loop(load(), EVENTS, start_step=start_step, clock=clock, **arguments, **limits)


def seen(loop: Loop[Any]) -> list[Any]:
    return [(batch, set(events), loop.state) for batch, events in loop]


@pytest.mark.parametrize("source", STARTS)
@pytest.mark.parametrize("limit", [{}, {"max_steps": 12}], ids=str)
def test_a_run_from_start_step_is_the_rest_of_the_run(source: str, limit: dict[str, int]) -> None:
    whole = seen(begun(source, 0, **limit))
    for start in range(len(whole) + 3):
        loop = begun(source, start, **limit)
        assert loop.global_step == start - 1
        saved = resumed(begun(source, 0, **limit), loop.state_dict())
        assert seen(loop) == seen(saved) == whole[start:]


@pytest.mark.parametrize(
    "load", [lambda: RecordingLoader([0, 1]), lambda: TellsItsLast([0, 1]), lambda: lambda: [0, 1]]
)
def test_a_start_step_without_a_known_length_is_refused(load: Any) -> None:
    with pytest.raises(ValueError, match=r"^start_step=3: .*pass dataloader_len, or fast_forward"):
        Loop(load(), max_epochs=4, start_step=3)
    assert seen(Loop(load(), max_epochs=4, start_step=0))
    loop = Loop(load(), max_epochs=4, start_step=3, fast_forward=False)
    places = [(loop.global_step, loop.epoch, loop.epoch_step) for _ in loop]
    assert places[:3] == [(3, 0, 0), (4, 0, 1), (5, 1, 0)]


def test_fast_forward_false_holds_for_states_too() -> None:
    class Stateful(SizedLoader):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("it was to be left as it is")

    state = after(2, Loop(Stateful(range(5), promise=5), max_epochs=2))
    again = Loop(Stateful([7, 8, 9], range(5), promise=5), max_epochs=2, fast_forward=False)
    again.load_state_dict(state)
    assert [(batch, again.epoch_step) for batch, _ in again][:4] == [(7, 2), (8, 3), (9, 4), (0, 0)]


def test_an_iterator_with_a_length_and_set_epoch_is_left_as_it_is() -> None:
    class Batches(SizedStream):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    for enter in ENTER.values():
        loop = Loop(Batches([1, 2, 3], promise=4), max_epochs=1, start_step=1, fast_forward=False)
        pairs = enter(loop)
        next(pairs)
        assert loop.epoch_step in (1, 2)
        flat(pairs)
        assert (loop.epoch_step, loop.steps_done, loop.stop_reason) == (3, 4, "max_epochs")


@pytest.mark.parametrize("strikes", [1, 2])
@pytest.mark.parametrize("enter", ENTER)
def test_interrupts_on_the_way_to_start_step_lose_nothing(enter: str, strikes: int) -> None:
    loader = RecordingLoader([0, 1, *[KeyboardInterrupt() for _ in range(strikes)], 2, 3, 4])
    loop = Loop(loader, max_epochs=3, dataloader_len=5, start_step=8)
    for _ in range(strikes):
        with pytest.raises(KeyboardInterrupt):
            next(ENTER[enter](loop))
    states = [(batch, loop.epoch, loop.epoch_step) for batch, _ in loop]
    assert states == [(3, 1, 3), (4, 1, 4), *[(place, 2, place) for place in range(5)]]


@pytest.mark.parametrize("strikes", [1, 2])
def test_interrupts_in_skipping_a_stream_skip_nothing_twice(strikes: int) -> None:
    source = stream([0, 1, *[KeyboardInterrupt() for _ in range(strikes)], 2, 3, 4, 5])
    loop = Loop(source, max_steps=6, start_step=4)
    for _ in range(strikes):
        with pytest.raises(KeyboardInterrupt):
            next(loop.chunks(2))
    assert [(batch, loop.global_step) for batch, _ in loop] == [(4, 4), (5, 5)]


# Loaders as Accelerate and Fabric wrap them


class Sampler:
    """Draws each epoch in an order of its own, as DistributedSampler does."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(LENGTH), LENGTH))


class RandomSampler:
    """Draws an order that nobody knows beforehand, as PyTorch's class of this name does."""

    generator: random.Random | None = None

    def __iter__(self) -> Iterator[int]:
        draw = self.generator or random.Random()
        return iter(draw.sample(range(LENGTH), LENGTH))


class SeedableRandomSampler(Sampler, RandomSampler):
    """As Accelerate's class of this name."""


class SeededSampler(RandomSampler):
    def __init__(self) -> None:
        self.generator = random.Random(7)


class Loader:
    """As a DataLoader with a sampler; its batches are numbers."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self.batch_sampler = SimpleNamespace(sampler=sampler)

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        yield from self.batch_sampler.sampler


class Accelerated(Loader):
    """As most of Accelerate's: it knows its last batch, and its `state_dict` cannot be called."""

    end_of_dataloader = False

    def __init__(self) -> None:
        super().__init__(Sampler())
        self.iteration = 0

    def set_epoch(self, epoch: int) -> None:
        self.iteration = epoch

    def __iter__(self) -> Iterator[int]:
        self.end_of_dataloader = False
        self.batch_sampler.sampler.set_epoch(self.iteration)
        for number, batch in enumerate(super().__iter__(), start=1):
            self.end_of_dataloader = number == LENGTH
            yield batch
        self.iteration += 1

    def state_dict(self) -> Any:
        raise AttributeError("dl_state_dict")

    def load_state_dict(self, state: Any) -> None:
        raise AttributeError("load_state_dict")


class KeepsState:
    """A loader whose state is how many batches it has given."""

    given = begin_at = 0

    def __iter__(self) -> Iterator[int]:
        begin, self.begin_at = self.begin_at, 0
        for self.given, batch in enumerate(super().__iter__(), start=1):  # type: ignore[misc]
            if self.given > begin:
                yield batch

    def state_dict(self) -> Any:
        return {"given": self.given}

    def load_state_dict(self, state: Any) -> None:
        self.begin_at = state["given"]


class LoaderWithState(KeepsState, Loader):
    """As torchdata's StatefulDataLoader."""


class AcceleratedWithState(KeepsState, Accelerated):
    """As Accelerate's with `use_stateful_dataloader=True`."""

    def state_dict(self) -> Any:
        return {"given": 0 if self.end_of_dataloader else self.given}


class Fabricated(Loader):
    """As Fabric's: it sets its sampler's epoch to how often it was iterated before."""

    def __init__(self) -> None:
        super().__init__(Sampler())
        self.iterated = 0

    def __iter__(self) -> Iterator[int]:
        self.batch_sampler.sampler.set_epoch(self.iterated)
        self.iterated += 1
        yield from super().__iter__()


WRAPPED: list[Callable[[], Any]] = [
    Accelerated,
    AcceleratedWithState,
    Fabricated,
    lambda: Loader(SeedableRandomSampler()),
]


@pytest.mark.parametrize("load", WRAPPED, ids=lambda load: load.__name__)
def test_a_wrapped_loader_resumes_in_its_order(load: Callable[[], Any]) -> None:
    whole = flat(Loop(load(), max_epochs=3))
    assert [sorted(whole[at : at + LENGTH]) for at in (0, 5, 10)] == [[*range(LENGTH)]] * 3
    for steps in (1, 2, 4, LENGTH, LENGTH + 1, 2 * LENGTH):
        loop = Loop(load(), max_epochs=3)
        found = flat(itertools.islice(loop, steps))
        for _ in range(3):  # in three more lives
            loop = resumed(Loop(load(), max_epochs=3), loop.state_dict())
            found += flat(itertools.islice(loop, 2))
        loop = resumed(Loop(load(), max_epochs=3), loop.state_dict())
        assert found + flat(loop) == whole


@pytest.mark.parametrize("step", [1, LENGTH + 1])
def test_a_loader_whose_order_cannot_be_set_back_is_warned_of(step: int) -> None:
    """It was iterated before the resume, so that its counter is ahead."""
    state = after(step, Loop(Fabricated(), max_epochs=3))
    loader = Fabricated()
    for _ in range(3):
        next(iter(loader))
    loop = resumed(Loop(loader, max_epochs=3), state)
    (text,) = warnings_of(lambda: next(iter(loop)))
    assert f"epoch {step // LENGTH} is resumed in the order of epoch 3" in text


@pytest.mark.parametrize("step", [2, LENGTH, LENGTH + 2])
@pytest.mark.parametrize("sampler", [RandomSampler, SeededSampler, SeedableRandomSampler])
def test_an_order_that_cannot_repeat_is_warned_of(sampler: type[RandomSampler], step: int) -> None:
    loop = Loop(Loader(sampler()), max_epochs=2)
    found = flat(itertools.islice(loop, step))
    state, early = with_warnings(loop.state_dict)
    again = resumed(Loop(Loader(sampler()), max_epochs=2), state)
    more, late = with_warnings(lambda: flat(again))
    repeats = sampler is SeedableRandomSampler or (sampler is SeededSampler and step < LENGTH)
    assert [len(early), len(late)] == [not repeats and step != LENGTH] * 2
    assert all("may shuffle in another order" in text for text in early + late)
    assert len(found + more) == 2 * LENGTH
    assert not repeats or sorted(found + more) == sorted([*range(LENGTH)] * 2)


# What is resumed by index


class Iterated:
    """Notes which of its items are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return 10 * index

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(LENGTH))


class Array(Iterated):
    """As a JAX array or a data set of h5py: a class with a shape."""

    shape = (LENGTH,)


class Declared(Iterated, Sequence[int]):  # type: ignore[misc]
    """It says that it is a Sequence."""


@pytest.mark.parametrize("kind", [Array, Declared, Iterated])
def test_arrays_and_sequences_are_indexed(
    kind: type[Iterated], caplog: pytest.LogCaptureFixture
) -> None:
    for wrap in (lambda loader: loader, lambda loader: batched(loader, 1)):
        state = after(3, Loop(wrap(kind()), max_epochs=1))
        loader = kind()
        caplog.clear()
        with caplog.at_level(logging.INFO, "dloop"):
            rest = flat(resumed(Loop(wrap(loader), max_epochs=1), state))
        assert rest == [30, 40]
        is_indexed = kind in (Array, Declared)
        assert loader.read == ([3, 4] if is_indexed else [0, 1, 2, 3, 4])
        assert len(caplog.messages) == (not is_indexed)


def test_a_callable_that_forgets_to_return_is_told_so() -> None:
    forgets: Any = lambda: None  # noqa: E731
    with pytest.raises(TypeError, match=r"dataloader\(\) returned None"):
        next(iter(Loop(forgets, max_steps=1)))


def test_a_state_that_is_saved_in_the_order_of_another_epoch_warns() -> None:
    loader = Fabricated()
    next(iter(loader))
    loop = Loop(loader, max_epochs=2)
    next(iter(loop))
    (text,) = warnings_of(loop.state_dict)
    assert "epoch 0 has the order of epoch 1" in text


def test_an_error_of_state_dict_comes_out() -> None:
    class Broken(AcceleratedWithState):
        def state_dict(self) -> Any:
            raise TypeError("no tensor")

    with pytest.raises(TypeError, match="no tensor"):
        flat(Loop(Broken(), max_epochs=1))


def test_a_random_sampler_of_pytorch_is_no_part_of_a_loaders_state() -> None:
    """Accelerate wraps one into a StatefulDataLoader; torchdata's own samplers are part of it."""

    for module, warns in (("torch.utils.data.sampler", True), ("torchdata.sampler", False)):
        sampler = type("RandomSampler", (SeededSampler,), {"__module__": module})
        loops = [Loop(LoaderWithState(sampler()), max_epochs=1) for _ in range(2)]
        state, _ = with_warnings(lambda: after(2, loops[0]))  # noqa: B023
        rest, warned = with_warnings(lambda: flat(resumed(loops[1], state)))  # noqa: B023
        assert (len(rest), len(warned)) == (LENGTH - 2, warns)
