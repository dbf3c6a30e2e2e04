"""dloop: training loops of one's own, with the page of conditions taken over.

See `Loop`, `Event` and `LoopEvents`.
"""

from ._backend import BACKEND, BACKEND_REASON, core
from .errors import DataExhaustedError, DataLengthError, LoopError, LoopWarning, StateError
from .events import Event, LoopEvents
from .loop import Loop

TYPE_CHECKING = False

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
]


if TYPE_CHECKING:
    from . import sync as sync

    __version__: str
else:

    def __getattr__(name):
        if name == "sync":
            from importlib import import_module

            return import_module("dloop.sync")
        if name != "__version__":
            raise AttributeError(f"module 'dloop' has no attribute {name!r}")
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("dloop")
