"""Random plans are run with dloop, over both cores, and by the oracle; all must see the same.

`python -m pytest tests/test_random_plans.py --examples 20000` hunts for what the few plans of an
everyday run leave out. A plan that failed is replayed by `check(Plan(...))`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import pytest
from hypothesis import given

from cores import CORES, use_core
from dloop import LoopError, LoopWarning
from oracle import Oracle, State, World
from plans import MEMBERS, Life, Plan, from_many_seeds, loop_of, plans

MOST_STEPS = 60  # then a life is killed
pytestmark = pytest.mark.no_core  # each plan is run with all of them


class Seen(NamedTuple):
    """A step, or a list of steps, as its body sees it."""

    step: int
    batches: list[Any]  # empty at the step of an exception
    events: list[str]
    state: State | None  # None at the step of an exception
    stop_reason: str | None
    steps_since: list[int]


@dataclass
class Lived:
    """What was seen in a life."""

    saved: Any = None  # the latest state
    steps_saved: int = 0  # how many steps are done by that
    seen: list[Seen] = field(default_factory=list)
    amended: list[Any] = field(default_factory=list)  # what a body sees after it changed its step
    errors: list[str] = field(default_factory=list)  # the types of the exceptions that came out
    calls: list[tuple[Any, ...]] = field(default_factory=list)  # of the conditions
    stop_reason: str | None = None
    warns: bool = False


def run(plan: Plan, by_oracle: bool) -> list[Lived]:
    """Go through all lives of a plan."""
    lives: list[Lived] = []
    lived = Lived(steps_saved=plan.start_step)
    for life in plan.lives:
        saved = lived.saved
        world = World(plan, life.errors if saved is None else ())
        lived = Lived(saved, lived.steps_saved, calls=world.calls)
        lives.append(lived)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop: Any = Oracle(plan, world, saved) if by_oracle else loop_of(plan, world)
            if saved is not None and not by_oracle:
                loop.load_state_dict(json.loads(json.dumps(saved)))
            live(loop, plan, life, world, lived)
        warned = [each for each in caught if issubclass(each.category, LoopWarning)]
        lived.warns = bool(loop.warned if by_oracle else warned)
    return lives


def live(loop: Any, plan: Plan, life: Life, world: World, lived: Lived) -> None:
    """Go over a loop as a life says."""
    acts = list(life.acts)
    for sizes in cycle(life.entered):
        left = ""
        try:
            for given, events in loop if sizes is None else loop.chunks(sizes):
                batches = [] if given is None else [given] if sizes is None else given
                lived.seen.append(look(loop, plan, batches, events))
                left = act(loop, plan, acts, batches, world, lived)
                world.now += plan.body_costs[len(lived.seen) % len(plan.body_costs)]
                if left or len(lived.seen) == MOST_STEPS:
                    break
        except (Exception, KeyboardInterrupt) as exception:
            lived.errors.append(type(exception).__name__)
            left = "" if isinstance(exception, Exception) else "leave"
        if left in ("", "kill") or len(lived.seen) >= MOST_STEPS:
            break
    if lived.seen or lived.errors:  # else it was finished before
        lived.stop_reason = loop.stop_reason
        if left == "" and loop.stop_reason is not None:
            with pytest.raises(LoopError):
                next(iter(loop))
    world.begin_again(loop.state.global_step)


def look(loop: Any, plan: Plan, batches: list[Any], events: Any) -> Seen:
    names = sorted([MEMBERS.get(each, each) for each in events])
    assert bool(events) == bool(names) and all(each in events for each in events)
    state = State(*[getattr(loop.state, name) for name in State._fields]) if batches else None
    since = [loop.steps_since(name) for name in plan.events]
    return Seen(loop.state.global_step, batches, names, state, loop.stop_reason, since)


def act(
    loop: Any,
    plan: Plan,
    acts: list[tuple[int, str]],
    batches: list[Any],
    world: World,
    lived: Lived,
) -> str:
    """Do what the body does after steps; return how it leaves the loop, if it does."""
    last, size = loop.state.global_step, len(batches)
    steps = [*range(last - size + 1, last + 1), *([-1] if loop.stop_reason else [])]
    due = [each for each in acts if each[0] in steps]
    for each in due:
        acts.remove(each)
    for name in [name for _, name in due] if size else ["save"]:
        kind, _, detail = name.partition(" ")
        if kind == "save":
            lived.saved = loop.state_dict(step_done=detail != "undone")
            lived.steps_saved = last + 1 - (size if detail else 0)
        elif kind == "trigger" and detail in loop.events:
            loop.trigger(detail)
        elif kind == "stop":
            loop.stop()
        elif kind in ("finish", "finish_epoch", "count"):
            given = ("tokens", int(detail)) if detail else ()
            lived.amended.append(look(loop, plan, batches, getattr(loop, kind)(*given)))
        elif kind == "restart":
            loop.restart()
            world.begin_again(last)
        if kind in ("leave", "restart", "kill"):
            return kind
    return ""


# ------------------------------------------------------------------------------------ random plans


def check(plan: Plan) -> None:
    """Compare what dloop does with what the oracle says."""
    expected = run(plan, by_oracle=True)
    for core in CORES:
        with use_core(core):
            compare(plan, core, run(plan, by_oracle=False), expected)


def compare(plan: Plan, core: str, lives: list[Lived], expected: list[Lived]) -> None:
    for number, (life, wanted) in enumerate(zip(lives, expected)):
        where = f"life {number} with the {core} core"
        assert life.seen == wanted.seen, where
        assert life.amended == wanted.amended, where
        assert (life.errors, life.stop_reason) == (wanted.errors, wanted.stop_reason), where
        assert life.steps_saved == wanted.steps_saved, where
        if not plan.lives[number].errors:  # else an epoch may be opened again
            assert life.calls == wanted.calls, where
        is_opened_within = number or plan.start_step or plan.lives[number].errors
        if not (is_opened_within or life.saved or not plan.fast_forward):
            assert life.warns == wanted.warns, where
        assert life.warns or not wanted.warns, where


@from_many_seeds
@given(plans(resumed=False))
def test_a_run_yields_what_the_contract_says(plan: Plan) -> None:
    check(plan)


@from_many_seeds
@given(plans(resumed=True))
def test_a_resumed_run_continues_as_if_it_had_not_been_interrupted(plan: Plan) -> None:
    check(plan)
