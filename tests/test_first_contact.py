"""Keys that are unique, addresses that hold anywhere, and processes that meet something new at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from click.exceptions import UsageError
from starting import start_study

import ssad_hpo
from ssad_hpo import Objective, candidates, controlled_data, select
from ssad_hpo.cli.runs import _Table
from ssad_hpo.data.example import write_example
from ssad_hpo.data.testbed import photograph_of
from ssad_hpo.experiment import RunError, open_result, open_run, reporting, resume_study
from ssad_hpo.experiment.run_folder import locked
from ssad_hpo.files import folder_locked
from ssad_hpo.storage import absolute_storage, open_database
from ssad_hpo.task import Range, Search, SearchSpace, Task, Training
from ssad_hpo.tracking import MlflowRecorder, absolute_uri
from ssad_hpo.tracking.delivery import deliver

pytestmark = pytest.mark.usefixtures("workplace")

TRAINING = Training(steps=4, batch_size=4, width=8, evaluate_at=(0.5, 1.0))
KILLABLE = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=16, n_train=20, n_unlabeled=14).task


# Unique keys


@pytest.mark.parametrize("artifacts", [None, "kept"])
def test_one_objective_in_two_studies_keeps_the_detectors_of_both(artifacts: str | None, task: Task) -> None:
    objective = Objective(task, Search(), TRAINING, artifacts=artifacts)
    studies = [optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)) for seed in (1, 2)]
    for study in studies:
        study.optimize(objective, n_trials=2)
    chosen = [select(study) for study in studies]
    assert chosen[0].augmentation != chosen[1].augmentation
    for candidate in chosen:
        assert candidate.detector().augmentation == candidate.augmentation
        assert np.array_equal(candidate.scores(), candidate.detector().score(task.unlabeled).numpy())


def test_a_ready_made_objective_serves_two_studies_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = ssad_hpo.dsv_objective
    monkeypatch.setattr(objective, "training", TRAINING)
    studies = [optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)) for seed in (1, 2)]
    for study in studies:
        study.optimize(objective, n_trials=1)
    for study in studies:
        assert select(study).detector().augmentation == select(study).augmentation


def test_a_folder_that_two_studies_share_is_found_by_each_alone(task: Task, tmp_path: Path) -> None:
    """Also where both have the same name, as studies in two databases may."""
    found = []
    for place in ("a", "b"):
        study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path / place}.db")
        study.optimize(Objective(task, Search(), TRAINING, artifacts=tmp_path / "kept"), n_trials=1)
        found.append(select(study))
    assert found[0].address != found[1].address
    for candidate in found:
        assert candidate.detector().augmentation == candidate.augmentation


# Addresses that hold from anywhere; reading makes nothing


def test_a_relative_database_is_found_from_every_directory(
    task: Task, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {"task": task}
    first = start_study(
        task,
        storage="sqlite:///own.db",
        n_trials=2,
        training=TRAINING,
        run=workplace / "r",
        tracking_uri=None,
    )
    assert first.run.settings.storage == f"sqlite:///{workplace}/own.db"
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert open_result(workplace / "r").selected == first.selected
    resumed = resume_study(workplace / "r", **images)
    assert [t.datetime_complete for t in resumed.study.trials] == [
        t.datetime_complete for t in first.study.trials
    ]
    assert list(elsewhere.iterdir()) == []


def test_a_database_that_is_gone_is_said_to_be_and_is_not_made_again(task: Task, workplace: Path) -> None:
    start_study(task, storage="sqlite:///own.db", n_trials=1, training=TRAINING, run="r", tracking_uri=None)
    Path("own.db").unlink()
    for use in (lambda: open_result("r"), lambda: resume_study("r", task=task)):
        with pytest.raises(ValueError, match=r"storage: .*own\.db.*there is no such file; was it moved"):
            use()
    assert not Path("own.db").exists()


def test_reading_a_run_whose_journal_is_gone_makes_none(task: Task) -> None:
    result = start_study(task, n_trials=1, training=TRAINING, run="r", tracking_uri=None)
    result.run.journal.unlink()
    with pytest.raises(RunError, match="stopped before its first trial; resume it"):
        open_result("r")
    assert not result.run.journal.exists()


def test_a_database_that_is_not_optunas_gets_no_tables(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as shop:
        shop.execute("CREATE TABLE goods (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="storage: expected a database"):
        open_database(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_database_in_memory_is_refused() -> None:
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///"):
        with pytest.raises(ValueError, match="storage: expected the file of a database"):
            absolute_storage(url)
    here = Path.cwd()
    assert absolute_storage("sqlite:///a b.db?timeout=3") == f"sqlite:///{here}/a b.db?timeout=3"
    assert absolute_storage("sqlite+pysqlite:///a.db") == f"sqlite+pysqlite:///{here}/a.db"
    assert absolute_storage("sqlite:////srv/a.db") == "sqlite:////srv/a.db"
    assert absolute_storage("postgresql://db/studies") == "postgresql://db/studies"


# Races at first contact


def in_processes(work: Callable[..., None], each: list[tuple[Any, ...]]) -> list[int | None]:
    """Run a function at once in several processes; their exit codes."""
    start = KILLABLE.Barrier(len(each), timeout=300)
    processes = [KILLABLE.Process(target=work, args=(start, *arguments)) for arguments in each]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def meet_a_new_database(start: Any, url: str, study: str) -> None:
    start.wait()
    storage = open_database(url, create=True)
    optuna.create_study(storage=storage, study_name=study)


@pytest.mark.slow
def test_processes_that_meet_the_same_new_database_all_get_it(tmp_path: Path) -> None:
    for attempt in range(2):
        url = f"sqlite:///{tmp_path}/new-{attempt}.db"
        assert in_processes(meet_a_new_database, [(url, str(n)) for n in range(6)]) == [0] * 6
        assert len(optuna.get_all_study_names(open_database(url))) == 6
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".db"}


def test_a_database_behind_a_link_is_locked_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.db").symlink_to("a/a.db")
    locked_at = []

    def noted(folder: Path) -> Any:
        locked_at.append(folder)
        return folder_locked(folder)

    monkeypatch.setattr("ssad_hpo.storage.folder_locked", noted)
    for url in (f"sqlite:///{tmp_path}/b.db", f"sqlite:///{tmp_path}/a/../a/a.db"):
        open_database(url, create=True)
    assert locked_at == [(tmp_path / "a").resolve()] * 2 and (tmp_path / "b.db").is_symlink()


def test_an_mlflow_database_behind_a_link_is_locked_where_it_lies(tmp_path: Path, empty_mlflow: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(empty_mlflow, tmp_path / "a" / "a.db")
    (tmp_path / "b.db").symlink_to("a/a.db")
    uri = f"sqlite:///{tmp_path}/b.db"
    recorder = MlflowRecorder(tmp_path / "run" / "outbox.jsonl", uri, "e", "s")
    recorder.study_tags({"a": "b"})
    assert deliver(recorder.outbox, uri).error is None
    assert [path.name for path in tmp_path.rglob(".*.lock")] == [".a.db.lock"]


def test_a_tilde_that_no_shell_has_read_is_the_home(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_storage("sqlite:///~/a.db") == f"sqlite:///{tmp_path}/home/a.db"
    assert absolute_uri("sqlite:///~/a.db?timeout=3") == f"sqlite:///{tmp_path}/home/a.db?timeout=3"
    start_study(task, run="~/r", n_trials=1, training=TRAINING, tracking_uri=None)
    assert open_run("~/r").folder == tmp_path / "home" / "r"
    with pytest.raises(RunError, match="exists already"):
        start_study(task, run=tmp_path / "home" / "r", n_trials=1, training=TRAINING, tracking_uri=None)
    assert not Path("~").exists()


def test_a_path_from_here_and_the_whole_path_are_the_same_run(task: Task) -> None:
    start_study(task, run="./r", n_trials=1, training=TRAINING, tracking_uri=None)
    for other in (Path("r").absolute(), "r/", "r"):
        with pytest.raises(RunError, match="exists already"):
            start_study(task, run=other, n_trials=1, training=TRAINING, tracking_uri=None)
    assert not Path("runs").exists()


def test_the_scores_of_two_processes_are_never_mixed_in_one_file() -> None:
    out, image = Path("scores.csv"), Path("a.png")
    with _Table(out) as first:
        first.write(image, {"score": "1"})
        with pytest.raises(UsageError, match="another process writes it; wait for that, or name another"):
            _Table(out)
    with _Table(out) as second:
        second.write(image, {"score": "2"})
    assert out.read_text() == "path,score\na.png,2\n" and os.listdir() == ["scores.csv"]


def test_a_report_takes_no_place_that_another_process_has_just_taken(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_study(task, run="r", n_trials=1, training=TRAINING, tracking_uri=None)
    gather = reporting._gather

    def gather_while_another_is_faster(*found: Any) -> Any:
        (tmp_path / "page").mkdir()
        (tmp_path / "page" / "index.html").write_text("theirs")
        return gather(*found)

    monkeypatch.setattr(reporting, "_gather", gather_while_another_is_faster)
    with pytest.raises(ValueError, match="expected a folder that is not there yet"):
        reporting.report_run("r", task=task, out=tmp_path / "page")
    assert (tmp_path / "page" / "index.html").read_text() == "theirs"


@pytest.mark.parametrize("theirs", ["index.html", None])
def test_example_images_take_no_place_that_another_process_has_just_taken(
    theirs: str | None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_by_another(*_: object) -> Any:
        (workplace / "images").mkdir(exist_ok=True)
        if theirs is not None:
            (workplace / "images" / theirs).touch()
        return photograph_of("brick")

    monkeypatch.setattr("ssad_hpo.data.example.photograph_of", made_by_another)
    with pytest.raises(ValueError, match="is there already; name a folder that is not"):
        write_example(workplace / "images")
    assert [path.name for path in workplace.iterdir()] == ["images"]
    assert os.listdir(workplace / "images") == ([] if theirs is None else [theirs])


def ask_for_a_run(start: Any, run: Path, seed: int) -> None:
    """Exit code 3: refused."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    images = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    start.wait()
    try:
        start_study(images, run=run, seed=seed, n_trials=2, training=TRAINING, tracking_uri=None)
    except RunError as error:
        assert "in use by " in str(error) or "exists already" in str(error)
        os._exit(3)


