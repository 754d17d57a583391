"""Records of the benchmark as tables, beside the paper's.

:func:`collect` turns records into cells, one a model and class with its runs; :func:`beside`, :func:`summary`,
:func:`agreement` and :func:`comparison` turn cells into tables, :func:`by_score`, :func:`protocol_gain`,
:func:`failures` and :func:`cost` records. What was not run says so; what failed is counted. The records themselves are
those of :mod:`usf.study.schema`.

>>> from usf.study.schema import example
>>> records = [example(category="pill", seed=seed, image_auroc=0.90 + 0.01 * seed) for seed in range(3)]
>>> print(collect(records)["mvtec", "pill", "fastflow", "additive + LU"])
91.0±1.0 (3)
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from usf.study.schema import COLUMNS, METRICS, TRAINING, Coupling, Record, RecordError, Score, file_name

if TYPE_CHECKING:
    import pandas as pd

# pandas is imported where a table is made: whoever only writes or reads records needs nothing beyond Python.

__all__ = [
    "FLOW_NAMES",
    "METRIC",
    "VARIANTS",
    "Cell",
    "agreement",
    "beside",
    "by_score",
    "collect",
    "comparison",
    "cost",
    "failures",
    "frame",
    "model_order",
    "one_machine",
    "prefer",
    "protocol_gain",
    "select",
    "summary",
    "varied",
]

NOT_RUN = "not run"
Key = tuple[str, str, str, str]
"""(data set, category, detector, variant)."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one model on one class.

    Attributes:
        values: the metric in percent, one a run that succeeded, by seed.
        seeds: theirs.
        failed: errors of the runs that did not.
    """

    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Over the runs that succeeded; ``None`` without any."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over these runs; ``None`` for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """
        >>> print(Cell((97.0, 99.0), (0, 1)), "|", Cell((97.0,), (0,), ("nan",)), "|", Cell())
        98.0±1.4 (2) | 97.0 (1, 1 failed) | not run
        """
        if not self.values:
            return f"{len(self.failed)} failed" if self.failed else NOT_RUN
        spread = "" if self.sd is None else f"±{self.sd:.1f}"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{self.mean:.1f}{spread} ({len(self.values)}{failed})"


def model_order(detector: str, variant: str) -> tuple[int, int, str]:
    """Key to sort models by: detectors as in the paper's tables, affine before additive before GIN."""
    detectors, couplings = ("fastflow", "uflow", "cflow"), get_args(Coupling)
    coupling = next(n for n, name in enumerate(couplings) if variant.startswith(name))
    return detectors.index(detector), coupling, variant


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records by the value of columns, or of ``variant`` and ``flow``; a set or tuple of values allows any of them.

    Raises:
        RecordError: a name that is no column.

    >>> from usf.study.schema import example
    >>> len(select([example(seed=0), example(seed=1)], seed=(1, 2), score="norm"))
    1
    """
    if unknown := [name for name in wanted if name not in (*COLUMNS, "variant", "flow")]:
        raise RecordError(f"no column {', '.join(unknown)}; the columns are {', '.join(COLUMNS)}")
    allowed = {name: tuple(v) if isinstance(v, (set, tuple, list)) else (v,) for name, v in wanted.items()}
    return [r for r in records if all(getattr(r, name) in values for name, values in allowed.items())]


def prefer(records: Iterable[Record], **orders: Sequence[Any]) -> list[Record]:
    """Records with, for each detector, the first value in an order that it has records of; column after column.

    ``epochs`` are chosen for each class of a detector.

    >>> from usf.study.schema import example
    >>> found = prefer([example(profile="book"), example(profile="smoke")], profile=("full", "book", "smoke"))
    >>> [record.profile for record in found]
    ['book']
    """
    kept = list(records)
    for name, order in orders.items():

        def group(record: Record, name: str = name) -> tuple[str, ...]:
            # A small class takes more epochs for the same number of steps, so that epochs are a choice of each class.
            return (record.detector, record.dataset, record.category) if name == "epochs" else (record.detector,)

        ranks = {value: rank for rank, value in enumerate(order)}
        best: dict[tuple[str, ...], int] = {}
        for record in select(kept, **{name: order}):
            rank = ranks[getattr(record, name)]
            best[group(record)] = min(rank, best.get(group(record), rank))
        kept = [record for record in kept if ranks.get(getattr(record, name)) == best.get(group(record), -1)]
    return kept


def collect(records: Iterable[Record], metric: str = "image_auroc") -> dict[Key, Cell]:
    """Cells of one metric: the runs of each model on each class.

    Records of one detector and variant must differ in class and seed alone, and classes perhaps in epochs; where they
    do not (two sizes, two protocols, ...), choose with :func:`select` first. A run whose metric was not measured (a
    class without masks) is left out.

    Raises:
        RecordError: an unknown metric, or records of one detector and variant that differ in more, naming in what.
    """
    if metric not in METRICS:
        raise RecordError(f"metric {metric!r}, expected one of {', '.join(METRICS)}")
    columns = [name for name in (*TRAINING, "score", "protocol") if name not in ("dataset", "category", "seed")]
    columns.remove("epochs")
    settings: dict[tuple[str, str], tuple[Any, ...]] = {}
    epochs: dict[Key, int] = {}
    found: dict[Key, list[Record]] = {}
    for record in records:
        same = tuple(getattr(record, name) for name in columns)
        first = settings.setdefault((record.detector, record.variant), same)
        if differ := [name for name, x, y in zip(columns, first, same, strict=True) if x != y]:
            raise RecordError(
                f"{record.detector} {record.variant}: records with more than one {', '.join(differ)} "
                f"({record.category}, seed {record.seed}); choose with select()"
            )
        key: Key = (record.dataset, record.category, record.detector, record.variant)
        if epochs.setdefault(key, record.epochs) != record.epochs:
            raise RecordError(f"{' '.join(key)}: records with more than one epochs; choose with select()")
        found.setdefault(key, []).append(record)
    cells = {}
    for key, group in found.items():
        if len({record.seed for record in group}) != len(group):
            raise RecordError(f"{' '.join(key)}: several records of one seed; choose an epoch with select()")
        group.sort(key=lambda record: record.seed)
        good = [record for record in group if record.status == "ok" and getattr(record, metric) is not None]
        cells[key] = Cell(
            values=tuple(100 * getattr(record, metric) for record in good),
            seeds=tuple(record.seed for record in good),
            failed=tuple(record.error for record in group if record.status == "failed"),
        )
    return cells


VARIANTS = {"base": "affine", "usf": "additive + LU"}
"""The paper's two flows as variants."""
FLOW_NAMES = {"base": "affine", "usf": "USF"}
"""The paper's two flows as they are shown."""
SPREAD_FLOOR = 0.05
"""Percent points: what a smaller standard deviation counts as, as in the paper's print, see ``variance_test``."""
METRIC = {"image": "image_auroc", "pixel": "pixel_auroc"}
"""The paper's two levels as metrics."""


