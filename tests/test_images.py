"""Reading folders of images, every way in which they are wrong, and features computed once."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from usf import paths
from usf.plots import images as figures
from usf.study import catalogue, images
from usf.study.catalogue import Counts, ImageFolderError
from usf.study.detection import FitHistory
from usf.study.images import datamodule, read, read_class


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny class: 3 training images, 2 good and 4 anomalous test images of two kinds, 20 x 24 pixels."""
    rng = np.random.default_rng(0)
    root = tmp_path / "widget"
    mask = np.zeros((20, 24))
    mask[5:9, 6:12] = 255
    for name in ("train/good", "test/good", "test/crack", "test/dent"):
        for index in range(3 if name == "train/good" else 2):
            save(root / name / f"{index:03d}.png", rng.integers(0, 256, (20, 24, 3)))
            if name in ("test/crack", "test/dent"):
                save(root / "ground_truth" / name[5:] / f"{index:03d}_mask.png", mask)
    return root


def test_reads_counts_masks_and_order(folder: Path) -> None:
    found = read(folder)
    assert found.name == "widget"
    assert found.defects == ("crack", "dent")
    assert found.has_masks
    assert found.manifest.counts == {"masks": 4, "test/crack": 2, "test/dent": 2, "test/good": 2, "train/good": 3}
    assert [sample.defect for sample in found.test] == ["good"] * 2 + ["crack"] * 2 + ["dent"] * 2
    assert found.labels.tolist() == [False] * 2 + [True] * 4
    assert "licence not stated" in found.describe()
    assert str(folder.parent) not in found.describe()
    assert read(folder.parent).root == found.root, "a folder with one class stands for the class"
    small = found.subset(train=1, per_kind=1)
    assert len(small.train) == 1
    assert [sample.defect for sample in small.test] == ["good", "crack", "dent"]


def test_manifest_depends_on_content_alone(folder: Path, tmp_path: Path) -> None:
    before = read(folder).manifest
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert read(moved).manifest == before
    with (moved / "train" / "good" / "000.png").open("ab") as file:
        file.write(b" ")
    assert read(moved).manifest.sha256 != before.sha256


