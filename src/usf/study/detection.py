"""The fast path: train and evaluate an image detector on frozen features, without a trainer around it.

One epoch here is one epoch of anomalib's ``Engine`` on the same features: same loss, same optimiser. What is gone is
what does not change the result: the backbone in every step, data-loader workers, checkpoints and test metrics in every
epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from usf.detectors.backbones import Weights
from usf.study.features import Features
from usf.study.images import batches
from usf.study.metrics import auroc

if TYPE_CHECKING:
    from usf.detectors import FastflowModel, FlowOptions
    from usf.detectors.model import Score

__all__ = ["Evaluation", "FitHistory", "build", "evaluate", "fit", "nll"]


@dataclasses.dataclass(frozen=True)
class FitHistory:
    """What a training run did.

    Attributes:
        train: mean negative log-likelihood of the training features, nats per dimension, one per epoch, measured while
            the weights change.
        val: the same of the held-out normal features after each epoch; empty without them.
        seconds: wall time.
        steps: optimiser steps.
        best_epoch: 1-based epoch whose weights the model has.
    """

    train: list[float]
    val: list[float]
    seconds: float
    steps: int
    best_epoch: int

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return len(self.train)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a detector says about a set of images.

    Attributes:
        maps: anomaly maps at the input size, (N, size, size), float32.
        scores: one per image, the maximum of its map, (N,).
        energies: half the squared norm of all latents of an image, (N,), float64, nats.
        log_dets: log-determinant of each stage's flow per image, (N, stages), float32, nats.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    energies: NDArray[np.float64]
    log_dets: NDArray[np.float32]

    @property
    def nll(self) -> NDArray[np.float64]:
        """Negative log-likelihood of each image's features, (N,), nats, without the constant of the base density."""
        return np.asarray(self.energies - self.log_dets.astype(np.float64).sum(axis=1))

    def image_auroc(self, labels: NDArray[np.bool_]) -> float:
        """Area under the ROC curve over images; ``labels`` (N,)."""
        return auroc(labels, self.scores)

    def pixel_auroc(self, masks: NDArray[np.bool_]) -> float:
        """Area under the ROC curve over all pixels of all images; ``masks`` (N, size, size)."""
        return auroc(masks, self.maps)

    @property
    def log_det_std(self) -> float:
        """Standard deviation over images of the total log-determinant, nats: zero for a uniformly scaling flow."""
        return float(self.log_dets.astype(np.float64).sum(axis=1).std())


def build(size: int, weights: Weights, options: FlowOptions, *, seed: int, flow_steps: int = 8) -> FastflowModel:
    """A FastFlow for ``size`` x ``size`` images whose initial weights are a function of ``seed``.

    The seed is set before anything is constructed, and torch's own stream is left where it was.
    """
    from usf.detectors import FastflowModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FastflowModel((size, size), weights, options, flow_steps=flow_steps)


def nll(model: FastflowModel, features: Features, *, batch_size: int = 32) -> float:
    """Mean negative log-likelihood of ``features`` under the flow, nats per dimension.

    The layer normalisation before the flow is not part of the density (its Jacobian is not counted), as in anomalib.
    """
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for part in batches(len(features), batch_size):
            maps = [level.to(device) for level in features.batch(part)]
            latents = model.latents(maps)
            total += (latents.energies() - latents.log_abs_det()).sum().item()
    return total / len(features) / features.dimension + 0.5 * math.log(2 * math.pi)


def fit(
    model: FastflowModel,
    features: Features,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    seed: int = 0,
    val: Features | None = None,
    patience: int | None = None,
    progress: bool = True,
    label: str = "FastFlow",
) -> FitHistory:
    """Maximum likelihood with Adam on cached features (paper, section 5.1; its settings are the defaults).

    Args:
        model: from :func:`build`; trained in place.
        features: of normal images.
        epochs: at most this many.
        batch_size, lr, weight_decay: of Adam.
        seed: of the shuffles.
        val: features of normal images that are not trained on.
        patience: with ``val``, stop after this many epochs without a better likelihood, and restore the best weights.
            Nothing is ever selected on test images here.
        progress: show a bar.
        label: the bar's title.

    Raises:
        ValueError: ``patience`` without ``val``, or fewer than one epoch or image a batch.
        FloatingPointError: a loss that is not finite; names the model, the epoch and the step.
    """
    if patience is not None and val is None:
        raise ValueError("patience needs val: held-out normal features to watch")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}: both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.trainable_parameters(), lr=lr, weight_decay=weight_decay)
    device = next(model.parameters()).device
    history: list[float] = []
    held_out: list[float] = []
    best: dict[str, Tensor] | None = None
    best_epoch, steps = 0, 0
    start = time.perf_counter()
    model.train()
    count = math.ceil(len(features) / batch_size)
    with tqdm(total=epochs * count, desc=label, unit="step", disable=not progress) as bar:
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(features), generator=generator)
            total = 0.0
            for part in batches(len(features), batch_size):
                maps = [level.to(device) for level in features.batch(order[part])]
                loss = next(model.losses(maps))
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{label} (coupling {model.options.coupling}): the loss is {value} at epoch {epoch}, "
                        f"step {steps + 1}. Lower the learning rate, or look for images that are empty or corrupt"
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                steps += 1
                total += value * len(maps[0])
                bar.update()
            history.append(total / len(features) / features.dimension + 0.5 * math.log(2 * math.pi))
            shown = {"nats/dim": f"{history[-1]:.3f}"}
            if val is not None:
                held_out.append(nll(model, val))
                shown["held out"] = f"{held_out[-1]:.3f}"
                if held_out[-1] <= min(held_out):
                    best_epoch = epoch
                    if patience is not None:
                        best = copy.deepcopy(model.state_dict())
            bar.set_postfix(shown)
            if patience is not None and epoch - best_epoch >= patience:
                break
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return FitHistory(
        history, held_out, time.perf_counter() - start, steps, best_epoch if best is not None else len(history)
    )


def evaluate(
    model: FastflowModel, features: Features, *, score: Score | None = None, batch_size: int = 16
) -> Evaluation:
    """Maps, scores and log-determinants; every image on its own, whatever the batch.

    Args:
        model: trained or not; left in evaluation mode.
        features: of test images.
        score: how latents become a map, by default the model's own way.
        batch_size: images at a time.

    Raises:
        FloatingPointError: a score that is not finite; names the first image by its position.
    """
    model.eval()
    device = next(model.parameters()).device
    maps, energies, log_dets = [], [], []
    with torch.inference_mode():
        for part in batches(len(features), batch_size):
            latents = model.latents([level.to(device) for level in features.batch(part)])
            maps.append(model.maps(latents, score)[:, 0].cpu())
            energies.append(latents.energies().cpu())
            log_dets.append(torch.stack([det.flatten(1).sum(dim=1) for det in latents.log_dets], dim=1).cpu())
    anomaly = torch.cat(maps).numpy()
    scores = anomaly.max(axis=(1, 2))
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FloatingPointError(f"the score of image {first} is not finite (coupling {model.options.coupling})")
    return Evaluation(anomaly, scores, torch.cat(energies).numpy(), torch.cat(log_dets).numpy())
