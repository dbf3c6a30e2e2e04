"""Exact resume with the loaders that people have: of PyTorch, Grain, Hugging Face and others."""

from __future__ import annotations

import copy
import json
import logging
import signal
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dloop import Event, Loop, LoopEvents, LoopWarning, StateError, loader_state
from frameworks import needed
from loaders import LIGHT, LOADERS, SAMPLES, WITH_WORKERS, Loader, batches, of_torch
from programs import program, run_until

pytestmark = [
    pytest.mark.filterwarnings("ignore::dloop.LoopWarning"),  # they have tests of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # workers
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the same
]

EVENTS = {
    "Every": Event(every_n_steps=3),
    "Second": Event(at_step=1, per_epoch=True),
    "End": Event(at_step=3) | LoopEvents.EPOCH_END,
}


class Step(NamedTuple):
    batch: Any
    epoch: int
    global_step: int
    epoch_step: int
    names: frozenset[object]


def plain(batch: Any) -> Any:
    """The batch as lists and numbers."""
    if hasattr(batch, "tolist"):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(each) for each in batch] if isinstance(batch, (list, tuple)) else batch


def samples(batch: Any) -> list[int]:
    """The numbers in a plain batch."""
    if isinstance(batch, int):
        return [batch]
    values = batch.values() if isinstance(batch, dict) else batch
    return [number for value in values for number in samples(value)]


def by_epoch(steps: Iterable[Step]) -> list[list[Any]]:
    epochs: dict[int, list[Any]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).append(step.batch)
    return list(epochs.values())


def stored(state: Any, loader: Loader) -> Any:
    """The state as it comes back from where it was kept: nothing of the old loader is in it."""
    return json.loads(json.dumps(state)) if loader.json else copy.deepcopy(state)


def a_loop(loader: Loader, folder: Path, **arguments: Any) -> Loop[Any]:
    return Loop(loader(folder), events=EVENTS, **{**loader.arguments, **arguments})


def a_run(
    loader: Loader,
    folder: Path,
    stops: Iterable[int] = (),
    *,
    step_done: bool = True,
    closed: bool = False,
    **arguments: Any,
) -> list[Step]:
    """The steps of a run that is left after each of `stops` and goes on with all built anew.

    Its state is taken in the body, or once the loop is `closed`.
    """
    steps: list[Step] = []
    state = None
    for stop in [*stops, None]:
        loop = a_loop(loader, folder, **arguments)
        if state is not None:
            loop.load_state_dict(state)
        with loop:
            for batch, events in loop:
                at = loop.state
                counters = at.epoch, at.global_step, at.epoch_step
                steps.append(Step(plain(batch), *counters, frozenset(events)))
                if len(steps) == stop:
                    if not closed:
                        state = stored(loop.state_dict(step_done=step_done), loader)
                    break
        if closed:
            state = stored(loop.state_dict(step_done=step_done), loader)
        if stop is not None:
            assert len(steps) == stop, "the run ended before it was to be interrupted"
            if not step_done:
                del steps[-1]
    return steps


# After which steps a run of 3 epochs of n steps is interrupted.
INTERRUPTIONS: dict[str, Callable[[int], Iterable[int]]] = {
    "within an epoch": lambda n: [2],
    "before an epoch's last step": lambda n: [n - 1, 3 * n - 1],
    "twice in one epoch": lambda n: [n + 1, n + 3],
    "at the epochs' ends": lambda n: [n, 2 * n, 3 * n],
    "at every step": lambda n: range(1, 3 * n + 1),
}


def cases(names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(LOADERS[name], lookahead, id=f"{name}, lookahead={lookahead}")
        for name in names
        for lookahead in LOADERS[name].lookaheads
    ]


def check_interrupted(loader: Loader, folder: Path, where: str, lookahead: bool | None) -> None:
    whole = a_run(loader, folder, lookahead=lookahead)
    stops = INTERRUPTIONS[where](len(by_epoch(whole)[0]))
    assert a_run(loader, folder, stops, lookahead=lookahead) == whole


