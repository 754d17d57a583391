"""The VAE with a flow prior: every term of its bound, its scores, its files, and its place in anomalib."""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

pytest.importorskip("timm", reason="needs the detectors extra")

from helpers import weave
from usf.detectors import resolve
from usf.detectors.backbones import Weights
from usf.hybrid import PRIORS, FlowVAE, Scores, Settings, calibrated, decoder_depth
from usf.hybrid.scores import SCORES
from usf.study.metrics import auroc

WEIGHTS = resolve("random", announce=None)
# Drawing known weights takes longer than most tests; where none are asked for, the backbone keeps timm's, by the seed.
BARE = Weights("resnet18", "checkpoint", "none", "ab" * 32)
SMALL: dict[str, object] = {"size": 16, "latent": 3, "blocks": 1, "hidden": (8,), "stage": 1, "width": 4, "channels": 8}


def build(
    prior: str = "usf", *, seed: int = 0, disturbed: bool = True, weights: Weights = BARE, **changes: object
) -> FlowVAE:
    torch.manual_seed(seed)
    model = FlowVAE(Settings(**{**SMALL, "prior": prior, **changes}), weights)
    if disturbed:  # away from the initial values, where couplings are the identity
        with torch.no_grad():
            for parameter in model.prior.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_all_terms_are_densities_at_one_and_the_same_z(prior: str, images: Tensor) -> None:
    model = build(prior).double()
    x = images.double()
    noise = torch.randn(6, 3, dtype=torch.float64)
    terms = model.terms(x, noise=noise)
    mean, scale = model.posterior(x)
    assert torch.equal(terms.z, mean + scale * noise)
    assert torch.allclose(terms.posterior, Normal(mean, scale).log_prob(terms.z).sum(-1))
    assert torch.allclose(terms.prior, model.prior.log_prob(terms.z))
    pixels = Normal(model.decode(terms.z), model.settings.sigma).log_prob(x)
    assert torch.allclose(terms.reconstruction, pixels.sum((1, 2, 3)))
    assert torch.allclose(terms.elbo, terms.reconstruction - terms.posterior + terms.prior)
    assert not torch.equal(terms.z, model.terms(x).z)  # by default the noise is drawn


def test_with_a_gaussian_prior_the_latent_terms_average_to_the_analytic_divergence(images: Tensor) -> None:
    model = build("gaussian").double()
    x = images[:1].double()
    mean, scale = model.posterior(x)
    exact = 0.5 * (mean.square() + scale.square() - 1).sum() - scale.log().sum()
    count = 4000
    noise = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        terms = model.terms(x.expand(count, -1, -1, -1), model.features(x).expand(count, -1), noise=noise)
    sampled = terms.posterior - terms.prior
    assert abs(float(sampled.mean() - exact.detach())) < 4 * float(sampled.std()) / math.sqrt(count)
    assert float(sampled.std()) > 0.05  # or the line above says little


@pytest.mark.parametrize("prior", ["usf", "non-usf"])
def test_with_a_flow_the_latent_terms_average_to_the_divergence_by_quadrature(prior: str, images: Tensor) -> None:
    model = build(prior, latent=2, blocks=2).double()
    x = images[:1].double()
    with torch.no_grad():
        mean, scale = model.posterior(x)
        axis = torch.linspace(-7, 7, 211, dtype=torch.float64)
        grid = mean + scale * torch.cartesian_prod(axis, axis)
        known = Normal(mean, scale).log_prob(grid).sum(-1)
        cell = float((axis[1] - axis[0]) ** 2 * scale.prod())
        exact = float((known.exp() * (known - model.prior.log_prob(grid))).sum()) * cell
        count = 4000
        noise = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        terms = model.terms(x.expand(count, -1, -1, -1), model.features(x).expand(count, -1), noise=noise)
        # The prior is a density: its latents of a wide grid are covered once.
        wide = torch.linspace(-16, 16, 401, dtype=torch.float64)
        mass = model.prior.log_prob(torch.cartesian_prod(wide, wide)).exp().sum() * (wide[1] - wide[0]) ** 2
    sampled = terms.posterior - terms.prior
    assert abs(float(sampled.mean()) - exact) < 4 * float(sampled.std()) / math.sqrt(count)
    assert float(sampled.std()) > 0.05
    assert float(mass) == pytest.approx(1, abs=1e-3)


