"""Signals that request a run to stop; their handlers are set while the run is iterated."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import checks
from .errors import warn

Handler = Any
"""What `signal.getsignal` returns: a callable, a constant, or None for one not set by Python."""


class StopSignals:
    """The signals that request one run to stop.

    The first signal requests every run that handles it to stop, and restores its handler from
    before dloop; so the same signal again acts as it would without dloop.

    Args:
        numbers: the signals.

    Attributes:
        request: called with a signal's name; None while no handler is set.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...]) -> None:
        self.numbers = numbers
        self.request: Callable[[str], None] | None = None

    def install(self, request: Callable[[str], None]) -> None:
        """Set the handlers until `restore` is called."""
        if not self.numbers:
            return
        if not _in_main_thread():
            names = ", ".join(each.name for each in self.numbers)
            warn(f"signals={names}: only the main thread can handle signals; none is handled here")
            return
        self.restore()
        self.request = request
        for number in self.numbers:
            _handlers[number] = [*_handlers.get(number, []), (self, signal.getsignal(number))]
            signal.signal(number, _handle)

    def restore(self) -> None:
        """Restore the handlers from before."""
        for number in self.numbers:
            _remove(number, self)
        self.request = None


_handlers: dict[int, list[tuple[StopSignals | None, Handler]]] = {}
"""By signal: who handles it, in the order of installation, each with the handler it replaced.

None stands for one that was removed in another thread than the main one, which cannot restore.
"""


def _remove(number: int, signals: StopSignals) -> None:
    if not _in_main_thread():
        _handlers[number] = [
            (None if each is signals else each, replaced)
            for each, replaced in _handlers.get(number, [])
        ]
        return
    kept: list[tuple[StopSignals | None, Handler]] = []
    previous: Handler = _handle
    for each, replaced in _handlers.get(number, []):
        previous = previous if replaced is _handle else replaced
        if each is not signals and each is not None:
            kept.append((each, previous))
            previous = _handle
    _handlers[number] = kept
    _put_back(number, previous)


def _put_back(number: int, previous: Handler) -> None:
    """Replace dloop's handler by the one before, unless somebody else has set another."""
    if previous is not _handle and signal.getsignal(number) is _handle:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _handle(number: int, _frame: FrameType | None) -> None:
    runs = _remove_all(number)
    for each in reversed(runs):
        assert each.request is not None  # its handler is set
        each.request(signal.Signals(number).name)
    if not runs:
        if signal.getsignal(number) is _handle:  # an interrupt struck while it was restored
            signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _remove_all(number: int) -> list[StopSignals]:
    """Restore the handler from before all others; return who handled the signal."""
    removed = _handlers.pop(number, [])
    for _, previous in reversed(removed):
        _put_back(number, previous)
    return [each for each, _ in removed if each is not None]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _after_fork_in_child() -> None:
    """Let the signals act as before dloop in a child, such as a loader's worker.

    SIGINT is ignored there: a terminal sends it to all processes, but the run's last step still
    needs its workers.
    """
    stops_on_ctrl_c = bool(_handlers.get(signal.SIGINT))
    for number in list(_handlers):
        _remove_all(number)
    if stops_on_ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


_masks: list[set[Any]] = []


def _before_fork() -> None:
    # Python drops a signal that reaches the child before it is set up, so it is held until then
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _handlers))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _set_up_child() -> None:
    _after_fork_in_child()
    _after_fork()


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_set_up_child
    )


def checked_signals(given: object) -> tuple[signal.Signals, ...]:
    """Return the argument `signals`, a signal or a collection of them, as a tuple.

    Raises:
        TypeError: it is neither.
        ValueError: this system has no such signal, or it cannot be handled.
    """
    found: dict[signal.Signals, None] = {}
    for each in given if checks.is_collection(given) else (given,):
        if isinstance(each, str):
            raise TypeError(f"signals={each!r}: pass members of signal, such as signal.SIGTERM")
        try:
            number = signal.Signals(checks.count("signals", each))
        except ValueError:
            raise ValueError(f"signals={checks.shown(each)}: there is no such signal") from None
        if number.name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"signals={number.name}: no process can handle it; pass SIGTERM, say")
        found[number] = None
    return tuple(found)
