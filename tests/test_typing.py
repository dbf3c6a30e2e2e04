"""mypy and pyright accept right uses of dloop and refuse wrong ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typing"
REVEAL, REFUSED = FOLDER / "reveal.py", FOLDER / "refused.py"
pytestmark = [pytest.mark.no_core, pytest.mark.typing]

Errors = dict[int, str]


def run(module: str, *arguments: str) -> str:
    """The output of a type checker that is run in the repository's root."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=FOLDER.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(file: Path, cache: Path) -> Errors:
    """The errors of `mypy --strict` in this file, by line."""
    options = ["--strict", "--no-error-summary", "--show-absolute-path", "--no-pretty"]
    options += ["--hide-error-context", "--no-color-output", f"--cache-dir={cache}"]
    output = run("mypy", *options, str(file))
    found = re.findall(r"^(.+?):(\d+): error: (.*)$", output, re.MULTILINE)
    return {int(line): text for name, line, text in found if Path(name).name == file.name}


def pyright(file: Path, cache: Path) -> Errors:
    """The errors of pyright in this file, by line."""
    output = run("pyright", "--outputjson", "--pythonpath", sys.executable, str(file))
    found = json.loads(output[output.index("{") :])
    assert found["summary"]["filesAnalyzed"] >= 1
    return {
        error["range"]["start"]["line"] + 1: error["message"]
        for error in found["generalDiagnostics"]
        if error["severity"] == "error" and Path(error["file"]).name == file.name
    }


@pytest.mark.parametrize("check", [mypy, pyright])
def test_right_uses_have_the_expected_types_and_exactly_the_marked_lines_are_refused(
    check: Callable[[Path, Path], Errors], tmp_path: Path
) -> None:
    found = check(REVEAL, tmp_path)
    assert not found, "\n".join(f"line {number}: {text}" for number, text in found.items())
    lines = REFUSED.read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("  # E:")}
    found = check(REFUSED, tmp_path)
    assert len(marked) > 40
    wrong = [f"not refused: {lines[number - 1]}" for number in sorted(marked - set(found))]
    wrong += [f"refused: {lines[number - 1]}" for number in sorted(set(found) - marked)]
    assert not wrong, "\n".join(wrong)
