"""Train a classifier of images with early stopping, and keep the best weights.

    pip install dloop torch scikit-learn
    python -m dloop.demo.image_classifier

Kill it at any time: the same command resumes, and ends with the same weights.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import hashlib
import signal
from pathlib import Path
from typing import Any

from dloop import Event, Loop, LoopEvents

try:
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
except ImportError as error:
    raise SystemExit(f"this demo needs PyTorch and scikit-learn ({error})") from error

HELD_OUT = 360
"""Images on which the model is not trained."""
PATIENCE = 5
"""Epochs without a better accuracy, after which the training ends."""


def train(epochs: int, checkpoint: Path, workers: int) -> str:
    """Train, from the checkpoint on if there is one; return a summary."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    data = TensorDataset(images[:-HELD_OUT], labels[:-HELD_OUT])
    # One process of one: a sampler that shuffles, and repeats its order after a resume
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, batch_size=32, sampler=sampler, num_workers=workers)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten()),
        torch.nn.Linear(32 * 16, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    best: dict[str, Any] = {"accuracy": 0.0, "epoch": -1, "model": model.state_dict()}
    events = {"Log": Event(every_n_steps=100), "Validate": LoopEvents.EPOCH_END}
    with Loop(loader, events, max_epochs=epochs, signals=signal.SIGTERM) as loop:
        if checkpoint.exists():
            saved = torch.load(checkpoint)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            loop.load_state_dict(saved["loop"])
            best = saved["best"]
        for (inputs, targets), fired in loop:
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if "Log" in fired:
                speed = loop.lap("Log").steps_per_second
                print(f"step {loop.global_step:5}  loss {loss.item():.3f}  {speed:.0f} steps/s")
            if "Validate" in fired:
                with loop.pause_clock(), torch.no_grad():
                    right = model(images[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]
                accuracy = right.float().mean().item()
                print(f"epoch {loop.epoch:4}  accuracy {accuracy:.3f}")
                if accuracy > best["accuracy"]:
                    copied = {name: each.clone() for name, each in model.state_dict().items()}
                    best = {"accuracy": accuracy, "epoch": loop.epoch, "model": copied}
                elif loop.epoch - best["epoch"] == PATIENCE:
                    fired = loop.finish()
            if "Validate" in fired or LoopEvents.TRAINING_END in fired:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"best": best, "loop": loop.state_dict()}
                torch.save(state, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)
                print("checkpoint", flush=True)
    weights = b"".join(each.numpy().tobytes() for each in best["model"].values())
    digest = hashlib.sha256(weights).hexdigest()[:12]
    return f"done: accuracy {best['accuracy']:.3f} in epoch {best['epoch']}, weights {digest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--checkpoint", type=Path, default=Path("images.pt"))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    print(train(asked.epochs, asked.checkpoint, asked.workers))
