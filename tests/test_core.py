"""What the core does at each step: event sets, conditions, states, and what is kept alive."""

from __future__ import annotations

import collections
import copy
import gc
import json
import pickle
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Set
from itertools import islice, repeat
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import MagicMock

import pytest

from dloop import Event, Loop, LoopError, LoopEvents, LoopState, LoopWarning
from interpreter import CPYTHON, counts_blocks, needs_reference_counts
from loops import ENTER, fired, flat
from parts import Parts
from recording_loaders import Batch, SizedLoader

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
by_entry = pytest.mark.parametrize("enter", list(ENTER))


NAMES: list[Any] = ["Log", 0, -1, 2**70, ("a", 1), (), LoopState, None, b"x"]


# The events of a step are an immutable set


def steps_of_a_small_run() -> list[Any]:
    """The events of four steps: none; a; b; a, b and both ends."""
    events = {"a": Event(at_step=[1, 3]), "b": Event(at_step=[2, 3])}
    return [due for _, due in Loop([0] * 4, events, max_epochs=1)]


def test_any_hashable_is_a_name_and_the_set_holds_that_object() -> None:
    events = {name: Event(every_n_steps=number) for number, name in enumerate(NAMES, 1)}
    for step, (_, due) in enumerate(Loop([0] * 3, events, max_steps=20)):
        names: set[Any] = {
            name for name, event in events.items() if not (step + 1) % event.every_n_steps
        }
        names |= {EPOCH_END} if step % 3 == 2 else set()
        names |= {TRAINING_END} if step == 19 else set()
        assert due == names and names == due and hash(due) == hash(frozenset(names))
        assert {id(name) for name in due} == {id(name) for name in names}
        assert (len(due), bool(due)) == (len(names), bool(names))
        for name in (*NAMES, *LoopEvents):
            assert (name in due) == (name in names)


def test_the_events_are_a_set_with_the_operators_of_frozenset() -> None:
    quiet, a, b, both = steps_of_a_small_run()
    assert isinstance(a, Set) and isinstance(quiet, Set)
    assert not isinstance(a, set)
    assert a | b == {"a", "b"} == b | a
    assert a | {"x"} == {"a", "x"} == {"x"} | a
    assert both & {"a", "x"} == {"a"} == {"a", "x"} & both
    assert both - a == {"b", EPOCH_END, TRAINING_END}
    assert a ^ b == {"a", "b"}
    assert a < both and a <= both and both > b and not a <= b
    assert quiet <= a and quiet | a == a and not a - a
    assert a.isdisjoint(b) and not both.isdisjoint(b)
    assert a != b and a != "a" and a != ["a"]
    assert {a: 1, quiet: 2}[frozenset({"a"})] == 1
    assert not a & {"unknown"}  # operators do not warn
    assert "'a'" in repr(a) and "'b'" not in repr(a)
    assert "LoopEvents.EPOCH_END" in repr(both)


def test_the_events_cannot_be_changed_but_copied_and_pickled() -> None:
    for due in steps_of_a_small_run():
        for change in ("add", "discard", "remove", "clear", "update", "pop"):
            assert not hasattr(due, change)
        for again in (copy.copy(due), copy.deepcopy(due), pickle.loads(pickle.dumps(due))):
            assert again == due and hash(again) == hash(due) and set(again) == set(due)


@pytest.mark.parametrize("count", [63, 64, 65, 200, 2000])
def test_any_number_of_events_fires_at_the_right_steps(count: int) -> None:
    events: dict[Any, Event] = {n: Event(every_n_steps=n) for n in range(1, count, 2)}
    events |= {f"at {k}": Event(at_step=k) for k in range(0, count, 2)}
    kept = [due for _, due in Loop(lambda: iter([0] * 7), events, max_steps=300)]
    for step, due in enumerate(kept):  # they do not change with later steps
        expected: set[Any] = {n for n in range(1, count, 2) if (step + 1) % n == 0}
        expected |= {f"at {step}"} if step < count and step % 2 == 0 else set()
        expected |= {EPOCH_END} if step % 7 == 6 else set()
        expected |= {TRAINING_END} if step == 299 else set()
        assert due == expected


