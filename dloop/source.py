"""Any loader as epochs of batches: its length, where to look ahead, `set_epoch`, wrong lengths."""

from __future__ import annotations

from collections import deque, namedtuple
from itertools import chain, count, islice
from time import monotonic
from types import FunctionType, WrapperDescriptorType

from . import _backend, checks, loaders
from .batch_lists import BatchLists
from .errors import DataExhaustedError, DataLengthError, log, not_stop, warn
from .loader_state import TrackedBatches, owner_of_state, resumed_at
from .missing import MISSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NamedTuple, SupportsIndex

    from ._core import Lookahead
    from .profile import Profile

    class BegunFields(NamedTuple):
        """The fields of a Begun."""

        loader: Any
        samplers: list[Any]
        batches: Iterator[Any]
        first: list[Any]
        dropped: int
else:
    # typing would take longer to import than all of dloop
    BegunFields = namedtuple("BegunFields", "loader samplers batches first dropped")

NEVER = 2**63 - 1
LONG = 10
"""Seconds: how long it takes to go on in an epoch before there is a warning."""
_WRITTEN_IN_C: Any = (
    () if issubclass(FunctionType, WrapperDescriptorType) else WrapperDescriptorType
)
"""The type of an `__iter__` that is; PyPy tells no difference, and nothing counts as it there."""


class Epoch:
    """One epoch of a source, as far as it was opened.

    Attributes:
        number: which epoch, from 0.
        batches: the iterator to fetch from.
        length: its number of batches, where that is promised.
        end_finder: what fetches for `batches` and finds the epoch's last batch, where that is not
            known beforehand; it ends before that batch, which it then holds.
        lists: what makes lists of the batches, where a step takes several.
        ends_itself: whether the iterator has more to do after the last batch: it is asked once
            more, as a `for` does.
        over: whether its last batch was handed over.
        must_reopen: whether an interrupt may have cost a batch, or ended the iterator, so that
            another has to be made.
        was_interrupted: the same of a single-pass loader, which has no other, up to its next batch.
        was_left: whether the loop was left in this epoch, and entered again.
        may_have_more: whether the iterator may have more batches than were to come.
    """

    __slots__ = (
        "_fetched_before",
        "batches",
        "end_finder",
        "ends_itself",
        "length",
        "lists",
        "may_have_more",
        "must_reopen",
        "number",
        "over",
        "was_interrupted",
        "was_left",
    )

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
        self.lists: BatchLists | None = None
        self.over = False
        self.must_reopen = False
        self.was_interrupted = False
        self.was_left = False
        self.may_have_more = False

    @property
    def tells_its_last(self) -> bool:
        """Whether the loader says itself which batch is the epoch's last."""
        return isinstance(self.end_finder, LastBatchTold)

    def gather(self, size: int, given: int) -> None:
        """Let a step take a list of so many batches, after so many were given."""
        end = NEVER if self.length is None else self.length
        has_finder = self.end_finder is not None
        self._fetched_before = -1
        self.batches = self.lists = BatchLists(self.batches, size, end, given, has_finder)

    def fetched_ahead(self) -> int:
        """How many batches were fetched and not given."""
        gathered = 0 if self.lists is None else len(self.lists.gathered)
        return gathered + (self.end_finder is not None and self.end_finder.held is not MISSING)

    def note_interrupt(self) -> None:
        """Take note of an interrupt of a single-pass loader, which may have ended its iterator."""
        self.was_interrupted = True
        if self.lists is not None:
            self._fetched_before = self.lists.given + self.fetched_ahead()

    def went_on(self, lists: BatchLists) -> bool:
        """Whether a batch has come since the latest interrupt."""
        return lists.given + self.fetched_ahead() > self._fetched_before

    def take_held(self) -> Any:
        """The batch that was fetched and not given, or the list of them; MISSING if none was."""
        held: Any = MISSING
        if self.end_finder is not None:
            held, self.end_finder.held = self.end_finder.held, MISSING
        if self.lists is None:
            return held
        gathered, self.lists.gathered = self.lists.gathered, []
        if held is not MISSING:
            gathered.append(held)
        self.lists.given += len(gathered)
        return gathered or MISSING

    def go_on_from(self, broken: Epoch) -> Any:
        """Take over what was fetched of the same epoch and not given; MISSING if all could be."""
        if self.lists is not None and broken.lists is not None:
            self.lists.given -= broken.fetched_ahead()
            self.lists.gathered = broken.lists.gathered
            broken.lists.gathered = []
        held = broken.take_held()
        if held is MISSING:
            return MISSING
        if self.end_finder is not None:
            self.end_finder.held = held if self.lists is None else held[0]
        elif self.lists is not None:
            self.lists.gathered += held
        else:
            return held
        return MISSING

    def go_on(self) -> Iterator[Any]:
        """The iterator to fetch from after an exception, which has ended a generator."""
        if self.end_finder is not None:
            batches = iter(self.end_finder)
            if self.lists is None:
                self.batches = batches
            else:
                self.lists.batches = batches
        return self.batches

    def rest(self) -> Iterator[Any]:
        """What the loader's iterator has after the last batch."""
        if isinstance(self.end_finder, LastBatchTold):
            return self.end_finder.rest()
        return self.batches if self.lists is None else self.lists.batches


