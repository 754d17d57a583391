"""The study of the hybrid: resumed, reproducible, failures as rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the detectors extra")

from usf.detectors import resolve
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

    hybrid.publish(rows, tmp_path, tmp_path / "published")
    table = records.read_csv(tmp_path / "published" / "runs.csv")
    assert [row["prior"] for row in table] == ["usf", "gaussian"]
    assert set(table[0]) == set(hybrid.COLUMNS)
    assert count_records(tmp_path, "published/*.csv") == (1, 1)
    origins = json.loads((tmp_path / "published" / "provenance.json").read_text())
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
    assert len(data.train.images) + len(data.held.images) == len(folder.train)
    distance = torch.cdist(data.train.images.flatten(1), data.held.images.flatten(1))
    assert distance.min() > 0
    assert data.test.features is not None
    torch.testing.assert_close(
        data.test.features[:2], FlowVAE(options.model, WEIGHTS).features(data.test.images[:2]), rtol=1e-4, atol=1e-5
    )


def test_the_full_profile_has_the_settings_of_the_papers_code() -> None:
    full = hybrid.study("full")
    assert (full.model.latent, full.model.blocks, full.model.hidden) == (256, 10, (512, 256))
    assert (full.model.sigma, full.model.clamp, full.model.activation) == (0.1, 2.0, "softplus")
    assert (full.batch_size, full.lr, full.patience, len(full.seeds)) == (16, 1e-5, 10, 3)
    assert full.model.backbone == "wide_resnet50_2"
    assert full.model.stage == 4
    assert full.key() != hybrid.study("book").key()
    assert full.key() == dataclasses.replace(full, seeds=(0, 1, 2, 3, 4)).key()
