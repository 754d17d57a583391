r"""Base distributions beyond the normal: products of Laplace, and densities of the norm alone, fixed or learned.

A flow with a constant determinant moves volume about without stretching it, so the volumes of its superlevel sets are
the base's, up to one factor. A base whose density of the norm is *learned* can take over the target's volumes, and
with them close the whole gap to the entropy that a fixed base leaves (the rearrangement bound,
:func:`usf.alignment.rearrangement_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf.flows.bases import Base

__all__ = ["Chi", "GammaMixture", "LaplaceBase", "Law", "RadialBase", "SplineLaw"]

LawName = Literal["chi", "gamma-mixture", "spline"]
_TINY = 1e-20  # where the logarithm of a radius is cut off: representable in float32, far below any rounding


def _log_sphere(dim: int, order: float) -> float:
    """ln(d |unit ball of the p-norm|): what turns a law of the norm into a density, f(r) = p(r) d |ball| r^(d-1)."""
    inverse = 0.0 if math.isinf(order) else 1.0 / order
    return math.log(dim) + dim * (math.log(2) + math.lgamma(1 + inverse)) - math.lgamma(1 + dim * inverse)


def _center(shape: tuple[int, ...], center: float | Tensor) -> Tensor:
    try:
        full = torch.as_tensor(center, dtype=torch.get_default_dtype()).expand(shape).clone()
    except RuntimeError as error:
        raise ValueError(
            f"center of shape {tuple(torch.as_tensor(center).shape)} does not fit events of {shape}"
        ) from error
    if not bool(torch.isfinite(full).all()):
        raise ValueError("center holds a value that is not finite")
    return full


class Law(nn.Module):
    """The law of a norm r >= 0 in d dimensions, given by the density it makes.

    Attributes:
        dim: d.
        order: order p of the norm.
        is_decreasing: whether the density falls with r *whatever the parameters*.
    """

    is_decreasing: bool = False

    def __init__(self, dim: int, order: float) -> None:
        super().__init__()
        self.dim, self.order = dim, order
        self._log_sphere = _log_sphere(dim, order)

    def log_profile(self, r: Tensor) -> Tensor:
        """ln p(z) of any z with norm ``r``, shape of ``r``; finite with finite gradients at r = 0."""
        raise NotImplementedError

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Norms, shape ``sample_shape``."""
        raise NotImplementedError

    def log_prob(self, r: Tensor) -> Tensor:
        """ln f(r), the log-density of the norm itself; minus infinity at r = 0 for d > 1."""
        return self.log_profile(r) + self._log_sphere + (self.dim - 1) * r.log()


class Chi(Law):
    r"""The norm's law under the density proportional to :math:`e^{-\|z\|_p^q / q}`, without parameters.

    q is the order of the norm, and 2 for the maximum norm. Order 2 is the chi distribution, which makes the standard
    normal; order 1 is Gamma(d, 1), which makes the product of Laplace distributions.
    """

    is_decreasing = True
    _anchor: Tensor

    def __init__(self, dim: int, order: float = 2.0) -> None:
        super().__init__(dim, order)
        self.power = 2.0 if math.isinf(order) else order
        q = self.power
        self._constant = (1 - dim / q) * math.log(q) - math.lgamma(dim / q) - self._log_sphere
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # carries dtype and device

    def log_profile(self, r: Tensor) -> Tensor:
        return self._constant - r.pow(self.power) / self.power

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.full(
            tuple(sample_shape), self.dim / self.power, dtype=self._anchor.dtype, device=self._anchor.device
        )
        return (torch.distributions.Gamma(shape, 1.0).rsample() * self.power).pow(1 / self.power)


