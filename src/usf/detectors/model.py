"""What the three flow detectors have in common: frozen features, a flow on them, a loss, a map of scores.

A detector is trained and scored from its frozen features alone, so that these can be computed once and shared. Each of
FastFlow, CFlow and U-Flow says how features become latents and which losses one batch gives; scores are the same for
all three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from usf.detectors.coupling import FlowOptions

__all__ = ["DetectorModel", "Latents", "Loss", "Score"]

Loss = Literal["mle", "anomalib"]
Score = Literal["norm", "log_prob", "anomalib"]


PART_BYTES = 16 << 20
"""Of the largest feature map of the images that are trained on at a time on a processor."""


class Latents(NamedTuple):
    """What a flow makes of a batch of features.

    Attributes:
        z: latent maps, one per stage, (N, C_i, H_i, W_i).
        log_dets: the log-determinant by position, one per stage, (N, H_i, W_i), nats. Their sum over positions and
            stages is ln|det dz/dx| of an image's features.
    """

    z: list[Tensor]
    log_dets: list[Tensor]

    def energies(self) -> Tensor:
        """Half the squared norm of all latents of an image, (N,), nats, summed in float64."""
        return torch.stack([0.5 * z.double().square().flatten(1).sum(dim=1) for z in self.z]).sum(dim=0)

    def log_abs_det(self) -> Tensor:
        """ln|det dz/dx| of each image's features, (N,), nats, summed in float64."""
        return torch.stack([part.double().flatten(1).sum(dim=1) for part in self.log_dets]).sum(dim=0)


class DetectorModel(nn.Module):
    """The interface that ``usf.study`` trains and scores; a base class of the three torch models.

    Attributes:
        label: the detector's name, for progress bars and errors.
        options: what the flow's blocks are made of.
        loss_kind: ``"anomalib"`` (the library's own training loss) or ``"mle"`` (the negative log-likelihood).
        score: how latents become a map, see :meth:`maps`.
        input_size: (height, width) of the images, pixels.
        loss_is_nll: whether :meth:`losses` are the mean over images of the negative log-likelihood, in nats and
            without the base density's constant.
        align_corners: of the bilinear interpolation to the input size, as in anomalib's model of the same name.
        summable: whether a batch has one loss, a sum over its images, see :meth:`loss`.
    """

    label: str
    options: FlowOptions
    loss_kind: Loss
    score: Score
    input_size: tuple[int, int]
    loss_is_nll = False
    align_corners = False
    summable = True

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> frozen feature maps (N, C_i, H_i, W_i), without a graph.

        Everything that is trained comes after; a cache holds exactly these.
        """
        raise NotImplementedError

    def latents(self, features: Sequence[Tensor]) -> Latents:
        """Frozen feature maps -> latent maps and log-determinants."""
        raise NotImplementedError

    def loss(self, features: Sequence[Tensor], images: int) -> Tensor:
        """What some images add to the loss, 0-dim, of a batch of ``images``; where a batch has one loss.

        Args:
            features: frozen feature maps of the whole batch, or of a part of it.
            images: of the batch.
        """
        raise NotImplementedError

    def losses(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """The 0-dim losses of one batch, one per optimiser step: the caller steps between two of them.

        Args:
            features: frozen feature maps.
            generator: of random draws, where the detector shuffles within a batch; torch's own stream by default.
        """
        del generator
        yield self.loss(features, len(features[0]))

    def parts(self, features: Sequence[Tensor]) -> list[slice]:
        """The images of a batch that :meth:`gradients` takes at a time: all, or on a processor a few.

        There the intermediate results of a few stay in the caches, the allocator keeps their memory, and the peak is
        theirs.
        """
        count = size = len(features[0])
        if self.summable and features[0].device.type == "cpu":
            largest = max(level[0].numel() * level.element_size() for level in features)
            size = max(1, PART_BYTES // largest)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def gradients(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """:meth:`losses`, detached, with their gradients added to the parameters': clear these after every step.

        A loss that is a sum over images is summed over :meth:`parts`, up to rounding the same.
        """
        if len(parts := self.parts(features)) == 1:
            for loss in self.losses(features, generator):
                loss.backward()
                yield loss.detach()
            return
        total = features[0].new_zeros(())
        for part in parts:
            share = self.loss([level[part] for level in features], len(features[0]))
            share.backward()
            total += share.detach()
        yield total

    def optimiser(self) -> torch.optim.Optimizer:
        """The optimiser of section 5.1 and of anomalib, over :meth:`trainable_parameters`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def fitting(self) -> Iterator[torch.optim.Optimizer]:
        """:meth:`optimiser`, for :meth:`gradients` inside the context; a detector may keep its parameters otherwise."""
        yield self.optimiser()

    def epoch_schedule(self, optimiser: torch.optim.Optimizer) -> LRScheduler | None:
        """What the caller steps after every epoch; ``None`` where the learning rate does not change with epochs."""
        del optimiser
        return None

    def stock_maps(self, latents: Latents) -> Tensor:
        """anomalib's anomaly map of the same latents, (N, 1, H, W)."""
        raise NotImplementedError

    def maps(self, latents: Latents, score: Score | None = None) -> Tensor:
        """Latents -> anomaly map (N, 1, H, W) at the input size, higher is more anomalous.

        * ``norm``: mean over channels of z^2 / 2, at every position of a stage;
        * ``log_prob``: the same minus the position's log-determinant per channel: the negative log-likelihood per
          channel, without the constant of the base density;
        * ``anomalib``: the library's own map, which squashes and, in CFlow, depends on the batch.

        The first two are resized to the input, averaged over the stages, and depend on one image alone. For a uniformly
        scaling flow of additive couplings they differ by a constant.

        Raises:
            ValueError: an unknown score.
        """
        score = score or self.score
        if score not in get_args(Score):
            raise ValueError(f"score={score!r}: choose one of {', '.join(map(repr, get_args(Score)))}")
        if score == "anomalib":
            return self.stock_maps(latents)
        levels = []
        for z, log_det in zip(latents.z, latents.log_dets, strict=True):
            level = 0.5 * z.square().mean(dim=1)
            if score == "log_prob":
                level = level - log_det / z.shape[1]
            levels.append(
                F.interpolate(level[:, None], size=self.input_size, mode="bilinear", align_corners=self.align_corners)
            )
        return torch.stack(levels).mean(dim=0)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser needs to know."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def check_choices(loss: Loss, score: Score) -> None:
    """Raise a :exc:`ValueError` that names the option for a loss or score that does not exist."""
    for name, value, allowed in (("loss", loss, Loss), ("score", score, Score)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, get_args(allowed)))}")
