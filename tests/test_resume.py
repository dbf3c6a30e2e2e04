"""Resuming: a run in several lives is the run that was never stopped.

The first part judges random plans, interrupted anywhere: each life has everything built anew, and
gets the state of the one before through JSON, with the other core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import random
import signal
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import plans
from cores import CORES, use_core
from dloop import Event, Loop, LoopError, LoopEvents, LoopWarning, StateError, loader_state
from oracle import (
    EPOCH_END,
    STOP_WHEN,
    TRAINING_END,
    WALL,
    Now,
    Part,
    Plan,
    Sizes,
    StateLike,
    Stream,
    Triggers,
    World,
    counters,
    in_turn,
    in_window,
    owners,
    single_parts,
    to_ns,
    trigger,
)

MOST_BODIES = 100  # more than epochs or steps can limit, whatever the lists' sizes
OWN = (LoopEvents.EPOCH_END, LoopEvents.TRAINING_END)

# ------------------------------------------------------------------------------------ random plans


def plain_part(part: Part | str) -> Part | str:
    """Without conditions that raise or look."""
    if isinstance(part, str):
        return part
    condition = part.condition and dataclasses.replace(part.condition, raises_at=None, looks=False)
    return dataclasses.replace(part, condition=condition)


def lasting_part(part: Part | str) -> Part | str:
    """Without what belongs to a launch."""
    if isinstance(part, str):
        return part
    off = (*part.off, "at_timestamp") if part.at_timestamp else part.off
    return dataclasses.replace(part, per_launch=False, at_timestamp=(), off=off)


def with_parts(plan: Plan, change: Callable[[Part | str], Part | str]) -> Plan:
    return dataclasses.replace(
        plan,
        events=tuple((name, tuple(map(change, joined))) for name, joined in plan.events),
        stop_when=plan.stop_when and tuple(map(change, plan.stop_when)),
    )


def lasting(plan: Plan) -> Plan:
    """What fires the same events at the same steps, whether it is resumed or not."""
    return dataclasses.replace(with_parts(plan, lasting_part), triggers=())


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
    source = dataclasses.replace(plan.source, raises=())
    if plan.batches_per_step is not None:
        # A step that is done counts as a full list, also if a DataLengthError comes after it
        source = dataclasses.replace(
            source,
            promised=source.lengths if isinstance(source.promised, tuple) else source.promised,
            says_end=None if source.says_end is None else "truly",
        )
        if plan.dataloader_len is not None and source.kind != "single-pass":
            length = min(plan.dataloader_len, *source.lengths)
            plan = dataclasses.replace(plan, dataloader_len=length)
    pauses = tuple(dataclasses.replace(pause, cost=abs(pause.cost)) for pause in plan.pauses)
    plan = dataclasses.replace(plan, source=source, clock=clock, pauses=pauses, fast_forward=True)
    return with_parts(plan, plain_part)


def without_time(plan: Plan) -> Plan:
    """Without what depends on time, or ends a run before its limit."""

    def untimed(part: Part | str) -> Part | str:
        if isinstance(part, str):
            return part
        return dataclasses.replace(part, every_n_seconds=None, at_time=(), at_timestamp=(), off=())

    if plan.limit == "max_seconds":
        plan = dataclasses.replace(plan, limit="max_steps", limit_value=16)
    plan = dataclasses.replace(plan, start_step=0, stop_when=None, pauses=(), laps=())
    return with_parts(plan, untimed)


def is_timed(plan: Plan) -> bool:
    return plan.limit == "max_seconds" or any(map(plans.is_timed, single_parts(plan)))


class Life(World):
    """The world of one life: batches are (epoch, place in it), and a fetch costs time only once.

    Where a run need not begin at step 0, only set_epoch tells an epoch's number. The first epoch's
    loader is one that somebody else has set forward to `place`.
    """

    def __init__(
        self,
        plan: Plan,
        paid: set[tuple[int, int]],
        start: int = 5,
        epoch: int = 0,
        place: int = 0,
        by_set_epoch: bool = False,
    ) -> None:
        super().__init__(plan)
        self.now = start
        self.paid = paid
        self.first_epoch = epoch
        self.place = place
        self.by_set_epoch = by_set_epoch or plan.start_step > 0
        self.epoch_told: int | None = None
        self.places: dict[int, list[int]] = {id(self.only_stream): [0, 0]}
        if plan.source.kind == "single-pass":
            self.forward(self.only_stream)

    def forward(self, stream: Stream) -> None:
        stream.left -= self.place
        self.places[id(stream)][1] = self.place
        self.place = 0

    def set_epoch(self, name: str, epoch: int) -> None:
        self.epoch_told = epoch

    def epoch_to_open(self) -> int:
        if self.plan.source.kind == "single-pass":
            return 0
        if self.by_set_epoch:
            return self.epoch_told or 0
        return self.first_epoch + self.opened

    def in_epoch(self, values: tuple[int, ...]) -> int:
        """What an epoch has of its own, it has by set_epoch alone."""
        return values[min(self.epoch_told or 0, len(values) - 1)]

    def length(self) -> int:
        assert isinstance(self.plan.source.promised, tuple)
        return self.in_epoch(self.plan.source.promised)

    def open(self) -> Stream:
        if self.plan.source.kind == "single-pass":
            return self.only_stream
        epoch = self.epoch_to_open()
        assert self.epoch_told in (None, epoch)
        self.opened += 1
        stream = Stream(self.in_epoch(self.plan.source.lengths))
        self.streams = [*getattr(self, "streams", []), stream]  # keep ids apart
        self.places[id(stream)] = [epoch, 0]
        self.forward(stream)
        return stream

    def fetch(self, stream: Stream) -> Any:
        epoch, place = self.places[id(stream)]
        if (epoch, place) not in self.paid and not self.is_surplus(place):
            self.paid.add((epoch, place))
            self.now += in_turn(self.plan.clock.fetch_costs, 5 * epoch + place)
        if stream.left == 0:
            raise StopIteration
        stream.left -= 1
        self.places[id(stream)][1] += 1
        return epoch, place

    def is_surplus(self, place: int) -> bool:
        """Whether a run asks for this batch only to drop it; one that begins there does not."""
        source, length = self.plan.source, self.plan.dataloader_len
        if length is None and isinstance(source.promised, tuple):
            length = self.in_epoch(source.promised)
        if self.plan.lookahead or length is None:
            return False
        return place >= length and (
            source.kind != "single-pass" or self.plan.dataloader_len is None
        )

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

    def __init__(self, plan: Plan, left_alone: bool = False, by_set_epoch: bool = False) -> None:
        self.plan = plan
        self.left_alone = left_alone  # the loader, which is set forward by somebody else
        self.by_set_epoch = by_set_epoch
        self.place = 0  # in the epoch that the next life begins in
        self.timed = is_timed(plan)
        self.paid: set[tuple[int, int]] = set()
        self.steps: list[tuple[Any, ...]] = []
        self.end: tuple[Any, ...] = ()
        self.last_fired: dict[Hashable, int] = {}
        self.next_epoch = 0  # which the next life begins in
        self.judge: Judge | None = None
        # of a life: each label's latest lap, and its begin, as step and time
        self.laps: dict[Hashable, tuple[int, int]] = {}
        self.launched_at = -1, 0

    def build(self, world: Life, is_first: bool) -> Loop[Any]:
        plan, build = self.plan, plans.Builder(world)
        arguments: dict[str, Any] = {plan.limit: plan.limit_value}
        return Loop(
            plans.build_dataloader(world),
            {name: build.joined(joined) for name, joined in plan.events},
            stop_when=build.joined(plan.stop_when) if plan.stop_when else None,
            dataloader_len=plan.dataloader_len,
            lookahead=plan.lookahead,
            batches_per_step=plan.batches_per_step,
            start_step=plan.start_step,
            fast_forward=is_first or not self.left_alone,
            clock=world.clock,
            **arguments,
        )

    def live(self, sizes: Sizes, saved: str | None, start: int, cut: Cut | None) -> str | None:
        """Live until the cut, and return the state; or to the end of the run."""
        state = json.loads(saved) if saved is not None else None
        place = self.place if self.left_alone else 0
        world = Life(self.plan, self.paid, start, self.next_epoch, place, self.by_set_epoch)
        with plans.use_wall_clock(world):
            return self.live_in(world, sizes, state, cut)

    def live_in(self, world: Life, sizes: Sizes, state: Any, cut: Cut | None) -> str | None:
        loop = self.build(world, state is None)
        if state is not None:
            loop.load_state_dict(state)
        if self.judge is not None:
            self.judge.launched(loop)
        trigger(loop, world, -1)
        self.laps = {}
        self.launched_at = loop.global_step, to_ns(loop.state.elapsed)
        body = 0
        try:
            pairs = iter(loop) if sizes is None else loop.chunks(sizes)
            for batch, events in pairs:
                body += 1
                done = cut.done if cut is not None and cut.body == body else None
                steps = batch if sizes is not None else [batch]
                if done is False:
                    self.next_epoch = loop.epoch
                    self.place = self.batches_of(steps)[0][1]
                    return json.dumps(loop.state_dict(step_done=False))
                self.note(loop, steps, events)
                self.place = self.batches_of(steps)[-1][1] + 1
                if loop.state.epoch_end and self.plan.source.kind != "single-pass":
                    self.place = 0
                trigger(loop, world, body - 1)
                self.ask_laps(loop, body - 1)
                world.now += in_turn(self.plan.clock.body_costs, loop.global_step)
                self.pause(loop, world)
                self.next_epoch = loop.epoch + loop.state.epoch_end
                goes_on = (None, self.plan.limit, "stop_when" if self.judge else None)
                if done and loop.stop_reason in goes_on:
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

    def batches_of(self, steps: list[Any]) -> list[Any]:
        if self.plan.batches_per_step is None:
            return steps
        return [batch for batches in steps for batch in batches]

    def ask_laps(self, loop: Loop[Any], body: int) -> None:
        """At a body's begin, when the clock shows what it did when the step was handed over."""
        for lap in self.plan.laps:
            if lap.body == body:
                now = loop.global_step, to_ns(loop.state.elapsed)
                step, time = self.laps.get(lap.label, self.launched_at)
                if step < now[0]:
                    steps, seconds = loop.lap(lap.label)
                    assert (steps, to_ns(seconds)) == (now[0] - step, now[1] - time)
                    self.laps[lap.label] = now

    def pause(self, loop: Loop[Any], world: Life) -> None:
        for pause in self.plan.pauses:
            if pause.body == loop.global_step:
                context = loop.pause_clock()
                context.__enter__()
                world.now += pause.cost
                if not pause.left_open:
                    context.__exit__(None, None, None)
                if self.judge is not None:
                    self.judge.paused += to_ns(pause.cost * self.plan.clock.unit)

    def note(self, loop: Loop[Any], batches: list[Any], events: Any) -> None:
        names = frozenset(events)
        step = loop.global_step
        known = [name for name, _ in self.plan.events] + list(OWN)
        for name in known:
            window = step - self.last_fired.get(name, self.plan.start_step - 1)
            assert loop.steps_since(name) == window, name
            if name in names:
                self.last_fired[name] = step
        elapsed = loop.state.elapsed if self.timed else None
        self.steps.append((batches, names, counters(loop.state), elapsed))
        if self.judge is not None:
            self.judge.handed_over(loop, len(batches), names)

    def flat(self) -> list[Any]:
        """Whatever the lists' sizes: every batch, and the steps with events."""
        if self.timed:
            return self.steps
        return [batch for batches, *_ in self.steps for batch in batches] + [
            step[1:] for step in self.steps if step[1]
        ]


