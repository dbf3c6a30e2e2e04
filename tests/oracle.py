"""What a run must yield, worked out from a plan by the letter of the contract.

A `Plan` is a script: the loader, the events, the limit, and what happens in each life of the run.
An `Oracle` goes through it as a Loop would. It fetches batch by batch and asks each criterion at
each step, as the criterion is defined; it looks nothing up and plans nothing ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final, NamedTuple

from dloop import DataExhaustedError, DataLengthError, LoopError
from plans import Part, Parts, Plan

REASONS: Final = (
    "finish",
    "stop",
    "max_steps",
    "max_epochs",
    "max_seconds",
    "stop_when",
    "exhausted",
)
"""Which `stop_reason` counts where several apply: the first of these."""

OF_LAUNCH: Final = ("every_n_steps", "at_step", "every_n_seconds", "at_time")
"""The criteria that count from the launch if an Event is `per_launch`."""


class World:
    """Time, and what happens by script. A loop and its oracle have one each."""

    def __init__(self, plan: Plan, errors: Iterable[tuple[str, str, int]]) -> None:
        self.now = 1000
        self.calls: list[tuple[Any, ...]] = []  # of the conditions
        self.fetched: set[str] = set()
        self._costs = plan.fetch_costs
        self._errors = {batch: [kind] * times for batch, kind, times in errors}

    def fetch(self, batch: str) -> str:
        """Let a batch be fetched. It takes its time only once, also if its epoch is reopened."""
        if self._errors.get(batch):
            kind = self._errors[batch].pop()
            raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[kind](batch)
        if batch not in self.fetched:
            epoch, place = map(int, batch.split("."))
            self.now += self._costs[(epoch + place) % len(self._costs)]
            self.fetched.add(batch)
        return batch

    def begin_again(self, step: int) -> None:
        """Let all batches take their time again; forget calls for steps that were not made."""
        self.fetched.clear()
        while self.calls and self.calls[-1][1] > step:
            self.calls.pop()

    def ask(self, name: str, part: Part, epoch: int, global_step: int, epoch_step: int) -> bool:
        """Call a condition."""
        self.calls.append((name, global_step, epoch, epoch_step))
        if global_step == part.raises_at:
            raise ArithmeticError(name)
        return global_step in (part.condition or ())


class State(NamedTuple):
    """The fields of LoopState."""

    epoch: int
    global_step: int
    epoch_step: int
    epoch_end: bool
    training_end: bool
    elapsed: float
    steps_done: int


@dataclass(frozen=True)
class Saved:
    """What a state holds: the next step's place, and what came before it."""

    steps: int = 0
    epoch: int = 0
    epoch_steps: int = 0
    elapsed: int = 0
    reading: int = 0  # the training time at the latest step that is done
    fired_step: Mapping[str, int] = field(default_factory=dict)  # by name, at which it last fired
    # By name, and whether it is counted from the launch
    fired_time: Mapping[tuple[Any, bool], int] = field(default_factory=dict)
    times_met: frozenset[tuple[str, Part | str, int]] = frozenset()  # of at_time
    waits: frozenset[tuple[str, Part, bool]] = frozenset()  # what was met and waits; if it lasts
    count: int = 0
    finished: bool = False
    epoch_len: int | None = None

    @property
    def epochs(self) -> Fraction:
        return self.epoch + Fraction(self.epoch_steps, self.epoch_len or 2**62)


