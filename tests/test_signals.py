"""stop() and signals: the next step is the last, and the body runs to its end; real processes."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import pytest

import dloop
from cores import use_core
from dloop import Event, Loop, LoopError, LoopEvents
from interpreter import needs_few_points, needs_reference_counts
from loops import ENTER, Enter, flat
from programs import examples, needs_posix, program, run_until
from stateful_loaders import StatefulLoader
from told import with_warnings

EPOCH_END, TRAINING_END, INTERRUPT = (
    LoopEvents.EPOCH_END,
    LoopEvents.TRAINING_END,
    LoopEvents.INTERRUPT,
)
END = frozenset({TRAINING_END})
TERM, TERM_AND_INT = signal.SIGTERM, (signal.SIGTERM, signal.SIGINT)
each_way = pytest.mark.parametrize("enter", ENTER.values(), ids=list(ENTER))
pytestmark = pytest.mark.usefixtures("small_collections")


def last_of(loop: Loop[Any], enter: Enter = iter, body: Callable[[Any], object] = id) -> Any:
    """The last step or list of a run; `body` is called with each batch."""
    for batch, events in enter(loop):
        last = batch, frozenset(events)
        body(batch)
    return last


# stop()


def test_stop_makes_the_next_step_the_last() -> None:
    loop = Loop(range(10), max_epochs=1)
    steps = []
    for batch, events in loop:
        assert loop.stop_requested == (batch == 4 and loop.stop_reason is None)
        steps.append((batch, frozenset(events)))
        if batch == 3:
            loop.stop()
            loop.stop()
            assert loop.stop_requested and loop.stop_reason is None
    assert steps[-1] == (4, END)
    assert loop.stop_reason == "stop"
    with pytest.raises(LoopError, match="ended"):
        iter(loop)
    loop.stop()
    loop.restart()
    assert flat(loop) == [*range(10)]


# Signals in this process


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that a handler from before the loop was called with; it must be restored."""
    calls: list[int] = []
    before = signal.signal(TERM, lambda number, _: calls.append(number))
    mine = signal.getsignal(TERM)
    yield calls
    gc.collect()
    after = signal.signal(TERM, before)
    assert after is mine, "the handler was not restored"


def strike(batch: Any = None, at: Any = None) -> None:
    if batch == at:
        signal.raise_signal(TERM)


@pytest.mark.parametrize("signals", [TERM, int(TERM), [TERM], {TERM, signal.SIGINT}], ids=str)
def test_a_signal_makes_the_next_step_the_last(signals: Any, handled: list[int]) -> None:
    events = {"Save": Event(every_n_steps=100) | INTERRUPT}
    loop = Loop(range(10), events, max_epochs=1, signals=signals)
    last = last_of(loop, body=lambda batch: strike(batch, 2))
    assert last == (3, END | {INTERRUPT, "Save"})
    assert (loop.stop_reason, handled) == ("SIGTERM", [])


def test_a_second_signal_acts_as_before_dloop(handled: list[int]) -> None:
    loop = Loop(range(10), max_epochs=1, signals=TERM)
    for batch, _ in loop:
        strike(batch, 2)
        assert handled == []
        assert loop.stop_requested == (batch == 2)
        if batch == 2:
            strike()
            assert handled == [TERM]
            handled.clear()
    assert loop.global_step == 3


@pytest.mark.parametrize("sizes", [None, 1, 3, (4, 2, 1)], ids=repr)
@pytest.mark.parametrize("lookahead", [None, True])
def test_a_signal_in_a_condition_fires_interrupt(
    handled: list[int], sizes: Any, lookahead: bool | None
) -> None:
    for step in range(8):
        loop = Loop(
            range(3),
            {"C": Event(lambda state: strike(state.global_step, step))},  # noqa: B023
            max_epochs=3,
            lookahead=lookahead,
            signals=TERM,
        )
        steps = list(loop if sizes is None else loop.chunks(sizes))
        assert [INTERRUPT in events for _, events in steps].count(True) == 1
        assert {INTERRUPT, TRAINING_END} <= set(steps[-1][1])
        assert loop.stop_reason == "SIGTERM"
        assert loop.global_step == step + 1 or sizes not in (None, 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "profile": {"profile": True},
    "start_step": {"start_step": 2, "dataloader_len": 6},
    "on_exception": {"on_exception": "event"},
}
LEAVES = [
    *("to the end", "break", "body", "interrupt", "loader", "condition"),
    *("with", "close", "freed", "restart"),
]


