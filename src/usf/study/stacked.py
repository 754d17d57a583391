"""Several trainings of one shape as one: weights stacked along a new axis, one vectorised step for all of them.

Small networks spend part of their time between operations, and a stack of K pays that once instead of K times. On one
CPU thread that saves little (the records say how little), and it needs K trainings of *one shape*, which an adaptive
search over shapes never has; so the mixture study does not use it. A study over seeds or rates on a GPU can::

    python -m usf.study.stacked     # writes data/results/mixtures/oracle/stacked.csv
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from usf import paths
from usf.study import records

__all__ = ["fit_stacked", "saving"]


def fit_stacked(
    modules: Sequence[nn.Module],
    train: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lrs: Sequence[float],
    seeds: Sequence[int],
) -> list[list[float]]:
    """Minimise the mean of ``-module(batch)`` for every module at once, with Adam; the modules are changed in place.

    Equal, up to rounding, to one `usf.training.fit` for each module with its learning rate and seed, without
    validation and with a constant rate. A training whose loss is not finite spoils only its own slice.

    Args:
        modules: of one class and one shape, whose call returns log-densities (a `usf.flows.Flow`); set
            ``validate_args = False`` on flows, since a check cannot look into a vectorised batch.
        train: samples, shape (n, ...).
        epochs, batch_size: shared by all.
        lrs, seeds: one a module; the seed decides the order of the batches.

    Returns:
        Mean loss of each epoch, one list a module.

    Raises:
        ValueError: for no modules, or numbers of modules, rates and seeds that differ.
    """
    if not modules or not len(modules) == len(lrs) == len(seeds):
        raise ValueError(f"one rate and one seed a module: got {len(modules)}, {len(lrs)} and {len(seeds)}")
    parameters, buffers = stack_module_state(list(modules))
    # Names alone matter in the skeleton: it gets its weights with every call.
    skeleton = copy.deepcopy(modules[0])

    def loss(weights: dict[str, Tensor], constants: dict[str, Tensor], batch: Tensor) -> Tensor:
        return -functional_call(skeleton, (weights, constants), (batch,)).mean()

    together = vmap(loss, randomness="error")
    names = [name for name, value in parameters.items() if value.requires_grad]
    leaves = [parameters[name] for name in names]
    rate = torch.tensor(list(lrs), dtype=train.dtype)
    first = [torch.zeros_like(p) for p in leaves]
    second = [torch.zeros_like(p) for p in leaves]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    n, size = len(train), min(batch_size, len(train))
    steps, step = n // size, 0
    histories: list[list[float]] = [[] for _ in modules]
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(n, generator=g) for g in generators])
        total = torch.zeros(len(modules), dtype=torch.float64)
        for index in range(steps):
            batch = train[orders[:, index * size : (index + 1) * size]]
            losses = together(parameters, buffers, batch)
            gradients = torch.autograd.grad(losses.sum(), leaves)
            step += 1
            with torch.no_grad():
                for p, g, m, v in zip(leaves, gradients, first, second, strict=True):
                    # Adam is elementwise, so a stack differs from single trainings in the rate's axis alone.
                    m.lerp_(g, 1 - 0.9)
                    v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
                    scale = (rate / (1 - 0.9**step)).reshape(-1, *[1] * (p.dim() - 1))
                    p.sub_(scale * m / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
            total += losses.detach()
        for history, value in zip(histories, (total / steps).tolist(), strict=True):
            history.append(value)
    with torch.no_grad():
        for k, module in enumerate(modules):
            for name, value in module.named_parameters():
                value.copy_(parameters[name][k])
            module.eval()
    return histories


def saving(dims: Sequence[int] = (2, 8, 32, 128), *, count: int = 5, repeats: int = 5) -> list[dict[str, float | int]]:
    """Processor time of ``count`` trainings one by one over that of a stack, one row a dimension, on one thread."""
    from usf.study.mixtures import build_flow, negative_log_likelihood
    from usf.training import fit

    rows: list[dict[str, float | int]] = []
    for dim in dims:
        x = torch.randn(4 * 512, dim, generator=torch.Generator().manual_seed(0))
        single, stacked = [], []
        for repeat in range(repeats + 1):
            flows = [build_flow("usf", dim, blocks=6, layers=2, width=64, seed=k) for k in range(2 * count)]
            started = time.process_time()
            for k, flow in enumerate(flows[:count]):
                fit(
                    flow,
                    negative_log_likelihood,
                    x,
                    epochs=2,
                    batch_size=512,
                    lr=1e-3,
                    seed=k,
                    progress=False,
                )
            middle = time.process_time()
            fit_stacked(flows[count:], x, epochs=2, batch_size=512, lrs=[1e-3] * count, seeds=range(count))
            if repeat:  # the first round warms up
                single.append(middle - started)
                stacked.append(time.process_time() - middle)
        ratios = [a / b for a, b in zip(single, stacked, strict=True)]
        rows.append(
            {
                "dim": dim,
                "stacked": count,
                "repeats": repeats,
                "single_seconds": statistics.median(single),
                "stacked_seconds": statistics.median(stacked),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = saving()
    records.write_csv(paths.results("mixtures", "oracle", "stacked.csv"), measured, digits=3)
    for row in measured:
        print(row)
