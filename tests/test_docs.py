"""The code blocks of the README and the guide run, and print what they show."""

from __future__ import annotations

import doctest
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import dloop
from dloop import Event, Loop, LoopEvents, sync
from frameworks import needed

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github/docs").glob("*.md"))]
EXAMPLES = [page for page in PAGES if ">>>" in page.read_text(encoding="utf-8")]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each code block."""
    return re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def programs(page: Path) -> list[str]:
    """The blocks to run; those with a framework have their own tests."""
    python = [text for language, text in blocks(page) if language == "python"]
    return [text for text in python if not re.search(">>>|import (jax|torch)", text)]


def names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages do not define: data, and the user's functions."""
    monkeypatch.setattr(sync, "torch_distributed", lambda every: sync.maximum(list, every=every))
    user = (
        *("backward", "checkpoint_exists", "evaluate", "log", "model", "read_checkpoint"),
        *("report", "save", "save_model", "skipped", "train", "train_discriminator"),
        *("train_generator", "update_parameters", "write_checkpoint"),
    )
    mocks: dict[str, Any] = {name: MagicMock() for name in user}
    mocks["checkpoint_exists"].return_value = mocks["skipped"].return_value = False
    mocks["backward"].return_value = mocks["evaluate"].return_value = 1.0
    episodes = [{"done": step % 10 == 9} for step in range(1000)]
    data = {"dataloader": range(5000), "short_texts": range(10), "long_texts": range(20)}
    own = {"Loop": Loop, "Event": Event, "LoopEvents": LoopEvents, "dloop": dloop, "sync": sync}
    own |= {"signal": signal}
    return {
        **mocks, **data, **own,
        "SIGTERM": signal.SIGTERM, "transitions": lambda: iter(episodes), "folder": folder,
    }  # fmt: skip


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    scope = names(folder, monkeypatch)
    (path,) = [each for each in PAGES if each.name == page]
    for text in programs(path):
        exec(compile(text, page, "exec"), scope)
    return scope


@each_page
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {language for language, _ in blocks(page)} <= {
        "python",
        "console",
        "text",
        "{toctree}",
        "{eval-rst}",
    }
    run(page.name, tmp_path, monkeypatch)


@pytest.mark.no_core
def test_they_call_the_users_functions_at_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls(page: str, function: str) -> list[Any]:
        return run(page, tmp_path, monkeypatch)[function].call_args_list

    assert len(calls("README.md", "save_model")) == 15 + 1
    assert len(calls("triggers.md", "update_parameters")) == 625
    assert len(calls("triggers.md", "report")) == 954  # as each step has more than a million
    assert [call.args[0] for call in calls("time.md", "evaluate")] == [0, 200, 400, 599]
    assert [call.args[0] for call in calls("time.md", "report")] == [1, 200, 200, 199]
    assert len(calls("resuming.md", "write_checkpoint")) == 15
    assert len(calls("stopping.md", "save")) == 1
    assert len(calls("processes.md", "write_checkpoint")) == 1
    assert len(calls("lists.md", "update_parameters")) == 625
    assert len(calls("idioms.md", "train_generator")) == 1000


def test_the_plan_in_the_readme_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(PAGES[0])
    (place,) = [place for place, (language, _) in enumerate(found) if language == "text"]
    exec(found[place - 1][1], {"Loop": Loop, "Event": Event})
    assert capsys.readouterr().out == found[place][1]


@pytest.mark.parametrize("page", EXAMPLES, ids=[page.name for page in EXAMPLES])
def test_examples_print_what_they_show(page: Path) -> None:
    scope: dict[str, Any] = {}
    examples = [text for language, text in blocks(page) if language == "python" and ">>>" in text]
    assert examples
    for text in examples:
        test = doctest.DocTestParser().get_doctest(text, scope, page.name, str(page), 0)
        assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
        scope = test.globs


@pytest.mark.no_core
@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    package = Path(dloop.__file__).parent.parent  # which may be installed
    folders = {link: package if link.startswith("dloop/") else page.parent for link in local}
    assert [link for link in local if not (folders[link] / link).exists()] == []


@pytest.mark.no_core
def test_the_readme_links_to_every_page() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    of_site = {"index.md", "api.md"}
    pages = [page.name for page in PAGES[1:] if page.name not in of_site]
    assert [name for name in pages if f".github/docs/{name})" not in readme] == []


@pytest.mark.real
def test_the_jax_block_compiles_once_per_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("jax")
    (text,) = [text for _, text in blocks(ROOT / ".github/docs/lists.md") if "import jax" in text]
    batches = [0.5 + step % 3 for step in range(1000)]
    scope = {**names(tmp_path, monkeypatch), "dataloader": batches}
    exec(compile(text, "lists.md", "exec"), scope)
    assert [call.args[0] for call in scope["log"].call_args_list] == list(range(99, 1000, 100))
    weight = 0.0
    for batch in batches:
        weight -= 0.1 * (weight - batch)
    assert scope["weight"] == pytest.approx(weight)
    assert scope["train"]._cache_size() == 3  # for lists of 64, of 8 and of 1


@pytest.mark.real
@pytest.mark.no_core
def test_the_readmes_training_resumes_after_a_signal_with_the_same_weights(tmp_path: Path) -> None:
    needed("torch")
    import torch

    (text,) = [text for _, text in blocks(ROOT / "README.md") if "import torch" in text]
    text = text.replace("import torch\n", "import torch\ntorch.manual_seed(1)\n", 1)
    command = [sys.executable, "-u", "-c", text]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = []
    for name, is_stopped in (("whole", False), ("stopped", True)):
        folder = tmp_path / name
        folder.mkdir()
        if is_stopped:
            with subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
            ) as first:
                assert first.stdout is not None
                assert first.stdout.readline().startswith("step 99: loss")
                first.send_signal(signal.SIGTERM)
                assert first.stdout.read().endswith("SIGTERM\n")
            assert first.returncode == 0
        last = subprocess.check_output(command, cwd=folder, env=environment, text=True)
        assert last.endswith(": finish\n")
        saved = torch.load(folder / "checkpoint.pt")
        found.append({name: each.tolist() for name, each in saved["model"].items()})
    assert found[0] == found[1]
