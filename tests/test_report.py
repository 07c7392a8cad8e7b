"""The report: what it says of a study, with ground truth and without, and that it needs nothing else."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starting import start_study

import ssad_hpo.report
from ssad_hpo import controlled_data, report_run
from ssad_hpo.data import Source
from ssad_hpo.experiment import (
    Run,
    RunError,
    StudyInterrupted,
    open_result,
    open_run,
    resume_study,
    sync_run,
)
from ssad_hpo.report.detectors import embedding_figure, images_figure, scores_figure
from ssad_hpo.report.findings import EmbeddingSets, Findings, ImageRow, Trial
from ssad_hpo.report.style import ceiling
from ssad_hpo.report.tables import candidates_table
from ssad_hpo.report.trials import auc_figure, hyperparameters_figure, learning_curves_figure, searched
from ssad_hpo.task import Augmentation, SearchSpace, Task, Training
from ssad_hpo.tracking.outbox import read_records

TRAINING = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 0.75, 1.0))
SMALL = {"image_size": 16, "n_train": 20, "n_unlabeled": 14}
# Beside what works, a spot so large that it blackens every image: trainings collapse.
SPACE = SearchSpace({"cutavg": {}, "cutpaste": {"patch_aspect": 1.0}, "cutdiff": {"patch_area": 1e6}})


class InterruptsTrial:
    """A listener that stops the study in a trial, once."""

    def __init__(self, trial: str) -> None:
        self.trial = trial

    def trial_started(self, trial: str, params: Any, tags: Any) -> None: ...

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        if trial == self.trial:
            raise KeyboardInterrupt

    def trial_ended(self, trial: str, status: str, metrics: Any, reason: str | None = None) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import optuna

    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSAD_HPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a study with ground truth, with trials of every status, and its report."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    settings = {"n_trials": 10, "sampler": "random", "pruner": "asha", "training": TRAINING, "threads": 1}
    with pytest.raises(StudyInterrupted):
        start_study(
            Source("controlled", SMALL), space=SPACE, run=folder, tracking_uri=None,
            listeners=[InterruptsTrial("0")], **settings,
        )  # fmt: skip
    resume_study(folder)
    report_run(folder)
    return folder


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory: pytest.TempPathFactory, make_category: Callable[..., Path]) -> Path:
    """The run of a study on a plain pair of folders, and its report."""
    place = tmp_path_factory.mktemp("unjudged")
    images = make_category(place / "cloth")
    folders = {"train": str(images / "train"), "unlabeled": str(images / "test"), "image_size": 16}
    start_study(
        Source("folders", folders), space=["rotation"], run=place / "run", tracking_uri=None, n_trials=2,
        training=TRAINING, threads=1,
    )  # fmt: skip
    report_run(place / "run")
    return place / "run"


class Page(HTMLParser):
    """A parsed report: tags with their attributes, text, rows of the table."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        whole = (run / "report" / "index.html").read_text(encoding="utf-8")
        self.source = re.sub("base64,[A-Za-z0-9+/=]+", "base64,", whole)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows = "", []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        data = data.strip()
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", ["judged", "unjudged"])
def test_the_page_needs_nothing_beside_itself(name, request):
    run = request.getfixturevalue(name)
    page = Page(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", page.source)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in images)
    links = [a["href"] for tag, a in page.tags if tag in ("a", "link")]
    assert sorted(set(links) - {"data:,"}) == sorted(p.name for p in (run / "report").glob("*.png"))
    assert len(images) == len(links) - 1


@pytest.mark.parametrize("name", ["judged", "unjudged"])
def test_every_picture_is_a_png_that_shows_something(name, request):
    pictures = sorted((request.getfixturevalue(name) / "report").glob("*.png"))
    assert len(pictures) > 6
    for path in pictures:
        with Image.open(path) as image:
            assert image.format == "PNG"
            if not path.name.startswith("spots-"):  # these are as large as the images that they show
                assert 800 <= image.width <= 1200 and 300 <= image.height <= 1200
            assert np.asarray(image.convert("L")).std() > 5, path


def test_a_report_names_the_choice_and_compares_it_with_the_truth(judged):
    result, page = open_result(judged), Page(judged)
    assert f"Trial {result.selected.number}: " in page.text and "Chosen without labels, by DSV" in page.text
    for figure in ("auc_selected", "auc_oracle", "auc_random", "auc_worst", "regret"):
        assert f"{getattr(result.evaluation, figure):.3f}" in page.text
    assert f"the best AUC among the {result.evaluation.n_candidates} complete trials" in page.text
    files = {path.name for path in (judged / "report").iterdir()}
    assert {"auc.png", "scores-truth.png", "embeddings-worst.png", "images-highest.png"} <= files


def test_without_ground_truth_a_report_says_so_and_has_no_auc(unjudged):
    page = Page(unjudged)
    assert "no ground truth" in page.text
    assert not re.search(r"AUC|regret|oracle|Spearman|by truth", page.source)
    files = {path.name for path in (unjudged / "report").iterdir()}
    assert not files & {"auc.png", "scores-truth.png"}
    assert {"tried-rotation-angle.png", "images-highest.png", "scores.png"} <= files


def test_the_table_tells_complete_pruned_failed_and_interrupted_trials_apart(judged):
    result, page = open_result(judged), Page(judged)
    head, *rows = page.rows
    assert head[:3] == ["trial", "f_aug", "status"] and head[-3:] == ["DSV", "AUC", "reason"]
    assert sorted(int(row[0]) for row in rows) == [t.number for t in result.study.get_trials(deepcopy=False)]
    by_number = {int(row[0]): row for row in rows}
    assert rows[0][0] == str(result.selected.number) and "selected" in rows[0][2]
    for number, auc in result.aucs.items():
        assert by_number[number][-2] == f"{auc:.3f}"
    reasons = {row[2]: row[-1] for row in rows}
    assert re.fullmatch(r"stopped at step \d of 4", reasons["pruned"])
    assert reasons["failed"].startswith("collapsed at step 2 under cutdiff(")
    assert reasons["interrupted"] == "KeyboardInterrupt(); run again as trial 1"
    assert f"{len(result.aucs)} complete" in page.text


def test_a_report_is_replaced_as_a_whole_and_its_files_become_artifacts_of_the_parent_run(
    judged, empty_mlflow, tmp_path
):
    from mlflow import MlflowClient

    shutil.copytree(judged, tmp_path / "run")
    (tmp_path / "run" / "report" / "tried-cutout.png").write_bytes(b"of an earlier report")
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    opened, uri = open_run(tmp_path / "run"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    Run(opened.folder, replace(opened.settings, tracking_uri=uri)).write()

    files = sorted(report_run(tmp_path / "run").parent.iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (judged / "report").iterdir())
    assert all(file.read_bytes() == (judged / "report" / file.name).read_bytes() for file in files[:3])
    recorded = [record for _, record in read_records(opened.outbox, 0) if record is not None]
    named = [(f"report/{file.name}", "report") for file in files]
    assert [(r["artifact"], r["folder"]) for r in recorded] == named

    sync_run(tmp_path / "run")  # what the busy machine did not do within report_run's patience
    client = MlflowClient(uri)
    (parent,) = client.search_runs([client.get_experiment_by_name("ssad_hpo").experiment_id])
    delivered = [Path(artifact.path) for artifact in client.list_artifacts(parent.info.run_id, "report")]
    assert delivered == [Path("report") / file.name for file in files]


def test_without_tracking_a_report_records_nothing(judged):
    assert not open_run(judged).outbox.exists()


def test_one_trial_on_images_in_memory_is_enough_for_a_report(tmp_path):
    images = controlled_data(**SMALL).task
    task = Task("<b>cloth</b> & co", images.train, images.unlabeled)
    start_study(
        task, run=tmp_path / "run", tracking_uri=None, n_trials=1, threads=1,
        training=replace(TRAINING, score="classifier", evaluate_at=(1.0,)),
    )  # fmt: skip
    report_run(tmp_path / "run")
    page = Page(tmp_path / "run")
    assert "the only candidate" in page.text and "lived in memory" in page.text
    assert "<b>cloth" not in page.source and "<b>cloth</b> & co" in page.text
    files = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    assert "embeddings-worst.png" not in files and "images-normal.png" not in files

    report_run(tmp_path / "run", task=task)
    assert "lived in memory" not in Page(tmp_path / "run").text
    assert (tmp_path / "run" / "report" / "images-normal.png").is_file()


def test_a_report_on_other_images_than_the_studys_is_refused(tmp_path, unjudged):
    opened = open_run(unjudged)
    changed = replace(opened.settings, content_hash="0" * 64)
    Run(tmp_path / "run", changed).write()
    with pytest.raises(RunError, match="not those that the study began with"):
        report_run(tmp_path / "run")


def test_a_study_without_a_candidate_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="nothing to select"):
        start_study(
            Source("controlled", SMALL), space=SearchSpace({"cutdiff": {"patch_area": 1e6}}), n_trials=1,
            run=tmp_path / "run", tracking_uri=None, training=TRAINING, threads=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="nothing to select"):
        report_run(tmp_path / "run")
    assert not (tmp_path / "run" / "report").exists()


def test_the_command_says_where_the_report_is(judged, monkeypatch, capsys):
    from click.testing import CliRunner

    from ssad_hpo.cli import app

    monkeypatch.chdir(judged.parent)
    monkeypatch.setattr(
        "ssad_hpo.experiment.report_run", lambda run, **_: Path(run) / "report" / "index.html"
    )
    answer = CliRunner().invoke(app, ["report", str(judged)])
    assert answer.exit_code == 0 and "run/report/index.html" in answer.stdout


def trials_of_a_long_study(count: int = 300) -> list[Trial]:
    rng = np.random.default_rng(0)
    kinds = ("cutout", "cutavg", "cutpaste", "rotation")
    trials = []
    for number in range(count):
        kind = kinds[number % 4]
        drawn = {name: r.at(rng.random()) for name, r in SearchSpace(kind).kinds[kind].items()}
        augmentation, value = Augmentation(kind, drawn), float(rng.normal() + 1e5 * (number == 7))
        if number % 3:
            curve = {50: value + 1, 100: value}
            trials.append(Trial(number, "complete", augmentation, value, curve, float(rng.random())))
        else:
            trials.append(Trial(number, "pruned", augmentation, None, {50: value}))
    return [*trials, Trial(count, "interrupted", None, reason="its process ended")]


def test_hundreds_of_trials_with_an_outlier_fit_into_every_figure_and_the_table(tmp_path):
    trials, space = trials_of_a_long_study(), SearchSpace(["cutout", "cutavg", "cutpaste", "rotation"])
    chosen = min((t for t in trials if t.value is not None), key=lambda t: t.value).number
    auc_figure(trials, chosen, "dsv", tmp_path / "auc.png")
    learning_curves_figure(trials, chosen, "dsv", tmp_path / "curves.png")
    for kind in space.kinds:
        for names in searched(space, kind):
            path = tmp_path / f"{kind}-{names[1]}.png"
            hyperparameters_figure(trials, space, kind, names, chosen, "dsv", path)
    assert len(list(tmp_path.glob("*.png"))) == 2 + 1 + 1 + 2 + 1
    sets = EmbeddingSets(0, *[np.zeros((1, 2))] * 3)
    findings = Findings("task", "dsv", space, tuple(trials), chosen, {}, {"unlabeled": np.ones(2)}, sets)
    assert candidates_table(findings).count("<tr") == 302


def test_a_single_outlier_does_not_set_the_scale():
    values = [*np.linspace(0, 1, 50), 1e6]
    assert ceiling(values) == 1.0
    assert ceiling([3.0]) == 3.0 and ceiling([1.0, 1.0, 1.0, 9.0]) == 9.0


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda path: auc_figure([Trial(0, "failed", None)], 0, "dsv", path), "trials: with an AUC"),
        (lambda path: learning_curves_figure([], 0, "dsv", path), "trials: with an evaluation"),
        (
            lambda path: hyperparameters_figure(
                [], SearchSpace("cutavg"), "cutavg", ("patch_area", "patch_aspect"), 0, "dsv", path
            ),
            "trials: complete ones",
        ),
        (lambda path: scores_figure({}, "", path), "scores: expected at least one"),
        (lambda path: scores_figure({"train": np.empty(0)}, "", path), "scores of train"),
        (lambda path: images_figure(ImageRow("x", "", np.empty((0, 1, 4, 4), np.uint8)), path), "images"),
    ],
)
def test_a_figure_of_nothing_is_refused_by_name(draw, complaint, tmp_path):
    with pytest.raises(ValueError, match=f"{complaint}.*got none"):
        draw(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_embeddings_of_different_widths_or_of_no_image_are_refused(tmp_path):
    rows = np.zeros((3, 4))
    with pytest.raises(ValueError, match="augmented: expected"):
        EmbeddingSets(0, rows, rows[:0], rows)
    with pytest.raises(ValueError, match="unlabeled: expected"):
        EmbeddingSets(0, rows, rows, rows[:, :2])
    with pytest.raises(ValueError, match="anomalous: expected 3 values, got 2"):
        embedding_figure(EmbeddingSets(0, rows, rows, rows), "", tmp_path / "x.png", np.array([True, False]))


def test_only_a_complete_trial_has_a_value_and_can_be_the_selected_one():
    with pytest.raises(ValueError, match="value"):
        Trial(0, "pruned", None, value=1.0)
    row = np.zeros((1, 2))
    with pytest.raises(ValueError, match="selected: expected a complete trial, got 0"):
        Findings(
            "task", "dsv", SearchSpace("cutavg"), (Trial(0, "pruned", None),), 0, {}, {},
            EmbeddingSets(0, row, row, row),
        )  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted(Path(ssad_hpo.report.__file__).parent.glob("*.py")), ids=lambda p: p.stem
)
def test_matplotlib_is_imported_only_where_something_is_drawn(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not isinstance(node, ast.Import | ast.ImportFrom) or "matplotlib" not in ast.unparse(node)
