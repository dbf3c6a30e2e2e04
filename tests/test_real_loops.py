"""Three training loops, by hand and with dloop: they do the same, and dloop's keep fewer books."""

from __future__ import annotations

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

LOOPS = [language_model, image_classifier, dqn]
MARK = "# *"

lengths = st.integers(1, 12)
periods = st.none() | lengths
seconds = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def strikes(signals: bool) -> Any:
    kinds = st.booleans() if signals else st.just(False)
    return st.lists(st.tuples(st.integers(0, 30), kinds), max_size=4)


def journal(
    module: ModuleType,
    version: str,
    seconds: list[int],
    strikes: list[tuple[int, bool]],
    settings: dict[str, Any],
) -> list[tuple[Any, ...]]:
    """What a version does, life after life, until it is done."""
    clock = ManualClock()
    job = Job(clock, seconds, module is not language_model, strikes)
    run: Callable[..., None] = getattr(module, version)
    given: dict[str, Any] = dict(settings)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "perf_counter", clock)
        patch.setattr(module, "Loop", partial(Loop, clock=clock))
        for life in range(len(strikes) + 1):
            job.begin_life(life)
            if "length" in settings:
                given = {**settings, "loader": image_classifier.Loader(job, settings["length"])}
                del given["length"]
            try:
                run(job, **given)
            except Killed:
                job.journal.append(("killed",))
            finally:
                signal.signal(signal.SIGTERM, before)
    return job.journal


def check(
    module: ModuleType, seconds: list[int], strikes: list[tuple[int, bool]], **settings: Any
) -> None:
    expected = journal(module, "by_hand", seconds, strikes, settings)
    assert journal(module, "with_dloop", seconds, strikes, settings) == expected


@given(
    seconds=seconds,
    strikes=strikes(signals=True),
    max_steps=st.integers(1, 30),
    micro_steps=st.integers(1, 4),
    log_every=periods,
    eval_every=periods,
)
def test_a_language_model(**plan: Any) -> None:
    check(language_model, **plan)


@given(
    seconds=seconds,
    strikes=strikes(signals=False),
    length=lengths,
    max_epochs=st.integers(1, 5),
    accumulate=st.integers(1, 5),
    log_every=periods,
    save_every=periods,
    save_seconds=st.none() | st.integers(1, 60),
    validate_every=st.none() | st.integers(1, 6),
)
def test_an_image_classifier(**plan: Any) -> None:
    check(image_classifier, **plan)


@given(
    seconds=seconds,
    strikes=strikes(signals=True),
    max_steps=st.integers(1, 60),
    learning_starts=st.integers(0, 20),
    train_every=st.just(4) | lengths,
    target_every=lengths,
    log_every=periods,
    eval_every=periods,
)
def test_a_dqn(**plan: Any) -> None:
    check(dqn, **plan)


def marked(module: ModuleType, version: str) -> int:
    return sum(
        line.endswith(MARK) for line in inspect.getsource(getattr(module, version)).splitlines()
    )


@pytest.mark.no_core
@pytest.mark.parametrize("module", LOOPS)
def test_there_are_fewer_lines_of_bookkeeping(module: ModuleType) -> None:
    by_hand, with_dloop = marked(module, "by_hand"), marked(module, "with_dloop")
    print(by_hand, with_dloop)
    assert with_dloop <= 0.65 * by_hand, f"{with_dloop} and {by_hand} by hand"
