"""Bijections with their log-determinants: couplings, LU-parameterised linear maps, and how they are put together.

Every bijection acts on events of a fixed number of axes, ``shape`` = (channels, *spatial), behind any number of batch
axes, and has two methods to write:

- ``forward(x)  -> (y, ln|det dy/dx|)``
- ``inverse(y)  -> (x, ln|det dx/dy|)``

The log-determinant has the batch shape where it depends on the input and is 0-dim where it does not, so "uniformly
scaling" (paper, eq. 4) can be read off the result's shape and costs nothing per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf.flows.bases import BiLogNormal
from usf.flows.conditioners import default_conditioner

Conditioner = Callable[[int, int, int], nn.Module]
"""Builds a conditioner from (in_channels, out_channels, number of spatial axes)."""
Diagonal = Literal["learned", "fixed"]
Activation = Literal["exp", "softplus"]


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """An event shape as a tuple of positive integers.

    Raises:
        ValueError: when it is empty or holds a non-positive number.
    """
    result = (shape,) if isinstance(shape, int) else tuple(int(s) for s in shape)
    if not result or min(result) < 1:
        raise ValueError(f"an event shape needs at least one axis and positive sizes, got {result}; a vector is (d,)")
    return result


class Bijection(nn.Module):
    """A differentiable map with a differentiable inverse on events of ``shape``.

    Attributes:
        shape: event shape (channels, *spatial).
        is_uniformly_scaling: whether the Jacobian determinant is the same at every input (paper, eq. 4).
    """

    shape: tuple[int, ...]
    is_uniformly_scaling: bool = False

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = as_shape(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` (..., *shape) to (y, ln|det dy/dx|)."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y`` (..., *shape) back to (x, ln|det dx/dy|)."""
        raise NotImplementedError

    @property
    def event_dims(self) -> tuple[int, ...]:
        """The axes of an event, counted from the end."""
        return tuple(range(-len(self.shape), 0))

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


# --- masks ------------------------------------------------------------------------------------------------------------


def channel_mask(shape: int | Sequence[int], flip: bool = False) -> Tensor:
    """Keep the first half of the channels (the second with ``flip``); a vector's components are its channels.

    Returns a boolean tensor of shape ``shape``, true where a coupling leaves its input alone. Halves of 2k + 1
    channels keep k (k + 1 with ``flip``).

    >>> channel_mask((4,)).tolist()
    [True, True, False, False]
    """
    shape = as_shape(shape)
    keep = torch.arange(shape[0]) < shape[0] // 2
    return (~keep if flip else keep).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def alternating_mask(shape: int | Sequence[int], flip: bool = False) -> Tensor:
    """Keep every other channel, the odd ones (the even ones with ``flip``). Boolean, of shape ``shape``.

    >>> alternating_mask((4,)).tolist()
    [False, True, False, True]
    """
    shape = as_shape(shape)
    keep = torch.arange(shape[0]) % 2 == 1
    return (~keep if flip else keep).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def checkerboard_mask(shape: int | Sequence[int], flip: bool = False) -> Tensor:
    """Keep every other position of the spatial grid, in all channels (Dinh et al. 2017, section 3.4).

    Boolean, of shape ``shape``. For a vector the components are the positions.

    >>> checkerboard_mask((1, 2, 3)).tolist()
    [[[False, True, False], [True, False, True]]]
    """
    shape = as_shape(shape)
    spatial = shape[1:] or shape
    grid = torch.stack(torch.meshgrid(*[torch.arange(s) for s in spatial], indexing="ij")).sum(0)
    keep = grid % 2 == 1
    return (~keep if flip else keep).expand(shape).clone()


_MASKS = {"channel": channel_mask, "alternating": alternating_mask, "checkerboard": checkerboard_mask}
MaskName = Literal["channel", "alternating", "checkerboard"]


