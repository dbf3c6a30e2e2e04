"""Any loader as epochs of batches: its length, where to look ahead, `set_epoch`, wrong lengths."""

from __future__ import annotations

from itertools import islice

from . import checks
from .errors import DataExhaustedError, DataLengthError, not_stop, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, SupportsIndex, TypeGuard

NEVER = 2**63 - 1
_NOTHING = object()


class Source:
    """Opens one epoch after the other, and judges where they end.

    An epoch's length may be promised: by `dataloader_len`, which cuts the epoch there, or by
    `len()`, which a look ahead at the promised last batch verifies (with `lookahead=False` it is
    taken on faith). Where nothing is promised, every step looks one batch ahead (with
    `lookahead=False` none does).

    Attributes:
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
        self._len = (
            None if dataloader_len is None else checks.count("dataloader_len", dataloader_len)
        )
        self._lookahead = lookahead
        self._by_epochs = max_epochs is not None
        # A stream is taken exactly when asked for, since no epoch is at stake
        self._is_stream = self.once and not self._by_epochs
        self._check(max_epochs)

        self._resumed: dict[str, Any] | None = None  # the state that the open epoch was loaded with
        self._to_load = False
        self._skips = 0  # of a loader that is gone through once: all batches that were ever taken
        self._told_of_skipping = False
        self._snapshot: tuple[int, dict[str, Any]] | None = None
        self._epoch_done: dict[str, Any] | None = None

        self._opened = False
        self._batches: Iterator[Any] | None = None
        self._current: Any = None  # the loader that the open epoch is from
        self._on_faith: tuple[int, Iterator[Any]] | None = None
        self._promise: int | None = None
        self._warned_of_more = False

    def _check(self, max_epochs: int | None) -> None:
        if self.once and (max_epochs or 0) > 1 and (self._len is None or self._lookahead):
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
            ValueError: `lookahead=False`, and no length is to be had.
        """
        self._drop_surplus(epoch - 1)
        try:
            batches = self._batches = self._iterate(epoch, taken)
        except StopIteration as exception:
            raise not_stop(exception) from exception
        promise = self._promise
        if promise is None:
            looks = self._lookahead or (self._lookahead is None and not self._is_stream)
            return batches, -1 if looks else NEVER, NEVER
        if self._len is not None:
            return batches, NEVER, promise - 1
        if self._lookahead is False:
            self._on_faith = epoch, batches
            return batches, NEVER, promise - 1
        return batches, promise - 1, NEVER

    def _iterate(self, epoch: int, taken: int) -> Iterator[Any]:
        if self._batches is not None:
            self._epoch_done = self._state_now(0)
        self._batches = None  # and with it its workers, before there are new ones
        loader: Any = self._loader if self._load is None else self._load()
        if not _is_iterable(loader):
            raise TypeError(
                f"dataloader() returned {checks.shown(loader)}: it has to return an iterable"
            )
        _set_epoch(loader, epoch, {})
        self._resumed = self._resumed if self._to_load else None
        resumed = self._resumed
        if resumed is not None and _keeps_state(loader):
            _load_into(loader, resumed["state"])
        self._promise = self._read_promise(loader)
        self._refuse_unknown_end(self._promise)
        if self._promise == 0:
            raise DataExhaustedError(f"epoch {epoch} has no batch: len(dataloader) is 0")
        batches: Iterator[Any] = iter(loader)
        if resumed is not None and not _keeps_state(loader):
            _load_into(batches, resumed["state"])
        if resumed is not None and resumed["whole"]:
            batches = _unless_empty(batches, loader)
        self._current = None if batches is loader else loader
        self._to_load = False
        self._opened = True
        skips = taken - resumed["at"] if resumed is not None else self._skips or taken
        self._skips = 0
        return self._skipped(batches, skips, epoch) if skips else batches

    def _skipped(self, batches: Iterator[Any], count: int, epoch: int) -> Iterator[Any]:
        """`batches` without the first `count`."""
        is_sequence = type(batches) in _SEQUENCE_ITERATORS
        if is_sequence and not self.once:
            batches.__setstate__(count)  # type: ignore[attr-defined]
            return batches
        if not is_sequence:
            self._tell_of_skipping(count, epoch)
        next(islice(batches, count, count), None)
        return batches

    def _tell_of_skipping(self, count: int, epoch: int) -> None:
        if self._told_of_skipping or self._resumed is not None:
            return
        self._told_of_skipping = True
        unsure = ""
        sampler = getattr(self._current, "sampler", None)
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

    def resume(self, loader: dict[str, Any] | None, steps: int) -> None:
        """Let the first epoch that is opened go on from what `state` returned."""
        self._resumed = loader
        self._to_load = loader is not None
        self._skips = steps if self.once and loader is None else 0

    def state(self, done: int, ahead: int, epoch: int, ended: bool) -> dict[str, Any] | None:
        """The loader's own state after `done` batches of `epoch`; None where it keeps none.

        It is the state after `at` batches, where the loader has given `ahead` more than `done`:
        those between are skipped when it is loaded. `whole` is whether that is the end of the
        epoch before.
        """
        if not self._opened:
            return self._resumed
        if ended and not ahead:
            return self._epoch_done if self._batches is None else self._state_now(0)
        if self._resumed is not None:  # a loader's state after it was resumed is not always right
            return self._resumed
        if done and not ahead:
            state = self._state_now(done)
            self._snapshot = None if state is None else (epoch, state)
            return state
        of, snapshot = self._snapshot or (-1, None)
        if snapshot is not None and of == epoch and snapshot["at"] <= done:
            return snapshot
        return self._epoch_done

    def _state_now(self, at: int) -> dict[str, Any] | None:
        if _keeps_state(self._current):
            state = self._current.state_dict()
        elif _keeps_state(self._batches):
            state = self._batches.state_dict()  # type: ignore[union-attr]
        elif callable(getattr(self._batches, "get_state", None)):
            state = self._batches.get_state()  # type: ignore[union-attr]
        else:
            return None
        return {"state": state, "at": at, "whole": at == 0 and not self.once}

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
        if self._promise is not None and 0 < taken < self._promise:
            promised_by = "len(dataloader)" if self._len is None else "dataloader_len"
            raise DataLengthError(
                f"epoch {epoch} ended after {taken} of the {self._promise} batches that "
                f"{promised_by} promised; pass lookahead=True to go by the data itself"
            )
        if self.once:
            self.ran_dry(step)
        return not self.once

    def goes_past_promise(self, epoch: int) -> None:
        """Take note of a batch after the one from which on the loop has looked ahead."""
        if self._promise is not None and not self._warned_of_more:
            warn(
                f"epoch {epoch} has more than the {self._promise} batches that len(dataloader) "
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
        self._epoch_done = self._state_now(0)
        self.forget()

    def forget(self) -> None:
        """Let go of the open epoch's iterator."""
        self._batches = self._on_faith = self._current = None

    def epoch_len(self) -> int | None:
        """The length that is promised of the open epoch, or of the first where none was opened."""
        if self._opened:
            return self._promise
        if self._loader is None:
            return None if self._lookahead else self._len
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
                f"epoch {epoch} had more than the {self._promise} batches that len(dataloader) "
                "promised; the rest is dropped; pass lookahead=True to use it"
            )

    def _read_promise(self, loader: Iterable[Any]) -> int | None:
        if self._lookahead:
            return None
        if self._len is not None:
            return self._len
        if self._is_stream or _is_iterable_style(loader):
            return None
        try:
            return min(len(loader), checks.MOST)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None


