"""Detectors as MLflow models: built in the writer process, sent as artifacts, registered."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssad_hpo.files import foreign
from ssad_hpo.tracking.artifacts import Refusals, check_store, is_unreachable, own_path
from ssad_hpo.tracking.outbox import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

# As `ssad_hpo.serving` has them.
_LOADER, _SETTINGS_FILE, _COLUMN = "ssad_hpo.serving", "serving.json", "image"
_DRAFT = ".model-"


def log_models(client: MlflowClient, run_id: str, records: Sequence[Record], folder: Path) -> Refusals:
    """Send the detectors of a run folder that records name, and register those that are to be.

    One process at a time does so for a run folder.
    """
    for left in folder.glob(f"{_DRAFT}*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    for record in records:
        try:
            check_store(client, run_id)
            source = own_path(folder, record["model"])
            if not source.is_dir():
                raise ValueError("there is no such folder")
            if (reason := foreign(source)) is not None:
                raise ValueError(f"{reason}; own files alone are sent")
            with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=folder) as place:
                built = _build(source, record, Path(place))
                client.log_artifacts(run_id, str(built), record["folder"])
            if record.get("register"):
                _register(client, run_id, record["folder"], record["register"])
        except Exception as error:
            if is_unreachable(error):
                raise
            # As of other artifacts: the rest must not wait for it.
            yield record, f"{folder / record['model']}: {error}"


def _build(source: Path, record: Record, place: Path) -> Path:
    """A model in MLflow's format, with a copy of this package as its code."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from PIL import Image

    data, built, file = place / "detector", place / "model", io.BytesIO()
    shutil.copytree(source, data)
    (data / _SETTINGS_FILE).write_text(json.dumps(record["settings"]), encoding="utf-8")
    Image.new("L", (32, 32), 128).save(file, "PNG")
    outputs: list[ColSpec | TensorSpec] = [ColSpec("double", "score")]
    params: Any = None  # mypy takes MLflow's own default for wrong
    if (rate := record["settings"].get("alarm_rate")) is not None:
        outputs += [ColSpec("double", "p_value"), ColSpec("string", "decision")]
        params = ParamSchema([ParamSpec("alarm_rate", "double", rate)])
    mlflow.pyfunc.save_model(
        built,
        loader_module=_LOADER,
        data_path=str(data),
        code_paths=[str(Path(__file__).parents[1])],
        pip_requirements=[f"{name}=={_release(name)}" for name in ("mlflow", *record["requirements"])],
        signature=ModelSignature(Schema([ColSpec("binary", _COLUMN)]), Schema(outputs), params),
        input_example=pd.DataFrame({_COLUMN: [file.getvalue()]}),
    )
    return built


def _release(package: str) -> str:
    """A version as an index has it: a build for one kind of processor, as in 2.14.1+cpu, is not named."""
    return version(package).partition("+")[0]


def _register(client: MlflowClient, run_id: str, folder: str, name: str) -> None:
    """Make a version of a registered model, unless the latest one is of this very folder."""
    from mlflow.exceptions import MlflowException

    source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}'")
    latest = max(found, key=lambda known: int(known.version), default=None)
    if latest is None or latest.source != source:
        client.create_model_version(name, source, run_id)
