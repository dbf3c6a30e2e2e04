"""Checks a release, and publishes it.

python .github/release.py branch COMMIT            print the release branch that COMMIT merged; its
                                                   pull requests are read from the input
python .github/release.py version release/v1.2.3   check that the version is new and declared
python .github/release.py files FOLDER             check that all files are there, and small enough
python .github/release.py publish release/v1.2.3 COMMIT FOLDER [--dry-run]     publish on GitHub
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IDENTIFIERS = ROOT / ".github" / "identifiers"
NUMBER = r"(0|[1-9]\d*)"
VERSION = re.compile(rf"{NUMBER}\.{NUMBER}\.{NUMBER}")
LARGEST = 300_000  # bytes of a wheel


def parsed(version: str) -> tuple[int, ...] | None:
    """The numbers of `1.2.3`, to compare by; None of anything else."""
    match = VERSION.fullmatch(version)
    return tuple(map(int, match.groups())) if match else None


def declared(root: Path) -> str:
    """The version in pyproject.toml."""
    import tomllib  # Python 3.11: what else is here runs on 3.10 too

    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def git(root: Path, *arguments: str) -> str:
    """The output of a git command in a repository."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def branch_version(branch: str) -> str:
    """The version that a release's branch is named after."""
    version = branch.removeprefix("release/v")
    if version == branch or parsed(version) is None:
        sys.exit(f"a release's branch is named release/vX.Y.Z, not {branch!r}")
    return version


def merged_branch(pulls: list[dict[str, Any]], commit: str) -> str:
    """The branch of the release that `commit` has merged into main; empty if it was none.

    `pulls` are the pull requests of the commit, as GitHub's API lists them.
    """
    for pull in pulls:
        is_merged = pull["merged_at"] and pull["merge_commit_sha"] == commit
        branch = pull["head"]["ref"]
        if is_merged and pull["base"]["ref"] == "main" and branch.startswith("release/"):
            branch_version(branch)
            return str(branch)
    return ""


def check_version(root: Path, branch: str) -> str:
    """The version of a release's branch; exits unless it is pyproject.toml's and above all tags."""
    version = branch_version(branch)
    if version != declared(root):
        sys.exit(f"{branch} has version {declared(root)} in pyproject.toml")
    if git(root, "rev-parse", "--is-shallow-repository").strip() == "true":
        sys.exit("a shallow clone does not have all tags; fetch them with git fetch --unshallow")
    tags = git(root, "tag", "--list", "v*").split()
    last = max((numbers for tag in tags if (numbers := parsed(tag[1:]))), default=())
    if (parsed(version) or ()) <= last:
        sys.exit(f"{version} is not newer than the last tag, v{'.'.join(map(str, last))}")
    return version


def identifier(wheel: str) -> str:
    """What cibuildwheel calls a wheel of this file name: cp314t-manylinux_x86_64."""
    *_, abi, platform = wheel.removesuffix(".whl").split("-")
    return f"{abi}-" + re.sub(r"(?<=linux)\d+|_\d+(?=_)", "", platform.split(".")[0])


def wrong_files(folder: Path) -> list[str]:
    """The files of a release that are missing, unexpected or too large."""
    (version,) = {path.name.split("-")[1].removesuffix(".tar.gz") for path in folder.iterdir()}
    wanted = {"sdist", "none-any"}
    for listed in IDENTIFIERS.glob("*.txt"):
        wanted.update(listed.read_text().split())
    found = Counter(
        "sdist" if path.name == f"dloop-{version}.tar.gz" else identifier(path.name)
        for path in folder.iterdir()
    )
    large = [path for path in folder.glob("*.whl") if path.stat().st_size >= LARGEST]
    return [
        *[f"missing: {name}" for name in sorted(wanted - found.keys())],
        *[f"not asked for: {name}" for name in sorted(found.keys() - wanted)],
        *[f"more than one: {name}" for name, count in sorted(found.items()) if count > 1],
        *[f"{path.name} has {path.stat().st_size} bytes" for path in sorted(large)],
    ]


def publish(branch: str, commit: str, folder: Path, dry_run: bool) -> None:
    """Make the GitHub release, with its tag, notes from the merged changes, and all files."""
    tag = f"v{branch_version(branch)}"
    files = sorted(folder.iterdir())
    named = re.compile(f"dloop-{re.escape(tag[1:])}(-|[.]tar)")
    if other := [file.name for file in files if not named.match(file.name)]:
        sys.exit(f"not of {tag}: {', '.join(other)}")
    options = ["--target", commit, "--title", tag, "--generate-notes"]
    command = ["gh", "release", "create", tag, *options, *map(str, files)]
    print(shlex.join(command))
    if not dry_run:
        subprocess.run(command, check=True)


def main() -> None:
    """Run the command; if a check fails, exit with its message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    of_branch = commands.add_parser("branch")
    of_version = commands.add_parser("version")
    of_files = commands.add_parser("files")
    of_publish = commands.add_parser("publish")
    for command in (of_version, of_publish):
        command.add_argument("branch")
    for command in (of_branch, of_publish):
        command.add_argument("commit")
    for command in (of_files, of_publish):
        command.add_argument("folder", type=Path)
    of_publish.add_argument("--dry-run", action="store_true")
    of_version.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args()
    if given.command == "branch":
        print(f"branch={merged_branch(json.load(sys.stdin), given.commit)}")
    elif given.command == "version":
        print(check_version(given.root, given.branch))
    elif given.command == "files":
        if wrong := wrong_files(given.folder):
            sys.exit("\n".join(wrong))
    else:
        publish(given.branch, given.commit, given.folder, given.dry_run)


if __name__ == "__main__":
    main()
