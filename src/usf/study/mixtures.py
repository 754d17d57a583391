"""The study of section 4.3: does the latent norm rank Gaussian mixtures by density?

Three models (Deep SVDD, NonUSFlow, USFlow), four dimensions, ten Optuna trials each; both flows from **one** shared
search space. Run it::

    python -m usf.study.mixtures --profile smoke     # seconds, to a figure
    python -m usf.study.mixtures --profile full      # 120 trainings, within an hour on two cores

Each finished trial is one JSON file under ``build/mixtures/``, written at once; a killed run continues where it stopped
and runs nothing twice. A trial that diverges is a row with its reason. ``--publish`` gathers the records of a run into
``data/results/mixtures/``: ``trials.csv`` (one row a trial), ``oracle/`` (bounds and baselines), ``figures/points.csv``
(subsampled test points of the selected models) and ``provenance.json``.
"""

from __future__ import annotations

import argparse
import concurrent.futures as cf
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from usf import alignment, paths
from usf.flows import MLP, Flow, NonUSFlow, USFlow
from usf.oneclass import DeepSVDD, collapse_report, decreasing_schedule, fit_deep_svdd
from usf.study import records
from usf.study.profile import select
from usf.study.targets import DiagonalMixture, paper_mixture
from usf.training import fit

MODELS = ("deep-svdd", "non-usf", "usf")
FLOWS: dict[str, type[Flow]] = {"non-usf": NonUSFlow, "usf": USFlow}
TAIL = 0.05
"""Share of the least dense test points that the restricted measures look at."""

