"""Everything public is documented, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import warnings

import pytest

import dloop

PUBLIC = [name for name in dloop.__all__ if not name.isupper()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_members_have_docstrings(name: str) -> None:
    thing = getattr(dloop, name)
    assert vars(thing)["__doc__"]
    for member, value in vars(thing).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            documented = inspect.getdoc(value) or f"{member}:" in (inspect.getdoc(thing) or "")
            assert documented, f"{name}.{member}"


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"LoopState"}))
def test_the_examples_of_a_docstring_run(name: str) -> None:
    with warnings.catch_warnings():  # one of the examples changes the filters
        run_examples(getattr(dloop, name), name)


def test_the_examples_of_loop_state_run(core: str) -> None:
    module = {"cython": "dloop._core", "python": "dloop._core_py"}[core]
    run_examples(importlib.import_module(module).LoopState, "LoopState")


def run_examples(documented: type, name: str) -> None:
    tests = doctest.DocTestFinder().find(documented, name, module=False)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
