"""What is asked of a loop while a step is made: by the dataloader, a condition or the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest

from dloop import Event, Loop, LoopError
from interpreter import needs_reference_counts
from loops import ENTER, flat

by_entry = pytest.mark.parametrize("enter", list(ENTER))


class Stateful:
    """A loader of `length` batches that keeps its place. Requests are counted from 1."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.place = 0
        self.loaded = False
        self.requests = 0
        self.interrupts: tuple[int, ...] = ()
        self.on_request: Callable[[], object] = lambda: None

    def __iter__(self) -> Iterator[int]:
        if not self.loaded:
            self.place = 0
        self.loaded = False
        return StatefulBatches(self)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]
        self.loaded = True


class SizedStateful(Stateful):
    """The same, with a length."""

    def __len__(self) -> int:
        return self.length


class StatefulBatches:
    def __init__(self, loader: Stateful) -> None:
        self.loader = loader

    def __iter__(self) -> StatefulBatches:
        return self

    def __next__(self) -> int:
        loader = self.loader
        loader.requests += 1
        loader.on_request()
        if loader.requests in loader.interrupts:
            raise KeyboardInterrupt
        if loader.place >= loader.length:
            raise StopIteration
        loader.place += 1
        return loader.place - 1


def resumed(state: Any, loader: Stateful, epochs: int = 1) -> list[int]:
    """The batches of a run that goes on from `state`."""
    loop = Loop(loader, max_epochs=epochs)
    loop.load_state_dict(state)
    return flat(loop)


@by_entry
@pytest.mark.parametrize("where", ["condition", "clock", "dataloader"])
def test_a_state_saved_while_a_step_is_made_is_that_of_the_step_before(
    where: str, enter: str
) -> None:
    saved: list[tuple[int, Any]] = []
    busy: list[bool] = []

    def save() -> float:
        if not busy:
            busy.append(True)
            saved.append((loop.global_step, loop.state_dict()))
            busy.clear()
        return 0.0

    loader = SizedStateful(6)
    events: dict[str, Event] = {}
    if where == "condition":
        events["Seen"] = Event(lambda state: bool(save()))
    if where == "clock":
        events["Hourly"] = Event(every_n_seconds=3600)
    if where == "dataloader":
        loader.on_request = save
    clock = save if where == "clock" else None
    loop = Loop(loader, events, max_epochs=1, clock=clock)
    assert flat(ENTER[enter](loop)) == list(range(6))
    assert len(saved) >= 3
    for step, state in saved:
        plain = SizedStateful(6)
        again = Loop(plain, events, max_epochs=1, clock=clock)
        loader.on_request = lambda: None
        busy.append(True)
        again.load_state_dict(state)
        assert flat(again) == list(range(step + 1, 6)), step
        busy.clear()


@by_entry
def test_a_state_at_the_end_of_an_epoch_that_was_opened_anew_can_be_loaded(enter: str) -> None:
    for interrupted in range(1, 5):
        loader = Stateful(1)
        loader.interrupts = (interrupted,)
        loop = Loop(loader, max_epochs=2)
        batches: list[int] = []
        for _ in range(2):
            try:
                for batch, _events in ENTER[enter](loop):
                    batches += batch if isinstance(batch, list) else [batch]
                    left = [0, 0][loop.global_step + 1 :]
                    requests, loader.requests = loader.requests, 100
                    assert resumed(loop.state_dict(), Stateful(1), 2) == left
                    loader.requests = requests
            except KeyboardInterrupt:
                pass
        assert batches == [0, 0]


@by_entry
def test_a_state_between_two_interrupts_can_be_loaded(enter: str) -> None:
    for kind in (Stateful, SizedStateful):
        for first in range(1, 5):
            for second in range(first + 1, 7):
                loader = kind(3)
                loader.interrupts = (first, second)
                loop = Loop(loader, max_epochs=1)
                batches: list[int] = []
                while loop.stop_reason is None:
                    try:
                        for batch, _events in ENTER[enter](loop):
                            batches += batch if isinstance(batch, list) else [batch]
                    except KeyboardInterrupt:
                        left = list(range(len(batches), 3))
                        assert resumed(loop.state_dict(), kind(3)) == left
                assert batches == [0, 1, 2]