Arrays = dict[str, npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that decides a result, besides the trial's own settings.

    Attributes:
        dims: dimensions of the mixture.
        trials: Optuna trials for each model and dimension.
        train, val, test: sample sizes.
        epochs: most passes of a flow's training, one entry a dimension. Fewer in high dimension: a pass costs more, and
            the linear maps overfit before the couplings do.
        svdd_epochs: the same for Deep SVDD, each of its two phases.
        patience: epochs without a better validation loss before a training stops.
        bound_samples: Monte-Carlo sample of the rearrangement bound.
        points: test points of each selected model that are kept for the figures.
        seed: of data, search and weights.
    """

    dims: tuple[int, ...] = (2, 8, 32, 128)
    trials: int = 10
    train: int = 50_000
    val: int = 2_000
    test: int = 5_000
    epochs: tuple[int, ...] = (20, 15, 12, 8)
    svdd_epochs: tuple[int, ...] = (10, 10, 6, 3)
    patience: int = 5
    bound_samples: int = 1_000_000
    points: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.epochs) == len(self.svdd_epochs):
            raise ValueError("epochs and svdd_epochs need one entry a dimension")

    def key(self) -> str:
        """Name of the settings, without the number of trials: more trials continue the same study."""
        return records.settings_hash({k: v for k, v in dataclasses.asdict(self).items() if k != "trials"})


def study(profile: str) -> Study:
    """The study's settings in one profile (``smoke``, ``book`` or ``full``)."""
    small = Study(
        dims=(2, 8), trials=1, train=4_000, val=500, test=1_000, epochs=(6, 6), svdd_epochs=(2, 2), bound_samples=50_000
    )
    medium = Study(dims=(2, 8), trials=3, epochs=(10, 8), svdd_epochs=(5, 5), bound_samples=200_000)
    return select(profile, smoke=small, book=medium, full=Study())


# ------------------------------------------------------------------------------------------------------ data and models


@dataclasses.dataclass(frozen=True)
class Data:
    """One dimension's samples, float64: train (n, d), val, test; and the exact log-density of the test points."""

    mixture: DiagonalMixture
    train: Tensor
    val: Tensor
    test: Tensor
    log_density: Tensor


@functools.lru_cache(maxsize=2)
def data(settings: Study, dim: int) -> Data:
    """The samples of one dimension: a function of ``settings.seed`` and the sizes alone."""
    mixture = paper_mixture(dim)
    train, val, test = (
        mixture.sample(count, 1_000 * settings.seed + index)
        for index, count in enumerate((settings.train, settings.val, settings.test), start=1)
    )
    return Data(mixture, train, val, test, mixture.log_prob(test))


def smooth_mlp(inputs: int, outputs: int, rank: int, *, hidden: Sequence[int]) -> nn.Module:
    """A conditioner with SiLU instead of ReLU, for vectors (``rank`` 0).

    A smooth density has smooth level sets, and a piecewise linear shift gives them kinks. In the pilot runs that set
    the search space SiLU came closer to the bound than ReLU, with the same number of parameters or fewer.
    """
    if rank != 0:
        raise ValueError("smooth_mlp conditions vectors; use ConvConditioner for anything with spatial axes")
    layers = [nn.SiLU() if isinstance(layer, nn.ReLU) else layer for layer in MLP(inputs, outputs, hidden)]
    return nn.Sequential(*layers)


def build_flow(model: str, dim: int, *, blocks: int, layers: int, width: int, seed: int) -> Flow:
    """``"usf"`` or ``"non-usf"`` on vectors, float32, seeded before construction.

    Raises:
        ValueError: for another model.
    """
    if model not in FLOWS:
        raise ValueError(f"{model!r} is no flow; choose one of {sorted(FLOWS)}")
    torch.manual_seed(seed)
    conditioner = functools.partial(smooth_mlp, hidden=(width,) * layers)
    flow = FLOWS[model]((dim,), blocks, conditioner=conditioner)  # type: ignore[call-arg, arg-type]
    # The training loop already refuses a loss that is not finite.
    flow.validate_args = False
    return flow


def negative_log_likelihood(flow: nn.Module, batch: Tensor) -> Tensor:
    """Mean of -ln p over a batch, nats."""
    assert isinstance(flow, Flow)
    return -flow.log_prob(batch).mean()


# ----------------------------------------------------------------------------------------------------------- the search


def search_space(model: str) -> dict[str, Any]:
    """Name of each setting -> Optuna distribution. One space for both flows, so neither is favoured by its ranges.

    The published search uses batch 32 and learning rates up to 1e-3 with a patience of 5; larger batches with larger
    rates and a cosine schedule need a tenth of the steps, which is what two CPU cores can afford.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if model in FLOWS:
        return {
            "blocks": IntDistribution(2, 10),
            "layers": IntDistribution(2, 3),
            "width": CategoricalDistribution((32, 64)),
            "lr": FloatDistribution(1e-3, 1e-2, log=True),
            "batch_size": CategoricalDistribution((256, 512)),
        }
    if model == "deep-svdd":
        return {
            "depth": IntDistribution(2, 6),
            "lr": FloatDistribution(1e-4, 1e-2, log=True),
            "batch_size": CategoricalDistribution((256, 512)),
            "weight_decay": FloatDistribution(1e-7, 1e-4, log=True),
        }
    raise ValueError(f"unknown model {model!r}; choose one of {MODELS}")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training: which study, which model, and what the search chose."""

    study: Study
    model: str
    dim: int
    number: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Also the name of its record."""
        return f"{self.model}-d{self.dim:03d}-t{self.number:02d}"

    @property
    def seed(self) -> int:
        """Its own, so that no trial depends on which ran before it."""
        return stable_seed(self.study.seed, self.model, self.dim, self.number)

    def hash(self) -> str:
        """Name of everything that decides its result."""
        shared = {
            k: v for k, v in dataclasses.asdict(self.study).items() if k not in ("trials", "points", "bound_samples")
        }
        return records.settings_hash(
            {"study": shared, "model": self.model, "dim": self.dim, "trial": self.number, **self.settings}
        )


def stable_seed(*parts: object) -> int:
    """A seed below 2^31 from any printable parts, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf8")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def suggest(settings: Study, model: str, dim: int, finished: Sequence[Mapping[str, Any]]) -> Trial:
    """The next trial of one model and dimension, given the records of those before it, in order.

    The sampler (TPE after four random draws) is made anew and seeded for each trial, so the search is a function of the
    finished records: a resumed search asks for exactly what the uninterrupted one would have.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = len(finished)
    space = search_space(model)
    sampler = optuna.samplers.TPESampler(
        seed=stable_seed(settings.seed, model, dim, number, "search"), n_startup_trials=4
    )
    search = optuna.create_study(direction="minimize", sampler=sampler)
    for row in finished:
        done = row["status"] == "ok"
        search.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
                params={name: row[name] for name in space},
                distributions=space,
                value=row["val_loss"] if done else None,
            )
        )
    return Trial(settings, model, dim, number, search.ask(space).params)


# -------------------------------------------------------------------------------------------------------------- a trial

COLUMNS: tuple[str, ...] = tuple(
    """
    model dim trial status reason val_loss test_nll excess_nll
    spearman kendall inversions spearman_tail kendall_tail inversions_tail spearman_nll
    seconds epochs best_epoch parameters
    blocks layers width depth lr batch_size weight_decay
    latent_std_min latent_std_median latent_std_max spread effective_rank distinct_fraction
    log_det_std seed settings_hash run
    """.split()
)
"""Columns of ``trials.csv``. ``excess_nll`` is test NLL minus the mean of the exact -ln p over the same test points."""


def train(trial: Trial, *, progress: bool = False) -> tuple[DeepSVDD | Flow, dict[str, Any]]:
    """Train one trial's model; returns it in eval mode with what the training cost.

    Raises:
        FloatingPointError: when the training diverges.
    """
    settings, found = trial.study, data(trial.study, trial.dim)
    index, options = settings.dims.index(trial.dim), trial.settings
    common = {
        "batch_size": options["batch_size"],
        "lr": options["lr"],
        "seed": trial.seed,
        "patience": settings.patience,
        "progress": progress,
    }
    model: DeepSVDD | Flow
    if trial.model == "deep-svdd":
        torch.manual_seed(trial.seed)
        model = DeepSVDD(decreasing_schedule(trial.dim, options["depth"]), weight_decay=options["weight_decay"])
        epochs = settings.svdd_epochs[index]
        both = fit_deep_svdd(
            model, found.train.float(), val=found.val.float(), pretrain_epochs=epochs, epochs=epochs, **common
        )
        history, seconds = both.train, both.seconds
    else:
        model = build_flow(
            trial.model,
            trial.dim,
            blocks=options["blocks"],
            layers=options["layers"],
            width=options["width"],
            seed=trial.seed,
        )
        history = fit(
            model,
            negative_log_likelihood,
            found.train.float(),
            val=found.val.float(),
            epochs=settings.epochs[index],
            schedule="cosine",
            label=trial.name,
            **common,
        )
        seconds = history.seconds
    cost = {
        "val_loss": min(history.val),
        "seconds": seconds,
        "epochs": history.epochs,
        "best_epoch": history.best_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return model, cost


@torch.no_grad()
def evaluate(model: DeepSVDD | Flow, found: Data) -> tuple[dict[str, float], Arrays]:
    """Measures of one model on the test points, in double precision, and the arrays they come from.

    Arrays, each of length ``test``: ``true`` (exact ln p), ``norm`` (distance of the latent to the centre), for flows
    ``estimated`` (ln p of the model) and ``log_det``; for d = 2 the latents relative to the centre, ``z0`` and ``z1``.
    """
    model = model.double()
    latent = model.latent(found.test)
    center = model.center if isinstance(model, DeepSVDD) else torch.zeros(latent.shape[1], dtype=torch.float64)
    arrays = {"true": found.log_density.numpy(), "norm": torch.linalg.vector_norm(latent - center, dim=-1).numpy()}
    if latent.shape[1] == 2:
        arrays["z0"], arrays["z1"] = (latent - center).T.numpy()
    row: dict[str, float] = {}
    for suffix, tail in (("", None), ("_tail", TAIL)):
        for name in ("spearman", "kendall", "inversions"):
            measure: Callable[..., float] = getattr(alignment, name)
            row[name + suffix] = measure(arrays["norm"], arrays["true"], tail=tail)
    if isinstance(model, Flow):
        arrays["estimated"] = model.log_prob(found.test).numpy()
        arrays["log_det"] = model.log_abs_det_jacobian(found.test).numpy().copy()
        row["test_nll"] = -float(arrays["estimated"].mean())
        row["excess_nll"] = float((arrays["true"] - arrays["estimated"]).mean())
        row["spearman_nll"] = alignment.spearman(-arrays["estimated"], arrays["true"])
        row["log_det_std"] = float(arrays["log_det"].std())
    report = collapse_report(latent, center)
    std = sorted(report.std)
    row |= {
        "latent_std_min": std[0],
        "latent_std_median": float(np.median(std)),
        "latent_std_max": std[-1],
        "spread": report.spread,
        "effective_rank": report.effective_rank,
        "distinct_fraction": report.distinct_fraction,
    }
    return row, arrays


def run_trial(trial: Trial, folder: Path, run: str, *, threads: int | None = 1) -> dict[str, Any]:
    """Train, evaluate and record one trial; a failure becomes a record too. Returns the record.

    ``folder`` receives ``<name>.npz`` (the test points' arrays) and then ``<name>.json``: the record exists only once
    all of the trial does.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    row: dict[str, Any] = {
        "model": trial.model,
        "dim": trial.dim,
        "trial": trial.number,
        **trial.settings,
        "seed": trial.seed,
        "settings_hash": trial.hash(),
        "run": run,
    }
    started = time.perf_counter()
    try:
        model, cost = train(trial)
        measures, arrays = evaluate(model, data(trial.study, trial.dim))
        row |= {"status": "ok", **cost, **measures}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{trial.name}.npz"
        np.savez_compressed(temporary, **{k: v.astype(np.float32) for k, v in arrays.items()})  # type: ignore[arg-type]
        temporary.replace(folder / f"{trial.name}.npz")
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # Divergence raises FloatingPointError, a singular map LinAlgError, a NaN in a score ValueError: all results.
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        row["seconds"] = time.perf_counter() - started
    records.write_json(folder / f"{trial.name}.json", row)
    return row


# ------------------------------------------------------------------------------------------------------------ the study


def finished(folder: Path, model: str, dim: int) -> list[dict[str, Any]]:
    """Records of one model and dimension in the order of their trials, up to the first gap."""
    rows: list[dict[str, Any]] = []
    while (path := folder / f"{model}-d{dim:03d}-t{len(rows):02d}.json").is_file():
        rows.append(json.loads(path.read_text("utf8")))
    return rows


def run(
    settings: Study, folder: Path, *, models: Sequence[str] = MODELS, jobs: int = 2, progress: bool = True
) -> list[dict[str, Any]]:
    """Run what is missing of a study; returns all records, ordered by dimension, model and trial.

    Trials of one model and dimension are sequential, because each suggestion learns from those before it; those of
    different ones run side by side, in rounds, the dearest of a round first.

    Args:
        settings: the study.
        folder: where the records are; what is there already is not run again.
        models: subset of `MODELS`.
        jobs: worker processes, each with one thread; 1 runs in this process.
        progress: whether to show a bar with the number of trials.
    """
    from tqdm.auto import tqdm

    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{settings.key()}"
    records.write_json(
        folder / "runs" / f"{name}.json",
        {**records.provenance(("torch", "numpy", "scipy", "optuna")), "settings": settings, "jobs": jobs, "threads": 1},
    )
    done = {(model, dim): finished(folder, model, dim)[: settings.trials] for dim in settings.dims for model in models}
    # Dearest first, so that no long study is left alone at the end.
    queue = sorted(done, key=lambda key: (-key[1], MODELS.index(key[0])))
    bar = tqdm(
        total=len(queue) * settings.trials,
        initial=sum(map(len, done.values())),
        desc="mixtures",
        unit="trial",
        disable=not progress,
    )

    def record(key: tuple[str, int], row: dict[str, Any]) -> None:
        done[key].append(row)
        bar.update()
        bar.set_postfix_str(f"{key[0]} d={key[1]}: {row['status']}", refresh=False)

    if jobs == 1:
        for key in queue:
            while len(done[key]) < settings.trials:
                record(key, run_trial(suggest(settings, *key, done[key]), folder, name, threads=None))
    else:
        context = multiprocessing.get_context("spawn")
        with cf.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            running: dict[cf.Future[dict[str, Any]], tuple[str, int]] = {}
            while True:
                busy = set(running.values())
                ready = [key for key in queue if key not in busy and len(done[key]) < settings.trials]
                # In rounds: a study that is cut short has something of everything.
                ready.sort(key=lambda key: len(done[key]))
                for key in ready[: jobs - len(running)]:
                    running[pool.submit(run_trial, suggest(settings, *key, done[key]), folder, name)] = key
                if not running:
                    break
                for future in cf.wait(running, return_when=cf.FIRST_COMPLETED).done:
                    record(running.pop(future), future.result())
    bar.close()
    return [row for dim in settings.dims for model in models for row in done[model, dim]]


def selected(rows: Iterable[Mapping[str, Any]], model: str, dim: int, *, by: str = "val_loss") -> Mapping[str, Any]:
    """The trial with the lowest validation loss, as in the paper; ``by="spearman"`` is an oracle's choice.

    Raises:
        LookupError: when no trial of this model and dimension succeeded.
    """
    candidates = [r for r in rows if r["model"] == model and r["dim"] == dim and r["status"] == "ok"]
    if not candidates:
        raise LookupError(f"no successful trial of {model} in {dim} dimensions among the records")
    if by == "spearman":
        return max(candidates, key=lambda r: r["spearman"])
    return min(candidates, key=lambda r: r[by])


# -------------------------------------------------------------------------------------------------------------- oracles


def bounds(settings: Study) -> list[dict[str, Any]]:
    """Entropy, rearrangement bound and best Gaussian of each dimension, nats; one row a dimension."""
    rows = []
    for dim in settings.dims:
        started = time.perf_counter()
        mixture = paper_mixture(dim)
        chunk = 50_000
        log_density = torch.cat(
            [
                mixture.log_prob(
                    mixture.sample(min(chunk, settings.bound_samples - start), stable_seed("bound", start))
                )
                for start in range(0, settings.bound_samples, chunk)
            ]
        )
        found = alignment.rearrangement_bound(log_density, dim)
        row: dict[str, Any] = {"dim": dim, "samples": settings.bound_samples}
        for name in ("entropy", "bound", "gap"):
            estimate = getattr(found, name)
            row |= {name: estimate.value, f"{name}_error": estimate.error}
        row |= {
            "gaussian": mixture.gaussian_cross_entropy(),
            "test_entropy": -float(data(settings, dim).log_density.mean()),
            "seconds": time.perf_counter() - started,
        }
        rows.append(row)
    return rows


def baselines(settings: Study) -> list[dict[str, Any]]:
    """Scores that need no network, on the same samples; one row a baseline and dimension."""
    rows = []
    for dim in settings.dims:
        found = data(settings, dim)
        scores: dict[str, Callable[[], Tensor]] = {
            "distance to the mean": functools.partial(alignment.distance_to_mean, found.train, found.test),
            "Mahalanobis": functools.partial(alignment.mahalanobis, found.train, found.test),
            # 10 000 kernels: the estimate is limited by dimension long before it is by their number.
            "KDE": functools.partial(alignment.kde, found.train[:10_000], found.test, validation=found.val),
        }
        for name, compute in scores.items():
            started = time.perf_counter()
            score = compute()
            row: dict[str, Any] = {"baseline": name, "dim": dim}
            for suffix, tail in (("", None), ("_tail", TAIL)):
                for measure in ("spearman", "kendall", "inversions"):
                    row[measure + suffix] = getattr(alignment, measure)(score, found.log_density, tail=tail)
            if name == "KDE":
                row["test_nll"] = float(score.mean())
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------- publication


def points(settings: Study, folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Subsampled test points of each selected model (and of the oracle's Deep SVDD), for figures 2 to 5."""
    keep = np.sort(
        np.random.default_rng(settings.seed).choice(settings.test, min(settings.points, settings.test), False)
    )
    out: list[dict[str, Any]] = []
    for dim in settings.dims:
        test = data(settings, dim).test.numpy()
        for model in MODELS:
            for choice in ("val_loss", "spearman") if model == "deep-svdd" else ("val_loss",):
                try:
                    row = selected(rows, model, dim, by=choice)
                except LookupError:
                    continue
                name = f"{model}-d{dim:03d}-t{row['trial']:02d}"
                with np.load(folder / f"{name}.npz") as stored:
                    arrays = {key: stored[key] for key in stored.files}
                for i in keep:
                    point = {"model": model, "dim": dim, "choice": choice, "trial": row["trial"], "point": int(i)}
                    point |= {key: float(value[i]) for key, value in arrays.items()}
                    if dim == 2:
                        point |= {"x0": float(test[i, 0]), "x1": float(test[i, 1])}
                    out.append(point)
    return out


POINT_COLUMNS = (
    "model",
    "dim",
    "choice",
    "trial",
    "point",
    "true",
    "estimated",
    "norm",
    "log_det",
    "x0",
    "x1",
    "z0",
    "z1",
)


def write(settings: Study, folder: Path, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Gather a run's records under ``out``: the files named in this module's docstring.

    Bounds and baselines depend on the settings alone; they are computed once and kept beside the records.
    """
    oracle = folder / "oracle"
    for name, compute in (("bounds", bounds), ("baselines", baselines)):
        if not (oracle / f"{name}.csv").is_file():
            records.write_csv(oracle / f"{name}.csv", compute(settings))
        records.atomic_write(out / "oracle" / f"{name}.csv", (oracle / f"{name}.csv").read_bytes())
    records.write_csv(out / "trials.csv", rows, COLUMNS)
    records.write_csv(out / "figures" / "points.csv", points(settings, folder, rows), POINT_COLUMNS, digits=5)
    used = {str(row["run"]) for row in rows}
    runs = {p.stem: json.loads(p.read_text("utf8")) for p in sorted((folder / "runs").glob("*.json")) if p.stem in used}
    records.write_json(out / "provenance.json", runs)


def load(folder: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Published records: ``trials``, ``points``, ``bounds``, ``baselines``, each a list of rows.

    Args:
        folder: where they are; ``data/results/mixtures`` by default.
    """
    where = paths.results("mixtures") if folder is None else folder
    return {
        "trials": records.read_csv(where / "trials.csv"),
        "points": records.read_csv(where / "figures" / "points.csv"),
        "bounds": records.read_csv(where / "oracle" / "bounds.csv"),
        "baselines": records.read_csv(where / "oracle" / "baselines.csv"),
    }


def repeat(settings: Study, row: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Train a recorded trial again, here and now, from its settings and seed; returns its measures and arrays."""
    chosen = {name: row[name] for name in search_space(row["model"])}
    trial = Trial(settings, row["model"], row["dim"], row["trial"], chosen)
    model, cost = train(trial)
    measures, arrays = evaluate(model, data(settings, trial.dim))
    return {"model": trial.model, "dim": trial.dim, "trial": trial.number, **cost, **measures}, arrays


def summary(rows: Sequence[Mapping[str, Any]], oracle: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The selected trial of each model and dimension beside the bound; one row each.

    ``above_bound`` is the test NLL's excess over the test points' own entropy, minus the bound's gap, in per cent of
    the bound: both are taken over the same points, so the sampling error of the entropy cancels.
    """
    out = []
    for entry in oracle:
        for model in MODELS:
            try:
                row = selected(rows, model, entry["dim"])
            except LookupError:
                continue
            all_rows = [r for r in rows if r["model"] == model and r["dim"] == entry["dim"]]
            excess = row.get("excess_nll")
            out.append(
                {
                    "model": model,
                    "dim": entry["dim"],
                    "trial": row["trial"],
                    "test_nll": row.get("test_nll"),
                    "bound": entry["test_entropy"] + entry["gap"],
                    "above_bound": None if excess is None else 100 * (excess - entry["gap"]) / abs(entry["bound"]),
                    "spearman": row["spearman"],
                    "kendall": row["kendall"],
                    "inversions": row["inversions"],
                    "spearman_tail": row["spearman_tail"],
                    "best_spearman": max(r["spearman"] for r in all_rows if r["status"] == "ok"),
                    "failed": sum(r["status"] != "ok" for r in all_rows),
                    "seconds": math.fsum(r["seconds"] for r in all_rows),
                }
            )
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes with one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="folder of the records; default: under build/mixtures")
    parser.add_argument(
        "--publish", action="store_true", help="also write the gathered records to data/results/mixtures"
    )
    parser.add_argument("--gather", action="store_true", help="train nothing, gather the records that are there")
    chosen = parser.parse_args(arguments)
    settings = study(chosen.profile)
    folder = chosen.out or paths.build("mixtures", f"{chosen.profile}-{settings.key()}")
    if chosen.gather:
        rows = [r for dim in settings.dims for model in chosen.models for r in finished(folder, model, dim)]
    else:
        rows = run(settings, folder, models=chosen.models, jobs=chosen.jobs)
    write(settings, folder, rows, folder / "gathered")
    if chosen.publish:
        write(settings, folder, rows, paths.results("mixtures"))
    for line in summary(rows, records.read_csv(folder / "gathered" / "oracle" / "bounds.csv")):
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    try:
        from usf.plots import mixtures as figures
    except ImportError as error:
        print(f"no figure: {error}; install the `book` extra")
        return
    from usf import plots

    with plots.theme():
        figure = figures.density_against_norm(load(folder / "gathered")["points"])
    target = folder / "gathered" / "density_against_norm.png"
    figure.savefig(target, facecolor="white")
    print(f"records and figure: {target.parent}")


if __name__ == "__main__":
    main()
