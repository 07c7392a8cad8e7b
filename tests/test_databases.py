"""Databases of studies that cannot be had: a locked, unreachable or forbidden one is not told as damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from conftest import Ended
from optuna.exceptions import StorageInternalError
from servers import free_port
from sqlalchemy.exc import OperationalError, ProgrammingError
from starting import start_study

from ssad_hpo import Training, controlled_data
from ssad_hpo.files import FileError
from ssad_hpo.storage import open_database, open_whole

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """An SQLite file with a study of two trials."""
    path = tmp_path / "optuna.db"
    storage = open_database(f"sqlite:///{path}", create=True)
    study = optuna.create_study(storage=storage, study_name="study")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    return path


def read(path: Path, before: Callable[[], object] = lambda: None) -> int:
    """Open the database, let something happen, read its study: how many trials it has."""
    url = f"sqlite:///{path}?timeout=0.05"
    storage = open_database(url)
    before()
    study = open_whole(lambda: optuna.load_study(study_name="study", storage=storage), url)
    return len(study.trials)


@contextlib.contextmanager
def held(path: Path) -> Iterator[Callable[[], object]]:
    """What locks a database as another process at work does, until this ends."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        yield lambda: other.execute("BEGIN EXCLUSIVE")
    finally:
        other.close()


LOCKED = r"optuna\.db\?timeout=0\.05: is locked by another process \(database is locked\); wait for it"


def test_a_locked_database_is_told_as_locked_and_read_afterwards(database: Path) -> None:
    with held(database) as lock:
        with pytest.raises(FileError, match=LOCKED):
            read(database, lock)
        with pytest.raises(FileError, match=LOCKED):
            read(database)
        with pytest.raises(FileError, match=LOCKED):
            open_database(f"sqlite:///{database}?timeout=0.05", create=True)
    assert read(database) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment")
def test_a_forbidden_database_is_told_as_forbidden(database: Path) -> None:
    said = r"the system refuses it \(unable to open database file\); check the path and its permissions$"
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        copy = Path(shutil.copy(database, place))
        copy.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(FileError, match=said):
                read(copy)
        finally:
            os.seteuid(0)


def test_a_database_that_is_none_or_damaged_is_told_so(database: Path) -> None:
    whole = database.read_bytes()
    torn = whole[:4096] + b"\xff" * (len(whole) - 4096)
    for content, reason in (
        (b"x" * len(whole), "not a database"),
        (torn, "malformed"),
        (b"", "no such table"),
    ):
        with pytest.raises(ValueError, match=f"storage: expected a database that can be opened.*{reason}"):
            database.write_bytes(content)
            read(database)
    database.write_bytes(whole)

    def lose_its_trials() -> None:
        with sqlite3.connect(database) as other:
            other.execute("DROP TABLE trials")

    with pytest.raises(FileError, match=r"cannot be read as a study of Optuna's .*restore it from a copy"):
        read(database, lose_its_trials)


@pytest.mark.parametrize("create", [True, False])
def test_a_server_that_is_not_there_is_told_as_that_without_its_password(create: bool) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql+psycopg://me:s3cret@127.0.0.1:{free_port()}/studies"
    with pytest.raises(
        FileError, match=r"cannot be reached, or refuses this process \(.*refused.*that its server is up"
    ) as told:
        open_database(url, create=create)
    assert "s3cret" not in str(told.value) and "\n" not in str(told.value)


class DeniedError(Exception):
    """As PostgreSQL's drivers raise it for a table of somebody else's."""

    sqlstate = "42501"


class UndefinedError(Exception):
    """As they raise it where a table is missing."""

    sqlstate = "42P01"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OperationalError("SELECT 1", None, Exception("(2003, 'no route to host')")), "cannot be reached"),
        (
            ProgrammingError("SELECT 1", None, DeniedError("permission denied")),
            "or refuses",
        ),
        (
            ProgrammingError("SELECT 1", None, UndefinedError('"studies" does not exist')),
            "cannot be read as a study",
        ),
    ],
)
def test_what_a_server_says_while_a_study_is_read(error: Exception, told: str) -> None:
    def read_study() -> optuna.Study:
        raise StorageInternalError("An exception is raised during the commit.") from error

    with pytest.raises(FileError, match=told):
        open_whole(read_study, "mysql://me:s3cret@db/studies")


def test_a_command_says_in_a_sentence_that_its_runs_database_is_locked(
    tmp_path: Path, call: Callable[..., Ended]
) -> None:
    task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    training = Training(steps=4, batch_size=4, width=2, evaluate_at=(1.0,))
    url = f"sqlite:///{tmp_path}/runs.db?timeout=0.05"
    start_study(task, n_trials=1, training=training, run="r", storage=url, tracking_uri=None)
    with held(tmp_path / "runs.db") as lock:
        lock()
        said = call("report", "r")
    (sentence,) = said.err.splitlines()
    assert said.code == 2 and "is locked by another process (database is locked); wait for it" in sentence
