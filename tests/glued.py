"""Numbers that the text of an executed chapter pastes: can the book format them?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from myst_nb.core.variables import format_plain_text
from myst_nb.ext.glue import GLUE_PREFIX

_PASTED = re.compile(r"\{glue:text\}`([^`:]+)(?::([^`]+))?`")
NAMES = (GLUE_PREFIX + "text/plain", "text/plain")


def pasted(notebook: Any) -> set[tuple[str, str]]:
    """(key, format) of every number in the text and in the captions of figures."""
    texts = [cell.source if cell.cell_type == "markdown" else json.dumps(cell.metadata) for cell in notebook.cells]
    return {(key.strip(), spec or "") for text in texts for key, spec in _PASTED.findall(text)}


def payloads(notebook: Any) -> dict[str, str]:
    """What each key was glued to, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    glued = [output for output in outputs if "scrapbook" in output.get("metadata", {})]
    return {
        o.metadata["scrapbook"]["name"]: next((o.data[name] for name in NAMES if name in o.data), "") for o in glued
    }


def faults(notebook: Any) -> Iterator[str]:
    """Keys whose payload is no plain Python number or text, or does not take the format that its chapter asks for."""
    values = payloads(notebook)
    for key, spec in sorted(pasted(notebook)):
        if key not in values:  # not in every profile; where the book lacks it, its build fails
            continue
        try:
            text = format_plain_text(values[key], spec)
        except ValueError:
            text = "np."
        if text.startswith(("np.", "array(", "tensor(")):
            yield f"{key}: {values[key]!r} is no Python number for the format {spec!r}: glue float(x) or int(x)"
