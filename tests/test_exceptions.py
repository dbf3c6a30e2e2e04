"""on_exception="event" and guard(): an error becomes one last step, and always comes out."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from dloop import Event, Loop, LoopError, LoopEvents, LoopWarning

LAST = frozenset({LoopEvents.EXCEPTION, LoopEvents.TRAINING_END})
Enter = Callable[[Loop[Any]], Iterator[tuple[Any, Any]]]
ENTER: dict[str, Enter] = {"plain": iter, "chunks": lambda loop: loop.chunks(2)}
each_way = pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))


class BatchError(Exception):
    pass


class Broken:
    """Breaks at a fetch, or at its opening."""

    def __init__(self, good: int, opens: bool = True, error: BaseException | None = None) -> None:
        self.good = good
        self.opens = opens
        self.error = error or BatchError("broken batch")

    def __iter__(self) -> Iterator[int]:
        if not self.opens:
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


def shows(error: BaseException, function: str) -> bool:
    return function in {frame.name for frame in traceback.extract_tb(error.__traceback__)}


@pytest.mark.parametrize("loader", [Broken, Sized])
def test_an_error_of_a_fetch_is_one_last_step_and_then_comes_out(loader: type[Broken]) -> None:
    source = loader(3)
    loop = as_events(source)
    steps, error = collect(loop)
    assert steps == [(0, frozenset()), (1, frozenset()), (2, frozenset()), (None, LAST)]
    assert error is source.error is loop.exception
    assert shows(source.error, "read")
    assert loop.stop_reason == "exception"
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, 2, 2)
    with pytest.raises(LoopError):
        next(iter(loop))


@each_way
def test_an_error_of_the_first_fetch_or_of_the_opening(enter: Enter) -> None:
    for source in (Broken(0), Broken(0, opens=False)):
        loop = as_events(source)
        steps, error = collect(loop, enter)
        assert steps == [(None, LAST)]
        assert error is source.error is loop.exception
        assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, -1, -1)
        with pytest.raises(LoopError):
            next(enter(loop))


def test_an_error_of_a_callable_loader() -> None:
    error = BatchError("no loader today")

    def loader() -> list[int]:
        raise error

    loop = as_events(loader)
    assert collect(loop) == ([(None, LAST)], error)


def test_an_error_of_a_later_epochs_opening() -> None:
    error = BatchError("no second epoch")
    loaders = iter([[0, 1]])

    def loader() -> list[int]:
        for batches in loaders:
            return batches
        raise error

    loop = Loop(loader, max_epochs=2, on_exception="event")
    steps, came = collect(loop)
    assert steps == [(0, frozenset()), (1, {LoopEvents.EPOCH_END}), (None, LAST)]
    assert came is error
    assert (loop.epoch, loop.global_step) == (0, 1)


def test_under_chunks_the_error_comes_after_what_was_gathered() -> None:
    source = Sized(5)
    loop = as_events(source)
    steps, error = collect(loop, lambda loop: loop.chunks(3))
    assert [batch for batch, _ in steps] == [[0, 1, 2], [3, 4], None]
    assert steps[-1][1] == LAST
    assert error is source.error
    assert loop.global_step == 4


def test_names_joined_with_the_members_fire_on_the_last_step() -> None:
    events = {
        "Failed": Event(at_step=1000) | LoopEvents.EXCEPTION,
        "Save": Event(every_n_steps=1000) | LoopEvents.TRAINING_END,
        "Every": Event(every_n_steps=1),
        "Asked": Event(lambda state: True),
        "Timed": Event(every_n_seconds=1e-9),
        "Epoch": Event(every_n_steps=1000) | LoopEvents.EPOCH_END,
        "Interrupted": Event(every_n_steps=1000) | LoopEvents.INTERRUPT,
    }
    steps, error = collect(as_events(Sized(2), events))
    assert steps[-1] == (None, LAST | {"Failed", "Save"})
    assert isinstance(error, BatchError)


def test_a_member_can_be_asked_for_and_is_listed() -> None:
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
def test_an_error_of_a_guarded_body_is_one_last_step(enter: Enter) -> None:
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
    assert shows(error, "fails")
    assert steps[-1] == (None, LAST)
    assert steps[-2][0] is not None
    assert loop.global_step == 3
    assert loop.stop_reason == "exception"
    assert len(after) == 1
    with pytest.raises(LoopError):
        next(enter(loop))


def test_a_guarded_body_of_the_last_step() -> None:
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


def test_a_body_without_a_guard_raises_as_ever() -> None:
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
def test_guard_lets_those_pass_that_are_no_errors(enter: Enter, error: type[BaseException]) -> None:
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
def test_a_source_lets_those_pass_that_are_no_errors(enter: Enter, error: BaseException) -> None:
    loop = as_events(Sized(1, error=error))
    steps, came = collect(loop, enter)
    if steps == []:  # what was gathered waits for the `for` to be entered again
        assert enter is not iter
    assert came is error
    assert all(LoopEvents.EXCEPTION not in events for _, events in steps)


def test_guard_lets_all_pass_where_exceptions_are_raised() -> None:
    loop = Loop(range(3), max_epochs=1)
    with pytest.raises(BatchError):
        for _batch, _events in loop:
            with loop.guard():
                raise BatchError
    assert next(iter(loop))[0] == 1
    assert loop.exception is None


def test_where_exceptions_are_raised_the_loop_knows_what_ended_it() -> None:
    source = Sized(2)
    loop = Loop(source, max_epochs=1)
    assert loop.exception is None
    steps, error = collect(loop)
    assert [batch for batch, _ in steps] == [0, 1]
    assert error is source.error is loop.exception
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("mode", ["raise", "event"])
@each_way
def test_an_error_of_a_condition_comes_out_as_ever(enter: Enter, mode: str) -> None:
    error = BatchError("in a condition")

    def condition(state: Any) -> bool:
        if state.global_step == 2:
            raise error
        return False

    loop = Loop(range(9), {"Bad": Event(condition)}, max_epochs=1, on_exception=mode)
    steps, came = collect(loop, enter)
    assert came is error is loop.exception
    assert all(batch is not None for batch, _ in steps)
    assert any("Bad" in note for note in error.__notes__)
    assert loop.stop_reason == "exception"


@pytest.mark.parametrize("mode", ["raise", "event"])
def test_an_error_of_the_clock_comes_out_as_ever(mode: str) -> None:
    error = BatchError("in the clock")
    readings = iter([0, 1])

    def clock() -> int:
        for reading in readings:
            return reading
        raise error

    timed = {"T": Event(every_n_seconds=5)}
    loop = Loop(range(9), timed, max_epochs=1, clock=clock, on_exception=mode)
    steps, came = collect(loop)
    assert came is error is loop.exception
    assert [batch for batch, _ in steps] == [0]


def test_an_error_that_was_met_looking_ahead_comes_after_the_batch_in_hand() -> None:
    source = Broken(2)
    loop = as_events(source, lookahead=True)
    pairs = iter(loop)
    assert next(pairs) == (0, frozenset())
    assert next(pairs) == (1, frozenset())
    assert loop.exception is None
    assert next(pairs) == (None, LAST)
    with pytest.raises(BatchError):
        next(pairs)


def test_leaving_with_raises_what_a_break_left_behind() -> None:
    source = Sized(2)
    with pytest.raises(BatchError) as caught, as_events(source) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                break
    assert caught.value is source.error
    assert shows(caught.value, "read")


def test_leaving_with_raises_it_once() -> None:
    with pytest.raises(BatchError), as_events(Sized(1)) as loop:
        collect(loop)
        raise BatchError("another of the user's")
    with as_events(Sized(1)) as loop:
        _, error = collect(loop)
        assert isinstance(error, BatchError)  # it came out, and was handled


def test_leaving_with_raises_a_guarded_error_that_nothing_asked_for() -> None:
    error = BatchError("guarded")
    with pytest.raises(BatchError) as caught, as_events(range(5)) as loop:
        for _batch, _events in loop:
            with loop.guard():
                raise error
            break
    assert caught.value is error


def test_an_error_that_is_leaving_with_already_goes_first() -> None:
    with pytest.raises(ZeroDivisionError), as_events(Sized(1)) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                raise ZeroDivisionError


def test_a_loop_that_ends_well_has_no_exception() -> None:
    with as_events(range(3)) as loop:
        for _batch, _events in loop:
            with loop.guard():
                pass
    assert loop.exception is None
    assert loop.stop_reason == "max_epochs"


def test_restart_forgets_the_exception() -> None:
    loop = as_events(Sized(1))
    collect(loop)
    loop.restart()
    assert loop.exception is None
    assert loop.stop_reason is None
    assert next(iter(loop))[0] == 0


def test_a_state_that_is_saved_in_the_last_step_goes_on_where_it_broke() -> None:
    loop = as_events(iter(Broken(2)), lookahead=True)
    for batch, _events in loop:
        if batch is None:
            state = loop.state_dict()
            break
    whole = as_events(batch for batch in range(4))
    whole.load_state_dict(state)
    with pytest.warns(LoopWarning, match="2"):  # it says how many batches it skips
        assert [batch for batch, _ in whole] == [2, 3]


@pytest.mark.parametrize("value", ["ignore", None, 1])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="on_exception"):
        Loop(range(3), max_epochs=1, on_exception=value)


@pytest.mark.parametrize("sizes", [None, 3])
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("at", range(6))
def test_a_generator_that_ctrl_c_has_ended_is_made_anew(
    at: int, lookahead: Any, sizes: Any
) -> None:
    strikes = [KeyboardInterrupt]

    def load() -> Iterator[int]:
        for number in range(5):
            if strikes and number == at:
                raise strikes.pop()
            yield number
        if strikes:
            raise strikes.pop()

    loop = Loop(load, {"Third": Event(at_step=2)}, max_epochs=1, lookahead=lookahead)
    seen: list[tuple[Any, frozenset[object]]] = []

    def cell() -> None:
        for batch, events in loop if sizes is None else loop.chunks(sizes):
            seen.append((batch, frozenset(events)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            cell()
        cell()
    assert [number for batch, _ in seen for number in (batch if sizes else [batch])] == [*range(5)]
    assert [bool("Third" in events) for _, events in seen].count(True) == 1
    assert seen[-1][1] >= {LoopEvents.EPOCH_END, LoopEvents.TRAINING_END}
    assert ["fetched and dropped" in str(each.message) for each in caught] == [True] * bool(at)


@pytest.mark.parametrize("sizes", [None, 3])
def test_an_epoch_in_which_ctrl_c_cost_a_batch_has_its_end(sizes: Any) -> None:
    """As with PyTorch's DataLoader without workers, which has drawn the indices by then."""

    class Loader:
        strikes: ClassVar[list[type[BaseException]]] = [KeyboardInterrupt]

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[int]:
            return map(self.item, range(5))

        def item(self, index: int) -> int:
            if self.strikes and index == 2:
                raise self.strikes.pop()
            return index

    Loader.strikes = [KeyboardInterrupt]
    loop = Loop(Loader(), max_epochs=2)
    seen: list[Any] = []
    ends: list[int] = []

    def cell() -> None:
        for batch, events in loop if sizes is None else loop.chunks(sizes):
            seen.extend([batch] if sizes is None else batch)
            ends.extend([loop.global_step] * (LoopEvents.EPOCH_END in events))

    with pytest.raises(KeyboardInterrupt):
        cell()
    cell()
    assert seen == [0, 1, 3, 4, 0, 1, 2, 3, 4]
    assert ends == [3, 8]