def test_of_processes_that_ask_for_the_same_new_run_one_gets_it_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = in_processes(ask_for_a_run, [(run, seed) for seed in (1, 2, 3)])
    assert sorted(map(str, codes)) == ["0", "3", "3"]
    winner = codes.index(0) + 1
    settings = open_run(run).settings
    assert isinstance(settings.method, Search) and settings.method.seed == winner
    task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    alone = start_study(
        task, run=tmp_path / "alone", seed=winner, n_trials=2, training=TRAINING, tracking_uri=None
    )
    assert [t.params for t in open_result(run).study.trials] == [t.params for t in alone.study.trials]
    with pytest.raises(RunError, match="exists already"):
        start_study(task, run=run, n_trials=2, training=TRAINING, tracking_uri=None)


def test_a_folder_with_nothing_but_a_lock_may_become_a_run(task: Task) -> None:
    Path("runs", "r").mkdir(parents=True)
    Path("runs", "r", "lock").touch()
    start_study(task, run="r", n_trials=1, training=TRAINING, tracking_uri=None)


# An objective in a user's hands


def test_a_trial_outside_of_a_study_gives_its_value_and_nothing_is_kept(task: Task, tmp_path: Path) -> None:
    objective = Objective(task, Search(), TRAINING, artifacts=tmp_path / "kept")
    study = optuna.create_study()
    study.optimize(objective, n_trials=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")}
    assert objective(study.best_trial) == study.best_value
    fixed = optuna.trial.FixedTrial(study.best_params)
    assert objective(fixed) == study.best_value
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == before
    assert select(study).detector().augmentation == select(study).augmentation


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_that_does_not_minimise_one_value_is_refused_before_training(
    directions: list[str], task: Task
) -> None:
    study = optuna.create_study(directions=directions)
    with pytest.raises(ValueError, match=r"study: expected one that minimises dsv, .* got m"):
        study.optimize(Objective(task, Search(), TRAINING), n_trials=1)
    assert study.trials[0].params == {}


def test_a_space_of_one_point_is_trained_once(task: Task) -> None:
    space = SearchSpace({"cutavg": {"patch_area": 0.05, "patch_aspect": 1.0}})
    study = optuna.create_study()
    study.optimize(Objective(task, Search(space), TRAINING), n_trials=4)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert len(candidates(study)) == 1
    result = start_study(task, space=space, n_trials=4, training=TRAINING, run="r", tracking_uri=None)
    assert len(result.study.trials) == result.run.settings.n_trials == 1


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_space_of_two_points_has_two_trials_by_any_sampler(sampler: str, task: Task) -> None:
    one = {"patch_area": 0.05, "patch_aspect": 1.0}
    space = SearchSpace({"cutavg": one, "cutout": one})
    result = start_study(
        task, space=space, sampler=sampler, n_trials=5, training=TRAINING, run="r", tracking_uri=None
    )
    assert sorted(t.params["augmentation"] for t in result.study.trials) == ["cutavg", "cutout"]


def test_a_grid_is_counted_before_it_is_listed() -> None:
    with pytest.raises(ValueError, match=r"grid_points: expected a grid of at most 100,000 .* got 1e\+09"):
        Search(SearchSpace("cutpaste"), sampler="grid", grid_points=1000)
    grid = Search(SearchSpace({"cutavg": {"patch_area": Range(0.01, 0.1)}}), sampler="grid", n_trials=9)
    assert (grid.total, grid.space.grid_size(4)) == (9, 16)


@pytest.mark.slow
def test_mlflows_own_choice_of_an_experiment_is_kept_to(
    task: Task, workplace: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_mlflow, workplace / "mlflow.db")
    client = MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    chosen = client.create_experiment("chosen by set_experiment")
    quick = {"n_trials": 1, "training": TRAINING}
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", chosen)
    start_study(task, run="by-id", **quick)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
    start_study(task, run="by-name", **quick)
    start_study(task, run="by-argument", experiment="given", **quick)
    for experiment, run in (
        ("chosen by set_experiment", "by-id"),
        ("named", "by-name"),
        ("given", "by-argument"),
    ):
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        names = {r.info.run_name for r in client.search_runs([found.experiment_id])}
        assert open_run(run).settings.title in names
    assert client.get_experiment_by_name("ssad_hpo") is None


def test_processes_that_read_a_run_do_not_wait_for_each_other_and_say_that_they_read(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    with locked(tmp_path, shared=True):
        with locked(tmp_path, shared=True):
            pass
        with pytest.raises(RunError, match="in use by a process that reads it; wait"), locked(tmp_path):
            pass
    with locked(tmp_path):
        with (
            pytest.raises(RunError, match=rf"in use by process {os.getpid()} on"),
            locked(tmp_path, shared=True),
        ):
            pass
    with locked(tmp_path):
        pass
