"""The run folder: everything that is needed to resume, evaluate and report a study."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

import optuna
from optuna.storages import BaseStorage

from ssad_hpo import storage, tracking, trust
from ssad_hpo.address import hides_password, without_password
from ssad_hpo.experiment.settings import Settings, in_format_2
from ssad_hpo.files import FileError, at_home, foreign, has_other_names, read_json, reading, replaced
from ssad_hpo.task import StudyRecorder

RUNS = Path("runs")  # where runs are looked for by name, below the current directory
# Where a storage URL with a password is taken from when a run is opened again.
STORAGE_VARIABLE = "SSAD_HPO_STORAGE"
_SETTINGS_FILE, _LOCK_FILE, _JOURNAL_FILE = "settings.json", "lock", "journal.log"
_FORMAT = 2


class RunError(FileError):
    """A run folder that is not there, not whole, or in use."""


class UnwritableError(RunError):
    """A run folder that this user or this process may only read."""


@dataclass(frozen=True)
class Run:
    """A run folder and its settings.

    Attributes:
        folder: absolute.
        settings: of its study.
        trusted: whether its addresses are the user's own, or vouched for; see `check_addresses`.
    """

    folder: Path
    settings: Settings
    trusted: bool = field(default=False, compare=False)

    @property
    def journal(self) -> Path:
        return self.folder / _JOURNAL_FILE

    @property
    def checkpoint(self) -> Path:
        """How far a tuning is."""
        return self.folder / "checkpoint.pt"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def combined(self) -> Path:
        """The combined detector, where one was asked for."""
        return self.folder / "combined"

    @property
    def settings_file(self) -> Path:
        return self.folder / _SETTINGS_FILE

    @property
    def picture(self) -> Path:
        """Normal images, and what the chosen augmentation makes of them; only where MLflow is told."""
        return self.folder / "choice.png"

    @property
    def later(self) -> Path:
        """What labels that came after the study have said of it."""
        return self.folder / "later.json"

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox.jsonl"

    def check_addresses(self, *names: str) -> None:
        """Ask whether the addresses of these settings, by default all, may be contacted.

        Those of a trusted run are remembered, so that nobody is asked about them again.

        Raises:
            FileError: for a remote one that the user never gave himself, or one whose password is not there.
        """
        for name, address in self.settings.addresses.items():
            if names and name not in names:
                continue
            if name == "tracking_uri" and hides_password(address):
                raise RunError(
                    f"{self.folder}: the password of {without_password(address)} is not kept; set "
                    f"{tracking.URI_VARIABLE} to the whole address"
                )
            if self.trusted:
                trust.remember(name, address)
            else:
                trust.check_known(self.folder, name, address)

    def open_storage(self, *, create: bool = False) -> BaseStorage:
        """Optuna's storage: the journal, or the database that the settings name, which must be there.

        Args:
            create: it is to be written to: make a journal where there is none yet, and clear away what a dead
                process left in one. Else the folder stays as it is.

        Raises:
            RunError: if there is none. ValueError: if the database cannot be opened, or is elsewhere and the
                user never gave its address.
        """
        self.check_addresses("storage")
        if self.settings.storage:
            return storage.open_database(self.settings.storage)
        if not create and not self.journal.is_file():
            raise RunError(f"{self.folder}: its study was stopped before its first trial; resume it")
        return storage.open_journal(self.journal) if create else storage.read_journal(self.journal)

    def open_study(
        self, open_in: Callable[[BaseStorage], optuna.Study], *, create: bool = False
    ) -> optuna.Study:
        """Its study, all of which was read once.

        Args:
            open_in: gives it, of the storage that it is in.
            create: as in `open_storage`.

        Raises:
            FileError: for one that Optuna did not write so. ValueError: as `open_storage`.
        """
        found = self.open_storage(create=create)
        return storage.open_whole(lambda: open_in(found), self.settings.storage or str(self.journal))

    def open_recorder(self) -> StudyRecorder:
        """What writes the run to MLflow; with tracking off, what writes nothing.

        Raises:
            FileError: for a server whose address the user never gave.
        """
        self.check_addresses("tracking_uri")
        settings = self.settings
        if settings.tracking_uri is None:
            return tracking.SilentRecorder()
        return tracking.MlflowRecorder(
            self.outbox,
            settings.tracking_uri,
            settings.experiment,
            settings.study_name,
            title=settings.title,
            word=settings.word,
        )

    def undelivered(self) -> int:
        """How many records MLflow did not take yet."""
        return tracking.pending(self.outbox) if self.settings.tracking_uri else 0

    def write(self) -> None:
        """Write the settings into the folder, which is made if need be; whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        text = json.dumps({"format": _FORMAT, **self.settings.to_json()}, indent=2) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.settings_file) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.folder}: the run folder cannot be written ({error.strerror})") from error


def choose_run_folder(name: str | Path | None, task_name: str) -> Path:
    """Where a new run goes; nothing is made yet.

    Args:
        name: a path, or a name below runs/; None makes one from the task's name and the time.

    Raises:
        RunError: if there is something already, or for a name with control characters.
    """
    if name is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        task = re.sub(r"[^\w.,+=-]", "-", task_name).lstrip("-")[:100]
        name = f"{task}-{stamp}-{uuid.uuid4().hex[:4]}"
    folder = _place(name)
    if not folder.name.isprintable():
        raise RunError(f"run: expected a name that can be printed, got {folder.name!a}")
    _check_free(folder)
    return folder


