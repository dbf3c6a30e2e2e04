"""Loaders as Accelerate, Fabric and others wrap them, written out in short, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from dloop import DataLengthError, Loop, LoopEvents, LoopWarning

LENGTH = 5  # batches in an epoch


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


class Seeded(RandomSampler):
    def __init__(self) -> None:
        self.generator = random.Random(7)


class BatchSampler:
    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


class Loader:
    """As a DataLoader with a sampler; its batches are numbers."""

    def __init__(self, sampler: Iterable[int]) -> None:
        self.batch_sampler = BatchSampler(sampler)

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        yield from self.batch_sampler


class Accelerated(Loader):
    """As most of Accelerate's: it looks ahead itself, and its `state_dict` cannot be called."""

    end_of_dataloader = False

    def __init__(self) -> None:
        super().__init__(Sampler())
        self.iteration = 0
        self.ended = 0

    def set_epoch(self, epoch: int) -> None:
        self.iteration = epoch

    def begin(self) -> None:
        self.batch_sampler.sampler.set_epoch(self.iteration)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[int]:
        self.end_of_dataloader = False
        self.begin()
        batches = super().__iter__()
        batch = next(batches)
        for following in batches:
            yield batch
            batch = following
        self.end_of_dataloader = True
        yield batch
        self.iteration += 1
        self.ended += 1

    def state_dict(self) -> dict[str, Any]:
        raise AttributeError("dl_state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AttributeError("load_state_dict")


class NotImplementedState(Accelerated):
    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError


class StateWithArguments(Accelerated):
    def state_dict(self, samples: int) -> dict[str, Any]:  # type: ignore[override]
        raise AssertionError("nobody knows how many")


class AcceleratedWithState(Accelerated):
    """As Accelerate's with `use_stateful_dataloader=True`."""

    def __init__(self) -> None:
        super().__init__()
        self.begin_at = self.given = 0

    def __iter__(self) -> Iterator[int]:
        begun, self.begin_at = self.begin_at, 0
        for number, batch in enumerate(super().__iter__()):
            self.given = number + 1
            if self.given > begun:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": 0 if self.end_of_dataloader else self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin_at = state["given"]


class AcceleratedWithRandomState(AcceleratedWithState):
    """The same over a sampler whose generator is part of the state, as torchdata's RandomSampler.

    Each iterator that is asked for draws another order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(7)
        self.before = self.generator.getstate()

    def begin(self) -> None:
        self.before = self.generator.getstate()
        self.batch_sampler.sampler = self.generator.sample(range(LENGTH), LENGTH)

    def state_dict(self) -> dict[str, Any]:
        latest = self.generator.getstate() if self.end_of_dataloader else self.before
        return {**super().state_dict(), "generator": latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.setstate(state["generator"])


class Fabricated(Loader):
    """As Fabric's: it sets its sampler's epoch to how often it was iterated before."""

    def __init__(self) -> None:
        super().__init__(Sampler())
        self.iterated = 0

    def __iter__(self) -> Iterator[int]:
        self.batch_sampler.sampler.set_epoch(self.iterated)  # type: ignore[attr-defined]
        self.iterated += 1
        yield from super().__iter__()


def in_lives(load: Callable[[], Any], steps: int, **limit: int) -> list[int]:
    """The batches of a run that is left after so many steps, and begun anew from its state."""
    seen: list[int] = []
    state = None
    for _ in range(100):
        loop: Loop[int] = Loop(load(), **limit)  # type: ignore[arg-type]
        if state is not None:
            loop.load_state_dict(state)
        seen += [batch for batch, _ in itertools.islice(loop, steps)]
        state = copy.deepcopy(loop.state_dict())
        if loop.stop_reason is not None:
            return seen
    raise AssertionError("the run has no end")


KINDS = [
    Accelerated,
    NotImplementedState,
    StateWithArguments,
    AcceleratedWithState,
    AcceleratedWithRandomState,
    Fabricated,
    lambda: Loader(SeedableRandomSampler()),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, LENGTH, LENGTH + 1, 2 * LENGTH])
@pytest.mark.parametrize("load", KINDS)
def test_a_run_in_many_lives_is_that_of_one_life(load: Callable[[], Any], steps: int) -> None:
    whole = [batch for batch, _ in Loop(load(), max_epochs=3)]
    assert [sorted(whole[i : i + LENGTH]) for i in (0, 5, 10)] == [list(range(LENGTH))] * 3
    assert in_lives(load, steps, max_epochs=3) == whole


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 2 * LENGTH}])
def test_a_loader_that_looks_ahead_itself_is_left_as_by_a_plain_for(limit: dict[str, int]) -> None:
    plain = Accelerated()
    loader = Accelerated()
    loop = Loop(loader, **limit)  # type: ignore[arg-type]
    batches = iter(loop)
    for _ in range(2):
        for batch in plain:
            found, events = next(batches)
            assert found == batch
            assert loader.end_of_dataloader == plain.end_of_dataloader
            assert (LoopEvents.EPOCH_END in events) == plain.end_of_dataloader
            assert loader.iteration == plain.iteration
    with pytest.raises(StopIteration):
        next(batches)
    assert (loader.iteration, loader.ended) == (plain.iteration, plain.ended) == (2, 2)


def test_at_a_lists_first_batch_a_loader_already_says_what_is_true_of_its_last() -> None:
    loader = Accelerated()
    said = [(len(batches), loader.end_of_dataloader) for batches, _ in loop_in_lists(loader)]
    assert said == [(3, False), (2, True)]


def loop_in_lists(loader: Any) -> Iterator[Any]:
    return Loop(loader, max_epochs=1).chunks(3)


def test_what_state_dict_raises_otherwise_is_not_swallowed() -> None:
    class Broken(AcceleratedWithState):
        def state_dict(self) -> dict[str, Any]:
            raise TypeError("no tensor")

    with pytest.raises(TypeError, match="no tensor"):
        list(Loop(Broken(), max_epochs=1))


def test_that_a_state_cannot_be_asked_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dloop"):
        list(Loop(Accelerated(), max_epochs=1))
    assert [text for text in caplog.messages if "keeps no state" in text] == [
        "the dataloader keeps no state, since it cannot be asked for it: "
        "AttributeError('dl_state_dict')"
    ]


# Orders


@pytest.mark.parametrize("step", [1, LENGTH + 1])
def test_a_loader_whose_order_cannot_be_set_back_is_warned_of(step: int) -> None:
    """It was iterated before the run goes on, so that its counter is ahead."""
    loop = Loop(Fabricated(), max_epochs=3)
    for _ in itertools.islice(loop, step):
        pass
    loader = Fabricated()
    for _ in range(3):
        next(iter(loader))
    again = Loop(loader, max_epochs=3)
    again.load_state_dict(loop.state_dict())
    with pytest.warns(
        LoopWarning, match=r"in the order of epoch 3, .*; set up the dataloader anew"
    ):
        next(iter(again))


def test_a_state_that_is_saved_in_the_order_of_another_epoch_warns() -> None:
    loader = Fabricated()
    next(iter(loader))
    loop = Loop(loader, max_epochs=2)
    next(iter(loop))
    with pytest.warns(LoopWarning, match="epoch 0 has the order of epoch 1"):
        loop.state_dict()


def test_a_loader_that_has_no_epoch_after_the_first_is_not_begun_for_ever() -> None:
    class Ends(Fabricated):
        def __iter__(self) -> Iterator[int]:
            if self.iterated == 0:
                yield from super().__iter__()

    loop = Loop(Fabricated(), max_epochs=3)
    for _ in itertools.islice(loop, 2 * LENGTH + 1):
        pass
    again = Loop(Ends(), max_epochs=3)
    again.load_state_dict(loop.state_dict())
    with pytest.raises(DataLengthError):
        next(iter(again))


@pytest.mark.parametrize("step", range(1, 2 * LENGTH))
@pytest.mark.parametrize("sampler", [RandomSampler, Seeded, SeedableRandomSampler])
def test_an_order_that_cannot_be_known_to_repeat_is_warned_of(
    sampler: type[RandomSampler], step: int
) -> None:
    loop: Loop[int] = Loop(Loader(sampler()), max_epochs=2)
    seen = [batch for batch, _ in itertools.islice(loop, step)]
    again: Loop[int] = Loop(Loader(sampler()), max_epochs=2)
    again.load_state_dict(loop.state_dict())
    is_known = sampler is SeedableRandomSampler or (sampler is Seeded and step < LENGTH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen += [batch for batch, _ in again]
    assert len(seen) == 2 * LENGTH
    assert len(caught) == (not is_known and step != LENGTH)
    assert all("cannot be known to repeat" in str(each.message) for each in caught)
    if is_known:
        assert sorted(seen) == sorted([*range(LENGTH)] * 2)


def test_a_seeded_order_that_is_drawn_again_is_warned_of() -> None:
    class Interrupted(Seeded):
        interrupts = 1

        def __iter__(self) -> Iterator[int]:
            for number, batch in enumerate(super().__iter__()):
                if number == 2 and self.interrupts:
                    self.interrupts = 0
                    raise KeyboardInterrupt
                yield batch

    loop: Loop[int] = Loop(Loader(Interrupted()), max_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    with pytest.warns(LoopWarning, match="cannot be known to repeat"):
        list(loop)


def test_a_random_sampler_of_pytorch_is_no_part_of_a_loaders_state() -> None:
    """As where Accelerate wraps a StatefulDataLoader; torchdata's own samplers are part of it."""

    class WithState(Loader):
        def __init__(self, module: str) -> None:
            super().__init__(type("Random", (Seeded,), {"__module__": module})())
            self.given = self.begin_at = 0

        def __iter__(self) -> Iterator[int]:
            for self.given, batch in enumerate(super().__iter__(), start=1):
                if self.given > self.begin_at:
                    yield batch

        def state_dict(self) -> int:
            return self.given

        def load_state_dict(self, given: int) -> None:
            self.begin_at = given

    for module, warned in (("torch.utils.data.sampler", 1), ("torchdata.sampler", 0)):
        loop = Loop(WithState(module), max_epochs=1)
        for _ in itertools.islice(loop, 2):
            pass
        again = Loop(WithState(module), max_epochs=1)
        again.load_state_dict(loop.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(list(again)) == LENGTH - 2
        assert len(caught) == warned


# What is indexed is set forward


class Indexed:
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


class Array(Indexed):
    """As a JAX array or a data set of h5py: a class with a shape."""

    shape = (LENGTH,)


class Declared(Indexed, Sequence[int]):  # type: ignore[misc]
    """It says that it is a Sequence."""


class Series(Array):
    """As a pandas Series, which is indexed by labels."""

    loc = None


@pytest.mark.parametrize("kind", [Array, Declared, Series, Indexed])
def test_what_is_indexed_is_set_forward_without_a_word(
    kind: type[Indexed], caplog: pytest.LogCaptureFixture
) -> None:
    loop: Loop[int] = Loop(kind(), max_epochs=1)
    for _ in itertools.islice(loop, 3):
        pass
    array = kind()
    again: Loop[int] = Loop(array, max_epochs=1)
    again.load_state_dict(loop.state_dict())
    with caplog.at_level(logging.INFO, "dloop"):
        assert [batch for batch, _ in again] == [30, 40]
    is_indexed = kind in (Array, Declared)
    assert array.read == ([3, 4] if is_indexed else [0, 1, 2, 3, 4])
    assert len(caplog.messages) == (not is_indexed)


# What is refused


class Table:
    """As a pandas DataFrame; those of Polars and PyArrow have the same attributes."""

    columns = ("a", "b")

    def __dataframe__(self) -> None:
        raise AssertionError("nobody needs it")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


def test_a_table_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^dataloader=.*columns; pass its rows or batches"):
        Loop(Table(), max_epochs=1)
    with pytest.raises(TypeError, match=r"^dataloader\(\)=.*columns; pass its rows or batches"):
        next(iter(Loop(Table, max_epochs=1)))


class Columns(list[int]):
    """Has columns, and is no table."""

    columns = ("a", "b")


def test_a_loader_with_columns_that_is_no_table_is_taken() -> None:
    assert [batch for batch, events in Loop(Columns([1, 2]), max_epochs=1)] == [1, 2]


class Combined(Iterable[int]):
    """As Lightning's CombinedLoader: it has `__next__`, but begins anew at `iter()`."""

    def __iter__(self) -> Combined:
        self.batches = iter(range(LENGTH))
        return self

    def __next__(self) -> int:
        return next(self.batches)

    def __len__(self) -> int:
        if not hasattr(self, "batches"):
            raise RuntimeError("call iter() first")
        return LENGTH


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 3 * LENGTH}])
@pytest.mark.parametrize("steps", [3, LENGTH, 99])
def test_what_names_itself_an_iterable_and_no_iterator_begins_anew(
    steps: int, limit: dict[str, int]
) -> None:
    assert in_lives(Combined, steps, **limit) == [*range(LENGTH)] * 3


