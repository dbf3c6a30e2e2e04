"""Train a softmax classifier on Iris; dloop drives everything around the step."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import dloop
from dloop import Event, Loop, LoopEvents

from .iris import SPECIES, Batches, Row, load
from .softmax import Softmax


def demo_loop(batches: Batches, epochs: int) -> Loop[Sequence[Row]]:
    """Return the loop, with a bar if tqdm is installed and the output is a terminal."""
    has_bar = find_spec("tqdm") is not None and sys.stderr.isatty()
    return Loop(
        batches,
        max_epochs=epochs,
        events={
            # gradients are accumulated over 4 batches; the last window may be shorter
            "OptimizerStep": Event(every_n_steps=4) | LoopEvents.TRAINING_END,
            "Log": Event(every_n_steps=100),
            "DropLR": Event(at_step=400),
            # it waits for an update, so that no gradients are lost
            "Checkpoint": Event(every_n_seconds=0.005, wait_for="OptimizerStep")
            | LoopEvents.TRAINING_END,
        },
        progress=has_bar,
        profile=True,
    )


def train(
    loop: Loop[Sequence[Row]], model: Softmax, held_out: list[Row], folder: Path
) -> tuple[float, dict[object, list[int]]]:
    """Train and report; return the last accuracy, and the steps at which each event fired."""
    learning_rate = 0.5
    losses: list[float] = []
    accuracy = 0.0
    fired: dict[object, list[int]] = {}
    for batch, events in loop:
        losses.append(model.backward(batch))

        if "OptimizerStep" in events:
            model.update(learning_rate)

        if "DropLR" in events:
            learning_rate /= 5
            say(loop, f"learning rate drops to {learning_rate}")

        if "Log" in events:
            say(loop, f"loss {sum(losses) / len(losses):.3f}")
            losses.clear()

        if "Checkpoint" in events:
            model.save(folder / "softmax.json")
            say(loop, f"checkpoint after {loop.state.elapsed:.2f} s")

        if LoopEvents.EPOCH_END in events:
            accuracy = model.accuracy(held_out)
            loop.progress.set_postfix(accuracy=f"{accuracy:.3f}")
            say(loop, f"epoch {loop.epoch:2}  accuracy {accuracy:.3f}")

        for name in events:
            fired.setdefault(name, []).append(loop.global_step)

    print(f"\n{loop.steps_done} steps, ended by {loop.stop_reason}; events fired at steps")
    return accuracy, fired


def say(loop: Loop[Sequence[Row]], text: str) -> None:
    """Print the step and a text, above the bar if there is one."""
    loop.progress.write(f"step {loop.global_step:4}  {text}")


def main(arguments: list[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m dloop.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="the number of epochs")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the batches")
    parser.add_argument("--plan-only", action="store_true", help="show the plan, and do not train")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="where to write a trace")
    asked = parser.parse_args(arguments)

    print(f"dloop {dloop.__version__}, {dloop.BACKEND} core: {dloop.BACKEND_REASON}\n")
    training, held_out = load()
    loop = demo_loop(Batches(training, batch_size=4, seed=asked.seed), asked.epochs)
    print(loop.plan(), "\n")
    if asked.plan_only:
        return
    model = Softmax(features=len(training[0][0]), classes=len(SPECIES))
    with tempfile.TemporaryDirectory() as folder:
        accuracy, fired = train(loop, model, held_out, Path(folder))
    for name, steps in fired.items():
        shown = ", ".join(map(str, steps[:6])) + (f", ... {steps[-1]}" if len(steps) > 6 else "")
        print(f"  {name!s:24} {len(steps):4} x  {shown}")
    print(f"\n{loop.profile}")
    if asked.trace is not None:
        loop.profile.save_trace(asked.trace)
        print(f"\na trace of the last steps is in {asked.trace}")
    print(f"\naccuracy on the held-out flowers: {accuracy:.3f}")


if __name__ == "__main__":
    main()
