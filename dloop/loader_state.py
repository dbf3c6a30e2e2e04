"""The state of a dataloader that keeps one: taken on the way through an epoch, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from . import loaders
from .batch_lists import BatchLists
from .errors import NEVER, log

MOST_AGAIN = 100
"""Batches between two states of a loader, and so the most that are fetched again.

The state of a resumed loader is used only after that many: torchdata's workers know their places
only once each has given a batch.
"""


def owner_of_state(loader: object, batches: object) -> object | None:
    """Return which of a loader and its iterator keeps the loader's state; None if neither does."""
    if type(loader) in loaders.PLAIN:
        return None
    for owner in (loader, batches):
        if loaders.keeps_state(owner):
            return owner
    return batches if callable(getattr(batches, "get_state", None)) else None


def resumed_at(loader: Any, resumed: dict[str, Any]) -> tuple[list[Any], Iterator[Any]]:
    """Return an iterator of `loader` from a state on, and the batch before it, if it was fetched.

    Args:
        loader: the loader.
        resumed: what `TrackedBatches.state` returned.
    """
    if loaders.keeps_state(loader):
        loader.load_state_dict(resumed["state"])
    batches: Any = iter(loader)
    owner: Any = owner_of_state(loader, batches)
    if owner is None:
        return [], batches
    if owner is batches:
        loads = loaders.keeps_state(owner)
        (owner.load_state_dict if loads else owner.set_state)(resumed["state"])
    first = []
    if resumed["whole"]:
        first = list(islice(batches, 1))
        if not first or resumed["cut"]:  # the state was that of the end of the epoch before
            return [], iter(loader)
    return first, batches


class TrackedBatches(Iterator[Any]):
    """The batches of an epoch from a loader that keeps state, which is taken now and then.

    It is taken after the first batch, which is the earliest that it can be relied upon, and then
    every `MOST_AGAIN` batches. A state is a dict: `state` is the loader's own after `at` batches of
    the epoch. `whole`: it was taken at the end of the epoch before; `cut`: that epoch was not
    exhausted. `rest`: how many batches to fetch to end the epoch before, if the state lies in it.

    Args:
        batches: the loader's iterator.
        first: the batch before it, if it was fetched.
        owner: what keeps the state: the loader or its iterator.
        before: the state from which the epoch is reached.
        resumed: the state that `owner` was loaded with, if it was.
        begun: how many batches of the epoch do not come, if `owner` was not loaded.
        counts: whether a state can only be a count of batches, which a resumed loader gets wrong.
        single_pass: whether the loader can be iterated only once.
        ahead: how many batches are fetched before their steps are made.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        first: list[Any],
        owner: Any,
        before: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        begun: int,
        counts: bool,
        single_pass: bool,
        ahead: int,
    ) -> None:
        self._batches: Iterator[Any] = batches
        self._first = first
        self._owner: Any = owner
        self.before = before
        self._resumed = resumed
        # The state is right after so many batches
        self._right_after = 1 if resumed is None else NEVER if counts else MOST_AGAIN
        self._single_pass = single_pass
        self.begun: int = begun if resumed is None else resumed["at"]
        self._taken = 0
        self._is_unsure = False  # during a fetch, and after one that failed
        self._kept: list[dict[str, Any]] = []  # the first state of the epoch, and the last few
        self._few = 1 + ahead // MOST_AGAIN
        self._at_end: dict[str, Any] | None = None
        self._ended = False  # whether the iterator did

    def __next__(self) -> Any:
        if self._taken % MOST_AGAIN == 1 and not self._is_unsure:
            self._keep()
        self._is_unsure = True
        try:
            batch = self._first.pop() if self._first else next(self._batches)
        except StopIteration:
            self._is_unsure, self._ended = False, True
            raise
        self._is_unsure = False
        self._taken += 1
        return batch

    def tells_its_state(self) -> bool:
        """Return whether the loader's state can be taken, after the first batch."""
        return self._state_now(self.begun + self._taken) is not None

    def state(self, done: int, ahead: int) -> dict[str, Any] | None:
        """Return the state after `done` batches of the epoch, or an earlier one.

        Args:
            done: how many batches were done.
            ahead: how many more were fetched.
        """
        is_right = done - self.begun >= self._right_after and not (ahead or self._is_unsure)
        is_here = done == self.begun + self._taken
        state = self._state_now(done) if is_right and is_here else None
        if state is not None:
            return state
        earlier = [kept for kept in self._kept if kept["at"] <= done]
        return earlier[-1] if earlier else self.before

    def continue_from(self, dropped: TrackedBatches) -> None:
        """Take over the states of the same epoch whose iterator was dropped."""
        self.before = dropped.before
        self._kept = dropped._kept

    def state_at_end(self) -> dict[str, Any] | None:
        """Return the state after the epoch's end."""
        if self._owner is None:
            return self._at_end
        if self._resumed is None or not self._taken or self._taken >= self._right_after:
            return self._state_now(0)
        return {**self._resumed, "rest": self._taken}

    def let_go(self) -> None:
        """Let go of the loader's iterator, and so of its workers."""
        if self._owner is not None and self._taken and not self._is_unsure:
            self._at_end = self.state_at_end()
            self._keep()
        self._owner = None
        self._batches = iter(())

    def _keep(self) -> None:
        if self._taken >= self._right_after:
            state = self._state_now(self.begun + self._taken)
            if state is not None:
                self._kept[1 : -self._few] = []
                self._kept.append(state)

    def _state_now(self, at: int) -> dict[str, Any] | None:
        """Return the state after `at` batches; None if the loader has none.

        Most of Accelerate's loaders have a `state_dict` that raises AttributeError.
        """
        if self._owner is None:
            return None
        get_state = getattr(self._owner, "state_dict", None) or self._owner.get_state
        try:
            state = get_state()
        except (AttributeError, NotImplementedError, TypeError) as exception:
            # A TypeError counts if the call raised it, since arguments are missing
            trace = exception.__traceback__
            if isinstance(exception, TypeError) and trace is not None and trace.tb_next is not None:
                raise
            log("the dataloader has no state: %r", exception)
            self._owner = None
            return None
        whole = at == 0 and not self._single_pass
        at_last = loaders.tells_its_last(self._owner) and self._owner.end_of_dataloader
        found_end = isinstance(self._batches, BatchLists) and self._batches.has_ended
        cut = whole and not (self._ended or at_last or found_end)
        return {"state": state, "at": at, "whole": whole, "cut": cut, "rest": 0}
