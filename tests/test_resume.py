"""Resuming: a run in several lives is the run that was never stopped.

The first part judges random plans, interrupted anywhere: each life has everything built anew, and
gets the state of the one before through JSON, with the other core.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import plans
from cores import CORES, use_core
from dloop import Loop, LoopError, LoopEvents, LoopWarning
from oracle import Joined, Part, Plan, Sizes, StateLike, Stream, World, counters, in_turn

MOST_BODIES = 40
OWN = (LoopEvents.EPOCH_END, LoopEvents.TRAINING_END)

# ------------------------------------------------------------------------------------ random plans


def plain_part(part: Part | str) -> Part | str:
    """Without what a resume does not promise: launches, and conditions that remember."""
    if isinstance(part, str):
        return part
    condition = part.condition and dataclasses.replace(part.condition, raises_at=None, looks=False)
    return dataclasses.replace(part, per_launch=False, condition=condition)


def plain_parts(joined: Joined) -> Joined:
    return tuple(plain_part(part) for part in joined)


def resumable(plan: Plan) -> Plan:
    """Time depends on fetches and bodies alone, and goes on; no errors."""
    clock = dataclasses.replace(
        plan.clock,
        launch_gap=0,
        iter_cost=0,
        condition_cost=0,
        raises_at=None,
        fetch_costs=tuple(map(abs, plan.clock.fetch_costs)),
        body_costs=tuple(map(abs, plan.clock.body_costs)),
    )
    return dataclasses.replace(
        plan,
        source=dataclasses.replace(plan.source, raises=()),
        events=tuple((name, plain_parts(joined)) for name, joined in plan.events),
        stop_when=plan.stop_when and plain_parts(plan.stop_when),
        clock=clock,
    )


def is_timed(plan: Plan) -> bool:
    joined = [parts for _, parts in plan.events] + [plan.stop_when or ()]
    return plan.limit == "max_seconds" or any(
        isinstance(part, Part) and (part.every_n_seconds is not None or part.at_time)
        for parts in joined
        for part in parts
    )


class Life(World):
    """The world of one life: batches are (epoch, place in it), and a fetch costs time only once."""

    def __init__(self, plan: Plan, paid: set[tuple[int, int]], start: int, epoch: int) -> None:
        super().__init__(plan)
        self.now = start
        self.paid = paid
        self.first_epoch = epoch
        self.told: int | None = None  # by set_epoch
        self.places: dict[int, list[int]] = {id(self.only_stream): [0, 0]}

    def set_epoch(self, name: str, epoch: int) -> None:
        self.told = epoch

    def epoch_to_open(self) -> int:
        if self.plan.source.kind == "once":
            return 0
        return self.first_epoch + self.opened

    def in_epoch(self, values: tuple[int, ...]) -> int:
        """What an epoch has of its own, it has by set_epoch alone."""
        return values[min(self.told or 0, len(values) - 1)]

    def length(self) -> int:
        assert isinstance(self.plan.source.promised, tuple)
        return self.in_epoch(self.plan.source.promised)

    def open(self) -> Stream:
        if self.plan.source.kind == "once":
            return self.only_stream
        epoch = self.epoch_to_open()
        assert self.told in (None, epoch)
        self.opened += 1
        stream = Stream(self.in_epoch(self.plan.source.lengths))
        self.streams = [*getattr(self, "streams", []), stream]  # keep ids apart
        self.places[id(stream)] = [epoch, 0]
        return stream

    def fetch(self, stream: Stream) -> Any:
        epoch, place = self.places[id(stream)]
        if (epoch, place) not in self.paid:
            self.paid.add((epoch, place))
            self.now += in_turn(self.plan.clock.fetch_costs, 5 * epoch + place)
        if stream.left == 0:
            raise StopIteration
        stream.left -= 1
        self.places[id(stream)][1] += 1
        return epoch, place

    def condition(self, condition: Any, state: StateLike) -> object:
        return in_turn(condition.answers, state.global_step)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a life ends: in its so-many-th body, which counts as done or not."""

    body: int
    done: bool
    start: int  # of the next life's clock
    sizes: Sizes


