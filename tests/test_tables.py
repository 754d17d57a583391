"""Records of the benchmark: the schema, files that are whole, and tables beside the paper's."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usf.study import paper, schema, status, tables
from usf.study.records import settings_hash
from usf.study.schema import Record, RecordError, example

REQUIRED = (
    "dataset category detector coupling mixing loss score protocol seed status image_auroc pixel_auroc seconds hardware"
).split()


def _csv_with(path: Path, **cells: str) -> Path:
    """A file of one good and one changed row, written by hand."""
    good = schema.merge(schema.write_records([example()], path.parent / "one").parent, path.parent / "good.csv")
    with good.open(newline="") as stream:
        row = next(csv.DictReader(stream))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in row if cells.get(name) != "DROP"], extrasaction="ignore")
        writer.writeheader()
        writer.writerow(row)
        writer.writerow(row | {"seed": "1"} | cells)
    return path


# --- The schema -------------------------------------------------------------------------------------------------------


def test_schema_has_the_columns_that_were_asked_for() -> None:
    assert set(REQUIRED) <= set(schema.COLUMNS)
    assert len(set(schema.COLUMNS)) == len(schema.COLUMNS)
    documented = Record.__doc__ or ""
    assert [name for name in schema.COLUMNS if name not in documented] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": "spline"}, r"column coupling: 'spline', expected one of 'affine', 'additive', 'gin'"),
        ({"image_auroc": 98.7}, r"column image_auroc: 98.7, expected a fraction in \[0, 1\], not percent"),
        ({"image_auroc": float("nan")}, "expected a finite number"),
        ({"seed": "0"}, "column seed: '0', expected a whole number"),
        ({"seed": True}, "expected a whole number"),
        ({"global_scale": "yes"}, "column global_scale: 'yes', expected true or false"),
        ({"epoch": 3}, "column epoch: 3, expected at most the 2 epochs that were run"),
        ({"epochs_run": 9}, "column epochs_run: 9, expected at most epochs"),
        ({"settings": "abc"}, "settings_hash"),
        ({"category": "../bottle"}, "without spaces or slashes"),
        ({"weights": "/home/me/w.pt"}, "without a path"),
        ({"weights_sha256": "xyz"}, "hexadecimal"),
        ({"initial_sha256": ""}, "only a failed run goes without"),
        ({"started": "yesterday"}, "UTC"),
        ({"seconds": -1.0}, "at least 0"),
        ({"hardware": None}, "may not be empty"),
        ({"error": "odd"}, "status failed"),
        ({"image_auroc": None}, "only a failed run goes without"),
        ({"protocol": "trace", "epoch": None, "status": "failed"}, "protocol trace"),
        ({"status": "failed", "error": " "}, "a failed run says why"),
        ({"status": "failed", "image_auroc": 0.5}, "a failed run has no metrics"),
        ({"status": "failed", "error": "two\nlines"}, "one line"),
        ({"test_anomalous": 9}, "at most test_images"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        example(**changes)


def test_digests_are_shortened_and_floats_rounded_at_once() -> None:
    record = example(weights_sha256="AB" * 32, seconds=1.23456789)
    assert record.weights_sha256 == "ab" * 8
    assert record.seconds == 1.23457


def test_key_knows_the_epoch_of_a_trace_alone() -> None:
    assert example(epoch=1).key == example(epoch=2).key
    assert example(epoch=1, protocol="trace").key != example(epoch=2, protocol="trace").key
    assert example(score="anomalib").key != example().key
    assert example(score="anomalib").training == example().training
    assert example(seed=1).training != example().training


def test_variants_are_the_papers_flows_or_none() -> None:
    assert (example().variant, example().flow) == ("additive + LU", "usf")
    affine = example(coupling="affine", mixing="permutation")
    assert (affine.variant, affine.flow) == ("affine", "base")
    for other in ({"coupling": "gin"}, {"mixing": "permutation"}, {"diagonal": "learned"}, {"global_scale": False}):
        assert example(**other).flow is None
    names = {
        example(coupling=c, mixing=m).variant for c in ("affine", "additive", "gin") for m in ("permutation", "lu")
    }
    assert len(names) == 6


# --- Files ------------------------------------------------------------------------------------------------------------

unit = st.floats(0, 1, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(
    metrics=st.tuples(unit, st.none() | unit, st.none() | unit),
    seconds=st.floats(0, 1e7),
    category=st.sampled_from(["bottle", "metal_nut", "003"]),
    digest=st.text("0123456789", min_size=16, max_size=16),
    error=st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=40).filter(str.strip),
)
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    metrics: tuple[float, float | None, float | None],
    seconds: float,
    category: str,
    digest: str,
    error: str,
) -> None:
    folder = tmp_path_factory.mktemp("records")
    image, pixel, aupro = metrics
    records = [
        example(category=category, image_auroc=image, pixel_auroc=pixel, aupro=aupro, seconds=seconds, val_nll=-1e-7),
        # Digits that look like numbers stay text; an error may hold commas and quotes.
        example(category=category, score="anomalib", weights_sha256=digest, revision="12345678", global_scale=True),
    ]
    failed = example(category=category, seed=1, status="failed", error=error)
    schema.write_records(records, folder / "new")
    schema.write_records([failed], folder / "new")
    expected = schema.latest([*records, failed])
    assert schema.read(folder / "new") == expected
    assert schema.read(schema.merge(folder / "new", folder / "all.csv")) == expected


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"pixel_auroc": "97.5"}, r"r.csv row 3, column pixel_auroc: 97.5, expected a fraction.*run it again"),
        ({"size": "large"}, r"r.csv row 3, column size: 'large', expected a whole number"),
        ({"global_scale": "True"}, "r.csv row 3, column global_scale: 'True', expected true or false"),
        ({"seed": ""}, "r.csv row 3, column seed: '', expected a whole number"),
        ({"mixing": "DROP"}, "r.csv row 2: no column mixing; made with an older schema"),
    ],
)
def test_a_bad_csv_names_file_row_and_column(tmp_path: Path, cells: dict[str, str], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        schema.read(_csv_with(tmp_path / "r.csv", **cells))


def test_a_csv_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = _csv_with(tmp_path / "r.csv")
    whole = path.read_text()
    assert len(schema.read(path)) == 2
    path.write_text(whole[: whole.rindex(",")] + "\n")
    with pytest.raises(RecordError, match="row 3, column initial_sha256: the row ends before it"):
        schema.read(path)
    path.write_text(whole.rstrip("\n") + ",surplus\n")
    with pytest.raises(RecordError, match="unknown column <beyond the last column>"):
        schema.read(path)
    header, rest = whole.split("\n", 1)
    path.write_text(header.replace("seconds,", "duration,", 1) + "\n" + rest)
    with pytest.raises(RecordError, match="no column seconds"):
        schema.read(path)


def test_a_bad_json_is_named(tmp_path: Path) -> None:
    path = schema.write_records([example()], tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content)[:-20])
    with pytest.raises(RecordError, match=rf"{path.name}: not JSON .*run the cell again"):
        schema.read(tmp_path)
    content["records"][0]["coupling"] = "spline"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=rf"{path.name} row 1, column coupling"):
        schema.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(RecordError, match="no list 'records'"):
        schema.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="run a cell"):
        schema.read(tmp_path / "none")


def test_what_one_file_may_hold(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no records"):
        schema.write_records([], tmp_path)
    with pytest.raises(RecordError, match="several trainings"):
        schema.write_records([example(seed=0), example(seed=1)], tmp_path)
    with pytest.raises(RecordError, match="same score"):
        schema.write_records([example(), example(image_auroc=0.7)], tmp_path)
    with pytest.raises(RecordError, match="column settings"):
        schema.write_records([example()], tmp_path, settings={"lr": 1e-3})
    assert not list(tmp_path.iterdir())
    path = schema.write_records([example()], tmp_path, settings={})
    assert path == tmp_path / schema.file_name(example())
    assert schema.file_name(example(score="anomalib", image_auroc=0.1)) == path.name  # what was trained, not how it did
    assert schema.file_name(example(seed=1)) != path.name


def test_the_latest_record_counts(tmp_path: Path) -> None:
    first = example(status="failed", started="2026-01-01T00:00:00Z")
    again = example(image_auroc=0.9, started="2026-01-02T00:00:00Z")
    assert schema.latest([again, first]) == [again]
    target = tmp_path / "all.csv"
    schema.write_records([first], tmp_path / "a")
    schema.merge(tmp_path / "a", target)
    assert status.count_records(tmp_path, "all.csv") == (0, 1)
    schema.write_records([again], tmp_path / "a")  # the repeated training replaces its file
    schema.merge(tmp_path / "a", target)
    assert schema.read(target) == [again]
    assert status.count_records(tmp_path, "all.csv") == (1, 0)


def test_merging_keeps_adds_and_repeats_to_the_same_bytes(tmp_path: Path) -> None:
    target, chosen = tmp_path / "out" / "all.csv", {"lr": 1e-3}
    label = settings_hash(chosen)
    schema.write_records([example(seed=0, settings=label)], tmp_path / "a", settings=chosen)
    schema.merge(tmp_path / "a", target)
    schema.write_records([example(seed=1)], tmp_path / "b")
    schema.merge(tmp_path / "b", target)
    once = target.read_bytes()
    assert [record.seed for record in schema.read(target)] == [0, 1]
    assert schema.read_settings(target) == {label: chosen}
    schema.merge(tmp_path / "b", target)
    schema.merge(target.parent, target)
    assert target.read_bytes() == once
    assert len(once) / 3 < 600  # compact: the header and two rows


def _write_many(folder: str, start: int) -> None:
    for repeat in range(6):
        for seed in range(start, start + 5):
            rows = [example(seed=seed, score=score, steps=repeat) for score in ("norm", "log_prob", "anomalib")]
            schema.write_records(rows, Path(folder))


def test_a_reader_sees_whole_records_while_others_write(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), start)) for start in (0, 3)]  # 3 and 4 by both
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers) or not looks:
        records = schema.read(tmp_path)
        looks += 1
        for seed in {record.seed for record in records}:
            assert sum(record.seed == seed for record in records) == 3
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(schema.read(tmp_path)) == 8 * 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_killed_writer_leaves_no_record(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from usf.study import schema\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"  # at the worst moment: written, not yet in place
        "schema.write_records([schema.example()], Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir())  # the unfinished file is there,
    assert schema.read(tmp_path) == []  # and is no record
    schema.write_records([example()], tmp_path)
    assert len(schema.read(tmp_path)) == 1


def test_writing_needs_neither_pandas_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from usf.study import schema\n"
        "schema.merge(schema.write_records([schema.example()], Path(sys.argv[1])).parent, Path(sys.argv[1], 'a.csv'))\n"
        "assert not {'pandas', 'torch'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _grid(categories: tuple[str, ...] = ("bottle", "pill"), seeds: int = 3, **changes: Any) -> list[Record]:
    flows = (("affine", "permutation", 0.90), ("additive", "lu", 0.95))
    return [
        example(
            category=category, coupling=c, mixing=m, seed=s, image_auroc=value + 0.01 * s, pixel_auroc=0.97, **changes
        )
        for category in categories
        for c, m, value in flows
        for s in range(seeds)
    ]


def test_cells_collect_seeds_in_percent() -> None:
    cells = tables.collect([*reversed(_grid()), example(category="pill", seed=7, status="failed")])
    assert set(cells) == {("mvtec", c, "fastflow", v) for c in ("bottle", "pill") for v in ("affine", "additive + LU")}
    cell = cells["mvtec", "pill", "fastflow", "additive + LU"]
    assert cell.values == pytest.approx((95.0, 96.0, 97.0))
    assert (cell.seeds, cell.failed) == ((0, 1, 2), ("the loss is nan at epoch 1",))
    assert (cell.mean, cell.sd) == (pytest.approx(96.0), pytest.approx(1.0))
    assert str(cell) == "96.0±1.0 (3, 1 failed)"
    assert str(tables.Cell(failed=("a", "b"))) == "2 failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 128}, "more than one size"),
        ({"score": "anomalib"}, "more than one score"),
        ({"protocol": "paper"}, "more than one protocol"),
        ({"settings": "0" * 12}, "more than one settings"),
        ({"category": "screw", "size": 128}, r"more than one size \(screw, seed 9\)"),
    ],
)
def test_what_differs_is_not_averaged(changes: dict[str, Any], message: str) -> None:
    records = [*_grid(), example(seed=9, **changes)]
    with pytest.raises(RecordError, match=message):
        tables.collect(records)
    name = next(reversed(changes))
    assert tables.collect(tables.select(records, **{name: getattr(records[0], name)}))


def test_epochs_of_a_trace_are_not_averaged() -> None:
    trace = [example(protocol="trace", epoch=epoch) for epoch in (1, 2)]
    with pytest.raises(RecordError, match="several records of one seed"):
        tables.collect(trace)
    assert tables.collect(tables.select(trace, epoch=2))
    with pytest.raises(RecordError, match="no column speed"):
        tables.select(trace, speed=1)
    with pytest.raises(RecordError, match="metric 'auroc'"):
        tables.collect(trace, "auroc")


def test_beside_without_records_says_not_run_everywhere() -> None:
    for dataset, level, classes in (("visa", "image", 12), ("visa", "pixel", 12), ("mvtec", "pixel", 15)):
        table = tables.beside({}, dataset, level)
        assert table.shape == (2 * classes, 6)
        assert (table.xs("here", level=1) == "not run").all(axis=None)
    with pytest.raises(ValueError, match="no table of textures"):
        tables.beside({}, "textures", "image")


def test_beside_puts_a_measurement_below_the_print() -> None:
    table = tables.beside(tables.collect(_grid()), "mvtec", "image")
    assert list(table.columns[:3]) == [("affine", "FastFlow"), ("affine", "U-Flow"), ("affine", "CFlow")]
    assert table.loc[("bottle", "paper"), ("affine", "FastFlow")] == "100.0±0.0"
    assert table.loc[("bottle", "here"), ("affine", "FastFlow")] == "91.0±1.0 (3)"
    assert table.loc[("bottle", "here"), ("USF", "FastFlow")] == "96.0±1.0 (3)"
    assert table.loc[("bottle", "here"), ("USF", "CFlow")] == "not run"
    assert table.loc[("screw", "here"), ("USF", "FastFlow")] == "not run"


def test_summary_compares_over_the_same_classes() -> None:
    records = [*_grid(), example(category="screw", seed=0)]  # screw has no affine run: it does not count
    cells = {level: tables.collect(records, metric) for level, metric in tables.METRIC.items()}
    table = tables.summary(cells)
    column = ("USF", "FastFlow")
    mvtec = table.loc["MVTec AD image"][column].to_dict()
    # bottle 98.9 ± 0.2, pill 88.2 ± 1.0
    assert mvtec == {"paper": "91.0±0.9", "classes run": "2 of 15", "paper, these": "93.6±0.6", "here": "96.0±1.0"}
    assert table.loc["MVTec AD image"]["USF", "CFlow"].to_dict()["here"] == "not run"
    assert table.loc["VisA image"][column].to_dict() == {"paper": "87.7±0.6", "here": "not run"}
    # The print has the same averages.
    printed = paper.cells(average=True)
    for row in printed[printed["table"] == 1].itertuples():
        place = (f"{paper.DATASETS[row.dataset]} {row.level}", "paper")
        text = table.loc[place, (tables.FLOW_NAMES[row.flow], paper.DETECTORS[row.detector])]
        mean, spread = map(float, text.split("±"))
        assert (mean, spread) == (pytest.approx(row.mean, abs=0.051), pytest.approx(row.sd, abs=0.051))


def test_agreement_has_an_interval_for_each_comparison() -> None:
    cells = {"image": tables.collect(_grid()), "pixel": {}}
    table = tables.agreement(cells).set_index(["category", "flow"])
    assert len(table) == 4
    row = table.loc[("pill", "usf")]
    assert (row["paper"], row["paper_sd"], row["runs"]) == (88.2, 1.0, 3)
    assert row["difference"] == pytest.approx(96.0 - 88.2)
    assert row["low"] < row["difference"] < row["high"]
    assert tables.agreement({}).empty


def test_failures_are_listed_once_a_training() -> None:
    failed = [example(status="failed", seed=4, score=score) for score in ("norm", "anomalib")]
    table = tables.failures([*_grid(), *failed])
    assert table[["seed", "error"]].to_dict("records") == [{"seed": 4, "error": "the loss is nan at epoch 1"}]
    assert tables.failures([]).empty


def test_costs_of_two_machines_do_not_add_up() -> None:
    old = _grid(("bottle",), seeds=2, seconds=90.0, hardware="A")
    new = [dataclasses.replace(record, seed=record.seed + 2, hardware="B") for record in _grid(("bottle",), seeds=3)]
    costs = tables.cost([*old, *new])
    assert len(costs) == 4
    found = tables.one_machine(costs)
    assert set(found["hardware"]) == {"B"}
    assert len(found) == 2
    assert tables.one_machine(tables.cost([])).empty


def test_cost_counts_a_training_once_and_shares_features() -> None:
    records = [
        dataclasses.replace(record, score=score)
        for record in _grid(("bottle",), seeds=2, seconds=90.0, seconds_features=40.0, seconds_score=8.0, threads=2)
        for score in ("norm", "anomalib")
    ]
    # A row of a trace knows the seconds up to its epoch only, and a failed run has no full training.
    early = dataclasses.replace(records[-1], protocol="trace", epoch=1, epochs_run=1, seconds=45.0)
    table = tables.cost([*records, example(seed=5, status="failed", seconds=1e6), early])
    assert list(table["trainings"]) == [2, 2]
    row = table.iloc[0]
    assert row["unit"] == "core-hours"
    # A class's features serve two flows of three runs. Ten images and two epochs were trained.
    shared = 40 / 6 + 8
    assert row["seconds_shared"] == pytest.approx(shared)
    assert row["seconds_image"] == pytest.approx(90 / 20)
    assert row["hours"] == pytest.approx(27 * 3 * 2 * (90 + shared) / 3600)
    assert row["hours_limit"] == pytest.approx(3 * 2 * (100 * 12_288 * 90 / 20 + 27 * shared) / 3600)
    # Read from a cache the second time: what counts is how long the extraction took.
    cached = [dataclasses.replace(record, seed=record.seed + 2, seconds_features=1.0) for record in records]
    assert tables.cost([*records, *cached]).iloc[0]["seconds_shared"] == pytest.approx(shared)
    # So does the fastest run: the other one waited for something.
    slow = [dataclasses.replace(record, seed=record.seed + 2, seconds=900.0) for record in records]
    assert tables.cost([*records, *slow]).iloc[0]["hours"] == pytest.approx(row["hours"])
    gpu = tables.cost([dataclasses.replace(record, device="cuda") for record in records])
    assert gpu.iloc[0]["unit"] == "GPU-hours"
    assert gpu.iloc[0]["hours"] == pytest.approx(row["hours"] / 2)
    assert tables.cost([]).empty


def test_prefer_takes_the_first_value_a_detector_has() -> None:
    records = [
        example(profile="smoke"),
        example(profile="book"),
        example(detector="cflow", profile="smoke", loss="anomalib"),
        example(detector="cflow", profile="smoke", loss="mle"),
    ]
    kept = tables.prefer(records, profile=("full", "book", "smoke"), loss=("anomalib", "mle"))
    assert [(r.detector, r.profile, r.loss) for r in kept] == [
        ("fastflow", "book", "mle"),
        ("cflow", "smoke", "anomalib"),
    ]
    assert tables.prefer(records, profile=("full",)) == []
    with pytest.raises(RecordError, match="no column lossy"):
        tables.prefer(records, lossy=("mle",))


def test_comparison_pairs_classes_and_knows_what_it_cannot_say() -> None:
    cells = {"image": tables.collect(_grid()), "pixel": tables.collect(_grid(("bottle",), seeds=1), "pixel_auroc")}
    table = tables.comparison(cells).set_index("level")
    row = table.loc["image"]
    assert (row["classes"], row["runs"]) == (2, 12)
    assert row["difference"] == pytest.approx(5.0)
    assert (row["low"], row["high"]) == pytest.approx((5, 5)), "every seed has the same difference"
    assert row["improvement"] == 1.0
    assert row["ratio"] == pytest.approx(1.0)
    single = table.loc["pixel"]
    assert single["difference"] == pytest.approx(0.0)
    assert single[["low", "class_low", "improvement", "ratio"]].isna().all()
    assert tables.comparison(cells, "gin + LU").empty


def test_other_seeds_are_paired_seed_by_seed_over_all_classes() -> None:
    base = {0: 80.0, 1: 90.0, 2: 70.0}
    gains = {"bottle": {0: 1.0, 1: 3.0, 2: 5.0, 3: 9.0}, "pill": {0: 3.0, 1: 5.0, 2: 7.0}}
    cells = {}
    for category, gain in gains.items():
        usf = {seed: base.get(seed, 0.0) + value for seed, value in gain.items()}
        for variant, runs in {"affine": base, "additive + LU": usf}.items():
            cells["mvtec", category, "fastflow", variant] = tables.Cell(tuple(runs.values()), tuple(runs))
    row = tables.comparison({"image": cells}).iloc[0]
    # The seeds that every class has of both: 2, 4, 6 on average over the classes, standard error 2 / sqrt(3).
    half = 4.303 * 2 / 3**0.5
    assert (row["low"], row["high"]) == pytest.approx((4 - half, 4 + half), abs=1e-2)


def test_varied_pairs_settings_that_differ_in_one_thing() -> None:
    usual = _grid(("pill",), epochs=6, size=128)
    longer = [dataclasses.replace(r, epochs=20, image_auroc=0.91) for r in usual if r.seed == 0]
    other = [dataclasses.replace(r, epochs=20, size=256) for r in usual]
    table = tables.varied(usual, [*usual, *longer, *other])
    assert set(table["changed"]) == {"epochs"}
    assert set(table["value"]) == {20}
    row = table.set_index(["flow", "level"]).loc["base", "image"]
    # Table 4 has 92.5 for the affine FastFlow on pill; seed 0 had 90.0.
    assert (row["seeds"], row["before"], row["after"], row["paper"]) == (1, pytest.approx(90), pytest.approx(91), 92.5)
    assert row["closed"] == pytest.approx(1 / 2.5)
    assert set(table["flow"]) == {"base", "usf"}
    assert tables.varied(usual, usual).empty
    elsewhere = [dataclasses.replace(r, dataset="textures", category="weave") for r in [*usual, *longer]]
    assert tables.varied(elsewhere, elsewhere).empty, "not in the paper"


def test_frame_is_in_percent() -> None:
    table = tables.frame(_grid())
    assert table["pixel_auroc"].unique() == pytest.approx([97.0])
    assert set(table["variant"]) == {"affine", "additive + LU"}
    assert list(tables.frame([]).columns) == [*schema.COLUMNS, "variant"]


def test_scores_are_compared_on_the_same_models() -> None:
    records = [
        example(seed=0, score="norm", image_auroc=0.8),
        example(seed=0, score="anomalib", image_auroc=0.9),
        example(seed=1, score="norm", image_auroc=0.1),  # has one score only: not counted
        example(detector="uflow", score="norm"),  # a detector with one score: nothing to compare
    ]
    table = tables.by_score(records)
    assert table[["detector", "variant"]].to_numpy().tolist() == [["fastflow", "additive + LU"]]
    row = table.iloc[0]
    assert (row["trainings"], row["image, norm"], row["image, anomalib"]) == (1, 80.0, 90.0)
    assert tables.by_score(records[:1]).empty


def test_protocol_gain_pairs_the_same_training() -> None:
    records = [
        example(seed=seed, protocol=protocol, image_auroc=value, epoch=epoch, settings=letter * 12)
        for seed in (0, 1)
        for protocol, value, epoch, letter in (("main", 0.90, 2, "a"), ("paper", 0.92 + 0.02 * seed, 1, "b"))
    ]
    table = tables.protocol_gain([*records, example(seed=7)])
    assert len(table) == 1
    row = table.iloc[0]
    assert (row["detector"], row["category"], row["score"], row["pairs"]) == ("fastflow", "bottle", "norm", 2)
    assert row["image_gain"] == pytest.approx(3.0)
    assert (row["image_main"], row["image_paper"]) == (pytest.approx(90.0), pytest.approx(93.0))
    assert pd.isna(row["pixel_gain"]), "pixels were not measured"
    assert (row["epoch_main"], row["epoch_paper"]) == (2, 1)
    # Another class is another row.
    pill = [dataclasses.replace(record, category="pill") for record in records]
    assert list(tables.protocol_gain([*records, *pill])["category"]) == ["bottle", "pill"]
    assert tables.protocol_gain(records[:1]).empty
    with pytest.raises(RecordError, match="more than one settings of protocol main"):
        tables.protocol_gain([*records, example(seed=0, settings="c" * 12)])


def test_models_are_ordered_as_in_the_paper() -> None:
    models = [("cflow", "affine"), ("fastflow", "gin + LU"), ("fastflow", "additive + LU"), ("fastflow", "affine")]
    assert sorted(models, key=lambda model: tables.model_order(*model)) == [*reversed(models[1:]), models[0]]
