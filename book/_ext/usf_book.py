"""What this book asks of Sphinx beyond its configuration.

1. The pages need no network: MathJax is copied into the book from the ``sphinx-mathjax-offline`` package.
2. Executed chapters are never stale. Jupyter Book's cache knows the code in a chapter, but not the library behind it.
   Here each chapter gets a fingerprint of everything else its output depends on, and the fingerprint becomes part of
   the chapter's key in that cache.
3. Chapters that must be executed run side by side, one per core, before Sphinx reads them one after the other.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import create_nb_reader
from sphinx.application import Sphinx

MATHJAX = ("tex-chtml.js", "a11y", "sre", "input/tex", "output/chtml")
"""The parts of MathJax that a page can load; the package's other parts are alternatives to these."""

_KERNELSPEC = re.compile(r"^kernelspec:[^\n]*\n", re.MULTILINE)


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax where the pages look for it, if it is not there yet."""
    target = Path(app.outdir, "_static", "mathjax")
    if error is not None or app.builder.format != "html" or (target / MATHJAX[0]).exists():
        return
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-mathjax-offline is not installed: run `make setup`")
    source = Path(spec.origin).parent / "static" / "mathjax"
    for part in reversed(MATHJAX):  # the entry point last, so that its presence means that all is there
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / part, target / part)


class Fingerprints:
    """Digest of what a chapter's output depends on besides its own text.

    That is: the lock file, the profile, and the modules of ``src/usf`` that the chapter imports (and those they
    import). Where one of these asks ``usf.paths`` for ``data/`` or for the shared material, that counts as well: the
    former by content, the latter by names and sizes.
    """

    def __init__(self, root: Path) -> None:
        self.src = root / "src"
        self._digests: dict[Path, str] = {}
        self._imports: dict[Path, frozenset[str]] = {}
        self.common = [f"{name}={os.environ.get(name, '')}" for name in ("USF_PROFILE", "USF_SHARED")]
        self.common += [f"lock {self._digest(path)}" for path in root.glob("requirements.lock")]
        files = sorted(path for path in (root / "data").rglob("*") if path.is_file())
        self.data = [f"{path.relative_to(root)} {self._digest(path)}" for path in files]
        shared = Path(os.environ.get("USF_SHARED") or root.parent / "shared")
        files = sorted(path for part in ("images", "weights") for path in (shared / part).rglob("*") if path.is_file())
        self.shared = [f"{path.relative_to(shared)} {path.stat().st_size}" for path in files]
        chapters = sorted((root / "book").glob("*.md"))
        self.headings = [f"{p.name} {re.findall('^# .*', p.read_text('utf8'), re.MULTILINE)[:1]}" for p in chapters]

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]

    def _files(self, module: str) -> list[Path]:
        """The files that run when ``module`` is imported: its own and its parents' ``__init__``."""
        parts = module.split(".")
        found = []
        for end in range(1, len(parts) + 1):
            path = self.src.joinpath(*parts[:end])
            found += [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
        return found

    @staticmethod
    def _modules(code: str, package: str = "") -> frozenset[str]:
        """Names of this package's modules that Python code imports (or may import: ``from a import b``)."""
        names: set[str] = set()
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                base = ".".join(filter(None, (base, node.module or "")))
                names.add(base)
                names.update(f"{base}.{alias.name}" for alias in node.names)
        return frozenset(name for name in names if name.split(".")[0] == "usf")

    def _module_imports(self, path: Path) -> frozenset[str]:
        if path not in self._imports:
            package = ".".join(path.relative_to(self.src).parts[:-1])
            self._imports[path] = self._modules(path.read_text("utf8"), package)
        return self._imports[path]

    def sources(self, code: str) -> list[Path]:
        """The files under ``src/`` that a chapter's code runs, found without running it."""
        try:
            todo = set(self._modules(code))
        except SyntaxError:  # the execution will say so; until then depend on everything
            return sorted(self.src.rglob("*.py"))
        done: set[str] = set()
        files: set[Path] = set()
        while todo - done:
            module = (todo - done).pop()
            done.add(module)
            for path in self._files(module):
                files.add(path)
                todo |= self._module_imports(path)
        return sorted(files)

    def of(self, code: str) -> str:
        """The fingerprint of a chapter, given its code."""
        files = self.sources(code)
        lines = self.common + [f"{path.relative_to(self.src)} {self._digest(path)}" for path in files]
        text = "\n".join([code, *(path.read_text("utf8") for path in files if path.name != "paths.py")])
        if re.search(r"\bpaths\.(data|results|root)\b|from usf\.paths import", text):
            lines += self.data
        if re.search(r"\bpaths\.(shared|root)\b|from usf\.paths import", text):
            lines += self.shared
        if self.src / "usf" / "study" / "status.py" in files:  # it lists the chapters there are
            lines += self.headings
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read(env: Any, docname: str, fingerprint: str = "") -> tuple[Any, Any] | None:
    """A chapter as Jupyter Book will see it: (reader, notebook), or ``None`` for a page without cells."""
    path = Path(env.doc2path(docname))
    text = signed(path.read_text("utf8"), fingerprint)
    reader = create_nb_reader(str(path), env.myst_config, env.mystnb_config, text)
    return None if reader is None else (reader, reader.read(text))


def outdated(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Have Sphinx read again every chapter whose fingerprint is no longer the one it was read with.

    All of them where the style sheet or this file changed, which Sphinx does not watch.
    """
    assets = [path for folder in ("_static", "_ext") for path in Path(app.srcdir, "book", folder).glob("*.*")]
    look = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(assets))).hexdigest()
    fingerprints = Fingerprints(Path(app.srcdir))
    before = getattr(env, "usf_fingerprints", {}) if getattr(env, "usf_look", "") == look else {}
    env.usf_look = look
    env.usf_fingerprints = {}
    for name in env.found_docs:
        env.usf_fingerprints[name] = ""
        if (found := read(env, name)) is not None:
            cells = [cell.source for cell in found[1].cells if cell.cell_type == "code"]
            code = "\n".join(
                line for cell in cells for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))
            )
            env.usf_fingerprints[name] = fingerprints.of(code)
    return [name for name in env.found_docs if name not in before or before[name] != env.usf_fingerprints[name]]


def sign(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the fingerprint into the kernel's metadata, which Jupyter Book's cache takes into its key."""
    source[0] = signed(source[0], app.env.usf_fingerprints.get(docname, ""))  # type: ignore[attr-defined]


def signed(text: str, fingerprint: str) -> str:
    """A chapter's text with its fingerprint in the front matter."""
    return _KERNELSPEC.sub(lambda match: f"{match[0]}  fingerprint: '{fingerprint}'\n", text, count=1)


def cell_seconds(notebook: Any) -> list[float]:
    """Wall time of each code cell. Takes it out of the cells: it would become part of their key in the cache."""
    seconds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            times = cell.metadata.pop("execution", {})
            start, end = (times.get(key) for key in ("iopub.status.busy", "shell.execute_reply"))
            run = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() if start and end else 0
            seconds.append(round(run, 2))
    return seconds


def execute(app: Sphinx, env: Any, docnames: list[str]) -> None:
    """Fill the cache with the chapters that are about to be read, executing one per core.

    All of them are run even where one fails, and those that succeed are kept. Then a failure ends the build.

    Raises:
        SystemExit: with the failed cells and their errors, and without the tracebacks of those who only passed it on.
    """
    config = env.mystnb_config
    if config.execution_mode != "cache":
        return
    cache = get_cache(config.execution_cache_path)
    todo = []
    for name in docnames:
        if (found := read(env, name, env.usf_fingerprints.get(name, ""))) is not None:
            try:
                cache.match_cache_notebook(found[1])
            except KeyError:
                todo.append((name, *found))
    if not todo:
        return
    jobs = min(len(todo), os.cpu_count() or 1)

    def run(item: tuple[str, Any, Any]) -> Any:
        name, _, notebook = item
        print(f"executing {name} ...", flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = single_nb_execution(
                notebook,
                cwd=folder,
                timeout=config.execution_timeout,
                allow_errors=False,
                record_timing=True,
                extra_arguments=["--log-level=ERROR"],
            )
        outcome = "failed" if result.err else "done"
        print(f"executing {name} ... {outcome} in {time.perf_counter() - start:.0f} s", flush=True)
        return result

    errors = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, item): item for item in todo}
        for future in as_completed(futures):  # kept at once: an interrupted build goes on where it stopped
            (name, reader, notebook), result = futures[future], future.result()
            seconds = cell_seconds(notebook)
            if result.err is not None:
                errors.append(f"{name}.md: {type(result.err).__name__}\n{result.err}")
                continue
            record = cache.add_nb_to_project(env.doc2path(name), read_data=reader.read_fmt)
            times = {"execution_seconds": result.time, "cell_seconds": seconds}
            bundle = CacheBundleIn(notebook, record.uri, data=times)
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    if errors:
        sys.exit("\n".join([*errors, f"{len(errors)} of {len(todo)} executed chapters failed."]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Entry point for Sphinx."""
    os.environ.setdefault("USF_PROFILE", "book")
    os.environ["TQDM_DISABLE"] = "1"  # a progress bar is no result
    # One thread a chapter, however many run: another order of summation gives other numbers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("env-get-outdated", outdated)
    app.connect("env-before-read-docs", execute, priority=900)
    app.connect("source-read", sign)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
