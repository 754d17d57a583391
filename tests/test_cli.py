"""The command line, the folder it reads, the model it writes and the page about it: what works, and what fails."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from usf import calibration, cli, inspection
from usf.calibration import CalibrationError, normals_needed
from usf.inspection import Options, plan, survey
from usf.study.catalogue import ImageFolderError
from usf.study.images import load_images

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "64", "--weights", "random", "--steps", "2", "--flow-steps", "2", "--quiet", "--threads", "1"]


def picture(
    path: Path, seed: int, *, defect: bool = False, size: tuple[int, int] = (64, 64), mode: str = "RGB"
) -> Path:
    pixels = np.random.default_rng(seed).integers(90, 130, (*size, 3)).astype(np.uint8)
    if defect:
        pixels[20:44, 20:44] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def parts(folder: Path, normal: int = 12, bad: int = 0) -> Path:
    for i in range(normal):
        picture(folder / "good" / f"{i:02}.png", i)
    for i in range(bad):
        picture(folder / "test" / f"bad{i}.png", 100 + i, defect=True)
        picture(folder / "test" / f"ok{i}.png", 200 + i)
    return folder


def photo(path: Path, seed: int) -> Path:
    """A picture as a camera stores it that was held on its side: upright is what EXIF makes of it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture(path, seed, size=(64, 80))) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(path, exif=exif)
    return path


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "usf", *map(str, arguments)]


