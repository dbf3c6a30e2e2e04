"""A program for torchrun: what two processes gather of Accelerate's loaders in each step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerated import Accelerated, accelerated
from dloop import Loop
from loaders import Loader
from torchrun import report

SAMPLES = 42  # two processes with batches of 8: in the last of three steps there are 10, not 16
EPOCHS = 2
STEPS = 3  # in an epoch


def of_42_samples(kind: str) -> Loader:
    def build(_: Path) -> Any:
        from torch.utils.data import DataLoader

        import torch_data

        # The stream has no state: of one that is dispatched, Accelerate's is a batch ahead.
        data: Any = torch_data.Stream(SAMPLES) if kind == "iterable-style" else range(SAMPLES)
        if kind == "sampler with set_epoch":
            return DataLoader(data, batch_size=8, sampler=torch_data.Shuffled(SAMPLES))
        return DataLoader(data, batch_size=8, shuffle=kind == "seedable sampler")

    return Loader(build)


NAMES = ("map-style", "seedable sampler", "sampler with set_epoch", "iterable-style")
KINDS = {
    name: kind
    for name, kind in accelerated({name: of_42_samples(name) for name in NAMES}).items()
    # A stream that is not dispatched has no length, and nobody knows how many samples Accelerate
    # has added to its last batches.
    if not name.startswith("iterable-style") or name.endswith("dispatched")
}


class Run:
    """A run over a loader as in a new process, and what the processes gather in its steps."""

    def __init__(self, kind: Accelerated) -> None:
        self.accelerator, loader = kind(Path())
        self.loop: Loop[Any] = Loop(loader, max_epochs=EPOCHS)

    def gathered(self) -> Iterator[list[int]]:
        for batch, _ in self.loop:
            yield self.accelerator.gather_for_metrics(batch).tolist()


def in_plain_for(kind: Accelerated) -> list[list[int]]:
    accelerator, loader = kind(Path())
    return [
        accelerator.gather_for_metrics(batch).tolist() for _ in range(EPOCHS) for batch in loader
    ]


def from_state(kind: Accelerated, state: dict[str, Any]) -> list[list[int]]:
    run = Run(kind)
    run.loop.load_state_dict(state)
    return list(run.gathered())


def from_checkpoint(kind: Accelerated, folder: Path) -> list[list[int]]:
    run = Run(kind)
    run.accelerator.register_for_checkpointing(run.loop)
    run.accelerator.load_state(str(folder))
    return list(run.gathered())


def found(kind: Accelerated, folder: Path) -> dict[str, Any]:
    run = Run(kind)
    run.accelerator.register_for_checkpointing(run.loop)
    batches = []
    states = []
    for batch in run.gathered():
        batches.append(batch)
        states.append(copy.deepcopy(run.loop.state_dict()))
        run.accelerator.save_state(str(folder / str(len(batches))))
    run.accelerator.wait_for_everyone()
    return {
        "plain": in_plain_for(kind),
        "loop": batches,
        "from states": [from_state(kind, state) for state in states],
        "from checkpoints": [
            from_checkpoint(kind, folder / str(done)) for done in range(1, len(batches) + 1)
        ],
    }


if __name__ == "__main__":
    report({name: found(kind, Path(sys.argv[1], name)) for name, kind in KINDS.items()})
