"""stop() and signals: the next step is the last one, and the user's code runs to its end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cores import use_core
from dloop import Event, Loop, LoopError, LoopEvents, LoopWarning
from programs import needs_posix, program, run_until

pytestmark = pytest.mark.usefixtures("small_collections")

END = frozenset({LoopEvents.TRAINING_END})
Enter = Callable[[Loop[Any]], Iterator[tuple[Any, Any]]]


def end_of(steps: list[Any]) -> Any:
    batch, events = steps[-1]
    return batch, frozenset(events)


# ------------------------------------------------------------------------------------------- stop()


def test_stop_makes_the_next_step_the_last() -> None:
    loop = Loop(range(10), max_epochs=1)
    steps = []
    for batch, events in loop:
        assert loop.stop_requested == (batch == 4)
        steps.append((batch, frozenset(events)))
        if batch == 3:
            loop.stop()
            assert loop.stop_requested
            assert loop.stop_reason is None
    assert end_of(steps) == (4, END)
    assert loop.stop_reason == "stop"
    assert loop.state.training_end
    with pytest.raises(LoopError):
        iter(loop)


def test_stop_before_the_first_step_makes_that_the_last() -> None:
    loop = Loop(range(10), max_epochs=1)
    loop.stop()
    assert [(batch, frozenset(events)) for batch, events in loop] == [(0, END)]


def test_stop_after_the_end_has_no_effect() -> None:
    loop = Loop(range(3), max_epochs=1)
    assert [batch for batch, _ in loop] == [0, 1, 2]
    loop.stop()
    assert loop.stop_reason == "max_epochs"
    assert not loop.stop_requested
    loop.restart()
    assert [batch for batch, _ in loop] == [0, 1, 2]


def test_stop_in_the_last_step_does_not_change_the_stop_reason() -> None:
    loop = Loop(range(3), max_epochs=1)
    for batch, _events in loop:
        if batch == 2:
            loop.stop()
    assert loop.stop_reason == "max_epochs"


@pytest.mark.parametrize("lookahead", [None, True])
def test_stop_during_a_fetch_makes_its_step_the_last(lookahead: bool | None) -> None:
    def loader() -> Iterator[int]:
        for i in range(10):
            if i == 3:
                loop.stop()
            yield i

    loop = Loop(loader(), max_steps=9, lookahead=lookahead)
    steps = list(loop)
    # with lookahead, batch 3 is fetched before batch 2 is handed over
    assert end_of(steps) == (2 if lookahead else 3, END)
    assert loop.stop_reason == "stop"


def test_stop_in_a_condition_makes_the_step_after_the_last() -> None:
    def condition(state: Any) -> None:
        if state.global_step == 2:
            loop.stop()

    loop = Loop(range(10), {"C": Event(condition)}, max_epochs=1)
    assert end_of(list(loop)) == (3, END)


@pytest.mark.parametrize("sizes", [None, 1, 3, (4, 2, 1)], ids=repr)
@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("reading", range(1, 7))
def test_stop_in_the_clock_makes_its_step_the_last(
    reading: int, condition: bool, sizes: Any
) -> None:
    def clock() -> int:
        readings.append(len(readings))
        if len(readings) == reading + 1:  # the first is the start
            step_before.append(loop.global_step)
            loop.stop()
        return len(readings)

    readings: list[int] = []
    step_before: list[int] = []
    events = {"T": Event(every_n_seconds=100)}
    if condition:
        events["C"] = Event(lambda state: state.global_step % 4 == 2) | LoopEvents.TRAINING_END
    loop = Loop(range(30), events, max_epochs=1, clock=clock)
    steps = list(loop if sizes is None else loop.chunks(sizes))
    batch, names = end_of(steps)
    # for a list the clock is read once it is gathered, so the whole list is handed over
    last = step_before[0] + (1 if sizes is None else len(batch))
    assert (loop.global_step, loop.stop_reason) == (last, "stop")
    assert names == END | ({"C"} if condition else set())
    assert len(readings) == reading + 1


def test_stop_before_an_epochs_last_step_gives_it_epoch_end_and_training_end() -> None:
    loop = Loop(range(3), max_epochs=4)
    steps = []
    for batch, events in loop:
        steps.append((batch, events))
        if loop.global_step == 1:
            loop.stop()
    assert end_of(steps)[1] == {LoopEvents.EPOCH_END, LoopEvents.TRAINING_END}
    assert (loop.global_step, loop.stop_reason) == (2, "stop")


def test_stop_takes_precedence_over_the_limit_and_stop_when_as_stop_reason() -> None:
    for limit in ({"max_steps": 3}, {"max_epochs": 1}):
        loop = Loop(range(3), stop_when=Event(at_step=2), **limit)
        for batch, _events in loop:
            if batch == 1:
                loop.stop()
        assert loop.stop_reason == "stop"


def test_events_joined_with_training_end_fire_at_the_stop() -> None:
    events = {
        "Save": Event(every_n_steps=100) | LoopEvents.TRAINING_END,
        "Signal": Event(every_n_steps=100) | LoopEvents.INTERRUPT,
    }
    loop = Loop(range(10), events, max_epochs=1)
    loop.stop()
    assert [set(events) for _, events in loop] == [{"Save", LoopEvents.TRAINING_END}]


@pytest.mark.parametrize(("sizes", "expected"), [(4, [[4]]), ((4, 2, 1), [[4]]), ((4, 1), [[4]])])
def test_after_stop_the_next_list_has_one_batch(sizes: Any, expected: list[Any]) -> None:
    loop = Loop(range(20), max_epochs=1)
    lists = []
    for batches, events in loop.chunks(sizes):
        lists.append((batches, frozenset(events)))
        loop.stop()
    assert [batches for batches, _ in lists] == [[0, 1, 2, 3], *expected]
    assert lists[-1][1] == END
    assert (loop.global_step, loop.stop_reason) == (4, "stop")


def test_a_list_that_is_gathered_during_a_stop_is_cut_to_its_first_batch() -> None:
    def loader() -> Iterator[int]:
        for i in range(20):
            if i == 6:
                loop.stop()
            yield i

    loop = Loop(loader(), max_steps=20)
    lists = list(loop.chunks(4))
    assert [batches for batches, _ in lists] == [[0, 1, 2, 3], [4]]
    assert frozenset(lists[-1][1]) == END
    state = loop.state_dict()
    again = Loop(iter(range(20)), max_steps=7)
    load_quietly(again, state)
    assert [batch for batch, _ in again] == [5, 6]  # the batches that were cut off are not lost


def load_quietly(loop: Loop[Any], state: dict[str, Any]) -> None:
    with pytest.warns(LoopWarning, match=r"20.*7"):
        loop.load_state_dict(state)


def test_restart_clears_a_stop() -> None:
    loop = Loop(range(3), max_epochs=1)
    loop.stop()
    list(loop)
    loop.restart()
    assert not loop.stop_requested
    assert [batch for batch, _ in loop] == [0, 1, 2]


def test_a_stopped_run_can_be_resumed() -> None:
    loop = Loop(range(5), max_epochs=1)
    loop.stop()
    list(loop)
    again = Loop(range(5), max_epochs=1)
    again.load_state_dict(loop.state_dict())
    assert not again.stop_requested
    assert again.stop_reason is None
    assert [batch for batch, _ in again] == [1, 2, 3, 4]


def test_a_requested_stop_is_not_part_of_the_state() -> None:
    loop = Loop(range(5), max_epochs=1)
    next(iter(loop))
    loop.stop()
    again = Loop(range(5), max_epochs=1)
    again.load_state_dict(loop.state_dict())
    assert [batch for batch, _ in again] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------ signals, in process


def collect() -> None:
    """Free unreferenced objects on PyPy; several rounds, since one object may free the next."""
    if sys.implementation.name != "cpython":
        for _ in range(3):
            gc.collect()


@pytest.fixture
def handled(uncompiled: None) -> Iterator[list[int]]:
    """The signals that a handler installed before the loop was called with."""
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: calls.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    yield calls
    collect()
    after = signal.signal(signal.SIGTERM, before)
    assert after is handler, "the handler was not restored"


def raise_term() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_makes_the_next_step_the_last(handled: list[int]) -> None:
    loop = Loop(range(10), max_epochs=1, signals=[signal.SIGTERM])
    steps = []
    for batch, events in loop:
        steps.append((batch, events))
        if batch == 2:
            raise_term()
            assert loop.stop_requested
    assert end_of(steps) == (3, END | {LoopEvents.INTERRUPT})
    assert loop.stop_reason == "SIGTERM"
    assert handled == []


def test_a_second_signal_reaches_the_previous_handler(handled: list[int]) -> None:
    loop = Loop(range(10), max_epochs=1, signals=(int(signal.SIGTERM),))
    for batch, _events in loop:
        if batch == 2:
            raise_term()
            assert handled == []
            raise_term()
            assert handled == [signal.SIGTERM]


def test_after_a_signal_the_next_list_has_one_batch(handled: list[int]) -> None:
    loop = Loop(range(20), max_epochs=1, signals=(signal.SIGTERM,))
    lists = []
    for batches, events in loop.chunks(4):
        lists.append((batches, events))
        raise_term() if len(lists) == 1 else None
    assert end_of(lists) == ([4], END | {LoopEvents.INTERRUPT})


def test_a_signal_takes_precedence_over_stop_as_stop_reason(handled: list[int]) -> None:
    loop = Loop(range(10), max_epochs=1, signals=(signal.SIGTERM,))
    for batch, _events in loop:
        if batch == 2:
            loop.stop()
            raise_term()
    assert loop.stop_reason == "SIGTERM"


@pytest.mark.parametrize("lookahead", [None, True])
@pytest.mark.parametrize("sizes", [None, 1, 2, 3, (4, 2, 1)], ids=repr)
@pytest.mark.parametrize("step", range(8))
def test_a_signal_in_a_condition_fires_interrupt_once_with_training_end(
    handled: list[int], step: int, sizes: Any, lookahead: bool | None
) -> None:
    def condition(state: Any) -> None:
        if state.global_step == step:
            raise_term()

    loop = Loop(
        range(3),
        {"C": Event(condition), "Save": Event(at_step=99) | LoopEvents.INTERRUPT},
        max_epochs=3,
        lookahead=lookahead,
        signals=(signal.SIGTERM,),
    )
    steps = list(loop if sizes is None else loop.chunks(sizes))
    ends = [events for _, events in steps if LoopEvents.INTERRUPT in events]
    assert ends == [events for _, events in steps if LoopEvents.TRAINING_END in events]
    assert ends == [steps[-1][1]]
    assert "Save" in ends[0]
    assert loop.stop_reason == "SIGTERM"
    if sizes in (None, 1):
        assert loop.global_step == step + 1


def test_a_signal_in_a_condition_of_the_last_step_fires_no_interrupt(handled: list[int]) -> None:
    def condition(state: Any) -> None:
        if state.training_end:
            raise_term()

    loop = Loop(range(3), {"C": Event(condition)}, max_epochs=2, signals=(signal.SIGTERM,))
    steps = list(loop)
    assert end_of(steps)[1] == {LoopEvents.EPOCH_END, LoopEvents.TRAINING_END}
    assert (loop.global_step, loop.stop_reason) == (5, "max_epochs")


def test_an_event_joined_with_interrupt_fires_at_a_signal(handled: list[int]) -> None:
    events = {"Save": Event(every_n_steps=100) | LoopEvents.INTERRUPT}
    loop = Loop(range(10), events, max_epochs=1, signals=(signal.SIGTERM,))
    steps = []
    for batch, fired in loop:
        steps.append((batch, fired))
        if batch == 2:
            raise_term()
    assert end_of(steps)[1] == {"Save", LoopEvents.INTERRUPT, LoopEvents.TRAINING_END}


WAYS_TO_LEAVE = ["to the end", "break", "exception", "with", "close", "dropped", "source"]


@pytest.mark.parametrize("leaving", WAYS_TO_LEAVE)
@pytest.mark.parametrize("enter", [iter, lambda loop: loop.chunks(2)], ids=["plain", "chunks"])
def test_leaving_the_loop_restores_the_previous_handler(
    handled: list[int], enter: Enter, leaving: str
) -> None:
    if leaving == "source" and sys.implementation.name == "pypy":
        pytest.skip("on PyPy the frames of the loop's exception keep the iterator")
    before = signal.getsignal(signal.SIGTERM)

    def loader() -> Iterator[int]:
        yield from range(6)
        if leaving == "source":
            raise OSError

    def work(loop: Loop[Any]) -> None:
        assert signal.getsignal(signal.SIGTERM) is before
        for _batch, _events in enter(loop):
            assert signal.getsignal(signal.SIGTERM) is not before
            if leaving == "break":
                break
            if leaving == "exception":
                raise OSError

    loop = Loop(loader(), max_steps=20 if leaving == "source" else 6, signals=(signal.SIGTERM,))
    if leaving in ("exception", "source"):
        with pytest.raises(OSError):
            work(loop)
    elif leaving == "with":
        with loop:
            pairs = enter(loop)
            next(pairs)
        assert signal.getsignal(signal.SIGTERM) is before
        del pairs
    elif leaving == "close":
        pairs = enter(loop)
        next(pairs)
        loop.close()
    elif leaving == "dropped":
        pairs = enter(loop)
        next(pairs)
        del pairs
    else:
        work(loop)
    collect()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_before_a_break_ends_the_run_after_entering_again(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    loop = Loop(range(10), max_epochs=1, signals=(signal.SIGTERM,))
    for _batch, _events in loop:
        raise_term()
        break
    assert signal.getsignal(signal.SIGTERM) is before
    steps = list(loop)
    assert [batch for batch, _ in steps] == [1]
    assert loop.stop_reason == "SIGTERM"


def test_freeing_an_older_iterator_keeps_the_handler_of_the_newer_one(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    loop = Loop(range(10), max_epochs=1, signals=(signal.SIGTERM,))
    older = iter(loop)
    next(older)
    newer = iter(loop)
    next(newer)
    del older
    raise_term()
    assert handled == []
    assert end_of(list(newer)) == (2, END | {LoopEvents.INTERRUPT})
    del newer
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_signal_stops_two_nested_loops(handled: list[int]) -> None:
    outer = Loop(range(10), max_epochs=1, signals=(signal.SIGTERM,))
    seen = []
    for batch, _events in outer:
        inner = Loop(range(5), max_epochs=1, signals=(signal.SIGTERM,))
        for value, _ in inner:
            seen.append((batch, value))
            if (batch, value) == (1, 1):
                raise_term()
        if batch == 1:
            assert inner.stop_reason == "SIGTERM"
    assert outer.stop_reason == "SIGTERM"
    assert seen == [
        *((0, value) for value in range(5)),
        *((1, value) for value in range(3)),
        *((2, value) for value in range(5)),
    ]
    assert handled == []


def test_with_an_inner_loop_without_signals_the_outer_one_is_stopped(handled: list[int]) -> None:
    outer = Loop(range(10), max_epochs=1, signals=(signal.SIGTERM,))
    for batch, _events in outer:
        inner = Loop(range(5), max_epochs=1)
        for _ in inner:
            raise_term() if batch == 1 and inner.global_step == 1 else None
        assert inner.stop_reason == "max_epochs"
    assert (outer.global_step, outer.stop_reason) == (2, "SIGTERM")


def test_in_another_thread_signals_give_a_warning_and_install_no_handler(
    core: str, handled: list[int]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        loop = Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,))
        with pytest.warns(LoopWarning, match="thread"):
            for batch, _events in loop:
                seen.append((batch, signal.getsignal(signal.SIGTERM) is before))

    with use_core(core):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((99999,), ValueError),
        ((-1,), ValueError),
        ((0,), ValueError),
        (("SIGTERM",), TypeError),
        ((1.5,), TypeError),
        ((True,), TypeError),
        ((getattr(signal, "SIGKILL", 9),), ValueError),
        (signal.SIGTERM, TypeError),
        (15, TypeError),
        ("SIGTERM", TypeError),
        ((signal.SIGTERM, signal.SIGTERM), ValueError),
    ],
)
def test_wrong_signals_are_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="signals"):
        Loop(range(3), max_epochs=1, signals=value)


# --------------------------------------------------------------------------- signals, in a process

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
SIGNALS = "signals=(signal.SIGTERM, signal.SIGINT)"


@BOTH
def test_a_signal_in_a_sleeping_body_makes_the_next_step_the_last(
    core: str, number: signal.Signals
) -> None:
    code = f"""
    loop = Loop(range(9), max_epochs=1, {SIGNALS})
    def body(batch):
        if batch == 2:
            say("now")
            end = time.monotonic() + 10
            while not loop.stop_requested and time.monotonic() < end:
                time.sleep(0.01)
    train(loop, body)
    sys.exit(7)
    """
    lines, exit_code, errors = run_until(program(core, code), number)
    assert lines == [f"checkpoint 3 {number.name}", "trained"], errors
    assert exit_code == 7


@BOTH
def test_a_signal_in_a_sleeping_loader_makes_its_step_the_last(
    core: str, number: signal.Signals
) -> None:
    code = f"""
    def loader():
        for i in range(9):
            if i == 2:
                say("now")
                time.sleep(0.4)
            yield i
    train(Loop(loader(), max_steps=9, {SIGNALS}))
    sys.exit(7)
    """
    lines, exit_code, errors = run_until(program(core, code), number)
    assert lines == [f"checkpoint 2 {number.name}", "trained"], errors
    assert exit_code == 7


@BOTH
def test_a_second_signal_in_one_body_ends_the_process(core: str, number: signal.Signals) -> None:
    code = f"""
    loop = Loop(range(9), max_epochs=1, {SIGNALS})
    def body(batch):
        say("now")
        while not loop.stop_requested:
            time.sleep(0.01)
        say("now")
        time.sleep(10)
    train(loop, body)
    """
    lines, exit_code, errors = run_until(program(core, code), number, number)
    assert lines == []
    assert exit_code == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


@BOTH
def test_a_signal_after_the_loop_ends_the_process(core: str, number: signal.Signals) -> None:
    code = f"""
    train(Loop(range(3), max_epochs=1, {SIGNALS}))
    gc.collect()  # PyPy does not free the iterator at once
    say("now")
    time.sleep(10)
    """
    lines, exit_code, errors = run_until(program(core, code), number)
    assert lines == ["trained"], errors
    assert exit_code == -number


@BOTH
def test_a_signal_after_a_loop_in_another_thread_ends_the_process(
    core: str, number: signal.Signals
) -> None:
    code = f"""
    import threading
    warnings.simplefilter("ignore")
    thread = threading.Thread(target=train, daemon=True, args=(
        Loop(range(9), max_epochs=1, {SIGNALS}), lambda batch: time.sleep(0.01)))
    thread.start()
    thread.join()
    say("now")
    time.sleep(10)
    """
    lines, exit_code, errors = run_until(program(core, code), number)
    assert lines == ["trained"], errors
    assert exit_code == -number


def test_a_loop_in_another_thread_leaves_signals_to_the_previous_handler(core: str) -> None:
    code = f"""
    import threading
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, lambda *_: say("mine"))
    loop = Loop(range(40), max_epochs=1, {SIGNALS})
    thread = threading.Thread(target=train, args=(loop, lambda batch: time.sleep(0.01)))
    thread.start()
    say("now")
    thread.join()
    say(loop.stop_reason)
    """
    lines, exit_code, errors = run_until(program(core, code), signal.SIGTERM)
    assert sorted(lines) == ["max_epochs", "mine", "trained"], errors
    assert exit_code == 0


@BOTH
def test_a_signal_ends_forked_children(core: str, number: signal.Signals) -> None:
    """Ctrl-C ends them the second time: the parent's last step still needs its workers."""
    code = f"""
    loop = Loop(range(4), max_epochs=1, {SIGNALS})
    def body(batch):
        if batch != 1:
            return
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, b"begun")
                while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                    time.sleep(0.01)
                os.write(write, b"asked")
                time.sleep(10)
            except KeyboardInterrupt:
                os._exit(42)
            os._exit(1)
        os.read(read, 5)
        os.kill(child, {int(number)})
        if {int(number)} == signal.SIGINT:
            os.read(read, 5)
            os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
        say("child", os.waitstatus_to_exitcode(status))
        assert not loop.stop_requested
    train(loop, body)
    """
    lines, exit_code, errors = run_until(program(core, code))
    died = 42 if number == signal.SIGINT else -number
    assert lines == [f"child {died}", "trained"], errors
    assert exit_code == 0


