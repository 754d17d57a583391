"""The engine of the benchmark: it plans exactly the grid, and a kill at any moment costs only what was running."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from usf.study import grid, jobs, schema

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = ROOT / ".venv-workflow" / "bin" / "snakemake"

pytestmark = pytest.mark.skipif(
    not SNAKEMAKE.exists() or sys.platform != "linux",
    reason="the engine's environment is made by `make workflow` (`make test` does); orphans are found on Linux",
)

# A cell that trains nothing: it keeps what book/runs/cell.md keeps (its lock, one record for each training, none of
# them twice), and writes down when what was begun and ended.
PARAMETERS = 'dataset = category = detector = variants = seeds = profile = folder = root = ""'
CELL = """
import os
import time
from pathlib import Path

from usf.study import grid, jobs, schema

jobs.die_with_parent()
where = Path(folder)
cell = grid.Cell(dataset, category, detector, grid.variants(variants), grid.whole_numbers(seeds))


def say(*words):
    with (where / "log").open("a") as file:
        file.write(" ".join(map(str, words)) + "\\n")


with jobs.hold(where / "locks" / f"{cell.name}.lock"):
    say("cell", cell.name, os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"])
    if os.environ.get("USF_TEST_FAIL") == detector:
        raise ValueError("no images of this class")
    done = 0
    for training in cell.trainings:
        dataset, category, detector, coupling, mixing, seed = training.key
        record = schema.example(
            dataset=dataset, category=category, detector=detector, coupling=coupling, mixing=mixing, seed=seed,
            loss="anomalib",
        )
        if (where / "records" / schema.file_name(record)).exists():
            continue
        name = schema.file_name(record)
        say("begin", name, os.getpid())
        # So long that a training that should have been killed is seen.
        time.sleep(600 if done and os.environ.get("USF_TEST_HANG") else 0.3)
        schema.write_records([record], where / "records")
        say("end", name, os.getpid())
        done += 1
"""


class Engine:
    """The engine on the stand-in cell, in a folder of its own."""

    def __init__(self, folder: Path, profile: str = "local") -> None:
        self.folder, self.profile = folder, profile
        self.mark = uuid.uuid4().hex
        self.notebook = folder / "cell.ipynb"
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(CELL)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.notebook)

    def command(self, *more: str, config: str = "") -> list[str]:
        """As `make benchmark` starts it, except for where it writes and what a cell is."""
        settings = [f"folder={self.folder}", f"notebook={self.notebook}", "profile=smoke"]
        settings += [f"engine={self.profile}", *config.split()]
        return [
            sys.executable, "-m", "usf.study.jobs", "--", str(SNAKEMAKE), "--snakefile", "workflow/Snakefile",
            "--workflow-profile", f"workflow/profiles/{self.profile}", "--directory", str(self.folder),
            *(["--cores", "2"] if self.profile == "local" else []),
            "--config", *settings, *([*more] if more else []),
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        outer = [jobs.CONTROLLER, *(name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF")]
        kept = {name: value for name, value in os.environ.items() if name not in outer}
        return kept | {"USF_TEST_MARK": self.mark, "CUDA_VISIBLE_DEVICES": ""}

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(),
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *more: str, config: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*more, config=config),
            cwd=ROOT, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def alive(self) -> list[psutil.Process]:
        """Everything that was started and still runs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("USF_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kernels(self) -> list[psutil.Process]:
        found = []
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                if any("ipykernel" in part for part in process.cmdline()):
                    found.append(process)
        return found

    def log(self) -> list[list[str]]:
        path = self.folder / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, word: str, count: int) -> None:
        """Wait until the log has so many lines that begin with a word."""
        end = time.monotonic() + 150
        while Counter(line[0] for line in self.log())[word] < count:
            assert time.monotonic() < end, f"waited in vain for {count} times {word!r}: {self.log()}"
            time.sleep(0.02)

    def records(self) -> set[str]:
        """Names of the trainings that have a record; reading them checks each."""
        if not (self.folder / "records").is_dir():
            return set()
        return {schema.file_name(record) for record in schema.read(self.folder / "records")}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path)
    yield found
    for process in found.alive():
        process.kill()


