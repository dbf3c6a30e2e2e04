"""One run: every step that takes a decision. The steps in between are the cores' own."""

from __future__ import annotations

from itertools import islice
from time import time as wall_time

from . import _backend, errors
from .missing import MISSING
from .timers import Timers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from typing import Any, Protocol

    from ._core import Clock, LoopState, Sizes, Token, Triggers
    from .agreement import Agreement, Delivered
    from .batch_lists import BatchLists
    from .schedule import Schedule
    from .source import Epoch, Source
    from .state import Position

    Pair = tuple[Any, frozenset[Hashable]]

    class Companion(Protocol):
        """What goes along with a run, and has a say at some of its steps."""

        next_step: int
        """The next step at which it wants to be asked."""

        def at_step(self, run: Run, step: int) -> None:
            """Called at that step or a later one, before it is handed over, perhaps twice."""

        def finish(self, run: Run) -> None:
            """Called once the last step of the run is done."""


NEVER = 2**63 - 1
LONGEST = 2**62
NO_BATCHES: Iterator[Any] = iter(())


class Run:
    """One run over a source, from its first batch, or a saved position, to its last.

    An iterator asks in two parts. `fetch` (`gather`, for a list) has the next batch in the
    stepper's queue. `hand_over` decides what is due at its step, and lets the step be done. Until
    then a step that is interrupted can be made again, with the batches that are in the queue.

    Args:
        schedule: what is due when, and the limits.
        source: opens epochs.
        clock: keeps training time.
        on_exception: the bits of the last step where an error becomes an event; 0 where none does.
        position: where to begin.
        agreement: lets all processes do the same; None where there is only this one.
        companions: what goes along with the run.

    Attributes:
        stop_reason: why the run ended; None before its last step.
        stop_asked: the reason and the bits that `ask_stop` was called with, or None.
        triggered: the bits that `trigger` was called with since the latest step.
        error: the exception that ended the run.
        pending: the same, until it was delivered as an event and raised.
        closed: whether the loop was closed.
    """

    def __init__(
        self,
        schedule: Schedule,
        source: Source,
        clock: Clock,
        on_exception: int,
        position: Position | None,
        agreement: Agreement | None,
        companions: tuple[Companion, ...],
    ) -> None:
        self._core = core = _backend.core
        steps = 0 if position is None else position.steps
        epoch = 0 if position is None else position.epoch
        first = 0 if position is None else steps - position.epoch_steps
        epoch_end = position is not None and position.epoch_end
        lasts = [-1] * len(schedule.times) if position is None else schedule.timers_from(position)
        self.schedule = schedule
        self.source = source
        self._launch = steps  # the first step of this launch
        self.on_exception = on_exception
        self.clock = clock
        self.agreement = agreement
        self._companions = companions
        self.timers = self._timers_before = Timers(schedule.times, tuple(lasts), steps)
        self._timers_at = -1  # the step before which `_timers_before` held
        conditions = schedule.conditions, schedule.stop_conditions
        self._decision_bits = schedule.decision_bits
        if agreement is not None:  # what a condition asks for comes later, stop_when too
            conditions = [*schedule.stop_conditions, *schedule.conditions], []
            self._decision_bits |= agreement.condition_bits
        self.stepper = core.Stepper(
            self._new_triggers(steps, first),
            core.Conditions(*conditions, schedule.blame),
            schedule.event_sets(),
            clock,
            schedule.timed,
            self._decision_bits,
            core.LoopState(epoch, steps - 1, steps - 1 - first, epoch_end, False, -1, clock),
        )
        self._epoch: Epoch | None = None  # the open one
        self._epoch_last = NEVER  # its last step, where that is known
        self._settled = 0  # the batches of the queue whose conditions were asked, and do not hold
        # What ends the run after the batches of the queue, and whether the source raised it
        self._deferred: tuple[Exception, bool] | None = None
        self.stop_reason: str | None = None
        self.stop_asked: tuple[str, int] | None = None
        self.triggered: list[int] = []
        if position is not None and position.asked:
            wanted = schedule.bits_of(position.asked)
            if agreement is None:
                self.triggered.append(wanted)
            else:
                agreement.want(steps, wanted)
        self._pauses: list[object] = []  # the contexts in which the clock stands still
        self.error: Exception | None = None
        self.pending: Exception | None = None
        self._delivered = False  # whether the pending exception was, as an event
        self.closed = False
        self._finished = False

    def _new_triggers(self, step: int, epoch_start: int) -> Triggers:
        schedule = self.schedule
        return self._core.Triggers(
            schedule.steps,
            schedule.launch_steps,
            schedule.epoch_steps,
            self._decision_bits,
            self._launch,
            step,
            epoch_start,
        )

    # Entering and leaving

    def enter(self, sizes: Sizes | None, keep_alive: object) -> Iterator[Any]:
        """A new iterator, in place of the current one: over lists where there are `sizes`."""
        stepper = self.stepper
        self.check(stepper.token)
        if self.stop_reason is not None and self.pending is None:
            raise errors.finished()
        iterator = (
            stepper.steps(self, keep_alive)
            if sizes is None
            else stepper.lists(self, sizes, keep_alive)
        )
        if self._epoch is not None:
            self._epoch.was_left = True
        return iterator

    def leave(self) -> None:
        """Let go of the source, and let every iterator be one that was replaced."""
        self.stepper.token.set_back()
        self.stepper.token = self._core.Token()
        self._let_go()
        if self.agreement is not None:
            self.agreement.discard()

    def close(self) -> None:
        """Let go of the source; no iterator goes on from here."""
        self.closed = True
        self.leave()

    def ask_stop(self, reason: str, bits: int) -> None:
        """Let the next step be the last, with the events of `bits` among its own."""
        if self.stop_asked is None or (bits and not self.stop_asked[1]):
            self.stop_asked = reason, bits
        self.stepper.token.set_back()

    def take_over(self, other: Run) -> None:
        """Let what another run was asked for before its first step be asked of this one."""
        self.stop_asked = other.stop_asked
        self.triggered = other.triggered

    def trigger(self, bit: int) -> None:
        """Let the event of this bit be due at the next step too."""
        self.triggered.append(bit)
        self.stepper.token.set_back()

    def pause_clock(self, context: object) -> None:
        """Let training time stand still within this context."""
        if not self._pauses and self.clock.ticking:
            self.stepper.token.set_back()
            self.clock.pause()
        self._pauses.append(context)

    def end_pause(self, context: object) -> None:
        """Let training time go on, unless another context holds it."""
        if context in self._pauses:
            self._pauses.remove(context)
            if not self._pauses:
                self.clock.go_on()

    def fail(self, exception: Exception) -> None:
        """End the run with an error that is delivered as an event, and then raised."""
        self._end_with(exception)
        self.pending = exception

    def fail_to_begin(self, exception: Exception) -> None:
        """End the run with what the source raised before the first step."""
        self._end_by(exception, True)

    def check(self, token: Token) -> None:
        """Raise where the iterator of `token` may not go on."""
        if self.closed:
            self._let_go()
            raise errors.closed()
        if token is not self.stepper.token:
            raise errors.replaced()
        if self.error is not None and self.pending is None:
            raise errors.failed(self.error)

    # The next batch

    def fetch(self, token: Token) -> int:
        """Prepare the next step.

        Returns 1 where its batch, or the pending exception, is ready for `hand_over`; 0 where the
        run is over; -1 where an epoch was opened whose first step the core makes on its own.
        """
        self.check(token)
        if self._pauses or self.clock.paused is not None:
            self._pauses.clear()
            self.clock.go_on()
        if self.pending is not None:
            return self._deliver(self.pending)
        if self.stop_reason is not None:
            self._finish()
            return 0
        if self.stepper.queue:
            return 1
        if self._deferred is not None:
            return self._end_by(*self._deferred)
        try:
            while True:
                # no local name for the epoch: that would keep its workers
                opens = self._epoch is None or self._epoch.over
                if opens:
                    self._open_epoch(token)
                if not self.clock.ticking:
                    self._start_clock()
                    self.check(token)
                if opens and self._core_goes_on(token):
                    return -1
                if self._fetch(token) or self.stepper.queue:
                    if token is not self.stepper.token:
                        self.check(token)
                    return 1
                self.stop_reason = self._end_unforeseen()
                if self.stop_reason is not None:
                    self._finish()
                    return 0
        except BaseException as exception:
            if not self._goes_on_after_source(token, exception):
                raise
        return self.fetch(token)  # not in `except`: the exception is no context of what this raises

    def _start_clock(self) -> None:
        schedule = self.schedule
        if schedule.timestamps:
            lasts = self.timer_lasts(True) + (-1,) * len(schedule.timestamps)
            rows = schedule.times_of_launch(wall_time())
            self.timers = self._timers_before = Timers(rows, lasts, self._launch)
        try:
            self.clock.start()
        except Exception as exception:  # not of the source, and never an event
            self._end_with(exception)
            raise

    def _core_goes_on(self, token: Token) -> bool:
        """Set how far the core goes on its own. Whether that is at least the next step."""
        stepper = self.stepper
        token.quiet_until = -1
        token.until, stepper.next_reading = self._next_decision(stepper.step, self.timers)
        if self.stop_asked is not None or self.triggered:
            token.set_back()
        return stepper.step < token.until

    def _is_asked(self) -> bool:
        """Whether the next step has to do what `stop` or `trigger` asked for."""
        return self.agreement is None and (self.stop_asked is not None or bool(self.triggered))

    def _fetch(self, token: Token) -> bool:
        """Have one more batch of the epoch in the queue. False where it has no more."""
        stepper = self.stepper
        if self._epoch is not None and self._epoch.must_reopen:
            self._open_epoch(token)
        epoch = self._epoch
        assert epoch is not None
        if self._epoch_last <= stepper.step:  # resumed beyond the length that it has now
            return False
        try:
            for batch in stepper.batches:
                stepper.queue = [*stepper.queue, batch]
                if epoch.lists is None:
                    epoch.was_interrupted = False
                else:
                    self._judge_lists(epoch, epoch.lists)
                return True
        except BaseException as exception:
            self._note_interrupt(exception)
            raise
        last = stepper.step + 1 + len(stepper.queue)
        if epoch.lists is not None:
            self._judge_lists(epoch, epoch.lists)
        holds_last = epoch.end_finder is not None and epoch.end_finder.held is not MISSING
        has_held = self._queue_held(epoch)
        if epoch.was_interrupted and not (has_held and epoch.tells_its_last):
            if not has_held:
                epoch.was_interrupted = False
                raise errors.interrupted()
        elif holds_last:
            self._epoch_last = last
        elif not has_held:
            stepper.batches = NO_BATCHES
            epoch.was_left = False  # what follows is no error of the source
        return has_held

    def _judge_lists(self, epoch: Epoch, lists: BatchLists) -> None:
        """Learn from the lists of an epoch whether it goes on, or ends before its last step."""
        if epoch.went_on(lists):
            epoch.was_interrupted = False
        if lists.fell_short:  # that will be an error
            self._epoch_last = NEVER

    def _end_unforeseen(self) -> str | None:
        """Let the epoch be over, whose end nobody foresaw. The reason, if the run is over too."""
        epoch = self._epoch
        assert epoch is not None
        stepper = self.stepper
        step = stepper.step
        taken = step + 1 - stepper.epoch_start if epoch.lists is None else epoch.lists.given
        if not self.source.has_next_epoch(epoch, taken, step):
            return "exhausted"
        if stepper.epoch + 1 >= self.schedule.max_epochs:
            self.source.warn_no_batches_left(epoch, taken)
            return "max_epochs"
        epoch.over = True
        epoch.ends_itself = False  # that has been seen
        return None

    def _open_epoch(self, token: Token) -> None:
        """Open the next epoch, or the same one anew."""
        stepper = self.stepper
        epoch = self._epoch
        was_left = False
        if epoch is not None and epoch.over:
            was_left = epoch.was_left
            self._leave_epoch(epoch)
            if token is not stepper.token:
                self.check(token)
            epoch = None
        size = self.source.batches_per_step or 1
        taken = (stepper.step + 1 - stepper.epoch_start) * size
        if epoch is not None:
            taken += self.fetched_ahead()
            self.source.prepare_to_reopen(stepper.epoch, taken)
            epoch.was_left = False
        stepper.batches = NO_BATCHES
        opened = self.source.open_epoch(stepper.epoch, taken, was_left)
        if epoch is not None:
            held = opened.go_on_from(epoch)
            if held is not MISSING:
                stepper.queue = [*stepper.queue, held]
        stepper.triggers.next_epoch(stepper.step + 1, stepper.epoch_start)
        stepper.batches = opened.batches
        length = opened.length
        self._epoch_last = NEVER
        if length is not None:
            self._epoch_last = stepper.epoch_start - (-length // size) - 1
        self._epoch = opened
        if token is not stepper.token:
            self.check(token)

    def _queue_held(self, epoch: Epoch) -> bool:
        """Put the batch that was fetched ahead, if there is one, into the queue."""
        held = epoch.take_held()
        if held is MISSING:
            return False
        self.stepper.queue = [*self.stepper.queue, held]
        return True

    def _leave_epoch(self, epoch: Epoch) -> None:
        """Go on to the next epoch. The old iterator is asked once more, as a `for` does."""
        stepper = self.stepper
        stepper.latest_state()  # it is kept, still with the old epoch
        stepper.epoch += 1
        stepper.epoch_start = stepper.step + 1
        self._epoch = None
        if epoch.ends_itself:
            self.source.ask_once_more(epoch)

    def _finish(self) -> None:
        """End the run after its last step."""
        if self._finished:
            return
        self._finished = True
        epoch = self._epoch
        try:
            if epoch is not None and epoch.over:
                self._leave_epoch(epoch)
            if self.agreement is not None:
                self.agreement.discard()
            for companion in self._companions:
                companion.finish(self)
        except Exception as exception:
            self._end_with(exception)
            raise
        finally:
            self._let_go()
            self.source.forget()

    def fail_step(self, token: Token, exception: BaseException) -> None:
        """Undo the step that was being made, for an exception that the source did not raise.

        An Exception ends the run.
        """
        if self._undo_step(token) and isinstance(exception, Exception):
            self._end_with(exception)

    def goes_on_after_fetch(self, token: Token, exception: BaseException) -> bool:
        """Whether the run goes on after an exception that came out of a core's fetch."""
        if token is self.stepper.token:
            self._note_interrupt(exception)
        return self._goes_on_after_source(token, exception)

    def _goes_on_after_source(self, token: Token, exception: BaseException) -> bool:
        """Whether the run goes on after what the source raised: not believed, or raised later."""
        if not self._undo_step(token) or not isinstance(exception, Exception):
            return False
        if self.error is not None:  # the clock's, which has ended the run
            return False
        epoch = self._epoch
        error = exception
        if epoch is not None and not epoch.over:
            if epoch.was_left and not self.source.single_pass:
                epoch.must_reopen = True
                return True
            if epoch.lists is not None:
                self._judge_lists(epoch, epoch.lists)
            if epoch.was_interrupted:
                error = errors.interrupted()
                error.__cause__ = exception
            self._queue_held(epoch)
            self._epoch_last = NEVER  # what comes before an error is no epoch's end
        self._deferred = error, True
        return True

    def _undo_step(self, token: Token) -> bool:
        """Let the step that was being made be made again.

        False where that is none of this run's: an older iterator is collected, or the loop closed.
        """
        stepper = self.stepper
        if token is not stepper.token:
            return False
        token.set_back()
        stepper.reading = None
        stepper.triggers.schedule(stepper.step + 1, stepper.epoch_start)
        epoch = self._epoch
        if epoch is not None:
            stepper.batches = epoch.go_on()
        return True

    def _note_interrupt(self, exception: BaseException) -> None:
        """Take note of an interrupt of a fetch. It may have cost a batch, or the iterator."""
        epoch = self._epoch
        if isinstance(exception, Exception) or epoch is None:  # the source has closed the loop
            return
        if not errors.is_from_outside(exception):
            return
        if self.source.single_pass:
            epoch.note_interrupt()
        else:
            epoch.must_reopen = True

    def _end_with(self, exception: Exception) -> None:
        self.error = exception
        self.stop_reason = "exception"
        self._let_go()
        self.source.forget()

    def _let_go(self) -> None:
        stepper = self.stepper
        stepper.token.set_back()
        stepper.batches = NO_BATCHES
        stepper.queue = []
        stepper.answers = None
        self._epoch = None
        self._settled = 0

    def _end_by(self, error: Exception, by_source: bool) -> int:
        """End the run with an error, once all batches from before it were handed over."""
        if not (by_source and self.on_exception):
            self._end_with(error)
            raise error
        self.fail(error)
        return 1

    def _deliver(self, exception: Exception) -> int:
        """Let an exception be delivered as an event; or, where it was, raise it."""
        if not self._delivered:
            return 1
        self.pending = None
        raise errors.not_stop(exception)

    # Lists

    def gather(self, token: Token, sizes: Sizes) -> int:
        """Have the batches of the next list in hand. Returns how many, or what `fetch` does."""
        in_hand = self.fetch(token)
        if in_hand <= 0 or self.pending is not None:
            return in_hand
        stepper = self.stepper
        foreseen = min(stepper.triggers.next_due(), self.schedule.max_steps - 1, self._epoch_last)
        if self.agreement is not None:
            foreseen = min(foreseen, self.agreement.at_or_after(stepper.step + 1))
        size = self._core.fitting(sizes, foreseen - stepper.step)
        while not self._is_asked():
            if not self._settle(token, size - 1):
                size = self._settled + 1
                break
            if self._deferred is not None or len(stepper.queue) >= size:
                break
            try:
                self.check(token)
                if not self._fetch_several(token, size):
                    break
                self.check(token)
            except BaseException as exception:
                if not self._goes_on_after_source(token, exception):
                    raise
        if self._is_asked():
            return 1
        return self._core.fitting(sizes, min(size, len(stepper.queue)))

    def _settle(self, token: Token, count: int) -> bool:
        """Ask the conditions of the first `count` steps in the queue, as long as none holds.

        False where the list has to end with the first whose step is not settled.
        """
        stepper = self.stepper
        conditions = stepper.conditions
        while self._settled < min(count, len(stepper.queue)):
            step = stepper.step + 1 + self._settled
            if step == self._epoch_last or stepper.answers is not None:
                return False
            if conditions.start <= step < conditions.stop:
                try:
                    found, _ = conditions.ask(stepper.state_at(step, False, False, -1), False)
                except BaseException as exception:
                    if self._defers(token, exception):
                        return True
                    self.fail_step(token, exception)
                    raise
                if found and self.agreement is None:
                    stepper.answers = found, None
                    return False
                if self.agreement is not None:
                    self.agreement.want(step, found)
            self._settled += 1
        return True

    def _fetch_several(self, token: Token, size: int) -> bool:
        """Have more batches in the queue, up to `size`, or up to the next that has a condition."""
        if not self._fetch(token):
            return False
        stepper = self.stepper
        latest = stepper.step + len(stepper.queue)
        more = min(size - len(stepper.queue), self._epoch_last - latest)
        if latest < stepper.conditions.stop:
            more = min(more, stepper.conditions.start - latest)
        if more > 0:
            try:
                stepper.queue.extend(islice(stepper.batches, more))
            except BaseException as exception:
                self._note_interrupt(exception)
                raise
            if stepper.step + len(stepper.queue) < latest + more:
                stepper.batches = NO_BATCHES
            if self._epoch is not None and self._epoch.lists is not None:
                self._judge_lists(self._epoch, self._epoch.lists)
        return True

    def _defers(self, token: Token, exception: BaseException) -> bool:
        """Whether what a condition raised comes later, after the batches that are settled."""
        stepper = self.stepper
        if token is not stepper.token or not isinstance(exception, Exception):
            return False
        if not self._settled:
            return False
        self._deferred = exception, False
        stepper.queue = stepper.queue[: self._settled]
        return True

    # The decision

    def hand_over(self, token: Token, sizes: Sizes | None, count: int) -> Pair:
        """Decide what is due at the next step, or the last of `count`, and hand over its batch.

        A list of batches where there are `sizes`.
        """
        if self.pending is not None:
            self._delivered = True
            bits = self.on_exception | (self.stop_asked[1] if self.stop_asked else 0)
            for bit in self.triggered:
                bits |= bit
            return None, self.stepper.sets.of(bits)
        try:
            return self._decide(token, sizes, count)
        except BaseException as exception:
            self.fail_step(token, exception)
            raise

    def _decide(self, token: Token, sizes: Sizes | None, count: int) -> Pair:
        stepper = self.stepper
        schedule = self.schedule
        step = stepper.step + count
        epoch_end = step == self._epoch_last
        now = launch_now = -1
        if stepper.timed:
            if stepper.reading is None:
                stepper.reading = self.clock.tick()
            now = self.clock.elapsed(stepper.reading)
            launch_now = stepper.reading - self.clock.launched

        # What is due, but for conditions, and why the run ends here
        triggers = stepper.triggers
        bits = triggers.bits_at(step)
        if epoch_end:
            bits |= schedule.on_epoch_end(stepper.epoch, step)
        timers = self.timers
        agreement = self.agreement
        delivered: Delivered | None = None
        is_agreement = False
        may_be_due = False
        triggered = 0
        if agreement is None:
            may_be_due = (
                now >= timers.next_time
                or launch_now >= timers.next_launch_time
                or step >= timers.next_start
            )
            if may_be_due:
                bits |= timers.due_at(step, (now, launch_now))
            triggered = len(self.triggered)
            if triggered:
                for bit in self.triggered[:triggered]:
                    bits |= bit
            asked_stop = self.stop_asked
            reason = self._limit_reached(step, epoch_end, now)
        else:
            reason = self._limit_reached(step, epoch_end, -1)
            is_agreement = step == agreement.at_or_after(step)
            if is_agreement or reason is not None:
                delivered = agreement.collect(step, timers, stepper.sets)
            if delivered is not None:
                bits |= delivered.bits
                if delivered.out_of_time:
                    reason = "max_seconds"
            asked_stop = None if delivered is None else delivered.stop
        if asked_stop is not None:
            reason = asked_stop[0]

        # Conditions, which are told of it
        conditions = stepper.conditions
        state: LoopState | None = None
        found = 0
        if self._settled == count - 1 and stepper.answers is not None:
            found, state = stepper.answers
        elif self._settled < count and conditions.start <= step < conditions.stop:
            state = stepper.state_at(step, epoch_end, reason is not None, now)
            try:
                found, state = conditions.ask(state, bool(bits & schedule.stop_bit))
            except Exception as exception:
                if not self._defers(token, exception):
                    raise
                assert sizes is not None
                return self._decide(token, sizes, self._core.fitting(sizes, self._settled))
        if agreement is None:
            bits |= found
        else:
            agreement.want(step, found)
        stops = bool(bits & schedule.stop_bit)
        if stops:
            reason = "stop_when" if asked_stop is None else reason
        if reason is not None:
            bits |= schedule.on_training_end
            if asked_stop is not None:
                bits |= asked_stop[1]
            if reason == "exhausted":
                self.source.warn_ran_dry(step)
        if agreement is not None and stepper.timed:
            timers = timers.after_agreement(step, (now, launch_now), bits, delivered)
        elif may_be_due or bits & schedule.timer_bits:
            timers = timers.after(step, (now, launch_now), bits)
        if stops:
            bits ^= schedule.stop_bit
        events = stepper.sets.of(bits)
        if agreement is not None and is_agreement and reason is None:
            if delivered is not None:
                for bit in [*self.triggered]:
                    if bit & delivered.triggered:
                        self.triggered.remove(bit)
            out_of_time = now >= schedule.max_time
            rows = timers.to_ask_for(step, (now, launch_now))
            agreement.ask(step, self.stop_asked, out_of_time, self.triggered, rows)
        if self._companions:
            for companion in self._companions:
                if step >= companion.next_step:
                    companion.at_step(self, step)
        if token is not stepper.token:
            self.check(token)

        # What comes next
        if bits:
            triggers.advance(step)
            stepper.sets.mark(events, step)
        queue = stepper.queue
        rest = queue[count:]
        until, next_reading = -1, NEVER
        epoch = self._epoch
        assert epoch is not None
        is_broken = epoch.must_reopen or epoch.was_interrupted
        if not (epoch_end or reason or rest or is_broken or self._deferred):
            until, next_reading = self._next_decision(step, timers)
        settled, answers = 0, None
        if self._settled >= count:
            settled, answers = self._settled - count, stepper.answers

        # From here on nothing is called: the step is done as a whole
        pair = (queue[0] if sizes is None else queue[:count]), events
        if timers is not self.timers:
            self._timers_before, self.timers, self._timers_at = self.timers, timers, step
        if stepper.reading is not None:
            self.clock.last = stepper.reading
            stepper.reading = None
        stepper.step = step
        stepper.size = count
        if epoch_end:
            stepper.epoch_end = step
            epoch.over = True
        if reason is not None:
            stepper.training_end = step
            self.stop_reason = reason
        if state is not None:
            stepper.state = state
        stepper.queue = rest
        stepper.answers = answers
        self._settled = settled
        stepper.next_reading = next_reading
        token.quiet_until = -1
        token.until = until
        if triggered:
            del self.triggered[:triggered]
        # More may have been asked meanwhile
        if agreement is None and (self.triggered or self.stop_asked is not asked_stop):
            token.until = -1
        return pair

    def _next_decision(self, step: int, timers: Timers) -> tuple[int, int]:
        """After `step`, up to which step and reading the core goes on without a decision."""
        until = min(self._epoch_last, self.schedule.max_steps - 1, timers.next_start) - 1
        if self._companions:
            until = min(until, *[companion.next_step - 1 for companion in self._companions])
        if self.agreement is not None:
            return min(until, self.agreement.at_or_after(step + 1) - 1), NEVER
        if not self.stepper.timed:
            return until, NEVER
        clock = self.clock
        reading = clock.reading_at(min(timers.next_time, self.schedule.max_time))
        return until, min(reading, clock.launched + min(timers.next_launch_time, LONGEST))

    def _limit_reached(self, step: int, epoch_end: bool, now: int) -> str | None:
        """The reason why the run ends at this step, if a limit is reached."""
        schedule = self.schedule
        if step == schedule.max_steps - 1:
            return "max_steps"
        by_time = "max_seconds" if now >= schedule.max_time else None
        if not epoch_end:
            return by_time
        if self.stepper.epoch + 1 >= schedule.max_epochs:
            return "max_epochs"
        assert self._epoch is not None
        if self.source.single_pass and isinstance(self._epoch.end_finder, self._core.Lookahead):
            return by_time or "exhausted"
        return by_time

    # What is asked of a run

    def steps_to_come(self) -> int | None:
        """The number of steps still to come; None where it is not known."""
        stepper = self.stepper
        schedule = self.schedule
        if self.closed or self.stop_reason is not None:
            return 0
        epoch_len = self.source.epoch_len()
        if epoch_len is not None:
            epoch_len = self.source.steps_in(epoch_len)
        in_epoch = stepper.step - stepper.epoch_start + 1
        if schedule.max_steps < NEVER:
            return schedule.max_steps - stepper.step - 1
        if schedule.max_epochs < NEVER and epoch_len is not None and in_epoch <= epoch_len:
            return (schedule.max_epochs - stepper.epoch) * epoch_len - in_epoch
        return None

    def latest_elapsed(self) -> float:
        """The training time, in seconds, of the latest step that has read the clock."""
        clock = self.clock
        return (clock.elapsed(clock.last) if clock.ticking else clock.saved) / 1e9

    # What a saved state holds

    def fetched_ahead(self) -> int:
        """How many batches were fetched and not handed over."""
        queue = self.stepper.queue
        queued = len(queue) if self.source.batches_per_step is None else sum(map(len, queue))
        return queued + (0 if self._epoch is None else self._epoch.fetched_ahead())

    def is_out_of_time(self) -> bool:
        """Whether the latest step came when the time was up, or later."""
        if self.agreement is not None:
            return self.stop_reason == "max_seconds"
        clock = self.clock
        return clock.elapsed(clock.last) >= self.schedule.max_time

    def time_to_save(self) -> int:
        """The training time now. It is no less than what all processes have agreed upon."""
        now = self.clock.now()
        if self.agreement is None:
            return now
        agreed = self.schedule.max_time if self.stop_reason == "max_seconds" else 0
        return max(now, agreed, *self.timer_lasts(True))

    def timer_lasts(self, step_done: bool) -> tuple[int, ...]:
        """When each timer was last due, or -1; before the latest step, unless that is done.

        What belongs to the launch counts as never due.
        """
        undone = not step_done and self._timers_at == self.stepper.step
        lasts = (self._timers_before if undone else self.timers).lasts
        # zip leaves out those of at_timestamp
        return tuple(
            [-1 if row.per_launch else last for row, last in zip(self.schedule.times, lasts)]
        )

    def steps_to_next_event(self, epoch_len: int | None) -> int | None:
        """The steps up to the next for which anything is scheduled; None if there is none.

        Epochs that were not opened yet are taken to have `epoch_len` batches.
        """
        if self.closed or self.stop_reason is not None:
            return None
        stepper = self.stepper
        schedule = self.schedule
        triggers = stepper.triggers
        epoch = self._epoch
        over = epoch is not None and epoch.over
        first = stepper.step + 1 if over else stepper.epoch_start
        if epoch is not None:
            epoch_len = epoch.length
        if epoch_len is not None:
            epoch_len = self.source.steps_in(epoch_len)
        if epoch is None or over:
            triggers = self._new_triggers(stepper.step + 1, first)
        epoch_last = NEVER if epoch_len is None else first + epoch_len - 1
        if epoch_last <= stepper.step:
            epoch_last = NEVER
        due = min(triggers.next_due(), schedule.max_steps - 1, epoch_last)
        return None if due >= NEVER - 1 else due - stepper.step
