"""The run folder: everything that is needed to resume, evaluate and report a study."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssad_hpo import tracking
from ssad_hpo.bilevel import Tuning
from ssad_hpo.data import Source
from ssad_hpo.task import SearchSpace, Training

RUNS = Path("runs")  # where runs are looked for by name, below the current directory
# Where a storage URL with a password is taken from when a run is opened again.
STORAGE_VARIABLE = "SSAD_HPO_STORAGE"
_SETTINGS_FILE, _LOCK_FILE = "settings.json", "lock"
_FORMAT = 1


class RunError(ValueError):
    """A run folder that is not there, not whole, or in use."""


@dataclass(frozen=True)
class Cluster:
    """How a study's trials run on a Ray cluster; see `raytune.sweep`.

    Attributes:
        address: of the cluster; None for a Ray of its own.
        storage_path: a folder or URI that all nodes reach, absolute.
        cpus_per_trial, gpus_per_trial, max_concurrent: of the trials.
    """

    address: str | None
    storage_path: str
    cpus_per_trial: float
    gpus_per_trial: float
    max_concurrent: int | None


@dataclass(frozen=True)
class Settings:
    """A study's settings, as its run folder keeps them.

    Attributes:
        study_name: unique, also in shared storages and on tracking servers.
        source: address of the data; None for a task that lives in the caller's memory only.
        task_name, content_hash: of the task, to recognise it when it is loaded again.
        criterion, space, training, n_trials, sampler, pruner, reduction_factor, grid_points, seed, keep:
            of the search.
        device, threads: where it trains.
        storage: URL of Optuna's storage; None for the journal file in the run folder.
        tracking_uri, experiment: of MLflow; a tracking_uri of None switches tracking off.
        created: UTC time. versions: of the libraries that a result depends on.
        tuning: of a tuning by gradient; None for a search. Every starting point of a tuning is a trial of
            its study: n_trials counts them, criterion is what keeps one, space is the one augmentation
            that is tuned; sampler, pruner, reduction_factor and grid_points have no use.
        cluster: of a sweep, whose `pruner` is a scheduler of Ray Tune's; None for a local search.
    """

    study_name: str
    source: Source | None
    task_name: str
    content_hash: str
    criterion: str
    space: SearchSpace
    training: Training
    n_trials: int
    sampler: str
    pruner: str
    reduction_factor: int
    grid_points: int
    seed: int
    keep: int
    device: str
    threads: int
    storage: str | None
    tracking_uri: str | None
    experiment: str
    created: str
    versions: dict[str, str]
    tuning: Tuning | None = None
    cluster: Cluster | None = None

    @property
    def stopping(self) -> str:
        """The pruner for people: "asha/4" is successive halving with a reduction factor of 4."""
        return f"asha/{self.reduction_factor}" if self.pruner == "asha" else self.pruner

    def without_passwords(self) -> dict[str, Any]:
        """The fields by name; passwords in addresses are starred out, and are never written down."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("storage", "tracking_uri"):
            values[name] = values[name] and tracking.without_password(values[name])
        return values

    def flat(self) -> dict[str, Any]:
        """Settings as one level of names and plain values, without passwords: for tracking and showing."""
        values = self.without_passwords()
        training, space = values.pop("training"), values.pop("space")
        source, versions = values.pop("source"), values.pop("versions")
        cluster, tuning = values.pop("cluster"), values.pop("tuning")
        if tuning is not None:
            for name in ("sampler", "pruner", "reduction_factor", "grid_points"):
                del values[name]
        return {
            **values,
            "space": json.dumps(space.to_json()),
            "source": json.dumps(source.to_json()) if source else "in memory",
            **{f"training.{name}": value for name, value in asdict(training).items()},
            **{f"tuning.{name}": value for name, value in (asdict(tuning) if tuning else {}).items()},
            **{f"version.{name}": value for name, value in versions.items()},
            **({f"cluster.{name}": value for name, value in asdict(cluster).items()} if cluster else {}),
        }


def new_study_name(run: Path) -> str:
    """A name for the study of a run folder that no other study has."""
    return f"{run.name}-{uuid.uuid4().hex[:8]}"


