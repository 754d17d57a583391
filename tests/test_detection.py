"""The fast path: training and scoring on cached features, whichever the detector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("anomalib", reason="needs the detectors extra")

from usf.detectors import FlowOptions, resolve
from usf.detectors import model as model_module
from usf.detectors.coupling import Coupling
from usf.detectors.model import DetectorModel, Latents, Loss
from usf.study import detection
from usf.study.detection import FitHistory, NotFiniteError
from usf.study.features import Features

SIZE = 32
WEIGHTS = resolve("random", announce=None)


def build(options: FlowOptions | None = None, seed: int = 0, **more: object) -> DetectorModel:
    return detection.build("fastflow", SIZE, WEIGHTS, options or FlowOptions(), seed=seed, flow_steps=2, **more)


@pytest.fixture(scope="module")
def features() -> Features:
    images = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Features(tuple(build().features(images)))


class Toy(DetectorModel):
    """The smallest detector: one scale per channel, several losses a batch, and a say in when it breaks."""

    label = "Toy"

    def __init__(self, steps: int = 3, breaks: int | None = None) -> None:
        super().__init__()
        self.options = FlowOptions()
        self.loss_kind, self.score, self.input_size = "mle", "norm", (8, 8)
        self.scale = nn.Parameter(torch.ones(2))
        self.steps, self.breaks = steps, breaks
        self.calls = 0
        self.drawn: list[float] = []
        self.at_call: list[float] = []

    def latents(self, features: Sequence[Tensor]) -> Latents:
        scale = self.scale.reshape(1, 2, 1, 1)
        return Latents([features[0] * scale], [self.scale.log().sum().expand(len(features[0]), *features[0].shape[2:])])

    def losses(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        for _ in range(self.steps):
            self.calls += 1
            self.drawn.append(float(torch.rand((), generator=generator)))
            self.at_call.append(float(self.scale.detach()[0]))
            latents = self.latents(features)
            loss = (latents.energies() - latents.log_abs_det()).mean().float()
            yield loss * float("nan") if self.calls == self.breaks else loss

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainable_parameters(), lr=1e-3)


TOY = Features((torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(3)),))


def test_training_is_a_function_of_the_seed_and_lowers_the_loss(features: Features) -> None:
    states, histories = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 17)  # whatever happened before does not matter
        detector = build(seed=seed)
        histories.append(detection.fit(detector, features, epochs=3, batch_size=2, seed=seed, progress=False))
        states.append(detector.state_dict())
    assert histories[0].train == histories[1].train
    assert histories[0].initial_sha256 == histories[1].initial_sha256 != histories[2].initial_sha256
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert histories[0].train != histories[2].train
    assert histories[0].train[-1] < histories[0].train[0]
    assert histories[0].steps == 9
    assert histories[0].best_epoch == histories[0].epochs == 3
    assert detection.nll(detector, features) < histories[2].train[0]


def test_building_leaves_torchs_stream_alone_and_refuses_what_it_does_not_know() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="detector='padim': choose one of 'fastflow', 'cflow', 'uflow'"):
        detection.build("padim", SIZE, WEIGHTS, FlowOptions(), seed=0)  # type: ignore[arg-type]
    assert build(loss="mle").loss_kind == "mle"


def test_initial_hash_is_of_what_is_trained_not_of_the_backbone() -> None:
    first = detection.initial_digest(build(seed=1))
    other = detection.build(
        "fastflow", SIZE, resolve("random", seed=9, announce=None), FlowOptions(), seed=1, flow_steps=2
    )
    assert detection.initial_digest(other) == first
    assert detection.initial_digest(build(seed=2)) != first
    # A permutation is drawn, not trained, and part of what is initial.
    changed = build(seed=1)
    for key, value in changed.state_dict().items():
        if key.endswith("w_perm"):
            value.copy_(value.flip(0))
    assert detection.initial_digest(changed) != first


def test_every_loss_of_a_batch_is_a_step_of_its_own() -> None:
    toy = Toy(steps=3)
    history = detection.fit(toy, TOY, epochs=2, batch_size=3, seed=4, progress=False)
    assert history.steps == toy.calls == 2 * 3 * 3
    assert len(set(toy.at_call)) == len(toy.at_call), "the optimiser steps between two losses of a batch"
    assert history.train == [], "not known to be a likelihood"
    again = Toy(steps=3)
    torch.manual_seed(99)
    detection.fit(again, TOY, epochs=2, batch_size=3, seed=4, progress=False)
    assert again.drawn == toy.drawn, "the detector's own draws follow the seed"


def test_mean_loss_weighs_steps_by_their_images() -> None:
    toy = Toy(steps=1)
    history = detection.fit(toy, TOY, epochs=1, batch_size=3, lr=1e-30, seed=0, progress=False)
    fresh = Toy()
    latents = fresh.latents(TOY.batch(slice(0, 7)))
    assert history.losses[0] == pytest.approx((latents.energies() - latents.log_abs_det()).mean().item(), rel=1e-5)
    # The same in nats per dimension, up to the constant of the base density.
    expected = history.losses[0] / TOY.dimension + 0.5 * math.log(2 * math.pi)
    assert detection.nll(fresh, TOY) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [1, 2, 8, 9, 70, 100])
def test_first_bad_loss_is_named_though_losses_are_looked_at_in_bulk(step: int) -> None:
    toy = Toy(steps=3, breaks=step)
    epoch = (step - 1) // 9 + 1
    message = rf"Toy \(coupling additive, mixing lu\): the loss is nan at epoch {epoch}, step {step}\."
    with pytest.raises(NotFiniteError, match=message) as caught:
        detection.fit(toy, TOY, epochs=12, batch_size=3, progress=False)
    assert (caught.value.epoch, caught.value.steps) == (epoch, step - 1)


@pytest.mark.parametrize("detector", ["fastflow", "uflow"])
@pytest.mark.parametrize("loss", ["anomalib", "mle"])
@pytest.mark.parametrize("coupling", ["affine", "gin", "additive"])
def test_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(
    detector: Literal["fastflow", "uflow"], loss: Loss, coupling: Coupling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = detection.build(detector, SIZE, WEIGHTS, FlowOptions(coupling=coupling), seed=0, loss=loss, flow_steps=2)
    maps = model.features(torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    calls: list[int] = []
    latents = model.latents
    monkeypatch.setattr(model, "latents", lambda own: calls.append(len(own[0])) or latents(own))
    found = []
    for size in (model_module.PART_BYTES, 2 * 4 * maps[0][0].numel(), 1):
        monkeypatch.setattr(model_module, "PART_BYTES", size)
        model.zero_grad()
        (value,) = model.gradients(maps)
        found.append([value, *(parameter.grad for parameter in model.trainable_parameters())])
    assert calls == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for parts in found[1:]:
        for own, whole in zip(parts, found[0], strict=True):
            assert torch.allclose(own, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_long_epoch_does_not_go_on_after_a_bad_loss() -> None:
    toy = Toy(steps=500, breaks=3)
    with pytest.raises(NotFiniteError, match="epoch 1, step 3"):
        detection.fit(toy, TOY, epochs=1, batch_size=3, progress=False)
    assert toy.calls <= detection.CHECK_EVERY


def test_normal_stopping_restores_the_best_weights(features: Features) -> None:
    detector = build()
    # A learning rate that overshoots: the held-out likelihood gets worse at some point.
    history = detection.fit(
        detector, features, epochs=30, batch_size=5, lr=0.05, seed=0, val=features, stopping="normal", patience=2,
        progress=False,
    )  # fmt: skip
    assert history.best_epoch + 2 == history.epochs or history.epochs == 30
    assert history.val[history.best_epoch - 1] == min(history.val)
    assert detection.nll(detector, features, counted=True) == pytest.approx(min(history.val), rel=1e-4)


def test_shrinking_the_features_is_no_gain_in_the_likelihood_that_stops(features: Features) -> None:
    detector = build()
    before = detection.nll(detector, features), detection.nll(detector, features, counted=True)
    assert before[0] == pytest.approx(before[1]), "the scale starts at one"
    with torch.no_grad():
        for norm in detector.norms:
            norm.weight.mul_(0.5)
    left_out, counted = detection.nll(detector, features), detection.nll(detector, features, counted=True)
    assert left_out < before[0]
    assert counted - left_out == pytest.approx(math.log(2), rel=1e-4)
    assert detector.loss_kind == "anomalib"


def test_paper_stopping_selects_by_what_is_watched_and_says_so() -> None:
    values = [0.5, 0.9, 0.7, 0.6, 0.95]
    kept: list[Tensor] = []

    def watch(model: DetectorModel, history: FitHistory) -> float:
        kept.append(model.scale.detach().clone())  # type: ignore[operator]
        return values[history.epochs - 1]

    toy = Toy()
    history = detection.fit(toy, TOY, epochs=5, stopping="paper", patience=2, watch=watch, progress=False, batch_size=3)
    assert history.watched == values[:4]
    assert (history.best_epoch, history.epochs) == (2, 4)
    assert torch.equal(toy.scale.detach(), kept[1])
    assert not torch.equal(kept[1], kept[3])
    with pytest.raises(NotFiniteError, match="value of watch is None after epoch 1"):
        detection.fit(Toy(), TOY, epochs=2, stopping="paper", watch=lambda *_: None, progress=False)


def test_watching_changes_nothing() -> None:
    plain, watched = Toy(), Toy()
    detection.fit(plain, TOY, epochs=3, batch_size=3, progress=False)
    history = detection.fit(
        watched, TOY, epochs=3, batch_size=3, progress=False, val=TOY,
        watch=lambda model, _: float(torch.rand(())) if model.eval() else None,
    )  # fmt: skip
    assert torch.equal(plain.scale, watched.scale)
    assert len(history.watched) == len(history.val) == 3
    assert history.best_epoch == 3


def test_values_that_are_not_finite_stop_the_run_by_name(features: Features) -> None:
    broken = Features(tuple(level.clone() for level in features.levels))
    broken.levels[1][3, 0, 0, 0] = float("nan")
    with pytest.raises(
        NotFiniteError, match=r"mine \(coupling additive, mixing lu\): the loss is nan at epoch 1, step"
    ):
        detection.fit(build(), broken, epochs=1, batch_size=2, label="mine", progress=False)
    with pytest.raises(NotFiniteError, match=r"FastFlow \(coupling additive, .*the score of image 3 is not finite"):
        detection.evaluate(build(), broken)
    counted = detection.evaluate_scores(build(), broken, ["norm"])["norm"]
    assert counted.nonfinite == broken.levels[1].shape[-1] * broken.levels[1].shape[-2]
    assert np.isfinite(counted.scores).tolist() == [True, True, True, False, True]


def test_settings_that_make_no_sense_are_refused(features: Features) -> None:
    with pytest.raises(ValueError, match="stopping='normal' needs val"):
        detection.fit(build(), features, epochs=1, stopping="normal")
    with pytest.raises(ValueError, match="stopping='paper' needs watch"):
        detection.fit(build(), features, epochs=1, stopping="paper")
    with pytest.raises(ValueError, match="stopping='best'"):
        detection.fit(build(), features, epochs=1, stopping="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epochs=0"):
        detection.fit(build(), features, epochs=0)


def test_scores_of_the_same_latents_are_those_of_one_at_a_time(features: Features) -> None:
    detector = build(FlowOptions(coupling="affine"))
    detection.fit(detector, features, epochs=2, progress=False)
    together = detection.evaluate_scores(detector, features, ["norm", "log_prob", "anomalib"])
    for score, result in together.items():
        alone = detection.evaluate(detector, features, score=score)
        assert np.array_equal(alone.maps, result.maps)
        assert result.nonfinite == 0
    assert not np.array_equal(together["norm"].maps, together["log_prob"].maps)
