"""The grid of the benchmark: which detector is trained on which class of images, with which couplings and seeds.

This is the one place that says so. A *cell* is one (data set, class, detector): its trainings share images and
features, so that one job runs them all. The engine (``workflow/Snakefile``), the notebook (``book/runs/cell.md``) and
the table of what is done (:func:`status`) read the grid here. Nothing but the standard library is imported, because the
engine lives in an environment without torch.

>>> paper = grid("paper")
>>> len(paper.cells), len(paper.trainings)
(81, 486)

What is done, from the command line, and how what was trained becomes part of the committed records::

    python -m usf.study.grid status paper --profile full
    python -m usf.study.grid merge build/benchmark/full/records --into data/results/benchmark/records.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usf import paths

if TYPE_CHECKING:
    from usf.study.schema import Record

__all__ = [
    "DETECTORS",
    "GRIDS",
    "MVTEC",
    "PAPER",
    "VARIANTS",
    "VISA",
    "Cell",
    "Grid",
    "Row",
    "Training",
    "Variant",
    "counts",
    "given",
    "grid",
    "status",
    "variants",
    "whole_numbers",
]

DETECTORS = ("fastflow", "uflow", "cflow")

MVTEC = tuple(
    """
    bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper
    """.split()
)
"""The 15 classes of MVTec AD (table 4)."""

VISA = tuple(
    """
    candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum
    """.split()
)
"""The 12 classes of VisA (table 2)."""


@dataclasses.dataclass(frozen=True, order=True)
class Variant:
    """What a detector's flow is made of: the coupling and what mixes the channels between two of them.

    >>> Variant("additive", "lu").name
    'additive-lu'
    """

    coupling: str
    mixing: str

    @property
    def name(self) -> str:
        """``"affine"``, ``"additive"``, ``"additive-lu"``, ...; a parameter of the notebook is a list of these."""
        return self.coupling + ("-lu" if self.mixing == "lu" else "")


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("affine", "permutation"),
        Variant("affine", "lu"),
        Variant("additive", "permutation"),
        Variant("additive", "lu"),
        Variant("gin", "permutation"),
        Variant("gin", "lu"),
    )
}
"""Every variant by its name. Affine with LU is the one that the paper could not train (section 6)."""

PAPER = (VARIANTS["affine"], VARIANTS["additive-lu"])
"""The two columns of the paper's tables: base flow and uniformly scaling flow."""


def variants(names: str | Sequence[str]) -> tuple[Variant, ...]:
    """Variants by name.

    >>> [v.coupling for v in variants("affine additive-lu")]
    ['affine', 'additive']

    Raises:
        ValueError: an unknown name, a repeated one, or none.
    """
    listed = names.replace(",", " ").split() if isinstance(names, str) else list(names)
    if unknown := [name for name in listed if name not in VARIANTS]:
        raise ValueError(f"unknown variant {', '.join(map(repr, unknown))}: choose among {', '.join(VARIANTS)}")
    if not listed or len(set(listed)) != len(listed):
        raise ValueError(f"variants {listed}: name at least one, and none twice")
    return tuple(VARIANTS[name] for name in listed)


def whole_numbers(values: int | str | Sequence[int]) -> tuple[int, ...]:
    """Seeds as a person or papermill gives them: ``0``, ``"0 1 2"``, ``"0,1,2"``, ``[0, 1, 2]`` or ``"0-4"``.

    >>> whole_numbers("0-2 7")
    (0, 1, 2, 7)

    Raises:
        ValueError: anything else, a repeated number, or none.
    """
    if isinstance(values, int):
        return (values,)
    found: list[int] = []
    for part in values.replace(",", " ").split() if isinstance(values, str) else map(str, values):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise ValueError(f"{part!r} is no seed: give whole numbers and ranges, as in '0 1 2' or '0-4'")
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not found or len(set(found)) != len(found):
        raise ValueError(f"seeds {values!r}: name at least one, and none twice")
    return tuple(found)


