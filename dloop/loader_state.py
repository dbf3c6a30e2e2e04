"""A dataloader's own state: noted on the way through an epoch, and gone on from."""

from __future__ import annotations

from itertools import islice

from . import loaders
from .errors import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

NEVER = 2**63 - 1
MOST_AGAIN = 100
"""Batches: how often a loader's state is noted, which is how many are fetched again at most.

And how many a loader has given, after it was resumed, when its state is taken to be right: its
workers may tell of their places only once each has given a batch.
"""


def owner_of_state(loader: object, batches: object) -> object | None:
    """Which of the two, a loader and its iterator, may tell the loader's state; None if neither."""
    if type(loader) in loaders.PLAIN:
        return None
    for owner in (loader, batches):
        if loaders.keeps_state(owner):
            return owner
    return batches if callable(getattr(batches, "get_state", None)) else None


def resumed_at(loader: Any, resumed: dict[str, Any]) -> tuple[list[Any], Iterator[Any]]:
    """An iterator of `loader` from the state on, and the batch before it, if that was taken."""
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
        if not first or resumed["cut"]:  # it came back in the epoch that is over
            return [], iter(loader)
    return first, batches


class TrackedBatches:
    """The batches of one epoch, from a loader that keeps state, and what that was on the way.

    It is noted after the first batch, which is the earliest moment at which a state of an epoch can
    be relied upon, and now and then after that.

    Args:
        batches: the loader's iterator.
        first: the batch before it, if that was taken.
        owner: the loader or its iterator, whichever tells the state.
        before: the state from which the epoch is reached.
        resumed: the state that `owner` was loaded with, if it was.
        begun: if it was not, how many batches of the epoch are not to come.
        counts: whether a state of it can only be a count of batches, which a resumed loader gets
            wrong.
        single_pass: whether the loader can be gone through only once.
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
    ) -> None:
        self._batches: Iterator[Any] = batches
        self._first = first
        self._owner: Any = owner
        self.before = before
        self._resumed = resumed
        # Its state is right after so many batches
        self._right_after = 1 if resumed is None else NEVER if counts else MOST_AGAIN
        self._single_pass = single_pass
        self.begun: int = begun if resumed is None else resumed["at"]
        self._taken = 0
        self._failed = False  # the latest fetch did, or it is not over: the state may be any
        self._noted: list[dict[str, Any]] = []  # the first, and the last two
        self._at_end: dict[str, Any] | None = None
        self._ended = False  # whether the iterator was

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._taken % MOST_AGAIN == 1 and not self._failed:
            self._note()
        self._failed = True  # as long as the fetch lasts, and if it is interrupted
        try:
            batch = self._first.pop() if self._first else next(self._batches)
        except StopIteration:
            self._failed, self._ended = False, True
            raise
        self._failed = False
        self._taken += 1
        return batch

    def tells_its_state(self) -> bool:
        """Whether the loader's state can be asked for, once there was a batch."""
        return self._state_now(self.begun + self._taken) is not None

    def state(self, done: int, ahead: int) -> dict[str, Any] | None:
        """The state after `done` batches of the epoch, where `ahead` more were taken."""
        is_right = done - self.begun >= self._right_after and not (ahead or self._failed)
        is_here = done == self.begun + self._taken
        state = self._state_now(done) if is_right and is_here else None
        if state is not None:
            return state
        earlier = [noted for noted in self._noted if noted["at"] <= done]
        return earlier[-1] if earlier else self.before

    def go_on_from(self, broken: TrackedBatches) -> None:
        """Take over what was noted of the same epoch before its iterator was broken."""
        self.before = broken.before
        self._noted = broken._noted

    def state_at_end(self) -> dict[str, Any] | None:
        """The state once the epoch has ended."""
        if self._owner is None:
            return self._at_end
        if self._resumed is None or not self._taken or self._taken >= self._right_after:
            return self._state_now(0)
        return {**self._resumed, "rest": self._taken}

    def let_go(self) -> None:
        """Let go of the loader and its iterator, and of the workers that it may have."""
        if self._owner is not None and self._taken and not self._failed:
            self._at_end = self.state_at_end()
            self._note()
        self._owner = None
        self._batches = iter(())

    def _note(self) -> None:
        if self._taken >= self._right_after:
            noted = self._state_now(self.begun + self._taken)
            if noted is not None:
                self._noted[1:-1] = []
                self._noted.append(noted)

    def _state_now(self, at: int) -> dict[str, Any] | None:
        """The state after `at` batches; None if it cannot be asked for.

        `state_dict` of most of Accelerate's loaders raises AttributeError.
        """
        if self._owner is None:
            return None
        get_state = getattr(self._owner, "state_dict", None) or self._owner.get_state
        try:
            state = get_state()
        except (AttributeError, NotImplementedError, TypeError) as exception:
            # a TypeError counts if the call raised it, since arguments are missing
            trace = exception.__traceback__
            if isinstance(exception, TypeError) and trace is not None and trace.tb_next is not None:
                raise
            log("the dataloader keeps no state, since it cannot be asked for it: %r", exception)
            self._owner = None
            return None
        whole = at == 0 and not self._single_pass
        return {
            "state": state,
            "at": at,
            "whole": whole,
            "cut": whole and not (self._ended or loaders.is_at_its_last(self._owner)),
            "rest": 0,
        }
