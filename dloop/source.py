"""Any loader as epochs of batches: its length, where to look ahead, `set_epoch`, wrong lengths."""

from __future__ import annotations

from itertools import chain, islice

from . import checks
from .errors import DataExhaustedError, DataLengthError, is_from_outside, not_stop, struck, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, SupportsIndex, TypeGuard

NEVER = 2**63 - 1
_NOTHING = object()
_MOST_AGAIN = 100
"""Batches: how often a loader's state is noted, which is how many are fetched again at most.

And how many a loader has given, after it was resumed, when its state is taken to be right: its
workers may tell of their places only once each has given a batch.
"""


class Source:
    """Opens one epoch after the other, and judges where they end.

    An epoch's length may be promised: by `dataloader_len`, which cuts the epoch there, or by
    `len()`, which a look ahead at the promised last batch verifies (with `lookahead=False` it is
    taken on faith). Where nothing is promised, every step looks one batch ahead (with
    `lookahead=False` none does).

    Attributes:
        given_len: the argument `dataloader_len`.
        promise: the length of the open epoch, where one is promised.
        once: whether the batches can be gone through only once.
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | Callable[[], Iterable[Any]],
        dataloader_len: SupportsIndex | None,
        lookahead: bool | None,
        max_epochs: int | None,
    ) -> None:
        if lookahead is not None and not isinstance(lookahead, bool):
            raise TypeError(f"lookahead={checks.shown(lookahead)}: pass True, False or None")
        self._loader: Iterable[Any] | None = None
        self._load: Callable[[], Iterable[Any]] | None = None
        if _is_iterable(dataloader):
            self._loader = dataloader
        elif callable(dataloader):
            self._load = dataloader
        else:
            raise TypeError(
                f"dataloader={checks.shown(dataloader)}: pass an iterable, or a callable that "
                "returns a fresh one for each epoch"
            )
        self.once = hasattr(type(self._loader), "__next__")
        self.given_len = (
            None if dataloader_len is None else checks.count("dataloader_len", dataloader_len)
        )
        self._lookahead = lookahead
        self._by_epochs = max_epochs is not None
        # A stream is taken exactly when asked for, since no epoch is at stake
        self._is_stream = self.once and not self._by_epochs
        self._check(max_epochs)

        self._resumed: dict[str, Any] | None = None  # the state from which to open an epoch
        self._skips = 0  # of a loader that is gone through once: all batches that were ever taken
        self._told_of_skipping = False

        self._is_gone = False
        self._opened = False
        self._epoch = -1  # the latest that was opened
        self._batches: Iterator[Any] | None = None
        self._tracked: _Tracked | None = None  # its batches, where the loader keeps state
        self._tracked_before: _Tracked | None = None  # those of the epoch before
        self._on_faith: tuple[int, Iterator[Any]] | None = None
        self.promise: int | None = None
        self._warned_of_more = False

    def _check(self, max_epochs: int | None) -> None:
        if self.once and (max_epochs or 0) > 1 and (self.given_len is None or self._lookahead):
            ignored = " (which lookahead=True ignores)" if self._lookahead else ""
            raise ValueError(
                f"max_epochs={max_epochs}: this dataloader can be gone through only once; give "
                f"its epochs a dataloader_len{ignored}, or pass a callable that returns a fresh "
                "iterable"
            )
        if self._lookahead is False and self._loader is not None:
            self._refuse_unknown_end(self._read_promise(self._loader))

    def _refuse_unknown_end(self, promise: int | None) -> None:
        if self._lookahead is False and self._by_epochs and promise is None:
            raise ValueError(
                "lookahead=False: max_epochs needs to know where an epoch ends; pass "
                "dataloader_len, or let the loop look ahead"
            )

    def open_epoch(self, epoch: int, taken: int) -> tuple[Iterator[Any], int, int]:
        """Begin `epoch`: its iterator, the epoch step from which to look ahead, and its last one.

        Of its batches `taken` were taken before, and are skipped.

        Either step is NEVER where it does not apply. To look ahead at every step is to do so from
        -1 on; any other step from which to look is the last one that is promised.

        Raises:
            DataExhaustedError: the loader says that it is empty.
            LoopError: it was lost, and can be gone through only once.
            ValueError: `lookahead=False`, and no length is to be had.
        """
        if self._is_gone:
            raise struck()
        self._drop_surplus(epoch - 1)
        try:
            batches = self._iterate(epoch, taken)
        except StopIteration as exception:
            raise not_stop(exception) from exception
        promise = self.promise
        if promise is None:
            looks = self._lookahead or (self._lookahead is None and not self._is_stream)
            return batches, -1 if looks else NEVER, NEVER
        if self.given_len is not None:
            return batches, NEVER, promise - 1
        if self._lookahead is False:
            self._on_faith = epoch, batches
            return batches, NEVER, promise - 1
        return batches, promise - 1, NEVER

    def _iterate(self, epoch: int, taken: int) -> Iterator[Any]:
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = None  # and its workers, before there are new ones
        before = self._tracked_before if self._epoch == epoch else self._tracked
        loader: Any = self._loader if self._load is None else self._load()
        if not _is_iterable(loader):
            raise TypeError(
                f"dataloader() returned {checks.shown(loader)}: it has to return an iterable"
            )
        resumed = self._resumed
        if resumed is not None and resumed["rest"]:
            _set_epoch(loader, epoch - 1)
            count = resumed["rest"] + (not self.once)  # the last is to see its end
            next(islice(chain(*_resumed_at(loader, resumed)), count, count), None)
            resumed = None
        _set_epoch(loader, epoch)
        self.promise = self._read_promise(loader)
        self._refuse_unknown_end(self.promise)
        if self.promise == 0:
            raise DataExhaustedError(f"epoch {epoch} has no batch: len(dataloader) is 0")
        first, batches = _resumed_at(loader, resumed)
        self._batches = batches
        owner = _owner_of_state(loader, batches)
        tracked = None
        skips = self._skips or taken
        if owner is not None:  # else it kept state when that was saved
            tracked = batches = _Tracked(
                batches,
                first,
                owner,
                self._resumed or (None if before is None else before.state_at_end()),
                resumed,
                NEVER if _counts_batches(loader) else _MOST_AGAIN,
                self.once,
            )
            skips = self._skips or taken - tracked.begun
        if skips:
            self._skip(batches, skips, loader, epoch)
        self._tracked_before, self._tracked, self._epoch = before, tracked, epoch
        self._resumed = None
        self._opened = True
        self._skips = 0
        return batches

    def _skip(self, batches: Any, count: int, loader: object, epoch: int) -> None:
        """Take `count` of the `batches`."""
        is_sequence = type(batches) in _SEQUENCE_ITERATORS
        if is_sequence and not self.once:
            batches.__setstate__(count)
            return
        if not (is_sequence or isinstance(batches, _Tracked) or self._told_of_skipping):
            self._told_of_skipping = True
            self._tell_of_skipping(count, loader, epoch)
        next(islice(batches, count, count), None)

    def _tell_of_skipping(self, count: int, loader: object, epoch: int) -> None:
        unsure = ""
        sampler = getattr(loader, "sampler", None)
        shuffles = any(base.__name__ == "RandomSampler" for base in type(sampler).__mro__)
        if shuffles and (getattr(sampler, "generator", None) is None or epoch):
            unsure = (
                ". It shuffles in an order that cannot be known to repeat, so that samples may "
                "come twice or not at all: use a sampler with set_epoch, or a loader with state"
            )
        warn(
            f"the dataloader keeps no state, so its first {count} batches are fetched and dropped "
            f"to go on in epoch {epoch}{unsure}"
        )

    def is_lost(self, exception: BaseException, epoch: int, taken: int) -> bool:
        """Whether an interrupt has ended the iterator of `epoch`, after `taken` batches.

        It ends a generator when it strikes there: the epoch is to be opened anew. Any other may
        have lost the batch that it was fetching, and is not held to the promise of its length.
        """
        if self.given_len is None and self._lookahead is None and is_from_outside(exception):
            self.promise = None
        if getattr(self._batches, "gi_frame", self) is not None:
            return False
        self._resumed = self.state(taken, 1, epoch, False)
        self._is_gone = self.once
        self._batches = None
        return True

    def resume(self, loader: dict[str, Any] | None, steps: int) -> None:
        """Let the first epoch that is opened go on from what `state` returned."""
        self._resumed = loader
        self._skips = steps if self.once and loader is None else 0

    def state(self, done: int, ahead: int, epoch: int, ended: bool) -> dict[str, Any] | None:
        """The loader's own state after `done` batches of `epoch`; None where it keeps none.

        It is the state after `at` batches, where the loader has given `ahead` more than `done`:
        those between are skipped when it is loaded. `whole` is whether that is the end of the
        epoch before. `rest` is how many batches end the epoch, where it is that of the one before.
        """
        if not self._opened or (self._resumed is not None and self._epoch == epoch):
            return self._resumed
        tracked = self._tracked
        if self._epoch != epoch and tracked is not None:  # the next one was opened already
            if ended:
                return tracked.before
            tracked = self._tracked_before
        if tracked is None:
            return None
        return tracked.state_at_end() if ended else tracked.state(done, ahead)

    def goes_on_after(self, epoch: int, taken: int, step: int) -> bool:
        """Judge that `epoch` ended, unforeseen, after `taken` batches, the last of them at `step`.

        Returns whether another epoch may begin.

        Raises:
            DataExhaustedError: it had no batch.
            DataLengthError: it had fewer than were promised.
        """
        self._on_faith = None
        if taken == 0 and (epoch == 0 or not self.once):
            raise DataExhaustedError(
                f"epoch {epoch} has no batch: the dataloader is empty or was consumed before"
            )
        if self.promise is not None and 0 < taken < self.promise:
            promised_by = "len(dataloader)" if self.given_len is None else "dataloader_len"
            raise DataLengthError(
                f"epoch {epoch} ended after {taken} of the {self.promise} batches that "
                f"{promised_by} promised; pass lookahead=True to go by the data itself"
            )
        if self.once:
            self.ran_dry(step)
        return not self.once

    def goes_past_promise(self, epoch: int) -> None:
        """Take note of a batch after the one from which on the loop has looked ahead."""
        if self.promise is not None and not self._warned_of_more:
            warn(
                f"epoch {epoch} has more than the {self.promise} batches that len(dataloader) "
                "promised; it goes on to its true end"
            )
            self._warned_of_more = True

    def ran_dry(self, step: int) -> None:
        """Warn that the source ended at `step`, before the run's limit."""
        warn(f"the dataloader ran dry at global_step {step}, before the run's limit")

    def finish(self, epoch: int, stop_reason: str | None) -> None:
        """End the run, whose last epoch was `epoch`."""
        if stop_reason == "max_epochs":
            self._drop_surplus(epoch)
        self.forget()

    def forget(self) -> None:
        """Let go of the open epoch's iterator, but not of the states that may be asked for."""
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = self._on_faith = None

    def epoch_len(self) -> int | None:
        """The length that is promised of the open epoch, or of the first where none was opened."""
        if self._opened:
            return self.promise
        if self._loader is None:
            return None if self._lookahead else self.given_len
        return self._read_promise(self._loader)

    def fixed_len(self) -> int | None:
        """The length of every epoch, where that is known beforehand."""
        if self._loader is None or any(
            callable(getattr(part, "set_epoch", None)) for part in _parts(self._loader)
        ):
            return None
        return self._read_promise(self._loader)

    def close(self) -> None:
        """Close the open epoch's iterator, unless it is the dataloader that the user passed."""
        batches = self._batches
        self.forget()
        close = getattr(batches, "close", None)
        if callable(close) and not self.once:
            close()

    def _drop_surplus(self, epoch: int) -> None:
        on_faith, self._on_faith = self._on_faith, None
        if on_faith is None or on_faith[0] != epoch:  # it was never used: a signal struck
            return
        if next(on_faith[1], _NOTHING) is not _NOTHING:
            warn(
                f"epoch {epoch} had more than the {self.promise} batches that len(dataloader) "
                "promised; the rest is dropped; pass lookahead=True to use it"
            )

    def _read_promise(self, loader: Iterable[Any]) -> int | None:
        if self._lookahead:
            return None
        if self.given_len is not None:
            return self.given_len
        if self._is_stream or _is_iterable_style(loader):
            return None
        return _length_of(loader)


