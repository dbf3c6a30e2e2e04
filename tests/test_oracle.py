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
    # three batches and the end, in both epochs; what differs is when
    assert len(of("next", journal)) == 8


def fetches_per_step(source: Source, **arguments: Any) -> list[int]:
    """How many fetches there were when each step was handed over, and at the end of the `for`."""
    counts, count = [], 0
    for entry in trace(source, **arguments):
        count += entry[0] == "next"
        if entry[0] in ("step", "end"):
            counts.append(count)
    return counts


def test_a_length_is_trusted_and_nothing_is_looked_ahead() -> None:
    assert fetches_per_step(Source(lengths=(3,), promised=(3,)), max_epochs=1) == [1, 2, 3, 4]
    assert fetches_per_step(Source(lengths=(3,)), max_epochs=1) == [2, 3, 4, 4]
    assert fetches_per_step(Source(lengths=(3,)), max_epochs=1, dataloader_len=3) == [1, 2, 3, 3]


@pytest.mark.parametrize("error", ["TypeError", "OSError"])
def test_a_len_that_raises_is_no_length(error: str) -> None:
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
        # whatever ends the run at the last batch of an epoch
        ({"max_steps": 3}, 4),
        ({"max_seconds": 2}, 4),
        ({"max_steps": 9, "stop_when": (Part(at_step=(2,)),)}, 4),
        # in the middle of an epoch, or where it is cut
        ({"max_steps": 2}, 2),
        ({"max_epochs": 1, "dataloader_len": 3}, 3),
        # a look has found the end
        ({"max_epochs": 1, "lookahead": True}, 4),
    ],
)
def test_the_last_request_comes_at_the_end_of_a_whole_epoch(
    arguments: dict[str, Any], fetches: int
) -> None:
    assert fetches_per_step(Source(lengths=(3,), promised=(3,)), **arguments)[-1] == fetches


def test_a_single_pass_source_is_never_asked_once_more() -> None:
    source = Source("single-pass", lengths=(3,), promised=(3,))
    assert fetches_per_step(source, max_epochs=1) == [1, 2, 3, 3]


def test_max_steps_cuts_an_epoch_without_an_epoch_end() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_steps=5, lookahead=False)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2], [4])
    assert len(of("next", journal)) == 6  # with the last request of epoch 0
    assert of("warning", journal) == []


@pytest.mark.parametrize("lookahead", [None, False])
def test_longer_than_promised_is_dropped_with_a_warning_in_each_epoch(
    lookahead: bool | None,
) -> None:
    source = Source(lengths=(3,), promised=(2,))
    journal = trace(source, max_epochs=2, lookahead=lookahead)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 3, 4]
    assert fired(EPOCH, journal) == [1, 3]
    assert text("warning", journal) == [
        f"epoch {epoch} had more than the 2 batches that len(dataloader) promised; "
        "the rest is dropped; pass lookahead=True to use it"
        for epoch in (0, 1)
    ]


def test_lookahead_true_goes_by_the_data_whatever_len_says() -> None:
    for promised in (2, 3, 4):
        source = Source(lengths=(3,), promised=(promised,))
        journal = trace(source, max_epochs=2, lookahead=True)
        assert fired(EPOCH, journal) == [2, 5]
        assert of("warning", journal) == []


def test_shorter_than_promised_is_an_error() -> None:
    journal = trace(Source(lengths=(2,), promised=(3,)), max_epochs=1)
    assert fired(EPOCH, journal) == []
    assert text("raised", journal) == [
        "epoch 0 ended after 2 of the 3 batches that len(dataloader) promised; "
        "pass lookahead=True to go by the data itself"
    ]


@pytest.mark.parametrize("promised", [None, (3,), (5,)])
@pytest.mark.parametrize("lookahead", [None, False])
def test_a_loader_that_says_its_end_is_asked(
    lookahead: bool | None, promised: tuple[int, ...] | None
) -> None:
    source = Source(lengths=(3,), promised=promised, says_end="truly")
    journal = trace(source, max_epochs=2, lookahead=lookahead)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([2, 5], [5])
    counts = fetches_per_step(source, max_epochs=2, lookahead=lookahead)
    assert counts == [1, 2, 3, 5, 6, 7, 8]  # with the last request of each epoch