def test_thousands_of_combinations_are_right() -> None:
    events = {
        place: Event(lambda state, place=place: state.global_step >> place & 1)
        for place in range(13)
    }
    loop = Loop(range(5000), events, max_steps=4999)
    kept = []
    for _, due in loop:
        kept.append(due)
        step = loop.global_step
        assert loop.steps_since(12) == (1 if step > 4096 else step + 1)
    for step, due in enumerate(kept[:-1]):
        assert due == {place for place in range(13) if step >> place & 1}


# Unknown names


def test_an_unknown_name_warns_once_per_loop_and_names_the_nearest_known_one() -> None:
    events = {"Log": Event(every_n_steps=1), "Checkpoint": Event(at_step=99)}
    kept = []
    for _ in range(2):
        with pytest.warns(LoopWarning) as caught:
            for _, due in Loop([0] * 5, events, max_epochs=1):
                assert "Log" in due and "Checkpoint" not in due and LoopEvents.INTERRUPT not in due
                assert not any(name in due for name in ("Lgo", "Chekpoint", "Lgo", ("far", 1)))
            kept.append(due)
        assert [str(warning.message) for warning in caught] == [
            "'Lgo' is not an event of this loop; did you mean 'Log'?",
            "'Chekpoint' is not an event of this loop; did you mean 'Checkpoint'?",
            "('far', 1) is not an event of this loop",
        ]
    with pytest.warns(LoopWarning, match="did you mean 'Log'"):
        assert "Loog" not in kept[0]  # its loop is freed


# Conditions


def test_a_condition_sees_the_state_of_every_step_once() -> None:
    seen: list[LoopState] = []
    events = {"E": Event(seen.append), "Timer": Event(every_n_seconds=9)}
    clock = iter([5, 5.5, 6, 7, 8, 9])
    loop = Loop([0, 0, 0], events, max_steps=5, clock=clock.__next__)
    states = [(loop.state, loop.epoch, loop.global_step, loop.epoch_step) for _ in loop]
    assert [state for state, *_ in states] == seen
    assert [(state.epoch, state.global_step, state.epoch_step) for state in seen] == [
        tuple(numbers) for _, *numbers in states
    ]
    assert [(state.epoch, state.epoch_step, state.steps_done) for state in seen] == [
        *[(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4), (1, 1, 5)],
    ]
    assert [state.epoch_end for state in seen] == [False, False, True, False, False]
    assert [state.training_end for state in seen] == [False] * 4 + [True]
    assert [state.elapsed for state in seen] == [0.5, 1.0, 2.0, 3.0, 4.0]


def test_a_condition_fires_if_its_result_is_true_in_a_boolean_context() -> None:
    answers: list[Any] = [True, False, 1, 0, None, "yes", "", [0], []]
    events = {"E": Event(lambda state: answers[state.global_step])}
    assert fired(Loop(range(9), events, max_epochs=1), "E") == [0, 2, 5, 7]


def test_stop_when_is_called_before_training_end_is_known_and_the_others_after() -> None:
    seen: dict[str, list[bool]] = {"stop": [], "other": []}

    def stop(state: LoopState) -> bool:
        seen["stop"].append(state.training_end)
        return state.global_step == 2

    watch = Event(lambda state: seen["other"].append(state.training_end))
    loop = Loop([0] * 9, {"Watch": watch}, max_epochs=1, stop_when=Event(stop))
    assert [loop.state.training_end for _ in loop] == [False, False, True]
    assert seen == {"stop": [False] * 3, "other": [False, False, True]}
    list(Loop([0] * 2, max_steps=2, stop_when=Event(stop)))  # the limit is known beforehand
    assert seen["stop"][3:] == [False, True]
    list(Loop([0] * 9, {"Watch": watch}, max_steps=9, stop_when=Event(at_step=1)))
    assert seen["other"][3:] == [False, True]


