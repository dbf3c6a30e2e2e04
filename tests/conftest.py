"""Fixtures; `core` runs every test with both cores."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings

from cores import CORES, use_core

# No deadline, since a busy machine is slow. No explain phase, since our messages say more. CI
# always runs the same examples, so that a failure there is due to the change.
settings.register_profile(
    "default",
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    derandomize=bool(os.environ.get("CI")),
)
settings.register_profile(
    "first",
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    derandomize=True,
)
settings.load_profile(os.environ.get("DLOOP_HYPOTHESIS", "default"))


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
