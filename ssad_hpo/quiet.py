"""Warnings that do not concern a user are not shown; what else the process is told stays."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.RLock()


@contextlib.contextmanager
def without_warnings(category: type[Warning] = Warning, message: str = "") -> Iterator[None]:
    """Inside, warnings of a category are not shown.

    Python's filters belong to the whole process. Two threads that change and restore them at once may leave
    them changed for good, so that here one waits for the other.

    Args:
        category: of the warnings.
        message: a regular expression that they begin with.
    """
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
