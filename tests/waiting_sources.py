"""Sources for the cells of a notebook: they wait at one sample until they are interrupted.

Importing this needs PyTorch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from loaders import SAMPLES
from torch_data import Shuffled, Stream

# PyTorch looks every five seconds whether its workers have ended, which would be slow here.
_MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)


class Place:
    """A place where a program waits for an interrupt: now, or once after it was asked to.

    Files in `folder` tell what happens, since workers come here too:

    - armed: whoever comes here next has to wait.
    - reached: one is here.
    - waiting: the kernel's process waits, here or for the worker that is here.
    - left: the test has seen the interrupt. A worker that is still here goes on.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.process = os.getpid()

    def arm(self, batches: list[Any], count: int) -> None:
        """Let the next that comes here wait, which it does after so many of the `batches`."""
        (self.folder / "armed").touch()
        arguments = batches, count
        threading.Thread(target=self._watch_for_workers, args=arguments, daemon=True).start()

    def _watch_for_workers(self, batches: list[Any], count: int) -> None:
        while not (self.folder / "waiting").exists():
            time.sleep(0.005)
            is_reached = (self.folder / "reached").exists() and len(batches) == count
            if is_reached and is_the_main_thread_in("_try_get_data"):
                (self.folder / "waiting").touch()

    def wait_if_armed(self) -> None:
        try:
            (self.folder / "armed").rename(self.folder / "reached")
        except FileNotFoundError:
            return
        self.wait()

    def wait(self) -> None:
        if os.getpid() == self.process:
            (self.folder / "waiting").touch()
        end = time.monotonic() + 60
        while not (self.folder / "left").exists():
            assert time.monotonic() < end, "no interrupt came"
            time.sleep(0.01)


def is_the_main_thread_in(function: str) -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


class Numbers(Dataset[int]):
    """A map-style data set that waits, when asked to, as the sample `at` is read.

    Where that is None, as a process reads its fifth sample. Up to two workers do so, with batches
    of two, once the first batch was handed over.
    """

    def __init__(self, place: Place, at: int | None) -> None:
        self.place = place
        self.at = at
        self.read = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        self.read += 1
        if index == self.at or (self.at is None and self.read == 5):
            self.place.wait_if_armed()
        return index


class WaitingStream(Stream):
    """An iterable-style data set that does the same."""

    def __init__(self, place: Place, at: int) -> None:
        super().__init__(SAMPLES)
        self.numbers = Numbers(place, at)

    def __iter__(self) -> Iterator[int]:
        return (self.numbers[number] for number in self.share())


def numbers(place: Place, at: int) -> Iterator[list[int]]:
    """A generator of batches that does the same."""
    for number in range(0, SAMPLES, 2):
        if at in (number, number + 1):
            place.wait_if_armed()
        yield [number, number + 1]


def end_workers(within: float = 0) -> None:
    """Let all workers end by themselves for so many seconds, and then at once.

    PyTorch does not hear of it; it raises of a worker that ends, wherever the program is then.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.join(within)
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def plain_for(source: Any) -> list[list[int]]:
    """The batches of two epochs without a Loop."""
    batches = []
    for epoch in range(2):
        sampler = getattr(source, "sampler", None)
        if isinstance(sampler, Shuffled):
            sampler.set_epoch(epoch)
        epoch_batches: Any = source() if callable(source) else source
        batches += [plain(batch) for batch in epoch_batches]
    return batches


def plain(batch: Any) -> Any:
    return batch if isinstance(batch, list) else batch.tolist()
