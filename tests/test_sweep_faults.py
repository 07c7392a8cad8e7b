"""Sweeps that MLflow's server leaves in the middle, and sweeps of which some or all trials fail.

Each is checked trial by trial: nothing that ended is lost, nothing is counted twice, nothing stays RUNNING.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from servers import MlflowServer, wait_until
from starting import start_sweep
from told import check_delivered_exactly, history_of, runs_of

from ssad_hpo import controlled_data
from ssad_hpo.experiment import open_result, open_run, resume_study, sync_run
from ssad_hpo.search import records
from ssad_hpo.search.record import read_trial
from ssad_hpo.storage import open_journal
from ssad_hpo.task import SearchSpace, Task, Training
from ssad_hpo.tracking import pending

pytestmark = [pytest.mark.services, pytest.mark.ray, pytest.mark.usefixtures("workplace", "local_ray")]

TRAINING = Training(steps=60, batch_size=4, width=4, evaluate_at=(0.5, 1.0), precision="float32")
OUTBOX = Path("runs/r/outbox.jsonl")


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=32, n_train=16, n_unlabeled=12).task


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"), empty_mlflow)
    yield server
    server.kill()


@pytest.fixture
def database(workplace: Path, empty_mlflow: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_mlflow, workplace / 'mlflow.db')}"


def check_every_trial_is_told(uri: str, trials: Sequence[optuna.trial.FrozenTrial], study: str) -> None:
    """Each trial of the study is one run of MLflow's with its status, reason and values, each once."""
    outbox = open_run("r").outbox
    check_delivered_exactly(uri, outbox)
    runs = runs_of(uri, open_run("r").settings.experiment)
    assert runs.pop(open_run("r").settings.title).info.status == study
    statuses = {TrialState.COMPLETE: "FINISHED", TrialState.FAIL: "FAILED"}
    for trial in trials:
        run = runs.pop(f"trial {trial.number}")
        assert run.info.status == statuses[trial.state]
        assert run.data.tags.get("reason") == read_trial(trial).reason
        told = [(step, value) for step, _, value in history_of(uri, run, "dsv")]
        assert told == sorted(trial.intermediate_values.items())
        assert trial.state == TrialState.FAIL or told[-1] == (TRAINING.steps, trial.value)
    assert runs == {}


# MLflow's server


class Outage:
    """A listener that kills the server when the first trial has ended, and has it back after some seconds.

    The fourth trial's end waits for that, so that the outage lies within the sweep on any machine; with
    `seconds=None` the server stays away.
    """

    def __init__(self, server: MlflowServer, seconds: float | None) -> None:
        self.server = server
        self.back = None if seconds is None else threading.Timer(seconds, server.start)
        self.ended = self.waiting = 0

    def trial_started(self, *_: Any) -> None: ...

    def trial_progress(self, *_: Any) -> None: ...

    def trial_ended(self, *_: Any) -> None:
        self.ended += 1
        if self.ended == 1:
            wait_until(lambda: runs_of(self.server.uri, open_run("r").settings.experiment) != {}, "a run")
            self.server.kill()
            if self.back is not None:
                self.back.start()
        elif self.ended == 4:
            log = OUTBOX.with_suffix(".log")
            wait_until(lambda: "Connection refused" in log.read_text(), "the writer to notice")
            self.waiting = pending(OUTBOX)
            if self.back is not None:
                self.back.join()


def sweep_through(outage: Outage, task: Task, experiment: str) -> Any:
    if outage.server.process is None:
        outage.server.start()
    result = start_sweep(
        task,
        training=TRAINING,
        n_trials=6,
        run="r",
        tracking_uri=outage.server.uri,
        experiment=experiment,
        listeners=[outage],
    )
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 6
    assert outage.waiting > 0 and result.lost == 0
    assert result.undelivered == pending(OUTBOX)
    return result