def run(*arguments: object, code: int = 0, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own; it never ends with a traceback."""
    done = subprocess.run([*within, *command(*arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def mounted(place: Path, options: str, first: str = ":") -> list[str]:
    """What starts a process that sees a memory disk of its own at ``place``, on which ``first`` was run."""
    place.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && cd "$0" && {{ {first}; }} && cd / && exec "$@"'
    within = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(place)]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a process mount a disk of its own")
    return within


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves, of a folder with everything that can be odd, in a place with an odd name."""
    base = tmp_path_factory.mktemp("münchen, halle 3 ✓")
    folder = parts(base / "gute teile", normal=14, bad=2)
    good = folder / "good"
    (good / "notes.png").write_text("not an image")
    (good / "half.png").write_bytes((good / "00.png").read_bytes()[:400])
    (good / "list.txt").write_text("nothing to see")
    shutil.copy(good / "01.png", good / "copy <b>.png")
    picture(good / "grey.png", 50, mode="L")
    picture(good / "alpha.png", 51, mode="RGBA")
    picture(good / "large.png", 52, size=(90, 120))
    deep = np.random.default_rng(53).integers(90 * 257, 130 * 257, (64, 64)).astype(np.uint16)
    Image.fromarray(deep).save(good / "deep.png")
    photo(good / "photo.jpg", 54)
    done = run("inspect", folder, "--out", base / "bericht", "--alpha", "0.2", "--fdr", "0.5", *TINY)
    assert done.stdout.strip() == str(base / "bericht" / "report.html")
    for said in ("19 normal images", "notes.png (not an image)", "half.png", "Threshold"):
        assert said in done.stderr
    return base / "bericht"


# --------------------------------------------------------------------------------------------------- as a subprocess


def test_help_needs_nothing_and_shows_examples() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"]["usf"] == "usf.cli:main"
    script = "import sys, usf.cli; assert not {'torch', 'anomalib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert "exit codes" in run("--help").stdout
    for name in ("inspect", "score", "benchmark"):
        said = run(name, "--help").stdout
        for part in ("examples", f"usf {name} ", "exit codes", "130", "143"):
            assert part in said, part


def test_the_notebook_shows_the_same_report(tmp_path: Path) -> None:
    folder = parts(tmp_path / "my parts", normal=6)
    source = ROOT / "book" / "runs" / "inspect.md"
    notebook, done = tmp_path / "inspect.ipynb", tmp_path / "report.ipynb"
    convert = [sys.executable, "-m", "jupytext", "--quiet", "--to", "notebook", "--output", str(notebook), str(source)]
    subprocess.run(convert, check=True)
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(done)]
    for name, value in {"images": folder.name, "out": "r", "weights": "random", "profile": "smoke"}.items():
        papermill += ["-p", name, value]
    finished = subprocess.run(papermill, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    cells = json.loads(done.read_text("utf8"))["cells"]
    shown = "".join("".join(o["data"].get("text/html", "")) for c in cells for o in c.get("outputs", []) if "data" in o)
    assert "my parts" in shown
    assert "6 normal images" in shown
    assert shown in (tmp_path / "r" / "report.html").read_text("utf8")


def test_missing_folder_and_wrong_options_end_with_2(tmp_path: Path) -> None:
    said = run("inspect", tmp_path / "nowhere", "--out", tmp_path / "r", code=2).stderr
    assert "nowhere does not exist" in said
    (tmp_path / "empty folder").mkdir()
    said = run("inspect", tmp_path / "empty folder", "--out", tmp_path / "r", code=2).stderr
    assert "empty folder holds no images" in said
    (tmp_path / "empty folder" / "notes.png").write_text("not an image")
    said = run("inspect", tmp_path / "empty folder", "--out", tmp_path / "r", code=2).stderr
    assert "notes.png: not an image" in said
    assert "does not exist" in run("score", tmp_path / "model", tmp_path, "--out", tmp_path / "s.csv", code=2).stderr
    run("inspect", tmp_path, code=2)  # without --out
    run("nothing", code=2)
    assert not (tmp_path / "r").exists()


def test_a_saved_model_scores_in_another_process(inspected: Path, tmp_path: Path) -> None:
    images = inspected.parent / "gute teile" / "test"
    out = tmp_path / "scores.csv"
    done = run("score", inspected / "model", images, "--out", out, "--heatmaps", tmp_path / "maps", "--quiet")
    assert "4 images" in done.stderr
    rows = list(csv.DictReader(out.open()))
    assert [row["image"] for row in rows] == ["bad0.png", "bad1.png", "ok0.png", "ok1.png"]
    scores = {row["image"]: float(row["score"]) for row in rows}
    assert min(scores["bad0.png"], scores["bad1.png"]) > max(scores["ok0.png"], scores["ok1.png"])
    assert [row["alarm"] for row in rows][:2] == ["1", "1"]
    assert all(0 < float(row["p_value"]) <= 1 for row in rows)
    with Image.open(tmp_path / "maps" / "bad0.png.png") as heatmap:
        assert heatmap.size == (130, 64)
    # The page was made in another process: the same scores.
    page = (inspected / "report.html").read_text("utf8")
    assert f"score {scores['bad0.png']:.4g}" in page


def test_a_batch_is_flagged_as_a_whole(inspected: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not an image")
    images = [str(tmp_path / "broken.png"), str(inspected.parent / "gute teile" / "test")]
    for rate, wanted in (("0.5", 2), ("0.01", 0)):
        out = tmp_path / f"{rate}.csv"
        score = ["score", str(inspected / "model"), *images, "--out", str(out), "--fdr", rate, "--quiet"]
        assert cli.main(score) == 1, "one cannot be read"
        rows = list(csv.DictReader(out.open()))
        assert [row["flagged"] for row in rows if row["error"]] == [""]
        read = [row for row in rows if not row["error"]]
        flagged = calibration.discoveries([float(row["p_value"]) for row in read], float(rate))
        assert [row["flagged"] for row in read] == [str(int(flag)) for flag in flagged]
        assert [row["flagged"] for row in read if row["image"].startswith("bad")] == [str(int(wanted > 0))] * 2
    assert cli.main([*score[:-2], "1.5"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png", "0.5.csv", "0.01.csv"}
    # Without a rate there is no such column; with one, what the page says is what the file says.
    page = (inspected / "report.html").read_text("utf8")
    flagged = calibration.discoveries([float(row["p_value"]) for row in read], 0.5)
    assert f"<b>{flagged.sum()} are flagged</b>" in page


# ----------------------------------------------------------------------------------- as a subprocess: what goes wrong


def test_output_on_a_read_only_disk(inspected: Path, tmp_path: Path) -> None:
    within = mounted(tmp_path / "disk", "ro")
    folder = parts(tmp_path / "p")
    said = run("inspect", folder, "--out", tmp_path / "disk" / "r", *TINY, code=1, within=within).stderr
    assert "Read-only file system (choose another place" in said
    score = ("score", inspected / "model", folder, "--out", tmp_path / "disk" / "s.csv", "--quiet")
    assert "Read-only file system (choose another place" in run(*score, code=1, within=within).stderr


def test_a_disk_without_room(inspected: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    within = mounted(disk, "size=1m")
    said = run("inspect", parts(tmp_path / "p"), "--out", disk / "r", *TINY, code=1, within=within).stderr
    assert "make room" in said
    # Room for the first heatmap, and not for all of them. What is left on the disk is asked before it is gone.
    within = mounted(disk, "size=64k", "echo old > s.csv")
    left = "import os, subprocess, sys; code = subprocess.run(sys.argv[2:]).returncode; os.chdir(sys.argv[1]); "
    left += 'print(sorted(p for p in os.listdir() if p != "maps"), open("s.csv").read()); sys.exit(code)'
    images = inspected.parent / "gute teile"
    score = command("score", inspected / "model", images, "--out", disk / "s.csv", "--heatmaps", disk / "maps")
    asked = [*within, sys.executable, "-c", left, str(disk), *score, "--quiet"]
    done = subprocess.run(asked, capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    assert done.returncode == 1, done.stderr
    assert "the disk is full: make room and run again)" in done.stderr, "scores are not kept"
    assert "Traceback" not in done.stderr
    assert done.stdout == "['s.csv'] old\n\n"


def test_a_full_disk_is_no_signal(tmp_path: Path) -> None:
    """Memory that is mapped to a file with holes ends the process when the disk is full; here it is an error."""
    within = mounted(tmp_path / "disk", "size=1m")
    script = "import sys, pathlib; from usf.study.features import _allocate; "
    script += "_allocate((1000, 1000), pathlib.Path(sys.argv[1]), 0)[:] = 1"
    allocate = [*within, sys.executable, "-c", script, str(tmp_path / "disk")]
    done = subprocess.run(allocate, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


# An epoch takes a moment at least: a busy machine may not look in time at one that takes none.
SLOWLY = """
import runpy, time
from usf import inspection

write = inspection.atomic_write

def slow(*arguments):
    write(*arguments)
    time.sleep(0.05)

inspection.atomic_write = slow
runpy.run_module("usf", run_name="__main__", alter_sys=True)
"""


def test_killed_and_interrupted_it_goes_on(tmp_path: Path) -> None:
    folder, out = parts(tmp_path / "p"), tmp_path / "r"
    arguments = ["inspect", str(folder), "--out", str(out), "--alpha", "0.2", *TINY, "--steps", "300"]
    seen = 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        slow = [sys.executable, "-c", SLOWLY, *arguments]
        with subprocess.Popen(slow, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 300  # its start alone can take two minutes beside other work
            epochs = 0
            while epochs <= seen and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
                for path in (out / "state").glob("flow-*.safetensors"):
                    epochs = len(_losses(path))
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert epochs > seen
        assert not (out / "model").exists()
        seen = epochs
    assert seen < 300
    assert cli.main(arguments) == 0
    (path,) = (out / "state").glob("flow-*.safetensors")
    assert len(_losses(path)) == 300
    assert {path.name for path in out.iterdir()} == {"model", "report.html", "state"}


def _losses(checkpoint: Path) -> list[float]:
    with safe_open(checkpoint, "pt") as stored:
        return list(json.loads(stored.metadata()["usf"])["losses"])


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    folder, out = parts(tmp_path / "p"), tmp_path / "r"
    (out / "state").mkdir(parents=True)
    with inspection._alone(out / "state"):
        said = run("inspect", folder, "--out", out, "--alpha", "0.2", *TINY, code=1).stderr
    assert "is being written by another `usf inspect`: wait for it, or choose another --out" in said
    assert {path.name for path in (out / "state").iterdir()} <= {"lock"}
    with inspection._alone(out / "state"):
        pass


# ------------------------------------------------------------------------------------------------------- the report


def test_report_names_what_was_found_and_stands_alone(inspected: Path) -> None:
    page = (inspected / "report.html").read_text("utf8")
    for said in ("notes.png", "half.png", "list.txt", "copy &lt;b&gt;.png", "64 x 64", "120 x 90", "grey, 16 bit",
                 "random weights", "19 normal images", "false-alarm rate promised", "usf score", "80 x 64",
                 "1, as their EXIF says", "false-discovery rate", "The law is not refuted"):  # fmt: skip
        assert said in page, said
    assert "copy <b>.png" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing from elsewhere"
    assert "<script" not in page
    assert len(re.findall(r"<picture><source[^>]*><img[^>]*></picture>", page)) == 3, "charts, for wide and narrow"
    assert "prefers-color-scheme:dark" in page
    assert page.count("data:image/jpeg") >= 2 * (4 + 4)
    assert len(page) < 2_500_000


def test_model_folder_says_what_it_is(inspected: Path) -> None:
    model = inspected / "model"
    assert {p.name for p in model.iterdir()} == {
        "model.safetensors", "settings.json", "calibration.json", "README.md", "data.csv",
    }  # fmt: skip
    card = (model / "README.md").read_text()
    assert "What the threshold promises" in card
    rows = list(csv.DictReader((model / "data.csv").open(encoding="utf8")))
    assert len(rows) == 19 + 4
    assert {row["part"] for row in rows} == {"training", "calibration", "test"}
    known = json.loads((model / "calibration.json").read_text())
    assert len(known["normals"]) == sum(row["part"] == "calibration" for row in rows) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "settings.json", "calibration.json", "data.csv", "README.md"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_tampered_model_is_refused_by_name(
    inspected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inspected / "model", model)
    if how == "missing":
        (model / name).unlink()
    else:
        data = bytearray((model / name).read_bytes())
        data[len(data) // 2] ^= 1
        (model / name).write_bytes(bytes(data))
    assert cli.main(["score", str(model), str(inspected.parent), "--out", str(tmp_path / "s.csv"), "--quiet"]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


def test_a_model_that_agrees_with_itself_must_still_fit(inspected: Path, tmp_path: Path) -> None:
    """Somebody wrote all hashes anew: what does not fit is refused, and nothing is executed."""
    from usf import deploy

    model = tmp_path / "model"
    shutil.copytree(inspected / "model", model)
    settings = json.loads((model / "settings.json").read_text())
    for change, named in (
        ({"size": 80}, "does not fit"),
        ({"size": 10**9}, "no valid size"),
        ({"options": {**settings["options"], "coupling": "__import__"}}, "coupling"),
        ({"sha256": {**settings["sha256"], "../../x": "0"}}, "no valid sha256"),
        ({"detector": "os.system"}, "no valid detector"),
    ):
        raw = json.dumps(settings | change).encode()
        (model / "settings.json").write_bytes(raw)
        known = deploy.Calibration.load(inspected / "model" / "calibration.json")
        deploy.dataclasses.replace(known, model=deploy._sha256(raw)).save(model / "calibration.json")
        with pytest.raises(deploy.ModelFolderError, match=named):
            deploy.load(model)


def test_a_pickle_is_not_opened(inspected: Path, tmp_path: Path) -> None:
    from usf import deploy

    settings = json.loads((inspected / "model" / "settings.json").read_text())
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(deploy.ModelFolderError, match="not a safetensors file"):
        deploy._models(Path("model.safetensors"), (tmp_path / "x.pt").read_bytes(), settings)


def test_unreadable_images_have_a_line_and_the_command_says_so(inspected: Path, tmp_path: Path) -> None:
    good = picture(tmp_path / "in" / "a.png", 1)
    (tmp_path / "in" / "b.png").write_text("no image")
    out = tmp_path / "s.csv"
    assert cli.main(["score", str(inspected / "model"), str(good.parent), "--out", str(out), "--quiet"]) == 1
    rows = list(csv.DictReader(out.open()))
    assert [(row["image"], row["score"] != "", row["error"]) for row in rows] == [
        ("a.png", True, ""),
        ("b.png", False, "not an image"),
    ]


def test_images_of_the_same_name_keep_their_own_row_and_heatmap(inspected: Path, tmp_path: Path) -> None:
    plain = picture(tmp_path / "day 1" / "x.png", 1)
    other = picture(tmp_path / "day 2" / "x.png", 2, defect=True)
    picture(tmp_path / "day 2" / "deep" / "y.png", 3)
    picture(tmp_path / "day 2" / ".thumbs" / "y.png", 4)  # as usf inspect: hidden ones are not looked at
    out, maps = tmp_path / "s.csv", tmp_path / "maps"
    score = ["score", str(inspected / "model"), str(plain.parent), str(other.parent), str(other), "--out", str(out)]
    assert cli.main([*score, "--heatmaps", str(maps), "--quiet"]) == 0
    rows = {row["image"]: float(row["score"]) for row in csv.DictReader(out.open())}
    assert list(rows) == ["day 1/x.png", "day 2/deep/y.png", "day 2/x.png"]
    assert rows["day 2/x.png"] > rows["day 1/x.png"]
    assert sorted(p.relative_to(maps).as_posix() for p in maps.rglob("*.png")) == [f"{name}.png" for name in rows]
    # Without a second one the name is the shorter one, as before.
    assert cli._to_score([other.parent], None) == {
        other.parent / "deep" / "y.png": "deep/y.png",
        other: "x.png",
    }


def test_heatmaps_of_an_earlier_run_are_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "today" / "a.png", 1)
    picture(tmp_path / "today" / "maps" / "a.png.png", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "today")
    for images in ("today", tmp_path / "today", "link"):
        for maps in ("today/maps", tmp_path / "today" / "maps", "today/../today/maps", "link/maps"):
            assert list(cli._to_score([Path(images)], Path(maps)).values()) == ["a.png"], (images, maps)
    with pytest.raises(ValueError, match="choose a folder beside the images"):
        cli._to_score([Path("today")], tmp_path)
    (tmp_path / "model").mkdir()
    assert cli.main(["score", "model", "today", "--out", "s.csv", "--heatmaps", str(tmp_path / "today")]) == 2
    assert "choose a folder beside the images" in capsys.readouterr().err


def test_threads_wait_asleep(tmp_path: Path) -> None:
    """On a busy machine threads that wait awake took four times the processor time of the work, and more."""
    if sys.platform != "linux":
        pytest.skip("asks GNU's OpenMP")
    tell = {key: value for key, value in ENVIRONMENT.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    tell["OMP_DISPLAY_ENV"] = "verbose"
    for given, turns in ((None, "0"), ("ACTIVE", "[1-9][0-9]+")):  # the reader's own choice stands
        chosen = tell if given is None else tell | {"OMP_WAIT_POLICY": given}
        done = subprocess.run(
            command("inspect", tmp_path, "--out", tmp_path / "r"), capture_output=True, text=True, env=chosen
        )
        assert done.returncode == 2
        if "GOMP_SPINCOUNT" not in done.stderr:
            pytest.skip("this torch has another OpenMP")
        assert re.search(f"GOMP_SPINCOUNT = '{turns}'", done.stderr), done.stderr


def test_the_extra_for_onnx_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts(tmp_path / "p")
    monkeypatch.setattr(inspection.importlib.util, "find_spec", lambda name: None)
    assert inspect(folder, tmp_path / "r", "--onnx") == 2
    said = capsys.readouterr().err
    assert "onnxscript, of the extra 'export': pip install 'usf[export]'" in said
    assert not (tmp_path / "r").exists()
    Options()


def test_scores_do_not_depend_on_the_batch(inspected: Path) -> None:
    from usf import deploy

    model = deploy.load(inspected / "model")
    files = sorted((inspected.parent / "gute teile" / "test").iterdir())
    one, many = (list(deploy.score_files(model, files, batch_size=size, progress=False)) for size in (1, 8))
    assert [item.score for item in one] == pytest.approx([item.score for item in many], rel=1e-5)
    assert [item.alarm for item in one] == [item.score > model.threshold for item in one]


def test_memory_does_not_grow_with_the_number_of_images(inspected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are read when their batch is due, and maps are let go of: a folder of any size goes through."""
    from usf import deploy

    opened = 0
    real = deploy.load_images

    def counted(files: Sequence[Path], size: int) -> torch.Tensor:
        nonlocal opened
        opened += len(files)
        return real(files, size)

    monkeypatch.setattr(deploy, "load_images", counted)
    model = deploy.load(inspected / "model")
    file = inspected.parent / "gute teile" / "good" / "00.png"
    maps: list[weakref.ref[Any]] = []
    scored = deploy.score_files(model, [file] * 100, batch_size=4, progress=False)
    for number, item in enumerate(scored, 1):
        assert opened <= number + 3, "read ahead of its batch"
        maps.append(weakref.ref(item.map))
        del item
        assert sum(one() is not None for one in maps) <= 4, "maps are kept"
    assert number == opened == 100


# ------------------------------------------------------------------------------------------------ folders and plans


def test_empty_and_hopeless_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageFolderError, match="holds no images"):
        survey(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ImageFolderError, match=r"can be read \(a.png: not an image\)"):
        survey(tmp_path)
    with pytest.raises(ImageFolderError, match="is a file"):
        survey(tmp_path / "a.png")
    picture(tmp_path / "b.png", 0)
    assert cli.main(["inspect", str(tmp_path), "--out", str(tmp_path / "r"), *TINY]) == 2
    assert "too few" in capsys.readouterr().err


def test_layouts(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for i in range(3):
        picture(flat / f"{i}.png", i)
    picture(flat / ".thumbs" / "x.png", 9)
    found = survey(flat)
    assert (len(found.normals), len(found.test), found.labelled) == (3, 0, False)

    mvtec = tmp_path / "mvtec"
    for i in range(3):
        picture(mvtec / "train" / "good" / f"{i}.png", i)
    picture(mvtec / "test" / "good" / "0.png", 5)
    picture(mvtec / "test" / "scratch" / "0.png", 6)
    shutil.copy(mvtec / "train" / "good" / "1.png", mvtec / "test" / "good" / "1.png")
    assert survey(mvtec).labelled
    assert not survey(mvtec).masked
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:9, :9] = 255
    (mvtec / "ground_truth" / "scratch").mkdir(parents=True)
    Image.fromarray(mask).save(mvtec / "ground_truth" / "scratch" / "0_mask.png")
    found = survey(mvtec)
    assert found.masked
    assert found.leaked == ("test/good/1.png",)

    other = parts(tmp_path / "mixed", 3, 1)
    found = survey(other / "good", other / "test")
    assert [part.label for part in found.test] == [None, None]


def test_what_is_not_known_to_be_normal_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/ok", "train/Good", "ok", "normal"):
        folder = tmp_path / name.replace("/", "-")
        picture(folder / name / "0.png", 0)
        picture(folder / name / "line 2" / "0.png", 1)
        picture(folder / "test" / "nok" / "0.png", 2)
        found = survey(folder)
        assert [part.name for part in found.normals] == [f"{name}/0.png", f"{name}/line 2/0.png"]
        assert (len(found.test), found.unused) == (1, ())

    # Beside a folder of good parts, and where train itself would be taken.
    bad = tmp_path / "train-ok" / "train" / "nok"
    picture(bad / "0.png", 3)
    picture(tmp_path / "plain" / "train" / "0.png", 4)
    picture(tmp_path / "plain" / "train" / "session 1" / "0.png", 5)
    for folder, named, remedy in (
        ("train-ok", "train/nok", "into train/ok, and others into test/nok"),
        ("plain", "train/session 1", "into train/good, and others into test/session 1"),
    ):
        assert cli.main(["inspect", str(tmp_path / folder), "--out", str(tmp_path / "r"), *TINY]) == 2
        said = capsys.readouterr().err
        assert f"has images in {named}, and nobody has said that they are normal" in said
        assert remedy in said
    assert not (tmp_path / "r").exists()
    # Folders without images say nothing.
    shutil.rmtree(tmp_path / "plain" / "train" / "session 1")
    (tmp_path / "plain" / "train" / "notes").mkdir()
    (tmp_path / "plain" / "train" / "notes" / "a.txt").write_text("nothing to see")
    assert len(survey(tmp_path / "plain").normals) == 1


def test_images_in_other_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat"
    for i in range(3):
        picture(flat / f"{i}.png", i)
    picture(flat / "nok" / "a.png", 5)
    picture(flat / "old" / "nok" / "b.png", 6)
    picture(flat / ".thumbs" / "x.png", 7)
    picture(flat / "test" / "scratch" / "0.png", 8)
    picture(flat / "ground_truth" / "scratch" / "0.png", 9)
    found = survey(flat)
    assert found.unused == ("nok/a.png", "old/nok/b.png")
    assert "2 in other folders not used" in found.describe()
    assert (found.duplicates, found.leaked) == ((), ())
    from usf import report

    page = report._found(SimpleNamespace(survey=found))  # type: ignore[arg-type]
    assert "neither trained on nor tried out: nok/a.png; old/nok/b.png" in page
    # Said before the work: here the folder is refused afterwards, for it has too few images.
    for i in range(3, 6):
        picture(flat / f"{i}.png", i)
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect", str(flat), "--out", str(tmp_path / "file" / "r"), *TINY]) == 1
    said = capsys.readouterr().err
    assert "in a folder that is not used: nok/a.png\nin a folder that is not used: old/nok/b.png\n" in said


def test_what_is_held_out_follows_from_the_number_of_images() -> None:
    many = plan(100, Options(alpha=0.05))
    assert len(many.folds) == 1
    assert len(many.folds[0]) == 25
    few = plan(28, Options(alpha=0.05))
    assert sorted(i for fold in few.folds for i in fold) == list(range(28))
    assert len(few.folds) == 4
    fewer = plan(10, Options(alpha=0.05))
    assert len(fewer.folds) == 1
    assert fewer.alpha == pytest.approx(0.2)
    assert "too few" in fewer.notes[0]
    sure = plan(40, Options(alpha=0.05, confidence=0.95))
    assert normals_needed(sure.alpha, 0.95) <= len(sure.folds[0]) == 16
    with pytest.raises(CalibrationError, match="Collect 48 normal images"):
        plan(28, Options(alpha=0.05, calibration="split"))
    with pytest.raises(CalibrationError, match="too few"):
        plan(10, Options(alpha=0.05, calibration="cross"))
    assert plan(100, Options(seed=1)) != many


def test_sixteen_bits_and_alpha_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = load_images([tmp_path / "deep.png"], 64)[0]
    assert torch.allclose(deep[0], torch.from_numpy(ramp / 65535).float(), atol=1 / 200)
    assert torch.equal(deep[0], deep[2])
    picture(tmp_path / "rgb.png", 1)
    picture(tmp_path / "rgba.png", 1, mode="RGBA")
    assert torch.equal(load_images([tmp_path / "rgb.png"], 64), load_images([tmp_path / "rgba.png"], 64))


def test_photos_are_turned_upright_alike_everywhere(tmp_path: Path) -> None:
    """An image and the same one stored on its side, with EXIF to say so, are one image; in training and in scoring."""
    for suffix in ("png", "tif"):
        stored = photo(tmp_path / suffix / f"photo.{suffix}", 3)
        upright = picture(tmp_path / suffix / f"upright.{suffix}", 3, size=(64, 80))
        with Image.open(stored) as image:
            assert image.getexif()[0x0112] == 6, "the file is as a camera stores it"
        both = load_images([stored, upright], 48)
        assert torch.equal(both[0], both[1])
    good = parts(tmp_path / "p", 3)
    stored = photo(good / "good" / "photo.png", 3)
    found = survey(good)
    (part,) = (part for part in found.parts if part.turned)
    assert part.path == stored
    assert part.size == (80, 64)
    assert found.turned == 1
    # Another orientation is another image; one that is none of the eight is left alone.
    with Image.open(stored) as image:
        exif = image.getexif()
        exif[0x0112] = 9
        image.save(tmp_path / "odd.png", exif=exif)
    assert load_images([tmp_path / "odd.png"], 48).shape == (1, 3, 48, 48)
    assert not torch.equal(load_images([tmp_path / "odd.png"], 48), load_images([stored], 48))


def test_metrics_in_the_report_are_those_of_the_study(tmp_path: Path) -> None:
    """MVTec layout with masks: the built-in textures, recomputed from the saved model."""
    from usf import deploy
    from usf.study import textures
    from usf.study.images import load_masks, read
    from usf.study.metrics import auroc, average_precision, pixel_metrics

    root = textures.ensure(small=True)
    assert inspect(root, tmp_path / "r", "--steps", "6") == 0
    page = (tmp_path / "r" / "report.html").read_text("utf8").replace("\N{NO-BREAK SPACE}", " ")
    model = deploy.load(tmp_path / "r" / "model")
    folder = read(root)
    scored = list(deploy.score_files(model, [sample.path for sample in folder.test], progress=False))
    labels, scores = folder.labels, np.array([item.score for item in scored])
    alarms = np.array([item.alarm for item in scored])
    pixels = pixel_metrics(load_masks(folder.test, 64), np.stack([item.map for item in scored]))
    expected = {
        "image AUROC": auroc(labels, scores),
        "average precision": average_precision(labels, scores),
        "false-alarm rate on normal test images": alarms[~labels].mean(),
        "anomalous test images found": alarms[labels].mean(),
        "pixel AUROC": pixels.auroc,
        "AUPRO": pixels.aupro,
    }
    for name, value in expected.items():
        assert f'<tr><th>{name}</th><td class="r">{100 * value:.3g} %</td></tr>' in page, name
    assert len(set(expected.values())) > 3, "values that can be mistaken for each other"


def test_the_law_of_the_norm_is_judged_on_images_that_were_not_trained_on() -> None:
    rng = np.random.default_rng(0)
    dimension, folds = 500, 4

    def norms(count: int, spread: float) -> list[np.ndarray]:
        """Of latents that are independent, or that share a random scale."""
        squares = rng.chisquare(dimension, (folds, count)) * np.exp(spread * rng.normal(size=(folds, count)))
        return list(np.sqrt(0.7 * squares))

    holds = inspection.Norms(dimension, norms(60, 0), norms(30, 0))
    assert holds.square == pytest.approx(0.7, rel=0.02)
    assert not calibration.agreement(holds.pit()).refuted
    assert 350 < holds.effective < 700
    fails = inspection.Norms(dimension, norms(60, 0.3), norms(30, 0.3))
    assert calibration.agreement(fails.pit()).refuted
    assert fails.effective < 50
    assert len(fails.pit()) == len(fails.pit_fitted()) == folds * 30
    # What the page says follows from it.
    from usf import report

    said = [report._law(SimpleNamespace(norms=norms)) for norms in (holds, fails)]  # type: ignore[arg-type]
    assert ["Do not trust such p-values here" in text for text in said] == [False, True]
    assert ["The law is not refuted" in text for text in said] == [True, False]
    with pytest.raises(CalibrationError, match="fewer than two different norms"):
        inspection.Norms(2, [np.ones(3)], [np.ones(2)]).pit_fitted()


# ------------------------------------------------------------------------------------------- stopped, full, read-only


def inspect(folder: Path, out: Path, *more: str) -> int:
    return cli.main(["inspect", str(folder), "--out", str(out), "--alpha", "0.2", *TINY, *more])


def test_a_stopped_run_goes_on_and_ends_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts(tmp_path / "p")
    assert inspect(folder, tmp_path / "straight") == 0
    written: list[Path] = []
    real = inspection.atomic_write

    def stop_after_two(path: Path, content: Any) -> Path:
        real(path, content)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(inspection, "atomic_write", stop_after_two)
    assert inspect(folder, tmp_path / "stopped") == 130
    assert "goes on where it was" in capsys.readouterr().err
    assert len(list((tmp_path / "stopped" / "state").glob("flow-*.safetensors"))) == 1
    assert not (tmp_path / "stopped" / "model").exists()
    assert inspect(folder, tmp_path / "stopped") == 0
    assert len(written) == 3, "one of three epochs was left"
    same = [(tmp_path / where / "model" / "model.safetensors").read_bytes() for where in ("straight", "stopped")]
    assert same[0] == same[1]
    # A third time nothing is trained; a checkpoint that is damaged is not used.
    assert inspect(folder, tmp_path / "stopped") == 0
    assert len(written) == 3
    checkpoint = written[-1]
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    capsys.readouterr()
    assert inspect(folder, tmp_path / "stopped") == 0
    assert capsys.readouterr().err.count(f"{checkpoint.name} is damaged") == 1
    assert len(written) == 6
    assert (tmp_path / "stopped" / "model" / "model.safetensors").read_bytes() == same[0]


def test_the_time_that_it_took_has_all_legs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = parts(tmp_path / "p"), tmp_path / "r"
    real, now = inspection.atomic_write, [0.0]

    def slow(path: Path, content: Any) -> Path:
        now[0] += 1000
        if now[0] == 3000:
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(inspection, "atomic_write", slow)
    monkeypatch.setattr(inspection.time, "perf_counter", lambda clock=time.perf_counter: clock() + now[0])
    assert inspect(folder, out) == 130
    assert inspect(folder, out) == 0
    found = re.search(r"Made in (\d+) s", (out / "report.html").read_text("utf8"))
    assert found is not None
    # 2000 s of the first leg, after which it was killed in its last epoch, and 1000 s for this epoch in the second.
    assert 3000 <= int(found[1]) < 3600
    # Other trainings have another clock.
    assert inspection._Clock(out / "state" / "clock.json", "other", 0.0).earlier == 0


def test_a_full_disk_is_named_and_leaves_the_old_model(
    inspected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from usf import deploy

    folder = parts(tmp_path / "p")
    shutil.copytree(inspected / "model", tmp_path / "r" / "model")
    before = (tmp_path / "r" / "model" / "model.safetensors").read_bytes()
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(inspection.shutil, "disk_usage", lambda _: usage)
        assert inspect(folder, tmp_path / "r") == 1
    assert "make room" in capsys.readouterr().err

    def full(path: Path, content: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "atomic_write", full)
        assert inspect(folder, tmp_path / "r") == 1
    said = capsys.readouterr().err
    assert "the disk is full: make room and run again, what was done is kept" in said
    assert "Traceback" not in said
    assert (tmp_path / "r" / "model" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "r").glob(".model*")), "no half model is left"
    deploy.load(tmp_path / "r" / "model")


def test_interrupted_scores_leave_the_old_file(
    inspected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usf import deploy

    out = tmp_path / "s.csv"
    out.write_text("old")
    real = deploy.score_files

    def stop(*arguments: Any, **options: Any) -> Any:
        yield next(iter(real(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy, "score_files", stop)
    images = inspected.parent / "gute teile" / "test"
    assert cli.main(["score", str(inspected / "model"), str(images), "--out", str(out), "--quiet"]) == 130
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_output_that_cannot_be_written_is_found_before_the_work(
    inspected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts(tmp_path / "p")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(inspection, "_train_all", lambda *_: pytest.fail("trained"))
    assert inspect(folder, tmp_path / "file" / "r") == 1

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "r"))

    monkeypatch.setattr(inspection.tempfile, "NamedTemporaryFile", refuse)
    assert inspect(folder, tmp_path / "r") == 1
    assert "Permission denied (choose another place" in capsys.readouterr().err
    images = inspected.parent / "gute teile" / "test"
    assert cli.main(["score", str(inspected / "model"), str(images), "--out", str(tmp_path / "file" / "s")]) == 1


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), cli._Told()])
@pytest.mark.parametrize("after", [1, 2])
def test_the_old_model_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    """Interrupted after the old one was moved away, or while the new one is moved."""
    from usf import deploy

    old, new = tmp_path / "model", tmp_path / ".model-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "which").write_text(folder.name)
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == after == 2:
            raise error
        moved = real(self, target)
        if len(calls) == after:
            raise error
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(type(error)):
            deploy._replace(new, old)
    assert (old / "which").read_text() == "model"
    assert not deploy._old(old).exists()


def test_a_model_that_a_killed_run_had_moved_away_is_found_again(
    inspected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usf import deploy

    folder = parts(tmp_path / "p")
    # What SIGKILL leaves between the two steps.
    shutil.copytree(inspected / "model", tmp_path / "r" / ".model-old")
    shutil.copytree(inspected / "model", tmp_path / "r" / ".model-abc123")

    def full(path: Path, content: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "atomic_write", full)
        assert inspect(folder, tmp_path / "r") == 1
    deploy.load(tmp_path / "r" / "model")
    assert not list((tmp_path / "r").glob(".model*"))


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parts(tmp_path / "p")
    mine = picture(tmp_path / "r" / "model" / "mine.png", 1)
    assert inspect(folder, tmp_path / "r") == 1
    assert "no model folder" in capsys.readouterr().err
    assert mine.exists()


# -------------------------------------------------------------------------------------------- cross-conformal, ONNX


def test_cross_conformal_scores_and_their_onnx_agree(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from usf import deploy

    folder = parts(tmp_path / "p", 10, 1)
    assert inspect(folder, tmp_path / "r", "--calibration", "cross", "--folds", "2", "--onnx") == 0
    model = deploy.load(tmp_path / "r" / "model")
    assert len(model.folds) == 2
    assert "cross-conformal" in model.promise()
    # What is aimed at and what is proved, side by side.
    bound = calibration.cross_conformal_bound([5, 5], 0.2)
    assert model.guaranteed == bound > 0.4
    assert f"a rate of at most {100 * bound:.2g} %" in model.promise()
    page = (tmp_path / "r" / "report.html").read_text("utf8")
    assert f"<b>\N{LESS-THAN OR EQUAL TO} {100 * bound:.2g}\N{NO-BREAK SPACE}%</b><span>guaranteed" in page
    files = sorted((folder / "test").iterdir())
    scored = list(deploy.score_files(model, files, progress=False))
    for item in scored:
        assert item.alarm == (item.p <= 0.2) == (item.score > model.threshold)
    assert scored[0].alarm
    session = onnxruntime.InferenceSession(str(tmp_path / "r" / "model" / "model.onnx"))
    score, maps = session.run(None, {"images": load_images(files, 64).numpy()})
    assert score == pytest.approx([item.score for item in scored], rel=1e-4)
    assert maps.shape == (2, 1, 64, 64)
    larger = torch.rand(3, 3, 90, 130)
    with torch.inference_mode():
        expected = model.detector(larger)[0].numpy()
    assert session.run(["score"], {"images": larger.numpy()})[0] == pytest.approx(expected, rel=1e-4)


def test_combined_score_is_above_the_threshold_exactly_where_p_is_small() -> None:
    from usf import deploy

    rng = np.random.default_rng(0)
    detector = deploy.Detector.__new__(deploy.Detector)
    torch.nn.Module.__init__(detector)
    detector.flows = torch.nn.ModuleList([torch.nn.Identity()] * 3)
    folds = [rng.normal(size=n).astype(np.float32).astype(np.float64) for n in (7, 6, 8)]
    detector.register_buffer("known", torch.empty(0))
    detector.register_buffer("owner", torch.empty(0))
    model = deploy.Deployed.calibrated(detector, folds, 0.2)
    scores, p, alarms = model.judge(torch.from_numpy(rng.normal(0.8, 1, size=(500, 3))).float())
    assert 50 < alarms.sum() < 450
    np.testing.assert_array_equal(alarms, p <= 0.2)
    np.testing.assert_array_equal(alarms, scores > model.threshold)
