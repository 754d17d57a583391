"""Frozen backbones whose weights are known by name and hash.

Weights resolve in a stated order and the choice is never silent:

1. ``path``: a safetensors file, given by the caller or found under ``../shared``;
2. ``hub``: the pinned timm tag, with a pinned SHA-256, from the local hub cache or the network;
3. ``random``: seeded random weights, when the hub does not answer within three seconds.

:func:`resolve` decides, prints one line, and returns a :class:`Weights`; :func:`build` makes the network from it.

``mcait`` is two networks, U-Flow's pair of CaiT transformers (:class:`MCait`, 403 million parameters): its weights are
a folder with one file for each, or two tags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from usf import paths

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BACKBONES",
    "HUB_SECONDS",
    "LAYERS",
    "MCAIT",
    "PINNED",
    "Cait",
    "MCait",
    "Pinned",
    "Weights",
    "build",
    "digest",
    "resolve",
]

BACKBONES = ("resnet18", "wide_resnet50_2", "mcait")
"""What :func:`resolve` takes. The first two are timm's; the third is the pair :data:`MCAIT`."""

HUB_SECONDS = 2.5
"""How long the hub has to answer. Below three seconds with everything around it."""

ALL_LAYERS = ("layer1", "layer2", "layer3", "layer4")
LAYERS = ALL_LAYERS[:3]
"""The stages of a ResNet, at strides 4, 8 and 16, that FastFlow and U-Flow read in anomalib. CFlow reads 2 to 4."""


@dataclasses.dataclass(frozen=True)
class Cait:
    """One of the two networks of ``mcait``, and where its features are taken.

    Attributes:
        name: timm architecture; also the file's name, with ``.safetensors``, where weights are given as a folder.
        size: of the images that it takes, height and width, pixels.
        depth: blocks that are run; the ones after them are not needed.
        channels: of its features.
        stride: of its features in pixels of a 448 x 448 image.
    """

    name: str
    size: int
    depth: int
    channels: int
    stride: int


MCAIT = (Cait("cait_m48_448", 448, 41, 768, 16), Cait("cait_s24_224", 224, 21, 384, 32))
"""U-Flow's transformers, as anomalib runs them: the second one sees a smaller copy of the image."""


@dataclasses.dataclass(frozen=True)
class Pinned:
    """One file on the timm hub. The SHA-256 names exactly one content, whatever the revision.

    Attributes:
        tag: timm's name, with the training recipe.
        revision: git commit on the hub, or the branch ``main`` where no commit is known.
        sha256: of the file; another content is refused.
        filename: in the repository.
        licence: as the model card declares it.
    """

    tag: str
    revision: str
    sha256: str
    filename: str = "model.safetensors"
    licence: str = "Apache-2.0"

    @property
    def repository(self) -> str:
        """``owner/name`` on the hub."""
        return f"timm/{self.tag}"


PINNED: dict[str, Pinned] = {
    # torchvision's IMAGENET1K_V1; anomalib leaves the tag open, which today means a1_in1k.
    "resnet18": Pinned(
        tag="resnet18.tv_in1k",
        revision="bbd144b3e5565108aad885f145491d11bc6ce807",
        sha256="694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
        licence="BSD-3-Clause",
    ),
    # What anomalib's open "wide_resnet50_2" means today, so what its CFlow is trained on.
    "wide_resnet50_2": Pinned(
        tag="wide_resnet50_2.racm_in1k",
        revision="30f73aceaaa1911830a9795b83ab1908dba18719",
        sha256="03b71d65fb2c73bb0de079a1781009f27a782ec481d2f64ab3bde9b1cdec3000",
    ),
    # The only tags of these two.
    "cait_m48_448": Pinned(
        tag="cait_m48_448.fb_dist_in1k",
        revision="99963f53b552bec7fd33abe2d8d555c60c22f9f3",
        sha256="460cbe2667f0208bd39ea38f981e5d83b41bfec33ed8cefab3460ae65f4788ed",
    ),
    "cait_s24_224": Pinned(
        tag="cait_s24_224.fb_dist_in1k",
        revision="main",
        sha256="ec4c0b0e1851c9b1850709caf5cbbcb0ecf121efb4317eedd99ceb0e0e0f4ddb",
    ),
}
"""timm architecture -> the hub file that stands for "ImageNet-pretrained" in this project.

The hashes of ``wide_resnet50_2`` and of the CaiTs are as other public projects recorded them (that of the first by
several, independently; those of the CaiTs by one, at the file sizes that the architectures have); they were not
downloaded here. Should one be wrong, the file is refused by name; it is never used unchecked.
"""

