"""Takes an outbox to MLflow; runs in the writer process.

A delivery may be cut off anywhere and repeated, and nothing doubles: runs carry a unique tag and are
found again by it, parameters and tags are set to the same values, and MLflow's databases keep one row for
the same (run, metric, time, step, value).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import select
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ssad_hpo.address import without_password, without_password_of
from ssad_hpo.tracking.outbox import (
    State,
    load_state,
    locked,
    pending,
    read_records,
    read_settings,
    save_state,
)
from ssad_hpo.tracking.recorder import SyncResult
from ssad_hpo.tracking.runs import KEY, send
from ssad_hpo.tracking.uri import sqlite_file, sqlite_uri
from ssad_hpo.tracking.view import own_tags, view_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

POLL, LONGEST_PAUSE = 1.0, 60.0  # seconds between looks at the outbox, doubled with every failure
CHUNK = 1000  # records between two writes of the state
_LONGEST = 300  # characters of a reason
PAGE = 1000  # runs in one answer of a search


def main() -> None:
    """The writer process: MODE OUTBOX PARENT, the tracking URI in the environment.

    "once" delivers; "follow" delivers whenever the outbox has grown, until standard input says to close
    (then once more) or ends, because the study's process is gone. Prints a SyncResult as JSON.
    """
    mode, outbox, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    tracking_uri = os.environ["MLFLOW_TRACKING_URI"]
    handler = logging.StreamHandler()
    handler.setFormatter(_Starred(tracking_uri))
    logging.basicConfig(handlers=[handler])

    def orphaned() -> bool:
        return os.getppid() != parent

    if mode == "once":
        result = deliver(outbox, tracking_uri, retry_refused=True, wait=30.0, stop=orphaned)
    else:
        os.nice(10)  # the study goes first
        result = _follow(outbox, tracking_uri, orphaned)
    with contextlib.suppress(BrokenPipeError):  # nobody is left to hear it
        os.write(sys.stdout.fileno(), json.dumps(asdict(result)).encode())


class _Starred(logging.Formatter):
    """What libraries log may hold the address with its password."""

    def __init__(self, tracking_uri: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.tracking_uri = tracking_uri

    def format(self, record: logging.LogRecord) -> str:
        return without_password_of(self.tracking_uri, super().format(record))


def _follow(outbox: Path, tracking_uri: str, orphaned: Callable[[], bool]) -> SyncResult:
    result, pause, told, closing = SyncResult(0, 0), POLL, None, False
    seen = -1 if pending(outbox) else outbox.stat().st_size  # no record, no MLflow
    while not closing:
        closing = bool(select.select([sys.stdin], [], [], pause)[0])
        if orphaned() or (closing and not sys.stdin.readline()):
            break
        size = outbox.stat().st_size
        if size == seen and result.error is None:
            continue
        before, result = result, deliver(outbox, tracking_uri, stop=orphaned)
        result = SyncResult(
            before.delivered + result.delivered, result.remaining, result.refused, result.error
        )
        if result.error is not None and select.select([sys.stdin], [], [], 0)[0]:
            closing = True  # asked while a dead server was waited for: once is enough
        seen, pause = size, POLL if result.error is None else min(2 * pause, LONGEST_PAUSE)
        if result.error != told:
            log.warning("%s", result.error or "delivering again")
            told = result.error
    return result


def deliver(
    outbox: Path,
    tracking_uri: str,
    retry_refused: bool = False,
    wait: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> SyncResult:
    """Deliver all that the outbox holds, up to the first failure of the server.

    Waits `wait` seconds for another process that is delivering; asks between runs whether to `stop`.
    What is wrong is told by the result's `error`; what is delivered stays so.
    """
    delivered, state, error = 0, None, None
    try:
        with locked(outbox.with_suffix(".lock"), wait):
            state = load_state(outbox, without_password(tracking_uri))
            client = _connect(tracking_uri)
            state = _found_runs(client, outbox, state)
            again = [refusal["record"] for refusal in state.refused] if retry_refused else []
            while True:
                lines = list(itertools.islice(read_records(outbox, state.offset), CHUNK))
                records = [record for _, record in lines if record is not None]
                refused = send(client, outbox, state, again + records, stop)
                for refusal in refused:
                    refusal["reason"] = without_password_of(tracking_uri, refusal["reason"])
                state.refused = state.refused[len(again) :] + refused
                state.offset = lines[-1][0] if lines else state.offset
                save_state(outbox, state)
                delivered, again = delivered + len(records), []
                if len(lines) < CHUNK:
                    break
    except Exception as problem:  # a server can fail in any way, and none may end the writer
        log.debug("the delivery stopped", exc_info=problem)
        error = without_password_of(tracking_uri, _sentence(problem, tracking_uri))
    reasons = tuple(refusal["reason"] for refusal in state.refused) if state else ()
    return SyncResult(delivered, pending(outbox), reasons, error)


def _sentence(problem: Exception, tracking_uri: str) -> str:
    """Why a delivery stopped, short: libraries put what the system says into pages of their own."""
    told = " ".join(f"{type(problem).__name__}: {problem}".split())
    server = tracking_uri.startswith(("http://", "https://"))
    if not isinstance(problem, ValueError) and server:
        if found := re.search(r"\[Errno -?\d+\] ([\w .,-]+)|(timed? ?out)", told, re.IGNORECASE):
            return f"{without_password(tracking_uri)} is out of reach: {found[1] or 'no answer in time'}"
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."


def _connect(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    database = sqlite_file(tracking_uri)
    if database is None:
        return MlflowClient(tracking_uri)
    database = database.resolve()  # behind links: who comes by another name waits for the same lock
    with locked(database.with_name(f".{database.name}.lock"), wait=60.0):
        if not database.exists():
            # MLflow builds its tables in some 50 steps; two processes at once, or a kill between two
            # steps, would leave a database that it refuses for good. So it is built aside.
            draft = database.with_name(f".{database.name}.new")
            draft.unlink(missing_ok=True)
            MlflowClient(sqlite_uri(draft))
            os.replace(draft, database)
        return MlflowClient(tracking_uri)


def _found_runs(client: MlflowClient, outbox: Path, state: State) -> State:
    """The state with the experiment, and all runs that MLflow already has of this study."""
    from mlflow.exceptions import MlflowException

    if "" in state.runs:
        try:
            client.get_run(state.runs[""])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            state = State(state.study, state.tracking_uri)  # a new database at the old address
    if state.experiment_id is None:
        state.experiment_id = _experiment_id(client, read_settings(outbox)["experiment"])
        _show_at_a_glance(client, state.experiment_id)
    token = None
    while state.unsure:
        page = client.search_runs(
            [state.experiment_id],
            f"tags.`{KEY}` LIKE '{state.study}/%'",
            max_results=PAGE,
            order_by=["start_time DESC"],  # of doubles (copies of an outbox) the first run is kept
            page_token=token,
        )
        state.runs |= {run.data.tags[KEY].partition("/")[2]: run.info.run_id for run in page}
        token = page.token
        state.unsure = bool(token)
    return state


def _show_at_a_glance(client: MlflowClient, experiment_id: str) -> None:
    """Give an experiment the view of its studies; one without runs of others also a kind and a note."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment(experiment_id).tags
    wanted = view_tags()
    if not any(name.startswith(("mlflow.sharedViewState.", "mlflow.note.")) for name in known):
        wanted |= own_tags(experiment_id)
    try:
        for name, value in wanted.items():
            if known.get(name) != value:
                client.set_experiment_tag(experiment_id, name, value)
    except MlflowException as error:  # somebody else's, who lets us write runs alone
        log.warning("the experiment could not be given its view: %s", error)


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if name.startswith("#"):
        return name[1:]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment_id(client, name)  # another study has just created it
    if experiment.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment {name!r} is deleted in MLflow: choose another name, or restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`"
        )
    return str(experiment.experiment_id)
