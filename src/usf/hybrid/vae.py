"""The model: an encoder on a pretrained backbone, a decoder of transposed convolutions, a flow as the prior."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from usf.detectors import backbones
from usf.detectors.backbones import Weights
from usf.files import atomic_write
from usf.flows import Flow, GaussianBase, NonUSFlow, USFlow
from usf.hybrid.scores import Scores

__all__ = ["PRIORS", "Encoder", "FlowVAE", "GaussianPrior", "Settings", "Terms", "decoder_depth"]

Prior = Literal["usf", "non-usf", "gaussian"]
PRIORS: tuple[Prior, ...] = get_args(Prior)
"""Laws that a latent can have under the model."""

_FORMAT = "usf-hybrid-1"
_BACKBONES = tuple(name for name in backbones.BACKBONES if "resnet" in name)
_MIN_SCALE = 1e-4
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the shape of a :class:`FlowVAE`. The defaults fit one CPU core.

    Attributes:
        size: height and width of the images, pixels; a multiple of 2 to the power of the decoder's depth.
        latent: dimension d of z (paper: 256).
        prior: ``"usf"``, ``"non-usf"`` or ``"gaussian"``, the fixed N(0, I).
        blocks, hidden: coupling blocks of the flow, and widths of their networks (paper: 10, [512, 256]).
        clamp, activation: of the affine couplings of ``"non-usf"`` (paper: 2, softplus).
        sigma: standard deviation of p(x | z) in each pixel and channel, images being in [0, 1] (paper: 0.1).
        backbone, stage: residual network, ``"resnet18"`` or ``"wide_resnet50_2"``, and the last of its four stages that
            is used (paper: the latter's fourth).
        pool: side of the grid to which that stage's map is averaged before the projection (paper: 1).
        trainable: whether the backbone learns too. Its batch normalisation keeps the stored statistics either way: they
            belong to the weights, and batches of this size give no better ones.
        width: channels of the decoder at full size; they double with each halving of the resolution.
        channels: the most that they may become.
        depth: transposed convolutions of the decoder, ``None`` to follow the compression (:func:`decoder_depth`).

    Raises:
        ValueError: a setting that makes no model, named.
    """

    size: int = 128
    latent: int = 64
    prior: Prior = "usf"
    blocks: int = 4
    hidden: tuple[int, ...] = (128, 128)
    clamp: float = 2.0
    activation: Literal["exp", "softplus"] = "softplus"
    sigma: float = 0.1
    backbone: str = "resnet18"
    stage: int = 3
    pool: int = 1
    trainable: bool = False
    width: int = 16
    channels: int = 256
    depth: int | None = None

    def __post_init__(self) -> None:
        # A list is what JSON gives back.
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.prior not in PRIORS:
            raise ValueError(f"prior={self.prior!r}: choose one of {', '.join(map(repr, PRIORS))}")
        if self.backbone not in _BACKBONES:
            raise ValueError(f"backbone={self.backbone!r}: choose one of {', '.join(map(repr, _BACKBONES))}")
        if not 1 <= self.stage <= 4:
            raise ValueError(f"stage={self.stage}: a residual network has stages 1 to 4")
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"sigma={self.sigma}: the likelihood needs a positive, finite standard deviation")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden}: a layer has at least one unit")
        least = {"size": 16, "latent": 1, "blocks": 1, "pool": 1, "width": 1, "channels": 1, "layers": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)}: at least {value} is needed")
        stride = 2 ** (self.stage + 1)
        if self.size % stride or self.pool > self.size // stride:
            raise ValueError(
                f"size={self.size}: a multiple of {stride} is needed, whose map of stage {self.stage} is no smaller "
                f"than pool={self.pool}"
            )
        if self.size % 2**self.layers:
            raise ValueError(
                f"size={self.size} cannot be halved {self.layers} times, which a decoder of that depth does backwards: "
                f"use a multiple of {2**self.layers}, or set depth"
            )

    @property
    def compression(self) -> float:
        """Numbers in an image for one number in z."""
        return 3 * self.size**2 / self.latent

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages that the backbone's weights must have, for :func:`usf.detectors.backbones.resolve`."""
        return backbones.ALL_LAYERS[: self.stage]

    @property
    def layers(self) -> int:
        """Transposed convolutions of the decoder."""
        return decoder_depth(self.compression) if self.depth is None else self.depth


