"""Where the time of a run went: what `Loop(..., profile=)` measures, and a trace of it."""

from __future__ import annotations

import json
import os
from collections import deque
from time import perf_counter_ns, time_ns

from . import drawing, words
from .sync import rank_among_several

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from typing import Any

    from .agreement import Exchange
    from .run import Run

LAST_STEPS = 1000
"""How many steps a trace has, unless it is said."""
MOST_SETS = 200
"""How many sets of events have their costs measured, so that memory stays bounded."""
MOST_SHOWN = 10
"""How many of these are printed, the dearest."""
_FINE = 5
"""A histogram has `2**_FINE` bins from one power of two to the next, so that they are 3 % wide."""

Span = tuple[int, int]


class Durations:
    """Durations in nanoseconds, in a histogram of fixed size.

    Attributes:
        count: how many there are.
        total: their sum.
        longest: the longest, exactly.
    """

    __slots__ = ("bins", "count", "longest", "total")

    def __init__(self) -> None:
        self.bins = [0] * (64 << _FINE)
        self.count = self.total = self.longest = 0

    def add(self, duration: int) -> None:
        """Add one."""
        self.count += 1
        self.total += duration
        if duration > self.longest:
            self.longest = duration
        shift = max(0, duration.bit_length() - _FINE - 1)
        self.bins[(shift << _FINE) + (duration >> shift)] += 1

    def counts(self) -> list[tuple[float, int]]:
        """Durations in nanoseconds, the shortest first, each with how often it came."""
        return [(_middle(place), count) for place, count in enumerate(self.bins) if count]

    def quantile(self, share: float) -> float:
        """The duration, in seconds, that so great a share of all does not exceed; within 3 %."""
        wanted = share * self.count
        seen = 0
        for place, count in enumerate(self.bins):
            seen += count
            if seen >= wanted and count:
                return min(_middle(place), self.longest) / 1e9
        return 0.0


def _middle(place: int) -> float:
    """The middle of a bin, in nanoseconds."""
    if place < 2 << _FINE:
        return place
    shift = (place >> _FINE) - 1
    return ((place - (shift << _FINE)) + 0.5) * (1 << shift)


class EventCost:
    """What the steps of some events cost.

    Attributes:
        names: the events that were due at these steps, all together.
        count: how many such steps there were.
        seconds: how much longer the body of such a step takes than that of a quiet one, on an
            average; negative where it happens to be shorter.
        share: what that makes of the whole run, from 0 to 1.
    """

    __slots__ = ("count", "names", "seconds", "share")

    def __init__(
        self, names: tuple[Hashable, ...], count: int, seconds: float, share: float
    ) -> None:
        self.names = names
        self.count = count
        self.seconds = seconds
        self.share = share

    def __repr__(self) -> str:
        names = " + ".join([words.title(name) for name in self.names])
        times = "time" if self.count == 1 else "times"
        return (
            f"{names}: {self.count} {times}, {spelled(self.seconds)} each, "
            f"{100 * self.share:.1f} % of the run"
        )


class Step:
    """One of the last steps, as the trace has it; all times are readings in nanoseconds."""

    __slots__ = ("asked", "began", "ended", "epoch", "names", "number", "pauses", "size", "wait")

    def __init__(self, asked: int, began: int, wait: Span | None) -> None:
        self.asked = asked
        self.began = began
        self.wait = wait  # from the first batch's beginning to the last one's end
        self.ended = 0
        self.number = self.epoch = self.size = 0
        self.names: tuple[Hashable, ...] = ()
        self.pauses: list[Span] = []


