"""How long the chapters took when they were last executed, and their slowest cells, as Markdown: `make times`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache

SLOWEST = 10


def label(cell: Any) -> str:
    """What a code cell is: its figure's name, or its first line that does something."""
    figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
    if figure:
        return str(figure)
    idle = ("import ", "from ", "#", "%", "@")
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith(idle)]
    return f"`{lines[0].strip()[:60]}`" if lines else "imports"


def main(folder: Path) -> None:
    """Print both tables from the cache in ``folder``.

    Raises:
        SystemExit: where nothing was executed yet.
    """
    if not (folder / "global.db").is_file():
        sys.exit("nothing was executed yet: run `make book`")
    cache = get_cache(folder)
    latest = {record.uri: record for record in sorted(cache.list_cache_records(), key=lambda record: record.created)}
    # Chapters that were renamed stay in the cache.
    latest = {uri: record for uri, record in latest.items() if Path(uri).is_file()}
    cells: list[tuple[float, str, str]] = []
    print("| Chapter | seconds |\n|---|---|")
    for uri, record in sorted(latest.items(), key=lambda item: Path(item[0]).stem):
        print(f"| `{Path(uri).stem}` | {record.data['execution_seconds']:.0f} |")
        code = [cell for cell in cache.get_cache_bundle(record.pk).nb.cells if cell.cell_type == "code"]
        for cell, seconds in zip(code, record.data.get("cell_seconds", []), strict=False):
            cells.append((seconds, Path(uri).stem, label(cell)))
    print(f"| all | {sum(record.data['execution_seconds'] for record in latest.values()):.0f} |\n")
    print("| Slowest cells | of | seconds |\n|---|---|---|")
    for seconds, chapter, what in sorted(cells, reverse=True)[:SLOWEST]:
        print(f"| {what} | `{chapter}` | {seconds:.0f} |")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[2] / "_build" / ".jupyter_cache")
