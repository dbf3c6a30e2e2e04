"""What an argument may be: numbers of steps, seconds and points, checked where they are given."""

from __future__ import annotations

from operator import index

from .errors import not_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import SupportsFloat, TypeGuard, TypeVar

    Number = TypeVar("Number", int, float)

MOST = 2**62
"""The greatest number of steps or epochs, and of nanoseconds: two of them add up in 64 bits."""

SECOND = 10**9
"""Nanoseconds."""


def shown(value: object) -> str:
    """`value` as an error message shows it: its repr in one line of bounded length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the message is about something else; an int of 5000 digits has no repr
        text = object.__repr__(value)
    return text if len(text) <= 100 else text[:97] + "..."


def count(name: str, value: object, least: int = 1, *, off: bool = False) -> int:
    """The whole number `value` of steps, epochs or batches; `off`: None would switch it off.

    Raises:
        TypeError: it is no whole number (nothing with `__index__`, or a bool).
        ValueError: it is below `least` or above 2**62.
    """
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is not None and least <= number <= MOST:
        return number
    error = TypeError if number is None else ValueError
    or_none = "; None switches it off" if off else ""
    raise error(f"{name}={shown(value)}: pass a whole number from {least} to 2**62{or_none}")


def seconds(name: str, value: object, *, zero: bool = False, off: bool = False) -> float:
    """The finite number `value` of seconds, as an int or a float; `off`: None would switch it off.

    Raises:
        TypeError: it is no number (a bool and a str are none).
        ValueError: it is nan or infinite, negative, zero unless `zero`, or above 2**62 ns.
    """
    number = _real(value)
    in_range = number is not None and 0 <= number <= MOST and bool(number or zero)
    if number is not None and in_range and nanoseconds(number) <= MOST:
        return number
    sign = "0 or more" if zero else "above 0"
    error = TypeError if number is None else ValueError
    or_none = "; None switches it off" if off else ""
    raise error(
        f"{name}={shown(value)}: pass a finite number of seconds, {sign}, at most 2**62 ns{or_none}"
    )


def nanoseconds(seconds: float) -> int:
    """`seconds` in whole nanoseconds, to the nearest (half to even)."""
    return seconds * SECOND if isinstance(seconds, int) else round(seconds * SECOND)


def points(
    name: str, value: object, check: Callable[[str, object], Number]
) -> Number | tuple[Number, ...]:
    """`value` as one checked point, or a collection of them as a sorted tuple without repeats.

    Raises:
        TypeError: neither a point nor a collection of points.
        ValueError: a point out of range, or an empty collection.
    """
    if not is_collection(value):
        return check(name, value)
    several = sorted({check(name, each) for each in value})
    if not several:
        raise ValueError(f"{name}={shown(value)}: pass at least one number, or leave {name} out")
    return several[0] if len(several) == 1 else tuple(several)


def sizes(name: str, value: object) -> int | tuple[int, ...]:
    """`value` as a checked greatest size, or a collection of sizes as a tuple from the greatest on.

    Raises:
        TypeError: neither a size nor a collection of sizes.
        ValueError: a size out of range, or a collection without 1.
    """
    if not is_collection(value):
        return count(name, value)
    several = {count(name, each) for each in value}
    if 1 not in several:
        raise ValueError(
            f"{name}={shown(value)}: pass sizes that contain 1, so that they add up to any number"
        )
    return tuple(sorted(several, reverse=True))


def flag(name: str, value: object) -> bool:
    """The bool `value`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: pass True or False")
    return value


def in_nanoseconds(clock: Callable[[], SupportsFloat]) -> Callable[[], int]:
    """The user's `clock`, which returns seconds, as one that returns checked nanoseconds.

    Where `clock` goes backwards, the returned callable stands still. It raises TypeError or
    ValueError when `clock` returns no usable number.
    """
    latest = -MOST

    def tick() -> int:
        nonlocal latest
        try:
            value = clock()
        except StopIteration as exception:
            raise not_stop(exception) from exception
        number = _real(value)
        if number is None or not -MOST < number < MOST or not -MOST < nanoseconds(number) < MOST:
            error = TypeError if number is None else ValueError
            raise error(
                f"clock() returned {shown(value)}: it has to return a finite number of seconds"
            )
        latest = max(latest, nanoseconds(number))
        return latest

    return tick


def is_collection(value: object) -> TypeGuard[Iterable[object]]:
    """Whether `value` is several: it can be gone through, and is no text."""
    iterates = any("__iter__" in vars(kind) for kind in type(value).__mro__)  # no Enum's member
    if isinstance(value, (str, bytes)) or not iterates:
        return False
    return getattr(value, "ndim", None) != 0  # a NumPy array that holds one number


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        return None
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
