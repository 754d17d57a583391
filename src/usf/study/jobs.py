"""One job of a grid: it dies with whoever started it, it leaves nothing running, and it leaves word when it fails.

::

    python -m usf.study.jobs --failure FILE -- COMMAND...

runs a command so that

* when an ancestor is gone (an engine that was killed with ``kill -9`` cannot say goodbye to anyone), or this process is
  told to end, the command and all that it started end too, processes in sessions of their own included, as notebook
  kernels are;
* when the command fails, ``FILE`` says why, and it is gone again once the command succeeds. A command that was stopped
  from outside did not fail;
* with ``--devices FOLDER`` it sees one GPU, which no other job of this machine has.

What trains takes :func:`hold` on its cell, so that the same cell is never trained twice at the same time, whoever
starts it: the kernel of the operating system drops the lock with the process, there is nothing to clean up.

Everything about parents and orphans is Linux's; on other systems jobs are stopped as far as their process group goes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil

from usf.study.records import write_json

__all__ = ["die_with_parent", "hold", "run", "visible_devices"]

CONTROLLER = "USF_CONTROLLER"
"""Environment variable with the process id of the engine: the eldest ancestor that a job depends on."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE = 5.0
"""Seconds between asking a command to end and ending it."""
TICK = 0.1


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def die_with_parent() -> None:
    """From now on this process is killed when its parent is gone. For the first cell of a notebook that trains.

    A kernel looks for its parent only once a second, and not while an extension holds the interpreter.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only process that holds ``path``, a file that is made where there is none and stays.

    Args:
        path: on a file system that knows ``flock``, as every local one and NFS since version 4.
        wait: for whoever holds it; says so once.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise BlockingIOError(f"{path.stem} is held by another process") from None
            print(f"{path.stem} is being run by another process: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def visible_devices() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; found without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    return re.findall(r"^GPU (\d+):", listing, re.MULTILINE)


class _Stopped(Exception):
    """The job was ended from outside."""


class _Watch:
    """Whether the ancestors that matter are alive, and nobody asked this process to end."""

    def __init__(self, controller: int | None) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._told)
        chain = [os.getpid(), *(parent.pid for parent in psutil.Process().parents())]
        last = chain.index(controller) if controller in chain else min(1, len(chain) - 1)
        # Child -> parent. A process that dies is no longer the parent of its children, even while it is a zombie.
        self.parents = dict(itertools.pairwise(chain[: last + 1]))

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def check(self) -> None:
        if self.signal is not None:
            raise _Stopped(f"told to end by {signal.Signals(self.signal).name}")
        for child, parent in self.parents.items():
            try:
                found = psutil.Process(child).ppid()
            except psutil.NoSuchProcess:
                found = None
            if found != parent:
                raise _Stopped("whoever started it is gone")


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a command and all its descendants, with a word before where there is time for it."""
    if grace and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    # Orphans of the command are children of this process by now (see `run`), and new ones appear while others die.
    while left := psutil.Process().children(recursive=True):
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=1)


def _claim(folder: Path, devices: Sequence[str], watch: _Watch, stack: contextlib.ExitStack) -> str:
    """A device that no other job of this machine has; waits for one."""
    while True:
        for device in devices:
            lock = folder / f"device-{socket.gethostname()}-{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
            with contextlib.suppress(BlockingIOError):
                stack.enter_context(hold(lock, wait=False))
                return device
        watch.check()
        time.sleep(TICK)


def _why(code: int, tail: Sequence[str]) -> str:
    """One line on a command that failed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in tail]
    # The exception of a traceback rather than whatever was printed after it.
    errors = [line for line in plain if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    last = (errors or [line for line in plain if line] or ["no message"])[-1]
    return f"exit status {code}: {last}"[:300]


def run(
    command: Sequence[str], *, failure: Path | None = None, devices: Path | None = None, controller: int | None = None
) -> int:
    """Run a command as the module's description says; returns its exit status, 143 where it was stopped from outside.

    Args:
        command: program and arguments. Its errors are passed on; their last lines are what ``failure`` quotes.
        failure: JSON file that says why the command failed.
        devices: folder of the locks that share out this machine's GPUs; ``None``, or inside of a SLURM job (SLURM has
            chosen the device by then), leaves them as they are.
        controller: process id of the ancestor whose death ends the job, as that of anyone between; by default the
            parent.
    """
    watch = _Watch(controller)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    environment = dict(os.environ)
    tail: collections.deque[str] = collections.deque(maxlen=200)
    with contextlib.ExitStack() as stack:
        try:
            names = visible_devices() if devices and "SLURM_JOB_ID" not in environment else []
            if devices and names:
                environment["CUDA_VISIBLE_DEVICES"] = _claim(devices, names, watch, stack)
            watch.check()
        except _Stopped as reason:
            print(f"stopped before it began: {reason}", file=sys.stderr)
            return 143
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # Only async-signal-safe work between fork and exec: one system call.
            preexec_fn=die_with_parent,
        )
        stderr = process.stderr
        assert stderr is not None

        def copy() -> None:
            for line in stderr:
                tail.append(line.decode("utf8", "replace"))
                sys.stderr.write(tail[-1])
                sys.stderr.flush()

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                watch.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TICK)
        except _Stopped as reason:
            _end(process, GRACE if watch.signal is not None else 0)
            print(f"stopped: {reason}", file=sys.stderr)
            return 143
        code = process.wait()
        _end(process, 0)
        reader.join(timeout=1)
    if failure is not None and code == 0:
        failure.unlink(missing_ok=True)
    elif failure is not None:
        ended = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        write_json(failure, {"error": _why(code, tail), "ended": ended, "host": socket.gethostname()})
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m usf.study.jobs", description="Run one job of a grid.")
    parser.add_argument("--failure", type=Path, help="JSON file that says why the command failed")
    parser.add_argument("--devices", type=Path, help="folder of locks that give each job one GPU of this machine")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args(arguments)
    controller = os.environ.get(CONTROLLER)
    return run(
        given.command,
        failure=given.failure,
        devices=given.devices,
        controller=int(controller) if controller else None,
    )


if __name__ == "__main__":
    raise SystemExit(main())
