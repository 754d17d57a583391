"""A variational autoencoder whose prior is a flow (paper, section 4.4).

======================  ================================================================================================
`usf.hybrid.vae`        `Settings`, `FlowVAE` (encoder, decoder, prior), `Terms` of the ELBO
`usf.hybrid.scores`     `Scores` of images, apart and combined; `calibrated` sums them as p-values
`usf.hybrid.lightning`  `HybridDetector`, the same as an anomalib model; imported when first asked for (slow)
======================  ================================================================================================
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from usf.hybrid.scores import Scores, calibrated
from usf.hybrid.vae import PRIORS, FlowVAE, Settings, Terms, decoder_depth

if TYPE_CHECKING:
    from usf.hybrid.lightning import HybridDetector

__all__ = ["PRIORS", "FlowVAE", "HybridDetector", "Scores", "Settings", "Terms", "calibrated", "decoder_depth"]


def __getattr__(name: str) -> Any:
    if name != "HybridDetector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # anomalib's own imports warn of what anomalib itself deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("usf.hybrid.lightning").HybridDetector


def __dir__() -> list[str]:
    return sorted(__all__)
