"""What a run will do: a dry run of its agenda, told event by event."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from itertools import groupby
from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from . import _backend, checks, drawing
from .clock import Clock
from .errors import NEVER
from .events import (
    COUNTER_CRITERIA,
    CRITERIA,
    EPOCH_CRITERIA,
    TIME_CRITERIA,
    Event,
    LoopEvents,
    Member,
)
from .schedule import Schedule, Timers, several, steps_up_to

if TYPE_CHECKING:
    from ._core import LoopState

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END
MOST = 100_000  # firings, after which an event leaves the dry run
MOST_IN_ALL = 1_000_000  # after these all events leave it
FEW, FEW_IN_ALL = 3, 100_000  # the same, if the run's end is unknown; a row tells a few first steps
MOST_POINTS = 100  # of a collection, to be told apart
MOST_DIVIDERS = 60  # ends of epochs in a drawing
UNKNOWN = ("condition_function", *TIME_CRITERIA, "at_timestamp", *COUNTER_CRITERIA)  # beforehand
OWN = object()  # the name of the event in question, in its dry run
Firings: TypeAlias = "tuple[array[int], bool]"
MEMBERS = {
    "EPOCH_END": "at the end of every epoch",
    "TRAINING_END": "at the end of training",
    "INTERRUPT": "on an interrupt",
    "EXCEPTION": "on an exception",
}


class PlanRow(NamedTuple):
    """What a plan tells about one event. Timers and conditions are in its words alone.

    Attributes:
        name: the event's name, or a member of LoopEvents.
        when: the event in words, such as "every 100 steps or at the end of training".
        times: how often it fires; None if unknown.
        at_least: how often it fires, at least.
        first: the first three global steps at which it fires.
        last: the last such step; None if unknown.
        left_over: how many steps follow the last full period of `every_n_steps`.

    Example:
        >>> from dloop import Event, Loop
        >>> row = Loop(range(550), {"Log": Event(every_n_steps=100)}, max_epochs=1).plan().rows[0]
        >>> row.when, row.times, row.first, row.last, row.left_over
        ('every 100 steps', 5, (99, 199, 299), 499, 50)
    """

    name: Hashable
    when: str
    times: int | None
    at_least: int
    first: tuple[int, ...]
    last: int | None
    left_over: int


@dataclass(frozen=True, repr=False)
class Plan(drawing.Drawn):
    """What `Loop.plan` returns: when each event of a run fires.

    `print(plan)` prints a table of at most 80 columns. A notebook shows a drawing.

    Attributes:
        rows: one for each event, then EPOCH_END and TRAINING_END.
        warnings: likely mistakes, a line each.
        first_step: the first global step of the run.
        steps: the number of steps from there; None if unknown.
        epochs: the number of epochs that these steps are in; None if unknown.
        steps_per_epoch: the steps of an epoch; None if unknown.
        summary: the run in one line.

    Example:
        >>> from dloop import Event, Loop
        >>> events = {"Log": Event(every_n_steps=100), "DropLR": Event(at_step=10_000)}
        >>> plan = Loop(range(250), events, max_epochs=3).plan()
        >>> plan.summary
        '750 steps, 0 to 749; 3 epochs of 250 steps'
        >>> plan.warnings
        ("'DropLR': at_step=10000 never fires, the run ends at step 749",)
    """

    rows: tuple[PlanRow, ...]
    warnings: tuple[str, ...]
    first_step: int
    steps: int | None
    epochs: int | None
    steps_per_epoch: int | None
    summary: str
    _axis: drawing.Axis
    _lanes: tuple[drawing.Lane, ...]

    def __repr__(self) -> str:
        return f"<Plan: {self.summary}; {len(self.rows)} rows, {len(self.warnings)} warnings>"

    def __str__(self) -> str:
        cells = [
            [drawing.title_of(row[0]), row.when, _fires(row), _steps(row)] for row in self.rows
        ]
        table = drawing.table(["event", "when", "fires", "at steps"], cells, right=[2])
        warnings = drawing.paragraphs("! ", self.warnings)
        summary = drawing.paragraphs("", [self.summary])
        return "\n".join([*summary, "", table, *([""] if warnings else []), *warnings])

    def _svg(self, standalone: bool) -> str:
        return drawing.timeline(f"Plan: {self.summary}", self._axis, self._lanes, standalone)


class Criterion(NamedTuple):
    """A criterion that counts steps or epochs."""

    event: Event  # of this criterion alone
    name: str  # the parameter, or a member of LoopEvents
    point: Any
    modifiers: str  # as they are written
    needs_epochs: bool  # whether it depends on where epochs end
    awaited: Event  # what it waits for, if it does


def criteria_of(
    event: Event, events: Mapping[Any, Event], most_points: int = 1
) -> Iterator[Criterion]:
    """Yield an event's criteria: one for each point of a collection of up to `most_points`.

    `events` are those that it can wait for.
    """
    for part in event.parts:
        if part in (EPOCH_END, TRAINING_END):
            yield Criterion(part, repr(part), None, "", part is EPOCH_END, Event())
        awaited = events.get(part.wait_for, Event())
        if isinstance(part.wait_for, Member):
            awaited = part.wait_for
        waits = part.wait_for is not None
        waits_for_epochs = waits and any(each.needs_epochs for each in criteria_of(awaited, events))
        given = part.given()
        modifiers = {name: value for name, value in given.items() if name not in CRITERIA}
        shown = "".join([f", {name}={value}" for name, value in modifiers.items()])
        for name in [each for each in given if each in CRITERIA and each not in UNKNOWN]:
            own = dict(modifiers)
            if name != "every_n_steps":
                own.pop("first_at_step", None)
            if name in EPOCH_CRITERIA and not own.keys() & {"from_step", "until_step"}:
                own = {"wait_for": part.wait_for}  # others change nothing, which an Event refuses
            points = several(given[name])
            for point in points if len(points) <= most_points else [points]:
                single = Event(**{**own, name: point})
                needs_epochs = part.per_epoch or name in EPOCH_CRITERIA or waits_for_epochs
                yield Criterion(single, name, point, shown, needs_epochs, awaited)


class DryRun:
    """A run without data, from step `first` to before `end`: its agenda is stepped.

    Step `first` is in `epoch`, which began at `start`. `length` is None if it is not known.
    """

    def __init__(self, epoch: int, start: int, first: int, end: int, length: int | None) -> None:
        self.epoch, self.epoch_start, self.length = epoch, start, length
        self.first, self.end = first, end
        self.most, self._left = (MOST, MOST_IN_ALL) if end < NEVER else (FEW, FEW_IN_ALL)

    def fire(self, criteria: Sequence[Criterion], most: int) -> Firings:
        """Return the steps at which any of the criteria is met, and whether there may be more.

        It steps from firing to firing, up to so many.
        """
        steps, core = array("q"), _backend.core
        if not criteria or self.first == self.end:
            return steps, False
        event = reduce(or_, [criterion.event for criterion in criteria])
        end = None if self.end == NEVER else self.end
        awaited = {each.event.wait_for: each.awaited for each in criteria}
        events = {name: each for name, each in awaited.items() if not isinstance(name, Member)}
        events[OWN] = event
        schedule, clock = Schedule(events, None, None, end, None), Clock(lambda: 0, 0)
        place = self.epoch, self.first - 1, self.first - 1 - self.epoch_start
        start = core.LoopState(*place, False, False, 0, clock)
        timers = Timers((), (), self.first, (0, self.first, self.epoch_start))
        engine = core.Engine(schedule, clock, timers, start)
        length = self.length if any(each.needs_epochs for each in criteria) else None
        engine.ends.length = length
        engine.begin_epoch(iter(()), length)
        jumps = 0
        while (step := engine.agenda.next_due(engine.step)) < NEVER:
            jumps += 1
            if OWN in engine.jump(step):
                steps.append(step)
            if step == self.end - 1:
                break
            self._left -= 1
            if len(steps) == most or (self._left < 0 and jumps >= 2 * FEW):
                return steps, True
            if engine.ended_epoch:
                engine.end_epoch()
                engine.begin_epoch(iter(()), length)
        return steps, False


@dataclass
class Forecast:
    """What a plan tells, from a dry run.

    Args:
        schedule: the events and limits.
        start: the step before the first.
        length: the steps of an epoch; None if unknown.
        has_epochs: False for a stream, whose epoch does not end.
        is_finished: whether the run is finished.
    """

    schedule: Schedule
    start: LoopState
    length: int | None
    has_epochs: bool
    is_finished: bool

    def __post_init__(self) -> None:
        schedule, start, length = self.schedule, self.start, self.length
        is_over = self.is_finished or length == 0
        first, epoch = start.global_step + 1, start.epoch + start.epoch_end
        epoch_start = first if start.epoch_end else start.global_step - start.epoch_step
        if length and first - epoch_start >= length:  # epochs have become shorter
            epoch, epoch_start = epoch + 1, first
        end = schedule.max_steps
        if schedule.max_epochs < NEVER and length is not None:
            end = epoch_start + steps_up_to(schedule.max_epochs - epoch, length)
        end = first if is_over else end if end <= checks.MOST else NEVER
        self.dry = DryRun(epoch, epoch_start, first, end, length)
        parts = [] if schedule.stop_when is None else schedule.stop_when.parts
        self.stop_when = reduce(or_, [each for each in parts if each is not TRAINING_END], Event())
        self.is_exact = False  # whether it ends where the run does, as far as anyone can know
        self.stops = self.dry.fire(self._known(self.stop_when), 1)
        if self.stops[0]:
            end = self.stops[0][0] + 1
            self.dry = DryRun(epoch, epoch_start, first, end, length)
        self.last = end - 1 if end < NEVER else None
        is_sure = self.stops[0] or not self.stops[1]
        self.is_exact = is_over or bool(
            end < NEVER and is_sure and not self._is_open(self.stop_when)
        )
        self.count = None if self.last is None else end - first  # of steps, at most
        self.epochs = None
        if self.is_exact and self.last is not None and length is not None:
            self.epochs = 0 if is_over else (self.last - epoch_start) // length + 1
        self.events = [
            *schedule.events.items(),
            *[(each, each) for each in (EPOCH_END, TRAINING_END)],
        ]
        self.firings = [self.dry.fire(self._known(each), self.dry.most) for _, each in self.events]

    def plan(self, missing: Mapping[str, str], notes: Sequence[str]) -> Plan:
        """Return the plan; `missing` tells why INTERRUPT or EXCEPTION cannot fire."""
        warnings = [*notes, *self.warnings(missing)]
        if self.is_finished:
            warnings = ["the run is finished"]
        elif self.length == 0:
            warnings = ["the dataloader is empty: its len() is 0"]
        axis, count = self.axis(), self.count if self.is_exact else None
        rows, lanes = zip(*[self.row(number, axis) for number in range(len(self.events))])
        counts = self.dry.first, count, self.epochs, self.length
        return Plan(rows, tuple(warnings), *counts, self.summary(), axis, lanes)

    def _known(self, event: Event, most_points: int = 1) -> list[Criterion]:
        """Return the criteria that depend neither on an unknown length nor an unknown end."""
        lacks_length = self.length is None and self.has_epochs
        return [
            each
            for each in criteria_of(event, self.schedule.events, most_points)
            if not (lacks_length and each.needs_epochs)
            and (self.is_exact or TRAINING_END not in (each.event, each.awaited))
            and not self._is_open(each.awaited)
        ]

    def _is_open(self, event: Event) -> bool:
        """Return whether it is unknown when some criteria are met."""
        return len(self._known(event)) < len([*criteria_of(event, self.schedule.events)]) or any(
            getattr(part, name) is not None for part in event.parts for name in UNKNOWN
        )

    def row(self, number: int, axis: drawing.Axis) -> tuple[PlanRow, drawing.Lane]:
        """Return the row of an event, and its lane in the drawing."""
        name, event = self.events[number]
        steps, has_left = self.firings[number]
        is_open = self._is_open(event)
        at_least = len(steps) if self.is_exact else 0
        is_sure = self.is_exact or not steps
        times = at_least if is_sure and not has_left and not is_open else None
        if event is TRAINING_END:
            times = at_least = int(self.count != 0)
        last = steps[-1] if steps and self.is_exact and not has_left else None
        left_over = 0
        for part in event.parts:
            has_periods = part.every_n_steps and part.first_at_step is part.until_step is None
            if has_periods and times is not None and last is not None and self.last is not None:
                left_over = self.last - last
        row = PlanRow(name, in_words(event), times, at_least, tuple(steps[:FEW]), last, left_over)
        title, fires = drawing.title_of(name), _fires(row)
        short = title if len(title) <= 32 else f"{title[:15]}...{title[-14:]}"
        detail = f"{title}: {row.when}; fires {fires} times, at steps {_steps(row) or '?'}"
        marks = drawing.thinned(steps, axis)
        return row, drawing.Lane(short, fires, detail, marks, is_open or has_left)

    def axis(self) -> drawing.Axis:
        """Return the steps that the drawing shows: all, or the first few."""
        first, length, end = self.dry.first, self.length, self.dry.end
        if self.last is None:
            end = max([steps[-1] for steps, _ in self.firings if steps], default=first)
            end += (end - first) // 4 + 1
        dividers = range(0)
        if length and 0 < (end - first) // length < MOST_DIVIDERS:
            dividers = range(self.dry.epoch_start + length, end, length)
        return drawing.Axis(first, max(end, first + 1), dividers, not self.is_exact)

    def summary(self) -> str:
        """Return the run in one line."""
        name, value = self.schedule.limit or ("stop_when", None)
        if self.count == 0:
            return "no step is left"
        if self.count is None:
            end = None if value is None else float(value)
            end = end / 1e9 if end is not None and name == "max_seconds" else end
            text = f"until {name}{'' if end is None else f'={end:.15g}'}, steps not known"
        else:
            at_most = "" if self.is_exact else "at most "
            text = f"{at_most}{_counted(self.count, 'step')}, {self.dry.first:,}"
            text += f" to {self.last:,}" if self.count > 1 else ""
        if self.length:
            epochs = "epochs" if self.epochs is None else _counted(self.epochs, "epoch")
            text += f"; {epochs} of {_counted(self.length, 'step')}"
        return text

    def warnings(self, missing: Mapping[str, str]) -> Iterator[str]:
        """Yield what is likely a mistake."""
        events = self.schedule.events
        criteria = [each for event in events.values() for each in criteria_of(event, events)]
        is_limited = self.schedule.max_epochs < NEVER or any(each.needs_epochs for each in criteria)
        if self.length is None and self.has_epochs and is_limited:
            yield "the length of an epoch is not known; with dataloader_len, a plan tells more"
        same: dict[Event, list[str]] = {}
        for (name, event), firings in zip(events.items(), self.firings):
            shown = checks.shown(name)
            if event != Event():
                same.setdefault(event, []).append(shown)
            for member, reason in missing.items():
                if getattr(LoopEvents, member) in event.parts:
                    yield f"{shown}: LoopEvents.{member} never fires, {reason}"
            for text in [*self._never(event, firings), *self._too_late(event)]:
                yield f"{shown}: {text}"
        for event, names in same.items():
            if len(names) > 1:
                yield f"{_listed(names)} have the same definition: {in_words(event)}"
        if self.stop_when != Event() and not any(self.stops) and not self._is_open(self.stop_when):
            yield f"stop_when never fires, {self._ends(False)}"

    def _never(self, event: Event, firings: Firings) -> Iterator[str]:
        """Yield the criteria of an event that never fire."""
        criteria = self._known(event, MOST_POINTS)
        if len(criteria) == 1 and any(firings):
            return
        never = [each for each in criteria if not any(self.dry.fire([each], 1))]
        before = DryRun(0, 0, 0, self.dry.first, self.length)  # what fired then is in order
        never = [each for each in never if each.event.per_launch or not any(before.fire([each], 1))]
        for (name, modifiers), group in groupby(never, lambda each: (each.name, each.modifiers)):
            same = list(group)
            points = _listed([str(each.point) for each in same])
            text = name if points == "None" else f"{name}={points}{modifiers}"
            yield f"{text} never fires, {self._ends(same[0].needs_epochs)}"

    def _ends(self, needs_epochs: bool) -> str:
        """Return in words why something never fires."""
        if needs_epochs and not self.has_epochs:
            return "this dataloader is a stream without epochs"
        if self.last is None:
            return "no step meets it"
        text = f"the run ends at step {self.last:,}{'' if self.is_exact else ' at the latest'}"
        if needs_epochs and self.length:
            text += f", and an epoch has {_counted(self.length, 'step')}"
        return text

    def _too_late(self, event: Event) -> Iterator[str]:
        """Yield the times that are beyond `max_seconds`."""
        limit = self.schedule.max_time
        for part in event.parts:
            for name in TIME_CRITERIA:
                points = several(getattr(part, name) or ())
                late = [f"{each:.15g}" for each in points if checks.nanoseconds(each) > limit]
                if late and not part.per_launch:
                    yield f"{name}={_listed(late)} is beyond max_seconds={limit / 1e9:.15g}"


def in_words(event: Event) -> str:
    """Return an Event in words, such as "every 100 steps or at the end of training"."""
    found = []
    for part in event.parts:
        names = [name for name in CRITERIA if getattr(part, name) is not None]
        words = [_criterion(part, name, several(getattr(part, name))) for name in names]
        words = [MEMBERS[part.name]] if isinstance(part, Member) else words or ["never"]
        window = [f"from step {part.from_step:,}"] if part.from_step else []
        window += [] if part.until_step is None else [f"before step {part.until_step:,}"]
        text = " or ".join(words)
        if window:
            text += f", {' and '.join(window)}{_counted_from(part)}"
        if part.wait_for is not None:
            text += f", waits for {drawing.title_of(part.wait_for)}"
        is_long = window or part.wait_for is not None
        found.append(f"({text})" if is_long and len(event.parts) > 1 else text)
    return " or ".join(found)


def _criterion(part: Event, name: str, points: tuple[Any, ...]) -> str:
    if name == "condition_function":
        function = getattr(points[0], "__name__", type(points[0]).__name__)
        return f"when {'its condition' if function == '<lambda>' else f'{function}()'} is true"
    if name == "at_timestamp":
        moments = [datetime.fromtimestamp(each).astimezone() for each in points]
        return f"at {_listed([each.isoformat(' ', 'seconds') for each in moments])}"
    if name in COUNTER_CRITERIA:
        every = "every" if name == "every_n" else "at"
        return f"{every} {_listed([f'{each:,}' for each in points])} of {part.of!r}"
    noun = "epoch" if name in EPOCH_CRITERIA else "step"
    if name in TIME_CRITERIA:
        text = _listed([f"{each:.15g} s" for each in points])
    elif name.startswith("every"):
        number = points[0]
        shown = f"{number:,}" if isinstance(number, int) else f"{number:.6g}"
        text = noun if points == (1,) else f"{shown} {noun}s"
    else:
        text = f"{noun}{'s' * (len(points) > 1)} {_listed([f'{each:,}' for each in points])}"
    if name.startswith("every"):
        text = f"every {text}"
    if noun == "epoch":
        return text if isinstance(points[0], float) else f"at the end of {text}"
    text = text if name.startswith("every") else f"at {text}"
    if name not in TIME_CRITERIA or part.per_launch:
        text += _counted_from(part)
    is_shifted = name == "every_n_steps" and part.first_at_step is not None
    return f"{text}, first at step {part.first_at_step:,}" if is_shifted else text


def _counted_from(part: Event) -> str:
    return " of each epoch" if part.per_epoch else " of this launch" if part.per_launch else ""


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(texts: list[str]) -> str:
    """Return texts as a list: "a", "a and b", "a, b, c and 5 more"."""
    *firsts, last = [*texts[:3], f"{len(texts) - 3} more"] if len(texts) > 4 else texts
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _fires(row: PlanRow) -> str:
    if row.times is not None:
        return f"{row.times:,}"
    return f">= {row.at_least:,}" if row.at_least else "?"


def _steps(row: PlanRow) -> str:
    """Return the first few steps of an event, the last, and what is left over."""
    text = ", ".join([f"{step:,}" for step in row.first])
    if len(row.first) == FEW and row.last not in row.first:
        text += " ..." if row.last is None else f" ... {row.last:,}"
    return text + (f", leaves {row.left_over:,} over" if row.left_over else "")
