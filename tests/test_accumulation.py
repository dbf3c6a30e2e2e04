"""Gradient accumulation with steps_since(): also correct in the last, shorter window."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents
from frameworks import needed

EVERY_16 = Event(every_n_steps=16)


def windows(loop: Loop[Any]) -> list[int]:
    return [loop.steps_since("Step") for _, events in loop if "Step" in events]


def accumulated_and_whole(
    event: Any, *, batches: int, epochs: int, batch_size: int = 2
) -> list[tuple[Any, Any]]:
    """For each optimizer step, the accumulated gradient and that of all its samples at once."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batches * batch_size, 3, generator=generator)
    targets = torch.randn(batches * batch_size, 1, generator=generator)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.MSELoss()

    loader = DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)
    loop = Loop(loader, max_epochs=epochs, events={"OptimizerStep": event})
    pairs = []
    window = []
    for batch, events in loop:
        window.append(batch)
        loss(model(batch[0]), batch[1]).backward()
        if "OptimizerStep" in events:
            for parameter in model.parameters():
                parameter.grad /= loop.steps_since("OptimizerStep")
            found = [parameter.grad.clone() for parameter in model.parameters()]

            optimizer.zero_grad()
            all_inputs, all_targets = map(torch.cat, zip(*window, strict=True))
            loss(model(all_inputs), all_targets).backward()
            pairs.append((found, [parameter.grad.clone() for parameter in model.parameters()]))

            optimizer.step()
            optimizer.zero_grad()
            window.clear()
    assert window == []
    return pairs


@pytest.mark.parametrize(
    ("event", "batches", "epochs", "optimizer_steps"),
    [
        (EVERY_16 | LoopEvents.TRAINING_END, 40, 1, 3),
        (EVERY_16 | LoopEvents.TRAINING_END, 20, 2, 3),
        (EVERY_16 | LoopEvents.EPOCH_END, 20, 2, 4),
        (Event(every_n_steps=16, per_epoch=True) | LoopEvents.EPOCH_END, 20, 2, 4),
    ],
    ids=str,
)
def test_accumulated_gradients_equal_those_of_one_large_batch(
    event: Any, batches: int, epochs: int, optimizer_steps: int
) -> None:
    needed("torch")
    import torch

    pairs = accumulated_and_whole(event, batches=batches, epochs=epochs)
    assert len(pairs) == optimizer_steps
    for accumulated, whole in pairs:
        torch.testing.assert_close(accumulated, whole)


@pytest.mark.parametrize(
    ("event", "arguments", "expected"),
    [
        (EVERY_16 | LoopEvents.TRAINING_END, {"max_steps": 40}, [16, 16, 8]),
        (EVERY_16 | LoopEvents.TRAINING_END, {"max_steps": 32}, [16, 16]),
        (EVERY_16 | LoopEvents.TRAINING_END, {"max_steps": 5}, [5]),
        (EVERY_16 | LoopEvents.EPOCH_END, {"max_epochs": 2}, [16, 4, 12, 8]),
        (
            Event(every_n_steps=16, per_epoch=True) | LoopEvents.EPOCH_END,
            {"max_epochs": 2},
            [16, 4, 16, 4],
        ),
        (EVERY_16, {"max_steps": 40}, [16, 16]),
    ],
    ids=str,
)
def test_steps_since_at_an_event_is_the_number_of_steps_of_its_window(
    event: Any, arguments: dict[str, int], expected: list[int]
) -> None:
    assert windows(Loop(range(20), events={"Step": event}, **arguments)) == expected


@pytest.mark.parametrize("stop", [1, 15, 16, 17, 20, 39, 40])
def test_a_window_continues_after_a_resume(stop: int) -> None:
    events = {"Step": EVERY_16 | LoopEvents.TRAINING_END}
    first = Loop(range(20), max_epochs=2, events=events)
    found = []
    for _, names in first:
        if "Step" in names:
            found.append(first.steps_since("Step"))
        if first.state.steps_done == stop:
            break
    second = Loop(range(20), max_epochs=2, events=events)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert found + windows(second) == [16, 16, 8]


def test_after_a_resume_with_step_done_false_the_window_is_completed_again() -> None:
    events = {"Step": EVERY_16 | LoopEvents.TRAINING_END}
    first = Loop(range(20), max_epochs=2, events=events)
    for _ in first:
        if first.state.steps_done == 16:
            break
    second = Loop(range(20), max_epochs=2, events=events)
    second.load_state_dict(copy.deepcopy(first.state_dict(step_done=False)))
    assert windows(second) == [16, 16, 8]


def test_between_events_steps_since_counts_from_the_latest_one() -> None:
    loop = Loop(range(5), max_epochs=1, events={"Step": Event(every_n_steps=3)})
    assert loop.steps_since("Step") == 0
    assert [loop.steps_since("Step") for _ in loop] == [1, 2, 3, 1, 2]


def test_steps_since_accepts_loop_events() -> None:
    loop = Loop(range(5), max_epochs=2)
    ends = [loop.steps_since(LoopEvents.EPOCH_END) for _ in loop]
    assert ends == [1, 2, 3, 4, 5] * 2


def test_steps_since_of_an_unknown_name_raises_key_error() -> None:
    with pytest.raises(KeyError, match="Stpe"):
        Loop(range(5), max_epochs=1, events={"Step": EVERY_16}).steps_since("Stpe")


def test_with_chunks_steps_since_counts_batches() -> None:
    loop = Loop(range(40), max_epochs=1, events={"Step": EVERY_16 | LoopEvents.TRAINING_END})
    found = [loop.steps_since("Step") for _, events in loop.chunks((8, 4, 1)) if "Step" in events]
    assert found == [16, 16, 8]
