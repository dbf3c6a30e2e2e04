"""MISSING, which stands where there is no batch: a batch may be anything, None too."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MISSING: Any = object()
