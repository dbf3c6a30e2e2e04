"""A naive model of a whole run, to judge both cores by.

It is written from the contract, rule by rule, and evaluates every trigger of every event at every
step with the plain formula. It is slow on purpose: no next due step, no heap, no cache. It does not
know dloop. Numbers like 3.5 are the contract's sections and rules; 1. to 8. is the order in a step.
A plain step has a list of one batch, which is handed over without its list, and single steps are
lists of one step.

Four parts: the plan (plain data), the world around the loop (clock, data, conditions; it writes the
journal), the loop itself, and the driver, which is the user's program and serves every loop alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Journal = list[tuple[object, ...]]
Counters = tuple[int, int, int, bool, bool]

# How a `for` is entered: plainly, or by chunks of these sizes.
Sizes = None | int | tuple[int, ...]

# Many runs would be endless (a clock that stands still): the user goes home after this many bodies.
MAX_BODIES = 30

# steps_to_next_event() looks so many steps ahead; all that plans have scheduled comes sooner.
HORIZON = 100

# What the wall clock shows at the first request of a program.
WALL = 5000.0

EPOCH_END = "EPOCH_END"
TRAINING_END = "TRAINING_END"
STOP_WHEN = ("stop_when",)  # it counts as a name


# ----------------------------------------------------------------------------------------- the plan


class Plain:
    """A repr that shows what differs from the defaults, so that a failing plan can be read."""

    def __repr__(self) -> str:
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # for hypothesis, too
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Condition(Plain):
    """A condition function: its answers in turn, and the call at which it raises instead."""

    name: str
    answers: tuple[object, ...] = (False,)
    looks: bool = False
    raises_at: int | None = None
    error: str = "ValueError"  # or "StopIteration", or "truth": the answer's __bool__ raises


@dataclass(frozen=True, repr=False)
class Part(Plain):
    """One Event. Collections are sorted and without repeats: equal Parts are equal Events.

    What is `off` is given as None, and counts as not given.
    """

    condition: Condition | None = None
    every_n_steps: int | None = None
    at_step: tuple[int, ...] = ()
    every_n_seconds: float | None = None
    at_time: tuple[float, ...] = ()
    # in units, from what the wall clock shows at the first request
    at_timestamp: tuple[int, ...] = ()
    every_n_epochs: int | None = None
    at_epoch: tuple[int, ...] = ()
    first_at_step: int | None = None
    from_step: int = 0
    until_step: int | None = None
    per_epoch: bool = False
    per_launch: bool = False
    off: tuple[str, ...] = dataclasses.field(default=(), compare=False)


# a | b | LoopEvents.EPOCH_END, a LoopEvents member by its name; () is None in place of an Event
Joined = tuple["Part | str", ...]


@dataclass(frozen=True, repr=False)
class Node(Plain):
    """An object in which set_epoch is looked for. `style` matters for a `dataset` only."""

    name: str
    has_set_epoch: bool = True
    sampler: str | None = None
    batch_sampler: str | None = None
    dataset: str | None = None
    # or "iterable": no __getitem__; or "IterableDataset": it has a class of this name in its MRO
    style: str = "map"


@dataclass(frozen=True, repr=False)
class Source(Plain):
    """The dataloader: "iterable", "single-pass" (it has __next__), "callable" (it returns an
    iterable) or "generator" (a callable that returns a generator)."""

    kind: str = "iterable"
    # how long each iteration really is; the last one repeats
    lengths: tuple[int, ...] = (3,)
    # what len() says before each, or the exception that it raises; None: there is no __len__
    promised: tuple[int, ...] | str | None = None
    # which fetch of the whole program raises what; of a "late" KeyboardInterrupt the batch is lost
    raises: tuple[tuple[int, str], ...] = ()
    # each iterator is a map over a generator: an exception ends it for good, which nobody can see
    mapped: bool = False
    # whether end_of_dataloader is a bool, and becomes True: "truly" with the last batch, "never",
    # or "early" with the last but one
    says_end: str | None = None
    # where set_epoch is looked for; the first is the loader itself
    nodes: tuple[Node, ...] = (Node("loader", has_set_epoch=False),)


@dataclass(frozen=True, repr=False)
class Clock(Plain):
    """How time moves, in units, in each fetch, body and so on. Negative: it goes backwards."""

    unit: float = 1  # seconds; an int gives int readings
    start: int = 0
    launch_gap: int = 0
    iter_cost: int = 0
    fetch_costs: tuple[int, ...] = (0,)
    body_costs: tuple[int, ...] = (1,)
    condition_cost: int = 0
    raises_at: int | None = None


@dataclass(frozen=True, repr=False)
class Lap(Plain):
    """In which body a lap is asked for: when it "begins", in its "pause" or when it "ends"."""

    body: int  # -1: before the first step of each run
    label: Hashable
    when: str = "begins"


@dataclass(frozen=True, repr=False)
class Pause(Plain):
    """A pause of the clock in a body, and how long it takes, in units."""

    body: int
    cost: int
    nested: bool = False  # there is another one in it, which takes as long
    looks: bool = False  # at elapsed
    left_open: bool = False  # the next request ends it


@dataclass(frozen=True, repr=False)
class Plan(Plain):
    source: Source
    limit: str  # max_epochs, max_steps or max_seconds
    limit_value: float
    events: tuple[tuple[Hashable, Joined], ...] = ()
    stop_when: Joined | None = None
    dataloader_len: int | None = None
    lookahead: bool | None = None
    batches_per_step: int | None = None
    start_step: int = 0
    fast_forward: bool = True
    clock: Clock = Clock()
    # which bodies look at loop.state.elapsed, in turn
    looks: tuple[bool, ...] = (False,)
    # the bodies that leave the `for`; then it is entered again
    leaves: frozenset[int] = frozenset()
    # how it is entered, in turn
    entries: tuple[Sizes, ...] = (None,)
    # which bodies ask for steps_to_next_event(), in turn; the first also before the first batch
    asks: tuple[bool, ...] = (False,)
    # which names are triggered by hand, each in a body; -1: before the first step of each run
    triggers: tuple[tuple[int, Hashable], ...] = ()
    laps: tuple[Lap, ...] = ()
    pauses: tuple[Pause, ...] = ()
    # after the run: restart() and a second run
    restarts: bool = False


# ---------------------------------------------------------------------------------------- the world


class Undecided(BaseException):
    """The contract does not say what happens here, so there is nothing to compare."""


class ClockError(Exception):
    """What a broken clock raises."""


class StateLike(Protocol):
    @property
    def epoch(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def epoch_step(self) -> int: ...
    @property
    def epoch_end(self) -> bool: ...
    @property
    def training_end(self) -> bool: ...
    @property
    def elapsed(self) -> float: ...


def counters(state: StateLike) -> Counters:
    return (
        state.epoch,
        state.global_step,
        state.epoch_step,
        state.epoch_end,
        state.training_end,
    )


class NoTruth:
    """Like an array of two elements."""

    def __bool__(self) -> bool:
        raise ValueError("the truth is ambiguous")


@dataclass(eq=False)
class Stream:
    """One iteration of the source: how many batches it still has."""

    left: int
    first: int = 0  # the number of its first batch, in a run that does not begin at step 0
    begun: bool = False
    dead: bool = False  # its code does not run again

    def take(self) -> int:
        self.left -= 1
        self.first += 1
        return self.first - 1


def in_turn(values: tuple[int, ...], index: int) -> int:
    return values[index % len(values)]


def timestamp(plan: Plan, units: int) -> float:
    """What the wall clock shows so many units after it was first read."""
    return WALL + units * plan.clock.unit


class World:
    """What is outside the loop. All that the loop or the user does to it goes into the journal.

    In a run that does not begin at step 0, the contract does not say what of the source is asked
    for on the way to the first step. So that is not journalled, takes no time and raises nothing,
    an epoch has its lengths by set_epoch alone, and batches are numbered within their epoch.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.journal: Journal = []
        self.now = plan.clock.start
        self.reads = self.opened = self.fetches = self.batches = self.bodies = self.entries = 0
        self.calls: dict[str, int] = {}
        self.end_of_dataloader = False
        self.wall_from: int | None = None  # when the wall clock was first read
        self.only_stream = Stream(sum(plan.source.lengths))  # of a single-pass source
        self.told: dict[str, int] = {}  # by set_epoch
        self.on_the_way = plan.start_step > 0  # to the first step of a run
        self.rare: set[str] = set()  # what the oracle met, to see that random plans have it all

    def clock(self) -> float:
        self.reads += 1
        if self.reads - 1 == self.plan.clock.raises_at:
            raise ClockError("the clock is broken")
        if self.on_the_way:
            self.journal.append(("arrived in epoch", dict(self.told)))
            self.on_the_way = False
        reading = self.now * self.plan.clock.unit
        self.journal.append(("clock", reading))
        return reading

    def wall_clock(self) -> float:
        if self.wall_from is None:
            self.wall_from = self.now
        reading = timestamp(self.plan, self.now - self.wall_from)
        self.journal.append(("wall clock", reading))
        return reading

    def set_epoch(self, name: str, epoch: int) -> None:
        self.told[name] = epoch
        self.asked_source("set_epoch", name, epoch)

    def call_loader(self) -> None:
        self.asked_source("call")

    def asked_source(self, *entry: object) -> None:
        if not self.on_the_way:
            self.journal.append(entry)

    def in_turn_of_epochs(self, values: tuple[int, ...]) -> int:
        """What the iteration that would be opened next has of these; the last repeats."""
        number = self.opened
        if self.plan.start_step > 0:
            number = max(self.told.values(), default=0)
        return values[min(number, len(values) - 1)]

    def length(self) -> int:
        """What len() says about the iteration that would be opened next."""
        promised = self.plan.source.promised
        assert isinstance(promised, tuple)
        return self.in_turn_of_epochs(promised)

    def open(self) -> Stream:
        source = self.plan.source
        if source.kind != "generator":  # nobody sees that a generator is asked for its iterator
            self.asked_source("iter")
            self.now += 0 if self.on_the_way else self.plan.clock.iter_cost
        length = self.in_turn_of_epochs(source.lengths)
        self.opened += 1
        if source.kind == "single-pass":
            return self.only_stream
        return Stream(length, 100 * max(self.told.values(), default=0))

    def fetch(self, stream: Stream) -> int:
        """`__next__` of the source's iterator. Batches are numbered as they leave the source."""
        if stream.dead:
            raise StopIteration
        source = self.plan.source
        self.asked_source("next")
        error = None
        if not self.on_the_way:
            fetch, self.fetches = self.fetches, self.fetches + 1
            self.now += in_turn(self.plan.clock.fetch_costs, fetch)
            error = dict(source.raises).get(fetch)
        if not stream.begun:
            stream.begun, self.end_of_dataloader = True, False
        if error is not None or stream.left == 0:
            stream.dead = source.mapped or source.kind == "generator"
        if error == "OSError":
            raise OSError(f"fetch {fetch} failed")
        if error == "late KeyboardInterrupt" and stream.left > 0:
            stream.take()
        if error is not None:
            raise KeyboardInterrupt(f"in fetch {fetch}")
        if stream.left == 0:
            raise StopIteration
        number = stream.take()
        if source.says_end in ("truly", "early"):
            self.end_of_dataloader = stream.left <= (source.says_end == "early")
        self.batches += 1
        return self.batches - 1 if self.plan.start_step == 0 else number

    def condition(self, condition: Condition, state: StateLike) -> object:
        call = self.calls.get(condition.name, 0)
        self.calls[condition.name] = call + 1
        elapsed = state.elapsed if condition.looks else None
        self.journal.append(("condition", condition.name, (*counters(state), elapsed)))
        self.now += self.plan.clock.condition_cost
        if call == condition.raises_at:
            if condition.error == "truth":
                return NoTruth()
            if condition.error == "StopIteration":
                raise StopIteration
            raise ValueError(f"call {call} of {condition.name}")
        return condition.answers[call % len(condition.answers)]


