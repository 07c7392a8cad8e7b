"""Search: the objective on real trainings, sampling, pruning, selection, what is kept."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from held_out import held_out_task
from optuna.trial import FrozenTrial, TrialState

import ssad_hpo
from ssad_hpo import Objective, candidates, select
from ssad_hpo.criteria import CRITERIA, evaluate_all, measured
from ssad_hpo.judgement import Judged, evaluations
from ssad_hpo.search import (
    Candidate,
    first_rung,
    make_pruner,
    make_sampler,
    open_kept,
    open_study,
    position,
    records,
    run_search,
)
from ssad_hpo.search.sampling import EnumeratedSampler, SeededSampler
from ssad_hpo.search.store import FolderStore, Kept, MemoryStore
from ssad_hpo.storage import open_journal
from ssad_hpo.task import PRUNERS, SAMPLERS, Augmentation, Search, SearchSpace, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

TRAINING = Training(steps=8, batch_size=8, width=2, evaluate_at=(0.5, 0.75, 1.0))
KINDS = SearchSpace({"cutout": {}, "cutpaste": {"patch_aspect": 1.0}, "rotation": {}})
# A spot so large that it blackens every image: the augmented embeddings are all one point.
COLLAPSING = {"patch_area": 1e6}


@pytest.fixture(scope="module")
def task() -> Task:
    """With held-out images, so that every criterion is known."""
    return held_out_task()


@pytest.fixture
def objective(task: Task) -> Objective:
    return Objective(task, Search(KINDS), TRAINING)


def study_of(objective: Objective, n_trials: int, **settings: Any) -> optuna.Study:
    """A study with reproducible draws, without pruning unless that is asked for."""
    sampler = make_sampler(replace(objective.search, sampler="random"))
    study = optuna.create_study(sampler=sampler, **{"pruner": optuna.pruners.NopPruner(), **settings})
    study.optimize(objective, n_trials=n_trials)
    return study


def complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=[TrialState.COMPLETE])


# The objective


def test_a_bare_study_optimizes_the_objective_and_gives_a_working_detector(
    objective: Objective, task: Task
) -> None:
    study = optuna.create_study()
    study.optimize(objective, n_trials=8)
    states = {trial.state for trial in study.trials}
    assert len(study.trials) == 8 and states <= {TrialState.COMPLETE, TrialState.PRUNED}
    chosen = select(study)
    assert chosen.number == study.best_trial.number
    assert chosen.criteria["dsv"] == study.best_value == min(trial.value for trial in complete(study))
    scores = chosen.detector().score(task.unlabeled).numpy()
    assert np.array_equal(scores, chosen.scores())
    assert scores.shape == (16,) and np.isfinite(scores).all() and np.ptp(scores) > 0


def test_a_finished_trial_carries_all_its_attributes(objective: Objective, task: Task) -> None:
    study = study_of(objective, n_trials=4)
    for trial, record in zip(study.trials, records(study), strict=True):
        assert record.criteria.keys() == set(measured())
        assert trial.user_attrs.keys() == record.criteria.keys() | {
            "loss",
            "seconds",
            "budget",
            "hyperparameters",
            "artifacts",
        }
        assert (record.status, record.budget, record.reason) == ("complete", TRAINING.steps, None)
        assert trial.user_attrs["seconds"] > 0 and record.loss is not None and record.loss > 0
        assert record.augmentation is not None and record.address is not None
        kind = trial.params["augmentation"]
        assert record.augmentation.kind == kind
        drawn = {f"{kind}.{name}": value for name, value in record.augmentation.hyperparameters.items()}
        fixed = {"cutpaste.patch_aspect": 1.0} if kind == "cutpaste" else {}
        assert drawn == {name: value for name, value in trial.params.items() if "." in name} | fixed
        kept = open_kept(record.address)
        sets, scores = kept.embeddings, [torch.from_numpy(kept.scores), torch.from_numpy(kept.held_out)]
        assert len(sets.train) == len(sets.augmented) == 24 and len(sets.unlabeled) == 16
        assert sets.held_out is not None and len(sets.held_out) == len(scores[1]) == 13
        assert evaluate_all(sets.train, sets.augmented, sets.unlabeled, *scores) == record.criteria


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_chosen_criterion_is_reported_at_every_evaluation_step_and_returned(
    criterion: str, task: Task
) -> None:
    training = Training(steps=6, batch_size=4, width=2, evaluate_at=(1 / 3, 0.5, 1))
    trial = study_of(Objective(task, Search(KINDS, criterion), training), n_trials=1).trials[0]
    assert tuple(trial.intermediate_values) == training.evaluation_steps == (2, 3, 6)
    assert trial.intermediate_values[6] == trial.value == trial.user_attrs[criterion]
    augmentation = KINDS.augmentation(trial.params)
    expected = [e.judged.criteria[criterion] for e in evaluations(task, augmentation, training)]
    assert list(trial.intermediate_values.values()) == expected


def test_the_same_hyperparameters_always_give_the_same_detector(objective: Objective, task: Task) -> None:
    study = study_of(objective, n_trials=2)
    again = Objective(task, Search(KINDS), TRAINING)
    study.enqueue_trial(study.trials[0].params)
    study.optimize(again, n_trials=1)
    first, _, third = study.trials
    assert third.intermediate_values == first.intermediate_values
    for name in (*measured(), "loss"):
        assert third.user_attrs[name] == first.user_attrs[name]
    before, _, after = (open_kept(record.address) for record in records(study))
    assert np.array_equal(before.scores, after.scores)


def test_nothing_is_drawn_from_global_random_states(objective: Objective) -> None:
    def states() -> bytes:
        return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state()))  # noqa: NPY002

    before = states()
    study_of(objective, n_trials=2)
    assert states() == before


def test_the_classifiers_own_score_is_kept_where_it_is_asked_for(task: Task) -> None:
    training = Training(steps=8, batch_size=8, width=2, score="classifier")
    objective = Objective(task, Search(), training)
    chosen = select(study_of(objective, n_trials=1))
    scores = chosen.scores()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.array_equal(scores, chosen.detector().score(task.unlabeled).numpy())


def test_a_recorder_hears_every_trial_from_start_to_end(objective: Objective, listener: Any) -> None:
    objective.recorder = listener
    study = study_of(objective, n_trials=3)
    events = ["started", *["progress"] * len(TRAINING.evaluation_steps), "ended"]
    assert [(event, trial) for event, trial, *_ in listener.heard] == [
        (event, str(number)) for number in range(3) for event in events
    ]
    for trial, (_, params, tags) in zip(study.trials, listener.of("started"), strict=True):
        kind = trial.params["augmentation"]
        assert params == {"augmentation": kind, **trial.user_attrs["hyperparameters"]}
        assert tags == {"augmentation": kind, "criterion": "dsv", "task": "gravel/cutavg"}
    for trial, step, metrics in listener.of("progress"):
        assert metrics.keys() == {*measured(), "loss"}
        assert metrics["dsv"] == study.trials[int(trial)].intermediate_values[step]
    for trial, status, metrics, reason in listener.of("ended"):
        assert (status, reason) == ("complete", None)
        assert metrics == {name: study.trials[int(trial)].user_attrs[name] for name in metrics}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "auc"}, r"criterion: expected one of dsv, .*, got 'auc'"),
        ({"keep": 0}, r"keep: expected a whole number >= 1, got 0"),
        (
            {"space": SearchSpace({"cutout": {}, "cutpaste": {"patch_area": 0.6}})},
            r"cutpaste: a patch of area 0.6 .* does not fit",
        ),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_trained(
    arguments: dict[str, Any], message: str, task: Task
) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(task, Search(**arguments))


# Anywhere


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a fresh process, which has to end well."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def optimize_pickled(place: Path, params: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    results = []
    for objective in pickle.loads((place / "objectives.pickle").read_bytes()):
        study = optuna.create_study()
        for drawn in params:
            study.enqueue_trial(drawn)
        study.optimize(objective, n_trials=len(params))
        chosen = select(study)
        scores = chosen.detector().score(objective.task.unlabeled)
        results.append(([trial.value for trial in study.trials], chosen.address, scores.numpy()))
    (place / "results.pickle").write_bytes(pickle.dumps(results))


def test_a_pickled_objective_works_in_another_process_and_gives_the_same(task: Task, workplace: Path) -> None:
    """The copy keeps the best in a memory of its own, or in the same folder."""
    here = Objective(task, Search(KINDS), TRAINING)
    study = study_of(here, n_trials=2)
    artifacts = workplace / "artifacts"
    there = [here, Objective(task, Search(KINDS), TRAINING, artifacts=artifacts)]
    (workplace / "objectives.pickle").write_bytes(pickle.dumps(there))
    in_a_process(optimize_pickled, workplace, [trial.params for trial in study.trials])
    in_memory, in_a_folder = pickle.loads((workplace / "results.pickle").read_bytes())
    for values, _, scores in (in_memory, in_a_folder):
        assert values == [trial.value for trial in study.trials]
        assert np.array_equal(scores, select(study).scores())
    assert in_memory[1].startswith("memory:")
    assert Path(in_a_folder[1]).parent == artifacts
    assert Path(in_a_folder[1]).name.startswith(f"trial-{select(study).number:05d}-")
    assert np.array_equal(open_kept(in_a_folder[1]).scores, select(study).scores())


def test_an_unpickled_objective_keeps_its_own_trials(objective: Objective) -> None:
    study_of(objective, n_trials=1)
    copy = pickle.loads(pickle.dumps(objective))
    assert isinstance(objective.store, MemoryStore) and isinstance(copy.store, MemoryStore)
    assert len(objective.store.trials) == 1 and copy.store.trials == {}
    study = study_of(copy, n_trials=1)
    assert len(copy.store.trials) == 1
    assert select(study).detector() is next(iter(copy.store.trials.values())).detector


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in (folder, *folder.rglob("*"))
    }


def test_the_ready_made_objectives_work_anywhere_and_write_nothing(tmp_path: Path) -> None:
    """In a read-only directory, with the package on a read-only path and a home that is read-only."""
    package, place, home = tmp_path / "package", tmp_path / "unrelated", tmp_path / "home"
    shutil.copytree(
        Path(ssad_hpo.__file__).parent, package / "ssad_hpo", ignore=shutil.ignore_patterns("__pycache__")
    )
    place.mkdir()
    home.mkdir()
    everything = [path for top in (package, place, home) for path in (top, *top.rglob("*"))]
    for path in everything:  # holds for everybody but root, for whom the comparison below does
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = {top: tree(top) for top in (package, place, home)}
    program = f"""
