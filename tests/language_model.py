"""A language model's loop, by hand and with dloop. Lines that do bookkeeping end in `# *`."""

from __future__ import annotations

import signal
from itertools import islice
from signal import SIGTERM
from threading import Event as Flag
from time import perf_counter

from dloop import Event, Loop, LoopEvents
from job import Job

TOKENS = 1024
"""Tokens in a batch."""


def learning_rate(step: int) -> float:
    """A rate that warms up and decays."""
    return 0.25 * min((step + 1) / 4, 4 / (step + 1))


def by_hand(
    job: Job, max_steps: int, micro_steps: int, log_every: int | None, eval_every: int | None
) -> None:
    """Steps of several batches; evaluation and checkpoint at 0, n, 2n and the end."""
    stopped = Flag()  # *
    signal.signal(SIGTERM, lambda *_: stopped.set())  # *
    first = job.load().get("step", 0)  # *
    logged = first  # *
    stream = islice(job.stream(), first * micro_steps, None)  # *
    began = perf_counter()  # *
    for step in range(first, max_steps):  # *
        batches = list(islice(stream, micro_steps))  # *
        last = stopped.is_set() or step == max_steps - 1  # *
        job.train(batches, learning_rate(step))
        if log_every and step % log_every == 0:  # *
            now = perf_counter()  # *
            job.act("log", step, (step + 1 - logged) / (now - began) * micro_steps * TOKENS)  # *
            logged = step + 1  # *
            began = now  # *
        if last or (eval_every and step % eval_every == 0):  # *
            paused = perf_counter()  # *
            job.evaluate(step)
            job.save(step=step + 1)
            began += perf_counter() - paused  # *
        if last:  # *
            break  # *


def with_dloop(
    job: Job, max_steps: int, micro_steps: int, log_every: int | None, eval_every: int | None
) -> None:
    """The same."""
    loop = Loop(  # *
        job.stream(),
        max_steps=max_steps,  # *
        batches_per_step=micro_steps,  # *
        start_step=job.load().get("step", 0),  # *
        signals=[SIGTERM],  # *
        events={
            "Log": Event(every_n_steps=log_every, first_at_step=0),  # *
            "Eval": Event(every_n_steps=eval_every, first_at_step=0) | LoopEvents.TRAINING_END,  # *
        },
    )
    for batches, events in loop:  # *
        job.train(batches, learning_rate(loop.global_step))
        if "Log" in events:  # *
            speed = loop.lap("Log").steps_per_second * micro_steps * TOKENS  # *
            job.act("log", loop.global_step, speed)
        if "Eval" in events:  # *
            with loop.pause_clock():  # *
                job.evaluate(loop.global_step)
                job.save(step=loop.steps_done)
