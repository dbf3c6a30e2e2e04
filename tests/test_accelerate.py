"""A Loop over Accelerate's loaders: the same as a plain `for` over them, and resumed exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import accelerate_on_two_processes as two_processes
from accelerated import Accelerated, accelerated
from dloop import Event, Loop, LoopEvents, LoopWarning
from frameworks import needed
from loaders import SAMPLES, Loader, of_torch, rows
from torchrun import run_on_two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # workers
]


def hf_stream(_: Path) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(rows().to_iterable_dataset(num_shards=SAMPLES).shuffle(seed=3, buffer_size=1))


# All of these have ten batches of one number in an epoch
LIGHT = accelerated(
    {
        "map-style": of_torch(batch_size=1),
        "iterable-style": of_torch("Stream", batch_size=1),
        "iterable-style with a state": of_torch("ResetStream", batch_size=1),
        "seedable sampler": of_torch(shuffle=True, batch_size=1),
        "sampler with set_epoch": of_torch(sampler="Shuffled", batch_size=1),
        "DistributedSampler": of_torch(sampler="DistributedSampler", batch_size=1),
        "data set with set_epoch": Loader(hf_stream, needs=("torch", "datasets"), shuffles=True),
    }
)
# Resumed at its end, this one has an epoch without a batch first, which Accelerate cannot dispatch.
LIGHT |= {
    name: kind
    for name, kind in accelerated(
        {"iterable-style that stays at its end": of_torch("KeptStream", batch_size=1)}
    ).items()
    if not kind.configuration["dispatch_batches"]
}
WITH_WORKERS = {
    name: kind
    for name, kind in accelerated(
        {
            "map-style": of_torch(batch_size=1, num_workers=2),
            "iterable-style": of_torch("Stream", batch_size=1, num_workers=2),
            "sampler with set_epoch": of_torch(sampler="Shuffled", batch_size=1, num_workers=2),
        }
    ).items()
    if kind.configuration["dispatch_batches"] == name.startswith("iterable-style")  # as by default
}
# Not with state: Accelerate asks torchdata for it before it sets this sampler, by which the workers
# begin with an order that does not repeat.
WITH_WORKERS["seedable sampler"] = Accelerated(
    of_torch(shuffle=True, batch_size=1, num_workers=2, prefetch_factor=5),  # the whole epoch
    {"use_seedable_sampler": True, "data_seed": 3},
)

each_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=[pytest.mark.slow] * ("datasets" in kind.loader.needs))
        for name, kind in LIGHT.items()
    ],
)


def numbers_of(batch: Any) -> Any:
    """The tensor of the batch."""
    return batch["number"] if isinstance(batch, dict) else batch


# In a run that is not interrupted


class Step(NamedTuple):
    """What can be seen in the body of a loop."""

    batch: list[int]
    loader: tuple[bool, int, int, int]
    sync_gradients: bool
    weight: float


class Training:
    """A model that is trained with an Accelerator, step by step, by some kind of loop."""

    def __init__(self, kind: Accelerated, folder: Path) -> None:
        self.accelerator, self.loader = kind(folder)
        import torch

        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.steps: list[Step] = []
        self.ends: list[int] = []  # how many steps were done when the loader called its end()
        self.loader_end = self.loader.end
        self.loader.end = self.end

    def end(self) -> None:
        self.ends.append(len(self.steps))
        self.loader_end()

    def step(self, batch: Any) -> None:
        numbers = numbers_of(batch)
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(numbers[:, None] / SAMPLES).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
        synced = self.accelerator.sync_gradients
        weight = self.model.weight.item()
        self.steps.append(Step(numbers.tolist(), self.state_of_loader(), synced, weight))

    def state_of_loader(self) -> tuple[bool, int, int, int]:
        """What the loader says, and how many are being gone over."""
        loaders = self.accelerator.gradient_state.dataloader_references
        loader = self.loader
        return loader.end_of_dataloader, loader.remainder, loader.iteration, len(loaders)


def trained_by_a_plain_for(kind: Accelerated, folder: Path, steps: int) -> Training:
    training = Training(kind, folder)
    while len(training.steps) < steps:
        for batch in training.loader:
            training.step(batch)
            if len(training.steps) == steps and steps % SAMPLES:
                break
    return training


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_steps": 20}, 20),
        ({"max_epochs": 3, "stop_when": Event(at_step=19)}, 20),
        ({"max_steps": 15}, 15),  # within an epoch
    ],
    ids=str,
)
@each_kind
def test_a_run_is_as_with_a_plain_for_and_leaves_the_loader_as_that_does(
    kind: Accelerated, arguments: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    plain = trained_by_a_plain_for(kind, tmp_path, steps)
    assert plain.ends == list(range(SAMPLES, steps + 1, SAMPLES))

    training = Training(kind, tmp_path)
    for batch, _ in Loop(training.loader, **arguments):
        training.step(batch)
    assert training.steps == plain.steps
    assert training.ends == plain.ends
    assert training.state_of_loader() == plain.state_of_loader()


@each_kind
def test_the_last_batch_of_an_epoch_is_the_one_that_the_loader_says(
    kind: Accelerated, tmp_path: Path
) -> None:
    _, loader = kind(tmp_path)
    loop = Loop(loader, max_epochs=3)
    ends = [
        (loop.epoch, loop.epoch_step, loader.end_of_dataloader)
        for _, events in loop
        if LoopEvents.EPOCH_END in events
    ]
    assert ends == [(epoch, SAMPLES - 1, True) for epoch in range(3)]


@each_kind
def test_gradients_are_accumulated_up_to_the_end_of_an_epoch(
    kind: Accelerated, tmp_path: Path
) -> None:
    training = Training(kind, tmp_path)
    loop = Loop(training.loader, max_epochs=3)
    synced = []
    for batch, _ in loop:
        training.step(batch)
        if training.accelerator.sync_gradients:
            synced.append(loop.epoch_step)
    assert synced == [3, 7, 9] * 3


@pytest.mark.parametrize(("size", "lengths"), [(4, [4, 4, 2]), (5, [5, 5]), (100, [10])])
@each_kind
def test_at_a_list_the_loader_says_what_is_true_of_the_last_of_its_batches(
    kind: Accelerated, size: int, lengths: list[int], tmp_path: Path
) -> None:
    _, loader = kind(tmp_path)
    found = [
        (len(batches), loader.end_of_dataloader, LoopEvents.EPOCH_END in events)
        for batches, events in Loop(loader, max_epochs=2).chunks(size)
    ]
    before_last = [(length, False, False) for length in lengths[:-1]]
    assert found == [*before_last, (lengths[-1], True, True)] * 2


def of_interrupted_stream(at: int) -> Loader:
    def build(_: Path) -> Any:
        from torch.utils.data import DataLoader

        from torch_data import InterruptedStream

        return DataLoader(InterruptedStream(SAMPLES, at))

    return Loader(build, needs=("torch",))


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_ctrl_c_in_a_fetch_loses_no_batch(
    at: int, stateful: bool, dispatched: bool, tmp_path: Path
) -> None:
    """The batch that the loader held, since it looks ahead, is lost to it."""
    configuration = {"use_stateful_dataloader": stateful, "dispatch_batches": dispatched}
    _, loader = Accelerated(of_interrupted_stream(at), configuration)(tmp_path)
    loop = Loop(loader, max_epochs=2)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch.item() for batch, _ in loop)
    for batch, events in loop:
        seen.append(batch.item())
        assert loader.end_of_dataloader == (LoopEvents.EPOCH_END in events)
    assert seen == [*range(SAMPLES)] * 2


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_an_evaluation_in_the_body_is_as_in_a_plain_for(in_a_loop: bool, tmp_path: Path) -> None:
    kind = LIGHT["map-style"]
    plain = trained_by_a_plain_for(kind, tmp_path, 2 * SAMPLES)

    training = Training(kind, tmp_path)
    evaluated = training.accelerator.prepare(kind.loader(tmp_path))
    loop = Loop(training.loader, {"Evaluate": Event(every_n_steps=5)}, max_epochs=2)
    for batch, events in loop:
        training.step(batch)
        if "Evaluate" in events:
            for _ in Loop(evaluated, max_epochs=1) if in_a_loop else evaluated:
                assert training.accelerator.gradient_state.active_dataloader is evaluated
            assert training.accelerator.gradient_state.active_dataloader is training.loader
    assert training.steps == plain.steps
    assert training.state_of_loader() == plain.state_of_loader()


# In a run that is resumed


def a_loop(kind: Accelerated, folder: Path, state: Any = None) -> tuple[Any, Loop[Any]]:
    """A loader as in a new process, and a loop over it that goes on from `state`."""
    _, loader = kind(folder)
    loop = Loop(loader, max_epochs=3)
    if state is not None:
        loop.load_state_dict(state)
    return loader, loop


def seen_in(loader: Any, loop: Loop[Any]) -> Iterator[tuple[Any, ...]]:
    """What is seen in each body."""
    for batch, events in loop:
        end = loader.end_of_dataloader, LoopEvents.EPOCH_END in events
        open_loaders = len(loader.gradient_state.dataloader_references)
        yield numbers_of(batch).tolist(), loop.epoch, loader.iteration, end, open_loaders


@each_kind
def test_a_run_goes_on_from_every_step_without_a_word(kind: Accelerated, tmp_path: Path) -> None:
    loader, loop = a_loop(kind, tmp_path)
    whole = []
    states = [json.dumps(loop.state_dict())]
    for seen in seen_in(loader, loop):
        whole.append(seen)
        states.append(json.dumps(loop.state_dict()))
    plain = trained_by_a_plain_for(kind, tmp_path, 3 * SAMPLES)
    assert [batch for batch, *_ in whole] == [step.batch for step in plain.steps]
    for done, state in enumerate(states):
        resumed = a_loop(kind, tmp_path, json.loads(state))
        assert list(seen_in(*resumed)) == whole[done:], f"left after {done} steps"


def in_many_lives(kind: Accelerated, folder: Path, stops: list[int]) -> list[tuple[Any, ...]]:
    """What is seen in a run that is left after each of `stops`, and goes on in a new process."""
    steps: list[tuple[Any, ...]] = []
    state = None
    for stop in [*stops, None]:
        loader, loop = a_loop(kind, folder, state)
        with loop:
            for seen in seen_in(loader, loop):
                steps.append(seen)
                if len(steps) == stop:
                    break
        state = copy.deepcopy(loop.state_dict())
    return steps


@pytest.mark.no_core
@each_kind
def test_a_run_that_is_resumed_again_and_again_is_the_uninterrupted_one(
    kind: Accelerated, tmp_path: Path
) -> None:
    whole = in_many_lives(kind, tmp_path, [])
    assert in_many_lives(kind, tmp_path, list(range(1, 3 * SAMPLES + 1))) == whole
    assert in_many_lives(kind, tmp_path, [2, 4, 9, 10, 11, 18, 29]) == whole


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.parametrize("kind", WITH_WORKERS.values(), ids=WITH_WORKERS)
def test_a_run_with_workers_that_is_resumed_is_the_uninterrupted_one(
    kind: Accelerated, tmp_path: Path
) -> None:
    whole = in_many_lives(kind, tmp_path, [])
    assert in_many_lives(kind, tmp_path, [4, 10, 13, 20]) == whole


def of_shuffled_numbers(*, seeded: bool) -> Loader:
    def build(_: Path) -> Any:
        from torch.utils.data import DataLoader

        import torch_data

        data: Any = range(SAMPLES)
        return DataLoader(data, shuffle=True, generator=torch_data.seeded() if seeded else None)

    return Loader(build, needs=("torch",))


@pytest.mark.parametrize(
    ("seeded", "stateful", "stop"),
    [
        (False, False, 3),
        (False, True, 3),
        (True, True, 3),
        *((seeded, stateful, 13) for seeded in (False, True) for stateful in (False, True)),
    ],
)
def test_of_a_shuffle_that_does_not_repeat_a_warning_says_what_to_do(
    seeded: bool, stateful: bool, stop: int, tmp_path: Path
) -> None:
    """What torchdata keeps of the loader that Accelerate makes has no state of its sampler."""
    kind = Accelerated(of_shuffled_numbers(seeded=seeded), {"use_stateful_dataloader": stateful})
    with pytest.warns(LoopWarning, match=r"shuffle.*set_epoch"):
        in_many_lives(kind, tmp_path, [stop])


def test_a_seeded_shuffle_repeats_its_first_epoch_without_a_word(tmp_path: Path) -> None:
    kind = Accelerated(of_shuffled_numbers(seeded=True))
    whole = in_many_lives(kind, tmp_path, [])
    assert in_many_lives(kind, tmp_path, [3, 7])[:SAMPLES] == whole[:SAMPLES]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_a_shuffle_that_is_resumed_between_two_epochs_is_not_warned_of(
    seeded: bool, stateful: bool, tmp_path: Path
) -> None:
    kind = Accelerated(of_shuffled_numbers(seeded=seeded), {"use_stateful_dataloader": stateful})
    steps = in_many_lives(kind, tmp_path, [SAMPLES, 2 * SAMPLES])
    batches = [batch for batch, *_ in steps]
    for epoch in range(3):
        found = batches[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert sorted(found) == [[number] for number in range(SAMPLES)]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("sampler", [None, "Shuffled"])
@pytest.mark.parametrize("stateful", [False, True])
def test_epochs_that_are_fetched_as_a_whole_at_their_begin(
    stateful: bool, sampler: str | None, batches: int, tmp_path: Path
) -> None:
    """Accelerate looks one batch ahead, and its seedable sampler goes on to the next epoch."""
    loader = of_torch(None, sampler, batch_size=SAMPLES // batches, shuffle=sampler is None)
    configuration = {"use_seedable_sampler": True, "data_seed": 3}
    kind = Accelerated(loader, {**configuration, "use_stateful_dataloader": stateful})
    whole = in_many_lives(kind, tmp_path, [])
    assert in_many_lives(kind, tmp_path, list(range(1, 3 * batches + 1))) == whole


@pytest.mark.no_core
@each_kind
def test_save_state_and_load_state_keep_a_registered_run(kind: Accelerated, tmp_path: Path) -> None:
    """The gradients that are not applied yet are in no checkpoint, and so none is saved there."""
    stops = [4, 10, 14, 20, 24, 30]
    save = {"Save": Event(at_step=[stop - 1 for stop in stops])}
    first = Training(kind, tmp_path)
    loop = Loop(first.loader, save, max_epochs=3)
    first.accelerator.register_for_checkpointing(loop)
    for batch, events in loop:
        first.step(batch)
        if "Save" in events:
            first.accelerator.save_state(str(tmp_path / str(loop.state.steps_done)))

    for stop in stops:
        second = Training(kind, tmp_path)
        loop = Loop(second.loader, save, max_epochs=3)
        second.accelerator.register_for_checkpointing(loop)
        second.accelerator.load_state(str(tmp_path / str(stop)))
        assert loop.state.steps_done == stop
        for batch, _ in loop:
            second.step(batch)
        assert second.steps == first.steps[stop:]
        assert second.model.weight == first.model.weight


# In two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the two processes found, by rank."""
    for module in ("accelerate", "torchdata"):
        needed(module)
    folder = tmp_path_factory.mktemp("ranks")
    return run_on_two_processes("accelerate_on_two_processes.py", folder)


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_two_processes_gather_each_sample_once(ranks: list[Any], kind: str) -> None:
    for found in ranks:
        steps = found[kind]["loop"]
        assert steps == found[kind]["plain"]
        for start in range(0, len(steps), two_processes.STEPS):
            epoch = chain.from_iterable(steps[start : start + two_processes.STEPS])
            assert sorted(epoch) == list(range(two_processes.SAMPLES))


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.parametrize("source", ["from states", "from checkpoints"])
@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_two_processes_go_on_from_every_step(ranks: list[Any], kind: str, source: str) -> None:
    for found in ranks:
        steps = found[kind]["loop"]
        assert found[kind][source] == [steps[done:] for done in range(1, len(steps) + 1)]
