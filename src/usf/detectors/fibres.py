"""CFlow's flow on feature vectors ("fibres"), with its passes written out.

CFlow trains on 64 vectors at a time, thousands of steps an epoch. At that size the bookkeeping of a few hundred small
operations takes longer than the matrix products, so that :func:`decode` is one operation for autograd, with the
gradients of all blocks written out. The values are those of
:meth:`Block.transform <usf.detectors.coupling.Block.transform>`.

For scoring, :func:`decode_maps` multiplies out what does not depend on the input: the part of each coupling network's
first layer that sees the condition, which is the same for all images, and each block's scale, permutation and LU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from usf.detectors.coupling import SUBNET_SCALE, Block

__all__ = ["decode", "decode_maps"]


def decode(blocks: Sequence[Block], x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C) under conditions (n, P) -> (z (n, C), ln|det dz/dx| (n,), nats), with gradients but for the conditions.

    For a uniformly scaling flow the log-determinants are one number, to the last bit. Under autocast the matrix
    products of the coupling networks are taken in its type, and everything else is left in that of ``x``.

    Args:
        blocks: with coupling networks Linear, ReLU, Linear; all with the same options.
        x: vectors.
        conditions: of each vector.

    Raises:
        ValueError: another coupling network.
    """
    tensors: list[Tensor | None] = []
    scales = _scales(blocks)
    for block, scale in zip(blocks, scales, strict=True):
        first, last = _layers(block)
        lu = block.lu
        tensors += [first.weight, first.bias, last.weight, last.bias, scale, block.global_offset]
        tensors += [None, None] if lu is None else [lu.weight, lu.bias]
    z, log_det = _Decode.apply(blocks, _network_type(x), x, conditions, *tensors)
    return z, log_det


def _network_type(x: Tensor) -> torch.dtype:
    """What the coupling networks' matrix products are taken in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


_PER_BLOCK = 8
"""Tensors of a block: W1, b1, W2, b2, scale, offset, LU's weight and bias."""


def _layers(block: Block) -> tuple[nn.Linear, nn.Linear]:
    layers = list(block.subnet.children()) if isinstance(block.subnet, nn.Sequential) else []
    if len(layers) == 3 and isinstance(layers[1], nn.ReLU):
        first, _, last = layers
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
            return first, last
    raise ValueError(f"the coupling network must be Linear, ReLU, Linear, not {block.subnet}")


def _scales(blocks: Sequence[Block]) -> Sequence[Tensor | None]:
    """The channel scales of all blocks, each (1, C), computed at once; None where there are none."""
    if not blocks[0].options.global_scale:
        return [None] * len(blocks)
    raw = torch.cat([block.global_scale for block in blocks])
    scales: Tensor = blocks[0].global_scale_activation(raw)
    return scales.split(1)


class _Tape(NamedTuple):
    """What the backward pass of one block reads, besides its parameters; named as in :func:`_forward`."""

    w1: Tensor
    w2: Tensor
    joint: Tensor
    hidden: Tensor
    squashed: Tensor | None
    grown: Tensor | None
    x: Tensor
    coupled: Tensor
    shuffled: Tensor
    mixed: Tensor | None
    lower: Tensor | None
    upper: Tensor | None


