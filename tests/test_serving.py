"""Detectors as MLflow models: logged with a study, registered, loaded and served."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ssad_hpo.calibration import Calibration
from ssad_hpo.data import read_images
from ssad_hpo.experiment import load_detector, register_run, run_study
from ssad_hpo.serving import Served, requirements
from ssad_hpo.task import Search
from ssad_hpo.tracking import serve_command
from ssad_hpo.tracking.models import log_models
from tests.combined_runs import CLEAR, TRAINING
from tests.detectors import textures, trained
from tests.image_folders import colours


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def contents():
    return [png(colours(seed, 40, 30, channels)) for seed, channels in ((0, 1), (1, 3), (2, 1))]


@pytest.fixture
def paths(contents, tmp_path):
    found = []
    for i, content in enumerate(contents):
        found.append(tmp_path / f"{i}.png")
        found[-1].write_bytes(content)
    return found


@pytest.fixture(scope="module")
def served():
    return Served(trained(textures(24)), 16)


def test_bytes_and_base64_are_scored_as_the_files_are(served, contents, paths):
    expected = served.detector.score(read_images(paths, (32, 32), 1)[0]).numpy()
    texts = [base64.b64encode(content).decode() for content in contents]
    for column in (contents, texts):
        found = served.predict(pd.DataFrame({"image": column}, index=[7, 8, 9]))
        assert list(found.columns) == ["score"] and list(found.index) == [7, 8, 9]
        np.testing.assert_array_equal(found["score"], expected)


def test_no_images_have_no_scores(served):
    assert len(served.predict(pd.DataFrame({"image": []}))) == 0


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"picture": [b""]}, "expected a column 'image', got picture"),
        ({"image": [3]}, "image 0: expected a file's bytes, or base64, got int"),
        ({"image": ["%%%"]}, "image 0: is not base64"),
        ({"image": [b"no image"]}, "is not a PNG, JPEG, BMP, TIFF or WebP image"),
    ],
)
def test_what_cannot_be_scored_is_told_in_a_sentence(served, table, complaint):
    with pytest.raises(ValueError, match=complaint):
        served.predict(pd.DataFrame(table))


@pytest.fixture(scope="module")
def study(tmp_path_factory, empty_mlflow):
    """A run with its detector in MLflow, and MLflow's address."""
    import shutil

    place = tmp_path_factory.mktemp("served")
    shutil.copy(empty_mlflow, place / "mlflow.db")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    search = Search("cutout", n_trials=3, sampler="random", criterion="pu_auc", combine=2)
    result = run_study(CLEAR, search, TRAINING, run=place / "run", tracking_uri=uri)
    from ssad_hpo.experiment import sync_run

    assert sync_run(result.run.folder).remaining == 0
    return result.run.folder, uri


def parent_run(uri):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "ssad_hpo"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return client, parent.info.run_id


def expected_scores(folder, paths):
    return load_detector(folder).score(read_images(paths, (16, 16), 1)[0]).numpy()


# Imports what MLflow and the requirements of the model need, and nothing else; tells the scores.
_CLEAN = """
import importlib.metadata, json, re, sys
sys.path[:] = [place for place in sys.path if place not in ("", sys.argv[4])]
lines, known = open(sys.argv[1] + "/requirements.txt"), set()
wanted = [re.split("[=<>;]", line)[0].strip() for line in lines]
while wanted:
    name = re.sub("[-_.]+", "-", wanted.pop()).lower()
    if name in known:
        continue
    known.add(name)
    try:
        needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    wanted += [re.split(r"[\\s=<>;!~(\\[]", need)[0] for need in needs if "extra ==" not in need]
tops = importlib.metadata.packages_distributions()
def canonical(name): return re.sub("[-_.]+", "-", name).lower()
foreign = {top for top, owners in tops.items() if not {canonical(owner) for owner in owners} & known}
from importlib.machinery import PathFinder
class Clean(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in foreign - {"ssad_hpo"}
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path = [Clean if finder is PathFinder else finder for finder in sys.meta_path]
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
images = [open(path, "rb").read() for path in json.loads(sys.argv[2])]
scores = model.predict(pandas.DataFrame({"image": images}))["score"].tolist()
import ssad_hpo
assert ssad_hpo.__file__.startswith(sys.argv[1]), ssad_hpo.__file__
print(json.dumps([scores, sorted(foreign & set(json.loads(sys.argv[3])))]))
"""


