"""Flows: a bijection and a base distribution, and the paper's two architectures."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from usf.flows.bases import Base, GaussianBase
from usf.flows.bijections import (
    Activation,
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    Chain,
    Conditioner,
    DenseLinear,
    Diagonal,
    GinCoupling,
    LULinear,
    MaskName,
    Sandwich,
    as_shape,
)

_FORMAT = "usf-flow-1"


class Flow(nn.Module):
    r"""A density on R^shape: x has the law of phi^-1(B) with phi a bijection and B a base distribution (paper, eq. 3).

    .. math:: \ln p(x) = \ln p_B(\phi(x)) + \ln|\det J_\phi(x)|.

    Every method takes events behind any number of batch axes, (..., *shape), and returns one number per event.

    Args:
        bijection: phi.
        base: the law of phi(x); a standard normal by default.

    Attributes:
        validate_args: whether inputs are checked for shape and for values that are not finite. On by default; the
            check reads the data once, so switch it off in a loop on a GPU. Compiled and exported code is never checked.

    Raises:
        ValueError: when base and bijection have different shapes, or (from every method) an input of the wrong shape
            or with a NaN or an infinity.

    >>> flow = USFlow((2,), blocks=2)
    >>> flow.log_prob(torch.zeros(3, 5, 2)).shape, flow.log_abs_det.shape
    (torch.Size([3, 5]), torch.Size([]))
    """

    def __init__(self, bijection: Bijection, base: Base | None = None) -> None:
        super().__init__()
        base = GaussianBase(bijection.shape) if base is None else base
        if base.shape != bijection.shape:
            raise ValueError(f"the bijection acts on shape {bijection.shape}, the base has shape {base.shape}")
        self.bijection, self.base = bijection, base
        self.validate_args = True

    # --- the map ---

    @property
    def shape(self) -> tuple[int, ...]:
        """Event shape (channels, *spatial); (d,) for vectors."""
        return self.bijection.shape

    @property
    def is_uniformly_scaling(self) -> bool:
        """Whether |det J| is the same at every input by construction (paper, eq. 4)."""
        return self.bijection.is_uniformly_scaling

    def latent(self, x: Tensor) -> Tensor:
        """phi(x), shape of ``x``."""
        return self.bijection(self._checked(x))[0]

    def inverse(self, z: Tensor) -> Tensor:
        """phi^-1(z), shape of ``z``."""
        return self.bijection.inverse(self._checked(z))[0]

    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        """ln|det J_phi(x)| in nats, batch shape (also where it is constant)."""
        x = self._checked(x)
        return self.bijection(x)[1].expand(self._batch(x))

    @property
    def log_abs_det(self) -> Tensor:
        """ln|det J_phi| of a uniformly scaling flow, 0-dim: the term that eq. 5 adds to Deep SVDD (with a minus sign).

        Raises:
            TypeError: when the flow is not uniformly scaling, for then it depends on the input.
        """
        if not self.is_uniformly_scaling:
            raise TypeError("the determinant of this flow depends on the input; use log_abs_det_jacobian(x)")
        reference = next(self.buffers(), None)
        reference = next(self.parameters()) if reference is None or not reference.is_floating_point() else reference
        return self.bijection(reference.new_zeros(1, *self.shape))[1]

    # --- the density ---

    def forward(self, x: Tensor) -> Tensor:
        """The same as :meth:`log_prob`, so that wrappers around a module's call work."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x) in nats, batch shape (paper, eq. 3)."""
        z, log_abs_det = self.bijection(self._checked(x))
        return self.base.log_prob(z) + log_abs_det

    def score(self, x: Tensor) -> Tensor:
        """Anomaly score, batch shape, higher is more anomalous: the distance of the latent to the base's centre.

        For a uniformly scaling flow whose base density falls with the distance it ranks exactly as -ln p(x) (paper,
        section 4.3). For any other flow it leaves the log-determinant out, which is what Deep SVDD and the latent
        norms of the paper's figure 4 do. Never depends on the rest of the batch.
        """
        return self.base.score(self.latent(x))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples without gradients, (*sample_shape, *shape)."""
        with torch.no_grad():
            return self.bijection.inverse(self.base.sample(sample_shape))[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised samples (*sample_shape, *shape) and their log-densities (*sample_shape) in one pass."""
        z = self.base.rsample(sample_shape)
        x, log_abs_det = self.bijection.inverse(z)
        return x, self.base.log_prob(z) - log_abs_det

    def log_prior(self, sigma: float = 1.0) -> Tensor:
        """Log-density of the determinant prior over every LU layer with a learned diagonal (paper, section 4.2).

        0-dim. For maximum a posteriori training minimise ``-(log_prob(x).mean() + log_prior(sigma) / n)`` with n the
        number of training samples.

        Args:
            sigma: standard deviation of each layer's ln|det|.

        Raises:
            TypeError: when no LU layer has a learned diagonal, for then there is nothing to regularise.
        """
        layers = [m for m in self.modules() if isinstance(m, LULinear) and m.diagonal == "learned"]
        if not layers:
            raise TypeError(
                "no LULinear with diagonal='learned' in this flow: the determinant prior has nothing to act on"
            )
        return torch.stack([layer.log_prior(sigma) for layer in layers]).sum()

    # --- inference ---

    def fuse(self) -> Flow:
        """A frozen copy for inference: neighbouring linear maps merged, their determinants folded into constants.

        Between two couplings of an (Non)USFlow stand A_i^-1 and A_(i+1): two solves and two products become one
        product. Latents, scores and densities agree with the original's up to rounding; matrices are merged in double
        precision. The copy can be exported and inverted, not trained, and is saved with the original's settings by
        saving the original.
        """
        parts: list[Bijection] = []
        pending: tuple[Tensor, Tensor] | None = None  # (W, b) in double precision

        def flush() -> None:
            nonlocal pending
            if pending is not None:
                parts.append(DenseLinear(self.shape, *(t.to(dtype) for t in pending)))
                pending = None

        dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
        with torch.no_grad():
            for part, inverted in _flatten(self.bijection, False):
                if isinstance(part, (LULinear, DenseLinear)):
                    weight, bias = _as_matrix(part, inverted)
                    pending = (weight, bias) if pending is None else (weight @ pending[0], weight @ pending[1] + bias)
                    continue
                flush()
                parts.append(_Inverse(copy.deepcopy(part)) if inverted else copy.deepcopy(part))
            flush()
        fused = Flow(Chain(parts), copy.deepcopy(self.base)).eval()
        fused.validate_args = self.validate_args
        return fused.requires_grad_(False)

    # --- storage ---

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one safetensors file; an interrupted write leaves an older file as it was.

        Raises:
            TypeError: for flows that :meth:`load` could not rebuild: fused ones, custom bijections, conditioners or
                masks.
        """
        settings = getattr(self, "_settings", None)
        if settings is None:
            raise TypeError(
                f"{type(self).__name__} was not built from settings alone, so it cannot be saved whole: save "
                "its state_dict(), or build it with USFlow or NonUSFlow without a custom conditioner or mask"
            )
        base = {"name": type(self.base).__name__, "settings": self.base.settings()}
        metadata = {
            "format": _FORMAT,
            "architecture": type(self).__name__,
            "settings": json.dumps(settings, sort_keys=True),
            "base": json.dumps(base, sort_keys=True),
        }
        path = Path(path)
        partial = path.with_name(path.name + f".{os.getpid()}.partial")
        try:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, partial, metadata=metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Rebuild a flow from :meth:`save`'s file. Nothing in the file is executed.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not such a file, or holds another architecture than the class it is loaded with.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no flow at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        architectures: dict[str, type[_Architecture]] = {"USFlow": USFlow, "NonUSFlow": NonUSFlow}
        if metadata.get("format") != _FORMAT or metadata.get("architecture") not in architectures:
            raise ValueError(
                f"{path} is no flow saved by usf (format {metadata.get('format')!r}, expected {_FORMAT!r})"
            )
        architecture = architectures[metadata["architecture"]]
        if not issubclass(architecture, cls):
            raise ValueError(f"{path} holds a {architecture.__name__}, not a {cls.__name__}")
        settings, base = json.loads(metadata["settings"]), json.loads(metadata["base"])
        flow = architecture(**settings, base=_base_from(base, as_shape(settings["shape"])))
        floating = next((t.dtype for t in state.values() if t.is_floating_point()), torch.get_default_dtype())
        flow.to(floating)
        try:
            flow.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit the settings stored with them: {error}") from error
        return flow

    # --- checks ---

    def _batch(self, x: Tensor) -> torch.Size:
        return x.shape[: x.dim() - len(self.shape)]

    def _checked(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.validate_args:
            return x
        if tuple(x.shape[x.dim() - len(self.shape) :]) != self.shape or x.dim() < len(self.shape):
            raise ValueError(
                f"expected events of shape {self.shape} behind any batch axes, got a tensor of {tuple(x.shape)}"
            )
        # One reduction instead of a mask: the sum is finite unless a value is not, or values near the largest float
        # add up.
        if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x).all()):
            count = int((~torch.isfinite(x)).sum())
            raise ValueError(
                f"the input holds {count} values that are NaN or infinite, of {x.numel()}; remove or impute them"
            )
        return x


class _Inverse(Bijection):
    """A bijection run backwards."""

    def __init__(self, original: Bijection) -> None:
        super().__init__(original.shape)
        self.original = original
        self.is_uniformly_scaling = original.is_uniformly_scaling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.original.inverse(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.original(y)


def _flatten(bijection: Bijection, inverted: bool) -> list[tuple[Bijection, bool]]:
    """The elementary bijections in the order they are applied, each with whether it runs backwards."""
    if isinstance(bijection, Chain):
        nested = [_flatten(part, inverted) for part in bijection.parts]  # type: ignore[arg-type]
        return [step for steps in (reversed(nested) if inverted else nested) for step in steps]
    if isinstance(bijection, Sandwich):
        return [
            *_flatten(bijection.outer, False),
            *_flatten(bijection.inner, inverted),
            *_flatten(bijection.outer, True),
        ]
    return [(bijection, inverted)]


def _as_matrix(layer: LULinear | DenseLinear, inverted: bool) -> tuple[Tensor, Tensor]:
    """(W, b) of x -> Wx + b in double precision."""
    bias = layer.bias.double()
    if isinstance(layer, DenseLinear):
        weight = layer.weight.double()
        if inverted:
            weight = torch.linalg.inv(weight)
        return weight, (-weight @ bias if inverted else bias)
    lower, upper = (factor.double() for factor in layer.factors())
    if not inverted:
        return lower @ upper, bias
    eye = torch.eye(len(bias), dtype=torch.float64, device=bias.device)
    weight = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    weight = torch.linalg.solve_triangular(upper, weight, upper=True)
    return weight, -weight @ bias


def _base_from(stored: dict[str, Any], shape: tuple[int, ...]) -> Base:
    from usf.flows.radial import LaplaceBase, RadialBase

    known: dict[str, type[Base]] = {c.__name__: c for c in (GaussianBase, LaplaceBase, RadialBase)}
    if stored["name"] not in known:
        raise ValueError(f"unknown base distribution {stored['name']!r}; known: {sorted(known)}")
    return known[stored["name"]](shape, **stored["settings"])


class _Architecture(Flow):
    """phi = A_(n+1) . B_n ... B_1 with B_i = A_i^-1 . C_i . A_i (paper, section 2); a subclass names C."""

    def __init__(
        self,
        shape: int | Sequence[int],
        blocks: int,
        coupling: Callable[..., Bijection],
        *,
        hidden: Sequence[int],
        mask: MaskName | None,
        diagonal: Diagonal,
        base: Base | None,
        conditioner: Conditioner | None,
        settings: dict[str, Any],
    ) -> None:
        shape = as_shape(shape)
        if blocks < 1:
            raise ValueError(f"a flow needs at least one block, got {blocks}")
        parts: list[Bijection] = []
        for index in range(blocks):
            chosen = mask or _default_mask(shape, index)
            inner = coupling(shape, mask=chosen, flip=index % 2 == 1, hidden=hidden, conditioner=conditioner)
            # Conjugating the shift of a single component by a translation changes nothing: no bias to learn there.
            parts.append(Sandwich(LULinear(shape, diagonal=diagonal, bias=math.prod(shape) > 1), inner))
        # The last map always learns its diagonal: it alone gives the flow its determinant.
        parts.append(LULinear(shape))
        super().__init__(Chain(parts), base)
        if conditioner is None:
            self._settings = {
                "shape": list(shape),
                "blocks": blocks,
                "hidden": list(hidden),
                "mask": mask,
                "diagonal": diagonal,
                **settings,
            }


def _default_mask(shape: tuple[int, ...], index: int) -> MaskName:
    """Channels for vectors; on grids channel and checkerboard masks take turns, so that information crosses both."""
    if len(shape) == 1:
        return "channel"
    if shape[0] == 1:
        return "checkerboard"
    if math.prod(shape[1:]) == 1:
        return "channel"
    return "channel" if index // 2 % 2 == 0 else "checkerboard"


class USFlow(_Architecture):
    r"""Uniformly scaling flow: LU-conjugated additive couplings and a final affine map (paper, section 2).

    .. math:: \phi = A_{n+1} \circ B_n \circ \dots \circ B_1, \qquad B_i = A_i^{-1} \circ C_i \circ A_i .

    Only the last map changes volume, so ln|det J| is its sum of log-diagonals times the number of positions.

    Args:
        shape: event shape; (d,) for vectors, (channels, *spatial) otherwise.
        blocks: n.
        hidden: widths of each conditioner's hidden layers.
        coupling: ``"additive"`` as in the paper, or ``"gin"`` (volume-preserving with an input-dependent scale).
        clamp: bound of the log-scale of a GIN coupling; unused otherwise.
        mask: one mask for all blocks, kept and moved changing places from block to block. By default channels (the
            halves of a vector), on grids in turns with the checkerboard.
        diagonal: ``"learned"`` or ``"fixed"`` magnitudes |u_i| of the conjugating maps. The final map's are always
            learned.
        base: standard normal by default.
        conditioner: another conditioner, built from (in_channels, out_channels, spatial axes); such a flow cannot be
            saved whole.

    Raises:
        ValueError: for a setting that makes no bijection, naming it.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        blocks: int = 4,
        *,
        hidden: Sequence[int] = (64, 64),
        coupling: Literal["additive", "gin"] = "additive",
        clamp: float = 2.0,
        mask: MaskName | None = None,
        diagonal: Diagonal = "learned",
        base: Base | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        if coupling not in ("additive", "gin"):
            raise ValueError(
                f"coupling must be 'additive' or 'gin', got {coupling!r}; for affine coupling use NonUSFlow"
            )

        def build(event: tuple[int, ...], **options: Any) -> Bijection:
            return (
                GinCoupling(event, clamp=clamp, **options) if coupling == "gin" else AdditiveCoupling(event, **options)
            )

        super().__init__(
            shape,
            blocks,
            build,
            hidden=hidden,
            mask=mask,
            diagonal=diagonal,
            base=base,
            conditioner=conditioner,
            settings={"coupling": coupling, "clamp": clamp},
        )


class NonUSFlow(_Architecture):
    """The same architecture with affine couplings, which are not uniformly scaling (paper, section 2).

    It differs from :class:`USFlow` in the coupling and in the last layer of each conditioner alone, which returns a
    log-scale besides the shift.

    Args:
        clamp, activation: see :class:`usf.flows.AffineCoupling`.

    Other arguments and errors as in :class:`USFlow`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        blocks: int = 4,
        *,
        hidden: Sequence[int] = (64, 64),
        clamp: float = 2.0,
        activation: Activation = "exp",
        mask: MaskName | None = None,
        diagonal: Diagonal = "learned",
        base: Base | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        def build(event: tuple[int, ...], **options: Any) -> Bijection:
            return AffineCoupling(event, clamp=clamp, activation=activation, **options)

        super().__init__(
            shape,
            blocks,
            build,
            hidden=hidden,
            mask=mask,
            diagonal=diagonal,
            base=base,
            conditioner=conditioner,
            settings={"clamp": clamp, "activation": activation},
        )
