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
# With an "@", or an address, in a parameter; with neither host nor "@"; in parameters of the path.
ODD = [
    f"{HOST}/x?token=a@{SECRET}",
    f"{HOST}?token=a@{SECRET}#b",
    f"db/x?timeout=3&password=a@b@{SECRET}",
    f"me:a@{HOST}/x?password=b@{SECRET}",
    f"me:a@{HOST}/x#b@{SECRET}",
    f"{HOST}/x#a@{SECRET}",
    f"{SECRET}#b@{HOST}",
    f"me:1a/{SECRET}?x@{HOST}",
    f"bucket/x?region=eu&endpoint_override=http://key:{SECRET}@{HOST}",
    f"bucket/x?endpoint_override=http%3A%2F%2Fkey%3A{SECRET}%40{HOST}",
    f"{HOST}/x;token={SECRET}?timeout=3",
    f"me:{SECRET}",
    f"me:{SECRET}%40{HOST}/x",
    f"{SECRET}%40{HOST}",
    f"me:{SECRET}@[::1]:9/x",
    f"[::1]:9/x?token=a@{SECRET}",
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


@pytest.mark.parametrize("place", ODD)
@pytest.mark.parametrize("scheme", ["HTTPS", "postgresql+psycopg", "s3"])
def test_an_odd_address_keeps_its_secret_where_its_host_cannot_be_told(scheme: str, place: str) -> None:
    address = f"{scheme}://{place}"
    kept = without_password(address)
    assert SECRET not in kept and hides_password(kept) and kept.startswith(f"{scheme}://")
    assert without_password(kept) == kept
    assert SECRET not in without_password_of(address, f"cannot reach {address!r}, host {SECRET}; {kept}")


def test_no_port_has_letters_behind_its_digits() -> None:
    assert without_password(f"http://me:1{SECRET}/x") == "http://me:***/x"


def test_a_secret_is_found_however_a_library_writes_it() -> None:
    address = "postgresql://me:p%C3%A4'ss%5Cw/\u00fcrd@db/x"
    for form in ("p\u00e4'ss\\w", "p%C3%A4%27ss%5Cw", "%C3%BCrd", "\u00fcrd", repr("p\u00e4'ss\\w")[1:-1]):
        assert form not in without_password_of(address, f"cannot log in with <{form}>"), form


@pytest.mark.parametrize(
    "address",
    ["http://host:5000/", "https://host/mlflow", "postgresql://db/studies?sslmode=require", "databricks",
     "sqlite:////home/me@work/a#b.db?timeout=30", "s3://bucket/place?region=eu&endpoint_override=h:1",
     "http://[::1]:5000/x", "databricks://profile:scope",
     "postgresql+psycopg://db:5432/studies", "postgresql:///studies?host=/var/run", "http://host/a:b",
     "hdfs://node:9000/x"],
)  # fmt: skip
def test_an_address_without_secrets_stays_as_it_is(address: str) -> None:
    assert without_password(address) == address and not hides_password(address)


def test_why_a_study_failed_is_kept_without_secrets(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://me:{SECRET}@{HOST}"

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot log in at {uri} with {SECRET}")

    monkeypatch.setattr("ssad_hpo.experiment.study.learn_heatmaps", fail)
    with pytest.raises(RuntimeError, match="cannot log in"):
        quick(tracking_uri=uri)
    assert files_that_hold(f"cannot log in at http://me:***@{HOST}", workplace)
    assert files_that_hold(SECRET, workplace) == []


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


@pytest.mark.parametrize("address", [f"ray://me:{SECRET}@{HOST}", f"{SECRET}@{HOST}", f"me:{SECRET}@{HOST}x"])
def test_a_ray_address_from_the_environment_is_told_without_its_secret(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match="address") as error:
        check_cluster(Cluster(address="auto"), "cpu")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["search", "digits/4", "--storage", f"postgresql+psycopg://me:pw@db:{SECRET}/x"],
        ["search", "digits/4", "--storage", f"nosuch://me:{SECRET}@{HOST}/x"],
        ["search", f"https://{SECRET}@{HOST}/images"],
        [
            "search",
            "digits/4",
            "--steps",
            "1",
            f"--weights=https://{HOST}/w?token={SECRET}",
            "--encoder",
            "resnet18",
        ],
        ["score", f"s3://key:{SECRET}@bucket/run", "."],
        ["select", f"s3://key:{SECRET}@bucket/arrays.npz"],
        ["sync", f"https://{HOST}/?X-Amz-Signature={SECRET}"],
    ],
)
def test_no_error_and_no_traceback_repeats_a_secret_of_the_command_line(
    words: list[str], call: Callable[..., Any]
) -> None:
    said = call(*words, "--debug")
    assert said.code in (1, 2) and "Traceback" in said.err and SECRET not in said.out + said.err, said.err


def test_what_is_kept_of_an_unforeseen_error_holds_no_secret(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot connect to postgresql://me:{SECRET}@{HOST}/x")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SSAD_HPO_STORAGE", f"postgresql://me:{SECRET}@{HOST}/x")
    monkeypatch.setattr("ssad_hpo.experiment.open_run", fail)
    monkeypatch.setattr("ssad_hpo.experiment.sync_run", fail)
    said = call("sync", "r")
    assert said.code == 1 and "something unforeseen" in said.err and SECRET not in said.err
    (kept,) = tmp_path.glob("ssad-hpo-*.txt")
    assert f"me:***@{HOST}" in kept.read_text() and SECRET not in kept.read_text()


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
