"""Loop: its arguments and its life cycle."""

from __future__ import annotations

import sys
from collections import namedtuple
from functools import partial
from os import PathLike
from types import GenericAlias

from . import _backend, checks, errors
from .errors import LoopError, StateError, warn
from .events import LoopEvents
from .run import Run
from .schedule import NEVER, Schedule
from .source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from types import TracebackType
    from typing import (
        Any,
        Generic,
        Literal,
        NamedTuple,
        SupportsFloat,
        SupportsIndex,
        TypeVar,
        overload,
    )

    from ._core import LoopState, Sizes
    from .agreement import Agreement, Exchange
    from .events import BaseEvent
    from .plan import Plan
    from .profile import Profile
    from .progress import Progress
    from .signals import StopSignals
    from .state import Position

    Batch = TypeVar("Batch")
    Item = TypeVar("Item")
    Self = TypeVar("Self", bound="Loop[Any]")

    class LapFields(NamedTuple):
        """The fields of a Lap."""

        steps: int
        seconds: float
else:
    # typing would take longer to import than all of dloop
    Batch = None
    LapFields = namedtuple("LapFields", "steps seconds")

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
        events: a mapping of names (anything hashable) to Events; one whose Event is None is never
            due.
        max_epochs: ends the run after this many epochs.
        max_steps: ends the run after this many steps.
        max_seconds: ends the run at the first step at which this much training time has passed.
            Exactly one of the three is to be given.
        stop_when: an Event that ends the run early, at the step on which it fires.
        dataloader_len: batches per epoch; an epoch is cut there. Without it, `len()` counts.
        lookahead: True looks one batch ahead at every step, to know an epoch's last batch from the
            data alone; False never fetches a batch before it is asked for; None, the default, looks
            ahead where no length is known.
        batches_per_step: a step hands over a list of so many batches in place of one, as for an
            optimizer step of several micro-batches; an epoch's last list may be shorter. Steps,
            periods and `max_steps` count lists, `dataloader_len` counts batches.
        start_step: the run begins as one that has done so many steps, for checkpoints that hold a
            bare number: its first step has this number. With `batches_per_step`, each of the steps
            that are done counts as a full list. A `state_file` that is there wins.
        fast_forward: False leaves the dataloader as it is when the run goes on from `start_step`
            or from a state, for loaders whose place somebody else restores, and for batches that
            are drawn at random. The first epoch then ends where its length says, less what was
            done of it; without a length, `start_step` begins in epoch 0.
        clock: a callable that returns seconds, in place of the real clock.
        state_file: a path: where a file is there, the run goes on from what `save_state` put into
            it.
        signals: signals that ask the run to end as `stop()` does, such as `(signal.SIGTERM,)`.
        on_exception: "raise", or "event": what the dataloader raises, or a body under `guard()`,
            is then handed over as a last step, and raised after it.
        sync: lets all processes of one training do at the same step what a clock, a condition, a
            signal, `stop()` or `trigger()` asks for on any of them. It is what
            `dloop.sync.torch_distributed()`, `mpi()` or `jax_processes()` returns; or a callable
            that takes a list of ints and returns its element-wise maximum over all processes; or an
            object with `start(list)` and `finish() -> list`, which do the same in two parts. False
            says that processes need not agree.
        sync_every: at every so many steps the processes exchange what they ask for, and do what was
            asked at the exchange before. Twice that has to fit into the time between a signal and
            the end.
        progress: True shows a tqdm bar that costs steps nothing (`pip install 'dloop[progress]'`).
            A tqdm, or a callable that makes one of tqdm's arguments, is shown in its place. Where
            several processes train, it is shown on rank 0 alone.
        profile: True measures where the time goes, for `loop.profile`; a number lets its trace have
            so many of the last steps, in place of 1,000.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or arguments contradict each other.
        StateError: `state_file` holds something else than a state, or a damaged one.

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

    if TYPE_CHECKING:

        @overload
        def __init__(
            self,
            dataloader: Iterable[Batch] | Callable[[], Iterable[Batch]],
            events: Mapping[Any, BaseEvent | None] | None = None,
            *,
            max_epochs: SupportsIndex | None = None,
            max_steps: SupportsIndex | None = None,
            max_seconds: SupportsFloat | None = None,
            stop_when: BaseEvent | None = None,
            dataloader_len: SupportsIndex | None = None,
            lookahead: bool | None = None,
            batches_per_step: None = None,
            start_step: SupportsIndex = 0,
            fast_forward: bool = True,
            clock: Callable[[], SupportsFloat] | None = None,
            state_file: str | PathLike[str] | None = None,
            signals: Iterable[SupportsIndex] = (),
            on_exception: str = "raise",
            sync: Exchange | Callable[[list[int]], Sequence[int]] | Literal[False] | None = None,
            sync_every: SupportsIndex | None = None,
            progress: bool | Callable[..., Any] | Any = None,
            profile: bool | SupportsIndex = False,
        ) -> None: ...

        @overload
        def __init__(
            self: Loop[list[Item]],
            dataloader: Iterable[Item] | Callable[[], Iterable[Item]],
            events: Mapping[Any, BaseEvent | None] | None = None,
            *,
            max_epochs: SupportsIndex | None = None,
            max_steps: SupportsIndex | None = None,
            max_seconds: SupportsFloat | None = None,
            stop_when: BaseEvent | None = None,
            dataloader_len: SupportsIndex | None = None,
            lookahead: bool | None = None,
            batches_per_step: SupportsIndex,
            start_step: SupportsIndex = 0,
            fast_forward: bool = True,
            clock: Callable[[], SupportsFloat] | None = None,
            state_file: str | PathLike[str] | None = None,
            signals: Iterable[SupportsIndex] = (),
            on_exception: str = "raise",
            sync: Exchange | Callable[[list[int]], Sequence[int]] | Literal[False] | None = None,
            sync_every: SupportsIndex | None = None,
            progress: bool | Callable[..., Any] | Any = None,
            profile: bool | SupportsIndex = False,
        ) -> None: ...

    def __init__(
        self: Loop[Any],
        dataloader: Iterable[Any] | Callable[[], Iterable[Any]],
        events: Mapping[Any, BaseEvent | None] | None = None,
        *,
        max_epochs: SupportsIndex | None = None,
        max_steps: SupportsIndex | None = None,
        max_seconds: SupportsFloat | None = None,
        stop_when: BaseEvent | None = None,
        dataloader_len: SupportsIndex | None = None,
        lookahead: bool | None = None,
        batches_per_step: SupportsIndex | None = None,
        start_step: SupportsIndex = 0,
        fast_forward: bool = True,
        clock: Callable[[], SupportsFloat] | None = None,
        state_file: str | PathLike[str] | None = None,
        signals: Iterable[SupportsIndex] = (),
        on_exception: str = "raise",
        sync: Exchange | Callable[[list[int]], Sequence[int]] | Literal[False] | None = None,
        sync_every: SupportsIndex | None = None,
        progress: bool | Callable[..., Any] | Any = None,
        profile: bool | SupportsIndex = False,
    ) -> None:
        if clock is not None and not callable(clock):
            raise TypeError(f"clock={checks.shown(clock)}: pass a callable that returns seconds")
        self._dataloader = dataloader
        self._clock = clock
        self._schedule = Schedule(events, stop_when, max_epochs, max_steps, max_seconds)
        limit = self._schedule.max_epochs
        self._open_source = partial(
            Source,
            dataloader,
            dataloader_len,
            lookahead,
            None if limit == NEVER else limit,
            batches_per_step,
        )
        if on_exception not in ("raise", "event"):
            raise ValueError(f'on_exception={checks.shown(on_exception)}: pass "raise" or "event"')
        self._start_step = checks.count("start_step", start_step, 0)
        self._fast_forward = checks.flag("fast_forward", fast_forward)
        self._is_alone = sync is False
        self._exchange, self._sync_every = _checked_exchange(sync, sync_every)
        self._progress = _checked_progress(progress)
        self._profile_steps = _checked_profile(profile)
        self._on_exception = 0
        if on_exception == "event":
            for member in (LoopEvents.EXCEPTION, LoopEvents.TRAINING_END):
                self._on_exception |= self._schedule.due_with(member)
        self._signals = _checked_signals(signals, self._interrupt)
        if state_file is not None and not isinstance(state_file, (str, PathLike)):
            raise TypeError(f"state_file={checks.shown(state_file)}: pass a path")
        self._state_file = state_file
        self._begin()
        if state_file is not None:
            self._load_file(state_file)

    def _begin(self, position: Position | None = None, agreement: Agreement | None = None) -> None:
        self._source = self._open_source()
        self._profile = None
        if self._profile_steps:
            from .profile import Profile

            self._profile = self._source.profile = Profile(self._profile_steps)
        self._place_is_open = False
        if position is None and self._start_step:
            position = self._start_position()
        self._entered = False
        self._over = "" if position is None else self._limit_of(position)
        self._windows: dict[Any, int] = {} if position is None else position.windows
        self._steps_before = 0 if position is None else position.steps
        tick = None if self._clock is None else checks.in_nanoseconds(self._clock)
        clock = _backend.core.Clock(tick, 0 if position is None else position.elapsed)
        self._first_place = 0, 0
        if position is not None:
            epochs = position.epoch + position.epoch_end
            epoch_steps = 0 if position.epoch_end else position.epoch_steps
            self._first_place = epochs, epoch_steps
            self._source.resume(
                position.loader, position.steps, epochs, epoch_steps, self._fast_forward
            )
        if agreement is None:
            agreement = self._new_agreement()
        if agreement is not None:
            self._source.agree = agreement.epoch_length
        self._run = Run(
            self._schedule,
            self._source,
            clock,
            self._on_exception,
            position,
            agreement,
            () if self._progress is None else (self._progress,),
        )
        # By label, the latest lap's last step, the training time there, and the lap
        self._laps: dict[Hashable, tuple[int, int, Lap]] = {}

    def _new_agreement(self) -> Agreement | None:
        """What lets this run agree with other processes; None where there are none."""
        if self._exchange is None:
            return None
        from .agreement import Agreement

        exchange = self._exchange
        if self._profile is not None:
            exchange = self._profile.around_exchange(exchange)
        return Agreement(
            exchange,
            self._sync_every,
            self._schedule,
            self._source.batches_per_step,
            self._steps_before,
        )

    def _start_position(self) -> Position:
        """The position after `start_step` steps, as far as lengths tell it."""
        from .state import start_position

        steps = self._start_step
        per_epoch = self._source.steps_per_epoch()
        if per_epoch is not None and self._exchange is None:
            epoch, epoch_steps = divmod(steps - 1, per_epoch)
            return start_position(steps, epoch, epoch_steps + 1, epoch_steps + 1 == per_epoch)
        self._place_is_open = per_epoch is not None or not self._source.single_pass
        return start_position(steps, 0, steps if self._fast_forward else 0, False)

    def _find_place(self) -> None:
        """Go through the epochs up to `start_step`, where lengths may differ: also by process."""
        if not self._place_is_open or self._run.closed or self._run.error is not None:
            return
        from .state import start_position

        run = self._run
        source = self._source
        epoch, left = 0, self._start_step
        steps = source.steps_in_epoch(epoch, left, self._fast_forward)
        while steps and steps < left and epoch + 1 < self._schedule.max_epochs:
            epoch, left = epoch + 1, left - steps
            steps = source.steps_in_epoch(epoch, left, self._fast_forward)
        if steps == 0:  # not known, and the dataloader is left as it is
            position = start_position(self._start_step, 0, 0, False)
        else:
            position = start_position(self._start_step, epoch, steps or left, steps is not None)
        self._begin(position, run.agreement)
        self._source.take_over(source)
        self._run.take_over(run)

    def _limit_of(self, position: Position) -> str:
        """The limit that a loaded run has reached, or an empty string."""
        name, limit = self._schedule.limit
        done = {
            "max_steps": position.steps,
            "max_epochs": position.epoch + position.epoch_end,
            "max_seconds": position.elapsed if position.out_of_time else 0,
        }
        return name if done[name] >= limit else ""

    def __iter__(self) -> Iterator[tuple[Batch, AbstractSet[Hashable]]]:
        """An iterator on the run, from its next batch on, in place of any older one.

        Raises:
            LoopError: the run is over.
        """
        return self._enter(None)

    def _enter(self, sizes: Sizes | None) -> Iterator[Any]:
        if self._run.agreement is not None:
            self._run.agreement.compare(bool(self._over))
        registration = None
        if not self._over:
            # Before the dataloader is iterated, as it may be to find the place
            registration = None if self._signals is None else self._signals.install()
            try:
                self._find_place()
            except Exception as exception:
                self._run.fail_to_begin(exception)
        if self._over:
            if self._signals is not None:
                self._signals.uninstall()
            return iter(())
        profile = self._profile
        if profile is not None and profile.held is not None and self.stop_reason is not None:
            return profile.around(iter(()), self._run)  # the last step, which an interrupt has kept
        if not (self._entered or self._is_alone or self._exchange):
            self._warn_if_distributed()
        self._entered = True
        shown = None if self._progress is None else self._progress.show(self._run)
        keep_alive = registration if shown is None else [registration, shown]
        steps = self._run.enter(sizes, keep_alive)
        return steps if profile is None else profile.around(steps, self._run)

    def _warn_if_distributed(self) -> None:
        """Warn if there are other processes, which may decide otherwise than this one."""
        schedule = self._schedule
        conditions = schedule.conditions or schedule.stop_conditions
        if not (schedule.timed or conditions or self._signals):
            return
        from . import sync

        if sync.rank_among_several() != 0:
            return
        from .agreement import decisions

        found = decisions(schedule)
        if self._signals is not None:
            found.append("signals")
        warn(
            f"this process is one of several, which may decide otherwise about "
            f"{', '.join(found)}; pass sync= and sync_every=, or sync=False if that is meant"
        )

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
        return self._enter(checks.sizes("sizes", sizes))

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
        if self._over:
            return None
        return self._run.steps_to_next_event(self._source.ends_at())

    def plan(self) -> Plan:
        """What the run will do: for each event how often it will fire and when, and what is wrong.

        Steps and epochs are worked out, however many there are; timers and conditions are told in
        words, with bounds where there are any. It is about the whole run, from its first step (0,
        `start_step`, or where the state goes on that was loaded) to its end, whenever it is asked:
        before, during or after. What comes unforeseen is no part of it: `stop()`, `trigger()`,
        signals, errors, and lengths that prove wrong.

        Neither the data nor the run are touched, but for `len(dataloader)`. Where the dataloader
        has `set_epoch`, all epochs are taken to be as long as that says now.

        Returns:
            A `dloop.plan.Plan`: `print` shows a table, a notebook a drawing. It has `rows`,
            `warnings` and `save_svg(path)`.

        Example:
            >>> from dloop import Event, Loop
            >>> events = {"Log": Event(every_n_steps=100), "DropLR": Event(at_step=1000)}
            >>> plan = Loop(range(300), events, max_epochs=3).plan()
            >>> plan.rows[0].times, plan.rows[0].first, plan.rows[0].last
            (9, (99, 199, 299), 899)
            >>> for warning in plan.warnings:
            ...     print(warning)
            'DropLR': at_step=1000 never fires, the run ends at step 899
        """
        from .plan import forecast  # seldom asked for

        missing = {}
        if self._signals is None:
            missing["INTERRUPT"] = "this Loop has no signals"
        if not self._on_exception:
            missing["EXCEPTION"] = 'this Loop has no on_exception="event"'
        return forecast(
            self._schedule,
            self._source,
            self._steps_before,
            None if self._place_is_open else self._first_place,
            bool(self._over),
            self._exchange is not None,
            missing,
        )

    def __len__(self) -> int:
        """The number of batches still to come.

        Raises:
            TypeError: it is not known.
        """
        left = 0 if self._over else self._run.steps_to_come()
        if left is None or left > sys.maxsize:
            raise TypeError("the number of batches to come is not known")
        return left

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        """Where the run is, and what limits it, in one line."""
        name, limit = self._schedule.limit
        where = f"epoch={self.epoch}, global_step={self.global_step}"
        if self.stop_reason is not None:
            where += f", stop_reason={self.stop_reason!r}"
        elif self._run.closed:
            where += ", closed"
        value = limit / 1e9 if name == "max_seconds" else limit
        return f"<{type(self).__name__} at {where}, {name}={value:.15g}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a Loop cannot be copied or pickled; save its state_dict() instead")

    @property
    def dataloader(self) -> Iterable[Any] | Callable[[], Iterable[Any]]:
        """The dataloader that the loop was made of."""
        return self._dataloader

    @property
    def events(self) -> dict[Hashable, BaseEvent]:
        """The events by name; one that was given as None is an Event that is never due."""
        return dict(self._schedule.events)

    @property
    def state(self) -> LoopState:
        """The `LoopState` of the latest step; before the first its counters are 0, -1 and -1."""
        return self._run.stepper.latest_state()

    @property
    def epoch(self) -> int:
        """The epoch of the latest step, from 0."""
        return self.state.epoch

    @property
    def global_step(self) -> int:
        """The latest step, from 0, counted across epochs; -1 before the first."""
        return self._run.stepper.step

    @property
    def epoch_step(self) -> int:
        """The latest step, from 0, counted within its epoch; -1 before the first."""
        return self.state.epoch_step

    @property
    def steps_done(self) -> int:
        """How many steps are done, the latest included: what `start_step` takes."""
        return self._run.stepper.step + 1

    @property
    def stop_reason(self) -> str | None:
        """Why the run ended; None as long as its last batch was not handed over.

        The first of these that applies: "exception", a signal's name, "stop", "stop_when",
        "max_steps", "max_epochs", "max_seconds", "exhausted" (a dataloader that can be gone
        through once ran dry).

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(9), max_steps=5, stop_when=Event(at_step=2))
            >>> [(batch, loop.stop_reason) for batch, events in loop]
            [(0, None), (1, None), (2, 'stop_when')]
        """
        return self._over or self._run.stop_reason

    @property
    def progress(self) -> Progress:
        """The bar of `progress=`, whose `set_postfix` also takes what it is given without a bar.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1)  # with progress=True, a bar shows the loss
            >>> for batch, events in loop:
            ...     loop.progress.set_postfix(loss=batch / 2)
        """
        if self._progress is None:
            from .progress import Progress

            self._progress = Progress(None, None)
        return self._progress

    @property
    def profile(self) -> Profile:
        """Where the time of the run went, up to now; for loops that were made with `profile=True`.

        Raises:
            LoopError: this one was not.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1, profile=True)
            >>> for batch, events in loop:
            ...     pass
            >>> loop.profile.bodies <= loop.profile.total
            True
        """
        if self._profile is None:
            raise LoopError("this loop was made without profile=True")
        return self._profile

    @property
    def exception(self) -> Exception | None:
        """The exception that ended the run."""
        return self._run.error

    def stop(self) -> None:
        """Let the next step be the last; it carries `LoopEvents.TRAINING_END`.

        Any thread may call this. All else is for the thread that goes over the loop.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(9), max_epochs=1)
            >>> for batch, events in loop:
            ...     print(batch)
            ...     if batch == 1:
            ...         loop.stop()
            0
            1
            2
            >>> loop.stop_reason
            'stop'
        """
        if self.stop_reason is None:
            self._run.ask_stop("stop", 0)

    def trigger(self, name: Hashable) -> None:
        """Let `name` be due at the next step too, whatever its criteria and windows say.

        From any thread, and from a signal's handler: save now, and go on. It is no part of a saved
        state, and after the last step it does nothing.

        Raises:
            KeyError: the loop has no such event, or it is a member of LoopEvents.

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop("abcd", {"Save": Event(at_step=3)}, max_epochs=1)
            >>> for batch, events in loop:
            ...     if "Save" in events:
            ...         print("save after", batch)
            ...     if batch == "a":
            ...         loop.trigger("Save")
            save after b
            save after d
        """
        bit = self._schedule.bit_of(name)
        if self.stop_reason is None:
            self._run.trigger(bit)

    def lap(self, label: Hashable) -> Lap:
        """The steps, and the seconds of training time, since `label` was asked for last.

        The first time that is since this launch began. Asked again in the same step, it answers the
        same. Nothing of it is saved. What is returned has `steps_per_second` too.

        Args:
            label: any hashable, such as an event's name.

        Example:
            >>> from dloop import Event, Loop
            >>> seconds = iter(range(99)).__next__
            >>> loop = Loop(range(10), {"Log": Event(every_n_steps=4)}, max_epochs=1, clock=seconds)
            >>> for batch, events in loop:
            ...     if "Log" in events:
            ...         steps, seconds = loop.lap("Log")
            ...         print(steps, "steps in", seconds, "seconds")
            4 steps in 1.0 seconds
            4 steps in 1.0 seconds
        """
        clock = self._run.clock
        step = self._run.stepper.step
        launch = (self._steps_before - 1, clock.saved, Lap(0, 0.0))
        before, elapsed, lap = self._laps.get(label, launch)
        if step != before:
            now = clock.now()
            lap = Lap(step - before, (now - elapsed) / 1e9)
            self._laps[label] = step, now, lap
        return lap

    def pause_clock(self) -> ClockPause:
        """A context whose time is no training time, as for an evaluation or for saving.

        It is taken out of `elapsed`, timers, `max_seconds` and laps, but not out of `per_launch`
        and `at_timestamp`, which are about the job. It nests, and ends at the next request for a
        batch at the latest. Only for the thread that goes over the loop.

        Example:
            >>> from dloop import Loop
            >>> now = 0
            >>> loop = Loop("ab", max_epochs=1, clock=lambda: now)
            >>> for batch, events in loop:
            ...     now += 1  # a training step
            ...     with loop.pause_clock():
            ...         now += 60  # an evaluation
            ...     print(loop.lap("Step"))
            Lap(steps=1, seconds=1.0)
            Lap(steps=1, seconds=1.0)
        """
        return ClockPause(self._run, self._profile)

    def _interrupt(self, name: str) -> None:
        if self.stop_reason is None:
            self._run.ask_stop(name, self._schedule.due_with(LoopEvents.INTERRUPT))

    @property
    def stop_requested(self) -> bool:
        """Whether `stop()` or a signal has asked for an end; for bodies that take long.

        With `sync` it tells of this process alone: where it makes a body shorter, others wait.
        """
        return self._run.stop_asked is not None

    def guard(self) -> Guard:
        """A context for bodies: with `on_exception="event"` what they raise ends the run politely.

        An Exception that leaves the context is then not raised there: the next step has no batch,
        but the events EXCEPTION and TRAINING_END, and after it the exception is raised.

        Example:
            >>> from dloop import Loop, LoopEvents
            >>> loop = Loop([1, 0], max_epochs=1, on_exception="event")
            >>> try:
            ...     for batch, events in loop:
            ...         if LoopEvents.EXCEPTION in events:
            ...             print("saving after", repr(loop.exception))
            ...             continue
            ...         with loop.guard():
            ...             print(1 / batch)
            ... except ZeroDivisionError:
            ...     print("and it comes out")
            1.0
            saving after ZeroDivisionError('division by zero')
            and it comes out
        """
        return Guard(self if self._on_exception else None)

    def steps_since(self, name: Hashable) -> int:
        """The steps since `name` was last due, the latest step included.

        At a step at which it is due that is the length of its window: since the step at which it
        was due before, or since the run began.

        Raises:
            KeyError: the loop has no such event.

        Example:
            >>> from dloop import Event, Loop, LoopEvents
            >>> window = Event(every_n_steps=4) | LoopEvents.TRAINING_END
            >>> loop = Loop(range(10), {"Update": window}, max_epochs=1)
            >>> [loop.steps_since("Update") for batch, events in loop if "Update" in events]
            [4, 4, 2]
        """
        if name not in self._schedule.events and not isinstance(name, LoopEvents):
            raise self._schedule.unknown(name)
        stepper = self._run.stepper
        new = -1 if isinstance(name, LoopEvents) else self._steps_before - 1
        before = self._windows.get(name, new)
        step = stepper.step
        last = stepper.sets.last_step(name, step)
        return step - max(before, last)

    def state_dict(self, step_done: bool = True) -> dict[str, Any]:
        """The run's state, to be saved with the model's and given to `load_state_dict`.

        It is made of plain values, but for the dataloader's own state, where it has one.

        Args:
            step_done: whether the latest step (or list of steps) counts as done, so that a resumed
                run begins with the next. False is for `except` and `finally`: it then comes again.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop("abcd", max_epochs=1)
            >>> for batch, events in loop:
            ...     if batch == "b":
            ...         saved = loop.state_dict()
            >>> resumed = Loop("abcd", max_epochs=1)
            >>> resumed.load_state_dict(saved)
            >>> [batch for batch, events in resumed]
            ['c', 'd']
        """
        from . import state

        return state.as_dict(self._position(step_done), list(self._schedule.events))

    def _position(self, step_done: bool) -> Position:
        from .state import Position

        if not self._over:
            if self._run.agreement is None:
                self._find_place()
            if self._place_is_open:
                raise LoopError(
                    "state_dict() comes after the first step: the place of start_step is not known "
                    "before"
                )
        run = self._run
        stepper = run.stepper
        stepped = stepper.step >= self._steps_before
        undone = stepper.size if stepped and not step_done else 0
        done = stepper.step + 1 - undone
        latest = stepper.latest_state()
        epoch_steps = latest.epoch_step + 1 - undone
        epoch_end = latest.epoch_end and not undone
        timers: dict[Any, list[list[Any]]] = {}
        for number, last in enumerate(run.timer_lasts(not undone)):
            kind = "every" if self._schedule.times[number].period else "at"
            timers.setdefault(self._schedule.name_of_timer(number), []).append([kind, last])
        out_of_time = self._over == "max_seconds" or (stepped and run.is_out_of_time())
        return Position(
            epoch=latest.epoch,
            epoch_steps=epoch_steps,
            steps=done,
            epoch_end=epoch_end,
            elapsed=run.time_to_save(),
            out_of_time=not undone and out_of_time,
            plan=self._made_of(),
            timers=timers,
            windows={
                **dict.fromkeys(self._schedule.events, self._steps_before - 1),
                **self._windows,
                **stepper.sets.last_steps(stepper.step + (not undone)),
            },
            loader=self._source.state(
                self._source.batches_in(epoch_steps),
                run.fetched_ahead() + self._source.batches_in(undone),
                latest.epoch,
                epoch_end,
            ),
            batches_per_step=self._source.batches_per_step,
            asked=[]
            if run.agreement is None
            else self._schedule.names_of(run.agreement.wanted(done - 1)),
        )

    def _made_of(self) -> dict[str, Any]:
        from .state import described

        stop_when = self._schedule.stop_when
        return {
            "events": {name: described(event) for name, event in self._schedule.events.items()},
            "stop_when": None if stop_when is None else described(stop_when),
            "limit": list(self._schedule.limit),
            "dataloader_len": self._source.given_len,
            "length": self._source.fixed_len(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the run go on from where `state_dict` was called, before its first step.

        Where the loop was made of other events, or with another limit or length, a LoopWarning
        says so; the events of the same names go on, new ones count from here.

        Raises:
            LoopError: the loop was entered already.
            StateError: this is no such state, or it is damaged.
        """
        from .state import changes, from_dict

        if self._entered:
            raise LoopError(
                "load_state_dict comes before the first step; restart() goes back there"
            )
        position = from_dict(state, list(self._schedule.events))
        if position.batches_per_step != self._source.batches_per_step:
            raise StateError(
                f"batches_per_step={self._source.batches_per_step}: the state was saved with "
                f"{position.batches_per_step}; pass the same, so that its steps are as long"
            )
        changed = changes(position.plan, self._made_of())
        if changed:
            warn(f"the loop is not what the state was saved of: {'; '.join(changed)}")
        self._source.close()
        self._begin(position)

    def _load_file(self, path: str | PathLike[str]) -> None:
        import logging
        from os import fspath
        from pathlib import Path

        from . import state

        state.check_path(path)
        if not Path(path).exists():
            return
        try:
            self.load_state_dict(state.read(path))  # type: ignore[arg-type]
        except StateError as error:
            raise StateError(f"{fspath(path)}: {error}") from error
        logging.getLogger("dloop").info(
            "%s: going on after step %d, in epoch %d", fspath(path), self.global_step, self.epoch
        )

    def save_state(self, step_done: bool = True) -> None:
        """Write `state_dict()` to the `state_file`: as a whole, or not at all.

        Raises:
            LoopError: the loop has no `state_file`.
            StateError: the dataloader's state holds what JSON cannot.
            OSError: the file cannot be written; the state that it held is still there.
        """
        from . import state

        if self._state_file is None:
            raise LoopError("save_state() writes to state_file=, which this loop was not given")
        state.write(self._state_file, self.state_dict(step_done))

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
        source = self._source
        self._run.leave()
        if self._signals is not None:
            self._signals.uninstall()
        self._begin()
        source.close()

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
        self._run.close()
        if self._progress is not None:
            self._progress.close()
        if self._signals is not None:
            self._signals.uninstall()
        self._source.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pending = self._run.pending
        self.close()
        if pending is None:
            return
        if exception is None:
            raise pending
        errors.chain(exception, pending)


class Lap(LapFields):
    """What `Loop.lap` returns: a number of steps, and how many seconds of training they took."""

    __slots__ = ()

    @property
    def steps_per_second(self) -> float:
        """The speed; 0.0 where no time has passed."""
        return self.steps / self.seconds if self.seconds else 0.0


class ClockPause:
    """What `Loop.pause_clock` returns."""

    def __init__(self, run: Run, profile: Profile | None) -> None:
        self._run = run
        self._profile = profile

    def __enter__(self) -> None:
        self._run.pause_clock(self)
        if self._profile is not None:
            self._profile.begin_pause()

    def __exit__(self, *_: object) -> None:
        self._run.end_pause(self)
        if self._profile is not None:
            self._profile.end_pause()


class Guard:
    """What `Loop.guard` returns."""

    def __init__(self, loop: Loop[Any] | None) -> None:
        self._loop = loop
        self._run = None if loop is None else loop._run

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        loop, run = self._loop, self._run
        if loop is None or run is None or not isinstance(exception, Exception):
            return False
        if run.closed or loop._run is not run:  # no step would deliver it
            return False
        if run.pending is not None:
            errors.chain(exception, run.pending)
            return False
        run.fail(exception)
        return True


def _checked_signals(
    given: Iterable[SupportsIndex], request_stop: Callable[[str], object]
) -> StopSignals | None:
    if given == ():
        return None
    from .signals import StopSignals, checked_signals

    return StopSignals(checked_signals(given), request_stop)


def _checked_progress(given: object) -> Progress | None:
    if given is None or given is False:
        return None
    from .progress import checked

    return checked(given)


def _checked_profile(given: object) -> int:
    if given is None or given is False:
        return 0
    from .profile import LAST_STEPS

    return LAST_STEPS if given is True else checks.count("profile", given)


def _checked_exchange(
    sync: Exchange | Callable[[list[int]], Sequence[int]] | Literal[False] | None,
    sync_every: SupportsIndex | None,
) -> tuple[Exchange | None, int]:
    if sync is None or sync is False:
        if sync is None and sync_every is not None:
            raise ValueError(f"sync_every={checks.shown(sync_every)}: pass sync with it")
        return None, 0
    if sync_every is None:
        raise ValueError(
            "sync_every=None: pass how many steps lie between two exchanges; twice that has to fit "
            "into the time that a signal leaves"
        )
    every = checks.count("sync_every", sync_every)
    if callable(getattr(sync, "start", None)) and callable(getattr(sync, "finish", None)):
        return sync, every  # type: ignore[return-value]
    if not callable(sync):
        raise TypeError(
            f"sync={checks.shown(sync)}: pass dloop.sync.torch_distributed() or its like, a "
            "callable that returns the element-wise maximum of a list of ints, or False"
        )
    from .agreement import AtOnce

    return AtOnce(sync), every
