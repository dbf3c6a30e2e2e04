"""What people write: Event, its joins with `|`, and LoopEvents."""

from __future__ import annotations

from . import checks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from typing import Any, ClassVar, Final, NoReturn, SupportsFloat, SupportsIndex

    from ._core import LoopState


class _Members(type):
    """Lets LoopEvents be gone through, as an Enum is."""

    def __iter__(cls) -> Iterator[LoopEvents]:
        return iter(
            (
                LoopEvents.EPOCH_END,
                LoopEvents.TRAINING_END,
                LoopEvents.INTERRUPT,
                LoopEvents.EXCEPTION,
            )
        )


class LoopEvents(metaclass=_Members):
    """The events that dloop itself adds to a step.

    They are asked for like any other event, can be joined with an Event, and are what
    `list(LoopEvents)` gives. It is no Enum, since up to Python 3.11 to look up a member of one
    takes longer than a step of a loop.

    Attributes:
        EPOCH_END: the step has the last batch of its epoch.
        TRAINING_END: the step has the last batch of the run.
        INTERRUPT: the step is the last because a signal asked for an end.
        EXCEPTION: there is no batch, but an exception that ended the run.

    Example:
        >>> from dloop import Loop, LoopEvents
        >>> for batch, events in Loop("ab", max_epochs=2):
        ...     print(batch, LoopEvents.EPOCH_END in events, LoopEvents.TRAINING_END in events)
        a False False
        b True False
        a False False
        b True True
    """

    __slots__ = ("_name",)

    EPOCH_END: ClassVar[LoopEvents]
    TRAINING_END: ClassVar[LoopEvents]
    INTERRUPT: ClassVar[LoopEvents]
    EXCEPTION: ClassVar[LoopEvents]

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """The member's name, such as `"EPOCH_END"`."""
        return self._name

    def __repr__(self) -> str:
        return f"LoopEvents.{self._name}"

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (LoopEvents, self._name)

    def __or__(self, other: BaseEvent) -> BaseEvent:
        if not isinstance(other, BaseEvent):
            return NotImplemented
        return _join(self, other)


LoopEvents.EPOCH_END = LoopEvents("EPOCH_END")
LoopEvents.TRAINING_END = LoopEvents("TRAINING_END")
LoopEvents.INTERRUPT = LoopEvents("INTERRUPT")
LoopEvents.EXCEPTION = LoopEvents("EXCEPTION")


class _NotGiven:
    """The default of a criterion, so that None can say that it is off."""

    def __repr__(self) -> str:
        return "None"


_NOT_GIVEN: Any = _NotGiven()

CRITERIA = (
    "condition_function",
    "every_n_steps",
    "at_step",
    "every_n_seconds",
    "at_time",
    "at_timestamp",
    "every_n_epochs",
    "at_epoch",
)
"""The parameters of Event that say when it is due, in the order in which they are told."""
_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(CRITERIA),
    "first_at_step": None,
    "from_step": 0,
    "until_step": None,
    "per_epoch": False,
    "per_launch": False,
}
_BEARS_UPON = {
    "first_at_step": ("every_n_steps",),
    "per_epoch": ("every_n_steps", "at_step"),
    "per_launch": ("every_n_steps", "at_step", "every_n_seconds", "at_time"),
}
"""Modifiers, and the criteria of which they need one."""


class BaseEvent:
    """What Events and their joins have in common: they join, and they do not change."""

    __slots__ = ()

    if TYPE_CHECKING:
        _set_last: str

        @property
        def parts(self) -> tuple[Event | LoopEvents, ...]:
            """The Events and LoopEvents members, as they were joined, each once."""
            raise NotImplementedError

    def __or__(self, other: BaseEvent | LoopEvents) -> BaseEvent:
        if not isinstance(other, (BaseEvent, LoopEvents)):
            return NotImplemented
        return _join(self, other)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, self._set_last):  # by __init__; from then on nothing changes
            raise AttributeError(f"{name}: an Event does not change; make another")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: an Event does not change; make another")


