"""The block that anomalib's flow detectors are built from, with a chosen coupling and mixing.

anomalib's FastFlow, CFlow and U-Flow all stack ``AllInOneBlock``: an affine coupling, a learned scale per channel, a
hard random permutation. :class:`Block` keeps its interface, its parameters' names and its order of random draws, and
replaces the coupling and the mixing. :func:`building_with` puts it in the place of the original while a detector is
constructed, so that the detector's own code stays anomalib's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from anomalib.models.components.flow import AllInOneBlock
from torch import Tensor, nn
from torch.nn import functional as F

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
            in anomalib's loss, so that training it lets that loss fall without bound.
        match_parameters: widen additive coupling networks to the size of the affine ones. Without it they are smaller,
            for they have half the outputs. LU's own parameters come on top either way.

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
    match_parameters: bool = False

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
    order: Tensor
    back: Tensor

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
        constructor = subnet_constructor
        if options.coupling == "additive":
            constructor = _halved(constructor)
            if options.match_parameters:
                constructor = _matched(constructor, subnet_constructor)
        super().__init__(dims_in, subnet_constructor=constructor, **kwargs)  # type: ignore[arg-type]  # any rank
        self.options = options
        self.lu = LULinear(dims_in[0], diagonal=options.diagonal) if options.mixing == "lu" else None
        if not options.global_scale:
            self.global_scale.requires_grad_(False)
        # A hard permutation is applied by index; the dense matrices stay in the state dict, under anomalib's names.
        self.hard = not kwargs.get("permute_soft")
        self.register_buffer("order", self.w_perm.flatten(1).argmax(dim=1), persistent=False)
        self.register_buffer("back", self.order.argsort(), persistent=False)
        self.register_load_state_dict_post_hook(_read_order)

    def transform(self, x: Tensor, conditions: Sequence[Tensor] = (), rev: bool = False) -> tuple[Tensor, Tensor]:
        """x (N, C, *spatial) -> (y of the same shape, ln|det| by position (N, *spatial), nats).

        The sum over positions is the log-determinant of the block. Under ``gin`` the terms differ between positions and
        inputs, their sum does not.
        """
        constant = x.new_zeros(())
        if rev:
            x, constant = self._permute(x, rev=True)
        x1, x2 = x.split(self.splits, dim=1)
        a = self.subnet(torch.cat([x1, *conditions], dim=1) if self.conditional else x1)
        x2, local = self._couple(x2, a, rev)
        x = torch.cat((x1, x2), dim=1)
        if not rev:
            x, constant = self._permute(x)
        return x, local - constant if rev else local + constant

    def forward(  # type: ignore[override]  # the parent says Tensor, and takes tuples
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """anomalib's interface: ((x,), conditions) -> ((y,), ln|det| (N,), nats)."""
        del jac
        y, local = self.transform(x[0], c or (), rev)
        if self.options.is_uniformly_scaling:
            # Not the sum of what cancels: the same number for every input, to the last bit.
            total = local.new_zeros(len(local)) + math.prod(y.shape[2:]) * self.log_scale() * (-1 if rev else 1)
        else:
            total = local.reshape(len(local), -1).sum(dim=1)
        return (y,), total

    def _couple(self, x: Tensor, a: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        """The second half of the channels and the log-determinant by position, (N, *spatial)."""
        a = SUBNET_SCALE * a
        if self.options.coupling == "additive":
            return (x - a if rev else x + a), x.new_zeros(()).expand(x.shape[0], *x.shape[2:])
        log_scale, shift = a.split(x.shape[1], dim=1)
        log_scale = self.clamp * torch.tanh(log_scale)
        if self.options.coupling == "gin":
            log_scale = log_scale - log_scale.mean(dim=self.sum_dims, keepdim=True)
        if rev:
            return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1)
        return x * torch.exp(log_scale) + shift, log_scale.sum(dim=1)

    def log_scale(self) -> Tensor:
        """The part of ln|det| at a position that does not depend on the input, 0-dim: channel scales and diagonal."""
        ladj = self.global_scale.new_zeros(())
        if self.options.global_scale:
            ladj = ladj + torch.log(self.global_scale_activation(self.global_scale)).sum()
        if self.lu is not None and self.options.diagonal == "learned":
            ladj = ladj + self.lu.log_diagonal.sum()
        return ladj

    def after_coupling(self) -> tuple[Tensor, Tensor]:
        """(W (C, C), b (C,)): scale, offset, permutation, L and U as one affine map of the channels."""
        weight = self.w_perm.flatten(1)
        if self.lu is not None:
            weight = self.lu.matrix().index_select(1, self.back) if self.hard else self.lu.matrix() @ weight
        bias = weight @ self.global_offset.flatten()
        if self.lu is not None:
            bias = self.lu.bias + bias
        if self.options.global_scale:
            weight = weight * self.global_scale_activation(self.global_scale).flatten()
        return weight, bias

    def layers(self) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
        """The two layers of the coupling network.

        Raises:
            ValueError: a network that is not two layers with a ReLU between.
        """
        layers = list(self.subnet.children()) if isinstance(self.subnet, nn.Sequential) else []
        if len(layers) == 3 and isinstance(layers[1], nn.ReLU):
            first, _, last = layers
            if isinstance(first, (nn.Linear, nn.Conv2d)) and isinstance(last, (nn.Linear, nn.Conv2d)):
                return first, last
        raise ValueError(f"a coupling network of two layers with a ReLU between is needed, not {self.subnet}")

    def seen(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """A pointwise first layer taken apart: what it makes of the conditions is the same for every image.

        Args:
            conditions: (positions, P).

        Returns:
            its weights at x1, (hidden, C1), and its values at the conditions, bias included, (positions, hidden).
        """
        first, _ = self.layers()
        weight = first.weight.flatten(1)
        return weight[:, : self.splits[0]], F.linear(conditions, weight[:, self.splits[0] :], first.bias)

    def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Scale, offset, permutation and LU; the second value is :meth:`log_scale`."""
        scale = (
            self.global_scale_activation(self.global_scale)
            if self.options.global_scale
            else torch.ones_like(self.global_scale)
        )
        if rev:
            if self.lu is not None:
                x = self.lu.solve(x - self.lu.bias.reshape(self.global_offset.shape))
            return (self._shuffle(x, rev=True) - self.global_offset) / scale, self.log_scale()
        if self.lu is None:
            return self._shuffle(x * scale + self.global_offset), self.log_scale()
        if not self.lu.is_wide(x):
            # Fewer vectors than channels: U, then L, instead of their product.
            return self.lu.linear(self._shuffle(x * scale + self.global_offset), self.lu.bias), self.log_scale()
        # One convolution: the product of the small matrices costs less than one more pass over the feature map,
        # forwards and backwards.
        weight, bias = self.after_coupling()
        return self.permute_function(x, weight.reshape(self.w_perm.shape), bias), self.log_scale()

    def _shuffle(self, x: Tensor, rev: bool = False) -> Tensor:
        """The permutation, or its inverse, of the channels."""
        if not self.hard:
            return self.permute_function(x, self.w_perm_inv if rev else self.w_perm)
        order, back = (self.back, self.order) if rev else (self.order, self.back)
        if torch.is_grad_enabled() and x.requires_grad:
            shuffled: Tensor = _Shuffle.apply(x, order, back)
            return shuffled
        return x.index_select(1, order)


def _read_order(block: Block, _: object) -> None:
    """After a state dict was read: the order that its permutation matrix stands for."""
    block.order.copy_(block.w_perm.flatten(1).argmax(dim=1))
    block.back.copy_(block.order.argsort())


class _Shuffle(torch.autograd.Function):
    """Channels in another order; the gradient is gathered too, where torch's own would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient.index_select(1, back), None, None


def _halved(constructor: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
    """The constructor of a network with shifts alone: half as many outputs."""

    def shift_only(channels_in: int, channels_out: int) -> nn.Module:
        return constructor(channels_in, channels_out // 2)

    return shift_only


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matched(
    constructor: Callable[[int, int], nn.Module], stock: Callable[[int, int], nn.Module]
) -> Callable[[int, int], nn.Module]:
    """The constructor with as many hidden units as bring its network nearest to the size of the ``stock`` one."""

    def matched(channels_in: int, channels_out: int) -> nn.Module:
        with torch.device("meta"):
            template, wanted = constructor(channels_in, channels_out), _size(stock(channels_in, channels_out))
        layers = list(template.children())
        if len(layers) != 3 or not all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers[::2]):
            raise ValueError("match_parameters needs a coupling network of two layers with an activation between")
        first, activation, last = layers
        old, out = len(first.weight), len(last.weight)  # type: ignore[arg-type]
        # The size is linear in the number of hidden units, but for the last layer's bias.
        hidden = round((wanted - out) * old / (_size(template) - out))
        if isinstance(first, nn.Linear):
            return nn.Sequential(nn.Linear(first.in_features, hidden), activation, nn.Linear(hidden, out))
        return nn.Sequential(
            nn.Conv2d(channels_in, hidden, first.kernel_size, padding="same"),  # type: ignore[arg-type]
            activation,
            nn.Conv2d(hidden, out, last.kernel_size, padding="same"),  # type: ignore[arg-type]
        )

    return matched


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
