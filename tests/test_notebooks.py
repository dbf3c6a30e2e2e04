"""Cells of a notebook that are interrupted and run again, in a real kernel."""

from __future__ import annotations

import ast
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dloop
from frameworks import needed
from loaders import SAMPLES

pytestmark = pytest.mark.slow

STEPS = SAMPLES // 2  # in an epoch

IMPORTS = """
%colors nocolor
import gc
import os
import warnings
from operator import length_hint

from torch.utils.data import DataLoader
from tqdm import tqdm

import dloop
from cores import use_core
from dloop import Loop, LoopEvents
from waiting_sources import SAMPLES, Numbers, Place, Shuffled, WaitingStream
from waiting_sources import end_workers, numbers, plain, plain_for

gc.disable()  # the tests say when: PyTorch takes 10 s for an iterator that the collector frees
warnings.simplefilter("always")
"""


class Output(NamedTuple):
    """What a cell has printed, and the error that ended it."""

    printed: str
    warned: str  # on stderr
    error: str
    traceback: str


class Notebook:
    """A kernel that runs cells."""

    def __init__(self, folder: Path) -> None:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(connection_file=str(folder / "kernel.json"))
        environment = {"PYTHONPATH": "tests:.", "IPYTHONDIR": str(folder / "ipython")}
        self.manager.start_kernel(env={**os.environ, **environment})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.busy = False
        self.check(IMPORTS)
        assert self.value("dloop.__file__") == dloop.__file__
        self.process = self.value("os.getpid()")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def start(self, code: str) -> str:
        """Let a cell run, and return its number."""
        self.busy = True
        number: str = self.client.execute(code)
        return number

    def output(self, cell: str) -> Output:
        """Wait for the end of a cell."""
        printed, warned, error, traceback = "", "", "", ""
        while True:
            message = self.client.get_iopub_msg(timeout=30)
            content = message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                printed += content["text"]
            elif message["msg_type"] == "stream":
                warned += content["text"]
            elif message["msg_type"] == "error":
                error = f"{content['ename']}: {content['evalue']}"
                traceback = "\n".join(content["traceback"])
            elif content == {"execution_state": "idle"}:
                self.busy = False
                return Output(printed, warned, error, traceback)

    def check(self, code: str) -> Output:
        """Run a cell that has to succeed."""
        output = self.output(self.start(code))
        assert not output.error, output.traceback
        return output

    def value(self, expression: str) -> Any:
        """The value of an expression: numbers, strings, lists of them."""
        return ast.literal_eval(self.check(f"print(repr({expression}))").printed)

    def run_until_interrupted(self, code: str, folder: Path, *, group: bool) -> Output:
        """Run a cell, and interrupt it where it waits: all processes, or the kernel's alone."""
        cell = self.start(code)
        end = time.monotonic() + 30
        while not (folder / "waiting").exists():
            assert time.monotonic() < end, "the cell does not come where it is to wait"
            time.sleep(0.005)
        if group:
            self.manager.interrupt_kernel()
        else:
            os.kill(self.process, signal.SIGINT)
        output = self.output(cell)
        (folder / "left").touch()
        return output


@pytest.fixture(scope="module")
def kernels() -> Iterator[list[Notebook]]:
    """All tests share one kernel; one that leaves it busy lets the next have another."""
    for module in ("jupyter_client", "ipykernel", "torch", "tqdm"):
        needed(module)
    kernels: list[Notebook] = []
    yield kernels
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def notebook(
    kernels: list[Notebook], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Notebook]:
    if not kernels:
        kernels.append(Notebook(tmp_path_factory.mktemp("kernel")))
    yield kernels[0]
    if kernels[0].busy:
        kernels.pop().close()
    else:
        kernels[0].check("end_workers(); gc.collect()")


WORKERS = {
    "": "",
    ", 2 workers": ", num_workers=2",
    ", persistent workers": ", num_workers=2, persistent_workers=True",
}
LIST = {"list": "list(numbers(place, at))"}
GENERATOR = {"generator function": "lambda: numbers(place, at)"}
ORDERED = {
    "DataLoader" + kind: f"DataLoader(Numbers(place, at), batch_size=2{workers})"
    for kind, workers in WORKERS.items()
}
SEEDED = {
    "seeded" + kind: f"DataLoader(Numbers(place, at), 2, sampler=Shuffled(SAMPLES){workers})"
    for kind, workers in WORKERS.items()
}
ITERABLE = {
    "iterable-style" + kind: f"DataLoader(WaitingStream(place, at), batch_size=2{workers})"
    for kind, workers in WORKERS.items()
}
UNSEEDED = {
    "unseeded" + kind: f"DataLoader(Numbers(place, None), batch_size=2, shuffle=True{workers})"
    for kind, workers in WORKERS.items()
}
SIZED = {*LIST.values(), *ORDERED.values(), *SEEDED.values(), *UNSEEDED.values()}


