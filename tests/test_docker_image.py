"""docker/'s image, built by a Docker engine, and the services of compose.yaml on it: `make test-docker`.

The tests of one cluster go on where those before them stopped.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from compose_files import services, status_of
from engine import (
    IMAGE,
    Composed,
    Engine,
    build_product,
    make_context,
    make_stand_ins,
    missing,
    seconds_of,
    started,
    torch_index,
)
from servers import free_port, wait_until

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

CONFINED = [
    "--network=none",
    "--read-only",
    "--tmpfs=/tmp",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
]
UP = ("postgres", "mlflow", "head", "worker")
# Long enough to be killed in the middle, on any machine; of the default 256 pixels it would take six minutes.
SWEEP = ["sweep", "/data", "--category", "cloth", "-a", "cutdiff", "--pruner", "none", "-n", "4"]
SWEEP += ["--steps", "400", "--evaluate-at", "0.1,0.2,0.4,0.6,0.8,1", "--width", "8", "--batch-size", "8"]
SWEEP += ["--precision", "float32", "--image-size", "128", "--run", "cloth"]


class Built(NamedTuple):
    """A built image, with the folder and the index that it was built from."""

    engine: Engine
    context: Path
    index: str


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started() as engine:
        yield engine


@pytest.fixture(scope="module")
def built(engine: Engine) -> Iterator[Built]:
    seconds, _ = seconds_of(lambda: make_stand_ins(engine))
    print(f"\nstand-ins for the images of Python and PostgreSQL: {seconds:.0f} s")
    context = make_context(engine.folder / "product")
    with torch_index(context, engine.folder / "index") as index:
        seconds, _ = seconds_of(lambda: build_product(engine, context, index))
        print(f"{IMAGE}: {seconds:.0f} s")
        yield Built(engine, context, index)


@pytest.fixture(scope="module")
def composed(built: Built, make_category: Callable[[Path], Path]) -> Iterator[Composed]:
    """All services, up and healthy."""
    images = built.engine.folder / "images"
    make_category(images / "cloth")
    composed = Composed(built.engine, built.engine.folder, images, {"MLFLOW_PORT": str(free_port())})
    try:
        seconds, _ = seconds_of(lambda: bring_up(composed))
        print(f"\nall services up and healthy: {seconds:.0f} s")
        yield composed
    finally:
        composed("down", "--volumes", "--timeout=1", check=False)


def bring_up(composed: Composed) -> None:
    composed("up", "--detach")
    for service in UP:
        wait_until(lambda service=service: composed.is_healthy(service), service)


def address_of(composed: Composed) -> str:
    published = composed("port", "mlflow", "5000").strip()
    assert published.startswith("127.0.0.1:")
    return f"http://{published}"


def asked(
    composed: Composed, query: str, user: str = "optuna", database: str = "", password: str = ""
) -> str:
    """What PostgreSQL answers to a user over TCP, or why it does not."""
    words = ["psql", "--host=127.0.0.1", "--no-password", "--tuples-only", f"--username={user}"]
    words += [f"--dbname={database or user}", f"--command={query}"]
    secret = f"PGPASSWORD={password or composed.secret(f'{user}_database_password')}"
    return composed("exec", "-T", "--env", secret, "postgres", *words, check=False).strip()


# The image


def test_the_image_is_under_2_5_gb_and_holds_no_cuda_libraries(built: Built) -> None:
    inspected = built.engine.run("docker", "image", "inspect", "--format={{.Size}}", IMAGE).stdout
    history = ["docker", "history", "--format={{.Size}}\t{{.CreatedBy}}", "--no-trunc", IMAGE]
    layers = built.engine.run(*history).stdout.splitlines()
    print(f"\n{int(inspected) / 1e9:.2f} GB, of which:")
    print("\n".join(layer[:100] for layer in layers if re.match(r"[\d.]+[MG]B", layer)))
    assert int(inspected) < 2.5e9
    listed = built.engine.run("docker", "run", "--rm", *CONFINED, IMAGE, "pip", "list").stdout
    assert "torch" in listed and not re.search("nvidia|cuda-|triton", listed)


def test_a_change_of_code_builds_again_in_seconds(built: Built) -> None:
    with (built.context / "ssad_hpo" / "__init__.py").open("a") as file:
        file.write("\n# Changed.\n")
    seconds, log = seconds_of(lambda: build_product(built.engine, built.context, built.index))
    print(f"\nafter a change of code: {seconds:.0f} s")
    assert seconds < 60 and "CACHED" in log and not re.search(r"Collecting (torch|ray|mlflow)\b", log)


def test_the_image_runs_confined_and_offline_as_a_user_who_is_not_root(built: Built) -> None:
    def run(*command: str, check: bool = True) -> str:
        confined = ["docker", "run", "--rm", *CONFINED, "--volume=tried:/project", IMAGE]
        return built.engine.run(*confined, *command, check=check).stdout

    assert run("id", "-u").strip() == "1000"
    assert "Read-only file system" in run("touch", "/app/file", check=False)
    assert "CapEff:\t0000000000000000" in run("cat", "/proc/self/status")
    assert "sweep" in run("ssad-hpo", "--help")
    told = run("ssad-hpo", "demo", "-n", "2")
    assert "selected" in told
    assert "matplotlib" not in run("ssad-hpo", "report", re.findall(r"ssad-hpo report (\S+)", told)[-1])
    assert (
        "PGPASSWORD_FILE: expected a file with a password"
        in built.engine.run(
            "docker", "run", "--rm", "--env=PGPASSWORD_FILE=/nowhere", IMAGE, "id", check=False
        ).stdout
    )


# The services


def test_containers_are_confined_as_compose_yaml_says_and_no_secret_is_told(composed: Composed) -> None:
    secrets = [path.read_text() for path in (composed.folder / "secrets").iterdir()]
    for service in UP:
        for container in composed.containers(service):
            told = composed.engine.run("docker", "inspect", container).stdout
            for promise in ('"ReadonlyRootfs": true', '"Privileged": false', '"no-new-privileges:true"'):
                assert promise in told, f"{service}: {promise}"
            (memory,) = re.findall(r'"Memory": (\d+)', told)
            (processes,) = re.findall(r'"PidsLimit": (\d+)', told)
            expected = services()[service]
            assert int(memory) == int(expected["mem_limit"].removesuffix("gb")) << 30
            assert int(processes) == expected["pids_limit"]
            user = composed.engine.run("docker", "exec", container, "id", "-u").stdout.strip()
            assert user.isdecimal() and int(user) > 0
            told += composed.engine.run("docker", "top", container, "-eo", "pid,args").stdout
            told += composed.engine.run("docker", "logs", container).stdout
            assert not any(secret in told for secret in secrets), service


def test_each_service_reaches_its_own_databases_and_no_other(composed: Composed) -> None:
    owners = {
        "mlflow": "mlflow",
        "mlflow_auth": "mlflow",
        "optuna": "optuna",
        "postgres": "",
        "template1": "",
    }
    for user in ("mlflow", "optuna"):
        for database, owner in owners.items():
            told = asked(composed, "SELECT 'reached'", user, database)
            assert ("permission denied for database" in told) != (owner == user), told
            assert (told == "reached") == (owner == user)
        refused = asked(composed, "SELECT 'reached'", user, password="wrong")
        assert "password authentication failed" in refused
        assert "f" == asked(composed, f"SELECT rolsuper FROM pg_roles WHERE rolname = '{user}'", user)


def test_mlflow_answers_only_with_the_password_and_only_by_its_own_names(composed: Composed) -> None:
    address, password = address_of(composed), composed.secret("mlflow_password")
    assert [status_of(address), status_of(address, "wrong")] == [401, 401]
    assert status_of(address, password) == 200
    assert status_of(address, password, host="evil.example") == 403


def test_ray_takes_nobody_without_the_token(composed: Composed) -> None:
    def health(*options: str) -> str:
        words = ["run", "--rm", "-T", "--no-deps", *options, "--entrypoint=ray", "ssad-hpo"]
        return composed(*words, "health-check", "--address=head:6379", check=False)

    def is_refused(told: str) -> bool:
        return bool(re.search("token|Unauthenticated|UNAUTHENTICATED", told))

    assert not is_refused(health())
    assert is_refused(health("-e", f"RAY_AUTH_TOKEN={'0' * 64}"))
    assert is_refused(health("-e", "RAY_AUTH_MODE=disabled"))
    assert is_refused(health("-e", "RAY_AUTH_TOKEN_PATH=/run/secrets/missing"))


def test_a_sweep_ends_with_its_choice_in_mlflow_though_a_worker_is_killed_in_mid_trial(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sweep = threading.Thread(
        target=lambda: told.append(composed("run", "--rm", "-T", "ssad-hpo", *SWEEP, check=False))
    )
    sweep.start()
    judged = (
        "SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id) WHERE state = 'RUNNING'"
    )

    def is_under_way() -> bool:
        assert sweep.is_alive(), told
        return asked(composed, judged) not in ("", "0") and "ray::" in asked_of(victim)

    def asked_of(container: str) -> str:
        top = composed.engine.run("docker", "top", container, "-eo", "pid,args").stdout
        return top.replace("ray::IDLE", "")

    victim = composed.containers("worker")[0]
    wait_until(is_under_way, "a trial under way on the first worker")
    state = ["docker", "inspect", "--format={{.State.Pid}} {{.RestartCount}}", victim]
    process, restarts = composed.engine.run(*state).stdout.split()
    subprocess.run(["kill", "-9", process], check=True)
    print("\nworker killed with -9 while it trains")
    sweep.join(600)
    assert not sweep.is_alive() and "selected" in told[0], told
    print(told[0])
    assert int(composed.engine.run(*state).stdout.split()[1]) == int(restarts) + 1
    wait_until(lambda: composed.is_healthy("worker"), "the killed worker")
    assert asked(composed, "SELECT count(*) FROM trials WHERE state = 'COMPLETE'") == "4"

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", composed.secret("mlflow_password"))
    from mlflow import MlflowClient

    client = MlflowClient(address_of(composed))
    (experiment,) = client.search_experiments(filter_string="name = 'ssad_hpo'")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * (1 + 4)
    (study,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    dsv = {run.info.run_name: run.data.metrics["dsv"] for run in runs if run is not study}
    selected = f"trial {study.data.metrics['selected_trial']:.0f}"
    assert selected == min(dsv, key=lambda name: dsv[name])


def test_a_sweep_in_containers_is_resumed_scored_and_reported(composed: Composed) -> None:
    def run(*words: str) -> str:
        return composed("run", "--rm", "-T", "ssad-hpo", *words)

    assert "selected" in run("sweep", "--resume", "cloth", "-n", "5")
    assert asked(composed, "SELECT count(*) FROM trials WHERE state = 'COMPLETE'") == "5"
    assert "/data/cloth/test/stain/000." in run("score", "cloth", "/data/cloth/test/stain")
    assert "report in " in run("report", "cloth")
    assert composed("exec", "-T", "mlflow", "find", "/artifacts", "-name", "index.html").strip()


def test_a_cluster_that_was_taken_down_comes_back_with_its_data(composed: Composed) -> None:
    composed("down", "--timeout=10")
    bring_up(composed)
    assert asked(composed, "SELECT count(*) FROM trials WHERE state = 'COMPLETE'") == "5"
    assert status_of(address_of(composed), composed.secret("mlflow_password")) == 200
