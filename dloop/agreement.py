"""What the processes of one training agree upon, so that all of them do it at the same step."""

from __future__ import annotations

from . import checks, state
from .errors import LoopError
from .events import Event, LoopEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from typing import Any, Protocol

    from ._core import EventSets
    from .events import BaseEvent
    from .schedule import Schedule
    from .timers import Timers

    class Exchange(Protocol):
        """The element-wise maximum of a list of ints over all processes, in two parts."""

        def start(self, values: list[int], /) -> object:
            """Begin it; no other is under way."""

        def finish(self) -> Sequence[int]:
            """Wait for all processes, and return the maximum."""
            ...


NEVER = 2**63 - 1


class AtOnce:
    """An exchange that a plain callable makes, while the process waits."""

    def __init__(self, maximum: Callable[[list[int]], Sequence[int]]) -> None:
        self._maximum = maximum
        self._values: Sequence[int] = ()

    def start(self, values: list[int]) -> None:
        """Make it."""
        self._values = self._maximum(values)

    def finish(self) -> Sequence[int]:
        """What came of it."""
        return self._values


class Delivered:
    """What the processes have agreed to do at a step.

    Attributes:
        bits: the events that are due.
        stop: the reason and the bits with which the run ends here, or None.
        out_of_time: whether a process has reached `max_seconds`.
        triggered: the bits of the events that were triggered by hand.
        rows: for each time criterion whether it is due; for points how many of them were reached.
    """

    __slots__ = ("bits", "out_of_time", "rows", "stop", "triggered")

    def __init__(
        self,
        bits: int,
        stop: tuple[str, int] | None,
        out_of_time: bool,
        triggered: int,
        rows: Sequence[int],
    ) -> None:
        self.bits = bits
        self.stop = stop
        self.out_of_time = out_of_time
        self.triggered = triggered
        self.rows = rows


