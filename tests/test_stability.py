"""Where training breaks: what is called a failure, where it is found, and that records survive a stop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from usf.flows import NonUSFlow, USFlow
from usf.plots import stability as figures
from usf.study import stability
from usf.study.stability import Run, Trace, VectorSubject

DIM = 6


def subject(coupling: str = "affine", blocks: int = 3) -> VectorSubject:
    torch.manual_seed(0)
    flow = (
        NonUSFlow((DIM,), blocks, hidden=(8,))
        if coupling == "affine"
        else USFlow((DIM,), blocks, hidden=(8,), coupling=coupling)  # type: ignore[arg-type]
    )
    flow.validate_args = False
    return VectorSubject(flow)


DATA = 2 + torch.randn(64, DIM, generator=torch.Generator().manual_seed(1))


def batches() -> Iterator[Tensor]:
    return itertools.cycle(DATA.split(16))


@pytest.mark.parametrize(
    ("start", "end", "broken", "expected"),
    [
        (10.0, 9.0, None, "ok"),
        (10.0, 10.0, None, "worse than no flow"),
        (10.0, math.inf, None, "not finite"),
        (10.0, 9.0, (3, "block 1", "output"), "not finite"),
        (10.0, math.nan, None, "not finite"),
    ],
)
def test_what_is_called_a_failure(start: float, end: float, broken: tuple[int, str, str] | None, expected: str) -> None:
    assert stability.outcome(Run(Trace(), start, 1e9, end, broken)) == expected


@pytest.mark.parametrize("coupling", ["affine", "additive", "gin"])
def test_the_first_value_that_is_not_finite_is_found_where_it_arises(coupling: str) -> None:
    fine = subject(coupling)
    assert stability.locate(fine, DATA) is None
    bad = subject(coupling)
    with torch.no_grad():
        bad.stations[1].conditioner[-1].bias[0] = math.nan  # type: ignore[index]
    assert stability.locate(bad, DATA) == ("block 2", "conditioner")
    bad = subject(coupling)
    with torch.no_grad():
        bad.stations[2].lu.weight[0, 1] = math.inf  # type: ignore[union-attr]
    assert stability.locate(bad, DATA) == ("block 3", "input of the conditioner")
    # 1e25 is a float, its square is not: every value up to the latents is finite, the loss is not.
    far = subject(coupling)
    with torch.no_grad():
        far.stations[-1].lu.weight.diagonal().fill_(math.log(1e25))  # type: ignore[union-attr]
    assert stability.locate(far, DATA) == ("loss", "energy")
    assert not far.stations[0].block._forward_hooks  # nothing is left behind


def test_growth_names_every_block_and_sees_what_it_passes_on() -> None:
    one = subject()
    with torch.no_grad():
        one.stations[-1].lu.weight.diagonal().fill_(math.log(100.0))  # type: ignore[union-attr]
    reach = stability.growth(one, DATA)
    assert list(reach) == ["block 1", "block 2", "block 3", "last map"]
    assert reach["block 3"] == pytest.approx(float(DATA.abs().max()))  # untrained blocks are the identity
    assert reach["last map"] == pytest.approx(100 * float(DATA.abs().max()), rel=1e-5)


def test_a_calm_run_is_a_function_of_its_inputs_and_lowers_the_loss() -> None:
    runs = [stability.stress(subject(), batches(), DATA, steps=15, lr=1e-2) for _ in range(2)]
    assert runs[0].trace == runs[1].trace
    assert runs[0].trace.steps == len(runs[0].trace.gradient) == 15
    assert runs[0].trace.looks == [0]
    assert runs[0].held_start == pytest.approx(subject().terms(DATA).loss.item())
    assert runs[0].held_idle == pytest.approx(runs[0].held_start)  # an untrained flow is the identity
    assert stability.outcome(runs[0]) == "ok"


def test_a_run_that_breaks_ends_where_it_breaks() -> None:
    run = stability.stress(subject(), batches(), DATA, steps=50, lr=30.0)
    assert run.broken is not None
    assert run.broken[0] == run.trace.steps - 1
    assert stability.outcome(run) == "not finite"
    assert math.isnan(run.held_end)


def test_a_gradient_that_is_not_finite_is_found_from_behind() -> None:
    class Kink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * math.nan

    one = subject()
    one.stations[1].conditioner.register_forward_hook(lambda *a: Kink.apply(a[2]))  # type: ignore[union-attr]
    run = stability.stress(one, batches(), DATA, steps=5, lr=1e-3)
    assert run.broken == (0, "block 2", "gradient")


def test_slow_lu_maps_move_by_the_rate_over_the_channels_and_nothing_else_does() -> None:
    for remedy, factor in (("none", 1), ("slow LU", DIM)):
        one = subject()
        before = {name: p.detach().clone() for name, p in one.module.named_parameters()}
        stability.stress(one, batches(), DATA, steps=1, lr=1e-2, remedy=remedy)
        moved = {name: float((p - before[name]).abs().max()) for name, p in one.module.named_parameters()}
        assert moved["bijection.parts.3.weight"] == pytest.approx(1e-2 / factor, rel=1e-2)
        assert moved["bijection.parts.3.bias"] == pytest.approx(1e-2, rel=1e-2)


def test_a_warm_up_begins_small() -> None:
    for steps, first in ((1, 1e-2), (20, 1e-3)):
        one = subject()
        last = one.stations[-1].lu
        assert last is not None
        with contextlib.suppress(StopIteration):  # one batch, whatever the number of steps
            stability.stress(one, iter([DATA[:16]]), DATA, steps=steps, lr=1e-2, remedy="warm-up")
        assert float(last.weight.detach().abs().max()) == pytest.approx(first, rel=1e-2)


def test_an_unknown_remedy_or_part_is_refused() -> None:
    with pytest.raises(ValueError, match="slow LU"):
        stability.stress(subject(), batches(), DATA, steps=1, lr=1.0, remedy="prayer")
    with pytest.raises(ValueError, match="mixture"):
        stability.cases("sky", "smoke")  # type: ignore[arg-type]


@given(st.sampled_from(stability.PARTS), st.sampled_from(["smoke", "book", "full"]))
def test_cases_have_names_of_their_own_and_known_remedies(part: stability.Part, profile: str) -> None:
    found = stability.cases(part, profile)
    assert len({case.name for case in found}) == len(found) > 0
    assert {case.remedy for case in found} <= set(stability.REMEDIES)
    assert [case.seed for case in found] == sorted(case.seed for case in found)


@pytest.mark.parametrize("remedy", list(stability.REMEDIES))
def test_a_flow_is_built_as_its_remedy_says(remedy: str) -> None:
    case = dataclasses.replace(stability.cases("mixture", "smoke")[0], remedy=remedy, lr=1e-3)
    one = stability.build(case)
    assert isinstance(one, VectorSubject)
    kind = torch.float64 if remedy == "double" else torch.float32
    x = torch.randn(5, case.size, dtype=kind)
    z = one.terms(x).z[0]
    assert z.dtype == kind
    assert torch.equal(z, x) == ("start" not in remedy)
    clamps = {part.inner.clamp for part in one.flow.bijection.parts[:-1]}  # type: ignore[index, union-attr]
    assert clamps == {{"clamp 0.5": 0.5, "clamp 5": 5.0, "published start": 5.0}.get(remedy, 2.0)}
    assert torch.equal(stability.build(case).terms(x).loss, one.terms(x).loss)


def test_runs_are_resumed_published_and_drawn(tmp_path: Path) -> None:
    wanted = [case for case in stability.cases("mixture", "smoke") if case.remedy in ("none", "prior")]
    assert not stability.run_all(wanted, tmp_path / "runs", seconds=1e-9)
    assert stability.run_all(wanted, tmp_path / "runs")
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == len(wanted)
    stamps = [path.stat().st_mtime_ns for path in files]
    assert stability.run_all(wanted, tmp_path / "runs")
    assert stamps == [path.stat().st_mtime_ns for path in files]
    stability.publish(tmp_path / "runs", tmp_path / "published")
    found = stability.load(tmp_path / "published")
    assert len(found["runs"]) == len(wanted)
    for row in found["runs"]:
        assert row["status"] == ("ok" if row["outcome"] == "ok" else "failed")
        assert row["run"] in json.loads((tmp_path / "published" / "provenance.json").read_text())
    quiet = [row for row in found["runs"] if row["lr"] == 0.01 and row["remedy"] == "none"]
    assert {row["outcome"] for row in quiet} == {"ok"}
    steps = [row["step"] for row in found["traces"] if row["coupling"] == "affine" and row["lr"] == 0.01]
    assert steps == list(range(5))
    figure = figures.failure_map(found["runs"])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["additive + LU", "affine + LU", "affine + LU, prior", "gin + LU"]
    plt.close(figure)
    with pytest.raises(FileNotFoundError, match="run a part first"):
        stability.publish(tmp_path / "nothing", tmp_path)


def test_a_failure_map_fills_the_share_of_failed_runs() -> None:
    shared = {"coupling": "affine", "mixing": "lu", "remedy": "none", "lr": 0.1}
    kinds = ["ok", "not finite", "not finite", "worse than no flow"]
    figure = figures.failure_map([{**shared, "outcome": kind} for kind in kinds])
    widths = {patch.get_facecolor(): patch.get_width() for patch in figure.axes[0].patches if patch.get_fill()}
    assert sorted(widths.values()) == pytest.approx([0.22, 0.44])
    plt.close(figure)


def test_traces_mark_the_run_that_broke() -> None:
    calm = {"loss": [1.0] * 20, "log_det": [0.0] * 20, "reach": [1.0] * 20, "looks": [0, 10], "condition": [1.0, 2.0]}
    wild = {"loss": [1.0, 9.0], "log_det": [0.0, 5.0], "reach": [1.0, 8.0], "looks": [0], "condition": [1.0]}
    figure = figures.traces({"calm": calm, "wild": wild}, {})
    crosses = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert crosses == [[[1.0, 9.0]]]
    plt.close(figure)


def test_boundaries_leave_out_what_never_fails() -> None:
    figure = figures.boundaries({"affine": {8: 1.0, 32: 0.25}, "additive": {8: math.inf, 32: 0.5}}, {})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["additive"] == [[32.0, 0.5]]
    ends = lines["1 / dimension"]
    assert ends[0][1] / ends[-1][1] == pytest.approx(4.0)
    plt.close(figure)


def test_the_committed_records_say_what_the_code_calls_a_failure() -> None:
    try:
        found = stability.load()["runs"]
    except FileNotFoundError:
        pytest.skip("no records yet")
    assert tuple(found[0]) == stability.COLUMNS
    for row in found:
        broken = (row["step"], row["block"], row["quantity"]) if row["step"] is not None else None
        end = math.nan if row["held_end"] is None else row["held_end"]
        assert stability.outcome(Run(Trace(), row["held_idle"], row["held_start"], end, broken)) == row["outcome"]
