"""Any loader as epochs of batches: its length, where to look ahead, `set_epoch`, wrong lengths."""

from __future__ import annotations

from itertools import chain, islice
from types import FunctionType, WrapperDescriptorType

from . import _backend, checks
from .errors import DataExhaustedError, DataLengthError, log, not_stop, warn
from .missing import MISSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, SupportsIndex, TypeGuard

    from ._core import Lookahead

NEVER = 2**63 - 1
_MOST_AGAIN = 100
"""Batches: how often a loader's state is noted, which is how many are fetched again at most.

And how many a loader has given, after it was resumed, when its state is taken to be right: its
workers may tell of their places only once each has given a batch.
"""
_WRITTEN_IN_C: Any = (
    () if issubclass(FunctionType, WrapperDescriptorType) else WrapperDescriptorType
)
"""The type of an `__iter__` that is; PyPy tells no difference, and nothing counts as it there."""
_PLAIN = frozenset({list, tuple, range, str, bytes})
"""What has no state, no `set_epoch` and no data set. Looking for them takes longer than a step."""
_DEEPEST = 5
"""How many levels of samplers and data sets are followed in search of `set_epoch`."""


class Epoch:
    """One epoch of a source, as far as it was opened.

    Attributes:
        number: which epoch, from 0.
        batches: the iterator to fetch from.
        length: its number of batches, where that is promised.
        end_finder: what fetches for `batches` and finds the epoch's last batch, where that is not
            known beforehand; it ends before that batch, which it then holds.
        ends_itself: whether the iterator has more to do after the last batch: it is asked once
            more, as a `for` does.
        over: whether its last batch was handed over.
        must_reopen: whether the iterator is of no use any more, so that another has to be made.
    """

    __slots__ = ("batches", "end_finder", "ends_itself", "length", "must_reopen", "number", "over")

    def __init__(
        self,
        number: int,
        batches: Iterator[Any],
        length: int | None,
        end_finder: Lookahead | LastBatchTold | None,
        ends_itself: bool,
    ) -> None:
        self.number = number
        self.batches = batches
        self.length = length
        self.end_finder = end_finder
        self.ends_itself = ends_itself
        self.over = False
        self.must_reopen = False

    def look_ahead(self, kind: type[Lookahead]) -> None:
        """Find the end by looking ahead from here on."""
        self.end_finder = kind(self.batches)
        self.batches = iter(self.end_finder)
        self.length = None
        self.ends_itself = False