def _make_mask(shape: tuple[int, ...], mask: MaskName | Tensor, flip: bool) -> Tensor:
    if isinstance(mask, Tensor):
        if tuple(mask.shape) != shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the events have shape {shape}")
        made = ~mask.bool() if flip else mask.bool()
    elif mask in _MASKS:
        if math.prod(shape) == 1:
            # One component: nothing to condition on, and only a mask that moves it makes a layer.
            return torch.zeros(shape, dtype=torch.bool)
        made = _MASKS[mask](shape, flip)
    else:
        raise ValueError(f"unknown mask {mask!r}: use one of {sorted(_MASKS)} or a boolean tensor of shape {shape}")
    if bool(made.all()) or (math.prod(shape) > 1 and not bool(made.any())):
        remedy = (
            "'checkerboard'" if len(shape) > 1 and shape[0] == 1 else "a mask that keeps some entries and moves others"
        )
        raise ValueError(
            f"mask {mask!r} on shape {shape} leaves a coupling nothing to keep or nothing to move; use {remedy}"
        )
    return made


# --- couplings --------------------------------------------------------------------------------------------------------


class _Coupling(Bijection):
    """Shared by the three couplings: split by a mask, condition on what is kept, transform the rest.

    A mask that keeps a contiguous half of the channels is applied by slicing, so the conditioner sees only the kept
    channels and returns only what is moved; any other mask is applied by multiplication, as in the paper's formula.
    """

    _outputs: int
    mask: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        mask: MaskName | Tensor = "channel",
        flip: bool = False,
        hidden: Sequence[int] = (64, 64),
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__(shape)
        made = _make_mask(self.shape, mask, flip)
        self.register_buffer("mask", made)
        rank = len(self.shape) - 1
        channels = made.reshape(self.shape[0], -1)
        kept = channels[:, 0]
        half = int(kept.sum())
        self._kept_first = bool(kept[:half].all())
        self._kept_channels = half
        self._sliced = bool((channels == kept[:, None]).all()) and (
            self._kept_first or not bool(kept[: len(kept) - half].any())
        )
        inside, outside = (half, self.shape[0] - half) if self._sliced else (self.shape[0], self.shape[0])
        build = conditioner or (lambda i, o, r: default_conditioner(i, o, r, hidden))
        self.conditioner = build(inside, self._outputs * outside, rank)

    @property
    def halves(self) -> tuple[slice, slice] | None:
        """Kept and moved channels where each is a contiguous range, else nothing."""
        if not self._sliced:
            return None
        if self._kept_first:
            return slice(0, self._kept_channels), slice(self._kept_channels, self.shape[0])
        start = self.shape[0] - self._kept_channels
        return slice(start, self.shape[0]), slice(0, start)

    def _parameters_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """The conditioner's outputs at ``x``: shaped like what is moved (sliced), or like ``x`` and zero where kept."""
        axis = -len(self.shape)
        if self._sliced:
            start = 0 if self._kept_first else self.shape[0] - self._kept_channels
            raw = self.conditioner(x.narrow(axis, start, self._kept_channels))
            return raw.chunk(self._outputs, dim=axis) if self._outputs > 1 else (raw,)
        raw = self.conditioner(x * self.mask)
        parts = raw.chunk(self._outputs, dim=axis) if self._outputs > 1 else (raw,)
        return tuple(part * ~self.mask for part in parts)

    def _moved(self, x: Tensor) -> Tensor:
        if not self._sliced:
            return x
        start = self._kept_channels if self._kept_first else 0
        return x.narrow(-len(self.shape), start, self.shape[0] - self._kept_channels)

    def _join(self, x: Tensor, moved: Tensor) -> Tensor:
        """``x`` with its moved part replaced."""
        if not self._sliced:
            return moved
        axis = -len(self.shape)
        if self._kept_first:
            return torch.cat([x.narrow(axis, 0, self._kept_channels), moved], dim=axis)
        return torch.cat([moved, x.narrow(axis, self.shape[0] - self._kept_channels, self._kept_channels)], dim=axis)


class AdditiveCoupling(_Coupling):
    r"""Additive coupling, the uniformly scaling one (Dinh et al. 2015; paper, section 2).

    .. math:: C(x) = x + (1 - m) \odot f(m \odot x), \qquad \ln|\det J_C| = 0.

    Args:
        shape: event shape (channels, *spatial).
        mask: ``"channel"``, ``"alternating"``, ``"checkerboard"`` or a boolean tensor of ``shape``, true where the
            input is kept.
        flip: exchange kept and moved.
        hidden: widths of the default conditioner.
        conditioner: builds another one, from (in_channels, out_channels, spatial axes).

    Raises:
        ValueError: when the mask keeps everything or nothing, or has another shape.

    >>> y, ladj = AdditiveCoupling((4,))(torch.ones(3, 4))
    >>> ladj.shape, ladj.item()
    (torch.Size([]), 0.0)
    """

    _outputs = 1
    is_uniformly_scaling = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = self._parameters_of(x)
        return self._join(x, self._moved(x) + shift), x.new_zeros(())

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = self._parameters_of(y)
        return self._join(y, self._moved(y) - shift), y.new_zeros(())

    def displacement(self, x: Tensor) -> Tensor:
        """C(x) - x, which is zero where the mask keeps; shape of ``x``."""
        (shift,) = self._parameters_of(x)
        return self._join(torch.zeros_like(x), shift)


