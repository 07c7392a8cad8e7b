"""Optuna's storages: the journal file of a run folder, and databases by their URL."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from ssad_hpo.address import without_password

OPENING_ATTEMPTS = 8


def open_journal(path: Path) -> JournalStorage:
    """Optuna's storage in a journal file, whose owner this process must be.

    A torn last line (a kill in mid-write) and the lock file of a dead owner would both stop Optuna; both
    are cleared away here, which is only right while nobody else has the file open.
    """
    if path.exists():
        _cut_torn_line(path)
        for stale in path.parent.glob(path.name + ".lock*"):
            stale.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        last = content[:whole].rstrip(b"\n").rpartition(b"\n")[2]
        try:
            json.loads(last or b"{}")
        except ValueError:  # no JSON, or (zeros, after a loss of power) no text at all
            whole -= len(last) + 1
        journal.truncate(whole)


def open_database(url: str) -> BaseStorage:
    """Optuna's storage at a database's URL; its tables are made where they are missing.

    Raises:
        ValueError: if it is no such URL, its driver is missing, or it cannot be reached.
    """
    # Optuna looks for its tables and then makes them, so that of several that meet a new database at once
    # all but one fail on some table, type or version that "already exists". They find it when they look anew.
    attempts = OPENING_ATTEMPTS
    while True:
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:  # SQLAlchemy's, a driver's, or an ImportError: no two alike
            attempts -= 1
            if attempts and "already exists" in str(error):
                # Apart from each other, whatever the seed.
                time.sleep(random.SystemRandom().uniform(0.1, 1.0))
                continue
            reason = str(error).partition("\n")[0].replace(url, without_password(url))
            raise ValueError(
                "storage: expected a database that can be opened, such as sqlite:///optuna.db, got "
                f"{without_password(url)!r} ({reason})"
            ) from error
