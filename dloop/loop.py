"""Loop: its arguments, and what users call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import partial, wraps
from time import perf_counter_ns
from types import MappingProxyType, TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
)

from . import checks, errors
from .errors import LoopError, StateError, log, warn
from .events import Event, LoopEvents, Member
from .plan import Forecast, Plan
from .profile import LAST_STEPS, Profile
from .progress import Progress
from .progress import checked as checked_progress
from .run import Run
from .schedule import Schedule, key_of
from .signals import StopSignals, checked_signals
from .source import Source
from .state import Position, as_dict, checked_path, from_dict, read, write
from .sync import Agreement, Sync, warn_if_distributed

if TYPE_CHECKING:
    from ._core import LoopState, Sizes

Batch = TypeVar("Batch")
Self = TypeVar("Self", bound="Loop[Any]")


_OTHER_NAMES = {
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "nb_epochs"), "max_epochs"),
    **dict.fromkeys(("steps", "n_steps", "num_steps", "max_iters", "total"), "max_steps"),
    **dict.fromkeys(("seconds", "max_time", "time_limit", "timeout"), "max_seconds"),
    **dict.fromkeys(("loader", "data", "dataset", "iterable", "train_loader"), "dataloader"),
    **dict.fromkeys(("length", "epoch_len", "epoch_length", "steps_per_epoch"), "dataloader_len"),
    **dict.fromkeys(("callbacks", "triggers", "handlers", "event"), "events"),
    **dict.fromkeys(("stop", "until", "stop_condition"), "stop_when"),
    **dict.fromkeys(("initial_step", "global_step", "resume_from"), "start_step"),
    **dict.fromkeys(("checkpoint", "state", "path", "resume"), "state_file"),
    **dict.fromkeys(("bar", "tqdm", "verbose"), "progress"),
    "distributed": "sync",
}
"""What other libraries, and hasty users, call the arguments."""


class Loop(Generic[Batch]):
    """One run over a dataloader. Iterating yields pairs of a batch and the events of its step.

    A `for` can be left and entered again, and continues with the next batch; `restart()` begins a
    new run.

    Args:
        dataloader: any iterable, or a callable that returns an iterable for each epoch.
        events: a mapping of names, which are any hashable, to Events or None.
        max_epochs: ends the run after so many epochs; 1.5 within the second one.
        max_steps: ends the run after so many steps.
        max_seconds: ends the run at the first step at which so many seconds of training have
            passed; a number or a timedelta. Pass one of these three, or a `stop_when`.
        stop_when: an Event; the step at which it fires is the last.
        dataloader_len: batches per epoch; an epoch is cut there. By default `len()` counts.
        lookahead: True fetches one batch ahead, to find the end of an epoch in the data; False
            never does. By default the loop looks ahead if no length is known; in an iterator only
            under `max_epochs`.
        start_step: begins as a run that has done so many steps, for a checkpoint that holds only a
            number. An existing `state_file` wins.
        fast_forward: False leaves the dataloader as it is when a run begins at `start_step` or at a
            saved state, because you restore it yourself or draw batches at random.
        clock: a callable that returns seconds; by default the real clock.
        state_file: a path. If the file exists, the run resumes from it; `save_state()` writes it.
        signals: a signal, or a collection of them, that ends the run like `stop()`.
        on_exception: "event" yields one more step for an exception of the dataloader, or of a body
            under `guard()`, and raises the exception after it; "raise" raises it at once.
        sync: what a function in `dloop.sync` returns; all processes then stop and fire events at
            the same step. False says that they may differ.
        progress: True shows a tqdm bar; or a tqdm, or a callable that makes one.
        profile: True measures where the time goes, see `loop.profile`; or how many steps its trace
            holds.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or arguments contradict each other.
        StateError: `state_file` is damaged, or is another file.
        FileNotFoundError: the folder of `state_file` does not exist.
        ImportError: `progress=True` needs tqdm, which is not installed.

    Iterating raises what the dataloader, a condition or the clock raises; `DataLengthError` if an
    epoch is shorter than its length; `DataExhaustedError` if it is empty; `LoopError` after the
    run's end.

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
        events: Mapping[Any, Event | None] | None = None,
        *,
        max_epochs: float | None = None,
        max_steps: int | None = None,
        max_seconds: float | timedelta | None = None,
        stop_when: Event | None = None,
        dataloader_len: int | None = None,
        lookahead: bool | None = None,
        start_step: int = 0,
        fast_forward: bool = True,
        clock: Callable[[], float] | None = None,
        state_file: str | os.PathLike[str] | None = None,
        signals: int | Iterable[int] = (),
        on_exception: Literal["raise", "event"] = "raise",
        sync: Sync | Literal[False] | None = None,
        progress: bool | Callable[..., Any] | Any = False,
        profile: bool | int = False,
    ) -> None:
        self._schedule = Schedule(events, stop_when, max_epochs, max_steps, max_seconds)
        _check_one_limit(
            stop_when, max_epochs=max_epochs, max_steps=max_steps, max_seconds=max_seconds
        )
        if clock is not None and not callable(clock):
            raise TypeError(f"clock={checks.shown(clock)}: pass a callable that returns seconds")
        if on_exception not in ("raise", "event"):
            raise ValueError(f'on_exception={checks.shown(on_exception)}: pass "raise" or "event"')
        self._dataloader = dataloader
        by_epochs = None if max_epochs is None else checks.epochs("max_epochs", max_epochs)
        self._sync = _checked_sync(sync)
        ahead = self._sync.ahead if isinstance(self._sync, Sync) else 1
        self._open_source = partial(Source, dataloader, dataloader_len, lookahead, by_epochs, ahead)
        self._tick = None if clock is None else checks.in_nanoseconds(clock)
        self._start_step = checks.count("start_step", start_step, 0)
        self._fast_forward = checks.flag("fast_forward", fast_forward)
        self._progress = checked_progress(progress)
        self._last_steps = _checked_profile(profile)
        self._on_exception = 0
        if on_exception == "event":
            for member in (LoopEvents.EXCEPTION, LoopEvents.TRAINING_END):
                self._on_exception |= self._schedule.bits_with(member)
        self._signals = StopSignals(checked_signals(signals))
        self._state_file = None if state_file is None else checked_path(state_file)
        self._warned: set[str] = set()
        self._is_managed = False  # whether the loop is used as `with loop:`
        self._begin(self._start_position())
        if self._state_file is not None and os.path.exists(self._state_file):
            self._load_file(self._state_file)

    if not TYPE_CHECKING:

        @wraps(__init__)  # for help() and tooltips
        def __new__(cls, *_: object, **arguments: object) -> Loop[Any]:
            """Refuse unknown keywords."""
            if cls.__init__ is Loop.__init__:
                checks.refuse_unknown(Loop.__init__, arguments, _OTHER_NAMES)
            return object.__new__(cls)

    def _begin(self, position: Position) -> None:
        """Begin a run at a position."""
        source = self._open_source()
        if position.steps:
            position = source.resume(position, self._fast_forward)
        agreement = None
        if isinstance(self._sync, Sync):
            agreement = Agreement(self._sync, self._schedule, position)
        self._position = position
        leave = partial(_leave, self._signals, self._progress)
        self._run = Run(
            self._schedule, source, self._tick, position, agreement, self._on_exception, leave
        )
        if type(self).count is Loop.count:  # without a frame in between: bodies count often
            self.count = self._run.engine.count  # type: ignore[method-assign]
        self._profile = Profile(self._last_steps) if self._last_steps else None
        self._laps: dict[Hashable, tuple[int, int, Mapping[str, int], Lap]] = {}
        self._entered = False

    def _start_position(self) -> Position:
        """Return the position after `start_step` steps."""
        steps = self._start_step
        if not steps:
            return Position()
        source = self._open_source()
        windows = {key_of(member): steps - 1 for member in LoopEvents}
        length = source.fixed_len()
        if length:
            epoch, step = divmod(steps - 1, length)
            return Position(epoch, step + 1, steps, step + 1 == length, length, windows=windows)
        if not self._fast_forward:
            return Position(0, 0, steps, windows=windows)
        if not source.single_pass:
            raise ValueError(
                f"start_step={steps}: where that is depends on the lengths of epochs, which are "
                "not known; pass dataloader_len, or fast_forward=False and restore the dataloader"
            )
        return Position(0, steps, steps, windows=windows)

    # Iterating

    def __iter__(self) -> Iterator[tuple[Batch, AbstractSet[Hashable]]]:
        """Return an iterator from the next batch on, in place of any older one.

        Raises:
            LoopError: the run has ended.
        """
        return self._enter(None)

    def chunks(
        self, sizes: int | Iterable[int]
    ) -> Iterator[tuple[list[Batch], AbstractSet[Hashable]]]:
        """Return an iterator over lists of batches, for bodies that make many steps at once.

        It continues the same run. A list ends where an event fires, so only its last step has
        events. Conditions are called for each step as its batch is fetched. The clock is read once
        per list, at its last batch, and timers are judged there. `stop()` and `trigger()` take
        effect at the next list.

        Args:
            sizes: the greatest number of batches in a list; or a collection of all lengths that a
                list may have, with 1 in it, for functions that are compiled for each length.

        Raises:
            LoopError: the run has ended.
            TypeError: `sizes` has the wrong type.
            ValueError: a size is below 1, or 1 is missing.

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

    def _enter(self, sizes: Sizes | None) -> Iterator[Any]:
        agreement = self._run.engine.agenda.agreement
        if agreement is not None:
            agreement.compare(self._position, self._end_of_run is not None)
        if self._end_of_run is not None:
            _leave(self._signals, self._progress, self._run)
            log("the run was finished before (%s): nothing to do", self._end_of_run)
            return iter(())
        if not self._entered and self._sync is None:
            warn_if_distributed(self._schedule, bool(self._signals.numbers))
        steps = self._run.enter(sizes)
        self._entered = True
        try:
            if not self._run.stop_requested:
                self._signals.install(self._run.on_signal)
            self._progress.show(self._run)
        except BaseException:
            _leave(self._signals, self._progress, self._run)
            raise
        if self._profile is None:
            return steps
        return self._profile.around(steps, self._run.engine)

    @property
    def _end_of_run(self) -> str | None:
        """Why the run was finished before this launch began it; None if it was not."""
        position = self._position
        if position.finished is not None:
            return position.finished
        limit = self._schedule.limit
        if limit is None or not position.steps:
            return None
        reached: dict[str, int | Fraction] = {
            "max_steps": position.steps,
            "max_epochs": position.epochs,
            "max_seconds": position.latest_time,
        }
        name, most = limit
        return name if reached[name] >= most else None

    # Where the run is

    @property
    def dataloader(self) -> Iterable[Any] | Callable[[], Iterable[Any]]:
        """The dataloader that the loop was made with."""
        return self._dataloader

    @property
    def events(self) -> dict[Hashable, Event]:
        """The Events by name; one that was given as None never fires."""
        return dict(self._schedule.events)

    @property
    def state(self) -> LoopState:
        """The `LoopState` of the latest step; before the first, its counters are 0, -1 and -1."""
        return self._run.state

    @property
    def epoch(self) -> int:
        """The epoch of the latest step, from 0; during a fetch, the epoch of its batch.

        Example:
            >>> from dloop import Loop
            >>> stages = [["easy"], ["easy", "hard"]]
            >>> loop = Loop(lambda: stages[loop.epoch], max_epochs=2)
            >>> [batch for batch, events in loop]
            ['easy', 'easy', 'hard']
        """
        return self._run.engine.current_epoch

    @property
    def global_step(self) -> int:
        """The latest step, from 0 across epochs; -1 before the first."""
        return self._run.engine.step

    @property
    def epoch_step(self) -> int:
        """The latest step within its epoch, from 0; -1 before the first."""
        return self.state.epoch_step

    @property
    def steps_done(self) -> int:
        """The number of steps, the latest included; pass it as `start_step` to continue."""
        return self._run.engine.step + 1

    @property
    def stop_reason(self) -> str | None:
        """Why the run has ended, from its last step on; None before.

        It is the first of these that applies: "exception", "finish", a signal's name, "stop",
        "max_seconds", "max_steps", "max_epochs", "stop_when", "exhausted" (a single-pass dataloader
        ended).

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(9), max_steps=5, stop_when=Event(at_step=2))
            >>> [(batch, loop.stop_reason) for batch, events in loop]
            [(0, None), (1, None), (2, 'stop_when')]
        """
        return self._run.stop_reason or self._end_of_run

    @property
    def exception(self) -> Exception | None:
        """The exception that ended the run, or None."""
        return self._run.error

    @property
    def stop_requested(self) -> bool:
        """Whether `stop()` or a signal has requested the end; for bodies that take long.

        With `sync` it tells of this process alone.
        """
        return self.stop_reason is None and self._run.stop_requested

    def steps_since(self, name: Hashable) -> int:
        """Return the number of steps since the previous firing of `name`.

        If it fires at the latest step, this is the length of its window: the steps since it fired
        before, or since the run began.

        Raises:
            KeyError: the loop has no such event.

        Example:
            >>> from dloop import Event, Loop, LoopEvents
            >>> window = Event(every_n_steps=4) | LoopEvents.TRAINING_END
            >>> loop = Loop(range(10), {"Update": window}, max_epochs=1)
            >>> [loop.steps_since("Update") for batch, events in loop if "Update" in events]
            [4, 4, 2]
        """
        if not isinstance(name, Member):
            self._schedule.bit_of(name)
        return self._run.steps_since(name)

    def steps_to_next_event(self) -> int | None:
        """Return the number of steps up to the next for which an event is scheduled, or None.

        Step criteria, the end of an epoch of known length and `max_steps` are scheduled; timers,
        conditions and unforeseen ends are not.

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(range(10), {"Log": Event(every_n_steps=6)}, max_epochs=1)
            >>> loop.steps_to_next_event()
            6
            >>> [loop.steps_to_next_event() for batch, events in loop]
            [5, 4, 3, 2, 1, 4, 3, 2, 1, None]
        """
        return None if self.stop_reason is not None else self._run.steps_to_next_event()

    def __len__(self) -> int:
        """Return the number of steps to come; a `stop_when` may end the run earlier.

        Raises:
            TypeError: it is not known.
        """
        left = 0 if self.stop_reason is not None else self._run.steps_to_come()
        if left is None or left > sys.maxsize:
            raise TypeError("the number of steps to come is not known")
        return left

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        """Return where the run is, and what ends it, in one line."""
        where = f"epoch={self.epoch}, global_step={self.global_step}"
        if self.stop_reason is not None:
            where += f", stop_reason={self.stop_reason!r}"
        elif self._run.closed:
            where += ", closed"
        limit = f"stop_when={self._schedule.stop_when!r}"
        if self._schedule.limit is not None:
            name, most = self._schedule.limit
            limit = f"{name}={float(most / 10**9 if name == 'max_seconds' else most):.15g}"
        return f"<{type(self).__name__} at {where}, {limit}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a Loop cannot be copied or pickled; save its state_dict() instead")

    # Changing the step in its body

    def finish(self) -> AbstractSet[Hashable]:
        """Make this step the run's last, and return its new events, with `TRAINING_END`.

        No further batch is fetched. A resumed run does not train on, see `state["finished"]`.

        Raises:
            LoopError: no body of a step runs in this thread.

        Example:
            >>> from dloop import Loop, LoopEvents
            >>> loop = Loop(["a", "good", "b"], max_epochs=9)
            >>> for batch, events in loop:
            ...     if batch == "good":
            ...         events = loop.finish()
            ...     if LoopEvents.TRAINING_END in events:
            ...         print("save after", batch)
            save after good
            >>> loop.stop_reason
            'finish'
        """
        return self._run.engine.amend(0, False, "finish")

    def finish_epoch(self) -> AbstractSet[Hashable]:
        """Make this step its epoch's last, and return its new events, with `EPOCH_END`.

        The next batch is the first of the next epoch. The rest of this one is dropped. A
        single-pass dataloader drops nothing and continues with its next batch.

        Raises:
            LoopError: no body of a step runs in this thread.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop("abcd", max_epochs=2)
            >>> for batch, events in loop:
            ...     print(loop.epoch, batch)
            ...     if batch == "b" and loop.epoch == 0:
            ...         events = loop.finish_epoch()
            0 a
            0 b
            1 a
            1 b
            1 c
            1 d
        """
        return self._run.engine.amend(0, True, None)

    def count(self, name: str, n: int = 1) -> AbstractSet[Hashable]:
        """Add to a counter, and return this step's new events, with those that this makes due.

        Args:
            name: the counter's name, which is the `of` of Events; without an Event it just counts.
            n: how much to add, from 0.

        Raises:
            LoopError: no body of a step runs in this thread.
            TypeError: `name` is no str, or `n` is no whole number.
            ValueError: `n` is below 0.

        Example:
            >>> from dloop import Event, Loop
            >>> loop = Loop(["to be", "or", "not to be"], {"Log": Event(every_n=2, of="words")},
            ...             max_epochs=1)
            >>> for text, events in loop:
            ...     events = loop.count("words", len(text.split()))
            ...     print(text, "Log" in events, dict(loop.counts))
            to be True {'words': 2}
            or False {'words': 3}
            not to be True {'words': 6}
        """
        return self._run.engine.count(name, n)

    @property
    def counts(self) -> Mapping[str, int]:
        """The sums of all counters, by name."""
        counters = self._run.engine.counters
        return MappingProxyType({name: counter.total for name, counter in counters.items()})

    # Requests

    def stop(self) -> None:
        """Make the next step the last; it has `LoopEvents.TRAINING_END`. Any thread may call this.

        With `sync`, it ends all processes at the same step, up to `2 * every` steps later.

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
            self._run.request(0, "stop")

    def trigger(self, name: Hashable) -> None:
        """Make `name` fire at the next step. Any thread and any signal handler may call this.

        If the event has parts with `wait_for`, the request waits and is saved. Otherwise it
        is not saved. After the last step it does nothing. With `sync`, the name fires in all
        processes at the same step, up to `2 * every` steps later.

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
            self._run.request(bit, None)

    # Time

    def lap(self, label: Hashable) -> Lap:
        """Return the steps and the seconds of training since the previous `lap(label)`.

        Its `counts` hold the growth of each counter, by name. The first lap begins with this
        launch. A second call in the same step returns the same lap.
        Laps are not saved.

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
        clock, step = self._run.clock, self._run.engine.step
        begin = self._run.first_step - 1, clock.saved, self._position.counts, Lap(0, 0.0)
        before, elapsed, counts, lap = self._laps.get(label, begin)
        if step != before:
            now, sums = clock.now(), self.counts
            lap = Lap(step - before, (now - elapsed) / 1e9)
            lap.counts = {name: each - counts.get(name, 0) for name, each in sums.items()}
            self._laps[label] = step, now, sums, lap
        return lap

    def pause_clock(self) -> AbstractContextManager[None]:
        """Return a context; time inside it is not counted, as for an evaluation.

        Timers, `max_seconds`, `elapsed` and laps wait; `per_launch` and `at_timestamp` do not. It
        nests. Use it in the thread that iterates the loop. The time between leaving a `for` and
        entering it again counts, unless it is in such a context.

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
        return _pause(self._run, self._profile)

    # Seeing the run

    def plan(self) -> Plan:
        """Return when each event will fire, and likely mistakes.

        It is a dry run from where this launch begins, and fetches nothing. It does not
        predict clocks, conditions or counters, and assumes equally long epochs.

        Example:
            >>> from dloop import Event, Loop
            >>> events = {"Log": Event(every_n_steps=100), "DropLR": Event(at_step=1000)}
            >>> plan = Loop(range(300), events, max_epochs=3).plan()
            >>> plan.rows[0].times, plan.rows[0].first, plan.rows[0].last
            (9, (99, 199, 299), 899)
        """
        missing, notes = {}, []
        if self._run.stop_reason == "finish":
            notes.append(f"finish() has ended this run with step {self.global_step}")
        if not self._signals.numbers:
            missing["INTERRUPT"] = "this Loop has no signals"
        elif not self._on_exception and self._run.source.has_workers():
            notes.append(
                "signals: they may end the dataloader's workers too; pass on_exception='event' to "
                "save in that case"
            )
        if not self._on_exception:
            missing["EXCEPTION"] = "this Loop has no on_exception='event'"
        if not self._run.source.may_repeat_its_order():
            notes.append(f"{_SHUFFLES}; {_TO_REPEAT}")
        told = Forecast(
            self._schedule,
            self._run.start_state,
            self._run.source.epoch_len(),
            self._run.source.has_epochs,
            self._end_of_run is not None,
        )
        return told.plan(missing, notes)

    @property
    def progress(self) -> Progress:
        """The bar of `progress=`; without a bar, `write` prints and `set_postfix` does nothing.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1)  # with progress=True, a bar shows the loss
            >>> for batch, events in loop:
            ...     loop.progress.set_postfix(loss=batch / 2)
        """
        return self._progress

    @property
    def profile(self) -> Profile:
        """Where the time of the run went until now.

        Raises:
            LoopError: the loop was made without `profile=True`.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1, profile=True)
            >>> for batch, events in loop:
            ...     pass
            >>> loop.profile.steps
            3
        """
        if self._profile is None:
            raise LoopError("this loop was made without profile=True")
        return self._profile

    # States

    def state_dict(self, step_done: bool = True) -> dict[str, Any]:
        """Return the run's state, to be saved with the model's and given to `load_state_dict`.

        It is made of plain values, and of the dataloader's own state if it has one.

        Args:
            step_done: True if the latest step (or list) is done: a resumed run begins with the
                next. False if it is not, as in an `except`: a resumed run repeats it.

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
        position = self._run.position(step_done)
        self._warn_once(
            "names",
            any(" at 0x" in key_of(name) for name in self._schedule.events),
            "the repr of an event's name holds an address, so a resumed run will not know it; use "
            "a str as the name",
        )
        if position.epoch_steps and not position.epoch_end:
            repeats = not self._fast_forward or self._run.source.may_repeat_its_order()
            self._warn_once("order", not repeats, f"{_SHUFFLES}; {_TO_REPEAT}")
        return as_dict(position)

    def _warn_once(self, key: str, is_so: bool, message: str) -> None:
        if is_so and key not in self._warned:
            self._warned.add(key)
            warn(message)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from where `state_dict` was called; call it before the first step.

        Raises:
            LoopError: the loop was entered before.
            StateError: this is not a state, or it is damaged.
        """
        if self._entered:
            raise LoopError("load_state_dict() comes before the first step; call restart() before")
        position = from_dict(saved)
        requests = self._run.engine.agenda.requests
        self._begin(position)
        self._run.engine.agenda.requests += requests

    def _load_file(self, path: str) -> None:
        try:
            self.load_state_dict(read(path))  # type: ignore[arg-type]
        except StateError as error:
            raise StateError(f"{path}: {error}") from error
        log("%s: resuming after step %d, in epoch %d", path, self.global_step, self.epoch)

    def save_state(self, step_done: bool = True) -> None:
        """Write `state_dict(step_done)` to the `state_file`: whole, or not at all.

        Raises:
            LoopError: the loop has no `state_file`.
            StateError: the dataloader's state holds what JSON cannot.
            OSError: the file cannot be written, and holds what it held; or it was written, and
                the folder cannot be synced.
        """
        if self._state_file is None:
            raise LoopError("save_state() needs state_file=, a path to write to")
        write(self._state_file, self.state_dict(step_done))

    # The end

    def guard(self) -> Guard:
        """Return a context for bodies; with `on_exception="event"` it catches their exceptions.

        After an Exception inside, one more step is yielded: its batch is None, and
        EXCEPTION and TRAINING_END fire. Then the exception is raised.

        Raises:
            LoopError: the loop is not used as `with loop:`, without which a `break` would swallow
                the exception.

        Example:
            >>> from dloop import Loop, LoopEvents
            >>> try:
            ...     with Loop([1, 0], max_epochs=1, on_exception="event") as loop:
            ...         for batch, events in loop:
            ...             if LoopEvents.EXCEPTION in events:
            ...                 print("saving after", repr(loop.exception))
            ...                 continue
            ...             with loop.guard():
            ...                 print(1 / batch)
            ... except ZeroDivisionError:
            ...     print("and it comes out")
            1.0
            saving after ZeroDivisionError('division by zero')
            and it comes out
        """
        if not self._is_managed:
            raise LoopError("guard() works under `with loop:` alone; put the `for` into one")
        return Guard(self._run, bool(self._on_exception))

    def restart(self) -> None:
        """Begin a new run with the same arguments. Iterators over the old one raise LoopError.

        A single-pass dataloader continues where it was fetched, which may be beyond the last batch
        that was yielded.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop([1, 2], max_epochs=1)
            >>> [batch for batch, events in loop]
            [1, 2]
            >>> loop.restart()
            >>> [batch for batch, events in loop]
            [1, 2]
        """
        self._run.leave()
        self._begin(self._start_position())

    def close(self) -> None:
        """Close the dataloader's iterator and so its workers; the loop cannot continue.

        A DataLoader keeps its persistent workers, and an iterator that was passed as the dataloader
        stays open. `with loop:` closes the loop at its end.

        Example:
            >>> from dloop import Loop
            >>> with Loop([1, 2, 3], max_epochs=1) as loop:
            ...     for batch, events in loop:
            ...         break
            >>> len(loop)
            0
        """
        self._run.close()

    def __enter__(self: Self) -> Self:
        self._is_managed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_managed = False
        pending = self._run.pending
        self.close()
        if pending is None:
            return
        if exception is None:
            raise pending
        errors.chain(exception, pending)


class _Lap(NamedTuple):
    steps: int
    seconds: float


class Lap(_Lap):
    """What `Loop.lap` returns: a number of steps, and how many seconds of training they took.

    Attributes:
        counts: what was counted in them, by the name of the counter.
    """

    counts: Mapping[str, int] = MappingProxyType({})

    @property
    def steps_per_second(self) -> float:
        """The speed; 0.0 if no time has passed."""
        return self.steps / self.seconds if self.seconds else 0.0


@contextmanager
def _pause(run: Run, profile: Profile | None) -> Iterator[None]:
    began = perf_counter_ns()
    run.pause_clock()
    try:
        yield
    finally:
        run.resume_clock()
        if profile is not None and not run.pauses:
            profile.pause(began, perf_counter_ns())


class Guard:
    """What `Loop.guard` returns."""

    def __init__(self, run: Run, catches: bool) -> None:
        self._run = run
        self._catches = catches
        self._turn = run.engine.turn

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        run = self._run
        if not self._catches or not isinstance(exception, Exception):
            return False
        if self._turn != run.engine.turn:  # the loop was closed or restarted in the body
            return False
        if run.pending is not None:
            errors.chain(exception, run.pending)
            return False
        run.fail(exception, in_body=True)
        return True


_SHUFFLES = "this dataloader may shuffle in another order after a resume"
_TO_REPEAT = "use a sampler with set_epoch, or a dataloader with state_dict"


def _check_one_limit(stop_when: object, **limits: object) -> None:
    given = [f"{name}={checks.shown(each)}" for name, each in limits.items() if each is not None]
    if len(given) != 1 and (given or stop_when is None):
        raise ValueError(
            "pass exactly one of max_epochs, max_steps and max_seconds, or a stop_when; got "
            f"{', '.join(given) or 'none'}"
        )


def _leave(signals: StopSignals, progress: Progress, run: Run) -> None:
    """Let go of what an iterator has set up: signal handlers and the bar."""
    signals.restore()
    progress.leave(run)


def _checked_profile(given: Any) -> int:
    if given is None or given is False:
        return 0
    return LAST_STEPS if given is True else checks.count("profile", given)


def _checked_sync(given: Any) -> Sync | Literal[False] | None:
    if given is None or given is False or isinstance(given, Sync):
        return given
    raise TypeError(
        f"sync={checks.shown(given)}: pass dloop.sync.torch_distributed(every=n) or its like, "
        "dloop.sync.maximum(function, every=n), or False"
    )