def _cell_of(cells: Mapping[Key, Cell], dataset: str, category: str, detector: str, flow: str) -> Cell:
    return cells.get((dataset, category, detector, VARIANTS[flow]), Cell())


def beside(cells: Mapping[Key, Cell], dataset: str, level: str) -> pd.DataFrame:
    """One of the paper's tables 2 to 5 with what was measured here below each printed line.

    Args:
        cells: of the metric of that level, see :func:`collect`.
        dataset: ``"mvtec"`` or ``"visa"``.
        level: ``"image"`` or ``"pixel"``.

    Returns:
        rows (class, ``"paper"`` or ``"here"``), columns (flow, detector) in the paper's order, of text: mean and sample
        standard deviation in percent; here with the number of runs in brackets, or ``"not run"``.
    """
    import pandas as pd

    from usf.study import paper

    printed = paper.cells()
    printed = printed[(printed["dataset"] == dataset) & (printed["level"] == level)]
    if printed.empty:
        raise ValueError(f"the paper has no table of {dataset}, {level}: mvtec or visa, image or pixel")
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in printed.itertuples():
        column = (FLOW_NAMES[str(row.flow)], paper.DETECTORS[str(row.detector)])
        cell = _cell_of(cells, dataset, str(row.category), str(row.detector), str(row.flow))
        rows.setdefault((str(row.category), "paper"), {})[column] = f"{row.mean:.1f}±{row.sd:.1f}"
        rows.setdefault((str(row.category), "here"), {})[column] = str(cell)
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["class", ""])
    table.columns = pd.MultiIndex.from_tuples(list(next(iter(rows.values()))))
    return table


