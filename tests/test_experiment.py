"""Whole studies: the run folder, MLflow, evaluation after the search, scoring, a dead server."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from held_out import MEASURED_ALWAYS
from PIL import Image
from starting import start_study

import ssad_hpo
from ssad_hpo import controlled_data, data, tracking
from ssad_hpo.detector import Detector
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment import (
    Run,
    RunError,
    Settings,
    StudyResult,
    evaluate_run,
    load_detector,
    load_task,
    open_result,
    open_run,
    ready_objective,
    resume_study,
    run_study,
    score_images,
    sync_run,
)
from ssad_hpo.experiment.settings import creation_facts
from ssad_hpo.search import candidates, open_kept, records, select
from ssad_hpo.task import Range, Search, SearchSpace, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

TINY = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 0.75, 1.0))
DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=16, n_train=20, n_unlabeled=14).task


def quick(images: Any, **others: Any) -> StudyResult:
    settings = {"training": TINY, "n_trials": 3, "tracking_uri": None, "run": "study", **others}
    return start_study(images, **settings)


# One study with all that can happen to a trial, tracked by a real MLflow


@dataclass(frozen=True)
class Tracked:
    place: Path
    images: Path
    uri: str
    result: StudyResult

    def runs(self) -> dict[str, Any]:
        """The study's runs in MLflow by name."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("ssad_hpo")
        assert experiment is not None
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    @property
    def parent(self) -> Any:
        return self.runs()["study"]


@pytest.fixture(scope="module")
def tracked(
    tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path, make_category: Callable[..., Path]
) -> Iterator[Tracked]:
    """Tracked by the default address: mlflow.db in the working directory."""
    place = tmp_path_factory.mktemp("tracked")
    images = make_category(place / "cloth")
    shutil.copy(empty_mlflow, place / "mlflow.db")
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("SSAD_HPO_CACHE", "")
        result = run_study(
            data.find_source("cloth", image_size=16),
            Search(
                SearchSpace({"cutavg": {}, "cutdiff": {"patch_area": 1e6}}),
                n_trials=12,
                sampler="random",
                pruner="asha",
                reduction_factor=2,
            ),
            TINY,
            run="study",
        )
    yield Tracked(place, images, f"sqlite:///{place}/mlflow.db", result)
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)


def test_the_parent_run_compares_selected_with_oracle_and_random(tracked: Tracked) -> None:
    result, metrics = tracked.result, tracked.parent.data.metrics
    figures = result.evaluation
    assert figures is not None and result.aucs is not None
    labels = data.read_labels(data.find_source(tracked.images, image_size=16))
    expected = {c.number: auc(labels, c.scores()) for c in candidates(result.study)}
    assert result.aucs == expected and len(expected) >= 3
    for name, value in figures.metrics().items():
        assert metrics[name] == round(value, 6)
    assert figures.auc_selected == expected[result.selected.number]
    assert figures.auc_oracle == max(expected.values())
    assert figures.auc_random == pytest.approx(np.mean(list(expected.values())))
    assert figures.auc_worst == min(expected.values())
    assert figures.regret == max(expected.values()) - expected[result.selected.number]
    assert metrics["selected_trial"] == result.selected.number
    assert metrics["dsv_selected"] == min(c.criteria["dsv"] for c in candidates(result.study))


def test_the_parent_run_has_the_settings_and_tags_of_the_study(tracked: Tracked) -> None:
    parent, settings = tracked.parent, tracked.result.run.settings
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["task"] == "cloth"
    assert parent.data.tags["criterion"] == "dsv" and parent.data.tags["sampler"] == "random"
    assert parent.data.tags["study"] == settings.study_name
    assert parent.data.params == {name: str(value) for name, value in settings.flat().items()}
    assert parent.data.params["training.steps"] == "4" and parent.data.params["machine.threads"] == "1"
    assert parent.data.params["space.cutavg"].startswith("patch_area 0.002 to 0.3 (log), patch_aspect")
    assert "None" not in parent.data.params.values() and len(parent.data.params) < 25
    (told,) = parent.inputs.dataset_inputs
    assert (told.dataset.name, settings.content_hash[:32]) == ("cloth", told.dataset.digest)
    assert json.loads(told.dataset.profile) == {"num_train": 14, "num_unlabeled": 15}
    assert (
        "label"
        not in f"{told.dataset.source} {told.dataset.schema} {told.dataset.profile}".lower().replace(
            "unlabeled", ""
        )
    )