class AffineCoupling(_Coupling):
    r"""Affine coupling with a bounded log-scale; not uniformly scaling (Dinh et al. 2017; paper, section 2).

    .. math:: y = x \odot e^{s} + t, \quad s = (1 - m) \odot \kappa \tanh g(m \odot x), \quad
              t = (1 - m) \odot f(m \odot x),
              \qquad \ln|\det J| = \textstyle\sum_i s_i .

    Args:
        clamp: kappa > 0, the bound of the log-scale; one conditioner computes f and g, as in the paper.
        activation: what maps the clamped value to the scale. ``"exp"``, the formula above, or ``"softplus"`` (the
            paper's VAE-NonUSFlow, section 4.4) in place of the exponential, divided by ln 2 so that it starts as the
            identity too.

    Other arguments and errors as in :class:`AdditiveCoupling`.
    """

    _outputs = 2
    is_uniformly_scaling = False

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        clamp: float = 2.0,
        activation: Activation = "exp",
        mask: MaskName | Tensor = "channel",
        flip: bool = False,
        hidden: Sequence[int] = (64, 64),
        conditioner: Conditioner | None = None,
    ) -> None:
        if not clamp > 0:
            raise ValueError(f"clamp must be positive, got {clamp}; for a coupling without scale use AdditiveCoupling")
        if activation not in ("exp", "softplus"):
            raise ValueError(f"unknown activation {activation!r}: use 'exp' or 'softplus'")
        super().__init__(shape, mask=mask, flip=flip, hidden=hidden, conditioner=conditioner)
        self.clamp = float(clamp)
        self.activation = activation

    def _log_scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._parameters_of(x)
        clamped = self.clamp * torch.tanh(raw)
        if self.activation == "softplus":
            # Zero where the raw value is: also what an inverted mask leaves alone keeps its scale of one.
            return F.softplus(clamped).log() - math.log(math.log(2)), shift
        return clamped, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(x)
        return self._join(x, self._moved(x) * log_scale.exp() + shift), self._log_det(log_scale)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(y)
        return self._join(y, (self._moved(y) - shift) * (-log_scale).exp()), -self._log_det(log_scale)

    def _log_det(self, log_scale: Tensor) -> Tensor:
        return log_scale.sum(self.event_dims)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, clamp={self.clamp}, activation={self.activation}"


class GinCoupling(AffineCoupling):
    r"""Affine coupling whose log-scales sum to zero: it deforms, and keeps the volume (GIN, Sorrenson et al. 2020).

    .. math:: s_i \leftarrow s_i - \frac{1}{|\{m = 0\}|} \sum_{j : m_j = 0} s_j, \qquad \ln|\det J| = 0.

    Uniformly scaling like the additive coupling, and strictly more expressive: it contains it. With a single moved
    component the two coincide. The paper does not consider it. Arguments and errors as in :class:`AffineCoupling`;
    after centring, |s| is bounded by 2 ``clamp``.
    """

    is_uniformly_scaling = True

    def _log_scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = super()._log_scale_and_shift(x)
        if self._sliced:
            return log_scale - log_scale.mean(self.event_dims, keepdim=True), shift
        moved = ~self.mask
        return log_scale - moved * log_scale.sum(self.event_dims, keepdim=True) / moved.sum(), shift

    def _log_det(self, log_scale: Tensor) -> Tensor:
        return log_scale.new_zeros(())


# --- linear maps ------------------------------------------------------------------------------------------------------


_FEW_CHANNELS = 64
"""Up to here a product of matrices is cheaper than two more calls (measured on a CPU)."""


