"""Processes that agree: what one requests, all do at the same step. The ranks are threads here."""

from __future__ import annotations

import signal
import sys
from array import array
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dloop import DataExhaustedError, Event, Loop, LoopError, LoopEvents, LoopWarning, sync
from fleet import Ahead, Fleet
from loops import after, flat, resumed
from manual_clock import ManualClock
from recording_loaders import RecordingBatches, RecordingLoader
from stateful_loaders import StatefulLoader

Trace = list[tuple[int, list[str]]]
END = (29, ["LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"])


def names(events: Any) -> list[str]:
    return sorted(map(str, events))


def trace(loop: Loop[Any], body: Callable[[int], object] = id) -> Trace:
    """Return the steps at which anything fires, and what; `body` is called at each step."""
    found = []
    for _, events in loop:
        if events:
            found.append((loop.global_step, names(events)))
        body(loop.global_step)
    return found


def on_all(ranks: int, run: Callable[[int, Any], Any], every: int = 5) -> list[Any]:
    """Return what `run(rank, sync)` returns or raises, by rank."""
    fleet = Fleet(ranks)
    return fleet.run(lambda rank: run(rank, sync.Sync(Ahead(fleet, rank), every)))


def same_on_all(ranks: int, run: Callable[[int, Any], Any], every: int = 5) -> Any:
    """Return what `run(rank, sync)` returns, the same on all ranks."""
    outcomes = on_all(ranks, run, every)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome == outcomes[0]
    return outcomes[0]


ALONE = sync.maximum(list, every=4)
"""What a single process agrees on with itself."""


# Timers and time


@pytest.mark.parametrize(
    ("events", "advances", "expected"),
    [
        # rank 0 has 4 seconds at step 4, 9 at step 9, 14 at step 14, ...; each is read 5 steps
        # later: at 14 the agreed time is 9, at 19 it is 14 (5 later), at 24 it is 19 (10 later)
        ({"E": Event(every_n_seconds=7)}, (1, 0.5), [(14, ["E"]), (24, ["E"]), END]),
        # each point in time fires once; rank 1 has 8 seconds at step 4, 18 at step 9
        (
            {"At": Event(at_time=(3, 12, 13)), "Late": Event(at_time=2, from_step=9)},
            (1, 2),
            [(9, ["At", "Late"]), (14, ["At"]), END],
        ),
        # a step restarts the timer at the agreed time: 4 at step 12; 14 at 19, 24 at 29
        (
            {"E": Event(at_step=12, every_n_seconds=10)},
            (1, 1),
            [(12, ["E"]), (19, ["E"]), (29, ["E", *END[1]])],
        ),
        # a point in time is not lost between agreements
        (
            {"A": Event(at_time=5, from_step=12), "B": Event(every_n_seconds=99, at_step=12)},
            (1, 1),
            [(12, ["B"]), (14, ["A"]), END],
        ),
        # the launch's time is agreed on, too
        (
            {"E": Event(every_n_seconds=8, per_launch=True)},
            (1, 2),
            [*[(step, ["E"]) for step in (9, 14, 19, 24)], (29, ["E", *END[1]])],
        ),
    ],
)
def test_timers_fire_at_the_same_agreements_on_clocks_that_differ(
    events: dict[str, Event], advances: tuple[float, float], expected: Trace
) -> None:
    def run(rank: int, agreed: Any) -> Trace:
        clock = ManualClock(1000 * rank)
        loop = Loop(range(30), events, max_epochs=1, clock=clock, sync=agreed)
        return trace(loop, lambda _: clock.advance(advances[rank]))

    assert same_on_all(2, run) == expected


