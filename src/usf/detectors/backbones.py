"""Frozen backbones whose weights are known by name and hash.

Weights resolve in a stated order and the choice is never silent:

1. ``path``: a safetensors file, given by the caller or found under ``../shared``;
2. ``hub``: the pinned timm tag, at a pinned revision with a pinned SHA-256, from the local hub cache or the network;
3. ``random``: seeded random weights, when the hub does not answer within three seconds.

:func:`resolve` decides, prints one line, and returns a :class:`Weights`; :func:`build` makes the network from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from usf import paths

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CHANNELS", "HUB_SECONDS", "LAYERS", "PINNED", "Pinned", "Weights", "build", "digest", "resolve"]

HUB_SECONDS = 2.5
"""How long the hub has to answer. Below three seconds with everything around it."""

LAYERS = ("layer1", "layer2", "layer3")
"""The stages whose features the detectors read (anomalib's FastFlow with a ResNet)."""

CHANNELS: dict[str, tuple[int, int, int]] = {"resnet18": (64, 128, 256), "wide_resnet50_2": (256, 512, 1024)}
"""Channels of :data:`LAYERS`, at strides 4, 8 and 16."""


@dataclasses.dataclass(frozen=True)
class Pinned:
    """One file on the timm hub: repository, git revision and SHA-256 together name exactly one content."""

    tag: str
    revision: str
    sha256: str
    filename: str = "model.safetensors"
    licence: str = "BSD-3-Clause"

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
    ),
}
"""Backbone -> the hub file that stands for "ImageNet-pretrained" in this project."""

SHARED: dict[str, tuple[str, str]] = {
    "resnet18": ("weights", "resnet18_imagenet_layers1to3.safetensors"),
}
"""Backbone -> where its weights lie under ``../shared``, where that exists."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights a backbone has, and why.

    Attributes:
        backbone: timm architecture.
        source: ``"path"``, ``"hub"`` or ``"random"``; ``"checkpoint"`` where a Lightning checkpoint brings them.
        tag: file name, timm tag, or ``"seed N"``.
        sha256: of the file, or of the tensors for random weights (see :func:`digest`).
        path: the file, where there is one.
        seed: of random weights.
        reason: why a later source in the order was used, else empty.
    """

    backbone: str
    source: Literal["path", "hub", "random", "checkpoint"]
    tag: str
    sha256: str
    path: Path | None = None
    seed: int | None = None
    reason: str = ""

    def describe(self) -> str:
        """One line for outputs, captions and records; no machine's path in it.

        >>> Weights("resnet18", "random", "seed 0", "ab" * 32, seed=0, reason="the hub did not answer").describe()
        'resnet18 with random weights (seed 0, sha256 abababababab; the hub did not answer)'
        """
        kind = {
            "path": f"weights from the file {self.tag}",
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
    sha256: str | None = None,
    seed: int = 0,
    timeout: float = HUB_SECONDS,
    announce: Callable[[str], None] | None = print,
) -> Weights:
    """Decide which weights a backbone gets, and say so in one line.

    Args:
        weights: a safetensors file; ``"hub"`` or ``"random"`` to insist on one of the two; ``None`` (or ``""``, which
            is what a command line can pass) for the stated order: the file under ``../shared``, the hub, random.
        backbone: timm architecture, a key of :data:`CHANNELS`.
        sha256: expected hash of the file; the pinned one is always checked for the hub.
        seed: of random weights.
        timeout: seconds the hub has to answer.
        announce: receives the one line; ``None`` for silence (the caller then prints ``describe()`` itself).

    Raises:
        ValueError: unknown backbone; a file whose hash is not the expected one.
        FileNotFoundError: a file that was asked for by name and does not exist.
        ConnectionError: ``weights="hub"`` and the hub cannot be reached.
    """
    if backbone not in CHANNELS:
        raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(CHANNELS)}")
    if isinstance(weights, Weights):
        if weights.backbone != backbone:
            raise ValueError(f"these weights are for {weights.backbone}, not for {backbone}")
        chosen = weights
    else:
        chosen = _resolve(weights or None, backbone, sha256, seed, timeout)
    if announce is not None:
        announce(f"Backbone: {chosen.describe()}")
    return chosen


def _resolve(weights: str | Path | None, backbone: str, sha256: str | None, seed: int, timeout: float) -> Weights:
    if weights == "random":
        return _random(backbone, seed, "asked for")
    if weights == "hub":
        found = _from_hub(backbone, timeout)
        if isinstance(found, str):
            raise ConnectionError(f"weights='hub': {found}; pass a safetensors file, or 'random'")
        return found
    if weights is not None:
        return _from_file(Path(weights), backbone, sha256)
    if backbone in SHARED and (beside := paths.shared(*SHARED[backbone])):
        return _from_file(beside, backbone, sha256)
    found = _from_hub(backbone, timeout)
    return found if isinstance(found, Weights) else _random(backbone, seed, found)


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


def _random(backbone: str, seed: int, reason: str) -> Weights:
    return Weights(backbone, "random", f"seed {seed}", digest(_random_state(backbone, seed)), seed=seed, reason=reason)


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


def _features_only(backbone: str, **kwargs: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(
        backbone, pretrained=False, features_only=True, out_indices=[1, 2, 3], **kwargs
    )
    return network


def _random_state(backbone: str, seed: int) -> dict[str, Tensor]:
    """A state dict drawn from ``seed`` alone; torch's own stream is left where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # timm silences every residual branch at the start of training; random features need them.
        return _features_only(backbone, zero_init_last=False).state_dict()


def state_dict(weights: Weights, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``weights``, reduced to the names in ``expected`` (a file may also hold later layers).

    Raises:
        ValueError: no safetensors file, a file that changed since it was resolved, or a tensor missing or of another
            shape; the file and the tensor are named.
    """
    if weights.source == "random":
        if weights.seed is None:
            raise ValueError("random weights need a seed")
        return _random_state(weights.backbone, weights.seed)
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
            "timm's names are expected (conv1.weight, layer1.0.conv1.weight, ...)"
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
    """The frozen backbone: images (N, 3, H, W), normalised as ImageNet's -> three maps (N, C_i, H/s_i, W/s_i).

    C_i is in :data:`CHANNELS`, s_i = 4, 8, 16. Torch's random stream is left where it was.
    """
    with torch.random.fork_rng(devices=[]):
        network = _features_only(weights.backbone)
    load(network, weights)
    return network