def _solve_triangular(matrix: Tensor, columns: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """``matrix``^-1 ``columns``; LAPACK has no half precision, so those are solved in float32 and rounded once."""
    if columns.dtype in (torch.bfloat16, torch.float16):
        solved = torch.linalg.solve_triangular(
            matrix.float(), columns.float(), upper=upper, unitriangular=unitriangular
        )
        return solved.to(columns.dtype)
    return torch.linalg.solve_triangular(matrix, columns, upper=upper, unitriangular=unitriangular)


class _ChannelLinear(Bijection):
    """A linear map of the channels, the same at every position: a matrix for vectors, a 1x1 convolution otherwise."""

    is_uniformly_scaling = True
    bias: Tensor

    @property
    def positions(self) -> int:
        """Number of spatial positions, h * w for images: the determinant of the channel map is raised to this power."""
        return math.prod(self.shape[1:])

    def _apply_matrix(self, matrix: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``matrix`` (k, m) times the m channels of ``x``, plus ``bias`` (k,)."""
        rank = len(self.shape) - 1
        if rank == 0:
            return F.linear(x, matrix, bias)
        flat = x.reshape(-1, x.shape[-rank - 1], math.prod(x.shape[-rank:]))
        y = F.conv1d(flat, matrix[:, :, None], bias)
        return y.reshape(*x.shape[: -rank - 1], len(matrix), *x.shape[-rank:])

    def _columns(self, x: Tensor) -> Tensor:
        """``x`` as (channels, batch * positions), the right-hand sides of a solve."""
        return x.movedim(-len(self.shape), 0).reshape(x.shape[-len(self.shape)], -1)

    def _from_columns(self, columns: Tensor, like: Tensor) -> Tensor:
        axis = -len(self.shape)
        return columns.reshape(like.movedim(axis, 0).shape).movedim(0, axis)

    def _channelwise(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *[1] * (len(self.shape) - 1))


class LULinear(_ChannelLinear):
    r"""A(x) = Mx + b with M = LU: a bijective affine map of the channels (paper, section 2).

    L is unit lower triangular; U is upper triangular with diagonal :math:`u_i = \pm e^{\lambda_i}`, so that every
    parameter value is invertible and :math:`\ln|\det| = hw \sum_i \lambda_i`. It starts as the identity. Applied to
    vectors it is a matrix, to sequences and images a 1x1 convolution.

    Cost: with c channels and n vectors (batch times positions), the product applies U, then L, in O(n c^2), or forms LU
    where n > c; the inverse is two triangular solves, with the n vectors as right-hand sides or, where n > c, with the
    identity's columns. No matrix is inverted by elimination. Up to 64 channels the second way is taken always.

    Args:
        shape: event shape (channels, *spatial).
        diagonal: ``"learned"``, or ``"fixed"`` to hold :math:`|u_i| = 1`, which makes the map volume-preserving.
        signs: signs of the u_i, shape (channels,), entries +1 or -1; all +1 by default. A buffer: gradient descent
            cannot change a sign, for that would pass through a singular matrix.
        bias: learn b; otherwise it stays zero.

    Attributes:
        weight: (c, c); strictly lower part L, strictly upper part U, diagonal :math:`\lambda` (unused where fixed).
        bias: (c,).

    Raises:
        ValueError: for another diagonal, or signs that are not +1 or -1.

    >>> A = LULinear((3, 4, 4))
    >>> torch.nn.init.normal_(A.weight).shape
    torch.Size([3, 3])
    >>> x = torch.randn(2, 3, 4, 4)
    >>> y, ladj = A(x)
    >>> torch.allclose(A.inverse(y)[0], x, atol=1e-4), ladj.shape
    (True, torch.Size([]))
    """

    signs: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        diagonal: Diagonal = "learned",
        signs: Tensor | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(shape)
        if diagonal not in ("learned", "fixed"):
            raise ValueError(f"diagonal must be 'learned' or 'fixed', got {diagonal!r}")
        channels = self.shape[0]
        signs = torch.ones(channels) if signs is None else torch.as_tensor(signs, dtype=torch.get_default_dtype())
        if tuple(signs.shape) != (channels,) or not bool((signs.abs() == 1).all()):
            raise ValueError(
                f"signs must hold {channels} entries, each +1 or -1: a zero on U's diagonal is not invertible"
            )
        self.diagonal: Diagonal = diagonal
        self.weight = nn.Parameter(torch.zeros(channels, channels), requires_grad=diagonal == "learned" or channels > 1)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=bias)
        self.register_buffer("signs", signs)

    @property
    def log_diagonal(self) -> Tensor:
        """ln|u_i|, shape (c,)."""
        return self.weight.diagonal() if self.diagonal == "learned" else torch.zeros_like(self.signs)

    def _upper(self) -> Tensor:
        diagonal = self.signs * self.log_diagonal.exp() if self.diagonal == "learned" else self.signs
        return torch.diagonal_scatter(self.weight.triu(1), diagonal)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(L, U), each (c, c)."""
        eye = torch.eye(self.shape[0], dtype=self.weight.dtype, device=self.weight.device)
        return self.weight.tril(-1) + eye, self._upper()

    def matrix(self) -> Tensor:
        """M = LU, shape (c, c)."""
        return self._product(self._upper())

    def blocks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The ``rows`` of M and the ``columns`` of M^-1: all of A that a coupling of halves between A and A^-1 sees."""
        upper = self._upper()
        return self._product(upper)[rows], self._inverse_columns(upper, columns)

    def _product(self, upper: Tensor) -> Tensor:
        """LU = U + (L - 1)U."""
        return torch.addmm(upper, self.weight.tril(-1), upper)

    def _inverse_columns(self, upper: Tensor, columns: slice) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.weight.dtype, device=self.weight.device)
        return self._solve(upper, eye[:, columns])

    def _solve(self, upper: Tensor, columns: Tensor) -> Tensor:
        """M^-1 ``columns``; what stands on and above the diagonal of ``weight`` is not read in the solve with L."""
        columns = _solve_triangular(self.weight, columns, upper=False, unitriangular=True)
        return _solve_triangular(upper, columns, upper=True)

    def is_wide(self, x: Tensor) -> bool:
        """Whether forming matrices costs less than applying the factors to ``x``: for more vectors than channels, and
        for so few channels that the number of calls decides."""
        channels = self.shape[0]
        return channels <= _FEW_CHANNELS or x.numel() > channels**2

    def log_abs_det(self) -> Tensor:
        """ln|det dy/dx|, 0-dim."""
        return self.positions * self.log_diagonal.sum()

    def log_prior(self, sigma: float) -> Tensor:
        r"""Log-density of the diagonal under the determinant prior, 0-dim (paper, section 4.2, with the scale
        corrected).

        Each u_i is BiLogNormal(0, sigma_0^2) with :math:`\sigma_0 = \sigma / (hw\sqrt{c})`, which makes
        :math:`\ln|\det| = hw \sum_i \ln|u_i|` exactly N(0, sigma^2). The paper prints :math:`\sigma/(chw)`, which
        gives a standard deviation of :math:`\sigma/\sqrt{c}` instead.
        """
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        scale = sigma / (self.positions * math.sqrt(self.shape[0]))
        u = self.signs * self.log_diagonal.exp()
        return BiLogNormal(0.0, scale).log_prob(u).sum()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mx + ``bias``."""
        if self.is_wide(x):
            return self._apply_matrix(self.matrix(), x, bias)
        lower, upper = self.factors()
        return self._apply_matrix(lower, self._apply_matrix(upper, x), bias)

    def solve(self, y: Tensor) -> Tensor:
        """M^-1 y, by two triangular solves."""
        upper = self._upper()
        if self.is_wide(y):
            return self._apply_matrix(self._inverse_columns(upper, slice(None)), y)
        return self._from_columns(self._solve(upper, self._columns(y)), y)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x, self.bias), self.log_abs_det()

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.solve(y - self._channelwise(self.bias)), -self.log_abs_det()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, diagonal={self.diagonal!r}"


class DenseLinear(_ChannelLinear):
    """A(x) = Wx + b with an explicit matrix and its inverse: what :meth:`usf.flows.Flow.fuse` leaves of linear maps.
    Not trainable.

    Args:
        shape: event shape (channels, *spatial).
        weight: (c, c), invertible.
        bias: (c,).

    Raises:
        ValueError: when the matrix is singular or of another size.
    """

    weight: Tensor
    weight_inverse: Tensor
    constant: Tensor

    def __init__(self, shape: int | Sequence[int], weight: Tensor, bias: Tensor) -> None:
        super().__init__(shape)
        channels = self.shape[0]
        if tuple(weight.shape) != (channels, channels) or tuple(bias.shape) != (channels,):
            raise ValueError(
                f"weight and bias have shapes {tuple(weight.shape)}, {tuple(bias.shape)}; expected c = {channels}"
            )
        wide = weight.detach().double()
        log_abs_det = torch.linalg.slogdet(wide).logabsdet
        if not bool(torch.isfinite(log_abs_det)):
            raise ValueError("weight is singular: a linear map of a flow must be invertible")
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("weight_inverse", torch.linalg.inv(wide).to(weight.dtype))
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("constant", (self.positions * log_abs_det).to(weight.dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_matrix(self.weight, x, self.bias), self.constant

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_matrix(self.weight_inverse, y - self._channelwise(self.bias)), -self.constant


# --- composition ------------------------------------------------------------------------------------------------------


class Sandwich(Bijection):
    r"""The paper's block: B = A^-1 . C . A (section 2).

    The log-determinants of A and A^-1 cancel when A is uniformly scaling, so the block scales volume exactly as C
    does. For a coupling C and an LU map A it is computed as :math:`x + M^{-1}\delta(Mx + b)` with :math:`\delta = C -
    \mathrm{id}`. A coupling of halves needs only the moved columns of :math:`M^{-1}`, and an additive one only the kept
    rows of :math:`M`; its inverse differs in a sign.

    Args:
        outer: A.
        inner: C, on events of the same shape.

    Raises:
        ValueError: when the shapes differ.
    """

    def __init__(self, outer: Bijection, inner: Bijection) -> None:
        super().__init__(outer.shape)
        if outer.shape != inner.shape:
            raise ValueError(f"outer acts on shape {outer.shape}, inner on {inner.shape}; a sandwich needs one shape")
        self.outer, self.inner = outer, inner
        self.is_uniformly_scaling = outer.is_uniformly_scaling and inner.is_uniformly_scaling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._conjugate(x, +1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._conjugate(y, -1)

    def _conjugate(self, x: Tensor, direction: int) -> tuple[Tensor, Tensor]:
        outer, inner = self.outer, self.inner
        if isinstance(outer, LULinear) and isinstance(inner, _Coupling) and inner.halves and outer.is_wide(x):
            return self._conjugate_halves(outer, inner, *inner.halves, x, direction)
        if isinstance(outer, LULinear) and isinstance(inner, AdditiveCoupling):
            step = outer.solve(inner.displacement(outer.linear(x, outer.bias)))
            return x + step if direction > 0 else x - step, x.new_zeros(())
        z, into = outer(x)
        z, through = inner(z) if direction > 0 else inner.inverse(z)
        z, back = outer.inverse(z)
        return z, through if outer.is_uniformly_scaling else into + through + back

    @staticmethod
    def _conjugate_halves(
        outer: LULinear, inner: _Coupling, kept: slice, moved: slice, x: Tensor, direction: int
    ) -> tuple[Tensor, Tensor]:
        if isinstance(inner, AdditiveCoupling):
            rows, columns = outer.blocks(kept, moved)
            step = outer._apply_matrix(columns, inner.conditioner(outer._apply_matrix(rows, x, outer.bias[kept])))
            return x + step if direction > 0 else x - step, x.new_zeros(())
        rows, columns = outer.blocks(slice(None), moved)
        z = outer._apply_matrix(rows, x, outer.bias)
        y, through = inner(z) if direction > 0 else inner.inverse(z)
        return x + outer._apply_matrix(columns, inner._moved(y) - inner._moved(z)), through


class Chain(Bijection):
    """Bijections applied one after the other, the first one first.

    Raises:
        ValueError: when there is none, or their shapes differ.
    """

    def __init__(self, bijections: Iterable[Bijection]) -> None:
        parts = list(bijections)
        if not parts:
            raise ValueError("a chain needs at least one bijection")
        super().__init__(parts[0].shape)
        if any(part.shape != self.shape for part in parts):
            raise ValueError(f"a chain needs one shape, got {[part.shape for part in parts]}")
        self.parts = nn.ModuleList(parts)
        self.is_uniformly_scaling = all(part.is_uniformly_scaling for part in parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(())
        for part in self.parts:
            x, ladj = part(x)
            total = total + ladj
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(())
        for part in reversed(list(self.parts)):
            y, ladj = cast(Bijection, part).inverse(y)
            total = total + ladj
        return y, total
