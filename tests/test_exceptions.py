"""on_exception="event" and guard(): an error becomes one last step, after which it is raised."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from dloop import Event, Loop, LoopError, LoopEvents
from loops import ENTER, Enter

LAST = frozenset({LoopEvents.EXCEPTION, LoopEvents.TRAINING_END})
each_way = pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))


class BatchError(Exception):
    pass


class Broken:
    """A loader that raises after `good` batches, or in `iter()`."""

    def __init__(
        self, good: int, iterates: bool = True, error: BaseException | None = None
    ) -> None:
        self.good = good
        self.iterates = iterates
        self.error = error or BatchError("broken batch")

    def __iter__(self) -> Iterator[int]:
        if not self.iterates:
            raise self.error
        return self.read()

    def read(self) -> Iterator[int]:
        yield from range(self.good)
        raise self.error


class Sized(Broken):
    def __len__(self) -> int:
        return 10


def as_events(loader: Any, events: Any = None, **arguments: Any) -> Loop[Any]:
    limit = {} if arguments.keys() & {"max_steps", "max_seconds"} else {"max_epochs": 1}
    return Loop(loader, events, on_exception="event", **limit, **arguments)


def collect(loop: Loop[Any], enter: Enter = iter) -> tuple[list[Any], BaseException | None]:
    steps: list[Any] = []
    try:
        for batch, events in enter(loop):
            steps.append((batch, frozenset(events)))
    except BaseException as error:
        return steps, error
    return steps, None


def has_frame_of(error: BaseException, function: str) -> bool:
    return function in {frame.name for frame in traceback.extract_tb(error.__traceback__)}


@pytest.mark.parametrize("loader", [Broken, Sized])
def test_an_error_of_a_fetch_becomes_one_last_step_and_is_then_raised(loader: type[Broken]) -> None:
    source = loader(3)
    loop = as_events(source)
    steps, error = collect(loop)
    assert steps == [(0, frozenset()), (1, frozenset()), (2, frozenset()), (None, LAST)]
    assert error is source.error is loop.exception
    assert has_frame_of(source.error, "read")
    assert loop.stop_reason == "exception"
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, 2, 2)
    with pytest.raises(LoopError):
        next(iter(loop))


@each_way
def test_an_error_of_the_first_fetch_or_of_iter_becomes_one_last_step(enter: Enter) -> None:
    for source in (Broken(0), Broken(0, iterates=False)):
        loop = as_events(source)
        steps, error = collect(loop, enter)
        assert steps == [(None, LAST)]
        assert error is source.error is loop.exception
        assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, -1, -1)
        with pytest.raises(LoopError):
            next(enter(loop))


def test_an_error_of_a_callable_loader_becomes_one_last_step() -> None:
    error = BatchError("no loader today")

    def loader() -> list[int]:
        raise error

    loop = as_events(loader)
    assert collect(loop) == ([(None, LAST)], error)


def test_an_error_at_the_start_of_a_later_epoch_becomes_one_last_step() -> None:
    error = BatchError("no second epoch")
    loaders = iter([[0, 1]])

    def loader() -> list[int]:
        for batches in loaders:
            return batches
        raise error

    loop = Loop(loader, max_epochs=2, on_exception="event")
    steps, raised = collect(loop)
    assert steps == [(0, frozenset()), (1, {LoopEvents.EPOCH_END}), (None, LAST)]
    assert raised is error
    assert (loop.epoch, loop.global_step) == (0, 1)


def test_with_chunks_the_last_step_comes_after_the_batches_before_the_error() -> None:
    source = Sized(5)
    loop = as_events(source)
    steps, error = collect(loop, lambda loop: loop.chunks(3))
    assert [batch for batch, _ in steps] == [[0, 1, 2], [3, 4], None]
    assert steps[-1][1] == LAST
    assert error is source.error
    assert loop.global_step == 4


def test_only_events_joined_with_exception_or_training_end_fire_on_the_last_step() -> None:
    events = {
        "Failed": Event(at_step=1000) | LoopEvents.EXCEPTION,
        "Save": Event(every_n_steps=1000) | LoopEvents.TRAINING_END,
        "Every": Event(every_n_steps=1),
        "Condition": Event(lambda state: True),
        "Timed": Event(every_n_seconds=1e-9),
        "Epoch": Event(every_n_steps=1000) | LoopEvents.EPOCH_END,
        "Interrupted": Event(every_n_steps=1000) | LoopEvents.INTERRUPT,
    }
    steps, error = collect(as_events(Sized(2), events))
    assert steps[-1] == (None, LAST | {"Failed", "Save"})
    assert isinstance(error, BatchError)


def test_interrupt_and_exception_are_loop_events_and_interrupt_does_not_fire() -> None:
    assert list(LoopEvents) == [
        LoopEvents.EPOCH_END,
        LoopEvents.TRAINING_END,
        LoopEvents.INTERRUPT,
        LoopEvents.EXCEPTION,
    ]
    for _batch, events in itertools.islice(as_events(Sized(1)), 2):
        assert LoopEvents.INTERRUPT not in events
    assert LoopEvents.EXCEPTION in events


@each_way
def test_an_error_of_a_guarded_body_becomes_one_last_step(enter: Enter) -> None:
    loop = as_events(range(10))
    error = BatchError("in the body")
    steps: list[Any] = []
    after = []

    def fails() -> None:
        raise error

    with pytest.raises(BatchError) as caught:
        for batch, events in enter(loop):
            steps.append((batch, frozenset(events)))
            with loop.guard():
                if loop.global_step >= 3 and batch is not None:
                    fails()
                continue
            after.append(loop.stop_requested)
    assert caught.value is error is loop.exception
    assert has_frame_of(error, "fails")
    assert steps[-1] == (None, LAST)
    assert steps[-2][0] is not None
    assert loop.global_step == 3
    assert loop.stop_reason == "exception"
    assert len(after) == 1
    with pytest.raises(LoopError):
        next(enter(loop))


def test_an_error_of_the_guarded_body_of_the_last_step_becomes_another_step() -> None:
    loop = as_events(range(3))
    error = BatchError("in the last body")
    steps = []
    with pytest.raises(BatchError) as caught:
        for batch, events in loop:
            steps.append((batch, frozenset(events)))
            with loop.guard():
                if batch == 2:
                    raise error
    assert caught.value is error
    assert steps[2:] == [(2, {LoopEvents.EPOCH_END, LoopEvents.TRAINING_END}), (None, LAST)]
    assert loop.stop_reason == "exception"


def test_an_error_of_a_body_without_guard_does_not_end_the_run() -> None:
    loop = as_events(range(3))
    for _batch, _events in loop:
        break
    with pytest.raises(BatchError):
        for _batch, _events in loop:
            raise BatchError
    assert loop.exception is None
    assert loop.stop_reason is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@each_way
def test_guard_does_not_catch_exceptions_that_are_not_errors(
    enter: Enter, error: type[BaseException]
) -> None:
    loop = as_events(range(10))
    with pytest.raises(error):
        for _batch, _events in enter(loop):
            with loop.guard():
                raise error
    assert loop.stop_reason is None
    assert loop.exception is None
    _batch, events = next(enter(loop))
    assert LoopEvents.EXCEPTION not in events


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
@each_way
def test_exceptions_of_a_source_that_are_not_errors_are_raised_at_once(
    enter: Enter, error: BaseException
) -> None:
    loop = as_events(Sized(1, error=error))
    steps, raised = collect(loop, enter)
    assert raised is error
    assert [batch for batch, _ in steps] == ([0] if enter is iter else [])
    assert all(LoopEvents.EXCEPTION not in events for _, events in steps)


def test_guard_catches_nothing_with_on_exception_raise() -> None:
    loop = Loop(range(3), max_epochs=1)
    with pytest.raises(BatchError):
        for _batch, _events in loop:
            with loop.guard():
                raise BatchError
    assert next(iter(loop))[0] == 1
    assert loop.exception is None


def test_loop_exception_is_set_with_on_exception_raise() -> None:
    source = Sized(2)
    loop = Loop(source, max_epochs=1)
    assert loop.exception is None
    steps, error = collect(loop)
    assert [batch for batch, _ in steps] == [0, 1]
    assert error is source.error is loop.exception
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("mode", ["raise", "event"])
@each_way
def test_an_error_of_a_condition_is_raised_in_both_modes(enter: Enter, mode: str) -> None:
    error = BatchError("in a condition")

    def condition(state: Any) -> bool:
        if state.global_step == 2:
            raise error
        return False

    loop = Loop(range(9), {"Bad": Event(condition)}, max_epochs=1, on_exception=mode)
    steps, raised = collect(loop, enter)
    assert raised is error is loop.exception
    assert all(batch is not None for batch, _ in steps)
    assert any("Bad" in note for note in error.__notes__)
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("mode", ["raise", "event"])
def test_an_error_of_the_clock_is_raised_in_both_modes(mode: str) -> None:
    error = BatchError("in the clock")
    readings = iter([0, 1])

    def clock() -> int:
        for reading in readings:
            return reading
        raise error

    timed = {"T": Event(every_n_seconds=5)}
    loop = Loop(range(9), timed, max_epochs=1, clock=clock, on_exception=mode)
    steps, raised = collect(loop)
    assert raised is error is loop.exception
    assert [batch for batch, _ in steps] == [0]


def test_an_error_found_by_lookahead_comes_after_the_batch_before_it() -> None:
    source = Broken(2)
    loop = as_events(source, lookahead=True)
    pairs = iter(loop)
    assert next(pairs) == (0, frozenset())
    assert next(pairs) == (1, frozenset())
    assert loop.exception is None
    assert next(pairs) == (None, LAST)
    with pytest.raises(BatchError):
        next(pairs)


def test_after_a_break_in_the_last_step_leaving_the_with_raises_the_error() -> None:
    source = Sized(2)
    with pytest.raises(BatchError) as caught, as_events(source) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                break
    assert caught.value is source.error
    assert has_frame_of(caught.value, "read")


def test_leaving_the_with_does_not_raise_an_error_again() -> None:
    with pytest.raises(BatchError), as_events(Sized(1)) as loop:
        collect(loop)
        raise BatchError("another error")
    with as_events(Sized(1)) as loop:
        _, error = collect(loop)
        assert isinstance(error, BatchError)  # it was raised, and handled here


def test_after_a_break_leaving_the_with_raises_the_guarded_error() -> None:
    error = BatchError("guarded")
    with pytest.raises(BatchError) as caught, as_events(range(5)) as loop:
        for _batch, _events in loop:
            with loop.guard():
                raise error
            break
    assert caught.value is error


def test_an_error_of_the_last_steps_body_is_raised_instead() -> None:
    with pytest.raises(ZeroDivisionError), as_events(Sized(1)) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                raise ZeroDivisionError


def test_loop_exception_is_none_after_a_run_without_errors() -> None:
    with as_events(range(3)) as loop:
        for _batch, _events in loop:
            with loop.guard():
                pass
    assert loop.exception is None
    assert loop.stop_reason == "max_epochs"


def test_restart_clears_the_exception() -> None:
    loop = as_events(Sized(1))
    collect(loop)
    loop.restart()
    assert loop.exception is None
    assert loop.stop_reason is None
    assert next(iter(loop))[0] == 0


def test_a_state_saved_in_the_last_step_resumes_with_the_batch_that_failed() -> None:
    loop = as_events(iter(Broken(2)), lookahead=True)
    for batch, _events in loop:
        if batch is None:
            state = loop.state_dict()
            break
    whole = as_events(batch for batch in range(4))
    whole.load_state_dict(state)
    assert [batch for batch, _ in whole] == [2, 3]


@pytest.mark.parametrize("value", ["ignore", None, 1])
def test_other_values_of_on_exception_are_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="on_exception"):
        Loop(range(3), max_epochs=1, on_exception=value)


@pytest.mark.parametrize("sizes", [None, 3])
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("at", range(6))
def test_a_generator_function_is_called_again_after_ctrl_c_ended_its_generator(
    at: int, lookahead: Any, sizes: Any
) -> None:
    interrupts = [KeyboardInterrupt]

    def load() -> Iterator[int]:
        for number in range(5):
            if interrupts and number == at:
                raise interrupts.pop()
            yield number
        if interrupts:
            raise interrupts.pop()

    loop = Loop(load, {"Third": Event(at_step=2)}, max_epochs=1, lookahead=lookahead)
    seen: list[tuple[Any, frozenset[object]]] = []

    def run() -> None:
        for batch, events in loop if sizes is None else loop.chunks(sizes):
            seen.append((batch, frozenset(events)))

    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert [number for batch, _ in seen for number in (batch if sizes else [batch])] == [*range(5)]
    assert [bool("Third" in events) for _, events in seen].count(True) == 1
    assert seen[-1][1] >= {LoopEvents.EPOCH_END, LoopEvents.TRAINING_END}


@pytest.mark.parametrize("sizes", [None, 3])
def test_a_loader_that_loses_a_batch_to_ctrl_c_gives_it_again(sizes: Any) -> None:
    """As PyTorch's DataLoader without workers, which draws the indices before the batch."""

    class Loader:
        interrupts: ClassVar[list[type[BaseException]]] = [KeyboardInterrupt]

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[int]:
            return map(self.item, range(5))

        def item(self, index: int) -> int:
            if self.interrupts and index == 2:
                raise self.interrupts.pop()
            return index

    Loader.interrupts = [KeyboardInterrupt]
    loop = Loop(Loader(), max_epochs=2)
    seen: list[Any] = []
    ends: list[int] = []

    def run() -> None:
        for batch, events in loop if sizes is None else loop.chunks(sizes):
            seen.extend([batch] if sizes is None else batch)
            ends.extend([loop.global_step] * (LoopEvents.EPOCH_END in events))

    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert seen == [0, 1, 2, 3, 4] * 2
    assert ends == [4, 9]


