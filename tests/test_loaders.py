"""dloop and the loaders that people have agree: ends, orders of epochs, resumes, interrupts."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents, StateError
from frameworks import needed
from loaders import (
    LOADERS,
    SAMPLES,
    Accelerated,
    Loader,
    accelerated,
    of_torch,
    plain,
    samples,
)
from programs import program, run_until
from told import warnings_of, with_warnings

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::dloop.LoopWarning"),  # they have tests of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # workers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Lightning under PyTorch 2.13
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the same
]
EVENTS = {"Every": Event(every_n_steps=3), "End": Event(at_step=3) | LoopEvents.EPOCH_END}
Step = tuple[Any, ...]


def made(loader: Any, folder: Path, **arguments: Any) -> Loop[Any]:
    """A loop over a loader that is built anew, as a restarted program builds it."""
    if isinstance(loader, Accelerated):
        return Loop(loader(folder)[1], EVENTS, **{"max_epochs": 3, **arguments})
    return Loop(loader(folder), EVENTS, **{**loader.arguments, **arguments})


def stored(loader: Any, loop: Loop[Any], step_done: bool = True) -> Any:
    """The loop's state as it comes back from where it was kept."""
    state = loop.state_dict(step_done)
    keeps_json = not isinstance(loader, Loader) or loader.json
    return json.loads(json.dumps(state)) if keeps_json else copy.deepcopy(state)


def steps_of(loop: Loop[Any], most: int | None = None) -> Iterator[Step]:
    for batch, events in islice(loop, most):
        yield plain(batch), loop.epoch, loop.epoch_step, frozenset(events)


def run(
    loader: Any, folder: Path, stops: Iterable[int] = (), done: bool = True, closed: bool = False
) -> list[Step]:
    """The steps of a run that ends after each of `stops`, and resumes with all built anew.

    Its state is taken in the body, or once the loop is `closed`; the step is `done`, or not.
    """
    steps: list[Step] = []
    state = None
    for stop in [*stops, None]:
        loop = made(loader, folder)
        if state is not None:
            loop.load_state_dict(state)
        with loop:
            for step in steps_of(loop, None if stop is None else stop - len(steps)):
                steps.append(step)
            if not closed:
                state = stored(loader, loop, done)
        if closed:
            state = stored(loader, loop, done)
        if stop is not None and not done:
            del steps[-1]
    return steps


def epochs_of(steps: Iterable[Step]) -> list[list[int]]:
    """The samples of each epoch."""
    epochs: dict[int, list[int]] = {}
    for batch, epoch, *_ in steps:
        epochs.setdefault(epoch, []).extend(samples(batch))
    return list(epochs.values())


each_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))


# Every loader


