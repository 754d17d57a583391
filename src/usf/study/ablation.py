"""What does the work? Couplings and mixings, crossed with repairs of what the libraries do (paper, section 5.3).

A factorial: coupling {affine, additive, GIN} x mixing {permutation, LU}, each trained in three ways (:data:`TRAININGS`)
and each training scored in every way; a :data:`CONDITIONS` is a way of training with a way of scoring. Trainings that
the benchmark has on record are the same runs and are not repeated::

    python -m usf.study.ablation run mvtec pill fastflow --seeds 0-2 --epochs 6
    python -m usf.study.ablation merge

runs the factorial on one class, one file of records a training, resumable like a cell of the benchmark, and gathers
the files into ``data/results/ablation/records.csv``. A training that fails is a row.

Every effect here is a contrast: a weighted sum of the AUROC of trainings that share a class, a detector and a seed.
Its interval is Student's over seeds, so that it speaks of other seeds on the same class and of nothing else.

>>> from usf.study.schema import example
>>> runs = [
...     example(coupling=c, mixing=m, seed=s, loss="anomalib", score="anomalib", image_auroc=a + 0.01 * s)
...     for (c, m), a in {("affine", "permutation"): 0.9, ("additive", "lu"): 0.95}.items()
...     for s in range(3)
... ]
>>> table = effects(frame(runs), {"USF": usf_advantage("library")}, "image")
>>> print(f"{table.estimate[0]:.1f} points over {table.seeds[0]} seeds")
5.0 points over 3 seeds
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from usf import paths
from usf.study import grid, schema, statistics
from usf.study.schema import Record

if TYPE_CHECKING:
    import pandas as pd

    from usf.study import benchmark
    from usf.study.images import ImageFolder

# torch, anomalib and pandas are imported where they are used: a chapter reads records, the engine lists trainings.

__all__ = [
    "CONDITIONS",
    "CONTRASTS",
    "TRAININGS",
    "VARIANTS",
    "Condition",
    "Training",
    "differences",
    "effects",
    "frame",
    "load",
    "lock",
    "outcomes",
    "paper_differences",
    "repairs",
    "run",
    "steps",
    "usf_advantage",
]


@dataclasses.dataclass(frozen=True)
class Training:
    """A way of training: columns of a record, and what is repaired by it."""

    loss: schema.Loss
    train_layer_norm: bool
    repairs: str


TRAININGS: dict[str, Training] = {
    "library": Training("anomalib", True, "nothing: as the library does"),
    "likelihood": Training("mle", True, "the loss is the negative log-likelihood"),
    "frozen": Training("anomalib", False, "the layer normalisation before the flow is not trained"),
}
"""Ways of training by name. CFlow has no layer normalisation to freeze."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A way of training and a way of scoring what came of it."""

    training: str
    score: schema.Score


CONDITIONS: dict[str, Condition] = {
    "library": Condition("library", "anomalib"),
    "score": Condition("library", "log_prob"),
    "loss": Condition("likelihood", "anomalib"),
    "norm": Condition("frozen", "anomalib"),
    "loss and score": Condition("likelihood", "log_prob"),
}
"""The library's baseline, one repair at a time, and loss and score together. ``"score"`` is the same trained models as
``"library"``, ranked by their log-likelihood instead of the library's map."""

VARIANTS = ("affine", "affine + LU", "additive", "additive + LU", "gin", "gin + LU")
"""The factorial's flows, as :attr:`usf.study.schema.Record.variant` names them."""
BASE, USF = "affine", "additive + LU"

CLASS = ["dataset", "category", "detector"]
Weights = Mapping[tuple[str, str], float]
"""(condition, variant) -> weight in a contrast."""


# --- Running ----------------------------------------------------------------------------------------------------------


def trainings(detector: str, names: Sequence[str] = tuple(TRAININGS)) -> list[str]:
    """Those ways of training that are different ones for a detector.

    Raises:
        ValueError: an unknown name.

    >>> trainings("cflow")
    ['library', 'likelihood']
    """
    if unknown := [name for name in names if name not in TRAININGS]:
        raise ValueError(f"unknown training {', '.join(map(repr, unknown))}: choose among {', '.join(TRAININGS)}")
    return [name for name in names if TRAININGS[name].train_layer_norm or detector != "cflow"]


