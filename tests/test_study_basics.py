"""Paths, profiles and the status table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from usf import paths
from usf.study import status
from usf.study.profile import select

ROOT = Path(__file__).resolve().parents[1]


def test_paths_inside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where a chapter runs does not matter
    assert paths.root() == ROOT
    assert paths.results("mixtures", "a.csv") == ROOT / "data" / "results" / "mixtures" / "a.csv"
    assert paths.book("intro.md").is_file()


def test_paths_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "_is_root", lambda folder: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USF_SHARED", raising=False)
    assert paths.root() is None
    assert paths.shared() is None
    assert paths.build("x") == tmp_path / "build" / "x"
    with pytest.raises(FileNotFoundError, match=r"data/results/mixtures is part of the repository"):
        paths.results("mixtures")


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("USF_CACHE", str(tmp_path))
    assert paths.cache("features") == tmp_path / "features"
    monkeypatch.delenv("USF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert paths.cache() == tmp_path / "user" / "usf"


def test_shared_material(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("USF_SHARED", str(tmp_path))
    assert paths.shared("images") == tmp_path / "images"
    assert paths.shared("weights") is None
    monkeypatch.setenv("USF_SHARED", "")
    assert paths.shared() is None
    monkeypatch.setenv("USF_SHARED", str(tmp_path / "tpyo"))
    with pytest.raises(FileNotFoundError, match="tpyo is not a folder"):
        paths.shared()


def test_profiles_name_the_same_settings() -> None:
    with pytest.raises(ValueError, match="'full' lacks epochs"):
        select("smoke", smoke={"epochs": 1}, book={"epochs": 2}, full={})


def test_records_are_counted_by_outcome(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("seed,status,auroc\n0,ok,99\n1,nan in epoch 3,\n2,ok,98\n")
    (tmp_path / "b.csv").write_text("seed,auroc\n0,97\n")
    assert status.count_records(tmp_path, "*.csv") == (3, 1)
    assert status.count_records(tmp_path, "a.csv") == (2, 1)
    assert status.count_records(tmp_path / "none", "*.csv") == (0, 0)
    # A row a score: one run, and a failed one.
    header = "dataset,category,detector,coupling,mixing,settings,seed,score,status"
    rows = [
        f"mvtec,bottle,cflow,affine,lu,abc,{seed},{score},{state}"
        for seed, score, state in (
            (0, "norm", "ok"),
            (0, "anomalib", "ok"),
            (1, "norm", "failed"),
            (1, "anomalib", "ok"),
        )
    ]
    (tmp_path / "scores.csv").write_text("\n".join([header, *rows]))
    assert status.count_records(tmp_path, "scores.csv") == (1, 1)
    # Rows that are about something else.
    assert status.count_records(tmp_path, "scores.csv dataset=visa") == (0, 0)
    assert status.count_records(tmp_path, "scores.csv dataset=mvtec|visa seed=0") == (1, 0)
    assert status.count_records(tmp_path, "*.csv dataset=mvtec") == (1, 1), "a file without the column has no such row"


def test_status_says_what_is_missing() -> None:
    claim = status.Claim("Figure 4", "text", chapter=None, title=None, records="mixtures")
    assert claim.status == "open"
    chapter = {"chapter": "07-gaussian-mixtures", "title": "Mixtures"}
    assert status.Claim("Figure 4", "text", **chapter, records="mixtures").status == "live run only, no records yet"
    assert status.Claim("Table 2", "text", **chapter, records="a.csv dataset=visa").status == "no run on record"
    assert status.Claim("Figure 4", "text", **chapter, records="mixtures", succeeded=1).status == "1 run on record"
    claim = status.Claim("Figure 4", "text", **chapter, records="mixtures", succeeded=5, failed=2)
    assert claim.status == "7 runs on record, 2 of them failed"
    assert "[Mixtures](07-gaussian-mixtures.html)" in status.markdown([claim])


def test_every_claim_has_a_place_and_a_text() -> None:
    claims = status.claims()
    places = [claim.place for claim in claims]
    for place in (
        "Equation 5",
        "Proposition 1",
        *(f"Figure {n}" for n in range(1, 9)),
        *(f"Table {n}" for n in range(1, 6)),
    ):
        assert place in places
    assert all(claim.text and (claim.chapter is None) == (claim.title is None) for claim in claims)


def test_a_status_counts_all_runs_and_names_no_zero() -> None:
    claim = status.Claim("Section 6", "breaks", "12-where", "Where", "stability/runs.csv")
    said = [
        dataclasses.replace(claim, succeeded=succeeded, failed=failed).status
        for succeeded, failed in ((98, 268), (1, 0), (0, 1))
    ]
    assert said == ["366 runs on record, 268 of them failed", "1 run on record", "1 run on record, failed"]
    assert status.sentence([claim]) == "Each of the 1 claims has its chapter"
    missing = dataclasses.replace(claim, chapter=None)
    assert status.sentence([claim, missing]) == "Of the 2 claims, 1 has no chapter yet"