class Judge:
    """Says of each step of each life what is due, by the oracle's formulas."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.timed = is_timed(plan)
        self.triggers = Triggers(plan)

    def launched(self, loop: Loop[Any]) -> None:
        now = to_ns(loop.state.elapsed)
        self.triggers = self.triggers.resumed(loop.global_step + 1, now)
        self.triggers.wall_time = to_ns(WALL)
        asked = {name for body, name in self.plan.triggers if body == -1}
        self.triggers.asked = asked & set(dict(self.plan.events))
        self.body = self.paused = 0

    def handed_over(self, loop: Loop[Any], size: int, found: frozenset[Hashable]) -> None:
        state = loop.state
        for back in range(1, size):  # before its last step nothing of a list is due
            step, epoch_step = state.global_step - back, state.epoch_step - back
            assert not self.holding(step)
            assert not any(
                self.triggers.step_due(part, step, epoch_step) for part in single_parts(self.plan)
            )
        assert size == 1 or not self.triggers.asked
        reading = [to_ns(state.elapsed)] if self.timed else []
        now = Now(
            state.global_step,
            state.epoch,
            state.epoch_step,
            state.epoch_end,
            False,
            reading,
            self.paused,
        )
        due = self.triggers.all_due(now) | self.holding(now.global_step)
        own = {EPOCH_END} if state.epoch_end else set()
        if own & set(self.plan.stop_when or ()):
            due.add(STOP_WHEN)
        own |= {TRAINING_END} if state.training_end else set()
        due |= {name for name, joined in self.plan.events if own & set(joined)}
        self.triggers.handed_over(now, due)
        assert found - set(OWN) == due - {STOP_WHEN}
        assert (loop.stop_reason == "stop_when") == (STOP_WHEN in due)
        asked = {name for body, name in self.plan.triggers if body == self.body}
        if loop.stop_reason is None:
            self.triggers.asked = asked & set(dict(self.plan.events))
        self.body += 1

    def holding(self, step: int) -> set[Hashable]:
        """The names that have a condition which holds at this step."""
        return {
            name
            for name, joined in owners(self.plan)
            for part in joined
            if isinstance(part, Part) and part.condition is not None
            if in_window(part, step) and in_turn(part.condition.answers, step)
        }


def judge(plan: Plan, sequence: list[Cut], sizes: Sizes, left_alone: bool) -> None:
    whole = Run(plan)
    try:
        with use_core(CORES[0]):
            whole.live(sizes, None, 5, None)
    except ValueError:
        event("refused")
        return
    parts, saved, start = Run(plan, left_alone), None, 5
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
@settings(max_examples=40)
@given(data=st.data())
def test_a_run_in_lives_is_the_run_that_was_never_stopped(label: str, data: Any) -> None:
    plan = lasting(resumable(data.draw(plans.plans(label))))
    sequence = data.draw(st.lists(cuts(), min_size=1, max_size=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        judge(plan, sequence, plan.entries[0], data.draw(plans.one_in(3)))
    texts = {str(warning.message) for warning in caught}
    assert not [text for text in texts if "was saved of" in text]  # nothing has changed


@pytest.mark.no_core
@pytest.mark.parametrize("label", plans.SOURCES)
@settings(max_examples=40)
@given(data=st.data())
def test_each_life_fires_what_is_due_by_its_launch_and_by_what_was_saved(
    label: str, data: Any
) -> None:
    plan = resumable(data.draw(plans.plans(label)))
    sequence = data.draw(st.lists(cuts(), min_size=1, max_size=4))
    run, saved, start, sizes = Run(plan), None, 5, plan.entries[0]
    run.judge = Judge(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)
        for life, cut in enumerate([*sequence, None]):
            with use_core(CORES[life % len(CORES)]):
                try:
                    saved = run.live(sizes, saved, start, cut)
                except ValueError:
                    event("refused")
                    return
            if cut is None or saved is None:
                break
            event("resumed")
            start, sizes = cut.start, cut.sizes


@pytest.mark.no_core
@pytest.mark.parametrize("label", plans.SOURCES)
@settings(max_examples=40)
@given(data=st.data())
def test_a_run_that_begins_at_a_step_is_the_rest_of_the_whole_run(label: str, data: Any) -> None:
    plan = without_time(lasting(resumable(data.draw(plans.plans(label)))))
    if plan.source.says_end is not None:
        # on the way, such a loader may be believed, or its length, or what it really has
        source = dataclasses.replace(plan.source, promised=None, says_end="truly")
        plan = dataclasses.replace(plan, source=source)
    start = data.draw(st.integers(1, 14))
    whole, rest = Run(plan, by_set_epoch=True), Run(dataclasses.replace(plan, start_step=start))
    with warnings.catch_warnings(), use_core(data.draw(st.sampled_from(CORES))):
        warnings.simplefilter("ignore", LoopWarning)
        try:
            whole.live(None, None, 5, None)
        except ValueError:
            event("refused")
            return
        if whole.end != (plan.limit,) and start >= len(whole.steps):
            event("the whole run ends before, unforeseen")
            return
        rest.live(None, None, 5, None)
    event("compared")
    assert rest.steps == whole.steps[start:]
    if plan.source.kind != "single-pass":  # a stream that ends on the way is exhausted
        assert rest.end == whole.end


# ----------------------------------------------------------------------------- the ends of a run


def json_of(loop: Loop[Any], step_done: bool = True) -> Any:
    return json.loads(json.dumps(loop.state_dict(step_done)))


def after(steps: int, loop: Loop[Any]) -> Any:
    """The state that is saved in the body of that step, counted from 1."""
    for _ in itertools.islice(loop, steps):
        pass
    return json_of(loop)


def batches(loop: Loop[Any]) -> list[Any]:
    return [batch for batch, _events in loop]


def known_len(loop: Loop[Any]) -> int | None:
    try:
        return len(loop)
    except TypeError:
        return None


def resumed(loop: Loop[Any], state: Any) -> Loop[Any]:
    loop.load_state_dict(state)
    return loop


class Ticks:
    """A clock that a test moves."""

    def __init__(self, now: float = 0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_state_from_before_the_first_step_is_a_new_run() -> None:
    state = json_of(Loop(range(3), max_epochs=2))
    loop = resumed(Loop(range(3), max_epochs=2), state)
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (0, -1, -1)
    assert batches(loop) == [0, 1, 2] * 2


def test_the_counters_are_those_of_the_saved_step() -> None:
    loop = resumed(Loop(range(3), max_epochs=3), after(5, Loop(range(3), max_epochs=3)))
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (1, 4, 1)
    assert counters(loop.state) == (1, 4, 1, False, False)
    assert loop.stop_reason is None
    assert len(loop) == 4


LIMITS = [{"max_steps": 4}, {"max_epochs": 2}, {"max_seconds": 4}]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: next(iter(limit)))
def test_a_finished_run_yields_nothing_quietly(limit: dict[str, int]) -> None:
    def make() -> Loop[Any]:
        ticks = itertools.count()
        return Loop([0, 1], {"T": Event(every_n_seconds=1)}, clock=lambda: next(ticks), **limit)

    loop = resumed(make(), after(100, make()))
    assert loop.stop_reason == next(iter(limit))
    assert not loop.state.training_end
    for _ in range(3):
        assert list(loop) == list(loop.chunks(2)) == []
    assert len(loop) == 0
    loop.restart()
    assert loop.stop_reason is None
    assert batches(loop) == [0, 1] * 2


def test_a_run_that_stop_when_ended_goes_on() -> None:
    def make() -> Loop[Any]:
        return Loop(range(6), max_epochs=1, stop_when=Event(at_step=2))

    loop = resumed(make(), after(100, make()))
    assert loop.stop_reason is None
    assert batches(loop) == [3, 4, 5]


def test_a_limit_that_was_raised_lets_the_run_go_on() -> None:
    state = after(100, Loop(range(3), max_epochs=1))
    with pytest.warns(LoopWarning, match=r"max_epochs.*1.*2|1.*max_epochs.*2"):
        loop = resumed(Loop(range(3), max_epochs=2), state)
    assert batches(loop) == [0, 1, 2]


def test_loading_is_for_runs_that_have_not_begun() -> None:
    state = after(1, Loop(range(3), max_epochs=1))
    loop = Loop(range(3), max_epochs=1)
    iter(loop)
    with pytest.raises(LoopError):
        loop.load_state_dict(state)
    assert batches(loop) == [0, 1, 2]


@pytest.mark.parametrize("state", [None, 3, [], "state", {}, {"version": 99}, {"version": "1"}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    loop = Loop(range(3), max_epochs=1)
    with pytest.raises(StateError):
        loop.load_state_dict(state)
    assert batches(loop) == [0, 1, 2]


def test_the_state_is_the_callers_own() -> None:
    loop = Loop(range(9), {"E": Event(every_n_steps=2)}, max_epochs=1)
    pairs = iter(loop)
    next(pairs)
    state = loop.state_dict()
    before = json.dumps(state)
    for _ in pairs:
        pass
    assert json.dumps(state) == before
    other = resumed(Loop(range(9), {"E": Event(every_n_steps=2)}, max_epochs=1), state)
    assert batches(other) == list(range(1, 9))
    assert json.dumps(state) == before


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("step_done", [True, False])
def test_a_run_whose_last_epoch_should_have_ended_where_it_failed_is_over(
    epochs: int, step_done: bool
) -> None:
    def loader() -> Iterator[int]:
        yield from range(3)
        if next(fails):
            raise OSError("the store is gone")

    fails = itertools.chain([False] * (epochs - 1), [True], itertools.repeat(False))
    loop = Loop(loader, max_epochs=epochs)
    with pytest.raises(OSError, match="gone"):
        batches(loop)
    assert (loop.epoch, loop.epoch_step) == (epochs - 1, 2)
    again = resumed(Loop(loader, max_epochs=epochs), json_of(loop, step_done))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)  # of skipping, and of what is missing
        assert batches(again) == ([] if step_done else [2])
    assert again.stop_reason == "max_epochs"
    assert (again.epoch, again.global_step) == (epochs - 1, 3 * epochs - 1)


@pytest.mark.parametrize("now", [5, 4, 3])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("enter", [iter, lambda loop: loop.chunks(2)], ids=["steps", "lists"])
def test_a_run_whose_last_epoch_is_shorter_now_is_over(now: int, sized: bool, enter: Any) -> None:
    def make(length: int) -> Loop[Any]:
        data = list(range(length))
        return Loop(data if sized else lambda: iter(data), max_epochs=2)

    state = after(6 + 5, make(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)  # of the length, of skipping
        again = resumed(make(now), state)
        assert known_len(again) in (None, 0)
        assert list(enter(again)) == []
    assert again.stop_reason == "max_epochs"
    assert again.epoch == 1


# ------------------------------------------------------------------------------ step_done=False


@pytest.mark.parametrize("step", range(1, 9))
def test_a_step_that_is_not_done_comes_again_with_its_events(step: int) -> None:
    clock = Ticks()
    events = {
        "N": Event(every_n_steps=2),
        "T": Event(every_n_seconds=2),
        "At": Event(at_time=(1, 3)),
        "Epoch": Event(every_n_epochs=1),
    }

    def loader() -> Iterator[int]:
        for place in range(4):
            clock.now += place not in paid
            paid.add(place)
            yield place

    def make() -> Loop[Any]:
        return Loop(loader, events, max_epochs=2, clock=clock, dataloader_len=4)

    def look(loop: Loop[Any], pair: Any) -> Any:
        batch, fired = pair
        windows = [loop.steps_since(name) for name in events]
        return batch, frozenset(fired), windows, counters(loop.state), loop.state.elapsed

    paid: set[int] = set()
    loop = make()
    for pair in itertools.islice(loop, step):
        before = look(loop, pair)
    state = json_of(loop, step_done=False)
    clock.now = -100
    again = make()
    again.load_state_dict(state)
    assert again.global_step == step - 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopWarning)  # of skipping
        assert look(again, next(iter(again))) == before


@pytest.mark.parametrize("sizes", [3, (3, 1), (4, 2, 1)])
def test_a_list_that_is_not_done_comes_again(sizes: Any) -> None:
    loop = Loop(range(20), max_epochs=1)
    pairs = loop.chunks(sizes)
    next(pairs)
    latest, _ = next(pairs)
    state = json_of(loop, step_done=False)
    again = resumed(Loop(range(20), max_epochs=1), state)
    assert next(again.chunks(sizes))[0] == latest


@pytest.mark.parametrize("leave", ["with", "iter", "chunks", "step"])
def test_a_list_that_is_not_done_comes_again_whatever_was_entered_since(leave: str) -> None:
    loop = Loop(range(20), max_epochs=1)
    pairs = loop.chunks(4)
    next(pairs)
    assert next(pairs)[0] == [4, 5, 6, 7]
    comes_again = 4
    if leave == "with":
        loop.close()
    elif leave == "chunks":
        loop.chunks(3)
    else:
        pairs = iter(loop)
        if leave == "step":
            comes_again, _ = next(pairs)
    again = resumed(Loop(range(20), max_epochs=1), json_of(loop, step_done=False))
    assert next(iter(again))[0] == comes_again


@pytest.mark.parametrize("stopped_at", range(5))
def test_a_run_that_was_stopped_when_its_time_was_up_is_over(stopped_at: int) -> None:
    def make() -> Loop[Any]:
        return Loop(range(20), max_seconds=3, clock=lambda: next(seconds))

    seconds = itertools.count()  # one more at each reading, which are the start and the steps
    loop = make()
    for _ in loop:
        if loop.global_step == stopped_at:
            loop.stop()
    is_over = loop.state.elapsed >= 3
    again = resumed(make(), json_of(loop))
    assert (next(iter(again), None) is None) == is_over


# ------------------------------------------------------------------------ in the middle of a step


@pytest.mark.parametrize("sizes", [None, 3])
@pytest.mark.parametrize("where", ["loader", "condition", "clock"])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_state_in_the_middle_of_a_step_is_that_of_the_step_before(
    where: str, step: int, sizes: Sizes
) -> None:
    """As a signal's handler takes it, which runs wherever the loop is."""
    saved: list[Any] = []
    before: list[int] = []
    seconds = itertools.count(100)

    def reach(place: str, reached: int) -> None:
        if place == where and reached == step and not saved:
            before.append(loop.global_step)
            signal.raise_signal(signal.SIGTERM)

    class Loader:
        def __iter__(self) -> Iterator[int]:
            for number in range(9):
                reach("loader", number)
                yield number

        def __len__(self) -> int:
            return 9

    def condition(state: StateLike) -> bool:
        reach("condition", state.global_step)
        return False

    readings = itertools.count(-1)

    def clock() -> int:
        reach("clock", next(readings))
        return next(seconds)

    events = {
        "Once": Event(at_time=(2, 4)),
        "Often": Event(every_n_seconds=2),
        "Condition": Event(condition),
    }

    def make() -> Loop[Any]:
        return Loop(Loader(), events, max_epochs=1, clock=clock)

    def live(loop: Loop[Any]) -> list[Any]:
        found = []
        for batch, due in loop if sizes is None else loop.chunks(sizes):
            found.append((batch, frozenset(due), loop.global_step))
        return found

    former = signal.signal(signal.SIGTERM, lambda *_: saved.append(json_of(loop)))
    try:
        loop = make()
        whole = live(loop)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert [state["steps"] for state in saved] == [at + 1 for at in before]
    assert len(saved) == (1 if sizes is None or where != "clock" or step < 3 else 0)
    for state in saved:
        last = before[0]
        elapsed = state["elapsed"] // 10**9
        done = [due for _, due, at in whole if at <= last]
        assert state["timers"] == timers_after(make, sizes, done)
        assert elapsed >= len(done)


