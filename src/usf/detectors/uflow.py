"""U-Flow (Tailanian et al., 2024) with a chosen coupling, as an anomalib Lightning model.

The maps of a frozen backbone enter a U-shaped flow, the coarsest first: a stage of invertible steps, of whose channels
one half are latents of this scale, and the other half go up, each four channels becoming one at twice the resolution,
and join the next finer map. The score of a position is its mean squared latent, in the log domain; the score of an
image is the largest of its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from anomalib.models.image.uflow import lightning_model, torch_model
from anomalib.models.image.uflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.uflow.feature_extraction import LayerNormFeatureExtractor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from FrEIA.modules import Concat, IRevNetUpsampling, Split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from usf.detectors import backbones
from usf.detectors.backbones import LAYERS, MCait, Weights
from usf.detectors.coupling import Block, Coupling, Diagonal, FlowOptions, Mixing, building_with
from usf.detectors.export import Chain
from usf.detectors.lightning import FlowDetector
from usf.detectors.model import DetectorModel, Latents, Loss, Score, check_choices

__all__ = ["Schedule", "Uflow", "UflowModel"]

Schedule = Literal["epoch", "step"]


class _NormedResNet(LayerNormFeatureExtractor):
    """anomalib's extractor, a frozen ResNet and a trainable layer normalisation for each map, without its download."""

    def __init__(self, weights: Weights, input_size: tuple[int, int]) -> None:
        # Not super(): anomalib's constructor fetches weights by a name that does not pin them.
        TimmFeatureExtractor.__init__(self, weights.backbone, LAYERS, pre_trained=False)
        self.channels = self.feature_extractor.feature_info.channels()
        self.scale_factors = self.feature_extractor.feature_info.reduction()
        self.scales = range(len(self.scale_factors))
        height, width = input_size
        self.feature_normalizations = nn.ModuleList(
            nn.LayerNorm([channels, height // stride, width // stride])
            for channels, stride in zip(self.channels, self.scale_factors, strict=True)
        )
        if weights.source != "checkpoint":
            backbones.load(self.feature_extractor, weights)
        self.feature_extractor.requires_grad_(False)


class UflowModel(torch_model.UflowModel, DetectorModel):
    """anomalib's ``UflowModel`` with a chosen block, known weights, and its parts callable one by one.

    Args:
        input_size: (height, width) of the images, in pixels: multiples of 16, and 448 x 448 for ``mcait``.
        weights: of the frozen backbone, see :func:`usf.detectors.backbones.resolve`. A ResNet's draws of random
            numbers are as in anomalib, so that the same seed gives the same flow; ``mcait`` draws none, and is made
            when :meth:`features` first needs it.
        options: what the blocks are made of. ``train_layer_norm`` is about a ResNet's maps; those of ``mcait`` have a
            normalisation that belongs to the frozen backbone.
        flow_steps: steps per stage.
        affine_clamp: bound of the log-scale of an affine or GIN coupling.
        affine_subnet_channels_ratio: hidden channels of the coupling networks over their input channels.
        permute_soft: random rotations in place of permutations, from NumPy's global stream, as in anomalib.
        loss: ``"anomalib"``: half the squared norms summed over the batch, minus the *mean* over the batch of the
            log-determinants, whose weight is therefore one over the batch size; the scale of the layer normalisation
            is not counted. ``"mle"``: the negative log-likelihood, mean over images, with that scale counted as the
            linear layer that it is.
        score: see :meth:`DetectorModel.maps <usf.detectors.model.DetectorModel.maps>`.
        lr_schedule: how often the learning rate takes one of the 25 000 steps of its way from 1e-3 down to 4e-4.
            ``"epoch"`` is what anomalib does: after 100 epochs it has lost 0.24 per cent. ``"step"`` decays with every
            optimiser step, as section 5.1 says ("over 25,000 iterations").

    Raises:
        ValueError: an input size that the backbone does not allow, or an unknown loss, score or schedule.
    """

    label = "U-Flow"

    def __init__(
        self,
        input_size: tuple[int, int],
        weights: Weights,
        options: FlowOptions,
        flow_steps: int = 4,
        affine_clamp: float = 2.0,
        affine_subnet_channels_ratio: float = 1.0,
        permute_soft: bool = False,
        loss: Loss = "anomalib",
        score: Score = "norm",
        lr_schedule: Schedule = "epoch",
    ) -> None:
        height, width = (int(side) for side in input_size)
        if weights.backbone == "mcait":
            side = backbones.MCAIT[0].size
            if (height, width) != (side, side):
                raise ValueError(f"input size {(height, width)}: mcait takes {side} x {side} alone")
        elif any(side < 16 or side % 16 for side in (height, width)):
            raise ValueError(f"input size {(height, width)}: height and width must be multiples of 16 pixels")
        check_choices(loss, score)
        if lr_schedule not in get_args(Schedule):
            raise ValueError(f"lr_schedule={lr_schedule!r}: choose one of {', '.join(map(repr, get_args(Schedule)))}")
        # Not super(): anomalib's constructor takes the backbone by name and fetches it. The rest is what it does.
        nn.Module.__init__(self)
        self.input_size = (height, width)
        self.affine_clamp = affine_clamp
        self.affine_subnet_channels_ratio = affine_subnet_channels_ratio
        self.permute_soft = permute_soft
        self.feature_extractor: _NormedResNet | MCait
        if weights.backbone == "mcait":
            self.feature_extractor = MCait(weights)
        else:
            self.feature_extractor = _NormedResNet(weights, self.input_size)
            self.feature_extractor.feature_normalizations.requires_grad_(options.train_layer_norm)
        with building_with(torch_model, options):
            self.flow = self.build_flow(flow_steps)
        self.anomaly_map_generator = AnomalyMapGenerator(self.input_size)
        self.options = options
        self.loss_kind = loss
        self.loss_is_nll = loss == "mle"
        self.score = score
        self.lr_schedule = lr_schedule

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> frozen feature maps (N, C_i, H / s_i, W / s_i), without a graph.

        A ResNet's maps are taken before the layer normalisation, which is trained; ``mcait``'s after its own.
        """
        with torch.no_grad():
            if isinstance(self.feature_extractor, MCait):
                maps: list[Tensor] = self.feature_extractor(images)
            else:
                maps = list(self.feature_extractor.extract_features(images))
        return maps

    def latents(self, features: Sequence[Tensor]) -> Latents:
        """Frozen feature maps, fine to coarse -> latent maps in the same order, and log-determinants by position.

        At every position, a stage's log-determinant is shared equally among the channels that leave it, and each share
        goes where its channel goes: to this scale's latents, or up, where a share is spread over the four positions
        that its channel becomes a quarter of. So the sum over positions and scales is exactly the flow's
        log-determinant, and the log-determinant per channel, which ``log_prob`` subtracts, does not jump with the
        number of channels that a scale keeps.
        """
        waiting = []
        for index, feature in enumerate(features):
            log_det = feature.new_zeros(feature.shape[0], *feature.shape[2:])
            if isinstance(self.feature_extractor, _NormedResNet):
                norm = self.feature_extractor.feature_normalizations[index]
                feature = norm(feature)
                if self.loss_kind == "mle":
                    scale: Tensor = norm.weight  # type: ignore[assignment]
                    log_det = log_det + scale.abs().log().sum(dim=0)
            waiting.append((feature, log_det))
        hidden, log_dets = [], []
        z, log_det = waiting.pop()
        for module in self.flow.module_list:  # in order: the steps of a stage, then split, up, and join the next map
            if isinstance(module, (Block, Chain)):
                z, local = module.transform(z)
                log_det = log_det + local
            elif isinstance(module, Split):
                (up, kept), _ = module((z,))
                hidden.append(kept)
                log_dets.append(log_det * (kept.shape[1] / z.shape[1]))
                z, log_det = up, log_det * (up.shape[1] / z.shape[1])
            elif isinstance(module, IRevNetUpsampling):
                z = F.pixel_shuffle(z, 2)
                log_det = F.interpolate(log_det[:, None], scale_factor=2.0, mode="nearest")[:, 0] / 4
            elif isinstance(module, Concat):
                finer, own = waiting.pop()
                z, log_det = torch.cat((finer, z), dim=1), own + log_det
            else:
                raise TypeError(f"{type(module).__name__} in anomalib's U-Flow, where no such step is known")
        return Latents([z, *reversed(hidden)], [log_det, *reversed(log_dets)])

    def loss(self, features: Sequence[Tensor], images: int) -> Tensor:
        """What these images add, see ``loss`` above: ``"mle"`` is the mean over images of ||z||^2 / 2 - ln|det|."""
        hidden, log_dets = self.latents(features)
        energy = torch.stack([0.5 * z.square().sum() for z in hidden]).sum()
        log_det = torch.stack([part.sum() for part in log_dets]).sum()
        return (energy - log_det) / images if self.loss_kind == "mle" else energy - log_det / images

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam with learning rate 1e-3 and weight decay 1e-5 (section 5.1).

        With ``lr_schedule="step"`` it lowers its own learning rate; with ``"epoch"`` the caller steps
        :meth:`epoch_schedule`.
        """
        optimiser = torch.optim.Adam(self.trainable_parameters(), lr=1e-3, weight_decay=1e-5)
        if self.lr_schedule == "step":
            schedule = self.schedule(optimiser)
            optimiser.register_step_post_hook(lambda *_: schedule.step())
        return optimiser

    def epoch_schedule(self, optimiser: torch.optim.Optimizer) -> LinearLR | None:
        """:meth:`schedule` with ``lr_schedule="epoch"``, else ``None``."""
        return self.schedule(optimiser) if self.lr_schedule == "epoch" else None

    @staticmethod
    def schedule(optimiser: torch.optim.Optimizer) -> LinearLR:
        """From the learning rate to 0.4 times that in 25 000 steps (anomalib's numbers)."""
        return LinearLR(optimiser, start_factor=1.0, end_factor=0.4, total_iters=25_000)

    def stock_maps(self, latents: Latents) -> Tensor:
        """anomalib's map: one minus the mean over scales of exp(-mean z^2 / 2), which saturates at 1."""
        stock: Tensor = self.anomaly_map_generator(latents.z)
        return stock

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor] | InferenceBatch:  # type: ignore[override]
        """In training (latent maps, log-determinants (N,)), else the map (N, 1, H, W) and its maximum (N, 1)."""
        latents = self.latents(self.features(image))
        if self.training:
            return latents.z, torch.stack([part.flatten(1).sum(dim=1) for part in latents.log_dets]).sum(dim=0)
        maps = self.maps(latents)
        return InferenceBatch(pred_score=maps.amax(dim=(-2, -1)), anomaly_map=maps)


class Uflow(FlowDetector, lightning_model.Uflow):
    """anomalib's ``Uflow`` as a uniformly scaling flow (the default), or with any other coupling.

    ``Uflow(coupling="affine", mixing="permutation", score="anomalib")`` is the stock model: same loss, same maps, and
    with a ResNet the same random draws. Works in anomalib's ``Engine``; every choice is a hyper-parameter of the
    checkpoint, which also brings the backbone, so that loading one needs no weight file.

    anomalib's post-processor clips normalised scores to [0, 1] around its threshold before they are ranked, which can
    make ties. ``post_processor=PostProcessor(enable_normalization=False)`` gives areas on the scores as they are.

    Args:
        backbone: ``"mcait"`` (two CaiT transformers, 1.6 GB), ``"resnet18"`` or ``"wide_resnet50_2"``.
        flow_steps, affine_clamp, affine_subnet_channels_ratio, permute_soft: as in anomalib.
        backbone_weights: a safetensors file (for ``mcait`` a folder with two), ``"hub"``, ``"random"``, or ``None`` for
            the stated order, see :func:`usf.detectors.backbones.resolve`. What was used is printed and kept in
            ``self.weights``.
        coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters: see
            :class:`usf.detectors.coupling.FlowOptions`.
        loss, score, lr_schedule: see :class:`UflowModel`.
        input_size: (height, width) to resize images to, in pixels; ``None`` for the size of ``pre_processor``, which is
            448 x 448 by default. anomalib has that size alone; here a ResNet takes any multiples of 16.
        pre_processor, post_processor, evaluator, visualizer: as in anomalib.

    Raises:
        ValueError: an unknown option, an input size that is missing, not the pre-processor's or not the backbone's, or
            weights that do not fit.
        FileNotFoundError: a weight file that does not exist.
    """

    model: UflowModel

    def __init__(
        self,
        backbone: str = "mcait",
        flow_steps: int = 4,
        affine_clamp: float = 2.0,
        affine_subnet_channels_ratio: float = 1.0,
        permute_soft: bool = False,
        backbone_weights: str | Path | None = None,
        coupling: Coupling = "additive",
        mixing: Mixing = "lu",
        diagonal: Diagonal = "fixed",
        global_scale: bool = True,
        train_layer_norm: bool = True,
        match_parameters: bool = False,
        loss: Loss = "anomalib",
        score: Score = "norm",
        lr_schedule: Schedule = "epoch",
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
        self.affine_clamp = affine_clamp
        self.affine_subnet_channels_ratio = affine_subnet_channels_ratio
        self.permute_soft = permute_soft

        options = FlowOptions(coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters)
        self.record(
            options,
            backbone=backbone,
            backbone_weights=backbone_weights,
            flow_steps=flow_steps,
            affine_clamp=affine_clamp,
            affine_subnet_channels_ratio=affine_subnet_channels_ratio,
            permute_soft=permute_soft,
            loss=loss,
            score=score,
            lr_schedule=lr_schedule,
            input_size=size,
        )
        self.model = UflowModel(
            input_size=size,
            weights=self.weights,
            options=options,
            flow_steps=flow_steps,
            affine_clamp=affine_clamp,
            affine_subnet_channels_ratio=affine_subnet_channels_ratio,
            permute_soft=permute_soft,
            loss=loss,
            score=score,
            lr_schedule=lr_schedule,
        )
        if isinstance(self.model.feature_extractor, MCait):
            # A trainer moves and saves what is there; made later, the backbone would be on the wrong device.
            self.model.feature_extractor.materialise()

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resizing to ``image_size`` (448 x 448 by default, pixels) and ImageNet's normalisation."""
        return AnomalibModule.configure_pre_processor(image_size or (448, 448))

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Adam and its linear decay, see :class:`UflowModel`; the trainer steps the decay and saves where it is."""
        optimiser = torch.optim.Adam(self.model.trainable_parameters(), lr=1e-3, weight_decay=1e-5)
        schedule = {"scheduler": self.model.schedule(optimiser), "interval": self.model.lr_schedule}
        return {"optimizer": optimiser, "lr_scheduler": schedule}

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One batch: the model's own loss, logged under anomalib's name."""
        del args, kwargs  # of other detectors
        images: Tensor = batch.image  # type: ignore[assignment]  # optional in anomalib's type
        loss = next(self.model.losses(self.model.features(images)))
        self.log_dict({"loss": loss}, on_step=True, on_epoch=False, prog_bar=False, logger=True)
        return {"loss": loss}
