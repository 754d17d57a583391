"""Records of measurements: written at once, whole or not at all, with what is needed to know where they come from.

A study keeps one small JSON file a run while it goes on, so that a killed study continues, and gathers them into one
CSV file that is committed. Provenance that many rows share (revision, versions, hardware) is stored once, in a JSON
file beside the CSV, under a key that every row carries.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from usf import paths
from usf.files import atomic_write

__all__ = [
    "git_revision",
    "hardware",
    "provenance",
    "read_csv",
    "settings_hash",
    "write_csv",
    "write_json",
]


def _plain(value: Any) -> Any:
    """JSON-able form: dataclasses as mappings, non-finite floats as strings (JSON has no word for them)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a record holds numbers, strings and their containers, not {type(value).__name__}")


def write_json(path: Path, value: Any) -> Path:
    """Write a mapping or dataclass as JSON, atomically, with sorted keys."""
    return atomic_write(path, json.dumps(_plain(value), indent=1, sort_keys=True) + "\n")


def settings_hash(settings: Any) -> str:
    """Twelve hexadecimal digits that name a set of settings (mapping or dataclass), whatever the order of its keys.

    >>> settings_hash({"lr": 0.1, "blocks": 2}) == settings_hash({"blocks": 2, "lr": 0.1})
    True
    """
    text = json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf8")).hexdigest()[:12]


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return str(value)


def write_csv(
    path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, *, digits: int = 7
) -> Path:
    """Write rows as CSV, atomically.

    Args:
        path: the file.
        rows: mappings; a missing key or ``None`` is an empty cell.
        columns: their order; by default the keys in order of first appearance. A key that is no column is an error.
        digits: significant digits of floats.

    Raises:
        ValueError: for a key outside ``columns``.
    """
    listed = list(rows)
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in listed for key in row))
    lines: list[list[str]] = [names]
    for row in listed:
        if unknown := set(row) - set(names):
            raise ValueError(f"{path.name} has no columns {sorted(unknown)}; its columns are {names}")
        lines.append([_cell(row.get(name), digits) for name in names])
    from io import StringIO

    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return atomic_write(path, buffer.getvalue())


def _parse(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file with numbers as numbers and empty cells as ``None``.

    Raises:
        FileNotFoundError: when there is no such file, saying how records are made.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no records at {path.name}: run the study that writes them (see its module's docstring)"
        )
    with path.open(newline="", encoding="utf8") as stream:
        return [{key: _parse(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def _git(*arguments: str) -> str | None:
    root = paths.root()
    if root is None:
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_revision() -> str:
    """Revision of the code, with ``+`` where ``src/`` differs from it; ``"unknown"`` outside a repository."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+" if _git("status", "--porcelain", "--", "src") else "")


@functools.cache
def hardware() -> dict[str, str | int]:
    """Processor, cores and accelerator of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": model, "cores": os.cpu_count() or 0, "gpu": gpu}


def provenance(packages: Sequence[str] = ("torch", "numpy", "scipy")) -> dict[str, Any]:
    """What every record of a run shares: revision, versions, hardware, system, time of start (UTC)."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "revision": git_revision(),
        "versions": versions,
        "hardware": hardware(),
        "system": platform.system(),
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
