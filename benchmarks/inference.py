"""Inference speed: fused uniformly scaling detectors beside the stock anomalib detectors on the same backbone.

Run it from the repository, on a machine with nothing else to do::

    python benchmarks/inference.py --out data/results/benchmarks/inference.csv

Sides:

* ``stock``: anomalib's own torch model: affine couplings, hard permutations, its own score;
* ``usf``: this package's, with its defaults: additive couplings, LU maps, the score ``norm``;
* ``usf fused``: its inference copy, ``usf.detectors.export.fused``.

Runtimes: ``torch`` as it comes, and ``onnxruntime`` and ``openvino`` on exported files of ``stock`` and ``usf fused``.
Parts: ``whole`` is normalised images to maps and scores; ``flow`` is all of that behind the backbone: layer
normalisation, flow, map. Sides take turns within every repeat, and a ratio is formed within each repeat: time of
``stock`` in the same runtime over time of the side; ``ratio_torch`` is over ``stock`` in torch, as anomalib runs it.
With one thread the clock is CPU time, so that other work hardly counts. Weights are random: they do not change the
time. anomalib's own CFlow cannot be exported (a row with the reason).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.study import records

BACKBONE, LAYERS, SEED = "resnet18", ("layer1", "layer2", "layer3"), 0
DETECTORS = ("FastFlow", "CFlow", "U-Flow")
SIDES = ("stock", "usf", "usf fused")
RUNTIMES = ("torch", "onnxruntime", "openvino")
PARTS = ("whole", "flow")
# fmt: off
COLUMNS = [
    "detector", "batch", "part", "runtime", "side", "status", "reason", "repeats", "images_per_second", "ms_p50",
    "ms_p90", "ms_p99", "ratio", "ratio_q25", "ratio_q75", "ratio_torch", "megabytes", "size", "backbone", "device",
    "threads", "revision", "settings_hash",
]
# fmt: on


class Recorded(nn.Module):
    """In the place of a backbone: hands out the maps that lie in ``box``."""

    def __init__(self, box: list[Tensor]) -> None:
        super().__init__()
        self.box = box

    def forward(self, images: Tensor) -> list[Tensor]:
        del images
        return list(self.box)


class Part(nn.Module):
    """A detector, or what is behind its backbone, as a function of tensors: -> (score, map)."""

    def __init__(self, model: nn.Module, part: str, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.box: list[Tensor] | None = None
        if part == "flow":
            self.box = []
            owner, name = backbone_of(self.model)
            setattr(owner, name, Recorded(self.box))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        images = inputs[0]
        if self.box is not None:
            self.box[:] = inputs
            # Only its size is read.
            images = inputs[0].new_zeros(1, 3, self.size, self.size)
        out = self.model(images)
        return out.pred_score, out.anomaly_map


def backbone_of(model: nn.Module) -> tuple[nn.Module, str]:
    """(module, attribute) that holds the timm network of a detector, stock or not."""
    owner = model
    for name in ("encoder", "feature_extractor"):
        inner = getattr(owner, name, None)
        if inner is not None and hasattr(inner, "feature_extractor"):
            owner = inner
    return owner, "feature_extractor"


def build(detector: str, side: str, size: int) -> nn.Module:
    """A torch model in evaluation mode."""
    import timm
    from anomalib.models.image.cflow.torch_model import CflowModel as StockCflow
    from anomalib.models.image.fastflow.torch_model import FastflowModel as StockFastflow
    from anomalib.models.image.uflow.torch_model import UflowModel as StockUflow

    from usf.detectors import CflowModel, FastflowModel, FlowOptions, UflowModel, resolve
    from usf.detectors.export import fused

    torch.manual_seed(SEED)
    shape = (size, size)
    if side == "stock":
        create = timm.create_model

        def offline(*args: Any, **kwargs: Any) -> Any:
            return create(*args, **{**kwargs, "pretrained": False})

        with mock.patch("timm.create_model", offline):
            made: dict[str, Callable[[], nn.Module]] = {
                "FastFlow": lambda: StockFastflow(shape, BACKBONE, pre_trained=False),
                "CFlow": lambda: StockCflow(BACKBONE, LAYERS, pre_trained=False),
                "U-Flow": lambda: StockUflow(shape, backbone=BACKBONE),
            }
            return made[detector]().eval()
    weights, options = resolve("random", backbone=BACKBONE, announce=None), FlowOptions()
    model: Any
    if detector == "FastFlow":
        model = FastflowModel(shape, weights, options)
    elif detector == "CFlow":
        model = CflowModel(shape, weights, options, layers=LAYERS, score="norm")
    else:
        model = UflowModel(shape, weights, options)
    return fused(model) if side == "usf fused" else model.eval()


def inputs_of(model: nn.Module, part: str, batch: int, size: int) -> list[Tensor]:
    """Images, or a backbone's maps of them as they come out of it."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED))
    if part == "whole":
        return [images]
    owner, name = backbone_of(model)
    with torch.inference_mode():
        return list(getattr(owner, name)(images.to(next(model.parameters()).device)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def export(model: nn.Module, part: str, size: int, path: Path) -> float:
    """Write a part of a detector as ONNX with a free batch size; megabytes of the files."""
    inputs = inputs_of(model, part, 2, size)
    module = Part(model, part, size)
    free = torch.export.Dim("batch")
    shapes = ({0: free},) * len(inputs)
    with quiet(), torch.no_grad():
        # One tuple, because Part takes any number of inputs.
        torch.onnx.export(module, tuple(inputs), str(path), dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def session(runtime: str, path: Path, threads: int) -> Callable[[list[np.ndarray]], Any]:
    """An exported file, loaded: arrays in, arrays out; in float32."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in loaded.get_inputs()]
        return lambda arrays: loaded.run(None, dict(zip(names, arrays, strict=True)))
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda arrays: compiled(arrays)


def clock() -> float:
    """Seconds: CPU time of the process when it has one thread, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed_torch(model: nn.Module, images: Tensor) -> Callable[[], dict[str, float]]:
    """Seconds of the whole and of what is behind the backbone, measured in the same call."""
    owner, name = backbone_of(model)
    moments: list[float] = []
    cuda = images.device.type == "cuda"

    def mark(*_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        moments.append(clock())

    getattr(owner, name).register_forward_hook(mark)

    def call() -> dict[str, float]:
        moments.clear()
        mark()
        with torch.inference_mode():
            model(images)
        mark()
        start, between, end = moments
        return {"whole": end - start, "flow": end - between}

    return call


def timed_session(
    run: Callable[[list[np.ndarray]], Any], part: str, arrays: list[np.ndarray]
) -> Callable[[], dict[str, float]]:
    """Seconds of one part in a runtime."""

    def call() -> dict[str, float]:
        start = clock()
        run(arrays)
        return {part: clock() - start}

    return call


def brief(error: Exception) -> str:
    """One line; of an exporter's chain of errors the first, which is the cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def measure(
    detector: str, size: int, batches: dict[int, int], runtimes: Sequence[str], device: str, threads: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Rows of one detector, after each batch size."""
    models = {side: build(detector, side, size).to(device) for side in SIDES} if "torch" in runtimes else {}
    sizes = {
        side: sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 1e6
        for side, model in models.items()
    }
    loaded: dict[tuple[str, str, str], tuple[Any, float, str]] = {}
    for side in ("stock", "usf fused"):
        for part in PARTS:
            if set(runtimes) == {"torch"}:
                break
            path, megabytes, reason = folder / f"{detector}-{part}-{side}.onnx".replace(" ", "-"), 0.0, ""
            try:
                megabytes = export(build(detector, side, size), part, size, path)
            except Exception as error:  # a failure is a row
                reason = brief(error)
            for runtime in runtimes:
                if runtime == "torch":
                    continue
                run = None
                if not reason:
                    try:
                        run = session(runtime, path, threads)
                    except Exception as error:
                        reason = brief(error)
                loaded[runtime, part, side] = (run, megabytes, reason)
    for batch, repeats in batches.items():
        calls: dict[tuple[str, str, str], Callable[[], dict[str, float]]] = {}
        common = {"detector": detector, "batch": batch, "size": size, "backbone": BACKBONE, "device": device}
        seconds: dict[tuple[str, str, str], list[float]] = {}
        for side, model in models.items():
            images = inputs_of(model, "whole", batch, size)[0].to(device)
            calls["torch", "", side] = timed_torch(model, images)
        source = build(detector, "stock", size)
        for (runtime, part, side), (run, _, reason) in loaded.items():
            if run is None:
                yield common | {"part": part, "runtime": runtime, "side": side, "status": "failed", "reason": reason}
                continue
            arrays = [np.ascontiguousarray(value.numpy()) for value in inputs_of(source, part, batch, size)]
            calls[runtime, part, side] = timed_session(run, part, arrays)
        for call in calls.values():
            call()  # allocates, compiles
        order = list(calls)
        for repeat in range(repeats):
            shift = repeat % len(order)
            for key in order[shift:] + order[:shift]:
                for part, value in calls[key]().items():
                    seconds.setdefault((key[0], part, key[2]), []).append(value)
        for (runtime, part, side), values in seconds.items():
            row: dict[str, Any] = {"part": part, "runtime": runtime, "side": side, "status": "ok", "repeats": repeats}
            middle, high, highest = (float(np.percentile(values, q)) for q in (50, 90, 99))
            row |= {"images_per_second": batch / middle, "ms_p50": 1e3 * middle}
            row |= {"ms_p90": 1e3 * high, "ms_p99": 1e3 * highest}
            for where, name in ((runtime, "ratio"), ("torch", "ratio_torch")):
                if against := seconds.get((where, part, "stock")):
                    ratios = [theirs / ours for theirs, ours in zip(against, values, strict=True)]
                    row[name] = float(np.median(ratios))
                    if name == "ratio":
                        row["ratio_q25"], row["ratio_q75"] = (float(np.percentile(ratios, q)) for q in (25, 75))
            row["megabytes"] = sizes[side] if runtime == "torch" else loaded[runtime, part, side][1]
            yield common | row


def run(
    out: Path,
    *,
    detectors: Sequence[str] = DETECTORS,
    size: int = 256,
    batches: dict[int, int] | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure, and write ``out`` (CSV) with ``inference-provenance.json`` beside it, after every batch size.

    Args:
        out: the CSV file.
        detectors, runtimes: of :data:`DETECTORS` and :data:`RUNTIMES`.
        size: of the square images, pixels.
        batches: batch size -> repeats.
        device: of the runtime ``torch``; the others run on the CPU.
        threads: of every runtime; by default torch's own number, the machine's cores.
        progress: show a bar.

    Raises:
        ValueError: an unknown detector or runtime, or fewer than one repeat.
    """
    batches = {1: 15, 32: 2} if batches is None else batches
    threads = threads or torch.get_num_threads()
    for given, known in ((detectors, DETECTORS), (runtimes, RUNTIMES)):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown: {sorted(unknown)}; known: {list(known)}")
    if not batches or min(*batches, *batches.values()) < 1:
        raise ValueError(f"batches {batches}: batch sizes and repeats must be at least 1")
    torch.set_num_threads(threads)
    started = time.perf_counter()
    packages = ("torch", "anomalib", "timm", "onnxruntime", "openvino", "onnxscript")
    settings = {"size": size, "batches": {str(k): v for k, v in batches.items()}, "seed": SEED, "dtype": "float32"}
    settings |= {"detectors": list(detectors), "runtimes": list(runtimes), "backbone": BACKBONE, "device": device}
    settings |= {"threads": threads, "clock": "process CPU time" if threads == 1 else "wall time"}
    provenance = records.provenance(packages) | {"settings": settings}
    shared = {"threads": threads, "revision": provenance["revision"], "settings_hash": records.settings_hash(settings)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(detectors, disable=not progress) as bar:
        for detector in bar:
            bar.set_description(detector)
            for row in measure(detector, size, batches, runtimes, device, threads, Path(folder)):
                rows.append(row | shared)
                records.write_csv(out, rows, COLUMNS, digits=4)
            provenance["wall_seconds"] = round(time.perf_counter() - started, 1)
            provenance["load"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
            records.write_json(out.parent / "inference-provenance.json", provenance)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line a cell."""
    lines = [f"{'':34}{'side':10} {'ms p50':>8} {'p90':>8} {'img/s':>7} {'vs stock':>8} {'in torch':>8} {'MB':>6}"]
    for row in rows:
        name = f"{row['detector']:9}{row['part']:6}batch {row['batch']:<3} {row['runtime']:12}"
        if row["status"] != "ok":
            lines.append(f"{name}{row['side']:10} {row['reason']}")
            continue
        lines.append(
            f"{name}{row['side']:10} {row['ms_p50']:8.1f} {row['ms_p90']:8.1f} {row['images_per_second']:7.1f} "
            f"{row.get('ratio', float('nan')):8.2f} {row.get('ratio_torch', float('nan')):8.2f} {row['megabytes']:6.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file; provenance is written beside it")
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, nargs=2, default=[15, 2], metavar=("ONE", "MANY"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="1 on a busy machine: the clock is CPU time then")
    parser.add_argument("--quick", action="store_true", help="seconds: does it run? Small images, few of them")
    given = parser.parse_args(arguments)
    batches = {1: given.repeats[0], 32: given.repeats[1]}
    if given.quick:
        given.size, batches = 64, {1: 3, 4: 2}
    rows = run(
        given.out,
        detectors=given.detectors,
        size=given.size,
        batches=batches,
        runtimes=given.runtimes,
        device=given.device,
        threads=given.threads,
    )
    print(summary(rows))


if __name__ == "__main__":
    main()
