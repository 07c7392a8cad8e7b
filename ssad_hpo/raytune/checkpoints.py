"""Where a sweep's checkpoints lie: in a folder that all nodes reach, or in an object store."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow.fs import FileSystem

from ssad_hpo.address import hides_password, without_password


def absolute_checkpoint_path(checkpoint_path: str | Path) -> str:
    """A path of checkpoints as workers need it, who work in folders of their own.

    A URI stays as it is, and its folder is made, which shows that it can be written to.

    Raises:
        ValueError: for a folder that cannot be written to or made, an object store that cannot be written
            to from here, or a URI with a password.
    """
    if urlsplit(str(checkpoint_path)).scheme:
        return _reached(str(checkpoint_path))
    folder = Path(checkpoint_path).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            f"checkpoint_path: expected a folder to write checkpoints to, cannot write to {there}"
        )
    return str(folder)


def _reached(uri: str) -> str:
    # The user of these is a container, or a name that is asked for no password.
    if hides_password(without_password(re.sub(r"^(abfss?|hdfs)://[^/@:]*@", r"\1://", uri))):
        raise ValueError(
            "checkpoint_path: expected a URI without a password, since it is written down with the run; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your store takes, on every node"
        )
    try:
        filesystem, path = FileSystem.from_uri(uri)
        filesystem.create_dir(path)
    except (OSError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint_path: expected a folder, or the URI of an object store to write to, got {uri!r}: "
            f"{reason}"
        ) from error
    return uri


def discard_untold(place: str) -> None:
    """Remove checkpoints that a worker wrote after its driver was killed, of a sweep that has ended.

    Args:
        place: of the sweep's checkpoints. In an object store they stay: its folders are not listed.
    """
    if not urlsplit(place).scheme:
        for folder in Path(place).glob("trial-*/checkpoint_*"):
            shutil.rmtree(folder, ignore_errors=True)  # what stays behind does no harm


def below(place: str, *parts: str) -> str:
    """The address of a folder below a checkpoint path; the query of a URI stays at its end."""
    folder, mark, query = place.partition("?") if urlsplit(place).scheme else (place, "", "")
    return "/".join((folder.rstrip("/"), *parts)) + mark + query
