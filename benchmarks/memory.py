"""Memory of ``usf score``: does it grow with the number of images?

Run it from the repository::

    python benchmarks/memory.py --out data/results/benchmarks/memory.csv

A detector is made from the built-in images with the backbone weights that are found. Then folders with more and more
copies of them, as files of their own, are scored, each by ``usf score`` in a process of its own, and the largest
resident memory of that process is read from the system. ``heatmaps`` says whether it wrote those, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usf.study import records

COUNTS = (50, 200, 800)
COLUMNS = [
    "images", "heatmaps", "status", "reason", "peak_mb", "seconds", "cpu_seconds", "batch_size", "size", "threads",
    "weights", "revision", "settings_hash",
]  # fmt: skip


# Linux counts what a process was before it became another program: a small one in between has little to pass on.
STARTER = """
import json, os, sys, time
started = time.perf_counter()
child = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, used = os.wait4(child, 0)
unit = 1 if sys.platform == "darwin" else 1024
spent = {"peak_mb": used.ru_maxrss * unit / 1e6, "seconds": time.perf_counter() - started}
print(json.dumps([os.waitstatus_to_exitcode(status), spent | {"cpu_seconds": used.ru_utime + used.ru_stime}]))
"""


def measured(command: Sequence[str], threads: int) -> tuple[int, str, dict[str, float]]:
    """(exit code, what it said, megabytes and seconds) of a process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    starter = [sys.executable, "-S", "-c", STARTER, *command]
    done = subprocess.run(starter, capture_output=True, text=True, env=environment, check=True)
    code, spent = json.loads(done.stdout.splitlines()[-1])
    return code, done.stderr, spent


def run(
    out: Path,
    *,
    counts: Sequence[int] = COUNTS,
    size: int = 256,
    batch_size: int = 8,
    threads: int = 1,
    weights: str | None = None,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, and write ``out`` (CSV) with provenance beside it.

    Args:
        out: the CSV file.
        counts: images to score.
        size: of the square images inside the detector, pixels.
        batch_size: images at a time.
        threads: of every process.
        weights: of the backbone, see :func:`usf.detectors.backbones.resolve`.
        folder: for images and model, kept; by default one that is removed.

    Raises:
        ValueError: fewer than one image.
        RuntimeError: the detector could not be made.
    """
    from usf import deploy, inspection
    from usf.study import textures

    if not counts or min(counts) < 1:
        raise ValueError(f"counts {list(counts)}: at least one image is needed")
    source = textures.ensure(small=size < 128)
    settings = {"size": size, "batch_size": batch_size, "threads": threads}
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        options = inspection.Options(size=size, weights=weights, steps=3, calibration="split", alpha=0.3)
        made = inspection.inspect(inspection.survey(source / "train" / "good"), place / "report", options)
        described = deploy.load(made.model).settings["weights"]
        files = sorted(source.rglob("test/**/*.png"))
        rows = []
        for count in counts:
            images = place / f"images-{count}"
            images.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                shutil.copy(files[index % len(files)], images / f"{index:05}.png")
            for heatmaps in (False, True):
                command = [sys.executable, "-m", "usf", "score", str(made.model), str(images), "--quiet"]
                command += ["--out", str(place / "scores.csv"), "--batch-size", str(batch_size)]
                command += ["--threads", str(threads)]
                command += ["--heatmaps", str(place / "maps")] if heatmaps else []
                code, said, spent = measured(command, threads)
                row: dict[str, Any] = {"images": count, "heatmaps": int(heatmaps), **settings, "weights": described}
                row |= {"status": "ok", **spent} if code == 0 else {"status": "failed", "reason": said[-160:]}
                rows.append(
                    row | {"revision": records.git_revision(), "settings_hash": records.settings_hash(settings)}
                )
                print(f"{count} images, heatmaps {heatmaps}: {row['status']} {spent}", flush=True)
            shutil.rmtree(images)
            records.write_csv(out, rows, COLUMNS)
    packages = ("torch", "anomalib", "timm", "numpy", "pillow")
    records.write_json(out.with_suffix(".json"), {**records.provenance(packages), "settings": settings})
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="images to score")
    parser.add_argument("--size", type=int, default=256, help="of the square images, pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", help="of the backbone; by default what is found")
    given = parser.parse_args()
    run(
        given.out,
        counts=given.counts,
        size=given.size,
        batch_size=given.batch_size,
        threads=given.threads,
        weights=given.weights,
    )


if __name__ == "__main__":
    main()
