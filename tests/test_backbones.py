"""Which weights a backbone gets: the stated order, hashes, and a prompt answer when there is no network."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models.cait import Cait

from usf import paths
from usf.detectors import backbones, talking_heads


@pytest.fixture
def nothing_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file under ../shared, nothing in the hub's cache, and no wish to be offline."""
    monkeypatch.setenv("USF_SHARED", "")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


@contextlib.contextmanager
def listener() -> Iterator[str]:
    """An address that accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return backbones._random_state("resnet18", 7)


@pytest.fixture(scope="module")
def file(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file({**state, "fc.bias": torch.zeros(3)}, path)  # later layers may be there, and are not read
    return path


@pytest.mark.usefixtures("nothing_local")
def test_silent_hub_is_given_up_within_three_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listener() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        start = time.perf_counter()
        reason = backbones._unreachable(backbones.PINNED["resnet18"], backbones.HUB_SECONDS)
        assert time.perf_counter() - start < 3
        assert reason
        weights = backbones.resolve(timeout=0.3)
    assert weights.source == "random"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "random weights" in lines[0]
    assert "hub" in lines[0]


@pytest.mark.usefixtures("nothing_local")
def test_refused_connection_and_offline_switch_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as address:
        pass  # closed again: nobody listens
    monkeypatch.setattr(constants, "ENDPOINT", address)
    weights = backbones.resolve(announce=None)
    assert weights.source == "random"
    assert "cannot be reached" in weights.reason
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    assert "HF_HUB_OFFLINE" in str(backbones._from_hub("resnet18", 60))
    assert time.perf_counter() - start < 1
    with pytest.raises(ConnectionError, match=r"weights='hub'.*pass a safetensors file"):
        backbones.resolve("hub", announce=None)


@pytest.mark.usefixtures("nothing_local")
def test_hub_file_with_another_hash_is_refused_by_name_every_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(file))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"resnet18.tv_in1k from the hub has SHA-256 .* refused"):
            backbones.resolve(announce=None)


@pytest.mark.usefixtures("nothing_local")
def test_cached_hub_file_needs_no_network(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = backbones.Pinned("resnet18.tv_in1k", "0" * 40, backbones.sha256_of(file))
    monkeypatch.setitem(backbones.PINNED, "resnet18", pinned)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(file))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = backbones.resolve(announce=None)
    assert (weights.source, weights.tag) == ("hub", "resnet18.tv_in1k")
    assert weights.pretrained


def test_file_is_named_hashed_and_loaded(file: Path, state: dict[str, torch.Tensor]) -> None:
    lines: list[str] = []
    weights = backbones.resolve(file, announce=lines.append)
    assert weights.sha256 == backbones.sha256_of(file)
    assert lines == [f"Backbone: resnet18 with weights from the file mine.safetensors (sha256 {weights.sha256[:12]})"]
    network = backbones.build(weights)
    assert backbones.digest(network.state_dict()) == backbones.digest(state)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    shapes = [tuple(level.shape) for level in network(torch.zeros(2, 3, 64, 32))]
    assert shapes == [(2, 64, 16, 8), (2, 128, 8, 4), (2, 256, 4, 2)]
    assert backbones.resolve(weights, announce=None) == weights


def test_wrong_files_are_refused_by_name(file: Path, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors do not exist: pass"):
        backbones.resolve(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"mine.safetensors have SHA-256 .*, expected abc"):
        backbones.resolve(file, sha256="abc")

    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"text.safetensors is not a safetensors file"):
        backbones.build(backbones.resolve(text, announce=None))

    partial = tmp_path / "partial.safetensors"
    save_file({name: value for name, value in state.items() if not name.startswith("layer3.1")}, partial)
    with pytest.raises(ValueError, match=r"partial.safetensors lacks \d+ tensors of resnet18, the first is layer3.1"):
        backbones.build(backbones.resolve(partial, announce=None))

    other = tmp_path / "other.safetensors"
    save_file({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, other)
    with pytest.raises(ValueError, match=r"conv1.weight has shape \(64, 3, 3, 3\)"):
        backbones.build(backbones.resolve(other, announce=None))

    changed = tmp_path / "changed.safetensors"
    save_file(state, changed)
    weights = backbones.resolve(changed, announce=None)
    save_file({**state, "conv1.weight": state["conv1.weight"] + 1}, changed)
    with pytest.raises(ValueError, match="changed while in use"):
        backbones.build(weights)

    with pytest.raises(ValueError, match="unknown backbone 'resnet19'"):
        backbones.resolve(backbone="resnet19")
    with pytest.raises(ValueError, match="for resnet18, not for wide_resnet50_2"):
        backbones.resolve(weights, backbone="wide_resnet50_2")


def test_random_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = backbones.resolve("random", seed=0, announce=None)
    assert torch.equal(torch.rand(2), expected), "the caller's random stream is left alone"
    assert first == backbones.resolve("random", seed=0, announce=None)
    assert first.sha256 != backbones.resolve("random", seed=1, announce=None).sha256
    assert not first.pretrained
    assert "seed 0" in first.describe()
    network = backbones.build(first)
    assert backbones.digest(network.state_dict()) == first.sha256
    # The residual branches take part: their last normalisation is not zero.
    assert network.state_dict()["layer1.0.bn2.weight"].abs().min() > 0


def test_layers_are_a_choice_and_random_values_do_not_depend_on_it(file: Path, tmp_path: Path) -> None:
    first, last = (
        backbones.resolve("random", layers=layers, announce=None)
        for layers in (("layer1", "layer2", "layer3"), ("layer2", "layer3", "layer4"))
    )
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        early, late = backbones.build(first)(images), backbones.build(last)(images)
    assert [tuple(level.shape[1:]) for level in late] == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(early[1:], late[:2], strict=True))
    assert first.sha256 != last.sha256
    # A file with all layers serves any of them; one without is refused by the tensor's name.
    complete = tmp_path / "complete.safetensors"
    save_file(backbones._random_state("resnet18", 7, backbones.ALL_LAYERS), complete)
    deep = backbones.build(backbones.resolve(complete, layers=["layer4"], announce=None))
    assert deep(images)[0].shape[1] == 512
    with pytest.raises(ValueError, match=r"mine.safetensors lacks \d+ tensors of resnet18, the first is layer4"):
        backbones.build(backbones.resolve(file, layers=["layer4"], announce=None))
    for wrong in (["layer5"], ["layer3", "layer2"], []):
        with pytest.raises(ValueError, match="choose among layer1, layer2, layer3, layer4, in this order"):
            backbones.resolve("random", layers=wrong, announce=None)


@pytest.mark.usefixtures("nothing_local")
def test_every_backbone_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert set(backbones.PINNED) == {"resnet18", "wide_resnet50_2", *(cait.name for cait in backbones.MCAIT)}
    for name, pinned in backbones.PINNED.items():
        assert pinned.tag.startswith(f"{name}.")
        assert len(bytes.fromhex(pinned.sha256)) == 32
        assert pinned.revision == "main" or len(bytes.fromhex(pinned.revision)) == 20
        assert "HF_HUB_OFFLINE" in str(backbones._from_hub(name, 60))
    assert backbones._from_hub("resnet50", 60) == "no tag of resnet50 is pinned"


# --- mcait: a pair of networks, shrunk --------------------------------------------------------------------------------


@pytest.fixture
def small_cait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same names, with few and narrow blocks."""

    def create(name: str, pretrained: bool, init_values: float = 1e-6) -> torch.nn.Module:
        assert not pretrained
        cait = next(cait for cait in backbones.MCAIT if cait.name == name)
        return Cait(cait.size, num_classes=3, embed_dim=cait.channels, depth=3, num_heads=1, init_values=init_values)

    monkeypatch.setattr(timm, "create_model", create)
    first, second = backbones.MCAIT
    small = (
        dataclasses.replace(first, depth=3, channels=8),
        dataclasses.replace(second, depth=2, channels=4),
    )
    monkeypatch.setattr(backbones, "MCAIT", small)


