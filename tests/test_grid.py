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
        dataset=dataset, category=category, detector=detector, coupling=coupling, mixing=mixing, seed=seed,
        **{"loss": "anomalib", **changes},
    )  # fmt: skip


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


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "mle"},
        {"train_layer_norm": False},
        {"match_parameters": True},
        {"diagonal": "learned"},
        {"global_scale": False},
        {"protocol": "paper"},
        {"protocol": "trace", "epoch": 1},
    ],
    ids=str,
)
def test_a_training_of_another_study_is_not_the_grids(changes: dict[str, object], tmp_path: Path) -> None:
    found = grid.grid("textures")
    training = found.trainings[0]
    schema.write_records([record_of(training, **changes)], tmp_path / "records")
    assert grid.status(found, tmp_path)[0].status == "missing"
    lost = record_of(training, **changes, status="failed", error="nan", settings="0" * 12)
    schema.write_records([lost], tmp_path / "records")
    schema.write_records([record_of(training)], tmp_path / "records")
    assert grid.status(found, tmp_path)[0].status == "ok", "nor does its failure count"


def test_a_short_training_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = grid.grid("textures/textures-weave-fastflow")
    for training in found.trainings:
        schema.write_records([record_of(training, epochs=6)], tmp_path / "records")
    short = found.trainings[0]
    schema.write_records([record_of(short, epochs=2, status="failed", error="nan")], tmp_path / "records")
    assert {(row.status, row.epochs) for row in grid.status(found, tmp_path)} == {("ok", 6)}, "the longest run speaks"
    assert grid.main(["status", "textures/textures-weave-fastflow", "--folder", str(tmp_path)]) == 0
    assert "unlike" not in capsys.readouterr().out

    (tmp_path / "records" / schema.file_name(record_of(short, epochs=6))).unlink()
    assert grid.main(["status", "textures/textures-weave-fastflow", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "unlike each other: textures-weave-fastflow: 1 of 2 epochs at 256 pixels" in said
    assert "3 of 6 epochs" in said
    with (tmp_path / "status.csv").open(newline="") as stream:
        assert [row["epochs"] for row in csv.DictReader(stream)] == ["2", "6", "6", "6"]


def test_merge_adds_to_what_is_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = grid.grid("textures").trainings[:2]
    into = tmp_path / "committed" / "records.csv"
    schema.write_records([record_of(first)], tmp_path / "a", settings={})
    assert grid.main(["merge", str(tmp_path / "a"), "--into", str(into)]) == 0
    schema.write_records([record_of(second)], tmp_path / "b", settings={})
    assert grid.main(["merge", str(tmp_path / "b"), "--into", str(into)]) == 0
    assert "1 trainings merged; 2 trainings in" in capsys.readouterr().out
    assert len(schema.read(into)) == 2
    assert schema.read_settings(into) == {record_of(first).settings: {}}
    before = into.read_bytes()
    assert grid.main(["merge", str(tmp_path / "b"), "--into", str(into)]) == 0
    assert into.read_bytes() == before

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(SystemExit) as stopped:
            grid.main(["merge", str(folder), "--into", str(into)])
        assert stopped.value.code == 2
        assert "no records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"epochs": "six"}, "epochs='six'"),
        ({"epochs": 0}, "epochs=0"),
        ({"size": "-128"}, "size='-128'"),
        ({"size": 1.5}, "size=1.5"),
        ({"trace": "1 1"}, "trace='1 1'"),
        ({"trace": "first"}, "trace='first'"),
    ],
    ids=str,
)
def test_parameters_that_are_no_numbers_are_named(parameters: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grid.given(**parameters)


def test_parameters_as_papermill_hands_them_over() -> None:
    assert grid.given(epochs="", trace="", size="", loss="", stopping="") == {}
    assert grid.given(epochs="6", size=128, trace=3) == {"epochs": 6, "size": 128, "trace": (3,)}
    assert grid.given(trace="1 3-5", loss="mle") == {"trace": (1, 3, 4, 5), "loss": "mle"}
