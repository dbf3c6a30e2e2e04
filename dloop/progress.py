"""A tqdm bar for a loop: what `Loop(..., progress=)` shows."""

from __future__ import annotations

import sys
from importlib import import_module
from time import perf_counter

from . import checks
from .sync import rank_among_several

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .run import Run

NEVER = 2**63 - 1
OFTEN = 0.1
"""Seconds from one update of the bar to the next, in a terminal and in a notebook."""
SELDOM = 10.0
"""The same, where the output is a file, to which every update adds a line."""
PARTS = 100
"""How often it is looked whether a bar has to be updated, at least: a hundredth more or less of a
bar is hardly seen."""


class Progress:
    """The bar of a loop: steps, or seconds under `max_seconds`, and the epoch.

    It is a companion of the run: it is asked at a step whose distance follows the speed of the
    steps before, and is at most a hundredth of the bar, since steps may become slower. So the bar
    moves about ten times a second, and other steps cost nothing. It has a clock of its own, and
    changes no event.

    Attributes:
        next_step: the next step at which it wants to be asked.
        bar: the tqdm that is shown, or None.
    """

    def __init__(self, make: Callable[..., Any] | None, given: Any) -> None:
        self._make = make
        self._given = given
        self._title = ""
        self._postfix: dict[str, Any] = {}
        self._interval = OFTEN
        self._latest: tuple[int, float] = 0, 0.0  # the step and the time of the latest update
        self.next_step = NEVER
        self.bar: Any = None

    def set_postfix(self, values: Mapping[str, object] | None = None, **more: object) -> None:
        """Show these behind the bar, from its next update on; without a bar this does nothing.

        Args:
            values: names and what they have, as tqdm takes them too.
            more: the same as keywords, such as `loss=0.25`.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1, progress=False)
            >>> for batch, events in loop:
            ...     loop.progress.set_postfix(loss=batch / 2)
        """
        self._postfix = {**(values or {}), **more}

    def show(self, run: Run) -> Shown | None:
        """Open a bar, which is shown until what is returned is freed; None if there is none."""
        if self._make is None and self._given is None:
            return None
        if self.bar is not None:
            self._show_the_latest(run)
            if self.bar is not self._given:
                self.close()
        step = run.stepper.step + 1
        name, limit = run.schedule.limit
        by_time = name == "max_seconds"
        total = limit / 1e9 if by_time else _total(run)
        bar = self._given
        if bar is None:
            assert self._make is not None
            look = {
                "unit": "s" if by_time else "step",
                "bar_format": BY_TIME if by_time else None,
                "dynamic_ncols": True,
                "leave": None,  # that of a loop within another one goes with it
            }
            bar = self._make(
                total=total,
                initial=round(run.latest_elapsed(), 1) if by_time else step,
                mininterval=0,
                miniters=1,
                **(look if isinstance(self._make, type) else {}),
            )
            if not _is_a_bar(bar):
                raise TypeError(
                    f"progress={checks.shown(self._make)}: it returned {checks.shown(bar)}; "
                    "let it return a tqdm"
                )
        elif by_time:
            bar.total = total if bar.total is None else bar.total
        else:
            bar.initial = bar.n = step
        self.bar = bar
        self._title = getattr(bar, "desc", None) or ""  # with a colon, as tqdm keeps it
        self._interval = SELDOM if _is_in_a_file(bar) else OFTEN
        self._latest = step, perf_counter()
        self.next_step = step
        return Shown(self, bar, run)

    def at_step(self, run: Run, step: int) -> None:
        """Update the bar, if it is time to, before `step` is handed over."""
        now = perf_counter()
        before, then = self._latest
        steps, seconds = step - before, now - then
        left = self._interval - seconds
        if left <= 0 or not steps:
            self.update(run, step, run.stepper.epoch)
            self._latest = step, now
            left = self._interval
        # Not by the speed alone, since steps may become slower than they were
        by_time = run.schedule.limit[0] == "max_seconds"
        end = step if by_time else max(step, self.bar.total or 0)
        distance = steps / seconds * left if seconds > 0 else 0
        self.next_step = step + max(1, int(min(distance, end // PARTS)))

    def update(self, run: Run, done: int, epoch: int) -> None:
        """Show that so many steps are done, and which epoch it is."""
        bar = self.bar
        name, _ = run.schedule.limit
        place: float = done
        if name == "max_seconds":
            place = min(round(run.latest_elapsed(), 1), bar.total or NEVER)
        elif run.error is None:
            bar.total = _total(run)
        bar.set_description(f"{self._title}epoch {epoch}", refresh=False)
        postfix = {**({"step": done} if name == "max_seconds" else {}), **self._postfix}
        if postfix:
            bar.set_postfix(postfix, refresh=False)
        bar.update(place - bar.n)

    def finish(self, run: Run) -> None:
        """Show the last step of the run, and close the bar."""
        if self.bar is not None:
            self._show_the_latest(run)
        self.close()

    def leave(self, run: Run) -> None:
        """Close the bar; one that was given stays open, since the loop may be entered again."""
        self._show_the_latest(run)
        if self.bar is not self._given or run.stop_reason is not None:
            self.close()

    def _show_the_latest(self, run: Run) -> None:
        """Show how far the run is. A body in which it was left is not done, but for the last."""
        stepper = run.stepper
        if stepper.step >= 0:
            is_done = run.stop_reason is not None
            self.update(run, stepper.step + is_done, stepper.latest_state().epoch)

    def close(self) -> None:
        """Close the bar."""
        bar, self.bar = self.bar, None
        self.next_step = NEVER
        if bar is not None:
            bar.close()


class Shown:
    """Keeps a bar shown until it is freed; each iterator of a loop has one."""

    def __init__(self, progress: Progress, bar: Any, run: Run) -> None:
        self._progress = progress
        self._bar = bar
        self._run = run

    def __del__(self) -> None:
        if self._progress.bar is self._bar:
            self._progress.leave(self._run)


BY_TIME = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
"""How a bar of seconds looks; tqdm's own names."""


def checked(progress: object) -> Progress:
    """The argument `progress`, where a bar is asked for.

    Raises:
        ImportError: a bar is asked for, and tqdm is not installed.
        TypeError: it is something else than it may be.
    """
    if rank_among_several() not in (None, 0):
        return Progress(None, None)
    if progress is True:
        try:
            tqdm_auto: Any = import_module("tqdm.auto")
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install 'dloop[progress]'") from error
        return Progress(tqdm_auto.tqdm, None)
    if _is_a_bar(progress):
        return Progress(None, progress)
    if callable(progress):
        return Progress(progress, None)
    raise TypeError(
        f"progress={checks.shown(progress)}: pass True, False, a tqdm, or a callable that makes one"
    )


def _is_a_bar(given: object) -> bool:
    is_a_class = isinstance(given, type)
    return hasattr(given, "update") and hasattr(given, "close") and not is_a_class


def _total(run: Run) -> int | None:
    """The steps of the whole run; None where they are not known."""
    left = run.steps_to_come()
    return None if left is None else run.stepper.step + 1 + left


def _is_in_a_file(bar: Any) -> bool:
    """Whether a bar adds lines to a file, tqdm's `fp`; what a notebook's kernel writes is shown."""
    file = getattr(bar, "fp", None)
    return file is not None and "ipykernel" not in sys.modules and not file.isatty()
