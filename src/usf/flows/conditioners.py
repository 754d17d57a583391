"""Conditioners: the networks inside coupling layers, free of any constraint.

Each ends in a zero-initialised layer, so that a coupling starts as the identity and a fresh flow is well conditioned.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _zero_(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class MLP(nn.Sequential):
    """Fully connected network with ReLU between its layers and a zero-initialised last layer.

    Maps (..., ``in_features``) to (..., ``out_features``). ``in_features`` may be 0: the output is then a learned
    constant, which is what a coupling of a single component needs.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        hidden: widths of the hidden layers; empty for one linear layer.

    Raises:
        ValueError: when a width is not positive.

    >>> import torch
    >>> MLP(3, 2, hidden=(16,))(torch.ones(5, 3)).abs().max().item()
    0.0
    """

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int] = (64, 64)) -> None:
        if in_features < 0 or out_features < 1 or any(width < 1 for width in hidden):
            raise ValueError(f"MLP widths must be positive, got {in_features} -> {tuple(hidden)} -> {out_features}")
        layers: list[nn.Module] = []
        width = in_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            for next_width in hidden:
                layers += [nn.Linear(width, next_width), nn.ReLU()]
                width = next_width
            layers.append(nn.Linear(width, out_features))
        _zero_(layers[-1])
        super().__init__(*layers)


class _ChannelNorm(nn.Module):
    """Layer normalisation over the channel axis at each position, for inputs (n, c, *spatial)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvConditioner(nn.Module):
    """The paper's conditioner: adaptive convolutions with layer normalisation and gating (section 2).

    A stack of size-preserving convolutions; between two of them the features are normalised over channels and passed
    through a gate, a * sigmoid(b). Any spatial size is accepted, so a flow trained at one resolution runs at another.

    Maps (..., ``in_channels``, *spatial) to (..., ``out_channels``, *spatial) with ``rank`` spatial axes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        rank: number of spatial axes, 1 to 3.
        hidden: channels after each hidden convolution.
        kernel_size: odd size of every kernel, the same along each spatial axis.

    Raises:
        ValueError: for a rank outside 1..3, an even kernel, or no hidden layer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rank: int, hidden: Sequence[int] = (64, 64), kernel_size: int = 3
    ) -> None:
        super().__init__()
        if rank not in _CONV:
            raise ValueError(f"ConvConditioner handles 1 to 3 spatial axes, got {rank}; use MLP for vectors")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to preserve the spatial size, got {kernel_size}")
        if not hidden or min(in_channels, out_channels, *hidden) < 1:
            raise ValueError(f"channels must be positive, got {in_channels} -> {tuple(hidden)} -> {out_channels}")
        conv, padding = _CONV[rank], kernel_size // 2
        self.rank = rank
        layers: list[nn.Module] = []
        width = in_channels
        for next_width in hidden:
            layers += [
                conv(width, 2 * next_width, kernel_size, padding=padding),
                nn.GLU(dim=1),
                _ChannelNorm(next_width),
            ]
            width = next_width
        layers.append(conv(width, out_channels, kernel_size, padding=padding))
        _zero_(layers[-1])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Condition on ``x`` of shape (..., in_channels, *spatial)."""
        batch = x.shape[: -self.rank - 1]
        out = self.layers(x.reshape(-1, *x.shape[-self.rank - 1 :]))
        return out.reshape(*batch, *out.shape[1:])


def default_conditioner(
    in_channels: int, out_channels: int, rank: int, hidden: Sequence[int], kernel_size: int = 3
) -> nn.Module:
    """:class:`MLP` for vectors (``rank`` 0), :class:`ConvConditioner` for anything with spatial axes."""
    if rank == 0:
        return MLP(in_channels, out_channels, hidden)
    return ConvConditioner(in_channels, out_channels, rank, hidden, kernel_size)