# ----------------------------------------------------------------------------------------- the loop


class LoopError(Exception):
    pass


class DataLengthError(LoopError):
    pass


class DataExhaustedError(LoopError):
    pass


class ConditionRaisedError(Exception):
    """What a condition raised at the last step of a list."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class RanDryError(Exception):
    """A single-pass source has ended, and with it the run."""


def to_ns(seconds: float) -> int:
    """Section 2: all comparisons are between ints of ns."""
    return seconds * 10**9 if isinstance(seconds, int) else round(seconds * 1e9)


def period_ns(seconds: float) -> int:
    return max(1, to_ns(seconds))


@dataclass
class OracleState:
    """loop.state; its elapsed is asked for when somebody looks at it."""

    epoch: int
    global_step: int
    epoch_step: int
    epoch_end: bool
    training_end: bool
    look: Callable[[], float]

    @property
    def elapsed(self) -> float:
        return self.look()


@dataclass
class Now:
    """What a step's triggers are judged by."""

    global_step: int
    epoch: int
    epoch_step: int
    epoch_end: bool
    dry: bool
    read: list[int]  # training time in ns, if the clock was read in this step
    paused: int = 0  # what was taken out of it in this launch, in ns


@dataclass
class Held:
    """The batches of a step that is not yet handed over, and what is known of it."""

    batches: list[int]
    epoch_step: int
    # once it is known: "" if the epoch goes on after the last of them, else what tells that it
    # ends: "cut" by dataloader_len, "len", "said" by the loader or "seen" by a look
    ends: str | None = None
    # once the conditions were called: whether one of stop_when held, and whose of the events
    called: tuple[bool, frozenset[Hashable]] | None = None


