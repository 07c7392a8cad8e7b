"""Ray's token: whoever has it runs what he likes on a cluster, so that its owner alone may read it."""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path

from ssad_hpo.files import folder_locked, write_private


def prepare_token() -> None:
    """Make the token of a Ray that starts on this machine, where it has none: Ray's own is for all to read.

    Raises:
        ValueError: if it cannot be made.

    Warns:
        UserWarning: if others can read the one that is there.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        path = Path.home() / ".ray" / "auth_token"  # where Ray looks
        made = _make(path.resolve())  # behind links, where Ray would write one for all to read
    except (OSError, RuntimeError) as error:  # a home that is read-only, or a user without one
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"Ray's token cannot be made in ~/.ray ({reason}); write a secret of your own into a file that "
            "you alone can read, and set RAY_AUTH_TOKEN_PATH to it"
        ) from error
    if not made and path.stat().st_mode & 0o077:
        warnings.warn(f"{path}: other users can read Ray's token; run `chmod 600 {path}`", stacklevel=2)


def _make(path: Path) -> bool:
    """Whether there was none; an empty file is none, which Ray would fill as it is."""
    if _is_there(path):
        return False
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # or others could put theirs in its place
    with folder_locked(path.parent):
        if _is_there(path):
            return False
        path.unlink(missing_ok=True)
        write_private(path, secrets.token_hex(32))
    return True


def _is_there(path: Path) -> bool:
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)
