"""Time and memory of a detector trained in anomalib's ``Engine`` and on the fast path: same images, weights, epochs.

Run it from the repository::

    python benchmarks/detectors.py --out data/results/benchmarks/detectors.csv

Each measurement is a process of its own, so that peak memory is its own and nothing is warm. The clock starts when the
libraries are imported and stops when the test metrics are there. The two sides take turns within a repeat; a ratio is
formed within each repeat.

* ``engine``: the stock anomalib detector with stock settings: ``Engine.fit`` (validation on the test images after every
  epoch, checkpoints, 8 data-loader workers), then ``Engine.test``.
* ``fast``: ``usf.study``: features extracted once, the flow trained on them, exact image and pixel AUROC at the end.
* ``fast grid``: the same for three couplings and three seeds, on the same features.
* ``fast bfloat16`` (CFlow): ``fast`` with the coupling networks' products in that type.
* ``networks`` (FastFlow): forward and backward of the coupling networks alone, on inputs of the right shapes. Both
  sides need that arithmetic, so nobody's epoch is shorter.

The stock model's own weights come from the network; here both sides get the same ones (``--weights``, by default the
stated order of ``usf.detectors.backbones.resolve``; MCaiT has random ones unless given).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from usf.study import records

LAYERS = ("layer1", "layer2", "layer3")
SEED, BATCH = 0, 32
COUPLINGS = ({"coupling": "affine", "mixing": "permutation"}, {"coupling": "additive", "mixing": "permutation"}, {})
# fmt: off
CELLS: dict[str, dict[str, Any]] = {
    "FastFlow": {"detector": "fastflow", "backbone": "resnet18", "size": 256, "epochs": 3, "train": 32, "per_kind": 4},
    "CFlow": {"detector": "cflow", "backbone": "resnet18", "size": 256, "epochs": 2, "train": 6, "per_kind": 2},
    "U-Flow": {"detector": "uflow", "backbone": "mcait", "size": 448, "epochs": 2, "train": 2, "per_kind": 1},
}
"""What is trained: on two processor cores as much as a quarter of an hour allows."""

COLUMNS = [
    "cell", "side", "repeats", "models", "train_images", "test_images", "epochs", "size", "backbone", "weights",
    "seconds", "seconds_q25", "seconds_q75", "epoch_seconds", "setup_seconds", "peak_mb", "ratio", "ratio_q25",
    "ratio_q75", "epoch_ratio", "image_auroc", "pixel_auroc", "images", "manifest_sha256", "device", "processor",
    "threads", "revision", "settings_hash",
]
# fmt: on
SIDES = ("engine", "fast", "fast grid", "fast bfloat16", "networks")
ONLY = {"fast bfloat16": "CFlow", "networks": "FastFlow"}
"""Side -> the only cell that it is measured for."""


# --- one measurement, in a process of its own -------------------------------------------------------------------------


def peak_mb() -> float:
    """Largest memory of this process and of its largest child (a data-loader worker), megabytes."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + children) / 1024


def stock_model(cell: dict[str, Any], weights: Any) -> Any:
    """anomalib's Lightning model with its own defaults, but for backbone and layers; the weights are set by hand."""
    import timm
    from anomalib import models

    from usf.detectors import backbones

    create = timm.create_model

    def offline(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **(kwargs | {"pretrained": False}))

    with mock.patch.object(timm, "create_model", offline):
        if cell["detector"] == "fastflow":
            model = models.Fastflow(backbone=cell["backbone"])
            backbones.load(model.model.feature_extractor, weights)
        elif cell["detector"] == "cflow":
            model = models.Cflow(backbone=cell["backbone"], layers=LAYERS)
            backbones.load(model.model.encoder.feature_extractor, weights)
        else:
            model = models.Uflow(backbone=cell["backbone"])
            if cell["backbone"] != "mcait":  # random weights cost the same whichever they are
                backbones.load(model.model.feature_extractor.feature_extractor, weights)
    return model


