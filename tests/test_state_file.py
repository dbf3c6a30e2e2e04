"""state_file and save_state(): round trips, damaged files, failed saves, killed processes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cores import CORES, use_core
from dloop import Event, Loop, LoopError, LoopEvents, StateError
from programs import needs_posix, program

EVENTS = {
    "Log": Event(every_n_steps=3),
    ("timed", 1): Event(every_n_seconds=2) | LoopEvents.EPOCH_END,
    "Once": Event(at_time=(1, 4)),
}


def make(path: Any = None, loader: Any = None, **arguments: Any) -> Loop[Any]:
    """A loop whose clock advances a second with every reading."""
    ticks = itertools.count()
    limit = arguments or {"max_epochs": 3}
    return Loop(
        [0, 1, 2, 3] if loader is None else loader,
        EVENTS,
        clock=lambda: next(ticks),
        state_file=path,
        **limit,
    )


def save_after(path: Path, steps: int) -> Loop[Any]:
    loop = make(path)
    for _ in itertools.islice(loop, steps):
        pass
    loop.save_state()
    return loop


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that was saved after six steps."""
    path = tmp_path / "state.json"
    save_after(path, 6)
    return path


def assert_refused(path: Path) -> None:
    """Loading the file raises an error that names it, and the file is not changed."""
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"state\.json") as caught:
        make(path)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, LoopError)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state.json"]


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", [str, Path])
def test_a_loop_with_an_existing_state_file_resumes_the_run(
    tmp_path: Path, kind: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    with caplog.at_level(logging.INFO, "dloop"):
        loop = make(kind(path))
        assert not path.exists()
        assert caplog.records == []
        for _ in itertools.islice(loop, 6):
            pass
        loop.save_state()
        again = make(kind(path))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for word in ("state.json", "1", "5"):  # the file, the epoch and the step
        assert word in record.getMessage()
    assert (again.epoch, again.global_step, again.epoch_step) == (1, 5, 1)
    assert again.stop_reason is None
    assert [batch for batch, _ in again] == [2, 3, 0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["state.json"]


def test_the_file_contains_the_state_as_json(file: Path) -> None:
    state = json.loads(file.read_text())
    assert state["version"] == 1
    loop = make()
    loop.load_state_dict(state)
    assert loop.global_step == 5


def test_a_step_saved_with_step_done_false_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    loop = make(path)
    for _ in itertools.islice(loop, 3):
        pass
    loop.save_state(step_done=False)
    assert next(iter(make(path)))[0] == 2


def test_a_resumed_run_that_was_finished_yields_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    save_after(path, 100)
    loop = make(path)
    assert loop.stop_reason == "max_epochs"
    assert len(loop) == 0
    assert list(loop) == list(loop) == []
    loop.restart()
    assert [batch for batch, _ in loop] == [0, 1, 2, 3] * 3


def test_restart_after_a_resume_begins_with_the_first_step(file: Path) -> None:
    loop = make(file)
    loop.restart()
    assert loop.global_step == -1
    assert len(list(loop)) == 12


def test_save_state_without_a_state_file_is_an_error() -> None:
    with pytest.raises(LoopError, match="state_file"):
        make().save_state()


@pytest.mark.parametrize("path", [5, 1.5, b"state.json", ["state.json"]])
def test_a_state_file_that_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match="state_file"):
        make(path)


def test_a_state_file_may_be_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loop = make("state.json")
    next(iter(loop))
    loop.save_state()
    assert os.listdir(tmp_path) == ["state.json"]
    assert make("state.json").global_step == 0


# ------------------------------------------------------------------------------------ damaged files


def test_a_file_that_is_truncated_at_any_byte_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole.rstrip())):
        file.write_bytes(whole[:length])
        assert_refused(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\x80\x04\x95pickle",
        b"PK\x03\x04 a checkpoint of PyTorch",
        b"\xff\xfe{\x00}\x00",
        b"null",
        b"[]",
        b"{}",
        b"17",
        b'"state"',
        b"NaN",
        b'{"version": "1"}',
        b'{"version": 1}',
        b'{"version": 0}',
        b'{"version": true}',
        b'{"version": null}',
        b'{"name": "another program", "version": 3}',
        b'{"epoch": 3, "model": {}}',
        b"[" * 100_000,
        b'{"version": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda content: content[:20].decode("latin1"),
)
def test_a_file_that_contains_something_else_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert_refused(file)


