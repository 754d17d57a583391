"""Figures of the notebooks that run something: how the trainings of one cell of the benchmark went."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from usf.plots.theme import COLORS
from usf.study.detection import FitHistory
from usf.study.grid import Variant

__all__ = ["loss_curves"]


def loss_curves(histories: Mapping[tuple[Variant, int], FitHistory]) -> Figure:
    """Training loss over epochs, one line for each training: the colour is the coupling's, LU is dashed.

    A second panel shows the held-out normal images where there were any. The losses are the detector's own, so that
    couplings may be compared and detectors may not.

    Args:
        histories: (variant, seed) -> what its training did.

    Raises:
        ValueError: no training to draw.
    """
    if not histories:
        raise ValueError("no trainings to draw: all of them were on record already, or failed")
    held_out = any(history.val for history in histories.values())
    figure, axes = plt.subplots(1, 1 + held_out, figsize=(4.6 * (1 + held_out), 3.0), squeeze=False)
    families = {"affine": "non-usf", "additive": "usf", "gin": "gin"}
    named: set[str] = set()
    for (variant, _), history in histories.items():
        name = variant.coupling + (" + LU" if variant.mixing == "lu" else "")
        for axis, values in zip(axes[0], (history.losses, history.val), strict=False):
            axis.plot(
                np.arange(1, len(values) + 1),
                values,
                color=COLORS[families[variant.coupling]],
                linestyle="--" if variant.mixing == "lu" else "-",
                # Two or three epochs would be a line between two corners.
                marker="o" if len(values) < 10 else None,
                markersize=3,
                linewidth=1.2,
                alpha=0.8,
                label=None if name in named or axis is not axes[0, 0] else name,
            )
        named.add(name)
    for axis, label in zip(
        axes[0], ("training loss, detector's own units", "held-out normal images, nats per dimension"), strict=False
    ):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=len(named))
    return figure