def run(
    cell: benchmark.Cell,
    images: ImageFolder,
    folder: Path,
    *,
    names: Sequence[str] = tuple(TRAININGS),
    on_outcome: Callable[[str, benchmark.Outcome], None] | None = None,
    **options: Any,
) -> list[Record]:
    """All trainings of a cell in every way of training, but for those that are on record.

    Seed by seed, so that what was stopped has every way of training for some seeds.

    Args:
        cell: of the benchmark; its loss and whether it trains the normalisation are set here.
        images, folder: as in :func:`usf.study.benchmark.run_cell`.
        names: of :data:`TRAININGS`.
        on_outcome: called after each training with the way it was trained.
        options: of :func:`usf.study.benchmark.run_cell`; with ``elsewhere`` the benchmark's records are used again.

    Returns:
        records, old and new.
    """
    from usf.study import benchmark

    found: list[Record] = []
    for seed, name in itertools.product(cell.seeds, trainings(cell.detector, names)):
        way = TRAININGS[name]
        part = dataclasses.replace(cell, seeds=(seed,), loss=way.loss, train_layer_norm=way.train_layer_norm)

        def report(outcome: benchmark.Outcome, name: str = name) -> None:
            if on_outcome is not None:
                on_outcome(name, outcome)

        found += benchmark.run_cell(part, images, folder, on_outcome=report, **options)
    return found


# --- Reading ----------------------------------------------------------------------------------------------------------


def load(folders: Iterable[Path] | None = None) -> list[Record]:
    """Records of the ablation and of the benchmark, the trace's rows left out; none where there are none.

    Args:
        folders: by default ``data/results/ablation`` and ``data/results/benchmark``.

    Raises:
        RecordError: a record that does not fit the schema.
    """
    if folders is None:
        folders = [paths.results("ablation"), paths.results("benchmark")]
    records = [record for folder in folders if folder.is_dir() for record in schema.read(folder)]
    return [record for record in schema.latest(records) if record.protocol == "main"]


def _setting(record: Record) -> tuple[Any, ...]:
    """What all runs that are compared have in common."""
    return (
        record.profile, record.backbone, record.layers, record.size, record.epochs, record.settings, record.diagonal,
        record.global_scale, record.weights_sha256, record.manifest_sha256,
    )  # fmt: skip


def comparable(records: Iterable[Record]) -> list[Record]:
    """The records of one setting for each class and detector: the one with the most trainings, of equal ones the
    longest. Images and backbone weights are part of it."""
    groups: dict[tuple[str, str, str], dict[tuple[Any, ...], list[Record]]] = {}
    for record in records:
        own = groups.setdefault((record.dataset, record.category, record.detector), {})
        own.setdefault(_setting(record), []).append(record)

    def size(group: list[Record]) -> tuple[int, int, str]:
        return len({record.training for record in group}), group[0].epochs, str(group[0])

    return [record for settings in groups.values() for record in max(settings.values(), key=size)]


FRAME = (*CLASS, "variant", "matched", "condition", "seed", "failed", "error", "image", "pixel", "parameters")


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each trained model and condition: what it reached.

    Args:
        records: of :func:`load`; of several settings of a class and detector the one with the most trainings is used.

    Returns:
        columns ``dataset, category, detector, variant``, ``matched`` (coupling networks widened to the affine ones'
        size), ``condition, seed, failed, error``, ``image, pixel`` (AUROC, percent; empty where it failed),
        ``parameters``.
    """
    import pandas as pd

    rows = []
    for record in comparable(records):
        for name, condition in CONDITIONS.items():
            way = TRAININGS[condition.training]
            same = (record.loss, record.train_layer_norm, record.score)
            if same != (way.loss, way.train_layer_norm, condition.score) or record.variant not in VARIANTS:
                continue
            areas = [None if value is None else 100 * value for value in (record.image_auroc, record.pixel_auroc)]
            failed = record.status == "failed"
            own = (record.dataset, record.category, record.detector, record.variant, record.match_parameters, name)
            rows.append((*own, record.seed, failed, record.error, *areas, record.parameters))
    table = pd.DataFrame(rows, columns=list(FRAME))
    return table.astype({"image": float, "pixel": float, "matched": bool, "failed": bool, "seed": int})


# --- Contrasts --------------------------------------------------------------------------------------------------------


def usf_advantage(condition: str, variant: str = USF, base: str = BASE) -> Weights:
    """A variant minus the affine flow, both under one condition."""
    return {(condition, variant): 1.0, (condition, base): -1.0}


def _factorial(condition: str) -> dict[str, Weights]:
    def main(coupling: str) -> Weights:
        signs = ((coupling, 0.5), ("affine", -0.5))
        return {(condition, name + lu): weight for name, weight in signs for lu in ("", " + LU")}

    def with_lu(coupling: str) -> Weights:
        signs = ((coupling, 1.0), ("affine", -1.0))
        return {(condition, name + lu): w * s for name, w in signs for lu, s in (("", -1.0), (" + LU", 1.0))}

    third = 1 / 3
    return {
        "additive": main("additive"),
        "GIN": main("gin"),
        "LU": {(condition, name): third if name.endswith("LU") else -third for name in VARIANTS},
        "additive x LU": with_lu("additive"),
        "GIN x LU": with_lu("gin"),
    }


CONTRASTS: dict[str, dict[str, Weights]] = {condition: _factorial(condition) for condition in CONDITIONS}
"""By condition, the factorial's effects: of a coupling instead of the affine one, mean over both mixings; of LU, mean
over the three couplings; and how much more LU does with another coupling than with the affine one (an interaction:
zero where the effects add up)."""


def differences(condition: str = "library") -> dict[str, Weights]:
    """Each variant minus the affine flow with permutations: figure 7's quantities."""
    return {variant: usf_advantage(condition, variant) for variant in VARIANTS if variant != BASE}


