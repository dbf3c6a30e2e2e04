"""Frameworks that some tests need, and how a test asks for one."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needed(module: str) -> None:
    """Skip the test where `module` is missing; where DLOOP_REQUIRE_FRAMEWORKS=1, fail."""
    if importlib.util.find_spec(module) is None:
        text = f"{module} is not installed"
        pytest.fail(text) if os.environ.get("DLOOP_REQUIRE_FRAMEWORKS") == "1" else None
        pytest.skip(text)