import optuna, ssad_hpo
assert ssad_hpo.__file__.startswith({str(package)!r}), ssad_hpo.__file__
quick = ssad_hpo.Training(steps=8, batch_size=8, width=2)  # minutes become seconds
for objective in (ssad_hpo.dsv_objective, ssad_hpo.smooth_alignment_objective):
    objective.training = quick
study = optuna.create_study()
study.optimize(ssad_hpo.dsv_objective, n_trials=2)
other = optuna.create_study()
other.optimize(ssad_hpo.smooth_alignment_objective, n_trials=1)
for each, criterion in ((study, "dsv"), (other, "smooth_alignment")):
    assert all(t.state.name == "COMPLETE" for t in each.trials)
    assert each.trials[0].value == each.trials[0].user_attrs[criterion]
    chosen = ssad_hpo.select(each, criterion)
    scores = chosen.detector().score(ssad_hpo.dsv_objective.task.unlabeled).numpy()
    assert (scores == chosen.scores()).all()
"""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "SSAD_HPO_"))},
        "HOME": str(home),
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        subprocess.run([sys.executable, "-c", program], cwd=place, env=environment, check=True)
        assert {top: tree(top) for top in before} == before
    finally:
        for path in everything:  # so that pytest can remove them
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_the_package_has_one_ready_made_objective_of_each_kind() -> None:
    assert ssad_hpo.dsv_objective is ssad_hpo.dsv_objective
    assert ssad_hpo.dsv_objective.criterion == "dsv"
    assert ssad_hpo.smooth_alignment_objective.criterion == "smooth_alignment"


# Trials that give no detector


def test_a_collapse_in_one_trial_fails_it_with_its_reason_and_the_study_goes_on(
    task: Task, listener: Any
) -> None:
    space = SearchSpace({"cutavg": {}, "cutdiff": COLLAPSING})
    objective = Objective(task, Search(space, sampler="random"), TRAINING, recorder=listener)
    study = optuna.create_study(sampler=make_sampler(objective.search))
    study.enqueue_trial({"augmentation": "cutavg"})
    study.enqueue_trial({"augmentation": "cutdiff"})
    study.enqueue_trial({"augmentation": "cutavg"})
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    failed = records(study)[1]
    reason = failed.reason
    assert reason is not None and failed.augmentation is not None
    assert "collapsed" in reason and "cutdiff(patch_area=1e+06, patch_aspect=" in reason
    hyperparameters = failed.augmentation.hyperparameters
    assert hyperparameters == {
        "patch_area": 1e6,
        "patch_aspect": study.trials[1].params["cutdiff.patch_aspect"],
    }
    assert f"patch_aspect={hyperparameters['patch_aspect']:.4g}" in reason
    assert failed.budget is None and failed.address is None
    ends = {trial: (status, said) for trial, status, _, said in listener.of("ended")}
    assert ends == {"0": ("complete", None), "1": ("failed", reason), "2": ("complete", None)}
    assert select(study).number in (0, 2)


def test_a_diverging_learning_rate_fails_every_trial_and_select_says_so(task: Task) -> None:
    training = Training(steps=8, batch_size=8, width=2, learning_rate=1e30)
    study = study_of(Objective(task, Search(), training), n_trials=3)
    for trial in records(study):
        assert trial.status == "failed" and trial.reason is not None
        assert "diverged" in trial.reason and "cutavg(" in trial.reason
    with pytest.raises(ValueError, match=r"no trial ran its whole budget, .* nothing to select \(3 failed\)"):
        select(study)


def test_an_error_that_is_no_detectors_fault_is_not_swallowed(objective: Objective) -> None:
    class Broken:
        def trial_started(self, *_: Any) -> None: ...

        def trial_progress(self, *_: Any) -> None:
            raise RuntimeError("a defect of ours")

        def trial_ended(self, trial: str, status: str, metrics: Any, reason: str | None = None) -> None:
            self.end = (trial, status, reason)

    objective.recorder = broken = Broken()
    study = optuna.create_study()
    with pytest.raises(RuntimeError, match="a defect of ours"):
        study.optimize(objective, n_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert records(study)[0].status == "interrupted"
    assert broken.end == ("0", "interrupted", "RuntimeError('a defect of ours')")


# Pruning


def test_a_poor_trial_raises_trialpruned_at_its_first_evaluation(objective: Objective, listener: Any) -> None:
    objective.recorder = listener
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=-1e9))
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned, match="stopped at step 4"):
        objective(trial)
    assert list(study.trials[0].intermediate_values) == [4]
    assert records(study)[0].budget is None
    assert listener.of("ended") == [["0", "pruned", {}, "stopped at step 4"]]


def test_a_pruned_trial_is_never_selected_even_with_the_better_value(objective: Objective) -> None:
    freely = study_of(objective, n_trials=6)
    firsts = sorted(trial.intermediate_values[4] for trial in freely.trials)
    middle = (firsts[2] + firsts[3]) / 2
    # Stops those below the middle, which are the better ones.
    study = study_of(objective, n_trials=6, pruner=optuna.pruners.ThresholdPruner(lower=middle))
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    chosen = select(study)
    assert len(pruned) >= 3 and any(t.value < chosen.criteria["dsv"] for t in pruned)
    assert {c.number for c in candidates(study)} == {t.number for t in complete(study)}
    assert chosen.number not in [t.number for t in pruned]


def test_successive_halving_stops_the_worse_half_at_the_first_evaluation(objective: Objective) -> None:
    pruner = make_pruner(Search(pruner="asha", reduction_factor=2), TRAINING)
    assert isinstance(pruner, optuna.pruners.SuccessiveHalvingPruner)
    study = study_of(objective, n_trials=10, pruner=pruner)
    firsts: list[float] = []
    for trial in study.trials:
        firsts.append(trial.intermediate_values[4])
        best_half = sorted(firsts)[: max(1, len(firsts) // 2)]
        survives = trial.intermediate_values[4] in best_half
        assert trial.state == (TrialState.COMPLETE if survives else TrialState.PRUNED)
        assert list(trial.intermediate_values) == (list(TRAINING.evaluation_steps) if survives else [4])
    assert Counter(trial.state for trial in study.trials)[TrialState.PRUNED] >= 3


@pytest.mark.parametrize("steps", [9, 31, 100, 250, 499, 10_000])
@pytest.mark.parametrize(
    ("factor", "evaluate_at"), [(4, (0.125, 0.5, 1.0)), (3, (1 / 9, 1 / 3, 1.0)), (2, (0.25, 0.5, 1.0))]
)
def test_every_rung_is_judged_at_its_own_evaluation(
    steps: int, factor: int, evaluate_at: tuple[float, ...]
) -> None:
    """250 steps with factor 3: evaluated at 28 and 83, so a rung at three times 28 would be missed."""
    training = Training(steps=steps, evaluate_at=evaluate_at)
    study = optuna.create_study(pruner=make_pruner(Search(pruner="asha", reduction_factor=factor), training))
    for value in range(4):
        trial = study.ask()
        for step in training.evaluation_steps[:-1]:
            trial.report(value, step)
            trial.should_prune()
        study.tell(trial, value)
    rungs = [key for key in study.trials[0].system_attrs if key.startswith("completed_rung")]
    assert len(rungs) == 2 and first_rung(training) <= training.evaluation_steps[0]


def test_a_reduction_factor_below_two_is_named() -> None:
    with pytest.raises(ValueError, match="reduction_factor: expected a whole number >= 2, got 1"):
        Search(pruner="asha", reduction_factor=1)


def test_the_other_pruners_are_optunas_own_and_an_unknown_one_is_named() -> None:
    assert isinstance(make_pruner(Search(pruner="median"), TRAINING), optuna.pruners.MedianPruner)
    assert isinstance(make_pruner(Search(), TRAINING), optuna.pruners.NopPruner)
    with pytest.raises(ValueError, match=f"pruner: expected one of {', '.join(PRUNERS)}, got 'hyperband'"):
        Search(pruner="hyperband")  # type: ignore[arg-type]


# Selection


def test_trials_of_a_smaller_budget_do_not_compete(task: Task) -> None:
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    for steps in (4, 8, 4):
        training = replace(TRAINING, steps=steps)
        study.optimize(Objective(task, Search(), training), n_trials=2)
    assert [trial.budget for trial in records(study)] == [4, 4, 8, 8, 4, 4]
    assert [candidate.number for candidate in candidates(study)] == [2, 3]
    for criterion in CRITERIA:
        assert select(study, criterion).number in (2, 3)


def test_every_criterion_selects_its_minimum_with_a_detector_at_hand(tmp_path: Path, task: Task) -> None:
    objective = Objective(task, Search(KINDS, "mmd", keep=2), TRAINING, artifacts=tmp_path / "artifacts")
    study = study_of(objective, n_trials=10)
    by_mmd = sorted(study.trials, key=lambda trial: trial.user_attrs["mmd"])
    best = {trial.number for trial in by_mmd[:2]}
    for criterion in CRITERIA:
        values = [trial.user_attrs[criterion] for trial in study.trials]
        best.add(int(np.argmin(values)))
        chosen = select(study, criterion)
        assert chosen.number == int(np.argmin(values)) and chosen.criteria[criterion] == min(values)
        assert np.array_equal(chosen.detector().score(task.unlabeled).numpy(), chosen.scores())
        assert chosen.detector().augmentation == chosen.augmentation
    assert 2 <= len(best) < 10
    for candidate in candidates(study):
        kept = candidate.kept()
        assert (kept.detector is not None) == (candidate.number in best)
        assert kept.scores.shape == (16,) and len(kept.embeddings.unlabeled) == 16
        folder = Path(candidate.address)
        assert folder.parent == tmp_path / "artifacts"
        names = {"arrays.npz"} | ({"detector"} if candidate.number in best else set())
        assert {path.name for path in folder.iterdir()} == names


def test_a_detector_that_was_not_kept_is_missed_with_a_remedy(tmp_path: Path, task: Task) -> None:
    objective = Objective(task, Search(KINDS, keep=1), TRAINING, artifacts=tmp_path)
    poor = max(candidates(study_of(objective, n_trials=8)), key=lambda c: c.criteria["dsv"])
    with pytest.raises(FileNotFoundError, match=rf"trial {poor.number}: .* a larger keep"):
        poor.detector()


def test_memory_keeps_only_the_best_few(objective: Objective) -> None:
    study = study_of(objective, n_trials=12)
    best = {trial.number for trial in sorted(study.trials, key=lambda t: t.value)[: objective.search.keep]}
    best |= {int(np.argmin([t.user_attrs[name] for t in study.trials])) for name in CRITERIA}
    assert isinstance(objective.store, MemoryStore)
    at = {candidate.number: candidate.address.rpartition("/")[2] for candidate in candidates(study)}
    assert objective.store.trials.keys() == {at[number] for number in best} and len(best) < 12
    for candidate in candidates(study):
        if candidate.number in best:
            assert candidate.detector() is objective.store.trials[at[candidate.number]].detector
        else:
            with pytest.raises(FileNotFoundError, match=f"trial {candidate.number}: .* artifacts folder"):
                candidate.scores()


def test_of_equal_trials_the_earliest_is_selected(task: Task) -> None:
    study = optuna.create_study()
    for _ in range(3):
        study.enqueue_trial({"cutavg.patch_area": 0.05, "cutavg.patch_aspect": 1.0})
    objective = Objective(task, Search(), TRAINING)
    study.optimize(objective, n_trials=3)
    assert len({trial.value for trial in study.trials}) == 1
    assert select(study).number == 0


def test_artifacts_are_found_again_where_their_folder_was_moved_to(tmp_path: Path, task: Task) -> None:
    study = study_of(Objective(task, Search(), TRAINING, artifacts=tmp_path / "before"), n_trials=2)
    scores = select(study).scores()
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(FileNotFoundError, match="artifacts are gone; was the folder moved"):
        select(study).kept()
    moved = select(study, artifacts=tmp_path / "after")
    assert np.array_equal(moved.scores(), scores)
    assert moved.detector().augmentation == moved.augmentation


def test_what_cannot_be_selected_is_named(objective: Objective) -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=-1e9))
    with pytest.raises(ValueError, match=r"nothing to select \(none\)"):
        select(study)
    study.optimize(objective, n_trials=2)
    with pytest.raises(ValueError, match=r"nothing to select \(2 pruned\)"):
        select(study)
    with pytest.raises(ValueError, match=r"criterion: expected one of dsv, .*, got 'separability'"):
        select(study, "separability")


def judged(kept: Kept) -> Judged:
    """What was kept of a detector, to be kept again."""
    return Judged({}, kept.embeddings, torch.from_numpy(kept.scores))


def test_a_trial_is_put_into_a_folder_whole_and_discarded_whole(tmp_path: Path, objective: Objective) -> None:
    kept = select(study_of(objective, n_trials=1)).kept()
    assert kept.detector is not None
    store = FolderStore(tmp_path / "artifacts")
    left_by_a_kill = store.root / "trial-00007.partial"
    left_by_a_kill.mkdir(parents=True)
    (left_by_a_kill / "arrays.npz").write_bytes(b"half")
    address = store.put("trial-00007", judged(kept), kept.detector)
    assert [path.name for path in store.root.iterdir()] == ["trial-00007"]
    assert np.array_equal(open_kept(address).scores, kept.scores)
    left_by_a_kill.mkdir()
    store.discard("trial-00007")
    assert list(store.root.iterdir()) == []


def test_a_detector_is_dropped_once_and_again_after_its_trial_was_put_again(
    tmp_path: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for all detectors of a study after each of its trials takes longer with every trial."""
    kept = select(study_of(objective, n_trials=1)).kept()
    assert kept.detector is not None
    removed: list[str] = []
    remove = shutil.rmtree

    def remove_and_tell(path: Any, **settings: Any) -> None:
        removed.append(Path(path).parent.name)
        remove(path, **settings)

    store = FolderStore(tmp_path / "artifacts")
    for put in ("345", "", "4"):
        for trial in put:
            store.put(trial, judged(kept), kept.detector)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", remove_and_tell)
            store.drop_detectors([str(store.root / trial) for trial in "345"])
        assert [path.name for path in store.root.rglob("detector")] == []
    assert sorted(removed) == ["3", "4", "4", "5"]


