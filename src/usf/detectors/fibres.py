"""CFlow's flow on feature vectors ("fibres"), with its passes written out.

CFlow trains on 64 vectors at a time, thousands of steps an epoch. At that size the bookkeeping of a few hundred small
operations takes longer than the matrix products, so that :func:`decode` is one operation for autograd, with the
gradients of all blocks written out, and :class:`Joined`, which trains on cached features, goes without autograd. The
values are those of :meth:`Block.transform <usf.detectors.coupling.Block.transform>`.

Scoring has a pass of its own, :mod:`usf.detectors.folded`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from usf.detectors.coupling import SUBNET_SCALE, Block

__all__ = ["Decoder", "Joined", "decode"]


class Decoder:
    """CFlow's flow for one feature map, ready to be called many times; see :func:`decode`.

    Reads the blocks' modules once. Their parameters are the same tensors, so that training them is seen here; blocks
    that are moved to another device need a new decoder.

    Args:
        blocks: with coupling networks Linear, ReLU, Linear; all with the same options and sizes.

    Raises:
        ValueError: another coupling network.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.plan = _Plan.of(blocks)
        self.activation = blocks[0].global_scale_activation
        layers = [layers_of(block) for block in blocks]
        lus = [block.lu for block in blocks if block.lu is not None]
        self.parameters: dict[str, list[Tensor]] = {
            "w1": [first.weight for first, _ in layers],
            "b1": [first.bias for first, _ in layers],
            "w2": [last.weight for _, last in layers],
            "b2": [last.bias for _, last in layers],
            "offset": [block.global_offset for block in blocks],
            "scale": [block.global_scale for block in blocks] if blocks[0].options.global_scale else [],
            "lu": [lu.weight for lu in lus],
            "bias": [lu.bias for lu in lus],
        }

    def __call__(self, x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, C), conditions (n, P) -> (z (n, C), ln|det dz/dx| (n,), nats)."""
        stacks = [
            (torch.cat(own) if name in _ROWS else torch.stack(own)) if own else None
            for name, own in self.parameters.items()
        ]
        if (raw := stacks[_SCALE]) is not None:
            stacks[_SCALE] = self.activation(raw)
        z, log_det = _Decode.apply(self.plan, network_type_of(x), x, conditions, *stacks)
        return z, log_det


class Joined:
    """A decoder whose parameters lie side by side in one tensor, with passes that write their gradient into another.

    A step of the optimiser is then one operation instead of one for each of some forty parameters, and autograd keeps
    no books. The blocks' parameters become views of that tensor until :meth:`separate`.

    Args:
        blocks: as for :class:`Decoder`, on their device.

    Attributes:
        parameter: what an optimiser is to know.

    Raises:
        ValueError: another coupling network, or a parameter that is not to be trained.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.decoder = Decoder(blocks)
        own = [parameter for kind in self.decoder.parameters.values() for parameter in kind]
        if not all(parameter.requires_grad for parameter in own):
            raise ValueError("all parameters of the flow are trained together: none may have requires_grad=False")
        self.parameter = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in own]))
        self.gradient = torch.zeros_like(self.parameter)
        self.weights, self.gradients = self._views(self.parameter.detach()), self._views(self.gradient)
        for stack, kind in zip(self.weights, self.decoder.parameters.values(), strict=True):
            for i, parameter in enumerate(kind):
                assert stack is not None
                parameter.data = stack[i].view_as(parameter)
        self.blocks = self.weights.blocks(self.decoder.plan.kept)
        self.passes: dict[tuple[int, torch.dtype], _Pass] = {}

    def _views(self, flat: Tensor) -> _Stack:
        views, start = [], 0
        for name, kind in self.decoder.parameters.items():
            size = sum(parameter.numel() for parameter in kind)
            shape = kind[0].shape[1 if name in _ROWS else 0 :] if kind else ()
            views.append(flat[start : start + size].view(len(kind), *shape) if kind else None)
            start += size
        return _Stack(*views)  # type: ignore[arg-type]  # None is where it may be

    def gradients_of(self, x: Tensor, conditions: Tensor, loss: Callable[[Tensor, Tensor], _Slopes]) -> Tensor:
        """The loss of x (n, C) under conditions (n, P), 0-dim; ``parameter.grad`` becomes its gradient.

        Args:
            x, conditions: without a graph.
            loss: (z (C, n), ln|det| (n,)) -> the loss and its gradients at both.
        """
        plan, key = self.decoder.plan, (len(x), network_type_of(x))
        if key not in self.passes:
            self.passes[key] = _Pass(plan, self.weights, x, key[1])
        weights, own, scale = self.weights, self.blocks, None
        if weights.w1.dtype != key[1]:
            weights = weights.networks_in(key[1])
            own = weights.blocks(plan.kept)
        if (raw := weights.scale) is not None:
            with torch.enable_grad():
                raw = raw.detach().requires_grad_()
                scale = self.decoder.activation(raw)
            weights = weights._replace(scale=scale.detach())
            columns = scale.detach().unsqueeze(2).unbind()
            own = [block._replace(scale=column) for block, column in zip(own, columns, strict=True)]
        passes = self.passes[key]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            z, log_det = passes.forward(weights, own, x.t(), conditions)
            value, gz, g_log_det = loss(z, log_det)
            passes.backward(weights, own, self.gradients, gz, g_log_det, need_x=False)
        at_scale = self.gradients.scale
        if raw is not None and scale is not None and at_scale is not None:
            at_scale.copy_(torch.autograd.grad(scale, raw, at_scale)[0])
        self.parameter.grad = self.gradient
        return value

    def separate(self) -> None:
        """Gives every parameter memory of its own again."""
        for kind in self.decoder.parameters.values():
            for parameter in kind:
                parameter.data = parameter.detach().clone()


