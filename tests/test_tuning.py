"""Whole tunings by gradient: run folder, MLflow, kill and Ctrl-C, the command line, the report."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from PIL import Image

from ssad_hpo import controlled_data, data
from ssad_hpo.bilevel import DEFAULT_TRAINING, LOSSES, CollapseWarning, Tuning, tune
from ssad_hpo.cli import main
from ssad_hpo.criteria import CRITERIA
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment import (
    RunError,
    StudyInterrupted,
    StudyResult,
    evaluate_run,
    find_source,
    load_detector,
    open_result,
    open_run,
    read_trajectory,
    report_run,
    resume_study,
    resume_tuning,
    run_study,
    run_tuning,
)
from ssad_hpo.report import Course, ImageRow, Trajectory
from ssad_hpo.report.trajectory import examples_figure, trajectory_figure
from ssad_hpo.search import candidates, select
from ssad_hpo.search.objective import BUDGET
from ssad_hpo.task import Augmentation, DetectorError, Range, Training

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

PROCESSES = multiprocessing.get_context("forkserver")  # whose server conftest prepares

TRAINING = Training(width=4, steps=12, batch_size=4)
# Two starts of 4 steps of the hyperparameters each, at the training steps 6, 8, 10 and 12.
TUNING = Tuning(
    detector_steps=2,
    warm_start=1 / 3,
    validation_train=6,
    validation_unlabeled=5,
    starts=(0.5, {"patch_area": 0.2, "patch_aspect": 1.5}),
    checkpoint_every=2,
)
ANOMALY = Augmentation("cutdiff", {"patch_area": 0.1, "patch_aspect": 1.0})
SOURCE = data.Source("controlled", {"image_size": 32, "n_train": 20, "n_unlabeled": 14, "anomaly": ANOMALY})


def quick(run: str | Path = "tuned", **others: Any) -> StudyResult:
    settings = {"tuning": TUNING, "training": TRAINING, "tracking_uri": None, "threads": 1, **others}
    return run_tuning(
        settings.pop("images", SOURCE), settings.pop("augmentation", "cutdiff"), run=run, **settings
    )


def all_of(result: StudyResult) -> list[Any]:
    """All that a tuning found, to the last bit; addresses and durations are no part of it."""
    found: list[Any] = [result.selected.number, result.aucs]
    for start, trial in zip(candidates(result.study, result.run.artifacts), result.study.trials, strict=True):
        kept = start.kept()
        assert kept.detector is not None
        attributes = {k: v for k, v in trial.user_attrs.items() if k not in ("artifacts", "seconds")}
        weights = {name: tensor.tolist() for name, tensor in kept.detector.network.state_dict().items()}
        found += [trial.params, attributes, read_trajectory(start), kept.scores.tolist(), weights]
    return found


@dataclass(frozen=True)
class Tracked:
    uri: str
    result: StudyResult


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Tracked]:
    """A tuning with ground truth, tracked by a real MLflow."""
    place = tmp_path_factory.mktemp("tracked")
    shutil.copy(empty_mlflow, place / "mlflow.db")
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    uri = f"sqlite:///{place}/mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        result = quick(place / "tuned", tracking_uri=uri)
    yield Tracked(uri, result)
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)


@pytest.fixture
def tuned(tracked: Tracked, workplace: Path) -> StudyResult:
    """The tuning in a folder of this test's own, runs/tuned."""
    shutil.copytree(tracked.result.run.folder, workplace / "runs" / "tuned")
    return open_result("tuned")


# The study that a tuning is


def test_a_run_finds_what_the_tuning_alone_finds(tracked: Tracked) -> None:
    result = tracked.result
    alone = tune(data.load(SOURCE), "cutdiff", TUNING, TRAINING)
    assert result.selected.number == alone.chosen and result.selected.augmentation == alone.augmentation
    for start, expected in zip(candidates(result.study), alone.starts, strict=True):
        assert start.augmentation == expected.augmentation
        assert read_trajectory(start) == expected.trajectory
        assert start.scores().tolist() == expected.scores.tolist()
        assert start.criteria == {**expected.criteria, "validation_loss": expected.validation_loss}


