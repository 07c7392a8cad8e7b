"""What is a node's fault, the cluster's or the user's is told as that, and kept as no end of a candidate."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from ray import tune
from small_sweeps import SEARCH, TRAINING, small_task

from ssad_hpo import Objective
from ssad_hpo.raytune import reaching, sweeping, worker
from ssad_hpo.raytune.ledger import Ledger
from ssad_hpo.raytune.searcher import StudyCallback, StudySearcher, _what_happened
from ssad_hpo.search import record, records
from ssad_hpo.task import Cluster, Search, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(28, "No space left on device"), "interrupted"),
        (MemoryError("80 GB"), "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "interrupted"),
        (ValueError("a fault of the candidate's"), "failed"),
    ],
)
def test_too_little_memory_or_disk_is_no_failure_of_the_candidate(
    error: Exception, status: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def raises(*_: Any) -> None:
        raise error

    resources = SimpleNamespace(required_resources={"CPU": 1})
    context = SimpleNamespace(get_trial_resources=lambda: resources)
    monkeypatch.setattr(worker.tune, "get_context", lambda: context)
    monkeypatch.setattr(worker.tune, "report", told.append)
    monkeypatch.setattr(worker, "_train", raises)
    worker.train_detector({}, "task", SEARCH, TRAINING, "cpu", task.train.numpy(), task.unlabeled.numpy())
    assert [(one["status"], one["reason"]) for one in told] == [(status, f"{type(error).__name__}: {error}")]
    assert math.isnan(told[0][SEARCH.criterion])


def test_a_node_that_does_not_reach_the_checkpoints_is_told_whole(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray says it: a RuntimeError of several lines, of which the first says nothing."""

    def report(metrics: dict[str, Any], checkpoint: Any = None) -> None:
        raise RuntimeError("Unable to set up cluster storage with the following settings:\nmount /data")

    monkeypatch.setattr(worker.tune, "report", report)
    monkeypatch.setattr(worker.tune, "get_checkpoint", lambda: None)
    config = {"cutavg.patch_area": 0.1, "cutavg.patch_aspect": 1.0, "augmentation": "cutavg"}
    height, width = task.train.shape[2:]
    space = Search(space="cutavg").space.within(height=height, width=width)
    with pytest.raises(OSError, match="following settings: mount /data"):
        worker._train(config, task, Search(space=space), TRAINING, "cpu", [])


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ("ray::train() (pid=1)\nValueError: its own", "failed"),
        (
            "ray::F.__init__()\nThe actor died because of an error raised in its creation task, x",
            "interrupted",
        ),
        ("Traceback (most recent call last):\n_TuneStopTrialError: the store is away", "interrupted"),
        ("The actor died unexpectedly", "interrupted"),
        ("x, raised in its creation task\nFailure # 2 (occurred later)\nray::train()\nValueError", "failed"),
    ],
)
def test_what_ray_gave_up_is_a_failure_only_where_the_candidate_raised_it(
    told: str, status: str, tmp_path: Path
) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at now)\n{told}\n")
    trial: Any = SimpleNamespace(error_file=tmp_path / "error.txt", num_failures=1)
    assert _what_happened(trial)[0] == status


def test_a_database_that_fails_in_the_middle_of_a_question_leaves_no_trial_behind(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, write, failures = optuna.create_study(), record.write, [StorageInternalError("away")]

    def fails_once(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        write(*arguments)

    monkeypatch.setattr(record, "write", fails_once)
    ledger = Ledger(Objective(task, SEARCH, TRAINING), study)
    parameters = ledger.ask("ray's")
    assert [trial.params for trial in study.trials] == [parameters] and ledger.asked == 1
    assert [trial.ray_trial for trial in records(study)] == ["ray's"]


NODE = {"Alive": True, "Resources": {"CPU": 2.0}}


def test_a_sweep_that_waits_for_a_node_says_so(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NODE]
    monkeypatch.setattr(reaching.ray, "nodes", lambda: nodes)
    monkeypatch.setattr("ssad_hpo.raytune.searcher.LOOK_AGAIN", 0.0)
    callback = StudyCallback(StudySearcher(Objective(task, SEARCH, TRAINING), optuna.create_study()))
    callback.cluster = Cluster(cpus_per_trial=2)
    running: Any = SimpleNamespace(status="RUNNING", trial_id="a", is_finished=lambda: False)
    callback.on_step_begin(0, [])
    nodes.clear()
    callback.on_step_begin(1, [running])
    with pytest.warns(UserWarning, match="no training can run at present; .* at most 0"):
        callback.on_step_begin(2, [])


def test_a_cluster_of_other_versions_is_refused_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12"
        )

    monkeypatch.setattr(sweeping.ray, "init", init)
    with pytest.raises(ValueError, match=r"started with: Ray: 2.59.0 Python: 3.12\); use the same Ray"):
        sweeping._join("127.0.0.1:6379")


def test_a_machine_that_is_no_node_of_the_cluster_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise RuntimeError("No node info found matching attributes: ''")

    monkeypatch.setattr(sweeping.ray, "init", init)
    with pytest.raises(ValueError, match=r"No node info found .* is this machine a node of it"):
        sweeping._join("127.0.0.1:6379")


def test_a_driver_without_a_gpu_judges_the_encoder_as_it_comes_on_the_cpu(task: Task) -> None:
    training = Training(
        encoder="tf_efficientnet_lite0", weights="pretrained", steps=2, batch_size=2, evaluate_at=(1,)
    )
    objective = Objective(task, SEARCH, training, device="cuda")
    study = optuna.create_study()
    objective.add_frozen(study)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


@pytest.mark.services
@pytest.mark.ray
def test_ctrl_c_before_the_first_trial_is_an_interruption(
    local_ray: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's handler ends the Tuner's loop then, which returns as after any end."""
    monkeypatch.setattr(tune.Tuner, "fit", lambda tuner: None)
    objective = Objective(task, SEARCH, TRAINING, artifacts=tmp_path / "artifacts")
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(
            objective,
            optuna.create_study(),
            Cluster(address=local_ray, checkpoint_path=str(tmp_path / "checkpoints")),
        )


def test_what_a_thread_starts_lasts_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a daemon: the others end before the threads of a script whose main thread has ended."""
    begun: list[str] = []
    monkeypatch.setattr(sweeping, "_leaving", [])
    thread = threading.Thread(
        target=lambda: sweeping._in_a_thread_that_lasts(lambda: begun.append(threading.current_thread().name))
    )
    thread.start()
    thread.join()
    assert begun == ["ray"]
    (leaving,) = sweeping._leaving
    (lasting,) = [t for t in threading.enumerate() if t.name == "ray"]
    assert lasting.daemon
    leaving.set()
    lasting.join(60)
    assert not lasting.is_alive()


def test_what_ray_raises_as_it_starts_is_raised_in_the_thread_that_asked() -> None:
    def begin() -> None:
        raise ConnectionError("no port")

    with pytest.raises(ConnectionError, match="no port"):
        sweeping._in_a_thread_that_lasts(begin)
