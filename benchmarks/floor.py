"""Compiles floor.c as a Python extension, once in each process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SETUP = """
import sys
from setuptools import Extension, setup

folder = sys.argv[1]
build = ["build_ext", "--build-lib", folder, "--build-temp", folder]
setup(name="floor", ext_modules=[Extension("floor", ["floor.c"])], script_args=build)
"""


@cache
def compiled() -> Any:
    """The module with Floor and FloorWithClock; SystemExit if it cannot be compiled."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", SETUP, folder],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise SystemExit(f"benchmarks/floor.c needs setuptools and a C compiler: {reason}")
        (file,) = [path for path in Path(folder).iterdir() if path.suffix in (".so", ".pyd")]
        spec: Any = importlib.util.spec_from_file_location("floor", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
