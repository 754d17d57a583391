"""The ablation: contrasts are what they say, failures are counted, and nothing is trained twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

mpl.use("Agg")

from matplotlib import pyplot as plt

from usf.plots import ablation as figures
from usf.study import ablation, paper, schema
from usf.study.schema import Record, example

FLOWS = {name: (name.split(" ")[0], "lu" if name.endswith("LU") else "permutation") for name in ablation.VARIANTS}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def record(variant: str, seed: int = 0, auroc: float = 0.9, condition: str = "library", **changes: Any) -> Record:
    """A row of a condition."""
    coupling, mixing = FLOWS[variant]
    way = ablation.TRAININGS[ablation.CONDITIONS[condition].training]
    values: dict[str, Any] = {
        "coupling": coupling, "mixing": mixing, "seed": seed, "loss": way.loss, "epochs": 6, "epochs_run": 6,
        "train_layer_norm": way.train_layer_norm, "score": ablation.CONDITIONS[condition].score, "category": "pill",
    }  # fmt: skip
    if changes.get("status") != "failed":
        values |= {"image_auroc": auroc, "pixel_auroc": auroc / 2}
    return example(**(values | changes))


def one(records: list[Record], contrasts: dict[str, ablation.Weights], level: str = "image") -> dict[str, Any]:
    """The only effect that the records have."""
    table = ablation.effects(ablation.frame(records), contrasts, level)
    assert len(table) == 1
    return dict(table.iloc[0])


def test_a_difference_is_paired_by_seed() -> None:
    base, usf = {0: 0.80, 1: 0.90, 2: 0.70}, {0: 0.81, 1: 0.93, 2: 0.75, 3: 0.1}
    records = [record("affine", s, a) for s, a in base.items()]
    records += [record("additive + LU", s, a) for s, a in usf.items()]
    row = one(records, {"USF": ablation.usf_advantage("library")})
    assert row["seeds"] == 3
    assert row["failed"] == 0
    assert row["values"] == pytest.approx((1, 3, 5))
    assert row["estimate"] == pytest.approx(3)
    # Student with two degrees of freedom: t = 4.303, standard error 2 / sqrt(3).
    assert (row["low"], row["high"]) == pytest.approx((3 - 4.303 * 1.1547, 3 + 4.303 * 1.1547), abs=1e-2)
    spread = pd.Series([81.0, 93.0, 75.0]).std() - pd.Series([80.0, 90.0, 70.0]).std()
    assert row["sd_change"] == pytest.approx(spread)
    assert one(records, {"USF": ablation.usf_advantage("library")}, "pixel")["estimate"] == pytest.approx(1.5)


def test_a_failed_run_is_counted_and_has_no_number() -> None:
    records = [record("affine", s) for s in (0, 1)]
    records += [record("affine + LU", 0, 0.95), record("affine + LU", 1, status="failed")]
    contrast = {"LU": ablation.usf_advantage("library", "affine + LU")}
    row = one(records, contrast)
    assert (row["seeds"], row["failed"]) == (1, 1)
    assert row["estimate"] == pytest.approx(5)
    assert pd.isna(row["low"]), "one seed has no interval"
    row = one([records[1], records[3]], contrast)
    assert (row["seeds"], row["failed"]) == (0, 1)
    assert pd.isna(row["estimate"])


def test_a_contrast_without_its_runs_is_no_row() -> None:
    records = [record(variant) for variant in ablation.VARIANTS if variant != "affine + LU"]
    table = ablation.effects(ablation.frame(records), ablation.CONTRASTS["library"], "image")
    assert table.empty
    assert list(table["estimate"]) == []
    with pytest.raises(ValueError, match="image or pixel"):
        ablation.effects(ablation.frame(records), ablation.CONTRASTS["library"], "images")


@given(
    coupling=st.tuples(*[st.floats(-0.05, 0.05)] * 2),
    lu=st.floats(-0.05, 0.05),
    together=st.floats(-0.05, 0.05),
)
def test_the_factorial_recovers_the_effects_that_made_the_numbers(
    coupling: tuple[float, float], lu: float, together: float
) -> None:
    effect = {"affine": 0.0, "additive": coupling[0], "gin": coupling[1]}
    records = []
    for name, (kind, mixing) in FLOWS.items():
        value = 0.7 + effect[kind] + (lu if mixing == "lu" else 0) + (together if name == "additive + LU" else 0)
        records.append(record(name, auroc=value))
    table = ablation.effects(ablation.frame(records), ablation.CONTRASTS["library"], "image")
    found = dict(zip(table["effect"], table["estimate"], strict=True))
    assert found == pytest.approx(
        {
            "additive": 100 * (coupling[0] + together / 2),
            "GIN": 100 * coupling[1],
            "LU": 100 * (lu + together / 3),
            "additive x LU": 100 * together,
            "GIN x LU": 0,
        },
        abs=1e-3,  # a record keeps six digits
    )


def test_outcomes_are_the_papers_two_steps_and_what_the_repairs_leave() -> None:
    areas = {"affine": 0.90, "additive": 0.85, "additive + LU": 0.87}
    records = [record(variant, seed, area) for variant, area in areas.items() for seed in (0, 1)]
    assert ablation.outcomes(ablation.frame(records)) == [
        "FastFlow, image AUROC: additive -5.0; LU added +2.0; together -3.0 (pill).",
        "FastFlow, pixel AUROC: additive -2.5; LU added +1.0; together -1.5 (pill).",
    ]
    records += [record("affine", 0, 0.8, "score"), record("additive + LU", 0, 0.9, "score")]
    records += [record("affine", 0, 0.9, "loss"), record("additive + LU", 0, 0.8, "loss")]
    assert "repairs that were run: 1 of 2 on pill." in ablation.outcomes(ablation.frame(records))[0]
    assert ablation.outcomes(ablation.frame(records[:2])) == ablation.outcomes(ablation.frame([])) == []


def test_every_contrast_is_one() -> None:
    everything = [*ablation.CONTRASTS.values(), ablation.repairs(), ablation.differences("score")]
    weights = [contrast for contrasts in everything for contrast in contrasts.values()]
    assert len(weights) == 5 * 5 + 6 * 4 + 5
    assert all(abs(sum(contrast.values())) < 1e-12 for contrast in weights)


def test_a_frame_has_one_setting_a_class_and_names_conditions() -> None:
    records = [record("affine", condition=condition) for condition in ablation.CONDITIONS]
    records += [record("affine", epochs=20, epochs_run=20, auroc=0.1)]  # a longer training, alone
    records += [record("affine", score="norm"), record("affine", match_parameters=True, auroc=0.7)]
    records += [record("affine", diagonal="learned", mixing="lu", auroc=0.2)]
    table = ablation.frame(records)
    assert sorted(table.loc[~table["matched"], "condition"]) == sorted(ablation.CONDITIONS)
    assert set(table.loc[~table["matched"], "image"]) == {90.0}
    assert list(table.loc[table["matched"], "image"]) == [70.0]
    other_images = [record("affine", seed=s, manifest_sha256="12" * 32, auroc=0.2) for s in range(9)]
    table = ablation.frame([*records, *other_images])
    assert set(table["image"]) == {20.0}, "runs on other images are never compared with these"
    assert ablation.frame([]).empty


def test_cflow_has_nothing_to_freeze() -> None:
    assert ablation.trainings("fastflow") == list(ablation.TRAININGS)
    assert ablation.trainings("cflow") == ["library", "likelihood"]
    with pytest.raises(ValueError, match="choose among library"):
        ablation.trainings("uflow", ["librar"])


def test_the_papers_averages_are_those_of_its_tables() -> None:
    table = ablation.paper_differences()
    usf = table[(table["category"] == "average") & (table["variant"] == ablation.USF)]
    printed = pd.read_csv(Path(__file__).resolve().parents[1] / "data" / "paper" / "ablation.csv")
    for row in printed[printed["variant"] == ablation.USF].to_dict("records"):
        own = usf[(usf["detector"] == row["detector"]) & (usf["level"] == "image")]
        assert own["mean"].item() == pytest.approx(row["mean"], abs=0.006)
        assert own["sd"].item() == pytest.approx(row["sd"], abs=0.006)
    assert len(table) == 3 * 2 * 16 + 3


def test_records_are_read_from_both_studies(tmp_path: Path) -> None:
    first, second = record("affine"), record("affine + LU", condition="loss")
    trace = record("affine", protocol="trace", epoch=2)
    schema.write_records([first, trace], tmp_path / "a")
    schema.write_records([second], tmp_path / "b")
    found = ablation.load([tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert {r.key for r in found} == {first.key, second.key}
    assert ablation.main(["merge", "--out", str(tmp_path / "b"), "--into", str(tmp_path / "all.csv")]) == 0
    assert schema.read(tmp_path / "all.csv") == [second]


def test_what_the_benchmark_has_on_record_is_not_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from usf.detectors import backbones
    from usf.study import benchmark, textures
    from usf.study.grid import VARIANTS
    from usf.study.images import read

    images, weights = read(textures.ensure(small=True)), backbones.resolve("random", announce=None)
    cell = benchmark.Cell(
        dataset="textures", category="weave", detector="fastflow", profile="smoke", size=32, epochs=1, batch_size=4,
        train_images=4, per_kind=1, model={"flow_steps": 1}, seeds=(0,), loss="anomalib",
        variants=(VARIANTS["affine"], VARIANTS["affine-lu"]),
    )  # fmt: skip
    there = benchmark.run_cell(cell, images, tmp_path / "benchmark", weights=weights, progress=False)
    seen: list[tuple[str, str, bool]] = []
    records = ablation.run(
        cell,
        images,
        tmp_path / "ablation",
        weights=weights,
        progress=False,
        elsewhere=there,
        on_outcome=lambda way, outcome: seen.append((way, outcome.variant.name, outcome.resumed)),
    )
    assert seen == [(way, name, way == "library") for way in ablation.TRAININGS for name in ("affine", "affine-lu")]
    files = list((tmp_path / "ablation").iterdir())
    assert len(files) == 4, "no file for what is on record elsewhere"
    assert {(r.loss, r.train_layer_norm) for r in records} == {("anomalib", True), ("mle", True), ("anomalib", False)}
    assert set(ablation.frame(records)["condition"]) == set(ablation.CONDITIONS)
    # Other weights of the backbone: another run.
    other = [schema.example(**{**vars(r), "weights_sha256": "00" * 32}) for r in there]
    seen.clear()
    ablation.run(
        cell, images, tmp_path / "again", names=["library"], weights=weights, progress=False, elsewhere=other,
        on_outcome=lambda way, outcome: seen.append((way, outcome.variant.name, outcome.resumed)),
    )  # fmt: skip
    assert [resumed for *_, resumed in seen] == [False, False]


def test_command_line_and_notebook_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from usf.study import jobs

    notebook = (Path(__file__).resolve().parents[1] / "book" / "runs" / "ablation.md").read_text("utf8")
    assert 'with jobs.hold(ablation.lock(where / "records", dataset, category, detector)):' in notebook
    hold = jobs.hold
    monkeypatch.setattr(jobs, "hold", lambda path: hold(path, wait=False))
    arguments = ["run", "textures", "weave", "fastflow", "--profile", "smoke", "--weights", "random"]
    for out in ([], ["--out", str(tmp_path / "records")]):
        where = tmp_path if out else tmp_path / "build" / "ablation" / "smoke"
        monkeypatch.setattr(ablation, "folder", lambda profile: tmp_path / "build" / "ablation" / profile)
        with hold(ablation.lock(where / "records", "textures", "weave", "fastflow")):
            with pytest.raises(BlockingIOError, match="held by another process"):
                ablation.main([*arguments, *out])
            assert not list((where / "records").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "textures", "weave", "fastflow", "--trainings", "librar"], "choose among library"),
        (["run", "textures", "weave", "fastflow", "--variants", "affin"], "unknown variant"),
        (["run", "textures", "weave", "resnet"], "invalid choice"),
        (["run", "nothing", "weave", "cflow", "--profile", "smoke"], "no images of nothing"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        ablation.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


# --- figures ----------------------------------------------------------------------------------------------------------


def runs() -> pd.DataFrame:
    """Two classes of two detectors with every flow and condition; one run failed."""
    records = [
        record(variant, seed, 0.8 + 0.01 * seed, condition, category=category, detector=detector)
        for detector in ("fastflow", "uflow")
        for category in ("pill", "bottle")
        for variant in ablation.VARIANTS
        for condition in ablation.CONDITIONS
        for seed in (0, 1)
        if (detector, category, variant, condition, seed) != ("uflow", "pill", "affine + LU", "library", 1)
    ]
    lost = record("affine + LU", 1, condition="library", detector="uflow", status="failed")
    return ablation.frame([*records, lost])


def drawn(figure: Any, *markers: str) -> int:
    return sum(line.get_marker() in markers for axis in figure.axes for line in axis.get_lines())


def test_figure_7_has_the_papers_classes_and_ours() -> None:
    changes = pd.concat([ablation.effects(runs(), ablation.differences(), level) for level in ("image", "pixel")])
    figure = figures.class_changes(changes)
    assert len(figure.axes) == 6
    # Additive + LU class by class in every panel.
    circles = [line for axis in figure.axes for line in axis.get_lines() if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in circles) == 15 * 6
    assert drawn(figure, "s") == drawn(figure, "D") == 2 * 5 * 2
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == list(paper.DETECTORS.values())
    # A single seed has no spread: it is not drawn.
    spread = figures.class_changes(changes, "spread")
    values = [line.get_xdata()[0] for axis in spread.axes for line in axis.get_lines() if line.get_marker() == "D"]
    assert sum(pd.isna(value) for value in values) == 2
    with pytest.raises(ValueError, match="mean or spread"):
        figures.class_changes(changes, "median")
    figures.class_changes(changes[changes["seeds"] > 5])  # nothing of ours


def test_figure_8_says_what_failed() -> None:
    figure = figures.layer_combinations(runs())
    said = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert said == ["1 of 2 failed"] * 2
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(ablation.VARIANTS)
    figures.layer_combinations(runs(), "cflow")  # the paper's alone


def test_conditions_and_contrasts_have_a_panel_or_a_row_each() -> None:
    table = runs()
    figure = figures.conditions(table, "pixel")
    assert [axis.get_title() for axis in figure.axes] == [
        "FastFlow, bottle", "FastFlow, pill", "U-Flow, bottle", "U-Flow, pill",
    ]  # fmt: skip
    effects = ablation.effects(table, ablation.CONTRASTS["library"], "image")
    figure = figures.contrasts(effects)
    assert [axis.get_title() for axis in figure.axes] == list(ablation.CONTRASTS["library"])
    assert drawn(figure, "s") == 5 * 4
    for function in (figures.conditions, figures.contrasts):
        with pytest.raises(ValueError, match="run"):
            function(table[:0] if function is figures.conditions else effects[:0])