def timers_after(make: Callable[[], Loop[Any]], sizes: Sizes, done: list[Any]) -> Any:
    """What the timers remember after so many lists or steps of the same run."""
    loop = make()
    pairs = iter(loop) if sizes is None else loop.chunks(sizes)
    for due in done:
        assert next(pairs)[1] == due
    return json_of(loop)["timers"]


# ------------------------------------------------------------------------------------ per_launch


def test_per_launch_criteria_start_afresh() -> None:
    clock = Ticks()
    events = {
        "launch": Event(at_time=3, per_launch=True),
        "ever": Event(at_time=3),
        "launch period": Event(every_n_seconds=3, per_launch=True),
    }

    def make() -> Loop[Any]:
        return Loop(itertools.count(), events, max_steps=100, clock=clock, lookahead=False)

    def live(loop: Loop[Any]) -> dict[Hashable, list[int]]:
        fired: dict[Hashable, list[int]] = {name: [] for name in events}
        for _batch, names in itertools.islice(loop, 6):
            for name in names:
                fired[name].append(loop.global_step)
            clock.now += 1
        return fired

    loop = make()
    assert live(loop) == {"launch": [3], "ever": [3], "launch period": [3]}
    state = json_of(loop)
    clock.now = 1e6
    again = make()
    again.load_state_dict(state)
    assert live(again) == {"launch": [9], "ever": [], "launch period": [9]}


