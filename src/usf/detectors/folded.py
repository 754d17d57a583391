"""CFlow's flow for scoring: what is the same for all images is multiplied out once.

That is the part of each coupling network's first layer that sees the condition, and each block's scale, permutation
and LU. Training changes both with every step, and has its passes in :mod:`usf.detectors.fibres`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from usf.detectors.coupling import SUBNET_SCALE, Block
from usf.detectors.fibres import layers_of, network_type_of

__all__ = ["decode_maps"]


class _Folded(NamedTuple):
    """A block with what is constant over images multiplied out; for scoring, without gradients.

    Attributes:
        block: whose passes these are.
        first: W1's columns that see x1, (hidden, C1).
        table: W1's other columns applied to the conditions, plus b1, (positions, hidden).
        last, last_bias: W2 and b2, scaled.
        weight: M P diag(scale), (C, C); None for a hard permutation without LU.
        bias: (C,): of ``weight``, or before the permutation where that is None.
        scale: (C,), where ``weight`` is None and there is one.
        constant: of ln|det|, 0-dim; None for zero.
    """

    block: Block
    first: Tensor
    table: Tensor
    last: Tensor
    last_bias: Tensor
    weight: Tensor | None
    bias: Tensor
    scale: Tensor | None
    constant: Tensor | None

    def __call__(self, x: Tensor, positions: slice) -> tuple[Tensor, Tensor | None]:
        """x (N, Q, C) at Q ``positions`` -> (y (N, Q, C), ln|det| (N, Q), 0-dim, or None for zero)."""
        k = self.block.splits[0]
        hidden = F.relu(F.linear(x[..., :k].to(self.first.dtype), self.first) + self.table[positions])
        a = F.linear(hidden, self.last, self.last_bias).to(x.dtype)
        x2, local = _couple(self.block, x[..., k:], a)
        y = torch.cat((x[..., :k], x2), dim=-1)
        if self.weight is not None:
            y = F.linear(y, self.weight, self.bias)
        else:
            y = y + self.bias if self.scale is None else torch.addcmul(self.bias, y, self.scale)
            y = y.index_select(-1, self.block.order)  # without a weight it is hard
        if local is None or self.constant is None:
            return y, self.constant if local is None else local
        return y, local + self.constant


def _couple(block: Block, x2: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """(second half of the channels, ln|det| or None for zero); channels last, ``a`` already scaled."""
    if block.options.coupling == "additive":
        return x2 + a, None
    half = x2.shape[-1]
    log_scale = block.clamp * torch.tanh(a[..., :half])
    local = None
    if block.options.coupling == "gin":
        log_scale -= log_scale.mean(dim=-1, keepdim=True)  # their sum is zero, and is not added up
    else:
        local = log_scale.sum(dim=-1)
    return torch.addcmul(a[..., half:], x2, log_scale.exp_()), local


def _fold(block: Block, conditions: Tensor, network_type: torch.dtype) -> _Folded:
    _, last = layers_of(block)
    at_x1, table = block.seen(conditions)
    scale = block.global_scale_activation(block.global_scale).flatten() if block.options.global_scale else None
    weight, bias = None, block.global_offset.flatten()
    if block.lu is not None or not block.hard:
        weight, bias = block.after_coupling()
    return _Folded(
        block=block,
        first=at_x1.to(network_type),
        table=table.to(network_type),
        last=(SUBNET_SCALE * last.weight).to(network_type),
        last_bias=(SUBNET_SCALE * last.bias).to(network_type),
        weight=weight,
        bias=bias,
        scale=scale,
        constant=block.log_scale() if block.options.global_scale or block.options.diagonal == "learned" else None,
    )


def decode_maps(blocks: Sequence[Block], maps: Tensor, conditions: Tensor, *, vectors: int) -> tuple[Tensor, Tensor]:
    """Feature maps (N, C, H, W) -> (latent maps, ln|det dz/dx| by position (N, H, W), nats), without gradients.

    The values are those of :func:`usf.detectors.fibres.decode`, up to rounding.

    Args:
        blocks: as there.
        maps: of images.
        conditions: of each position, (H * W, P), the same for all images.
        vectors: about how many go through at a time. Bounds memory; the result does not depend on it.
    """
    network_type = network_type_of(maps)
    images, positions = len(maps), maps.shape[2] * maps.shape[3]
    rows = maps.flatten(2).transpose(1, 2)
    # An exporter would unroll a loop into its graph.
    step = positions if torch.compiler.is_compiling() or torch.jit.is_tracing() else max(1, vectors // images)
    hidden, log_dets = [], []
    with torch.no_grad(), torch.autocast(maps.device.type, enabled=False):
        folded = [_fold(block, conditions, network_type) for block in blocks]
        for start in range(0, positions, step):
            part = slice(start, start + step)
            z = rows[:, part]
            log_det = z.new_zeros(z.shape[:2])
            for block in folded:
                z, local = block(z, part)
                if local is not None:
                    log_det = log_det + local
            hidden.append(z)
            log_dets.append(log_det)
        z = torch.cat(hidden, dim=1).transpose(1, 2).reshape(maps.shape)
        return z, torch.cat(log_dets, dim=1).reshape(images, *maps.shape[2:])
