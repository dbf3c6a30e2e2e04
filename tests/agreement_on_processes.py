"""A program for several processes that agree. Each reports its trace of every run."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from dloop import Event, Loop, LoopError, LoopEvents, batched, sync
from manual_clock import ManualClock
from processes import report
from told import warnings_of

RANK = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
RANKS = int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
LAST = RANKS - 1
RANDOM_PLANS = 100
LIBRARY: list[Callable[[Any], Any]] = []
"""What sets up a loader, if a library has joined the processes."""

Trace = list[Any]
Body = Callable[[int], object]


def agreeing(data: Any, events: Any = None, every: int = 5, **arguments: Any) -> Loop[Any]:
    return Loop(data, events, sync=primitive(every), **arguments)


def trace(loop: Loop[Any], body: Body = id, steps: Iterable[Any] | None = None) -> Trace:
    """What fires at which steps, how the run ended, and the batches of its last step."""
    found: Trace = []
    batch: Any = None
    for batch, events in loop if steps is None else steps:  # noqa: B007 (it is used below)
        found += [(loop.epoch, loop.global_step, sorted(map(str, events)))] if events else []
        body(loop.global_step)
    return [*found, loop.stop_reason, loop.global_step, batch]


def on(rank: int, step: int, action: Callable[[], object]) -> Body:
    """A body that does something on one rank, at one step."""
    return lambda now: action() if (RANK, now) == (rank, step) else None


def one_slow_rank() -> Trace:
    loop = agreeing(range(60), {"Save": Event(every_n_seconds=0.02)}, max_epochs=1)
    return trace(loop, lambda _: time.sleep(0.002 * (RANK == 0)))


def sigterm_to_one() -> Trace:
    loop = agreeing(range(99), max_epochs=1, signals=signal.SIGTERM)
    return trace(loop, on(LAST, 12, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def max_seconds() -> Trace:
    def clock() -> float:
        return time.perf_counter() * (1 + RANK)

    return trace(agreeing(range(10**9), max_seconds=0.05, clock=clock, every=50))


def resumed() -> Trace:
    clock = ManualClock()

    def begin() -> Loop[Any]:
        holds = Event(lambda state: (RANK, state.global_step) == (LAST, 11))
        events = {"Save": Event(every_n_seconds=9), "C": holds}
        return agreeing(range(30 + RANK), events, max_epochs=2, clock=clock)

    loop = begin()
    for _ in loop:
        clock.advance(1 + RANK)
        if loop.global_step == 12:
            state = loop.state_dict()
            break
    loop.close()
    again = begin()
    again.load_state_dict(state)
    return trace(again, lambda _: clock.advance(1 + RANK))


def other_step() -> Trace:
    try:
        trace(agreeing(range(20), max_steps=20, start_step=3 if RANK == 0 else 0))
    except LoopError as error:
        return [str(error)]
    return []


def loader_of_a_library() -> Trace:
    """Twelve batches for each process; where a library has set them up, those of its loader."""
    loader: Any = range(12)
    if LIBRARY:
        from torch.utils.data import DataLoader

        data: Any = range(45)
        loader = LIBRARY[0](DataLoader(data, batch_size=2, shuffle=True))
    events = {"Save": Event(lambda state: (RANK, state.global_step) in ((0, 2), (LAST, 21)))}
    loop = agreeing(loader, events, every=4, max_epochs=5)
    return trace(loop, on(LAST, 38, loop.stop))[:-1]


def without_sync() -> Trace:
    """Whether the first rank alone warns."""
    events = {"C": Event(lambda state: False)}
    warned = warnings_of(lambda: list(Loop(range(3), events, max_epochs=1)))
    return [len(warned) == (RANK == 0)]


def random_plans() -> Trace:
    found: Trace = []
    for seed in range(RANDOM_PLANS):
        same, own = random.Random(seed), random.Random(1000 * seed + RANK)
        clock = ManualClock()
        events = {
            "Step": Event(every_n_steps=same.randint(1, 9)),
            "Time": Event(every_n_seconds=same.randint(1, 9)),
            "Condition": Event(lambda _, own=own: own.random() < 0.03),
        }
        limit = same.choice([{"max_epochs": 2}, {"max_steps": 30}, {"max_seconds": 20}])
        size = same.choice([None, 3, (4, 2, 1)])
        size_of_list = same.randint(1, 2)
        steps = same.randint(5, 20) + own.randint(0, 3)
        lists = batched(range(size_of_list * steps), size_of_list)
        loop = agreeing(
            lists if seed % 2 else lambda lists=lists: iter(lists),
            events,
            clock=clock,
            every=same.randint(1, 6),
            **limit,
        )
        stop, trigger = own.randint(0, 200), own.randint(0, 60)

        def body(
            step: int,
            loop: Loop[Any] = loop,
            clock: ManualClock = clock,
            own: random.Random = own,
            stop: int = stop,
            trigger: int = trigger,
        ) -> None:
            clock.advance(own.choice((0, 1, 2)))
            if step >= stop:
                loop.stop()
            if step == trigger:
                loop.trigger("Step")

        found.append(trace(loop, body, None if size is None else loop.chunks(size)))
    return found


SCENARIOS: dict[str, Callable[[], Trace]] = {
    scenario.__name__: scenario
    for scenario in (
        one_slow_rank,
        sigterm_to_one,
        max_seconds,
        resumed,
        other_step,
        loader_of_a_library,
        without_sync,
        random_plans,
    )
}


def failing(way: str) -> Trace:
    """The last rank raises, or is killed, at step 12. The others report the error that they got."""
    loop = agreeing(range(10**9), max_epochs=1)
    try:
        for batch, events in loop:
            assert LoopEvents.EPOCH_END not in events
            if (RANK, batch) == (LAST, 12):
                if way == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError
            time.sleep(0.001)
    except ZeroDivisionError:
        raise
    except Exception as error:
        return [type(error).__name__, loop.global_step]
    return ["no error", loop.global_step]


def join_gloo(folder: Path) -> None:
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=RANK,
        world_size=RANKS,
        timeout=timedelta(seconds=10),
    )


def leave_gloo() -> None:
    import torch.distributed

    torch.distributed.destroy_process_group()


def join_jax(folder: Path) -> None:
    import jax

    address = f"127.0.0.1:{(folder / 'port').read_text()}"
    jax.distributed.initialize(address, num_processes=RANKS, process_id=RANK)


def leave_jax() -> None:
    import jax

    jax.distributed.shutdown()


def join_accelerate(_: Path) -> None:
    from accelerate import Accelerator

    LIBRARY.append(Accelerator(cpu=True).prepare)


def join_fabric(_: Path) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    fabric.launch()
    LIBRARY.append(fabric.setup_dataloaders)


def nothing(*_: object) -> None:
    """MPI begins when it is imported, and ends with the process."""


PRIMITIVES: dict[str, tuple[Callable[..., Any], Callable[[Path], None], Callable[[], None]]] = {
    "gloo": (sync.torch_distributed, join_gloo, leave_gloo),
    "accelerate": (sync.torch_distributed, join_accelerate, leave_gloo),
    "fabric": (sync.torch_distributed, join_fabric, leave_gloo),
    "mpi": (sync.mpi, nothing, nothing),
    "jax": (sync.jax_processes, join_jax, leave_jax),
}


@cache
def primitive(every: int) -> Any:
    return PRIMITIVES[sys.argv[2]][0](every=every)


def main() -> None:
    _, join, leave = PRIMITIVES[sys.argv[2]]
    join(Path(sys.argv[1]).resolve())
    if len(sys.argv) > 3:
        report(failing(sys.argv[3]))
        os._exit(0)  # the group is broken
    report({name: scenario() for name, scenario in SCENARIOS.items()})
    leave()


if __name__ == "__main__":
    main()
