"""Real loaders; each is built again for every run, as a restarted program builds it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frameworks import needed

SAMPLES = 10  # in an epoch
THREE_EPOCHS = {"max_epochs": 3}


@dataclass(frozen=True)
class Loader:
    build: Callable[[Path], Any]  # takes a temporary folder
    needs: tuple[str, ...] = ()
    # the Loop's arguments besides the loader
    arguments: dict[str, Any] = field(default_factory=THREE_EPOCHS.copy)
    # whether the epochs have different orders
    shuffles: bool = False
    # whether its state, if it has one, can be saved as JSON
    json: bool = True
    # whether it starts processes
    workers: bool = False
    lookaheads: tuple[bool | None, ...] = (None, True)

    def __call__(self, folder: Path) -> Any:
        for module in self.needs:
            needed(module)
        return self.build(folder)


# ------------------------------------------------------------------- Python, NumPy


def batches() -> Iterator[list[int]]:
    return ([i, i + 1] for i in range(0, SAMPLES, 2))


def array(_: Path) -> Any:
    import numpy as np

    return np.arange(SAMPLES).reshape(-1, 2)


def endless(_: Path) -> Iterator[list[int]]:
    """One stream in which each pass over the numbers shifts them by one."""
    return (
        [(number + epoch) % SAMPLES for number in pair] for epoch in range(99) for pair in batches()
    )


# -------------------------------------------------------------- PyTorch, torchdata


def torch_sampler(kind: str) -> Any:
    from torch.utils.data import DistributedSampler

    import torch_data

    halves = {"num_replicas": 2, "rank": 0}
    if kind == "Shuffled":
        return torch_data.Shuffled(SAMPLES)
    if kind == "DistributedSampler":
        return DistributedSampler(range(2 * SAMPLES), **halves)
    from torchdata.stateful_dataloader import sampler as kept

    if kind == "RandomSampler":
        return kept.RandomSampler(range(SAMPLES), generator=torch_data.seeded())
    return kept.StatefulDistributedSampler(range(2 * SAMPLES), **halves)


def of_torch(
    stream: str | None = None,
    sampler: str | None = None,
    *,
    stateful: bool = False,
    shuffle: bool = False,
    called: bool = False,
    **options: Any,
) -> Loader:
    """A DataLoader, or torchdata's StatefulDataLoader, of a range or a stream of torch_data."""

    def build(_: Path) -> Any:
        from torch.utils.data import DataLoader

        import torch_data

        if stateful:
            from torchdata.stateful_dataloader import StatefulDataLoader as DataLoader
        chosen: dict[str, Any] = {"batch_size": 2, **options}
        if shuffle:
            chosen |= {"shuffle": True, "generator": torch_data.seeded()}
        if sampler is not None:
            chosen["sampler"] = torch_sampler(sampler)
        # a DistributedSampler takes half of the samples; the other samplers use the first half
        numbers = range(2 * SAMPLES if sampler else SAMPLES)
        return DataLoader(getattr(torch_data, stream)(SAMPLES) if stream else numbers, **chosen)

    return Loader(
        (lambda folder: lambda: build(folder)) if called else build,
        needs=("torch", "torchdata") if stateful else ("torch",),
        shuffles=shuffle or sampler is not None,
        json=not (stateful and (shuffle or sampler == "RandomSampler")),  # a tensor is in it
        workers="num_workers" in options,
    )


TORCH = {
    "DataLoader": of_torch(),
    "DataLoader, 2 workers": of_torch(num_workers=2),
    "DataLoader, iterable-style": of_torch("Stream"),
    "DataLoader, iterable-style, 2 workers": of_torch("Stream", num_workers=2),
    "DataLoader, guessed length, 2 workers": of_torch("GuessedStream", num_workers=2),
    "DataLoader, seeded sampler": of_torch(sampler="Shuffled"),
    "DataLoader, seeded sampler, 2 workers": of_torch(sampler="Shuffled", num_workers=2),
    "DataLoader, DistributedSampler": of_torch(sampler="DistributedSampler"),
    "DataLoader, DistributedSampler, 2 workers": of_torch(
        None, "DistributedSampler", num_workers=2
    ),
    "callable, DataLoader": of_torch(sampler="Shuffled", called=True),
}

