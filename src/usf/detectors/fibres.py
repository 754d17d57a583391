"""CFlow's flow on feature vectors ("fibres"), with its passes written out.

CFlow trains on 64 vectors at a time, thousands of steps an epoch. At that size the bookkeeping of a few hundred small
operations takes longer than the matrix products, so that :func:`decode` is one operation for autograd, with the
gradients of all blocks written out. The values are those of
:meth:`Block.transform <usf.detectors.coupling.Block.transform>`.

For scoring, :func:`decode_maps` multiplies out what does not depend on the input: the part of each coupling network's
first layer that sees the condition, which is the same for all images, and each block's scale, permutation and LU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from usf.detectors.coupling import SUBNET_SCALE, Block

__all__ = ["Decoder", "decode", "decode_maps"]


class Decoder:
    """CFlow's flow for one feature map, ready to be called many times; see :func:`decode`.

    Reads the blocks' modules once. Their parameters are the same tensors, so that training them is seen here; blocks
    that are moved to another device need a new decoder.

    Args:
        blocks: with coupling networks Linear, ReLU, Linear; all with the same options.

    Raises:
        ValueError: another coupling network.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.plans = [_Plan.of(block) for block in blocks]
        self.options = blocks[0].options
        self.activation = blocks[0].global_scale_activation
        self.raw_scales: list[Tensor] = [block.global_scale for block in blocks]
        self.parameters: list[Tensor] = []
        for block in blocks:
            first, last = _layers(block)
            self.parameters += [first.weight, first.bias, last.weight, last.bias, block.global_offset]
            self.parameters += [] if block.lu is None else [block.lu.weight, block.lu.bias]

    def __call__(self, x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, C), conditions (n, P) -> (z (n, C), ln|det dz/dx| (n,), nats)."""
        scales = self.activation(torch.cat(self.raw_scales)) if self.options.global_scale else None
        z, log_det = _Decode.apply(self.plans, _network_type(x), x, conditions, scales, *self.parameters)
        return z, log_det


def decode(blocks: Sequence[Block], x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C) under conditions (n, P) -> (z (n, C), ln|det dz/dx| (n,), nats), with gradients but for the conditions.

    For a uniformly scaling flow the log-determinants are one number, to the last bit. Under autocast the matrix
    products of the coupling networks are taken in its type, and everything else is left in that of ``x``.
    """
    return Decoder(blocks)(x, conditions)


def _network_type(x: Tensor) -> torch.dtype:
    """What the coupling networks' matrix products are taken in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _layers(block: Block) -> tuple[nn.Linear, nn.Linear]:
    first, last = block.layers()
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
        raise ValueError(f"the coupling network must be Linear, ReLU, Linear, not {block.subnet}")
    return first, last


class _Plan(NamedTuple):
    """What a block does besides its parameters.

    Attributes:
        kept: channels of x1.
        coupling, clamp: of the block.
        order, back: the permutation and its inverse; None for a rotation.
        rotation: (C, C); None for a permutation.
        signs: of U's diagonal, (C,); None without LU.
        learned: whether U's diagonal is.
    """

    kept: int
    coupling: str
    clamp: float
    order: Tensor | None
    back: Tensor | None
    rotation: Tensor | None
    signs: Tensor | None
    learned: bool

    @classmethod
    def of(cls, block: Block) -> _Plan:
        return cls(
            kept=block.splits[0],
            coupling=block.options.coupling,
            clamp=block.clamp,
            order=block.order if block.hard else None,
            back=block.back if block.hard else None,
            rotation=None if block.hard else block.w_perm,
            signs=None if block.lu is None else block.lu.signs,
            learned=block.options.diagonal == "learned",
        )

    @property
    def parameters(self) -> int:
        """Parameters of the block: W1, b1, W2, b2, offset, and LU's weight and bias."""
        return 5 if self.signs is None else 7


