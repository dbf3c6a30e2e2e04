"""What a run will do, told before it: when each event fires, and what is wrong with that."""

from __future__ import annotations

from collections import namedtuple
from itertools import islice

from . import checks, drawing, words
from .events import CRITERIA, Event, LoopEvents
from .progressions import Pattern, Union, progression
from .schedule import NEVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from os import PathLike
    from typing import NamedTuple

    from .events import BaseEvent
    from .schedule import Schedule
    from .source import Source

    class CourseFields(NamedTuple):
        """The fields of a Course."""

        first: int
        end: int
        is_exact: bool
        epoch: int
        epoch_start: int
        length: int | None
        counts_epochs: bool

    class RowFields(NamedTuple):
        """The fields of a PlanRow."""

        name: Hashable
        when: str
        at_least: int
        at_most: int | None
        first: tuple[int, ...]
        last: int | None
        parts: tuple[PlanRow, ...]

    class Criterion(NamedTuple):
        """One criterion of an Event, or a LoopEvents member; `name` is the parameter's."""

        name: str
        part: Event | LoopEvents
else:
    # typing would take longer to import than all of dloop
    CourseFields = namedtuple(
        "CourseFields", "first end is_exact epoch epoch_start length counts_epochs"
    )
    RowFields = namedtuple("RowFields", "name when at_least at_most first last parts")
    Criterion = namedtuple("Criterion", "name part")

OPEN = checks.MOST + 1
"""The end of a run of which no end is known; no step is as far."""
FEW = 3
"""How many of an event's first steps a row has."""
MOST_PARTS = 8
"""How many parts a union may have so that it is found, in any case, how often it fires."""
MOST_TERMS = 2 ** (2 * MOST_PARTS)
"""How many terms that may take: each part may have a period in steps and one in epochs."""
FEW_TERMS = 2**MOST_PARTS
"""The same, of a union of more parts."""
MOST_DIVIDERS = 60
"""How many ends of epochs a drawing shows."""

BY_STEP = ("every_n_steps", "at_step")
BY_EPOCH = ("every_n_epochs", "at_epoch", "EPOCH_END")
BY_CLOCK = ("every_n_seconds", "at_time", "at_timestamp")
UNPLANNED = ("INTERRUPT", "EXCEPTION")


class PlanRow(RowFields):
    """What a plan says of one event. Plain values, that do not change.

    Attributes:
        name: the event's name, or a member of LoopEvents.
        when: the event in words, such as "every 100 steps or at the end of training".
        at_least: how often it fires, at least.
        at_most: how often it fires, at most; None where nothing bounds it but the run's steps.
        first: the first few global steps at which it fires, as far as they are known beforehand:
            those of timers and conditions are not.
        last: the last of these; None where there is none, or the run's end is not known.
        parts: for a union, a row for each of its parts.

    Example:
        >>> from dloop import Event, Loop
        >>> row = Loop(range(500), {"Log": Event(every_n_steps=100)}, max_epochs=1).plan().rows[0]
        >>> row.name, row.when, row.times, row.first, row.last
        ('Log', 'every 100 steps', 5, (99, 199, 299), 499)
    """

    __slots__ = ()

    @property
    def times(self) -> int | None:
        """How often it fires; None where that is not known."""
        return self.at_least if self.at_least == self.at_most else None


