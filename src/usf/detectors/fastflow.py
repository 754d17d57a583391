"""FastFlow (Yu et al., 2021) with a chosen coupling, as an anomalib Lightning model.

Each stage of a frozen backbone gives a feature map; a layer normalisation and a two-dimensional flow of eight steps
with alternating 3x3 and 1x1 convolutions maps it to a latent map of the same shape (paper, section 5.1). The score of a
position is its mean squared latent, in the log domain; the score of an image is the largest of its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.image.fastflow import lightning_model, torch_model
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.detectors.coupling import Coupling, Diagonal, FlowOptions, Mixing, building_with
from usf.detectors.lightning import FlowDetector
from usf.detectors.model import DetectorModel, Latents, Loss, Score, check_choices

__all__ = ["Fastflow", "FastflowModel"]


class FastflowModel(torch_model.FastflowModel, DetectorModel):
    """anomalib's ``FastflowModel`` with a chosen block, known weights, and its parts callable one by one.

    Args:
        input_size: (height, width) of the images, in pixels, multiples of 16.
        weights: of the frozen backbone, see :func:`usf.detectors.backbones.resolve`.
        options: what the blocks are made of.
        flow_steps: steps per stage.
        conv3x3_only: 3x3 convolutions in every step, instead of alternating 3x3 and 1x1.
        hidden_ratio: hidden channels of the coupling networks over their input channels.
        loss: ``"anomalib"``: the negative log-likelihood of what the layer normalisation puts out, whose own trainable
            scale is not counted; ``"mle"``: that scale is counted as the linear layer that it is.
        score: see :meth:`DetectorModel.maps <usf.detectors.model.DetectorModel.maps>`.

    Raises:
        ValueError: an input size that is not a multiple of 16, or an unknown loss or score.
    """

    label = "FastFlow"
    loss_is_nll = True  # of what the flow models, whichever part of the layer normalisation that is

    def __init__(
        self,
        input_size: tuple[int, int],
        weights: Weights,
        options: FlowOptions,
        flow_steps: int = 8,
        conv3x3_only: bool = False,
        hidden_ratio: float = 1.0,
        loss: Loss = "anomalib",
        score: Score = "norm",
    ) -> None:
        if any(side < 16 or side % 16 for side in input_size):
            raise ValueError(f"input size {input_size}: height and width must be multiples of 16 pixels")
        check_choices(loss, score)
        with building_with(torch_model, options):
            super().__init__(
                input_size=input_size,
                backbone=weights.backbone,
                pre_trained=False,
                flow_steps=flow_steps,
                conv3x3_only=conv3x3_only,
                hidden_ratio=hidden_ratio,
            )
        if weights.source != "checkpoint":
            backbones.load(self.feature_extractor, weights)
        self.norms.requires_grad_(options.train_layer_norm)
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.options = options
        self.loss_kind = loss
        self.score = score

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> frozen feature maps (N, C_i, H / s_i, W / s_i), without a graph."""
        self.feature_extractor.eval()
        with torch.no_grad():
            maps: list[Tensor] = self.feature_extractor(images)
        return maps

    def latents(self, features: Sequence[Tensor]) -> Latents:
        """Feature maps -> latent maps of the same shapes, and log-determinants by position."""
        hidden, log_dets = [], []
        for norm, flow, feature in zip(self.norms, self.fast_flow_blocks, features, strict=True):
            z = norm(feature)
            total = z.new_zeros(z.shape[0], *z.shape[2:])  # not len(z), which an exporter would fix
            if self.loss_kind == "mle":
                scale: Tensor = norm.weight  # type: ignore[assignment]
                total = total + scale.abs().log().sum(dim=0)
            for block in flow.module_list:  # type: ignore[union-attr]
                z, log_det = block.transform(z)
                total = total + log_det
            hidden.append(z)
            log_dets.append(total)
        return Latents(hidden, log_dets)

    def loss(self, features: Sequence[Tensor], images: int) -> Tensor:
        """||z||^2 / 2 - ln|det|, summed over stages and these images, divided by the ``images`` of the batch."""
        hidden, log_dets = self.latents(features)
        energy = torch.stack([0.5 * z.square().sum() for z in hidden]).sum()
        return (energy - torch.stack([log_det.sum() for log_det in log_dets]).sum()) / images

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with learning rate 1e-3 and weight decay 1e-5 (section 5.1)."""
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-3, weight_decay=1e-5)

    def stock_maps(self, latents: Latents) -> Tensor:
        """anomalib's map: the mean over stages of -exp(-mean z^2 / 2), which saturates at 0."""
        stock: Tensor = self.anomaly_map_generator(latents.z)
        return stock

    def forward(self, input_tensor: Tensor) -> tuple[list[Tensor], list[Tensor]] | InferenceBatch:
        """In training (latent maps, log-determinants (N,)), else the map (N, 1, H, W) and its maximum (N, 1)."""
        latents = self.latents(self.features(input_tensor))
        if self.training:
            return latents.z, [log_det.flatten(1).sum(dim=1) for log_det in latents.log_dets]
        maps = self.maps(latents)
        return InferenceBatch(pred_score=maps.amax(dim=(-2, -1)), anomaly_map=maps)