# Without workers, torchdata does not resume shuffle=True with a generator exactly (later epochs
# have other orders), but it does so with a sampler that has its own generator.
TORCHDATA = {
    "StatefulDataLoader": of_torch(stateful=True),
    "StatefulDataLoader, 2 workers": of_torch(stateful=True, num_workers=2),
    "StatefulDataLoader, rare snapshots, 2 workers": of_torch(
        stateful=True, num_workers=2, snapshot_every_n_steps=3
    ),
    "StatefulDataLoader, shuffled": of_torch(sampler="RandomSampler", stateful=True),
    "StatefulDataLoader, shuffled, 2 workers": of_torch(stateful=True, shuffle=True, num_workers=2),
    "StatefulDataLoader, seeded sampler": of_torch(sampler="Shuffled", stateful=True),
    "StatefulDataLoader, DistributedSampler": of_torch(sampler="DistributedSampler", stateful=True),
    "StatefulDataLoader, its own DistributedSampler": of_torch(
        None, "StatefulDistributedSampler", stateful=True
    ),
    "StatefulDataLoader, unsized": of_torch("KeptStream", stateful=True),
    "StatefulDataLoader, unsized, 2 workers": of_torch("KeptStream", stateful=True, num_workers=2),
    "StatefulDataLoader, unsized, reset": of_torch("ResetStream", stateful=True),
    "StatefulDataLoader, unsized, reset, 2 workers": of_torch(
        "ResetStream", stateful=True, num_workers=2
    ),
    # torchdata alone cannot save these two twice in one epoch: it counts batches twice
    "StatefulDataLoader, unsized, no state": of_torch("Stream", stateful=True),
    "StatefulDataLoader, unsized, no state, 2 workers": of_torch(
        "Stream", stateful=True, num_workers=2
    ),
    "callable, StatefulDataLoader": of_torch(sampler="Shuffled", stateful=True, called=True),
}


def torch_nodes(_: Path) -> Any:
    from torchdata import nodes

    batches = nodes.Batcher(nodes.IterableWrapper(range(SAMPLES)), 2)
    return nodes.Loader(batches, restart_on_stop_iteration=False)


def torch_nodes_of_sampler(_: Path) -> Any:
    from torchdata import nodes

    batches = nodes.Batcher(nodes.SamplerWrapper(torch_sampler("Shuffled")), 2)
    return nodes.Loader(batches, restart_on_stop_iteration=False)


# -------------------------------------------------------------------------- Grain


def grain_map(_: Path) -> Any:
    import grain.python as grain

    return grain.MapDataset.range(SAMPLES).batch(2)


def no_threads() -> Any:
    """Starting Grain's 16 threads would take a hundred times as long as an epoch here."""
    import grain.python as grain

    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def grain_iter(folder: Path) -> Any:
    return grain_map(folder).to_iter_dataset(no_threads())


def grain_stream(_: Path) -> Any:
    """An endless iterator, with another shuffle in each pass."""
    import grain.python as grain

    shuffled = grain.MapDataset.range(SAMPLES).shuffle(seed=3).repeat().batch(2)
    return iter(shuffled.to_iter_dataset(no_threads()))


def grain_loader(_: Path) -> Any:
    import grain.python as grain

    return grain.DataLoader(
        data_source=range(SAMPLES),
        sampler=grain.SequentialSampler(SAMPLES),
        operations=[grain.Batch(2)],
        worker_count=0,
        read_options=no_threads(),
    )


# ------------------------------------------------------- Hugging Face, webdataset


def rows() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"number": list(range(SAMPLES))})


def hf_rows(_: Path) -> Any:
    return rows().batch(2)


def hf_stream(_: Path) -> Any:
    return rows().to_iterable_dataset(num_shards=2).batch(2)


