"""Files that may come from elsewhere: what every reader of them asks first.

A reader of a format checks the rest, and raises `FileError`, which names the file and what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import uuid
import zipfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

_MOST_JSON = 64 * 2**20  # bytes


class FileError(ValueError):
    """A file that is there and cannot be used as it is; the message names it, the reason and the remedy."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A file for reading; what others write into while it is read (a FIFO, a socket, a device) is refused.

    Raises:
        FileError: for such a one. OSError: if it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, which can wait for ever
        what = "a folder" if os.path.isdir(path) else "a FIFO, a socket or a device"
        raise FileError(f"{path}: is {what}, expected a file")
    return open(path, "rb")


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path whose "~/" is the user's home, as a shell has it, which leaves --option=~/x and URLs."""
    given = Path(path)
    if given.parts[:1] == ("~",):
        with contextlib.suppress(RuntimeError):  # a user without a home
            return given.expanduser()
    return given


@contextlib.contextmanager
def reading(
    path: str | os.PathLike[str], fault: str, remedy: str, kind: type[FileError] | None = None
) -> Iterator[None]:
    """Whatever is wrong with a file's content becomes a `FileError`; what the system has against it stays.

    Args:
        fault: such as "cannot be read as a run's settings".
        kind: of the error; `FileError` if None.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # decoders, archives and constructors fail in any way on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is None:
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise (kind or FileError)(f"{path}: {fault} ({' '.join(reason.split())[:300]}); {remedy}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file's JSON object, whose numbers are finite; call it under `reading`.

    Raises:
        ValueError: for anything else. OSError: if it cannot be opened.
    """
    with open_regular(path) as file:
        content = file.read(_MOST_JSON + 1)
    if len(content) > _MOST_JSON:
        raise ValueError(f"it is larger than {_MOST_JSON // 2**20} MiB")
    values = json.loads(content.decode(), parse_constant=_refused)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {type(values).__name__}")
    return values


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def check_archive(path: str | os.PathLike[str], most: int) -> None:
    """Look through a zip archive before it is unpacked; call it under `reading`.

    Raises:
        ValueError: if what is in it does not agree with its checksums, or is larger than `most` bytes.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise ValueError(f"it unpacks to {size} bytes, expected at most {most}")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged!r} in it is damaged")


def read_tensors(path: Path, most: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file; call it under `reading`.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: for a larger file, or one that is none. OSError: if it cannot be opened.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path.name} has {size} bytes, expected at most {most}")
        try:
            return dict(load(file.read()))
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by their names, none of which is read.

    Call it under `reading`.

    Raises:
        ValueError: for a file that is none. OSError: if it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    with replaced(path) as partial:
        partial.write_bytes(save(tensors))  # its own writer makes files that the owner alone can read


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside a path, to be written: it takes the path's place at the end, or goes if that fails.

    Threads and processes that replace files of one folder do so one after the other: it cannot be nested. A
    draft that a kill left goes first, and is never written into: it could be a link to somewhere else.
    """
    partial = path.with_name(path.name + ".partial")
    with folder_locked(path.parent):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            partial.unlink()
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """A lock on the folder itself, which leaves no file behind; waits for whoever has it."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems of other machines may have no such locks
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # closing alone leaves it to processes forked meanwhile
        os.close(place)


def foreign(folder: Path, *, names: bool = True) -> str | None:
    """What below a folder leads elsewhere, or is no file: a path with the reason; None where all is its own.

    Args:
        folder: itself may be a link.
        names: look for files that have another name elsewhere (hard links) as well.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                if (reason := _foreign(path, names)) is not None:
                    return f"{path}: {reason}"
    return None


def _foreign(path: Path, names: bool) -> str | None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a link"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "is a FIFO, a socket or a device"
    if names and stat.S_ISREG(mode) and has_other_names(path):
        return "has another name elsewhere (a hard link)"
    return None


def has_other_names(path: Path) -> bool:
    """Whether a file is also one outside of its folder (by a hard link)."""
    found = path.lstat()
    if found.st_nlink < 2:
        return False
    here = [entry for entry in os.scandir(path.parent) if entry.inode() == found.st_ino]
    return found.st_nlink > len(here)


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, at no moment anybody else; one that is there already stays.

    Raises:
        OSError: if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def unwritable(path: Path) -> str | None:
    """Why no file can be written at a place, looked at before the work; None where one can.

    What is no file, such as a device, is no place for one: a file that is written whole would replace it.

    Raises:
        OSError: for a name that the system does not take.
    """
    path.with_name(path.name + ".partial").exists()  # raises for too long a name
    if path.is_dir() or not path.parent.is_dir():
        return "expected a file in a folder that is there"
    if path.exists() and not path.is_file():
        return "is a FIFO, a socket or a device, expected a file"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"{path.parent} cannot be written to"
    return None


def unmakeable(folder: Path) -> str | None:
    """Why no new folder can be written at a place, looked at before the work; None where one can.

    Raises:
        OSError: for a name that the system does not take.
    """
    for place in (folder, folder.with_name(folder.name + ".partial")):
        if os.path.lexists(place):
            return f"expected a folder that is not there yet, but there is {place.name!r}"
    if not folder.parent.is_dir():
        return f"expected a folder in one that is there, but there is no {str(folder.parent)!r}"
    return unwritable(folder)
