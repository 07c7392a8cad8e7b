"""What MLflow shows of a study without a click: the view, the note, the images; in a real browser at that."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import LONG, MlflowServer
from starting import start_study
from told import client_of

from ssad_hpo.data import Source
from ssad_hpo.experiment import StudyResult, evaluate_run
from ssad_hpo.task import Training
from ssad_hpo.tracking import MlflowRecorder, study_page, ui_address
from ssad_hpo.tracking.delivery import deliver
from ssad_hpo.tracking.view import TRIALS_VIEW, VIEW

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TINY = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 1.0))
SMALL = Source("controlled", {"image_size": 16, "n_train": 24, "n_unlabeled": 14, "n_held_out": 12})
A_PIXEL = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def database(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def told(folder: Path, database: str, study_name: str, title: str | None = None) -> MlflowRecorder:
    """A recorder with one short study in its outbox, which is delivered."""
    recorder = MlflowRecorder(
        folder / "outbox.jsonl", database, "testbed", study_name, title=title, word="start"
    )
    dataset = {"name": "gravel", "digest": "d" * 32, "source_type": "code", "source": "{}"}
    recorder.study_started({}, {}, dataset)
    recorder.trial_started("0", {}, {})
    recorder.study_note("**chosen** ![picture](artifact:report/choice.png)")
    assert deliver(recorder.outbox, database).refused == ()
    return recorder


def experiment_of(database: str) -> Any:
    return client_of(database).get_experiment_by_name("testbed")


def runs_by_name(database: str) -> dict[str, Any]:
    runs = client_of(database).search_runs([experiment_of(database).experiment_id])
    return {run.info.run_name: run for run in runs}


def test_an_experiment_has_a_view_of_the_figures_of_its_studies(tmp_path: Path, database: str) -> None:
    recorder = told(tmp_path / "run", database, "gravel-0a1b2c3d")
    tags = experiment_of(database).tags
    view, trials = (
        json.loads(
            zlib.decompress(base64.b64decode(tags[f"mlflow.sharedViewState.{key}"].removeprefix("deflate;")))
        )
        for key in (VIEW, TRIALS_VIEW)
    )
    for name in ("auc_selected", "auc_combined", "auc_random", "auc_oracle", "regret"):
        assert f"metrics.`{name}`" in view["selectedColumns"]
    for kept in (view, trials):
        sections = {section["uuid"] for section in kept["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in kept["compareRunCharts"]} == sections
        assert len({chart["uuid"] for chart in kept["compareRunCharts"]}) == len(kept["compareRunCharts"])
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    place = study_page(recorder.outbox)
    assert place == f"#/experiments/{experiment_of(database).experiment_id}/runs?viewStateShareKey={VIEW}"
    assert place in tags["mlflow.note.content"]
    assert ui_address("http://me:secret@host:5000", place) == f"http://host:5000/{place}"
    assert ui_address(database, place) == f"http://127.0.0.1:5000/{place}"


def test_what_a_user_has_written_about_an_experiment_stays(tmp_path: Path, database: str) -> None:
    client = client_of(database)
    identity = client.create_experiment("testbed", tags={"mlflow.note.content": "mine"})
    told(tmp_path / "run", database, "gravel-0a1b2c3d")
    tags = client.get_experiment(identity).tags
    assert tags["mlflow.note.content"] == "mine" and "mlflow.experimentKind" not in tags
    assert f"mlflow.sharedViewState.{VIEW}" in tags


def test_names_are_without_hashes_where_they_are_unique(tmp_path: Path, database: str) -> None:
    told(tmp_path / "one", database, "gravel-0a1b2c3d", "gravel")
    told(tmp_path / "two", database, "gravel-4e5f6a7b", "gravel")
    told(tmp_path / "three", database, 'it\'s "odd"-4e5f6a7b', 'it\'s "odd"')
    names = [run.info.run_name for run in client_of(database).search_runs(["1"])]
    assert sorted(names) == ["gravel", "gravel-4e5f6a7b", 'it\'s "odd"-4e5f6a7b', *["start 0"] * 3]


def test_a_note_shows_pictures_of_its_own_run_and_images_are_one_input(tmp_path: Path, database: str) -> None:
    recorder = told(tmp_path / "run", database, "gravel")
    recorder.outbox.with_suffix(".state.json").unlink()
    deliver(recorder.outbox, database)  # all of it again
    run = runs_by_name(database)["gravel"]
    address = f"get-artifact?path=report/choice.png&run_uuid={run.info.run_id}"
    assert run.data.tags["mlflow.note.content"] == f"**chosen** ![picture]({address})"
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("gravel", "d" * 32)


# In a browser


@dataclass(frozen=True)
class Shown:
    """A study that MLflow's server has, and a browser that has never been there."""

    server: MlflowServer
    result: StudyResult
    place: Path

    @property
    def view(self) -> str:
        return ui_address(self.server.uri, study_page(self.result.run.outbox) or "")

    def page(self, address: str, picture: str | None = None) -> str:
        """The page as it is after its programs have run; as a picture, too."""
        assert CHROMIUM is not None
        profile = self.place / f"profile-{len(list(self.place.iterdir()))}"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]
        options += ["--window-size=1500,820", f"--user-data-dir={profile}", "--virtual-time-budget=30000"]
        wanted = [] if picture is None else [f"--screenshot={self.place / picture}"]
        command = [CHROMIUM, *options, *(wanted or ["--dump-dom"]), address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
        return html.unescape(re.sub(r"<(style|script).*?</\1>", "", ended.stdout, flags=re.DOTALL))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Shown]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium, which shows MLflow's pages")
    place = tmp_path_factory.mktemp("shown")
    server = MlflowServer(place, empty_mlflow)
    server.start()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SSAD_HPO_CACHE", "")
        search = {"space": ["cutavg", "cutdiff"], "criterion": "shift", "combine": 2, "pruner": "median"}
        result = start_study(
            SMALL, n_trials=5, training=TINY, tracking_uri=server.uri, run=place / "first", **search
        )
    torch.set_num_threads(threads)
    yield Shown(server, result, place)
    server.kill()


