"""Train a model of characters on the text of Python's help; tokens are the unit of everything.

    pip install dloop torch
    python -m dloop.demo.language_model

Kill it at any time: the same command resumes, and ends with the same weights.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from dloop import Event, Loop, LoopEvents, batched

try:
    import torch
    from torch.utils.data import DataLoader, DistributedSampler
except ImportError as error:
    raise SystemExit(f"this demo needs PyTorch ({error})") from error

LENGTH = 64
"""Characters in a sample."""


class Model(torch.nn.Module):  # type: ignore[misc]
    """Predicts the next of 128 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 32)
        self.recurrent = torch.nn.GRU(32, 96, batch_first=True)
        self.output = torch.nn.Linear(96, 128)

    def loss(self, samples: Any) -> Any:
        """Return the mean cross-entropy of samples of characters."""
        hidden, _ = self.recurrent(self.embedding(samples[:, :-1]))
        scores = self.output(hidden).flatten(0, 1)
        return torch.nn.functional.cross_entropy(scores, samples[:, 1:].flatten())


def train(tokens: int, checkpoint: Path) -> str:
    """Train on so many tokens, from the checkpoint on if there is one; return a summary."""
    torch.manual_seed(0)
    codes = torch.tensor([min(ord(each), 127) for each in "\n".join(topics.values())])
    samples: Any = codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)
    training, held_out = samples[:-100], samples[-100:]
    # One process of one: a sampler that shuffles, and repeats its order after a resume
    sampler: Any = DistributedSampler(training, num_replicas=1, rank=0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loop = Loop(
        batched(DataLoader(training, 16, sampler=sampler), 2),  # a step is an update
        events={
            "Log": Event(every_n=50_000, of="tokens"),
            "Evaluate": Event(every_n=100_000, of="tokens", at_step=0) | LoopEvents.TRAINING_END,
            "Checkpoint": Event(every_n=25_000, of="tokens"),
        },
        stop_when=Event(at=tokens, of="tokens"),
    )
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loop.load_state_dict(saved["loop"])
    evaluated = 0.0
    for batches, _ in loop:
        optimizer.zero_grad()
        for batch in batches:
            (model.loss(batch) / len(batches)).backward()
        optimizer.step()
        events = loop.count("tokens", sum(batch[:, 1:].numel() for batch in batches))
        if "Log" in events:
            lap = loop.lap("Log")
            speed = lap.counts["tokens"] / lap.seconds
            print(f"{loop.counts['tokens']:9,} tokens, {speed:,.0f} per second")
        if "Evaluate" in events:
            with loop.pause_clock(), torch.no_grad():
                evaluated = model.loss(held_out).item()
            print(f"{loop.counts['tokens']:9,} tokens, loss {evaluated:.3f} on other text")
        if "Checkpoint" in events:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "loop": loop.state_dict()}, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)
            print("checkpoint", flush=True)
    weights = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
    return f"done: loss {evaluated:.3f}, weights {hashlib.sha256(weights).hexdigest()[:12]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--checkpoint", type=Path, default=Path("language.pt"))
    asked = parser.parse_args()
    print(train(asked.tokens, asked.checkpoint))
