"""What all tests share: a cache of their own, figures without a screen, and hypothesis without surprises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples in every run: a failure on one machine is a failure on all. No deadline, since a first call to
# torch is slow, and so is a shared core.
settings.register_profile("usf", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("usf")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield
