"""One job of a grid: nothing it started outlives it, its cell is its own, and what went wrong is on record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from usf.study import jobs, schema

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="orphans are found through Linux's process control")


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition, and fail where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("USF_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mark that everything started in the test carries; what is left of it is killed at the end."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("USF_TEST_MARK", value)
    monkeypatch.delenv(jobs.CONTROLLER, raising=False)
    yield value
    # Not this process itself: its environment at its start has no mark.
    for process in marked(value):
        process.kill()


def job(*options: str, command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "usf.study.jobs", *options, "--", *command]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Children in sessions of their own, as a notebook's kernel is, that ignore polite requests.
FAMILY = """
import pathlib, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
if "kernel" in sys.argv:
    child += "import os, pathlib; from usf.study import jobs; jobs.die_with_parent(); "
    child += f"pathlib.Path({sys.argv[1]!r} + str(os.getpid())).touch(); "
child += "time.sleep(600)"
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


@LINUX
@pytest.mark.parametrize("victim", ["starter", "job", "command"])
def test_nothing_outlives_a_job_that_is_killed(victim: str, mark: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    # Where the job itself is killed, a child can only help itself, as the first cell of a notebook that trains does.
    kind = ["kernel"] if victim == "job" else []
    command = job("--failure", str(tmp_path / "failure.json"), command=[*python(FAMILY), str(ready), *kind])
    starter = subprocess.Popen(python(f"import subprocess; subprocess.run({command!r})"))
    try:
        until(ready.exists)
        until(lambda: len(marked(mark)) >= 5)
        if kind:  # the children must have asked for it
            until(lambda: len(list(tmp_path.glob("ready?*"))) == 2)
        (supervisor,) = psutil.Process(starter.pid).children()
        (child,) = supervisor.children()
        {"starter": starter, "job": supervisor, "command": child}[victim].kill()
        until(lambda: not [p for p in marked(mark) if p.pid != starter.pid])
    finally:
        starter.kill()
        starter.wait()
    # Being stopped is no failure of the command; being killed is.
    assert (tmp_path / "failure.json").exists() == (victim == "command")


@LINUX
def test_a_job_ends_with_the_engine_however_many_lie_between(mark: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    inner = job(command=[*python(FAMILY), str(ready)])
    engine = f"""
import os, subprocess
os.environ[{jobs.CONTROLLER!r}] = str(os.getpid())
subprocess.run(["sh", "-c", "true; " + {sys.executable!r} + " " + {str(tmp_path / "between.py")!r}])
"""
    (tmp_path / "between.py").write_text(f"import subprocess\nsubprocess.run({inner!r})\n")
    process = subprocess.Popen(python(engine))
    until(ready.exists)
    process.kill()
    process.wait()
    until(lambda: not marked(mark))


@LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_told_to_end_does(number: signal.Signals, mark: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen(job(command=[*python(FAMILY), str(ready)]))
    until(ready.exists)
    process.send_signal(number)
    assert process.wait(60) == 143
    assert not marked(mark)


def test_failure_is_written_and_goes_away(tmp_path: Path) -> None:
    failure = tmp_path / "cells" / "failure.json"
    flag = tmp_path / "flag"
    code = f"import os, sys; os.path.exists({str(flag)!r}) or sys.exit(str(1 / 0))"
    command = job("--failure", str(failure), command=python(code))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert json.loads(failure.read_text())["error"] == "exit status 1: ZeroDivisionError: division by zero"
    flag.touch()
    assert subprocess.run(command).returncode == 0
    assert not failure.exists()


def test_a_killed_command_is_a_failure_that_says_so(tmp_path: Path) -> None:
    failure = tmp_path / "failure.json"
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run(job("--failure", str(failure), command=python(code))).returncode == 137
    assert json.loads(failure.read_text())["error"].startswith("killed by SIGKILL")


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_what_is_held_is_held_until_the_holder_is_dead(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "cell.lock"
    code = f"""
import time
from pathlib import Path
from usf.study import jobs
with jobs.hold(Path({str(lock)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match="cell is held by another process"), jobs.hold(lock, wait=False):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with jobs.hold(lock, wait=False):
        assert lock.exists()


def test_each_job_sees_one_device_of_its_own(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
log = Path({str(tmp_path / "log")!r})
def say(word):
    with log.open("a") as file:
        file.write(word + " " + os.environ["CUDA_VISIBLE_DEVICES"] + "\\n")
say("begin")
time.sleep(0.5)
say("end")
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,GPU-1f"}
    environment.pop("SLURM_JOB_ID", None)
    command = job("--devices", str(tmp_path / "devices"), command=python(code))
    for process in [subprocess.Popen(command, env=environment) for _ in range(4)]:
        assert process.wait(60) == 0
    busy: set[str] = set()
    seen = []
    for line in (tmp_path / "log").read_text().splitlines():
        word, device = line.split()
        if word == "begin":
            assert device not in busy
            busy.add(device)
            seen.append(device)
        else:
            busy.remove(device)
    assert len(seen) == 4
    assert set(seen) == {"0", "GPU-1f"}


def test_slurm_has_chosen_the_device(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "3", "SLURM_JOB_ID": "1"}
    command = job(
        "--devices", str(tmp_path / "locks"), command=python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    )
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "3\n"
    assert not (tmp_path / "locks").exists()


@pytest.mark.parametrize(("value", "expected"), [("", []), ("-1", []), ("2", ["2"]), ("0, 1", ["0", "1"])])
def test_visible_devices(value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert jobs.visible_devices() == expected


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_an_interrupted_write_is_no_record(moment: str, tmp_path: Path) -> None:
    """Killed with the bytes written and the file not yet in its place."""
    code = f"""
import os, signal
from pathlib import Path
from usf.study import schema
{moment} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
schema.write_records([schema.example(seed=1)], Path({str(tmp_path)!r}))
"""
    schema.write_records([schema.example(seed=0)], tmp_path)
    assert subprocess.run(python(code)).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the half-written file is there, under a name that is none of a record"
    assert [record.seed for record in schema.read(tmp_path)] == [0]
    assert not (tmp_path / schema.file_name(schema.example(seed=1))).exists()
    schema.write_records([schema.example(seed=1)], tmp_path)
    assert [record.seed for record in schema.read(tmp_path)] == [0, 1]
