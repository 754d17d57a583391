"""Where training breaks: flows under stress, one run a row, failed runs included (paper, section 6).

A run is a short training at a given learning rate. It *breaks* if, at any step, the loss, an entry of a gradient, a
parameter or a second moment of Adam is not finite; it *fails* if it breaks, or if the weights that it ends with give
held-out normal data a loss that no flow at all would not have exceeded. That is decided here (:func:`outcome`), once,
for every run. Of a run that breaks it is found out which block made the first such value (:func:`locate`).

Six parts, each a set of runs (:func:`cases`):

``mixture``
    The architecture of section 4.3 at its full depth on the 128-dimensional mixture: learning rate, coupling, remedy.
``width``
    The same without remedies in 8 to 512 dimensions.
``start``
    Random starts, as published, with 2 to 10 blocks: one step each.
``long``
    Random and identity starts at the largest published learning rate, for more steps.
``features``
    FastFlow on frozen ResNet-18 features of a class of images.
``resolution``
    A few of those at the benchmark's 128 pixels.

::

    python -m usf.study.stability mixture --profile smoke
    python -m usf.study.stability features --profile book --publish

Each run is one JSON file under ``build/stability``, written at once; what is there is not run again. ``--publish``
gathers all parts into ``data/results/stability/runs.csv``, with provenance and the traces of some runs beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from usf import paths
from usf.flows import Chain, Flow, LULinear, NonUSFlow, Sandwich, USFlow
from usf.study import records
from usf.study.profile import select
from usf.study.targets import paper_mixture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from usf.study.features import Features

__all__ = [
    "COLUMNS",
    "PARTS",
    "REMEDIES",
    "Case",
    "FeatureSubject",
    "Run",
    "Station",
    "Subject",
    "Terms",
    "Trace",
    "VectorSubject",
    "build",
    "cases",
    "edge",
    "growth",
    "load",
    "locate",
    "outcome",
    "publish",
    "randomise",
    "run_case",
    "run_flow",
    "stress",
]

Part = Literal["mixture", "width", "start", "long", "features", "resolution"]
PARTS: tuple[Part, ...] = get_args(Part)
VECTORS: tuple[Part, ...] = ("mixture", "width", "start", "long")
"""Parts on the mixture."""

REMEDIES = {
    "none": "as it is: identity start, log-scales within ±2, single precision",
    "clamp 0.5": "log-scales within ±0.5",
    "clamp 5": "log-scales within ±5",
    "prior": "the determinant prior with σ = 1, maximum a posteriori",
    "clipping": "gradients scaled to a norm of at most 1",
    "double": "double precision",
    "warm-up": "the learning rate rises linearly over the first half",
    "slow LU": "the learning rate of LU maps divided by their number of channels",
    "random start": "LU maps and conditioners start at random",
    "published start": "the random start with log-scales within ±5",
}
"""What is done to a run. Three are no remedies but settings of the authors' published flows, as we read them."""

LOOK_EVERY = 20
"""Steps between two looks at the singular values of the LU maps, which cost as much as a step."""

CLAMP = 2.0
"""anomalib's, and ours: log-scales are within +-2."""
CLAMPS = {"clamp 0.5": 0.5, "clamp 5": 5.0, "published start": 5.0}


# ------------------------------------------------------------------------------------------ what is trained


class Terms(NamedTuple):
    """The loss of a batch and its parts.

    Attributes:
        loss: what is minimised, 0-dim.
        z: latents, one tensor a stage.
        log_det: ln|det J| of each sample, (N,), nats.
    """

    loss: Tensor
    z: Sequence[Tensor]
    log_det: Tensor


class Station(NamedTuple):
    """A place on the way through a flow: one block, with its conditioner and its LU map where it has one."""

    name: str
    block: nn.Module
    conditioner: nn.Module | None
    lu: LULinear | None


class Subject(Protocol):
    """What can be put under stress."""

    module: nn.Module
    stations: list[Station]

    def terms(self, batch: Any) -> Terms:
        """The loss of a batch."""
        ...

    def idle(self, batch: Any) -> Tensor:
        """The same loss without any flow: the base density of what enters it, 0-dim."""
        ...

    def log_prior(self, sigma: float) -> Tensor:
        """Log-density of the determinant prior over the LU maps, 0-dim."""
        ...


