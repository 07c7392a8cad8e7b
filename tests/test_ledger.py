"""What Optuna is told of the trials of a sweep, on real storages and without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from held_out import ALWAYS
from optuna.trial import TrialState
from small_sweeps import SEARCH, TRAINING, small_task, states

from ssad_hpo import Objective, candidates, select
from ssad_hpo.judgement import evaluations, metric_names
from ssad_hpo.raytune.ledger import CHECKPOINT, Ledger, patiently
from ssad_hpo.search import is_final, make_sampler, open_kept, records
from ssad_hpo.search.record import read_trial
from ssad_hpo.search.store import FolderStore
from ssad_hpo.storage import open_journal
from ssad_hpo.task import Search, SearchSpace, Task

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


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
    measured = {name for name in metric_names() if name in same.user_attrs}  # no images are held out
    assert "dsv" in measured and measured == {name for name in metric_names() if name in trial.user_attrs}
    for name in (*measured, "budget", "hyperparameters"):
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


@pytest.mark.parametrize("end", ["complete", "pruned", "failed"])
def test_a_kill_before_the_recorder_has_heard_of_an_end_leaves_no_trial_that_it_takes_for_running(
    end: str, objective: Objective, open_again: Callable[[], optuna.Study], tmp_path: Path, listener: Any
) -> None:
    class Killed(type(listener)):  # type: ignore[misc]
        def trial_ended(self, *_: Any) -> None:
            raise KeyboardInterrupt

    objective.recorder = Killed()
    ledger = Ledger(objective, open_again())
    with pytest.raises(KeyboardInterrupt):
        if end == "complete":
            tell_whole(ledger, "a", tmp_path)
        else:
            ledger.ask("a")
            ledger.started("a")
            reason = {"status": end, "reason": "the reason"} if end == "failed" else {}
            ledger.ended("a", {**dict.fromkeys(metric_names(), 0.5), "step": 3, **reason}, None)
    objective.recorder = listener
    Ledger(objective, open_again()).take_up([])
    expected = "failed" if end == "failed" else "interrupted"
    assert [e[:2] for e in listener.of("ended")] == [["0", expected]]
    assert states(open_again()) == (["FAIL"] if end == "failed" else ["FAIL", "WAITING"])


def test_a_trial_whose_artifacts_do_not_arrive_is_interrupted_and_may_be_repeated(
    objective: Objective, study: optuna.Study, tmp_path: Path
) -> None:
    ledger = Ledger(objective, study)
    whole = {**dict.fromkeys(metric_names(), 0.5), "step": TRAINING.steps, "seconds": 1.0}
    for ray_trial, kept in (("a", None), ("b", tmp_path / "gone")):
        ledger.ask(ray_trial)
        ledger.ended(ray_trial, whole, kept)
    reasons = [str(trial.reason) for trial in records(study) if trial.status == "interrupted"]
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
    best |= {int(np.argmin([t.user_attrs[name] for t in study.trials])) for name in ALWAYS}
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
    with pytest.raises(ValueError, match=r"minimises dsv, as optuna.create_study\(\) does, got maximize"):
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


def test_checkpoints_that_nobody_was_told_of_go_with_the_sweep(tmp_path: Path) -> None:
    from ssad_hpo.raytune.checkpoints import discard_untold

    untold = tmp_path / "study" / "trial-1a" / "checkpoint_000000" / "progress.pt"
    others = tmp_path / "another" / "trial-1a" / "checkpoint_000000" / "progress.pt"
    state = tmp_path / "study" / "trial-1a" / "result.json"
    for file in (untold, others, state):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"some")
    discard_untold(str(tmp_path / "study"))
    discard_untold("s3://bucket/study")
    assert not untold.parent.exists() and others.exists() and state.exists()
