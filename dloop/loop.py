"""Loop: its arguments and its life cycle."""

from __future__ import annotations

import sys
from functools import partial
from types import GenericAlias

from . import _backend, checks
from .schedule import NEVER, Schedule
from .source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet
    from types import TracebackType
    from typing import Any, Generic, SupportsFloat, SupportsIndex, TypeVar

    from ._core import LoopState
    from .events import BaseEvent

    Batch = TypeVar("Batch")
    Self = TypeVar("Self", bound="Loop[Any]")
else:
    # typing would take longer to import than all of dloop
    Batch = None

    class Generic:
        """Stands in for typing.Generic."""

        __class_getitem__ = classmethod(GenericAlias)


class Loop(Generic[Batch]):
    """A run over the batches of a dataloader, each handed over with the events that are due.

    A Loop is one run. Leaving the `for` and entering it again goes on with the next batch;
    `restart()` begins a new run.

    Args:
        dataloader: any iterable, gone through once per epoch, or a callable without arguments that
            returns a fresh one for each epoch.
        events: a mapping of names (anything hashable) to Events.
        max_epochs: ends the run after this many epochs.
        max_steps: ends the run after this many steps.
        max_seconds: ends the run at the first step at which this much training time has passed.
            Exactly one of the three is to be given.
        stop_when: an Event that ends the run early, at the step on which it fires.
        dataloader_len: batches per epoch; an epoch is cut there. Without it, `len()` counts.
        lookahead: True looks one batch ahead at every step, to know an epoch's last batch from the
            data alone; False never fetches a batch before it is asked for; None, the default, looks
            ahead where no length is known, and at the last batch that `len()` promises.
        clock: a callable that returns seconds, in place of the real clock.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or arguments contradict each other.

    Iterating yields pairs of a batch and the set of the events that are due at its step. It raises
    what the dataloader, a condition or the clock raises, `DataLengthError` when an epoch is shorter
    than its length, `DataExhaustedError` when it is empty, and `LoopError` when the run is over.

    Example:
        >>> from dloop import Event, Loop, LoopEvents
        >>> loop = Loop(["a", "b", "c"], max_epochs=2, events={"Log": Event(every_n_steps=2)})
        >>> for batch, events in loop:
        ...     if "Log" in events:
        ...         print("log at", loop.global_step)
        ...     if LoopEvents.EPOCH_END in events:
        ...         print("epoch", loop.epoch, "ends with", batch)
        log at 1
        epoch 0 ends with c
        log at 3
        log at 5
        epoch 1 ends with c
    """

    def __init__(
        self,
        dataloader: Iterable[Batch] | Callable[[], Iterable[Batch]],
        events: Mapping[Any, BaseEvent] | None = None,
        *,
        max_epochs: SupportsIndex | None = None,
        max_steps: SupportsIndex | None = None,
        max_seconds: SupportsFloat | None = None,
        stop_when: BaseEvent | None = None,
        dataloader_len: SupportsIndex | None = None,
        lookahead: bool | None = None,
        clock: Callable[[], SupportsFloat] | None = None,
    ) -> None:
        if clock is not None and not callable(clock):
            raise TypeError(f"clock={checks.shown(clock)}: pass a callable that returns seconds")
        self._clock = clock
        self._schedule = Schedule(events, stop_when, max_epochs, max_steps, max_seconds)
        limit = self._schedule.max_epochs
        self._open_source = partial(
            Source, dataloader, dataloader_len, lookahead, None if limit == NEVER else limit
        )
        self._begin()

    def _begin(self) -> None:
        self._source = self._open_source()
        tick = None if self._clock is None else checks.in_nanoseconds(self._clock)
        self._core = _backend.core.Core(self._schedule, self._source, _backend.core.Clock(tick, 0))

    def __iter__(self) -> Iterator[tuple[Batch, AbstractSet[Hashable]]]:
        """An iterator on the run, from its next batch on, in place of any older one.

        Raises:
            LoopError: the run is over.
        """
        return self._core.steps()

    def chunks(
        self, sizes: SupportsIndex | Iterable[SupportsIndex]
    ) -> Iterator[tuple[list[Batch], AbstractSet[Hashable]]]:
        """An iterator over lists of consecutive batches, for bodies that take many steps at once.

        It goes on with the same run as `iter(loop)`. Only at the last batch of a list is anything
        ever due: a list ends where an event comes. Step and epoch criteria fire at the same steps
        as they do without lists. Conditions are called for each batch, as the list is gathered.
        The clock is read once per list, at its last batch, and timers are judged there. An error
        of the dataloader comes after what was gathered before it. Until then `loop.state` and the
        counters are those of the list before.

        Args:
            sizes: the greatest length of a list, in batches; or a collection of lengths, with 1
                among them: every list then has one of these, the greatest that fits, so that a
                function that is compiled for each length is compiled only so often.

        Raises:
            LoopError: the run is over.
            TypeError: `sizes` is of the wrong kind.
            ValueError: a size is below 1, or 1 is not among them.

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(10), {"Log": Event(every_n_steps=6)}, max_epochs=1)
            >>> for batches, events in loop.chunks((4, 2, 1)):
            ...     print(batches, "Log" in events)
            [0, 1, 2, 3] False
            [4, 5] True
            [6, 7, 8, 9] False
        """
        return self._core.lists(checks.sizes("sizes", sizes))

    def steps_to_next_event(self) -> int | None:
        """The number of steps up to and including the next for which an event is scheduled.

        Scheduled are the criteria that count steps, the end of an epoch of known length, and
        `max_steps`; not timers, conditions and what ends by surprise. None if there is none.

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(10), {"Log": Event(every_n_steps=6)}, max_epochs=1)
            >>> loop.steps_to_next_event()
            6
            >>> [loop.steps_to_next_event() for batch, events in loop]
            [5, 4, 3, 2, 1, 4, 3, 2, 1, None]
        """
        epoch_len = self._source.epoch_len()
        return self._core.steps_to_next_event(NEVER if epoch_len is None else epoch_len)

    def __len__(self) -> int:
        """The number of batches still to come.

        Raises:
            TypeError: it is not known.
        """
        core = self._core
        if core.closed or core.stop_reason is not None:
            return 0
        left: int | None = None
        epoch_len = self._source.epoch_len()
        in_epoch = core.step - core.epoch_start + 1
        if self._schedule.max_steps < NEVER:
            left = self._schedule.max_steps - core.step - 1
        elif self._schedule.max_epochs < NEVER and epoch_len is not None and in_epoch <= epoch_len:
            left = (self._schedule.max_epochs - core.epoch) * epoch_len - in_epoch
        if left is None or left > sys.maxsize:
            raise TypeError("the number of batches to come is not known")
        return left

    def __bool__(self) -> bool:
        return True

    @property
    def state(self) -> LoopState:
        """The `LoopState` of the latest step; before the first its counters are 0, -1 and -1."""
        return self._core.state

    @property
    def epoch(self) -> int:
        """The epoch of the latest step, from 0."""
        return self._core.epoch

    @property
    def global_step(self) -> int:
        """The latest step, from 0, counted across epochs; -1 before the first."""
        return self._core.step

    @property
    def epoch_step(self) -> int:
        """The latest step, from 0, counted within its epoch; -1 before the first."""
        return self._core.step - self._core.epoch_start

    @property
    def stop_reason(self) -> str | None:
        """Why the run ended; None as long as its last batch was not handed over.

        The first of these that applies: "exception", "stop_when", "max_steps", "max_epochs",
        "max_seconds", "exhausted" (a dataloader that can be gone through once ran dry).

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(9), max_steps=5, stop_when=Event(at_step=2))
            >>> [(batch, loop.stop_reason) for batch, events in loop]
            [(0, None), (1, None), (2, 'stop_when')]
        """
        return self._core.stop_reason

    def restart(self) -> None:
        """Begin a new run with the same arguments. Iterators on the old one raise LoopError.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop([1, 2], max_epochs=1)
            >>> [batch for batch, events in loop]
            [1, 2]
            >>> loop.restart()
            >>> [batch for batch, events in loop]
            [1, 2]
        """
        self._core.leave()
        self._source.close()
        self._begin()

    def close(self) -> None:
        """End the run, and close the dataloader's iterator (and so its workers).

        Entering the loop afterwards raises LoopError. `with loop:` does this when it is left. An
        iterator that was itself passed as the dataloader is not closed.

        Example:
            >>> from dloop import Loop
            >>> with Loop([1, 2, 3], max_epochs=1) as loop:
            ...     for batch, events in loop:
            ...         break
            >>> len(loop)
            0
        """
        self._core.close()
        self._source.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
