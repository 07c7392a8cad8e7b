"""Sweeps on more than one node, with real databases, and what they do when these fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from servers import LONG, Postgres, RayCluster, find_postgres, kill, wait_until
from starting import start_sweep
from told import reports_and_checkpoints

from ssad_hpo import controlled_data
from ssad_hpo.experiment import load_task, open_result, open_run, resume_study
from ssad_hpo.judgement import evaluations
from ssad_hpo.search.record import read_trial
from ssad_hpo.storage import open_database, open_journal
from ssad_hpo.task import Task, Training

pytestmark = [pytest.mark.services, pytest.mark.ray, pytest.mark.usefixtures("workplace")]

TRAINING = Training(steps=60, batch_size=4, width=4, evaluate_at=(0.5, 1.0), precision="float32")


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=32, n_train=16, n_unlabeled=12).task


class Once:
    """A listener that does something when the first trial has ended well."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed
        self.done = False

    def trial_started(self, *_: Any) -> None: ...

    def trial_progress(self, *_: Any) -> None: ...

    def trial_ended(self, trial: str, status: str, *_: Any) -> None:
        if status == "complete" and not self.done:
            self.done = True
            self.deed()


def trained_as_reported(trial: optuna.trial.FrozenTrial, run: Path) -> bool:
    """Whether the trial's criteria are those of the same training here, to the last bit."""
    opened = open_run(run)
    space, training = opened.settings.method.space, opened.settings.training
    *_, last = evaluations(load_task(opened), space.augmentation(trial.params), training)
    return read_trial(trial).criteria == last.judged.criteria


# Nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    folder = Path(tempfile.mkdtemp(prefix="r"))
    running = RayCluster(folder)
    yield running
    running.stop()
    shutil.rmtree(folder, ignore_errors=True)