@needs_reference_counts
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("leave", LEAVES)
@each_way
def test_leaving_restores_the_handlers(
    handled: list[int], enter: Enter, leave: str, options: str
) -> None:
    """Though the Loop, the exception and its traceback are kept, as in `sys.last_value`."""

    def loader() -> Iterator[int]:
        yield from range(4)
        if leave in ("loader", "interrupt"):
            raise OSError if leave == "loader" else KeyboardInterrupt
        yield from range(4, 6)

    def interrupt(_state: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        for _ in enter(loop):
            assert signal.getsignal(TERM) is not before
            if leave == "break":
                break
            if leave == "body":
                raise ValueError

    before = signal.getsignal(TERM)
    events = {"C": Event(interrupt)} if leave == "condition" else {}
    loop: Loop[int] = Loop(loader, events, max_epochs=2, signals=TERM, **OPTIONS[options])
    assert signal.getsignal(TERM) is before
    kept: list[BaseException] = []
    try:
        if leave == "with":
            with loop:
                pairs = enter(loop)
                next(pairs)
        elif leave in ("close", "freed", "restart"):
            pairs = enter(loop)
            next(pairs)
            getattr(loop, leave, pairs.__iter__)()
            if leave == "freed":
                del pairs
        else:
            work()
    except (OSError, ValueError, KeyboardInterrupt) as exception:
        kept.append(exception)
    if leave == "body":  # the traceback holds the iterator, as Python's `for` does
        assert kept.pop().__traceback__ is not None
    assert len(kept) == (leave in ("loader", "interrupt", "condition"))
    strike()
    assert handled == [TERM]
    assert signal.getsignal(TERM) is before


@needs_reference_counts
def test_freeing_an_older_iterator_keeps_the_handlers_of_the_newer(handled: list[int]) -> None:
    for leave in (iter, lambda loop: loop.restart() or iter(loop)):
        loop = Loop(range(10), max_epochs=1, signals=TERM)
        older = iter(loop)
        next(older)
        newer = leave(loop)
        del older
        next(newer)
        strike()
        assert (handled, loop.stop_requested) == ([], True)
        assert {INTERRUPT} < set(next(newer)[1])
        del newer


def test_one_signal_ends_nested_loops(handled: list[int]) -> None:
    outer = Loop(range(10), max_epochs=1, signals=TERM)
    seen = []
    for batch, _ in outer:
        inner = Loop(range(5), max_epochs=1, signals=TERM if batch != 3 else ())
        for value, _ in inner:
            seen.append((batch, value))
            strike((batch, value), (1, 1))
        assert inner.stop_reason == ("SIGTERM" if batch == 1 else "max_epochs")
    assert (outer.global_step, outer.stop_reason) == (2, "SIGTERM")
    assert seen == [(batch, value) for batch in range(3) for value in range(3 if batch == 1 else 5)]
    assert handled == []


def test_a_handler_that_the_body_sets_is_kept(handled: list[int]) -> None:
    mine: list[int] = []
    before = signal.getsignal(TERM)
    for batch, _ in Loop(range(3), max_epochs=1, signals=TERM):
        if batch == 1:
            signal.signal(TERM, lambda number, _: mine.append(number))
            with Loop(range(3), max_epochs=1, signals=TERM) as inner:
                flat(inner)
            strike()
    strike()
    signal.signal(TERM, before)
    assert (mine, handled) == ([TERM] * 2, [])


def test_another_thread_handles_no_signal_and_warns(core: str, handled: list[int]) -> None:
    def work() -> None:
        with use_core(core):
            loop = Loop(range(3), max_epochs=1, signals=TERM)
            seen.append(with_warnings(lambda: [signal.getsignal(TERM) is before for _ in loop]))

    seen: list[Any] = []
    before = signal.getsignal(TERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((restored, (text,)),) = seen
    assert restored == [True] * 3
    assert "only the main thread can handle signals" in text


def test_an_exception_of_workers_after_a_signal_has_a_note(handled: list[int]) -> None:
    class Loader:
        num_workers = 2

        def __iter__(self) -> Iterator[int]:
            yield 0
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    acts: list[Callable[[Loop[int]], object]] = [lambda _: strike(), Loop.stop, id]
    for loader, act in product([Loader(), Loader], acts):
        loop = Loop(loader, max_epochs=1, signals=TERM, lookahead=False, dataloader_len=2)
        with pytest.raises(RuntimeError) as caught:
            for _ in loop:
                act(loop)
        notes = getattr(caught.value, "__notes__", [])
        assert ['on_exception="event"' in note for note in notes] == [True] * (act is acts[0])
        assert not loop.stop_requested  # the run has ended


@needs_posix
def test_a_signal_after_an_interrupt_in_restoring_its_handler_acts_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    loop = Loop(range(9), max_epochs=1, signals=signal.SIGWINCH)
    steps = iter(loop)
    next(steps)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dloop.signals, "_put_back", interrupted)
        loop.close()
    signal.raise_signal(signal.SIGWINCH)  # which does nothing by default
    assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL
    del steps


@needs_reference_counts
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["signals.py", "run.py"])
def test_an_interrupt_while_handlers_are_set_restores_those_before(
    file: str, handled: list[int]
) -> None:
    def trace(frame: Any, event: str, _argument: object) -> Any:
        nonlocal left
        if os.path.basename(frame.f_code.co_filename) != file or left < 0:
            return None
        if frame.f_code.co_name == "__del__":  # Python itself passes over what is raised there
            return None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return trace

    before = [signal.getsignal(number) for number in TERM_AND_INT]
    tracing = sys.gettrace()
    for lines in range(1000):
        left = lines
        loop = Loop(range(9), max_epochs=1, signals=TERM_AND_INT)
        older = iter(loop) if file == "run.py" else None
        sys.settrace(trace)
        pairs = None
        try:
            pairs = iter(loop)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        del pairs, older
        gc.collect()  # tracing can keep a frame after its call
        assert [signal.getsignal(number) for number in TERM_AND_INT] == before
        with loop:
            pairs = iter(loop)
            next(pairs)
            strike()
            assert loop.stop_requested
        if left >= 0:
            break
    assert 2 < lines < 999


