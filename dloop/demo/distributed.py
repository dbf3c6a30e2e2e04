"""Train a classifier of digits in several processes, which agree on when to save and to stop.

    pip install dloop torch scikit-learn
    torchrun --nproc-per-node 2 -m dloop.demo.distributed

Checkpoints come by the clock. A SIGTERM to any of the processes saves and ends all of them at the
same step. The same command then resumes, and ends with the same weights.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import dloop
from dloop import Event, Loop, LoopEvents

try:
    import torch
    import torch.distributed as distributed
    from sklearn.datasets import load_digits
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
except ImportError as error:
    raise SystemExit(
        f"dloop.demo.distributed needs PyTorch and scikit-learn: pip install torch scikit-learn "
        f"({error})"
    ) from error

HELD_OUT = 360
"""Images on which the model is not trained."""


def train(epochs: int, seconds: float, checkpoint: Path) -> str:
    """Train, from the checkpoint on if there is one; return a summary.

    Args:
        epochs: the number of epochs.
        seconds: the time between two checkpoints.
        checkpoint: the file of the checkpoint.
    """
    rank = distributed.get_rank()
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32)
    labels = torch.tensor(digits)
    data = TensorDataset(images[:-HELD_OUT], labels[:-HELD_OUT])
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of = torch.nn.CrossEntropyLoss()

    loop: Loop[list[Any]] = Loop(
        DataLoader(data, batch_size=16, sampler=DistributedSampler(data, seed=0)),
        max_epochs=epochs,
        signals=signal.SIGTERM,
        sync=dloop.sync.torch_distributed(every=10),
        events={
            "Checkpoint": Event(every_n_seconds=seconds) | LoopEvents.TRAINING_END,
            "Log": Event(every_n_steps=200) | LoopEvents.TRAINING_END,
        },
    )
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loop.load_state_dict(saved["loop"])
        say(rank, f"resuming after step {loop.global_step}")

    for (inputs, targets), events in loop:
        loss = loss_of(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if "Log" in events:
            say(rank, f"step {loop.global_step:5}  epoch {loop.epoch:3}  loss {loss.item():.4f}")
        if "Checkpoint" in events and rank == 0:
            draft = checkpoint.with_suffix(".draft")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loop": loop.state_dict(),
                },
                draft,
            )
            draft.replace(checkpoint)
            say(rank, f"step {loop.global_step:5}  checkpoint")

    if loop.stop_reason == "SIGTERM":
        return f"stopped by a signal after step {loop.global_step}; the same command resumes"
    with torch.no_grad():
        right = (model(images[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]).float().mean().item()
    weights = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()[:12]
    return f"done after step {loop.global_step}: accuracy {right:.3f}, weights {digest}"


def say(rank: int, text: str) -> None:
    """Print, on one of the processes."""
    if rank == 0:
        print(text, flush=True)


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m dloop.demo.distributed", description=__doc__
    )
    parser.add_argument("--epochs", type=int, default=20, help="the number of epochs")
    parser.add_argument("--seconds", type=float, default=0.5, help="between two checkpoints")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("digits.pt"), help="the file to save to"
    )
    asked = parser.parse_args()
    distributed.init_process_group("gloo")
    print(f"rank {distributed.get_rank()} is process {os.getpid()}", flush=True)
    found = train(asked.epochs, asked.seconds, asked.checkpoint)
    say(distributed.get_rank(), found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
