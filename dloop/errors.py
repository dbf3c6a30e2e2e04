"""What goes wrong: the exceptions and the warning of dloop, and the way to the user's line."""

from __future__ import annotations

import sys
import warnings


class LoopError(RuntimeError):
    """A loop was asked for something that it cannot give in its present state.

    Example:
        >>> from dloop import Loop, LoopError
        >>> loop = Loop([1, 2], max_epochs=1)
        >>> for batch, events in loop:
        ...     pass
        >>> try:
        ...     iter(loop)
        ... except LoopError as error:
        ...     print(error)
        this run is finished; restart() begins a new one
    """


class DataLengthError(LoopError):
    """An epoch ended before the number of batches that its length promised.

    Example:
        >>> from dloop import DataLengthError, Loop
        >>> try:
        ...     list(Loop([1, 2], max_epochs=1, dataloader_len=3))
        ... except DataLengthError as error:
        ...     print(str(error).partition(";")[0])
        epoch 0 ended after 2 of the 3 batches that dataloader_len promised
    """


class DataExhaustedError(LoopError):
    """An epoch had no batch at all.

    Example:
        >>> from dloop import DataExhaustedError, Loop
        >>> try:
        ...     list(Loop([], max_steps=1))
        ... except DataExhaustedError as error:
        ...     print(error)
        epoch 0 has no batch: len(dataloader) is 0
    """


class StateError(LoopError):
    """A saved state is damaged, foreign or of a later version, or cannot be saved.

    Example:
        >>> from dloop import Loop, StateError
        >>> try:
        ...     Loop([1, 2], max_epochs=1).load_state_dict({"weights": []})
        ... except StateError as error:
        ...     print(error)
        this is no state of a dloop run
    """


class LoopWarning(UserWarning):
    """The category of every warning of dloop: something that a person should act on.

    Example:
        >>> import warnings
        >>> from dloop import Loop, LoopWarning
        >>> warnings.simplefilter("error", LoopWarning)
        >>> try:
        ...     list(Loop(iter([1, 2]), max_steps=3))
        ... except LoopWarning as warning:
        ...     print(warning)
        the dataloader ran dry at global_step 1, before the run's limit
    """


def warn(message: str) -> None:
    """Warn with `message`, shown at the line outside of dloop that led here.

    The number of dloop's own frames in between differs from core to core, hence the walk.
    """
    frame = sys._getframe(1)
    level = 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, LoopWarning, stacklevel=level)


def log(message: str, *values: object) -> None:
    """Tell the logger "dloop" what a person may want to know."""
    import logging  # slow to import, and seldom needed

    logging.getLogger("dloop").info(message, *values)


_HOLD_BATCHES = ("dloop.batch_lists", "dloop.profile")
"""The modules of iterators that are written in Python and stand between a source and the core."""


def is_from_outside(exception: BaseException) -> bool:
    """Whether `exception` was raised in other code than dloop's, or where a batch is in hand."""
    trace = exception.__traceback__
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module in _HOLD_BATCHES:
            return True
        trace = trace.tb_next
    return bool(module) and not _is_ours(module)


def _is_ours(module: str) -> bool:
    return module.startswith("dloop.") and not module.startswith("dloop.demo")


def finished() -> LoopError:
    """The error of entering a run that has handed over its last batch."""
    return LoopError("this run is finished; restart() begins a new one")


def replaced() -> LoopError:
    """The error of an iterator after `iter(loop)` has made a newer one."""
    return LoopError("this iterator was replaced: the loop was entered again")


def interrupted() -> LoopError:
    """The error where an interrupt has ended an iterator that cannot be made anew."""
    return LoopError(
        "the dataloader is single-pass and has ended after it was interrupted while it made a "
        "batch; pass a callable that returns a fresh one, to go on after that"
    )


def closed() -> LoopError:
    """The error of going on with a loop that was closed."""
    return LoopError("this loop was closed; restart() begins a new run")


def in_use() -> LoopError:
    """The error of asking a loop for a step while it makes one."""
    return LoopError(
        "this loop is in use: the step that it is making, or another thread, asks it for one more; "
        "one loop is for one thread"
    )


def failed(first: BaseException) -> LoopError:
    """The error of going on after a run ended with the exception `first`."""
    error = LoopError("this run ended with an exception; restart() begins a new one")
    error.__cause__ = first
    return error


def not_stop(exception: Exception) -> Exception:
    """`exception`, or what stands for a StopIteration, which would end the `for` in silence.

    PEP 479 does the same for generators.
    """
    if not isinstance(exception, StopIteration):
        return exception
    error = RuntimeError("StopIteration was raised where it would end the loop in silence")
    error.__cause__ = exception
    return error


def chain(exception: BaseException, first: BaseException) -> None:
    """Let `exception`, which came while `first` was to be raised, tell of it in its traceback."""
    chained = {id(exception)}
    while exception.__context__ is not None and id(exception.__context__) not in chained:
        exception = exception.__context__
        chained.add(id(exception))
    if id(first) not in chained:
        exception.__context__ = first


def annotate(exception: BaseException, note: str) -> None:
    """Add a note to an exception, as PEP 678 has it, on Python 3.10 too."""
    if sys.version_info >= (3, 11):
        exception.add_note(note)
    else:  # pragma: no cover (the coverage is measured on a newer Python)
        notes = getattr(exception, "__notes__", None) or []
        exception.__notes__ = [*notes, note]  # type: ignore[attr-defined]
