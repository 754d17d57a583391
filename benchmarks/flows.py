"""Speed of ``usf.flows`` against the authors' library, zuko, normflows and nflows: same architecture, data, threads.

Run it from the repository (see README.md beside this file for how the peers are installed, outside of the project)::

    python benchmarks/flows.py --out data/results/benchmarks/flows.csv --repeats 15 --peers PATH --peers PATH

Four measures at each dimension and batch size: the log-density of a batch (no gradients), a training step (forward,
backward, Adam), sampling a batch, and one whole training on the paper's mixture. The models take turns within every
repeat, in an order that changes from repeat to repeat, so that whatever else the machine does hits all of them alike;
a ratio is formed within each repeat and summarised by its median and quartiles. Above 1 the peer is slower than usf.

With one thread the clock is the process's own CPU time, which is what a stopwatch would show on a machine with nothing
else to do; with more threads it is wall time.

A peer that cannot be imported, or a cell that fails, is a row with its reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from usf.flows import MLP, AdditiveCoupling, AffineCoupling, Bijection, Chain, Flow, LULinear, Sandwich
from usf.study import records
from usf.study.targets import paper_mixture
from usf.training import fit

BLOCKS, HIDDEN, LR, SEED = 4, (64, 64), 1e-3, 0
TRAIN_SAMPLES, EPOCHS, TEST_SAMPLES = 1024, 2, 2048

ARCHITECTURES = {
    "sandwich": "A^-1 C A blocks, additive C, LU maps A, and a last LU map: the paper's",
    "plain": "LU map and additive coupling in turns, and a last LU map: Glow's",
    "affine": "the sandwich with affine couplings: the paper's non-USF",
}
MEASURES = ("log_prob", "step", "sample", "training")
# fmt: off
COLUMNS = [
    "architecture", "model", "measure", "dim", "batch", "status", "reason", "repeats", "seconds", "seconds_q25",
    "seconds_q75", "ratio", "ratio_q25", "ratio_q75", "test_nll", "parameters", "deviation", "version", "revision",
    "threads", "blocks", "hidden", "lr", "seed", "settings_hash", "wall_seconds",
]
# fmt: on


@dataclass
class Model:
    """One library's flow behind the two calls that are timed. ``deviation`` says how it differs from usf's flow."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    deviation: str = ""
    measures: tuple[str, ...] = MEASURES
    own_loop: Callable[[Tensor, int], Any] | None = None  # trains on (samples, batch size) in place of the project's

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)


class Unsupported(Exception):
    """The library has no such architecture."""


# --- the same flow in five libraries ----------------------------------------------------------------------------------


def kept_first(dim: int, index: int) -> Tensor:
    """Boolean (dim,): true where block ``index`` leaves its input alone, the halves in turns."""
    first = torch.arange(dim) < dim // 2
    return ~first if index % 2 else first


def usf(dim: int, architecture: str) -> Model:
    parts: list[Bijection] = []
    for index in range(BLOCKS):
        coupling = AffineCoupling if architecture == "affine" else AdditiveCoupling
        linear, inner = LULinear(dim), coupling(dim, flip=index % 2 == 1, hidden=HIDDEN)
        parts += [linear, inner] if architecture == "plain" else [Sandwich(linear, inner)]
    flow = Flow(Chain([*parts, LULinear(dim)]))
    return Model(flow, flow.log_prob, lambda n: flow.sample((n,)))


def usf_fused(dim: int, architecture: str) -> Model:
    flow = usf(dim, architecture).module
    assert isinstance(flow, Flow)
    fused = flow.fuse()
    return Model(
        fused,
        fused.log_prob,
        lambda n: fused.sample((n,)),
        "Flow.fuse(): neighbouring linear maps merged; for inference only",
        ("log_prob", "sample"),
    )


def conditioners(dim: int, architecture: str) -> Model:
    """The conditioners alone, which every library runs alike: nothing on top of them could be faster than this."""
    kept = [int(kept_first(dim, index).sum()) for index in range(BLOCKS)]
    outputs = 2 if architecture == "affine" else 1
    nets = nn.ModuleList(MLP(k, outputs * (dim - k), HIDDEN) for k in kept)

    def log_prob(x: Tensor) -> Tensor:
        return sum((net(x[:, :k]).sum(-1) for net, k in zip(nets, kept, strict=True)), torch.zeros(len(x)))

    return Model(nets, log_prob, lambda n: torch.empty(n), "no flow: the bound", ("log_prob", "step"))


