"""What a type checker must refuse: an error on every line marked `# E:`, and on no other."""

from __future__ import annotations

from collections.abc import Iterator

import dloop
from dloop import Event, Loop, LoopEvents, LoopState, batched

nothing = dloop.nothing  # E:


def wrong_batch(state: int) -> bool:
    return state == 7


def generate() -> Iterator[float]:
    yield 0.5


Event(every_n_steps="3")  # E:
Event(every_n_steps=1.5)  # E:
Event(every_n_steps=[3])  # E:
Event(at_step=1.5)  # E:
Event(at_step=["a"])  # E:
Event(every_n_seconds="1")  # E:
Event(at_time=["1"])  # E:
Event(every_n_steps=1, from_step=1.5)  # E:
Event(every_n_steps=1, per_epoch=1)  # E:
Event(every_n_steps=1, first_at_step="0")  # E:
Event(at_timestamp="12:00")  # E:
Event(3)  # E:
Event(lambda: True)  # E:
Event(wrong_batch)  # E:
Event(None, 3)  # E:
Event(every_n_stepz=3)  # E:
Event(every_n=3, of=3)  # E:
Event(at="3", of="tokens")  # E:
Event(at_step=3, wait_for=[])  # E:

event = Event(every_n_steps=3)
event | 3  # E:
event | "Log"  # E:
missing = LoopEvents.NO_SUCH_END  # E:

Loop([1], events={"a": 3}, max_steps=1)  # E:
Loop([1], events={"a": lambda state: True}, max_steps=1)  # E:
Loop([1], events=[event], max_steps=1)  # E:
Loop([1], events=event, max_steps=1)  # E:
Loop([1], max_steps="3")  # E:
Loop([1], max_steps=1.5)  # E:
Loop([1], max_seconds="1")  # E:
Loop([1], max_steps=1, stop_when=lambda state: True)  # E:
Loop([1], max_steps=1, lookahead="no")  # E:
Loop([1], max_steps=1, dataloader_len=1.5)  # E:
Loop([1], max_steps=1, clock=lambda: "12:00")  # E:
Loop([1], max_steps=1, fast_forward="no")  # E:
Loop([1], max_steps=1, on_exception="ignore")  # E:
Loop([1], max_steps=1, signals="SIGTERM")  # E:
Loop([1], max_steps=1, sync=True)  # E:
Loop([1], max_steps=1, batches_per_step=2)  # E:
batched([1], 1.5)  # E:
batched(3, 2)  # E:
batched([1])  # E:
Loop([1], max_stepz=1)  # E:
Loop(3, max_steps=1)  # E:
Loop(lambda: 3, max_steps=1)  # E:
Loop(max_steps=1)  # E:

loop = Loop([1], max_steps=1)
loop.epoch = 3  # E:
loop.global_step = 3  # E:
loop.state = loop.state  # E:
loop.state.epoch = 3  # E:
loop.state.elapsed = 3.0  # E:
texts: Loop[str] = loop  # E:
lists: Loop[int] = Loop(batched([1], 2), max_steps=1)  # E:
floats: Loop[int] = Loop(generate, max_epochs=1)  # E:
reason: str = loop.stop_reason  # E:
for batch, events in loop:
    batch.upper()  # E:
    events.add("Log")  # E:


def condition(state: LoopState) -> bool:
    return state.no_such_field == 3  # E:
