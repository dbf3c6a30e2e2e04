"""Plant faults in copies of dloop, one in each; the tests have to fail for every one.

`python -m faults`, in this folder, tries them all and fails if one is not caught. With
`--core python` or `--core cython` it tries those of one core; with words, those whose names contain
one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FILES = {"python": "dloop/_core_py.py", "cython": "dloop/_core.pyx"}
PYTEST = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
# The tests that are likeliest to find a fault run first, those that take long last. Tests of what
# is outside the cores are left out.
LIKELIEST = ["differential", "threads"]
LONGEST = ["garbage", "interrupts", "resume", "stopping"]
OUTSIDE = ["backend", "demo", "docstrings", "event", "oracle", "readme", "release", "typing"]


def tests_of(names: list[str]) -> list[str]:
    """The test files with these names."""
    return [f"tests/test_{name}.py" for name in names]


ROUNDS = [
    tests_of(LIKELIEST),
    ["tests", *[f"--ignore={file}" for file in tests_of(LIKELIEST + LONGEST + OUTSIDE)]],
    tests_of(LONGEST),
]
NEAREST = {  # for faults outside the cores: the tests that run before these rounds
    "dloop/loop.py": tests_of(["exceptions", "vocabulary", "start_step", "resume"]),
    "dloop/agreement.py": tests_of(["agreement"]),
    "dloop/batch_lists.py": tests_of(["batches_per_step"]),
    "dloop/signals.py": tests_of(["stopping"]),
    "dloop/source.py": tests_of(["source", "wrapped_loaders", "start_step", "resume"]),
    "dloop/loaders.py": tests_of(["wrapped_loaders", "source"]),
    "dloop/loader_state.py": tests_of(["wrapped_loaders", "resume"]),
    "dloop/state.py": tests_of(["state_file"]),
    "dloop/plan.py": tests_of(["plan"]),
    "dloop/profile.py": tests_of(["profile"]),
    "dloop/progress.py": tests_of(["progress"]),
    "dloop/drawing.py": tests_of(["plan", "profile"]),
}
HANGS, CRASHES = "hangs", "crashes"
"""What a fault may do in place of failing a test."""
TIMEOUT = 300
"""Seconds after which a round is taken to hang; the longest takes about 50."""

SHARED = ("python",)  # for a file that both cores use, testing with one of them is enough
RUN = "dloop/run.py"
TIMERS = "dloop/timers.py"
AGREEMENT = "dloop/agreement.py"
SOURCE = "dloop/source.py"
LOADERS = "dloop/loaders.py"
BATCH_LISTS = "dloop/batch_lists.py"
LOADER_STATE = "dloop/loader_state.py"
LOOP = "dloop/loop.py"
PLAN = "dloop/plan.py"
PROFILE = "dloop/profile.py"
PROGRESS = "dloop/progress.py"
DRAWING = "dloop/drawing.py"


class Fault(NamedTuple):
    """`old`, which occurs once in `file` (or in a core's file), is replaced by `new`.

    `first` is the test that runs first, where the others take long to find the fault.
    """

    name: str
    old: str
    new: str
    cores: tuple[str, ...] = ("python", "cython")
    file: str = ""
    first: str = ""


FAULTS = [
    # Step triggers, in both cores
    Fault(
        "every n steps is one late",
        "rest = (count - self.first) %",
        "rest = (count - self.first + 1) %",
    ),
    Fault(
        "until_step is included",
        "if count >= self.stop - self.origin",
        "if count > self.stop - self.origin",
    ),
    Fault(
        "until_step ends no period",
        "NEVER if self.period >= self.stop - step",
        "NEVER if False",
        first="plan.py::test_a_plan_says_what_the_run_then_does",
    ),
    Fault("from_step is ignored", "max(step, self.start) - self.origin", "step - self.origin"),
    Fault("per_epoch counts global steps", "trigger.origin = epoch_start", "trigger.origin = 0"),
    Fault(
        "per_epoch keeps the last epoch's plan",
        "            self.schedule(step, epoch_start)\n",
        "            pass\n",
    ),
    Fault(
        "only one trigger is due at a step",
        "entries += (2 * entry + 1, 2 * entry + 2)",
        "entries += (2 * entry + 1,)",
        ("python",),
    ),
    Fault(
        "only one trigger is due at a step",
        "                entries.append(2 * entry + 2)\n",
        "",
        ("cython",),
    ),
    Fault(
        "two triggers are taken for one",
        "(size > 2 and heap[2].due <= step)",
        "(size > 2 and heap[2].due < step)",
        ("cython",),
    ),
    Fault(
        "two triggers are taken for one",
        "(len(agenda) > 2 and agenda[2][0] <= step)",
        "(len(agenda) > 2 and agenda[2][0] < step)",
        ("python",),
    ),
    Fault(
        "the heap loses its order",
        "place = child\n",
        "place = child\n            break\n",
        ("cython",),
        first="event_sets.py::test_the_events_of_a_step_equal_the_frozenset_of_their_names",
    ),
    # Conditions, in both cores
    Fault("conditions do not see that stop_when ends", "state = state.at_training_end()", "pass"),
    Fault(
        "conditions run past until_step",
        "condition.start <= step < condition.stop",
        "condition.start <= step <= condition.stop",
    ),
    Fault(
        "only True is true",
        "and condition.function(state):",
        "and condition.function(state) is True:",
    ),
    Fault("a condition's error has no note", "self._blame(failure, place)", "pass"),
    Fault(
        "a condition gets the step as epoch_step",
        "        epoch_step = step - self.epoch_start\n",
        "        epoch_step = step\n",
        ("python",),
    ),
    Fault(
        "a condition gets the step as epoch_step",
        "        state.epoch_step = step - self.epoch_start\n",
        "        state.epoch_step = step\n",
        ("cython",),
    ),
    Fault(
        "the conditions' state is not the step's",
        "            self.state = asked\n",
        "            pass\n",
        first="triggers.py::test_loop_state_is_the_state_of_the_latest_step",
    ),
    Fault(
        "what stop_when found is lost",
        "self.answers = found, conditions.asked",
        "self.answers = 0, conditions.asked",
        ("cython",),
    ),
    Fault(
        "what stop_when found is lost",
        "self.answers = found, asked",
        "self.answers = 0, asked",
        ("python",),
    ),
    # States and sets, in both cores
    Fault(
        "steps_done is the step",
        "self._global_step + 1",
        "self._global_step",
        ("python",),
        first="accumulation.py::test_after_a_resume_with_step_done_false_the_window_is_completed_again",
    ),
    Fault(
        "steps_done is the step",
        "self.global_step + 1",
        "self.global_step",
        ("cython",),
        first="accumulation.py::test_after_a_resume_with_step_done_false_the_window_is_completed_again",
    ),
    Fault("the clock is read at every access to elapsed", "if self._elapsed < 0:", "if True:"),
    Fault(
        "unknown names do not warn",
        "self._on_unknown(name)",
        "pass",
        first="chunks.py::test_the_events_of_a_list_have_the_type_of_those_of_single_steps",
    ),
    Fault(
        "windows forget the step at which they began",
        "            self._before[place] = self._latest[place]\n",
        "",
        ("cython",),
    ),
    Fault(
        "windows forget the step at which they began",
        "            self._before[place] = latest[place]\n",
        "",
        ("python",),
    ),
    Fault(
        "a window ends at a step that is not done",
        "return latest if latest < end else self._before[place]",
        "return latest",
    ),
    Fault(
        "quiet steps have every event",
        "return PySet_GET_SIZE(self) and PySet_Contains(self, name)",
        "return True",
        ("cython",),
    ),
    Fault(
        "names beyond the first word are never due",
        "        if place < WORD:\n            return (self._bits >> place) & 1\n"
        "        return PySet_Contains(self, name)",
        "        return place < WORD and (self._bits >> place) & 1",
        ("cython",),
        first="event_sets.py::test_any_number_of_events_fires_at_the_right_steps",
    ),
    Fault(
        "bits of the event set are off by one",
        "                return (self._bits >> place) & 1\n        known",
        "                return (self._bits >> (place + 1)) & 1\n        known",
        ("cython",),
    ),
    # The steppers
    Fault(
        "quiet steps run over a trigger",
        "quiet_until = triggers.next_due() - 1\n",
        "quiet_until = triggers.next_due()\n",
        ("python",),
    ),
    Fault(
        "quiet steps run over a trigger",
        "min(triggers.next_due() - 1, token.until)",
        "min(triggers.next_due(), token.until)",
        ("cython",),
    ),
    Fault(
        "quiet steps skip conditions",
        "token.quiet_until = min(token.quiet_until, max(step, conditions.start - 1))",
        "pass",
        ("cython",),
    ),
    Fault(
        "quiet steps skip conditions",
        "quiet_until = step if conditions.start <= step else conditions.start - 1",
        "pass",
        ("python",),
    ),
    Fault(
        "steps between decisions run over stop_when",
        "if bits & self.decision_bits:",
        "if False:",
        ("python",),
        first="chunks.py::test_the_next_event_comes_after_the_steps_that_were_returned",
    ),
    Fault(
        "steps between decisions run over stop_when",
        "if self.has_decision_bits and bits & self.decision_bits:",
        "if False:",
        ("cython",),
        first="chunks.py::test_the_next_event_comes_after_the_steps_that_were_returned",
    ),
    Fault(
        "a lone event with a timer takes no decision",
        "elif only.takes_decision:",
        "elif False:",
    ),
    Fault(
        "what is asked before start_step is found is forgotten",
        "        self._run.take_over(run)\n",
        "",
        SHARED,
        LOOP,
    ),
    Fault(
        "steps between decisions run over the time",
        "if step > token.until or reading >= self.next_reading:",
        "if step > token.until:",
        ("python",),
    ),
    Fault(
        "steps between decisions run over the time",
        "or (self.timed and reading >= self._next_reading)",
        "",
        ("cython",),
    ),
    Fault(
        "a stop during a fetch comes a step late",
        "if self.stepper.step < self.token.quiet_until and (",
        "if (",
        ("cython",),
    ),
    Fault(
        "an interrupted clock loses the batch",
        "self.queue, batch = [batch], QUIET\n                    run.fail_step",
        "batch = QUIET\n                    run.fail_step",
        ("python",),
    ),
    Fault(
        "an interrupted clock loses the batch",
        "            stepper.queue = [batch]\n            stepper.busy = False\n",
        "            stepper.busy = False\n",
        ("cython",),
        first="threads.py::test_after_an_interrupted_step_the_loop_can_be_entered",
    ),
    Fault(
        "an interrupted decision is skipped",
        "token.set_back()  # until it is made, whatever interrupts it",
        "pass",
        ("cython",),
        first="interrupts.py::test_after_an_interrupt_at_any_point_all_batches_and_events_come",
    ),
    Fault(
        "the iterator keeps the batch",
        "yield batch, (batch := QUIET)\n",
        "yield batch, QUIET\n",
        ("python",),
    ),
    Fault(
        "the iterator keeps the batch of a firing step",
        "yield batch, (batch := QUIET) or events",
        "yield batch, events",
        ("python",),
    ),
    Fault(
        "the iterator keeps the batch",
        "            Py_DECREF(batch)\n",
        "            pass\n",
        ("cython",),
        first="threads.py::test_a_batch_that_is_fetched_while_the_loop_is_closed_is_freed",
    ),
    Fault(
        "the loop can be entered within a step",
        "(generator is not None and generator.gi_running)",
        "False",
        ("python",),
        first="threads.py::test_entering_the_loop_within_a_step_is_refused",
    ),
    Fault(
        "the loop can be entered within a step",
        "        if self.busy:\n            raise errors.in_use()\n        self.token.set_back()",
        "        self.token.set_back()",
        ("cython",),
        first="threads.py::test_entering_the_loop_within_a_step_is_refused",
    ),
    Fault(
        "next() within a list is not refused",
        "self._making is not None or ",
        "",
        ("python",),
    ),
    Fault(
        "next() within a step is not refused",
        "        if self.stepper.busy:\n            raise errors.in_use()\n",
        "",
        ("cython",),
        first="threads.py::test_next_on_the_same_iterator_within_a_step_is_refused",
    ),
    Fault(
        "an older iterator is not replaced",
        "            self.token.set_back()\n            self.token = Token()",
        "            self.token = Token()",
        ("python",),
    ),
    Fault(
        "an older iterator is not replaced",
        "        self.token.set_back()\n        self.token = Token",
        "        self.token = Token",
        ("cython",),
    ),
    Fault(
        "an exhausted iterator begins again",
        "            token.over = in_hand == 0\n",
        "",
        ("cython",),
    ),
    # Lists, in both cores
    Fault(
        "a list runs over a trigger",
        "        last = min(last, self.triggers.next_due())\n",
        "",
        ("python",),
    ),
    Fault(
        "a list runs over a trigger",
        "        last = min(last, stepper.triggers.next_due())\n",
        "",
        ("cython",),
    ),
    Fault(
        "a list runs over a decision",
        "        if last > token.until or (",
        "        if (",
        ("python",),
    ),
    Fault(
        "a list runs over a decision",
        "if last > self.token.until or (",
        "if (",
        ("cython",),
        first="agreement.py::test_an_epoch_that_is_cut_short_is_cut_in_lists_too",
    ),
    Fault(
        "a list has any length",
        "size = fitting(sizes, last - step)",
        "size = last - step",
        ("python",),
    ),
    Fault(
        "a list has any length",
        "return fitting(self.sizes, last - stepper.step)",
        "return last - stepper.step",
        ("cython",),
    ),
    Fault(
        "an interrupt loses a list that is gathered",
        "            self.queue, token.until, token.quiet_until = batches, -1, -1\n"
        "            if len",
        "            token.until = token.quiet_until = -1\n            if len",
        ("python",),
    ),
    Fault(
        "an interrupt loses a list that is gathered",
        "        except BaseException as exception:\n            stepper.queue = gathered\n",
        "        except BaseException as exception:\n",
        ("cython",),
    ),
    # Timers
    Fault(
        "timers are a nanosecond late",
        "+ row.period",
        "+ row.period + 1",
        SHARED,
        TIMERS,
    ),
    Fault(
        "timers make up for missed periods",
        "lasts[number] = time\n",
        "lasts[number] = _due(row, lasts[number])\n",
        SHARED,
        TIMERS,
    ),
    Fault(
        "at_time forgets its second point",
        "else row.points[place]",
        "else row.points[-1]",
        SHARED,
        TIMERS,
    ),
    Fault(
        "timers run past until_step",
        "if row.start <= step < row.stop and",
        "if row.start <= step <= row.stop and",
        SHARED,
        TIMERS,
    ),
    Fault(
        "timers run before from_step",
        "if row.start <= step < row.stop and",
        "if step < row.stop and",
        SHARED,
        TIMERS,
    ),
    Fault(
        "only one timer fires in a step",
        "times[row.per_launch]:\n                bits |= 1 << row.place\n",
        "times[row.per_launch]:\n                bits |= 1 << row.place\n                break\n",
        SHARED,
        TIMERS,
    ),
    # Decisions
    Fault(
        "timers are short-circuited",
        "        if may_be_due:\n",
        "        if may_be_due and not bits:\n",
        SHARED,
        RUN,
    ),
    Fault(
        "the clock starts before the epoch is opened",
        "                if opens:\n",
        "                if not self.clock.ticking:\n"
        "                    self.clock.start()\n"
        "                if opens:\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a failed step leaves its time",
        "        stepper.reading = None\n        stepper.triggers.schedule",
        "        stepper.triggers.schedule",
        SHARED,
        RUN,
        first="interrupts.py::test_a_step_that_is_repeated_reads_the_clock_again",
    ),
    Fault(
        "max_steps is one late",
        "if step == schedule.max_steps - 1:",
        "if step == schedule.max_steps:",
        SHARED,
        RUN,
    ),
    Fault(
        "max_epochs is one late",
        "if self.stepper.epoch + 1 >= schedule.max_epochs:",
        "if self.stepper.epoch >= schedule.max_epochs:",
        SHARED,
        RUN,
    ),
    Fault(
        "max_seconds has to be exceeded",
        "if now >= schedule.max_time else",
        "if now > schedule.max_time else",
        SHARED,
        RUN,
    ),
    Fault(
        "a limit hides stop_when",
        'reason = "stop_when" if asked_stop is None else reason',
        'reason = reason or "stop_when"',
        SHARED,
        RUN,
    ),
    Fault(
        "a | TRAINING_END loses its second half",
        "bits |= schedule.on_training_end",
        "bits |= schedule.on_training_end & 2",
        SHARED,
        RUN,
    ),
    Fault(
        "a | EPOCH_END loses its second half",
        "bits |= schedule.on_epoch_end(stepper.epoch, step)",
        "bits |= schedule.on_epoch_end(stepper.epoch, step) & 1",
        SHARED,
        RUN,
    ),
    Fault(
        "the epoch's end is that of the epoch before",
        "on_epoch_end(stepper.epoch, step)",
        "on_epoch_end(stepper.epoch - 1, step)",
        SHARED,
        RUN,
    ),
    Fault(
        "a cut epoch has no end",
        "epoch_end = step == self._epoch_last",
        "epoch_end = False",
        SHARED,
        RUN,
    ),
    Fault(
        "the latest step is of the epoch that comes",
        "        stepper.latest_state()  # it is kept, still with the old epoch\n",
        "",
        SHARED,
        RUN,
        first="agreement.py::test_start_step_finds_its_place_by_the_shortest",
    ),
    Fault(
        "an epoch's last step does not say so",
        "            stepper.epoch_end = step\n",
        "",
        SHARED,
        RUN,
    ),
    Fault(
        "the last step does not say so",
        "            stepper.training_end = step\n",
        "",
        SHARED,
        RUN,
    ),
    Fault("an error does not end the run", "        self.error = exception\n", "", SHARED, RUN),
    Fault(
        "the source is kept after an error",
        "        self._let_go()\n        self.source.forget()\n",
        "        self._let_go()\n",
        SHARED,
        RUN,
        first="source.py::test_the_iterator_of_an_epoch_is_let_go_with_it",
    ),
    Fault(
        "a condition's error becomes an event",
        "if not (by_source and self.on_exception):",
        "if not self.on_exception:",
        SHARED,
        RUN,
        first="exceptions.py::test_an_error_of_a_condition_never_becomes_a_last_step",
    ),
    Fault(
        "StopIteration ends the loop",
        "raise errors.not_stop(exception)",
        "raise exception",
        ("cython",),  # in the other core a generator sees to it
        RUN,
        first="exceptions.py::test_a_guarded_stop_iteration_is_raised_as_runtime_error",
    ),
    Fault(
        "a guarded error is raised without its last step",
        "if not self._delivered:",
        "if False:",
        SHARED,
        RUN,
        first="exceptions.py::test_an_error_of_a_guarded_body_becomes_one_last_step",
    ),
    Fault(
        "a closed loop hands over a batch",
        "            self.check(token)\n\n        # What comes next\n",
        "            pass\n\n        # What comes next\n",
        SHARED,
        RUN,
        first="interrupts.py::test_a_condition_may_close_or_restart_the_loop_at_any_step",
    ),
    Fault(
        "an older iterator ends without an error",
        "            raise errors.replaced()\n",
        "            return\n",
        SHARED,
        RUN,
    ),
    Fault(
        "steps between decisions run over an epoch's end",
        "until = min(self._epoch_last, self.schedule.max_steps - 1, timers.next_start) - 1",
        "until = min(self.schedule.max_steps - 1, timers.next_start) - 1",
        SHARED,
        RUN,
    ),
    Fault(
        "steps between decisions run over a limit",
        "until = min(self._epoch_last, self.schedule.max_steps - 1, timers.next_start) - 1",
        "until = min(self._epoch_last, timers.next_start) - 1",
        SHARED,
        RUN,
    ),
    Fault(
        "steps between decisions run over a timer's first step",
        "until = min(self._epoch_last, self.schedule.max_steps - 1, timers.next_start) - 1",
        "until = min(self._epoch_last, self.schedule.max_steps - 1) - 1",
        SHARED,
        RUN,
    ),
    Fault(
        "an undone step keeps its timers",
        "undone = not step_done and self._timers_at == self.stepper.step",
        "undone = False",
        SHARED,
        RUN,
        first="resume.py::test_a_run_in_lives_is_the_run_that_was_never_stopped",
    ),
    Fault(
        "an interrupt keeps the triggers",
        "        stepper.triggers.schedule(stepper.step + 1, stepper.epoch_start)\n"
        "        epoch = self._epoch\n",
        "        epoch = self._epoch\n",
        SHARED,
        RUN,
        first="interrupts.py::test_after_an_interrupt_at_any_point_all_batches_and_events_come",
    ),
    Fault(
        "a requested stop does not force a decision",
        "        self.stepper.token.set_back()\n\n    def take_over",
        "\n    def take_over",
        SHARED,
        RUN,
        first="real_loops.py::test_a_language_model",
    ),
    Fault(
        "INTERRUPT does not fire",
        "                bits |= asked_stop[1]\n",
        "                pass\n",
        SHARED,
        RUN,
        first="agreement.py::test_a_signal_ends_the_run_at_the_agreement_after_the_next",
    ),
    Fault(
        "an exhausted stream does not warn", "self.source.warn_ran_dry(step)", "pass", SHARED, RUN
    ),
    Fault(
        "the next event is one late",
        "else due - stepper.step",
        "else due - stepper.step + 1",
        SHARED,
        RUN,
    ),
    # Epochs and interrupts
    Fault(
        "an epoch's iterator is not asked once more",
        "        if epoch.ends_itself:\n",
        "        if False:\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a run's last iterator is not asked once more",
        "            if epoch is not None and epoch.over:\n"
        "                self._leave_epoch(epoch)\n",
        "            pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "an end after an interrupt is believed",
        "if epoch.was_interrupted and not (has_held and epoch.tells_its_last):",
        "if False:",
        SHARED,
        RUN,
    ),
    Fault(
        "after an interrupt the epoch is not opened anew",
        "        else:\n            epoch.must_reopen = True\n",
        "",
        SHARED,
        RUN,
    ),
    Fault(
        "an error after leaving is believed",
        "            self._epoch.was_left = True\n",
        "            pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "an iterator is doubted for ever",
        "epoch.lists is None:\n                    epoch.was_interrupted = False\n",
        "epoch.lists is None:\n                    pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "no error after leaving is believed",
        "            epoch.was_left = False\n        stepper.batches",
        "        stepper.batches",
        SHARED,
        RUN,
    ),
    Fault(
        "a new iterator of an epoch loses the batch fetched ahead",
        "held = opened.go_on_from(epoch)",
        "held: Any = MISSING",
        SHARED,
        RUN,
    ),
    # Lists with a decision
    Fault(
        "a decided list runs over a trigger",
        "foreseen = min(stepper.triggers.next_due(), self.schedule",
        "foreseen = min(self.schedule",
        SHARED,
        RUN,
    ),
    Fault(
        "a decided list has any length",
        "return self._core.fitting(sizes, min(size, len(stepper.queue)))",
        "return min(size, len(stepper.queue))",
        SHARED,
        RUN,
    ),
    Fault(
        "a list runs over an epoch's end",
        "if step == self._epoch_last or stepper.answers is not None:",
        "if stepper.answers is not None:",
        SHARED,
        RUN,
    ),
    Fault(
        "the conditions of a list's last step are called twice",
        "if self._settled == count - 1 and stepper.answers is not None:",
        "if False:",
        SHARED,
        RUN,
    ),
    Fault(
        "the conditions of a list are not called",
        "                    stepper.answers = found, None\n",
        "                    pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "settled steps call conditions again",
        "elif self._settled < count and conditions",
        "elif conditions",
        SHARED,
        RUN,
    ),
    Fault(
        "the count of settled steps is never reset",
        "        self._settled = settled\n",
        "",
        SHARED,
        RUN,
    ),
    Fault(
        "a condition's error drops what was gathered",
        "        if not self._settled:\n            return False\n",
        "        return False\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a condition's error at the last step drops the list",
        "                if not self._defers(token, exception):\n                    raise\n",
        "                raise\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a source's error drops what was gathered",
        "        self._deferred = error, True\n",
        "        self._deferred = error, True\n        self.stepper.queue = []\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a list is not cut by a stop",
        "        if self._is_asked():\n            return 1\n",
        "",
        SHARED,
        RUN,
        first="vocabulary.py::test_a_trigger_in_a_fetch_comes_with_the_step_that_is_being_made",
    ),
    # The vocabulary
    Fault(
        "a timer does not begin anew with its event",
        "if may_be_due or bits & schedule.timer_bits:",
        "if may_be_due:",
        SHARED,
        RUN,
    ),
    Fault(
        "what is triggered is not due",
        "                    bits |= bit\n",
        "                    pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "what is triggered is due for ever",
        "            del self.triggered[:triggered]\n",
        "            pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a trigger by hand waits for the next decision",
        "        self.triggered.append(bit)\n        self.stepper.token.set_back()\n",
        "        self.triggered.append(bit)\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a pause is training time",
        "            self.started += pause\n",
        "            pass\n",
    ),
    Fault(
        "a pause stops the time of the launch",
        "launch_now = stepper.reading - self.clock.launched",
        "launch_now = now",
        SHARED,
        RUN,
    ),
    Fault(
        "a request does not end a pause",
        "            self._pauses.clear()\n            self.clock.go_on()\n",
        "            pass\n",
        SHARED,
        RUN,
    ),
    Fault(
        "a lap is asked for twice",
        "        if step != before:\n",
        "        if True:\n",
        SHARED,
        LOOP,
    ),
    Fault(
        "a period of steps never begins late",
        "if self.period and count <= self.first:",
        "if False:",
    ),
    Fault(
        "steps of a launch count from the run's first",
        "trigger.origin = launch",
        "trigger.origin = 0",
    ),
    Fault(
        "an interrupt loses the batches of a list",
        "        gathered = self.gathered\n",
        "        gathered = self.gathered = []\n",
        SHARED,
        BATCH_LISTS,
    ),
    Fault(
        "a list takes batches of the next epoch",
        "min(self.size, self._end - self.given)",
        "self.size",
        SHARED,
        BATCH_LISTS,
    ),
    Fault(
        "start_step forgets that an epoch is complete",
        "epoch, epoch_steps = divmod(steps - 1, per_epoch)",
        "epoch, epoch_steps = divmod(steps, per_epoch)",
        SHARED,
        LOOP,
    ),
    Fault(
        "fast_forward=False is ignored",
        "        if not fast_forward:\n",
        "        if False:\n",
        SHARED,
        SOURCE,
    ),
    # Outside the engine
    Fault(
        "the clock may go backwards",
        "latest = max(latest, nanoseconds(number))",
        "latest = nanoseconds(number)",
        SHARED,
        "dloop/checks.py",
    ),
    Fault(
        "a second error under guard hides the first",
        "errors.chain(exception, run.pending)",
        "pass",
        SHARED,
        LOOP,
    ),
    Fault(
        "a stop hides that max_seconds was reached",
        "(stepped and run.is_out_of_time())",
        'run.stop_reason == "max_seconds"',
        SHARED,
        LOOP,
        first="resume.py::test_a_run_that_was_stopped_when_its_time_was_up_is_over",
    ),
    Fault(
        "a failed close prevents the restart",
        "self._begin()\n        source.close()",
        "source.close()\n        self._begin()",
        SHARED,
        LOOP,
        first="stopping.py::test_a_loader_that_fails_to_close_does_not_keep_the_handlers_installed",
    ),
    Fault(
        "a state counts the latest list as one step",
        "undone = stepper.size if",
        "undone = 1 if",
        SHARED,
        LOOP,
    ),
    Fault(
        "the loader's state is lost at the end of the run",
        "self._at_end = self.state_at_end()\n            self._note()",
        "pass",
        SHARED,
        LOADER_STATE,
        first="resume.py::test_a_run_that_has_ended_keeps_its_loaders_state",
    ),
    Fault(
        "a loader that failed is asked for its state",
        "        self._failed = True  # as long as the fetch lasts, and if it is interrupted\n",
        "",
        SHARED,
        LOADER_STATE,
        first="resume.py::test_an_error_of_the_loader_leaves_the_state_of_before",
    ),
    Fault(
        "the state of an epoch is taken for that of the one before",
        "tracked = self._tracked_before\n",
        "pass\n",
        SHARED,
        SOURCE,
        first="resume.py::test_ctrl_c_in_an_epochs_first_fetch_leaves_the_state_of_the_one_before",
    ),
    Fault(
        "batches beyond the length are dropped without a warning",
        "        if epoch.tells_its_last:\n            warn(",
        "        if epoch.tells_its_last:\n            str(",
        SHARED,
        SOURCE,
    ),
    Fault(
        "end_of_dataloader is ignored",
        "if not self._loader.end_of_dataloader:",
        "if True:",
        SHARED,
        SOURCE,
    ),
    Fault(
        "iter() of an iterator is called repeatedly",
        "            batches = chain(_Once(batches))\n",
        "            pass\n",
        SHARED,
        SOURCE,
    ),
    Fault(
        "a resumed loader is trusted at once",
        "NEVER if counts else MOST_AGAIN",
        "1",
        SHARED,
        LOADER_STATE,
        first="resume.py::test_a_loader_of_unknown_order_gives_each_sample_once",
    ),
    Fault(
        "a resumed loader is always trusted",
        "if self._resumed is None or not self._taken or self._taken >= self._right_after:",
        "if True:",
        SHARED,
        LOADER_STATE,
        first="resume.py::test_a_loader_of_unknown_order_gives_each_sample_once",
    ),
    Fault(
        "a loader's state is saved once per epoch",
        "self._noted[1:-1] = []",
        "if self._noted:\n                    return",
        SHARED,
        LOADER_STATE,
        first="resume.py::test_few_batches_are_fetched_again_where_the_loop_looks_ahead",
    ),
    Fault(
        "set_epoch is called repeatedly on one object",
        "or id(part) in parts:\n            continue\n        parts[id(part)] = part\n",
        "or len(parts) > 50:\n            continue\n        parts[len(parts)] = part\n",
        SHARED,
        LOADERS,
    ),
    Fault(
        "a state that cannot be asked for is an error",
        "except (AttributeError, NotImplementedError, TypeError) as exception:",
        "except ZeroDivisionError as exception:",
        SHARED,
        LOADER_STATE,
    ),
    Fault(
        "an error of a state is swallowed",
        "isinstance(exception, TypeError) and trace is not None and trace.tb_next is not None:",
        "False:",
        SHARED,
        LOADER_STATE,
    ),
    Fault(
        "a loader that says its last is resumed as one that was cut",
        "(self._ended or loaders.is_at_its_last(self._owner))",
        "self._ended",
        SHARED,
        LOADER_STATE,
    ),
    Fault(
        "a sampler's epoch that the loader has set is not looked at",
        "epochs = [sampler.epoch for sampler in samplers if sampler.epoch != epoch]",
        "epochs: list[int] = []",
        SHARED,
        SOURCE,
    ),
    Fault(
        "a random order is gone on with in silence",
        "                _warn_of_order(taken, epoch)\n",
        "                pass\n",
        SHARED,
        SOURCE,
    ),
    Fault(
        "what is indexed is fetched and dropped",
        "    if _is_indexed(loader):\n",
        "    if False:\n",
        SHARED,
        LOADERS,
    ),
    Fault(
        "dead workers are kept",
        "        loader._iterator = None",
        "        pass",
        SHARED,
        LOADERS,
    ),
    Fault(
        "at_epoch is ignored",
        "or (at is not None and epoch in _several(at))",
        "",
        SHARED,
        "dloop/schedule.py",
    ),
    Fault(
        "a loop that ends uninstalls the handler of the other",
        "previous = previous if replaced is _handle else replaced",
        "previous = replaced",
        SHARED,
        "dloop/signals.py",
    ),
    Fault(
        "writers do not wait for the lock",
        "fcntl.LOCK_EX",
        "fcntl.LOCK_UN",
        SHARED,
        "dloop/state.py",
    ),
    Fault(
        "the limit's last step delivers nothing",
        "            if is_agreement or reason is not None:\n",
        "            if is_agreement:\n",
        SHARED,
        RUN,
        first="agreement.py::test_what_was_asked_at_the_last_agreement_comes_with_the_limits_last_step",
    ),
    Fault(
        "a stop on one process ends that one alone",
        "            asked_stop = None if delivered is None else delivered.stop\n",
        "            asked_stop = self.stop_asked\n",
        SHARED,
        RUN,
        first="agreement.py::test_stop_on_one_ends_all",
    ),
    Fault(
        "max_seconds of others does not count",
        "                if delivered.out_of_time:\n",
        "                if delivered.out_of_time and now >= schedule.max_time:\n",
        SHARED,
        RUN,
        first="agreement.py::test_max_seconds_ends_the_run_on_all_and_its_state_is_over_on_all",
    ),
    Fault(
        "a condition is due where it holds, on one process",
        "        if agreement is None:\n            bits |= found\n        else:",
        "        bits |= found\n        if agreement is not None:",
        SHARED,
        RUN,
        first="agreement.py::test_what_was_asked_at_the_last_agreement_comes_with_the_limits_last_step",
    ),
    Fault(
        "a condition within a list ends it on one process",
        "                if found and self.agreement is None:\n",
        "                if found:\n",
        SHARED,
        RUN,
        first="agreement.py::test_a_condition_that_holds_ends_no_list",
    ),
    Fault(
        "lists do not end at agreements",
        "            foreseen = min(foreseen, self.agreement.at_or_after(stepper.step + 1))\n",
        "            pass\n",
        SHARED,
        RUN,
        first="agreement.py::test_stop_on_one_ends_all",
    ),
    Fault(
        "a run whose time was up on another process is not over",
        '            return self.stop_reason == "max_seconds"\n',
        "            pass\n",
        SHARED,
        RUN,
        first="agreement.py::test_max_seconds_ends_the_run_on_all_and_its_state_is_over_on_all",
    ),
    Fault(
        "an exchange is left unfinished at the end",
        "                self.agreement.discard()\n            for companion in",
        "                pass\n            for companion in",
        SHARED,
        RUN,
        first="agreement.py::test_an_exchange_that_fails_when_the_run_is_over_is_an_error",
    ),
    Fault(
        "an exchange is left unfinished when the loop is closed",
        "            self.agreement.discard()\n\n    def close",
        "            pass\n\n    def close",
        SHARED,
        RUN,
        first="agreement.py::test_what_was_asked_and_not_delivered_is_asked_again_after_a_resume",
    ),
    Fault(
        "what conditions asked for is not saved",
        "                bits |= wanted\n",
        "                pass\n",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "what a condition asked for comes twice",
        "            if not is_delivered:\n",
        "            if True:\n",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "processes begin at different steps",
        '            "global_step": self._first,\n',
        '            "global_step": 0,\n',
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "definitions of events may differ",
        '            "definition of these events": _number_of([shared, moments]),\n',
        '            "definition of these events": 0,\n',
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "each process has the length of its own shard",
        "            return self._length\n",
        "            return length\n",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "an exchange under way is lost at an epoch's start",
        "                self._result = self._finish()\n",
        "                self._finish()\n",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "an unknown length is taken under max_epochs",
        '        if self._schedule.limit[0] == "max_epochs":\n',
        '        if self._schedule.limit[0] == "":\n',
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "a signal is not told from a stop",
        "        return Signals(code - 1).name, self._schedule.due_with(LoopEvents.INTERRUPT)\n",
        '        return "stop", 0\n',
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "points in time come once on each clock",
        "max(lasts[number], row.points[due[number] - 1])",
        "max(lasts[number], min(times[row.per_launch], row.points[due[number] - 1]))",
        SHARED,
        TIMERS,
        first="agreement.py::test_points_in_time_come_once_each_on_clocks_that_differ",
    ),
    Fault(
        "a timer counts from where it was asked",
        "lasts[number] = times[row.per_launch]",
        "lasts[number] = min(_due(row, lasts[number]), times[row.per_launch])",
        SHARED,
        TIMERS,
        first="agreement.py::test_a_timer_that_is_due_on_one_comes_to_all_at_the_agreement_after_the_next",
    ),
    Fault(
        "a cut epoch asks its iterator once more",
        "        if self.given_len is not None or self._is_cut:\n",
        "        if self.given_len is not None:\n",
        SHARED,
        SOURCE,
    ),
    Fault(
        "windows begin at the run's first step",
        "start = max(start, part.from_step)",
        "start = start",
        SHARED,
        PLAN,
    ),
    Fault(
        "a plan has every epoch",
        "self._epoch_ends(part.every_n_epochs or 1, window)",
        "self._epoch_ends(1, window)",
        SHARED,
        PLAN,
    ),
    Fault(
        "steps of a launch count from the first of all",
        "begin = self.first if part.per_launch else 0",
        "begin = 0",
        SHARED,
        PLAN,
    ),
    Fault(
        "stop_when ends no plan",
        "cut = self if step is None else self._replace(end=step + 1)",
        "cut = self",
        SHARED,
        PLAN,
    ),
    Fault(
        "a resumed epoch begins anew",
        "    epoch_start = first - epoch_steps\n",
        "    epoch_start = first\n",
        SHARED,
        PLAN,
    ),
    Fault(
        "no step is left over",
        "        if last is not None and last < epoch_end:\n",
        "        if last is None:\n",
        SHARED,
        PLAN,
    ),
    Fault(
        "an event that is off is not told of",
        "        if not criteria:\n            yield",
        "        if False:\n            yield",
        SHARED,
        PLAN,
    ),
    Fault(
        "equal definitions are not told of",
        "        if len(same) > 1:\n",
        "        if len(same) > 2:\n",
        SHARED,
        PLAN,
    ),
    Fault(
        "pauses are in bodies",
        "return (self._bodies.total - self._paused) / 1e9",
        "return self._bodies.total / 1e9",
        SHARED,
        PROFILE,
    ),
    Fault(
        "steps with several events count for each",
        "        key = frozenset(step.names)\n",
        "        key = frozenset(step.names[:1])\n",
        SHARED,
        PROFILE,
    ),
    Fault(
        "an event costs its whole body",
        "            each = total / count / 1e9 - usual\n",
        "            each = total / count / 1e9\n",
        SHARED,
        PROFILE,
    ),
    Fault(
        "the body that is going on is in the trace",
        "            if step.ended:\n",
        "            if True:\n",
        SHARED,
        PROFILE,
    ),
    Fault(
        "waiting for other processes is waiting for data",
        "began + self._exchanged - exchanged, perf",
        "began, perf",
        SHARED,
        PROFILE,
    ),
    Fault(
        "a step that an interrupt has held is lost",
        "        pair = profile.held\n        if pair is None:\n",
        "        pair = None\n        if pair is None:\n",
        SHARED,
        PROFILE,
    ),
    Fault(
        "a bar is asked at each step",
        "self.next_step = step + max(1, int(min(",
        "self.next_step = step + min(1, int(min(",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "a resumed bar begins at 0",
        "            bar.initial = bar.n = step\n",
        "            bar.initial = bar.n = 0\n",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "the last step is not shown",
        "stepper.step + is_done",
        "stepper.step",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "every process shows a bar",
        "    if rank_among_several() not in (None, 0):\n",
        "    if False:\n",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "marks beyond a column are lost",
        "            found.append(mark)\n            column",
        "            found[:0] = [mark] if not found else []\n            column",
        SHARED,
        DRAWING,
    ),
    Fault(
        "every column is as high",
        "HIGHEST * count / max(columns)",
        "HIGHEST",
        SHARED,
        DRAWING,
    ),
    Fault(
        "a table is wider than a terminal",
        "    while sum(widths) + 2 * (len(widths) - 1) > COLUMNS:\n",
        "    while sum(widths) > COLUMNS:\n",
        SHARED,
        DRAWING,
    ),
    Fault(
        "a bar waits for as many steps as when they were fast",
        "int(min(distance, end // PARTS))",
        "int(distance)",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "a failed run is at its end",
        "        elif run.error is None:\n",
        "        else:\n",
        SHARED,
        PROGRESS,
    ),
    Fault(
        "a loader's end is not waited for",
        "                profile.end_request(asked)\n",
        "                pass\n",
        SHARED,
        PROFILE,
    ),
    Fault(
        "an error that is an event is a step",
        "step.size = stepper.step - self._latest_step",
        "step.size = stepper.size",
        SHARED,
        PROFILE,
    ),
    Fault(
        "a body in which the loop is left has no end",
        "            profile.end_body(perf_counter_ns())  # the loop",
        "            pass  # the loop",
        SHARED,
        PROFILE,
    ),
    Fault(
        "steps are left over though a part is open",
        " or not fires or is_open:",
        " or not fires:",
        SHARED,
        PLAN,
    ),
    Fault(
        "a collection's points that never come are not told of",
        "if point >= end]",
        "if False]",
        SHARED,
        PLAN,
    ),
    Fault(
        "a member that cannot come is not told of",
        "return self._missing.get(name)",
        "return None",
        SHARED,
        PLAN,
    ),
    Fault(
        "a timer comes though its name was due since it was asked for",
        "sets.last_step(name, step) > self._asked_at",
        "False",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "only the first of what is triggered comes to all",
        "            triggered |= self._bits_of_names.get(number, 0) * is_asked\n",
        "            triggered = triggered or self._bits_of_names.get(number, 0) * is_asked\n",
        SHARED,
        AGREEMENT,
    ),
    Fault(
        "an error on the way to start_step ends no run",
        "        self._end_by(exception, True)\n",
        "        raise exception\n",
        SHARED,
        RUN,
        first="start_step.py",
    ),
    Fault(
        "what was dropped on the way to start_step is not dropped from a new iterator",
        "self._begun, None  # once",
        "self._begun, self._begun  # once",
        SHARED,
        SOURCE,
        first="start_step.py",
    ),
    Fault("wide letters are counted as one column", 'in "WF"', 'in ""', SHARED, DRAWING),
]


def text_with(core: str, fault: Fault) -> str:
    """The text of the file of `fault`, with the fault."""
    file = ROOT / (fault.file or FILES[core])
    text = file.read_text(encoding="utf-8")
    if fault.old and text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: occurs {text.count(fault.old)} times in {file.name}")
    return text.replace(fault.old, fault.new) if fault.old else text


def planted(core: str, fault: Fault, folder: Path) -> Path:
    """A copy of the project in `folder`, with `fault`, and compiled if that needs to be."""
    copy = folder / f"{core} {fault.name}".replace(" ", "_").replace("|", "or")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", ".*")
    for name in ("dloop", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    (copy / (fault.file or FILES[core])).write_text(text_with(core, fault), encoding="utf-8")
    if core == "cython":
        built = run(
            copy,
            "setup.py",
            "-q",
            "build_ext",
            "--inplace",
            CFLAGS="-O0",
            DLOOP_REQUIRE_EXTENSION="1",
        )
        if built.returncode:
            raise SystemExit(f"{fault.name}: does not compile\n{built.stdout}{built.stderr}")
    where = run(copy, "-c", "import dloop; print(dloop.__file__)").stdout
    if not where.startswith(str(copy)):
        raise SystemExit(f"{fault.name}: the tests would run {where}, not the copy")
    return copy


def run(copy: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `copy`."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "DLOOP_EXAMPLES": "400", "DLOOP_HYPOTHESIS": "first", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def caught_by(core: str, fault: Fault, folder: Path) -> str:
    """The test that catches `fault`, or an empty string; SystemExit if no test could run."""
    copy = planted(core, fault, folder)
    try:
        nearest = [[f"tests/test_{fault.first}"]] if fault.first else []
        nearest += [NEAREST[fault.file]] if fault.file in NEAREST else []
        for tests in [*nearest, *ROUNDS]:
            done = test(copy, core, tests)
            if done.returncode:
                return failure(fault, done)
    except subprocess.TimeoutExpired:
        return HANGS
    finally:
        shutil.rmtree(copy)
    return ""


def test(copy: Path, core: str, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in `copy`, up to the first that fails, with one core."""
    return run(copy, *PYTEST, *tests, DLOOP_TEST_CORES=core, DLOOP_BACKEND=core)


def check_without_fault(core: str, tests: set[str], folder: Path) -> None:
    """Exit unless the tests that have caught a fault pass where there is none."""
    done = test(planted(core, Fault("no fault", "", ""), folder), core, sorted(tests))
    if done.returncode:
        raise SystemExit(f"{core}: fails without a fault\n{done.stdout[-3000:]}")


def failure(fault: Fault, done: subprocess.CompletedProcess[str]) -> str:
    """The first test that failed; SystemExit where pytest itself could not run."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode > 1 and not lines and "Fatal Python error" not in done.stderr:
        raise SystemExit(
            f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}"
        )
    return lines[0].partition(" - ")[0] if lines else CRASHES


def selected(core: str | None, words: list[str]) -> Iterator[tuple[str, Fault]]:
    """The selected faults, each with a core to plant it in."""
    for fault in FAULTS:
        for each in fault.cores:
            if core in (None, each) and (not words or any(word in fault.name for word in words)):
                yield each, fault


def main() -> None:
    """Try the selected faults, as many at a time as there are processors."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--core", choices=FILES)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    faults = list(selected(arguments.core, arguments.words))
    for each in faults:
        text_with(*each)  # an outdated pattern fails before any tests run
    began = time.monotonic()
    not_caught = []
    catching: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        tried = [pool.submit(caught_by, *each, Path(folder)) for each in faults]
        for (core, fault), attempt in zip(faults, tried):
            caught = attempt.result()
            print(f"{core:7} {fault.name:56} {caught or 'NOT CAUGHT'}", flush=True)
            not_caught += [] if caught else [f"{core}: {fault.name}"]
            if caught not in ("", HANGS, CRASHES):
                catching.setdefault(core, set()).add(caught.partition(" ")[2])
        for core, tests in catching.items():
            check_without_fault(core, tests, Path(folder))
    seconds = time.monotonic() - began
    print(f"{len(faults)} faults, {len(not_caught)} not caught, {seconds:.0f} s")
    if not_caught or not faults:
        raise SystemExit("\n".join(not_caught) or "no such fault")


if __name__ == "__main__":
    main()
