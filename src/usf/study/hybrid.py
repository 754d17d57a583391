"""The study of figure 6: a VAE with a flow as its prior against one with an affine flow and a plain one. Run it::

    python -m usf.study.hybrid --profile smoke     # seconds
    python -m usf.study.hybrid --profile book      # 27 trainings on one core, features of the frozen backbone known
    python -m usf.study.hybrid --profile full --weights WIDE_RESNET.safetensors --images BOTTLE PILL HAZELNUT

Each training is one JSON file under ``build/hybrid/``, written at once; a killed study continues where it stopped, and
a training that breaks is a row with its reason. ``--publish`` gathers them into ``data/results/hybrid/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from usf import paths
from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.hybrid import PRIORS, FlowVAE, Settings, calibrated
from usf.hybrid.scores import SCORES
from usf.hybrid.vae import Prior
from usf.study import records, textures
from usf.study.images import ImageFolder, hold_out, load_images, read
from usf.study.metrics import auroc
from usf.study.profile import select
from usf.study.training import History, fit

SHARED = (("mvtec_ad_256", "bottle"), ("mvtec_ad_256", "pill"), ("hazelnut_toy_256", "hazelnut"))
"""Classes under ``../shared/images`` that the study uses where they are present."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that decides a training, besides images, weights, prior and seed.

    Attributes:
        model: shape of the model; its prior is replaced by each of ``priors``.
        priors, seeds: what is trained on each class.
        steps: optimiser steps, rounded to whole epochs, so that classes of any size get the same training.
        batch_size, lr, schedule: of Adam.
        patience: epochs without a better bound on a tenth of the training images before a training stops; ``None`` to
            train on them too, to the end.
        held: share of the normal training images that calibrate the scores and are never trained on.
        split_seed: of the shares.
    """

    model: Settings = Settings()  # noqa: RUF009 (frozen)
    priors: tuple[Prior, ...] = PRIORS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    batch_size: int = 16
    lr: float = 3e-3
    schedule: str = "cosine"
    patience: int | None = None
    held: float = 0.2
    split_seed: int = 0

    def key(self) -> str:
        """Name of the settings, without what multiplies the trainings: more seeds or priors continue the same study."""
        return records.settings_hash({**dataclasses.asdict(self), "seeds": None, "priors": None})


def study(profile: str) -> Study:
    """The study in one profile (``smoke``, ``book`` or ``full``)."""
    tiny = Settings(size=32, latent=8, blocks=2, hidden=(16,), width=4, channels=16)
    paper = Settings(
        size=1024, latent=256, blocks=10, hidden=(512, 256), backbone="wide_resnet50_2", stage=4, width=32, channels=512
    )
    return select(
        profile,
        smoke=Study(tiny, seeds=(0,), steps=4, batch_size=4),
        book=Study(Settings(size=64)),
        full=Study(paper, steps=2_000_000, lr=1e-5, schedule="constant", patience=10),
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, 3, size, size) in [0, 1] and their frozen features (N, F), or ``None`` where the backbone learns."""

    images: Tensor
    features: Tensor | None

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and features of some."""
        return self.images[index], None if self.features is None else self.features[index]


@dataclasses.dataclass(frozen=True)
class Data:
    """One class, loaded once for all its trainings."""

    folder: ImageFolder
    weights: Weights
    train: Split
    held: Split
    test: Split


def load(options: Study, folder: ImageFolder, weights: Weights) -> Data:
    """Load a class and, where the backbone is frozen, compute its features."""
    kept, held = hold_out(folder.train, options.held, options.split_seed)
    model = FlowVAE(options.model, weights).eval()

    def split(files: Sequence[Path]) -> Split:
        images = load_images(files, options.model.size)
        if options.model.trainable:
            return Split(images, None)
        with torch.no_grad():
            return Split(images, torch.cat([model.features(part) for part in images.split(16)]))

    return Data(folder, weights, split(kept), split(held), split([sample.path for sample in folder.test]))


def train(options: Study, data: Data, prior: Prior, seed: int, *, progress: bool = False) -> tuple[FlowVAE, History]:
    """A model trained on the ELBO; a function of the settings, the data and the seed.

    Raises:
        FloatingPointError: when the training diverges.
    """
    torch.manual_seed(seed)
    model = FlowVAE(dataclasses.replace(options.model, prior=prior), data.weights)

    def loss(module: nn.Module, index: Tensor) -> Tensor:
        return -cast(FlowVAE, module).terms(*data.train.pick(index)).elbo.mean()

    count = len(data.train.images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.split_seed))
    watched = max(1, count // 10) if options.patience is not None else 0
    size = count - watched
    epochs = max(1, round(options.steps / (size // min(options.batch_size, size))))
    history = fit(
        model,
        loss,
        order[watched:],
        val=order[:watched] if watched else None,
        epochs=epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=seed,
        patience=options.patience,
        schedule=options.schedule,
        progress=progress,
        label=f"{data.folder.name}, {prior}, seed {seed}",
    )
    return model, history


@torch.no_grad()
def evaluate(model: FlowVAE, data: Data) -> dict[str, float]:
    """AUROC of every score (in [0, 1]), and on the held-out normal images the terms of the bound, nats per image."""
    tested = model.scores(data.test.images, data.test.features)
    normals = model.scores(data.held.images, data.held.features)
    labels = data.folder.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        terms = model.eval().terms(data.held.images, data.held.features)
    means, _ = model.posterior(data.test.images, data.test.features)
    return {
        **{f"auroc_{name}": auroc(labels, tested[name]) for name in SCORES},
        "auroc_calibrated": auroc(labels, calibrated(tested, normals)),
        "held_elbo": float(terms.elbo.mean()),
        "held_reconstruction": float(terms.reconstruction.mean()),
        "held_posterior": float(terms.posterior.mean()),
        "held_prior": float(terms.prior.mean()),
        "spread_reconstruction": float(tested.reconstruction.std()),
        "spread_log_prob": float(tested.log_prob.std()),
        "log_det_std": float(model.prior.log_abs_det_jacobian(means).double().std()),
    }


COLUMNS: tuple[str, ...] = tuple(
    """
    class prior seed status reason auroc_reconstruction auroc_norm auroc_log_prob auroc_sum auroc_calibrated
    held_elbo held_reconstruction held_posterior held_prior spread_reconstruction spread_log_prob log_det_std
    epochs seconds trained held tested anomalous manifest weights weights_sha256 settings_hash run
    """.split()
)
"""Columns of ``runs.csv``. AUROC in [0, 1] over the test images; ``held_*`` in nats an image on held-out normal ones;
``spread_*`` and ``log_det_std`` standard deviations over the test images, nats."""


def run_one(options: Study, data: Data, prior: Prior, seed: int, run: str) -> dict[str, Any]:
    """Train and measure once; a divergence is a row with its reason."""
    row: dict[str, Any] = {
        "class": data.folder.name,
        "prior": prior,
        "seed": seed,
        "trained": len(data.train.images),
        "held": len(data.held.images),
        "tested": len(data.folder.test),
        "anomalous": int(data.folder.labels.sum()),
        "manifest": data.folder.manifest.sha256[:12],
        "weights": data.weights.tag,
        "weights_sha256": data.weights.sha256[:12],
        "settings_hash": options.key(),
        "run": run,
    }
    started = time.perf_counter()
    try:
        model, history = train(options, data, prior, seed)
        row |= {"epochs": history.epochs, **evaluate(model, data), "status": "ok"}
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    row["seconds"] = time.perf_counter() - started
    return row


def folders(images: Sequence[str | Path] = (), *, small: bool = False) -> list[ImageFolder]:
    """The classes asked for; else those under ``../shared``; else the built-in textures."""
    found = [read(folder, masks=False) for folder in images]
    if not found:
        present = [paths.shared("images", *parts) for parts in SHARED]
        found = [read(folder, masks=False) for folder in present if folder is not None]
    return found or [read(textures.ensure(small=small), masks=False)]


def run(options: Study, classes: Sequence[ImageFolder], weights: Weights, out: Path) -> list[dict[str, Any]]:
    """Run what is missing under ``out``, one JSON file a training; returns all rows. All classes for one seed first."""
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{options.key()}"
    loaded: dict[str, Data] = {}
    rows = []
    for seed in options.seeds:
        for folder in classes:
            for prior in options.priors:
                # Other images or weights are another training.
                origin = records.settings_hash([folder.manifest.sha256, weights.sha256])
                path = out / f"{folder.name}-{origin}-{prior}-{seed}.json"
                if not path.is_file():
                    if folder.name not in loaded:
                        loaded[folder.name] = load(options, folder, weights)
                    kept = out / "runs" / f"{name}.json"
                    if not kept.is_file():
                        shared = {"settings": options, "threads": torch.get_num_threads(), "weights": weights.tag}
                        records.write_json(kept, {**records.provenance(), **shared})
                    row = run_one(options, loaded[folder.name], prior, seed, name)
                    records.write_json(path, row)
                    shown = row.get("auroc_sum", math.nan)
                    print(
                        f"{folder.name} {prior} seed {seed}: {row['status']}, AUROC of the sum {shown:.3f}", flush=True
                    )
                rows.append(json.loads(path.read_text("utf8")))
    return rows


def publish(rows: Sequence[dict[str, Any]], out: Path, target: Path) -> None:
    """Write ``runs.csv`` and ``provenance.json`` into ``target``."""
    ordered = sorted(rows, key=lambda row: (row["class"], PRIORS.index(row["prior"]), row["seed"]))
    records.write_csv(target / "runs.csv", ordered, COLUMNS)
    used = sorted({row["run"] for row in rows})
    origins = {name: json.loads((out / "runs" / f"{name}.json").read_text("utf8")) for name in used}
    records.write_json(target / "provenance.json", origins)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--images", nargs="*", default=[], help="class folders in MVTec layout")
    parser.add_argument("--weights", default="", help="backbone weights: a safetensors file, 'hub' or 'random'")
    parser.add_argument("--seeds", type=int, nargs="*", help="in place of the profile's")
    parser.add_argument("--size", type=int, help="pixels, in place of the profile's")
    parser.add_argument("--steps", type=int, help="in place of the profile's")
    parser.add_argument("--out", type=Path, help="folder of the records; default: under build/hybrid")
    parser.add_argument("--publish", action="store_true", help="also write data/results/hybrid")
    chosen = parser.parse_args(arguments)
    options = study(chosen.profile)
    if chosen.size:
        options = dataclasses.replace(options, model=dataclasses.replace(options.model, size=chosen.size))
    if chosen.steps:
        options = dataclasses.replace(options, steps=chosen.steps)
    if chosen.seeds:
        options = dataclasses.replace(options, seeds=tuple(chosen.seeds))
    weights = backbones.resolve(chosen.weights, backbone=options.model.backbone)
    out = chosen.out or paths.build("hybrid", options.key())
    torch.set_num_threads(1)
    rows = run(options, folders(chosen.images, small=chosen.profile == "smoke"), weights, out)
    publish(rows, out, paths.results("hybrid") if chosen.publish else out)


if __name__ == "__main__":
    main()
