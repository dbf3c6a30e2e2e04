"""Real loaders; each is built again for every run, as a restarted program builds it."""

from __future__ import annotations

import importlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dloop import batched
from frameworks import needed

SAMPLES = 10  # in an epoch
CUT = {"max_epochs": 3, "dataloader_len": SAMPLES // 2}  # a stream into epochs


@dataclass(frozen=True)
class Loader:
    """How to build a loader, and what is special about it.

    Args:
        build: takes a temporary folder.
        needs: modules.
        arguments: of the Loop.
        shuffles: whether the epochs have different orders.
        json: whether its state, if it has one, can be saved as JSON.
        workers: whether it starts processes.
    """

    build: Callable[[Path], Any]
    needs: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory={"max_epochs": 3}.copy)
    shuffles: bool = False
    json: bool = True
    workers: bool = False

    def __call__(self, folder: Path) -> Any:
        for module in self.needs:
            needed(module)
        return self.build(folder)


def plain(batch: Any) -> Any:
    """The batch as lists and numbers."""
    if hasattr(batch, "tolist"):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(each) for each in batch] if isinstance(batch, (list, tuple)) else batch


def samples(batch: Any) -> list[int]:
    """The numbers in a plain batch."""
    if isinstance(batch, int):
        return [batch]
    values = batch.values() if isinstance(batch, dict) else batch
    return [number for value in values for number in samples(value)]


def module(name: str) -> Any:
    return importlib.import_module(name)


def pairs() -> Iterator[list[int]]:
    return ([number, number + 1] for number in range(0, SAMPLES, 2))


def endless(_: Path) -> Iterator[list[int]]:
    """One stream in which each pass over the numbers shifts them by one."""
    return (
        [(number + epoch) % SAMPLES for number in pair] for epoch in range(99) for pair in pairs()
    )


# PyTorch and torchdata


def torch_sampler(kind: str) -> Any:
    import torch_data

    halves = {"num_replicas": 2, "rank": 0}
    if kind == "Shuffled":
        return torch_data.Shuffled(SAMPLES)
    if kind == "DistributedSampler":
        return module("torch.utils.data").DistributedSampler(range(2 * SAMPLES), **halves)
    kept = module("torchdata.stateful_dataloader.sampler")
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
        import torch_data

        kind = module("torch.utils.data").DataLoader
        if stateful:
            kind = module("torchdata.stateful_dataloader").StatefulDataLoader
        chosen: dict[str, Any] = {"batch_size": 2, **options}
        if shuffle:
            chosen |= {"shuffle": True, "generator": torch_data.seeded()}
        if sampler is not None:
            chosen["sampler"] = torch_sampler(sampler)
        # a DistributedSampler takes half of the samples; the other samplers use the first half
        numbers = range(2 * SAMPLES if sampler else SAMPLES)
        return kind(getattr(torch_data, stream)(SAMPLES) if stream else numbers, **chosen)

    return Loader(
        (lambda folder: lambda: build(folder)) if called else build,
        needs=("torch", "torchdata") if stateful else ("torch",),
        shuffles=shuffle or sampler is not None,
        json=not (stateful and (shuffle or sampler == "RandomSampler")),  # a tensor is in it
        workers="num_workers" in options,
    )


# Without workers, torchdata does not resume shuffle=True with a generator exactly (later epochs
# have other orders), but it does so with a sampler that has its own generator.
TORCH = {
    "DataLoader": of_torch(),
    "DataLoader, 2 workers": of_torch(num_workers=2),
    "DataLoader, iterable-style": of_torch("Stream"),
    "DataLoader, seeded sampler": of_torch(sampler="Shuffled"),
    "DataLoader, seeded sampler, 2 workers": of_torch(sampler="Shuffled", num_workers=2),
    "DataLoader, DistributedSampler": of_torch(sampler="DistributedSampler"),
    "callable, DataLoader": of_torch(sampler="Shuffled", called=True),
    "Stateful": of_torch(stateful=True),
    "Stateful, 2 workers": of_torch(stateful=True, num_workers=2),
    "Stateful, rare snapshots, 2 workers": of_torch(
        stateful=True, num_workers=2, snapshot_every_n_steps=3
    ),
    "Stateful, shuffled": of_torch(sampler="RandomSampler", stateful=True),
    "Stateful, shuffled, 2 workers": of_torch(stateful=True, shuffle=True, num_workers=2),
    "Stateful, seeded sampler": of_torch(sampler="Shuffled", stateful=True),
    "Stateful, its DistributedSampler": of_torch(None, "StatefulDistributed", stateful=True),
    "Stateful, unsized": of_torch("KeptStream", stateful=True),
    "Stateful, unsized, 2 workers": of_torch("KeptStream", stateful=True, num_workers=2),
    "Stateful, reset": of_torch("ResetStream", stateful=True),
    "Stateful, reset, 2 workers": of_torch("ResetStream", stateful=True, num_workers=2),
    # torchdata alone cannot save these two twice in one epoch: it counts batches twice
    "Stateful, no state": of_torch("Stream", stateful=True),
    "Stateful, no state, 2 workers": of_torch("Stream", stateful=True, num_workers=2),
    "callable, Stateful": of_torch(sampler="Shuffled", stateful=True, called=True),
}