def _check_free(folder: Path) -> None:
    """Raise RunError if there is something at the place of a new run, but for what a kill left of none."""
    left = {_LOCK_FILE, f"{_SETTINGS_FILE}.partial"}
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - left):
        raise RunError(f"{folder}: exists already; go on with it by --resume, or choose another name")


def open_run(name: str | Path, *, trust_addresses: bool = False) -> Run:
    """Open a run folder, given as a path or as a name below runs/; none of its addresses is contacted.

    Args:
        trust_addresses: vouch for the addresses in its settings, to which passwords and images may go. It is
            needed for a run from elsewhere, if they are remote and the user never gave them himself.

    Raises:
        RunError: if there is none, its settings cannot be read, or a file in it is a link; the message lists
            the runs there are.
    """
    folder = _place(name)
    path = folder / _SETTINGS_FILE
    if not path.is_file():
        known = sorted(p.parent.name for p in RUNS.glob(f"*/{_SETTINGS_FILE}"))
        there = f"; runs here: {', '.join(known)}" if known else ""
        raise RunError(f"{folder}: holds no run (no {_SETTINGS_FILE}){there}")
    _check_own(folder)
    remedy = "restore it from a copy, or start a new run"
    with reading(path, "cannot be read as a run's settings", remedy, RunError):
        values = read_json(path)
        found = values.pop("format")
        if found not in (1, _FORMAT):
            raise RunError(f"{folder}: written by a newer version of ssad_hpo; update it to read this run")
        if found == 1:
            values = in_format_2(values)
        if hides_password(values["tracking_uri"]) and os.environ.get(tracking.URI_VARIABLE):
            values["tracking_uri"] = tracking.default_tracking_uri()
        if hides_password(values["storage"]):
            values["storage"] = _storage_from_environment(folder, values["storage"])
        return Run(folder, Settings.from_json(values), trust_addresses)


def _check_own(folder: Path) -> None:
    """Raise RunError if what a run writes or sends would be another file's; its artifacts may be on a disk
    of their own."""
    for entry in folder.iterdir():
        if entry.name.startswith(_JOURNAL_FILE + ".lock"):  # Optuna's own
            continue
        replaced_whole = entry.name in ("combined", "report")
        with suppress(FileNotFoundError):  # replaced meanwhile
            if entry.is_symlink() and (replaced_whole or not entry.is_dir()):
                fault = "is a link, and what a run writes there would go elsewhere"
            elif not (entry.is_file() or entry.is_dir()) and os.path.lexists(entry):
                fault = "is a FIFO, a socket or a device"
            elif entry.is_file() and has_other_names(entry):
                fault = "has another name elsewhere (a hard link), whose content a run would change"
            else:
                continue
            raise RunError(f"{folder}: {entry.name!r} {fault}; put the file itself in its place")
    for inner in ("artifacts", "combined"):
        if (reason := foreign(folder / inner, names=False)) is not None:
            raise RunError(f"{reason}, expected a run's own files; put the file itself in its place")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Own a new run folder, which is made; of several processes that ask for it, one gets it.

    Raises:
        RunError: if it cannot be made, or somebody else was faster.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be written ({error.strerror})") from error
    with locked(folder):
        _check_free(folder)
        yield


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Own a run folder; the lock goes with the process, however it ends.

    Args:
        shared: with other processes that read. Nothing is made or written then; a folder without a lock
            that could be read is nobody's, and is read as it is.

    Raises:
        RunError: if another process has it; the message names it.
        UnwritableError: if the lock cannot be written, unless it is shared.
    """
    path = folder / _LOCK_FILE
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: is no file; remove it")
    lock: TextIO | None = None
    try:
        lock = path.open("r" if shared else "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        if not shared:
            raise UnwritableError(
                f"{folder}: the run folder cannot be written ({error.strerror}); get the right to it, or use "
                "a copy of it"
            ) from error
    if lock is None:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder}: in use by {_owner(lock)}; wait for it or stop it first") from error
        except OSError:  # as on some network mounts
            warnings.warn(f"{folder}: cannot be locked; let no other process work on it", stacklevel=3)
        if not shared:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        yield


def _owner(lock: TextIO) -> str:
    """Who has a lock that could not be had; only those that write have put their name down."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        return lock.read().strip() or "another process"
    fcntl.flock(lock, fcntl.LOCK_UN)
    return "a process that reads it"


def _storage_from_environment(folder: Path, starred: str) -> str:
    if STORAGE_VARIABLE not in os.environ:
        raise RunError(
            f"{folder}: the password of {starred} is not kept; set {STORAGE_VARIABLE} to the whole URL"
        )
    return os.environ[STORAGE_VARIABLE]


def _place(name: str | Path) -> Path:
    """A bare name is a run below runs/, unless there is such a folder right here, or ./ says so."""
    path = at_home(name)
    bare = len(path.parts) == 1 and not path.is_absolute() and not str(name).startswith("./")
    if bare and not path.is_dir():
        path = RUNS / path
    return path.absolute()
