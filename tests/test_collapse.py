"""The weighted loss, and the two identities of chapter 3 that hang on it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usf.flows import GaussianBase, NonUSFlow, USFlow
from usf.study.collapse import Trace, rescaled, scale_free_objective, squared_distance, weighted_loss
from usf.training import fit


def make(shape: tuple[int, ...] = (3,), center: float | torch.Tensor = 0.7, seed: int = 0) -> USFlow:
    torch.manual_seed(seed)
    flow = USFlow(shape, 2, hidden=(8,), base=GaussianBase(shape, center, 0.5)).double()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p) / math.sqrt(p[0].numel() if p.dim() > 1 else 1)
    return flow


@given(st.integers(0, 1000), st.lists(st.floats(-50, 50), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_weight_one_is_the_likelihood(seed: int, center: list[float]) -> None:
    """Equation 5, for any flow and any centre."""
    flow = make(center=torch.tensor(center, dtype=torch.float64), seed=seed)
    x = torch.randn(16, 3, dtype=torch.float64)
    expected = -flow.log_prob(x).mean()
    value = weighted_loss(1.0)(flow, x) + 1.5 * math.log(math.pi)
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-13)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)], ids=str)
@given(st.floats(1e-4, 4.0))
@settings(max_examples=20, deadline=None)
def test_a_weight_is_a_unit_of_length(shape: tuple[int, ...], weight: float) -> None:
    """L_w(c + sqrt(w)(phi - c)) = w L_1(phi) - w d/2 ln w, for every flow."""
    flow, x = make(shape), torch.randn(20, *shape, dtype=torch.float64)
    d = math.prod(shape)
    scaled = rescaled(flow, math.sqrt(weight))
    expected = weight * weighted_loss(1.0)(flow, x) - weight * d / 2 * math.log(weight)
    torch.testing.assert_close(weighted_loss(weight)(scaled, x), expected, atol=1e-10, rtol=1e-11)
    center = flow.base.center
    torch.testing.assert_close(scaled.latent(x) - center, math.sqrt(weight) * (flow.latent(x) - center))
    assert scale_free_objective(scaled, x) == pytest.approx(scale_free_objective(flow, x), abs=1e-9)
    torch.testing.assert_close(flow.inverse(flow.latent(x)), x)


def test_stationary_distance_and_collapse() -> None:
    """E||phi - c||^2 settles at weight * d/2, and at weight 0 it keeps falling while ln|det| does."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    results = {}
    for weight in (1.0, 0.25, 0.0):
        torch.manual_seed(0)
        flow, trace = USFlow((2,), 1, hidden=(4,), base=GaussianBase((2,), 1.0, 0.5)), Trace()
        fit(flow, weighted_loss(weight, trace), x, epochs=60, batch_size=128, lr=2e-2, seed=0, progress=False)
        results[weight] = float(squared_distance(flow, x).detach())
        assert len(trace.squared) == len(trace.log_det) == 240
    assert results[1.0] == pytest.approx(1.0, rel=0.1)
    assert results[0.25] == pytest.approx(0.25, rel=0.1)
    assert results[0.0] < 0.1
    assert trace.log_det[-1] < trace.log_det[120] < trace.log_det[0]


def test_what_has_no_single_determinant_is_refused() -> None:
    with pytest.raises(TypeError, match="one for every input"):
        weighted_loss(1.0)(NonUSFlow((2,), 1), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="cannot be negative"):
        weighted_loss(-0.1)
    with pytest.raises(ValueError, match="positive factors"):
        rescaled(make(), 0.0)
    centre = torch.arange(18.0).reshape(2, 3, 3)
    with pytest.raises(ValueError, match="one number"):
        rescaled(make((2, 3, 3), centre), 0.5)
