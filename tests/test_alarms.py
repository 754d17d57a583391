"""The study of false alarms: folds, both scores, anomalib's threshold, records that come back; the committed record."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from usf import paths
from usf.study import alarms, records


@given(st.integers(2, 60), st.integers(2, 8), st.integers(0, 5))
def test_folds_cut_every_image_once(count: int, folds: int, seed: int) -> None:
    if folds > count:
        with pytest.raises(ValueError, match="cannot cut"):
            alarms.fold_indices(count, folds, seed)
        return
    parts = alarms.fold_indices(count, folds, seed)
    assert sorted(itertools.chain.from_iterable(part.tolist() for part in parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, alarms.fold_indices(count, folds, seed), strict=True))


@given(
    st.lists(st.integers(0, 9).map(float), min_size=1, max_size=12),
    st.lists(st.integers(0, 9).map(float), min_size=1, max_size=12),
)
def test_f1_threshold_is_the_best_of_all(normal: list[float], anomalous: list[float]) -> None:
    """F1 with "at or above is anomalous", over every score as a candidate."""

    def f1(limit: float) -> float:
        hits, false = sum(a >= limit for a in anomalous), sum(n >= limit for n in normal)
        return 2 * hits / (hits + false + len(anomalous))

    found = alarms.f1_threshold(np.array(normal), np.array(anomalous))
    assert f1(found) == pytest.approx(max(map(f1, normal + anomalous)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USF_SHARED", "")  # textures and random weights: the same everywhere
        folder = tmp_path_factory.mktemp("alarms")
        return folder, alarms.run(alarms.settings("smoke"), folder, progress=False)


def test_a_run_is_kept_and_comes_back(ran: tuple[Path, list[dict[str, object]]], tmp_path: Path) -> None:
    folder, results = ran
    alarms.write(results, folder, tmp_path)
    folds, scores = alarms.load(tmp_path)
    assert [(row["class"], row["fold"], row["status"]) for row in folds] == [
        ("textures", 0, "ok"),
        ("textures", 1, "ok"),
    ]
    assert set(json.loads((tmp_path / "provenance.json").read_text())) == {row["run"] for row in folds}
    for row, found, given_ in zip(folds, scores["textures"], results, strict=True):
        for score in alarms.SCORES:
            for part in alarms.PARTS:
                values = getattr(found[score], part)
                assert np.allclose(values, given_["scores"][score][part], rtol=1e-8)  # type: ignore[index]
                assert np.all(values > 0) or score == "standardised"
        assert len(found["map"].fit) == row["fit"] == 6
        assert len(found["map"].held_out) == row["held_out"] == 6
        assert len(found["map"].normal) + len(found["map"].anomalous) == row["test"]
        # Norms of `dimension` numbers of order one: not their squares, halves or means.
        assert 0.05 < np.median(found["norm"].fit) ** 2 / row["dimension"] < 5
    names = [set(given_["names"]["held_out"]) for given_ in results]  # type: ignore[index]
    assert not names[0] & names[1]


def test_scores_compare_each_position_with_what_is_normal_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that is high at one position in every normal image, and a defect elsewhere that is lower than that."""
    from usf.study import detection

    quiet = np.array([[[4.0, 1.0], [1.0, 1.0]], [[6.0, 3.0], [3.0, 3.0]]], dtype=np.float32)
    bad = quiet[:1].copy()
    bad[0, 1, 1] = 5.0
    maps = {"fit": quiet, "held_out": quiet, "test": np.concatenate([quiet[1:], bad])}
    monkeypatch.setattr(
        detection,
        "evaluate",
        lambda model, part: detection.Evaluation(
            maps[part], maps[part].max(axis=(1, 2)), np.full(len(maps[part]), 8.0), np.zeros((len(maps[part]), 1))
        ),
    )
    masks = np.concatenate([np.zeros((1, 2, 2), bool), bad == 5.0])
    labels = np.array([False, True])
    scores, areas = alarms.measure(None, "fit", "held_out", "test", labels, masks)  # type: ignore[arg-type]
    found = {name: (float(scores[name].normal[0]), float(scores[name].anomalous[0])) for name in alarms.SCORES}
    # Mean 5 and 2, standard deviation 1: what is (6, 3) becomes (1, 1), and 5 at a quiet position 3.
    assert found == {"map": (6, 5), "relative": (1.5, 2.5), "standardised": (1, 3), "norm": (4, 4)}
    assert areas["pixel_auroc_map"] == pytest.approx(6 / 7)
    assert areas["pixel_auroc_standardised"] == areas["pixel_auroc_relative"] == 1
    assert alarms.measure(None, "fit", "held_out", "test", labels)[1] == {}  # type: ignore[arg-type]


def test_brightness_is_the_mean_of_the_pixels() -> None:
    options = alarms.settings("smoke")
    rows = alarms.brightness(options)
    assert [row["part"] for row in rows] == ["train"] * 12 + ["normal"] * 2
    path = alarms._folder("textures").root / "train" / rows[0]["image"]
    with Image.open(path) as image:
        assert rows[0]["brightness"] == pytest.approx(np.asarray(image.convert("RGB")).mean() / 255, abs=2e-3)


def test_a_finished_run_is_not_repeated(
    ran: tuple[Path, list[dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = ran
    monkeypatch.setattr(alarms, "_folder", lambda name: pytest.fail("trained again"))
    assert alarms.run(alarms.settings("smoke"), folder, progress=False) == results


def test_missing_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USF_SHARED", "")
    options = dataclasses.replace(alarms.settings("smoke"), classes=("pill",))
    with pytest.raises(FileNotFoundError, match="images of pill"):
        alarms.run(options, tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="no records"):
        alarms.load(tmp_path)


def test_the_committed_record_is_whole() -> None:
    options = alarms.settings("full")
    folds, scores = alarms.load()
    assert tuple(scores) == options.classes
    assert [(row["class"], row["fold"]) for row in folds] == list(
        itertools.product(options.classes, range(options.folds))
    )
    runs = json.loads(paths.results("calibration", "provenance.json").read_text())
    for row in folds:
        assert row["status"] == "ok"
        assert row["run"] in runs
        expected = records.settings_hash({**dataclasses.asdict(options), "classes": row["class"]})
        assert row["settings_hash"] == expected
        found = scores[row["class"]][row["fold"]]["map"]
        assert (len(found.fit), len(found.held_out)) == (row["fit"], row["held_out"])
        assert len(found.normal) + len(found.anomalous) == row["test"]
    counts = Counter(
        (row["class"], row["part"]) for row in records.read_csv(paths.results("calibration", "brightness.csv"))
    )
    for name in options.classes:
        first = scores[name][0]["map"]
        assert counts[name, "train"] == len(first.fit) + len(first.held_out)
        assert counts[name, "normal"] == len(first.normal)
    for name in options.classes:  # every normal image is held out once
        assert sum(row["held_out"] for row in folds if row["class"] == name) == folds_total(folds, name)


def folds_total(folds: list[dict[str, int]], name: str) -> int:
    totals = {row["fit"] + row["held_out"] for row in folds if row["class"] == name}
    assert len(totals) == 1
    return totals.pop()