def hf_shuffled_stream(_: Path) -> Any:
    """Shuffles shards, not rows: its state does not include a buffer of rows."""
    stream = rows().to_iterable_dataset(num_shards=SAMPLES // 2)
    return stream.shuffle(seed=3, buffer_size=1).batch(2)


def number_rows(starts: list[int]) -> Iterator[dict[str, int]]:
    for start in starts:
        yield {"number": start}
        yield {"number": start + 1}


def hf_generated_stream(_: Path) -> Any:
    import datasets

    starts = list(range(0, SAMPLES, 2))
    stream = datasets.IterableDataset.from_generator(number_rows, gen_kwargs={"starts": starts})
    return stream.batch(2)


def hf_in_torch(*, stateful: bool, shuffle: bool, num_workers: int) -> Callable[[Path], Any]:
    def build(_: Path) -> Any:
        stream = rows().to_iterable_dataset(num_shards=SAMPLES // 2)
        if shuffle:
            stream = stream.shuffle(seed=3, buffer_size=1)
        if stateful:
            from torchdata.stateful_dataloader import StatefulDataLoader as Torch
        else:
            from torch.utils.data import DataLoader as Torch
        return Torch(stream, batch_size=2, num_workers=num_workers)

    return build


def shards(folder: Path) -> list[str]:
    paths = [folder / "shard-0.tar", folder / "shard-1.tar"]
    for half, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(half * SAMPLES // 2, (half + 1) * SAMPLES // 2):
                content = str(number).encode()
                info = tarfile.TarInfo(f"{number:03}.number.cls")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return [str(path) for path in paths]


def web_pipeline(folder: Path) -> Any:
    import webdataset

    pipeline = webdataset.WebDataset(shards(folder), shardshuffle=False)
    return pipeline.decode().to_tuple("number.cls").batched(2)


def web_workers(folder: Path) -> Any:
    import webdataset

    return webdataset.WebLoader(web_pipeline(folder), batch_size=None, num_workers=2)


# ---------------------------------------------------------------------- the table

LOADERS: dict[str, Loader] = {
    "list": Loader(lambda _: list(batches())),
    "array": Loader(array, needs=("numpy",)),
    "callable, generator": Loader(lambda _: batches),
    # epochs of a single-pass source need dataloader_len, which is refused with lookahead=True
    "stream, cut into epochs": Loader(
        endless,
        arguments={"max_epochs": 3, "dataloader_len": SAMPLES // 2},
        shuffles=True,
        lookaheads=(None, False),
    ),
    **TORCH,
    **TORCHDATA,
    "torchdata nodes": Loader(torch_nodes, needs=("torch", "torchdata")),
    "torchdata nodes, seeded sampler": Loader(
        torch_nodes_of_sampler, needs=("torch", "torchdata"), shuffles=True
    ),
    "Grain MapDataset": Loader(grain_map, needs=("grain",)),
    "Grain IterDataset": Loader(grain_iter, needs=("grain",)),
    "Grain DataLoader": Loader(grain_loader, needs=("grain",), json=False),  # its state is bytes
    "Grain stream, cut into epochs": Loader(
        grain_stream,
        needs=("grain",),
        arguments={"max_epochs": 3, "dataloader_len": SAMPLES // 2},
        shuffles=True,
        lookaheads=(None, False),
    ),
    "datasets.Dataset": Loader(hf_rows, needs=("datasets",)),
    "datasets.IterableDataset": Loader(hf_stream, needs=("datasets",)),
    "datasets.IterableDataset, generated": Loader(
        # from the second epoch on, it shuffles its shards by itself
        hf_generated_stream,
        needs=("datasets",),
        shuffles=True,
    ),
    "datasets.IterableDataset, shuffled": Loader(
        hf_shuffled_stream,
        needs=("datasets",),
        shuffles=True,
    ),
    "datasets.IterableDataset in a DataLoader, 2 workers": Loader(
        hf_in_torch(stateful=False, shuffle=True, num_workers=2),
        needs=("datasets", "torch"),
        shuffles=True,
        workers=True,
    ),
    "datasets.IterableDataset in a StatefulDataLoader": Loader(
        hf_in_torch(stateful=True, shuffle=True, num_workers=0),
        needs=("datasets", "torch", "torchdata"),
        shuffles=True,
    ),
    "datasets.IterableDataset in a StatefulDataLoader, 2 workers": Loader(
        # not shuffled, since the workers could not load its state (an IndexError in datasets 5.2)
        hf_in_torch(stateful=True, shuffle=False, num_workers=2),
        needs=("datasets", "torch", "torchdata"),
        workers=True,
    ),
    "webdataset": Loader(web_pipeline, needs=("webdataset",)),
    "webdataset, 2 workers": Loader(web_workers, needs=("webdataset", "torch"), workers=True),
}

LIGHT = [name for name, loader in LOADERS.items() if not loader.workers]
WITH_WORKERS = [name for name, loader in LOADERS.items() if loader.workers]