@by_entry
@pytest.mark.parametrize("name", ["Log", ("a", 1), None])
def test_an_exception_of_a_condition_ends_the_run_with_a_note(name: Any, enter: str) -> None:
    class Ambiguous:
        def __bool__(self) -> bool:
            raise wrong

    def condition(state: LoopState) -> object:
        return state.global_step == 4 and Ambiguous()

    wrong = ZeroDivisionError("my own")
    events = {"Other": Event(every_n_steps=1)}
    stop_when = Event(condition) if name is None else None
    events |= {} if name is None else {name: Event(condition)}
    loop = Loop(iter(range(9)), events, max_steps=9, stop_when=stop_when)
    batches: list[int] = []
    with pytest.raises(ZeroDivisionError) as caught:
        for batch, _ in ENTER[enter](loop):
            batches += batch if isinstance(batch, list) else [batch]
    assert caught.value is wrong
    where = "stop_when" if name is None else f"event {name!r}"
    assert wrong.__notes__ == [f"in the condition of {where}"]  # type: ignore[attr-defined]
    assert batches == [0, 1, 2, 3]
    assert (loop.global_step, loop.stop_reason, loop.exception) == (3, "exception", wrong)


# LoopState


def test_a_state_is_a_value() -> None:
    def states() -> list[LoopState]:
        loop = Loop([0, 0], max_seconds=1, clock=iter([0, 0.5, 1.5]).__next__)
        return [loop.state for _ in loop]

    first, second = states(), states()
    assert first == second
    assert [hash(state) for state in first] == [hash(state) for state in second]
    assert first[0] != first[1]
    assert first[0] != 3
    assert repr(first[1]) == (
        "LoopState(epoch=0, global_step=1, epoch_step=1, epoch_end=True, training_end=True,"
        " elapsed=1.5)"
    )


# Within a step


@by_entry
@pytest.mark.parametrize("way", ["close", "restart"])
@pytest.mark.parametrize("part", ["iter", "next", "set_epoch", "end", "condition", "clock"])
def test_a_step_in_which_the_loop_is_closed_or_restarted_is_an_error(
    part: str, way: str, enter: str
) -> None:
    parts = Parts(part, 2 if part in ("next", "set_epoch", "iter") else 1)
    loop = parts.loop()
    parts.action = getattr(loop, way)
    done = 0
    with pytest.raises(LoopError, match={"close": "closed", "restart": "replaced"}[way]):
        for batch, _ in ENTER[enter](loop):
            done += len(batch) if isinstance(batch, list) else 1
    assert done == {"end": 6, "iter": 6, "set_epoch": 6}.get(part, done) <= 6
    if way == "restart":
        assert flat(ENTER[enter](loop)) == [*range(6), *range(6)]


# No batch is kept alive that the body has deleted


class Sized:
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        return generator()


class Indexed:
    __len__ = Sized.__len__

    def __getitem__(self, at: int) -> Batch:
        if at >= 4:
            raise IndexError
        return Batch()


def generator() -> Iterator[Batch]:
    return (Batch() for _ in range(4))


BATCHES: dict[str, Callable[[], Any]] = {
    "sized": Sized,
    "sized, indexed": Indexed,
    "generator function": lambda: generator,
    "callable of sized": lambda: Sized,
    "stream": generator,
}
BUSY = {"All": Event(lambda state: True), "Two": Event(every_n_steps=2)}


@needs_reference_counts
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"events": BUSY}, {"profile": True}, {"on_exception": "event"}, {"start_step": 2}],
    ids=["quiet", "busy", "profile", "on_exception", "start_step"],
)
def test_a_batch_is_freed_when_the_body_deletes_it(
    arguments: dict[str, Any], lookahead: bool | None, kind: str
) -> None:
    if "start_step" in arguments and (lookahead or not kind.startswith("sized")):
        arguments = {**arguments, "fast_forward": kind == "stream"}  # lengths are not known
    loop = Loop(BATCHES[kind](), max_steps=4, lookahead=lookahead, **arguments)
    steps = 0
    for batch, _ in loop:
        reference = weakref.ref(batch)
        assert reference() is not None
        del batch
        assert reference() is None
        steps += 1
    assert steps == 4 - arguments.get("start_step", 0)


# Loops are freed with all that they refer to


class Source:
    """A loader; `held` may refer to anything."""

    held: Any = None

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Stream(Source):
    def __next__(self) -> int:
        return 0


EVENTS = {
    "Steps": Event(every_n_steps=2) | TRAINING_END,
    "Timer": Event(every_n_seconds=3600),
    "Condition": Event(lambda state: False),
}


def leave(loop: Loop[Any]) -> None:
    next(iter(loop))
    next(loop.chunks(2))


