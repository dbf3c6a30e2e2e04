"""Random plans, and what builds a dataloader, events and a loop of a plan.

Plans are small and biased: with periods close to the lengths of epochs, and times on a coarse grid,
several things often happen at the same step, which is where most mistakes are.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TextIO
from unittest import mock

from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, LoopWarning, run
from oracle import (
    EPOCH_END,
    TRAINING_END,
    Clock,
    Condition,
    Joined,
    Journal,
    Lap,
    Node,
    Part,
    Pause,
    Plan,
    Sizes,
    Source,
    Stream,
    World,
    drive,
    refused,
    single_parts,
    timestamp,
)

# --------------------------------------------------------------------------------------- strategies

EVENT_NAMES: tuple[Hashable, ...] = ("Log", "Save", 7, ("eval", 1), None, "EPOCH_END")
SOURCES = (
    "generator",
    *(
        f"{kind}, {length}"
        for kind in ("iterable", "single-pass", "callable")
        for length in ("sized", "unsized", "len() raises", "iterable-style", "says its end")
    ),
)
LIMITS = ("max_epochs", "max_steps", "max_seconds")
SIZES: tuple[int | tuple[int, ...], ...] = (3, 64, (4, 2, 1), 5, 1, (3, 1), 2, (8, 1), (2, 1))
CRITERIA = (
    "condition",
    "every_n_steps",
    "at_step",
    "every_n_seconds",
    "at_time",
    "at_timestamp",
    "every_n_epochs",
    "at_epoch",
)
WINDOWS = ("from_step", "until_step", "per_epoch", "per_launch", "first_at_step")

NEVER = 2**63

LEN_ERRORS: dict[str, type[Exception]] = {
    "TypeError": TypeError,
    "NotImplementedError": NotImplementedError,
    "OSError": OSError,
}

Draw = Callable[[st.SearchStrategy[Any]], Any]


def one_in(n: int) -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * (n - 1) + [True])


def collections_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.sets(values, min_size=1, max_size=3).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def conditions(draw: Draw, name: str) -> Condition:
    raises = draw(one_in(6))
    # only the truth value of the result counts
    answers = draw(
        st.lists(st.sampled_from((False, True, 0, 2, "", "yes", None)), min_size=1, max_size=4)
    )
    return Condition(
        name,
        # a condition that holds ends its list, perhaps before it raises
        answers=(False,) if raises and draw(st.booleans()) else tuple(answers),
        looks=draw(one_in(3)),
        raises_at=draw(st.integers(0, 8)) if raises else None,
        error=draw(st.sampled_from(("ValueError", "StopIteration", "truth")))
        if raises
        else "ValueError",
    )


@st.composite
def parts(draw: Draw, unit: float, pool: tuple[Condition, ...], late: bool = False) -> Part:
    """One Event. A `late` one (for stop_when) does not fire in the first steps."""
    if draw(one_in(15)):
        return draw(parts_that_are_off())
    criteria = draw(
        st.sets(st.sampled_from(CRITERIA), min_size=1, max_size=draw(st.sampled_from((2, 1, 3))))
    )
    first = 6 if late else 0
    steps = st.integers(first, 12)
    seconds = st.integers(first, 12).map(lambda n: n * unit)
    periods = st.integers(max(first, 1), 8)
    values: dict[str, Any] = {}
    for criterion in sorted(criteria):
        values[criterion] = draw(
            {
                "condition": st.sampled_from(pool),
                "every_n_steps": periods,
                "at_step": collections_of(steps),
                "every_n_seconds": periods.map(lambda n: n * unit),
                "at_time": collections_of(seconds),
                "at_timestamp": collections_of(st.integers(first or -4, 12)),
                "every_n_epochs": st.integers(1, 3),
                "at_epoch": collections_of(st.integers(0, 3)),
            }[criterion]
        )
    if draw(one_in(3)):
        values["from_step"] = draw(st.integers(0, 8))
    if draw(one_in(4)):
        values["until_step"] = values.get("from_step", 0) + draw(st.integers(1, 8))
    counts = criteria & {"every_n_steps", "at_step"}
    if counts:
        values["per_epoch"] = draw(one_in(3))
    if (counts or criteria & {"every_n_seconds", "at_time"}) and not values.get("per_epoch"):
        values["per_launch"] = draw(one_in(3))
    if "every_n_steps" in criteria and draw(one_in(3)):
        values["first_at_step"] = draw(st.sampled_from((0, 1, 2, 5, 9, 12))) + first
    if draw(one_in(6)):
        others = [name for name in CRITERIA[1:] + WINDOWS if name not in values]
        values["off"] = draw(collections_of(st.sampled_from(others)))
    return Part(**values)


@st.composite
def parts_that_are_off(draw: Draw) -> Part:
    """An Event of which nothing is left; it may have modifiers."""
    values: dict[str, Any] = {"off": draw(collections_of(st.sampled_from(CRITERIA[1:])))}
    if draw(one_in(3)):
        values["from_step"] = draw(st.integers(0, 8))
    if "every_n_steps" in values["off"] and draw(st.booleans()):
        values["first_at_step"] = draw(st.integers(0, 8))
    if {"every_n_steps", "at_step"} & set(values["off"]):
        values |= draw(st.sampled_from(({}, {"per_epoch": True}, {"per_launch": True})))
    return Part(**values)


@st.composite
def joins(draw: Draw, single: st.SearchStrategy[Part]) -> Joined:
    chosen: list[Part | str] = draw(
        st.lists(single, min_size=1, max_size=draw(st.sampled_from((1, 1, 2, 3))))
    )
    if draw(one_in(6)):
        chosen.append(chosen[0])  # a repeated part
    period = chosen[0].every_n_seconds if isinstance(chosen[0], Part) else None
    if period is not None and draw(one_in(4)):
        chosen.append(Part(every_n_seconds=period * draw(st.sampled_from((2, 3)))))
    own = draw(
        st.sampled_from(((), (), (), (EPOCH_END,), (TRAINING_END,), (EPOCH_END, TRAINING_END)))
    )
    if len(own) == 1 and draw(st.booleans()):
        return (*own, *chosen)
    return (*chosen, *own)


SHUFFLING = Node("sampler", dataset="dataset")
GRAPHS: tuple[tuple[Node, ...], ...] = (
    (Node("loader", has_set_epoch=False),),
    (Node("loader"),),
    # like a PyTorch DataLoader: the batch sampler has the same sampler, which has the same data set
    (
        Node("loader", False, sampler="sampler", batch_sampler="batch_sampler", dataset="dataset"),
        Node("sampler", dataset="dataset"),
        Node("batch_sampler", sampler="sampler"),
        Node("dataset"),
    ),
    (
        Node("loader", True, batch_sampler="batch_sampler", dataset="dataset"),
        Node("batch_sampler", False, sampler="sampler"),
        Node("sampler"),
        Node("dataset", False),
    ),
    # a reference cycle
    (
        Node("loader", dataset="dataset"),
        Node("dataset", sampler="sampler"),
        Node("sampler", dataset="loader"),
    ),
)
ITERABLE_STYLE_GRAPHS: tuple[tuple[Node, ...], ...] = (
    (Node("loader", False, dataset="dataset"), Node("dataset", style="iterable")),
    (
        Node("loader", sampler="sampler", dataset="dataset"),
        Node("sampler"),
        Node("dataset", False, style="IterableDataset"),
    ),
)


@st.composite
def sources(draw: Draw, label: str) -> Source:
    kind, _, length = label.partition(", ")
    lengths = draw(
        st.lists(
            st.sampled_from((4, 3, 5, 2, 6, 1, 11)),
            min_size=draw(st.sampled_from((2, 1, 3))),
            max_size=4,
        )
    )
    if draw(one_in(8)):
        lengths[draw(st.integers(0, len(lengths) - 1))] = 0
    promised: tuple[int, ...] | str | None = None
    graph: tuple[Node, ...] = ()
    if kind != "generator":
        graph = draw(
            st.sampled_from(ITERABLE_STYLE_GRAPHS if length == "iterable-style" else GRAPHS)
        )
        if length == "len() raises":
            promised = draw(st.sampled_from(tuple(LEN_ERRORS)))
        elif length == "sized" or (length != "unsized" and draw(st.booleans())):
            true = [sum(lengths)] if kind == "single-pass" else lengths
            shifts = draw(st.sampled_from(((0,), (-1,), (0, -1), (-2, 1), (0,), (1,), (0, 2))))
            promised = tuple(max(0, n + shifts[i % len(shifts)]) for i, n in enumerate(true))
    raises: dict[int, str] = {}
    if draw(one_in(3)):
        # also several in a row, since an error after an interrupt may be ignored
        errors = st.sampled_from(("KeyboardInterrupt", "OSError", "late KeyboardInterrupt"))
        # often at the request after the first epoch's last batch
        places = st.sampled_from((*range(15), *[lengths[0]] * 8))
        for first in draw(st.lists(places, min_size=1, max_size=2)):
            run = draw(st.lists(errors, min_size=1, max_size=draw(st.sampled_from((1, 2, 3)))))
            raises |= {first + i: error for i, error in enumerate(run)}
    says_end = None
    if length == "says its end":
        says_end = draw(st.sampled_from(("truly", "truly", "truly", "early", "never")))
    return Source(
        kind,
        tuple(lengths),
        promised,
        tuple(sorted(raises.items())),
        mapped=draw(one_in(3)),
        says_end=says_end,
        nodes=graph,
    )


@st.composite
def clocks(draw: Draw) -> Clock:
    costs = st.lists(st.sampled_from((1, 0, 1, 2, 3, 5, -2)), min_size=1, max_size=4).map(tuple)
    return Clock(
        # 0.1 is not exact as a float; int seconds are converted to nanoseconds by other code
        unit=draw(st.sampled_from((0.25, 0.1, 1))),
        start=draw(st.sampled_from((0, 0, 1000, -3))),
        launch_gap=draw(st.sampled_from((0, 2))),
        iter_cost=draw(st.sampled_from((0, 1))),
        fetch_costs=draw(costs),
        body_costs=draw(costs),
        condition_cost=draw(st.sampled_from((0, 0, 1))),
        raises_at=draw(st.integers(0, 10)) if draw(one_in(15)) else None,
    )


def lengths_near(source: Source) -> st.SearchStrategy[int]:
    """A dataloader_len: mostly at most the length of the shortest epoch."""
    shortest = max(1, min(source.lengths))
    return st.sampled_from((shortest, max(1, shortest - 1), 1, 2, shortest + 1))


@st.composite
def entries(draw: Draw) -> tuple[Sizes, ...]:
    """How the loop is entered each time; about half of the plans have some chunks."""
    if draw(st.booleans()):
        return (None,)
    chunks = st.sampled_from(SIZES)
    first: Sizes = draw(chunks)
    most = draw(st.sampled_from((2, 1, 0)))
    others: list[Sizes] = draw(st.lists(st.none() | chunks, max_size=most))
    return (first, *others) if draw(st.booleans()) else (*others, first)


@st.composite
def triggers(draw: Draw, names: tuple[Hashable, ...]) -> tuple[tuple[int, Hashable], ...]:
    """What is triggered by hand in which body; mostly names that the loop has."""
    if not draw(one_in(3)):
        return ()
    name = st.sampled_from((*names * 3, *EVENT_NAMES, "stop_when"))
    body = BODIES | st.just(-1)
    chosen = draw(st.lists(st.tuples(body, name), min_size=1, max_size=3))
    if draw(one_in(4)):
        chosen.append(chosen[0])
    return tuple(chosen)


BODIES = st.sampled_from((1, 0, 2, 3, 5, 8))


@st.composite
def laps(draw: Draw, pauses: tuple[Pause, ...]) -> tuple[Lap, ...]:
    """Of few labels, so that some are asked for again, also twice in a body."""
    if not draw(one_in(3)):
        return ()
    bodies = st.sampled_from((1, 0, 2, 3, 5, 8, -1, *[pause.body for pause in pauses] * 3))
    lap = st.builds(
        Lap,
        bodies,
        st.sampled_from(("Log", ("speed", 1))),
        st.sampled_from(("begins", "pause", "ends")),
    )
    return tuple(draw(st.lists(lap, min_size=1, max_size=5)))


@st.composite
def pauses(draw: Draw) -> tuple[Pause, ...]:
    if not draw(one_in(3)):
        return ()
    costs = st.sampled_from((2, 1, 4, 0, -1))
    pause = st.builds(Pause, BODIES, costs, one_in(3), one_in(3), one_in(3))
    return tuple(draw(st.lists(pause, min_size=1, max_size=4)))


@st.composite
def plans(draw: Draw, label: str) -> Plan:
    """Plans with the source `label`; everything else is random."""
    source = draw(sources(label))
    clock = draw(clocks())
    pool = tuple(draw(conditions(f"condition {i}")) for i in range(draw(st.integers(1, 3))))
    single = parts(clock.unit, pool)
    shared = draw(st.lists(single, min_size=1, max_size=2))  # used under several names
    events = tuple(
        (name, () if draw(one_in(10)) else draw(joins(single | st.sampled_from(shared))))
        for name in draw(
            st.lists(
                st.sampled_from(EVENT_NAMES),
                min_size=draw(st.sampled_from((2, 3, 1, 0))),
                max_size=5,
                unique=True,
            )
        )
    )
    stop_when = draw(joins(parts(clock.unit, pool, late=True))) if draw(one_in(3)) else None
    limit = draw(st.sampled_from(LIMITS))
    value = draw(
        {
            # long runs first: hypothesis prefers the first option
            "max_epochs": st.sampled_from((3, 2, 4, 1)),
            "max_steps": st.sampled_from((10, 12, 15, 22, 6, 3, 2, 1)),
            "max_seconds": st.sampled_from((12, 20, 16, 30, 7, 3, 2, 1)).map(
                lambda n: n * clock.unit
            ),
        }[limit]
    )
    lookahead = draw(st.sampled_from((None, None, None, True, True, False, False)))
    dataloader_len = None
    if draw(one_in(5)):
        dataloader_len = draw(lengths_near(source))
    if limit == "max_epochs" and not draw(one_in(10)):  # few plans are refused
        if source.kind == "single-pass" and value > 1:
            dataloader_len = draw(lengths_near(source))
        known = isinstance(source.promised, tuple) or source.says_end is not None
        if lookahead is False and not known:
            dataloader_len = draw(lengths_near(source))
    refused = dataloader_len is not None or source.says_end is not None
    if lookahead is True and refused and not draw(one_in(10)):
        lookahead = draw(st.sampled_from((None, False)))
    entered = draw(entries())
    start_step = draw(st.sampled_from((1, 3, 4, 2, 5, 6, 8, 13))) if draw(one_in(3)) else 0
    if start_step > 0 and source.says_end is not None:
        # on the way, such a loader may be believed, or its length, or what it really has
        source = dataclasses.replace(source, promised=None, says_end="truly")
    leaves: set[int] = set()
    if len(entered) > 1 or draw(one_in(3)):
        leaves = draw(st.sets(st.sampled_from((1, 0, 2, 3, 5, 8, 12)), max_size=3))
    for fetch, error in source.raises:  # the loop is left and entered again just before
        if error == "OSError" and draw(st.booleans()):
            leaves.add(max(0, fetch - draw(st.sampled_from((1, 2, 3)))))
    paused = draw(pauses())
    return Plan(
        source=source,
        triggers=draw(triggers(tuple(name for name, _ in events))),
        limit=limit,
        limit_value=value,
        events=events,
        stop_when=stop_when,
        dataloader_len=dataloader_len,
        lookahead=lookahead,
        batches_per_step=draw(st.sampled_from((2, 3, 1, 4, 64))) if draw(one_in(3)) else None,
        start_step=start_step,
        fast_forward=not (start_step > 0 and draw(one_in(3))),
        clock=clock,
        looks=tuple(draw(st.lists(one_in(3), min_size=1, max_size=3))),
        leaves=frozenset(leaves),
        entries=entered,
        asks=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=3)))
        if draw(one_in(3))
        else (False,),
        laps=draw(laps(paused)),
        pauses=paused,
        # a single-pass source that was set forward cannot be so again
        restarts=draw(one_in(5)) and not (start_step > 0 and source.kind == "single-pass"),
    )


# ------------------------------------------------------------------------------ features of a plan


def source_label(source: Source) -> str:
    """The name in SOURCES of a source."""
    styles = {node.style for node in source.nodes if node.name == "dataset"}
    if source.says_end is not None:
        return f"{source.kind}, says its end"
    if styles & {"iterable", "IterableDataset"}:
        return f"{source.kind}, iterable-style"
    if isinstance(source.promised, tuple):
        return f"{source.kind}, sized"
    if isinstance(source.promised, str):
        return f"{source.kind}, len() raises"
    return source.kind if source.kind == "generator" else f"{source.kind}, unsized"


SOURCE_TRAITS = (
    "promises too much",
    "promises too little",
    "lengths differ",
    "an empty epoch",
    "raises OSError",
    "raises KeyboardInterrupt",
    "raises late KeyboardInterrupt",
    "mapped",
    "says its end truly",
    "says its end early",
    "says its end never",
    "set_epoch",
)
ENTRIES = (
    "plain",
    "chunks(1)",
    "chunks(n)",
    "chunks((..., 1))",
    "chunks of several sizes",
    "plain after chunks, or chunks after plain",
    "chunks, after an interrupt",
    "chunks, and a condition",
    "chunks, and a condition that raises",
    "chunks, and timers",
    "chunks, and a source that raises",
    "chunks, and stop_when",
)
OTHERS = (
    "a | b",
    "LoopEvents.EPOCH_END in an Event",
    "LoopEvents.TRAINING_END in an Event",
    "one Event, several names",
    "condition raises",
    "stop_when",
    "dataloader_len",
    "lookahead=None",
    "lookahead=True",
    "lookahead=False",
    "clock goes backwards",
    "clock raises",
    "bodies look at elapsed",
    "bodies leave the for",
    "steps_to_next_event",
    "restart",
    "first_at_step of 0",
    "first_at_step of the period or more",
    "per_launch, with steps",
    "per_launch, with steps and time",
    "at_timestamp in the past",
    "every_n_seconds, and other criteria of the name",
    "every_n_seconds with several periods",
    "every_n_seconds joined with LoopEvents",
    "every_n_seconds, and a trigger by hand",
    "something is off",
    "nothing is left of an Event",
    "None in place of an Event",
)
TRIGGERS = (
    "before the first step",
    "in a body",
    "twice",
    "of a name that is off",
    "of an unknown name",
    "and chunks",
)
LISTS = (
    "batches_per_step",
    "of one batch",
    "longer than an epoch",
    "and chunks",
    "and an interrupt",
    "and a source that raises",
    "and dataloader_len",
    "and steps_to_next_event",
)
STARTS = (
    "start_step",
    "with batches_per_step",
    "and dataloader_len",
    "of a stream",
    "and set_epoch",
    "and restart",
    "beyond max_steps",
    "fast_forward=False",
    "fast_forward=False, of a length",
)
CLOCKS = (
    "laps",
    "a lap twice in a body",
    "a lap before the first step",
    "a lap in a pause",
    "pauses",
    "a nested pause",
    "a pause that is left open",
    "a pause, and timers",
    "a pause, and per_launch timers",
    "a pause, and max_seconds",
)
FEATURES: dict[str, tuple[str, ...]] = {
    "source": SOURCES,
    "trait": SOURCE_TRAITS,
    "limit": LIMITS,
    "criterion": CRITERIA,
    "window": WINDOWS,
    "entry": ENTRIES,
    "other": OTHERS,
    "trigger": TRIGGERS,
    "list": LISTS,
    "start": STARTS,
    "clock": CLOCKS,
}


def counts_steps(part: Part | str) -> bool:
    return isinstance(part, Part) and bool(part.every_n_steps is not None or part.at_step)


def is_timed(part: Part | str) -> bool:
    return isinstance(part, Part) and bool(
        part.every_n_seconds is not None or part.at_time or part.at_timestamp
    )


def has_period(parts: Joined) -> bool:
    return any(isinstance(part, Part) and part.every_n_seconds is not None for part in parts)


def is_off(part: Part) -> bool:
    """Whether nothing is left of an Event."""
    return all(getattr(part, name) in (None, ()) for name in CRITERIA)


def features(plan: Plan) -> set[tuple[str, str]]:
    """The features of a plan, as (group, name) of FEATURES."""
    source, clock = plan.source, plan.clock
    joined = [parts for _, parts in plan.events] + ([plan.stop_when] if plan.stop_when else [])
    everything = [part for parts in joined for part in parts]
    single = single_parts(plan)
    true = (sum(source.lengths),) if source.kind == "single-pass" else source.lengths
    promised = source.promised if isinstance(source.promised, tuple) else ()
    under = [set(parts) & set(single) for _, parts in plan.events]
    triggered = {name for _, name in plan.triggers}
    has: dict[tuple[str, str], object] = {
        ("source", source_label(source)): True,
        ("trait", "promises too much"): any(map(operator.gt, promised, true)),
        ("trait", "promises too little"): any(map(operator.lt, promised, true)),
        ("trait", "lengths differ"): len(set(source.lengths)) > 1,
        ("trait", "an empty epoch"): 0 in source.lengths,
        ("trait", "mapped"): source.mapped,
        ("trait", f"says its end {source.says_end}"): source.says_end is not None,
        ("trait", "set_epoch"): any(node.has_set_epoch for node in source.nodes),
        ("limit", plan.limit): True,
        ("other", "a | b"): any(len(parts) > 1 for parts in joined),
        ("other", "one Event, several names"): any(
            a & b for i, a in enumerate(under) for b in under[:i]
        ),
        ("other", "condition raises"): any(
            part.condition is not None and part.condition.raises_at is not None for part in single
        ),
        ("other", "stop_when"): plan.stop_when is not None,
        ("other", "dataloader_len"): plan.dataloader_len is not None,
        ("other", f"lookahead={plan.lookahead}"): True,
        ("other", "clock goes backwards"): min(clock.fetch_costs + clock.body_costs) < 0,
        ("other", "clock raises"): clock.raises_at is not None,
        ("other", "bodies look at elapsed"): any(plan.looks),
        ("other", "bodies leave the for"): bool(plan.leaves),
        ("other", "steps_to_next_event"): any(plan.asks),
        ("other", "restart"): plan.restarts,
        ("other", "first_at_step of 0"): any(part.first_at_step == 0 for part in single),
        ("other", "first_at_step of the period or more"): any(
            (part.first_at_step or 0) >= (part.every_n_steps or NEVER) for part in single
        ),
        ("other", "per_launch, with steps"): any(
            part.per_launch and counts_steps(part) for part in single
        ),
        ("other", "per_launch, with steps and time"): any(
            part.per_launch and counts_steps(part) and is_timed(part) for part in single
        ),
        ("other", "at_timestamp in the past"): any(
            min(part.at_timestamp, default=0) < 0 for part in single
        ),
        ("other", "every_n_seconds, and other criteria of the name"): any(
            has_period(parts) and any(map(counts_steps, parts)) for parts in joined
        ),
        ("other", "every_n_seconds with several periods"): any(
            len({part.every_n_seconds for part in parts if isinstance(part, Part)} - {None}) > 1
            for parts in joined
        ),
        ("other", "every_n_seconds joined with LoopEvents"): any(
            has_period(parts) and set(parts) & {EPOCH_END, TRAINING_END} for parts in joined
        ),
        ("other", "every_n_seconds, and a trigger by hand"): any(
            has_period(parts) and name in triggered for name, parts in plan.events
        ),
        ("other", "something is off"): any(part.off for part in single),
        ("other", "nothing is left of an Event"): any(map(is_off, single)),
        ("other", "None in place of an Event"): any(not parts for _, parts in plan.events),
        ("trigger", "before the first step"): any(body < 0 for body, _ in plan.triggers),
        ("trigger", "in a body"): any(body >= 0 for body, _ in plan.triggers),
        ("trigger", "twice"): len(set(plan.triggers)) < len(plan.triggers),
        ("trigger", "of a name that is off"): any(
            all(isinstance(part, Part) and is_off(part) for part in parts)
            for name, parts in plan.events
            if name in triggered
        ),
        ("trigger", "of an unknown name"): bool(triggered - {name for name, _ in plan.events}),
        ("trigger", "and chunks"): bool(triggered) and set(plan.entries) - {None, 1} != set(),
        ("entry", "plain"): None in plan.entries,
        ("entry", "chunks(1)"): 1 in plan.entries,
    }
    chunks = [sizes for sizes in plan.entries if sizes not in (None, 1)]
    raised = {error for _, error in source.raises}
    sized = plan.dataloader_len is not None or bool(promised)
    if plan.batches_per_step is not None:
        has |= {
            ("list", "batches_per_step"): True,
            ("list", "of one batch"): plan.batches_per_step == 1,
            ("list", "longer than an epoch"): plan.batches_per_step > max(source.lengths),
            ("list", "and chunks"): bool(chunks),
            ("list", "and an interrupt"): bool(raised - {"OSError"}),
            ("list", "and a source that raises"): "OSError" in raised,
            ("list", "and dataloader_len"): plan.dataloader_len is not None,
            ("list", "and steps_to_next_event"): any(plan.asks),
        }
    if plan.start_step > 0:
        has |= {
            ("start", "start_step"): True,
            ("start", "with batches_per_step"): plan.batches_per_step is not None,
            ("start", "and dataloader_len"): plan.dataloader_len is not None,
            ("start", "of a stream"): source.kind == "single-pass",
            ("start", "and set_epoch"): any(node.has_set_epoch for node in source.nodes),
            ("start", "and restart"): plan.restarts,
            ("start", "beyond max_steps"): plan.limit == "max_steps"
            and plan.start_step >= plan.limit_value,
            ("start", "fast_forward=False"): not plan.fast_forward,
            ("start", "fast_forward=False, of a length"): not plan.fast_forward and sized,
        }
    asked = [(lap.body, lap.label) for lap in plan.laps]
    paused = {pause.body for pause in plan.pauses}
    timers = list(filter(is_timed, single))
    has |= {
        ("clock", "laps"): bool(asked),
        ("clock", "a lap twice in a body"): len(set(asked)) < len(asked),
        ("clock", "a lap before the first step"): any(lap.body == -1 for lap in plan.laps),
        ("clock", "a lap in a pause"): any(
            lap.when == "pause" and lap.body in paused for lap in plan.laps
        ),
        ("clock", "pauses"): bool(paused),
        ("clock", "a nested pause"): any(pause.nested for pause in plan.pauses),
        ("clock", "a pause that is left open"): any(pause.left_open for pause in plan.pauses),
        ("clock", "a pause, and timers"): bool(paused and timers),
        ("clock", "a pause, and per_launch timers"): bool(paused)
        and any(part.per_launch for part in timers),
        ("clock", "a pause, and max_seconds"): bool(paused) and plan.limit == "max_seconds",
    }
    if chunks:
        errors = [error for _, error in source.raises]
        called = [part.condition for part in single if part.condition is not None]
        timed = any(map(is_timed, single))
        has |= {
            ("entry", "chunks(n)"): any(isinstance(sizes, int) for sizes in chunks),
            ("entry", "chunks((..., 1))"): any(isinstance(sizes, tuple) for sizes in chunks),
            ("entry", "chunks of several sizes"): len(set(chunks)) > 1,
            ("entry", "plain after chunks, or chunks after plain"): None in plan.entries
            and bool(plan.leaves),
            ("entry", "chunks, after an interrupt"): bool(set(errors) - {"OSError"}),
            ("entry", "chunks, and a condition"): bool(called),
            ("entry", "chunks, and a condition that raises"): any(
                condition.raises_at is not None for condition in called
            ),
            ("entry", "chunks, and timers"): timed,
            ("entry", "chunks, and a source that raises"): "OSError" in errors,
            ("entry", "chunks, and stop_when"): plan.stop_when is not None,
        }
    for _, error in source.raises:
        has["trait", f"raises {error}"] = True
    for member in (EPOCH_END, TRAINING_END):
        has["other", f"LoopEvents.{member} in an Event"] = member in everything
    for part in single:
        for name in CRITERIA + WINDOWS:
            kind = "criterion" if name in CRITERIA else "window"
            # from_step=0 is the default; at_time=0.0 and the like are in collections
            if getattr(part, name) not in (None, (), False, 0):
                has[kind, name] = True
    return {feature for feature, here in has.items() if here}


# ----------------------------------------------------------------------------------------- adaptors


class IterableDataset:
    """Like PyTorch's class of this name, which has a __getitem__ that raises."""

    def __getitem__(self, index: int) -> object:
        raise NotImplementedError


