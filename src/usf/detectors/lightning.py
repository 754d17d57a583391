"""What the Lightning models share: components, recorded choices, checkpoints with their backbone, metrics, and an end
to training where its numbers break."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.detectors.coupling import FlowOptions
from usf.detectors.model import DetectorModel

__all__ = ["BringsBackbone", "FlowDetector"]


CHECK_EVERY = 64
"""Batches after which training losses are looked at: each look waits for the device."""


class BringsBackbone(AnomalibModule):
    """An anomalib model whose checkpoint holds its backbone, so that loading one needs no weight file.

    A constructor records its argument ``backbone_weights`` as a hyper-parameter and calls :meth:`find_weights` with it.

    Attributes:
        weights: of the backbone; ``source="checkpoint"`` where a checkpoint brings them.
    """

    weights: Weights

    def find_weights(self, backbone: str, backbone_weights: str | Path | None, **layers: Any) -> None:
        """Set ``weights``.

        Args:
            backbone: timm architecture.
            backbone_weights: see :func:`usf.detectors.backbones.resolve`; ``"checkpoint"`` where one brings them.
            layers: ``layers=`` of the same function, where they are not its default.

        Raises:
            ValueError, FileNotFoundError, ConnectionError: weights that do not exist or do not fit.
        """
        if backbone_weights == "checkpoint":
            self.weights = Weights(backbone, "checkpoint", "", "")
        else:
            self.weights = backbones.resolve(backbone_weights, backbone=backbone, **layers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as bringing its own backbone, and note which one it was."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["backbone_weights"] = "checkpoint"
        checkpoint["usf_backbone"] = {
            "tag": self.weights.tag or self.weights.describe(),
            "sha256": self.weights.sha256,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which backbone the checkpoint was made with."""
        super().on_load_checkpoint(checkpoint)
        known = checkpoint.get("usf_backbone")
        if known:
            self.weights = Weights(self.weights.backbone, "checkpoint", known["tag"], known["sha256"])


