"""docker/: that what it names exists, that nothing is open or has a known password, and that it runs.

No Docker engine is needed: images are not built here. What the containers would run is run on this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from compose_files import (
    DOCKER,
    DOCKERFILE,
    GIVEN,
    IN_IMAGE,
    SECRETS,
    VARIABLE,
    command_of,
    copied,
    interpolated,
    read,
    services,
)
from servers import ROOT

# What is open, and to whom


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("value", [None, ""])
def test_compose_refuses_to_start_without_what_it_needs(name: str, value: str | None) -> None:
    given = {key: other for key, other in GIVEN.items() if key != name} | (
        {} if value is None else {name: value}
    )
    with pytest.raises(ValueError, match=rf"{name}: run docker/prepare\.sh"):
        interpolated(read(), given)


def test_every_port_is_bound_to_127_0_0_1_unless_changed() -> None:
    def ports(**values: str) -> dict[str, list[str]]:
        return {name: service["ports"] for name, service in services(**values).items() if "ports" in service}

    assert ports() == {"mlflow": ["127.0.0.1:5000:5000"]}
    assert ports(SSAD_HPO_BIND="0.0.0.0", MLFLOW_PORT="80") == {"mlflow": ["0.0.0.0:80:5000"]}
    assert not any("network_mode" in service for service in services().values())


def test_no_password_is_written_down_and_every_secret_is_a_file_of_the_users() -> None:
    for name, service in services().items():
        for key, value in service["environment"].items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY", key):
                assert value.startswith("/run/secrets/"), f"{name}: {key}"
                assert value.removeprefix("/run/secrets/") in service["secrets"], f"{name}: {key}"
    files = {name: secret["file"] for name, secret in interpolated(read(), GIVEN)["secrets"].items()}
    assert files == {name: f"./secrets/{name}" for name in SECRETS}
    for file in DOCKER.rglob("*"):
        if file.is_file() and "secrets" not in file.parts:
            assert not re.search(r"://[^/@\s]*:[^/@\s]+@", file.read_text()), f"{file}: a URL with a password"


def test_every_node_and_driver_of_ray_asks_for_the_token() -> None:
    nodes = [
        name
        for name, service in services().items()
        if re.search(r"\bray\b|ssad-hpo\.sh", str(command_of(service)))
    ]
    assert nodes == ["head", "worker", "ssad-hpo"]
    for name in nodes:
        environment = services()[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_whatever_others_wait_for_has_a_health_check_and_is_waited_for_until_healthy() -> None:
    running = services()
    for name, service in running.items():
        assert "profiles" in service or "healthcheck" in service, name
        for other, how in service.get("depends_on", {}).items():
            assert "healthcheck" in running[other] and how == {"condition": "service_healthy"}, (name, other)


def test_the_images_user_is_not_root_and_can_gain_nothing() -> None:
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    (number,) = re.findall(r"^ARG UID=(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user == "$UID" and int(number) > 0
    for service in services().values():
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert services()["postgres"]["user"] == "postgres"


def test_every_service_has_limits_and_a_root_that_is_not_written_to() -> None:
    for name, service in services().items():
        assert service["read_only"] is True and "/tmp" in service["tmpfs"], name
        assert re.fullmatch(r"\d+gb", service["mem_limit"]) and service["pids_limit"] > 0, name
    changed = services(SSAD_HPO_MEMORY="3gb")
    assert changed["worker"]["mem_limit"] == changed["ssad-hpo"]["mem_limit"] == "3gb"


def test_each_service_has_a_user_of_the_database_with_a_password_of_his_own() -> None:
    addresses = {
        "mlflow": [*services()["mlflow"]["command"], (DOCKER / "mlflow_auth.ini").read_text()],
        "optuna": [services()["ssad-hpo"]["environment"]["STUDIES"]],
    }
    script = (DOCKER / "databases.sql").read_text()
    for user, texts in addresses.items():
        named = re.findall(r"postgresql\+psycopg://(\w*)@postgres/(\w+)", " ".join(texts))
        assert named and {who for who, _ in named} == {user}
        for _, database in named:
            assert f"CREATE DATABASE {database} OWNER {user};" in script
        assert f"/run/secrets/{user}_database_password`" in script
    for name in ("mlflow", "ssad-hpo"):
        assert "postgres_password" not in services()[name]["secrets"]


# What is named


def test_every_file_that_compose_or_the_dockerfile_names_exists() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", ()):
            source = volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file(), f"{name}: {source}"
            elif "/" not in source:
                assert source in read()["volumes"], f"{name}: {source}"
        if build := service.get("build"):
            context = (DOCKER / build["context"]).resolve()
            assert context == ROOT and (context / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
            for program in command_of(service):
                if program.startswith(IN_IMAGE):
                    path = program.removeprefix("/app/")
                    assert path in copied() and os.access(ROOT / path, os.X_OK), f"{name}: {program}"
    assert read("compose.cuda.yaml")["services"].keys() <= services().keys()
    assert copied() and all((ROOT / source).exists() for source in copied())


def test_the_image_is_built_from_what_it_copies_and_from_nothing_else() -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if not rule.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied())


def test_build_arguments_exist_and_default_to_pytorch_for_processors() -> None:
    declared = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert declared["TORCH_BUILD"] == "cpu"
    for service in services().values():
        if "build" in service:
            assert service["build"]["args"] | {"BASE": declared["BASE"]} == declared
    changed = services(TORCH_BUILD="cu130")["worker"]["build"]["args"]
    assert changed["TORCH_BUILD"] == "cu130"


def test_versions_are_pinned_and_a_change_of_code_installs_no_dependency_again() -> None:
    images = [service["image"] for service in services().values()]
    images += re.findall(r"^ARG BASE=(\S+)\nFROM \$BASE$", DOCKERFILE, re.M)
    foreign = [image for image in images if image != "ssad-hpo:local"]
    pinned_image = r"\w+:\d+\.\d+[.\w-]*@sha256:[0-9a-f]{64}"
    assert len(foreign) == 2 and all(re.fullmatch(pinned_image, image) for image in foreign)
    assert len(re.findall("^FROM ", DOCKERFILE, re.M)) == 1
    steps = re.findall(r"^(?:RUN|COPY) (?:.*\\\n)*.*$", DOCKERFILE, re.MULTILINE)
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == 3
    code = next(i for i, step in enumerate(steps) if step.startswith("COPY ssad_hpo "))
    for step in installs:
        pinned = "-c constraints.txt" in step and steps.index(step) < code
        assert pinned or "pip install --no-deps ." in step, step


def test_the_lock_file_holds_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"] + [
        one for extra in project["optional-dependencies"].values() for one in extra
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    pinned = {name.replace("_", "-") for name in pins}
    names = {re.match(r"[\w.-]+", one)[0].replace("_", "-") for one in direct}  # type: ignore[index]
    assert names - {"ssad-hpo"} <= pinned


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., set[str]]:
    """The options of a program, by its own help: what pip put into the PATH, run in this process."""

    def run(name: str, *command: str) -> set[str]:
        (program,) = set(entry_points(group="console_scripts", name=name))  # packages may share one
        monkeypatch.setattr(sys, "argv", [name, *command, "--help"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            program.load()()
        assert ended.value.code == 0
        return options_in(capsys.readouterr().out)

    monkeypatch.setenv("COLUMNS", "200")
    return run


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_every_option_that_a_service_uses_is_known_to_its_program(
    help_of: Callable[..., set[str]],
) -> None:
    head, worker, mlflow = (services()[name]["command"] for name in ("head", "worker", "mlflow"))
    assert head[:2] == worker[:2] == ["ray", "start"] and mlflow[:2] == ["mlflow", "server"]
    node, sweep = re.findall(
        r"ray start (?:.*\\\n)*.*|^ssad-hpo sweep .*", (DOCKER / "ssad-hpo.sh").read_text(), re.M
    )
    assert options_in(f"{' '.join(head + worker)} {node}") <= help_of("ray", "start")
    assert options_in(" ".join(services()["head"]["healthcheck"]["test"])) <= help_of("ray", "health-check")
    assert options_in(" ".join(mlflow)) <= help_of("mlflow", "server")
    assert options_in(sweep) | {"--storage", "--resume"} <= help_of("ssad-hpo", "sweep")


def test_the_example_of_env_names_all_variables_and_gives_no_value() -> None:
    lines = (DOCKER / ".env.example").read_text().splitlines()
    names = [line.partition("=") for line in lines if line and not line.startswith("#")]
    assert [value for *_, value in names if value] == []
    used = {name for name, *_ in VARIABLE.findall((DOCKER / "compose.yaml").read_text())}
    assert {name for name, *_ in names} == used


# The scripts


@pytest.fixture
def copy_of_docker(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(".env", "secrets")
    return Path(shutil.copytree(DOCKER, tmp_path / "docker", ignore=ignored))


def test_prepare_makes_what_compose_asks_for_once(copy_of_docker: Path, tmp_path: Path) -> None:
    images = tmp_path / "my images"
    images.mkdir()

    def prepare() -> dict[str, str]:
        subprocess.run([copy_of_docker / "prepare.sh", images], check=True, stdout=subprocess.DEVNULL)
        return {path.name: path.read_text() for path in (copy_of_docker / "secrets").iterdir()}

    (copy_of_docker / "secrets").mkdir()  # open to all, as another program may have made it
    made = prepare()
    assert set(made) == set(SECRETS) and len(set(made.values())) == len(SECRETS)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())
    assert stat.S_IMODE((copy_of_docker / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (copy_of_docker / "secrets").iterdir()} == {0o644}
    lines = (copy_of_docker / ".env").read_text().splitlines()
    assert lines == ["SSAD_HPO_SECRETS=./secrets", f"SSAD_HPO_DATA='{images}'"]
    assert prepare() == made
    assert (copy_of_docker / ".env").read_text().splitlines() == lines


def test_prepare_refuses_a_folder_that_is_not_there(copy_of_docker: Path) -> None:
    told = subprocess.run([copy_of_docker / "prepare.sh", "nowhere"], capture_output=True, text=True)
    assert told.returncode == 2 and "the folder with your images" in told.stderr
    assert not (copy_of_docker / ".env").exists()


def test_the_entry_point_hands_on_what_secret_files_hold(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("correct 'horse' $HOME\n")
    program = [DOCKER / "entrypoint.sh", "printenv", "PGPASSWORD"]
    told = subprocess.run(
        program, env={**os.environ, "PGPASSWORD_FILE": str(secret)}, capture_output=True, text=True
    )
    assert told.stdout == "correct 'horse' $HOME\n"


@pytest.mark.parametrize("what", ["missing", "empty", "folder"])
def test_the_entry_point_starts_nothing_without_the_password_that_is_asked_for(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()  # what some versions of Compose make of a file that is not there
    for name in read()["services"]["mlflow"]["environment"]:
        if name.endswith("_FILE"):
            told = subprocess.run(
                [DOCKER / "entrypoint.sh", "echo", "started"],
                env={**os.environ, name: str(tmp_path / what)},
                capture_output=True,
                text=True,
            )
            assert told.returncode == 1 and told.stdout == ""
            assert f"{name}: expected a file with a password, got {tmp_path / what}" in told.stderr