class VectorSubject:
    """A :class:`usf.flows.Flow` of sandwiches on vectors; batches are (N, d)."""

    def __init__(self, flow: Flow) -> None:
        self.module: nn.Module = flow
        self.flow = flow
        parts = list(cast(Chain, flow.bijection).parts)
        self.stations = [
            Station(f"block {i}", part, cast(nn.Module, part.inner.conditioner), cast(LULinear, part.outer))
            for i, part in enumerate(parts[:-1], start=1)
            if isinstance(part, Sandwich)
        ]
        self.stations.append(Station("last map", parts[-1], None, cast(LULinear, parts[-1])))

    def terms(self, batch: Tensor) -> Terms:
        """Mean negative log-likelihood, nats."""
        z, log_det = self.flow.bijection(batch)
        return Terms(-(self.flow.base.log_prob(z) + log_det).mean(), [z], log_det.expand(len(batch)))

    def idle(self, batch: Tensor) -> Tensor:
        """Mean negative log-density of the batch under the base."""
        return -self.flow.base.log_prob(batch).mean()

    def log_prior(self, sigma: float) -> Tensor:
        """See :meth:`usf.flows.Flow.log_prior`."""
        return self.flow.log_prior(sigma)


class FeatureSubject:
    """A FastFlow model on frozen features; batches are lists of maps (N, C_i, H_i, W_i). anomalib's loss."""

    def __init__(self, model: Any) -> None:
        self.module: nn.Module = model
        self.model = model
        self.stations = [
            Station(f"stage {i}, block {j}", block, block.subnet, block.lu)
            for i, flow in enumerate(model.fast_flow_blocks, start=1)
            for j, block in enumerate(flow.module_list, start=1)
        ]

    def terms(self, batch: Sequence[Tensor]) -> Terms:
        """The loss of ``FastflowModel.losses``, nats an image, with its parts."""
        hidden, log_dets = self.model.latents(batch)
        energy = torch.stack([0.5 * z.square().sum() for z in hidden]).sum()
        log_det = torch.stack([part.flatten(1).sum(dim=1) for part in log_dets]).sum(dim=0)
        return Terms((energy - log_det.sum()) / len(hidden[0]), hidden, log_det)

    def idle(self, batch: Sequence[Tensor]) -> Tensor:
        """Half the squared norm of the normalised features, mean over images."""
        normal = [nn.functional.layer_norm(level, level.shape[1:]) for level in batch]
        return torch.stack([0.5 * level.square().sum() for level in normal]).sum() / len(batch[0])

    def log_prior(self, sigma: float) -> Tensor:
        """Sum over the LU maps."""
        layers = [station.lu for station in self.stations if station.lu is not None]
        return torch.stack([layer.log_prior(sigma) for layer in layers]).sum()


def randomise(subject: Subject, generator: torch.Generator) -> None:
    """Start LU maps and conditioners as the authors' published code does, as we read it.

    Entries of L and U off the diagonal are uniform with variance 2 / c, ln|u_i| is normal with standard deviation 1 / c
    and the bias uniform in +-1 / sqrt(c); conditioners keep no zero layer. (Their diagonals have random signs, which we
    leave out.)
    """
    with torch.no_grad():
        for station in subject.stations:
            if station.lu is not None:
                weight, bias = station.lu.weight, station.lu.bias
                c = len(bias)
                drawn = (2 * torch.rand(c, c, generator=generator) - 1) * math.sqrt(6 / c)
                diagonal = torch.randn(c, generator=generator) / c
                weight.copy_(drawn.tril(-1) + drawn.triu(1) + torch.diag(diagonal))
                bias.copy_((2 * torch.rand(c, generator=generator) - 1) / math.sqrt(c))
            last = [m for m in station.conditioner.modules() if isinstance(m, nn.Linear)] if station.conditioner else []
            for layer in last[-1:]:
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
                layer.bias.copy_((2 * torch.rand(layer.bias.shape, generator=generator) - 1) * bound)


# ------------------------------------------------------------------------------------------ where, and how far


Callback = Callable[[str, str, Tensor], None]


