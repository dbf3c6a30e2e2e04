"""The choice of a core, made at import.

The environment variable DLOOP_BACKEND chooses: `cython`, which fails if the compiled core is
missing; `python`; or `auto`, the default, which takes the compiled core if it is there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__all__ = ["BACKEND", "BACKEND_REASON", "core"]


def _choose(asked: str) -> tuple[object, str, str]:
    if asked not in ("auto", "cython", "python"):
        raise ImportError(f"DLOOP_BACKEND={asked!r}: set it to auto, cython or python")
    if asked == "python":
        from . import _core_py

        return _core_py, "python", "DLOOP_BACKEND=python chose it"
    try:
        from . import _core
    except ImportError as error:
        missing = f"the compiled core does not load ({error})"
        if not _is_there():
            folder = os.path.dirname(__file__)
            missing = f"no compiled core is in {folder}: pip builds it, with a C compiler"
        if asked == "cython":
            raise ImportError(f"DLOOP_BACKEND=cython, but {missing}") from error
        from . import _core_py

        return _core_py, "python", f"{missing}; the core in Python does the same, more slowly"
    return _core, "cython", "the compiled core is installed"


def _is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("dloop._core") is not None


if TYPE_CHECKING:
    from . import _core as core

    BACKEND: str
    BACKEND_REASON: str
else:
    core, BACKEND, BACKEND_REASON = _choose(os.environ.get("DLOOP_BACKEND") or "auto")
