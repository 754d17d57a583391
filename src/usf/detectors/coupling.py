"""The block that anomalib's flow detectors are built from, with a chosen coupling and mixing.

anomalib's FastFlow, CFlow and U-Flow all stack ``AllInOneBlock``: an affine coupling, a learned scale per channel, a
hard random permutation. :class:`Block` keeps its interface, its parameters' names and its order of random draws, and
replaces two methods: the coupling (``_affine``) and the mixing (``_permute``). :func:`building_with` puts it in the
place of the original while a detector is constructed, so that the detector's own code stays anomalib's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from anomalib.models.components.flow import AllInOneBlock
from torch import Tensor, nn

from usf.flows import LULinear

__all__ = ["Block", "Coupling", "Diagonal", "FlowOptions", "Mixing", "building_with"]

Coupling = Literal["affine", "additive", "gin"]
Mixing = Literal["permutation", "lu"]
Diagonal = Literal["fixed", "learned"]

SUBNET_SCALE = 0.1
"""anomalib damps the coupling network's output by this factor, for every coupling alike."""


@dataclasses.dataclass(frozen=True)
class FlowOptions:
    """What a flow detector's blocks are made of. The defaults are the paper's uniformly scaling flow (section 5).

    Attributes:
        coupling: ``"affine"`` (anomalib's), ``"additive"``, or ``"gin"`` (affine with log-scales that sum to zero).
            The last two have a log-determinant that does not depend on the input.
        mixing: ``"permutation"`` (anomalib's hard random permutation), or ``"lu"``: the permutation followed by
            M = LU + bias as a 1x1 convolution, starting at the identity.
        diagonal: of U in ``mixing="lu"``: ``"fixed"`` holds it at one (the paper's "fixed diagonal magnitudes"),
            ``"learned"`` trains its logarithm.
        global_scale: keep anomalib's learned scale per channel. Constant over inputs, so a uniformly scaling flow may
            have it; without it, and with a fixed diagonal, every log-determinant is exactly zero.
        train_layer_norm: train the layer normalisation that anomalib puts before the flow. Its Jacobian is not counted
            in the loss, so that training it lets the likelihood grow without bound.

    Raises:
        ValueError: an unknown value, naming the option.

    >>> FlowOptions().is_uniformly_scaling, FlowOptions(coupling="affine").is_uniformly_scaling
    (True, False)
    """

    coupling: Coupling = "additive"
    mixing: Mixing = "lu"
    diagonal: Diagonal = "fixed"
    global_scale: bool = True
    train_layer_norm: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("coupling", Coupling), ("mixing", Mixing), ("diagonal", Diagonal)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, get_args(allowed)))}")

    @property
    def is_uniformly_scaling(self) -> bool:
        """Whether the log-determinant is the same for every input."""
        return self.coupling != "affine"


