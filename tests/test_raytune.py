"""A sweep's searcher, schedulers and arguments, without a cluster."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from small_sweeps import SEARCH, TRAINING, small_task
from starting import start_sweep

from ssad_hpo import Objective
from ssad_hpo.raytune import StudySearcher, absolute_checkpoint_path, check_cluster, make_scheduler
from ssad_hpo.raytune.checkpoints import below
from ssad_hpo.raytune.schedulers import replay
from ssad_hpo.raytune.searcher import discard_left
from ssad_hpo.search import make_sampler, record
from ssad_hpo.task import Cluster, Search, Task

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


@pytest.fixture
def objective(task: Task, tmp_path: Path, listener: Any) -> Objective:
    return Objective(task, SEARCH, TRAINING, artifacts=tmp_path / "artifacts", recorder=listener)


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(sampler=make_sampler(SEARCH))


def test_a_searcher_without_its_callback_says_so_at_its_first_suggestion(
    objective: Objective, study: optuna.Study
) -> None:
    searcher = StudySearcher(objective, study)
    with pytest.raises(ValueError, match=r"run_config=tune.RunConfig\(callbacks=\[searcher.callback\]\)"):
        searcher.suggest("a")
    assert study.trials == []
    searcher.callback.setup()
    assert searcher.suggest("a") == study.trials[0].params


def test_a_pickled_searcher_is_the_living_one_and_holds_neither_images_nor_addresses(
    objective: Objective, tmp_path: Path
) -> None:
    address = f"sqlite:///{tmp_path / 'secret.db'}"
    searcher = StudySearcher(objective, optuna.create_study(study_name="mine", storage=address))
    pickled = pickle.dumps({"search_alg": searcher, "callbacks": [searcher.callback]})
    assert len(pickled) < 1000 and b"secret" not in pickled
    found = pickle.loads(pickled)
    assert found["search_alg"] is searcher and found["callbacks"] == [searcher.callback]
    searcher.save(str(tmp_path / "state"))
    searcher.restore(str(tmp_path / "state"))
    other = StudySearcher(objective, optuna.create_study(study_name="other"))
    with pytest.raises(ValueError, match="expected the searcher of study 'mine', got that of 'other'"):
        other.restore(str(tmp_path / "state"))
    program = f"import pickle; pickle.loads({pickled!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "open the study 'mine' and make its StudySearcher first" in ended.stderr


def test_studies_of_the_same_name_are_not_merged_by_default(objective: Objective, tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (StudySearcher(objective, optuna.create_study(storage=address)) for _ in range(2))
    for searcher in (one, two):
        searcher.callback.setup()
        searcher.suggest("a")
    assert len(one.ledger.study.trials) == len(two.ledger.study.trials) == 1


class Poor:
    trial_id = "poor"


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_compares_with_the_trials_of_an_earlier_driver(name: str, study: optuna.Study) -> None:
    """A trial that is worse than all before is stopped at once; without history the first one goes on."""
    from ray.tune.schedulers import TrialScheduler

    for value in (0.1, 0.2, 0.3, 0.4):
        trial = study.ask()
        trial.report(value, 3)
        trial.report(value, 6)
        study.tell(trial, value)
    poor = Poor()
    controller = SimpleNamespace(get_live_trials=list)
    decisions = []
    for history in (optuna.create_study(), study):
        scheduler = make_scheduler(Search(pruner=name), TRAINING)
        assert scheduler is not None
        replay(scheduler, history, "dsv")
        scheduler.on_trial_add(controller, poor)
        decisions.append(scheduler.on_trial_result(controller, poor, {"step": 3, "dsv": 0.9}))
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.STOP]


def test_a_wrong_argument_of_a_sweep_is_named() -> None:
    check_cluster(Cluster(), "cpu")
    too_many = (os.cpu_count() or 1) + 1
    on_a_gpu = "gpus_per_trial: expected above 0 for 'cuda' alone, got"
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"cpus_per_trial": 0}, "cpu", "cpus_per_trial: expected a number above 0, got 0"),
        ({"cpus_per_trial": too_many}, "cpu", "cpus_per_trial: expected at most this machine's"),
        ({"gpus_per_trial": -1}, "cpu", "gpus_per_trial: expected a finite number >= 0, got -1"),
        ({"gpus_per_trial": 0.5}, "cpu", f"{on_a_gpu} 0.5 for 'cpu'"),
        ({"gpus_per_trial": 0}, "cuda", f"{on_a_gpu} 0 for 'cuda'"),
        ({"max_concurrent": 0}, "cpu", "max_concurrent: expected a whole number >= 1, got 0"),
        ({"address": "ray://host:1"}, "cpu", "address: expected 'auto' or HOST:PORT .*, got 'ray://host:1'"),
    ]
    for arguments, device, message in wrong:
        with pytest.raises(ValueError, match=message):
            check_cluster(Cluster(**arguments), device)
    of_its_search: list[tuple[dict[str, Any], str]] = [
        ({"n_trials": -1}, "n_trials: expected a whole number >= 0, got -1"),
        ({"pruner": "pbt"}, "pruner: expected one of none, asha, median, got 'pbt'"),
        ({"reduction_factor": 0}, "reduction_factor: expected a whole number >= 2, got 0"),
    ]
    for arguments, message in of_its_search:
        with pytest.raises(ValueError, match=message):
            Search(**arguments)


def test_checkpoint_paths_are_made_absolute_here_since_workers_change_directory(workplace: Path) -> None:
    assert absolute_checkpoint_path("shared") == str(workplace / "shared")
    assert absolute_checkpoint_path(f"file://{workplace}/place") == f"file://{workplace}/place"
    assert below("/a?b", "x", "y") == "/a?b/x/y"
    assert below("s3://bucket/place", "x") == "s3://bucket/place/x"
    assert below("s3://bucket/?region=here", "x", "y") == "s3://bucket/x/y?region=here"


def test_a_sweep_on_sqlite_is_refused_before_anything_is_written(workplace: Path, task: Task) -> None:
    with pytest.raises(ValueError, match=r"storage: SQLite locks up .* got 'sqlite:///optuna.db'"):
        start_sweep(task, run="r", storage="sqlite:///optuna.db", tracking_uri=None)
    with pytest.raises(ValueError, match="pruner: expected one of none, asha, median, got 'pbt'"):
        start_sweep(task, run="r", pruner="pbt", tracking_uri=None)
    assert list(workplace.iterdir()) == []


def test_checkpoints_that_a_killed_driver_could_not_remove_go_and_those_that_are_needed_stay(
    study: optuna.Study, tmp_path: Path
) -> None:
    def add(number: int, state: str, repeats: int | None = None) -> None:
        checkpoint = tmp_path / f"trial-{number}" / "checkpoint_000000"
        checkpoint.mkdir(parents=True)
        attributes = record.checkpointed(str(checkpoint))
        attributes |= {} if repeats is None else record.repeats(repeats)
        attributes |= record.interrupted("killed") if state == "FAIL" else {}
        value = None if state == "FAIL" else 0.5
        trial = optuna.create_trial(state=optuna.trial.TrialState[state], value=value, user_attrs=attributes)
        study.add_trial(trial)

    discard_left(study)
    add(0, "FAIL")
    add(1, "FAIL")
    add(2, "FAIL", repeats=0)
    add(3, "COMPLETE", repeats=0)
    for _ in range(2):
        discard_left(study)
        assert [path.name for path in tmp_path.glob("trial-*")] == ["trial-1"]
