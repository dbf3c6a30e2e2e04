"""Runs every `run:` line of the workflows, or a replacement for what cannot run here.

`python .github/run_lines.py STAGE...`, in a clone that may be changed, with the python on the path
in an environment that may be changed too. The STAGEs are those that .ci/run runs anyway. It fails
on a line that is not listed below, and on a listed line that no workflow has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

WORKFLOWS = Path(".github/workflows")

# Replacements for lines that cannot run here.
INSTEAD = {
    # Needs GitHub.
    'gh api "repos/$GH_REPO/commits/$COMMIT/pulls" | python3 .github/release.py branch "$COMMIT" '
    '>> "$GITHUB_OUTPUT"': (
        """echo '[{"merged_at": "today", "merge_commit_sha": "c0ffee", "base": {"ref": "main"}, """
        """"head": {"ref": "release/v1.2.3"}}]' | python3 .github/release.py branch c0ffee """
        "| grep -x branch=release/v1.2.3"
    ),
    # A release begins with the command of the README that raises the version.
    'python .github/release.py version "$BRANCH"': (
        "uv version --quiet --frozen --bump patch && "
        'python .github/release.py version "release/v$(uv version --short)"'
    ),
    # Without the folder dloop, as in the sparse checkout; the stage `pure` runs all tests.
    "python -m pytest": (
        "mv dloop hidden && python -m pytest tests/test_schedule.py && mv hidden dloop"
    ),
    # Needs Docker.
    "python -m cibuildwheel --output-dir wheels dist/*.tar.gz": (
        "CIBW_BUILD='cp313-*' python -m cibuildwheel --print-build-identifiers dist/*.tar.gz"
    ),
    'python3 .github/release.py publish "$BRANCH" "$COMMIT" dist': (
        'python3 .github/release.py publish "release/v$(uv version --short)" main dist --dry-run'
    ),
}
SAME = [
    "python -m pip install --require-hashes --requirement .github/requirements/build.txt",
    "python .github/sources.py dist",
    "python -m pip install --upgrade pip",
    "python -m pip install --group site .",
    "python -m sphinx -W -q .github/docs site",
    "python -m pip install --group test dist/*.whl",
    "python -m pip install --require-hashes --requirement .github/requirements/wheels.txt",
]
ELSEWHERE = {
    "python3 .github/release.py files dist": "needs all wheels; test_release.py tests it",
}


def lines(workflows: Path) -> dict[str, dict[str, str]]:
    """Each `run:` line of the workflows once, with the environment that its step gives it."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(workflows.glob("*.yml")):
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values():
            stages = job.get("strategy", {}).get("matrix", {}).get("stage", [])
            for step in job.get("steps", []):
                line = step.get("run", "").strip()
                for stage in stages if '"$STAGE"' in line else [""]:
                    found[line.replace('"$STAGE"', stage)] = step.get("env", {})
    found.pop("", None)
    return found


def wrong(found: dict[str, dict[str, str]], stages: list[str]) -> list[str]:
    """Lines that are not listed, are listed twice, or are in no workflow."""
    single = [name for stage in stages for name in re.split("[+,]", stage)]
    known = {*INSTEAD, *SAME, *(f"bash .ci/run {stage}" for stage in [*stages, *single])}
    return [
        *[f"unknown: {line}" for line in found if line not in known | ELSEWHERE.keys()],
        *[f"can be run here: {line}" for line in ELSEWHERE if line in known],
        *[f"in no workflow: {line}" for line in [*INSTEAD, *SAME, *ELSEWHERE] if line not in found],
    ]


def main(stages: list[str]) -> None:
    """Run the lines in the order of the workflows."""
    found = lines(WORKFLOWS)
    if problems := wrong(found, stages):
        sys.exit("\n".join(problems))
    for line, environment in found.items():
        if line in ELSEWHERE:
            print(f"--- not run, it {ELSEWHERE[line]}: {line}", flush=True)
        elif line in INSTEAD or line in SAME:
            print(f"--- {line}", flush=True)
            given = {name: value for name, value in environment.items() if "${{" not in value}
            command = ["bash", "-eo", "pipefail", "-c", INSTEAD.get(line, line)]
            if subprocess.run(command, env=os.environ | given).returncode:
                sys.exit(f"failed: {INSTEAD.get(line, line)}")


if __name__ == "__main__":
    main(sys.argv[1:])