class OracleIterator:
    """The light iterator of 3.8: it knows which entering of the loop it belongs to."""

    def __init__(self, loop: OracleLoop, sizes: Sizes) -> None:
        self.loop = loop
        self.entry = loop.entry
        self.sizes = sizes

    def __iter__(self) -> OracleIterator:
        return self

    def __next__(self) -> tuple[Any, frozenset[Hashable]]:
        lists, names = self.loop.request(self.entry, self.sizes)
        steps: list[Any] = list(lists)
        if self.loop.plan.batches_per_step is None:
            steps = [batch for (batch,) in lists]
        return (steps[0] if self.sizes is None else steps), names


def in_window(part: Part, global_step: int) -> bool:
    """2.10: from_step <= global_step < until_step."""
    if part.until_step is not None and global_step >= part.until_step:
        return False
    return part.from_step <= global_step


def fits(sizes: Sizes, count: int | None) -> int:
    """3.11: the largest of the sizes that is at most `count` (None: the largest of all)."""
    if sizes is None:
        return 1
    if isinstance(sizes, int):
        return sizes if count is None else min(sizes, count)
    return max(size for size in sizes if count is None or size <= count)


def parts_of(joined: Joined) -> list[Part | str]:
    """Repeated equal parts of `a | b` count once."""
    return list(dict.fromkeys(joined))


def single_parts(plan: Plan) -> list[Part]:
    """All parts of all names and of stop_when."""
    return [part for _, parts in owners(plan) for part in parts if isinstance(part, Part)]


def owners(plan: Plan) -> list[tuple[Hashable, Joined]]:
    """The names and their parts, and those of stop_when."""
    return [*plan.events, (STOP_WHEN, plan.stop_when or ())]


def time_of(part: Part, now: Now) -> int:
    """4: pauses are out of training time, but not out of that of a launch."""
    return now.read[0] + (now.paused if part.per_launch else 0)


class Triggers:
    """Section 2: what is due at a step by the plain formulas, and what has to be remembered."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # the launch: its number, its first step, and the training time in ns at its first request
        self.launch = self.launch_step = self.launch_time = 0
        self.wall_time = 0  # at the first request, in ns
        # when each name was last due, in ns of training time, and with the pauses of this launch
        self.last_due: dict[Hashable, int] = {}
        self.last_due_in_launch: dict[Hashable, int] = {}
        # the points of at_time and at_timestamp that have fired
        self.fired: set[tuple[Hashable, ...]] = set()
        # by hand, for the next step
        self.asked: set[Hashable] = set()

    def copy(self) -> Triggers:
        triggers = Triggers(self.plan)
        triggers.__dict__.update(self.__dict__)
        triggers.last_due, triggers.fired = dict(self.last_due), set(self.fired)
        triggers.last_due_in_launch = dict(self.last_due_in_launch)
        triggers.asked = set(self.asked)
        return triggers

    def resumed(self, launch_step: int, launch_time: int) -> Triggers:
        """What a resumed run goes on with."""
        triggers = self.copy()
        triggers.launch += 1
        triggers.launch_step, triggers.launch_time = launch_step, launch_time
        triggers.last_due_in_launch = {}
        triggers.asked = set()
        return triggers

    def step_due(self, part: Part | str, global_step: int, epoch_step: int) -> bool:
        """2.2 and 2.3: what is due by counting alone."""
        if isinstance(part, str) or not in_window(part, global_step):
            return False
        count = global_step
        if part.per_epoch:
            count = epoch_step
        if part.per_launch:
            count = global_step - self.launch_step
        every, first = part.every_n_steps, part.first_at_step
        if every is None:
            return count in part.at_step
        if first is None:
            first = every - 1
        return count in part.at_step or (count >= first and (count - first) % every == 0)

    def due(self, name: Hashable, number: int, part: Part | str, now: Now) -> bool:
        """Whether any criterion but the condition is due, of the part with this number of a name.

        Nothing is short-circuited, and outside the part's window nothing is evaluated.
        """
        if isinstance(part, str) or not in_window(part, now.global_step):
            return False
        dues = [self.step_due(part, now.global_step, now.epoch_step)]
        if part.every_n_epochs is not None:
            dues.append(now.epoch_end and (now.epoch + 1) % part.every_n_epochs == 0)
        if part.at_epoch:
            dues.append(now.epoch_end and now.epoch in part.at_epoch)
        if part.every_n_seconds is not None:
            if part.per_launch:
                last = self.last_due_in_launch.get(name, self.launch_time)
            else:
                last = self.last_due.get(name, 0)
            dues.append(time_of(part, now) - last >= period_ns(part.every_n_seconds))
        dues.append(not self.points(name, number, part, now) <= self.fired)
        return any(dues)

    def points(
        self, name: Hashable, number: int, part: Part, now: Now
    ) -> set[tuple[Hashable, ...]]:
        """2.7: the points of at_time and at_timestamp that are reached at this step."""
        points: set[tuple[Hashable, ...]] = set()
        for time in part.at_time:
            began = self.launch_time if part.per_launch else 0
            if time_of(part, now) >= began + to_ns(time):
                points.add((name, number, time, self.launch if part.per_launch else None))
        for units in part.at_timestamp:
            in_launch = to_ns(timestamp(self.plan, units)) - self.wall_time
            if now.read[0] + now.paused >= self.launch_time + in_launch:
                points.add((name, number, "at_timestamp", units, self.launch))
        return points

    def all_due(self, now: Now) -> set[Hashable]:
        """The names that are due, but for conditions and the loop's own events."""
        return self.asked | {
            name
            for name, joined in owners(self.plan)
            for number, part in enumerate(parts_of(joined))
            if self.due(name, number, part, now)
        }

    def handed_over(self, now: Now, names: set[Hashable]) -> None:
        """A step is handed over with these names, for whatever reason each is due."""
        self.asked = set()
        for name, joined in owners(self.plan):
            for number, part in enumerate(parts_of(joined)):
                if isinstance(part, Part) and in_window(part, now.global_step):
                    self.fired |= self.points(name, number, part, now)
        if now.read:
            self.last_due.update(dict.fromkeys(names, now.read[0]))
            self.last_due_in_launch.update(dict.fromkeys(names, now.read[0] + now.paused))


