"""Collapse through a layer that is trained in front of a flow and not counted: FastFlow's layer normalisation.

anomalib's FastFlow multiplies every normalised feature by a trained gain before the flow, and leaves the gain out of
the log-determinant. This study trains uniformly scaling FastFlows with the gain left out, counted (``loss="mle"``) and
frozen, with and without the flow's own learned scales, and looks at gains, latents, likelihoods and areas on the way::

    python -m usf.study.uncounted --profile smoke
    python -m usf.study.uncounted hazelnut --profile book --publish

Each training is one JSON file under ``build/uncounted``, written at once. ``--publish`` gathers them into
``data/results/stability/collapse.csv``, one row a look, with ``collapse-provenance.json`` beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from usf import paths
from usf.study import records
from usf.study.profile import select

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from usf.detectors.fastflow import FastflowModel
    from usf.study.features import Features

__all__ = [
    "COLUMNS",
    "NORMS",
    "Case",
    "cases",
    "endings",
    "entropy_floor",
    "load",
    "look",
    "publish",
    "run_case",
    "train",
]

Norm = Literal["left out", "counted", "frozen"]
NORMS: tuple[Norm, ...] = get_args(Norm)
"""What becomes of the gain of the layer normalisation: trained and not counted, trained and counted, not trained."""


def entropy_floor(entropy: float, log_det: float, dim: int) -> float:
    r"""The least mean squared latent per dimension that a bijection can give data of this entropy.

    .. math:: \frac1d E\|z - c\|^2 \ge \frac{1}{2\pi e} \exp\Bigl(\frac2d\,(h + E\ln|\det J|)\Bigr),

    because z has entropy :math:`h + E\ln|\det J|` and no law with this second moment has more than the normal one.

    Args:
        entropy: of what enters the bijection, nats.
        log_det: E ln|det J|, nats.
        dim: d.

    >>> round(entropy_floor(0.5 * math.log(2 * math.pi * math.e), 0.0, 1), 6)  # a standard normal, the identity
    1.0
    """
    return math.exp(2 / dim * (entropy + log_det)) / (2 * math.pi * math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides a training.

    Attributes:
        data: class of images.
        size: pixels.
        coupling, mixing, global_scale: as in :class:`usf.detectors.FlowOptions`.
        norm: see :data:`NORMS`.
        lr: of Adam.
        seed: of weights and batches.
        epochs, batch: of the training.
        steps_a_stage: of the flow.
    """

    data: str
    size: int
    coupling: Literal["affine", "additive", "gin"]
    mixing: Literal["lu", "permutation"]
    global_scale: bool
    norm: Norm
    lr: float
    seed: int
    epochs: int
    batch: int = 8
    steps_a_stage: int = 8

    @property
    def name(self) -> str:
        """Of its file: readable, and unique by a hash."""
        scale = "scale" if self.global_scale else "noscale"
        words = (self.data, self.size, self.coupling, self.mixing, scale, self.norm, f"{self.lr:g}", self.seed)
        return "-".join(str(word).replace(" ", "_") for word in words) + "-" + records.settings_hash(self)


def cases(data: str, profile: str, *, seeds: Sequence[int] | None = None, **changes: Any) -> list[Case]:
    """The trainings on a class of images: the three norms with and without the flow's scales, and the stock detector.

    Args:
        data: the class.
        profile: ``smoke``, ``book`` or ``full``.
        seeds: in place of the profile's.
        changes: of the other fields of :class:`Case`.
    """
    chosen = seeds if seeds is not None else select(profile, smoke=(0,), book=(0,), full=(0, 1, 2))
    fixed: dict[str, Any] = select(
        profile,
        smoke={"size": 64, "lr": 1e-2, "epochs": 2, "steps_a_stage": 2},
        book={"size": 64, "lr": 1e-3, "epochs": 200, "steps_a_stage": 8},
        full={"size": 256, "lr": 1e-3, "epochs": 400, "steps_a_stage": 8},
    )
    fixed |= changes
    usf = [("additive", "lu", scale, norm) for scale in (True, False) for norm in NORMS]
    stock = [("affine", "permutation", True, "left out")]
    return [
        Case(data=data, seed=seed, coupling=c, mixing=m, global_scale=s, norm=n, **fixed)  # type: ignore[arg-type]
        for seed in chosen
        for c, m, s, n in [*usf, *stock]
    ]


