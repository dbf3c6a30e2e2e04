"""Events in words."""

from __future__ import annotations

from . import checks
from .events import CRITERIA, Event, LoopEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from typing import Any

MOST_POINTS = 3
"""How many points of a collection are named."""

MEMBERS = {
    "EPOCH_END": "at the end of every epoch",
    "TRAINING_END": "at the end of training",
    "INTERRUPT": "on an interrupt",
    "EXCEPTION": "on an exception",
}
COUNTED_OTHERWISE = (
    ("per_epoch", ("every_n_steps", "at_step")),
    ("per_launch", ("every_n_steps", "at_step", "every_n_seconds", "at_time")),
)


def title(name: Hashable) -> str:
    """The name of an event, in one line."""
    if isinstance(name, LoopEvents):
        return name.name
    return name if isinstance(name, str) and name.isprintable() and name.strip() else repr(name)


def of_parts(parts: Sequence[Event | LoopEvents]) -> str:
    """An event in words, such as "every 100 steps or at the end of training"."""
    return " or ".join([of_part(part, len(parts) > 1) for part in parts])


def of_part(part: Event | LoopEvents, is_joined: bool = False) -> str:
    """One Event, or a member of LoopEvents, in words."""
    if isinstance(part, LoopEvents):
        return MEMBERS[part.name]
    texts = [
        _criterion(part, name, getattr(part, name))
        for name in CRITERIA
        if getattr(part, name) is not None
    ]
    if not texts:
        return "off"
    window = [f"from step {part.from_step:,}"] if part.from_step else []
    if part.until_step is not None:
        window.append(f"before step {part.until_step:,}")
    text = " or ".join(texts)
    if not window:
        return text
    return f"({text}, {' and '.join(window)})" if is_joined else f"{text}, {' and '.join(window)}"


def of_parameter(part: Event | LoopEvents, name: str) -> str:
    """A criterion as it is written, with what it counts: `every_n_steps=100, per_epoch=True`."""
    if isinstance(part, LoopEvents):
        return repr(part)
    if name == "condition_function":
        return name
    text = f"{name}={checks.shown(getattr(part, name))}"
    for modifier, criteria in COUNTED_OTHERWISE:
        if getattr(part, modifier) and name in criteria:
            text += f", {modifier}=True"
    return text


def _criterion(event: Event, name: str, value: Any) -> str:
    if name == "condition_function":
        function = getattr(value, "__name__", type(value).__name__)
        return "when its condition holds" if function == "<lambda>" else f"when {function}() holds"
    if name == "every_n_epochs":
        return f"at the end of every {_every(value, 'epoch')}"
    if name == "at_epoch":
        return f"at the end of {_points('epoch', value)}"
    if name == "at_timestamp":
        from datetime import datetime

        moments = value if isinstance(value, tuple) else (value,)
        shown = [
            datetime.fromtimestamp(moment).astimezone().isoformat(" ", "seconds")
            for moment in moments
        ]
        return f"at {listed(shown)}"
    if name == "every_n_steps":
        text = f"every {_every(value, 'step')}"
    elif name == "at_step":
        text = f"at {_points('step', value)}"
    elif name == "every_n_seconds":
        text = f"every {value:.15g} s"
    else:
        text = f"at {listed([f'{each:.15g} s' for each in several(value)])}"
    if event.per_epoch and name in ("every_n_steps", "at_step"):
        text += " of each epoch"
    elif event.per_launch:
        text += " of this launch"
    if name == "every_n_steps" and event.first_at_step is not None:
        text += f", first at step {event.first_at_step:,}"
    return text


def several(points: Any) -> tuple[Any, ...]:
    """The points of a criterion, which may be one alone."""
    return points if isinstance(points, tuple) else (points,)


def counted(number: int, noun: str) -> str:
    """A number of things: "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _every(period: int, noun: str) -> str:
    return noun if period == 1 else counted(period, noun)


def _points(noun: str, points: Any) -> str:
    numbers = [f"{number:,}" for number in several(points)]
    return f"{noun if len(numbers) == 1 else noun + 's'} {listed(numbers)}"


def listed(texts: list[str]) -> str:
    """Texts in a list: "a", "a and b", "a, b, c and 5 more"."""
    shown, more = texts, len(texts) - MOST_POINTS
    if more > 1:
        shown = [*texts[:MOST_POINTS], f"{more} more"]
    *firsts, last = shown
    return f"{', '.join(firsts)} and {last}" if firsts else last