def test_images_and_masks_are_resized_together(folder: Path) -> None:
    found = read(folder)
    pixels = images.load_images(found.train, 16)
    assert pixels.shape == (3, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    masks = images.load_masks(found.test, 16)
    assert masks.shape == (6, 16, 16)
    assert not masks[:2].any()
    assert masks[2:].any(axis=(1, 2)).all()
    assert masks[2].mean() == pytest.approx(24 / 480, rel=0.3)
    normal = images.normalise(torch.ones(1, 3, 2, 2))
    assert torch.allclose(normal[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (20, 24)).astype(np.uint8)).save(folder / "train" / "good" / "000.png")
    Image.fromarray(rng.integers(0, 255, (20, 24, 4)).astype(np.uint8)).save(folder / "train" / "good" / "001.png")
    assert images.load_images(read(folder).train, 16).shape == (3, 3, 16, 16)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no training images": (
        lambda root: shutil.rmtree(root / "train" / "good"),
        "train/good does not exist.*put the normal",
    ),
    "empty training folder": (
        lambda root: [path.unlink() for path in (root / "train" / "good").iterdir()],
        "train/good is empty",
    ),
    "training images of a defect": (lambda root: (root / "train" / "bad").mkdir(), "holds bad besides good"),
    "no test folder": (lambda root: shutil.rmtree(root / "test"), "test does not exist"),
    "no normal test image": (lambda root: shutil.rmtree(root / "test" / "good"), "no normal image"),
    "no anomalous test image": (
        lambda root: [shutil.rmtree(root / "test" / kind) for kind in ("crack", "dent")],
        "no anomalous image",
    ),
    "empty defect": (lambda root: [path.unlink() for path in (root / "test" / "dent").iterdir()], "dent is empty"),
    "truncated image": (
        lambda root: _truncate(root / "train" / "good" / "002.png"),
        "002.png cannot be decoded.*truncated",
    ),
    "truncated mask": (
        lambda root: _truncate(root / "ground_truth" / "dent" / "001_mask.png"),
        "001_mask.png cannot be decoded",
    ),
    "not an image": (
        lambda root: (root / "test" / "crack" / "000.png").write_text("hello"),
        "000.png cannot be decoded",
    ),
    "other file": (
        lambda root: (root / "test" / "crack" / "notes.txt").write_text("hello"),
        "notes.txt is not an image",
    ),
    "no mask": (
        lambda root: (root / "ground_truth" / "crack" / "001_mask.png").unlink(),
        r"crack/001.png has no mask: put it at .*001_mask.png",
    ),
    "mask of another size": (
        lambda root: save(root / "ground_truth" / "crack" / "001_mask.png", np.full((24, 20), 255)),
        "20x24 pixels, its image 24x20",
    ),
    "empty mask": (
        lambda root: save(root / "ground_truth" / "crack" / "001_mask.png", np.zeros((20, 24))),
        "marks no pixel",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_folders_are_refused_by_name(folder: Path, case: str) -> None:
    breaking, message = BROKEN[case]
    breaking(folder)
    with pytest.raises(ImageFolderError, match=message):
        read(folder)


def test_masks_are_optional_when_asked(folder: Path) -> None:
    shutil.rmtree(folder / "ground_truth")
    found = read(folder, masks=False)
    assert not found.has_masks
    with pytest.raises(ImageFolderError, match="has no mask"):
        images.load_masks(found.test, 16)


def test_wrong_paths(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ImageFolderError, match=r"nowhere does not exist.*MVTec layout"):
        read(tmp_path / "nowhere")
    with pytest.raises(ImageFolderError, match="is a file"):
        read(folder / "train" / "good" / "000.png")
    with pytest.raises(ImageFolderError, match="has no train/ folder"):
        read(folder / "test")
    shutil.copytree(folder, folder.parent / "gadget")
    with pytest.raises(ImageFolderError, match=r"2 classes.*gadget, widget"):
        read(folder.parent)


def test_find_prefers_what_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.find(folder).root == folder
    with pytest.raises(ImageFolderError):
        images.find(folder / "typo")
    monkeypatch.setenv("USF_SHARED", "")
    for nothing in (None, ""):
        found = images.find(nothing, small=True)
        assert found.name == "weave"
        assert "built-in" in found.source


def test_held_out_images_are_a_partition() -> None:
    files = [Path(f"{index}.png") for index in range(20)]
    kept, held = images.hold_out(files, 0.1, seed=3)
    assert len(held) == 2
    assert sorted(kept + held, key=lambda path: int(path.stem)) == files
    assert images.hold_out(files, 0.1, seed=3) == (kept, held)
    assert images.hold_out(files, 0.1, seed=4)[1] != held
    assert len(images.hold_out(files[:2], 0.01, seed=0)[1]) == 1
    with pytest.raises(ValueError, match="cannot hold out"):
        images.hold_out(files[:1], 0.5, seed=0)


@pytest.mark.skipif(paths.shared("images", "mvtec_ad_256", "bottle") is None, reason="no real images under ../shared")
def test_real_images_are_found_and_named() -> None:
    found = images.find()
    assert (found.name, len(found.train), len(found.test)) == ("bottle", 209, 83)
    assert "MVTec AD" in found.describe()
    assert "CC BY-NC-SA 4.0" in found.describe()


@pytest.mark.skipif(paths.shared("images", "mvtec_ad_256", "pill") is None, reason="no real images under ../shared")
def test_real_classes_are_complete_and_the_toy_is_a_dataset_of_its_own() -> None:
    root = paths.shared("images", "mvtec_ad_256")
    assert root is not None
    pill = read_class("mvtec", root, "pill")
    assert pill.counts == catalogue.MVTEC_AD.counts("pill") == Counts(267, 26, 141)
    assert pill.manifest == read(root / "pill").manifest
    toy = paths.shared("images", "hazelnut_toy_256", "hazelnut")
    assert toy is not None
    assert read(toy).counts == Counts(28, 6, 17), "not MVTec AD's hazelnut, which has 391 training images"


# --- known datasets ---------------------------------------------------------------------------------------------------


def test_catalogue_is_what_was_published() -> None:
    mvtec, visa = catalogue.MVTEC_AD.classes.values(), catalogue.VISA.classes.values()
    assert (len(mvtec), sum(c.train for c in mvtec), sum(c.good + c.bad for c in mvtec)) == (15, 3629, 1725)
    assert (len(visa), sum(c.train for c in visa), sum(c.good + c.bad for c in visa)) == (12, 8659, 2162)
    assert {c.bad for c in visa} == {100}


def test_catalogue_agrees_with_anomalib() -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from anomalib.data.datamodules.image import mvtecad
    from anomalib.data.datamodules.image import visa as stock

    assert set(catalogue.VISA.classes) == set(stock.VISA_CATEGORIES)
    for known, theirs in ((catalogue.MVTEC_AD, mvtecad.DOWNLOAD_INFO), (catalogue.VISA, stock.DOWNLOAD_INFO)):
        assert theirs.hashsum == known.sha256
        assert theirs.url.endswith(f"/{known.archive}")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both datasets with classes as small as the fixtures here."""
    sizes = {"MVTEC_AD": Counts(3, 2, 4), "VISA": Counts(3, 2, 2)}
    for name, counts in sizes.items():
        classes = MappingProxyType({"widget": counts, "gadget": counts})
        monkeypatch.setattr(catalogue, name, dataclasses.replace(getattr(catalogue, name), classes=classes))
    both = {known.key: known for known in (catalogue.MVTEC_AD, catalogue.VISA)}
    monkeypatch.setattr(catalogue, "DATASETS", MappingProxyType(both))


@pytest.fixture
def mvtec(folder: Path, tiny: None) -> Path:
    """A root of MVTec AD with one class, complete."""
    root = folder.parent / "MVTecAD"
    root.mkdir()
    shutil.move(folder, root / "widget")
    return root


@pytest.fixture
def visa(tmp_path: Path, tiny: None) -> Path:
    """VisA as published, with one class, 16 x 12 pixels; masks number the kind of defect."""
    rng = np.random.default_rng(0)
    root = tmp_path / "VisA"
    rows = []
    for split, label, count in (("train", "normal", 3), ("test", "normal", 2), ("test", "anomaly", 2)):
        for index in range(count):
            stem = f"{split}{index:03d}"
            image, mask = f"widget/Data/Images/{label.capitalize()}/{stem}.JPG", ""
            save(root / image, rng.integers(0, 256, (12, 16, 3)))
            if label == "anomaly":
                mask = f"widget/Data/Masks/Anomaly/{stem}.png"
                pixels = np.zeros((12, 16))
                pixels[2:5, 3:8] = 1 + index
                save(root / mask, pixels)
            rows.append(["widget", split, label, image, mask])
    rows.append(["gadget", "train", "normal", "gadget/Data/Images/Normal/000.JPG", ""])  # of no concern to the widget
    write_split(root, rows)
    return root


def write_split(root: Path, rows: list[list[str]], header: str = "object split label image mask") -> None:
    (root / "split_csv").mkdir(exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header.split(), *rows])


def read_split(root: Path) -> list[list[str]]:
    with (root / "split_csv" / "1cls.csv").open(newline="") as stream:
        return list(csv.reader(stream))[1:]


def test_published_visa_is_read_by_its_split(visa: Path) -> None:
    found = read_class("visa", visa, "widget")
    assert found.counts == Counts(3, 2, 2)
    assert found.name == "widget"
    assert found.defects == ("bad",)
    assert "VisA (Zou et al., 2022), CC BY 4.0" in found.describe()
    assert found.manifest.counts == {"train/good": 3, "test/good": 2, "test/bad": 2, "masks": 2}
    masks = images.load_masks(found.test, 12)
    assert masks[2:].any(axis=(1, 2)).all(), "a mask of ones is a mask"
    assert not masks[:2].any()


def test_visa_as_anomalib_leaves_it_is_the_same_class(visa: Path) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    published = read_class("visa", visa, "widget")
    rows = [row for row in read_split(visa) if row[0] == "widget"]
    for name, split, label, image, mask in rows:
        kind = "good" if label == "normal" else "bad"
        target = visa / "visa_pytorch" / name / split / kind / Path(image).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(visa / image, target)
        if mask:
            with Image.open(visa / mask) as pixels:
                marked = (np.asarray(pixels) > 0) * 255
            save(visa / "visa_pytorch" / name / "ground_truth" / "bad" / Path(mask).name, marked)
    prepared = read_class("visa", visa, "widget")
    assert prepared.root == visa / "visa_pytorch" / "widget"
    assert prepared.counts == published.counts
    assert np.array_equal(images.load_masks(prepared.test, 12), images.load_masks(published.test, 12))
    module = datamodule("visa", visa, "widget", train_batch_size=2, num_workers=0)
    module.setup()
    assert [Path(path).name for path in module.train_data.samples.image_path] == [path.name for path in prepared.train]


def _rewrite(change: Callable[[list[list[str]]], object]) -> Callable[[Path], object]:
    def breaking(root: Path) -> None:
        rows = read_split(root)
        change(rows)
        write_split(root, rows)

    return breaking


VISA_BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "listed image is missing": (
        lambda root: (root / "widget/Data/Images/Normal/train001.JPG").unlink(),
        r"train001.JPG is missing, which .*1cls.csv lists in line 3: unpack",
    ),
    "fewer rows": (_rewrite(lambda rows: rows.pop(0)), "holds 2 training, 2 normal.* VisA's widget has 3 training"),
    "no split file": (lambda root: (root / "split_csv/1cls.csv").unlink(), "has no class widget .it holds split_csv"),
    "other columns": (lambda root: write_split(root, [], "a b c d e"), "has no column image, label"),
    "anomalous training image": (_rewrite(lambda rows: rows[0].__setitem__(2, "anomaly")), "line 2: split and label"),
    "path outside": (_rewrite(lambda rows: rows[0].__setitem__(3, "../../x.JPG")), "line 2: ../../x.JPG is outside"),
    "truncated image": (
        lambda root: (root / "widget/Data/Images/Normal/test000.JPG").write_bytes(b"\xff\xd8\xff\xe0"),
        "test000.JPG cannot be decoded",
    ),
    "mask of another size": (
        lambda root: save(root / "widget/Data/Masks/Anomaly/test000.png", np.ones((16, 12))),
        "test000.png has 12x16 pixels, its image 16x12",
    ),
    "empty mask": (
        lambda root: save(root / "widget/Data/Masks/Anomaly/test000.png", np.zeros((12, 16))),
        "marks no pixel: .* above 0",
    ),
    "no mask": (_rewrite(lambda rows: rows[5].__setitem__(4, "")), "test000.JPG has no mask"),
}


@pytest.mark.parametrize("case", list(VISA_BROKEN))
def test_broken_visa_is_refused_by_name(visa: Path, case: str) -> None:
    breaking, message = VISA_BROKEN[case]
    breaking(visa)
    with pytest.raises(ImageFolderError, match=message):
        read_class("visa", visa, "widget")


def test_partial_class_is_refused_however_it_is_reached(mvtec: Path) -> None:
    assert read_class("mvtec", mvtec, "widget").counts == Counts(3, 2, 4)
    assert "MVTec AD" in read(mvtec / "widget").describe()
    (mvtec / "widget" / "train" / "good" / "002.png").unlink()
    message = "holds 2 training, .* MVTec AD's widget has 3 training.* not complete.*unpack the archive again"
    for reach in (
        lambda: read_class("mvtec", mvtec, "widget"),
        lambda: read(mvtec / "widget"),
        lambda: datamodule("mvtec", mvtec, "widget"),
    ):
        with pytest.raises(ImageFolderError, match=message):
            reach()
    own = mvtec.parent / "mine"
    shutil.copytree(mvtec / "widget", own / "widget")
    assert read(own / "widget").counts.train == 2, "a class of the reader's may have any number"


def test_unknown_names_suggest_the_nearest(mvtec: Path) -> None:
    with pytest.raises(ImageFolderError, match="MVTec AD has no class 'widgte': did you mean 'widget'"):
        read_class("mvtec", mvtec, "widgte")
    with pytest.raises(ImageFolderError, match="unknown dataset 'mvtek': did you mean 'mvtec'"):
        read_class("mvtek", mvtec, "widget")
    with pytest.raises(ImageFolderError, match=r"has no class gadget .it holds widget.: .*download=True"):
        read_class("mvtec", mvtec, "gadget")
    with pytest.raises(ImageFolderError, match="is not a folder"):
        read_class("mvtec", mvtec / "nowhere", "widget")


def test_archive_with_a_wrong_hash_is_refused_every_time(tmp_path: Path, tiny: None) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    archive = tmp_path / catalogue.VISA.archive
    archive.write_bytes(b"half an archive")
    for _ in range(2):  # anomalib unpacks it the second time
        with pytest.raises(ImageFolderError, match=r"VisA_20220922.tar has SHA-256 \w{64}, VisA has 2eb8.*delete"):
            datamodule("visa", tmp_path, "widget", download=True)
    assert archive.exists()


def test_datamodule_is_anomalibs_after_the_checks(mvtec: Path) -> None:
    pytest.importorskip("anomalib", reason="needs the detectors extra")
    from anomalib.data import MVTecAD

    module = datamodule("mvtec", mvtec, "widget", train_batch_size=2, num_workers=0)
    assert isinstance(module, MVTecAD)
    module.setup()
    assert len(module.train_data) == 3
    (mvtec / "widget" / "test" / "dent" / "001.png").write_text("hello")
    with pytest.raises(ImageFolderError, match=r"001.png cannot be decoded"):
        datamodule("mvtec", mvtec, "widget")


# --- features ---------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A backbone of two levels that is no slower than it must be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        level = self.first(x)
        return [level, self.second(level)]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_show_every_image_map_and_kind() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 8, 8), dtype=bool)
    masks[1:, 2:4, 2:6] = True
    maps = {name: rng.random((3, 8, 8), dtype=np.float32) + 0.1 for name in ("affine", "USF")}
    figure = figures.anomaly_maps(torch.rand(3, 3, 8, 8), masks, maps, ["good", "crack", "dent"])
    drawn = [axis for axis in figure.axes if axis.get_visible() and axis.images]
    assert len(drawn) == 4 * 3
    assert [axis.get_title() for axis in drawn[:3]] == ["good", "crack", "dent"]
    with pytest.raises(ValueError, match="same length"):
        figures.anomaly_maps(torch.rand(3, 3, 8, 8), masks[:2], maps, ["good", "crack", "dent"])

    history = FitHistory("fixed", "", losses=[40.0, 20.0], train=[2.0, 1.0], val=[1.5, 1.2], best_epoch=2)
    curves = figures.training_curves({"affine": history, "USF": history}, {"affine": "non-usf", "USF": "usf"})
    assert len(curves.axes[0].lines) == 4

    scores = {"USF": np.array([1, 2, 3, 4], dtype=np.float32)}
    strips = figures.scores_by_kind(scores, ["good", "good", "dent", "crack"])
    assert [label.get_text() for label in strips.axes[0].get_yticklabels()] == ["good", "crack", "dent"]
    assert strips.axes[0].lines[-1].get_xdata()[0] == 2
    plt.close("all")