def test_a_process_pool_of_the_loader_can_be_terminated(core: str) -> None:
    code = f"""
    import multiprocessing
    def sleep():
        time.sleep(10)
    loop = Loop(range(2), max_epochs=1, {SIGNALS})
    def body(batch):
        worker = multiprocessing.get_context("fork").Process(target=sleep)
        worker.start()
        worker.terminate()
        worker.join(5)
        say(worker.exitcode)
    train(loop, body)
    """
    lines, _, errors = run_until(program(core, code))
    assert lines == ["-15", "-15", "trained"], errors


def test_an_ignored_signal_stops_the_loop_and_is_then_ignored_again(core: str) -> None:
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


# ---------------------------------------------------------------------------------- corner cases


def test_stop_called_twice_stops_once() -> None:
    loop = Loop(range(9), max_epochs=1)
    for batch, _events in loop:
        if batch == 2:
            loop.stop()
            loop.stop()
    assert (loop.global_step, loop.stop_reason) == (3, "stop")
    loop.stop()
    assert loop.stop_reason == "stop"


def test_a_signal_in_the_last_body_does_not_change_the_stop_reason(handled: list[int]) -> None:
    loop = Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,))
    for batch, _events in loop:
        if batch == 2:
            raise_term()
    assert loop.stop_reason == "max_epochs"
    assert not loop.stop_requested
    assert handled == []


