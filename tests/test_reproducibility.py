"""The reproducibility tables: every way in which records say where they come from, and those that do not say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas", reason="needs the book extra")

from usf.study import reproducibility  # noqa: E402

ENTRY = {
    "revision": "abc",
    "versions": {"torch": "2.11.0"},
    "hardware": {"cpu": "C", "cores": 2, "gpu": "none"},
    "started": "2026-01-02T03:04:05Z",
    "settings": {"seed": 7},
}


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def only(folder: Path) -> reproducibility.RecordFile:
    (found,) = reproducibility.read(folder)
    return found


def test_rows_that_speak_for_themselves(tmp_path: Path) -> None:
    header = "seed,status,seconds,revision,versions,hardware,started"
    rows = ["0,ok,10,abc,python 3.11; torch 2.11.0,C,2026-01-02T00:00:00Z", "1,nan,5,abd,torch 2.12,C,2026-01-03"]
    write(tmp_path, "a/records.csv", "\n".join([header, *rows]))
    file = only(tmp_path)
    assert (file.name, file.runs, file.failed, file.orphans) == ("a/records.csv", 2, 1, 0)
    assert (file.seconds, file.seconds_failed) == (15, 5), "hours include the failed runs"
    row = reproducibility.table([file]).iloc[0]
    assert (row["seeds"], row["day"], row["revision"]) == ("0, 1", "2026-01-02, 2026-01-03", "abc, abd")
    versions = reproducibility.versions([file]).set_index("package")["versions"]
    assert versions.to_dict() == {"python": "3.11", "torch": "2.11.0, 2.12"}


def test_runs_by_key_and_rows_whose_key_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "trials.csv", "run,seconds,seed\nx,1,66609189\ny,2,66609190\nz,4,66609191\n")
    write(tmp_path, "provenance.json", json.dumps({"x": ENTRY, "y": {**ENTRY, "revision": "abc+"}}))
    file = only(tmp_path)
    assert [origin.revision for origin in file.origins] == ["abc", "abc+"]
    assert file.orphans == 1
    assert reproducibility.without_origin([file]) == ["trials.csv (1 of 3 rows)"]
    assert reproducibility.table([file]).iloc[0]["seeds"] == "3 derived from 7"


@pytest.mark.parametrize("name", ["speed.json", "speed-provenance.json", "provenance.json"])
def test_one_origin_for_a_whole_file(name: str, tmp_path: Path) -> None:
    write(tmp_path, "speed.csv", "seconds\n1\n2\n")
    write(tmp_path, name, json.dumps({**ENTRY, "wall_seconds": 3600}))
    file = only(tmp_path)
    assert (file.orphans, file.seconds) == (0, 3600), "what was measured as a whole comes before the sum"
    assert file.origins[0].hardware == "C, 2 cores"


def test_the_only_run_of_a_folder_is_that_of_its_other_files(tmp_path: Path) -> None:
    write(tmp_path, "brightness.csv", "x\n1\n")
    write(tmp_path, "provenance.json", json.dumps({"only": ENTRY}))
    assert only(tmp_path).orphans == 0
    write(tmp_path, "provenance.json", json.dumps({"one": ENTRY, "two": ENTRY}))
    assert only(tmp_path).orphans == 1


def test_nothing_beside_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "x\n1\n")
    write(tmp_path, "settings.json", json.dumps({"b16": {"batch_size": 8}}))
    file = only(tmp_path)
    assert reproducibility.table([file]).empty
    assert reproducibility.without_origin([file]) == ["a.csv (1 of 1 rows)"]


def test_scores_and_epochs_of_a_training_are_one_run(tmp_path: Path) -> None:
    header = "detector,coupling,seed,settings,score,protocol,seconds,status"
    rows = [
        "fastflow,affine,0,s,norm,trace,5,ok",
        "fastflow,affine,0,s,norm,main,9,ok",
        "fastflow,affine,0,s,anomalib,main,9,ok",
        "fastflow,affine,1,s,norm,main,2,failed",
    ]
    write(tmp_path, "scores.csv", "\n".join([header, *rows]))
    file = only(tmp_path)
    assert (file.rows, file.runs, file.failed, file.seconds, file.seconds_failed) == (4, 2, 1, 11, 2)
    (tmp_path / "scores.csv").unlink()
    write(tmp_path, "traces.csv", "category,seed,epoch,epochs,seconds\na,0,1,2,3\na,0,2,2,7\nb,0,1,2,1\n")
    file = only(tmp_path)
    assert (file.runs, file.seconds) == (2, 8), "seconds of an epoch are those up to it"
    header = "data,norm,epoch,loss,epochs,seconds"
    write(tmp_path, "traces.csv", f"{header}\na,counted,0,1,1,4\na,counted,1,2,1,4\na,left out,0,1,1,6\n")
    file = only(tmp_path)
    assert (file.runs, file.seconds) == (2, 10), "what stands before the epoch tells runs apart"


def test_committed_records_are_all_there_and_almost_all_say_where_they_come_from() -> None:
    files = reproducibility.read()
    table = reproducibility.table(files)
    named = set(table["file"]) | {name.split(" ")[0] for name in reproducibility.without_origin(files)}
    assert named == {file.name for file in files}, "a file is in a table or in the list of those that say nothing"
    assert (table["machine"] != "").all()
    assert (table["revision"] != "").all()
    assert table["hours"].sum() > 1
    assert "torch" in set(reproducibility.versions(files)["package"])


def test_inputs_and_packages_have_licences() -> None:
    inputs = reproducibility.inputs()
    assert (inputs["licence"].str.len() > 3).all()
    assert {"CC BY-NC-SA 4.0", "CC BY 4.0", "Apache-2.0"} <= set(inputs["licence"])
    packages = reproducibility.dependencies().set_index("package")
    assert {"torch", "anomalib", "jupyter-book"} <= set(packages.index)
    assert packages.loc["torch", "needed"] == "always"
    assert "BSD" in packages.loc["torch", "licence"]
    assert (packages.loc[packages["version"] != "not installed", "licence"] != "not stated").all()
