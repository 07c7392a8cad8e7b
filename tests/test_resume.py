"""Interruption: real SIGKILL and SIGINT of real processes, then `resume_study`.

Processes come from a fork server that has imported everything, so that a kill costs milliseconds. They
kill themselves at an exact moment, between two system calls (see `die_at`), or are killed from outside.
Each study is compared with one that nobody disturbed, to the last bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from alike import check_equal, facts, final_trials, finished_so_far, study_of_copy
from PIL import Image
from starting import start_study

from ssad_hpo import controlled_data, data
from ssad_hpo.experiment import (
    Run,
    RunError,
    StudyInterrupted,
    StudyResult,
    evaluate_run,
    open_result,
    open_run,
    resume_study,
    run_study,
    sync_run,
)
from ssad_hpo.search import is_final, read_reseeded, records
from ssad_hpo.storage import open_journal
from ssad_hpo.task import Search, SearchSpace, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

PROCESSES = multiprocessing.get_context("forkserver")  # whose server conftest prepares

TRAINING = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 0.75, 1.0))
TWO_KINDS = SearchSpace({"cutout": {}, "cutpaste": {"patch_aspect": 1.0}})
# A spot so large that it blackens every image: the augmented embeddings are all one point.
COLLAPSING = SearchSpace({"cutavg": {}, "cutdiff": {"patch_area": 1e6}})
STUDIES: dict[str, dict[str, Any]] = {
    "random": {"n_trials": 4, "sampler": "random", "space": TWO_KINDS, "keep": 1},
    "tpe": {"n_trials": 12, "sampler": "tpe", "space": TWO_KINDS},
    "gp": {"n_trials": 11, "sampler": "gp", "space": SearchSpace("cutavg")},
    "grid": {"n_trials": 9, "sampler": "grid", "space": SearchSpace("cutavg"), "grid_points": 2},
    "asha": {"n_trials": 6, "sampler": "random", "pruner": "asha", "space": TWO_KINDS},
    "failing": {"n_trials": 6, "sampler": "random", "space": COLLAPSING},
    "combined": {
        "n_trials": 5,
        "sampler": "random",
        "space": TWO_KINDS,
        "criterion": "pu_auc",
        "keep": 1,
        "combine": 3,
    },
    "confirmed": {
        "n_trials": 4,
        "sampler": "random",
        "space": TWO_KINDS,
        "criterion": "shift",
        "keep": 1,
        "confirm": 2,
    },
}
# A moment to die at: ("write", n) before the n-th write to the journal, ("written", n) after it with the
# journal's lock still held, ("publish", n) before the n-th trial's artifacts get their name, ("text", t)
# when the journal has come to contain t, ("combine", 1) before the combined detector gets its name.
Moment = tuple[str, int | str]


def task_of_the_studies() -> Task:
    return controlled_data(image_size=16, n_train=20, n_unlabeled=14, n_held_out=12).task


def start(study: str, folder: Path, **others: Any) -> StudyResult:
    settings = {"training": TRAINING, "tracking_uri": None, **STUDIES[study], **others}
    return start_study(task_of_the_studies(), run=folder, **settings)


def resume(folder: Path, **others: Any) -> StudyResult:
    return resume_study(folder, task=task_of_the_studies(), **others)


def die_at(moment: Moment, folder: Path, of: signal.Signals) -> None:
    """Have this process get a signal at a moment; Python tells of every open and rename beforehand."""
    kind, when = moment
    journal, artifacts = str(folder / "journal.log"), str(folder / "artifacts")
    seen: Counter[str] = Counter()

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[0] == journal and arguments[1] == "a":
            seen["write"] += 1
        elif event == "os.rename" and arguments[0] == journal + ".lock":
            seen["written"] += 1
            if kind == "text" and str(when) in Path(journal).read_text():
                os.kill(os.getpid(), of)
        elif event == "os.rename" and str(arguments[0]).startswith(artifacts):
            seen["publish"] += Path(arguments[0]).is_dir()
        elif event == "os.rename" and str(arguments[0]) == str(folder / "combined.partial"):
            seen["combine"] += 1
        else:
            return
        if seen[kind] == when:
            seen[kind] += 1  # once only
            os.kill(os.getpid(), of)

    sys.addaudithook(kill)


def work(
    study: str,
    folder: Path,
    moment: Moment | None,
    again: bool,
    others: dict[str, Any],
    of: signal.Signals = signal.SIGKILL,
) -> None:
    """What a process of its own does: start or resume a study, and die at a moment. 130: StudyInterrupted."""
    # A shell's background jobs ignore SIGINT, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if moment is not None:
        die_at(moment, folder, of)
    try:
        if again:
            resume(folder)
        else:
            start(study, folder, **others)
    except StudyInterrupted:
        sys.exit(130)


def in_a_process(study: str, folder: Path, again: bool = False, **others: Any) -> None:
    process = PROCESSES.Process(target=work, args=(study, folder, None, again, others))
    process.start()
    process.join()
    assert process.exitcode == 0


def killed(study: str, folder: Path, moment: Moment, again: bool = False, **others: Any) -> None:
    process = PROCESSES.Process(target=work, args=(study, folder, moment, again, others))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{moment}: the study ended before that"


Undisturbed = Callable[[str], StudyResult]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same study, run in one go."""
    results: dict[str, StudyResult] = {}

    def run(study: str) -> StudyResult:
        if study not in results:
            results[study] = start(study, tmp_path_factory.mktemp("undisturbed") / study)
        return results[study]

    return run