def decoder_depth(compression: float) -> int:
    """Number of doublings of height and width that undo a compression: the logarithm to base 4, rounded, at least 1.

    >>> decoder_depth(3 * 1024**2 / 256), decoder_depth(3 * 128**2 / 64), decoder_depth(2.0)
    (7, 5, 1)
    """
    return max(1, round(math.log(compression, 4)))


@dataclasses.dataclass(frozen=True)
class Terms:
    r"""The three terms of the ELBO (paper, eq. 6), nats, (N,) each, all at the same sample z of the posterior.

    Attributes:
        reconstruction: ln p(x | z).
        posterior: ln q(z | x).
        prior: ln p_Z(z).
        z: (N, d).
    """

    reconstruction: Tensor
    posterior: Tensor
    prior: Tensor
    z: Tensor

    @property
    def elbo(self) -> Tensor:
        """ln p(x | z) - ln q(z | x) + ln p_Z(z): an unbiased estimate of the bound, (N,)."""
        return self.reconstruction - self.posterior + self.prior


class GaussianPrior(nn.Module):
    """The fixed prior N(0, I) of an ordinary VAE, with the methods of a :class:`usf.flows.Flow`."""

    is_uniformly_scaling = True

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.base = GaussianBase((dimension,))

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p_Z(z), nats, batch shape."""
        return self.base.log_prob(z)

    def latent(self, z: Tensor) -> Tensor:
        """z itself."""
        return z

    def inverse(self, u: Tensor) -> Tensor:
        """u itself."""
        return u

    def score(self, z: Tensor) -> Tensor:
        """||z||, batch shape."""
        return self.base.score(z)

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        """Zero, batch shape."""
        return z.new_zeros(z.shape[:-1])


def _prior(settings: Settings) -> Flow | GaussianPrior:
    if settings.prior == "gaussian":
        return GaussianPrior(settings.latent)
    flow: Flow
    if settings.prior == "usf":
        flow = USFlow((settings.latent,), settings.blocks, hidden=settings.hidden)
    else:
        flow = NonUSFlow(
            (settings.latent,),
            settings.blocks,
            hidden=settings.hidden,
            clamp=settings.clamp,
            activation=settings.activation,
        )
    # What a training that breaks produces is reported by the training, with its epoch.
    flow.validate_args = False
    return flow


class Encoder(nn.Module):
    """q(z | x): a backbone's features, averaged on a grid, then one linear projection to mean and scale.

    Args:
        settings: see :class:`Settings`.
        weights: of the backbone; a source ``"checkpoint"`` leaves it without any, to be loaded over.

    Raises:
        ValueError: weights of another backbone, or that lack a stage.
    """

    mean: Tensor
    std: Tensor
    trunk: Any
    projection: nn.Linear

    def __init__(self, settings: Settings, weights: Weights) -> None:
        super().__init__()
        if weights.backbone != settings.backbone:
            raise ValueError(f"these weights are for {weights.backbone}, not for {settings.backbone}")
        import timm

        self.settings = settings
        # What timm draws is written over; the caller's stream of random numbers is not to depend on it.
        with torch.random.fork_rng(devices=[]):
            self.trunk = timm.create_model(
                settings.backbone, pretrained=False, features_only=True, out_indices=(settings.stage,)
            )
        if weights.source != "checkpoint":
            self.trunk.load_state_dict(backbones.state_dict(weights, self.trunk.state_dict()))
        self.trunk.requires_grad_(settings.trainable)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        channels = int(self.trunk.feature_info.channels()[-1])
        self.projection = nn.Linear(channels * settings.pool**2, 2 * settings.latent)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As any module's, but batch normalisation stays with its stored statistics."""
        super().train(mode)
        self.trunk.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, size, size) in [0, 1] -> features (N, F); without a graph where the backbone is frozen."""
        with torch.set_grad_enabled(self.settings.trainable and torch.is_grad_enabled()):
            (stage,) = self.trunk((images - self.mean) / self.std)
            return F.adaptive_avg_pool2d(stage, self.settings.pool).flatten(1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, F) -> (mean, scale) of q(z | x), (N, d) each; the scale is positive."""
        mean, raw = self.projection(features).chunk(2, dim=-1)
        return mean, F.softplus(raw) + _MIN_SCALE