def test_what_a_loader_gives_after_its_end_is_dropped_with_a_warning() -> None:
    journal = trace(Source(lengths=(3,), says_end="early"), max_epochs=2)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 3, 4]
    assert fired(EPOCH, journal) == [1, 3]
    assert text("warning", journal) == [
        f"epoch {epoch} had more batches after the one at which its loader's end_of_dataloader "
        "was true; the rest is dropped"
        for epoch in (0, 1)
    ]


def test_a_loader_that_never_says_its_end_is_an_error() -> None:
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


def test_dataloader_len_goes_before_what_the_loader_says() -> None:
    source = Source(lengths=(3,), says_end="never")
    assert fired(EPOCH, trace(source, max_epochs=2, dataloader_len=2)) == [1, 3]


def test_an_error_in_the_last_request_comes_out() -> None:
    source = Source(lengths=(2,), promised=(2,), raises=((2, "OSError"),))
    journal = trace(source, max_epochs=2)
    assert text("raised", journal) == ["fetch 2 failed"]
    assert of("end", journal) == [("exception",)]
    # the run had its last step already, and has failed all the same
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
    journal = trace(source, max_epochs=2, leaves=frozenset({1}))
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3]
    assert len(of("iter", journal)) == 2
    assert text("raised", journal) == []
    # entered again before the epoch's last fetch: that has given its batch since
    journal = trace(source, max_epochs=2, leaves=frozenset({0}))
    assert text("raised", journal) == ["fetch 2 failed"]


def test_an_interrupt_in_the_last_request_comes_out_and_it_is_not_repeated() -> None:
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
    assert text("raised", journal) == [
        "epoch 1 has no batch: the dataloader is empty or was consumed before"
    ]


def test_an_explicit_length_gives_a_stream_epochs() -> None:
    journal = trace(Source("single-pass", lengths=(100,)), max_epochs=3, dataloader_len=2)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3, 4, 5]
    assert fired(EPOCH, journal) == [1, 3, 5]
    assert len(of("next", journal)) == 6


def test_a_stream_that_runs_dry_without_a_look_ends_with_a_warning() -> None:
    journal = trace(Source("single-pass", lengths=(3,)), max_steps=10)
    assert (fired(EPOCH, journal), fired(LAST, journal)) == ([], [])
    assert journal[-4:-2] == [
        ("warning", "the dataloader ran dry at global_step 2, before the run's limit"),
        ("end", "exhausted"),
    ]


def test_a_stream_that_runs_dry_under_lookahead_has_a_last_batch() -> None:
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


def test_an_error_met_while_looking_ahead_comes_after_the_batch_in_hand() -> None:
    journal = trace(Source(lengths=(5,), raises=((2, "OSError"),)), max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1]
    assert text("raised", journal) == ["fetch 2 failed"]
    assert fired(EPOCH, journal) == []


@pytest.mark.parametrize("promised", [None, (4,)])
def test_an_interrupt_in_a_fetch_loses_nothing(promised: tuple[int, ...] | None) -> None:
    source = Source(lengths=(4,), promised=promised, raises=((2, "KeyboardInterrupt"),))
    journal = trace(source, max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2, 3]
    assert of("end", journal) == [("max_epochs",)]
    assert len(of("iter", journal)) == 1


def test_after_an_interrupt_only_the_true_end_counts() -> None:
    source = Source(lengths=(4,), promised=(4,), raises=((1, "late KeyboardInterrupt"),))
    # fetches 0; 1 is interrupted, and its batch is lost; 2 and the look 3; 4, which finds the end
    assert fetches_per_step(source, max_epochs=1) == [1, 4, 5, 5]
    assert fired(EPOCH, trace(source, max_epochs=1)) == [2]
    # unless nothing is to be looked ahead
    journal = trace(source, max_epochs=1, lookahead=False)
    assert [entry[0] for entry in of("raised", journal)] == ["KeyboardInterrupt", "DataLengthError"]
    # the same of a single-pass source whose length is trusted
    single_pass = dataclasses.replace(source, kind="single-pass")
    assert fetches_per_step(single_pass, max_epochs=1) == [1, 4, 5, 5]


