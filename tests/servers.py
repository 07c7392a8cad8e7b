"""Servers that tests start here, in folders of their own: Ray nodes, PostgreSQL, MLflow, an object store."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ssad_hpo.files import write_private

RAY = Path(sys.executable).parent / "ray"
ROOT = Path(__file__).parents[1]


LONG = 900.0  # seconds for a command that takes a quarter of it, on a machine that is busy


def free_port() -> int:
    """Below the ports that systems hand out by themselves, so that nobody takes it before it is used."""
    for _ in range(1000):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def wait_until(condition, what: str, seconds: float = 420.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def ray_of_two_processors() -> Iterator[str]:
    """A Ray that this process has joined, and its address. Sockets need a short path."""
    import ray

    folder = tempfile.mkdtemp(prefix="r")
    token = {name: os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_TOKEN=os.urandom(16).hex(), RAY_USAGE_STATS_ENABLED="0")
    settings = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "log_to_driver": False}
    begin = partial(ray.init, "local", num_cpus=2, _temp_dir=folder, **settings)
    try:
        begin()
    except Exception:  # Ray gives a node 30 seconds to start, which a busy machine may exceed
        ray.shutdown()
        begin()
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        for name, value in token.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


class RayCluster:
    """Ray nodes of one processor each, that ask for a token.

    Args:
        folder: for Ray's files and the token; its path must be short, for sockets.
    """

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        write_private(token, os.urandom(32).hex())
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        self.nodes = [
            self._start("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
        ]
        try:
            wait_until(lambda: self._ray("health-check", f"--address={self.address}") == 0, "Ray's head")
        except BaseException:
            self.stop()
            raise

    def add_node(self) -> subprocess.Popen[bytes]:
        """Start another node, which has joined when this returns."""
        self.nodes.append(self._start(f"--address={self.address}"))
        program = f"import ray; ray.init({self.address!r}); print(sum(n['Alive'] for n in ray.nodes()))"

        def alive() -> bool:
            told = subprocess.run(
                [sys.executable, "-c", program], env=self.environment, capture_output=True, text=True
            )
            return told.stdout.strip() == str(len(self.nodes))

        wait_until(alive, "another node")
        return self.nodes[-1]

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "out").open("ab") as out:
            return subprocess.Popen(
                [RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", *arguments],
                env={**self.environment, "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=out,
                stderr=out,
            )

    def _ray(self, *arguments: str) -> int:
        return subprocess.run([RAY, *arguments], env=self.environment, capture_output=True).returncode

    def stop(self) -> None:
        for node in reversed(self.nodes):
            kill(node)  # with `--block` a node's processes end with it


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


class Postgres:
    """A PostgreSQL server on a port of its own, asking for a password.

    Args:
        binaries: where its programs are, see `find_postgres`.
        folder: to be made by this, for its files.
    """

    password = "correct horse"

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.data, self.port = binaries, folder / "data", free_port()
        # The server refuses to run as root: Debian's package brings a user for it.
        self.user = "postgres" if os.geteuid() == 0 else None
        folder.mkdir()
        (folder / "password").write_text(self.password)
        if self.user:
            for path in (folder, folder / "password"):
                shutil.chown(path, self.user)
        self._call("initdb", "-A", "scram-sha-256", "-U", "us", "--pwfile", str(folder / "password"), "-N")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data.parent}"
        self._call("pg_ctl", "-w", "-o", options, "-l", str(self.data.parent / "log"), "start")

    def crash(self) -> None:
        """Stop at once, as at a loss of power; `start` then recovers from the log."""
        self._call("pg_ctl", "-m", "immediate", "stop")

    def make_database(self, name: str) -> str:
        """The URL of a new database, with the password."""
        import psycopg

        where = f"us:{self.password.replace(' ', '%20')}@127.0.0.1:{self.port}"
        with psycopg.connect(f"postgresql://{where}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"postgresql+psycopg://{where}/{name}"

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), "-D", str(self.data), *arguments]
        done = subprocess.run(
            command, user=self.user, cwd=self.data.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert done.returncode == 0, done.stderr


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps them off the PATH."""
    here = shutil.which("initdb")
    folders = [Path(here).parent] if here else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


class MlflowServer:
    """An `mlflow server` on a port that stays the same over stops and starts.

    Args:
        folder: where it works.
        database: an empty one of MLflow's, to be copied: making its tables takes seconds.
        options, environment: more of the server's.
    """

    def __init__(self, folder: Path, database: Path, *options: str, **environment: str) -> None:
        self.port, self.folder = free_port(), folder
        self.options, self.environment = options, environment
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        shutil.copy(database, folder / "server.db")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += self.options
        frugal = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **frugal, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.answers, "MLflow's server")

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "MLflow's server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as reply:
            return bool(reply.status == 200)
        return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class ObjectStore:
    """An S3-compatible server with an empty bucket, and the environment in which it is reached."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "correct-horse",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.address,  # of MLflow's server
        }
        with (folder / "s3.log").open("wb") as log:
            program = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
            self.process = subprocess.Popen(program, stdout=log, stderr=log)
        wait_until(self._answers, "the object store")
        import boto3

        login = {key.lower(): self.environment[key] for key in list(self.environment)[:2]}
        self._client = boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", **login)
        self._client.create_bucket(Bucket="bucket")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.address, timeout=1):
            return True
        return False

    def files(self) -> list[str]:
        """What the bucket holds, folders' markers left out."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return [key for key in keys if not key.endswith("/")]