class Event(BaseEvent):
    """When something is due. An immutable value: hashable, comparable, good for many loops.

    It needs at least one criterion. With several, it fires at each step at which any is due.
    Every criterion is looked at in every step, so a timer that is due together with a step
    criterion has fired with it.

    A criterion that is None is off, as a configuration may want it. An Event of which nothing is
    left is never due, and equal to any other such Event. A modifier that is None has its default.

    Args:
        condition_function: called once per step with the `LoopState`; fires when it returns
            something true. What it raises ends the run.
        every_n_steps: a period in steps: fires when `(global_step + 1) % every_n_steps == 0`.
        at_step: a `global_step`, or a collection of them, counted from 0.
        every_n_seconds: a period in seconds of training time: fires at the first step at which
            that much has passed since the event was last due, for whatever reason (first: since
            training started). Missed periods are not made up for.
        at_time: seconds of training time, or a collection: fires once for each, at the first
            step at or after it.
        at_timestamp: a moment of the wall clock, in seconds as `time.time()` gives them or as an
            aware datetime, or a collection: fires once for each, at the first step at or after it.
            It belongs to this launch and is no part of a saved state.
        every_n_epochs: a period in epochs: fires on the last batch of every n-th epoch.
        at_epoch: an epoch, or a collection, counted from 0: fires on its last batch.
        first_at_step: the first step at which every_n_steps fires, from 0; n - 1 by default. With
            0 it fires at 0, n, 2n and so on.
        from_step: the first `global_step` at which any of this is looked at. A timer that was
            due before fires then.
        until_step: the first `global_step` at which none of it is looked at any more.
        per_epoch: the step criteria count `epoch_step`, from 0 in every epoch, instead.
        per_launch: the step criteria count the steps since the Loop was made or restarted, from
            0, and the time criteria from this process's first request for a batch. Both begin
            afresh after a resume.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or there is no criterion.

    Example:
        >>> from dloop import Event, Loop, LoopEvents
        >>> every_third_and_last = Event(every_n_steps=3) | LoopEvents.TRAINING_END
        >>> loop = Loop(range(5), max_epochs=1, events={"Save": every_third_and_last})
        >>> [batch for batch, events in loop if "Save" in events]
        [2, 4]
        >>> evaluate = Event(every_n_steps=4, first_at_step=0)
        >>> [batch for batch, events in Loop(range(9), {"Eval": evaluate}, max_epochs=1)
        ...     if "Eval" in events]
        [0, 4, 8]
    """

    __slots__ = tuple(_DEFAULTS)

    def __init__(
        self,
        condition_function: Callable[[LoopState], object] | None = _NOT_GIVEN,
        *,
        every_n_steps: SupportsIndex | None = _NOT_GIVEN,
        at_step: SupportsIndex | Iterable[SupportsIndex] | None = _NOT_GIVEN,
        every_n_seconds: SupportsFloat | None = _NOT_GIVEN,
        at_time: SupportsFloat | Iterable[SupportsFloat] | None = _NOT_GIVEN,
        at_timestamp: (
            SupportsFloat | datetime | Iterable[SupportsFloat | datetime] | None
        ) = _NOT_GIVEN,
        every_n_epochs: SupportsIndex | None = _NOT_GIVEN,
        at_epoch: SupportsIndex | Iterable[SupportsIndex] | None = _NOT_GIVEN,
        first_at_step: SupportsIndex | None = None,
        from_step: SupportsIndex | None = None,
        until_step: SupportsIndex | None = None,
        per_epoch: bool | None = None,
        per_launch: bool | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "condition_function": condition_function,
            "every_n_steps": every_n_steps,
            "at_step": at_step,
            "every_n_seconds": every_n_seconds,
            "at_time": at_time,
            "at_timestamp": at_timestamp,
            "every_n_epochs": every_n_epochs,
            "at_epoch": at_epoch,
        }
        given = {name: value for name, value in given.items() if value is not _NOT_GIVEN}
        condition = given.get("condition_function")
        if condition is not None and not callable(condition):
            raise TypeError(
                f"condition_function={checks.shown(condition)}: pass a callable that "
                "takes a LoopState; periods have names, such as every_n_steps="
            )
        self.condition_function: Final[Callable[[LoopState], object] | None] = condition
        self.every_n_steps: Final = _count("every_n_steps", given)
        self.at_step: Final = _points("at_step", given, _number)
        self.every_n_seconds: Final = _seconds("every_n_seconds", given)
        self.at_time: Final = _points("at_time", given, _time)
        self.at_timestamp: Final = _points("at_timestamp", given, _timestamp)
        self.every_n_epochs: Final = _count("every_n_epochs", given)
        self.at_epoch: Final = _points("at_epoch", given, _number)
        modifiers: dict[str, Any] = {
            "first_at_step": None
            if first_at_step is None
            else checks.count("first_at_step", first_at_step, 0),
            "from_step": 0 if from_step is None else checks.count("from_step", from_step, 0),
            "until_step": None if until_step is None else checks.count("until_step", until_step),
            "per_epoch": per_epoch is not None and checks.flag("per_epoch", per_epoch),
            "per_launch": per_launch is not None and checks.flag("per_launch", per_launch),
        }
        _check_together(given, modifiers)
        left = {name for name in given if getattr(self, name) is not None}
        for name in modifiers:
            if not left.intersection(_BEARS_UPON.get(name, CRITERIA)):
                modifiers[name] = _DEFAULTS[name]  # it bears upon nothing that is left
        self.first_at_step: Final[int | None] = modifiers["first_at_step"]
        self.from_step: Final[int] = modifiers["from_step"]
        self.until_step: Final[int | None] = modifiers["until_step"]
        self.per_epoch: Final[bool] = modifiers["per_epoch"]
        self.per_launch: Final[bool] = modifiers["per_launch"]

    _set_last = "per_launch"

    @property
    def parts(self) -> tuple[Event | LoopEvents, ...]:
        """What this is joined from: itself."""
        return (self,)

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in _DEFAULTS])

    def _key(self) -> tuple[object, ...]:
        """What makes two Events equal: a condition may have no hash, and counts by its identity."""
        function, *others = self._values()
        return None if function is None else id(function), *others

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def given(self) -> dict[str, object]:
        """The arguments that are not the defaults, by name."""
        return {
            name: getattr(self, name)
            for name, default in _DEFAULTS.items()
            if getattr(self, name) is not default and getattr(self, name) != default
        }

    def __repr__(self) -> str:
        given = [
            repr(value) if name == "condition_function" else f"{name}={value!r}"
            for name, value in self.given().items()
        ]
        return f"Event({', '.join(given) or 'every_n_steps=None'})"

    def __reduce__(self) -> tuple[object, ...]:
        return _event, (self._values(),)


