"""The demo trains on the iris data, and prints which events fired when and the core in use."""

from __future__ import annotations

import csv
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dloop.demo import iris
from dloop.demo.__main__ import train
from frameworks import needed


def test_the_demo_shows_its_plan_and_a_profile_and_learns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    summary = train(100, tmp_path / "iris.json")
    accuracy = re.fullmatch(r"done: accuracy (\S+), weights [0-9a-f]{12}", summary)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.93
    printed = capsys.readouterr().out
    assert re.search(r"^Evaluate +every 10,000 steps or at the", printed, re.M)
    assert "! 'DropLR': at_step=20000 never fires" in printed
    assert re.search(r"^step   2999  loss .* accuracy ", printed, re.M)
    assert re.search(r"^waiting +\d", printed, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.no_core
def test_the_data_are_the_150_flowers_and_their_source_is_named() -> None:
    folder = Path(iris.__file__).parent
    with (folder / "iris.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert Counter(row[-1] for row in rows) == dict.fromkeys(iris.SPECIES, 50)
    means = [round(sum(float(row[place]) for row in rows) / 150, 2) for place in range(4)]
    assert means == [5.84, 3.06, 3.76, 1.2]
    note = (folder / "iris.md").read_text(encoding="utf-8")
    assert "Fisher" in note
    assert "CC BY 4.0" in note


PROGRAMS = {
    "__main__": (None, ["--epochs", "1500"]),
    "image_classifier": ("torch", ["--epochs", "4"]),
    "language_model": ("torch", ["--tokens", "90000"]),
    "jax_scan": ("jax", ["--epochs", "3"]),
    "dqn": ("gymnasium", ["--episodes", "70"]),
}


@pytest.mark.no_core
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if package is None else pytest.mark.real)
        for name, (package, _) in PROGRAMS.items()
    ],
)
def test_a_killed_program_comes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    package, arguments = PROGRAMS[name]
    if package is not None:
        needed(package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(checkpoint: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", f"dloop.demo.{name}", *arguments]
        return subprocess.Popen(
            [*command, "--checkpoint", str(tmp_path / checkpoint)],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )

    def last_line(checkpoint: str) -> str:
        printed, _ = start(checkpoint).communicate(timeout=120)
        return printed.splitlines()[-1]

    whole = last_line("whole")
    assert re.fullmatch(r"done: .*, weights [0-9a-f]{12}", whole)
    with start("killed") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "checkpoint\n":
                process.kill()
                break
    assert process.returncode != 0
    if name == "__main__" and os.name == "posix":
        with start("stopped") as process:
            assert process.stdout is not None
            assert "checkpoint\n" in iter(process.stdout.readline, "")
            process.send_signal(signal.SIGINT)
            *_, summary = process.stdout
        assert summary.startswith("stopped after step ")
        assert summary.endswith(": the same command resumes\n")
        assert last_line("stopped") == whole
    assert last_line("killed") == whole


@pytest.mark.no_core
@pytest.mark.parametrize("name", [name for name, (package, _) in PROGRAMS.items() if package])
def test_a_program_without_its_framework_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = PROGRAMS[name]
    monkeypatch.setitem(sys.modules, str(package), None)
    with pytest.raises(SystemExit, match=r"this demo needs (PyTorch|JAX)"):
        runpy.run_module(f"dloop.demo.{name}")


@pytest.mark.no_core
@pytest.mark.real
def test_the_image_classifier_stops_two_epochs_after_its_best(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed("torch")
    needed("sklearn")
    module = importlib.import_module("dloop.demo.image_classifier")
    monkeypatch.setattr(module, "PATIENCE", 2)
    summary = module.train(60, tmp_path / "images.pt", 0)
    best = re.match(r"done: accuracy 0\.\d+ in epoch (\d+), ", summary)
    assert best is not None
    epochs = re.findall(r"^epoch +(\d+)  accuracy", capsys.readouterr().out, re.M)
    assert int(epochs[-1]) == int(best[1]) + 2 < 59