def _couple(block: Block, x2: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(second half of the channels, ln|det| (n,) or None for zero, tanh of the log-scale, x2's factor).

    ``a`` is the network's output, already scaled.
    """
    if block.options.coupling == "additive":
        return x2 + a, None, None, None
    half = x2.shape[-1]
    squashed = torch.tanh(a[..., :half])
    log_scale = block.clamp * squashed
    local = None
    if block.options.coupling == "gin":
        log_scale -= log_scale.mean(dim=-1, keepdim=True)  # their sum is zero, and is not added up
    else:
        local = log_scale.sum(dim=-1)
    grown = log_scale.exp_()
    return torch.addcmul(a[..., half:], x2, grown), local, squashed, grown


def _forward(
    block: Block, network_type: torch.dtype, x: Tensor, conditions: Tensor, tensors: Sequence[Any]
) -> tuple[Tensor, Tensor | None, _Tape]:
    """One block: x (n, C) -> (y, ln|det| (n,) of the coupling or None for zero, tape)."""
    w1, b1, w2, b2, scale, offset, lu, lu_bias = tensors
    k = block.splits[0]
    joint = torch.cat((x[:, :k], conditions), dim=1)
    if network_type != x.dtype:
        joint, w1, b1, w2, b2 = (tensor.to(network_type) for tensor in (joint, w1, b1, w2, b2))
    hidden = torch.addmm(b1, joint, w1.t()).relu_()
    a = torch.addmm(b2, hidden, w2.t(), beta=SUBNET_SCALE, alpha=SUBNET_SCALE)
    if network_type != x.dtype:
        a = a.to(x.dtype)
    x2, local, squashed, grown = _couple(block, x[:, k:], a)
    coupled = torch.cat((x[:, :k], x2), dim=1)
    y = coupled + offset if scale is None else torch.addcmul(offset, coupled, scale)
    y = y.index_select(1, block.order) if block.hard else y @ block.w_perm.t()
    tape = _Tape(w1, w2, joint, hidden, squashed, grown, x, coupled, y, None, None, None)
    if lu is not None:
        # M = LU = (1 + N)(D + S) with N, S strictly triangular; for few vectors the factors one by one cost less.
        lower, upper = lu.tril(-1), lu.triu(1)
        mixed = torch.addmm(y * _diagonal(block, lu), y, upper.t())
        tape = tape._replace(mixed=mixed, lower=lower, upper=upper)
        y = torch.addmm(mixed, mixed, lower.t()).add_(lu_bias)
    return y, local, tape


def _diagonal(block: Block, lu: Tensor) -> Tensor:
    """The diagonal of U, (C,)."""
    assert block.lu is not None
    return block.lu.signs * lu.diagonal().exp() if block.options.diagonal == "learned" else block.lu.signs


def _constant(block: Block, scale: Tensor | None, lu: Tensor | None) -> Tensor | None:
    """The part of ln|det| that is the same for all inputs, 0-dim; None for zero."""
    total = None if scale is None else scale.log().sum()
    if lu is not None and block.options.diagonal == "learned":
        logs = lu.diagonal().sum()
        total = logs if total is None else total + logs
    return total


def _backward(
    block: Block, tape: _Tape, tensors: Sequence[Any], gy: Tensor, g_local: Tensor, g_constant: Tensor, need_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients at y -> gradients at x (None where not needed) and at the eight tensors."""
    scale, _, lu, _ = tensors[4:]
    k = block.splits[0]
    g_lu = g_lu_bias = None
    if lu is not None:
        assert tape.mixed is not None
        assert tape.lower is not None
        assert tape.upper is not None
        learned = block.options.diagonal == "learned"
        diagonal = _diagonal(block, lu)
        g_lu_bias = gy.sum(dim=0)
        g_lu = (gy.t() @ tape.mixed).tril_(-1)
        g_mixed = torch.addmm(gy, gy, tape.lower)
        g_lu += (g_mixed.t() @ tape.shuffled).triu_(1)
        if learned:
            g_lu.diagonal().copy_((g_mixed * tape.shuffled).sum(dim=0) * diagonal + g_constant)
        gy = torch.addmm(g_mixed * diagonal, g_mixed, tape.upper)
    gy = gy.index_select(1, block.back) if block.hard else gy @ block.w_perm
    g_offset = gy.sum(dim=0, keepdim=True)
    g_scale = None
    if scale is not None:
        g_scale = torch.addcdiv((gy * tape.coupled).sum(dim=0, keepdim=True), g_constant, scale)
        gy = gy * scale
    g2 = gy[:, k:]
    if tape.squashed is None or tape.grown is None:
        ga, gx2 = g2 * SUBNET_SCALE, g2
    else:
        gx2 = g2 * tape.grown
        g_log = gx2 * tape.x[:, k:]
        if block.options.coupling == "gin":
            g_log -= g_log.mean(dim=1, keepdim=True)
        else:
            g_log += g_local[:, None]
        slope = torch.addcmul(g_log, g_log, tape.squashed.square(), value=-1.0).mul_(block.clamp)
        ga = torch.cat((slope, g2), dim=1).mul_(SUBNET_SCALE)
    g_b2, ga = ga.sum(dim=0), ga.to(tape.hidden.dtype)
    g_w2 = ga.t() @ tape.hidden
    g_hidden = torch.ops.aten.threshold_backward(ga @ tape.w2, tape.hidden, 0)
    g_w1, g_b1 = g_hidden.t() @ tape.joint, g_hidden.sum(dim=0)
    gx = None
    if need_x:
        g1 = g_hidden @ tape.w1[:, :k]
        gx = torch.cat((gy[:, :k] + g1, gx2), dim=1)
    network = [gradient.to(gy.dtype) for gradient in (g_w1, g_b1, g_w2, g_b2)]
    return gx, [*network, g_scale, g_offset, g_lu, g_lu_bias]


class _Decode(torch.autograd.Function):
    """All blocks in one operation; see :func:`decode`."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[Block],
        network_type: torch.dtype,
        x: Tensor,
        conditions: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.tapes = blocks, []
        log_det = x.new_zeros(len(x))
        with torch.autocast(x.device.type, enabled=False):
            for i, block in enumerate(blocks):
                own = tensors[i * _PER_BLOCK : (i + 1) * _PER_BLOCK]
                x, local, tape = _forward(block, network_type, x, conditions, own)
                ctx.tapes.append(tape)
                for part in (local, _constant(block, own[4], own[6])):
                    if part is not None:
                        log_det += part
        # The parameters go through autograd's books, which notice when one is changed before the backward pass.
        ctx.save_for_backward(*tensors)
        return x, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor, g_log_det: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        gx: Tensor | None = gz
        total = g_log_det.sum()
        with torch.autocast(gz.device.type, enabled=False):
            for i in reversed(range(len(ctx.blocks))):
                own = tensors[i * _PER_BLOCK : (i + 1) * _PER_BLOCK]
                assert gx is not None
                need_x = i > 0 or ctx.needs_input_grad[2]
                gx, found = _backward(ctx.blocks[i], ctx.tapes[i], own, gx, g_log_det, total, need_x)
                gradients[:0] = found
        return (None, None, gx, None, *gradients)


class _Folded(NamedTuple):
    """A block with what is constant over images multiplied out; for scoring, without gradients.

    Attributes:
        block: the original.
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
        x2, local, _, _ = _couple(self.block, x[..., k:], a)
        y = torch.cat((x[..., :k], x2), dim=-1)
        if self.weight is not None:
            y = F.linear(y, self.weight, self.bias)
        else:
            y = y + self.bias if self.scale is None else torch.addcmul(self.bias, y, self.scale)
            y = y.index_select(-1, self.block.order)
        if local is None or self.constant is None:
            return y, self.constant if local is None else local
        return y, local + self.constant


def _fold(block: Block, conditions: Tensor, network_type: torch.dtype) -> _Folded:
    first, last = _layers(block)
    k = block.splits[0]
    scale = block.global_scale_activation(block.global_scale).flatten() if block.options.global_scale else None
    bias, weight = block.global_offset.flatten(), None
    if block.lu is not None:
        mixing = block.lu.matrix()
        mixing = mixing.index_select(1, block.back) if block.hard else mixing @ block.w_perm
        bias = torch.addmv(block.lu.bias, mixing, bias)
        weight = mixing if scale is None else mixing * scale
    elif not block.hard:
        bias = block.w_perm @ bias
        weight = block.w_perm if scale is None else block.w_perm * scale
    return _Folded(
        block=block,
        first=first.weight[:, :k].to(network_type),
        table=F.linear(conditions, first.weight[:, k:], first.bias).to(network_type),
        last=(SUBNET_SCALE * last.weight).to(network_type),
        last_bias=(SUBNET_SCALE * last.bias).to(network_type),
        weight=weight,
        bias=bias,
        scale=scale,
        constant=_constant(block, scale, None if block.lu is None else block.lu.weight),
    )


def decode_maps(blocks: Sequence[Block], maps: Tensor, conditions: Tensor, *, vectors: int) -> tuple[Tensor, Tensor]:
    """Feature maps (N, C, H, W) -> (latent maps, ln|det dz/dx| by position (N, H, W), nats), without gradients.

    The values are those of :func:`decode`, up to rounding.

    Args:
        blocks: as there.
        maps: of images.
        conditions: of each position, (H * W, P), the same for all images.
        vectors: about how many go through at a time. Bounds memory; the result does not depend on it.
    """
    network_type = _network_type(maps)
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
