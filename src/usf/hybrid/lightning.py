"""The hybrid as an anomalib model: trained by an ``Engine``, with anomalib's data, metrics and checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Resize

from usf.detectors.lightning import BringsBackbone
from usf.hybrid.scores import Score
from usf.hybrid.vae import FlowVAE, Settings

__all__ = ["HybridDetector"]


class _Scored(FlowVAE):
    """A :class:`FlowVAE` whose call is what anomalib expects: images to scores and maps."""

    score: Score = "sum"

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (N, 3, size, size) in [0, 1] -> the chosen score (N, 1) and a map (N, 1, size, size).

        The map is the squared error of each pixel in units of 2 sigma^2, averaged over the channels, at the mean of the
        posterior. It explains the reconstruction alone: the latent terms have no place in the image.
        """
        mean, _ = self.posterior(images)
        error = (images - self.decode(mean)).square() / (2 * self.settings.sigma**2)
        if self.score == "norm":
            values = self.prior.score(mean)
        else:
            values = torch.zeros(len(images), device=images.device)
            if self.score in ("reconstruction", "sum"):
                values = values - self.log_likelihood(images, mean)
            if self.score in ("log_prob", "sum"):
                values = values - self.prior.log_prob(mean)
        return InferenceBatch(pred_score=values[:, None], anomaly_map=error.mean(dim=1, keepdim=True))


class HybridDetector(BringsBackbone):
    """VAE with a flow prior as an anomalib model (paper, section 4.4).

    Every setting is a hyper-parameter of the checkpoint, which also brings the backbone, so that loading one needs no
    weight file. Images are resized to ``size`` and given to the model in [0, 1]; it standardises them for the backbone
    itself, since the decoder's likelihood is about pixels.

    Args:
        score: ``"reconstruction"``, ``"norm"``, ``"log_prob"`` or ``"sum"``, the paper's; see
            :class:`usf.hybrid.Scores`. Scores that need held-out normal images are :func:`usf.hybrid.calibrated`.
        lr, weight_decay: of Adam (paper's code: 1e-5 for 200 000 epochs at most; the default here fits a short run).
        backbone_weights: see :func:`usf.detectors.backbones.resolve`.
        pre_processor, post_processor, evaluator, visualizer: as in anomalib.
        settings: of the model, see :class:`usf.hybrid.Settings`.

    Raises:
        ValueError: an unknown setting or score, or a pre-processor of another size.
        FileNotFoundError: a weight file that does not exist.
    """

    model: _Scored

    def __init__(
        self,
        score: Score = "sum",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        backbone_weights: str | Path | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        **settings: Any,
    ) -> None:
        if unknown := set(settings) - {field.name for field in dataclasses.fields(Settings)}:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}: see usf.hybrid.Settings")
        if score not in get_args(Score):
            raise ValueError(f"score={score!r}: choose one of {', '.join(map(repr, get_args(Score)))}")
        options = Settings(**settings)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((options.size, options.size))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if self.input_size is not None and tuple(self.input_size) != (options.size, options.size):
            raise ValueError(f"size={options.size}, but the pre-processor resizes to {tuple(self.input_size)}")
        # Listed, because Lightning cannot look into **settings.
        self.save_hyperparameters(
            {
                "score": score,
                "lr": lr,
                "weight_decay": weight_decay,
                "backbone_weights": None if backbone_weights is None else str(backbone_weights),
                # As lists: checkpoints are read without unpickling arbitrary classes.
                **{key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(options).items()},
            }
        )
        self.find_weights(options.backbone, backbone_weights, layers=options.needs)
        self.model = _Scored(options, self.weights)
        self.model.score = score
        self.lr, self.weight_decay = lr, weight_decay

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resizing alone, to ``image_size`` (128 x 128 by default): the model standardises by itself."""
        return PreProcessor(transform=Compose([Resize(image_size or (128, 128), antialias=True)]))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Metrics of images, the area computed on the scores as they are (no squashing of single batches)."""
        area = AUROC(fields=["pred_score", "gt_label"], prefix="image_", normalization=None)
        return Evaluator(test_metrics=[area, F1Score(fields=["pred_label", "gt_label"], prefix="image_")])

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, nats per image (0-dim)."""
        terms = self.model.terms(batch.image)
        loss = -terms.elbo.mean()
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(terms.z))
        return loss

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The batch with scores and maps."""
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on what is trained: without the backbone where that is frozen."""
        return torch.optim.Adam(self.model.trainable_parameters(), lr=self.lr, weight_decay=self.weight_decay)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No clipping, as in the paper's code, and no validation before the training."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Normal images alone."""
        return LearningType.ONE_CLASS

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which backbone the checkpoint was made with, for :meth:`usf.hybrid.FlowVAE.save` too."""
        super().on_load_checkpoint(checkpoint)
        self.model.weights = self.weights
