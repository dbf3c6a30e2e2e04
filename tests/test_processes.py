"""Processes that agree, as processes: by gloo, by MPI and by JAX."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agreement_on_processes as program
from frameworks import needed
from processes import run_by, run_on_processes

pytestmark = [pytest.mark.no_core, pytest.mark.real]
TORCHRUN = [*(sys.executable, "-m", "torch.distributed.run"), "--standalone", "--nproc-per-node=2"]


def found_by(kind: str, folder: Path, count: int) -> list[Any]:
    outcomes = run_on_processes("agreement_on_processes.py", folder, count, kind, limit=300)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
    return [outcome.found for outcome in outcomes]


def by_gloo(folder: Path, count: int) -> list[Any]:
    needed("torch")
    return found_by("gloo", folder, count)


def by_jax(folder: Path, count: int) -> list[Any]:
    needed("jax")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    return found_by("jax", folder, count)


def by_mpi(folder: Path, count: int) -> list[Any]:
    needed("mpi4py")
    # As root too, as in a container, and on a machine with fewer cores
    options = ["--allow-run-as-root", "--oversubscribe", "-n", str(count)]
    launcher = ["mpirun", *options, sys.executable]
    return run_by(launcher, "agreement_on_processes.py", folder, count, "mpi")


def by_accelerate(folder: Path, count: int) -> list[Any]:
    needed("accelerate")
    return run_by(TORCHRUN, "agreement_on_processes.py", folder, count, "accelerate")


def by_fabric(folder: Path, count: int) -> list[Any]:
    needed("lightning")
    return run_by(TORCHRUN, "agreement_on_processes.py", folder, count, "fabric")


GROUPS: dict[str, tuple[Callable[[Path, int], list[Any]], int]] = {
    "4 by gloo": (by_gloo, 4),
    "2 by MPI": (by_mpi, 2),
    "2 by JAX": (by_jax, 2),
    "2 that Accelerate has set up": (by_accelerate, 2),
    "2 that Fabric has set up": (by_fabric, 2),
}


@pytest.fixture(scope="module", params=GROUPS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank of a group has found."""
    run, count = GROUPS[request.param]
    return run(tmp_path_factory.mktemp("ranks"), count)


END = "LoopEvents.EPOCH_END"
EXPECTED: dict[str, list[Any]] = {
    "sigterm_to_one": [
        [0, 19, ["LoopEvents.INTERRUPT", "LoopEvents.TRAINING_END"]],
        *("SIGTERM", 19, 19),
    ],
    "loader_of_a_library": [
        *([0, 7, ["Save"]], [0, 11, [END]], [1, 23, [END]]),
        *([2, 27, ["Save"]], [2, 35, [END]], [3, 43, ["LoopEvents.TRAINING_END"]]),
        *("stop", 43),
    ],
    "without_sync": [True],
}


def test_what_differs_is_named_on_all(ranks: list[Any]) -> None:
    for found in ranks:
        assert "differ in global_step (0 to 3)" in found["other_step"][0]


@pytest.mark.parametrize("scenario", program.SCENARIOS)
def test_all_ranks_have_the_same_trace(ranks: list[Any], scenario: str) -> None:
    traces = [found[scenario] for found in ranks]
    assert traces[0]
    assert [trace for trace in traces if trace != traces[0]] == []
    assert traces[0] == EXPECTED.get(scenario, traces[0])


def test_timers_come_to_all(ranks: list[Any]) -> None:
    for scenario in ("one_slow_rank", "resumed"):
        assert "Save" in str(ranks[0][scenario])
    assert ranks[0]["max_seconds"][-3] == "max_seconds"


def test_random_plans_are_many(ranks: list[Any]) -> None:
    plans = ranks[0]["random_plans"]
    assert len(plans) == program.RANDOM_PLANS
    assert {plan[-3] for plan in plans} == {"max_epochs", "max_steps", "max_seconds", "stop"}


class Demo:
    """`dloop.demo.distributed` in two processes, with a checkpoint in `folder`."""

    def __init__(self, folder: Path) -> None:
        options = ["--epochs", "30", "--seconds", "0.2", "--checkpoint", str(folder / "digits.pt")]
        self._errors = folder / "errors"  # PyTorch may warn at the end
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                [*TORCHRUN, "-m", "dloop.demo.distributed", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdout is not None
        self.lines = iter(self._process.stdout.readline, "")

    def rest(self) -> list[str]:
        """What it still prints, once it has ended."""
        try:
            lines = list(self.lines)
            assert self._process.wait(60) == 0, self._errors.read_text()
        finally:
            self._process.kill()
            self._process.communicate()
        return lines


def test_the_demo_that_is_interrupted_comes_to_the_same_weights(tmp_path: Path) -> None:
    needed("torch")
    needed("sklearn")
    (tmp_path / "whole").mkdir()
    *_, evaluated, _checkpoint, whole = Demo(tmp_path / "whole").rest()
    assert re.match(r"step  1349 .* accuracy 0\.9", evaluated)
    assert whole.startswith("done after step 1349: weights ")
    stopped = Demo(tmp_path)
    output = ""
    for line in stopped.lines:
        output += line
        if "checkpoint" in line:
            break
    # Lines of the two may stand in one
    (process,) = re.findall(r"rank 1 is process (\d+)", output)
    os.kill(int(process), signal.SIGTERM)  # to one of the two
    assert stopped.rest()[-1].startswith("stopped by a signal after step")
    assert Demo(tmp_path).rest()[-1] == whole


@pytest.mark.parametrize("way", ["raises", "killed"])
def test_one_that_fails_ends_the_others(way: str, tmp_path: Path) -> None:
    needed("torch")
    begun = time.monotonic()
    outcomes = run_on_processes("agreement_on_processes.py", tmp_path, 3, "gloo", way, limit=60)
    assert time.monotonic() - begun < 60
    *others, failed = outcomes
    assert failed.code != 0
    for other in others:
        assert other.code == 0, other.output
        error, step = other.found
        assert error != "no error"
        assert 12 <= step <= 20
