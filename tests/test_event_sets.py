"""The events of a step, an immutable set; the loop's references to batches; LoopState copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Hashable, Iterator, Set
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cores import CORES, use_core
from dloop import Event, Loop, LoopEvents, LoopWarning
from interpreter import needs_reference_counts
from recording_loaders import Batch

EPOCH_END, TRAINING_END = LoopEvents.EPOCH_END, LoopEvents.TRAINING_END


class Phase(Enum):
    WARM = 1
    COLD = 2


NAMES: list[Any] = ["Log", "log", 0, 1, -1, 2**70, ("a", 1), (), Phase.WARM, Phase.COLD, None, b"x"]


def different_events(count: int) -> dict[str, Event]:
    """`count` events: half of them have a period each, the others a step each."""
    periodic = {f"every {n}": Event(every_n_steps=n) for n in range(1, count, 2)}
    return {**periodic, **{f"at {k}": Event(at_step=k) for k in range(0, count, 2)}}


def due_by_formula(step: int, count: int) -> frozenset[str]:
    every = {f"every {n}" for n in range(1, count, 2) if (step + 1) % n == 0}
    return frozenset(every | ({f"at {step}"} if step < count and step % 2 == 0 else set()))


# Equality and operators


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 4), max_size=6), st.integers(1, 12))
def test_the_events_of_a_step_equal_the_frozenset_of_their_names(
    periods: dict[Any, int], steps: int
) -> None:
    events = {name: Event(every_n_steps=n) for name, n in periods.items()}
    for step, (_, due) in enumerate(Loop([0] * 3, events, max_steps=steps)):
        names: set[Hashable] = {name for name, n in periods.items() if (step + 1) % n == 0}
        names |= {EPOCH_END} if step % 3 == 2 else set()
        names |= {TRAINING_END} if step == steps - 1 else set()
        assert due == frozenset(names) and frozenset(names) == due
        assert due == names and names == due
        assert hash(due) == hash(frozenset(names))
        assert set(due) == names
        assert len(due) == len(names)
        assert bool(due) == bool(names)
        assert all((name in due) == (name in names) for name in periods)
        assert all((member in due) == (member in names) for member in LoopEvents)


def steps_of_a_small_run() -> list[Any]:
    """The events of four steps: none; a; b; a, b, and both ends."""
    events = {"a": Event(at_step=[1, 3]), "b": Event(at_step=[2, 3])}
    return [due for _, due in Loop([0] * 4, events, max_epochs=1)]


def test_the_operators_are_those_of_frozensets() -> None:
    quiet, a, b, both = steps_of_a_small_run()
    assert isinstance(a, Set) and isinstance(quiet, Set)
    assert not isinstance(a, set)
    assert a | b == {"a", "b"} == b | a
    assert a | {"x"} == {"a", "x"} == {"x"} | a
    assert both & {"a", "x"} == {"a"} == {"a", "x"} & both
    assert both - a == {"b", EPOCH_END, TRAINING_END}
    assert {"a", "x"} - a == {"x"}
    assert a ^ b == {"a", "b"}
    assert a < both and a <= both and both > b and not a <= b
    assert quiet <= a and quiet | a == a and a - a == quiet
    assert a.isdisjoint(b) and not both.isdisjoint(b)
    assert a != b and a != "a" and a != ["a"]
    assert sorted(both & {"a", "b"}) == ["a", "b"]


def test_set_operators_with_unknown_names_do_not_warn() -> None:
    _, a, _, both = steps_of_a_small_run()
    assert not a & {"unknown"}
    assert not {"unknown"} <= both
    assert a.isdisjoint({"unknown"})


def test_the_events_can_be_keys_of_a_dictionary() -> None:
    quiet, a, b, _ = steps_of_a_small_run()
    seen = {a: 1, quiet: 2}
    assert seen[frozenset({"a"})] == 1 and seen[frozenset()] == 2
    assert {frozenset({"b"}): 3}[b] == 3


@pytest.mark.parametrize("change", ["add", "discard", "remove", "clear", "update", "pop"])
def test_the_events_cannot_be_changed(change: str) -> None:
    for due in steps_of_a_small_run():
        assert not hasattr(due, change)


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda due: pickle.loads(pickle.dumps(due))]
)
def test_the_events_can_be_copied_and_pickled(make: Callable[[Any], Any]) -> None:
    for due in steps_of_a_small_run():
        again = make(due)
        assert again == due and hash(again) == hash(due) and set(again) == set(due)


def test_the_repr_shows_the_names() -> None:
    quiet, a, _, both = steps_of_a_small_run()
    assert "'a'" in repr(a) and "'b'" not in repr(a)
    assert "LoopEvents.EPOCH_END" in repr(both)
    assert "'a'" not in repr(quiet)


@pytest.mark.parametrize("count", [3, 64, 65, 200])
def test_the_events_of_a_step_do_not_change_with_later_steps(count: int) -> None:
    loop = Loop([0] * 50, different_events(count), max_steps=400)
    kept = [due for _, due in loop]
    for step, due in enumerate(kept):
        ends = {EPOCH_END} if step % 50 == 49 else set()
        ends |= {TRAINING_END} if step == 399 else set()
        assert due == due_by_formula(step, count) | ends


# Many events


@pytest.mark.parametrize("count", [63, 64, 65, 129, 200, 2000])
def test_any_number_of_events_fires_at_the_right_steps(count: int) -> None:
    events = different_events(count)
    steps = 300
    for step, (_, due) in enumerate(Loop(lambda: iter([0] * 7), events, max_steps=steps)):
        expected = due_by_formula(step, count)
        assert {name for name in events if name in due} == expected
        assert due - set(LoopEvents) == expected
        assert (EPOCH_END in due) == (step % 7 == 6)
        assert (TRAINING_END in due) == (step == steps - 1)


def test_many_timers_and_conditions_fire_at_the_right_steps() -> None:
    events: dict[Hashable, Any] = {}
    for n in range(1, 71):
        events["timer", n] = Event(every_n_seconds=n)
        events["time", n] = Event(at_time=n)
        events["condition", n] = Event(lambda state, n=n: state.global_step % n == 0)
        events["joined", n] = Event(at_step=n) | (EPOCH_END if n % 2 else TRAINING_END)
    loop = Loop([0] * 10, events, max_steps=100, clock=iter(range(200)).__next__)
    for step, (_, due) in enumerate(loop):
        expected: set[Any] = {("timer", n) for n in range(1, 71) if (step + 1) % n == 0}
        expected |= {("condition", n) for n in range(1, 71) if step % n == 0}
        expected |= {("time", step + 1)} if step < 70 else set()
        expected |= {("joined", step)} if 1 <= step <= 70 else set()
        if step % 10 == 9:
            expected |= {("joined", n) for n in range(1, 71, 2)} | {EPOCH_END}
        if step == 99:
            expected |= {("joined", n) for n in range(2, 71, 2)} | {TRAINING_END}
        assert due == expected


def test_the_set_contains_the_name_objects_that_were_given() -> None:
    names = {name: Event(every_n_steps=1) for name in NAMES}
    (_, due), *_ = Loop([0], names, max_steps=1)
    for name in NAMES:
        assert name in due
        assert any(each is name for each in due)


def test_changing_the_events_mapping_afterwards_has_no_effect() -> None:
    events = {"a": Event(every_n_steps=1)}
    loop = Loop([0], events, max_steps=2)
    events["b"] = Event(every_n_steps=1)
    del events["a"]
    for _ in range(2):
        assert [set(due) - set(LoopEvents) for _, due in loop] == [{"a"}, {"a"}]
        loop.restart()


# Unknown names


def warnings_of(ask: Callable[[], object]) -> list[str]:
    with pytest.warns() as caught:
        ask()
    assert {warning.category for warning in caught} == {LoopWarning}
    return [str(warning.message) for warning in caught]


def test_an_unknown_name_warns_once_per_loop_and_suggests_the_closest_name() -> None:
    events = {"Log": Event(every_n_steps=1), "Checkpoint": Event(at_step=99)}

    def ask() -> None:
        answers = []
        for _, due in Loop([0] * 5, events, max_epochs=1):
            answers += ["Lgo" in due, "Chekpoint" in due, "Lgo" in due]
        assert answers == [False] * 15

    expected = [
        "'Lgo' is no event of this loop; did you mean 'Log'?",
        "'Chekpoint' is no event of this loop; did you mean 'Checkpoint'?",
    ]
    assert warnings_of(ask) == expected
    assert warnings_of(ask) == expected, "every loop warns for itself"


@pytest.mark.parametrize("name", ["xyz", 5, ("far", "away"), Phase.COLD, None], ids=repr)
def test_an_unknown_name_that_is_close_to_no_other_warns_without_suggestion(name: Any) -> None:
    events = {"Log": Event(every_n_steps=1)}

    def ask() -> None:
        assert [name in due for _, due in Loop([0] * 3, events, max_epochs=1)] == [False] * 3

    assert warnings_of(ask) == [f"{name!r} is no event of this loop"]


class Name:
    """An unknown name that weak references can refer to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"Name({self.number})"


