"""What a dataloader is, and what it says of itself: length, epochs, last batch, order, state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from . import checks
from .errors import log

PLAIN = frozenset({list, tuple, range, str, bytes})
"""Types without a state, set_epoch or data set, for which a look would take longer than a step."""
_DEEPEST = 6
"""How many levels of loaders, samplers and data sets are searched for `set_epoch`."""
_PART = (
    "dataset",  # PyTorch: DataLoader, Subset; samplers of sentence-transformers
    "batch_sampler",  # PyTorch: DataLoader; Accelerate: BatchSamplerShard
    "sampler",  # PyTorch: DataLoader, BatchSampler
    "loader",  # timm: PrefetchLoader; wrappers of users, as the next one
    "dataloader",
    "base_dataloader",  # Accelerate: DataLoaderShard
    "_dataloader",  # Fabric's loaders
)
"""Attributes in which loaders, samplers and data sets keep a part."""
_SEVERAL = (
    "datasets",  # PyTorch: ConcatDataset, ChainDataset, StackDataset
    "batch_samplers",  # sentence-transformers: RoundRobinBatchSampler, ProportionalBatchSampler
    "samplers",
    "loaders",
    "dataloaders",
    "iterables",  # Lightning: CombinedLoader, as it was given
    "flattened",  # the same, without nesting
)
"""Attributes in which they keep several, in a list, a tuple or a dict."""
_TORCH_SAMPLERS = ("torch.utils.data.sampler", "torch.utils.data.distributed")
"""The modules of PyTorch's own samplers."""


class _Items:
    """Has `__getitem__` alone, as old sequence classes do; Python makes an iterator of it."""

    def __getitem__(self, place: int) -> object:
        """Never called."""


_SEQUENCES: tuple[Any, ...] = ([], (), range(1), range(2**70), "", b"", bytearray(), _Items())
_SEQUENCE_ITERATORS = tuple(type(iter(each)) for each in _SEQUENCES)


class Lists:
    """Lists of `size` batches of a loader; all else is the loader's."""

    def __init__(self, loader: Any, size: int) -> None:
        self.lists_of = loader
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.lists_of) // self.size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying looks for such before there is a loader
            raise AttributeError(name)
        return getattr(self.lists_of, name)


def is_iterable(dataloader: object) -> TypeGuard[Iterable[Any]]:
    """Return whether `iter()` of it can give batches."""
    kind = type(dataloader)
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def refuse_no_batches(name: str, loader: object) -> None:
    """Refuse a mapping, whose keys would be the batches, and a table, whose columns would be.

    Raises:
        TypeError: it is one.
    """
    kind = type(loader)
    if isinstance(loader, Mapping):
        raise TypeError(
            f"{name}=<{kind.__name__}>: its keys would be the batches; pass its values() or a "
            "loader of it"
        )
    is_table = hasattr(kind, "__dataframe__") or hasattr(kind, "__arrow_c_stream__")
    if hasattr(kind, "columns") and is_table:
        raise TypeError(
            f"{name}=<{kind.__name__}>: its columns would be the batches; pass its rows or "
            "batches, such as frame.itertuples, frame.iter_slices or table.to_batches"
        )


def is_single_pass(loader: object) -> bool:
    """Return whether it is an iterator, which can be iterated only once.

    A class that subclasses Iterable but not Iterator starts anew at each `iter()`, even if it has
    `__next__`, as Lightning's CombinedLoader does.
    """
    kind = type(loader)
    if not hasattr(kind, "__next__"):
        return False
    abcs = _named_abcs(kind)
    return "Iterator" in abcs or "Iterable" not in abcs


def _named_abcs(kind: type[Any]) -> set[str]:
    """Return the names of those of `collections.abc` that a class subclasses."""
    return {base.__name__ for base in kind.__mro__ if base.__module__ == "collections.abc"}


def length_of(loader: Any) -> int | None:
    """Return the number of batches that `len()` promises; None if it promises nothing."""
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
    """Return whether the state of a loader can only be a count of batches.

    torchdata's is, for an iterable-style data set without a state; a resumed loader counts wrong.
    """
    return _is_iterable_style(loader) and not keeps_state(getattr(loader, "dataset", None))


def _is_iterable_style(loader: object) -> bool:
    """Return whether the loader's data set can only be iterated, so that its length is a guess.

    PyTorch gives such data sets a `__getitem__` that only raises, hence the look at their class.
    """
    dataset = None if type(loader) in PLAIN else getattr(loader, "dataset", None)
    if dataset is None:
        return False
    kind = type(dataset)
    named = any(base.__name__ == "IterableDataset" for base in kind.__mro__)
    return named or not hasattr(kind, "__getitem__")


def tells_its_last(loader: object) -> bool:
    """Return whether the loader says which batch is its last, as Accelerate's do."""
    if type(loader) in PLAIN:
        return False
    return isinstance(getattr(loader, "end_of_dataloader", None), bool)


