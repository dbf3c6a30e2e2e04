"""Builds the sdist and the pure wheel reproducibly: a commit always gives the same bytes.

`python .github/sources.py FOLDER`, with the packages of requirements/build.txt installed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def output(*command: str) -> str:
    """The output of a command that is run in the repository's root."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def normalise(sdist: Path, epoch: int) -> None:
    """Rewrite an sdist without times, owners and permissions, which setuptools stores."""
    with tarfile.open(sdist) as tar:
        entries = [(entry, tar.extractfile(entry)) for entry in tar.getmembers()]
        with (
            sdist.with_suffix(".new").open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for entry, content in sorted(entries, key=lambda pair: pair[0].name):
                clean = tarfile.TarInfo(entry.name)
                clean.type, clean.size, clean.mtime = entry.type, entry.size, epoch
                clean.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
                new.addfile(clean, content)
    sdist.with_suffix(".new").replace(sdist)


def build(kind: str, source: Path, folder: Path) -> None:
    """Build an sdist or a wheel of the sources with the tools that are installed here."""
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(folder)]
    subprocess.run([*command, str(source)], check=True, stdout=subprocess.DEVNULL)


def main(folder: Path) -> None:
    """Build both: the sdist from the files that git knows, the wheel from the sdist."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or output("git", "log", "-1", "--format=%ct"))
    os.environ.update(SOURCE_DATE_EPOCH=str(epoch), DLOOP_NO_EXTENSIONS="1")
    os.umask(0o022)  # a wheel keeps the modes of its files
    with tempfile.TemporaryDirectory() as temporary:
        source, made = Path(temporary, "source"), Path(temporary, "made")
        for name in output("git", "ls-files", "-z").rstrip("\0").split("\0"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        build("--sdist", source, made)
        (sdist,) = made.glob("*.tar.gz")
        normalise(sdist, epoch)
        shutil.unpack_archive(sdist, temporary, filter="data")
        build("--wheel", Path(temporary, sdist.name.removesuffix(".tar.gz")), made)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir()):
            shutil.move(file, folder / file.name)
            print(folder / file.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
