"""U-Flow with a chosen coupling: the stock model to the last digit, exact log-determinants, no network access."""

from __future__ import annotations

import copy
import dataclasses
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="needs the detectors extra")

import timm
from anomalib.engine import Engine
from anomalib.models import Uflow as StockUflow
from anomalib.models.components import AnomalibModule
from anomalib.models.image.uflow.feature_extraction import CaitFeatureExtractor
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from timm.models.cait import Cait

from helpers import disturb, name, weave
from usf.detectors import FlowOptions, Uflow, UflowModel, backbones, resolve
from usf.detectors.model import Latents, Loss
from usf.study import detection
from usf.study.features import Features

SIZE = 32
STOCK = FlowOptions(coupling="affine", mixing="permutation")
UNIFORM = [
    FlowOptions(),
    FlowOptions(mixing="permutation", global_scale=False),
    FlowOptions(diagonal="learned", match_parameters=True),
    FlowOptions(coupling="gin"),
    FlowOptions(coupling="gin", mixing="permutation"),
]
WEIGHTS = resolve("random", announce=None)


def model(options: FlowOptions, size: tuple[int, int] = (SIZE, SIZE), **kwargs: Any) -> UflowModel:
    torch.manual_seed(0)
    built = UflowModel(size, WEIGHTS, options, **{"flow_steps": 2, **kwargs})
    disturb(built)
    return built.eval()


def pictures(count: int, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(5)


@pytest.fixture(scope="module")
def features(images: Tensor) -> Features:
    return Features(tuple(model(STOCK).features(images)))


@pytest.fixture(scope="module")
def stock_and_own() -> tuple[StockUflow, Uflow]:
    resize = AnomalibModule.configure_pre_processor((SIZE, SIZE))
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False}))
        torch.manual_seed(4)
        stock = StockUflow(backbone="resnet18", pre_processor=resize)
    torch.manual_seed(4)
    own = Uflow(
        backbone="resnet18",
        coupling="affine",
        mixing="permutation",
        score="anomalib",
        backbone_weights="random",
        pre_processor=resize,
    )
    stock.model.feature_extractor.feature_extractor.load_state_dict(
        own.model.feature_extractor.feature_extractor.state_dict()
    )
    return stock, own


# --- the stock model --------------------------------------------------------------------------------------------------


def test_affine_with_permutation_is_the_stock_model(stock_and_own: tuple[StockUflow, Uflow], images: Tensor) -> None:
    stock, own = (copy.deepcopy(detector).model for detector in stock_and_own)
    states = stock.state_dict(), own.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "same seed, same initial weights"
    for _ in range(2):
        with torch.no_grad():
            expected = UFlowLoss()(*stock.train()(images))
            assert torch.allclose(UFlowLoss()(*own.train()(images)), expected, rtol=1e-6)
            assert torch.allclose(next(own.losses(own.features(images))), expected, rtol=1e-6)
            maps = [network.eval()(images) for network in (stock, own)]
        assert (maps[0].anomaly_map - maps[1].anomaly_map).abs().max() < 1e-6
        assert (maps[0].pred_score - maps[1].pred_score).abs().max() < 1e-6
        assert maps[1].pred_score.shape == maps[0].pred_score.shape
        disturb(stock, 0.03)
        disturb(own, 0.03)


