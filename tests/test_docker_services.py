"""docker/'s services, started on this machine by their own commands: what they take, and whom they refuse."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from compose_files import DOCKER, SECRETS, Here, status_of
from servers import Postgres, find_postgres, free_port, wait_until

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    """PostgreSQL, MLflow, Ray's head and a worker, up and healthy."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="d"))
    folder.chmod(0o755)
    postgres = Postgres(binaries, folder / "postgres")
    there = prepared(folder, postgres, binaries)
    try:
        psql = ["psql", "-q", "-h127.0.0.1", f"-p{postgres.port}", "-Uus", "-vON_ERROR_STOP=1", "postgres"]
        script = folder / "databases.sql"
        made = there.run("postgres", [*psql, "-f", str(script)], PGPASSWORD=Postgres.password)
        assert made.returncode == 0, made.stderr
        assert there.is_healthy("postgres")
        there.start("mlflow")
        there.start("head")
        wait_until(lambda: there.is_healthy("head"), "Ray's head")
        there.start("worker")
        wait_until(lambda: there.is_healthy("worker"), "Ray's worker")
        wait_until(lambda: there.is_healthy("mlflow"), "MLflow")
        yield there
    finally:
        for process in reversed(there.started):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        postgres.crash()
        shutil.rmtree(folder, ignore_errors=True)


def prepared(folder: Path, postgres: Postgres, binaries: Path) -> Here:
    """The folders and secrets that the services expect, and where they are on this machine."""
    for name in ("secrets", "project", "artifacts"):
        (folder / name).mkdir()
    for name in SECRETS:
        (folder / "secrets" / name).write_text(os.urandom(32).hex())
    mlflow, head, node = free_port(), free_port(), free_port()
    database = {"@postgres/": f"@127.0.0.1:{postgres.port}/"}
    rights = (DOCKER / "mlflow_auth.ini").read_text()
    for name, address in database.items():
        rights = rights.replace(name, address)
    (folder / "mlflow_auth.ini").write_text(rights)
    script = (DOCKER / "databases.sql").read_text()
    (folder / "databases.sql").write_text(script.replace("/run/secrets", f"{folder}/secrets"))
    places = {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={mlflow}",
        "http://mlflow:5000": f"http://127.0.0.1:{mlflow}",
        "http://127.0.0.1:5000": f"http://127.0.0.1:{mlflow}",
        "head:6379": f"127.0.0.1:{head}",
        "127.0.0.1:6379": f"127.0.0.1:{head}",
        "--port=6379": f"--port={head}",
        "6380": str(node),
        "--port=5432": f"--port={postgres.port}",
        "/run/secrets": f"{folder}/secrets",
        "/app/mlflow_auth.ini": f"{folder}/mlflow_auth.ini",
        "=/artifacts": f"={folder}/artifacts",
        "/project/": f"{folder}/project/",
    }
    return Here(folder, database | places, binaries)


def test_mlflow_answers_only_with_the_password_and_only_by_its_own_names(here: Here) -> None:
    password = (here.folder / "secrets" / "mlflow_password").read_text()
    address = here.environment("ssad-hpo")["MLFLOW_TRACKING_URI"]
    assert status_of(address) == 401
    assert status_of(address, "password1234") == 401  # MLflow's own, of old
    assert status_of(address, password) == 200
    assert status_of(address, password, host="mlflow:5000") == 200
    assert status_of(address, password, host="evil.example") == 403


def test_ray_takes_nobody_without_the_token(here: Here) -> None:
    (here.folder / "wrong").write_text(os.urandom(32).hex())
    ask = ["ray", "health-check", f"--address={here.places['head:6379']}"]
    assert here.run("head", ask).returncode == 0
    assert here.run("head", ask, RAY_AUTH_TOKEN_PATH=str(here.folder / "wrong")).returncode != 0
    assert here.run("head", ask, RAY_AUTH_MODE="disabled").returncode != 0
    another = [f"--port={free_port()}" if "--port=" in part else part for part in here.command("head")]
    unsafe = here.run("head", another, RAY_AUTH_TOKEN_PATH=str(here.folder / "missing"))
    assert unsafe.returncode != 0 and "RAY_AUTH_TOKEN_PATH" in unsafe.stderr


def test_a_sweep_runs_on_the_worker_and_is_in_mlflow_and_postgresql(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    tiny = ["-n", "2", "--steps", "20", "--width", "8", "--batch-size", "4", "--pruner", "none"]
    tiny += ["--precision", "float32", "-a", "cutdiff", "--run", str(here.folder / "project" / "tiny")]
    swept = here.run("ssad-hpo", here.command("ssad-hpo", ["sweep", "gravel/cutdiff", *tiny]))
    assert swept.returncode == 0, swept.stdout + swept.stderr
    environment = here.environment("ssad-hpo")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (here.folder / "secrets" / "mlflow_password").read_text())
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'ssad_hpo'")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * (1 + 2)
    database_password = (here.folder / "secrets" / "optuna_database_password").read_text()
    monkeypatch.setenv("PGPASSWORD", database_password)
    (study,) = optuna.get_all_study_summaries(environment["STUDIES"])
    assert study.n_trials == 2
    written = "".join(path.read_text() for path in (here.folder / "project" / "tiny").glob("*.json*"))
    assert database_password not in written and os.environ["MLFLOW_TRACKING_PASSWORD"] not in written
    # The node that the sweep brought along has left again.
    count = "import ray, sys; ray.init(sys.argv[1]); print(sum(node['Alive'] for node in ray.nodes()))"

    def head_and_worker_are_left() -> bool:
        return here.run("head", ["python", "-c", count, here.places["head:6379"]]).stdout.strip() == "2"

    wait_until(head_and_worker_are_left, "the sweep's node to leave")
