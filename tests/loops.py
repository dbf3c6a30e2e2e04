"""Ways to go over a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dloop import Loop

Enter = Callable[[Loop[Any]], Iterator[tuple[Any, Any]]]
ENTER: dict[str, Enter] = {"steps": iter, "lists": lambda loop: loop.chunks(2)}
"""The ways to iterate over a loop, by name."""


def flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """The batches of `pairs`, where a batch may be a list of batches."""
    batches: list[Any] = []
    for batch, _events in pairs:
        batches += batch if isinstance(batch, list) else [batch]
    return batches
