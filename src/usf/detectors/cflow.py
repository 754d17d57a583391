"""CFlow (Gudovskiy et al., 2022) with a chosen coupling, as an anomalib Lightning model.

Every position of every feature map of a frozen backbone gives one vector, a "fibre". One flow per map takes the fibres
one by one, conditioned on a sinusoidal code of their position (the paper's section 5.1 calls it learned; in anomalib it
is not). Training takes one optimiser step per 64 fibres, so thousands an epoch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.image.cflow import lightning_model, torch_model, utils
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torch.nn import functional as F

from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.detectors.coupling import Block, Coupling, Diagonal, FlowOptions, Mixing, building_with
from usf.detectors.export import Chain
from usf.detectors.fibres import Decoder, Joined, decode
from usf.detectors.folded import decode_maps
from usf.detectors.lightning import FlowDetector
from usf.detectors.model import DetectorModel, Latents, Loss, Score, check_choices

__all__ = ["Cflow", "CflowModel", "Precision"]

Precision = Literal["float32", "bfloat16"]

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""What a ResNet's maps can be taken from, in the order of the network."""

VECTORS = 2048
"""Fibres scored at a time."""


class CflowModel(torch_model.CflowModel, DetectorModel):
    """anomalib's ``CflowModel`` with a chosen block, known weights, and its parts callable one by one.

    Scores: ``"norm"`` and ``"log_prob"`` are the mean over the layers of each position's negative log-likelihood per
    channel, in the log domain (``"norm"`` leaves the determinant out). ``"anomalib"`` is the library's: the layers'
    likelihoods as fractions of the largest in the batch, added up, and taken from their largest sum in the batch, so
    that an image's score depends on the images beside it.

    Args:
        input_size: (height, width) of the images, in pixels.
        weights: of the frozen backbone, see :func:`usf.detectors.backbones.resolve`.
        options: what the blocks are made of. ``train_layer_norm`` is without effect, for CFlow has none.
        layers: of the backbone, of :data:`STAGES`, in the network's order.
        fiber_batch_size: fibres per optimiser step.
        coupling_blocks: blocks per layer.
        condition_vector: length of the position code, a multiple of 4.
        clamp_alpha: bound of the affine and GIN couplings' log-scales.
        permute_soft: rotations instead of hard permutations.
        lr: learning rate.
        loss: ``"anomalib"``: the mean of -log sigmoid(ln p / C) over the fibres of a step; ``"mle"``: of -ln p / C.
        score: see above and :meth:`DetectorModel.maps <usf.detectors.model.DetectorModel.maps>`.
        precision: ``"bfloat16"`` computes the coupling networks in it, and all else in float32.

    Raises:
        ValueError: an unknown layer, loss, score or precision; layers out of order; sizes that are not positive;
            weights that do not fit.
    """

    label = "CFlow"
    align_corners = True
    summable = False

    def __init__(
        self,
        input_size: tuple[int, int],
        weights: Weights,
        options: FlowOptions,
        layers: Sequence[str] = ("layer2", "layer3", "layer4"),
        fiber_batch_size: int = 64,
        coupling_blocks: int = 8,
        condition_vector: int = 128,
        clamp_alpha: float = 1.9,
        permute_soft: bool = False,
        lr: float = 1e-4,
        loss: Loss = "anomalib",
        score: Score = "log_prob",
        precision: Precision = "float32",
    ) -> None:
        check_choices(loss, score)
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r}: choose one of {', '.join(map(repr, get_args(Precision)))}")
        # anomalib drops a layer that it does not know, and mixes up layers that are not in order.
        if not layers or list(layers) != [stage for stage in STAGES if stage in layers]:
            raise ValueError(f"layers={list(layers)}: choose from {', '.join(STAGES)}, each once, in this order")
        if min(*input_size, fiber_batch_size, coupling_blocks) < 1:
            raise ValueError(
                f"input_size={tuple(input_size)}, fiber_batch_size={fiber_batch_size}, "
                f"coupling_blocks={coupling_blocks}: all must be at least 1"
            )
        with building_with(utils, options):
            super().__init__(
                backbone=weights.backbone,
                layers=list(layers),
                pre_trained=False,
                fiber_batch_size=fiber_batch_size,
                coupling_blocks=coupling_blocks,
                condition_vector=condition_vector,
                clamp_alpha=clamp_alpha,
                permute_soft=permute_soft,
            )
        if weights.source != "checkpoint":
            backbones.load(self.encoder.feature_extractor, weights)
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.options = options
        self.loss_kind = loss
        self.score = score
        self.lr = lr
        self.precision = precision
        self._joined: list[Joined] | None = None

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> frozen feature maps (N, C_i, H_i, W_i), without a graph."""
        self.encoder.eval()
        with torch.no_grad():
            maps = self.encoder(images)
        return [maps[layer] for layer in self.pool_layers]

    def conditions(self, height: int, width: int) -> Tensor:
        """The position code of a map's positions, (height * width, P), row by row."""
        code = utils.positional_encoding_2d(self.condition_vector, height, width)
        return code.flatten(1).t().contiguous().to(next(self.decoders.parameters()).device)

    def latents(self, features: Sequence[Tensor]) -> Latents:
        """Feature maps -> latent maps of the same shapes, and log-determinants by position."""
        hidden, log_dets = [], []
        with self._precision(features[0]):
            for decoder, maps in zip(self.decoders, features, strict=True):
                if isinstance(decoder, Chain):  # in an inference copy
                    z, log_det = decoder.transform(maps)
                    hidden.append(z)
                    log_dets.append(log_det)
                    continue
                blocks = list(decoder.module_list)  # type: ignore[arg-type]
                conditions = self.conditions(*maps.shape[2:])
                if torch.is_grad_enabled():
                    rows = maps.flatten(2).transpose(1, 2).flatten(0, 1)
                    z, log_det = decode(blocks, rows, conditions.repeat(len(maps), 1))
                    z = z.reshape(len(maps), -1, maps.shape[1]).transpose(1, 2).reshape(maps.shape)
                    log_det = log_det.reshape(len(maps), *maps.shape[2:])
                else:
                    z, log_det = decode_maps(blocks, maps, conditions, vectors=VECTORS)
                hidden.append(z)
                log_dets.append(log_det)
        return Latents(hidden, log_dets)

    def losses(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """One per ``fiber_batch_size`` fibres, layer by layer, the fibres of a layer in random order.

        The random draws and the steps are those of anomalib's training step where ``generator`` is None. As there, the
        last step of a layer takes the remainder as well. A layer with fewer fibres than one step takes, which anomalib
        refuses, takes one step. Only one layer's parameters have a gradient after each step: clear the others with
        ``zero_grad(set_to_none=True)``, or Adam's momentum moves them.

        Args:
            features: frozen feature maps.
            generator: of the order, on the device that it is drawn on.
        """
        for loss, _ in self.steps(features, generator):
            yield loss

    def steps(
        self, features: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """:meth:`losses`, each with the number of fibres that it is the mean of."""
        for blocks, parts in zip(self._decoders(), self._fibres(features, generator), strict=True):
            flow = Decoder(blocks)
            for fibres, conditions in parts:
                with torch.enable_grad(), self._precision(fibres):
                    z, log_det = flow(fibres, conditions)
                    log_prob = _log_prob(z.square().sum(dim=1), log_det, z.shape[1])
                    loss = -F.logsigmoid(log_prob) if self.loss_kind == "anomalib" else -log_prob
                    mean = loss.mean()
                yield mean, len(z)

    def _decoders(self) -> list[list[Block]]:
        """The blocks of each layer's flow."""
        return [list(decoder.module_list) for decoder in self.decoders]  # type: ignore[arg-type]

    def _fibres(
        self, features: Sequence[Tensor], generator: torch.Generator | None
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """For each layer its steps: fibres (n, C) in random order and their conditions (n, P)."""
        source = torch.device("cpu") if generator is None else generator.device

        def parts(maps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            channels, positions = maps.shape[1], maps.shape[2] * maps.shape[3]
            table = self.conditions(*maps.shape[2:])
            rows = maps.detach().permute(0, 2, 3, 1).reshape(-1, channels)
            order = torch.randperm(len(rows), generator=generator, device=source).to(rows.device)
            where = order % positions
            count = max(1, len(rows) // self.fiber_batch_size)
            for step in range(count):
                start = step * self.fiber_batch_size
                part = slice(start, start + self.fiber_batch_size if step < count - 1 else None)
                yield rows.index_select(0, order[part]), table.index_select(0, where[part])

        return map(parts, features)

    @contextlib.contextmanager
    def fitting(self) -> Iterator[torch.optim.Optimizer]:
        """:meth:`optimiser` on one tensor a layer; see :class:`usf.detectors.fibres.Joined`.

        The numbers are those of training without, up to rounding. Do not move the model inside the context.

        Raises:
            ValueError: a parameter of the flow that is not to be trained.
        """
        self._joined = []
        try:
            self._joined += map(Joined, self._decoders())
            yield torch.optim.Adam([joined.parameter for joined in self._joined], lr=self.lr, fused=True)
        finally:
            for joined in self._joined:
                joined.separate()
            self._joined = None

    def gradients(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """See :meth:`DetectorModel.gradients <usf.detectors.model.DetectorModel.gradients>`."""
        if self._joined is None:
            yield from super().gradients(features, generator)
            return

        for joined, parts in zip(self._joined, self._fibres(features, generator), strict=True):
            for fibres, conditions in parts:
                with self._precision(fibres):
                    yield joined.gradients_of(fibres, conditions, self._slopes)

    def _slopes(self, z: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of fibres z (C, n) with ln|det| (n,), and its gradients at both."""
        channels, count = z.shape
        log_prob = _log_prob(z.square().sum(dim=0), log_det, channels)
        if self.loss_kind == "anomalib":
            loss, slope = -F.logsigmoid(log_prob), torch.sigmoid(-log_prob) / (-channels * count)
        else:
            loss, slope = -log_prob, torch.full_like(log_prob, -1 / (channels * count))
        return loss.mean(), z * -slope, slope

    def _precision(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bfloat16":
            return torch.autocast(tensor.device.type, torch.bfloat16)
        return contextlib.nullcontext()  # the trainer's own autocast, where it has one, is heeded

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam without weight decay (section 5.1), learning rate 1e-4 by default.

        Fused: one pass over the parameters of a step instead of ten; the numbers are those of torch's default up to
        rounding.
        """
        return torch.optim.Adam(self.trainable_parameters(), lr=self.lr, fused=True)

    def stock_maps(self, latents: Latents) -> Tensor:
        """anomalib's map; it depends on all images of the batch, see the class."""
        distribution = [
            _log_prob(z.square().sum(dim=1), log_det, z.shape[1]).flatten()
            for z, log_det in zip(latents.z, latents.log_dets, strict=True)
        ]
        maps: Tensor = self.anomaly_map_generator(
            distribution=distribution,
            height=[z.shape[2] for z in latents.z],
            width=[z.shape[3] for z in latents.z],
            image_size=self.input_size,
        )
        return maps.unsqueeze(1)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (N, 3, H, W) -> the map (N, 1, H, W) and its maximum (N, 1), without a graph, as anomalib's model.

        Raises:
            ValueError: images of another size than ``input_size``.
        """
        if tuple(images.shape[-2:]) != self.input_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels, but CFlow was built for {self.input_size}")
        with torch.no_grad():
            maps = self.maps(self.latents(self.features(images)))
        return InferenceBatch(pred_score=maps.amax(dim=(-2, -1)), anomaly_map=maps)


def _log_prob(square_norm: Tensor, log_det: Tensor, channels: int) -> Tensor:
    """ln p / C of fibres, nats per channel."""
    return (log_det - 0.5 * square_norm - 0.5 * channels * math.log(2 * math.pi)) / channels


class Cflow(FlowDetector, lightning_model.Cflow):
    """anomalib's ``Cflow`` as a uniformly scaling flow (the default), or with any other coupling.

    ``Cflow(coupling="affine", mixing="permutation", score="anomalib")`` is the stock model: same loss, same maps, same
    random draws. Works in anomalib's ``Engine``; every choice is a hyper-parameter of the checkpoint, which also brings
    the backbone, so that loading one needs no weight file.

    Two things in which anomalib differs from section 5.1 stay as they are: the position code is fixed, not learned, and
    ``gradient_clip_val`` is reset to 0, whatever the trainer is given.

    Args:
        backbone, layers, fiber_batch_size, coupling_blocks, condition_vector, clamp_alpha, permute_soft, lr: as in
            anomalib; the defaults are those of section 5.1.
        backbone_weights: a safetensors file, ``"hub"``, ``"random"``, or ``None`` for the stated order, see
            :func:`usf.detectors.backbones.resolve`. What was used is printed and kept in ``self.weights``.
        coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters: see
            :class:`usf.detectors.coupling.FlowOptions`; CFlow has no layer normalisation to train.
        loss, score, precision: see :class:`CflowModel`.
        input_size: (height, width) to resize images to, in pixels; ``None`` for the size of ``pre_processor``, which is
            256 x 256 by default.
        pre_processor, post_processor, evaluator, visualizer: as in anomalib.

    Raises:
        ValueError: an unknown option, an input size that is missing or not the pre-processor's, or weights that do not
            fit.
        FileNotFoundError: a weight file that does not exist.
    """

    model: CflowModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3", "layer4"),
        fiber_batch_size: int = 64,
        coupling_blocks: int = 8,
        condition_vector: int = 128,
        clamp_alpha: float = 1.9,
        permute_soft: bool = False,
        lr: float = 1e-4,
        backbone_weights: str | Path | None = None,
        coupling: Coupling = "additive",
        mixing: Mixing = "lu",
        diagonal: Diagonal = "fixed",
        global_scale: bool = True,
        train_layer_norm: bool = True,
        match_parameters: bool = False,
        loss: Loss = "anomalib",
        score: Score = "log_prob",
        precision: Precision = "float32",
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
        self.automatic_optimization = False
        self.learning_rate = lr
        options = FlowOptions(coupling, mixing, diagonal, global_scale, train_layer_norm, match_parameters)
        own: dict[str, Any] = {
            "layers": list(layers),
            "fiber_batch_size": fiber_batch_size,
            "coupling_blocks": coupling_blocks,
            "condition_vector": condition_vector,
            "clamp_alpha": clamp_alpha,
            "permute_soft": permute_soft,
            "lr": lr,
            "loss": loss,
            "score": score,
            "precision": precision,
        }
        self.record(options, backbone=backbone, backbone_weights=backbone_weights, input_size=size, **own)
        self.model = CflowModel(input_size=size, weights=self.weights, options=options, **own)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """See :meth:`CflowModel.optimiser`."""
        return self.model.optimiser()

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """anomalib's: one optimiser step per block of fibres; logs the sum of the fibres' losses."""
        del args, kwargs
        optimiser = self.optimizers()
        images: Tensor = batch.image  # type: ignore[assignment]
        total = torch.zeros(1, dtype=torch.float64, device=images.device)
        for loss, fibres in self.model.steps(self.model.features(images)):
            optimiser.zero_grad(set_to_none=True)  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimiser.step()  # type: ignore[union-attr]
            total += loss.detach() * fibres
        self.log("train_loss", total.item(), on_epoch=True, prog_bar=True, logger=True)
        return {"loss": total}