class Step(NamedTuple):
    """A step as criteria see it."""

    epoch: int
    global_step: int
    epoch_step: int
    epoch_end: bool
    launch_step: int  # from 0 in this launch
    epoch_len: int | None  # as far as it is known

    def epochs(self, epoch_steps: int) -> Fraction:
        """How many epochs are done after so many steps of this one."""
        return self.epoch + Fraction(epoch_steps, self.epoch_len or 2**62)

    def epochs_done(self) -> Fraction:
        return Fraction(self.epoch + 1) if self.epoch_end else self.epochs(self.epoch_step + 1)

    def ends_part(self, part: Part) -> bool:
        """Whether another multiple of the part's period in epochs is reached."""
        if not part.every_n_epochs:
            return False
        period = exact(part.every_n_epochs)
        before = self.epochs(self.epoch_step)
        return self.epochs_done() // period > before // period

    def counted_by(self, part: Part) -> int:
        """The step's number as the part counts steps."""
        if part.per_epoch:
            return self.epoch_step
        return self.launch_step if part.per_launch else self.global_step

    def is_in_window(self, part: Part) -> bool:
        number, end = self.counted_by(part), part.until_step
        return number >= (part.from_step or 0) and (end is None or number < end)

    def is_before_end(self, part: Part) -> bool:
        return part.until_step is None or self.counted_by(part) < part.until_step

    def meets(self, part: Part) -> set[str]:
        """The criteria of steps and epochs that are met."""
        number, n, first = self.counted_by(part), part.every_n_steps, part.first_at_step
        met = {
            "every_n_steps": n is not None
            and ((number + 1) % n == 0 if first is None else number in range(first, 2**62, n)),
            "at_step": number in (part.at_step or ()),
            "every_n_epochs": self.ends_part(part),
            "at_epoch": self.epoch_end and self.epoch in (part.at_epoch or ()),
        }
        return {name for name in met if met[name]} if self.is_in_window(part) else set()


