"""Checkpoints and MLflow's artifacts in an S3-compatible store, over a real server of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from servers import LONG, MlflowServer, ObjectStore, kill, wait_until
from told import reports_and_checkpoints

from ssad_hpo.experiment import load_task, open_run
from ssad_hpo.judgement import evaluations
from ssad_hpo.raytune import absolute_checkpoint_path
from ssad_hpo.search import is_final
from ssad_hpo.search.record import read_trial
from ssad_hpo.storage import open_journal

pytestmark = [pytest.mark.services, pytest.mark.ray, pytest.mark.usefixtures("workplace")]

JOURNAL = Path("runs/s3/journal.log")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    running = ObjectStore(tmp_path)
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    yield running
    kill(running.process)


@pytest.fixture
def server(tmp_path: Path, empty_mlflow: Path, store: ObjectStore) -> Iterator[MlflowServer]:
    where = ("--artifacts-destination", "s3://bucket/artifacts")
    running = MlflowServer(tmp_path, empty_mlflow, *where, **store.environment)
    running.start()
    yield running
    running.kill()


def ssad_hpo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ssad_hpo", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trials() -> list[optuna.trial.FrozenTrial]:
    if not JOURNAL.exists():
        return []
    Path("copy.log").write_bytes(JOURNAL.read_bytes())  # the journal itself is the driver's
    return optuna.load_study(study_name=None, storage=open_journal(Path("copy.log"))).trials


def test_a_sweep_with_its_checkpoints_and_artifacts_in_an_object_store_goes_on_after_its_driver_was_killed(
    store: ObjectStore, server: MlflowServer
) -> None:
    place = f"s3://bucket/checkpoints?endpoint_override={store.address}"
    options = ["-n", "3", "--max-concurrent", "1", "--pruner", "none", "--steps", "240", "--width", "8"]
    options += ["--run", "s3", "--checkpoint-path", place, "--tracking-uri", server.uri]
    driver = ssad_hpo("sweep", "gravel/cutavg", *options)

    def the_second_trial_is_in_its_middle() -> bool:
        assert driver.poll() is None, driver.communicate()
        return len(trials()) == 2 and read_trial(trials()[1]).checkpoint is not None

    wait_until(the_second_trial_is_in_its_middle, "a checkpoint")
    kill(driver)
    driver.communicate()
    assert read_trial(trials()[1]).checkpoint in [
        f"s3://bucket/{file.rpartition('/')[0]}?endpoint_override={store.address}" for file in store.files()
    ]

    again = ssad_hpo("sweep", "--resume", "s3")
    _, errors = again.communicate(timeout=LONG)
    assert again.returncode == 0, errors
    ended = trials()
    assert sorted(t.state for t in ended) == sorted([TrialState.COMPLETE] * 3 + [TrialState.FAIL]), errors
    (repeated,) = [trial for trial in ended if read_trial(trial).repeats is not None]
    # It says again what was reported, and trains the rest: the checkpoints before are not made again.
    told = reports_and_checkpoints(JOURNAL)[repeated.number]
    assert told.count("report") == 3 and 1 <= told.count("checkpoint") < 3
    opened = open_run("s3")
    space, training = opened.settings.method.space, opened.settings.training
    for trial in filter(is_final, ended):
        *_, last = evaluations(load_task(opened), space.augmentation(trial.params), training)
        assert read_trial(trial).criteria == last.judged.criteria
    written = "".join(file.read_text() for file in Path("runs/s3").glob("*.json*"))
    assert place in written and store.environment["AWS_SECRET_ACCESS_KEY"] not in written
    assert [file for file in store.files() if "/checkpoint_" in file] == []  # all trials are over

    report = ssad_hpo("report", "s3")
    _, errors = report.communicate(timeout=300)
    assert report.returncode == 0, errors
    assert any(file.startswith("artifacts/") for file in store.files()), errors


def test_an_object_store_that_cannot_be_written_to_is_refused_before_anything_is_written(
    store: ObjectStore, workplace: Path
) -> None:
    there = f"?endpoint_override={store.address}"
    wrong = {
        f"s3://elsewhere/place{there}": "the URI of an object store to write to, got 's3://elsewhere",
        "ftp://host/place": "the URI of an object store to write to, got 'ftp://host/place'",
        f"s3://key:correct-horse@bucket/place{there}": "expected a URI without a password",
    }
    for place, message in wrong.items():
        refused = ssad_hpo("sweep", "gravel/cutavg", "--run", "refused", "--checkpoint-path", place)
        _, told = refused.communicate(timeout=300)
        told = " ".join(told.replace("│", " ").split())
        assert refused.returncode == 2 and "checkpoint_path: " in told and message in told, told
        assert "correct-horse" not in told
    assert not Path("runs").exists() and store.files() == []
    good = f"s3://bucket/place{there}"
    assert absolute_checkpoint_path(good) == good