# Sampling

# A cheap stand-in for a training with the same conditional parameters: samplers see numbers only.
SPACE = SearchSpace({"cutout": {}, "cutpaste": {}})
ONE_KIND = SearchSpace("cutout")


def depth(trial: optuna.Trial) -> float:
    return _depth(SPACE.suggest(trial))


def depth_of_one_kind(trial: optuna.Trial) -> float:
    return _depth(ONE_KIND.suggest(trial))


def _depth(augmentation: Augmentation) -> float:
    values = augmentation.hyperparameters
    return float(np.log(values["patch_area"]) ** 2 + values.get("angle", 0.0) / 45)


def steepness(trial: optuna.Trial) -> float:
    return -depth(trial)


def sampled(name: str, n_trials: int, seed: int = 0, function: Any = depth) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=make_sampler(Search(SPACE, sampler=name, seed=seed)))
    study.optimize(function, n_trials=n_trials)
    return [trial.params for trial in study.trials]


def sampler_study(name: str, storage: Any = None) -> tuple[optuna.Study, Any]:
    """A study with a sampler by name and the function that it minimises; a storage's own study."""
    space, function = (ONE_KIND, depth_of_one_kind) if name == "gp" else (SPACE, depth)
    sampler = make_sampler(Search(space, sampler=name, grid_points=2))
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)
    return study, function