def nodes(sampler: bool) -> Loader:
    def build(_: Path) -> Any:
        kinds = module("torchdata.nodes")
        numbers = kinds.IterableWrapper(range(SAMPLES))
        if sampler:
            numbers = kinds.SamplerWrapper(torch_sampler("Shuffled"))
        return kinds.Loader(kinds.Batcher(numbers, 2), restart_on_stop_iteration=False)

    return Loader(build, needs=("torch", "torchdata"), shuffles=sampler)


# Grain, Hugging Face, webdataset


def grain(build: Callable[[Any, Any], Any], **given: Any) -> Loader:
    """`build` takes Grain and options without threads, of which Grain would start 16."""

    def built(_: Path) -> Any:
        library = module("grain.python")
        return build(library, library.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    return Loader(built, needs=("grain",), **given)


def grain_loader(library: Any, options: Any) -> Any:
    return library.DataLoader(
        data_source=range(SAMPLES),
        sampler=library.SequentialSampler(SAMPLES),
        operations=[library.Batch(2)],
        worker_count=0,
        read_options=options,
    )


def rows() -> Any:
    datasets = module("datasets")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"number": list(range(SAMPLES))})


def number_rows(starts: list[int]) -> Iterator[dict[str, int]]:
    for start in starts:
        yield {"number": start}
        yield {"number": start + 1}


def hf_generated(_: Path) -> Any:
    """From the second epoch on, it shuffles its shards by itself."""
    starts = list(range(0, SAMPLES, 2))
    streams = module("datasets").IterableDataset
    return streams.from_generator(number_rows, gen_kwargs={"starts": starts}).batch(2)


