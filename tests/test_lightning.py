"""Training in anomalib's Engine ends, and says why, when a loss is not finite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("anomalib", reason="needs the detectors extra")

from anomalib.engine import Engine
from lightning.pytorch import Callback

from helpers import weave
from usf.detectors import Cflow, Fastflow, Uflow
from usf.detectors.lightning import CHECK_EVERY

SHARED: dict[str, Any] = {
    "backbone": "resnet18", "backbone_weights": "random", "input_size": (32, 32), "visualizer": False,
    "coupling": "affine", "mixing": "permutation",
}  # fmt: skip
DETECTORS = {
    "FastFlow": lambda: Fastflow(flow_steps=1, **SHARED),
    "CFlow": lambda: Cflow(coupling_blocks=1, layers=["layer1", "layer2"], **SHARED),
    "U-Flow": lambda: Uflow(flow_steps=1, **SHARED),
}


class Spoil(Callback):
    """A pixel of the second epoch's first batch is infinite; counts what is done after that."""

    spoiled = False
    batches = validations = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            batch.image[0, 0, 5, 5] = torch.inf
            self.spoiled = True

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.batches += self.spoiled

    def on_validation_batch_end(self, *arguments: Any) -> None:
        self.validations += self.spoiled


@pytest.mark.parametrize("name", DETECTORS)
def test_an_infinite_input_ends_training_by_name(name: str, tmp_path: Path) -> None:
    data = weave(6)
    spoil = Spoil()
    engine = Engine(
        max_epochs=4, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[spoil],
    )  # fmt: skip
    said = f"{name} (coupling affine, mixing permutation): the loss is (nan|-?inf) at epoch 2, batch 1. Lower"
    said = re.escape(said).replace(re.escape("(nan|-?inf)"), "(nan|-?inf)")
    with pytest.raises(FloatingPointError, match=said):
        engine.fit(DETECTORS[name](), data)
    assert spoil.batches == 2, "the rest of the epoch"
    assert spoil.validations == 0, "nothing was scored with such weights"


def test_a_look_is_due_only_now_and_then() -> None:
    detector = DETECTORS["FastFlow"]()
    for epoch in range(3):
        for number in range(CHECK_EVERY):
            detector.on_train_batch_end({"loss": torch.tensor(1.0)}, None, number)
        assert not detector._losses, f"all were looked at, {epoch}"
    for number in range(CHECK_EVERY - 1):
        detector.on_train_batch_end({"loss": torch.tensor(torch.nan if number == 3 else 1.0)}, None, number)
    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 1, batch 4"):
        detector.on_train_batch_end({"loss": torch.ones(1)}, None, CHECK_EVERY - 1)
    detector.check_losses()  # said once
    detector.on_train_batch_end(None, None, 0)  # a batch that was skipped
    detector.on_train_epoch_end()