@each_loader
def test_a_run_has_the_epochs_of_a_plain_for(loader: Loader, tmp_path: Path) -> None:
    steps = run(loader, tmp_path)
    epochs = epochs_of(steps)
    assert [len(epoch) for epoch in epochs] == [SAMPLES] * 3
    assert [len(set(epoch)) for epoch in epochs] == [SAMPLES] * 3
    assert not loader.shuffles or epochs[0] != epochs[1] != epochs[2] != epochs[0]
    lasts = [number for number, step in enumerate(steps, 1) if LoopEvents.EPOCH_END in step[3]]
    assert lasts == [len(steps) // 3 * number for number in (1, 2, 3)]
    source = loader(tmp_path)
    batches = source() if callable(source) and not hasattr(source, "__iter__") else source
    first = [plain(batch) for batch in islice(batches, len(steps) // 3)]
    assert first == [step[0] for step in steps[: len(steps) // 3]]


@each_loader
def test_a_resumed_run_is_the_uninterrupted_one(loader: Loader, tmp_path: Path) -> None:
    whole = run(loader, tmp_path)
    n = len(whole) // 3
    ways = [[n + 1, n + 3], [n, 2 * n, 3 * n]] + [list(range(1, 3 * n + 1))] * (not loader.workers)
    for stops in ways:
        assert run(loader, tmp_path, stops) == whole, stops
    assert run(loader, tmp_path, [n - 1, n + 2], done=False) == whole
    assert run(loader, tmp_path, [2, n + 2], closed=True) == whole


@pytest.mark.parametrize("name", [name for name in LOADERS if not LOADERS[name].workers])
def test_lists_lookahead_and_state_files_change_nothing(name: str, tmp_path: Path) -> None:
    loader = LOADERS[name]
    whole = run(loader, tmp_path)
    file = tmp_path / "state.json"
    found: list[Any] = []
    with made(loader, tmp_path, state_file=file) as loop:
        for batches, _ in islice(loop.chunks(3), 3):
            found += map(plain, batches)
        if not loader.json:
            with pytest.raises(StateError, match=r"state\['loader'\]"):
                loop.save_state()
            return
        loop.save_state()
    with made(loader, tmp_path, state_file=file) as loop:
        found += [plain(batch) for batches, _ in loop.chunks((2, 1)) for batch in batches]
    assert found == [step[0] for step in whole]
    if "dataloader_len" not in loader.arguments:
        assert list(steps_of(made(loader, tmp_path, lookahead=True))) == whole


# Arrays, tables, Lightning's CombinedLoader


@pytest.mark.parametrize("library", ["numpy", "jax.numpy", "mlx.core", "torch", "h5py"])
def test_rows_of_arrays_are_resumed_without_a_word(library: str, tmp_path: Path) -> None:
    needed(library.partition(".")[0])
    module = __import__(library, fromlist=["arange"])
    if library == "h5py":
        file = module.File(tmp_path / "rows.h5", "w")
        file["rows"] = [[2 * row, 2 * row + 1] for row in range(5)]
        rows = file["rows"]
    else:
        rows = module.arange(10).reshape(5, 2)
    kind = Loader(lambda _: rows)
    whole, warned = with_warnings(lambda: run(kind, tmp_path, [1, 4, 5, 7]))
    assert [step[0] for step in whole] == [[2 * row, 2 * row + 1] for row in range(5)] * 3
    assert warned == []


TABLES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "pandas": ("DataFrame", "itertuples", lambda frame: frame.itertuples(index=False, name=None)),
    "polars": ("DataFrame", "iter_slices", lambda frame: frame.iter_rows()),
    "pyarrow": ("table", "to_batches", lambda table: map(dict.values, table.to_pylist())),
}


@pytest.mark.parametrize("library", TABLES)
def test_a_table_is_refused_and_its_rows_are_taken(library: str) -> None:
    needed(library)
    make, advice, rows = TABLES[library]
    table = getattr(__import__(library), make)({"a": [0, 1, 2], "b": [0, 1, 4]})
    with pytest.raises(TypeError, match=f"^dataloader=.*{advice}"):
        Loop(table, max_epochs=1)
    loop = Loop(lambda: rows(table), max_epochs=2)
    assert [tuple(row) for row, _ in loop] == [(0, 0), (1, 1), (2, 4)] * 2


def combined(mode: str) -> Callable[[], Any]:
    def build() -> Any:
        from lightning.pytorch.utilities import CombinedLoader

        import torch_data

        short, long = torch_data.shuffling(range(6)), torch_data.shuffling(range(10, 20))
        return CombinedLoader({"short": short, "nested": [long]}, mode)  # type: ignore[arg-type]

    return build


def of_datasets(load: str) -> Callable[[], Any]:
    def build() -> Any:
        from torch.utils.data import ConcatDataset, DataLoader, StackDataset

        import torch_data

        halves = torch_data.Rotating(range(5)), torch_data.Rotating(range(10, 15))
        if load == "StackDataset":
            return DataLoader(StackDataset(**dict(zip("ab", halves))), batch_size=2)  # type: ignore[arg-type]
        return DataLoader(ConcatDataset(halves), batch_size=2)

    return build


NESTED = {
    **{mode: combined(mode) for mode in ("min_size", "max_size_cycle", "max_size", "sequential")},
    **{load: of_datasets(load) for load in ("ConcatDataset", "StackDataset")},
}


@pytest.mark.parametrize("name", NESTED)
def test_set_epoch_reaches_the_parts_of_nested_loaders(name: str, tmp_path: Path) -> None:
    needed("torch")
    needed("lightning")
    loader = Loader(lambda _: NESTED[name]())
    whole = run(loader, tmp_path)
    n = len(whole) // 3
    epochs = [[repr(step[0]) for step in whole[k * n :][:n]] for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sum(LoopEvents.EPOCH_END in step[3] for step in whole) == 3
    for stops in ([1, n + 2], [n, 2 * n + 1]):
        assert run(loader, tmp_path, stops) == whole


# PyTorch: another batch size, and another number of processes


def of_rank(rank: int, ranks: int, samples: int, batch_size: int, drop_last: bool) -> Any:
    from torch.utils.data import DataLoader, DistributedSampler

    numbers: Any = range(samples)
    sampler: Any = DistributedSampler(numbers, ranks, rank, drop_last=drop_last)
    return DataLoader(numbers, batch_size=batch_size, sampler=sampler)


def seen_by(ranks: int, done: int | None, state: Any, *arguments: Any) -> tuple[list[int], Any]:
    """The samples that all ranks see in so many steps from a state on, and the state of rank 0."""
    seen: list[int] = []
    states = []
    for rank in range(ranks):
        loop = Loop(of_rank(rank, ranks, *arguments), max_epochs=2)
        if state is not None:
            loop.load_state_dict(state)
        for batch, _ in islice(loop, done):
            seen += plain(batch)
        states.append(loop.state_dict())
    return seen, states[0]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("ranks", "then"), [(4, 2), (2, 4)])
@pytest.mark.parametrize(("size", "size_then"), [(3, 3), (3, 6), (2, 8), (5, 1)])
def test_on_another_number_of_processes_each_sample_comes_once(
    ranks: int, then: int, size: int, size_then: int, drop_last: bool
) -> None:
    needed("torch")
    samples = 103
    unit, unit_then = ranks * size, then * size_then
    of_each = samples // ranks if drop_last else -(-samples // ranks)
    whole = -(-of_each // size)
    for done in range(1, samples // unit, 2):
        again = done * unit % unit_then
        first, state = seen_by(ranks, whole + done, None, samples, size, drop_last)
        rest, _ = seen_by(then, None, state, samples, size_then, drop_last)
        second = first[:]
        for rank in range(ranks):  # the first epoch is complete
            loader = of_rank(rank, ranks, samples, size, drop_last)
            for batch in loader:
                for sample in plain(batch):
                    second.remove(sample)
        counts = [(second + rest).count(sample) for sample in range(samples)]
        padding = -samples % then
        if drop_last:
            assert sum(counts) - again == samples - samples % then
            assert max(counts) <= 1 + (again > 0)
        else:
            assert min(counts) == 1
            assert sum(counts) - again == samples + padding


@pytest.mark.parametrize("shuffle", [False, True])
def test_another_batch_size_continues_at_the_same_sample(shuffle: bool) -> None:
    needed("torch")
    build = {size: of_torch(shuffle=shuffle, batch_size=size).build for size in (1, 2, 5)}
    folder = Path()
    for before, now in ((1, 2), (2, 1), (1, 5), (5, 1)):
        done = 5 // before if before < 5 else 1
        loop = Loop(build[before](folder), max_epochs=1)
        seen = [number for batch, _ in islice(loop, done) for number in plain(batch)]
        again = Loop(build[now](folder), max_epochs=1)
        again.load_state_dict(loop.state_dict())
        seen += [number for batch, _ in again for number in plain(batch)]
        reached = done * before // now * now
        whole = [number for batch in build[1](folder) for number in plain(batch)]
        assert seen == whole[: done * before] + whole[reached:]


@pytest.mark.parametrize("stateful", [True, False])
def test_other_orders_continue_at_the_same_batch_and_warn(stateful: bool) -> None:
    """A loader with a state of its own, and an iterable-style data set."""
    kind = of_torch(None if stateful else "Stream", stateful=stateful, batch_size=2)
    loop = Loop(kind(Path()), max_epochs=1)
    next(iter(loop))
    again = Loop(
        of_torch(None if stateful else "Stream", stateful=stateful, batch_size=1)(Path()),
        max_epochs=1,
    )
    (warned,) = warnings_of(lambda: again.load_state_dict(loop.state_dict()))
    assert "a step takes 1 samples and not 2 as before" in warned
    assert again.epoch_step == 0


# PyTorch: orders that cannot repeat, and ranks


def shuffled(sampler: str, seeded: bool) -> Any:
    import torch.utils.data as data

    import torch_data

    generator = torch_data.seeded() if seeded else None
    if sampler == "shuffle":
        return data.DataLoader(range(10), batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
    arguments: Any = ([1.0] * 10, 10) if sampler.startswith("Weighted") else (range(10),)
    chosen = getattr(data, sampler)(*arguments, generator=generator)
    return data.DataLoader(range(10), batch_sampler=data.BatchSampler(chosen, 2, False))  # type: ignore[arg-type]


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("sampler", ["shuffle", "SubsetRandomSampler", "WeightedRandomSampler"])
def test_an_order_that_cannot_repeat_is_warned_of(sampler: str, seeded: bool) -> None:
    needed("torch")
    for done, repeats in ((3, seeded), (5, True), (7, False)):
        loop = Loop(shuffled(sampler, seeded), max_epochs=2)
        for _ in islice(loop, done):
            pass
        state, early = with_warnings(loop.state_dict)
        again = Loop(shuffled(sampler, seeded), max_epochs=2)
        again.load_state_dict(state)
        late = warnings_of(lambda: list(again))  # noqa: B023
        assert [len(early), len(late)] == [not repeats] * 2
        assert all("set_epoch" in text for text in early + late)


# Accelerate

ACCELERATED = accelerated(
    {
        "map-style": of_torch(batch_size=1),
        "iterable-style": of_torch("Stream", batch_size=1),
        "iterable-style with a state": of_torch("ResetStream", batch_size=1),
        "seedable sampler": of_torch(shuffle=True, batch_size=1),
        "sampler with set_epoch": of_torch(sampler="Shuffled", batch_size=1),
    }
)
each_accelerated = pytest.mark.parametrize("kind", ACCELERATED.values(), ids=list(ACCELERATED))


class Training:
    """A model that is trained with an Accelerator, step by step, by some kind of loop."""

    def __init__(self, kind: Accelerated, folder: Path) -> None:
        import torch

        self.accelerator, self.loader = kind(folder)
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.steps: list[Step] = []

    def step(self, batch: Any) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(batch[:, None] / SAMPLES).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
        synced, weight = self.accelerator.sync_gradients, self.model.weight.item()
        self.steps.append((batch.tolist(), *self.of_loader(), synced, weight))

    def of_loader(self) -> Step:
        """What the loader says, and how many are being iterated."""
        loader, references = self.loader, self.accelerator.gradient_state.dataloader_references
        return loader.end_of_dataloader, loader.remainder, loader.iteration, len(references)


@each_accelerated
def test_accelerate_sees_what_it_sees_in_a_plain_for(kind: Accelerated, tmp_path: Path) -> None:
    for_loop = Training(kind, tmp_path)
    for _ in range(2):
        for batch in for_loop.loader:
            for_loop.step(batch)
    for limit in ({"max_epochs": 2}, {"max_steps": 20}, {"stop_when": Event(at_step=19)}):
        training = Training(kind, tmp_path)
        loop = Loop(training.loader, **limit)  # type: ignore[arg-type]
        ends = []
        for batch, events in loop:
            training.step(batch)
            ends += [loop.epoch_step] * (LoopEvents.EPOCH_END in events)
        assert training.steps == for_loop.steps
        assert training.of_loader() == for_loop.of_loader()
        assert ends == [9, 9]
    assert [step[5] for step in for_loop.steps[:10]] == [
        number in (3, 7, 9) for number in range(10)
    ]


@each_accelerated
def test_an_accelerated_loader_resumes_from_every_step(kind: Accelerated, tmp_path: Path) -> None:
    whole = run(kind, tmp_path)
    assert [sorted(epoch) for epoch in epochs_of(whole)] == [[*range(SAMPLES)]] * 3
    assert run(kind, tmp_path, range(1, 31)) == whole
    for stop in range(1, 31, 2):
        assert run(kind, tmp_path, [stop], closed=stop % 3 == 0) == whole, stop


@pytest.mark.parametrize("name", ["map-style", "seedable sampler, stateful"])
def test_accelerates_checkpoints_keep_a_registered_run(name: str, tmp_path: Path) -> None:
    first = Training(ACCELERATED[name], tmp_path)
    loop = Loop(first.loader, max_epochs=3)
    first.accelerator.register_for_checkpointing(loop)
    stops = [4, 10, 14, 20]  # at updates, since gradients are in no checkpoint
    for batch, _ in loop:
        first.step(batch)
        if loop.steps_done in stops:
            first.accelerator.save_state(str(tmp_path / str(loop.steps_done)))
    for stop in stops:
        second = Training(ACCELERATED[name], tmp_path)
        loop = Loop(second.loader, max_epochs=3)
        second.accelerator.register_for_checkpointing(loop)
        second.accelerator.load_state(str(tmp_path / str(stop)))
        for batch, _ in loop:
            second.step(batch)
        assert second.steps == first.steps[stop:]


# Interrupts and signals, which a terminal or a batch system sends to the workers too


@pytest.mark.parametrize("at", [0, 3, 4, 9])
@pytest.mark.parametrize("kind", ["loader", "callable", "accelerated", "accelerated, dispatched"])
def test_ctrl_c_in_a_fetch_loses_no_batch(kind: str, at: int, tmp_path: Path) -> None:
    """Without workers the iterator holds a generator, which an exception ends."""
    needed("torch")
    from torch.utils.data import DataLoader

    from torch_data import InterruptedStream

    loader: Any = DataLoader(InterruptedStream(SAMPLES, at), batch_size=2)
    if kind.startswith("accelerated"):
        dispatched = {"dispatch_batches": "dispatched" in kind}
        loader = Accelerated(Loader(lambda _: loader), dispatched)(tmp_path)[1]
    loop: Loop[Any] = Loop((lambda: loader) if kind == "callable" else loader, max_epochs=2)
    found: list[Step] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(steps_of(loop))
    found += steps_of(loop)
    assert epochs_of(found) == [[*range(SAMPLES)]] * 2
    assert [step[2] for step in found if LoopEvents.EPOCH_END in step[3]] == [4, 4]


SLEEPY = """
import torch.utils.data

class Sleepy:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(0.02)
        return index

def sleepy(workers, persistent=False):
    context = "fork" if workers else None
    return torch.utils.data.DataLoader(
        Sleepy(), num_workers=workers, multiprocessing_context=context,
        persistent_workers=persistent)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""


def run_program(core: str, code: str, *sent: int, group: bool) -> tuple[list[str], int, str]:
    needed("torch")
    return run_until(program(core, SLEEPY + textwrap.dedent(code)), *sent, group=group)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=["INT", "TERM"])
def test_a_signal_has_its_last_step(core: str, number: int, group: bool, workers: int) -> None:
    """If it kills the workers, PyTorch raises in a body or a fetch; that has a last step, too."""
    code = f"""
    with Loop(sleepy({workers}), max_epochs=1, signals=SIGNALS, on_exception="event") as loop:
        for batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                say("checkpoint", "after an exception")
                os._exit(7)
            with loop.guard():
                if LoopEvents.INTERRUPT in events:
                    say("checkpoint", loop.global_step)
                    os._exit(7)
                if loop.global_step == 9:
                    say("now")
                    while not loop.stop_requested:
                        time.sleep(0.01)
    """
    lines, exit_code, errors = run_program(core, code, number, group=group)
    kills = number == SIGTERM and group and workers
    assert lines[-1] == "checkpoint 10" or (kills and "checkpoint" in lines[-1]), errors
    assert exit_code == 7, errors


@pytest.mark.parametrize(
    ("workers", "persistent", "at"), [(0, False, 10), (2, False, 10), (2, True, 10), (2, True, 24)]
)
@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
def test_a_loop_that_ctrl_c_left_has_every_batch(
    core: str, workers: int, persistent: bool, at: int, group: bool
) -> None:
    """As in a notebook; one that a terminal sends to the whole group kills the workers too."""
    code = f"""
    loop = Loop(sleepy({workers}, {persistent}), max_epochs=2)
    seen = []
    def cell():
        for batch, events in loop:
            seen.append(batch.item())
            if len(seen) == {at}:
                say("now")
                time.sleep(10)
    try:
        cell()
    except KeyboardInterrupt:
        say("interrupted", loop.stop_reason)
        time.sleep(0.2)
    cell()
    say("each once", seen == [*range(24)] * 2, loop.stop_reason)
    """
    lines, exit_code, errors = run_program(core, code, SIGINT, group=group)
    assert lines == ["interrupted None", "each once True max_epochs"], errors
    assert exit_code == 0, errors
