"""Three training loops, by hand and with dloop: they do the same, and dloop's keep fewer books."""

from __future__ import annotations

import ast
import inspect
import signal
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dqn
import image_classifier
import language_model
from dloop import Loop
from job import Job, Killed
from manual_clock import ManualClock

Journal = list[tuple[Any, ...]]

MARK = "# *"
LOOPS = [language_model, image_classifier, dqn]

numbers = st.integers(1, 12)
periods = st.none() | numbers
seconds = st.lists(st.integers(1, 9), min_size=1, max_size=5)
ends = st.lists(st.tuples(st.integers(0, 30), st.just(False)), max_size=4)
ends_and_signals = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=4)


def nobody_listens(*_: object) -> None:
    raise AssertionError("a SIGTERM that the version did not take")


def journal(
    module: ModuleType,
    version: str,
    seconds: list[int],
    strikes: list[tuple[int, bool]],
    length: int | None = None,
    **settings: Any,
) -> Journal:
    """What a version does in a life after each strike, the last of which nothing ends."""
    clock = ManualClock()
    job = Job(clock, seconds, module is not language_model, strikes)
    run: Callable[..., None] = getattr(module, version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "perf_counter", clock)
        patch.setattr(module, "Loop", partial(Loop, clock=clock))
        for life in range(len(strikes) + 1):
            job.begin_life(life)
            if length is not None:
                settings["loader"] = image_classifier.Loader(job, length)
            before = signal.signal(signal.SIGTERM, nobody_listens)
            try:
                run(job, **settings)
            except Killed:
                job.journal.append(("killed",))
            finally:
                signal.signal(signal.SIGTERM, before)
    return job.journal


def check(module: ModuleType, plan: dict[str, Any]) -> None:
    assert journal(module, "with_dloop", **plan) == journal(module, "by_hand", **plan)


@given(
    seconds=seconds,
    strikes=ends_and_signals,
    max_steps=st.integers(1, 30),
    micro_steps=st.integers(1, 4),
    log_every=periods,
    eval_every=periods,
)
def test_a_language_model(**plan: Any) -> None:
    check(language_model, plan)


@given(
    seconds=seconds,
    strikes=ends,
    length=numbers,
    max_epochs=st.integers(1, 5),
    accumulate=st.integers(1, 5),
    log_every=periods,
    save_every=periods,
    save_seconds=st.none() | st.integers(1, 60),
    eval_every=st.none() | st.integers(1, 6),
)
def test_an_image_classifier(**plan: Any) -> None:
    check(image_classifier, plan)


@given(
    seconds=seconds,
    strikes=ends_and_signals,
    max_steps=st.integers(1, 60),
    learning_starts=st.integers(0, 20),
    train_every=st.just(4) | numbers,
    target_every=numbers,
    log_every=periods,
    eval_every=periods,
)
def test_a_dqn(**plan: Any) -> None:
    check(dqn, plan)


# What is to be read


def marked_lines(module: ModuleType, version: str) -> set[int]:
    lines, first = inspect.getsourcelines(getattr(module, version))
    return {first + number for number, line in enumerate(lines) if line.rstrip().endswith(MARK)}


def operators(module: ModuleType, version: str) -> int:
    """The sums, comparisons, ands and ors in lines of bookkeeping, `in` and `|` among them."""
    kinds = (ast.BinOp, ast.Compare, ast.BoolOp, ast.AugAssign)
    lines = marked_lines(module, version)
    return sum(
        isinstance(node, kinds) and node.lineno in lines
        for node in ast.walk(ast.parse(inspect.getsource(module)))
    )


@pytest.mark.no_core
@pytest.mark.parametrize("module", LOOPS)
def test_lines_of_bookkeeping_are_fewer(module: ModuleType) -> None:
    by_hand, with_dloop = (len(marked_lines(module, each)) for each in ("by_hand", "with_dloop"))
    assert with_dloop <= 0.65 * by_hand, f"{with_dloop}, and {by_hand} by hand"


@pytest.mark.no_core
@pytest.mark.parametrize("module", LOOPS)
def test_there_is_less_to_get_wrong(module: ModuleType) -> None:
    by_hand, with_dloop = (operators(module, each) for each in ("by_hand", "with_dloop"))
    assert with_dloop <= 0.4 * by_hand, f"{with_dloop}, and {by_hand} by hand"


@pytest.mark.no_core
@pytest.mark.parametrize("module", LOOPS)
def test_both_versions_take_the_same(module: ModuleType) -> None:
    assert inspect.signature(module.by_hand) == inspect.signature(module.with_dloop)
