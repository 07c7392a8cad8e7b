"""The best candidates trained again with other seeds: what is chosen then, what is kept, what is told."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from combined_runs import CLEAR, TRAINING
from conftest import Ended, Listener
from ray import exceptions
from ray.exceptions import RayTaskError
from starting import start_study, start_sweep
from told import records_in

from ssad_hpo.cli.program import is_full
from ssad_hpo.experiment import (
    Confirmation,
    StudyInterrupted,
    StudyResult,
    how_sure,
    load_task,
    open_result,
    open_run,
    report_run,
    resume_study,
)
from ssad_hpo.experiment.outcome import choose
from ssad_hpo.files import FileError
from ssad_hpo.raytune import reseeding
from ssad_hpo.search import Objective, read_reseeded, to_confirm
from ssad_hpo.search.reseeding import Again, train_again
from ssad_hpo.task import Augmentation, Cluster, Search

pytestmark = pytest.mark.usefixtures("workplace")

SETTINGS: dict[str, Any] = {"space": "cutout", "sampler": "random", "criterion": "shift", "n_trials": 4}


def confirmed_run(folder: str | Path, **settings: Any) -> StudyResult:
    given = {**SETTINGS, "training": TRAINING, "tracking_uri": None, "keep": 1, "confirm": 2, **settings}
    return start_study(CLEAR, run=folder, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "r"
    confirmed_run(folder)
    return folder


@pytest.fixture
def result(made: Path, workplace: Path) -> StudyResult:
    """One of two candidates, each with two other seeds, in a folder that a test may change."""
    shutil.copytree(made, "runs/r")
    return open_result("r")


def of(values: dict[int, tuple[float, ...]]) -> Confirmation:
    return Confirmation("shift", (0, 1, 2), values, seconds=12.0)


# What is said of values


def test_the_lowest_mean_over_all_seeds_is_chosen() -> None:
    found = of({4: (-1.0, -0.4, -0.4), 2: (-0.9, -0.8, -0.7), 7: (-0.5, -0.5, -0.8)})
    assert (found.first, found.chosen, found.stands) == (4, 2, False)
    assert found.means == pytest.approx({4: -0.6, 2: -0.8, 7: -0.6})
    assert found.spreads[2] == pytest.approx(0.1)
    (told,) = found.account("trial")
    assert "trial 2, shift -0.8 (spread 0.1) over 3 seeds, takes the place of trial 4" in told
    assert "6 more trainings of 2.0 s" in told
    (stands,) = of({4: (-1.0, -1.0, -0.9), 2: (-0.9, -0.8, -0.7)}).account("trial")
    assert "trial 4 stands, shift -0.9667" in stands


def test_what_a_seed_does_to_all_is_no_difference_between_them() -> None:
    swing = np.array([0.0, 5.0, -3.0])
    noise = np.array([[0.02, -0.01, -0.01], [-0.02, 0.01, 0.01]])
    values = np.array([[-1.0], [-0.5]]) + swing + noise
    found = of({0: tuple(values[0]), 1: tuple(values[1])})
    differences = values[1] - values[0]  # of two candidates: the error of paired differences
    assert found.error == pytest.approx(differences.std(ddof=1) / math.sqrt(3))
    assert found.tied == [] and min(found.spreads.values()) > 3


def test_means_within_two_standard_errors_are_ties_the_best_first() -> None:
    found = of({0: (-1.0, -0.6, -0.8), 1: (-0.5, -0.9, -0.7), 2: (-0.4, -0.9, -1.0), 3: (4.0, 4.1, 4.2)})
    assert found.chosen == 0 and found.tied == [2, 1]


def test_a_candidate_that_failed_with_some_seed_is_not_chosen() -> None:
    found = of({0: (-2.0, math.nan, -2.0), 1: (-0.5, -0.4, -0.6)})
    assert found.chosen == 1 and found.means[0] == math.inf and found.tied == []
    assert "(failed)" not in found.account("trial")[0] and "would choose, failed" in found.account("trial")[0]
    none = of({3: (-2.0, math.nan, -2.0), 1: (-3.0, -0.4, math.nan)})
    assert none.chosen == none.first == 3 and "stays as the search chose it" in none.account("trial")[0]


def test_a_single_candidate_has_a_spread_and_no_rival() -> None:
    found = of({5: (-1.0, -0.8, -0.9)})
    assert found.stands and found.tied == [] and math.isnan(found.error)
    assert found.account("trial")[0].startswith(
        "trial 5 was trained again with 2 other seeds: trial 5 stands"
    )


# What is trained


def test_a_training_is_done_again_as_it_was_but_for_its_seed(result: StudyResult) -> None:
    task, search, training = load_task(result.run), result.run.settings.method, result.run.settings.training
    best, second = to_confirm(result.study, search)
    same = train_again(task, search, training, "cpu", Again(best.number, training.seed, best.augmentation))
    assert same.criteria == best.criteria and same.loss == best.loss
    kept = read_reseeded(result.study)
    assert kept.keys() == {(n, seed) for n in (best.number, second.number) for seed in (1, 2)}
    other = train_again(task, search, training, "cpu", Again(second.number, 2, second.augmentation))
    assert other.criteria == kept[second.number, 2].criteria != second.criteria
    confirmation = result.confirmation
    assert confirmation is not None and confirmation.seeds == (0, 1, 2)
    assert confirmation.values[second.number] == (
        second.criteria["shift"],
        *(kept[second.number, seed].criteria["shift"] for seed in (1, 2)),
    )
    assert result.selected.number == confirmation.chosen


def test_there_are_no_more_than_a_search_has_and_every_ones_detector_is_kept(workplace: Path) -> None:
    tiny = replace(TRAINING, steps=2, batch_size=4, width=2)
    result = confirmed_run("few", n_trials=6, confirm=9, training=tiny)
    assert result.confirmation is not None and sorted(result.confirmation.values) == list(range(6))
    for candidate in to_confirm(result.study, result.run.settings.method):
        assert candidate.kept().detector is not None, "whichever the other seeds choose, it must be there"


def test_without_being_asked_for_nothing_is_trained_again(workplace: Path) -> None:
    result = confirmed_run("plain", confirm=0)
    assert result.confirmation is None and read_reseeded(result.study) == {}


def test_a_training_that_collapses_under_another_seed_says_so(result: StudyResult) -> None:
    task, settings = load_task(result.run), result.run.settings
    blackens = Augmentation("cutdiff", {"patch_area": 1e6, "patch_aspect": 1.0})
    found = train_again(task, settings.method, settings.training, "cpu", Again(0, 1, blackens))
    assert found.criteria == {} and found.loss is None and "collapsed" in str(found.reason)


def rewritten(result: StudyResult, changes: dict[int, float]) -> StudyResult:
    """The result if other seeds had found these values, by trial."""
    for (number, seed), found in read_reseeded(result.study).items():
        kept = {**found.criteria, "shift": changes[number]}
        attribute = {"criteria": kept, "loss": found.loss, "seconds": 1.0, "reason": None}
        result.study.set_user_attr(f"reseeded {number} {seed}", attribute)
    return open_result(result.run.folder)


def test_the_one_that_other_seeds_choose_is_what_the_run_ends_with(
    result: StudyResult, call: Callable[..., Ended]
) -> None:
    first, second = (c.number for c in to_confirm(result.study, result.run.settings.method))
    changed = rewritten(result, {first: 5.0, second: -5.0})
    assert changed.selected.number == second and changed.confirmation is not None
    assert changed.detector(single=True).score(load_task(result.run).unlabeled).shape == (60,)
    assert changed.evaluation is not None and changed.aucs is not None
    assert changed.evaluation.auc_selected == changed.aucs[second]
    page = report_run("r").read_text()
    why = f"among the best 2.</p><p>The best 2 trials were trained again with 2 other seeds: trial {second}, "
    assert why in page and f"<tr class='selected'><td>{second}</td><td>" in page
    said = call("evaluate", "r")
    assert said.code == 0 and f"takes the place of trial {first}" in " ".join(said.out.split())


def test_ties_over_seeds_are_told_in_the_words_of_other_ties(result: StudyResult) -> None:
    first, second = (c.number for c in to_confirm(result.study, result.run.settings.method))
    changed = rewritten(result, dict.fromkeys((first, second), -1.0))
    assert changed.confirmation is not None and changed.confirmation.tied
    other = {first: second, second: first}[changed.selected.number]
    tie = f"trial {other} cannot be told apart from trial {changed.selected.number} by shift over 3 seeds"
    assert any(sentence.startswith(tie) for sentence in how_sure(changed))
    assert not any("over 3 seeds" in s for s in how_sure(rewritten(result, {first: -9.0, second: 9.0})))


@pytest.mark.parametrize(
    "damage",
    [{"criteria": {"shift": "low"}}, {"criteria": {"shift": math.inf}}, {"seconds": None}, {"criteria": {}}],
)
def test_damaged_values_end_in_a_sentence(result: StudyResult, damage: dict[str, Any]) -> None:
    (number, seed), *_ = read_reseeded(result.study)
    whole = {"criteria": {"shift": 0.0}, "loss": 0.1, "seconds": 1.0, "reason": None}
    result.study.set_user_attr(f"reseeded {number} {seed}", {**whole, **damage})
    with pytest.raises(FileError, match=f"cannot be read at 'reseeded {number} {seed}'.*restore it"):
        open_result("r")


# What is interrupted, and what is told


class Stopping(Listener):
    """Ctrl-C as the third of these trainings begins: one candidate is through, the other is not."""

    def trial_started(self, trial: str, params: Any, tags: Any) -> None:
        super().trial_started(trial, params, tags)
        if sum("seed" in event[0] for event in self.of("started")) == 3:
            raise KeyboardInterrupt


def test_what_is_done_stays_after_ctrl_c_and_half_of_it_chooses_nothing(
    result: StudyResult, listener: Listener
) -> None:
    with pytest.raises(StudyInterrupted):
        confirmed_run("stopped", listeners=[Stopping()])
    run = open_run("stopped")
    study = optuna.load_study(study_name=None, storage=run.open_storage())
    assert len(read_reseeded(study)) == 2
    assert choose(run, study).confirmation is None
    again = resume_study("stopped", listeners=[listener])
    assert [event[0] for event in listener.of("started")] == [
        f"{number}, seed {seed}" for number, seed in list(read_reseeded(again.study))[2:]
    ]
    assert again.confirmation is not None and result.confirmation is not None
    assert again.confirmation.values == result.confirmation.values


def test_a_finished_run_trains_only_what_more_trials_bring(result: StudyResult, listener: Listener) -> None:
    before = read_reseeded(result.study)
    resume_study("r", listeners=[listener])
    assert listener.heard == []
    more = resume_study("r", n_trials=6)
    after = read_reseeded(more.study)
    assert {place: after[place] for place in before} == before
    assert {n for n, _ in after} >= {c.number for c in to_confirm(more.study, more.run.settings.method)}


def test_trainings_with_other_seeds_are_told_as_runs_of_their_own(
    tmp_path: Path, workplace: Path, empty_mlflow: Path
) -> None:
    result = confirmed_run("t", tracking_uri=f"sqlite:///{shutil.copy(empty_mlflow, tmp_path)}")
    records = records_in(result.run.outbox)
    first = to_confirm(result.study, result.run.settings.method)[0].number
    child = [r for r in records if r.get("trial") == f"{first}, seed 1"]
    assert [r.get("status") for r in child] == ["running", None, "complete"]
    assert child[0]["tags"]["repeats"] == str(first) and child[0]["tags"]["seed"] == "1"
    assert "augmentation" not in child[0]["tags"]  # by which views know a study's own trials
    assert result.confirmation is not None
    told = {name: value for r in records if "trial" not in r for name, value in r.get("metrics", {}).items()}
    assert told["confirmed_trials"] == 2 and told["choice_stands"] == result.confirmation.stands
    means = [r["metrics"]["shift_mean"] for r in records if "shift_mean" in r.get("metrics", {})]
    assert means == pytest.approx(list(result.confirmation.means.values()))
    notes = [r["note"] for r in records if "note" in r]
    assert "the lowest mean over 3 seeds among the best 2" in notes[-1] and "trained again" in notes[-1]


def test_the_command_line_counts_them_and_shows_their_values(call: Callable[..., Ended]) -> None:
    words = ["--steps", "4", "--batch-size", "4", "--width", "2", "--evaluate-at", "1", "--no-tracking"]
    said = call("search", "gravel/cutavg", "--trials", "2", "--confirm", "2", "--run", "c", *words)
    assert said.code == 0, said.err
    assert "after 4 more trainings of the best with other seeds" in said.out
    assert "(6 of 6)" in said.out and "trial 0, seed 1" in said.out
    found = open_result("c").confirmation
    assert found is not None
    shown = " ".join(said.out.split())
    for number in found.values:
        assert f"{found.means[number]:.4f}" in shown and f"{found.spreads[number]:.4f}" in shown
    assert found.account("trial")[0].partition(";")[0] in shown


@pytest.mark.services
@pytest.mark.ray
def test_a_sweep_trains_them_on_its_cluster_to_the_same_values(
    result: StudyResult, local_ray: str, listener: Listener
) -> None:
    swept = start_sweep(
        CLEAR, run="s", training=TRAINING, tracking_uri=None, keep=1, confirm=2, listeners=[listener],
        address=local_ray, **SETTINGS,
    )  # fmt: skip
    assert swept.confirmation is not None and result.confirmation is not None
    by_values = sorted(result.confirmation.values.values())
    assert sorted(swept.confirmation.values.values()) == by_values
    again = [event[0] for event in listener.of("ended") if "seed" in event[0]]
    assert len(again) == 4 and set(again) == {f"{n}, seed {s}" for n, s in read_reseeded(swept.study)}


# What a cluster does to them, which says nothing of a candidate

AGAIN = Again(3, 2, Augmentation("cutout", {"patch_area": 0.1, "patch_aspect": 1.0}))


def raised_by_a_worker(cause: Exception) -> Exception:
    """As `ray.get` raises what a task raised."""
    raised: Exception = RayTaskError("_train_again", "Traceback\n  ...", cause, ip="127.0.0.1", pid=1)
    return raised.as_instanceof_cause()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (exceptions.WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly"),
        (exceptions.NodeDiedError("its node died"), "NodeDiedError: its node died"),
        (exceptions.ObjectLostError("00ff", "127.0.0.1:1", ""), "ObjectLostError"),
        (exceptions.OutOfMemoryError("too little memory"), "OutOfMemoryError: too little memory"),
        (exceptions.TaskCancelledError(), "TaskCancelledError"),
        (ConnectionError("no head"), r"ConnectionError: no head\)"),
        (raised_by_a_worker(OSError(28, "No space left on device")), "OSError: .* No space left on device"),
        (raised_by_a_worker(ConnectionError("broken")), r"\(ConnectionError: broken\)"),
        (raised_by_a_worker(ValueError("weights: none there")), r"\(ValueError: weights: none there\)"),
        (raised_by_a_worker(exceptions.ObjectLostError("00ff", "127.0.0.1:1", "")), "ObjectLostError"),
    ],
)
def test_a_fault_of_the_cluster_is_no_failure_of_a_candidate(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def get(reference: object) -> None:
        raise error

    monkeypatch.setattr(reseeding.ray, "get", get)
    said = rf"^trial 3 was not trained again with seed 2, .*{told}.*go on with --resume$"
    with pytest.raises(ConnectionError, match=said) as caught:
        reseeding._result_of(None, AGAIN)
    assert "\n" not in str(caught.value)
    assert is_full(caught.value) == ("No space" in told)


@dataclass(frozen=True)
class Deadly(Search):
    """Settings that end the worker process which unpickles them, as a lost node would; not the driver."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').getpid() == {os.getpid()} or __import__('os')._exit(1)",)


