"""Detectors for use instead of training: what is constant multiplied out, and exported to ONNX and OpenVINO.

:func:`fused` makes an inference copy of a detector's torch model with the same maps. :func:`exportable` makes the copy
of a Lightning model that anomalib's exporters write; ``Engine.export`` does so by itself for the classes here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval as fold_into

from usf.detectors.backbones import MCait
from usf.detectors.coupling import SUBNET_SCALE, Block
from usf.detectors.model import DetectorModel

__all__ = ["Chain", "Resize", "exportable", "fused"]

Model = TypeVar("Model", bound=DetectorModel)
Lightning = TypeVar("Lightning", bound=nn.Module)

VECTORS = 2048
"""Positions that a chain with conditions takes at a time; bounds memory, and stays in the processor's cache."""


def _exporting() -> bool:
    """Whether operations are being recorded, for a runtime that lays out memory and fuses operations by itself."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight`` (D, C) applied to the channels of x (N, C, H, W), plus ``bias`` (D,): a 1x1 convolution.

    As a product of matrices, which on maps with the channels last in memory is faster than torch's convolution; as the
    convolution in an exported graph, where a product would come with two transpositions.
    """
    if _exporting():
        return F.conv2d(x, weight[:, :, None, None], bias)
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _add_mixed(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + ``weight`` x, written into y, which comes from :func:`_mix`; a new tensor in an exported graph."""
    if _exporting():
        return y + _mix(x, weight)
    rows = x.movedim(1, -1)
    y.movedim(1, -1).view(-1, y.shape[1]).addmm_(rows.reshape(-1, rows.shape[-1]), weight.t())
    return y


def _relu(x: Tensor) -> Tensor:
    """ReLU of a tensor that nobody else needs."""
    return F.relu(x, inplace=not _exporting())


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1})


def _matrix(layer: nn.Module) -> Tensor:
    """(D, C) of a pointwise layer."""
    return cast(Tensor, layer.weight).flatten(1)


def _pays(block: Block) -> bool:
    """Whether a block can share the dense map of the one before it, and that saves work.

    With C channels, h hidden ones and couplings of halves, two maps and two 1x1 layers cost 2 C^2 + C h, and together
    C^2 + 2 C h.
    """
    first, last = block.layers()
    pointwise = _is_pointwise(first) and _is_pointwise(last)
    additive = block.options.coupling == "additive" and not block.conditional
    return additive and pointwise and len(_matrix(first)) < block.in_channels


class _Step(nn.Module):
    """A coupling and the dense map W x + b behind it; with ``after``, the next block too.

    An additive block with pointwise layers maps x to W' (x, x2 + V relu(U x1 + u) + v) + b'. After a dense map, all of
    its maps but the ReLU are products: x' = W' W x + W'_2 V relu(U W_1 x + u'), the constants likewise.

    Args:
        block: with values in float64, so that the products lose nothing.
        after: a block that :func:`_pays` approves of, likewise.
        conditions: of a conditional block, the same for all images: (H * W, P), row by row.
        size: (H, W) of the maps, where there are conditions.
    """

    table: Tensor | None
    down: Tensor | None
    across: Tensor | None
    weight: Tensor
    bias: Tensor
    read: Tensor | None
    read_bias: Tensor | None
    write: Tensor | None

    def __init__(
        self, block: Block, after: Block | None, conditions: Tensor | None, size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.coupling, self.clamp, self.sum_dims = block.options.coupling, block.clamp, block.sum_dims
        self.kept = block.splits[0]
        self.first, self.last = (copy.deepcopy(layer) for layer in block.layers())
        for parameter in self.last.parameters():
            parameter.data.mul_(SUBNET_SCALE)
        table = down = across = None
        if block.conditional:
            if conditions is None or size is None:
                raise ValueError("a conditional block can be folded only under conditions that are known")
            at_x1, seen = block.seen(conditions.double())
            table = seen.t().reshape(1, -1, *size)
            # One half of the code tells the row, the other the column; files hold those parts instead of their sum.
            across = table[:, :, :1]
            down = table[:, :, :, :1] - table[:, :, :1, :1]
            if not torch.allclose(down + across, table):
                raise ValueError("the conditions must be a code of the row beside a code of the column")
            self.first = nn.Linear(self.kept, seen.shape[1], bias=False, dtype=torch.float64)
            self.first.weight.data.copy_(at_x1)
        weight, bias = block.after_coupling()
        read = read_bias = write = None
        if after is not None:
            inner, outer = after.layers()
            follow, offset = after.after_coupling()
            read = _matrix(inner) @ weight[: self.kept]
            read_bias = _matrix(inner) @ bias[: self.kept] + cast(Tensor, inner.bias)
            write = follow[:, self.kept :] @ (SUBNET_SCALE * _matrix(outer))
            bias = follow @ bias + follow[:, self.kept :] @ (SUBNET_SCALE * cast(Tensor, outer.bias)) + offset
            weight = follow @ weight
        self.register_buffer("table", None if table is None else table.detach().contiguous(), persistent=False)
        for name, value in (
            ("down", down),
            ("across", across),
            ("weight", weight),
            ("bias", bias),
            ("read", read),
            ("read_bias", read_bias),
            ("write", write),
        ):
            self.register_buffer(name, None if value is None else value.detach().contiguous())

    def forward(self, x: Tensor, rows: slice, *, owned: bool) -> tuple[Tensor, Tensor | None]:
        """x (N, C, h, W), the given ``rows`` of maps -> (y of the same shape, ln|det| (N, h, W) or None for zero).

        ``owned`` allows to write into x.
        """
        x1, x2 = x[:, : self.kept], x[:, self.kept :]
        hidden = self._layer(self.first, x1)
        if self.table is not None:
            hidden = hidden + self._seen(rows)
        a = self._layer(self.last, _relu(hidden))
        local = None
        if self.coupling == "additive" and owned and not _exporting():
            x2.add_(a)
        else:
            x2, local = self._couple(x2, a)
            x = torch.cat((x1, x2), dim=1)
        y = _mix(x, self.weight, self.bias)
        if self.read is not None and self.write is not None:
            y = _add_mixed(y, _relu(_mix(x, self.read, self.read_bias)), self.write)
        return y, local

    def _seen(self, rows: slice) -> Tensor:
        """What the first layer sees of the positions in some rows."""
        assert self.table is not None
        assert self.down is not None
        assert self.across is not None
        return self.down[:, :, rows] + self.across if _exporting() else self.table[:, :, rows]

    @staticmethod
    def _layer(layer: nn.Module, x: Tensor) -> Tensor:
        if _is_pointwise(layer):
            return _mix(x, _matrix(layer), cast("Tensor | None", layer.bias))
        out: Tensor = layer(x)
        return out

    def _couple(self, x2: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.coupling == "additive":
            return x2 + a, None
        log_scale, shift = a.split(x2.shape[1], dim=1)
        log_scale = self.clamp * torch.tanh(log_scale)
        if self.coupling == "gin":
            log_scale = log_scale - log_scale.mean(dim=self.sum_dims, keepdim=True)
        return x2 * torch.exp(log_scale) + shift, log_scale.sum(dim=1)


class Chain(nn.Module):
    """Consecutive blocks with everything multiplied out that does not depend on the input; for inference.

    Scale, offset, permutation, L and U of a block become one dense matrix, so that nothing is gathered; a 1x1 additive
    block shares the matrix of the block before it; a position code becomes a table, in a file the sum of two small
    ones. Products are taken in float64 and stored in the blocks' own type.

    Args:
        blocks: of one flow, in order.
        conditions: of conditional blocks: (H * W, P), row by row, the same for all images.
        size: (H, W) of the maps, where there are conditions.

    Raises:
        ValueError: a coupling network that is not two layers with a ReLU between, a conditional block without
            conditions, or conditions that are not such a code.
    """

    constant: Tensor

    def __init__(
        self, blocks: Sequence[Block], conditions: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        dtype = blocks[0].global_scale.dtype
        steps: list[nn.Module] = []
        constant = torch.zeros((), dtype=torch.float64, device=blocks[0].global_scale.device)
        index = 0
        with torch.no_grad():
            while index < len(blocks):
                shared = index + 1 < len(blocks) and _pays(blocks[index + 1])
                # Few at a time: a block of CFlow with a wide backbone is 200 MB.
                wide = [copy.deepcopy(block).double() for block in blocks[index : index + 1 + shared]]
                steps.append(_Step(wide[0], wide[1] if shared else None, conditions, size).to(dtype))
                constant += torch.stack([block.log_scale() for block in wide]).sum()
                index += len(wide)
        self.steps = nn.ModuleList(steps)
        self.conditional = conditions is not None
        self.register_buffer("constant", constant)
        self.to(dtype).requires_grad_(False)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C, H, W) -> (latents of the same shape, ln|det| by position (N, H, W), nats)."""
        if not self.conditional or _exporting():
            return self._run(x, slice(None), owned=False)
        step = max(1, VECTORS // (len(x) * x.shape[3]))
        parts = [
            self._run(x[:, :, start : start + step], slice(start, start + step), owned=False)
            for start in range(0, x.shape[2], step)
        ]
        return torch.cat([z for z, _ in parts], dim=2), torch.cat([log_det for _, log_det in parts], dim=1)

    def _run(self, x: Tensor, rows: slice, *, owned: bool) -> tuple[Tensor, Tensor]:
        total = self.constant.expand(x.shape[0], *x.shape[2:])
        for step in self.steps:
            x, local = step(x, rows, owned=owned)
            owned = True  # made by the step
            if local is not None:
                total = total + local
        return x, total


class _LayerNorm(nn.LayerNorm):
    """Layer normalisation of whole maps (C, H, W) with the channels last in memory."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(list(norm.normalized_shape), norm.eps)
        for name in ("weight", "bias"):
            value = getattr(norm, name).detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        if _exporting():
            return super().forward(input)
        shape = (*self.normalized_shape[1:], self.normalized_shape[0])
        weight, bias = self.weight.permute(1, 2, 0), self.bias.permute(1, 2, 0)
        return F.layer_norm(input.permute(0, 2, 3, 1), shape, weight, bias, self.eps).permute(0, 3, 1, 2)


def _fold_batch_norms(network: nn.Module) -> None:
    """Into the convolutions before them, by the names of timm's ResNets; batch norms elsewhere stay."""
    for parent in list(network.modules()):
        children = dict(parent.named_children())
        for before, name in itertools.pairwise(children):
            conv, norm = children[before], children[name]
            in_order = isinstance(parent, nn.Sequential) or before.replace("conv", "bn") == name
            if in_order and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fold_into(conv, norm))
                setattr(parent, name, nn.Identity())


