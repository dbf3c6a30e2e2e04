"""Ways to go over a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
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


def fired(loop: Loop[Any], name: Any, body: Callable[[int], object] = id) -> list[int]:
    """The steps of the run at which `name` fires; `body` is called at each step."""
    steps = []
    for _, events in loop:
        if name in events:
            steps.append(loop.global_step)
        body(loop.global_step)
    return steps


def after(steps: int, loop: Loop[Any]) -> Any:
    """The state that is saved in the body of that step, counted from 1."""
    for _ in islice(loop, steps):
        pass
    return loop.state_dict()


def resumed(loop: Loop[Any], state: Any) -> Loop[Any]:
    """The loop, with a state loaded."""
    loop.load_state_dict(state)
    return loop