class Begun(BegunFields):
    """An epoch of which the first batches were dropped, to find the place of `start_step`.

    Attributes:
        loader: that of the epoch.
        samplers: the parts of it that have the epoch's number.
        batches: its iterator.
        first: the batch before it.
        dropped: how many came before that.
    """

    __slots__ = ()


class LastBatchTold:
    """The batches of a loader whose `end_of_dataloader` is true at the last.

    It ends before that one, which it then holds.
    """

    __slots__ = ("_batches", "_loader", "held")

    def __init__(self, loader: Any, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._batches = batches
        self.held: Any = MISSING

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for batch in self._batches:
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
        batches_per_step: the argument of this name.
        single_pass: whether the batches can be gone through only once.
        agree: called with the number of an epoch and its length, returns the length on which all
            processes agree; None where there are no others.
        profile: what measures how long batches take, or None.
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | Callable[[], Iterable[Any]],
        dataloader_len: SupportsIndex | None,
        lookahead: bool | None,
        max_epochs: int | None,
        batches_per_step: SupportsIndex | None,
    ) -> None:
        if lookahead is not None and not isinstance(lookahead, bool):
            raise TypeError(f"lookahead={checks.shown(lookahead)}: pass True, False or None")
        self._loader: Iterable[Any] | None = None
        self._load: Callable[[], Iterable[Any]] | None = None
        if loaders.is_iterable(dataloader):
            loaders.refuse_table("dataloader", dataloader)
            self._loader = dataloader
        elif callable(dataloader):
            self._load = dataloader
        else:
            raise TypeError(
                f"dataloader={checks.shown(dataloader)}: pass an iterable, or a callable that "
                "returns a fresh one for each epoch"
            )
        self.single_pass = loaders.is_single_pass(self._loader)
        self.given_len = (
            None if dataloader_len is None else checks.count("dataloader_len", dataloader_len)
        )
        self.batches_per_step = (
            None if batches_per_step is None else checks.count("batches_per_step", batches_per_step)
        )
        self.agree: Callable[[int, int | None], int | None] | None = None
        self.profile: Profile | None = None
        self._lookahead = lookahead
        self._by_epochs = max_epochs is not None
        # A stream is taken exactly when asked for, since no epoch is at stake
        self._is_stream = self.single_pass and not self._by_epochs
        self._check(max_epochs)

        self._resumed: dict[str, Any] | None = None  # the state from which to open an epoch
        self._skips = 0  # of a single-pass loader: all batches that were ever taken
        self._begun_within = (-1, 0)  # an epoch, and how many of its batches are not skipped
        self._begun: Begun | None = None  # the epoch of `start_step`, if it was gone through
        self._opened = False
        self._epoch = -1  # the latest that was opened
        self._batches: Iterator[Any] | None = None
        self._tracked: TrackedBatches | None = None  # its batches, where the loader keeps state
        self._tracked_before: TrackedBatches | None = None  # those of the epoch before
        self._samplers: list[Any] = []  # whose epoch has to be that of the latest
        self._told = False  # whether the latest loader says which batch is its last
        self._length: int | None = None  # of the latest epoch, as far as it is promised
        self._is_cut = False  # whether another process has fewer batches

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
        tells_its_last = loaders.tells_its_last(loader)
        if self._lookahead and tells_its_last:
            raise ValueError(
                "lookahead=True: this dataloader looks ahead itself (it has end_of_dataloader); "
                "leave lookahead out"
            )
        needs_length = self._lookahead is False and self._by_epochs and not tells_its_last
        if needs_length and self._promised_length(loader) is None:
            raise ValueError(
                "lookahead=False: max_epochs needs to know where an epoch ends; pass "
                "dataloader_len, or let the loop look ahead"
            )

    def open_epoch(self, number: int, taken: int, was_left: bool) -> Epoch:
        """Begin epoch `number`, and skip those of its batches that were `taken` before.

        If the loop `was_left` in the epoch before, an interrupt may have ended the workers that
        the loader keeps. So an error is believed only if it comes with new workers too.

        Raises:
            DataExhaustedError: the loader says that it is empty.
            ValueError: `lookahead` does not go with the loader.
        """
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = None  # and its workers, before there are new ones
        try:
            loader: Any = self._next_loader() if self._begun is None else self._begun.loader
            if self.profile is None:
                batches = self._iterate(loader, number, taken)
            else:
                begun = self.profile.begin_opening()
                batches = self.profile.around_batches(self._iterate(loader, number, taken))
                self.profile.end_opening(begun)
        except StopIteration as exception:
            raise not_stop(exception) from exception
        except Exception:
            if was_left and self._loader is not None and loaders.renew_workers(self._loader):
                return self.open_epoch(number, taken, False)
            raise
        self._told = self.given_len is None and loaders.tells_its_last(loader)
        if self.given_len is not None or self._is_cut:
            epoch = Epoch(number, batches, self._length, None, False)
        elif self._told:
            told = LastBatchTold(loader, batches)
            epoch = Epoch(number, told, None, told, not self.single_pass)
        elif self._length is not None:
            epoch = Epoch(number, batches, self._length, None, not self.single_pass)
        elif self._lookahead or (self._lookahead is None and not self._is_stream):
            ahead = _backend.core.Lookahead(batches)
            epoch = Epoch(number, iter(ahead), None, ahead, False)
        else:
            epoch = Epoch(number, batches, None, None, False)
        if number == self._begun_within[0]:
            epoch.may_have_more = self._begun_within[1] > 0
        if self.batches_per_step is not None:
            epoch.gather(self.batches_per_step, taken)
        return epoch

    def _next_loader(self) -> Iterable[Any]:
        if self._load is None:
            assert self._loader is not None
            return self._loader
        loader = self._load()
        if not loaders.is_iterable(loader):
            raise TypeError(
                f"dataloader() returned {checks.shown(loader)}: it has to return an iterable"
            )
        loaders.refuse_table("dataloader()", loader)
        return loader

    def _iterate(self, loader: Any, epoch: int, taken: int) -> Iterator[Any]:
        is_anew = self._epoch == epoch
        not_skipped = self._begun_within[1] if epoch == self._begun_within[0] else 0
        before = self._tracked_before if is_anew else self._tracked
        resumed = self._resumed
        if resumed is not None and resumed["rest"]:
            loaders.set_epoch(loader, epoch - 1)
            rest = resumed["rest"] + (not self.single_pass)  # the last is to see its end
            next(islice(chain(*resumed_at(loader, resumed)), rest, rest), None)
            resumed = None
        begun, self._begun = self._begun, None  # once: an iterator that is made anew has to skip
        dropped = not_skipped if begun is None else begun.dropped
        samplers = loaders.set_epoch(loader, epoch) if begun is None else begun.samplers
        self._length = promised = self._promised_length(loader)
        if self.agree is not None:
            self._length = self.agree(epoch, promised)
            self._is_cut = self._length != promised
        if self._lookahead is not None:
            self._check_lookahead(loader)
        if self._length == 0 and not loaders.tells_its_last(loader):
            raise DataExhaustedError(f"epoch {epoch} has no batch: len(dataloader) is 0")
        first: list[Any] = []
        batches: Iterator[Any]
        if begun is not None:
            first, batches = begun.first, begun.batches
        elif resumed is not None:
            first, batches = resumed_at(loader, resumed)
            if resumed["whole"] and not first:
                resumed = None  # the epoch was begun as any other
        elif taken > not_skipped or (epoch and not self._opened and not not_skipped):
            first, batches = _begun_in_order(loader, samplers, epoch)
        else:
            batches = iter(loader)
        self._batches = batches
        owner = owner_of_state(loader, batches)
        tracked = None
        skips = self._skips or taken - dropped
        if owner is not None:  # else it kept state when that was saved
            tracked = TrackedBatches(
                batches,
                first,
                owner,
                self._resumed or (None if before is None else before.state_at_end()),
                resumed,
                dropped,
                loaders.counts_batches(loader),
                self.single_pass,
            )
            if is_anew and self._tracked is not None:
                tracked.go_on_from(self._tracked)
            skips = self._skips or taken - tracked.begun
            batches = tracked
        elif first:
            batches = chain(first, batches)
        if skips:
            batches = self._without_first(skips, loader, batches, epoch)
        if taken > not_skipped:
            has_state = tracked is not None and (resumed or tracked.tells_its_state())
            if not loaders.may_repeat_its_order(loader, bool(has_state), bool(epoch or is_anew)):
                _warn_of_order(taken, epoch)
        if not isinstance(getattr(type(batches), "__iter__", None), _WRITTEN_IN_C):
            batches = chain(_Once(batches))
        self._tracked_before, self._tracked, self._epoch = before, tracked, epoch
        self._samplers = samplers
        self._resumed = None
        self._opened = True
        self._skips = 0
        return batches

    def _without_first(
        self, skips: int, loader: object, batches: Iterator[Any], epoch: int
    ) -> Iterator[Any]:
        """What is left of the `batches`, which just began, after so many of them."""
        indexed = None if self.single_pass else loaders.indexed_from(skips, loader, batches)
        if indexed is not None:
            return indexed
        begun = monotonic()
        next(islice(batches, skips, skips), None)
        _tell_of_dropped(epoch, skips, batches, monotonic() - begun)
        return batches

    def prepare_to_reopen(self, epoch: int, taken: int) -> None:
        """Let `epoch`, of which so many batches were taken, be opened anew."""
        self._resumed = self.state(taken, 1, epoch, False)
        self._batches = None
        if self._loader is not None:
            loaders.renew_workers(self._loader)

    def resume(
        self,
        loader: dict[str, Any] | None,
        steps: int,
        epochs: int,
        epoch_steps: int,
        fast_forward: bool,
    ) -> None:
        """Let the first epoch that is opened go on from what `state` returned.

        Args:
            loader: that.
            steps: how many steps were done.
            epochs: how many epochs are complete.
            epoch_steps: how many steps of the next one were done.
            fast_forward: whether the loader is set forward; else it is left as it is.
        """
        if not fast_forward:
            self._begun_within = epochs, self.batches_in(epoch_steps)
            return
        self._resumed = loader
        if self.single_pass and loader is None:
            self._skips = self.batches_in(steps)
            if self.given_len is not None and epochs:  # their last lists may have been shorter
                self._skips = epochs * self.given_len + self.batches_in(epoch_steps)

    def state(self, done: int, ahead: int, epoch: int, ended: bool) -> dict[str, Any] | None:
        """The loader's own state after `done` batches of `epoch`; None where it keeps none.

        It is the state after `at` batches, where the loader has given `ahead` more than `done`:
        those between are skipped when it is loaded. `whole` is whether that is the end of the
        epoch before. `rest` is how many batches end the epoch, where it is that of the one before.
        """
        if not self._opened:
            return self._resumed
        for sampler in self._samplers:
            if sampler.epoch != self._epoch:
                warn(
                    f"epoch {self._epoch} has the order of epoch {sampler.epoch}, which its "
                    "dataloader has set itself, so that a resumed run may have another; set up the "
                    "dataloader for this loop alone"
                )
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
        if taken and epoch.tells_its_last:
            raise DataLengthError(
                f"epoch {number} ended after {taken} batches, but its loader's end_of_dataloader "
                "did not say so; pass dataloader_len"
            )
        if self.single_pass:
            self.warn_ran_dry(step)
        return not self.single_pass

    def ask_once_more(self, epoch: Epoch) -> None:
        """Ask the iterator of an epoch that is over once more, as a `for` does.

        If the loop was left in this epoch, an exception is only logged: an interrupt may have ended
        the iterator's workers, and all batches of the epoch were had.
        """
        try:
            for _ in epoch.rest():
                break
            else:
                return
        except Exception as exception:
            if not epoch.was_left:
                raise not_stop(exception)  # noqa: B904 (mostly it is the exception itself)
            log("epoch %d: its iterator failed after its last batch: %r", epoch.number, exception)
            return
        if epoch.may_have_more:
            return
        if epoch.tells_its_last:
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

    def steps_per_epoch(self) -> int | None:
        """The steps of every epoch, where that is known beforehand."""
        length = self.fixed_len() if self.given_len is None else self.given_len
        return self.steps_in(length) if length else None

    def expected_steps(self) -> tuple[int | None, bool]:
        """The steps that an epoch will have, and whether that is certain of every epoch.

        None where it is not known, and NEVER where the only epoch goes on as long as the run does.
        """
        steps = self.steps_per_epoch()
        if steps is not None:
            return steps, True
        length = self.epoch_len()
        if length is not None:
            return self.steps_in(length), False
        tells_its_last = self._loader is not None and loaders.tells_its_last(self._loader)
        goes_on = self._is_stream and not self._lookahead and not tells_its_last
        return NEVER if goes_on else None, True

    def steps_in_epoch(self, number: int, most: int, iterates: bool) -> int | None:
        """The steps of an epoch, if there are no more than `most`, else None; 0 if not known.

        Where no length is promised, they are fetched and dropped, if it `iterates`. An epoch that
        has more goes on from there when it is opened.

        Raises:
            DataExhaustedError: it has no batch.
        """
        loader: Any = self._next_loader()
        samplers = loaders.set_epoch(loader, number)
        length = self._promised_length(loader)
        if self.agree is not None:
            length = self.agree(number, length)
        if length is None and not iterates:
            return 0
        wanted = self.batches_in(most)
        if length is None:
            try:
                length = self._begin(loader, samplers, number, wanted)
            except StopIteration as exception:
                raise not_stop(exception) from exception
        if length == 0:
            raise DataExhaustedError(f"epoch {number} has no batch: the dataloader is empty")
        return self.steps_in(length) if length <= wanted else None

    def _begin(self, loader: Any, samplers: list[Any], epoch: int, drops: int) -> int:
        """Drop the first batches of an epoch. Returns how many it has: all, or one more."""
        began = monotonic()
        place = count()
        batches = self._batches = iter(loader)
        deque(zip(islice(batches, drops), place), 0)
        dropped = next(place)
        _tell_of_dropped(epoch, dropped, batches, monotonic() - began)
        first = list(islice(batches, 1)) if dropped == drops else []
        self._begun = Begun(loader, samplers, batches, first, dropped) if first else None
        return dropped + len(first)

    def take_over(self, other: Source) -> None:
        """Go on in the epoch in which another source was when it looked for its place."""
        self._begun, self._batches = other._begun, other._batches

    def steps_in(self, batches: int) -> int:
        """How many steps so many batches of an epoch make."""
        return -(-batches // (self.batches_per_step or 1))

    def batches_in(self, steps: int) -> int:
        """How many batches so many steps within an epoch take, but for a shorter last list."""
        return steps * (self.batches_per_step or 1)

    def epoch_len(self) -> int | None:
        """The length that is promised of the open epoch, or of the first where none was opened."""
        if self._opened:
            return self._length
        if self._loader is None:
            return self.given_len
        return self._promised_length(self._loader)

    def ends_at(self) -> int | None:
        """The same, where the epoch is ended by it."""
        told = self._told or (self._loader is not None and loaders.tells_its_last(self._loader))
        return self.given_len if told else self.epoch_len()

    def fixed_len(self) -> int | None:
        """The length of every epoch, where that is known beforehand."""
        if self._loader is None or loaders.has_set_epoch(self._loader):
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
        return None if self._is_stream else loaders.length_of(loader)


def _begun_in_order(
    loader: Any, samplers: list[Any], epoch: int
) -> tuple[list[Any], Iterator[Any]]:
    """An iterator of `loader` that has the order of `epoch`, and the batch before it, if taken.

    Some loaders, as Fabric's, set the epoch of their samplers themselves: to how often they were
    iterated before. They are begun anew until that is `epoch`.
    """
    batches: Iterator[Any] = iter(loader)
    if not samplers:
        return [], batches
    reached = -1
    while True:
        first = list(islice(batches, 1))
        epochs = [sampler.epoch for sampler in samplers if sampler.epoch != epoch]
        if not epochs or not first:
            return first, batches
        if not reached < epochs[0] < epoch:
            warn(
                f"epoch {epoch} is gone on with in the order of epoch {epochs[0]}, which its "
                "dataloader has set itself, so that samples may come twice or not at all; set up "
                "the dataloader anew before the loop goes on"
            )
            return first, batches
        reached = epochs[0]
        batches = iter(loader)


def _tell_of_dropped(epoch: int, dropped: int, batches: Iterator[Any], seconds: float) -> None:
    if not loaders.makes_nothing(batches):
        log("epoch %d: %d batches were fetched and dropped, in %.1f s", epoch, dropped, seconds)
    if seconds > LONG:
        warn(
            f"epoch {epoch}: to go on, {dropped} batches were fetched and dropped, which took "
            f"{seconds:.0f} seconds; use a dataloader with state_dict, or one that is indexed"
        )


def _warn_of_order(taken: int, epoch: int) -> None:
    warn(
        f"epoch {epoch} goes on after {taken} batches, but its dataloader shuffles in an order "
        "that cannot be known to repeat, so that samples may come twice or not at all; use a "
        "sampler with set_epoch, or a dataloader that saves its order"
    )


class _Once:
    """Hands over an iterator, for `chain`, without asking it for itself.

    Each `for` asks an iterator for itself, and one epoch is gone over with many. An `__iter__` that
    is written in Python would see them, and some begin anew there.
    """

    __slots__ = ("__iter__",)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.__iter__ = [batches].pop
