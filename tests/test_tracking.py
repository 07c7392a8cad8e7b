"""Tracking against real MLflow: SQLite files, real servers, real kills."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowServer, wait_until
from told import check_delivered_exactly, client_of, history_of, records_in, runs_of

from ssad_hpo.task import StudyRecorder
from ssad_hpo.tracking import (
    MlflowRecorder,
    SilentRecorder,
    absolute_uri,
    default_tracking_uri,
    delivery,
    pending,
    sync,
    ui_command,
)
from ssad_hpo.tracking.delivery import deliver
from ssad_hpo.tracking.outbox import locked, save_state

STEPS = (75, 112, 150)
STUDY_RECORDS, TRIAL_RECORDS = 3, 5  # that `record_study` and `record_trial` append


@pytest.fixture
def database(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tracking URI of an empty database, its tables made; MLflow's folders go beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def recorder(tmp_path: Path, database: str) -> MlflowRecorder:
    """A recorder that is not started: its outbox waits for a delivery."""
    return MlflowRecorder(tmp_path / "run" / "outbox.jsonl", database, "testbed", "gravel, seed 0")


def record_trial(recorder: StudyRecorder, trial: str, status: Any = "complete", reason: Any = None) -> None:
    recorder.trial_started(trial, {"augmentation": "cutavg", "cutavg.patch_area": 0.1}, {"sampler": "tpe"})
    for step in STEPS:
        recorder.trial_progress(trial, step, {"dsv": 1 / step, "loss": step / 7})
    recorder.trial_ended(trial, status, {"dsv": 1 / STEPS[-1], "mmd": 0.25}, reason)


def record_study(recorder: StudyRecorder, trials: int) -> int:
    """Record a whole study; returns the number of records."""
    recorder.study_started({"n_trials": trials}, {"task": "gravel/cutavg"})
    for trial in range(trials):
        record_trial(recorder, str(trial))
    recorder.study_metrics({"regret": 0.05})
    recorder.study_ended("complete")
    return STUDY_RECORDS + trials * TRIAL_RECORDS


# Whole studies through the writer process.


def test_a_study_becomes_a_parent_run_with_one_child_per_trial(tmp_path: Path, database: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figure.txt").write_text("a figure")
    began = time.time_ns() // 1_000_000
    recorder = MlflowRecorder(tmp_path / "run" / "outbox.jsonl", database, "testbed", "gravel, seed 0")
    with recorder:
        recorder.study_started({"n_trials": 4}, {"task": "gravel/cutavg", "criterion": "dsv"})
        record_trial(recorder, "0")
        record_trial(recorder, "1", "pruned")
        record_trial(recorder, "2", "failed", "embeddings collapsed")
        record_trial(recorder, "3", "interrupted")
        recorder.trial_metrics("0", {"auc": 0.9})
        recorder.study_metrics({"auc_selected": 0.9, "regret": 0.05})
        recorder.artifact(tmp_path / "run" / "figure.txt", "figures")
        recorder.study_ended("complete")
        assert recorder.close(timeout=120) == 0
    assert recorder.result is not None
    assert (recorder.result.error, recorder.result.refused) == (None, ())

    runs = runs_of(database)
    parent = runs.pop("gravel, seed 0")
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"n_trials": "4"}
    assert parent.data.metrics == {"auc_selected": 0.9, "regret": 0.05}
    assert parent.data.tags["criterion"] == "dsv"
    assert (tmp_path / "mlruns" / "1" / parent.info.run_id / "artifacts/figures/figure.txt").exists()

    assert sorted(runs) == ["trial 0", "trial 1", "trial 2", "trial 3"]
    statuses = {name: (run.info.status, run.data.tags["status"]) for name, run in runs.items()}
    assert statuses == {
        "trial 0": ("FINISHED", "complete"),
        "trial 1": ("FINISHED", "pruned"),
        "trial 2": ("FAILED", "failed"),
        "trial 3": ("KILLED", "interrupted"),
    }
    assert runs["trial 2"].data.tags["reason"] == "embeddings collapsed"
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["study"] == "gravel, seed 0"
        assert run.data.tags["sampler"] == "tpe"
        assert run.data.params == {"augmentation": "cutavg", "cutavg.patch_area": "0.1"}
        points = history_of(database, run, "dsv")
        assert [(step, value) for step, _, value in points] == [(step, 1 / step) for step in STEPS]
        for _, at, _ in points:  # when it was recorded, not when it was delivered
            assert began <= run.info.start_time <= at <= run.info.end_time
        assert [(step, value) for step, _, value in history_of(database, run, "mmd")] == [(STEPS[-1], 0.25)]
    assert runs["trial 0"].data.metrics["auc"] == 0.9
    check_delivered_exactly(database, recorder.outbox)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"), empty_mlflow)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_dead_from_the_start_gets_the_study_by_sync_later(
    tmp_path: Path, server: MlflowServer
) -> None:
    server.kill()
    outbox = tmp_path / "run" / "outbox.jsonl"
    recorder = MlflowRecorder(outbox, server.uri, "dead from the start", "study")
    with recorder:
        recorder.trial_progress("0", 10, {"dsv": math.nan, "loss": -math.inf})
        appended = 1 + record_study(recorder, trials=3)
        assert recorder.close() == appended
    assert recorder.result is not None
    assert "Connection refused" in str(recorder.result.error)

    server.start()
    result = sync(outbox, server.uri)
    assert (result.delivered, result.remaining, result.error) == (appended, 0, None)
    runs = runs_of(server.uri)
    assert sorted(runs) == ["study", "trial 0", "trial 1", "trial 2"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert math.isnan(history_of(server.uri, runs["trial 0"], "loss")[0][2])
    assert runs["trial 0"].data.tags["nonfinite.loss"] == "-inf at step 10"
    experiment = client_of(server.uri).get_experiment_by_name("dead from the start")
    client_of(server.uri).delete_experiment(experiment.experiment_id)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_and_comes_back_misses_nothing(
    tmp_path: Path, server: MlflowServer
) -> None:
    if server.process is None:
        server.start()
    outbox = tmp_path / "run" / "outbox.jsonl"
    with MlflowRecorder(outbox, server.uri, "dies in the middle", "study") as recorder:
        record_trial(recorder, "0")
        wait_until(lambda: pending(outbox) == 0, "the delivery")
        server.kill()
        recorder.trial_started("1", {}, {})
        wait_until(
            lambda: "Connection refused" in outbox.with_suffix(".log").read_text(), "the writer to notice"
        )
        assert recorder.close() == 1
    server.start()
    with MlflowRecorder(outbox, server.uri, "dies in the middle", "study") as recorder:  # resumed
        recorder.trial_ended("1", "interrupted", {})
        assert recorder.close() == 0
    assert runs_of(server.uri)["trial 1"].info.status == "KILLED"
    check_delivered_exactly(server.uri, outbox)


def test_a_server_that_never_answers_is_left_after_the_time_given(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        recorder = MlflowRecorder(tmp_path / "outbox.jsonl", uri, "testbed", "study")
        recorder.start()
        writer = recorder._writer
        appended = record_study(recorder, trials=2)
        assert recorder.close(timeout=0.5) == appended
    assert writer is not None
    assert writer.returncode == -signal.SIGKILL
    assert recorder.result is None


# Kills.

RECORDING = """
import sys
from pathlib import Path
from ssad_hpo.tracking import MlflowRecorder
with MlflowRecorder(Path(sys.argv[1]), sys.argv[2], "testbed", "study") as recorder:
    assert "mlflow" not in sys.modules
    for trial in range(1000):
        recorder.trial_started(str(trial), {"patch_area": 0.1}, {})
        for step in (75, 112, 150):
            recorder.trial_progress(str(trial), step, {"dsv": trial + 1 / step})
        recorder.trial_ended(str(trial), "complete", {"mmd": 0.25})
        sys.stdin.readline()
