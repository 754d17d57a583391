"""The command line: ``usf inspect``, ``usf score``, ``usf benchmark``.

Exit codes: 0 done; 1 something failed on the way (disk full, unreadable images among those to score, a training that
did not work); 2 a wrong command, folder or file, before any work; 130 stopped with Ctrl-C, 143 told to end.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

NAMED = 20
"""Names that are printed before the rest is a number."""

CODES = """\
exit codes:
  0    done
  1    something failed on the way, and the message says what
  2    a wrong command, folder or file; nothing was done
  130  stopped with Ctrl-C; the same command goes on where it was
  143  told to end
"""

INSPECT = """\
examples:
  usf inspect my_parts --out report                  images of good parts, nothing else
  usf inspect my_parts --test line_3 --out report    and a folder of images that nobody has labelled
  usf inspect hazelnut --out report --onnx           MVTec layout: also AUROC and AUPRO; also write model.onnx
  usf inspect my_parts --out report --alpha 0.01 --confidence 0.95
  usf inspect my_parts --test line_3 --out report --fdr 0.05

what FOLDER may hold:
  images                          normal ones
  good/ and test/                 normal ones, and others that nobody has labelled
  train/good/ test/ ground_truth/ MVTec layout
(ok and normal are good's other names; images in other folders are not used, and named)

Photos are turned upright as their EXIF says, here and by usf score. Run it again with the same arguments after Ctrl-C
or a crash: it goes on where it was. Two runs into one DIR at a time are refused.

"""

SCORE = """\
examples:
  usf score report/model new_images --out scores.csv
  usf score report/model a.png b.png --out scores.csv --heatmaps maps
  usf score report/model today --out today.csv --fdr 0.05

scores.csv has one line an image: its name below the folder given (below the common folder of all images, where two
would have the same name), its score, the share of normal parts that would score as high (p_value), and whether
it raises an alarm by itself. With --fdr Q all images are also judged as one batch: of those with flagged = 1, at most
the share Q are good ones, on average. An image that cannot be read has a line that says so, and the command ends
with 1. Memory does not grow with the number of images.

"""

BENCHMARK = """\
usf benchmark mvtec bottle fastflow --variants affine additive-lu --seeds 0-4 --profile book
is python -m usf.study.benchmark with the same arguments; usf benchmark --help lists them.
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="usf", description="Find unusual parts with uniformly scaling flows.", epilog=CODES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser(
        "inspect", help="train a detector on a folder of good parts and write a report about it",
        description="Train a detector on a folder of good parts, set its threshold, and write a report about both.",
        epilog=INSPECT + CODES, formatter_class=raw,
    )  # fmt: skip
    one.add_argument("folder", type=Path, metavar="FOLDER", help="images, see below")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="for report.html and model/")
    one.add_argument("--test", type=Path, metavar="DIR", help="images to try the detector on; by default FOLDER/test")
    one.add_argument("--alpha", type=float, default=0.05, help="wanted false-alarm rate (default: %(default)s)")
    one.add_argument("--confidence", type=float, metavar="C", help="keep the rate with this probability, e.g. 0.95")
    one.add_argument("--calibration", choices=("auto", "split", "cross"), default="auto",
                     help="hold out some normal images (split), each once (cross), or whichever suits")  # fmt: skip
    one.add_argument("--folds", type=int, default=4, help="of --calibration cross (default: %(default)s)")
    one.add_argument("--fdr", type=float, default=0.1, metavar="Q",
                     help="wanted share of good parts among those a batch flags (default: %(default)s)")  # fmt: skip
    one.add_argument("--size", type=int, default=256, help="pixels inside the detector (default: %(default)s)")
    one.add_argument("--backbone", choices=("resnet18", "wide_resnet50_2"), default="resnet18")
    one.add_argument("--weights", metavar="W", help="of the backbone: a safetensors file, hub or random")
    one.add_argument("--steps", type=int, default=40, help="of training, at least (default: %(default)s)")
    one.add_argument("--batch-size", type=int, default=8, help="images a step (default: %(default)s)")
    one.add_argument("--flow-steps", type=int, default=8, help="depth of the flows (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--onnx", action="store_true", help="also write model/model.onnx")
    _common(one)

    two = commands.add_parser(
        "score", help="score images with a saved detector",
        description="Score images with a detector that usf inspect saved.",
        epilog=SCORE + CODES, formatter_class=raw,
    )  # fmt: skip
    two.add_argument("model", type=Path, metavar="MODEL", help="the model folder")
    two.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="folders, with all below them, or files")
    two.add_argument("--out", type=Path, required=True, metavar="CSV", help="file for the scores")
    two.add_argument("--heatmaps", type=Path, metavar="DIR", help="also write each image with its heatmap here")
    two.add_argument("--fdr", type=float, metavar="Q", help="also judge all images as one batch, at this rate")
    two.add_argument("--batch-size", type=int, default=8, help="images at a time (default: %(default)s)")
    _common(two)

    commands.add_parser("benchmark", help="train a cell of the benchmark", epilog=BENCHMARK, formatter_class=raw,
                        add_help=False)  # fmt: skip
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor (default: all)")
    parser.add_argument("--quiet", action="store_true", help="no bars")


