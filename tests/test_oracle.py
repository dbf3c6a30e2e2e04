"""The judge is judged: runs whose outcome is known by hand from the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from oracle import (
    EPOCH_END,
    TRAINING_END,
    Clock,
    Condition,
    Journal,
    Node,
    Part,
    Plan,
    Source,
    Undecided,
    oracle_trace,
)
from plans import SOURCES, plans

pytestmark = pytest.mark.no_core

LAST = "LoopEvents.TRAINING_END"
EPOCH = "LoopEvents.EPOCH_END"


LONG = Source(lengths=(100,))


def trace(source: Source = LONG, **arguments: Any) -> Journal:
    """A run under exactly one limit, given as Loop takes it."""
    (limit,) = arguments.keys() & {"max_epochs", "max_steps", "max_seconds"}
    return oracle_trace(Plan(source, limit, arguments.pop(limit), **arguments))


def of(kind: str, journal: Journal) -> Journal:
    return [entry[1:] for entry in journal if entry[0] == kind]


def fired(name: object, journal: Journal) -> list[int]:
    """The global steps at which a name is in the events of the step."""
    steps: list[Any] = of("step", journal)
    return [state[1] for _, names, state, _ in steps if name in names]


def when(part: Part | str, *more: Part | str, **arguments: Any) -> list[int]:
    return fired("A", trace(events=(("A", (part, *more)),), **arguments))


def text(kind: str, journal: Journal) -> list[object]:
    return [entry[0] if kind == "warning" else entry[1] for entry in of(kind, journal)]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(every_n_steps=4), [3, 7, 11, 15]),
        (Part(every_n_steps=4, per_epoch=True), [3, 8, 13]),  # epochs of 5
        (Part(at_step=(0, 2)), [0, 2]),
        (Part(at_step=(0,), per_epoch=True), [0, 5, 10, 15]),
        (Part(every_n_epochs=2), [9]),
        (Part(at_epoch=(0, 2)), [4, 14]),
        (Part(every_n_steps=2, from_step=5, until_step=11), [5, 7, 9]),
        (Part(at_step=(1,), every_n_steps=8), [1, 7, 15]),
    ],
)
def test_steps_and_epochs(part: Part, expected: list[int]) -> None:
    assert when(part, source=Source(lengths=(5,)), max_steps=18) == expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        # the batch of step k is handed over at k seconds
        (Part(every_n_seconds=3), [3, 6, 9]),
        (Part(at_time=(0, 4.5)), [0, 5]),
        # came due before from_step, fires at from_step, and counts from there
        (Part(every_n_seconds=3, from_step=5), [5, 8]),
        (Part(at_time=(2, 3), from_step=5), [5]),
        # another criterion of the Event does not reset it
        (Part(every_n_seconds=3, at_step=(2,)), [2, 3, 6, 9]),
    ],
)
def test_time(part: Part, expected: list[int]) -> None:
    assert when(part, max_steps=11) == expected


def test_missed_periods_do_not_come_in_a_burst() -> None:
    # readings 0, 1, 8, 9, 10, 11: due at 8, then not before 11
    clock = Clock(body_costs=(1, 7, 1, 1, 1, 1))
    assert when(Part(every_n_seconds=3), max_steps=6, clock=clock) == [2, 5]


def test_a_clock_that_goes_backwards_stands_still() -> None:
    clock = Clock(body_costs=(2, -5, 6, 1))  # readings 0, 2, -3, 3, 4
    journal = trace(max_steps=5, clock=clock, looks=(True,))
    assert [entry[-1] for entry in of("step", journal)] == [0, 2, 2, 3, 4]


def test_the_clock_is_read_last_of_all_fetching_and_at_the_first_request() -> None:
    journal = trace(Source(lengths=(2,)), max_seconds=100, clock=Clock(fetch_costs=(1,)))
    assert journal[:6] == [
        ("iter",),
        ("clock", 0),
        ("next",),
        ("next",),
        ("clock", 2),
        ("step", 0, frozenset(), (0, 0, 0, False, False), None),
    ]


def test_without_timers_the_start_is_read_and_then_only_for_those_who_look() -> None:
    condition = Condition("c", looks=True)
    journal = trace(
        max_steps=4, events=(("A", (Part(condition, from_step=2),)),), looks=(True, False)
    )
    # the start; body 0; the condition at step 2, and body 2 sees the same; the condition at step 3
    assert [reading for (reading,) in of("clock", journal)] == [0, 0, 2, 3]


def test_conditions_are_called_in_order_and_see_the_end_that_stop_when_decides() -> None:
    journal = trace(
        max_steps=50,
        stop_when=(Part(Condition("stop", (False, True))),),
        events=(
            ("A", (Part(Condition("a")), Part(Condition("b")))),
            ("B", (Part(Condition("c")),)),
        ),
    )
    assert [(name, state[4]) for name, state in of("condition", journal)] == [  # type: ignore[index]
        *(("stop", False), ("a", False), ("b", False), ("c", False)),
        *(("stop", False), ("a", True), ("b", True), ("c", True)),
    ]
    assert fired(LAST, journal) == [1]
    assert of("end", journal) == [("stop_when",)]


def test_what_a_condition_raises_gets_a_note_and_ends_the_run() -> None:
    condition = Condition("a", raises_at=1)
    journal = trace(max_steps=5, events=(("Log", (Part(condition),)),))
    assert of("raised", journal) == [
        ("ValueError", "call 1 of a", ("in the condition of event 'Log'",), None)
    ]
    assert of("state", journal) == [((0, 0, 0, False, False),)]
    assert of("end", journal) == [("exception",)]
    assert [entry[2] for entry in journal[-2:]] == ["LoopError", "LoopError"]


def test_joined_with_the_loops_own_events() -> None:
    source = Source(lengths=(3,))
    assert when(Part(at_step=(0,)), EPOCH_END, source=source, max_steps=5) == [0, 2]
    assert when(Part(at_step=(0,)), TRAINING_END, source=source, max_steps=5) == [0, 4]


@pytest.mark.parametrize("promised", [None, (3,)])
def test_epochs_end_on_their_last_batch(promised: tuple[int, ...] | None) -> None:
    journal = trace(Source(lengths=(3,), promised=promised), max_epochs=2)
    assert fired(EPOCH, journal) == [2, 5]
    assert fired(LAST, journal) == [5]
    assert of("end", journal) == [("max_epochs",)]
    # three batches and the look at the end, in both epochs; what differs is when
    assert len(of("next", journal)) == 8


def test_a_length_is_trusted_until_its_last_batch() -> None:
    def fetches_per_step(promised: tuple[int, ...] | None) -> list[int]:
        counts, count = [], 0
        for entry in trace(Source(lengths=(3,), promised=promised), max_epochs=1):
            count += entry[0] == "next"
            if entry[0] == "step":
                counts.append(count)
        return counts

    assert fetches_per_step((3,)) == [1, 2, 4]
    assert fetches_per_step(None) == [2, 3, 4]


def test_max_steps_cuts_an_epoch_without_an_epoch_end() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_steps=5, lookahead=False)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2], [4])
    # one more after the promised last batch of epoch 0: nothing is dropped
    assert len(of("next", journal)) == 6
    assert of("warning", journal) == []


def test_longer_than_promised_goes_on_with_one_warning() -> None:
    journal = trace(Source(lengths=(4,), promised=(2,)), max_epochs=2)
    assert fired(EPOCH, journal) == [3, 7]
    assert text("warning", journal) == [
        "epoch 0 has more than the 2 batches that len(dataloader) promised; "
        "it goes on to its true end"
    ]


def test_on_faith_a_surplus_is_dropped_with_a_warning_at_every_request() -> None:
    journal = trace(Source(lengths=(3,), promised=(2,)), max_epochs=2, lookahead=False)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 3, 4]
    assert fired(EPOCH, journal) == [1, 3]
    assert len(of("warning", journal)) == 2


def test_shorter_than_promised_is_an_error() -> None:
    journal = trace(Source(lengths=(2,), promised=(3,)), max_epochs=1)
    assert fired(EPOCH, journal) == []
    assert text("raised", journal) == [
        "epoch 0 ended after 2 of the 3 batches that len(dataloader) promised; "
        "pass lookahead=True to go by the data itself"
    ]


def test_an_empty_epoch_is_an_error() -> None:
    journal = trace(Source(lengths=(2, 0)), max_epochs=3)
    assert fired(EPOCH, journal) == [1]
    assert text("raised", journal) == [
        "epoch 1 has no batch: the dataloader is empty or was consumed before"
    ]


def test_an_explicit_length_gives_a_stream_epochs() -> None:
    journal = trace(Source("once", lengths=(100,)), max_epochs=3, dataloader_len=2)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3, 4, 5]
    assert fired(EPOCH, journal) == [1, 3, 5]
    assert len(of("next", journal)) == 6


def test_a_stream_that_runs_dry_without_a_look_ends_with_a_warning() -> None:
    journal = trace(Source("once", lengths=(3,)), max_steps=10)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([], [])
    assert journal[-4:-2] == [
        ("warning", "the dataloader ran dry at global_step 2, before the run's limit"),
        ("end", "exhausted"),
    ]


def test_a_stream_that_runs_dry_under_lookahead_has_a_last_batch() -> None:
    journal = trace(Source("once", lengths=(3,)), max_steps=10, lookahead=True)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2], [2])
    assert of("end", journal) == [("exhausted",)]


def test_set_epoch_is_called_once_for_each_object() -> None:
    nodes = (
        Node("loader", False, sampler="sampler", batch_sampler="batch_sampler", dataset="dataset"),
        Node("sampler", dataset="dataset"),
        Node("batch_sampler", sampler="sampler"),
        Node("dataset"),
    )
    journal = trace(Source(lengths=(2,), nodes=nodes), max_epochs=2)
    expected = [
        (name, epoch) for epoch in (0, 1) for name in ("sampler", "dataset", "batch_sampler")
    ]
    assert of("set_epoch", journal) == expected


def test_an_error_met_while_looking_ahead_comes_after_the_batch_in_hand() -> None:
    journal = trace(Source(lengths=(5,), raises=((2, "OSError"),)), max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1]
    assert text("raised", journal) == ["fetch 2 failed"]
    assert fired(EPOCH, journal) == []


def test_an_interrupt_in_a_fetch_loses_nothing() -> None:
    source = Source(lengths=(4,), raises=((2, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3]
    assert of("end", journal) == [("max_epochs",)]


def test_leaving_goes_on_with_the_next_batch_and_a_finished_run_is_not_entered() -> None:
    journal = trace(max_steps=3, leaves=frozenset({0, 2}))
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2]
    assert text("older", journal) == ["LoopError"]
    assert text("raised", journal) == ["this run is finished; restart() begins a new one"]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (Source("once"), {"max_epochs": 2}),
        (Source("once"), {"max_epochs": 2, "dataloader_len": 3, "lookahead": True}),
        (Source(), {"max_epochs": 1, "lookahead": False}),
    ],
)
def test_what_cannot_have_epochs_is_refused(source: Source, arguments: dict[str, Any]) -> None:
    assert trace(source, **arguments) == [("refused", "ValueError", "dataloader_len")]


# Lists


def lists(*entries: Any, **arguments: Any) -> list[object]:
    """The batches of a run that is entered so; in these runs, a batch is its global step."""
    return [entry[0] for entry in of("step", trace(entries=entries, **arguments))]


def log(part: Part | str) -> tuple[tuple[str, tuple[Part | str, ...]], ...]:
    return (("Log", (part,)),)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(every_n_steps=4), [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]),
        (Part(at_step=(1, 5)), [[0, 1], [2, 3, 4], [5], [6, 7, 8], [9]]),
        # nothing is due outside its window
        (Part(every_n_steps=2, from_step=5, until_step=7), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
        # timers are not foreseen
        (Part(every_n_seconds=1), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
    ],
)
def test_lists_end_where_a_step_is_due(part: Part, expected: list[list[int]]) -> None:
    assert lists(3, events=log(part), max_steps=10) == expected


def test_lists_have_the_largest_size_that_fits() -> None:
    events = log(Part(every_n_steps=7))
    assert lists((4, 2, 1), events=events, max_steps=10) == [
        *([0, 1, 2, 3], [4, 5], [6]),
        *([7, 8], [9]),
    ]


@pytest.mark.parametrize(
    ("promised", "expected"),
    [
        (None, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        ((5,), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        # a promise that is passed ends a list, too
        ((3,), [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]),
    ],
)
def test_no_list_spans_two_epochs(promised: tuple[int, ...] | None, expected: Any) -> None:
    source = Source(lengths=(5,), promised=promised)
    journal = trace(source, max_epochs=2, entries=(64,))
    assert [entry[0] for entry in of("step", journal)] == expected
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([4, 9], [9])


def test_an_end_that_a_look_finds_closes_a_list_and_leaves_the_rest_to_the_next() -> None:
    assert lists((4, 2, 1), source=Source(lengths=(7,)), max_epochs=1) == [
        *([0, 1, 2, 3], [4, 5], [6]),
    ]
    assert lists((8, 3, 1), source=Source(lengths=(5,)), max_epochs=1) == [[0, 1, 2], [3], [4]]


def test_a_list_looks_after_each_batch_as_single_steps_do() -> None:
    journal = trace(Source(lengths=(3,)), max_epochs=1, entries=(64,), events=log("EPOCH_END"))
    assert journal == [
        ("iter",),
        ("clock", 0),
        *[("next",)] * 4,
        ("step", [0, 1, 2], {"Log", EPOCH, LAST}, (0, 2, 2, True, True), None),
        ("stop_reason", "max_epochs"),
        ("end", "max_epochs"),
        ("next after the end", "raised", "StopIteration", "", (), None),
        *journal[-1:],
    ]


def test_a_promised_end_is_looked_at_when_its_list_is_complete() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_epochs=1, entries=(2,))
    assert [entry[0] for entry in journal[:9]] == [
        *("iter", "clock", "next", "next", "step"),
        *("next", "next", "step", "stop_reason"),
    ]


def test_an_end_that_nobody_foresaw_ends_the_list_without_an_event() -> None:
    journal = trace(Source(lengths=(3,)), max_steps=5, lookahead=False, entries=(8,))
    assert of("step", journal) == [
        ([0, 1, 2], frozenset(), (0, 2, 2, False, False), None),
        ([3, 4], {LAST}, (1, 4, 1, False, True), None),
    ]


def test_a_length_that_is_too_long_is_an_error_after_what_was_gathered() -> None:
    source = Source(lengths=(3,), promised=(6,))
    journal = trace(source, max_epochs=1, entries=((2, 1),))
    assert [entry[0] for entry in of("step", journal)] == [[0, 1], [2]]
    assert [entry[1] for entry in of("raised", journal)] == [
        "epoch 0 ended after 3 of the 6 batches that len(dataloader) promised; "
        "pass lookahead=True to go by the data itself"
    ]
    assert of("state", journal) == [((0, 2, 2, False, False),)]


def test_a_stream_that_runs_dry_says_so_after_its_last_list() -> None:
    journal = trace(Source("once", lengths=(3,)), max_steps=9, entries=(2,))
    assert [entry[0] for entry in of("step", journal)] == [[0, 1], [2]]
    assert of("warning", journal) == [
        ("the dataloader ran dry at global_step 2, before the run's limit",)
    ]


def test_an_error_of_the_source_comes_after_what_was_gathered() -> None:
    source = Source(lengths=(9,), promised=(9,), raises=((5, "OSError"),))
    assert lists((4, 2, 1), source=source, max_epochs=1) == [[0, 1, 2, 3], [4]]
    journal = trace(source, max_epochs=1, entries=((3, 1),))
    assert [(entry[0], entry[1]) for entry in journal if entry[0] in ("step", "raised")] == [
        *(("step", [0, 1, 2]), ("step", [3]), ("step", [4])),
        ("raised", "OSError"),
    ]
    assert len(of("next", journal)) == 6  # the fetch that failed is not repeated


def test_an_interrupt_comes_out_at_once_and_what_was_gathered_is_kept() -> None:
    source = Source(lengths=(6,), promised=(6,), raises=((3, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1, entries=(4, 2, None), leaves=frozenset({0}))
    assert [entry[:2] for entry in journal if entry[0] in ("step", "raised")] == [
        ("raised", "KeyboardInterrupt"),
        *(("step", [0, 1]), ("step", 2), ("step", 3), ("step", 4), ("step", 5)),
    ]


def test_conditions_are_called_once_per_batch_and_close_the_list() -> None:
    journal = trace(
        max_steps=6,
        events=log(Part(Condition("c", (False, False, True, False, False, True)), from_step=0)),
        entries=((4, 2, 1),),
    )
    assert of("step", journal) == [
        # the third batch closes: two fit, and it comes by itself
        ([0, 1], frozenset(), (0, 1, 1, False, False), None),
        ([2], {"Log"}, (0, 2, 2, False, False), None),
        # three are left to max_steps
        ([3, 4], frozenset(), (0, 4, 4, False, False), None),
        ([5], {"Log", LAST}, (0, 5, 5, False, True), None),
    ]
    # the last of each list as usual, the others without knowing of an end
    assert [state[1] for _, state in of("condition", journal)] == [0, 1, 2, 3, 4, 5]  # type: ignore[index]
    assert [state[4] for _, state in of("condition", journal)] == [False] * 5 + [True]  # type: ignore[index]


def test_a_condition_of_stop_when_closes_the_list_and_the_others_see_the_end() -> None:
    journal = trace(
        max_steps=9,
        stop_when=(Part(Condition("stop", (False, True))),),
        events=log(Part(Condition("c"))),
        entries=(8,),
    )
    assert of("step", journal) == [([0, 1], {LAST}, (0, 1, 1, False, True), None)]
    assert [(name, state[4]) for name, state in of("condition", journal)] == [  # type: ignore[index]
        *(("stop", False), ("c", False), ("stop", False), ("c", True)),
    ]
    assert of("end", journal) == [("stop_when",)]


def test_what_a_condition_raises_comes_after_what_was_gathered_before_its_batch() -> None:
    part = Part(Condition("c", raises_at=3))
    journal = trace(max_steps=9, events=log(part), entries=((2, 1),))
    # at the last batch of a list conditions are called as in single steps
    assert [entry[0] for entry in of("step", journal)] == [[0, 1]]
    journal = trace(max_steps=9, events=log(part), entries=((4, 2, 1),))
    assert [entry[0] for entry in of("step", journal)] == []
    journal = trace(max_steps=9, events=log(part), entries=((8, 2, 1),))
    assert [entry[0] for entry in of("step", journal)] == [[0, 1], [2]]
    assert of("raised", journal) == [
        ("ValueError", "call 3 of c", ("in the condition of event 'Log'",), None)
    ]


def test_timers_are_judged_at_the_last_batch_of_a_list_by_one_reading() -> None:
    # a batch takes a second, a body none: the lists are complete at 3, 6, 9 and 10
    clock = Clock(fetch_costs=(1,), body_costs=(0,))
    sized = Source(lengths=(100,), promised=(100,))
    for part, expected in [
        (Part(every_n_seconds=4), [5, 9]),
        (Part(at_time=(1, 2, 7)), [2, 8]),
        (Part(every_n_seconds=1, until_step=4), [2]),
        (Part(every_n_seconds=1, from_step=4, until_step=8), [5]),
        (Part(at_time=(1,), from_step=3, until_step=5), []),
    ]:
        journal = trace(sized, max_steps=10, events=log(part), clock=clock, entries=(3,))
        assert [entry[0] for entry in of("clock", journal)] == [0, 3, 6, 9, 10]
        assert fired("Log", journal) == expected


def test_when_time_ends_the_run_what_else_was_gathered_is_dropped() -> None:
    clock = Clock(fetch_costs=(1,), body_costs=(0,))
    part = Part(Condition("c", (False, False, True)))
    journal = trace(max_seconds=3, events=log(part), clock=clock, entries=((4, 2, 1),))
    assert of("step", journal) == [([0, 1], {LAST}, (0, 1, 1, False, True), None)]
    assert of("end", journal) == [("max_seconds",)]


def test_steps_to_the_next_event() -> None:
    def counts(source: Source = LONG, **arguments: Any) -> list[object]:
        return [entry[0] for entry in of("next event in", trace(source, asks=(True,), **arguments))]

    assert counts(max_steps=4) == [4, 3, 2, 1, None]
    assert counts(max_steps=4, entries=(3,)) == [4, 1, None]
    assert counts(max_steps=9, events=log(Part(at_step=(1, 7)))) == [
        *(2, 1, 6, 5, 4, 3, 2, 1, 1, None)
    ]
    assert counts(max_steps=5, stop_when=(Part(at_step=(2,)),)) == [3, 2, 1, None]
    assert counts(max_seconds=3, events=log(Part(every_n_seconds=2))) == [None] * 5
    sized = Source(lengths=(3,), promised=(3,))
    assert counts(sized, max_epochs=2) == [3, 2, 1, 3, 2, 1, None]
    per_epoch = log(Part(every_n_steps=2, per_epoch=True))
    assert counts(sized, max_epochs=2, events=per_epoch) == [2, 1, 1, 2, 1, 1, None]
    assert counts(Source(lengths=(3,)), max_epochs=2, events=per_epoch) == [2, 1, 2, 2, 1, 2, None]
    window = log(Part(every_n_steps=2, from_step=2, until_step=5))
    assert counts(max_seconds=6, events=window) == [4, 3, 2, 1, None, None, None, None]


def unwrapped(journal: Journal) -> Journal:
    return [
        (entry[0], entry[1][0], *entry[2:])  # type: ignore[index]
        if entry[0] == "step" and isinstance(entry[1], list)
        else entry
        for entry in journal
    ]


def decided(plan: Plan) -> Journal:
    try:
        return oracle_trace(plan)
    except Undecided:
        reject()


PLANS = st.sampled_from(SOURCES).flatmap(plans)


@given(PLANS, st.sampled_from((1, (1,))))
def test_lists_of_one_are_single_steps(plan: Plan, one: Any) -> None:
    single = decided(dataclasses.replace(plan, entries=(None,)))
    wrapped = decided(dataclasses.replace(plan, entries=(one,)))
    assert unwrapped(wrapped) == single
    assert all(len(entry[0]) == 1 for entry in of("step", wrapped))  # type: ignore[arg-type]


def without_time(plan: Plan) -> Plan:
    """The same plan without what goes by time; its conditions raise nothing, its bodies stay."""

    def bare(part: Part | str) -> Part | str:
        if isinstance(part, str):
            return part
        condition = part.condition and dataclasses.replace(
            part.condition, raises_at=None, error="ValueError", looks=False
        )
        return dataclasses.replace(
            part, condition=condition, every_n_seconds=None, at_time=(), per_launch=False
        )

    steps = {"max_seconds": ("max_steps", 9)}.get(plan.limit, (plan.limit, plan.limit_value))
    return dataclasses.replace(
        plan,
        limit=steps[0],
        limit_value=steps[1],
        events=tuple((name, tuple(map(bare, parts))) for name, parts in plan.events),
        stop_when=plan.stop_when and tuple(map(bare, plan.stop_when)),
        clock=Clock(),
        looks=(False,),
        asks=(False,),
        leaves=frozenset(),
        restarts=False,
    )


def per_step(journal: Journal) -> dict[int, object]:
    """What is due at which global step, quiet steps left out, and the order of the batches."""
    return {state[1]: names for _, names, state, _ in of("step", journal) if names}  # type: ignore[misc]


def flat(journal: Journal) -> list[object]:
    batches: list[object] = []
    for batch, *_ in of("step", journal):
        batches += batch if isinstance(batch, list) else [batch]
    return batches


@given(PLANS)
def test_lists_of_any_size_fire_the_same_events_at_the_same_steps(plan: Plan) -> None:
    plan = without_time(plan)
    listed = decided(plan)
    single = decided(dataclasses.replace(plan, entries=(None,)))
    if of("end", single) == [(None,)]:
        reject()  # the user went home in mid-run, after so many bodies
    assert flat(listed) == flat(single)
    assert per_step(listed) == per_step(single)
    # and the world is asked for the same
    for kind in ("call", "set_epoch", "iter", "next", "condition", "warning", "raised", "end"):
        assert of(kind, listed) == of(kind, single)