def test_a_jobs_own_time_limit_starts_afresh() -> None:
    clock = Ticks()

    def make() -> Loop[Any]:
        stop_when = Event(at_time=3, per_launch=True)
        return Loop(range(100), max_epochs=1, stop_when=stop_when, clock=clock)

    state, lives = None, []
    for _ in range(3):
        loop = make()
        if state is not None:
            loop.load_state_dict(state)
        lives.append([])
        for batch, _events in loop:
            lives[-1].append(batch)
            clock.now += 1
        state = json_of(loop)
        clock.now = -50
    assert lives == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


# -------------------------------------------------------------------------------- changed plans

EVENTS = {"kept": Event(every_n_steps=4), "gone": Event(every_n_steps=3)}


def change(loop: Loop[Any], match: str) -> None:
    with pytest.warns(LoopWarning, match=match) as caught:
        loop.load_state_dict(after(5, Loop(range(20), EVENTS, max_epochs=1)))
        assert next(iter(loop))[0] == 5  # a length is known once the epoch is opened
    assert len(caught) == 1


def test_an_unchanged_plan_loads_quietly() -> None:
    state = after(5, Loop(range(20), EVENTS, max_epochs=1))
    reordered = dict(reversed(EVENTS.items()))
    assert resumed(Loop(range(20), reordered, max_epochs=1), state).global_step == 4


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (lambda: Loop(range(20), {**EVENTS, "fresh": Event(at_step=9)}, max_epochs=1), "fresh"),
        (lambda: Loop(range(20), {"kept": EVENTS["kept"]}, max_epochs=1), "gone"),
        (lambda: Loop(range(20), {**EVENTS, "gone": Event(at_step=9)}, max_epochs=1), "gone"),
        (lambda: Loop(range(20), EVENTS, max_epochs=2), "max_epochs"),
        (lambda: Loop(range(20), EVENTS, max_steps=30), "max_steps"),
        (lambda: Loop(range(30), EVENTS, max_epochs=1), "20.*30"),
        (lambda: Loop(range(20), EVENTS, max_epochs=1, dataloader_len=10), "10"),
    ],
    ids=["added", "removed", "changed", "limit's value", "limit", "length", "dataloader_len"],
)
def test_a_changed_plan_warns_and_says_what_changed(
    changed: Callable[[], Loop[Any]], match: str
) -> None:
    change(changed(), match)


