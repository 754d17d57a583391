"""Check one's own layer: is it a bijection, and is its log-determinant the true one?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usf.flows.bijections import Bijection, as_shape


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` measured, all maxima over the samples.

    Attributes:
        round_trip: absolute error of x -> y -> x and of y -> x -> y.
        log_abs_det: absolute difference of the claimed log-determinant to autograd's, in nats, both directions.
        spread: largest minus smallest log-determinant over the samples, in nats; 0 for a uniformly scaling map.
        dead: names of trainable parameters with entries but without any gradient.
    """

    round_trip: float
    log_abs_det: float
    spread: float
    dead: tuple[str, ...]


def jacobian_log_abs_det(function: torch.nn.Module | Bijection, x: Tensor, dims: int) -> Tensor:
    """ln|det| of the Jacobian of ``function(x)[0]`` at each of n events (n, *shape), by autograd; shape (n,)."""
    results = []
    for event in x:
        jacobian = torch.autograd.functional.jacobian(lambda e: function(e.unsqueeze(0))[0].squeeze(0), event)
        size = event.numel()
        results.append(torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet)
    return torch.stack(results)


def check(
    bijection: Bijection,
    shape: int | Sequence[int] | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    perturb: float = 0.3,
    round_trip: float = 1e-9,
    log_abs_det: float = 1e-8,
) -> CheckReport:
    """Verify a bijection in double precision: round trip, log-determinant against autograd, constancy, gradients.

    Works on a copy, so the layer is left alone. Its parameters are perturbed, because layers usually start as the
    identity, where almost anything holds.

    Args:
        bijection: anything with ``forward(x) -> (y, ladj)`` and ``inverse(y) -> (x, ladj)``.
        shape: event shape; the bijection's own by default.
        samples: number of standard normal inputs.
        perturb: standard deviation of the noise added to every vector of parameters, divided by the square root of the
            width for matrices and kernels; 0 to check the layer as it is.
        round_trip: largest error allowed.
        log_abs_det: largest error allowed, in nats.

    Raises:
        AssertionError: naming the property that fails and by how much. A map that claims to be uniformly scaling and
            is not fails too.

    >>> from usf.flows import LULinear
    >>> check(LULinear((3,))).spread
    0.0
    """
    event = as_shape(bijection.shape if shape is None else shape)
    layer = copy.deepcopy(bijection).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Scaled by the width, so that large random matrices stay as well conditioned as trained ones.
            scale = perturb / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 and parameter.numel() else perturb
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(samples, *event, generator=generator, dtype=torch.float64)

    y, forward_ladj = layer(x)
    back, inverse_ladj = layer.inverse(y)
    again, _ = layer(layer.inverse(x)[0])
    assert y.shape == x.shape, f"forward maps shape {tuple(x.shape)} to {tuple(y.shape)}; a bijection keeps the shape"
    for name, ladj in (("forward", forward_ladj), ("inverse", inverse_ladj)):
        assert ladj.shape in ((), (samples,)), (
            f"{name} returns a log-determinant of shape {tuple(ladj.shape)}, not () or batch"
        )
    error = max((back - x).abs().max().item(), (again - x).abs().max().item())
    assert error <= round_trip, f"round trip is off by {error:.2e} (allowed {round_trip:.0e})"

    true = jacobian_log_abs_det(layer, x, len(event))
    difference = (forward_ladj - true).abs().max().item()
    difference = max(difference, (inverse_ladj + true).abs().max().item())
    assert difference <= log_abs_det, (
        f"log-determinant is off autograd's by {difference:.2e} nats (allowed {log_abs_det:.0e})"
    )

    claimed = bool(getattr(layer, "is_uniformly_scaling", False))
    spread = (true.max() - true.min()).item()
    assert not claimed or spread <= log_abs_det, (
        f"claims to be uniformly scaling, but ln|det| varies by {spread:.2e} nats"
    )

    reported = (forward_ladj.max() - forward_ladj.min()).item()
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return CheckReport(error, difference, reported, ())
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    ((y * weights).sum() + forward_ladj.sum()).backward()
    dead = []
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        gradient = parameter.grad
        assert gradient is None or bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite"
        if gradient is None or not bool((gradient != 0).any()):
            dead.append(name)
    assert not dead, f"no gradient reaches {', '.join(dead)}"
    return CheckReport(error, difference, reported, tuple(dead))
