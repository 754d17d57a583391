"""Chapter 5's experiment: does training order N(0, I_d) by density, for Deep SVDD and for a USF?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from usf.alignment import spearman
from usf.flows import USFlow
from usf.oneclass import DeepSVDD, decreasing_schedule, fit_deep_svdd, standard_normal_log_prob
from usf.oneclass.svdd import observed
from usf.training import fit

TEST_SAMPLES = 4000


@dataclass
class Trajectory:
    """One training on N(0, I_d), watched on test samples that it never sees.

    Attributes:
        dim: d.
        seed: of the data, the weights and the shuffles.
        model: the trained model, with ``score(x)``.
        test: shape (4000, d).
        epochs: passes after which the measures were taken; the first is 0, before training.
        spearman: between the score and minus the true log-density; 1 aligned, -1 inverted.
        tail: the same among the tenth of the samples with the lowest density.
        loss: mean squared distance to the centre over |c|^2 for Deep SVDD; negative log-likelihood in nats for a flow.
        seconds: wall time.
    """

    dim: int
    seed: int
    model: nn.Module
    test: Tensor
    epochs: list[int] = field(default_factory=list)
    spearman: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @torch.no_grad()
    def observe(self, model: nn.Module) -> None:
        """Append the measures of ``model``."""
        assert isinstance(model, DeepSVDD | USFlow)
        truth = standard_normal_log_prob(self.test)
        score = model.score(self.test)
        self.epochs.append(len(self.epochs))
        self.spearman.append(spearman(score, truth))
        self.tail.append(spearman(score, truth, tail=0.1))
        if isinstance(model, DeepSVDD):
            self.loss.append(float(score.mean() / model.center.square().sum()))
        else:
            self.loss.append(-float(model.log_prob(self.test).mean()))


def _samples(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randn(TEST_SAMPLES, dim, generator=generator)


def svdd_trajectory(dim: int, seed: int, *, samples: int, pretrain_epochs: int, epochs: int) -> Trajectory:
    """Deep SVDD from ordinary initial weights: depth 5 on the paper's schedule, LeakyReLU, the default weight decay."""
    train, test = _samples(samples, dim, seed)
    torch.manual_seed(seed)
    model = DeepSVDD(decreasing_schedule(dim, 5))
    run = Trajectory(dim, seed, model, test)
    history = fit_deep_svdd(
        model,
        train,
        pretrain_epochs=pretrain_epochs,
        epochs=epochs,
        batch_size=256,
        lr=3e-3,
        seed=seed,
        schedule="cosine",
        monitor=run.observe,
        progress=False,
    )
    run.observe(model)
    run.seconds = history.seconds
    return run


def usf_trajectory(dim: int, seed: int, *, samples: int, epochs: int, disorder: float = 0.1) -> Trajectory:
    """A USF by maximum likelihood on the same samples.

    An untouched `USFlow` starts near the identity, the very solution for N(0, I_d). To leave training something to do,
    normal noise of standard deviation ``disorder`` is first added to every parameter.
    """
    train, test = _samples(samples, dim, seed)
    torch.manual_seed(seed)
    flow = USFlow((dim,), blocks=2, hidden=(32,))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(disorder * torch.randn_like(parameter))
    run = Trajectory(dim, seed, flow, test)
    steps = max(1, samples // 256)
    history = fit(
        flow,
        observed(_nll, run.observe, steps),
        train,
        epochs=epochs,
        batch_size=256,
        lr=3e-3,
        seed=seed,
        schedule="cosine",
        progress=False,
    )
    run.observe(flow)
    run.seconds = history.seconds
    return run


def _nll(flow: nn.Module, batch: Tensor) -> Tensor:
    assert isinstance(flow, USFlow)
    return -flow.log_prob(batch).mean()
