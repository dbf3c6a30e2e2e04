"""Lightning Fabric's loaders, which set the epoch of their sampler by a counter of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import fabric_on_two_processes as two_processes
from dloop import Loop, LoopWarning
from frameworks import needed
from loaders import SAMPLES, Loader, hf_in_torch, of_torch
from torchrun import run_on_two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # workers
]

BATCHES = SAMPLES // 2  # in an epoch


def a_fabric() -> Any:
    needed("lightning")
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def set_up(loader: Loader, folder: Path) -> Any:
    """The loader as in a new process, where its counter begins anew."""
    return a_fabric().setup_dataloaders(loader(folder))


def numbers(batch: Any) -> list[int]:
    found: list[int] = (batch["number"] if isinstance(batch, dict) else batch).tolist()
    return found


def epochs_of(batches: list[list[int]]) -> list[list[int]]:
    """The samples of each of three epochs."""
    return [
        list(chain.from_iterable(batches[start : start + BATCHES]))
        for start in range(0, 3 * BATCHES, BATCHES)
    ]


LIGHT = {
    "not shuffled": of_torch(),
    "iterable-style": of_torch("Stream"),
    "sampler with set_epoch": of_torch(sampler="Shuffled"),
    "DistributedSampler": of_torch(sampler="DistributedSampler"),
    "StatefulDataLoader": of_torch(sampler="Shuffled", stateful=True),
}
WITH_WORKERS = {
    "sampler with set_epoch, 2 workers": of_torch(sampler="Shuffled", num_workers=2),
    "sampler with set_epoch, 2 workers that stay": of_torch(
        sampler="Shuffled", num_workers=2, persistent_workers=True
    ),
}


@pytest.mark.parametrize("loader", LIGHT.values(), ids=LIGHT)
def test_a_run_is_as_with_a_plain_for(loader: Loader, tmp_path: Path) -> None:
    plain = set_up(loader, tmp_path)
    expected = [numbers(batch) for _ in range(3) for batch in plain]
    assert [numbers(batch) for batch, _ in Loop(set_up(loader, tmp_path), max_epochs=3)] == expected
    epochs = epochs_of(expected)
    assert [len(set(epoch)) for epoch in epochs] == [SAMPLES] * 3
    assert (epochs[0] != epochs[1] != epochs[2] != epochs[0]) is loader.shuffles


def gone_over_before(loader: Loader, folder: Path, times: int) -> Any:
    """The loader after its first batch was looked at so often: its counter is ahead."""
    ahead = set_up(loader, folder)
    for _ in range(times):
        next(iter(ahead))
    return ahead


def in_many_lives(
    loader: Loader, folder: Path, stops: Iterable[int], *, ahead: int = 0
) -> list[list[int]]:
    """The batches of a run that is left after each of `stops`, and goes on in a new process."""
    batches: list[list[int]] = []
    state = None
    for stop in [*stops, None]:
        loop = Loop(gone_over_before(loader, folder, ahead), max_epochs=3)
        if state is not None:
            loop.load_state_dict(state)
        with loop:
            for batch, _ in loop:
                batches.append(numbers(batch))
                if len(batches) == stop:
                    state = copy.deepcopy(loop.state_dict())
                    break
    return batches


@pytest.mark.parametrize("loader", LIGHT.values(), ids=LIGHT)
def test_a_run_goes_on_from_every_step_in_the_same_order(loader: Loader, tmp_path: Path) -> None:
    whole = in_many_lives(loader, tmp_path, [])
    for stop in range(1, 3 * BATCHES + 1):
        assert in_many_lives(loader, tmp_path, [stop]) == whole, f"left after {stop} steps"
    assert in_many_lives(loader, tmp_path, range(1, 3 * BATCHES + 1)) == whole


def test_a_data_set_with_set_epoch_has_the_same_orders_again(tmp_path: Path) -> None:
    """Fabric sets the epoch of a sampler, and of nothing else."""
    build = hf_in_torch(stateful=False, shuffle=True, num_workers=0)
    loader = Loader(build, needs=("torch", "datasets"))
    whole = in_many_lives(loader, tmp_path, [])
    assert len({tuple(epoch) for epoch in epochs_of(whole)}) == 3
    assert in_many_lives(loader, tmp_path, [2, 5, 7, 12]) == whole


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.parametrize("loader", WITH_WORKERS.values(), ids=WITH_WORKERS)
def test_a_run_with_workers_goes_on_in_the_same_order(loader: Loader, tmp_path: Path) -> None:
    whole = in_many_lives(loader, tmp_path, [])
    assert in_many_lives(loader, tmp_path, [2, 5, 7, 9, 12]) == whole


# Where the loader's order is not that of the run's epoch by itself


def check_exact_or_warned(loop: Loop[Any], expected: list[list[int]]) -> None:
    """No sample is lost in silence."""
    try:
        found = [numbers(batch) for batch, _ in loop]
    except LoopWarning as warning:
        assert "epoch" in str(warning)
    else:
        assert found == expected


def state_after(steps: int, loader: Loader, folder: Path) -> dict[str, Any]:
    """The state of a run over a loader that was not gone over before."""
    loop = Loop(set_up(loader, folder), max_epochs=3)
    for _ in loop:
        if loop.state.steps_done == steps:
            break
    return copy.deepcopy(loop.state_dict())


@pytest.mark.parametrize("name", ["sampler with set_epoch", "DistributedSampler"])
@pytest.mark.parametrize("stop", [3, 5, 8, 12])
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_loader_that_was_gone_over_before_a_resume_loses_nothing_in_silence(
    ahead: int, stop: int, name: str, tmp_path: Path
) -> None:
    whole = in_many_lives(LIGHT[name], tmp_path, [])
    loop = Loop(gone_over_before(LIGHT[name], tmp_path, ahead), max_epochs=3)
    loop.load_state_dict(state_after(stop, LIGHT[name], tmp_path))
    check_exact_or_warned(loop, whole[stop:])


@pytest.mark.parametrize("name", ["sampler with set_epoch", "DistributedSampler"])
@pytest.mark.parametrize("stop", [3, 8, 12])
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_program_that_always_goes_over_its_loader_before_loses_nothing_in_silence(
    ahead: int, stop: int, name: str, tmp_path: Path
) -> None:
    try:
        batches = in_many_lives(LIGHT[name], tmp_path, [stop], ahead=ahead)
    except LoopWarning as warning:
        assert "epoch" in str(warning)
    else:
        assert [len(set(epoch)) for epoch in epochs_of(batches)] == [SAMPLES] * 3


def not_shuffled_by_a_distributed_sampler(_: Path) -> Any:
    needed("torch")
    from torch.utils.data import DataLoader, DistributedSampler

    data: Any = range(SAMPLES)
    sampler = DistributedSampler[Any](data, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(data, batch_size=2, sampler=sampler)


def test_a_loader_that_does_not_shuffle_may_be_gone_over_before(tmp_path: Path) -> None:
    """As for a validation after each epoch; Fabric gives it a DistributedSampler."""
    loader = Loader(not_shuffled_by_a_distributed_sampler)
    whole = in_many_lives(loader, tmp_path, [])
    assert in_many_lives(loader, tmp_path, [3, 5, 8], ahead=1) == whole

    again_and_again = set_up(loader, tmp_path)
    for _ in range(3):
        batches = [numbers(batch) for batch, _ in Loop(again_and_again, max_epochs=1)]
        assert batches == whole[:BATCHES]


class Interrupted(list[int]):
    """Raises KeyboardInterrupt once, at the number 3."""

    interrupts = 1

    def __getitem__(self, index: Any) -> Any:
        if index == 3 and self.interrupts:
            self.interrupts = 0
            raise KeyboardInterrupt
        return super().__getitem__(index)


def of_interrupted_numbers(_: Path) -> Any:
    needed("torch")
    from torch.utils.data import DataLoader

    import torch_data

    data: Any = Interrupted(range(SAMPLES))
    return DataLoader(data, batch_size=2, sampler=torch_data.Shuffled(SAMPLES))


def test_ctrl_c_in_a_fetch_loses_nothing_in_silence(tmp_path: Path) -> None:
    """The loader that is begun anew counts an epoch more."""
    whole = in_many_lives(LIGHT["sampler with set_epoch"], tmp_path, [])
    loop = Loop(set_up(Loader(of_interrupted_numbers), tmp_path), max_epochs=3)
    done: list[list[int]] = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(numbers(batch) for batch, _ in loop)
    assert done == whole[: len(done)]
    check_exact_or_warned(loop, whole[len(done) :])


# fabric.save() and fabric.load()


@pytest.mark.parametrize("stop", [3, 5, 7, 10, 13, 15])
@pytest.mark.parametrize("as_object", [True, False])
def test_a_loop_is_saved_and_loaded_with_the_model(
    as_object: bool, stop: int, tmp_path: Path
) -> None:
    """Either the loop or its state_dict() stands in the checkpoint."""
    loader = LIGHT["sampler with set_epoch"]
    whole = in_many_lives(loader, tmp_path, [])
    import torch

    fabric = a_fabric()
    model = fabric.setup(torch.nn.Linear(1, 1))
    loop = Loop(set_up(loader, tmp_path), max_epochs=3)
    for _ in loop:
        if loop.state.steps_done == stop:
            saved = {"model": model, "loop": loop if as_object else loop.state_dict()}
            fabric.save(tmp_path / "checkpoint", saved)
            break

    fabric = a_fabric()
    restored = fabric.setup(torch.nn.Linear(1, 1))
    loop = Loop(set_up(loader, tmp_path), max_epochs=3)
    state = {"model": restored, "loop": loop} if as_object else {"model": restored}
    rest = fabric.load(tmp_path / "checkpoint", state)
    if not as_object:
        loop.load_state_dict(rest["loop"])
    assert torch.equal(restored.weight, model.weight)
    assert loop.state.steps_done == stop
    assert [numbers(batch) for batch, _ in loop] == whole[stop:]


# In two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the two processes found, by rank."""
    needed("lightning")
    return run_on_two_processes("fabric_on_two_processes.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.no_core
def test_two_processes_share_out_the_samples_of_each_epoch(ranks: list[Any]) -> None:
    wholes = [found["whole"] for found in ranks]
    assert wholes[0] != wholes[1]
    orders = []
    for epoch in range(two_processes.EPOCHS):
        batches = [
            batches[epoch * two_processes.BATCHES : (epoch + 1) * two_processes.BATCHES]
            for batches in wholes
        ]
        orders.append(list(chain.from_iterable(chain.from_iterable(batches))))
        assert sorted(orders[-1]) == list(range(two_processes.SAMPLES))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.slow
@pytest.mark.no_core
@pytest.mark.parametrize("stop", two_processes.STOPS)
def test_two_processes_that_are_resumed_have_the_samples_that_are_left(
    ranks: list[Any], stop: int
) -> None:
    for found in ranks:
        assert found["resumed"][str(stop)] == found["whole"][stop:]
