"""Checks of arguments: numbers of steps, durations, points, flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from difflib import get_close_matches
from operator import index
from types import FunctionType
from typing import TypeGuard, TypeVar

from .errors import not_stop

Number = TypeVar("Number", int, float)

MOST = 2**62
"""The greatest number of steps, and of nanoseconds: the sum of two fits into 64 bits."""
SECOND = 10**9
"""Nanoseconds."""


def shown(value: object) -> str:
    """Return the repr of `value` for a message, at most 100 characters; of a table, its type."""
    try:
        text = repr(value)
    except Exception:  # a broken __repr__ must not hide what the message is about
        text = object.__repr__(value)
    if "\n" in text:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 100 else text[:97] + "..."


def count(name: str, value: object, least: int = 1) -> int:
    """Return the whole number `value`, at least `least`.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is out of range.
    """
    try:
        number = None if _is_bool(value) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}={shown(value)}: pass a whole number from {least} to 2**62")
    if not least <= number <= MOST:
        raise ValueError(f"{name}={shown(value)}: pass a whole number from {least} to 2**62")
    return number


def epochs(name: str, value: object) -> float:
    """Return a number of epochs: a whole number as an int, or a fraction as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    is_whole = hasattr(type(value), "__index__") and not _is_bool(value)
    number = index(value) if is_whole else real(value)  # type: ignore[arg-type]
    expected = "pass a number of epochs from 0.000001 to 2**62"
    if number is None:
        raise TypeError(f"{name}={shown(value)}: {expected}")
    if not 1e-6 <= number <= MOST:
        raise ValueError(f"{name}={shown(value)}: {expected}")
    return int(number) if number == int(number) else number


def seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Return a duration in seconds, above 0; a timedelta is converted.

    Raises:
        TypeError: it is neither a number nor a timedelta.
        ValueError: it is out of range.
    """
    number = value.total_seconds() if isinstance(value, timedelta) else real(value)
    expected = f"pass a finite number of seconds{'' if zero else ' above 0'}, at most 2**62 ns"
    if number is None:
        raise TypeError(f"{name}={shown(value)}: {expected}, or a timedelta")
    if not (0 <= number <= MOST and (number or zero) and nanoseconds(number) <= MOST):
        raise ValueError(f"{name}={shown(value)}: {expected}")
    return number


def nanoseconds(seconds: float) -> int:
    """Return seconds as whole nanoseconds, rounded to the nearest."""
    return seconds * SECOND if isinstance(seconds, int) else round(seconds * SECOND)


def points(
    name: str, value: object, check: Callable[[str, object], Number]
) -> Number | tuple[Number, ...]:
    """Return one checked point, or a collection of them as a sorted tuple without repeats.

    Raises:
        TypeError: it is neither a point nor a collection of points.
        ValueError: a point is out of range, or the collection is empty.
    """
    if not is_collection(value):
        return check(name, value)
    several = sorted({check(name, each) for each in value})
    if not several:
        raise ValueError(f"{name}={shown(value)}: pass at least one number, or None")
    return several[0] if len(several) == 1 else tuple(several)


def sizes(name: str, value: object) -> int | tuple[int, ...]:
    """Return the greatest length of a list, or all lengths that it may have, the greatest first.

    Raises:
        TypeError: it is neither a number nor a collection of numbers.
        ValueError: a size is out of range, or 1 is not in the collection.
    """
    if not is_collection(value):
        return count(name, value)
    several = {count(name, each) for each in value}
    if 1 not in several:
        raise ValueError(f"{name}={shown(value)}: add 1, so that lists of these sizes fit any run")
    return tuple(sorted(several, reverse=True))


def flag(name: str, value: object) -> bool:
    """Return a bool.

    Raises:
        TypeError: it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: pass True or False")
    return value


def in_nanoseconds(clock: Callable[[], float]) -> Callable[[], int]:
    """Return a clock in nanoseconds that reads the user's `clock` and never goes backwards.

    It raises TypeError or ValueError if `clock` returns no usable number.
    """
    latest = -MOST

    def tick() -> int:
        nonlocal latest
        try:
            value = clock()
        except StopIteration as exception:
            raise not_stop(exception) from exception
        number = real(value)
        if number is None:
            raise TypeError(f"clock() returned {shown(value)}: return a number of seconds")
        if not -MOST < number < MOST or not -MOST < nanoseconds(number) < MOST:
            raise ValueError(f"clock() returned {shown(value)}: return a finite number of seconds")
        latest = max(latest, nanoseconds(number))
        return latest

    return tick


def refuse_unknown(function: FunctionType, given: Iterable[str], others: Mapping[str, str]) -> None:
    """Refuse keywords that a constructor does not have, and name those that were meant.

    Args:
        function: the `__init__` of the class.
        given: the keywords of a call.
        others: names from other libraries, and the arguments that they mean.

    Raises:
        TypeError: a keyword is unknown.
    """
    code = function.__code__
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]  # without self
    for name in given:
        if name not in known:
            near = [others[name]] if name in others else get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}=?" if near else ""
            raise TypeError(f"{name}= is no argument{hint}")


def is_collection(value: object) -> TypeGuard[Iterable[object]]:
    """Return whether `value` is several values: an iterable that is not a text or a scalar."""
    iterates = any("__iter__" in vars(kind) for kind in type(value).__mro__)  # not an Enum member
    if isinstance(value, (str, bytes)) or not iterates:
        return False
    return getattr(value, "ndim", None) != 0  # a NumPy array that holds one number


def real(value: object) -> float | None:
    """Return a number as an int or a float; None if it is not a number."""
    if _is_bool(value) or not hasattr(type(value), "__float__"):
        return None
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _is_bool(value: object) -> bool:
    return type(value).__name__ in ("bool", "bool_", "bool8")  # NumPy's, too
