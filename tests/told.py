"""What a call warns of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from dloop import LoopWarning

Result = TypeVar("Result")


def with_warnings(call: Callable[[], Result]) -> tuple[Result, list[str]]:
    """What `call()` returns, and the texts of dloop's warnings meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in caught if each.category is LoopWarning]


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """The texts of dloop's warnings while `call()` runs."""
    return with_warnings(call)[1]
