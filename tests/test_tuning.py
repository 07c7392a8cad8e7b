"""Whole tunings by gradient: the study that one is, its run folder, MLflow, and what cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held_out import ALWAYS
from optuna.trial import TrialState
from tuned_runs import ANOMALY, SOURCE, TRAINING, TUNING, Tracked, all_of, quick

from ssad_hpo import controlled_data, data
from ssad_hpo.bilevel import LOSSES, CollapseWarning, tune
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment import (
    RunError,
    evaluate_run,
    open_result,
    open_run,
    read_trajectory,
    report_run,
    resume_study,
    run_study,
)
from ssad_hpo.search import candidates, records, select
from ssad_hpo.task import Augmentation, DetectorError, Range, Search

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


def test_a_run_finds_what_the_tuning_alone_finds(tracked: Tracked) -> None:
    result = tracked.result
    alone = tune(data.load(SOURCE), TUNING, TRAINING)
    assert result.selected.number == alone.chosen and result.selected.augmentation == alone.augmentation
    for start, expected in zip(candidates(result.study), alone.starts, strict=True):
        assert start.augmentation == expected.augmentation
        assert read_trajectory(start) == expected.trajectory
        assert start.scores().tolist() == expected.scores.tolist()
        assert start.criteria == {**expected.criteria, "validation_loss": expected.validation_loss}


def test_every_start_is_a_trial_that_ran_its_whole_budget(tracked: Tracked) -> None:
    result = tracked.result
    assert [trial.state.name for trial in result.study.trials] == ["COMPLETE", "COMPLETE"]
    for trial, kept in zip(result.study.trials, records(result.study), strict=True):
        assert trial.value == kept.criteria["dsv"] and kept.budget == 12
        assert trial.params.keys() == {"augmentation", "cutdiff.patch_area", "cutdiff.patch_aspect"}
        assert trial.user_attrs["images"] > 0
    assert result.study.trials[1].user_attrs["start"] == {"patch_area": 0.2, "patch_aspect": 1.5}
    for name in ALWAYS:
        assert select(result.study, name) in candidates(result.study)


def test_ground_truth_judges_every_start_and_the_choice(tracked: Tracked) -> None:
    result, labels = tracked.result, data.read_labels(SOURCE)
    aucs = {start.number: auc(labels, start.scores()) for start in candidates(result.study)}
    assert result.aucs == aucs and result.evaluation is not None
    assert result.evaluation.auc_selected == aucs[result.selected.number]
    assert result.evaluation.auc_oracle == max(aucs.values())
    assert result.evaluation.regret == max(aucs.values()) - aucs[result.selected.number]


def test_the_validation_loss_can_choose_among_starts_but_not_among_a_searchs_trials() -> None:
    result = quick(tuning=replace(TUNING, choose_by="validation_loss"))
    losses = [start.criteria["validation_loss"] for start in candidates(result.study)]
    assert result.selected.number == int(np.argmin(losses))
    assert [trial.value for trial in result.study.trials] == losses
    assert open_result("tuned").selected == result.selected
    search = Search("cutdiff", n_trials=1)
    searched = run_study(SOURCE, search, replace(TRAINING, steps=8), tracking_uri=None)
    with pytest.raises(ValueError, match=r"criterion: expected one of dsv, .*, got 'validation_loss'"):
        select(searched.study, "validation_loss")


def test_settings_of_a_tuning_written_and_opened_are_the_same(tracked: Tracked) -> None:
    run = tracked.result.run
    assert open_run(run.folder) == run
    assert run.settings.tuning == TUNING and run.settings.training == replace(TRAINING, precision="float32")
    assert {path.name for path in run.folder.iterdir()} >= {
        "settings.json",
        "lock",
        "journal.log",
        "checkpoint.pt",
    }


def test_a_task_in_memory_is_tuned_and_not_judged() -> None:
    task = controlled_data(anomaly=ANOMALY, image_size=32, n_train=20, n_unlabeled=14).task
    result = quick(images=task)
    assert result.aucs is None and result.evaluation is None
    with pytest.raises(ValueError, match="there is no ground truth"):
        evaluate_run("tuned")
    with pytest.raises(RunError, match="give the task again"):
        resume_study("tuned")
    assert all_of(resume_study("tuned", task=task)) == all_of(result)


# MLflow


def test_mlflow_has_the_tuning_as_a_parent_with_its_settings_and_figures(tracked: Tracked) -> None:
    parent, _ = runs_of(tracked)
    settings, figures = tracked.result.run.settings, tracked.result.evaluation
    assert parent.info.status == "FINISHED" and figures is not None
    assert parent.data.params == {name: str(value) for name, value in settings.flat().items()}
    assert parent.data.params["tuning.loss"] == "two_sided_alignment" and "sampler" not in parent.data.params
    tags = {"criterion": "dsv", "method": "st-ssad", "loss": "two_sided_alignment"}
    assert tags.items() <= parent.data.tags.items()
    for name in ("auc_selected", "auc_oracle", "regret"):
        assert parent.data.metrics[name] == round(getattr(figures, name), 6)
    assert parent.data.metrics["images_forward"] > parent.data.metrics["images_backward"] > 0
    assert parent.data.metrics["images_second"] == 0  # of first order


def test_mlflow_has_a_child_for_every_start_with_its_trajectory_as_metrics_over_steps(
    tracked: Tracked,
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    parent, children = runs_of(tracked)
    assert children.keys() == {"start 0", "start 1"} and tracked.result.aucs is not None
    for start in candidates(tracked.result.study):
        child = children[f"start {start.number}"]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        trajectory = read_trajectory(start)
        assert [outer.step for outer in trajectory] == [6, 8, 10, 12]
        for name in ("patch_area", "patch_aspect", "training_loss", "validation_loss"):
            points = {p.step: p.value for p in client.get_metric_history(child.info.run_id, name)}
            assert points == {
                outer.step: {**outer.hyperparameters, **vars(outer)}[name] for outer in trajectory
            }
        for name, value in start.augmentation.hyperparameters.items():
            assert child.data.metrics[f"learned.{name}"] == value
        assert child.data.metrics["dsv"] == start.criteria["dsv"]
        assert child.data.metrics["auc"] == round(tracked.result.aucs[start.number], 6)
        signs = records(tracked.result.study)[start.number].signs
        assert child.data.tags.get("collapse", "") == "; ".join(signs)


def runs_of(tracked: Tracked) -> tuple[Any, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    experiment = client.get_experiment_by_name("ssad_hpo")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return runs.pop(tracked.result.run.settings.title), runs


def test_collapse_is_warned_of_and_tagged_on_the_start_and_the_tuning(
    workplace: Path, empty_mlflow: Path
) -> None:
    # Whatever the gradient says, a range so narrow is all at its bounds.
    narrow = Augmentation("cutdiff", {"patch_area": Range(0.1, 0.102, log=True), "patch_aspect": 1.0})
    shutil.copy(empty_mlflow, workplace / "mlflow.db")
    with pytest.warns(CollapseWarning, match="cutdiff.patch_area ended at its"):
        result = quick(
            space=narrow, tuning=replace(TUNING, starts=(0.5,)), tracking_uri="sqlite:///mlflow.db"
        )
    (sign, *_) = records(result.study)[0].signs
    parent, children = runs_of(Tracked(f"sqlite:///{workplace}/mlflow.db", result))
    for run in (parent, *children.values()):
        assert run.data.tags["collapse"].startswith(sign)


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "blur"}, "augmentation: expected one of cutout"),
        ({"space": ANOMALY}, "expected a range for what is to be tuned"),
        ({"space": Augmentation("cutout", {"patch_area": Range(0.1, 0.9)})}, "does not fit"),
        ({"tuning": replace(TUNING, loss=lambda a, b, c: a.sum())}, "loss: a run can only keep the name"),
        ({"tuning": replace(TUNING, starts=({"angle": 1.0},))}, "starts: expected values of patch_area"),
        ({"training": replace(TRAINING, encoder="mind")}, "encoder: expected 'small' or a torchvision"),
        ({"tuning": replace(TUNING, warm_start=0.95)}, "steps: expected at least 2"),
        ({"threads": 0}, "threads: expected"),
        ({"device": "abacus"}, "device: expected"),
        ({"tracking_uri": "mlruns"}, "tracking_uri: expected sqlite:///FILE"),
        ({"images": "nowhere"}, "nowhere: there is no such folder"),
    ],
)  # fmt: skip
def test_a_wrong_argument_of_a_tuning_is_named_and_nothing_is_written(
    arguments: dict[str, Any], message: str, workplace: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**arguments)
    assert list(workplace.iterdir()) == []


def test_a_training_that_diverges_ends_the_tuning_with_its_hyperparameters(listener: Any) -> None:
    with pytest.raises(DetectorError, match=r"diverged: .* under cutdiff\(patch_area="):
        quick(training=replace(TRAINING, learning_rate=1e30), listeners=[listener])
    with pytest.raises(ValueError, match="nothing to select"):
        open_result("tuned")


def test_a_start_that_fails_is_a_failed_trial_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    calls = 0
    ours = LOSSES["two_sided_alignment"]

    def once(*sets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ours(*sets) * (float("nan") if calls == 1 else 1)

    monkeypatch.setitem(LOSSES, "two_sided_alignment", once)
    with pytest.warns(CollapseWarning, match=r"^start 0: diverged"):
        result = quick()
    first, second = result.study.trials
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert (reason := records(result.study)[0].reason) is not None
    assert reason.startswith("diverged: validation loss nan")
    assert result.selected.number == 1 and result.aucs is not None and set(result.aucs) == {1}
    said = call("evaluate", "tuned").out
    assert "start 0 failed: diverged: validation loss nan" in said and "not done" not in said
    assert "Start 0 failed: diverged" in report_run("tuned").read_text(encoding="utf-8")
