"""Lightning's CombinedLoader: it has `__next__`, but `iter()` lets it begin again."""

from __future__ import annotations

from typing import Any

import pytest

from dloop import Loop, LoopEvents
from frameworks import needed

pytestmark = [
    pytest.mark.slow,  # to import lightning is
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning's, of PyTorch 2.13
]

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]


def combined(mode: str) -> Any:
    needed("lightning")
    from lightning.pytorch.utilities import CombinedLoader

    return CombinedLoader({"short": [0, 1, 2], "long": [10, 11, 12, 13, 14]}, mode)  # type: ignore[arg-type]


def in_plain_for(mode: str, epochs: int) -> list[list[Any]]:
    loader = combined(mode)
    return [list(loader) for _ in range(epochs)]


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("mode", MODES)
def test_its_epochs_are_those_of_a_plain_for(mode: str, lookahead: bool | None) -> None:
    batches: list[list[Any]] = [[], [], []]
    ends = []
    loop = Loop(combined(mode), max_epochs=3, lookahead=lookahead)
    for batch, events in loop:
        batches[loop.epoch].append(batch)
        if LoopEvents.EPOCH_END in events:
            ends.append(loop.state.epoch_step + 1)
    assert batches == in_plain_for(mode, 3)
    assert ends == [len(epoch) for epoch in batches]
    assert loop.stop_reason == "max_epochs"


@pytest.mark.parametrize("mode", MODES)
def test_max_steps_takes_batches_across_its_epochs(mode: str) -> None:
    first, second, third = in_plain_for(mode, 3)
    loop = Loop(combined(mode), max_steps=len(first + second) + 1)
    steps = [(batch, LoopEvents.EPOCH_END in events) for batch, events in loop]
    assert [batch for batch, _ in steps] == first + second + third[:1]
    assert [place for place, (_, ends) in enumerate(steps, 1) if ends] == [
        len(first),
        len(first + second),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_loader_that_was_used_before_begins_again(mode: str) -> None:
    loader = combined(mode)
    next(iter(loader))
    first, second = in_plain_for(mode, 2)
    assert [batch for batch, _ in Loop(loader, max_epochs=2)] == first + second


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_gives_the_rest(mode: str) -> None:
    first, second = in_plain_for(mode, 2)
    whole = first + second
    for done in range(1, len(whole) + 1):
        loop = Loop(combined(mode), max_epochs=2)
        for _ in loop:
            if loop.state.steps_done == done:
                break
        resumed = Loop(combined(mode), max_epochs=2)
        resumed.load_state_dict(loop.state_dict())
        assert [batch for batch, _ in resumed] == whole[done:]