def test_a_restart_restores_the_handlers(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    loop = Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,))
    pairs = iter(loop)
    next(pairs)
    loop.restart()
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list(loop)) == 3
    del pairs


def test_an_empty_list_of_signals_installs_no_handler(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for _batch, _events in Loop(range(3), max_epochs=1, signals=[]):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_the_body_installs_is_kept(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for _batch, _events in Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # JAX, if a test has loaded it
@needs_posix
def test_a_fork_removes_the_handler_in_the_child_alone(handled: list[int]) -> None:
    loop = Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,))
    for batch, _events in loop:
        if batch == 0:
            ours = signal.getsignal(signal.SIGTERM)
            child = os.fork()
            if not child:
                os._exit(signal.getsignal(signal.SIGTERM) is ours)
            assert os.waitpid(child, 0)[1] == 0
            assert signal.getsignal(signal.SIGTERM) is ours
            raise_term()
    assert loop.stop_reason == "SIGTERM"


# ------------------------------------------------------------------------------ several loops

TERM_AND_INT = (signal.SIGTERM, signal.SIGINT)


def test_loops_that_end_in_any_order_restore_the_handlers(handled: list[int]) -> None:
    before = [signal.getsignal(number) for number in TERM_AND_INT]
    first = Loop(range(3), max_epochs=1, signals=TERM_AND_INT)
    second = Loop(range(9), max_epochs=1, signals=TERM_AND_INT)
    for _pairs in zip(first, second):
        assert signal.getsignal(signal.SIGTERM) not in before
    del _pairs
    collect()
    assert [signal.getsignal(number) for number in TERM_AND_INT] == before
    raise_term()
    assert handled == [signal.SIGTERM]


