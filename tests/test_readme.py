"""The code blocks of the README run, and print what they show."""

from __future__ import annotations

import doctest
import re
import signal
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from dloop import Event, Loop, LoopEvents, sync
from frameworks import needed

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
CODE = [block for language, block in BLOCKS if language == "python"]
# blocks that need a framework have their own test
PYTHON = [block for block in CODE if "import jax" not in block and "sync=" not in block]
SYNC = [block for block in CODE if "sync=" in block]
JAX = [block for block in CODE if "import jax" in block]


def names() -> dict[str, Any]:
    """Names that the README does not define: a dataloader, and the user's functions."""
    user = [
        *("backward", "log", "lower_learning_rate", "save", "update_parameters", "validate"),
        *("checkpoint_exists", "model", "read_checkpoint", "write_checkpoint"),
        *("evaluate", "report"),
    ]
    mocks = {name: MagicMock() for name in user}
    mocks["checkpoint_exists"].return_value = False
    mocks["backward"].return_value = 1.0
    data = {"dataloader": range(5000), "short_texts": range(10), "long_texts": range(20)}
    return mocks | data | {"sync": sync, "SIGTERM": signal.SIGTERM}


def test_code_blocks_are_python_or_console() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "console"}
    assert len(PYTHON) > 4


def test_python_blocks_run_and_call_the_users_functions_at_their_steps() -> None:
    scope = names()
    for block in PYTHON:
        if ">>>" not in block:
            exec(compile(block, str(README), "exec"), scope)
    assert scope["validate"].call_count == 3
    assert scope["log"].call_count == 150
    assert scope["lower_learning_rate"].call_count == 1
    assert scope["update_parameters"].call_count == 937 + 120 + 625
    assert [call.args[0] for call in scope["evaluate"].call_args_list] == [0, 200, 400, 599]
    laps, tokens = scope["report"].call_args_list[:4], scope["report"].call_args_list[4:]
    assert [call.args[0] for call in laps] == [1, 200, 200, 199]
    assert len(tokens) == 954  # as each step has more than a million
    assert scope["write_checkpoint"].call_count == 15


def test_the_block_of_many_processes_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sync.maximum(list, every=50)
    monkeypatch.setattr(sync, "torch_distributed", lambda every: alone)
    (block,) = SYNC
    scope = {**names(), "Loop": Loop, "Event": Event, "LoopEvents": LoopEvents}
    exec(compile(block, str(README), "exec"), scope)
    assert scope["loop"].stop_reason == "max_epochs"
    assert scope["write_checkpoint"].call_count == 1


@pytest.mark.real
def test_the_jax_block_compiles_once_per_size() -> None:
    needed("jax")
    (block,) = JAX
    batches = [0.5 + step % 3 for step in range(1000)]
    scope = {**names(), "Loop": Loop, "Event": Event, "dataloader": batches}
    exec(compile(block, str(README), "exec"), scope)
    assert [call.args[0] for call in scope["log"].call_args_list] == list(range(99, 1000, 100))
    weight = 0.0
    for batch in batches:
        weight -= 0.1 * (weight - batch)
    assert scope["weight"] == pytest.approx(weight)
    assert scope["train"]._cache_size() == 3  # for lists of 64, of 8 and of 1


@pytest.mark.parametrize("block", [block for block in PYTHON if ">>>" in block])
def test_examples_print_what_they_show(block: str) -> None:
    scope: dict[str, Any] = {}
    exec("from dloop import Event, Loop, LoopEvents", scope)
    test = doctest.DocTestParser().get_doctest(block, scope, "README.md", str(README), 0)
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0