def interrupts(sources: dict[str, str]) -> list[Any]:
    """Each source, with all processes interrupted; if it has workers, also the kernel's alone."""
    return [
        pytest.param(source, group, id=name if group else name + ", kernel alone")
        for name, source in sources.items()
        for group in ([True, False] if "workers" in source else [True])
    ]


class Run(NamedTuple):
    """What the cell has noted in each step, and more."""

    first: int  # the steps before the interrupt
    batches: list[list[int]]
    left: list[int]  # len(loop)
    ends: list[int]  # the steps with EPOCH_END
    bars: list[int | None]  # the totals of the progress bars
    warned: str  # on stderr, when it ran again


def interrupted(
    notebook: Notebook,
    core: str,
    folder: Path,
    arguments: str,
    action: str,
    *,
    step: int = -1,
    at: int | None = None,
    group: bool = True,
    over: str = "loop",
) -> str:
    """Run a cell over a loop with these arguments, interrupt it once, and return the cell.

    After `step` it does `action`: it waits to be interrupted, or lets the source do so.
    """
    notebook.check(f"""
batches, left, ends, bars = [], [], [], []
place, at = Place({str(folder)!r}), {at}
with use_core({core!r}):
    loop = Loop({arguments})
if {step} < 0:
    {action}
""")
    cell = f"""
bar = {over}
bars.append(getattr(bar, "total", None))
for batch, events in bar:
    batches.append(plain(batch))
    left.append(length_hint(loop, -1))
    if LoopEvents.EPOCH_END in events:
        ends.append(loop.global_step)
    if loop.global_step == {step}:
        {action}
"""
    output = notebook.run_until_interrupted(cell, folder, group=group)
    # IPython cannot show the error if PyTorch notices meanwhile that its workers have ended.
    assert output.error == "KeyboardInterrupt: " or "KeyboardInterrupt" in output.warned, output
    if group:
        notebook.check("end_workers(within=0.5)")
    return cell


def run_twice(
    notebook: Notebook, core: str, folder: Path, source: str, action: str, **options: Any
) -> Run:
    """Run a cell over two epochs of `source` that is interrupted, and run it again to the end."""
    cell = interrupted(notebook, core, folder, f"{source}, max_epochs=2", action, **options)
    first = notebook.value("len(batches)")
    warned = notebook.check(cell).warned
    assert notebook.value("loop.stop_reason") == "max_epochs"
    batches, left, ends, bars = notebook.value("(batches, left, ends, bars)")
    return Run(first, batches, left, ends, bars, warned)


@functools.cache
def expected(notebook: Notebook, source: str) -> list[list[int]]:
    """The batches of two epochs in a plain `for`."""
    notebook.check("place, at = Place('nowhere'), -1")
    batches: list[list[int]] = notebook.value(f"plain_for({source})")
    return batches


def check_each_once(notebook: Notebook, source: str, run: Run) -> None:
    """Every batch has come once, in order, with the right ends and lengths, without a warning."""
    whole = expected(notebook, source)
    assert run.batches == whole
    check_counts(source, run, len(whole))
    assert "LoopWarning" not in run.warned


