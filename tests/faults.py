"""Plant faults in a copy of dloop, one by one; the suite has to catch each.

`python -m faults`, in this folder, tries them all and fails if one survives; `--core python` or
`--core cython` those of one core, and words after that only those whose names contain one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FILES = {"python": "dloop/_core_py.py", "cython": "dloop/_core.pyx"}
PYTEST = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
# What is likeliest to find a fault comes first, and what takes long comes last. Left out is what
# surrounds the cores.
LIKELIEST = ["differential", "threads"]
LONGEST = ["garbage", "interrupts", "resume", "stopping"]
OUTSIDE = ["backend", "demo", "docstrings", "event", "oracle", "readme", "release", "typing"]


def tests_of(names: list[str]) -> list[str]:
    """The files of the tests of those names."""
    return [f"tests/test_{name}.py" for name in names]


ROUNDS = [
    tests_of(LIKELIEST),
    ["tests", *[f"--ignore={file}" for file in tests_of(LIKELIEST + LONGEST + OUTSIDE)]],
    tests_of(LONGEST),
]
NEAREST = {  # of faults outside the cores: what is tried before that
    "dloop/loop.py": tests_of(["exceptions", "resume"]),
    "dloop/signals.py": tests_of(["stopping"]),
    "dloop/source.py": tests_of(["source", "resume"]),
    "dloop/state.py": tests_of(["state_file"]),
}
HANGS = 150
"""Seconds, after which a round is taken to hang; the longest takes about 50."""

OPEN = """            if self.batches is None:
                self._open_epoch()
"""
START = """            if not self.started:
                self.clock.start()
                self.started = True
"""
LOOK = """        if not plain and not settled:
            self._look_ahead(step)
