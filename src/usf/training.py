"""The training loop of everything that learns from vectors: seeded, bounded, and loud when the numbers break."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class History:
    """What one training left behind.

    Attributes:
        train: mean training loss of each epoch, in the units of the loss.
        val: validation loss after each epoch; empty without a validation set.
        seconds: wall time of the whole training.
        best_epoch: epoch (from 0) whose weights the module holds now.
    """

    train: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best_epoch: int = -1

    @property
    def epochs(self) -> int:
        """Number of epochs run."""
        return len(self.train)


def fit(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    train: Tensor,
    *,
    val: Tensor | None = None,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    patience: int | None = None,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    progress: bool = True,
    label: str = "training",
) -> History:
    """Minimise ``loss(module, batch)`` over ``train`` with Adam; the module is changed in place.

    Batches are drawn without replacement from a generator of its own, so a training is a function of the initial
    weights, the data and ``seed``, whatever other random numbers the process draws. The last batch of an epoch is
    dropped when it is short, except where it is the only one.

    Args:
        module: the model; build it after seeding torch, or its initial weights are not reproducible.
        loss: maps (module, batch of shape (b, ...)) to a 0-dim tensor.
        train: samples, shape (n, ...).
        val: samples for early stopping, shape (m, ...). The weights of the best epoch are restored at the end.
        epochs: at most this many passes.
        lr: peak learning rate.
        patience: stop after this many epochs without a new best validation loss; needs ``val``.
        progress: show a bar over the epochs, where tqdm is installed (the ``book`` extra).
        schedule: ``"constant"`` or ``"cosine"`` (to zero over ``epochs``).

    Raises:
        ValueError: for an empty set, a non-positive size, an unknown schedule, or patience without a validation set.
        FloatingPointError: when a loss is not finite; the message names epoch and step.
    """
    if len(train) == 0 or (val is not None and len(val) == 0):
        raise ValueError("fit got an empty data set: pass at least one sample in train (and in val, when it is given)")
    if epochs < 1 or batch_size < 1 or lr <= 0:
        raise ValueError(f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size}, {lr}")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}: use 'constant' or 'cosine'")
    if patience is not None and val is None:
        raise ValueError("patience needs a validation set: pass val, or patience=None")

    # Not a dependency of the library: without it a training runs just as well, unseen.
    bar: Any = None
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            bar = tqdm(total=epochs, desc=label, unit="epoch", leave=False)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    # `fused` updates the many small tensors of a flow's layers in one call: a third of the time of `foreach` on a CPU.
    optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    n = len(train)
    size = min(batch_size, n)
    steps = n // size
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps) if schedule == "cosine" else None
    history = History()
    best, best_state = float("inf"), None
    started = time.perf_counter()
    for epoch in range(epochs):
        module.train()
        order = torch.randperm(n, generator=generator).to(train.device)
        total = torch.zeros((), device=train.device, dtype=torch.float64)
        for step in range(steps):
            batch = train[order[step * size : (step + 1) * size]]
            optimizer.zero_grad(set_to_none=True)
            value = loss(module, batch)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"{label}: the loss is {value.item()} at epoch {epoch}, step {step}; "
                    f"lower lr ({lr}) or check the data"
                )
            value.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total += value.detach()
        history.train.append(total.item() / steps)
        if val is not None:
            module.eval()
            with torch.no_grad():
                value = loss(module, val)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"{label}: the validation loss is {value.item()} after epoch {epoch}; lower lr ({lr})"
                )
            history.val.append(value.item())
            if history.val[-1] < best:
                best, history.best_epoch = history.val[-1], epoch
                best_state = {k: v.detach().clone() for k, v in module.state_dict().items()}
            elif patience is not None and epoch - history.best_epoch >= patience:
                break
        if bar is not None:
            bar.update()
            bar.set_postfix(train=f"{history.train[-1]:.4f}", refresh=False)
    if bar is not None:
        bar.close()
    if best_state is not None:
        module.load_state_dict(best_state)
    else:
        history.best_epoch = history.epochs - 1
    module.eval()
    history.seconds = time.perf_counter() - started
    return history
