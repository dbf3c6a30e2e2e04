"""Random plans: both cores must do the same as the oracle, in the same order."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings

from cores import CORES, use_core
from oracle import (
    Condition,
    Journal,
    Node,
    Part,
    Plan,
    Source,
    Undecided,
    World,
    oracle_trace,
    oracle_world,
)
from plans import FEATURES, SOURCES, dloop_trace, features, plans

EXAMPLES = int(os.environ.get("DLOOP_EXAMPLES", "300"))  # of all sources together

# Most rules are about promised lengths, so sources with one are drawn twice as often.
SHARES = {label: 2 if label.endswith(", sized") else 1 for label in SOURCES}

# How many plans had each feature, and how many runs each outcome.
feature_counts: Counter[tuple[str, str]] = Counter()
outcomes: Counter[str] = Counter()


def side_by_side(expected: Journal, found: Journal, title: str, around: int = 6) -> str:
    """Both traces around the first entry that differs."""
    pairs = list(zip_longest(expected, found))
    first = next(i for i, (left, right) in enumerate(pairs) if left != right)
    shown = pairs[max(0, first - around) : first + around]
    lefts = ["oracle", *(str(left) for left, _ in shown)]
    rights = [title, *(str(right) for _, right in shown)]
    width = max(map(len, lefts))
    numbers = ["", *(str(max(0, first - around) + i) for i in range(len(shown)))]
    marks = [" ", *(" " if left == right else "!" for left, right in shown)]
    return "\n".join(
        f"{mark}{number:>4}  {left:<{width}}  {right}"
        for mark, number, left, right in zip(marks, numbers, lefts, rights, strict=True)
    )


def count(plan: Plan, world: World) -> None:
    feature_counts.update(features(plan))
    outcomes.update(world.rare)
    for entry in world.journal:
        if entry[0] == "end":
            outcomes[f"ends: {entry[1]}"] += 1
        elif entry[0] in ("raised", "refused"):
            outcomes[f"{entry[0]}: {entry[1]}"] += 1
        elif entry[0] == "warning":
            outcomes["warning: " + " ".join(str(entry[1]).split(",")[0].split()[2:6])] += 1


def check(plan: Plan, expected: Journal) -> None:
    for core in CORES:
        with use_core(core):
            found = dloop_trace(plan)
        if found != expected:
            differences = side_by_side(expected, found, core)
            raise AssertionError(f"core {core!r} differs from the oracle\n{plan}\n{differences}")


@pytest.mark.no_core
@pytest.mark.parametrize("label", SOURCES)
def test_random_plans_run_as_in_the_oracle(label: str) -> None:
    @settings(
        max_examples=max(1, round(EXAMPLES * SHARES[label] / sum(SHARES.values()))),
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(plans(label))
    def compare(plan: Plan) -> None:
        try:
            world = oracle_world(plan)
        except Undecided:
            outcomes["undecided"] += 1
            reject()
        count(plan, world)
        check(plan, world.journal)

    compare()


@pytest.mark.no_core
@pytest.mark.parametrize(
    "plan",
    [
        # the compiled core once crashed when it was used after the source was exhausted
        Plan(Source("single-pass", lengths=(1,)), "max_steps", 5),
        # lookahead at the last step gets an error, which must not be raised
        Plan(Source(lengths=(6,), raises=((1, "OSError"),)), "max_steps", 1),
        # after an end that nobody foresaw, a trigger of the next epoch came late, or an empty list
        *[
            Plan(
                Source("callable", lengths=(4,)),
                "max_steps",
                6,
                events=(("Save", (Part(at_step=(0,), per_epoch=True),)),),
                lookahead=False,
                entries=(sizes,),
            )
            for sizes in (None, 3)
        ],
        # a short list before a DataLengthError had EPOCH_END, and the error did not come
        Plan(Source(lengths=(3,), promised=(5,)), "max_epochs", 1, batches_per_step=5),
        Plan(Source(lengths=(3,), says_end="never"), "max_epochs", 1, batches_per_step=2),
        # the end of a stream was not believed, though batches came after the interrupt
        Plan(
            Source("single-pass", lengths=(6,), raises=((1, "KeyboardInterrupt"),)),
            "max_epochs",
            1,
            batches_per_step=64,
        ),
        # an error within an epoch's last list was lost, and the list had EPOCH_END
        Plan(
            Source(lengths=(3,), promised=(3,), raises=((1, "OSError"),)),
            "max_epochs",
            1,
            batches_per_step=3,
        ),
        # an end after an interrupt is LoopError, also one that a look finds
        Plan(
            Source("single-pass", lengths=(9,), raises=((5, "KeyboardInterrupt"),), mapped=True),
            "max_steps",
            9,
            lookahead=True,
            batches_per_step=4,
        ),
        # an error is what it is, if a batch came between an interrupt and it
        Plan(
            Source("single-pass", lengths=(9,), raises=((1, "KeyboardInterrupt"), (3, "OSError"))),
            "max_steps",
            9,
            batches_per_step=4,
        ),
    ],
)
def test_plans_that_failed_before_run_as_in_the_oracle(plan: Plan) -> None:
    check(plan, oracle_trace(plan))


@pytest.mark.no_core
@pytest.mark.parametrize("fast_forward", [True, False])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("start", range(1, 8))
@pytest.mark.parametrize(
    "source",
    [
        Source("single-pass", lengths=(12,)),
        Source(lengths=(3,), promised=(3,)),
        Source("callable", lengths=(2, 4, 3), nodes=(Node("loader"),)),
    ],
    ids=lambda source: source.kind,
)
def test_plans_that_begin_at_each_step_run_as_in_the_oracle(
    source: Source, start: int, size: int | None, fast_forward: bool
) -> None:
    plan = Plan(
        source,
        "max_epochs",
        3,
        dataloader_len=3 if source.kind == "single-pass" else None,
        batches_per_step=size,
        start_step=start,
        fast_forward=fast_forward,
        asks=(True,),
    )
    check(plan, oracle_trace(plan))


SIZED = Source(lengths=(3,), promised=(3,))
ONE_PASS = Source("single-pass", lengths=(5,))


def fails(source: Source, *raises: tuple[int, str], **traits: Any) -> Source:
    return replace(source, raises=raises, **traits)


RARE = {
    "last request: interrupt": Plan(fails(SIZED, (3, "KeyboardInterrupt")), "max_epochs", 2),
    "last request: error": Plan(fails(SIZED, (3, "OSError")), "max_epochs", 2),
    "last request: error after entering again": Plan(
        fails(SIZED, (3, "OSError")), "max_epochs", 2, leaves=frozenset({2})
    ),
    "not believed: an error after entering again": Plan(
        fails(SIZED, (1, "OSError")), "max_epochs", 2, leaves=frozenset({0})
    ),
    "not believed: an end after an interrupt": Plan(
        fails(ONE_PASS, (2, "KeyboardInterrupt"), mapped=True), "max_epochs", 1
    ),
    "not believed: an error after an interrupt": Plan(
        fails(ONE_PASS, (2, "KeyboardInterrupt"), (3, "OSError")), "max_steps", 9
    ),
    "an error in a list": Plan(fails(SIZED, (1, "OSError")), "max_epochs", 2, batches_per_step=2),
    "an end in a list": Plan(
        Source(lengths=(3,)), "max_steps", 4, lookahead=False, batches_per_step=2
    ),
    "a condition raises at a list's last step": Plan(
        SIZED,
        "max_epochs",
        2,
        events=(("Log", (Part(Condition("c", raises_at=2)),)),),
        entries=((3, 2, 1),),
    ),
}


@pytest.mark.no_core
@pytest.mark.parametrize("what", RARE)
@pytest.mark.parametrize("sizes", [None, 3], ids=["steps", "lists"])
def test_plans_with_rare_outcomes_run_as_in_the_oracle(what: str, sizes: int | None) -> None:
    plan = RARE[what]
    if plan.entries == (None,):
        # with lists of three the loop would be left at other batches
        plan = replace(plan, entries=(sizes if not plan.leaves else None,))
    world = oracle_world(plan)
    assert what in world.rare
    check(plan, world.journal)


@pytest.mark.no_core
def test_the_random_plans_had_every_feature(capfd: pytest.CaptureFixture[str]) -> None:
    """Must come last. Fails if the strategies no longer draw some kind of source or trigger."""
    counts = {
        (group, name): feature_counts[group, name]
        for group, names in FEATURES.items()
        for name in names
    }
    with capfd.disabled():
        print("\nplans that had:", file=sys.__stderr__)
        for (group, name), number in counts.items():
            print(f"{number:>8}  {group}: {name}", file=sys.__stderr__)
        print("outcomes:", file=sys.__stderr__)
        for outcome, number in sorted(outcomes.items()):
            print(f"{number:>8}  {outcome}", file=sys.__stderr__)
    limits = sum(feature_counts["limit", name] for name in FEATURES["limit"])
    if limits < 250:
        pytest.skip(f"only {limits} plans were run")
    assert [name for name, number in counts.items() if number == 0] == []