def sweep_command(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ssad_hpo", "sweep", "gravel/cutavg", "--no-tracking", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_driver_without_the_clusters_token_is_refused_with_what_it_needs(cluster: RayCluster) -> None:
    without = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    _, told = sweep_command(
        without, "-n", "1", "--address", cluster.address, "--run", "refused"
    ).communicate()
    assert f"address: no Ray cluster at '{cluster.address}' takes this process" in told
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in told
    assert not list(Path("runs/refused").glob("artifacts/*"))


def test_a_sweep_over_two_nodes_goes_on_when_one_is_killed_in_the_middle_of_a_trial(
    cluster: RayCluster,
) -> None:
    node = cluster.add_node()
    options = ["-n", "5", "--pruner", "none", "--steps", "240", "--width", "8", "--run", "two"]
    driver = sweep_command(cluster.environment, *options, "--address", cluster.address)
    journal, copy = Path("runs/two/journal.log"), Path("copy.log")

    def trials() -> list[optuna.trial.FrozenTrial]:
        if not journal.exists():
            return []
        shutil.copy(journal, copy)  # the journal itself is the driver's
        study = optuna.load_study(study_name=None, storage=open_journal(copy))
        return study.get_trials(deepcopy=False)

    def both_nodes_are_in_mid_trial() -> bool:
        assert driver.poll() is None, driver.communicate()
        going = [read_trial(t) for t in trials() if t.state == TrialState.RUNNING]
        left = [t for t in going if t.checkpoint and not t.checkpoint.endswith("_000002")]  # of three
        return len(left) == 2  # nodes, of one processor each

    wait_until(both_nodes_are_in_mid_trial, "a trial on each node")
    kill(node)
    _, errors = driver.communicate(timeout=LONG)
    assert driver.returncode == 0, errors
    ended = trials()
    assert [trial.state for trial in ended] == [TrialState.COMPLETE] * 5, errors
    assert all(trained_as_reported(trial, Path("two")) for trial in ended)
    # A trial that began again at step 0 would have made the checkpoints up to its death a second time before
    # its next report. Where the node died after the last one, that alone is made again.
    for told in reports_and_checkpoints(journal).values():
        assert told[:6] == ["report", "checkpoint"] * 3 and told[6:] in ([], ["checkpoint"])


# Databases


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="needs PostgreSQL's driver: pip install 'psycopg[binary]'")
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)
    server = Postgres(binaries, folder / "server")
    yield server
    server.crash()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_sweep_on_postgresql_outlives_a_crash_of_the_server(
    local_ray: str,
    postgres: Postgres,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Optuna waits for its study; MLflow's records wait in the run folder."""
    from mlflow import MlflowClient

    storage, tracking = postgres.make_database("studies"), postgres.make_database("runs")
    monkeypatch.setenv("SSAD_HPO_STORAGE", storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    back = threading.Timer(3, postgres.start)

    def crash() -> None:
        postgres.crash()
        back.start()

    result = start_sweep(
        task,
        training=TRAINING,
        n_trials=5,
        run="r",
        storage=storage,
        listeners=[Once(crash)],
    )
    back.join()
    assert "Optuna's storage fails, trying again" in caplog.text
    trials = result.study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    assert "correct" not in Path("runs/r/settings.json").read_text()
    assert open_result("r").selected.number == result.selected.number
    again = resume_study("r", task=task, n_trials=6)  # delivers what waited, too
    assert again.study.get_trials()[:5] == trials and again.undelivered == again.lost == 0
    client = MlflowClient(tracking)
    (experiment,) = client.search_experiments(filter_string="name = 'ssad_hpo'")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * (1 + 6)


def test_many_may_open_a_new_postgresql_database_at_the_same_moment(postgres: Postgres) -> None:
    for name in ("first", "second", "third"):
        url, barrier = postgres.make_database(name), threading.Barrier(8)

        def open_together(url: str = url, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(60)
            open_database(url, create=True)

        with ThreadPoolExecutor(8) as pool:
            for opened in [pool.submit(open_together) for _ in range(8)]:
                opened.result()


def test_two_searches_may_meet_a_new_postgresql_database_at_once(postgres: Postgres) -> None:
    storage = postgres.make_database("shared")
    program = """
import sys; from ssad_hpo import controlled_data; from ssad_hpo.experiment import run_study
from ssad_hpo.task import Search, Training
training = Training(steps=6, batch_size=4, width=4, evaluate_at=(1.0,), precision="float32")
task = controlled_data(image_size=32, n_train=16, n_unlabeled=12).task
result = run_study(task, Search(n_trials=2), training, run=sys.argv[1], storage=sys.argv[2],
    tracking_uri=None)
print(len(result.study.trials))
"""
    searches = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, storage],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for search in searches:
        out, errors = search.communicate(timeout=LONG)
        assert out == "2\n", errors
    assert len(optuna.get_all_study_names(storage)) == 2


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A disk of its own, and what mounts it anew, "ro" or "rw"; permission bits do not bind root."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs to mount a disk: run as root")
    yield place, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True) and None
    subprocess.run(["umount", "-l", place], check=True)


def test_a_checkpoint_path_that_cannot_be_written_is_refused_before_anything_is_written(
    task: Task, workplace: Path, disk: tuple[Path, Callable[[str], None]]
) -> None:
    place, mount = disk
    mount("ro")
    with pytest.raises(ValueError, match=f"checkpoint_path: .* cannot write to {place}"):
        start_sweep(task, run="r", checkpoint_path=str(place / "new"), tracking_uri=None)
    assert list(workplace.iterdir()) == []


def test_a_disk_that_turns_read_only_cuts_trials_off_and_says_so(
    local_ray: str, task: Task, disk: tuple[Path, Callable[[str], None]]
) -> None:
    place, mount = disk
    settings: dict[str, Any] = {"training": TRAINING, "tracking_uri": None}
    with pytest.warns(UserWarning, match="trials were cut off .* Read-only file system"):
        result = start_sweep(
            task,
            n_trials=5,
            run="r",
            checkpoint_path=str(place),
            listeners=[Once(lambda: mount("ro"))],
            **settings,
        )
    before = result.study.get_trials()
    whole = [trial for trial in before if trial.state == TrialState.COMPLETE]
    assert 1 <= len(whole) < 5 and result.selected.number in {trial.number for trial in whole}
    cut_off = [read_trial(trial) for trial in before if trial not in whole]
    assert all(t.status == "interrupted" and "Read-only" in str(t.reason) for t in cut_off)
    mount("rw")
    after = resume_study("r", task=task).study.get_trials()
    assert after[: len(before)] == before
    assert sum(trial.state == TrialState.COMPLETE for trial in after) == 5
    assert not {TrialState.RUNNING, TrialState.WAITING} & {trial.state for trial in after}