def looks(epochs: int) -> list[int]:
    """Epochs after which to look: every one at first, then ever fewer, and the last.

    >>> looks(30)
    [1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 30]
    """
    found = [1]
    while found[-1] < epochs:
        found.append(min(epochs, max(found[-1] + 1, round(found[-1] * 1.3))))
    return found


def look(
    model: FastflowModel, train: Features, test: Features, labels: NDArray[np.bool_], masks: NDArray[np.bool_] | None
) -> dict[str, float]:
    """What the layer normalisation and the flow have come to.

    Returns:
        per dimension of the features: ``log_gain`` (mean ln|gain| of the layer normalisations), ``log_det`` (the flow's
        own ln|det|, mean over normal test images), ``loss`` and ``loss_held`` (what is minimised, training and normal
        test images), ``nll_held`` (the same with the gain counted); ``latent_std``, the root mean square of the normal
        test images' latents, and ``latent_std_1`` to ``_3`` by stage; ``gain_low``, ``gain_high``, the gains' 1 % and
        99 % quantiles; image and pixel areas of the scores ``norm`` and, with the suffix ``_stock``, ``anomalib``.
    """
    from usf.study import detection

    d = test.dimension
    constant = 0.5 * math.log(2 * math.pi)
    with torch.no_grad():
        gains = torch.cat([norm.weight.detach().flatten() for norm in model.norms])  # type: ignore[operator]
        log_gain = float(gains.double().abs().log().mean())
    normal = test.subset([index for index, bad in enumerate(labels) if not bad])
    counted = model.loss_kind == "mle"
    found = detection.evaluate_scores(model, test, ("norm", "anomalib"))
    good = ~labels
    energies, nll = found["norm"].energies[good], found["norm"].nll[good]
    row = {
        "log_gain": log_gain,
        "gain_low": float(gains.quantile(0.01)),
        "gain_high": float(gains.quantile(0.99)),
        "log_det": float((energies - nll).mean()) / d - (log_gain if counted else 0.0),
        "loss": detection.nll(model, train),
        "loss_held": float(nll.mean()) / d + constant,
        "nll_held": float(nll.mean()) / d + constant - (0.0 if counted else log_gain),
        "latent_std": math.sqrt(2 * float(energies.mean()) / d),
    }
    model.eval()
    with torch.inference_mode():
        for stage, z in enumerate(model.latents(normal.batch(slice(None))).z, start=1):
            row[f"latent_std_{stage}"] = float(z.double().square().mean().sqrt())
    for score, suffix in (("norm", ""), ("anomalib", "_stock")):
        result = found[score]  # type: ignore[index]
        row[f"image_auroc{suffix}"] = result.image_auroc(labels)
        if masks is not None:
            row[f"pixel_auroc{suffix}"] = result.pixel_auroc(masks)
    return row


def train(
    case: Case, model: Any, train: Features, test: Features, labels: NDArray[np.bool_], masks: NDArray[np.bool_] | None
) -> list[dict[str, Any]]:
    """Train a model and look at it after :func:`looks`; one row a look, the first before any step.

    A training that breaks off ends in a row with the status ``"failed"``.
    """
    from usf.study import detection

    fixed = {**dataclasses.asdict(case), "status": "ok", "reason": None}
    rows = [{**fixed, "epoch": 0, "steps": 0, **look(model, train, test, labels, masks)}]
    when = set(looks(case.epochs))

    def watch(watched: Any, history: detection.FitHistory) -> float | None:
        if history.epochs in when:
            seen = look(watched, train, test, labels, masks)
            rows.append({**fixed, "epoch": history.epochs, "steps": history.steps, **seen})
        return None

    try:
        detection.fit(
            model,
            train,
            epochs=case.epochs,
            batch_size=case.batch,
            lr=case.lr,
            seed=case.seed,
            watch=watch,
            progress=False,
        )
    except (detection.NotFiniteError, ValueError) as error:
        rows.append({**fixed, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]})
    return rows


