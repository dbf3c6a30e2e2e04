"""The choice of a core, made once at import.

The environment variable DLOOP_BACKEND asks for one: `cython` (and fails where that is missing),
`python`, or `auto`, which takes the compiled one where it is there.
"""

from __future__ import annotations

import os

__all__ = ["BACKEND", "BACKEND_REASON", "core"]

TYPE_CHECKING = False


def _choose(asked: str) -> tuple[object, str, str]:
    if asked not in ("auto", "cython", "python"):
        raise ImportError(f"DLOOP_BACKEND={asked!r}: set it to auto, cython or python")
    if asked != "python":
        try:
            import dloop._core as _core
        except ImportError as error:
            if asked == "cython":
                raise ImportError(f"DLOOP_BACKEND=cython, but {_missing(error)}") from error
            reason = f"{_missing(error)}; the core in Python does the same, more slowly"
        else:
            return _core, "cython", "the compiled core is installed"
    else:
        reason = "DLOOP_BACKEND=python asked for it"
    from . import _core_py

    return _core_py, "python", reason


def _missing(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            "the compiled core is not installed (dloop was built without a working C compiler, or "
            "with DLOOP_NO_EXTENSIONS=1)"
        )
    return f"the compiled core does not load ({error})"


if TYPE_CHECKING:
    from . import _core as core

    BACKEND: str
    BACKEND_REASON: str
else:
    core, BACKEND, BACKEND_REASON = _choose(os.environ.get("DLOOP_BACKEND") or "auto")