@contextlib.contextmanager
def _watching(subject: Subject, note: Callback) -> Iterator[None]:
    """While open, every pass calls ``note(station, quantity, value)`` in the order in which values are made."""
    hooks = []
    wrapped: list[nn.Module] = []
    for station in subject.stations:
        name = station.name
        if station.conditioner is not None:
            hooks += [
                station.conditioner.register_forward_pre_hook(
                    lambda _, inputs, name=name: note(name, "input of the conditioner", inputs[0])
                ),
                station.conditioner.register_forward_hook(
                    lambda _, __, output, name=name: note(name, "conditioner", output)
                ),
            ]
        if hasattr(station.block, "transform"):  # anomalib's flow is walked through by this, not by a module's call
            station.block.transform = functools.partial(_noted, station.block.transform, name, note)  # type: ignore[assignment]
            wrapped.append(station.block)
        else:

            def after(_: nn.Module, __: Any, output: tuple[Tensor, Tensor], name: str = name) -> None:
                note(name, "log-determinant", output[1])
                note(name, "output", output[0])

            hooks.append(station.block.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block in wrapped:
            del block.transform


def _noted(transform: Any, name: str, note: Callback, *arguments: Any) -> tuple[Tensor, Tensor]:
    y, log_det = transform(*arguments)
    note(name, "log-determinant", log_det)
    note(name, "output", y)
    return y, log_det


def locate(subject: Subject, batch: Any) -> tuple[str, str] | None:
    """(station, quantity) of the first value that is not finite on the way of a batch to its loss; else ``None``.

    ``output`` is what a block passes on; ``input of the conditioner``, in a sandwich, is the product with its LU map.
    A pass that is finite up to the latents and has an infinite loss is ``("loss", "energy")``: squares overflow first.
    """
    found: list[tuple[str, str]] = []

    def note(name: str, quantity: str, value: Tensor) -> None:
        if not found and not bool(torch.isfinite(value).all()):
            found.append((name, quantity))

    with torch.no_grad(), _watching(subject, note):
        terms = subject.terms(batch)
    note("loss", "log-determinant", terms.log_det)
    note("loss", "energy", terms.loss)
    return found[0] if found else None


def growth(subject: Subject, batch: Any) -> dict[str, float]:
    """Largest absolute value that each block passes on, in order."""
    reach: dict[str, float] = {}

    def note(name: str, quantity: str, value: Tensor) -> None:
        if quantity == "output":
            reach[name] = float(value.abs().max())

    with torch.no_grad(), _watching(subject, note):
        subject.terms(batch)
    return reach


def conditioning(subject: Subject) -> tuple[float, float]:
    """(largest condition number, largest singular value) of the subject's matrices LU; NaN where one is not finite."""
    worst, gain = 1.0, 1.0
    with torch.no_grad():
        for station in subject.stations:
            if station.lu is None:
                continue
            matrix = station.lu.matrix().double()
            if not bool(torch.isfinite(matrix).all()):
                return math.nan, math.nan
            values = torch.linalg.svdvals(matrix)
            smallest = max(float(values[-1]), 5e-324)
            worst = max(worst, float(values[0]) / smallest)
            gain = max(gain, float(values[0]))
    return worst, gain


# ------------------------------------------------------------------------------------------ one training


@dataclasses.dataclass
class Trace:
    """What was seen at each step, before the step was made.

    Attributes:
        loss: nats a sample.
        log_det, log_det_std: mean and standard deviation over the batch of ln|det J|, nats.
        reach: largest absolute latent.
        gradient: largest absolute entry of the gradient.
        looks: steps at which singular values were computed.
        condition, gain: largest condition number and singular value of an LU matrix at each of ``looks``.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    log_det: list[float] = dataclasses.field(default_factory=list)
    log_det_std: list[float] = dataclasses.field(default_factory=list)
    reach: list[float] = dataclasses.field(default_factory=list)
    gradient: list[float] = dataclasses.field(default_factory=list)
    looks: list[int] = dataclasses.field(default_factory=list)
    condition: list[float] = dataclasses.field(default_factory=list)
    gain: list[float] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        """Losses seen."""
        return len(self.loss)


@dataclasses.dataclass
class Run:
    """What came of a training.

    Attributes:
        trace: step by step.
        held_idle: loss of held-out data without a flow, nats.
        held_start, held_end: with it, before the first and after the last step; NaN at the end of a run that broke.
        broken: (step, station, quantity) of the first value that was not finite, or ``None``.
    """

    trace: Trace
    held_idle: float
    held_start: float
    held_end: float = math.nan
    broken: tuple[int, str, str] | None = None


def outcome(run: Run) -> Literal["ok", "not finite", "worse than no flow"]:
    """What is called a failure, for every run of this study: anything but ``"ok"``."""
    if run.broken is not None or not math.isfinite(run.held_end):
        return "not finite"
    return "ok" if run.held_end < run.held_idle else "worse than no flow"


def _largest(tensors: Sequence[Tensor]) -> float:
    """Largest absolute entry; NaN or infinity where there is one."""
    if not tensors:
        return 0.0
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(tensors), math.inf)])
    return float(norms.max()) if bool(torch.isfinite(norms).all()) else math.nan


def stress(
    subject: Subject,
    batches: Iterator[Any],
    held: Any,
    *,
    steps: int,
    lr: float,
    remedy: str = "none",
    samples: int = 1,
    weight_decay: float = 0.0,
    look_every: int = LOOK_EVERY,
) -> Run:
    """Train for ``steps`` steps of Adam, or until something is not finite.

    Args:
        subject: trained in place.
        batches: endless.
        held: held-out batch.
        remedy: of :data:`REMEDIES`, the part that concerns the optimiser and the loss; what concerns the model and its
            precision is :func:`build`'s.
        samples: size of the training set, by which the prior is divided.
        weight_decay: of Adam.
        look_every: steps between two looks at the singular values of the LU maps.

    Raises:
        ValueError: an unknown remedy.
    """
    if remedy not in REMEDIES:
        raise ValueError(f"remedy={remedy!r}: choose one of {', '.join(map(repr, REMEDIES))}")
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    slow = (
        {id(s.lu.weight): len(s.lu.bias) for s in subject.stations if s.lu is not None} if remedy == "slow LU" else {}
    )
    groups = [
        {"params": [p for p in parameters if slow.get(id(p), 1) == c], "lr": lr / c, "full": lr / c}
        for c in sorted({slow.get(id(p), 1) for p in parameters})
    ]
    optimiser = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)
    trace = Trace()
    with torch.no_grad():
        run = Run(trace, float(subject.idle(held)), float(subject.terms(held).loss))
    for step in range(steps):
        batch = next(batches)
        optimiser.zero_grad(set_to_none=True)
        terms = subject.terms(batch)
        _see(trace, subject, terms, step, look_every)
        if not math.isfinite(trace.loss[-1]):
            run.broken = (step, *(locate(subject, batch) or ("loss", "energy")))
            return run
        loss = terms.loss if remedy != "prior" else terms.loss - subject.log_prior(1.0) / samples
        loss.backward()
        trace.gradient.append(_largest([p.grad for p in parameters if p.grad is not None]))
        if not math.isfinite(trace.gradient[-1]):
            run.broken = (step, _last_bad(subject, {id(p): p.grad for p in parameters}), "gradient")
            return run
        if remedy == "clipping":
            nn.utils.clip_grad_norm_(parameters, 1.0)
        if remedy == "warm-up":
            for group in optimiser.param_groups:
                group["lr"] = group["full"] * min(1.0, (step + 1) / max(1, steps // 2))
        optimiser.step()
        if not math.isfinite(_largest([p.detach() for p in parameters])):
            run.broken = (step, _last_bad(subject, {id(p): p for p in parameters}), "parameter")
            return run
        if not math.isfinite(_largest([state["exp_avg_sq"] for state in optimiser.state.values()])):
            moments: dict[int, Tensor | None] = {id(p): state["exp_avg_sq"] for p, state in optimiser.state.items()}
            run.broken = (step, _last_bad(subject, moments), "second moment of Adam")
            return run
    with torch.no_grad():
        run.held_end = float(subject.terms(held).loss)
    if not math.isfinite(run.held_end):
        run.broken = (steps, *(locate(subject, held) or ("loss", "energy")))
    return run


def _see(trace: Trace, subject: Subject, terms: Terms, step: int, look_every: int) -> None:
    with torch.no_grad():
        trace.loss.append(float(terms.loss))
        trace.log_det.append(float(terms.log_det.double().mean()))
        trace.log_det_std.append(float(terms.log_det.double().std(correction=0)))
        trace.reach.append(max(float(z.abs().max()) for z in terms.z))
        if step % look_every == 0 or not math.isfinite(trace.loss[-1]):
            condition, gain = conditioning(subject)
            trace.looks.append(step)
            trace.condition.append(condition)
            trace.gain.append(gain)


def _last_bad(subject: Subject, values: Mapping[int, Tensor | None]) -> str:
    """The last station, the first of a backward pass, with a value that is not finite; ``values`` by parameter's id."""
    for station in reversed(subject.stations):
        for parameter in station.block.parameters():
            found = values.get(id(parameter))
            if found is not None and not bool(torch.isfinite(found).all()):
                return station.name
    return "outside the blocks"


# ------------------------------------------------------------------------------------------ the study's runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides a run.

    Attributes:
        part: see the module.
        data: ``"mixture"``, or the class of images.
        size: dimensions of the mixture, or pixels.
        coupling: ``"affine"``, ``"additive"`` or ``"gin"``.
        mixing: ``"lu"`` or ``"permutation"``.
        remedy: of :data:`REMEDIES`.
        lr: of Adam.
        seed: of weights, data and batches.
        steps, batch: optimiser steps, samples in each.
        blocks: of a flow on vectors; steps a stage of FastFlow.
    """

    part: Part
    data: str
    size: int
    coupling: Literal["affine", "additive", "gin"]
    mixing: Literal["lu", "permutation"]
    remedy: str
    lr: float
    seed: int
    steps: int
    batch: int
    blocks: int

    @property
    def name(self) -> str:
        """Of its file: readable, and unique by a hash."""
        words = (self.part, self.data, self.size, self.coupling, self.mixing, self.remedy, f"{self.lr:g}", self.seed)
        return "-".join(str(word).replace(" ", "_") for word in words) + "-" + records.settings_hash(self)


RATES = (3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1)

VECTOR_COLUMNS = (
    *(("affine", remedy) for remedy in REMEDIES if remedy != "published start"),
    *(("additive", remedy) for remedy in ("none", "slow LU", "random start")),
    ("gin", "none"),
)
FEATURE_COLUMNS = (
    ("affine", "permutation", "none"),
    ("additive", "permutation", "none"),
    ("additive", "lu", "none"),
    ("additive", "lu", "slow LU"),
    ("gin", "lu", "none"),
    *(("affine", "lu", r) for r in ("none", "clamp 0.5", "prior", "clipping", "double", "warm-up", "slow LU")),
    *((coupling, "lu", "random start") for coupling in ("affine", "additive")),
)


def cases(part: Part, profile: str, *, data: str = "bottle", seeds: Sequence[int] | None = None) -> list[Case]:
    """The runs of a part, one seed after the other, in ``smoke``, ``book`` or ``full``.

    Args:
        data: the class of images, for the two parts on features.
        seeds: in place of the profile's.

    Raises:
        ValueError: an unknown part or profile.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}: choose one of {', '.join(PARTS)}")
    chosen = seeds if seeds is not None else select(profile, smoke=(0,), book=(0, 1, 2), full=tuple(range(10)))
    fixed: dict[str, Any]
    rows: list[dict[str, Any]]
    if part in VECTORS:
        steps = select(profile, smoke=5, book=60, full=2000)
        fixed = {"data": "mixture", "mixing": "lu", "steps": steps, "batch": 32, "blocks": 10}
        fixed["size"] = select(profile, smoke=8, book=128, full=128)
        rates = select(profile, smoke=(1e-2, 1.0), book=RATES, full=(1e-4, 1e-3, *RATES))
        if part == "mixture":
            rows = [{"coupling": c, "remedy": r} for c, r in VECTOR_COLUMNS]
        elif part == "width":
            sizes = select(profile, smoke=(4, 8), book=(8, 32, 256), full=(8, 16, 32, 64, 256, 512, 1024))
            rates = select(profile, smoke=(1e-2,), book=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1), full=RATES)
            rows = [{"size": d, "coupling": c, "remedy": "none"} for d in sizes for c in ("affine", "additive")]
        elif part == "start":
            fixed["steps"], rates = 1, (1e-3,)
            columns = (("affine", "published start"), ("affine", "random start"), ("additive", "random start"))
            blocks = select(profile, smoke=(2, 4), book=(2, 4, 6, 8, 10), full=(2, 4, 6, 8, 10))
            rows = [{"blocks": n, "coupling": c, "remedy": r} for c, r in columns for n in blocks]
        else:
            rates = select(profile, smoke=(1e-3,), book=(1e-3,), full=(1e-5, 1e-4, 1e-3))
            fixed["steps"] = select(profile, smoke=5, book=300, full=50_000)
            starts = [
                ("affine", "random start"),
                ("additive", "random start"),
                ("affine", "none"),
                ("additive", "none"),
            ]
            rows = [{"coupling": c, "remedy": r} for c, r in starts]
    else:
        steps = select(profile, smoke=2, book=30, full=2000)
        fixed = {"data": data, "steps": steps, "batch": 8, "blocks": select(profile, smoke=2, book=8, full=8)}
        rates = select(profile, smoke=(1e-2,), book=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), full=RATES)
        if part == "features":
            fixed["size"] = select(profile, smoke=64, book=64, full=256)
            kinds = select(profile, smoke=FEATURE_COLUMNS[2:6:3], book=FEATURE_COLUMNS, full=FEATURE_COLUMNS)
        else:
            fixed["size"] = select(profile, smoke=64, book=128, full=256)
            rates = select(profile, smoke=(1e-2,), book=(1e-3, 1e-2, 3e-2, 1e-1), full=RATES)
            kinds = (("affine", "permutation", "none"), ("additive", "lu", "none"), ("affine", "lu", "none"))
        rows = [{"coupling": c, "mixing": m, "remedy": r} for c, m, r in kinds]
    return [Case(part=part, seed=seed, lr=lr, **{**fixed, **row}) for seed in chosen for row in rows for lr in rates]