def continue_sampling(place: Path) -> None:
    for name in SAMPLERS:
        study, function = sampler_study(name, open_journal(place / name))
        study.optimize(function, n_trials=3)


def test_every_sampler_goes_on_in_a_fresh_process_as_if_it_had_never_stopped(workplace: Path) -> None:
    whole = {}
    for name in SAMPLERS:
        first = 8 if name == "grid" else 11  # TPE and GP lean on the history from the 11th on
        study, function = sampler_study(name)
        study.optimize(function, n_trials=first + 3)
        whole[name] = [trial.params for trial in study.trials]
        study, function = sampler_study(name, open_journal(workplace / name))
        study.optimize(function, n_trials=first)
    in_a_process(continue_sampling, workplace)
    for name in SAMPLERS:
        study, _ = sampler_study(name, open_journal(workplace / name))
        params = [trial.params for trial in study.trials]
        assert len(params) == (11 if name == "grid" else 14)
        assert params == whole[name], name
        assert len({str(values) for values in params}) == len(params), f"{name} repeats itself"


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_seed_gives_the_same_draws_and_another_seed_others(name: str) -> None:
    first = sampled(name, 6)
    assert sampled(name, 6) == first
    assert sampled(name, 6, seed=1) != first


def test_tpe_leans_on_the_history_after_its_first_ten_trials() -> None:
    down, up = sampled("tpe", 12), sampled("tpe", 12, function=steepness)
    assert down[:10] == up[:10]
    assert down[10:] != up[10:]
    assert sampled("random", 12) == sampled("random", 12, function=steepness)