@by_entry
@pytest.mark.parametrize("way", ["close", "restart"])
@pytest.mark.parametrize("place", ["set_epoch", "after the last batch"])
def test_a_loader_that_ends_its_loop_between_two_epochs(place: str, way: str, enter: str) -> None:
    class Loader:
        def set_epoch(self, epoch: int) -> None:
            if epoch == 1 and place == "set_epoch":
                getattr(loop, way)()

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[int]:
            yield from range(2)
            if place == "after the last batch":
                getattr(loop, way)()

    loop = Loop(Loader(), max_epochs=3)
    batches = []
    with pytest.raises(LoopError, match={"close": "closed", "restart": "replaced"}[way]):
        for batch, _ in ENTER[enter](loop):
            batches.append(batch)
    assert len(batches) == (2 if enter == "steps" else 1)


@by_entry
@pytest.mark.parametrize("way", ["close", "restart"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("given_len", [4, None])
def test_a_generator_that_closes_its_loop_ends_it_with_an_error(
    given_len: int | None, at: int, way: str, enter: str
) -> None:
    def batches() -> Iterator[int]:
        for number in range(4):
            if number == at:
                getattr(loop, way)()
            yield number

    loop = Loop(batches, max_epochs=2, dataloader_len=given_len)
    with pytest.raises(LoopError, match={"close": "closed", "restart": "replaced"}[way]):
        flat(ENTER[enter](loop))


@by_entry
@pytest.mark.parametrize("at", range(3))
def test_an_interrupt_of_a_source_that_has_closed_its_loop_is_raised(at: int, enter: str) -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            if number == at:
                loop.close()
                raise KeyboardInterrupt
            yield number

    loop = Loop(batches, max_epochs=1, dataloader_len=3)
    with pytest.raises(KeyboardInterrupt):
        flat(ENTER[enter](loop))


@by_entry
@needs_reference_counts
@pytest.mark.usefixtures("no_collector")
def test_the_iterator_of_a_cut_epoch_is_freed_before_the_next_is_made(enter: str) -> None:
    class Batches:
        def __init__(self) -> None:
            self.left = 3

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> int:
            self.left -= 1
            return self.left

    class Loader:
        def __init__(self) -> None:
            self.iterators: list[ref[Batches]] = []

        def __iter__(self) -> Batches:
            assert [iterator() for iterator in self.iterators] == [None] * len(self.iterators)
            batches = Batches()
            self.iterators.append(ref(batches))
            return batches

    loader = Loader()
    flat(ENTER[enter](Loop(loader, max_epochs=3, dataloader_len=2)))
    assert len(loader.iterators) == 3


@by_entry
def test_a_clock_that_fails_before_the_first_step_is_no_event(enter: str) -> None:
    def clock() -> float:
        raise ZeroDivisionError

    events = {"Hourly": Event(every_n_seconds=3600)}
    loop = Loop(range(3), events, max_epochs=1, clock=clock, on_exception="event")
    with pytest.raises(ZeroDivisionError):
        flat(ENTER[enter](loop))
    assert loop.stop_reason == "exception"
    assert loop.global_step == -1


@by_entry
@pytest.mark.filterwarnings("ignore::dloop.LoopWarning")
def test_an_error_that_is_not_believed_is_not_the_context_of_the_next(enter: str) -> None:
    class Loader:
        fails = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[int]:
            yield 0
            yield 1
            self.fails += 1
            raise OSError(self.fails)

    loop = Loop(Loader(), max_epochs=1)
    steps = ENTER[enter](loop)
    while loop.global_step < 1:
        next(steps)
    with pytest.raises(OSError, match="2") as caught:
        flat(ENTER[enter](loop))
    assert caught.value.__context__ is None
