"""What agreement costs: the time per step of two processes with a body of one millisecond.

    python -m benchmarks.agreement

It needs PyTorch. All ways take turns, with as many steps each; medians over the rounds are printed,
as the slower of the two processes has them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import dloop
from dloop import Event, Loop, sync

RANKS = 2
STEPS = 500
BODY = 0.001
"""Seconds."""


def body() -> None:
    """Work for a millisecond."""
    end = perf_counter() + BODY
    while perf_counter() < end:
        pass


def with_dloop(exchange: Any, every: int) -> None:
    """A loop that agrees about a timer, or does not."""
    agreement: Any = False
    if exchange is not None:
        at_once = callable(exchange)
        agreement = sync.maximum(exchange, every=every) if at_once else sync.Sync(exchange, every)
    events = {"Save": Event(every_n_seconds=3600)}
    for _ in Loop(range(STEPS), events, max_epochs=1, sync=agreement):
        body()


def by_hand(exchange: Any) -> None:
    """A loop whose processes tell each other at every step whether to stop."""
    for _ in range(STEPS):
        exchange.start([0])
        if exchange.finish()[0]:
            break
        body()


def seconds_per_step(run: Callable[[], None], barrier: Callable[[], object]) -> float:
    """The time that `run` takes, in which both processes are done."""
    barrier()
    began = perf_counter()
    run()
    barrier()
    return (perf_counter() - began) / STEPS


def measure(rounds: int) -> None:
    """What each of the processes does; the first prints the table."""
    distributed: Any = importlib.import_module("torch.distributed")
    distributed.init_process_group(
        "gloo",
        init_method=os.environ["RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=RANKS,
    )
    ahead = sync.torch_distributed(every=1).exchange

    def at_once(values: list[int]) -> list[int]:
        return list(ahead(values)())

    ways: dict[str, Callable[[], None]] = {
        "no agreement": partial(with_dloop, None, 0),
        "begun ahead, every 50 steps": partial(with_dloop, ahead, 50),
        "at once, every 50 steps": partial(with_dloop, at_once, 50),
        "begun ahead, every step": partial(with_dloop, ahead, 1),
        "at once, every step": partial(with_dloop, at_once, 1),
        "an all-reduce in every step by hand": partial(by_hand, ahead),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            found[name].append(seconds_per_step(run, distributed.barrier))
    if distributed.get_rank() == 0:
        print(
            f"dloop {dloop.__version__}, {dloop.BACKEND} core; Python {platform.python_version()}; "
            f"{os.cpu_count()} cores; {RANKS} processes by gloo; a body of {BODY * 1000:.0f} ms"
        )
        least = median(found["no agreement"])
        for name, seconds in found.items():
            middle = median(seconds)
            print(f"{name:38} {middle * 1000:6.3f} ms a step  {100 * middle / least - 100:+6.1f} %")
    distributed.destroy_process_group()


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each way has its turn")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        measure(asked.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        shared = {"RENDEZVOUS": f"file://{folder}/rendezvous", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.agreement", "--rounds", str(asked.rounds)]
        processes = [
            subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)})
            for rank in range(RANKS)
        ]
        failed = [process for process in processes if process.wait()]
    if failed:
        sys.exit("a process failed")


if __name__ == "__main__":
    main()
