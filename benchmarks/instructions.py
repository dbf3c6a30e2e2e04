"""Instructions per step, counted by callgrind and compared with the budgets in budgets.json.

Times are noisy, but these counts are exactly the same if Python and dloop were built in the same
way. Each is the difference between runs of two lengths. A count that is more than 2 % above its
budget fails, and so does a build without budgets; one more than 2 % below gives a hint to lower it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

COUNTED = Path(__file__).with_name("counted.py")
BUDGETS = Path(__file__).with_name("budgets.json")
SLACK = 0.02
CORES = ("cython", "python")

Counts = dict[str, float]
"""Instructions by case."""
Budgets = dict[str, dict[str, Counts]]
"""By core and build."""


class Counted(NamedTuple):
    """The counts of a core, and the file that it was loaded from."""

    counts: Counts
    file: str


class Verdict(NamedTuple):
    """Counts above their budgets, and those below, whose budgets can be lowered."""

    failures: list[str]
    hints: list[str]


def build() -> str:
    """How this Python was built, and so how it builds extensions; counts depend on that."""
    config = sysconfig.get_config_var
    arguments = config("CONFIG_ARGS") or ""
    levels = re.findall(r"-O\w+", config("OPT") or "")
    options = {
        "pgo": "--enable-optimizations" in arguments,
        "lto": "--with-lto" in arguments,
        "shared": config("Py_ENABLE_SHARED"),
        "debug": config("Py_DEBUG"),
        "free-threaded": config("Py_GIL_DISABLED"),
    }
    words = [
        f"{platform.python_implementation()} {platform.python_version()}",
        sysconfig.get_platform(),
        platform.python_compiler(),
        *levels[-1:],
        *[name for name, is_on in options.items() if is_on],
    ]
    return ", ".join(words)


def count(core: str) -> Counted:
    """Run all cases with the core in callgrind; SystemExit if that fails."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed")
    # only the environment variables that Python may need to start
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environment |= {
        "DLOOP_BACKEND": core,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--combine-dumps=yes", "--dump-before=getppid"]
        done = subprocess.run(
            [*command, f"--callgrind-out-file={file}", sys.executable, str(COUNTED)],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{core}: the cases did not run\n{done.stderr}")
        parts = re.findall(r"^totals: (\d+)$", file.read_text(encoding="utf-8"), re.M)
    about: dict[str, Any] = json.loads(done.stdout)
    if about["core"] != core:
        raise SystemExit(f"asked for the {core} core, but {about['file']} was loaded")
    counts = per_step([int(part) for part in parts], about["cases"], about["steps"])
    return Counted(counts, about["file"])


def per_step(parts: list[int], cases: list[str], steps: int) -> Counts:
    """Every second part is a run: of each case a short and a long one, which differ by `steps`."""
    runs = parts[1::2]
    if len(runs) != 2 * len(cases):
        raise SystemExit(f"callgrind wrote {len(parts)} parts for {len(cases)} cases")
    return {
        name: round((long - short) / steps, 1)
        for name, short, long in zip(cases, runs[::2], runs[1::2])
    }


def judge(counted: Counts, core: str, build: str, budgets: Budgets) -> Verdict:
    """Compare the counts with the budget of their core and build."""
    budget = budgets.get(core, {}).get(build)
    if budget is None:
        missing = json.dumps({core: {build: counted}}, indent=2)
        return Verdict([f"no budget for this build; --update adds\n{missing}"], [])
    failures = [f"{name}: not counted" for name in budget if name not in counted]
    hints = []
    for name, count in counted.items():
        if name not in budget:
            failures.append(f"{name}: {count} counted, no budget; --update adds it")
            continue
        change = f"{name}: {count} counted / {budget[name]} ({count / budget[name] - 1:+.1%})"
        if count > budget[name] * (1 + SLACK):
            failures.append(change)
        elif count < budget[name] * (1 - SLACK):
            hints.append(change)
    return Verdict(failures, hints)


def report(core: str, measured: Counted, verdict: Verdict) -> str:
    """The counts and the verdict as text."""
    lines = [f"{core} core, {measured.file}"]
    lines += [f"{count:12,.1f}  {name}" for name, count in measured.counts.items()]
    lines += [f"FAILED: {failure}" for failure in verdict.failures]
    lines += [f"the budget can be lowered (--update): {hint}" for hint in verdict.hints]
    return "\n".join(lines)


def main() -> None:
    """Count, and compare with the budgets or replace them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--core", choices=CORES, help="one core alone")
    parser.add_argument("--update", action="store_true", help="make these counts the budgets")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    budgets: Budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    here = build()
    if not asked.json:
        print(f"instructions per step, {here}")
    results = {}
    for core in [asked.core] if asked.core else CORES:
        measured = count(core)
        if asked.update:
            budgets.setdefault(core, {})[here] = measured.counts
        verdict = judge(measured.counts, core, here, budgets)
        results[core] = {**measured._asdict(), **verdict._asdict()}
        if not asked.json:
            print(f"\n{report(core, measured, verdict)}", flush=True)
    if asked.update:
        BUDGETS.write_text(f"{json.dumps(budgets, indent=2)}\n", encoding="utf-8")
    if asked.json:
        print(json.dumps({"build": here, "cores": results}, indent=2))
    sys.exit(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    main()