def build(case: Case, weights: Any) -> Any:
    """The case's FastFlow, untrained."""
    from usf.detectors import FlowOptions
    from usf.study import detection

    options = FlowOptions(
        coupling=case.coupling,
        mixing=case.mixing,
        global_scale=case.global_scale,
        train_layer_norm=case.norm != "frozen",
    )
    loss: Literal["mle", "anomalib"] = "mle" if case.norm == "counted" else "anomalib"
    return detection.build(
        "fastflow", case.size, weights, options, seed=case.seed, loss=loss, flow_steps=case.steps_a_stage
    )


COLUMNS: tuple[str, ...] = (
    *(field.name for field in dataclasses.fields(Case)),
    *"""
    status reason epoch steps log_gain gain_low gain_high log_det loss loss_held nll_held latent_std latent_std_1
    latent_std_2 latent_std_3 image_auroc pixel_auroc image_auroc_stock pixel_auroc_stock images weights weights_sha256
    seconds run
    """.split(),
)
"""Columns of ``collapse.csv``. ``seconds`` are those of the whole training, looks included."""


def run_case(case: Case, run_name: str) -> list[dict[str, Any]]:
    """Train one case on the images beside the repository (``textures``: the built-in ones)."""
    from usf.detectors import backbones
    from usf.study.benchmark import find_images
    from usf.study.features import cache_key, extract
    from usf.study.images import load_masks

    sets = {"bottle": "mvtec", "pill": "mvtec", "hazelnut": "hazelnut_toy"}
    folder = find_images(sets.get(case.data, "textures"), case.data)
    weights = backbones.resolve(announce=None)
    network = backbones.build(weights)
    started = time.perf_counter()
    known = {"cache": paths.cache("features"), "key": cache_key(weights), "progress": False}
    train_set, test_set = (
        extract(network, files, case.size, **known)  # type: ignore[arg-type]
        for files in (folder.train, [sample.path for sample in folder.test])
    )
    masks = load_masks(folder.test, case.size) if folder.has_masks else None
    rows = train(case, build(case, weights), train_set, test_set, folder.labels, masks)
    origin = {
        "images": folder.manifest.sha256[:12],
        "weights": weights.tag,
        "weights_sha256": weights.sha256[:12],
        "seconds": time.perf_counter() - started,
        "run": run_name,
    }
    return [{**row, **origin} for row in rows]