def test_max_seconds_ends_the_run_on_all_and_resumed_runs_are_finished_on_all() -> None:
    def run(rank: int, agreed: Any) -> tuple[Trace, Any, Trace, Any]:
        clock = ManualClock()
        first = Loop(range(99), max_seconds=10, clock=clock, sync=agreed)
        found = trace(first, lambda _: clock.advance(0.1 + rank))
        again = Loop(range(99), max_seconds=10, clock=clock, sync=agreed)
        again.load_state_dict(first.state_dict())
        return found, first.stop_reason, trace(again), again.stop_reason

    end = [(19, ["LoopEvents.TRAINING_END"])]  # rank 1 has 15.4 seconds at step 14
    assert same_on_all(2, run) == (end, "max_seconds", [], "max_seconds")


def test_a_pause_on_one_process_counts_on_none() -> None:
    def run(rank: int, agreed: Any) -> Trace:
        clock = ManualClock()
        events = {"Save": Event(every_n_seconds=10)}
        loop = Loop(range(30), events, max_epochs=1, clock=clock, sync=agreed)

        def body(step: int) -> None:
            clock.advance(1)
            if rank == 0:
                with loop.pause_clock():
                    clock.advance(100)

        return trace(loop, body)

    assert same_on_all(2, run) == [
        (19, ["Save"]),
        (29, ["LoopEvents.EPOCH_END", *END[1][1:], "Save"]),
    ]


def test_a_moment_of_the_wall_clock_counts_from_the_latest_begin() -> None:
    def run(rank: int, agreed: Any) -> tuple[Trace, Any]:
        stop = Event(at_timestamp=1)  # it has passed
        loop = Loop(range(30), max_epochs=1, stop_when=stop, clock=ManualClock(), sync=agreed)
        return trace(loop), loop.stop_reason

    assert same_on_all(2, run) == ([(9, ["LoopEvents.TRAINING_END"])], "stop_when")


# Conditions, stop() and trigger()


def test_a_condition_fires_on_all_at_the_agreement_after_the_next() -> None:
    def run(rank: int, agreed: Any) -> tuple[Trace, list[int]]:
        called: list[int] = []

        def condition(state: Any) -> bool:
            called.append(state.global_step)
            return rank == 1 and state.global_step in (1, 3, 12)

        return trace(Loop(range(30), {"C": Event(condition)}, max_epochs=1, sync=agreed)), called

    found, called = same_on_all(2, run)
    assert found == [(9, ["C"]), (19, ["C"]), END]
    assert called == list(range(30))  # at every step, however seldom its answer is read


def test_a_condition_of_stop_when_is_told_of_the_end_where_it_comes() -> None:
    def run(rank: int, agreed: Any) -> tuple[Trace, Any, list[int]]:
        told: list[int] = []

        def notes_the_end(state: Any) -> None:
            if state.training_end:
                told.append(state.global_step)

        stop = Event(lambda state: rank == 1 and state.global_step == 2)
        events = {"C": Event(notes_the_end)}
        loop = Loop(range(30), events, max_epochs=1, stop_when=stop, sync=agreed)
        return trace(loop), loop.stop_reason, told

    assert same_on_all(2, run) == ([(9, ["LoopEvents.TRAINING_END"])], "stop_when", [9])


def test_the_limits_last_step_reads_what_is_under_way() -> None:
    def run(rank: int, agreed: Any) -> Trace:
        holds = Event(lambda state: rank == 1 and state.global_step in (1, 12))
        return trace(Loop(range(8), {"C": holds}, max_epochs=2, sync=agreed))

    last = ["C", "LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"]
    assert same_on_all(2, run) == [(7, ["LoopEvents.EPOCH_END"]), (9, ["C"]), (15, last)]


@pytest.mark.parametrize("sizes", [None, 3, (4, 2, 1)])
def test_stop_on_one_process_ends_all(sizes: Any) -> None:
    def run(rank: int, agreed: Any) -> tuple[list[int], Any]:
        loop = Loop(range(99), max_epochs=1, sync=agreed)
        seen: list[Any] = []
        for batches, _ in loop if sizes is None else loop.chunks(sizes):
            seen += [batches] if sizes is None else batches  # type: ignore[list-item, arg-type]
            if rank == 1 and loop.global_step >= 5:
                loop.stop()
                assert loop.stop_requested or loop.stop_reason
        return seen, loop.stop_reason

    assert same_on_all(2, run) == (list(range(15)), "stop")


