"""A tqdm bar for a loop: what `Loop(..., progress=True)` shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import checks
from .errors import NEVER
from .sync import rank_among_several

if TYPE_CHECKING:
    from .run import Run

OFTEN, SELDOM = 0.1, 10.0  # seconds from update to update: in a terminal, and in a file
PARTS = 100  # updates at least, since steps may become slower than they were
BY_TIME = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"  # tqdm's words


class Progress:
    """The bar of a loop: `loop.progress`. It shows steps, or seconds under `max_seconds`.

    The engine calls it at the step that it names, about ten times a second; all other steps cost
    nothing. It reads a clock of its own and changes no event.

    Example:
        >>> from dloop import Loop
        >>> loop = Loop(range(3), max_epochs=1)  # with progress=True, there is a bar
        >>> for batch, events in loop:
        ...     loop.progress.set_postfix(loss=batch / 2)
    """

    def __init__(self, make: Callable[..., Any] | None, given: object = None) -> None:
        self._make = make if given is None else lambda **_: given
        self._run: Run | None = None  # while a bar is shown
        self._title = ""
        self._postfix: dict[str, Any] = {}
        self._interval = OFTEN
        self._latest: tuple[int, float] = 0, 0.0  # the step and the time of the latest update
        self.bar: Any = None

    def set_postfix(self, values: Mapping[str, object] | None = None, **more: object) -> None:
        """Show values behind the bar from its next update on. Without a bar, do nothing.

        Args:
            values: what to show, by name.
            more: the same, as keywords.

        Example:
            >>> from dloop import Loop
            >>> Loop(range(3), max_epochs=1).progress.set_postfix(loss=0.25)
        """
        self._postfix = {**(values or {}), **more}

    def write(self, *values: object) -> None:
        """Print a line above the bar. Without a bar, print it as `print` does.

        Args:
            values: what to print, with spaces in between.

        Example:
            >>> from dloop import Loop
            >>> Loop(range(3), max_epochs=1).progress.write("loss", 0.25)
            loss 0.25
        """
        write = getattr(self.bar, "write", print)
        write(" ".join(map(str, values)))

    def show(self, run: Run) -> None:
        """Open a bar, if there is one.

        Raises:
            TypeError: the callable that makes bars returned something else.
        """
        if self._make is None:
            return
        if self._run is not None:
            self.leave(self._run)
        step = run.engine.step + 1
        arguments: dict[str, Any] = {"total": _total(run), "initial": step, "unit": "step"}
        if run.schedule.max_time < NEVER:
            done, total = round(run.state.elapsed, 1), run.schedule.max_time / 1e9
            arguments = {"total": total, "initial": done, "unit": "s", "bar_format": BY_TIME}
        arguments |= {"dynamic_ncols": True, "leave": None}  # an inner loop's bar disappears
        if not isinstance(self._make, type):  # a function chooses the look
            arguments = {name: arguments[name] for name in ("total", "initial")}
        bar = self._make(**arguments, mininterval=0, miniters=1)
        if not hasattr(bar, "update") or not hasattr(bar, "close"):
            made, got = checks.shown(self._make), checks.shown(bar)
            raise TypeError(f"progress={made}: it returned {got}; let it return a tqdm")
        self.bar, self._run = bar, run
        self._title = (getattr(bar, "desc", None) or "").partition("epoch ")[0]
        file = getattr(bar, "fp", None)
        is_seen = file is None or file.isatty() or "ipykernel" in sys.modules
        self._interval = OFTEN if is_seen else SELDOM  # each update takes a line of a file
        self._latest = step, perf_counter()
        run.engine.agenda.bar, run.engine.agenda.bar_step = self, step

    def at_step(self, step: int) -> int:
        """Update the bar before `step` is yielded, if it is time to; return when to be called."""
        run = self._run
        assert run is not None  # else the agenda has no bar
        now = perf_counter()
        before, then = self._latest
        steps, seconds = step - before, now - then
        left = self._interval - seconds
        if left <= 0 or not steps:
            self._update(run, step, run.engine.epoch)
            self._latest, left = (step, now), self._interval
        end = step if run.schedule.max_time < NEVER else max(step, self.bar.total or 0)
        distance = steps / seconds * left if seconds > 0 else 0
        return step + max(1, int(min(distance, end // PARTS)))

    def leave(self, run: Run) -> None:
        """Show the latest step of a run whose bar is shown, and close the bar."""
        if run is not self._run:
            return
        is_done = run.stop_reason is not None  # else the body was left
        if run.engine.step >= 0:
            self._update(run, run.engine.step + is_done, run.state.epoch)
        bar, self.bar, self._run = self.bar, None, None
        run.engine.agenda.bar, run.engine.agenda.bar_step = None, NEVER
        bar.close()

    def _update(self, run: Run, done: int, epoch: int) -> None:
        bar, postfix = self.bar, self._postfix
        place: float = done
        if run.schedule.max_time < NEVER:
            place = min(round(run.state.elapsed, 1), bar.total or NEVER)
            postfix = {"step": done, **postfix}
        elif run.error is None:
            bar.total = _total(run)
        if run.source.has_epochs:
            bar.set_description(f"{self._title}epoch {epoch}", refresh=False)
        if postfix:
            bar.set_postfix(postfix, refresh=False)
        bar.update(place - bar.n)


def checked(progress: object) -> Progress:
    """Check the argument `progress`; processes other than rank 0 show no bar.

    Raises:
        ImportError: True needs tqdm, which is not installed.
        TypeError: it makes no bar.
    """
    if progress is None or progress is False or rank_among_several() not in (None, 0):
        return Progress(None)
    if progress is True:
        try:
            tqdm: Any = import_module("tqdm.auto")
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install 'dloop[progress]'") from error
        return Progress(tqdm.tqdm)
    if hasattr(progress, "update") and not isinstance(progress, type):
        return Progress(None, progress)
    if callable(progress):
        return Progress(progress)
    shown = checks.shown(progress)
    raise TypeError(f"progress={shown}: pass True, False, a tqdm, or a callable that makes one")


def _total(run: Run) -> int | None:
    """Return the steps of the whole run; None if unknown."""
    left = run.steps_to_come()
    return None if left is None else run.engine.step + 1 + left
