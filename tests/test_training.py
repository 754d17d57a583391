"""The training loop: reproducible, bounded, loud when the numbers break."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from usf.flows import USFlow
from usf.training import History, fit


def nll(module: nn.Module, batch: Tensor) -> Tensor:
    return -module(batch).mean()


def trained(seed: int = 0, **options: object) -> tuple[USFlow, History]:
    torch.manual_seed(0)
    flow = USFlow((2,), 2, hidden=(8,))
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) * 3 + 1
    settings: dict = {"epochs": 4, "batch_size": 32, "lr": 1e-2, "progress": False} | options
    return flow, fit(flow, nll, data, seed=seed, **settings)


def test_a_training_is_a_function_of_weights_data_and_seed() -> None:
    first, history = trained()
    torch.manual_seed(99)  # what else the process draws does not matter
    second, again = trained()
    assert history.train == again.train
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert trained(seed=1)[1].train != history.train
    assert history.train[-1] < history.train[0]


def test_early_stopping_restores_the_best_epoch() -> None:
    val = torch.randn(100, 2, generator=torch.Generator().manual_seed(2)) * 3 + 1
    flow, history = trained(val=val, epochs=60, lr=0.3, patience=3)
    assert history.epochs < 60
    assert history.best_epoch == min(range(history.epochs), key=history.val.__getitem__)
    assert history.epochs - 1 - history.best_epoch == 3
    assert nll(flow, val).item() == pytest.approx(min(history.val), abs=1e-6)


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    module = nn.Linear(2, 1)
    calls = iter(range(1000))

    def breaking(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).sum() * (math.nan if next(calls) == 7 else 1.0)

    with pytest.raises(FloatingPointError, match="epoch 1, step 2"):
        fit(module, breaking, torch.randn(50, 2), epochs=3, batch_size=10, lr=1e-3, seed=0, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "must be positive"),
        ({"lr": 0.0}, "must be positive"),
        ({"schedule": "linear"}, "'constant' or 'cosine'"),
        ({"patience": 2}, "validation set"),
        ({"val": torch.zeros(0, 2)}, "empty data set"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(**options)


def test_trains_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own dependencies are enough, progress bar asked for or not."""
    expected = trained()[1].train
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert trained(progress=True)[1].train == expected


def test_shows_a_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    trained(progress=True, label="a flow")
    assert "a flow" in capfd.readouterr().err
