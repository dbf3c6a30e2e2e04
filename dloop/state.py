"""A run's state: as plain values, in and out of a file."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager, suppress
from enum import Enum

from . import _backend, checks
from .errors import StateError, warn
from .events import Event, LoopEvents

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows, where a file that is open is not replaced)
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from typing import Any

    from ._core import LoopState
    from .events import BaseEvent

VERSION = 1


class Position:
    """Where a run is between two steps, and what its triggers remember.

    Attributes:
        epoch: the epoch of the last step that is done.
        epoch_steps: the steps of that epoch that are done.
        steps: the steps that are done in all.
        epoch_end: whether that epoch is complete.
        elapsed: training time in nanoseconds.
        out_of_time: whether the last step that is done was the last for `max_seconds`.
        plan: what the run was made of; see `described`.
        timers: by name of event, for each of its timers its kind and when it was last due.
        windows: by name of event, the last step at which it was due; -1 if there was none.
        loader: the dataloader's own state, see `source.Source`.
        batches_per_step: how many batches a step takes, where that is a list of them.
        asked: names of events whose conditions held, and on which processes have yet to agree;
            TRAINING_END for `stop_when`.
    """

    epoch: int
    epoch_steps: int
    steps: int
    epoch_end: bool
    elapsed: int
    out_of_time: bool
    plan: dict[str, Any]
    timers: dict[Any, list[list[Any]]]
    windows: dict[Any, int]
    loader: dict[str, Any] | None
    batches_per_step: int | None
    asked: list[Any]

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def start_position(steps: int, epoch: int, epoch_steps: int, epoch_end: bool) -> Position:
    """The position of a run that begins as one that has done so many steps."""
    return Position(
        epoch=epoch,
        epoch_steps=epoch_steps,
        steps=steps,
        epoch_end=epoch_end,
        elapsed=0,
        out_of_time=False,
        plan={},
        timers={},
        windows=dict.fromkeys(LoopEvents, steps - 1),
        loader=None,
        batches_per_step=None,
        asked=[],
    )


def as_dict(position: Position, names: list[Hashable]) -> dict[str, Any]:
    """The position in plain values; `names` are those of the events, in their order."""
    keys: dict[Hashable, Any] = {}
    for place, name in enumerate(names):
        keys[name] = key_of(name, place)
        if keys[name][0] == "position":
            warn(
                f"event {checks.shown(name)}: a state cannot hold a name of this kind; the event "
                f"goes by its position, {place}"
            )
    own = [*names, *LoopEvents]
    keys.update({member: _tagged(member) for member in LoopEvents})
    return {
        "version": VERSION,
        "epoch": position.epoch,
        "epoch_steps": position.epoch_steps,
        "steps": position.steps,
        "epoch_end": position.epoch_end,
        "elapsed": position.elapsed,
        "out_of_time": position.out_of_time,
        "plan": {
            **position.plan,
            "events": [[keys[name], position.plan["events"][name]] for name in names],
        },
        "timers": [[keys.get(name), timers] for name, timers in position.timers.items()],
        "windows": [
            [keys[name], position.windows[name]] for name in own if name in position.windows
        ],
        "loader": position.loader,
        "batches_per_step": position.batches_per_step,
        "asked": [keys[name] for name in position.asked],
    }


def from_dict(state: object, names: list[Hashable]) -> Position:
    """The position that `as_dict` gave.

    Raises:
        StateError: it is something else, damaged, or of a later version.
    """
    if not isinstance(state, dict) or "version" not in state:
        raise StateError("this is no state of a dloop run")
    if state["version"] != VERSION:
        raise StateError(
            f"this state is of version {checks.shown(state['version'])}; this dloop reads {VERSION}"
        )
    places = dict(enumerate(names))
    try:
        position = Position(
            epoch=_count(state["epoch"]),
            epoch_steps=_count(state["epoch_steps"]),
            steps=_count(state["steps"]),
            epoch_end=_flag(state["epoch_end"]),
            elapsed=_count(state["elapsed"]),
            out_of_time=_flag(state["out_of_time"]),
            plan={
                **state["plan"],
                "events": {_named(key, places): each for key, each in state["plan"]["events"]},
            },
            timers={
                None if key is None else _named(key, places): [
                    [str(kind), _count(last, -1)] for kind, last in timers
                ]
                for key, timers in state["timers"]
            },
            windows={_named(key, places): _count(last, -1) for key, last in state["windows"]},
            loader=_loader(state["loader"]),
            batches_per_step=_size(state.get("batches_per_step")),
            asked=[_named(key, places) for key in state.get("asked", [])],
        )
        kinds = _timer_kinds(position.plan)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"this state of a dloop run is damaged ({checks.shown(error)})") from error
    if (
        position.epoch + position.epoch_steps > position.steps
        or kinds != {name: [kind for kind, _ in each] for name, each in position.timers.items()}
        or position.elapsed
        < max([last for each in position.timers.values() for _, last in each], default=-1)
        or (position.steps > 0) < position.epoch_end
        or max(position.windows.values(), default=-1) >= position.steps
        or (
            position.loader is not None
            and position.loader["rest"] == 0
            and position.loader["at"]
            > (0 if position.epoch_end else position.epoch_steps * (position.batches_per_step or 1))
        )
    ):
        raise StateError(
            "this state of a dloop run is damaged (its counters contradict each other)"
        )
    return position


def _timer_kinds(plan: dict[str, Any]) -> dict[Any, list[str]]:
    """The kinds of timers that a run of this plan has, by name of event; None for `stop_when`."""
    kinds: dict[Any, list[str]] = {}
    for name, parts in (*plan["events"].items(), (None, plan["stop_when"] or ())):
        for part in parts:
            given = [] if isinstance(part, str) else list(part)
            for criterion, kind in (("every_n_seconds", "every"), ("at_time", "at")):
                if criterion in given:
                    kinds.setdefault(name, []).append(kind)
    return kinds


def loop_state(
    epoch: int,
    global_step: int,
    epoch_step: int,
    epoch_end: bool,
    training_end: bool,
    elapsed: int,
) -> LoopState:
    """The LoopState that was copied or pickled; its time is known."""
    core = _backend.core
    clock = core.Clock(None, 0)
    return core.LoopState(epoch, global_step, epoch_step, epoch_end, training_end, elapsed, clock)


def described(event: BaseEvent) -> list[Any]:
    """What an event is made of, in plain values; of a condition only that there is one."""
    parts: list[Any] = []
    for part in event.parts:
        if isinstance(part, Event):
            values = part.given()
            values.pop("condition_function", None)
            if "at_timestamp" in values:  # it may be another in each launch
                values["at_timestamp"] = True
            parts.append({**values, "condition": part.condition_function is not None})
        else:
            parts.append(part.name)
    return json.loads(json.dumps(parts))  # type: ignore[no-any-return]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What is different in two plans, a phrase each."""
    found = []
    before, now = old.get("events", {}), new["events"]
    for title, names in (
        ("added", [name for name in now if name not in before]),
        ("removed", [name for name in before if name not in now]),
        ("changed", [name for name in now if name in before and before[name] != now[name]]),
    ):
        if names:
            found.append(f"events {title}: {', '.join(map(checks.shown, names))}")
    for key in new:
        if key == "events" or key not in old or (key == "length" and None in (old[key], new[key])):
            continue
        if old[key] != new[key]:
            found.append(f"{key}: {checks.shown(old[key])} before, {checks.shown(new[key])} now")
    return found


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Put `state` into the file at once: it is there as a whole, or not at all.

    Where several processes write the same file, each waits for the one before.

    Raises:
        StateError: JSON cannot hold it.
        OSError: the file could not be written; what was there before is still there.
    """
    text = json.dumps(_exact(state, "state"), allow_nan=False)
    path = os.path.realpath(path)  # where it is a symbolic link, that stays
    with _draft_of(path) as draft:
        try:
            with open(draft, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    _sync_folder(os.path.dirname(path))


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path beside which `write` could have no draft.

    Raises:
        OSError: its name is too long.
    """
    folder, name = os.path.split(os.path.realpath(path))
    try:
        os.lstat(os.path.join(folder, f".{name}.9.draft"))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(
                error.errno,
                "state_file=: this name is too long for the draft beside it, which has some "
                "letters more; pass a shorter one",
                os.fspath(path),
            ) from None


