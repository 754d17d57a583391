"""The command line of the study, see :mod:`usf.study.mixtures`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from usf import paths
from usf.study import mixtures, records
from usf.study.mixtures import MODELS, finished, load, run, study, summary, write


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the package's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m usf.study.mixtures", description=(mixtures.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--profile", default="book", help="smoke, book or full")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes with one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="folder of the records; default: under build/mixtures")
    parser.add_argument(
        "--publish", action="store_true", help="also write the gathered records to data/results/mixtures"
    )
    parser.add_argument("--gather", action="store_true", help="train nothing, gather the records that are there")
    chosen = parser.parse_args(arguments)
    settings = study(chosen.profile)
    folder = chosen.out or paths.build("mixtures", f"{chosen.profile}-{settings.key()}")
    if chosen.gather:
        rows = [r for dim in settings.dims for model in chosen.models for r in finished(folder, model, dim)]
    else:
        rows = run(settings, folder, models=chosen.models, jobs=chosen.jobs)
    write(settings, folder, rows, folder / "gathered")
    if chosen.publish:
        write(settings, folder, rows, paths.results("mixtures"))
    for line in summary(rows, records.read_csv(folder / "gathered" / "oracle" / "bounds.csv")):
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    try:
        from usf.plots import mixtures as figures
    except ImportError as error:
        print(f"no figure: {error}; install the `book` extra")
        return
    from usf import plots

    with plots.theme():
        figure = figures.density_against_norm(load(folder / "gathered")["points"])
    target = folder / "gathered" / "density_against_norm.png"
    figure.savefig(target, facecolor="white")
    print(f"records and figure: {target.parent}")


if __name__ == "__main__":
    main()