SHARED: dict[str, tuple[str, str]] = {
    "resnet18": ("weights", "resnet18_imagenet_layers1to3.safetensors"),
}
"""Backbone -> where the weights of its :data:`LAYERS` lie under ``../shared``, where that exists."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights a backbone has, and why.

    Attributes:
        backbone: one of :data:`BACKBONES`, or the timm architecture of a part.
        source: ``"path"``, ``"hub"`` or ``"random"``; ``"checkpoint"`` where a Lightning checkpoint brings them.
        tag: file name, timm tag, or ``"seed N"``.
        sha256: of the file, or of the tensors for random weights (see :func:`digest`); with ``parts``, of their hashes.
        path: the file, or the folder with one for each part, where there is one.
        seed: of random weights.
        reason: why a later source in the order was used, else empty.
        layers: the stages of a ResNet that :func:`build` puts out.
        parts: of ``mcait``: the weights of its two networks.
    """

    backbone: str
    source: Literal["path", "hub", "random", "checkpoint"]
    tag: str
    sha256: str
    path: Path | None = None
    seed: int | None = None
    reason: str = ""
    layers: tuple[str, ...] = LAYERS
    parts: tuple[Weights, ...] = ()

    def describe(self) -> str:
        """One line for outputs, captions and records; no machine's path in it.

        >>> Weights("resnet18", "random", "seed 0", "ab" * 32, seed=0, reason="the hub did not answer").describe()
        'resnet18 with random weights (seed 0, sha256 abababababab; the hub did not answer)'
        """
        kind = {
            "path": f"weights from the {'files' if self.parts else 'file'} {self.tag}",
            "hub": f"timm's weights {self.tag}",
            "random": "random weights",
            "checkpoint": "weights from a checkpoint",
        }[self.source]
        details = [self.tag] if self.source == "random" else []
        if self.sha256:
            details.append(f"sha256 {self.sha256[:12]}")
        inner = ", ".join(details) + (f"; {self.reason}" if self.reason else "")
        return f"{self.backbone} with {kind}" + (f" ({inner})" if inner else "")

    @property
    def pretrained(self) -> bool:
        """Whether the features have seen ImageNet (or whatever the file holds), rather than nothing."""
        return self.source in ("path", "hub")


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values (float32, little endian) of a state dict, in sorted order."""
    total = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name}{tuple(values.shape)}".encode())
        total.update(values.numpy().astype("<f4", copy=False).tobytes())
    return total.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(
    weights: str | Path | Weights | None = None,
    *,
    backbone: str = "resnet18",
    layers: Sequence[str] = LAYERS,
    sha256: str | Sequence[str] | None = None,
    seed: int = 0,
    timeout: float = HUB_SECONDS,
    announce: Callable[[str], None] | None = print,
) -> Weights:
    """Decide which weights a backbone gets, and say so in one line.

    Args:
        weights: a safetensors file (for ``mcait`` a folder with ``cait_m48_448.safetensors`` and
            ``cait_s24_224.safetensors``); ``"hub"`` or ``"random"`` to insist on one of the two; ``None`` (or ``""``,
            which is what a command line can pass) for the stated order: the file under ``../shared``, the hub, random.
        backbone: one of :data:`BACKBONES`.
        layers: of a ResNet: the stages to put out, ``"layer1"`` to ``"layer4"`` in this order.
        sha256: expected hash of the file, of ``mcait`` one for each; the pinned one is always checked for the hub.
        seed: of random weights.
        timeout: seconds the hub has to answer.
        announce: receives the one line; ``None`` for silence (the caller then prints ``describe()`` itself).

    Raises:
        ValueError: unknown backbone or layers; a file whose hash is not the expected one.
        FileNotFoundError: a file that was asked for by name and does not exist.
        ConnectionError: ``weights="hub"`` and the hub cannot be reached.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
    stages = tuple(layers)
    if stages != tuple(layer for layer in ALL_LAYERS if layer in stages) or not stages:
        raise ValueError(f"layers={stages}: choose among {', '.join(ALL_LAYERS)}, in this order")
    if isinstance(weights, Weights):
        if weights.backbone != backbone:
            raise ValueError(f"these weights are for {weights.backbone}, not for {backbone}")
        chosen = weights
    elif backbone == "mcait":
        chosen = _resolve_pair(weights or None, sha256, seed, timeout)
    else:
        if not isinstance(sha256, str | None):
            raise ValueError(f"sha256: {backbone} has one file, so one hash")
        chosen = dataclasses.replace(_resolve(weights or None, backbone, stages, sha256, seed, timeout), layers=stages)
    if announce is not None:
        announce(f"Backbone: {chosen.describe()}")
    return chosen