class Batches:
    """The iterator of a source."""

    def __init__(self, world: World, stream: Stream) -> None:
        self.world = world
        self.stream = stream

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> int:
        return self.world.fetch(self.stream)


def unchanged(batch: Any) -> Any:
    return batch


def generate(world: World, stream: Stream) -> Iterator[int]:
    while True:
        try:
            batch = world.fetch(stream)
        except StopIteration:
            return
        yield batch


def mapped(world: World, stream: Stream) -> Iterator[int]:
    """A map over a generator: after an interrupt has ended the generator, it still can be used."""
    return map(unchanged, generate(world, stream))


def make_object(world: World, node: Node, methods: dict[str, Any]) -> Any:
    """An object whose type has only the methods that the plan gives it."""
    namespace = dict(methods)
    bases: tuple[type, ...] = ()
    if node.has_set_epoch:
        namespace["set_epoch"] = lambda self, epoch: world.set_epoch(node.name, epoch)
    if node.name == "dataset" and node.style == "map":
        namespace["__getitem__"] = lambda self, index: None
    if node.style == "IterableDataset":
        bases = (IterableDataset,)
    return type(node.name, bases, namespace)()


def loader_methods(world: World) -> dict[str, Any]:
    source = world.plan.source
    methods: dict[str, Any] = {}
    if source.kind == "single-pass":  # it is its own iterator

        def iterate(self: object) -> object:
            world.open()
            return self

        batches = mapped(world, world.only_stream)
        methods["__iter__"] = iterate
        methods["__next__"] = lambda self: (
            next(batches) if source.mapped else world.fetch(world.only_stream)
        )
    elif source.mapped:
        methods["__iter__"] = lambda self: mapped(world, world.open())
    else:
        methods["__iter__"] = lambda self: Batches(world, world.open())
    if source.says_end is not None:
        methods["end_of_dataloader"] = property(lambda self: world.end_of_dataloader)
    if isinstance(source.promised, tuple):
        methods["__len__"] = lambda self: world.length()
    elif source.promised is not None:
        error = LEN_ERRORS[source.promised]

        def length(self: object) -> int:
            raise error("this loader has no length")

        methods["__len__"] = length
    return methods


