"""Collapse through what is trained and not counted: the floor, and FastFlow's layer normalisation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usf.flows import LULinear
from usf.plots import stability as figures
from usf.study import records, uncounted


@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0.01, 10.0))
def test_no_map_of_a_gaussian_goes_below_the_floor(dim: int, seed: int, gain: float) -> None:
    """Exactly: a linear map of a normal law, whose entropy and second moment are known."""
    generator = torch.Generator().manual_seed(seed)
    mixing = LULinear((dim,)).double()
    with torch.no_grad():
        mixing.weight.copy_(0.5 * torch.randn(dim, dim, generator=generator))
    matrix = mixing.matrix().detach()
    entropy = dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(gain))
    floor = uncounted.entropy_floor(entropy, mixing.log_abs_det().item(), dim)
    moment = gain**2 * float(matrix.square().sum()) / dim
    assert floor <= moment * (1 + 1e-9)
    whitened = uncounted.entropy_floor(entropy, -dim * math.log(gain), dim)
    assert whitened == pytest.approx(1.0)  # z = x / gain is standard normal, and the floor is met


def test_looks_are_every_epoch_at_first_and_include_the_last() -> None:
    assert uncounted.looks(1) == [1]
    assert uncounted.looks(200)[:5] == [1, 2, 3, 4, 5]
    assert uncounted.looks(200)[-1] == 200
    assert len(uncounted.looks(200)) < 30


def test_cases_are_the_three_norms_with_and_without_scales_and_the_stock_detector() -> None:
    found = uncounted.cases("hazelnut", "book", lr=0.5)
    assert len(found) == len({case.name for case in found}) == 7
    assert {case.lr for case in found} == {0.5}
    assert sum(case.coupling == "affine" for case in found) == 1
    assert {(case.norm, case.global_scale) for case in found if case.coupling == "additive"} == {
        (norm, scale) for norm in uncounted.NORMS for scale in (True, False)
    }


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """The three norms without scales, for a few steps."""
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from usf.detectors import resolve
    from usf.study.features import Features

    weights = resolve("random", announce=None)
    found: list[dict[str, object]] = []
    for case in uncounted.cases("made up", "smoke"):
        if case.global_scale:
            continue
        case = dataclasses.replace(case, size=32, lr=3e-3, epochs=12, batch=4)
        model = uncounted.build(case, weights)
        images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        maps = model.features(images)
        train, test = (Features(tuple(level[part] for level in maps)) for part in (slice(0, 6), slice(6, 12)))
        labels = np.array([False] * 3 + [True] * 3)
        found += uncounted.train(case, model, train, test, labels, None)
    return found


def test_the_gain_that_is_left_out_shrinks_the_latents_and_the_others_do_not(rows: list[dict[str, object]]) -> None:
    last = {row["norm"]: row for row in rows}
    first = {row["norm"]: row for row in rows if row["epoch"] == 0}
    assert set(last) == set(uncounted.NORMS)
    assert {row["status"] for row in rows} == {"ok"}
    for norm in uncounted.NORMS:
        assert first[norm]["log_gain"] == first[norm]["log_det"] == 0
        assert last[norm]["log_det"] == pytest.approx(0, abs=1e-5)  # no scales: the flow itself keeps volume
    assert last["left out"]["latent_std"] < last["frozen"]["latent_std"] < last["counted"]["latent_std"]
    assert last["left out"]["log_gain"] < 0 == last["frozen"]["log_gain"] < last["counted"]["log_gain"]
    assert last["left out"]["loss"] < last["frozen"]["loss"]
    assert last["left out"]["nll_held"] == pytest.approx(last["left out"]["loss_held"] - last["left out"]["log_gain"])
    assert last["counted"]["nll_held"] == last["counted"]["loss_held"]


def test_looks_are_drawn_and_published(rows: list[dict[str, object]], tmp_path: Path) -> None:
    figure = figures.collapse(rows)
    assert [len(axis.lines) for axis in figure.axes] == [3, 3, 3, 3]
    plt.close(figure)
    lost = [{**row, "loss": 1e9} if row["epoch"] == 12 and row["norm"] == "counted" else row for row in rows]
    crosses = [line for line in figures.collapse(lost).axes[2].lines if line.get_marker() == "x"]
    assert len(crosses) == 1
    assert crosses[0].get_ydata()[0] < 1e9
    plt.close("all")
    origin = {"images": "x", "weights": "y", "weights_sha256": "z", "seconds": 1.0, "run": "one"}
    records.write_json(tmp_path / "in" / "a.json", {"rows": [{**row, **origin} for row in rows]})
    records.write_json(tmp_path / "in" / "runs" / "one.json", {"revision": "r"})
    uncounted.publish(tmp_path / "in", tmp_path / "out")
    found = uncounted.load(tmp_path / "out")
    assert tuple(found[0]) == uncounted.COLUMNS
    assert len(found) == len(rows)
    assert {row["global_scale"] for row in found} == {False}


def test_what_was_published_before_stays(rows: list[dict[str, object]], tmp_path: Path) -> None:
    origin = {"images": "x", "weights": "y", "weights_sha256": "z", "seconds": 1.0}
    for run, seed in (("one", 0), ("two", 1), ("three", 1)):
        out = tmp_path / run
        records.write_json(out / "a.json", {"rows": [{**row, **origin, "seed": seed, "run": run} for row in rows]})
        records.write_json(out / "runs" / f"{run}.json", {"revision": run})
        uncounted.publish(out, tmp_path / "to")
    found = uncounted.load(tmp_path / "to")
    assert [(row["seed"], row["run"]) for row in found] == [(0, "one")] * len(rows) + [(1, "three")] * len(rows)
    origins = json.loads((tmp_path / "to" / "collapse-provenance.json").read_text("utf8"))
    assert origins == {"one": {"revision": "one"}, "three": {"revision": "three"}}


def test_endings_compare_the_norms_of_one_class_and_seed(rows: list[dict[str, object]]) -> None:
    (row,) = uncounted.endings(rows, lr=3e-3)
    assert (row["data"], row["seed"], row["steps"]) == ("made up", 0, 24)
    assert row["gain"] < 0
    assert row["latents"] < 1
    assert row["loss_held"] < row["nll_held"]
    assert row["counted"] < row["nll_held"]
    assert uncounted.endings(rows, lr=1.0) == []
    assert uncounted.endings([row for row in rows if row["norm"] != "frozen"], lr=3e-3) == []
    assert uncounted.endings([{**row, "status": "failed"} for row in rows], lr=3e-3) == []