class Plan:
    """What `Loop.plan` returns: when each event of a run fires. It does not change.

    `print(plan)` is a table of at most 80 columns. A notebook shows a drawing.

    Attributes:
        rows: a row for each event, and then for EPOCH_END and TRAINING_END.
        warnings: what is a mistake or a surprise, a line each.
        first_step: the first global step of the run.
        steps: how many steps it has, from `first_step` on; None where that is not known.
        most_steps: how many it has at most; None where nothing bounds it.
        epochs: how many epochs it goes through, in part or as a whole; None if not known.
        steps_per_epoch: the steps of an epoch; None if not known.
        summary: the run in one line of words.

    Example:
        >>> from dloop import Event, Loop
        >>> events = {"Log": Event(every_n_steps=100), "DropLR": Event(at_step=10_000)}
        >>> plan = Loop(range(250), events, max_epochs=3).plan()
        >>> print(plan)
        750 steps, 0 to 749; 3 epochs of 250 steps
        <BLANKLINE>
        event          when                       fires  at steps
        -------------  -------------------------  -----  -----------------------
        Log            every 100 steps                7  99, 199, 299 ... 699
        DropLR         at step 10,000                 0
        EPOCH_END      at the end of every epoch      3  249, 499, 749
        TRAINING_END   at the end of training         1  749
        <BLANKLINE>
        ! 'Log': 50 steps are left over after its last window; join
          LoopEvents.TRAINING_END to use them
        ! 'DropLR': at_step=10000 never fires, the run ends at step 749
        >>> plan.steps, plan.rows[0].times
        (750, 7)
    """

    __slots__ = (
        "_axis",
        "_lanes",
        "epochs",
        "first_step",
        "most_steps",
        "rows",
        "steps",
        "steps_per_epoch",
        "summary",
        "warnings",
    )

    def __init__(
        self,
        rows: tuple[PlanRow, ...],
        warnings: tuple[str, ...],
        first_step: int,
        steps: int | None,
        most_steps: int | None,
        epochs: int | None,
        steps_per_epoch: int | None,
        summary: str,
        axis: drawing.Axis,
        lanes: tuple[drawing.Lane, ...],
    ) -> None:
        self.rows = rows
        self.warnings = warnings
        self.first_step = first_step
        self.steps = steps
        self.most_steps = most_steps
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.summary = summary
        self._axis = axis
        self._lanes = lanes

    def __repr__(self) -> str:
        return f"<Plan: {self.summary}; {len(self.rows)} rows, {len(self.warnings)} warnings>"

    def __str__(self) -> str:
        """The plan as a table of at most 80 columns, with the warnings below it."""
        cells = []
        for row in self.rows:
            is_left_open = row.times is None and len(row.parts) > MOST_PARTS
            when = f"any of {len(row.parts)}:" if is_left_open else row.when
            cells.append([words.title(row.name), when, _times(row), _steps(row)])
            if is_left_open:
                cells += [["", f"- {part.when}", _times(part), _steps(part)] for part in row.parts]
        table = drawing.table(["event", "when", "fires", "at steps"], cells, right=[2])
        warnings = drawing.paragraphs("! ", self.warnings)
        summary = drawing.paragraphs("", [self.summary])
        return "\n".join([*summary, "", table, *([""] if warnings else []), *warnings])

    def _repr_html_(self) -> str:
        """The drawing and the warnings, as a notebook shows them."""
        return self._svg(False) + drawing.html_list(self.warnings)

    def save_svg(self, path: str | PathLike[str]) -> None:
        """Write the drawing to a file: a timeline with a lane for each event.

        It has a tick for each firing, and bands where these are close. Its colours follow the
        reader's light or dark setting.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self._svg(True))

    def _svg(self, standalone: bool) -> str:
        return drawing.timeline(f"Plan: {self.summary}", self._axis, self._lanes, standalone)


class Course(CourseFields):
    """The steps of a run and of its epochs, as far as they are known.

    Attributes:
        first: the run's first step.
        end: the first step that it does not have; at most that, where it is not exact.
        is_exact: whether the run has all steps before `end`.
        epoch: the epoch of the first step.
        epoch_start: the first step of that.
        length: the steps of an epoch; None where it is not known.
        counts_epochs: each epoch counts as one step here, so that ends of epochs can be counted
            where their length is not known. Nothing is known of steps then.
    """

    __slots__ = ()

    def window(self, part: Event | LoopEvents) -> range:
        """The steps at which `part` is looked at."""
        start, end = self.first, self.end
        if isinstance(part, Event):
            start = max(start, part.from_step)
            end = end if part.until_step is None else min(end, part.until_step)
        return range(start, max(start, end))

    def union(self, criteria: Iterable[Criterion]) -> Union:
        """The steps at which any of the criteria is known to fire."""
        found = [self.steps_of(criterion) for criterion in criteria]
        patterns = [each for each in found if isinstance(each, Pattern)]
        points = [point for each in found if isinstance(each, list) for point in each]
        return Union(patterns, points)

    def steps_of(self, criterion: Criterion) -> Pattern | list[int] | None:
        """The steps at which a criterion fires; None where they are not known."""
        name, part = criterion
        window = self.window(part)
        if self.counts_epochs:
            is_known = name in (*BY_EPOCH, "TRAINING_END") and not _has_window(part)
            window = range(self.first, self.end)
        elif name == "TRAINING_END":
            is_known = self.is_exact
        else:
            counts_places = isinstance(part, Event) and part.per_epoch and name in BY_STEP
            needs_length = name in BY_EPOCH or counts_places
            is_known = name in (*BY_STEP, *BY_EPOCH) and not (needs_length and self.length is None)
        if not window or name in UNPLANNED:
            return []
        if not is_known:
            return None
        if isinstance(part, LoopEvents):
            return [self.end - 1] if name == "TRAINING_END" else self._epoch_ends(1, window)
        if name == "every_n_epochs":
            return self._epoch_ends(part.every_n_epochs or 1, window)
        if name == "at_epoch":
            return [end for end in map(self._end_of, words.several(part.at_epoch)) if end in window]
        return self._steps_of_counts(name, part, window)

    def _steps_of_counts(self, name: str, part: Event, window: range) -> Pattern | list[int]:
        first, period = part.first_at_step, part.every_n_steps or 1
        first = period - 1 if first is None else first
        if part.per_epoch:
            places: range | tuple[int, ...] = range(first, max(first, self._length), period)
            if name == "at_step":
                places = tuple([at for at in words.several(part.at_step) if at < self._length])
            return self._pattern(window, places)
        begin = self.first if part.per_launch else 0
        if name == "at_step":
            return [begin + at for at in words.several(part.at_step) if begin + at in window]
        return self._pattern(progression(begin + first, period, window.start, window.stop))

    def _epoch_ends(self, every: int, window: range) -> Pattern:
        first = self._end_of(every - 1)
        return self._pattern(progression(first, every * self._length, window.start, window.stop))

    def _end_of(self, epoch: int) -> int:
        return self.epoch_start + (epoch - self.epoch + 1) * self._length - 1

    def _pattern(self, steps: range, places: range | tuple[int, ...] | None = None) -> Pattern:
        return Pattern(steps, places, self.epoch_start, self._length)

    @property
    def _length(self) -> int:
        return self.length or NEVER

    def stopped_by(self, criteria: list[Criterion]) -> Course:
        """The same, ended by the criteria of `stop_when`."""
        step = self.union(criteria).first_from(self.first)
        cut = self if step is None else self._replace(end=step + 1)
        is_open = any(cut.steps_of(criterion) is None for criterion in criteria)
        return cut._replace(is_exact=self.is_exact and not is_open)


class Forecast:
    """What a plan says, worked out from the course of the run.

    Args:
        schedule: what is due when, and the limit.
        course: the run's steps.
        epochs: the run's epochs, counted as steps; None where they are not known, or follow from
            the steps.
        by_limit: the run's steps if `stop_when` did not end it.
        is_synced: whether processes agree on what a clock asks for.
        may_be_over: whether the run may turn out to be over when it begins.
        missing: members of LoopEvents that never come in this run, each with the reason.
    """

    def __init__(
        self,
        schedule: Schedule,
        course: Course,
        epochs: Course | None,
        by_limit: Course,
        is_synced: bool,
        may_be_over: bool,
        missing: Mapping[str, str],
    ) -> None:
        self._schedule = schedule
        self._course = course
        self._epochs = epochs
        self._by_limit = by_limit
        self._is_synced = is_synced
        self._may_be_over = may_be_over
        self._missing = missing

    # How often

    def row(self, name: Hashable, parts: Sequence[Event | LoopEvents]) -> PlanRow:
        """The row of an event."""
        course = self._course
        criteria = _criteria(parts)
        at_least, at_most = self._bounds(criteria, len(parts))
        known = course.union(criteria)
        return PlanRow(
            name,
            words.of_parts(parts),
            at_least,
            at_most,
            tuple(islice(known.from_on(course.first), FEW)),
            known.last_before(course.end) if course.is_exact else None,
            tuple([self.row(name, [part]) for part in parts]) if len(parts) > 1 else (),
        )

    def _bounds(self, criteria: list[Criterion], parts: int) -> tuple[int, int | None]:
        """How often the criteria fire together, at least and at most (None: nothing bounds it)."""
        course = self._course
        known = course.union(criteria)
        most_terms = MOST_TERMS if parts <= MOST_PARTS else FEW_TERMS
        counted = known.size(most_terms)
        ends = None if self._epochs is None else self._epochs.union(criteria).size(most_terms)
        if counted is None or (self._epochs is not None and ends is None):
            alone = [self._bounds([criterion], 1) for criterion in criteria]
            return max([least for least, _ in alone]), _total([most for _, most in alone])
        if ends is not None and all(self._is_told_by_epochs(criterion) for criterion in criteria):
            return ends, ends
        at_least = counted if course.is_exact else max(self._sure(criteria), ends or 0)
        is_endless = any(pattern.steps.stop == OPEN for pattern in known.patterns)
        unknown = [criterion for criterion in criteria if course.steps_of(criterion) is None]
        at_most = None if is_endless else counted
        return at_least, _total([at_most, *map(self._most_of, unknown)])

    def _sure(self, criteria: list[Criterion]) -> int:
        """How often they fire in any case: at the first step, and once at the end."""
        if self._may_be_over:
            return 0
        first = self._course._replace(end=self._course.first + 1)
        is_at_end = any(criterion.name == "TRAINING_END" for criterion in criteria)
        return int(is_at_end or bool(first.union(criteria)))

    def _is_told_by_epochs(self, criterion: Criterion) -> bool:
        assert self._epochs is not None
        is_known = self._epochs.steps_of(criterion) is not None
        return is_known or self._course.steps_of(criterion) == []

    def _most_of(self, criterion: Criterion) -> int | None:
        """How often a criterion fires at most whose steps are not known."""
        name, part = criterion
        if isinstance(part, LoopEvents) and name == "TRAINING_END":
            return 1
        if isinstance(part, Event):
            if name in ("at_epoch", "at_time", "at_timestamp"):
                return len(words.several(getattr(part, name)))
            limit = self._schedule.max_time
            if name == "every_n_seconds" and limit < NEVER:
                period = max(1, checks.nanoseconds(part.every_n_seconds or 0))
                is_bounded = not (part.per_launch or self._is_synced)
                return -(-limit // period) if is_bounded else None
        if self._epochs is not None and self._epochs.steps_of(criterion) is not None:
            return self._epochs.union([criterion]).size(1)
        return None

    # The run

    @property
    def steps(self) -> int | None:
        """How many steps the run has, where that is known."""
        return self._course.end - self._course.first if self._course.is_exact else None

    @property
    def most_steps(self) -> int | None:
        """How many it has at most."""
        course = self._course
        return None if course.end == OPEN else course.end - course.first

    @property
    def epochs(self) -> int | None:
        """How many epochs it goes through, in part or as a whole."""
        course = self._course if self._epochs is None else self._epochs
        if not course.is_exact or course.length is None:
            return None
        if course.end == course.first:
            return 0
        return (course.end - 1 - course.epoch_start) // course.length + 1

    def summary(self, length_is_certain: bool) -> str:
        """The run in words."""
        course, epochs = self._course, self.epochs
        if course.first == course.end:
            return "no step is left"
        if course.is_exact:
            text = f"{words.counted(course.end - course.first, 'step')}, {course.first:,}"
            text += f" to {course.end - 1:,}" if course.end - 1 > course.first else ""
        elif course.end < OPEN:
            text = f"at most {words.counted(course.end - course.first, 'step')}"
            text += f", from {course.first:,} on" if course.first else ""
        else:
            text = f"{self._limit()}, steps not known"
        if epochs is not None and course.length != NEVER:
            text += f"; {words.counted(epochs, 'epoch')}"
        if course.length is None:
            text += "" if epochs is None else " of unknown length"
        elif course.length < NEVER:
            text += " of " if epochs is not None else "; epochs of "
            text += words.counted(course.length, "step")
            text += "" if length_is_certain else " (if all are as long as the next)"
        return text

    def _limit(self) -> str:
        name, value = self._schedule.limit
        return f"{name}={value / 1e9 if name == 'max_seconds' else value:.15g}"

    # What is wrong

    def warnings_of_run(self, is_over: bool, is_empty: bool, is_shared: bool) -> Iterator[str]:
        """What is wrong with the run, or open."""
        if is_over:
            yield f"the run is over: it has reached {self._limit()}"
        elif is_empty:
            yield "the dataloader is empty: its len() is 0"
        if is_shared:
            yield (
                "an epoch is as long as its shortest on all processes; this plan has the length "
                "on this one"
            )

    def warnings_of_event(
        self, name: str, parts: Sequence[Event | LoopEvents], of_stop: bool = False
    ) -> Iterator[str]:
        """What is wrong with an event, or with `stop_when`."""
        course = self._by_limit if of_stop else self._course
        if course.first == course.end:
            return
        criteria = _criteria(parts)
        if not criteria:
            yield f"{name} is off: it is never due"
        for criterion in criteria:
            text = f"{name}: {words.of_parameter(criterion.part, criterion.name)}"
            reason = self._why_never(course, criterion)
            if reason:
                yield f"{text} never fires, {reason}"
            elif criterion.name in ("at_step", "at_epoch"):
                yield from self._points_that_never_come(text, course, criterion)
            elif criterion.name in ("every_n_seconds", "at_time"):
                yield from self._past_the_limit(text, criterion)
        if not of_stop and course.is_exact:
            yield from _left_over(name, course, criteria)

    def _why_never(self, course: Course, criterion: Criterion) -> str | None:
        """Why a criterion never fires; None if it does, may do, or did before the run began."""
        name, part = criterion
        start = part.from_step if isinstance(part, Event) else 0
        if name in UNPLANNED:
            return self._missing.get(name)
        if start >= course.end:
            return f"{_ends(course)}, before from_step={start}"
        if course.steps_of(criterion) is None:
            epochs = self._epochs
            if epochs is None or epochs.steps_of(criterion) is None or epochs.union([criterion]):
                return None
            on = epochs._replace(end=OPEN)
            return f"the run ends with epoch {epochs.end - 1:,}" if on.union([criterion]) else None
        if course.union([criterion]):
            return None
        if isinstance(part, Event) and part.per_epoch and name in BY_STEP:
            pattern = course.steps_of(criterion)
            if isinstance(pattern, Pattern) and not pattern.places:
                return f"an epoch has {words.counted(course.length or 0, 'step')}"
        if name in BY_EPOCH and course.length == NEVER:
            return "this dataloader is a stream, whose epoch does not end"
        if course._replace(end=OPEN).union([criterion]):
            steps = course.end - course.first
            period = None
            if isinstance(part, Event) and name == "every_n_steps" and not part.per_epoch:
                period = part.every_n_steps
            if period is not None and period > steps and course.is_exact:
                return f"the run has {words.counted(steps, 'step')}"
            if name in BY_EPOCH:
                epoch = course.epoch + (course.end - 1 - course.epoch_start) // (course.length or 1)
                return f"{_ends(course)}, in epoch {epoch:,}"
            return _ends(course)
        is_past = course.first > start
        return None if is_past else "its window has no such step"

    def _points_that_never_come(
        self, text: str, course: Course, criterion: Criterion
    ) -> Iterator[str]:
        """The steps or epochs of a collection that never come, while others do."""
        part = criterion.part
        assert isinstance(part, Event)
        reason, end = _ends(course), course.end
        if criterion.name == "at_epoch":
            if course.length is not None:
                end = course.epoch + (course.end - course.epoch_start) // course.length
            elif self._epochs is not None:
                end = self._epochs.end
                reason = f"the run ends with epoch {end - 1:,}"
            else:
                return
        elif part.per_epoch:
            reason = f"an epoch has {words.counted(course.length or 0, 'step')}"
            end = NEVER if course.length is None else course.length
        elif part.per_launch:
            end -= course.first
        points = words.several(getattr(part, criterion.name))
        late = [f"{point:,}" for point in points if point >= end]
        if late:
            yield f"{text} never fires at {words.listed(late)}, {reason}"

    def _past_the_limit(self, text: str, criterion: Criterion) -> Iterator[str]:
        """A time criterion beyond `max_seconds`; pauses are in no launch's way."""
        part, limit = criterion.part, self._schedule.max_time
        if isinstance(part, LoopEvents) or part.per_launch:
            return
        seconds = words.several(getattr(part, criterion.name))
        late = [each for each in seconds if checks.nanoseconds(each) > limit]
        if late:
            which = "" if len(seconds) == 1 else f"; {late[0]:.15g}"
            yield (
                f"{text}{which} is past {self._limit()}, and fires only if the last step is as late"
            )

    def open_by_length(self, events: Mapping[str, Sequence[Event | LoopEvents]]) -> Iterator[str]:
        """What stays open because the length of an epoch is not known."""
        course = self._course
        if course.length is not None:
            return
        found = []
        if self._schedule.max_epochs < NEVER and not course.is_exact:
            found.append("the number of steps")
        for name, parts in events.items():
            criteria = _criteria(parts)
            needs_length = [
                each
                for each in criteria
                if course.steps_of(each) is None and (each.name in BY_EPOCH or each.name in BY_STEP)
            ]
            at_least, at_most = self._bounds(criteria, len(parts))
            if needs_length and at_least != at_most:
                found.append(name)
        if found:
            yield (
                f"the length of an epoch is not known, which leaves open {words.listed(found)}; "
                "dataloader_len would tell"
            )

    # The drawing

    def axis(self, rows: Sequence[PlanRow]) -> drawing.Axis:
        """The steps that the drawing shows: all, or where no end is known the first few."""
        course = self._course
        end = course.end
        if end == OPEN:
            latest = max([step for row in rows for step in row.first], default=course.first)
            end = latest + (latest - course.first) // 4 + 1
        dividers = range(0)
        if course.length is not None and 0 < (end - course.first) // course.length < MOST_DIVIDERS:
            begin = course.epoch_start + course.length
            dividers = range(begin, end, course.length)
        return drawing.Axis(course.first, end, "step", dividers, not course.is_exact)

    def lane(self, row: PlanRow, parts: Sequence[Event | LoopEvents]) -> drawing.Lane:
        """What the drawing shows of an event."""
        criteria = _criteria(parts)
        unknown = [each.name for each in criteria if self._course.steps_of(each) is None]
        notes = []
        if any(name in BY_CLOCK for name in unknown):
            notes.append("by the clock")
        if "condition_function" in unknown:
            notes.append("by a condition")
        if any(name in (*BY_EPOCH, *BY_STEP) for name in unknown):
            notes.append("by epochs, whose length is not known")
        if "TRAINING_END" in unknown:
            notes.append("at the end, which is not known")
        title, times, steps = words.title(row.name), _times(row), _steps(row)
        detail = f"{title}: {row.when}; {times} times" + (f", at steps {steps}" if steps else "")
        next_mark = self._course.union(criteria).first_from
        return drawing.Lane(title, times, detail, ", ".join(notes), next_mark)


