"""Signals that ask a run to end: handlers for the time that its iterators live."""

from __future__ import annotations

import os
import signal
import threading

from . import checks
from .errors import warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType
    from typing import Any, SupportsIndex


class Signals:
    """The handlers of a run, which are there as long as anybody holds them.

    The first of each signal calls `ask` with its name and puts back what was there before, so that
    a second one does what it did without dloop.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...], ask: Callable[[str], object]) -> None:
        self._numbers = numbers
        self._ask = ask
        self._previous: dict[int, Any] = {}
        self._holds = 0

    def hold(self) -> Hold | None:
        """Set the handlers, until what is returned is gone; nothing outside the main thread."""
        if not self._numbers:
            return None
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(each.name for each in self._numbers)
            warn(f"signals={names}: only the main thread can be asked by signals; nothing is set")
            return None
        hold = Hold(self)
        if not self._holds:
            for number in self._numbers:
                self._previous[number] = signal.signal(number, self._handle)
            _active.append(self)
        self._holds += 1
        return hold

    def let_go(self) -> None:
        """Put back the handlers that were there before, when nobody holds these any more."""
        self._holds -= 1
        if not self._holds:
            self.put_back()

    def put_back(self) -> None:
        """Put back the handlers that were there before."""
        for number in list(self._previous):
            self._put_back(number)
        if self in _active:
            _active.remove(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._put_back(number)
        self._ask(signal.Signals(number).name)
        if isinstance(getattr(previous, "__self__", None), Signals):  # of a loop around this one
            previous(number, frame)

    def _put_back(self, number: int) -> Any:
        previous = self._previous.pop(number, None)
        ours = signal.getsignal(number) == self._handle
        if ours and threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        return previous


class Hold:
    """What an iterator has as long as it lives."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __del__(self) -> None:
        self._signals.let_go()


_active: list[Signals] = []
_masks: list[set[signal.Signals | int]] = []


def _before_fork() -> None:
    # Python drops the signals that reach a child before it is set up: they have to wait
    numbers = {number for each in _active for number in each._numbers}
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, numbers))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:  # pragma: no cover (nobody measures in the child)
    asked_by_terminal = any(signal.SIGINT in each._previous for each in _active)
    for each in reversed(_active):
        each.put_back()
    if asked_by_terminal:
        _leave_first_to_parent(signal.SIGINT)
    _after_fork()


def _leave_first_to_parent(number: int) -> None:  # pragma: no cover (the same)
    # A terminal sends Ctrl-C to all of its processes, but the last step still takes a batch
    previous = signal.getsignal(number)
    if callable(previous):
        signal.signal(number, lambda number, _frame: signal.signal(number, previous))


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows has no forks)
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )


def numbers(given: Iterable[SupportsIndex]) -> tuple[signal.Signals, ...]:
    """The argument `signals`, checked.

    Raises:
        TypeError: it is no collection of signals.
        ValueError: this system has no such signal, or it cannot be handled.
    """
    if not checks.is_collection(given):
        raise TypeError(f"signals={checks.shown(given)}: pass a collection, such as (SIGTERM,)")
    found = []
    for each in given:
        number = checks.count("signals", each)
        try:
            found.append(signal.Signals(number))
        except ValueError:
            raise ValueError(
                f"signals={checks.shown(given)}: there is no signal {number}"
            ) from None
        if found[-1].name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"signals={checks.shown(given)}: {found[-1].name} cannot be handled")
    if len(set(found)) < len(found):
        raise ValueError(f"signals={checks.shown(given)}: pass each signal once")
    return tuple(found)