def test_every_trial_is_a_child_with_its_status_criteria_and_auc(tracked: Tracked) -> None:
    runs, result = tracked.runs(), tracked.result
    parent = runs.pop("study")
    trials = {f"trial {trial.number}": trial for trial in result.study.trials}
    assert runs.keys() == trials.keys() and len(runs) == 12
    status = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}
    assert set(Counter(trial.state.name for trial in trials.values())) == status.keys()
    kept = records(result.study)
    for name, trial in trials.items():
        run, kind = runs[name], trial.params["augmentation"]
        assert run.info.status == status[trial.state.name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["augmentation"] == run.data.tags["augmentation"] == kind
        assert float(run.data.params["patch_aspect"]) == trial.params[f"{kind}.patch_aspect"]
        assert run.data.tags["criterion"] == "dsv" and run.data.tags["task"] == "cloth"
        curve, pruned = kept[trial.number].curve, trial.state.name == "PRUNED"
        stopped = f"stopped at step {max(curve)}" if pruned else kept[trial.number].reason
        assert run.data.tags.get("reason") == stopped
        assert run.data.tags["status"] == kept[trial.number].status
        if trial.state.name == "COMPLETE":
            assert result.aucs is not None
            assert run.data.metrics["auc"] == round(result.aucs[trial.number], 6)
            for criterion in MEASURED_ALWAYS:
                assert run.data.metrics[criterion] == kept[trial.number].criteria[criterion]
        else:
            assert "auc" not in run.data.metrics


def test_a_childs_metrics_have_every_evaluation_step(tracked: Tracked) -> None:
    from mlflow import MlflowClient

    client, runs = MlflowClient(tracked.uri), tracked.runs()
    for trial in tracked.result.study.trials:
        run_id = runs[f"trial {trial.number}"].info.run_id
        points = {point.step: point.value for point in client.get_metric_history(run_id, "dsv")}
        assert points == trial.intermediate_values
        losses = client.get_metric_history(run_id, "loss")
        assert [point.step for point in losses] == list(trial.intermediate_values)


def test_the_run_folder_holds_all_that_is_needed_and_no_more(tracked: Tracked) -> None:
    folder = tracked.result.run.folder
    assert folder == tracked.place / "runs" / "study"
    names = {path.name for path in folder.iterdir()}
    outbox = {"outbox.jsonl", "outbox.log", "outbox.lock", "outbox.state.json"}
    assert names == {"settings.json", "lock", "journal.log", "artifacts", "choice.png"} | outbox
    complete = [t.number for t in tracked.result.study.trials if t.state.name == "COMPLETE"]
    kept = sorted(path.name for path in (folder / "artifacts").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == [f"trial-{n:05d}" for n in complete]


def test_settings_written_and_opened_are_the_same(tracked: Tracked) -> None:
    run = tracked.result.run
    opened = open_run(run.folder)
    assert opened == run
    settings = opened.settings
    assert settings.tracking_uri == tracked.uri and settings.storage is None
    assert settings.task_name == "cloth" and settings.n_trials == 12 and settings.threads == 1
    assert settings.source == data.Source(
        "folder",
        {
            **{"root": str(tracked.images), "image_size": 16, "keep_ratio": True, "skip_unreadable": False},
            **{"category": None, "anomaly": None, "held_out_share": None},
        },
    )
    assert settings.content_hash == load_task(opened).content_hash
    assert settings.training.precision == "float32"  # "auto" was resolved
    assert settings.versions["optuna"] == optuna.__version__
    opened.write()
    assert open_run(run.folder) == run


def test_a_study_from_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str) -> str:
        if name == "ssad-hpo":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("ssad_hpo.experiment.settings.version", known)
    versions = creation_facts()["versions"]
    assert versions["ssad-hpo"] == "not installed" and versions["torch"] == "1"


def test_a_run_from_before_asha_had_a_choice_of_factor_goes_on_with_its_own(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parent / "format_1" / "search" / "settings.json").read_text())
    for factor in (4, None):
        values["pruner"], values["reduction_factor"] = "asha", factor
        if factor is None:
            del values["reduction_factor"]
        (tmp_path / "settings.json").write_text(json.dumps(values))
        method = open_run(tmp_path).settings.method
        assert isinstance(method, Search) and method.stopping == f"asha/{factor or 2}"


