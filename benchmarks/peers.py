"""Other packages with the same three step events, and a progress bar.

They are in the dependency group `peers`; one that is not installed is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from dloop import Loop

from .rows import STEP_EVENTS, Row, Side, last_batch, loop_with

STEPS = 20_000
"""Fewer than in other rows, since a step of theirs takes microseconds."""


def three_checks(loop: Loop[int]) -> int:
    n = 0
    for _batch, events in loop:
        if "OptimizerStep" in events:
            n += 1
        if "Log" in events:
            n += 1
        if "DropLR" in events:
            n += 1
    return n


def ignite(data: list[int]) -> Callable[[], int]:
    """An Engine whose process function does nothing."""
    engine_of: Any = import_module("ignite.engine")
    engine = engine_of.Engine(lambda engine, batch: None)
    n = 0

    def count(engine: object) -> None:
        nonlocal n
        n += 1

    done = engine_of.Events.ITERATION_COMPLETED
    for when in (done(every=16), done(every=100), done(once=10_001)):
        engine.add_event_handler(when, count)

    def run() -> int:
        engine.run(data, max_epochs=1)
        return n

    return run


def pfn_extras(data: list[int]) -> Callable[[], int]:
    """An ExtensionsManager around a `for` loop."""
    training: Any = import_module("pytorch_pfn_extras.training")
    manager = training.ExtensionsManager(
        {}, {}, 1, iters_per_epoch=len(data), out_dir=tempfile.gettempdir()
    )
    n = 0

    def count(manager: object) -> None:
        nonlocal n
        n += 1

    at_step = training.triggers.ManualScheduleTrigger([10_001], "iteration")
    for name, trigger in [("16", (16, "iteration")), ("100", (100, "iteration")), ("at", at_step)]:
        manager.extend(count, name=name, trigger=trigger)

    def run() -> int:
        for _batch in data:
            with manager.run_iteration():
                pass
        return n

    return run


class Nowhere:
    """A file that discards the progress bar."""

    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


def bar(data: list[int]) -> Iterable[int]:
    tqdm: Any = import_module("tqdm")
    drawn: Iterable[int] = tqdm.tqdm(data, file=Nowhere())
    return drawn


def call(run: Callable[[], int]) -> int:
    return run()


def last_item(batches: Iterable[int]) -> int:
    for batch in batches:  # noqa: B007
        pass
    return batch


THREE_EVENTS = Side(loop_with(STEP_EVENTS), three_checks)

PEERS = [
    Row(
        "three step events / Ignite's Engine",
        THREE_EVENTS,
        Side(ignite, call),
        steps=STEPS,
        needs="ignite",
    ),
    Row(
        "three step events / pytorch-pfn-extras' ExtensionsManager",
        THREE_EVENTS,
        Side(pfn_extras, call),
        steps=STEPS,
        needs="pytorch_pfn_extras",
    ),
    Row(
        "iteration, step events / tqdm(data)",
        Side(loop_with(STEP_EVENTS), last_batch),
        Side(bar, last_item),
        needs="tqdm",
    ),
]
