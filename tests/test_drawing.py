"""Tables and drawings: what they look like, and that they are well formed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dloop import Event, Loop, LoopEvents, LoopState, drawing
from dloop.plan import Plan

SVG = "{http://www.w3.org/2000/svg}"
pytestmark = pytest.mark.no_core


def holds(state: LoopState) -> bool:
    return False


def parsed(drawn: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawn.partition("</svg>")[0] + "</svg>")


def texts(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


EVENTS: dict[Any, Any] = {
    "Log": Event(every_n_steps=100),
    ("eval", 1): Event(every_n_steps=500, first_at_step=0) | LoopEvents.TRAINING_END,
    "a name <of> sixty characters & more, as configurations have" + "!" * 20: Event(holds),
    "two\nlines": Event(every_n_seconds=600) | LoopEvents.EPOCH_END,
    " ": Event(at_step=[7, 10**11]),
    "Off": None,
}


def plans() -> dict[str, Plan]:
    return {
        "epochs": Loop(range(1000), EVENTS, max_epochs=3).plan(),
        "many epochs": Loop(range(1000), EVENTS, max_steps=10**6).plan(),
        "seconds": Loop(range(1000), EVENTS, max_seconds=60).plan(),
        "stop_when": Loop(range(1000), EVENTS, max_epochs=3, stop_when=Event(holds)).plan(),
        "unknown length": Loop(lambda: iter(range(9)), EVENTS, max_epochs=3).plan(),
        "no step": Loop(range(9), EVENTS, max_steps=5, start_step=5).plan(),
        "no event": Loop(lambda: iter(range(9)), max_seconds=5).plan(),
        "one step": Loop(range(1), {"A": Event(every_n_steps=1)}, max_epochs=1).plan(),
    }


# Timelines


@pytest.mark.parametrize("name", plans())
def test_plans_are_well_formed_and_accessible(name: str, tmp_path: Path) -> None:
    plan = plans()[name]
    plan.save_svg(tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
    assert root.findtext(f"{SVG}title") == f"Plan: {plan.summary}"
    described = root.findtext(f"{SVG}desc") or ""
    assert all(row.when in described for row in plan.rows)
    assert len(root.findall(f"{SVG}g")) == len(plan.rows)
    assert "prefers-color-scheme" in text
    assert len(text) < 20_000


def test_a_notebook_shows_the_drawing_and_the_table() -> None:
    plan = plans()["epochs"]
    drawn, _, table = plan._repr_html_().partition("</svg>")
    assert "<style" not in drawn
    assert "a name &lt;of&gt;" in table
    assert "never fires" in table


def lane(plan: Plan, number: int) -> list[str]:
    """The paths of a lane: the rail, ticks, bands."""
    group = parsed(plan._repr_html_()).findall(f"{SVG}g")[number]
    return [each.get("d", "") for each in group.findall(f"{SVG}path")]


def test_a_tick_for_each_firing_and_a_band_for_close_ones() -> None:
    events = {"Few": Event(every_n_steps=20), "All": Event(every_n_steps=1), "Off": None}
    plan = Loop(range(100), events, max_epochs=10).plan()
    assert [path.count("v14") for path in lane(plan, 0)] == [0, 50]
    assert [path.count("M") for path in lane(plan, 1)] == [1, 1]
    assert len(lane(plan, 2)) == 1


def test_a_lane_is_dashed_if_more_may_fire() -> None:
    events = {"Known": Event(at_step=5), "Unknown": Event(holds)}
    drawn = Loop([1], events, max_epochs=1).plan()._repr_html_()
    assert ["stroke-dasharray" in each for each in drawn.split("<g>")[1:3]] == [False, True]


@pytest.mark.parametrize("steps", [10**15, 2**62])
def test_runs_of_any_length_are_drawn(steps: int) -> None:
    events = {"a" * 32: Event(every_n_steps=10**11), "Timer": Event(at_time=5)}
    root = parsed(Loop(range(9), events, max_steps=steps).plan()._repr_html_())
    numbers = [text for text in texts(root) if text.replace(",", "").isdigit()]
    assert 2 <= len(numbers) < 12


def test_control_characters_are_replaced() -> None:
    class Name:
        def __repr__(self) -> str:
            return "x\x1b[31m\x00"

    root = parsed(Loop(range(9), {Name(): Event(every_n_steps=2)}, max_epochs=1).plan()._svg(True))
    assert "x\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}" in texts(root)


# Breakdowns


def breakdown(counts: list[tuple[float, int]]) -> ElementTree.Element:
    parts = [("waiting", 0.25), ("bodies", 0.75), ("paused", 0.0)]
    histograms = [("waits: short", counts), ("bodies: none", [])]
    return parsed(drawing.breakdown("Profile: <all>", parts, histograms, True))


def test_the_parts_of_a_whole() -> None:
    root = breakdown([])
    assert root.findtext(f"{SVG}title") == "Profile: <all>"
    assert root.findtext(f"{SVG}desc") == "waiting; bodies; paused; waits: short; bodies: none"
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("height") == str(drawing.BAR)]
    assert [float(bar.get("width", "")) for bar in bars] == [196, 588, 0]
    assert texts(root)[:4] == ["Profile: <all>", "waiting", "bodies", "paused"]


@pytest.mark.parametrize(
    ("counts", "heights"),
    [
        ([], []),
        ([(0, 1)], ["88.0"]),
        ([(1e6, 90), (1e9, 10)], ["88.0", "9.8"]),
        ([(1e6, 10**9), (1e9, 1)], ["88.0", "1.0"]),
        ([(5, 1), (50, 2), (1e13, 3)], ["88.0", "88.0"]),
    ],
)
def test_histograms_have_columns_for_durations(
    counts: list[tuple[float, int]], heights: list[str]
) -> None:
    group = breakdown(counts).findall(f"{SVG}g")[0]
    shape = group.find(f"{SVG}path")
    assert shape is not None
    columns = shape.get("d", "").split("M")[1:]
    assert [column.partition("v-")[2].partition("h")[0] for column in columns] == heights
    assert all(0 < int(column.split()[0]) < drawing.WIDTH // 2 for column in columns)


def test_a_profile_is_drawn_and_written(tmp_path: Path) -> None:
    loop = Loop(range(30), {"Log <1>": Event(every_n_steps=3)}, max_epochs=1, profile=True)
    assert parsed(loop.profile._repr_html_()).tag == f"{SVG}svg"  # before the first step
    list(loop)
    loop.profile.save_svg(tmp_path / "profile.svg")
    root = ElementTree.fromstring((tmp_path / "profile.svg").read_text(encoding="utf-8"))
    assert (root.findtext(f"{SVG}title") or "").startswith("Profile: 30 steps in ")
    assert [len(group.findall(f"{SVG}path")) for group in root.findall(f"{SVG}g")] == [2, 2]
    assert "Log &lt;1&gt;" in loop.profile._repr_html_()


# Tables


def test_a_table_fits_into_80_columns() -> None:
    rows = [["name", "word " * 20, "1,234,567"], ["x" * 30, "", "8"]]
    lines = drawing.table(["a", "b", "c"], rows, right=[2]).splitlines()
    assert max(map(len, lines)) == 80
    assert lines[1] == "-" * 30 + "  " + "-" * 37 + "  " + "-" * 9
    assert lines[2].startswith("name ")
    assert lines[2].endswith("1,234,567")
    assert sum(line.split().count("word") for line in lines) == 20


def test_paragraphs_are_indented() -> None:
    lines = drawing.paragraphs("! ", ["word " * 20, "short"])
    assert [line[:6] for line in lines] == ["! word", "  word", "! shor"]
    assert max(map(len, lines)) <= 80