class Reader(threading.Thread):
    """Reads all records again and again while cells write them; a record that was seen never goes away."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self.engine, self.reads, self.fault = engine, 0, ""
        self.stopped = threading.Event()

    def run(self) -> None:
        seen: set[str] = set()
        while not self.stopped.is_set():
            try:
                now = self.engine.records()
            except Exception as error:
                self.fault = repr(error)
                return
            if not seen <= now:
                self.fault = f"{seen - now} disappeared"
                return
            seen, self.reads = now, self.reads + 1


def check_log(engine: Engine, trainings: int) -> list[list[str]]:
    """Nothing lost: every training has its record. Nothing twice: what had its record was never begun again."""
    assert len(engine.records()) == trainings
    log = engine.log()
    ends = Counter(line[1] for line in log if line[0] == "end")
    # Killed between the record and the word about it, a training has the one and not the other.
    assert set(ends) <= engine.records()
    assert set(ends.values()) == {1}
    finished: set[str] = set()
    cells: dict[str, str] = {}
    for word, name, pid, *_ in log:
        if word == "cell":
            cells[name] = pid
        elif word == "begin":
            assert name not in finished, f"{name} was trained again"
            cell = next(cell for cell in cells if name.startswith(cell))
            assert cells[cell] == pid, f"{cell} was trained by two processes at a time"
        else:
            finished.add(name)
    return log


def test_kill_and_resume(engine: Engine) -> None:
    """kill -9 of whatever runs, three times: nothing is lost, nothing is run twice, nobody is left behind."""
    trainings = len(grid.grid("textures").trainings)
    reader = Reader(engine)
    reader.start()
    done: list[set[str]] = []
    for victim in ("make's child", "the engine"):
        before = Counter(line[0] for line in engine.log())
        process = engine.start(USF_TEST_HANG="1")
        # Two cells at a time: each has ended a training and begun another.
        engine.until("end", before["end"] + 2)
        engine.until("begin", before["begin"] + 4)
        kernels = engine.kernels()
        assert len(kernels) == 2
        if victim == "the engine":
            (child,) = psutil.Process(process.pid).children()
            child.kill()
        else:
            process.kill()
        output = process.communicate(timeout=60)[0].decode()
        _, left = psutil.wait_procs(kernels, timeout=20)
        assert not left, f"{victim} was killed and {left} trains on; {output}"
        end = time.monotonic() + 20
        while engine.alive():
            assert time.monotonic() < end, f"{victim} was killed and left {engine.alive()}"
            time.sleep(0.05)
        done.append(engine.records())
        assert 0 < len(done[-1]) < trainings

    # A kernel that dies (out of memory, say) is tried again by the engine itself, and the others never notice.
    process = engine.start()
    engine.until("end", Counter(line[0] for line in engine.log())["end"] + 1)
    engine.kernels()[0].kill()
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    assert f"{trainings} trainings in 3 cells: {trainings} ok" in output
    reader.stopped.set()
    reader.join(5)
    assert not reader.fault
    assert reader.reads > 10
    assert not engine.alive()

    log = check_log(engine, trainings)
    for before in done:
        assert before <= engine.records()

    # And again: nothing to do.
    again = engine.run()
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout
    assert engine.log() == log


def test_a_failed_cell_stops_no_other_and_stays_visible(engine: Engine) -> None:
    failed = engine.run(USF_TEST_FAIL="uflow")
    assert failed.returncode != 0
    with (engine.folder / "status.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["detector"], row["status"]) for row in rows} == {
        ("fastflow", "ok"), ("cflow", "ok"), ("uflow", "failed"),
    }  # fmt: skip
    assert all("ValueError: no images of this class" in row["error"] for row in rows if row["status"] == "failed")
    assert "8 ok, 4 failed" in failed.stdout
    attempts = Counter(line[1] for line in engine.log() if line[0] == "cell")
    assert attempts == {"textures-weave-uflow": 2, "textures-weave-fastflow": 1, "textures-weave-cflow": 1}
    # The notebook shows how far it came.
    assert "no images of this class" in (engine.folder / "notebooks" / "textures-weave-uflow.ipynb").read_text()
    # The next run tries it again, and nothing else.
    plan = engine.run("--dry-run")
    assert re.findall(r"^Job \d+: (\S+):", plan.stdout, re.M) == ["textures-weave-uflow"]


@pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="needs SLURM: see workflow/slurm-one-node.sh")
def test_kill_and_resume_on_slurm(tmp_path: Path) -> None:
    """Jobs on a cluster outlive the engine. The next one waits for them and does what they left, and each has a GPU."""
    engine = Engine(tmp_path, "slurm-one-node")
    trainings = len(grid.grid("textures").trainings)
    process = engine.start()
    engine.until("end", 2)
    process.kill()
    process.communicate()
    time.sleep(1)
    assert engine.kernels(), "the cluster goes on"
    done = engine.run()
    assert done.returncode == 0, done.stdout
    assert f"{trainings} ok" in done.stdout
    log = check_log(engine, trainings)
    devices = [line[3] for line in log if line[0] == "cell"]
    assert set(devices) <= {"0", "1"}, "one device for each job, chosen by SLURM"
    assert len(set(devices)) == 2, "two jobs side by side have different ones"
    assert not engine.kernels()


@pytest.mark.parametrize(("profile", "name"), [("full", "paper"), ("book", "shared")])
def test_dry_run_lists_exactly_the_cells(profile: str, name: str, engine: Engine) -> None:
    plan = engine.run("--dry-run", config=f"profile={profile}")
    assert plan.returncode == 0, plan.stdout
    listed = re.findall(r"^Job \d+: (\S+): (\d+) trainings: ([^;]+); seeds ([\d ]+); \d GPU$", plan.stdout, re.M)
    found = grid.grid(name)
    assert sorted(listed) == sorted(
        (
            cell.name,
            str(len(cell.trainings)),
            " ".join(variant.name for variant in cell.variants),
            " ".join(map(str, cell.seeds)),
        )
        for cell in found.cells
    )
    assert sum(int(count) for _, count, _, _ in listed) == len(found.trainings)
    assert f"{len(found.trainings)} trainings in {len(found.cells)} cells" in plan.stdout
    assert not (engine.folder / "log").exists()


def test_a_job_on_a_cluster_asks_for_one_gpu(engine: Engine) -> None:
    """Also where the machine that sends it has none, as here, and whatever else is said about resources."""
    engine.profile = "slurm"
    plan = engine.run("--dry-run", "--set-resources", "cell:slurm_partition=gpu")
    assert plan.stdout.count("; 1 GPU\n") == 3, plan.stdout
    engine.profile = "local"
    assert engine.run("--dry-run").stdout.count("; 0 GPU\n") == 3


def test_engine_refuses_what_is_not_in_the_grid(engine: Engine) -> None:
    plan = engine.run("--dry-run", config="grid=papers")
    assert plan.returncode != 0
    assert "unknown grid 'papers'" in plan.stdout


# --- the files of the engine ------------------------------------------------------------------------------------------


def test_lock_of_the_engine_has_hashes_and_no_addresses() -> None:
    text = (ROOT / "workflow" / "requirements.lock").read_text()
    assert "://" not in text
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    assert {"snakemake", "snakemake-executor-plugin-slurm"} <= {entry.split("==")[0] for entry in entries}


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_profiles_keep_going_and_resume(name: str) -> None:
    profile = yaml.safe_load((ROOT / "workflow" / "profiles" / name / "config.yaml").read_text())
    assert profile["executor"] == name
    assert profile["keep-going"]
    assert profile["rerun-incomplete"]
    assert profile["retries"] >= 1