def test_a_signal_ends_the_run_at_the_agreement_after_the_next_and_counts_more_than_stop() -> None:
    loop = Loop(range(99), max_epochs=1, signals=signal.SIGTERM, sync=ALONE)
    requests = {1: lambda: signal.raise_signal(signal.SIGTERM), 2: loop.stop}
    found = trace(loop, lambda step: requests.get(step, int)())
    assert found == [(7, ["LoopEvents.INTERRUPT", "LoopEvents.TRAINING_END"])]
    assert loop.stop_reason == "SIGTERM"


def test_triggers_of_several_processes_fire_on_all() -> None:
    def run(rank: int, agreed: Any) -> Trace:
        events = {name: Event() for name in ("A", "B", ("c", 1))}
        loop = Loop(range(30), events, max_epochs=1, sync=agreed)

        def body(step: int) -> None:
            if step in (0, 1):
                loop.trigger(["A", "B", ("c", 1)][rank])

        return trace(loop, body)

    assert same_on_all(3, run) == [(9, ["('c', 1)", "A", "B"]), END]


def test_lists_end_at_agreements_and_not_at_conditions() -> None:
    holds = Event(lambda state: state.global_step == 1)
    loop = Loop(range(12), {"C": holds}, max_epochs=1, sync=sync.maximum(list, every=6))
    found = [(len(batches), names(events)) for batches, events in loop.chunks(4)]
    end = ["C", "LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"]
    assert found == [(4, []), (2, []), (4, []), (2, end)]


# Epochs


def ends_of(loop: Loop[Any]) -> list[int]:
    return [loop.global_step for _, events in loop if LoopEvents.EPOCH_END in events]


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 15}], ids=str)
@pytest.mark.parametrize("others_know", [True, False])
def test_each_epoch_is_as_long_as_the_shortest_that_is_known(
    others_know: bool, limit: dict[str, int]
) -> None:
    def run(rank: int, agreed: Any) -> list[int]:
        batches = range(5 + rank)
        loader: Any = batches if others_know or rank == 0 else lambda: iter(batches)
        return ends_of(Loop(loader, sync=agreed, **limit))

    assert same_on_all(3, run) == [4, 9, 14]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("first", range(4))
def test_streams_end_with_the_shortest_of_all(every: int, first: int) -> None:
    """Of 1 to 3 windows and more; the epochs begin at each place between two exchanges."""
    for shortest in range(1, 7 * every):
        lengths = [[first + 1, shortest, 5], [first + 2, shortest + shortest % 5, 9]]

        def run(rank: int, agreed: Any) -> Any:
            epochs = iter(lengths[rank])  # noqa: B023
            loop = Loop(lambda: iter(range(next(epochs))), max_epochs=3, sync=agreed)
            return ends_of(loop), loop.stop_reason, loop.state.training_end

        second = first + shortest
        expected = [first, second, second + 5], "max_epochs", True
        assert same_on_all(2, run, every=every) == expected


def test_what_longer_streams_have_left_is_dropped_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    def run(rank: int, agreed: Any) -> list[int]:
        return ends_of(Loop(lambda: iter(range(7 + 9 * rank)), max_epochs=1, sync=agreed))

    assert same_on_all(2, run) == [6]
    assert [each.message for each in caplog.records] == [
        "epoch 0 ends with the shortest process; more batches are dropped"
    ]


def test_a_stream_is_looked_ahead_in_if_that_is_asked_for() -> None:
    def run(rank: int, agreed: Any) -> Any:
        loop = Loop(iter(range(30 + 10 * rank)), max_steps=99, lookahead=True, sync=agreed)
        return ends_of(loop), loop.stop_reason

    with pytest.warns(LoopWarning, match="exhausted after global_step 29"):
        assert same_on_all(2, run) == ([29], "exhausted")