def folder(parent: Path) -> Path:
    parent.mkdir()
    for seed, cait in enumerate(backbones.MCAIT):
        save_file(backbones._random_state(cait.name, seed), parent / f"{cait.name}.safetensors")
    return parent


@pytest.mark.usefixtures("small_cait")
def test_pair_from_a_folder_is_named_hashed_and_loaded(tmp_path: Path) -> None:
    place = folder(tmp_path / "mcait")
    lines: list[str] = []
    weights = backbones.resolve(place, backbone="mcait", announce=lines.append)
    assert [part.backbone for part in weights.parts] == ["cait_m48_448", "cait_s24_224"]
    assert lines == [
        "Backbone: mcait with weights from the files cait_m48_448.safetensors and cait_s24_224.safetensors "
        f"(sha256 {weights.sha256[:12]})"
    ]
    network = backbones.build(weights)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.rand(2, 3, 448, 448)
    with torch.no_grad():
        levels = network.train()(images)  # whoever switches it to training mode, it stays in evaluation mode
        again = backbones.build(weights)(images)
    assert [tuple(level.shape) for level in levels] == [(2, 8, 28, 28), (2, 4, 14, 14)]
    assert all(torch.equal(a, b) for a, b in zip(levels, again, strict=True))
    for key, part in zip(("extractor1", "extractor2"), weights.parts, strict=True):
        state = {k.removeprefix(f"{key}."): v for k, v in network.state_dict().items() if k.startswith(key)}
        assert backbones.digest(state) == backbones.digest(load_file(str(part.path)))
    with pytest.raises(ValueError, match=r"images of \(224, 224\) pixels: mcait takes 448 x 448 alone"):
        network(torch.rand(1, 3, 224, 224))

    hashes = [part.sha256 for part in weights.parts]
    assert backbones.resolve(place, backbone="mcait", sha256=hashes, announce=None) == weights
    with pytest.raises(ValueError, match=r"cait_s24_224\.safetensors have SHA-256"):
        backbones.resolve(place, backbone="mcait", sha256=[hashes[0], hashes[0]], announce=None)
    with pytest.raises(ValueError, match="a hash for each of cait_m48_448, cait_s24_224"):
        backbones.resolve(place, backbone="mcait", sha256=hashes[0], announce=None)
    (place / "cait_s24_224.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"cait_s24_224\.safetensors do not exist"):
        backbones.resolve(place, backbone="mcait", announce=None)


@pytest.mark.usefixtures("small_cait", "nothing_local")
def test_pair_from_the_hub_or_at_random_is_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="pass a folder with cait_m48_448 and cait_s24_224"):
        backbones.resolve("hub", backbone="mcait", announce=None)
    place = folder(tmp_path / "mcait")
    cached = {f"timm/{backbones.PINNED[cait.name].tag}": place / f"{cait.name}.safetensors" for cait in backbones.MCAIT}
    for cait in backbones.MCAIT:
        path = place / f"{cait.name}.safetensors"
        pinned = dataclasses.replace(backbones.PINNED[cait.name], sha256=backbones.sha256_of(path))
        monkeypatch.setitem(backbones.PINNED, cait.name, pinned)
    missing = f"timm/{backbones.PINNED['cait_s24_224'].tag}"
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, *args, **kwargs: None if repository == missing else str(cached[repository]),
    )
    weights = backbones.resolve(backbone="mcait", announce=None)
    assert {part.source for part in weights.parts} == {"random"}, "the first one is there, and not used"
    assert "cait_s24_224.fb_dist_in1k is not in the hub cache" in weights.describe()
    assert backbones.digest(backbones.build(weights).extractor1.state_dict()) == weights.parts[0].sha256
    assert weights.sha256 != backbones.resolve("random", backbone="mcait", seed=1, announce=None).sha256

    missing = ""
    found = backbones.resolve(backbone="mcait", announce=None)
    assert (found.source, found.tag) == ("hub", "cait_m48_448.fb_dist_in1k and cait_s24_224.fb_dist_in1k")
    assert found.pretrained


