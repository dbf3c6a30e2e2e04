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
from functools import partial
from pathlib import Path
from typing import Any

from dloop import Event, Loop, LoopEvents, sync

try:
    import torch
    import torch.distributed as distributed
    from sklearn.datasets import load_digits
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
except ImportError as error:
    raise SystemExit(f"this demo needs PyTorch and scikit-learn ({error})") from error


def train(epochs: int, seconds: float, checkpoint: Path) -> str:
    """Train, from the checkpoint on if there is one; return a summary."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    say: Any = partial(print, flush=True) if rank == 0 else lambda text: None
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    data = TensorDataset(images[:-360], labels[:-360])
    held_out, right_ones = images[-360:][rank::size], labels[-360:][rank::size]
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop: Loop[list[Any]] = Loop(
        DataLoader(data, batch_size=16, sampler=DistributedSampler(data, seed=0)),
        max_epochs=epochs,
        signals=signal.SIGTERM,
        sync=sync.torch_distributed(every=10),
        events={
            "Checkpoint": Event(every_n_seconds=seconds) | LoopEvents.TRAINING_END,
            "Evaluate": Event(every_n_epochs=5) | LoopEvents.TRAINING_END,
        },
    )
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loop.load_state_dict(saved["loop"])
        say(f"resuming after step {loop.global_step}")

    for (inputs, targets), events in loop:
        loss = torch.nn.functional.cross_entropy(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if "Evaluate" in events:  # each process evaluates its part
            right = (model(held_out).argmax(1) == right_ones).sum()
            distributed.all_reduce(right)
            say(f"step {loop.global_step:5}  loss {loss:.4f}  accuracy {right.item() / 360:.3f}")
        if "Checkpoint" in events and rank == 0:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            draft = checkpoint.with_suffix(".draft")
            torch.save({**states, "loop": loop.state_dict()}, draft)
            draft.replace(checkpoint)
            say(f"step {loop.global_step:5}  checkpoint")

    if loop.stop_reason == "SIGTERM":
        return f"stopped by a signal after step {loop.global_step}; the same command resumes"
    weights = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()[:12]
    return f"done after step {loop.global_step}: weights {digest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5, help="between two checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("digits.pt"))
    asked = parser.parse_args()
    distributed.init_process_group("gloo")
    print(f"rank {distributed.get_rank()} is process {os.getpid()}", flush=True)
    summary = train(asked.epochs, asked.seconds, asked.checkpoint)
    if distributed.get_rank() == 0:
        print(summary)
    distributed.destroy_process_group()