def test_fast_path_trains_as_the_stock_model_does(stock_and_own: tuple[StockUflow, Uflow], images: Tensor) -> None:
    stock, own = (copy.deepcopy(detector) for detector in stock_and_own)
    stock.train()
    (optimiser,), _ = stock.configure_optimizers()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
    for part in (order[:2], order[2:4], order[4:]):
        optimiser.zero_grad()
        stock.loss(*stock.model(images[part])).backward()
        optimiser.step()
    before = copy.deepcopy(own.model.state_dict())
    cached = Features(tuple(own.model.features(images)))
    history = detection.fit(own.model, cached, epochs=1, batch_size=2, seed=9, progress=False)
    assert history.steps == 3
    for key, value in stock.model.state_dict().items():
        assert torch.allclose(own.model.state_dict()[key], value, atol=1e-5), key
    moved = [key for key, value in own.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("feature_normalizations" in key for key in moved), "the layer normalisation is trained"
    assert not any("feature_extractor.feature_extractor" in key for key in moved)


def test_stock_loss_divides_the_log_determinant_by_the_batch_alone(features: Features) -> None:
    stock, right = model(STOCK), model(STOCK, loss="mle")
    for size in (1, 2, 5):
        batch = features.batch(slice(0, size))
        latents = stock.latents(batch)
        energies, log_dets = latents.energies(), latents.log_abs_det()
        loss = next(stock.losses(batch))
        assert loss.item() == pytest.approx((energies.sum() - log_dets.mean()).item(), rel=1e-5)
        nll = right.latents(batch).energies() - right.latents(batch).log_abs_det()
        assert next(right.losses(batch)).item() == pytest.approx(nll.mean().item(), rel=1e-5)
    assert right.loss_is_nll
    assert not stock.loss_is_nll


# --- the flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [STOCK, *UNIFORM], ids=name)
@pytest.mark.parametrize(("count", "size"), [(1, (32, 32)), (3, (48, 80))])
def test_latents_are_those_of_the_graph_and_invert(options: FlowOptions, count: int, size: tuple[int, int]) -> None:
    detector = model(options, size).double()
    with torch.no_grad():
        features = detector.features(pictures(count, size).double())
        latents = detector.latents(features)
        normalised = detector.feature_extractor.normalize_features(features)
        z, log_det = detector.flow(normalised)
        back, log_det_back = detector.flow(latents.z, rev=True)
    assert [tuple(level.shape[2:]) for level in latents.z] == [(size[0] // s, size[1] // s) for s in (4, 8, 16)]
    for own, graph, positions in zip(latents.z, z, latents.log_dets, strict=True):
        assert torch.allclose(own, graph, atol=1e-10)
        assert positions.shape == (count, *graph.shape[2:])
    assert torch.allclose(latents.log_abs_det(), log_det, atol=1e-8)
    for own, graph in zip(back, normalised, strict=True):
        assert torch.allclose(own, graph, atol=1e-8)
    assert torch.allclose(log_det_back, -log_det, atol=1e-8)
    if options.is_uniformly_scaling:
        # GIN's terms cancel between positions, up to rounding.
        assert latents.log_abs_det().sub(latents.log_abs_det()[0]).abs().max() < 1e-9 * features[0].numel()
    elif count > 1:
        assert latents.log_abs_det().std() > 1


def test_log_determinant_is_that_of_the_jacobian() -> None:
    detector = model(STOCK, (16, 16), flow_steps=1).double()
    detector.feature_extractor.feature_normalizations = nn.ModuleList(nn.Identity() for _ in range(3))
    with torch.no_grad():
        features = detector.features(pictures(1, (16, 16)).double())
    shapes = [level.shape for level in features]
    lengths = [level.numel() for level in features]

    def flat(x: Tensor) -> Tensor:
        levels = [part.reshape(shape) for part, shape in zip(x.split(lengths), shapes, strict=True)]
        return torch.cat([z.flatten() for z in detector.latents(levels).z])

    jacobian = torch.autograd.functional.jacobian(
        flat, torch.cat([level.flatten() for level in features]), vectorize=True
    )
    exact = torch.linalg.slogdet(jacobian).logabsdet
    assert detector.latents(features).log_abs_det().item() == pytest.approx(exact.item(), abs=1e-6)


def test_shares_of_the_log_determinant_follow_the_channels(features: Features) -> None:
    detector = model(FlowOptions(mixing="permutation"), flow_steps=1)
    blocks = [module for module in detector.flow.module_list if hasattr(module, "global_scale")]
    with torch.no_grad():
        for stage, block in enumerate(blocks):  # every channel of a stage is scaled by the same factor
            factor = math.exp(0.1 * (stage + 1))
            block.global_scale.fill_(2.0 * math.log(math.expm1(5.0 * factor)))
        fine, middle, coarse = detector.latents(features.batch(slice(0, 2))).log_dets
    # 256 channels at the coarsest scale: 128 stay, 128 become 32 of the next, whose own are 128, and so on.
    assert torch.allclose(coarse, torch.full_like(coarse, 0.1 * 128), atol=1e-3)
    joined = 0.2 * 160 + 0.1 * 32
    assert torch.allclose(middle, torch.full_like(middle, joined * 80 / 160), atol=1e-3)
    assert torch.allclose(fine, torch.full_like(fine, 0.3 * (64 + 20) + joined * 80 / 160 / 4), atol=1e-3)


@pytest.mark.parametrize("options", UNIFORM, ids=name)
def test_uniformly_scaling_detector_has_one_determinant(options: FlowOptions, features: Features) -> None:
    uniform = detection.evaluate(model(options), features)
    assert uniform.log_det_std <= (0 if options.coupling == "additive" else 1e-7 * features.dimension)
    if options.coupling == "additive":
        detector = model(options)
        latents = detector.latents(features.batch(slice(0, 3)))
        shift = detector.maps(latents, "log_prob") - detector.maps(latents, "norm")
        assert shift.max() - shift.min() < 1e-4, "the two scores differ by a constant"
    assert detection.evaluate(model(STOCK), features).log_det_std > 1


@pytest.mark.parametrize("loss", ["anomalib", "mle"])
@pytest.mark.parametrize("options", [STOCK, *UNIFORM], ids=name)
def test_every_trainable_parameter_has_a_gradient(options: FlowOptions, loss: Loss, features: Features) -> None:
    detector = model(options, loss=loss).train()
    next(detector.losses(features.batch(slice(0, 3)))).backward()
    for key, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None, key


def test_features_are_the_bare_backbones(images: Tensor, features: Features) -> None:
    bare = backbones.build(WEIGHTS)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(bare(images), features.levels, strict=True)), "one cache for all"


def test_likelihood_counts_the_scale_before_the_flow(features: Features) -> None:
    losses: tuple[Loss, Loss] = ("anomalib", "mle")
    detectors = [model(STOCK, loss=loss) for loss in losses]
    for detector in detectors:
        for norm in detector.feature_extractor.feature_normalizations:
            with torch.no_grad():
                norm.weight.fill_(-10.0)  # the sign does not matter
    first, second = (detector.latents(features.batch(slice(0, 2))) for detector in detectors)
    counted = features.dimension * math.log(10.0)
    assert (second.log_abs_det() - first.log_abs_det()).tolist() == pytest.approx([counted] * 2, rel=1e-5)


def test_layer_norm_can_be_frozen_and_the_backbone_always_is() -> None:
    frozen = model(FlowOptions(train_layer_norm=False))
    assert not any(parameter.requires_grad for parameter in frozen.feature_extractor.parameters())
    free = model(FlowOptions())
    trained = {key for key, parameter in free.feature_extractor.named_parameters() if parameter.requires_grad}
    assert trained == {f"feature_normalizations.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["norm", "log_prob", "anomalib"])
def test_score_does_not_depend_on_the_batch(score: str, features: Features) -> None:
    detector = model(STOCK)
    together = detection.evaluate(detector, features, score=score, batch_size=5)
    alone = detection.evaluate(detector, features, score=score, batch_size=1)
    assert together.maps == pytest.approx(alone.maps, rel=1e-4, abs=1e-6)
    assert together.maps.shape == (5, SIZE, SIZE)
    assert together.scores == pytest.approx(together.maps.max(axis=(1, 2)))


def test_norm_score_keeps_the_order_where_anomalibs_saturates() -> None:
    detector = model(STOCK)
    z = torch.ones(3, 1, 2, 2) * torch.tensor([30.0, 40.0, 50.0]).reshape(3, 1, 1, 1)
    latents = Latents([z] * 3, [torch.zeros(3, 2, 2)] * 3)
    assert detector.maps(latents, "norm").amax((1, 2, 3)).diff().min() > 0
    assert (detector.maps(latents, "anomalib") == 1).all()


# --- options, learning rate, the network ------------------------------------------------------------------------------


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"input size \(40, 32\): height and width must be multiples of 16"):
        UflowModel((40, 32), WEIGHTS, STOCK)
    with pytest.raises(ValueError, match="score='max'"):
        UflowModel((SIZE, SIZE), WEIGHTS, STOCK, score="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr_schedule='batch': choose one of 'epoch', 'step'"):
        UflowModel((SIZE, SIZE), WEIGHTS, STOCK, lr_schedule="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the pre-processor resizes to"):
        Uflow("resnet18", input_size=(64, 64), pre_processor=Uflow.configure_pre_processor((SIZE, SIZE)))


def test_learning_rate_decays_by_epoch_as_in_anomalib_or_by_step_as_in_the_paper(features: Features) -> None:
    batch = features.batch(slice(0, 2))
    for schedule, expected in (("epoch", 1e-3), ("step", 1e-3 * (1 - 0.6 * 2 / 25_000))):
        detector = model(FlowOptions(), lr_schedule=schedule)
        optimiser = detector.optimiser()
        for _ in range(2):
            next(detector.losses(batch)).backward()
            optimiser.step()
        assert optimiser.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        lightning = Uflow("resnet18", 1, backbone_weights="random", input_size=(SIZE, SIZE), lr_schedule=schedule)
        configured = lightning.configure_optimizers()
        assert configured["lr_scheduler"]["interval"] == schedule
        assert configured["lr_scheduler"]["scheduler"].total_iters == 25_000


def test_fast_path_lowers_the_learning_rate_after_every_epoch_as_the_stock_model_does(
    stock_and_own: tuple[StockUflow, Uflow], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, own = stock_and_own[0], copy.deepcopy(stock_and_own[1].model)
    (optimiser,), (schedule,) = stock.configure_optimizers()
    expected: list[float] = []
    for _ in range(3):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    used: list[float] = []
    optimiser = own.optimiser()
    optimiser.register_step_post_hook(lambda *_: used.append(optimiser.param_groups[0]["lr"]))
    monkeypatch.setattr(own, "optimiser", lambda: optimiser)
    cached = Features(tuple(own.features(images)))
    detection.fit(own, cached, epochs=3, batch_size=len(images), progress=False)
    assert used == pytest.approx(expected, rel=1e-12)
    assert used[2] < used[1] < used[0] == 1e-3


def test_construction_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for backbone in ("resnet18", "wide_resnet50_2"):
        detector = UflowModel((SIZE, SIZE), resolve("random", backbone=backbone, announce=None), FlowOptions(), 1)
        assert all(torch.isfinite(z).all() for z in detector.latents(detector.features(pictures(1))).z)


# --- the pair of transformers, shrunk ---------------------------------------------------------------------------------


@pytest.fixture
def small_cait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same depth, sizes and names, with few channels."""
    channels = {"cait_m48_448": 16, "cait_s24_224": 8}

    def create(name: str, pretrained: bool = False, init_values: float = 0.1, **kwargs: object) -> nn.Module:
        assert not kwargs
        size, depth = (448, 42) if name == "cait_m48_448" else (224, 22)
        network = Cait(size, num_classes=0, embed_dim=channels[name], depth=depth, num_heads=1, init_values=init_values)
        network.norm.weight.data.uniform_(0.5, 2.0)
        return network

    monkeypatch.setattr(timm, "create_model", create)
    small = tuple(dataclasses.replace(cait, channels=channels[cait.name]) for cait in backbones.MCAIT)
    monkeypatch.setattr(backbones, "MCAIT", small)


@pytest.mark.usefixtures("small_cait")
def test_transformers_give_the_stock_features_and_come_when_needed() -> None:
    weights = resolve("random", backbone="mcait", announce=None)
    detector = UflowModel((448, 448), weights, FlowOptions(), flow_steps=1)
    assert not any("extractor" in key for key in detector.state_dict()), "no backbone before it is needed"
    images = pictures(2, (448, 448))
    own = detector.features(images)
    assert [tuple(level.shape) for level in own] == [(2, 16, 28, 28), (2, 8, 14, 14)]

    stock = CaitFeatureExtractor()
    stock.load_state_dict(detector.feature_extractor.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(own, stock(images), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
    # The normalisation at their end is frozen in anomalib, so these are what may be cached.
    assert not any(parameter.requires_grad for parameter in detector.feature_extractor.parameters())
    assert not any(parameter.requires_grad for parameter in stock.parameters())

    latents = detector.latents(own)
    z, log_det = detector.flow(own)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(latents.z, z, strict=True))
    assert torch.allclose(latents.log_abs_det().float(), log_det, rtol=1e-4)
    with pytest.raises(ValueError, match="mcait takes 448 x 448 alone"):
        UflowModel((256, 256), weights, FlowOptions())


@pytest.mark.usefixtures("small_cait")
def test_checkpoint_brings_the_transformers(tmp_path: Path) -> None:
    detector = Uflow(flow_steps=1, backbone_weights="random")
    assert detector.input_size == (448, 448)
    disturb(detector)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(detector)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Uflow.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.weights.source == "checkpoint"
    images = pictures(1, (448, 448))
    with torch.no_grad():
        before, after = (network.model.eval()(images).anomaly_map for network in (detector, loaded))
    assert torch.equal(before, after)


# --- Lightning --------------------------------------------------------------------------------------------------------


def test_checkpoint_brings_choice_and_backbone(tmp_path: Path, images: Tensor) -> None:
    detector = Uflow(
        "resnet18",
        flow_steps=1,
        coupling="gin",
        diagonal="learned",
        loss="mle",
        lr_schedule="step",
        backbone_weights="random",
        input_size=(SIZE, SIZE),
    )
    disturb(detector)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(detector)
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    loaded = Uflow.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.model.options == FlowOptions(coupling="gin", diagonal="learned")
    assert (loaded.model.loss_kind, loaded.model.lr_schedule) == ("mle", "step")
    assert loaded.input_size == (SIZE, SIZE)
    assert loaded.weights.sha256 == detector.weights.sha256
    with torch.no_grad():
        before, after = (network.model.eval()(images).anomaly_map for network in (detector, loaded))
    assert torch.equal(before, after)


def test_runs_in_anomalibs_engine_as_on_the_fast_path(tmp_path: Path) -> None:
    data = weave(64)  # one step, so that the order of the images does not matter
    detector = Uflow(
        "resnet18",
        flow_steps=1,
        loss="mle",
        backbone_weights="random",
        input_size=(SIZE, SIZE),
        visualizer=False,
        post_processor=PostProcessor(enable_normalization=False),
    )
    start = copy.deepcopy(detector.model)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(detector, data)
    reported = engine.test(detector, data)[0]
    assert 0 <= reported["image_AUROC"] <= 1
    assert 0 <= reported["pixel_AUROC"] <= 1

    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        prepared = detector.pre_processor.transform(batch.image)
        cached = Features(tuple(start.features(prepared)))
    detection.fit(start, cached, epochs=1, batch_size=64, progress=False)
    for key, value in detector.model.state_dict().items():
        assert torch.allclose(start.state_dict()[key], value, atol=1e-5), key