def summary(cells: Mapping[str, Mapping[Key, Cell]]) -> pd.DataFrame:
    """The paper's table 1, and the same averages over the classes that were run here, printed and measured.

    An average over some classes says nothing beside one over all of them, so the paper's is taken over the same ones. A
    class counts for a detector once both flows have a run that succeeded.

    Args:
        cells: by level, ``"image"`` and ``"pixel"``.

    Returns:
        rows (data set and level, line), columns (flow, detector) in the paper's order, of text: mean and mean standard
        deviation in percent. The lines are ``"paper"`` (all classes) and ``"here"``; where something was run, between
        them ``"classes run"`` ("3 of 15") and ``"paper, these"``.
    """
    import pandas as pd

    from usf.study import paper

    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    columns = [(name, detector) for name in FLOW_NAMES.values() for detector in paper.DETECTORS.values()]
    printed = paper.cells()
    for dataset, level in paper.TABLE:
        own, label = cells.get(level, {}), f"{paper.DATASETS[dataset]} {level}"
        part = printed[(printed["dataset"] == dataset) & (printed["level"] == level)]
        lines: dict[str, dict[tuple[str, str], str]] = {}
        for (detector, flow), group in part.groupby(["detector", "flow"]):
            column = (FLOW_NAMES[str(flow)], paper.DETECTORS[str(detector)])
            classes = group.set_index("category")
            run = [
                str(category)
                for category in classes.index
                if all(_cell_of(own, dataset, str(category), str(detector), other).values for other in VARIANTS)
            ]
            measured = [_cell_of(own, dataset, category, str(detector), str(flow)) for category in run]
            means = [cell.mean for cell in measured if cell.mean is not None]
            spreads = [cell.sd for cell in measured if cell.sd is not None]
            lines.setdefault("paper", {})[column] = f"{classes['mean'].mean():.1f}±{classes['sd'].mean():.1f}"
            lines.setdefault("classes run", {})[column] = f"{len(run)} of {len(classes)}"
            these, here = "", NOT_RUN
            if run:
                these = f"{classes.loc[run, 'mean'].mean():.1f}±{classes.loc[run, 'sd'].mean():.1f}"
                here = f"{statistics.fmean(means):.1f}"
                here += f"±{statistics.fmean(spreads):.1f}" if len(spreads) == len(run) else ""
            lines.setdefault("paper, these", {})[column] = these
            lines.setdefault("here", {})[column] = here
        untouched = all(text == NOT_RUN for text in lines["here"].values())
        for line, texts in lines.items():
            if not (untouched and line in ("classes run", "paper, these")):
                rows[label, line] = texts
    table = pd.DataFrame([[texts[column] for column in columns] for texts in rows.values()])
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["data", ""])
    table.columns = pd.MultiIndex.from_tuples(columns)
    return table


