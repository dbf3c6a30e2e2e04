"""A run's state as plain values, in and out of a file."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from fractions import Fraction
from itertools import count
from typing import Any, NamedTuple

from . import checks
from .errors import StateError

VERSION = 3


class Position(NamedTuple):
    """Where a run is between two steps.

    Attributes:
        epoch: the epoch of the latest step; `epoch_steps`: how many of its steps are done.
        steps: how many steps are done in all.
        epoch_end: whether that epoch is complete; `epoch_len`: its steps, as far as they are known.
        samples_per_step: over all processes, as far as the dataloader tells; 0 before the first.
        elapsed: training time in nanoseconds; `latest_time`: that of the latest step that read it.
        finished: why a resumed run does not train on, or None.
        timers: by event, kind and time of each of its timers, in nanoseconds.
        waits: by event, whether each of its parts with `wait_for` waits; left out if none does.
        counts: the sum of each counter.
        windows: by event, the step at which it fired last.
        loader: the dataloader's own state, as `loader_state.TrackedBatches` describes it.
    """

    epoch: int = 0
    epoch_steps: int = 0
    steps: int = 0
    epoch_end: bool = False
    epoch_len: int | None = None
    samples_per_step: int = 0
    elapsed: int = 0
    latest_time: int = 0
    finished: str | None = None
    timers: dict[str, list[tuple[str, int]]] = {}  # noqa: RUF012 (it is never changed)
    waits: dict[str, list[bool]] = {}  # noqa: RUF012
    counts: dict[str, int] = {}  # noqa: RUF012
    windows: dict[str, int] = {}  # noqa: RUF012
    loader: dict[str, Any] | None = None

    @property
    def epochs(self) -> Fraction | int:
        """How many epochs are done."""
        if self.epoch_end or not self.epoch_len:
            return self.epoch + self.epoch_end
        return self.epoch + Fraction(self.epoch_steps, self.epoch_len)


def as_dict(position: Position) -> dict[str, Any]:
    """Return the position in plain values."""
    timers = {key: [list(timer) for timer in each] for key, each in position.timers.items()}
    return {"version": VERSION, **position._asdict(), "timers": timers}


def from_dict(state: object) -> Position:
    """Return the position that `as_dict` has made a dict of.

    Raises:
        StateError: it is anything else, or damaged.
    """
    if not isinstance(state, dict) or "version" not in state:
        raise StateError("this is not the state of a dloop run")
    if state["version"] != VERSION:
        version = checks.shown(state["version"])
        raise StateError(f"this state has version {version}; this dloop reads version {VERSION}")
    try:
        position = _checked(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"this state is damaged ({checks.shown(error)})") from error
    lasts = [last for timers in position.timers.values() for _, last in timers]
    if (
        position.epoch > position.steps
        or (position.steps > 0) < max(position.epoch_end, position.epoch_steps > 0)
        or max(lasts, default=-1) > position.elapsed
        or max(position.windows.values(), default=-1) >= position.steps
    ):
        raise StateError("this state is damaged (its counters contradict each other)")
    return position


def _checked(state: dict[str, Any]) -> Position:
    loader = state["loader"]
    if loader is not None:
        for name, kind in (("at", int), ("rest", int), ("whole", bool), ("cut", bool)):
            if type(loader[name]) is not kind:
                raise ValueError(f"loader[{name!r}]={checks.shown(loader[name])}")
        loader = {name: loader[name] for name in ("state", "at", "whole", "cut", "rest")}
    finished = state["finished"]
    return Position(
        epoch=_count(state["epoch"]),
        epoch_steps=_count(state["epoch_steps"]),
        steps=_count(state["steps"]),
        epoch_end=checks.flag("epoch_end", state["epoch_end"]),
        epoch_len=None if state["epoch_len"] is None else _count(state["epoch_len"]),
        samples_per_step=_count(state["samples_per_step"]),
        elapsed=_count(state["elapsed"]),
        latest_time=_count(state["latest_time"]),
        finished=None if finished is None else _text(finished),
        timers={
            _text(key): [(_text(kind), _count(last, -1)) for kind, last in timers]
            for key, timers in state["timers"].items()
        },
        waits={
            _text(key): [checks.flag("waits", each) for each in waits]
            for key, waits in state["waits"].items()
        },
        counts={_text(name): _total(total) for name, total in state["counts"].items()},
        windows={_text(key): _count(last, -1) for key, last in state["windows"].items()},
        loader=loader,
    )


def _count(value: object, least: int = 0) -> int:
    return checks.count("number", value, least)


def _total(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def checked_path(path: object) -> str:
    """Return the argument `state_file` as an absolute path.

    Raises:
        TypeError: it is not a path.
        FileNotFoundError: its folder does not exist.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"state_file={checks.shown(path)}: pass a path")
    found = os.path.abspath(os.fsdecode(path))
    folder = os.path.dirname(found)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"state_file={checks.shown(path)}: make the folder {folder} first")
    return found


_drafts: list[str] = []
"""The drafts that are being written."""


def write(path: str, state: dict[str, Any]) -> None:
    """Write a state to a file: whole, or not at all. The file keeps its mode.

    Raises:
        StateError: the state holds what JSON cannot.
        OSError: the file cannot be written, and holds what it held; or the folder cannot be
            synced, so that the file may hold that again after a power failure.
    """
    text = json.dumps(_exact(state, "state"))
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    # A signal's handler may save during a save: each has a draft of its own
    names = (os.path.join(folder, f".{name}.{number}.draft") for number in count())
    draft = next(each for each in names if each not in _drafts)
    _drafts.append(draft)
    try:
        with open(draft, "w", encoding="utf-8") as file:
            with suppress(FileNotFoundError):
                os.chmod(draft, stat.S_IMODE(os.stat(target).st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    finally:
        _drafts.remove(draft)
    if os.name == "posix":  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str) -> object:
    """Return what `write` has put into a file.

    Raises:
        StateError: it is not JSON.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"this is not the state of a dloop run ({error})") from error


def _exact(value: Any, place: str) -> Any:
    """Return `value`, if JSON gives back the very same.

    Raises:
        StateError: it does not; the message says where.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and value - value == 0:  # neither infinite nor nan
        return value
    if type(value) is list:
        return [_exact(each, f"{place}[{number}]") for number, each in enumerate(value)]
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise StateError(f"{place}: JSON cannot hold the key {checks.shown(key)}")
        return {key: _exact(each, f"{place}[{key!r}]") for key, each in value.items()}
    raise StateError(
        f"{place}={checks.shown(value)}: JSON cannot hold this; save state_dict() in your own "
        "checkpoint"
    )