def test_new_events_count_from_the_resume() -> None:
    clock = Ticks()
    old = {"kept": Event(every_n_seconds=4)}
    new = {
        "kept": Event(every_n_seconds=6),
        "timer": Event(every_n_seconds=2),
        "past": Event(at_time=2),
        "to come": Event(at_time=7),
        "steps": Event(every_n_steps=4),
    }
    loop = Loop(range(20), old, max_epochs=1, clock=clock)
    for _ in itertools.islice(loop, 6):  # kept fires at 4 seconds
        clock.now += 1
    clock.now -= 1
    state = json_of(loop)  # at 5 seconds
    again = Loop(range(20), new, max_epochs=1, clock=clock)
    with pytest.warns(LoopWarning, match="kept.*|timer"):
        again.load_state_dict(state)
    clock.now = 1000
    fired: dict[Hashable, list[int]] = {name: [] for name in new}
    windows = {}
    for _batch, names in itertools.islice(again, 8):  # step 6 is at 5 seconds, and so on
        for name in names:
            fired[name].append(again.global_step)
            windows.setdefault(name, again.steps_since(name))
        clock.now += 1
    assert fired == {
        "kept": [11],
        "timer": [8, 10, 12],
        "past": [],
        "to come": [8],
        "steps": [7, 11],
    }
    assert windows == {"kept": 7, "timer": 3, "to come": 3, "steps": 2}


# ---------------------------------------------------------------------------------- event names


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


STORABLE = ["a", "", 7, -(2**70), True, None, Colour.RED, ("a", (1, Colour.RED)), ()]


def windows_after_a_resume(names: list[Hashable]) -> list[int]:
    """Of names whose events have fired at steps of their own, told by where they fired last."""
    events = {name: Event(at_step=i) for i, name in enumerate(names)}
    loop = Loop(range(30), events, max_epochs=1)
    state = after(len(names), loop)
    again = Loop(range(30), dict(reversed(events.items())), max_epochs=1)
    again.load_state_dict(state)
    next(iter(again))
    return [again.steps_since(name) for name in names]


def test_names_are_stored_as_what_they_are() -> None:
    expected = [len(STORABLE) - i for i in range(len(STORABLE))]
    assert windows_after_a_resume(STORABLE) == expected


def test_names_that_look_alike_are_told_apart() -> None:
    names = ["1", 1, ("1",), (1,), "None", None, "True", Colour.RED, "Colour.RED", "EPOCH_END"]
    assert windows_after_a_resume(names) == list(range(len(names), 0, -1))


@pytest.mark.parametrize("name", [1.5, frozenset({1}), object(), b"a", ("a", 1.5)], ids=repr)
def test_a_name_that_cannot_be_stored_goes_by_its_position(name: Hashable) -> None:
    events = {"first": Event(at_step=0), name: Event(at_step=1), "last": Event(at_step=2)}
    loop = Loop(range(9), events, max_epochs=1)
    for _ in itertools.islice(loop, 4):
        pass
    with pytest.warns(LoopWarning, match="name|position"):
        state = json_of(loop)
    other = {"first": events["first"], object(): events[name], "last": events["last"]}
    again = resumed(Loop(range(9), other, max_epochs=1), state)
    next(iter(again))
    assert [again.steps_since(key) for key in other] == [4, 3, 2]


# ----------------------------------------------------------------------- loaders with own state


class Shuffled:
    """A loader in an order that nobody can repeat without its state, which it keeps."""

    runs = itertools.count()

    def __init__(self, length: int = 6) -> None:
        self.length = length
        self.seed = 1000 * next(self.runs)
        self.at = 0
        self.loaded = False

    def begin(self) -> None:
        if not self.loaded:
            self.seed += 1
            self.at = 0
        self.loaded = False

    def take(self) -> int:
        if self.at == self.length:
            raise StopIteration
        self.at += 1
        return self.order()[self.at - 1]

    def order(self) -> list[int]:
        return random.Random(self.seed).sample(range(self.length), self.length)

    def get(self) -> Any:
        return {"seed": self.seed, "at": self.at}

    def put(self, state: Any) -> None:
        self.seed, self.at, self.loaded = state["seed"], state["at"], True


class StatefulLoader(Shuffled):
    """With the state of an epoch's end it comes back exhausted, once."""

    def __iter__(self) -> Iterator[int]:
        self.begin()
        for _ in range(self.at, self.length):
            yield self.take()

    state_dict, load_state_dict = Shuffled.get, Shuffled.put


class NotBeforeTheFirst(StatefulLoader):
    """Its state must not be taken before the first batch."""

    def state_dict(self) -> Any:
        assert self.at, "asked before the first batch"
        return self.get()


class BeginsAnew(StatefulLoader):
    """With the state of an epoch's end it has the next epoch before it, and not an empty rest."""

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.loaded = self.at < self.length


