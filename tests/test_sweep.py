"""Whole sweeps, on a real Ray of two processors."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import torchvision
from optuna.trial import TrialState
from servers import LONG
from small_sweeps import SEARCH, SPACE, TRAINING, small_task, states
from starting import start_study, start_sweep

from ssad_hpo import Objective, controlled_data, select
from ssad_hpo.encoder.network import _pretrained
from ssad_hpo.experiment import RunError, StudyInterrupted, load_detector, open_result, open_run, resume_study
from ssad_hpo.judgement import evaluations
from ssad_hpo.numerics import seeded
from ssad_hpo.raytune import StudySearcher, sweep, trainable
from ssad_hpo.search import is_final, make_sampler, records
from ssad_hpo.search.record import read_trial
from ssad_hpo.storage import open_journal
from ssad_hpo.task import Cluster, Search, SearchSpace, Task, Training

pytestmark = [pytest.mark.services, pytest.mark.ray, pytest.mark.usefixtures("workplace")]

# A spot so large that it blackens every image: the augmented embeddings are all one point.
COLLAPSING = {"patch_area": 1e6}


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


class Awkward(SearchSpace):
    """A space of which one kind raises in the worker, as a faulty augmentation does."""

    def augmentation(self, params: Any) -> Any:
        if params["augmentation"] == "rotation" and "RAY_RAYLET_PID" in os.environ:
            raise ZeroDivisionError("division by zero in a kind of one's own")
        return super().augmentation(params)


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
    assert str(kept[1].reason).startswith("ZeroDivisionError: division by zero")
    statuses = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    told = listener.of("ended")
    assert all(reason.startswith("stopped at step ") for _, status, _, reason in told if status == "pruned")
    ended = {
        int(trial): (status, None if status == "pruned" else reason) for trial, status, _, reason in told
    }
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


def test_a_sweep_by_held_out_images_chooses_and_combines_as_a_search_does(
    local_ray: str, tmp_path: Path
) -> None:
    task = controlled_data(image_size=32, n_train=16, n_unlabeled=12, n_held_out=12).task
    search = {
        "space": SPACE,
        "sampler": "random",
        "criterion": "pu_auc",
        "n_trials": 5,
        "keep": 1,
        "combine": 3,
    }
    settings: dict[str, Any] = {**search, "training": TRAINING, "tracking_uri": None}
    swept = start_sweep(task, run=tmp_path / "swept", max_concurrent=2, **settings)
    searched = start_study(task, run=tmp_path / "searched", **settings)
    assert [trial.value for trial in swept.study.trials] == [t.value for t in searched.study.trials]
    assert swept.selected.number == searched.selected.number
    mine, theirs = swept.evidence, searched.evidence
    assert mine is not None and theirs is not None and mine.members == theirs.members
    assert mine.p_anomalies == theirs.p_anomalies and len(mine.members) == 3
    saved = [load_detector(result.run.combined).score(task.unlabeled) for result in (swept, searched)]
    assert torch.equal(*saved)


def test_all_nodes_begin_with_the_drivers_weights_and_need_none_of_their_own(
    local_ray: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_this_process(encoder: Any, name: str) -> dict[str, torch.Tensor]:
        with seeded(7):
            return torchvision.models.get_model(name).state_dict()

    # Workers were started without it: they would look for a network.
    monkeypatch.setattr("ssad_hpo.encoder.weights._downloaded", of_this_process)
    training = replace(TRAINING, encoder="mobilenet_v3_small", weights="pretrained", steps=2)
    settings: dict[str, Any] = {"space": SPACE, "sampler": "random", "n_trials": 2, "confirm": 1}
    settings |= {"training": training, "tracking_uri": None}
    _pretrained.cache_clear()
    try:
        swept = start_sweep(task, run=tmp_path / "swept", max_concurrent=2, **settings)
        searched = start_study(task, run=tmp_path / "searched", **settings)
    finally:
        _pretrained.cache_clear()
    assert [trial.state for trial in swept.study.trials] == [TrialState.COMPLETE] * 3
    assert [trial.value for trial in swept.study.trials] == [t.value for t in searched.study.trials]
    again, there = swept.confirmation, searched.confirmation
    assert again is not None and there is not None and again.values == there.values


def go_on(firsts: list[float], factor: int) -> list[bool]:
    """Who of a row of trials is among the best of every `factor` that came so far."""
    return [
        not earlier or value <= np.percentile(earlier, 100 / factor)
        for value, earlier in ((value, firsts[:i]) for i, value in enumerate(firsts))
    ]


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


class Fatal(SearchSpace):
    """A space of which a worker dies, as of a fault in a library."""

    def augmentation(self, params: Any) -> Any:
        if "RAY_RAYLET_PID" in os.environ:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().augmentation(params)


def test_a_trial_whose_worker_dies_by_itself_is_interrupted_and_says_where_the_reason_is(
    local_ray: str, task: Task, tmp_path: Path
) -> None:
    import ray.cloudpickle
    from ray import tune

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    objective = Objective(task, Search(Fatal({"cutavg": {}})), TRAINING)
    study = optuna.create_study()
    searcher = StudySearcher(objective, study)
    run = tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[searcher.callback])
    config = tune.TuneConfig(search_alg=searcher, num_samples=1)
    tune.Tuner(trainable(objective), tune_config=config, run_config=run).fit()

    (trial,) = records(study)
    assert trial.status == "interrupted" and "its worker died once: The actor died" in trial.reason
    assert "worker-*.err" in trial.reason
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")
    assert any("Segmentation fault" in path.read_text() for path in logs.glob("worker-*.err"))


DRIVER = """
import sys, optuna, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sweep as t
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
    deadline = time.monotonic() + LONG
    try:
        while not condition():
            assert driver.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline, "nothing to kill the driver for"
            time.sleep(0.02)
    finally:
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
        small_task(),
        run=folder,
        address=address,
        **sweep_settings(),
    )


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
    whole = [trial for trial in records(result.study) if trial.status == "complete"]
    names = {path.name for path in result.run.artifacts.iterdir()}
    assert names == {Path(str(trial.address)).name for trial in whole}
    assert {name.rpartition("-")[0] for name in names} == {f"trial-{trial.number:05d}" for trial in whole}


def tune_by_hand(place: Path, address: str) -> None:
    """A user's own Tuner on a study in a database, or the same one restored."""
    import ray
    from ray import tune

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False)
    task = small_task()
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