def steps(condition: str = "library") -> dict[str, Weights]:
    """The paper's two steps and their sum: the coupling replaced, LU added, both (section 5.3)."""
    return {
        "additive": usf_advantage(condition, "additive"),
        "LU added": usf_advantage(condition, USF, "additive"),
        "together": usf_advantage(condition),
    }


def repairs(variants: Sequence[str] = VARIANTS) -> dict[str, Weights]:
    """Each repair minus the library's own way, for each variant: ``"affine, score"``, ..."""
    return {
        f"{variant}, {condition}": {(condition, variant): 1.0, ("library", variant): -1.0}
        for variant in variants
        for condition in CONDITIONS
        if condition != "library"
    }


def effects(table: pd.DataFrame, contrasts: Mapping[str, Weights], level: str) -> pd.DataFrame:
    """Contrasts on every class and detector that has the runs for them, paired by seed.

    A seed counts where every training that the contrast needs is on record; where one of them failed there is no
    number, and the seed is counted as failed.

    Args:
        table: from :func:`frame`; parameter-matched models are left out.
        contrasts: by name.
        level: ``"image"`` or ``"pixel"``.

    Returns:
        one row for each class, detector and contrast with at least one seed: ``dataset, category, detector, effect,
        level, seeds, failed, values`` (a tuple, one a seed), ``estimate`` (their mean), ``low, high`` (Student's 95 %
        interval; empty for fewer than two seeds), ``sd_change`` (for a difference of two models: the first's standard
        deviation over these seeds minus the second's); percent points.

    Raises:
        ValueError: another level.
    """
    import pandas as pd

    if level not in ("image", "pixel"):
        raise ValueError(f"level={level!r}: choose image or pixel")
    names = [*CLASS, "effect", "level", "seeds", "failed", "values", "estimate", "low", "high", "sd_change"]
    rows = []
    for key, own in table[~table["matched"]].groupby(CLASS, sort=False):
        values: dict[tuple[str, str], dict[int, float]] = {}
        for row in own.to_dict("records"):
            values.setdefault((row["condition"], row["variant"]), {})[row["seed"]] = row[level]
        for name, weights in contrasts.items():
            if row_values := _contrast(values, weights):
                dataset, category, detector = key
                start = {"dataset": dataset, "category": category, "detector": detector, "effect": name}
                rows.append({**start, "level": level, **row_values})
    return pd.DataFrame(rows, columns=names)


