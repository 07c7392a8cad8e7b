"""The outbox: a file of JSON lines to be delivered to MLflow, and the state of its delivery beside it.

Every line is one `os.write` to a file opened for appending, so several processes may write at once.
A record holds "v" (version), "at" (ms since 1970), and any of "trial" (none for the study itself),
"status", "params", "tags", "metrics" with "step", "artifact" with "folder", "note" (Markdown), "dataset",
"model" with "folder", "requirements", "settings" and "register". Lines that begin with "study" hold settings;
the first names the study by a unique id.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssad_hpo.files import open_regular, read_json, reading

log = logging.getLogger(__name__)

VERSION = 1
_SETTINGS = ("study", "study_name", "experiment", "tracking_uri")
Record = dict[str, Any]


def append_record(outbox: Path, record: Record) -> None:
    """Append one line. Survives a kill of the process, not a loss of power (no fsync).

    Raises:
        OSError: where the disk is full or the file gone.
    """
    line = _line(record)
    file = os.open(outbox, os.O_RDWR | os.O_APPEND)
    try:
        if os.pread(file, 1, os.fstat(file).st_size - 1) != b"\n":  # a line torn by a kill: start afresh
            line = b"\n" + line
        if os.write(file, line) != len(line):
            raise OSError("the record was written in part")
    finally:
        os.close(file)


def _line(record: Record) -> bytes:
    record = {**record, "v": VERSION, "at": time.time_ns() // 1_000_000}
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def create_outbox(outbox: Path, settings: Record) -> None:
    """Make an outbox of these settings ("study" first), whole or not at all; leaves one that exists."""
    outbox.parent.mkdir(parents=True, exist_ok=True)
    draft = outbox.with_suffix(f".{settings['study']}")
    draft.write_bytes(_line(settings))
    # A draft that is gone was cleared away by somebody whose outbox is there.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(draft, outbox)
    draft.unlink(missing_ok=True)
    for left in outbox.parent.glob(f"{outbox.stem}.{'[0-9a-f]' * 32}"):  # by a kill before its end
        left.unlink(missing_ok=True)


def read_settings(outbox: Path) -> dict[str, str]:
    """The latest settings: study (its unique id), study_name, experiment, tracking_uri; title and word.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is not an outbox.
    """
    with open_regular(outbox) as lines:
        found = [line for line in lines if line.startswith(b'{"study"') and line.endswith(b"\n")]
    if not found:
        raise ValueError(f"outbox: expected a file that MlflowRecorder wrote, got {outbox}")
    with reading(outbox, "cannot be read as records for MLflow", "restore it from a copy, or do without"):
        settings = {key: value for key, value in json.loads(found[-1]).items() if key not in ("v", "at")}
        if not all(isinstance(settings[name], str) for name in _SETTINGS):
            raise ValueError(f"expected texts as {', '.join(_SETTINGS)}")
        return settings


def read_records(outbox: Path, offset: int) -> Iterator[tuple[int, Record | None]]:
    """(offset after the line, its record) for every whole line; None for settings and torn lines.

    Raises:
        ValueError: for lines of a later version.
    """
    with open_regular(outbox) as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return  # being written, or torn by a kill: the next append ends it
            offset += len(line)
            record = _parsed(line)
            if record is None:
                log.warning("%s: skipped a torn line that ends at byte %d: %.80r", outbox, offset, line)
            elif int(record["v"]) > VERSION:
                raise ValueError(f"{outbox}: lines of version {record['v']} need a later ssad_hpo")
            yield offset, None if record is None or "study" in record else record


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        int(record["at"]), int(record["v"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return dict(record)


@dataclass
class State:
    """How far an outbox is delivered, and to which server."""

    study: str
    tracking_uri: str
    offset: int = 0  # bytes delivered
    experiment_id: str | None = None
    runs: dict[str, str] = field(default_factory=dict)  # trial -> MLflow's run id; "" is the parent
    unsure: bool = True  # MLflow may hold runs of this study that `runs` lacks
    refused: list[dict[str, Any]] = field(default_factory=list)  # {"record": ..., "reason": ...}


def load_state(outbox: Path, tracking_uri: str | None = None) -> State:
    """The state of delivery to a server (without one: to the last); a fresh one where there is none."""
    study = read_settings(outbox)["study"]
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
        state = State(**read_json(outbox.with_suffix(".state.json")))
        sound = isinstance(state.runs, dict) and isinstance(state.refused, list)
        sound = sound and isinstance(state.offset, int) and 0 <= state.offset <= outbox.stat().st_size
        if sound and state.study == study and tracking_uri in (None, state.tracking_uri):
            return state
    return State(study, tracking_uri or "")


def save_state(outbox: Path, state: State) -> None:
    """Replace the state as a whole."""
    draft = outbox.with_suffix(".state.json.new")
    draft.write_text(json.dumps(asdict(state)), encoding="utf-8")
    os.replace(draft, outbox.with_suffix(".state.json"))


def pending(outbox: Path) -> int:
    """How many whole records of the outbox are not delivered yet."""
    return sum(record is not None for _, record in read_records(outbox, load_state(outbox).offset))


@contextlib.contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Hold an exclusive lock on a file of its own.

    Raises:
        TimeoutError: if another process still has it after `wait` seconds.
    """
    deadline = time.monotonic() + wait
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.05)
        yield
