"""How a resumed loop gets to its place: what it fetches, logs and warns of."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dloop import Loop, LoopWarning, source
from frameworks import needed
from manual_clock import ManualClock

STEPS = 5  # in an epoch
Build = Callable[[], Any]


def resumed(build: Build, done: int, **limit: Any) -> Loop[Any]:
    """A loop over what `build` makes, anew, that goes on after `done` steps."""
    limit = limit or {"max_epochs": 2}
    loop = Loop(build(), **limit)
    for _ in loop:
        if loop.state.steps_done == done:
            break
    state = loop.state_dict()
    loop.close()
    loop = Loop(build(), **limit)
    loop.load_state_dict(state)
    return loop


def plain(batch: Any) -> Any:
    return batch.tolist() if hasattr(batch, "tolist") else batch


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "dloop"]


# What is indexed


class Items:
    """Has only `__getitem__` and `__len__`, and notes which items are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < STEPS:
            raise IndexError(place)
        self.read.append(place)
        return 10 * place


class Endless:
    """Has only `__getitem__`, and no end."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, place: int) -> int:
        self.read.append(place)
        return 10 * place


@pytest.mark.parametrize("done", [1, 3, STEPS - 1, STEPS + 2])
def test_items_that_were_taken_are_not_read_again(
    done: int, caplog: pytest.LogCaptureFixture
) -> None:
    items = Items()
    with caplog.at_level(logging.INFO, "dloop"):
        loop = resumed(lambda: items, done)
        items.read.clear()
        batches = [batch for batch, _ in loop]
    assert batches == [10 * place for place in [*range(STEPS), *range(STEPS)][done:]]
    assert items.read == [*range(STEPS), *range(STEPS)][done:]
    assert said(caplog) == []


def test_items_without_a_length_are_not_read_again(caplog: pytest.LogCaptureFixture) -> None:
    items = Endless()
    with caplog.at_level(logging.INFO, "dloop"):
        loop = resumed(lambda: items, 1000, max_steps=1003)
        items.read.clear()
        assert [batch for batch, _ in loop] == [10_000, 10_010, 10_020]
    assert min(items.read) == 1000
    assert said(caplog) == []


def numpy() -> Any:
    needed("numpy")
    import numpy as np

    return np.arange(2 * STEPS).reshape(STEPS, 2)


def jax() -> Any:
    needed("jax")
    import jax.numpy as jnp

    return jnp.arange(2 * STEPS).reshape(STEPS, 2)


def torch() -> Any:
    needed("torch")
    import torch

    return torch.arange(2 * STEPS).reshape(STEPS, 2)


@pytest.mark.parametrize("done", [1, 3, STEPS - 1, STEPS, STEPS + 2])
@pytest.mark.parametrize("build", [numpy, jax, torch])
def test_arrays_are_set_forward_without_a_word(
    build: Build, done: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dloop"):
        loop = resumed(build, done)
        rows = [plain(batch) for batch, _ in loop]
    assert rows == [[2 * row, 2 * row + 1] for row in [*range(STEPS), *range(STEPS)][done:]]
    assert said(caplog) == []


@pytest.mark.parametrize("done", [1, 3, STEPS - 1, STEPS, STEPS + 2])
def test_rows_of_a_file_that_were_taken_are_not_read_again(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed("h5py")
    import h5py  # type: ignore[import-untyped]

    path = tmp_path / "rows.h5"
    with h5py.File(path, "w") as file:
        file["rows"] = numpy()
    read: list[Any] = []
    get = h5py.Dataset.__getitem__

    def getitem(dataset: Any, place: Any, **options: Any) -> Any:
        read.append(place)
        return get(dataset, place, **options)

    with caplog.at_level(logging.INFO, "dloop"), h5py.File(path) as file:
        loop = resumed(lambda: file["rows"], done)
        monkeypatch.setattr(h5py.Dataset, "__getitem__", getitem)
        rows = [plain(batch) for batch, _ in loop]
    places = [*range(STEPS), *range(STEPS)][done:]
    assert rows == [[2 * row, 2 * row + 1] for row in places]
    assert read == places
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("build", "limit", "left"),
    [
        (lambda: itertools.repeat("x", 7), {"max_epochs": 1}, ["x"] * 4),
        (lambda: itertools.repeat("x", 7), {"max_steps": 5}, ["x"] * 2),
        (lambda: itertools.repeat("x"), {"max_steps": 5}, ["x"] * 2),
        (lambda: lambda: itertools.repeat("x", 4), {"max_epochs": 2}, ["x"] * 5),
        (lambda: itertools.count(), {"max_steps": 5}, [3, 4]),
        (lambda: itertools.count(10, 5), {"max_steps": 5}, [25, 30]),
    ],
    ids=["repeat", "repeat, cut", "endless repeat", "callable repeat", "count", "count by 5"],
)
def test_repeat_and_count_are_set_forward_without_a_word(
    build: Build, limit: dict[str, int], left: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dloop"):
        assert [batch for batch, _ in resumed(build, 3, **limit)] == left
    assert said(caplog) == []


# What is fetched and dropped


def told(loop: Loop[Any]) -> list[str]:
    """The texts of the LoopWarnings that come as the loop is gone through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(loop)
    return [str(each.message) for each in caught if each.category is LoopWarning]


