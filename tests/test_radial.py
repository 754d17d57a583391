"""Laplace and radial bases: normalised, sampled from their own density, finite at the centre, usable in a flow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from usf.flows import Flow, GaussianBase, USFlow
from usf.flows.radial import GammaMixture, LaplaceBase, RadialBase, SplineLaw

ORDERS = (1.0, 2.0, math.inf)
LAWS = ("chi", "gamma-mixture", "spline")


def scrambled(shape: tuple[int, ...], order: float, law: str, seed: int = 0) -> RadialBase:
    """A base with parameters away from where they start, in double precision."""
    torch.manual_seed(seed)
    base = RadialBase(shape, order, law).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return base


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dim", [1, 2, 3, 16])
def test_law_of_the_norm_integrates_to_one_and_samples_follow_it(dim: int, law: str, order: float) -> None:
    base = scrambled((dim,), order, law)
    log_r = torch.linspace(-25, 8, 10_001, dtype=torch.float64)
    with torch.no_grad():
        density = (base.law.log_prob(log_r.exp()) + log_r).exp().numpy()
        z = base.sample((8_000,))
    cumulative = integrate.cumulative_trapezoid(density, log_r.numpy(), initial=0.0)
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-5)
    radii = base.distance(z).log().numpy()
    assert stats.kstest(radii, lambda u: np.interp(u, log_r.numpy(), cumulative)).pvalue > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("law", LAWS)
def test_density_integrates_to_one_over_the_plane(law: str, order: float) -> None:
    base = scrambled((2,), order, law, seed=1)
    axis = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    with torch.no_grad():
        mass = base.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("order", ORDERS)
def test_directions_are_those_of_the_density(order: float) -> None:
    """In the plane, the share of samples in a cone equals the area of the unit ball in it."""
    base = scrambled((2,), order, "gamma-mixture", seed=2)
    z = base.sample((40_000,)).abs()
    angle = torch.atan2(z[:, 1], z[:, 0]).numpy()  # first quadrant by symmetry
    grid = np.linspace(0, math.pi / 2, 2001)
    point = torch.from_numpy(np.stack([np.cos(grid), np.sin(grid)], -1))
    squared = torch.linalg.vector_norm(point, order, dim=-1).numpy() ** -2.0
    area = integrate.cumulative_trapezoid(squared, grid, initial=0.0)
    assert stats.kstest(angle, lambda a: np.interp(a, grid, area / area[-1])).pvalue > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_value_and_gradients_at_the_centre(law: str, order: float, dtype: torch.dtype) -> None:
    base = scrambled((4,), order, law).to(dtype)
    z = torch.zeros(3, 4, dtype=dtype)
    z[1, 0] = 1e-12
    z[2] = 1e-30
    z.requires_grad_()
    value = base.log_prob(z)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.allclose(value[0], value[1], atol=1e-4)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    for name, parameter in base.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_known_members() -> None:
    z = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = GaussianBase((5,)).double()
    assert torch.allclose(RadialBase((5,), 2, "chi").double().log_prob(z), normal.log_prob(z))
    assert torch.allclose(RadialBase((5,), 1, "chi").double().log_prob(z), LaplaceBase((5,)).double().log_prob(z))
    assert torch.allclose(RadialBase((5,), 2, "spline").double().log_prob(z), normal.log_prob(z), atol=1e-5)
    single = RadialBase((5,), 2, "gamma-mixture", components=1).double()
    assert torch.allclose(single.log_prob(z), normal.log_prob(z))
    laplace = LaplaceBase((5,), scale=0.7).double()
    expected = torch.distributions.Laplace(0.0, 0.7).log_prob(z).sum(-1)
    assert torch.allclose(laplace.log_prob(z), expected, atol=1e-6)


def test_laplace_samples_follow_its_density() -> None:
    torch.manual_seed(0)
    samples = LaplaceBase((2,), center=1.0, scale=2.0).sample((20_000,)).numpy()
    assert stats.kstest(samples[:, 0], stats.laplace(1.0, 2.0).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.03


def test_spline_and_its_inverse() -> None:
    torch.manual_seed(3)
    law = SplineLaw(3, 2.0, bins=7).double()
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.add_(torch.randn_like(parameter))
    u = torch.linspace(-20, 20, 2001, dtype=torch.float64, requires_grad=True)
    v, log_slope = law.spline(u)
    assert torch.allclose(law.inverse_spline(v), u, atol=1e-9)
    (slope,) = torch.autograd.grad(v.sum(), u)
    assert torch.allclose(slope.log(), log_slope, atol=1e-9)


def test_score_is_the_distance_only_where_the_density_falls_with_it() -> None:
    falling = scrambled((2,), 2, "chi")
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(falling.score(z), falling.distance(z))
    mixture = RadialBase((2,), 2, "gamma-mixture", decreasing=True).double()
    assert isinstance(mixture.law, GammaMixture)
    with torch.no_grad():
        mixture.law.log_scales.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
    assert torch.equal(mixture.score(z), mixture.distance(z))
    order = mixture.distance(z).argsort()
    assert (mixture.log_prob(z)[order].diff() <= 0).all()

    shell = RadialBase((2,), 2, "gamma-mixture", components=2).double()
    assert isinstance(shell.law, GammaMixture)
    assert shell.law.log_excess is not None
    with torch.no_grad():
        shell.law.log_excess.fill_(math.log(200.0))
        shell.law.logits.copy_(torch.tensor([-8.0, 8.0]))
    peak = math.sqrt(200.0) * math.exp(0.5)
    centre, ring, outside = torch.tensor([[0.0, 0.0], [peak, 0.0], [2.5 * peak, 0.0]]).double()
    assert shell.score(ring) < shell.score(centre)
    assert shell.score(ring) < shell.score(outside)
    assert shell.distance(centre) < shell.distance(ring)


@pytest.mark.parametrize("base", [LaplaceBase((2, 3)), RadialBase((2, 3), math.inf), RadialBase((2, 3), 1, "spline")])
def test_in_a_flow(base: LaplaceBase | RadialBase, tmp_path: Path) -> None:
    flow = USFlow((2, 3), blocks=2, base=base)
    x = torch.randn(4, 5, 2, 3)
    assert flow.log_prob(x).shape == flow.score(x).shape == (4, 5)
    assert flow.sample((7,)).shape == (7, 2, 3)
    drawn, log_prob = flow.rsample_and_log_prob((6,))
    assert torch.allclose(flow.log_prob(drawn), log_prob, atol=1e-4)
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.base.parameters())
    flow.save(tmp_path / "flow.safetensors")
    assert torch.equal(Flow.load(tmp_path / "flow.safetensors").score(x), flow.score(x))


def test_bad_settings_are_named() -> None:
    for arguments, match in (
        ({"order": 3.0}, "order"),
        ({"law": "cauchy"}, "law is"),
        ({"components": 0}, "component"),
        ({"law": "spline", "bins": 0}, "bin"),
        ({"center": torch.zeros(3)}, "center of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            RadialBase((2,), **arguments)
    with pytest.raises(ValueError, match="scale"):
        LaplaceBase((2,), scale=-1.0)
