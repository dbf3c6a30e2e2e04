"""The example in the project's first description runs unchanged, and its features work."""

from __future__ import annotations

import array
import collections
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from dloop import Event, Loop, LoopEvents, LoopState

# The example's code, unchanged (including spaces at the ends of lines).
EXAMPLE = """\
from dloop import Event, Loop, LoopEvents

train_loop = Loop(
    dataloader,\x20
    max_epochs=3, # specify ONE stopping condition: epochs, steps, or time (in seconds)
    # max_steps=50_000, # alternative: stop after 50k steps
    # max_seconds=3600, # alternative: stop after 1 hour of training
    events={ # [1]\x20
        "ModelParametersUpdate": Event(every_n_steps=16),\x20
        "Logging": Event(every_n_steps=100),
        "DecreaseLR": Event(at_step=10_000),
        "HourlyCheckpoint": Event(every_n_seconds=3600),
        "TenMinuteWarning": Event(at_time=50 * 60)  # 50 minutes into training
    }
)

for batch, batch_events in train_loop: # [2]
    # <your-code> run forward and compute gradients </your-code>
   \x20
    if "ModelParametersUpdate" in batch_events: # [3]
        # <your-code> update model parameter </your-code>
       \x20
    if "Logging" in batch_events: # [4]
        # <your-code> log progress </your-code>

    if "DecreaseLR" in batch_events: # [5]
        # <your-code> decrease the learning rate </your-code>
       \x20
    if "HourlyCheckpoint" in batch_events: # [6]
        # <your-code> save checkpoint every hour </your-code>
       \x20
    if "TenMinuteWarning" in batch_events: # [7]
        # <your-code> log warning that training will end soon </your-code>
       \x20
    if LoopEvents.EPOCH_END in batch_events: # [8]
        # <your-code> run validation? Checkpoint? </your-code>
"""

STEPS = range(21_000)


