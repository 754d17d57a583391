"""The trials: what the search asks for, a training, its measures, and a run that goes on where it was stopped."""

from __future__ import annotations

import concurrent.futures as cf
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from usf import alignment
from usf.flows import Flow
from usf.oneclass import DeepSVDD, collapse_report, decreasing_schedule, fit_deep_svdd
from usf.study import records
from usf.study.mixtures.experiment import (
    FLOWS,
    MODELS,
    TAIL,
    Data,
    Study,
    build_flow,
    data,
    negative_log_likelihood,
    stable_seed,
)
from usf.training import fit

Arrays = dict[str, npt.NDArray[np.float64]]


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


def trial_name(model: str, dim: int, number: int) -> str:
    """Of a trial, and of the files that hold it."""
    return f"{model}-d{dim:03d}-t{number:02d}"


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
        return trial_name(self.model, self.dim, self.number)

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


def finished(folder: Path, model: str, dim: int) -> list[dict[str, Any]]:
    """Records of one model and dimension in the order of their trials, up to the first gap."""
    rows: list[dict[str, Any]] = []
    while (path := folder / f"{trial_name(model, dim, len(rows))}.json").is_file():
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
