"""Sweeps: what Optuna is told, on real storages; and whole sweeps on a real Ray of two processors."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from starting import start_sweep

from ssad_hpo import Objective, candidates, controlled_data, select
from ssad_hpo.criteria import CRITERIA
from ssad_hpo.experiment import RunError, StudyInterrupted, open_result, open_run, resume_study
from ssad_hpo.raytune import (
    StudySearcher,
    absolute_checkpoint_path,
    check_cluster,
    make_scheduler,
    sweep,
    trainable,
)
from ssad_hpo.raytune.checkpoints import below
from ssad_hpo.raytune.ledger import CHECKPOINT, Ledger, patiently
from ssad_hpo.raytune.schedulers import replay
from ssad_hpo.search import evaluations, is_final, make_sampler, metric_names, open_kept, records
from ssad_hpo.search.record import read_trial
from ssad_hpo.search.store import FolderStore
from ssad_hpo.storage import open_journal
from ssad_hpo.task import Cluster, Search, SearchSpace, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

TRAINING = Training(steps=6, batch_size=4, width=4, evaluate_at=(0.5, 1.0), precision="float32")
SPACE = SearchSpace({"cutavg": {}, "cutout": {"patch_aspect": 1.0}})
SEARCH = Search(SPACE, sampler="random")
# A spot so large that it blackens every image: the augmented embeddings are all one point.
COLLAPSING = {"patch_area": 1e6}


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=32, n_train=16, n_unlabeled=12).task


@pytest.fixture
def objective(task: Task, tmp_path: Path, listener: Any) -> Objective:
    return Objective(task, SEARCH, TRAINING, artifacts=tmp_path / "artifacts", recorder=listener)


def storage_of(kind: str, place: Path) -> Any:
    if kind == "journal":
        return open_journal(place / "journal.log")
    return f"sqlite:///{place / 'optuna.db'}" if kind == "database" else None


@pytest.fixture(params=["memory", "journal", "database"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], optuna.Study]:
    """Opens the same study, from its storage again each time where that outlives the process."""
    studies: list[optuna.Study] = []

    def open_study() -> optuna.Study:
        if request.param != "memory" or not studies:
            sampler = make_sampler(SEARCH)
            storage = storage_of(request.param, tmp_path)
            studies.append(
                optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)
            )
        return studies[-1]

    return open_study


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(sampler=make_sampler(SEARCH))


# What a trial reports and leaves, without Ray


def reports_of(
    objective: Objective, params: dict[str, Any], place: Path
) -> tuple[list[dict[str, Any]], Path]:
    """What a worker reports for these parameters, and the folder that it leaves."""
    reports = []
    augmentation = objective.search.space.augmentation(params)
    for evaluation in evaluations(objective.task, augmentation, objective.training):
        reports.append({**evaluation.metrics, "step": evaluation.step, "seconds": 1.5})
    folder = FolderStore(place).put("trial-00000", evaluation.judged, evaluation.detector)
    return reports, Path(folder)


def tell_whole(ledger: Ledger, ray_trial: str, place: Path) -> list[dict[str, Any]]:
    params = ledger.ask(ray_trial)
    assert params is not None
    reports, folder = reports_of(ledger.objective, params, place / ray_trial)
    ledger.started(ray_trial)
    for report in reports:
        ledger.progress(ray_trial, report)
    ledger.ended(ray_trial, reports[-1], folder)
    return reports


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def test_a_trial_told_by_a_ledger_is_the_trial_of_a_local_search(
    objective: Objective,
    open_again: Callable[[], optuna.Study],
    tmp_path: Path,
    listener: Any,
) -> None:
    ledger = Ledger(objective, open_again())
    tell_whole(ledger, "a", tmp_path / "worker")
    trial = open_again().trials[0]
    told, listener.heard = listener.heard, []
    local = optuna.create_study(sampler=make_sampler(SEARCH))
    local.optimize(
        Objective(objective.task, SEARCH, TRAINING, recorder=listener, artifacts=tmp_path / "local"),
        n_trials=1,
    )
    same = local.trials[0]
    assert (trial.state, trial.params, trial.value) == (TrialState.COMPLETE, same.params, same.value)
    assert trial.intermediate_values == same.intermediate_values
    for name in (*metric_names(), "budget", "hyperparameters"):
        assert trial.user_attrs[name] == same.user_attrs[name], name
    mine, theirs = (open_kept(str(read_trial(t).address)) for t in (trial, same))
    assert np.array_equal(mine.scores, theirs.scores)
    assert mine.detector is not None and mine.detector.augmentation == theirs.detector.augmentation
    for event, expected in zip(told, listener.heard, strict=True):
        assert event[:2] == expected[:2]
        if event[0] != "ended":
            assert event == expected
    assert told[-1][2] == "complete"


def test_a_trial_that_a_scheduler_stops_is_pruned_and_never_selected_though_it_is_better(
    objective: Objective, open_again: Callable[[], optuna.Study], tmp_path: Path, listener: Any
) -> None:
    ledger = Ledger(objective, open_again())
    tell_whole(ledger, "whole", tmp_path)
    ledger.ask("stopped")
    ledger.started("stopped")
    last = {**dict.fromkeys(metric_names(), -1e9), "step": 3, "seconds": 1.0}
    ledger.ended("stopped", last, None)  # Ray tells its searcher nothing of the report that stops a trial
    study = open_again()
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert study.trials[1].intermediate_values == {3: -1e9} and study.trials[1].value == -1e9
    assert read_trial(study.trials[1]).budget is None
    assert [c.number for c in candidates(study)] == [0] and select(study).number == 0
    assert [e[:2] for e in listener.of("ended")] == [["0", "complete"], ["1", "pruned"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_trial_whose_criterion_is_not_finite_fails_with_its_hyperparameters(
    value: float, objective: Objective, open_again: Callable[[], optuna.Study], tmp_path: Path, listener: Any
) -> None:
    ledger = Ledger(objective, open_again())
    ledger.ask("a")
    ledger.started("a")
    result = {**dict.fromkeys(metric_names(), 0.5), "dsv": value, "step": TRAINING.steps, "seconds": 1.0}
    ledger.progress("a", result)
    ledger.ended("a", result, tmp_path)
    trial = open_again().trials[0]
    assert trial.state == TrialState.FAIL and trial.intermediate_values == {}
    assert f"dsv is {value} under cut" in str(read_trial(trial).reason) and is_final(trial)
    assert listener.of("ended") == [["0", "failed", {}, read_trial(trial).reason]]


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_trial_that_says_why_it_failed_is_marked_so(
    status: str,
    objective: Objective,
    open_again: Callable[[], optuna.Study],
    listener: Any,
) -> None:
    ledger = Ledger(objective, open_again())
    ledger.ask("a")
    ledger.started("a")
    ledger.ended("a", {"dsv": float("nan"), "step": 0, "status": status, "reason": "the reason"}, None)
    trial = open_again().trials[0]
    assert trial.state == TrialState.FAIL and read_trial(trial).reason == "the reason"
    assert read_trial(trial).status == status
    assert is_final(trial) == (status == "failed")
    assert listener.of("ended") == [["0", status, {}, "the reason"]]


def test_what_is_told_twice_counts_once(
    objective: Objective, open_again: Callable[[], optuna.Study], tmp_path: Path, listener: Any
) -> None:
    """As by a trial whose worker died, or that Ray takes up from a snapshot older than the study."""
    ledger = Ledger(objective, open_again())
    reports = tell_whole(ledger, "a", tmp_path)
    before, heard = open_again().trials[0], list(listener.heard)
    for again in (ledger, Ledger(objective, open_again())):
        again.started("a")
        for report in reports:
            again.progress("a", report)
        again.checkpointed("a", "elsewhere")
        again.ended("a", {**reports[-1], "dsv": -7.0}, tmp_path / "nothing")
        again.failed("a", "failed", "too late")
    assert open_again().trials == [before] and listener.heard == heard


def test_a_report_that_is_repeated_by_a_new_worker_is_not_told_again(
    objective: Objective, study: optuna.Study, listener: Any
) -> None:
    ledger = Ledger(objective, study)
    ledger.ask("a")
    report = {**dict.fromkeys(metric_names(), 0.5), "step": 3, "seconds": 1.0}
    for _ in range(2):
        ledger.started("a")
        ledger.progress("a", report)
    assert [event for event, *_ in listener.heard] == ["started", "progress"]


def test_what_a_dead_driver_left_open_is_closed_and_repeated_from_its_checkpoint(
    objective: Objective, open_again: Callable[[], optuna.Study], tmp_path: Path, listener: Any
) -> None:
    dead = Ledger(objective, open_again())
    tell_whole(dead, "finished", tmp_path)
    going, lost = dead.ask("going"), dead.ask("lost")
    dead.checkpointed("lost", "/shared/checkpoint_000000")
    ledger = Ledger(objective, open_again())
    ledger.take_up(["going"])
    assert states(open_again()) == ["COMPLETE", "RUNNING", "FAIL", "WAITING"]
    assert [e[:2] for e in listener.of("ended")] == [["0", "complete"], ["2", "interrupted"]]
    again = ledger.ask("again")
    assert again == {**(lost or {}), CHECKPOINT: "/shared/checkpoint_000000"}
    assert read_trial(open_again().trials[3]).repeats == 2
    ledger.progress("going", {**dict.fromkeys(metric_names(), 0.5), "step": 3, "seconds": 1.0})
    assert open_again().trials[1].intermediate_values == {3: 0.5} and going
    fresh = ledger.ask("new")
    assert fresh and CHECKPOINT not in fresh
    assert ledger.close("the sweep was stopped") == 3
    assert "RUNNING" not in states(open_again())


def test_a_trial_whose_artifacts_do_not_arrive_is_interrupted_and_may_be_repeated(
    objective: Objective, study: optuna.Study, tmp_path: Path
) -> None:
    ledger = Ledger(objective, study)
    whole = {**dict.fromkeys(metric_names(), 0.5), "step": TRAINING.steps, "seconds": 1.0}
    for ray_trial, kept in (("a", None), ("b", tmp_path / "gone")):
        ledger.ask(ray_trial)
        ledger.ended(ray_trial, whole, kept)
    reasons = [str(trial.reason) for trial in records(study)]
    assert "is missing" in reasons[0] and "gone" in reasons[1]
    assert not any(is_final(trial) for trial in study.trials)


def test_the_best_detectors_are_kept_across_trials_by_the_criterion(
    task: Task, study: optuna.Study, tmp_path: Path
) -> None:
    objective = Objective(task, replace(SEARCH, keep=2), TRAINING, artifacts=tmp_path / "artifacts")
    ledger = Ledger(objective, study)
    for n in range(5):
        tell_whole(ledger, f"trial{n}", tmp_path / "workers")
    best = {t.number for t in sorted(study.trials, key=lambda t: t.value)[:2]}
    best |= {int(np.argmin([t.user_attrs[name] for t in study.trials])) for name in CRITERIA}
    kept = {c.number for c in candidates(study) if c.kept().detector is not None}
    assert kept == best and len(candidates(study)) == 5
    names = {path.name for path in Path(candidates(study)[0].address).iterdir()}
    assert names - {"detector"} == {"arrays.npz"}


def test_an_objective_in_memory_keeps_what_workers_send(
    task: Task, study: optuna.Study, tmp_path: Path
) -> None:
    objective = Objective(task, SEARCH, TRAINING)
    tell_whole(Ledger(objective, study), "a", tmp_path)
    shutil.rmtree(tmp_path / "a")
    chosen = select(study)
    assert chosen.address.startswith("memory:")
    assert np.array_equal(chosen.detector().score(task.unlabeled).numpy(), chosen.scores())


def test_a_grid_ends_by_itself_and_its_lost_candidates_are_drawn_again(objective: Objective) -> None:
    objective.search = Search(SearchSpace("cutavg"), sampler="grid", grid_points=2)
    study = optuna.create_study(sampler=make_sampler(objective.search))
    ledger = Ledger(objective, study)
    drawn = [ledger.ask(name) for name in "abcd"]
    assert drawn == objective.search.space.grid(2) and ledger.ask("e") is None
    for name in "abc":
        ledger.failed(name, "failed", "some reason")
    again = Ledger(objective, study)
    again.take_up([])
    assert again.ask("f") == drawn[3] and again.ask("g") is None


def test_a_study_that_is_not_minimised_is_refused(objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"expected one that minimises dsv, .*got maximize"):
        Ledger(objective, optuna.create_study(direction="maximize"))


def test_a_database_that_comes_back_is_waited_for_and_another_error_is_not() -> None:
    left = [optuna.exceptions.StorageInternalError("gone"), optuna.exceptions.StorageInternalError("gone")]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(work) == "done"
    left.append(optuna.exceptions.StorageInternalError("gone"))
    with pytest.raises(optuna.exceptions.StorageInternalError):
        patiently(work, patience=0.0)
    with pytest.raises(KeyError):
        patiently(lambda: {}["x"])


# The searcher, without a cluster


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
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"cpus_per_trial": 0}, "cpu", "cpus_per_trial: expected a number above 0, got 0"),
        ({"cpus_per_trial": 1e6}, "cpu", "cpus_per_trial: expected at most this machine's"),
        ({"gpus_per_trial": -1}, "cpu", "gpus_per_trial: expected a number of at least 0, got -1"),
        (
            {"gpus_per_trial": 0.5},
            "cpu",
            "gpus_per_trial: .* for 'cuda' alone, got 0.5 for 'cpu'",
        ),
        ({}, "cuda", "gpus_per_trial: expected above 0 for 'cuda' alone, got 0.* for 'cuda'"),
        ({"max_concurrent": 0}, "cpu", "max_concurrent: expected at least 1, got 0"),
        ({"address": "ray://host:1"}, "cpu", "address: expected 'auto' or HOST:PORT .*, got 'ray://host:1'"),
    ]
    for arguments, device, message in wrong:
        with pytest.raises(ValueError, match=message):
            check_cluster(Cluster(**arguments), device)


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


# On a real Ray


class Awkward(SearchSpace):
    """A space of which one kind raises in the worker, as a GPU without memory does."""

    def augmentation(self, params: Any) -> Any:
        if params["augmentation"] == "rotation" and "RAY_RAYLET_PID" in os.environ:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().augmentation(params)


@pytest.mark.services
def test_a_sweep_tells_each_trials_status_and_selects_by_full_budget(
    local_ray: str, task: Task, tmp_path: Path, listener: Any
) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know the tests
    space = Awkward({"cutavg": {}, "cutdiff": COLLAPSING, "rotation": {}})
    objective = Objective(
        task,
        Search(space, n_trials=11, pruner="asha"),
        TRAINING,
        artifacts=tmp_path / "a",
        recorder=listener,
    )
    study = optuna.create_study(sampler=make_sampler(objective.search))
    for kind in ("cutdiff", "rotation"):
        study.enqueue_trial({"augmentation": kind})
    for area in (0.05, 0.01, 0.1, 0.2, 0.003, 0.3, 0.02, 0.15):
        params = {"cutavg.patch_area": area, "cutavg.patch_aspect": 1.0}
        study.enqueue_trial({"augmentation": "cutavg", **params})
    sweep(objective, study, Cluster(checkpoint_path=str(tmp_path / "shared")))
    trials = study.trials
    assert len(trials) == 11
    counts = Counter(trial.state.name for trial in trials)
    assert counts["FAIL"] >= 2 and counts["PRUNED"] >= 2 and counts["COMPLETE"] >= 2
    assert counts["FAIL"] + counts["PRUNED"] + counts["COMPLETE"] == 11
    kept = records(study)
    assert "collapsed at step 3 under cutdiff" in str(kept[0].reason)
    assert str(kept[1].reason).startswith("OutOfMemoryError: CUDA out of memory")
    statuses = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    ended = {int(trial): (status, reason) for trial, status, _, reason in listener.of("ended")}
    assert ended == {t.number: (statuses[t.state.name], kept[t.number].reason) for t in trials}
    assert len(listener.of("ended")) == len(listener.of("started")) == 11
    for trial in trials[2:10]:  # the last is drawn, of any kind
        found = evaluations(task, space.augmentation(trial.params), TRAINING)
        expected = {e.step: e.judged.criteria["dsv"] for e in found}
        last = max(trial.intermediate_values, default=0)
        assert trial.intermediate_values == {step: v for step, v in expected.items() if step <= last}
        if trial.state == TrialState.PRUNED:
            assert list(trial.intermediate_values) == [3] and kept[trial.number].budget is None
        elif trial.state == TrialState.COMPLETE:
            assert kept[trial.number].budget == TRAINING.steps
    chosen = select(study)
    assert chosen.number in {t.number for t in trials if t.state == TrialState.COMPLETE}
    assert np.array_equal(chosen.detector().score(task.unlabeled).numpy(), chosen.scores())
    assert not list((tmp_path / "shared").rglob("checkpoint_*"))  # what is kept is in the objective's store
    sweep(objective, study, Cluster(checkpoint_path=str(tmp_path / "shared")))
    assert study.trials == trials  # nothing is left to do


def go_on(firsts: list[float], factor: int) -> list[bool]:
    """Who of a row of trials is among the best of every `factor` that came so far."""
    return [
        not earlier or value <= np.percentile(earlier, 100 / factor)
        for value, earlier in ((value, firsts[:i]) for i, value in enumerate(firsts))
    ]


@pytest.mark.services
def test_the_reduction_factor_of_a_sweep_decides_how_many_trials_go_on(local_ray: str, task: Task) -> None:
    whole = {}
    for factor in (2, 4):
        result = start_sweep(
            task, training=TRAINING, n_trials=10, sampler="random", reduction_factor=factor,
            pruner="asha", max_concurrent=1, tracking_uri=None, run=f"factor{factor}",
        )  # fmt: skip
        firsts = [trial.intermediate_values[3] for trial in result.study.trials]
        whole[factor] = [trial.state == TrialState.COMPLETE for trial in result.study.trials]
        assert whole[factor] == go_on(firsts, factor)
    assert sum(whole[4]) < sum(whole[2]) < 10


@pytest.mark.services
def test_a_users_own_tuner_takes_five_lines_and_goes_on_when_a_worker_is_killed(
    local_ray: str, task: Task, tmp_path: Path
) -> None:
    from ray import tune

    killed: list[str] = []
    heard: list[tuple[str, dict[str, Any]]] = []

    class Killer(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            heard.append((trial.trial_id, {k: result.get(k) for k in ("step", "dsv", "seconds")}))

        def on_trial_save(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            if not killed and trial.last_result["step"] == 3:
                killed.append(trial.trial_id)
                os.kill(trial.last_result["pid"], signal.SIGKILL)

    objective = Objective(task, SEARCH, TRAINING)
    # The five lines:
    study = optuna.create_study()
    searcher = StudySearcher(objective, study)
    run = tune.RunConfig(
        storage_path=str(tmp_path),
        verbose=0,
        callbacks=[searcher.callback, Killer()],
        failure_config=tune.FailureConfig(max_failures=1),
    )
    config = tune.TuneConfig(search_alg=searcher, num_samples=3)
    tune.Tuner(trainable(objective), tune_config=config, run_config=run).fit()

    assert states(study) == ["COMPLETE"] * 3
    for trial in study.trials:
        *_, last = evaluations(task, SPACE.augmentation(trial.params), TRAINING)
        assert read_trial(trial).criteria == last.judged.criteria
    mine = [report for ray_trial, report in heard if ray_trial == killed[0]]
    # It says again what its checkpoint holds, to the millisecond, and only then trains on.
    assert [report["step"] for report in mine] == [3, 3, 6] and mine[0] == mine[1]
    assert np.array_equal(select(study).detector().score(task.unlabeled).numpy(), select(study).scores())


DRIVER = """
import sys, optuna, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_raytune as t
torch.set_num_threads(1)
t.{function}(Path({place!r}), {address!r})
"""


def start_driver(function: str, place: Path, address: str) -> subprocess.Popen[bytes]:
    program = DRIVER.format(
        tests=str(Path(__file__).parent), function=function, place=str(place), address=address
    )
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)


def kill_when(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert driver.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline, "nothing to kill the driver for"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def sweep_settings() -> dict[str, Any]:
    return {
        "training": Training(**{**TRAINING.__dict__, "steps": 60}),
        "space": SPACE,
        "sampler": "random",
        "n_trials": 5,
        "tracking_uri": None,
    }


def run_the_sweep(folder: Path, address: str) -> None:
    start_sweep(
        controlled_data(image_size=32, n_train=16, n_unlabeled=12).task,
        run=folder,
        address=address,
        **sweep_settings(),
    )


@pytest.mark.services
def test_a_sweep_whose_driver_is_killed_goes_on_and_nothing_is_lost_or_counted_twice(
    local_ray: str, task: Task, tmp_path: Path, listener: Any
) -> None:
    folder = tmp_path / "run"
    journal = folder / "journal.log"
    driver = start_driver("run_the_sweep", folder, local_ray)
    kill_when(lambda: journal.exists() and journal.read_text().count('"budget"') >= 2, driver)
    copy = tmp_path / "copy.log"
    shutil.copy(journal, copy)
    before = optuna.load_study(study_name=None, storage=open_journal(copy)).trials
    assert Counter(trial.state for trial in before)[TrialState.RUNNING] >= 1

    result = resume_study(folder, task=task, listeners=[listener])
    after = result.study.trials
    for trial in before:
        if trial.state.is_finished():
            assert after[trial.number] == trial
    assert Counter(trial.state.name for trial in after if is_final(trial)) == {"COMPLETE": 5}
    assert not {"RUNNING", "WAITING"} & set(states(result.study))
    interrupted = [trial for trial in after if not is_final(trial)]
    repeated = [trial for trial in after if read_trial(trial).repeats is not None]
    for again, first in zip(repeated, interrupted, strict=True):
        assert again.params.items() >= first.params.items()  # the kill may have come between two draws
    training = open_run(folder).settings.training
    for trial in repeated:
        *_, last = evaluations(task, SPACE.augmentation(trial.params), training)
        assert read_trial(trial).criteria == last.judged.criteria
    assert result.selected.number == open_result(folder).selected.number
    assert {path.name for path in result.run.artifacts.iterdir()} == {
        Path(str(t.address)).name for t in records(result.study) if t.status == "complete"
    }


def tune_by_hand(place: Path, address: str) -> None:
    """A user's own Tuner on a study in a database, or the same one restored."""
    import ray
    from ray import tune

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False)
    task = controlled_data(image_size=32, n_train=16, n_unlabeled=12).task
    objective = Objective(task, SEARCH, sweep_settings()["training"], artifacts=place / "artifacts")
    database = f"sqlite:///{place / 'optuna.db'}"
    study = optuna.create_study(study_name="mine", storage=database, load_if_exists=True)
    searcher = StudySearcher(objective, study)
    if tune.Tuner.can_restore(str(place / "tuned")):
        tuner = tune.Tuner.restore(str(place / "tuned"), trainable(objective))
    else:
        tuner = tune.Tuner(
            trainable(objective),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=5, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tuned", storage_path=str(place), callbacks=[searcher.callback], verbose=0
            ),
        )
    tuner.fit()


