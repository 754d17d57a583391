"""Inference copies have the same maps, and exported files the same scores as the Engine."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("anomalib", reason="needs the detectors extra")

from anomalib.data import Folder, ImageBatch
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.models import Fastflow as StockFastflow

import helpers
from usf.detectors import Fastflow, FastflowModel, FlowOptions, Uflow, UflowModel, backbones, resolve
from usf.detectors.cflow import Cflow, CflowModel
from usf.detectors.coupling import Block
from usf.detectors.export import Chain, Resize, exportable, fused
from usf.detectors.model import DetectorModel

SIZE = 32
WEIGHTS = resolve("random", announce=None)
OPTIONS = [
    FlowOptions(),
    FlowOptions(diagonal="learned", global_scale=False),
    FlowOptions(mixing="permutation"),
    FlowOptions(match_parameters=True),
    FlowOptions(coupling="gin"),
    FlowOptions(coupling="affine", mixing="permutation"),
]


def disturb(network: nn.Module) -> None:
    """Away from the initial values, where many maps are trivial; batch norms too, whose statistics are buffers."""
    helpers.disturb(network, 0.02)
    generator = torch.Generator().manual_seed(6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var *= 1 + torch.rand(module.running_var.shape, generator=generator)


def build(kind: str, options: FlowOptions, **kwargs: Any) -> DetectorModel:
    torch.manual_seed(0)
    model: DetectorModel
    if kind == "fastflow":
        model = FastflowModel((SIZE, SIZE), WEIGHTS, options, flow_steps=4, **kwargs)
    elif kind == "uflow":
        model = UflowModel((SIZE, SIZE), WEIGHTS, options, flow_steps=3, **kwargs)
    else:
        layers = ("layer1", "layer2", "layer3")
        model = CflowModel((SIZE, SIZE), WEIGHTS, options, layers=layers, coupling_blocks=2, **kwargs)
    disturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# --- inference copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fastflow", "cflow", "uflow"])
@pytest.mark.parametrize("options", OPTIONS, ids=helpers.name)
def test_inference_copy_has_the_same_maps(
    kind: str, options: FlowOptions, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, options)
    before = copy.deepcopy(model.state_dict())
    copied = fused(model)
    with torch.no_grad():
        first, second = (network.latents(network.features(images)) for network in (model, copied))
        for score in ("norm", "log_prob"):
            expected = model.maps(first, score)  # type: ignore[arg-type]
            assert (copied.maps(second, score) - expected).abs().max() < 1e-5 * expected.abs().max(), score  # type: ignore[arg-type]
        for z, a, b in zip(first.z, first.log_dets, second.log_dets, strict=True):
            assert (a - b).abs().max() < 1e-6 * z.shape[1], "nats, of as many channels"
        whole = copied(images)
        assert torch.equal(whole.anomaly_map, copied.maps(second))
        # The other way of computing it, which exporters record.
        monkeypatch.setattr("usf.detectors.export._exporting", lambda: True)
        recorded = copied(images).anomaly_map
        assert (recorded - whole.anomaly_map).abs().max() < 1e-5 * recorded.abs().max()
    kinds = {type(module) for module in copied.modules()}
    assert Chain in kinds
    assert not kinds & {Block, nn.BatchNorm2d}, "nothing is left to permute or to normalise by constants"
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), (
        "the original is as it was"
    )


def test_inference_copy_leaves_its_input_and_batch_alone(images: Tensor) -> None:
    copied = fused(build("fastflow", FlowOptions()))
    with torch.no_grad():
        features = copied.features(images)
        kept = [feature.clone() for feature in features]
        together = copied.latents(features).z
        alone = [copied.latents([feature[:1] for feature in features]).z]
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))
    assert all(torch.allclose(a[:1], b, rtol=1e-4, atol=1e-5) for a, b in zip(together, alone[0], strict=True))


def test_pointwise_blocks_share_the_map_before_them() -> None:
    blocks: list[Block] = list(build("fastflow", FlowOptions()).fast_flow_blocks[0].module_list)  # type: ignore[index, union-attr]
    assert len(Chain(blocks).steps) == len(blocks) / 2
    assert len(Chain(blocks[:1]).steps) == 1
    affine: list[Block] = list(build("fastflow", FlowOptions(coupling="affine")).fast_flow_blocks[0].module_list)  # type: ignore[index, union-attr]
    assert len(Chain(affine).steps) == len(affine)


def test_position_code_is_a_table_whatever_the_batch_and_block_size(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = fused(build("cflow", FlowOptions()))
    with torch.no_grad():
        features = copied.features(images)
        whole = copied.latents(features)
        monkeypatch.setattr("usf.detectors.export.VECTORS", 24)  # a row of the largest map at a time
        small = copied.latents(features)
    for a, b in zip((*whole.z, *whole.log_dets), (*small.z, *small.log_dets), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_likelihood_of_the_layer_normalisation_is_kept(images: Tensor) -> None:
    model: Any = build("fastflow", FlowOptions(), loss="mle")
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.mul_(2)
    copied = fused(model)
    with torch.no_grad():
        first, second = (network.latents(network.features(images)).log_abs_det() for network in (model, copied))
    assert first.tolist() == pytest.approx(second.tolist(), rel=1e-5)
    assert (first > 1000).all(), "nats, 0.7 for each of 7168 features"


def test_batch_norms_of_bottlenecks_are_folded() -> None:
    network = backbones._network("wide_resnet50_2", ("layer1",))
    disturb(network)
    model = FastflowModel((SIZE, SIZE), WEIGHTS, FlowOptions(), flow_steps=1)
    model.feature_extractor = network.eval()
    image = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = network(image)[0]
        copied = fused(model)
        assert (copied.features(image)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())


def test_what_cannot_be_fused_is_refused() -> None:
    stock = StockFastflow(pre_trained=False).model
    with pytest.raises(TypeError, match=r"FastflowModel is not a detector of usf\.detectors"):
        fused(stock)  # type: ignore[type-var]
    odd = build("fastflow", FlowOptions())
    block: Any = odd.fast_flow_blocks[0].module_list[0]  # type: ignore[index, union-attr]
    block.subnet[1] = nn.Tanh()
    with pytest.raises(ValueError, match="two layers with a ReLU between"):
        fused(odd)
    conditional: Any = build("cflow", FlowOptions())
    with pytest.raises(ValueError, match="under conditions that are known"):
        Chain(list(conditional.decoders[0].module_list))
    with pytest.raises(ValueError, match="a code of the row beside a code of the column"):
        Chain(list(conditional.decoders[0].module_list), torch.randn(12, 128), (3, 4))


def test_position_code_is_small_in_a_file() -> None:
    plain, copied = build("cflow", FlowOptions()), fused(build("cflow", FlowOptions()))
    size = [sum(value.numel() for value in network.state_dict().values()) for network in (plain, copied)]
    assert size[1] < size[0], "the table of all positions is made anew"


# --- resizing ---------------------------------------------------------------------------------------------------------


@given(
    old=st.tuples(st.integers(2, 60), st.integers(2, 60)),
    new=st.tuples(st.integers(2, 40), st.integers(2, 40)),  # one pixel wide, torch's result depends on memory layout
)
def test_resize_is_torchvisions(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *old, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(images, size=new, mode="bilinear", antialias=True, align_corners=False)
    assert (Resize(new)(images) - expected).abs().max() < 1e-5


def test_anomalib_itself_exports_another_resizing_than_it_trains_with() -> None:
    """The reason for our own. Should this fail one day, :class:`Resize` can go."""
    theirs = StockFastflow.configure_pre_processor((SIZE, SIZE))
    images = torch.rand(1, 3, 200, 150)
    assert (theirs.transform(images) - theirs(images)).abs().max() > 0.1
    ours = exportable(Fastflow(backbone_weights="random", flow_steps=1, input_size=(SIZE, SIZE))).pre_processor
    assert (theirs.transform(images) - ours(images)).abs().max() < 1e-5  # type: ignore[operator]


# --- exported files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Folder:
    return helpers.weave(6, 3, kinds=("hole", "stain"))


def trained(detector: Any, data: Folder, folder: Path) -> tuple[Engine, dict[str, np.ndarray], np.ndarray]:
    """(engine, what it predicts, the images of 256 pixels that it predicts it for)."""
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False)
    engine.fit(detector, data)
    batches: Any = engine.predict(detector, datamodule=data)
    predicted = {
        "pred_score": torch.cat([batch.pred_score.flatten() for batch in batches]),
        "anomaly_map": torch.cat([batch.anomaly_map.flatten(1) for batch in batches]),
    }
    paths = [path for batch in batches for path in batch.image_path]
    images = torch.stack([torch.as_tensor(read_image(path, as_tensor=True)) for path in paths])
    return engine, {key: value.numpy() for key, value in predicted.items()}, images.numpy()


def run_onnx(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    runtime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: images})
    return dict(zip([output.name for output in session.get_outputs()], values, strict=True))


def run_openvino(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    openvino = pytest.importorskip("openvino", reason="needs the export extra")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled([images])
    return {output.any_name: result[output] for output in compiled.outputs}


def check(exported: dict[str, np.ndarray], predicted: dict[str, np.ndarray]) -> None:
    for key, expected in predicted.items():
        assert exported[key].reshape(expected.shape) == pytest.approx(expected, abs=5e-5), key
    assert np.ptp(predicted["pred_score"]) > 0.1, "a constant would pass"


def test_fastflow_exports_to_onnx_with_the_engines_scores(data: Folder, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    detector = Fastflow(backbone_weights="random", flow_steps=4, input_size=(SIZE, SIZE), visualizer=False)
    engine, predicted, images = trained(detector, data, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = engine.export(detector, "onnx", export_root=tmp_path)
    assert path is not None
    check(run_onnx(path, images), predicted)
    check(run_openvino(path, images), predicted)
    for part in (images[:1], images[:, :, :200, :150]):  # any batch size and any image size
        batch = ImageBatch(image=torch.from_numpy(part))
        assert detector.pre_processor is not None
        with torch.no_grad():
            raw = detector.eval().model(detector.pre_processor.transform(batch.image))  # type: ignore[operator, union-attr]
            expected = detector.post_processor(raw).pred_score.flatten().numpy()  # type: ignore[misc]
        assert run_onnx(path, part)["pred_score"].flatten() == pytest.approx(expected, abs=5e-5)
    graph = onnx.load(str(path), load_external_data=False).graph
    operations = Counter(node.op_type for node in graph.node)
    # 20 convolutions of the backbone; per stage two pairs: two 3x3 layers, the dense map, and a pointwise ReLU network.
    assert operations["Conv"] == 15 + 3 * 2 * 5
    assert not {"BatchNormalization", "Trilu", "Gemm", "GatherND", "ScatterND"} & set(operations)
    assert operations["Gather"] <= 2, "those of the image's size"


def test_cflow_exports_to_openvino_with_the_engines_scores(data: Folder, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the export extra")
    detector = Cflow(
        backbone="resnet18",
        layers=("layer1", "layer2"),
        coupling_blocks=2,
        fiber_batch_size=256,
        backbone_weights="random",
        input_size=(SIZE, SIZE),
        visualizer=False,
    )
    engine, predicted, images = trained(detector, data, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = engine.export(detector, "openvino", export_root=tmp_path)
    assert path is not None
    assert path.suffix == ".xml"
    check(run_openvino(path, images), predicted)


def test_uflow_exports_from_its_checkpoint(data: Folder, tmp_path: Path) -> None:
    detector = Uflow(
        backbone="resnet18", flow_steps=2, backbone_weights="random", input_size=(SIZE, SIZE), visualizer=False
    )
    engine, predicted, images = trained(detector, data, tmp_path)
    saved = tmp_path / "model.ckpt"
    engine.trainer.save_checkpoint(saved)
    untrained = Uflow(backbone="resnet18", backbone_weights="random", input_size=(SIZE, SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = engine.export(untrained, "onnx", export_root=tmp_path, ckpt_path=saved)
    assert path is not None
    check(run_onnx(path, images), predicted)
