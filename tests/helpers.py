"""What the tests of several detectors need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # anomalib, which is behind it, is an extra
    from usf.detectors import FlowOptions


def name(options: FlowOptions) -> str:
    """Of a parametrised case."""
    parts = [options.coupling, options.mixing, options.diagonal, "scale" if options.global_scale else "noscale"]
    return "-".join([*parts, "matched"] if options.match_parameters else parts)


def disturb(module: nn.Module, scale: float = 0.05) -> None:
    """Away from the initial values, where many maps are trivial."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
