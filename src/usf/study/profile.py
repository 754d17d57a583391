"""Three sizes of every experiment, and one way to choose between them.

``smoke``
    Does every line run? For tests; a chapter takes well under a minute on one core.
``book``
    The default: the numbers and figures of the rendered book, on two CPU cores.
``full``
    The paper's settings; needs a GPU where the text says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

PROFILES = ("smoke", "book", "full")

T = TypeVar("T")


def select(profile: str, *, smoke: T, book: T, full: T) -> T:
    """The settings of one profile.

    Parameters
    ----------
    profile:
        ``"smoke"``, ``"book"`` or ``"full"``.
    smoke, book, full:
        The settings of each profile, of the same type. Mappings must have the same keys, so that a setting forgotten
        in one profile is found in every one.

    Raises
    ------
    ValueError
        An unknown profile, or mappings whose keys differ.

    Examples
    --------
    >>> select("smoke", smoke=dict(epochs=1), book=dict(epochs=50), full=dict(epochs=200))
    {'epochs': 1}
    >>> select("small", smoke=1, book=2, full=3)
    Traceback (most recent call last):
        ...
    ValueError: unknown profile 'small': choose one of 'smoke', 'book', 'full' (parameter `profile`, or the \
environment variable USF_PROFILE)
    """
    settings = {"smoke": smoke, "book": book, "full": full}
    if profile not in settings:
        raise ValueError(
            f"unknown profile {profile!r}: choose one of {', '.join(map(repr, PROFILES))} "
            "(parameter `profile`, or the environment variable USF_PROFILE)"
        )
    keys = {name: set(value) for name, value in settings.items() if isinstance(value, Mapping)}
    union = set[object]().union(*keys.values())
    for name, present in keys.items():
        if missing := union - present:
            raise ValueError(f"profile {name!r} lacks {', '.join(sorted(map(str, missing)))}, which another one sets")
    return settings[profile]
