"""A Loop can be neither copied nor pickled; the error says what to do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from dloop import Loop

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda loop: copy.deepcopy([loop]),
    **{
        f"pickle, protocol {protocol}": functools.partial(pickle.dumps, protocol=protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


class OwnLoop(Loop[int]):
    """A loop of a user's own."""


@pytest.mark.parametrize("done", [0, 2, 4])
@pytest.mark.parametrize("kind", [Loop, OwnLoop])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copying_a_loop_is_refused_and_leaves_it_as_it_is(
    way: Callable[[Any], Any], kind: type[Loop[int]], done: int
) -> None:
    loop = kind(range(4), max_epochs=1)
    batches = []
    if done:
        for batch, _ in loop:
            batches.append(batch)
            if len(batches) == done:
                break
    with pytest.raises(TypeError) as caught:
        way(loop)
    text = "a Loop cannot be copied or pickled; save its state_dict() instead"
    assert str(caught.value) == text
    batches += [batch for batch, _ in loop] if done < 4 else []
    assert batches == [0, 1, 2, 3]


def test_its_state_can_be_copied_and_pickled() -> None:
    loop = Loop(range(4), max_epochs=1)
    next(iter(loop))
    state = loop.state_dict()
    assert copy.deepcopy(state) == state
    assert pickle.loads(pickle.dumps(state)) == state
