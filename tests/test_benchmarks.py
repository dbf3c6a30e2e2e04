"""The benchmarks run, both sides of a row do the same work, and budgets are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not installed")
from benchmarks import floor, instructions, peers, rows
from dloop import LoopEvents

ROOT = Path(__file__).parent.parent
BUDGETS = {"cython": {"here": {"quiet step": 100.0, "firing step": 1000.0}}}


OTHER_ROWS = [row for row in [*rows.ROWS, *peers.PEERS] if row not in rows.FLOOR_ROWS]


@pytest.mark.parametrize("row", OTHER_ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the peers
def test_both_sides_of_a_row_return_the_same(row: rows.Row) -> None:
    if row.needs is not None and find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    data = list(range(12_000))  # enough for the events at step 10,000
    ours, rival = [side.run(side.make(data)) for side in (row.ours, row.rival)]
    assert ours == rival > 0


@pytest.mark.parametrize("row", rows.FLOOR_ROWS, ids=lambda row: row.name)
def test_the_floor_yields_the_batches_and_the_events_of_most_steps(row: rows.Row) -> None:
    assert row.ours.run is row.rival.run
    data = list(range(12_000))
    ours, floor = [list(side.make(data)) for side in (row.ours, row.rival)]
    assert [batch for batch, _events in floor] == [batch for batch, _events in ours] == data
    assert len({id(pair) for pair in floor}) == len(floor), "fresh pairs"
    assert len({id(events) for _batch, events in floor}) == 1
    (_batch, events) = floor[0]
    assert type(events) is type(ours[0][1])
    assert sum(due == events for _batch, due in ours) > 0.9 * len(ours)


@pytest.mark.no_core
@pytest.mark.parametrize("kind", ["Floor", "FloorWithClock"])
def test_the_floor_ends_at_its_limit_or_with_its_source(kind: str) -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise OSError

    make = getattr(floor.compiled(), kind)
    assert list(make([1, 2, 3], "events", 2)) == [(1, "events"), (2, "events")]
    assert list(make([1], "events", 2)) == [(1, "events")]
    with pytest.raises(OSError):
        list(make(fails(), "events", 2))


@pytest.mark.no_core
def test_if_the_floor_cannot_be_compiled_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        SystemExit, match=r"^benchmarks/floor\.c needs setuptools and a C compiler: .+$"
    ):
        floor.compiled.__wrapped__()


def test_the_loop_by_hand_counts_every_event() -> None:
    data = list(range(12_000))
    assert rows.by_hand(data) == 12_000 // 16 + 12_000 // 100 + 1 + 1


def test_without_length_and_with_last_find_the_same_last_batch() -> None:
    data = list(range(100))
    pairs = rows.without_length(data)
    ends = [(batch, LoopEvents.EPOCH_END in events) for batch, events in pairs]
    assert ends == list(rows.with_last(data))


@pytest.mark.no_core
def test_in_python_uses_the_core_in_python() -> None:
    loop = rows.in_python(rows.SIX_CHECKS).make([1])
    next(iter(loop))
    assert type(loop.state).__module__ == "dloop._core_py"


def test_the_costs_of_a_loop_can_be_measured() -> None:
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
def test_a_count_below_the_budget_gives_a_hint() -> None:
    counted = {"quiet step": 100.0, "firing step": 900.0}
    failures, hints = instructions.judge(counted, "cython", "here", BUDGETS)
    assert not failures
    assert hints == ["firing step: 900.0 counted / 1000.0 (-10.0%)"]


@pytest.mark.no_core
@pytest.mark.parametrize(("core", "build"), [("cython", "there"), ("python", "here")])
def test_a_build_without_budgets_fails_and_shows_what_to_add(core: str, build: str) -> None:
    counted = {"quiet step": 100.0}
    (failure,), hints = instructions.judge(counted, core, build, BUDGETS)
    assert json.loads(failure.partition("\n")[2]) == {core: {build: counted}}
    assert not hints


@pytest.mark.no_core
def test_a_case_without_budget_and_a_budget_without_case_fail() -> None:
    failures, _ = instructions.judge({"quiet step": 100.0, "new": 7.0}, "cython", "here", BUDGETS)
    assert failures == ["firing step: not counted", "new: 7.0 counted, no budget; --update adds it"]


@pytest.mark.no_core
def test_instructions_per_step_are_computed_from_runs_of_two_lengths() -> None:
    parts = [10**6, 500, 99, 1500, 77, 130, 11, 230, 5]
    assert instructions.per_step(parts, ["a", "b"], 10) == {"a": 100.0, "b": 10.0}
    with pytest.raises(SystemExit, match="9 parts for 3 cases"):
        instructions.per_step(parts, ["a", "b", "c"], 10)


@pytest.mark.no_core
def test_all_committed_budgets_have_the_same_cases_and_builds() -> None:
    budgets = json.loads((ROOT / "benchmarks/budgets.json").read_text(encoding="utf-8"))
    assert set(budgets) == {"cython", "python"}
    cases = {frozenset(counts) for builds in budgets.values() for counts in builds.values()}
    assert len(cases) == 1
    assert set(budgets["cython"]) == set(budgets["python"])


@pytest.mark.no_core
def test_the_table_can_be_printed_as_json() -> None:
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