def test_the_batches_that_are_looked_ahead_in_count_as_training_time() -> None:
    clock = ManualClock()
    loop = Loop(lambda: clock.one_second_each(range(20)), max_epochs=1, sync=ALONE, clock=clock)
    next(iter(loop))
    assert loop.lap("First").seconds == 10  # it and the 9 that are fetched ahead


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_process_without_a_batch_ends_all_with_an_error(is_stream: bool) -> None:
    def run(rank: int, agreed: Any) -> Trace:
        batches = range(9 * rank)
        loader: Any = (lambda: iter(batches)) if is_stream else batches
        return trace(Loop(loader, max_epochs=1, sync=agreed))

    for outcome in on_all(2, run):
        assert isinstance(outcome, DataExhaustedError)
        assert ("an empty dataloader" if is_stream else "no batch") in str(outcome)


def test_an_end_of_an_epoch_that_finish_epoch_has_ended_is_ignored() -> None:
    def run(rank: int, agreed: Any) -> list[int]:
        loop = Loop(lambda: iter(range(9 + rank)), max_epochs=2, sync=agreed)
        ends = []
        for batch, events in loop:
            if loop.epoch == 0 and batch == 4:
                events = loop.finish_epoch()
            if LoopEvents.EPOCH_END in events:
                ends.append(loop.global_step)
        return ends

    assert same_on_all(2, run) == [4, 13]


def test_a_resumed_stream_ends_with_the_shortest_of_all() -> None:
    state = after(17, Loop(lambda: iter(range(20)), max_epochs=2, sync=ALONE))

    def run(rank: int, agreed: Any) -> list[int]:
        loop = Loop(lambda: iter(range(20 + rank)), max_epochs=2, sync=agreed)
        return ends_of(resumed(loop, state))

    assert same_on_all(2, run) == [19, 39]


def test_an_end_that_an_error_has_hidden_is_an_error_and_not_another_end() -> None:
    loader = RecordingLoader([0, 1, 2, 3, 4, OSError()], range(8))
    loop = Loop(loader, max_epochs=2, sync=ALONE)
    next(iter(loop))
    with pytest.raises(LoopError, match="epoch 0 ends at step 7, which the other processes cannot"):
        list(loop)


def test_an_interrupt_as_a_stream_is_looked_ahead_in_does_not_end_the_run_well() -> None:
    stream = RecordingBatches([0, 1, 2, KeyboardInterrupt()], [])
    loop = Loop(stream, max_epochs=1, lookahead=True, sync=ALONE)
    with pytest.raises(KeyboardInterrupt):
        next(iter(loop))
    found = []
    with pytest.raises(LoopError, match="ended after an interrupt"):
        for batch, _ in loop:
            found.append(batch)
    assert found == [0, 1, 2]


def test_a_resume_under_sync_fetches_a_few_batches_again() -> None:
    every = sync.maximum(list, every=100)
    loops = [Loop(StatefulLoader(5000), max_epochs=1, sync=every) for _ in range(2)]
    state = after(3000, loops[0])
    assert flat(islice(resumed(loops[1], state), 2)) == flat(islice(loops[0], 2))
    assert state["loader"]["at"] > 2600


def test_lookahead_false_is_refused_where_processes_have_to_know_the_end() -> None:
    with pytest.raises(ValueError, match="lookahead=False: sync needs to know"):
        Loop(RecordingLoader(range(3)), max_steps=9, lookahead=False, sync=ALONE)


