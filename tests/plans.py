"""Random plans, and how a plan is run: with dloop, or with the oracle in its place.

Numbers are small, so that several things often happen at the same step: most mistakes are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from hypothesis import seed, settings
from hypothesis import strategies as st

from dloop import Event, Loop, LoopEvents, batched

if TYPE_CHECKING:
    from oracle import World

# ------------------------------------------------------------------------------------------- plans

Sizes = int | tuple[int, ...] | None
"""How a loop is entered: None for single steps, else what `chunks` gets."""


class Readable:
    """The repr tells what differs from the defaults, and can be pasted to replay a plan."""

    def __repr__(self) -> str:
        told = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if value != each.default:
                told.append(f"{each.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # for hypothesis, which prints all fields otherwise


@dataclass(frozen=True, repr=False)
class Part(Readable):
    """The arguments of an Event. `condition` is the global steps at which its condition is true."""

    every_n_steps: int | None = None
    first_at_step: int | None = None
    at_step: tuple[int, ...] | None = None
    every_n_epochs: float | None = None
    at_epoch: tuple[int, ...] | None = None
    every_n_seconds: int | None = None
    at_time: tuple[int, ...] | None = None
    condition: tuple[int, ...] | None = None
    raises_at: int | None = None  # the global step at which the condition raises
    from_step: int | None = None
    until_step: int | None = None
    per_epoch: bool = False
    per_launch: bool = False
    every_n: int | None = None  # of the counter "tokens"
    at: tuple[int, ...] | None = None
    wait_for: str | None = None  # the name of an event, or of a member of LoopEvents


Parts = tuple[Part | str, ...]
"""An Event: its parts. A string names a member of LoopEvents. Without parts it is None."""


@dataclass(frozen=True, repr=False)
class Source(Readable):
    """A loader. Its epochs have these `lengths` in turn; a single-pass source has their sum."""

    kind: str = "list"  # or "loader", "callable", "iterator" (single-pass)
    lengths: tuple[int, ...] = (3,)
    promised: tuple[int, ...] | None = None  # what len() says, if it has a len()
    sets_epoch: bool = False
    says_end: bool = False  # it has end_of_dataloader
    guesses: bool = False  # its data set is iterable-style
    keeps_state: bool = False
    batched: int | None = None
    nested: bool = False  # it is a part of another loader, which has it in a list

    @property
    def single_pass(self) -> bool:
        return self.kind == "iterator"

    @property
    def is_honest(self) -> bool:
        return self.promised in (None, self.lengths)

    def steps(self, batches: int) -> int:
        return -(-batches // (self.batched or 1))

    def length(self, epoch: int) -> int:
        """How many batches `epoch` really has, before they are put into lists."""
        return sum(self.lengths) if self.single_pass else self.lengths[epoch % len(self.lengths)]

    def batch(self, epoch: int, place: int) -> str:
        """The batch at a place. A loader without `set_epoch` cannot tell its epochs apart."""
        return f"{epoch if self.sets_epoch else 0}.{place}"


@dataclass(frozen=True, repr=False)
class Life(Readable):
    """What happens to one Loop: how it is entered, what its bodies do, what the loader raises.

    Acts are done at the first step of this number, or if that is -1 at the run's last: "stop",
    "leave", "restart", "save", "save undone", "kill", "finish", "finish_epoch", "count" and a
    number, or "trigger" and a name.
    """

    entered: tuple[Sizes, ...] = (None,)
    acts: tuple[tuple[int, str], ...] = ()
    errors: tuple[tuple[str, str, int], ...] = ()  # a batch, "ValueError" or so, how many times


@dataclass(frozen=True, repr=False)
class Plan(Readable):
    """A run, over all its lives. A life resumes from the state that was saved last."""

    source: Source = field(default_factory=Source)
    events: Mapping[str, Parts] = field(default_factory=dict)
    max_steps: int | None = None
    max_epochs: float | None = None
    max_seconds: int | None = None
    stop_when: Parts | None = None
    dataloader_len: int | None = None
    lookahead: bool | None = None
    start_step: int = 0
    fast_forward: bool = True
    on_exception: str = "raise"
    fetch_costs: tuple[int, ...] = (0,)  # in seconds, in turn
    body_costs: tuple[int, ...] = (1,)
    lives: tuple[Life, ...] = (Life(),)


SOURCES = (  # where they have a len(), it may be wrong if the loader sets epochs
    Source("list", promised=()),
    Source("loader", promised=()),
    Source("loader", promised=(), sets_epoch=True),
    Source("loader", sets_epoch=True),
    Source("loader", sets_epoch=True, nested=True),
    Source("loader", promised=(), sets_epoch=True, nested=True),
    Source("loader", sets_epoch=True, says_end=True),
    Source("loader", promised=(), sets_epoch=True, guesses=True),
    Source("loader", promised=(), sets_epoch=True, keeps_state=True),
    Source("callable", sets_epoch=True),
    Source("callable", promised=(), sets_epoch=True),
    Source("iterator"),
    Source("iterator", keeps_state=True),
)
MEMBERS: dict[Event, str] = {
    getattr(LoopEvents, name): name for name in ("EPOCH_END", "TRAINING_END", "EXCEPTION")
}
NAMED: dict[Any, Event] = {name: member for member, name in MEMBERS.items()}

# --------------------------------------------------------------------------------------- strategies

Draw = Callable[[st.SearchStrategy[Any]], Any]
Criteria = st.SearchStrategy[set[str]]
"""Chooses the criteria of an Event."""


def several(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(values, min_size=1, max_size=3).map(sorted).map(tuple)


def few(values: st.SearchStrategy[Any], least: int, most: int) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=least, max_size=most).map(tuple)


# All are made once: to make a strategy takes longer than to draw from it.
ONE_IN = {n: st.sampled_from([False] * (n - 1) + [True]) for n in range(2, 13)}
FEW, STEP, STEPS = st.integers(1, 6), st.integers(0, 10), several(st.integers(0, 10))
STEP_CRITERIA = {"every_n_steps": FEW, "at_step": STEPS}
TIMERS = {"every_n_seconds": FEW, "at_time": STEPS}
COUNTER_CRITERIA = {"every_n": st.integers(1, 9), "at": several(st.integers(1, 20))}
EPOCH_CRITERIA = {"every_n_epochs": st.integers(1, 3), "at_epoch": several(st.integers(0, 3))}
CRITERIA = {
    **STEP_CRITERIA, **TIMERS, **EPOCH_CRITERIA, **COUNTER_CRITERIA, "condition": STEPS
}  # fmt: skip
FRACTION = st.sampled_from((0.5, 0.25, 1 / 3, 0.4, 0.75, 1.5, 2.5))
AWAITED = st.sampled_from(("A", "A", "B", "EPOCH_END", "TRAINING_END"))
STOP_AWAITS = st.sampled_from(("A", "A", "B", "EPOCH_END"))
ONE_OR_TWO = st.sets(st.sampled_from(sorted(CRITERIA)), min_size=1, max_size=2)
MEMBER = st.sampled_from((*[()] * 6, ("EPOCH_END",), ("TRAINING_END",), ("EXCEPTION",)))
LENGTHS, WRONG_BY = few(st.integers(1, 5), 1, 3), st.sampled_from((-1, 0, 1, -2, 2))
LIMIT = st.sampled_from(
    (*[("max_epochs", n) for n in (1, 2, 3, 4)], *[("max_steps", n) for n in (1, 2, 4, 6, 9, 14)])
    + (*[("max_seconds", n) for n in (1, 2, 5, 10, 20)], *[("stop_when", 0)] * 6)
)
SIZES: st.SearchStrategy[Any] = st.sampled_from((None, None, 1, 2, 3, 5, (4, 2, 1), (3, 1), (2, 1)))
ACT = st.sampled_from(
    ("leave", "leave", "stop", "trigger A", "trigger B", "restart", "finish", "finish_epoch")
    + ("finish_epoch", "count 1", "count 2", "count 3", "count 5", "count 8")
)
ENTERED, ACTS = few(SIZES, 1, 3), few(st.tuples(STEP, ACT), 0, 4)
SAVE = st.tuples(st.sampled_from((-1, -1, *range(11))), st.sampled_from(("save", "save undone")))
KILL = st.tuples(STEP, st.just("kill"))
DEATH = st.tuples(few(SAVE, 1, 2), few(KILL, 0, 1)).map(lambda both: both[0] + both[1])
BATCH = st.sampled_from(("0.1", "0.2", "0.3", "0.0", "0.4", "1.0", "1.1"))
ERROR = st.sampled_from(("ValueError", "KeyboardInterrupt"))
ERRORS = few(st.tuples(BATCH, ERROR, st.integers(1, 2)), 1, 2)
LEAVES = few(st.tuples(st.integers(0, 3), st.just("leave")), 0, 2)  # often just before an error
SOURCE, COSTS, LIVES = st.sampled_from(SOURCES), few(st.integers(0, 2), 1, 3), st.integers(2, 4)
LOOKAHEAD = st.sampled_from((None, None, True, False))
BATCHED, ON_EXCEPTION = st.sampled_from((None,) * 6 + (2, 3)), st.sampled_from(("raise", "event"))


def draw_part(draw: Draw, late: int, fractions: bool, criteria: Criteria) -> Part:
    """An Event of some criteria; `late` puts off what would end a run at once."""
    values: dict[str, Any] = {name: draw(CRITERIA[name]) for name in sorted(draw(criteria))}
    for name in values.keys() - EPOCH_CRITERIA.keys() - {"every_n"} if late else ():
        value = values[name]
        values[name] = value + late if isinstance(value, int) else tuple([n + late for n in value])
    if "every_n_epochs" in values and fractions and draw(ONE_IN[2]):
        values["every_n_epochs"] = draw(FRACTION)
    if "every_n_steps" in values and draw(ONE_IN[3]):
        values["first_at_step"] = draw(STEP) + late
    if "condition" in values and draw(ONE_IN[10]):
        values["raises_at"] = draw(STEP)
    if draw(ONE_IN[4]):
        values["from_step"] = draw(FEW)
    if draw(ONE_IN[4]):
        values["until_step"] = values.get("from_step", 0) + draw(FEW)
    has_steps = values.keys() & {*STEP_CRITERIA, "from_step", "until_step"}
    if has_steps and draw(ONE_IN[3]):
        values["per_epoch"] = True
    elif (has_steps or values.keys() & TIMERS) and draw(ONE_IN[2]):
        values["per_launch"] = True
    return Part(**values)


def draw_parts(
    draw: Draw,
    late: int = 0,
    may_wait: bool = False,
    fractions: bool = False,
    criteria: Criteria = ONE_OR_TWO,
) -> Parts:
    """Parts of an event; with `may_wait` they can wait for the first two, which do not wait."""
    chosen = [
        draw_part(draw, late, fractions, criteria) for _ in range(2 if draw(ONE_IN[3]) else 1)
    ]
    if may_wait:
        awaited = STOP_AWAITS if late else AWAITED
        waiting = [replace(each, wait_for=draw(awaited)) for each in chosen]
        can_wait = [not (late and each.per_launch) and draw(ONE_IN[2]) for each in chosen]
        chosen = [each if can else part for each, part, can in zip(waiting, chosen, can_wait)]
    return (*dict.fromkeys(chosen), *draw(MEMBER))


def draw_source(draw: Draw) -> Source:
    source: Source = draw(SOURCE)
    lengths = draw(LENGTHS)
    if source.single_pass:
        lengths = (sum(lengths),)
    elif draw(ONE_IN[12]):
        lengths = (*lengths[:-1], 0)
    if source.keeps_state or not source.sets_epoch:
        lengths = lengths[-1:]  # since a state at an epoch's end would be within a longer one
    promised = None if source.promised is None else lengths
    may_be_wrong = source.kind == "loader" and not source.keeps_state
    if promised and may_be_wrong and draw(ONE_IN[2]):
        promised = tuple([max(0, n + draw(WRONG_BY)) for n in lengths])
    return replace(source, lengths=lengths, promised=promised, batched=draw(BATCHED))


def draw_limits(draw: Draw, source: Source) -> dict[str, Any]:
    """How long the run is, and how it finds the ends of its epochs."""
    name, limit = draw(LIMIT)
    chosen: dict[str, Any] = {name: limit}
    if draw(ONE_IN[5]) or (name == "max_epochs" and source.single_pass and limit > 1):
        chosen["dataloader_len"] = draw(FEW)
    if name == "stop_when" or draw(ONE_IN[3]):
        ends = draw_parts(draw, late=4, may_wait=True)
        chosen["stop_when"] = tuple([e for e in ends if e not in ("TRAINING_END", "EXCEPTION")])
    lookahead = draw(LOOKAHEAD)
    is_told = "dataloader_len" in chosen or source.says_end
    is_known = is_told or (source.promised is not None and not source.guesses)
    if not (is_told if lookahead else name == "max_epochs" and not is_known):
        chosen["lookahead"] = lookahead
    if name == "max_epochs" and knows_lengths(source, chosen) and draw(ONE_IN[3]):
        chosen["max_epochs"] = draw(FRACTION)
    return chosen


def knows_lengths(source: Source, limits: dict[str, Any]) -> bool:
    """Whether the length of each epoch is known as it is opened, as fractions need it."""
    if "dataloader_len" in limits:
        return True
    has_len = source.promised is not None and not source.guesses and not source.says_end
    return has_len and not limits.get("lookahead")


def draw_start(draw: Draw, source: Source, limit: dict[str, Any]) -> dict[str, Any]:
    """A `start_step` where one is allowed, and `fast_forward`."""
    chosen: dict[str, Any] = {"fast_forward": not draw(ONE_IN[8])}
    length: int | None = limit.get("dataloader_len")
    real = source.steps(min(source.lengths))
    if not draw(ONE_IN[5]) or not source.is_honest or real == 0 or (length or 0) > real:
        return chosen
    if length is None and source.single_pass:
        chosen["fast_forward"] = True
    elif length is None and source.promised is not None and not limit.get("lookahead"):
        if source.sets_epoch:  # it is not known whether its epochs are equally long
            return chosen
    elif length is None:
        chosen["fast_forward"] = False
    most = min(limit.get("max_steps", 9), limit.get("max_epochs", 9) * (length or real))
    return {**chosen, "start_step": draw(STEP) % max(1, int(most))}


def draw_life(draw: Draw, source: Source, saves: bool, is_plain: bool) -> Life:
    raises = is_plain and source.is_honest and source.kind != "list" and draw(ONE_IN[3])
    errors = draw(ERRORS) if raises else ()
    acts = [*draw(ACTS), *(draw(LEAVES) if raises else ()), *(draw(DEATH) if saves else ())]
    if source.single_pass:  # the contract does not say what a restart or an interrupt leaves of it
        acts = [each for each in acts if each[1] != "restart"]
        errors = tuple([error for error in errors if error[1] == "ValueError"])
    acts.sort(key=lambda each: (each[0], each[1] in ("leave", "restart", "kill")))
    return Life(draw(ENTERED), tuple(acts), errors)


@st.composite
def plans(draw: Draw, resumed: bool) -> Plan:
    """Plans of one life, or of several."""
    source = draw_source(draw)
    limits = draw_limits(draw, source)
    start = draw_start(draw, source, limits)
    # A batch that is skipped may be fetched, or not
    is_plain = start == {"fast_forward": True} and not source.keeps_state
    after = range(draw(LIVES) - 1, -1, -1) if resumed else (0,)  # how many lives come after each
    names = ("A", "B", "C", "D")[: draw(LIVES)]
    return Plan(
        source=source,
        events={
            name: ()
            if draw(ONE_IN[12])
            else draw_parts(draw, may_wait=name in "CD", fractions=knows_lengths(source, limits))
            for name in names
        },
        **{"stop_when": None, **limits},
        **start,
        on_exception=draw(ON_EXCEPTION),
        fetch_costs=draw(COSTS) if is_plain and source.sets_epoch else (0,),
        body_costs=(*draw(COSTS), 1),
        lives=tuple([draw_life(draw, source, left > 0, is_plain) for left in after]),
    )


SEEDS = 160


def from_many_seeds(test: Callable[[], None]) -> Callable[[], None]:
    """Run a random test with the simplest example and a random one of each seed, except in a hunt.

    From one seed, Hypothesis draws few plans, and tries each again with small changes.
    """
    if not settings.default.derandomize:
        return test
    of_two_examples = settings(max_examples=2)(test)

    def test_with_all_seeds() -> None:
        for number in range(SEEDS):
            seed(number)(of_two_examples)()

    return test_with_all_seeds


# ------------------------------------------------------------------------------ loaders and events


class Loader:
    """What loaders can do; `loader_of` makes one that can do what the source can."""

    def __init__(self, source: Source, world: World) -> None:
        self.source = source
        self.world = world
        self.epoch = 0
        self.given = 0  # how many batches of the epoch
        self.begins_at = 0

    def __iter__(self) -> Iterator[str]:
        self.given, self.begins_at = self.begins_at, 0
        while self.given < self.source.length(self.epoch):
            batch = self.world.fetch(self.source.batch(self.epoch, self.given))
            self.given += 1
            yield batch

    def _len(self) -> int:
        promised = self.source.promised or ()
        return promised[self.epoch % len(promised)]

    def _set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _is_at_end(self) -> bool:
        return self.given == self.source.length(self.epoch)

    def _state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def _load_state_dict(self, state: dict[str, int]) -> None:
        self.given = self.begins_at = state["given"]


class SinglePass(Loader):
    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.given == self.source.length(0):
            raise StopIteration
        batch = self.world.fetch(self.source.batch(0, self.given))
        self.given += 1
        return batch


class Nesting:
    """A loader of a user, around one that a library has made."""

    def __init__(self, loader: Any) -> None:
        self.loaders = [loader]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loaders[0])


class SizedNesting(Nesting):
    def __len__(self) -> int:
        return len(self.loaders[0])


def loader_of(source: Source, world: World) -> Any:
    """A loader of the kind that the source is."""
    if source.kind == "list":
        return [source.batch(0, place) for place in range(source.length(0))]
    abilities: dict[str, tuple[bool, Any]] = {
        "__len__": (source.promised is not None, Loader._len),
        "set_epoch": (source.sets_epoch, Loader._set_epoch),
        "end_of_dataloader": (source.says_end, property(Loader._is_at_end)),
        "dataset": (source.guesses, iter(())),  # it can only be gone over
        "state_dict": (source.keeps_state, Loader._state_dict),
        "load_state_dict": (source.keeps_state, Loader._load_state_dict),
    }
    own = {name: ability for name, (has, ability) in abilities.items() if has}
    return type("TheLoader", (SinglePass if source.single_pass else Loader,), own)(source, world)


def dataloader_of(source: Source, world: World) -> Any:
    """What is passed to Loop."""

    def make() -> Any:
        loader = loader_of(source, world)
        if source.nested:
            loader = (Nesting if source.promised is None else SizedNesting)(loader)
        return loader if source.batched is None else batched(loader, source.batched)

    return make if source.kind == "callable" else make()


def event_of(name: str, given: Parts, world: World) -> Event | None:
    def single(part: Part | str) -> Event:
        if isinstance(part, str):
            return next(member for member in MEMBERS if MEMBERS[member] == part)
        values = {key: value for key, value in vars(part).items() if value is not None}
        values.pop("raises_at", None)
        if values.pop("condition", None) is not None:
            values["condition_function"] = lambda state: world.ask(
                name, part, state.epoch, state.global_step, state.epoch_step
            )
        values["of"] = "tokens" if values.keys() & COUNTER_CRITERIA.keys() else None
        values["wait_for"] = NAMED.get(values.get("wait_for"), values.get("wait_for"))
        return Event(**values)

    return reduce(or_, map(single, given)) if given else None


def loop_of(plan: Plan, world: World) -> Loop[Any]:
    arguments = {each.name: getattr(plan, each.name) for each in fields(plan)}
    for name in ("source", "events", "stop_when", "fetch_costs", "body_costs", "lives"):
        arguments.pop(name)
    return Loop(
        dataloader_of(plan.source, world),
        {name: event_of(name, given, world) for name, given in plan.events.items()},
        stop_when=event_of("stop_when", plan.stop_when or (), world),
        clock=lambda: world.now,
        **arguments,
    )
