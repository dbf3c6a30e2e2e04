"""A DQN's loop, by hand and with dloop. Lines that do bookkeeping end in `# *`."""

from __future__ import annotations

import signal
from itertools import islice
from signal import SIGTERM
from threading import Event as Flag
from time import perf_counter

from dloop import Event, Loop, LoopEvents
from job import Job


def by_hand(
    job: Job,
    max_steps: int,
    learning_starts: int,
    train_every: int,
    target_every: int,
    log_every: int | None,
    eval_every: int | None,
) -> None:
    """A stream of environment steps, of which every few are learned from, after a while."""
    stopped = Flag()  # *
    signal.signal(SIGTERM, lambda *_: stopped.set())  # *
    first = logged = job.load().get("step", 0)  # *
    began = perf_counter()  # *
    for step, transition in enumerate(islice(job.stream(), max_steps - first), first + 1):  # *
        last = stopped.is_set() or step == max_steps  # *
        if step > learning_starts and step % train_every == 0:  # *
            job.train([transition])
        if step > learning_starts and step % target_every == 0:  # *
            job.act("update target", step)
        if log_every and step % log_every == 0:  # *
            now = perf_counter()  # *
            job.act("log", step, (step - logged) / (now - began))  # *
            logged, began = step, now  # *
        if last or (eval_every and step % eval_every == 0):  # *
            paused = perf_counter()  # *
            job.evaluate(step)
            job.save(step=step)
            began += perf_counter() - paused  # *
        if last:  # *
            break  # *


def with_dloop(
    job: Job,
    max_steps: int,
    learning_starts: int,
    train_every: int,
    target_every: int,
    log_every: int | None,
    eval_every: int | None,
) -> None:
    """The same."""
    loop = Loop(  # *
        job.stream(),
        max_steps=max_steps,  # *
        start_step=job.load().get("step", 0),  # *
        fast_forward=False,  # *
        signals=[SIGTERM],  # *
        events={
            "Train": Event(every_n_steps=train_every, from_step=learning_starts),  # *
            "UpdateTarget": Event(every_n_steps=target_every, from_step=learning_starts),  # *
            "Log": Event(every_n_steps=log_every),  # *
            "Eval": Event(every_n_steps=eval_every) | LoopEvents.TRAINING_END,  # *
        },
    )
    for transition, events in loop:  # *
        if "Train" in events:  # *
            job.train([transition])
        if "UpdateTarget" in events:  # *
            job.act("update target", loop.steps_done)
        if "Log" in events:  # *
            job.act("log", loop.steps_done, loop.lap("Log").steps_per_second)  # *
        if "Eval" in events:  # *
            with loop.pause_clock():  # *
                job.evaluate(loop.steps_done)
                job.save(step=loop.steps_done)