def test_draws_differ_by_trial_and_by_name() -> None:
    sampler = SeededSampler(lambda seed: optuna.samplers.RandomSampler(seed=seed), seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda t: t.suggest_float("a", 0, 1) + t.suggest_float("b", 0, 1), n_trials=20)
    draws = [value for trial in study.trials for value in trial.params.values()]
    assert len(set(draws)) == 40
    # In another order, so that not the order of the draws decides but their names.
    turned = optuna.create_study(sampler=sampler)
    turned.optimize(lambda t: t.suggest_float("b", 0, 1) + t.suggest_float("a", 0, 1), n_trials=20)
    assert [t.params for t in turned.trials] == [t.params for t in study.trials]


def test_draws_do_not_depend_on_what_became_of_a_trials_number() -> None:
    """A trial that repeats an interrupted one draws as that did, and so do all after it."""
    study = optuna.create_study(sampler=make_sampler(Search(SPACE, sampler="random")))
    study.optimize(depth, n_trials=2)
    interrupted = study.ask()
    SPACE.suggest(interrupted)
    study.tell(interrupted, state=TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={"retry_of": 2})
    study.optimize(depth, n_trials=3)
    trials = study.trials
    assert [position(study, trial) for trial in trials] == [0, 1, 2, 2, 3, 4]
    assert trials[2].params == trials[3].params
    assert [t.params for t in trials if t.number != 2] == sampled("random", 5)


