"""The fast path: train and evaluate an image detector on frozen features, without a trainer around it.

One epoch here is one epoch of anomalib's ``Engine`` on the same features: same loss, same optimiser. What is gone is
what does not change the result: the backbone in every step, data-loader workers, checkpoints and test metrics in every
epoch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.detectors.backbones import Weights, digest
from usf.study.features import Features
from usf.study.images import batches
from usf.study.metrics import auroc

if TYPE_CHECKING:
    from usf.detectors import FlowOptions
    from usf.detectors.model import DetectorModel, Loss, Score

__all__ = [
    "Detector",
    "Evaluation",
    "FitHistory",
    "NotFiniteError",
    "Patience",
    "Stopping",
    "build",
    "evaluate",
    "evaluate_scores",
    "fit",
    "initial_digest",
    "nll",
]

Detector = Literal["fastflow", "cflow", "uflow"]
Stopping = Literal["fixed", "normal", "paper"]

MODELS: dict[str, str] = {"fastflow": "FastflowModel", "cflow": "CflowModel", "uflow": "UflowModel"}
"""Detector -> its model in ``usf.detectors``."""

CHECK_EVERY = 64
"""Steps after which losses are looked at: each look waits for the device."""


class NotFiniteError(FloatingPointError):
    """A loss or score that is not finite; the message says whose, and when.

    Attributes:
        epoch: 1-based, of a loss.
        steps: optimiser steps whose losses were finite, of a loss.
        count: positions without a finite likelihood, of a score.
    """

    def __init__(self, message: str, *, epoch: int | None = None, steps: int = 0, count: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.steps = steps
        self.count = count


@dataclasses.dataclass
class FitHistory:
    """What a training run did, or has done so far.

    Attributes:
        stopping: the rule, see :func:`fit`. ``"paper"`` selects on test images.
        initial_sha256: of the weights before the first step, see :func:`initial_digest`.
        losses: mean training loss of each epoch, in the detector's own units, measured while the weights change.
        train: the same as mean negative log-likelihood in nats per dimension, where the loss is one; else empty.
        val: negative log-likelihood of the held-out normal features after each epoch, nats per dimension, the trained
            scale of the layer normalisation counted whatever the loss; empty without them.
        watched: what ``watch`` returned after each epoch; empty without it.
        seconds: wall time, without what ``watch`` took.
        steps: optimiser steps.
        best_epoch: 1-based epoch whose weights the model has.
    """

    stopping: Stopping
    initial_sha256: str
    losses: list[float] = dataclasses.field(default_factory=list)
    train: list[float] = dataclasses.field(default_factory=list)
    val: list[float] = dataclasses.field(default_factory=list)
    watched: list[float | None] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    best_epoch: int = 0

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return len(self.losses)


@dataclasses.dataclass
class Patience:
    """Stop after ``patience`` epochs without a new best value.

    >>> rule = Patience(2)
    >>> [rule.better(epoch, value) for epoch, value in enumerate([3.0, 1.0, 2.0, 2.0], start=1)]
    [True, True, False, False]
    >>> rule.best_epoch, rule.over
    (2, True)
    """

    patience: int
    best: float = math.inf
    best_epoch: int = 0
    over: bool = False

    def better(self, epoch: int, value: float) -> bool:
        """Whether ``value``, lower is better, is the best so far; says in ``over`` when to stop."""
        if value < self.best:
            self.best, self.best_epoch = value, epoch
            return True
        self.over = epoch - self.best_epoch >= self.patience
        return False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a detector says about a set of images.

    Attributes:
        maps: anomaly maps at the input size, (N, size, size), float32.
        scores: one per image, the maximum of its map, (N,).
        energies: half the squared norm of all latents of an image, (N,), float64, nats.
        log_dets: log-determinant of each stage's flow per image, (N, stages), float32, nats.
        nonfinite: positions of all stages and images whose likelihood is not finite.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    energies: NDArray[np.float64]
    log_dets: NDArray[np.float32]
    nonfinite: int = 0

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

    def check(self, name: str) -> None:
        """Raise a :exc:`NotFiniteError` that names the first image, by its position, whose score is not finite."""
        if not np.isfinite(self.scores).all():
            first = int(np.flatnonzero(~np.isfinite(self.scores))[0])
            raise NotFiniteError(f"{name}: the score of image {first} is not finite", count=self.nonfinite)


def build(
    detector: Detector,
    size: int,
    weights: Weights,
    options: FlowOptions,
    *,
    seed: int,
    loss: Loss | None = None,
    score: Score | None = None,
    **model_options: Any,
) -> DetectorModel:
    """A detector for ``size`` x ``size`` images whose initial weights are a function of ``seed``.

    The seed is set before anything is constructed, and torch's own stream is left where it was.

    Args:
        detector: ``"fastflow"``, ``"cflow"`` or ``"uflow"``.
        size: pixels.
        weights: of the backbone.
        options: what the flow's blocks are made of.
        seed: of the initial weights and permutations.
        loss: see the model; by default its own default.
        score: how latents become a map, where nothing else is asked for later; by default the model's own default.
        model_options: the model's other arguments, e.g. ``flow_steps``.

    Raises:
        ValueError: an unknown detector; what the model refuses.
    """
    if detector not in MODELS:
        raise ValueError(f"detector={detector!r}: choose one of {', '.join(map(repr, MODELS))}")
    from usf import detectors

    constructor = getattr(detectors, MODELS[detector])
    model_options |= {name: value for name, value in (("loss", loss), ("score", score)) if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: DetectorModel = constructor((size, size), weights, options, **model_options)
    return model


def initial_digest(model: nn.Module) -> str:
    """SHA-256 of a detector's weights, permutations included, without the backbone (which has a hash of its own)."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    # anomalib's names for where a backbone is; U-Flow keeps trained layer normalisations there too.
    own = [key for key in state if key in trained or key.split(".", 1)[0] not in ("feature_extractor", "encoder")]
    return digest({key: state[key] for key in own})


