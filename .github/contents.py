"""Checks what the files of a release contain: `python .github/contents.py FOLDER`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = ("dloop/py.typed", "dloop/_core.pyi", "dloop/demo/iris.csv", "dloop/demo/iris.md")
MOST_BYTES = 300_000


def check(folder: Path) -> None:
    """Raise AssertionError if a wheel or the sdist in a folder misses a file, or has too many."""
    for wheel in sorted(folder.glob("*.whl")):
        names = zipfile.ZipFile(wheel).namelist()
        compiled = [name for name in names if name.endswith((".so", ".pyd"))]
        assert not [name for name in names if name.endswith((".pyx", ".c"))], (wheel, names)
        assert len(compiled) == ("none-any" not in wheel.name), (wheel, names)
        assert "manylinux_2_" in wheel.name or not compiled, wheel
        assert wheel.stat().st_size < MOST_BYTES, (wheel, wheel.stat().st_size)
        assert not [name for name in NEEDED if name not in names], (wheel, names)
        assert any(name.endswith("licenses/LICENSE") for name in names), (wheel, names)
        print(wheel.name, wheel.stat().st_size, "bytes")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = [name.partition("/")[2] for name in file.getnames()]
    assert "dloop/_core.pyx" in names and "dloop/_core.c" not in names, names
    assert "LICENSE" in names, names


if __name__ == "__main__":
    check(Path(sys.argv[1]))