def _decoder(settings: Settings) -> nn.Sequential:
    """z (N, d) -> means of the pixels (N, 3, size, size) in (0, 1)."""
    depth = settings.layers
    widths = [min(settings.channels, settings.width * 2 ** (depth - 1 - level)) for level in range(depth)]
    start = settings.size // 2**depth
    layers: list[nn.Module] = [
        nn.Linear(settings.latent, widths[0] * start**2),
        nn.Unflatten(1, (widths[0], start, start)),
    ]
    for inside, outside in zip(widths, [*widths[1:], 3], strict=True):
        layers += [nn.SiLU(), nn.ConvTranspose2d(inside, outside, kernel_size=4, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.Sigmoid())


class FlowVAE(nn.Module):
    r"""A VAE with a learned prior, trained end to end on the ELBO (paper, section 4.4).

    .. math:: B \sim N(0, I), \quad Z = \phi^{-1}(B), \quad X \mid Z \sim N(\mathrm{dec}(Z), \sigma^2 I), \qquad
              q(z \mid x) = N(\mathrm{enc}^\mu(x), \mathrm{diag}(\mathrm{enc}^s(x))^2) .

    Seed torch before construction: the weights of projection, decoder and flow are drawn here.

    Args:
        settings: see :class:`Settings`.
        weights: of the backbone, see :func:`usf.detectors.backbones.resolve`.

    Raises:
        ValueError: weights that do not fit the settings.
    """

    encoder: Encoder
    prior: Flow | GaussianPrior

    def __init__(self, settings: Settings, weights: Weights) -> None:
        super().__init__()
        self.settings, self.weights = settings, weights
        self.encoder = Encoder(settings, weights)
        self.decoder = _decoder(settings)
        self.prior = _prior(settings)

    # --- the parts ---

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, size, size) in [0, 1] -> features of the backbone (N, F). Of a frozen one they never change,
        so that they can be computed once and passed to every other method.

        Raises:
            ValueError: images of another shape.
        """
        side = self.settings.size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images of shape (N, 3, {side}, {side}) are needed, got {tuple(images.shape)}")
        return self.encoder.features(images)

    def posterior(self, images: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean, scale) of q(z | x), (N, d) each."""
        mean, scale = self.encoder(self.features(images) if features is None else features)
        return mean, scale

    def decode(self, z: Tensor) -> Tensor:
        """Latent points (N, d) -> mean images (N, 3, size, size)."""
        images: Tensor = self.decoder(z)
        return images

    def log_likelihood(self, images: Tensor, z: Tensor) -> Tensor:
        """ln p(x | z), nats, (N,).

        Raises:
            ValueError: images that are not as many, or not of the size, as those decoded from z.
        """
        decoded = self.decode(z)
        # A broadcast would be a plausible number about other images.
        if images.shape != decoded.shape:
            raise ValueError(f"images of shape {tuple(images.shape)}, but z decodes to {tuple(decoded.shape)}")
        squared = (images - decoded).square().sum(dim=(1, 2, 3))
        sigma, size = self.settings.sigma, images[0].numel()
        return -0.5 * squared / sigma**2 - size * (math.log(sigma) + 0.5 * math.log(2 * math.pi))

    # --- training ---

    def terms(self, images: Tensor, features: Tensor | None = None, *, noise: Tensor | None = None) -> Terms:
        """The terms of the ELBO at one z = mean + scale * noise for all of them.

        Args:
            images: (N, 3, size, size) in [0, 1].
            features: of the same images, where they are known.
            noise: (N, d), standard normal; drawn from torch's stream by default.

        Raises:
            ValueError: images of another shape, or not as many as features.
        """
        mean, scale = self.posterior(images, features)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + scale * noise
        # At this z the standardised residual of q is the noise itself.
        posterior = (-0.5 * noise.square() - scale.log()).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return Terms(self.log_likelihood(images, z), posterior, self.prior.log_prob(z), z)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser needs to know."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # --- use ---

    @torch.inference_mode()
    def scores(self, images: Tensor, features: Tensor | None = None, *, batch_size: int = 32) -> Scores:
        """Scores with z at the mean of the posterior: no randomness, and every image on its own.

        Args:
            images: (N, 3, size, size) in [0, 1].
            features: of the same images, where they are known.
            batch_size: images at a time.

        Raises:
            ValueError: no images, images of another shape, or not as many as features.
            FloatingPointError: a score that is not finite; names the first image by its position.
        """
        if len(images) == 0 or (features is not None and len(features) != len(images)):
            given = "" if features is None else f" and {len(features)} of features"
            raise ValueError(f"{len(images)} images{given}: at least one image, with its features, is needed")
        self.eval()
        parts: list[list[Tensor]] = [[], [], []]
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            known = None if features is None else features[start : start + batch_size]
            mean, _ = self.posterior(chunk, known)
            values = (-self.log_likelihood(chunk, mean), self.prior.score(mean), -self.prior.log_prob(mean))
            for part, value in zip(parts, values, strict=True):
                part.append(value.double().cpu())
        columns = [torch.cat(part).numpy() for part in parts]
        broken = ~np.isfinite(np.stack(columns)).all(axis=0)
        if broken.any():
            raise FloatingPointError(
                f"the scores of {broken.sum()} images are not finite, the first at position {broken.argmax()} "
                f"(prior {self.settings.prior})"
            )
        return Scores(*columns)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Mean images (count, 3, size, size) decoded from draws of the prior."""
        self.eval()
        return self.decode(self.prior.inverse(self.prior.base.sample((count,))))

    # --- storage ---

    def save(self, path: str | Path) -> None:
        """Write weights (the backbone's included) and settings, as JSON, to one safetensors file, atomically.

        A hash of everything goes with it, against damage and careless edits; it is no signature.
        """
        tag = self.weights.tag or self.weights.describe()
        origin = {"backbone": self.weights.backbone, "tag": tag, "sha256": self.weights.sha256}
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        metadata = {
            "format": _FORMAT,
            "settings": json.dumps(dataclasses.asdict(self.settings), sort_keys=True),
            "weights": json.dumps(origin, sort_keys=True),
        }
        atomic_write(Path(path), to_bytes(state, {**metadata, "sha256": _digest(metadata, state)}))

    @classmethod
    def load(cls, path: str | Path) -> FlowVAE:
        """Rebuild a model from :meth:`save`'s file, in evaluation mode. Nothing in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file, it was changed, or its weights do not fit its settings.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no model at {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is no hybrid saved by usf (format {metadata.get('format')!r}, expected {_FORMAT!r})"
            )
        if metadata.pop("sha256", None) != _digest(metadata, state):
            raise ValueError(f"{path} is not what was saved: its hash differs; save the model again")
        try:
            settings, origin = Settings(**json.loads(metadata["settings"])), json.loads(metadata["weights"])
            model = cls(settings, Weights(source="checkpoint", **origin))
            model.to(state["encoder.projection.weight"].dtype)
            model.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: the weights do not fit the settings stored with them: {error}") from error
        return model.eval()


def _digest(metadata: dict[str, str], state: dict[str, Tensor]) -> str:
    """SHA-256 over names, values, types and shapes of everything in a file."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(state):
        total.update(f"{name}{state[name].dtype}{tuple(state[name].shape)}".encode())
        total.update(state[name].numpy().tobytes())
    return total.hexdigest()