def build_dataloader(world: World) -> Any:
    source = world.plan.source
    if source.kind == "generator":

        def call_generator() -> Iterator[int]:
            world.call_loader()
            stream = world.open()  # also if nothing is asked of it
            return mapped(world, stream) if source.mapped else generate(world, stream)

        return call_generator

    # samplers and data sets are the same in each epoch, a callable's loaders are not
    others = {node.name: make_object(world, node, {}) for node in source.nodes[1:]}

    def build_loader() -> Any:
        objects = {"loader": make_object(world, source.nodes[0], loader_methods(world)), **others}
        for node in source.nodes:
            children = {
                attribute: getattr(node, attribute)
                for attribute in ("sampler", "batch_sampler", "dataset")
            }
            if any(children.values()):  # then the others are None
                for attribute, child in children.items():
                    setattr(objects[node.name], attribute, objects[child] if child else None)
        return objects["loader"]

    if source.kind != "callable":
        return build_loader()

    def call_loader() -> Any:
        world.call_loader()
        return build_loader()

    return call_loader


class Builder:
    """Makes Events of Parts; equal Parts become one Event, with one condition function."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.functions: dict[Condition, Callable[[Any], object]] = {}
        self.events: dict[tuple[Part, tuple[str, ...]], Any] = {}

    def function(self, condition: Condition) -> Callable[[Any], object]:
        if condition not in self.functions:
            self.functions[condition] = functools.partial(self.world.condition, condition)
        return self.functions[condition]

    def event(self, part: Part) -> Any:
        key = part, part.off  # which is not compared
        if key not in self.events:
            values: dict[str, Any] = dict.fromkeys(part.off)
            for name in CRITERIA[1:] + WINDOWS:
                value = getattr(part, name)
                if value == getattr(Part, name):  # the default
                    continue
                if name == "at_timestamp":
                    value = tuple(timestamp(self.world.plan, units) for units in value)
                # a single number is passed without a collection
                values[name] = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            arguments = [self.function(part.condition)] if part.condition is not None else []
            self.events[key] = Event(*arguments, **values)
        return self.events[key]

    def joined(self, joined: Joined) -> Any:
        if not joined:
            return None
        return functools.reduce(
            operator.or_,
            (self.event(part) if isinstance(part, Part) else OWN[part] for part in joined),
        )


OWN = {EPOCH_END: LoopEvents.EPOCH_END, TRAINING_END: LoopEvents.TRAINING_END}
ORACLE_NAMES: dict[Hashable, Hashable] = {own: f"LoopEvents.{name}" for name, own in OWN.items()}


def read_names(known: list[Hashable], events: Any) -> object:
    """The names of a step as the oracle writes them; other values if `in` and iteration differ."""
    iterated = frozenset(events)
    asked = frozenset(name for name in known if name in events)
    if iterated != asked or bool(events) != bool(iterated) or len(events) != len(iterated):
        return ("the set contradicts itself", iterated, asked, bool(events), len(events))
    return frozenset(ORACLE_NAMES.get(name, name) for name in iterated)


def use_wall_clock(world: World) -> Any:
    """Within this context the loop's wall clock is the world's."""
    return mock.patch.object(run, "wall_time", world.wall_clock)


def dloop_trace(plan: Plan) -> Journal:
    """What happens in a run of this plan with dloop, in order."""
    world = World(plan)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        kind = "warning" if category is LoopWarning else category.__name__
        world.journal.append((kind, str(message)))

    with warnings.catch_warnings(), use_wall_clock(world):
        warnings.simplefilter("always")
        warnings.showwarning = show
        build = Builder(world)
        events = {name: build.joined(joined) for name, joined in plan.events}
        arguments: dict[str, Any] = {plan.limit: plan.limit_value}
        try:
            loop: Loop[Any] = Loop(
                build_dataloader(world),
                events=events or None,
                stop_when=build.joined(plan.stop_when) if plan.stop_when else None,
                dataloader_len=plan.dataloader_len,
                lookahead=plan.lookahead,
                batches_per_step=plan.batches_per_step,
                start_step=plan.start_step,
                fast_forward=plan.fast_forward,
                clock=world.clock,
                **arguments,
            )
        except (ValueError, TypeError) as error:
            world.journal.append(refused(error))
            return world.journal
        known = [*events, *OWN.values()]
        drive(loop, world, functools.partial(read_names, known))
    return world.journal