@pytest.mark.filterwarnings("ignore::dloop.LoopWarning")
def test_the_loop_does_not_keep_all_unknown_names() -> None:
    asked = 20_000
    loop = Loop([0], {"Log": Event(every_n_steps=1)}, max_steps=2)
    _, due = next(iter(loop))
    references = []
    for number in range(asked):
        name = Name(number)
        assert name not in due
        references.append(weakref.ref(name))
        del name
    gc.collect()
    assert sum(reference() is not None for reference in references) < asked / 2


def test_unknown_names_do_not_warn_at_steps_without_events() -> None:
    for _, due in Loop([0] * 5, {"Log": Event(at_step=99)}, max_steps=4):
        assert TRAINING_END in due or "Lgo" not in due


def test_known_names_and_loop_events_do_not_warn() -> None:
    events = {"Log": Event(every_n_steps=1), "Never": Event(at_step=99)}
    for _, due in Loop([0] * 3, events, max_steps=2):
        assert "Log" in due and "Never" not in due and EPOCH_END not in due


def test_the_events_of_a_step_work_after_their_loop_is_freed() -> None:
    _, a, _, _ = steps_of_a_small_run()
    assert "a" in a and "b" not in a
    assert warnings_of(lambda: "bb" in a) == ["'bb' is no event of this loop; did you mean 'b'?"]


