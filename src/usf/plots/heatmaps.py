"""Anomaly maps over their images, as pictures of their own."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from usf.plots.theme import OUTLINE, OVERLAY_CMAP, PAPER

__all__ = ["overlay", "side_by_side", "to_image"]


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture."""
    values = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values)


def overlay(picture: Tensor, values: NDArray[np.float32], threshold: float) -> Image.Image:
    """An image with its anomaly map over it; the outline holds what is above the threshold.

    Colour and opacity go by the logarithm of the map over the threshold: invisible at half of it and below, full at
    twice and above, the same for every image of a detector.

    Args:
        picture: (3, H, W) in [0, 1].
        values: (H, W), positive.
        threshold: of the detector.
    """
    base = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    level = np.clip(0.5 + 0.5 * np.log2(np.maximum(values, 1e-12) / max(threshold, 1e-12)), 0.0, 1.0)
    colors = np.asarray(mpl.colormaps[OVERLAY_CMAP](0.25 + 0.75 * level))[..., :3]
    grey = base.mean(axis=2, keepdims=True) * 0.8
    alpha = 0.85 * level[..., None]
    mixed = (1 - alpha) * grey + alpha * colors
    above = values > threshold
    edge = ndimage.binary_dilation(above) & ~above
    out = (255 * mixed).round().astype(np.uint8)
    out[edge] = OUTLINE
    return Image.fromarray(out)


def side_by_side(picture: Tensor, heatmap: Image.Image) -> Image.Image:
    """An image and its heatmap in one picture."""
    left = to_image(picture)
    both = Image.new("RGB", (left.width + heatmap.width + 2, left.height), PAPER)
    both.paste(left, (0, 0))
    both.paste(heatmap, (left.width + 2, 0))
    return both