"""
SHARED = ("python",)  # of a file that both cores use: it is enough to plant it for one


class Fault(NamedTuple):
    """`old` becomes `new` in `file`, or in that of a core, where it stands exactly once."""

    name: str
    old: str
    new: str
    cores: tuple[str, ...] = ("python", "cython")
    file: str = ""


FAULTS = [
    Fault("every n steps is one late", "rest = (count + 1) %", "rest = count %"),
    Fault(
        "until_step is included",
        "if count >= self.stop - self.origin",
        "if count > self.stop - self.origin",
    ),
    Fault(
        "until_step ends no period", "NEVER if self.period >= self.stop - step", "NEVER if False"
    ),
    Fault("from_step is ignored", "max(step, self.start) - self.origin", "step - self.origin"),
    Fault("per_epoch counts global steps", "trigger.origin = epoch_start", "trigger.origin = 0"),
    Fault(
        "per_epoch keeps the last epoch's plan",
        "            self._schedule_from(self.step + 1, self.draws_from)\n",
        "            pass\n",
    ),
    Fault(
        "timers are a nanosecond late",
        "return self.last + self.period",
        "return self.last + self.period + 1",
    ),
    Fault(
        "timers make up for missed periods",
        "timer.last = now",
        "timer.last = agenda[0][0]",
        ("python",),
    ),
    Fault(
        "timers make up for missed periods",
        "timer.last = now",
        "timer.last = agenda.heap[0].due",
        ("cython",),
    ),
    Fault(
        "at_time forgets its second point",
        "self.origin + self.points[place]",
        "self.origin + self.points[-1]",
    ),
    Fault("timers run past until_step", "if step < timer.stop:", "if step <= timer.stop:"),
    Fault("timers run before from_step", "if timer.start <= self.step + 1:", "if True:"),
    Fault(
        "timers are short-circuited",
        "while agenda[0][0] <= now:",
        "while not self.bits and agenda[0][0] <= now:",
        ("python",),
    ),
    Fault(
        "timers are short-circuited",
        "while agenda.heap[0].due <= now:",
        "while not self.bits and agenda.heap[0].due <= now:",
        ("cython",),
    ),
    Fault(
        "only one timer fires in a step",
        "                self.bits |= timer.bit\n",
        "                if self.bits & ~3:\n                    break\n"
        "                self.bits |= timer.bit\n",
    ),
    Fault(
        "the clock is read before looking ahead",
        LOOK,
        "        if self.timed and self.reading == UNREAD:\n"
        "            self.reading = self.clock.tick()\n" + LOOK,
    ),
    Fault("the clock starts before the epoch is opened", OPEN + START, START + OPEN),
    Fault(
        "the clock starts at every fetch", START, START.replace("if not self.started", "if True")
    ),
    Fault(
        "the clock may go backwards",
        "latest = max(latest, nanoseconds(number))",
        "latest = nanoseconds(number)",
        SHARED,
        "dloop/checks.py",
    ),
    Fault("elapsed is read at every look", "if self._elapsed < 0:", "if True:"),
    Fault(
        "a look too many",
        "step - self.draws_from < self.looks_from\n",
        "step - self.draws_from < self.looks_from - 1\n",
    ),
    Fault(
        "a look too few",
        "step - self.draws_from < self.looks_from\n",
        "step - self.draws_from <= self.looks_from\n",
    ),
    Fault(
        "a cut epoch has no end",
        "self.ended or step - self.draws_from == self.ends_at",
        "self.ended",
    ),
    Fault(
        "an ended iterator is asked again",
        "            if not self.ended:\n",
        "            if True:\n",
        ("cython",),  # in Python, chain() does not ask again by itself
    ),
    Fault("max_steps is one late", "= plan.max_steps - 1", "= plan.max_steps"),
    Fault("max_epochs is one late", "self.drawing + 1 >=", "self.drawing >="),
    Fault("max_seconds has to be passed", "if now >= self.", "if now > self."),
    Fault(
        "a limit hides stop_when",
        'reason = self.stop_asked or "stop_when"',
        'reason = reason or "stop_when"',
    ),
    Fault("conditions do not see that stop_when ends", "state = state.at_training_end()", "pass"),
    Fault(
        "conditions run past until_step",
        "global_step < condition.stop",
        "global_step <= condition.stop",
    ),
    Fault(
        "only True is true",
        "and condition.function(state):",
        "and condition.function(state) is True:",
    ),
    Fault(
        "steps without a trigger skip conditions",
        "        if step < self.conditions_until:\n            last",
        "        if False:\n            last",
    ),
    Fault("a condition's error has no note", "self.plan.blame(failure, bit)", "pass"),
    Fault(
        "epoch_step is the global step",
        "self.drawing, step, step - self.draws_from",
        "self.drawing, step, step",
    ),
    Fault("steps_done is the step", "self._global_step + 1", "self._global_step", ("python",)),
    Fault("steps_done is the step", "self.global_step + 1", "self.global_step", ("cython",)),
    Fault("the conditions' state is not the step's", "self.latest = state", "self.latest = None"),
    Fault(
        "a look takes the state of another step",
        "return latest\n",
        "return self.latest\n",
        ("python",),
    ),
    Fault(
        "a look mixes two steps",
        "                step,\n                step - self.epoch_start,",
        "                self.step,\n                self.step - self.epoch_start,",
        ("python",),
    ),
    Fault(
        "a | TRAINING_END loses its second half", "plan.on_training_end", "plan.on_training_end & 2"
    ),
    Fault(
        "a | EPOCH_END loses its second half",
        "plan.on_epoch_end(self.drawing, step)",
        "plan.on_epoch_end(self.drawing, step) & 1",
    ),
    Fault(
        "the epoch's end is that of the epoch before",
        "on_epoch_end(self.drawing, step)",
        "on_epoch_end(self.epoch, step)",
    ),
    Fault("an error met ahead is swallowed", "raise self.deferred", "self.deferred = None"),
    Fault("an error does not end the run", "            self.error = exception\n", ""),
    Fault("an interrupted clock loses the batch", "self.held = batch\n", "pass\n", ("python",)),
    Fault(
        "an interrupted clock loses the batch",
        "self.entered = False\n            self.held = batch\n",
        "self.entered = False\n",
        ("cython",),
    ),
    Fault(
        "what comes while the loop is left is kept",
        "if self.batches is not None:  # else the loop was left",
        "if True:  # else the loop was left",
        ("cython",),
    ),
    Fault(
        "a close in a quiet step's clock comes late",
        "if reading >= self.core.next_reading or self.core.step >= self.turn.quiet_until:",
        "if reading >= self.core.next_reading:",
        ("cython",),
    ),
    Fault("a condition's error becomes an event", "if exception is self.unowed:", "if False:"),
    Fault("StopIteration ends the loop", "raise errors.not_stop(exception)", "raise exception"),
    Fault(
        "a new iterator forgets the size of the latest list",
        "if self.step > turn.step_before else turn.size_before",
        "if True else turn.size_before",
    ),
    Fault(
        "a second error under guard hides the first",
        "errors.chain(exception, core.owed)",
        "pass",
        SHARED,
        "dloop/loop.py",
    ),
    Fault(
        "a stop hides that the time is up",
        "(stepped and self._core.is_out_of_time())",
        'self._core.stop_reason == "max_seconds"',
        SHARED,
        "dloop/loop.py",
    ),
    Fault(
        "a restart keeps what it cannot close",
        "self._begin()\n        source.close()",
        "source.close()\n        self._begin()",
        SHARED,
        "dloop/loop.py",
    ),
    Fault(
        "the loader's state goes with the run",
        "self._at_end = self.state_at_end()\n            self._note()",
        "pass",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "a loader that failed is asked for its state",
        "self._failed = not isinstance(exception, StopIteration)",
        "pass",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "the state of an epoch is taken for that of the one before",
        "tracked = self._tracked_before\n",
        "pass\n",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "a loop that ends takes the signals of the other",
        "before = before if replaced is _handle else replaced",
        "before = replaced",
        SHARED,
        "dloop/signals.py",
    ),
    Fault("writers do not wait", "fcntl.LOCK_EX", "fcntl.LOCK_UN", SHARED, "dloop/state.py"),
    Fault(
        "a closed loop hands over",
        "            events = self._events(bits)\n        if self.batches is None:",
        "            events = self._events(bits)\n        if False:",
    ),
    Fault("a failed step leaves its time", "if before == UNREAD else", "if True else"),
    Fault("the source outlives an error", "            self.source.forget()\n", ""),
    Fault(
        "an older iterator goes on",
        "        self.turn.ask_attention()\n        self.turn = ",
        "        self.turn = ",
    ),
    Fault("a step asks for another", "raise errors.in_use()", "pass", ("cython",)),
    Fault("a step asks for another", "if self.making is not None:", "if False:", ("python",)),
    Fault(
        "threads change before a step is marked",
        "with self.entering:\n            self._refuse(turn)\n            if self.making is not"
        " None:\n                raise errors.in_use()\n",
        "if True:\n            self._refuse(turn)\n            if self.making is not None:\n"
        "                raise errors.in_use()\n            __import__('time').sleep(1e-4)\n",
        ("python",),
    ),
    Fault("a step enters the loop", "if self._makes_step(before[1]):", "if False:", ("python",)),
    Fault(
        "a list that is made lets the loop be entered", "self.making = mark", "pass", ("python",)
    ),
    Fault(
        "a loop goes on while its state is taken",
        "        self._check_same(step)\n        return position",
        "        return position",
        SHARED,
        "dloop/loop.py",
    ),
    Fault("an older iterator ends in silence", "raise errors.replaced()", "return 0", ("cython",)),
    Fault("an older iterator ends in silence", "raise errors.replaced()", "return", ("python",)),
    Fault(
        "quiet steps go on without a source",
        "        self.turn.ask_attention()\n        self.batches = None\n        self.ended",
        "        self.batches = None\n        self.ended",
    ),
    Fault(
        "quiet steps run over a trigger",
        "min(last, self.step_agenda[0][0] - 1)",
        "min(last, self.step_agenda[0][0])",
        ("python",),
    ),
    Fault(
        "quiet steps run over a trigger",
        "min(last, self.step_agenda.heap[0].due - 1)",
        "min(last, self.step_agenda.heap[0].due)",
        ("cython",),
    ),
    Fault(
        "firing steps run over a condition",
        "turn.fires_until = -1 if self.stop_bit else last",
        "turn.fires_until = turn.plain_until",
        ("python",),
    ),
    Fault("plain steps run over a limit", "self.last_step) - 1", "self.last_step)"),
    Fault(
        "plain steps run over the time",
        "if not plain or now >= self.max_time or",
        "if not plain or",
    ),
    Fault("plain steps run over stop_when", "or bits & self.stop_bit:", "or False:", ("python",)),
    Fault(
        "plain steps run over stop_when",
        "or (self.has_stop and bits & self.stop_bit):",
        "or False:",
        ("cython",),
    ),
    Fault(
        "a list runs over a trigger",
        "most = self._foreseen(self._promised_end()) - self.step\n",
        "most = self._foreseen(self._promised_end()) - self.step + 1\n",
    ),
    Fault(
        "a list has any length",
        "return fitting(sizes, min(size, len(gathered)))",
        "return min(size, len(gathered))",
        ("cython",),
    ),
    Fault(
        "a list has any length",
        "return fitting(sizes, min(size, len(self.gathered)))",
        "return min(size, len(self.gathered))",
        ("python",),
    ),
    Fault(
        "a list runs over an epoch's end",
        "        if self.ended:\n            return True\n        if self.conditions",
        "        if self.conditions",
    ),
    Fault(
        "a list asks its last condition twice",
        "        if self.found is not None and not settled:\n            bits",
        "        if False:\n            bits",
    ),
    Fault(
        "a list asks no condition",
        "if found:\n                self.found = found",
        "if found:\n                pass",
        SHARED,
    ),
    Fault(
        "settled steps ask conditions",
        "< self.conditions_until and not settled:",
        "< self.conditions_until:",
    ),
    Fault(
        "an error drops what was gathered",
        "                if not self.settled:\n                    raise",
        "                if True:\n                    raise",
    ),
    Fault(
        "what was gathered outlives the run",
        "        if self.lost or self.training_end or self.held",
        "        if self.lost or self.held",
    ),
    Fault(
        "an interrupt keeps the triggers",
        "            self._take_back(exception)\n",
        "            pass\n",
    ),
    Fault(
        "an interrupt keeps the timers",
        "                timer.last = last\n",
        "                pass\n",
    ),
    Fault(
        "a stop is asked for in vain", "            return self.stop_asked\n", "            pass\n"
    ),
    Fault(
        "a stop during a fetch comes a step late",
        "        if self.core.step >= self.turn.quiet_until:  # a stop",
        "        if False:  # a stop",
        ("cython",),
    ),
    Fault(
        "a list that is stopped is whole",
        "            return 1\n        return fitting",
        "            pass\n        return fitting",
    ),
    Fault("an error comes without its event", "if not self.told:", "if False:"),
    Fault(
        "windows forget what was before",
        "events.before\n            if last",
        "-1\n            if last",
    ),
    Fault(
        "an undone step keeps its timers",
        "if not step_done and self.fired_at == self.step:",
        "if False:",
    ),
    Fault("steps count as settled for ever", "self.settled -= step - self.step", "pass"),
    Fault("the next event is one late", "else due - self.step", "else due - self.step + 1"),
    Fault(
        "the coarse clock decides",
        "self.coarse_until = self.next_reading - BEHIND",
        "self.coarse_until = NEVER - 1",
        ("cython",),
    ),
    Fault(
        "a promise is broken in silence",
        "if not settled and step - self.draws_from == self.looks_from and",
        "if False and",
    ),
    Fault("a stream runs dry in silence", 'if reason == "exhausted":', "if False:"),
    Fault(
        "a surplus at the end is dropped in silence",
        "self.source.finish(self.epoch, self.stop_reason)",
        "pass",
    ),
    Fault("unknown names are not told", "self._on_unknown(name)", "pass"),
    Fault(
        "the batch is kept",
        "yield batch, (batch := QUIET)\n",
        "yield batch, QUIET\n",
        ("python",),
    ),
    Fault(
        "the batch of a firing step is kept",
        "yield batch, (batch := QUIET) or events",
        "yield batch, events",
        ("python",),
    ),
    Fault("the batch is kept", "Py_DECREF(batch)", "pass", ("cython",)),
    Fault(
        "the heap loses its order",
        "place = child\n",
        "place = child\n            break\n",
        ("cython",),
    ),
    Fault(
        "quiet steps have every event",
        "return PySet_GET_SIZE(self) and PySet_Contains(self, name)",
        "return True",
        ("cython",),
    ),
    Fault(
        "places are off by one",
        "(place & 7)) & 1",
        "(place + 1 & 7)) & 1",
        ("cython",),
    ),
    Fault(
        "a surplus is not looked for",
        "if next(on_faith[1], _NOTHING) is not _NOTHING:",
        "if False:",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "a generator that was struck is at its end",
        "self.lost |= self.source.is_lost(exception, self.drawing, self._taken())",
        "pass",
    ),
    Fault(
        "a resumed loader is relied upon at once",
        "NEVER if _counts_batches(loader) else _MOST_AGAIN",
        "1",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "a count of batches is relied upon at its end",
        "if self._resumed is None or self._taken >= self._right_after:",
        "if True:",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "a state is noted once",
        "self._noted[1:-1] = []",
        "if self._noted:\n                return",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "set_epoch is called again and again",
        "id(part) in seen:\n            continue\n        seen[id(part)] = part\n",
        "len(seen) > 50:\n            continue\n        seen[len(seen)] = part\n",
        SHARED,
        "dloop/source.py",
    ),
    Fault(
        "at_epoch is ignored",
        "or (at is not None and epoch in _several(at))",
        "",
        SHARED,
        "dloop/schedule.py",
    ),
]


def text_with(core: str, fault: Fault) -> str:
    """The text of the file that `fault` is for, with it."""
    file = ROOT / (fault.file or FILES[core])
    text = file.read_text(encoding="utf-8")
    if fault.old and text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: stands {text.count(fault.old)} times in {file.name}")
    return text.replace(fault.old, fault.new) if fault.old else text


def planted(core: str, fault: Fault, folder: Path) -> Path:
    """A copy of the project in `folder` with `fault` in it."""
    copy = folder / f"{core} {fault.name}".replace(" ", "_").replace("|", "or")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", ".*")
    for name in ("dloop", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    (copy / (fault.file or FILES[core])).write_text(text_with(core, fault), encoding="utf-8")
    return copy


def run(copy: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "DLOOP_EXAMPLES": "400", "DLOOP_HYPOTHESIS": "first", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )


def caught_by(core: str, fault: Fault, folder: Path) -> str:
    """The test that catches `fault`, or an empty string; SystemExit if it could not be tried."""
    copy = planted(core, fault, folder)
    if core == "cython":
        built = run(
            copy,
            "setup.py",
            "-q",
            "build_ext",
            "--inplace",
            CFLAGS="-O0",
            DLOOP_REQUIRE_EXTENSION="1",
        )
        if built.returncode:
            raise SystemExit(f"{fault.name}: does not compile\n{built.stdout}{built.stderr}")
    where = run(copy, "-c", "import dloop; print(dloop.__file__)").stdout
    if not where.startswith(str(copy)):
        raise SystemExit(f"{fault.name}: the tests would run {where}, not the copy")
    try:
        nearest = [NEAREST[fault.file]] if fault.file in NEAREST else []
        for tests in [*nearest, *ROUNDS]:
            done = run(copy, *PYTEST, *tests, DLOOP_TEST_CORES=core, DLOOP_BACKEND=core)
            if done.returncode:
                return failure(fault, done)
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        shutil.rmtree(copy)
    return ""


def failure(fault: Fault, done: subprocess.CompletedProcess[str]) -> str:
    """The first test that failed; SystemExit where pytest itself could not run."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode > 1 and not lines and "Fatal Python error" not in done.stderr:
        raise SystemExit(
            f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}"
        )
    return lines[0].partition(" - ")[0] if lines else "crashes"


