"""Loop: its dataloader, what it tells of the run, requests, laps, pauses, restart and close."""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import itertools
import json
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dloop import Event, Loop, LoopError, LoopEvents, sync
from loops import ENTER, fired
from manual_clock import ManualClock
from recording_loaders import RecordingLoader, SizedLoader

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END

# The example of the founding document, unchanged (including spaces at the ends of lines)

EXAMPLE = """\
from dloop import Event, Loop, LoopEvents

train_loop = Loop(
    dataloader,\x20
    max_epochs=3, # specify ONE stopping condition: epochs, steps, or time (in seconds)
    # max_steps=50_000, # alternative: stop after 50k steps
    # max_seconds=3600, # alternative: stop after 1 hour of training
    events={ # [1]\x20
        "ModelParametersUpdate": Event(every_n_steps=16),\x20
        "Logging": Event(every_n_steps=100),
        "DecreaseLR": Event(at_step=10_000),
        "HourlyCheckpoint": Event(every_n_seconds=3600),
        "TenMinuteWarning": Event(at_time=50 * 60)  # 50 minutes into training
    }
)

for batch, batch_events in train_loop: # [2]
    # <your-code> run forward and compute gradients </your-code>
   \x20
    if "ModelParametersUpdate" in batch_events: # [3]
        # <your-code> update model parameter </your-code>
       \x20
    if "Logging" in batch_events: # [4]
        # <your-code> log progress </your-code>

    if "DecreaseLR" in batch_events: # [5]
        # <your-code> decrease the learning rate </your-code>
       \x20
    if "HourlyCheckpoint" in batch_events: # [6]
        # <your-code> save checkpoint every hour </your-code>
       \x20
    if "TenMinuteWarning" in batch_events: # [7]
        # <your-code> log warning that training will end soon </your-code>
       \x20
    if LoopEvents.EPOCH_END in batch_events: # [8]
        # <your-code> run validation? Checkpoint? </your-code>
"""


def run_example(body: str, *changes: tuple[str, str], **names: Any) -> dict[str, Any]:
    """Run the example with `body` in place of each `<your-code>`; return its variables."""
    comment = re.compile(r"^( *)# <your-code> (.*) </your-code>$", re.MULTILINE)
    text, count = comment.subn(lambda found: f"{found[1]}{body.format(found[2])}", EXAMPLE)
    assert count == 7
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    namespace = {"dataloader": range(7000), **names}
    exec(compile(text, "example", "exec"), namespace)
    return namespace


def test_the_founding_example_runs_unchanged() -> None:
    after = run_example("pass")
    loop = after["train_loop"]
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (2, 20_999, 6_999)
    assert loop.stop_reason == "max_epochs"
    assert after["batch_events"] == {"Logging", EPOCH_END, TRAINING_END}


def test_each_body_of_the_founding_example_runs_at_its_steps() -> None:
    done: dict[str, list[int]] = collections.defaultdict(list)
    run_example(
        "record('{}', train_loop.global_step)",
        ("max_epochs=3,", "max_epochs=3, clock=clock,"),
        clock=iter(range(30_000)).__next__,
        record=lambda what, step: done[what].append(step),
    )
    assert done == {
        "run forward and compute gradients": list(range(21_000)),
        "update model parameter": list(range(15, 21_000, 16)),
        "log progress": list(range(99, 21_000, 100)),
        "decrease the learning rate": [10_000],
        "save checkpoint every hour": [3_599, 7_199, 10_799, 14_399, 17_999],
        "log warning that training will end soon": [2_999],
        "run validation? Checkpoint?": [6_999, 13_999, 20_999],
    }