def forecast(
    schedule: Schedule,
    source: Source,
    first: int,
    place: tuple[int, int] | None,
    is_over: bool,
    is_synced: bool,
    missing: Mapping[str, str],
) -> Plan:
    """The plan of a run.

    Args:
        schedule: what is due when, and the limit.
        source: where the batches come from; it is asked for its length alone.
        first: the run's first step.
        place: the epoch of that step, and how many of its steps were done before; None where that
            follows from the lengths of epochs, which are not known for certain.
        is_over: whether the run has reached its limit already.
        is_synced: whether there are other processes to agree with.
        missing: members of LoopEvents that never come in this run, each with the reason.
    """
    length, is_certain = source.expected_steps()
    is_placed = place is not None or length is not None
    epoch, done = place or divmod(first, length or NEVER)
    by_limit = _course(schedule, length, first, epoch, done)
    if is_over or length == 0:
        by_limit = by_limit._replace(end=first, is_exact=True, length=length or None)
    stop_parts = () if schedule.stop_when is None else schedule.stop_when.parts
    stop = [each for each in _criteria(stop_parts) if each.name != "TRAINING_END"]
    course = by_limit.stopped_by(stop)
    epochs = None
    if schedule.max_epochs < NEVER and length is None and is_placed and not course.is_exact:
        epochs = Course(epoch, schedule.max_epochs, True, epoch, epoch, 1, True).stopped_by(stop)
    if epochs is not None and not epochs.is_exact:
        epochs = None
    may_be_over = not (is_placed or course.is_exact)
    told = Forecast(schedule, course, epochs, by_limit, is_synced, may_be_over, missing)
    events = {name: event.parts for name, event in schedule.events.items()}
    members = {each: (each,) for each in (LoopEvents.EPOCH_END, LoopEvents.TRAINING_END)}
    rows = tuple([told.row(name, parts) for name, parts in {**events, **members}.items()])
    shown = {checks.shown(name): parts for name, parts in events.items()}
    is_shared = is_synced and source.given_len is None and length not in (None, NEVER)
    warnings = [*told.warnings_of_run(is_over, length == 0, is_shared)]
    warnings += told.open_by_length(shown)
    for name, parts in shown.items():
        warnings += told.warnings_of_event(name, parts)
    warnings += _same_definitions(schedule.events)
    if schedule.stop_when is not None:
        warnings += told.warnings_of_event("stop_when", stop_parts, of_stop=True)
    return Plan(
        rows,
        tuple(warnings),
        first,
        told.steps,
        told.most_steps,
        told.epochs,
        None if length == NEVER else length,
        told.summary(is_certain),
        told.axis(rows),
        tuple([told.lane(row, parts) for row, parts in zip(rows, {**events, **members}.values())]),
    )


