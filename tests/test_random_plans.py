"""Random plans are run with dloop, over both cores, and by the oracle; all must see the same.

`python -m pytest tests/test_random_plans.py --examples 20000` hunts for what the few plans of an
everyday run leave out. A plan that failed is replayed by `check(Plan(...))`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from typing import Any, NamedTuple

import pytest
from hypothesis import given

from cores import CORES, use_core
from dloop import LoopError, LoopWarning
from oracle import Oracle, State, World, known_length
from plans import MEMBERS, Life, Part, Parts, Plan, Source, loader_of, loop_of, plans

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


@given(plans(resumed=False))
def test_a_run_yields_what_the_contract_says(plan: Plan) -> None:
    check(plan)


@given(plans(resumed=True))
def test_a_resumed_run_continues_as_if_it_had_not_been_interrupted(plan: Plan) -> None:
    check(plan)


# ------------------------------------------------------------------------- nothing lost or repeated


def in_order(plan: Plan) -> Iterator[Any]:
    """The batches of all epochs, as plain `for` loops would have them."""
    source = plan.source
    for epoch in count() if not source.single_pass else (0,):
        loader = loader_of(source, World(plan, ()))
        if source.sets_epoch:
            loader.set_epoch(epoch)
        batches = list(loader)
        if source.batched is not None:
            size = source.batched
            batches = [batches[i : i + size] for i in range(0, len(batches), size)]
        yield from batches if source.single_pass else batches[: known_length(plan, epoch)]


def is_in_order(plan: Plan) -> bool:
    acts = [act for life in plan.lives for _, act in life.acts]
    return plan.fast_forward and "finish_epoch" not in acts


@given(plans(resumed=True).filter(is_in_order))
def test_no_batch_is_lost_or_repeated_over_resumed_lives(plan: Plan) -> None:
    for core in CORES:
        with use_core(core):
            lives = run(plan, by_oracle=False)
        steps = [seen.step for life in lives for seen in life.seen]
        wanted = list(islice(in_order(plan), max(steps, default=-1) + 1))
        saved = plan.start_step
        for life, script in zip(lives, plan.lives):
            following, restarts = saved, "restart" in [act for _, act in script.acts]
            for seen in life.seen:
                first = seen.step + 1 - len(seen.batches)
                assert first == following or (restarts and first == plan.start_step), core
                assert seen.batches == wanted[first : seen.step + 1], core
                following = seen.step + 1
            saved = life.steps_saved


# --------------------------------------------------------------------------- plans told by a person

FOUR = Source("list", (4,), (4,))


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        ((Part(every_n_steps=3),), [2, 5]),
        ((Part(every_n_steps=3, first_at_step=0),), [0, 3, 6]),
        ((Part(every_n_steps=3, per_epoch=True),), [2, 6]),
        ((Part(every_n_steps=1, from_step=3, until_step=5),), [3, 4]),
        ((Part(every_n_steps=1, from_step=3, per_epoch=True),), [3, 7]),
        ((Part(at_step=(1, 6)), "EPOCH_END"), [1, 3, 6, 7]),
        ((Part(every_n_epochs=2), Part(at_epoch=(0, 5))), [3, 7]),
        # each step takes a second, and the first is at 0 seconds
        ((Part(every_n_seconds=3),), [3, 6]),
        ((Part(every_n_seconds=3), Part(at_step=(2,))), [2, 5]),
        ((Part(every_n_seconds=3), Part(condition=(4,))), [3, 4, 7]),
        ((Part(at_time=(0, 5, 9)),), [0, 5]),
        ((Part(at_time=(0, 1), from_step=2),), [2]),
        ((Part(condition=(1, 5), until_step=4), "TRAINING_END"), [1, 7]),
        ((), []),
    ],
)
def test_these_events_fire_at_these_steps(event: Parts, steps: list[int]) -> None:
    plan = Plan(FOUR, {"A": event}, max_epochs=2)
    check(plan)
    (life,) = run(plan, by_oracle=True)
    assert [seen.step for seen in life.seen if "A" in seen.events] == steps
