"""What a type checker must know of dloop: this file is checked, and never run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from datetime import datetime, timedelta, timezone
from enum import Enum
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import dloop
from dloop import Event, Loop, LoopEvents, LoopState, batched, sync

if TYPE_CHECKING:
    from typing_extensions import assert_type


class Batch:
    rows: int = 0


class Loader:
    def __iter__(self) -> Iterator[Batch]:
        return iter([Batch()])


class Named(Enum):
    LOG = "log"


def generate() -> Iterator[float]:
    yield 0.5


def strings() -> list[str]:
    return ["a"]


# The batch's type follows from the source


def batches(paths: Iterable[bytes], anything: Any) -> None:
    for number, _ in Loop([1, 2], max_epochs=1):
        assert_type(number, int)
    for text, _ in Loop(strings, max_steps=1):
        assert_type(text, str)
    for batch, _ in Loop(Loader(), max_seconds=1):
        assert_type(batch, Batch)
    for built, _ in Loop(Loader, max_seconds=1.5):
        assert_type(built, Batch)
    for generated, _ in Loop(generate, max_epochs=1):
        assert_type(generated, float)
    for streamed, _ in Loop(generate(), max_epochs=1):
        assert_type(streamed, float)
    for path, _ in Loop(paths, max_epochs=1):
        assert_type(path, bytes)
    for pair, _ in Loop(lambda: [(1, "a")], max_epochs=1):
        assert_type(pair, tuple[int, str])
    for whatever, _ in Loop(anything, max_epochs=1):
        assert_type(whatever, Any)
    for numbers, _ in Loop(batched([1, 2], 3), max_epochs=1):
        assert_type(numbers, list[int])
    for several, _ in Loop(batched(generate, 3), max_epochs=1):
        assert_type(several, list[float])
    for lists, _ in Loop(batched(iter([1, 2]), 3), max_epochs=1).chunks(2):
        assert_type(lists, list[list[int]])


# The loop


def train(loop: Loop[int]) -> int:
    total = 0
    for batch, events in loop:
        as_set: Set[Hashable] = events
        assert_type("Log" in events, bool)
        assert_type(LoopEvents.EPOCH_END in events, bool)
        total += batch + len(events) + len(as_set) + len(events | {"more"})
    for batches, _ in loop.chunks((64, 8, 1)):
        assert_type(batches, list[int])
    assert_type(next(iter(loop))[0], int)
    return total


numbers: Loop[int] = Loop([1, 2], max_epochs=1)
train(numbers)
train(Loop(range(3), max_epochs=1))
kept: list[Set[Hashable]] = [events for _, events in numbers]


def look(loop: Loop[int], state: LoopState) -> None:
    assert_type(loop.state, LoopState)
    assert_type((loop.epoch, loop.global_step, loop.epoch_step), tuple[int, int, int])
    assert_type((len(loop), bool(loop), loop.steps_done), tuple[int, bool, int])
    assert_type((state.epoch, state.global_step, state.epoch_step), tuple[int, int, int])
    assert_type((state.epoch_end, state.training_end, state.elapsed), tuple[bool, bool, float])
    reason: str | None = loop.stop_reason
    error: Exception | None = loop.exception
    print(reason, error, loop.stop_requested, loop.steps_since("Log"))
    assert_type(loop.steps_to_next_event(), int | None)
    loop.load_state_dict(loop.state_dict(step_done=False))
    with loop.guard(), loop.pause_clock():
        loop.trigger("Log")
        loop.stop()
    steps, seconds = loop.lap("Log")
    assert_type(steps, int)
    assert_type(seconds, float)
    assert_type(loop.lap("Log").steps_per_second, float)
    assert_type(loop.lap("Log").counts, Mapping[str, int])
    assert_type(loop.counts["tokens"], int)
    assert_type(loop.finish(), Set[Hashable])
    assert_type(loop.finish_epoch(), Set[Hashable])
    assert_type(loop.count("tokens", 3), Set[Hashable])
    assert_type(loop.events["Log"] | LoopEvents.EPOCH_END, Event)
    loop.restart()
    with loop as entered:
        assert_type(entered, Loop[int])


# Events


def holds(state: LoopState) -> bool:
    return state.global_step == 7


Event()
Event(every_n_steps=16, first_at_step=0, from_step=1, until_step=20_000)
Event(every_n_steps=None, at_step=None, every_n_seconds=None, at_time=None, per_epoch=None)
Event(every_n_seconds=timedelta(hours=1), at_time=[timedelta(minutes=5), 3])
Event(every_n_seconds=0.5, at_time=50 * 60, per_launch=True)
Event(at_timestamp=[datetime.now(timezone.utc), 1.5e9])
for steps in ([1, 2], (1, 2), {1, 2}, range(3)):
    Event(at_step=steps, every_n_epochs=2, at_epoch=steps, per_epoch=True)
Event(holds)
Event(condition_function=holds, every_n_steps=2)
Event(lambda state: state.global_step % 3)

joined = Event(every_n_steps=16) | LoopEvents.TRAINING_END
assert_type(joined, Event)
assert_type(joined.parts, tuple[Event, ...])
assert_type(joined.every_n_steps, "int | None")
assert_type(LoopEvents.EPOCH_END | LoopEvents.TRAINING_END, Event)
Loop([1], {"End": LoopEvents.EPOCH_END, "Off": None}, stop_when=LoopEvents.EPOCH_END)
Loop([1], {Named.LOG: Event(), 3: joined, ("a", 1): joined}, max_steps=1)
by_member: dict[Named, Event] = {Named.LOG: Event(at_step=1)}
Loop([1], by_member, max_epochs=None, max_steps=1, dataloader_len=3, lookahead=None, clock=None)
Loop([1], None, max_seconds=timedelta(hours=1), signals=SIGTERM, sync=False, clock=lambda: 3)
Loop([1], max_steps=1, signals=(SIGTERM, 2), sync=sync.torch_distributed(every=100))
assert_type(Loop([1, 2], max_epochs=1, start_step=3, fast_forward=False), Loop[int])


# Subclasses, and the rest


class Counting(Loop[Batch]):
    def __init__(self, source: Iterable[Batch], name: str) -> None:
        super().__init__(source, {name: Event(every_n_steps=2)}, max_epochs=1)

    def total(self) -> int:
        return sum(batch.rows for batch, _ in self)


with Counting(Loader(), "Log") as counting:
    assert_type(counting, Counting)
error: dloop.LoopError = dloop.DataLengthError("a") or dloop.DataExhaustedError("a")
warning: UserWarning = dloop.LoopWarning("a")
texts: list[str] = [dloop.BACKEND, dloop.BACKEND_REASON, dloop.__version__]
