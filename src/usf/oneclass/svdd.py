"""Deep SVDD for vectors (Ruff et al. 2018; equation 2 of the paper).

An encoder without biases is pre-trained as one half of an autoencoder, the centre is fixed at the mean of the
encodings it then has, and the encoder goes on to pull every sample towards that centre::

    model = DeepSVDD(decreasing_schedule(2, depth=4), weight_decay=1e-6)
    fit_deep_svdd(model, train, pretrain_epochs=20, epochs=50, batch_size=256, lr=1e-3, seed=0)
    model.score(test)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from usf.training import History, fit

CENTER_GUARD = 0.1
"""Smallest absolute value of a centre component (the value of the reference implementation)."""


def decreasing_schedule(dim: int, depth: int) -> tuple[int, ...]:
    """Layer widths of the paper's Deep SVDD encoders (section 4.3), input and output included.

    Depth counts the entries: ``(d, d)``, ``(d, 2d, d)``, ``(d, 4d, 2d, d)``, ... up to ``(d, 16d, 8d, 4d, 2d, d)``.

    Args:
        dim: input and output dimension d.
        depth: number of entries, 2 to 6 in the paper; the encoder has ``depth - 1`` linear layers.

    Raises:
        ValueError: for ``dim < 1`` or ``depth < 2``.

    >>> decreasing_schedule(2, 2), decreasing_schedule(2, 3), decreasing_schedule(2, 6)
    ((2, 2), (2, 4, 2), (2, 32, 16, 8, 4, 2))
    """
    if dim < 1:
        raise ValueError(f"dim is the dimension of the data, at least 1; got {dim}")
    if depth < 2:
        raise ValueError(f"depth counts input and output widths, so it is at least 2; got {depth}")
    return (dim, *(dim * 2**k for k in range(depth - 2, 0, -1)), dim)


def one_class_loss(latent: Tensor, center: Tensor, weights: Iterable[Tensor] = (), weight_decay: float = 0.0) -> Tensor:
    r"""Equation 2: :math:`\frac1n \sum_i \|\omega(x_i) - c\|^2 + \frac\lambda2 \sum_l \|w^l\|_F^2`.

    Args:
        latent: encodings, shape (..., k); the mean runs over all leading dimensions.
        center: c, shape (k,).
        weights: the matrices :math:`w^l`.
        weight_decay: :math:`\lambda`, not negative.

    Returns:
        0-dim tensor.

    >>> z, c, w = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2), [torch.ones(2, 2)]
    >>> one_class_loss(z, c, w, weight_decay=0.5)  # (1 + 4) / 2 + 0.5 / 2 * 4
    tensor(3.5000)
    """
    loss = (latent - center).square().sum(-1).mean()
    if weight_decay:
        loss = loss + weight_decay / 2 * torch.stack([w.square().sum() for w in weights]).sum()
    return loss


class DeepSVDD(nn.Module):
    """A bias-free perceptron and a centre; the squared distance to the centre is the anomaly score.

    Activations that would act as a bias are refused as well (Ruff et al. 2018, proposition 3): one that levels off at
    a value other than zero, on either side, is a constant once saturated (tanh, ReLU6, ELU), and one with a(0) != 0
    is a constant at the origin (Softplus). With a constant the network can ignore its input and map everything
    to the centre.

    Args:
        widths: input, hidden and output widths, at least two; `decreasing_schedule` makes the paper's.
        activation: an element-wise module, copied between the layers; `torch.nn.LeakyReLU` (slope 0.1) by default.
        weight_decay: lambda of equation 2.

    Attributes:
        center: c, shape (widths[-1],), a buffer; NaN until `init_center` or a loaded state sets it.

    Raises:
        ValueError: for fewer than two widths, a width below one, a negative ``weight_decay``, or an activation that
            acts as a bias.

    >>> _ = torch.manual_seed(0)
    >>> model = DeepSVDD((2, 8, 2))
    >>> x = torch.randn(5, 2)
    >>> model.init_center(x).score(x).shape
    torch.Size([5])
    """

    center: Tensor
    activation: nn.Module

    def __init__(
        self, widths: Sequence[int], *, activation: nn.Module | None = None, weight_decay: float = 1e-6
    ) -> None:
        super().__init__()
        self.widths = tuple(int(w) for w in widths)
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths needs an input and an output width, all positive; got {self.widths}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay is the lambda of equation 2 and cannot be negative; got {weight_decay}")
        activation = nn.LeakyReLU(0.1) if activation is None else activation
        _check_activation(activation)
        self.weight_decay = float(weight_decay)
        self.encoder = _perceptron(self.widths, activation)
        # Outside the module tree: the decoder of the pre-training is built from it, the encoder has its copies.
        object.__setattr__(self, "activation", activation)
        self.register_buffer("center", torch.full((self.widths[-1],), float("nan")))

    def latent(self, x: Tensor) -> Tensor:
        """Encodings omega(x), shape (..., widths[-1]), of x with shape (..., widths[0])."""
        if x.shape[-1:] != (self.widths[0],):
            raise ValueError(f"the encoder takes vectors of length {self.widths[0]}; got shape {tuple(x.shape)}")
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        """The same as `latent`."""
        return self.latent(x)

    def score(self, x: Tensor) -> Tensor:
        """Squared distance to the centre, shape x.shape[:-1]; higher is more anomalous.

        Raises:
            RuntimeError: while the centre is not set.
        """
        return (self.latent(x) - self._center()).square().sum(-1)

    def loss(self, x: Tensor) -> Tensor:
        """Equation 2 on a batch of shape (n, widths[0]); a 0-dim tensor."""
        return one_class_loss(self.latent(x), self._center(), self.weights(), self.weight_decay)

    def weights(self) -> list[Tensor]:
        """The matrices w^1, ..., w^L of the encoder."""
        return [layer.weight for layer in self.encoder if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def init_center(self, x: Tensor, guard: float = CENTER_GUARD) -> DeepSVDD:
        """Fix the centre at the mean encoding of ``x``, shape (n, widths[0]).

        Components closer to zero than ``guard`` are moved to +guard or -guard (an exact zero to +guard), because a
        network without biases reaches c = 0 by setting its weights to zero.

        Returns:
            The model itself.
        """
        mean = self.latent(x).mean(0)
        if not torch.isfinite(mean).all():
            raise ValueError(
                "the mean encoding is not finite: the samples or the pre-trained weights contain NaN or inf"
            )
        small = mean.abs() < guard
        self.center.copy_(torch.where(small, torch.where(mean < 0, -guard, guard), mean))
        return self

    def _center(self) -> Tensor:
        if not torch.isfinite(self.center).all():
            raise RuntimeError("the centre is not set: call init_center(samples) or fit_deep_svdd first")
        return self.center

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"widths={self.widths}, weight_decay={self.weight_decay}"


@dataclass(frozen=True)
class SVDDHistory:
    """The two phases of a Deep SVDD training.

    Attributes:
        pretrain: mean squared reconstruction error, or None where pre-training was skipped.
        train: the loss of equation 2.
    """

    pretrain: History | None
    train: History

    @property
    def seconds(self) -> float:
        """Wall time of both phases."""
        return self.train.seconds + (self.pretrain.seconds if self.pretrain else 0.0)


def fit_deep_svdd(
    model: DeepSVDD,
    train: Tensor,
    *,
    val: Tensor | None = None,
    pretrain_epochs: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    patience: int | None = None,
    schedule: str = "constant",
    guard: float = CENTER_GUARD,
    center: Tensor | None = None,
    monitor: Callable[[DeepSVDD], object] | None = None,
    progress: bool = True,
) -> SVDDHistory:
    """Pre-train as an autoencoder, fix the centre, minimise equation 2. The model is changed in place.

    The decoder mirrors the encoder, has no biases either, and is thrown away.

    Args:
        model: a fresh `DeepSVDD`; build it after seeding torch.
        train: normal samples, shape (n, widths[0]).
        val: normal samples for early stopping of the second phase.
        pretrain_epochs: passes of the first phase; 0 skips it, and the centre is the mean of untrained encodings.
        epochs, batch_size, lr: as in `usf.training.fit`; the last two for both phases.
        patience, schedule: as there, for the second phase.
        seed: of the decoder's weights and of both shuffles.
        guard: as in `DeepSVDD.init_center`.
        center: shape (widths[-1],); used as it is instead of the mean encoding. Zero makes the model collapse.
        monitor: called with the model before each pass of the second phase, for instance with `collapse_report`.

    Raises:
        FloatingPointError: when a loss is not finite.
    """
    pretrain = None
    if pretrain_epochs > 0:
        # The decoder's weights are drawn in a fork: the global generator stays where the caller left it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = _perceptron(model.widths[::-1], model.activation).to(train)
        autoencoder = nn.Sequential(model.encoder, decoder)
        pretrain = fit(
            autoencoder,
            _reconstruction_loss,
            train,
            epochs=pretrain_epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            progress=progress,
            label="autoencoder",
        )
    if center is None:
        model.init_center(train, guard)
    else:
        model.center.copy_(center)
    history = fit(
        model,
        observed(_svdd_loss, monitor, max(1, len(train) // batch_size)),
        train,
        val=val,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed + 1,
        patience=patience,
        schedule=schedule,
        progress=progress,
        label="Deep SVDD",
    )
    return SVDDHistory(pretrain, history)


def observed(
    loss: Callable[[nn.Module, Tensor], Tensor], monitor: Callable[[Any], object] | None, every: int
) -> Callable[[nn.Module, Tensor], Tensor]:
    """The same loss, which also calls ``monitor(module)`` before training steps 0, every, 2 every, ...

    `usf.training.fit` has no hooks; a loss that looks around is one.
    """
    steps = itertools.count()

    def observing(module: nn.Module, batch: Tensor) -> Tensor:
        if monitor is not None and module.training and next(steps) % every == 0:
            with torch.no_grad():
                monitor(module)
        return loss(module, batch)

    return observing


def _reconstruction_loss(autoencoder: nn.Module, batch: Tensor) -> Tensor:
    return (autoencoder(batch) - batch).square().sum(-1).mean()


def _svdd_loss(model: nn.Module, batch: Tensor) -> Tensor:
    assert isinstance(model, DeepSVDD)
    return model.loss(batch)


def _perceptron(widths: Sequence[int], activation: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=False), copy.deepcopy(activation)]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def _check_activation(activation: nn.Module) -> None:
    # Measured, not looked up by name, so that a user's own activation is judged too. A function that levels off is the
    # same at 1e3 and 1e6 to within rounding; the slowest unbounded one in use, sign(x) ln(1 + |x|), doubles.
    probe = torch.tensor([0.0, 1e3, 1e6, -1e3, -1e6])
    zero, near_right, far_right, near_left, far_left = activation(probe).tolist()
    name = type(activation).__name__
    for near, far in ((near_right, far_right), (near_left, far_left)):
        if abs(far) > 1e-3 and not abs(far) > 1.5 * abs(near):
            raise ValueError(
                f"{name} levels off at {far:.3g}: saturated, it is a bias that lets Deep SVDD collapse; use LeakyReLU"
            )
    if abs(far_right) <= 1e-3 and abs(far_left) <= 1e-3:
        raise ValueError(f"{name} is bounded on both sides; use ReLU or LeakyReLU")
    if abs(zero) > 1e-6:
        raise ValueError(f"{name}(0) = {zero:.3g}, which is a bias in disguise; use ReLU or LeakyReLU")