class GammaMixture(Law):
    r"""A mixture of (generalised) gamma laws of the norm, with learned weights, scales and shapes.

    Component j is :math:`r = \theta_j (q\,G)^{1/q}` with :math:`G \sim \mathrm{Gamma}(k_j / q)`, whose density at
    norm r is proportional to :math:`r^{k_j - d} e^{-(r/\theta_j)^q / q}`: a scale mixture of the `Chi` law for k_j =
    d, a shell for k_j > d. Component 0 keeps k = d, so the density is finite and positive at the centre.

    Args:
        dim, order: as in `Law`.
        components: number of components, at least 1.
        decreasing: hold every k_j = d; the density then falls with r, and the distance is the score.
    """

    def __init__(self, dim: int, order: float = 2.0, *, components: int = 4, decreasing: bool = False) -> None:
        super().__init__(dim, order)
        if components < 1:
            raise ValueError(f"a mixture needs at least one component, got {components}")
        self.power = 2.0 if math.isinf(order) else order
        self.is_decreasing = decreasing or components == 1
        self.logits = nn.Parameter(torch.zeros(components))
        self.log_scales = nn.Parameter(torch.linspace(-0.5, 0.5, components) if components > 1 else torch.zeros(1))
        self.log_excess = (
            nn.Parameter(torch.full((components - 1,), math.log(0.1 * dim))) if not self.is_decreasing else None
        )

    def _shapes(self) -> Tensor:
        first = torch.full_like(self.logits, float(self.dim))
        if self.log_excess is None:
            return first
        return first + F.pad(self.log_excess.exp(), (1, 0))

    def log_profile(self, r: Tensor) -> Tensor:
        q, k = self.power, self._shapes()
        radius = r.unsqueeze(-1)
        constant = (1 - k / q) * math.log(q) - torch.lgamma(k / q) - k * self.log_scales - self._log_sphere
        # The clamp keeps (k - d) ln r and its gradient finite at the centre; where k = d its factor is 0.
        log_terms = (k - self.dim) * radius.clamp_min(_TINY).log() - (radius * (-self.log_scales).exp()).pow(q) / q
        return torch.logsumexp(self.logits.log_softmax(-1) + constant + log_terms, -1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Norms; gradients reach scales and shapes, not the weights, which are drawn."""
        shape = tuple(sample_shape)
        count = math.prod(shape)
        index = torch.multinomial(self.logits.detach().softmax(-1), count, replacement=True).reshape(shape)
        gamma = torch.distributions.Gamma((self._shapes() / self.power)[index], 1.0).rsample()
        return self.log_scales.exp()[index] * (gamma * self.power).pow(1 / self.power)


class SplineLaw(Law):
    r"""The `Chi` law seen through a learned monotone spline of the logarithm of the norm.

    :math:`\ln g = S(\ln r)` with S a monotone rational-quadratic spline (Durkan et al. 2019) that continues as a line
    at both ends: with slope 1 below, so that g(r)/r has a limit and the density is finite at the centre, and with a
    learned slope above, which sets the weight of the tail. g(r) follows the `Chi` law. Starts as the identity.

    Args:
        dim, order: as in `Law`.
        bins: pieces of the spline, at least 1.
    """

    def __init__(self, dim: int, order: float = 2.0, *, bins: int = 12) -> None:
        super().__init__(dim, order)
        if bins < 1:
            raise ValueError(f"a spline needs at least one bin, got {bins}")
        self.chi = Chi(dim, order)
        middle = math.log(dim) / self.chi.power if dim > 1 else 0.0
        self.low, self.bins = middle - 4.0, bins
        width = 7.0 / bins
        inverse = math.log(math.expm1(width - self._floor))
        self.raw_widths = nn.Parameter(torch.full((bins,), inverse))
        self.raw_heights = nn.Parameter(torch.full((bins,), inverse))
        self.raw_slopes = nn.Parameter(torch.full((bins,), math.log(math.expm1(1 - self._floor))))
        self.offset = nn.Parameter(torch.zeros(2))

    _floor = 1e-3  # of widths, heights and slopes: keeps the map strictly monotone

    def _knots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (bins + 1,), values (bins + 1,) and slopes (bins + 1,)."""
        x = F.pad((F.softplus(self.raw_widths) + self._floor).cumsum(0), (1, 0)) + self.low + self.offset[0]
        y = F.pad((F.softplus(self.raw_heights) + self._floor).cumsum(0), (1, 0)) + self.low + self.offset[1]
        return x, y, F.pad(F.softplus(self.raw_slopes) + self._floor, (1, 0), value=1.0)

    def _select(self, u: Tensor, knots: Tensor) -> Tensor:
        return torch.searchsorted(knots.detach()[1:-1].contiguous(), u.detach().contiguous())

    def spline(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(S(u), ln S'(u)), shapes of ``u``."""
        x, y, slope = self._knots()
        i = self._select(u, x)
        w, h = (x[1:] - x[:-1])[i], (y[1:] - y[:-1])[i]
        s, left, right = h / w, slope[i], slope[i + 1]
        t = ((u - x[i]) / w).clamp(0, 1)
        bend = right + left - 2 * s
        denominator = s + bend * t * (1 - t)
        inner = y[i] + h * (s * t * t + left * t * (1 - t)) / denominator
        log_slope = (
            2 * s.log() + (right * t * t + 2 * s * t * (1 - t) + left * (1 - t) ** 2).log() - 2 * denominator.log()
        )
        below, above = u < x[0], u > x[-1]
        value = torch.where(below, y[0] + u - x[0], torch.where(above, y[-1] + slope[-1] * (u - x[-1]), inner))
        return value, torch.where(below, 0.0, torch.where(above, slope[-1].log(), log_slope))

    def inverse_spline(self, v: Tensor) -> Tensor:
        """S^-1(v), shape of ``v``."""
        x, y, slope = self._knots()
        i = self._select(v, y)
        w, h = (x[1:] - x[:-1])[i], (y[1:] - y[:-1])[i]
        s, left, right = h / w, slope[i], slope[i + 1]
        rise = (v - y[i]).clamp(torch.zeros_like(h), h)
        bend = right + left - 2 * s
        a = h * (s - left) + rise * bend
        b = h * left - rise * bend
        c = -s * rise
        t = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
        inner = x[i] + w * t
        return torch.where(v < y[0], x[0] + v - y[0], torch.where(v > y[-1], x[-1] + (v - y[-1]) / slope[-1], inner))

    def log_profile(self, r: Tensor) -> Tensor:
        u = r.clamp_min(_TINY).log()
        v, log_slope = self.spline(u)
        # dg/dr = (g / r) S', and the density of r on spheres is that of g times (g / r)^(d-1) dg/dr.
        return self.chi.log_profile(v.exp()) + self.dim * (v - u) + log_slope

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.inverse_spline(self.chi.rsample(sample_shape).clamp_min(_TINY).log()).exp()


class RadialBase(Base):
    r"""A density of the norm alone: :math:`p(z) = f(r) / (d\,|B_p|\,r^{d-1})` with :math:`r = \|z - c\|_p`.

    f is the law of the norm. Samples are a norm times an independent direction, uniform in the cone measure
    of the unit sphere.

    Where the density falls with the distance for every value of the parameters, the anomaly score is the distance.
    Otherwise it is minus the log-density: a learned law may put its mass on a shell, and then the centre is as
    anomalous as the far outside.

    Args:
        shape: event shape.
        order: p in {1, 2, inf}.
        law: ``"chi"`` (fixed), ``"gamma-mixture"`` or ``"spline"`` (learned).
        components: of the gamma mixture.
        decreasing: of the gamma mixture: hold the density decreasing.
        bins: of the spline.
        center: c, a number or a tensor that broadcasts to ``shape``.

    Raises:
        ValueError: for another order or law, or a centre that does not fit the shape.

    >>> base = RadialBase((3,), order=2.0, law="chi")  # the standard normal
    >>> round(base.log_prob(torch.zeros(3)).item(), 4) == round(-1.5 * math.log(2 * math.pi), 4)
    True
    """

    center: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        order: float = 2.0,
        law: LawName = "gamma-mixture",
        *,
        components: int = 4,
        decreasing: bool = False,
        bins: int = 12,
        center: float | Tensor = 0.0,
    ) -> None:
        super().__init__(shape)
        if order not in (1, 2, math.inf):
            raise ValueError(f"order of the norm is 1, 2 or inf; got {order}")
        dim = math.prod(self.shape)
        self.order, self._options = float(order), {"components": components, "decreasing": decreasing, "bins": bins}
        self.law: Law
        if law == "chi":
            self.law = Chi(dim, self.order)
        elif law == "gamma-mixture":
            self.law = GammaMixture(dim, self.order, components=components, decreasing=decreasing)
        elif law == "spline":
            self.law = SplineLaw(dim, self.order, bins=bins)
        else:
            raise ValueError(f"law is 'chi', 'gamma-mixture' or 'spline'; got {law!r}")
        self._law_name = law
        self.register_buffer("center", _center(self.shape, center))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.law.log_profile(self.distance(z))

    def distance(self, z: Tensor) -> Tensor:
        """p-norm of z - c, batch shape."""
        return torch.linalg.vector_norm(z - self.center, self.order, dim=self._event_dims)

    def score(self, z: Tensor) -> Tensor:
        """The distance where the density is known to fall with it, else minus the log-density; batch shape."""
        return self.distance(z) if self.law.is_decreasing else -self.log_prob(z)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.shape)
        like = self.center
        if self.order == 2:
            direction = torch.randn(shape, dtype=like.dtype, device=like.device)
        else:
            direction = 2 * torch.rand(shape, dtype=like.dtype, device=like.device) - 1
            if self.order == 1:
                # The cone measure of the 1-norm is that of independent Laplace variables.
                direction = direction.sign() * -torch.log1p(-direction.abs())
        norm = torch.linalg.vector_norm(direction, self.order, dim=self._event_dims, keepdim=True).clamp_min(_TINY)
        radius = self.law.rsample(sample_shape).reshape(*sample_shape, *[1] * len(self.shape))
        return self.center + radius * direction / norm

    def settings(self) -> dict[str, Any]:
        return {"order": self.order, "law": self._law_name, **self._options}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, order={self.order:g}"


class LaplaceBase(Base):
    r"""Independent Laplace components: :math:`\ln p(z) = -\|z - c\|_1 / b - d \ln 2b`.

    Its level sets are spheres of the 1-norm, which are polytopes, and its tails are heavier than the normal's.

    Args:
        shape: event shape.
        center: c, a number or a tensor that broadcasts to ``shape``.
        scale: b > 0.

    >>> LaplaceBase((2,)).log_prob(torch.zeros(2)).exp().item()  # 1 / (2 b)^2
    0.25
    """

    center: Tensor
    scale: Tensor

    def __init__(self, shape: int | Sequence[int], center: float | Tensor = 0.0, scale: float = 1.0) -> None:
        super().__init__(shape)
        if not scale > 0 or not math.isfinite(scale):
            raise ValueError(f"scale must be a positive finite number, got {scale}")
        self.register_buffer("center", _center(self.shape, center))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def log_prob(self, z: Tensor) -> Tensor:
        return -self.distance(z) / self.scale - math.prod(self.shape) * (2 * self.scale).log()

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.shape)
        uniform = 2 * torch.rand(shape, dtype=self.center.dtype, device=self.center.device) - 1
        return self.center - self.scale * uniform.sign() * torch.log1p(-uniform.abs())

    def distance(self, z: Tensor) -> Tensor:
        """1-norm of z - c, batch shape."""
        return torch.linalg.vector_norm(z - self.center, 1, dim=self._event_dims)

    def settings(self) -> dict[str, Any]:
        return {"scale": float(self.scale)}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, scale={float(self.scale):g}"
