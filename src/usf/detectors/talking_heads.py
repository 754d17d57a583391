"""CaiT's attention with its heads mixed in place, for the frozen transformers of U-Flow."""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

__all__ = ["TalkingHeads", "replace"]


class TalkingHeads(TalkingHeadAttn):
    """timm's ``TalkingHeadAttn`` in evaluation mode, in less than half its time.

    Before and after the softmax, each score becomes a combination of the same position's scores in all heads (Touvron
    et al., 2021). timm moves the heads to the last axis and back for either, four copies of the largest tensor; a
    batched product of the small matrix with the heads where they are needs none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, C) -> (N, T, C)."""
        images, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = self._mix((q * self.scale) @ k.transpose(-2, -1), self.proj_l)
        attention = self._mix(attention.softmax(dim=-1), self.proj_w)
        mixed: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(images, tokens, channels))
        return mixed

    @staticmethod
    def _mix(scores: Tensor, heads: nn.Linear) -> Tensor:
        """Scores (N, H, T, T) -> the same shape, combined over H."""
        weight = heads.weight.expand(len(scores), -1, -1)
        return torch.baddbmm(heads.bias[:, None], weight, scores.flatten(2)).view_as(scores)


def replace(network: nn.Module) -> None:
    """Give every block of a frozen CaiT this attention; parameters and their names stay."""
    for module in network.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = TalkingHeads
