"""Warnings and errors lead to the user's own line, never into dloop."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dloop import DataLengthError, Event, Loop, LoopState


def line() -> int:
    """The number of the line that calls this."""
    return sys._getframe(1).f_lineno


class Sized:
    """A loader whose length is wrong."""

    def __init__(self, length: int, promise: int) -> None:
        self.length = length
        self.promise = promise

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.promise


class SaysItsEnd(Sized):
    """A loader that says too early which batch is its last."""

    end_of_dataloader = False

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.end_of_dataloader = number + 1 == self.promise
            yield number


LOOPS: dict[str, Callable[[], Loop[int]]] = {
    "longer": lambda: Loop(Sized(5, 2), max_epochs=1),
    "longer in a later epoch": lambda: Loop(next_length, max_epochs=2),
    "longer in each epoch": lambda: Loop(Sized(5, 2), max_epochs=2),
    "longer than it says itself": lambda: Loop(SaysItsEnd(5, 2), max_epochs=2),
    "dry": lambda: Loop(iter([1, 2]), max_steps=9),
    "dry under lookahead": lambda: Loop(iter([1, 2]), max_steps=9, lookahead=True),
    "dry between epochs": lambda: Loop(iter([1, 2]), max_epochs=9, dataloader_len=1),
}
lengths = [2, 5]


def next_length() -> Sized:
    lengths.append(lengths.pop(0))
    return Sized(lengths[-1], 2)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_warning_of_the_loop_points_at_the_line_of_the_for(kind: str) -> None:
    loop = LOOPS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = line() + 1
        for _, events in loop:
            events = set(events)
    assert caught
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, here)}


def ask_next(loop: Loop[int]) -> int:
    iterator = iter(loop)
    try:
        while True:
            here = line() + 1
            next(iterator)
    except StopIteration:
        return here


def ask_list(loop: Loop[int]) -> int:
    here = line() + 1
    list(loop)
    return here


def ask_comprehension(loop: Loop[int]) -> int:
    here = line() + 1
    assert [batch for batch, _ in loop]
    return here


def ask_through_zip(loop: Loop[int]) -> int:
    here = line() + 1
    for _ in zip(loop):
        pass
    return here


@pytest.mark.parametrize("ask", [ask_next, ask_list, ask_comprehension, ask_through_zip])
@pytest.mark.parametrize("kind", LOOPS)
def test_a_warning_points_at_the_asking_line_however_it_asks(
    kind: str, ask: Callable[[Loop[int]], int]
) -> None:
    loop = LOOPS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = ask(loop)
    assert caught
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, here)}


def test_a_warning_points_past_a_subclass_into_the_users_file() -> None:
    class Own(Loop[int]):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(Own(Sized(5, 2), max_epochs=1))
    assert [warning.filename for warning in caught] == [__file__]


def test_the_warning_of_an_unknown_name_points_at_the_line_that_asks() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, events in Loop([0, 1], {"Log": Event(every_n_steps=1)}, max_epochs=1):
            here = line() + 1
            assert "Lgo" not in events
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, here)]


def test_the_warning_of_an_unknown_name_points_out_of_the_library_when_c_code_asks() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, events in Loop([0], {"Log": Event(every_n_steps=1)}, max_epochs=1):
            here = line() + 1
            assert list(map(events.__contains__, ["Lgo", "Log"])) == [False, True]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, here)]


def test_every_place_of_a_program_can_silence_its_own_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=__name__.rpartition(".")[2] + "$")
        assert len(list(Loop(Sized(5, 2), max_epochs=1))) == 2


def frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def test_an_error_of_the_loop_shows_the_line_of_the_for() -> None:
    loop = Loop(Sized(1, 2), max_epochs=1)
    with pytest.raises(DataLengthError) as caught:
        here = line() + 1
        for _ in loop:
            pass
    assert (frames(caught.value)[0].filename, frames(caught.value)[0].lineno) == (__file__, here)


def test_an_error_of_the_source_shows_the_line_of_the_for_and_the_sources_own() -> None:
    where: list[int] = []

    def source() -> Iterator[int]:
        yield 1
        where.append(line() + 1)
        raise OSError("disk")

    with pytest.raises(OSError) as caught:
        here = line() + 1
        for _ in Loop(source, max_epochs=1):
            pass
    found = frames(caught.value)
    assert (found[0].filename, found[0].lineno) == (__file__, here)
    assert (found[-1].filename, found[-1].lineno) == (__file__, where[0])


def test_an_error_of_a_condition_shows_the_line_of_the_for_and_the_conditions_own() -> None:
    where: list[int] = []

    def condition(state: LoopState) -> bool:
        where.append(line() + 1)
        raise OSError("disk")

    with pytest.raises(OSError) as caught:
        here = line() + 1
        for _ in Loop([0], {"E": Event(condition)}, max_epochs=1):
            pass
    found = frames(caught.value)
    assert (found[0].filename, found[0].lineno) == (__file__, here)
    assert (found[-1].filename, found[-1].lineno) == (__file__, where[0])