class Agreement:
    """Asks all processes, at every n-th step, and delivers at the n-th step after that.

    A step at which it does so is an agreement. What is delivered there is the maximum of what all
    processes asked at the one before. So it is the same everywhere, and nobody waits for it.

    Args:
        exchange: makes the maximum.
        every: how many steps lie from one agreement to the next.
        schedule: what is due when.
        batches_per_step: the argument of this name.
        step: the first step.

    Attributes:
        condition_bits: the bits of the events that have a condition.
    """

    def __init__(
        self,
        exchange: Exchange,
        every: int,
        schedule: Schedule,
        batches_per_step: int | None,
        step: int,
    ) -> None:
        self._exchange = exchange
        self._every = every
        self._schedule = schedule
        self._batches_per_step = batches_per_step
        self._first = step
        # By agreement, the bits of the events whose conditions ask there
        self._wanted: dict[int, int] = {}
        rows = (*schedule.conditions, *schedule.stop_conditions)
        self._condition_places = sorted({row[0] for row in rows})
        self.condition_bits = sum(1 << place for place in self._condition_places)
        self._bits_of_names = {
            _number_of(_key_of(name)): schedule.bit_of(name) for name in schedule.events
        }
        self._numbers: list[int] = []  # those of all names that any process has
        self._knows_numbers = False
        self._is_compared = False
        self._in_flight: str | None = None  # what the exchange that is under way is about
        self._size = 0  # how many ints it has
        self._answer: object = None  # of that exchange, up to when it was read
        self._result: Sequence[int] | None = None  # of an exchange that was finished early
        self._asked_at = self._collected_at = -1  # the steps of the latest
        self._collected: Sequence[int] | None = None
        self._epoch = -1  # the latest whose length was agreed upon
        self._length: int | None = None  # its length
        self._lengths_are_known = True

    # Before the first step

    def compare(self, over: bool) -> None:
        """Let all processes begin, or none.

        Raises:
            LoopError: their steps, limits or events differ, or one of them has nothing to do.
        """
        if not self._is_compared:
            self._compare(over)
        while not self._knows_numbers:  # one by one, the greatest first
            latest = self._numbers[-1] if self._numbers else NEVER
            rest = [number for number in self._bits_of_names if number < latest]
            (number,) = self._at_once("names", [max(rest, default=0)])
            if number:
                self._numbers.append(number)
            else:
                self._knows_numbers = True

    def _compare(self, over: bool) -> None:
        name, limit = self._schedule.limit
        kinds = ("max_steps", "max_epochs", "max_seconds")
        shared = [
            [_key_of(name), state.described(event)]
            for name, event in events_to_agree_upon(self._schedule).items()
        ]
        moments = [len(moments) for _, moments, _, _ in self._schedule.timestamps]
        own = {
            "global_step": self._first,
            "kind of limit": kinds.index(name),
            name: limit,
            "sync_every": self._every,
            "batches_per_step": self._batches_per_step or 0,
            "run that is over": int(over),
            "number of events with a clock or a condition": len(shared),
            "definition of these events": _number_of([shared, moments]),
        }
        values = [value for each in own.values() for value in (each, -each)]
        most = self._at_once("begin", values)
        self._is_compared = True
        unit = 10**9 if name == "max_seconds" else 1
        units = {"global_step": 1, "sync_every": 1, name: unit}
        differing = [
            f"{title} ({-low / units[title]:.15g} to {high / units[title]:.15g})"
            if title in units
            else title
            for title, high, low in zip(own, most[::2], most[1::2])
            if high != -low
        ]
        if differing:
            raise LoopError(f"sync: the processes differ in their {', '.join(differing)}")

    # At each epoch's start

    def epoch_length(self, epoch: int, length: int | None) -> int | None:
        """The batches of an epoch: those of the process that has the fewest.

        Args:
            epoch: which epoch.
            length: how many this process has; None where it does not know.

        Returns None where that is not known everywhere: each process then has epochs of its own.

        Raises:
            LoopError: it is not known everywhere, and the limit counts epochs.
        """
        if not self._lengths_are_known:
            return length
        if epoch != self._epoch:
            if self._in_flight == "step":  # one at a time
                self._result = self._finish()
            unknown, least = self._at_once("epoch", [int(length is None), -(length or 0)])
            self._lengths_are_known = not unknown
            self._epoch, self._length = epoch, -least
        if self._lengths_are_known:
            return self._length
        if self._schedule.limit[0] == "max_epochs":
            raise LoopError(
                f"sync: a process does not know how many batches epoch {epoch} has; pass "
                "dataloader_len, or a limit of steps or seconds"
            )
        return length

    # At agreements

    def at_or_after(self, step: int) -> int:
        """The first agreement from `step` on."""
        return step + -(step + 1) % self._every

    def want(self, step: int, bits: int) -> None:
        """Take note of the events whose conditions hold at `step`."""
        if bits:
            place = self.at_or_after(step)
            old = [each for each in self._wanted if each < place - self._every]
            for each in old:
                del self._wanted[each]
            self._wanted[place] = self._wanted.get(place, 0) | bits

    def wanted(self, step: int) -> int:
        """The bits of those that were not delivered up to `step`.

        They are delivered at the next agreement, or at a limit's last step before it.
        """
        bits = 0
        for place, wanted in self._wanted.items():
            is_delivered = place + self._every <= step or place < self._collected_at <= step
            if not is_delivered:
                bits |= wanted
        return bits

    def collect(self, step: int, timers: Timers, sets: EventSets) -> Delivered | None:
        """What all processes are to do at `step`; the same if that step is made again.

        A timer that was asked for does not come where its name was due since.
        """
        if self._collected_at != step:
            self._collected = self._take()
            self._collected_at = step
        if self._collected is None:
            return None
        stop_code, out_of_time, *values = self._collected
        end = len(timers.lasts)
        rows = values[:end]
        for number, row in enumerate(self._schedule.times):
            name = self._schedule.name_of_timer(number)
            if row.period and name is not None and sets.last_step(name, step) > self._asked_at:
                rows[number] = 0
        bits = timers.bits_of(rows)
        for place, holds in zip(self._condition_places, values[end:]):
            bits |= holds << place
        triggered = 0
        for number, is_asked in zip(self._numbers, values[end + len(self._condition_places) :]):
            triggered |= self._bits_of_names.get(number, 0) * is_asked
        bits |= triggered
        return Delivered(bits, self._stop_of(stop_code), bool(out_of_time), triggered, rows)

    def ask(
        self,
        step: int,
        stop: tuple[str, int] | None,
        out_of_time: bool,
        triggered: list[int],
        rows: list[int],
    ) -> None:
        """Ask all processes for what this one wants to be done; once, if the step is made again.

        Args:
            step: this agreement.
            stop: the reason and the bits with which the run is to end.
            out_of_time: whether `max_seconds` is reached.
            triggered: the bits of events that were triggered by hand.
            rows: the time criteria that are due, as `Delivered` has them.
        """
        if self._asked_at == step:
            return
        conditions = [self._wanted.get(step, 0) >> place & 1 for place in self._condition_places]
        by_hand = [int(self._bits_of_names.get(each) in triggered) for each in self._numbers]
        self._start("step", [_code_of(stop), int(out_of_time), *rows, *conditions, *by_hand])
        self._asked_at = step

    def discard(self) -> None:
        """Finish an exchange that was started, at the end of the run."""
        if self._in_flight:
            self._finish()
        self._result = None

    def _at_once(self, about: str, values: list[int]) -> Sequence[int]:
        if self._in_flight != about:  # else an interrupt came before it was finished
            self._start(about, values)
        return self._finish()

    def _start(self, about: str, values: list[int]) -> None:
        self._size = len(values)
        self._exchange.start(values)
        self._in_flight = about  # at once, so that an interrupt does not let it be started again

    def _finish(self) -> Sequence[int]:
        try:
            if self._answer is None:
                self._answer = self._exchange.finish()
            numbers = _numbers_of(self._answer, self._size)
        except Exception:
            self._answer = self._in_flight = None  # nobody can finish it now
            raise
        self._answer = self._in_flight = None
        return numbers

    def _take(self) -> Sequence[int] | None:
        if self._in_flight:
            return self._finish()
        result, self._result = self._result, None
        return result

    def _stop_of(self, code: int) -> tuple[str, int] | None:
        if code <= 1:
            return ("stop", 0) if code else None
        from signal import Signals

        return Signals(code - 1).name, self._schedule.due_with(LoopEvents.INTERRUPT)