def check_counts(source: str, run: Run, steps: int) -> None:
    assert len(run.batches) == steps
    assert run.ends == [steps // 2 - 1, steps - 1]
    if source in SIZED:
        assert run.left == list(range(steps))[::-1]


WAIT = "place.wait()"


@pytest.mark.parametrize("step", [0, STEPS - 1, STEPS + 2])
@pytest.mark.parametrize(
    ("source", "group"), interrupts(LIST | GENERATOR | ORDERED | SEEDED | ITERABLE)
)
def test_after_an_interrupt_in_the_body_every_batch_comes_once(
    notebook: Notebook, core: str, source: str, group: bool, step: int, tmp_path: Path
) -> None:
    run = run_twice(notebook, core, tmp_path, source, WAIT, step=step, group=group)
    assert run.first == step + 1
    check_each_once(notebook, source, run)


def fetch(notebook: Notebook, source: str, step: int, at: int) -> int:
    """How many batches are handed over before the one with the sample `at`, fetched after `step`.

    One less where the loop looks ahead.
    """
    whole = expected(notebook, source)
    epoch = 0 if step < 0 else len(whole) // 2
    place = epoch + next(i for i, batch in enumerate(whole[epoch:]) if at in batch)
    return place if source in SIZED else max(place - 1, 0)


@pytest.mark.parametrize(
    ("step", "at"),
    [(-1, 0), (-1, 5), (STEPS - 1, SAMPLES - 1)],
    ids=["of the first batch", "in the first epoch", "in the second epoch"],
)
@pytest.mark.parametrize(("source", "group"), interrupts(GENERATOR | ORDERED | SEEDED | ITERABLE))
def test_after_an_interrupt_in_a_fetch_every_batch_comes_once(
    notebook: Notebook, core: str, source: str, group: bool, step: int, at: int, tmp_path: Path
) -> None:
    first = fetch(notebook, source, step, at)
    arm = f"place.arm(batches, {first})"
    run = run_twice(notebook, core, tmp_path, source, arm, step=step, at=at, group=group)
    assert run.first == first
    check_each_once(notebook, source, run)


@pytest.mark.parametrize(("source", "group"), interrupts(UNSEEDED))
def test_after_an_interrupt_in_the_body_a_shuffle_without_a_seed_goes_on_or_is_warned_of(
    notebook: Notebook, core: str, source: str, group: bool, tmp_path: Path
) -> None:
    run = run_twice(notebook, core, tmp_path, source, WAIT, step=1, group=group)
    check_counts(source, run, 2 * STEPS)
    if group and "workers" in source:  # they have ended
        assert "LoopWarning" in run.warned
        assert "order" in run.warned
    else:
        assert "LoopWarning" not in run.warned
        for epoch in (run.batches[:STEPS], run.batches[STEPS:]):
            assert sorted(number for batch in epoch for number in batch) == list(range(SAMPLES))


@pytest.mark.parametrize(("source", "group"), interrupts(UNSEEDED))
def test_after_an_interrupt_in_a_fetch_a_shuffle_without_a_seed_is_warned_of(
    notebook: Notebook, core: str, source: str, group: bool, tmp_path: Path
) -> None:
    first = 4 if "workers" in source else 2
    arm = f"place.arm(batches, {first})"
    run = run_twice(notebook, core, tmp_path, source, arm, group=group)
    assert run.first == first
    check_counts(source, run, 2 * STEPS)
    assert "LoopWarning" in run.warned
    assert "order" in run.warned


@pytest.mark.parametrize("where", ["body", "fetch"])
@pytest.mark.parametrize("source", [*GENERATOR.values(), *ORDERED.values()])
def test_a_progress_bar_around_the_loop_goes_on_with_what_is_left(
    notebook: Notebook, core: str, source: str, where: str, tmp_path: Path
) -> None:
    first = 2 if where == "body" else fetch(notebook, source, -1, 9)
    action = WAIT if where == "body" else f"place.arm(batches, {first})"
    step = 1 if where == "body" else -1
    run = run_twice(notebook, core, tmp_path, source, action, step=step, at=9, over="tqdm(loop)")
    check_each_once(notebook, source, run)
    known = source in SIZED
    assert run.bars == ([2 * STEPS, 2 * STEPS - first] if known else [None, None])


def test_a_generator_that_an_interrupt_has_ended_is_told_of_with_what_to_do(
    notebook: Notebook, core: str, tmp_path: Path
) -> None:
    source = "numbers(place, at), max_steps=5"
    cell = interrupted(notebook, core, tmp_path, source, "place.arm(batches, 2)", at=5)
    again = notebook.output(notebook.start(cell))
    assert again.error.startswith("LoopError")
    assert "callable" in again.error
    assert notebook.value("batches") == [[0, 1], [2, 3]]


def test_a_bar_is_shown_and_closed_and_another_one_after_an_interrupt(
    notebook: Notebook, core: str, tmp_path: Path
) -> None:
    source = "list(numbers(place, at)), max_epochs=2, progress=True"
    cell = interrupted(notebook, core, tmp_path, source, WAIT, step=3)
    again = notebook.check(cell)
    steps = 2 * STEPS
    assert f" {steps}/{steps} " in again.printed + again.warned
    assert "epoch 1" in again.printed + again.warned
    assert notebook.value("loop.progress.bar") is None


def test_drawings_are_what_a_cell_shows(notebook: Notebook, core: str) -> None:
    notebook.check(f"""
from dloop import Event
with use_core({core!r}):
    loop = Loop(range(9), {{"Log": Event(every_n_steps=3)}}, max_epochs=1, profile=True)
for batch, events in loop:
    pass
""")
    for shown in ("loop.plan()", "loop.profile"):
        format_of = f"get_ipython().display_formatter.format({shown})[0]"
        html = notebook.value(f"{format_of}['text/html']")
        assert html.startswith("<svg")
