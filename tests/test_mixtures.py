"""The mixture study: seeded, resumable, failures recorded; the committed records hold what the book says of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from usf import paths
from usf.flows import NonUSFlow, USFlow
from usf.study import limits, mixtures, records
from usf.study.mixtures import Study, Trial, search
from usf.study.stacked import fit_stacked
from usf.training import fit

TINY = Study(
    dims=(2,), trials=2, train=600, val=100, test=200, epochs=(2,), svdd_epochs=(1,), bound_samples=5_000, points=50
)
FLOW = {"blocks": 2, "layers": 2, "width": 32, "lr": 2e-3, "batch_size": 256}


# ------------------------------------------------------------------------------------------------------------- records


def test_a_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = records.write_json(tmp_path / "deep" / "record.json", {"a": 1, "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1, "b": "nan"}
    with pytest.raises(TypeError, match="not object"):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_csv_round_trip_and_unknown_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": 0.123456789, "c": None, "d": "x, y"}, {"a": 2, "b": float("inf")}]
    path = records.write_csv(tmp_path / "rows.csv", rows)
    read = records.read_csv(path)
    assert read[0] == {"a": 1, "b": 0.1234568, "c": None, "d": "x, y"}
    assert read[1]["b"] == float("inf")
    with pytest.raises(ValueError, match="no columns"):
        records.write_csv(path, rows, ["a"])
    with pytest.raises(FileNotFoundError, match="run the study"):
        records.read_csv(tmp_path / "absent.csv")


def test_settings_hash_depends_on_values_alone() -> None:
    assert records.settings_hash(TINY) == records.settings_hash(dataclasses.replace(TINY))
    assert records.settings_hash(TINY) != records.settings_hash(dataclasses.replace(TINY, seed=1))
    assert TINY.key() == dataclasses.replace(TINY, trials=7).key() != dataclasses.replace(TINY, seed=1).key()


def test_provenance_names_no_place() -> None:
    found = records.provenance(("torch", "no-such-package"))
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert found["versions"]["no-such-package"] == "absent"
    assert {"revision", "hardware", "system", "started"} <= set(found)
    assert str(Path.home()) not in json.dumps(found)


# -------------------------------------------------------------------------------------------------------------- trials


def test_both_flows_are_searched_in_one_space() -> None:
    assert mixtures.search_space("usf") == mixtures.search_space("non-usf")
    space = mixtures.search_space("usf")
    assert (space["blocks"].low, space["blocks"].high) == (2, 10)
    assert (space["layers"].low, space["layers"].high) == (2, 3)
    assert (mixtures.search_space("deep-svdd")["depth"].low, mixtures.search_space("deep-svdd")["depth"].high) == (2, 6)
    with pytest.raises(ValueError, match="unknown model"):
        mixtures.search_space("gan")
    usf, other = (mixtures.build_flow(m, 4, blocks=2, layers=2, width=8, seed=3) for m in ("usf", "non-usf"))
    assert isinstance(usf, USFlow)
    assert isinstance(other, NonUSFlow)


def test_search_is_a_function_of_the_finished_trials() -> None:
    first = [mixtures.suggest(TINY, "usf", 2, []).settings for _ in range(2)]
    assert first[0] == first[1]
    assert mixtures.suggest(TINY, "non-usf", 2, []).settings != first[0]
    rows = [{**first[0], "status": "ok", "val_loss": 1.0}, {**first[0], "status": "failed", "val_loss": None}]
    third = mixtures.suggest(TINY, "usf", 2, rows)
    assert third.number == 2
    assert third.settings == mixtures.suggest(TINY, "usf", 2, rows).settings


def test_a_trial_can_be_repeated(tmp_path: Path) -> None:
    trial = Trial(TINY, "usf", 2, 0, FLOW)
    row = mixtures.run_trial(trial, tmp_path, "run", threads=None)
    assert row["status"] == "ok"
    assert row["log_det_std"] < 1e-9
    again, arrays = mixtures.repeat(TINY, row)
    for key in ("val_loss", "test_nll", "spearman", "kendall"):
        assert again[key] == pytest.approx(row[key], abs=1e-6), key
    with np.load(tmp_path / f"{trial.name}.npz") as stored:
        assert np.allclose(stored["norm"], arrays["norm"], atol=1e-5)
    assert set(row) <= set(mixtures.COLUMNS)
    # For a USF the norm and the model's own density are one order.
    assert row["spearman"] == pytest.approx(row["spearman_nll"], abs=1e-9)


def test_a_run_resumes_and_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"models": ("deep-svdd", "usf"), "jobs": 1, "progress": False}
    whole = mixtures.run(TINY, tmp_path / "whole", **options)
    calls: list[str] = []
    original = mixtures.run_trial

    def interrupted(trial: Trial, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(trial.name)
        return original(trial, *args, **kwargs)

    monkeypatch.setattr(search, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mixtures.run(TINY, tmp_path / "cut", **options)

    def counted(trial: Trial, *args: Any, **kwargs: Any) -> dict[str, Any]:
        calls.append(trial.name)
        return original(trial, *args, **kwargs)

    monkeypatch.setattr(search, "run_trial", counted)
    resumed = mixtures.run(TINY, tmp_path / "cut", **options)
    assert len(calls) == len(set(calls)) == len(resumed) == 4
    for a, b in zip(whole, resumed, strict=True):
        for key in ("model", "trial", "lr", "settings_hash"):
            assert a[key] == b[key]
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
    before = len(calls)
    mixtures.run(TINY, tmp_path / "cut", **options)
    assert len(calls) == before


def test_a_divergence_is_a_row_with_its_reason(tmp_path: Path) -> None:
    row = mixtures.run_trial(Trial(TINY, "non-usf", 2, 0, {**FLOW, "lr": 1e6}), tmp_path, "run", threads=None)
    assert row["status"] == "failed"
    assert "FloatingPointError" in row["reason"]
    assert mixtures.finished(tmp_path, "non-usf", 2) == [row]
    with pytest.raises(LookupError, match="no successful trial"):
        mixtures.selected([row], "non-usf", 2)


def test_selection_and_oracle() -> None:
    rows = [
        {"model": "usf", "dim": 2, "status": "ok", "trial": 0, "val_loss": 2.0, "spearman": 0.9},
        {"model": "usf", "dim": 2, "status": "ok", "trial": 1, "val_loss": 1.0, "spearman": 0.1},
        {"model": "usf", "dim": 2, "status": "failed", "trial": 2, "val_loss": None, "spearman": None},
    ]
    assert mixtures.selected(rows, "usf", 2)["trial"] == 1
    assert mixtures.selected(rows, "usf", 2, by="spearman")["trial"] == 0


def test_command_line_from_nothing_to_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "usf.study.mixtures", "--profile", "smoke", "--jobs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "gathered" / "density_against_norm.png").stat().st_size > 10_000
    rows = records.read_csv(tmp_path / "gathered" / "trials.csv")
    assert len(rows) == 6
    assert all(row["status"] == "ok" for row in rows)


def test_a_learned_base_beats_a_fixed_one_on_a_shell() -> None:
    """The point of the chapter on limits, at the size of a test."""
    options = dataclasses.replace(
        limits.settings("smoke"), blocks=3, train=6_000, epochs=20, batch_size=128, lr=1e-2, bound_samples=20_000
    )
    fixed, learned = (limits.run_one(options, "shell", base, "run") for base in ("gaussian", "gamma mixture"))
    assert fixed["status"] == learned["status"] == "ok"
    assert learned["excess_nll"] < 0.4 < 0.7 < fixed["excess_nll"]
    assert learned["spearman"] > 0.8
    assert learned["spearman_distance"] < 0.6


@pytest.mark.parametrize("model", ["usf", "non-usf"])
def test_stacked_and_single_trainings_agree(model: str) -> None:
    x = mixtures.data(TINY, 2).train
    rates, seeds = [1e-3, 5e-3, 2e-3], [4, 5, 6]
    single, stacked = (
        [mixtures.build_flow(model, 2, blocks=2, layers=2, width=16, seed=s).double() for s in seeds] for _ in range(2)
    )
    losses = fit_stacked(stacked, x, epochs=3, batch_size=64, lrs=rates, seeds=seeds)
    for k, flow in enumerate(single):
        history = fit(
            flow,
            mixtures.negative_log_likelihood,
            x,
            epochs=3,
            batch_size=64,
            lr=rates[k],
            seed=seeds[k],
            progress=False,
        )
        assert losses[k] == pytest.approx(history.train, rel=1e-9)
        for a, b in zip(flow.parameters(), stacked[k].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-8)
    assert losses[0][-1] != losses[1][-1]
    with pytest.raises(ValueError, match="one rate and one seed"):
        fit_stacked(stacked, x, epochs=1, batch_size=64, lrs=[1e-3], seeds=seeds)


# --------------------------------------------------------------------------------------------------- committed records

COMMITTED = paths.results("mixtures", "trials.csv")
committed = pytest.mark.skipif(not COMMITTED.is_file(), reason="data/results/mixtures holds no records yet")


@committed
def test_committed_records_are_complete() -> None:
    found = mixtures.load()
    rows, settings = found["trials"], mixtures.study("full")
    keys = {(row["model"], row["dim"], row["trial"]) for row in rows}
    assert keys == {(m, d, t) for m in mixtures.MODELS for d in settings.dims for t in range(settings.trials)}
    runs = json.loads((COMMITTED.parent / "provenance.json").read_text())
    for row in rows:
        trial = Trial(
            settings, row["model"], row["dim"], row["trial"], {k: row[k] for k in mixtures.search_space(row["model"])}
        )
        assert row["seed"] == trial.seed
        assert {"revision", "versions", "hardware", "started"} <= set(runs[row["run"]])
        assert not runs[row["run"]]["revision"].endswith("+")
        assert row["status"] == "ok" or row["reason"]
    assert (COMMITTED.parent / "figures" / "points.csv").stat().st_size < 1_000_000


@committed
def test_committed_records_meet_the_expectation() -> None:
    found = mixtures.load()
    best = {(r["model"], r["dim"]): r for r in mixtures.summary(found["trials"], found["bounds"])}
    for dim, lowest in ((2, 0.98), (8, 0.985), (32, 0.985), (128, 0.97)):
        assert best["usf", dim]["spearman"] >= lowest
        assert -0.05 <= best["usf", dim]["above_bound"] <= 1.0
        assert best["usf", dim]["spearman"] > best["non-usf", dim]["spearman"]
    for row in found["trials"]:
        if row["model"] == "usf" and row["status"] == "ok":
            assert row["log_det_std"] < 1e-6


@committed
def test_a_short_live_training_agrees_with_the_records() -> None:
    """The chapter's live slice at a third of its epochs, so with twice its tolerance."""
    found = mixtures.load()
    best = {(r["model"], r["dim"]): r for r in mixtures.summary(found["trials"], found["bounds"])}["usf", 2]
    live = Study(dims=(2,), epochs=(5,), svdd_epochs=(1,))
    model, _ = mixtures.train(
        Trial(live, "usf", 2, 0, {"blocks": 6, "layers": 2, "width": 32, "lr": 8e-3, "batch_size": 512})
    )
    measures, _ = mixtures.evaluate(model, mixtures.data(live, 2))
    gap, bound = found["bounds"][0]["gap"], found["bounds"][0]["bound"]
    assert 100 * (measures["excess_nll"] - gap) / bound == pytest.approx(best["above_bound"], abs=1.2)
    assert measures["spearman"] == pytest.approx(best["spearman"], abs=0.04)


@committed
@pytest.mark.parametrize("dim", [2, 8])
def test_bounds_can_be_computed_again(dim: int) -> None:
    entry = next(row for row in mixtures.load()["bounds"] if row["dim"] == dim)
    small = dataclasses.replace(
        mixtures.study("full"), dims=(dim,), epochs=(1,), svdd_epochs=(1,), bound_samples=200_000
    )
    (again,) = mixtures.bounds(small)
    assert again["gap"] == pytest.approx(entry["gap"], abs=6 * (again["gap_error"] + entry["gap_error"]))
    assert again["gaussian"] == pytest.approx(entry["gaussian"])
    assert again["test_entropy"] == pytest.approx(entry["test_entropy"])