def build(case: Case) -> Subject:
    """The flow of a case on vectors, untrained, in its precision; a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        clamp = CLAMPS.get(case.remedy, CLAMP)
        options: dict[str, Any] = {"hidden": (64, 32)}
        if case.coupling == "affine":
            flow: Flow = NonUSFlow((case.size,), case.blocks, clamp=clamp, **options)
        else:
            flow = USFlow((case.size,), case.blocks, coupling=case.coupling, clamp=clamp, **options)
    flow.validate_args = False  # what is not finite is looked for here, and located
    subject = VectorSubject(flow)
    if case.remedy in ("random start", "published start"):
        randomise(subject, torch.Generator().manual_seed(case.seed))
    if case.remedy == "double":
        flow.double()
    return subject


def run_flow(case: Case, look_every: int = LOOK_EVERY) -> tuple[Run, Subject]:
    """Train a case on the mixture; the flow comes back as the run left it. ``look_every``: see :func:`stress`."""
    train, held = (paper_mixture(case.size).sample(n, seed) for n, seed in ((5_000, 1), (1_000, 2)))
    kind = torch.float64 if case.remedy == "double" else torch.float32
    train, held = train.to(kind), held.to(kind)
    generator = torch.Generator().manual_seed(case.seed)

    def batches() -> Iterator[Tensor]:
        while True:
            yield train[torch.randint(len(train), (case.batch,), generator=generator)]

    subject = build(case)
    run = stress(
        subject,
        batches(),
        held,
        steps=case.steps,
        lr=case.lr,
        remedy=case.remedy,
        samples=len(train),
        look_every=look_every,
    )
    return run, subject


class _Images(NamedTuple):
    train: Features
    held: Features
    test: Features
    labels: NDArray[np.bool_]
    origin: dict[str, str]


@functools.lru_cache(maxsize=1)
def _images(data: str, size: int) -> _Images:
    """Features of a class: all but a tenth of the normal training images, that tenth, and the test images."""
    from usf.detectors import backbones
    from usf.study.benchmark import find_images
    from usf.study.features import cache_key, extract
    from usf.study.images import hold_out, read

    if data == "textures":
        folder = find_images("textures", "cloth")
    else:
        found = next(
            (
                paths.shared("images", s, data)
                for s in ("mvtec_ad_256", "hazelnut_toy_256")
                if paths.shared("images", s, data)
            ),
            None,
        )
        if found is None:
            raise FileNotFoundError(f"no images of {data} beside the repository: use 'textures', the built-in set")
        folder = read(found)
    weights = backbones.resolve(announce=None)
    network = backbones.build(weights)
    kept, held = hold_out(folder.train, 0.1, 0)
    known = {"cache": paths.cache("features"), "key": cache_key(weights), "progress": False}
    train, aside, test = (
        extract(network, files, size, **known)  # type: ignore[arg-type]
        for files in (kept, held, [sample.path for sample in folder.test])
    )
    origin = {"images": folder.manifest.sha256[:12], "weights": weights.tag, "weights_sha256": weights.sha256[:12]}
    return _Images(train, aside, test, folder.labels, origin)


def _feature_run(case: Case) -> tuple[Run, dict[str, Any]]:
    from usf.detectors import FlowOptions, backbones
    from usf.study import detection

    images = _images(case.data, case.size)
    options = FlowOptions(
        coupling=case.coupling,
        mixing=case.mixing,
        diagonal="learned" if case.remedy == "prior" else "fixed",
    )
    weights = backbones.resolve(announce=None)
    model: Any = detection.build("fastflow", case.size, weights, options, seed=case.seed, flow_steps=case.blocks)
    subject = FeatureSubject(model)
    if case.remedy in CLAMPS:
        for station in subject.stations:
            station.block.clamp = CLAMPS[case.remedy]  # type: ignore[assignment]
    if case.remedy in ("random start", "published start"):
        randomise(subject, torch.Generator().manual_seed(case.seed))
    kind = torch.float64 if case.remedy == "double" else torch.float32
    model.to(kind)
    generator = torch.Generator().manual_seed(case.seed)

    def batches() -> Iterator[list[Tensor]]:
        while True:
            order = torch.randperm(len(images.train), generator=generator)
            for part in order.split(case.batch):
                if len(part) == case.batch or len(images.train) < case.batch:
                    yield [level.to(kind) for level in images.train.batch(part)]

    held = [level.to(kind) for level in images.held.batch(slice(None))]
    model.train()
    run = stress(
        subject,
        batches(),
        held,
        steps=case.steps,
        lr=case.lr,
        remedy=case.remedy,
        samples=len(images.train),
        weight_decay=1e-5,
    )
    row: dict[str, Any] = dict(images.origin)
    model.float().eval()
    found = detection.evaluate_scores(model, images.test, ("norm", "anomalib"))
    for name, label in (("norm", ""), ("anomalib", "_stock")):
        result = found[name]  # type: ignore[index]
        row[f"scores{label}"] = hashlib.sha256(result.scores.tobytes()).hexdigest()[:12]
        row[f"distinct{label}"] = len({float(value) for value in result.scores})
        if run.broken is None and bool(torch.isfinite(torch.from_numpy(result.scores)).all()):
            row[f"image_auroc{label}"] = result.image_auroc(images.labels)
    return run, row


COLUMNS: tuple[str, ...] = (
    *(field.name for field in dataclasses.fields(Case)),
    *"""
    status outcome step block quantity held_idle held_start held_end loss_start loss_max loss_end log_det_start
    log_det_end log_det_std_max reach_max condition_max gain_max gradient_max image_auroc image_auroc_stock distinct
    distinct_stock scores scores_stock images weights weights_sha256 seconds run
    """.split(),
)
"""Columns of ``runs.csv``; maxima over finite steps. ``scores``: a hash of the test images' scores."""


