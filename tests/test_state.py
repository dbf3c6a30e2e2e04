"""States: a run in several lives is the run that was never stopped; state files.

A state goes through JSON, as in a checkpoint, unless its loader's own state cannot.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from itertools import count, islice, product, repeat
from pathlib import Path
from typing import Any

import pytest

from cores import CORES, use_core
from dloop import Event, Loop, LoopError, LoopEvents, StateError, batched
from dloop import loader_state as tracking
from dloop.state import read, write
from loops import ENTER, after, flat, resumed
from manual_clock import ManualClock
from parts import Parts
from programs import examples, needs_posix
from stateful_loaders import ALL, KINDS, DrawsItsOrder, StatefulLoader, WithStatefulIterator
from told import warnings_of, with_warnings

Make = Callable[[], Loop[Any]]


def json_of(loop: Loop[Any], step_done: bool = True) -> Any:
    state = loop.state_dict(step_done)
    assert json.loads(json.dumps(state)) == state
    return json.loads(json.dumps(state))


def in_lives(make: Make, counts: Iterator[int], enter: str = "steps") -> list[int]:
    """The numbers of a run, each of whose lives makes so many steps or lists."""
    seen: list[int] = []
    state = None
    for steps in counts:
        loop = make() if state is None else resumed(make(), state)
        for batch, _ in islice(ENTER[enter](loop), steps):
            seen += numbers_in(batch)
        state = json_of(loop)
        if loop.stop_reason is not None:
            break
    return seen


def numbers_in(batch: Any) -> list[int]:
    """The numbers in a batch, which may be a list of lists."""
    if isinstance(batch, list):
        return [number for each in batch for number in numbers_in(each)]
    return [batch]


def assert_each_once(seen: list[int], epochs: int = 3, length: int = 6) -> None:
    """Each epoch has each number once, in whatever order."""
    found = [sorted(seen[begin : begin + length]) for begin in range(0, len(seen), length)]
    assert found == [list(range(length))] * epochs


# ------------------------------------------------------------------------------ whatever the loader


class Generator:
    def __iter__(self) -> Iterator[int]:
        yield from range(6)


class Sequence:
    """What old classes have."""

    def __getitem__(self, place: int) -> int:
        return range(6)[place]


PLAIN: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(6)),
    "generators": Generator,
    "sequence": Sequence,
    "callable": lambda: lambda: iter(range(6)),
    "batched list": lambda: batched(range(6), 1),
}


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_run_in_lives_is_the_uninterrupted_one(
    kind: str, lookahead: bool | None, enter: str
) -> None:
    def make() -> Loop[Any]:
        return Loop(PLAIN[kind](), max_epochs=3, lookahead=lookahead)

    for every in (1, 2, 3, 5, 6):
        assert in_lives(make, repeat(every, 40), enter) == [*range(6)] * 3, every


@pytest.mark.parametrize("enter", ENTER)
@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize(("size", "length"), [(1, 6), (2, 5)])
@pytest.mark.parametrize("kind", ALL)
def test_a_loader_with_a_state_gives_each_sample_once(
    kind: type[Any],
    size: int,
    length: int,
    lookahead: bool | None,
    enter: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> Loop[Any]:
        loader = kind(length)
        loader.seed = 0
        return Loop(
            loader if size == 1 else batched(loader, size), max_epochs=3, lookahead=lookahead
        )

    whole = numbers_in(flat(make()))
    for most_again in (100, 2):
        monkeypatch.setattr(tracking, "MOST_AGAIN", most_again)
        for every in (1, 2, 3, 4, 5):
            seen = in_lives(make, repeat(every, 40), enter)
            assert_each_once(seen, length=length)
            if length % size and not issubclass(kind, DrawsItsOrder):  # a short list tells the end
                assert seen == whole


@pytest.mark.parametrize("kind", ALL)
def test_a_step_that_was_not_done_comes_again_from_a_loader_with_a_state(kind: type[Any]) -> None:
    for steps in (1, 2, 3, 6, 7, 9):
        loop: Loop[int] = Loop(kind(), max_epochs=2)
        seen = flat(islice(loop, steps))
        again = resumed(Loop(kind(), max_epochs=2), json_of(loop, step_done=False))
        seen[-1:] = flat(again)
        assert_each_once(seen, epochs=2)


@pytest.mark.filterwarnings("ignore:epoch .* has more batches:dloop.LoopWarning")
@pytest.mark.parametrize("by", ["dataloader_len", "len()"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_loader_begins_anew_after_an_epoch_that_was_cut(kind: type[Any], by: str) -> None:
    """Its state at the end of the first four batches has the epoch's other two before it."""
    if by == "len()" and hasattr(kind, "dataset"):
        return  # the length of an iterable-style data set does not count
    promises_4 = type(f"Promises4{kind.__name__}", (kind,), {"__len__": lambda self: 4})

    def make() -> Loop[int]:
        if by == "len()":
            return Loop(promises_4(), max_epochs=3)
        return Loop(kind(), max_epochs=3, dataloader_len=4)

    for every in (1, 2, 3, 4, 5):
        seen = in_lives(make, repeat(every, 40))
        assert [len(set(seen[at : at + 4])) for at in (0, 4, 8)] == [4, 4, 4], every
        assert len(seen) == 12