class _Tape(NamedTuple):
    """What the backward pass of one block reads, besides its parameters; named as in :func:`_forward`."""

    w1: Tensor
    w2: Tensor
    joint: Tensor
    hidden: Tensor
    squashed: Tensor | None
    grown: Tensor | None
    x2: Tensor
    coupled: Tensor
    shuffled: Tensor
    mixed: Tensor


def _couple(plan: _Plan, x2: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(second half of the channels, ln|det| (n,) or None for zero, tanh of the log-scale, x2's factor).

    ``a`` is the network's output, already scaled.
    """
    if plan.coupling == "additive":
        return x2 + a, None, None, None
    half = x2.shape[-1]
    squashed = torch.tanh(a[..., :half])
    log_scale = squashed * plan.clamp
    local = None
    if plan.coupling == "gin":
        log_scale -= log_scale.mean(dim=-1, keepdim=True)  # their sum is zero, and is not added up
    else:
        local = log_scale.sum(dim=-1)
    grown = log_scale.exp_()
    return torch.addcmul(a[..., half:], x2, grown), local, squashed, grown


def _forward(
    plan: _Plan, network_type: torch.dtype, x: Tensor, conditions: Tensor, scale: Tensor | None, own: Sequence[Any]
) -> tuple[Tensor, Tensor | None, _Tape]:
    """One block: x (n, C) -> (y, ln|det| (n,) of the coupling or None for zero, tape)."""
    w1, b1, w2, b2, offset = own[:5]
    x1, x2 = x[:, : plan.kept], x[:, plan.kept :]
    joint = torch.cat((x1, conditions), dim=1)
    if network_type != x.dtype:
        joint, w1, b1, w2, b2 = (tensor.to(network_type) for tensor in (joint, w1, b1, w2, b2))
    hidden = torch.addmm(b1, joint, w1.t()).relu_()
    a = torch.addmm(b2, hidden, w2.t(), beta=SUBNET_SCALE, alpha=SUBNET_SCALE)
    if network_type != x.dtype:
        a = a.to(x.dtype)
    moved, local, squashed, grown = _couple(plan, x2, a)
    coupled = torch.cat((x1, moved), dim=1)
    y = coupled + offset if scale is None else torch.addcmul(offset, coupled, scale)
    y = _shuffle(y, plan.order, None if plan.rotation is None else plan.rotation.t())
    shuffled = mixed = y
    if plan.signs is not None:
        # For few vectors U, then L, cost less than their product.
        lu, bias = own[5:]
        mixed = _triangular(shuffled, lu, "upper", _diagonal(plan, lu))
        y = _triangular(mixed, lu, "lower").add_(bias)
    return y, local, _Tape(w1, w2, joint, hidden, squashed, grown, x2, coupled, shuffled, mixed)


def _shuffle(x: Tensor, order: Tensor | None, rotation: Tensor | None) -> Tensor:
    """The channels of x (n, C) in another order, or rotated."""
    if order is not None:
        return x.index_select(1, order)
    assert rotation is not None
    return x @ rotation


def _diagonal(plan: _Plan, lu: Tensor) -> Tensor:
    """The diagonal of U, (C,)."""
    assert plan.signs is not None
    return plan.signs * lu.diagonal().exp() if plan.learned else plan.signs


Part = Literal["lower", "upper"]

_PANEL = 256
"""Rows of a triangular matrix at a time: its empty part is skipped, in panels large enough for a fast product."""


def _panels(channels: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, channels)) for start in range(0, channels, _PANEL)]


def _triangular(x: Tensor, matrix: Tensor, part: Part, diagonal: Tensor | None = None, back: bool = False) -> Tensor:
    """x T^T, or x T with ``back``, for x (n, C); T is a strict triangle of ``matrix`` plus ``diagonal``, or plus 1."""
    parts = []
    for rows in _panels(x.shape[1]):
        own = x[:, rows]
        corner = matrix[rows, rows].triu(1) if part == "upper" else matrix[rows, rows].tril(-1)
        base = own if diagonal is None else own * diagonal[rows]
        y = torch.addmm(base, own, corner if back else corner.t())
        rest = slice(rows.stop, None) if (part == "upper") != back else slice(0, rows.start)
        if x[:, rest].numel():
            y.addmm_(x[:, rest], matrix[rest, rows] if back else matrix[rows, rest].t())
        parts.append(y)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _triangular_outer(g_lower: Tensor, lower: Tensor, g_upper: Tensor, upper: Tensor) -> Tensor:
    """The strictly lower part of g_lower^T lower plus the strictly upper part of g_upper^T upper, (C, C)."""
    channels = lower.shape[1]
    total = lower.new_empty(channels, channels)
    for rows in _panels(channels):
        before, after = slice(0, rows.start), slice(rows.stop, channels)
        corner = torch.mm(g_lower[:, rows].t(), lower[:, rows]).tril_(-1)
        total[rows, rows] = corner.add_(torch.mm(g_upper[:, rows].t(), upper[:, rows]).triu_(1))
        if rows.start:
            torch.mm(g_lower[:, rows].t(), lower[:, before], out=total[rows, before])
        if rows.stop < channels:
            torch.mm(g_upper[:, rows].t(), upper[:, after], out=total[rows, after])
    return total


def _backward(
    plan: _Plan,
    tape: _Tape,
    scale: Tensor | None,
    own: Sequence[Any],
    gy: Tensor,
    g_local: Tensor,
    g_constant: Tensor,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients at y -> gradients at x (None where not needed), at the scale and at the block's own parameters.

    ``g_local`` (n,) and ``g_constant``, its sum, are at ln|det|; the scale's share of it is left to the caller.
    """
    linear: list[Tensor] = []
    if plan.signs is not None:
        lu = own[5]
        diagonal = _diagonal(plan, lu)
        g_mixed = _triangular(gy, lu, "lower", back=True)
        g_lu = _triangular_outer(gy, tape.mixed, g_mixed, tape.shuffled)
        if plan.learned:
            g_lu.diagonal().copy_((g_mixed * tape.shuffled).sum(0) * diagonal + g_constant)
        linear = [g_lu, gy.sum(0)]
        gy = _triangular(g_mixed, lu, "upper", diagonal, back=True)
    gy = _shuffle(gy, plan.back, plan.rotation)
    g_offset, g_scale = gy.sum(0, keepdim=True), None
    if scale is not None:
        g_scale = (gy * tape.coupled).sum(0)
        gy = gy * scale
    g1, g2 = gy[:, : plan.kept], gy[:, plan.kept :]
    if tape.squashed is None or tape.grown is None:
        ga, gx2 = g2 * SUBNET_SCALE, g2
    else:
        gx2 = g2 * tape.grown
        g_log = gx2 * tape.x2
        if plan.coupling == "gin":
            g_log -= g_log.mean(dim=1, keepdim=True)
        else:
            g_log += g_local[:, None]
        slope = torch.addcmul(g_log, g_log, tape.squashed.square(), value=-1.0).mul_(plan.clamp)
        ga = torch.cat((slope, g2), dim=1).mul_(SUBNET_SCALE)
    g_b2, ga = ga.sum(0), ga.to(tape.hidden.dtype)
    g_w2 = torch.mm(ga.t(), tape.hidden)
    g_hidden = torch.ops.aten.threshold_backward(torch.mm(ga, tape.w2), tape.hidden, 0)
    network = [torch.mm(g_hidden.t(), tape.joint), g_hidden.sum(0), g_w2, g_b2]
    if g_hidden.dtype != gy.dtype:
        network = [gradient.to(gy.dtype) for gradient in network]
    gx = None
    if need_x:
        gx = torch.cat((g1 + torch.mm(g_hidden, tape.w1[:, : plan.kept]), gx2), dim=1)
    return gx, g_scale, [*network, g_offset, *linear]


class _Decode(torch.autograd.Function):
    """All blocks in one operation; see :class:`Decoder`."""

    @staticmethod
    def forward(
        ctx: Any,
        plans: Sequence[_Plan],
        network_type: torch.dtype,
        x: Tensor,
        conditions: Tensor,
        scales: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.plans, ctx.tapes = plans, []
        log_det = x.new_zeros(len(x)) if scales is None else scales.log().sum().repeat(len(x))
        with torch.autocast(x.device.type, enabled=False):
            for i, plan in enumerate(plans):
                own = parameters[i * plan.parameters : (i + 1) * plan.parameters]
                scale = None if scales is None else scales[i]
                x, local, tape = _forward(plan, network_type, x, conditions, scale, own)
                ctx.tapes.append(tape)
                if local is not None:
                    log_det += local
                if plan.signs is not None and plan.learned:
                    log_det += own[5].diagonal().sum()
        # The parameters go through autograd's books, which notice when one is changed before the backward pass.
        ctx.save_for_backward(scales, *parameters)
        return x, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor, g_log_det: Tensor) -> tuple[Tensor | None, ...]:
        scales, *parameters = ctx.saved_tensors
        gradients: list[list[Tensor]] = []
        g_scales: list[Tensor] = []
        gx: Tensor | None = gz
        total = g_log_det.sum()
        with torch.autocast(gz.device.type, enabled=False):
            for i in reversed(range(len(ctx.plans))):
                plan = ctx.plans[i]
                own = parameters[i * plan.parameters : (i + 1) * plan.parameters]
                scale = None if scales is None else scales[i]
                assert gx is not None
                need_x = i > 0 or ctx.needs_input_grad[2]
                gx, g_scale, found = _backward(plan, ctx.tapes[i], scale, own, gx, g_log_det, total, need_x)
                gradients.append(found)
                if g_scale is not None:
                    g_scales.append(g_scale)
            at_scales = torch.stack(g_scales[::-1]) + total / scales if g_scales else None
        return (None, None, gx, None, at_scales, *itertools.chain.from_iterable(reversed(gradients)))


class _Folded(NamedTuple):
    """A block with what is constant over images multiplied out; for scoring, without gradients.

    Attributes:
        plan: of the block.
        first: W1's columns that see x1, (hidden, C1).
        table: W1's other columns applied to the conditions, plus b1, (positions, hidden).
        last, last_bias: W2 and b2, scaled.
        weight: M P diag(scale), (C, C); None for a hard permutation without LU.
        bias: (C,): of ``weight``, or before the permutation where that is None.
        scale: (C,), where ``weight`` is None and there is one.
        constant: of ln|det|, 0-dim; None for zero.
    """

    plan: _Plan
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
        k = self.plan.kept
        hidden = F.relu(F.linear(x[..., :k].to(self.first.dtype), self.first) + self.table[positions])
        a = F.linear(hidden, self.last, self.last_bias).to(x.dtype)
        x2, local, _, _ = _couple(self.plan, x[..., k:], a)
        y = torch.cat((x[..., :k], x2), dim=-1)
        if self.weight is not None:
            y = F.linear(y, self.weight, self.bias)
        else:
            y = y + self.bias if self.scale is None else torch.addcmul(self.bias, y, self.scale)
            y = y.index_select(-1, self.plan.order)  # type: ignore[arg-type]  # without a weight it is hard
        if local is None or self.constant is None:
            return y, self.constant if local is None else local
        return y, local + self.constant


def _fold(block: Block, conditions: Tensor, network_type: torch.dtype) -> _Folded:
    _, last = _layers(block)
    at_x1, table = block.seen(conditions)
    scale = block.global_scale_activation(block.global_scale).flatten() if block.options.global_scale else None
    weight, bias = None, block.global_offset.flatten()
    if block.lu is not None or not block.hard:
        weight, bias = block.after_coupling()
    return _Folded(
        plan=_Plan.of(block),
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
