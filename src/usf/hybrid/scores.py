"""What a flow-prior VAE says about an image: its terms apart, and two ways to put them together.

The sum of the terms is the paper's score. The reconstruction has hundreds of times as many dimensions as the latent, so
that it decides the sum; :func:`calibrated` compares each term with its own values on held-out normal images first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from usf.calibration import conformal_p

__all__ = ["SCORES", "Score", "Scores", "calibrated"]

Array = NDArray[np.float64]
Score = Literal["reconstruction", "norm", "log_prob", "sum"]
SCORES: tuple[Score, ...] = ("reconstruction", "norm", "log_prob", "sum")
"""Names of the scores that an image has by itself."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Anomaly scores of N images, higher is more anomalous, each a function of its image alone (z is the mean of q).

    Attributes:
        reconstruction: -ln p(x | z), nats, (N,): the squared error up to scale and offset.
        norm: ||phi(z)||, the distance of the flow's latent to the centre of its base, (N,).
        log_prob: -ln p_Z(z), nats, (N,). Orders images as ``norm`` does where the prior is uniformly scaling.
    """

    reconstruction: Array
    norm: Array
    log_prob: Array

    @property
    def sum(self) -> Array:
        """-ln p(x | z) - ln p_Z(z), nats, (N,): the paper's combination."""
        return self.reconstruction + self.log_prob

    def __getitem__(self, name: Score) -> Array:
        """A score by its name in :data:`SCORES`.

        Raises:
            KeyError: another name.
        """
        if name not in SCORES:
            raise KeyError(f"no score {name!r}: choose one of {', '.join(SCORES)}")
        values: Array = getattr(self, name)
        return values

    def __len__(self) -> int:
        return len(self.reconstruction)


def calibrated(tested: Mapping[str, Array] | Scores, normals: Mapping[str, Array] | Scores) -> Array:
    r"""Sum of the terms after each became a p-value among held-out normal images: :math:`-\sum_k \ln p_k`, (N,).

    With :class:`Scores` the terms are the reconstruction and the latent log-density. Fisher's statistic up to a factor
    of two; the terms are dependent, so that it is a score and no p-value itself. With n normal images no term exceeds
    ln(n + 1), and images beyond all of them in every term tie.

    Args:
        tested: term -> scores of the images in question, (N,).
        normals: term -> scores of normal images that were not trained on, (n,).

    Raises:
        ValueError: different terms in the two, or none; a score that is not finite.

    >>> calibrated({"a": np.array([0.5, 9.0])}, {"a": np.array([1.0, 2.0, 3.0])}).round(3).tolist()
    [-0.0, 1.386]
    """
    if isinstance(tested, Scores):
        tested = {"reconstruction": tested.reconstruction, "log_prob": tested.log_prob}
    if isinstance(normals, Scores):
        normals = {"reconstruction": normals.reconstruction, "log_prob": normals.log_prob}
    if not tested or set(tested) != set(normals):
        raise ValueError(
            f"the terms of the tested images are {sorted(tested)}, of the normal ones {sorted(normals)}: the same, "
            "and at least one, are needed"
        )
    return np.asarray(-np.sum([np.log(conformal_p(normals[name], tested[name])) for name in tested], axis=0))