@pytest.mark.parametrize("step_done", [True, False])
@pytest.mark.parametrize(
    ("kind", "where"),
    [*product(ALL, ["iter()"]), *product([StatefulLoader, WithStatefulIterator], ["next()"])],
)
def test_ctrl_c_in_an_epochs_first_fetch_keeps_the_state_before(
    kind: type[Any], where: str, step_done: bool
) -> None:
    class Struck(kind):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Any:
            if next(begun) == 1 and where == "iter()":
                raise KeyboardInterrupt
            return super().__iter__()

        def take(self) -> int:
            if next(taken) == 6 and where == "next()":
                raise KeyboardInterrupt
            return super().take()  # type: ignore[no-any-return]

    begun, taken = count(), count()
    loop: Loop[int] = Loop(Struck(), max_epochs=3)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch for batch, _ in loop)
    again: Loop[int] = resumed(Loop(kind(), max_epochs=3), json_of(loop, step_done))
    seen[len(seen) - (not step_done) :] = flat(again)
    assert_each_once(seen)


@pytest.mark.parametrize("end", ["close", "guard", "stop"])
@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_has_ended_keeps_its_loaders_state(kind: type[Any], end: str) -> None:
    def leave(loop: Loop[int], steps: int) -> Iterator[int]:
        for batch, events in loop:
            if LoopEvents.EXCEPTION in events:
                return
            with loop.guard():
                yield batch
                if loop.steps_done == steps and end == "guard":
                    raise ValueError
            if loop.steps_done == steps and end == "close":
                return
            if loop.steps_done == steps - 1 and end == "stop":
                loop.stop()

    for steps in (2, 3, 6, 7, 12, 13):
        with Loop[int](kind(), max_epochs=3, on_exception="event") as loop:
            seen = list(leave(loop, steps))
            saved = json_of(loop)
            loop.close()
            if end == "guard":
                seen.pop()
            else:
                assert json_of(loop)["loader"] is not None
                saved = json_of(loop)
            loop.restart()  # so that the error does not come out
        seen += flat(resumed(Loop(kind(), max_epochs=3), saved))
        assert_each_once(seen)


def test_fast_forwarding_is_logged_and_warned_of_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Loop[int]:
        return Loop(lambda: clock.one_second_each(range(20)), max_epochs=1)

    clock = ManualClock()
    monkeypatch.setattr("dloop.source.monotonic", clock)
    for steps, warns in ((10, False), (11, True)):
        loop = resumed(make(), after(steps, make()))
        with caplog.at_level(logging.INFO, "dloop"):
            pair, warned = with_warnings(lambda: next(iter(loop)))  # noqa: B023
        assert pair[0] == steps
        assert f"dropped {steps} batches" in caplog.messages[-1]
        text = f"dropping {steps} batches to resume took 11 s"
        assert [text in each for each in warned] == [True] * warns


# --------------------------------------------------------------------------------- when it is taken