def restart(loop: Loop[Any]) -> None:
    leave(loop)
    loop.restart()
    leave(loop)


def close(loop: Loop[Any]) -> None:
    with loop:
        leave(loop)


def fail(loop: Loop[Any]) -> None:
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            for _ in loop:
                raise error


@needs_reference_counts
@pytest.mark.usefixtures("no_collector", "small_collections")
@pytest.mark.parametrize("kind", [Source, Stream])
@pytest.mark.parametrize("way", [iter, leave, list, restart, close, fail])
def test_deleting_a_loop_frees_its_source_at_once(way: Callable[..., Any], kind: type[Any]) -> None:
    source = kind()
    reference = weakref.ref(source)
    loop = Loop(source, EVENTS, max_steps=5)
    way(loop)
    kept = loop.state
    del source
    assert reference() is not None, "the loop refers to its source"
    del loop
    assert reference() is None
    assert kept.elapsed >= 0


@needs_reference_counts
@pytest.mark.usefixtures("no_collector", "small_collections")
def test_an_iterator_keeps_the_source_of_a_deleted_loop_and_then_closes_its_generator() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append("closed")

    steps = iter(Loop(source, EVENTS, max_epochs=2))
    assert [batch for batch, _ in islice(steps, 7)] == [0, 1, 2, 3, 4, 0, 1]
    assert closed == ["closed"]
    del steps
    assert closed == ["closed", "closed"]


def make_a_cycle(by: str, taken: int) -> weakref.ref[Source]:
    """Let a loop be referred to by what it refers to; return a reference to its source."""

    def look(state: LoopState | None = None) -> int:
        return min(loop.global_step, 0)

    source = Source()
    events = EVENTS | ({"C": Event(look)} if by == "condition" else {})
    loop = Loop(source, events, max_steps=5, clock=look if by == "clock" else None)
    steps = loop.chunks(2) if by == "lists" else iter(loop)
    source.held = {"source": loop, "iterator": steps, "lists": steps}.get(by)
    list(islice(steps, taken))
    return weakref.ref(source)


@pytest.mark.usefixtures("uncompiled", "small_collections")
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("by", ["source", "iterator", "lists", "condition", "clock"])
def test_a_loop_in_a_reference_cycle_is_collected(by: str, taken: int) -> None:
    reference = make_a_cycle(by, taken)
    gc.collect()
    gc.collect()  # PyPy frees what has a finalizer with the second one
    assert reference() is None


@by_entry
@pytest.mark.parametrize("part", ["next", "condition", "clock"])
def test_an_older_iterator_may_be_freed_in_the_middle_of_a_step(part: str, enter: str) -> None:
    def free() -> None:
        older.clear()
        gc.collect()

    parts = Parts(part, 5)
    parts.action = free
    loop = parts.loop()
    older = [loop.chunks(2), iter(loop)]
    assert flat(ENTER[enter](loop)) == [*range(6), *range(6)]
    assert older == []


# Memory


def grown_by(rounds: int, work: Callable[[], object]) -> int:
    """How many blocks of memory are allocated after `rounds` that were not before."""
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(rounds):
        work()
    gc.collect()
    return sys.getallocatedblocks() - before


def use_states() -> None:
    loop = Loop(lambda: iter(range(4)), EVENTS, max_epochs=2, clock=lambda: 0)
    restart(loop)
    again = Loop(range(4), EVENTS, max_epochs=2)
    again.load_state_dict(json.loads(json.dumps(loop.state_dict())))
    for _, events in again:
        assert repr(events) and hash(events | {1}) and repr(again) and hash(again.state)
    close(loop)


def use_signals() -> None:
    loop = Loop(range(4), max_epochs=2, signals=signal.SIGTERM, profile=True)
    for batch, _ in loop:
        if batch == 2:
            signal.raise_signal(signal.SIGTERM)


def use_errors() -> None:
    def interrupt(state: LoopState) -> bool:
        raise KeyboardInterrupt

    for enter in ENTER.values():
        for catch in ("raise", "event"):
            failing = SizedLoader([0, 1, 2, OSError("disk")], promise=4)
            loop: Loop[Any] = Loop(failing, EVENTS, max_epochs=1, on_exception=catch)  # type: ignore[arg-type]
            with pytest.raises(OSError):
                list(enter(loop))
            with pytest.raises(LoopError):
                iter(loop)
        loop = Loop(range(4), {"C": Event(interrupt)}, max_epochs=1)
        with pytest.raises(KeyboardInterrupt):
            list(enter(loop))