def _numbers_of(answer: Any, size: int) -> list[int]:
    """The ints that an exchange has returned.

    Raises:
        TypeError: these are not as many ints.
    """
    try:
        numbers = [int(value) for value in answer]
    except TypeError:
        numbers = []
    if len(numbers) != size:
        raise TypeError(
            f"sync: it returned {checks.shown(answer)}; let it return the greatest of each of the "
            f"{size} ints over all processes, as a list"
        )
    return numbers


def _code_of(stop: tuple[str, int] | None) -> int:
    """A number for the reason of a stop; a signal's is the greater one."""
    if stop is None:
        return 0
    if stop[0] == "stop":
        return 1
    from signal import Signals

    return 1 + Signals[stop[0]]


def events_to_agree_upon(schedule: Schedule) -> dict[Hashable, BaseEvent]:
    """Those that have a clock or a condition, and `stop_when`, which all processes have alike."""
    events = {name: event for name, event in schedule.events.items() if not _counts_only(event)}
    if schedule.stop_when is not None:
        events["stop_when"] = schedule.stop_when
    return events


def decisions(schedule: Schedule) -> list[str]:
    """What processes may decide otherwise: by their clocks, and by conditions."""
    names = [
        checks.shown(name) for name, event in schedule.events.items() if not _counts_only(event)
    ]
    if schedule.stop_when is not None and not _counts_only(schedule.stop_when):
        names.append("stop_when")
    if schedule.limit[0] == "max_seconds":
        names.append("max_seconds")
    return names


def _counts_only(event: BaseEvent) -> bool:
    """Whether it is due by steps and epochs alone, which processes count alike."""
    return all(
        not isinstance(part, Event)
        or (part.condition_function, part.every_n_seconds, part.at_time, part.at_timestamp)
        == (None, None, None, None)
        for part in event.parts
    )


def _key_of(name: Hashable) -> object:
    """What stands for the name of an event in all processes.

    Raises:
        TypeError: nothing can, since the name is of another kind.
    """
    key = state.key_of(name, 0)
    if key[0] == "position":
        raise TypeError(
            f"events: {checks.shown(name)}: with sync, pass names that all processes know: str, "
            "int, bool, None, Enum members, or tuples of these"
        )
    return key


def _number_of(value: object) -> int:
    """A number above 0 that stands for a plain value, the same in all processes."""
    from hashlib import sha256

    return int.from_bytes(sha256(repr(value).encode()).digest()[:7], "big") + 1