def agreement(cells: Mapping[str, Mapping[Key, Cell]], *, level: float = 0.95) -> pd.DataFrame:
    """Where paper and measurement can be laid beside each other, by how much they differ.

    Args:
        cells: by level, ``"image"`` and ``"pixel"``.
        level: of the intervals.

    Returns:
        one row for each class, detector, flow and level with at least two runs here: ``paper``, ``paper_sd``, ``here``,
        ``here_sd``, ``runs``, and ``difference`` (here minus paper) with Welch's interval ``low``, ``high``, widened by
        the rounding of the print; percent points. No row, no comparison: the frame is empty without records.
    """
    import pandas as pd

    from usf.study import paper, statistics

    names = "dataset level category detector flow paper paper_sd here here_sd runs difference low high".split()
    rows = []
    for row in paper.cells().itertuples():
        key = (str(row.dataset), str(row.category), str(row.detector), str(row.flow))
        cell = _cell_of(cells.get(str(row.level), {}), *key)
        if cell.mean is None or cell.sd is None:
            continue
        runs, printed, spread = len(cell.values), float(str(row.mean)), float(str(row.sd))
        interval = statistics.welch_interval(
            cell.mean, cell.sd, printed, spread, (runs, paper.RUNS), level=level, resolution=(0.0, paper.RESOLUTION)
        )
        found = (printed, spread, cell.mean, cell.sd, runs, interval.estimate, interval.low, interval.high)
        rows.append((key[0], str(row.level), *key[1:], *found))
    return pd.DataFrame(rows, columns=names)


def varied(usual: Iterable[Record], records: Iterable[Record]) -> pd.DataFrame:
    """What one changed setting does to the distance from the paper: longer training, or larger images.

    Args:
        usual: of one setting for each detector and class, as :func:`collect` wants them.
        records: of the main protocol and the same scores, of all settings.

    Returns:
        one row for each detector, class and flow of the paper, level, and setting that differs from the usual one in
        ``epochs`` or in ``size`` and in nothing else: ``dataset, category, detector, flow, level, changed`` (the
        column's name), ``value``, ``seeds`` (common to both settings, and the only ones that count), ``before, after,
        paper`` (means in percent) and ``closed``, the share of the distance from the paper that the change takes away
        (negative where it adds to it; empty without a distance).
    """
    import pandas as pd

    from usf.study import paper

    names = "dataset category detector flow level changed value seeds before after paper closed".split()
    printed = paper.cells().set_index(["dataset", "category", "detector", "flow", "level"])["mean"].to_dict()
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in select(records, status="ok", protocol="main", flow=("base", "usf")):
        found.setdefault((*record.training, record.score), []).append(record)
    columns = (*TRAINING, "score")
    groups: dict[tuple[Any, ...], list[tuple[Record, Record]]] = {}
    for record in select(usual, status="ok", flow=("base", "usf")):
        for key, others in found.items():
            differ = [name for name, x in zip(columns, key, strict=True) if getattr(record, name) != x]
            if differ in (["epochs"], ["size"]):
                model = (record.dataset, record.category, record.detector, record.flow)
                groups.setdefault((*model, differ[0], getattr(others[0], differ[0])), []).append((record, others[0]))
    rows = []
    for (*about, changed, value), pairs in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        for level, metric in METRIC.items():
            target = printed.get((*about, level))
            both = [[getattr(record, metric) for record in side] for side in zip(*pairs, strict=True)]
            if target is None or any(value is None for side in both for value in side):
                continue
            before, after = (100 * statistics.fmean(side) for side in both)
            closed = (after - before) / (target - before) if target != before else None
            rows.append((*about, level, changed, value, len(pairs), before, after, target, closed))
    return pd.DataFrame(rows, columns=names)