@pytest.mark.parametrize("n_trials", [8, 100])
def test_the_grid_visits_every_candidate_once_and_ends_by_itself(n_trials: int) -> None:
    study = optuna.create_study(sampler=make_sampler(Search(SPACE, sampler="grid", grid_points=2)))
    study.optimize(depth, n_trials=n_trials)
    expected = SPACE.grid(2)
    assert len(expected) == 2**2 + 2**3
    assert [trial.params for trial in study.trials] == expected[:n_trials]
    assert len({str(sorted(params.items())) for params in expected}) == len(expected)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_a_grid_that_is_through_says_so_when_more_is_asked_of_it() -> None:
    study = optuna.create_study(sampler=EnumeratedSampler(SPACE.grid(2)))
    study.optimize(depth, n_trials=12)
    with pytest.raises(ValueError, match="the grid has 12 candidates and all have been tried"):
        study.optimize(depth, n_trials=1)


def test_running_a_search_whose_grid_is_through_does_nothing(task: Task) -> None:
    space = SearchSpace({"cutavg": {"patch_aspect": 1.0}})
    search = Search(space, sampler="grid", grid_points=3, n_trials=50)
    objective = Objective(task, search, TRAINING)
    study = open_study(optuna.storages.InMemoryStorage(), "grid", search, TRAINING)
    run_search(study, objective)
    assert [trial.params["cutavg.patch_area"] for trial in study.trials] == pytest.approx(
        [0.002, (0.002 * 0.3) ** 0.5, 0.3]
    )
    run_search(study, objective)
    assert len(study.trials) == 3