@pytest.mark.parametrize("where", INTERRUPTIONS)
@pytest.mark.parametrize(("loader", "lookahead"), cases(LIGHT))
def test_an_interrupted_run_is_the_uninterrupted_one(
    loader: Loader, lookahead: bool | None, where: str, tmp_path: Path
) -> None:
    check_interrupted(loader, tmp_path, where, lookahead)


@pytest.mark.no_core
@pytest.mark.parametrize("where", ["twice in one epoch", "at every step"])
@pytest.mark.parametrize(
    ("loader", "lookahead"),
    # where one of the workers has ended, a state in which its part is reset begins it again
    cases(name for name in LOADERS if "reset, 2 workers" not in name),
)
def test_a_state_of_a_resumed_loader_is_right_once_all_workers_have_given_a_batch(
    loader: Loader,
    lookahead: bool | None,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Epochs are too short here for the number of batches after which it is taken to be so."""
    monkeypatch.setattr(loader_state, "MOST_AGAIN", 3)
    check_interrupted(loader, tmp_path, where, lookahead)


@pytest.mark.no_core
@pytest.mark.slow
@pytest.mark.parametrize("where", ["twice in one epoch", "at the epochs' ends", "at every step"])
@pytest.mark.parametrize(("loader", "lookahead"), cases(WITH_WORKERS))
def test_an_interrupted_run_with_workers_is_the_uninterrupted_one(
    loader: Loader, lookahead: bool | None, where: str, tmp_path: Path
) -> None:
    check_interrupted(loader, tmp_path, where, lookahead)


@pytest.mark.no_core
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(
    loader: Loader, tmp_path: Path
) -> None:
    steps = a_run(loader, tmp_path, [2, 7, 8, 15])
    epochs = [[number for batch in epoch for number in samples(batch)] for epoch in by_epoch(steps)]
    assert [len(epoch) for epoch in epochs] == [SAMPLES] * 3
    assert [len(set(epoch)) for epoch in epochs] == [SAMPLES] * 3
    if loader.shuffles:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_share_out_every_sample_wherever_they_are_interrupted(rank: int) -> None:
    needed("torch")
    from torch.utils.data import DataLoader, DistributedSampler

    def build(rank: int) -> Loader:
        numbers = range(2 * SAMPLES)
        return Loader(
            lambda _: DataLoader(
                numbers,  # type: ignore[arg-type]
                sampler=DistributedSampler(numbers, num_replicas=2, rank=rank),  # type: ignore[arg-type]
                batch_size=2,
            )
        )

    interrupted = by_epoch(a_run(build(rank), Path(), [3, 6, 9]))
    other = by_epoch(a_run(build(1 - rank), Path()))
    for ours, theirs in zip(interrupted, other, strict=True):
        assert sorted(samples([ours, theirs])) == list(range(2 * SAMPLES))


@pytest.mark.parametrize("where", ["within an epoch", "twice in one epoch", "at the epochs' ends"])
@pytest.mark.parametrize(("loader", "lookahead"), cases(LIGHT))
def test_a_step_that_was_not_done_comes_again(
    loader: Loader, lookahead: bool | None, where: str, tmp_path: Path
) -> None:
    whole = a_run(loader, tmp_path, lookahead=lookahead)
    stops = INTERRUPTIONS[where](len(by_epoch(whole)[0]))
    assert a_run(loader, tmp_path, stops, step_done=False, lookahead=lookahead) == whole


@pytest.mark.parametrize("step_done", [True, False])
@pytest.mark.parametrize("where", ["within an epoch", "at the epochs' ends"])
@pytest.mark.parametrize(("loader", "lookahead"), cases(LIGHT))
def test_the_state_of_a_loop_that_was_closed(
    loader: Loader, lookahead: bool | None, where: str, step_done: bool, tmp_path: Path
) -> None:
    whole = a_run(loader, tmp_path, lookahead=lookahead)
    stops = INTERRUPTIONS[where](len(by_epoch(whole)[0]))
    found = a_run(loader, tmp_path, stops, step_done=step_done, closed=True, lookahead=lookahead)
    assert found == whole


@pytest.mark.parametrize(("loader", "lookahead"), cases(LIGHT))
def test_saving_at_every_step_changes_nothing(
    loader: Loader, lookahead: bool | None, tmp_path: Path
) -> None:
    found = []
    loop = a_loop(loader, tmp_path, lookahead=lookahead)
    loop.state_dict()
    with loop:
        for batch, _ in loop:
            loop.state_dict()
            found.append(plain(batch))
            loop.state_dict(step_done=False)
    assert found == [step.batch for step in a_run(loader, tmp_path, lookahead=lookahead)]


@pytest.mark.parametrize("sizes", [3, (2, 1)], ids=str)
@pytest.mark.parametrize(("loader", "lookahead"), cases(LIGHT))
def test_lists_of_batches_go_on_where_the_last_list_ended(
    loader: Loader, lookahead: bool | None, sizes: Any, tmp_path: Path
) -> None:
    whole = [step.batch for step in a_run(loader, tmp_path, lookahead=lookahead)]
    for stop in (1, 2, 3):
        found: list[Any] = []
        with a_loop(loader, tmp_path, lookahead=lookahead) as loop:
            for lists, (chunk, _) in enumerate(loop.chunks(sizes), start=1):
                found += plain(chunk)
                if lists == stop:
                    state = stored(loop.state_dict(), loader)
                    break
        loop = a_loop(loader, tmp_path, lookahead=lookahead)
        loop.load_state_dict(state)
        with loop:
            for chunk, _ in loop.chunks(sizes):
                found += plain(chunk)
        assert found == whole


@pytest.mark.parametrize("loader", [LOADERS[name] for name in LIGHT], ids=LIGHT)
def test_a_state_made_before_the_first_step_or_at_once_after_loading_is_as_good(
    loader: Loader, tmp_path: Path
) -> None:
    whole = [step.batch for step in a_run(loader, tmp_path)]
    for done in (0, 3, len(whole) // 3, len(whole)):
        loop = a_loop(loader, tmp_path)
        with loop:
            for number, _ in enumerate(loop if done else (), start=1):
                if number == done:
                    break
            state = stored(loop.state_dict(), loader)
        for _ in range(2):  # loaded and saved again, without a step
            loop = a_loop(loader, tmp_path)
            loop.load_state_dict(state)
            state = stored(loop.state_dict(), loader)
        loop = a_loop(loader, tmp_path)
        loop.load_state_dict(state)
        with loop:
            assert [plain(batch) for batch, _ in loop] == whole[done:]


# What is read and said at a resume


class Noted(list[int]):
    """A map-style data set that notes which samples are read."""

    def __init__(self) -> None:
        super().__init__(range(SAMPLES))
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def resumed_at(step: int, build: Callable[[], Any]) -> Loop[Any]:
    """A loop over a new loader that goes on after `step` steps."""
    loop = Loop(build(), max_epochs=2)
    with loop:
        for _ in loop:
            if loop.state.steps_done == step:
                state = copy.deepcopy(loop.state_dict())
                break
    loop = Loop(build(), max_epochs=2)
    loop.load_state_dict(state)
    return loop


def test_a_loader_with_a_state_reads_only_what_is_left() -> None:
    needed("torchdata")
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = Noted()
    loop = resumed_at(3, lambda: StatefulDataLoader(data, batch_size=2))
    data.read.clear()
    next(iter(loop))
    assert data.read == [6, 7]


def test_the_rows_of_an_array_are_set_forward_without_a_word() -> None:
    needed("numpy")
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = resumed_at(7, lambda: np.arange(SAMPLES).reshape(-1, 2))
        assert [plain(batch) for batch, _ in loop] == list(batches())[2:]


def told(loop: Loop[Any]) -> list[str]:
    """What the loop warns of when its first batch is asked for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoopWarning)
        with loop:
            list(loop)
    return [str(each.message) for each in caught if each.category is LoopWarning]


