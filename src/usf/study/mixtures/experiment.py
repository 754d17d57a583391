"""What is compared: the sizes of the study, its samples, its flows and their loss."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from usf.flows import MLP, Flow, NonUSFlow, USFlow
from usf.study import records
from usf.study.profile import select
from usf.study.targets import DiagonalMixture, paper_mixture

MODELS = ("deep-svdd", "non-usf", "usf")
"""What is trained on the mixtures, by name in the records."""
FLOWS: dict[str, type[Flow]] = {"non-usf": NonUSFlow, "usf": USFlow}
TAIL = 0.05
"""Share of the least dense test points that the restricted measures look at."""


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


def stable_seed(*parts: object) -> int:
    """A seed below 2^31 from any printable parts, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf8")).digest()
    return int.from_bytes(digest[:4], "big") >> 1
