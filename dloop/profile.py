"""Where the time of a run goes: what `Loop(..., profile=True)` measures."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Hashable, Iterator
from os import PathLike
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _backend, drawing
from .sync import rank_among_several

if TYPE_CHECKING:
    from ._core import Durations, Engine

LAST_STEPS = 1000  # of a trace, by default
MOST_SHOWN = 10  # costs of events in the table


class EventCost(NamedTuple):
    """The cost of the steps at which exactly these events fire."""

    names: tuple[Hashable, ...]
    times: int  # how many such steps there were
    seconds: float  # how much longer such a body takes, on average, than that of a quiet step
    share: float  # of the whole run, from 0 to 1


class Profile(drawing.Drawn):
    """Where the time of a run goes: `loop.profile`, during the run and after it.

    A wait is the time from the request for a step to its yield: fetching, conditions, agreements
    between processes. A body is the time from there to the next request, or until the iterator is
    freed. A step counts once its body has ended. CUDA and JAX work in the background: a body that
    does not wait for results only starts that work.

    `print(loop.profile)` prints a table. A notebook shows a drawing.

    Example:
        >>> from dloop import Loop
        >>> loop = Loop(range(3), max_epochs=1, profile=True)
        >>> for batch, events in loop:
        ...     pass
        >>> loop.profile.steps
        3
    """

    def __init__(self, last_steps: int) -> None:
        self._core = _backend.core
        self._timings = self._core.Timings(last_steps)
        self._paused = 0  # in nanoseconds
        self._pauses: deque[tuple[int, int]] = deque(maxlen=last_steps)  # clock readings
        self._to_unix = time_ns() - perf_counter_ns()

    def around(self, steps: Iterator[Any], engine: Engine) -> Iterator[Any]:
        """Return an iterator that yields what `steps` yields, and measures."""
        return self._core.TimedSteps(steps, engine, self._timings)

    def pause(self, began: int, ended: int) -> None:
        """Count a pause, or as much of it as is in the current body."""
        if self._timings.began >= 0:
            began = max(began, self._timings.began)
            self._paused += ended - began
            self._pauses.append((began, ended))

    @property
    def steps(self) -> int:
        """The number of steps whose bodies have ended."""
        return self._timings.steps

    @property
    def waiting(self) -> float:
        """The seconds in which the loop waited for steps."""
        return (self._timings.waits.total + self._timings.fruitless) / 1e9

    @property
    def bodies(self) -> float:
        """The seconds in bodies, without pauses."""
        return (self._timings.bodies.total - self._paused) / 1e9

    @property
    def paused(self) -> float:
        """The seconds of bodies within `loop.pause_clock()`."""
        return self._paused / 1e9

    @property
    def total(self) -> float:
        """All seconds in the loop: waiting, bodies and pauses."""
        return self.waiting + self.bodies + self.paused

    @property
    def waits(self) -> tuple[float, float, float, float]:
        """The median, 95th and 99th percentile, and maximum of waits, in seconds, within 3%."""
        return _percentiles(self._timings.waits)

    @property
    def body_times(self) -> tuple[float, float, float, float]:
        """The same of bodies, with their pauses."""
        return _percentiles(self._timings.bodies)

    @property
    def events(self) -> list[EventCost]:
        """What events cost over a quiet step, the most expensive first, of 200 combinations."""
        costs = self._timings.costs
        quiet = [each for events, each in costs.items() if not events]
        means = [each.total / each.count / 1e9 for each in costs.values()]
        usual = _quantile(quiet[0], 0.5) if quiet else min(means, default=0.0)
        found = []
        for (events, each), mean in zip(costs.items(), means):
            if events:
                names = tuple(sorted(events, key=drawing.title_of))
                share = (mean - usual) * each.count / (self.total or 1)
                found.append(EventCost(names, each.count, mean - usual, share))
        return sorted(found, key=lambda cost: -cost.share)

    def __str__(self) -> str:
        titles = ["", "time", "share", "median", "95%", "99%", "longest"]
        more = [*[map(spelled, each) for each in (self.waits, self.body_times)], [""] * 4]
        rows = [[*part[:3], *each] for part, each in zip(self._parts(), more)]
        text = f"{self._summary()}\n\n{drawing.table(titles, rows, right=range(1, 7))}"
        costs = self.events
        rows = [
            [" + ".join(map(drawing.title_of, names)), f"{times:,}", spelled(each), f"{share:.1%}"]
            for names, times, each, share in costs[:MOST_SHOWN]
        ]
        if not costs:
            return text
        titles = [f"event ({len(rows)} of {len(costs)})", "steps", "over a quiet one", "share"]
        return f"{text}\n\n{drawing.table(titles, rows, right=(1, 2, 3))}"

    def __repr__(self) -> str:
        return f"<Profile: {self._summary()}>"

    def save_trace(self, path: str | PathLike[str]) -> None:
        """Write the last steps as a trace, which https://ui.perfetto.dev shows.

        Times are microseconds of the wall clock; each rank is a process.

        Args:
            path: the file, in JSON; it is replaced.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1, profile=50_000)  # steps in the trace
            >>> loop.profile.save_trace("trace.json")  # doctest: +SKIP
        """
        place: dict[str, Any] = {"pid": rank_among_several() or 0, "tid": 0}
        process = {"name": "process_name", "ph": "M", "args": {"name": f"rank {place['pid']}"}}
        lines, steps = [json.dumps({**process, **place})], self._timings.last_steps()
        for times, events in steps:
            where = {**place, "args": {"step": times["step"], "epoch": times["epoch"]}}
            lines.append(self._span("wait", times["asked"], times["began"], where))
            lines.append(self._span("body", times["began"], times["ended"], where))
            for name in sorted(map(drawing.title_of, events)):
                mark = {"name": name, "ph": "i", "s": "t", **where}
                lines.append(_with_times(mark, ts=times["began"] + self._to_unix))
        for began, ended in self._pauses:
            if steps and began >= steps[0][0]["began"]:
                lines.append(self._span("pause", began, ended, place))
        with open(path, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            file.write(",\n".join(lines) + "\n]}\n")

    def _span(self, name: str, began: int, ended: int, where: dict[str, Any]) -> str:
        event = {"name": name, "cat": name, "ph": "X", **where}
        return _with_times(event, ts=began + self._to_unix, dur=ended - began)

    def _summary(self) -> str:
        speed = self.steps / self.total if self.steps else 0.0
        return f"{self.steps:,} steps in {spelled(self.total)}: {speed:,.1f} a second"

    def _parts(self) -> list[tuple[str, str, str, float]]:
        """Return the parts of the time: title, duration, share in words, share from 0 to 1."""
        parts = {"waiting": self.waiting, "bodies": self.bodies, "paused": self.paused}
        shares = [(*part, part[1] / (self.total or 1)) for part in parts.items()]
        return [(title, spelled(each), f"{share:.1%}", share) for title, each, share in shares]

    def _svg(self, standalone: bool) -> str:
        histograms = []
        for title, durations in (("wait", self._timings.waits), ("body", self._timings.bodies)):
            median, most, nearly_all, longest = map(spelled, _percentiles(durations))
            text = f"{title}: median {median}, 95% {most}, 99% {nearly_all}, longest {longest}"
            counts = [(_middle(place), n) for place, n in enumerate(durations.bins) if n]
            histograms.append((text, counts))
        parts = [(", ".join(part[:3]), part[3]) for part in self._parts()]
        return drawing.breakdown(f"Profile: {self._summary()}", parts, histograms, standalone)


def spelled(seconds: float) -> str:
    """Return a duration in three digits, with its unit."""
    for unit, name in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= 0.9995 * unit:  # it is rounded to one
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def _percentiles(durations: Durations) -> tuple[float, float, float, float]:
    median, most, nearly_all = [_quantile(durations, share) for share in (0.5, 0.95, 0.99)]
    return median, most, nearly_all, durations.longest / 1e9


def _quantile(durations: Durations, share: float) -> float:
    """Return the seconds that this share of all durations does not exceed, within 3%."""
    seen = 0
    for place, count in enumerate(durations.bins):
        seen += count
        if count and seen >= share * durations.count:
            return min(_middle(place), durations.longest) / 1e9
    return 0.0


def _middle(place: int) -> float:
    """Return the middle of a bin in nanoseconds; `Durations.add` says what the bins are."""
    shift = max(0, (place >> 5) - 1)
    return place if shift == 0 else (place - (shift << 5) + 0.5) * (1 << shift)


def _with_times(event: dict[str, Any], **nanoseconds: int) -> str:
    """Return an event of a trace in JSON; its times in microseconds are too long for floats."""
    times = [f'"{name}": {value // 1000}.{value % 1000:03}' for name, value in nanoseconds.items()]
    return f"{{{', '.join(times)}, {json.dumps(event)[1:]}"