def hf_shuffled(_: Path) -> Any:
    """It shuffles shards, not rows: its state does not include a buffer of rows."""
    return rows().to_iterable_dataset(num_shards=SAMPLES // 2).shuffle(seed=3, buffer_size=1)


def hf_in_torch(*, stateful: bool, shuffle: bool, num_workers: int) -> Loader:
    def build(folder: Path) -> Any:
        stream = hf_shuffled(folder) if shuffle else rows().to_iterable_dataset(num_shards=5)
        kind = module("torch.utils.data").DataLoader
        if stateful:
            kind = module("torchdata.stateful_dataloader").StatefulDataLoader
        return kind(stream, batch_size=2, num_workers=num_workers)

    needs = "datasets", "torch", "torchdata"
    return Loader(build, needs=needs, shuffles=shuffle, workers=num_workers > 0)


def web_pipeline(folder: Path) -> Any:
    paths = [folder / "shard-0.tar", folder / "shard-1.tar"]
    for half, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(half * SAMPLES // 2, (half + 1) * SAMPLES // 2):
                content = str(number).encode()
                info = tarfile.TarInfo(f"{number:03}.number.cls")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pipeline = module("webdataset").WebDataset([str(path) for path in paths], shardshuffle=False)
    return pipeline.decode().to_tuple("number.cls").batched(2)


def web_workers(folder: Path) -> Any:
    return module("webdataset").WebLoader(web_pipeline(folder), batch_size=None, num_workers=2)


def in_lists(loader: Loader) -> Loader:
    return replace(loader, build=lambda folder: batched(loader(folder), 2))


def of_fabric(loader: Loader) -> Loader:
    """The loader as Fabric prepares it."""

    def build(folder: Path) -> Any:
        fabric = module("lightning.fabric").Fabric(accelerator="cpu", devices=1)
        return fabric.setup_dataloaders(loader(folder))

    return replace(loader, build=build, needs=(*loader.needs, "lightning"))


LOADERS: dict[str, Loader] = {
    "list": Loader(lambda _: list(pairs())),
    "callable, generator": Loader(lambda _: pairs),
    "stream, cut": Loader(endless, arguments=CUT, shuffles=True),
    **TORCH,
    "nodes": nodes(sampler=False),
    "nodes, seeded sampler": nodes(sampler=True),
    "Grain MapDataset": grain(lambda library, _: library.MapDataset.range(SAMPLES).batch(2)),
    "Grain IterDataset": grain(
        lambda library, no: library.MapDataset.range(SAMPLES).batch(2).to_iter_dataset(no)
    ),
    "Grain DataLoader": grain(grain_loader, json=False),  # its state is bytes
    "Grain stream, cut": grain(
        lambda library, no: iter(
            library.MapDataset.range(SAMPLES).shuffle(3).repeat().batch(2).to_iter_dataset(no)
        ),
        arguments=CUT,
        shuffles=True,
    ),
    "Dataset": Loader(lambda _: rows().batch(2), ("datasets",)),
    "IterableDataset": Loader(
        lambda _: rows().to_iterable_dataset(num_shards=2).batch(2), ("datasets",)
    ),
    "IterableDataset, generated": Loader(hf_generated, ("datasets",), shuffles=True),
    "IterableDataset, shuffled": Loader(
        lambda folder: hf_shuffled(folder).batch(2), ("datasets",), shuffles=True
    ),
    "IterableDataset in DataLoader, 2 workers": hf_in_torch(
        stateful=False, shuffle=True, num_workers=2
    ),
    "IterableDataset in Stateful": hf_in_torch(stateful=True, shuffle=True, num_workers=0),
    # not shuffled, since the workers could not load its state (an IndexError in datasets 5.2)
    "IterableDataset in Stateful, 2 workers": hf_in_torch(
        stateful=True, shuffle=False, num_workers=2
    ),
    "webdataset": Loader(web_pipeline, ("webdataset",)),
    "webdataset, 2 workers": Loader(web_workers, ("webdataset", "torch"), workers=True),
}
IN_LISTS = ("DataLoader", "Stateful, shuffled", "Grain IterDataset")
LOADERS |= {f"{name}, in lists": in_lists(LOADERS[name]) for name in IN_LISTS}
OF_FABRIC = {
    "not shuffled": TORCH["DataLoader"],
    "iterable-style": TORCH["DataLoader, iterable-style"],
    "sampler with set_epoch": TORCH["DataLoader, seeded sampler"],
    "Stateful": TORCH["Stateful, seeded sampler"],
    "data set with set_epoch": hf_in_torch(stateful=False, shuffle=True, num_workers=0),
    "2 workers that stay": of_torch(sampler="Shuffled", num_workers=2, persistent_workers=True),
}
LOADERS |= {f"Fabric, {name}": of_fabric(loader) for name, loader in OF_FABRIC.items()}


# Accelerate


@dataclass(frozen=True)
class Accelerated:
    """A loader of PyTorch, and what the Accelerator that prepares it is told of its loaders."""

    loader: Loader
    configuration: dict[str, Any] = field(default_factory=dict)

    def __call__(self, folder: Path) -> tuple[Any, Any]:
        """A new Accelerator and the loader that it has prepared."""
        needed("accelerate")
        state = module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
        configuration = module("accelerate.utils").DataLoaderConfiguration(**self.configuration)
        accelerator = module("accelerate").Accelerator(
            cpu=True, gradient_accumulation_steps=4, dataloader_config=configuration
        )
        return accelerator, accelerator.prepare(self.loader(folder))


def accelerated(loaders: dict[str, Loader]) -> dict[str, Accelerated]:
    """Each of the loaders with state and without, dispatched and not."""
    seeded = {"use_seedable_sampler": True, "data_seed": 3}
    return {
        name + ", stateful" * stateful + ", dispatched" * dispatched: Accelerated(
            loader,
            {"use_stateful_dataloader": stateful, "dispatch_batches": dispatched, **seeded},
        )
        for name, loader in loaders.items()
        for stateful in (False, True)
        for dispatched in (False, True)
    }