class Block(AllInOneBlock):
    """anomalib's ``AllInOneBlock`` with a chosen coupling and mixing; same interface, any input rank.

    The first half of the channels x1 passes, the second half becomes

    * affine: x2 * exp(s) + t, s = clamp * tanh(0.1 a_1), t = 0.1 a_2;
    * gin: the same with s minus its mean over the half, so that the log-scales sum to zero;
    * additive: x2 + 0.1 a, the network having half as many outputs;

    where a is the network's output at x1. Then scale and offset per channel, permutation, and M = LU where asked for.

    Args:
        options: see :class:`FlowOptions`.
        dims_in, subnet_constructor, kwargs: anomalib's.

    Raises:
        ValueError: for settings of anomalib's block that no detector uses and that this one does not implement.
    """

    # What the parent's constructor sets without saying the type, or leaves empty for settings that are refused here.
    w_perm: nn.Parameter
    w_perm_inv: nn.Parameter
    permute_function: Callable[..., Tensor]

    def __init__(
        self,
        dims_in: list[tuple[int, ...]],
        *,
        options: FlowOptions,
        subnet_constructor: Callable[[int, int], nn.Module],
        **kwargs: Any,
    ) -> None:
        for unsupported in ("gin_block", "learned_householder_permutation", "reverse_permutation"):
            if kwargs.get(unsupported):
                raise ValueError(f"{unsupported} is not supported: choose with coupling and mixing instead")
        if options.coupling == "additive":
            full = subnet_constructor

            def shift_only(channels_in: int, channels_out: int) -> nn.Module:
                return full(channels_in, channels_out // 2)

            subnet_constructor = shift_only
        super().__init__(dims_in, subnet_constructor=subnet_constructor, **kwargs)  # type: ignore[arg-type]  # any rank
        self.options = options
        self.lu = LULinear(dims_in[0], diagonal=options.diagonal) if options.mixing == "lu" else None
        if not options.global_scale:
            self.global_scale.requires_grad_(False)

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        a = SUBNET_SCALE * a
        # A fresh tensor: the caller adds to it in place.
        constant = x.new_zeros(x.shape[0])
        if self.options.coupling == "additive":
            return (x - a if rev else x + a), constant
        channels = x.shape[1]
        log_scale = self.clamp * torch.tanh(a[:, :channels])
        shift = a[:, channels:]
        if self.options.coupling == "gin":
            log_scale = log_scale - log_scale.mean(dim=self.sum_dims, keepdim=True)
            ladj = constant
        else:
            ladj = log_scale.sum(dim=self.sum_dims)
        if rev:
            return (x - shift) * torch.exp(-log_scale), -ladj
        return x * torch.exp(log_scale) + shift, ladj

    def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Scale, offset, permutation and LU; the second value is the log-determinant per position, 0-dim."""
        if self.options.global_scale:
            scale = self.global_scale_activation(self.global_scale)
            ladj = torch.log(scale).sum()
        else:
            scale = torch.ones_like(self.global_scale)
            ladj = x.new_zeros(())
        if rev:
            if self.lu is not None:
                x = self.lu.solve(x - self.lu.bias.reshape(self.global_offset.shape))
            return (self.permute_function(x, self.w_perm_inv) - self.global_offset) / scale, self._with_diagonal(ladj)
        # One convolution for scale, offset, permutation, L and U: the product of the small matrices costs less than one
        # more pass over the feature map, forwards and backwards.
        mixing = self.w_perm.flatten(1) if self.lu is None else self.lu.matrix() @ self.w_perm.flatten(1)
        bias = mixing @ self.global_offset.flatten()
        if self.lu is not None:
            bias = bias + self.lu.bias
        weight = (mixing * scale.flatten()).reshape(self.w_perm.shape)
        return self.permute_function(x, weight, bias), self._with_diagonal(ladj)

    def _with_diagonal(self, ladj: Tensor) -> Tensor:
        return ladj + self.lu.log_diagonal.sum() if self.lu is not None and self.options.diagonal == "learned" else ladj


_construction = threading.RLock()


@contextlib.contextmanager
def building_with(module: ModuleType, options: FlowOptions) -> Iterator[None]:
    """While the context is open, and in this thread only, ``module.AllInOneBlock`` builds :class:`Block`.

    anomalib's constructors look the name up in their own module, so this is the smallest place where the block can be
    chosen without copying a constructor. The original is restored however the context is left; other threads that
    construct a stock detector meanwhile get the stock block.

    Args:
        module: anomalib's module that holds the name, e.g. ``anomalib.models.image.fastflow.torch_model``.
        options: what the blocks are made of.
    """
    chosen = functools.partial(Block, options=options)
    owner = threading.get_ident()
    with _construction:
        original = module.AllInOneBlock

        def construct(*args: Any, **kwargs: Any) -> AllInOneBlock:
            return (chosen if threading.get_ident() == owner else original)(*args, **kwargs)

        module.AllInOneBlock = construct  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.AllInOneBlock = original  # type: ignore[attr-defined]