# Before the first step, and after the last


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        ({"max_epochs": 2}, r"limit \(1 to 2\);"),
        ({"max_epochs": 1.5}, "fraction as a limit"),
        ({"max_epochs": None, "max_steps": 1}, "kind of limit"),
        ({"start_step": 3}, r"global_step \(0 to 3\)"),
        ({"events": {"A": Event(every_n_steps=3)}}, "events"),
        ({"events": {"B": Event(every_n_steps=2)}}, "events"),
        ({"stop_when": Event(at_step=3)}, "events"),
    ],
)
def test_what_differs_is_an_error_on_all(differs: dict[str, Any], named: str) -> None:
    def run(rank: int, agreed: Any) -> Trace:
        arguments = {"max_epochs": 1, "events": {"A": Event(every_n_steps=2)}}
        return trace(Loop(range(9), sync=agreed, **{**arguments, **(differs if rank else {})}))

    for outcome in on_all(2, run):
        assert isinstance(outcome, LoopError)
        with pytest.raises(LoopError, match=f"differ in .*{named}.*share it"):
            raise outcome


def test_a_state_of_one_process_serves_all() -> None:
    events = {"Save": Event(every_n_seconds=7)}
    clock = ManualClock()
    batches = clock.one_second_each(range(30))
    state = after(12, Loop(batches, events, max_steps=30, clock=clock, sync=ALONE))

    def run(rank: int, agreed: Any) -> Trace:
        own = ManualClock(1000 * rank)
        loop = Loop(range(30), events, max_epochs=1, clock=own, sync=agreed)
        return trace(resumed(loop, state), lambda _: own.advance(1))

    # It has fired at 8 seconds. Step 14 has 14 seconds and step 19 has 19, which step 24 reads.
    assert same_on_all(2, run) == [(24, ["Save"]), END]


def test_an_iterator_that_is_left_finishes_the_exchange_when_the_loop_is_closed() -> None:
    fleet = Fleet(1)
    ahead = Ahead(fleet, 0)
    with Loop(range(99), max_epochs=1, sync=sync.Sync(ahead, 5)) as loop:
        for _ in loop:
            if loop.global_step == 7:
                break
        assert ahead.unfinished() == 1
    assert ahead.unfinished() == 0


def test_what_is_under_way_when_all_leave_is_read_once_they_enter_again() -> None:
    def run(rank: int, agreed: Any) -> Trace:
        holds = Event(lambda state: rank == 1 and state.global_step == 3)
        loop = Loop(range(30), {"C": holds}, max_epochs=1, sync=agreed)
        for batch, _ in loop:
            if batch == 6:
                break
        return trace(loop)

    assert same_on_all(2, run) == [(9, ["C"]), END]


def test_a_process_that_is_gone_ends_the_others_with_the_exchanges_error() -> None:
    fleet = Fleet(2)

    def run(rank: int) -> Trace:
        def body(step: int) -> None:
            if rank == 1 and step == 7:
                fleet.break_off()
                raise ValueError("gone")

        agreed = sync.Sync(Ahead(fleet, rank), 5)
        return trace(Loop(range(99), max_epochs=1, sync=agreed), body)

    first, second = fleet.run(run)
    assert isinstance(first, TimeoutError)
    assert isinstance(second, ValueError)


@pytest.mark.parametrize("answer", [None, [3], 5, {}])
def test_a_function_that_returns_anything_else_is_an_error(answer: Any) -> None:
    loop = Loop(range(9), max_epochs=1, sync=sync.maximum(lambda values: answer, every=5))
    with pytest.raises(TypeError, match="return the maximum of each of the"):
        iter(loop)


def test_a_function_may_return_an_array() -> None:
    agreed = sync.maximum(lambda values: array("q", values), every=3)
    assert len(trace(Loop(range(9), max_epochs=1, sync=agreed))) == 1


def test_steps_between_agreements_exchange_and_read_nothing() -> None:
    fleet = Fleet(1)
    clock = ManualClock()
    events = {"Save": Event(every_n_seconds=100)}
    loop = Loop(range(60), events, max_epochs=1, clock=clock, sync=sync.Sync(Ahead(fleet, 0), 20))
    trace(loop)
    assert len(fleet.sent[0]) == 2 + 2  # before the first step, for the epoch, at steps 19 and 39
    assert clock.readings < 10


