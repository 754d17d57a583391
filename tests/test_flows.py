"""Bijections, bases and the two architectures: every claim of `usf.flows`, checked in double precision."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from usf.flows import (
    MLP,
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    BiLogNormal,
    Chain,
    ConvConditioner,
    DenseLinear,
    Flow,
    GaussianBase,
    GinCoupling,
    LULinear,
    NonUSFlow,
    Sandwich,
    USFlow,
    alternating_mask,
    channel_mask,
    check,
    checkerboard_mask,
)
from usf.flows.check import jacobian_log_abs_det

SHAPES = [(1,), (2,), (8,), (128,), (3, 5), (4, 6, 6)]
ARCHITECTURES = {
    "usflow": USFlow,
    "usflow-gin": lambda s, b, **k: USFlow(s, b, coupling="gin", **k),
    "nonusflow": NonUSFlow,
    "nonusflow-softplus": lambda s, b, **k: NonUSFlow(s, b, activation="softplus", **k),
}
BIJECTIONS = {
    "additive": AdditiveCoupling,
    "additive-checkerboard": lambda s: AdditiveCoupling(s, mask="checkerboard"),
    "additive-alternating": lambda s: AdditiveCoupling(s, mask="alternating", flip=True),
    "affine": AffineCoupling,
    "affine-softplus": lambda s: AffineCoupling(s, activation="softplus"),
    "affine-softplus-checkerboard": lambda s: AffineCoupling(s, mask="checkerboard", activation="softplus"),
    "affine-checkerboard": lambda s: AffineCoupling(s, mask="checkerboard", flip=True),
    "gin": GinCoupling,
    "gin-alternating": lambda s: GinCoupling(s, mask="alternating"),
    "lu": LULinear,
    "lu-fixed": lambda s: LULinear(s, diagonal="fixed"),
    "lu-signed": lambda s: LULinear(s, signs=torch.tensor([(-1.0) ** i for i in range(s[0])])),
    "dense": lambda s: DenseLinear(s, torch.eye(s[0]).double() + 0.1, torch.ones(s[0]).double()),
    "sandwich-additive": lambda s: Sandwich(LULinear(s, bias=math.prod(s) > 1), AdditiveCoupling(s)),
    "sandwich-gin": lambda s: Sandwich(LULinear(s, bias=math.prod(s) > 1), GinCoupling(s)),
    "sandwich-affine": lambda s: Sandwich(LULinear(s), AffineCoupling(s)),
    "sandwich-in-affine": lambda s: Sandwich(AffineCoupling(s), AffineCoupling(s, flip=True)),
    "chain": lambda s: Chain([LULinear(s), AffineCoupling(s), AdditiveCoupling(s, flip=True)]),
    **{name: lambda s, make=make: make(s, 3, hidden=(16, 16)).bijection for name, make in ARCHITECTURES.items()},
}


def randomized(module: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    """Away from the identity, so that nothing holds by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            width = math.sqrt(p[0].numel()) if p.dim() > 1 and p.numel() else 1.0
            p += scale / width * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BIJECTIONS)
