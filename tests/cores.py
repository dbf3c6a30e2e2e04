"""The cores that the tests run with, and a context that chooses one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import dloop._backend as backend
import dloop._core_py as core_py

# `both`, the default, fails if the compiled core is missing.
ASKED = os.environ.get("DLOOP_TEST_CORES", "both")
CORES = {"both": ["cython", "python"], "cython": ["cython"], "python": ["python"]}[ASKED]


@contextmanager
def use_core(name: str) -> Iterator[None]:
    """Loops that are created inside use the core `name`."""
    before = backend.core
    if name == "python":
        backend.core = core_py
    else:
        import dloop._core as core_c

        backend.core = core_c
    try:
        yield
    finally:
        backend.core = before