@pytest.mark.parametrize("raises", ["loader", "body"])
@pytest.mark.parametrize("enter", ENTER)
def test_the_state_of_an_exceptions_step_knows_if_the_latest_step_was_done(
    enter: str, raises: str
) -> None:
    def loader() -> Iterator[int]:
        yield from range(3)
        if raises == "loader":
            raise OSError("gone")
        yield from range(3, 6)

    with (
        pytest.raises((OSError, ValueError)),
        Loop(loader, max_epochs=1, on_exception="event") as loop,
    ):
        for batch, events in ENTER[enter](loop):
            if LoopEvents.EXCEPTION in events:
                states = json_of(loop), json_of(loop, step_done=False)
            with loop.guard():
                if raises == "body" and batch is not None and loop.global_step >= 2:
                    raise ValueError
    rests = [flat(resumed(Loop(range(6), max_epochs=1), state)) for state in states]
    if raises == "body":
        assert rests == [[2, 3, 4, 5], [2, 3, 4, 5]]
    elif enter == "steps":
        assert rests == [[3, 4, 5], [2, 3, 4, 5]]
    else:  # a list of two was done, and the next one did not come
        assert rests == [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("part", ["iter", "next", "end", "len", "set_epoch", "condition", "clock"])
@pytest.mark.parametrize("enter", ENTER)
def test_a_state_from_within_a_step_is_that_of_the_step_before(part: str, enter: str) -> None:
    """As a signal's handler takes it, which runs wherever the loop is."""
    saved: list[tuple[int, Any]] = []
    for at in range(1, 13):
        parts = Parts(part, at)
        loop = parts.loop()
        parts.action = lambda loop=loop: saved.append((loop.global_step, json_of(loop)))
        flat(ENTER[enter](loop))
    assert len(saved) > 1
    for step, state in saved:
        assert state["steps"] == step + 1
        assert flat(resumed(Parts("none").loop(), state)) == ([*range(6)] * 2)[step + 1 :]


def test_loading_comes_before_the_first_step() -> None:
    state = after(1, Loop(range(3), max_epochs=1))
    loop = Loop(range(3), max_epochs=1)
    iter(loop)
    with pytest.raises(LoopError, match="before the first step"):
        loop.load_state_dict(state)
    assert flat(loop) == [0, 1, 2]
    loop.restart()
    loop.load_state_dict(state)
    assert flat(loop) == [1, 2]


def test_what_was_requested_before_loading_is_kept() -> None:
    """By a handler that runs while the checkpoint is read, say."""
    events = {"Save": Event(at_step=9)}
    state = after(4, Loop(range(10), events, max_epochs=1))
    loop = Loop(range(10), events, max_epochs=1)
    loop.trigger("Save")
    loop.stop()
    loop.load_state_dict(state)
    assert loop.stop_requested
    assert [(batch, "Save" in names) for batch, names in loop] == [(4, True)]
    assert loop.stop_reason == "stop"


# --------------------------------------------------------------------------------- what is finished


@pytest.mark.parametrize("limit", [{"max_steps": 4}, {"max_epochs": 2}, {"max_seconds": 4}])
def test_a_finished_run_yields_nothing(
    limit: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Loop[int]:
        seconds = count()
        return Loop([0, 1], {"T": Event(every_n_seconds=1)}, clock=lambda: next(seconds), **limit)

    loop = resumed(make(), after(100, make()))
    (name,) = limit
    assert (loop.stop_reason, len(loop)) == (name, 0)
    assert loop.steps_to_next_event() is None
    assert not loop.state.training_end
    with caplog.at_level(logging.INFO, "dloop"):
        assert list(loop) == []
    assert len(caplog.messages) == 1 and name in caplog.messages[0]
    assert list(loop.chunks(2)) == []
    loop.restart()
    assert loop.stop_reason is None
    assert flat(loop) == [0, 1] * 2


@pytest.mark.parametrize(
    ("limit", "more"),
    [({"max_epochs": 2}, 3), ({"max_steps": 5}, 2), ({"max_seconds": 9}, 7)],
    ids=lambda value: str(value),
)
def test_a_limit_that_was_raised_lets_the_run_train_on(limit: dict[str, int], more: int) -> None:
    clock = ManualClock()
    loop = Loop(range(3), max_epochs=1, clock=clock)
    for _ in loop:
        clock.advance(1)
    again = resumed(Loop(range(3), clock=clock, **limit), json_of(loop))
    assert again.stop_reason is None
    for _ in again:
        clock.advance(1)
    assert again.global_step - 2 == more


STOPS: dict[str, tuple[Event, str | None]] = {
    "a step": (Event(at_step=2), "stop_when"),
    "a condition": (Event(lambda state: state.global_step == 2), "stop_when"),
    "training time": (Event(at_time=2), "stop_when"),
    "a step of the launch": (Event(at_step=2, per_launch=True), None),
    "time of the launch": (Event(at_time=2, per_launch=True), None),
    "a sum within steps of the launch": (
        Event(at=3, of="batches", from_step=1, per_launch=True),
        "stop_when",
    ),
    "a deadline": (Event(at_timestamp=12), None),
    "a deadline and a step": (Event(at_timestamp=12) | Event(at_step=2), "stop_when"),
    "a deadline or a later step": (Event(at_timestamp=12) | Event(at_step=5), None),
}


@pytest.mark.parametrize("kind", STOPS)
def test_stop_when_finishes_a_run_unless_it_is_of_the_launch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when, finished = STOPS[kind]
    clock = ManualClock()
    monkeypatch.setattr("dloop.run.time_ns", lambda: 10 * 10**9)

    def make() -> Loop[int]:
        return Loop(range(9), max_epochs=1, stop_when=stop_when, clock=clock)

    loop = make()
    for _ in loop:
        clock.advance(1)
        loop.count("batches")
    assert (loop.stop_reason, loop.global_step) == ("stop_when", 2)
    clock.now -= 1
    state = json_of(loop)
    assert state["finished"] == finished
    again = resumed(make(), state)
    assert again.stop_reason == finished
    assert bool(flat(again)) == (finished is None)
    state["finished"] = None
    assert next(iter(resumed(make(), state)))[0] == 3


@pytest.mark.parametrize("ends_too", ["stop", "max_steps"])
def test_what_stop_when_ends_is_finished_though_another_reason_ends_it_too(ends_too: str) -> None:
    limit = {"max_steps": 3 if ends_too == "max_steps" else None}

    def make(**limit: Any) -> Loop[int]:
        return Loop(range(9), stop_when=Event(at_step=2), **limit)

    loop = make(**limit)
    for batch, _ in loop:
        if batch == 1 and ends_too == "stop":
            loop.stop()
    assert (loop.stop_reason, loop.global_step) == (ends_too, 2)
    assert flat(resumed(make(), json_of(loop))) == []


def test_a_finish_is_kept_through_lives_and_undone_with_its_step() -> None:
    def make() -> Loop[int]:
        return Loop(range(9), max_epochs=1, stop_when=Event(at_step=2))

    loop = make()
    flat(loop)
    again = resumed(make(), json_of(loop))
    assert json_of(again)["finished"] == "stop_when"
    undone = json_of(loop, step_done=False)
    assert undone["finished"] is None
    assert flat(resumed(make(), undone)) == [2]


# -------------------------------------------------------------------------------------------- names


def test_names_are_stored_as_strings() -> None:
    names: list[Hashable] = ["a", "", 7, -(2**70), True, None, ("a", (1, 2)), (), 1.5, b"a"]
    events = {name: Event(at_step=step) for step, name in enumerate(names)}
    state = after(len(names), Loop(range(30), events, max_epochs=1))
    assert set(state["windows"]) >= {"a", "7", "None", "('a', (1, 2))", "b'a'"}
    again = resumed(Loop(range(30), dict(reversed(events.items())), max_epochs=1), state)
    next(iter(again))
    assert [again.steps_since(name) for name in names] == list(range(len(names), 0, -1))


@pytest.mark.parametrize("names", [("1", 1), ("None", None), ("('a',)", ("a",))])
def test_names_with_equal_strings_are_refused(names: tuple[Hashable, Hashable]) -> None:
    with pytest.raises(ValueError, match="same name"):
        Loop(range(3), {name: Event(at_step=1) for name in names}, max_epochs=1)


def test_a_name_whose_repr_holds_an_address_is_warned_of_once() -> None:
    class Name:
        pass

    loop = Loop(range(3), {Name(): Event(at_step=1)}, max_epochs=1)
    warned = [warnings_of(loop.state_dict) for _ in loop]
    assert [len(each) for each in warned] == [1, 0, 0]
    assert "address" in warned[0][0]


# ------------------------------------------------------------------------------------------- damage


def test_what_is_no_state_of_this_version_is_refused() -> None:
    loop = Loop(range(3), max_epochs=1)
    for state in (None, 3, [], "state", {}, {"epoch": 3, "model": {}}):
        with pytest.raises(StateError, match="not the state of a dloop run"):
            loop.load_state_dict(state)  # type: ignore[arg-type]
    for version in (2, 4, "3", None):
        with pytest.raises(StateError, match=f"version {version!r}; this dloop reads version 3"):
            loop.load_state_dict({**loop.state_dict(), "version": version})
    assert flat(loop) == [0, 1, 2]


TIMED = {"Often": Event(every_n_seconds=2), "Once": Event(at_time=(1, 9))}


def timed_loop() -> Loop[int]:
    """Each step takes a second."""
    seconds = count()
    return Loop(range(5), TIMED, max_epochs=9, clock=lambda: next(seconds))


LOADER_STATE: dict[str, Any] = {"state": 0, "at": 1, "whole": False, "cut": False, "rest": 0}
EDITS: dict[str, dict[str, Any]] = {
    "more epochs than steps": {"epoch": 10},
    "steps of an epoch before the first step": {"epoch": 0, "steps": 0, "epoch_steps": 3},
    "an end before the first step": {
        **{"epoch": 0, "steps": 0, "epoch_steps": 0, "epoch_end": True},
        **{"windows": {}, "timers": {}},
    },
    "steps beyond the most": {"steps": 2**62 + 1},
    "steps as a float": {"steps": 9.0},
    "an end that is no bool": {"epoch_end": 1},
    "time that Python does not show": {"elapsed": 10**5000},
    "a timer as text": {"timers": {"Often": "every"}},
    "a timer from the future": {"timers": {"Often": [["every", 10**12]]}},
    "a window from the future": {"windows": {"Often": 9}},
    "a name that is no text": {"windows": {7: 3}},
    "a loader's state without its place": {"loader": {**LOADER_STATE, "at": None}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_state_that_was_edited_is_refused(edit: str) -> None:
    loop = timed_loop()
    with pytest.raises(StateError, match="damaged") as caught:
        loop.load_state_dict({**after(9, timed_loop()), **EDITS[edit]})
    assert "\n" not in str(caught.value)
    assert flat(loop) == [*range(5)] * 9


# --------------------------------------------------------------------------------------- state_file


def of_file(path: Any, loader: Any = (0, 1, 2, 3)) -> Loop[Any]:
    """A loop with a state file; each step takes a second."""
    seconds = count()
    return Loop(loader, TIMED, max_epochs=3, clock=lambda: next(seconds), state_file=path)


def save_after(path: Any, steps: int) -> None:
    loop = of_file(path)
    after(steps, loop)
    loop.save_state()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that was saved after six steps."""
    path = tmp_path / "state.json"
    save_after(path, 6)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_loop_resumes_from_its_state_file_if_it_exists(
    tmp_path: Path, kind: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    with caplog.at_level(logging.INFO, "dloop"):
        loop = of_file(kind(path))
        assert not path.exists() and not caplog.messages
        after(6, loop)
        loop.save_state()
        again = of_file(kind(path))
    (told,) = caplog.messages
    assert "state.json" in told and "after step 5, in epoch 1" in told
    assert (again.epoch, again.global_step, again.epoch_step) == (1, 5, 1)
    assert flat(again) == [2, 3, 0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["state.json"]


def test_save_state_needs_a_state_file() -> None:
    with pytest.raises(LoopError, match="state_file="):
        of_file(None).save_state()


def test_a_folder_that_is_missing_is_told_at_construction(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(FileNotFoundError, match=folder):
            of_file(tmp_path / folder / "state.json")
    assert os.listdir(tmp_path) == ["file"]


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loop = of_file("state.json")
    next(iter(loop))
    monkeypatch.chdir("elsewhere")
    loop.save_state()
    assert of_file("../state.json").global_step == 0
    assert os.listdir() == []


@needs_posix
@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_the_file_keeps_its_mode(file: Path, mode: int) -> None:
    file.chmod(mode)
    loop = of_file(file)
    next(iter(loop))
    loop.save_state()
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert of_file(file).global_step == 6


def assert_refused(path: Path) -> None:
    """Loading the file raises one line that names it, and leaves the folder as it is."""
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"state\.json") as caught:
        of_file(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state.json"]


def test_a_file_that_was_cut_at_any_byte_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert_refused(file)


FOREIGN = [
    b"\0" * 100,
    b"\x80\x04\x95pickle",
    b"PK\x03\x04 a checkpoint of PyTorch",
    b"\xff\xfe{\x00}\x00",
    b"NaN",
    b'{"version": 3}',
    b'{"name": "another program", "version": 3}',
    b"[" * 100_000,
    b'{"version": 3' + b"0" * 5000 + b"}",
]


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: content[:20].decode("latin1"))
def test_a_file_of_something_else_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert_refused(file)


class Holding(StatefulLoader):
    """Its state holds a value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def state_dict(self) -> Any:
        return {**self.get(), "deep": {"er": [0, self.value]}}


@pytest.mark.parametrize(
    "value",
    [b"bytes", (1, 2), {1: 2}, {1, 2}, float("nan"), float("inf"), Event(at_step=1)],
    ids=repr,
)
def test_a_value_that_json_cannot_hold_is_named(tmp_path: Path, value: Any) -> None:
    loop = of_file(tmp_path / "state.json", Holding(value))
    next(iter(loop))
    assert loop.state_dict()["loader"]  # which torch.save can hold
    with pytest.raises(StateError, match=r"\['deep'\]\['er'\]\[1\]"):
        loop.save_state()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    loop, before = of_file(file), file.read_bytes()
    next(iter(loop))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            loop.save_state()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["state.json"]
    loop.save_state()
    assert of_file(file).global_step == 6


@pytest.mark.parametrize("call", ["chmod", "fsync", "replace"])
def test_a_handlers_save_within_a_save_leaves_a_whole_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    original = getattr(os, call)

    def interrupted(*arguments: Any) -> None:
        if next(calls) == 0:
            save_after(file, 3)
        original(*arguments)

    calls = count()
    loop = of_file(file)
    next(iter(loop))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupted)
        loop.save_state()
    assert of_file(file).global_step in (6, 8)
    assert os.listdir(file.parent) == ["state.json"]


def test_an_error_of_the_loader_leaves_the_state_from_before() -> None:
    class Fails(StatefulLoader):
        failing = 0

        def take(self) -> int:
            if next(takes) == self.failing:
                self.seed = -1  # what it tells after that is of no use
                raise ConnectionError("the store is gone")
            return super().take()

    for failing in range(13):
        takes = count()
        seen: list[int] = []
        loader = Fails()
        loader.failing = failing
        loop: Loop[int] = Loop(loader, max_epochs=3)
        with pytest.raises(ConnectionError):
            seen.extend(batch for batch, _ in loop)
        seen += flat(resumed(Loop(StatefulLoader(), max_epochs=3), json_of(loop)))
        assert_each_once(seen)


def test_saves_of_several_threads_each_have_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "state.json")
    real, held = os.fsync, {name: threading.Event() for name in "ABC"}
    writing: queue.Queue[str] = queue.Queue()

    def wait(file: int) -> None:
        name = threading.current_thread().name
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            writing.put(name)
            held[name].wait(60)
        real(file)

    monkeypatch.setattr(os, "fsync", wait)
    threads = {}
    for name in "ABC":  # B is still writing when A has ended and C begins
        threads[name] = threading.Thread(target=write, args=(path, {"who": name}), name=name)
        threads[name].start()
        assert writing.get(timeout=60) == name
        if name == "B":
            held["A"].set()
            threads["A"].join()
    for name in "BC":
        held[name].set()
        threads[name].join()
        assert read(path) == {"who": name}
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_triggers_are_not_saved() -> None:
    loop = Loop(range(5), {"Save": Event(at_step=9)}, max_epochs=1)
    next(iter(loop))
    loop.trigger("Save")
    again = resumed(Loop(range(5), {"Save": Event(at_step=9)}, max_epochs=1), json_of(loop))
    assert not any("Save" in events for _, events in again)


@pytest.mark.parametrize(
    "value", [None, True, 2**70, -0.1, 1e-300, "ä\0", "\ud800", [[]], {"": {}}]
)
def test_a_value_that_json_can_hold_is_restored(tmp_path: Path, value: Any) -> None:
    loop = of_file(tmp_path / "state.json", Holding(value))
    seen = flat(islice(loop, 2))
    loop.save_state()
    loader = Holding(value)
    assert_each_once(seen + flat(of_file(tmp_path / "state.json", loader)))
    assert loader.state_dict()["deep"] == {"er": [0, value]}


# ------------------------------------------------------------------------- epochs of another length


@pytest.mark.filterwarnings("ignore:epoch .* batches and not .* as before:dloop.LoopWarning")
def test_a_run_that_resumes_beyond_the_end_of_a_shorter_epoch() -> None:
    again = resumed(Loop(range(5), max_epochs=3), after(7, Loop(range(10), max_epochs=3)))
    with pytest.raises(TypeError, match="not known"):
        len(again)
    again = resumed(Loop(range(5), max_epochs=1), after(7, Loop(range(10), max_epochs=1)))
    found, (warned,) = with_warnings(lambda: flat(again))
    assert (found, again.stop_reason) == ([], "max_epochs")
    assert warned == "the run has ended: epoch 0, its last, has no more batches"
    state = after(7, Loop(range(10), max_epochs=2))
    assert flat(resumed(Loop(range(10), max_epochs=2, dataloader_len=5), state)) == [*range(5)]


def test_the_state_in_an_epochs_first_condition_is_that_of_the_epochs_begin() -> None:
    state = after(6, Loop(StatefulLoader(), max_epochs=2))
    taken: list[Any] = []
    events = {"C": Event(lambda _: taken.append(loop.state_dict()))}
    loop = resumed(Loop(StatefulLoader(), events, max_epochs=2), state)
    next(iter(loop))
    assert taken[0]["loader"]["state"] == state["loader"]["state"]


@pytest.mark.parametrize("kind", [StatefulLoader, WithStatefulIterator])
def test_a_loader_that_has_no_state_any_more_is_fast_forwarded(kind: type[Any]) -> None:
    state = after(8, Loop(kind(), max_epochs=3))
    assert flat(resumed(Loop(Generator(), max_epochs=3), state)) == [*range(2, 6), *range(6)]
    state = after(3, Loop(iter(WithStatefulIterator(9)), max_steps=5))
    assert flat(resumed(Loop(iter(range(9)), max_steps=5), state)) == [3, 4]


def test_the_loaders_of_a_callable_begin_anew_after_a_resume_too() -> None:
    def load() -> StatefulLoader:
        loader = StatefulLoader()
        loader.seed = 0
        return loader

    def make(**arguments: Any) -> Loop[Any]:
        return Loop(load, max_epochs=3, **arguments)

    for arguments in ({}, {"dataloader_len": 4}):
        length = arguments.get("dataloader_len", 6)
        whole = flat(make(**arguments))
        for steps in range(1, 3 * length):
            state = after(steps, make(**arguments))
            assert flat(resumed(make(**arguments), state)) == whole[steps:], steps


@needs_posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "state.json"
    loop = Loop(range(3), max_epochs=1, state_file=link)
    link.symlink_to(target)
    next(iter(loop))
    loop.save_state()
    assert link.is_symlink() and target.exists()


def test_a_time_limit_is_reached_by_a_run_that_read_no_clock() -> None:
    clock = ManualClock()
    loop = Loop(range(9), max_epochs=1, clock=clock)
    for _ in islice(loop, 3):
        clock.advance(20)
    assert flat(resumed(Loop(range(9), max_seconds=50), loop.state_dict())) == []


# ------------------------------------------------- killed processes; `--examples 200` kills as many


def counting(path: str, epochs: int) -> Loop[int]:
    return Loop(range(1, 51), max_epochs=epochs, state_file=path)


def train_and_save(path: str, marks: int) -> None:
    """Count the sum of all batches, and tell the step after each save."""
    loop = counting(path, 100_000)
    for batch, _ in loop:
        loop.count("total", batch)
        loop.save_state()
        os.write(marks, b"%d\n" % loop.global_step)


def kill_many(path: str, kills: int) -> None:
    """Kill processes that save to one file, at any time; each resumes the one before."""
    draw = random.Random(4)
    step = -1
    for number in range(kills):
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            with use_core(CORES[number % len(CORES)]):
                train_and_save(path, theirs)
        os.close(theirs)
        told = os.read(ours, 100)  # it trains
        time.sleep(draw.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(ours, 100_000):
            told += more
        os.close(ours)
        steps = [int(line) for line in told.split()]
        assert steps == [*range(step + 1, step + 1 + len(steps))]
        now = counting(path, 100_000).global_step
        assert steps[-1] <= now <= steps[-1] + 1
        step = now
    epochs = step // 50 + 2
    loop = counting(path, epochs)
    assert len([loop.count("total", batch) for batch, _ in loop]) == 50 * epochs - (step + 1)
    assert loop.counts["total"] == epochs * sum(range(51))  # each batch once


@needs_posix
@pytest.mark.no_core
def test_a_killed_process_resumes_where_it_saved(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code = "import sys; from test_state import kill_many; kill_many(sys.argv[1], int(sys.argv[2]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state.json"), str(examples(request, 15))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
