"""What can go wrong: exceptions, warnings and the log."""

from __future__ import annotations

import logging
import sys
import warnings

NEVER = 2**63 - 1
"""A step, or a time in nanoseconds, that no run reaches."""


class LoopError(RuntimeError):
    """The loop cannot do this in its present state.

    Example:
        >>> from dloop import Loop, LoopError
        >>> loop = Loop([1, 2], max_epochs=1)
        >>> for batch, events in loop:
        ...     pass
        >>> try:
        ...     iter(loop)
        ... except LoopError as error:
        ...     print(error)
        this run has ended; restart() begins a new one
    """


class DataLengthError(LoopError):
    """An epoch ended before the length that it promised.

    Example:
        >>> from dloop import DataLengthError, Loop
        >>> try:
        ...     list(Loop([1, 2], max_epochs=1, dataloader_len=3))
        ... except DataLengthError as error:
        ...     print(str(error).partition(";")[0])
        epoch 0 ended after 2 batches, dataloader_len promised 3
    """


class DataExhaustedError(LoopError):
    """An epoch had no batch.

    Example:
        >>> from dloop import DataExhaustedError, Loop
        >>> try:
        ...     list(Loop([], max_steps=1))
        ... except DataExhaustedError as error:
        ...     print(error)
        epoch 0 has no batch: the dataloader is empty
    """


class StateError(LoopError):
    """A saved state is damaged or foreign, or cannot be saved.

    Example:
        >>> from dloop import Loop, StateError
        >>> try:
        ...     Loop([1, 2], max_epochs=1).load_state_dict({"weights": []})
        ... except StateError as error:
        ...     print(error)
        this is not the state of a dloop run
    """


class LoopWarning(UserWarning):
    """The category of all warnings of dloop.

    Example:
        >>> import warnings
        >>> from dloop import Loop, LoopWarning
        >>> warnings.simplefilter("error", LoopWarning)
        >>> try:
        ...     list(Loop(iter([1, 2]), max_steps=3))
        ... except LoopWarning as warning:
        ...     print(warning)
        the dataloader is exhausted after global_step 1, before the run's limit
    """


def warn(message: str) -> None:
    """Warn at the user's line that led here; the cores have different frames in between."""
    frame = sys._getframe(1)
    level = 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, LoopWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.startswith("dloop.") and not module.startswith("dloop.demo")


def log(message: str, *values: object) -> None:
    """Log `message` to the logger "dloop", at level INFO."""
    logging.getLogger("dloop").info(message, *values)


def in_use() -> LoopError:
    """Return the error of requesting a step while another is being made."""
    return LoopError(
        "this loop is making a step: a condition, the dataloader or another thread requested one "
        "more; use a loop in one thread, one step at a time"
    )


def no_body() -> LoopError:
    """Return the error of changing a step outside of its body."""
    return LoopError(
        "there is no step to change: call finish(), finish_epoch() and count() in the body of a "
        "step, in the thread that entered the loop"
    )


def no_batch(epoch: int, is_shared: bool) -> DataExhaustedError:
    """Return the error of an epoch without a batch, in this process or in one of several."""
    whose = "a process has an empty dataloader" if is_shared else "the dataloader is empty"
    return DataExhaustedError(f"epoch {epoch} has no batch: {whose}")


def interrupted() -> LoopError:
    """Return the error of a single-pass source that ended right after an interrupted fetch."""
    return LoopError(
        "the single-pass dataloader ended after an interrupt in a fetch, which may have lost "
        "batches; pass a callable that returns a fresh one"
    )


def no_mapping(name: object) -> TypeError:
    """Return the error of `events["Log"]`."""
    return TypeError(f"events are a set: write `{name!r} in events`")


def no_attribute(name: str) -> AttributeError:
    """Return the error of `events.Log`."""
    return AttributeError(f"events are a set, without {name!r}: write `{name!r} in events`")


def not_stop(exception: Exception) -> Exception:
    """Return `exception`, or a RuntimeError in place of a StopIteration, as PEP 479 does.

    A StopIteration would end the user's `for` without a word.
    """
    if not isinstance(exception, StopIteration):
        return exception
    error = RuntimeError("StopIteration was raised where it would end the loop silently")
    error.__cause__ = exception
    return error


def chain(exception: BaseException, first: BaseException) -> None:
    """Make `first` the context of `exception`, so that a traceback shows both."""
    chained = {id(exception)}
    while exception.__context__ is not None and id(exception.__context__) not in chained:
        exception = exception.__context__
        chained.add(id(exception))
    if id(first) not in chained:
        exception.__context__ = first


def annotate(exception: BaseException, note: str) -> None:
    """Add a note to an exception, as PEP 678 does, on Python 3.10 too."""
    notes = [*getattr(exception, "__notes__", []), note]
    exception.__notes__ = notes  # type: ignore[attr-defined,unused-ignore]
