"""Fixtures; `core` runs every test with both cores."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from cores import CORES, use_core

# No deadline, since a busy machine is slow. No explain phase, since our messages say more. The same
# examples always, so that a failure is due to a change; `--examples` hunts for others.
ALWAYS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": set(Phase) - {Phase.explain},
}
settings.register_profile("default", **ALWAYS, derandomize=True, max_examples=200)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, help="hunt: so many random examples for each test")


def pytest_configure(config: pytest.Config) -> None:
    examples = config.getoption("--examples", None)
    if examples is not None:
        settings.register_profile(
            "hunt", **ALWAYS, derandomize=False, max_examples=examples, print_blob=True
        )
    settings.load_profile("default" if examples is None else "hunt")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("no_core") is None:
        metafunc.parametrize("core", CORES, indirect=True)


@pytest.fixture(autouse=True)
def core(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The core that the test's loops use; None in a test that is marked `no_core`."""
    name: str | None = getattr(request, "param", None)
    if name is None:
        yield None
        return
    with use_core(name):
        yield name


@pytest.fixture(scope="module")
def small_collections() -> Iterator[None]:
    """Collections look at what the module makes alone, not at thousands of tests and reports."""
    if not hasattr(gc, "freeze"):  # PyPy has none
        yield
        return
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector does not run during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Turn PyPy's JIT off: compiled code keeps objects alive."""
    if sys.implementation.name != "pypy":
        yield
        return
    compiler = importlib.import_module("pypyjit")
    compiler.set_param(threshold=-1, function_threshold=-1, trace_eagerness=-1)
    yield
    compiler.set_param("default")
