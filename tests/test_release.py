"""The scripts that the workflows run, each in a temporary repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"

if not (GITHUB / "release.py").exists() or sys.version_info < (3, 11):
    pytest.skip("needs a checkout, and Python 3.11", allow_module_level=True)

pytestmark = pytest.mark.no_core


def run(script: str, *arguments: str | Path, given: str = "") -> tuple[int, str]:
    """Run a script of the workflows; return its exit code and all output."""
    command = [sys.executable, str(GITHUB / script), *map(str, arguments)]
    ended = subprocess.run(command, input=given, capture_output=True, text=True)
    return ended.returncode, (ended.stdout + ended.stderr).strip()


def git(repository: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with version 1.10.0 and no tags."""
    git(tmp_path, "init", "-q")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.10.0"\n')
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def pull(branch: str, **differs: object) -> dict[str, object]:
    """The fields of a pull request that are used; by default it was merged as commit "c1"."""
    merged = {"merged_at": "2026-11-23T12:00:00Z", "merge_commit_sha": "c1"}
    return {**merged, "head": {"ref": branch}, "base": {"ref": "main"}, **differs}


def test_branch_prints_the_release_branch_that_the_commit_merged() -> None:
    def branch(*pulls: object) -> tuple[int, str]:
        return run("release.py", "branch", "c1", given=json.dumps(pulls))

    release = "release/v1.2.3"
    assert branch(pull("fix/this"), pull(release)) == (0, f"branch={release}")
    for others in (
        [pull("fix/this")],
        [pull(release, merged_at=None)],
        [pull(release, merge_commit_sha="c2")],
        [pull(release, base={"ref": "develop"})],
    ):
        assert branch(*others) == (0, "branch=")
    code, output = branch(pull("release/soon"))
    assert (code, "release/vX.Y.Z" in output) == (1, True)


def version(repository: Path, branch: str) -> tuple[int, str]:
    return run("release.py", "version", branch, "--root", repository)


def test_version_accepts_a_version_above_all_tags(repository: Path) -> None:
    assert version(repository, "release/v1.10.0") == (0, "1.10.0")
    for tag in ("v1.9.0", "v1.2.10", "nightly", "v2", "v3.0.0rc1"):
        git(repository, "tag", tag)
    assert version(repository, "release/v1.10.0") == (0, "1.10.0")
    for last in ("1.10.0", "1.10.1", "1.11.0", "2.0.0"):
        git(repository, "tag", f"v{last}")
        message = f"1.10.0 is not newer than the last tag, v{last}"
        assert version(repository, "release/v1.10.0") == (1, message)


def test_version_refuses_other_branches_and_shallow_clones(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    message = "release/v1.11.0 has version 1.10.0 in pyproject.toml"
    assert version(repository, "release/v1.11.0") == (1, message)
    for branch in (
        "main",
        "release/1.10.0",
        "release/v1.10",
        "release/v1.10.0rc1",
        "x/release/v1.10.0",
    ):
        message = f"a release's branch is named release/vX.Y.Z, not {branch!r}"
        assert version(repository, branch) == (1, message)
    clone = tmp_path_factory.mktemp("shallow")
    git(clone, "clone", "-q", "--depth=1", repository.as_uri(), ".")
    code, message = version(clone, "release/v1.10.0")
    assert (code, "shallow" in message) == (1, True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with all files of a release, named as the build tools do; the files are empty."""
    platforms = [
        "manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64",
        *("manylinux_2_28_aarch64", "musllinux_1_2_x86_64", "musllinux_1_2_aarch64"),
        *("macosx_10_15_x86_64", "macosx_11_0_arm64", "win_amd64", "win_arm64"),
    ]
    for tags in platforms:
        for abi in ("cp310", "cp311", "cp312", "cp313", "cp314", "cp314t", "cp315", "cp315t"):
            (tmp_path / f"dloop-1.2.3-{abi.removesuffix('t')}-{abi}-{tags}.whl").touch()
    (tmp_path / "dloop-1.2.3-py3-none-any.whl").touch()
    (tmp_path / "dloop-1.2.3.tar.gz").touch()
    return tmp_path


def test_files_lists_missing_unexpected_duplicate_and_large_files(files: Path) -> None:
    assert len(list(files.iterdir())) == 66
    assert run("release.py", "files", files) == (0, "")
    (files / "dloop-1.2.3.tar.gz").rename(files / "dloop-1.2.4.tar.gz")
    assert run("release.py", "files", files)[0] == 1  # two versions
    (files / "dloop-1.2.4.tar.gz").unlink()
    (files / "dloop-1.2.3-cp314-cp314t-macosx_11_0_arm64.whl").unlink()
    (files / "dloop-1.2.3-cp310-cp310-manylinux_2_17_x86_64.whl").touch()
    (files / "dloop-1.2.3-cp310-cp310-linux_x86_64.whl").touch()
    (files / "dloop-1.2.3-cp310-cp310-win_amd64.whl").write_bytes(bytes(299_999))
    (files / "dloop-1.2.3-cp311-cp311-win_amd64.whl").write_bytes(bytes(300_000))
    code, message = run("release.py", "files", files)
    assert code == 1
    assert message.splitlines() == [
        "missing: cp314t-macosx_arm64",
        "missing: sdist",
        "not asked for: cp310-linux_x86_64",
        "more than one: cp310-manylinux_x86_64",
        "dloop-1.2.3-cp311-cp311-win_amd64.whl has 300000 bytes",
    ]


@pytest.mark.skipif(os.name == "nt", reason="gh is replaced by a shell script")
def test_publish_runs_gh_except_in_a_dry_run_and_fails_if_gh_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gh, called, folder = tmp_path / "bin" / "gh", tmp_path / "called", tmp_path / "dist"
    for made in (gh.parent, folder):
        made.mkdir()
    gh.write_text(f'#!/bin/sh\necho "$@" >{called}\n')
    gh.chmod(0o755)
    monkeypatch.setenv("PATH", str(gh.parent), prepend=os.pathsep)
    names = ["dloop-1.2.3-py3-none-any.whl", "dloop-1.2.3.tar.gz"]
    for name in names:
        (folder / name).touch()
    publish = ["release.py", "publish", "release/v1.2.3", "c0ffee", str(folder)]
    wanted = "release create v1.2.3 --target c0ffee --title v1.2.3 --generate-notes "
    wanted += " ".join(f"{folder}/{name}" for name in names)
    assert run(*publish, "--dry-run") == (0, f"gh {wanted}")
    assert not called.exists()
    assert run(*publish) == (0, f"gh {wanted}")
    assert called.read_text() == wanted + "\n"
    gh.write_text("#!/bin/sh\nexit 4\n")
    code, message = run(*publish)
    assert (code, "exit status 4" in message) == (1, True)
    (folder / "dloop-1.2.4.tar.gz").touch()
    assert run(*publish, "--dry-run") == (1, "not of v1.2.3: dloop-1.2.4.tar.gz")