class Prefetching(StatefulLoader):
    """It works three batches ahead, and knows in its state what it has handed out."""

    def __iter__(self) -> Iterator[int]:
        self.begin()
        order, queue = self.order(), []
        place, self.given = self.at, self.at
        while place < self.length or queue:
            while place < self.length and len(queue) < 3:
                queue.append(order[place])
                place += 1
            self.given += 1
            self.at = self.given
            yield queue.pop(0)


class LateWorkers(StatefulLoader):
    """Two workers in turn; a resumed one says that it is at its start until it gave a batch."""

    def __init__(self, length: int = 6) -> None:
        super().__init__(length)
        self.places = self.told = [0, 0]
        self.turn = 0

    def __iter__(self) -> Iterator[int]:
        if self.loaded:
            self.told = [0, 0]
        else:
            self.places, self.turn, self.told = [0, 0], 0, [0, 0]
        self.begin()
        order = self.order()
        while self.places[self.turn] < len(order[self.turn :: 2]):
            worker = self.turn
            number = order[worker::2][self.places[worker]]
            self.places[worker] += 1
            self.told[worker] = self.places[worker]
            self.turn = 1 - worker
            yield number

    def state_dict(self) -> Any:
        return {"seed": self.seed, "at": 0, "told": list(self.told), "turn": self.turn}

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.places, self.turn = list(state["told"]), state["turn"]
        self.loaded = sum(self.places) < self.length


class CountsTwice(StatefulLoader):
    """Like torchdata's of a data set without a state: once resumed, it counts wrong."""

    dataset = type("Stream", (), {"__iter__": None})()
    counted = 0

    def __iter__(self) -> Iterator[int]:
        self.begin()
        if self.at > self.length:
            self.loaded = True
            raise StopIteration
        self.counted = self.at
        return self.rest()

    def rest(self) -> Iterator[int]:
        while self.at < self.length:
            yield self.take()

    def state_dict(self) -> Any:
        return {"seed": self.seed, "at": self.at + self.counted}

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.loaded = self.at != self.length


class WithStatefulIterator(Shuffled):
    """Like Grain's: the iterator has get_state and set_state."""

    class Iterator:
        def __init__(self, loader: Shuffled) -> None:
            self.loader = loader
            loader.begin()

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            return self.loader.take()

        def get_state(self) -> Any:
            return self.loader.get()

        def set_state(self, state: Any) -> None:
            self.loader.put(state)
            self.loader.loaded = False

    def __iter__(self) -> Any:
        return self.Iterator(self)


class WithStateDictIterator(WithStatefulIterator):
    class Iterator(WithStatefulIterator.Iterator):
        state_dict = WithStatefulIterator.Iterator.get_state
        load_state_dict = WithStatefulIterator.Iterator.set_state
        get_state = set_state = None


LOADERS = [
    StatefulLoader,
    NotBeforeTheFirst,
    BeginsAnew,
    Prefetching,
    LateWorkers,
    CountsTwice,
    WithStatefulIterator,
    WithStateDictIterator,
]


def sized(kind: type[Shuffled]) -> type[Shuffled]:
    return type(f"Sized{kind.__name__}", (kind,), {"__len__": lambda self: self.length})


@pytest.mark.parametrize("sizes", [None, 4, (2, 1)], ids=["plain", "chunks 4", "chunks 2 or 1"])
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("most_again", [100, 2])
@pytest.mark.parametrize("kind", [*LOADERS, *map(sized, LOADERS)])
def test_a_loader_of_unknown_order_gives_each_sample_once(
    kind: type[Shuffled],
    most_again: int,
    lookahead: Any,
    sizes: Sizes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_state, "MOST_AGAIN", most_again)
    for every in (1, 2, 3, 5):
        seen: list[int] = []
        state = None
        for _life in range(40):
            loop: Loop[Any] = Loop(
                kind(), max_epochs=3, lookahead=True if lookahead is True else None
            )
            if state is not None:
                loop.load_state_dict(state)
            pairs = iter(loop) if sizes is None else loop.chunks(sizes)
            for batch, _events in itertools.islice(pairs, every):
                seen += [batch] if sizes is None else batch
            state = json_of(loop)
            if loop.stop_reason is not None:
                break
        epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3, every


@pytest.mark.parametrize("kind", [*LOADERS, *map(sized, LOADERS)])
def test_a_loader_of_unknown_order_redoes_a_step(kind: type[Shuffled]) -> None:
    for steps in (2, 3, 6, 7, 9):
        loop: Loop[Any] = Loop(kind(), max_epochs=2)
        seen = [batch for batch, _ in itertools.islice(loop, steps)]
        again: Loop[Any] = Loop(kind(), max_epochs=2)
        again.load_state_dict(json_of(loop, step_done=False))
        seen[-1:] = batches(again)
        assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)), steps


def in_lives(make: Callable[[], Loop[Any]], counts: Iterator[int]) -> list[int]:
    """The batches of a run, each of whose lives makes so many steps, and of its rest."""
    seen: list[int] = []
    state = None
    for count in counts:
        loop = make()
        if state is not None:
            loop.load_state_dict(state)
        seen += [batch for batch, _ in itertools.islice(loop, count)]
        state = json_of(loop)
        if loop.stop_reason is not None:
            break
    return seen


@pytest.mark.filterwarnings("ignore:epoch .* had more than:dloop.LoopWarning")
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cut", ["dataloader_len", "len()", "len(), lookahead=False"])
@pytest.mark.parametrize("kind", LOADERS)
def test_after_an_epoch_that_was_cut_a_resumed_loader_begins_a_fresh_one(
    kind: type[Shuffled], cut: str, every: int
) -> None:
    """Its state at the end of the first four batches has the epoch's other two before it."""
    loader: Callable[[], Any] = kind
    arguments: dict[str, Any] = {"dataloader_len": 4}
    if cut != "dataloader_len":
        if kind is CountsTwice:
            pytest.skip("a length over an iterable-style data set is none")
        loader = type(f"Promises4{kind.__name__}", (kind,), {"__len__": lambda self: 4})
        arguments = {"lookahead": False} if "False" in cut else {}
    seen = in_lives(lambda: Loop(loader(), max_epochs=3, **arguments), itertools.repeat(every, 99))
    epochs = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert [len(set(epoch)) for epoch in epochs] == [4, 4, 4]


@pytest.mark.parametrize("kind", [StatefulLoader, WithStatefulIterator, WithStateDictIterator])
def test_a_run_of_cut_epochs_in_lives_is_the_run_that_was_never_stopped(
    kind: type[Shuffled],
) -> None:
    def make() -> Loop[Any]:
        loader = kind()
        loader.seed = 0
        return Loop(loader, max_epochs=3, dataloader_len=4)

    whole = batches(make())
    for every in (1, 2, 3, 4, 5, 8):
        assert in_lives(make, itertools.repeat(every, 99)) == whole, every


