"""Which weights a backbone gets: the stated order, hashes, and a prompt answer when there is no network."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from usf import paths
from usf.detectors import backbones


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


@pytest.mark.skipif(paths.shared("weights") is None, reason="no weights under ../shared")
def test_weights_beside_the_project_come_first() -> None:
    weights = backbones.resolve(announce=None)
    assert weights.source == "path"
    assert weights.sha256.startswith("0a78cf07")
    levels = backbones.build(weights)(torch.rand(1, 3, 64, 64))
    assert all(torch.isfinite(level).all() and level.std() > 0 for level in levels)