def test_importing_and_running_dloop_loads_only_what_is_used() -> None:
    program = (
        "import json, sys; before = set(sys.modules); import dloop\n"
        "list(dloop.Loop([1], {'Log': dloop.Event(every_n_steps=1)}, max_epochs=1))\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    foreign = {name for name in loaded if name not in sys.stdlib_module_names}
    own = ("_cython", "cython", "_missing_stdlib_info")  # Cython's, and one of Debian's Python
    assert {name for name in foreign if not name.startswith(own)} == {"dloop"}


# Dataloaders


# What a loop tells of itself


def test_subclasses_have_arguments_of_their_own() -> None:
    class Mine(Loop[int]):
        def __init__(self, epochs: int) -> None:
            super().__init__([1, 2], max_epochs=epochs)

    assert [batch for batch, _ in Mine(epochs=2)] == [1, 2, 1, 2]


def test_events_are_a_set_and_say_so() -> None:
    for _, events in Loop([1, 2], {"Log": Event(at_step=1)}, max_epochs=1):
        wrong: Any = events
        with pytest.raises(TypeError, match=r"^events are a set: write `'Log' in events`$"):
            wrong["Log"]
        with pytest.raises(AttributeError, match=r"write `'Log' in events`$"):
            wrong.Log  # noqa: B018


def test_a_loop_tells_what_it_was_made_of() -> None:
    data = [1, 2]
    events = {"E": Event(at_step=1), "Off": None}
    loop = Loop(data, events, max_epochs=1)
    assert loop.dataloader is data
    assert loop.events == {"E": Event(at_step=1), "Off": Event()}
    loop.events.clear()
    assert list(loop.events) == ["E", "Off"]


@pytest.mark.parametrize(
    ("limit", "text"),
    [({"max_epochs": 3}, "max_epochs=3"), ({"max_seconds": 1.5}, "max_seconds=1.5")]
    + [({"stop_when": Event(at_step=9)}, "stop_when=Event(at_step=9)")],
)
def test_the_repr_says_where_the_run_is(limit: dict[str, Any], text: str) -> None:
    class Mine(Loop[int]):
        pass

    loop = Mine([1, 2], **limit)
    assert repr(loop) == f"<Mine at epoch=0, global_step=-1, {text}>"
    next(iter(loop))
    loop.stop()
    assert repr(loop) == f"<Mine at epoch=0, global_step=0, {text}>"
    next(iter(loop))
    assert repr(loop) == f"<Mine at epoch=0, global_step=1, stop_reason='stop', {text}>"
    loop.restart()
    loop.close()
    assert repr(loop) == f"<Mine at epoch=0, global_step=-1, closed, {text}>"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Loop(iter(range(9)), max_steps=5), [5, 4, 3, 2, 1, 0]),
        (lambda: Loop([0] * 2, max_epochs=3), [6, 5, 4, 3, 2, 1, 0]),
        (lambda: Loop([0] * 5, max_epochs=1.5), [8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda: Loop(lambda: iter([0] * 9), max_epochs=2, dataloader_len=2), [4, 3, 2, 1, 0]),
        (lambda: Loop([0] * 3, max_steps=9, stop_when=Event(at_step=1)), [9, 8, 0]),
        (lambda: Loop(lambda: [0] * 2, max_epochs=2), [None, 3, 2, 1, 0]),
        (lambda: Loop(RecordingLoader([0]), max_epochs=2), [None, None, 0]),
        (lambda: Loop([0], max_seconds=2, clock=itertools.count().__next__), [None, None, 0]),
        (lambda: Loop([0], stop_when=Event(at_step=1)), [None, None, 0]),
    ],
    ids=range(9),
)
def test_len_is_the_number_of_steps_to_come(make: Any, expected: list[int | None]) -> None:
    def length() -> int | None:
        try:
            return len(loop)
        except TypeError as error:
            assert "not known" in str(error)
            return None

    loop = make()
    assert [length(), *(length() for _ in loop)] == expected
    assert loop  # a loop is true, whatever its length is


@pytest.mark.parametrize(
    ("events", "arguments", "expected"),
    [
        ({}, {}, [4, 3, 2, 1, 4, 3, 2, 1, None]),
        ({"A": Event(every_n_steps=3)}, {}, [3, 2, 1, 1, 2, 1, 2, 1, None]),
        ({"A": Event(at_step=5) | Event(at_step=1)}, {}, [2, 1, 2, 1, 2, 1, 2, 1, None]),
        ({"A": Event(every_n_steps=1, from_step=6)}, {}, [4, 3, 2, 1, 3, 2, 1, 1, None]),
        ({"A": Event(every_n_steps=3, per_epoch=True)}, {}, [3, 2, 1, 1, 3, 2, 1, 1, None]),
        ({}, {"max_steps": 6}, [4, 3, 2, 1, 2, 1, None]),
        ({}, {"max_epochs": 9, "stop_when": Event(at_step=2)}, [3, 2, 1, None]),
        # timers, conditions and epochs of unknown length are not scheduled
        (
            {"A": Event(lambda state: False, at_time=0, every_n_seconds=1, every_n_epochs=1)},
            {"max_epochs": 1},
            [4, 3, 2, 1, None],
        ),
        ({}, {"max_epochs": 1, "lookahead": True}, [None, None, None, None, None]),
        (
            {"A": Event(every_n_steps=3, per_epoch=True)},
            {"lookahead": True},
            [3, 2, 1, 3, 3, 2, 1, 3, None],
        ),
    ],
    ids=str,
)
def test_steps_to_next_event(
    events: dict[str, Event], arguments: dict[str, Any], expected: list[int | None]
) -> None:
    clock = ManualClock()
    if not arguments.keys() & {"max_steps", "max_epochs"}:
        arguments = {**arguments, "max_epochs": 2}
    loop = Loop(range(4), events, clock=clock, **arguments)
    before = loop.steps_to_next_event()
    assert clock.readings == 0
    assert [before, *(loop.steps_to_next_event() for _ in loop)] == expected
    loop.restart()
    assert loop.steps_to_next_event() == before
    loop.close()
    assert loop.steps_to_next_event() is None