def decode(blocks: Sequence[Block], x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C) under conditions (n, P) -> (z (n, C), ln|det dz/dx| (n,), nats), with gradients but for the conditions.

    For a uniformly scaling flow the log-determinants are one number, to the last bit. Under autocast the matrix
    products of the coupling networks are taken in its type, and everything else is left in that of ``x``.
    """
    return Decoder(blocks)(x, conditions)


def network_type_of(x: Tensor) -> torch.dtype:
    """What the coupling networks' matrix products are taken in: autocast's type, or that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def layers_of(block: Block) -> tuple[nn.Linear, nn.Linear]:
    """Those of its coupling network; ValueError where it is another one."""
    first, last = block.layers()
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
        raise ValueError(f"the coupling network must be Linear, ReLU, Linear, not {block.subnet}")
    return first, last


class _Plan(NamedTuple):
    """What the K blocks do besides their parameters.

    Attributes:
        kept: channels of x1.
        coupling, clamp: of the blocks.
        orders, backs: of each block the permutation and its inverse; empty for rotations.
        rotations: of each block (C, C); empty for permutations.
        signs: of each U's diagonal, (C,); empty without LU.
        learned: whether U's diagonal is.
    """

    kept: int
    coupling: str
    clamp: float
    orders: list[Tensor]
    backs: list[Tensor]
    rotations: list[Tensor]
    signs: list[Tensor]
    learned: bool

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> _Plan:
        first = blocks[0]
        return cls(
            kept=first.splits[0],
            coupling=first.options.coupling,
            clamp=first.clamp,
            orders=[block.order for block in blocks if block.hard],
            backs=[block.back for block in blocks if block.hard],
            rotations=[block.w_perm for block in blocks if not block.hard],
            signs=[block.lu.signs for block in blocks if block.lu is not None],
            learned=first.lu is not None and first.options.diagonal == "learned",
        )

    def shuffle(self, i: int, x: Tensor, out: Tensor, back: bool = False) -> None:
        """The channels of x (C, n) in block i's order, or rotated."""
        if self.orders:
            torch.index_select(x, 0, (self.backs if back else self.orders)[i], out=out)
        else:
            rotation = self.rotations[i]
            torch.mm(rotation.t() if back else rotation, x, out=out)

    def diagonal(self, i: int, lu: Tensor) -> Tensor:
        """The diagonal of block i's U, (C,)."""
        return self.signs[i] * lu.diagonal().exp() if self.learned else self.signs[i]


