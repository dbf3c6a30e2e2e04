"""Warnings and tracebacks show the user's line, not one of dloop."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dloop import DataLengthError, Event, Loop, LoopState


def line() -> int:
    """The line number of the caller."""
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


class EndsEarly(Sized):
    """A loader whose end_of_dataloader is true before its last batch."""

    end_of_dataloader = False

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.end_of_dataloader = number + 1 == self.promise
            yield number


LOOPS: dict[str, Callable[[], Loop[int]]] = {
    "longer": lambda: Loop(Sized(5, 2), max_epochs=1),
    "longer in a later epoch": lambda: Loop(next_length, max_epochs=2),
    "longer in each epoch": lambda: Loop(Sized(5, 2), max_epochs=2),
    "longer than end_of_dataloader says": lambda: Loop(EndsEarly(5, 2), max_epochs=2),
    "exhausted": lambda: Loop(iter([1, 2]), max_steps=9),
    "exhausted with lookahead": lambda: Loop(iter([1, 2]), max_steps=9, lookahead=True),
    "exhausted between epochs": lambda: Loop(iter([1, 2]), max_epochs=9, dataloader_len=1),
}
lengths = [2, 5]


def next_length() -> Sized:
    lengths.append(lengths.pop(0))
    return Sized(lengths[-1], 2)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_warning_of_the_loop_shows_the_line_of_the_for(kind: str) -> None:
    loop = LOOPS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = line() + 1
        for _, events in loop:
            events = set(events)
    assert caught
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, expected)}


def with_next(loop: Loop[int]) -> int:
    iterator = iter(loop)
    try:
        while True:
            expected = line() + 1
            next(iterator)
    except StopIteration:
        return expected


def with_list(loop: Loop[int]) -> int:
    expected = line() + 1
    list(loop)
    return expected


def with_comprehension(loop: Loop[int]) -> int:
    expected = line() + 1
    assert [batch for batch, _ in loop]
    return expected


def with_zip(loop: Loop[int]) -> int:
    expected = line() + 1
    for _ in zip(loop):
        pass
    return expected


@pytest.mark.parametrize("iterate", [with_next, with_list, with_comprehension, with_zip])
@pytest.mark.parametrize("kind", LOOPS)
def test_a_warning_shows_the_line_that_iterates(
    kind: str, iterate: Callable[[Loop[int]], int]
) -> None:
    loop = LOOPS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = iterate(loop)
    assert caught
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, expected)}


def test_a_warning_shows_the_users_file_if_loop_is_subclassed() -> None:
    class Subclass(Loop[int]):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(Subclass(Sized(5, 2), max_epochs=1))
    assert [warning.filename for warning in caught] == [__file__]


def test_the_warning_of_an_unknown_name_shows_the_line_of_the_in() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, events in Loop([0, 1], {"Log": Event(every_n_steps=1)}, max_epochs=1):
            expected = line() + 1
            assert "Lgo" not in events
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, expected)]


def test_the_warning_of_an_unknown_name_in_c_code_shows_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, events in Loop([0], {"Log": Event(every_n_steps=1)}, max_epochs=1):
            expected = line() + 1
            assert list(map(events.__contains__, ["Lgo", "Log"])) == [False, True]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, expected)]


def test_warnings_can_be_filtered_by_the_users_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=__name__.rpartition(".")[2] + "$")
        assert len(list(Loop(Sized(5, 2), max_epochs=1))) == 2


def frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def test_an_error_of_the_loop_shows_the_line_of_the_for() -> None:
    loop = Loop(Sized(1, 2), max_epochs=1)
    with pytest.raises(DataLengthError) as caught:
        expected = line() + 1
        for _ in loop:
            pass
    assert (frames(caught.value)[0].filename, frames(caught.value)[0].lineno) == (
        __file__,
        expected,
    )


def test_an_error_of_the_source_shows_the_line_of_the_for_and_the_sources_own() -> None:
    where: list[int] = []

    def source() -> Iterator[int]:
        yield 1
        where.append(line() + 1)
        raise OSError("disk")

    with pytest.raises(OSError) as caught:
        expected = line() + 1
        for _ in Loop(source, max_epochs=1):
            pass
    found = frames(caught.value)
    assert (found[0].filename, found[0].lineno) == (__file__, expected)
    assert (found[-1].filename, found[-1].lineno) == (__file__, where[0])


def test_an_error_of_a_condition_shows_the_line_of_the_for_and_the_conditions_own() -> None:
    where: list[int] = []

    def condition(state: LoopState) -> bool:
        where.append(line() + 1)
        raise OSError("disk")

    with pytest.raises(OSError) as caught:
        expected = line() + 1
        for _ in Loop([0], {"E": Event(condition)}, max_epochs=1):
            pass
    found = frames(caught.value)
    assert (found[0].filename, found[0].lineno) == (__file__, expected)
    assert (found[-1].filename, found[-1].lineno) == (__file__, where[0])