class Workers(Loader):
    """As a DataLoader that keeps its workers, which an interrupt ends."""

    persistent_workers = True

    def __init__(self) -> None:
        super().__init__(Sampler())
        self._iterator: Any = None
        self.alive = True

    def __iter__(self) -> Iterator[int]:
        if self._iterator is None:
            self.alive = True
            self._iterator = self
        for batch in super().__iter__():
            if not self.alive:
                raise RuntimeError("a worker is dead")
            yield batch


class Wrapped:
    def __init__(self, name: str) -> None:
        self.workers = Workers()
        setattr(self, name, self.workers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.workers)


@pytest.mark.parametrize("name", ["", "base_dataloader", "_dataloader"])
def test_workers_that_are_kept_and_ended_by_an_interrupt_are_renewed(name: str) -> None:
    loader: Any = Wrapped(name) if name else Workers()
    workers: Workers = loader.workers if name else loader
    loop = Loop(loader, max_epochs=2)
    seen = [batch for batch, _ in itertools.islice(loop, 2)]
    workers.alive = False  # and the loop is left
    seen += [batch for batch, _ in loop]
    assert [sorted(seen[:LENGTH]), sorted(seen[LENGTH:])] == [[*range(LENGTH)]] * 2


@pytest.mark.parametrize("dead_again", [False, True])
def test_workers_that_an_interrupt_ended_at_an_epochs_end_are_renewed(dead_again: bool) -> None:
    class Asked(Workers):
        """It asks its workers when it is iterated, as PyTorch's does."""

        def __iter__(self) -> Iterator[int]:
            if self._iterator is not None and not self.alive:
                raise RuntimeError("a worker is dead")
            if dead_again and self.begun:
                raise RuntimeError("there is no memory")
            self.begun = True
            return super().__iter__()

        begun = False

    loader = Asked()
    loop = Loop(loader, max_epochs=2)
    seen = [batch for batch, _ in itertools.islice(loop, LENGTH)]
    loader.alive = False
    with pytest.raises(RuntimeError, match="memory") if dead_again else contextlib.nullcontext():
        seen += [batch for batch, _ in loop]
    assert len(seen) == (LENGTH if dead_again else 2 * LENGTH)
