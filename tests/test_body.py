"""What is decided in the body: finish, finish_epoch, counters, events that wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from dloop import Event, Loop, LoopError, LoopEvents
from loops import ENTER, Enter, flat, resumed
from recording_loaders import RecordingLoader, SizedLoader
from told import warnings_of, with_warnings

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
EXCEPTION = LoopEvents.EXCEPTION
each_way = pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))


def run(loop: Loop[Any], body: Callable[[Loop[Any], Any], Any], enter: Enter = iter) -> list[Any]:
    """What fires at each step at which anything does: pairs of a step and sorted names.

    `body` returns the step's new events, or None.
    """
    seen = []
    for batch, given in enter(loop):
        events = body(loop, batch)
        events = given if events is None else events
        if events:
            seen.append((loop.global_step, sorted([str(each) for each in events])))
    return seen


def at(step: int, act: Callable[[Loop[Any]], Any]) -> Callable[[Loop[Any], Any], Any]:
    """A body that acts at one step."""
    return lambda loop, _: act(loop) if loop.global_step == step else None


# --------------------------------------------------------------------------------------- finish()


@each_way
def test_finish_makes_the_step_the_last(enter: Enter) -> None:
    loader = RecordingLoader(range(9))
    loop = Loop(loader, {"Save": TRAINING_END | Event()}, max_epochs=3, dataloader_len=9)
    seen = run(loop, at(3, Loop.finish), enter)
    assert seen == [(3, ["LoopEvents.TRAINING_END", "Save"])]
    assert loader.requests == [f"next {number}" for number in range(4)]
    assert (loop.stop_reason, len(loop), loop.state.training_end) == ("finish", 0, True)
    with pytest.raises(LoopError, match="has ended"):
        next(iter(loop))


def test_a_second_finish_changes_nothing_and_the_yielded_set_never_changes() -> None:
    loop = Loop(range(5), max_epochs=1)
    ((_, before),) = islice(loop, 1)
    events = loop.finish()
    assert before == set() and events == {TRAINING_END}
    assert loop.finish() is events


def test_finish_at_an_epochs_last_step_asks_the_iterator_once_more() -> None:
    loader = SizedLoader(range(2), promise=2)
    run(Loop(loader, max_epochs=3), at(1, Loop.finish))
    assert loader.requests == ["next 0", "next 1", "end"]


@pytest.mark.parametrize("step_done", [True, False])
def test_a_run_that_was_finished_does_not_train_on(step_done: bool) -> None:
    loop = Loop(range(5), max_epochs=2)
    for batch, _ in loop:
        if batch == 3:
            loop.finish()
            saved = loop.state_dict(step_done)
    again = resumed(Loop(range(5), max_epochs=9), saved)
    assert flat(again) == ([] if step_done else [3, 4] + 8 * [*range(5)])
    again = resumed(Loop(range(5), max_epochs=1), {**saved, "finished": None})
    assert flat(again) == [4] if step_done else [3, 4]


def test_finish_on_the_limits_last_step_is_kept_too() -> None:
    loop = Loop(range(5), max_epochs=1)
    run(loop, at(4, Loop.finish))
    assert loop.stop_reason == "finish"
    assert flat(resumed(Loop(range(5), max_epochs=2), loop.state_dict())) == []


def test_an_error_in_a_guarded_body_overrides_a_finish() -> None:
    seen = []
    with Loop(range(5), max_epochs=1, on_exception="event") as loop, pytest.raises(ArithmeticError):
        for batch, events in loop:
            if EXCEPTION in events:
                seen.append((loop.stop_reason, loop.state_dict()["finished"]))
                with pytest.raises(LoopError, match="no step to change"):
                    loop.finish()
                continue
            with loop.guard():
                if batch == 2:
                    loop.finish()
                    raise ArithmeticError
    assert seen == [("exception", None)]


# --------------------------------------------------------------------------------- finish_epoch()


@each_way
def test_finish_epoch_makes_the_step_its_epochs_last(enter: Enter) -> None:
    loader = RecordingLoader(range(6))
    events = {"Eval": Event(every_n_epochs=2) | Event(at_epoch=0), "Each": EPOCH_END | Event()}
    loop = Loop(loader, events, max_epochs=3, dataloader_len=6)
    seen, warned = with_warnings(lambda: run(loop, at(1, Loop.finish_epoch), enter))
    assert seen == [
        (1, ["Each", "Eval", "LoopEvents.EPOCH_END"]),
        (7, ["Each", "Eval", "LoopEvents.EPOCH_END"]),
        (13, ["Each", "LoopEvents.EPOCH_END", "LoopEvents.TRAINING_END"]),
    ]
    assert warned == []
    assert loader.requests == [f"next {number}" for number in (0, 1, *range(6), *range(6))]


@pytest.mark.parametrize("way", ["looked ahead", "in lists"])
def test_an_interrupt_as_the_next_epoch_opens_loses_no_batch(way: str) -> None:
    class Source:
        """An iterator whose second epoch begins with a Ctrl-C."""

        def __init__(self) -> None:
            self.numbers = iter(range(8))
            self.strikes = [KeyboardInterrupt]

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            return next(self.numbers)

        def set_epoch(self, epoch: int) -> None:
            if epoch == 1 and self.strikes:
                raise self.strikes.pop()

    condition = Event(lambda state: state.global_step == 1)
    events = {"C": condition, "P": Event(at_step=2, per_epoch=True)}
    loop = Loop(Source(), events, max_steps=7, lookahead=way == "looked ahead")
    seen: list[int] = []
    fired: list[int] = []
    enter = ENTER["steps"] if way == "looked ahead" else lambda loop: loop.chunks((4, 1))
    while loop.stop_reason is None:
        with contextlib.suppress(KeyboardInterrupt):
            for pair in enter(loop):
                seen += flat([pair])
                fired += [loop.global_step] if "P" in pair[1] else []
                if len(seen) == 1:
                    loop.finish_epoch()
    assert (seen, fired, loop.epoch) == ([*range(7)], [3], 1)


@pytest.mark.filterwarnings("ignore:the dataloader is exhausted")
def test_a_streams_end_that_was_found_with_a_list_is_still_known_after_finish_epoch() -> None:
    loop = Loop(iter(range(3)), max_steps=99, lookahead=True)
    seen = []
    for batches, events in loop.chunks((4, 2, 1)):
        if batches == [0, 1]:
            events = loop.finish_epoch()
            assert loop.steps_to_next_event() == 1
        seen.append((batches, EPOCH_END in events, TRAINING_END in events))
    assert seen == [([0, 1], True, False), ([2], True, True)]
    assert loop.stop_reason == "exhausted"


# --------------------------------------------------------------------------------------- counters


def test_a_counter_fires_at_the_step_that_passes_a_multiple() -> None:
    lengths = [3, 4, 2, 9, 1, 12, 0]
    loop = Loop(lengths, {"Log": Event(every_n=5, of="tokens")}, max_epochs=1)
    seen = run(loop, lambda loop, length: loop.count("tokens", length))
    assert [step for step, names in seen if "Log" in names] == [1, 3, 5]  # several, but once
    assert dict(loop.counts) == {"tokens": 31}
    with pytest.raises(TypeError):
        loop.counts["tokens"] = 3  # type: ignore[index]


def test_a_sum_may_be_greater_than_any_int_of_64_bits() -> None:
    loop = Loop(range(5), {"Five": Event(at=5, of="flops")}, max_epochs=1)
    assert ["Five" in loop.count("flops", 2**62) for _ in loop] == [True, *[False] * 4]
    assert loop.counts == {"flops": 5 * 2**62}
    loop = Loop(range(5), max_epochs=1)
    assert not any(loop.count("flops", 2**62) for _ in islice(loop, 4))
    assert loop.counts == {"flops": 4 * 2**62}


def test_a_sum_that_lasts_finishes_a_run_that_has_ended_for_this_launch_already() -> None:
    stop = Event(at_time=0, per_launch=True) | Event(at=1, of="n")
    loop = Loop(range(5), max_epochs=2, stop_when=stop)
    for _ in loop:
        assert loop.state_dict()["finished"] is None
        loop.count("n")
    assert loop.state_dict()["finished"] == "stop_when"


def test_any_number_of_calls_and_counters_without_events() -> None:
    loop = Loop(range(2), {"A": Event(at=3, of="a"), "B": Event(at=3, of="a")}, max_epochs=1)
    ((_, given),) = islice(loop, 1)
    assert loop.count("others") is given
    assert loop.count("a", 0) is given
    assert loop.count("a", 2) is given
    assert loop.count("a") == {"A", "B"} == loop.count("a", 5)
    assert loop.counts == {"a": 8, "others": 1}


def test_all_that_was_counted_in_a_step_is_undone_with_it() -> None:
    loop = Loop(range(8), max_epochs=1)
    for _ in islice(loop, 4):
        loop.count("n", 2)
        loop.count("n", 1)
    assert loop.state_dict(step_done=False)["counts"] == {"n": 9}


def test_a_subclass_can_count_in_its_own_way() -> None:
    class Doubles(Loop[int]):
        def count(self, name: str, n: Any = 1) -> Any:
            return super().count(name, 2 * n)

    loop = Doubles(range(3), max_epochs=1)
    run(loop, lambda loop, _: loop.count("n", 4))
    assert loop.counts == {"n": 24}


def test_a_lap_has_what_was_counted() -> None:
    loop = Loop(range(6), {"Log": Event(every_n_steps=3)}, max_epochs=1)
    laps = []
    for _, events in loop:
        loop.count("tokens", 10)
        if "Log" in events:
            laps.append(loop.lap("Log"))
    assert [(lap.steps, lap.counts) for lap in laps] == [(3, {"tokens": 30})] * 2
    steps, _seconds = laps[0]
    assert steps == 3


def test_a_counter_that_never_counted_is_warned_of() -> None:
    loop = Loop(range(2), {"A": Event(at=1, of="token")}, max_epochs=1)
    (warned,) = warnings_of(
        lambda: run(loop, lambda loop, _: loop.count("tokens", 0) or loop.count("tokens"))
    )
    assert "'token'" in warned and "did you mean 'tokens'?" in warned


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda loop: loop.count("n", -1), ValueError),
        (lambda loop: loop.count("n", 1.5), TypeError),
        (lambda loop: loop.count("n", True), TypeError),
        (lambda loop: loop.count(3), TypeError),
        (lambda loop: loop.count([]), TypeError),
        (lambda loop: loop.count("n\n", "m\n" * 99), TypeError),
    ],
)
def test_wrong_arguments_are_refused(call: Any, error: type[Exception]) -> None:
    loop = Loop(range(3), max_epochs=1)
    ((_, _),) = islice(loop, 1)
    with pytest.raises(error) as caught:
        call(loop)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- events that wait

UPDATE = Event(every_n_steps=4)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event(at_step=[1, 2, 4], wait_for="Update"), [3, 7]),
        (Event(at_step=3, wait_for="Update"), [3]),  # met at the same step
        (Event(at_step=5, wait_for=EPOCH_END), [9]),
        (Event(at_step=5, wait_for=TRAINING_END), [19]),
        (Event(at_step=[4, 8], until_step=7, wait_for="Update"), []),  # it lapses
        # it fires within its window alone
        (Event(at_step=2, per_epoch=True, from_step=2, wait_for="Update"), [3, 15]),
        (Event(at_step=4, wait_for="Update") | Event(at_step=5), [5]),  # which clears it
        (Event(lambda state: state.global_step == 6, wait_for="Update"), [7]),
        (Event(every_n=3, of="n", wait_for="Update"), [3, 7, 11, 15, 19]),
    ],
)
@each_way
def test_where_it_fires(event: Event, expected: list[int], enter: Enter) -> None:
    loop = Loop(range(10), {"A": event, "Update": UPDATE}, max_epochs=2)
    seen = run(
        loop, lambda loop, _: loop.count("n", loop.steps_done - loop.counts.get("n", 0)), enter
    )
    assert [step for step, names in seen if "A" in names] == expected


def test_a_trigger_waits_and_is_saved_in_the_body_that_calls_it() -> None:
    def make() -> Loop[Any]:
        events = {"A": Event(at_step=99, wait_for="Update"), "Update": UPDATE}
        return Loop(range(12), events, max_epochs=1)

    for _ in islice(loop := make(), 2):
        pass
    loop.trigger("A")
    for each in (resumed(make(), loop.state_dict()), loop):
        seen = run(each, at(0, id))
        assert [step for step, names in seen if "A" in names] == [3]


@pytest.mark.parametrize(
    ("events", "stop_when", "expected"),
    [
        (
            {"A": Event(at_step=1, wait_for="Updat"), "Update": UPDATE},
            None,
            "did you mean 'Update'",
        ),
        ({"A": Event(at_step=1, wait_for="A")}, None, "waits itself"),
        (
            {"A": UPDATE, "B": Event(at_step=1, wait_for="C"), "C": Event(at_step=1, wait_for="A")},
            None,
            "waits itself",
        ),
        ({"A": UPDATE}, Event(at_step=1, wait_for="B"), "wait_for='B'"),
    ],
)
def test_only_events_that_do_not_wait_can_be_waited_for(
    events: Any, stop_when: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        Loop(range(3), events, max_epochs=1, stop_when=stop_when)


# ----------------------------------------------------------------------------- outside of a body


def changes(loop: Loop[Any]) -> list[str]:
    """The calls that are refused."""
    refused = []
    for name, arguments in (("finish", ()), ("finish_epoch", ()), ("count", ("n", 1))):
        try:
            getattr(loop, name)(*arguments)
        except LoopError as error:
            assert "in the body of a step" in str(error)
            refused.append(name)
    return refused


ALL = ["finish", "finish_epoch", "count"]


@each_way
def test_a_step_is_changed_in_its_body_alone(enter: Enter) -> None:
    refused = {}

    def batches() -> Any:
        yield 0
        yield 1
        refused["in a fetch"] = changes(loop)
        yield 2

    def condition(state: Any) -> bool:
        refused["in a condition"] = changes(loop)
        return False

    loop = Loop(batches, {"C": Event(condition)}, max_epochs=1)
    refused["before the first step"] = changes(loop)
    for _ in enter(loop):
        pass
    refused["after the last"] = changes(loop)
    assert refused == dict.fromkeys(refused, ALL) and len(refused) == 4


def test_not_in_another_thread_and_not_after_close_or_an_error() -> None:
    loop = Loop(SizedLoader([0, OSError()], promise=2), max_epochs=1)
    found: list[list[str]] = []
    with pytest.raises(OSError):
        for _ in loop:
            thread = threading.Thread(target=lambda: found.append(changes(loop)))
            thread.start()
            thread.join()
    found.append(changes(loop))
    other = Loop(range(3), max_epochs=1)
    for _ in other:
        break
    other.close()
    assert [*found, changes(other)] == [ALL] * 3


def test_after_a_break_the_step_can_still_be_changed() -> None:
    loop = Loop(range(3), max_epochs=1)
    for _ in loop:
        break
    assert loop.finish() == {TRAINING_END}
    assert loop.stop_reason == "finish"


# -------------------------------------------------------------------------------- seen from outside


def test_the_profile_counts_a_body_with_its_new_events() -> None:
    loop = Loop(range(3), {"A": Event(at=1, of="n")}, max_epochs=1, profile=True)
    run(loop, at(1, lambda loop: loop.count("n")))
    assert ("A",) in [cost.names for cost in loop.profile.events]


def test_the_plan_tells_that_the_run_was_finished() -> None:
    loop = Loop(range(9), max_epochs=1)
    run(loop, at(4, Loop.finish))
    assert loop.plan().warnings == ("finish() has ended this run with step 4",)
    again = resumed(Loop(range(9), max_epochs=1), loop.state_dict())
    assert again.plan().warnings == ("the run is finished",)


def test_the_plan_tells_of_counters_and_of_events_that_wait() -> None:
    events = {
        "Update": UPDATE,
        "Save": Event(every_n_steps=6, wait_for="Update"),
        "Log": Event(every_n=1_000_000, of="tokens") | Event(at=5, of="tokens"),
        "Late": Event(at_step=1, wait_for="Log"),
        "End": Event(at_step=1, wait_for=EPOCH_END),
    }
    plan = Loop(range(20), events, max_epochs=1).plan()
    rows = {row.name: (row.when, row.times, row.first) for row in plan.rows}
    assert rows["Save"] == ("every 6 steps, waits for Update", 3, (7, 11, 19))
    assert rows["Log"] == ("every 1,000,000 of 'tokens' or at 5 of 'tokens'", None, ())
    assert rows["Late"] == ("at step 1, waits for Log", None, ())
    assert rows["End"] == ("at step 1, waits for EPOCH_END", 1, (19,))
    assert plan.warnings == ()
