"""The study of the hybrid: resumed, reproducible, failures as rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the detectors extra")

from usf import paths
from usf.detectors import resolve
from usf.detectors.backbones import Weights
from usf.hybrid import FlowVAE
from usf.study import hybrid, records, textures
from usf.study.images import ImageFolder, read
from usf.study.status import count_records

WEIGHTS = resolve("random", announce=None)


@pytest.fixture(scope="module")
def folder() -> ImageFolder:
    return read(textures.ensure(small=True))


@pytest.fixture(scope="module")
def options() -> hybrid.Study:
    return dataclasses.replace(hybrid.study("smoke"), priors=("usf", "gaussian"), steps=2)


def test_a_study_continues_where_it_stopped_and_keeps_failures(
    options: hybrid.Study, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    original = hybrid.train

    def broken(study: hybrid.Study, data: hybrid.Data, prior: str, seed: int) -> object:
        trained.append(prior)
        if prior == "gaussian":
            raise FloatingPointError("the loss is nan at epoch 0, step 1")
        return original(study, data, prior, seed)

    monkeypatch.setattr(hybrid, "train", broken)
    rows = hybrid.run(options, [folder], WEIGHTS, tmp_path)
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert "loss is nan" in rows[1]["reason"]
    assert hybrid.run(options, [folder], WEIGHTS, tmp_path) == rows
    assert trained == ["usf", "gaussian"]

    hybrid.publish([tmp_path], tmp_path / "published")
    table = records.read_csv(tmp_path / "published" / "runs.csv")
    assert [row["prior"] for row in table] == ["usf", "gaussian"]
    assert set(table[0]) == set(hybrid.COLUMNS)
    assert count_records(tmp_path, "published/*.csv") == (1, 1)
    origins = json.loads((tmp_path / "published" / "runs.json").read_text())
    assert table[0]["run"] in origins
    assert origins[table[0]["run"]]["settings"]["steps"] == 2


def test_a_training_is_a_function_of_its_seed(options: hybrid.Study, folder: ImageFolder) -> None:
    data = hybrid.load(options, folder, WEIGHTS)

    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # what the process drew before must not matter
        return torch.nn.utils.parameters_to_vector(hybrid.train(options, data, "usf", seed)[0].trainable_parameters())

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_no_image_is_both_trained_on_and_held_out(options: hybrid.Study, folder: ImageFolder) -> None:
    data = hybrid.load(options, folder, WEIGHTS)
    count = len(folder.train)
    assert len(data.normal) == count
    for choosing in (False, True):
        study = dataclasses.replace(options, choosing=choosing)
        divisions = [hybrid.divide(study, count, seed) for seed in (0, 0, 1)]
        for division in divisions:
            parts = torch.cat([division.trained, division.watched, division.held])
            assert sorted(parts.tolist()) == list(range(count))
            assert (len(division.watched) > 0) == choosing
        assert torch.equal(divisions[0].held, divisions[1].held)
        assert set(divisions[0].held.tolist()) != set(divisions[2].held.tolist())
    # Who chooses a learning rate sees none of the images that calibrate or test what was chosen.
    assert set(divisions[0].held.tolist()) == set(hybrid.divide(options, count, 0).held.tolist())
    with pytest.raises(ValueError, match="none to train on"):
        hybrid.divide(dataclasses.replace(options, held=0.99), 3, 0)

    images, features = data.normal.pick(torch.tensor([1, 0]))
    assert features is not None
    assert torch.equal(images, data.normal.images[:2].flip(0))
    torch.testing.assert_close(features, FlowVAE(options.model, WEIGHTS).features(images), rtol=1e-4, atol=1e-5)
    parts = list(data.test.batches(5))
    assert torch.equal(torch.cat([part[0] for part in parts]), data.test.images)


def test_a_training_touches_only_its_own_images(
    options: hybrid.Study, folder: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    original = hybrid.Split.pick

    def watched(split: hybrid.Split, index: torch.Tensor | slice = slice(None)) -> object:
        assert isinstance(index, torch.Tensor)
        seen.update(index.tolist())
        return original(split, index)

    data = hybrid.load(options, folder, WEIGHTS)
    monkeypatch.setattr(hybrid.Split, "pick", watched)
    options = dataclasses.replace(options, steps=20)
    hybrid.train(options, data, "usf", 3)
    assert seen == set(hybrid.divide(options, len(data.normal), 3).trained.tolist())


def test_watched_images_have_the_same_noise_after_every_epoch(options: hybrid.Study, folder: ImageFolder) -> None:
    # A training that changes nothing measures nothing new.
    still = dataclasses.replace(options, lr=1e-12, schedule="constant", steps=30, patience=99)
    _, history = hybrid.train(still, hybrid.load(still, folder, WEIGHTS), "usf", 0)
    assert len(history.val) > 4
    assert max(history.val) - min(history.val) < 1e-4 * abs(history.val[0])
    assert max(history.train) - min(history.train) > 1e-3 * abs(history.train[0])  # where it is drawn


def test_a_choice_sees_no_test_image(
    options: hybrid.Study, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("scores were computed")

    monkeypatch.setattr(FlowVAE, "scores", refuse)
    choosing = dataclasses.replace(options, choosing=True, priors=("usf",))
    assert choosing.key() != options.key()
    (row,) = hybrid.run(choosing, [folder], WEIGHTS, tmp_path)
    assert row["status"] == "ok"
    assert row["held"] == len(hybrid.divide(choosing, len(folder.train), 0).watched)
    assert not any(key.startswith("auroc") for key in row)
    assert row["held_elbo"] == pytest.approx(row["held_reconstruction"] - row["held_posterior"] + row["held_prior"])


def test_a_measured_bound_is_the_mean_over_draws(options: hybrid.Study, folder: ImageFolder) -> None:
    data = hybrid.load(options, folder, WEIGHTS)
    torch.manual_seed(0)
    model = FlowVAE(options.model, WEIGHTS).eval()
    images, features = data.test.pick(slice(0, 18))  # more than one batch
    state = torch.get_rng_state()
    one, again = (hybrid.bound(model, images, features, draws=64) for _ in range(2))
    assert one == again
    assert torch.equal(state, torch.get_rng_state())
    assert hybrid.bound(model, images, None, draws=64) == pytest.approx(one, rel=1e-5)
    assert features is not None
    with torch.no_grad():
        drawn = torch.stack([model.terms(images, features).elbo.mean() for _ in range(200)])
    error = float(drawn.std()) * (1 / 200 + 1 / 64) ** 0.5
    assert abs(float(drawn.mean()) - one["held_elbo"]) < 4 * error


def test_a_number_that_is_not_finite_is_a_failure(
    options: hybrid.Study, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid, "bound", lambda *_, **__: {"held_elbo": float("nan"), "held_prior": 1.0})
    row = hybrid.run(dataclasses.replace(options, priors=("gaussian",)), [folder], WEIGHTS, tmp_path)[0]
    assert (row["status"], row["reason"]) == ("failed", "FloatingPointError: not finite: held_elbo")


def test_the_command_line_trains_continues_and_gathers(
    folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--profile", "smoke", "--weights", "random", "--images", str(folder.root), "--steps", "2"]
    monkeypatch.setattr(hybrid.paths, "results", lambda *parts: tmp_path.joinpath("results", *parts))
    for out, changes in (("one", ["--priors", "usf"]), ("two", ["--priors", "usf", "gaussian", "--lr", "1e-3"])):
        hybrid.main([*common, *changes, "--out", str(tmp_path / out)])
    assert len(records.read_csv(tmp_path / "two" / "table" / "runs.csv")) == 2
    hybrid.main(["--gather", "both", str(tmp_path / "one"), str(tmp_path / "two")])
    table = records.read_csv(tmp_path / "results" / "hybrid" / "both.csv")
    assert [(row["lr"], row["prior"]) for row in table] == [(0.001, "usf"), (0.001, "gaussian"), (0.003, "usf")]
    origins = json.loads((tmp_path / "results" / "hybrid" / "both.json").read_text())
    assert {row["run"] for row in table} == set(origins)
    with pytest.raises(FileNotFoundError, match="no trainings"):
        hybrid.main(["--gather", "both", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(("profile", "stages"), [("book", 3), ("full", 4)])
def test_weights_are_asked_for_with_the_stages_that_are_used(
    profile: str, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def resolve(weights: str, **options: object) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(hybrid.backbones, "resolve", resolve)
    with pytest.raises(KeyboardInterrupt):
        hybrid.main(["--profile", profile])
    assert asked["layers"] == ("layer1", "layer2", "layer3", "layer4")[:stages]


def test_the_committed_records_are_of_this_study() -> None:
    options = hybrid.study("book")
    table = records.read_csv(paths.results("hybrid", "runs.csv"))
    origins = json.loads(paths.results("hybrid", "runs.json").read_text("utf8"))
    main = [row for row in table if row["settings_hash"] == options.key()]
    kinds = itertools.product([name for _, name in hybrid.SHARED], options.priors, options.seeds)
    assert sorted((row["class"], row["prior"], row["seed"]) for row in main) == sorted(kinds)
    assert len(main) == 27
    for row in table:
        assert set(row) == set(hybrid.COLUMNS)
        assert row["status"] == "ok"
        assert row["run"].endswith(row["settings_hash"])
        settings = origins[row["run"]]["settings"]
        assert (row["size"], row["steps"], row["lr"]) == (settings["model"]["size"], settings["steps"], settings["lr"])
    for row in main:
        assert (row["size"], row["steps"], row["lr"]) == (options.model.size, options.steps, options.lr)
        # Those of this module's division, with the settings of the provenance.
        count = row["trained"] + row["held"]
        assert row["held"] == len(hybrid.divide(options, count, row["seed"]).held)
        shared = json.loads(json.dumps(dataclasses.asdict(options)))
        origin = origins[row["run"]]["settings"]
        assert {**origin, "seeds": None, "priors": None} == {**shared, "seeds": None, "priors": None}

    choice = records.read_csv(paths.results("hybrid", "choice", "rates.csv"))
    rates = json.loads(paths.results("hybrid", "choice", "rates.json").read_text("utf8"))
    for row in choice:
        tried = dataclasses.replace(options, lr=row["lr"], choosing=True)
        assert (row["status"], row["tested"], row["settings_hash"]) == ("ok", 0, tried.key())
        assert row["run"] in rates
        assert row["seed"] not in options.seeds
    assert {(row["lr"], row["prior"]) for row in choice} >= {(options.lr, "usf"), (options.lr, "non-usf")}


def test_the_full_profile_has_the_settings_of_the_papers_code() -> None:
    full = hybrid.study("full")
    assert (full.model.latent, full.model.blocks, full.model.hidden) == (256, 10, (512, 256))
    assert (full.model.sigma, full.model.clamp, full.model.activation) == (0.1, 2.0, "softplus")
    assert (full.batch_size, full.lr, full.patience, len(full.seeds)) == (16, 1e-5, 10, 3)
    assert full.model.backbone == "wide_resnet50_2"
    assert full.model.stage == 4
    assert full.model.trainable  # end to end
    assert full.key() != hybrid.study("book").key()
    assert full.key() == dataclasses.replace(full, seeds=(0, 1, 2, 3, 4)).key()


def test_a_step_of_the_full_profile_moves_all_parts_but_no_statistics(folder: ImageFolder) -> None:
    full = hybrid.study("full")
    # The paper's model and optimiser on small images, few at a time.
    small = dataclasses.replace(full, model=dataclasses.replace(full.model, size=64), steps=1, batch_size=2)
    weights = Weights("wide_resnet50_2", "checkpoint", "none", "ab" * 32)  # timm's own, by the seed
    data = hybrid.load(small, folder.subset(5, 1), weights)
    assert data.normal.features is None
    torch.manual_seed(0)
    before = FlowVAE(small.model, weights).state_dict()
    model, history = hybrid.train(small, data, "usf", 0)
    assert (history.epochs, len(history.val)) == (1, 1)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    stages = {name.split(".")[2] for name in moved if name.startswith("encoder.trunk.")}
    assert stages == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert {name.split(".")[0] for name in moved} == {"encoder", "decoder", "prior"}
    assert not any("running" in name for name in moved)
    measured = hybrid.evaluate(model, data, hybrid.divide(small, len(data.normal), 0).held)
    assert all(map(math.isfinite, measured.values()))
    assert measured["log_det_std"] == 0
