"""A run folder from elsewhere decides neither where passwords go nor which files are sent."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended

from ssad_hpo import trust
from ssad_hpo.experiment import (
    evaluate_run,
    load_detector,
    open_run,
    report_run,
    resume_study,
    run_study,
    sync_run,
)
from ssad_hpo.files import replaced
from ssad_hpo.task import Search, Training
from ssad_hpo.tracking import MlflowRecorder
from ssad_hpo.tracking.delivery import deliver

PASSWORD = "s3cret"


class Server:
    """A server of somebody else's, that keeps what it is told."""

    def __init__(self) -> None:
        heard: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def parse_request(self) -> bool:
                if super().parse_request():
                    heard.append(str(self.headers.get("Authorization")))
                    self.send_error(404)
                return False

            def log_message(self, format: str, *args: Any) -> None: ...

        self.heard, self._server = heard, HTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def quick(run: str, **settings: Any) -> Any:
    training = Training(steps=2, batch_size=4, width=8, evaluate_at=(1.0,))
    return run_study(
        "digits/4", Search("cutavg", n_trials=1, sampler="random"), training, run=run, **settings
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was made somewhere else, without tracking."""
    return Path(quick(str(tmp_path_factory.mktemp("elsewhere") / "run"), tracking_uri=None).run.folder)


@pytest.fixture
def place(made: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of it for a user who has given no address yet, and has a password for MLflow."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return Path(shutil.copytree(made, workplace / "run"))


def name_in_settings(place: Path, **changed: Any) -> None:
    path = place / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock"
    }


def names(address: str) -> dict[str, Any]:
    """Settings that name it, by the name of the setting."""
    cluster = {"address": None, "checkpoint_path": None, "cpus_per_trial": 1.0, "gpus_per_trial": 0.0}
    return {
        "tracking_uri": {"tracking_uri": f"http://{address}"},
        "storage": {"storage": f"postgresql+psycopg://{address}/x"},
        "address": {"cluster": {**cluster, "address": address}},
        "checkpoint_path": {
            "cluster": {**cluster, "checkpoint_path": f"s3://b/c?endpoint_override={address}"}
        },
    }


COMMANDS = {
    "tracking_uri": ["search --resume", "evaluate", "report", "sync"],
    "storage": ["search --resume", "evaluate", "report", "score"],
    "address": ["sweep --resume"],
    "checkpoint_path": ["sweep --resume"],
}


@pytest.mark.parametrize(
    ("setting", "command"), [(setting, command) for setting, those in COMMANDS.items() for command in those]
)
def test_an_address_that_a_run_alone_names_is_not_contacted(
    setting: str, command: str, place: Path, server: Server, call: Callable[..., Ended]
) -> None:
    name_in_settings(place, **names(server.place)[setting])
    if command == "sync":
        MlflowRecorder(place / "outbox.jsonl", "sqlite:///x.db", "e", "s").study_tags({"a": "b"})
    before = everything_in(place)
    said = call(*command.split(), place, *(["."] if command == "score" else []))
    assert said.code == 2 and len(said.err.splitlines()) == 1, said
    assert f"names {setting} " in said.err and server.place in said.err and "--trust-addresses" in said.err
    assert everything_in(place) == before and server.heard == []


def test_what_is_vouched_for_is_contacted_and_is_known_from_then_on(
    place: Path, server: Server, call: Callable[..., Ended]
) -> None:
    name_in_settings(place, **names(server.place)["tracking_uri"])
    assert call("evaluate", place, "--trust-addresses").code == 0
    assert server.heard and set(server.heard) != {"None"}  # the password went there
    heard = len(server.heard)
    assert call("sync", place).code == 1 and len(server.heard) > heard


def test_every_command_that_contacts_takes_the_option(place: Path, call: Callable[..., Ended]) -> None:
    name_in_settings(place, **names("127.0.0.1:9")["storage"])
    for words in (["search", "--resume"], ["evaluate"], ["report"], ["score"]):
        images = ["."] if words == ["score"] else []
        said = call(*words, place, *images, "--trust-addresses")
        assert "cannot be reached, or refuses this process (" in said.err, said
        shutil.rmtree(place.parents[1] / "state")  # and forget it


@pytest.mark.parametrize(
    ("variable", "setting"), [("MLFLOW_TRACKING_URI", "tracking_uri"), ("SSAD_HPO_STORAGE", "storage")]
)
def test_an_address_from_the_environment_is_the_users_own(
    variable: str, setting: str, place: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = names(server.place)[setting].values()
    name_in_settings(place, **{setting: address})
    with pytest.raises(ValueError, match="trust_addresses=True"):
        open_run(place).check_addresses()
    monkeypatch.setenv(variable, address)
    open_run(place).check_addresses()
    monkeypatch.setenv(variable, address + "0")
    with pytest.raises(ValueError, match="trust_addresses=True"):
        open_run(place).check_addresses()


@pytest.mark.slow
def test_who_made_a_run_is_never_asked(place: Path, server: Server) -> None:
    """Nor for a copy of it, nor for another run at the same server."""
    uri = f"http://{server.place}"
    made = quick("own", tracking_uri=uri).run
    server.heard.clear()
    evaluate_run("own")
    assert server.heard
    assert sync_run("own").error
    load_detector("own")
    shutil.copytree(made.folder, "copy")
    resume_study("copy")
    name_in_settings(place, tracking_uri=uri)
    evaluate_run(place)
    name_in_settings(made.folder, tracking_uri=f"{uri}/elsewhere")
    with pytest.raises(ValueError, match=r"elsewhere.*trust_addresses=True"):
        evaluate_run("own")


def test_what_is_on_this_machine_is_never_asked_about(place: Path, workplace: Path) -> None:
    cluster = {"address": "auto", "checkpoint_path": str(workplace / "c")}
    database = f"sqlite:///{workplace}/x.db"
    name_in_settings(place, cluster=cluster, storage=database, tracking_uri=database)
    open_run(place).check_addresses()


def test_no_run_gives_ray_the_name_of_a_folder_elsewhere(place: Path) -> None:
    name_in_settings(place, study_name="../../elsewhere")
    with pytest.raises(ValueError, match="study_name: expected a name without '/'"):
        open_run(place)


def test_known_addresses_are_in_a_file_of_the_users_alone(place: Path, tmp_path: Path) -> None:
    register = tmp_path / "state" / "ssad_hpo" / "addresses"
    for address in (
        "https://mlflow",
        "https://mlflow",
        f"https://me:{PASSWORD}@mlflow",
        "https://a\nhttp://b",
    ):
        trust.remember("tracking_uri", address)
    assert register.read_text() == "tracking_uri https://mlflow\n"
    assert stat.S_IMODE(register.stat().st_mode) == 0o600
    assert stat.S_IMODE(register.parent.stat().st_mode) == 0o700
    assert trust.is_known("tracking_uri", "https://mlflow")
    assert not trust.is_known("storage", "https://mlflow")
    assert not trust.is_known("tracking_uri", "https://mlflow/")
    register.write_bytes(b"\xff")
    assert not trust.is_known("tracking_uri", "https://mlflow")


def test_without_a_place_for_known_addresses_a_study_goes_on(
    place: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "settings.json"))  # a file
    quick("own", tracking_uri=f"http://{server.place}")
    with pytest.raises(ValueError, match="trust_addresses=True"):
        evaluate_run("own")
    evaluate_run("own", trust_addresses=True)


def test_only_a_runs_own_files_are_sent(
    tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    folder = tmp_path / "run"
    secret = tmp_path / "secret.txt"
    secret.write_text(PASSWORD)
    (folder / "inner").mkdir(parents=True)
    (folder / "own.txt").write_text("mine")
    (folder / "link.txt").symlink_to(secret)
    (folder / "inner" / "link.txt").symlink_to(secret)
    (folder / "own-link.txt").symlink_to("own.txt")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recorder = MlflowRecorder(folder / "outbox.jsonl", uri, "e", "s")
    refused = [secret, folder / "link.txt", folder / ".." / "secret.txt", folder / "inner", folder / "gone"]
    for path in (folder / "own.txt", *refused, folder / "own-link.txt"):
        recorder.artifact(path)
    recorder.study_tags({"after": "all"})
    result = deliver(recorder.outbox, uri)
    assert (result.remaining, result.error) == (0, None)
    assert [reason.count("\n") for reason in result.refused] == [0] * len(refused)
    for path, reason in zip(refused, result.refused, strict=True):
        inside = path.name in ("inner", "gone")
        assert str(path) in reason and ("no such file" if inside else "own files alone are sent") in reason
    from mlflow import MlflowClient

    (run,) = MlflowClient(uri).search_runs(["1"])
    assert run.data.tags["after"] == "all"
    sent = [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]
    assert [path.name for path in sent] == ["own.txt"] and sent[0].read_text() == "mine"


def test_a_database_that_came_with_a_run_names_no_store_that_gets_passwords(
    place: Path, server: Server, empty_mlflow: Path
) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_mlflow, place / "mlflow.db")
    uri = f"sqlite:///{place}/mlflow.db"
    MlflowClient(uri).create_experiment("e", artifact_location=f"http://{server.place}/a")
    (place / "own.txt").write_text("mine")
    recorder = MlflowRecorder(place / "outbox.jsonl", uri, "e", "s")
    recorder.artifact(place / "own.txt")
    recorder.study_tags({"after": "all"})
    result = deliver(recorder.outbox, uri)
    assert (result.remaining, result.error) == (0, None)
    (reason,) = result.refused
    assert server.place in reason and "where your passwords would go" in reason
    assert server.heard == []


@pytest.mark.usefixtures("workplace")
def test_a_link_in_a_run_folder_makes_no_run_write_elsewhere(tmp_path: Path) -> None:
    quick("own", tracking_uri=None)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = Path("runs/own")
    for name in ("lock", "outbox.jsonl", "settings.json.partial", "report.html", "outbox.state.json"):
        place, there = folder / name, (folder / name).exists()
        before = place.read_bytes() if there else b""
        place.unlink(missing_ok=True)
        for target in (victim, tmp_path / "not-there"):
            place.symlink_to(target)
            for use in (evaluate_run, resume_study, sync_run, load_detector):
                with pytest.raises(ValueError, match=f"'{name}' is a link"):
                    use("own")
            place.unlink()
        if there:
            place.write_bytes(before)
    assert victim.read_text() == "precious" and not (tmp_path / "not-there").exists()
    resume_study("own")


@pytest.mark.usefixtures("workplace")
def test_a_run_with_other_files_than_its_own_is_not_used(tmp_path: Path) -> None:
    """Folders that are links, hard links, and what a process would wait at for ever."""
    folder = Path(quick("own", tracking_uri=None).run.folder)
    victim, elsewhere = tmp_path / "victim", tmp_path / "elsewhere"
    victim.write_text("precious")
    elsewhere.mkdir()
    (trial,) = (folder / "artifacts").glob("trial-*")
    cases: list[tuple[Path, Callable[[Path], object], str]] = [
        (folder / "combined", lambda place: place.symlink_to(elsewhere), "is a link"),
        (folder / "report", lambda place: place.symlink_to(elsewhere), "is a link"),
        (folder / "artifacts" / "trial-1", lambda place: place.symlink_to(elsewhere), "is a link"),
        (trial / "detector" / "more.txt", lambda place: place.symlink_to(victim), "is a link"),
        (folder / "lock", lambda place: place.hardlink_to(victim), "hard link"),
        (folder / "outbox.jsonl", lambda place: place.hardlink_to(victim), "hard link"),
        (folder / "outbox.log", os.mkfifo, "is a FIFO"),
        (folder / "outbox.lock", os.mkfifo, "is a FIFO"),
        (folder / "choice.png.partial", os.mkfifo, "is a FIFO"),
        (trial / "detector" / "patches.safetensors.partial", os.mkfifo, "is a FIFO"),
    ]
    for place, make, reason in cases:
        place.unlink(missing_ok=True)
        make(place)
        for use in (evaluate_run, resume_study, sync_run, load_detector, report_run):
            with pytest.raises(ValueError, match=f"{place.name}.* {reason}|{reason}.*{place.name}"):
                use("own")
        place.unlink()
    assert victim.read_text() == "precious" and not list(elsewhere.iterdir())
    resume_study("own")


def test_a_draft_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.partial").symlink_to("victim")
    with replaced(tmp_path / "a") as partial:
        partial.write_text("new")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()


def test_no_model_takes_along_what_a_link_in_its_folder_leads_to(
    tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    secret = tmp_path / "secret.txt"
    secret.write_text(PASSWORD)
    links: dict[str, Callable[[Path], object]] = {
        "soft": lambda place: place.symlink_to(secret),
        "hard": lambda place: place.hardlink_to(secret),
        "folder": lambda place: place.symlink_to(tmp_path),
    }
    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    recorder = MlflowRecorder(folder / "outbox.jsonl", uri, "e", "s")
    for name, make in links.items():
        (folder / name / "inner").mkdir(parents=True)
        make(folder / name / "inner" / "x")
        recorder.model(folder / name, name, [], {})
    (folder / "own.txt").hardlink_to(secret)
    recorder.artifact(folder / "own.txt")
    result = deliver(recorder.outbox, uri)
    assert (result.remaining, result.error, len(result.refused)) == (0, None, 4)
    assert all("own files alone are sent" in reason for reason in result.refused)
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("workplace")
def test_artifacts_may_lie_on_another_disk(tmp_path: Path) -> None:
    quick("own", tracking_uri=None)
    shutil.move("runs/own/artifacts", tmp_path / "elsewhere")
    Path("runs/own/artifacts").symlink_to(tmp_path / "elsewhere")
    assert load_detector("own").image_shape == (1, 32, 32)