class _Stack(NamedTuple):
    """The parameters of K blocks, or gradients at them, each kind in one tensor.

    Attributes:
        w1, b1: of the coupling networks' first layers, (K, hidden, kept + P), (K, hidden).
        w2, b2: of their second ones, (K, outputs, hidden), (K, outputs).
        offset, scale: by channel, (K, C); None for a scale that is not there.
        lu, bias: (K, C, C), (K, C); None without LU.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    offset: Tensor
    scale: Tensor | None
    lu: Tensor | None
    bias: Tensor | None

    def networks_in(self, dtype: torch.dtype) -> _Stack:
        """The same with the coupling networks in another type."""
        if self.w1.dtype == dtype:
            return self
        w1, b1, w2, b2 = (tensor.to(dtype) for tensor in self[:4])
        return self._replace(w1=w1, b1=b1, w2=w2, b2=b2)

    def blocks(self, kept: int) -> list[_Block]:
        """The same, block by block, as views."""
        count = len(self.w1)

        def views(stack: Tensor | None) -> Sequence[Any]:
            return [None] * count if stack is None else stack.unbind()

        columns = (None if stack is None else stack.unsqueeze(2) for stack in (self.b2, *self[4:6], self.bias))
        b2, offset, scale, bias = map(views, columns)
        own = zip(views(self.w1[..., :kept]), views(self.w2), b2, offset, scale, views(self.lu), bias, strict=True)
        return [_Block(*tensors) for tensors in own]


class _Block(NamedTuple):
    """One block's part of a :class:`_Stack`; of w1 what sees x1, and vectors as columns."""

    w1: Tensor
    w2: Tensor
    b2: Tensor
    offset: Tensor
    scale: Tensor | None
    lu: Tensor
    bias: Tensor


class _Tape(NamedTuple):
    """What a pass keeps of one block, named as in :meth:`_Pass.forward`, and of its gradients (``g_``).

    ``x1, x2``, ``coupled1, coupled2`` and ``g_scale, g_shift`` are halves of ``x``, ``coupled`` and ``g_network``.
    """

    x: Tensor
    x1: Tensor
    x2: Tensor
    coupled: Tensor
    coupled1: Tensor
    coupled2: Tensor
    hidden: Tensor
    squashed: Tensor
    grown: Tensor
    shuffled: Tensor
    mixed: Tensor
    y: Tensor
    g_network: Tensor
    g_scale: Tensor
    g_shift: Tensor
    g_moved: Tensor
    g_hidden: Tensor


_SCALE = _Stack._fields.index("scale")
_ROWS = ("offset", "scale")
"""What the blocks have as rows, (1, C)."""
_Slopes = tuple[Tensor, Tensor, Tensor]
"""A loss, and its gradients at z (C, n) and at ln|det| (n,)."""


