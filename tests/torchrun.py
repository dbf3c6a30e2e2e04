"""Programs that torchrun starts in two processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def run_on_two_processes(program: str, folder: Path, *arguments: str) -> list[Any]:
    """What each of the two processes of a program in `tests` gives to `report`, by rank."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(TESTS / program), str(folder), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.terminate()  # ends the two processes, too
        process.wait()
    assert process.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def report(found: Any) -> None:
    """Called in both of the processes, as the last thing that the program does.

    A process group that is not destroyed can abort a process that exits.
    """
    import torch.distributed

    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