def given(**parameters: Any) -> dict[str, Any]:
    """Settings that the parameters of a notebook ask for; an empty one (``""``) is the profile's and is left out.

    Args:
        parameters: ``epochs`` and ``size`` are whole numbers, ``trace`` is read by :func:`whole_numbers`, others stay
            as they are. Papermill hands over ``6`` as a number and ``"1 3 6"`` as text.

    >>> given(epochs=6, trace="1 3 6", size="", stopping="paper")
    {'epochs': 6, 'trace': (1, 3, 6), 'stopping': 'paper'}

    Raises:
        ValueError: a number that is none, or is below 1; names the parameter.
    """
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if value == "":
            continue
        if name == "trace":
            try:
                value = whole_numbers(value)
            except ValueError:
                raise ValueError(f"trace={value!r}: give epochs, none twice, as in '1 3 6' or '5-10'") from None
        elif name in ("epochs", "size"):
            if not re.fullmatch(r"0*[1-9]\d*", str(value)):
                raise ValueError(f"{name}={value!r}: give a whole number, at least 1, or '' for the profile's")
            value = int(value)
        found[name] = value
    return found


@dataclasses.dataclass(frozen=True, order=True)
class Training:
    """One training of the grid; a record of it has the same values in the columns of the same names."""

    dataset: str
    category: str
    detector: str
    variant: Variant
    seed: int

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """(dataset, category, detector, coupling, mixing, seed)."""
        return self.dataset, self.category, self.detector, self.variant.coupling, self.variant.mixing, self.seed


@dataclasses.dataclass(frozen=True)
class Cell:
    """One (data set, class, detector) with all its couplings and seeds: one job, one notebook, one set of features."""

    dataset: str
    category: str
    detector: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"unknown detector {self.detector!r}: choose one of {', '.join(DETECTORS)}")

    @property
    def name(self) -> str:
        """``"mvtec-bottle-fastflow"``: names the job's files."""
        return f"{self.dataset}-{self.category}-{self.detector}"

    @property
    def trainings(self) -> tuple[Training, ...]:
        """Seed by seed, so that a cell that is cut short has every coupling for some seeds."""
        return tuple(
            Training(self.dataset, self.category, self.detector, variant, seed)
            for seed, variant in itertools.product(self.seeds, self.variants)
        )


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells with a name and a word on what they are for."""

    name: str
    purpose: str
    cells: tuple[Cell, ...]

    @property
    def trainings(self) -> tuple[Training, ...]:
        """All trainings of all cells."""
        return tuple(training for cell in self.cells for training in cell.trainings)

    def cell(self, name: str) -> Cell:
        """A cell by its name.

        Raises:
            ValueError: no such cell.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise ValueError(
            f"grid {self.name} has no cell {name!r}; `python -m usf.study.grid cells {self.name}` lists them"
        )


def _cells(
    classes: Iterable[tuple[str, str]], detectors: Sequence[str], chosen: Sequence[Variant], seeds: Sequence[int]
) -> tuple[Cell, ...]:
    return tuple(
        Cell(dataset, category, detector, tuple(chosen), tuple(seeds))
        for (dataset, category), detector in itertools.product(classes, detectors)
    )


_PAPER = [("mvtec", name) for name in MVTEC] + [("visa", name) for name in VISA]
_SHARED = [("mvtec", "bottle"), ("mvtec", "pill"), ("hazelnut_toy", "hazelnut")]

GRIDS = {
    found.name: found
    for found in (
        Grid(
            "paper",
            "tables 1 to 5: 27 classes, 3 detectors, base flow and USF, 3 seeds",
            _cells(_PAPER, DETECTORS, PAPER, range(3)),
        ),
        Grid(
            "ablation",
            "section 5.3: additive coupling without LU on MVTec AD; base flow and USF are those of `paper`",
            _cells(_PAPER[: len(MVTEC)], DETECTORS, [VARIANTS["additive"]], range(3)),
        ),
        Grid(
            "shared",
            "three classes that need no download here, 3 detectors, every variant, 5 seeds",
            _cells(_SHARED, DETECTORS, list(VARIANTS.values()), range(5)),
        ),
        Grid(
            "textures",
            "the built-in images, 3 detectors, base flow and USF, 2 seeds: does everything run?",
            _cells([("textures", "weave")], DETECTORS, PAPER, range(2)),
        ),
    )
}
"""Every grid by its name."""


