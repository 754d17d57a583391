"""anomalib's command line finds the detectors by ``class_path``, checks their options, trains and exports them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("anomalib", reason="needs the detectors extra")

from anomalib.cli import AnomalibCLI

from usf import detectors, paths
from usf.study import textures

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "hazelnut.yaml"


def settings(folder: Path, model: str, **options: Any) -> Path:
    """The example's settings with another model, on the built-in images, one epoch at 32 pixels."""
    chosen: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text("utf8"))
    chosen["model"] = {
        "class_path": f"usf.detectors.{model}",
        "init_args": {"backbone": "resnet18", "backbone_weights": "random", "input_size": [32, 32], **options},
    }
    chosen["data"]["init_args"] |= {
        "name": "weave",
        "root": str(textures.ensure(small=True)),
        "abnormal_dir": ["test/hole", "test/stain"],
        "mask_dir": ["ground_truth/hole", "ground_truth/stain"],
        "train_batch_size": 6,
    }
    chosen["trainer"] |= {"max_epochs": 1, "logger": False, "enable_progress_bar": False}
    chosen["default_root_dir"] = str(folder / "out")
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(chosen))
    return path


def test_example_trains_end_to_end_as_a_command(tmp_path: Path) -> None:
    root = textures.ensure(small=True)
    command = [sys.executable, "-m", "anomalib.cli.cli", "train", "--config", str(EXAMPLE)]
    command += ["--data.init_args.root", str(root), "--data.init_args.name", "weave"]
    command += ["--data.init_args.abnormal_dir", '["test/hole", "test/stain"]']
    command += ["--data.init_args.mask_dir", '["ground_truth/hole", "ground_truth/stain"]']
    command += ["--model.init_args.input_size", "[32, 32]", "--model.init_args.backbone_weights", "random"]
    command += ["--trainer.max_epochs", "1", "--default_root_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "USF_SHARED": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resnet18 with random weights" in done.stdout
    assert "image_AUROC" in done.stdout
    (saved,) = tmp_path.glob("Fastflow/weave/v0/weights/lightning/model.ckpt")
    checkpoint = torch.load(saved, weights_only=True, map_location="cpu")
    assert checkpoint["hyper_parameters"]["coupling"] == "additive"
    assert checkpoint["hyper_parameters"]["backbone_weights"] == "checkpoint"
    assert checkpoint["epoch"] == 0
    assert checkpoint["global_step"] == 1, "12 images in batches of 16"


CASES: dict[str, dict[str, Any]] = {
    "Cflow": {"layers": ["layer1", "layer2"], "coupling_blocks": 1, "fiber_batch_size": 256, "coupling": "gin"},
    "Uflow": {"flow_steps": 1, "mixing": "permutation", "lr_schedule": "step"},
}


@pytest.mark.parametrize("model", list(CASES))
def test_other_detectors_train_from_a_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = AnomalibCLI(["train", "--config", str(settings(tmp_path, model, **CASES[model]))])
    assert type(cli.model) is getattr(detectors, model)
    assert cli.model.input_size == (32, 32)
    for key, value in CASES[model].items():
        assert cli.model.hparams[key] == value
    assert "image_AUROC" in capsys.readouterr().out
    assert list((tmp_path / "out").glob(f"{model}/weave/v0/weights/lightning/model.ckpt"))


def test_trained_model_is_exported_by_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    chosen = settings(tmp_path, "Fastflow", flow_steps=1)
    AnomalibCLI(["fit", "--config", str(chosen)])
    (saved,) = (tmp_path / "out").rglob("*.ckpt")
    arguments = ["export", "--model", "usf.detectors.Fastflow", "--model.backbone_weights", "random"]
    arguments += ["--ckpt_path", str(saved), "--export_type", "onnx", "--export_root", str(tmp_path)]
    AnomalibCLI([*arguments, "--default_root_dir", str(tmp_path / "out")])
    session = runtime.InferenceSession(str(tmp_path / "weights" / "onnx" / "model.onnx"))
    outputs = {output.name: output.shape for output in session.get_outputs()}
    assert outputs["anomaly_map"][1:] == [1, 32, 32], "the checkpoint's size, not the default"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "afine"}, "'affine', 'additive', 'gin'"),
        ({"flow_steps": "many"}, "flow_steps"),
        ({"couplng": "affine"}, "couplng"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        AnomalibCLI(["train", "--config", str(settings(tmp_path, "Fastflow", **options))])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(paths.shared("images", "hazelnut_toy_256", "hazelnut") is None, reason="no images under ../shared")
def test_example_names_folders_that_exist() -> None:
    data = yaml.safe_load(EXAMPLE.read_text("utf8"))["data"]["init_args"]
    root = ROOT / data["root"]
    for part in (data["normal_dir"], data["normal_test_dir"], *data["abnormal_dir"], *data["mask_dir"]):
        assert any((root / part).glob("*.png")), part