@dataclass(frozen=True)
class Unreadable(Search):
    """Settings that a worker cannot read, since a disk of its node is gone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/nowhere/settings",)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.ray
def test_what_a_cluster_cuts_off_is_trained_by_the_next_call(
    result: StudyResult, local_ray: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cluster = result.run, Cluster(address=local_ray, max_concurrent=1)
    monkeypatch.setattr(reseeding, "MAX_FAILURES", 0)  # a new worker process takes seconds
    confirmed = read_reseeded(result.study)
    study = optuna.create_study()
    study.add_trials(result.study.trials)
    task, search = load_task(run), run.settings.method
    assert isinstance(search, Search)
    search = replace(search, confirm=1)
    objective = Objective(task, search, run.settings.training, artifacts=run.artifacts, recorder=listener)
    objective.search = Deadly(**{f.name: getattr(search, f.name) for f in fields(search)})
    with pytest.raises(ConnectionError, match=r"seed \d, since the Ray cluster failed \(WorkerCrashedError"):
        reseeding.confirm(study, objective, cluster)
    objective.search = Unreadable(**{f.name: getattr(search, f.name) for f in fields(search)})
    with pytest.raises(ConnectionError, match=r"failed \(\w+: .*No such file or directory: '/nowhere"):
        reseeding.confirm(study, objective, cluster)
    assert read_reseeded(study) == {}
    assert {event[1] for event in listener.of("ended")} == {"interrupted"}
    objective.search = search
    reseeding.confirm(study, objective, cluster)
    found = read_reseeded(study)
    assert len(found) == 2
    assert all(one.criteria == confirmed[key].criteria for key, one in found.items())