class _Told(BaseException):
    """SIGTERM."""


def _stop(number: int, frame: object) -> None:
    del number, frame
    raise _Told


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see the module."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["benchmark"]:
        from usf.study import benchmark

        try:
            return benchmark.main(given[1:])
        except KeyboardInterrupt:
            _say("\nusf: stopped; the same command goes on where it was")
            return 130
    chosen = _parser().parse_args(given)
    if "torch" not in sys.modules:
        # Threads that wait awake take several times the processor time of the work where other programs want the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = None
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        with warnings.catch_warnings():
            # anomalib's own imports warn of what anomalib itself deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            return _inspect(chosen) if chosen.command == "inspect" else _score(chosen)
    except KeyboardInterrupt:
        again = "; the same command goes on where it was" if chosen.command == "inspect" else ""
        _say(f"\nusf: stopped{again}")
        return 130
    except _Told:
        _say("\nusf: told to end")
        return 143
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _error(error: BaseException, code: int, kept: bool = False) -> int:
    """Say what went wrong; ``kept`` where the same command would go on where it was."""
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        again = "make room and run again" + (", what was done is kept" if kept else "")
        hint = {
            errno.ENOSPC: f"the disk is full: {again}",
            errno.EDQUOT: f"the quota is used up: {again}",
            errno.EFBIG: "larger than this system or its limits allow: choose another place, or raise the limit",
            errno.EROFS: "choose another place for the output",
            errno.EACCES: "choose another place, or change the permissions",
            errno.EPERM: "choose another place, or change the permissions",
        }.get(error.errno, "")
        _say(f"usf: error: {what}" + (f" ({hint})" if hint else ""))
    else:
        _say(f"usf: error: {error}")
    return code


def _threads(count: int | None) -> None:
    if count is not None:
        if count < 1:
            raise ValueError(f"--threads {count}: at least 1 is needed")
        import torch

        torch.set_num_threads(count)


