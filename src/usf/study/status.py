"""What of the paper is reproduced, read off the files that exist: chapters and measured records.

The claims stand in ``data/paper/claims.csv``, one row each: the place in the paper, the claim in our words, the chapter
that checks it (its name without the number), and the files in ``data/results/`` whose records it needs, as a pattern
(empty for a claim that its chapter derives or computes on every build). Where only some rows of these files are about
the claim, the pattern is followed by what they have in a column: ``benchmark/*.csv dataset=mvtec|visa``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from usf import paths


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and how far its check has come.

    Attributes
    ----------
    place, text:
        Where the paper says it, and what it says.
    chapter, title:
        File name (without suffix) and heading of the chapter that checks it; ``None`` where it is not written yet.
    records:
        Pattern of the files with the records it needs, perhaps with conditions, or ``None``.
    succeeded, failed:
        Number of records by outcome.
    """

    place: str
    text: str
    chapter: str | None
    title: str | None
    records: str | None
    succeeded: int = 0
    failed: int = 0

    @property
    def status(self) -> str:
        """``"checked on every build"``, a number of measured runs, or what is missing."""
        if self.chapter is None:
            return "open"
        if self.records is None:
            return "checked on every build"
        if not self.succeeded + self.failed:
            # Files are there, but none of their rows is about this claim.
            return "no run on record" if "=" in self.records else "live run only, no records yet"
        count = self.succeeded + self.failed
        runs = f"{count} run{'' if count == 1 else 's'} on record"
        if not self.failed:
            return runs
        return f"{runs}, failed" if count == 1 else f"{runs}, {self.failed} of them failed"


def sentence(rows: Iterable[Claim]) -> str:
    """How many claims have a chapter, in words that need no zero."""
    found = list(rows)
    missing = sum(claim.chapter is None for claim in found)
    if not missing:
        return f"Each of the {len(found)} claims has its chapter"
    return f"Of the {len(found)} claims, {missing} {'has' if missing == 1 else 'have'} no chapter yet"


TRAINING = (
    "dataset", "category", "detector", "coupling", "mixing", "loss", "train_layer_norm", "match_parameters", "epochs",
    "settings", "seed",
)  # fmt: skip
"""Columns that name a training in records with one row a score (``usf.study.schema``)."""


def count_records(folder: Path, pattern: str) -> tuple[int, int]:
    """Runs in the CSV files of a folder that match a pattern, as (succeeded, failed).

    A row is a run, unless the file has a row for each score of a trained model: then its rows are one run. A run has
    failed where its column ``status`` says anything but ``ok``. A folder that does not exist has no records. Conditions
    behind the pattern, ``COLUMN=VALUE`` or ``COLUMN=VALUE|VALUE``, leave out rows that do not meet them.
    """
    pattern, *conditions = pattern.split()
    wanted = {name: values.split("|") for name, values in (condition.split("=") for condition in conditions)}
    rows = 0
    failed_rows = 0
    runs: dict[tuple[str, ...], bool] = {}
    for path in sorted(folder.glob(pattern)):
        with path.open(newline="", encoding="utf8") as stream:
            for row in csv.DictReader(stream):
                if not all(row.get(name) in values for name, values in wanted.items()):
                    continue
                fine = row.get("status", "ok") == "ok"
                if "score" in row and "settings" in row:
                    key = tuple(row.get(name, "") for name in TRAINING)
                    runs[key] = runs.get(key, True) and fine
                else:
                    rows += 1
                    failed_rows += not fine
    succeeded = sum(runs.values())
    return rows - failed_rows + succeeded, failed_rows + len(runs) - succeeded


def _title(chapter: Path) -> str:
    for line in chapter.read_text("utf8").splitlines():
        if line.startswith("# "):
            return line[2:].strip()
    raise ValueError(f"{chapter} has no heading of the first level")


def claims() -> list[Claim]:
    """Every claim of the paper with its present state, in the paper's order.

    Raises
    ------
    FileNotFoundError
        Outside the repository, which holds the list, the chapters and the records.
    """
    found = []
    with paths.data("paper", "claims.csv").open(newline="", encoding="utf8") as stream:
        for row in csv.DictReader(stream):
            chapter = next(iter(sorted(paths.book().glob(f"[0-9][0-9]-{row['chapter']}.md"))), None)
            records = row["records"] or None
            succeeded, failed = count_records(paths.results(), records) if records else (0, 0)
            found.append(
                Claim(
                    place=row["place"],
                    text=row["claim"],
                    chapter=chapter.stem if chapter else None,
                    title=_title(chapter) if chapter else None,
                    records=records,
                    succeeded=succeeded,
                    failed=failed,
                )
            )
    return found


def markdown(rows: Iterable[Claim]) -> str:
    """The claims as a Markdown table with links to the chapters' pages, beside the one that shows the table."""
    lines = ["| In the paper | Claim | Chapter | Status |", "|---|---|---|---|"]
    for claim in rows:
        link = f"[{claim.title}]({claim.chapter}.html)" if claim.chapter else "not yet written"
        lines.append(f"| {claim.place} | {claim.text} | {link} | {claim.status} |")
    return "\n".join(lines)
