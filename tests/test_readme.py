"""Every block of code in the README runs, and shows what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from dloop import Event, Loop
from frameworks import needed

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
CODE = [block for language, block in BLOCKS if language == "python"]
# What needs a framework has a test of its own
PYTHON = [block for block in CODE if "import jax" not in block]
JAX = [block for block in CODE if "import jax" in block]


def names() -> dict[str, Any]:
    """What the README takes for granted: a dataloader, and a user's own functions."""
    user = [
        *("backward", "log", "lower_learning_rate", "save", "update_parameters", "validate"),
        *("checkpoint_exists", "model", "read_checkpoint", "write_checkpoint"),
    ]
    mocks = {name: MagicMock() for name in user}
    mocks["checkpoint_exists"].return_value = False
    return mocks | {"dataloader": range(5000)}


def test_blocks_are_of_a_kind_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "console"}
    assert len(PYTHON) > 4


def test_code_runs() -> None:
    scope = names()
    for block in PYTHON:
        if ">>>" not in block:
            exec(compile(block, str(README), "exec"), scope)
    assert scope["validate"].call_count == 3
    assert scope["log"].call_count == 150
    assert scope["update_parameters"].call_count == 937 + 15000
    assert scope["write_checkpoint"].call_count == 1
    assert scope["lower_learning_rate"].call_count == 1


def test_jax_compiles_once_per_size() -> None:
    needed("jax")
    (block,) = JAX
    batches = [0.5 + step % 3 for step in range(1000)]
    scope = {**names(), "Loop": Loop, "Event": Event, "dataloader": batches}
    exec(compile(block, str(README), "exec"), scope)
    assert [call.args[0] for call in scope["log"].call_args_list] == list(range(99, 1000, 100))
    assert scope["weight"] == pytest.approx(3)
    assert scope["train"]._cache_size() == 3  # for lists of 64, of 8 and of 1


@pytest.mark.parametrize("block", [block for block in PYTHON if ">>>" in block])
def test_examples_show_what_they_print(block: str) -> None:
    scope: dict[str, Any] = {}
    exec("from dloop import Event, Loop, LoopEvents", scope)
    test = doctest.DocTestParser().get_doctest(block, scope, "README.md", str(README), 0)
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0