@pytest.mark.parametrize("outer_first", [True, False])
def test_when_one_of_two_loops_ends_the_signal_stops_the_other(
    handled: list[int], outer_first: bool
) -> None:
    loops = [Loop(range(9), max_epochs=1, signals=(signal.SIGTERM,)) for _ in range(2)]
    iterators = [iter(loop) for loop in loops]
    for iterator in iterators:
        next(iterator)
    del iterator
    ended = 0 if outer_first else 1
    del iterators[ended]
    collect()
    raise_term()
    assert [loop.stop_requested for loop in loops] == [ended == 1, ended == 0]
    assert handled == []
    raise_term()
    assert handled == [signal.SIGTERM]


def test_a_handler_installed_between_two_loops_is_kept(handled: list[int]) -> None:
    mine: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    outer = Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,))
    for batch, _events in outer:
        if batch == 1:
            signal.signal(signal.SIGTERM, lambda number, _frame: mine.append(number))
            for _ in Loop(range(3), max_epochs=1, signals=(signal.SIGTERM,)):
                pass
            collect()
            raise_term()
    collect()
    raise_term()
    signal.signal(signal.SIGTERM, before)
    assert mine == [signal.SIGTERM] * 2
    assert handled == []


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy frees objects later")
def test_an_iterator_freed_in_another_thread_handles_no_more_signals(handled: list[int]) -> None:
    loop = Loop(range(9), max_epochs=1, signals=(signal.SIGTERM,))
    kept = [iter(loop)]
    next(kept[0])
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    raise_term()
    assert handled == [signal.SIGTERM]
    assert not loop.stop_requested
    for _ in loop:  # entered again, the loop handles signals as before
        raise_term()
        break
    assert loop.stop_requested
    raise_term()
    assert handled == [signal.SIGTERM] * 2


