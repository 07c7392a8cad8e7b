"""Passwords and tokens in addresses, wherever they stand in them, are written and shown nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers import wait_until

from ssad_hpo.address import hides_password, without_password, without_password_of
from ssad_hpo.experiment import StudyResult, open_run, run_study
from ssad_hpo.raytune import check_cluster
from ssad_hpo.raytune.checkpoints import absolute_checkpoint_path
from ssad_hpo.storage import absolute_storage, open_database
from ssad_hpo.task import Cluster, Search, Training
from ssad_hpo.tracking import MlflowRecorder, absolute_uri, sync, ui_command

pytestmark = pytest.mark.usefixtures("workplace")

HOST = "127.0.0.1:9"  # where nobody answers
SECRET = "s3cret"
PLACES = [
    f"me:{SECRET}@{HOST}",
    f"{SECRET}@{HOST}",
    f"{SECRET}:@{HOST}",
    f":{SECRET}@{HOST}",
    f"me:a/{SECRET}@{HOST}",
    f"me:a@{SECRET}@{HOST}",
    f"me:a?{SECRET}#b@{HOST}",
    f"me:a%2F{SECRET}@{HOST}",
    f"{HOST}/x?password={SECRET}",
    f"{HOST}/x?timeout=3&token={SECRET}",
    f"{HOST}/x?{SECRET}",
    f"{HOST}/x#{SECRET}",
]
every_place = pytest.mark.parametrize("place", PLACES)


def quick(**settings: Any) -> StudyResult:
    training = Training(steps=2, batch_size=4, width=8, evaluate_at=(1.0,))
    search = Search("cutavg", n_trials=1, sampler="random")
    return run_study("digits/4", search, training, run="study", **settings)


def files_that_hold(secret: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@every_place
@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", ""])
def test_whatever_may_be_a_secret_is_starred_out(scheme: str, place: str) -> None:
    address = f"{scheme}://{place}" if scheme else place
    kept = without_password(address)
    assert SECRET not in kept and hides_password(kept) and HOST in kept
    assert without_password(kept) == kept
    told = without_password_of(address, f"cannot reach {address}, port {SECRET}; {kept}")
    assert SECRET not in told and HOST in told


@pytest.mark.parametrize(
    "address",
    ["http://host:5000/", "https://host/mlflow", "postgresql://db/studies?sslmode=require", "databricks",
     "sqlite:////home/me@work/a#b.db?timeout=30", "s3://bucket/place?region=eu&endpoint_override=h:1"],
)  # fmt: skip
def test_an_address_without_secrets_stays_as_it_is(address: str) -> None:
    assert without_password(address) == address and not hides_password(address)


def test_parameters_of_sqlite_are_starred_out_too() -> None:
    assert without_password(f"sqlite:////a@b/x.db?key={SECRET}") == "sqlite:////a@b/x.db?key=***"


@pytest.mark.parametrize("place", [PLACES[4], f"{SECRET}@{HOST}/x?token={SECRET}#{SECRET}"])
def test_a_study_writes_its_tracking_servers_secrets_nowhere(
    place: str, workplace: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does `sync`, whose errors are MLflow's and tell where it could not get through."""
    uri = f"http://{place}"
    result = quick(tracking_uri=uri)
    told = sync(result.run.outbox, uri)
    assert result.undelivered and told.error
    said = capfd.readouterr()
    shown = [
        said.out,
        said.err,
        caplog.text,
        str(told),
        repr(result),
        ui_command(uri),
        str(open_run("study")),
    ]
    assert SECRET not in "".join(shown)
    assert files_that_hold(HOST, workplace) and files_that_hold(SECRET, workplace) == []


@every_place
def test_a_storage_that_cannot_be_opened_is_named_without_its_secrets(place: str, workplace: Path) -> None:
    for create in (True, False):
        with pytest.raises(ValueError, match=r"cannot be reached|expected a database") as error:
            open_database(f"postgresql+psycopg://{place}", create=create)
        assert SECRET not in str(error.value)
    kept = replace(quick(tracking_uri=None).run.settings, storage=f"postgresql://{place}")
    assert SECRET not in f"{kept} {kept.to_json()} {kept.flat()}"