class DrawsItsOrder:
    """A loader that draws its order anew in each epoch: no state tells that of the next one."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.order: list[int] = []
        self.at = 0
        self.loaded = False

    def __iter__(self) -> Iterator[int]:
        if not self.loaded:
            self.order, self.at = self.draw.sample(range(6), 6), 0
        self.loaded = False
        while self.at < len(self.order):
            self.at += 1
            yield self.order[self.at - 1]

    def state_dict(self) -> Any:
        return {"order": list(self.order), "at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.order, self.at, self.loaded = list(state["order"]), state["at"], True


class SizedDrawsItsOrder(DrawsItsOrder):
    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("kind", [DrawsItsOrder, SizedDrawsItsOrder])
@pytest.mark.parametrize("series", range(20))
def test_an_order_that_is_drawn_anew_gives_each_sample_once_in_any_lives(
    kind: type[DrawsItsOrder], lookahead: bool | None, series: int
) -> None:
    draw = random.Random(series)

    def counts() -> Iterator[int]:
        while True:
            yield draw.randint(1, 7)

    seen = in_lives(lambda: Loop(kind(draw), max_epochs=4, lookahead=lookahead), counts())
    epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 4


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("kind", [DrawsItsOrder, SizedDrawsItsOrder])
def test_an_order_that_was_drawn_after_a_resume_at_an_epochs_end_is_kept(
    kind: type[DrawsItsOrder], lookahead: bool | None
) -> None:
    for second in (1, 2, 3, 4, 5):
        seen = in_lives(
            lambda: Loop(kind(random.Random()), max_epochs=3, lookahead=lookahead),
            iter([6, second, 99]),
        )
        epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3, second


def ended_after(steps: int, end: str, loader: Shuffled, lookahead: Any) -> tuple[list[int], Any]:
    """What a run gave that came to such an `end`, and the state that was taken after that."""
    limit = {"max_steps": steps} if end == "limit" else {"max_epochs": 3}
    stop_when = Event(at_step=steps - 1) if end == "stop_when" else None
    loop: Loop[Any] = Loop(
        loader, lookahead=lookahead, on_exception="event", stop_when=stop_when, **limit
    )
    seen = []
    with contextlib.ExitStack() as stack:
        if end == "with":
            stack.enter_context(loop)
        for batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                return seen, json_of(loop)
            seen.append(batch)
            if len(seen) == steps and end == "with":
                break
            with loop.guard():
                assert len(seen) != steps or end != "guard"
    return seen, json_of(loop)


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("end", ["with", "guard", "stop_when", "limit"])
@pytest.mark.parametrize("kind", [*LOADERS, *map(sized, LOADERS)])
def test_a_run_that_has_ended_keeps_its_loaders_state(
    kind: type[Shuffled], end: str, lookahead: Any
) -> None:
    for steps in range(1, 15):
        seen, state = ended_after(steps, end, kind(), lookahead)
        again: Loop[Any] = Loop(kind(), max_epochs=3, lookahead=lookahead)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopWarning)  # the plan has changed
            again.load_state_dict(state)
        seen += batches(again)
        epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3, steps


@pytest.mark.parametrize("step_done", [True, False])
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("kind", [*LOADERS, *map(sized, LOADERS)])
def test_ctrl_c_in_an_epochs_first_fetch_leaves_the_state_of_the_one_before(
    kind: type[Shuffled], lookahead: Any, step_done: bool
) -> None:
    class Struck(kind):  # type: ignore[misc, valid-type]
        def begin(self) -> None:
            if next(begun) == 1:
                raise KeyboardInterrupt
            super().begin()

    begun = itertools.count()
    loop: Loop[Any] = Loop(Struck(), max_epochs=3, lookahead=lookahead)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _events in loop)
    state = json_of(loop, step_done)
    again: Loop[Any] = Loop(kind(), max_epochs=3, lookahead=lookahead)
    again.load_state_dict(state)
    seen[len(seen) - (not step_done) :] = batches(again)
    epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3


@pytest.mark.parametrize("at", range(1, 14))
def test_an_error_of_the_loader_leaves_the_state_of_before(at: int) -> None:
    class Fails(StatefulLoader):
        def take(self) -> int:
            if next(takes) == at - 1:
                self.seed = -1  # what it tells after that is of no use
                raise ConnectionError("the store is gone")
            return super().take()

    takes = itertools.count()
    seen: list[int] = []
    loop: Loop[Any] = Loop(Fails(), max_epochs=3)
    with pytest.raises(ConnectionError):
        seen.extend(batch for batch, _events in loop)
    again: Loop[Any] = Loop(StatefulLoader(), max_epochs=3)
    again.load_state_dict(json_of(loop))
    seen += batches(again)
    epochs = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3


def test_few_batches_are_fetched_again_where_the_loop_looks_ahead() -> None:
    state = after(950, Loop(StatefulLoader(1000), max_epochs=1))
    loader = StatefulLoader(1000)
    loop = resumed(Loop(loader, max_epochs=1), state)
    assert len(batches(loop)) == 50
    assert state["loader"]["at"] in range(850, 950)


@pytest.mark.parametrize("steps", [3, 6, 7])
@pytest.mark.parametrize("kind", [StatefulLoader, WithStatefulIterator])
def test_a_loader_that_has_lost_its_state_is_skipped(kind: type[Shuffled], steps: int) -> None:
    state = after(steps, Loop(kind(), max_epochs=2))

    def loader() -> Iterator[int]:
        yield from range(6)

    loop = resumed(Loop(loader, max_epochs=2), state)
    assert batches(loop) == [*range(6), *range(6)][steps:]


def test_a_sequence_is_set_forward_without_touching_its_items() -> None:
    touched: list[int] = []

    class Items:
        def __getitem__(self, index: int) -> int:
            touched.append(index)
            return range(4)[index]

    for sequence in ([0, 1, 2, 3], (0, 1, 2, 3), range(4), "0123", Items()):
        state = after(2, Loop(sequence, max_epochs=1))
        touched.clear()
        loop = resumed(Loop(sequence, max_epochs=1), state)
        assert [int(batch) for batch in batches(loop)] == [2, 3]
    assert touched == [2, 3, 4]


def test_a_shuffle_without_a_seed_is_warned_of() -> None:
    class RandomSampler:
        generator = None

    class Loader:
        sampler = RandomSampler()

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[int]:
            yield from random.sample(range(4), 4)

    state = after(2, Loop(Loader(), max_epochs=1))
    loop = resumed(Loop(Loader(), max_epochs=1), state)
    with pytest.warns(LoopWarning, match="shuffle|order|seed|generator") as caught:
        assert len(batches(loop)) == 2
    assert len(caught) == 1


def test_set_epoch_is_called_before_the_partial_epoch_is_opened() -> None:
    calls: list[Any] = []

    class Loader(list[int]):
        def set_epoch(self, epoch: int) -> None:
            calls.append(epoch)

        def __iter__(self) -> Iterator[int]:
            calls.append("iter")
            return super().__iter__()

    def make() -> Loop[int]:
        return Loop(Loader(range(3)), max_epochs=3)

    state = after(5, make())
    calls.clear()
    assert batches(resumed(make(), state)) == [2, 0, 1, 2]
    assert calls == [1, "iter", 2, "iter"]
    state = after(6, make())
    calls.clear()
    batches(resumed(make(), state))
    assert calls == [2, "iter"]


# -------------------------------------------------------------------------------- steps_since


def test_steps_since_gives_each_window_its_length() -> None:
    loop = Loop(
        range(40), {"Step": Event(every_n_steps=16) | LoopEvents.TRAINING_END}, max_epochs=1
    )
    assert loop.steps_since("Step") == 0
    found = [loop.steps_since("Step") for _, events in loop if "Step" in events]
    assert found == [16, 16, 8]
    with pytest.raises(KeyError, match="Stop"):
        loop.steps_since("Stop")


def test_elapsed_is_read_when_the_state_is_taken() -> None:
    clock = Ticks()
    loop = Loop(range(5), max_epochs=1, clock=clock)
    next(iter(loop))
    clock.now = 7
    state = json_of(loop)
    clock.now = 90
    again = resumed(Loop(range(5), max_epochs=1, clock=clock), state)
    assert again.state.elapsed == 7
    pairs = iter(again)
    next(pairs)
    clock.now = 92
    assert again.state.elapsed in (7, 9)  # as of the step, once it was looked at


def test_a_run_that_was_loaded_as_over_has_no_next_event() -> None:
    loop = Loop(range(3), max_epochs=1)
    list(loop)
    again = Loop(range(3), max_epochs=1)
    again.load_state_dict(loop.state_dict())
    assert again.steps_to_next_event() is None


def test_counters_that_contradict_each_other_are_damage() -> None:
    loop = Loop(range(3), max_epochs=1)
    next(iter(loop))
    for wrong in (
        {"epoch_steps": 2},
        {"steps": 0, "epoch_steps": 0, "epoch_end": True},
        {"windows": [[["LoopEvents", "EPOCH_END"], 1]]},
    ):
        with pytest.raises(StateError, match="counters"):
            Loop(range(3), max_epochs=1).load_state_dict({**loop.state_dict(), **wrong})


def test_a_state_within_an_epoch_that_has_ended_is_damage() -> None:
    loader: dict[str, Any] = {"state": 0, "at": 3, "whole": False, "cut": False, "rest": 0}
    state = {**after(3, Loop(range(3), max_epochs=2)), "loader": loader}
    with pytest.raises(StateError, match="counters"):
        Loop(range(3), max_epochs=2).load_state_dict(state)


TIMED = {"Often": Event(every_n_seconds=2), "Once": Event(at_time=(1, 9))}
NEAR = 2**62


def of_a_timed_run() -> Any:
    """The state after 4 of 5 steps of an epoch, at a second each; both events were due."""
    seconds = itertools.count()
    return after(5 + 4, Loop(range(5), TIMED, max_epochs=9, clock=lambda: next(seconds)))


def with_timers(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A state in which what is kept of the first event's timers is changed."""

    def edit(state: Any) -> Any:
        (name, timers), *others = state["timers"]
        return {**state, "timers": [[name, change(timers)], *others]}

    return edit