def test_batches_that_are_fetched_only_to_be_dropped_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    needed("torch")
    from torch.utils.data import DataLoader

    for steps, logged in ((3, True), (5, False)):
        caplog.clear()
        loop = resumed_at(steps, lambda: DataLoader(range(SAMPLES), batch_size=2))  # type: ignore[arg-type]
        with caplog.at_level(logging.INFO, "dloop"):
            assert told(loop) == []
        assert [text[:34] for text in caplog.messages] == [
            "epoch 0: 3 batches were fetched an"
        ] * logged


def test_a_shuffle_without_a_seed_is_told_of() -> None:
    needed("torch")
    from torch.utils.data import DataLoader

    texts = told(resumed_at(3, lambda: DataLoader(range(SAMPLES), batch_size=2, shuffle=True)))  # type: ignore[arg-type]
    assert "shuffle" in " ".join(texts)
    assert "3" in " ".join(texts)


def test_a_seeded_generator_gives_the_rest_of_the_first_epoch() -> None:
    """In later epochs it cannot: built anew, the generator begins with the first epoch's order."""
    needed("torch")
    from torch.utils.data import DataLoader

    import torch_data

    def build(_: Path) -> Any:
        return DataLoader(
            range(SAMPLES),  # type: ignore[arg-type]
            batch_size=2,
            shuffle=True,
            generator=torch_data.seeded(),
        )

    loader = Loader(build, arguments={"max_epochs": 1})
    whole = a_run(loader, Path())
    for stop in range(1, SAMPLES // 2):
        assert a_run(loader, Path(), [stop]) == whole


# Signals, which a terminal or a batch system sends to the workers too

SLEEPY = """
import torch.utils.data

class Sleepy:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.02)
        return index

def sleepy(workers):
    context = "fork" if workers else None
    return torch.utils.data.DataLoader(
        Sleepy(), num_workers=workers, multiprocessing_context=context
    )

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""


def run_with_torch(
    core: str, code: str, *sent: signal.Signals, group: bool
) -> tuple[list[str], int, str]:
    needed("torch")
    process = program(core, SLEEPY + textwrap.dedent(code))
    return run_until(process, *sent, group=group)


@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        (number, group, workers)
        for number in (signal.SIGINT, signal.SIGTERM)
        for group in (False, True)
        for workers in (0, 2)
        if (number, group, workers) != (signal.SIGTERM, True, 2)  # has the next test
    ],
)
def test_a_signal_in_a_body_has_its_last_step(
    core: str, number: signal.Signals, group: bool, workers: int
) -> None:
    code = f"""
    loop = Loop(sleepy({workers}), max_epochs=1, signals=SIGNALS)
    for batch, events in loop:
        if loop.global_step == 9:
            say("now")
            while not loop.stop_requested:
                time.sleep(0.01)
        if LoopEvents.INTERRUPT in events:
            say("checkpoint", batch.item(), loop.stop_reason)
            sys.exit(7)
    """
    lines, exit_code, errors = run_with_torch(core, code, number, group=group)
    assert lines == [f"checkpoint 10 {number.name}"], errors
    assert exit_code == 7, errors


def test_a_signal_that_kills_the_workers_has_its_last_step_too(core: str) -> None:
    code = """
    loop = Loop(sleepy(2), max_epochs=1, signals=SIGNALS, on_exception="event")
    for batch, events in loop:
        if LoopEvents.INTERRUPT in events:
            say("checkpoint", loop.global_step)
            sys.exit(7)
        with loop.guard():  # PyTorch raises in the body, too
            if loop.global_step == 9:
                say("now")
                while not loop.stop_requested:
                    time.sleep(0.01)
    """
    lines, exit_code, errors = run_with_torch(core, code, signal.SIGTERM, group=True)
    assert lines in (["checkpoint 9"], ["checkpoint 10"]), errors
    assert exit_code == 7, errors


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_in_a_sleeping_loader_has_its_last_step(
    core: str, number: signal.Signals, workers: int
) -> None:
    code = f"""
    loop = Loop(sleepy({workers}), max_epochs=1, signals=SIGNALS)
    for batch, events in loop:
        if loop.global_step == 9:
            say("now")  # and on to the next fetch, in which it sleeps for 20 ms
        if LoopEvents.INTERRUPT in events:
            say("checkpoint", loop.stop_reason)
            sys.exit(7)
    """
    lines, exit_code, errors = run_with_torch(core, code, number, group=False)
    assert lines == [f"checkpoint {number.name}"], errors
    assert exit_code == 7, errors


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_comes_out_of_a_sleeping_loader(core: str, workers: int) -> None:
    code = f"""
    loop = Loop(sleepy({workers}), max_epochs=1)
    try:
        for batch, events in loop:
            if loop.global_step == 9:
                say("now")
    except KeyboardInterrupt:
        say("interrupted", loop.global_step >= 9, loop.stop_reason)
    """
    lines, exit_code, errors = run_with_torch(core, code, signal.SIGINT, group=False)
    assert lines == ["interrupted True None"], errors
    assert exit_code == 0, errors


CELL = """
    seen = []
    def cell():
        for batch, events in loop:
            seen.append(batch.item())
            if len(seen) == 10:
                say("now")
                time.sleep(10)
    try:
        cell()
    except KeyboardInterrupt:
        say("interrupted", loop.stop_reason)
    cell()
    say("each once", seen == [*range(40)], loop.stop_reason)
"""


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_after_ctrl_c_in_the_body_a_loop_that_is_entered_again_has_every_batch(
    core: str, workers: int, group: bool
) -> None:
    """As in a notebook; one that a terminal sends to the whole group kills the workers too."""
    code = f"    loop = Loop(sleepy({workers}), max_epochs=1)\n" + CELL
    lines, exit_code, errors = run_with_torch(core, code, signal.SIGINT, group=group)
    assert lines == ["interrupted None", "each once True max_epochs"], errors
    assert exit_code == 0, errors


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("at", [0, 3, 4, 9])
@pytest.mark.parametrize("called", [False, True])
def test_ctrl_c_in_a_stream_loses_no_batch(called: bool, at: int, lookahead: bool | None) -> None:
    """Without workers its iterator holds a generator, which an exception ends."""
    needed("torch")
    from torch.utils.data import DataLoader

    from torch_data import InterruptedStream

    loader = DataLoader(InterruptedStream(SAMPLES, at), batch_size=2)
    loop = Loop((lambda: loader) if called else loader, max_epochs=2, lookahead=lookahead)
    seen: list[Any] = []
    ends: list[int] = []

    def cell() -> None:
        for batch, events in loop:
            seen.extend(plain(batch))
            ends.extend([loop.global_step] * (LoopEvents.EPOCH_END in events))

    with pytest.raises(KeyboardInterrupt):
        cell()
    cell()
    assert seen == [*range(SAMPLES)] * 2
    assert ends == [4, 9]


# The state in a file


@pytest.mark.parametrize("loader", [LOADERS[name] for name in LIGHT], ids=LIGHT)
def test_a_state_file_takes_the_loaders_state_or_names_what_json_cannot_hold(
    loader: Loader, tmp_path: Path
) -> None:
    whole = [step.batch for step in a_run(loader, tmp_path)]
    file = tmp_path / "state.json"
    with a_loop(loader, tmp_path, state_file=file) as loop:
        for _ in loop:
            if loop.state.steps_done == 7:
                break
        if not loader.json:
            with pytest.raises(StateError):
                loop.save_state()
            assert list(tmp_path.glob("*state*")) == []
            return
        loop.save_state()
    with a_loop(loader, tmp_path, state_file=file) as loop:
        assert [plain(batch) for batch, _ in loop] == whole[7:]


def test_the_error_names_the_key_that_json_cannot_hold(tmp_path: Path) -> None:
    loader = of_torch(sampler="RandomSampler", stateful=True)
    with a_loop(loader, tmp_path, state_file=tmp_path / "state.json") as loop:
        for _ in loop:
            with pytest.raises(StateError, match="generator"):
                loop.save_state()
            break