@pytest.mark.parametrize(
    ("refuse", "address"),
    [
        (absolute_uri, f"file://me:{SECRET}@host/x"),
        (absolute_uri, f"sqlite:///:memory:?key={SECRET}"),
        (absolute_storage, f"sqlite:///:memory:?key={SECRET}"),
        (absolute_checkpoint_path, f"s3://key:a/{SECRET}@bucket/place"),
        (absolute_checkpoint_path, f"s3://{SECRET}@bucket/place"),
        (absolute_checkpoint_path, f"s3://bucket/place?secret_key={SECRET}"),
        (absolute_checkpoint_path, f"abfs://container:{SECRET}@account/place"),
        (lambda address: check_cluster(Cluster(address=address), "cpu"), f"ray://me:{SECRET}@host:10001"),
        (lambda address: check_cluster(Cluster(address=address), "cpu"), f"{SECRET}@host:6379"),
    ],
)
def test_what_refuses_an_address_does_not_repeat_its_secrets(refuse: Any, address: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        refuse(address)
    assert SECRET not in str(error.value)


def test_the_container_of_an_azure_address_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = SimpleNamespace(from_uri=lambda uri: (SimpleNamespace(create_dir=lambda path: None), uri))
    monkeypatch.setattr("ssad_hpo.raytune.checkpoints.FileSystem", reached)
    uri = "abfss://container@account.dfs.core.windows.net/place"
    assert absolute_checkpoint_path(uri) == uri


def test_pages_are_opened_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ui_command(f"http://me:{SECRET}@host:5000/x?token={SECRET}").endswith(" http://host:5000/x")
    command = ui_command(f"postgresql://me:{SECRET}@db/mlflow")
    assert command.endswith("mlflow ui") and 'MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI"' in command


def process_list() -> bytes:
    listed = b""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            listed += process.read_bytes()
    return listed


def test_the_process_list_shows_no_secret_while_a_study_is_delivered(tmp_path: Path) -> None:
    recorder = MlflowRecorder(tmp_path / "outbox.jsonl", f"http://me:{SECRET}@{HOST}", "e", "s")
    with recorder:
        recorder.study_started({"n_trials": 1}, {})
        seen: list[bytes] = []

        def the_writer_is_listed() -> bool:  # not yet in the moment in which it starts
            seen.append(process_list())
            return str(recorder.outbox).encode() in seen[-1]

        wait_until(the_writer_is_listed, "the process that delivers", 60)
    assert SECRET.encode() not in b"".join(seen)


def test_a_first_storage_comes_from_the_environment(
    call: Callable[..., Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["search", "digits/4", "-n", "1", "--steps", "2", "--no-tracking", "--evaluate-at", "1"]
    monkeypatch.setenv("SSAD_HPO_STORAGE", f"postgresql+psycopg://me:{SECRET}@{HOST}/studies")
    refused = call(*words)
    assert refused.code == 2 and f"me:***@{HOST}/studies" in refused.err and SECRET not in refused.err
    monkeypatch.setenv("SSAD_HPO_STORAGE", f"sqlite:///{workplace}/optuna.db")
    assert call(*words, "--run", "r").code == 0
    assert open_run("r").settings.storage == f"sqlite:///{workplace}/optuna.db"


@pytest.mark.parametrize(
    ("option", "variable"), [("--storage", "SSAD_HPO_STORAGE"), ("--tracking-uri", "MLFLOW_TRACKING_URI")]
)
def test_a_secret_on_the_command_line_is_told_to_be_seen_by_all(
    option: str, variable: str, call: Callable[..., Any]
) -> None:
    told = call("search", "digits/4", option, f"postgresql://me:{SECRET}@{HOST}/x", "--threads", "0").err
    assert f"{option}: all users of this machine see its password; set {variable} instead" in told
    assert SECRET not in told
