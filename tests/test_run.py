"""One run: left and entered again, interrupted at any point, ended by an exception."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import dloop
from dloop import Event, Loop, LoopError, LoopEvents
from loops import ENTER, Enter, flat
from recording_loaders import RecordingBatches, RecordingLoader, SizedLoader
from stateful_loaders import StatefulLoader

EPOCH_END, TRAINING_END, EXCEPTION = (
    LoopEvents.EPOCH_END,
    LoopEvents.TRAINING_END,
    LoopEvents.EXCEPTION,
)
LAST = frozenset({EXCEPTION, TRAINING_END})
each_way = pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))


# ----------------------------------------------------------------------- leaving and entering again


@each_way
@pytest.mark.parametrize("older", ENTER.values(), ids=list(ENTER))
def test_a_new_iterator_replaces_the_older_ones(older: Enter, enter: Enter) -> None:
    loader = SizedLoader(range(5), promise=5)
    loop = Loop(loader, max_epochs=1)
    old = older(loop)
    seen = flat([next(old)])
    requests = [*loader.requests]
    new = enter(loop)
    for _ in range(2):
        with pytest.raises(LoopError, match="this iterator was replaced"):
            next(old)
    assert loader.requests == requests
    assert iter(new) is new
    assert seen + flat(new) == [0, 1, 2, 3, 4]
    with pytest.raises(LoopError, match="replaced"):
        next(old)


# ------------------------------------------------------------- a storm: an interrupt at every point

INSIDE = (str(Path(dloop.__file__).parent), __file__)
STORM_ENTER: dict[str, Enter] = {"steps": iter, "lists": lambda loop: loop.chunks((3, 1))}


@dataclass
class Loader:
    """A loader whose iterators are not generators, and can continue after an exception."""

    length: int = 4
    epoch: int = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return map((lambda epoch, place: (epoch, place)), [self.epoch] * 99, range(self.length))


class Sized(Loader):
    def __len__(self) -> int:
        return self.length


class CountingLoop(Loop[Any]):
    """A loop whose clock shows the number of batches that were yielded."""

    yielded = 0


def storm(loader: Any, events: dict[str, Event], **arguments: Any) -> CountingLoop:
    loop = CountingLoop(loader, events, clock=lambda: loop.yielded, **arguments)
    return loop


EVENTS = {"A": Event(every_n_steps=3), "P": Event(every_n_steps=2, per_epoch=True)}
CONDITION = {"A": Event(every_n_steps=3), "C": Event(lambda state: state.global_step % 5 == 4)}
AT_AGREEMENTS = {"C": Event(lambda state: state.global_step % 2 == 1)}
WAITING = {"A": Event(every_n_steps=3), "W": Event(every_n_steps=2, wait_for="A")}
TIMED = {"A": Event(every_n_steps=3), "T": Event(every_n_seconds=4)}
STORMS: dict[str, Callable[[], CountingLoop]] = {
    "a list": lambda: storm([*range(4)], EVENTS, max_epochs=2),
    "sized": lambda: storm(Sized(), EVENTS, max_epochs=2),
    "looked ahead": lambda: storm(Loader(), EVENTS, max_epochs=2),
    "a callable": lambda: storm(lambda: Sized(), EVENTS, max_epochs=2),
    "a stream": lambda: storm(iter(range(8)), EVENTS, max_epochs=2, dataloader_len=4),
    "a state": lambda: storm(StatefulLoader(4), EVENTS, max_epochs=2),
    "conditions": lambda: storm(Sized(), CONDITION, stop_when=Event(at_step=6)),
    "timers": lambda: storm(Loader(), TIMED, max_epochs=2),
    "max_seconds": lambda: storm(Sized(), TIMED, max_seconds=6),
    "start_step": lambda: storm(Sized(), EVENTS, max_epochs=3, start_step=5),
    "an agreement": lambda: storm(
        Sized(), AT_AGREEMENTS, max_epochs=2, sync=dloop.sync.maximum(list, every=2)
    ),
    "waits": lambda: storm(
        Sized(), WAITING, max_epochs=2, stop_when=Event(at_step=5, wait_for="A")
    ),
    "a profile": lambda: storm(Loader(), EVENTS, max_epochs=2, profile=True),
}


@dataclass
class Struck:
    """Counts the points at which CPython can handle a signal; strikes at some of them.

    They are in dloop, and in the loaders, conditions and clocks of this file.
    """

    at: tuple[int, ...]
    points: int = 0
    steps: list[Any] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    struck_at: str = "struck at"

    def profile(self, frame: Any, event: str, _argument: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(INSIDE):
            self.points += 1
            if self.points in self.at:
                self.struck_at += f", {event} in {frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt

    def watch(self) -> None:
        if not self.at or self.points < self.at[-1]:
            sys.setprofile(self.profile)

    def run(self, loop: CountingLoop, enter: Enter, enter_again: bool) -> None:
        pairs = enter(loop)
        for _ in range(3):
            try:
                self.watch()
                for batch, events in pairs:
                    sys.setprofile(None)
                    self.record(loop, batch, events)
                    self.watch()
                return
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            if enter_again:
                with contextlib.suppress(LoopError):  # it was interrupted after the last step
                    pairs = enter(loop)

    def record(self, loop: CountingLoop, batch: Any, events: Any) -> None:
        self.batches += flat([(batch, events)])
        loop.yielded = len(self.batches)
        if events:  # lists without events may have other lengths after an interrupt
            self.steps.append((sorted(map(str, events)), loop.state))


# Python's own handler of SIGINT has no frame. With this `__name__`, dloop takes the frame of
# `profile` for one of its own.
Struck.profile = FunctionType(Struck.profile.__code__, {**globals(), "__name__": "dloop.here"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("small_collections", "no_collector")
@pytest.mark.parametrize("enter", STORM_ENTER)
@pytest.mark.parametrize("kind", STORMS)
def test_after_an_interrupt_at_any_point_all_batches_and_events_come(kind: str, enter: str) -> None:
    def strike(enter_again: bool, *at: int) -> Struck:
        struck = Struck(at)
        struck.run(STORMS[kind](), STORM_ENTER[enter], enter_again)
        if kind == "a state":  # an epoch that is begun again may have another order
            struck.batches[:] = sorted(struck.batches[:4]) + sorted(struck.batches[4:])
        return struck

    whole = strike(True)
    assert whole.points
    for point in range(1, whole.points + 1):
        struck = strike(point % 2 == 0, point, point + 1 + point % 9)
        assert struck.batches == whole.batches, struck.struck_at
        assert struck.steps == whole.steps, struck.struck_at


# -------------------------------------------------------------------- interrupts where others call


def test_an_interrupt_as_a_resumed_run_begins_keeps_its_place() -> None:
    def clock() -> int:
        if strikes:
            raise strikes.pop()
        return 0

    for make in (lambda **given: Loop(StatefulLoader(), max_epochs=2, **given),
                 lambda **given: Loop(iter(range(12)), max_steps=12, **given)):  # fmt: skip
        strikes: list[BaseException] = []
        loop = make()
        seen = flat(islice(loop, 3))
        strikes = [KeyboardInterrupt()]
        again = make(clock=clock)
        again.load_state_dict(loop.state_dict())
        with pytest.raises(KeyboardInterrupt):
            next(iter(again))
        seen += flat(again)
        assert sorted(seen) in ([*range(12)], sorted([*range(6)] * 2))


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 9}], ids=str)
@pytest.mark.parametrize("lookahead", [None, True])
def test_a_stream_that_ends_after_an_interrupt_is_an_error(
    limit: dict[str, Any], lookahead: bool | None
) -> None:
    loop = Loop(RecordingBatches([0, 1, 2, KeyboardInterrupt()], []), lookahead=lookahead, **limit)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    with pytest.raises(LoopError, match="the single-pass dataloader ended after an interrupt"):
        seen.extend(batch for batch, _ in loop)
    assert seen == [0, 1, 2]
    assert loop.stop_reason == "exception"


DEAD = RuntimeError("a worker is dead")


@pytest.mark.parametrize(
    ("left_at", "iterators"),
    [
        (2, [[0, 1, 2, DEAD], [DEAD]]),  # the new workers fail too
        (0, [[0, 1, DEAD]]),  # the loop was not left
        (2, [[0, 1, 2], [0, DEAD]]),  # it was left in another epoch
    ],
)
def test_workers_that_fail_again_or_without_being_left_end_the_run(
    left_at: int, iterators: list[list[Any]]
) -> None:
    loader = RecordingLoader(*iterators)
    loop = Loop(loader, max_epochs=2)
    flat(islice(loop, left_at))
    with pytest.raises(RuntimeError, match="a worker is dead"):
        flat(loop)
    assert next(loader.epochs) is iterators[0], "there was no other iterator"
    assert loop.stop_reason == "exception"


# ------------------------------------------------------------------- exceptions of what dloop calls

FAILING: dict[str, tuple[Callable[[Exception], Any], int]] = {
    "the first fetch": (lambda wrong: RecordingLoader([wrong]), 0),
    "a fetch": (lambda wrong: SizedLoader([0, 1, wrong, 3], promise=4), 2),
    "a fetch ahead": (lambda wrong: RecordingLoader([0, 1, wrong, 3]), 2),
    "a later epoch": (lambda wrong: RecordingLoader([0], [1, wrong]), 2),
    "a callable's": (lambda wrong: lambda: RecordingBatches([0, wrong], []), 1),
    "once more": (lambda wrong: SizedLoader([0, 1, wrong], promise=2), 2),
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("on_exception", ["raise", "event"])
@each_way
def test_an_exception_of_the_loader_comes_out_unchanged(
    kind: str, on_exception: Any, enter: Enter
) -> None:
    wrong = OSError("disk")
    load, steps = FAILING[kind]
    loop = Loop(load(wrong), max_epochs=2, on_exception=on_exception)
    pairs = enter(loop)
    seen: list[Any] = []
    with pytest.raises(OSError) as caught:
        for pair in pairs:
            seen.append(pair)
    assert caught.value is wrong is loop.exception
    assert wrong.args == ("disk",) and wrong.__cause__ is None
    if on_exception == "event":
        assert seen.pop() == (None, LAST)
    if enter is iter:  # an unfinished list is not yielded
        assert loop.steps_done == steps
    assert loop.steps_done == len(flat(seen))
    assert loop.stop_reason == "exception"
    with pytest.raises(LoopError, match="ended with an exception") as later:
        enter(loop)
    assert later.value.__cause__ is wrong
    for _ in range(2):
        with pytest.raises(LoopError, match="ended with an exception"):
            next(pairs)


def stop_iteration(*_: object) -> Any:
    raise StopIteration("stray")


STRAY: dict[str, Callable[[], Loop[Any]]] = {
    "the clock": lambda: Loop([0] * 9, max_seconds=3, clock=iter([0, 1]).__next__),
    "the clock's first reading": lambda: Loop([0] * 9, max_seconds=3, clock=iter(()).__next__),
    "a condition": lambda: Loop([0] * 9, {"C": Event(stop_iteration)}, max_epochs=2),
    "a callable": lambda: Loop(stop_iteration, max_epochs=2),
    "iter()": lambda: Loop(type("L", (), {"__iter__": stop_iteration})(), max_epochs=2),
    "set_epoch": lambda: Loop(type("L", (Loader,), {"set_epoch": stop_iteration})(), max_epochs=2),
}


@each_way
@pytest.mark.parametrize("where", STRAY)
def test_a_stray_stop_iteration_does_not_end_the_loop_silently(where: str, enter: Enter) -> None:
    loop = STRAY[where]()
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        flat(enter(loop))
    assert isinstance(caught.value.__cause__, StopIteration)
    assert loop.stop_reason == "exception"


# ----------------------------------------------------------------- on_exception="event" and guard()


class BodyError(Exception):
    pass


@each_way
@pytest.mark.parametrize("at", [0, 3, 8])
def test_an_error_of_a_guarded_body_becomes_one_last_step(enter: Enter, at: int) -> None:
    def fails() -> None:
        raise error

    error = BodyError("in the body")
    seen: list[Any] = []
    with (
        pytest.raises(BodyError) as caught,
        Loop(range(9), max_epochs=1, on_exception="event") as loop,
    ):
        for batch, events in enter(loop):
            seen.append((batch, frozenset(events), loop.global_step))
            with loop.guard():
                if loop.global_step >= at:
                    fails()
    assert caught.value is error is loop.exception
    assert "fails" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    step = seen[-2][2]
    assert seen[-1] == (None, LAST, step)
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("leave", ["break", "return", "break in the last step"])
def test_an_error_under_guard_comes_out_though_the_loop_is_left(leave: str) -> None:
    def train(loop: Loop[int]) -> None:
        for _, events in loop:
            with loop.guard():
                raise error
            if leave == "return":
                return
            if leave == "break" or EXCEPTION in events:
                break

    error = BodyError()
    loop = Loop(range(9), max_epochs=1, on_exception="event")
    with pytest.raises(BodyError) as caught, loop:
        train(loop)
    assert caught.value is error


@pytest.mark.parametrize(
    ("on_exception", "error"),
    [
        ("event", KeyboardInterrupt),
        ("event", SystemExit),
        ("event", GeneratorExit),
        ("raise", BodyError),
    ],
)
@each_way
def test_guard_lets_through_what_is_no_exception_or_is_not_to_be_an_event(
    enter: Enter, on_exception: Any, error: type[BaseException]
) -> None:
    with Loop(range(9), max_epochs=1, on_exception=on_exception) as loop:
        with pytest.raises(error):
            for _ in enter(loop):
                with loop.guard():
                    raise error
        assert (loop.stop_reason, loop.exception) == (None, None)
        assert EXCEPTION not in next(enter(loop))[1]


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_guard_catches_nothing_after_the_run_was_left(leave: str) -> None:
    with pytest.raises(BodyError), Loop(range(9), max_epochs=1, on_exception="event") as loop:
        for _ in loop:
            with loop.guard():
                getattr(loop, leave)()
                raise BodyError


@pytest.mark.parametrize("guarded", [True, False])
def test_an_error_in_the_last_step_shows_the_first_one_with_it(guarded: bool) -> None:
    with (
        pytest.raises(BodyError, match="second") as caught,
        Loop(range(9), max_epochs=1, on_exception="event") as loop,
    ):
        for batch, _ in loop:
            with loop.guard() if guarded or batch is not None else contextlib.nullcontext():
                raise BodyError("second" if batch is None else "first")
    assert str(loop.exception) == "first"
    assert (caught.value.__cause__ or caught.value.__context__) is loop.exception


class PersistentWorkers:
    """As a DataLoader that keeps its workers in `_iterator`; Ctrl-C has ended them."""

    persistent_workers = True

    def __init__(self) -> None:
        self._iterator: Any = None
        self.alive = True

    def __iter__(self) -> Iterator[int]:
        if self._iterator is None:
            self.alive = True
            self._iterator = self
        self.check(0)
        return map(self.check, range(5))

    def check(self, number: int) -> int:
        if not self.alive:
            raise RuntimeError("a worker is dead")
        return number


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", ["", "base_dataloader", "_dataloader"])
@pytest.mark.parametrize("called", [False, True])
def test_persistent_workers_that_ctrl_c_killed_are_replaced(
    called: bool, name: str, steps: int
) -> None:
    class Wrapped:
        def __init__(self, workers: PersistentWorkers) -> None:
            setattr(self, name, workers)

        def __iter__(self) -> Iterator[int]:
            return iter(workers)

    workers = PersistentWorkers()
    loader = Wrapped(workers) if name else workers
    loop = Loop((lambda: loader) if called else loader, max_epochs=2)
    seen = flat(islice(loop, steps))
    workers.alive = False  # and the loop is left
    assert seen + flat(loop) == [*range(5)] * 2


def test_restart_forgets_the_exception() -> None:
    loop = Loop(SizedLoader([0, OSError("disk")], [0], promise=1), max_epochs=1)
    with pytest.raises(OSError, match="disk"):
        list(loop)
    loop.restart()
    assert (loop.exception, loop.stop_reason) == (None, None)
    assert flat(loop) == [0]


def test_an_exception_met_ahead_comes_though_the_step_before_was_interrupted() -> None:
    def condition(state: Any) -> None:
        if state.global_step == 1 and strikes:
            raise strikes.pop()

    strikes = [KeyboardInterrupt()]
    loop = Loop(RecordingLoader([0, 1, OSError("disk")]), {"C": Event(condition)}, max_epochs=1)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    with pytest.raises(OSError, match="disk"):
        seen.extend(batch for batch, _ in loop)
    assert seen == [0, 1]


def test_an_error_after_the_last_batch_is_forgiven_where_the_loop_was_left() -> None:
    loop = Loop(SizedLoader([0, 1, OSError("disk")], [0, 1], promise=2), max_epochs=2)
    flat(islice(loop, 2))
    assert flat(loop) == [0, 1]


def test_an_error_of_a_condition_that_closed_the_loop_is_not_the_runs() -> None:
    def condition(state: Any) -> None:
        loop.close()
        raise ValueError

    loop = Loop(range(3), {"C": Event(condition)}, max_epochs=1)
    with pytest.raises(ValueError):
        next(iter(loop))
    assert loop.exception is None


def test_a_loader_that_was_left_as_it_is_is_not_asked_beyond_its_length() -> None:
    loader = SizedLoader(range(9), promise=5)
    loop = Loop(loader, max_epochs=1, start_step=2, fast_forward=False)
    assert flat(loop) == [0, 1, 2]
    assert loader.requests == ["next 0", "next 1", "next 2"]