def test_a_generator_that_ctrl_c_has_ended_cannot_be_made_anew() -> None:
    strikes = [KeyboardInterrupt]

    def load() -> Iterator[int]:
        yield 0
        raise strikes.pop()

    loop = Loop(load(), max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    with pytest.raises(LoopError, match="single-pass"):
        list(loop)


def test_a_state_after_ctrl_c_in_a_loader_is_that_of_the_steps_that_were_done() -> None:
    class Loader:
        at = 0
        strikes: ClassVar[list[type[BaseException]]] = [KeyboardInterrupt]

        def __iter__(self) -> Iterator[int]:
            start, self.at = self.at, 0
            for number in range(start, 6):
                self.at = number + 1
                if self.strikes and number == 4:
                    raise self.strikes.pop()
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


def test_an_error_of_a_single_pass_source_after_an_interrupt_becomes_an_event() -> None:
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


def causes(error: BaseException) -> list[str]:
    """What a traceback of `error` shows, the last first."""
    found = []
    following: BaseException | None = error
    while following is not None:
        found.append(str(following))
        following = following.__cause__ or following.__context__
    return found


@each_way
def test_a_guarded_stop_iteration_does_not_end_the_loop_in_silence(enter: Enter) -> None:
    loop = as_events(range(9))
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        for _batch, events in enter(loop):
            if LoopEvents.EXCEPTION in events:
                continue
            with loop.guard():
                next(iter(()))
    assert isinstance(caught.value.__cause__, StopIteration)


@each_way
def test_an_error_in_the_last_step_tells_of_the_first(enter: Enter) -> None:
    loop = as_events(range(9))
    with pytest.raises(BatchError, match="second") as caught:
        for batch, _events in enter(loop):
            with loop.guard():
                raise BatchError("second" if batch is None else "first")
    assert causes(caught.value) == ["second", "first"]
    assert str(loop.exception) == "first"


def test_an_error_of_saving_tells_of_what_was_to_be_saved_after() -> None:
    with pytest.raises(OSError, match="full") as caught, as_events(range(9)) as loop:
        for _batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                try:
                    raise KeyError("of its own")
                except KeyError:
                    raise OSError("the disk is full") from None
            with loop.guard():
                raise BatchError("first")
    assert causes(caught.value) == ["the disk is full", "'of its own'", "first"]


def test_an_error_that_the_body_raises_itself_is_not_told_twice() -> None:
    with pytest.raises(BatchError) as caught, as_events(range(9)) as loop:
        for batch, _events in loop:
            if batch is None:
                assert loop.exception is not None
                raise loop.exception
            with loop.guard():
                raise BatchError("first")
    assert causes(caught.value) == ["first"]


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_a_guard_lets_pass_what_no_step_would_tell_of(leave: str) -> None:
    loop = as_events(range(9))
    with pytest.raises(BatchError, match="after that"):
        for _batch, _events in loop:
            with loop.guard():
                getattr(loop, leave)()
                raise BatchError("after that")


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("size", [None, 2, 4])
def test_no_error_of_a_condition_becomes_an_event(size: int | None, at: int) -> None:
    def check(state: Any) -> bool:
        if state.global_step == at:
            raise BatchError("of the condition")
        return False

    enter: Enter = iter if size is None else lambda loop: loop.chunks(size)
    steps, error = collect(as_events(range(9), {"C": Event(check)}), enter)
    assert all(batch is not None for batch, _ in steps)
    assert isinstance(error, BatchError)