def _finite_max(values: Sequence[float]) -> float | None:
    found = [value for value in values if math.isfinite(value)]
    return max(found) if found else None


def run_case(case: Case, run_name: str) -> tuple[dict[str, Any], Trace]:
    """Train one case; a failure is a row like any other."""
    started = time.perf_counter()
    extra: dict[str, Any] = {}
    if case.part in VECTORS:
        run, _ = run_flow(case)
    else:
        run, extra = _feature_run(case)
    trace, kind = run.trace, outcome(run)
    row: dict[str, Any] = {
        **dataclasses.asdict(case),
        "status": "ok" if kind == "ok" else "failed",
        "outcome": kind,
        "held_idle": run.held_idle,
        "held_start": run.held_start,
        "held_end": run.held_end if math.isfinite(run.held_end) else None,
        "loss_start": trace.loss[0] if math.isfinite(trace.loss[0]) else None,
        "loss_max": _finite_max(trace.loss),
        "loss_end": trace.loss[-1] if math.isfinite(trace.loss[-1]) else None,
        "log_det_start": trace.log_det[0] if math.isfinite(trace.log_det[0]) else None,
        "log_det_end": trace.log_det[-1] if math.isfinite(trace.log_det[-1]) else None,
        "log_det_std_max": _finite_max(trace.log_det_std),
        "reach_max": _finite_max(trace.reach),
        "condition_max": _finite_max(trace.condition),
        "gain_max": _finite_max(trace.gain),
        "gradient_max": _finite_max(trace.gradient),
        **extra,
        "seconds": time.perf_counter() - started,
        "run": run_name,
    }
    if run.broken is not None:
        row["step"], row["block"], row["quantity"] = run.broken
    return row, trace