EDITS: dict[str, Callable[[Any], Any]] = {
    "a timer of another kind": with_timers(lambda timers: [["at", timers[0][1]]]),
    "a timer of no kind": with_timers(lambda timers: [["sometimes", timers[0][1]]]),
    "one timer more": with_timers(lambda timers: timers * 2),
    "one timer fewer": with_timers(lambda timers: []),
    "a timer that is no pair": with_timers(lambda timers: [[*timers[0], 1]]),
    "a timer of text": with_timers(lambda timers: "every"),
    "timers of no name": lambda state: {**state, "timers": [["Often"]]},
    "timers of text": lambda state: {**state, "timers": "timers"},
    "timers as a mapping": lambda state: {**state, "timers": {"Often": 1}},
    "a timer that was due after now": with_timers(lambda timers: [["every", NEAR - 1]]),
    "a timer that was due just after now": lambda state: with_timers(
        lambda timers: [["every", state["elapsed"] + 1]]
    )(state),
    "a timer that was due before the start": with_timers(lambda timers: [["every", -2]]),
    "more epochs than steps": lambda state: {**state, "epoch": state["steps"] + 1},
    "far more epochs than steps": lambda state: {**state, "epoch": NEAR},
    "steps beyond the most": lambda state: {**state, "steps": NEAR + 1},
    "time beyond the most": lambda state: {**state, "elapsed": NEAR + 1},
    "a step of the epoch beyond the steps": lambda state: {**state, "epoch_steps": 10},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_a_state_that_was_edited_is_damage(edit: Callable[[Any], Any]) -> None:
    seconds = itertools.count()
    loop = Loop(range(5), TIMED, max_epochs=9, clock=lambda: next(seconds))
    with pytest.raises(StateError) as caught:
        loop.load_state_dict(edit(of_a_timed_run()))
    assert "\n" not in str(caught.value)
    assert batches(loop) == [*range(5)] * 9


FAR: dict[str, Callable[[Any], Any]] = {
    "steps": lambda state: {**state, "steps": NEAR},
    "steps, one fewer": lambda state: {**state, "steps": NEAR - 1},
    "time": lambda state: {**state, "elapsed": NEAR},
    "time, a nanosecond less": lambda state: {**state, "elapsed": NEAR - 1},
    "epochs": lambda state: {**state, "epoch": NEAR - 9, "steps": NEAR},
    "epochs, the last": lambda state: {**state, "epoch": NEAR - 1, "steps": NEAR},
    "steps of the epoch": lambda state: {**state, "epoch_steps": NEAR, "steps": NEAR},
}


@pytest.mark.no_core
@pytest.mark.parametrize("epochs", [2, NEAR])
@pytest.mark.parametrize("edit", FAR.values(), ids=list(FAR))
def test_numbers_near_the_most_are_refused_or_run_alike_in_all_cores(
    edit: Callable[[Any], Any], epochs: int
) -> None:
    def run(core: str) -> object:
        seconds = itertools.count()
        with use_core(core), warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopWarning)
            loop = Loop(range(5), TIMED, max_epochs=epochs, clock=lambda: next(seconds))
            try:
                loop.load_state_dict(edit(of_a_timed_run()))
            except StateError as error:
                return str(error)
            return known_len(loop), [
                (batch, frozenset(due), counters(loop.state), loop.state.elapsed)
                for batch, due in itertools.islice(loop, 20)
            ]

    first, *others = map(run, CORES)
    assert others == [first] * len(others)


class Phase(enum.Enum):
    WARM = 1


def test_a_member_of_an_enum_that_is_gone_is_told_and_not_imported() -> None:
    loop = Loop(range(3), {Phase.WARM: Event(at_step=0)}, max_epochs=1)
    next(iter(loop))
    again = Loop(range(3), max_epochs=1)
    with pytest.warns(LoopWarning, match="removed: .*WARM"):
        again.load_state_dict(json.loads(json.dumps(loop.state_dict())))
    assert len(list(again)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"epoch_end": 1}, {"out_of_time": None}, {"steps": -1}, {"steps": 1.0}],
        {"elapsed": 10**5000},  # which Python does not show
    ],
    ids=["epoch_end", "out_of_time", "steps", "steps, a float", "elapsed"],
)
def test_values_of_the_wrong_kind_are_damage(wrong: dict[str, Any]) -> None:
    state = {**Loop(range(3), max_epochs=1).state_dict(), **wrong}
    with pytest.raises(StateError, match="damaged"):
        Loop(range(3), max_epochs=1).load_state_dict(state)