@pytest.mark.services
def test_a_users_restored_tuner_keeps_its_searcher_and_agrees_with_its_database(
    local_ray: str, task: Task, tmp_path: Path
) -> None:
    def study() -> optuna.Study:
        return optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path / 'optuna.db'}")

    def two_are_done() -> bool:
        return (tmp_path / "tuned").exists() and states(study()).count("COMPLETE") >= 2

    driver = start_driver("tune_by_hand", tmp_path, local_ray)
    kill_when(two_are_done, driver)
    before = study().trials
    tune_by_hand(tmp_path, local_ray)
    after = study().trials
    for trial in before:
        if trial.state.is_finished():
            assert after[trial.number] == trial
    assert not {"RUNNING", "WAITING"} & set(states(study()))
    assert states(study()).count("COMPLETE") >= 5 - 1
    chosen = select(study())
    assert np.array_equal(chosen.detector().score(task.unlabeled).numpy(), chosen.scores())


@pytest.mark.services
def test_ctrl_c_marks_what_runs_and_the_sweep_goes_on_later(
    local_ray: str, task: Task, tmp_path: Path
) -> None:
    pressed: list[str] = []

    class Impatient:
        def trial_started(self, *_: Any) -> None: ...

        def trial_progress(self, *_: Any) -> None: ...

        def trial_ended(self, trial: str, status: str, *_: Any) -> None:
            if status == "complete" and not pressed:
                pressed.append(trial)
                os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(StudyInterrupted):
        start_sweep(task, run=tmp_path / "run", listeners=[Impatient()], **sweep_settings())
    journal = optuna.load_study(study_name=None, storage=open_journal(tmp_path / "run" / "journal.log"))
    assert 1 <= states(journal).count("COMPLETE") < 5 and "RUNNING" not in states(journal)
    result = resume_study(tmp_path / "run", task=task, n_trials=3)
    assert sum(is_final(trial) for trial in result.study.trials) >= 3
    with pytest.raises(RunError, match="holds no run"):
        resume_study(tmp_path / "other")