def grid(name: str) -> Grid:
    """A grid by its name, or one cell of it as ``NAME/CELL``.

    >>> [cell.name for cell in grid("textures/textures-weave-cflow").cells]
    ['textures-weave-cflow']

    Raises:
        ValueError: no such grid or cell.
    """
    first, _, cell = name.partition("/")
    if first not in GRIDS:
        raise ValueError(f"unknown grid {first!r}: choose one of {', '.join(GRIDS)} (or GRID/CELL for one cell of it)")
    found = GRIDS[first]
    return dataclasses.replace(found, cells=(found.cell(cell),)) if cell else found


# --- What is done -----------------------------------------------------------------------------------------------------


def folder(profile: str) -> Path:
    """Where the cells of a profile write: ``build/benchmark/PROFILE``, with ``records/``, ``cells/`` and more in it."""
    return paths.build("benchmark", profile)


@dataclasses.dataclass(frozen=True)
class Row:
    """State of one training: ``"ok"``, ``"failed"`` with the reason, or ``"missing"``.

    Attributes:
        epochs, size, settings: of the record that says so (its columns, pixels); 0 and empty without one.
    """

    training: Training
    status: str
    error: str = ""
    epochs: int = 0
    size: int = 0
    settings: str = ""


def counts(record: Record) -> bool:
    """Whether a record is of a training as grids have them: the profile's way, and none of the ablation's.

    That is the main protocol, the library's loss, a trained layer normalisation, coupling networks as they are, a fixed
    diagonal and a global scale. Profiles have folders of their own. Epochs, size and the other settings may be changed
    by hand, since what a machine can bear decides them: :func:`status` says which they were.
    """
    usual = record.train_layer_norm and record.global_scale and not record.match_parameters
    return usual and (record.protocol, record.loss, record.diagonal) == ("main", "anomalib", "fixed")


def _failures(where: Path) -> dict[str, str]:
    """Cell -> why its job died, as :mod:`usf.study.jobs` leaves it."""
    found = {}
    for path in sorted(where.glob("*.json")) if where.is_dir() else []:
        if not path.name.startswith("."):
            found[path.stem] = str(json.loads(path.read_text("utf8"))["error"])
    return found


def status(chosen: Grid, where: Path) -> list[Row]:
    """One row for each training of a grid, from the records of a profile's folder.

    A training without a record whose cell's job died counts as failed, with what the job said last: nothing that was
    tried disappears. Only records that :func:`counts` allows are looked at; of a training that was run with several
    numbers of epochs or sizes, the longest run speaks, of equally long ones that with the largest images.

    Raises:
        RecordError: a record that does not fit the schema.
    """
    from usf.study import schema

    records = schema.read(where / "records") if (where / "records").is_dir() else []
    runs: dict[tuple[str, str, str, str, str, int], dict[tuple[Any, ...], list[Record]]] = {}
    for record in filter(counts, records):
        key = (record.dataset, record.category, record.detector, record.coupling, record.mixing, record.seed)
        runs.setdefault(key, {}).setdefault(record.training, []).append(record)
    failures = _failures(where / "failures")
    rows = []
    for cell in chosen.cells:
        for training in cell.trainings:
            if found := runs.get(training.key):
                own = max(found.values(), key=lambda run: (run[0].epochs, run[0].size, max(r.started for r in run)))
                # A training has a row for each score; it is whole only if every one is.
                worst = next((record for record in own if record.status != "ok"), own[0])
                rows.append(Row(training, worst.status, worst.error, worst.epochs, worst.size, worst.settings))
            elif cell.name in failures:
                rows.append(Row(training, "failed", f"the cell's job died: {failures[cell.name]}"))
            else:
                rows.append(Row(training, "missing"))
    return rows


