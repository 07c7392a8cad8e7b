"""Which remote addresses are the user's own: a run folder from elsewhere does not decide where passwords go.

An address is known once its user has given it: to a study, in the environment, or by vouching for a run that
names it. As with the hosts that ssh knows, known ones are kept in a file of the user's, outside of any run,
one a line. Who takes a line out is asked again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from ssad_hpo.address import hides_password, without_password
from ssad_hpo.files import FileError, open_regular

# Where a user sets addresses of his own.
_VARIABLES = {"tracking_uri": "MLFLOW_TRACKING_URI", "storage": "SSAD_HPO_STORAGE", "address": "RAY_ADDRESS"}


def remember(setting: str, address: str) -> None:
    """Keep an address that its user gave, for a setting such as "tracking_uri"; passwords are not kept.

    One with a password is not needed later: it comes from the environment whenever its run is opened.
    """
    if is_known(setting, address) or hides_password(without_password(address)) or not address.isprintable():
        return
    place = _register()
    if place is None:
        return
    with contextlib.suppress(OSError):  # a home that is read-only, or full: asked again then
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, f"{setting} {address}\n".encode())
        finally:
            os.close(file)


def check_known(holder: Path, setting: str, address: str) -> None:
    """Raise FileError for a remote address that a folder or file names and its user never gave."""
    if not is_known(setting, address):
        raise FileError(
            f"{holder}: names {setting} {without_password(address)!r}, an address that you have never given "
            "yourself and that your passwords or images would go to; if you trust it, confirm it by "
            "--trust-addresses (trust_addresses=True)"
        )


def is_known(setting: str, address: str) -> bool:
    """Whether an address is on this machine, or its user's own."""
    if not _is_remote(setting, address) or os.environ.get(_VARIABLES.get(setting, "")) == address:
        return True
    place = _register()
    try:
        if place is None:
            return False
        with open_regular(place) as file:
            lines = file.read().decode().splitlines()
    except (OSError, ValueError):
        return False
    return f"{setting} {address}" in lines


def _is_remote(setting: str, address: str) -> bool:
    """Another user may listen at this machine's ports, so that only files are local."""
    if setting == "address":
        return address not in ("auto", "local")  # Ray's processes of this machine
    if setting == "checkpoint_path":
        return urlsplit(address).scheme not in ("", "file")
    return not address.startswith(("sqlite:///", "sqlite+pysqlite:///"))


def _register() -> Path | None:
    """$XDG_STATE_HOME/ssad_hpo/addresses, else ~/.local/state/ssad_hpo/addresses."""
    shared = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(shared) if os.path.isabs(shared) else Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home
        return None
    return state / "ssad_hpo" / "addresses"