def _name(model: DetectorModel, label: str | None) -> str:
    return f"{label or model.label} (coupling {model.options.coupling}, mixing {model.options.mixing})"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def nll(model: DetectorModel, features: Features, *, batch_size: int = 32, counted: bool = False) -> float:
    """Mean negative log-likelihood of ``features`` under the flow, nats per dimension.

    What counts as the flow follows the model's loss: under ``loss="anomalib"`` the layer normalisation before
    FastFlow's and U-Flow's flow is not part of the density, under ``"mle"`` its trained scale is.

    Args:
        model: left in evaluation mode.
        features: of any images.
        batch_size: images at a time.
        counted: count that scale whatever the loss. Then a model that only shrinks its features gains nothing.
    """
    model.eval()
    device = _device(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    kind = model.loss_kind
    try:
        if counted:
            model.loss_kind = "mle"
        with torch.inference_mode():
            for part in batches(len(features), batch_size):
                latents = model.latents([level.to(device) for level in features.batch(part)])
                total += (latents.energies() - latents.log_abs_det()).sum()
    finally:
        model.loss_kind = kind
    return float(total.item() / len(features) / features.dimension + 0.5 * math.log(2 * math.pi))


def fit(
    model: DetectorModel,
    features: Features,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float | None = None,
    seed: int = 0,
    stopping: Stopping = "fixed",
    patience: int = 3,
    val: Features | None = None,
    watch: Callable[[DetectorModel, FitHistory], float | None] | None = None,
    progress: bool = True,
    label: str | None = None,
) -> FitHistory:
    """Train on cached features with the model's own loss and optimiser (paper, section 5.1).

    Args:
        model: from :func:`build`; trained in place, left in evaluation mode.
        features: of normal images.
        epochs: at most this many.
        batch_size: images.
        lr: learning rate; by default the model's own.
        seed: of the shuffles.
        stopping: ``"fixed"``: after ``epochs``. ``"normal"``: after ``patience`` epochs without a better likelihood of
            ``val``; the best weights are restored, and no test image is looked at. ``"paper"``: the same with the value
            that ``watch`` returns, the image AUROC of the *test* images, higher is better: selection on test data, for
            comparison with numbers that were made so.
        patience: epochs.
        val: features of normal images that are not trained on; their likelihood is measured after every epoch, with the
            trained scale before the flow counted: without it the value can fall while the model gets worse.
        watch: called after every epoch with the model and the history so far; what it returns is kept.
        progress: show a bar.
        label: the bar's title and the errors' first word; by default the detector's name.

    Raises:
        ValueError: a stopping rule without what it needs, or fewer than one epoch or image a batch.
        NotFiniteError: a loss that is not finite; names the detector, its coupling, the epoch and the step.
    """
    if stopping not in get_args(Stopping):
        raise ValueError(f"stopping={stopping!r}: choose one of {', '.join(map(repr, get_args(Stopping)))}")
    if stopping == "normal" and val is None:
        raise ValueError("stopping='normal' needs val: held-out normal features to watch")
    if stopping == "paper" and watch is None:
        raise ValueError("stopping='paper' needs watch: a function that returns the test images' AUROC")
    if epochs < 1 or batch_size < 1 or patience < 1:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}, patience={patience}: all must be at least 1")
    name, device = _name(model, label), _device(model)
    # Two streams: the order of the images is the same for every detector and coupling.
    shuffle = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed)
    history = FitHistory(stopping, initial_digest(model))
    rule = Patience(patience)
    best: list[Tensor] | None = None
    watching = 0.0
    start = time.perf_counter()
    with (
        model.fitting() as optimiser,
        tqdm(total=epochs * len(features), desc=label or model.label, unit="image", disable=not progress) as bar,
    ):
        if lr is not None:
            for group in optimiser.param_groups:
                group["lr"] = lr
        schedule = model.epoch_schedule(optimiser)
        for epoch in range(1, epochs + 1):
            model.train()
            order = torch.randperm(len(features), generator=shuffle)
            checker = _Losses(name, epoch, history)
            for part in batches(len(features), batch_size):
                maps = [level.to(device) for level in features.batch(order[part])]
                optimiser.zero_grad(set_to_none=True)
                for loss in model.gradients(maps, draws):
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    checker.add(loss, len(maps[0]))
                bar.update(len(maps[0]))
            if schedule is not None:
                schedule.step()
            history.losses.append(checker.mean())
            model.eval()
            shown = {"loss": f"{history.losses[-1]:.4g}"}
            if model.loss_is_nll:
                history.train.append(history.losses[-1] / features.dimension + 0.5 * math.log(2 * math.pi))
                shown = {"nats/dim": f"{history.train[-1]:.3f}"}
            if val is not None:
                history.val.append(nll(model, val, counted=True))
                shown["held out"] = f"{history.val[-1]:.3f}"
            history.best_epoch = epoch
            history.seconds = time.perf_counter() - start - watching
            if watch is not None:
                before = time.perf_counter()
                history.watched.append(watch(model, history))
                watching += time.perf_counter() - before
            bar.set_postfix(shown, refresh=False)
            if stopping == "fixed":
                continue
            if rule.better(epoch, _value(history, name)):
                best = [parameter.detach().clone() for parameter in model.trainable_parameters()]
            if rule.over:
                break
    if best is not None:
        with torch.no_grad():
            for parameter, kept in zip(model.trainable_parameters(), best, strict=True):
                parameter.copy_(kept)
        history.best_epoch = rule.best_epoch
    return history