def test_opening_a_result_gives_what_the_study_gave(tracked: Tracked) -> None:
    before = tracked.result.run.journal.read_bytes()
    result = open_result(tracked.result.run.folder)
    assert result.selected == tracked.result.selected
    assert result.aucs == tracked.result.aucs and result.evaluation == tracked.result.evaluation
    assert tracked.result.run.journal.read_bytes() == before


def test_a_run_is_found_by_its_name_below_runs(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tracked.place)
    assert open_run("study") == tracked.result.run
    with pytest.raises(RunError, match=r"runs/other: holds no run \(no settings.json\); runs here: study"):
        open_run("other")


def test_evaluating_again_writes_the_figures_again(tracked: Tracked) -> None:
    from mlflow import MlflowClient

    folder = tracked.place / "evaluated again"
    shutil.copytree(tracked.result.run.folder, folder)
    client, run_id = MlflowClient(tracked.uri), tracked.parent.info.run_id
    before = client.get_metric_history(run_id, "regret")
    result = evaluate_run(folder)
    assert result.undelivered == 0
    assert result.evaluation == tracked.result.evaluation
    after = client.get_metric_history(run_id, "regret")
    assert [point.value for point in after] == [before[0].value] * 2
    assert tracked.parent.info.status == "FINISHED"


# Where the images come from


def test_a_task_in_memory_is_searched_and_not_judged(task: Task, workplace: Path) -> None:
    result = quick(task)
    assert result.aucs is None and result.evaluation is None and result.undelivered == 0
    assert result.run.folder == workplace / "runs" / "study"
    assert result.run.settings.source is None
    assert result.selected == select(result.study)
    scores = result.selected.detector().score(task.unlabeled).numpy()
    assert np.array_equal(scores, result.selected.scores())
    with pytest.raises(ValueError, match=r"gravel/cutavg: there is no ground truth, .* of trial \d"):
        evaluate_run("study")


def test_a_built_in_name_is_searched_and_judged(workplace: Path) -> None:
    result = quick("digits/4/rotated", space=["rotation", "cutavg"], criterion="smooth_alignment", n_trials=2)
    assert result.run.settings.task_name == "digits/4/rotated"
    assert result.evaluation is not None and result.evaluation.n_candidates == 2
    labels = data.semantic_data(4, "rotated").labels
    assert result.aucs == {c.number: auc(labels, c.scores()) for c in candidates(result.study)}
    assert result.selected == select(result.study, "smooth_alignment")
    values = [c.criteria["smooth_alignment"] for c in candidates(result.study)]
    assert [trial.value for trial in result.study.trials] == values


def test_a_folder_is_searched_and_judged(make_category: Callable[..., Path], workplace: Path) -> None:
    make_category(workplace / "cloth")
    result = quick(Path("cloth"), n_trials=1)
    assert result.run.settings.source == data.find_source("cloth", image_size=256)
    assert result.evaluation is not None and result.evaluation.auc_random == result.evaluation.auc_selected
    assert result.run.settings.tracking_uri is None
    assert not list(result.run.folder.glob("outbox*"))


def test_one_image_set_of_one_class_is_not_judged(make_category: Callable[..., Path]) -> None:
    images = make_category(Path("cloth"))
    shutil.rmtree(images / "test" / "scratch")
    shutil.rmtree(images / "test" / "stain")
    result = quick(data.find_source(images, image_size=16), n_trials=1)
    assert result.evaluation is None


def test_what_is_neither_a_folder_nor_built_in_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; as a built-in data set: .*"):
        quick("nowhere")
    with pytest.raises(ValueError, match=r"only folders have a category or an anomaly"):
        data.find_source("gravel/cutavg", category="gravel")


def test_the_ready_objective_searches_the_embedded_testbed() -> None:
    objective = ready_objective("dsv")
    assert objective is ssad_hpo.dsv_objective is ready_objective("dsv")
    assert objective.task.name == "gravel/cutavg" and objective.task.train.shape == (256, 1, 64, 64)


def test_listeners_and_announce_hear_of_the_run(task: Task, listener: Any) -> None:
    announced: list[Run] = []
    result = quick(task, listeners=[listener], announce=announced.append)
    assert announced == [result.run]
    assert [trial for trial, *_ in listener.of("ended")] == ["0", "1", "2"]