def _contrast(values: Mapping[tuple[str, str], Mapping[int, float]], weights: Weights) -> dict[str, Any]:
    """One contrast on one class; empty where no seed has all the trainings."""
    if any(cell not in values for cell in weights):
        return {}
    tried = sorted(set.intersection(*(set(values[cell]) for cell in weights)))
    # A failed training is a NaN, and a sum with one is a NaN.
    seeds = [seed for seed in tried if all(values[cell][seed] == values[cell][seed] for cell in weights)]
    if not tried:
        return {}
    sums = [sum(weight * values[cell][seed] for cell, weight in weights.items()) for seed in seeds]
    found: dict[str, Any] = {"seeds": len(seeds), "failed": len(tried) - len(seeds), "values": tuple(sums)}
    if seeds:
        found["estimate"] = sum(sums) / len(sums)
    if len(seeds) > 1:
        interval = statistics.student_interval(sums)
        found |= {"low": interval.low, "high": interval.high}
        if sorted(weights.values()) == [-1.0, 1.0]:
            first, second = sorted(weights, key=lambda cell: -weights[cell])
            spreads = [_sd([values[cell][seed] for seed in seeds]) for cell in (first, second)]
            found["sd_change"] = spreads[0] - spreads[1]
    return found


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def outcomes(table: pd.DataFrame) -> list[str]:
    """What does the work, and does it survive the repairs? A sentence for each detector and level that was run.

    Args:
        table: from :func:`frame`.
    """
    from usf.study.paper import DETECTORS

    said = []
    for detector, level in itertools.product(DETECTORS, ("image", "pixel")):
        own = table[table["detector"] == detector]
        if len(own) and (sentence := _outcome(own, level)):
            said.append(f"{DETECTORS[detector]}, {level} AUROC: {sentence}")
    return said


def _outcome(own: pd.DataFrame, level: str) -> str:
    """Of one detector; empty where no class has both steps."""
    found = effects(own, steps(), level).dropna(subset=["estimate"])
    by_class = found.pivot_table(index=CLASS, columns="effect", values="estimate", sort=False)
    by_class = by_class.reindex(columns=list(steps())).dropna()
    if by_class.empty:
        return ""
    parts = [f"{name} " + ", ".join(f"{value:+.1f}" for value in by_class[name]) for name in steps()]
    sentence = f"{'; '.join(parts)} ({', '.join(category for _, category, _ in by_class.index)})."
    repaired = {name: usf_advantage(name) for name in CONDITIONS if name != "library"}
    ways = effects(own, repaired, level).dropna(subset=["estimate"])
    kept = []
    for row in by_class.reset_index().to_dict("records"):
        dataset, category, total = row["dataset"], row["category"], row["together"]
        values = ways.loc[(ways["dataset"] == dataset) & (ways["category"] == category), "estimate"]
        if len(values) and abs(total) >= 0.05:  # what is printed as zero has no sign
            kept.append(f"{int((values * total > 0).sum())} of {len(values)} on {category}")
    if kept:
        sentence += f" Together keeps its sign under the repairs that were run: {', '.join(kept)}."
    return sentence


def paper_differences() -> pd.DataFrame:
    """Figure 7 as far as it is printed: differences to the affine baseline on MVTec AD, percent points.

    Class by class for additive + LU, from tables 4 and 5; for additive couplings alone the text of section 5.3 has the
    averages over classes at image level, and nothing else of the figure is printed.

    Returns:
        columns ``detector, variant, level, category`` (``"average"`` for an average), ``mean, sd``: the changes of the
        mean and of the standard deviation over runs.

    Raises:
        FileNotFoundError: outside the repository.
    """
    import pandas as pd

    from usf.study import paper

    classes = paper.differences()
    classes = classes[classes["dataset"] == "mvtec"]
    table = pd.DataFrame(
        {
            "detector": classes["detector"],
            "variant": USF,
            "level": classes["level"],
            "category": classes["category"],
            "mean": classes["difference"],
            "sd": (classes["sd_usf"] - classes["sd_base"]).round(9),
        }
    )
    average = table.groupby(["detector", "variant", "level"], as_index=False)[["mean", "sd"]].mean()
    printed = pd.read_csv(paths.data("paper", "ablation.csv"))
    alone = printed[printed["variant"] != USF]
    return pd.concat([table, average.assign(category="average"), alone.assign(category="average")], ignore_index=True)


# --- Command line -----------------------------------------------------------------------------------------------------


def folder(profile: str) -> Path:
    """Where the trainings of a profile write: ``build/ablation/PROFILE``, with ``records/`` in it."""
    return paths.build("ablation", profile)