class _Items:
    """What has `__getitem__` alone, as NumPy's arrays go: Python gives it an iterator."""

    def __getitem__(self, place: int) -> object:
        raise IndexError(place)


_SEQUENCES: tuple[Any, ...] = ([], (), range(1), range(2**70), "", b"", bytearray(), _Items())
_SEQUENCE_ITERATORS = tuple(type(iter(each)) for each in _SEQUENCES)


def _keeps_state(loader: object) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def _load_into(owner: Any, state: Any) -> None:
    (owner.load_state_dict if _keeps_state(owner) else owner.set_state)(state)


def _unless_empty(batches: Iterator[Any], loader: Iterable[Any]) -> Iterator[Any]:
    """`batches`, or those of a new iterator: some loaders come back at the end of their epoch."""
    first = list(islice(batches, 1))
    if not first:
        return iter(loader)
    return _before(first, batches)


def _before(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield first.pop()
    yield from rest


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


def _set_epoch(loader: object, epoch: int, seen: dict[int, object]) -> None:
    """Call `set_epoch(epoch)` on `loader` and on all that it draws from, once each."""
    if loader is None or id(loader) in seen:
        return
    seen[id(loader)] = loader
    set_epoch = getattr(loader, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    for name in ("sampler", "batch_sampler", "dataset"):
        _set_epoch(getattr(loader, name, None), epoch, seen)