def check_survives(folder: Path, tmp_path: Path, expected: StudyResult) -> StudyResult:
    """Resume a killed study: what was finished stays as it was, the rest is as if nothing had been."""
    before = finished_so_far(folder, tmp_path)
    result = resume(folder)
    after = {t.number: (facts(t), t.datetime_complete) for t in result.study.trials if is_final(t)}
    assert {number: after[number] for number in before} == before
    check_equal(result, expected)
    return result


# kill -9


def writes_of(result: StudyResult) -> int:
    return len(result.run.journal.read_text().splitlines()) + 1  # the first write makes the file


@pytest.mark.parametrize("share", [0.0, 0.04, 0.24, 0.52, 0.83, 1.0])
@pytest.mark.parametrize("kind", ["write", "written"])
def test_a_study_killed_at_any_write_of_its_journal_ends_like_an_undisturbed_one(
    kind: str, share: float, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("random")
    # Making the file is a write without a lock; the moments after a write lie between those before one.
    last = writes_of(expected) - (kind == "written")
    killed("random", tmp_path / "run", (kind, max(1, round(share * last))))
    assert os.path.lexists(tmp_path / "run" / "journal.log.lock") == (kind == "written" or share > 0)
    check_survives(tmp_path / "run", tmp_path, expected)


def test_tpe_goes_on_from_its_history_as_if_it_had_not_been_killed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("tpe")
    killed("tpe", tmp_path / "run", ("publish", 11))  # the first trial that the history decides
    check_survives(tmp_path / "run", tmp_path, expected)


def test_a_gaussian_process_goes_on_from_its_history_as_if_it_had_not_been_killed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("gp")
    killed("gp", tmp_path / "run", ("publish", 11))
    check_survives(tmp_path / "run", tmp_path, expected)


def test_successive_halving_counts_a_trial_once_that_was_killed_after_its_first_rung(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("asha")
    states = Counter(trial.state.name for trial in expected.study.trials)
    assert states["PRUNED"] >= 2 and states["COMPLETE"] >= 2
    rungs = [n for n, line in enumerate(expected.run.journal.read_text().splitlines()) if "_rung_0" in line]
    assert len(rungs) == 6
    for trial in (0, 2):  # to count either twice would change what becomes of the others
        folder = tmp_path / f"killed in trial {trial}"
        killed("asha", folder, ("written", rungs[trial] + 1))
        check_survives(folder, tmp_path, expected)


def test_a_grid_goes_on_where_it_was_killed(tmp_path: Path, undisturbed: Undisturbed) -> None:
    expected = undisturbed("grid")
    assert len(expected.study.trials) == 4
    killed("grid", tmp_path / "run", ("publish", 3))
    check_survives(tmp_path / "run", tmp_path, expected)


def test_a_grid_that_was_killed_after_its_last_candidate_is_complete(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("grid")
    killed("grid", tmp_path / "run", ("written", writes_of(expected) - 1))
    check_survives(tmp_path / "run", tmp_path, expected)


@pytest.mark.parametrize("moment", [("publish", 4), ("text", "pu_auc"), ("combine", 1)])
def test_candidates_score_together_after_a_kill_as_if_there_had_been_none(
    moment: Moment, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("combined")
    assert expected.evidence is not None and len(expected.evidence.members) == 3
    killed("combined", tmp_path / "run", moment)
    check_survives(tmp_path / "run", tmp_path, expected)
    assert not list((tmp_path / "run").glob("combined.*"))


@pytest.mark.parametrize("moment", [("publish", 4), ("text", "reseeded"), ("written", -1)])
def test_the_best_are_trained_with_other_seeds_after_a_kill_as_if_there_had_been_none(
    moment: Moment, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("confirmed")
    kind, when = moment
    when = writes_of(expected) - 2 if when == -1 else when  # between the last two of them
    killed("confirmed", tmp_path / "run", (kind, when))
    left = {("publish"): 0, "text": 1, "written": 3}[kind]
    study = study_of_copy(tmp_path / "run" / "journal.log", tmp_path / "copy.log")
    assert study is not None and len(read_reseeded(study)) == left
    check_survives(tmp_path / "run", tmp_path, expected)


def test_artifacts_that_a_kill_cut_off_are_cleared_away(tmp_path: Path, undisturbed: Undisturbed) -> None:
    killed("random", tmp_path / "run", ("publish", 3))
    artifacts = tmp_path / "run" / "artifacts"
    left = [path.name for path in artifacts.glob("trial-00002-*")]
    assert len(left) == 1 and left[0].endswith(".partial")
    check_survives(tmp_path / "run", tmp_path, undisturbed("random"))
    assert not list(artifacts.glob("*.partial"))


def test_a_study_killed_twice_ends_like_an_undisturbed_one(tmp_path: Path, undisturbed: Undisturbed) -> None:
    killed("random", tmp_path / "run", ("publish", 2))
    killed("random", tmp_path / "run", ("publish", 2), again=True)
    before = finished_so_far(tmp_path / "run", tmp_path)
    assert sorted(before) == [0, 2]  # trial 1 was cut off, trial 2 repeated it, trial 3 was cut off
    result = check_survives(tmp_path / "run", tmp_path, undisturbed("random"))
    assert [trial.state.name for trial in result.study.trials] == [
        *("COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE")
    ]


def test_a_retry_that_is_killed_in_its_turn_is_tried_again(tmp_path: Path, undisturbed: Undisturbed) -> None:
    killed("random", tmp_path / "run", ("publish", 2))
    killed("random", tmp_path / "run", ("publish", 1), again=True)
    killed("random", tmp_path / "run", ("publish", 1), again=True)
    result = check_survives(tmp_path / "run", tmp_path, undisturbed("random"))
    retries = [t.number for t in records(result.study) if t.repeats == 1]
    assert retries == [2, 3, 4]


def test_a_study_killed_while_a_retry_waits_runs_it_once(tmp_path: Path, undisturbed: Undisturbed) -> None:
    killed("random", tmp_path / "run", ("publish", 3))
    killed("random", tmp_path / "run", ("text", "retry_of"), again=True)
    copy = tmp_path / "looked at.log"
    shutil.copy(tmp_path / "run" / "journal.log", copy)
    study = optuna.load_study(study_name=None, storage=open_journal(copy))
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    result = check_survives(tmp_path / "run", tmp_path, undisturbed("random"))
    assert len(result.study.trials) == 5


def test_a_trial_that_failed_by_its_own_fault_is_not_repeated(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("failing")
    states = Counter(trial.state.name for trial in expected.study.trials)
    assert states["FAIL"] >= 2 and states["COMPLETE"] >= 2
    killed("failing", tmp_path / "run", ("write", writes_of(expected) - 8))
    result = check_survives(tmp_path / "run", tmp_path, expected)
    own, theirs = (
        Counter(t.reason for t in records(study) if t.status == "failed")
        for study in (result.study, expected.study)
    )
    assert own == theirs and own.total() > 0


def test_a_failure_whose_reason_was_written_when_the_kill_came_stays_a_failure(
    tmp_path: Path, undisturbed: Undisturbed, listener: Any
) -> None:
    killed("failing", tmp_path / "run", ("text", '"failure"'))
    result = resume(tmp_path / "run", listeners=[listener])
    check_equal(result, undisturbed("failing"))
    number, status, _, reason = listener.of("ended")[0]
    assert status == "failed"
    assert reason == records(result.study)[int(number)].reason


def test_a_study_in_a_database_survives_a_kill(tmp_path: Path, undisturbed: Undisturbed) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    killed("random", tmp_path / "run", ("publish", 3), storage=storage)
    result = resume(tmp_path / "run")
    check_equal(result, undisturbed("random"))
    assert not result.run.journal.exists()


@pytest.mark.parametrize("again", [False, True], ids=["one kill", "another as its trial is closed"])
def test_after_a_kill_nothing_is_left_running_in_mlflow(
    again: bool, tmp_path: Path, empty_mlflow: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path / 'mlflow.db')}"
    killed("random", tmp_path / "run", ("publish", 3), tracking_uri=uri)
    if again:  # Optuna has just been told that trial 2 failed
        killed("random", tmp_path / "run", ("text", '"state":3'), again=True)
    result = resume(tmp_path / "run")
    if result.undelivered:  # the killed process's writer held the outbox still; `sync` waits for it
        assert sync_run(tmp_path / "run").remaining == 0
    runs = {run.info.run_name: run for run in MlflowClient(uri).search_runs(["1"])}
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses.pop(result.run.settings.title) == "FINISHED"
    assert statuses == {
        **dict.fromkeys(["trial 0", "trial 1", "trial 3", "trial 4"], "FINISHED"),
        "trial 2": "KILLED",
    }
    assert runs["trial 2"].data.tags["reason"] == "its process ended"


# Ctrl-C


def on_the_command_line(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ssad_hpo", "search", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder: Path, name: str, process: subprocess.Popen[str]) -> None:
    while not any(folder.glob(name)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
def test_a_search_on_the_command_line_survives_a_kill_and_then_ctrl_c(
    tmp_path: Path, make_category: Callable[..., Path]
) -> None:
    images = make_category(tmp_path / "cloth")
    options = "--run r --trials 1000 -a cutout -a cutavg --steps 8 --width 4 --batch-size 8 --image-size 16"
    search = on_the_command_line(images, *options.split(), "--no-tracking", "--threads", "1")
    artifacts = Path("runs", "r", "artifacts")
    wait_for(artifacts, "trial-00001-????????", search)
    search.kill()
    assert search.wait() == -signal.SIGKILL
    before = finished_so_far(Path("runs", "r"), tmp_path)

    resumed = on_the_command_line("--resume", "r")
    wait_for(artifacts, f"trial-{len(before) + 3:05d}-????????", resumed)
    resumed.send_signal(signal.SIGINT)
    _, said = resumed.communicate()
    assert resumed.returncode == 130, said
    assert re.fullmatch(
        r"ssad-hpo: stopped; all that is done is kept. Go on with: .*search --resume r\n", said
    )

    after = finished_so_far(Path("runs", "r"), tmp_path)
    assert before and {number: after[number] for number in before} == before
    undisturbed_search = run_study(
        data.find_source(images, image_size=16),
        Search(SearchSpace(["cutout", "cutavg"]), n_trials=len(after) + 2),
        Training(steps=8, width=4, batch_size=8),
        tracking_uri=None,
    )
    check_equal(resume_study("r", n_trials=len(after) + 2), undisturbed_search)


class _Interrupts:
    """A recorder at whose chosen event Ctrl-C is pressed."""

    def __init__(self, event: str, trial: str) -> None:
        self.event, self.trial = event, trial

    def _at(self, event: str, trial: str) -> None:
        if (event, trial) == (self.event, self.trial):
            before = signal.signal(signal.SIGINT, signal.default_int_handler)  # others may ignore it
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.signal(signal.SIGINT, before)

    def trial_started(self, trial: str, params: Any, tags: Any) -> None:
        self._at("started", trial)

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        self._at("progress", trial)

    def trial_ended(self, trial: str, status: Any, metrics: Any, reason: str | None = None) -> None:
        if status == "complete":
            self._at("ended", trial)


@pytest.mark.parametrize("event", ["started", "progress", "ended"])
def test_ctrl_c_at_any_event_of_a_trial_keeps_what_is_done_and_resumes_alike(
    event: str, tmp_path: Path, undisturbed: Undisturbed, listener: Any
) -> None:
    with pytest.raises(StudyInterrupted, match="resume_study") as stopped:
        start("random", tmp_path / "run", listeners=[_Interrupts(event, "2"), listener])
    assert stopped.value.run == tmp_path / "run"
    assert len(finished_so_far(tmp_path / "run", tmp_path)) == 2
    assert listener.of("ended")[-1][:2] == ["2", "interrupted"]
    result = check_survives(tmp_path / "run", tmp_path, undisturbed("random"))
    assert [t.repeats for t in records(result.study)] == [None, None, None, 2, None]


@pytest.mark.parametrize("writes", ["a report", "a result", "a new trial"])
def test_ctrl_c_while_optuna_writes_to_its_journal_is_a_ctrl_c(
    writes: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed("random")
    operations = [json.loads(line) for line in expected.run.journal.read_text().splitlines()]
    which = {"a report": 7, "a result": 6, "a new trial": 4}[writes]
    found = [n for n, operation in enumerate(operations) if operation["op_code"] == which]
    moment = ("write", found[2] + 2)  # counted from 1, and making the file is the first
    process = PROCESSES.Process(
        target=work, args=("random", tmp_path / "run", moment, False, {}, signal.SIGINT)
    )
    process.start()
    process.join()
    assert process.exitcode == 130
    check_survives(tmp_path / "run", tmp_path, expected)


def test_an_error_in_a_trial_that_is_no_fault_of_the_detector_ends_the_study_and_can_be_resumed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    class _Full(_Interrupts):
        def _at(self, event: str, trial: str) -> None:
            if (event, trial) == ("progress", "1"):
                raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        start("random", tmp_path / "run", listeners=[_Full("", "")])
    check_survives(tmp_path / "run", tmp_path, undisturbed("random"))


# What a dead process leaves behind


@pytest.mark.parametrize(
    "tail",
    [b'{"op_code":6,"worker_id":"a, "tri', b'{"op_code":6,"wor\n', b"\0\0\0\0\0\n", b"{"],
    ids=["torn", "torn, with its newline", "zeros", "one character"],
)
def test_a_torn_last_line_of_the_journal_is_cut(
    tail: bytes, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    killed("random", tmp_path / "run", ("publish", 2))
    with (tmp_path / "run" / "journal.log").open("ab") as journal:
        journal.write(tail)
    check_survives(tmp_path / "run", tmp_path, undisturbed("random"))


def test_a_journal_of_which_only_half_a_line_was_written_starts_anew(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    killed("random", tmp_path / "run", ("write", 2))
    (tmp_path / "run" / "journal.log").write_bytes(b'{"op_code":0,"worker_id":"1c5')
    check_survives(tmp_path / "run", tmp_path, undisturbed("random"))


def test_lock_files_of_a_dead_journal_owner_block_nobody(tmp_path: Path, undisturbed: Undisturbed) -> None:
    folder = tmp_path / "run"
    killed("random", folder, ("written", 30))
    assert (folder / "journal.log.lock").is_symlink()
    (folder / "journal.log.lock0a1b.rename").symlink_to(folder / "journal.log")  # killed while releasing
    check_survives(folder, tmp_path, undisturbed("random"))


def hold(folder: Path, connection: Connection) -> None:
    """Own a run folder until told to go on."""
    torch.set_num_threads(1)

    def wait(run: Run) -> None:
        connection.send(os.getpid())
        connection.recv()

    start("random", folder, announce=wait)


def test_a_run_that_another_process_works_on_is_refused_until_that_is_killed(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    here, there = PROCESSES.Pipe()
    owner = PROCESSES.Process(target=hold, args=(tmp_path / "run", there))
    owner.start()
    pid = here.recv()
    for use in (resume, open_result, evaluate_run, lambda run: resume(run, n_trials=7)):
        with pytest.raises(RunError, match=rf"in use by process {pid} on .*; wait for it or stop it first"):
            use(tmp_path / "run")
    assert open_run(tmp_path / "run").settings.n_trials == 4
    owner.kill()
    owner.join()
    check_survives(tmp_path / "run", tmp_path, undisturbed("random"))


# Resuming on purpose


def test_images_that_have_changed_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    killed("random", tmp_path / "run", ("publish", 2))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    task = task_of_the_studies()
    task.unlabeled[3, 0, 5, 5] += 1
    with pytest.raises(RunError, match="not those that the study began with"):
        resume_study(tmp_path / "run", task=task, n_trials=9)
    with pytest.raises(RunError, match="lived in memory; give the task again"):
        resume_study(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_folder_in_which_an_image_has_changed_is_refused(
    tmp_path: Path, make_category: Callable[..., Path]
) -> None:
    images = make_category(tmp_path / "cloth")
    source = data.find_source(images, image_size=16)
    run_study(source, Search(n_trials=1), TRAINING, run="r", tracking_uri=None)
    changed = images / "train" / "good" / "000.png"
    Image.open(changed).transpose(Image.Transpose.ROTATE_180).save(changed)
    with pytest.raises(RunError, match="images of cloth are not those that the study began with"):
        resume_study("r", n_trials=2)


def test_more_trials_extend_a_finished_study(tmp_path: Path, undisturbed: Undisturbed) -> None:
    start("random", tmp_path / "run", n_trials=2)
    result = resume(tmp_path / "run", n_trials=4)
    check_equal(result, undisturbed("random"))
    assert len(result.study.trials) == 4
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["method"]["search"]["n_trials"] == 4
    with pytest.raises(ValueError, match="n_trials: expected a whole number >= 1, got 0"):
        resume(tmp_path / "run", n_trials=0)


def test_resuming_a_finished_study_runs_nothing(tmp_path: Path, listener: Any) -> None:
    first = start("random", tmp_path / "run")
    trials = first.study.trials
    again = resume(tmp_path / "run", listeners=[listener])
    assert listener.heard == []
    assert again.study.trials == trials
    assert again.selected == first.selected


@pytest.mark.parametrize("study", ["random", "failing"])
def test_two_processes_with_the_same_seed_come_to_the_same_study(
    study: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    in_a_process(study, tmp_path / "run")
    check_equal(resume(tmp_path / "run"), undisturbed(study))


def test_another_seed_comes_to_another_study(tmp_path: Path, undisturbed: Undisturbed) -> None:
    other = final_trials(start("random", tmp_path / "run", seed=1).study)
    for place, trial in final_trials(undisturbed("random").study).items():
        assert trial.params != other[place].params