class EventUnion(BaseEvent):
    """Several Events (and LoopEvents members) joined with `|`: due when any of them is.

    Example:
        >>> from dloop import Event, LoopEvents
        >>> Event(every_n_steps=16) | LoopEvents.TRAINING_END
        Event(every_n_steps=16) | LoopEvents.TRAINING_END
    """

    __slots__ = ("_parts",)

    _set_last = "_parts"

    def __init__(self, parts: Iterable[Event | LoopEvents]) -> None:
        self._parts: Final = tuple(dict.fromkeys(parts))

    @property
    def parts(self) -> tuple[Event | LoopEvents, ...]:
        """What this is joined from: Events and LoopEvents members, each once."""
        return self._parts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EventUnion):
            return NotImplemented
        return frozenset(self.parts) == frozenset(other.parts)

    def __hash__(self) -> int:
        return hash(frozenset(self.parts))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def __reduce__(self) -> tuple[object, ...]:
        return EventUnion, (self.parts,)


def _join(a: BaseEvent | LoopEvents, b: BaseEvent | LoopEvents) -> BaseEvent:
    parts: list[Event | LoopEvents] = []
    for each in (a, b):
        parts += [each] if isinstance(each, LoopEvents) else each.parts
    joined = EventUnion(parts)
    only = joined.parts[0]
    return only if len(joined.parts) == 1 and isinstance(only, Event) else joined


def _event(values: tuple[object, ...]) -> Event:
    arguments = dict(zip(_DEFAULTS, values))
    return Event(**arguments)  # type: ignore[arg-type]


def _check_together(given: dict[str, Any], modifiers: dict[str, Any]) -> None:
    """Refuse a modifier without a criterion that it bears upon, and others that contradict."""
    if not given:
        raise ValueError(f"Event(): pass at least one of {', '.join(CRITERIA)}; None is off")
    start, stop = modifiers["from_step"], modifiers["until_step"]
    if stop is not None and stop <= start:
        raise ValueError(f"until_step={stop}: pass a step above from_step={start}")
    for name, criteria in _BEARS_UPON.items():
        value = modifiers[name]
        if value is not None and value is not False and not any(map(given.__contains__, criteria)):
            raise ValueError(f"{name}={value}: it bears upon {', '.join(criteria)}; pass one")
    if modifiers["per_epoch"] and modifiers["per_launch"]:
        raise ValueError("per_launch=True: per_epoch=True counts otherwise; pass one of them")


def _count(name: str, given: dict[str, Any]) -> int | None:
    value = given.get(name)
    return None if value is None else checks.count(name, value, off=True)


def _seconds(name: str, given: dict[str, Any]) -> float | None:
    value = given.get(name)
    return None if value is None else checks.seconds(name, value, off=True)


def _number(name: str, value: object) -> int:
    return checks.count(name, value, 0, off=True)


def _time(name: str, value: object) -> float:
    return checks.seconds(name, value, zero=True, off=True)


def _timestamp(name: str, value: Any) -> float:
    """A moment in seconds since the epoch, from these or from a datetime that has a time zone."""
    is_date = hasattr(value, "toordinal")
    if not is_date and not hasattr(value, "utcoffset"):
        return checks.seconds(name, value, zero=True, off=True)
    if not hasattr(value, "utcoffset") or value.utcoffset() is None:
        raise ValueError(
            f"{name}={checks.shown(value)}: its time zone is not known; pass an aware datetime, or "
            "seconds as time.time() gives them"
        )
    return checks.seconds(name, value.timestamp(), zero=True)


def _points(
    name: str, given: dict[str, Any], check: Callable[[str, object], checks.Number]
) -> checks.Number | tuple[checks.Number, ...] | None:
    value = given.get(name)
    return None if value is None else checks.points(name, value, check)