def creation_facts() -> dict[str, Any]:
    """When and with which libraries a study is made."""
    libraries = ("ssad-hpo", "torch", "torchvision", "optuna", "scikit-learn", "mlflow")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in libraries},
    }


@dataclass(frozen=True)
class Run:
    """A run folder and its settings.

    Attributes:
        folder: absolute.
        settings: of its study.
    """

    folder: Path
    settings: Settings

    @property
    def journal(self) -> Path:
        return self.folder / "journal.log"

    @property
    def checkpoint(self) -> Path:
        """How far a tuning is."""
        return self.folder / "checkpoint.pt"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox.jsonl"

    def write(self) -> None:
        """Write the settings into the folder, which is made if need be; whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        values = self.settings.without_passwords()
        values["source"] = self.settings.source.to_json() if self.settings.source else None
        values["space"] = self.settings.space.to_json()
        values["training"] = asdict(self.settings.training)
        values["tuning"] = asdict(self.settings.tuning) if self.settings.tuning else None
        values["cluster"] = asdict(self.settings.cluster) if self.settings.cluster else None
        partial = self.folder / (_SETTINGS_FILE + ".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"format": _FORMAT, **values}, indent=2) + "\n")
            os.replace(partial, self.folder / _SETTINGS_FILE)
        except OSError as error:
            raise RunError(f"{self.folder}: the run folder cannot be written ({error.strerror})") from error


def choose_run_folder(name: str | Path | None, task_name: str) -> Path:
    """Where a new run goes; nothing is made yet.

    Args:
        name: a path, or a name below runs/; None makes one from the task's name and the time.
        task_name: of the task.

    Raises:
        RunError: if there is something already.
    """
    if name is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{task_name.replace('/', '-')}-{stamp}-{uuid.uuid4().hex[:4]}"
    folder = _place(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists already; go on with it by --resume, or choose another name")
    return folder


def open_run(name: str | Path) -> Run:
    """Open a run folder, given as a path or as a name below runs/.

    Raises:
        RunError: if there is none, or its settings cannot be read; the message lists the runs there are.
    """
    folder = _place(name)
    path = folder / _SETTINGS_FILE
    if not path.is_file():
        known = sorted(p.parent.name for p in RUNS.glob(f"*/{_SETTINGS_FILE}"))
        there = f"; runs here: {', '.join(known)}" if known else ""
        raise RunError(f"{folder}: holds no run (no {_SETTINGS_FILE}){there}")
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != _FORMAT:
            raise RunError(f"{folder}: written by a newer version of ssad_hpo; update it to read this run")
        values["source"] = Source.from_json(values["source"]) if values["source"] else None
        values["space"] = SearchSpace.from_json(values["space"])
        values["training"] = Training(**values["training"])
        # Older runs: there were no tunings and sweeps, and ASHA let the better half go on.
        values.setdefault("reduction_factor", 2)
        values["tuning"] = Tuning(**values["tuning"]) if values.get("tuning") else None
        values["cluster"] = Cluster(**values["cluster"]) if values.get("cluster") else None
        if _hides_password(values["tracking_uri"]):
            values["tracking_uri"] = tracking.default_tracking_uri()
        if _hides_password(values["storage"]):
            values["storage"] = _storage_from_environment(folder, values["storage"])
        return Run(folder, Settings(**values))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a run's settings ({error})") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a run folder; the lock goes with the process, however it ends.

    Raises:
        RunError: if another process has it; the message names it.
    """
    with (folder / _LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise RunError(f"{folder}: in use by {owner}; wait for it or stop it first") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _hides_password(address: str | None) -> bool:
    return address is not None and ":***@" in address


def _storage_from_environment(folder: Path, starred: str) -> str:
    if STORAGE_VARIABLE not in os.environ:
        raise RunError(
            f"{folder}: the password of {starred} is not kept; set {STORAGE_VARIABLE} to the whole URL"
        )
    return os.environ[STORAGE_VARIABLE]


def _place(name: str | Path) -> Path:
    """A bare name is a run below runs/, unless there is such a folder right here."""
    path = Path(name)
    if len(path.parts) == 1 and not path.is_absolute() and not path.is_dir():
        path = RUNS / path
    return path.absolute()
