"""The grid of the benchmark is the paper's, and what is done of it is told from the records."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usf.study import grid, schema
from usf.study.grid import Training

ROOT = Path(__file__).resolve().parents[1]


def paper_columns() -> set[tuple[str, str, str, str]]:
    """(dataset, category, detector, base or usf) of every number in tables 2 to 5."""
    with (ROOT / "data" / "paper" / "tables.csv").open(newline="", encoding="utf8") as stream:
        rows = list(csv.DictReader(stream))
    return {
        (r["dataset"], r["category"], r["detector"], r["flow"])
        for r in rows
        if r["table"] in "2345" and r["category"] != "average"
    }


def flow(training: Training) -> str:
    return {"affine": "base", "additive-lu": "usf"}[training.variant.name]


def test_paper_grid_is_every_number_of_the_tables_three_times() -> None:
    trainings = grid.grid("paper").trainings
    assert len(trainings) == len(set(trainings)) == 486
    for seed in (0, 1, 2):
        assert {(t.dataset, t.category, t.detector, flow(t)) for t in trainings if t.seed == seed} == paper_columns()


@pytest.mark.parametrize("name", grid.GRIDS)
def test_no_training_twice_and_names_are_file_names(name: str) -> None:
    found = grid.grid(name)
    assert len({t.key for t in found.trainings}) == len(found.trainings)
    names = [cell.name for cell in found.cells]
    assert len(set(names)) == len(names)
    assert all("/" not in n and n == n.lower() for n in names)


def test_one_cell_of_a_grid() -> None:
    (cell,) = grid.grid("paper/visa-pcb1-cflow").cells
    assert (cell.dataset, cell.category, cell.detector) == ("visa", "pcb1", "cflow")


@pytest.mark.parametrize(
    ("name", "remedy"), [("papers", "choose one of paper"), ("paper/visa-bottle-cflow", "grid cells paper")]
)
def test_unknown_names_are_refused(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        grid.grid(name)


@pytest.mark.parametrize("text", ["", "affin", "affine affine", "additive+lu"])
def test_unknown_variants_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="variant"):
        grid.variants(text)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_seeds_in_every_spelling(seeds: list[int]) -> None:
    expected = tuple(seeds)
    assert grid.whole_numbers(seeds) == expected
    assert grid.whole_numbers(" ".join(map(str, seeds))) == expected
    assert grid.whole_numbers(", ".join(map(str, seeds))) == expected
    assert grid.whole_numbers(f"0-{seeds[0]}") == tuple(range(seeds[0] + 1))


@pytest.mark.parametrize("text", ["", "one", "-1", "1.5", "0 0", "3-1"])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seed"):
        grid.whole_numbers(text)


def test_engine_can_read_the_grid_without_torch() -> None:
    """The engine's environment has neither torch nor numpy of ours."""
    code = "import sys, usf.study.grid, usf.study.jobs; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "scipy", "anomalib", "pandas"} & set(loaded)


# --- what is done -----------------------------------------------------------------------------------------------------


def record_of(training: Training, **changes: object) -> schema.Record:
    dataset, category, detector, coupling, mixing, seed = training.key
    return schema.example(
        dataset=dataset, category=category, detector=detector, coupling=coupling, mixing=mixing, seed=seed, **changes
    )


def test_every_training_is_done_failed_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = grid.grid("textures")
    done, diverged = found.cells[0].trainings[:2]
    schema.write_records([record_of(done, score=score) for score in ("norm", "log_prob")], tmp_path / "records")
    schema.write_records([record_of(diverged, status="failed", error="the loss is nan")], tmp_path / "records")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / f"{found.cells[1].name}.json").write_text(json.dumps({"error": "killed by SIGKILL"}))

    rows = {row.training: row for row in grid.status(found, tmp_path)}
    assert list(rows) == list(found.trainings)
    assert rows[done].status == "ok"
    assert (rows[diverged].status, rows[diverged].error) == ("failed", "the loss is nan")
    assert all(rows[t].status == "failed" and "SIGKILL" in rows[t].error for t in found.cells[1].trainings)
    assert all(rows[t].status == "missing" for t in found.cells[2].trainings)

    assert grid.main(["status", "textures", "--folder", str(tmp_path)]) == 1
    assert "1 ok, 5 failed, 6 missing" in capsys.readouterr().out
    with (tmp_path / "status.csv").open(newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert [row["status"] for row in listed] == [rows[t].status for t in found.trainings]
    assert len(schema.read(tmp_path / "records.csv")) == 3


def test_one_failed_score_makes_a_training_failed(tmp_path: Path) -> None:
    training = grid.grid("textures").trainings[0]
    good, bad = record_of(training, score="norm"), record_of(training, score="log_prob", status="failed", error="nan")
    schema.write_records([good, bad], tmp_path / "records")
    assert grid.status(grid.grid("textures"), tmp_path)[0].status == "failed"


def test_a_grid_that_is_done_is_a_success(tmp_path: Path) -> None:
    for training in grid.grid("textures").trainings:
        schema.write_records([record_of(training)], tmp_path / "records")
    assert grid.main(["status", "textures", "--folder", str(tmp_path)]) == 0
