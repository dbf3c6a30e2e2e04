"""The demo trains on the iris data, and prints which events fired when and the core in use."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import dloop
from dloop.demo import iris
from dloop.demo.__main__ import main
from frameworks import needed


def demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_the_demo_reaches_an_accuracy_of_93_percent(capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for seed in ("0", "1", "1"):
        printed = demo(capsys, "--seed", seed)
        accuracy = re.search(r"accuracy on the held-out flowers: (\S+)", printed)
        assert accuracy is not None
        assert float(accuracy[1]) >= 0.93
        losses.append(re.findall(r"loss .*", printed))
    assert losses[0] != losses[1] == losses[2]


def test_the_demo_prints_the_steps_of_each_event_the_core_and_a_profile(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    printed = demo(capsys, "--epochs", "3", "--trace", str(tmp_path / "trace.json"))
    assert f"{dloop.BACKEND} core: {dloop.BACKEND_REASON}" in printed
    assert re.search(r"OptimizerStep +23 x +3, 7, 11, 15, 19, 23, \.\.\. 89$", printed, re.M)
    assert re.search(r"LoopEvents.EPOCH_END +3 x +29, 59, 89$", printed, re.M)
    assert re.search(r"LoopEvents.TRAINING_END +1 x +89$", printed, re.M)
    assert "90 steps, ended by max_epochs" in printed
    assert re.search(r"^waiting +\d", printed, re.M)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert "OptimizerStep" in {event["name"] for event in trace["traceEvents"]}


def test_the_plan_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed = demo(capsys, "--epochs", "3", "--plan-only")
    assert "90 steps" in printed
    assert "! 'DropLR': at_step=400 never fires" in printed
    assert "loss" not in printed


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
    "image_classifier": ("torch", ["--epochs", "4"]),
    "language_model": ("torch", ["--tokens", "90000"]),
    "jax_scan": ("jax", ["--epochs", "3"]),
    "dqn": ("gymnasium", ["--episodes", "70"]),
}


@pytest.mark.real
@pytest.mark.no_core
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_program_comes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    module, arguments = PROGRAMS[name]
    needed(module)
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
    assert last_line("killed") == whole
