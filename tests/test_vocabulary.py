"""What loops need beside periods: triggers by hand, laps, a clock that is paused, moments, off."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

from dloop import Event, Loop, LoopError, LoopEvents, run
from loops import ENTER
from manual_clock import ManualClock

NEVER = Event(every_n_steps=None)


def fired(loop: Loop[Any], name: Any, body: Callable[[int], object] = id) -> list[int]:
    """The steps of the run at which `name` is due; `body` is called at each."""
    steps = []
    for _, events in loop:
        if name in events:
            steps.append(loop.global_step)
        body(loop.global_step)
    return steps


# The beginning of a period, and steps of a launch


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event(every_n_steps=4, first_at_step=0), [0, 4, 8]),
        (Event(every_n_steps=4), [3, 7]),
        (Event(every_n_steps=4, first_at_step=5), [5, 9]),
        (Event(every_n_steps=4, first_at_step=0, from_step=1), [4, 8]),
        (Event(every_n_steps=4, first_at_step=2**62), []),
        (Event(every_n_steps=2**62, first_at_step=9), [9]),
        (Event(every_n_steps=2, first_at_step=1, per_epoch=True), [1, 3, 6, 8]),
        (Event(every_n_steps=4, first_at_step=0) | LoopEvents.EPOCH_END, [0, 4, 8, 9]),
        (NEVER, []),
        (None, []),
        (NEVER | LoopEvents.TRAINING_END, [9]),
        (NEVER | Event(at_step=2), [2]),
    ],
)
def test_when_an_event_fires_in_two_epochs_of_five(event: Any, expected: list[int]) -> None:
    assert fired(Loop(range(5), {"E": event}, max_epochs=2), "E") == expected


def test_steps_of_a_launch_count_from_its_first() -> None:
    events = {
        "First": Event(at_step=0, per_launch=True),
        "WarmUp": Event(every_n_steps=3, first_at_step=1, per_launch=True),
    }
    loop = Loop(range(20), events, max_epochs=1)
    for _ in itertools.islice(loop, 7):
        pass
    resumed = Loop(range(20), events, max_epochs=1)
    resumed.load_state_dict(loop.state_dict())
    due = [(resumed.global_step, set(names)) for _, names in resumed if names]
    assert due[:4] == [(7, {"First"}), (8, {"WarmUp"}), (11, {"WarmUp"}), (14, {"WarmUp"})]
    resumed.restart()
    assert fired(resumed, "WarmUp")[:2] == [1, 4]


def test_a_name_that_is_off_is_known() -> None:
    loop = Loop(range(3), {"Eval": None, "Log": Event(every_n_steps=1)}, max_epochs=1)
    assert fired(loop, "Eval") == []
    assert loop.events["Eval"] == NEVER
    assert loop.steps_to_next_event() is None


# A timer begins anew whenever its event is due


def with_clock(event: Any, **arguments: Any) -> tuple[Loop[Any], ManualClock]:
    clock = ManualClock()
    return Loop(range(20), {"E": event}, clock=clock, **{"max_epochs": 1, **arguments}), clock


SAVE = Event(every_n_seconds=5)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (SAVE, [5, 10, 15]),
        (SAVE | Event(at_step=3), [3, 8, 13, 18]),
        (Event(every_n_seconds=5, at_step=3), [3, 8, 13, 18]),
        (SAVE | Event(lambda state: state.global_step == 5), [5, 10, 15]),
        (SAVE | Event(lambda state: state.global_step == 7), [5, 7, 12, 17]),
        (SAVE | Event(at_time=7), [5, 7, 12, 17]),
        (SAVE | Event(every_n_seconds=3), [3, 6, 9, 12, 15, 18]),
        (SAVE | LoopEvents.EPOCH_END, [4, 9, 14, 19]),
        (Event(every_n_seconds=5, from_step=10) | Event(at_step=7), [7, 12, 17]),
        (Event(every_n_seconds=5, until_step=10) | Event(at_step=7), [5, 7]),
        (Event(every_n_seconds=5, per_launch=True) | Event(at_step=3), [3, 8, 13, 18]),
    ],
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_timer_counts_from_when_its_event_was_last_due(
    event: Any, expected: list[int], epochs: int
) -> None:
    clock = ManualClock()
    if epochs == 1 and LoopEvents.EPOCH_END in event.parts:
        expected = [5, 10, 15, 19]
    loop = Loop(range(20 // epochs), {"E": event}, max_epochs=epochs, clock=clock)
    assert fired(loop, "E", lambda step: clock.advance(1)) == expected


def test_a_timer_goes_on_from_when_its_event_was_last_due_after_a_resume() -> None:
    loop, clock = with_clock(SAVE | Event(at_step=3))
    for _ in itertools.islice(loop, 6):
        clock.advance(1)
    resumed, clock = with_clock(SAVE | Event(at_step=3))
    resumed.load_state_dict(loop.state_dict())
    assert fired(resumed, "E", lambda step: clock.advance(1)) == [8, 13, 18]


def test_stop_when_has_a_timer_of_its_own() -> None:
    loop, clock = with_clock(Event(at_step=3), stop_when=SAVE)
    assert fired(loop, LoopEvents.TRAINING_END, lambda step: clock.advance(1)) == [5]


# Moments of the wall clock


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The wall clock's reading, as a list of one."""
    now = [1_000_000.0]
    monkeypatch.setattr(run, "wall_time", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (1_000_003, [3]),
        (1_000_002.5, [3]),
        ([1_000_003, 1_000_007], [3, 7]),
        ([5, 7, 1_000_007], [0, 7]),
        (datetime.fromtimestamp(1_000_004, timezone.utc), [4]),
        (2_000_000, []),
    ],
)
def test_a_moment_comes_at_the_first_step_at_or_after_it(
    moment: Any, expected: list[int], wall: list[float]
) -> None:
    loop, clock = with_clock(Event(at_timestamp=moment))
    assert fired(loop, "E", lambda step: clock.advance(1)) == expected