def _write(rows: Sequence[Row], path: Path) -> None:
    from usf.study.records import write_csv

    columns = "dataset category detector coupling mixing seed status error epochs size settings".split()
    values = [(*r.training.key, r.status, r.error, r.epochs or None, r.size or None, r.settings) for r in rows]
    write_csv(path, [dict(zip(columns, row, strict=True)) for row in values], columns)


def _report(chosen: Grid, rows: Sequence[Row]) -> Iterator[str]:
    numbers = Counter(row.status for row in rows)
    yield f"grid {chosen.name}: {len(rows)} trainings in {len(chosen.cells)} cells: " + ", ".join(
        f"{numbers[name]} {name}" for name in ("ok", "failed", "missing") if numbers[name] or name == "ok"
    )
    # Runs of one cell that differ in length or size cannot be compared: a training that was cut short shows here.
    for cell in chosen.cells:
        trainings = set(cell.trainings)
        own = Counter((r.epochs, r.size, r.settings) for r in rows if r.epochs and r.training in trainings)
        if len(own) > 1:
            said = (
                f"{n} of {epochs} epochs at {size} pixels ({name})" for (epochs, size, name), n in sorted(own.items())
            )
            yield f"  unlike each other: {cell.name}: {', '.join(said)}"
    for row in rows:
        if row.status == "failed":
            training = row.training
            name = f"{training.dataset}-{training.category}-{training.detector}"
            yield f"  failed: {name} {training.variant.name} seed {training.seed}: {row.error}"


def _merge(parser: argparse.ArgumentParser, source: Path, target: Path) -> int:
    from usf.study import schema

    try:
        found = schema.read(source)
        if not found:
            raise FileNotFoundError(f"no records in {source}: run a cell of the benchmark, or give the right folder")
        schema.merge(source, target)
    except (FileNotFoundError, schema.RecordError) as error:
        parser.error(str(error))
    merged = {record.training for record in found}
    total = {record.training for record in schema.read(target)}
    print(f"{len(merged)} trainings merged; {len(total)} trainings in {target}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. ``status`` exits with 1 where a training failed or is missing, ``merge`` with 2 where
    there is nothing to merge."""
    parser = argparse.ArgumentParser(prog="python -m usf.study.grid", description="The grid of the benchmark.")
    parts = parser.add_subparsers(dest="command", required=True)
    cells = parts.add_parser("cells", help="list the trainings of a grid, as CSV")
    done = parts.add_parser("status", help="what of a grid is done; writes status.csv and records.csv")
    for part in (cells, done):
        part.add_argument("grid", help=f"{', '.join(GRIDS)}, or GRID/CELL")
    done.add_argument("--profile", default="full", help="smoke, book or full")
    done.add_argument("--folder", type=Path, help="where the records are; default build/benchmark/PROFILE")
    gather = parts.add_parser("merge", help="gather a folder of records into a CSV file, beside what is in it")
    gather.add_argument("folder", type=Path, help="as build/benchmark/book/records")
    gather.add_argument("--into", type=Path, help="by default data/results/benchmark/records.csv")
    options = parser.parse_args(arguments)
    if options.command == "merge":
        return _merge(parser, options.folder, options.into or paths.results("benchmark", "records.csv"))
    try:
        chosen = grid(options.grid)
    except ValueError as error:
        parser.error(str(error))
    if options.command == "cells":
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(("dataset", "category", "detector", "coupling", "mixing", "seed"))
        out.writerows(training.key for training in chosen.trainings)
        return 0
    where = options.folder or folder(options.profile)
    rows = status(chosen, where)
    _write(rows, where / "status.csv")
    if (where / "records").is_dir():
        from usf.study.schema import merge

        merge(where / "records", where / "records.csv")
    print(*_report(chosen, rows), sep="\n")
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
