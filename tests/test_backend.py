"""The choice of a core: DLOOP_BACKEND, BACKEND and BACKEND_REASON."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dloop
from cores import ASKED, CORES
from dloop import _backend

pytestmark = pytest.mark.no_core


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter, from a folder where no checkout can be imported."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tests_run_with_the_cores_of_dloop_test_cores() -> None:
    assert ASKED in ("both", "cython", "python")
    assert (["cython", "python"] if ASKED == "both" else [ASKED]) == CORES


@pytest.mark.parametrize("asked", CORES)
def test_dloop_backend_chooses_a_core(asked: str) -> None:
    code = "import dloop; print(dloop.BACKEND, dloop.LoopState.__module__, dloop.BACKEND_REASON)"
    printed = python(code, DLOOP_BACKEND=asked).stdout
    module = {"cython": "dloop._core", "python": "dloop._core_py"}[asked]
    assert printed.startswith(f"{asked} {module} ")
    reason = {"cython": "the compiled core is installed", "python": "DLOOP_BACKEND=python asked"}
    assert reason[asked] in printed
    core, backend, chosen_because = _backend._choose(asked)
    assert (core.__name__, backend) == (module, asked)  # type: ignore[attr-defined]
    assert chosen_because in printed


@pytest.mark.parametrize("asked", ["auto", ""])
def test_auto_chooses_the_compiled_core_if_it_is_installed(asked: str) -> None:
    printed = python("import dloop; print(dloop.BACKEND)", DLOOP_BACKEND=asked).stdout
    installed = python("import dloop._core").returncode == 0
    assert printed.strip() == ("cython" if installed else "python")


def test_other_values_of_dloop_backend_are_refused() -> None:
    with pytest.raises(ImportError, match="DLOOP_BACKEND='rust': set it to auto, cython or python"):
        _backend._choose("rust")
    refused = python("import dloop", DLOOP_BACKEND="rust")
    assert refused.returncode == 1
    assert "DLOOP_BACKEND='rust': set it to auto, cython or python" in refused.stderr


MISSING = ModuleNotFoundError("No module named 'dloop._core'")
DAMAGED = ImportError("undefined symbol: PyNothing")


@pytest.fixture(params=[MISSING, DAMAGED], ids=["missing", "damaged"])
def without_core(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> ImportError | None:
    """Importing the compiled core raises this error."""
    error: ImportError = request.param

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "dloop._core":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "dloop._core", raising=False)
    monkeypatch.delattr(dloop, "_core", raising=False)
    return error


def test_auto_chooses_the_core_in_python_if_the_compiled_one_cannot_be_imported(
    without_core: ImportError,
) -> None:
    core, backend, reason = _backend._choose("auto")
    assert (core.__name__, backend) == ("dloop._core_py", "python")  # type: ignore[attr-defined]
    assert ("not installed" if without_core is MISSING else "PyNothing") in reason


def test_dloop_backend_cython_fails_if_the_compiled_core_cannot_be_imported(
    without_core: ImportError,
) -> None:
    with pytest.raises(ImportError, match="DLOOP_BACKEND=cython, but the compiled core") as caught:
        _backend._choose("cython")
    assert caught.value.__cause__ is without_core


def test_the_version_is_the_one_of_the_distribution() -> None:
    from importlib.metadata import version

    assert dloop.__version__ == version("dloop")


def test_an_unknown_attribute_of_the_module_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dloop.nothing  # noqa: B018