class _Items:
    """What has `__getitem__` alone, as NumPy's arrays go: Python gives it an iterator."""

    def __getitem__(self, place: int) -> object:
        """Never asked for anything."""


_SEQUENCES: tuple[Any, ...] = ([], (), range(1), range(2**70), "", b"", bytearray(), _Items())
_SEQUENCE_ITERATORS = tuple(type(iter(each)) for each in _SEQUENCES)


def _keeps_state(loader: object) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def _length_of(loader: Any) -> int | None:
    try:
        return min(len(loader), checks.MOST)
    except (TypeError, NotImplementedError):
        return None
    except OverflowError:  # range(2**70)
        return checks.MOST


def _owner_of_state(loader: object, batches: object) -> object | None:
    for owner in (loader, batches):
        if _keeps_state(owner):
            return owner
    return batches if callable(getattr(batches, "get_state", None)) else None


def _resumed_at(loader: Any, resumed: dict[str, Any] | None) -> tuple[list[Any], Iterator[Any]]:
    """An iterator of `loader` from the state on, and the batch before it, if that was taken."""
    if resumed is not None and _keeps_state(loader):
        loader.load_state_dict(resumed["state"])
    batches: Any = iter(loader)
    owner: Any = None if resumed is None else _owner_of_state(loader, batches)
    if resumed is None or owner is None:
        return [], batches
    if owner is batches:
        (owner.load_state_dict if _keeps_state(owner) else owner.set_state)(resumed["state"])
    first = []
    if resumed["whole"]:
        first = list(islice(batches, 1))
        if not first:  # some loaders come back at the end of their epoch
            batches = iter(loader)
    return first, batches


