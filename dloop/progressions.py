"""Sets of steps that repeat: counted and looked up by arithmetic, and never gone through."""

from __future__ import annotations

from bisect import bisect_left
from collections import namedtuple
from math import gcd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NamedTuple, TypeAlias

    Steps: TypeAlias = range | tuple[int, ...]
    """Steps in rising order: an arithmetic progression, or points."""

    class PatternFields(NamedTuple):
        """The fields of a Pattern."""

        steps: range
        places: Steps | None
        epoch_start: int
        epoch_length: int
else:
    # typing would take longer to import than all of dloop
    PatternFields = namedtuple("PatternFields", "steps places epoch_start epoch_length")


class Pattern(PatternFields):
    """The steps of a progression, or those of them that have certain places in their epochs.

    Attributes:
        steps: a progression of global steps.
        places: the steps within each epoch, counted from its start, that belong to it; None for
            all. All of them are below `epoch_length`.
        epoch_start: a step that is the first of an epoch; none of `steps` is before it.
        epoch_length: the steps of every epoch.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return bool(self.steps) and (self.places is None or bool(self.places))

    def first_from(self, step: int) -> int | None:
        """The first of its steps at or after `step`. With `places`, `steps` must have no gaps."""
        if self.places is None:
            return _first_from(self.steps, step)
        epoch, place = divmod(max(step, self.steps.start) - self.epoch_start, self.epoch_length)
        next_place = _first_from(self.places, place)
        if next_place is None:
            epoch, next_place = epoch + 1, self.places[0]
        found = self.epoch_start + epoch * self.epoch_length + next_place
        return found if found in self.steps else None

    def last_before(self, step: int) -> int | None:
        """The last of its steps before `step`. With `places`, `steps` must have no gaps."""
        if self.places is None:
            return _last_before(self.steps, step)
        latest = min(step, self.steps.stop) - 1
        epoch, place = divmod(latest - self.epoch_start, self.epoch_length)
        last_place = _last_before(self.places, place + 1)
        if last_place is None:
            epoch, last_place = epoch - 1, self.places[-1]
        found = self.epoch_start + epoch * self.epoch_length + last_place
        return found if found in self.steps else None

    def has(self, step: int) -> bool:
        """Whether `step` is one of its steps."""
        if step not in self.steps or self.places is None:
            return step in self.steps
        return (step - self.epoch_start) % self.epoch_length in self.places

    def shared_with(self, other: Pattern) -> Pattern:
        """The steps that both have. The epochs of both are the same."""
        places = self.places
        if places is None:
            places = other.places
        elif other.places is not None:
            places = _shared(places, other.places)
        steps = _shared_range(self.steps, other.steps)
        return Pattern(steps, places, self.epoch_start, self.epoch_length)

    def size(self) -> int:
        """How many steps it has."""
        if not self or self.places is None:
            return _size(self.steps)
        if isinstance(self.places, tuple):
            return sum([_size(self._at(range(place, place + 1))) for place in self.places])
        if self.steps.step == 1:  # no other condition: whole epochs are alike
            return self._before(self.steps.stop) - self._before(self.steps.start)
        first = (self.steps[0] - self.epoch_start) // self.epoch_length
        last = (self.steps[-1] - self.epoch_start) // self.epoch_length
        found = self._in_epoch(first, self.places)
        if last > first:
            found += self._in_epoch(last, self.places)
            found += self._in_whole_epochs(first + 1, last, self.places)
        return found

    def _at(self, place: range) -> range:
        """The steps at one place of each epoch."""
        each = range(self.epoch_start + place.start, self.steps.stop, self.epoch_length)
        return _shared_range(self.steps, each)

    def _before(self, step: int) -> int:
        """How many steps at the `places` there are from `epoch_start` to before `step`."""
        assert self.places is not None
        epochs, rest = divmod(step - self.epoch_start, self.epoch_length)
        return epochs * len(self.places) + bisect_left(self.places, rest)

    def _in_epoch(self, epoch: int, places: range) -> int:
        start = self.epoch_start + epoch * self.epoch_length
        shifted = range(start + places.start, start + places.stop, places.step)
        return _size(_shared_range(self.steps, shifted))

    def _in_whole_epochs(self, begin: int, end: int, places: range) -> int:
        """How many there are in the epochs from `begin` to before `end`, all within `steps`.

        These are the pairs of an epoch e and a number k, below the number of places, with
        e * epoch_length + k * places.step = rest, modulo the period of `steps`.
        """
        period = self.steps.step
        rest = self.steps[0] - self.epoch_start - places[0]
        divisor = gcd(places.step, period)
        # Only every so many epochs have a solution
        epochs = _shared_range(
            range(begin, end), _solutions(self.epoch_length, rest, divisor, begin, end)
        )
        if not epochs:
            return 0
        # k has to be first + change * t, modulo the reduced period, in the t-th of these epochs
        period //= divisor
        inverse = pow(places.step // divisor, -1, period)
        first = (rest - epochs[0] * self.epoch_length) // divisor * inverse
        change = -(epochs.step * self.epoch_length // divisor) * inverse
        everywhere, more = divmod(_size(places), period)
        below = _floor_sum(len(epochs), period, change, first)
        below -= _floor_sum(len(epochs), period, change, first - more)
        return len(epochs) * everywhere + below


class Union:
    """The steps that any of several patterns has, or that are among the points.

    Args:
        patterns: those without steps are left out.
        points: further steps.
    """

    def __init__(self, patterns: Iterable[Pattern], points: Iterable[int]) -> None:
        self.patterns = tuple(dict.fromkeys(filter(None, patterns)))
        self.points = tuple(sorted({*points}))

    def __bool__(self) -> bool:
        return bool(self.points) or any(
            pattern.first_from(pattern.steps.start) is not None for pattern in self.patterns
        )

    def first_from(self, step: int) -> int | None:
        """The first of its steps at or after `step`."""
        found = [pattern.first_from(step) for pattern in self.patterns]
        found.append(_first_from(self.points, step))
        return min([each for each in found if each is not None], default=None)

    def last_before(self, step: int) -> int | None:
        """The last of its steps before `step`."""
        found = [pattern.last_before(step) for pattern in self.patterns]
        found.append(_last_before(self.points, step))
        return max([each for each in found if each is not None], default=None)

    def from_on(self, step: int) -> Iterator[int]:
        """Its steps at or after `step`, in their order."""
        found = self.first_from(step)
        while found is not None:
            yield found
            found = self.first_from(found + 1)

    def size(self, most_terms: int) -> int | None:
        """How many steps it has, by inclusion and exclusion; None if that takes too many terms.

        Terms that are the same sets of steps count as one, so that periods of which one divides
        the other need few.
        """
        terms: dict[Pattern, int] = {}
        for pattern in self.patterns:
            new = {pattern: 1}
            for other, times in terms.items():
                shared = pattern.shared_with(other)
                if shared:
                    new[shared] = new.get(shared, 0) - times
            for each, times in new.items():
                terms[each] = terms.get(each, 0) + times
                if not terms[each]:
                    del terms[each]
            if len(terms) > most_terms:
                return None
        alone = [
            point
            for point in self.points
            if not any(pattern.has(point) for pattern in self.patterns)
        ]
        return len(alone) + sum([times * pattern.size() for pattern, times in terms.items()])


def progression(first: int, period: int, start: int, stop: int) -> range:
    """The steps `first`, `first + period` and so on that are from `start` on and before `stop`."""
    if first < start:
        first += -((first - start) // period) * period
    return range(first, max(first, stop), period)


def _size(steps: range) -> int:
    """The length; `len()` refuses those beyond a machine's word."""
    return max(0, -((steps.start - steps.stop) // steps.step))


def _first_from(steps: Steps, step: int) -> int | None:
    place = bisect_left(steps, step)
    return steps[place] if place < len(steps) else None


def _last_before(steps: Steps, step: int) -> int | None:
    place = bisect_left(steps, step)
    return steps[place - 1] if place else None


def _shared(a: Steps, b: Steps) -> Steps:
    if isinstance(a, range) and isinstance(b, range):
        return _shared_range(a, b)
    points, other = (a, b) if isinstance(a, tuple) else (b, a)
    return tuple([point for point in points if point in other])


def _shared_range(a: range, b: range) -> range:
    """The steps that both progressions have: the Chinese remainder theorem."""
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    divisor = gcd(a.step, b.step)
    between, rest = divmod(b.start - a.start, divisor)
    if rest:
        return range(0)
    period = b.step // divisor
    times = between * pow(a.step // divisor, -1, period) % period
    return progression(a.start + times * a.step, a.step * period, start, stop)


def _solutions(factor: int, rest: int, modulus: int, begin: int, end: int) -> range:
    """The numbers x from `begin` to before `end` with factor * x = rest, modulo `modulus`."""
    divisor = gcd(factor, modulus)
    if rest % divisor:
        return range(0)
    modulus //= divisor
    first = rest // divisor * pow(factor // divisor, -1, modulus) % modulus
    return progression(first, modulus, begin, end)


def _floor_sum(count: int, divisor: int, factor: int, first: int) -> int:
    """The sum of (first + factor * t) // divisor for t from 0 to before `count`, as Euclid did."""
    total = 0
    while count:
        times, factor = divmod(factor, divisor)
        total += times * count * (count - 1) // 2
        times, first = divmod(first, divisor)
        total += times * count
        # Now each term is below `count`: count the lattice points by their other coordinate
        highest = factor * count + first
        count, first = divmod(highest, divisor)
        divisor, factor = factor, divisor
    return total
