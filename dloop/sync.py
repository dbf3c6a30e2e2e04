"""What lets processes agree: the element-wise maximum of a list of ints over all of them.

Each function returns an object for `Loop(..., sync=)`, and imports its package when it is called.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def torch_distributed(group: Any = None) -> TorchExchange:
    """Processes of `torch.distributed`, by an all-reduce on the CPU that runs beside the training.

    All processes have to call this. It never waits for a GPU: where the default group has no gloo
    backend, a gloo group is made beside it, once. (That was tried with gloo alone: the machine that
    dloop is tested on has no GPU, so that NCCL cannot run there.)

    Args:
        group: a process group that can reduce tensors of the CPU; None for all processes.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: `torch.distributed.init_process_group` was not called.
        ValueError: the group has no gloo backend.

    Example:
        loop = Loop(dataloader, max_steps=10_000, signals=[SIGTERM],
                    sync=dloop.sync.torch_distributed(), sync_every=50)
    """
    distributed = _imported(
        "torch.distributed", "torch_distributed() needs PyTorch: pip install torch"
    )
    if not distributed.is_initialized():
        raise RuntimeError(
            "dloop.sync.torch_distributed(): call torch.distributed.init_process_group() before"
        )
    if group is None:
        return TorchExchange(_gloo_group(distributed))
    if not _has_gloo(distributed, group):
        raise ValueError(
            f"group: its backend is {distributed.get_backend(group)}; pass one that has gloo"
        )
    return TorchExchange(group)


class TorchExchange:  # pragma: no cover (it runs in other processes)
    """An all-reduce that is begun, and waited for later."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._values: Any = None
        self._work: Any = None

    def start(self, values: list[int]) -> None:
        """Begin."""
        torch: Any = import_module("torch")
        distributed = torch.distributed
        self._values = torch.tensor(values, dtype=torch.int64)
        self._work = distributed.all_reduce(
            self._values, op=distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def finish(self) -> list[int]:
        """Wait for the others, and return the maximum."""
        self._work.wait()
        values: list[int] = self._values.tolist()
        return values


_gloo_groups: list[tuple[Any, Any]] = []
"""The default group for which a gloo group was made, and that."""


def _gloo_group(distributed: Any) -> Any:
    default = distributed.group.WORLD
    if _has_gloo(distributed, default):
        return default
    if not _gloo_groups or _gloo_groups[0][0] is not default:
        _gloo_groups[:] = [(default, distributed.new_group(backend="gloo"))]
    return _gloo_groups[0][1]


def _has_gloo(distributed: Any, group: Any) -> bool:
    # "cpu:gloo,cuda:nccl" where the group was made without the name of a backend
    return "gloo" in str(distributed.get_backend_config(group))


def mpi(comm: Any = None) -> MpiExchange:
    """Processes of MPI, by mpi4py's `Iallreduce`, which runs beside the training.

    All processes have to call this. Leave the loop by `with loop:` or `loop.close()`, so that no
    exchange is under way when MPI ends.

    Args:
        comm: an mpi4py communicator, of which a duplicate is used; None for `MPI.COMM_WORLD`.

    Raises:
        ImportError: mpi4py is not installed.

    Example:
        with Loop(data, max_steps=10_000, sync=dloop.sync.mpi(), sync_every=50) as loop:
            ...
    """
    package = _imported("mpi4py.MPI", "mpi() needs mpi4py: pip install mpi4py")
    return MpiExchange(package, (package.COMM_WORLD if comm is None else comm).Dup())


class MpiExchange:  # pragma: no cover (it runs in other processes)
    """An all-reduce that is begun, and waited for later."""

    def __init__(self, package: Any, comm: Any) -> None:
        self._package = package
        self._comm = comm
        self._sent: Any = None
        self._received: Any = None
        self._request: Any = None

    def start(self, values: list[int]) -> None:
        """Begin."""
        from array import array

        package = self._package
        self._sent = array("q", values)
        self._received = array("q", values)
        self._request = self._comm.Iallreduce(
            [self._sent, package.INT64_T], [self._received, package.INT64_T], op=package.MAX
        )

    def finish(self) -> list[int]:
        """Wait for the others, and return the maximum."""
        self._request.Wait()
        return list(self._received)


def jax_processes() -> JaxExchange:
    """The processes of `jax.distributed`, by `jax.experimental.multihost_utils`.

    What JAX offers publicly waits for all processes at each exchange, so that `sync_every` should
    not be small.

    Raises:
        ImportError: JAX is not installed.

    Example:
        loop = Loop(data, max_steps=10_000, sync=dloop.sync.jax_processes(), sync_every=500)
    """
    multihost_utils = _imported(
        "jax.experimental.multihost_utils", "jax_processes() needs JAX: pip install jax"
    )
    return JaxExchange(multihost_utils)


class JaxExchange:  # pragma: no cover (it runs in other processes)
    """What all processes have is gathered, and each takes the maximum."""

    def __init__(self, multihost_utils: Any) -> None:
        self._gather = multihost_utils.process_allgather

    def __call__(self, values: list[int]) -> list[int]:
        """Wait for the others, and return the maximum."""
        numpy: Any = import_module("numpy")  # JAX needs it
        halves = numpy.array(values, numpy.int64).view(numpy.int32)  # JAX has no int64 by default
        gathered = numpy.ascontiguousarray(self._gather(halves))
        found: list[int] = gathered.reshape(-1, halves.size).view(numpy.int64).max(0).tolist()
        return found


def rank_among_several() -> int | None:
    """The rank of this process, where it looks like one of several. Nothing is imported for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() if distributed.get_world_size() > 1 else None
    jax = sys.modules.get("jax")
    # Older versions do not tell, and to ask for their processes would begin their backends
    is_initialized = getattr(getattr(jax, "distributed", None), "is_initialized", None)
    if jax is not None and is_initialized is not None and is_initialized():
        return jax.process_index() if jax.process_count() > 1 else None
    for size, rank in (
        ("WORLD_SIZE", "RANK"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ):
        if _number(size) > 1:
            return _number(rank)
    return None


def _imported(name: str, what_to_do: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"dloop.sync.{what_to_do}") from error


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