def run_all(wanted: Sequence[Case], out: Path, *, seconds: float | None = None) -> bool:
    """Run what is missing under ``out``, one JSON file a run; stops after ``seconds``. Returns whether all is there."""
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    end = time.perf_counter() + seconds if seconds else math.inf
    kept = out / "runs" / f"{name}.json"
    for case in wanted:
        path = out / f"{case.name}.json"
        if path.is_file():
            continue
        if time.perf_counter() > end:
            return False
        if not kept.is_file():
            shared = {"threads": torch.get_num_threads()}
            records.write_json(kept, {**records.provenance(), **shared})
        row, trace = run_case(case, name)
        records.write_json(path, {"row": row, "trace": dataclasses.asdict(trace)})
        where = f" at step {row['step']}, {row['block']}: {row['quantity']}" if "step" in row else ""
        print(f"{case.name}: {row['outcome']}{where} ({row['seconds']:.1f} s)", flush=True)
    return True


TRACE_COLUMNS = (
    "part data size coupling mixing remedy lr seed step loss log_det log_det_std reach gradient condition gain".split()
)


def publish(out: Path, target: Path) -> None:
    """Gather the runs under ``out`` into ``runs.csv``, ``traces.csv`` and ``provenance.json`` in ``target``.

    Traces are kept of the runs of seed 0 without a remedy in the parts ``mixture`` and ``features``.

    Raises:
        FileNotFoundError: no runs there.
    """
    files = sorted(out.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{out} holds no runs: run a part first")
    found = [json.loads(path.read_text("utf8")) for path in files]
    order = {name: index for index, name in enumerate(REMEDIES)}
    found.sort(
        key=lambda one: [
            (
                PARTS.index(r["part"]),
                r["data"],
                r["size"],
                r["coupling"],
                r["mixing"],
                order[r["remedy"]],
                r["lr"],
                r["seed"],
            )
            for r in [one["row"]]
        ]
    )
    rows = [one["row"] for one in found]
    records.write_csv(target / "runs.csv", rows, COLUMNS, digits=6)
    used = sorted({row["run"] for row in rows})
    origins = {name: json.loads((out / "runs" / f"{name}.json").read_text("utf8")) for name in used}
    records.write_json(target / "provenance.json", origins)
    traces = []
    for one in found:
        row, trace = one["row"], one["trace"]
        if row["seed"] or row["remedy"] != "none" or row["part"] not in ("mixture", "features"):
            continue
        looks = dict(zip(trace["looks"], zip(trace["condition"], trace["gain"], strict=True), strict=True))
        for step in range(len(trace["loss"])):
            values = {key: trace[key][step] for key in ("loss", "log_det", "log_det_std", "reach")}
            if step < len(trace["gradient"]):
                values["gradient"] = trace["gradient"][step]
            if step in looks:
                values["condition"], values["gain"] = looks[step]
            key = {name: row[name] for name in TRACE_COLUMNS[:8]}
            traces.append({**key, "step": step, **{k: float(v) for k, v in values.items()}})
    records.write_csv(target / "traces.csv", traces, TRACE_COLUMNS, digits=4)


def load(folder: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Published records, lists of rows: ``runs`` and ``traces``; by default from ``data/results/stability``."""
    where = paths.results("stability") if folder is None else folder
    return {
        "runs": records.read_csv(where / "runs.csv"),
        "traces": records.read_csv(where / "traces.csv"),
    }


def edge(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(largest learning rate up to which every run trained, smallest at which most failed); 0 and infinity for none.

    >>> run = {"lr": 0.1, "outcome": "ok"}
    >>> edge([run, {**run, "lr": 0.3, "outcome": "not finite"}])
    (0.1, 0.3)
    """
    rates = sorted({float(run["lr"]) for run in runs})
    share = {rate: [run["outcome"] != "ok" for run in runs if float(run["lr"]) == rate] for rate in rates}
    trained = 0.0
    for rate in rates:
        if any(share[rate]):
            break
        trained = rate
    failed = next((rate for rate in rates if 2 * sum(share[rate]) > len(share[rate])), math.inf)
    return trained, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exits with 3 where time ran out before the last run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to run; nothing to publish alone")
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--data", default="bottle", help="class of images, or textures")
    parser.add_argument("--seeds", type=int, nargs="*", help="in place of the profile's")
    parser.add_argument("--seconds", type=float, help="begin no run after so many")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: build/stability/PROFILE")
    parser.add_argument("--publish", action="store_true", help="also write data/results/stability")
    chosen = parser.parse_args(arguments)
    out = chosen.out or paths.build("stability", chosen.profile)
    torch.set_num_threads(1)
    done = True
    for part in chosen.parts:
        done &= run_all(cases(part, chosen.profile, data=chosen.data, seeds=chosen.seeds), out, seconds=chosen.seconds)
    if chosen.publish:
        publish(out, paths.results("stability"))
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
