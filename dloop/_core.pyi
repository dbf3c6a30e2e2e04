"""The one typed surface of both cores, `_core` and `_core_py`, and of what they are given.

Rows tell the criteria of events in ints: bits, steps and nanoseconds. `start` and `stop` are the
window of global steps. Points are sorted; where there are points, the period is 0.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

StepRow: TypeAlias = tuple[int, int, tuple[int, ...], int, int]
"""bit, period, points, start, stop"""
TimeRow: TypeAlias = tuple[int, int, tuple[int, ...], bool, int, int]
"""bit, period, points, whether it counts from this launch, start, stop"""
ConditionRow: TypeAlias = tuple[int, Callable[[LoopState], object], int, int]
"""bit, function, start, stop"""

class Plan(Protocol):
    """What is due when, and the limits; NEVER (2**63 - 1) where there is none."""

    max_steps: int
    max_epochs: int
    max_time: int
    timed: bool
    steps: list[StepRow]
    epoch_steps: list[StepRow]
    times: list[TimeRow]
    conditions: list[ConditionRow]
    stop_bit: int
    stop_conditions: list[ConditionRow]
    all_conditions: list[ConditionRow]

    @property
    def on_training_end(self) -> int: ...
    def on_epoch_end(self, epoch: int, step: int, /) -> int: ...
    def event_set(self, bits: int, /) -> frozenset[Hashable]: ...
    def blame(self, exception: Exception, bit: int, /) -> None: ...

class Source(Protocol):
    """Opens epochs and judges their ends."""

    once: bool

    def open_epoch(self, epoch: int, /) -> tuple[Iterator[Any], int, int]: ...
    def goes_on_after(self, epoch: int, taken: int, step: int, /) -> bool: ...
    def goes_past_promise(self, epoch: int, /) -> None: ...
    def ran_dry(self, step: int, /) -> None: ...
    def finish(self, epoch: int, stop_reason: str | None, /) -> None: ...
    def forget(self) -> None: ...

class EventSet(frozenset[Hashable]): ...

def make_event_set(
    names: Iterable[Hashable],
    places: dict[Hashable, int],
    first: tuple[Hashable, ...],
    bits: int,
    on_unknown: Callable[[Hashable], object],
) -> EventSet: ...

class Clock:
    def __init__(self, tick: Callable[[], int] | None, saved: int) -> None: ...

class LoopState:
    @property
    def epoch(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def epoch_step(self) -> int: ...
    @property
    def epoch_end(self) -> bool: ...
    @property
    def training_end(self) -> bool: ...
    @property
    def elapsed(self) -> float: ...
    @property
    def steps_done(self) -> int: ...

class Core:
    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def epoch_start(self) -> int: ...
    @property
    def stop_reason(self) -> str | None: ...
    @property
    def closed(self) -> bool: ...
    def __init__(
        self,
        plan: Plan,
        source: Source,
        clock: Clock,
        epoch: int = 0,
        epoch_steps: int = 0,
        steps: int = 0,
    ) -> None: ...
    def steps(self) -> Iterator[tuple[Any, frozenset[Hashable]]]: ...
    def lists(
        self, sizes: int | tuple[int, ...]
    ) -> Iterator[tuple[list[Any], frozenset[Hashable]]]: ...
    def steps_to_next_event(self, epoch_len: int) -> int | None: ...
    def close(self) -> None: ...
    def leave(self) -> None: ...
    @property
    def state(self) -> LoopState: ...
