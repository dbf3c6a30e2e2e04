"""PyTorch data sets and samplers for the tests' loaders; importing this needs PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    get_worker_info,
)


class Stream(IterableDataset[int]):
    """The numbers below n, divided among the workers; it has no length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def share(self) -> range:
        worker = get_worker_info()
        return range(self.n) if worker is None else range(worker.id, self.n, worker.num_workers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share())


class InterruptedStream(Stream):
    """Raises KeyboardInterrupt once, in place of the number `at`."""

    def __init__(self, n: int, at: int) -> None:
        super().__init__(n)
        self.at = [at]

    def __iter__(self) -> Iterator[int]:
        for number in self.share():
            if number in self.at:
                self.at.remove(number)
                raise KeyboardInterrupt
            yield number


class KeptStream(Stream):
    """Its state is its position."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.given = 0
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        self.given, self.skipped = self.skipped, 0
        for number in self.share()[self.given :]:
            self.given += 1
            yield number

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["given"]


class ResetStream(KeptStream):
    """At the end of an epoch its state is that of the beginning."""

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        self.given = 0


class Shuffled(Sampler[int]):
    """A shuffle that is seeded with the epoch."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(self.n, generator=generator).tolist()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# Nested loaders, whose parts shuffle by their epoch


def shuffling(numbers: range) -> DataLoader[int]:
    sampler: DistributedSampler[int] = DistributedSampler(numbers, num_replicas=1, rank=0)  # type: ignore[arg-type]
    return DataLoader(numbers, batch_size=2, sampler=sampler)  # type: ignore[arg-type]


class Rotating(Dataset[int]):
    """Its items depend on the epoch."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> int:
        if place >= len(self):
            raise IndexError
        return self.numbers[(place + self.epoch) % len(self)]