def test_with_a_linear_flow_the_prior_is_a_known_gaussian(images: Tensor) -> None:
    model = build("usf").double()
    with torch.no_grad():
        for name, parameter in model.prior.named_parameters():
            if "conditioner" in name:
                parameter.zero_()
        origin = torch.zeros(1, 3, dtype=torch.float64)
        offset = model.prior.inverse(origin)[0]
        matrix = (model.prior.inverse(torch.eye(3, dtype=torch.float64)) - offset).T
        known = MultivariateNormal(offset, matrix @ matrix.T)
        x = images.double()
        mean, scale = model.posterior(x)
        exact = torch.distributions.kl_divergence(MultivariateNormal(mean, torch.diag_embed(scale.square())), known)
        features = model.features(x)
        noise = torch.randn(300, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        found = [model.terms(x, features, noise=one) for one in noise]
        draws = torch.stack([terms.posterior - terms.prior for terms in found])
    assert all(torch.allclose(terms.prior, known.log_prob(terms.z)) for terms in found)
    assert (matrix - torch.eye(3)).abs().max() > 0.05  # or it is the standard normal
    assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws))).all()


def linear(model: FlowVAE, *, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Give the model a linear decoder with orthogonal columns; its (W, b). Posteriors are then Gaussian, diagonal."""
    generator = torch.Generator().manual_seed(seed)
    side, d = model.settings.size, model.settings.latent
    columns = torch.linalg.qr(torch.randn(3 * side**2, d, generator=generator, dtype=torch.float64)).Q
    weight = columns * torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64)
    bias = torch.rand(3 * side**2, generator=generator, dtype=torch.float64)
    layer = nn.Linear(d, 3 * side**2).double()
    layer.weight.data, layer.bias.data = weight, bias
    model.decoder = nn.Sequential(layer, nn.Unflatten(1, (3, side, side)))
    return weight, bias


def test_at_the_exact_posterior_the_bound_is_the_evidence_for_every_sample(images: Tensor) -> None:
    # Were two terms evaluated at different samples, the estimate would vary.
    model = build("gaussian").double()
    weight, bias = linear(model)
    variance = model.settings.sigma**2
    x = images.double()
    scale = (1 + (weight.T @ weight).diagonal() / variance).rsqrt()
    mean = scale.square() * ((x.flatten(1) - bias) @ weight) / variance
    model.posterior = lambda *_: (mean, scale.expand_as(mean))  # type: ignore[method-assign]
    evidence = MultivariateNormal(bias, weight @ weight.T + variance * torch.eye(len(bias), dtype=torch.float64))
    exact = evidence.log_prob(x.flatten(1))
    for _ in range(3):
        assert torch.allclose(model.terms(x).elbo, exact, atol=1e-7)
    # At another posterior it is smaller by the divergence from the exact one.
    copies = mean.repeat(400, 1)
    model.posterior = lambda *_: (copies, 2 * scale.expand_as(copies))  # type: ignore[method-assign]
    gaps = exact.repeat(400) - model.terms(x.repeat(400, 1, 1, 1)).elbo.detach()
    gap = 3 * (0.5 * (4 - 1) - math.log(2))
    assert abs(float(gaps.mean()) - gap) < 4 * float(gaps.std()) / math.sqrt(len(gaps)) < gap / 4


def test_gradients_reach_encoder_decoder_and_prior_from_the_terms_that_know_them(images: Tensor) -> None:
    def reached(loss: Tensor) -> dict[str, bool]:
        model.zero_grad(set_to_none=True)
        loss.backward()
        parts = {"projection": model.encoder.projection, "decoder": model.decoder, "prior": model.prior}
        found = {}
        for name, part in parts.items():
            gradients = [p.grad for p in part.parameters()]
            found[name] = all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
            assert found[name] or all(g is None for g in gradients)
        assert all(p.grad is None for p in model.encoder.trunk.parameters())
        return found

    for prior in ("usf", "non-usf"):
        model = build(prior)
        assert reached(-model.terms(images).elbo.mean()) == {"projection": True, "decoder": True, "prior": True}
        assert reached(model.terms(images).reconstruction.mean()) == {
            "projection": True,
            "decoder": True,
            "prior": False,
        }
        assert reached(model.terms(images).prior.mean()) == {"projection": True, "decoder": False, "prior": True}


def test_gradients_reach_a_backbone_that_is_trained_end_to_end(images: Tensor) -> None:
    model = build(trainable=True, weights=WEIGHTS)  # timm's own start with residual branches at zero
    for term, sign in (("reconstruction", 1), ("prior", 1), ("posterior", -1)):
        model.zero_grad(set_to_none=True)
        (sign * getattr(model.terms(images), term).mean()).backward()
        gradients = [p.grad for p in model.encoder.trunk.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients), term
        assert sum(bool(g.any()) for g in gradients if g is not None) > 0.9 * len(gradients), term
    assert len(model.trainable_parameters()) == len(list(model.parameters()))


@pytest.mark.parametrize("prior", PRIORS)
def test_a_few_steps_raise_the_bound(prior: str, images: Tensor) -> None:
    model, images = build(prior, disturbed=False), 0.2 * images
    features, noise = model.features(images), torch.randn(6, 3)
    before = model.terms(images, features, noise=noise).elbo.mean().item()
    optimiser = torch.optim.Adam(model.trainable_parameters(), lr=1e-2)
    for _ in range(15):
        optimiser.zero_grad()
        (-model.terms(images, features).elbo.mean()).backward()
        optimiser.step()
    assert model.terms(images, features, noise=noise).elbo.mean().item() > before + 100


# --- the backbone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_statistics_of_the_backbone_never_change_and_its_weights_only_where_asked(
    trainable: bool, images: Tensor
) -> None:
    model = build(trainable=trainable).train()
    before = copy.deepcopy(model.encoder.trunk.state_dict())
    optimiser = torch.optim.Adam(model.trainable_parameters(), lr=1e-2)
    for _ in range(2):
        (-model.terms(images).elbo.mean()).backward()
        optimiser.step()
    after = model.encoder.trunk.state_dict()
    parameters = {name for name, _ in model.encoder.trunk.named_parameters()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == (
        parameters if trainable else set()
    )
    assert any("running_mean" in name for name in before.keys() - parameters)
    assert not any(module.training for module in model.encoder.trunk.modules())
    assert model.decoder.training  # the rest follows the mode


def test_the_backbone_has_the_weights_that_its_hash_names(images: Tensor) -> None:
    model = build(stage=2, weights=WEIGHTS)
    expected = model.encoder.trunk.state_dict()
    from usf.detectors import backbones

    drawn = backbones.build(WEIGHTS)
    maps = drawn((images - model.encoder.mean) / model.encoder.std)
    assert all(torch.equal(expected[name], drawn.state_dict()[name]) for name in expected)
    assert torch.allclose(model.features(images), maps[1].mean((2, 3)), atol=1e-6)
    assert model.settings.needs == ("layer1", "layer2")


def test_known_features_stand_for_the_backbone(images: Tensor) -> None:
    model = build()
    features = model.features(images)
    assert not features.requires_grad
    one, two = model.scores(images), model.scores(images, features)
    assert all(np.array_equal(one[name], two[name]) for name in SCORES)


def test_construction_is_a_function_of_the_seed_and_not_of_timm() -> None:
    one, two, other = build(seed=4).state_dict(), build(seed=4).state_dict(), build(seed=5).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder.projection.weight"], other["encoder.projection.weight"])


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_scores_are_deterministic_and_of_each_image_alone(prior: str, images: Tensor) -> None:
    model = build(prior).train()
    state = torch.get_rng_state()
    first = model.scores(images)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn
    again, by_two = model.scores(images), model.scores(images.flip(0), batch_size=2)
    with torch.no_grad():
        mean, _ = model.posterior(images)
        parts = (-model.log_likelihood(images, mean), model.prior.latent(mean).norm(dim=1), -model.prior.log_prob(mean))
    for name, part in zip(("reconstruction", "norm", "log_prob"), parts, strict=True):
        assert np.array_equal(first[name], again[name])
        assert np.allclose(first[name], by_two[name][::-1], rtol=1e-5)
        assert np.allclose(first[name], part.numpy(), rtol=1e-5)
    assert np.array_equal(first.sum, first.reconstruction + first.log_prob)
    assert len(first) == 6
    # A constant determinant leaves nothing between norm and density.
    offset = first.log_prob - 0.5 * first.norm**2
    assert (np.ptp(offset) < 1e-4) == (prior != "non-usf")


def test_calibration_hears_a_latent_that_the_sum_drowns() -> None:
    generator = np.random.default_rng(0)

    def draw(count: int, shift: float) -> Scores:
        return Scores(
            reconstruction=1e5 + 1e3 * generator.standard_normal(count),
            norm=generator.standard_normal(count) + shift,
            log_prob=11 * generator.standard_normal(count) + 11 * shift,
        )

    normals, tested = draw(300, 0), draw(100, 0)
    anomalies = draw(100, 4)
    labels = np.repeat([False, True], 100)
    both = Scores(*(np.r_[getattr(tested, k), getattr(anomalies, k)] for k in ("reconstruction", "norm", "log_prob")))
    assert auroc(labels, both.sum) < 0.65
    assert auroc(labels, calibrated(both, normals)) > 0.95
    assert auroc(labels, calibrated({"norm": both.norm}, {"norm": normals.norm})) > 0.95
    with pytest.raises(ValueError, match="terms of the tested"):
        calibrated({"norm": both.norm}, {"log_prob": both.norm})
    with pytest.raises(ValueError, match="at least one"):
        calibrated({}, {})
    with pytest.raises(ValueError, match="not finite"):
        calibrated({"norm": np.array([np.nan])}, {"norm": np.array([1.0])})


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.sampled_from([lambda v: 3 * v + 1e6, np.exp, lambda v: v**3]),
)
def test_calibration_needs_the_order_of_each_term_alone(normals: list[int], tested: list[int], warp: object) -> None:
    known, new = np.array(normals, dtype=float), np.array(tested, dtype=float)
    plain = calibrated({"a": new, "b": -new}, {"a": known, "b": -known})
    warped = calibrated({"a": warp(new), "b": -new}, {"a": warp(known), "b": -known})  # type: ignore[operator]
    assert np.array_equal(plain, warped)
    assert ((plain >= 0) & (plain <= 2 * math.log(len(normals) + 1) + 1e-12)).all()


def test_broken_numbers_are_errors_that_say_where(images: Tensor) -> None:
    model = build()
    broken = images.clone()
    broken[4] = math.nan
    with pytest.raises(FloatingPointError, match="1 images are not finite, the first at position 4"):
        model.scores(broken)
    with pytest.raises(ValueError, match=r"\(N, 3, 16, 16\)"):
        model.scores(images[..., :8])
    with pytest.raises(ValueError, match="at least one image"):
        model.scores(images[:0])
    with pytest.raises(ValueError, match="6 images and 2 of features"):
        model.scores(images, model.features(images[:2]))
    with pytest.raises(ValueError, match="decodes to"):
        model.terms(images[:, :1], model.features(images))
    with pytest.raises(KeyError, match="latent"):
        model.scores(images)["latent"]  # type: ignore[index]


# --- shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "latent", "layers"), [(16, 3, 4), (32, 48, 3), (64, 3072, 1), (128, 64, 5)])
def test_the_decoders_depth_follows_the_compression(size: int, latent: int, layers: int) -> None:
    settings = Settings(size=size, latent=latent, stage=1)
    assert settings.layers == layers == decoder_depth(settings.compression)
    model = FlowVAE(Settings(**{**SMALL, "size": size, "latent": latent, "prior": "gaussian"}), BARE)
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in model.decoder) == layers
    decoded = model.sample(2)
    assert decoded.shape == (2, 3, size, size)
    assert 0 < decoded.min() <= decoded.max() < 1


def test_samples_are_decoded_from_draws_of_the_prior() -> None:
    model = build("non-usf").double()
    torch.manual_seed(7)
    u = model.prior.base.sample((500,)).double()
    assert torch.allclose(model.prior.latent(model.prior.inverse(u)), u, atol=1e-8)
    torch.manual_seed(7)
    assert torch.equal(model.sample(500), model.decode(model.prior.inverse(u)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "maf"}, "prior='maf'"),
        ({"backbone": "mcait"}, "backbone='mcait'"),
        ({"stage": 5}, "stages 1 to 4"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"latent": 0}, "latent=0"),
        ({"hidden": (0,)}, "at least one unit"),
        ({"size": 18}, "multiple of 4"),
        ({"pool": 5}, "pool=5"),
        ({"size": 20, "depth": 3}, "cannot be halved 3 times"),
    ],
)
def test_settings_that_make_no_model_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{**SMALL, **changes})


def test_weights_of_another_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="not for wide_resnet50_2"):
        FlowVAE(Settings(**{**SMALL, "backbone": "wide_resnet50_2"}), BARE)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_a_saved_model_scores_the_same_and_nothing_is_unpickled(
    prior: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickling")

    model, path = build(prior, weights=WEIGHTS), tmp_path / "model.safetensors"
    model.save(path)
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    loaded = FlowVAE.load(path)
    assert loaded.settings == model.settings
    assert (loaded.weights.source, loaded.weights.sha256) == ("checkpoint", WEIGHTS.sha256)
    assert not loaded.training
    one, two = model.scores(images), loaded.scores(images)
    assert all(np.array_equal(one[name], two[name]) for name in SCORES)
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    assert json.loads(header["__metadata__"]["settings"])["prior"] == prior
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded.save(path)  # a second generation
    assert FlowVAE.load(path).weights.sha256 == WEIGHTS.sha256


def test_a_damaged_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    build().save(path)
    data = path.read_bytes()
    changed = bytearray(data)
    changed[-5] ^= 1
    for content, message in (
        (bytes(changed), "hash differs"),
        (data.replace(b'\\"sigma\\": 0.1', b'\\"sigma\\": 0.2'), "hash differs"),
        (data.replace(b"usf-hybrid-1", b"usf-hybrid-9"), "no hybrid saved by usf"),
        (data[:-100], "not a safetensors file"),
        (pickle.dumps({"a": 1}), "not a safetensors file"),
    ):
        assert content != data
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            FlowVAE.load(path)
    with pytest.raises(FileNotFoundError, match="no model"):
        FlowVAE.load(tmp_path / "absent")


def test_weights_that_do_not_fit_their_settings_are_refused(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "model.safetensors"
    for settings, message in (
        (Settings(**{**SMALL, "latent": 4}), "do not fit"),
        (Settings(**{**SMALL, "hidden": (9,)}), "do not fit"),
    ):
        model.settings = settings
        model.save(path)  # the hash is right, the content is not
        with pytest.raises(ValueError, match=message):
            FlowVAE.load(path)


# --- anomalib ---------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_neither_anomalib_nor_timm() -> None:
    code = "import sys, usf.hybrid; sys.exit('anomalib' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runs_in_anomalibs_engine_with_the_areas_of_its_scores(tmp_path: Path) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from anomalib.engine import Engine
    from anomalib.post_processing import PostProcessor

    from usf.hybrid import HybridDetector
    from usf.study import textures
    from usf.study.images import load_images, read

    root = textures.ensure(small=True)
    data = weave(6, masks=False)
    settings = {**SMALL, "size": 32}
    detector = HybridDetector(
        score="log_prob",
        backbone_weights="random",
        visualizer=False,
        post_processor=PostProcessor(enable_normalization=False),
        **settings,
    )
    before = copy.deepcopy(detector.model.state_dict())
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(detector, data)
    after = detector.model.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder", "decoder", "prior"}
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder.trunk"))

    reported = engine.test(detector, data)[0]
    folder = read(root)
    images = load_images([sample.path for sample in folder.test], 32)
    scores = detector.model.scores(images)
    assert reported["image_AUROC"] == pytest.approx(auroc(folder.labels, scores.log_prob), abs=1e-5)
    for name in SCORES:
        detector.model.score = name
        with torch.inference_mode():
            out = detector.model(images)
        assert out.pred_score.shape == (len(images), 1)
        assert np.allclose(out.pred_score[:, 0].numpy(), scores[name], rtol=1e-5)
    assert out.anomaly_map.shape == (len(images), 1, 32, 32)
    # The map holds what tells the reconstructions of images apart.
    total = 3 * out.anomaly_map.sum((1, 2, 3)).numpy()
    assert np.allclose(total - total[0], scores.reconstruction - scores.reconstruction[0], atol=0.1)

    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = HybridDetector.load_from_checkpoint(checkpoint).eval()
    assert loaded.weights.source == "checkpoint"
    assert loaded.weights.sha256 == detector.weights.sha256
    assert np.array_equal(loaded.model.scores(images).sum, scores.sum)
    assert loaded.model.score == "log_prob"

    for arguments, message in (
        ({"score": "latent"}, "score='latent'"),
        ({"depht": 3}, "unknown settings depht"),
        ({"size": 64, "pre_processor": HybridDetector.configure_pre_processor((32, 32))}, "size=64"),
    ):
        with pytest.raises(ValueError, match=message):
            HybridDetector(backbone_weights="random", **arguments)