def test_a_generator_that_ctrl_c_has_ended_gives_a_loop_error() -> None:
    interrupts = [KeyboardInterrupt]

    def load() -> Iterator[int]:
        yield 0
        raise interrupts.pop()

    loop = Loop(load(), max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    with pytest.raises(LoopError, match="single-pass"):
        list(loop)


def test_a_state_after_ctrl_c_in_a_loader_is_that_after_the_latest_step() -> None:
    class Loader:
        at = 0
        interrupts: ClassVar[list[type[BaseException]]] = [KeyboardInterrupt]

        def __iter__(self) -> Iterator[int]:
            start, self.at = self.at, 0
            for number in range(start, 6):
                self.at = number + 1
                if self.interrupts and number == 4:
                    raise self.interrupts.pop()
                yield number

        def state_dict(self) -> Any:
            return {"at": self.at}

        def load_state_dict(self, state: Any) -> None:
            self.at = state["at"]

    loop = Loop(Loader(), max_epochs=1)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for batch, _events in loop:
            seen.append(batch)
    again = Loop(Loader(), max_epochs=1)
    again.load_state_dict(loop.state_dict())
    rest = [batch for batch, _ in again]
    assert seen + rest == seen + [batch for batch, _ in loop] == [*range(6)]


def test_an_error_of_a_single_pass_source_after_an_interrupt_becomes_one_last_step() -> None:
    class Fails:
        errors: ClassVar[list[BaseException]] = [KeyboardInterrupt(), OSError("disk")]

        def __init__(self) -> None:
            self.left = list(self.errors)

        def __iter__(self) -> Fails:
            return self

        def __next__(self) -> int:
            raise self.left.pop(0)

    loop = Loop(Fails(), max_steps=3, on_exception="event")
    pairs = iter(loop)
    with pytest.raises(KeyboardInterrupt):
        next(pairs)
    assert next(pairs) == (None, {LoopEvents.EXCEPTION, LoopEvents.TRAINING_END})
    with pytest.raises(LoopError, match="single-pass") as caught:
        next(pairs)
    assert str(caught.value.__cause__) == "disk"


def chain_of(error: BaseException) -> list[str]:
    """The messages of `error` and of the causes and contexts that a traceback shows with it."""
    messages = []
    following: BaseException | None = error
    while following is not None:
        messages.append(str(following))
        following = following.__cause__ or following.__context__
    return messages


@each_way
def test_a_guarded_stop_iteration_is_raised_as_runtime_error(enter: Enter) -> None:
    loop = as_events(range(9))
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        for _batch, events in enter(loop):
            if LoopEvents.EXCEPTION in events:
                continue
            with loop.guard():
                next(iter(()))
    assert isinstance(caught.value.__cause__, StopIteration)


@each_way
def test_an_error_in_the_last_step_has_the_first_one_in_its_traceback(enter: Enter) -> None:
    loop = as_events(range(9))
    with pytest.raises(BatchError, match="second") as caught:
        for batch, _events in enter(loop):
            with loop.guard():
                raise BatchError("second" if batch is None else "first")
    assert chain_of(caught.value) == ["second", "first"]
    assert str(loop.exception) == "first"


def test_an_error_raised_in_the_last_step_from_none_has_the_first_one_in_its_traceback() -> None:
    with pytest.raises(OSError, match="full") as caught, as_events(range(9)) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                try:
                    raise KeyError("of its own")
                except KeyError:
                    raise OSError("the disk is full") from None
            with loop.guard():
                raise BatchError("first")
    assert chain_of(caught.value) == ["the disk is full", "'of its own'", "first"]


def test_if_the_body_raises_loop_exception_its_traceback_shows_it_once() -> None:
    with pytest.raises(BatchError) as caught, as_events(range(9)) as loop:
        for batch, _events in loop:
            if batch is None:
                assert loop.exception is not None
                raise loop.exception
            with loop.guard():
                raise BatchError("first")
    assert chain_of(caught.value) == ["first"]


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_guard_does_not_catch_errors_after_the_loop_was_closed_or_restarted(leave: str) -> None:
    loop = as_events(range(9))
    with pytest.raises(BatchError, match="after that"):
        for _batch, _events in loop:
            with loop.guard():
                getattr(loop, leave)()
                raise BatchError("after that")


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("size", [None, 2, 4])
def test_an_error_of_a_condition_never_becomes_a_last_step(size: int | None, at: int) -> None:
    def check(state: Any) -> bool:
        if state.global_step == at:
            raise BatchError("of the condition")
        return False

    enter: Enter = iter if size is None else lambda loop: loop.chunks(size)
    steps, error = collect(as_events(range(9), {"C": Event(check)}), enter)
    assert all(batch is not None for batch, _ in steps)
    assert isinstance(error, BatchError)
