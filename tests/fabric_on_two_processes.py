"""A program for torchrun: what each of two processes gets of a loader that Fabric has set up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dloop import Loop
from torchrun import report

SAMPLES = 20
BATCHES = 5  # of two samples, in an epoch of one process
EPOCHS = 3
STOPS = [2, 5, 6, 9, 10, 13]


class Training:
    """A model, and a loop over a loader as in a new process."""

    def __init__(self, fabric: Any) -> None:
        import torch
        from torch.utils.data import DataLoader

        self.fabric = fabric
        model = torch.nn.Linear(1, 1)
        self.model, self.optimizer = fabric.setup(model, torch.optim.SGD(model.parameters()))
        data: Any = range(SAMPLES)
        loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
        self.loop: Loop[Any] = Loop(loader, max_epochs=EPOCHS)
        self.state = {"model": self.model, "optimizer": self.optimizer, "loop": self.loop}

    def train(self, folder: Path, stops: list[int]) -> list[list[int]]:
        """Every batch; a checkpoint is saved after each of `stops`."""
        batches: list[list[int]] = []
        for batch, _ in self.loop:
            batches.append(batch.tolist())
            self.fabric.backward(self.model(batch[:, None] / SAMPLES).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.loop.state.steps_done in stops:
                self.fabric.save(folder / f"{self.loop.state.steps_done}.ckpt", self.state)
        return batches


def resumed(fabric: Any, folder: Path, stop: int) -> list[list[int]]:
    training = Training(fabric)
    fabric.load(folder / f"{stop}.ckpt", training.state)
    return training.train(folder, [])


def main() -> None:
    from lightning.fabric import Fabric

    folder = Path(sys.argv[1])
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    report(
        {
            "whole": Training(fabric).train(folder, STOPS),
            "resumed": {stop: resumed(fabric, folder, stop) for stop in STOPS},
        }
    )


if __name__ == "__main__":
    main()
