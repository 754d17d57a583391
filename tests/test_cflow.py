"""CFlow with a chosen coupling: the stock model to the last digit, passes written out, scores free of the batch."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="needs the detectors extra")

from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.models import Cflow as StockCflow
from anomalib.models.image.cflow import utils
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from helpers import disturb, name, weave
from usf import paths
from usf.detectors import Block, Cflow, CflowModel, FlowOptions, backbones, fibres, resolve
from usf.detectors.coupling import building_with
from usf.detectors.fibres import decode
from usf.detectors.folded import decode_maps
from usf.detectors.model import Latents
from usf.study import detection, textures
from usf.study.features import Features
from usf.study.images import load_masks, read
from usf.study.metrics import auroc

SIZE = 32
LAYERS = ("layer1", "layer2", "layer3")
STOCK = FlowOptions(coupling="affine", mixing="permutation")
ALL = [
    FlowOptions(coupling=coupling, mixing=mixing, diagonal=diagonal, global_scale=scale)
    for coupling in ("affine", "additive", "gin")
    for mixing, diagonal in (("permutation", "fixed"), ("lu", "fixed"), ("lu", "learned"))
    for scale in (True, False)
]
UNIFORM = [options for options in ALL if options.is_uniformly_scaling]
WEIGHTS = resolve("random", announce=None)


def model(options: FlowOptions, **kwargs: object) -> CflowModel:
    settings_: dict[str, object] = {"layers": LAYERS, "coupling_blocks": 2, "condition_vector": 16, **kwargs}
    built = detection.build("cflow", SIZE, WEIGHTS, options, seed=0, **settings_)  # type: ignore[arg-type]
    assert isinstance(built, CflowModel)
    disturb(built)
    return built


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(images: Tensor) -> Features:
    return Features(tuple(model(STOCK).features(images)))


# --- the passes that are written out ----------------------------------------------------------------------------------


def chain(options: FlowOptions, channels: int = 7, soft: bool = False, blocks: int = 3) -> list[Block]:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # scipy draws rotations from it
    with building_with(utils, options):
        head = utils.cflow_head(8, blocks, 1.9, channels, soft).double()
    disturb(head, 0.2)
    return list(head.module_list)


def blockwise(blocks: list[Block], x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
    log_det = x.new_zeros(len(x))
    for block in blocks:
        x, local = block.transform(x, [conditions])
        log_det = log_det + local
    return x, log_det


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", ALL, ids=name)
def test_written_out_passes_are_those_of_the_blocks(
    options: FlowOptions, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fibres, "_PANEL", 3)  # several panels of the triangular matrices, the last one smaller
    blocks = chain(options, soft=soft)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    conditions = torch.randn(9, 8, dtype=torch.float64, generator=generator)
    weights = torch.randn(9, 7, dtype=torch.float64, generator=generator)
    more = torch.randn(9, dtype=torch.float64, generator=generator)
    named = {key: p for key, p in nn.ModuleList(blocks).named_parameters() if p.requires_grad}
    results = []
    for compute in (decode, blockwise):
        z, log_det = compute(blocks, x, conditions)
        gradients = torch.autograd.grad(
            (weights * z).sum() + (more * log_det).sum(), [x, *named.values()], materialize_grads=True
        )
        results.append((z, log_det, *gradients))
    for key, own, expected in zip(["z", "log_det", "x", *named], *results, strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-10), key
    if options.is_uniformly_scaling:
        assert (results[0][1] == results[0][1][0]).all()
    else:
        assert results[0][1].std() > 1e-3

    # Inverse, block by block, and the log-determinant against that of the whole Jacobian.
    back = results[0][0]
    for block in reversed(blocks):
        back, _ = block.transform(back, [conditions], rev=True)
    assert (back - x).abs().max() < (1e-5 if soft else 1e-9)  # scipy's rotations are kept in float32
    jacobian = torch.autograd.functional.jacobian(lambda v: decode(blocks, v[None], conditions[:1])[0][0], x[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, results[0][1][0], atol=1e-5 if soft else 1e-9)


@pytest.mark.parametrize("options", ALL, ids=name)
def test_written_out_passes_take_two_channels(options: FlowOptions) -> None:
    """Halves of one channel, so that some sides are one."""
    blocks = chain(options, channels=2)
    x = torch.randn(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    conditions = torch.ones(1, 8, dtype=torch.float64)
    for own, expected in zip(decode(blocks, x, conditions), blockwise(blocks, x, conditions), strict=True):
        assert torch.allclose(own, expected)
    own = fibres.Joined(blocks)
    own.gradients_of(x, conditions, lambda z, log_det: (z.sum(), torch.ones_like(z), torch.zeros_like(log_det)))
    found = own.gradient.clone()
    own.separate()
    parameters = [parameter for kind in own.decoder.parameters.values() for parameter in kind]
    blockwise(blocks, x, conditions)[0].sum().backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    assert torch.allclose(found, torch.cat([gradient.flatten() for gradient in expected]))


@pytest.mark.parametrize("vectors", [1, 5, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", ALL, ids=name)
def test_folded_flow_is_the_flow(options: FlowOptions, soft: bool, vectors: int) -> None:
    blocks = chain(options, soft=soft)
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, 7, 3, 2, dtype=torch.float64, generator=generator)
    conditions = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    z, log_det = decode_maps(blocks, maps, conditions, vectors=vectors)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 7)
    expected, expected_log_det = blockwise(blocks, rows, conditions.repeat(2, 1))
    assert torch.allclose(z.permute(0, 2, 3, 1).reshape(-1, 7), expected, atol=1e-10)
    assert torch.allclose(log_det.flatten(), expected_log_det, atol=1e-10)
    assert not z.requires_grad


def test_another_coupling_network_is_refused() -> None:
    block = Block([(4,)], options=STOCK, subnet_constructor=nn.Linear)
    with pytest.raises(ValueError, match="two layers with a ReLU between"):
        decode([block], torch.zeros(2, 4), torch.zeros(2, 0))


# --- the stock model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_and_own() -> tuple[StockCflow, Cflow]:
    resize = StockCflow.configure_pre_processor((SIZE, SIZE))
    torch.manual_seed(4)
    stock = StockCflow(
        backbone="resnet18", layers=list(LAYERS), coupling_blocks=3, pre_trained=False, pre_processor=resize
    )
    torch.manual_seed(4)
    own = Cflow(
        backbone="resnet18",
        layers=LAYERS,
        coupling_blocks=3,
        coupling="affine",
        mixing="permutation",
        score="anomalib",
        backbone_weights="random",
        pre_processor=resize,
    )
    stock.model.encoder.load_state_dict(own.model.encoder.state_dict())
    return stock, own


class Alone:
    """What a trainer does for a training step, without a trainer."""

    def __init__(self, detector: StockCflow | Cflow) -> None:
        self.optimiser = detector.configure_optimizers()
        self.logged: list[float] = []
        for attribute, stand_in in {
            "optimizers": lambda: self.optimiser,
            "manual_backward": lambda loss: loss.backward(),
            "log": lambda _, value, **__: self.logged.append(value),
        }.items():
            object.__setattr__(detector, attribute, stand_in)


def test_affine_with_permutation_is_the_stock_model(stock_and_own: tuple[StockCflow, Cflow], images: Tensor) -> None:
    stock, own = (copy.deepcopy(detector).model for detector in stock_and_own)
    states = stock.state_dict(), own.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "same seed, same initial weights"
    for _ in range(2):
        maps = [network(images) for network in (stock, own)]
        # anomalib leaves the channel out, against its own documentation.
        assert maps[1].anomaly_map.shape == (5, 1, SIZE, SIZE)
        assert (maps[0].anomaly_map - maps[1].anomaly_map[:, 0]).abs().max() < 1e-6
        assert (maps[0].pred_score - maps[1].pred_score[:, 0]).abs().max() < 1e-6
        disturb(stock, 0.02)
        disturb(own, 0.02)


def test_one_epoch_is_one_of_the_stock_model(stock_and_own: tuple[StockCflow, Cflow]) -> None:
    """Lightning's training step, and the fast path on cached features, against anomalib's step from the same seed."""
    stock, own = (copy.deepcopy(detector) for detector in stock_and_own)
    cached, seed = copy.deepcopy(own.model), 11
    before = copy.deepcopy(stock.model.state_dict())
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    logged = []
    for detector in (stock, own):
        alone = Alone(detector)
        torch.manual_seed(seed)
        for part in order.split((5, 4)):
            detector.training_step(ImageBatch(image=images[part]))
        logged.append(alone.logged)
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)

    features = Features(tuple(cached.features(images)))
    history = detection.fit(cached, features, epochs=1, batch_size=5, seed=seed, progress=False)
    assert history.steps == sum(count * side**2 // 64 for count in (5, 4) for side in (16, 8, 4))
    expected = stock.model.state_dict()
    for key, value in expected.items():
        assert torch.allclose(own.model.state_dict()[key], value, atol=1e-5), key
        assert torch.allclose(cached.state_dict()[key], value, atol=1e-5), key
    moved = [key for key in expected if not torch.equal(before[key], expected[key])]
    assert any("subnet" in key for key in moved)


@pytest.mark.parametrize("loss", ["anomalib", "mle"])
@pytest.mark.parametrize("options", ALL, ids=name)
def test_joined_parameters_have_the_gradients_of_autograd(options: FlowOptions, loss: str, features: Features) -> None:
    maps = features.batch(slice(0, 3))
    plain, joined = (model(options, loss=loss, fiber_batch_size=40) for _ in range(2))
    draws = [torch.Generator().manual_seed(7) for _ in range(2)]
    named = [dict(detector.decoders.named_parameters()) for detector in (plain, joined)]
    optimiser = torch.optim.Adam(plain.trainable_parameters(), lr=plain.lr)
    with joined.fitting() as own_optimiser:
        pairs = zip(plain.losses(maps, draws[0]), joined.gradients(maps, draws[1]), strict=True)
        for steps, (expected, value) in enumerate(pairs, start=1):
            assert value.item() == pytest.approx(expected.item(), rel=1e-5)
            optimiser.zero_grad()
            expected.backward()
            optimiser.step()
            own_optimiser.step()
            own_optimiser.zero_grad()
            for key, parameter in named[0].items():
                assert torch.allclose(named[1][key], parameter, atol=2e-6), (steps, key)
        assert steps > 3
        memory = named[1]["0.module_list.0.subnet.0.weight"].untyped_storage().nbytes()
    parameter = named[1]["0.module_list.0.subnet.0.weight"]
    assert memory > parameter.untyped_storage().nbytes() == 4 * parameter.numel(), "memory of its own again"


def test_joined_parameters_are_all_trained() -> None:
    frozen = model(STOCK)
    for parameter in frozen.decoders.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"), frozen.fitting():
        pass


def test_too_few_fibres_are_one_step_here_and_an_error_in_anomalib(
    stock_and_own: tuple[StockCflow, Cflow], images: Tensor
) -> None:
    stock, own = (copy.deepcopy(detector) for detector in stock_and_own)
    Alone(stock)
    with pytest.raises(ValueError, match="enough fibers"):
        stock.training_step(ImageBatch(image=images[:1]))  # layer2: 16 fibres
    losses = list(own.model.losses(own.model.features(images[:1])))
    assert len(losses) == 3
    assert torch.stack(losses).isfinite().all()


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", UNIFORM, ids=name)
def test_uniformly_scaling_detector_has_one_determinant(options: FlowOptions, features: Features) -> None:
    latents = model(options).latents(features.batch(slice(0, 3)))
    for log_det in latents.log_dets:
        assert (log_det == log_det.flatten()[0]).all()
        if not options.global_scale and options.diagonal == "fixed":
            assert (log_det == 0).all()


def test_affine_detector_has_many_determinants(features: Features) -> None:
    latents = model(STOCK).latents(features.batch(slice(0, 3)))
    assert all(log_det.std() > 1e-3 for log_det in latents.log_dets)


@pytest.mark.parametrize("loss", ["anomalib", "mle"])
@pytest.mark.parametrize("options", [STOCK, FlowOptions(), FlowOptions(coupling="gin", diagonal="learned")], ids=name)
def test_every_trainable_parameter_has_a_gradient(options: FlowOptions, loss: str, features: Features) -> None:
    detector = model(options, loss=loss)
    for value in detector.losses(features.batch(slice(0, 5))):
        value.backward()
    trainable = {key: p for key, p in detector.named_parameters() if p.requires_grad}
    assert not any(key.startswith("encoder") for key in trainable)
    for key, parameter in trainable.items():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


def test_losses_are_what_they_are_called(features: Features) -> None:
    """Both from the latents of the same fibres."""
    maps = features.batch(slice(0, 2))
    detector = model(STOCK, loss="mle", fiber_batch_size=10**6)
    with torch.no_grad():
        latents = detector.latents(maps)
    nll = [
        0.5 * z.square().mean() - log_det.mean() / z.shape[1] + 0.5 * math.log(2 * math.pi)
        for z, log_det in zip(latents.z, latents.log_dets, strict=True)
    ]
    assert [loss.item() for loss in detector.losses(maps)] == pytest.approx([float(value) for value in nll], rel=1e-5)
    detector.loss_kind = "anomalib"
    per_fibre = [
        (0.5 * z.square().sum(dim=1) - log_det) / z.shape[1] + 0.5 * math.log(2 * math.pi)
        for z, log_det in zip(latents.z, latents.log_dets, strict=True)
    ]
    stock = [torch.log1p(torch.exp(value)).mean().item() for value in per_fibre]
    assert [loss.item() for loss in detector.losses(maps)] == pytest.approx(stock, rel=1e-5)


def test_gradients_flow_through_latents_too(features: Features) -> None:
    detector = model(FlowOptions())
    maps = features.batch(slice(0, 2))
    with_graph = detector.latents(maps)
    with torch.no_grad():
        without = detector.latents(maps)
    for one, other in zip(with_graph.z + with_graph.log_dets, without.z + without.log_dets, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert all(z.requires_grad for z in with_graph.z)


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(17, 70), st.integers(17, 70))
def test_any_batch_and_image_size(count: int, height: int, width: int) -> None:
    built = _small()
    built.input_size = (height, width)
    pictures = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))
    maps = built.features(pictures)
    assert torch.stack(list(built.losses(maps))).isfinite().all()
    result = built(pictures)
    assert result.anomaly_map.shape == (count, 1, height, width)
    assert torch.isfinite(result.anomaly_map).all()
    assert torch.equal(result.pred_score[:, 0], result.anomaly_map.flatten(1).amax(dim=1))
    with pytest.raises(ValueError, match="CFlow was built for"):
        built(torch.zeros(1, 3, height + 1, width))


@functools.cache
def _small() -> CflowModel:
    return model(FlowOptions(), coupling_blocks=1)


@pytest.mark.parametrize("score", ["norm", "log_prob"])
@pytest.mark.parametrize("options", [STOCK, FlowOptions()], ids=name)
def test_score_does_not_depend_on_the_batch(options: FlowOptions, score: str, features: Features) -> None:
    detector = model(options)
    together = detection.evaluate(detector, features, score=score, batch_size=5)
    alone = detection.evaluate(detector, features, score=score, batch_size=1)
    turned = detection.evaluate(detector, Features(tuple(level.flip(0) for level in features.levels)), score=score)
    assert together.maps == pytest.approx(alone.maps, rel=1e-4, abs=1e-6)
    assert together.scores == pytest.approx(turned.scores[::-1], rel=1e-4, abs=1e-6)
    assert together.scores == pytest.approx(together.maps.max(axis=(1, 2)))


def test_anomalibs_score_turns_with_the_batch() -> None:
    """Six normal images, six that are unlikely everywhere: anomalib's score separates them when all stand in one batch,
    and orders them the wrong way round when normal and anomalous ones come in batches of their own."""
    detector = model(FlowOptions(), layers=("layer1",))
    generator = torch.Generator().manual_seed(0)
    normal = 1 + 0.2 * torch.rand(6, 1, 8, 8, generator=generator)
    anomalous = 3 + 0.001 * torch.rand(6, 1, 8, 8, generator=generator)
    z = torch.cat((normal, anomalous)).expand(-1, 64, -1, -1)
    labels = np.arange(12) >= 6

    def area(score: str, batch: int) -> float:
        parts = [Latents([part], [torch.zeros(len(part), 8, 8)]) for part in z.split(batch)]
        scores = [detector.maps(part, score).amax(dim=(1, 2, 3)) for part in parts]  # type: ignore[arg-type]
        return auroc(labels, torch.cat(scores).numpy())

    assert area("anomalib", 12) == 1.0
    assert area("anomalib", 6) == 0.0
    assert [area(score, batch) for score in ("norm", "log_prob") for batch in (12, 6, 1)] == [1.0] * 6


def test_likelihood_score_is_the_mean_over_layers(features: Features) -> None:
    detector = model(STOCK)
    with torch.no_grad():
        latents = detector.latents(features.batch(slice(0, 2)))
    levels = [
        nn.functional.interpolate(
            (0.5 * z.square().sum(dim=1) - log_det)[:, None] / z.shape[1], size=(SIZE, SIZE), mode="bilinear",
            align_corners=True,
        )
        for z, log_det in zip(latents.z, latents.log_dets, strict=True)
    ]  # fmt: skip
    assert torch.allclose(detector.maps(latents, "log_prob"), sum(levels) / 3, atol=1e-5)


def test_score_keeps_the_order_where_anomalibs_underflows() -> None:
    detector = model(FlowOptions(), layers=("layer1",))
    levels = torch.tensor([0.0, 20.0, 30.0, 40.0]).reshape(4, 1, 1, 1)
    latents = Latents([levels.expand(4, 64, 8, 8)], [torch.zeros(4, 8, 8)])
    assert detector.maps(latents, "log_prob").amax((1, 2, 3)).diff().min() > 0
    assert len(detector.maps(latents, "anomalib").amax((1, 2, 3)).unique()) == 2


def test_half_precision_is_close_and_leaves_the_rest_alone(features: Features) -> None:
    exact, half = model(FlowOptions()), model(FlowOptions(), precision="bfloat16")
    maps = features.batch(slice(0, 3))
    results = []
    for detector in (exact, half):
        with torch.no_grad():
            latents = detector.latents(maps)
        losses = list(detector.losses(maps, torch.Generator().manual_seed(0)))
        for loss in losses:
            loss.backward()
        assert all(z.dtype == torch.float32 for z in latents.z)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in detector.trainable_parameters())
        results.append((detector.maps(latents), torch.stack(losses)))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][0], results[1][0], rtol=0.02)
    assert torch.allclose(results[0][1], results[1][1], rtol=0.02)
    # Latents of a uniformly scaling flow keep one determinant.
    with torch.no_grad():
        assert all(log_det.unique().numel() == 1 for log_det in half.latents(maps).log_dets)
    # An autocast around the model is the same choice.
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        around = exact.maps(exact.latents(maps))
    assert torch.allclose(around, results[1][0], rtol=1e-6)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"layers=\['layer3', 'layer1'\]: choose from layer1, layer2, layer3, layer4"):
        model(STOCK, layers=("layer3", "layer1"))
    with pytest.raises(ValueError, match="layer9"):
        model(STOCK, layers=("layer9",))
    with pytest.raises(ValueError, match="fiber_batch_size=0"):
        model(STOCK, fiber_batch_size=0)
    with pytest.raises(ValueError, match="precision='half'"):
        model(STOCK, precision="half")
    with pytest.raises(ValueError, match="loss='nll'"):
        model(STOCK, loss="nll")
    with pytest.raises(ValueError, match="score='max'"):
        model(STOCK).maps(Latents([], []), "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the pre-processor resizes to"):
        Cflow(input_size=(64, 64), pre_processor=Cflow.configure_pre_processor((SIZE, SIZE)))


def test_sizes_are_those_of_the_affine_networks_where_matched() -> None:
    def networks(options: FlowOptions) -> int:
        blocks = [module for module in model(options).modules() if isinstance(module, Block)]
        return sum(parameter.numel() for block in blocks for parameter in block.subnet.parameters())

    affine = networks(STOCK)
    assert networks(FlowOptions()) < 0.85 * affine
    assert networks(FlowOptions(match_parameters=True)) == pytest.approx(affine, rel=0.01)


def test_real_weights_and_layers() -> None:
    if not (file := paths.shared("weights", "resnet18_imagenet_layers1to3.safetensors")):
        pytest.skip("needs ../shared")
    weights = resolve(file, announce=None)
    built = detection.build("cflow", SIZE, weights, FlowOptions(), seed=0, layers=("layer2", "layer3"))
    assert [tuple(level.shape[1:]) for level in built.features(torch.zeros(1, 3, SIZE, SIZE))] == [
        (128, 4, 4),
        (256, 2, 2),
    ]


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_a_function_of_the_seed_and_lowers_the_loss(features: Features) -> None:
    states, histories = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 17)  # whatever happened before does not matter
        detector = model(FlowOptions(), lr=1e-3)
        histories.append(detection.fit(detector, features, epochs=2, batch_size=3, seed=seed, progress=False))
        states.append(detector.state_dict())
    assert histories[0].losses == histories[1].losses
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert histories[0].losses != histories[2].losses
    assert histories[0].losses[-1] < histories[0].losses[0]


def test_values_that_are_not_finite_stop_the_run_by_name(features: Features) -> None:
    broken = Features(tuple(level.clone() for level in features.levels))
    broken.levels[1][3, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"mine \(coupling additive, mixing lu\): the loss is nan at epoch 1"):
        detection.fit(model(FlowOptions()), broken, epochs=1, batch_size=5, label="mine", progress=False)
    with pytest.raises(FloatingPointError, match="score of image 3 is not finite"):
        detection.evaluate(model(FlowOptions()), broken)


def test_checkpoint_brings_choice_and_backbone(tmp_path: Path, images: Tensor) -> None:
    weights = tmp_path / "backbone.safetensors"
    save_file(backbones._random_state("resnet18", 3), weights)
    detector = Cflow(
        backbone="resnet18",
        layers=["layer2", "layer3"],
        coupling_blocks=2,
        coupling="gin",
        diagonal="learned",
        lr=3e-4,
        backbone_weights=weights,
        input_size=(SIZE, SIZE),
    )
    disturb(detector)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(detector)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    weights.unlink()  # the checkpoint stands alone

    loaded = Cflow.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.model.options == FlowOptions(coupling="gin", diagonal="learned")
    assert loaded.model.pool_layers == ["layer2", "layer3"]
    assert loaded.model.lr == 3e-4
    assert loaded.input_size == (SIZE, SIZE)
    assert loaded.weights.sha256 == detector.weights.sha256
    before, after = (network.model(images).anomaly_map for network in (detector, loaded))
    assert torch.equal(before, after)


def test_runs_in_anomalibs_engine_and_its_areas_are_the_exact_ones(tmp_path: Path) -> None:
    root = textures.ensure(small=True)
    data = weave(6)
    detector = Cflow(
        backbone="resnet18",
        layers=LAYERS,
        coupling_blocks=1,
        backbone_weights="random",
        input_size=(SIZE, SIZE),
        visualizer=False,
        post_processor=PostProcessor(enable_normalization=False),
    )
    before = [parameter.clone() for parameter in detector.model.trainable_parameters()]
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(detector, data)
    assert not any(map(torch.equal, before, detector.model.trainable_parameters()))
    reported = engine.test(detector, data)[0]

    folder = read(root)
    result = detection.evaluate(detector.model, _extract(detector.model, folder))
    assert reported["image_AUROC"] == pytest.approx(result.image_auroc(folder.labels), abs=1e-5)
    assert reported["pixel_AUROC"] == pytest.approx(result.pixel_auroc(load_masks(folder.test, SIZE)), abs=2e-3)


def _extract(detector: CflowModel, folder: object) -> Features:
    from usf.study.images import load_images, normalise

    files = [sample.path for sample in folder.test]  # type: ignore[attr-defined]
    return Features(tuple(detector.features(normalise(load_images(files, SIZE)))))
