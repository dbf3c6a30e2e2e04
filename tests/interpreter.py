"""What tests need of the interpreter."""

from __future__ import annotations

import sys

import pytest

CPYTHON = sys.implementation.name == "cpython"

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

needs_few_points = pytest.mark.skipif(
    not CPYTHON, reason="PyPy handles a signal between any two bytecodes"
)
needs_reference_counts = pytest.mark.skipif(not CPYTHON, reason="needs reference counts")
counts_blocks = pytest.mark.skipif(
    not CPYTHON or not HAS_GIL, reason="without the GIL, blocks of memory are freed later"
)
