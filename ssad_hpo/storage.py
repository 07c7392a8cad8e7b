"""Optuna's storages: the journal file of a run folder, and databases by their URL."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError

from ssad_hpo.address import without_password, without_password_of
from ssad_hpo.files import FileError, at_home, folder_locked, open_regular, reading


def open_journal(path: Path) -> JournalStorage:
    """Optuna's storage in a journal file, whose owner this process must be.

    A torn last line (a kill in mid-write) and the lock file of a dead owner would both stop Optuna; both
    are cleared away here, which is only right while nobody else has the file open.
    """
    if path.exists():
        open_regular(path).close()
        _cut_torn_line(path)
        for stale in path.parent.glob(path.name + ".lock*"):
            stale.unlink(missing_ok=True)
    with reading(path, "cannot be read as Optuna's journal", "restore it from a copy, or start a new run"):
        return JournalStorage(JournalFileBackend(str(path)))


def read_journal(path: Path) -> JournalStorage:
    """As `open_journal` for who only reads: the folder, which may be read-only, stays as it is."""
    open_regular(path).close()
    with reading(path, "cannot be read as Optuna's journal", "restore it from a copy, or start a new run"):
        return JournalStorage(_WholeLines(str(path)))


class _WholeLines(JournalFileBackend):
    """A journal as far as a kill has not torn it; one that is torn takes no line more."""

    def __init__(self, file_path: str) -> None:
        super().__init__(file_path)
        self._torn = self._lines() is not None

    def _lines(self) -> list[bytes] | None:
        """The whole ones before a torn one; None if none is torn."""
        content = Path(self._file_path).read_bytes()
        whole = _whole(content)
        return None if whole == len(content) else content[:whole].splitlines()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        lines = self._lines() if self._torn else None
        if lines is None:
            yield from super().read_logs(log_number_from)
        else:
            yield from map(json.loads, lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._torn and self._lines() is not None:
            raise FileError(f"{self._file_path}: its last line was torn by a kill; resume its run first")
        super().append_logs(logs)


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as journal:
        journal.truncate(_whole(journal.read()))


def _whole(content: bytes) -> int:
    """How many bytes of a journal are whole lines."""
    whole = content.rfind(b"\n") + 1
    last = content[:whole].rstrip(b"\n").rpartition(b"\n")[2]
    try:
        json.loads(last or b"{}")
    except ValueError:  # no JSON, or (zeros, after a loss of power) no text at all
        whole -= len(last) + 1
    return whole


def open_whole(open_study: Callable[[], optuna.Study], where: str) -> optuna.Study:
    """A study of which everything was read once: what Optuna did not write is told before any work.

    A database that is there and whole, but cannot be had now, is not told as damaged.

    Args:
        open_study: such as a call of `optuna.load_study`.
        where: its storage, for people.

    Raises:
        FileError: for what Optuna does not write, or a database that is locked, out of reach, or refuses this
            process. As `open_study`, if that is one of these.
    """
    remedy = "restore it from a copy, or start a new run"
    with reading(without_password(where), "cannot be read as a study of Optuna's", remedy), _obstacles(where):
        study = open_study()
        _check(study)
    return study


def _check(study: optuna.Study) -> None:
    """Raise, whatever it may be, for a study that is not as this package's are."""
    if study.directions != [StudyDirection.MINIMIZE]:
        raise ValueError("expected one that minimises a value")
    _ = study.user_attrs, study._storage.get_study_system_attrs(study._study_id)
    trials = study.get_trials(deepcopy=False)
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise ValueError(f"expected {len(trials)} trials that are numbered from 0 on")
    for trial in trials:
        if trial.state == TrialState.COMPLETE and not isinstance(trial.value, float):
            raise ValueError(f"trial {trial.number} has no number as its value")


def absolute_storage(url: str) -> str:
    """The URL of a database, an SQLite file's path made absolute: runs are opened from anywhere.

    Raises:
        ValueError: for SQLite in memory, which no later command could open.
    """
    driver, mark, path = url.partition(":///")
    if driver.partition("+")[0] != "sqlite" and not url.startswith("sqlite:"):
        return url
    path, query, options = path.partition("?")
    if not mark or path in ("", ":memory:") or path.startswith("file:"):
        raise ValueError(
            f"storage: expected the file of a database, as sqlite:///optuna.db, got {without_password(url)!r}"
        )
    return f"{driver}:///{at_home(path).absolute()}{query}{options}"


