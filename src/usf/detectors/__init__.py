"""anomalib's flow detectors with a chosen coupling, as Lightning models.

anomalib is imported when a detector is first asked for, not with this package: it takes up to half a minute.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from usf.detectors.backbones import Weights, resolve

if TYPE_CHECKING:
    from usf.detectors.cflow import Cflow, CflowModel
    from usf.detectors.coupling import Block, FlowOptions
    from usf.detectors.fastflow import Fastflow, FastflowModel
    from usf.detectors.uflow import Uflow, UflowModel

__all__ = [
    "Block",
    "Cflow",
    "CflowModel",
    "Fastflow",
    "FastflowModel",
    "FlowOptions",
    "Uflow",
    "UflowModel",
    "Weights",
    "resolve",
]

_LAZY = {
    "Block": "usf.detectors.coupling",
    "FlowOptions": "usf.detectors.coupling",
    "Cflow": "usf.detectors.cflow",
    "CflowModel": "usf.detectors.cflow",
    "Fastflow": "usf.detectors.fastflow",
    "FastflowModel": "usf.detectors.fastflow",
    "Uflow": "usf.detectors.uflow",
    "UflowModel": "usf.detectors.uflow",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # anomalib's own imports warn of what anomalib itself deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