def test_attention_is_timms_without_the_copies() -> None:
    torch.manual_seed(0)
    stock = Cait(64, num_classes=0, embed_dim=24, depth=2, num_heads=4, init_values=1.0).eval()
    for parameter in stock.parameters():  # sharp attention, so that a wrong combination of heads shows
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    own = copy.deepcopy(stock)
    talking_heads.replace(own)
    assert sum(isinstance(module, talking_heads.TalkingHeads) for module in own.modules()) == 2
    assert own.state_dict().keys() == stock.state_dict().keys()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(own(images), stock(images), atol=1e-5)
        assert torch.allclose(own.double()(images.double()), stock.double()(images.double()), atol=1e-12)


@pytest.mark.usefixtures("small_cait")
def test_random_transformers_do_something() -> None:
    """timm starts every block close to the identity; random features need them."""
    network = backbones.build(backbones.resolve("random", backbone="mcait", announce=None))
    images = torch.rand(1, 3, 448, 448)
    with torch.no_grad():
        before = network(images)
        network.extractor1.blocks[0].gamma_2.zero_()
        after = network(images)
    assert (before[0] - after[0]).abs().max() > 1e-2
    assert torch.equal(before[1], after[1])


@pytest.mark.skipif(paths.shared("weights") is None, reason="no weights under ../shared")
def test_weights_beside_the_project_come_first() -> None:
    weights = backbones.resolve(announce=None)
    assert weights.source == "path"
    assert weights.sha256.startswith("0a78cf07")
    levels = backbones.build(weights)(torch.rand(1, 3, 64, 64))
    assert all(torch.isfinite(level).all() and level.std() > 0 for level in levels)