def test_a_moment_counts_from_the_first_request_and_not_from_when_the_loop_is_made(
    wall: list[float],
) -> None:
    loop, clock = with_clock(Event(at_timestamp=1_000_006))
    wall[0] += 2
    assert fired(loop, "E", lambda step: clock.advance(1)) == [4]


@pytest.mark.parametrize("steps", [2, 8])
def test_a_moment_belongs_to_the_launch(steps: int, wall: list[float]) -> None:
    """It may have come in the launch before, and comes in this one all the same."""
    loop, clock = with_clock(Event(at_timestamp=1_000_006))
    for _ in itertools.islice(loop, steps):
        clock.advance(1)
    wall[0] = 1_000_004
    resumed, clock = with_clock(Event(at_timestamp=1_000_006))
    resumed.load_state_dict(loop.state_dict())
    assert fired(resumed, "E", lambda step: clock.advance(1)) == [steps + 2]


# Training time without what is paused


def test_what_is_paused_is_no_training_time() -> None:
    events = {
        "Timer": Event(every_n_seconds=4),
        "Launch": Event(at_time=14, per_launch=True),
    }
    clock = ManualClock()
    loop = Loop(range(30), events, max_seconds=9, clock=clock)
    due = []
    for _, names in loop:
        due += [(loop.global_step, loop.state.elapsed, name) for name in names]
        clock.advance(1)
        with loop.pause_clock(), loop.pause_clock():
            clock.advance(1)
    assert due == [
        (4, 4.0, "Timer"),
        (7, 7.0, "Launch"),
        (8, 8.0, "Timer"),
        (9, 9.0, LoopEvents.TRAINING_END),
    ]


@pytest.mark.parametrize("sizes", [None, 3])
def test_a_pause_ends_with_a_body_that_raises_or_leaves(sizes: int | None) -> None:
    clock = ManualClock()
    loop = Loop(range(30), max_steps=30, clock=clock)
    for wrong in (True, False):
        with pytest.raises(ZeroDivisionError) if wrong else loop.pause_clock():
            for _ in loop if sizes is None else loop.chunks(sizes):
                with loop.pause_clock():
                    clock.advance(5)
                    if wrong:
                        raise ZeroDivisionError
                    break
        clock.advance(1)
    assert loop.lap("all")[1] == 2.0


def test_the_next_request_ends_a_pause() -> None:
    clock = ManualClock()
    loop = Loop(range(9), max_epochs=1, clock=clock)
    batches = iter(loop)
    next(batches)
    pause = loop.pause_clock()
    pause.__enter__()
    clock.advance(5)
    next(batches)
    clock.advance(2)
    pause.__exit__()
    assert loop.lap("all") == (2, 2.0)