_written: list[str] = []  # the files that this process is about to write


@contextmanager
def _draft_of(path: str) -> Iterator[str]:
    """The name of a draft that nobody else writes meanwhile."""
    folder, name = os.path.split(path)
    # a signal's handler may write the same file in the midst of a write, and cannot wait for it
    nested = _written.count(path)
    draft = os.path.join(folder, f".{name}.{nested}.draft" if nested else f".{name}.draft")
    _written.append(path)
    try:
        with _only_writer(draft):
            yield draft
    finally:
        _written.remove(path)


@contextmanager
def _only_writer(draft: str) -> Iterator[None]:
    """Let other processes wait that are to write this draft, until it is put in its place."""
    if fcntl is None:  # pragma: no cover
        yield
        return
    while True:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # there are file systems without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_file_of(descriptor, draft):  # and not what another writer has put in its place
                yield
                return
        finally:
            os.close(descriptor)


def _is_file_of(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def read(path: str | os.PathLike[str]) -> object:
    """What `write` has put into the file.

    Raises:
        StateError: it is something else, or damaged.
        OSError: it could not be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"this is no state of a dloop run ({error})") from error


def _sync_folder(folder: str) -> None:
    if os.name != "posix":  # pragma: no cover (Windows opens no folders)
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exact(value: Any, place: str) -> Any:
    """`value`, if JSON gives back the very same.

    Raises:
        StateError: it does not; with the place of what it cannot hold.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and value - value == 0:
        return value
    if type(value) is list:
        return [_exact(each, f"{place}[{number}]") for number, each in enumerate(value)]
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise StateError(f"{place}: JSON cannot hold the key {checks.shown(key)}")
        return {key: _exact(each, f"{place}[{key!r}]") for key, each in value.items()}
    raise StateError(
        f"{place}={checks.shown(value)}: JSON cannot hold this; put "
        "state_dict() into your own checkpoint instead"
    )


def _tagged(name: Any) -> list[Any] | None:
    """A name as a pair of its kind and its value; None where that is not possible."""
    if name is None or type(name) in (str, int, bool):
        return [type(name).__name__, name]
    if isinstance(name, LoopEvents):
        return ["LoopEvents", name.name]
    if isinstance(name, Enum):
        return ["Enum", [type(name).__module__, type(name).__qualname__, name.name]]
    if type(name) is tuple:
        parts = [_tagged(each) for each in name]
        return None if None in parts else ["tuple", parts]
    return None


def key_of(name: Hashable, place: int) -> list[Any]:
    """What stands for the name of an event in a state; its place, where it is of another kind."""
    return _tagged(name) or ["position", place]


def _named(tagged: Any, places: dict[int, Hashable]) -> Any:
    kind, value = tagged
    if kind in ("str", "int", "bool", "NoneType"):
        if type(value).__name__ != kind:
            raise ValueError(tagged)
        return value
    if kind == "LoopEvents":
        return {member.name: member for member in LoopEvents}[value]
    if kind == "tuple":
        return tuple([_named(each, places) for each in value])
    if kind == "position":
        return places.get(value, ("position", value))
    if kind != "Enum":
        raise ValueError(tagged)
    module, qualname, member = value
    for name in _flat(places.values()):  # nothing is imported for the sake of a state
        if isinstance(name, Enum) and _tagged(name) == ["Enum", [module, qualname, member]]:
            return name
    return "Enum", str(module), str(qualname), str(member)


def _flat(names: Any) -> Any:
    for name in names:
        yield name
        if type(name) is tuple:
            yield from _flat(name)


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= checks.MOST:
        raise ValueError(value)
    return value


def _size(value: object) -> int | None:
    return None if value is None else _count(value, 1)


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(value)
    return value


def _loader(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    return {
        "state": value["state"],
        "at": _count(value["at"]),
        "whole": _flag(value["whole"]),
        "cut": _flag(value["cut"]),
        "rest": _count(value["rest"]),
    }