def _value(history: FitHistory, name: str) -> float:
    """What early stopping goes by, lower is better."""
    value = history.val[-1] if history.stopping == "normal" else history.watched[-1]
    if value is None or not math.isfinite(value):
        what = "held-out likelihood" if history.stopping == "normal" else "value of watch"
        raise NotFiniteError(
            f"{name}: the {what} is {value} after epoch {history.epochs}", epoch=history.epochs, steps=history.steps
        )
    return value if history.stopping == "normal" else -value


class _Losses:
    """The losses of one epoch, left on the device until a look at them is due."""

    def __init__(self, name: str, epoch: int, history: FitHistory) -> None:
        self.name, self.epoch, self.history = name, epoch, history
        self.pending: list[Tensor] = []
        self.sizes: list[int] = []
        self.total, self.weight = 0.0, 0

    def add(self, loss: Tensor, images: int) -> None:
        """One optimiser step's loss, on a batch of ``images``."""
        self.pending.append(loss)
        self.sizes.append(images)
        if len(self.pending) >= CHECK_EVERY:
            self._look()

    def mean(self) -> float:
        """Over the epoch, each step weighted by the images of its batch."""
        self._look()
        return self.total / self.weight

    def _look(self) -> None:
        if not self.pending:
            return
        for value, images in zip(torch.stack(self.pending).tolist(), self.sizes, strict=True):
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"{self.name}: the loss is {value} at epoch {self.epoch}, step {self.history.steps + 1}. Lower the "
                    "learning rate, or look for images that are empty or corrupt",
                    epoch=self.epoch,
                    steps=self.history.steps,
                )
            self.history.steps += 1
            self.total += value * images
            self.weight += images
        self.pending.clear()
        self.sizes.clear()