@pytest.mark.slow
@pytest.mark.services
def test_a_fresh_browser_shows_the_figures_of_a_study_in_its_table_of_runs(shown: Shown) -> None:
    figures = shown.result.evaluation
    assert figures is not None and figures.auc_combined is not None and shown.result.undelivered == 0
    page = re.sub(r"<[^>]+>", "|", shown.page(shown.view))
    for name in ("auc_selected", "auc_combined", "auc_random", "auc_oracle", "regret"):
        assert f"|{name}|" in page
        value = round(getattr(figures, name), 6)
        assert f"|{value:g}|" in page or f"|{value}|" in page, name
    assert "|first|" in page


@pytest.mark.slow
@pytest.mark.services
def test_a_studys_page_has_a_summary_with_a_picture_that_is_there(shown: Shown) -> None:
    client = client_of(shown.server.uri)
    runs = client.search_runs(["1"], "attributes.run_name = 'first'")
    page = shown.page(f"{shown.server.uri}/#/experiments/1/runs/{runs[0].info.run_id}")
    assert "was chosen without labels" in page
    picture = re.search(r'<img[^>]*src="(get-artifact\?[^"]+)"', page)
    assert picture is not None
    with urllib.request.urlopen(f"{shown.server.uri}/{picture[1]}") as reply:
        assert reply.read().startswith(A_PIXEL)
    evaluate_run(os.path.relpath(shown.result.run.folder))  # says the same again
    again = client.search_runs(["1"], "attributes.run_name = 'first'")[0]
    assert again.data.tags["mlflow.note.content"] == runs[0].data.tags["mlflow.note.content"]