def test_bijection(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bijection = BIJECTIONS[name](shape)
    report = check(bijection, shape, round_trip=1e-9, log_abs_det=1e-8)
    if bijection.is_uniformly_scaling:
        assert report.spread == 0.0
    elif math.prod(shape) > 1:
        assert report.spread > 1e-3, "an affine coupling whose determinant does not vary is not exercised"


def test_which_are_uniformly_scaling() -> None:
    varying = {name for name, make in BIJECTIONS.items() if not make((4,)).is_uniformly_scaling}
    assert varying == {n for n in BIJECTIONS if "affine" in n or n == "chain" or n.startswith("nonusflow")}
    assert not NonUSFlow((4,)).is_uniformly_scaling
    assert USFlow((4,)).is_uniformly_scaling


@pytest.mark.parametrize("shape", [(2,), (8,), (3, 5), (4, 6, 6)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flow_density_against_autograd(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flow = randomized(ARCHITECTURES[name](shape, 2, hidden=(8, 8)).double())
    x = torch.randn(3, *shape, dtype=torch.float64)
    ladj = jacobian_log_abs_det(flow.bijection, x, len(shape))
    expected = flow.base.log_prob(flow.latent(x)) + ladj
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(flow.log_abs_det_jacobian(x), ladj, atol=1e-8, rtol=0)
    torch.testing.assert_close(flow.inverse(flow.latent(x)), x, atol=1e-9, rtol=0)
    if flow.is_uniformly_scaling:
        torch.testing.assert_close(flow.log_abs_det, ladj[0], atol=1e-8, rtol=0)
    else:
        with pytest.raises(TypeError, match="depends on the input"):
            _ = flow.log_abs_det


@pytest.mark.parametrize("architecture", [USFlow, NonUSFlow])
@pytest.mark.parametrize("shape", [(2,), (64,), (128,), (1024,), (4096,), (3, 32, 32)], ids=str)
def test_initial_likelihood_is_sane(architecture: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flow = architecture(shape, 1, hidden=(16, 16))
    x = torch.randn(4, *shape)
    per_dimension = -flow.log_prob(x).mean() / math.prod(shape)
    assert 0 < per_dimension < 10


@pytest.mark.parametrize("architecture", [USFlow, NonUSFlow])
def test_initialisation_is_well_conditioned_and_seeded(architecture: type) -> None:
    torch.manual_seed(3)
    first = architecture((128,), 4)
    torch.manual_seed(3)
    second = architecture((128,), 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for layer in first.modules():
        if isinstance(layer, LULinear):
            assert torch.linalg.cond(layer.matrix()) < 10


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(8,), (3, 5)], ids=str)
def test_score_ignores_the_rest_of_the_batch(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    flow = randomized(ARCHITECTURES[name](shape, 3).double())
    x = torch.randn(65, *shape, dtype=torch.float64)
    together = flow.score(x)
    one_by_one = torch.stack([flow.score(event) for event in x])
    order = torch.randperm(65)
    torch.testing.assert_close(one_by_one, together, atol=1e-11, rtol=0)
    torch.testing.assert_close(flow.score(x[order]), together[order], atol=1e-11, rtol=0)


@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from(sorted(ARCHITECTURES)),
    st.sampled_from([(2,), (5,), (2, 3)]),
)
@settings(max_examples=25, deadline=None)
def test_any_batch_shape(batch: list[int], name: str, shape: tuple[int, ...]) -> None:
    flow = randomized(ARCHITECTURES[name](shape, 2, hidden=(8,)).double())
    x = torch.randn(*batch, *shape, dtype=torch.float64)
    flat = x.reshape(-1, *shape)
    for method in (flow.log_prob, flow.score, flow.log_abs_det_jacobian):
        assert method(x).shape == tuple(batch)
        torch.testing.assert_close(method(x).reshape(-1), method(flat), atol=1e-10, rtol=0)
    torch.testing.assert_close(flow.inverse(flow.latent(x)), x, atol=1e-9, rtol=0)
    samples, log_prob = flow.rsample_and_log_prob(batch)
    assert samples.shape == x.shape
    torch.testing.assert_close(flow.log_prob(samples), log_prob, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (2, 4, 4)], ids=str)
def test_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    flow = randomized(USFlow(shape, 2, hidden=(8,)), 0.1).to(dtype)
    x = torch.randn(4, *shape).to(dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.2}[dtype]
    assert flow.log_prob(x).dtype == flow.score(x).dtype == flow.sample((2,)).dtype == dtype
    torch.testing.assert_close(flow.inverse(flow.latent(x)), x, atol=tolerance, rtol=0)


def test_gradients_reach_every_parameter_through_the_likelihood() -> None:
    for name, make in ARCHITECTURES.items():
        flow = randomized(make((6,), 3))
        (-flow.log_prob(torch.randn(32, 6)).mean()).backward()
        for parameter_name, p in flow.named_parameters():
            assert p.grad is not None, (name, parameter_name)
            assert torch.isfinite(p.grad).all(), (name, parameter_name)
            assert (p.grad != 0).any(), (name, parameter_name)


def test_the_architectures_differ_in_coupling_and_last_layer_alone() -> None:
    us, non = USFlow((6,), 3, hidden=(10, 12)), NonUSFlow((6,), 3, hidden=(10, 12))
    us_shapes = {k: tuple(v.shape) for k, v in us.state_dict().items()}
    non_shapes = {k: tuple(v.shape) for k, v in non.state_dict().items()}
    assert us_shapes.keys() == non_shapes.keys()
    different = {k for k in us_shapes if us_shapes[k] != non_shapes[k]}
    last = {f"bijection.parts.{i}.inner.conditioner.4.{p}" for i in range(3) for p in ("weight", "bias")}
    assert different == last


def test_gin_contains_additive() -> None:
    """With its log-scales at zero a GIN coupling is the additive coupling."""
    gin, additive = GinCoupling((4,), hidden=(8,)).double(), AdditiveCoupling((4,), hidden=(8,)).double()
    randomized(additive)
    with torch.no_grad():
        gin.conditioner[0].load_state_dict(additive.conditioner[0].state_dict())
        gin.conditioner[2].weight[2:] = additive.conditioner[2].weight
        gin.conditioner[2].bias[2:] = additive.conditioner[2].bias
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(gin(x)[0], additive(x)[0])


def test_clamp_bounds_the_log_scale() -> None:
    layer = AffineCoupling((4,), clamp=0.5, hidden=(8,))
    with torch.no_grad():
        layer.conditioner[-1].bias.fill_(1e6)
    assert layer(torch.zeros(4))[1].item() == pytest.approx(2 * 0.5)


def test_softplus_scale_starts_at_one_and_is_softplus_of_the_clamped_value() -> None:
    layer = AffineCoupling((4,), clamp=2.0, hidden=(8,), activation="softplus").double()
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], x, rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.conditioner[-1].bias[:2] = 0.7
    scale = math.log1p(math.exp(2.0 * math.tanh(0.7))) / math.log(2)
    torch.testing.assert_close(layer(x)[0][:, 2:], scale * x[:, 2:])


# --- linear maps ------------------------------------------------------------------------------------------------------


def test_lu_is_the_matrix_it_claims() -> None:
    layer = randomized(LULinear((5,), signs=torch.tensor([1.0, -1, 1, -1, 1])).double())
    lower, upper = layer.factors()
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
    assert (lower.diagonal() == 1).all()
    assert upper.diagonal().sign().tolist() == [1, -1, 1, -1, 1]
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], x @ layer.matrix().T + layer.bias)
    torch.testing.assert_close(torch.linalg.slogdet(layer.matrix()).logabsdet, layer.log_abs_det())