def test_every_start_is_a_trial_that_ran_its_whole_budget(tracked: Tracked) -> None:
    result = tracked.result
    assert [trial.state.name for trial in result.study.trials] == ["COMPLETE", "COMPLETE"]
    for trial in result.study.trials:
        assert trial.value == trial.user_attrs["dsv"] and trial.user_attrs[BUDGET] == 12
        assert trial.params.keys() == {"augmentation", "cutdiff.patch_area", "cutdiff.patch_aspect"}
        assert trial.user_attrs["images"] > 0
    assert result.study.trials[1].user_attrs["start"] == {"patch_area": 0.2, "patch_aspect": 1.5}
    for name in CRITERIA:
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
    searched = run_study(
        SOURCE, space="cutdiff", n_trials=1, training=replace(TRAINING, steps=8), tracking_uri=None
    )
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
        resume_tuning("tuned")
    assert all_of(resume_tuning("tuned", task=task)) == all_of(result)


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
        assert parent.data.metrics[name] == getattr(figures, name)
    assert parent.data.metrics["images_forward"] > parent.data.metrics["images_backward"] > 0
    assert parent.data.metrics["images_second"] == 0  # of first order


def test_mlflow_has_a_child_for_every_start_with_its_trajectory_as_metrics_over_steps(
    tracked: Tracked,
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    parent, children = runs_of(tracked)
    assert children.keys() == {"trial 0", "trial 1"} and tracked.result.aucs is not None
    for start in candidates(tracked.result.study):
        child = children[f"trial {start.number}"]
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
        assert child.data.metrics["auc"] == tracked.result.aucs[start.number]
        signs = tracked.result.study.trials[start.number].user_attrs["collapse"]
        assert child.data.tags.get("collapse", "") == "; ".join(signs)


def runs_of(tracked: Tracked) -> tuple[Any, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    experiment = client.get_experiment_by_name("ssad_hpo")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return runs.pop(tracked.result.run.settings.study_name), runs


def test_collapse_is_warned_of_and_tagged_on_the_start_and_the_tuning(
    workplace: Path, empty_mlflow: Path
) -> None:
    # Whatever the gradient says, a range so narrow is all at its bounds.
    narrow = Augmentation("cutdiff", {"patch_area": Range(0.1, 0.102, log=True), "patch_aspect": 1.0})
    shutil.copy(empty_mlflow, workplace / "mlflow.db")
    with pytest.warns(CollapseWarning, match="cutdiff.patch_area ended at its"):
        result = quick(
            augmentation=narrow, tuning=replace(TUNING, starts=(0.5,)), tracking_uri="sqlite:///mlflow.db"
        )
    (sign, *_) = result.study.trials[0].user_attrs["collapse"]
    parent, children = runs_of(Tracked(f"sqlite:///{workplace}/mlflow.db", result))
    for run in (parent, *children.values()):
        assert run.data.tags["collapse"].startswith(sign)


# Kill and Ctrl-C


class Kills:
    """A listener that has this process killed at the n-th event of a kind, or Ctrl-C pressed."""

    def __init__(self, event: str, at: int, of: signal.Signals = signal.SIGKILL) -> None:
        self.event, self.left, self.of = event, at, of

    def hear(self, event: str) -> None:
        self.left -= event == self.event
        if not self.left:
            self.left = -1
            signal.raise_signal(self.of)

    def trial_started(self, trial: str, params: Any, tags: Any) -> None:
        self.hear("started")

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        self.hear("progress")

    def trial_ended(self, trial: str, status: Any, metrics: Any, reason: str | None = None) -> None:
        self.hear("ended")


def work(folder: Path, event: str, at: int) -> None:
    """What a process of its own does: tune, and die."""
    warnings.simplefilter("ignore", CollapseWarning)
    kills = Kills(event, at)
    if event == "publish":  # just before what is kept of a start gets its name
        sys.addaudithook(
            lambda name, arguments: (
                kills.hear("publish")
                if name == "os.rename" and Path(arguments[1]).name.startswith("trial-")
                else None
            )
        )
    quick(folder, listeners=[kills])


@pytest.fixture(scope="module")
def undisturbed(tracked: Tracked) -> list[Any]:
    return all_of(tracked.result)


@pytest.mark.parametrize(
    ("event", "at", "finished"),
    [("started", 1, 0), ("progress", 1, 0), ("progress", 3, 0), ("ended", 1, 0), ("publish", 1, 0),
     ("progress", 7, 1), ("publish", 2, 1)],
)  # fmt: skip
def test_a_tuning_killed_at_any_moment_ends_like_an_undisturbed_one(
    event: str, at: int, finished: int, tmp_path: Path, undisturbed: list[Any]
) -> None:
    killed = PROCESSES.Process(target=work, args=(tmp_path / "run", event, at))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    if finished:
        assert len(open_result(tmp_path / "run").study.trials) == finished
    again = _Heard()
    assert all_of(resume_tuning(tmp_path / "run", listeners=[again])) == undisturbed
    # What a checkpoint held is not done again: at most 2 steps of the hyperparameters (checkpoint_every).
    done = {"started": 0, "ended": 4, "publish": 4 * at, "progress": at}[event]
    assert 8 - done <= again.steps <= 8 - done + 2
    assert not list((tmp_path / "run").rglob("*.partial"))


class _Heard:
    """A listener that counts steps of the hyperparameters."""

    steps = 0

    def trial_started(self, trial: str, params: Any, tags: Any) -> None: ...

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        self.steps += 1

    def trial_ended(self, trial: str, status: Any, metrics: Any, reason: str | None = None) -> None: ...


@pytest.mark.parametrize(("event", "at"), [("started", 2), ("progress", 2), ("progress", 6)])
def test_ctrl_c_keeps_what_is_done_and_resumes_alike(
    event: str, at: int, tmp_path: Path, undisturbed: list[Any], listener: Any
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # others may ignore it
    try:
        with pytest.raises(StudyInterrupted, match="resume_tuning") as stopped:
            quick(tmp_path / "run", listeners=[listener, Kills(event, at, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.run == tmp_path / "run"
    if at != 2 or event == "started":
        assert len(open_result(tmp_path / "run").study.trials) == 1  # and can be used already
        assert load_detector(tmp_path / "run").augmentation.kind == "cutdiff"
    assert all_of(resume_tuning(tmp_path / "run")) == undisturbed


def test_resuming_a_finished_tuning_trains_nothing(tuned: StudyResult, listener: Any) -> None:
    found = all_of(tuned)
    shutil.rmtree("runs/tuned/artifacts/trial-00000.partial", ignore_errors=True)
    settings = replace(tuned.run.settings, tracking_uri=None)
    replace(tuned.run, settings=settings).write()
    assert all_of(resume_tuning("tuned", listeners=[listener])) == found
    assert listener.heard == []


def test_a_search_and_a_tuning_are_not_resumed_as_each_other(tuned: StudyResult) -> None:
    with pytest.raises(RunError, match=r"is a tuning, which `tune --resume`"):
        resume_study("tuned")
    run_study(SOURCE, n_trials=1, training=replace(TRAINING, steps=8), tracking_uri=None, run="searched")
    with pytest.raises(RunError, match=r"is a search, which `search --resume`"):
        resume_tuning("searched")


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augmentation": "blur"}, "augmentation: expected one of cutout"),
        ({"augmentation": ANOMALY}, "expected a range for what is to be tuned"),
        ({"augmentation": Augmentation("cutout", {"patch_area": Range(0.1, 0.9)})}, "does not fit"),
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
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ended]
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
    assert first.user_attrs["failure"].startswith("diverged: validation loss nan")
    assert result.selected.number == 1 and result.aucs is not None and set(result.aucs) == {1}
    said = call("evaluate", "tuned").out
    assert "start 0 failed: diverged: validation loss nan" in said and "not done" not in said
    assert "Start 0 failed: diverged" in report_run("tuned").read_text(encoding="utf-8")


# The command line


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the program in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ssad-hpo", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


QUICK = "--steps 12 --detector-steps 2 --batch-size 4 --width 4 --threads 1 --no-tracking".split()


def test_a_texture_is_tuned_evaluated_scored_and_reported_from_the_command_line(
    call: Callable[..., Ended], make_category: Callable[..., Path]
) -> None:
    said = call("tune", "gravel/cutdiff", "-a", "cutdiff", "--starts", "0.5,0.9", "--run", "r", *QUICK)
    assert said.code == 0 and "Traceback" not in said.err
    result = open_result("r")
    assert "cutdiff tuned from 2 starts down two_sided_alignment, order 1; the lowest dsv is kept" in said.out
    for start in candidates(result.study):
        values = start.augmentation.hyperparameters
        assert re.search(
            rf"^start +{start.number}  dsv +{start.criteria['dsv']:.3f} .* became "
            rf"cutdiff\(patch_area={values['patch_area']:.4g}",
            said.out,
            re.MULTILINE,
        )
    last = read_trajectory(candidates(result.study)[1])[-1]
    assert f"start 1, step 12: patch area {last.hyperparameters['patch_area']:.4g}" in said.out
    assert f"validation loss {last.validation_loss:.4g}" in said.out
    table = [line for line in said.out.splitlines() if line.startswith("│")]
    assert ["selected" in line for line in table] == [True, False]
    assert result.evaluation is not None
    figures = f"AUC selected {result.evaluation.auc_selected:.3f}"
    assert figures in said.out and figures in call("evaluate", "r").out

    reported = call("report", "r")
    assert reported.code == 0 and Path("runs/r/report/trajectories.png").is_file()
    pictures = make_category(Path("cloth"), grey=True)
    scored = call("score", "r", pictures / "test")
    assert scored.code == 0 and len(scored.out.splitlines()) == 1 + 15


def test_every_option_of_a_tuning_reaches_its_settings(
    call: Callable[..., Ended], make_category: Callable[..., Path]
) -> None:
    make_category(Path("cloth"))
    options = (
        "-a cutpaste --range cutpaste.patch_area=0.01:0.2 --range cutpaste.angle=0 --loss mmd --order 1 "
        "--starts 0.25,0.5 --starts patch_area=0.05,patch_aspect=2 --steps 10 --detector-steps 3 "
        "--warm-start 0.4 --choose-by validation_loss --image-size 16 --encoder small --width 3 "
        "--batch-size 5 --learning-rate 0.02 --score classifier --contamination 0.3 --seed 5 --device cpu "
        "--threads 1 --no-tracking --run all"
    )
    assert call("tune", "cloth", *options.split()).code == 0
    settings = open_run("all").settings
    assert settings.tuning == Tuning(
        loss="mmd", order=1, starts=(0.25, 0.5, {"patch_area": 0.05, "patch_aspect": 2.0}),
        detector_steps=3, warm_start=0.4, choose_by="validation_loss",
    )  # fmt: skip
    assert settings.training == Training(
        width=3, steps=10, batch_size=5, learning_rate=0.02, score="classifier", contamination=0.3, seed=5,
        evaluate_at=(1.0,), precision="float32",
    )  # fmt: skip
    assert settings.space.kinds["cutpaste"] == {
        "patch_area": Range(0.01, 0.2, log=True), "patch_aspect": Range(0.3, 3.3, log=True), "angle": 0.0,
    }  # fmt: skip
    assert (settings.seed, settings.device, settings.threads, settings.tracking_uri) == (5, "cpu", 1, None)
    assert settings.source == find_source("cloth", image_size=16)


def test_the_defaults_of_the_command_are_those_of_the_function(call: Callable[..., Ended]) -> None:
    diverging = "--learning-rate 1e30 --steps 20 --threads 1 --no-tracking --run r".split()
    said = call("tune", "digits/4", "-a", "rotation", *diverging)
    assert said.code == 1 and said.err.startswith("ssad-hpo: diverged") and len(said.err.splitlines()) == 1
    settings = open_run("r").settings
    assert settings.tuning == Tuning()
    assert settings.training == replace(
        DEFAULT_TRAINING, steps=20, learning_rate=1e30, precision="float32", evaluate_at=(1.0,)
    )


def test_collapse_is_told_as_a_sentence_with_its_remedy(call: Callable[..., Ended]) -> None:
    narrow = ["--range", "cutdiff.patch_area=0.1:0.102", "--starts", "0.5", "--run", "r"]
    said = call("tune", "gravel/cutdiff", "-a", "cutdiff", *narrow, *QUICK)
    assert said.code == 0
    told = [line for line in said.err.splitlines() if "cutdiff.patch_area ended at its" in line]
    assert len(told) == 1 and told[0].startswith("ssad-hpo: start 0: ")
    assert "start higher" in told[0] or "start elsewhere" in told[0]  # at the lower bound or the upper one
    assert told[0] in call("evaluate", "r").err.splitlines()


def test_ctrl_c_on_the_command_line_says_how_to_go_on_and_resume_ends_alike(
    call: Callable[..., Ended], make_category: Callable[..., Path], workplace: Path
) -> None:
    make_category(Path("cloth"))
    settings = "--starts 0.5,0.9 --steps 150 --batch-size 8 --width 4 --image-size 16 --threads 1".split()
    words = ["tune", "cloth", "-a", "cutdiff", *settings, "--no-tracking", "--run"]
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ssad_hpo.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words, "r"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    while not Path("runs/r/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert re.fullmatch(r"ssad-hpo: stopped; all that is done is kept. Go on with: .*tune --resume r\n", said)
    assert call("tune", "--resume", "r").code == 0
    assert call(*words, "whole").code == 0
    assert all_of(open_result("r")) == all_of(open_result("whole"))


# The report


def test_the_report_of_a_tuning_shows_its_course(tuned: StudyResult) -> None:
    settings = replace(tuned.run.settings, tracking_uri=None)
    replace(tuned.run, settings=settings).write()
    page = report_run("tuned").read_text(encoding="utf-8")
    files = {path.name for path in Path("runs/tuned/report").iterdir()}
    assert {"trajectories.png", "images-along-the-way.png", "auc.png", "images-highest.png"} <= files
    assert "learning-curves.png" not in files
    assert "The tuning&#x27;s course" in page and "patch area" in page
    assert "2 starts down two_sided_alignment, order 1" in page and "4 steps on the range" in page
    assert "0.5 of the range; patch_area 0.2, patch_aspect 1.5" in page
    for path in Path("runs/tuned/report").glob("*.png"):
        with Image.open(path) as image:
            assert 800 <= image.width <= 1200 and 300 <= image.height <= 1600
            assert np.asarray(image.convert("L")).std() > 5, path


def test_without_labels_and_images_a_tunings_report_has_nothing_that_needs_them() -> None:
    task = controlled_data(anomaly=ANOMALY, image_size=32, n_train=20, n_unlabeled=14).task
    quick(images=task, augmentation="rotation", tuning=replace(TUNING, starts=(0.5,)))
    page = report_run("tuned").read_text(encoding="utf-8")
    without_pictures = re.sub("base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"AUC|regret|oracle|Spearman|by truth", without_pictures)
    files = {path.name for path in Path("runs/tuned/report").iterdir()}
    assert "trajectories.png" in files
    assert not files & {"auc.png", "scores-truth.png", "images-along-the-way.png", "learning-curves.png"}


def test_a_tuning_that_is_not_done_says_so_in_its_report(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(StudyInterrupted):
            quick(listeners=[Kills("progress", 6, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert "1 of 2 starts are not done yet" in report_run("tuned").read_text(encoding="utf-8")


def course_of(starts: int, steps: int) -> Course:
    rng = np.random.default_rng(0)
    times = np.arange(1, steps + 1) * 4
    trajectories = [
        Trajectory(
            i,
            times,
            {"angle": rng.uniform(15, 180, steps + 1)},
            rng.uniform(0, 1, steps),
            rng.normal(size=steps),
        )
        for i in range(starts)
    ]
    return Course("smooth_alignment", 0, 4 * steps, tuple(trajectories))


@pytest.mark.parametrize(("starts", "steps"), [(1, 1), (12, 500)])
def test_one_step_or_many_starts_fit_into_the_figure(starts: int, steps: int, tmp_path: Path) -> None:
    bounds = {"angle": Range(15.0, 180.0)}
    trajectory_figure(course_of(starts, steps), bounds, starts - 1, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_a_course_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trajectories: expected at least one"):
        trajectory_figure(course_of(0, 1), {"angle": Range(15.0, 180.0)}, 0, tmp_path / "x.png")
    with pytest.raises(ValueError, match="examples: expected at least one"):
        examples_figure([], tmp_path / "x.png")
    examples_figure([ImageRow("x", "few", np.zeros((2, 3, 8, 8), np.uint8))], tmp_path / "few.png")
    assert (tmp_path / "few.png").is_file() and not (tmp_path / "x.png").exists()