@pytest.mark.slow
def test_the_model_of_a_study_is_loaded_with_its_requirements_alone(study, paths, tmp_path):
    folder, uri = study
    client, run_id = parent_run(uri)
    place = Path(client.download_artifacts(run_id, "model", str(tmp_path)))
    lines = (place / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in lines} == {"mlflow", *requirements("small")}
    assert all("==" in line and "+" not in line for line in lines)
    strangers = ["optuna", "ray", "timm", "skimage"]  # which ssad_hpo needs elsewhere
    words = [place, json.dumps(list(map(str, paths))), json.dumps(strangers), str(Path.cwd())]
    environment = {**os.environ, "PYTHONPATH": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", _CLEAN, *map(str, words)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    scores, refused = json.loads(ended.stdout.splitlines()[-1])
    assert refused == sorted(strangers)
    np.testing.assert_allclose(scores, expected_scores(folder, paths), rtol=1e-6)


def test_a_model_has_a_signature_and_an_example(study, tmp_path):
    from mlflow.models import Model

    client, run_id = parent_run(study[1])
    model = Model.load(client.download_artifacts(run_id, "model", str(tmp_path)))
    assert model.signature.inputs.to_dict() == [{"type": "binary", "name": "image", "required": True}]
    outputs = {column["name"]: column["type"] for column in model.signature.outputs.to_dict()}
    assert outputs == {"score": "double", "p_value": "double", "decision": "string"}
    (rate,) = model.signature.params.to_dict()
    assert (rate["name"], rate["type"]) == ("alarm_rate", "double") and 0 < rate["default"] < 1
    assert model.saved_input_example_info is not None


@pytest.mark.slow
def test_a_detector_is_registered_once_with_files_of_its_own(study, paths, monkeypatch):
    import mlflow

    folder, uri = study
    client, _ = parent_run(uri)
    for _ in range(2):
        result = register_run(folder, "screws")
        assert not result.refused and result.error is None and result.remaining == 0
    versions = client.search_model_versions("name = 'screws'")
    assert [version.version for version in versions] == [1] or [v.version for v in versions] == ["1"]
    assert "/registered-" in versions[0].source
    register_run(folder, "screws", single=True)
    assert len(client.search_model_versions("name = 'screws'")) == 2
    register_run(folder, "screws")  # back again: the latest is what was registered last
    latest = max(client.search_model_versions("name = 'screws'"), key=lambda found: int(found.version))
    assert (int(latest.version), latest.source) == (3, versions[0].source)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/screws/1")
    table = pd.DataFrame({"image": [path.read_bytes() for path in paths]})
    np.testing.assert_allclose(model.predict(table)["score"], expected_scores(folder, paths), rtol=1e-6)


def test_nothing_is_left_of_a_model_in_the_run_folder(study):
    assert not list(study[0].glob(".model-*"))


def test_a_calibrated_detector_decides(served, contents):
    detector = replace(served.detector, calibration=Calibration(torch.arange(19.0).double()))
    table = pd.DataFrame({"image": contents})
    found = Served(detector, 16).predict(table)
    scores = torch.from_numpy(found["score"].to_numpy())
    assert list(found.columns) == ["score", "p_value", "decision"]
    np.testing.assert_array_equal(found["p_value"], detector.calibration.p_values(scores).numpy())
    assert list(found["decision"]) == ["alarm" if p <= 0.05 else "good" for p in found["p_value"]]
    sure = Served(detector, 16).predict(table, {"alarm_rate": 0.99})
    assert list(sure["decision"]) == ["alarm" if p <= 0.99 else "good" for p in sure["p_value"]]
    with pytest.raises(ValueError, match="alarm_rate"):
        Served(detector, 16).predict(table, {"alarm_rate": 0.001})


def test_an_image_that_cannot_be_read_is_named_by_its_row(served, contents):
    with pytest.raises(ValueError, match=r"^image 66 "):
        served.predict(pd.DataFrame({"image": [contents[0]] * 66 + [b"none"]}))


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b"])
def test_a_registered_model_needs_a_name(study, name):
    with pytest.raises(ValueError, match="name: expected a model's name"):
        register_run(study[0], name)


def test_a_run_without_tracking_has_nowhere_to_register(tmp_path):
    run = run_study(CLEAR, Search("cutout", n_trials=1), TRAINING, run=tmp_path / "run", tracking_uri=None)
    with pytest.raises(ValueError, match="was made without tracking"):
        register_run(run.run.folder, "screws")


def test_the_command_that_serves_finds_its_programs_and_shows_no_password(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    place = Path(sys.executable).parent
    found = serve_command("http://tracking:5000", "it's")
    assert found.startswith(f'PATH={place}:"$PATH" MLFLOW_TRACKING_URI=http://tracking:5000 ')
    assert """ -m 'models:/it'"'"'s/latest' --env-manager local""" in found
    assert "secret" not in serve_command("http://me:secret@tracking:5000", "a")
    monkeypatch.setenv("PATH", f"{place}:/usr/bin")
    assert serve_command("sqlite:////m.db", "a").startswith("MLFLOW_TRACKING_URI=sqlite:////m.db ")


@pytest.mark.slow  # MLflow's server takes half a minute to start
def test_mlflow_serves_images_in_base64_over_http(study, paths, tmp_path, monkeypatch):
    folder, uri = study
    register_run(folder, "served here")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a shell that finds neither mlflow nor uvicorn
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = serve_command(uri, "served here").replace("-p 5055", f"-p {port} -h 127.0.0.1")
    environment = {**os.environ, "PYTHONPATH": ""}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            ["bash", "-c", command],
            cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        records = [{"image": base64.b64encode(path.read_bytes()).decode()} for path in paths]
        request = urllib.request.Request(
            f"{address}/invocations",
            json.dumps({"dataframe_records": records}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
        scores = [row["score"] for row in answer["predictions"]]
        np.testing.assert_allclose(scores, expected_scores(folder, paths), rtol=1e-6)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait()


def test_what_a_killed_process_left_of_a_model_goes_when_the_next_one_sends(tmp_path):
    from mlflow import MlflowClient

    (tmp_path / ".model-7jz0fwp4" / "model").mkdir(parents=True)
    (tmp_path / "artifacts").mkdir()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(log_models(client, "no run", [], tmp_path)) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["artifacts"]
