"""What all tests share: a cache of their own, figures without a screen, and hypothesis without surprises.

And chapters that nbmake runs are looked at afterwards: a number in their text that the book could not format fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import glued
import pytest
from hypothesis import settings
from nbmake import pytest_items
from nbmake.nb_result import NotebookError, NotebookResult

# The same examples in every run: a failure on one machine is a failure on all. No deadline, since a first call to
# torch is slow, and so is a shared core.
settings.register_profile("usf", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("usf")


class _Run(pytest_items.NotebookRun):
    """A notebook that runs, and then shows its glued numbers."""

    def execute(self) -> NotebookResult:
        result = super().execute()
        if result.error is None and (found := list(glued.faults(result.nb))):
            result.error = NotebookError(found[0], "\n".join(found), failing_cell_index=0)
        return result


def pytest_configure() -> None:
    pytest_items.NotebookRun = _Run


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield
