"""Train with JAX, many steps in one compiled function: lists of steps under `lax.scan`.

    pip install dloop jax
    python -m dloop.demo.jax_scan

Kill it at any time: the same command resumes, and ends with the same weights.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from dloop import Event, Loop, LoopEvents

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise SystemExit(f"this demo needs JAX ({error})") from error


def samples(count: int) -> Any:
    """Return points in the plane, and whether each lies within the unit circle."""
    points = jax.random.uniform(jax.random.key(0), (count, 2), minval=-1.2, maxval=1.2)
    inside = (points**2).sum(1) < 1
    return jnp.concatenate([points, inside[:, None]], 1)


def scores(weights: Any, points: Any) -> Any:
    """Return how likely the points are inside, as logits."""
    hidden = jnp.tanh(points @ weights["in"] + weights["bias"])
    return hidden @ weights["out"] + weights["level"]


def loss(weights: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of a batch."""
    return jnp.logaddexp(0, (1 - 2 * batch[:, 2]) * scores(weights, batch[:, :2])).mean()


def make_steps(weights: Any, batches: Any) -> Any:
    """Make one step for each of the batches; return the weights and the last loss."""

    def step(weights: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(weights, batch)
        return jax.tree.map(lambda w, g: w - 0.5 * g, weights, gradient), value

    weights, losses = jax.lax.scan(step, weights, batches)
    return weights, losses[-1]


train_on: Any = jax.jit(make_steps)


def train(epochs: int, checkpoint: Path) -> str:
    """Train, from the checkpoint on if there is one; return a summary."""
    data = samples(16_500)
    batches, held_out = data[:16_000].reshape(500, 32, 3), data[16_000:]
    weights: Any = {
        "in": jax.random.normal(jax.random.key(1), (2, 16)),
        "bias": jnp.zeros(16),
        "out": jax.random.normal(jax.random.key(2), (16,)) / 4,
        "level": jnp.zeros(()),
    }
    events = {
        "Log": Event(every_n_steps=200),
        "Checkpoint": Event(every_n_steps=450) | LoopEvents.TRAINING_END,
    }
    loop = Loop(batches, events, max_epochs=epochs)
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        weights = {name: jnp.array(each, jnp.float32) for name, each in saved["weights"].items()}
        loop.load_state_dict(saved["loop"])
    for steps, fired in loop.chunks((64, 8, 1)):  # compiled once for each of these lengths
        weights, latest = train_on(weights, jnp.stack(steps))
        if "Log" in fired:
            speed = loop.lap("Log").steps_per_second
            print(f"step {loop.global_step:5}  loss {latest:.3f}  {speed:,.0f} steps/s")
        if "Checkpoint" in fired:
            values = {name: each.tolist() for name, each in weights.items()}
            draft = Path(f"{checkpoint}.new")
            draft.write_text(json.dumps({"weights": values, "loop": loop.state_dict()}))
            draft.replace(checkpoint)
            print("checkpoint", flush=True)
    right = (scores(weights, held_out[:, :2]) > 0) == (held_out[:, 2] > 0)
    digest = hashlib.sha256(b"".join(each.tobytes() for each in jax.tree.leaves(weights)))
    return f"done: accuracy {right.mean():.3f}, weights {digest.hexdigest()[:12]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, default=Path("scan.json"))
    asked = parser.parse_args()
    print(train(asked.epochs, asked.checkpoint))
