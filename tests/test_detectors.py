"""FastFlow with a chosen coupling: the stock model to the last digit, constant determinants, the fast path."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="needs the detectors extra")

from anomalib.engine import Engine
from anomalib.models import Fastflow as StockFastflow
from anomalib.models.components.flow import AllInOneBlock
from anomalib.models.image.fastflow import torch_model
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from helpers import disturb, name, weave
from usf.detectors import Block, Fastflow, FastflowModel, FlowOptions, backbones, resolve
from usf.detectors.coupling import Mixing, building_with
from usf.detectors.model import Latents
from usf.study import detection, textures
from usf.study.features import Features, extract
from usf.study.images import load_masks, read

SIZE = 32
STOCK = FlowOptions(coupling="affine", mixing="permutation")
UNIFORM = [
    FlowOptions(coupling=coupling, mixing=mixing, diagonal=diagonal, global_scale=scale)
    for coupling in ("additive", "gin")
    for mixing, diagonal in (("permutation", "fixed"), ("lu", "fixed"), ("lu", "learned"))
    for scale in (True, False)
]
WEIGHTS = resolve("random", announce=None)


def model(options: FlowOptions, steps: int = 2, **kwargs: object) -> FastflowModel:
    built = detection.build("fastflow", SIZE, WEIGHTS, options, seed=0, flow_steps=steps)
    disturb(built)
    return built


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(images: Tensor) -> Features:
    return Features(tuple(model(STOCK).features(images)))


# --- the block --------------------------------------------------------------------------------------------------------


def block(options: FlowOptions, shape: tuple[int, ...]) -> Block:
    def subnet(channels_in: int, channels_out: int) -> nn.Module:
        hidden = 8
        layer = nn.Linear if len(shape) == 1 else lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        return nn.Sequential(layer(channels_in, hidden), nn.Tanh(), layer(hidden, channels_out))

    torch.manual_seed(1)
    built = Block([shape], options=options, subnet_constructor=subnet).double()
    disturb(built, 0.3)
    return built


@pytest.mark.parametrize("shape", [(5,), (4, 2, 3)])
@pytest.mark.parametrize("options", [STOCK, *UNIFORM], ids=name)
def test_block_inverts_and_its_log_determinant_is_that_of_its_jacobian(
    options: FlowOptions, shape: tuple[int, ...]
) -> None:
    layer = block(options, shape)
    x = torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (y,), ladj = layer((x,))
    assert ladj.shape == (6,)
    (back,), ladj_back = layer((y,), rev=True)
    assert (back - x).abs().max() < 1e-10
    assert (ladj + ladj_back).abs().max() < 1e-10
    for index in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer((v[None],))[0][0][0], x[index])
        exact = torch.linalg.slogdet(jacobian.reshape(x[index].numel(), -1)).logabsdet
        assert torch.allclose(ladj[index], exact, atol=1e-9)
    if options.is_uniformly_scaling:
        assert (ladj == ladj[0]).all()
        if not options.global_scale and options.diagonal == "fixed":
            assert (ladj == 0).all()
    else:
        assert ladj.std() > 1e-3


@pytest.mark.parametrize("options", [STOCK, *UNIFORM], ids=name)
def test_every_trainable_parameter_has_a_gradient(options: FlowOptions) -> None:
    layer = block(options, (4, 2, 3))
    (y,), ladj = layer((torch.randn(3, 4, 2, 3, dtype=torch.float64),))
    (y.square().sum() - ladj.sum()).backward()
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("mixing", ["permutation", "lu"])
def test_matched_networks_are_as_large_as_the_affine_ones(mixing: Mixing) -> None:
    def networks(options: FlowOptions) -> int:
        blocks = [module for module in model(options).modules() if isinstance(module, Block)]
        return sum(parameter.numel() for block in blocks for parameter in block.subnet.parameters())

    affine = networks(FlowOptions(coupling="affine", mixing=mixing))
    assert networks(FlowOptions(mixing=mixing)) < 0.8 * affine
    assert networks(FlowOptions(mixing=mixing, match_parameters=True)) == pytest.approx(affine, rel=0.01)


def test_likelihood_counts_the_scale_before_the_flow(features: Features) -> None:
    detectors = [
        FastflowModel((SIZE, SIZE), WEIGHTS, FlowOptions(coupling="affine"), flow_steps=2, loss=loss)
        for loss in ("anomalib", "mle")
    ]
    for detector in detectors:
        for norm in detector.norms:
            with torch.no_grad():
                norm.weight.mul_(10.0)
    detectors[1].load_state_dict(detectors[0].state_dict())
    first, second = (detector.latents(features.batch(slice(0, 2))) for detector in detectors)
    counted = features.dimension * math.log(10.0)
    assert (second.log_abs_det() - first.log_abs_det()).tolist() == pytest.approx([counted] * 2, rel=1e-5)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"coupling='afine': choose one of 'affine', 'additive', 'gin'"):
        FlowOptions(coupling="afine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mixing="):
        FlowOptions(mixing="qr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="diagonal="):
        FlowOptions(diagonal="free")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 16"):
        FastflowModel((100, 100), WEIGHTS, STOCK)
    with pytest.raises(ValueError, match="the pre-processor resizes to"):
        Fastflow(input_size=(64, 64), pre_processor=Fastflow.configure_pre_processor((SIZE, SIZE)))
    with pytest.raises(ValueError, match="score='max'"):
        FastflowModel((SIZE, SIZE), WEIGHTS, STOCK, score="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gin_block is not supported"):
        Block([(4,)], options=STOCK, subnet_constructor=nn.Linear, gin_block=True)


def test_the_seam_is_closed_again_and_open_in_one_thread_only() -> None:
    seen: list[type] = []

    def construct() -> None:
        made = torch_model.AllInOneBlock([(4,)], subnet_constructor=nn.Linear)
        seen.append(type(made))

    def inside() -> None:
        with building_with(torch_model, FlowOptions()):
            construct()
            other = threading.Thread(target=construct)
            other.start()
            other.join()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        inside()
    construct()
    assert seen == [Block, AllInOneBlock, AllInOneBlock]
    assert torch_model.AllInOneBlock is AllInOneBlock


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_and_own() -> tuple[StockFastflow, Fastflow]:
    resize = StockFastflow.configure_pre_processor((SIZE, SIZE))
    torch.manual_seed(4)
    stock = StockFastflow(pre_trained=False, pre_processor=resize)
    torch.manual_seed(4)
    own = Fastflow(
        coupling="affine", mixing="permutation", score="anomalib", backbone_weights="random", pre_processor=resize
    )
    stock.model.feature_extractor.load_state_dict(own.model.feature_extractor.state_dict())
    return stock, own


def test_affine_with_permutation_is_the_stock_model(
    stock_and_own: tuple[StockFastflow, Fastflow], images: Tensor
) -> None:
    stock, own = (copy.deepcopy(detector).model for detector in stock_and_own)
    loss = stock_and_own[0].loss
    states = stock.state_dict(), own.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "same seed, same initial weights"
    for _ in range(2):
        values = [loss(*network.train()(images)) for network in (stock, own)]
        assert torch.allclose(*values, rtol=1e-6)
        with torch.no_grad():
            maps = [network.eval()(images) for network in (stock, own)]
        assert (maps[0].anomaly_map - maps[1].anomaly_map).abs().max() < 1e-6
        assert (maps[0].pred_score - maps[1].pred_score).abs().max() < 1e-6
        disturb(stock)
        disturb(own)


def test_fast_path_trains_as_the_stock_model_does(
    stock_and_own: tuple[StockFastflow, Fastflow], images: Tensor
) -> None:
    stock, own = (copy.deepcopy(detector) for detector in stock_and_own)
    stock.train()
    optimiser = stock.configure_optimizers()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
    for part in (order[:2], order[2:4], order[4:]):
        optimiser.zero_grad()
        stock.loss(*stock.model(images[part])).backward()
        optimiser.step()
    cached = Features(tuple(own.model.features(images)))
    history = detection.fit(own.model, cached, epochs=1, batch_size=2, seed=9, progress=False)
    assert history.steps == 3
    for key, value in stock.model.state_dict().items():
        assert torch.allclose(own.model.state_dict()[key], value, atol=1e-5), key


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (112, 32)])
def test_any_size_in_steps_of_16_and_any_batch(size: tuple[int, int], count: int) -> None:
    """Trains, scores every pixel, and a uniformly scaling flow's log-determinant stays one number."""
    detector = FastflowModel(size, WEIGHTS, FlowOptions(diagonal="learned"), flow_steps=2)
    disturb(detector)
    maps = detector.features(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)))
    (loss,) = detector.gradients(maps)
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in detector.trainable_parameters())
    with torch.no_grad():
        latents = detector.latents(maps)
        assert detector.maps(latents).shape == (count, 1, *size)
    assert all(log_det.unique().numel() == 1 for log_det in latents.log_dets)