def comparison(
    cells: Mapping[str, Mapping[Key, Cell]], variant: str = "additive + LU", base: str = "affine", *, seed: int = 0
) -> pd.DataFrame:
    """One variant against another as measured here, over the classes on which both have runs.

    Args:
        cells: by level, ``"image"`` and ``"pixel"``.
        variant, base: see :attr:`Record.variant`.
        seed: of the bootstraps.

    Returns:
        one row for each detector and level with at least one class: ``classes``, ``runs`` (of both), ``difference``
        (``variant`` minus ``base``, mean over classes, percent points) with Student's interval over the seeds that
        every class has of both (``low, high``; a seed's mean over the classes is one value, so that it is about other
        seeds on these classes; empty for fewer than two) and Student's over classes (``class_low, class_high``; empty
        for a single class), ``improvement`` with ``improvement_low, improvement_high``
        (:func:`usf.study.statistics.improvement_interval`), ``ratio`` of the standard deviations with ``ratio_low,
        ratio_high`` and the permutation test's ``ratio_p`` (empty for fewer than two classes with two runs of each).
    """
    import pandas as pd

    from usf.study import statistics

    names = (
        "detector level classes runs difference low high class_low class_high "
        "improvement improvement_low improvement_high ratio ratio_low ratio_high ratio_p"
    ).split()
    rows = []
    for level, own in cells.items():
        detectors: dict[str, list[tuple[Cell, Cell]]] = {}
        for (dataset, category, detector, name), cell in sorted(own.items()):
            other = own.get((dataset, category, detector, base), Cell())
            if name == variant and cell.values and other.values:
                detectors.setdefault(detector, []).append((cell, other))
        for detector, pairs in sorted(detectors.items(), key=lambda item: model_order(item[0], variant)):
            first, second = [list(cell.values) for cell, _ in pairs], [list(other.values) for _, other in pairs]
            row: dict[str, Any] = {"detector": detector, "level": level, "classes": len(pairs)}
            row["runs"] = sum(map(len, first)) + sum(map(len, second))
            means = [a.mean - b.mean for a, b in pairs if a.mean is not None and b.mean is not None]
            row["difference"] = statistics.mean(means).item()
            by_seed = _by_seed(pairs)
            if len(by_seed) > 1:
                over = statistics.student_interval(by_seed)
                row["low"], row["high"] = over.low, over.high
            if min(map(len, [*first, *second])) > 1:
                better = statistics.improvement_interval(first, second, seed=seed)
                row["improvement"] = better.estimate
                row["improvement_low"], row["improvement_high"] = better.low, better.high
            if len(pairs) > 1:
                over = statistics.student_interval(means)
                row["class_low"], row["class_high"] = over.low, over.high
            spreads = [(a, b) for a, b in pairs if a.sd is not None and b.sd is not None]
            if len(spreads) > 1:
                test = statistics.variance_test(
                    [a.sd for a, _ in spreads if a.sd is not None],
                    [b.sd for _, b in spreads if b.sd is not None],
                    [len(a.values) for a, _ in spreads],
                    [len(b.values) for _, b in spreads],
                    floor=SPREAD_FLOOR,
                )
                row["ratio"], row["ratio_p"] = test.ratio.estimate, test.p
                row["ratio_low"], row["ratio_high"] = test.ratio.low, test.ratio.high
            rows.append(row)
    return pd.DataFrame(rows, columns=names)