def open_database(url: str, *, create: bool = False) -> BaseStorage:
    """Optuna's storage at a database's URL.

    Args:
        url: absolute; see `absolute_storage`.
        create: make the database's file and tables where they are missing; else nothing is made.

    Raises:
        FileError: if it is locked, out of reach, or refuses this process. PermissionError: likewise.
        ValueError: if it is no such URL, its driver is missing, it is not there, or none of Optuna's.
    """
    try:
        with _obstacles(url):
            return _opened(url, create)
    except (FileError, PermissionError):
        raise
    except Exception as error:  # SQLAlchemy's, a driver's, or an ImportError: no two alike
        reason = without_password_of(url, _said(error))
        raise ValueError(
            "storage: expected a database that can be opened, such as sqlite:///optuna.db, got "
            f"{without_password(url)!r} ({reason})"
        ) from error


def _opened(url: str, create: bool) -> BaseStorage:
    if create:
        # Optuna looks for its tables and then makes them: two at once would make them twice.
        with _alone(url):
            return optuna.storages.get_storage(url)
    _check_file(url)
    # The object that Optuna itself makes of a URL, but for the tables.
    return optuna.storages.get_storage(RDBStorage(url, skip_table_creation=True))


@contextlib.contextmanager
def _obstacles(url: str) -> Iterator[None]:
    """Raise FileError, with the remedy, for what keeps a sound database from being read just now."""
    try:
        yield
    except Exception as error:
        driver = _of_driver(error)
        if driver is None or (told := _obstacle(driver)) is None:
            raise
        fault, remedy = told
        reason = without_password_of(url, _said(driver))
        raise FileError(f"{without_password(url)}: {fault} ({reason}); {remedy}") from error


def _said(error: BaseException) -> str:
    """The first line of what a driver says, else of the error itself."""
    return str(getattr(_of_driver(error), "orig", None) or error).partition("\n")[0]


def _of_driver(error: BaseException | None) -> SQLAlchemyError | None:
    """SQLAlchemy's error behind one of Optuna's, which says no more than that something failed."""
    while error is not None and not isinstance(error, SQLAlchemyError):
        error = error.__cause__
    return error


def _obstacle(error: SQLAlchemyError) -> tuple[str, str] | None:
    """What is wrong and what to do, if it is not the database's content that is at fault."""
    said = getattr(error, "orig", None)
    if isinstance(said, sqlite3.Error):
        code = getattr(said, "sqlite_errorcode", 0) & 0xFF  # the rest says more of the same
        # Others say that there is no such table, or no database at all.
        return next(((fault, remedy) for codes, fault, remedy in _OF_SQLITE if code in codes), None)
    denied = "42501" in (getattr(said, "sqlstate", None), getattr(said, "pgcode", None))
    if denied or isinstance(error, OperationalError | InterfaceError | TimeoutError):
        return (
            "cannot be reached, or refuses this process",
            "see that its server is up, and that host, user and password are right and have the rights, then "
            "try again",
        )
    return None


# SQLite's codes, by what is wrong and what to do.
_OF_SQLITE = (
    (
        (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
        "is locked by another process",
        "wait for it or stop it, then try again",
    ),
    (
        (sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH),
        "the system refuses it",
        "check the path and its permissions",
    ),
    ((sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL), "its disk fails", "see to that, then try again"),
)


def _check_file(url: str) -> None:
    """Raise FileNotFoundError for an SQLite database without a file, which opening it would make."""
    if url.startswith("sqlite") and not Path(url.partition(":///")[2].partition("?")[0]).is_file():
        raise FileNotFoundError("there is no such file; was it moved?")


@contextlib.contextmanager
def _alone(url: str) -> Iterator[None]:
    """While this is held, no other process that asks for it makes tables in the same database."""
    if url.startswith("sqlite"):
        # Behind links: who comes by another name waits at the same folder.
        with folder_locked(Path(url.partition(":///")[2].partition("?")[0]).resolve().parent):
            yield
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    held = _SERVER_LOCKS.get(engine.dialect.name)
    try:
        with engine.connect() as connection:
            if held is not None:
                connection.execute(sqlalchemy.text(held))
            yield
    finally:
        engine.dispose()  # the lock goes with the connection


# A lock of the connection's own, as the server's SQL has it.
_SERVER_LOCKS = {
    "postgresql": "SELECT pg_advisory_lock(hashtext('ssad_hpo'))",
    "mysql": "SELECT GET_LOCK('ssad_hpo', 60)",
    "mariadb": "SELECT GET_LOCK('ssad_hpo', 60)",
}
