"""The benchmarks run, compare like with like, and hold to their budgets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from cores import CORES, use_core
from dloop import Loop

pytest.importorskip("benchmarks", reason="the benchmarks are no part of an installation")
from benchmarks import instructions, peers, rows

ROOT = Path(__file__).parent.parent
BUDGETS = {"cython": {"here": {"quiet step": 100.0, "firing step": 1000.0}}}


@pytest.mark.parametrize("row", [*rows.ROWS, *peers.PEERS], ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of the peers
def test_both_sides_of_a_row_see_the_same(row: rows.Row) -> None:
    if row.needs is not None and find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    data = list(range(12_000))  # as many as the events at step 10,000 need
    ours, rival = [side.run(side.make(data)) for side in (row.ours, row.rival)]
    assert ours == rival > 0


def test_the_example_counts_every_event() -> None:
    data = list(range(12_000))
    assert rows.by_hand(data) == 12_000 // 16 + 12_000 // 100 + 1 + 1


@pytest.mark.no_core
def test_a_row_runs_over_the_core_in_python() -> None:
    def kind_of_state(make: Callable[[], Loop[int]]) -> type:
        loop = make()
        next(iter(loop))
        return type(loop.state)

    kinds = {}
    for core in CORES:
        with use_core(core):
            kinds[core] = kind_of_state(lambda: Loop([1], max_epochs=1))
    found = kind_of_state(lambda: rows.loop_in_python([1]))
    assert [core for core, kind in kinds.items() if kind is found] == [
        core for core in CORES if core == "python"
    ]


def test_costs_are_measured() -> None:
    assert rows.loop_microseconds(loops=2) > 0
    assert abs(rows.memory_growth(epoch=20_000, epochs=4)) < 2000
    assert {cost.unit for cost in rows.COSTS} == {"ms", "µs", "bytes"}


@pytest.mark.no_core
@pytest.mark.parametrize("quiet", [98.1, 100.0, 101.9])
def test_counts_within_the_budget_pass(quiet: float) -> None:
    counted = {"quiet step": quiet, "firing step": 1000.0}
    assert instructions.judge(counted, "cython", "here", BUDGETS) == ([], [])


@pytest.mark.no_core
def test_a_count_above_the_budget_fails() -> None:
    counted = {"quiet step": 102.1, "firing step": 1000.0}
    failures, hints = instructions.judge(counted, "cython", "here", BUDGETS)
    assert failures == ["quiet step: 102.1 counted / 100.0 (+2.1%)"]
    assert not hints


@pytest.mark.no_core
def test_a_count_below_the_budget_asks_to_lower_it() -> None:
    counted = {"quiet step": 100.0, "firing step": 900.0}
    failures, hints = instructions.judge(counted, "cython", "here", BUDGETS)
    assert not failures
    assert hints == ["firing step: 900.0 counted / 1000.0 (-10.0%)"]


@pytest.mark.no_core
@pytest.mark.parametrize(("core", "build"), [("cython", "there"), ("python", "here")])
def test_a_build_without_budgets_fails_and_says_what_to_add(core: str, build: str) -> None:
    counted = {"quiet step": 100.0}
    (failure,), hints = instructions.judge(counted, core, build, BUDGETS)
    assert json.loads(failure.partition("\n")[2]) == {core: {build: counted}}
    assert not hints


@pytest.mark.no_core
def test_cases_and_budgets_are_the_same() -> None:
    failures, _ = instructions.judge({"quiet step": 100.0, "new": 7.0}, "cython", "here", BUDGETS)
    assert failures == ["firing step: not counted", "new: 7.0 counted, no budget; --update adds it"]


@pytest.mark.no_core
def test_instructions_are_the_difference_of_two_lengths() -> None:
    parts = [10**6, 500, 99, 1500, 77, 130, 11, 230, 5]
    assert instructions.per_step(parts, ["a", "b"], 10) == {"a": 100.0, "b": 10.0}
    with pytest.raises(SystemExit, match="9 parts for 3 cases"):
        instructions.per_step(parts, ["a", "b", "c"], 10)


@pytest.mark.no_core
def test_the_committed_budgets_are_whole() -> None:
    budgets = json.loads((ROOT / "benchmarks/budgets.json").read_text(encoding="utf-8"))
    assert set(budgets) == {"cython", "python"}
    cases = {frozenset(counts) for builds in budgets.values() for counts in builds.values()}
    assert len(cases) == 1
    assert set(budgets["cython"]) == set(budgets["python"])


@pytest.mark.no_core
def test_the_table_is_there_for_machines() -> None:
    command = [sys.executable, "-m", "benchmarks", "--json", "--rounds", "2", "--rows", "zip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["machine"]["cores"] > 0
    assert [row["name"] for row in printed["rows"]] == [
        "iteration, step events / zip",
        "iteration, with timers / zip",
    ]
    for row in printed["rows"]:
        assert row["ratio"]["median"] > 0 < row["ours"]["median"]
