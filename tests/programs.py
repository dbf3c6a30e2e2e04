"""Test programs that run in their own process and session, and are sent signals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")

PROGRAM = """
import gc, os, signal, sys, time, warnings
from cores import use_core
from dloop import Event, Loop, LoopEvents

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def say(*words):  # print() fails if a signal handler prints while it is running
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def train(loop, body=lambda batch: None):
    for batch, events in loop:
        if LoopEvents.INTERRUPT in events:
            say("checkpoint", loop.global_step, loop.stop_reason)
        body(batch)
    say("trained")
"""


def examples(request: pytest.FixtureRequest, few: int) -> int:
    """How often a test that hunts tries: as `--examples` says, else a few times."""
    return request.config.getoption("--examples", None) or few


def program(core: str, code: str) -> subprocess.Popen[str]:
    if os.name != "posix":
        pytest.skip("Windows has no signals that other processes send")
    body = PROGRAM + f"with use_core({core!r}):\n" + textwrap.indent(textwrap.dedent(code), "    ")
    return subprocess.Popen(
        [sys.executable, "-c", body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def run_until(
    process: subprocess.Popen[str], *sent: int, group: bool = False
) -> tuple[list[str], int, str]:
    """Send one signal after each line "now"; return the other lines, the exit code and stderr.

    With `group`, all of its processes get them, as a terminal or a batch system sends them.
    """
    lines = []
    waiting = list(sent)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "now":
            (os.killpg if group else os.kill)(process.pid, waiting.pop(0))
        else:
            lines.append(line.strip())
    _, errors = process.communicate(timeout=60)
    assert not waiting, errors
    return lines, process.returncode, errors