def test_a_search_brings_a_study_to_its_number_of_trials(task: Task) -> None:
    search = Search(sampler="random", n_trials=2)
    study = open_study(optuna.storages.InMemoryStorage(), "study", search, TRAINING)
    run_search(study, Objective(task, search, TRAINING))
    run_search(study, Objective(task, search, TRAINING))
    assert len(study.trials) == 2
    run_search(study, Objective(task, replace(search, n_trials=3), TRAINING))
    assert len(study.trials) == 3
    with pytest.raises(ValueError, match="n_trials: expected a whole number >= 0, got -1"):
        replace(search, n_trials=-1)
    with pytest.raises(
        ValueError, match="n_trials: expected a whole number >= 1, got 0, which with pretrained"
    ):
        Objective(task, replace(search, n_trials=0), TRAINING)


def test_a_gaussian_process_wants_one_kind_and_unknown_samplers_are_named() -> None:
    with pytest.raises(ValueError, match=r"'gp' needs a space of one kind .*, got cutout, cutpaste"):
        Search(SPACE, sampler="gp")
    with pytest.raises(ValueError, match=f"sampler: expected one of {', '.join(SAMPLERS)}, got 'cma-es'"):
        Search(SPACE, sampler="cma-es")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points: expected a whole number >= 2"):
        Search(SPACE, sampler="grid", grid_points=1)


def test_a_candidate_names_its_augmentation_with_fixed_values(task: Task) -> None:
    space = SearchSpace({"cutavg": {"patch_aspect": 1.0}})
    chosen = select(study_of(Objective(task, Search(space), TRAINING), n_trials=2))
    assert isinstance(chosen, Candidate) and chosen.budget == TRAINING.steps
    assert isinstance(chosen.augmentation, Augmentation)
    assert chosen.augmentation.kind == "cutavg"
    assert chosen.augmentation.hyperparameters["patch_aspect"] == 1.0