class _Pass:
    """Both passes of n vectors through all blocks, with memory for what the second needs of the first.

    Vectors are columns, so that halves, panels and permutations are whole rows. What does not depend on the block
    before is done for all blocks at once: the first layers' share of the conditions, and sums over vectors.

    Args:
        plan, weights: of the blocks.
        like: (n, C); its number, type and device are those of the vectors.
        network_type: of the coupling networks' products.
    """

    def __init__(self, plan: _Plan, weights: _Stack, like: Tensor, network_type: torch.dtype) -> None:
        count, channels = like.shape
        blocks, units, _ = weights.w1.shape
        outputs, half = weights.w2.shape[1], channels - plan.kept
        self.plan, self.network_type = plan, network_type

        def memory(rows: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.empty(blocks, rows, count, dtype=dtype, device=like.device)

        affine = plan.coupling != "additive"
        self.start = torch.empty(channels, count, dtype=like.dtype, device=like.device)
        self.y, self.coupled = memory(channels), memory(channels)
        self.hidden, self.g_hidden = memory(units, network_type), memory(units, network_type)
        self.squashed, grown = memory(half if affine else 0), memory(half if affine else 0)
        shuffled, mixed = (memory(channels), memory(channels)) if plan.signs else (self.y, self.y)
        self.g_network, self.g_moved = memory(outputs), memory(channels)
        self.conditions: Tensor | None = None
        self.tapes = []
        for i in range(blocks):
            x = self.y[i - 1] if i else self.start
            coupled, g_network = self.coupled[i], self.g_network[i]
            self.tapes.append(
                _Tape(
                    x, x[: plan.kept], x[plan.kept :], coupled, coupled[: plan.kept], coupled[plan.kept :],
                    self.hidden[i], self.squashed[i], grown[i], shuffled[i], mixed[i], self.y[i], g_network,
                    g_network[:half], g_network[half:], self.g_moved[i], self.g_hidden[i],
                )
            )  # fmt: skip

    def forward(self, weights: _Stack, own: Sequence[_Block], x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """x (C, n), conditions (n, P) -> (z (C, n), valid until the next call; ln|det| (n,), nats).

        Args:
            weights: their coupling networks in the network type.
            own: :meth:`_Stack.blocks` of it.
        """
        plan = self.plan
        self.conditions = conditions.to(self.network_type)
        at_conditions = weights.w1.flatten(0, 1)[:, plan.kept :]
        torch.addmm(weights.b1.reshape(-1, 1), at_conditions, self.conditions.t(), out=self.hidden.flatten(0, 1))
        self.start.copy_(x)
        for i, (block, tape) in enumerate(zip(own, self.tapes, strict=True)):
            tape.hidden.addmm_(block.w1, tape.x1.to(self.network_type)).relu_()
            a = torch.addmm(block.b2, block.w2, tape.hidden, beta=SUBNET_SCALE, alpha=SUBNET_SCALE)
            tape.coupled1.copy_(tape.x1)
            self._couple(tape, a.to(x.dtype))
            if block.scale is None:
                scaled = tape.coupled + block.offset
            else:
                scaled = torch.addcmul(block.offset, tape.coupled, block.scale)
            plan.shuffle(i, scaled, out=tape.shuffled)
            if plan.signs:
                # For few vectors U, then L, cost less than their product.
                _triangular(tape.shuffled, block.lu, "upper", plan.diagonal(i, block.lu), out=tape.mixed)
                _triangular(tape.mixed, block.lu, "lower", out=tape.y).add_(block.bias)
        return self.y[-1], self._log_det(weights)

    def _couple(self, tape: _Tape, a: Tensor) -> None:
        """The second half of the channels; ``a`` is the network's output, already scaled."""
        if self.plan.coupling == "additive":
            torch.add(tape.x2, a, out=tape.coupled2)
            return
        half = len(tape.x2)
        torch.tanh(a[:half], out=tape.squashed)
        grown = torch.mul(tape.squashed, self.plan.clamp, out=tape.grown)
        if self.plan.coupling == "gin":
            grown -= grown.mean(dim=0)
        torch.addcmul(a[half:], tape.x2, grown.exp_(), out=tape.coupled2)

    def _log_det(self, weights: _Stack) -> Tensor:
        constant = weights.offset.new_zeros(())
        if weights.scale is not None:
            constant = constant + weights.scale.log().sum()
        if self.plan.learned and weights.lu is not None:
            constant = constant + weights.lu.diagonal(dim1=1, dim2=2).sum()
        if self.plan.coupling != "affine":  # GIN's sum is zero, and is not added up
            return constant.repeat(self.start.shape[1])
        return torch.add(constant, self.squashed.sum(dim=(0, 1)), alpha=self.plan.clamp)

    def backward(
        self, weights: _Stack, own: Sequence[_Block], gradients: _Stack, gz: Tensor, g_log_det: Tensor, *, need_x: bool
    ) -> Tensor | None:
        """Gradients at z (C, n) and at ln|det| (n,) -> at x (C, n), where needed; the others into ``gradients``."""
        plan, total = self.plan, g_log_det.sum()
        g, at_x = gz, None
        into = gradients.blocks(plan.kept)
        for i in reversed(range(len(own))):
            block, tape = own[i], self.tapes[i]
            if plan.signs:
                g = self._backward_lu(i, block, into[i], g, total)
            plan.shuffle(i, g, out=tape.g_moved, back=True)
            g = tape.g_moved if block.scale is None else tape.g_moved * block.scale
            g1, g2, at_x = g[: plan.kept], g[plan.kept :], torch.empty_like(g)
            at_x1, at_x2 = at_x[: plan.kept], at_x[plan.kept :]
            if plan.coupling == "additive":
                at_x2.copy_(g2)
                torch.mul(g2, SUBNET_SCALE, out=tape.g_network)
            else:
                torch.mul(g2, tape.grown, out=at_x2)
                g_log = at_x2 * tape.x2
                g_log = g_log - g_log.mean(dim=0) if plan.coupling == "gin" else g_log.add_(g_log_det)
                slope = torch.ops.aten.tanh_backward(g_log, tape.squashed)
                torch.mul(slope, plan.clamp * SUBNET_SCALE, out=tape.g_scale)
                torch.mul(g2, SUBNET_SCALE, out=tape.g_shift)
            at_output = tape.g_network.to(self.network_type)
            _product(at_output, tape.hidden.t(), out=into[i].w2)
            at_hidden = torch.mm(block.w2.t(), at_output)
            torch.ops.aten.threshold_backward.grad_input(at_hidden, tape.hidden, 0, grad_input=tape.g_hidden)
            _product(tape.g_hidden, tape.x1.to(self.network_type).t(), out=into[i].w1)
            if i or need_x:
                torch.add(g1, torch.mm(block.w1.t(), tape.g_hidden), out=at_x1)
            g = at_x
        assert self.conditions is not None
        _product(self.g_hidden.flatten(0, 1), self.conditions, out=gradients.w1.flatten(0, 1)[:, plan.kept :])
        torch.sum(self.g_hidden, dim=2, dtype=gradients.b1.dtype, out=gradients.b1)
        torch.sum(self.g_network, dim=2, out=gradients.b2)
        torch.sum(self.g_moved, dim=2, out=gradients.offset)
        if weights.scale is not None and gradients.scale is not None:
            torch.sum(self.g_moved * self.coupled, dim=2, out=gradients.scale)
            gradients.scale.add_(total / weights.scale)
        return at_x if need_x else None

    def _backward_lu(self, i: int, block: _Block, into: _Block, g: Tensor, total: Tensor) -> Tensor:
        """Gradients at block i's y (C, n) -> before L and U; ``total`` is that at ln|det|, of all vectors."""
        tape, diagonal = self.tapes[i], self.plan.diagonal(i, block.lu)
        torch.sum(g, dim=1, keepdim=True, out=into.bias)
        g_mixed = _triangular(g, block.lu, "lower", back=True)
        _triangular_outer(g, tape.mixed, g_mixed, tape.shuffled, out=into.lu)
        if self.plan.learned:
            into.lu.diagonal().copy_((g_mixed * tape.shuffled).sum(1) * diagonal + total)
        return _triangular(g_mixed, block.lu, "upper", diagonal, back=True)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left @ right into ``out``, which may be of a wider type."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


Part = Literal["lower", "upper"]

_PANEL = 256
"""Rows of a triangular matrix at a time: its empty part is skipped, in panels large enough for a fast product."""


def _panels(channels: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, channels)) for start in range(0, channels, _PANEL)]