def _by_seed(pairs: Sequence[tuple[Cell, Cell]]) -> list[float]:
    """Difference of two models, mean over classes, for each seed that both have on every class."""
    shared = set.intersection(*(set(cell.seeds) for pair in pairs for cell in pair))
    values = [[dict(zip(cell.seeds, cell.values, strict=True)) for cell in pair] for pair in pairs]
    return [statistics.fmean(first[seed] - second[seed] for first, second in values) for seed in sorted(shared)]


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a data frame: the columns of the schema and ``variant``, metrics in percent."""
    import pandas as pd

    table = pd.DataFrame(
        [{**dataclasses.asdict(record), "variant": record.variant} for record in records],
        columns=[*COLUMNS, "variant"],
    )
    table[list(METRICS)] = 100 * table[list(METRICS)].astype(float)
    return table


def _means(table: pd.DataFrame, keys: list[str], count: str) -> pd.DataFrame:
    """Means of the other columns by ``keys``, in the order of models, with the number of rows as column ``count``."""
    if table.empty:
        return table
    groups = table.groupby(keys)
    means = groups.mean()
    means.insert(0, count, groups.size())
    means = means.reset_index()
    order = [model_order(str(d), str(v)) for d, v in zip(means["detector"], means["variant"], strict=True)]
    return means.iloc[sorted(range(len(means)), key=order.__getitem__)].reset_index(drop=True)


def by_score(records: Iterable[Record]) -> pd.DataFrame:
    """The same trained models in other scores: mean AUROC in percent by detector and variant.

    Only trainings that have all the scores that any training of their detector has are counted, so that a row compares
    equal models.

    Returns:
        a row for each detector and variant: ``detector, variant, trainings``, and for each score ``"image, norm"``,
        ...; empty where no detector has two scores.
    """
    import pandas as pd

    groups: dict[str, dict[tuple[Any, ...], dict[str, Record]]] = {}
    for record in select(records, status="ok"):
        scored = (record.training, record.protocol, record.epoch)
        groups.setdefault(record.detector, {}).setdefault(scored, {})[record.score] = record
    rows = []
    for trainings in groups.values():
        scores = {score for found in trainings.values() for score in found}
        for found in trainings.values():
            if len(scores) > 1 and set(found) == scores:
                row: dict[str, Any] = {}
                for score in (score for score in get_args(Score) if score in scores):
                    row |= {"detector": found[score].detector, "variant": found[score].variant}
                    for level, metric in METRIC.items():
                        value = getattr(found[score], metric)
                        row[f"{level}, {score}"] = None if value is None else 100 * value
                rows.append(row)
    return _means(pd.DataFrame(rows), ["detector", "variant"], "trainings")


def protocol_gain(records: Iterable[Record]) -> pd.DataFrame:
    """What selecting on the test set buys: AUROC of protocol ``"paper"`` beside ``"main"``, class by class.

    Pairs agree in everything but the protocol and the settings, which hold the rule that stops.

    Returns:
        a row for each ``detector, dataset, category, variant, score`` with the number of ``pairs`` and their means:
        ``image_main, image_paper, image_gain`` (paper minus main) and the same for ``pixel``, in percent and percent
        points; ``epoch_main, epoch_paper``, the epoch that was scored. Empty without pairs.

    Raises:
        RecordError: a training that is there in two settings of one protocol.
    """
    import pandas as pd

    same = [name for name in (*TRAINING, "score") if name != "settings"]
    pairs: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in select(records, status="ok", protocol=("main", "paper")):
        pair = pairs.setdefault(tuple(getattr(record, name) for name in same), {})
        if record.protocol in pair:
            raise RecordError(
                f"{file_name(record)}: more than one settings of protocol {record.protocol}; use select()"
            )
        pair[record.protocol] = record
    names = ["detector", "dataset", "category", "variant", "score"]
    rows = []
    for pair in pairs.values():
        if len(pair) < 2:
            continue
        main, leaky = pair["main"], pair["paper"]
        row: dict[str, Any] = {name: getattr(main, name) for name in names}
        for level, metric in METRIC.items():
            values = [getattr(record, metric) for record in (main, leaky)]
            before, after = [None if value is None else 100 * value for value in values]
            row[f"{level}_main"], row[f"{level}_paper"] = before, after
            row[f"{level}_gain"] = None if before is None or after is None else after - before
        rows.append(row | {"epoch_main": main.epoch, "epoch_paper": leaky.epoch})
    return _means(pd.DataFrame(rows), names, "pairs")


def failures(records: Iterable[Record]) -> pd.DataFrame:
    """Runs that failed, one row each: what was trained, how far it came, what happened."""
    import pandas as pd

    names = ["dataset", "category", "detector", "variant", "seed", "epochs_run", "error"]
    failed = {record.training: record for record in records if record.status == "failed"}
    return pd.DataFrame([[getattr(r, name) for name in names] for r in failed.values()], columns=names)


def cost(
    records: Iterable[Record], *, classes: int = 27, runs: int = 3, epochs: int = 100, images: int | None = None
) -> pd.DataFrame:
    """What the paper's grid costs, from the wall time of the trainings that succeeded.

    Of the runs of a model on a class the fastest counts: the others shared their machine with something else, for they
    did the same work. Features are extracted once for each class and detector, and shared by the runs of two flows; a
    class that was read from a cache later counts with the time that it took at first.

    Args:
        records: the rows of one training count once, those of a trace not at all.
        classes, runs: of the grid, for each detector and flow (the paper: 15 + 12 classes, three runs).
        epochs: at most as many (the paper: 100).
        images: to train on in all these classes; by default those of MVTec AD and VisA.

    Returns:
        one row for each detector, variant, size and machine: ``trainings`` measured; means over their classes of the
        fastest run's ``seconds``, ``epochs_run`` and ``seconds_image`` (of training, for each image and epoch) and of
        ``seconds_shared`` (a training's share of the features, and scoring); ``hours``: classes * runs * (seconds +
        seconds_shared) / 3600, with epochs and images as measured; ``hours_limit``: the same if every training ran to
        ``epochs`` on all ``images``; ``unit``: ``"GPU-hours"``, or ``"core-hours"``, which are hours multiplied by the
        threads used.
    """
    import pandas as pd

    from usf.study.catalogue import DATASETS

    if images is None:
        images = sum(counts.train for dataset in DATASETS.values() for counts in dataset.classes.values())
    seen: dict[tuple[Any, ...], Record] = {}
    for record in records:
        # Rows of a trace are written on the way: their seconds are those up to their epoch.
        if record.status == "ok" and record.epochs_run and record.protocol != "trace":
            seen[record.training] = record
    extracted: dict[tuple[Any, ...], float] = {}

    def source(record: Record) -> tuple[Any, ...]:
        return record.dataset, record.category, record.backbone, record.layers, record.size, record.device

    for record in seen.values():
        extracted[source(record)] = max(extracted.get(source(record), 0.0), record.seconds_features or 0.0)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in seen.values():
        key = (record.detector, record.variant, record.backbone, record.size, record.device, record.hardware)
        groups.setdefault((*key, record.threads), []).append(record)
    rows = []
    ordered = sorted(groups.items(), key=lambda item: (model_order(*item[0][:2]), item[0][2:]))
    for (detector, variant, backbone, size, device, hardware, threads), group in ordered:
        fastest: dict[tuple[str, str, int], Record] = {}
        for record in sorted(group, key=lambda record: -record.seconds / record.epochs_run):
            fastest[record.dataset, record.category, record.epochs] = record
        best = list(fastest.values())
        seconds = statistics.fmean(record.seconds for record in best)
        image = statistics.fmean(record.seconds / (record.epochs_run * record.train_images) for record in best)
        features = statistics.fmean(extracted[source(record)] for record in best) / (len(VARIANTS) * runs)
        shared = features + statistics.fmean(record.seconds_score or 0.0 for record in best)
        scale = (1 if device == "cuda" else threads) / 3600
        rows.append(
            {
                "detector": detector,
                "variant": variant,
                "backbone": backbone,
                "size": size,
                "hardware": hardware,
                "trainings": len(group),
                "seconds": seconds,
                "epochs_run": statistics.fmean(record.epochs_run for record in best),
                "seconds_image": image,
                "seconds_shared": shared,
                "hours": scale * classes * runs * (seconds + shared),
                "hours_limit": scale * runs * (epochs * images * image + classes * shared),
                "unit": "GPU-hours" if device == "cuda" else "core-hours",
            }
        )
    return pd.DataFrame(rows)


def one_machine(costs: pd.DataFrame) -> pd.DataFrame:
    """Of each detector the rows of one machine, the one with the most trainings: rows of several do not add up.

    Args:
        costs: see :func:`cost`.
    """
    if costs.empty:
        return costs
    counts = costs.groupby(["detector", "hardware"], sort=False)["trainings"].sum()
    chosen = set(counts.groupby("detector", sort=False).idxmax())
    return costs[[pair in chosen for pair in zip(costs["detector"], costs["hardware"], strict=True)]]