def test_a_file_of_a_later_version_is_refused_with_its_version(file: Path) -> None:
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "version": 2}))
    assert_refused(file)
    with pytest.raises(StateError, match="version 2"):
        make(file)


def test_a_folder_as_state_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        make(tmp_path)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a state, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items or (enumerate(value) if isinstance(value, list) else ()):
        yield from paths_in(inner, (*path, key))


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((-1, 0, 1, 2**62, 2**63, 2**64, -(2**63) - 1, 10**30)),
    st.sampled_from((0.5, -1.0, 1e300, float("nan"), float("inf"))),
    st.sampled_from(("", "Log", "max_epochs", "LoopEvents")),
    st.sampled_from(([], {}, [None], [[]], [1], {"a": 1}, [["str", "Log"], 1], [[], []])),
)
MISSING = object()


def with_change(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return None if value is MISSING else value
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


@pytest.mark.filterwarnings("ignore::dloop.LoopWarning")
@given(data=st.data())
def test_a_state_with_any_change_is_refused_or_can_be_run(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = make()
    for _ in itertools.islice(source, data.draw(st.integers(0, 12))):
        pass
    state = json.loads(json.dumps(source.state_dict()))
    where = data.draw(st.sampled_from(list(paths_in(state))))
    changed = with_change(state, where, data.draw(st.just(MISSING) | JSON_VALUES))

    path = tmp_path_factory.getbasetemp() / "state.json"
    path.write_text(json.dumps(changed))
    before = path.read_bytes()
    try:
        loop = make(path)
    except StateError as error:
        assert "state.json" in str(error)
        fresh = make()
        with pytest.raises(StateError):
            fresh.load_state_dict(changed)
        assert len(list(fresh)) == 12  # the refused state has not changed the loop
    else:
        for _batch, _events in itertools.islice(loop, 20):
            loop.state_dict()
            for name in (*EVENTS, *LoopEvents):
                assert loop.steps_since(name) >= 0
    assert path.read_bytes() == before


# ------------------------------------------------------------ concurrent, interrupted, failed saves


@needs_posix
def test_saving_to_a_symbolic_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "store" / "state.json")
    save_after(link, 3)
    assert link.is_symlink()
    assert os.listdir(tmp_path / "store") == ["state.json"]
    assert make(link).global_step == 2


def test_a_signal_handler_may_save_while_a_save_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    steps = iter((2, 1, 0))
    sync = os.fsync

    def interrupted(descriptor: int) -> None:
        later = next(steps)
        if later:
            save_after(path, 5 * later)
            assert make(path).global_step == 5 * later - 1
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    monkeypatch.setattr("dloop.state._sync_folder", lambda folder: None)
    save_after(path, 12)
    assert make(path).global_step == 11
    assert os.listdir(tmp_path) == ["state.json"]


@needs_posix
def test_a_writer_that_has_waited_for_the_lock_uses_a_new_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path = tmp_path / "state.json"
    lock = fcntl.flock
    waits = iter((True, False))

    def wait(descriptor: int, operation: int) -> None:
        if next(waits):  # meanwhile the other writer moves its draft to the path
            (tmp_path / ".state.json.draft").replace(path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", wait)
    save_after(path, 5)
    assert next(waits, None) is None
    assert make(path).global_step == 4
    assert os.listdir(tmp_path) == ["state.json"]


@needs_posix
def test_processes_that_save_to_one_file_leave_a_complete_file(core: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    code = f"""
        loop = Loop(range(150), {{"e" * 9 + str(n): Event(at_step=n) for n in range(300)}},
                    max_epochs=1, state_file=None)
        loop._state_file = {str(path)!r}
        for _ in loop:
            loop.save_state()
        say(loop.global_step)
    """
    writers = [program(core, code) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(json.loads(path.read_text())["steps"])
    said = [writer.communicate() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert [output for output, _errors in said] == ["149\n"] * 2
    assert len(seen) > 10
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("name", ["state", "run", "dloop"])
def test_an_error_begins_with_the_files_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ("{}", "[]", "no"):
        Path(name).write_text(content)
        with pytest.raises(StateError, match=f"^{name}: this"):
            make(name)


def test_a_deeply_nested_event_name_is_refused(file: Path) -> None:
    state = json.loads(file.read_text())
    depth = 5000
    deep = '["tuple",[' * depth + '["str","x"]' + "]]" * depth
    state["windows"] = "HERE"
    file.write_text(json.dumps(state).replace('"HERE"', f"[[{deep}, 1]]"))
    with pytest.raises(StateError, match=r"state\.json"):
        make(file)


def test_a_loaders_state_from_after_the_saved_step_is_refused() -> None:
    state = make().state_dict()
    state["loader"] = {"state": {}, "at": 1, "whole": False, "rest": 0}
    with pytest.raises(StateError, match="damaged"):
        make().load_state_dict(state)


@needs_posix
def test_a_name_that_is_too_long_for_a_draft_is_refused_when_the_loop_is_created(
    tmp_path: Path,
) -> None:
    """The draft has a longer name than the file."""
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    refused = []
    for length in range(most - 12, most + 1):
        path = tmp_path / ("s" * (length - 5) + ".json")
        try:
            loop = make(path)
        except OSError as error:
            refused.append(length)
            assert "this name is too long" in str(error)
            assert path.name in str(error)
            assert "\n" not in str(error)
        else:
            next(iter(loop))
            loop.save_state()
            assert make(path).global_step == 0
    assert refused == list(range(refused[0], most + 1))
    assert len(refused) < 12


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    loop = make(tmp_path / "missing" / "state.json")
    next(iter(loop))
    with pytest.raises(FileNotFoundError):
        loop.save_state()
    assert os.listdir(tmp_path) == []


def test_a_file_as_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((NotADirectoryError, FileNotFoundError)):  # Windows has the latter
        loop = make(tmp_path / "file" / "state.json")
        next(iter(loop))
        loop.save_state()
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def not_as_root() -> Iterator[None]:
    """Run as the user "nobody" instead of root, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@needs_posix
def test_a_read_only_folder_is_an_os_error(file: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # a folder that "nobody" may enter
        folder, before = Path(name), file.read_bytes()
        (folder / file.name).write_bytes(before)
        folder.chmod(0o555)
        with not_as_root():
            loop = make(folder / file.name)
            next(iter(loop))
            with pytest.raises(PermissionError):
                loop.save_state()
        assert (folder / file.name).read_bytes() == before
        assert os.listdir(folder) == [file.name]
        folder.chmod(0o700)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    loop, before = make(file), file.read_bytes()
    next(iter(loop))

    def fail(*_arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)) as caught:
            loop.save_state()
    assert caught.value is error
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["state.json"]
    loop.save_state()
    assert make(file).global_step == 6


@needs_posix
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(file: Path) -> None:
    """A separate process, in which files may not grow beyond a few bytes, tries to save."""
    before = file.read_bytes()
    code = f"""
    import errno, resource, signal
    from test_state_file import make
    loop = make({str(file)!r})
    next(iter(loop))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for most in range(0, {len(before)}, 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            loop.save_state()
        except OSError as error:
            assert error.errno == errno.EFBIG
        else:
            raise AssertionError(most)
    """
    subprocess.run(**in_python(code), check=True, timeout=30)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["state.json"]


def in_python(code: str, *arguments: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-c", textwrap.dedent(code), *arguments],
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    }


def test_a_draft_of_a_killed_process_does_not_prevent_loading_and_saving(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make(file)
    next(iter(loop))
    left: list[str] = []

    def interrupt(source: Any, target: Any) -> None:
        left.append(os.fspath(source))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.save_state()
    Path(left[0]).write_bytes(b"half a state of a process that was killed" * 100)
    assert make(file).global_step == 5
    loop.save_state()
    assert os.listdir(file.parent) == ["state.json"]
    assert make(file).global_step == 6


# ------------------------------------------------------------------------------- the loader's state


class Stateful:
    """A loader with a state of its own."""

    def __init__(self, extra: Any) -> None:
        self.extra = extra
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "deep": {"er": [0, self.extra]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        assert state == self.state_dict()

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        while self.at < 5:
            self.at += 1
            yield self.at - 1
        self.at = 0


class Unknown:
    pass


@pytest.mark.parametrize(
    "value",
    [b"bytes", (1, 2), {1: 2}, {None: 1}, {True: 1}, {1, 2}, float("nan"), float("inf"), Unknown(),
     Event(at_step=1)],
    ids=repr,
)  # fmt: skip
def test_a_value_that_json_cannot_hold_is_named(tmp_path: Path, value: Any) -> None:
    loop = make(tmp_path / "state.json", Stateful(value))
    next(iter(loop))
    assert loop.state_dict()["loader"]  # which pickle, and so torch.save, can hold
    with pytest.raises(StateError) as caught:
        loop.save_state()
    for key in ("deep", "er", "1"):
        assert key in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value", [None, True, 1, 2**70, -0.1, 1e-300, "ä\0", "\ud800", [[]], {"": {}}], ids=repr
)
def test_a_value_that_json_can_hold_is_restored(tmp_path: Path, value: Any) -> None:
    loop = make(tmp_path / "state.json", Stateful(value))
    for _ in itertools.islice(loop, 2):
        pass
    loop.save_state()
    again = make(tmp_path / "state.json", Stateful(value))
    assert [batch for batch, _ in again] == [2, 3, 4] + [0, 1, 2, 3, 4] * 2


# -------------------------------------------------------------------------------- killed processes

KILLS, BETWEEN, EPOCHS = 300, 50, 2000


class Summing:
    """Its state has the sum of all batches, so that a repeated or missing batch is noticed."""

    def __init__(self) -> None:
        self.at = self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.total = state["at"], state["total"]

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[int]:
        self.at %= 50
        while self.at < 50:
            self.at += 1
            self.total += self.at
            yield self.at


def make_summing(path: str) -> Loop[int]:
    return Loop(Summing(), EVENTS, max_epochs=EPOCHS, state_file=path)


def train_and_save(path: str, marks: int, pause: int) -> None:
    """Write a mark before and after each call of a save; at mark number `pause`, wait."""
    fsync, replace, passed = os.fsync, os.replace, 0

    def mark(letter: bytes) -> None:
        nonlocal passed
        passed += 1
        os.write(marks, letter)
        if passed == pause:
            os.write(marks, b"!")
            signal.pause()

    def marked_fsync(fd: int) -> None:
        folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        mark(b"d" if folder else b"f")
        fsync(fd)
        mark(b"D" if folder else b"F")

    def marked_replace(source: Any, target: Any, **options: Any) -> None:
        mark(b"r")
        replace(source, target, **options)
        mark(b"R")

    os.fsync, os.replace = marked_fsync, marked_replace  # type: ignore[assignment]
    loop = make_summing(path)
    for _batch, _events in loop:
        loop.save_state()


def kill_one(path: str, generator: random.Random) -> bytes:
    """Fork a process that saves, kill it at a random time or mark, and return its marks."""
    ours, theirs = os.pipe()
    pause = generator.randint(1, 20) if generator.random() < 0.5 else 0
    child = os.fork()
    if child == 0:
        try:
            train_and_save(path, theirs, pause)
        finally:
            os._exit(1)
    os.close(theirs)
    marks = b""
    if pause:
        while not marks.endswith(b"!"):
            marks += os.read(ours, 100)
    else:
        time.sleep(generator.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    while more := os.read(ours, 1000):
        marks += more
    os.close(ours)
    return marks


def kill_many(path: str) -> None:
    """Kill many processes that save to one file; runs in a process of its own."""
    generator = random.Random(4)
    step, between, left = -1, 0, 0
    for number in range(KILLS):
        with use_core(CORES[number % len(CORES)]):
            marks = kill_one(path, generator)
        saves = marks.count(b"R")
        # at the mark `r`, only a process that waits there has certainly not renamed yet
        between += marks.endswith((b"f", b"F", b"f!", b"F!", b"r!"))
        names = os.listdir(os.path.dirname(path))
        left += len(names) - os.path.exists(path)
        assert len(names) <= 2, names
        with use_core(CORES[-1 - number % len(CORES)]):
            now = make_summing(path).global_step
        assert step + saves <= now <= step + saves + marks.endswith(b"r")
        step = now
    assert left >= between
    loop = make_summing(path)
    last = [0 for _ in loop]
    assert len(last) == 50 * EPOCHS - (step + 1)
    assert loop.stop_reason == "max_epochs"
    assert loop.state_dict()["epoch"] == EPOCHS - 1
    loader = loop.state_dict()["loader"]
    assert EPOCHS * sum(range(51)) in flat(loader)
    loop.save_state()
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    print(json.dumps({"between": between, "step": step}))


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for inner in value for leaf in flat(inner)] if isinstance(value, list) else [value]


@needs_posix
@pytest.mark.slow
@pytest.mark.no_core
def test_a_process_killed_at_any_time_leaves_the_state_of_its_last_save(tmp_path: Path) -> None:
    code = "import sys; from test_state_file import kill_many; kill_many(sys.argv[1])"
    process = subprocess.run(
        **in_python(code, str(tmp_path / "state.json")), capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    counted = json.loads(process.stdout)
    assert counted["between"] >= BETWEEN
    assert counted["step"] > KILLS