@pytest.mark.parametrize("batch", [1, 3, 200])
def test_lu_product_order_does_not_matter(batch: int) -> None:
    """U then L for small batches, their product for large ones: the same map."""
    layer = randomized(LULinear((96,)).double())
    x = torch.randn(200, 96, dtype=torch.float64)
    assert layer.is_wide(x)
    assert layer.is_wide(x[:batch]) == (batch == 200)
    torch.testing.assert_close(layer(x[:batch])[0], layer(x)[0][:batch], atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.solve(x[:batch]), layer.solve(x)[:batch], atol=1e-12, rtol=0)


def test_fixed_diagonal_keeps_the_volume_through_training() -> None:
    layer = LULinear((4,), diagonal="fixed")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(16, 4))[0].square().mean().backward()
        optimizer.step()
    assert torch.linalg.slogdet(layer.matrix().double()).logabsdet.abs() < 1e-5


def test_sandwich_equals_the_generic_composition() -> None:
    """The residual form of A^-1 C A against the three maps applied in turn, few vectors and many."""
    for shape, batch in ((6,), 9), ((96,), 5), ((96,), 200), ((4, 3, 3), 2):
        for coupling in (AdditiveCoupling, AffineCoupling, GinCoupling):
            for flip in (False, True):
                outer, inner = LULinear(shape), coupling(shape, hidden=(8,), flip=flip)
                block = randomized(Sandwich(outer, inner).double())
                x = torch.randn(batch, *shape, dtype=torch.float64)
                z = block.outer.inverse(block.inner(block.outer(x)[0])[0])[0]
                torch.testing.assert_close(block(x)[0], z, atol=1e-12, rtol=0)
                torch.testing.assert_close(block.inverse(z)[0], x, atol=1e-11, rtol=0)


