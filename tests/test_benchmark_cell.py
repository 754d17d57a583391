"""A cell of the benchmark: what is on file after it ran, was stopped, broke, or ran again."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.study import benchmark, detection, features, schema, textures
from usf.study.benchmark import Cell, Outcome, find_images, run_cell
from usf.study.grid import VARIANTS
from usf.study.images import ImageFolder, read
from usf.study.records import settings_hash
from usf.study.schema import Record

AFFINE, USF = VARIANTS["affine"], VARIANTS["additive-lu"]
SCORES = ("norm", "log_prob", "anomalib")


@pytest.fixture(scope="module")
def images() -> ImageFolder:
    return read(textures.ensure(small=True))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return backbones.resolve("random", announce=None)


def small(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "dataset": "textures", "category": "weave", "detector": "fastflow", "profile": "smoke", "seeds": (0,),
        "size": 32, "epochs": 2, "batch_size": 4, "train_images": 6, "per_kind": 1, "model": {"flow_steps": 1},
    }  # fmt: skip
    return Cell(**(values | changes))


def numbers(records: list[Record]) -> list[Record]:
    """The records without what a clock, a meter or a commit in between changes, in one order."""
    same: dict[str, Any] = {"seconds": 0.0, "started": "2026-01-31T12:00:00Z", "revision": "0123456789ab"}
    same |= dict.fromkeys(("seconds_features", "seconds_score", "memory_mb"))
    return sorted((dataclasses.replace(record, **same) for record in records), key=lambda record: str(record.key))


class Calls:
    """A function that counts, and may break at a call."""

    def __init__(self, function: Any, breaks: int | None = None, error: BaseException | None = None) -> None:
        self.function, self.breaks, self.error, self.count = function, breaks, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.breaks:
            assert self.error is not None
            raise self.error
        return self.function(*args, **kwargs)


def test_every_model_and_score_is_a_row_and_nothing_runs_twice(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = small(seeds=(0, 1))
    extracts, builds = Calls(benchmark.extract), Calls(detection.build)
    monkeypatch.setattr(benchmark, "extract", extracts)
    monkeypatch.setattr(detection, "build", builds)
    seen: list[Outcome] = []
    records = run_cell(cell, images, tmp_path, weights=weights, progress=False, on_outcome=seen.append)
    assert (extracts.count, builds.count) == (2, 4), "features once for all: training and test images"
    assert [(r.seed, r.coupling, r.score) for r in records] == [
        (seed, coupling, score) for seed in (0, 1) for coupling in ("affine", "additive") for score in SCORES
    ]
    assert all(r.status == "ok" and r.protocol == "main" and r.epoch == r.epochs_run == 2 for r in records)
    assert len(list(tmp_path.iterdir())) == 4
    assert all(path.suffix == ".json" and not path.name.startswith(".") for path in tmp_path.iterdir())
    assert numbers(schema.read(tmp_path)) == numbers(records)
    first = records[0]
    assert (first.steps, first.train_images, first.test_images, first.test_anomalous) == (4, 6, 8, 7)
    assert first.weights_sha256 == weights.sha256[:16]
    assert first.manifest_sha256 == images.manifest.sha256[:16]
    assert first.settings == settings_hash(cell.settings()) in schema.read_settings(tmp_path)
    assert first.memory_mb is None or first.memory_mb > 50
    assert first.train_nll is not None
    assert len({r.initial_sha256 for r in records}) == 4
    assert {r.log_det_std == 0 for r in records if r.coupling == "additive"} == {True}

    outcome = seen[1]
    assert outcome.variant == USF
    assert not outcome.resumed
    assert outcome.history is not None
    assert outcome.history.epochs == 2
    assert outcome.evaluations["norm"].image_auroc(images.subset(6, 1).labels) == pytest.approx(
        outcome.records[0].image_auroc, rel=1e-5
    )

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run_cell(cell, images, tmp_path, weights=weights, progress=False, on_outcome=seen.append)
    assert (extracts.count, builds.count) == (2, 4), "on record already"
    assert all(outcome.resumed for outcome in seen[4:])
    assert numbers(again) == numbers(records)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_cell_goes_on_where_it_was_and_ends_with_the_same_numbers(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cell = small(seeds=(0, 1))
    whole = run_cell(cell, images, tmp_path / "whole", weights=weights, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(detection, "nll", Calls(detection.nll, breaks=3, error=error))  # at the end of a training
        with pytest.raises(type(error)):
            run_cell(cell, images, tmp_path / "parts", weights=weights, progress=False)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    torch.manual_seed(1234)  # whatever the process drew before
    builds = Calls(detection.build)
    monkeypatch.setattr(detection, "build", builds)
    parts = run_cell(cell, images, tmp_path / "parts", weights=weights, cache=tmp_path / "cache", progress=False)
    assert builds.count == 2
    assert numbers(parts) == numbers(whole), "also with the features from a cache"


def test_a_model_that_fails_is_a_row_and_the_others_go_on(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = detection.build

    def build(detector: Any, size: int, w: Weights, options: Any, **more: Any) -> Any:
        model = real(detector, size, w, options, **more)
        if options.coupling == "affine":
            with torch.no_grad():
                model.norms[1].weight.fill_(1e30)
        return model

    cell = small()
    with monkeypatch.context() as patch:
        patch.setattr(detection, "build", build)
        records = run_cell(cell, images, tmp_path, weights=weights, progress=False)
    broken, fine = records[:3], records[3:]
    assert [r.status for r in broken] == ["failed"] * 3
    assert {r.score for r in broken} == set(SCORES)
    assert all(r.status == "ok" for r in fine)
    assert "coupling affine" in broken[0].error
    assert "epoch 1, step 1" in broken[0].error
    assert (broken[0].epochs_run, broken[0].steps, broken[0].image_auroc) == (0, 0, None)
    assert broken[0].parameters > 0

    builds = Calls(real)
    monkeypatch.setattr(detection, "build", builds)
    run_cell(cell, images, tmp_path, weights=weights, progress=False)
    assert builds.count == 0, "a failure is on record too"
    retried = run_cell(cell, images, tmp_path, weights=weights, progress=False, retry_failed=True)
    assert builds.count == 1
    assert all(r.status == "ok" for r in retried)
    assert all(r.status == "ok" for r in schema.read(tmp_path))


def test_a_failure_between_epochs_says_how_far_it_came(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(detection.evaluate_scores, breaks=2, error=RuntimeError("out of memory\non two lines"))
    monkeypatch.setattr(detection, "evaluate_scores", calls)
    records = run_cell(small(variants=(USF,), trace=(1, 2)), images, tmp_path, weights=weights, progress=False)
    failed = [r for r in records if r.status == "failed"]
    assert {(r.protocol, r.epochs_run, r.steps) for r in failed} == {("main", 2, 4)}
    assert failed[0].error == "RuntimeError: out of memory on two lines"
    assert {(r.protocol, r.epoch, r.status) for r in records if r.protocol == "trace"} == {("trace", 1, "ok")}


def test_one_score_that_is_not_finite_does_not_take_the_others_along(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = detection.evaluate_scores

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        scores = found["log_prob"].scores.copy()
        scores[2] = np.nan
        found["log_prob"] = dataclasses.replace(found["log_prob"], scores=scores, nonfinite=7)
        return found

    monkeypatch.setattr(detection, "evaluate_scores", evaluate)
    records = run_cell(small(variants=(AFFINE,)), images, tmp_path, weights=weights, progress=False)
    assert {r.score: r.status for r in records} == {"norm": "ok", "log_prob": "failed", "anomalib": "ok"}
    failed = next(r for r in records if r.status == "failed")
    assert failed.nonfinite == 7
    assert "score log_prob: the score of image 2 is not finite" in failed.error


def test_a_likelihood_that_is_not_finite_is_an_empty_cell(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "nll", lambda *args, **kwargs: float("inf"))
    cell = small(variants=(AFFINE,), val_share=0.34)
    records = run_cell(cell, images, tmp_path, weights=weights, progress=False)
    assert {(r.status, r.train_nll, r.val_nll) for r in records} == {("ok", None, None)}


def test_trace_scores_on_the_way_and_changes_nothing(images: ImageFolder, weights: Weights, tmp_path: Path) -> None:
    plain = run_cell(small(variants=(USF,)), images, tmp_path / "plain", weights=weights, progress=False)
    traced = run_cell(
        small(variants=(USF,), trace=(1, 2)), images, tmp_path / "traced", weights=weights, progress=False
    )
    main = [r for r in traced if r.protocol == "main"]
    assert numbers(main) == numbers(plain)
    rows = {(r.epoch, r.score): r for r in traced if r.protocol == "trace"}
    assert set(rows) == {(epoch, score) for epoch in (1, 2) for score in SCORES}
    for record in main:
        last = rows[2, record.score]
        assert (last.image_auroc, last.pixel_auroc, last.aupro) == (
            record.image_auroc,
            record.pixel_auroc,
            record.aupro,
        )
    assert rows[1, "norm"].log_det_std == 0
    assert rows[1, "norm"].steps == 2
    # Asking for more than is on file trains again; asking for less does not.
    names = [path.name for path in (tmp_path / "plain").iterdir()]
    assert names == [path.name for path in (tmp_path / "traced").iterdir()], "the same training"
    run_cell(small(variants=(USF,), trace=(1,)), images, tmp_path / "plain", weights=weights, progress=False)
    assert {r.protocol for r in schema.read(tmp_path / "plain")} == {"main", "trace"}


def test_the_papers_protocol_selects_on_test_images_and_its_rows_say_so(
    images: ImageFolder, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    areas = iter([0.6, 0.9, 0.8, 0.7, 0.95])
    watched: list[str] = []

    def evaluate(model: Any, test: Any, *, score: str, batch_size: int) -> Any:
        watched.append(score)
        value = next(areas)
        return type("Result", (), {"image_auroc": lambda self, labels: value})()

    monkeypatch.setattr(detection, "evaluate", evaluate)
    cell = small(variants=(USF,), epochs=5, stopping="paper", patience=2, watch_score="norm")
    records = run_cell(cell, images, tmp_path, weights=weights, progress=False)
    assert watched == ["norm"] * 4
    assert {(r.protocol, r.epoch, r.epochs_run) for r in records} == {("paper", 2, 4)}
    assert small().settings() != cell.settings(), "another training than that of the main protocol"


def test_held_out_images_are_not_trained_on(images: ImageFolder, weights: Weights, tmp_path: Path) -> None:
    cell = small(variants=(USF,), seeds=(0, 1), stopping="normal", val_share=0.34, epochs=2)
    records = run_cell(cell, images, tmp_path, weights=weights, progress=False)
    assert {(r.train_images, r.val_images, r.steps) for r in records} == {(4, 2, r.epochs_run) for r in records}
    assert all(r.val_nll is not None for r in records)
    assert all(r.protocol == "main" for r in records)


def test_same_training_from_a_cache_and_from_memory(images: ImageFolder, weights: Weights, tmp_path: Path) -> None:
    cell = small(variants=(AFFINE,))
    results = [
        run_cell(cell, images, tmp_path / name, weights=weights, cache=cache, progress=False)
        for name, cache in (("memory", None), ("written", tmp_path / "cache"), ("read", tmp_path / "cache"))
    ]
    assert numbers(results[0]) == numbers(results[1]) == numbers(results[2])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_cache_stops_the_cell_before_it_trains(images: ImageFolder, weights: Weights, tmp_path: Path) -> None:
    cell = small(variants=(AFFINE,))
    run_cell(cell, images, tmp_path / "one", weights=weights, cache=tmp_path / "cache", progress=False)
    victim = sorted((tmp_path / "cache").glob("*/level0.npy"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    with pytest.raises(features.FeatureCacheError, match=r"level0.npy is missing or damaged"):
        run_cell(cell, images, tmp_path / "two", weights=weights, cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "two").exists()


def test_settings_are_checked(images: ImageFolder, tmp_path: Path) -> None:
    for changes, message in (
        ({"seeds": ()}, "at least one"),
        ({"stopping": "best"}, "stopping='best'"),
        ({"stopping": "normal"}, "needs val_share"),
        ({"val_share": 1.0}, "val_share=1.0"),
        ({"stopping": "paper", "scores": ("norm",)}, "watches the score 'anomalib'"),
        ({"scores": ("max",)}, "scores: max unknown"),
        ({"trace": (3,)}, r"epochs \[3\]"),
        ({"detector": "padim"}, "detector='padim'"),
        ({"profile": "large"}, "profile='large'"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    with pytest.raises(ValueError, match="the images are of weave, the cell is about bottle"):
        run_cell(small(category="bottle"), images, tmp_path)
    with pytest.raises(FileNotFoundError, match="no images of mvtec/ghost: give the folder"):
        find_images("mvtec", "ghost")


@pytest.mark.parametrize("detector", ["fastflow", "cflow", "uflow"])
def test_profiles(detector: Any) -> None:
    smoke, book, full = (
        benchmark.cell("mvtec", "bottle", detector, profile=name) for name in ("smoke", "book", "full")
    )
    assert smoke.backbone == book.backbone == "resnet18"
    assert (full.epochs, full.batch_size, full.stopping) == (100, 32, "normal")
    assert benchmark.cell("mvtec", "bottle", detector, profile="book", epochs=3).epochs == 3
    with pytest.raises(ValueError, match="unknown profile"):
        benchmark.cell("mvtec", "bottle", detector, profile="huge")


@pytest.mark.parametrize("detector", ["cflow", "uflow"])
def test_the_other_detectors_run_in_profile_smoke(
    detector: Any, images: ImageFolder, weights: Weights, tmp_path: Path
) -> None:
    cell = benchmark.cell(
        "textures", "weave", detector, profile="smoke", variants=(USF,), size=32, train_images=3, per_kind=1
    )
    records = run_cell(cell, images, tmp_path, weights=weights, progress=False)
    assert [r.status for r in records] == ["ok"] * 3, records[0].error
    assert records[0].nonfinite == 0


def command(out: Path, *more: str) -> list[str]:
    model = '{"flow_steps": 1}'
    return [
        sys.executable, "-m", "usf.study.benchmark", "textures", "weave", "fastflow", "--profile", "smoke", "--quiet",
        "--no-cache", "--weights", "random", "--size", "32", "--batch-size", "4", "--train-images", "6", "--per-kind",
        "1", "--model", model, "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_from_outside_it_loses_one_training_at_most(
    how: signal.Signals, weights: Weights, tmp_path: Path
) -> None:
    out = tmp_path / "records"
    process = subprocess.Popen(command(out, "--epochs", "15", "--seeds", "0-20"), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.json")) if out.is_dir() else []) < 2:
            assert process.poll() is None, "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        code = process.wait(timeout=30)
    finally:
        process.kill()
    assert code == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 2 <= len(done) < 42
    records = schema.read(out)  # whole records, every one
    assert len(records) == 3 * len(done)
    # What goes on afterwards leaves the finished ones alone, and needs no clearing up.
    seeds = {record.seed for record in records}
    cell = small(seeds=tuple(sorted(seeds)), variants=(AFFINE, USF), epochs=15)
    after = run_cell(cell, read(textures.ensure(small=True)), out, weights=weights, progress=False)
    assert len(after) == 3 * 2 * len(seeds)
    assert all(record.status == "ok" for record in after)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.json") if path.name in done} == done


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path / "records", "--epochs", "1", "--variants", "additive", "--trace", "1")[3:]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert benchmark.main(arguments) == 0
        first = capsys.readouterr().out
        assert benchmark.main(arguments) == 0
        second = capsys.readouterr().out
        assert "additive seed 0, norm: image AUROC" in first
        assert second.count("(on record)") == 3
        assert len(schema.read(tmp_path / "records")) == 6
        broken = command(tmp_path / "broken", "--epochs", "1", "--lr", "1e30", "--variants", "affine")[3:]
        assert benchmark.main(broken) == 1
        assert "failed: NotFiniteError: " in capsys.readouterr().out
        with pytest.raises(SystemExit):
            benchmark.main([*arguments, "--stopping", "normal"])
        assert "needs val_share" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_nothing_in_a_record_names_a_folder_of_this_machine(
    images: ImageFolder, weights: Weights, tmp_path: Path
) -> None:
    run_cell(small(variants=(AFFINE,)), images, tmp_path, weights=weights, progress=False)
    text = next(tmp_path.iterdir()).read_text()
    for folder in (str(tmp_path), str(images.root), os.path.expanduser("~")):
        assert folder not in text
