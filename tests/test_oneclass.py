"""Deep SVDD, its collapse monitors, and the map of proposition 1."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from usf.alignment import spearman
from usf.oneclass import (
    DeepSVDD,
    collapse_report,
    decreasing_schedule,
    distinct,
    effective_rank,
    expected_inverse_square,
    fit_deep_svdd,
    homogeneous_limit,
    inversion_loss,
    inversion_map,
    monte_carlo_loss,
    one_class_loss,
    running_loss,
    standard_normal_log_prob,
    truncated_loss,
)
from usf.study.inversion import svdd_trajectory, usf_trajectory
from usf.study.moons import two_moons


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def trained(seed: int = 0, **options: object) -> DeepSVDD:
    torch.manual_seed(seed)
    model = DeepSVDD((3, 12, 3), weight_decay=1e-3)
    fit_deep_svdd(
        model,
        normal(256, 3, seed=1),
        **{
            "pretrain_epochs": 3,
            "epochs": 3,
            "batch_size": 64,
            "lr": 1e-3,
            "seed": seed,
            "progress": False,
            **options,
        },  # type: ignore[arg-type]
    )
    return model


# ---------------------------------------------------------------------------------------------------------- Deep SVDD


def test_schedule_is_the_papers() -> None:
    d = 8
    expected = [
        (d, d),
        (d, 2 * d, d),
        (d, 4 * d, 2 * d, d),
        (d, 8 * d, 4 * d, 2 * d, d),
        (d, 16 * d, 8 * d, 4 * d, 2 * d, d),
    ]
    assert [decreasing_schedule(d, depth) for depth in range(2, 7)] == expected


@pytest.mark.parametrize(("dim", "depth"), [(0, 3), (2, 1)])
def test_schedule_refuses(dim: int, depth: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        decreasing_schedule(dim, depth)


def test_loss_is_equation_2_by_hand() -> None:
    model = DeepSVDD((2, 2, 1), activation=nn.ReLU(), weight_decay=0.1).double()
    with torch.no_grad():
        model.weights()[0].copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
        model.weights()[1].copy_(torch.tensor([[3.0, -1.0]]))
    model.center.fill_(1.0)
    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    # Row 1: relu(3, 0) -> 9; row 2: relu(0, -3) -> 0. Distances 64 and 1.
    expected = (64 + 1) / 2 + 0.1 / 2 * ((1 + 4 + 1 + 1) + (9 + 1))
    assert model.loss(x).item() == pytest.approx(expected, abs=1e-12)
    assert model.score(x).tolist() == [64.0, 1.0]
    assert one_class_loss(model.latent(x), model.center).item() == pytest.approx(32.5)


def test_encoder_has_no_bias_and_is_zero_at_zero() -> None:
    model = DeepSVDD(decreasing_schedule(4, 6))
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, nn.Linear))
    assert len(model.weights()) == 5
    assert torch.equal(model.latent(torch.zeros(1, 4)), torch.zeros(1, 4))


@given(scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_relu_encoder_is_positively_homogeneous(scale: float) -> None:
    torch.manual_seed(0)
    model = DeepSVDD((3, 16, 3), activation=nn.ReLU()).double()
    x = normal(5, 3).double()
    torch.testing.assert_close(model.latent(scale * x), scale * model.latent(x))


class Symlog(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign() * x.abs().log1p()


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.ReLU6(), nn.Hardtanh(), nn.ELU()])
def test_bounded_activations_are_refused(activation: nn.Module) -> None:
    with pytest.raises(ValueError, match="levels off"):
        DeepSVDD((2, 4, 2), activation=activation)


class Bump(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.exp(-(x**2))


def test_vanishing_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="bounded on both sides"):
        DeepSVDD((2, 4, 2), activation=Bump())


def test_activation_that_is_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias in disguise"):
        DeepSVDD((2, 4, 2), activation=nn.Softplus())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.PReLU(), Symlog()])
def test_unbounded_activations_are_accepted(activation: nn.Module) -> None:
    assert DeepSVDD((2, 4, 4, 2), activation=activation).latent(normal(3, 2)).shape == (3, 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="widths"):
        DeepSVDD((3,))
    with pytest.raises(ValueError, match="lambda"):
        DeepSVDD((3, 3), weight_decay=-1.0)
    model = DeepSVDD((3, 3))
    with pytest.raises(RuntimeError, match="init_center"):
        model.score(normal(2, 3))
    with pytest.raises(RuntimeError, match="init_center"):
        model.loss(normal(2, 3))
    with pytest.raises(ValueError, match="length 3"):
        model.latent(normal(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        model.init_center(torch.full((2, 3), math.nan))


def test_center_guard() -> None:
    model = DeepSVDD((4, 4))
    with torch.no_grad():
        model.weights()[0].copy_(torch.eye(4))
    model.init_center(torch.tensor([[0.05, -0.05, 0.0, 3.0]]))
    torch.testing.assert_close(model.center, torch.tensor([0.1, -0.1, 0.1, 3.0]))


def test_center_is_the_pretrained_mean_and_stays() -> None:
    train = normal(256, 3, seed=1) + 2.0
    torch.manual_seed(0)
    model = DeepSVDD((3, 12, 3))
    seen: list[torch.Tensor] = []
    original = model.init_center

    def spy(x: torch.Tensor, guard: float) -> DeepSVDD:
        original(x, guard)
        seen.append(model.latent(train).mean(0).detach().clone())
        return model

    model.init_center = spy  # type: ignore[method-assign, assignment]
    history = fit_deep_svdd(model, train, pretrain_epochs=5, epochs=5, batch_size=64, lr=1e-3, seed=0, progress=False)
    assert history.pretrain is not None
    assert history.pretrain.train[-1] < history.pretrain.train[0]
    assert history.train.train[-1] < history.train.train[0]
    assert history.seconds >= history.train.seconds
    clear = seen[0].abs() >= 0.1
    assert clear.any()
    torch.testing.assert_close(model.center[clear], seen[0][clear])
    assert not model.center.requires_grad
    assert "center" not in dict(model.named_parameters())


def test_training_is_a_function_of_the_seed() -> None:
    first, second, other = trained(0), trained(0), trained(1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(first.weights()[0], other.weights()[0])


def test_training_leaves_the_global_generator_to_the_caller() -> None:
    torch.manual_seed(3)
    model = DeepSVDD((2, 2))
    state = torch.get_rng_state()
    fit_deep_svdd(model, normal(16, 2), pretrain_epochs=1, epochs=1, batch_size=8, lr=1e-3, seed=0, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_centre_at_zero_collapses_and_the_monitors_see_it() -> None:
    train = normal(512, 3, seed=1)
    options = {"pretrain_epochs": 3, "epochs": 60, "lr": 1e-2}
    healthy, collapsed = trained(**options), trained(center=torch.zeros(3), **options)
    with torch.no_grad():
        good, bad = (sum(collapse_report(m.latent(train), m.center).std) for m in (healthy, collapsed))
    assert torch.equal(collapsed.center, torch.zeros(3))
    assert bad < 0.25 * good


def test_monitor_sees_every_epoch_and_changes_nothing() -> None:
    seen: list[float] = []
    watched = trained(monitor=lambda model: seen.append(model.loss(normal(64, 3)).item()))
    assert len(seen) == 3
    assert seen[-1] < seen[0]
    assert torch.equal(watched.weights()[0], trained().weights()[0])


def test_score_does_not_depend_on_the_batch() -> None:
    model, x = trained(), normal(64, 3, seed=5)
    whole = model.score(x)
    torch.testing.assert_close(torch.stack([model.score(row) for row in x]), whole)
    assert model.score(x.reshape(8, 8, 3)).shape == (8, 8)


@pytest.mark.parametrize("activation", [None, nn.PReLU()])
def test_state_survives_safetensors(tmp_path: Path, activation: nn.Module | None) -> None:
    torch.manual_seed(0)
    model = DeepSVDD((3, 8, 8, 3), activation=activation)
    x = normal(10, 3)
    model.init_center(x)
    save_file(model.state_dict(), tmp_path / "svdd.safetensors")
    again = DeepSVDD((3, 8, 8, 3), activation=activation)
    again.load_state_dict(load_file(tmp_path / "svdd.safetensors"))
    assert torch.equal(again.score(x), model.score(x))


# ----------------------------------------------------------------------------------------------------------- monitors


def test_monitors_of_a_healthy_latent() -> None:
    report = collapse_report(normal(4000, 5), torch.ones(5))
    assert all(abs(s - 1) < 0.05 for s in report.std)
    assert report.effective_rank > 4.9
    assert report.spread == pytest.approx(1.0, abs=0.05)  # sqrt(5) around a centre of norm sqrt(5)
    assert report.distinct_fraction > 0.5
    assert collapse_report(normal(4000, 5), torch.ones(5), tolerance=1e-9).distinct_fraction > 0.99


def test_monitors_of_a_point() -> None:
    point = torch.tensor([0.3, -7.0, 11.0])
    # What float32 leaves of one point after different summation orders.
    wobble = point * (1 + 1e-7 * normal(500, 3).sign())
    for latent in (point.expand(500, 3), wobble):
        report = collapse_report(latent, point)
        assert report.effective_rank == 0.0
        assert report.distinct_scores == 1
        assert report.spread < 1e-6
        assert max(report.std) < 1e-5


def test_monitors_of_a_line_and_of_clusters() -> None:
    t = normal(1000, 1)
    assert effective_rank(t * torch.tensor([[1.0, 2.0, -1.0]]) + 5.0) == pytest.approx(1.0, abs=1e-3)
    clusters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0]]).repeat(100, 1)
    assert collapse_report(clusters, torch.zeros(2)).distinct_scores == 3


def test_effective_rank_is_the_entropy_of_singular_values() -> None:
    u, _ = torch.linalg.qr(normal(50, 2).double() - normal(50, 2).double().mean(0))
    latent = u @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(latent) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(1e-6, 0.5))
@settings(deadline=None)
def test_distinct_is_between_one_and_the_number_of_values(scores: list[float], tolerance: float) -> None:
    count = distinct(torch.tensor(scores, dtype=torch.float64), tolerance=tolerance, floor=1e-12)
    assert 1 <= count <= len(set(scores))


def test_monitors_refuse() -> None:
    with pytest.raises(ValueError, match="shape"):
        collapse_report(normal(1, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        collapse_report(normal(5, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        collapse_report(normal(5, 2), torch.full((2,), math.nan))


# ---------------------------------------------------------------------------------------------------------- inversion


def test_inversion_map_and_its_norm() -> None:
    x = normal(100, 5).double()
    y = inversion_map(x, alpha=3.0)
    torch.testing.assert_close(y.norm(dim=-1), 1 / (3.0 * x.norm(dim=-1)))
    torch.testing.assert_close(inversion_map(y, alpha=3.0), x)  # alpha cancels: it is an involution
    assert torch.equal(inversion_map(torch.zeros(2, 5), 3.0), torch.zeros(2, 5))
    assert torch.isfinite(inversion_map(torch.full((1, 3), 1e-30), 1.0)).all()  # the squared norm underflows


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    for call in (lambda: inversion_map(torch.ones(1, 3), alpha), lambda: inversion_loss(3, alpha)):
        with pytest.raises(ValueError, match="alpha must be positive"):
            call()


@pytest.mark.parametrize("dim", [1, 2])
def test_two_dimensions_are_the_boundary(dim: int) -> None:
    with pytest.raises(ValueError, match="infinite"):
        inversion_loss(dim, 1.0)
    with pytest.raises(ValueError, match="infinite"):
        expected_inverse_square(dim)


@pytest.mark.parametrize("dim", [5, 8, 32, 128])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])
def test_monte_carlo_agrees_with_the_exact_loss(dim: int, alpha: float) -> None:
    estimate = monte_carlo_loss(dim, alpha, samples=20_000, seed=0)
    assert estimate.finite_variance
    assert estimate.samples == 20_000
    assert abs(estimate.mean - inversion_loss(dim, alpha)) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.05 * inversion_loss(dim, alpha)


def test_monte_carlo_of_heavy_tails_is_close_and_flagged() -> None:
    for dim in (3, 4):
        estimate = monte_carlo_loss(dim, 2.0, samples=400_000, seed=0)
        assert not estimate.finite_variance
        assert estimate.mean == pytest.approx(inversion_loss(dim, 2.0), rel=0.05)


def test_two_dimensions_diverge_logarithmically() -> None:
    running = running_loss(2, 1.0, samples=200_000, seed=0)
    assert running.shape == (200_000,)
    assert running[-1] > 4  # ln(n)/2 = 6.1, with the wide spread of a law without mean
    for small, large in ((1e-8, 1e-4), (1e-6, 1e-2)):
        assert truncated_loss(1.0, small) - truncated_loss(1.0, large) == pytest.approx(math.log(1e4) / 2, rel=0.01)
    x = normal(200_000, 2).double()
    r2 = x.square().sum(-1)
    values = torch.where(r2 > 0.01, inversion_map(x, 2.0).square().sum(-1), 0.0)
    assert abs(values.mean().item() - truncated_loss(2.0, 0.01)) < 4 * values.std().item() / len(x) ** 0.5
    with pytest.raises(ValueError, match="epsilon"):
        truncated_loss(1.0, 0.0)


@pytest.mark.parametrize("dim", [1, 2, 3, 16])
def test_order_is_exactly_reversed(dim: int) -> None:
    x = normal(500, dim).double()
    density = standard_normal_log_prob(x)
    torch.testing.assert_close(density, torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1))
    score = inversion_map(x, 7.0).square().sum(-1)
    assert spearman(score, density) == pytest.approx(-1.0, abs=1e-12)
    assert spearman(x.square().sum(-1), density) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 8, 32])
def test_homogeneous_limit_against_samples(dim: int) -> None:
    limit = homogeneous_limit(dim)
    r = normal(50_000, dim).double().norm(dim=-1)
    score = limit.score(r.numpy())
    assert limit.loss == pytest.approx(score.mean(), rel=0.05)
    assert limit.spearman == pytest.approx(spearman(score, -r), abs=0.02)
    assert limit.inverted_mass == pytest.approx((r < limit.radius).double().mean().item(), abs=0.01)
    assert limit.below_mode == pytest.approx((score < 1.0).mean(), abs=0.01)
    assert limit.loss == pytest.approx(1 - r.mean().item() ** 2 / r.square().mean().item(), rel=0.05)
    with pytest.raises(ValueError, match="dim"):
        homogeneous_limit(0)


def test_training_approaches_the_homogeneous_limit() -> None:
    torch.manual_seed(0)
    model = DeepSVDD(decreasing_schedule(2, 5))
    x, test = normal(4096, 2, seed=1), normal(2000, 2, seed=2)
    fit_deep_svdd(model, x, pretrain_epochs=5, epochs=25, batch_size=256, lr=3e-3, seed=0, progress=False)
    limit = homogeneous_limit(2)
    scale = model.center.square().sum().item()
    assert model.loss(x).item() / scale == pytest.approx(limit.loss, rel=0.15)
    assert model.loss(x).item() / scale > 0.95 * limit.loss
    assert spearman(model.score(test).detach(), standard_normal_log_prob(test)) < -0.4
    assert model.score(torch.zeros(1, 2)).item() == pytest.approx(scale, rel=1e-6)


# -------------------------------------------------------------------------------------------------- the chapters' data


def test_moons_have_the_density_they_claim() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn comes with the book extra")
    moons = two_moons(2000, 500, seed=0)
    assert [len(x) for x in (moons.train, moons.val, moons.test, moons.outliers)] == [2000, 500, 2000, 500]
    axis = torch.linspace(-4, 4, 101, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = moons.log_prob(grid).exp()
    cell = float(axis[1] - axis[0]) ** 2
    assert density.sum().item() * cell == pytest.approx(1.0, abs=1e-3)
    # The mean log-density of samples is minus the entropy that the grid integrates.
    entropy = -(density * density.clamp_min(1e-300).log()).sum().item() * cell
    assert -moons.log_prob(moons.test).mean().item() == pytest.approx(entropy, abs=0.06)
    assert torch.equal(two_moons(2000, 500, seed=0).train, moons.train)
    assert not torch.equal(moons.train, moons.test)


def test_trajectories_tell_the_two_models_apart() -> None:
    svdd = svdd_trajectory(2, 0, samples=2048, pretrain_epochs=2, epochs=30)
    flow = usf_trajectory(2, 0, samples=2048, epochs=8)
    assert len(svdd.epochs) == len(svdd.spearman) == len(svdd.tail) == len(svdd.loss) == 31
    assert len(flow.epochs) == 9
    assert svdd.spearman[-1] < 0 < svdd.spearman[0]
    assert flow.spearman[-1] > 0.98
    assert flow.spearman[-1] > flow.spearman[0]