def parts(loader: Any) -> list[Any]:
    """Return the loader and what it is made of, a few levels deep, each object once.

    It looks at attributes alone: the items of a loader or a data set may be millions.
    """
    found: dict[int, object] = {}
    looked = [(unwrapped(loader)[0], 1)]
    for part, level in looked:  # which grows
        if type(part) in PLAIN or part is None or id(part) in found:
            continue
        found[id(part)] = part
        if level < _DEEPEST:
            looked += [(_attribute(part, name), level + 1) for name in _PART]
            for name in _SEVERAL:
                several = _attribute(part, name)
                if type(several) is dict:
                    several = [*several.values()]
                if type(several) in (list, tuple):
                    looked += [(each, level + 1) for each in several]
    return list(found.values())


def unwrapped(loader: Any) -> tuple[Any, int]:
    """Return the loader that `batched` makes lists of, and how long they are."""
    size = 1
    while isinstance(loader, Lists):
        size *= loader.size
        loader = loader.lists_of
    return loader, size


def _attribute(part: Any, name: str) -> Any:
    """Return an attribute, or None; some properties raise more than AttributeError."""
    try:
        return getattr(part, name, None)
    except Exception as exception:
        log("%s of a dataloader's part: %r", name, exception)
        return None


def set_epoch(loader: object, epoch: int) -> list[Any]:
    """Call `set_epoch` on the loader and on what it is made of.

    Returns the samplers whose `epoch` is now this one; none if the loader itself has `set_epoch`,
    since such a loader does not change it later.
    """
    every_part = parts(loader)
    found = [part for part in every_part if has_set_epoch(part)]
    for part in found:
        part.set_epoch(epoch)
    if not found or found[0] is every_part[0]:
        return []
    return [
        part
        for part in found
        if getattr(part, "epoch", None) == epoch and getattr(part, "shuffle", True)
    ]


def has_set_epoch(part: Any) -> bool:
    """Return whether the order of a part depends on its epoch."""
    return callable(getattr(part, "set_epoch", None))


def may_repeat_its_order(loader: object, has_state: bool, drawn_before: bool) -> bool:
    """Return whether an epoch that is begun anew can have the order that it had.

    PyTorch's random samplers cannot, unless they have a seed from which no epoch was drawn yet.
    Other random samplers may be part of the loader's state.
    """
    for part in parts(loader):
        kind = type(part)
        is_random = any(base.__name__.endswith("RandomSampler") for base in kind.__mro__)
        if not is_random or has_set_epoch(part):
            continue
        if has_state:
            if kind.__module__ == "torch.utils.data.sampler":
                return False
        elif drawn_before or getattr(part, "generator", None) is None:
            return False
    return True


def has_workers(loader: object) -> bool:
    """Return whether the loader has worker processes, as PyTorch's do."""
    numbers = [getattr(part, "num_workers", 0) for part in parts(loader)]
    return any(isinstance(number, int) and number > 0 for number in numbers)


def samples_per_step(loader: Any) -> int:
    """Return how many samples a step takes over all processes, as far as the loader tells."""
    loader, samples = unwrapped(loader)
    batch_sampler = _attribute(loader, "batch_sampler")
    samplers = batch_sampler, _attribute(loader, "sampler"), _attribute(batch_sampler, "sampler")
    sizes = [_attribute(each, "batch_size") for each in (batch_sampler, loader)]
    names = ("num_replicas", "num_processes")  # PyTorch's name, and Accelerate's
    processes = [_attribute(each, name) for each in samplers for name in names]
    for numbers in (sizes, processes):
        samples *= next((each for each in numbers if type(each) is int and each > 0), 1)
    return samples


def begins_with_the_same_samples(loader: Any) -> bool:
    """Return whether the first n samples are the same at any batch size and number of processes.

    They are for sequences and PyTorch's samplers.
    """
    loader, _ = unwrapped(loader)
    if type(loader) in PLAIN or _is_indexed(loader):
        return True
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = batch_sampler, getattr(batch_sampler, "sampler", None)
    return all(type(each).__module__ in _TORCH_SAMPLERS for each in samplers)


def indexed_from(count: int, loader: Any, batches: Iterator[Any]) -> Iterator[Any] | None:
    """Return the batches of an indexed loader from the `count`-th on; None if it is not indexed.

    Args:
        count: how many batches to skip.
        loader: the loader.
        batches: a fresh iterator of it.
    """
    if type(batches) in _SEQUENCE_ITERATORS:
        batches.__setstate__(count)  # type: ignore[attr-defined]
        return batches
    if hasattr(type(loader), "indexed_from"):
        return loader.indexed_from(count, batches)  # type: ignore[no-any-return]
    if _is_indexed(loader):
        return map(loader.__getitem__, range(count, len(loader)))
    return None


def _is_indexed(loader: object) -> bool:
    """Return whether the loader is an array, or subclasses Sequence."""
    kind = type(loader)
    is_array = all(hasattr(kind, name) for name in ("shape", "__getitem__", "__len__"))
    if is_array:
        return not hasattr(kind, "loc")  # a pandas Series is indexed by its labels
    return "Sequence" in _named_abcs(kind)


def keeps_state(loader: object) -> bool:
    """Return whether the loader has `state_dict` and `load_state_dict`."""
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def renew_workers(loader: Any) -> None:
    """Let a PyTorch DataLoader with persistent workers start new ones; a signal may end workers.

    Nothing public does that.
    """
    for part in parts(loader):
        if getattr(part, "persistent_workers", False) is True:
            part._iterator = None
