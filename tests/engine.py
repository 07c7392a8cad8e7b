"""A Docker engine for tests: Debian's, with folders of its own, and stand-ins for what it cannot pull.

No registry is asked. Debian's packages stand in for the images of Python and PostgreSQL; where PyTorch's own
index cannot be reached, a build for processors that pip finds elsewhere stands in for the pinned one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml
from compose_files import DOCKER, copied, interpolated, read
from servers import ROOT, free_port, wait_until

IMAGE = "ssad-hpo:local"
PACKAGES = {
    "dockerd": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
}
TORCH_INDEX = "https://download.pytorch.org/whl"
# Builds for processors that fit each other, the newest that are kept outside PyTorch's index.
STAND_IN = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
# No cache of packages stays in a layer.
INSTALL = """RUN apt-get -q update && apt-get -q install -y --no-install-recommends {} \\
 && rm -rf /var/lib/apt/lists/*"""
# As in Docker's own image: `python` and `pip`, outside any environment. pip has this machine's certificates.
PYTHON = f"""FROM stand-in/debian
{INSTALL.format("python3-pip")}
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python
COPY ca-certificates.crt /etc/ssl/certs/
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt
"""
# As in Docker's own image: folders with their modes, and what compose.yaml relies on of the entry point.
POSTGRES = f"""FROM stand-in/debian
{INSTALL.format("postgresql")}
RUN ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ && rm -rf /var/lib/postgresql/* \\
 && mkdir /docker-entrypoint-initdb.d \\
 && install -d -o postgres -g postgres -m 1777 /var/lib/postgresql/data \\
 && install -d -o postgres -g postgres -m 3777 /var/run/postgresql
ENV PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
VOLUME /var/lib/postgresql/data
COPY entrypoint.sh /
ENTRYPOINT ["sh", "/entrypoint.sh"]
"""
POSTGRES_ENTRY = """set -eu
if ! [ -s "$PGDATA/PG_VERSION" ]; then
  initdb --username=postgres --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust --auth-host=scram-sha-256
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  pg_ctl --wait --options="-c listen_addresses=''" start
  for file in /docker-entrypoint-initdb.d/*.sql; do
    psql --set=ON_ERROR_STOP=1 --no-psqlrc --username=postgres --file="$file"
  done
  pg_ctl --wait --mode=fast stop
fi
exec postgres -c listen_addresses='*'
"""


def missing() -> str | None:
    """Why no engine can be started here, in a sentence."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "needs Linux and root, to start a Docker engine of its own"
    lacking = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return f"needs Debian's packages: apt-get install {' '.join(lacking)}" if lacking else None


class Engine:
    """Debian's Docker engine on a socket in `folder`, beside any other; it changes no rule of the network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Debian's docker comes first: its BuildKit needs no plugin.
        path = os.pathsep.join(["/usr/bin", os.environ["PATH"]])
        others = ("DOCKER_", "COMPOSE_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(others)},
            "PATH": path,
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_BUILDKIT": "1",
            "DOCKER_CONFIG": str(folder / "config"),
        }
        options = ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
        options += [f"--{name}={folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                # Its mounts end with it.
                ["unshare", "--mount", "dockerd", f"--host=unix://{folder}/socket", *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Whether it is there.

        Raises:
            RuntimeError: if it has ended.
        """
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "log").read_text()[-2000:])
        return self.run("docker", "version", check=False).returncode == 0

    def run(
        self, *command: str | Path, check: bool = True, seconds: float = 900.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command that talks to this engine, to its end; what it wrote is in `stdout`, errors too."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            **options,
        )
        assert done.returncode == 0 or not check, f"{' '.join(map(str, command))}:\n{done.stdout[-6000:]}"
        return done

    def build(self, tag: str, context: Path, *options: str | Path) -> str:
        """An image by BuildKit in the network of this machine, and what that wrote."""
        told = self.run(
            "docker", "build", "--progress=plain", "--network=host", f"--tag={tag}", *options, context
        )
        return told.stdout

    def stop(self) -> None:
        containers = self.run("docker", "ps", "--all", "--quiet", check=False).stdout.split()
        if containers:
            self.run("docker", "rm", "--force", *containers, check=False)
        self.run("docker", "network", "prune", "--force", check=False)
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def started() -> Iterator[Engine]:
    """An engine, which leaves nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="engine"))
    engine = Engine(folder)
    try:
        wait_until(engine.answers, "the Docker engine", 60)
        yield engine
    finally:
        engine.stop()
        shutil.rmtree(folder, ignore_errors=True)


def make_stand_ins(engine: Engine) -> None:
    """Images stand-in/python and stand-in/postgres, of Debian's packages by the mirror that apt is set to."""
    root, context = engine.folder / "debian", engine.folder / "context"
    engine.run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root)
    archive = engine.folder / "debian.tar"
    engine.run("tar", "--create", f"--file={archive}", f"--directory={root}", ".")
    engine.run("docker", "import", archive, "stand-in/debian")
    archive.unlink()
    shutil.rmtree(root)
    for name, text in {"python": PYTHON, "postgres": POSTGRES}.items():
        context.mkdir()
        (context / "Dockerfile").write_text(text)
        (context / "entrypoint.sh").write_text(POSTGRES_ENTRY)
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", context)
        engine.build(f"stand-in/{name}", context)
        shutil.rmtree(context)


def make_context(place: Path) -> Path:
    """A copy of what docker/Dockerfile copies, to build from."""
    for name in (*copied(), "docker/Dockerfile", "docker/Dockerfile.dockerignore"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    return place


@contextmanager
def torch_index(context: Path, folder: Path) -> Iterator[str]:
    """PyTorch's index; or one here with `STAND_IN`, which constraints.txt in the context then names.

    Raises:
        RuntimeError: if pip finds no such build either.
    """
    try:
        urlopen(f"{TORCH_INDEX}/cpu/torch/", timeout=10).close()
    except (URLError, TimeoutError):
        pass
    else:
        yield TORCH_INDEX
        return
    constraints = context / "constraints.txt"
    text = constraints.read_text()
    for name, version in STAND_IN.items():
        pages = folder / "cpu" / name
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={pages}"]
        found = subprocess.run([*pip, f"{name}=={version}"], capture_output=True, text=True)
        if found.returncode != 0:
            raise RuntimeError(f"{TORCH_INDEX} is out of reach, and pip finds no {name}=={version}")
        text = re.sub(rf"^{name}==.*$", f"{name}=={version}", text, flags=re.MULTILINE)
    constraints.write_text(text)
    port = free_port()
    server = [sys.executable, "-m", "http.server", f"--directory={folder}", "--bind=127.0.0.1", str(port)]
    process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def build_product(engine: Engine, context: Path, index: str) -> str:
    """The image, as compose.yaml says but for its base; and what the build wrote."""
    how = interpolated(read()["x-ssad-hpo"]["build"], {"TORCH_INDEX": index})
    arguments = [f"--build-arg={name}={value}" for name, value in how["args"].items()]
    arguments.append("--build-arg=BASE=stand-in/python")
    return engine.build(IMAGE, context, f"--file={context / how['dockerfile']}", *arguments)


class Composed:
    """docker/ in a copy, for an engine and Debian's Compose.

    Debian's is older than compose.yaml: the name and `create_host_path` are new to it.

    Args:
        values: for docker/.env, beside what prepare.sh writes.
    """

    def __init__(self, engine: Engine, folder: Path, images: Path, values: Mapping[str, str]) -> None:
        ignored = shutil.ignore_patterns(".env", "secrets")
        self.engine = engine
        self.folder = Path(shutil.copytree(DOCKER, folder / "docker", ignore=ignored))
        engine.run("sh", self.folder / "prepare.sh", images)
        with (self.folder / ".env").open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())
        whole = read()
        self.project = whole.pop("name")
        whole["services"]["postgres"]["image"] = "stand-in/postgres"
        for service in whole["services"].values():
            service.pop("build", None)
            for volume in service.get("volumes", ()):
                if isinstance(volume, dict):
                    del volume["bind"]
        (self.folder / "compose.yaml").write_text(yaml.safe_dump(whole))

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """What a command of Compose wrote."""
        command = ["docker-compose", f"--project-name={self.project}", "--ansi=never", *arguments]
        return self.engine.run(*command, check=check, cwd=self.folder).stdout

    def containers(self, service: str) -> list[str]:
        return self("ps", "--quiet", service).split()

    def is_healthy(self, service: str) -> bool:
        """Whether every container of a service is, as Compose's `up --wait` waits for."""
        how = ["docker", "inspect", "--format={{.State.Health.Status}}", *self.containers(service)]
        return set(self.engine.run(*how).stdout.split()) == {"healthy"}

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text()


def seconds_of(action: Any) -> tuple[float, Any]:
    """How long a call took, and what it returned."""
    begin = time.monotonic()
    done = action()
    return time.monotonic() - begin, done