def test_after_a_restart_the_new_run_handles_signals_while_an_old_iterator_exists(
    handled: list[int],
) -> None:
    loop = Loop(range(9), max_epochs=1, signals=(signal.SIGTERM,))
    older = iter(loop)
    next(older)
    loop.restart()
    for _ in loop:
        raise_term()
        break
    assert loop.stop_requested
    assert handled == []
    del older


class FailsToClose:
    def __iter__(self) -> Any:
        return self.Batches()

    class Batches:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            return 7

        def close(self) -> None:
            raise ConnectionError("the worker is dead")


@pytest.mark.parametrize("leave", ["close", "restart"])
def test_a_loader_that_fails_to_close_does_not_keep_the_handlers_installed(
    handled: list[int], leave: str
) -> None:
    loop = Loop(FailsToClose(), max_steps=5, signals=(signal.SIGTERM,))
    pairs = iter(loop)
    next(pairs)
    with pytest.raises(ConnectionError):
        getattr(loop, leave)()
    raise_term()
    assert handled == [signal.SIGTERM]
    if leave == "restart":
        assert loop.global_step == -1
        assert len(list(loop)) == 5
    else:
        with pytest.raises(LoopError, match="closed"):
            iter(loop)


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy frees objects later")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_handlers_are_installed_restores_the_previous_ones(
    handled: list[int],
) -> None:
    before = [signal.getsignal(number) for number in TERM_AND_INT]
    lines = 0
    while True:
        loop = Loop(range(9), max_epochs=1, signals=TERM_AND_INT)
        entered = []
        with interrupted_at(lines) as reached:
            entered.append(iter(loop))
        entered.clear()
        gc.collect()  # tracing can keep a frame after its call
        assert [signal.getsignal(number) for number in TERM_AND_INT] == before
        for _ in loop:
            raise_term()
            break
        assert loop.stop_requested
        del _
        assert [signal.getsignal(number) for number in TERM_AND_INT] == before
        if not reached:
            break
        lines += 1
    assert lines > 2


@contextlib.contextmanager
def interrupted_at(count: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at line number `count` that is run in dloop/signals.py."""
    left = count
    reached: list[int] = []

    def trace(frame: Any, event: str, _argument: object) -> Any:
        nonlocal left
        if os.path.basename(frame.f_code.co_filename) != "signals.py" or reached:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                reached.append(frame.f_lineno)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield reached
    except KeyboardInterrupt:
        assert reached
    finally:
        sys.settrace(before)
