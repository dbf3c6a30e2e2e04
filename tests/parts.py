"""A loop whose loader, condition and clock do something in the middle of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dloop import Event, Loop


class Parts:
    """Two epochs of six batches. The `at`-th call of the named `part` calls `action`."""

    def __init__(self, part: str, at: int = 1) -> None:
        self.part = part
        self.at = at
        self.action: Callable[[], object] = int
        self.calls = 0

    def call(self, part: str) -> None:
        if part == self.part:
            self.calls += 1
            if self.calls == self.at:
                self.action()

    def __iter__(self) -> Iterator[int]:
        self.call("iter")
        for number in range(6):
            self.call("next")
            yield number
        self.call("end")

    def __len__(self) -> int:
        self.call("len")
        return 6

    def set_epoch(self, epoch: int) -> None:
        self.call("set_epoch")

    def condition(self, state: object) -> bool:
        self.call("condition")
        return False

    def clock(self) -> int:
        self.call("clock")
        return self.calls

    def loop(self) -> Loop[Any]:
        events = {"C": Event(self.condition), "T": Event(at_time=10**6)}
        return Loop(self, events, max_epochs=2, clock=self.clock)