def _counts_batches(loader: object) -> bool:
    """Whether a state of `loader`, if it has any, can only be a count of batches.

    As torchdata's are, of data sets that are only iterated and have no state: once resumed, such a
    loader counts wrong.
    """
    return _is_iterable_style(loader) and not _keeps_state(getattr(loader, "dataset", None))


class _Tracked:
    """The batches of one epoch, from a loader that keeps state, and what that was on the way.

    It is noted after the first batch, which is the earliest moment at which a state of an epoch can
    be relied upon, and now and then after that.

    Args:
        batches: the loader's iterator.
        first: the batch before it, if that was taken.
        owner: the loader or its iterator, whichever tells the state.
        before: the state from which the epoch is reached.
        resumed: the state that `owner` was loaded with, if it was.
        right_after: of a resumed one, after how many batches its state is right.
        once: whether the loader can be gone through only once.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        first: list[Any],
        owner: Any,
        before: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        right_after: int,
        once: bool,
    ) -> None:
        self._batches: Iterator[Any] = batches
        self._first = first
        self._owner: Any = owner
        self.before = before
        self._resumed = resumed
        self._right_after = 1 if resumed is None else right_after
        self._once = once
        self.begun: int = 0 if resumed is None else resumed["at"]
        self._taken = 0
        self._failed = False  # the latest fetch did, so that the state may be any
        self._noted: list[dict[str, Any]] = []  # the first, and the last two
        self._at_end: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._taken % _MOST_AGAIN == 1 and not self._failed:
            self._note()
        try:
            batch = self._first.pop() if self._first else next(self._batches)
        except BaseException as exception:
            self._failed = not isinstance(exception, StopIteration)
            raise
        self._failed = False
        self._taken += 1
        return batch

    def state(self, done: int, ahead: int) -> dict[str, Any] | None:
        """The state after `done` batches of the epoch, where `ahead` more were taken."""
        is_right = done - self.begun >= self._right_after and not (ahead or self._failed)
        if is_right and self._owner is not None:
            return self._state_now(done)
        earlier = [noted for noted in self._noted if noted["at"] <= done]
        return earlier[-1] if earlier else self.before

    def state_at_end(self) -> dict[str, Any] | None:
        """The state once the epoch has ended."""
        if self._owner is None:
            return self._at_end
        if self._resumed is None or self._taken >= self._right_after:
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
            self._noted[1:-1] = []
            self._noted.append(self._state_now(self.begun + self._taken))

    def _state_now(self, at: int) -> dict[str, Any]:
        get_state = getattr(self._owner, "state_dict", None) or self._owner.get_state
        return {"state": get_state(), "at": at, "whole": at == 0 and not self._once, "rest": 0}


def _is_iterable(dataloader: object) -> TypeGuard[Iterable[Any]]:
    kind = type(dataloader)
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def _is_iterable_style(loader: object) -> bool:
    """Whether `loader` loads a data set that is only iterated, so that its length is a guess.

    PyTorch gives such data sets a `__getitem__` that only raises, hence the look at their class.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return False
    kind = type(dataset)
    named = any(base.__name__ == "IterableDataset" for base in kind.__mro__)
    return named or not hasattr(kind, "__getitem__")


def _parts(loader: object) -> Iterator[object]:
    """`loader` and all that it draws from, once each."""
    seen: dict[int, object] = {}
    found = [loader]
    while found:
        part = found.pop()
        if part is None or id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        found += [getattr(part, name, None) for name in ("dataset", "batch_sampler", "sampler")]


def _set_epoch(loader: object, epoch: int) -> None:
    for part in _parts(loader):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