def authors(dim: int, architecture: str) -> Model:
    if architecture == "affine":
        raise Unsupported("the library has no affine flow")
    module = importlib.import_module("src.usflows.flows")
    flow = module.USFlow(
        torch.distributions.Normal(torch.zeros(dim), torch.ones(dim)),
        [dim],
        BLOCKS,
        MLP,
        {"in_features": dim, "out_features": dim, "hidden": HIDDEN},
        prior_scale=1.0,
        affine_conjugation=architecture == "sandwich",
        householder=0,
    )
    return Model(
        flow,
        flow.log_prob,
        lambda n: flow.sample([n]),
        "masks multiply, so conditioners are d to d; alternating mask; one more scale layer; random initialisation",
    )


def authors_loop(dim: int, architecture: str) -> Model:
    model = authors(dim, architecture)

    def loop(train: Tensor, batch: int) -> None:
        data = torch.utils.data.TensorDataset(train)
        model.module.fit(data, optim_params={"lr": LR}, batch_size=batch, epochs=EPOCHS)  # type: ignore[operator]

    model.own_loop, model.measures = loop, ("training",)
    model.deviation += "; trained by its own loop and optimiser"
    return model


def zuko(dim: int, architecture: str) -> Model:
    z = importlib.import_module("zuko")
    lazy, transforms, coupling = z.lazy, z.transforms, importlib.import_module("zuko.flows.coupling")
    kind: dict[str, Any] = {"univariate": transforms.AdditiveTransform, "shapes": [()]}
    if architecture == "affine":
        kind = {"univariate": transforms.MonotonicAffineTransform, "shapes": [(), ()]}
    parts: list[Any] = []
    for index in range(BLOCKS):
        linear = lazy.UnconditionalTransform(transforms.LULinearTransform, torch.eye(dim))
        inner = coupling.GeneralCouplingTransform(
            dim, mask=kept_first(dim, index), hidden_features=list(HIDDEN), **kind
        )
        parts += [linear, inner] if architecture == "plain" else [linear, inner, linear.inv]
    parts.append(lazy.UnconditionalTransform(transforms.LULinearTransform, torch.eye(dim)))
    base = lazy.UnconditionalDistribution(z.distributions.DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
    flow = lazy.Flow(parts, base)
    return Model(
        flow,
        lambda x: flow().log_prob(x),
        lambda n: flow().sample((n,)),
        "LU maps without bias, diagonal not constrained",
    )


def normflows(dim: int, architecture: str) -> Model:
    nf = importlib.import_module("normflows")
    mixing = importlib.import_module("normflows.flows.mixing")
    affine = architecture == "affine"
    parts: list[Any] = []
    for index in range(BLOCKS):
        linear = mixing._LULinear(dim)
        kept = int(kept_first(dim, index).sum())
        inner = nf.flows.AffineCouplingBlock(
            MLP(kept, (1 + affine) * (dim - kept), HIDDEN),
            scale=affine,
            split_mode="channel_inv" if index % 2 else "channel",
        )
        parts += [linear, inner] if architecture == "plain" else [linear, inner, nf.flows.Reverse(linear)]
    parts.append(mixing._LULinear(dim))
    # The library lists its flows from latent to data and runs them backwards for a density.
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(dim, trainable=False), [nf.flows.Reverse(part) for part in reversed(parts)]
    )
    return Model(
        flow,
        flow.log_prob,
        lambda n: flow.sample(n)[0],
        "LULinearPermute without its permutation; diagonal by softplus",
    )


class _Contextless(MLP):
    """nflows calls conditioners with a context, here always None."""

    def forward(self, input: Tensor, context: None = None) -> Tensor:
        return super().forward(input)


def _nflows(dim: int, architecture: str, cached: bool) -> Model:
    transforms = importlib.import_module("nflows.transforms")
    flows, base = importlib.import_module("nflows.flows"), importlib.import_module("nflows.distributions")
    coupling = transforms.AffineCouplingTransform if architecture == "affine" else transforms.AdditiveCouplingTransform
    parts: list[Any] = []
    for index in range(BLOCKS):
        linear = transforms.LULinear(dim, using_cache=cached)
        moved = (~kept_first(dim, index)).int()
        inner = coupling(moved, lambda inside, outside: _Contextless(inside, outside, HIDDEN))
        parts += [linear, inner] if architecture == "plain" else [linear, inner, transforms.InverseTransform(linear)]
    parts.append(transforms.LULinear(dim, using_cache=cached))
    flow = flows.Flow(transforms.CompositeTransform(parts), base.StandardNormal([dim]))
    return Model(flow, flow.log_prob, flow.sample, "diagonal by softplus")


