"""Runs that begin at a bare step number."""

from __future__ import annotations

import itertools
import logging
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dloop import DataExhaustedError, Event, Loop, LoopError, LoopEvents, LoopWarning
from manual_clock import ManualClock
from recording_loaders import RecordingLoader, SizedLoader

LENGTH = 5
EPOCHS = 3


class Growing:
    """Its `set_epoch` changes its length: 4, 5, 6."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4 + self.epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, number) for number in range(len(self))])


class Unsized(Growing):
    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from [(self.epoch, number) for number in range(4 + self.epoch)]


class Tells(Growing):
    __len__ = None  # type: ignore[assignment]
    end_of_dataloader = False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(4 + self.epoch):
            self.end_of_dataloader = number == 3 + self.epoch
            yield self.epoch, number


SOURCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a list": (lambda: list(range(LENGTH)), {}),
    "cut": (lambda: list(range(LENGTH + 2)), {"dataloader_len": LENGTH}),
    "looked ahead": (lambda: list(range(LENGTH)), {"lookahead": True}),
    "no length": (lambda: RecordingLoader(range(LENGTH)), {}),
    "set_epoch": (Growing, {}),
    "set_epoch, no length": (Unsized, {}),
    "says its last": (Tells, {}),
    "a callable": (lambda: lambda: (number for number in range(LENGTH)), {}),
    "a callable with lengths": (lambda: lambda: range(LENGTH), {}),
    "a stream in epochs": (lambda: itertools.count(), {"dataloader_len": LENGTH}),
}
sources = pytest.mark.parametrize("source", SOURCES)


def a_loop(source: str, start_step: int = 0, **arguments: Any) -> Loop[Any]:
    load, given = SOURCES[source]
    limit = {} if "max_steps" in arguments else {"max_epochs": EPOCHS}
    return Loop(load(), start_step=start_step, **{**limit, **given, **arguments})


def steps_of(loop: Loop[Any]) -> list[Any]:
    return [
        (batch, loop.global_step, loop.epoch, loop.epoch_step, set(events))
        for batch, events in loop
    ]


@sources
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("limit", [{}, {"max_steps": 12}])
def test_a_run_that_begins_at_a_step_is_the_rest_of_the_whole_run(
    source: str, size: int | None, limit: dict[str, int]
) -> None:
    events = {"Second": Event(every_n_steps=2), "Late": Event(at_step=1, per_epoch=True)}
    whole = steps_of(a_loop(source, events=events, batches_per_step=size, **limit))
    for start in range(len(whole) + 1):
        loop = a_loop(source, start, events=events, batches_per_step=size, **limit)
        assert loop.global_step == start - 1
        assert steps_of(loop) == whole[start:]


@sources
def test_beyond_the_limit_a_run_is_over_and_quiet(source: str) -> None:
    loop = a_loop(source, 99)
    assert list(loop) == []
    assert loop.stop_reason == "max_epochs"
    loop = a_loop(source, 99, max_steps=12)
    assert list(loop) == []
    assert loop.stop_reason == "max_steps"


@sources
def test_a_state_of_such_a_run_goes_on(source: str) -> None:
    whole = steps_of(a_loop(source))
    loop = a_loop(source, 3)
    before = a_loop(source, 3)
    before.load_state_dict(loop.state_dict())
    assert steps_of(before) == whole[3:]
    seen = [batch for batch, _ in itertools.islice(loop, 3)]
    again = a_loop(source)
    again.load_state_dict(loop.state_dict())
    assert seen + [batch for batch, _ in again] == [step[0] for step in whole[3:]]


def test_restart_begins_there_again_and_windows_count_from_there() -> None:
    loop = Loop(range(20), {"E": Event(every_n_steps=6)}, max_epochs=1, start_step=8)
    for _ in range(2):
        windows = [(loop.global_step, loop.steps_since("E")) for _, due in loop if "E" in due]
        assert windows == [(11, 4), (17, 6)]
        loop.restart()


def test_a_state_file_that_is_there_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def make(start_step: int) -> Loop[int]:
        return Loop(range(9), max_epochs=1, start_step=start_step, state_file=path)

    loop = make(2)
    assert next(iter(loop))[0] == 2
    loop.save_state()
    assert next(iter(make(7)))[0] == 3


def test_time_begins_at_zero_and_timers_with_it() -> None:
    clock = ManualClock()
    events = {"At": Event(at_time=[0, 2]), "Every": Event(every_n_seconds=3)}
    loop = Loop(range(20), events, max_epochs=1, start_step=8, clock=clock)
    due = []
    for _, names in loop:
        due += [(loop.global_step, name) for name in names if name in events]
        clock.advance(1)
    assert due[:4] == [(8, "At"), (10, "At"), (11, "Every"), (14, "Every")]


def test_an_empty_epoch_on_the_way_is_an_error() -> None:
    for loader in (RecordingLoader([]), SizedLoader([], promise=0)):
        loop = Loop(loader, max_epochs=2, start_step=3)
        with pytest.raises(DataExhaustedError, match="epoch 0 has no batch"):
            list(loop)


def test_an_interrupt_on_the_way_is_made_up_for() -> None:
    loader = RecordingLoader([0, 1, KeyboardInterrupt(), 2])
    loop = Loop(loader, max_epochs=2, start_step=4)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    assert [batch for batch, _ in loop] == [1, 2]


def test_a_loader_without_a_length_is_gone_through_once() -> None:
    """Each iterator of a loader that shuffles by a generator of its own has another order."""

    class Shuffled:
        def __init__(self) -> None:
            self.generator = random.Random(7)

        def __iter__(self) -> Iterator[int]:
            return iter(self.generator.sample(range(LENGTH), LENGTH))

    whole = [batch for batch, _ in Loop(Shuffled(), max_epochs=EPOCHS)]
    for start in range(EPOCHS * LENGTH):
        loop: Loop[int] = Loop(Shuffled(), max_epochs=EPOCHS, start_step=start)
        assert [batch for batch, _ in loop] == whole[start:]


def test_an_interrupt_after_the_place_was_found_loses_nothing() -> None:
    interrupts = [KeyboardInterrupt()]

    class Interrupted:
        def __iter__(self) -> Iterator[int]:
            for number in range(9):
                if number == 6 and interrupts:
                    raise interrupts.pop()
                yield number

    loop: Loop[int] = Loop(Interrupted(), max_epochs=1, start_step=3)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for batch, _ in loop:
            seen.append(batch)
    assert seen + [batch for batch, _ in loop] == [3, 4, 5, 6, 7, 8]


def test_an_interrupt_as_the_epoch_is_opened_loses_nothing() -> None:
    class Interrupted(Unsized):
        asked = 0

        def __len__(self) -> int:  # asked for on the way, and when the epoch is opened
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            raise TypeError

    loop: Loop[Any] = Loop(Interrupted(), max_epochs=1, start_step=2)
    loader: Any = loop.dataloader
    loader.asked = 0
    with pytest.raises(KeyboardInterrupt):
        next(iter(loop))
    assert [batch for batch, _ in loop] == [(0, 2), (0, 3)]


def test_what_is_dropped_on_the_way_is_logged_and_an_unknown_order_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class RandomSampler:
        generator = None

        def __iter__(self) -> Iterator[int]:
            return iter(random.sample(range(LENGTH), LENGTH))

    class Loader:
        sampler = RandomSampler()

        def __iter__(self) -> Iterator[int]:
            yield from self.sampler

    loop: Loop[int] = Loop(Loader(), max_epochs=2, start_step=LENGTH + 1)
    with (
        caplog.at_level(logging.INFO, "dloop"),
        pytest.warns(LoopWarning, match="epoch 1 goes on after 1 batches, .* cannot be known"),
    ):
        assert len(list(loop)) == LENGTH - 1
    assert [text[: len("epoch 0: 4 batches")] for text in caplog.messages] == [
        f"epoch 0: {LENGTH} batches",
        "epoch 1: 1 batches",
    ]


def test_a_signal_on_the_way_ends_the_run_at_its_first_step() -> None:
    left = [signal.SIGTERM]

    def source() -> Iterator[int]:
        for number in range(LENGTH):
            if number == 2 and left:
                signal.raise_signal(left.pop())
            yield number

    before = signal.getsignal(signal.SIGTERM)
    loop = Loop(source, max_epochs=3, start_step=LENGTH + 1, signals=[signal.SIGTERM])
    assert [batch for batch, _ in loop] == [1]
    assert loop.stop_reason == "SIGTERM"
    over: Loop[int] = Loop(lambda: iter([1]), max_epochs=1, start_step=9, signals=[signal.SIGTERM])
    assert list(over) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("on_exception", ["raise", "event"])
def test_an_error_of_the_loader_on_the_way_ends_the_run(on_exception: str) -> None:
    def source() -> Iterator[int]:
        yield from range(2)
        raise OSError("disk")

    events = {"Save": Event(every_n_steps=100) | LoopEvents.TRAINING_END}
    loop = Loop(source, events, max_epochs=3, start_step=5, on_exception=on_exception)  # type: ignore[arg-type]
    steps = []
    with pytest.raises(OSError, match="disk"):
        for batch, due in loop:
            steps.append((batch, LoopEvents.EXCEPTION in due, "Save" in due))
    assert steps == ([(None, True, True)] if on_exception == "event" else [])
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="ended with an exception"):
        next(iter(loop))
    with pytest.raises(LoopError, match="place of start_step is not known"):
        loop.state_dict()


def test_a_stop_iteration_on_the_way_is_no_end() -> None:
    class Stops:
        def __iter__(self) -> Iterator[int]:
            raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(Loop(Stops(), max_epochs=3, start_step=5))


@pytest.mark.parametrize("as_callable", [False, True])
def test_lengths_that_are_told_place_a_loader_that_is_left_as_it_is(as_callable: bool) -> None:
    source: Any = (lambda: range(LENGTH)) if as_callable else Growing()
    lengths = [LENGTH] * 3 if as_callable else [4, 5, 6]
    start = lengths[0] + 2
    loop: Loop[Any] = Loop(source, max_epochs=3, start_step=start, fast_forward=False)
    places = [(loop.epoch, loop.epoch_step) for _ in loop]
    assert places == [
        (epoch, step)
        for epoch, length in enumerate(lengths)
        for step in range(length)
        if epoch > 1 or (epoch == 1 and step >= 2)
    ]


def test_what_was_asked_before_the_first_step_counts() -> None:
    for ask, reason in (("stop", "stop"), ("trigger", None)):
        loop = Loop(RecordingLoader(range(LENGTH)), {"E": None}, max_epochs=3, start_step=7)
        loop.stop() if ask == "stop" else loop.trigger("E")
        _, events = next(iter(loop))
        assert loop.stop_reason == reason
        assert ("E" in events) == (ask == "trigger")
        assert (loop.epoch, loop.epoch_step) == (1, 2)


def test_a_loop_that_was_closed_before_its_first_step_stays_closed() -> None:
    loader = RecordingLoader(range(LENGTH))
    loop = Loop(loader, max_epochs=3, start_step=7)
    loop.close()
    with pytest.raises(LoopError, match="place of start_step is not known"):
        loop.state_dict()
    with pytest.raises(LoopError, match="closed"):
        next(iter(loop))
    assert loader.requests == []


@pytest.mark.parametrize(("value", "kind"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_what_is_no_step_is_refused(value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^start_step={value}: "):
        Loop(range(3), max_epochs=1, start_step=value)
    with pytest.raises(TypeError, match=r"^fast_forward=1: "):
        Loop(range(3), max_epochs=1, fast_forward=1)  # type: ignore[arg-type]


# The loader is left as it is


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("start", [3, 5, 7])
def test_a_loader_that_is_left_as_it_is_gives_its_first_epoch_short(
    start: int, size: int | None
) -> None:
    """It gives batches at random, as many as it is asked for."""
    per_epoch = LENGTH if size is None else 3
    loader = SizedLoader(range(LENGTH), promise=LENGTH)
    loop: Loop[Any] = Loop(
        loader, max_epochs=3, start_step=start, fast_forward=False, batches_per_step=size
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = [(batch, loop.epoch, loop.epoch_step) for batch, _ in loop]
    assert len(steps) == 3 * per_epoch - start
    assert steps[0][1:] == divmod(start, per_epoch)
    batches = [batch if size is None else batch[0] for batch, _, _ in steps]
    assert batches[0] == 0
    assert steps[-per_epoch:][0][1:] == (2, max(0, start - 2 * per_epoch))


def test_a_loader_that_somebody_else_has_set_forward_gives_its_rest() -> None:
    rest = SizedLoader([3, 4], range(LENGTH), promise=LENGTH)
    loop: Loop[Any] = Loop(rest, max_epochs=2, start_step=3, fast_forward=False)
    assert [batch for batch, _ in loop] == [3, 4, 0, 1, 2, 3, 4]
    assert rest.requests.count("end") == 2


def test_without_a_length_a_bare_step_begins_an_epoch_and_a_state_keeps_its_own() -> None:
    loader = RecordingLoader([3, 4], range(LENGTH))
    loop: Loop[Any] = Loop(loader, max_epochs=2, start_step=7, fast_forward=False)
    steps = [(batch, loop.global_step, loop.epoch, loop.epoch_step) for batch, _ in loop]
    assert steps[:3] == [(3, 7, 0, 0), (4, 8, 0, 1), (0, 9, 1, 0)]
    saved: Loop[Any] = Loop(RecordingLoader(range(LENGTH)), max_epochs=3)
    for _ in itertools.islice(saved, LENGTH + 3):
        pass
    again: Loop[Any] = Loop(
        RecordingLoader([3, 4], range(LENGTH)), max_epochs=3, fast_forward=False
    )
    again.load_state_dict(saved.state_dict())
    steps = [(batch, again.global_step, again.epoch, again.epoch_step) for batch, _ in again]
    assert steps[:3] == [(3, 8, 1, 3), (4, 9, 1, 4), (0, 10, 2, 0)]


class Stateful:
    """Its state is not to be loaded."""

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("it was to be left as it is")


def test_a_loaders_own_state_is_not_loaded() -> None:
    loop: Loop[Any] = Loop(Stateful(), max_epochs=1)
    for _ in itertools.islice(loop, 2):
        pass
    again: Loop[Any] = Loop(Stateful(), max_epochs=1, fast_forward=False)
    again.load_state_dict(loop.state_dict())
    assert [batch for batch, _ in again] == [0, 1, 2]


def test_an_interrupt_skips_only_what_came_in_this_launch() -> None:
    loader = SizedLoader([10, 11, KeyboardInterrupt(), 12, 13], promise=6)
    loop: Loop[Any] = Loop(loader, max_epochs=1, start_step=2, fast_forward=False)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    assert LoopEvents.EPOCH_END not in loop.events
    seen += [10, 11] if not seen else []
    seen += [batch for batch, _ in loop]
    assert seen == [10, 11, 12, 13]


def test_windows_count_from_the_first_step() -> None:
    loop = Loop(range(4), {"E": Event(at_step=7)}, max_epochs=3, start_step=5)
    found = [(loop.steps_since("E"), loop.steps_since(LoopEvents.TRAINING_END)) for _ in loop]
    assert found[:4] == [(1, 1), (2, 2), (3, 3), (1, 4)]
