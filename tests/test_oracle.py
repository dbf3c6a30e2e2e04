"""The judge is judged: runs whose outcome is known by hand from the contract."""

from __future__ import annotations

from typing import Any

import pytest

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
    oracle_trace,
)

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