@pytest.mark.parametrize("options", [FlowOptions(), FlowOptions(coupling="gin", mixing="permutation")], ids=name)
def test_uniformly_scaling_detector_has_one_determinant(options: FlowOptions, features: Features) -> None:
    uniform = detection.evaluate(model(options), features)
    # GIN's terms cancel between positions, up to float32's rounding.
    assert uniform.log_det_std <= (0 if options.coupling == "additive" else 1e-7 * features.dimension)
    assert detection.evaluate(model(STOCK), features).log_det_std > 1
    assert (uniform.nll - uniform.energies).std() < 1e-6 * uniform.energies.std() + 1e-6


@pytest.mark.parametrize("score", ["norm", "log_prob", "anomalib"])
def test_score_does_not_depend_on_the_batch(score: str, features: Features) -> None:
    detector = model(FlowOptions())
    together = detection.evaluate(detector, features, score=score, batch_size=5)
    alone = detection.evaluate(detector, features, score=score, batch_size=1)
    turned = detection.evaluate(detector, Features(tuple(level.flip(0) for level in features.levels)), score=score)
    assert together.maps == pytest.approx(alone.maps, rel=1e-4, abs=1e-6)
    assert together.scores == pytest.approx(turned.scores[::-1], rel=1e-4, abs=1e-6)
    assert together.maps.shape == (5, SIZE, SIZE)
    assert together.scores == pytest.approx(together.maps.max(axis=(1, 2)))