def test_steps_to_next_event_knows_the_epochs_of_an_iterator() -> None:
    loop = Loop(iter(range(6)), max_epochs=2, dataloader_len=3)
    assert [loop.steps_to_next_event() for _ in loop] == [2, 1, 3, 2, 1, None]


def test_steps_to_next_event_changes_nothing() -> None:
    class Shuffled:
        """Draws another order each time that it was exhausted."""

        order = 0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            yield from ([0, 1, 2], [2, 1, 0])[self.order % 2]
            self.order += 1

    loop = Loop(Shuffled(), max_epochs=2)
    assert [(batch, loop.steps_to_next_event())[0] for batch, _ in loop] == [0, 1, 2, 2, 1, 0]


def test_steps_to_next_event_does_not_count_agreements() -> None:
    loop = Loop(range(100), max_epochs=1, sync=sync.maximum(list, every=10))
    next(iter(loop))
    assert loop.steps_to_next_event() == 99


def test_steps_since_between_events_counts_from_the_latest() -> None:
    loop = Loop(range(5), {"Step": Event(every_n_steps=3)}, max_epochs=2)
    assert loop.steps_since("Step") == 0
    assert [(loop.steps_since("Step"), loop.steps_since(EPOCH_END)) for _ in loop] == [
        *[(1, 1), (2, 2), (3, 3), (1, 4), (2, 5), (3, 1), (1, 2), (2, 3), (3, 4), (1, 5)],
    ]
    with pytest.raises(KeyError, match=r"'Stpe' is not an event .* mean 'Step'\?"):
        loop.steps_since("Stpe")


@pytest.mark.parametrize("taken", [0, 2, 4])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_loop_cannot_be_copied_and_goes_on(way: Callable[[Any], Any], taken: int) -> None:
    loop = Loop(range(4), max_epochs=1)
    batches = [batch for batch, _ in itertools.islice(loop, taken)]
    with pytest.raises(TypeError, match=r"save its state_dict\(\) instead"):
        way(loop)
    state = loop.state_dict()
    assert copy.deepcopy(state) == pickle.loads(pickle.dumps(state)) == state
    batches += [batch for batch, _ in loop] if taken < 4 else []
    assert batches == [0, 1, 2, 3]


# Requests


@pytest.mark.parametrize("name", ["Unknown", *LoopEvents], ids=str)
def test_only_a_name_of_the_mapping_can_be_triggered(name: Any) -> None:
    with pytest.raises(KeyError, match=r"not an event of this loop|fires by itself"):
        Loop(range(2), {"E": Event()}, max_epochs=1).trigger(name)


def test_a_trigger_and_a_stop_from_a_signal_handler_in_the_middle_of_a_step() -> None:
    def condition(state: Any) -> bool:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    def handler(*_: object) -> None:
        loop.trigger("Save")
        loop.stop()
        assert loop.stop_requested

    loop = Loop(range(9), {"Save": Event(), "C": Event(condition)}, max_epochs=1)
    former = signal.signal(signal.SIGINT, handler)
    try:
        assert fired(loop, "Save") == [4]  # step 3 is decided already
    finally:
        signal.signal(signal.SIGINT, former)
    assert (loop.global_step, loop.stop_reason, loop.stop_requested) == (4, "stop", False)


def test_guard_needs_with() -> None:
    loop = Loop(range(3), max_epochs=1, on_exception="event")
    with pytest.raises(LoopError, match="with loop:"):
        loop.guard()
    with loop:
        loop.guard()
    with pytest.raises(LoopError, match="with loop:"):
        loop.guard()


# Laps


def test_a_lap_counts_from_the_step_of_the_lap_before() -> None:
    clock = ManualClock()
    loop = Loop(range(10), max_epochs=1, clock=clock)
    assert loop.lap("a") == (0, 0.0)
    assert loop.lap("a").steps_per_second == 0.0
    found = []
    for _ in loop:
        clock.advance(2)
        if loop.global_step in (2, 3, 9):
            found.append(loop.lap("a"))
            clock.advance(1)
            assert loop.lap("a") == found[-1]
    assert found == [(3, 6.0), (1, 3.0), (6, 13.0)]
    lap = loop.lap(("b", 1))
    assert (lap.steps, lap.seconds, lap.steps_per_second) == (10, 23.0, 10 / 23)