def generator() -> Iterator[int]:
    yield from range(STEPS)


def loader_of_torch(**options: Any) -> Any:
    needed("torch")
    from torch.utils.data import DataLoader

    return DataLoader(range(2 * STEPS), **{"batch_size": 2, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "limit"),
    [
        (lambda: generator, {"max_epochs": 2}),
        (loader_of_torch, {"max_epochs": 2}),
        (generator, {"max_steps": STEPS}),
    ],
    ids=["callable", "DataLoader", "single-pass"],
)
def test_what_is_fetched_and_dropped_is_logged_and_not_warned_of(
    build: Build,
    limit: dict[str, int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "monotonic", ManualClock())
    loop = resumed(build, 3, **limit)
    with caplog.at_level(logging.INFO, "dloop"):
        assert told(loop) == []
    (record,) = said(caplog)
    assert record.levelno == logging.INFO
    assert record.getMessage() == "epoch 0: 3 batches were fetched and dropped, in 0.0 s"


@pytest.mark.parametrize("build", [lambda: generator, loader_of_torch], ids=["callable", "torch"])
def test_nothing_is_logged_where_nothing_was_taken_of_the_epoch(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    loop = resumed(build, STEPS)
    with caplog.at_level(logging.INFO, "dloop"):
        assert told(loop) == []
    assert said(caplog) == []


@pytest.mark.parametrize(("seconds", "warns"), [(3, False), (4, True)])
def test_a_resume_that_takes_more_than_ten_seconds_is_warned_of(
    seconds: int, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    monkeypatch.setattr(source, "monotonic", clock)

    def batches() -> Iterator[int]:
        for number in range(STEPS):
            clock.now += seconds
            yield number

    texts = told(resumed(lambda: batches, 3))
    expected = (
        "epoch 0: to go on, 3 batches were fetched and dropped, which took 12 seconds; use a "
        "dataloader with state_dict, or one that is indexed"
    )
    assert texts == [expected] * warns


# Orders that cannot be known to repeat


def generator_of(seeded: bool) -> Any:
    import torch_data

    return torch_data.seeded() if seeded else None


def random_sampler(seeded: bool, kind: str = "RandomSampler") -> Any:
    import torch.utils.data

    numbers = range(2 * STEPS)
    arguments: dict[str, tuple[Any, ...]] = {
        "RandomSampler": (numbers,),
        "SubsetRandomSampler": (numbers,),
        "WeightedRandomSampler": ([1.0] * len(numbers), len(numbers)),
    }
    generator = generator_of(seeded)
    return getattr(torch.utils.data, kind)(*arguments[kind], generator=generator)


def with_sampler(seeded: bool, kind: str = "RandomSampler") -> Any:
    return loader_of_torch(sampler=random_sampler(seeded, kind))


def in_batches(seeded: bool) -> Any:
    from torch.utils.data import BatchSampler

    sampler = BatchSampler(random_sampler(seeded), batch_size=2, drop_last=False)
    return loader_of_torch(batch_size=1, batch_sampler=sampler)


class Doubled:
    """A loader over another, which is its data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return (2 * batch for batch in self.dataset)


SHUFFLED: dict[str, Callable[[bool], Any]] = {
    "shuffle": lambda seeded: loader_of_torch(shuffle=True, generator=generator_of(seeded)),
    "sampler": with_sampler,
    "batch_sampler": in_batches,
    "data set": lambda seeded: Doubled(with_sampler(seeded)),
    "data set's batch_sampler": lambda seeded: Doubled(in_batches(seeded)),
    **{
        kind: functools.partial(with_sampler, kind=kind)
        for kind in ("SubsetRandomSampler", "WeightedRandomSampler")
    },
}


@pytest.mark.parametrize("called", [False, True], ids=["loader", "callable"])
@pytest.mark.parametrize(
    ("seeded", "done", "warns"),
    [
        (False, 3, True),
        (False, STEPS + 2, True),
        (False, STEPS, False),  # no batch of the epoch was taken
        (True, 3, False),
        (True, STEPS + 2, True),  # built anew, it begins with the order of the first epoch
    ],
)
@pytest.mark.parametrize("build", SHUFFLED.values(), ids=SHUFFLED)
def test_an_order_that_cannot_be_known_to_repeat_is_warned_of(
    build: Callable[[bool], Any], seeded: bool, done: int, warns: bool, called: bool
) -> None:
    needed("torch")
    texts = told(resumed(lambda: (lambda: build(seeded)) if called else build(seeded), done))
    assert len(texts) == warns
    for text in texts:
        assert "order" in text
        assert "set_epoch" in text


def test_an_order_with_a_seed_for_each_epoch_is_not_warned_of() -> None:
    needed("torch")
    import torch_data

    build = lambda: loader_of_torch(sampler=torch_data.Shuffled(2 * STEPS))  # noqa: E731
    for done in (3, STEPS, STEPS + 2):
        assert told(resumed(build, done)) == []
