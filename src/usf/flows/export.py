"""ONNX export of a flow's latent and score. Needs the ``export`` extra."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from usf.flows.flow import Flow


class _Scorer(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.flow.bijection(x)[0]
        return z, self.flow.base.score(z)


def to_onnx(flow: Flow, path: str | Path) -> None:
    """Write the fused flow as ONNX: input ``x`` (batch, *shape), outputs ``latent`` (batch, *shape) and ``score``
    (batch,).

    The batch size is free. The flow is fused first, because ONNX has no triangular solve.

    Raises:
        ImportError: without the ``export`` extra.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX export needs the export extra: pip install 'usf[export]'") from error
    module = _Scorer(flow.fuse()).eval()
    reference = next(flow.parameters())
    example = torch.zeros(2, *flow.shape, dtype=reference.dtype, device=reference.device)
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["x"],
        output_names=["latent", "score"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