def _inspect(chosen: argparse.Namespace) -> int:
    for folder in filter(None, (chosen.folder, chosen.test)):
        if not folder.is_dir():  # before torch is imported
            _say(
                f"usf: error: {folder} {'is a file' if folder.exists() else 'does not exist'}: pass a folder of images"
            )
            return 2
    from usf import inspection

    try:
        _threads(chosen.threads)
        options = inspection.Options(
            alpha=chosen.alpha,
            confidence=chosen.confidence,
            calibration=chosen.calibration,
            folds=chosen.folds,
            fdr=chosen.fdr,
            size=chosen.size,
            backbone=chosen.backbone,
            weights=chosen.weights,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            flow_steps=chosen.flow_steps,
            seed=chosen.seed,
            onnx=chosen.onnx,
        )
        found = inspection.survey(chosen.folder, chosen.test, progress=not chosen.quiet)
        inspection.plan(len(found.normals), options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _error(error, 2)
    _say(found.describe())
    for name, why in found.unreadable:
        _say(f"unreadable, left out: {name} ({why})")
    for name in found.unused[:NAMED]:
        _say(f"in a folder that is not used: {name}")
    if len(found.unused) > NAMED:
        _say(f"and {len(found.unused) - NAMED} more in folders that are not used")
    try:
        result = inspection.inspect(found, chosen.out, options, progress=not chosen.quiet, say=_say)
        from usf import report

        page = report.write(result, chosen.out / "report.html")
    except (ValueError, OSError, ArithmeticError, inspection.InspectionError) as error:
        return _error(error, 1, kept=True)
    _say(result.deployed.promise())
    print(page)
    return 0


def _to_score(images: Sequence[Path], heatmaps: Path | None) -> dict[Path, str]:
    """Images to score -> their names in the table and below the heatmaps; each image once, no name twice.

    Raises:
        ValueError: no images, or heatmaps that would lie among them.
    """
    from usf.inspection import files_below
    from usf.study.images import SUFFIXES

    maps = None if heatmaps is None else heatmaps.resolve()
    found: dict[str, tuple[Path, str]] = {}
    for given in images:
        if not given.is_dir():
            found[os.path.abspath(given)] = (given, given.name)
            continue
        if maps is not None and given.resolve().is_relative_to(maps):
            raise ValueError(f"--heatmaps {heatmaps}: {given} lies in it; choose a folder beside the images")
        for path in files_below(given):
            # Heatmaps of an earlier run are no images to score.
            mine = maps is not None and path.resolve().is_relative_to(maps)
            if path.suffix.lower() in SUFFIXES and not mine:
                found.setdefault(os.path.abspath(path), (path, path.relative_to(given).as_posix()))
    if not found:
        raise ValueError(f"{images[0]} holds no images ({', '.join(SUFFIXES)})")
    if len({name for _, name in found.values()}) < len(found):
        common = os.path.commonpath([os.path.dirname(path) for path in found])
        return {path: Path(os.path.relpath(whole, common)).as_posix() for whole, (path, _) in found.items()}
    return dict(found.values())


def _score(chosen: argparse.Namespace) -> int:
    for path in (chosen.model, *chosen.images):
        if not path.exists():
            _say(f"usf: error: {path} does not exist")
            return 2
    from usf import deploy

    try:
        _threads(chosen.threads)
        if chosen.batch_size < 1:
            raise ValueError(f"--batch-size {chosen.batch_size}: at least 1 is needed")
        if chosen.fdr is not None and not 0 < chosen.fdr < 1:
            raise ValueError(f"--fdr {chosen.fdr:g}: a number between 0 and 1, both excluded, is needed")
        files = _to_score(chosen.images, chosen.heatmaps)
        model = deploy.load(chosen.model)
    except (ValueError, OSError) as error:
        return _error(error, 2)
    try:
        unread, alarms, flagged = deploy.score_to_csv(
            model, files, chosen.out, heatmaps=chosen.heatmaps, batch_size=chosen.batch_size, fdr=chosen.fdr,
            progress=not chosen.quiet,
        )  # fmt: skip
    except OSError as error:
        return _error(error, 1)
    batch = "" if chosen.fdr is None else f", {flagged} flagged as one batch (false-discovery rate {chosen.fdr:g})"
    _say(f"{len(files)} images, {alarms} alarms (threshold {model.threshold:.6g}){batch}: {chosen.out}")
    for name, why in unread:
        _say(f"unreadable: {name} ({why})")
    return 1 if unread else 0
