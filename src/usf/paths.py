"""Where things are: the one module that knows the paths.

Inside the repository every path follows from its root. Used from elsewhere, an installed wheel brings a copy of what
the chapters read (``data/``, ``examples/``, ``book/``), and has a cache and a build folder. Where there is no such copy
either, an error says so.

Environment variables
---------------------
``USF_CACHE``
    Folder for feature caches, downloads and weights. Default: ``usf`` in the user's cache folder.
``USF_SHARED``
    Folder with optional material (images, weights) that is not part of the repository. Default: ``shared`` beside the
    repository, where it exists. Set it to the empty string to do without.
"""

from __future__ import annotations

import os
from pathlib import Path


def _is_root(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "src" / "usf" / "paths.py").is_file()


def root() -> Path | None:
    """The repository's root, or ``None`` where the package is used outside of it.

    Found from this file (editable install), else from the working directory upwards (wheel used inside a clone).
    """
    here = Path(__file__).resolve()
    for folder in (here.parents[2], Path.cwd(), *Path.cwd().parents):
        if _is_root(folder):
            return folder
    return None


def _packaged() -> Path:
    """Where a wheel has its copy of the repository's folders (``pyproject.toml`` says which)."""
    return Path(__file__).resolve().parent / "_repository"


def _in_repository(name: str, parts: tuple[str, ...]) -> Path:
    folder = root() or _packaged()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{'/'.join((name, *parts))} is part of the repository, and the package runs outside of it: "
            "change into a clone of the repository, or pass a path of your own."
        )
    return folder.joinpath(name, *parts)


def book(*parts: str) -> Path:
    """The chapters' sources, ``book/``. Raises ``FileNotFoundError`` where neither repository nor wheel has them."""
    return _in_repository("book", parts)


def examples(*parts: str) -> Path:
    """Settings for anomalib's command line, ``examples/``. Raises as :func:`book` does."""
    return _in_repository("examples", parts)


def data(*parts: str) -> Path:
    """Committed data, ``data/``. Raises as :func:`book` does."""
    return _in_repository("data", parts)


def results(*parts: str) -> Path:
    """Measured records, ``data/results/``. Raises as :func:`book` does."""
    return data("results", *parts)


def build(*parts: str) -> Path:
    """Generated files, ``build/`` in the repository, else in the working directory. Nothing in it is committed."""
    return (root() or Path.cwd()).joinpath("build", *parts)


def cache(*parts: str) -> Path:
    """What is dear to make or fetch and may be deleted at any time. The folder is not created here.

    >>> import os
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, USF_CACHE="somewhere"):
    ...     cache("features").as_posix()
    'somewhere/features'
    """
    chosen = os.environ.get("USF_CACHE")
    if chosen:
        return Path(chosen).expanduser().joinpath(*parts)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache").joinpath("usf", *parts)


def shared(*parts: str) -> Path | None:
    """The optional shared material, or a path in it; ``None`` where there is none.

    Returns
    -------
    Path | None
        An existing file or folder, or ``None``. Callers fall back to something built in and say so.

    Raises
    ------
    FileNotFoundError
        ``USF_SHARED`` names a folder that does not exist: a typing error must not silently become a fallback.
    """
    chosen = os.environ.get("USF_SHARED")
    if chosen is not None:
        if not chosen:
            return None
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"USF_SHARED={chosen} is not a folder: correct it, or unset it.")
    else:
        repository = root()
        if repository is None:
            return None
        folder = repository.parent / "shared"
    path = folder.joinpath(*parts)
    return path if path.exists() else None