# Signals to other processes

BOTH = pytest.mark.parametrize("number", TERM_AND_INT, ids=["TERM", "INT"])
SIGNALS = "signals=(signal.SIGTERM, signal.SIGINT)"


@BOTH
@pytest.mark.parametrize("where", ["body", "loader"])
def test_a_process_that_waits_has_its_last_step(
    core: str, number: signal.Signals, where: str
) -> None:
    code = f"""
    def wait(batch, place):
        if batch == 2 and place == {where!r}:
            say("now")
            while not loop.stop_requested:
                time.sleep(0.01)
    def loader():
        for i in range(9):
            wait(i, "loader")
            yield i
    loop = Loop(loader(), max_steps=9, {SIGNALS})
    train(loop, lambda batch: wait(batch, "body"))
    sys.exit(7)
    """
    lines, exit_code, errors = run_until(program(core, code), number)
    assert lines == [f"checkpoint {3 if where == 'body' else 2} {number.name}", "trained"], errors
    assert exit_code == 7


@BOTH
def test_a_second_signal_or_one_later_ends_the_process(core: str, number: signal.Signals) -> None:
    twice = f"""
    loop = Loop(range(9), max_epochs=1, {SIGNALS})
    def body(batch):
        say("now")
        while not loop.stop_requested:
            time.sleep(0.01)
        say("now")
        time.sleep(10)
    train(loop, body)
    """
    lines, exit_code, errors = run_until(program(core, twice), number, number)
    assert (lines, exit_code) == ([], -number)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    later = f"""
    train(Loop(range(3), max_epochs=1, {SIGNALS}))
    say("now")
    time.sleep(10)
    """
    lines, exit_code, errors = run_until(program(core, later), number)
    assert (lines, exit_code) == (["trained"], -number), errors