class Profile:
    """Where the time of a run went, in seconds: `loop.profile`, during the run or after it.

    A step's wait ends, and its body begins, when the batch is handed over. A body in which the loop
    is left ends there (without reference counts, as on PyPy, later or not at all). With devices
    that work on their own (CUDA, JAX), a body's time is that of giving them their work, unless it
    waits for them: see the README.

    `print(loop.profile)` is a table. A notebook shows a drawing.

    Attributes:
        steps: the steps whose bodies are done, in this process.
        held: the step that an interrupt has kept from being handed over, or None.
        entry: how often the loop was entered.

    Example:
        >>> from dloop import Loop
        >>> loop = Loop(range(3), max_epochs=1, profile=True)
        >>> for batch, events in loop:
        ...     pass
        >>> loop.profile.steps
        3
    """

    def __init__(self, last_steps: int) -> None:
        self.steps = 0
        self.held: Any = None
        self.entry = 0
        self._waits = Durations()  # of a step, for all data that it took
        self._bodies = Durations()
        self._quiet = Durations()  # the bodies of steps without events
        self._of_events: dict[frozenset[Hashable], list[int]] = {}  # count and total
        self._asked_total = 0  # all the time from requests for steps to what came of them
        self._waited = 0
        self._paused = 0
        self._agreed = 0
        self._last: deque[Step] = deque(maxlen=last_steps)
        self._current: Step | None = None  # whose body is going on
        self._latest_step = -1  # that was handed over
        # Since a step was asked for
        self._wait: Span | None = None
        self._wait_total = 0
        self._exchanged = 0
        self._pause_began: int | None = None
        self._pauses = 0  # how many contexts hold the clock
        self._to_unix = time_ns() - perf_counter_ns()

    # What the loop tells

    def around(self, steps: Iterator[Any], run: Run) -> Steps:
        """The steps of a run, timed."""
        self._current = None
        self._latest_step = run.stepper.step
        self.entry += 1
        return Steps(self, steps, run, self.entry)

    def around_batches(self, batches: Iterator[Any]) -> Batches:
        """The batches of a source, timed."""
        return Batches(self, batches)

    def around_exchange(self, exchange: Exchange) -> TimedExchange:
        """What exchanges between processes, timed."""
        return TimedExchange(self, exchange)

    def begin_pause(self) -> None:
        """The clock is paused."""
        self._pauses += 1
        if self._pauses == 1:
            self._pause_began = perf_counter_ns()

    def end_pause(self) -> None:
        """The clock goes on, unless another context holds it."""
        if self._pauses == 1:
            self._close_pause(perf_counter_ns())
        self._pauses = max(0, self._pauses - 1)

    def _close_pause(self, now: int) -> None:
        if self._pause_began is not None and self._current is not None:
            self._current.pauses.append((self._pause_began, now))
        self._pause_began = None

    def ask(self) -> int:
        """A step is asked for, so that the body before is done."""
        now = perf_counter_ns()
        self.end_body(now)
        self._wait, self._wait_total, self._exchanged = None, 0, 0
        return now

    def end_body(self, now: int) -> None:
        """The body is done, or was left."""
        self._pauses = 0
        self._close_pause(now)
        step, self._current = self._current, None
        if step is None:
            return
        step.ended = now
        self.steps += step.size
        duration = now - step.began
        self._bodies.add(duration)
        self._paused += sum([end - begin for begin, end in step.pauses])
        if not step.names:
            self._quiet.add(duration)
            return
        key = frozenset(step.names)
        found = self._of_events.get(key)
        if found is None and len(self._of_events) < MOST_SETS:
            found = self._of_events[key] = [0, 0]
        if found is not None:
            found[0] += 1
            found[1] += duration

    def end_request(self, asked: int) -> int:
        """What was asked for at this reading has come, if only an end or an error."""
        now = perf_counter_ns()
        self._asked_total += now - asked
        self._waited += self._wait_total
        self._agreed += self._exchanged
        return now

    def begin_body(self, asked: int, run: Run, events: frozenset[Hashable]) -> None:
        """A step is handed over that was asked for at this reading."""
        step = Step(asked, self.end_request(asked), self._wait)
        self._waits.add(self._wait_total)
        stepper = run.stepper
        step.number = stepper.step
        step.epoch = stepper.epoch
        step.size = stepper.step - self._latest_step  # an error that is an event is no step
        self._latest_step = stepper.step
        if events:
            step.names = tuple(sorted(events, key=str))
        self._last.append(step)
        self._current = step

    def add_wait(self, began: int, ended: int) -> None:
        """The source was waited for."""
        self._wait = (began if self._wait is None else self._wait[0]), ended
        self._wait_total += ended - began

    def begin_opening(self) -> Span:
        """An epoch is opened; what is returned goes to `end_opening`."""
        return perf_counter_ns(), self._exchanged

    def end_opening(self, begun: Span) -> None:
        """An epoch is open: its workers were waited for, and perhaps other processes."""
        began, exchanged = begun
        self.add_wait(began + self._exchanged - exchanged, perf_counter_ns())

    def add_agreement(self, duration: int) -> None:
        """Another process was waited for; before the first step is asked for, that is left out."""
        self._exchanged += duration

    # What users ask

    @property
    def total(self) -> float:
        """All the time in the loop: bodies and requests for steps."""
        return (self._asked_total + self._bodies.total) / 1e9

    @property
    def waiting(self) -> float:
        """The time in which epochs were opened and ended, and batches made."""
        return self._waited / 1e9

    @property
    def bodies(self) -> float:
        """The time in bodies, without that in pauses."""
        return (self._bodies.total - self._paused) / 1e9

    @property
    def paused(self) -> float:
        """The time of bodies that was in `loop.pause_clock()`."""
        return self._paused / 1e9

    @property
    def agreement(self) -> float:
        """The time in which the processes exchanged what they agree upon, by `sync`."""
        return self._agreed / 1e9

    @property
    def other(self) -> float:
        """The rest: conditions, and dloop itself."""
        return (self._asked_total - self._waited - self._agreed) / 1e9

    @property
    def steps_per_second(self) -> float:
        """The speed over all; 0.0 before the first step is done."""
        return self.steps / self.total if self.total else 0.0

    @property
    def recent_steps_per_second(self) -> float:
        """The speed of the last steps, as many as the trace has; pauses are left out."""
        steps = [step for step in self._last if step.ended]
        if not steps:
            return 0.0
        pauses = sum([end - begin for step in steps for begin, end in step.pauses])
        seconds = (sum([step.ended - step.asked for step in steps]) - pauses) / 1e9
        return sum([step.size for step in steps]) / seconds if seconds else 0.0

    @property
    def waits(self) -> tuple[float, float, float, float]:
        """Of the waits for data of all steps: median, 95th and 99th percentile, and the longest."""
        return _quantiles(self._waits)

    @property
    def body_times(self) -> tuple[float, float, float, float]:
        """Of the bodies of all steps, pauses included: the same."""
        return _quantiles(self._bodies)

    @property
    def events(self) -> list[EventCost]:
        """What the steps of each event cost above quiet ones, the dearest first.

        Steps at which several events are due are kept apart, and count once.
        """
        quiet = self._quiet
        usual = quiet.quantile(0.5)
        if not quiet.count:
            usual = min([total / count for count, total in self._of_events.values()], default=0)
            usual /= 1e9
        costs = []
        for names, (count, total) in self._of_events.items():
            each = total / count / 1e9 - usual
            share = each * count / self.total if self.total else 0.0
            costs.append(EventCost(tuple(sorted(names, key=str)), count, each, share))
        return sorted(costs, key=lambda cost: -cost.share)

    def __str__(self) -> str:
        lines = [self._summary()]
        for title, seconds, share in self._parts():
            if seconds or title in ("waiting for data", "bodies"):
                lines.append(f"  {title:18}{spelled(seconds):>10}{100 * share:8.1f} %")
        lines.append(f"  {'':18}{'median':>10}{'95 %':>10}{'99 %':>10}{'longest':>10}")
        for title, found in (("wait of a step", self.waits), ("body of a step", self.body_times)):
            lines.append(f"  {title:18}" + "".join([f"{spelled(each):>10}" for each in found]))
        return "\n".join([*lines, *[f"  {text}" for text in self._costs()]])

    def __repr__(self) -> str:
        return f"<Profile: {self._summary()}>"

    def _repr_html_(self) -> str:
        """The drawing and what events cost, as a notebook shows them."""
        return self._svg(False) + drawing.html_list(self._costs())

    def save_svg(self, path: str | os.PathLike[str]) -> None:
        """Write a drawing to a file: where the time went, and histograms of waits and bodies.

        Its colours follow the reader's light or dark setting.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._svg(True))

    def _svg(self, standalone: bool) -> str:
        parts = [
            drawing.Part(title, f"{spelled(seconds)}, {100 * share:.1f} %", share)
            for title, seconds, share in self._parts()
        ]
        histograms = []
        for title, durations in (("wait of a step", self._waits), ("body of a step", self._bodies)):
            median, most, nearly_all, longest = map(spelled, _quantiles(durations))
            caption = f"median {median}, 95 % {most}, 99 % {nearly_all}, longest {longest}"
            histograms.append(drawing.Histogram(title, caption, durations.counts()))
        return drawing.breakdown(f"Profile: {self._summary()}", parts, histograms, standalone)

    def _costs(self) -> list[str]:
        """What events cost, in words: of the dearest, and how many others there are."""
        costs = self.events
        shown = [repr(cost) for cost in costs[:MOST_SHOWN]]
        more = len(costs) - MOST_SHOWN
        if len(costs) == MOST_SETS:
            shown.append(f"{more} more, in `events`; there may be others, which are not measured")
        elif more > 0:
            shown.append(f"{more} more, in `events`")
        return shown

    def _summary(self) -> str:
        """The speed in one line."""
        return (
            f"{self.steps:,} steps in {spelled(self.total)}: {self.steps_per_second:.4g} a second, "
            f"{self.recent_steps_per_second:.4g} lately"
        )

    def _parts(self) -> list[tuple[str, float, float]]:
        """What the time is made up of: a title, seconds, and the share of all."""
        parts = {
            "waiting for data": self.waiting,
            "bodies": self.bodies,
            "paused": self.paused,
            "agreement": self.agreement,
            "other": self.other,
        }
        total = self.total or 1.0
        return [(title, seconds, seconds / total) for title, seconds in parts.items()]

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last steps as a trace, which Perfetto and chrome://tracing open.

        Times are microseconds of the wall clock. Each rank is a process of its own.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        rank = rank_among_several() or 0
        process, thread = {"name": f"rank {rank}"}, {"name": "dloop"}
        lines = [
            json.dumps({"name": "process_name", "ph": "M", "pid": rank, "args": process}),
            json.dumps({"name": "thread_name", "ph": "M", "pid": rank, "tid": 0, "args": thread}),
        ]
        for step in self._last:
            where = {"step": step.number, "epoch": step.epoch}
            if step.wait is not None:
                lines.append(self._span("data", "wait", rank, step.wait, where))
            if step.ended:
                due = {"events": [str(name) for name in step.names]}
                body = step.began, step.ended
                lines.append(self._span("body", "body", rank, body, {**where, **due}))
            for pause in step.pauses:
                lines.append(self._span("paused", "pause", rank, pause, where))
            for name in step.names:
                mark = {"name": str(name), "cat": "event", "ph": "i", "s": "t"}
                place = {"pid": rank, "tid": 0, "args": where}
                lines.append(_with_times({**mark, **place}, ts=step.began + self._to_unix))
        with open(path, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            file.write(",\n".join(lines) + "\n]}\n")

    def _span(self, name: str, kind: str, rank: int, span: Span, where: dict[str, Any]) -> str:
        """A span of the trace event format: a complete event, whose `ph` is X."""
        begin, end = span
        event = {"name": name, "cat": kind, "ph": "X", "pid": rank, "tid": 0, "args": where}
        return _with_times(event, ts=begin + self._to_unix, dur=end - begin)


class Steps:
    """The steps of a loop's iterator, timed."""

    __slots__ = ("_entry", "_profile", "_run", "_steps")

    def __init__(self, profile: Profile, steps: Iterator[Any], run: Run, entry: int) -> None:
        self._profile = profile
        self._steps = steps
        self._run = run
        self._entry = entry

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Any:
        profile = self._profile
        if self._entry != profile.entry:
            return next(self._steps)  # which was replaced, and says so
        pair = profile.held
        if pair is None:
            asked = profile.ask()
            try:
                for profile.held in self._steps:  # nothing can come in between
                    break
                else:
                    raise StopIteration
            except BaseException:
                profile.end_request(asked)
                raise
            pair = profile.held
            profile.begin_body(asked, self._run, pair[1])
        profile.held = None
        return pair

    def __del__(self) -> None:
        profile = self._profile
        if self._entry == profile.entry:
            profile.end_body(perf_counter_ns())  # the loop was left in it