def _course(
    schedule: Schedule, length: int | None, first: int, epoch: int, epoch_steps: int
) -> Course:
    """The course of a run that only its limit ends."""
    epoch_start = first - epoch_steps
    if length and epoch_steps >= length:  # the epoch is over, or shorter than it was
        epoch, epoch_start = epoch + 1, first
    end = OPEN
    if schedule.max_steps < NEVER:
        end = schedule.max_steps
    elif schedule.max_epochs < NEVER and length is not None:
        end = epoch_start + (schedule.max_epochs - epoch) * length
    end = min(max(first, end), OPEN)
    return Course(first, end, end < OPEN, epoch, epoch_start, length, False)


def _criteria(parts: Sequence[Event | LoopEvents]) -> list[Criterion]:
    """All criteria of the parts of an event."""
    found = []
    for part in parts:
        if isinstance(part, LoopEvents):
            found.append(Criterion(part.name, part))
        else:
            names = [name for name in CRITERIA if getattr(part, name) is not None]
            found += [Criterion(name, part) for name in names]
    return found


def _has_window(part: Event | LoopEvents) -> bool:
    return isinstance(part, Event) and (part.from_step > 0 or part.until_step is not None)


def _total(numbers: list[int | None]) -> int | None:
    """The sum; None where any of them is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _ends(course: Course) -> str:
    latest = "" if course.is_exact else " at the latest"
    return f"the run ends at step {course.end - 1:,}{latest}"


def _left_over(name: str, course: Course, criteria: list[Criterion]) -> Iterator[str]:
    """Steps after the last window of `every_n_steps`, at which nothing of the event fires."""
    windows = [
        part
        for criterion, part in criteria
        if isinstance(part, Event)
        and criterion == "every_n_steps"
        and part.first_at_step is None
        and part.until_step is None
    ]
    fires = course.union(criteria)
    is_open = any(course.steps_of(criterion) is None for criterion in criteria)
    if not windows or not fires or is_open:
        return
    epoch_end = course.epoch_start + (course.length or NEVER) - 1
    if any(part.per_epoch for part in windows) and epoch_end < course.end:
        last = fires.last_before(epoch_end + 1)
        if last is not None and last < epoch_end:
            yield (
                f"{name}: {_are(epoch_end - last)} left over at the end of each epoch; join "
                "LoopEvents.EPOCH_END to use them"
            )
        return
    last = fires.last_before(course.end)
    if last is not None and last < course.end - 1:
        yield (
            f"{name}: {_are(course.end - 1 - last)} left over after its last window; join "
            "LoopEvents.TRAINING_END to use them"
        )


def _are(steps: int) -> str:
    return f"{words.counted(steps, 'step')} {'is' if steps == 1 else 'are'}"


def _same_definitions(events: Mapping[Hashable, BaseEvent]) -> Iterator[str]:
    """Names that are due at the same steps by definition, unless they are off."""
    names: dict[BaseEvent, list[str]] = {}
    for name, event in events.items():
        if _criteria(event.parts):
            names.setdefault(event, []).append(checks.shown(name))
    for event, same in names.items():
        if len(same) > 1:
            yield f"{words.listed(same)} have the same definition: {words.of_parts(event.parts)}"


def _times(row: PlanRow) -> str:
    """How often an event fires, in a few characters."""
    if row.times is not None:
        return f"{row.times:,}"
    if row.at_most is None:
        return f">= {row.at_least:,}" if row.at_least else "?"
    return f"{row.at_least:,} to {row.at_most:,}" if row.at_least else f"<= {row.at_most:,}"


def _steps(row: PlanRow) -> str:
    """The first few steps of an event, and the last."""
    text = ", ".join([f"{step:,}" for step in row.first])
    if not row.first or row.last in row.first or row.at_most == len(row.first):
        return text
    return f"{text} ..." if row.last is None else f"{text} ... {row.last:,}"
