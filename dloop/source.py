"""Any dataloader as epochs of batches: how long they are, how a place is reached, how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from time import monotonic
from types import FunctionType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any
from weakref import ref

from . import checks, loaders
from .errors import DataLengthError, log, no_batch, not_stop, warn
from .loader_state import TrackedBatches, owner_of_state, resumed_at
from .same_sample import SavedPlace

if TYPE_CHECKING:
    from ._core import Engine, Lookahead
    from .state import Position

LONG = 10
"""Seconds: if reaching a place takes longer, dloop warns."""
_WRITTEN_IN_C: Any = (
    () if issubclass(FunctionType, WrapperDescriptorType) else WrapperDescriptorType
)
"""The type of an `__iter__` written in C; on PyPy there is no such type."""


def telling_its_last(loader: Any, batches: Iterator[Any], engine: Engine) -> Iterator[Any]:
    """Return the batches of a loader whose `end_of_dataloader` is true at its last."""
    weak = ref(engine)  # which refers to this

    def told(batch: Any) -> Any:
        if loader.end_of_dataloader:
            weak().ends_in(1)  # type: ignore[union-attr]
        return batch

    return map(told, batches)


def begun_once(batches: Iterator[Any]) -> Iterator[Any]:
    """Return an iterator over `batches` that does not call `iter()`, which may begin anew."""
    if isinstance(getattr(type(batches), "__iter__", None), _WRITTEN_IN_C):
        return batches
    return map(next, repeat(batches))


class Source:
    """Opens one epoch after the other, and judges how they end.

    Attributes:
        given_len: the argument `dataloader_len`.
        single_pass: whether the batches can be iterated only once.
        epoch: the epoch that was opened last; -1 before the first.
        length: its length, if that is what ends it.
        promised: its length, if it is known; fractions of an epoch refer to it.
    """

    def __init__(
        self,
        dataloader: Any,
        dataloader_len: object,
        lookahead: object,
        max_epochs: float | None,
        ahead: int = 1,
    ) -> None:
        self._ahead = ahead
        self._lookahead = None if lookahead is None else checks.flag("lookahead", lookahead)
        self._by_epochs = max_epochs is not None
        self.given_len = (
            None if dataloader_len is None else checks.count("dataloader_len", dataloader_len)
        )
        self._loader: Any = None
        self._load: Callable[[], Any] | None = None
        if loaders.is_iterable(dataloader):
            loaders.refuse_no_batches("dataloader", dataloader)
            self._loader = dataloader
        elif callable(dataloader):
            self._load = dataloader
        else:
            raise TypeError(
                f"dataloader={checks.shown(dataloader)}: pass an iterable, or a callable that "
                "returns one for each epoch"
            )
        self.single_pass = loaders.is_single_pass(self._loader)
        self._check(max_epochs)
        self._resumed: dict[str, Any] | None = None  # the loader's state at the place to open
        self._skips = 0  # the batches to skip in a single-pass source
        self._saved = SavedPlace()
        self._open: Any = None  # the loader of the latest epoch
        self.epoch = -1
        self._batches: Iterable[Any] | None = None  # the iterator of the loader
        self._rest: Iterator[Any] | None = None  # what is asked once more after the last batch
        self._end_finder: Lookahead | None = None
        self._tracked: TrackedBatches | None = None  # the batches, if the loader keeps state
        self._tracked_before: TrackedBatches | None = None  # those of the epoch before
        self._samplers: list[Any] = []  # whose epoch has to be the latest
        self.length: int | None = None
        self.promised: int | None = None

    def _check(self, max_epochs: float | None) -> None:
        if self._lookahead and self.given_len is not None:
            raise ValueError("lookahead=True: dataloader_len ends the epochs; pass one of them")
        if self.single_pass and (max_epochs or 0) > 1 and self.given_len is None:
            raise ValueError(
                f"max_epochs={max_epochs}: this dataloader is single-pass; pass dataloader_len as "
                "the length of its epochs, or a callable that returns a fresh iterable"
            )
        if self._loader is not None:
            self._check_lookahead(self._loader)

    def _check_lookahead(self, loader: Any) -> None:
        """Refuse a `lookahead` that contradicts the loader."""
        tells_its_last = self._tells_its_last(loader)
        if self._lookahead and tells_its_last:
            raise ValueError("lookahead=True: this dataloader has end_of_dataloader; leave it out")
        needs_end = self._by_epochs or (self._is_shared and not self.single_pass)
        if self._lookahead is not False or not needs_end or tells_its_last:
            return
        if self._promised_length(loader) is None:
            whose = "max_epochs" if self._by_epochs else "sync"
            raise ValueError(
                f"lookahead=False: {whose} needs to know where an epoch ends; pass "
                "dataloader_len, or leave lookahead out"
            )

    @property
    def _is_shared(self) -> bool:
        """Whether processes agree on where epochs end."""
        return self._ahead > 1

    def _tells_its_last(self, loader: Any) -> bool:
        return not self._is_shared and loaders.tells_its_last(loader)  # others hear of it too late

    # Opening

    def open(
        self,
        epoch: int,
        place: int,
        engine: Engine,
    ) -> Iterable[Any]:
        """Open `epoch` at a place and return its other batches; set `length`.

        Args:
            epoch: the number of the epoch.
            place: how many of its batches were taken; of a single-pass source, how many in all.
            engine: what an end finder tells of the last batch.

        Raises:
            ValueError: `lookahead` contradicts the loader.
        """
        try:
            if type(self._loader) in loaders.PLAIN and self._lookahead is not True:
                return self._open_plain(epoch, place)
            if self.keeps_iterator:
                assert self._batches is not None
                self._begin(self._loader, epoch)  # its iterator continues
                self.epoch = epoch
                return self._batches
            self.forget()  # frees workers before new ones begin
            loader = self._open = self._loader if self._load is None else self._load_for(epoch)
            if self._load is not None and self._saved.samples:
                reached = self._place_in(loader)
                # Without a call in between, so that an interrupt finds both or neither
                engine.epoch_start, self._saved.samples = engine.epoch_start + place - reached, 0
                place = reached
            fetched = self._iterate(loader, epoch, place)
        except StopIteration as exception:
            raise not_stop(exception) from exception
        is_told = self._tells_its_last(loader) and self.given_len is None
        batches: Iterable[Any] = fetched
        if is_told:
            self.length = None
            batches = telling_its_last(loader, fetched, engine)
        elif self.length is None and (self._lookahead or self._looks_ahead()):
            batches = self._end_finder = engine.ahead(fetched, self._ahead)
        is_cut = self.given_len is not None or self._left_in(epoch) > 0 or self.single_pass
        is_asked = not is_cut and (self.length is not None or is_told)
        self._rest = fetched if is_asked else None
        dries = self.single_pass and self._end_finder is not None
        engine.ends.by_source = "exhausted" if dries else None
        if self.single_pass:
            self._batches = batches
        return batches

    def _open_plain(self, epoch: int, place: int) -> Iterator[Any]:
        """Open an epoch of a list or its like: it has a length and indices, and nothing else."""
        loader = self._loader
        self._set_length(self.given_len or loaders.length_of(loader))
        batches: Any = iter(loader)
        self._batches = batches
        left = self._left_in(epoch)
        if place > left:
            batches.__setstate__(place - left)
        self._rest = None if self.given_len is not None or left else batches
        self._open, self.epoch = loader, epoch
        return batches  # type: ignore[no-any-return]

    def _load_for(self, epoch: int) -> Any:
        """Return what the callable returns for an epoch."""
        load: Any = self._load
        if loaders.has_set_epoch(load):
            load.set_epoch(epoch)
        loader = load()
        if not loaders.is_iterable(loader):
            raise TypeError(f"dataloader() returned {checks.shown(loader)}: return an iterable")
        loaders.refuse_no_batches("dataloader()", loader)
        return loader

    def _iterate(self, loader: Any, epoch: int, place: int) -> Iterator[Any]:
        """Return the batches of an epoch from a place on, from what resumes this loader there."""
        is_again = self.epoch == epoch
        left = self._left_in(epoch)
        before = self._tracked_before if is_again else self._tracked
        resumed = self._resumed
        if resumed is not None and resumed["rest"]:
            self._end_epoch_before(loader, epoch, resumed)
            resumed = None
        samplers = self._begin(loader, epoch)
        first: list[Any] = []
        if resumed is not None:
            first, batches = resumed_at(loader, resumed)
            if resumed["whole"] and not first:
                resumed = None  # the epoch begins as any other
        elif place > left or (epoch and self.epoch < 0 and not left):
            first, batches = _begun_in_order(loader, samplers, epoch)
        else:
            batches = iter(loader)
        if not self.single_pass:  # which is kept once it is open
            self._batches = batches
        tracked = None
        skips = self._skips if self.single_pass else place - left
        owner = owner_of_state(loader, batches)
        if owner is not None:
            reached_from = self._resumed
            if reached_from is None and before is not None and self._load is None:
                reached_from = before.state_at_end()
            counts = loaders.counts_batches(loader)
            begun = place - self._skips if self.single_pass else left
            tracked = TrackedBatches(
                batches,
                first,
                owner,
                reached_from,
                resumed,
                begun,
                counts,
                self.single_pass,
                self._ahead,
            )
            if is_again and self._tracked is not None:
                tracked.continue_from(self._tracked)
            skips = place - tracked.begun
            batches = tracked
        elif first:
            batches = chain(first, begun_once(batches))
        if skips:
            batches = self._without_first(skips, loader, batches, epoch)
        if place > left:
            has_state = tracked is not None and bool(resumed or tracked.tells_its_state())
            if not loaders.may_repeat_its_order(loader, has_state, bool(epoch or is_again)):
                _warn_of_order(place, epoch)
        batches = begun_once(batches)
        self._tracked_before, self._tracked, self.epoch = before, tracked, epoch
        self._resumed, self._skips = None, 0
        return batches

    def _begin(self, loader: Any, epoch: int) -> list[Any]:
        """Set the epoch and its length; return the samplers whose order is that of the epoch."""
        self._samplers = loaders.set_epoch(loader, epoch)
        length = self._promised_length(loader)
        if self._saved.ignores_length and self._saved.epoch == epoch:
            length = self.given_len
        self._set_length(length)
        if self._lookahead is not None:
            self._check_lookahead(loader)
        return self._samplers

    def _end_epoch_before(self, loader: Any, epoch: int, resumed: dict[str, Any]) -> None:
        """Fetch the rest of the epoch before, in which the loader's state is."""
        loaders.set_epoch(loader, epoch - 1)
        rest = resumed["rest"] + 1  # the last fetch finds its end
        next(islice(chain(*resumed_at(loader, resumed)), rest, rest), None)

    def _without_first(
        self, skips: int, loader: object, batches: Iterator[Any], epoch: int
    ) -> Iterator[Any]:
        """Return fresh `batches` without the first ones: by index, or by fetching them."""
        indexed = None if self.single_pass else loaders.indexed_from(skips, loader, batches)
        if indexed is not None:
            return indexed
        begun = monotonic()
        for _ in islice(begun_once(batches), skips):
            self._skips -= self._skips > 0  # an interrupted single-pass source continues from here
        _tell_of_dropped(epoch, skips, batches, monotonic() - begun)
        return batches

    # Resuming

    def prepare_to_reopen(self, epoch: int, place: int) -> None:
        """Let `epoch` be opened again at a place, after an interrupt."""
        if self.keeps_iterator:
            return
        if self.epoch == epoch and self._resumed is None:  # else it is still being opened
            self._resumed = self.state(place, 1, epoch, False)
        self._batches = self._rest = self._end_finder = None
        loader = self._latest_loader()  # whose workers an interrupt may have ended
        if loader is not None:
            loaders.renew_workers(loader)

    def resume(self, position: Position, fast_forward: bool) -> Position:
        """Let the first epoch that is opened continue from a saved position.

        Returns the position, with the place at which the same sample is now.

        Args:
            position: where the run begins.
            fast_forward: False leaves the loader as it is.
        """
        epoch = position.epoch + position.epoch_end
        place = 0 if position.epoch_end else position.epoch_steps
        self._saved = SavedPlace(epoch, place, is_left=not fast_forward)
        if not fast_forward:
            return position
        self._resumed = position.loader
        if self.single_pass:
            self._skips = position.steps  # if it has no state
        if place:
            self._saved.samples, self._saved.length = position.samples_per_step, position.epoch_len
        if self._loader is None or not self._saved.samples:
            return position
        reached = self._place_in(self._loader)
        samples = self.samples_per_step()
        if reached == place:
            return position._replace(samples_per_step=samples)
        length = self.fixed_len()
        return position._replace(epoch_steps=reached, epoch_len=length, samples_per_step=samples)

    def _place_in(self, loader: Any) -> int:
        """Return how many batches of the loader come before the sample at the saved place."""
        has_state = self.single_pass or self._resumed is not None
        length = None if self._is_shared else self._promised_length(loader)
        return self._saved.place_in(loader, length, has_state)

    def samples_per_step(self) -> int:
        """Return how many samples a step takes; 0 before a callable has returned a loader."""
        loader = self._latest_loader()
        return 0 if loader is None else loaders.samples_per_step(loader)

    def state(self, done: int, ahead: int, epoch: int, ended: bool) -> dict[str, Any] | None:
        """Return the loader's own state after `done` batches of `epoch`; None if it has none.

        Args:
            done: how many batches of the epoch are done; of a single-pass source, how many in all.
            ahead: how many more were fetched.
            epoch: the epoch.
            ended: whether it is complete.
        """
        if self.epoch < 0:
            return self._resumed
        for sampler in self._samplers:
            if sampler.epoch != self.epoch:
                warn(
                    f"epoch {self.epoch} has the order of epoch {sampler.epoch}, since the "
                    "dataloader sets the epoch itself: a resumed run may have another order; use "
                    "the dataloader for this loop alone"
                )
        tracked = self._tracked
        if self.single_pass:
            return None if tracked is None else tracked.state(done, ahead)
        if self.epoch != epoch and tracked is not None:  # the next one was opened
            if ended:
                return tracked.before
            tracked = self._tracked_before
        if tracked is None or (ended and self._load is not None):  # a callable's begin anew
            return None
        return tracked.state_at_end() if ended else tracked.state(done, ahead)

    def may_repeat_its_order(self) -> bool:
        """Return whether a resumed run can see the batches in the order of this one."""
        loader = self._latest_loader()
        has_state = self._tracked is not None and self._tracked.tells_its_state()
        return loader is None or loaders.may_repeat_its_order(loader, has_state, self.epoch > 0)

    @property
    def keeps_iterator(self) -> bool:
        """Whether a single-pass source was opened, and so keeps its iterator."""
        return self.single_pass and self._batches is not None

    def has_workers(self) -> bool:
        """Return whether the dataloader has worker processes."""
        return loaders.has_workers(self._latest_loader())

    def _latest_loader(self) -> Any:
        """Return the loader of the latest epoch; None before a callable has returned one."""
        return self._loader if self._open is None else self._open

    def batches_ahead(self) -> int:
        """Return how many batches were fetched ahead."""
        return 0 if self._end_finder is None else self._end_finder.batches_ahead()

    # Ends

    def judge_end(self, epoch: int, taken: int) -> None:
        """Judge an epoch that ended unforeseen after so many batches.

        Raises:
            DataExhaustedError: there was none.
            DataLengthError: there were fewer than promised.
        """
        if taken == 0 and (epoch == 0 or not self.single_pass):
            raise no_batch(epoch, self._is_shared)
        if self.length is not None and 0 < taken < self.length:
            promised_by = "len(dataloader)" if self.given_len is None else "dataloader_len"
            advice = "lookahead=True, which ignores the length"
            if self.single_pass or self.given_len is not None:
                advice = f"dataloader_len={taken}, if that is the length of every epoch"
            if self.single_pass and epoch:
                advice = "a single-pass dataloader with all batches of the run"
            raise DataLengthError(
                f"epoch {epoch} ended after {taken} batches, {promised_by} promised {self.length}; "
                f"pass {advice}"
            )
        if taken and self.length is None and self._tells_its_last(self._open):
            raise DataLengthError(
                f"epoch {epoch} ended after {taken} batches, but end_of_dataloader was not true at "
                "the last; pass dataloader_len"
            )

    def drop_rest(self, epoch: int, taken: int) -> None:
        """Drop what is left of an epoch that another process has ended."""
        has_more = self.batches_ahead() > 0
        if self._end_finder is None:
            has_more = taken < (self.length or 0)
        if has_more and not self.single_pass:
            self._rest = None
            log("epoch %d ends with the shortest process; more batches are dropped", epoch)

    def ask_once_more(self, epoch: int) -> None:
        """Ask the iterator of an epoch once more after its last batch, as a `for` does."""
        batches, self._rest = self._rest, None
        if batches is None:
            return
        try:
            has_more = bool(list(islice(batches, 1)))
        except Exception as exception:
            raise not_stop(exception)  # noqa: B904 (it is mostly the exception itself)
        if has_more:
            by = "end_of_dataloader" if self.length is None else "len(dataloader)"
            advice = "" if self.length is None else "; pass lookahead=True to get them"
            warn(f"epoch {epoch} has more batches than {by} said; they are dropped{advice}")

    def forget(self) -> None:
        """Let go of the open epoch's iterator, but not of its states."""
        if self._tracked is not None:
            self._tracked.let_go()
        self._batches = self._rest = self._end_finder = self._open = None

    def close(self) -> None:
        """Close the open epoch's iterator, unless it is the user's dataloader."""
        batches = self._batches
        self.forget()
        close = getattr(batches, "close", None)
        if callable(close) and not self.single_pass and not getattr(batches, "gi_running", False):
            close()

    # Lengths

    def epoch_len(self) -> int | None:
        """Return the length of the open epoch, or of the first if none was opened."""
        return self.promised if self.epoch >= 0 else self.fixed_len()

    def fixed_len(self) -> int | None:
        """Return the length of every epoch, as far as it is known beforehand."""
        return self.given_len if self._loader is None else self._promised_length(self._loader)

    @property
    def has_epochs(self) -> bool:
        """Whether the run has epochs: a stream has none, unless it is looked ahead."""
        knows_end = self.fixed_len() is not None or self._lookahead is True
        return not self.single_pass or self._by_epochs or knows_end

    def _set_length(self, length: int | None) -> None:
        self.length = self.promised = length

    def batches_left(self) -> int | None:
        """Fetch ahead; return how many batches are left, or None if the end was not found."""
        return None if self._end_finder is None else self._end_finder.batches_left()

    def _left_in(self, epoch: int) -> int:
        """Return how many batches of an epoch do not come, since the loader was left as it was."""
        saved = self._saved
        return saved.place if saved.is_left and saved.epoch == epoch else 0

    def _looks_ahead(self) -> bool:
        return self._lookahead is None and (self._by_epochs or not self.single_pass)

    def _promised_length(self, loader: Any) -> int | None:
        if self._lookahead:
            return None
        if self.given_len is not None:
            return self.given_len
        # A stream is fetched exactly when requested, since no epoch is at stake
        is_stream = self.single_pass and not self._by_epochs
        return None if is_stream else loaders.length_of(loader)