class LastBatchTold:
    """The batches of a loader whose `end_of_dataloader` is true at the last.

    It ends before that one, which it then holds.
    """

    __slots__ = ("_batches", "_loader", "fetched", "held")

    def __init__(self, loader: Any, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._batches = batches
        self.held: Any = MISSING
        self.fetched = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for batch in self._batches:
            self.fetched = True
            if not self._loader.end_of_dataloader:
                return batch
            self.held = batch
            break
        raise StopIteration

    def rest(self) -> Iterator[Any]:
        """What comes after the last batch."""
        return self._batches


class Source:
    """Opens one epoch after the other, and judges where they end.

    Attributes:
        given_len: the argument `dataloader_len`.
        single_pass: whether the batches can be gone through only once.
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
        self.single_pass = hasattr(type(self._loader), "__next__")
        self.given_len = (
            None if dataloader_len is None else checks.count("dataloader_len", dataloader_len)
        )
        self._lookahead = lookahead
        self._by_epochs = max_epochs is not None
        # A stream is taken exactly when asked for, since no epoch is at stake
        self._is_stream = self.single_pass and not self._by_epochs
        self._check(max_epochs)

        self._lookahead_kind = _backend.core.Lookahead
        self._resumed: dict[str, Any] | None = None  # the state from which to open an epoch
        self._skips = 0  # of a single-pass loader: all batches that were ever taken
        self._told_of_skipping = False
        self._opened = False
        self._epoch = -1  # the latest that was opened
        self._batches: Iterator[Any] | None = None
        self._tracked: _Tracked | None = None  # its batches, where the loader keeps state
        self._tracked_before: _Tracked | None = None  # those of the epoch before
        self._told = False  # whether the latest loader says which batch is its last
        self._length: int | None = None  # of the latest epoch, as far as it is promised

    def _check(self, max_epochs: int | None) -> None:
        if self._lookahead and self.given_len is not None:
            raise ValueError(
                f"lookahead=True: dataloader_len={self.given_len} says where an epoch ends; pass "
                "one of them"
            )
        if self.single_pass and (max_epochs or 0) > 1 and self.given_len is None:
            raise ValueError(
                f"max_epochs={max_epochs}: this dataloader is single-pass; give its epochs a "
                "dataloader_len, or pass a callable that returns a fresh iterable"
            )
        if self._loader is not None:
            self._check_lookahead(self._loader)

    def _check_lookahead(self, loader: Iterable[Any]) -> None:
        """Refuse a `lookahead` that does not go with how the loader tells of its end."""
        if self._lookahead and _tells_its_last(loader):
            raise ValueError(
                "lookahead=True: this dataloader looks ahead itself (it has end_of_dataloader); "
                "leave lookahead out"
            )
        needs_length = self._lookahead is False and self._by_epochs and not _tells_its_last(loader)
        if needs_length and self._promised_length(loader) is None:
            raise ValueError(
                "lookahead=False: max_epochs needs to know where an epoch ends; pass "
                "dataloader_len, or let the loop look ahead"
            )

    def open_epoch(self, number: int, taken: int) -> Epoch:
        """Begin epoch `number`, and skip those of its batches that were `taken` before.

        Raises:
            DataExhaustedError: the loader says that it is empty.
            ValueError: `lookahead` does not go with the loader.
        """
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = None  # and its workers, before there are new ones
        try:
            loader: Any = self._loader if self._load is None else self._fresh_loader(self._load)
            batches = self._iterate(loader, number, taken)
        except StopIteration as exception:
            raise not_stop(exception) from exception
        if self.given_len is not None:
            return Epoch(number, batches, self.given_len, None, False)
        self._told = _tells_its_last(loader)
        if self._told:
            told = LastBatchTold(loader, batches)
            return Epoch(number, told, None, told, not self.single_pass)
        if self._length is not None:
            return Epoch(number, batches, self._length, None, not self.single_pass)
        epoch = Epoch(number, batches, None, None, False)
        if self._lookahead or (self._lookahead is None and not self._is_stream):
            epoch.look_ahead(self._lookahead_kind)
        return epoch

    def may_look_ahead(self, epoch: Epoch) -> bool:
        """Whether the end of `epoch`, which was promised, may be looked for instead."""
        return self._lookahead is None and self.given_len is None and epoch.length is not None

    def _fresh_loader(self, load: Callable[[], Iterable[Any]]) -> Iterable[Any]:
        loader = load()
        if not _is_iterable(loader):
            raise TypeError(
                f"dataloader() returned {checks.shown(loader)}: it has to return an iterable"
            )
        return loader

    def _iterate(self, loader: Any, epoch: int, taken: int) -> Iterator[Any]:
        before = self._tracked_before if self._epoch == epoch else self._tracked
        resumed = self._resumed
        if resumed is not None and resumed["rest"]:
            _set_epoch(loader, epoch - 1)
            count = resumed["rest"] + (not self.single_pass)  # the last is to see its end
            next(islice(chain(*_resumed_at(loader, resumed)), count, count), None)
            resumed = None
        _set_epoch(loader, epoch)
        self._length = self._promised_length(loader)
        if self._lookahead is not None:
            self._check_lookahead(loader)
        if self._length == 0 and not _tells_its_last(loader):
            raise DataExhaustedError(f"epoch {epoch} has no batch: len(dataloader) is 0")
        first: list[Any] = []
        batches: Iterator[Any]
        if resumed is None:
            batches = iter(loader)
        else:
            first, batches = _resumed_at(loader, resumed)
            if resumed["whole"] and not first:
                resumed = None  # the epoch was begun as any other
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
                self.single_pass,
            )
            if self._epoch == epoch and self._tracked is not None:  # it is opened anew
                tracked.go_on_from(self._tracked)
            skips = self._skips or taken - tracked.begun
        if skips:
            self._skip(batches, skips, loader, epoch)
        if not isinstance(getattr(type(batches), "__iter__", None), _WRITTEN_IN_C):
            batches = chain(_Once(batches))
        self._tracked_before, self._tracked, self._epoch = before, tracked, epoch
        self._resumed = None
        self._opened = True
        self._skips = 0
        return batches

    def _skip(self, batches: Any, count: int, loader: object, epoch: int) -> None:
        """Take `count` of the `batches`."""
        is_sequence = type(batches) in _SEQUENCE_ITERATORS
        if is_sequence and not self.single_pass:
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

    def prepare_to_reopen(self, epoch: int, taken: int) -> None:
        """Let `epoch`, of which so many batches were taken, be opened anew."""
        self._resumed = self.state(taken, 1, epoch, False)
        self._batches = None

    def resume(self, loader: dict[str, Any] | None, steps: int) -> None:
        """Let the first epoch that is opened go on from what `state` returned."""
        self._resumed = loader
        self._skips = steps if self.single_pass and loader is None else 0

    def state(self, done: int, ahead: int, epoch: int, ended: bool) -> dict[str, Any] | None:
        """The loader's own state after `done` batches of `epoch`; None where it keeps none.

        It is the state after `at` batches, where the loader has given `ahead` more than `done`:
        those between are skipped when it is loaded. `whole` is whether that is the end of the
        epoch before. `rest` is how many batches end the epoch, where it is that of the one before.
        """
        if not self._opened:
            return self._resumed
        tracked = self._tracked
        if self._epoch != epoch and tracked is not None:  # the next one was opened already
            if ended:
                return tracked.before
            tracked = self._tracked_before
        if tracked is None:
            return None
        return tracked.state_at_end() if ended else tracked.state(done, ahead)

    def has_next_epoch(self, epoch: Epoch, taken: int, step: int) -> bool:
        """Judge that `epoch` ended, unforeseen, after `taken` batches, the last of them at `step`.

        Returns whether another epoch may begin.

        Raises:
            DataExhaustedError: it had no batch.
            DataLengthError: it had fewer than were promised.
        """
        number = epoch.number
        if taken == 0 and (number == 0 or not self.single_pass):
            raise DataExhaustedError(
                f"epoch {number} has no batch: the dataloader is empty or was consumed before"
            )
        if epoch.length is not None and 0 < taken < epoch.length:
            promised_by = "len(dataloader)" if self.given_len is None else "dataloader_len"
            raise DataLengthError(
                f"epoch {number} ended after {taken} of the {epoch.length} batches that "
                f"{promised_by} promised; pass lookahead=True to go by the data itself"
            )
        if taken and isinstance(epoch.end_finder, LastBatchTold):
            raise DataLengthError(
                f"epoch {number} ended after {taken} batches, but its loader's end_of_dataloader "
                "did not say so; pass dataloader_len"
            )
        if self.single_pass:
            self.warn_ran_dry(step)
        return not self.single_pass

    def ask_once_more(self, epoch: Epoch, left: bool) -> None:
        """Ask the iterator of an epoch that is over once more, as a `for` does.

        An exception of an iterator that was `left` in between is only logged: an interrupt may have
        ended its workers, and all batches of the epoch were had.
        """
        finder = epoch.end_finder
        told = isinstance(finder, LastBatchTold)
        try:
            for _ in finder.rest() if isinstance(finder, LastBatchTold) else epoch.batches:
                break
            else:
                return
        except Exception as exception:
            if not left:
                raise not_stop(exception)  # noqa: B904 (mostly it is the exception itself)
            log("epoch %d: its iterator failed after its last batch: %r", epoch.number, exception)
            return
        if told:
            warn(
                f"epoch {epoch.number} had more batches after the one at which its loader's "
                "end_of_dataloader was true; the rest is dropped"
            )
        else:
            warn(
                f"epoch {epoch.number} had more than the {epoch.length} batches that "
                "len(dataloader) promised; the rest is dropped; pass lookahead=True to use it"
            )

    def warn_no_batches_left(self, epoch: Epoch, taken: int) -> None:
        """Warn that the last epoch was resumed after `taken` batches, and has no more."""
        warn(
            f"the run is over: epoch {epoch.number}, its last, was resumed after {taken} batches "
            "and has no more"
        )

    def warn_ran_dry(self, step: int) -> None:
        """Warn that the source ended at `step`, before the run's limit."""
        warn(f"the dataloader ran dry at global_step {step}, before the run's limit")

    def forget(self) -> None:
        """Let go of the open epoch's iterator, but not of the states that may be asked for."""
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = None

    def epoch_len(self) -> int | None:
        """The length that is promised of the open epoch, or of the first where none was opened."""
        if self._opened:
            return self._length
        if self._loader is None:
            return self.given_len
        return self._promised_length(self._loader)

    def ends_at(self) -> int | None:
        """The same, where the epoch is ended by it."""
        told = self._told or (self._loader is not None and _tells_its_last(self._loader))
        return self.given_len if told else self.epoch_len()

    def fixed_len(self) -> int | None:
        """The length of every epoch, where that is known beforehand."""
        if self._loader is None or any(
            callable(getattr(part, "set_epoch", None)) for part in _parts(self._loader)
        ):
            return None
        return self._promised_length(self._loader)

    def close(self) -> None:
        """Close the open epoch's iterator, unless it is the dataloader that the user passed."""
        batches = self._batches
        self.forget()
        close = getattr(batches, "close", None)
        if callable(close) and not self.single_pass and not getattr(batches, "gi_running", False):
            close()

    def _promised_length(self, loader: Iterable[Any]) -> int | None:
        if self._lookahead:
            return None
        if self.given_len is not None:
            return self.given_len
        if self._is_stream or _is_iterable_style(loader):
            return None
        return _length_of(loader)


class _Once:
    """Hands over an iterator, for `chain`, without asking it for itself.

    Each `for` asks an iterator for itself, and one epoch is gone over with many. An `__iter__` that
    is written in Python would see them, and some begin anew there.
    """

    __slots__ = ("__iter__",)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.__iter__ = [batches].pop


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
    except Exception as exception:
        log("len(dataloader) is not known: %r", exception)
        return None


def _owner_of_state(loader: object, batches: object) -> object | None:
    if type(loader) in _PLAIN:
        return None
    for owner in (loader, batches):
        if _keeps_state(owner):
            return owner
    return batches if callable(getattr(batches, "get_state", None)) else None


def _resumed_at(loader: Any, resumed: dict[str, Any]) -> tuple[list[Any], Iterator[Any]]:
    """An iterator of `loader` from the state on, and the batch before it, if that was taken."""
    if _keeps_state(loader):
        loader.load_state_dict(resumed["state"])
    batches: Any = iter(loader)
    owner: Any = _owner_of_state(loader, batches)
    if owner is None:
        return [], batches
    if owner is batches:
        (owner.load_state_dict if _keeps_state(owner) else owner.set_state)(resumed["state"])
    first = []
    if resumed["whole"]:
        first = list(islice(batches, 1))
        if not first or resumed["cut"]:  # it came back in the epoch that is over
            return [], iter(loader)
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
        single_pass: whether the loader can be gone through only once.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        first: list[Any],
        owner: Any,
        before: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        right_after: int,
        single_pass: bool,
    ) -> None:
        self._batches: Iterator[Any] = batches
        self._first = first
        self._owner: Any = owner
        self.before = before
        self._resumed = resumed
        self._right_after = 1 if resumed is None else right_after
        self._single_pass = single_pass
        self.begun: int = 0 if resumed is None else resumed["at"]
        self._taken = 0
        self._failed = False  # the latest fetch did, or it is not over: the state may be any
        self._noted: list[dict[str, Any]] = []  # the first, and the last two
        self._at_end: dict[str, Any] | None = None
        self._ended = False  # whether the iterator was

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._taken % _MOST_AGAIN == 1 and not self._failed:
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

    def state(self, done: int, ahead: int) -> dict[str, Any] | None:
        """The state after `done` batches of the epoch, where `ahead` more were taken."""
        is_right = done - self.begun >= self._right_after and not (ahead or self._failed)
        is_here = done == self.begun + self._taken
        if is_right and is_here and self._owner is not None:
            return self._state_now(done)
        earlier = [noted for noted in self._noted if noted["at"] <= done]
        return earlier[-1] if earlier else self.before

    def go_on_from(self, broken: _Tracked) -> None:
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
            self._noted[1:-1] = []
            self._noted.append(self._state_now(self.begun + self._taken))

    def _state_now(self, at: int) -> dict[str, Any]:
        get_state = getattr(self._owner, "state_dict", None) or self._owner.get_state
        whole = at == 0 and not self._single_pass
        return {
            "state": get_state(),
            "at": at,
            "whole": whole,
            "cut": whole and not self._ended,
            "rest": 0,
        }


