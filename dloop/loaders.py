"""What a dataloader is, and what it tells of itself: length, epochs, last batch, order, state."""

from __future__ import annotations

from itertools import count as count_up
from itertools import repeat

from . import checks
from .errors import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, TypeGuard

PLAIN = frozenset({list, tuple, range, str, bytes})
"""What has no state, no `set_epoch` and no data set. Looking for them takes longer than a step."""
_DEEPEST = 5
"""How many levels of samplers and data sets are followed in search of `set_epoch`."""


class _Items:
    """What has `__getitem__` alone, as NumPy's arrays go: Python gives it an iterator."""

    def __getitem__(self, place: int) -> object:
        """Never asked for anything."""


_SEQUENCES: tuple[Any, ...] = ([], (), range(1), range(2**70), "", b"", bytearray(), _Items())
_SEQUENCE_ITERATORS = tuple(type(iter(each)) for each in _SEQUENCES)


def is_iterable(dataloader: object) -> TypeGuard[Iterable[Any]]:
    """Whether `iter()` of it can give batches."""
    kind = type(dataloader)
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def refuse_table(name: str, loader: object) -> None:
    """Refuse a table, as pandas, Polars and PyArrow have them: `iter()` gives its columns.

    Raises:
        TypeError: it is one.
    """
    kind = type(loader)
    if hasattr(kind, "columns") and (
        hasattr(kind, "__dataframe__") or hasattr(kind, "__arrow_c_stream__")
    ):
        raise TypeError(
            f"{name}={checks.shown(loader)}: going through a table gives its columns; pass its "
            "rows or batches, such as frame.itertuples, frame.iter_slices or table.to_batches"
        )


def is_single_pass(loader: object) -> bool:
    """Whether it is an iterator, which can be gone through only once.

    What says that it is an Iterable, but not an Iterator, begins anew at `iter()`, even if it has
    `__next__`; such as Lightning's CombinedLoader.
    """
    kind = type(loader)
    if not hasattr(kind, "__next__"):
        return False
    abcs = _named_abcs(kind)
    return "Iterator" in abcs or "Iterable" not in abcs


def _named_abcs(kind: type[Any]) -> set[str]:
    """The names of those of `collections.abc` that a class names as its bases."""
    return {base.__name__ for base in kind.__mro__ if base.__module__ == "collections.abc"}


def length_of(loader: Any) -> int | None:
    """The number of batches that `len()` promises; None if it promises nothing."""
    if _is_iterable_style(loader):
        return None
    try:
        return min(len(loader), checks.MOST)
    except (TypeError, NotImplementedError):
        return None
    except OverflowError:  # range(2**70)
        return checks.MOST
    except Exception as exception:
        log("len(dataloader) is not known: %r", exception)
        return None


def counts_batches(loader: object) -> bool:
    """Whether a state of `loader`, if it has any, can only be a count of batches.

    As torchdata's are, of data sets that are only iterated and have no state: once resumed, such a
    loader counts wrong.
    """
    return _is_iterable_style(loader) and not keeps_state(getattr(loader, "dataset", None))


def _is_iterable_style(loader: object) -> bool:
    """Whether `loader` loads a data set that is only iterated, so that its length is a guess.

    PyTorch gives such data sets a `__getitem__` that only raises, hence the look at their class.
    """
    dataset = None if type(loader) in PLAIN else getattr(loader, "dataset", None)
    if dataset is None:
        return False
    kind = type(dataset)
    named = any(base.__name__ == "IterableDataset" for base in kind.__mro__)
    return named or not hasattr(kind, "__getitem__")


def tells_its_last(loader: object) -> bool:
    """Whether the loader says itself which batch is its last, as Accelerate's do."""
    if type(loader) in PLAIN:
        return False
    return isinstance(getattr(loader, "end_of_dataloader", None), bool)


def is_at_its_last(loader: Any) -> bool:
    """Whether the loader says that the batch which it gave last was its last."""
    return tells_its_last(loader) and loader.end_of_dataloader


def parts(loader: object) -> list[Any]:
    """`loader` and what it draws from, a few levels deep, once each."""
    if type(loader) in PLAIN:
        return []
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


def set_epoch(loader: object, epoch: int) -> list[Any]:
    """Call `set_epoch` wherever it is found.

    Returns the samplers whose `epoch` and so whose order is now this one. None where the loader has
    a `set_epoch`, so that it sets no other itself.
    """
    if type(loader) in PLAIN:
        return []
    found = [part for part in parts(loader) if _has_set_epoch(part)]
    for part in found:
        part.set_epoch(epoch)
    if not found or found[0] is loader:
        return []
    return [
        part
        for part in found
        if getattr(part, "epoch", None) == epoch and getattr(part, "shuffle", True)
    ]


def has_set_epoch(loader: object) -> bool:
    """Whether `set_epoch` is found anywhere."""
    return any(map(_has_set_epoch, parts(loader)))


def _has_set_epoch(part: Any) -> bool:
    return callable(getattr(part, "set_epoch", None))


def may_repeat_its_order(loader: object, has_state: bool, drawn_before: bool) -> bool:
    """Whether an epoch that is begun anew can have the order that it had.

    Not with PyTorch's random samplers, unless they have a seed and no epoch was drawn from it
    before. Those of other makers may be part of the loader's state.
    """
    for part in parts(loader):
        kind = type(part)
        is_random = any(base.__name__.endswith("RandomSampler") for base in kind.__mro__)
        if not is_random or _has_set_epoch(part):
            continue
        if has_state:
            if kind.__module__ == "torch.utils.data.sampler":
                return False
        elif drawn_before or getattr(part, "generator", None) is None:
            return False
    return True


def indexed_from(count: int, loader: Any, batches: Iterator[Any]) -> Iterator[Any] | None:
    """The batches of a loader that is indexed, from the `count`-th on; None where it is not.

    `batches` is its iterator, which just began.
    """
    if type(batches) in _SEQUENCE_ITERATORS:
        batches.__setstate__(count)  # type: ignore[attr-defined]
        return batches
    if _is_indexed(loader):
        return map(loader.__getitem__, range(count, len(loader)))
    return None


def _is_indexed(loader: object) -> bool:
    """Whether it is gone through by its indices: an array, or what says that it is a Sequence."""
    kind = type(loader)
    is_array = all(hasattr(kind, name) for name in ("shape", "__getitem__", "__len__"))
    if is_array:
        return not hasattr(kind, "loc")  # a pandas Series is indexed by its labels
    return "Sequence" in _named_abcs(kind)


def makes_nothing(batches: object) -> bool:
    """Whether a batch of this iterator takes no time to fetch."""
    return type(batches) in (*_SEQUENCE_ITERATORS, repeat, count_up)


def keeps_state(loader: object) -> bool:
    """Whether it has what a loader needs to save its place."""
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def renew_workers(loader: object) -> bool:
    """Let a PyTorch DataLoader start new workers, if it has kept those of the epoch before.

    An interrupt may have ended them. Nothing public does that. Accelerate's loaders have theirs in
    `base_dataloader`, Fabric's in `_dataloader`. Returns whether it keeps workers.
    """
    for name in ("base_dataloader", "_dataloader"):
        loader = getattr(loader, name, loader)
    keeps_workers = getattr(loader, "persistent_workers", False) is True
    if keeps_workers:
        loader._iterator = None  # type: ignore[attr-defined]
    return keeps_workers
