"""What users write: Event, joined with `|`, and the members of LoopEvents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from . import checks

if TYPE_CHECKING:
    from ._core import LoopState

STEP_CRITERIA = ("every_n_steps", "at_step")
TIME_CRITERIA = ("every_n_seconds", "at_time")
EPOCH_CRITERIA = ("every_n_epochs", "at_epoch")
COUNTER_CRITERIA = ("every_n", "at")
CRITERIA = (
    "condition_function",
    *STEP_CRITERIA,
    *TIME_CRITERIA,
    "at_timestamp",
    *EPOCH_CRITERIA,
    *COUNTER_CRITERIA,
)
"""The parameters of Event that make it fire."""
_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(CRITERIA),
    "of": None,
    "first_at_step": None,
    "from_step": 0,
    "until_step": None,
    "per_epoch": False,
    "per_launch": False,
    "wait_for": None,
}
_WINDOW = ("from_step", "until_step")
_CHANGES = {
    "of": COUNTER_CRITERIA,
    "first_at_step": ("every_n_steps",),
    "per_epoch": (*STEP_CRITERIA, *_WINDOW),
    "per_launch": (*STEP_CRITERIA, *TIME_CRITERIA, *_WINDOW),
}
"""Modifiers, and the parameters that each changes; it needs one of them."""


_OTHER_NAMES = {
    **dict.fromkeys(
        ("every", "every_steps", "every_n_step", "steps", "n_steps", "n", "freq"), "every_n_steps"
    ),
    **dict.fromkeys(("every_epochs", "every_epoch", "epochs"), "every_n_epochs"),
    **dict.fromkeys(("every_seconds", "seconds", "interval", "minutes"), "every_n_seconds"),
    **dict.fromkeys(("every_n_minutes", "every_n_hours"), "every_n_seconds"),
    **dict.fromkeys(("step", "at_steps", "on_step"), "at_step"),
    **dict.fromkeys(("time", "at_seconds", "after"), "at_time"),
    **dict.fromkeys(("condition", "function", "fn"), "condition_function"),
    **dict.fromkeys(("start", "first_step", "offset"), "first_at_step"),
    **dict.fromkeys(("after_step", "begin", "start_step"), "from_step"),
    **dict.fromkeys(("before_step", "end", "stop_step"), "until_step"),
    "counter": "of",
    "epoch": "at_epoch",
}
"""What other libraries, and hasty users, call the arguments."""


def _set(event: Event, values: dict[str, Any], parts: tuple[Event, ...]) -> None:
    for name, value in values.items():
        object.__setattr__(event, name, value)
    object.__setattr__(event, "_parts", parts)


class Event:
    """Say when something happens. An immutable, hashable value that any number of loops can share.

    An Event fires at each step at which any of its criteria is met; without a criterion it never
    fires. None switches a criterion or a modifier off. `a | b` is an Event that fires when either
    does; each part keeps its own modifiers, and the criteria of the joined Event are None.

    Args:
        condition_function: fires when `condition_function(state)` is true. It is called once per
            step with a `LoopState`. An exception from it ends the run.
        every_n_steps: a period in steps: fires when `(global_step + 1) % every_n_steps == 0`.
        at_step: a step, or a collection of steps, from 0.
        every_n_seconds: a period in seconds of training time, or a timedelta: fires at the first
            step at which it has passed since training began, or since its name last fired, by any
            criterion or by `trigger()`. Missed periods are skipped.
        at_time: seconds of training time, or a timedelta, or a collection: fires once for each, at
            the first step at or after it.
        at_timestamp: a moment of the wall clock in seconds, as `time.time()` returns, or an aware
            datetime, or a collection: fires once for each in every launch, at the first step at or
            after it.
        every_n_epochs: a period in epochs: fires on the last batch of every n-th epoch. A fraction
            fires within epochs, whose lengths have to be known: 0.25 four times in each, 0.1 and
            1 / 3 are exact.
        at_epoch: an epoch, or a collection of epochs, from 0: fires on its last batch.
        every_n: a period of the counter `of`: fires at each step at which `loop.count` makes its
            sum reach or pass a multiple of n; once, if several are passed.
        at: a sum of the counter `of`, or a collection of sums: fires once for each, at the step at
            which the sum reaches it.
        of: the name of the counter that `every_n` and `at` refer to.
        first_at_step: the first step at which every_n_steps fires, from 0; n - 1 by default.
        from_step: the first step at which the Event can fire.
        until_step: it can fire only before this step.
        per_epoch: all step numbers of the Event count within the epoch.
        per_launch: all step numbers of the Event count from this launch's first step, and its
            seconds from this launch's first request for a batch. A resume starts afresh.
        wait_for: the name of another event of the loop, or a member of LoopEvents: once a criterion
            is met, the Event fires at the next step at which that event fires, or at the same one.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a modifier changes nothing.

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

    __slots__ = (*_DEFAULTS, "_parts")

    condition_function: Callable[[LoopState], object] | None
    every_n_steps: int | None
    at_step: int | tuple[int, ...] | None
    every_n_seconds: float | None
    at_time: float | tuple[float, ...] | None
    at_timestamp: float | tuple[float, ...] | None
    every_n_epochs: float | None
    at_epoch: int | tuple[int, ...] | None
    every_n: int | None
    at: int | tuple[int, ...] | None
    of: str | None
    first_at_step: int | None
    from_step: int
    until_step: int | None
    per_epoch: bool
    per_launch: bool
    wait_for: Hashable
    _parts: tuple[Event, ...]

    def __init__(
        self,
        condition_function: Callable[[LoopState], object] | None = None,
        *,
        every_n_steps: int | None = None,
        at_step: int | Iterable[int] | None = None,
        every_n_seconds: float | timedelta | None = None,
        at_time: float | timedelta | Iterable[float | timedelta] | None = None,
        at_timestamp: float | datetime | Iterable[float | datetime] | None = None,
        every_n_epochs: float | None = None,
        at_epoch: int | Iterable[int] | None = None,
        every_n: int | None = None,
        at: int | Iterable[int] | None = None,
        of: str | None = None,
        first_at_step: int | None = None,
        from_step: int | None = None,
        until_step: int | None = None,
        per_epoch: bool | None = None,
        per_launch: bool | None = None,
        wait_for: Hashable = None,
    ) -> None:
        given = {
            "condition_function": _condition(condition_function),
            "every_n_steps": _checked("every_n_steps", every_n_steps, checks.count),
            "at_step": _points("at_step", at_step, _step),
            "every_n_seconds": _checked("every_n_seconds", every_n_seconds, checks.seconds),
            "at_time": _points("at_time", at_time, _time),
            "at_timestamp": _points("at_timestamp", at_timestamp, _timestamp),
            "every_n_epochs": _checked("every_n_epochs", every_n_epochs, checks.epochs),
            "at_epoch": _points("at_epoch", at_epoch, _step),
            "every_n": _checked("every_n", every_n, checks.count),
            "at": _points("at", at, checks.count),
            "of": _checked("of", of, checked_counter),
            "first_at_step": _checked("first_at_step", first_at_step, _step),
            "from_step": _checked("from_step", from_step, _step),
            "until_step": _checked("until_step", until_step, checks.count),
            "per_epoch": _checked("per_epoch", per_epoch, checks.flag),
            "per_launch": _checked("per_launch", per_launch, checks.flag),
            "wait_for": _checked("wait_for", wait_for, _name),
        }
        values = {name: _DEFAULTS[name] if each is None else each for name, each in given.items()}
        if all(values[name] is None for name in CRITERIA):
            values = _DEFAULTS  # no modifier can matter
        _check_together(values)
        _set(self, values, ())

    if not TYPE_CHECKING:

        @wraps(__init__)  # for help() and tooltips
        def __new__(cls, *_: object, **arguments: object) -> Event:
            """Refuse unknown keywords."""
            if cls is Event:
                checks.refuse_unknown(Event.__init__, arguments, _OTHER_NAMES)
            return object.__new__(cls)

    @property
    def parts(self) -> tuple[Event, ...]:
        """The Events that this one was joined from; itself, if it was not joined."""
        return self._parts or (self,)

    def __or__(self, other: Event) -> Event:
        if not isinstance(other, Event):
            return NotImplemented
        return _joined((*self.parts, *other.parts))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name}: an Event does not change; make another")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: an Event does not change; make another")

    def _key(self) -> object:
        """Return what makes two Events equal; conditions are compared by identity."""
        if self._parts:
            return frozenset(self._parts)
        function, *others = [getattr(self, name) for name in _DEFAULTS]
        return None if function is None else id(function), *others

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not Event or type(other) is not Event:
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def given(self) -> dict[str, Any]:
        """Return the arguments that differ from the defaults, by name.

        Example:
            >>> from dloop import Event
            >>> Event(every_n_steps=2, from_step=10).given()
            {'every_n_steps': 2, 'from_step': 10}
        """
        values = {name: getattr(self, name) for name in _DEFAULTS}
        return {name: each for name, each in values.items() if each != _DEFAULTS[name]}

    def __repr__(self) -> str:
        if self._parts:
            return " | ".join(map(repr, self._parts))
        given = [
            repr(value) if name == "condition_function" else f"{name}={value!r}"
            for name, value in self.given().items()
        ]
        return f"Event({', '.join(given)})"

    def __reduce__(self) -> tuple[object, ...]:
        if self._parts:
            return _joined, (self._parts,)
        return partial(Event, **self.given()), ()


