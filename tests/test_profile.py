"""Where the time went: by a scripted clock, what a profile says, and the trace that it writes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dloop import Event, Loop, LoopError, LoopEvents, LoopState, profile
from fleet import Ahead, Fleet
from interpreter import CPYTHON, needs_reference_counts
from loops import ENTER, Enter

SVG = "{http://www.w3.org/2000/svg}"


class Nanoseconds:
    """The clock of profiles, which tests set; it starts nowhere special."""

    def __init__(self) -> None:
        self.now = 7_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Nanoseconds:
    clock = Nanoseconds()
    monkeypatch.setattr(profile, "perf_counter_ns", clock)
    monkeypatch.setattr(profile, "time_ns", lambda: 1_000_000_000)
    return clock


def batches(clock: Nanoseconds, count: int, seconds: float) -> Callable[[], Iterator[int]]:
    """What makes batches that take so many seconds each."""

    def generate() -> Iterator[int]:
        for batch in range(count):
            clock.advance(seconds)
            yield batch

    return generate


def near(value: float) -> Any:
    """The value of a histogram, whose bins are 3 % wide."""
    return pytest.approx(value, rel=0.04)


# What it measures


@pytest.mark.parametrize("enter", ENTER.values(), ids=ENTER)
def test_waiting_bodies_and_pauses(clock: Nanoseconds, enter: Enter) -> None:
    loop = Loop(
        batches(clock, 10, 2),
        {"Eval": Event(at_step=3)},
        max_epochs=2,
        lookahead=True,
        profile=True,
    )
    for _, events in enter(loop):
        clock.advance(1)
        if "Eval" in events:
            with loop.pause_clock(), loop.pause_clock():
                clock.advance(50)
    found = loop.profile
    bodies = 20 if enter is ENTER["steps"] else 10
    assert (found.waiting, found.bodies, found.paused) == (40, bodies, 50)
    assert found.total == 90 + bodies
    assert (found.agreement, found.other) == (0, 0)
    assert found.steps == 20
    assert found.steps_per_second == 20 / found.total
    assert found.recent_steps_per_second == pytest.approx(20 / (40 + bodies))


def test_it_can_be_asked_for_during_the_run_and_before_it(clock: Nanoseconds) -> None:
    loop = Loop(batches(clock, 10, 1), max_steps=10, profile=True)
    assert (loop.profile.total, loop.profile.steps, loop.profile.steps_per_second) == (0, 0, 0)
    assert loop.profile.recent_steps_per_second == 0
    assert loop.profile.waits == (0, 0, 0, 0)
    assert loop.profile.events == []
    assert "0 steps in 0 ns" in str(loop.profile)
    for _ in loop:
        clock.advance(2)
        if loop.global_step == 4:
            break
    assert loop.profile.waiting == 6  # with one that is ahead
    if CPYTHON:  # else the body that was left may not have ended yet
        assert loop.profile.bodies == 10


def test_percentiles(clock: Nanoseconds) -> None:
    loop = Loop([0] * 1000, max_epochs=1, profile=True)
    for _ in loop:
        clock.advance(0.001 if loop.global_step < 940 else 0.1)
        if loop.global_step == 999:
            clock.advance(5)
    assert loop.profile.body_times == (near(0.001), near(0.1), near(0.1), 5.1)
    assert loop.profile.waits == (0, 0, 0, 0)


@pytest.mark.no_core
@pytest.mark.parametrize("nanoseconds", [0, 1, 31, 32, 63, 64, 65, 1000, 10**6, 12345678901, 2**62])
def test_a_histogram_is_right_within_three_percent(nanoseconds: int) -> None:
    durations = profile.Durations()
    durations.add(nanoseconds)
    assert durations.quantile(0.5) == pytest.approx(nanoseconds / 1e9, rel=0.032)
    assert durations.longest == nanoseconds


# What events cost


def test_the_steps_of_an_event_cost_what_is_above_quiet_ones(clock: Nanoseconds) -> None:
    events = {"Log": Event(every_n_steps=10), "Save": Event(every_n_steps=50)}
    loop = Loop([0] * 100, events, max_steps=100, profile=True)
    for _, due in loop:
        clock.advance(1)
        if "Log" in due:
            clock.advance(0.5)
        if "Save" in due:
            clock.advance(19)
    costs = {cost.names: (cost.count, cost.seconds) for cost in loop.profile.events}
    ends = (LoopEvents.EPOCH_END, LoopEvents.TRAINING_END)
    assert costs == {
        ("Log",): (8, near(0.5)),
        ("Log", "Save"): (1, near(19.5)),
        ("Log", *ends, "Save"): (1, near(19.5)),
    }
    assert [cost.names[0] for cost in loop.profile.events][-1] == "Log"
    total = loop.profile.total
    assert sum(cost.share for cost in loop.profile.events) == pytest.approx(43 / total, rel=0.04)
    assert "  Log + Save: 1 time, 19.5 s each, 13.6 % of the run\n" in str(loop.profile)


def test_without_a_quiet_step_the_cheapest_is_the_measure(clock: Nanoseconds) -> None:
    events = {"Log": Event(every_n_steps=1), "Save": Event(every_n_steps=5)}
    loop = Loop([0] * 99, events, max_steps=20, profile=True)
    for _, due in loop:
        clock.advance(3 if "Save" in due else 1)
    costs = {cost.names[:2]: cost.seconds for cost in loop.profile.events if cost.count > 1}
    assert costs == {("Log",): 0, ("Log", "Save"): 2}


def test_sets_of_events_are_bounded(clock: Nanoseconds) -> None:
    events = {number: Event(at_step=number) for number in range(500)}
    loop = Loop([0] * 600, events, max_epochs=1, profile=True)
    list(loop)
    assert len(loop.profile.events) == profile.MOST_SETS
    lines = str(loop.profile).splitlines()
    assert sum("1 time" in line for line in lines) == 10
    assert lines[-1].endswith("190 more, in `events`; there may be others, which are not measured")


def test_the_dearest_events_are_printed(clock: Nanoseconds) -> None:
    events = {f"E{number}\n": Event(at_step=number) for number in range(13)}
    loop = Loop([0] * 20, events, max_steps=20, profile=True)
    for _ in loop:
        clock.advance(1)
    assert repr(loop.profile) == "<Profile: 20 steps in 20 s: 1 a second, 1 lately>"
    lines = str(loop.profile).splitlines()
    assert lines[-1] == "  4 more, in `events`"
    assert any(line.startswith("  'E0\\n': 1 time") for line in lines)


def test_agreement_is_told_apart(clock: Nanoseconds) -> None:
    class Slow(Ahead):
        def finish(self) -> list[int]:
            clock.advance(3)
            return super().finish()

    loop = Loop(range(10), max_epochs=1, sync=Slow(Fleet(1), 0), sync_every=4, profile=True)
    for _ in loop:
        clock.advance(1)
    # the epoch's length and two agreements; the comparison is before the first step is asked for
    assert (loop.profile.bodies, loop.profile.waiting, loop.profile.agreement) == (10, 0, 9)
    assert loop.profile.other == 0
    assert loop.profile.total == 19


# The drawing


def profiled(clock: Nanoseconds) -> profile.Profile:
    """Of 100 steps that wait for 1 ms and take 9 ms; of these every tenth a second more."""
    events = {"Save <1>": Event(every_n_steps=10)}
    loop = Loop(batches(clock, 100, 0.001), events, max_steps=100, profile=True)
    for _, due in loop:
        clock.advance(0.009)
        if due:
            with loop.pause_clock():
                clock.advance(1)
    return loop.profile


def texts(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


def test_a_drawing_of_the_shares(clock: Nanoseconds, tmp_path: Path) -> None:
    found = profiled(clock)
    found.save_svg(tmp_path / "profile.svg")
    text = (tmp_path / "profile.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
    title = "Profile: 100 steps in 11 s: 9.091 a second, 100 lately"
    assert (root.findtext(f"{SVG}title"), texts(root)[0]) == (title, title)
    described = (root.findtext(f"{SVG}desc") or "").split("; ")
    assert described[:3] == [
        "waiting for data: 100 ms, 0.9 %",
        "bodies: 900 ms, 8.2 %",
        "paused: 10 s, 90.9 %",
    ]
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    assert [float(bar.get("width", "")) for bar in bars] == [
        pytest.approx(784 * share / 11, abs=0.1) for share in (0.1, 0.9, 10, 0, 0)
    ]
    assert "prefers-color-scheme" in text


def test_histograms_have_columns_where_durations_came(clock: Nanoseconds) -> None:
    root = ElementTree.fromstring(profiled(clock)._repr_html_().partition("</svg>")[0] + "</svg>")
    waits, bodies = root.findall(f"{SVG}g")
    assert texts(waits)[0] == "wait of a step"
    # The last has no wait, since the loop looks ahead; it does not make the axis longer
    assert texts(waits)[2:] == ["1 ms", "10 ms"]
    assert texts(bodies)[0] == "body of a step"
    assert texts(bodies)[1].endswith("longest 1.01 s")
    assert texts(bodies)[2:] == ["1 ms", "10 ms", "100 ms", "1 s", "10 s"]
    columns = bodies.find(f"{SVG}path")
    assert columns is not None
    often, rare = (columns.get("d") or "").split("M")[1:]
    assert "v-88.0" in often
    assert "v-9.8" in rare  # 10 steps to 90


def test_a_notebook_shows_the_costs_of_events_too(clock: Nanoseconds) -> None:
    found = profiled(clock)
    drawn, _, listed = found._repr_html_().partition("</svg>")
    assert "<style" not in drawn
    assert listed.count("<li>") == len(found.events) == 2
    assert "Save &lt;1&gt;: 9 times, 1 s each" in listed


def test_a_drawing_before_the_first_step(clock: Nanoseconds) -> None:
    html = Loop([0], max_epochs=1, profile=True).profile._repr_html_()
    root = ElementTree.fromstring(html.partition("</svg>")[0] + "</svg>")
    assert [each.find(f"{SVG}path") for each in root.findall(f"{SVG}g")] == [None, None]


@pytest.mark.parametrize("longest", [1e-9, 1e-6, 0.9999999, 1, 10, 12345.678])
def test_durations_of_any_length_have_their_column(clock: Nanoseconds, longest: float) -> None:
    loop = Loop([0] * 3, max_epochs=1, profile=True)
    for batch, (_, _) in enumerate(loop):
        clock.advance(longest if batch == 2 else 1e-9)
    root = ElementTree.fromstring(loop.profile._repr_html_().partition("</svg>")[0] + "</svg>")
    columns = root.findall(f"{SVG}g")[1].find(f"{SVG}path")
    assert columns is not None
    assert (columns.get("d") or "").count("M") == (1 if longest == 1e-9 else 2)
    ends = [float(each.split()[0]) for each in (columns.get("d") or "").split("M")[1:]]
    assert all(408 <= end <= 792 for end in ends)


# What it leaves alone


def test_events_batches_and_states_are_the_same() -> None:
    def trace(**arguments: Any) -> list[Any]:
        log = {"Log": Event(every_n_steps=3)}
        loop = Loop(lambda: iter(range(7)), log, max_epochs=2, clock=int, **arguments)
        return [(batch, sorted(map(str, due)), loop.state_dict()) for batch, due in loop]

    assert trace(profile=True) == trace()


def test_another_run_begins_anew() -> None:
    loop = Loop(range(10), max_epochs=1, profile=True)
    list(loop)
    assert loop.profile.steps == 10
    loop.restart()
    assert loop.profile.steps == 0


@needs_reference_counts
@pytest.mark.parametrize("way", ["break", "error"])
def test_a_body_in_which_the_loop_is_left_ends_there(clock: Nanoseconds, way: str) -> None:
    events = {"Eval": Event(every_n_steps=2)}
    loop = Loop(batches(clock, 10, 0.5), events, max_steps=10, dataloader_len=10, profile=True)
    while loop.stop_reason is None:
        with contextlib.suppress(ZeroDivisionError):
            for _, due in loop:
                clock.advance(1)
                if "Eval" in due:
                    clock.advance(2)
                    if way == "error":
                        raise ZeroDivisionError
                    break
        clock.advance(1000)
    found = loop.profile
    assert (found.steps, found.waiting, found.bodies, found.total) == (10, 5, 20, 25)
    assert sum(cost.count for cost in found.events) == 5
    assert found.steps_per_second == 10 / 25


def test_an_older_iterator_changes_nothing(clock: Nanoseconds) -> None:
    loop = Loop(range(10), max_epochs=1, profile=True)
    older = iter(loop)
    next(older)
    for batch, _ in loop:
        clock.advance(1)
        if batch == 5:
            with pytest.raises(LoopError):
                next(older)
            clock.advance(1)
    assert loop.profile.bodies == 10


@pytest.mark.parametrize("is_sized", [False, True])
def test_what_a_loader_does_at_its_end_is_waiting(clock: Nanoseconds, is_sized: bool) -> None:
    class Loader:
        def __iter__(self) -> Iterator[int]:
            yield from range(5)
            clock.advance(3)  # workers end

    class SizedLoader(Loader):
        def __len__(self) -> int:
            return 5

    loop = Loop(SizedLoader() if is_sized else Loader(), max_epochs=2, profile=True)
    for _ in loop:
        clock.advance(1)
    found = loop.profile
    assert (found.waiting, found.bodies, found.other) == (6, 10, 0)
    assert found.total == 16


def test_an_error_that_is_an_event_is_no_step(clock: Nanoseconds) -> None:
    def source() -> Iterator[int]:
        yield from range(20)
        clock.advance(2)
        raise OSError

    loop = Loop(source, max_epochs=1, profile=True, on_exception="event")
    with pytest.raises(OSError):
        list(loop.chunks(8))
    assert loop.profile.steps == loop.state.steps_done == 20
    assert loop.profile.waiting == 2


def test_without_a_profile_asking_for_one_is_an_error() -> None:
    loop = Loop(range(3), max_epochs=1)
    with pytest.raises(LoopError, match="made without profile=True"):
        loop.profile  # noqa: B018


@pytest.mark.no_core
@pytest.mark.parametrize("wrong", [0, -1, "all"])
def test_what_is_no_number_of_steps_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="profile="):
        Loop(range(3), max_epochs=1, profile=wrong)


# The trace


def test_a_trace_of_the_last_steps(clock: Nanoseconds, tmp_path: Path) -> None:
    loop = Loop(
        batches(clock, 6, 0.25), {"Log": Event(at_step=4)}, max_steps=6, profile=2, dataloader_len=6
    )
    for _, due in loop:
        clock.advance(1)
        if "Log" in due:
            with loop.pause_clock():
                clock.advance(2)
    loop.profile.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    assert [event["ph"] for event in events[:2]] == ["M", "M"]
    # as the Trace Event Format has them: microseconds
    found = [(each["name"], each["ph"], each["ts"], each.get("dur")) for each in events[2:]]
    began = 1e6 + 5 * 0.25e6 + 4e6  # the fifth body
    assert found == [
        ("data", "X", began - 0.25e6, 0.25e6),
        ("body", "X", began, 3e6),
        ("paused", "X", began + 1e6, 2e6),
        ("Log", "i", began, None),
        ("data", "X", began + 3e6, 0.25e6),
        ("body", "X", began + 3.25e6, 1e6),
        ("LoopEvents.EPOCH_END", "i", began + 3.25e6, None),
        ("LoopEvents.TRAINING_END", "i", began + 3.25e6, None),
    ]
    for event in events:
        assert {"name", "ph", "pid"} <= event.keys()
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert {"ts", "tid", "cat", "args"} <= event.keys()
        if event["ph"] == "i":
            assert event["s"] == "t"


def test_a_trace_in_the_middle_of_a_step(clock: Nanoseconds, tmp_path: Path) -> None:
    loop = Loop(batches(clock, 6, 0.25), max_epochs=1, profile=True)
    with loop.pause_clock():  # before the first step
        clock.advance(1)
    for batch, _ in loop:
        clock.advance(1)
        if batch == 1:
            loop.profile.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert [event["name"] for event in trace["traceEvents"]].count("body") == 1
    assert (loop.profile.paused, loop.profile.bodies) == (0, 6)  # that pause was in no body


def test_spans_nest_exactly_and_lists_of_batches_have_one_of_data(
    clock: Nanoseconds, tmp_path: Path
) -> None:
    loop = Loop(range(600), max_epochs=1, profile=True)
    clock.now += 1_790_000_000_123_456_789
    for _ in loop.chunks(50):
        clock.now += 2587
        pause = loop.pause_clock()
        pause.__enter__()
        clock.now += 187
    loop.profile.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text(), parse_float=Fraction)
    spans = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    assert [each["name"] for each in spans].count("data") == 12
    pairs = [(each["ts"], each["ts"] + each["dur"]) for each in spans if each["name"] != "data"]
    for (began, ended), (paused, went_on) in zip(pairs[::2], pairs[1::2]):
        assert began < paused
        assert went_on == ended


def test_a_step_whose_batch_an_interrupt_has_kept_has_no_span_of_data(
    clock: Nanoseconds, tmp_path: Path
) -> None:
    interrupts = [1]

    def condition(state: LoopState) -> None:
        if state.global_step in interrupts:
            interrupts.clear()
            raise KeyboardInterrupt

    loop = Loop(batches(clock, 3, 1), {"C": Event(condition)}, max_steps=3, profile=True)
    with pytest.raises(KeyboardInterrupt):
        list(loop)
    list(loop)
    loop.profile.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [(each["name"], each["args"].get("step")) for each in trace["traceEvents"][2:]]
    assert [step for name, step in spans if name == "data"] == [0, 2]
    assert [step for name, step in spans if name == "body"] == [0, 1, 2]
    assert loop.profile.waiting == 3


def test_ranks_are_processes_in_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    loop = Loop(range(3), max_epochs=1, profile=True)
    list(loop)
    loop.profile.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {event["pid"] for event in trace["traceEvents"]} == {3}
    assert trace["traceEvents"][0]["args"] == {"name": "rank 3"}


@pytest.mark.no_core
@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ns"),
        (1.5e-9, "1.5 ns"),
        (2.3456e-6, "2.35 µs"),
        (0.5, "500 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (59.9, "59.9 s"),
        (90, "1.5 min"),
        (7200, "2 h"),
    ],
)
def test_durations_are_spelled_in_three_digits(seconds: float, text: str) -> None:
    assert profile.spelled(seconds) == text