# Pauses


def test_a_pause_is_taken_out_of_training_time_but_not_out_of_launch_time() -> None:
    events = {"Timer": Event(every_n_seconds=4), "Launch": Event(at_time=14, per_launch=True)}
    clock = ManualClock()
    loop = Loop(range(30), events, max_seconds=9, clock=clock)
    found = []
    for _, names in loop:
        found += [(loop.global_step, loop.state.elapsed, name) for name in names]
        clock.advance(1)
        with loop.pause_clock(), loop.pause_clock():
            clock.advance(1)
    assert found == [
        *[(4, 4.0, "Timer"), (7, 7.0, "Launch"), (8, 8.0, "Timer"), (9, 9.0, TRAINING_END)],
    ]


@pytest.mark.parametrize("enter", ENTER)
def test_a_pause_ends_with_a_body_that_raises_or_leaves(enter: str) -> None:
    clock = ManualClock()
    loop = Loop(range(30), max_steps=30, clock=clock)
    with pytest.raises(ZeroDivisionError):
        for _ in ENTER[enter](loop):
            with loop.pause_clock():
                clock.advance(5)
                raise ZeroDivisionError
    for _ in ENTER[enter](loop):
        with loop.pause_clock():
            clock.advance(5)
            break
    clock.advance(1)
    assert loop.lap("all").seconds == 1.0


def test_a_pause_outside_of_a_run_and_around_one() -> None:
    clock = ManualClock()
    loop = Loop(range(4), max_epochs=1, clock=clock)
    with loop.pause_clock():
        clock.advance(5)
    for _ in itertools.islice(loop, 2):
        clock.advance(1)
    with loop.pause_clock():
        clock.advance(5)
        assert loop.state_dict()["elapsed"] == 2 * 10**9
        for _ in loop:
            clock.advance(1)
        assert loop.lap("all") == (4, 2.0)
    clock.advance(1)
    assert loop.lap("later") == (4, 3.0)


# The end, restart and close


@pytest.mark.parametrize("way", ["finish", "leave", "raise", "close"])
@pytest.mark.parametrize("enter", ENTER)
def test_a_run_that_has_ended_cannot_be_entered(way: str, enter: str) -> None:
    wrong = OSError("disk")
    loop = Loop(SizedLoader([0, wrong if way == "raise" else 1], promise=2), max_epochs=1)
    if way == "close":
        with loop:
            next(iter(loop))
    else:
        with pytest.raises(OSError) if way == "raise" else contextlib.nullcontext():
            list(itertools.islice(loop, 2 if way == "leave" else None))
    for _ in range(2):
        with pytest.raises(LoopError, match=r"(ended|closed).*restart\(\) begins a new"):
            ENTER[enter](loop)
    assert len(loop) == 0


def test_restart_begins_a_new_run_with_the_same_arguments() -> None:
    events = {
        "Steps": Event(every_n_steps=4),
        "Period": Event(every_n_seconds=3, at_time=2),
        "Condition": Event(lambda state: state.epoch == 1),
    }
    clock = itertools.count().__next__
    loop = Loop([0] * 3, events, max_steps=8, stop_when=Event(at_time=7), clock=clock)
    runs = []
    for _ in range(2):
        runs.append([(batch, set(names), loop.state) for batch, names in loop])
        assert (len(runs[-1]), loop.stop_reason) == (7, "stop_when")
        loop.restart()
        assert (loop.stop_reason, loop.epoch, loop.global_step, len(loop)) == (None, 0, -1, 8)
    assert runs[0] == runs[1]


def test_close_closes_the_iterator_but_not_one_that_was_passed() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            closed.append("closed")

    for enter in ENTER.values():
        with Loop(source, max_epochs=1) as loop:
            steps = enter(loop)
            next(steps)
            assert closed == []
        assert closed == ["closed"]
        with pytest.raises(LoopError, match="closed"):
            next(steps)
        loop.close()
        closed.clear()
    stream = source()
    with Loop(stream, max_steps=3) as loop:
        next(iter(loop))
    assert next(stream) == 1


def test_a_length_beyond_what_len_can_return_is_not_known() -> None:
    with pytest.raises(TypeError, match="not known"):
        len(Loop(range(2**62), max_epochs=4))


def test_help_shows_the_arguments() -> None:
    assert list(inspect.signature(Loop).parameters)[:3] == ["dataloader", "events", "max_epochs"]
    assert list(inspect.signature(Event).parameters)[:2] == ["condition_function", "every_n_steps"]
