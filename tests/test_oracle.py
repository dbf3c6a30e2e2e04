"""The oracle itself: runs whose outcome was worked out by hand from DESIGN.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
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
    Lap,
    Node,
    Now,
    Part,
    Pause,
    Plan,
    Source,
    Triggers,
    Undecided,
    oracle_trace,
)
from plans import SOURCES, plans

pytestmark = pytest.mark.no_core

LAST = "LoopEvents.TRAINING_END"
EPOCH = "LoopEvents.EPOCH_END"


LONG = Source(lengths=(100,))


def trace(source: Source = LONG, **arguments: Any) -> Journal:
    """The oracle's trace of a run; `arguments` are a Plan's, with one limit named as in Loop."""
    (limit,) = arguments.keys() & {"max_epochs", "max_steps", "max_seconds"}
    return oracle_trace(Plan(source, limit, arguments.pop(limit), **arguments))


def of(kind: str, journal: Journal) -> Journal:
    return [entry[1:] for entry in journal if entry[0] == kind]


def fired(name: object, journal: Journal) -> list[int]:
    """The global steps at which `name` is due."""
    steps: list[Any] = of("step", journal)
    return [state[1] for _, names, state, _ in steps if name in names]


def fires_at(*joined: Part | str, **arguments: Any) -> list[int]:
    return fired("A", trace(events=(("A", joined),), **arguments))


def log(part: Part | str) -> tuple[tuple[str, tuple[Part | str, ...]], ...]:
    return (("Log", (part,)),)


def messages(kind: str, journal: Journal) -> list[object]:
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
        (Part(every_n_steps=6, first_at_step=0), [0, 6, 12]),
        (Part(every_n_steps=6, first_at_step=2), [2, 8, 14]),
        (Part(every_n_steps=4, first_at_step=9), [9, 13, 17]),  # above the period
        (Part(every_n_steps=2, first_at_step=1, per_epoch=True), [1, 3, 6, 8, 11, 13, 16]),
        (Part(every_n_steps=6, first_at_step=2, per_launch=True), [2, 8, 14]),
        (Part(every_n_steps=6, first_at_step=2, from_step=5), [8, 14]),
        (Part(at_step=(0, 7), per_launch=True), [0, 7]),
        # what is off is as if it were not given
        (Part(at_step=(2,), off=("every_n_steps",)), [2]),
        (Part(off=("every_n_steps",), first_at_step=0), []),
    ],
)
def test_step_and_epoch_criteria_fire_at_these_steps(part: Part, expected: list[int]) -> None:
    assert fires_at(part, source=Source(lengths=(5,)), max_steps=18) == expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        # the batch of step k is handed over at k seconds
        (Part(every_n_seconds=3), [3, 6, 9]),
        (Part(at_time=(0, 4.5)), [0, 5]),
        (Part(every_n_seconds=3, per_launch=True), [3, 6, 9]),
        # wall clock: 5000 at the first request; those that are past fire together
        (Part(at_timestamp=(4,)), [4]),
        (Part(at_timestamp=(-3, -1, 0, 6)), [0, 6]),
        (Part(at_timestamp=(-3, 2), from_step=4), [4]),
        (Part(at_timestamp=(-3, 8), until_step=8), [0]),
        # due before from_step: fires at from_step, and counts from there
        (Part(every_n_seconds=3, from_step=5), [5, 8]),
        (Part(at_time=(2, 3), from_step=5), [5]),
        # another criterion of the Event restarts it
        (Part(every_n_seconds=3, at_step=(2,)), [2, 5, 8]),
    ],
)
def test_time_criteria_fire_at_these_steps(part: Part, expected: list[int]) -> None:
    assert fires_at(part, max_steps=11) == expected


PERIOD = Part(every_n_seconds=3)
OUTSIDE = Part(every_n_seconds=3, from_step=6)


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        # the batch of step k is handed over at k seconds; what fires at 1 or 2 restarts the timer
        ((PERIOD, Part(at_step=(2,))), [2, 5, 8]),
        ((Part(at_step=(2,)), PERIOD), [2, 5, 8]),
        ((PERIOD, Part(at_time=(2,))), [2, 5, 8]),
        ((PERIOD, Part(at_timestamp=(2,))), [2, 5, 8]),
        ((PERIOD, Part(Condition("c", (False, False, True, *[False] * 9)))), [2, 5, 8]),
        # all timers of a name restart together
        ((PERIOD, Part(every_n_seconds=2)), [2, 4, 6, 8, 10]),
        ((PERIOD, Part(every_n_seconds=3, per_launch=True, at_step=(1,))), [1, 4, 7, 10]),
        # also those outside their window
        ((OUTSIDE, Part(at_step=(4,))), [4, 7, 10]),
        ((OUTSIDE, Part(at_step=(2,))), [2, 6, 9]),
        # points are not restarted
        ((Part(at_time=(3, 5)), Part(at_step=(2, 4))), [2, 3, 4, 5]),
        # the epochs end at 4 and 9, and the run at 10
        ((PERIOD, EPOCH_END), [3, 4, 7, 9]),
        ((Part(every_n_seconds=5), EPOCH_END, TRAINING_END), [4, 9, 10]),
    ],
)
def test_whatever_makes_a_name_due_restarts_its_timers(
    joined: tuple[Part | str, ...], expected: list[int]
) -> None:
    assert fires_at(*joined, source=Source(lengths=(5,)), max_steps=11) == expected


def test_another_name_does_not_restart_a_timer() -> None:
    events = (("A", (PERIOD,)), ("B", (Part(at_step=(2,)),)))
    assert fired("A", trace(max_steps=11, events=events)) == [3, 6, 9]


def test_a_condition_restarts_a_timer_at_the_end_of_its_list() -> None:
    # lists of 2 batches, one at each second; the condition holds at batch 3, in the list at 1
    condition = Condition("c", (*[False] * 3, True, *[False] * 9))
    part = Part(condition, every_n_seconds=3)
    assert fires_at(part, max_steps=12, entries=(2,)) == [3, 9]


def test_stop_when_has_timers_as_a_name_has() -> None:
    stop_when = (Part(every_n_seconds=3, from_step=4),)
    assert fired(LAST, trace(max_steps=11, stop_when=stop_when)) == [4]


def test_the_wall_clock_is_read_once_before_the_clock_where_a_timestamp_is() -> None:
    def first(part: Part) -> Journal:
        return trace(max_steps=2, events=log(part), restarts=True)

    journal = first(Part(at_timestamp=(1,)))
    assert journal[:4] == [("iter",), ("wall clock", 5000), ("clock", 0), ("next",)]
    # the second run begins two seconds later: the moment is past
    assert of("wall clock", journal) == [(5000,), (5002,)]
    assert fired("Log", journal) == [1, 0]
    assert of("wall clock", first(Part(at_time=(1,)))) == []


def test_a_name_whose_event_is_none_or_off_is_never_due() -> None:
    assert fires_at(max_steps=5) == []
    assert fires_at(Part(off=("at_step",)), max_steps=5) == []
    assert fires_at(Part(off=("at_step",)), TRAINING_END, max_steps=5) == [4]
    assert of("clock", trace(max_steps=5, events=log(Part(off=("at_time",))))) == [(0,)]


@pytest.mark.parametrize(
    ("triggers", "expected"),
    [
        (((1, "Log"),), [2]),
        (((-1, "Log"),), [0]),
        (((1, "Log"), (1, "Log")), [2]),
        (((1, "Log"), (2, "Log")), [2, 3]),
        (((4, "Log"),), []),  # the last step
    ],
)
def test_a_trigger_makes_a_name_due_at_the_next_step(
    triggers: tuple[tuple[int, str], ...], expected: list[int]
) -> None:
    for joined in [(Part(at_step=(0,), from_step=9),), (Part(off=("at_step",)),), ()]:
        journal = trace(max_steps=5, events=(("Log", joined),), triggers=triggers)
        assert fired("Log", journal) == expected


def test_a_trigger_restarts_a_timer() -> None:
    triggers = ((1, "A"), (4, "A"))
    assert fires_at(PERIOD, max_steps=10, triggers=triggers) == [2, 5, 8]


def test_a_trigger_of_an_unknown_name_is_an_error() -> None:
    triggers = ((1, "Lag"), (1, "stop_when"))
    journal = trace(max_steps=4, triggers=triggers, stop_when=(Part(at_step=(9,)),))
    assert of("trigger", journal) == [("Lag", "KeyError"), ("stop_when", "KeyError")]
    assert [names for _, names, _, _ in of("step", journal)] == [*[frozenset()] * 3, {LAST}]


@pytest.mark.parametrize("sizes", [3, (3, 1)])
def test_a_trigger_comes_with_the_next_list_which_has_the_smallest_size(sizes: Any) -> None:
    journal = trace(max_steps=10, events=log(PERIOD), entries=(sizes,), triggers=((0, "Log"),))
    # a list at each second
    assert [entry[0] for entry in of("step", journal)] == [
        *([0, 1, 2], [3], [4, 5, 6], [7, 8, 9]),
    ]
    assert fired("Log", journal) == [3]


def test_with_a_trigger_batches_that_were_gathered_before_come_later() -> None:
    holds = Part(Condition("c", (*[False] * 6, True, *[False] * 9)))
    journal = trace(max_steps=8, events=log(holds), entries=((8, 3, 1),), triggers=((0, "Log"),))
    # seven batches are gathered; after three of them, the list of the trigger has one
    assert [entry[0] for entry in of("step", journal)] == [
        *([0, 1, 2], [3], [4, 5, 6], [7]),
    ]
    assert fired("Log", journal) == [3, 6]


def test_a_trigger_waits_for_a_step_that_was_interrupted() -> None:
    source = Source(lengths=(5,), raises=((2, "KeyboardInterrupt"),))
    journal = trace(
        source, max_steps=5, lookahead=False, events=log(Part(at_step=(9,))), triggers=((1, "Log"),)
    )
    assert messages("raised", journal) == ["in fetch 2"]
    assert fired("Log", journal) == [2]


def test_a_trigger_is_not_for_the_run_that_comes_after_restart() -> None:
    arguments: dict[str, Any] = {"max_steps": 3, "events": log(Part(at_step=(9,)))}
    journal = trace(**arguments, restarts=True, triggers=((2, "Log"),))
    assert fired("Log", journal) == []
    # those before the first step are asked for in both runs
    journal = trace(**arguments, restarts=True, triggers=((-1, "Log"),))
    assert fired("Log", journal) == [0, 0]
    # nor if the run ends with an exception
    source = Source(lengths=(9,), promised=(9,), raises=((2, "OSError"),))
    journal = trace(source, **arguments, restarts=True, triggers=((1, "Log"),))
    assert fired("Log", journal) == []


def test_a_resumed_run_goes_on_with_its_timers_and_begins_anew_with_its_launch() -> None:
    def dues(triggers: Triggers, global_step: int, seconds: int) -> set[Hashable]:
        now = Now(global_step, 0, global_step, False, False, [seconds * 10**9])
        names = triggers.all_due(now)
        triggers.handed_over(now, names)
        return names

    events = {
        "steps": Part(every_n_steps=2),
        "launch steps": Part(every_n_steps=2, per_launch=True),
        "first": Part(at_step=(0,), per_launch=True),
        "seconds": Part(every_n_seconds=3),
        "launch seconds": Part(every_n_seconds=3, per_launch=True),
        "time": Part(at_time=(2,)),
        "launch time": Part(at_time=(2,), per_launch=True),
        "moment": Part(at_timestamp=(2,)),
        "trigger": Part(off=("at_step",)),
    }
    plan = Plan(LONG, "max_steps", 99, tuple((name, (part,)) for name, part in events.items()))
    triggers = Triggers(plan)
    triggers.wall_time = 5000 * 10**9
    assert dues(triggers, 0, 0) == {"first"}
    assert dues(triggers, 1, 2) == {"steps", "launch steps", "time", "launch time", "moment"}
    assert dues(triggers, 2, 3) == {"seconds", "launch seconds"}
    triggers.asked.add("trigger")
    triggers = triggers.resumed(3, 4 * 10**9)
    assert dues(triggers, 3, 5) == {"steps", "first"}
    assert dues(triggers, 4, 6) == {"launch steps", "seconds", "launch time", "moment"}
    assert dues(triggers, 5, 7) == {"steps", "launch seconds"}


def test_missed_periods_fire_once() -> None:
    # readings 0, 1, 8, 9, 10, 11: due at 8, then not before 11
    clock = Clock(body_costs=(1, 7, 1, 1, 1, 1))
    assert fires_at(Part(every_n_seconds=3), max_steps=6, clock=clock) == [2, 5]


def test_elapsed_stays_constant_while_the_clock_goes_backwards() -> None:
    clock = Clock(body_costs=(2, -5, 6, 1))  # readings 0, 2, -3, 3, 4
    journal = trace(max_steps=5, clock=clock, looks=(True,))
    assert [entry[-1] for entry in of("step", journal)] == [0, 2, 2, 3, 4]


def test_the_clock_is_read_at_the_first_request_and_after_fetching() -> None:
    journal = trace(Source(lengths=(2,)), max_seconds=100, clock=Clock(fetch_costs=(1,)))
    assert journal[:6] == [
        ("iter",),
        ("clock", 0),
        ("next",),
        ("next",),
        ("clock", 2),
        ("step", 0, frozenset(), (0, 0, 0, False, False), None),
    ]


def test_without_timers_the_clock_is_read_at_the_start_and_when_elapsed_is() -> None:
    condition = Condition("c", looks=True)
    journal = trace(
        max_steps=4, events=(("A", (Part(condition, from_step=2),)),), looks=(True, False)
    )
    # the start; body 0; the condition at step 2, and body 2 sees the same; the condition at step 3
    assert [reading for (reading,) in of("clock", journal)] == [0, 0, 2, 3]


def test_conditions_are_called_in_order_and_see_training_end_where_stop_when_fires() -> None:
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


def test_an_error_of_a_condition_gets_a_note_and_ends_the_run() -> None:
    condition = Condition("a", raises_at=1)
    journal = trace(max_steps=5, events=(("Log", (Part(condition),)),))
    assert of("raised", journal) == [
        ("ValueError", "call 1 of a", ("in the condition of event 'Log'",), None)
    ]
    assert of("state", journal) == [((0, 0, 0, False, False),)]
    assert of("end", journal) == [("exception",)]
    assert [entry[2] for entry in journal[-2:]] == ["LoopError", "LoopError"]


def test_events_joined_with_loop_events_fire_with_them() -> None:
    source = Source(lengths=(3,))
    assert fires_at(Part(at_step=(0,)), EPOCH_END, source=source, max_steps=5) == [0, 2]
    assert fires_at(Part(at_step=(0,)), TRAINING_END, source=source, max_steps=5) == [0, 4]


@pytest.mark.parametrize("promised", [None, (3,)])
def test_epoch_end_is_due_at_the_last_batch_with_and_without_length(
    promised: tuple[int, ...] | None,
) -> None:
    journal = trace(Source(lengths=(3,), promised=promised), max_epochs=2)
    assert fired(EPOCH, journal) == [2, 5]
    assert fired(LAST, journal) == [5]
    assert of("end", journal) == [("max_epochs",)]
    # three batches and the end, in both epochs
    assert len(of("next", journal)) == 8


def fetches_per_step(source: Source, **arguments: Any) -> list[int]:
    """The number of fetches up to each step, and up to the end of the `for`."""
    counts, count = [], 0
    for entry in trace(source, **arguments):
        count += entry[0] == "next"
        if entry[0] in ("step", "end"):
            counts.append(count)
    return counts


def test_with_a_length_there_is_no_lookahead() -> None:
    assert fetches_per_step(Source(lengths=(3,), promised=(3,)), max_epochs=1) == [1, 2, 3, 4]
    assert fetches_per_step(Source(lengths=(3,)), max_epochs=1) == [2, 3, 4, 4]
    assert fetches_per_step(Source(lengths=(3,)), max_epochs=1, dataloader_len=3) == [1, 2, 3, 3]


@pytest.mark.parametrize("error", ["TypeError", "OSError"])
def test_a_len_that_raises_counts_as_no_length(error: str) -> None:
    assert fetches_per_step(Source(lengths=(2,), promised=error), max_epochs=1) == [2, 3, 3]


def test_after_an_epochs_last_batch_its_iterator_is_asked_once_more() -> None:
    source = Source("callable", lengths=(2, 1), promised=(2, 1), nodes=(Node("loader"),))
    journal = trace(source, max_epochs=2)
    assert [entry[:3] for entry in journal if entry[0] != "clock"] == [
        *(("call",), ("set_epoch", "loader", 0), ("iter",)),
        ("next",),
        ("step", 0, frozenset()),
        ("next",),
        ("step", 1, {EPOCH}),
        ("next",),  # the last request, before the callable is called again
        *(("call",), ("set_epoch", "loader", 1), ("iter",)),
        ("next",),
        ("step", 2, {EPOCH, LAST}),
        ("stop_reason", "max_epochs"),
        ("next",),  # and before the `for` ends
        ("end", "max_epochs"),
        ("next after the end", "raised", "StopIteration"),
        ("iter after the end", "raised", "LoopError"),
    ]


@pytest.mark.parametrize(
    ("arguments", "fetches"),
    [
        # the run ends at the last batch of an epoch
        ({"max_steps": 3}, 4),
        ({"max_seconds": 2}, 4),
        ({"max_steps": 9, "stop_when": (Part(at_step=(2,)),)}, 4),
        # the run ends in the middle of an epoch, or the epoch is cut
        ({"max_steps": 2}, 2),
        ({"max_epochs": 1, "dataloader_len": 3}, 3),
        # lookahead has found the end
        ({"max_epochs": 1, "lookahead": True}, 4),
    ],
)
def test_the_iterator_is_asked_once_more_only_after_a_complete_epoch(
    arguments: dict[str, Any], fetches: int
) -> None:
    assert fetches_per_step(Source(lengths=(3,), promised=(3,)), **arguments)[-1] == fetches


def test_a_single_pass_source_is_never_asked_once_more() -> None:
    source = Source("single-pass", lengths=(3,), promised=(3,))
    assert fetches_per_step(source, max_epochs=1) == [1, 2, 3, 3]


def test_max_steps_in_the_middle_of_an_epoch_does_not_fire_epoch_end() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_steps=5, lookahead=False)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2], [4])
    assert len(of("next", journal)) == 6  # with the last request of epoch 0
    assert of("warning", journal) == []


@pytest.mark.parametrize("lookahead", [None, False])
def test_batches_beyond_the_promised_length_are_dropped_with_a_warning_per_epoch(
    lookahead: bool | None,
) -> None:
    source = Source(lengths=(3,), promised=(2,))
    journal = trace(source, max_epochs=2, lookahead=lookahead)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 3, 4]
    assert fired(EPOCH, journal) == [1, 3]
    assert messages("warning", journal) == [
        f"epoch {epoch} had more than the 2 batches that len(dataloader) promised; "
        "the rest is dropped; pass lookahead=True to use it"
        for epoch in (0, 1)
    ]


def test_lookahead_true_ignores_len() -> None:
    for promised in (2, 3, 4):
        source = Source(lengths=(3,), promised=(promised,))
        journal = trace(source, max_epochs=2, lookahead=True)
        assert fired(EPOCH, journal) == [2, 5]
        assert of("warning", journal) == []


def test_fewer_batches_than_promised_are_an_error() -> None:
    journal = trace(Source(lengths=(2,), promised=(3,)), max_epochs=1)
    assert fired(EPOCH, journal) == []
    assert messages("raised", journal) == [
        "epoch 0 ended after 2 of the 3 batches that len(dataloader) promised; "
        "pass lookahead=True to go by the data itself"
    ]


@pytest.mark.parametrize("promised", [None, (3,), (5,)])
@pytest.mark.parametrize("lookahead", [None, False])
def test_end_of_dataloader_is_used_instead_of_len_and_lookahead(
    lookahead: bool | None, promised: tuple[int, ...] | None
) -> None:
    source = Source(lengths=(3,), promised=promised, says_end="truly")
    journal = trace(source, max_epochs=2, lookahead=lookahead)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2, 5], [5])
    counts = fetches_per_step(source, max_epochs=2, lookahead=lookahead)
    assert counts == [1, 2, 3, 5, 6, 7, 8]  # with the last request of each epoch


def test_batches_after_end_of_dataloader_are_dropped_with_a_warning() -> None:
    journal = trace(Source(lengths=(3,), says_end="early"), max_epochs=2)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 3, 4]
    assert fired(EPOCH, journal) == [1, 3]
    assert messages("warning", journal) == [
        f"epoch {epoch} had more batches after the one at which its loader's end_of_dataloader "
        "was true; the rest is dropped"
        for epoch in (0, 1)
    ]


def test_an_end_of_dataloader_that_stays_false_is_an_error() -> None:
    journal = trace(Source(lengths=(3,), says_end="never"), max_epochs=2)
    assert fired(EPOCH, journal) == []
    assert of("raised", journal) == [
        (
            "DataLengthError",
            "epoch 0 ended after 3 batches, but its loader's end_of_dataloader did not say so; "
            "pass dataloader_len",
            (),
            None,
        )
    ]


def test_dataloader_len_takes_precedence_over_end_of_dataloader() -> None:
    source = Source(lengths=(3,), says_end="never")
    assert fired(EPOCH, trace(source, max_epochs=2, dataloader_len=2)) == [1, 3]


def test_an_error_in_the_last_request_is_raised_and_ends_the_run() -> None:
    source = Source(lengths=(2,), promised=(2,), raises=((2, "OSError"),))
    journal = trace(source, max_epochs=2)
    assert messages("raised", journal) == ["fetch 2 failed"]
    assert of("end", journal) == [("exception",)]
    # also after the last step of the run
    journal = trace(source, max_epochs=1)
    assert [entry for entry in journal if entry[0] in ("step", "stop_reason", "raised")] == [
        ("step", 0, frozenset(), (0, 0, 0, False, False), None),
        ("step", 1, {EPOCH, LAST}, (0, 1, 1, True, True), None),
        ("stop_reason", "max_epochs"),
        ("raised", "OSError", "fetch 2 failed", (), None),
    ]
    assert of("end", journal) == [("exception",)]
    assert [entry[2] for entry in journal[-2:]] == ["LoopError", "LoopError"]


def test_an_error_in_the_last_request_is_ignored_after_entering_again() -> None:
    source = Source(lengths=(2,), promised=(2,), raises=((2, "OSError"),))
    for leaves in (frozenset({0}), frozenset({1})):
        journal = trace(source, max_epochs=2, leaves=leaves)
        assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3]
        assert len(of("iter", journal)) == 2
        assert messages("raised", journal) == []


def test_an_interrupt_in_the_last_request_is_raised_and_the_request_not_repeated() -> None:
    source = Source(lengths=(2,), promised=(2,), raises=((2, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=2)
    assert [entry[:2] for entry in journal if entry[0] in ("step", "raised", "next", "iter")] == [
        ("iter",),
        *(("next",), ("step", 0), ("next",), ("step", 1)),
        *(("next",), ("raised", "KeyboardInterrupt")),
        ("iter",),
        *(("next",), ("step", 2), ("next",), ("step", 3)),
        ("next",),
    ]
    journal = trace(source, max_epochs=1)
    assert [entry[:2] for entry in journal[-5:]] == [
        ("raised", "KeyboardInterrupt"),
        ("raised", "LoopError"),  # entered again: this run is finished
        ("end", "max_epochs"),
        ("next after the end", "raised"),
        ("iter after the end", "raised"),
    ]


def test_an_empty_epoch_is_an_error() -> None:
    journal = trace(Source(lengths=(2, 0)), max_epochs=3)
    assert fired(EPOCH, journal) == [1]
    assert messages("raised", journal) == [
        "epoch 1 has no batch: the dataloader is empty or was consumed before"
    ]


def test_dataloader_len_divides_a_stream_into_epochs() -> None:
    journal = trace(Source("single-pass", lengths=(100,)), max_epochs=3, dataloader_len=2)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3, 4, 5]
    assert fired(EPOCH, journal) == [1, 3, 5]
    assert len(of("next", journal)) == 6


def test_an_exhausted_stream_without_lookahead_ends_with_a_warning() -> None:
    journal = trace(Source("single-pass", lengths=(3,)), max_steps=10)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([], [])
    assert journal[-4:-2] == [
        ("warning", "the dataloader ran dry at global_step 2, before the run's limit"),
        ("end", "exhausted"),
    ]


def test_an_exhausted_stream_with_lookahead_has_a_last_batch() -> None:
    journal = trace(Source("single-pass", lengths=(3,)), max_steps=10, lookahead=True)
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


def test_an_error_found_by_lookahead_comes_after_the_batch_before_it() -> None:
    journal = trace(Source(lengths=(5,), raises=((2, "OSError"),)), max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1]
    assert messages("raised", journal) == ["fetch 2 failed"]
    assert fired(EPOCH, journal) == []


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "late KeyboardInterrupt"])
@pytest.mark.parametrize("promised", [None, (4,)])
@pytest.mark.parametrize("kind", ["iterable", "callable", "generator"])
def test_an_epoch_is_opened_anew_after_an_interrupt_in_a_fetch(
    kind: str, promised: tuple[int, ...] | None, error: str, mapped: bool
) -> None:
    promised = None if kind == "generator" else promised
    source = Source(kind, lengths=(4,), promised=promised, raises=((2, error),), mapped=mapped)
    journal = trace(source, max_epochs=1)
    # fetches 0 and 1; 2 is interrupted; the new iterator's batches 2 and 3 are dropped, since they
    # stand for 0 and 1
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 4, 5]
    assert fired(EPOCH, journal) == [3]
    assert of("warning", journal) == []
    assert of("end", journal) == [("max_epochs",)]
    assert len(of("call", journal)) == (0 if kind == "iterable" else 2)
    assert len(of("iter", journal)) == (0 if kind == "generator" else 2)


def test_the_length_of_a_new_iterator_counts() -> None:
    source = Source(lengths=(3,), promised=(3,), raises=((1, "KeyboardInterrupt"),))
    # fetch 0; 1 is interrupted; 2 is skipped; 3, 4; the last request
    assert fetches_per_step(source, max_epochs=1) == [1, 4, 5, 6]
    assert fired(EPOCH, trace(source, max_epochs=1)) == [2]


def test_an_epoch_that_was_opened_anew_may_fail_or_be_interrupted() -> None:
    raises = ((2, "KeyboardInterrupt"), (5, "OSError"))
    source = Source(lengths=(4,), promised=(4,), raises=raises)
    journal = trace(source, max_epochs=1)
    # 0 and 1; the new iterator's 3 and 4 are dropped
    assert [entry[0] for entry in of("step", journal)] == [0, 1]
    assert messages("raised", journal) == ["in fetch 2", "fetch 5 failed"]
    # so is an error of a fetch whose batch would be dropped
    source = dataclasses.replace(source, raises=(raises[0], (4, "OSError")))
    assert messages("raised", trace(source, max_epochs=1)) == ["in fetch 2", "fetch 4 failed"]
    # an interrupt there makes another new iterator
    source = dataclasses.replace(source, raises=(raises[0], (4, "KeyboardInterrupt")))
    journal = trace(source, max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 5, 6]
    assert len(of("iter", journal)) == 3


def test_an_error_after_entering_again_is_not_believed_but_an_end_is() -> None:
    source = Source(lengths=(4,), promised=(4,), raises=((2, "OSError"),))
    for leaves in (frozenset({0}), frozenset({1})):
        journal = trace(source, max_epochs=1, leaves=leaves)
        assert [entry[0] for entry in of("step", journal)] == [0, 1, 4, 5]
        assert messages("raised", journal) == []
    # the second of an epoch is
    again = dataclasses.replace(source, raises=(*source.raises, (5, "OSError")))
    journal = trace(again, max_epochs=1, leaves=frozenset({1}))
    assert messages("raised", journal) == ["fetch 5 failed"]
    # and the first in a later epoch than that in which the loop was left
    later = dataclasses.replace(source, raises=((6, "OSError"),))
    journal = trace(later, max_epochs=2, leaves=frozenset({1}))
    assert messages("raised", journal) == ["fetch 6 failed"]
    source = Source(lengths=(2,), promised=(3,))
    journal = trace(source, max_epochs=1, leaves=frozenset({1}))
    assert [entry[0] for entry in of("raised", journal)] == ["DataLengthError"]
    assert len(of("iter", journal)) == 1


@pytest.mark.parametrize("arguments", [{"max_epochs": 1}, {"max_steps": 9}])
def test_a_single_pass_source_has_no_new_iterator_after_an_interrupt(
    arguments: dict[str, Any],
) -> None:
    raises: tuple[tuple[int, str], ...] = ((3, "KeyboardInterrupt"), (4, "OSError"))
    source = Source("single-pass", lengths=(5,), raises=raises)
    errors = [("KeyboardInterrupt", "in fetch 3"), ("LoopError", "single-pass")]
    journal = trace(source, **arguments)
    assert [entry[:2] for entry in of("raised", journal)] == errors
    assert of("raised", journal)[1][-1] == "OSError"  # its cause
    assert of("end", journal) == [("exception",)]
    # an end is not believed either
    source = Source("single-pass", lengths=(5,), raises=raises[:1], mapped=True)
    assert [entry[:2] for entry in of("raised", trace(source, **arguments))] == errors
    # a source that continues is used further
    source = Source("single-pass", lengths=(5,), raises=raises[:1])
    assert len(of("step", trace(source, **arguments))) == 5
    # after entering again without an interrupt, an error is raised; fetch 2 is ahead of step 1
    source = Source("single-pass", lengths=(5,), raises=((2, "OSError"),))
    leaves = frozenset({0 if "max_epochs" in arguments else 1})
    assert messages("raised", trace(source, leaves=leaves, **arguments)) == ["fetch 2 failed"]


def test_what_is_behind_the_first_batch_after_an_interrupt_decides_with_lookahead() -> None:
    source = Source("single-pass", lengths=(1,), raises=((0, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0]
    assert [entry[0] for entry in of("raised", journal)] == ["KeyboardInterrupt", "LoopError"]
    source = dataclasses.replace(source, lengths=(2,))
    assert fired(EPOCH, trace(source, max_epochs=1)) == [1]


def test_entering_again_continues_with_the_next_batch_unless_the_run_is_finished() -> None:
    journal = trace(max_steps=3, leaves=frozenset({0, 2}))
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2]
    assert messages("older", journal) == ["LoopError"]
    assert messages("raised", journal) == ["this run is finished; restart() begins a new one"]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (Source("single-pass"), {"max_epochs": 2}),
        (Source("single-pass"), {"max_epochs": 2, "dataloader_len": 3, "lookahead": True}),
        (Source(), {"max_epochs": 1, "lookahead": False}),
        (Source(), {"max_steps": 1, "lookahead": True, "dataloader_len": 3}),
        (Source(says_end="truly"), {"max_epochs": 1, "lookahead": True}),
    ],
)
def test_arguments_that_leave_the_ends_of_epochs_unknown_are_refused(
    source: Source, arguments: dict[str, Any]
) -> None:
    assert trace(source, **arguments) == [("refused", "ValueError", "refused")]


def test_a_loader_from_a_callable_is_refused_when_its_epoch_begins() -> None:
    source = Source("callable", says_end="truly")
    assert trace(source, max_epochs=1, lookahead=True)[:2] == [
        ("call",),
        ("raised", "ValueError", "refused", (), None),
    ]


# Lists


def lists(*entries: Any, **arguments: Any) -> list[object]:
    """The batches of a run with these entries; here each batch is its global step."""
    return [entry[0] for entry in of("step", trace(entries=entries, **arguments))]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(every_n_steps=4), [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]),
        (Part(at_step=(1, 5)), [[0, 1], [2, 3, 4], [5], [6, 7, 8], [9]]),
        # nothing is due outside its window
        (Part(every_n_steps=2, from_step=5, until_step=7), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
        # timers do not end a list
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
        # a batch that is dropped is fetched first
        ((3,), [[0, 1, 2], [4, 5, 6]]),
    ],
)
def test_no_list_spans_two_epochs(promised: tuple[int, ...] | None, expected: Any) -> None:
    source = Source(lengths=(5,), promised=promised)
    journal = trace(source, max_epochs=2, entries=(64,))
    assert [entry[0] for entry in of("step", journal)] == expected
    last = [len(expected[0]) - 1, 2 * len(expected[0]) - 1]
    assert (fired(EPOCH, journal), fired(LAST, journal)) == (last, last[1:])


def test_an_end_that_lookahead_finds_ends_a_list_and_the_rest_comes_in_the_next() -> None:
    assert lists((4, 2, 1), source=Source(lengths=(7,)), max_epochs=1) == [
        *([0, 1, 2, 3], [4, 5], [6]),
    ]
    assert lists((8, 3, 1), source=Source(lengths=(5,)), max_epochs=1) == [[0, 1, 2], [3], [4]]


def test_lookahead_in_a_list_fetches_as_in_single_steps() -> None:
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


def test_the_last_request_comes_before_the_next_list() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_epochs=1, entries=(2,))
    assert [entry[0] for entry in journal[:10]] == [
        *("iter", "clock", "next", "next", "step"),
        *("next", "step", "stop_reason", "next", "end"),
    ]


def test_end_of_dataloader_ends_a_list() -> None:
    source = Source(lengths=(5,), says_end="truly")
    assert lists(3, source=source, max_epochs=2) == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]


def test_an_unexpected_end_of_an_epoch_ends_the_list_without_an_event() -> None:
    journal = trace(Source(lengths=(3,)), max_steps=5, lookahead=False, entries=(8,))
    assert of("step", journal) == [
        ([0, 1, 2], frozenset(), (0, 2, 2, False, False), None),
        ([3, 4], {LAST}, (1, 4, 1, False, True), None),
    ]


def test_data_length_error_is_raised_after_the_batches_before_it() -> None:
    source = Source(lengths=(3,), promised=(6,))
    journal = trace(source, max_epochs=1, entries=((2, 1),))
    assert [entry[0] for entry in of("step", journal)] == [[0, 1], [2]]
    assert [entry[1] for entry in of("raised", journal)] == [
        "epoch 0 ended after 3 of the 6 batches that len(dataloader) promised; "
        "pass lookahead=True to go by the data itself"
    ]
    assert of("state", journal) == [((0, 2, 2, False, False),)]


def test_an_exhausted_stream_warns_after_its_last_list() -> None:
    journal = trace(Source("single-pass", lengths=(3,)), max_steps=9, entries=(2,))
    assert [entry[0] for entry in of("step", journal)] == [[0, 1], [2]]
    assert of("warning", journal) == [
        ("the dataloader ran dry at global_step 2, before the run's limit",)
    ]


def test_an_error_of_the_source_is_raised_after_the_batches_before_it() -> None:
    source = Source(lengths=(9,), promised=(9,), raises=((5, "OSError"),))
    assert lists((4, 2, 1), source=source, max_epochs=1) == [[0, 1, 2, 3], [4]]
    journal = trace(source, max_epochs=1, entries=((3, 1),))
    assert [(entry[0], entry[1]) for entry in journal if entry[0] in ("step", "raised")] == [
        *(("step", [0, 1, 2]), ("step", [3]), ("step", [4])),
        ("raised", "OSError"),
    ]
    assert len(of("next", journal)) == 6  # the fetch that failed is not repeated


def test_an_interrupt_is_raised_at_once_and_the_batches_before_it_come_later() -> None:
    source = Source(lengths=(6,), promised=(6,), raises=((3, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1, entries=(4, 2, None), leaves=frozenset({0}))
    assert [entry[:2] for entry in journal if entry[0] in ("step", "raised")] == [
        ("raised", "KeyboardInterrupt"),
        # of the new iterator, 3 to 5 are dropped, since they stand for 0 to 2
        *(("step", [0, 1]), ("step", 2), ("step", 6), ("step", 7), ("step", 8)),
    ]


def test_conditions_are_called_once_per_batch_and_end_the_list_if_they_hold() -> None:
    journal = trace(
        max_steps=6,
        events=log(Part(Condition("c", (False, False, True, False, False, True)), from_step=0)),
        entries=((4, 2, 1),),
    )
    assert of("step", journal) == [
        # the condition holds at the third batch; the largest size that fits is 2, then 1
        ([0, 1], frozenset(), (0, 1, 1, False, False), None),
        ([2], {"Log"}, (0, 2, 2, False, False), None),
        # three batches are left until max_steps
        ([3, 4], frozenset(), (0, 4, 4, False, False), None),
        ([5], {"Log", LAST}, (0, 5, 5, False, True), None),
    ]
    # only the condition of the last step sees training_end
    assert [state[1] for _, state in of("condition", journal)] == [0, 1, 2, 3, 4, 5]  # type: ignore[index]
    assert [state[4] for _, state in of("condition", journal)] == [False] * 5 + [True]  # type: ignore[index]


def test_stop_when_ends_the_list_and_later_conditions_see_training_end() -> None:
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


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [[0], [1], [2]]),
        (2, [[0, 1], [2]]),
        (3, [[0, 1, 2]]),
        (4, [[0, 1, 2]]),  # raised at the list's last step
        ((4, 2, 1), [[0, 1], [2]]),
        ((4, 3, 1), [[0, 1, 2]]),
        ((8, 2, 1), [[0, 1], [2]]),
    ],
)
def test_an_error_of_a_condition_is_raised_after_the_batches_before_it(
    sizes: Any, expected: Any
) -> None:
    part = Part(Condition("c", raises_at=3))
    journal = trace(max_steps=9, events=log(part), entries=(sizes,))
    assert [entry[0] for entry in of("step", journal)] == expected
    assert of("raised", journal) == [
        ("ValueError", "call 3 of c", ("in the condition of event 'Log'",), None)
    ]
    assert of("state", journal) == [((0, 2, 2, False, False),)]


def test_a_list_that_an_error_of_its_last_condition_shortens_keeps_its_clock_reading() -> None:
    clock = Clock(fetch_costs=(1,), body_costs=(0,))
    events = (
        ("Log", (Part(Condition("c", raises_at=3)),)),
        ("Due", (Part(at_step=(3,)),)),
        ("Timer", (Part(every_n_seconds=4),)),
        ("Late", (Part(at_time=(1,), from_step=3),)),
    )
    sized = Source(lengths=(9,), promised=(9,))
    journal = trace(sized, max_steps=9, events=events, clock=clock, entries=(4,), looks=(True,))
    # four batches were fetched: the timer is due at the third; what is due at the fourth does not
    # fire
    assert of("step", journal) == [([0, 1, 2], {"Timer"}, (0, 2, 2, False, False), 4)]
    assert of("clock", journal) == [(0,), (4,)]
    # if the three batches need two lists, the second has its own reading
    journal = trace(sized, max_steps=9, events=events, clock=clock, entries=((4, 2, 1),))
    assert of("step", journal) == [
        ([0, 1], {"Timer"}, (0, 1, 1, False, False), None),
        ([2], frozenset(), (0, 2, 2, False, False), None),
    ]
    assert of("clock", journal) == [(0,), (4,), (4,)]


def test_timers_are_checked_at_the_last_batch_of_a_list_with_one_reading() -> None:
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


def test_when_time_ends_the_run_the_queued_batches_are_dropped() -> None:
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


# Lists of batches_per_step


def lists_of(journal: Journal) -> list[object]:
    return [entry[0] for entry in of("step", journal)]


SIZED_5 = Source(lengths=(5,), promised=(5,))


@pytest.mark.parametrize("source", [SIZED_5, Source(lengths=(5,))])
def test_an_epochs_last_list_is_short_and_steps_count_lists(source: Source) -> None:
    journal = trace(source, max_epochs=2, batches_per_step=2, events=log(Part(every_n_steps=2)))
    assert lists_of(journal) == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]
    assert fired(EPOCH, journal) == [2, 5]
    assert fired("Log", journal) == [1, 3, 5]


def test_dataloader_len_counts_batches_and_max_steps_lists() -> None:
    cut = trace(SIZED_5, max_steps=3, batches_per_step=2, dataloader_len=3)
    assert lists_of(cut) == [[0, 1], [2], [3, 4]]
    assert (fired(EPOCH, cut), fired(LAST, cut)) == ([1], [2])


def test_an_error_comes_after_the_short_list_which_has_no_epoch_end() -> None:
    for source in (
        Source(lengths=(3,), promised=(4,)),
        Source(lengths=(4,), promised=(4,), raises=((3, "OSError"),)),
        Source(lengths=(4,), raises=((3, "OSError"),)),
    ):
        journal = trace(source, max_epochs=1, batches_per_step=2)
        assert lists_of(journal) == [[0, 1], [2]]
        assert fired(EPOCH, journal) == fired(LAST, journal) == []
        assert of("end", journal) == [("exception",)]


@pytest.mark.parametrize(("lookahead", "last"), [(None, []), (True, [2])])
def test_a_streams_last_list_carries_training_end_where_its_end_is_known(
    lookahead: bool | None, last: list[int]
) -> None:
    source = Source("single-pass", lengths=(5,))
    journal = trace(source, max_steps=9, batches_per_step=2, lookahead=lookahead)
    assert lists_of(journal) == [[0, 1], [2, 3], [4]]
    assert fired(LAST, journal) == last
    assert of("end", journal) == [("exhausted",)]


def test_chunks_are_lists_of_lists_and_an_interrupted_list_is_completed() -> None:
    source = Source(lengths=(5,), promised=(5,), raises=((3, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1, batches_per_step=2, entries=(2,))
    # the epoch is opened again and gives its batches under new numbers, three of them unseen
    assert lists_of(journal) == [[[0, 1], [2, 6]], [[7]]]


# Runs that begin at a step; batches are numbered within their epoch, 100 for each set_epoch


def begins(source: Source, start_step: int, **arguments: Any) -> list[object]:
    journal = trace(source, start_step=start_step, **arguments)
    steps: list[Any] = of("step", journal)
    return [(batch, *state[:3]) for batch, _, state, _ in steps]


def test_a_run_begins_at_the_place_that_follows_from_a_length() -> None:
    three = Source(lengths=(3,), promised=(3,))
    assert begins(three, 4, max_epochs=2) == [(1, 1, 4, 1), (2, 1, 5, 2)]
    assert begins(three, 3, max_epochs=2)[0] == (0, 1, 3, 0)
    assert begins(SIZED_5, 4, max_epochs=2, batches_per_step=2)[0] == ([2, 3], 1, 4, 1)
    assert begins(LONG, 4, max_epochs=2, dataloader_len=3)[0] == (1, 1, 4, 1)
    stream = Source("single-pass", lengths=(9,))
    assert begins(stream, 4, max_steps=5, dataloader_len=3) == [(4, 1, 4, 1)]
    assert begins(stream, 4, max_steps=5) == [(4, 0, 4, 4)]


@pytest.mark.parametrize("promised", [None, (2, 4)])
@pytest.mark.parametrize("kind", ["iterable", "callable"])
def test_a_run_begins_at_the_place_that_going_through_the_epochs_tells(
    kind: str, promised: tuple[int, ...] | None
) -> None:
    source = Source(kind, (2, 4), promised, nodes=(Node("loader"),))
    assert begins(source, 5, max_epochs=2) == [(103, 1, 5, 3)]
    assert begins(source, 2, max_epochs=2)[0] == (100, 1, 2, 0)
    assert begins(source, 1, max_epochs=2)[0] == (1, 0, 1, 1)


@pytest.mark.parametrize("promised", [None, (3,)])
@pytest.mark.parametrize("start", [6, 99])
def test_beyond_its_limit_a_run_is_over_and_quiet(
    start: int, promised: tuple[int, ...] | None
) -> None:
    source = Source(lengths=(3,), promised=promised)
    for limit in ({"max_epochs": 2}, {"max_steps": 6}):
        journal = trace(source, start_step=start, **limit)
        assert [entry[0] for entry in journal] == [
            "end",
            "next after the end",
            "iter after the end",
        ]
        assert of("end", journal) == [tuple(limit)]
        assert of("iter after the end", journal) == [("went on",)]


def test_windows_and_launches_count_from_the_first_step() -> None:
    events = (*log(Part(every_n_steps=4)), ("First", (Part(at_step=(1,), per_launch=True),)))
    journal = trace(start_step=6, max_steps=13, events=events, asks=(True,), laps=(Lap(3, "L"),))
    assert fired("Log", journal) == [7, 11]
    assert fired("First", journal) == [7]
    windows = [entry[0] for entry in of("windows", journal)]
    assert windows == [[1, 1], [2, 2], [1, 1], [2, 2], [3, 3], [4, 4], [1, 5]]
    assert of("lap", journal) == [("L", (4, 3.0))]


def test_restart_begins_at_the_step_again() -> None:
    steps = begins(Source(lengths=(3,), promised=(3,)), 4, max_steps=5, restarts=True)
    assert steps == [(1, 1, 4, 1)] * 2


def test_a_loader_that_is_left_as_it_is_has_a_first_epoch_that_is_shorter() -> None:
    three = Source(lengths=(3,), promised=(3,))
    journal = trace(three, start_step=4, max_epochs=3, fast_forward=False)
    assert lists_of(journal) == [0, 1, 0, 1, 2]
    assert fired(EPOCH, journal) == [5, 8]
    assert messages("warning", journal) == []
    # without a length that all epochs have, it begins with epoch 0
    assert begins(Source(lengths=(3,)), 4, max_epochs=1, fast_forward=False)[0] == (0, 0, 4, 0)


# Laps and pauses


def test_a_lap_counts_from_the_step_at_which_its_label_was_asked_for_last() -> None:
    laps = (Lap(-1, "a"), Lap(2, "a"), Lap(2, "a", "ends"), Lap(3, "a"), Lap(3, "b", "ends"))
    journal = trace(max_steps=5, laps=laps, clock=Clock(fetch_costs=(2,)))
    assert of("lap", journal) == [
        ("a", (0, 0.0)),
        ("a", (3, 10.0)),  # four fetches, one of them a look ahead, and two bodies
        ("a", (3, 10.0)),
        ("a", (1, 3.0)),
        ("b", (4, 14.0)),
    ]


@pytest.mark.parametrize(("nested", "left_open"), [(False, False), (True, False), (False, True)])
def test_a_pause_is_no_training_time_but_counts_for_the_launch(
    nested: bool, left_open: bool
) -> None:
    events = (
        *log(Part(every_n_seconds=4)),
        ("Launch", (Part(every_n_seconds=4, per_launch=True),)),
        ("Time", (Part(at_time=(7,), per_launch=True),)),
        ("Moment", (Part(at_timestamp=(7,)),)),
    )
    pauses = (Pause(1, 2 if nested else 4, nested=nested, left_open=left_open),)
    journal = trace(max_seconds=9, events=events, pauses=pauses, laps=(Lap(3, "a"),))
    # a body takes a second, so that at step n the training time is n, and from step 2 on the
    # launch's n + 4
    assert fired("Log", journal) == [4, 8]
    assert fired("Launch", journal) == [2, 6]
    assert fired("Time", journal) == fired("Moment", journal) == [3]
    assert fired(LAST, journal) == [9]
    assert of("lap", journal) == [("a", (4, 3.0))]


def test_in_a_pause_time_stands_still_and_the_clock_is_not_read() -> None:
    laps = (Lap(1, "a", "pause"), Lap(1, "b", "ends"))
    journal = trace(max_steps=2, pauses=(Pause(1, 5, looks=True),), laps=laps)
    # with the readings where training time starts, and where the pause begins and ends; and "b"
    assert of("clock", journal) == [(0,), (2,), (7,), (7,)]
    assert of("in a pause", journal) == [(2.0,)]
    assert of("lap", journal) == [("a", (2, 2.0)), ("b", (2, 2.0))]


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
    """The plan without time criteria, errors of conditions, and leaving the `for`."""

    def bare(part: Part | str) -> Part | str:
        if isinstance(part, str):
            return part
        condition = part.condition and dataclasses.replace(
            part.condition, raises_at=None, error="ValueError", looks=False
        )
        return dataclasses.replace(
            part, condition=condition, every_n_seconds=None, at_time=(), at_timestamp=()
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
        triggers=(),
        laps=(),
        pauses=(),
        restarts=False,
    )


def per_step(journal: Journal) -> dict[int, object]:
    """The events by global step, without steps that have none."""
    return {state[1]: names for _, names, state, _ in of("step", journal) if names}  # type: ignore[misc]


def flat(journal: Journal, plan: Plan) -> list[object]:
    """What was handed over, step by step, in single steps and in lists of them."""
    handed_over: list[object] = []
    for each, *_ in of("step", journal):
        step = each if plan.batches_per_step is None else each[0]  # type: ignore[index]
        handed_over += each if isinstance(step, list) else [each]  # type: ignore[list-item]
    return handed_over


@given(PLANS)
def test_lists_of_any_size_fire_the_same_events_at_the_same_steps(plan: Plan) -> None:
    plan = without_time(plan)
    listed = decided(plan)
    single = decided(dataclasses.replace(plan, entries=(None,)))
    if of("end", single) == [(None,)]:
        reject()  # the run was abandoned after the greatest number of bodies
    assert flat(listed, plan) == flat(single, plan)
    assert per_step(listed) == per_step(single)
    # and the source, the conditions and the warnings are the same
    for kind in ("call", "set_epoch", "iter", "next", "condition", "warning", "raised", "end"):
        assert of(kind, listed) == of(kind, single)