class DataLoader:
    """7000 batches of a data set, in an order that depends on the epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 7000

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, batch) for batch in range(7000))


def with_bodies(text: str, body: Callable[[str], str]) -> str:
    """The text with a line of code after each of its `<your-code>` comments."""
    comment = re.compile(r"^( *)# <your-code> (.*) </your-code>$", re.MULTILINE)
    done, count = comment.subn(lambda found: f"{found[0]}\n{found[1]}{body(found[2])}", text)
    assert count == 7
    return done


def run_example(change: Callable[[str], str] = str, **names: Any) -> dict[str, Any]:
    namespace = {"dataloader": DataLoader(), **names}
    exec(compile(change(EXAMPLE), "example", "exec"), namespace)
    return namespace


def test_the_example_runs_unchanged() -> None:
    after = run_example(lambda text: with_bodies(text, lambda _: "pass"))
    loop = after["train_loop"]
    assert (loop.epoch, loop.global_step, loop.epoch_step) == (2, 20_999, 6_999)
    assert loop.stop_reason == "max_epochs"
    assert after["batch"] == (2, 6_999)
    assert after["batch_events"] == {
        *["Logging", LoopEvents.EPOCH_END, LoopEvents.TRAINING_END],
    }


def test_each_body_of_the_example_runs_at_the_right_steps() -> None:
    done: dict[str, list[int]] = collections.defaultdict(list)
    seconds = iter(range(30_000))

    def change(text: str) -> str:
        text = text.replace("max_epochs=3,", "max_epochs=3, clock=clock,", 1)
        return with_bodies(text, lambda what: f"record({what!r}, train_loop.global_step)")

    run_example(
        change,
        clock=seconds.__next__,
        record=lambda what, step: done[what].append(step),
    )
    assert done == {
        "run forward and compute gradients": list(STEPS),
        "update model parameter": [step for step in STEPS if (step + 1) % 16 == 0],
        "log progress": [step for step in STEPS if (step + 1) % 100 == 0],
        "decrease the learning rate": [10_000],
        "save checkpoint every hour": [3_599, 7_199, 10_799, 14_399, 17_999],
        "log warning that training will end soon": [2_999],
        "run validation? Checkpoint?": [6_999, 13_999, 20_999],
    }


@pytest.mark.parametrize(
    ("limit", "steps"), [("max_steps=50_000", 50_000), ("max_seconds=3600", 3_600)]
)
def test_the_alternative_limits_in_the_examples_comments_work(limit: str, steps: int) -> None:
    def change(text: str) -> str:
        text = text.replace("max_epochs=3,", "clock=clock,", 1)
        text, count = re.subn(rf"# ({limit},)", r"\1", text)
        assert count == 1
        return with_bodies(text, lambda _: "pass")

    after = run_example(change, clock=iter(range(60_000)).__next__)
    loop = after["train_loop"]
    assert loop.global_step == steps - 1
    assert loop.stop_reason == limit.partition("=")[0]
    assert LoopEvents.TRAINING_END in after["batch_events"]
    assert loop.epoch == (steps - 1) // 7000


# The features that the description lists, in its order


def test_the_loop_counts_epochs_and_steps() -> None:
    loop = Loop(["a", "b"], max_epochs=2)
    seen = [(batch, loop.epoch, loop.epoch_step, loop.global_step) for batch, _ in loop]
    assert seen == [("a", 0, 0, 0), ("b", 0, 1, 1), ("a", 1, 0, 2), ("b", 1, 1, 3)]


@pytest.mark.parametrize(
    ("limit", "steps"), [({"max_epochs": 2}, 6), ({"max_steps": 4}, 4), ({"max_seconds": 5}, 5)]
)
def test_epochs_steps_or_time_limit_the_run(limit: dict[str, int], steps: int) -> None:
    loop = Loop([0] * 3, clock=iter(range(99)).__next__, **limit)  # type: ignore[arg-type]
    assert len(list(loop)) == steps


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        (Event(at_step=[2, 5]), [2, 5]),
        (Event(every_n_steps=4), [3, 7]),
        (Event(at_time=[3, 7]), [2, 6]),
        (Event(every_n_seconds=5), [4, 9]),
        (Event(lambda state: state.global_step in (1, 4)), [1, 4]),
    ],
    ids=["at steps", "every n steps", "at times", "every n seconds", "any logic"],
)
def test_each_kind_of_event_fires_at_its_steps(event: Event, steps: list[int]) -> None:
    loop = Loop([0] * 10, {"Named": event}, max_epochs=1, clock=iter(range(99)).__next__)
    assert [loop.global_step for _, events in loop if "Named" in events] == steps


def test_a_condition_is_called_with_a_loop_state() -> None:
    states: list[LoopState] = []
    list(Loop([0], {"E": Event(condition_function=states.append)}, max_steps=1))
    assert [type(state).__name__ for state in states] == ["LoopState"]


def test_importing_dloop_imports_only_the_standard_library() -> None:
    program = (
        "import sys, json; before = set(sys.modules); import dloop;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "dloop" in loaded
    loaded = {name for name in loaded if name not in sys.stdlib_module_names}
    assert {name for name in loaded if not name.startswith(("_cython", "cython"))} == {"dloop"}


def test_what_a_loop_does_not_use_is_not_imported() -> None:
    program = (
        "import json, sys, dloop\n"
        "list(dloop.Loop([1], {'Log': dloop.Event(every_n_steps=1)}, max_epochs=1))\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('dloop.')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    unused = {"agreement", "drawing", "plan", "profile", "progress", "signals", "state", "sync"}
    assert not unused & {name.partition(".")[2] for name in json.loads(done.stdout)}


def test_dloop_has_no_dependencies() -> None:
    requires = importlib.metadata.requires("dloop") or []
    assert [line for line in requires if "extra ==" not in line] == []


class OldSequence:
    def __getitem__(self, at: int) -> int:
        return [1, 2, 3][at]


class Iterates:
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2, 3])


def generate() -> Iterator[int]:
    yield from (1, 2, 3)


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 2, 3],
    "tuple": lambda: (1, 2, 3),
    "range": lambda: range(1, 4),
    "set": lambda: {1, 2, 3},
    "dict": lambda: dict.fromkeys([1, 2, 3]),
    "dict view": lambda: {"a": 1, "b": 2, "c": 3}.values(),
    "deque": lambda: collections.deque([1, 2, 3]),
    "array": lambda: array.array("i", [1, 2, 3]),
    "bytes": lambda: bytes([1, 2, 3]),
    "memoryview": lambda: memoryview(bytes([1, 2, 3])),
    "object with iter": Iterates,
    "object with getitem": OldSequence,
    "generator": generate,
    "generator function": lambda: generate,
    "class": lambda: Iterates,
    "list iterator": lambda: iter([1, 2, 3]),
    "map": lambda: map(int, "123"),
    "zip": lambda: (one for (one,) in zip([1, 2, 3])),
    "two-argument iter": lambda: iter(collections.deque([1, 2, 3, 4]).popleft, 4),
    "file": lambda: map(int, io.StringIO("1\n2\n3\n")),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 3}])
def test_any_iterable_can_be_the_dataloader(kind: str, limit: dict[str, int]) -> None:
    source: Iterable[int] = SOURCES[kind]()
    loop = Loop(source, **limit)  # type: ignore[arg-type]
    assert [batch for batch, _ in loop] == [1, 2, 3]