# --- masks, settings, input -------------------------------------------------------------------------------------------


@given(st.sampled_from([*SHAPES, (7,), (5, 4), (3, 2, 7)]), st.booleans())
def test_masks(shape: tuple[int, ...], flip: bool) -> None:
    for make in (channel_mask, alternating_mask, checkerboard_mask):
        mask = make(shape, flip)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert torch.equal(mask, ~make(shape, not flip))
    grid = checkerboard_mask((2, 3, 4))
    assert (grid[:, 1:] != grid[:, :-1]).all()
    assert (grid[:, :, 1:] != grid[:, :, :-1]).all()


def test_masks_are_buffers_and_survive_double() -> None:
    flow = USFlow((2, 4, 4), 2).double()
    masks = [name for name, _ in flow.named_buffers() if name.endswith("mask")]
    assert len(masks) == 2
    assert all(name in flow.state_dict() for name in masks)
    assert flow.log_prob(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: USFlow(()), "at least one axis"),
        (lambda: USFlow((0,)), "positive sizes"),
        (lambda: USFlow((2,), 0), "at least one block"),
        (lambda: USFlow((2,), coupling="affine"), "NonUSFlow"),
        (lambda: LULinear((2,), diagonal="free"), "'learned' or 'fixed'"),
        (lambda: LULinear((2,), signs=torch.tensor([1.0, 0.0])), "not invertible"),
        (lambda: DenseLinear((2,), torch.ones(2, 2), torch.zeros(2)), "singular"),
        (lambda: AdditiveCoupling((1, 4, 4)), "checkerboard"),
        (lambda: AdditiveCoupling((3,), mask=torch.ones(3)), "nothing to keep or nothing to move"),
        (lambda: AdditiveCoupling((3,), mask=torch.ones(2)), "mask has shape"),
        (lambda: AdditiveCoupling((3,), mask="halves"), "unknown mask"),
        (lambda: AffineCoupling((2,), clamp=0), "clamp must be positive"),
        (lambda: AffineCoupling((2,), activation="relu"), "unknown activation 'relu'"),  # type: ignore[arg-type]
        (lambda: Sandwich(LULinear((2,)), AdditiveCoupling((3,))), "one shape"),
        (lambda: Chain([]), "at least one bijection"),
        (lambda: Chain([LULinear((2,)), LULinear((3,))]), "one shape"),
        (lambda: Flow(LULinear((2,)), GaussianBase((3,))), "base has shape"),
        (lambda: GaussianBase((2,), variance=0), "variance"),
        (lambda: GaussianBase((2,), center=torch.zeros(3)), "does not fit"),
        (lambda: MLP(2, 0), "positive"),
        (lambda: ConvConditioner(2, 2, 0), "MLP"),
        (lambda: ConvConditioner(2, 2, 2, kernel_size=2), "odd"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_input_is_named() -> None:
    flow = USFlow((3,), 1)
    with pytest.raises(ValueError, match=r"events of shape \(3,\)"):
        flow.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"events of shape \(3,\)"):
        flow.score(torch.tensor(1.0))
    with pytest.raises(ValueError, match="1 values that are NaN or infinite, of 6"):
        flow.log_prob(torch.tensor([[0.0, 1, 2], [0, math.nan, 0]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        flow.latent(torch.full((1, 3), math.inf))
    # Finite values whose sum overflows are no error.
    assert flow.latent(torch.full((1, 3), 3e38)).isfinite().all()
    flow.validate_args = False
    assert flow.log_prob(torch.full((1, 3), math.nan)).isnan().all()


# --- bases and prior --------------------------------------------------------------------------------------------------


def test_gaussian_base_against_torch() -> None:
    center = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    base = GaussianBase((3,), center, 0.5).double()
    reference = torch.distributions.MultivariateNormal(center, 0.5 * torch.eye(3, dtype=torch.float64))
    z = torch.randn(10, 3, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(base.distance(z), (z - center).norm(dim=-1))
    torch.manual_seed(0)
    samples = base.sample((20_000,))
    assert (samples.mean(0) - center).abs().max() < 0.03
    assert (samples.var(0) - 0.5).abs().max() < 0.03


@given(st.floats(-2, 2), st.floats(0.1, 2))
@settings(max_examples=20, deadline=None)
def test_bilognormal_density(loc: float, scale: float) -> None:
    """Half a log-normal on each side (definition 1), integrating to its own cdf."""
    law = BiLogNormal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    x = torch.tensor([-3.0, -0.2, 0.7, 4.0], dtype=torch.float64)
    expected = 0.5 * stats.lognorm(s=scale, scale=math.exp(loc)).pdf(x.abs().numpy())
    torch.testing.assert_close(law.log_prob(x).exp(), torch.as_tensor(expected), rtol=1e-9, atol=1e-12)
    step = 1e-6
    slope = (law.cdf(x + step) - law.cdf(x - step)) / (2 * step)
    torch.testing.assert_close(slope, law.log_prob(x).exp(), rtol=1e-4, atol=1e-7)


def test_bilognormal_is_a_distribution() -> None:
    law = BiLogNormal(torch.zeros(2), 0.5)
    assert law.batch_shape == (2,)
    assert law.expand((3, 2)).sample((4,)).shape == (4, 3, 2)
    assert law.log_prob(torch.zeros(2)).tolist() == [-math.inf] * 2
    torch.manual_seed(0)
    samples = BiLogNormal(0.3, 0.5).sample((20_000,))
    assert abs(samples.sign().mean()) < 0.03
    assert stats.kstest(samples.abs().log().numpy(), "norm", (0.3, 0.5)).pvalue > 0.01
    assert samples.square().mean() == pytest.approx(BiLogNormal(0.3, 0.5).variance.item(), rel=0.05)
    with pytest.raises(ValueError, match="scale"):
        BiLogNormal(0.0, -1.0)


def test_bilognormal_checks_whatever_the_compiler_did_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # torch.compile does, for good
    with pytest.raises(ValueError, match="scale"):
        BiLogNormal(0.0, -1.0)
    BiLogNormal(0.0, -1.0, validate_args=False)


@pytest.mark.parametrize("shape", [(8,), (8, 4, 4), (3, 5)], ids=str)
def test_prior_gives_the_determinant_the_stated_spread(shape: tuple[int, ...]) -> None:
    """sigma/(hw sqrt(c)) per diagonal entry makes ln|det| N(0, sigma^2); sigma/(chw) does not."""
    channels, positions, sigma = shape[0], math.prod(shape[1:]), 1.0
    torch.manual_seed(0)
    u = BiLogNormal(0.0, sigma / (positions * math.sqrt(channels))).sample((40_000, channels))
    log_det = positions * u.abs().log().sum(-1)
    assert log_det.std() == pytest.approx(sigma, rel=0.02)
    printed = positions * BiLogNormal(0.0, sigma / math.prod(shape)).sample((40_000, channels)).abs().log().sum(-1)
    assert printed.std() == pytest.approx(sigma / math.sqrt(channels), rel=0.02)


def test_log_prior_is_that_law_and_reaches_every_lu_layer() -> None:
    shape, sigma = (3, 2, 2), 0.7
    flow = randomized(USFlow(shape, 3).double())
    layers = [m for m in flow.modules() if isinstance(m, LULinear)]
    assert len(layers) == 4
    scale = sigma / (4 * math.sqrt(3))
    expected = sum(BiLogNormal(0.0, scale).log_prob(layer.factors()[1].diagonal()).sum() for layer in layers)
    torch.testing.assert_close(flow.log_prior(sigma), expected)
    flow.log_prior(sigma).backward()
    for layer in layers:
        assert (layer.weight.grad.diagonal() != 0).all()
    with pytest.raises(TypeError, match="nothing to act on"):
        Flow(AdditiveCoupling((2,))).log_prior()
    with pytest.raises(ValueError, match="sigma"):
        flow.log_prior(0.0)


# --- inference, storage, export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (2,), (32,), (3, 5), (4, 6, 6)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_flow_agrees(name: str, shape: tuple[int, ...]) -> None:
    flow = randomized(ARCHITECTURES[name](shape, 3, hidden=(8, 8)).double())
    fused = flow.fuse()
    x = torch.randn(5, *shape, dtype=torch.float64)
    for method in ("log_prob", "score", "latent", "log_abs_det_jacobian", "inverse"):
        torch.testing.assert_close(getattr(fused, method)(x), getattr(flow, method)(x), atol=1e-8, rtol=0)
    linear = [m for m in fused.modules() if isinstance(m, DenseLinear)]
    assert len(linear) == 4, "one matrix before, between and after three couplings"
    assert not any(isinstance(m, LULinear) for m in fused.modules())
    assert fused.is_uniformly_scaling == flow.is_uniformly_scaling
    assert not any(p.requires_grad for p in fused.parameters())


def test_fused_copy_leaves_the_original_alone() -> None:
    flow = randomized(USFlow((4,), 2))
    before = copy.deepcopy(flow.state_dict())
    fused = flow.fuse()
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in flow.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(tmp_path, name: str, dtype: torch.dtype) -> None:
    base = GaussianBase((2, 3, 3), center=torch.randn(2, 3, 3), variance=0.5)
    flow = randomized(ARCHITECTURES[name]((2, 3, 3), 2, hidden=(4, 6), mask="checkerboard", base=base)).to(dtype)
    flow.save(tmp_path / "flow.safetensors")
    loaded = Flow.load(tmp_path / "flow.safetensors")
    assert type(loaded) is type(flow)
    x = torch.randn(3, 2, 3, 3, dtype=dtype)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert torch.equal(loaded.score(x), flow.score(x))
    assert [p.name for p in tmp_path.iterdir()] == ["flow.safetensors"]


def test_load_refuses_what_it_should(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no flow at"):
        Flow.load(tmp_path / "missing")
    (tmp_path / "junk").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Flow.load(tmp_path / "junk")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no flow saved by usf"):
        Flow.load(tmp_path / "other")
    USFlow((2,), 1).save(tmp_path / "us")
    with pytest.raises(ValueError, match="holds a USFlow, not a NonUSFlow"):
        NonUSFlow.load(tmp_path / "us")


def test_save_refuses_what_load_could_not_rebuild(tmp_path) -> None:
    with pytest.raises(TypeError, match="cannot be saved whole"):
        USFlow((2,), 1, conditioner=lambda i, o, r: MLP(i, o, (4,))).save(tmp_path / "flow")
    with pytest.raises(TypeError, match="cannot be saved whole"):
        USFlow((2,), 1).fuse().save(tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "flow.safetensors"
    USFlow((2,), 1).save(path)
    before = path.read_bytes()

    def full_disk(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("usf.flows.flow.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        USFlow((2,), 2).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_deepcopy_and_state_dict() -> None:
    flow = randomized(NonUSFlow((4,), 2))
    other = NonUSFlow((4,), 2)
    other.load_state_dict(flow.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(flow.log_prob(x), other.log_prob(x))
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [3, 200])
def test_stacked_flows_agree_with_single_ones(name: str, batch: int) -> None:
    """Several flows of one shape in one call, as `torch.func` stacks them, values and gradients."""
    flows = [randomized(ARCHITECTURES[name]((6,), 2, hidden=(8,)).double(), seed=i) for i in range(3)]
    for flow in flows:
        flow.validate_args = False  # the check reads a number off the data, which a batched tensor does not have
    weights, buffers = torch.func.stack_module_state(flows)
    x = torch.randn(3, batch, 6, dtype=torch.float64)
    stacked = torch.vmap(lambda w, b, x: torch.func.functional_call(flows[0], (w, b), (x,)))(weights, buffers, x)
    stacked.sum().backward()
    for index, flow in enumerate(flows):
        torch.testing.assert_close(stacked[index], flow.log_prob(x[index]), atol=1e-11, rtol=0)
        flow.log_prob(x[index]).sum().backward()
        for key, p in flow.named_parameters():
            torch.testing.assert_close(weights[key].grad[index], p.grad, atol=1e-9, rtol=1e-9)


def _same_when_compiled(flow: Flow, backend: str) -> None:
    torch.compiler.reset()
    x = torch.randn(16, *flow.shape)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), flow.log_prob(x), atol=1e-5, rtol=1e-5)
    weight = flow.bijection.parts[0].outer.weight
    (gradient,) = torch.autograd.grad(compiled(x).sum(), [weight])
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), [weight])
    torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_traces_without_graph_breaks(name: str, shape: tuple[int, ...]) -> None:
    _same_when_compiled(randomized(ARCHITECTURES[name](shape, 2, hidden=(8,))), "aot_eager")


def test_compiles() -> None:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and none is on PATH")
    _same_when_compiled(randomized(NonUSFlow((4,), 1, hidden=(8,))), "inductor")


@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onnx_agrees(tmp_path, name: str, shape: tuple[int, ...]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from usf.flows import to_onnx

    flow = randomized(ARCHITECTURES[name](shape, 2, hidden=(8,)))
    to_onnx(flow, tmp_path / "flow.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "flow.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, *shape)
        latent, score = session.run(["latent", "score"], {"x": x.numpy()})
        torch.testing.assert_close(torch.as_tensor(latent), flow.latent(x).detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.as_tensor(score), flow.score(x).detach(), atol=1e-4, rtol=1e-4)


# --- the helper people run on their own layers ------------------------------------------------------------------------


class _Broken(Bijection):
    """Scales by two; each flaw breaks one promise."""

    def __init__(self, flaw: str) -> None:
        super().__init__((3,))
        self.flaw = flaw
        self.is_uniformly_scaling = flaw in ("constancy", "none")
        self.unused = nn.Parameter(torch.zeros(1))
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        y = 2 * x * self.gain.exp() + (0 if self.flaw == "dead" else 1) * self.unused
        ladj = 3 * (math.log(2) + self.gain).squeeze()
        if self.flaw == "constancy":
            y, ladj = y + 0.1 * y**3, ladj.expand(len(x)) + torch.log1p(0.3 * y**2).sum(-1)
        return y, ladj + (0.1 if self.flaw == "log_abs_det" else 0)

    def inverse(self, y):
        if self.flaw == "constancy":  # Newton's method on y + y^3/10
            z = y.clone()
            for _ in range(60):
                z = z - (z + 0.1 * z**3 - y) / (1 + 0.3 * z**2)
            ladj = -torch.log1p(0.3 * z**2).sum(-1)
            y = z
        else:
            ladj = y.new_zeros(())
        x = (y - (0 if self.flaw == "dead" else 1) * self.unused) / (2 * self.gain.exp())
        wrong = 1e-6 if self.flaw == "round_trip" else 0
        return x + wrong, ladj - 3 * (math.log(2) + self.gain).squeeze()


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("round_trip", "round trip is off"),
        ("log_abs_det", "off autograd's by 1.00e-01 nats"),
        ("constancy", "claims to be uniformly scaling"),
        ("dead", "no gradient reaches unused"),
    ],
)
def test_check_finds_each_flaw(flaw: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(_Broken(flaw), (3,))


def test_check_passes_a_sound_layer_and_leaves_it_alone() -> None:
    layer = _Broken("none")
    assert check(layer, (3,)).spread == 0.0
    assert layer.gain.item() == 0.0
    assert layer.gain.dtype == torch.float32
