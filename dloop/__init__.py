"""dloop: events for training loops that you write yourself. See `Loop`, `Event`, `LoopEvents`."""

from typing import TYPE_CHECKING

from . import sync
from ._backend import BACKEND, BACKEND_REASON, core
from .batch_lists import batched
from .errors import DataExhaustedError, DataLengthError, LoopError, LoopWarning, StateError
from .events import Event, LoopEvents
from .loop import Loop

LoopState = core.LoopState

__all__ = [
    "BACKEND",
    "BACKEND_REASON",
    "DataExhaustedError",
    "DataLengthError",
    "Event",
    "Loop",
    "LoopError",
    "LoopEvents",
    "LoopState",
    "LoopWarning",
    "StateError",
    "batched",
    "sync",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):
        if name != "__version__":
            raise AttributeError(f"module 'dloop' has no attribute {name!r}")
        from importlib.metadata import version  # slow to import, and seldom needed

        return version("dloop")