def _resolve(
    weights: str | Path | None, backbone: str, layers: tuple[str, ...], sha256: str | None, seed: int, timeout: float
) -> Weights:
    if weights == "random":
        return _random(backbone, layers, seed, "asked for")
    if weights == "hub":
        found = _from_hub(backbone, timeout)
        if isinstance(found, str):
            raise ConnectionError(f"weights='hub': {found}; pass a safetensors file, or 'random'")
        return found
    if weights is not None:
        return _from_file(Path(weights), backbone, sha256)
    if backbone in SHARED and set(layers) <= set(LAYERS) and (beside := paths.shared(*SHARED[backbone])):
        return _from_file(beside, backbone, sha256)
    found = _from_hub(backbone, timeout)
    return found if isinstance(found, Weights) else _random(backbone, layers, seed, found)


def _resolve_pair(weights: str | Path | None, sha256: str | Sequence[str] | None, seed: int, timeout: float) -> Weights:
    """As :func:`_resolve`, of both networks of ``mcait`` from the same source."""
    names = [cait.name for cait in MCAIT]
    if isinstance(sha256, str) or (sha256 is not None and len(sha256) != len(names)):
        raise ValueError(f"sha256: mcait has two files, so a hash for each of {', '.join(names)}")
    if weights is None or weights in ("random", "hub"):
        parts, reason = ([], "asked for") if weights == "random" else _pair_from_hub(names, timeout)
        if not parts and weights == "hub":
            raise ConnectionError(
                f"weights='hub': {reason}; pass a folder with {' and '.join(names)}, each .safetensors, or 'random'"
            )
        parts = parts or [_random(name, (), seed, reason) for name in names]
    else:
        hashes: Sequence[str | None] = sha256 or [None] * len(names)
        folder = Path(weights).expanduser()
        parts = [
            _from_file(folder / f"{name}.safetensors", name, expected)
            for name, expected in zip(names, hashes, strict=True)
        ]
    first = parts[0]
    return Weights(
        "mcait",
        first.source,
        first.tag if first.source == "random" else " and ".join(part.tag for part in parts),
        hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest(),
        path=first.path.parent if first.source == "path" and first.path else None,
        seed=first.seed,
        reason=first.reason,
        parts=tuple(parts),
    )


def _pair_from_hub(names: Sequence[str], timeout: float) -> tuple[list[Weights], str]:
    """The pinned files, or none and one clause that says why."""
    parts: list[Weights] = []
    for name in names:
        found = _from_hub(name, timeout)
        if isinstance(found, str):
            return [], found
        parts.append(found)
    return parts, ""


def _from_file(path: Path, backbone: str, sha256: str | None) -> Weights:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone weights {path} do not exist: pass a safetensors file with timm's names for {backbone}, "
            "or 'hub', or 'random'"
        )
    actual = sha256_of(path)
    if sha256 is not None and actual != sha256:
        raise ValueError(
            f"backbone weights {path} have SHA-256 {actual}, expected {sha256}: the file is damaged or another one; "
            "fetch it again, or pass the hash of the file that you mean"
        )
    return Weights(backbone, "path", path.name, actual, path=path)


def _random(backbone: str, layers: tuple[str, ...], seed: int, reason: str) -> Weights:
    tensors = digest(_random_state(backbone, seed, layers))
    return Weights(backbone, "random", f"seed {seed}", tensors, seed=seed, reason=reason)


