"""MLX and TensorFlow train for real: a run that was resumed comes to the same weights.

The demos show this of PyTorch and JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

from dloop import Event, Loop, LoopEvents
from frameworks import needed

XS = [number / 12 for number in range(12)]
YS = [2 * x + 1 for x in XS]
RATE = 0.2


class Training(NamedTuple):
    """A training of y = 2 x + 1.

    Attributes:
        batches: the loader; its batches have three samples.
        step: trains on a batch, and returns the loss.
        weights: returns the weights as they are saved.
        load: takes them again.
    """

    batches: Iterable[Any] | Callable[[], Iterable[Any]]
    step: Callable[[Any], float]
    weights: Callable[[], Any]
    load: Callable[[Any], object]


def by_mlx(source: str) -> Training:
    needed("mlx")
    needed("mlx.data")
    import mlx.core as mx
    import mlx.data

    def error(weights: Any, batch: Any) -> Any:
        x, y = [mx.array(batch[name]) for name in "xy"]
        return mx.mean((weights[0] * x + weights[1] - y) ** 2)

    def step(batch: Any) -> float:
        loss, gradient = error_and_gradient(weights[0], batch)
        weights[0] = weights[0] - RATE * gradient
        return float(loss)

    error_and_gradient = mx.value_and_grad(error)
    weights = [mx.zeros(2)]
    samples = [{"x": x, "y": y} for x, y in zip(XS, YS)]
    buffer = mlx.data.buffer_from_vector(samples).batch(3)
    batches = buffer if source == "buffer" else buffer.to_stream
    return Training(batches, step, lambda: weights[0], lambda saved: weights.__setitem__(0, saved))


def by_tensorflow() -> Training:
    needed("tensorflow")
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((XS, YS)).batch(3)
    weights = tf.Variable([0.0, 0.0])

    def step(batch: Any) -> float:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((weights[0] * batch[0] + weights[1] - batch[1]) ** 2)
        weights.assign_sub(RATE * tape.gradient(loss, weights))
        return float(loss)

    return Training(data, step, weights.numpy, weights.assign)


TRAININGS: dict[str, Callable[[], Training]] = {
    "MLX, a buffer": lambda: by_mlx("buffer"),
    "MLX, streams": lambda: by_mlx("stream"),
    "TensorFlow": by_tensorflow,
}
each_training = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.tensorflow if name == "TensorFlow" else pytest.mark.real
        )
        for name in TRAININGS
    ],
)


def trained(name: str, saved: Any = None, until: int | None = None) -> tuple[list[float], Any]:
    """The losses of a run, and what it has saved in its last body."""
    training = TRAININGS[name]()
    events = {"Evaluate": Event(every_n_steps=3) | LoopEvents.TRAINING_END}
    loop = Loop(training.batches, events, max_epochs=5)
    if saved is not None:
        training.load(saved[0])
        loop.load_state_dict(saved[1])
    losses = []
    evaluations = 0
    for batch, now in loop:
        losses.append(training.step(batch))
        evaluations += "Evaluate" in now
        if loop.steps_done == until:
            break
    assert until is not None or evaluations >= len(losses) // 3
    return losses, (training.weights(), loop.state_dict())


@each_training
def test_a_resumed_training_comes_to_the_same_weights(name: str) -> None:
    losses, (weights, _) = trained(name)
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 5
    for until in (1, 4, 10):
        first, saved = trained(name, until=until)
        rest, (again, state_again) = trained(name, saved)
        assert first + rest == losses
        assert again.tolist() == weights.tolist()
        assert (state_again["steps"], state_again["epoch_end"]) == (20, True)