class FlowDetector(BringsBackbone):
    """Stands before anomalib's own class among the bases: ``class Fastflow(FlowDetector, lightning_model.Fastflow)``.

    A constructor calls :meth:`begin`, sets what anomalib's constructor sets, calls :meth:`record`, and builds
    ``self.model`` from ``self.weights``. anomalib's constructor is not called: it would build the stock network first.

    Training ends with a :exc:`FloatingPointError` when a loss is not finite, where anomalib goes on with weights that
    are no numbers any more: within :data:`CHECK_EVERY` batches, and before anything is validated or saved as the best.
    """

    model: DetectorModel

    def begin(
        self,
        *,
        input_size: tuple[int, int] | None,
        pre_processor: nn.Module | bool,
        post_processor: nn.Module | bool,
        evaluator: Evaluator | bool,
        visualizer: Visualizer | bool,
    ) -> tuple[int, int]:
        """Set up anomalib's components and return the (height, width) that images are resized to, in pixels.

        Args:
            input_size: asked for, or ``None`` for the size of ``pre_processor``.
            pre_processor, post_processor, evaluator, visualizer: as in anomalib.

        Raises:
            ValueError: an input size that is missing, or that is not the pre-processor's.
        """
        if pre_processor is True and input_size is not None:
            pre_processor = self.configure_pre_processor((int(input_size[0]), int(input_size[1])))
        AnomalibModule.__init__(
            self,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self._losses: list[tuple[int, int, Tensor]] = []
        name = type(self).__name__
        if self.input_size is None:
            raise ValueError(f"{name} needs the input size: give a pre-processor with a Resize, or pre_processor=True")
        size = (int(self.input_size[0]), int(self.input_size[1]))
        if input_size is not None and tuple(input_size) != size:
            raise ValueError(
                f"input_size={tuple(input_size)}, but the pre-processor resizes to {size}: give one of the two"
            )
        return size

    def record(
        self, options: FlowOptions, *, backbone: str, backbone_weights: str | Path | None, **settings: Any
    ) -> None:
        """Make every choice a hyper-parameter of the checkpoint, and find the backbone's weights.

        Args:
            options: the flow's blocks, recorded field by field.
            backbone: timm architecture.
            backbone_weights: see :func:`usf.detectors.backbones.resolve`; ``"checkpoint"`` where one brings them.
            settings: the constructor's other arguments, plain data.

        Raises:
            ValueError, FileNotFoundError, ConnectionError: weights that do not exist or do not fit.
        """
        # Listed, because Lightning finds them by itself only where constructors call each other through super().
        self.save_hyperparameters(
            {
                "backbone": backbone,
                # As text: checkpoints are read without unpickling arbitrary classes.
                "backbone_weights": None if backbone_weights is None else str(backbone_weights),
                **settings,
                **dataclasses.asdict(options),
            }
        )
        # Only CFlow has a choice of layers; the others' are the default of ``resolve``.
        layers = {"layers": settings["layers"]} if "layers" in settings else {}
        self.find_weights(backbone, backbone_weights, **layers)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of a batch, on its device, until a look at it is due.

        Raises:
            FloatingPointError: see :meth:`check_losses`.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append((self.current_epoch + 1, batch_idx + 1, loss.detach()))
        if len(self._losses) >= CHECK_EVERY:
            self.check_losses()

    def on_validation_start(self) -> None:
        """Weights that are no numbers are not scored: their areas would be those of a tie."""
        self.check_losses()
        super().on_validation_start()

    def on_train_epoch_end(self) -> None:
        """Where nothing is validated."""
        self.check_losses()
        super().on_train_epoch_end()

    def check_losses(self) -> None:
        """Look at the losses since the last look.

        Raises:
            FloatingPointError: one is not finite; names the detector, its coupling, and the epoch and batch (from 1).
        """
        waiting, self._losses = self._losses, []
        if not waiting:
            return
        values = torch.stack([loss.sum() for *_, loss in waiting]).tolist()
        for (epoch, number, _), value in zip(waiting, values, strict=True):
            if not math.isfinite(value):
                options = self.model.options
                raise FloatingPointError(
                    f"{self.model.label} (coupling {options.coupling}, mixing {options.mixing}): the loss is {value} "
                    f"at epoch {epoch}, batch {number}. Lower the learning rate, or look for images that are empty or "
                    "corrupt"
                )

    def to_onnx(  # type: ignore[override]  # anomalib's signature, not Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """anomalib's export, of a copy with the same scores in which the linear maps are multiplied out and images are
        resized as in training, see :func:`usf.detectors.export.exportable`. ``Engine.export`` to ONNX and OpenVINO uses
        it.

        Args:
            export_root, model_file_name, input_size, kwargs: anomalib's; without ``input_size`` any image size goes in.

        Raises:
            ImportError: without the ``export`` extra.
        """
        from usf.detectors.export import exportable

        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError("ONNX export needs the export extra: pip install 'usf[export]'") from error
        # The exporter's own default; anomalib asks for an older one, and every file would be converted back to it.
        kwargs.setdefault("opset_version", 18)
        copied = exportable(self)
        written: Path = AnomalibModule.to_onnx(copied, export_root, model_file_name, input_size, **kwargs)
        return written

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """anomalib's metrics, the areas computed on the scores as they are (no squashing of single batches)."""
        fields = {"image_": ("pred_score", "gt_label"), "pixel_": ("anomaly_map", "gt_mask")}
        labels = {"image_": ("pred_label", "gt_label"), "pixel_": ("pred_mask", "gt_mask")}

        def areas() -> list[AUROC]:
            return [AUROC(fields=names, prefix=prefix, normalization=None) for prefix, names in fields.items()]

        f1 = [F1Score(fields=names, prefix=prefix) for prefix, names in labels.items()]
        return Evaluator(val_metrics=areas(), test_metrics=[*areas(), *f1])
