"""What docker/ says, read as Compose and Docker read it, so that tests can check it and run it here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from servers import LONG, ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IN_IMAGE = "/app/docker/"  # where the image has the scripts of docker/
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRETS = (
    "ray_token",
    "postgres_password",
    "mlflow_database_password",
    "optuna_database_password",
    "mlflow_password",
    "mlflow_secret_key",
)
# What Compose asks for, as docker/prepare.sh writes it.
GIVEN = {"SSAD_HPO_SECRETS": "./secrets", "SSAD_HPO_DATA": "/images"}


def read(file: str = "compose.yaml") -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / file).read_text()))


def interpolated(part: Any, values: Mapping[str, str]) -> Any:
    """A part of a compose file with ${NAME}, ${NAME:-default} and ${NAME:?sentence} filled in.

    Raises:
        ValueError: for a required variable that is missing or empty.
    """

    def fill(found: re.Match[str]) -> str:
        name, how, rest = found.groups()
        if values.get(name):
            return values[name]
        if how == "?":
            raise ValueError(f"{name}: {rest}")
        return rest or ""

    if isinstance(part, dict):
        return {key: interpolated(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [interpolated(value, values) for value in part]
    return VARIABLE.sub(fill, part) if isinstance(part, str) else part


def services(**values: str) -> dict[str, dict[str, Any]]:
    """The services of compose.yaml, with what Compose asks for and `values` filled in."""
    return dict(interpolated(read(), GIVEN | values)["services"])


def command_of(service: Mapping[str, Any], arguments: list[str] | None = None) -> list[str]:
    """What a container of this image runs: entry point, then command, or `arguments` in its place.

    Nothing for PostgreSQL, whose command is its image's.
    """
    if "command" not in service:
        return []
    entry = service.get("entrypoint") or _instruction("ENTRYPOINT")
    return [*entry, *(service["command"] if arguments is None else arguments)]


def _instruction(name: str) -> list[str]:
    (found,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(found))


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def status_of(address: str, password: str | None = None, host: str | None = None) -> int:
    """What MLflow at this address answers to a search of its experiments."""
    request = Request(f"{address}/api/2.0/mlflow/experiments/search?max_results=5")
    if password is not None:
        request.add_header("Authorization", "Basic " + b64encode(f"admin:{password}".encode()).decode())
    if host is not None:
        request.add_header("Host", host)
    try:
        with urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


class Here:
    """Runs services of compose.yaml on this machine, with their own commands and environments.

    Args:
        places: what in these stands for other hosts, ports and folders, and what to put there.
        folder: to be their working directory, for their output in `out`, and for Ray's files.
        programs: a folder of programs that may be off the PATH.
    """

    def __init__(self, folder: Path, places: Mapping[str, str], programs: Path) -> None:
        self.programs = programs
        self.folder, self.places = folder, {IN_IMAGE: f"{DOCKER}/", **places}
        self.started: list[subprocess.Popen[bytes]] = []

    def command(self, name: str, arguments: list[str] | None = None) -> list[str]:
        return self._here(command_of(services()[name], arguments))

    def environment(self, name: str) -> dict[str, str]:
        ours = ("MLFLOW_", "PG", "RAY_", "SSAD_HPO_")
        machine = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(self.programs)])
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        machine |= {"PATH": programs, "PYTHONPATH": path, "RAY_TMPDIR": str(self.folder)}
        return machine | self._here(services()[name]["environment"])

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / "out").open("ab") as out:
            process = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                cwd=self.folder,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, name: str, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """A command with the environment of a service, to its end."""
        return subprocess.run(
            command,
            env=self.environment(name) | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LONG,
        )

    def is_healthy(self, name: str) -> bool:
        how, *command = self._here(services()[name]["healthcheck"]["test"])
        assert how == "CMD"
        for process in self.started:
            assert process.poll() is None, (self.folder / "out").read_text()[-3000:]
        return self.run(name, command).returncode == 0

    def _here(self, part: Any) -> Any:
        if isinstance(part, dict):
            return {key: self._here(value) for key, value in part.items()}
        if isinstance(part, list):
            return [self._here(value) for value in part]
        for there, here in self.places.items():
            part = part.replace(there, here)
        return part