# References to batches


class Sized:
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        return (Batch() for _ in range(4))


class Indexed:
    def __getitem__(self, at: int) -> Batch:
        if at >= 4:
            raise IndexError
        return Batch()


def generator() -> Iterator[Batch]:
    for _ in range(4):
        yield Batch()


SOURCES: dict[str, Callable[[], Any]] = {
    "sized": Sized,
    "indexed": Indexed,
    "generator function": lambda: generator,
    "callable of sized": lambda: Sized,
    "stream": generator,
    "map": lambda: map(type.__call__, [Batch] * 4),
}


@needs_reference_counts
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("lookahead", [None, True, False])
@pytest.mark.parametrize("busy", [False, True])
def test_a_batch_is_freed_when_the_body_deletes_it(
    kind: str, lookahead: bool | None, busy: bool
) -> None:
    events = {"All": Event(lambda state: True), "Two": Event(every_n_steps=2)} if busy else {}
    steps = 0
    for batch, _ in Loop(SOURCES[kind](), events, max_steps=4, lookahead=lookahead):
        reference = weakref.ref(batch)
        assert reference() is not None
        del batch
        assert reference() is None
        steps += 1
    assert steps == 4


@needs_reference_counts
@pytest.mark.parametrize("lookahead", [None, True, False])
def test_the_items_of_a_batch_are_freed_when_the_body_deletes_it(lookahead: bool | None) -> None:
    def source() -> Iterator[list[Batch]]:
        for _ in range(3):
            yield [Batch(), Batch()]

    for batch, _ in Loop(source, max_steps=5, lookahead=lookahead):
        references = [weakref.ref(item) for item in batch]
        del batch
        assert [reference() for reference in references] == [None, None]


