"""What a constant determinant cannot do, measured: five planar targets against four bases and two starts.

Every training uses the same USFlow; only the base differs. The gap of a fixed base to the entropy is bounded below by
the rearrangement bound; a learned radial base has no such bound. Run it::

    python -m usf.study.limits --profile smoke      # seconds
    python -m usf.study.limits --profile full --publish

``--publish`` writes ``data/results/mixtures/limits.csv``, one row a training.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usf import alignment, paths
from usf.flows import AdditiveCoupling, Flow, GaussianBase, LaplaceBase, RadialBase, USFlow
from usf.flows.bases import Base
from usf.study import records
from usf.study.mixtures import negative_log_likelihood, smooth_mlp, stable_seed
from usf.study.profile import select
from usf.study.targets import Shell, StudentT, Target, two_blobs
from usf.training import fit

TARGETS: dict[str, Callable[[], Target]] = {
    "blobs 2": lambda: two_blobs(2.0),
    "blobs 10": lambda: two_blobs(10.0),
    "blobs 100": lambda: two_blobs(100.0),
    "heavy tail": lambda: StudentT(2, 3.0),
    "shell": lambda: Shell(2, 3.0, 0.1),
}
"""Name -> target: two blobs by the ratio of their standard deviations, a Student t with 3 degrees of freedom, a
ring."""

BASES: dict[str, Callable[[], Base]] = {
    "gaussian": lambda: GaussianBase((2,)),
    "gaussian shaken": lambda: GaussianBase((2,)),
    "laplace": lambda: LaplaceBase((2,)),
    "gamma mixture": lambda: RadialBase((2,), 2.0, "gamma-mixture", components=6),
    "spline": lambda: RadialBase((2,), 2.0, "spline"),
}
"""Name -> base: fixed ones, one of them also with a shaken start, and two whose law of the norm is learned."""


SHAKE = 0.1
"""Standard deviation of the conditioners' last weights where a name ends in ``shaken``; else they start at zero."""

FIXED = ("gaussian", "gaussian shaken", "laplace")
"""Bases without parameters: those that the rearrangement bound limits."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of one run: flow, samples, training."""

    targets: tuple[str, ...] = tuple(TARGETS)
    bases: tuple[str, ...] = tuple(BASES)
    blocks: int = 8
    hidden: tuple[int, ...] = (64, 64)
    train: int = 50_000
    val: int = 5_000
    test: int = 20_000
    epochs: int = 24
    batch_size: int = 512
    lr: float = 5e-3
    bound_samples: int = 1_000_000
    seed: int = 0


def settings(profile: str) -> Settings:
    """Settings of one profile (``smoke``, ``book`` or ``full``)."""
    few = ("blobs 10", "shell")
    return select(
        profile,
        smoke=Settings(few, ("gaussian", "gamma mixture"), 3, (32, 32), 3_000, 500, 1_000, 3, bound_samples=50_000),
        book=Settings(
            few, ("gaussian", "gamma mixture"), train=20_000, val=2_000, test=5_000, lr=1e-2, bound_samples=200_000
        ),
        full=Settings(),
    )


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A flow behind the standardisation of its training data: x -> (x - mean) / std, one std for all components.

    One common factor, because a factor for each component would be part of what the flow has to learn.
    """

    flow: Flow
    mean: Tensor
    std: float

    def standardise(self, x: Tensor) -> Tensor:
        """Points as the flow sees them."""
        return (x - self.mean) / self.std

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x) in the units of x, nats."""
        return self.flow.log_prob(self.standardise(x)) - x.shape[-1] * math.log(self.std)

    def score(self, x: Tensor) -> Tensor:
        """The flow's score: the base's, see :meth:`usf.flows.Flow.score`."""
        return self.flow.score(self.standardise(x))

    def distance(self, x: Tensor) -> Tensor:
        """Distance of the latent to the base's centre, whatever the base's score is."""
        return self.flow.base.distance(self.flow.latent(self.standardise(x)))


def train(
    options: Settings, target: Target, base: Base, *, seed: int, shake: float = 0.0, progress: bool = False
) -> tuple[Scaled, float]:
    """A USFlow with the given base trained on the target; returns it in float64 and the seconds it took.

    With ``shake`` the couplings start at random shifts instead of at the identity, which for a target with a rotational
    symmetry is a stationary point of the likelihood.

    Raises:
        FloatingPointError: when the training diverges.
    """
    x, val = target.sample(options.train, 1), target.sample(options.val, 2)
    mean, std = x.mean(0), float((x - x.mean(0)).std())
    torch.manual_seed(seed)
    conditioner = functools.partial(smooth_mlp, hidden=options.hidden)
    flow = USFlow((target.dim,), options.blocks, base=base, conditioner=conditioner)
    flow.validate_args = False
    if shake:
        for part in flow.modules():
            if isinstance(part, AdditiveCoupling):
                torch.nn.init.normal_(list(part.conditioner.parameters())[-2], std=shake)
    history = fit(
        flow,
        negative_log_likelihood,
        ((x - mean) / std).float(),
        val=((val - mean) / std).float(),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=seed,
        schedule="cosine",
        progress=progress,
    )
    return Scaled(flow.double(), mean, std), history.seconds