class Member(Event):
    """A member of LoopEvents. It is compared and hashed as an object, which is fast."""

    __slots__ = ("name",)

    name: str

    __eq__ = object.__eq__  # pyright: ignore[reportAssignmentType]
    __hash__ = object.__hash__

    def __init__(self, name: str) -> None:
        _set(self, _DEFAULTS, ())
        object.__setattr__(self, "name", name)

    def __repr__(self) -> str:
        return f"LoopEvents.{self.name}"

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (LoopEvents, self.name)


class _Members(type):
    """Makes `list(LoopEvents)` work."""

    def __iter__(cls) -> Iterator[Event]:
        return iter([value for value in vars(cls).values() if isinstance(value, Member)])


class LoopEvents(metaclass=_Members):
    """The events that dloop adds to steps. Each is an Event: join it, or look for it in a set.

    Attributes:
        EPOCH_END: fires on the last batch of every complete epoch.
        TRAINING_END: fires on the last batch of the run.
        INTERRUPT: fires on the last batch of a run that a signal ends.
        EXCEPTION: fires in the step that stands for an exception; its batch is None.

    Example:
        >>> from dloop import Loop, LoopEvents
        >>> for batch, events in Loop("ab", max_epochs=2):
        ...     print(batch, LoopEvents.EPOCH_END in events, LoopEvents.TRAINING_END in events)
        a False False
        b True False
        a False False
        b True True
    """

    EPOCH_END: ClassVar[Event] = Member("EPOCH_END")
    TRAINING_END: ClassVar[Event] = Member("TRAINING_END")
    INTERRUPT: ClassVar[Event] = Member("INTERRUPT")
    EXCEPTION: ClassVar[Event] = Member("EXCEPTION")