@counts_blocks
@pytest.mark.usefixtures("small_collections")
@pytest.mark.parametrize("use", [use_states, use_signals, use_errors])
def test_no_use_of_a_loop_leaks_memory(use: Callable[[], None]) -> None:
    for _ in range(5):  # caches are full after some rounds; a leak grows in each
        if grown_by(40, use) < 30:
            return
    raise AssertionError("the memory grows")


@counts_blocks
@pytest.mark.usefixtures("small_collections")
def test_a_long_run_does_not_grow() -> None:
    events = {"Ten": Event(every_n_epochs=10), "Timer": Event(every_n_seconds=1e-3)}
    epochs = iter(Loop(lambda: [0, 1, 2], events, max_epochs=4000))
    steps = iter(Loop(lambda: repeat(0), {"Ten": Event(every_n_steps=10)}, max_steps=400_000))
    for iterator, half in ((epochs, 6000), (steps, 200_000)):
        collections.deque(islice(iterator, half), maxlen=0)
        assert grown_by(1, lambda: collections.deque(iterator, maxlen=0)) < 200  # noqa: B023


# An interrupt within a constructor


@pytest.mark.skipif(not CPYTHON, reason="interrupts each line")
def test_an_interrupt_while_a_loop_is_made_and_entered_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(folder):
            return None
        left -= event == "line"
        if left == 0:
            outer: FrameType | None = frame
            while outer is not None:
                if outer.f_code.co_name == "__del__":  # Python prints what is raised in there
                    left = 1  # the next line will do
                    return trace
                outer = outer.f_back
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    def enter() -> object:
        sys.settrace(trace)
        try:
            seen = {"signals": signal.SIGTERM, "profile": True, "progress": MagicMock}
            loop: Loop[int] = Loop(range(3), EVENTS, max_epochs=1, **seen)
            return next(loop.chunks(2))[0]
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(former)

    ignored: list[object] = []
    monkeypatch.setattr(
        sys,
        "unraisablehook",  # Python prints what is raised while a generator is closed
        lambda each: None if isinstance(each.object, Generator) else ignored.append(each),
    )
    folder = str(Path(sys.modules["dloop"].__file__ or "").parent)
    former, handler = sys.gettrace(), signal.getsignal(signal.SIGTERM)
    for at in range(1, 5000):
        left = at
        found = enter()
        assert ignored == []
        assert signal.getsignal(signal.SIGTERM) is handler
        if found is not None:
            break
    assert found == [0, 1]
    assert at > 100


# Warnings show the user's line, not one of dloop


def line() -> int:
    """The line number of the caller."""
    return sys._getframe(1).f_lineno


LOOPS: dict[str, Callable[[], Loop[Any]]] = {
    "longer": lambda: Loop(SizedLoader(range(5), promise=2), max_epochs=1),
    "longer in each epoch": lambda: Loop(SizedLoader(range(5), promise=2), max_epochs=2),
    "exhausted": lambda: Loop(iter([1, 2]), max_steps=9),
    "exhausted with lookahead": lambda: Loop(iter([1, 2]), max_steps=9, lookahead=True),
    "exhausted between epochs": lambda: Loop(iter([1, 2]), max_epochs=9, dataloader_len=1),
}


@by_entry
@pytest.mark.parametrize("kind", LOOPS)
def test_a_warning_shows_the_line_that_iterates(kind: str, enter: str) -> None:
    steps = ENTER[enter](LOOPS[kind]())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = line() + 1
        for _ in steps:
            pass
    assert {(each.filename, each.lineno) for each in caught} == {(__file__, expected)}


def test_the_warning_of_an_unknown_name_shows_the_line_of_the_in() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, events in Loop([0], {"Log": Event(every_n_steps=1)}, max_epochs=1):
            expected = line() + 1
            assert "Lgo" not in events
            assert list(map(events.__contains__, ["Loog", "Log"])) == [False, True]
    assert [(each.filename, each.lineno) for each in caught] == [
        (__file__, expected),
        (__file__, expected + 1),
    ]