class Batches:
    """The batches of a source, timed."""

    __slots__ = ("_batches", "_profile")

    def __init__(self, profile: Profile, batches: Iterator[Any]) -> None:
        self._profile = profile
        self._batches = batches

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        began = perf_counter_ns()
        try:
            return next(self._batches)
        finally:  # an end or an error, too
            self._profile.add_wait(began, perf_counter_ns())


class TimedExchange:
    """What exchanges between processes, timed."""

    def __init__(self, profile: Profile, exchange: Exchange) -> None:
        self._profile = profile
        self._exchange = exchange

    def start(self, values: list[int]) -> None:
        """Begin."""
        began = perf_counter_ns()
        self._exchange.start(values)
        self._profile.add_agreement(perf_counter_ns() - began)

    def finish(self) -> Sequence[int]:
        """Wait for the others, and return the maximum."""
        began = perf_counter_ns()
        found = self._exchange.finish()
        self._profile.add_agreement(perf_counter_ns() - began)
        return found


def spelled(seconds: float) -> str:
    """A duration with its unit, in three digits."""
    for unit, name in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= 0.9995 * unit:  # from where it is rounded to one
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def _with_times(event: dict[str, Any], **nanoseconds: int) -> str:
    """An event of a trace with its times: microseconds, which floats are too coarse for."""
    times = [f'"{name}": {value // 1000}.{value % 1000:03}' for name, value in nanoseconds.items()]
    return f"{{{', '.join(times)}, {json.dumps(event)[1:]}"


def _quantiles(durations: Durations) -> tuple[float, float, float, float]:
    median, most, nearly_all = [durations.quantile(share) for share in (0.5, 0.95, 0.99)]
    return median, most, nearly_all, durations.longest / 1e9