def _triangular(
    x: Tensor,
    matrix: Tensor,
    part: Part,
    diagonal: Tensor | None = None,
    *,
    back: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """T x, or T^T x with ``back``, for x (C, n); T is a strict triangle of ``matrix`` plus ``diagonal``, or plus 1."""
    out = torch.empty_like(x) if out is None else out
    for rows in _panels(len(x)):
        own = x[rows]
        corner = matrix[rows, rows].triu(1) if part == "upper" else matrix[rows, rows].tril(-1)
        base = own if diagonal is None else own * diagonal[rows, None]
        y = torch.addmm(base, corner.t() if back else corner, own, out=out[rows])
        rest = slice(rows.stop, None) if (part == "upper") != back else slice(0, rows.start)
        if len(x[rest]):
            y.addmm_(matrix[rest, rows].t() if back else matrix[rows, rest], x[rest])
    return out


def _triangular_outer(g_lower: Tensor, lower: Tensor, g_upper: Tensor, upper: Tensor, out: Tensor) -> None:
    """The strictly lower part of g_lower lower^T plus the strictly upper part of g_upper upper^T, (C, C)."""
    for rows in _panels(len(lower)):
        before, after = slice(0, rows.start), slice(rows.stop, None)
        corner = torch.mm(g_lower[rows], lower[rows].t()).tril_(-1)
        torch.add(corner, torch.mm(g_upper[rows], upper[rows].t()).triu_(1), out=out[rows, rows])
        if rows.start:
            torch.mm(g_lower[rows], lower[before].t(), out=out[rows, before])
        if rows.stop < len(lower):
            torch.mm(g_upper[rows], upper[after].t(), out=out[rows, after])


class _Decode(torch.autograd.Function):
    """All blocks in one operation; see :class:`Decoder`."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, network_type: torch.dtype, x: Tensor, conditions: Tensor, *stacks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights = _Stack(*stacks)  # type: ignore[arg-type]
        with torch.autocast(x.device.type, enabled=False):
            weights = weights.networks_in(network_type)
            ctx.passes = _Pass(plan, weights, x, network_type)
            z, log_det = ctx.passes.forward(weights, weights.blocks(plan.kept), x.t(), conditions)
        # The parameters go through autograd's books, which notice when one is changed before the backward pass.
        ctx.save_for_backward(*stacks)
        return z.t(), log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor, g_log_det: Tensor) -> tuple[Tensor | None, ...]:
        stacks, passes = ctx.saved_tensors, ctx.passes
        weights = _Stack(*stacks).networks_in(passes.network_type)
        gradients = _Stack(*(None if stack is None else torch.empty_like(stack) for stack in stacks))  # type: ignore[arg-type]
        with torch.autocast(gz.device.type, enabled=False):
            own = weights.blocks(passes.plan.kept)
            gx = passes.backward(weights, own, gradients, gz.t(), g_log_det, need_x=ctx.needs_input_grad[2])
        return (None, None, None if gx is None else gx.t(), None, *gradients)