def lock(out: Path, dataset: str, category: str, detector: str) -> Path:
    """What whoever trains a cell into the folder of records ``out`` holds, command line and notebook alike.

    It lies in that folder, so that two ways of naming one folder still keep each other out.
    """
    return out / ".locks" / f"{dataset}-{category}-{detector}.lock"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m usf.study.ablation", description="The factorial of couplings, mixings and repairs."
    )
    parts = parser.add_subparsers(dest="command", required=True)
    runs = parts.add_parser(
        "run",
        help="train what is not on record, on one class",
        epilog="Stop it whenever you like, and start it again with the same arguments: it goes on where it was.",
    )
    runs.add_argument("dataset", help="mvtec, hazelnut_toy, textures, or a name of your own with --images")
    runs.add_argument("category", help="the class, as its folder is called")
    runs.add_argument("detector", choices=grid.DETECTORS)
    runs.add_argument("--trainings", nargs="+", default=list(TRAININGS), help=", ".join(TRAININGS))
    runs.add_argument("--variants", nargs="+", default=list(grid.VARIANTS), help=", ".join(grid.VARIANTS))
    runs.add_argument("--seeds", nargs="+", default=["0-2"], help="as in: 0 1 2, or 0-4")
    runs.add_argument("--profile", default="book", choices=get_args(schema.Profile))
    runs.add_argument("--images", help="folder of the class, in MVTec layout")
    runs.add_argument("--weights", help="a safetensors file, 'hub' or 'random'; by default what is found")
    runs.add_argument("--elsewhere", type=Path, nargs="*", help="records to use again; data/results/benchmark")
    runs.add_argument("--cache", type=Path, help="folder of the feature cache; by default the user's")
    runs.add_argument("--retry-failed", action="store_true", help="train again what has failed before")
    runs.add_argument("--quiet", action="store_true", help="no bars")
    runs.add_argument("--match-parameters", action="store_true", help="additive networks as large as the affine ones")
    for name in ("size", "epochs", "batch-size"):
        runs.add_argument(f"--{name}", type=int, help="instead of the profile's")
    runs.add_argument("--trace", nargs="+", help="epochs after which to score the test images, as in: 1 2 5-10")
    runs.add_argument("--model", type=json.loads, help="arguments of the detector's model, as JSON")
    gather = parts.add_parser("merge", help="gather files of records into one CSV file")
    gather.add_argument("--into", type=Path, help="by default data/results/ablation/records.csv")
    for part in (runs, gather):
        part.add_argument("--out", type=Path, help="folder of the records; by default build/ablation/book/records")
    return parser


def _stop(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. ``run`` exits with 1 where a training failed."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "merge":
        target = schema.merge(
            given.out or folder("book") / "records", given.into or paths.results("ablation/records.csv")
        )
        print(f"{len({record.training for record in schema.read(target)})} trainings in {target}")
        return 0
    return _run(parser, given)


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    from usf.detectors import backbones
    from usf.study import benchmark
    from usf.study.jobs import hold

    signal.signal(signal.SIGTERM, _stop)
    wanted = ("size", "epochs", "batch_size", "model")
    changes = {name: getattr(given, name) for name in wanted if getattr(given, name) is not None}
    try:
        if given.trace:
            changes["trace"] = grid.whole_numbers(given.trace)
        trainings(given.detector, given.trainings)
        cell = benchmark.cell(
            given.dataset,
            given.category,
            given.detector,
            profile=given.profile,
            variants=grid.variants(given.variants),
            seeds=grid.whole_numbers(given.seeds),
            match_parameters=given.match_parameters,
            **changes,
        )
        images = benchmark.find_images(given.dataset, given.category, given.images, small=given.profile == "smoke")
        weights = backbones.resolve(given.weights, backbone=cell.backbone, layers=cell.layers)
        elsewhere = list(_elsewhere(given.elsewhere))
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.error(str(error))
    print(images.describe(), flush=True)

    def report(way: str, outcome: benchmark.Outcome) -> None:
        first = outcome.records[0]
        if outcome.failed:
            said = "failed: " + next(record.error for record in outcome.records if record.status == "failed")
        else:
            said = f"image AUROC {100 * (first.image_auroc or 0):.1f} ({first.score}), {first.seconds:.0f} s"
        note = " (on record)" if outcome.resumed else ""
        print(f"{way}, {outcome.variant.name}, seed {outcome.seed}: {said}{note}", flush=True)

    out = given.out or folder(given.profile) / "records"
    with hold(lock(out, given.dataset, given.category, given.detector)):
        records = run(
            cell,
            images,
            out,
            names=given.trainings,
            on_outcome=report,
            weights=weights,
            cache=given.cache or paths.cache("features"),
            retry_failed=given.retry_failed,
            progress=not given.quiet,
            elsewhere=elsewhere,
        )
    return int(any(record.status == "failed" for record in records))


def _elsewhere(folders: Sequence[Path] | None) -> Iterator[Record]:
    if folders is None:
        folders = [found] if (found := paths.results("benchmark")).is_dir() else []
    for where in folders:
        yield from schema.read(where)


if __name__ == "__main__":
    sys.exit(main())