@pytest.mark.parametrize("kind", ["iterable", "callable", "generator"])
def test_an_end_after_an_interrupt_is_not_believed(kind: str) -> None:
    source = Source(kind, lengths=(4,), raises=((1, "KeyboardInterrupt"),), mapped=True)
    journal = trace(source, max_epochs=1, lookahead=True)
    # the first look was interrupted: batch 0 is in hand; anew, 1 is dropped as it was fetched
    assert [entry[0] for entry in of("step", journal)] == [0, 2, 3, 4]
    assert fired(EPOCH, journal) == [3]
    assert text("warning", journal) == [
        "the dataloader keeps no state, so its first 1 batches are fetched and dropped "
        "to go on in epoch 0"
    ]
    assert len(of("call", journal)) == (0 if kind == "iterable" else 2)
    assert len(of("iter", journal)) == (0 if kind == "generator" else 2)


def test_an_iterator_that_is_made_anew_is_trusted_again() -> None:
    source = Source(lengths=(3,), promised=(3,), raises=((1, "KeyboardInterrupt"),), mapped=True)
    # fetch 0; 1 is interrupted; 2 is skipped; 3, 4; the last request
    assert fetches_per_step(source, max_epochs=1) == [1, 4, 5, 6]
    assert fired(EPOCH, trace(source, max_epochs=1)) == [2]


def test_an_error_after_an_interrupt_is_not_believed() -> None:
    raises = ((2, "KeyboardInterrupt"), (3, "OSError"))
    source = Source(lengths=(4,), promised=(4,), raises=raises)
    journal = trace(source, max_epochs=1)
    # 0 and 1, which are dropped as 2 and 3, and then 4 and 5
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 4, 5]
    assert text("raised", journal) == ["in fetch 2"]
    # a second failure counts; the first one anew would be fetch 6
    source = dataclasses.replace(source, raises=(*raises, (6, "OSError")))
    journal = trace(source, max_epochs=1)
    assert text("raised", journal) == ["in fetch 2", "fetch 6 failed"]
    # so does one that comes while it is set forward
    source = dataclasses.replace(source, raises=(*raises, (5, "OSError")))
    assert text("raised", trace(source, max_epochs=1)) == ["in fetch 2", "fetch 5 failed"]
    # after another interrupt there it begins anew: 0, 1, then 2, then 4 and 5 are skipped
    source = dataclasses.replace(source, raises=(*raises, (5, "KeyboardInterrupt")))
    journal = trace(source, max_epochs=1)
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 5, 6]
    assert len(of("iter", journal)) == 3
    assert len(of("warning", journal)) == 1


def test_an_error_after_entering_again_is_not_believed_but_an_end_is() -> None:
    source = Source(lengths=(4,), promised=(4,), raises=((2, "OSError"),))
    journal = trace(source, max_epochs=1, leaves=frozenset({1}))
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 4, 5]
    assert text("raised", journal) == []
    journal = trace(source, max_epochs=1, leaves=frozenset({0}))
    assert text("raised", journal) == ["fetch 2 failed"]
    source = Source(lengths=(2,), promised=(3,))
    journal = trace(source, max_epochs=1, leaves=frozenset({1}))
    assert [entry[0] for entry in of("raised", journal)] == ["DataLengthError"]
    assert len(of("iter", journal)) == 1


@pytest.mark.parametrize("arguments", [{"max_epochs": 1}, {"max_steps": 9}])
def test_a_single_pass_source_cannot_be_opened_anew(arguments: dict[str, Any]) -> None:
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
    # what gives its next batch goes on
    source = Source("single-pass", lengths=(5,), raises=raises[:1])
    assert len(of("step", trace(source, **arguments))) == 5
    # after it was entered again an error comes out as it is; the look of step 1 is fetch 2
    source = Source("single-pass", lengths=(5,), raises=((2, "OSError"),))
    leaves = frozenset({0 if "max_epochs" in arguments else 1})
    assert text("raised", trace(source, leaves=leaves, **arguments)) == ["fetch 2 failed"]


