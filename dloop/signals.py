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
    """The signals of a run, which are handled as long as anybody holds them.

    The first of each asks all runs that wait for it, and puts back the handler that was there
    before, so that a second one does what it did without dloop.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...], ask: Callable[[str], object]) -> None:
        self.numbers = numbers
        self.ask = ask
        self._holds: set[int] = set()

    def hold(self) -> Hold | None:
        """Wait for the signals, until what is returned is gone; not outside the main thread."""
        if not self.numbers:
            return None
        if not _in_main_thread():
            names = ", ".join(each.name for each in self.numbers)
            warn(f"signals={names}: only the main thread can be asked by signals; nothing is set")
            return None
        hold = Hold(self)
        if not self._holds:
            for number in self.numbers:
                _wait(number, self)
        self._holds.add(id(hold))
        return hold

    def let_go(self, hold: Hold) -> None:
        """Wait no more, when nobody holds these."""
        self._holds.discard(id(hold))
        if not self._holds:
            self.put_back()

    def put_back(self) -> None:
        """Wait no more, and put back the handlers that were there before."""
        self._holds.clear()
        for number in self.numbers:
            _leave(number, self)


class Hold:
    """What an iterator has as long as it lives."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __del__(self) -> None:
        self._signals.let_go(self)


# By signal those who wait for it, the innermost loop last; and with each the handler that was there
# before, which is `_handle` where somebody waited already. Who is None has left in another thread,
# where no handler can be set.
_waiting: dict[int, list[tuple[Signals | None, Any]]] = {}


def _wait(number: int, signals: Signals) -> None:
    # noted first: wherever an interrupt strikes, the handler before can be put back
    _waiting[number] = [*_waiting.get(number, ()), (signals, signal.getsignal(number))]
    signal.signal(number, _handle)


def _leave(number: int, signals: Signals) -> None:
    in_main_thread = _in_main_thread()
    waiting: list[tuple[Signals | None, Any]] = []
    before: Any = _handle
    for who, replaced in _waiting.get(number, ()):
        before = before if replaced is _handle else replaced
        if who is signals or who is None:
            if in_main_thread:
                continue  # the next one has replaced what this one has
            who = None
        waiting.append((who, before))
        before = _handle
    _waiting[number] = waiting
    _set_back(number, before)


def _set_back(number: int, before: Any) -> None:
    """Set the handler `before`, if it is one, in place of dloop's, if that is there."""
    if before is not _handle and signal.getsignal(number) is _handle:
        signal.signal(number, signal.SIG_DFL if before is None else before)


def _handle(number: int, _frame: FrameType | None) -> None:
    waiting = _end(number)
    asked = [who for who in waiting if who is not None]
    for who in reversed(asked):
        who.ask(signal.Signals(number).name)
    if waiting and not asked:
        signal.raise_signal(number)


def _end(number: int) -> list[Signals | None]:
    """Put back the handler from before all who waited for a signal, and return these."""
    waiting = _waiting.pop(number, [])
    for _, before in reversed(waiting):
        _set_back(number, before)
    return [who for who, _ in waiting]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_masks: list[set[signal.Signals | int]] = []


def _before_fork() -> None:
    # Python drops the signals that reach a child before it is set up: they have to wait
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _waiting))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:  # pragma: no cover (nobody measures in the child)
    asked_by_terminal = bool(_waiting.get(signal.SIGINT))
    for number in list(_waiting):
        _end(number)
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
