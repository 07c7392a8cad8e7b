"""Where MLflow keeps its runs: tracking URIs, and the command that shows them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ssad_hpo.address import hides_password, without_password
from ssad_hpo.files import at_home

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI where it is set, else `mlflow.db` in the working directory; absolute."""
    return absolute_uri(os.environ.get(URI_VARIABLE) or "sqlite:///mlflow.db")


def default_experiment() -> str:
    """The experiment that the user has chosen for MLflow, by its environment or `mlflow.set_experiment`.

    Returns its name, "#ID" where it was chosen by its ID, or "ssad_hpo".
    """
    if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        return name
    identity = os.environ.get("MLFLOW_EXPERIMENT_ID")  # `set_experiment` sets it
    return f"#{identity}" if identity else "ssad_hpo"


def absolute_uri(tracking_uri: str) -> str:
    """The tracking URI, an SQLite file's path made absolute.

    Raises:
        ValueError: for a folder (MLflow 3.17 refuses file stores) and for a database in memory.
    """
    scheme = urlsplit(tracking_uri).scheme
    if scheme == "file" or (not scheme and tracking_uri != "databricks"):
        raise ValueError(
            "tracking_uri: expected sqlite:///FILE, a database's URL or a server's http(s) address, got "
            f"{without_password(tracking_uri)!r}: MLflow no longer writes to folders, use "
            "sqlite:///mlflow.db instead (`mlflow migrate-filestore` takes old runs along)"
        )
    if scheme != "sqlite":
        return tracking_uri
    path, mark, options = tracking_uri.removeprefix("sqlite:///").partition("?")
    if path in ("", ":memory:", tracking_uri):
        raise ValueError(f"tracking_uri: expected sqlite:///FILE, got {without_password(tracking_uri)!r}")
    return f"{sqlite_uri(at_home(unquote(path)).absolute())}{mark}{options}"


def sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of an absolute SQLite URI; None for anything else."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0]))


def sqlite_uri(database: Path) -> str:
    """The URI of an absolute path, quoted as little as SQLAlchemy (from 2.1 on) needs to read it back."""
    path = str(database).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return f"sqlite:///{path}"


def ui_address(tracking_uri: str, place: str = "") -> str:
    """The address of a place in MLflow's pages: of its server, or of what `ui_command` starts."""
    if not tracking_uri.startswith(("http://", "https://")):
        return f"http://127.0.0.1:5000/{place}"
    return f"{_page(without_password(tracking_uri)).rstrip('/')}/{place}"


def _page(server: str) -> str:
    return re.sub(r"(?<=://)[^@]*@|[?#].*", "", server)


def ui_command(tracking_uri: str, place: str = "") -> str:
    """The shell command that opens MLflow's pages on a tracking URI; at a server, at a place in them.

    It holds no password: a browser asks for it, and a database's address is taken from MLFLOW_TRACKING_URI.
    """
    tracking_uri = without_password(absolute_uri(tracking_uri))
    if tracking_uri.startswith(("http://", "https://")):
        page = ui_address(tracking_uri, place) if place else _page(tracking_uri)
        return f"python -m webbrowser {shlex.quote(page)}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{shlex.quote(sys.executable)} -m mlflow"
    if hides_password(tracking_uri):
        # By the environment: an option would be seen in the process list.
        return f'MLFLOW_DISABLE_TELEMETRY=true MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI" {mlflow} ui'
    return f"MLFLOW_DISABLE_TELEMETRY=true {mlflow} ui --backend-store-uri {shlex.quote(tracking_uri)}"


def serve_command(tracking_uri: str, name: str) -> str:
    """The shell command that serves the latest version of a registered model over HTTP.

    MLflow starts uvicorn by its name alone, so a shell that does not find it gets this Python's folder first.
    No password is in it: such an address is taken from MLFLOW_TRACKING_URI.
    """
    shown = without_password(absolute_uri(tracking_uri))
    settings = [] if hides_password(shown) else [f"MLFLOW_TRACKING_URI={shlex.quote(shown)}"]
    if not shutil.which("uvicorn"):
        settings.insert(0, f'PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    settings.append("MLFLOW_DISABLE_TELEMETRY=true")
    words = ["mlflow", "models", "serve", "-m", shlex.quote(f"models:/{name}/latest")]
    return " ".join([*settings, *words, "--env-manager local -p 5055"])