def test_leaving_goes_on_with_the_next_batch_and_a_finished_run_is_not_entered() -> None:
    journal = trace(max_steps=3, leaves=frozenset({0, 2}))
    assert [entry[0] for entry in of("step", journal)] == [0, 1, 2]
    assert text("older", journal) == ["LoopError"]
    assert text("raised", journal) == ["this run is finished; restart() begins a new one"]


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
def test_what_cannot_have_epochs_is_refused(source: Source, arguments: dict[str, Any]) -> None:
    assert trace(source, **arguments) == [("refused", "ValueError", "refused")]


def test_what_a_callable_returns_is_refused_at_the_request_that_opens_the_epoch() -> None:
    source = Source("callable", says_end="truly")
    assert trace(source, max_epochs=1, lookahead=True)[:2] == [
        ("call",),
        ("raised", "ValueError", "refused", (), None),
    ]


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
        # what is dropped is fetched, and counts
        ((3,), [[0, 1, 2], [4, 5, 6]]),
    ],
)
def test_no_list_spans_two_epochs(promised: tuple[int, ...] | None, expected: Any) -> None:
    source = Source(lengths=(5,), promised=promised)
    journal = trace(source, max_epochs=2, entries=(64,))
    assert [entry[0] for entry in of("step", journal)] == expected
    last = [len(expected[0]) - 1, 2 * len(expected[0]) - 1]
    assert (fired(EPOCH, journal), fired(LAST, journal)) == (last, last[1:])


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


def test_the_last_request_comes_before_the_next_list() -> None:
    journal = trace(Source(lengths=(3,), promised=(3,)), max_epochs=1, entries=(2,))
    assert [entry[0] for entry in journal[:10]] == [
        *("iter", "clock", "next", "next", "step"),
        *("next", "step", "stop_reason", "next", "end"),
    ]


def test_a_loader_that_says_its_end_closes_a_list() -> None:
    source = Source(lengths=(5,), says_end="truly")
    assert lists(3, source=source, max_epochs=2) == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]


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
    journal = trace(Source("single-pass", lengths=(3,)), max_steps=9, entries=(2,))
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
def test_what_a_condition_raises_comes_after_the_batches_before(sizes: Any, expected: Any) -> None:
    part = Part(Condition("c", raises_at=3))
    journal = trace(max_steps=9, events=log(part), entries=(sizes,))
    assert [entry[0] for entry in of("step", journal)] == expected
    assert of("raised", journal) == [
        ("ValueError", "call 3 of c", ("in the condition of event 'Log'",), None)
    ]
    assert of("state", journal) == [((0, 2, 2, False, False),)]


def test_the_reading_of_a_list_whose_last_condition_raises_serves_the_list_before_it() -> None:
    clock = Clock(fetch_costs=(1,), body_costs=(0,))
    events = (
        ("Log", (Part(Condition("c", raises_at=3)),)),
        ("Due", (Part(at_step=(3,)),)),
        ("Timer", (Part(every_n_seconds=4),)),
        ("Late", (Part(at_time=(1,), from_step=3),)),
    )
    sized = Source(lengths=(9,), promised=(9,))
    journal = trace(sized, max_steps=9, events=events, clock=clock, entries=(4,), looks=(True,))
    # four batches were fetched: the timer is due at the step of the third; what was due at the
    # fourth never comes
    assert of("step", journal) == [([0, 1, 2], {"Timer"}, (0, 2, 2, False, False), 4)]
    assert of("clock", journal) == [(0,), (4,)]
    # where the three batches need two lists, the second has its own reading
    journal = trace(sized, max_steps=9, events=events, clock=clock, entries=((4, 2, 1),))
    assert of("step", journal) == [
        ([0, 1], {"Timer"}, (0, 1, 1, False, False), None),
        ([2], frozenset(), (0, 2, 2, False, False), None),
    ]
    assert of("clock", journal) == [(0,), (4,), (4,)]


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
