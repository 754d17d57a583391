"""The study of figure 6: a VAE with a flow as its prior against one with an affine flow and a plain one. Run it::

    python -m usf.study.hybrid --profile smoke     # seconds
    python -m usf.study.hybrid --profile book      # 27 trainings on one core, features of the frozen backbone known
    python -m usf.study.hybrid --profile full --weights WIDE_RESNET.safetensors --images BOTTLE PILL HAZELNUT

Each training is one JSON file under ``build/hybrid/``, written at once; a killed study continues where it stopped, and
a training that breaks is a row with its reason. What is committed is gathered from there::

    python -m usf.study.hybrid --gather runs build/hybrid/KEY build/hybrid/OTHER_KEY

The learning rate was chosen with ``--choose --lr RATE``, by the bound on a tenth of the training images, which are then
not trained on; neither test images nor those of the calibration are looked at. ``choice/rates.csv`` has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
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
from usf.study.images import ImageFolder, load_images, read
from usf.study.metrics import auroc
from usf.study.profile import select
from usf.training import History, fit

SHARED = (("mvtec_ad_256", "bottle"), ("mvtec_ad_256", "pill"), ("hazelnut_toy_256", "hazelnut"))
"""Classes under ``../shared/images`` that the study uses where they are present."""

WATCHED = 0.1
"""Share of the images left to train on that stops a training, or chooses a learning rate."""

DRAWS = 8
"""Samples of the posterior in a measured bound, per image."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that decides a training, besides images, weights, prior and seed.

    Attributes:
        model: shape of the model; its prior is replaced by each of ``priors``.
        priors, seeds: what is trained on each class. A seed draws the division of the normal images, the initial
            weights and the batches, so that the priors of a seed meet the same images.
        steps: optimiser steps, rounded to whole epochs, so that classes of any size get the same training.
        batch_size, lr, schedule: of Adam.
        patience: epochs without a better bound on the watched images before a training stops; ``None`` to train on
            them too, to the end.
        held: share of the normal training images that calibrate the scores and are never trained on.
        choosing: measure nothing but the bound on the watched images.
    """

    model: Settings = Settings()  # noqa: RUF009 (frozen)
    priors: tuple[Prior, ...] = PRIORS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    batch_size: int = 16
    lr: float = 3e-3
    schedule: str = "cosine"
    patience: int | None = None
    held: float = 0.2
    choosing: bool = False

    def key(self) -> str:
        """Name of the settings, without what multiplies the trainings: more seeds or priors continue the same study."""
        return records.settings_hash({**dataclasses.asdict(self), "seeds": None, "priors": None})


def study(profile: str) -> Study:
    """The study in one profile (``smoke``, ``book`` or ``full``)."""
    tiny = Settings(size=32, latent=8, blocks=2, hidden=(16,), width=4, channels=16)
    paper = Settings(
        size=1024,
        latent=256,
        blocks=10,
        hidden=(512, 256),
        backbone="wide_resnet50_2",
        stage=4,
        trainable=True,
        width=32,
        channels=512,
    )
    return select(
        profile,
        smoke=Study(tiny, seeds=(0,), steps=4, batch_size=4),
        book=Study(),
        full=Study(paper, steps=2_000_000, lr=1e-5, schedule="constant", patience=10),
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, 3, size, size) in [0, 1] and their frozen features (N, F), or ``None`` where the backbone learns."""

    images: Tensor
    features: Tensor | None
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Images and features of some, where the model is."""
        features = None if self.features is None else self.features[index].to(self.device)
        return self.images[index].to(self.device), features

    def batches(self, size: int = 16) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All of them, in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.pick(slice(start, start + size))


@dataclasses.dataclass(frozen=True)
class Data:
    """One class, loaded once for all its trainings: its normal training images and its test images."""

    folder: ImageFolder
    weights: Weights
    normal: Split
    test: Split


@dataclasses.dataclass(frozen=True)
class Division:
    """What becomes of the normal training images: positions of those trained on, watched (maybe none) and held out."""

    trained: Tensor
    watched: Tensor
    held: Tensor


def divide(options: Study, count: int, seed: int) -> Division:
    """The division of ``count`` images that belongs to a seed.

    Raises:
        ValueError: no image is left to train on.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(options.held * count))
    watching = options.choosing or options.patience is not None
    watched = max(1, round(WATCHED * (count - held))) if watching else 0
    if held + watched >= count:
        raise ValueError(f"{count} normal images, of which {held} are held out and {watched} watched: none to train on")
    return Division(order[held + watched :], order[held : held + watched], order[:held])