def publish(out: Path, target: Path) -> None:
    """Gather the trainings under ``out`` into ``collapse.csv`` and ``collapse-provenance.json`` in ``target``.

    Trainings that were published before stay, but for those that were run again.

    Raises:
        FileNotFoundError: none there.
    """
    files = sorted(out.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{out} holds no trainings: run some first")
    rows = [row for path in files for row in json.loads(path.read_text("utf8"))["rows"]]
    beside, origins = target / "collapse-provenance.json", {}
    if (target / "collapse.csv").is_file():
        fields = [field.name for field in dataclasses.fields(Case)]
        again = {tuple(row[name] for name in fields) for row in rows}
        rows += [row for row in load(target) if tuple(row[name] for name in fields) not in again]
        origins = json.loads(beside.read_text("utf8"))
    rows.sort(
        key=lambda r: (
            r["data"], r["size"], r["lr"], r["seed"], r["coupling"], not r["global_scale"], NORMS.index(r["norm"])
        )
    )  # fmt: skip
    records.write_csv(target / "collapse.csv", rows, COLUMNS, digits=6)
    used = sorted({row["run"] for row in rows})
    for path in (out / "runs").glob("*.json"):
        origins[path.stem] = json.loads(path.read_text("utf8"))
    records.write_json(beside, {name: origins[name] for name in used})


def load(folder: Path | None = None) -> list[dict[str, Any]]:
    """Published looks; by default from ``data/results/stability``."""
    found = records.read_csv((paths.results("stability") if folder is None else folder) / "collapse.csv")
    return [{**row, "global_scale": row["global_scale"] == "True"} for row in found]


def endings(rows: Sequence[dict[str, Any]], *, lr: float) -> list[dict[str, Any]]:
    """What leaving the gain out came to at the end, beside freezing and counting it, in flows of determinant one.

    Args:
        rows: see :func:`load`.
        lr: the learning rate.

    Returns:
        one row for each class and seed that has all three norms: ``data, seed, steps``; ``gain``, the mean ln|gain|
        that was left out; ``latents``, the latents' root mean square over that with a frozen gain; ``loss_held`` and
        ``nll_held``, nats per dimension of held-out images more than with a frozen gain, the gain left out and counted;
        ``counted``, the latter for the gain that is trained and counted.
    """
    last: dict[tuple[Any, ...], dict[Norm, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["steps"] or 0):
        if (row["coupling"], row["global_scale"], row["lr"]) == ("additive", False, lr):
            last.setdefault((row["data"], row["size"], row["seed"]), {})[row["norm"]] = row
    found = []
    for (data, _, seed), norms in last.items():
        if set(norms) != set(NORMS) or any(row["status"] != "ok" for row in norms.values()):
            continue
        out, counted, frozen = (norms[norm] for norm in NORMS)
        found.append(
            {
                "data": data,
                "seed": seed,
                "steps": out["steps"],
                "gain": out["log_gain"],
                "latents": out["latent_std"] / frozen["latent_std"],
                "loss_held": out["loss_held"] - frozen["loss_held"],
                "nll_held": out["nll_held"] - frozen["nll_held"],
                "counted": counted["nll_held"] - frozen["nll_held"],
            }
        )
    return sorted(found, key=lambda row: (row["data"], row["seed"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exits with 3 where time ran out before the last training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="*", help="classes: bottle, pill, hazelnut, cloth; none to publish alone")
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--seeds", type=int, nargs="*", help="in place of the profile's")
    parser.add_argument("--size", type=int, help="pixels, in place of the profile's")
    parser.add_argument("--epochs", type=int, help="in place of the profile's")
    parser.add_argument("--lr", type=float, help="in place of the profile's")
    parser.add_argument("--only", nargs="*", help="parts of the names of the trainings to run")
    parser.add_argument("--seconds", type=float, help="begin no training after so many")
    parser.add_argument("--out", type=Path, help="folder of the trainings; default: build/uncounted/PROFILE")
    parser.add_argument("--publish", action="store_true", help="also write data/results/stability")
    chosen = parser.parse_args(arguments)
    out = chosen.out or paths.build("uncounted", chosen.profile)
    torch.set_num_threads(1)
    changes = {name: getattr(chosen, name) for name in ("size", "epochs", "lr") if getattr(chosen, name) is not None}
    end = time.perf_counter() + (chosen.seconds or math.inf)
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    kept = out / "runs" / f"{name}.json"
    for data in chosen.data:
        for case in cases(data, chosen.profile, seeds=chosen.seeds, **changes):
            path = out / f"{case.name}.json"
            if path.is_file() or (chosen.only and not any(part in case.name for part in chosen.only)):
                continue
            if time.perf_counter() > end:
                return 3
            if not kept.is_file():
                records.write_json(kept, {**records.provenance(), "threads": torch.get_num_threads()})
            rows = run_case(case, name)
            records.write_json(path, {"rows": rows})
            last = rows[-1]
            shown = {
                key: round(last[key], 4) for key in ("log_gain", "latent_std", "loss", "image_auroc") if key in last
            }
            print(f"{case.name}: {last['status']} {shown} ({last['seconds']:.0f} s)", flush=True)
    if chosen.publish:
        publish(out, paths.results("stability"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
