"""What came of the predictions follows from the records, either way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from usf.study import predictions, schema
from usf.study.schema import Record, example

FLOWS = {"base": ("affine", "permutation"), "usf": ("additive", "lu")}


def _runs(values: dict[tuple[str, str], float], seeds: int = 2, step: float = 0.01, **changes: Any) -> list[Record]:
    """(flow, loss) -> image AUROC of seed 0; it rises by ``step`` a seed. Pixel AUROC is 0.9 for all."""
    return [
        example(
            coupling=FLOWS[flow][0], mixing=FLOWS[flow][1], loss=loss, seed=seed, score=score,
            image_auroc=value + step * seed, pixel_auroc=0.9, **({"detector": "uflow"} | changes),
        )
        for (flow, loss), value in values.items()
        for seed in range(seeds)
        for score in ("anomalib", "log_prob")
    ]  # fmt: skip


LOSS = {("base", "anomalib"): 0.80, ("usf", "anomalib"): 0.90, ("base", "mle"): 0.88, ("usf", "mle"): 0.90}


def test_losses_compare_four_models_of_the_same_seeds() -> None:
    records = _runs(LOSS)
    lone = example(detector="uflow", coupling="affine", mixing="permutation", loss="mle", seed=9, score="anomalib")
    row = predictions.losses([*records, lone]).set_index("level").loc["image"]
    assert row["seeds"] == 2
    assert (row["gain_anomalib"], row["gain_mle"]) == (pytest.approx(10.0), pytest.approx(2.0))
    assert row["difference"] == row["low"] == row["high"] == pytest.approx(8.0)
    # Another length of training is another row, and three of four models are none.
    assert predictions.losses(_runs(dict(itertools.islice(LOSS.items(), 3)))).empty
    assert len(predictions.losses([*records, *_runs(LOSS, epochs=3)])) == 4
    assert predictions.losses([]).empty


@pytest.mark.parametrize(
    ("change", "verdict", "expected"),
    [
        ({}, "most of the gain vanishes", "as predicted"),
        ({("base", "mle"): 0.70}, "does not vanish", "against the prediction"),
        ({("usf", "anomalib"): 0.75}, "no gain that could vanish", "against the prediction"),
    ],
)
def test_h5_either_way(change: dict[tuple[str, str], float], verdict: str, expected: str) -> None:
    said = predictions.outcomes(_runs(LOSS | change))["H5"]
    assert len(said) == 2
    assert verdict in said[0]
    assert expected in said[0]


def test_the_likelihoods_runs_are_those_of_both_studies(tmp_path: Path) -> None:
    stock = {key: value for key, value in LOSS.items() if key[1] == "anomalib"}
    own, other = _runs({("base", "mle"): 0.88}), _runs({("usf", "mle"): 0.90})
    elsewhere, leaky = _runs({("usf", "mle"): 0.5}, detector="fastflow"), _runs({("usf", "mle"): 0.5}, protocol="paper")
    written = [*other, *elsewhere]
    for training in {record.training for record in written}:
        schema.write_records([record for record in written if record.training == training], tmp_path / "ablation")
    benchmark = [*_runs(stock), *own]
    assert predictions.likelihood_runs(benchmark, tmp_path / "nowhere") == schema.latest(own)
    found = predictions.likelihood_runs(benchmark, tmp_path / "ablation")
    assert found == schema.latest([*own, *other])
    assert predictions.likelihood_runs([*benchmark, *other, *leaky], tmp_path / "ablation") == found, "none twice"
    row = predictions.losses([*_runs(stock), *found]).set_index("level").loc["image"]
    assert (row["seeds"], row["gain_mle"]) == (2, pytest.approx(2.0))


def test_flows_take_the_score_that_is_asked_for() -> None:
    records = _runs({("base", "anomalib"): 0.9, ("usf", "anomalib"): 0.8}, seeds=3, detector="fastflow")
    row = predictions.flows(records).set_index("level").loc["image"]
    assert (row["runs"], row["difference"]) == (3, pytest.approx(-10.0))
    assert row["low"] < -10 < row["high"]
    assert predictions.flows(records, "norm").empty
    single = predictions.flows(_runs({("base", "anomalib"): 0.9, ("usf", "anomalib"): 0.8}, seeds=1))
    assert "low" not in single
    (image, pixel) = predictions.outcomes(records)["H6"]
    assert "bottle -10.0 [" in image
    assert "leads on 1 of 1" in image
    assert "leads on 0 of 1" in pixel


def test_spreads_over_the_same_seeds() -> None:
    records = [
        *_runs({("base", "anomalib"): 0.8}, seeds=4, step=0.02, detector="fastflow"),
        *_runs({("usf", "anomalib"): 0.8}, seeds=3, step=0.01, detector="fastflow"),
    ]
    row = predictions.spreads(records).set_index("level").loc["image"]
    assert (row["seeds"], row["base"], row["usf"]) == (3, pytest.approx(2.0), pytest.approx(1.0))
    assert row["ratio"] == pytest.approx(0.5)
    said = predictions.outcomes(records)["H7"]
    assert "bottle 1.00 against 2.00; smaller on 1 of 1" in said[0]
    assert "over 3 seeds" in said[0]
    assert "smaller on 0 of 1" in said[1], "pixel values are all equal"
    assert predictions.spreads(_runs({("base", "anomalib"): 0.8, ("usf", "anomalib"): 0.8}, seeds=1)).empty


def test_failed_runs_and_other_protocols_do_not_count() -> None:
    failed = example(detector="uflow", coupling="affine", mixing="permutation", loss="mle", seed=5, status="failed")
    leaky = _runs(LOSS, protocol="paper")
    assert predictions.outcomes([failed, *leaky]) == {}


def _scored(flow: str, loss: str, seed: int, by_score: dict[str, float], **changes: Any) -> list[Record]:
    coupling, mixing = FLOWS[flow]
    fixed = {"detector": "cflow", "coupling": coupling, "mixing": mixing, "loss": loss, "seed": seed} | changes
    return [example(score=score, image_auroc=value, **fixed) for score, value in by_score.items()]


def test_cost_of_the_librarys_score_is_of_the_same_weights() -> None:
    high = {"anomalib": 0.60, "log_prob": 0.80, "norm": 0.70}
    low = {"anomalib": 0.82, "log_prob": 0.81, "norm": 0.70}
    same = {"anomalib": 0.900, "log_prob": 0.901, "norm": 0.901}
    records = [
        *_scored("base", "mle", 0, high),
        *_scored("base", "mle", 1, low),
        *_scored("usf", "mle", 0, same),
        *_scored("base", "anomalib", 0, same),
        *_scored("base", "anomalib", 0, high, category="zipper"),  # the likelihood was not tried on it
        *_scored("base", "mle", 2, {"anomalib": 0.1}),  # not scored in every way
        *_scored("usf", "mle", 1, high, match_parameters=True),
    ]
    table = predictions.score_costs(records)
    assert len(table) == 3
    row = table.set_index(["loss", "flow"]).loc[("mle", "base")]
    assert (row["seeds"], row["library"], row["log_prob"]) == (2, pytest.approx(71.0), pytest.approx(80.5))
    assert (row["cost"], row["worst"]) == (pytest.approx(9.5), pytest.approx(20.0))
    assert row["sd_library"] == pytest.approx(22 / 2**0.5)
    assert row["sd_log_prob"] == pytest.approx(1 / 2**0.5)
    assert row["low"] < 0 < row["high"], "two seeds that differ say little"
    gained = predictions.score_costs([*_scored("base", "mle", 0, {"anomalib": 0.9, "log_prob": 0.8, "norm": 0.8})])
    assert (gained.loc[0, "worst"], gained.loc[0, "largest"]) == (pytest.approx(-10.0), pytest.approx(10.0))
    text = predictions.score_costs_in_words(table)
    assert "deviation over seeds is 15.6 points in the library's score and 0.7 by the log-likelihood." in text
    assert "the score costs 9.5 [" in text
    assert "20.0 in the worst; the uniformly scaling flow 0.1 at most" in text
    assert predictions.score_costs_in_words(predictions.score_costs([])) == ""
