"""Processes that agree: what one of them asks for, all do at the same step. Ranks are threads."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dloop import Event, Loop, LoopError, LoopEvents, LoopWarning, sync
from fleet import Ahead, Fleet, at_once
from manual_clock import ManualClock

Trace = list[tuple[int, list[str]]]
EXCHANGES: dict[str, Callable[[Fleet, int], Any]] = {"ahead": Ahead, "at once": at_once}


def names(events: Any) -> list[str]:
    return sorted(map(str, events))


def trace(loop: Loop[Any], body: Callable[[int], object] = id) -> Trace:
    """The steps at which anything is due, and what; `body` is called at each step."""
    found = []
    for _, events in loop:
        if events:
            found.append((loop.global_step, names(events)))
        body(loop.global_step)
    return found


def on_all(ranks: int, run: Callable[[int, Any], Any]) -> list[Any]:
    """What `run` returns or raises on each rank, which it is called with, and its exchange."""
    fleet = Fleet(ranks)
    return fleet.run(lambda rank: run(rank, Ahead(fleet, rank)))


def same_on_all(ranks: int, run: Callable[[int, Any], Any]) -> Any:
    outcomes = on_all(ranks, run)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome == outcomes[0]
    return outcomes[0]


# When what was asked for comes


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_a_timer_that_is_due_on_one_comes_to_all_at_the_agreement_after_the_next(
    exchange: Callable[[Fleet, int], Any],
) -> None:
    fleet = Fleet(2)

    def run(rank: int) -> Trace:
        clock = ManualClock()
        events = {"Save": Event(every_n_seconds=7)}
        loop = Loop(
            range(30),
            events,
            max_epochs=1,
            clock=clock,
            sync=exchange(fleet, rank),
            sync_every=5,
        )
        return trace(loop, lambda _: clock.advance(1 - rank / 2))

    end = (29, ["LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END", "Save"])
    # On rank 0 seven seconds have passed at step 7, which it says at 9. They count anew from 14:
    # at 19 there are five, at 24 ten.
    assert fleet.run(run) == [[(14, ["Save"]), end]] * 2


def test_a_timer_on_its_own_waits_for_agreements_too() -> None:
    clock = ManualClock()
    fleet = Fleet(1)
    loop = Loop(
        range(99),
        {"Save": Event(every_n_seconds=2)},
        max_steps=12,
        clock=clock,
        sync=Ahead(fleet, 0),
        sync_every=3,
    )
    assert trace(loop, lambda _: clock.advance(1)) == [
        (5, ["Save"]),
        (11, ["LoopEvents.TRAINING_END", "Save"]),
    ]


def test_what_was_asked_at_the_last_agreement_comes_with_the_limits_last_step() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        holds = Event(lambda state: rank == 1 and state.global_step in (1, 12))
        loop = Loop(range(8), {"C": holds}, max_epochs=2, sync=exchange, sync_every=5)
        return trace(loop)

    assert same_on_all(2, run) == [
        (7, ["LoopEvents.EPOCH_END"]),
        (9, ["C"]),
        (15, ["C", "LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"]),
    ]


def test_a_condition_that_holds_often_comes_once_in_an_agreement() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        holds = Event(lambda state: rank == 0 and state.global_step in (1, 2, 6))
        return trace(Loop(range(20), {"C": holds}, max_steps=18, sync=exchange, sync_every=4))

    # held at 1 and 2: asked at 3, comes at 7; held at 6: asked at 7, comes at 11
    assert same_on_all(2, run) == [(7, ["C"]), (11, ["C"]), (17, ["LoopEvents.TRAINING_END"])]


def test_conditions_are_called_at_every_step_and_told_of_the_end() -> None:
    def run(rank: int, exchange: Any) -> tuple[list[int], list[int]]:
        called: list[int] = []
        ends: list[int] = []

        def condition(state: Any) -> bool:
            called.append(state.global_step)
            if state.training_end:
                ends.append(state.global_step)
            return True

        stop = Event(lambda state: rank == 1 and state.global_step == 2)
        loop = Loop(
            range(99),
            {"C": Event(condition)},
            max_steps=90,
            stop_when=stop,
            sync=exchange,
            sync_every=5,
        )
        trace(loop)
        assert loop.stop_reason == "stop_when"
        return called, ends

    assert same_on_all(2, run) == (list(range(10)), [9])


def test_step_and_epoch_criteria_of_the_same_event_need_no_agreement() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        clock = ManualClock()
        event = Event(every_n_steps=4, every_n_seconds=100) | LoopEvents.EPOCH_END
        loop = Loop(range(6), {"E": event}, max_epochs=2, clock=clock, sync=exchange, sync_every=50)
        return trace(loop, lambda _: clock.advance(rank))

    end = "LoopEvents.EPOCH_END"
    assert same_on_all(2, run) == [
        (3, ["E"]),
        (5, ["E", end]),
        (7, ["E"]),
        (11, ["E", end, "LoopEvents.TRAINING_END"]),
    ]


def test_points_in_time_come_once_each_on_clocks_that_differ() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        clock = ManualClock()
        events = {"At": Event(at_time=(3, 12, 13)), "Late": Event(at_time=2, from_step=9)}
        loop = Loop(range(40), events, max_steps=36, clock=clock, sync=exchange, sync_every=4)
        return trace(loop, lambda _: clock.advance(1 + rank))

    # Rank 1 asks for 3 at step 3, and for 12 and 13 at step 7; rank 0 is there at step 13
    assert same_on_all(2, run) == [
        (7, ["At"]),
        (11, ["At"]),
        (15, ["Late"]),
        (35, ["LoopEvents.TRAINING_END"]),
    ]


def test_a_moment_of_the_wall_clock() -> None:
    def run(rank: int, exchange: Any) -> tuple[Trace, Any]:
        clock = ManualClock()
        end = Event(at_timestamp=1 if rank else 2**32)  # past on rank 1 alone
        loop = Loop(
            range(40), max_steps=36, stop_when=end, clock=clock, sync=exchange, sync_every=4
        )
        return trace(loop), loop.stop_reason

    assert same_on_all(2, run) == ([(7, ["LoopEvents.TRAINING_END"])], "stop_when")


def test_max_seconds_ends_the_run_on_all_and_its_state_is_over_on_all() -> None:
    def run(rank: int, exchange: Any) -> tuple[Trace, Any, Trace, Any]:
        def loop(number: int) -> Loop[int]:
            return Loop(range(99), max_seconds=10, clock=clock, sync=exchange, sync_every=5)

        clock = ManualClock()
        first = loop(0)
        found = trace(first, lambda _: clock.advance(0.1 + rank))
        again = loop(1)
        again.load_state_dict(first.state_dict())
        return found, first.stop_reason, trace(again), again.stop_reason

    end = [(19, ["LoopEvents.TRAINING_END"])]  # on rank 1 the time is up at step 10
    assert same_on_all(2, run) == (end, "max_seconds", [], "max_seconds")


def test_time_in_a_pause_on_one_counts_on_none() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        clock = ManualClock()
        loop = Loop(
            range(20),
            {"Save": Event(every_n_seconds=10)},
            max_steps=18,
            clock=clock,
            sync=exchange,
            sync_every=4,
        )

        def body(step: int) -> None:
            clock.advance(1)
            if rank == 0:
                with loop.pause_clock():
                    clock.advance(100)

        return trace(loop, body)

    assert same_on_all(2, run) == [(15, ["Save"]), (17, ["LoopEvents.TRAINING_END"])]


# stop() and trigger()


@pytest.mark.parametrize("sizes", [None, 3, (4, 2, 1)])
def test_stop_on_one_ends_all(sizes: Any) -> None:
    def run(rank: int, exchange: Any) -> tuple[list[int], Any]:
        loop = Loop(range(99), max_epochs=1, sync=exchange, sync_every=5)
        seen: list[int] = []
        for batches, _ in loop if sizes is None else loop.chunks(sizes):
            seen += [batches] if sizes is None else batches  # type: ignore[list-item, arg-type]
            if rank == 1 and loop.global_step >= 5:
                loop.stop()
        return seen, loop.stop_reason

    assert same_on_all(2, run) == (list(range(15)), "stop")


def test_a_signal_ends_the_run_at_the_agreement_after_the_next() -> None:
    loop = Loop(range(99), max_epochs=1, signals=[signal.SIGTERM], sync=list, sync_every=4)
    found = trace(loop, lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    assert found == [(7, ["LoopEvents.INTERRUPT", "LoopEvents.TRAINING_END"])]
    assert loop.stop_reason == "SIGTERM"


def test_a_condition_that_holds_ends_no_list() -> None:
    holds = Event(lambda state: state.global_step == 1)
    loop = Loop(range(12), {"C": holds}, max_epochs=1, sync=list, sync_every=6)
    found = [(len(batches), names(due)) for batches, due in loop.chunks(4)]
    assert found[:3] == [(4, []), (2, []), (4, [])]
    assert "C" in found[3][1]


def test_stop_before_the_first_step() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        loop = Loop(range(99), max_epochs=1, sync=exchange, sync_every=5)
        if rank == 0:
            loop.stop()
        return trace(loop)

    assert same_on_all(2, run) == [(9, ["LoopEvents.TRAINING_END"])]


def test_triggers_on_several_come_to_all_at_once() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        events = {name: Event(every_n_steps=None) for name in ("A", "B", ("c", 1))}
        loop = Loop(range(99), events, max_steps=30, sync=exchange, sync_every=4)

        def body(step: int) -> None:
            if step in (0, 1):
                loop.trigger(["A", "B", ("c", 1)][rank])

        return trace(loop, body)

    found = same_on_all(3, run)
    assert found == [(7, ["('c', 1)", "A", "B"]), (29, ["LoopEvents.TRAINING_END"])]


def test_a_trigger_of_an_event_that_only_one_has() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        events = {"Log": Event(every_n_steps=20)} if rank == 0 else {}
        loop = Loop(range(99), events, max_steps=18, sync=exchange, sync_every=4)
        return trace(loop, lambda step: loop.trigger("Log") if step == 2 and rank == 0 else None)

    end = (17, ["LoopEvents.TRAINING_END"])
    assert on_all(2, run) == [[(7, ["Log"]), end], [end]]


def test_a_trigger_of_each_comes_whatever_the_others_trigger() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        events = {name: Event(every_n_steps=None) for name in "ABC"}
        loop = Loop(range(99), events, max_steps=40, sync=exchange, sync_every=5)

        def body(step: int) -> None:
            if rank == 0 and step == 2:
                loop.trigger("B")
            if rank == 1 and step % 5 == 2:
                loop.trigger("A")
                loop.trigger("C")

        return trace(loop, body)

    found = same_on_all(2, run)
    assert [step for step, due in found if "B" in due] == [9]
    # Those of steps 7, 17 and so on come with what was asked for at the agreement before
    assert [step for step, due in found if {"A", "C"} <= {*due}] == [9, 19, 29, 39]


@pytest.mark.parametrize("name", [0.5, ("event", 0.5)])
def test_names_that_other_processes_cannot_know_are_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^events: .*0\.5.*: with sync, pass names"):
        Loop(range(9), {name: Event(at_step=1)}, max_epochs=1, sync=list[int], sync_every=5)


def test_a_timer_does_not_come_where_its_name_was_due_since_it_was_asked_for() -> None:
    """Rule 2.6: it is the name that restarts."""

    def run(rank: int, exchange: Any) -> Trace:
        clock = ManualClock()
        events = {"Save": Event(every_n_steps=13, every_n_seconds=9)}
        loop = Loop(range(60), events, max_epochs=1, clock=clock, sync=exchange, sync_every=10)
        return trace(loop, lambda step: clock.advance(1))

    found = same_on_all(2, run)
    # Asked for at 9 and not delivered at 19, since it was due at 12, and so on
    assert [step for step, due in found if "Save" in due] == [12, 25, 38, 51]


@pytest.mark.parametrize(
    ("answer", "shown"), [(None, "None"), ([3], r"\[3\]"), (5, "5"), ({}, r"\{\}")]
)
def test_a_callable_that_returns_something_else_is_told_so(answer: Any, shown: str) -> None:
    events = {"Save": Event(every_n_seconds=9)}
    loop = Loop(range(9), events, max_epochs=1, sync=lambda values: answer, sync_every=5)
    with pytest.raises(TypeError, match=rf"^sync: it returned {shown}; let it return the greatest"):
        list(loop)


def test_a_callable_may_return_anything_that_ints_can_be_taken_from() -> None:
    class Number:
        def __init__(self, value: int) -> None:
            self.value = value

        def __int__(self) -> int:
            return self.value

    def maximum(values: list[int]) -> Any:
        return tuple(map(Number, values))

    events = {
        "Save": Event(every_n_steps=None),
        "Seen": Event(lambda state: state.global_step == 7),
    }
    loop = Loop(range(30), events, max_epochs=1, sync=maximum, sync_every=5)
    found = trace(loop, lambda step: loop.trigger("Save") if step == 2 else None)
    assert found[:2] == [(9, ["Save"]), (14, ["Seen"])]


# Lengths


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 14}, {"max_seconds": 15}])
@pytest.mark.parametrize("batches_per_step", [None, 3])
def test_the_shortest_shard_counts_on_all_without_a_warning(
    limit: dict[str, Any], batches_per_step: Any
) -> None:
    def run(rank: int, exchange: Any) -> tuple[Trace, int]:
        clock = ManualClock()
        loop = Loop(
            [0] * (7 + rank),
            max_epochs=limit.get("max_epochs"),
            max_steps=limit.get("max_steps"),
            max_seconds=limit.get("max_seconds"),
            batches_per_step=batches_per_step,
            clock=clock,
            sync=exchange,
            sync_every=4,
        )
        return trace(loop, lambda _: clock.advance(1)), loop.global_step

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, last = same_on_all(3, run)
    steps = 3 if batches_per_step else 7
    ends = [step for step, due in found if "LoopEvents.EPOCH_END" in due]
    assert ends == list(range(steps - 1, last + 1, steps))
    assert found[-1][0] == last


def test_an_epoch_that_is_cut_short_is_cut_in_lists_too() -> None:
    def run(rank: int, exchange: Any) -> list[list[int]]:
        loop = Loop(range(5 + rank), max_epochs=2, sync=exchange, sync_every=50)
        return [batches for batches, _ in loop.chunks(3)]

    assert same_on_all(2, run) == [[0, 1, 2], [3, 4]] * 2


def test_len_knows_the_shortest() -> None:
    def run(rank: int, exchange: Any) -> list[int]:
        loop = Loop(range(5 + rank), max_epochs=2, sync=exchange, sync_every=50)
        return [len(loop) for _ in loop]

    assert same_on_all(2, run) == [*range(9, -1, -1)]


def test_lengths_that_are_not_known_are_refused_under_max_epochs() -> None:
    def run(rank: int, exchange: Any) -> Any:
        data = range(9) if rank else lambda: iter(range(9))
        trace(Loop(data, max_epochs=2, sync=exchange, sync_every=5))

    for error in on_all(2, run):
        assert isinstance(error, LoopError)
        assert "how many batches epoch 0 has; pass dataloader_len" in str(error)


def test_lengths_that_are_not_known_are_each_ones_own_under_max_steps() -> None:
    def run(rank: int, exchange: Any) -> tuple[list[int], Trace]:
        data = range(4 + rank) if rank else lambda: iter(range(4))
        holds = Event(lambda state: rank == 1 and state.global_step == 1)
        loop = Loop(data, {"C": holds}, max_steps=12, sync=exchange, sync_every=5)
        ends, others = [], []
        for _, events in loop:
            if LoopEvents.EPOCH_END in events:
                ends.append(loop.global_step)
            if "C" in events:
                others.append((loop.global_step, ["C"]))
        return ends, others

    assert on_all(2, run) == [([3, 7, 11], [(9, ["C"])]), ([4, 9], [(9, ["C"])])]


def test_an_empty_shard_ends_all() -> None:
    def run(rank: int, exchange: Any) -> None:
        trace(Loop(range(rank), max_epochs=1, sync=exchange, sync_every=5))

    assert ["epoch 0 has no batch" in str(error) for error in on_all(2, run)] == [True, True]


def test_start_step_finds_its_place_by_the_shortest() -> None:
    def run(rank: int, exchange: Any) -> tuple[int, int, list[int]]:
        loop = Loop(range(5 + rank), max_epochs=3, start_step=7, sync=exchange, sync_every=4)
        seen = [batch for batch, _ in loop]
        return loop.epoch, loop.global_step, seen

    assert same_on_all(2, run) == (2, 14, [2, 3, 4, 0, 1, 2, 3, 4])


def test_a_state_before_the_place_of_start_step_is_agreed_upon_is_refused() -> None:
    loop = Loop(range(5), max_epochs=3, start_step=7, sync=list, sync_every=4)
    with pytest.raises(LoopError, match="after the first step: the place of start_step"):
        loop.state_dict()
    for _ in loop:
        break
    assert loop.state_dict()["epoch"] == 1


def test_what_was_delivered_is_not_asked_again_after_a_resume_without_the_latest_step() -> None:
    def begin() -> Loop[int]:
        events = {"C": Event(lambda state: state.global_step == 2)}
        return Loop(range(30), events, max_steps=30, sync=list, sync_every=4)

    loop = begin()
    for batch, due in loop:
        assert ("C" in due) == (batch == 7)
        if batch >= 11:
            resumed = begin()
            resumed.load_state_dict(loop.state_dict(step_done=False))
            assert [step for step, names in trace(resumed) if "C" in names] == []


def test_an_exchange_that_fails_when_the_run_is_over_is_an_error() -> None:
    class Broken(Ahead):
        def finish(self) -> list[int]:
            if len(self._fleet.sent[0]) == 4:  # the one of the agreement at step 3
                raise TimeoutError
            return super().finish()

    loop = Loop(iter(range(6)), max_steps=9, sync=Broken(Fleet(1), 0), sync_every=4)
    with pytest.warns(LoopWarning, match="ran dry"), pytest.raises(TimeoutError):
        trace(loop)


# Before the first step


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"start_step": 3}, r"global_step \(0 to 3\)"),
        ({"max_steps": 21}, r"max_steps \(20 to 21\)"),
        ({"max_steps": None, "max_epochs": 20}, "kind of limit"),
        ({"sync_every": 4}, r"sync_every \(4 to 5\)"),
        ({"batches_per_step": 2}, "batches_per_step"),
        ({"events": {"E": Event(every_n_seconds=3)}}, "definition of these events"),
        ({"events": {}}, "number of events with a clock or a condition"),
        ({"stop_when": Event(at_step=9)}, "number of events"),
        ({"start_step": 25}, "run that is over"),
    ],
)
def test_what_differs_is_refused_on_all(differs: dict[str, Any], message: str) -> None:
    def run(rank: int, exchange: Any) -> None:
        arguments: dict[str, Any] = {
            "events": {"E": Event(every_n_seconds=2)},
            "max_steps": 20,
            "sync_every": 5,
        }
        if rank == 1:
            arguments.update(differs)
        list(Loop([0] * 99, sync=exchange, **arguments))

    for error in on_all(2, run):
        with pytest.raises(LoopError, match=rf"^sync: the processes differ in their .*{message}"):
            raise error


def test_a_different_number_of_moments_is_refused_on_all() -> None:
    def run(rank: int, exchange: Any) -> None:
        events = {"E": Event(at_timestamp=[1, 2, 3] if rank else [1])}
        list(Loop(range(9), events, max_epochs=1, sync=exchange, sync_every=5))

    for error in on_all(2, run):
        with pytest.raises(LoopError, match="differ in their definition of these events"):
            raise error


def test_events_that_count_steps_may_differ() -> None:
    def run(rank: int, exchange: Any) -> Trace:
        events = {"Save": Event(lambda state: state.global_step == 2)}
        if rank == 0:
            events = {"Log": Event(every_n_steps=5), **events, "End": Event(at_epoch=0)}
        found = trace(Loop(range(9), events, max_epochs=1, sync=exchange, sync_every=3))
        return [(step, due) for step, due in found if "Save" in due]

    assert same_on_all(2, run) == [(5, ["Save"])]


# Leaving, resuming, ending


def test_a_run_that_all_leave_and_enter_again_goes_on() -> None:
    def run(rank: int, exchange: Any) -> tuple[list[int], Trace]:
        holds = Event(lambda state: rank == 1 and state.global_step == 3)
        loop = Loop(range(12), {"C": holds}, max_epochs=1, sync=exchange, sync_every=4)
        seen = []
        for batch, _ in loop:
            seen.append(batch)
            if batch == 5:  # with an exchange under way
                break
        found = trace(loop)
        return seen, found

    found = [(7, ["C"]), (11, ["LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"])]
    assert same_on_all(2, run) == (list(range(6)), found)


@pytest.mark.parametrize("last", range(1, 18))
def test_what_was_asked_and_not_delivered_is_asked_again_after_a_resume(last: int) -> None:
    def run(rank: int, exchange: Any) -> list[str]:
        events = {
            "C": Event(lambda state: rank == 1 and state.global_step in (2, 9)),
            "Save": Event(every_n_seconds=5),
            "At": Event(at_time=(3, 8)),
        }

        def begin() -> Loop[int]:
            return Loop(range(30), events, max_steps=30, clock=clock, sync=exchange, sync_every=4)

        clock = ManualClock()
        loop = begin()
        found: list[str] = []
        for _, due in loop:
            found += names(due)
            clock.advance(1 + rank)
            if loop.global_step == last:
                break
        resumed = begin()
        resumed.load_state_dict(loop.state_dict())
        loop.close()
        for _, due in resumed:
            found += names(due)
        return found

    found = same_on_all(2, run)
    assert found.count("C") == 2
    assert found.count("At") >= 1
    assert found[-1] in ("Save", "LoopEvents.TRAINING_END")


def test_a_condition_that_was_asked_for_comes_without_sync_too() -> None:
    fleet = Fleet(1)
    events = {"C": Event(lambda state: state.global_step == 2)}
    loop = Loop(range(9), events, max_epochs=1, sync=Ahead(fleet, 0), sync_every=4)
    for batch, _ in loop:
        if batch == 3:
            break
    alone = Loop(range(9), events, max_epochs=1)
    alone.load_state_dict(loop.state_dict())
    assert trace(alone)[0] == (4, ["C"])


@pytest.mark.parametrize("way", ["close", "restart", "stop_when", "limit", "with"])
def test_no_exchange_is_left_unfinished(way: str) -> None:
    fleet = Fleet(1)
    exchange = Ahead(fleet, 0)
    stop_when = Event(at_step=6) if way == "stop_when" else None
    loop = Loop(range(8), max_epochs=1, stop_when=stop_when, sync=exchange, sync_every=4)
    if way == "with":
        with loop:
            for batch, _ in loop:
                if batch == 5:
                    break
    else:
        for batch, _ in loop:
            if batch == 5 and way in ("close", "restart"):
                break
    assert exchange.unfinished() == (way in ("close", "restart"))
    if way == "restart":
        loop.restart()
        assert [batch for batch, _ in loop] == list(range(8))
    loop.close()
    assert exchange.unfinished() == 0


def test_one_that_raises_ends_the_others_by_their_time_out() -> None:
    def run(rank: int, exchange: Any) -> None:
        for batch, _ in Loop(range(99), max_epochs=1, sync=exchange, sync_every=4):
            if batch == 9 and rank == 1:
                exchange._fleet.break_off()  # as a framework notices
                raise ZeroDivisionError

    outcomes = on_all(3, run)
    assert [type(outcome) for outcome in outcomes] == [
        TimeoutError,
        ZeroDivisionError,
        TimeoutError,
    ]


def test_steps_between_agreements_exchange_nothing() -> None:
    fleet = Fleet(1)
    loop = Loop(range(100), max_epochs=1, sync=Ahead(fleet, 0), sync_every=10)
    trace(loop)
    # the comparison, the names (there is none), the epoch's length, and the agreements up to the
    # one before the last step
    assert len(fleet.sent[0]) == 3 + 9


# Random plans

parts = st.fixed_dictionaries(
    {},
    optional={
        "every_n_steps": st.integers(1, 9),
        "every_n_seconds": st.integers(1, 9),
        "at_time": st.lists(st.integers(0, 40), min_size=1, max_size=3),
        "at_step": st.integers(0, 30),
        "until_step": st.integers(1, 30),
    },
).filter(lambda given: given.keys() - {"until_step"})


@settings(max_examples=60)
@given(
    ranks=st.integers(2, 4),
    every=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    speeds=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    plans=st.lists(parts, max_size=3),
    holds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=4),
    asks=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 30), st.sampled_from(("stop", "trigger"))),
        max_size=3,
    ),
    limit=st.sampled_from(({"max_epochs": 3}, {"max_steps": 20}, {"max_seconds": 30})),
    sizes=st.none() | st.sampled_from((3, (4, 1))),
    batches_per_step=st.none() | st.integers(1, 3),
    exchange=st.sampled_from(list(EXCHANGES)),
)
def test_random_plans_have_the_same_trace_on_all(
    ranks: int,
    every: int,
    lengths: list[int],
    speeds: list[int],
    plans: list[dict[str, Any]],
    holds: list[tuple[int, int]],
    asks: list[tuple[int, int, str]],
    limit: dict[str, Any],
    sizes: Any,
    batches_per_step: Any,
    exchange: str,
) -> None:
    fleet = Fleet(ranks)

    def run(rank: int) -> tuple[Any, ...]:
        clock = ManualClock()
        events = {
            str(number): Event(
                lambda state, number=number: (rank, state.global_step + number) in holds, **plan
            )
            for number, plan in enumerate(plans)
        }
        loop = Loop(
            range(lengths[rank]),
            {"Log": Event(every_n_steps=3), **events},
            batches_per_step=batches_per_step,
            clock=clock,
            sync=EXCHANGES[exchange](fleet, rank),
            sync_every=every,
            **limit,
        )
        found = []
        for batches, due in loop if sizes is None else loop.chunks(sizes):
            state = loop.state
            found.append((state.epoch, state.global_step, state.epoch_step, names(due)))
            clock.advance(speeds[rank] * (1 if sizes is None else len(batches)))
            for who, step, what in asks:
                if who == rank and step == loop.global_step:
                    loop.stop() if what == "stop" else loop.trigger("Log")
            if loop.global_step > 200:  # nobody's clock goes
                loop.stop()
        return [each for each in found if each[-1]], loop.global_step, loop.stop_reason

    outcomes = fleet.run(run)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome == outcomes[0]


@pytest.mark.slow
def test_a_fleet_of_a_thousand() -> None:
    before = threading.stack_size(256 * 1024)
    try:
        fleet = Fleet(1000)

        def run(rank: int) -> Trace:
            clock = ManualClock()
            holds = Event(lambda state: state.global_step == rank)
            loop = Loop(
                range(50 + rank % 7),
                {"C": holds, "Save": Event(every_n_seconds=8)},
                max_epochs=1,
                clock=clock,
                sync=Ahead(fleet, rank),
                sync_every=10,
            )
            return trace(loop, lambda step: clock.advance(1 + rank / 1000))

        outcomes = fleet.run(run)
    finally:
        threading.stack_size(before)
    assert [outcome for outcome in outcomes if outcome != outcomes[0]] == []
    assert [step for step, due in outcomes[0] if "C" in due] == [19, 29, 39, 49]
    # What a rank sends is as long as with two ranks
    assert {len(values) for lists in fleet.sent for values in lists} == {16, 1, 2, 6}


# Arguments, and runs that look distributed


@pytest.mark.no_core
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sync": max}, ValueError, "sync_every=None: pass how many steps"),
        ({"sync_every": 5}, ValueError, "sync_every=5: pass sync with it"),
        ({"sync": max, "sync_every": 0}, ValueError, "sync_every=0"),
        ({"sync": True, "sync_every": 5}, TypeError, "sync=True: pass dloop.sync.torch_dist"),
        ({"sync": 3, "sync_every": 5}, TypeError, "sync=3: pass dloop.sync.torch_distributed"),
    ],
)
def test_arguments_that_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Loop(range(3), max_epochs=1, **arguments)


UNDECIDED: dict[str, dict[str, Any]] = {
    "'Save'": {"events": {"Save": Event(every_n_seconds=5), "Log": Event(every_n_steps=2)}},
    "stop_when": {"stop_when": Event(lambda state: False)},
    "max_seconds": {"max_epochs": None, "max_seconds": 0},
    "'C', signals": {"events": {"C": Event(lambda state: False)}, "signals": [2]},
}


@pytest.mark.parametrize("named", UNDECIDED)
@pytest.mark.parametrize(
    ("size", "rank"),
    [("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")],
)
def test_a_run_that_looks_distributed_is_warned_of_on_rank_0(
    named: str, size: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv(rank, "0")
    arguments = {"max_epochs": 1, **UNDECIDED[named]}
    if arguments.get("max_seconds") == 0:
        arguments["max_seconds"] = 1e-9
    with pytest.warns(LoopWarning) as caught:
        list(Loop(range(3), **arguments))
    assert [str(warning.message) for warning in caught] == [
        "this process is one of several, which may decide otherwise about "
        f"{named}; pass sync= and sync_every=, or sync=False if that is meant"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Loop(range(3), sync=False, **arguments))
        list(Loop(range(3), {"Log": Event(every_n_steps=2)}, max_epochs=1))
        monkeypatch.setenv(rank, "1")
        list(Loop(range(3), **arguments))
        monkeypatch.setenv(rank, "0")
        monkeypatch.setenv(size, "1")
        list(Loop(range(3), **arguments))


def test_limits_of_time_are_told_in_seconds() -> None:
    def run(rank: int, exchange: Any) -> None:
        list(Loop([0], max_seconds=1.5 + rank, sync=exchange, sync_every=5))

    for error in on_all(2, run):
        assert str(error) == "sync: the processes differ in their max_seconds (1.5 to 2.5)"


def torch_with(backend: str, world_size: int = 2, rank: int = 0) -> Any:
    """Stands in for torch.distributed; a group is its backend."""
    made: list[str] = []

    def new_group(backend: str) -> str:
        made.append(backend)
        return f"{backend}, number {len(made)}"

    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: bool(backend),
        get_world_size=lambda: world_size,
        get_rank=lambda: rank,
        get_backend=str,
        get_backend_config=str,
        group=SimpleNamespace(WORLD=backend),
        new_group=new_group,
        made=made,
    )


@pytest.mark.no_core
def test_a_gloo_group_is_made_once_where_the_default_group_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for backend, made in (("nccl", ["gloo"]), ("gloo", []), ("cpu:gloo,cuda:nccl", [])):
        torch = torch_with(backend)
        monkeypatch.setitem(sys.modules, "torch.distributed", torch)
        for _ in range(2):
            assert callable(sync.torch_distributed().start)
        assert torch.made == made
    with pytest.raises(ValueError, match="group: its backend is nccl; pass one that has gloo"):
        sync.torch_distributed("nccl")
    assert callable(sync.torch_distributed("gloo").start)
    monkeypatch.setitem(sys.modules, "torch.distributed", torch_with(""))
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group"):
        sync.torch_distributed()


@pytest.mark.no_core
def test_mpi_takes_a_duplicate_of_the_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    duplicated: list[str] = []
    world = SimpleNamespace(Dup=lambda: duplicated.append("world"))
    other = SimpleNamespace(Dup=lambda: duplicated.append("other"))
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(COMM_WORLD=world))
    sync.mpi()
    sync.mpi(other)
    assert duplicated == ["world", "other"]


@pytest.mark.no_core
def test_jax_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    utilities = SimpleNamespace(process_allgather=None)
    monkeypatch.setitem(sys.modules, "jax.experimental.multihost_utils", utilities)
    assert callable(sync.jax_processes())


@pytest.mark.no_core
@pytest.mark.parametrize(
    ("torch", "jax", "rank"),
    [
        (torch_with("gloo", 4, 3), None, 3),
        (torch_with("gloo", 1, 0), None, None),
        (torch_with(""), None, None),
        (SimpleNamespace(is_available=lambda: False), None, None),
        (None, {"is_initialized": lambda: True}, 1),
        (None, {"is_initialized": lambda: False}, None),
        (None, {}, None),  # an older version
    ],
)
def test_a_framework_that_is_there_tells_the_rank(
    torch: Any, jax: dict[str, Any] | None, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = None
    if jax is not None:
        module = SimpleNamespace(
            distributed=SimpleNamespace(**jax), process_count=lambda: 2, process_index=lambda: 1
        )
    monkeypatch.setitem(sys.modules, "torch.distributed", torch)
    monkeypatch.setitem(sys.modules, "jax", module)
    assert sync.rank_among_several() == rank


@pytest.mark.no_core
def test_nothing_is_imported_to_find_out() -> None:
    program = (
        "import sys; from dloop import Event, Loop\n"
        "list(Loop(range(3), {'C': Event(lambda state: False)}, max_epochs=1))\n"
        "print({'torch', 'jax', 'numpy', 'mpi4py'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.no_core
@pytest.mark.parametrize(
    ("make", "package", "message"),
    [
        (sync.torch_distributed, "torch.distributed", "torch_distributed.*pip install torch"),
        (sync.mpi, "mpi4py.MPI", "mpi.*pip install mpi4py"),
        (sync.jax_processes, "jax.experimental.multihost_utils", "jax_proc.*pip install jax"),
    ],
)
def test_a_package_that_is_missing_is_named(
    make: Callable[[], object], package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        make()