# Random plans


@settings(max_examples=80)
@given(
    ranks=st.integers(1, 3),
    every=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 25), min_size=3, max_size=3),
    streams=st.lists(st.booleans(), min_size=3, max_size=3),
    speeds=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    holds=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 20))),
    requests=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 20), st.booleans())),
    sizes=st.sampled_from([None, 3, (4, 1)]),
    limit=st.sampled_from([{"max_epochs": 3}, {"max_steps": 17}, {"max_seconds": 12}]),
)
def test_random_plans_have_the_same_trace_on_all(
    ranks: int,
    every: int,
    lengths: list[int],
    streams: list[bool],
    speeds: list[int],
    holds: set[tuple[int, int]],
    requests: set[tuple[int, int, bool]],
    sizes: Any,
    limit: dict[str, int],
) -> None:
    def run(rank: int, agreed: Any) -> tuple[Any, ...]:
        clock = ManualClock()
        events = {
            "C": Event(lambda state: (rank, state.global_step) in holds),
            "T": Event(every_n_seconds=4) | Event(at_step=(2, 9)),
            "P": Event(every_n_steps=2, per_epoch=True),
            "A": Event(at_time=(1, 6, 7), from_step=3),
        }
        batches = [0] * lengths[rank]
        loader: Any = (lambda: iter(batches)) if streams[rank] else batches
        loop = Loop(loader, events, clock=clock, sync=agreed, **limit)
        found = []
        for _, now in loop if sizes is None else loop.chunks(sizes):
            found.append((loop.epoch, loop.global_step, names(now)))
            clock.advance(speeds[rank])
            if (rank, loop.global_step, False) in requests:
                loop.trigger("C")
            if (rank, loop.global_step, True) in requests:
                loop.stop()
            if loop.global_step > 60:
                loop.stop()
        return found, loop.stop_reason

    same_on_all(ranks, run, every)


# The libraries, and processes that do not agree


def fake_torch(patch: pytest.MonkeyPatch, **distributed: Any) -> None:
    """Let PyTorch be installed, with this in `torch.distributed`."""
    module = SimpleNamespace(**distributed)
    patch.setitem(sys.modules, "torch", SimpleNamespace(distributed=module))
    patch.setitem(sys.modules, "torch.distributed", module)


def test_torch_distributed_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(ImportError, match=r"needs PyTorch: pip install torch$"):
        sync.torch_distributed(every=5)
    fake_torch(monkeypatch, is_initialized=lambda: False)
    with pytest.raises(RuntimeError, match=r"distributed.init_process_group\(\) before$"):
        sync.torch_distributed(every=5)
    fake_torch(
        monkeypatch,
        is_initialized=lambda: True,
        get_backend=lambda group: "nccl",
        get_backend_config=lambda group: "cuda:nccl",
    )
    with pytest.raises(ValueError, match=r"^group: its backend is nccl; pass one that has gloo$"):
        sync.torch_distributed(every=5, group="a group")


def test_torch_distributed_makes_a_gloo_group_beside_another_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def new_group(backend: str) -> str:
        made.append(backend)
        return backend

    fake_torch(
        monkeypatch,
        is_initialized=lambda: True,
        group=SimpleNamespace(WORLD=object()),
        get_backend_config=lambda group: "gloo" if group == "gloo" else "nccl",
        new_group=new_group,
    )
    sync.torch_distributed(every=5)
    sync.torch_distributed(every=5)
    assert made == ["gloo"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"events": {"Save": Event(every_n_seconds=5)}}, "'Save'"),
        ({"stop_when": Event(lambda state: False)}, "'stop_when'"),
        ({"signals": signal.SIGTERM}, "signals"),
    ],
)
def test_rank_0_of_several_warns_once_of_what_may_differ(
    arguments: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    loop = Loop(range(3), max_epochs=1, **arguments)
    with pytest.warns(LoopWarning, match=f"may differ in {named}; pass sync="):
        iter(loop)
    iter(loop)  # not again
    iter(Loop(range(3), max_epochs=1, sync=False, **arguments))
    iter(Loop(range(3), {"Log": Event(every_n_steps=2)}, max_epochs=1))
    monkeypatch.setenv("RANK", "1")
    iter(Loop(range(3), max_epochs=1, **arguments))


def test_a_framework_tells_the_rank_if_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: 1,
        get_world_size=lambda: 4,
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)
    assert sync.rank_among_several() == 1
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    jax = SimpleNamespace(
        distributed=SimpleNamespace(is_initialized=lambda: True),
        process_index=lambda: 2,
        process_count=lambda: 3,
    )
    monkeypatch.setitem(sys.modules, "jax", jax)
    assert sync.rank_among_several() == 2


