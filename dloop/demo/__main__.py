"""Train a softmax classifier on Iris, with everything around the step driven by dloop."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import dloop
from dloop import Event, Loop, LoopEvents

from .iris import SPECIES, Batches, load
from .softmax import Softmax


def train(epochs: int, seed: int, folder: Path) -> tuple[float, dict[object, list[int]]]:
    """Train and report; return the last accuracy, and the steps at which each event fired."""
    training, held_out = load()
    model = Softmax(features=len(training[0][0]), classes=len(SPECIES))
    learning_rate = 0.5
    losses: list[float] = []
    accuracy = 0.0
    fired: dict[object, list[int]] = {}

    loop = Loop(
        Batches(training, batch_size=4, seed=seed),
        max_epochs=epochs,
        events={
            # gradients are accumulated over 4 batches; the last window may be shorter
            "OptimizerStep": Event(every_n_steps=4) | LoopEvents.TRAINING_END,
            "Log": Event(every_n_steps=100),
            "DropLR": Event(at_step=400),
            "Checkpoint": Event(every_n_seconds=0.005) | LoopEvents.TRAINING_END,
        },
    )
    for batch, events in loop:
        losses.append(model.backward(batch))

        if "OptimizerStep" in events:
            model.update(learning_rate)

        if "DropLR" in events:
            learning_rate /= 5
            print(f"step {loop.global_step:4}  learning rate drops to {learning_rate}")

        if "Log" in events:
            print(f"step {loop.global_step:4}  loss {sum(losses) / len(losses):.3f}")
            losses.clear()

        if "Checkpoint" in events:
            model.save(folder / "softmax.json")
            print(f"step {loop.global_step:4}  checkpoint after {loop.state.elapsed:.2f} s")

        if LoopEvents.EPOCH_END in events:
            accuracy = model.accuracy(held_out)
            print(f"step {loop.global_step:4}  epoch {loop.epoch:2}  accuracy {accuracy:.3f}")

        for name in events:
            fired.setdefault(name, []).append(loop.global_step)

    print(f"\n{loop.state.steps_done} steps, ended by {loop.stop_reason}; events fired at steps")
    return accuracy, fired


def main(arguments: list[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m dloop.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="how often to go through the data")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the batches")
    asked = parser.parse_args(arguments)

    print(f"dloop {dloop.__version__}, {dloop.BACKEND} core: {dloop.BACKEND_REASON}\n")
    with tempfile.TemporaryDirectory() as folder:
        accuracy, fired = train(asked.epochs, asked.seed, Path(folder))
    for name, steps in fired.items():
        shown = ", ".join(map(str, steps[:6])) + (f", ... {steps[-1]}" if len(steps) > 6 else "")
        print(f"  {name!s:24} {len(steps):4} x  {shown}")
    print(f"\naccuracy on the held-out flowers: {accuracy:.3f}")


if __name__ == "__main__":
    main()