def _fold_blocks(modules: Iterable[nn.Module]) -> nn.ModuleList:
    """Every run of blocks as one :class:`Chain`; other modules in their places."""
    folded: list[nn.Module] = []
    run: list[Block] = []
    for module in [*modules, None]:
        if isinstance(module, Block):
            run.append(module)
            continue
        if run:
            folded.append(Chain(run))
            run = []
        if module is not None:
            folded.append(module)
    return nn.ModuleList(folded)


def _fold_decoders(cflow: Any) -> None:
    """CFlow's flows, one per layer, whose blocks see the code of the position. In float32, as its densities are."""
    cflow.precision = "float32"
    with torch.no_grad():
        maps = cflow.features(torch.zeros(1, 3, *cflow.input_size, device=next(cflow.parameters()).device))
    for index, level in enumerate(maps):
        size = (level.shape[2], level.shape[3])
        cflow.decoders[index] = Chain(list(cflow.decoders[index].module_list), cflow.conditions(*size), size)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def fused(model: Model) -> Model:
    """An inference copy of a detector's torch model: the same maps, up to rounding, in less time.

    The flow's linear maps are multiplied out (see :class:`Chain`), the backbone's batch norms are folded into its
    convolutions, and maps are kept with the channels last in memory. The layer normalisations stay: they depend on the
    image. The copy is in evaluation mode, without gradients, and cannot be trained; the original is left as it is.

    Args:
        model: ``Fastflow(...).model`` and its like, on any device.

    Raises:
        TypeError: no detector of this package.
        ValueError: coupling networks other than anomalib's.
    """
    if not isinstance(model, DetectorModel):
        raise TypeError(f"{type(model).__name__} is not a detector of usf.detectors: only those can be fused")
    # The transformers of U-Flow, 1.6 GB without a batch norm, are shared.
    shared = {id(module): module for module in model.modules() if isinstance(module, MCait)}
    copied = copy.deepcopy(model, cast("dict[int, Any]", shared)).eval().requires_grad_(False)
    _fold_batch_norms(copied)
    if hasattr(copied, "decoders"):
        _fold_decoders(copied)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm and len(child.normalized_shape) == 3:
                parent._modules[name] = _LayerNorm(child)
            elif name == "module_list" and isinstance(child, nn.ModuleList):
                parent._modules[name] = _fold_blocks(child)
    copied._apply(_channels_last)
    return copied