def test_a_run_without_a_name_gets_one_of_its_own(task: Task, workplace: Path) -> None:
    folders = {quick(task, run=None, n_trials=1).run.folder for _ in range(2)}
    assert len(folders) == 2
    for folder in folders:
        assert folder.parent == workplace / "runs" and folder.name.startswith("gravel-cutavg-")


@pytest.mark.slow
def test_threads_are_those_that_were_asked_for(task: Task) -> None:
    class Counts:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def trial_started(self, *_: Any) -> None:
            self.seen.append(torch.get_num_threads())

        def trial_progress(self, *_: Any) -> None: ...

        def trial_ended(self, *_: Any) -> None: ...

    counts = Counts()
    quick(task, threads=2, n_trials=1, listeners=[counts])
    assert torch.get_num_threads() == 1  # as it was
    assert open_run("study").settings.threads == 2
    resume_study("study", task=task, n_trials=2, listeners=[counts])
    assert counts.seen == [2, 2] and torch.get_num_threads() == 1


def test_a_study_in_which_every_trial_fails_says_so(task: Task) -> None:
    diverging = replace(TINY, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"no trial ran its whole budget, .*\(3 failed\)"):
        quick(task, training=diverging)
    with pytest.raises(ValueError, match=r"no trial ran its whole budget"):
        open_result("study")


