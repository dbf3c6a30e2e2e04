"""An image classifier's loop, by hand and with dloop. Lines that do bookkeeping end in `# *`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from time import perf_counter

from dloop import Event, Loop, LoopEvents
from job import Job

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


class Loader(Sequence[float]):
    """As many batches in each epoch, in another order."""

    def __init__(self, job: Job, length: int) -> None:
        self._job = job
        self._length = length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> float:  # type: ignore[override]
        if place >= self._length:
            raise IndexError(place)
        return self._job.fetch(self._epoch * 1000 + place)


def by_hand(
    job: Job,
    loader: Loader,
    max_epochs: int,
    accumulate: int,
    log_every: int | None,
    save_every: int | None,
    save_seconds: float | None,
    eval_every: int | None,
) -> None:
    """Updates by several batches; validation by epochs; checkpoints by updates and by time."""
    first, place, step = job.load().get("progress", (0, 0, 0))  # *
    logged = step  # *
    began = perf_counter()  # *
    saved = perf_counter()  # *
    for epoch in range(first, max_epochs):  # *
        loader.set_epoch(epoch)  # *
        batches = (loader[i] for i in range(place, len(loader)))  # *
        while window := list(islice(batches, accumulate)):  # *
            job.train(window)
            step += 1  # *
            place += len(window)  # *
            epoch_end = place == len(loader)  # *
            if log_every and step % log_every == 0:  # *
                now = perf_counter()  # *
                job.act("log", epoch, step, (step - logged) / (now - began))  # *
                logged = step  # *
                began = now  # *
            is_last = epoch + 1 == max_epochs  # *
            if epoch_end and (is_last or (eval_every and (epoch + 1) % eval_every == 0)):  # *
                paused = perf_counter()  # *
                job.evaluate(epoch)
                began += perf_counter() - paused  # *
            if (
                epoch_end  # *
                or (save_every and step % save_every == 0)  # *
                or (save_seconds and perf_counter() - saved >= save_seconds)  # *
            ):
                job.save(progress=(epoch + epoch_end, place % len(loader), step))  # *
                saved = perf_counter()  # *
        place = 0  # *


def with_dloop(
    job: Job,
    loader: Loader,
    max_epochs: int,
    accumulate: int,
    log_every: int | None,
    save_every: int | None,
    save_seconds: float | None,
    eval_every: int | None,
) -> None:
    """The same."""
    loop = Loop(  # *
        loader,
        max_epochs=max_epochs,  # *
        batches_per_step=accumulate,  # *
        events={
            "Log": Event(every_n_steps=log_every),  # *
            "Eval": Event(every_n_epochs=eval_every) | TRAINING_END,  # *
            "Save": Event(every_n_steps=save_every, every_n_seconds=save_seconds) | EPOCH_END,  # *
        },
    )
    if checkpoint := job.load():  # *
        loop.load_state_dict(checkpoint["loop"])  # *
    for window, events in loop:  # *
        job.train(window)
        if "Log" in events:  # *
            speed = loop.lap("Log").steps_per_second  # *
            job.act("log", loop.epoch, loop.steps_done, speed)
        if "Eval" in events:  # *
            with loop.pause_clock():  # *
                job.evaluate(loop.epoch)
        if "Save" in events:  # *
            job.save(loop=loop.state_dict())  # *
