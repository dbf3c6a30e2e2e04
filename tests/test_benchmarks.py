"""The benchmarks run, both sides of a row do the same work, and budgets are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not installed")
from benchmarks import instructions, peers, rows

ROOT = Path(__file__).parent.parent
BUDGETS = {"cython": {"here": {"quiet step": 100.0, "firing step": 1000.0}}}
ROWS = [
    row
    for row in [*rows.ROWS, *peers.PEERS]
    if row not in rows.FLOOR_ROWS and (row.needs is None or find_spec(row.needs))
]

pytestmark = pytest.mark.no_core


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")  # of the peers
def test_both_sides_of_a_row_return_the_same(row: rows.Row) -> None:
    data = list(range(12_000))  # enough for the events at step 10,000
    ours, rival = [side.run(side.make(data)) for side in (row.ours, row.rival)]
    assert ours == rival > 0


@pytest.mark.parametrize("row", rows.FLOOR_ROWS, ids=lambda row: row.name)
def test_the_floor_yields_the_batches_and_the_events_of_most_steps(row: rows.Row) -> None:
    assert row.ours.run is row.rival.run
    data = list(range(12_000))
    ours, lowest = [list(side.make(data)) for side in (row.ours, row.rival)]
    assert [batch for batch, _events in lowest] == [batch for batch, _events in ours] == data
    assert len({id(pair) for pair in lowest}) == len(lowest), "fresh pairs"
    assert len({id(events) for _batch, events in lowest}) == 1
    events = lowest[0][1]
    assert type(events) is type(ours[0][1])
    assert sum(names == events for _batch, names in ours) > 0.9 * len(ours)


def test_the_costs_of_a_loop_can_be_measured() -> None:
    assert rows.loop_microseconds(loops=2) > 0
    assert abs(rows.memory_growth(epoch=20_000, epochs=4)) < 2000


@pytest.mark.parametrize(
    ("quiet", "firing", "failures", "hints"),
    [
        (101.9, 1000.0, [], []),
        (102.1, 1000.0, ["quiet step: 102.1 counted / 100.0 (+2.1%)"], []),
        (100.0, 900.0, [], ["firing step: 900.0 counted / 1000.0 (-10.0%)"]),
    ],
)
def test_counts_are_judged_by_budgets(
    quiet: float, firing: float, failures: list[str], hints: list[str]
) -> None:
    counted = {"quiet step": quiet, "firing step": firing}
    assert instructions.judge(counted, "cython", "here", BUDGETS) == (failures, hints)


def test_instructions_per_step_are_computed_from_runs_of_two_lengths() -> None:
    parts = [10**6, 500, 99, 1500, 77, 130, 11, 230, 5]
    assert instructions.per_step(parts, ["a", "b"], 10) == {"a": 100.0, "b": 10.0}
    with pytest.raises(SystemExit, match="9 parts for 3 cases"):
        instructions.per_step(parts, ["a", "b", "c"], 10)


def test_all_committed_budgets_have_the_same_cases_and_builds() -> None:
    budgets = json.loads((ROOT / "benchmarks/budgets.json").read_text(encoding="utf-8"))
    assert set(budgets) == {"cython", "python"}
    cases = {frozenset(counts) for builds in budgets.values() for counts in builds.values()}
    assert len(cases) == 1
    assert set(budgets["cython"]) == set(budgets["python"])


def test_the_table_can_be_printed_as_json() -> None:
    command = [sys.executable, "-m", "benchmarks", "--json", "--rounds", "2", "--rows", "zip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["machine"]["cores"] > 0
    assert [row["name"].split(" / ")[1] for row in printed["rows"]] == ["zip", "zip"]
    for row in printed["rows"]:
        assert row["ratio"]["median"] > 0 < row["ours"]["median"]
