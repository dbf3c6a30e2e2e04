"""A DQN's loop, by hand and with dloop. Lines that do bookkeeping end in `# *`."""

from __future__ import annotations

import signal
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
    environment = job.stream()
    first = job.load().get("step", 0)  # *
    logged = first  # *
    began = perf_counter()  # *
    for step in range(first, max_steps):  # *
        last = stopped.is_set() or step == max_steps - 1  # *
        transition = next(environment)
        if step >= learning_starts:  # *
            if (step + 1) % train_every == 0:  # *
                job.train([transition])
            if (step + 1) % target_every == 0:  # *
                job.act("update target", step)
        if log_every and (step + 1) % log_every == 0:  # *
            now = perf_counter()  # *
            job.act("log", step, (step + 1 - logged) / (now - began))  # *
            logged = step + 1  # *
            began = now  # *
        if last or (eval_every and (step + 1) % eval_every == 0):  # *
            paused = perf_counter()  # *
            job.evaluate(step)
            job.save(step=step + 1)
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
    environment = job.stream()
    first = job.load().get("step", 0)  # *
    events = {
        "Train": Event(every_n_steps=train_every, from_step=learning_starts),  # *
        "UpdateTarget": Event(every_n_steps=target_every, from_step=learning_starts),  # *
        "Log": Event(every_n_steps=log_every),  # *
        "Eval": Event(every_n_steps=eval_every) | LoopEvents.TRAINING_END,  # *
    }
    loop = Loop(range(max_steps), events, max_epochs=1, start_step=first, signals=[SIGTERM])  # *
    for step, events_due in loop:  # *
        transition = next(environment)
        if "Train" in events_due:  # *
            job.train([transition])
        if "UpdateTarget" in events_due:  # *
            job.act("update target", step)
        if "Log" in events_due:  # *
            job.act("log", step, loop.lap("Log").steps_per_second)  # *
        if "Eval" in events_due:  # *
            with loop.pause_clock():  # *
                job.evaluate(step)
                job.save(step=step + 1)
