"""A program for torchrun: what two processes gather of Accelerate's loaders in each step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerated import Accelerated, accelerated
from dloop import Loop
from loaders import Loader
from torchrun import report

SAMPLES = 42  # two processes with batches of 8: in the last of three steps there are 10, not 16
EPOCHS = 2


def of_42_samples(kind: str) -> Loader:
    def build(_: Path) -> Any:
        from torch.utils.data import DataLoader

        import torch_data

        data: Any = torch_data.Stream(SAMPLES) if kind == "iterable-style" else range(SAMPLES)
        if kind == "sampler with set_epoch":
            return DataLoader(data, batch_size=8, sampler=torch_data.Shuffled(SAMPLES))
        return DataLoader(data, batch_size=8, shuffle=kind == "seedable sampler")

    return Loader(build)


NAMES = ("map-style", "seedable sampler", "sampler with set_epoch", "iterable-style")
KINDS = {
    name: kind
    for name, kind in accelerated({name: of_42_samples(name) for name in NAMES}).items()
    # which does not know its length: nothing can tell its processes how many samples are added
    if not name.startswith("iterable-style") or name.endswith("dispatched")
}


def gathered(kind: Accelerated, state: Any = None) -> tuple[list[list[int]], list[Any]]:
    """What each step of a run gathers, and the state after each."""
    accelerator, loader = kind(Path())
    loop = Loop(loader, max_epochs=EPOCHS)
    if state is not None:
        loop.load_state_dict(state)
    batches = []
    states = [copy.deepcopy(loop.state_dict())]
    for batch, _ in loop:
        batches.append(accelerator.gather_for_metrics(batch).tolist())
        states.append(copy.deepcopy(loop.state_dict()))
    return batches, states


def found(kind: Accelerated) -> dict[str, Any]:
    accelerator, loader = kind(Path())
    plain = [
        [accelerator.gather_for_metrics(batch).tolist() for batch in loader] for _ in range(EPOCHS)
    ]
    batches, states = gathered(kind)
    return {
        "plain": plain,
        "loop": [batches[:3], batches[3:]],
        "resumed": [gathered(kind, state)[0] for state in states],
    }


if __name__ == "__main__":
    report({name: found(kind) for name, kind in KINDS.items()})