def nflows(dim: int, architecture: str) -> Model:
    return _nflows(dim, architecture, cached=False)


def nflows_cached(dim: int, architecture: str) -> Model:
    model = _nflows(dim, architecture, cached=True)
    model.deviation = "using_cache: matrices and their inverses kept between calls; for inference only"
    model.measures = ("log_prob", "sample")
    return model


MODELS: dict[str, Callable[[int, str], Model]] = {
    "usf": usf,
    "usf fused": usf_fused,
    "conditioners": conditioners,
    "authors": authors,
    "authors' loop": authors_loop,
    "zuko": zuko,
    "normflows": normflows,
    "nflows": nflows,
    "nflows cached": nflows_cached,
}


def version(name: str) -> str:
    """Version of a peer; the authors' library is a checkout, named by its revision."""
    if name.startswith("authors"):
        import subprocess

        module = sys.modules.get("src.usflows.flows")
        if module is None or module.__file__ is None:
            return ""
        command = ["git", "-C", str(Path(module.__file__).parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    try:
        return importlib.metadata.version(name.split()[0])
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- timing -----------------------------------------------------------------------------------------------------------


def operation(model: Model, measure: str, dim: int, batch: int) -> Callable[[], None]:
    """What is timed, without arguments: one call of ``measure`` on a batch of the mixture."""
    x = paper_mixture(dim).sample(batch, SEED).float()
    if measure == "log_prob":
        model.module.eval()

        def call() -> None:
            with torch.no_grad():
                model.log_prob(x)
    elif measure == "sample":
        model.module.eval()

        def call() -> None:
            with torch.no_grad():
                model.sample(batch)
    else:
        model.module.train()
        trainable = [p for p in model.module.parameters() if p.requires_grad]
        # A tiny rate: the weights stay where they are however often the step is timed.
        optimizer = torch.optim.Adam(trainable, lr=1e-7, fused=True)

        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            (-model.log_prob(x).mean()).backward()
            optimizer.step()

    return call


def clock() -> float:
    """Seconds since some moment: CPU time of the process when it has one thread, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(call: Callable[[], Any], count: int) -> float:
    """Seconds a call, mean over ``count`` calls."""
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count


def build(name: str, dim: int, architecture: str) -> Model:
    """The library's flow from a fixed seed."""
    torch.manual_seed(SEED)
    return MODELS[name](dim, architecture)


def train_once(name: str, dim: int, batch: int, architecture: str) -> tuple[float, float]:
    """(seconds, test NLL in nats) of one whole training from a fresh model, by default by the project's loop."""
    model, target = build(name, dim, architecture), paper_mixture(dim)
    train, test = (target.sample(n, seed).float() for n, seed in ((TRAIN_SAMPLES, 1), (TEST_SAMPLES, 2)))
    started = clock()
    if model.own_loop is not None:
        model.own_loop(train, batch)
    else:
        objective = lambda _, x: -model.log_prob(x).mean()  # noqa: E731
        fit(model.module, objective, train, epochs=EPOCHS, batch_size=batch, lr=LR, seed=SEED, progress=False)
    seconds = clock() - started
    with torch.no_grad():
        nll = -model.log_prob(test).mean().item()
    return seconds, nll


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def measure_cell(
    architecture: str, measure: str, dim: int, batch: int, names: Iterable[str], repeats: int
) -> list[dict[str, Any]]:
    """Rows of one cell: every model timed in turns."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], float]] = {}
    for name in names:
        row: dict[str, Any] = {"architecture": architecture, "model": name, "measure": measure, "dim": dim}
        row |= {"batch": batch, "status": "ok", "reason": "", "repeats": repeats}
        try:
            model = build(name, dim, architecture)
        except ImportError as error:
            rows[name] = row | {"status": "missing", "reason": str(error), "repeats": 0}
            continue
        except Unsupported as error:
            rows[name] = row | {"status": "unsupported", "reason": str(error), "repeats": 0}
            continue
        if measure not in model.measures:
            continue
        row |= {"parameters": model.parameters, "deviation": model.deviation, "version": version(name)}
        rows[name] = row
        try:
            if measure == "training":

                def training(name: str = name) -> float:
                    seconds, rows[name]["test_nll"] = train_once(name, dim, batch, architecture)
                    return seconds

                calls[name] = training
            else:
                call = operation(model, measure, dim, batch)
                timed(call, 1)
                # Calls too short for the clock are timed in bundles of some milliseconds.
                count = max(1, min(10, math.ceil(4e-3 / timed(call, 1))))
                calls[name] = lambda call=call, count=count: timed(call, count)  # type: ignore[misc]
        except Exception as error:  # a peer's failure is a row
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        order = list(calls)
        shift = repeat % len(order)
        for name in order[shift:] + order[:shift]:
            if rows[name]["status"] != "ok":
                continue
            try:
                seconds[name].append(calls[name]())
            except Exception as error:
                rows[name] |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
    for name, row in rows.items():
        if row["status"] == "ok":
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["usf"], strict=True)]
            row["seconds"], row["seconds_q25"], row["seconds_q75"] = _summary(seconds[name])
            row["ratio"], row["ratio_q25"], row["ratio_q75"] = _summary(ratios)
    return list(rows.values())


def run(
    out: Path,
    *,
    repeats: int,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    models: Sequence[str] = tuple(MODELS),
    dims: Sequence[int] = (2, 32, 128),
    batches: Sequence[int] = (64, 512),
    measures: Sequence[str] = MEASURES,
    threads: int = 1,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure every cell and write ``out`` (CSV) with ``provenance.json`` beside it.

    Raises:
        ValueError: for an unknown name, or when usf, to which all is relative, is not among the models.
    """
    for given, known in ((architectures, ARCHITECTURES), (models, MODELS), (measures, MEASURES)):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown: {sorted(unknown)}; known: {list(known)}")
    if "usf" not in models or repeats < 1:
        raise ValueError("'usf' must be among the models (ratios are relative to it), and repeats at least 1")
    torch.set_num_threads(threads)
    started, provenance = time.perf_counter(), records.provenance(("torch", "numpy"))
    settings = {"blocks": BLOCKS, "hidden": list(HIDDEN), "lr": LR, "seed": SEED, "threads": threads}
    settings |= {"clock": "process CPU time" if threads == 1 else "wall time"}
    settings |= {"train_samples": TRAIN_SAMPLES, "epochs": EPOCHS, "dtype": "float32", "repeats": repeats}
    shared = {
        "revision": provenance["revision"],
        "threads": threads,
        "blocks": BLOCKS,
        "hidden": "x".join(map(str, HIDDEN)),
        "lr": LR,
        "seed": SEED,
        "settings_hash": records.settings_hash(settings),
    }
    train_once("usf", dims[0], batches[0], architectures[0])  # the first training of a process pays for its imports
    cells = [(a, m, d, b) for a in architectures for m in measures for d in dims for b in batches]
    provenance |= {"settings": settings, "architectures": {name: ARCHITECTURES[name] for name in architectures}}
    rows: list[dict[str, Any]] = []
    bar = tqdm(cells, disable=not progress)
    for architecture, measure, dim, batch in bar:
        bar.set_description(f"{architecture} {measure} d={dim} batch={batch}")
        # A training is hundreds of steps, which average out what short timings need repeats for.
        count = min(repeats, max(3, math.ceil(repeats / 5))) if measure == "training" else repeats
        begun = time.perf_counter()
        cell = measure_cell(architecture, measure, dim, batch, models, count)
        rows += [row | shared | {"wall_seconds": time.perf_counter() - begun} for row in cell]
        # After every cell, so that what a killed run has measured is kept.
        records.write_csv(out, rows, COLUMNS, digits=4)
        provenance["wall_seconds"] = round(time.perf_counter() - started, 1)
        provenance["load"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
        records.write_json(out.parent / "provenance.json", provenance)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file; provenance.json is written beside it")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", type=Path, action="append", default=[], help="folder to import peers from (repeat)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 32, 128])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    given = parser.parse_args(arguments)
    for folder in given.peers:
        if not folder.is_dir():
            parser.error(f"--peers {folder} is not a folder")
        # At the end: of what project and peers share (torch), the project's version is used.
        sys.path.append(str(folder.resolve()))
    warnings.filterwarnings("ignore")  # the peers' deprecations are not this benchmark's business
    run(
        given.out,
        repeats=given.repeats,
        architectures=given.architectures,
        models=given.models,
        dims=given.dims,
        batches=given.batches,
        measures=given.measures,
        threads=given.threads,
    )
    from usf.study.speed import table

    for architecture in given.architectures:
        print(f"\n{architecture}: {ARCHITECTURES[architecture]}\n{table(given.out, architecture).to_string()}")


if __name__ == "__main__":
    main()