class OracleLoop:
    def __init__(self, plan: Plan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.single_pass = plan.source.kind == "single-pass"
        self.is_callable = plan.source.kind in ("callable", "generator")
        self.list_size = plan.batches_per_step or 1
        self.refuse()
        self.entry = 0
        self.restart()

    def refuse(self) -> None:
        """What is refused at construction, of the things that a plan can contain."""
        plan = self.plan
        if plan.lookahead is True and plan.dataloader_len is not None:
            raise ValueError("dataloader_len, lookahead")  # 3.5
        if not self.is_callable:
            self.refuse_lookahead()
        several = plan.limit == "max_epochs" and plan.limit_value > 1
        if self.single_pass and several and plan.dataloader_len is None:
            raise ValueError("dataloader_len")  # 3.7

    def refuse_lookahead(self) -> None:
        """3.5: what does not go with this loader; a callable's is known when an epoch is opened."""
        lookahead = self.plan.lookahead
        if lookahead is True and self.loader_says_end():
            raise ValueError("lookahead")
        known = self.loader_says_end() or self.read_promise() is not None
        if lookahead is False and self.plan.limit == "max_epochs" and not known:
            raise ValueError("lookahead")

    def restart(self) -> None:
        self.entry += 1  # older iterators are replaced
        self.failure: Exception | None = None
        self.over = False
        self.stop_reason: str | None = None
        # the counters
        self.epoch = 0
        self.taken = 0  # batches of this epoch that were asked for and not only looked at
        self.steps = 0  # of this epoch that have a batch
        self.steps_done = 0  # of them, that were handed over
        self.global_step = -1
        # the source
        self.stream: Stream | None = None
        self.promise: int | None = None
        self.epoch_over = False
        self.last_request_due = False
        self.interrupted = False  # of a single-pass source, up to its next batch
        self.reentered = False  # these two are about the epoch's iterator
        self.broken = False
        self.held: list[Held] = []  # fetched and not yet handed over, all of this epoch
        self.ahead: list[int] = []  # what a look has found: a batch
        self.pending: Exception | None = None  # what comes after all that is held
        self.promises: dict[int, int | None] = {}
        # time, in ns
        self.began = False
        self.elapsed = 0  # with pauses
        self.last_reading = 0
        self.paused = 0  # by pauses that have ended
        self.pauses = 0  # that have not ended
        self.pause_began = 0
        # 4: the step of each label's latest lap, its training time and the answer
        self.laps: dict[Hashable, tuple[int, int, tuple[int, float]]] = {}
        # 4: the step at which each name was last due, and how many steps that window had
        self.due_at: dict[Hashable, int] = {}
        self.windows: dict[Hashable, int] = {}
        self.triggers = Triggers(self.plan)
        self.state = OracleState(0, -1, -1, False, False, lambda: 0.0)
        # 3.13
        self.place_known = True
        self.left_out = 0  # batches of this epoch that are done and that its loader does not have
        self.quiet = False
        self.saw_one_more = False  # whether the batch after the place was fetched on the way there
        if self.plan.start_step > 0:
            self.begin_at_step(self.plan.start_step)

    # 3.13: runs that do not begin at step 0

    def begin_at_step(self, k: int) -> None:
        self.global_step = k - 1
        self.triggers.launch_step = k
        self.state = OracleState(0, k - 1, -1, False, False, lambda: 0.0)
        length = self.fixed_length()
        if length is not None:
            lists = math.ceil(length / self.list_size)
            self.go_to(k // lists, k % lists)
        else:
            self.place_known = False
        if self.plan.limit == "max_steps" and k >= self.plan.limit_value:
            self.end_quietly()

    def fixed_length(self) -> int | None:
        """The length that every epoch has, if that can be known."""
        told = any(node.has_set_epoch for node in self.plan.source.nodes)
        if self.plan.dataloader_len is None and (self.is_callable or told):
            return None
        return self.read_promise() or None

    def go_to(self, epoch: int, steps: int) -> None:
        """The run is at this place."""
        self.epoch, self.steps, self.steps_done = epoch, steps, steps
        self.taken = steps * self.list_size
        self.place_known = True
        if not self.plan.fast_forward:
            self.left_out = self.taken
        if self.is_beyond(epoch):
            self.end_quietly()

    def is_beyond(self, epoch: int) -> bool:
        return self.plan.limit == "max_epochs" and epoch >= self.plan.limit_value

    def end_quietly(self) -> None:
        self.over, self.quiet, self.stop_reason = True, True, self.plan.limit

    def find_place(self) -> None:
        """Go through the epochs, until one has more steps than are left."""
        left = self.plan.start_step
        while left > 0 and not self.is_beyond(self.epoch):
            self.open_epoch()
            lists = self.lists_of(self.promise)
            if lists is None and not self.single_pass and self.plan.fast_forward:
                lists = self.lists_of(self.count_batches())
                self.saw_one_more = left < lists
            self.stream = None
            if lists is None and not self.plan.fast_forward:
                self.epoch = left = 0
            if lists is None or left < lists:
                break
            if self.single_pass:
                raise Undecided("a stream of one epoch has set_epoch, and ends on the way")
            left -= lists
            self.epoch += 1
        self.go_to(self.epoch, left)

    def count_batches(self) -> int:
        """How many batches the epoch has that was opened."""
        assert self.stream is not None
        for count in itertools.count():
            if count > 0 and self.loader_says_end() and self.world.end_of_dataloader:
                return count
            try:
                self.world.fetch(self.stream)
            except StopIteration:
                break
        if count == 0:
            raise DataExhaustedError(f"epoch {self.epoch} has no batch: the dataloader is empty")
        if self.loader_says_end():
            raise Undecided("on the way, a loader does not say its end")
        return count

    def set_forward(self) -> None:
        """To the place in the epoch that was opened; of a single-pass source, over all before."""
        assert self.stream is not None
        count = self.taken - self.left_out
        if self.single_pass and self.plan.fast_forward:
            count += self.epoch * (self.promise or 0)
        try:
            for _ in range(count):
                self.world.fetch(self.stream)
        except StopIteration:
            pass  # the next request finds the end

    # 3.8: entering, and asking for the next batch

    def __iter__(self) -> Iterator[tuple[Any, frozenset[Hashable]]]:
        return self.chunks(None)

    def chunks(self, sizes: Sizes) -> Iterator[tuple[Any, frozenset[Hashable]]]:
        if self.failure is not None:
            raise self.failed() from self.failure
        if self.over and not self.quiet:
            raise LoopError("this run is finished; restart() begins a new one")
        if not self.place_known and not self.over:
            try:
                self.find_place()
            except Exception as error:
                self.failure, self.stop_reason = error, "exception"
                raise
        self.entry += 1
        self.reentered = self.stream is not None
        return OracleIterator(self, sizes)

    def failed(self) -> LoopError:
        return LoopError("this run ended with an exception; restart() begins a new one")

    def request(self, entry: int, sizes: Sizes) -> tuple[list[list[int]], frozenset[Hashable]]:
        if entry != self.entry:
            raise LoopError("this iterator was replaced: the loop was entered again")
        if self.failure is not None:
            raise self.failed() from self.failure
        while self.pauses > 0:  # the step has not begun: if this raises, the run goes on
            self.end_pause()
        try:
            if self.last_request_due:
                self.make_last_request()
            if not self.over:
                return self.step(sizes)
        except RanDryError as dry:  # 3.7, without lookahead: no TRAINING_END
            self.over, self.stop_reason = True, "exhausted"
            self.warn(str(dry))
        except Exception as error:
            self.failure, self.stop_reason = error, "exception"
            raise
        raise StopIteration

    def make_last_request(self) -> None:
        """3.5: after an epoch's last batch its iterator is asked once more, as by a plain `for`."""
        assert self.stream is not None
        self.last_request_due = False  # also if it is interrupted
        try:
            self.world.fetch(self.stream)
        except StopIteration:
            return
        except KeyboardInterrupt:
            self.world.rare.add("last request: interrupt")
            raise
        except Exception:
            if not self.reentered:
                self.world.rare.add("last request: error")
                raise
            self.world.rare.add("last request: error after entering again")
            return  # all batches of the epoch were had
        if self.left_out > 0:
            return  # 3.13: of a loader that was left as it is there may be any number
        if self.loader_says_end():
            self.warn(
                f"epoch {self.epoch} had more batches after the one at which its loader's "
                "end_of_dataloader was true; the rest is dropped"
            )
        else:
            self.warn(
                f"epoch {self.epoch} had more than the {self.promise} batches that "
                "len(dataloader) promised; the rest is dropped; pass lookahead=True to use it"
            )

    def warn(self, text: str) -> None:
        self.world.journal.append(("warning", text))

    # Section 3: the source

    def loader_says_end(self) -> bool:
        """3.5: whether end_of_dataloader tells which batch is an epoch's last."""
        return self.plan.source.says_end is not None and self.plan.dataloader_len is None

    def read_promise(self) -> int | None:
        """3.5: how many batches this epoch is said to have; the first rule that applies."""
        plan = self.plan
        if plan.lookahead is True:
            return None
        if plan.dataloader_len is not None:
            return plan.dataloader_len
        if self.loader_says_end():
            return None
        if self.is_stream():
            return None
        nodes = {node.name: node for node in plan.source.nodes}
        dataset = nodes["loader"].dataset if nodes else None
        if dataset is not None and nodes[dataset].style != "map":
            return None  # lengths over iterable-style data sets are guesses
        # a len() that raises is no length
        return self.world.length() if isinstance(plan.source.promised, tuple) else None

    def is_stream(self) -> bool:
        """3.5: whether batches are taken exactly when asked for, since no epoch is at stake."""
        return self.single_pass and self.plan.limit != "max_epochs"

    def open_epoch(self) -> None:
        """3.4: set_epoch wherever it is found, then len(), then iter()."""
        plan, world = self.plan, self.world
        if self.is_callable:
            world.call_loader()
        nodes = {node.name: node for node in plan.source.nodes}
        seen: set[str] = set()

        def walk(name: str | None) -> None:
            if name is None or name in seen:
                return
            seen.add(name)
            if nodes[name].has_set_epoch:
                world.set_epoch(name, self.epoch)
            walk(nodes[name].sampler)
            walk(nodes[name].batch_sampler)
            walk(nodes[name].dataset)

        walk("loader" if nodes else None)
        if self.place_known:  # else it is on the way, and there may be nothing to ask for
            self.refuse_lookahead()
        self.promise = self.read_promise()
        if self.promises.setdefault(self.epoch, self.promise) != self.promise:
            raise Undecided("an epoch that is opened anew has another length")
        if self.promise == 0:
            if self.taken > 0:
                raise Undecided("an epoch that is opened anew promises less than was fetched of it")
            how = "len(dataloader) is 0" if self.place_known else "the dataloader is empty"
            raise DataExhaustedError(f"epoch {self.epoch} has no batch: {how}")
        self.stream = world.open()
        self.interrupted = self.reentered = False

    def ask_iterator(self) -> int:
        """3.8: the epoch's iterator gives a batch, or what it raises is believed or not."""
        if self.broken:
            return self.ask_new_iterator()
        assert self.stream is not None
        try:
            batch = self.world.fetch(self.stream)
        except KeyboardInterrupt:
            self.interrupted = self.single_pass
            self.broken = not self.single_pass
            raise
        except Exception as error:
            is_end = isinstance(error, StopIteration)
            if self.interrupted:
                what = "an end" if is_end else "an error"
                self.world.rare.add(f"not believed: {what} after an interrupt")
                raise LoopError("single-pass") from error
            if is_end or self.single_pass or not self.reentered:
                raise
            self.world.rare.add("not believed: an error after entering again")
            self.broken = True
            return self.ask_new_iterator()
        self.interrupted = False
        return batch

    def ask_new_iterator(self) -> int:
        """The epoch is opened anew and set forward over what was fetched of it."""
        count = self.taken - self.left_out + len(self.ahead)
        self.open_epoch()
        assert self.stream is not None
        for _ in range(count):
            try:
                self.world.fetch(self.stream)
            except StopIteration:
                break
        self.broken = False  # what comes now counts; if interrupted before, it begins again
        if self.promise is not None and count >= self.promise:
            raise Undecided("an epoch that is opened anew promises no more than was fetched of it")
        return self.ask_iterator()

    def fetch(self) -> int:
        """The next batch of the run: of this epoch, or the first one of the next."""
        if self.stream is None:
            self.open_epoch()
            self.set_forward()
            if self.saw_one_more:
                self.ahead.append(self.ask_iterator())
                self.saw_one_more = False
            if any(part.at_timestamp for part in single_parts(self.plan)):
                self.triggers.wall_time = to_ns(self.world.wall_clock())
            self.last_reading = to_ns(self.world.clock())  # 2.5: training time starts here
            self.began = True
        elif self.epoch_over:
            self.next_epoch()
        while True:
            try:
                return self.fetch_here()
            except StopIteration:
                self.found_end()
                self.next_epoch()

    def fetch_here(self) -> int:
        """The next batch of this epoch, or StopIteration at its end."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            raise pending
        if not self.ahead:
            interrupted = self.interrupted
            self.ahead.append(self.ask_iterator())
            if self.must_look():
                self.interrupted = interrupted  # up to the batch behind it
        self.taken += 1
        return self.ahead.pop()

    def next_epoch(self) -> None:
        self.epoch_over = False
        self.epoch += 1
        self.taken = self.steps = self.steps_done = self.left_out = 0
        self.open_epoch()

    def found_end(self) -> None:
        """A fetch, not a look, has found the end of this epoch's iterator."""
        if self.taken == 0 and (not self.single_pass or self.epoch == 0):
            raise DataExhaustedError(
                f"epoch {self.epoch} has no batch: the dataloader is empty or was consumed before"
            )
        if self.promise is not None and 0 < self.taken < self.promise:
            what = "dataloader_len" if self.plan.dataloader_len is not None else "len(dataloader)"
            raise DataLengthError(
                f"epoch {self.epoch} ended after {self.taken} of the {self.promise} batches "
                f"that {what} promised; pass lookahead=True to go by the data itself"
            )
        if self.loader_says_end() and self.taken > 0:
            raise DataLengthError(
                f"epoch {self.epoch} ended after {self.taken} batches, but its loader's "
                "end_of_dataloader did not say so; pass dataloader_len"
            )
        if self.single_pass:
            raise RanDryError(self.dry_text(self.global_step))

    def dry_text(self, global_step: int) -> str:
        return f"the dataloader ran dry at global_step {global_step}, before the run's limit"

    def must_look(self) -> bool:
        """3.5: whether the loop looks one batch ahead at this step."""
        if self.plan.lookahead is not None:
            return self.plan.lookahead
        return self.promise is None and not self.loader_says_end() and not self.is_stream()

    def find_end(self) -> str:
        """3.5: what tells that the epoch ends with the batch that was fetched last; "" if nothing
        does."""
        if self.must_look():
            return "seen" if self.sees_end() else ""
        if self.loader_says_end():
            return "said" if self.world.end_of_dataloader else ""
        if self.taken == self.promise:
            return "len" if self.plan.dataloader_len is None else "cut"
        return ""

    def sees_end(self) -> bool:
        """Whether a look ahead finds the epoch's end. An exception waits for the next request."""
        try:
            self.ahead.append(self.ask_iterator())
        except StopIteration:
            return True
        except Exception as error:
            self.pending = error
        return False

    # Section 2: time

    def read_clock(self) -> int:
        reading = to_ns(self.world.clock())
        self.elapsed += max(0, reading - self.last_reading)
        self.last_reading = max(self.last_reading, reading)
        return self.elapsed - self.paused

    def training_time(self) -> int:
        """Now; while a pause lasts it stands still, and the clock need not be read."""
        if not self.began:
            return 0
        return self.pause_began if self.pauses > 0 else self.read_clock()

    # 4: pauses and laps

    @contextlib.contextmanager
    def pause_clock(self) -> Iterator[None]:
        if self.pauses == 0:
            self.pause_began = self.training_time()
        self.pauses += 1
        yield
        if self.pauses > 0:  # the next request may have ended it
            self.end_pause()

    def end_pause(self) -> None:
        if self.pauses == 1:
            self.paused += self.read_clock() - self.pause_began
        self.pauses -= 1

    def lap(self, label: Hashable) -> tuple[int, float]:
        """Steps and seconds since the latest step at which this label was asked for."""
        step, time, answer = self.laps.get(label, (self.triggers.launch_step - 1, 0, None))
        if answer is None or step != self.global_step:
            now = self.training_time()
            answer = (self.global_step - step, (now - time) / 1e9)
            self.laps[label] = (self.global_step, now, answer)
        return answer

    def timed(self) -> bool:
        return self.plan.limit == "max_seconds" or any(
            part.every_n_seconds is not None or part.at_time or part.at_timestamp
            for part in single_parts(self.plan)
        )

    def trigger(self, name: Hashable) -> None:
        """4: by hand, for the next step."""
        if name not in dict(self.plan.events):
            raise KeyError(name)
        if not self.over and self.failure is None:
            self.triggers.asked.add(name)

    # 3.11: lists

    def size(self, sizes: Sizes, count: int | None) -> int:
        """The length of a list of at most `count`: the smallest with a name triggered by hand."""
        return fits(sizes, 1 if self.triggers.asked else count)

    def next_scheduled(
        self, global_step: int, epoch_step: int, promise: int | None, horizon: int
    ) -> int | None:
        """How many steps after this one the first comes of which counting alone tells an event."""
        last = self.lists_of(promise)
        parts = single_parts(self.plan)
        due = self.triggers.step_due
        for k in range(1, horizon + 1):
            if (
                any(due(part, global_step + k, epoch_step + k) for part in parts)
                or epoch_step + k + 1 == last
                or (self.plan.limit == "max_steps" and global_step + k + 1 >= self.plan.limit_value)
            ):
                return k
        return None

    def steps_to_next_event(self) -> int | None:
        if self.over or self.failure is not None:
            return None
        promise = self.promise
        if self.stream is None and (not self.is_callable or self.plan.dataloader_len is not None):
            promise = self.read_promise()
        epoch_step = -1 if self.epoch_over else self.steps_done - 1
        return self.next_scheduled(self.global_step, epoch_step, promise, HORIZON)

    def lists_of(self, promise: int | None) -> int | None:
        """3.12: an epoch's last list may be shorter."""
        return None if promise is None else math.ceil(promise / self.list_size)

    def begin(self, batch: int) -> None:
        """A step has its first batch."""
        self.held.append(Held([batch], self.steps))
        self.steps += 1

    def complete(self, step: Held) -> None:
        """3.12: fetch the rest of the list, which is short at the epoch's end and at an error."""
        while len(step.batches) < self.list_size and self.pending is None:
            if step.ends is None:
                step.ends = self.find_end()
            if step.ends or self.pending is not None:
                return
            try:
                step.batches.append(self.fetch_here())
            except Exception as error:  # StopIteration, too: an end that nobody foresaw
                self.pending = error
                what = "an end" if isinstance(error, StopIteration) else "an error"
                where = "in a list"
                if step.epoch_step + 1 == self.lists_of(self.promise):
                    where = "in the list that should be its epoch's last"
                self.world.rare.add(f"{what} {where}")
            else:
                step.ends = None

    def __len__(self) -> int:
        """How many steps are to come; only of plans of which that is known."""
        plan = self.plan
        if self.over or self.failure is not None:
            return 0
        if plan.limit == "max_steps":
            return int(plan.limit_value) - self.global_step - 1
        assert plan.limit == "max_epochs"
        lists = self.lists_of(plan.dataloader_len)
        assert lists is not None
        # of the epoch that is opened, and of those to come
        return (int(plan.limit_value) - self.epoch) * lists - self.steps_done

    def steps_since(self, name: Hashable) -> int:
        """At a step at which it is due, its window; else the steps after that."""
        last = self.due_at.get(name, self.plan.start_step - 1)
        return self.global_step - last or self.windows.get(name, 0)

    def foreseen(self, sizes: Sizes) -> int:
        """How long the list can be; where an error is known to come, no epoch ends in it."""
        promise = self.promise if self.pending is None else None
        before = self.held[0].epoch_step - 1
        steps = self.next_scheduled(self.global_step, before, promise, fits(sizes, None))
        return self.size(sizes, steps)

    def gather(self, sizes: Sizes) -> None:
        """Fetch until something may be due at the last step that is held, or no more fit."""
        if len(self.held) <= self.foreseen(sizes):
            self.complete(self.held[-1])  # after an interrupt, or the first
        while len(self.held) < self.foreseen(sizes):
            last = self.held[-1]
            if last.ends is None:
                last.ends = self.find_end()
            if last.ends:
                return
            if last.called is None:
                try:
                    last.called = self.call_conditions(self.now(len(self.held), []), False, False)
                except Exception as error:
                    self.held.pop()
                    self.pending = error
                    break
            if last.called != (False, frozenset()) or self.pending is not None:
                return
            try:
                self.begin(self.fetch_here())
            except Exception as error:  # StopIteration, too: an end that nobody foresaw
                self.pending = error
            else:
                self.complete(self.held[-1])
        if not self.held:
            assert self.pending is not None
            raise self.pending

    def now(self, count: int, read: list[int]) -> Now:
        """The step that is held as the count-th."""
        step = self.held[count - 1]
        ends = bool(step.ends)
        dry = step.ends == "seen" and self.single_pass  # 3.7: not only an epoch has ended
        global_step = self.global_step + count
        return Now(global_step, self.epoch, step.epoch_step, ends, dry, read, self.paused)

    # Section 2: one step

    def step(self, sizes: Sizes) -> tuple[list[list[int]], frozenset[Hashable]]:
        # 1. and 2. the batches, which are kept if a later fetch is interrupted
        if not self.held:
            self.begin(self.fetch())
        self.gather(sizes)
        read: list[int] = []
        while True:
            count = self.size(sizes, len(self.held))
            try:
                return self.hand_over(count, read)
            except ConditionRaisedError as carrier:
                error = carrier.error
            if count == 1:
                raise error from error.__cause__
            # it comes after the batches before; the clock is not read again for them, unless it was
            # read only since a condition looked
            if not self.timed():
                read.clear()
            self.world.rare.add("a condition raises at a list's last step")
            self.pending = error
            del self.held[count - 1 :]

    def hand_over(self, count: int, read: list[int]) -> tuple[list[list[int]], frozenset[Hashable]]:
        plan = self.plan
        # 3. whether the epoch ends here, which may take a look
        last = self.held[count - 1]
        if last.ends is None:
            last.ends = self.find_end()
        # 4. the clock: one reading for everything in this step
        now = self.now(count, read)
        if self.timed() and not read:
            read.append(self.read_clock())

        # 5. all criteria but the conditions; TRAINING_END does not fire stop_when
        names = self.triggers.all_due(now)
        if now.epoch_end and EPOCH_END in (plan.stop_when or ()):
            names.add(STOP_WHEN)

        # 6. and 7. the limit, and the conditions, if they were not called while it was gathered
        reasons = self.reasons(now)
        if last.called is None:
            try:
                last.called = self.call_conditions(now, bool(reasons), STOP_WHEN in names)
            except Exception as error:
                raise ConditionRaisedError(error) from None
        stopped, held_true = last.called
        names |= held_true
        if stopped:
            names.add(STOP_WHEN)
        if STOP_WHEN in names:
            reasons.insert(0, "stop_when")  # the first of the reasons is the stop_reason
        if reasons == ["exhausted"]:
            self.warn(self.dry_text(now.global_step))

        # 8. what is joined with the loop's own events; and the list is handed over
        own = ([EPOCH_END] if now.epoch_end else []) + ([TRAINING_END] if reasons else [])
        names.update(name for name, joined in plan.events if set(joined) & set(own))
        self.triggers.handed_over(now, names)
        for name in names:
            self.windows[name] = now.global_step - self.due_at.get(name, self.plan.start_step - 1)
            self.due_at[name] = now.global_step
        lists = [step.batches for step in self.held[:count]]
        del self.held[:count]
        self.global_step, self.steps_done = now.global_step, now.epoch_step + 1
        self.epoch_over = now.epoch_end
        self.last_request_due = last.ends in ("len", "said") and not self.single_pass
        self.state = self.make_state(now, bool(reasons))
        if reasons:
            self.over, self.stop_reason = True, reasons[0]
        names = names - {STOP_WHEN} | {f"LoopEvents.{name}" for name in own}
        return lists, frozenset(names)

    def reasons(self, now: Now) -> list[str]:
        """What ends training at this step, but for stop_when."""
        limit, value = self.plan.limit, self.plan.limit_value
        reasons = []
        if limit == "max_steps" and now.global_step + 1 >= value:
            reasons.append("max_steps")
        if limit == "max_epochs" and now.epoch_end and now.epoch + 1 >= value:
            reasons.append("max_epochs")
        if limit == "max_seconds" and now.read[0] >= period_ns(value):
            reasons.append("max_seconds")
        if now.dry:
            reasons.append("exhausted")
        return reasons

    def call_conditions(
        self, now: Now, limit: bool, stopped: bool
    ) -> tuple[bool, frozenset[Hashable]]:
        """2.8, those of stop_when first: they see training_end as the limit says, the others see
        what stop_when has decided."""
        state = self.make_state(now, limit)
        stop_parts = parts_of(self.plan.stop_when or ())
        stops = [self.condition_due(part, state, "stop_when", now) for part in stop_parts]
        state = self.make_state(now, limit or stopped or any(stops))
        names = [
            name
            for name, joined in self.plan.events
            for part in parts_of(joined)
            if self.condition_due(part, state, f"event {name!r}", now)
        ]
        return any(stops), frozenset(names)

    def condition_due(self, part: Part | str, state: OracleState, owner: str, now: Now) -> bool:
        """2.8: the truth of what the condition function answers."""
        if isinstance(part, str) or part.condition is None:
            return False
        if not in_window(part, now.global_step):
            return False
        try:
            return bool(self.world.condition(part.condition, state))
        except Exception as error:
            raised: Exception = error
            if isinstance(error, StopIteration):  # as in generators
                raised = RuntimeError()
                raised.__cause__ = error
            raised.__dict__.setdefault("__notes__", []).append(f"in the condition of {owner}")
            raise raised from raised.__cause__

    def make_state(self, now: Now, training_end: bool) -> OracleState:
        def look() -> float:
            """Read the clock for the first who looks at elapsed in this step."""
            if not now.read:
                now.read.append(self.training_time())
            return now.read[0] / 1e9

        return OracleState(
            now.epoch, now.global_step, now.epoch_step, now.epoch_end, training_end, look
        )


# --------------------------------------------------------------------------------------- the driver


class LoopLike(Protocol):
    """What the driver needs of a loop: the oracle's and dloop's both have it."""

    @property
    def state(self) -> StateLike: ...
    @property
    def stop_reason(self) -> str | None: ...
    def __iter__(self) -> Iterator[tuple[Any, Any]]: ...
    def chunks(self, sizes: Any) -> Iterator[tuple[Any, Any]]: ...
    def steps_to_next_event(self) -> int | None: ...
    def trigger(self, name: Hashable) -> None: ...
    def steps_since(self, name: Hashable) -> int: ...
    def __len__(self) -> int: ...
    def lap(self, label: Hashable) -> tuple[int, float]: ...
    def pause_clock(self) -> contextlib.AbstractContextManager[None]: ...
    def restart(self) -> object: ...


def raised(error: BaseException) -> tuple[object, ...]:
    text = str(error)
    cause = error.__cause__
    if type(error) is RuntimeError and isinstance(cause, StopIteration):
        text = ""  # "as in generators"; its wording is left to the library
    for word in ("dataloader_len", "lookahead") if isinstance(error, ValueError) else ():
        if word in text:
            text = "refused"  # its wording is left to the library
    if type(error).__name__ == "LoopError" and "single-pass" in text:
        text, cause = "single-pass", None if isinstance(cause, StopIteration) else cause
    notes = tuple(getattr(error, "__notes__", ()))
    return ("raised", type(error).__name__, text, notes, cause and type(cause).__name__)


def ask(journal: Journal, what: str, question: Callable[[], object]) -> None:
    """Asks for something that should be refused, and journals what came."""
    try:
        question()
    except (Exception, KeyboardInterrupt) as error:
        journal.append((what, *raised(error)))
    else:
        journal.append((what, "went on"))


def trigger(loop: LoopLike, world: World, body: int) -> None:
    """What is triggered by hand in this body."""
    for when, name in world.plan.triggers:
        if when == body:
            try:
                loop.trigger(name)
            except KeyError:
                world.journal.append(("trigger", name, "KeyError"))


def look_around(loop: LoopLike, world: World) -> None:
    """What a body asks for of the steps before and to come."""
    plan, journal = world.plan, world.journal
    journal.append(("next event in", loop.steps_to_next_event()))
    if plan.limit == "max_steps" or (plan.limit == "max_epochs" and plan.dataloader_len):
        journal.append(("steps to come", len(loop)))
    journal.append(("windows", [loop.steps_since(name) for name, _ in plan.events]))


def state_of(loop: LoopLike, world: World) -> object:
    """The counters; before a run's first step its place may not be known."""
    start = world.plan.start_step
    if start > 0 and loop.state.global_step == start - 1:
        return start - 1
    return counters(loop.state)


def laps(loop: LoopLike, world: World, body: int, when: str) -> None:
    """The laps that are asked for at this place of a body."""
    for lap in world.plan.laps:
        if (lap.body, lap.when) == (body, when):
            world.journal.append(("lap", lap.label, tuple(loop.lap(lap.label))))


def pause(loop: LoopLike, world: World, pause: Pause) -> None:
    """One pause of the clock in a body, with what is done in it."""
    context = loop.pause_clock()
    context.__enter__()
    world.now += pause.cost
    if pause.nested:
        with loop.pause_clock():
            world.now += pause.cost
    laps(loop, world, pause.body, "pause")
    if pause.looks:
        world.journal.append(("in a pause", loop.state.elapsed))
    if not pause.left_open:
        context.__exit__(None, None, None)


def enter(loop: LoopLike, world: World) -> Iterator[tuple[Any, Any]]:
    sizes = world.plan.entries[world.entries % len(world.plan.entries)]
    world.entries += 1
    return iter(loop) if sizes is None else loop.chunks(sizes)


def one_body(loop: LoopLike, world: World, body: int, batch: Any, names: object) -> None:
    """What a user does with a step."""
    plan, journal = world.plan, world.journal
    elapsed = loop.state.elapsed if plan.looks[body % len(plan.looks)] else None
    journal.append(("step", batch, names, counters(loop.state), elapsed))
    if loop.stop_reason is not None:
        journal.append(("stop_reason", loop.stop_reason))
    if plan.asks[body % len(plan.asks)]:
        look_around(loop, world)
    trigger(loop, world, body)
    laps(loop, world, body, "begins")
    world.now += in_turn(plan.clock.body_costs, body)
    for each in plan.pauses:
        if each.body == body:
            pause(loop, world, each)
    laps(loop, world, body, "ends")


def one_run(
    loop: LoopLike, world: World, read_names: Callable[[Any], object]
) -> Iterator[tuple[Any, Any]] | None:
    """A user's `for`, who leaves it and enters it again where the plan says so.

    Returns the last iterator, unless it came to its normal end, at which it stays.
    """
    plan, journal = world.plan, world.journal
    if plan.asks[0] and (plan.start_step == 0 or plan.dataloader_len is not None):
        look_around(loop, world)
    trigger(loop, world, -1)
    laps(loop, world, -1, "begins")
    world.now += plan.clock.launch_gap
    try:
        iterator = enter(loop, world)
    except Exception as error:  # 3.13: on the way to the first step
        journal.append(raised(error))
        journal.append(("end", loop.stop_reason))
        return None
    world.now += plan.clock.launch_gap
    for _ in range(MAX_BODIES):
        try:
            batch, events = next(iterator)
        except StopIteration:
            break
        except KeyboardInterrupt as interrupt:  # a user in a notebook, who runs the cell again
            journal.append(raised(interrupt))
            try:
                iterator = enter(loop, world)
            except Exception as error:  # nothing but the last request was missing
                journal.append(raised(error))
                break
            continue
        except Exception as error:
            journal.append(raised(error))
            journal.append(("state", state_of(loop, world)))
            break

        body, world.bodies = world.bodies, world.bodies + 1
        try:
            one_body(loop, world, body, batch, read_names(events))
        except ClockError:
            raise Undecided("the clock breaks in the body") from None
        if body in plan.leaves:
            older = iterator
            try:
                iterator = enter(loop, world)
            except Exception as error:
                journal.append(raised(error))
                break
            ask(journal, "older", lambda older=older: next(older))  # type: ignore[misc]
    else:
        journal.append(("end", loop.stop_reason))
        return iterator
    journal.append(("end", loop.stop_reason))
    ask(journal, "next after the end", lambda: next(iterator))
    ask(journal, "iter after the end", lambda: enter(loop, world))
    return iterator if loop.stop_reason == "exception" else None


def drive(loop: LoopLike, world: World, read_names: Callable[[Any], object]) -> None:
    iterator = one_run(loop, world, read_names)
    if world.plan.restarts:
        world.on_the_way = world.plan.start_step > 0
        loop.restart()
        world.journal.append(
            ("restarted", state_of(loop, world), loop.state.elapsed, loop.stop_reason)
        )
        if iterator is not None:
            try:
                next(iterator)
            except Exception as error:
                world.journal.append(("older", type(error).__name__))
        one_run(loop, world, read_names)


def refused(error: Exception) -> tuple[object, ...]:
    return ("refused", *raised(error)[1:3])


def oracle_world(plan: Plan) -> World:
    """The world after a run of this plan as it should be."""
    world = World(plan)
    try:
        loop = OracleLoop(plan, world)
    except ValueError as error:
        world.journal.append(refused(error))
    else:
        drive(loop, world, frozenset)
    return world


def oracle_trace(plan: Plan) -> Journal:
    """What should happen in a run of this plan, in order."""
    return oracle_world(plan).journal