def load(options: Study, folder: ImageFolder, weights: Weights, device: str = "cpu") -> Data:
    """Load a class and, where the backbone is frozen, compute its features."""
    model = FlowVAE(options.model, weights).eval().to(device)

    def split(files: Sequence[Path]) -> Split:
        images = load_images(files, options.model.size)
        if options.model.trainable:
            return Split(images, None, device)
        with torch.no_grad():
            features = [model.features(part.to(device)).cpu() for part in images.split(16)]
        return Split(images, torch.cat(features), device)

    return Data(folder, weights, split(folder.train), split([sample.path for sample in folder.test]))


def train(options: Study, data: Data, prior: Prior, seed: int, *, progress: bool = False) -> tuple[FlowVAE, History]:
    """A model trained on the ELBO; a function of the settings, the data and the seed.

    Raises:
        FloatingPointError: when the training diverges.
    """
    division = divide(options, len(data.normal), seed)
    torch.manual_seed(seed)
    model = FlowVAE(dataclasses.replace(options.model, prior=prior), data.weights).to(data.normal.device)
    # The watched images get the same noise after every epoch, or luck would choose the epoch.
    shape = (len(division.watched), options.model.latent)
    fixed = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(data.normal.device)

    def loss(module: nn.Module, index: Tensor) -> Tensor:
        noise = None if module.training else fixed
        return -cast(FlowVAE, module).terms(*data.normal.pick(index), noise=noise).elbo.mean()

    size = len(division.trained)
    history = fit(
        model,
        loss,
        division.trained,
        val=division.watched if options.patience is not None else None,
        epochs=max(1, round(options.steps / (size // min(options.batch_size, size)))),
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
def bound(model: FlowVAE, images: Tensor, features: Tensor | None, *, draws: int = DRAWS) -> dict[str, float]:
    """Means over images and ``draws`` samples of the posterior of the bound and its terms, nats per image.

    The noise is the same in every call, so that models are compared at equal luck.
    """
    generator = torch.Generator().manual_seed(0)
    totals = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(images), 16):
        part = images[start : start + 16]
        known = model.features(part) if features is None else features[start : start + 16]
        for _ in range(draws):
            noise = torch.randn((len(part), model.settings.latent), generator=generator).to(part.device)
            terms = model.terms(part, known, noise=noise)
            totals += torch.stack(
                [t.double().sum() for t in (terms.reconstruction, terms.posterior, terms.prior)]
            ).cpu()
    reconstruction, posterior, prior = (totals / (draws * len(images))).tolist()
    return {
        "held_elbo": reconstruction - posterior + prior,
        "held_reconstruction": reconstruction,
        "held_posterior": posterior,
        "held_prior": prior,
    }


@torch.no_grad()
def evaluate(model: FlowVAE, data: Data, held: Tensor) -> dict[str, float]:
    """AUROC of every score (in [0, 1]), and on the held-out normal images the terms of the bound, nats per image.

    Args:
        held: positions of the normal images that were not trained on; they calibrate the scores.
    """
    images, features = data.test.pick()
    tested, normals = model.scores(images, features), model.scores(*data.normal.pick(held))
    labels = data.folder.labels
    volumes = [model.prior.log_abs_det_jacobian(model.posterior(*part)[0]) for part in data.test.batches()]
    return {
        **{f"auroc_{name}": auroc(labels, tested[name]) for name in SCORES},
        "auroc_calibrated": auroc(labels, calibrated(tested, normals)),
        **bound(model, *data.normal.pick(held)),
        "spread_reconstruction": float(tested.reconstruction.std()),
        "spread_log_prob": float(tested.log_prob.std()),
        "log_det_std": float(torch.cat(volumes).double().std()),
    }


COLUMNS: tuple[str, ...] = tuple(
    """
    class prior size steps lr seed status reason
    auroc_reconstruction auroc_norm auroc_log_prob auroc_sum auroc_calibrated
    held_elbo held_reconstruction held_posterior held_prior spread_reconstruction spread_log_prob log_det_std
    epochs seconds cpu_seconds trained held tested anomalous manifest weights weights_sha256 settings_hash run
    """.split()
)
"""Columns of a table of trainings. AUROC in [0, 1] over the test images; ``held_*`` in nats an image on normal images
that were not trained on; ``spread_*`` and ``log_det_std`` standard deviations over the test images, nats. Where a
learning rate is chosen there is no AUROC, ``held`` images are the watched ones, and none were ``tested``."""


def run_one(options: Study, data: Data, prior: Prior, seed: int, run: str) -> dict[str, Any]:
    """Train and measure once; a divergence is a row with its reason."""
    division = divide(options, len(data.normal), seed)
    row: dict[str, Any] = {
        "class": data.folder.name,
        "prior": prior,
        "size": options.model.size,
        "steps": options.steps,
        "lr": options.lr,
        "seed": seed,
        "trained": len(division.trained),
        "held": len(division.watched if options.choosing else division.held),
        "tested": 0 if options.choosing else len(data.folder.test),
        "anomalous": 0 if options.choosing else int(data.folder.labels.sum()),
        "manifest": data.folder.manifest.sha256[:12],
        "weights": data.weights.tag,
        "weights_sha256": data.weights.sha256[:12],
        "settings_hash": options.key(),
        "run": run,
    }
    started, used = time.perf_counter(), time.process_time()
    try:
        model, history = train(options, data, prior, seed)
        if options.choosing:
            measured = bound(model, *data.normal.pick(division.watched))
        else:
            measured = evaluate(model, data, division.held)
        if broken := [key for key, value in measured.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite: {', '.join(broken)}")
        row |= {"epochs": history.epochs, **measured, "status": "ok"}
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    row["seconds"], row["cpu_seconds"] = time.perf_counter() - started, time.process_time() - used
    return row


def folders(images: Sequence[str | Path] = (), *, small: bool = False) -> list[ImageFolder]:
    """The classes asked for; else those under ``../shared``; else the built-in textures."""
    found = [read(folder, masks=False) for folder in images]
    if not found:
        present = [paths.shared("images", *parts) for parts in SHARED]
        found = [read(folder, masks=False) for folder in present if folder is not None]
    return found or [read(textures.ensure(small=small), masks=False)]


def run(
    options: Study, classes: Sequence[ImageFolder], weights: Weights, out: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
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
                        loaded[folder.name] = load(options, folder, weights, device)
                    kept = out / "runs" / f"{name}.json"
                    if not kept.is_file():
                        shared = {"settings": options, "threads": torch.get_num_threads(), "weights": weights.tag}
                        records.write_json(kept, {**records.provenance(), **shared, "device": device})
                    row = run_one(options, loaded[folder.name], prior, seed, name)
                    records.write_json(path, row)
                    shown = ("held_elbo", "auroc_sum", "auroc_log_prob")
                    numbers = ", ".join(f"{key} {row[key]:.4g}" for key in shown if key in row)
                    print(f"{folder.name} {prior} seed {seed}: {row['status']}, {numbers}", flush=True)
                rows.append(json.loads(path.read_text("utf8")))
    return rows


def publish(outs: Sequence[Path], target: Path, name: str = "runs") -> None:
    """Gather the trainings under ``outs`` into ``NAME.csv`` and their origins into ``NAME.json`` in ``target``.

    Raises:
        FileNotFoundError: a folder without trainings.
    """
    rows: list[dict[str, Any]] = []
    origins = {}
    for out in outs:
        found = [json.loads(path.read_text("utf8")) for path in sorted(out.glob("*.json"))]
        if not found:
            raise FileNotFoundError(f"{out} holds no trainings: run the study first, or name its folder")
        rows += found
        for run in {row["run"] for row in found}:
            origins[run] = json.loads((out / "runs" / f"{run}.json").read_text("utf8"))
    rows.sort(key=lambda r: (-r["size"], -r["steps"], r["lr"], r["class"], PRIORS.index(r["prior"]), r["seed"]))
    records.write_csv(target / f"{name}.csv", rows, COLUMNS)
    records.write_json(target / f"{name}.json", origins)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--images", nargs="*", default=[], help="class folders in MVTec layout")
    parser.add_argument("--weights", default="", help="backbone weights: a safetensors file, 'hub' or 'random'")
    parser.add_argument("--seeds", type=int, nargs="*", help="in place of the profile's")
    parser.add_argument("--priors", choices=PRIORS, nargs="*", help="in place of all")
    parser.add_argument("--size", type=int, help="pixels, in place of the profile's")
    parser.add_argument("--steps", type=int, help="in place of the profile's")
    parser.add_argument("--lr", type=float, help="in place of the profile's")
    parser.add_argument("--choose", action="store_true", help="measure the bound on watched training images alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of the trainings; default: under build/hybrid")
    parser.add_argument(
        "--gather", nargs="+", metavar=("NAME", "FOLDER"), help="train nothing: write data/results/hybrid/NAME.csv"
    )
    chosen = parser.parse_args(arguments)
    if chosen.gather:
        name, *outs = chosen.gather
        publish([Path(out) for out in outs], paths.results("hybrid"), name)
        return
    options = study(chosen.profile)
    if chosen.size:
        options = dataclasses.replace(options, model=dataclasses.replace(options.model, size=chosen.size))
    given = {name: getattr(chosen, name) for name in ("steps", "lr", "seeds", "priors")}
    changes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v}
    options = dataclasses.replace(options, **changes, choosing=chosen.choose)
    # A ResNet-18 under ../shared may lack the last stage; the stages that are needed decide where weights come from.
    weights = backbones.resolve(chosen.weights, backbone=options.model.backbone, layers=options.model.needs)
    out = chosen.out or paths.build("hybrid", options.key())
    torch.set_num_threads(1 if chosen.device == "cpu" else torch.get_num_threads())
    run(options, folders(chosen.images, small=chosen.profile == "smoke"), weights, out, chosen.device)
    publish([out], out / "table")


if __name__ == "__main__":
    main()
