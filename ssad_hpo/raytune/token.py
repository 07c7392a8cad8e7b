"""Ray's token: whoever has it runs what he likes on a cluster, so that its owner alone may read it."""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path

from ssad_hpo.files import write_private


def prepare_token() -> None:
    """Make the token of a Ray that starts on this machine, where it has none: Ray's own is for all to read.

    Warns:
        UserWarning: if others can read the one that is there.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_hex(32))
    elif path.stat().st_mode & 0o077:
        warnings.warn(f"{path}: other users can read Ray's token; run `chmod 600 {path}`", stacklevel=2)