def run_engine(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Stock anomalib from the folder to the test metrics."""
    import torch
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from lightning.pytorch import Callback, seed_everything

    marks: list[float] = []

    class Clock(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            marks.append(time.perf_counter())

        def on_train_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    weights = find_weights(cell)
    started = time.perf_counter()
    seed_everything(SEED, verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(max_epochs=cell["epochs"], default_root_dir=scratch, callbacks=[Clock()], logger=False)
        model, data = stock_model(cell, weights), MVTecAD(root=folder.parent, category=folder.name)
        engine.fit(model, datamodule=data)
        (metrics,) = engine.test(model, datamodule=data)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "setup_seconds": marks[0] - started,
        "epochs_seconds": [after - before for before, after in itertools.pairwise(marks)],
        "image_auroc": metrics.get("image_AUROC"),
        "pixel_auroc": metrics.get("pixel_AUROC"),
        "models": 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def run_fast(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fast path from the folder to the test metrics, on any of its sides."""
    import torch

    from usf.detectors import FlowOptions, backbones
    from usf.study import detection
    from usf.study.features import extract
    from usf.study.images import load_masks, read

    weights, grid = find_weights(cell), cell["side"] == "fast grid"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    images = read(folder)
    backbone = backbones.build(weights).to(device)
    train, test = (
        extract(backbone, files, cell["size"], progress=False).to(device)
        for files in (images.train, [sample.path for sample in images.test])
    )
    del backbone
    masks = load_masks(images.test, cell["size"])
    options: dict[str, Any] = {"layers": LAYERS} if cell["detector"] == "cflow" else {}
    if cell["side"] == "fast bfloat16":
        options["precision"] = "bfloat16"
    setup = time.perf_counter() - started
    choices = [FlowOptions(**choice) for choice in COUPLINGS] if grid else [FlowOptions(**COUPLINGS[0])]
    epochs_seconds: list[float] = []
    for choice in choices:
        for seed in range(3 if grid else 1):
            model = detection.build(cell["detector"], cell["size"], weights, choice, seed=seed, **options).to(device)
            history = detection.fit(model, train, epochs=cell["epochs"], batch_size=BATCH, seed=seed, progress=False)
            result = detection.evaluate(model, test, score="anomalib" if not grid else None)
            area = {"image_auroc": result.image_auroc(images.labels), "pixel_auroc": result.pixel_auroc(masks)}
            epochs_seconds += [history.seconds / history.epochs] * history.epochs
    return {
        "seconds": time.perf_counter() - started,
        "setup_seconds": setup,
        "epochs_seconds": epochs_seconds,
        **({} if grid else area),
        "models": len(choices) * (3 if grid else 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def run_networks(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Forward and backward of the affine model's coupling networks, as often as its epochs need them, and nothing else.

    Every network gets inputs of its own shape, as many images at a time as in training, which need a gradient as they
    do there; no loss, no optimiser.
    """
    import torch

    from usf.detectors import FlowOptions
    from usf.detectors.coupling import Block
    from usf.study import detection
    from usf.study.images import read

    weights = find_weights(cell)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    model = detection.build(cell["detector"], cell["size"], weights, FlowOptions(**COUPLINGS[0]), seed=SEED).to(device)
    images = len(read(folder).train)
    batches = [min(BATCH, images - start) for start in range(0, images, BATCH)]
    calls: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []

    def remember(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.append((network, torch.rand_like(inputs[0]).requires_grad_(), torch.rand_like(output)))

    handles = [m.subnet.register_forward_hook(remember) for m in model.modules() if isinstance(m, Block)]
    for batch in batches:
        features = model.features(torch.zeros(batch, 3, cell["size"], cell["size"], device=device))
        for part in model.parts(features):
            model.loss([level[part] for level in features], batch).detach_()
    for handle in handles:
        handle.remove()
    setup = time.perf_counter() - started
    epochs_seconds: list[float] = []
    for _ in range(cell["epochs"]):
        begun = time.perf_counter()
        for network, entry, gradient in calls:
            network(entry).backward(gradient)
        if device == "cuda":
            torch.cuda.synchronize()
        epochs_seconds.append(time.perf_counter() - begun)
    return {
        "seconds": time.perf_counter() - started,
        "setup_seconds": setup,
        "epochs_seconds": epochs_seconds,
        "models": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def find_weights(cell: dict[str, Any]) -> Any:
    """The backbone's weights, the same on both sides."""
    from usf.detectors import backbones

    given = cell["weights"] or ("random" if cell["backbone"] == "mcait" else None)
    return backbones.resolve(given, backbone=cell["backbone"], announce=None)


def child(text: str) -> None:
    """Measure what ``text`` (JSON) says and print one line of JSON."""
    warnings.filterwarnings("ignore")
    cell = json.loads(text)
    # Everything that either side imports is imported before the clock starts.
    import anomalib.engine
    import anomalib.models  # noqa: F401

    import usf.detectors

    _ = usf.detectors.FastflowModel
    folder = Path(cell["folder"])
    if cell["side"] == "engine":
        found = run_engine(cell, folder)
    elif cell["side"] == "networks":
        found = run_networks(cell, folder)
    else:
        found = run_fast(cell, folder)
    print("RESULT " + json.dumps(found | {"peak_mb": peak_mb()}))


# --- the measurements together ----------------------------------------------------------------------------------------


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a fresh process.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(cell)], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{cell['side']}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def copied(images: Any, target: Path) -> Path:
    """A class folder of the chosen images and masks, which both sides read (anomalib refuses links out of it)."""
    folder = target / images.name
    for kind, path in [("train/good", path) for path in images.train] + [
        (f"test/{sample.defect}", sample.path) for sample in images.test
    ]:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / kind)
    for sample in images.test:
        if sample.mask is not None:
            masks = folder / "ground_truth" / sample.defect
            masks.mkdir(parents=True, exist_ok=True)
            shutil.copy(sample.mask, masks)
    return folder


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def summary(name: str, cell: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one cell: medians over the repeats, ratios formed within a repeat."""
    rows = []
    for side, runs in found.items():
        seconds, low, high = quartiles([run["seconds"] for run in runs])
        row = {"cell": name, "side": side, "repeats": len(runs), "seconds": seconds, "seconds_q25": low}
        row |= {"seconds_q75": high, "epochs": cell["epochs"], "size": cell["size"], "backbone": cell["backbone"]}
        # The first epoch pays for what is made once.
        row["epoch_seconds"] = statistics.median(
            statistics.median(run["epochs_seconds"][1:] or run["epochs_seconds"]) for run in runs
        )
        row |= {key: statistics.median(run[key] for run in runs) for key in ("setup_seconds", "peak_mb")}
        row |= {key: runs[0].get(key) for key in ("models", "device", "threads", "image_auroc", "pixel_auroc")}
        if "engine" in found:
            pairs = list(zip(found["engine"], runs, strict=True))
            row["ratio"], row["ratio_q25"], row["ratio_q75"] = quartiles(
                [engine["seconds"] / run["seconds"] for engine, run in pairs]
            )
            row["epoch_ratio"] = statistics.median(
                statistics.median(engine["epochs_seconds"][1:] or engine["epochs_seconds"])
                / statistics.median(run["epochs_seconds"])
                for engine, run in pairs
            )
        rows.append(row)
    return rows


def run(
    out: Path,
    *,
    images: str | None,
    repeats: int,
    cells: Sequence[str] = tuple(CELLS),
    sides: Sequence[str] = SIDES,
    weights: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure, and write ``out`` (CSV) with a JSON file of each cell's provenance beside it; other cells stay.

    Args:
        out: CSV file.
        images: class folder in MVTec layout; by default bottle, or the built-in set.
        repeats: of each measurement.
        cells: of :data:`CELLS`.
        sides: of :data:`SIDES`.
        weights: safetensors file of the backbone.
        overrides: of the cells' settings.
    """
    from usf.study.images import find

    started, provenance = time.perf_counter(), records.provenance(("torch", "anomalib", "timm", "lightning"))
    beside, chosen = out.with_suffix(".json"), find(images)
    conditions: dict[str, Any] = json.loads(beside.read_text("utf8")) if beside.is_file() else {}
    rows = [row for row in (records.read_csv(out) if out.is_file() else []) if row["cell"] not in cells]
    for name in cells:
        cell: dict[str, Any] = CELLS[name] | (overrides or {}) | {"weights": weights}
        part = chosen.subset(train=cell["train"], per_kind=cell["per_kind"])
        own_sides = [side for side in sides if ONLY.get(side, name) == name]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in own_sides}
        with tempfile.TemporaryDirectory() as scratch:
            folder = copied(part, Path(scratch))
            for repeat in range(repeats):
                for side in own_sides if repeat % 2 == 0 else reversed(own_sides):
                    found[side].append(measure(cell | {"folder": str(folder), "side": side}))
                    print(f"{name} {side}: {found[side][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        shared = {
            "train_images": len(part.train),
            "test_images": len(part.test),
            "weights": find_weights(cell).describe(),
            "images": f"{part.name}: {part.source}",
            "manifest_sha256": part.manifest.sha256[:12],
            "processor": provenance["hardware"]["cpu"],
            "revision": provenance["revision"],
            "settings_hash": records.settings_hash(cell | {"seed": SEED, "batch": BATCH, "sides": own_sides}),
        }
        rows += [row | shared for row in summary(name, cell, found)]
        records.write_csv(out, rows, COLUMNS, digits=4)
        # What was measured before other cells of the same call is in the time since it started.
        until = {"wall_seconds": round(time.perf_counter() - started, 1), "load": list(os.getloadavg())}
        conditions[name] = provenance | until
        records.write_json(beside, conditions)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--images", help="class folder in MVTec layout (default: bottle, or the built-in set)")
    parser.add_argument("--weights", help="safetensors file of the backbone")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--epochs", type=int, help="for all cells")
    parser.add_argument("--train", type=int, help="training images, for all cells")
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child)
        return
    if given.out is None:
        parser.error("--out FILE is needed")
    overrides = {key: value for key in ("epochs", "train") if (value := getattr(given, key)) is not None}
    rows = run(
        given.out,
        images=given.images,
        repeats=given.repeats,
        cells=given.cells,
        sides=given.sides,
        weights=given.weights,
        overrides=overrides,
    )
    for row in rows:
        print({key: row.get(key) for key in ("cell", "side", "seconds", "epoch_seconds", "peak_mb", "ratio")})


if __name__ == "__main__":
    main()