def _begun_in_order(
    loader: Any, samplers: list[Any], epoch: int
) -> tuple[list[Any], Iterator[Any]]:
    """Return an iterator in the order of `epoch`, and the batch before it, if it was fetched.

    Some loaders, as Fabric's, set their samplers' epoch to how often they were iterated. They are
    iterated again until that is `epoch`.
    """
    batches: Iterator[Any] = iter(loader)
    if not samplers:
        return [], batches
    reached = -1
    while True:
        first = list(islice(begun_once(batches), 1))
        epochs = [sampler.epoch for sampler in samplers if sampler.epoch != epoch]
        if not epochs or not first:
            return first, batches
        if not reached < epochs[0] < epoch:
            warn(
                f"epoch {epoch} is resumed in the order of epoch {epochs[0]}, since the dataloader "
                "sets the epoch itself: samples may come twice or never; make the dataloader anew"
            )
            return first, batches
        reached = epochs[0]
        batches = iter(loader)


def _tell_of_dropped(epoch: int, dropped: int, batches: Iterator[Any], seconds: float) -> None:
    log("epoch %d: fetched and dropped %d batches, in %.1f s", epoch, dropped, seconds)
    if seconds > LONG:
        warn(
            f"epoch {epoch}: fetching and dropping {dropped} batches to resume took {seconds:.0f} "
            "seconds; use a dataloader with state_dict, or one that is indexed"
        )


def _warn_of_order(place: int, epoch: int) -> None:
    warn(
        f"epoch {epoch} is resumed after {place} batches, but the dataloader may shuffle in "
        "another order now: samples may come twice or never; use a sampler with set_epoch, or a "
        "dataloader with state_dict"
    )