def test_a_server_of_mlflows_that_is_away_for_20_seconds_in_mid_sweep_gets_every_trial_once(
    task: Task, server: MlflowServer
) -> None:
    result = sweep_through(Outage(server, 20), task, "away for 20 seconds")
    # Its last delivery has 20 s; a machine that is too slow for that says so in `undelivered`.
    synced = sync_run("r")
    assert (synced.delivered, synced.remaining, synced.error) == (result.undelivered, 0, None)
    check_every_trial_is_told(server.uri, result.study.trials, "FINISHED")


def test_a_server_of_mlflows_that_stays_away_is_told_and_gets_the_rest_of_the_sweep_by_sync(
    task: Task, server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    result = sweep_through(Outage(server, None), task, "stays away")
    assert result.undelivered >= result.run.settings.n_trials  # the ends of five trials, and of the study
    assert "MLflow: " in caplog.text and "Connection refused" in caplog.text
    synced = sync_run("r")
    assert synced.remaining == result.undelivered and "Connection refused" in str(synced.error)
    server.start()
    synced = sync_run("r")
    assert (synced.delivered, synced.remaining, synced.error) == (result.undelivered, 0, None)
    check_every_trial_is_told(server.uri, result.study.trials, "FINISHED")


# Trials


class Raising(SearchSpace):
    """A space of which one kind raises in the worker."""

    def augmentation(self, params: Any) -> Any:
        if params["augmentation"] == "rotation" and "RAY_RAYLET_PID" in os.environ:
            raise RuntimeError("value cannot be converted to type float without overflow")
        return super().augmentation(params)


def test_trials_that_raise_and_trials_that_collapse_fail_alone_with_their_reasons(
    task: Task, database: str
) -> None:
    """A spot of 1e6 images blackens them all."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know the tests
    space = Raising({"cutavg": {}, "cutdiff": {"patch_area": 1e6}, "rotation": {"angle": 90.0}})
    result = start_sweep(
        task,
        training=TRAINING,
        space=space,
        sampler="grid",
        grid_points=2,
        n_trials=7,
        run="r",
        tracking_uri=database,
    )
    trials = result.study.trials
    assert [trial.params for trial in trials] == space.grid(2)
    reasons = {t.number: str(t.reason) for t in records(result.study) if t.status == "failed"}
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4 + [TrialState.FAIL] * 3
    assert list(reasons) == [4, 5, 6]
    assert all(f"collapsed at step 30 under cutdiff(patch_area={1e6:g}" in reasons[n] for n in (4, 5))
    assert reasons[6] == "RuntimeError: value cannot be converted to type float without overflow"
    values = [trial.value for trial in trials[:4]]
    assert result.selected.number == values.index(min(values))
    kept = sorted(path.name.rpartition("-")[0] for path in result.run.artifacts.iterdir())
    assert kept == [f"trial-{n:05d}" for n in range(4)]

    again = resume_study("r", task=task)  # a trial that failed by its own fault is not run again
    assert again.study.trials == trials and open_result("r").selected.number == result.selected.number
    assert sync_run("r").remaining == 0
    check_every_trial_is_told(database, trials, "FINISHED")


def test_a_sweep_of_which_every_trial_diverges_says_so_and_ends(task: Task, database: str) -> None:
    with pytest.raises(ValueError, match=r"no trial ran its whole budget.*3 failed\)"):
        start_sweep(
            task,
            training=replace(TRAINING, learning_rate=1e30),
            n_trials=3,
            run="r",
            tracking_uri=database,
        )
    trials = optuna.load_study(study_name=None, storage=open_journal(open_run("r").journal)).trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 3
    ended = [read_trial(trial) for trial in trials]
    assert all(t.status == "failed" for t in ended)  # by their own fault
    assert all("diverged: loss nan by step 30 under cutavg(" in str(t.reason) for t in ended)
    assert sync_run("r").remaining == 0
    check_every_trial_is_told(database, trials, "FAILED")
