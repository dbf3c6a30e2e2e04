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
        self.check("%colors nocolor")
        self.check("from waiting_sources import *")
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
            message = self.client.get_iopub_msg(timeout=8)
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
        end = time.monotonic() + 8
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
    "unseeded" + kind: f"DataLoader(Numbers(place, at), batch_size=2, shuffle=True{workers})"
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
    warned: str  # on stderr, when it ran again
    bars: list[int | None]  # the totals of the progress bars


def run_twice(
    notebook: Notebook,
    core: str,
    folder: Path,
    source: str,
    action: str,
    *,
    step: int,
    at: int = -1,
    group: bool = True,
    over: str = "loop",
) -> Run:
    """Run a cell over two epochs of `source` that is interrupted, and once more.

    After `step` its body does `action`: it waits to be interrupted, or lets the source do so.
    """
    notebook.check(f"""
place, at = Place({str(folder)!r}), {at}
with use_core({core!r}):
    loop = Loop({source}, max_epochs=2)
batches, left, ends, bars = [], [], [], []
if {step} < 0: place.{action}()
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
        place.{action}()
"""
    interrupted = notebook.run_until_interrupted(cell, folder, group=group)
    assert interrupted.error == "KeyboardInterrupt: ", interrupted
    first = notebook.value("len(batches)")
    warned = notebook.check(cell).warned
    assert notebook.value("loop.stop_reason") == "max_epochs"
    return Run(
        first,
        notebook.value("batches"),
        notebook.value("left"),
        notebook.value("ends"),
        warned,
        notebook.value("bars"),
    )


@functools.cache
def expected(notebook: Notebook, source: str) -> list[list[int]]:
    """The batches of two epochs."""
    notebook.check("place, at = Place('nowhere'), -1")
    batches: list[list[int]] = notebook.value(f"plain_for({source})")
    return batches


def check_each_once(notebook: Notebook, source: str, run: Run) -> None:
    """Every batch has come once, in order, and `len(loop)` and the epochs' ends were right."""
    whole = expected(notebook, source)
    assert run.batches == whole
    assert run.ends == [len(whole) // 2 - 1, len(whole) - 1]
    if source in SIZED:
        assert run.left == list(range(len(whole)))[::-1]


@pytest.mark.parametrize("step", [0, STEPS - 1, STEPS + 2])
@pytest.mark.parametrize(("source", "group"), interrupts(LIST | GENERATOR | ORDERED | SEEDED | ITERABLE))
def test_after_an_interrupt_in_the_body_every_batch_comes_once(
    notebook: Notebook, core: str, source: str, group: bool, step: int, tmp_path: Path
) -> None:
    run = run_twice(notebook, core, tmp_path, source, "wait_now", step=step, group=group)
    check_each_once(notebook, source, run)


@pytest.mark.parametrize(
    ("step", "at"),
    [(-1, 0), (-1, 5), (STEPS - 1, SAMPLES - 1)],
    ids=["first", "within the first epoch", "in the second epoch"],
)
@pytest.mark.parametrize(("source", "group"), interrupts(GENERATOR | ORDERED | SEEDED | ITERABLE))
def test_after_an_interrupt_in_a_fetch_every_batch_comes_once(
    notebook: Notebook, core: str, source: str, group: bool, step: int, at: int, tmp_path: Path
) -> None:
    run = run_twice(notebook, core, tmp_path, source, "arm", step=step, at=at, group=group)
    check_each_once(notebook, source, run)


BARS = LIST | GENERATOR | ORDERED


@pytest.mark.parametrize(
    ("name", "action"),
    [
        (name, action)
        for name in ("list", "generator function", "DataLoader", "DataLoader, 2 workers")
        for action in ("wait_now", "arm")
        if (name, action) != ("list", "arm")
    ],
)
def test_a_progress_bar_around_the_loop_goes_on_with_what_is_left(
    notebook: Notebook, core: str, name: str, action: str, tmp_path: Path
) -> None:
    source = BARS[name]
    run = run_twice(notebook, core, tmp_path, source, action, step=1, at=7, over="tqdm(loop)")
    check_each_once(notebook, source, run)
    if name == "generator function":
        assert run.bars == [None, None]
    else:
        assert run.bars == [2 * STEPS, 2 * STEPS - run.first]


@pytest.mark.parametrize("action", ["wait_now", "arm"])
@pytest.mark.parametrize(("source", "group"), interrupts(UNSEEDED))
def test_a_shuffle_without_a_seed_is_warned_of_where_the_epoch_was_opened_anew(
    notebook: Notebook, core: str, source: str, group: bool, action: str, tmp_path: Path
) -> None:
    run = run_twice(notebook, core, tmp_path, source, action, step=1, at=5, group=group)