@needs_reference_counts
def test_the_loop_keeps_no_reference_to_an_item_of_a_list() -> None:
    data = [Batch() for _ in range(4)]
    loop = Loop(data, max_epochs=1)
    for batch, _ in loop:
        reference = weakref.ref(batch)
        data[loop.global_step] = Batch()
        del batch
        assert reference() is None


@needs_reference_counts
def test_a_batch_is_freed_when_the_body_deletes_the_pair() -> None:
    iterator = iter(Loop(generator, max_epochs=2))
    for pair in iterator:
        reference = weakref.ref(pair[0])
        del pair
        assert reference() is None


def test_pairs_do_not_change_with_later_steps() -> None:
    pairs = list(Loop([7, 8, 9], {"Odd": Event(every_n_steps=2)}, max_epochs=1))
    assert pairs == [(7, set()), (8, {"Odd"}), (9, {EPOCH_END, TRAINING_END})]
    iterator = iter(Loop([7, 8], max_epochs=1))
    first = next(iterator)
    second = next(iterator)
    assert (first[0], second[0]) == (7, 8)


def test_thousands_of_different_combinations_of_events_are_right() -> None:
    def has(place: int) -> Event:
        return Event(lambda state: state.global_step >> place & 1)

    places = range(12)
    loop = Loop(range(5000), {place: has(place) for place in places}, max_steps=4500)
    kept = [events for _, events in loop]
    for step, events in enumerate(kept[:-1]):
        assert events == {place for place in places if step >> place & 1}


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))]
)
def test_a_state_can_be_copied_and_pickled(make: Callable[[Any], Any]) -> None:
    for _ in (loop := Loop(range(3), max_epochs=1)):
        assert make(loop.state) == loop.state


@pytest.mark.no_core
@pytest.mark.skipif(len(CORES) < 2, reason="there is one core")
@pytest.mark.parametrize("elapsed_read", [True, False])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_state_pickled_with_one_core_can_be_loaded_with_the_other(
    protocol: int, elapsed_read: bool
) -> None:
    for saving, loading in zip(CORES, reversed(CORES), strict=True):
        with use_core(saving):
            loop = Loop(range(3), max_epochs=1, clock=iter(range(99)).__next__)
            next(iter(loop))
            elapsed = loop.state.elapsed if elapsed_read else None
            saved = pickle.dumps(loop.state, protocol)
            assert pickle.loads(saved) == loop.state
        with use_core(loading):
            state = pickle.loads(saved)
            other = Loop(range(3), max_epochs=1, clock=iter(range(99)).__next__)
            next(iter(other))
            assert other.state.elapsed == state.elapsed
            assert type(state) is type(other.state)
            assert state == other.state
            assert hash(state) == hash(other.state)
        assert elapsed is None or state.elapsed == elapsed


class CountingName:
    """A name that counts how often any such name is hashed or compared."""

    used = 0

    def __hash__(self) -> int:
        CountingName.used += 1
        return 7

    def __eq__(self, other: object) -> bool:
        CountingName.used += 1
        return self is other


@pytest.mark.parametrize("bits", [4, 11])
def test_steps_since_takes_constant_time_whatever_has_been_due_together(bits: int) -> None:
    def has(place: int) -> Event:
        return Event(lambda state: state.global_step >> place & 1)

    name = CountingName()
    events: dict[Hashable, Event] = {place: has(place) for place in range(bits)}
    loop = Loop(range(9000), {name: Event(every_n_steps=2), **events}, max_steps=1 << bits)
    for _ in loop:
        pass
    CountingName.used = 0
    assert loop.steps_since(name) == 2
    assert CountingName.used <= 20


def test_the_type_of_the_events_can_be_constructed_from_names() -> None:
    for _, due in Loop(range(3), {"Log": Event(at_step=0)}, max_epochs=1):
        rebuilt = type(due)(["Log", "Save"])
        assert "Log" in rebuilt
        assert "Other" not in rebuilt
        assert rebuilt == {"Log", "Save"}
