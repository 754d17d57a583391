"""The benchmark's own code: it runs for `usf`, writes its schema, and a peer that is not there is a row."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import benchmark_script
from usf.study import speed


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("flows")


@pytest.fixture(scope="module")
def rows(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("benchmark") / "flows.csv"
    threads = torch.get_num_threads()
    benchmark.MODELS["absent"] = lambda dim, architecture: importlib.import_module("no_such_library")
    try:
        benchmark.run(
            out,
            repeats=1,
            architectures=["sandwich", "affine"],
            models=["usf", "usf fused", "absent"],
            dims=[2],
            batches=[512],
            progress=False,
        )
    finally:
        del benchmark.MODELS["absent"]
        torch.set_num_threads(threads)
    provenance = json.loads((out.parent / "provenance.json").read_text())
    assert provenance["settings"]["threads"] == 1
    table = speed.table(out)
    assert table.loc[("log-density", "absent"), (2, 512)] == "missing"
    assert table.loc[("sampling", "usf fused"), (2, 512)].count(",") == 1
    assert not len(speed.faster_peers(out))
    with pytest.raises(ValueError, match="authors"):
        speed.authors_range(out)
    with pytest.raises(ValueError, match="no records of architecture 'plain'"):
        speed.table(out, "plain")
    with out.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_schema_and_every_cell(benchmark: ModuleType, rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == benchmark.COLUMNS
    measured = {(r["architecture"], r["model"], r["measure"]) for r in rows if r["status"] == "ok"}
    assert {m for a, name, m in measured if (a, name) == ("affine", "usf")} == set(benchmark.MEASURES)
    assert {m for a, name, m in measured if (a, name) == ("sandwich", "usf fused")} == {"log_prob", "sample"}
    for row in rows:
        if row["status"] == "ok":
            assert float(row["seconds"]) > 0
            assert float(row["ratio"]) > 0
            assert int(row["parameters"]) >= 0
            assert row["threads"] == "1"
        if row["model"] == "usf":
            assert float(row["ratio"]) == 1
        if row["measure"] == "training" and row["model"] == "usf":
            assert 3 < float(row["test_nll"]) < 6, "a short training on the mixture, whose entropy is 3.56 nats"


def test_a_missing_peer_is_a_row(rows: list[dict[str, str]]) -> None:
    absent = [row for row in rows if row["model"] == "absent"]
    assert len(absent) == 2 * 4
    assert {row["status"] for row in absent} == {"missing"}
    assert all("no_such_library" in row["reason"] for row in absent)


def test_bad_settings_are_named(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'usf' must be among"):
        benchmark.run(tmp_path / "x.csv", repeats=1, models=["usf fused"])
    with pytest.raises(ValueError, match="unknown: "):
        benchmark.run(tmp_path / "x.csv", repeats=1, measures=["speed"])


def test_records_are_named_when_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/flows\.py"):
        speed.table(tmp_path / "none.csv")


def test_every_model_sees_the_same_halves(benchmark: ModuleType) -> None:
    """The comparison's masks are those of the library's couplings."""
    for dim in (2, 5):
        flow = benchmark.usf(dim, "sandwich").module
        for index, part in enumerate(list(flow.bijection.parts)[:-1]):
            assert torch.equal(part.inner.mask, benchmark.kept_first(dim, index))
