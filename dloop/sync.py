"""Processes that agree on time, stops, conditions and triggers, so that all do the same.

At every n-th step each process sends what it has. All read the maximum n steps later, so the answer
is the same in all, and an exchange in the background keeps nobody waiting.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from signal import Signals
from time import time_ns
from typing import Any
from zlib import crc32

from . import checks
from .errors import NEVER, LoopError, not_stop, warn
from .events import Event, LoopEvents, Member
from .schedule import Schedule, key_of
from .state import Position

_LIMITS = ("max_steps", "max_epochs", "max_seconds")
_SUBJECTS = ("begin", "epoch", "step")
"""What an exchange can be about; processes that disagree have made different calls."""


Exchange = Callable[[list[int]], Callable[[], Sequence[int]]]
"""Begins to take the element-wise maximum over all processes; returns what waits for it."""


class Sync:
    """What the argument `sync` takes.

    Attributes:
        exchange: takes the maximum over all processes.
        every: how many steps lie between two agreements.
        ahead: how many batches each process fetches ahead where lengths are not known, so that an
            end is exchanged before its step.
    """

    def __init__(self, exchange: Exchange, every: int) -> None:
        self.exchange = exchange
        self.every = checks.count("every", every)
        self.ahead = 2 * self.every + 1


class Agreement:
    """What the processes of one run agree on.

    Args:
        sync: the exchange and its period.
        schedule: the events and limits.
        position: where the run begins.

    Attributes:
        every: how many steps lie between two agreements.
        now: the training time of all processes, as last read; `launch_now`: the time of the launch.
        stop_code: the greatest reason to stop of this process, as a number; 0 for none.
        amendments: a number for all changes that bodies made to their steps.
        wall_time: the greatest Unix time of all processes at the start, in nanoseconds.
        end: the last step of the open epoch, as far as any process knows it.
    """

    def __init__(self, sync: Sync, schedule: Schedule, position: Position) -> None:
        self.every = sync.every
        self._exchange = sync.exchange
        self._schedule = schedule
        self.now = position.elapsed
        self.launch_now = 0
        self.stop_code = 0
        self.amendments = 0
        self.wall_time = 0
        self._wanted = 0  # bits of conditions and triggers since the latest agreement
        self._kept_at = -1  # the step whose conditions were added last
        self._compared = False
        self._under_way: dict[str, Callable[[], Sequence[int]]] = {}  # what waits, by subject
        self._sizes: dict[str, int] = {}
        self._begun_at = self._read_at = -1
        self._answer: tuple[int, str | None] = 0, None
        self.end = self._told_end = NEVER  # as agreed on, and as this process has told the others
        self._epoch = self._begun_in = -1  # the epoch of that end, and of the exchange under way

    # Before the first step

    def compare(self, position: Position, is_over: bool) -> None:
        """Compare what all processes have.

        Args:
            position: where the run begins.
            is_over: whether it is finished.

        Raises:
            LoopError: their steps, limits or events differ.
        """
        if self._compared:
            return
        limit = self._schedule.limit or ("stop_when", 0)
        own = {
            "global_step": position.steps,
            "epoch": position.epoch,
            "step within the epoch": position.epoch_steps,
            "kind of limit": (*_LIMITS, "stop_when").index(limit[0]),
            "limit": limit[1] if isinstance(limit[1], int) else round(limit[1] * 10**6),
            "fraction as a limit": int(isinstance(limit[1], Fraction)),
            "every": self.every,
            "finished run": int(is_over),
            "events": _digest(self._schedule),
        }
        values = [value for each in own.values() for value in (each, -each)]
        *most, self.now, self.wall_time = self._at_once("begin", [*values, self.now, time_ns()])
        self._compared = True
        differing = [
            f"{name} ({-low} to {high})" if name in ("global_step", "limit", "every") else name
            for name, high, low in zip(own, most[::2], most[1::2])
            if high != -low
        ]
        if differing:
            raise LoopError(
                f"sync: the processes differ in {', '.join(differing)}; compute a value such as a "
                "deadline on one rank and share it; to act on rank 0, check the rank in the body"
            )

    def open_epoch(self, epoch: int, end: int, step: int) -> int:
        """Return the earliest end of an epoch that any process knows. It waits for them.

        Each process looks as far ahead as two exchanges, so all learn of a later end in time.

        Args:
            epoch: the epoch that is opened, or opened again.
            end: its last step as far as this process knows it, or NEVER.
            step: the latest step.

        Raises:
            LoopError: an error of the dataloader has hidden the end until it was too late.
        """
        if epoch != self._epoch:
            less_end, *_ = self._at_once("epoch", [-end])
            self._epoch, self.end, self._told_end = epoch, -less_end, end
        next_read = step + 2 * self.every - (step + 1) % self.every
        if end < min(self.end, self._told_end, next_read):
            raise LoopError(
                f"sync: epoch {epoch} ends at step {end}, which the other processes cannot know in "
                "time, since an error of the dataloader has hidden it"
            )
        return min(self.end, end)

    # Each step that has a say

    def read(self, step: int, is_last: bool) -> tuple[int, str | None, bool]:
        """Read the exchange under way, if `step` is an agreement or the last step.

        Returns the bits that fire, the reason to stop, and whether the times have changed.

        Raises:
            LoopError: the processes have counted differently, or ended epochs differently.
        """
        if step == self._read_at:  # the step is made again
            return (*self._answer, True)
        if not (is_last or (step + 1) % self.every == 0):
            return 0, None, False
        if "step" not in self._under_way or step == self._begun_at:
            return 0, None, False
        numbers = self._wait("step")
        now, launch_now, stop_code, less_end = numbers[:4]
        counted, less_counted, amended, less_amended = numbers[4:8]
        if counted != -less_counted or amended != -less_amended:
            raise _other_calls()
        flags = numbers[8:]
        bits = sum([1 << place for place, flag in enumerate(flags) if flag])
        stop = None
        if stop_code:
            stop = "stop" if stop_code == 1 else Signals(stop_code - 1).name
            bits |= self._schedule.bits_with(LoopEvents.INTERRUPT) if stop_code > 1 else 0
        if self._begun_in == self._epoch:
            self.end = min(self.end, -less_end)
        now, launch_now = max(self.now, now), max(self.launch_now, launch_now)
        self._answer, self._read_at, self.now, self.launch_now = (bits, stop), step, now, launch_now
        del self._under_way["step"]
        return bits, stop, True

    def keep(self, step: int, bits: int) -> None:
        """Keep the bits of conditions that were true at `step` for the next exchange."""
        if step != self._kept_at:
            self._kept_at = step
            self._wanted |= bits

    def amend(self, *change: object) -> None:
        """Note a change that a body made to its step: where, and what."""
        self.amendments = crc32(repr((self.amendments, *change)).encode())

    def begin(
        self,
        step: int,
        requests: list[tuple[int, str | None]],
        clock: Any,
        counters: Mapping[str, Any],
        epoch_last: int,
    ) -> None:
        """Begin an exchange at an agreement; keep the requests until then.

        Args:
            step: the step that is made.
            requests: what was requested since the step before.
            clock: the run's.
            counters: what was counted until then.
            epoch_last: the last step of the epoch, as far as this process knows it.
        """
        for bits, reason in requests:
            if reason is None:
                self._wanted |= bits
            else:
                code = 1 if reason == "stop" else 1 + Signals[reason]
                self.stop_code = max(self.stop_code, code)
        if (step + 1) % self.every or self._begun_at == step:
            return
        launch_now = clock.tick() - clock.launched
        totals = sorted([(name, counter.total) for name, counter in counters.items()])
        counted, amended = crc32(repr(totals).encode()), self.amendments
        flags = [self._wanted >> place & 1 for place in range(self._schedule.places)]
        self._told_end = min(self._told_end, epoch_last)
        own = [clock.now(), launch_now, self.stop_code, -epoch_last]
        self._start("step", [*own, counted, -counted, amended, -amended, *flags])
        self._begun_at, self._begun_in, self._wanted = step, self._epoch, 0

    def discard(self) -> None:
        """Finish an exchange that is under way, and drop its answer."""
        for about in list(self._under_way):
            self._wait(about)
        self._under_way.clear()

    def _at_once(self, about: str, values: list[int]) -> list[int]:
        if about not in self._under_way:  # else an interrupt came while it was waited for
            self._start(about, values)
        numbers = self._wait(about)
        del self._under_way[about]
        return numbers

    def _start(self, about: str, values: list[int]) -> None:
        subject = _SUBJECTS.index(about)
        # Those of epochs and steps have one size, so that none waits for another in vain
        room = 0 if about == "begin" else self._schedule.places + 8 - len(values)
        sent = [subject, -subject, *values, *[0] * room]
        self._sizes[about] = len(sent)
        self._under_way[about] = self._exchange(sent)

    def _wait(self, about: str) -> list[int]:
        try:
            result = self._under_way[about]()
        except Exception:
            del self._under_way[about]  # nobody can finish it now
            raise
        try:
            numbers = [int(value) for value in result]
        except TypeError:
            numbers = []
        if len(numbers) != self._sizes[about]:
            raise TypeError(
                f"sync: the exchange returned {checks.shown(result)}; return the maximum of "
                f"each of the {self._sizes[about]} ints over all processes, as a list"
            )
        if numbers[0] != -numbers[1]:
            del self._under_way[about]
            raise _other_calls()
        return numbers[2:]


def _other_calls() -> LoopError:
    return LoopError(
        "sync: the processes differ in their calls of count(), finish() or finish_epoch(); make "
        "the same calls in all, and count the sum over all"
    )


def _digest(schedule: Schedule) -> int:
    """Return a number for all names and Events, the same in all processes that have the same."""
    described = [(key_of(name), _described(event)) for name, event in schedule.events.items()]
    stop_when = schedule.stop_when and _described(schedule.stop_when)
    return crc32(repr((described, stop_when)).encode())


def _described(event: Event) -> list[object]:
    """Return what an Event consists of; of a condition only that there is one."""
    return [
        repr(part)
        if isinstance(part, Member)
        else {**part.given(), "condition_function": part.condition_function is not None}
        for part in event.parts
    ]


# Exchanges


def maximum(function: Callable[[list[int]], Sequence[int]], *, every: int) -> Sync:
    """Let processes agree by any function that takes a maximum over all of them.

    Args:
        function: takes a list of ints and returns the element-wise maximum over all processes.
        every: how many steps lie between two agreements.

    Example:
        >>> import dloop
        >>> alone = dloop.sync.maximum(lambda values: values, every=10)
        >>> len([batch for batch, events in dloop.Loop(range(5), max_epochs=1, sync=alone)])
        5
    """
    if not callable(function):
        raise TypeError(f"function={checks.shown(function)}: pass a callable")
    return Sync(_at_once(function), every)


def _at_once(function: Callable[[list[int]], Sequence[int]]) -> Exchange:
    """Return an exchange that is made by a function, while the process waits."""

    def start(values: list[int]) -> Callable[[], Sequence[int]]:
        try:
            result = function(values)
        except StopIteration as exception:  # it would end the loop silently
            raise not_stop(exception) from exception
        return lambda: result

    return start


def torch_distributed(*, every: int, group: Any = None) -> Sync:
    """Let the processes of `torch.distributed` agree, by an all-reduce beside the training.

    All processes have to call this. It never waits for a GPU: without a gloo backend, it makes a
    gloo group beside the default one. (It was tried with gloo alone, on machines without a GPU.)

    Args:
        every: how many steps lie between two agreements. Twice as many have to fit into the time
            between a signal and the end.
        group: a process group with a gloo backend; by default all processes.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: `torch.distributed.init_process_group` was not called.
        ValueError: `group` has no gloo backend.

    Example:
        loop = Loop(dataloader, max_steps=10_000, signals=SIGTERM,
                    sync=dloop.sync.torch_distributed(every=50))
    """
    distributed = _imported(
        "torch.distributed", "torch_distributed() needs PyTorch: pip install torch"
    )
    if not distributed.is_initialized():
        raise RuntimeError(
            "dloop.sync.torch_distributed(): call torch.distributed.init_process_group() before"
        )
    if group is None:
        default = distributed.group.WORLD
        group = default if _has_gloo(distributed, default) else _gloo_beside(default)
    if not _has_gloo(distributed, group):
        backend = distributed.get_backend(group)
        raise ValueError(f"group: its backend is {backend}; pass one that has gloo")

    def start(values: list[int]) -> Callable[[], Sequence[int]]:
        torch: Any = import_module("torch")
        tensor = torch.tensor(values, dtype=torch.int64)
        work = distributed.all_reduce(
            tensor, op=distributed.ReduceOp.MAX, group=group, async_op=True
        )

        def finish() -> Sequence[int]:
            work.wait()
            return tensor.tolist()  # type: ignore[no-any-return]

        return finish

    return Sync(start, every)


@lru_cache(maxsize=1)
def _gloo_beside(default: Any) -> Any:
    """Return a gloo group beside the default one, the same at each call."""
    return import_module("torch.distributed").new_group(backend="gloo")


def _has_gloo(distributed: Any, group: Any) -> bool:
    # It is "cpu:gloo,cuda:nccl" if the group was made without the name of a backend
    return "gloo" in str(distributed.get_backend_config(group))


def mpi(*, every: int, comm: Any = None) -> Sync:
    """Let the processes of MPI agree, by mpi4py's `Iallreduce`, which runs beside the training.

    All processes have to call this. Use `with loop:` or `loop.close()`, so that no exchange is
    under way when MPI ends.

    Args:
        every: how many steps lie between two agreements.
        comm: an mpi4py communicator, by default `MPI.COMM_WORLD`; a duplicate of it is used.

    Raises:
        ImportError: mpi4py is not installed.

    Example:
        with Loop(data, max_steps=10_000, sync=dloop.sync.mpi(every=50)) as loop:
            ...
    """
    package = _imported("mpi4py.MPI", "mpi() needs mpi4py: pip install mpi4py")
    own = (package.COMM_WORLD if comm is None else comm).Dup()

    def start(values: list[int]) -> Callable[[], Sequence[int]]:
        sent, received = array("q", values), array("q", values)
        request = own.Iallreduce(
            [sent, package.INT64_T], [received, package.INT64_T], op=package.MAX
        )

        def finish(_: object = sent) -> Sequence[int]:  # which MPI reads until then
            request.Wait()
            return list(received)

        return finish

    return Sync(start, every)


def jax_processes(*, every: int) -> Sync:
    """Let the processes of `jax.distributed` agree, by `jax.experimental.multihost_utils`.

    It waits for all processes at each exchange, so `every` should not be small.

    Args:
        every: how many steps lie between two agreements.

    Raises:
        ImportError: JAX is not installed.

    Example:
        loop = Loop(data, max_steps=10_000, sync=dloop.sync.jax_processes(every=500))
    """
    multihost_utils = _imported(
        "jax.experimental.multihost_utils", "jax_processes() needs JAX: pip install jax"
    )

    def gathered_maximum(values: list[int]) -> list[int]:
        numpy: Any = import_module("numpy")  # JAX needs it
        halves = numpy.array(values, numpy.int64).view(numpy.int32)  # JAX has no int64 by default
        gathered = numpy.ascontiguousarray(multihost_utils.process_allgather(halves))
        found: list[int] = gathered.reshape(-1, halves.size).view(numpy.int64).max(0).tolist()
        return found

    return Sync(_at_once(gathered_maximum), every)


def _imported(name: str, what_to_do: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"dloop.sync.{what_to_do}") from error


# Without sync


def rank_among_several() -> int | None:
    """Return the rank of this process if it looks like one of several. It imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() if distributed.get_world_size() > 1 else None
    jax = sys.modules.get("jax")
    # Older versions do not say, and a call for their processes would start their backends
    is_initialized = getattr(getattr(jax, "distributed", None), "is_initialized", None)
    if jax is not None and is_initialized is not None and is_initialized():
        return jax.process_index() if jax.process_count() > 1 else None
    for size, rank in (
        ("WORLD_SIZE", "RANK"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ):
        if _number(size) > 1:
            return _number(rank)
    return None


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def warn_if_distributed(schedule: Schedule, has_signals: bool) -> None:
    """Warn on rank 0 if there are other processes, which may decide differently."""
    if not (schedule.timed or schedule.conditions or schedule.stop_conditions or has_signals):
        return
    if rank_among_several() != 0:
        return
    events = {**schedule.events, "stop_when": schedule.stop_when or Event()}
    differ = ("condition_function", "every_n_seconds", "at_time", "at_timestamp")
    found = [
        checks.shown(name)
        for name, event in events.items()
        if any(getattr(part, each) is not None for part in event.parts for each in differ)
    ]
    found += ["max_seconds"] if schedule.max_time < NEVER else []
    found += ["signals"] if has_signals else []
    warn(
        f"this process is one of several, which may differ in {', '.join(found)}; pass sync=, or "
        "sync=False if that is intended"
    )