class Fastflow(FlowDetector, lightning_model.Fastflow):
    """anomalib's ``Fastflow`` as a uniformly scaling flow (the default), or with any other coupling.

    ``Fastflow(coupling="affine", mixing="permutation", score="anomalib")`` is the stock model: same loss, same maps,
    same random draws. Works in anomalib's ``Engine``; every choice is a hyper-parameter of the checkpoint, which also
    brings the backbone, so that loading one needs no weight file.

    anomalib's post-processor clips normalised scores to [0, 1] around its threshold before they are ranked, which can
    make ties. ``post_processor=PostProcessor(enable_normalization=False)`` gives areas on the scores as they are.

    Args:
        backbone, flow_steps, conv3x3_only, hidden_ratio: as in anomalib; the defaults are those of section 5.1.
        backbone_weights: a safetensors file, ``"hub"``, ``"random"``, or ``None`` for the stated order, see
            :func:`usf.detectors.backbones.resolve`. What was used is printed and kept in ``self.weights``.
        coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters: see
            :class:`usf.detectors.coupling.FlowOptions`.
        loss, score: see :class:`FastflowModel`.
        input_size: (height, width) to resize images to, in pixels; ``None`` for the size of ``pre_processor``, which is
            256 x 256 by default.
        pre_processor, post_processor, evaluator, visualizer: as in anomalib.

    Raises:
        ValueError: an unknown option, an input size that is missing or not the pre-processor's, or weights that do not
            fit.
        FileNotFoundError: a weight file that does not exist.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        flow_steps: int = 8,
        conv3x3_only: bool = False,
        hidden_ratio: float = 1.0,
        backbone_weights: str | Path | None = None,
        coupling: Coupling = "additive",
        mixing: Mixing = "lu",
        diagonal: Diagonal = "fixed",
        global_scale: bool = True,
        train_layer_norm: bool = True,
        match_parameters: bool = False,
        loss: Loss = "anomalib",
        score: Score = "norm",
        input_size: tuple[int, int] | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        size = self.begin(
            input_size=input_size,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.backbone = backbone
        self.flow_steps = flow_steps
        self.conv3x3_only = conv3x3_only
        self.hidden_ratio = hidden_ratio

        options = FlowOptions(coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters)
        self.record(
            options,
            backbone=backbone,
            backbone_weights=backbone_weights,
            flow_steps=flow_steps,
            conv3x3_only=conv3x3_only,
            hidden_ratio=hidden_ratio,
            loss=loss,
            score=score,
            input_size=size,
        )
        self.model = FastflowModel(
            input_size=size,
            weights=self.weights,
            options=options,
            flow_steps=flow_steps,
            conv3x3_only=conv3x3_only,
            hidden_ratio=hidden_ratio,
            loss=loss,
            score=score,
        )
        self.loss = FastflowLoss()