def test_an_ignored_signal_ends_the_run_and_is_then_ignored_again(core: str) -> None:
    code = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop = Loop(range(9), max_epochs=1, {SIGNALS})
    def body(batch):
        if batch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    train(loop, body)
    say(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
    """
    lines, _, errors = run_until(program(core, code))
    assert lines == ["checkpoint 1 SIGTERM", "trained", "True"], errors


@pytest.mark.parametrize(
    ("signals", "number", "status"),
    [
        (TERM_AND_INT, signal.SIGINT, 3),  # ignored
        (TERM_AND_INT, TERM, -TERM),
        ([TERM], signal.SIGINT, -signal.SIGINT),
    ],
)
def test_forked_children_ignore_sigint_alone_if_the_loop_handles_it(
    core: str, signals: Iterable[int], number: int, status: int
) -> None:
    code = f"""
    loop = Loop(range(4), max_epochs=1, signals={[*map(int, signals)]})
    def body(batch):
        if batch != 1:
            return
        child = os.fork()
        if not child:
            os.kill(os.getpid(), {int(number)})
            time.sleep(0.05)
            os._exit(3)
        _, status = os.waitpid(child, 0)
        say("child", os.waitstatus_to_exitcode(status))
        assert not loop.stop_requested
    train(loop, body)
    """
    lines, exit_code, errors = run_until(program(core, code))
    assert lines == [f"child {status}", "trained"], errors
    assert exit_code == 0


# A storm of interrupts; `--examples 200` makes as many of each kind


class Plain:
    """Its iterators are maps of a function, which an interrupt does not end."""

    def __iter__(self) -> Iterator[int]:
        return map(Plain.work, range(40))

    @staticmethod
    def work(number: int) -> int:
        for _ in range(20):
            pass
        return number


REAL: dict[str, Callable[[], Loop[Any]]] = {
    "plain": lambda: Loop(Plain(), {"C": Event(lambda state: False)}, max_epochs=3),
    "a state": lambda: Loop(StatefulLoader(40), {"E": Event(every_n_steps=3)}, max_epochs=3),
    "timed": lambda: Loop(Plain(), {"T": Event(every_n_seconds=1e-5)}, max_epochs=3, profile=True),
}


@needs_posix
@needs_few_points
@each_way
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", REAL)
def test_a_storm_of_interrupts_loses_nothing(
    kind: str, enter: Enter, request: pytest.FixtureRequest
) -> None:
    """They strike only where dloop or the loader is at work, since the test could lose a batch."""

    def handle(_number: int, frame: Any) -> None:
        name = frame.f_code.co_filename
        inside = name.startswith(os.path.dirname(dloop.__file__))
        if not armed:
            return  # the timer stays off: the handler may be restored next
        if inside or frame.f_code.co_name in ("work", "take", "order"):
            strikes.append(frame.f_code.co_name)
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 1e-4))

    draw = random.Random(5)
    strikes: list[str] = []
    armed = False
    wanted = examples(request, 15)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        while len(strikes) < wanted:
            loop, seen, struck = REAL[kind](), [], len(strikes)
            while loop.stop_reason is None:
                try:
                    armed = True
                    longest = 1e-3 * 1.1 ** (len(strikes) - struck)  # so that a slow run advances
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, longest))
                    for pair in enter(loop):
                        seen += flat([pair])
                except KeyboardInterrupt:
                    continue
                finally:
                    armed = False
                    signal.setitimer(signal.ITIMER_REAL, 0)
            epochs = [sorted(seen[at : at + 40]) for at in range(0, len(seen), 40)]
            assert epochs == [[*range(40)]] * 3, strikes[struck:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_reference_counts
@pytest.mark.parametrize("ends", [0, 1])
def test_when_one_of_two_loops_ends_the_other_handles_the_signal(
    handled: list[int], ends: int
) -> None:
    loops = [Loop(range(9), max_epochs=1, signals=TERM) for _ in range(2)]
    iterators = [iter(loop) for loop in loops]
    del iterators[ends]
    strike()
    assert [loop.stop_requested for loop in loops] == [ends == 1, ends == 0]
    assert handled == []
    strike()
    assert handled == [TERM]


@needs_reference_counts
def test_an_iterator_that_is_freed_in_another_thread_handles_nothing_more(
    handled: list[int],
) -> None:
    loop = Loop(range(9), max_epochs=1, signals=TERM)
    kept = [iter(loop)]
    next(kept[0])
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    strike()
    assert (handled, loop.stop_requested) == ([TERM], False)
    for _ in loop:
        strike()
        break
    assert loop.stop_requested


def test_a_signal_in_the_last_body_changes_nothing(handled: list[int]) -> None:
    loop = Loop(range(3), max_epochs=1, signals=TERM)
    last_of(loop, body=lambda batch: strike(batch, 2))
    assert (loop.stop_reason, loop.stop_requested, handled) == ("max_epochs", False, [])


@pytest.mark.parametrize("signal_first", [True, False])
def test_a_signal_is_the_reason_beside_a_stop(signal_first: bool) -> None:
    loop = Loop(range(9), max_epochs=1, signals=TERM)
    acts = [lambda: signal.raise_signal(TERM), loop.stop]
    for batch, _ in loop:
        for act in acts if signal_first else acts[::-1]:
            if batch == 0:
                act()
    assert loop.stop_reason == "SIGTERM"


def test_after_the_first_signal_a_loop_that_is_entered_again_sets_no_handler() -> None:
    before = signal.getsignal(TERM)
    loop = Loop(range(9), max_epochs=1, signals=TERM)
    for _ in loop:
        signal.raise_signal(TERM)
        break
    for _ in loop:
        assert signal.getsignal(TERM) is before