def chosen(core: str | None, words: list[str]) -> Iterator[tuple[str, Fault]]:
    """The faults asked for, each with a core to plant it in."""
    for fault in FAULTS:
        for each in fault.cores:
            if core in (None, each) and (not words or any(word in fault.name for word in words)):
                yield each, fault


def main() -> None:
    """Try the faults asked for, as many at a time as there are processors."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--core", choices=FILES)
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    faults = list(chosen(asked.core, asked.words))
    for each in faults:
        text_with(*each)  # so that one that is out of date is found before any takes its time
    began = time.monotonic()
    survivors = []
    no_fault = Fault("no fault", "", "")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        unharmed = {
            core: pool.submit(caught_by, core, no_fault, Path(folder))
            for core in {core for core, _ in faults}
        }
        for core, attempt in unharmed.items():
            if attempt.result():
                raise SystemExit(f"{core}: fails without a fault: {attempt.result()}")
        tried = [pool.submit(caught_by, *each, Path(folder)) for each in faults]
        for (core, fault), attempt in zip(faults, tried):
            caught = attempt.result()
            print(f"{core:7} {fault.name:48} {caught or 'SURVIVES'}", flush=True)
            survivors += [] if caught else [f"{core}: {fault.name}"]
    seconds = time.monotonic() - began
    print(f"{len(faults)} faults, {len(survivors)} not caught, {seconds:.0f} s")
    if survivors or not faults:
        raise SystemExit("\n".join(survivors) or "no such fault")


if __name__ == "__main__":
    main()
