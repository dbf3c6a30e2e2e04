"""Everything public is documented, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import dloop
from cores import CORES, use_core
from dloop import _backend, sync
from dloop.plan import Plan, PlanRow
from dloop.profile import Profile
from dloop.progress import Progress

PUBLIC = [name for name in dloop.__all__ if not name.isupper() and name != "sync"]
FOUND: list[Any] = [Plan, PlanRow, Profile, Progress, sync.maximum]
"""What users get from public names; the other functions of `dloop.sync` need packages."""
SYNCS = ("torch_distributed", "mpi", "jax_processes", "maximum")


def public_things() -> Iterator[Any]:
    yield from (getattr(dloop, name) for name in PUBLIC if name != "LoopState")
    yield _backend.core.LoopState
    yield from FOUND


def test_everything_public_has_a_docstring() -> None:
    for thing in (*public_things(), sync, *(getattr(sync, name) for name in SYNCS)):
        text = inspect.getdoc(thing) or ""
        assert text and thing.__doc__, thing
        for name, member in vars(thing).items() if isinstance(thing, type) else ():
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member) or f"{name}:" in text, f"{thing}.{name}"


@pytest.mark.parametrize("name", [*PUBLIC, *(thing.__name__ for thing in FOUND)])
def test_the_examples_of_a_docstring_run(name: str) -> None:
    (thing,) = {each for each in public_things() if each.__name__ == name}
    tests = doctest.DocTestFinder().find(thing, name, module=False)
    assert sum(len(test.examples) for test in tests) > 0
    with warnings.catch_warnings():  # one of the examples changes the filters
        for test in tests:
            assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.no_core
def test_both_cores_have_the_same_loop_state() -> None:
    found = []
    for core in CORES:
        with use_core(core):
            state = _backend.core.LoopState
            found.append((inspect.getdoc(state), [each for each in dir(state) if each[0] != "_"]))
    assert found[0] == found[-1]
