"""Normalizing flows with and without a constant Jacobian determinant.

Bijections with value and log-determinant in one call, base distributions, and the paper's two architectures,
:class:`USFlow` and :class:`NonUSFlow`, which differ in the coupling alone.
"""

from usf.flows.bases import Base, BiLogNormal, GaussianBase
from usf.flows.bijections import (
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    Chain,
    DenseLinear,
    GinCoupling,
    LULinear,
    Sandwich,
    alternating_mask,
    channel_mask,
    checkerboard_mask,
)
from usf.flows.check import CheckReport, check
from usf.flows.conditioners import MLP, ConvConditioner
from usf.flows.export import to_onnx
from usf.flows.flow import Flow, NonUSFlow, USFlow
from usf.flows.radial import LaplaceBase, RadialBase

__all__ = [
    "MLP",
    "AdditiveCoupling",
    "AffineCoupling",
    "Base",
    "BiLogNormal",
    "Bijection",
    "Chain",
    "CheckReport",
    "ConvConditioner",
    "DenseLinear",
    "Flow",
    "GaussianBase",
    "GinCoupling",
    "LULinear",
    "LaplaceBase",
    "NonUSFlow",
    "RadialBase",
    "Sandwich",
    "USFlow",
    "alternating_mask",
    "channel_mask",
    "check",
    "checkerboard_mask",
    "to_onnx",
]