# Wrong arguments leave nothing behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": 0}, "n_trials: expected a whole number >= 1, got 0"),
        ({"sampler": "cma-es"}, "sampler: expected one of tpe, random, grid, gp, got 'cma-es'"),
        ({"pruner": "hyperband"}, "pruner: expected one of none, asha, median, got 'hyperband'"),
        ({"criterion": "auc"}, "criterion: expected one of dsv, .*, got 'auc'"),
        ({"keep": 0}, "keep: expected a whole number >= 1, got 0"),
        ({"space": "blur"}, "augmentation: expected one of cutout, .*, got 'blur'"),
        ({"space": SearchSpace({"cutout": {"patch_area": 0.9}})}, "cutout: a patch .* does not fit"),
        ({"space": ["cutout", "cutavg"], "sampler": "gp"}, "'gp' needs a space of one kind"),
        ({"sampler": "grid", "grid_points": 1}, "points: expected a whole number >= 2, got 1"),
        ({"tracking_uri": "mlruns"}, "tracking_uri: expected sqlite:///FILE"),
        ({"threads": 0}, "threads: expected"),
        ({"threads": -1}, "threads: expected"),
        ({"device": "abacus"}, "device: expected"),
        ({"device": "cuda:99"}, "device: expected"),
        ({"training": replace(TINY, encoder="mind")}, "encoder: expected 'small' or a torchvision"),
        ({"storage": "nonsense"}, "storage: expected"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(
    arguments: dict[str, Any], message: str, task: Task, workplace: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quick(task, **arguments)
    assert list(workplace.iterdir()) == []


def test_a_run_folder_that_exists_is_refused_and_left_as_it_is(task: Task, workplace: Path) -> None:
    quick(task, n_trials=1)
    files = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
    with pytest.raises(RunError, match=r"runs/study: exists already; go on with it by --resume"):
        quick(task)
    (workplace / "file").write_text("not a folder")
    with pytest.raises(RunError, match="file: exists already"):
        quick(task, run=workplace / "file")
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_run_folder_of_which_a_kill_left_no_settings_is_free(task: Task, workplace: Path) -> None:
    (workplace / "runs" / "study").mkdir(parents=True)
    (workplace / "runs" / "study" / "lock").write_text("process 1 on somewhere")
    (workplace / "runs" / "study" / "settings.json.partial").write_text('{"format": 2, "stu')
    quick(task, n_trials=1)
    assert open_result("study").run.settings.n_trials == 1
    assert not list(Path("runs", "study").glob("*.partial"))


def test_a_run_folder_that_cannot_be_read_is_named(task: Task, workplace: Path) -> None:
    folder = quick(task, n_trials=1).run.folder
    path = folder / "settings.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"settings.json: cannot be read as a run's settings"):
        open_run("study")
    path.write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(RunError, match="written by a newer version of ssad_hpo"):
        open_run("study")
    path.write_text("{}")
    with pytest.raises(RunError, match="cannot be read as a run's settings"):
        open_run("study")


def test_a_run_that_was_stopped_before_its_first_trial_has_no_result_and_can_be_resumed(task: Task) -> None:
    def stop(run: Run) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        quick(task, announce=stop)
    for use in (open_result, evaluate_run, load_detector):
        with pytest.raises(ValueError, match="study"):
            use("study")
    assert len(resume_study("study", task=task).study.trials) == 3


# Storage by URL, passwords


def test_a_database_by_url_keeps_the_study_and_resumes_it(task: Task, workplace: Path) -> None:
    storage = f"sqlite:///{workplace}/optuna.db"
    first = quick(task, storage=storage, sampler="random", n_trials=2)
    assert not first.run.journal.exists()
    assert open_run("study").settings.storage == storage
    resumed = resume_study("study", task=task, n_trials=4)
    journal = quick(task, run="journal", sampler="random", n_trials=4)
    for mine, theirs in zip(resumed.study.trials, journal.study.trials, strict=True):
        assert mine.params == theirs.params
        assert mine.intermediate_values == theirs.intermediate_values
        assert mine.user_attrs["mmd"] == theirs.user_attrs["mmd"]
    assert open_result("study").selected.number == journal.selected.number


def files_that_hold(secret: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_passwords_in_addresses_are_never_written(
    task: Task, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of a tracking server that is dead, nor that of a database that cannot be reached."""
    quick(task, n_trials=1, tracking_uri="http://me:s3cret@127.0.0.1:9")
    database = "postgresql+psycopg2://me:s3cret@127.0.0.1:9/studies"
    with pytest.raises(ValueError, match=r"storage: expected a database .*me:\*\*\*@"):
        quick(task, run="other", storage=database, tracking_uri=None)
    assert not (workplace / "runs" / "other").exists()
    other = replace(open_run("study").settings, storage=database)
    Run(workplace / "runs" / "other", other).write()
    assert files_that_hold("me:***@127.0.0.1:9", workplace)
    assert files_that_hold("s3cret", workplace) == []
    with pytest.raises(RunError, match=r"the password of postgresql.* is not kept; set SSAD_HPO_STORAGE"):
        open_run("other")
    with pytest.raises(
        RunError, match=r"the password of http://me:\*\*\*@.* is not kept; set MLFLOW_TRACKING_URI"
    ):
        sync_run("study")
    settings = open_run("study").folder / "settings.json"
    before = settings.read_bytes()
    with pytest.raises(RunError, match="set MLFLOW_TRACKING_URI"):
        resume_study("study", task=task, n_trials=2)
    assert settings.read_bytes() == before and not (workplace / "mlflow.db").exists()
    monkeypatch.setenv("SSAD_HPO_STORAGE", database)
    assert open_run("other").settings.storage == database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@elsewhere:9")
    assert open_run("study").settings.tracking_uri == "http://me:s3cret@elsewhere:9"


def test_flat_settings_are_plain_and_hide_passwords(task: Task) -> None:
    run = quick(
        task, n_trials=1, space=SearchSpace({"cutavg": {"patch_area": Range(0.01, 0.1, log=True)}})
    ).run
    secret = "postgresql://me:s3cret@db/studies"
    flat = Settings(**{**vars(run.settings), "storage": secret}).flat()
    assert "s3cret" not in str(flat) and "postgresql" not in str(flat)
    assert flat["training.steps"] == 4 and flat["search.sampler"] == "tpe"
    assert flat["space.cutavg"] == "patch_area 0.01 to 0.1 (log), patch_aspect 0.3 to 3.3 (log)"
    assert all(isinstance(value, str | int | float | tuple) for value in flat.values())


# A server that is dead from the start


@pytest.mark.slow
def test_a_dead_server_loses_nothing_and_another_gets_it_all(
    task: Task, workplace: Path, empty_mlflow: Path
) -> None:
    from mlflow import MlflowClient

    result = quick(task, tracking_uri=DEAD_SERVER, sampler="random")
    untracked = quick(task, run="untracked", sampler="random")
    assert [t.params for t in result.study.trials] == [t.params for t in untracked.study.trials]
    assert result.selected.criteria == untracked.selected.criteria
    # study: begin, selection, settings, picture, note, model, end; each trial: begin, three evaluations, end
    assert result.undelivered == 7 + 3 * 5
    shutil.copy(empty_mlflow, workplace / "mlflow.db")
    uri = f"sqlite:///{workplace}/mlflow.db"
    delivered = tracking.sync(result.run.outbox, uri)
    assert (delivered.delivered, delivered.remaining, delivered.error) == (result.undelivered, 0, None)
    runs = {run.info.run_name: run for run in MlflowClient(uri).search_runs(["1"])}
    assert runs.keys() == {"study", "trial 0", "trial 1", "trial 2"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for trial in result.study.trials:
        assert runs[f"trial {trial.number}"].data.metrics["dsv"] == trial.value


def test_a_study_without_tracking_has_nothing_to_deliver(task: Task, workplace: Path) -> None:
    quick(task, n_trials=1)
    assert sorted(path.name for path in workplace.iterdir()) == ["runs"]
    with pytest.raises(ValueError, match="was made without tracking, so there is nothing to deliver"):
        sync_run("study")


# Scoring


def test_scoring_the_trials_own_images_gives_the_scores_that_it_had(
    make_category: Callable[..., Path],
) -> None:
    images = make_category(Path("cloth"))
    result = quick(data.find_source(images, image_size=16))
    scored = dict(score_images(load_detector("study"), [images / "test"]))
    assert len(scored) == 15 and list(scored) == data.find_images(images / "test")
    # A task's images are in the order of their content.
    assert sorted(scored.values()) == pytest.approx(sorted(result.selected.scores()), rel=1e-6)
    labels = [int(path.parent.name != "good") for path in scored]
    assert result.aucs is not None
    assert auc(labels, list(scored.values())) == pytest.approx(result.aucs[result.selected.number])


def test_images_are_scored_in_the_order_given_and_of_any_size(
    make_category: Callable[..., Path], tmp_path: Path
) -> None:
    images = make_category(Path("cloth"))
    result = quick(data.find_source(images, image_size=16), n_trials=1)
    detector = Detector.load(Path(result.selected.address) / "detector")
    Image.new("RGB", (300, 20), (200, 10, 10)).save(tmp_path / "large.bmp")
    places = [tmp_path / "large.bmp", images / "test" / "stain", tmp_path / "large.bmp"]
    scored = list(score_images(detector, places))
    assert [path for path, _ in scored] == [places[0], *data.find_images(places[1]), places[0]]
    assert scored[0][1] == pytest.approx(scored[-1][1], rel=1e-5)
    assert scored[0][1] > max(result.selected.scores())  # nothing like cloth
    assert list(score_images(load_detector(Path(result.selected.address) / "detector"), places)) == scored


def test_a_grey_detector_takes_colour_images(make_category: Callable[..., Path]) -> None:
    grey = make_category(Path("grey"), grey=True)
    colour = make_category(Path("colour"))
    result = quick(data.find_source(grey, image_size=16), n_trials=1)
    detector = load_detector("study")
    assert detector.image_shape == (1, 16, 16)
    assert result.run.settings.content_hash == load_task(result.run).content_hash
    assert len(list(score_images(detector, [colour / "test"]))) == 15


def test_what_cannot_be_scored_is_named(make_category: Callable[..., Path]) -> None:
    images = make_category(Path("cloth"))
    quick(data.find_source(images, image_size=16), n_trials=1)
    detector = load_detector("study")
    broken = images / "test" / "good" / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        list(score_images(detector, [images / "test"]))
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert len(list(score_images(detector, [images / "test"], skip_unreadable=True))) == 15
    with pytest.raises(ValueError, match=r"missing\.png"):
        list(score_images(detector, ["missing.png"]))
    with pytest.raises(RunError, match="holds no run"):
        load_detector("nothing")


def test_a_run_folder_that_was_moved_still_has_its_artifacts(task: Task, workplace: Path) -> None:
    result = quick(task)
    os.rename("runs/study", workplace / "elsewhere")
    moved = open_result(workplace / "elsewhere")
    assert moved.selected.number == result.selected.number
    assert Path(moved.selected.address).is_relative_to(workplace / "elsewhere")
    scores = load_detector(workplace / "elsewhere").score(task.unlabeled).numpy()
    assert np.array_equal(scores, moved.selected.scores())
    with pytest.raises(FileNotFoundError):
        open_kept(str(records(result.study)[0].address))
