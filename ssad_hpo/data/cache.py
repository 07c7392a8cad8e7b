"""Decoded image sets on disk, so that a folder is decoded once. Every failure here means: go without.

Files in the cache folder, each safe to delete at any time:

- `index-*.json`, one per data folder: path -> (stat, content), so that files which have not changed
  are not read again, as in git's index.
- `writing-*`: files that are being written; what a killed writer left goes with the next one.
- `images-KEY.npy` and `images-KEY.json`: the pixels of a set of files and what became of each file.
  KEY is a digest of the files' contents and the settings: paths, names and their order are not in it.

Each JSON file holds its content beside the content's digest: an entry that was damaged to another valid
one (a grey file called coloured) would otherwise give other images.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np
import PIL

from ssad_hpo.data.pixels import (
    WHOLE_DEPTH,
    Decoding,
    UnreadableError,
    decode_into,
    error_about,
    in_threads,
    is_grey,
)
from ssad_hpo.files import FileError, open_regular

_log = logging.getLogger(__name__)
# Part of every key: another version of the decoding here, or of PIL's, gives other pixels.
_DECODING = f"1, PIL {PIL.__version__}"
# A file changed just now can change again within one tick of the file system's clock and look the
# same; its stat is not trusted (git calls such entries racy).
_SETTLED_NS = 2_000_000_000
_DRAFT = "writing-"  # begins the names of files that are not whole yet


@dataclass(frozen=True)
class FileContent:
    """What a file holds: the digest of its bytes, and whether its header says grey (None: unreadable)."""

    digest: str
    grey: bool | None


@dataclass(frozen=True)
class DecodedSet:
    """The images of a set of files.

    Attributes:
        pixels: (N, C, S, S) uint8, writable, ordered by the digest of each image's pixels; identical
            images as often as they came. The order says nothing about names or folders.
        digests: for each digest of a readable file's bytes the digest of its pixels.
        unreadable: for each digest of an unreadable file's bytes the reason.
    """

    pixels: np.ndarray
    digests: dict[str, str]
    unreadable: dict[str, str]


def cache_folder() -> Path | None:
    """$SSAD_HPO_CACHE (empty: no cache), else $XDG_CACHE_HOME/ssad_hpo, else ~/.cache/ssad_hpo."""
    own = os.environ.get("SSAD_HPO_CACHE")
    if own is not None:
        return Path(own) if own else None
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared, "ssad_hpo")
    try:
        return Path.home() / ".cache" / "ssad_hpo"
    except RuntimeError:  # a user without a home
        return None


def identify(folder: Path, paths: Sequence[Path]) -> list[FileContent]:
    """The content of each file in `folder`; reads only files that changed since they were last read."""
    index_path = _in_cache(f"index-{_digest(os.path.abspath(folder))}.json")
    index = _read_json(index_path) or {}
    started = time.time_ns()
    fresh: dict[str, list[Any]] = {}

    def look(path: Path) -> FileContent:
        key = os.path.abspath(path)
        try:
            stat = os.stat(path)
            if not S_ISREG(stat.st_mode):
                raise OSError("no regular file")
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            known = index.get(key)
            match known:
                case [int(), int(), int(), str(digest), bool(grey)] if known[:3] == stamp:
                    return FileContent(digest, grey)
            content = _read_content(path)
        except (OSError, FileError) as error:
            # Decoding will meet this again, and raise or skip. Until then, a content like no other's.
            _log.debug("cache: %s has no digest (%s)", path, error)
            return FileContent(f"unreadable {uuid.uuid4()}", grey=None)
        if content.grey is not None and started - max(stamp[1:]) > _SETTLED_NS:
            fresh[key] = [*stamp, content.digest, content.grey]
        return content

    contents = in_threads(look, paths)
    if fresh:
        kept = {key: entry for key, entry in index.items() if os.path.exists(key)}
        _write_json(index_path, kept | fresh)
    return contents


def _read_content(path: Path) -> FileContent:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            return FileContent(digest, is_grey(file))
        except UnreadableError:
            return FileContent(digest, grey=None)  # decoding will tell why


def decode_set(
    paths: Sequence[Path],
    contents: Sequence[FileContent],
    size: tuple[int, int],
    channels: int,
    skip_unreadable: bool,
    decoding: Decoding,
) -> DecodedSet:
    """The images of `paths` (with their `contents`) at a height and width, from the cache if it holds them.

    Raises:
        DataError: naming a file that cannot be read, unless `skip_unreadable`.
    """
    shape = (channels, *size)
    # Sets that were kept before there was a choice stay.
    bits = decoding.bit_depth
    version = _DECODING if bits == WHOLE_DEPTH else f"{_DECODING}, {bits} bits"
    key = _digest(json.dumps([version, shape, sorted(content.digest for content in contents)]))
    array_path, table_path = _in_cache(f"images-{key}.npy"), _in_cache(f"images-{key}.json")
    decoded = _read_set(array_path, table_path, contents, shape)
    if decoded is None:
        decoded, repeatable = _decode_set(paths, contents, shape, skip_unreadable, decoding)
        if repeatable:
            # The table goes last: without it the array does not count.
            pixels = decoded.pixels
            _write(array_path, lambda file: np.save(file, pixels, allow_pickle=False))
            _write_json(table_path, {"digests": decoded.digests, "unreadable": decoded.unreadable})
    if not skip_unreadable:
        for path, content in zip(paths, contents, strict=True):
            if content.digest in decoded.unreadable:
                raise error_about(path, decoded.unreadable[content.digest])
    return decoded


def _decode_set(
    paths: Sequence[Path],
    contents: Sequence[FileContent],
    shape: tuple[int, int, int],
    skip_unreadable: bool,
    decoding: Decoding,
) -> tuple[DecodedSet, bool]:
    """The images of `paths`, and whether the same contents will always give the same."""
    rows = np.empty((len(paths), *shape), np.uint8)
    reasons = decode_into(rows, paths, skip_unreadable, decoding)
    read = [i for i, reason in enumerate(reasons) if reason is None]
    digest_of = dict(zip(read, in_threads(lambda i: _digest(rows[i]), read), strict=True))
    unread = [i for i in range(len(paths)) if i not in digest_of]
    _reorder(rows, sorted(read, key=lambda i: digest_of[i]) + unread)
    decoded = DecodedSet(
        pixels=rows[: len(read)],
        digests={contents[i].digest: digest_of[i] for i in read},
        unreadable={contents[i].digest: str(reasons[i]) for i in unread},
    )
    return decoded, all(reason is None or reason.of_content for reason in reasons)


def _read_set(
    array_path: Path | None,
    table_path: Path | None,
    contents: Sequence[FileContent],
    shape: tuple[int, int, int],
) -> DecodedSet | None:
    """The cached set, or None if there is none or it is damaged: every row must have its digest."""
    table = _read_json(table_path)
    if array_path is None or table is None:
        return None
    try:
        digests, unreadable = dict(table["digests"]), dict(table["unreadable"])
        if not all(isinstance(text, str) for text in (*digests.values(), *unreadable.values())):
            raise ValueError("expected texts")
        open_regular(array_path).close()
        files = [content.digest for content in contents]
        wanted = sorted(digests[digest] for digest in files if digest not in unreadable)
        # Copy on write: pages come from the file as they are used, writing to them leaves it alone.
        pixels = np.load(array_path, mmap_mode="c", allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.shape != (len(wanted), *shape):
            raise ValueError(f"expected {(len(wanted), *shape)} uint8, got {pixels.shape} {pixels.dtype}")
        if in_threads(_digest, pixels) != wanted:
            raise ValueError("pixels differ from their digests")
    except Exception as error:  # of damaged bytes, whatever: the files themselves are there
        _log.debug("cache: %s is decoded again (%r)", array_path, error)
        return None
    return DecodedSet(pixels, digests, unreadable)


def _reorder(rows: np.ndarray, order: Sequence[int]) -> None:
    """rows[:] = rows[order] with one spare row: follow each cycle of the permutation around."""
    moved = [False] * len(order)
    for start in range(len(order)):
        spare, at = rows[start].copy(), start
        while not moved[at]:
            moved[at] = True
            rows[at] = spare if order[at] == start else rows[order[at]]
            at = order[at]


def _digest(content: str | np.ndarray) -> str:
    return hashlib.sha256(
        content.encode(errors="surrogateescape") if isinstance(content, str) else content.reshape(-1).data
    ).hexdigest()


def _in_cache(name: str) -> Path | None:
    folder = cache_folder()
    return folder / name if folder else None


def _read_json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        with open_regular(path) as file:
            content = json.loads(file.read())
        match content:
            case {"content": dict(known), "digest": digest} if digest == _digest_of(known):
                return known
        raise ValueError("content and digest differ")
    except (OSError, ValueError, RecursionError) as error:
        _log.debug("cache: nothing read from %s (%s)", path, error)
        return None


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    kept = {"content": content, "digest": _digest_of(content)}
    _write(path, lambda file: file.write(json.dumps(kept).encode()))


def _digest_of(content: dict[str, Any]) -> str:
    return _digest(json.dumps(content, sort_keys=True))


def _write(path: Path | None, write: Callable[[BinaryIO], Any]) -> None:
    """Write a whole file or nothing."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_DRAFT)
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # for as long as its writer lives
                write(file)
                file.flush()
                os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _log.debug("cache: %s is not written (%s)", path, error)


def _remove_left_over(folder: Path) -> None:
    """Remove drafts whose writer was killed."""
    for draft in folder.glob(f"{_DRAFT}*"):
        with contextlib.suppress(OSError), open(os.open(draft, os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()