@st.composite
def cuts(draw: plans.Draw) -> Cut:
    return Cut(
        draw(st.sampled_from((1, 2, 3, 4, 5, 7))),
        draw(st.sampled_from((True, True, True, False))),
        draw(st.sampled_from((0, -1000, 77))),
        draw(st.sampled_from((None, *plans.SIZES))),
    )


class Run:
    """One run of a plan, in one life or in many."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.timed = is_timed(plan)
        self.paid: set[tuple[int, int]] = set()
        self.steps: list[tuple[Any, ...]] = []
        self.end: tuple[Any, ...] = ()
        self.last_fired: dict[Hashable, int] = {}
        self.next_epoch = 0  # which the next life begins in

    def build(self, world: Life) -> Loop[Any]:
        plan, build = self.plan, plans.Builder(world)
        arguments: dict[str, Any] = {plan.limit: plan.limit_value}
        return Loop(
            plans.build_dataloader(world),
            {name: build.joined(joined) for name, joined in plan.events},
            stop_when=build.joined(plan.stop_when) if plan.stop_when else None,
            dataloader_len=plan.dataloader_len,
            lookahead=plan.lookahead,
            clock=world.clock,
            **arguments,
        )

    def live(self, sizes: Sizes, saved: str | None, start: int, cut: Cut | None) -> str | None:
        """Live until the cut, and return the state; or to the end of the run."""
        state = json.loads(saved) if saved is not None else None
        world = Life(self.plan, self.paid, start, self.next_epoch)
        loop = self.build(world)
        if state is not None:
            loop.load_state_dict(state)
        pairs = iter(loop) if sizes is None else loop.chunks(sizes)
        body = 0
        try:
            for batch, events in pairs:
                body += 1
                done = cut.done if cut is not None and cut.body == body else None
                if done is False:
                    self.next_epoch = loop.epoch
                    return json.dumps(loop.state_dict(step_done=False))
                self.note(loop, batch if sizes is not None else [batch], events)
                world.now += in_turn(self.plan.clock.body_costs, loop.global_step)
                self.next_epoch = loop.epoch + loop.state.epoch_end
                if done and loop.stop_reason in (None, self.plan.limit):
                    state = loop.state_dict()
                    text = json.dumps(state)
                    assert json.loads(text) == state
                    return text
                if len(self.steps) > MOST_BODIES:
                    break
        except LoopError as error:
            self.end = (type(error).__name__,)
        else:
            self.end = (loop.stop_reason,)
        return None

    def note(self, loop: Loop[Any], batches: list[Any], events: Any) -> None:
        names = frozenset(events)
        step = loop.global_step
        known = [name for name, _ in self.plan.events] + list(OWN)
        for name in known:
            window = step - self.last_fired.get(name, -1)
            assert loop.steps_since(name) == window, name
            if name in names:
                self.last_fired[name] = step
        elapsed = loop.state.elapsed if self.timed else None
        self.steps.append((batches, names, counters(loop.state), elapsed))

    def flat(self) -> list[Any]:
        """Whatever the lists' sizes: every batch, and the steps with events."""
        if self.timed:
            return self.steps
        return [batch for batches, *_ in self.steps for batch in batches] + [
            step[1:] for step in self.steps if step[1]
        ]


def judge(plan: Plan, sequence: list[Cut], sizes: Sizes) -> None:
    whole = Run(plan)
    try:
        with use_core(CORES[0]):
            whole.live(sizes, None, 5, None)
    except ValueError:
        event("refused")
        return
    parts, saved, start = Run(plan), None, 5
    for life, cut in enumerate([*sequence, None]):
        with use_core(CORES[life % len(CORES)]):
            saved = parts.live(sizes, saved, start, cut)
        if saved is None:
            break
        assert cut is not None
        event("resumed")
        start = cut.start
        if not parts.timed and plan.stop_when is None:
            sizes = cut.sizes
    assert parts.flat() == whole.flat()
    assert parts.end == whole.end


@pytest.mark.no_core
@pytest.mark.parametrize("label", plans.SOURCES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_run_in_lives_is_the_run_that_was_never_stopped(label: str, data: Any) -> None:
    plan = resumable(data.draw(plans.plans(label)))
    sequence = data.draw(st.lists(cuts(), min_size=1, max_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)
        judge(plan, sequence, plan.entries[0])
