"""Train a classifier of flowers in plain Python: no package but dloop is needed.

    python -m dloop.demo

Stop it with Ctrl-C, or kill it: the same command resumes, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import dloop
from dloop import Event, Loop, LoopEvents

from .iris import SPECIES, Batches, load
from .softmax import Softmax


def train(epochs: int, checkpoint: Path) -> str:
    """Train, from the checkpoint on if there is one; return a summary.

    Args:
        epochs: the number of epochs.
        checkpoint: the file of the checkpoint; it is removed when the training is done.
    """
    training, held_out = load()
    model = Softmax(features=len(training[0][0]), classes=len(SPECIES))
    learning_rate = 0.1
    loop = Loop(
        Batches(training, batch_size=4, seed=0),
        max_epochs=epochs,
        signals=signal.SIGINT,  # Ctrl-C makes the next step the last one
        progress=find_spec("tqdm") is not None and sys.stderr.isatty(),
        profile=True,
        events={
            "DropLR": Event(at_step=20_000),
            "Evaluate": Event(every_n_steps=10_000) | LoopEvents.TRAINING_END,
            "Checkpoint": Event(every_n_seconds=0.5) | LoopEvents.TRAINING_END,
        },
    )
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        model.weights, learning_rate = saved["weights"], saved["learning_rate"]
        loop.load_state_dict(saved["loop"])
        print(f"resuming after step {loop.global_step}\n")
    else:
        print(loop.plan(), "\n")

    for batch, events in loop:
        loss = model.backward(batch)
        model.update(learning_rate)

        if "DropLR" in events:
            learning_rate /= 10

        if "Evaluate" in events:
            speed = loop.lap("Evaluate").steps_per_second
            with loop.pause_clock():
                accuracy = model.accuracy(held_out)
            loop.progress.write(
                f"step {loop.global_step:6}  loss {loss:.3f}  accuracy {accuracy:.3f}  "
                f"{speed:,.0f} steps/s"
            )

        if "Checkpoint" in events:
            state = {"weights": model.weights, "learning_rate": learning_rate}
            draft = Path(f"{checkpoint}.new")
            draft.write_text(json.dumps({**state, "loop": loop.state_dict()}))
            draft.replace(checkpoint)
            loop.progress.write("checkpoint")

    print(f"\n{loop.profile}\n")
    if loop.stop_reason == "SIGINT":
        return f"stopped after step {loop.global_step}: the same command resumes"
    checkpoint.unlink()
    digest = hashlib.sha256(json.dumps(model.weights).encode()).hexdigest()[:12]
    return f"done: accuracy {model.accuracy(held_out):.3f}, weights {digest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dloop.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--checkpoint", type=Path, default=Path("iris.json"))
    asked = parser.parse_args()
    print(f"dloop {dloop.__version__}, {dloop.BACKEND} core: {dloop.BACKEND_REASON}\n")
    print(train(asked.epochs, asked.checkpoint))