def evaluate_scores(
    model: DetectorModel, features: Features, scores: Sequence[Score], *, batch_size: int = 16
) -> dict[Score, Evaluation]:
    """The same latents scored in several ways; values that are not finite are counted, not refused.

    Args:
        model: trained or not; left in evaluation mode.
        features: of test images.
        scores: see :meth:`DetectorModel.maps <usf.detectors.model.DetectorModel.maps>`.
        batch_size: images at a time. Only CFlow's ``"anomalib"`` score depends on it.
    """
    model.eval()
    device = _device(model)
    maps: dict[Score, list[Tensor]] = {score: [] for score in scores}
    energies, log_dets = [], []
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for part in batches(len(features), batch_size):
            latents = model.latents([level.to(device) for level in features.batch(part)])
            for score in scores:
                maps[score].append(model.maps(latents, score)[:, 0].float().cpu())
            energies.append(latents.energies().cpu())
            log_dets.append(torch.stack([det.flatten(1).sum(dim=1) for det in latents.log_dets], dim=1).float().cpu())
            for z, log_det in zip(latents.z, latents.log_dets, strict=True):
                nonfinite += (~torch.isfinite(z.square().sum(dim=1) - log_det)).sum()
    found: dict[Score, Evaluation] = {}
    for score in scores:
        anomaly = torch.cat(maps.pop(score)).numpy()
        found[score] = Evaluation(
            anomaly,
            anomaly.max(axis=(1, 2)),
            torch.cat(energies).numpy(),
            torch.cat(log_dets).numpy(),
            int(nonfinite.item()),
        )
    return found


def evaluate(
    model: DetectorModel, features: Features, *, score: Score | None = None, batch_size: int = 16
) -> Evaluation:
    """Maps, scores and log-determinants; every image on its own, whatever the batch.

    Args:
        model: trained or not; left in evaluation mode.
        features: of test images.
        score: how latents become a map, by default the model's own way.
        batch_size: images at a time. Only CFlow's ``"anomalib"`` score depends on it.

    Raises:
        NotFiniteError: a score that is not finite; names the detector and the first image by its position.
    """
    chosen = score or model.score
    result = evaluate_scores(model, features, [chosen], batch_size=batch_size)[chosen]
    result.check(_name(model, None))
    return result
