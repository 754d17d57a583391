"""What the committed records say about themselves: machine, hours, seeds, versions, revision; and what they do not say.

A file of records in ``data/results/`` tells where it comes from in one of three ways: in its rows (columns
``revision``, ``versions``, ``hardware``, ``started``); by a column ``run`` whose values are keys of a JSON file in its
folder; or by a JSON file about the whole file (``NAME.json``, ``NAME-provenance.json`` or ``provenance.json``). A file
without any of them is listed, not left out.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usf import paths
from usf.study import schema

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Origin", "RecordFile", "dependencies", "inputs", "read", "table", "unbroken", "versions", "without_origin"]

_SETTINGS = ("epochs", "settings_hash", "run")
"""Columns that belong to a run wherever they stand; of a file with a row an epoch, so do all that stand before it."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where some records come from.

    Attributes:
        revision: of the code; a ``+`` at its end says that ``src/`` had changes that were not committed.
        versions: package -> version.
        hardware: the machine in words.
        started: UTC, ISO 8601; empty where it was not noted.
        seeds: named by the settings.
        wall_seconds: of everything in the file, where that was measured as a whole.
    """

    revision: str
    versions: Mapping[str, str]
    hardware: str
    started: str = ""
    seeds: tuple[int, ...] = ()
    wall_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """One CSV file of records.

    Attributes:
        name: path below ``data/results``.
        rows: lines.
        runs, failed: runs of all outcomes, and those that failed. Rows that are scores or epochs of one training are
            one run; rows with neither a time nor an outcome are none.
        seconds: wall time of all runs, the failed ones included; ``None`` where none was recorded.
        seconds_failed: of the failed ones among them.
        origins: different ones, in order of appearance.
        orphans: rows without an origin.
        seeds: in the column ``seed``.
    """

    name: str
    rows: int
    runs: int
    failed: int
    seconds: float | None
    seconds_failed: float
    origins: tuple[Origin, ...]
    orphans: int
    seeds: tuple[int, ...]


def _machine(hardware: Any) -> str:
    if not isinstance(hardware, Mapping):
        return str(hardware or "")
    gpu = "" if hardware.get("gpu") in (None, "none") else f", {hardware['gpu']}"
    return f"{hardware.get('cpu', '')}, {hardware.get('cores', '?')} cores{gpu}"


def _versions(text: Any) -> dict[str, str]:
    """From a mapping, or from ``"python 3.11.7; torch 2.11.0"``."""
    if isinstance(text, Mapping):
        return {str(name): str(version) for name, version in text.items()}
    pairs = (part.split() for part in str(text or "").split(";") if part.strip())
    return {pair[0]: pair[-1] for pair in pairs}


def _seeds(settings: Any) -> tuple[int, ...]:
    found = settings if isinstance(settings, Mapping) else {}
    listed = found.get("seeds", found.get("seed", ()))
    return tuple(int(seed) for seed in (listed if isinstance(listed, list | tuple) else [listed]))


def _origin(entry: Mapping[str, Any]) -> Origin:
    wall = entry.get("wall_seconds")
    return Origin(
        revision=str(entry["revision"]),
        versions=_versions(entry.get("versions")),
        hardware=_machine(entry.get("hardware")),
        started=str(entry.get("started") or ""),
        seeds=_seeds(entry.get("settings")),
        wall_seconds=None if wall is None else float(wall),
    )


def _beside(path: Path) -> tuple[Origin | None, dict[str, Origin]]:
    """(origin of the whole file, origins by run) from the JSON files that may speak of a CSV file."""
    runs: dict[str, Origin] = {}
    names = (f"{path.stem}.json", f"{path.stem}-provenance.json", "provenance.json")
    for file in (path.with_name(name) for name in names):
        if not file.is_file():
            continue
        content = json.loads(file.read_text("utf8"))
        if not isinstance(content, Mapping):
            continue
        if "revision" in content:
            return _origin(content), runs
        entries = {key: value for key, value in content.items() if isinstance(value, Mapping) and "revision" in value}
        runs |= {key: _origin(value) for key, value in entries.items() if key not in runs}
    return (next(iter(runs.values())) if len(runs) == 1 else None), runs


def _identity(columns: Sequence[str]) -> tuple[str, ...] | None:
    """Columns that name a run where a run has several rows; ``None`` where each row is one."""
    if {"settings", "score", "detector"} <= set(columns):
        return tuple(name for name in schema.TRAINING if name in columns)
    if {"epoch", "epochs"} <= set(columns):
        before = columns[: columns.index("epoch")]
        return tuple(name for name in columns if name in before or name in _SETTINGS)
    return None


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _record_file(path: Path, folder: Path) -> RecordFile:
    with path.open(newline="", encoding="utf8") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
        columns = list(reader.fieldnames or ())
    whole, by_run = _beside(path)
    origins: dict[str, Origin] = {}
    orphans = 0
    for row in rows:
        if {"revision", "versions", "hardware"} <= set(columns):
            origin: Origin | None = _origin({**row, "started": (row.get("started") or "")[:10]})
        elif by_run and row.get("run"):
            origin = by_run.get(row["run"])
        else:
            origin = whole
        if origin is None:
            orphans += 1
        else:
            origins.setdefault(repr(origin), origin)
    identity = _identity(columns)
    seconds: dict[tuple[str, ...], float] = {}
    fine: dict[tuple[str, ...], bool] = {}
    for index, row in enumerate(rows):
        key = (str(index),) if identity is None else tuple(row[name] for name in identity)
        seconds[key] = max(seconds.get(key, 0.0), _number(row.get("seconds")))
        fine[key] = fine.get(key, True) and row.get("status", "ok") == "ok"
    timed = whole.wall_seconds if whole is not None else None
    if timed is None and "seconds" in columns:
        timed = sum(seconds.values())
    return RecordFile(
        name=path.relative_to(folder).as_posix(),
        rows=len(rows),
        runs=len(fine) if {"seconds", "status"} & set(columns) else 0,
        failed=sum(not ok for ok in fine.values()),
        seconds=timed,
        seconds_failed=sum(seconds[key] for key, ok in fine.items() if not ok),
        origins=tuple(origins.values()),
        orphans=orphans,
        seeds=tuple(sorted({int(_number(row["seed"])) for row in rows if row.get("seed")})),
    )


def read(folder: Path | None = None) -> list[RecordFile]:
    """Every CSV file below a folder, in the order of their names.

    Args:
        folder: by default ``data/results``.

    Raises:
        FileNotFoundError: outside the repository, when no folder is given.
    """
    where = paths.results() if folder is None else folder
    return [_record_file(path, where) for path in sorted(where.rglob("*.csv"))]


def without_origin(files: Iterable[RecordFile]) -> list[str]:
    """Files with rows that do not say where they come from."""
    return [f"{file.name} ({file.orphans} of {file.rows} rows)" for file in files if file.orphans]


def _shortened(values: Iterable[str], most: int = 3) -> str:
    listed = list(dict.fromkeys(value for value in values if value))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _seeds_in_words(file: RecordFile) -> str:
    named = sorted({seed for origin in file.origins for seed in origin.seeds})
    small = [seed for seed in file.seeds if seed < 1000]
    if len(file.seeds) > len(small):  # made from one seed and the run's name
        from_ = f" from {', '.join(map(str, named))}" if named else ""
        return f"{len(file.seeds)} derived{from_}"
    return ", ".join(map(str, file.seeds or named))


def table(files: Iterable[RecordFile]) -> pd.DataFrame:
    """A row a file that knows its origin: runs, failures, hours, seeds, dates, machine, revision.

    Hours are wall time of all runs, the failed ones included; what a file did not record is empty.
    """
    import pandas as pd

    rows = []
    for file in files:
        if not file.origins:
            continue
        days = sorted(origin.started[:10] for origin in file.origins if origin.started)
        rows.append(
            {
                "file": file.name,
                "rows": file.rows,
                "runs": file.runs,
                "failed": file.failed,
                "hours": float("nan") if not file.seconds else file.seconds / 3600,
                "seeds": _seeds_in_words(file),
                "day": _shortened(dict.fromkeys((days[0], days[-1])) if days else ()),
                "machine": _shortened(origin.hardware for origin in file.origins),
                "revision": _shortened(origin.revision for origin in file.origins),
            }
        )
    return pd.DataFrame(rows)


def unbroken(days: str) -> str:
    """Days of `table` as HTML in which no line ends inside a date.

    >>> unbroken("2026-11-23, 2026-11-24").count("nowrap")
    2
    """
    return ", ".join(f'<span style="white-space: nowrap">{day}</span>' for day in days.split(", "))


def versions(files: Iterable[RecordFile]) -> pd.DataFrame:
    """Package -> the versions that the records were measured with, and how many files say so."""
    import pandas as pd

    found: dict[str, dict[str, set[str]]] = {}
    for file in files:
        for origin in file.origins:
            for name, version in origin.versions.items():
                found.setdefault(name, {}).setdefault(version, set()).add(file.name)
    rows = [
        {
            "package": name,
            "versions": ", ".join(sorted(by_version)),
            "files": len(set().union(*by_version.values())),
        }
        for name, by_version in sorted(found.items())
    ]
    return pd.DataFrame(rows)


def inputs() -> pd.DataFrame:
    """Images and weights: what, licence, and the hash that names the content. None of it is part of the repository."""
    import pandas as pd

    from usf.detectors.backbones import PINNED
    from usf.study import textures
    from usf.study.catalogue import DATASETS
    from usf.study.images import SOURCES

    rows = []
    for dataset in DATASETS.values():
        name, _, licence = dataset.title.rpartition(", ")
        rows.append({"what": name, "kind": "images", "licence": licence, "sha256": dataset.sha256[:12]})
    for key, title in SOURCES:
        if key == "textures":
            row = {"what": title, "kind": "images", "licence": "BSD-3-Clause, as the code that draws them"}
            rows.append({**row, "sha256": textures.SHA256[False][:12]})
        else:
            name, _, licence = title.rpartition(", ")
            rows.append({"what": name, "kind": "images", "licence": licence, "sha256": "not published"})
    rows += [
        {"what": pinned.tag, "kind": "weights", "licence": pinned.licence, "sha256": pinned.sha256[:12]}
        for pinned in PINNED.values()
    ]
    return pd.DataFrame(rows)


def _licence(metadata: Mapping[str, Any], text: str = "") -> str:
    """From package metadata in their JSON form, or the title of the licence's text."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    classifiers = [text for text in metadata.get("classifier") or () if text.startswith("License ::")]
    if names := [text.split(" :: ")[-1] for text in classifiers if not text.endswith(":: OSI Approved")]:
        return ", ".join(names)
    lines = [*str(metadata.get("license") or "").strip().splitlines(), *text.strip().splitlines()]
    return lines[0].strip()[:60] if lines else "not stated"


def _licence_text(name: str) -> str:
    """The first licence file that an installed package brings; empty where it brings none."""
    files = importlib.metadata.files(name) or ()
    found = [file for file in files if re.fullmatch(r"(LICEN[CS]E|COPYING)(\.\w+)?", file.name, re.IGNORECASE)]
    return found[0].read_text("utf8") if found else ""


def dependencies(package: str = "usf") -> pd.DataFrame:
    """The packages that a package asks for: installed version and licence, as their metadata state them.

    Raises:
        importlib.metadata.PackageNotFoundError: when the package is not installed.
    """
    import pandas as pd

    names: dict[str, str] = {}
    for requirement in importlib.metadata.requires(package) or ():
        name = re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        names.setdefault(name, extra[1] if extra else "always")
    rows = []
    for name in sorted(names, key=str.lower):
        try:
            metadata, text = importlib.metadata.metadata(name).json, _licence_text(name)
        except importlib.metadata.PackageNotFoundError:
            metadata, text = {"version": "not installed"}, ""
        found = {"version": metadata["version"], "licence": _licence(metadata, text)}
        rows.append({"package": name, "needed": names[name], **found})
    return pd.DataFrame(rows)
