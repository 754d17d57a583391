"""What the tests of several detectors need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from usf.study import textures

if TYPE_CHECKING:  # anomalib, which is behind it, is an extra
    from anomalib.data import Folder

    from usf.detectors import FlowOptions


def name(options: FlowOptions) -> str:
    """Of a parametrised case."""
    parts = [options.coupling, options.mixing, options.diagonal, "scale" if options.global_scale else "noscale"]
    return "-".join([*parts, "matched"] if options.match_parameters else parts)


def disturb(module: nn.Module, scale: float = 0.05) -> None:
    """Away from the initial values, where many maps are trivial."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def weave(train: int, evaluate: int = 5, kinds: Sequence[str] = tuple(textures.DEFECTS), masks: bool = True) -> Folder:
    """The small built-in image set as anomalib's data module, with batches of these sizes.

    Five images to evaluate are several batches, so that an area that squashes each on its own would differ.
    """
    from anomalib.data import Folder

    return Folder(
        name="weave",
        root=textures.ensure(small=True),
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds] if masks else None,
        train_batch_size=train,
        eval_batch_size=evaluate,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def benchmark_script(name: str) -> ModuleType:
    """``benchmarks/NAME.py``, which is no part of the package, as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