def _joined(parts: tuple[Event, ...]) -> Event:
    distinct = tuple(dict.fromkeys(parts))
    if len(distinct) == 1:
        return distinct[0]
    event = Event.__new__(Event)
    _set(event, _DEFAULTS, distinct)
    return event


def _check_together(values: dict[str, Any]) -> None:
    """Refuse a modifier that changes nothing, and modifiers that contradict each other."""
    start, stop = values["from_step"], values["until_step"]
    if stop is not None and stop <= start:
        raise ValueError(f"until_step={stop}: pass a step above from_step={start}")
    is_given = {name for name, value in values.items() if value != _DEFAULTS[name]}
    for name, changed in _CHANGES.items():
        if name in is_given and not is_given.intersection(changed):
            given, expected = checks.shown(values[name]), ", ".join(changed)
            raise ValueError(f"{name}={given}: it changes nothing here; add one of {expected}")
    for name in COUNTER_CRITERIA:
        if name in is_given and "of" not in is_given:
            steps = {"every_n": "every_n_steps", "at": "at_step"}[name]
            raise ValueError(f"{name}={values[name]}: add of=, a counter's name, or use {steps}=")
    if values["per_epoch"] and values["per_launch"]:
        raise ValueError("per_launch=True: step numbers count per epoch already; pass one of them")


def _condition(value: Any) -> Callable[[LoopState], object] | None:
    if value is not None and not callable(value):
        raise TypeError(
            f"condition_function={checks.shown(value)}: pass a callable that takes a LoopState, or "
            "name the criterion, such as every_n_steps="
        )
    return value  # type: ignore[no-any-return]


def checked_counter(name: str, value: object) -> str:
    """Return the name of a counter.

    Raises:
        TypeError: it is no str.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={checks.shown(value)}: pass a str, the name of a counter")
    return value


def _name(name: str, value: Any) -> Hashable:
    is_event = isinstance(value, Event) and not isinstance(value, Member)
    if is_event or not isinstance(value, Hashable):
        raise TypeError(
            f"{name}={checks.shown(value)}: pass the name of an event, or a member of LoopEvents"
        )
    return value


def _checked(name: str, value: object, check: Callable[[str, object], Any]) -> Any:
    return None if value is None else check(name, value)


def _points(name: str, value: object, check: Callable[[str, object], checks.Number]) -> Any:
    return None if value is None else checks.points(name, value, check)


def _step(name: str, value: object) -> int:
    return checks.count(name, value, 0)


def _time(name: str, value: object) -> float:
    return checks.seconds(name, value, zero=True)


def _timestamp(name: str, value: Any) -> float:
    """Return a moment as seconds since 1970 (Unix time)."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        return checks.seconds(name, value.timestamp(), zero=True)
    if checks.real(value) is None:
        raise TypeError(
            f"{name}={checks.shown(value)}: pass seconds as time.time() returns, or a datetime "
            "with a time zone"
        )
    return checks.seconds(name, value, zero=True)
