"""A tqdm bar for a loop: what `Loop(..., progress=)` shows."""

from __future__ import annotations

import sys
from importlib import import_module
from time import perf_counter

from . import checks
from .sync import rank_among_several

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .run import Run

NEVER = 2**63 - 1
OFTEN = 0.1
"""Seconds from one update of the bar to the next, in a terminal and in a notebook."""
SELDOM = 10.0
"""The same, where the output is a file, to which every update adds a line."""


class Progress:
    """The bar of a loop: steps, or seconds under `max_seconds`, and the epoch.

    It is a companion of the run: it is asked at a step whose distance follows the speed of the
    steps before, so that the bar moves about ten times a second and other steps cost nothing. It
    has a clock of its own, and changes no event.

    Attributes:
        next_step: the next step at which it wants to be asked.
        bar: the tqdm that is shown, or None.
    """

    def __init__(self, make: Callable[..., Any] | None, given: Any) -> None:
        self._make = make
        self._given = given
        self._postfix: dict[str, Any] = {}
        self._interval = OFTEN
        self._latest: tuple[int, float] = 0, 0.0  # the step and the time of the latest update
        self.next_step = NEVER
        self.bar: Any = None

    def set_postfix(self, **values: object) -> None:
        """Show these behind the bar, from its next update on; without a bar this does nothing.

        Args:
            values: names and what they have, such as `loss=0.25`.

        Example:
            >>> from dloop import Loop
            >>> loop = Loop(range(3), max_epochs=1, progress=False)
            >>> for batch, events in loop:
            ...     loop.progress.set_postfix(loss=batch / 2)
        """
        self._postfix = values

    def show(self, run: Run) -> Shown | None:
        """Open a bar, which is shown until what is returned is freed; None if there is none."""
        if self._make is None and self._given is None:
            return None
        if self.bar is not None:
            self.leave(run)
        step = run.stepper.step + 1
        name, limit = run.schedule.limit
        by_time = name == "max_seconds"
        bar = self._given
        if bar is None:
            assert self._make is not None
            bar = self._make(
                total=limit / 1e9 if by_time else None,
                initial=round(run.latest_elapsed(), 1) if by_time else step,
                unit="s" if by_time else "step",
                bar_format=BY_TIME if by_time else None,
                dynamic_ncols=True,
                leave=None,  # that of a loop within another one goes with it
                mininterval=0,
                miniters=1,
            )
        elif not by_time:
            bar.initial = bar.n = step
        self.bar = bar
        self._interval = SELDOM if _is_in_a_file(bar) else OFTEN
        self._latest = step, perf_counter()
        self.next_step = step
        return Shown(self, bar, run)

    def at_step(self, run: Run, step: int) -> None:
        """Update the bar, before `step` is handed over."""
        now = perf_counter()
        before, then = self._latest
        steps = step - before
        if steps and now > then:
            self.next_step = step + max(1, int(min(steps / (now - then), 1e15) * self._interval))
        else:
            self.next_step = step + 1
        self._latest = step, now
        self.update(run, step, run.stepper.epoch)

    def update(self, run: Run, done: int, epoch: int) -> None:
        """Show that so many steps are done, and which epoch it is."""
        bar = self.bar
        name, _ = run.schedule.limit
        place: float = done
        if name == "max_seconds":
            place = min(run.latest_elapsed(), bar.total or NEVER)
        else:
            left = run.steps_to_come()
            bar.total = None if left is None else run.stepper.step + 1 + left
        bar.set_description(f"epoch {epoch}", refresh=False)
        postfix = {**({"step": done} if name == "max_seconds" else {}), **self._postfix}
        if postfix:
            bar.set_postfix(postfix, refresh=False)
        bar.update(place - bar.n)

    def finish(self, run: Run) -> None:
        """Show the last step of the run, and close the bar."""
        if self.bar is not None:
            self.update(run, run.stepper.step + 1, run.stepper.latest_state().epoch)
        self.close()

    def leave(self, run: Run) -> None:
        """Close the bar, as far as it was made here: the loop may be entered again."""
        self.update(run, run.stepper.step, run.stepper.epoch)
        if self.bar is not self._given:
            self.close()

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
    if (
        hasattr(progress, "update")
        and hasattr(progress, "close")
        and not isinstance(progress, type)
    ):
        return Progress(None, progress)
    if callable(progress):
        return Progress(progress, None)
    raise TypeError(
        f"progress={checks.shown(progress)}: pass True, False, a tqdm, or a callable that makes one"
    )


def _is_in_a_file(bar: Any) -> bool:
    """Whether a bar adds lines to a file, tqdm's `fp`; what a notebook's kernel writes is shown."""
    file = getattr(bar, "fp", None)
    return file is not None and "ipykernel" not in sys.modules and not file.isatty()