def _from_hub(backbone: str, timeout: float) -> Weights | str:
    """The pinned file from the hub cache or the network; or one clause that says why not."""
    if backbone not in PINNED:
        return f"no tag of {backbone} is pinned"
    pinned = PINNED[backbone]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import huggingface_hub
        from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(pinned.repository, pinned.filename, revision=pinned.revision)
    if not isinstance(cached, str):
        if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"HF_HUB_OFFLINE is set and {pinned.tag} is not in the hub cache"
        if failure := _unreachable(pinned, timeout):
            return failure
        try:
            cached = huggingface_hub.hf_hub_download(pinned.repository, pinned.filename, revision=pinned.revision)
        except Exception as error:  # every client library below the hub raises its own
            return f"the download of {pinned.tag} failed ({type(error).__name__})"
    actual = sha256_of(Path(cached))
    if actual != pinned.sha256:
        raise ValueError(
            f"{pinned.tag} from the hub has SHA-256 {actual}, expected {pinned.sha256}: refused. "
            f"Delete {cached} and try again, or pass weights of your own"
        )
    return Weights(backbone, "hub", pinned.tag, actual, path=Path(cached))


def _unreachable(pinned: Pinned, timeout: float) -> str:
    """Ask the hub for the file's metadata; an empty string when it answers in time, else one clause that says why.

    The question is put in a thread that is left behind at the deadline: a name server or a proxy that does not answer
    blocks for tens of seconds inside the system, where no timeout of the client reaches it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    answer: list[str] = []

    def ask() -> None:
        # The endpoint is given explicitly: hf_hub_url bound its default when the hub was imported.
        url = hf_hub_url(pinned.repository, pinned.filename, revision=pinned.revision, endpoint=constants.ENDPOINT)
        try:
            get_hf_file_metadata(url, timeout=timeout)
            answer.append("")
        except Exception as error:  # every client library below the hub raises its own
            answer.append(f"the hub cannot be reached ({type(error).__name__})")

    quiet = logging.getLogger("huggingface_hub")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        thread = threading.Thread(target=ask, name="usf-hub-probe", daemon=True)
        thread.start()
        thread.join(timeout)
    finally:
        quiet.setLevel(level)
    return answer[0] if answer else f"the hub did not answer within {timeout:g} s"


def _network(backbone: str, layers: tuple[str, ...] = LAYERS, **kwargs: Any) -> nn.Module:
    """timm's network without weights: a ResNet's maps at ``layers``, or a whole CaiT."""
    import timm

    if not _is_resnet(backbone):
        transformer: nn.Module = timm.create_model(backbone, pretrained=False, **kwargs)
        return transformer
    network: nn.Module = timm.create_model(
        backbone,
        pretrained=False,
        features_only=True,
        out_indices=[1 + ALL_LAYERS.index(layer) for layer in layers],
        **kwargs,
    )
    return network


def _is_resnet(backbone: str) -> bool:
    return "resnet" in backbone


def _random_state(backbone: str, seed: int, layers: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    """A state dict drawn from ``seed`` alone, the same tensors for any layers; torch's own stream is left as it was."""
    # timm silences every residual branch at the start of training; random features need them.
    loud: dict[str, Any] = {"zero_init_last": False} if _is_resnet(backbone) else {"init_values": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _network(backbone, layers, **loud).state_dict()


def state_dict(weights: Weights, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``weights``, reduced to the names in ``expected`` (a file may also hold later layers).

    Raises:
        ValueError: no safetensors file, a file that changed since it was resolved, or a tensor missing or of another
            shape; the file and the tensor are named.
    """
    if weights.source == "random":
        if weights.seed is None:
            raise ValueError("random weights need a seed")
        drawn = _random_state(weights.backbone, weights.seed, ALL_LAYERS)
        if missing := sorted(expected.keys() - drawn.keys()):
            raise ValueError(f"{weights.backbone} has no tensor {missing[0]}: weights of another architecture")
        return {name: drawn[name] for name in expected}
    if weights.path is None:
        raise ValueError(f"{weights.describe()}: no file to read")

    import safetensors
    from safetensors.torch import load_file

    if (actual := sha256_of(weights.path)) != weights.sha256:
        raise ValueError(f"{weights.path} changed while in use: SHA-256 {actual}, was {weights.sha256}")
    try:
        stored = load_file(weights.path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{weights.path} is not a safetensors file ({error}): convert it with safetensors.torch.save_file"
        ) from error
    # A counter that evaluation never reads; some exporters leave it out.
    missing = [name for name in expected if name not in stored and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"{weights.path} lacks {len(missing)} tensors of {weights.backbone}, the first is {missing[0]}: "
            f"timm's names are expected ({', '.join(list(expected)[:2])}, ...)"
        )
    for name, tensor in expected.items():
        if name in stored and stored[name].shape != tensor.shape:
            raise ValueError(
                f"{weights.path}: {name} has shape {tuple(stored[name].shape)}, {weights.backbone} needs "
                f"{tuple(tensor.shape)}: weights of another architecture"
            )
    return {name: stored.get(name, tensor) for name, tensor in expected.items()}


def load(network: nn.Module, weights: Weights) -> None:
    """Copy ``weights`` into a timm ``features_only`` network, freeze it and put it into evaluation mode.

    Raises:
        ValueError: see :func:`state_dict`.
    """
    network.load_state_dict(state_dict(weights, network.state_dict()))
    network.requires_grad_(False)
    network.eval()


def build(weights: Weights) -> nn.Module:
    """The frozen backbone: images (N, 3, H, W), normalised as ImageNet's -> a list of maps (N, C_i, H/s_i, W/s_i).

    A ResNet puts out ``weights.layers``, at strides s_i from 4 to 32; ``mcait`` see :class:`MCait`. Torch's random
    stream is left where it was.

    Raises:
        ValueError: see :func:`state_dict`.
    """
    if weights.backbone == "mcait":
        return MCait(weights).materialise()
    with torch.random.fork_rng(devices=[]):
        network = _network(weights.backbone, weights.layers)
    load(network, weights)
    return network


class MCait(nn.Module):
    """The frozen pair of :data:`MCAIT`, as in anomalib's U-Flow: images (N, 3, 448, 448) -> two maps.

    The first network sees the image, the second a bicubic copy of 224 pixels; the tokens after blocks 40 and 20 go
    through the network's own final layer normalisation, frozen like everything here, and are (N, 768, 28, 28) and
    (N, 384, 14, 14). Names in the state dict are anomalib's.

    1.6 GB of weights, so they are made when they are first needed, or by :meth:`materialise`: a flow that is trained on
    cached features never needs them.

    Args:
        weights: of ``mcait``. With the source ``"checkpoint"``, :meth:`materialise` makes networks without values, to
            be read from the checkpoint.

    Attributes:
        channels, scale_factors, scales: of the maps, named as in anomalib's extractors.
    """

    extractor1: nn.Module | None
    extractor2: nn.Module | None

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        if weights.backbone != "mcait":
            raise ValueError(f"these weights are for {weights.backbone}, not for mcait")
        self.weights = weights
        self.channels = [cait.channels for cait in MCAIT]
        self.scale_factors = [cait.stride for cait in MCAIT]
        self.scales = range(len(MCAIT))
        self.extractor1 = self.extractor2 = None

    def materialise(self, device: torch.device | str = "cpu") -> MCait:
        """Make the two networks, unless they exist, and return this module.

        Raises:
            ValueError: see :func:`state_dict`.
        """
        if self.extractor1 is None:
            parts = self.weights.parts or (None,) * len(MCAIT)
            self.extractor1, self.extractor2 = (
                _transformer(cait, part).to(device) for cait, part in zip(MCAIT, parts, strict=True)
            )
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, 448, 448) -> maps at strides 16 and 32."""
        self.materialise(images.device)
        size = MCAIT[0].size
        if images.shape[2:] != (size, size):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels: mcait takes {size} x {size} alone")
        maps = []
        for cait, network in zip(MCAIT, (self.extractor1, self.extractor2), strict=True):
            scaled = images
            if cait.size != size:
                scaled = F.interpolate(images, size=(cait.size, cait.size), mode="bicubic", align_corners=True)
            assert network is not None  # made above
            maps += network.eval().forward_intermediates(  # type: ignore[operator]  # of timm's transformers
                scaled, indices=[cait.depth - 1], norm=True, stop_early=True, intermediates_only=True
            )
        return maps


def _transformer(cait: Cait, weights: Weights | None) -> nn.Module:
    """A frozen CaiT, not initialised where there are no weights."""
    # Initialising 356 million parameters takes longer than reading them, and is for nothing.
    with torch.device("meta"):
        network = _network(cait.name)
    if weights is None:
        network = network.to_empty(device="cpu")
    else:
        network.load_state_dict(state_dict(weights, network.state_dict()), assign=True)
    from usf.detectors import talking_heads

    talking_heads.replace(network)
    network.requires_grad_(False)
    return network.eval()
