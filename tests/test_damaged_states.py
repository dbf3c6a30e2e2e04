"""A state that was changed at random is refused in one line, or resumes alike over both cores."""

from __future__ import annotations

import json
import re
import warnings
from copy import deepcopy
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cores import CORES, use_core
from dloop import LoopError
from oracle import World
from plans import ONE_IN, Draw, Plan, from_many_seeds, loop_of, plans

pytestmark = pytest.mark.no_core  # each state is loaded with all of them

BOUNDS = (2**62, 2**62 + 1, 2**63, 2**64, -(2**63) - 1, 1e300)
SCALARS: Any = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from((*BOUNDS, "every", "at", "max_epochs"))
    | st.builds(lambda: 10**5000)  # Python refuses to show it, and so does Hypothesis
)
KEYS = st.sampled_from(("state", "at", "whole", "cut", "rest", "every", "A", ""))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def damaged(state: Any, draw: Draw) -> Any:
    """The state with one of its values replaced or deleted."""
    if not isinstance(state, (dict, list)) or not state or draw(ONE_IN[6]):
        return draw(VALUES)
    key = draw(st.sampled_from(sorted(state) if isinstance(state, dict) else range(len(state))))
    if draw(ONE_IN[8]):
        del state[key]
    else:
        state[key] = damaged(state[key], draw)
    return state


@st.composite
def damaged_states(draw: Draw) -> tuple[Plan, Any]:
    """A plan, and a state of its run with one to three changes."""
    plan: Plan = draw(plans(resumed=False))
    loop = loop_of(plan, World(plan, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in islice(loop, draw(st.integers(0, 20))):
                loop.count("tokens", 2)
        except (LoopError, ArithmeticError):  # its loader's or a condition's
            pass
        state = json.loads(json.dumps(loop.state_dict()))
    for _ in range(draw(st.integers(1, 3))):
        state = damaged(state, draw)
    return plan, state


def run_on(plan: Plan, state: Any) -> list[Any]:
    """Resume from the state: some steps, the error that ends them if any, the stop reason."""
    world = World(plan, ())
    loop = loop_of(plan, world)
    seen: list[Any] = []
    try:
        loop.load_state_dict(state)
        for batch, events in islice(loop, 40):
            seen.append((batch, sorted(map(str, events)), repr(loop.state)))
            world.now += 1
    except (LoopError, TypeError, ValueError, ArithmeticError) as error:
        text = str(error)
        assert text and "\n" not in text
        assert "Exceeds the limit" not in text, "an int of too many digits for Python to show"
        seen.append((type(error), re.sub("0x[0-9a-f]+", "an address", text)))
    return [*seen, loop.stop_reason]


@from_many_seeds
@given(damaged_states())
def test_a_damaged_state_is_refused_or_resumes_alike_over_both_cores(
    plan_and_state: tuple[Plan, Any],
) -> None:
    plan, state = plan_and_state
    found = []
    for core in CORES:
        with use_core(core), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run_on(plan, deepcopy(state)))
    assert all(each == found[0] for each in found)
