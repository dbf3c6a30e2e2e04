"""The choice of a core: DLOOP_BACKEND, BACKEND and BACKEND_REASON."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest

import dloop
from cores import CORES
from dloop import _backend

pytestmark = pytest.mark.no_core


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("asked", [*CORES, "auto", ""])
def test_dloop_backend_chooses_a_core(asked: str) -> None:
    code = "import dloop; print(dloop.BACKEND, dloop.LoopState.__module__, dloop.BACKEND_REASON)"
    backend, module, reason = python(code, DLOOP_BACKEND=asked).stdout.split(" ", 2)
    auto = "cython" if find_spec("dloop._core") else "python"
    assert backend == (auto if asked in ("auto", "") else asked)
    assert module == {"cython": "dloop._core", "python": "dloop._core_py"}[backend]
    expected = {"cython": "the compiled core is installed", "python": "DLOOP_BACKEND=python"}
    assert asked in ("auto", "") or expected[backend] in reason
    assert _backend._is_there() == (auto == "cython")


def test_other_values_of_dloop_backend_are_refused() -> None:
    refused = python("import dloop", DLOOP_BACKEND="rust")
    assert refused.returncode == 1
    assert "DLOOP_BACKEND='rust': set it to auto, cython or python" in refused.stderr


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'dloop._core'"), "no compiled core is in "),
        (ImportError("undefined symbol: PyNothing"), "PyNothing"),
    ],
    ids=["missing", "damaged"],
)
def test_without_the_compiled_core_auto_takes_the_one_in_python_and_cython_fails(
    error: ImportError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "dloop._core":
                raise error

    is_there = not isinstance(error, ModuleNotFoundError)
    monkeypatch.setattr(_backend, "_is_there", lambda: is_there)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "dloop._core", raising=False)
    monkeypatch.delattr(dloop, "_core", raising=False)
    core, backend, because = _backend._choose("auto")
    assert (core.__name__, backend) == ("dloop._core_py", "python")  # type: ignore[attr-defined]
    assert reason in because
    with pytest.raises(ImportError, match=f"DLOOP_BACKEND=cython, but .*{reason}") as caught:
        _backend._choose("cython")
    assert caught.value.__cause__ is error


def test_the_version_is_that_of_the_distribution() -> None:
    assert dloop.__version__ == version("dloop")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dloop.nothing  # noqa: B018
