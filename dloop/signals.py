"""Signals that ask a run to stop; their handlers are installed while the run has an iterator."""

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


class StopSignals:
    """The signals that ask one run to stop.

    The first signal asks every run that listens for it, and restores the handler that dloop
    replaced: a second one does what it would do without dloop.
    """

    def __init__(
        self, numbers: tuple[signal.Signals, ...], request_stop: Callable[[str], object]
    ) -> None:
        self.numbers = numbers
        self.request_stop = request_stop
        self._registrations: set[int] = set()

    def install(self) -> Registration | None:
        """Handle the signals until the object returned is freed; only in the main thread."""
        if not self.numbers:
            return None
        if not _in_main_thread():
            names = ", ".join(each.name for each in self.numbers)
            warn(f"signals={names}: only the main thread can be asked by signals; nothing is set")
            return None
        registration = Registration(self)
        if not self._registrations:
            for number in self.numbers:
                _add_listener(number, self)
        self._registrations.add(id(registration))
        return registration

    def release(self, registration: Registration) -> None:
        """Remove `registration`; with the last one, the handlers are uninstalled."""
        self._registrations.discard(id(registration))
        if not self._registrations:
            self.uninstall()

    def uninstall(self) -> None:
        """Stop handling the signals, whatever is registered, and restore the replaced handlers."""
        self._registrations.clear()
        for number in self.numbers:
            _remove_listener(number, self)


class Registration:
    """Keeps the handlers of `signals` installed until it is freed; each iterator has one."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def __del__(self) -> None:
        self._signals.release(self)


# For each signal number: who listens for it, in the order of installation, each with the handler
# that it replaced (`_handle` if that was dloop's own). None stands for a listener that was removed
# in another thread than the main one, where no handler can be restored.
_listeners: dict[int, list[tuple[StopSignals | None, Any]]] = {}


def _add_listener(number: int, signals: StopSignals) -> None:
    # recorded first, so that the replaced handler can be restored after an interrupt at any line
    _listeners[number] = [*_listeners.get(number, ()), (signals, signal.getsignal(number))]
    signal.signal(number, _handle)


def _remove_listener(number: int, signals: StopSignals) -> None:
    listeners = _listeners.get(number, [])
    if not _in_main_thread():
        _listeners[number] = [(None if each is signals else each, old) for each, old in listeners]
        return
    kept: list[tuple[StopSignals | None, Any]] = []
    previous: Any = _handle
    for listener, replaced in listeners:
        previous = previous if replaced is _handle else replaced
        if listener is not signals and listener is not None:
            kept.append((listener, previous))  # with the handlers of those removed before it
            previous = _handle
    _listeners[number] = kept
    _restore(number, previous)


def _restore(number: int, previous: Any) -> None:
    """Replace dloop's handler, if that is installed, by `previous`, if that is another one."""
    if previous is not _handle and signal.getsignal(number) is _handle:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _handle(number: int, _frame: FrameType | None) -> None:
    removed = _remove_all_listeners(number)
    listeners = [listener for listener in removed if listener is not None]
    for listener in reversed(listeners):
        listener.request_stop(signal.Signals(number).name)
    if removed and not listeners:
        signal.raise_signal(number)


def _remove_all_listeners(number: int) -> list[StopSignals | None]:
    """Restore the handler from before the first listener, and return all listeners."""
    removed = _listeners.pop(number, [])
    for _, previous in reversed(removed):
        _restore(number, previous)
    return [listener for listener, _ in removed]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_masks: list[set[signal.Signals | int]] = []


def _before_fork() -> None:
    # Python drops signals that reach the child before it is set up, so they are blocked until then
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _listeners))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:  # pragma: no cover (coverage is not measured in children)
    handles_ctrl_c = bool(_listeners.get(signal.SIGINT))
    for number in list(_listeners):
        _remove_all_listeners(number)
    if handles_ctrl_c:
        _ignore_once(signal.SIGINT)
    _after_fork()


def _ignore_once(number: int) -> None:  # pragma: no cover (coverage is not measured in children)
    # A terminal sends Ctrl-C to all of its processes, but the parent's last step needs its workers
    previous = signal.getsignal(number)
    if callable(previous):
        signal.signal(number, lambda number, _frame: signal.signal(number, previous))


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows cannot fork)
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )


def checked_signals(given: Iterable[SupportsIndex]) -> tuple[signal.Signals, ...]:
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
