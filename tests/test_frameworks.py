"""The four frameworks train for real. A run that was resumed comes to the same weights."""

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


def by_torch() -> Training:
    needed("torch")
    import torch
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    data = TensorDataset(torch.tensor(XS)[:, None], torch.tensor(YS)[:, None])
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)

    def step(batch: Any) -> float:
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def weights() -> Any:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(saved: Any) -> None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    return Training(DataLoader(data, 3, sampler=sampler), step, weights, load)


def by_functions(
    batches: Any, loss_and_gradient: Callable[[Any, Any], Any], weights: Any, split: Any
) -> Training:
    """A training in a framework of functions: the weights are a value that is replaced."""
    current = [weights]

    def step(batch: Any) -> float:
        loss, gradient = loss_and_gradient(current[0], split(batch))
        current[0] = current[0] - RATE * gradient
        return float(loss)

    return Training(batches, step, lambda: current[0], lambda saved: current.__setitem__(0, saved))


def by_jax() -> Training:
    needed("jax")
    import jax
    import jax.numpy as jnp

    def loss(weights: Any, batch: Any) -> Any:
        return jnp.mean((weights[0] * batch[0] + weights[1] - batch[1]) ** 2)

    data = jnp.array([XS, YS]).reshape(2, 4, 3).transpose(1, 0, 2)
    return by_functions(data, jax.jit(jax.value_and_grad(loss)), jnp.zeros(2), lambda batch: batch)


def by_mlx(source: str) -> Training:
    needed("mlx")
    needed("mlx.data")
    import mlx.core as mx
    import mlx.data

    def loss(weights: Any, batch: Any) -> Any:
        return mx.mean((weights[0] * batch[0] + weights[1] - batch[1]) ** 2)

    def split(batch: Any) -> Any:
        return [mx.array(batch[name]) for name in "xy"]

    samples = [{"x": x, "y": y} for x, y in zip(XS, YS)]
    buffer = mlx.data.buffer_from_vector(samples).batch(3)
    batches = buffer if source == "buffer" else buffer.to_stream
    return by_functions(batches, mx.value_and_grad(loss), mx.zeros(2), split)


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
    "PyTorch": by_torch,
    "JAX": by_jax,
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


def numbers(weights: Any) -> Any:
    """The weights as numbers of Python, to be compared to the last digit."""
    if isinstance(weights, dict):
        return {name: numbers(each) for name, each in weights.items()}
    return weights.tolist() if hasattr(weights, "tolist") else weights


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
        assert numbers(again) == numbers(weights)
        assert (state_again["steps"], state_again["epoch_end"]) == (20, True)