def _is_iterable(dataloader: object) -> TypeGuard[Iterable[Any]]:
    kind = type(dataloader)
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def _is_iterable_style(loader: object) -> bool:
    """Whether `loader` loads a data set that is only iterated, so that its length is a guess.

    PyTorch gives such data sets a `__getitem__` that only raises, hence the look at their class.
    """
    dataset = None if type(loader) in _PLAIN else getattr(loader, "dataset", None)
    if dataset is None:
        return False
    kind = type(dataset)
    named = any(base.__name__ == "IterableDataset" for base in kind.__mro__)
    return named or not hasattr(kind, "__getitem__")


def _tells_its_last(loader: object) -> bool:
    """Whether the loader says itself which batch is its last, as Accelerate's do."""
    if type(loader) in _PLAIN:
        return False
    return isinstance(getattr(loader, "end_of_dataloader", None), bool)


def _parts(loader: object) -> list[object]:
    """`loader` and what it draws from, a few levels deep, once each."""
    parts: dict[int, object] = {}
    found = [(loader, 1)]
    while found:
        part, level = found.pop()
        if part is None or id(part) in parts:
            continue
        parts[id(part)] = part
        if level < _DEEPEST:
            names = ("dataset", "batch_sampler", "sampler")
            found += [(getattr(part, name, None), level + 1) for name in names]
    return list(parts.values())


def _set_epoch(loader: object, epoch: int) -> None:
    if type(loader) in _PLAIN:
        return
    for part in _parts(loader):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
