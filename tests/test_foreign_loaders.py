"""Loaders of tf.data, Mosaic streaming and Ray Data, where these are installed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dloop import Loop, LoopEvents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_core,
    pytest.mark.filterwarnings("ignore", "error::dloop.LoopWarning"),
]

SAMPLES = 10
Build = Callable[[Path], Any]


def tensorflow(change: Callable[[Any], Any]) -> Build:
    def build(_: Path) -> Any:
        data = pytest.importorskip("tensorflow").data
        return change(data.Dataset.range(SAMPLES))

    return build


def streaming(*, shuffle: bool, **options: Any) -> Build:
    """A StreamingDataLoader with these options; the data set alone where there are none."""

    def build(folder: Path) -> Any:
        mosaic = pytest.importorskip("streaming")
        shards = tempfile.mkdtemp(dir=folder)  # two data sets at once cannot share one
        with mosaic.MDSWriter(out=shards, columns={"number": "int"}) as writer:
            for number in range(SAMPLES):
                writer.write({"number": number})
        data = mosaic.StreamingDataset(
            local=shards, batch_size=2, shuffle=shuffle, shuffle_seed=1, num_canonical_nodes=2
        )
        return mosaic.StreamingDataLoader(data, batch_size=2, **options) if options else data

    return build


def ray(change: Callable[[Any], Any]) -> Build:
    def build(_: Path) -> Any:
        data = pytest.importorskip("ray.data")
        return change(data.range(SAMPLES, override_num_blocks=1))

    return build


LOADERS: dict[str, Build] = {
    "tf.data": tensorflow(lambda data: data.batch(2)),
    "tf.data, without a length": tensorflow(lambda data: data.filter(lambda n: n != 3).batch(2)),
    "tf.data, one order": tensorflow(
        lambda data: data.shuffle(SAMPLES, seed=3, reshuffle_each_iteration=False).batch(2)
    ),
    "tf.data, prefetched": tensorflow(lambda data: data.map(lambda n: 2 * n).batch(2).prefetch(2)),
    "tf.data, callable": tensorflow(lambda data: lambda: data.batch(2)),
    "StreamingDataLoader": streaming(shuffle=False, num_workers=0),
    "StreamingDataLoader, shuffled": streaming(shuffle=True, num_workers=0),
    "StreamingDataLoader, shuffled, 2 workers": streaming(shuffle=True, num_workers=2),
    "StreamingDataset": streaming(shuffle=False),
    "Ray Data": ray(lambda data: data.iter_batches(batch_size=2)),
    "Ray Data, one order": ray(
        lambda data: data.random_shuffle(seed=3).materialize().iter_batches(batch_size=2)
    ),
    "Ray Data, for PyTorch": ray(lambda data: data.iter_torch_batches(batch_size=2)),
    "Ray Data, callable": ray(lambda data: lambda: data.iter_batches(batch_size=2)),
}


@pytest.fixture(scope="module", autouse=True)
def ray_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray's processes are started with the first data set, and ended here."""
    yield
    import sys

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def plain(batch: Any) -> list[int]:
    """The numbers of a batch."""
    if isinstance(batch, dict):
        (batch,) = batch.values()
    batch = batch.numpy() if hasattr(batch, "numpy") else batch
    numbers: list[int] = [batch] if isinstance(batch, int) else batch.reshape(-1).tolist()
    return numbers


def in_plain_for(build: Build, folder: Path) -> list[list[list[int]]]:
    """The batches of three epochs."""
    loader = build(folder)
    epochs: list[Any] = [loader() if callable(loader) else loader for _ in range(3)]
    return [[plain(batch) for batch in epoch] for epoch in epochs]


def in_a_loop(build: Build, folder: Path, stops: Iterable[int] = ()) -> list[list[list[int]]]:
    """The same with a Loop that is left after these steps, and goes on with all built anew."""
    epochs: list[list[list[int]]] = [[], [], []]
    ends = []
    state = None
    reason: str | None = None
    for stop in [*stops, None]:
        with Loop(build(folder), max_epochs=3) as loop:
            if state is not None:
                loop.load_state_dict(state)
            for batch, events in loop:
                epochs[loop.epoch].append(plain(batch))
                if LoopEvents.EPOCH_END in events:
                    ends.append(loop.state.epoch_step + 1)
                if loop.state.steps_done == stop:
                    state = json.loads(json.dumps(loop.state_dict()))
                    break
            reason = loop.stop_reason
    assert reason == "max_epochs"
    assert ends == [len(epoch) for epoch in epochs]
    return epochs


@pytest.mark.parametrize("build", LOADERS.values(), ids=LOADERS)
def test_its_epochs_and_their_ends_are_those_of_a_plain_for(build: Build, tmp_path: Path) -> None:
    epochs = in_plain_for(build, tmp_path)
    assert in_a_loop(build, tmp_path) == epochs
    numbers = [sorted(number for batch in epoch for number in batch) for epoch in epochs]
    assert len(numbers[0]) >= SAMPLES - 1
    assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.parametrize(
    "where",
    ["within an epoch", "at the epochs' ends", "twice in one epoch"],
)
@pytest.mark.parametrize("build", LOADERS.values(), ids=LOADERS)
def test_a_run_that_was_resumed_is_the_one_that_was_not(
    build: Build, where: str, tmp_path: Path
) -> None:
    epochs = in_plain_for(build, tmp_path)
    n = len(epochs[0])
    stops = {
        "within an epoch": [1, n + 2, 3 * n - 1],
        "at the epochs' ends": [n, 2 * n, 3 * n],
        "twice in one epoch": [n + 1, n + 3],
    }[where]
    assert in_a_loop(build, tmp_path, stops) == epochs