"""


@pytest.mark.slow
def test_kill_9_of_the_study_in_mid_delivery_loses_and_doubles_nothing(tmp_path: Path, database: str) -> None:
    outbox = tmp_path / "run" / "outbox.jsonl"
    study = subprocess.Popen(
        [sys.executable, "-c", RECORDING, str(outbox), database], stdin=subprocess.PIPE, bufsize=0
    )
    assert study.stdin is not None
    wait_until(lambda: outbox.exists(), "the outbox")
    for _ in range(4):
        study.stdin.write(b"\n" * 5)
        wait_until(lambda: outbox.with_suffix(".state.json").exists(), "a delivery")
        time.sleep(0.3)
    wait_until(lambda: len(records_in(outbox)) >= 20 * TRIAL_RECORDS, "20 trials")
    study.kill()
    study.wait()
    result = sync(outbox, database)
    assert (result.remaining, result.error) == (0, None)
    check_delivered_exactly(database, outbox)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_delivery_that_is_cut_off_before_its_state_is_saved_doubles_nothing_when_repeated(
    recorder: MlflowRecorder, database: str, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Saves come before runs are created (1), after the first chunk (2), before the next runs (3)."""
    appended = record_study(recorder, trials=4)
    monkeypatch.setattr(delivery, "CHUNK", 9)
    saves = 0

    def save_or_die(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == kill_at:
            raise KeyboardInterrupt
        save_state(*arguments)

    with monkeypatch.context() as patch:
        for module in ("delivery", "runs"):
            patch.setattr(f"ssad_hpo.tracking.{module}.save_state", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            deliver(recorder.outbox, database)
    result = deliver(recorder.outbox, database)
    assert (result.remaining, result.error) == (0, None)
    assert result.delivered <= appended
    check_delivered_exactly(database, recorder.outbox)


def test_redelivery_after_the_state_is_deleted_doubles_nothing(
    recorder: MlflowRecorder, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PAGE", 2)  # the runs are found over several pages
    appended = record_study(recorder, trials=3)
    recorder.trial_progress("3", 10, {"dsv": math.nan, "loss": math.inf})
    deliver(recorder.outbox, database)
    recorder.outbox.with_suffix(".state.json").unlink()
    assert deliver(recorder.outbox, database).delivered == appended + 1
    runs = runs_of(database)
    assert len(runs) == 5
    for run in runs.values():
        for metric in run.data.metrics:
            points = history_of(database, run, metric)
            assert len({step for step, _, _ in points}) == len(points)


def test_a_new_database_at_the_old_address_gets_the_whole_study(
    recorder: MlflowRecorder, database: str, tmp_path: Path, empty_mlflow: Path
) -> None:
    record_study(recorder, trials=1)
    assert deliver(recorder.outbox, database).error is None
    (tmp_path / "mlflow.db").unlink()
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    assert sync(recorder.outbox, database).error is None
    (tmp_path / "same.db").hardlink_to(tmp_path / "mlflow.db")  # this process still holds the old one open
    check_delivered_exactly(f"sqlite:///{tmp_path}/same.db", recorder.outbox)


def test_a_torn_line_is_skipped_and_told_and_the_next_record_starts_afresh(
    recorder: MlflowRecorder, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    record_trial(recorder, "0")
    with recorder.outbox.open("ab") as lines:
        lines.write(b'{"trial": "1", "metr')
    assert pending(recorder.outbox) == TRIAL_RECORDS
    assert deliver(recorder.outbox, database).delivered == TRIAL_RECORDS
    record_trial(recorder, "2")
    result = deliver(recorder.outbox, database)
    assert (result.delivered, result.remaining, result.error) == (TRIAL_RECORDS, 0, None)
    assert "skipped a torn line" in caplog.text
    assert sorted(runs_of(database)) == ["gravel, seed 0", "trial 0", "trial 2"]


# Several processes.


def test_what_a_kill_left_of_a_half_made_outbox_is_cleared_away(tmp_path: Path, database: str) -> None:
    (tmp_path / "outbox.0123456789abcdef0123456789abcdef").write_bytes(b'{"study"')
    (tmp_path / "outbox.json").write_text("of somebody else")
    for _ in range(2):
        MlflowRecorder(tmp_path / "outbox.jsonl", database, "testbed", "gravel, seed 0")
    assert sorted(path.name for path in tmp_path.glob("outbox*")) == ["outbox.json", "outbox.jsonl"]


def test_copies_in_other_processes_append_whole_lines_to_the_same_outbox(recorder: MlflowRecorder) -> None:
    program = (
        "import pickle, sys; recorder = pickle.load(sys.stdin.buffer)\n"
        "for step in range(300): recorder.trial_progress(sys.argv[1], step, {'dsv': 0.1})\n"
        "assert recorder.close() >= 300"
    )
    copies = [
        subprocess.Popen([sys.executable, "-c", program, str(copy)], stdin=subprocess.PIPE)
        for copy in range(3)
    ]
    for copy in copies:
        assert copy.stdin is not None
        copy.stdin.write(pickle.dumps(recorder))
        copy.stdin.close()
    assert [copy.wait() for copy in copies] == [0, 0, 0]
    steps = Counter((record["trial"], record["step"]) for record in records_in(recorder.outbox))
    assert steps == Counter({(str(copy), step): 1 for copy in range(3) for step in range(300)})


def test_a_copy_that_is_closed_leaves_the_writer_alone(tmp_path: Path) -> None:
    with MlflowRecorder(tmp_path / "outbox.jsonl", "http://127.0.0.1:9", "testbed", "study") as recorder:
        writer = recorder._writer
        assert writer is not None
        pickle.loads(pickle.dumps(recorder)).close()
        assert writer.poll() is None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads a process's environment")
def test_the_writers_environment_is_its_own_and_the_users_settings_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    before = dict(os.environ)
    with MlflowRecorder(tmp_path / "outbox.jsonl", "http://127.0.0.1:9", "testbed", "study") as recorder:
        assert recorder._writer is not None
        environ = Path(f"/proc/{recorder._writer.pid}/environ")
        wait_until(
            lambda: b"MLFLOW" in environ.read_bytes(), "the writer's environment"
        )  # not yet there in the first moments
        settings = environ.read_bytes().split(b"\0")
        assert b"MLFLOW_DISABLE_TELEMETRY=true" in settings
        assert b"MLFLOW_HTTP_REQUEST_TIMEOUT=77" in settings
        assert dict(os.environ) == before


@pytest.mark.slow
def test_processes_that_die_or_meet_at_a_database_that_does_not_exist_yet_leave_it_whole(
    tmp_path: Path,
) -> None:
    database = tmp_path / "new folder" / "mlflow.db"
    outboxes = [tmp_path / name / "outbox.jsonl" for name in ("first", "second")]
    for outbox in outboxes:
        record_study(MlflowRecorder(outbox, f"sqlite:///{database}", "testbed", outbox.parent.name), trials=1)
    with MlflowRecorder(outboxes[0], f"sqlite:///{database}", "testbed", "first") as recorder:
        wait_until(lambda: (database.parent / ".mlflow.db.new").exists(), "a draft of the database")
        assert recorder._writer is not None
        recorder._writer.kill()
        assert recorder.close() > 0
    assert not database.exists()
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(sync, outboxes, [f"sqlite:///{database}"] * 2))
    assert [(result.remaining, result.error) for result in results] == [(0, None), (0, None)]
    runs = list(client_of(f"sqlite:///{database}").search_runs(["1"]))
    assert sorted(run.info.run_name for run in runs) == ["first", "second", "trial 0", "trial 0"]


def test_two_deliveries_of_one_outbox_exclude_each_other(recorder: MlflowRecorder, database: str) -> None:
    appended = record_study(recorder, trials=1)
    with locked(recorder.outbox.with_suffix(".lock"), wait=0):
        result = deliver(recorder.outbox, database)
    assert (result.delivered, result.remaining) == (0, appended)
    assert "another process holds" in str(result.error)
    assert deliver(recorder.outbox, database).remaining == 0


# What MLflow does not take as it is.


def test_values_that_are_not_finite_become_nan_and_a_tag_that_tells_them(
    recorder: MlflowRecorder, database: str
) -> None:
    recorder.trial_progress("0", 75, {"dsv": math.inf, "mmd": math.nan, "std": 0.5})
    assert deliver(recorder.outbox, database).error is None
    run = runs_of(database)["trial 0"]
    assert math.isnan(run.data.metrics["dsv"])
    assert math.isnan(run.data.metrics["mmd"])
    assert run.data.metrics["std"] == 0.5
    assert run.data.tags["nonfinite.dsv"] == "inf at step 75"
    assert run.data.tags["nonfinite.mmd"] == "nan at step 75"


def test_what_mlflow_refuses_is_told_and_tried_again_by_sync_and_holds_nothing_up(
    recorder: MlflowRecorder, database: str, tmp_path: Path
) -> None:
    recorder.trial_started("0", {"patch*area": 0.1, "angle": 30}, {})
    recorder.trial_progress("0", 75, {"dsv?": 0.1, "mmd": 0.2})
    recorder.artifact(tmp_path / "run" / "late.txt")
    record_trial(recorder, "1")
    result = deliver(recorder.outbox, database)
    assert (result.remaining, result.error) == (0, None)
    assert len(result.refused) == 3
    assert sum("late.txt" in reason for reason in result.refused) == 1
    assert sum(reason.startswith("trial 0: ") for reason in result.refused) == 2
    runs = runs_of(database)
    assert (runs["trial 0"].data.params, runs["trial 0"].data.metrics) == ({"angle": "30"}, {"mmd": 0.2})
    assert runs["trial 1"].info.status == "FINISHED"

    (tmp_path / "run" / "late.txt").write_text("here now")
    assert len(deliver(recorder.outbox, database).refused) == 3  # the writer does not ask for ever
    result = deliver(recorder.outbox, database, retry_refused=True)
    assert (len(result.refused), result.remaining, result.error) == (2, 0, None)
    assert len(deliver(recorder.outbox, database, retry_refused=True).refused) == 2


def test_records_of_a_run_that_the_user_deleted_are_refused_and_the_others_arrive(
    recorder: MlflowRecorder, database: str
) -> None:
    record_trial(recorder, "0")
    deliver(recorder.outbox, database)
    client_of(database).delete_run(runs_of(database)["trial 0"].info.run_id)
    recorder.trial_metrics("0", {"auc": 0.9})
    record_trial(recorder, "1")
    result = deliver(recorder.outbox, database)
    assert (len(result.refused), result.remaining, result.error) == (1, 0, None)
    assert runs_of(database)["trial 1"].info.status == "FINISHED"


def test_long_values_are_cut_in_mlflow_and_whole_in_the_outbox(
    recorder: MlflowRecorder, database: str
) -> None:
    recorder.study_started({"space": "s" * 7000}, {"note": "n" * 9000})
    result = deliver(recorder.outbox, database)
    assert (result.error, result.refused) == (None, ())
    data = runs_of(database)["gravel, seed 0"].data
    assert data.params["space"] == "s" * 5999 + "…"
    assert data.tags["note"] == "n" * 7999 + "…"
    assert records_in(recorder.outbox)[0]["params"]["space"] == "s" * 7000
    recorder.study_started({"space": "s" * 7000}, {})  # resumed with the same
    deliver(recorder.outbox, database)
    assert "resumed.space" not in runs_of(database)["gravel, seed 0"].data.tags


@pytest.mark.parametrize("between", [True, False], ids=["delivered between", "delivered at once"])
def test_a_resumed_study_goes_on_in_its_run_and_changed_parameters_become_tags(
    recorder: MlflowRecorder, database: str, between: bool
) -> None:
    recorder.study_started({"n_trials": 16, "criterion": "dsv"}, {})
    record_trial(recorder, "0", "interrupted")
    recorder.study_ended("interrupted")
    if between:
        deliver(recorder.outbox, database)
        assert runs_of(database)["gravel, seed 0"].info.status == "KILLED"
    resumed = MlflowRecorder(recorder.outbox, database, "testbed", "gravel, seed 0")
    resumed.study_started({"n_trials": 32, "criterion": "dsv"}, {})
    record_trial(resumed, "0")
    result = deliver(recorder.outbox, database)
    assert (result.error, result.refused) == (None, ())
    runs = runs_of(database)
    parent = runs["gravel, seed 0"]
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"n_trials": "16", "criterion": "dsv"}
    assert parent.data.tags["resumed.n_trials"] == "32"
    assert runs["trial 0"].info.status == "FINISHED"
    check_delivered_exactly(database, recorder.outbox)


def test_an_experiment_that_is_deleted_stops_the_delivery_with_its_remedy(
    recorder: MlflowRecorder, database: str
) -> None:
    appended = record_study(recorder, trials=1)
    client = client_of(database)
    client.delete_experiment(client.create_experiment("testbed"))
    result = deliver(recorder.outbox, database)
    assert result.remaining == appended
    assert "mlflow experiments restore" in str(result.error)


# Where to.


def test_another_server_gets_the_whole_study(
    recorder: MlflowRecorder, database: str, tmp_path: Path, empty_mlflow: Path
) -> None:
    appended = record_study(recorder, trials=1)
    deliver(recorder.outbox, database)
    shutil.copy(empty_mlflow, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    assert deliver(recorder.outbox, other).delivered == appended
    check_delivered_exactly(other, recorder.outbox)


@pytest.mark.parametrize("uri", ["file:///somewhere/mlruns", "./mlruns", "mlruns", "sqlite:///:memory:"])
def test_folders_and_memory_are_refused_in_one_sentence(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=r"tracking_uri: expected sqlite:///FILE"):
        MlflowRecorder(tmp_path / "outbox.jsonl", uri, "testbed", "study")


def test_relative_databases_are_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/runs.db?timeout=5")
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/sub/runs.db?timeout=5"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri() == "http://tracking:5000"
    (tmp_path / "100% sure").mkdir()
    monkeypatch.chdir(tmp_path / "100% sure")
    uri = absolute_uri("sqlite:///mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/100%25 sure/mlflow.db"
    assert absolute_uri(uri) == uri


def test_the_ui_command_names_the_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/my runs/mlflow.db"
    words = shlex.split(ui_command(uri))
    assert words[-3:] == ["ui", "--backend-store-uri", uri]
    assert ui_command("http://tracking:5000").endswith("http://tracking:5000")


def test_passwords_stay_out_of_the_outbox(tmp_path: Path) -> None:
    uri = "postgresql://me:secret@127.0.0.1:9/mlflow"
    recorder = MlflowRecorder(tmp_path / "outbox.jsonl", uri, "testbed", "study")
    assert "secret" not in recorder.outbox.read_text()


def test_a_file_that_is_no_outbox_is_named(tmp_path: Path) -> None:
    (tmp_path / "outbox.jsonl").write_text("something else\n")
    with pytest.raises(ValueError, match="outbox: expected a file that MlflowRecorder wrote"):
        MlflowRecorder(tmp_path / "outbox.jsonl", "sqlite:///mlflow.db", "testbed", "study")


def test_an_outbox_that_cannot_be_written_is_told_and_holds_nothing_up(
    recorder: MlflowRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(recorder.outbox.parent)
    record_trial(recorder, "0")
    assert recorder.lost == TRIAL_RECORDS
    assert recorder.close() == 0
    assert caplog.text.count("records for MLflow are being lost") == 1


@pytest.mark.parametrize("kind", [MlflowRecorder, SilentRecorder])
def test_both_recorders_have_the_methods_that_a_study_tells(kind: type) -> None:
    methods = [
        (name, method)
        for name, method in inspect.getmembers(StudyRecorder, inspect.isfunction)
        if not name.startswith("_") or name in ("__enter__", "__exit__")
    ]
    assert len(methods) == 14
    for name, protocol_method in methods:
        parameters = inspect.signature(getattr(kind, name)).parameters
        assert parameters.keys() == inspect.signature(protocol_method).parameters.keys()


def test_a_silent_recorder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SilentRecorder() as recorder:
        record_study(recorder, trials=1)
        recorder.artifact(Path("nothing"))
    assert recorder.lost == 0 and list(tmp_path.iterdir()) == []


def test_files_of_a_run_that_was_moved_before_they_were_delivered_arrive(
    recorder: MlflowRecorder, database: str, tmp_path: Path
) -> None:
    record_study(recorder, 1)
    (tmp_path / "run" / "figure.txt").write_text("dsv falls", encoding="utf-8")
    recorder.artifact(tmp_path / "run" / "figure.txt", "figures")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    result = deliver(tmp_path / "elsewhere" / "outbox.jsonl", database)
    assert not result.refused and (result.remaining, result.error) == (0, None)
    parent = next(run for run in runs_of(database).values() if "mlflow.parentRunId" not in run.data.tags)
    assert (tmp_path / "mlruns" / "1" / parent.info.run_id / "artifacts/figures/figure.txt").exists()
