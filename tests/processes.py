"""A program of several processes on this machine, each of which reports what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    "OMP_NUM_THREADS": "1",
}


class Outcome(NamedTuple):
    """How a process ended.

    Attributes:
        code: its exit code.
        output: what it has printed.
        found: what it gave to `report`; None if it did not come to that.
    """

    code: int
    output: str
    found: Any


def run_on_processes(
    program: str, folder: Path, count: int, *arguments: str, limit: float = 120
) -> list[Outcome]:
    """Run a program of this folder in so many processes, for `limit` seconds at most."""
    command = [sys.executable, str(TESTS / program), str(folder), *arguments]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    outcomes = []
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=limit)
            file = folder / f"{rank}.json"
            found = json.loads(file.read_text()) if file.exists() else None
            outcomes.append(Outcome(process.returncode, output, found))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outcomes


def run_by(
    launcher: list[str], program: str, folder: Path, count: int, *arguments: str
) -> list[Any]:
    """What each process of a program of this folder reports, by rank; `launcher` starts them."""
    done = subprocess.run(
        [*launcher, str(TESTS / program), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def report(found: Any) -> None:
    """Called in a process, once it has found something."""
    rank = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
