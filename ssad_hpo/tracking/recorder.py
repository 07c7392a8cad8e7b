"""The recorder that writes to MLflow, and what starts and ends the process that delivers its outbox."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ssad_hpo import trust
from ssad_hpo.address import without_password
from ssad_hpo.tracking.outbox import append_record, create_outbox, pending, read_settings
from ssad_hpo.tracking.uri import absolute_uri, sqlite_file

if TYPE_CHECKING:
    from ssad_hpo.task import Status

log = logging.getLogger(__name__)

WRITER_ENVIRONMENT = {  # where the user has not set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow's 120 would outlast `close`
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the writer has its own backoff
    "MLFLOW_UV_AUTO_DETECT": "false",  # of a project that the database may lie in, which is not ours
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class SyncResult:
    """What a delivery did.

    Attributes:
        delivered: records delivered.
        remaining: records that still wait in the outbox.
        refused: what MLflow will not take, each with its reason; kept, and tried again by `sync`.
        error: why the delivery stopped; None if nothing stopped it.
    """

    delivered: int
    remaining: int
    refused: tuple[str, ...] = ()
    error: str | None = None


class MlflowRecorder:
    """Appends records to an outbox and, between `start` and `close`, has them delivered to MLflow.

    A `task.StudyRecorder`. Copies, pickled or forked, append to the same outbox; the writer process belongs
    to the process that started it, and ends with it.

    Attributes:
        outbox: a file such as RUN/outbox.jsonl; state, lock and log of its delivery lie beside it. One
            that exists is this same study, resumed.
        tracking_uri: where to deliver; see `absolute_uri` for what it may be.
        lost: records that could not be appended, on a full disk for instance: told in the log, and
            never raised, since a recorder may not hold the study up.
        result: what the writer said when it was closed; None before, or if it had to be stopped.
        trouble: why it did not deliver all; None if it did.

    Args:
        experiment: its name, or "#ID".
        title: the name of the parent run, where no other run of the experiment has it; `study_name` if None.
        word: what a trial is called in the names of the child runs.
    """

    def __init__(
        self,
        outbox: Path,
        tracking_uri: str,
        experiment: str,
        study_name: str,
        *,
        title: str | None = None,
        word: str = "trial",
    ) -> None:
        self.lost = 0
        self._reported: dict[str, tuple[int, dict[str, float | str]]] = {}
        self.outbox, self.tracking_uri = Path(outbox).absolute(), absolute_uri(tracking_uri)
        trust.remember("tracking_uri", self.tracking_uri)
        self.result: SyncResult | None = None
        self.trouble: str | None = None
        self._writer: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        settings = {
            "study_name": study_name,
            "title": title or study_name,
            "word": word,
            "experiment": experiment,
            "tracking_uri": without_password(self.tracking_uri),
        }
        create_outbox(self.outbox, {"study": uuid.uuid4().hex, **settings})
        known = read_settings(self.outbox)
        if known != known | settings:
            self._append(known | settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}

    def _append(self, record: dict[str, Any]) -> None:
        try:
            append_record(self.outbox, record)
        except OSError as error:
            if not self.lost:
                log.error("%s: records for MLflow are being lost: %s", self.outbox, error)
            self.lost += 1

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A trial begins; one that began before, in an interrupted process, goes on in the same run."""
        self._append(
            {"trial": str(trial), "status": "running", "params": _texts(params), "tags": _texts(tags)}
        )

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        self._reported[trial] = (int(step), _numbers(metrics))
        self._append({"trial": str(trial), "step": int(step), "metrics": _numbers(metrics)})

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        """A trial is over. Metrics belong to the last step reported; values reported there already are
        not repeated."""
        step, reported = self._reported.pop(trial, (0, {}))
        last = {key: value for key, value in _numbers(metrics).items() if reported.get(key) != value}
        self._append(
            {"trial": str(trial), "status": status, "step": step, "metrics": last, "tags": _reason(reason)}
        )

    def trial_metrics(self, trial: str, metrics: Mapping[str, float]) -> None:
        self._append({"trial": str(trial), "metrics": _numbers(metrics)})

    def trial_tags(self, trial: str, tags: Mapping[str, str]) -> None:
        self._append({"trial": str(trial), "tags": _texts(tags)})

    def study_started(
        self, params: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, str] | None = None
    ) -> None:
        begun = {"status": "running", "params": _texts(params), "tags": _texts(tags)}
        self._append(begun if dataset is None else {**begun, "dataset": dict(dataset)})

    def study_note(self, markdown: str) -> None:
        self._append({"note": markdown})

    def study_metrics(self, metrics: Mapping[str, float]) -> None:
        self._append({"metrics": _numbers(metrics)})

    def study_tags(self, tags: Mapping[str, str]) -> None:
        self._append({"tags": _texts(tags)})

    def study_ended(self, status: Status, reason: str | None = None) -> None:
        self._append({"status": status, "tags": _reason(reason)})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file for MLflow, which lies below the outbox's folder; others are refused."""
        self._append({"artifact": self._below(path), "folder": folder})

    def model(
        self,
        path: Path,
        folder: str,
        requirements: Sequence[str],
        settings: Mapping[str, Any],
        register: str | None = None,
    ) -> None:
        """A detector's folder, below the outbox's, to become an MLflow model; see `task.StudyRecorder`."""
        what = {"requirements": list(requirements), "settings": dict(settings), "register": register}
        self._append({"model": self._below(path), "folder": folder, **what})

    def _below(self, path: Path) -> str:
        """A path from the outbox's folder on, which may be moved before all is delivered."""
        path, folder = Path(path).absolute(), self.outbox.parent.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the writer process; it imports MLflow once there is something to deliver."""
        if self._writer is None:
            self._writer, self._owner = _start_writer("follow", self.outbox, self.tracking_uri), os.getpid()

    def close(self, timeout: float = 60.0) -> int:
        """Have the rest delivered, in one attempt of at most `timeout` seconds, and stop the writer.

        A server that does not answer takes no longer than one request; a model to send is what takes time.

        Returns how many records wait in the outbox for `sync`.
        """
        if self._writer is not None and self._owner == os.getpid():
            self.result = _end_writer(self._writer, timeout)
            self._writer = None
            stopped = f"the writer did not finish in {timeout:g} s, see {self.outbox.with_suffix('.log')}"
            for problem in (self.result.error, *self.result.refused) if self.result else (stopped,):
                if problem:
                    log.warning("MLflow: %s", problem)
                    self.trouble = self.trouble or problem
        return pending(self.outbox) if self.outbox.exists() else 0


def sync(outbox: Path, tracking_uri: str) -> SyncResult:
    """Deliver what is missing, and try again what was refused.

    Another `tracking_uri` than the study's gets the whole study. Ends at the first failure of the server,
    which takes no longer than MLFLOW_HTTP_REQUEST_TIMEOUT (10 s if it is not set).

    Raises:
        ValueError: for no usable tracking URI.
    """
    outbox = Path(outbox).absolute()
    result = _end_writer(_start_writer("once", outbox, absolute_uri(tracking_uri)), timeout=None)
    failure = f"the writer process failed, see {outbox.with_suffix('.log')}"
    return result or SyncResult(0, pending(outbox), error=failure)


# A process and not a thread. MLflow costs some 3 s of Python to import and to set up a database: a thread
# takes them from the training loop through the GIL, and its imports can meet the loop's own half-done; a
# process at low priority takes the time that is left. And MLflow's timeouts and telemetry are set by
# environment variables alone: here they touch nothing else of the user's.
_PROGRAM = """
import sys
package_root = sys.argv.pop(1)
if package_root not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, package_root)
from ssad_hpo.tracking.delivery import main
main()
"""


def _start_writer(mode: str, outbox: Path, tracking_uri: str) -> subprocess.Popen[bytes]:
    database = sqlite_file(tracking_uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    package_root = str(Path(__file__).parents[2])
    # The URI travels by the environment: a process list would show its password.
    environment = {**WRITER_ENVIRONMENT, **os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    with open(outbox.with_suffix(".log"), "ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, package_root, mode, str(outbox), str(os.getpid())],
            # MLflow puts artifacts of a database without a server into ./mlruns: beside the database.
            cwd=database.parent if database else None,
            env=environment,
            stdin=subprocess.PIPE,  # says "close"; its end says that this process is gone
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the study, which closes its writer itself
        )


def _end_writer(writer: subprocess.Popen[bytes], timeout: float | None) -> SyncResult | None:
    try:
        output, _ = writer.communicate(b"close\n", timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.communicate()
    if not output:
        return None
    said = json.loads(output.splitlines()[-1])
    return SyncResult(**{**said, "refused": tuple(said["refused"])})


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no inf and nan: they become text."""
    numbers = {str(key): float(value) for key, value in values.items()}
    return {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}


def _reason(reason: str | None) -> dict[str, str]:
    return {} if reason is None else {"reason": reason}