class Resize(nn.Module):
    """Bilinear resizing with antialiasing, torchvision's ``Resize(size, antialias=True)``, in operations that every
    runtime knows: a product with one matrix for the rows and one for the columns.

    ONNX has an antialiased ``Resize``, but OpenVINO ignores that attribute without a word.

    Args:
        size: (height, width) to resize to, pixels.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = (int(size[0]), int(size[1]))

    @staticmethod
    def _weights(old: int, new: int, like: Tensor) -> Tensor:
        """(new, old), rows sum to one: triangles as wide as an output pixel, and at least as an input pixel."""
        centres = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
        scale = (centres[-1] + 0.5) / new
        wanted = (torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * scale
        weights = F.relu(1 - (centres - wanted[:, None]).abs() / scale.clamp(min=1))
        return weights / weights.sum(dim=1, keepdim=True)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, height, width)."""
        height, width = images.shape[2:]
        # Unknown sizes stay unknown in the graph; known ones that fit need nothing.
        if isinstance(height, int) and isinstance(width, int) and (height, width) == self.size:
            return images
        rows, columns = self._weights(height, self.size[0], images), self._weights(width, self.size[1], images)
        return rows @ images @ columns.t()


def _exact(transform: Any) -> nn.Module:
    """A pre-processor's transform with its antialiased resizing kept, exportable."""
    from torchvision.transforms import v2

    if isinstance(transform, v2.Compose):
        return v2.Compose([_exact(part) for part in transform.transforms])
    if (
        isinstance(transform, v2.Resize)
        and transform.antialias
        and transform.interpolation == v2.InterpolationMode.BILINEAR
        and len(transform.size) == 2
    ):
        return Resize(transform.size)
    from anomalib.pre_processing.utils.transform import get_exportable_transform

    return cast(nn.Module, get_exportable_transform(transform))


def exportable(detector: Lightning) -> Lightning:
    """A copy of a Lightning detector that anomalib's exporters can write: model :func:`fused`, resizing as in training.

    anomalib exports its pre-processor without antialiasing, with which it trained: its exported scores are those of the
    ``Engine`` only for images that have the model's size already. The copy shares everything else with the original.

    Raises:
        TypeError: no detector of this package.
    """
    copied = copy.copy(detector)
    copied._modules = dict(detector._modules)
    copied.model = fused(cast(DetectorModel, detector.model))
    pre_processor = getattr(detector, "pre_processor", None)
    if pre_processor is not None and getattr(pre_processor, "transform", None) is not None:
        pre_processor = copy.copy(pre_processor)
        pre_processor._modules = dict(pre_processor._modules)
        pre_processor.export_transform = _exact(pre_processor.transform)
        copied.pre_processor = pre_processor
    return copied