def test_a_pause_around_the_whole_loop_ends_with_the_first_request() -> None:
    clock = ManualClock()
    loop = Loop(range(3), max_epochs=1, clock=clock)
    seconds = []
    with loop.pause_clock():
        for _ in loop:
            clock.advance(1)
            with loop.pause_clock():
                clock.advance(60)
            seconds.append(loop.lap("steps").seconds)
    assert seconds == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("raises", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", ["begin", "end"])
def test_a_pause_whose_reading_fails_lasts_to_the_next_request(
    at: str, raises: type[BaseException]
) -> None:
    fails = [False]
    clock = ManualClock()

    def reading() -> float:
        if fails[0]:
            fails[0] = False
            raise raises
        return clock()

    loop = Loop(range(9), max_epochs=1, clock=reading)
    batches = iter(loop)
    next(batches)
    pause = loop.pause_clock()
    fails[0] = at == "begin"
    if at == "begin":
        with pytest.raises(raises):
            pause.__enter__()
    else:
        pause.__enter__()
        clock.advance(5)
        fails[0] = True
        with pytest.raises(raises):
            pause.__exit__()
    next(batches)
    clock.advance(2)
    assert loop.lap("all") == (2, 2.0)


def test_a_pause_outside_of_a_run_is_harmless() -> None:
    clock = ManualClock()
    loop = Loop(range(2), max_epochs=1, clock=clock)
    with loop.pause_clock():
        clock.advance(5)
    for _ in loop:
        clock.advance(1)
    with loop.pause_clock():
        clock.advance(5)
        assert loop.lap("all") == (2, 2.0)


def test_a_state_that_is_saved_in_a_pause_has_the_time_before_it() -> None:
    clock = ManualClock()
    loop = Loop(range(9), max_epochs=1, clock=clock)
    for _ in itertools.islice(loop, 2):
        clock.advance(1)
        with loop.pause_clock():
            clock.advance(5)
            state = loop.state_dict()
    resumed = Loop(range(9), max_epochs=1, clock=clock)
    resumed.load_state_dict(state)
    assert resumed.state.elapsed == 2.0


def test_timers_of_a_launch_that_had_pauses_are_no_part_of_its_state() -> None:
    clock = ManualClock()
    events = {"Save": Event(every_n_seconds=2, at_time=3, per_launch=True)}
    loop = Loop(range(9), events, max_epochs=1, clock=clock)
    for _ in itertools.islice(loop, 3):
        with loop.pause_clock():
            clock.advance(2)
        state = loop.state_dict()
    resumed = Loop(range(9), events, max_epochs=1, clock=clock)
    resumed.load_state_dict(state)
    assert fired(resumed, "Save", lambda _: clock.advance(1)) == [5, 6, 8]


# Laps


def test_a_lap_counts_from_the_step_at_which_its_label_was_asked_for_last() -> None:
    clock = ManualClock()
    loop = Loop(range(10), max_epochs=1, clock=clock)
    assert loop.lap("a") == (0, 0.0)
    found = []
    for _ in loop:
        clock.advance(2)
        if loop.global_step in (2, 3, 9):
            found.append(loop.lap("a"))
            clock.advance(1)
            assert loop.lap("a") == found[-1]
    assert found == [(3, 6.0), (1, 3.0), (6, 13.0)]
    lap = loop.lap(("b", 1))
    assert lap == (10, 23.0)
    assert lap.steps_per_second == 10 / 23
    assert Loop([], max_steps=1).lap("a").steps_per_second == 0.0
    assert loop.steps_done == 10


def test_a_lap_of_a_resumed_run_counts_from_the_launch() -> None:
    clock = ManualClock()
    loop = Loop(range(10), max_epochs=1, clock=clock)
    for _ in itertools.islice(loop, 4):
        clock.advance(1)
        loop.lap("a")
    resumed = Loop(range(10), max_epochs=1, clock=clock)
    resumed.load_state_dict(loop.state_dict())
    for _ in itertools.islice(resumed, 2):
        clock.advance(3)
    assert resumed.lap("a") == (2, 6.0)
    resumed.restart()
    assert resumed.lap("a") == (0, 0.0)


# Triggers by hand


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("event", [NEVER, Event(at_step=9, from_step=8), Event(every_n_seconds=99)])
def test_what_is_triggered_is_due_at_the_next_step(enter: str, event: Event) -> None:
    loop = Loop(range(12), {"E": event, "Other": Event(at_step=5)}, max_epochs=1)
    loop.trigger("E")
    found = []
    for _, events in ENTER[enter](loop):
        if "E" in events:
            found.append(loop.global_step)
        if found in ([0], [0, 1]):
            loop.trigger("E")
            loop.trigger("E")
    expected = [0, 1, 2]
    assert found[:3] == expected


def test_a_trigger_is_no_part_of_a_state_and_nothing_after_the_last_step() -> None:
    loop = Loop(range(2), {"E": NEVER}, max_epochs=1)
    iterator = iter(loop)
    next(iterator)
    loop.trigger("E")
    resumed = Loop(range(2), {"E": NEVER}, max_epochs=1)
    resumed.load_state_dict(loop.state_dict())
    assert fired(resumed, "E") == []
    assert "E" in next(iterator)[1]
    loop.trigger("E")
    assert list(iterator) == []


@pytest.mark.parametrize("name", ["Unknown", *LoopEvents])
def test_an_unknown_name_cannot_be_triggered(name: Any) -> None:
    with pytest.raises(KeyError, match=r"is no event of this loop|comes by itself"):
        Loop(range(2), {"E": NEVER}, max_epochs=1).trigger(name)


def test_a_trigger_comes_with_the_last_step_of_an_error() -> None:
    events = {"Save": NEVER, "Log": NEVER}
    loop: Loop[int] = Loop(range(5), events, max_epochs=1, on_exception="event")
    found = []
    with pytest.raises(OSError, match="disk"):
        for batch, due in loop:
            found.append((batch, "Save" in due, "Log" in due))
            with loop.guard():
                if batch == 1:
                    loop.trigger("Save")
                    raise OSError("disk")
    assert found == [(0, False, False), (1, False, False), (None, True, False)]


def test_a_trigger_begins_a_timer_anew() -> None:
    loop, clock = with_clock(SAVE)

    def body(step: int) -> None:
        clock.advance(1)
        if step == 6:
            loop.trigger("E")

    assert fired(loop, "E", body) == [5, 7, 12, 17]


@pytest.mark.parametrize("sizes", [None, 4])
def test_a_trigger_in_a_fetch_comes_with_the_step_that_is_being_made(sizes: int | None) -> None:
    """It is called from another thread."""

    def batches() -> Iterator[int]:
        for number in range(12):
            if number == 6:
                thread = threading.Thread(target=loop.trigger, args=("E",))
                thread.start()
                thread.join()
            yield number

    loop = Loop(batches, {"E": NEVER}, max_epochs=1, lookahead=False, dataloader_len=12)
    found = []
    for batch, events in loop if sizes is None else loop.chunks(sizes):
        if "E" in events:
            found.append(batch)
    assert found == ([6] if sizes is None else [[4]])


def test_a_trigger_from_a_signals_handler() -> None:
    def condition(state: Any) -> bool:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    loop = Loop(range(9), {"Save": NEVER, "C": Event(condition)}, max_epochs=1)
    before = signal.signal(signal.SIGINT, lambda *_: loop.trigger("Save"))
    try:
        found = fired(loop, "Save")
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [4]  # the conditions of step 3 were being asked


# What a loop tells of itself


def test_a_loop_tells_what_it_was_made_of() -> None:
    data = [1, 2]
    events = {"E": Event(at_step=1)}
    loop = Loop(data, events, max_epochs=1)
    assert loop.dataloader is data
    assert loop.events == events
    loop.events.clear()
    assert loop.events == events


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ({"max_epochs": 3}, "max_epochs=3"),
        ({"max_steps": 50_000}, "max_steps=50000"),
        ({"max_seconds": 1.5}, "max_seconds=1.5"),
    ],
)
def test_the_repr_of_a_loop_says_where_the_run_is(limit: dict[str, Any], text: str) -> None:
    class Mine(Loop[int]):
        pass

    loop = Mine([1, 2], **limit)
    assert repr(loop) == f"<Mine at epoch=0, global_step=-1, {text}>"
    next(iter(loop))
    assert repr(loop) == f"<Mine at epoch=0, global_step=0, {text}>"
    loop.stop()
    next(iter(loop))
    assert repr(loop) == f"<Mine at epoch=0, global_step=1, stop_reason='stop', {text}>"
    loop.restart()
    loop.close()
    assert repr(loop) == f"<Mine at epoch=0, global_step=-1, closed, {text}>"
    with pytest.raises(LoopError):
        iter(loop)
