"""What anomalib's own scores, losses and metrics do to a ranking: the chapter *Dropping a USF into anomalib*.

Each function isolates one line of the library. The first three need no detector: they show the failure where it is
certain. Whether it happens on images is measured with the same functions on a detector's scores.
"""

from __future__ import annotations

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.metrics.auroc import _AUROC
from anomalib.models.image.cflow.anomaly_map import AnomalyMapGenerator as CflowMap
from anomalib.models.image.uflow.anomaly_map import AnomalyMapGenerator as UflowMap
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.post_processing import PostProcessor
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "best_mean_square",
    "cflow_scores",
    "fitted",
    "log_det_weight",
    "post_processed",
    "saturation_point",
    "squashed_auroc",
    "tied",
    "uflow_scores",
    "uniform_anomalies",
]

Floats = NDArray[np.float32]


def uniform_anomalies(count: int = 8, size: int = 8, *, seed: int = 0) -> tuple[Tensor, NDArray[np.bool_]]:
    """Log-likelihoods of ``count`` normal images, then ``count`` that are unlikely everywhere alike.

    Normal: uniform in [-0.5, 0] at every position; anomalous: -5 at every one. No position of an anomalous image is as
    likely as any of a normal one.

    Returns:
        log-likelihoods per channel (2 * count, size, size), nats, and labels (2 * count,).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = -0.5 * torch.rand(count, size, size, generator=generator)
    return torch.cat((normal, torch.full((count, size, size), -5.0))), np.repeat([False, True], count)


def cflow_scores(log_probs: Tensor, batch_size: int) -> Floats:
    """Image scores by anomalib's CFlow map of one layer's log-likelihoods, ``batch_size`` images at a time.

    Args:
        log_probs: (N, H, W), nats per channel.
        batch_size: of the scoring.
    """
    height, width = int(log_probs.shape[1]), int(log_probs.shape[2])
    generator = CflowMap(pool_layers=["layer1"])
    parts = [
        generator(distribution=[part.flatten()], height=[height], width=[width], image_size=(height, width))
        for part in log_probs.split(batch_size)
    ]
    return np.asarray(torch.cat(parts).amax(dim=(1, 2)))


def uflow_scores(mean_squares: Tensor) -> Floats:
    """anomalib's U-Flow score of images whose latents have these mean squares, at every position and scale; (N,)."""
    z = mean_squares.float().sqrt().reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    return np.asarray(UflowMap((2, 2))([z]).amax(dim=(1, 2, 3)))


def saturation_point() -> float:
    """The smallest mean squared latent, to 1e-3, at which anomalib's U-Flow score is exactly 1 in float32."""
    low, high = 0.0, 100.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if uflow_scores(torch.tensor([middle]))[0] == 1:
            high = middle
        else:
            low = middle
    return high


def _uflow_loss(z: list[Tensor], log_det: Tensor) -> Tensor:
    loss: Tensor = UFlowLoss.forward(z, log_det)  # type: ignore[arg-type]  # its model passes one tensor, not a list
    return loss


def log_det_weight(latents: list[Tensor], log_det: Tensor) -> float:
    """The weight of the log-determinant beside the energy in anomalib's U-Flow loss, likelihood's being 1.

    Read off the gradient: that of the loss in the log-determinants over that in the energies.

    Args:
        latents: of a batch, one tensor (N, C, H, W) a scale.
        log_det: of each image, (N,), nats.
    """
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    z = [level.detach().double() for level in latents]
    loss = _uflow_loss([gain * level for level in z], log_det.detach().double() + shift)
    by_gain, by_shift = torch.autograd.grad(loss, (gain, shift))
    # Of the likelihood, summed over the batch: -N for a nat more of every image, and twice the energy.
    energy = sum(float(level.square().sum()) for level in z)
    return float(-by_shift / len(log_det) * energy / by_gain)


def best_mean_square(latents: list[Tensor], *, steps: int = 200) -> float:
    """Mean squared latent when one scale for all latents is trained with anomalib's U-Flow loss.

    Under the likelihood it would be 1.

    Args:
        latents: of a batch, one tensor (N, C, H, W) a scale.
        steps: of Adam.
    """
    z = [level.detach().double() for level in latents]
    count = len(z[0])
    dimension = sum(level[0].numel() for level in z)
    log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.Adam([log_scale], lr=0.05)
    energy = sum(float(level.square().sum()) for level in z)
    for _ in range(steps):
        optimiser.zero_grad()
        scaled = [log_scale.exp() * level for level in z]
        _uflow_loss(scaled, (dimension * log_scale).expand(count)).backward()
        optimiser.step()
    return float((2 * log_scale.detach()).exp()) * energy / (count * dimension)


def squashed_auroc(labels: NDArray[np.bool_], scores: Floats, batch_size: int) -> float:
    """The area under the ROC curve by anomalib's metric as it comes: a sigmoid for batches that leave [0, 1].

    Args:
        labels: any shape, the first axis images.
        scores: same shape.
        batch_size: images per update of the metric.
    """
    metric = _AUROC()
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        metric.update(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]).int())
    return float(metric.compute())


def fitted(low: float, high: float, *, threshold: float) -> PostProcessor:
    """anomalib's post-processor as if validation scores and maps had this range and best threshold."""
    post = PostProcessor().eval()
    for name in ("image", "pixel"):
        for buffer, value in ((f"{name}_min", low), (f"{name}_max", high), (f"_{name}_threshold", threshold)):
            getattr(post, buffer).fill_(value)
    return post


def post_processed(post_processor: PostProcessor, scores: Floats, maps: Floats) -> tuple[Floats, Floats]:
    """Scores (N,) and maps (N, H, W) as anomalib's fitted post-processor hands them to the metrics."""
    with torch.no_grad():
        done = post_processor(
            InferenceBatch(pred_score=torch.from_numpy(scores), anomaly_map=torch.from_numpy(maps)[:, None])
        )
    return np.asarray(done.pred_score), np.asarray(done.anomaly_map)[:, 0]


def tied(values: Floats) -> int:
    """How many of the values equal the largest one, if more than one does; else 0."""
    count = int((values == values.max()).sum())
    return count if count > 1 else 0
