"""Base distributions, and the bilateral log-normal of the determinant prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, constraints
from torch.distributions.utils import broadcast_all


class Base(nn.Module):
    """The distribution a flow maps the data to, on events of ``shape``.

    A subclass writes ``log_prob``, ``rsample`` and ``distance``, and ``settings`` (JSON-able constructor arguments
    besides ``shape``) if flows with it are to be saved.
    """

    shape: tuple[int, ...]

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of ``z`` (..., *shape) in nats, batch shape."""
        raise NotImplementedError

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterised samples, (*sample_shape, *shape)."""
        raise NotImplementedError

    def distance(self, z: Tensor) -> Tensor:
        """Distance of ``z`` (..., *shape) to the centre, batch shape."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples without gradients, (*sample_shape, *shape)."""
        return self.rsample(sample_shape)

    def score(self, z: Tensor) -> Tensor:
        """Anomaly score of latent points (..., *shape), batch shape, higher is more anomalous.

        The distance; a base whose density does not fall with the distance overrides it.
        """
        return self.distance(z)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments besides the shape, as JSON-able values; tensors travel in the state dict."""
        raise NotImplementedError(f"{type(self).__name__} has no settings(), so flows with it cannot be saved")

    @property
    def _event_dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.shape), 0))


class GaussianBase(Base):
    r"""Isotropic normal N(c, v I).

    The paper's equation 5 uses v = 1/2, for which :math:`-\ln p_B(z) = \|z - c\|^2 + \frac{d}{2}\ln\pi`: the Deep SVDD
    distance itself. The variance is one number because a full covariance is already in the flow's last affine map.

    Args:
        shape: event shape.
        center: c, a number or a tensor that broadcasts to ``shape``; stored in torch's default dtype, like parameters.
        variance: v > 0.

    Raises:
        ValueError: when the variance is not positive or the centre does not fit the shape.

    >>> base = GaussianBase((2,), variance=0.5)
    >>> round(base.log_prob(torch.zeros(2)).item(), 4)  # -ln(pi)
    -1.1447
    """

    center: Tensor
    variance: Tensor

    def __init__(self, shape: int | Sequence[int], center: float | Tensor = 0.0, variance: float = 1.0) -> None:
        super().__init__(shape)
        if not variance > 0 or not math.isfinite(variance):
            raise ValueError(f"variance must be a positive finite number, got {variance}")
        try:
            full = torch.as_tensor(center, dtype=torch.get_default_dtype()).expand(self.shape).clone()
        except RuntimeError as error:
            raise ValueError(
                f"center of shape {tuple(torch.as_tensor(center).shape)} does not fit events of {self.shape}"
            ) from error
        if not bool(torch.isfinite(full).all()):
            raise ValueError("center holds a value that is not finite")
        self.register_buffer("center", full)
        self.register_buffer("variance", torch.tensor(float(variance)))

    def log_prob(self, z: Tensor) -> Tensor:
        size = math.prod(self.shape)
        squared = (z - self.center).square().sum(self._event_dims)
        return -0.5 * (squared / self.variance + size * (math.log(2 * math.pi) + self.variance.log()))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = torch.randn(*sample_shape, *self.shape, dtype=self.center.dtype, device=self.center.device)
        return self.center + self.variance.sqrt() * noise

    def distance(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z - self.center, dim=self._event_dims)

    def settings(self) -> dict[str, Any]:
        return {"variance": float(self.variance)}  # the centre is in the state dict

    def extra_repr(self) -> str:
        return f"shape={self.shape}, variance={float(self.variance):g}"


class BiLogNormal(Distribution):
    r"""Bilateral log-normal on the real line without 0 (paper, definition 1).

    :math:`p(x) = \frac12 \mathrm{LogNormal}(|x|; \mu, \sigma^2)`, so :math:`\ln|X| \sim N(\mu, \sigma^2)` and the sign
    is fair.

    Args:
        loc: mu, mean of ln|X|.
        scale: sigma > 0, standard deviation of ln|X|.
        validate_args: check parameters and values; by default yes, whatever torch's own default has become: its
            compiler and its exporter switch that off for the whole process.

    Raises:
        ValueError: a parameter out of its range.

    >>> round(BiLogNormal(0.0, 1.0).log_prob(torch.tensor(-1.0)).exp().item(), 4)
    0.1995
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(self, loc: float | Tensor, scale: float | Tensor, validate_args: bool = True) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The real line; the density at 0 is the limit 0."""
        return constraints.real

    @property
    def mean(self) -> Tensor:
        """0 by symmetry."""
        return torch.zeros_like(self.loc)

    @property
    def variance(self) -> Tensor:
        """E[X^2] = exp(2 mu + 2 sigma^2)."""
        return (2 * self.loc + 2 * self.scale.square()).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> BiLogNormal:
        new = self._get_checked_instance(BiLogNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(BiLogNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples of shape (*sample_shape, *batch_shape); the magnitude is reparameterised, the sign is drawn."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        sign = torch.randint(0, 2, shape, device=self.loc.device).to(self.loc.dtype).mul(2).sub(1)
        return sign * (self.loc + self.scale * noise).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats; minus infinity at 0."""
        if self._validate_args:
            self._validate_sample(value)
        value, loc, scale = torch.broadcast_tensors(value, self.loc, self.scale)
        log_abs = value.abs().log()
        standardised = (log_abs - loc) / scale
        result = -0.5 * standardised.square() - log_abs - scale.log() - 0.5 * math.log(2 * math.pi) - math.log(2)
        return torch.where(value == 0, -torch.inf, result)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value)."""
        upper = Normal(self.loc, self.scale, validate_args=False).cdf(value.abs().log())
        return 0.5 * (1 + value.sign() * upper)