def test_norm_score_keeps_the_order_where_anomalibs_saturates(features: Features) -> None:
    detector = model(FlowOptions())
    z = torch.ones(3, 1, 2, 2) * torch.tensor([30.0, 40.0, 50.0]).reshape(3, 1, 1, 1)
    latents = Latents([z] * 3, [torch.zeros(3, 2, 2)] * 3)
    assert detector.maps(latents, "norm").amax((1, 2, 3)).diff().min() > 0
    assert (detector.maps(latents, "anomalib") == 0).all()


def test_checkpoint_brings_choice_and_backbone(tmp_path: Path, images: Tensor) -> None:
    weights = tmp_path / "backbone.safetensors"
    save_file(backbones._random_state("resnet18", 3), weights)
    detector = Fastflow(
        flow_steps=2, coupling="gin", diagonal="learned", backbone_weights=weights, input_size=(SIZE, SIZE)
    )
    disturb(detector)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(detector)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    weights.unlink()  # the checkpoint stands alone

    loaded = Fastflow.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.model.options == FlowOptions(coupling="gin", diagonal="learned")
    assert loaded.input_size == (SIZE, SIZE)
    assert loaded.weights.sha256 == detector.weights.sha256
    with torch.no_grad():
        before, after = (network.model.eval()(images).anomaly_map for network in (detector, loaded))
    assert torch.equal(before, after)


def test_runs_in_anomalibs_engine_and_its_areas_are_the_exact_ones(tmp_path: Path) -> None:
    root = textures.ensure(small=True)
    data = weave(6)
    detector = Fastflow(
        flow_steps=1,
        backbone_weights="random",
        input_size=(SIZE, SIZE),
        visualizer=False,
        # Normalised scores are clipped to [0, 1] around the threshold, which makes ties.
        post_processor=PostProcessor(enable_normalization=False),
    )
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(detector, data)
    reported = engine.test(detector, data)[0]

    folder = read(root)
    features = extract(detector.model.feature_extractor, [sample.path for sample in folder.test], SIZE, progress=False)
    result = detection.evaluate(detector.model, features)
    assert reported["image_AUROC"] == pytest.approx(result.image_auroc(folder.labels), abs=1e-5)
    assert reported["pixel_AUROC"] == pytest.approx(result.pixel_auroc(load_masks(folder.test, SIZE)), abs=2e-3)


def test_layer_norm_and_global_scale_can_be_frozen() -> None:
    free = detection.build("fastflow", SIZE, WEIGHTS, FlowOptions(), seed=0, flow_steps=2)
    frozen = detection.build(
        "fastflow", SIZE, WEIGHTS, FlowOptions(train_layer_norm=False, global_scale=False), seed=0, flow_steps=2
    )
    assert all(p.requires_grad for p in free.norms.parameters())
    assert not any(p.requires_grad for p in frozen.norms.parameters())
    names = {key for key, p in frozen.named_parameters() if p.requires_grad}
    assert not any("global_scale" in key or "feature_extractor" in key or "w_perm" in key for key in names)
    assert any("global_offset" in key for key in names)


def test_importing_the_package_does_not_import_anomalib() -> None:
    code = (
        "import sys, usf, usf.detectors, usf.study.images; sys.exit('anomalib' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