def test_the_exchange_under_way_is_finished_as_the_data_end() -> None:
    ahead = Ahead(Fleet(1), 0)
    with pytest.warns(match="exhausted"):
        list(Loop(iter(range(7)), max_steps=99, sync=sync.Sync(ahead, 5)))
    assert ahead.unfinished() == 0


def test_a_place_in_the_epoch_that_differs_is_named() -> None:
    def run(rank: int, agreed: Any) -> Trace:
        length = (4, 2)[rank]
        return trace(Loop(range(9), max_steps=9, dataloader_len=length, start_step=3, sync=agreed))

    assert all("step within the epoch" in str(each) for each in on_all(2, run))


def test_an_interrupt_while_processes_are_compared_sends_nothing_twice() -> None:
    fleet, strikes = Fleet(1), [KeyboardInterrupt()]

    def exchange(values: list[int]) -> Callable[[], list[int]]:
        finish = Ahead(fleet, 0)(values)

        def struck() -> list[int]:
            if strikes:
                raise strikes.pop()
            return finish()

        return struck

    loop = Loop(range(9), max_epochs=1, sync=sync.Sync(exchange, 5))
    with pytest.raises(KeyboardInterrupt):
        iter(loop)
    assert [batch for batch, _ in loop] == [*range(9)]


def test_a_stop_iteration_of_the_function_does_not_end_the_for_silently() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(Loop(range(40), max_epochs=1, sync=sync.maximum(lambda v: next(iter([])), every=3)))


DIFFERENT: dict[str, Callable[[Loop[Any], int], object]] = {
    "counts": lambda loop, rank: loop.count("n", 1 + (rank == 1 and loop.global_step == 7)),
    "steps": lambda loop, rank: loop.global_step == 6 + rank and loop.finish_epoch(),
    "one alone": lambda loop, rank: (loop.global_step, rank) == (7, 0) and loop.finish_epoch(),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_change_their_steps_differently_fail_together(what: str) -> None:
    def run(rank: int, agreed: Any) -> None:
        loop = Loop(range(20), {"A": Event(at=20, of="n")}, max_epochs=3, sync=agreed)
        for _ in loop:
            DIFFERENT[what](loop, rank)

    for outcome in on_all(2, run):
        assert isinstance(outcome, LoopError)
        assert "differ in their calls of count()" in str(outcome)


def test_what_all_change_alike_is_agreed_on() -> None:
    def run(rank: int, agreed: Any) -> Any:
        events = {"A": Event(every_n=7, of="n"), "W": Event(at_time=9, wait_for="A")}
        clock = ManualClock()
        loop = Loop(range(30), events, max_epochs=3, sync=agreed, clock=clock)
        found = []
        for batch, _ in loop:
            clock.advance(1 + rank)
            events = loop.count("n", 1)
            if batch == 12:
                events = loop.finish_epoch()
            if loop.global_step == 30:
                events = loop.finish()
            found += [(loop.global_step, names(events))] if events else []
        return found

    assert same_on_all(2, run)[-1] == (30, ["LoopEvents.TRAINING_END"])
