"""Files: there whole or not at all, and why one cannot be read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["atomic_write", "reason"]


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is at every moment either the old one or the new one, whole.

    Folders are made as needed. Safe against a kill at any point, and against readers in other processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def reason(error: Exception) -> str:
    """Why an image cannot be read, without the machine's path in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split("'")[0].strip() or type(error).__name__
    return "not an image" if text.startswith("cannot identify") else text
