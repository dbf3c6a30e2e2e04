"""Plant memory errors in a copy of the compiled core: the sanitizers have to report each.

Run `python -m memory_faults` in this folder, with CFLAGS and LDFLAGS that build with sanitizers,
and their libraries preloaded. It fails if an error is not reported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
START = "from dloop import Event, Loop, BACKEND; assert BACKEND == 'cython', BACKEND\n"


class Fault(NamedTuple):
    """`old` is replaced by `new`; the program then fails with a report that contains `report`."""

    old: str
    new: str
    program: str
    report: str


FAULTS = [
    Fault(
        "PyMem_Realloc(self.heap, room * sizeof(Entry))",
        "PyMem_Realloc(self.heap, (room - 1) * sizeof(Entry))",
        "Loop('a', {n: Event(every_n_steps=1) for n in range(8)}, max_epochs=1)",
        "heap-buffer-overflow",
    ),
    Fault(
        "            Py_DECREF(batch)\n",
        "            Py_DECREF(batch); Py_DECREF(batch)\n",
        "for batch, events in Loop((object() for _ in range(9)), max_steps=9): hash(batch)",
        "heap-use-after-free",
    ),
    Fault(
        "if self.period >= self.stop - step else",
        "if self.period >= self.stop + step else",
        "list(Loop('abc', {'e': Event(every_n_steps=2)}, max_epochs=1))",
        "signed integer overflow",
    ),
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "dloop", copy / "dloop", ignore=shutil.ignore_patterns("*.so"))
        core = copy / "dloop/_core.pyx"
        text = core.read_text(encoding="utf-8")
        for fault in FAULTS:
            assert text.count(fault.old) == 1, fault.old
            text = text.replace(fault.old, fault.new)
        core.write_text(text, encoding="utf-8")
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        preloaded = {
            "LD_PRELOAD": "",
            "DLOOP_REQUIRE_EXTENSION": "1",
        }  # the compiler runs without the sanitizers
        subprocess.run(build, cwd=copy, env={**os.environ, **preloaded}, check=True)
        for fault in FAULTS:
            done = subprocess.run(
                [sys.executable, "-c", START + fault.program],
                cwd=copy,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0 or fault.report not in done.stderr:
                raise SystemExit(f"not reported: {fault.report}\n{done.stdout}{done.stderr}")
            print(f"reported: {fault.report}")


if __name__ == "__main__":
    main()
