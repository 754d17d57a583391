"""Two moons with outliers: the data of the paper's figure 1, with a density that is known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MEAN = torch.tensor([0.5, 0.25], dtype=torch.float64)
_SCALE = torch.tensor([0.87, 0.5], dtype=torch.float64)
_BOX = 3.0


@dataclass(frozen=True)
class Moons:
    """Normal samples and outliers, float32 of shape (n, 2).

    Constants, not the samples, shift and scale them to about zero mean and unit variance.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    outliers: Tensor
    noise: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density of the normal class in nats, shape x.shape[:-1], float64.

        A moon is a half circle, uniform in its angle, plus normal noise: the density is an integral over the angle,
        here a mean over 2000 angles, far denser than the noise is wide.
        """
        angle = (torch.arange(1000, dtype=torch.float64) + 0.5) * (math.pi / 1000)
        outer = torch.stack([angle.cos(), angle.sin()], -1)
        inner = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
        arcs = torch.cat([outer, inner])
        raw = (x.double() * _SCALE + _MEAN).reshape(-1, 2)
        # In chunks: a page of points against 2000 angles is all that ever lies in memory.
        kernel = torch.cat(
            [torch.logsumexp(-torch.cdist(part, arcs).square() / (2 * self.noise**2), -1) for part in raw.split(4096)]
        ).reshape(x.shape[:-1])
        log_jacobian = float(_SCALE.log().sum())
        return kernel - math.log(len(arcs)) - math.log(2 * math.pi * self.noise**2) + log_jacobian


def two_moons(samples: int, outliers: int, seed: int, *, noise: float = 0.1) -> Moons:
    """Moons from scikit-learn and outliers uniform on the square [-3, 3]^2, some of which fall on a moon.

    Args:
        samples: of each of the training and the test set; the validation set has a quarter of it.
        outliers: how many.
        seed: of everything.
        noise: standard deviation around the half circles, before scaling.
    """
    from sklearn.datasets import make_moons

    def draw(count: int, stream: int) -> Tensor:
        points, _ = make_moons(count, noise=noise, random_state=4 * seed + stream)
        return ((torch.from_numpy(points) - _MEAN) / _SCALE).float()

    generator = torch.Generator().manual_seed(4 * seed + 3)
    square = (2 * torch.rand(outliers, 2, generator=generator) - 1) * _BOX
    return Moons(draw(samples, 0), draw(max(4, samples // 4), 1), draw(samples, 2), square, noise)
