r"""The path from maximum likelihood to collapse: Deep SVDD's loss with a weighted log-determinant.

.. math:: L_\lambda(\phi) = E\|\phi(x) - c\|^2 - \lambda \ln|\det J_\phi|

At :math:`\lambda = 1` this is the likelihood of equation 5, at 0 the Deep SVDD loss without a regulariser.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from usf.flows import Chain, Flow, GaussianBase, LULinear, USFlow

__all__ = ["Trace", "rescaled", "scale_free_objective", "squared_distance", "weighted_loss"]


@dataclasses.dataclass
class Trace:
    """What a loss saw at each training step.

    Attributes:
        squared: E||phi(x) - c||^2 of each batch.
        log_det: ln|det J| at each step, nats.
    """

    squared: list[float] = dataclasses.field(default_factory=list)
    log_det: list[float] = dataclasses.field(default_factory=list)


def _center(flow: Flow) -> Tensor:
    if not isinstance(flow.base, GaussianBase):
        raise TypeError(f"the loss needs a centre, which {type(flow.base).__name__} does not have; use GaussianBase")
    if not flow.is_uniformly_scaling:
        raise TypeError("the loss weighs one log-determinant, but this flow has one for every input; use a USFlow")
    return flow.base.center


def squared_distance(flow: Flow, x: Tensor) -> Tensor:
    """E||phi(x) - c||^2 over a batch (n, *shape), 0-dim: Deep SVDD's loss without its regulariser."""
    return (flow.latent(x) - _center(flow)).square().reshape(len(x), -1).sum(-1).mean()


def weighted_loss(weight: float, trace: Trace | None = None) -> Callable[[nn.Module, Tensor], Tensor]:
    """L_weight as a loss for :func:`usf.training.fit`; with a ``trace``, every call leaves its two terms there.

    Raises:
        ValueError: for a negative weight.
    """
    if not weight >= 0:
        raise ValueError(f"the weight of the log-determinant cannot be negative, got {weight}")

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(module, Flow)
        center = _center(module)
        z, log_det = module.bijection(batch)
        squared = (z - center).square().reshape(len(batch), -1).sum(-1).mean()
        if trace is not None:
            trace.squared.append(float(squared.detach()))
            trace.log_det.append(float(log_det.detach()))
        return squared - weight * log_det if weight else squared

    return loss


@torch.no_grad()
def scale_free_objective(flow: Flow, x: Tensor) -> float:
    r""":math:`\frac d2 \ln E\|\phi(x)-c\|^2 - \ln|\det J_\phi|` in nats: the same for phi and any rescaling of it.

    The likelihood is this, once the scale is at its best, up to a constant; so is L_weight for every positive weight.
    """
    return 0.5 * math.prod(flow.shape) * float(squared_distance(flow, x).log()) - float(flow.log_abs_det)


@torch.no_grad()
def rescaled(flow: USFlow, factor: float) -> USFlow:
    """A copy of the flow with phi replaced by c + factor (phi - c): still a USFlow, its last map rescaled.

    Raises:
        ValueError: when the factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"a rescaled flow stays invertible for positive factors only, got {factor}")
    flow = copy.deepcopy(flow)
    center = _center(flow)
    assert isinstance(flow.bijection, Chain)
    last = flow.bijection.parts[-1]
    assert isinstance(last, LULinear)
    if len(flow.shape) > 1 and bool((center != center.flatten()[0]).any()):
        raise ValueError("on a grid the last map has one bias a channel, so the centre must be one number")
    target = center if center.dim() == 1 else center.flatten()[0]
    weight = last.weight
    diagonal = weight.diagonal() + math.log(factor)
    weight.copy_(weight.tril(-1) + factor * weight.triu(1) + torch.diag(diagonal))
    last.bias.copy_(target + factor * (last.bias - target))
    return flow
