"""What a type checker must know of dloop: this file is checked, and never run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Set
from datetime import datetime, timezone
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dloop import (
    BACKEND,
    BACKEND_REASON,
    DataExhaustedError,
    DataLengthError,
    Event,
    Loop,
    LoopError,
    LoopEvents,
    LoopState,
    LoopWarning,
    StateError,
    __version__,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type

    from dloop.events import BaseEvent


class Batch:
    rows: int = 0


class Loader:
    def __iter__(self) -> Iterator[Batch]:
        return iter([Batch()])

    def __len__(self) -> int:
        return 1


class Named(Enum):
    LOG = "log"


def generate() -> Iterator[float]:
    yield 0.5


def strings() -> list[str]:
    return ["a"]


def loaders() -> Loader:
    return Loader()


# The batch's type follows from the source


def batches(paths: Iterable[bytes], anything: Any) -> None:
    for number, _ in Loop([1, 2], max_epochs=1):
        assert_type(number, int)
    for text, _ in Loop(strings, max_steps=1):
        assert_type(text, str)
    for batch, _ in Loop(Loader(), max_seconds=1):
        assert_type(batch, Batch)
    for called, _ in Loop(loaders, max_seconds=1.5):
        assert_type(called, Batch)
    for built, _ in Loop(Loader, max_epochs=2):
        assert_type(built, Batch)
    for generated, _ in Loop(generate, max_epochs=1):
        assert_type(generated, float)
    for streamed, _ in Loop(generate(), max_epochs=1):
        assert_type(streamed, float)
    for path, _ in Loop(paths, max_epochs=1):
        assert_type(path, bytes)
    for key, _ in Loop({"a": 1}, max_epochs=1):
        assert_type(key, str)
    for pair, _ in Loop(lambda: [(1, "a")], max_epochs=1):
        assert_type(pair, tuple[int, str])
    for whatever, _ in Loop(anything, max_epochs=1):
        assert_type(whatever, Any)
    for numbers, _ in Loop([1, 2], max_epochs=1, batches_per_step=3):
        assert_type(numbers, list[int])
    for several, _ in Loop(generate, max_epochs=1, batches_per_step=3):
        assert_type(several, list[float])
    for lists, _ in Loop([1, 2], max_epochs=1, batches_per_step=3).chunks(2):
        assert_type(lists, list[list[int]])


# Annotations


def train(loop: Loop[int]) -> int:
    assert_type(loop, Loop[int])
    total = 0
    for batch, events in loop:
        total += batch
        as_set: Set[Hashable] = events
        assert_type("Log" in events, bool)
        assert_type(LoopEvents.EPOCH_END in events, bool)
        if events:
            total += len(events) + len(as_set) + len(events | {"more"})
    return total


numbers: Loop[int] = Loop([1, 2], max_epochs=1)
train(numbers)
train(Loop(range(3), max_epochs=1))
assert_type(Loop([1, 2], max_epochs=1), Loop[int])
assert_type(Loop([1, 2], {"Eval": None}, max_epochs=1, batches_per_step=None), Loop[int])
assert_type(Loop([1, 2], max_epochs=1, batches_per_step=3), Loop[list[int]])
assert_type(Loop([1, 2], max_epochs=1, start_step=3, fast_forward=False), Loop[int])
kept: list[Set[Hashable]] = [events for _, events in numbers]
pairs = list(numbers)
assert_type(pairs[0][0], int)
assert_type(next(iter(numbers))[0], int)


# The loop


def look(loop: Loop[int]) -> None:
    assert_type(loop.epoch, int)
    assert_type(loop.global_step, int)
    assert_type(loop.epoch_step, int)
    assert_type(loop.state, LoopState)
    assert_type(len(loop), int)
    assert_type(bool(loop), bool)
    reason: str | None = loop.stop_reason
    print(reason)
    for batches, events in loop.chunks((64, 8, 1)):
        assert_type(batches, list[int])
        due: Set[Hashable] = events
        print(due, loop.steps_since("Log"))
    assert_type(loop.steps_to_next_event(), int | None)
    loop.load_state_dict(loop.state_dict(step_done=False))
    error: Exception | None = loop.exception
    print(error, loop.stop_requested)
    with loop.guard():
        loop.stop()
    with loop.pause_clock():
        loop.trigger("Log")
    steps, seconds = loop.lap("Log")
    assert_type(steps, int)
    assert_type(seconds, float)
    assert_type(loop.lap("Log").steps_per_second, float)
    assert_type(loop.steps_done, int)
    assert_type(loop.events["Log"] | LoopEvents.EPOCH_END, BaseEvent)
    loop.restart()
    with loop as entered:
        assert_type(entered, Loop[int])


def look_at_state(state: LoopState) -> None:
    assert_type(state.epoch, int)
    assert_type(state.global_step, int)
    assert_type(state.epoch_step, int)
    assert_type(state.steps_done, int)
    assert_type(state.epoch_end, bool)
    assert_type(state.training_end, bool)
    assert_type(state.elapsed, float)
    assert_type(hash(state), int)


# Events


def holds(state: LoopState) -> bool:
    return state.global_step == 7


Event(every_n_steps=16)
Event(every_n_steps=16, first_at_step=0)
Event(every_n_steps=None, at_step=None, every_n_seconds=None, at_time=None, per_epoch=None)
Event(at_timestamp=1.5e9)
Event(at_timestamp=[datetime.now(timezone.utc), 3])
Event(at_step=10_000, from_step=1, until_step=20_000)
Event(at_step=[1, 2], per_epoch=True)
Event(at_step=(1, 2))
Event(at_step={1, 2})
Event(at_step=range(3))
Event(every_n_seconds=0.5)
Event(every_n_seconds=1)
Event(every_n_seconds=Fraction(1, 2))
Event(at_time=50 * 60, per_launch=True)
Event(at_time=[1, 2.5])
Event(every_n_epochs=2, at_epoch=[3, 5])
Event(holds)
Event(condition_function=holds, every_n_steps=2)
Event(lambda state: state.global_step % 3)
Event(lambda state: None)

assert_type(Event(every_n_steps=2).every_n_steps, "int | None")
assert_type(Event(every_n_steps=2) == 3, bool)

joined = Event(every_n_steps=16) | LoopEvents.TRAINING_END
Loop([1], {"Step": joined, "Log": Event(every_n_steps=100)}, max_steps=1)
Loop([1], {"Step": Event(every_n_steps=16) | LoopEvents.TRAINING_END}, max_steps=1)
Loop([1], {"Step": LoopEvents.EPOCH_END | Event(every_n_steps=16)}, max_steps=1)
Loop([1], {"Step": Event(at_step=1) | Event(at_step=2) | LoopEvents.EPOCH_END}, max_steps=1)
Loop([1], max_steps=1, stop_when=Event(at_step=1) | LoopEvents.EPOCH_END)
Loop([1], max_steps=1, stop_when=Event(at_time=3.9 * 3600, per_launch=True))
Loop([1], events={Named.LOG: Event(at_step=1), 3: Event(at_step=1), ("a", 1): joined}, max_steps=1)

by_text: dict[str, Event] = {"Log": Event(at_step=1)}
by_member: dict[Named, Event] = {Named.LOG: Event(at_step=1)}
Loop([1], by_text, max_steps=1)
Loop([1], by_member, max_steps=1)
mixed = {"Step": joined, "Log": Event(every_n_steps=100)}
Loop([1], mixed, max_steps=1)
Loop([1], {}, max_steps=1)
Loop([1], None, max_steps=1)
Loop([1], max_epochs=None, max_steps=1, dataloader_len=3, lookahead=None, clock=None)
Loop([1], max_steps=1, lookahead=False, clock=lambda: 3)


# Subclasses


class Counting(Loop[Batch]):
    def __init__(self, source: Iterable[Batch], name: str) -> None:
        super().__init__(source, {name: Event(every_n_steps=2)}, max_epochs=1)
        self.name = name

    def total(self) -> int:
        return sum(batch.rows for batch, _ in self)


assert_type(Counting(Loader(), "Log").total(), int)
for counted, _ in Counting(Loader(), "Log"):
    assert_type(counted, Batch)
with Counting(Loader(), "Log") as counting:
    assert_type(counting, Counting)
train_on: Loop[Batch] = Counting([Batch()], "Log")


# The rest


def fail(error: LoopError) -> RuntimeError:
    return error


fail(DataLengthError("a"))
fail(DataExhaustedError("a"))
fail(StateError("a"))
warning: UserWarning = LoopWarning("a")
texts: list[str] = [BACKEND, BACKEND_REASON, __version__, LoopEvents.EPOCH_END.name]