@functools.lru_cache(maxsize=16)
def oracle(name: str, base: str, samples: int) -> alignment.RearrangementBound:
    """Entropy and rearrangement bound of a target; for a learned base, the bound of the Gaussian it contains."""
    target = TARGETS[name]()
    log_density = target.log_prob(target.sample(samples, stable_seed("bound", name)))
    return alignment.rearrangement_bound(log_density, target.dim, base="laplace" if base == "laplace" else "gaussian")


@functools.lru_cache(maxsize=16)
def gap_on_test(name: str, base: str, count: int) -> float:
    """The bound's gap on the test points themselves; 0 for a learned base.

    Of a heavy tail the two differ: its squared norm has an infinite variance, so that no test set holds its share of
    rare far points, and a model can look better on it than the bound allows on average.
    """
    if base not in FIXED:
        return 0.0
    target = TARGETS[name]()
    norm = "laplace" if base == "laplace" else "gaussian"
    return alignment.rearrangement_bound(target.log_prob(target.sample(count, 3)), target.dim, base=norm).gap.value


@torch.no_grad()
def evaluate(model: Scaled, target: Target, count: int) -> dict[str, float]:
    """Measures on fresh test points."""
    x = target.sample(count, 3)
    truth, estimated = target.log_prob(x), model.log_prob(x)
    return {
        "test_nll": -float(estimated.mean()),
        "excess_nll": float((truth - estimated).mean()),
        "excess_error": float((truth - estimated).std()) / math.sqrt(count),
        "spearman": alignment.spearman(model.score(x), truth),
        "spearman_distance": alignment.spearman(model.distance(x), truth),
        "spearman_tail": alignment.spearman(model.score(x), truth, tail=0.05),
    }


COLUMNS: tuple[str, ...] = tuple(
    """
    target base status reason entropy bound gap gap_error test_gap test_nll excess_nll excess_error closed
    spearman spearman_distance spearman_tail
    seconds seed settings_hash run
    """.split()
)
"""Columns of ``limits.csv``. ``gap`` is the rearrangement bound minus the entropy (0 for a learned base), ``test_gap``
the same on the test points, ``closed`` the share of the *Gaussian* bound's gap that the training closed: 1 at the
entropy, 0 at the bound, negative above it."""


def run_one(options: Settings, name: str, base: str, run: str, *, progress: bool = False) -> dict[str, Any]:
    """Train and measure one pair; a divergence is a row with its reason."""
    target, seed = TARGETS[name](), stable_seed(options.seed, name, base)
    bound = oracle(name, base, options.bound_samples)
    learned = base not in FIXED
    gaussian = oracle(name, "gaussian", options.bound_samples)
    row: dict[str, Any] = {
        "target": name,
        "base": base,
        "entropy": bound.entropy.value,
        "bound": bound.entropy.value if learned else bound.bound.value,
        "gap": 0.0 if learned else bound.gap.value,
        "gap_error": 0.0 if learned else bound.gap.error,
        "seed": seed,
        "settings_hash": records.settings_hash(
            {**dataclasses.asdict(options), "targets": None, "bases": None, "target": name, "base": base}
        ),
        "run": run,
    }
    started = time.perf_counter()
    try:
        model, row["seconds"] = train(
            options,
            target,
            BASES[base](),
            seed=seed,
            shake=SHAKE if base.endswith("shaken") else 0.0,
            progress=progress,
        )
        row |= {
            "status": "ok",
            **evaluate(model, target, options.test),
            "test_gap": gap_on_test(name, base, options.test),
        }
        row["closed"] = 1 - row["excess_nll"] / gaussian.gap.value
    except (ArithmeticError, RuntimeError, ValueError) as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        row["seconds"] = time.perf_counter() - started
    return row


def run(options: Settings, folder: Path, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run what is missing under ``folder``, one JSON file a training; returns all rows."""
    from tqdm.auto import tqdm

    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{records.settings_hash(options)}"
    pairs = [(target, base) for target in options.targets for base in options.bases]
    rows = []
    for target, base in tqdm(pairs, desc="limits", unit="training", disable=not progress):
        path = folder / f"{target}-{base}.json".replace(" ", "-")
        if not path.is_file():
            runs = folder / "runs" / f"{name}.json"
            if not runs.is_file():
                records.write_json(runs, {**records.provenance(), "settings": options, "jobs": 1, "threads": 1})
            records.write_json(path, run_one(options, target, base, name))
        rows.append(json.loads(path.read_text("utf8")))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--out", type=Path, help="folder of the records; default: under build/limits")
    parser.add_argument("--publish", action="store_true", help="also write data/results/mixtures/limits.csv")
    chosen = parser.parse_args(arguments)
    options = settings(chosen.profile)
    folder = chosen.out or paths.build("limits", f"{chosen.profile}-{records.settings_hash(options)}")
    torch.set_num_threads(1)
    rows = run(options, folder)
    target = paths.results("mixtures") if chosen.publish else folder
    records.write_csv(target / "limits.csv", rows, COLUMNS)
    used = {row["run"] for row in rows}
    runs = {p.stem: json.loads(p.read_text("utf8")) for p in sorted((folder / "runs").glob("*.json")) if p.stem in used}
    records.write_json(target / "limits-provenance.json", runs)
    for row in rows:
        print(
            "  ".join(
                f"{k} {row[k]:.4f}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in COLUMNS if k in row
            )
        )


if __name__ == "__main__":
    main()