class Oracle:
    """Yields what a Loop of the plan must yield, with names in place of events.

    Attributes:
        state: as `Loop.state`.
        stop_reason: as `Loop.stop_reason`.
        is_finished: whether the run was finished as it was loaded.
        warned: what the run must warn of: "longer", "exhausted".
    """

    def __init__(self, plan: Plan, world: World, saved: Saved | None = None) -> None:
        self.events = plan.events
        self.warned: set[str] = set()
        self._plan = plan
        self._parts = [("stop_when", plan.stop_when or ()), *plan.events.items()]
        self._source = plan.source
        self._world = world
        self._index = 0  # the next batch's place in its iterator
        self._begin(self._at_start_step() if saved is None else saved)
        if plan.source.single_pass and plan.fast_forward:
            self._index = self._next.steps
        done = self._next.steps, self._next.epochs, self._next.reading
        limits = plan.max_steps, plan.max_epochs, plan.max_seconds
        is_reached = [limit is not None and n >= exact(limit) for n, limit in zip(done, limits)]
        self.is_finished = self._next.finished or any(is_reached)

    def _begin(self, saved: Saved) -> None:
        times = {key: time for key, time in saved.fired_time.items() if not key[1]}
        met = frozenset([key for key in saved.times_met if not is_per_launch(key[1])])
        self._launched = replace(saved, fired_time=times, times_met=met)
        self._before = self._done = self._next = self._launched
        self._started: int | None = None  # the clock at this launch's first request
        self._is_open = False  # whether an epoch is
        self._is_first_epoch = True  # of this launch
        self._was_left = False  # in this epoch, and entered again
        self._stop_asked = False
        self._triggered: set[str] = set()
        self._has_counted = saved.count > 0
        self._now: Step | None = None  # the latest of this launch
        self._is_cut = False  # whether finish_epoch() ended the epoch
        self._ahead: list[Any] = []  # batches that were fetched and not yielded
        self._late: Exception | None = None  # met in looking ahead
        self._answers: dict[int, set[tuple[str, Part]]] = {}  # true conditions, by step
        self.state = State(0, saved.steps - 1, -1, False, False, 0.0, saved.steps)
        self.stop_reason: str | None = None

    def _at_start_step(self) -> Saved:
        steps, length = self._plan.start_step, known_length(self._plan, 0)
        if length:
            return Saved(steps, steps // length, steps % length, epoch_len=length)
        return Saved(steps, 0, steps if self._plan.fast_forward else 0)

    # What users call

    def __iter__(self) -> Iterator[tuple[Any, frozenset[str]]]:
        for batches, names in self.chunks(1):
            yield None if batches is None else batches[0], names

    def chunks(self, sizes: int | tuple[int, ...]) -> Iterator[tuple[Any, frozenset[str]]]:
        if self.is_finished:
            return
        if self.stop_reason is not None:
            raise LoopError
        allowed = sorted(range(1, sizes + 1) if isinstance(sizes, int) else sizes, reverse=True)
        self._was_left = self._is_open
        while True:
            if self._is_open and self.state.epoch_end:
                self._ask_once_more()
            if self.stop_reason is not None:
                self.warned |= {"exhausted"} & {self.stop_reason}
                if any(part.every_n or part.at for _, part in self._single_parts()):
                    self.warned |= set() if self._has_counted else {"uncounted"}
                return
            try:
                size = self._gather(allowed)
            except Exception as error:
                if type(error) is ValueError and self._was_left and not self._source.single_pass:
                    self._is_open = False  # once, the epoch is opened again
                    continue
                self.stop_reason = "exception"
                if self._plan.on_exception == "raise" or isinstance(error, ArithmeticError):
                    raise
                yield None, self._at_exception()
                raise
            except KeyboardInterrupt:
                self._is_open = False
                raise
            if size:
                yield self._step(size)

    def stop(self) -> None:
        self._stop_asked = True

    def trigger(self, name: str) -> None:
        self._triggered.add(name)

    def finish(self) -> frozenset[str]:
        return self._amend(set(), set(), "finish")

    def finish_epoch(self) -> frozenset[str]:
        if self.state.epoch_end:
            return self._names
        self._is_cut = True
        self._answers.clear()
        assert self._now is not None
        self._now = self._now._replace(epoch_end=True)
        if not self._source.single_pass:
            self._ahead = []
        at, plan = self._now, self._plan
        found = [
            (name, part, at.meets(part) & {"every_n_epochs", "at_epoch"})
            for name, part in self._single_parts()
        ]
        joined = joined_with({"EPOCH_END"}, dict(self._parts))
        reason = "max_epochs" if at.epoch + 1 >= (plan.max_epochs or 2**62) else None
        return self._amend(joined | {"EPOCH_END"}, self._waiting_or_fired(found), reason)

    def count(self, name: str, number: int) -> frozenset[str]:
        self._has_counted = True
        before = self._next.count
        self._next = self._done = replace(self._next, count=before + number)
        after = before + number
        found = []
        for event, part in self._single_parts():
            n, at = part.every_n or 2**62, part.at or ()
            passes = after // n > before // n or any(before < each <= after for each in at)
            assert self._now is not None
            is_met = passes and self._now.is_in_window(part)
            found.append((event, part, {"every_n"} if is_met else set()))
        return self._amend(set(), self._waiting_or_fired(found), None)

    def restart(self) -> None:
        self._begin(self._at_start_step())
        self.is_finished = False

    def steps_since(self, name: str) -> int:
        """The steps since it fired before the latest step, or since the run began."""
        step, last = self.state.global_step, self._next.fired_step.get(name)
        if last == step:
            last = self._before.fired_step.get(name)
        return step - (self._plan.start_step - 1 if last is None else last)

    def state_dict(self, step_done: bool = True) -> Saved:
        return replace(self._done if step_done else self._before, elapsed=self._elapsed())

    def _elapsed(self) -> int:
        return self._launched.elapsed + self._launch_time()

    def _launch_time(self) -> int:
        return 0 if self._started is None else self._world.now - self._started

    # Where batches come from

    def _gather(self, sizes: list[int]) -> int:
        """Fetch the next list's batches; return their number, 0 if the epoch has no more."""
        if not self._is_open:
            self._open()
        if self._stop_asked or self._triggered:
            sizes = [1]
        steps = range(1, sizes[0] + 1)
        end = fitting(sizes, next((k for k in steps if self._is_scheduled(k)), sizes[0]))
        for k in range(1, end + 1):
            if not self._has(k):
                end = k - 1
                break
            if self._looks_ahead:
                self._look_beyond(k)
            ends = self._ends_epoch(k)
            # Without a size that fits, the last step belongs to the next list
            if ((k in sizes or not ends) and self._is_asked_true(k)) or ends:
                end = k
                break
        if end == 0:
            self._end_unforeseen()
        return fitting(sizes, end)

    def _open(self) -> None:
        """Open the epoch at the place reached."""
        plan, source, place = self._plan, self._source, self._next
        self._known_length = known_length(plan, place.epoch)
        self._true_length = source.steps(source.length(place.epoch))
        if self._known_length == 0:
            raise DataExhaustedError
        if not source.single_pass:
            is_left_as_it_is = self._is_first_epoch and not plan.fast_forward
            self._index = 0 if is_left_as_it_is else place.epoch_steps
        is_stream = source.single_pass and plan.max_epochs is None
        looks_ahead = not is_stream if plan.lookahead is None else plan.lookahead
        self._looks_ahead = looks_ahead and self._known_length is None and not source.says_end
        if not source.single_pass:
            self._ahead, self._late = [], None
        if self._started is None:
            # The order of a resumed part shows only once a batch was fetched
            if source.nested and source.sets_epoch and place.epoch and not place.epoch_steps:
                self._has(1)
            self._started = self._world.now
        self._is_open, self._was_left = True, False

    def _has(self, k: int) -> bool:
        """Whether the epoch has `k` more batches; fetch them."""
        source, place = self._source, self._index + len(self._ahead)
        if len(self._ahead) >= k:
            return True
        if self._late is not None:
            raise self._late
        if place >= self._true_length:
            return False
        size, epoch = source.batched or 1, self._next.epoch
        places = range(place * size, min((place + 1) * size, source.length(epoch)))
        batches = [self._world.fetch(source.batch(epoch, i)) for i in places]
        self._ahead.append(batches if source.batched else batches[0])
        return True

    def _look_beyond(self, k: int) -> None:
        try:
            self._has(k + 1)
        except Exception as error:
            self._late = error

    def _ends_epoch(self, k: int) -> bool:
        """Whether the batch `k` from here is known to be its epoch's last."""
        if self._known_length is not None:
            return self._next.epoch_steps + k == self._known_length
        knows = self._source.says_end or self._looks_ahead
        return knows and self._index + k == self._true_length

    def _ask_once_more(self) -> None:
        """End an epoch as a `for` does, which asks until there are no more batches."""
        is_cut = self._plan.dataloader_len is not None or self._source.single_pass
        is_left_as_it_is = self._is_first_epoch and not self._plan.fast_forward
        is_cut, self._is_cut = is_cut or self._is_cut, False
        if self._index < self._true_length and not is_cut and not is_left_as_it_is:
            source, size = self._source, self._source.batched or 1
            end = min((self._index + 1) * size, source.length(self.state.epoch))
            for place in range(self._index * size, end):
                self._world.fetch(source.batch(self.state.epoch, place))
            self.warned.add("longer")
        self._is_open = self._is_first_epoch = False

    def _end_unforeseen(self) -> None:
        """Go on to the next epoch, or end the run, since the iterator has no more."""
        taken, single_pass = self._next.epoch_steps, self._source.single_pass
        if taken == 0 and (self._next.epoch == 0 or not single_pass):
            raise DataExhaustedError
        if taken and self._known_length is not None:
            raise DataLengthError
        if single_pass:
            self.stop_reason = "exhausted"
        else:
            self._is_open = self._is_first_epoch = False
            self._next = replace(self._next, epoch=self._next.epoch + 1, epoch_steps=0)

    # What fires

    def _at(self, k: int, epoch_end: bool = False) -> Step:
        """The step `k` from here."""
        step, epoch_step = self._next.steps + k - 1, self._next.epoch_steps + k - 1
        launch_step = step - self._launched.steps
        return Step(self._next.epoch, step, epoch_step, epoch_end, launch_step, self._known_length)

    def _is_scheduled(self, k: int) -> bool:
        """Whether a list has to end at the step `k` from here, as is known before any fetch."""
        at = self._at(k)
        if self._limit(at, False) in ("max_steps", "max_epochs"):
            return True
        if self._known_length is not None and self._ends_epoch(k):
            return True
        parts = [part for _, parts in self._parts for part in parts]
        return any(isinstance(part, Part) and at.meets(part) for part in parts)

    def _is_asked_true(self, k: int) -> bool:
        """Call the conditions of the step `k` from here, unless they were; whether any is true."""
        at = self._at(k)
        if at.global_step not in self._answers:
            self._answers[at.global_step] = {
                (name, part)
                for name, parts in self._parts
                for part in parts
                if isinstance(part, Part) and part.condition is not None
                if at.is_in_window(part) and self._world.ask(name, part, *at[:3])
            }
        return bool(self._answers[at.global_step])

    def _met(self, name: str, part: Part | str, at: Step) -> set[tuple[str, int]]:
        """The criteria that are met, each with the time that it waited for, if it did."""
        if isinstance(part, str):
            return {(part, 0)} if part == "EPOCH_END" and at.epoch_end else set()
        if not at.is_in_window(part):
            return set()
        met = {(criterion, 0) for criterion in at.meets(part)}
        if (name, part) in self._answers[at.global_step]:
            met.add(("condition", 0))
        time = self._launch_time() if part.per_launch else self._elapsed()
        times = self._next.fired_time
        last = max([times.get((each, part.per_launch), 0) for each in (name, (name, part))])
        if part.every_n_seconds is not None and time - last >= part.every_n_seconds:
            met.add(("every_n_seconds", 0))
        due = [t for t in part.at_time or () if t <= time]
        return met | {("at_time", t) for t in due if (name, part, t) not in self._next.times_met}

    def _step(self, size: int) -> tuple[list[Any], frozenset[str]]:
        """Make the steps of a list. Only at the last does anything fire."""
        at = self._at(size, self._ends_epoch(size))
        found: list[tuple[str, Part, set[str]]] = []
        times_met = set(self._next.times_met)
        for name, part in self._single_parts():
            met = self._met(name, part, at)
            found.append((name, part, {criterion for criterion, _ in met}))
            times_met |= {(name, part, t) for criterion, t in met if criterion == "at_time"}
        for name in self._triggered:
            waiting = [each for each in self.events[name] if waits(each)]
            found += [(name, each, {"trigger"}) for each in waiting or [Part()]]
        names = joined_with({"EPOCH_END"}, dict(self._parts)) | {"EPOCH_END"}
        self._before, self._now = self._next, at
        self._time, self._launch_now = self._elapsed(), self._launch_time()
        self._times_met, self._names = frozenset(times_met), frozenset[str]()
        self.stop_reason = None
        is_stopped, self._waiting = self._stop_asked, set(self._next.waits)
        self._fired: set[Any] = set()  # at this step: names, and parts that were met and wait
        self._triggered, self._stop_asked = set(), False
        fired = self._waiting_or_fired(found)
        events = self._amend(names if at.epoch_end else set(), fired, self._limit(at, is_stopped))
        batches, self._ahead = self._ahead[:size], self._ahead[size:]
        self._index += size
        return batches, events

    def _at_exception(self) -> frozenset[str]:
        """What fires in the step of an exception, which has the numbers of the step before it."""
        step, epoch_step = self._next.steps - 1, self._next.epoch_steps - 1
        if self._now is not None and not self._is_open:
            epoch_step = self._now.epoch_step
        at = Step(self._next.epoch, step, epoch_step, False, step - self._launched.steps, None)
        names = {"EXCEPTION", "TRAINING_END"}
        names |= joined_with(names, self.events)
        waiting = {(name, part) for name, part, _ in self._next.waits if name != "stop_when"}
        for name in self._triggered:
            own = {(name, each) for each in self.events[name] if waits(each)}
            waiting |= own
            names |= set() if own else {name}
        fire = {n for n, part in waiting if part.wait_for in names and at.is_in_window(part)}
        return frozenset(names | fire)

    def _single_parts(self) -> list[tuple[str, Part]]:
        return [(name, p) for name, parts in self._parts for p in parts if isinstance(p, Part)]

    def _waiting_or_fired(
        self, found: list[tuple[str, Part, set[str]]]
    ) -> set[tuple[str, Part | None, bool]]:
        """What is met: names, and parts that wait; each with whether a launch does not matter."""
        result: set[tuple[str, Part | None, bool]] = set()
        for name, part, met in found:
            counts = OF_LAUNCH if part.per_launch else ()
            for lasts in {criterion not in counts for criterion in met}:
                result.add((name, part if waits(part) else None, lasts))
        return result

    def _limit(self, at: Step, is_stopped: bool) -> str | None:
        """Why the step is the last, but for `stop_when`."""
        plan = self._plan
        applies = {
            "stop": is_stopped,
            "max_steps": at.global_step + 1 == plan.max_steps,
            "max_epochs": at.epochs_done() >= exact(plan.max_epochs or 2**62),
            "max_seconds": plan.max_seconds is not None and self._elapsed() >= plan.max_seconds,
            "exhausted": self._source.single_pass and self._looks_ahead and at.epoch_end,
        }
        return next((reason for reason in REASONS if applies.get(reason)), None)

    def _amend(
        self, names: set[str], met: set[tuple[str, Part | None, bool]], reason: str | None
    ) -> frozenset[str]:
        """Let more happen at the latest step; return its events."""
        assert self._now is not None
        at, before = self._now, self._before
        names, is_final = names | self._names, "stop_when" in names
        waiting = {each for each in self._waiting if at.is_before_end(each[1])}
        for name, part, lasts in met:
            if part is not None:
                waiting.add((name, part, lasts))
                self._fired |= {(name, part)}
            else:
                names.add(name)
                is_final |= lasts and name == "stop_when"
        if reason is None or (reason == "max_epochs" and self.stop_reason != "stop_when"):
            reason = self.stop_reason or reason

        def settle() -> bool:
            stops = False
            for name, part, lasts in waiting:
                if part.wait_for in names and at.is_in_window(part):
                    names.add(name)
                    stops |= lasts and name == "stop_when"
            return stops

        is_final |= settle() or self._next.finished
        if "stop_when" in names and reason in (None, "exhausted"):
            reason = "stop_when"
        finished = reason == "finish" or is_final
        if reason is not None:
            names |= joined_with({"TRAINING_END"}, self.events) | {"TRAINING_END"}
            settle()
        self._waiting = {each for each in waiting if each[0] not in names}
        self._names = frozenset(names - {"stop_when"})
        self._fired |= self._names
        self.stop_reason = reason
        times = {(each, False): self._time for each in self._fired}
        times |= {(each, True): self._launch_now for each in self._fired}
        self._done = self._next = Saved(
            steps=at.global_step + 1,
            epoch=at.epoch + at.epoch_end,
            epoch_steps=0 if at.epoch_end else at.epoch_step + 1,
            reading=self._time,
            fired_step={**before.fired_step, **dict.fromkeys(self._names, at.global_step)},
            fired_time={**before.fired_time, **times},
            times_met=self._times_met,
            waits=frozenset(self._waiting),
            count=self._next.count,
            finished=finished,
            epoch_len=self._known_length,
        )
        is_last = reason is not None
        self.state = State(*at[:4], is_last, self._time, steps_done=at.global_step + 1)
        return self._names


def known_length(plan: Plan, epoch: int) -> int | None:
    """How many steps an epoch has, as far as that is known when it is opened."""
    source, promised = plan.source, plan.source.promised
    if plan.dataloader_len is not None:
        return plan.dataloader_len
    if promised is None or source.says_end or source.guesses or plan.lookahead:
        return None
    return source.steps(promised[epoch % len(promised)])


def exact(epochs: float) -> Fraction:
    return Fraction(epochs).limit_denominator(10**6)


def joined_with(members: set[str], events: Mapping[str, Parts]) -> set[str]:
    """The events that have one of these members as a part."""
    return {name for name, parts in events.items() if members & {*parts}}


def waits(part: Part | str) -> bool:
    return isinstance(part, Part) and part.wait_for is not None


def is_per_launch(part: Part | str) -> bool:
    return isinstance(part, Part) and part.per_launch


def fitting(sizes: list[int], most: int) -> int:
    """The greatest of the sizes (descending) that is at most `most`; 0 if there is none."""
    return next((size for size in sizes if size <= most), 0)
