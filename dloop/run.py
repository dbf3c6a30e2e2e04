"""One run: how its epochs follow each other, how it continues after errors, and how it ends.

The core makes the steps. It calls `Run.next_epoch` where the batches of an epoch end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from difflib import get_close_matches
from time import time_ns
from typing import TYPE_CHECKING, Any

from . import _backend, errors
from .clock import Clock
from .errors import NEVER, warn
from .events import LoopEvents
from .schedule import Schedule, Timers, key_of, steps_up_to
from .source import Source

if TYPE_CHECKING:
    from ._core import LoopState, Pair, Sizes
    from .state import Position
    from .sync import Agreement


class Run:
    """One run over a source, from its first batch or a saved position to its last.

    Args:
        schedule: the events and limits.
        source: opens epochs.
        tick: reads the clock in nanoseconds; None for the real one.
        position: where the run begins.
        agreement: lets processes agree, or None.
        on_exception: the bits of the step that stands for an exception; 0 if there is none.
        on_leave: called when the run ends, and when an exception leaves it.

    Attributes:
        engine: makes the steps.
        clock: keeps training time.
        first_step: the first step of this launch; `start_state`: that of the step before.
        error: the exception that ended the run.
        pending: the same, until it has had its step and was raised.
        closed: whether the loop was closed.
        pauses: how many contexts pause the clock.
    """

    def __init__(
        self,
        schedule: Schedule,
        source: Source,
        tick: Callable[[], int] | None,
        position: Position,
        agreement: Agreement | None,
        on_exception: int,
        on_leave: Callable[[Run], object],
    ) -> None:
        core = _backend.core
        self.schedule = schedule
        self.source = source
        self._position = position
        self._agreement = agreement
        self._on_exception = on_exception
        self._on_leave = on_leave
        self.first_step = position.steps
        self.clock = Clock(tick, position.elapsed)
        self.start_state: LoopState = core.LoopState(
            position.epoch,
            position.steps - 1,
            position.epoch_steps - 1,
            position.epoch_end,
            False,
            -1,
            self.clock,
        )
        origins = 0, position.steps, position.steps - position.epoch_steps
        timers = Timers(schedule.times, self._saved_times(position), position.steps, origins)
        self.engine = core.Engine(schedule, self.clock, timers, self.start_state, agreement)
        self.engine.ends.is_single_pass = source.single_pass
        for name, total in position.counts.items():
            self.engine.counters[name] = core.Counter(total, schedule.counters.get(name))
        self.engine.ends.waits.waiting = self._saved_waits(position)
        self._is_open = False  # whether there is an iterator for the epoch
        self._was_left = False  # whether the loop was left in this epoch and entered again
        self.error: Exception | None = None
        self.pending: Exception | None = None
        self._has_error_step = False  # whether the pending error has had its step
        self._failed_in_body = False
        self.closed = False
        self.pauses = 0

    def _saved_times(self, position: Position) -> tuple[int, ...]:
        """Return when each timer fired last; that of a new event counts from here."""
        left = {key: list(timers) for key, timers in position.timers.items()}
        lasts = []
        for row in self.schedule.times:
            saved = left.get(self._key_of(1 << row.owner))
            kind, last = saved.pop(0) if saved and not row.per_launch else ("", -1)
            if kind != ("every" if row.period else "at"):
                last = position.elapsed or -1
            lasts.append(-1 if row.per_launch else last)
        return tuple(lasts)

    def _saved_waits(self, position: Position) -> int:
        """Return the bits that waited in a saved position."""
        left = {key: list(waits) for key, waits in position.waits.items()}
        saved = [(row.bit, left.get(self._key_of(row.owner))) for row in self.schedule.waits]
        return sum([bit for bit, waits in saved if waits and waits.pop(0)])

    def _key_of(self, bit: int) -> str:
        """Return the string that stands in states for the event of a bit; "" for `stop_when`."""
        names, place = self.schedule.names.names, bit.bit_length() - 1
        return key_of(names[place]) if place < len(names) else ""

    # Entering and leaving

    def enter(self, sizes: Sizes | None) -> Iterator[Any]:
        """Return a new iterator, in place of the current one; over lists if there are `sizes`.

        Raises:
            LoopError: the run has ended.
        """
        engine = self.engine
        self.check(engine.turn)
        if engine.ends.stop_reason is not None and self.pending is None:
            raise errors.LoopError("this run has ended; restart() begins a new one")
        keep_alive = WhileIterated(self, engine.turn + 1, self._on_leave)
        if sizes is None:
            steps = engine.steps(self, keep_alive)
        else:
            steps = engine.lists(self, sizes, keep_alive)
        self._was_left = self._is_open
        return steps

    def check(self, turn: int) -> None:
        """Raise LoopError if the iterator of this number may not continue."""
        if self.closed:
            raise errors.LoopError("this loop was closed; restart() begins a new run")
        if turn != self.engine.turn:
            raise errors.LoopError("this iterator was replaced: the loop was entered again")
        if self.error is not None and self.pending is None:
            what = "this run ended with an exception; restart() begins a new one"
            raise errors.LoopError(what) from self.error

    def leave(self) -> None:
        """Close the source's iterator; every iterator of the loop counts as replaced."""
        self.engine.turn += 1
        try:
            self.source.close()
        finally:
            self._let_go()
            if self._agreement is not None:
                self._agreement.discard()

    def close(self) -> None:
        """Do the same; no iterator continues from here."""
        self.closed = True
        self.leave()

    # Requests

    def request(self, bits: int, reason: str | None) -> None:
        """Let the next step have these events, and be the last if there is a reason."""
        self.engine.agenda.requests.append((bits, reason))
        self.engine.quiet_until = -1

    def on_signal(self, name: str) -> None:
        """Let the next step be the last because of a signal."""
        if self.stop_reason is None:
            self.request(self.schedule.bits_with(LoopEvents.INTERRUPT), name)

    @property
    def stop_requested(self) -> bool:
        """Whether the run was requested to stop."""
        asked = self._agreement is not None and self._agreement.stop_code > 0
        return asked or any(reason is not None for _, reason in self.engine.agenda.requests)

    def pause_clock(self) -> None:
        """Stop counting training time; pauses nest."""
        if not self.pauses:
            self.clock.pause()
        self.pauses += 1

    def resume_clock(self) -> None:
        """Count training time again."""
        self.pauses -= 1
        if not self.pauses:
            self.engine.alarm.last = self.clock.resume(self.engine.alarm.last)
        self.engine.alarm.set(self.engine.alarm.timers)
        self.engine.quiet_until = -1

    # Epochs

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch has to be opened before the next step."""
        return not self._is_open or self.engine.ended_epoch

    def next_epoch(self, turn: int) -> Pair | None:
        """Open the next epoch, or the same one after an interrupt.

        Returns the step that stands for an exception, or None.

        Raises:
            StopIteration: the run is over.
        """
        self.check(turn)
        if self.pending is not None:
            return self._error_step(self.pending)
        try:
            if self._is_open or self.engine.ended_epoch:
                self._end_epoch()
            if self.engine.ends.stop_reason is None:
                self._open_epoch(turn)
                return None
        except BaseException as exception:
            if not self.continues_after(exception, turn):
                raise
            return None
        if self._agreement is not None:
            self._agreement.discard()
        self._let_go()
        self._warn_of_uncounted()
        if self.stop_reason == "exhausted":
            step = self.engine.step
            warn(f"the dataloader is exhausted after global_step {step}, before the run's limit")
        raise StopIteration

    def _warn_of_uncounted(self) -> None:
        counters = self.engine.counters
        for name in self.schedule.counters:
            if counters[name].at < 0 and not counters[name].total:
                counted = [each for each, counter in counters.items() if counter.total]
                near = get_close_matches(name, counted, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                warn(f"nothing was counted of {name!r}, which an Event refers to{hint}")

    def _open_epoch(self, turn: int) -> None:
        engine, source, agreement = self.engine, self.source, self._agreement
        batches = source.open(engine.epoch, self._place(), engine)
        if not self.clock.ticking:
            self._start_clock()
        length = source.length
        if agreement is not None:
            end = agreement.open_epoch(engine.epoch, self._known_end(), engine.step)
            if end < NEVER:
                length = source.promised = end + 1 - engine.epoch_start
        if length == 0:
            raise errors.no_batch(engine.epoch, agreement is not None)
        is_over = False
        if engine.ends.needs_length:
            engine.ends.length = source.promised
            if source.promised is None:
                raise ValueError(
                    f"the length of epoch {engine.epoch} is not known, and every_n_epochs or "
                    "max_epochs is a fraction of it; pass dataloader_len"
                )
            is_over = engine.ends.last_step(engine.epoch, engine.epoch_start) <= engine.step
        if is_over:
            engine.ends.stop_reason = engine.ends.by_steps
        if turn != engine.turn:  # the loop was closed or restarted
            self.check(turn)
        if is_over or (length is not None and length <= engine.step + 1 - engine.epoch_start):
            batches = iter(())
        # If an interrupt strikes now, a single-pass source is opened again: it keeps its iterator
        self._is_open, self._was_left = not source.single_pass, False
        engine.begin_epoch(batches, length)
        self._is_open = True

    def _known_end(self) -> int:
        """Return the last step of the epoch that is opened, or NEVER if it is not known."""
        engine, source = self.engine, self.source
        if source.length is not None:
            return engine.epoch_start + source.length - 1
        left = source.batches_left()
        return NEVER if left is None else engine.step + len(engine.in_hand) + left

    def _place(self) -> int:
        """Return how many batches were taken: of the epoch, or of a single-pass source."""
        engine = self.engine
        return engine.step + 1 - (0 if self.source.single_pass else engine.epoch_start)

    def _start_clock(self) -> None:
        schedule, alarm, agreement = self.schedule, self.engine.alarm, self._agreement
        if schedule.timestamps:
            now = time_ns() if agreement is None else agreement.wall_time
            alarm.timers = alarm.timers.with_timestamps(schedule.times_of_launch(now))
        try:
            self.clock.start()
            alarm.last = self.clock.launched
        except Exception as exception:  # it is not the dataloader's, so it never becomes an event
            self._end_with(exception)
            raise

    def _end_epoch(self) -> None:
        """End the epoch, whether its last batch was known as such or not."""
        engine = self.engine
        if engine.ended_epoch:
            if engine.step == engine.agenda.epoch_last:  # the body did not end it earlier
                if self._agreement is not None:
                    self.source.drop_rest(engine.epoch, engine.step + 1 - engine.epoch_start)
                self.source.ask_once_more(engine.epoch)
        elif engine.ends.stop_reason is not None:
            return
        else:
            self._judge_end()
        self._is_open = False
        engine.end_epoch()

    def _judge_end(self) -> None:
        """Judge an epoch whose end was not known beforehand."""
        engine, source = self.engine, self.source
        if engine.agenda.interrupted_at == engine.step:
            raise errors.interrupted()
        taken = engine.step + 1 - engine.epoch_start
        source.judge_end(engine.epoch, taken)
        if source.single_pass:
            engine.ends.stop_reason = "exhausted"
        elif engine.epoch + 1 >= self.schedule.max_epochs:
            warn(f"the run has ended: epoch {engine.epoch}, its last, has no more batches")
            engine.ends.stop_reason = "max_epochs"

    # Errors

    def continues_after(self, error: BaseException, turn: int) -> bool:
        """Decide what an error of the source means.

        Returns True if the error is retried or raised later; False if it is to be raised now.
        """
        engine = self.engine
        if turn != engine.turn or self.error is not None:
            return False
        if not isinstance(error, Exception):
            self._reopen_later()
            self._on_leave(self)
            return False
        if self._was_left and not self.source.single_pass:
            self._was_left = False  # an interrupt may have ended the workers: try once more
            self._reopen_later()
            return True
        if self._on_exception:
            self.fail(error)
            return True
        signals = [reason for _, reason in engine.agenda.requests if reason not in (None, "stop")]
        if signals and self.source.has_workers():
            errors.annotate(
                error,
                f"{signals[0]} may have ended the dataloader's workers before the last step: pass "
                'on_exception="event" to have one more step after it',
            )
        self._end_with(error)
        return False

    def _reopen_later(self) -> None:
        """Let the epoch be opened again at this place; a single-pass source keeps its iterator."""
        engine = self.engine
        if engine.ended_epoch:
            return
        if self.source.keeps_iterator:
            ahead = len(engine.in_hand) + self.source.batches_ahead()
            engine.agenda.interrupted_at = engine.step + ahead
            if self._is_open:
                return
        if self.source.single_pass:
            engine.drop_iterator()
        else:
            engine.drop_batches()
        self._is_open = False
        self.source.prepare_to_reopen(engine.epoch, self._place())

    def fail_step(self, exception: BaseException, turn: int) -> None:
        """Note an exception in a decision: an Exception ends the run, an interrupt does not."""
        if turn != self.engine.turn:
            return
        if isinstance(exception, Exception):
            self._end_with(exception)
        else:
            self._on_leave(self)

    def fail(self, exception: Exception, in_body: bool = False) -> None:
        """End the run with an exception that has a step of its own, and is raised after it."""
        self._end_with(exception, leaves=False)
        self.pending = exception
        self._failed_in_body = in_body

    def _error_step(self, exception: Exception) -> Pair:
        """Return the step of an exception; the second time, raise the exception."""
        if self._has_error_step:
            self.pending = None
            self._on_leave(self)
            raise errors.not_stop(exception)
        self._has_error_step = True
        engine = self.engine
        requested, _ = engine.ends.of_requests(engine.agenda.requests)
        bits, _ = engine.ends.waits.settle(
            engine.step, requested | self._on_exception, engine.conditions.origins
        )
        return None, engine.sets.of(bits & self.schedule.event_bits)

    def _end_with(self, exception: Exception, leaves: bool = True) -> None:
        self.error = exception
        self.engine.ends.stop_reason = "exception"
        self._let_go(leaves)

    def _let_go(self, leaves: bool = True) -> None:
        self._is_open = False
        self.engine.end_body()
        self.engine.drop_batches()
        self.source.forget()
        if leaves:
            self._on_leave(self)

    # What is known of the run

    @property
    def state(self) -> LoopState:
        """The LoopState of the latest step."""
        return self.engine.latest_state()

    @property
    def stop_reason(self) -> str | None:
        """Why the run has ended, from its last step on."""
        return self.engine.ends.stop_reason

    def steps_to_come(self) -> int | None:
        """Return the number of steps to come; None if it is not known."""
        schedule, state = self.schedule, self.state
        if self.closed or self.stop_reason is not None:
            return 0
        if schedule.max_steps < NEVER:
            return schedule.max_steps - state.steps_done
        length = self.source.epoch_len()
        if schedule.max_epochs == NEVER or length is None:
            return None
        done = state.epoch * length + (length if state.epoch_end else state.epoch_step + 1)
        all_steps = steps_up_to(schedule.max_epochs, length)
        return all_steps - done if state.epoch_step < length else None

    def steps_to_next_event(self) -> int | None:
        """Return the number of steps to the next that is scheduled; None if there is none."""
        engine, ends = self.engine, self.schedule.ends(self.first_step)
        if self.closed or self.stop_reason is not None:
            return None
        step, epoch, start = engine.step, engine.epoch, engine.epoch_start
        ends.length, length, last = engine.ends.length, None, engine.agenda.epoch_last
        if self.is_between_epochs:
            ends.length = length = self.source.epoch_len()
            if not self.source.single_pass or self.source.length is not None:
                last = NEVER  # else a stream's end outlasts finish_epoch()
            if engine.ended_epoch:
                epoch, start = epoch + 1, step + 1
        # An agenda of its own: a question changes nothing
        agenda = _backend.core.Agenda(self.schedule, self.first_step, None)
        agenda.begin_epoch(step + 1, epoch, start, length, ends)
        due = min(agenda.next_due(step), last)
        return None if due >= NEVER - 1 else due - step

    def steps_since(self, name: Hashable) -> int:
        """Return the number of steps since the previous firing of a name."""
        engine = self.engine
        is_own = name in tuple(LoopEvents)
        begin = -1 if is_own else self.first_step - 1
        saved = self._position.windows.get(key_of(name), begin)
        return engine.step - max(saved, engine.sets.last_step(name, engine.step))

    def position(self, step_done: bool) -> Position:
        """Return where the run is: after the latest step, or before it or its list."""
        engine, position = self.engine, self._position
        is_done = step_done and not self._failed_in_body
        decided = engine.decided
        size = decided.size if decided.step == engine.step else 1
        undone = 0 if is_done or engine.step < self.first_step else size
        latest = engine.latest_state()
        epoch_steps = latest.epoch_step + 1 - undone
        epoch_end = latest.epoch_end and not undone
        steps = engine.step + 1 - undone
        timers_then, waiting = engine.alarm.timers, engine.ends.waits.waiting
        if undone and decided.step >= steps:
            timers_then, waiting = decided.timers, decided.waiting
        timers: dict[str, list[tuple[str, int]]] = {}
        for row, last in timers_then.saved():
            kind = "every" if row.period else "at"
            timers.setdefault(self._key_of(1 << row.owner), []).append((kind, last))
        waiting |= engine.ends.of_requests(engine.agenda.requests)[0]
        waiting = engine.ends.waits.open_at(steps - 1, waiting, engine.conditions.origins)
        waits: dict[str, list[bool]] = {}
        for wait in self.schedule.waits if waiting else ():
            waits.setdefault(self._key_of(wait.owner), []).append(bool(waiting & wait.bit))
        windows = dict(position.windows)
        for name in self.schedule.names.names:
            last_step = engine.sets.last_step(name, steps)
            if last_step >= 0:
                windows[key_of(name)] = last_step
            elif name in self.schedule.events:
                windows.setdefault(key_of(name), self.first_step - 1)
        done = steps if self.source.single_pass else epoch_steps
        ahead = undone + len(engine.in_hand) + self.source.batches_ahead()
        finished = None if undone else engine.ends.finished or position.finished
        agreed = 0 if self._agreement is None else self._agreement.now
        elapsed = max(self.clock.now(), agreed)
        latest_time = position.latest_time
        epoch_len, samples = position.epoch_len, position.samples_per_step
        if engine.step >= self.first_step:
            epoch_len, samples = None, 0
            if self.source.epoch == latest.epoch:  # else the next one was opened
                epoch_len, samples = self.source.promised, self.source.samples_per_step()
            read_at = self.clock.elapsed(engine.alarm.last) if self.schedule.timed else elapsed
            latest_time = 0 if undone else max(read_at, agreed)
        return position._replace(
            epoch=latest.epoch,
            epoch_steps=epoch_steps,
            steps=steps,
            epoch_end=epoch_end,
            epoch_len=epoch_len,
            samples_per_step=samples,
            elapsed=elapsed,
            latest_time=latest_time,
            finished=finished,
            timers=timers,
            waits=waits,
            counts={
                name: each.total if each.at < steps else each.before
                for name, each in engine.counters.items()
            },
            windows=windows,
            loader=self.source.state(done, ahead, latest.epoch, epoch_end),
        )


class WhileIterated:
    """Calls `on_leave(run)` when the iterator of a turn is freed, unless a newer one was made."""

    _turn = 0  # until __init__ has run: an interrupt may prevent it

    def __init__(self, run: Run, turn: int, on_leave: Callable[[Run], object]) -> None:
        self._run = run
        self._on_leave = on_leave
        self._turn = turn

    def __del__(self) -> None:
        if self._turn and self._turn == self._run.engine.turn:
            self._on_leave(self._run)
