"""Decisions of whole runs: what is kept with detectors, what `score` writes and says, labels given later."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combined_runs import CLEAR, TRAINING, clear_run
from conftest import Ended
from PIL import Image
from starting import start_study
from told import records_in

from ssad_hpo import data
from ssad_hpo.calibration import ALARM_RATE, Calibration
from ssad_hpo.combined import CombinedDetector
from ssad_hpo.data import Source, read_label_file
from ssad_hpo.detector import Detector
from ssad_hpo.evaluate import auc, count_alarms, share_range
from ssad_hpo.experiment import (
    RunError,
    StudyResult,
    evaluate_labelled,
    evaluate_run,
    evaluating,
    load_detector,
    open_result,
    report_run,
    resume_study,
)
from ssad_hpo.experiment.run_folder import locked
from ssad_hpo.experiment.telling import summary
from ssad_hpo.files import FileError
from ssad_hpo.task import Task

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return clear_run(tmp_path_factory.mktemp("decided") / "run", combine=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The unlabelled images of the run as files, by their place: 000.png and so on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(data.load(CLEAR).unlabeled):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03}.png")
    return folder


def without_calibration(folder: Path) -> None:
    """Make detectors as older versions kept them."""
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        tensors.pop("calibration.held_out", None)
        save_file(tensors, path)


def decided_of(result: StudyResult) -> torch.Tensor:
    """Alarms of the unlabelled images by the scores that the search gave them."""
    assert result.evidence is not None and result.evidence.combined is not None
    combined = result.evidence.combined
    return Calibration(combined.held_out).p_values(combined.scores) <= ALARM_RATE


def rows_of(said: Ended) -> list[dict[str, str]]:
    assert said.code == 0, said
    return list(csv.DictReader(said.out.splitlines()))


def test_a_run_its_folder_and_its_detector_have_one_calibration(together: StudyResult) -> None:
    assert together.evidence is not None and together.evidence.combined is not None
    expected = together.evidence.combined.held_out.sort().values
    for found in (
        together.detector(),
        load_detector(together.run.folder),
        load_detector(together.run.combined),
    ):
        assert isinstance(found, CombinedDetector) and found.calibration is not None
        assert torch.equal(found.calibration.held_out, expected)
    single = together.detector(single=True)
    kept = together.selected.kept()
    assert isinstance(single, Detector) and single.calibration is not None and kept.held_out is not None
    assert np.array_equal(single.calibration.held_out, np.sort(kept.held_out))
    images = data.load(CLEAR).unlabeled
    detector = together.detector()
    assert torch.equal(detector.p_values(images), Calibration(expected).p_values(detector.score(images)))
    assert torch.equal(detector.decide(images), detector.p_values(images) <= ALARM_RATE)


def test_a_run_of_an_older_version_decides_alike_and_its_bare_detectors_score_alone(
    together: StudyResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "older")
    without_calibration(folder)
    for single in (False, True):
        older, now = (load_detector(place, single=single) for place in (folder, together.run.folder))
        assert older.calibration is not None and now.calibration is not None
        assert torch.equal(older.calibration.held_out, now.calibration.held_out)
    bare = load_detector(folder / "combined")
    assert bare.calibration is None and bare.score(data.load(CLEAR).unlabeled).isfinite().all()


def test_a_run_that_goes_on_ends_with_the_calibration_of_one_that_was_never_stopped(
    together: StudyResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "again")
    shutil.rmtree(folder / "combined")
    resumed = resume_study(folder)
    for name in ("combined.safetensors", "combined.json"):
        assert (resumed.run.combined / name).read_bytes() == (together.run.combined / name).read_bytes()


# score


def test_score_decides_and_says_how_many_alarms_there_are(
    together: StudyResult, pictures: Path, call: Callable[..., Ended]
) -> None:
    said = call("score", together.run.folder, pictures)
    rows = rows_of(said)
    assert list(rows[0]) == ["path", "score", "p_value", "decision"] and len(rows) == 60
    detector = together.detector()
    assert detector.calibration is not None
    scores = torch.tensor([float(row["score"]) for row in rows], dtype=torch.float64)
    assert [float(row["p_value"]) for row in rows] == detector.calibration.p_values(scores).tolist()
    alarms = detector.calibration.alarms(scores)
    assert [row["decision"] == "alarm" for row in rows] == alarms.tolist()
    assert {row["decision"] for row in rows} == {"alarm", "good"}
    # 3 of 61 are the most that a rate of 0.05 allows
    assert said.err.splitlines() == [
        f"ssad-hpo: {int(alarms.sum())} of 60 images raise an alarm; about 4.9 % of good ones would (from 60 "
        "held-out images: 1.4 % to 10 %, 90 % range)"
    ]
    by_folder = call("score", together.run.combined, pictures, "--out", "scores.csv")
    assert by_folder.err == said.err and Path("scores.csv").read_text() == said.out


def test_alarms_follow_the_rate_that_is_asked_for(
    together: StudyResult, pictures: Path, call: Callable[..., Ended]
) -> None:
    counts = []
    for rate in ("0.0164", "0.05", "0.5"):
        rows = rows_of(call("score", together.run.folder, pictures, "--single", "--alarm-rate", rate))
        assert all((float(row["p_value"]) <= float(rate)) == (row["decision"] == "alarm") for row in rows)
        counts.append(sum(row["decision"] == "alarm" for row in rows))
    assert counts[0] <= counts[1] < counts[2]


def test_a_rate_that_the_held_out_images_cannot_keep_is_an_error_before_anything_is_scored(
    together: StudyResult, pictures: Path, call: Callable[..., Ended]
) -> None:
    said = call("score", together.run.folder, pictures, "--alarm-rate", "0.001", "--out", "scores.csv")
    assert said.code == 2 and said.out == "" and not list(Path().glob("scores.csv*"))
    assert "60 held-out images keep rates of 0.0164 and more, got 0.001, which takes 999" in said.err


def test_without_enough_held_out_images_the_least_rate_is_taken_and_told(
    together: StudyResult, pictures: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    detector = together.selected.detector()
    assert detector.calibration is not None
    detector.calibration = Calibration(detector.calibration.held_out[:9])
    detector.save(tmp_path / "few")
    said = call("score", tmp_path / "few", pictures)
    assert all((row["decision"] == "alarm") == (row["p_value"] == "0.1") for row in rows_of(said))
    told = said.err.splitlines()
    assert "9 held-out images keep alarm rates of 0.1 and more, so it is that instead of 0.05" in told[0]
    assert "about 10 % of good ones would" in told[1]
    assert call("score", tmp_path / "few", pictures, "--alarm-rate", "0.05").code == 2


def test_without_held_out_images_there_are_scores_alone_and_one_line_that_says_why(
    together: StudyResult, pictures: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.combined, tmp_path / "bare")
    without_calibration(folder)
    said = call("score", folder, pictures)
    assert list(rows_of(said)[0]) == ["path", "score"]
    (told,) = said.err.splitlines()
    assert told.startswith("ssad-hpo: scores alone, no p-values and decisions: ") and "--held-out DIR" in told
    refused = call("score", folder, pictures, "--alarm-rate", "0.1")
    assert refused.code == 2 and refused.out == "" and "no scores of held-out normal images" in refused.err


def test_a_batch_that_drifted_as_a_whole_is_told_and_one_with_many_anomalies_is_not(
    together: StudyResult, pictures: Path, call: Callable[..., Ended]
) -> None:
    labels = data.read_labels(CLEAR)
    assert labels is not None and labels.sum() == 30
    assert "as a whole" not in call("score", together.run.folder, pictures).err
    for place in pictures.iterdir():
        image = np.asarray(Image.open(place)).astype(float)
        Image.fromarray((image * 0.4).astype(np.uint8)).save(place)
    said = call("score", together.run.folder, pictures).err.splitlines()
    assert len(said) == 2 and "these images score higher than held-out ones as a whole" in said[1]


# Labels that are given afterwards


def write_labels(path: Path, rows: list[tuple[object, object]], header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *(f"{image},{word}" for image, word in rows)]) + "\n")
    return path


def test_labels_of_all_unlabelled_images_give_the_figures_that_the_ground_truth_gives(
    together: StudyResult, pictures: Path, call: Callable[..., Ended], tmp_path: Path
) -> None:
    truth = data.read_labels(CLEAR)
    assert truth is not None and together.evaluation is not None and together.alarms is not None
    rows: list[tuple[object, object]] = [
        (f"pictures/{i:03}.png", "defect" if one else "Good") for i, one in enumerate(truth)
    ]
    file = write_labels(tmp_path / "labels.csv", rows[::-1])
    found = evaluate_labelled(together.run.folder, file)
    assert (found.n_unlabeled, found.n_new, found.left_out) == (60, 0, 0)
    assert found.auc == together.evaluation.auc_combined and found.alarms == together.alarms
    assert found.alarms == count_alarms(truth, decided_of(together), ALARM_RATE)
    said = call("evaluate", together.run.folder, "--labels", file)
    assert said.code == 0 and said.err == ""
    assert f"AUC {found.auc:.3f}" in said.out and found.alarms.sentence() in said.out
    assert found.alarms.sentence() in call("evaluate", together.run.folder).out


def test_new_images_are_scored_and_those_that_were_trained_on_are_left_out(
    together: StudyResult, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    task = data.load(CLEAR)
    assert task.held_out is not None
    new = (255 - task.unlabeled[:4], [1, 0, 1, 1])
    sets = {"new": new[0], "train": task.train[:2], "held": task.held_out[:3]}
    rows: list[tuple[object, object]] = []
    for name, images in sets.items():
        for i, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(tmp_path / f"{name}{i}.png")
            rows.append((tmp_path / f"{name}{i}.png", new[1][i] if name == "new" else 0))
    file = write_labels(tmp_path / "labels.csv", rows)
    found = evaluate_labelled(together.run.folder, file, alarm_rate=0.2)
    assert (found.n_unlabeled, found.n_new, found.left_out) == (0, 4, 5)
    detector = together.detector()
    truth = np.array(new[1])
    assert found.auc == pytest.approx(auc(truth, detector.score(new[0]).numpy()))
    assert found.alarms == count_alarms(truth, detector.decide(new[0], 0.2).numpy(), 0.2)
    said = call("evaluate", together.run.folder, "--labels", file, "--alarm-rate", "0.2")
    assert said.code == 0 and "5 labelled images are left out" in said.err
    one_kind = call("evaluate", together.run.folder, "--labels", write_labels(file, rows[:1]))
    assert one_kind.code == 0 and "all of these have the same label" in one_kind.out


def test_false_labels_change_the_figures_and_nothing_in_the_run(
    together: StudyResult, pictures: Path, tmp_path: Path
) -> None:
    truth = data.read_labels(CLEAR)
    assert truth is not None
    folder = shutil.copytree(together.run.folder, tmp_path / "copy")
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    right, false = (
        evaluate_labelled(folder, write_labels(tmp_path / "labels.csv", list(enumerate_files(pictures, t))))
        for t in (truth, 1 - truth)
    )
    assert right.auc is not None and false.auc == pytest.approx(1 - right.auc)
    changing = {folder / "lock", folder / "later.json"}  # the latter has these figures
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p not in changing} == {
        path: content for path, content in before.items() if path not in changing
    }


def test_what_stands_in_the_way_of_recording_is_told_before_any_image_is_scored(
    together: StudyResult, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "copy")
    file = write_labels(tmp_path / "labels.csv", [("pictures/000.png", "defect")])
    scored = []

    def score(detector: CombinedDetector, images: torch.Tensor) -> torch.Tensor:
        scored.append(len(images))
        return own(detector, images)

    own = CombinedDetector.score
    monkeypatch.setattr(CombinedDetector, "score", score)
    open_chosen = evaluating.chosen

    def taken(*args: Any, **settings: Any) -> StudyResult:
        """Another process comes, once the choice has been read."""
        result = open_chosen(*args, **settings)
        other.enter_context(locked(folder))
        return result

    with ExitStack() as other, monkeypatch.context() as patch:
        patch.setattr(evaluating, "chosen", taken)
        with pytest.raises(RunError, match=r"copy: in use by process \d+"):
            evaluate_labelled(folder, file)
    settings = json.loads((folder / "settings.json").read_text())
    text = json.dumps({**settings, "tracking_uri": "https://mlflow.example"})
    (folder / "settings.json").write_text(text)
    with pytest.raises(FileError, match=r"tracking_uri 'https://mlflow\.example', an address that you have"):
        evaluate_labelled(folder, file)
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "later.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read as later evaluations"):
        evaluate_labelled(folder, file)
    assert scored == []
    (folder / "later.json").unlink()
    assert evaluate_labelled(folder, file).n_unlabeled == 1 and scored == [1]


@pytest.mark.slow
def test_later_labels_add_to_what_is_told_of_a_study_and_take_nothing_away(
    pictures: Path, tmp_path: Path, empty_mlflow: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path)}"
    result = start_study(
        CLEAR, space="cutout", n_trials=2, criterion="shift", training=TRAINING, run="told", tracking_uri=uri
    )
    truth = data.read_labels(CLEAR)
    assert truth is not None
    for share in (slice(None, 20), slice(20, None)):
        some = enumerate_files(pictures, truth)[share]
        found = evaluate_labelled("told", write_labels(tmp_path / "some.csv", some))
    notes = [record["note"] for record in records_in(result.run.outbox) if "note" in record]
    study, first, both = notes
    assert first.index("Labels that came later") > 0 and first != both
    for paragraph in study.split("\n\n"):
        assert paragraph in first and paragraph in both
    assert both.count("some.csv") == 2 and f"AUC {found.auc:.3f}" in both
    told = [record["metrics"] for record in records_in(result.run.outbox) if "metrics" in record]
    assert [figures["labelled_images"] for figures in told if "labelled_images" in figures] == [20, 40]
    evaluate_run("told")
    again = [record["note"] for record in records_in(result.run.outbox) if "note" in record][-1]
    assert again == both


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"evaluations": [1]}', '{"evaluations": 3}'])
def test_later_figures_that_cannot_be_read_end_in_a_sentence(
    content: str, together: StudyResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "damaged")
    (folder / "later.json").write_text(content)
    with pytest.raises(RunError, match=r"later\.json: cannot be read as later evaluations .*; remove it"):
        summary(open_result(folder))


# What is said of the unlabelled images


def test_a_study_says_what_it_decides_of_its_unlabelled_images_wherever_it_is_shown(
    together: StudyResult, call: Callable[..., Ended], tmp_path: Path
) -> None:
    found = together.decided()
    assert found is not None and together.evidence is not None and together.evidence.combined is not None
    calibration = Calibration(together.evidence.combined.held_out)
    assert (found.n_images, found.n_alarms) == (60, int(decided_of(together).sum()))
    assert (found.expected, found.low, found.high) == calibration.realised_rates(ALARM_RATE)
    assert found.threshold == calibration.threshold(ALARM_RATE) and not found.drifted
    (told,) = found.sentences("unlabelled images")
    assert told.startswith(
        f"{found.n_alarms} of 60 unlabelled images raise an alarm; about 4.9 % of good ones"
    )
    folder = shutil.copytree(together.run.folder, tmp_path / "shown")
    page = report_run(folder).read_text()
    assert told in page and "the combined detector decides".capitalize() in page
    for figure in (f"{found.n_alarms} of 60", f"{found.threshold:.4g}", "5 %", "4.9 %", "1.4–10 %"):
        assert f"<dd>{figure}</dd>" in page
    assert "right of the dashed line" in page and "Drift" not in page
    assert told in summary(together) and f"threshold is a score of {found.threshold:.4g}" in summary(together)
    assert told in " ".join(call("evaluate", folder).out.split())


def test_drift_is_told_and_a_rate_that_few_images_keep() -> None:
    calibration = Calibration(torch.linspace(0, 1, 60).double())
    drifted = calibration.decided(torch.full((50,), 2.0).double())
    assert drifted.drifted and "score higher than held-out ones as a whole" in drifted.sentences()[-1]
    few = Calibration(torch.arange(9).double()).decided(torch.zeros(3).double())
    assert few.alarm_rate == 0.1 and "so it is that instead of 0.05" in few.sentences()[0]
    assert len(Calibration(torch.arange(9).double()).decided(torch.zeros(3).double(), 0.2).sentences()) == 1


@pytest.mark.slow
def test_mlflow_has_the_decisions_as_figures_and_a_run_without_held_out_images_has_none(
    tmp_path: Path, empty_mlflow: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path)}"
    names = {"alarm_rate", "alarm_rate_expected", "alarm_rate_low", "alarm_rate_high", "alarm_threshold"}
    names |= {"alarms_unlabeled", "drift"}
    blind = Source("controlled", {**CLEAR.arguments, "n_held_out": 0})
    for images, criterion, expected in ((CLEAR, "shift", names), (blind, "dsv", set())):
        result = start_study(
            images, space="cutout", n_trials=1, criterion=criterion, training=TRAINING, tracking_uri=uri
        )
        told = {}
        for record in records_in(result.run.outbox):
            told |= record.get("metrics", {}) if "trial" not in record else {}
        assert names & told.keys() == expected
        found = result.decided()
        assert (found is None) == (expected == set())
        if found is not None:
            assert told["alarms_unlabeled"] == found.n_alarms and told["alarm_threshold"] == found.threshold


def enumerate_files(pictures: Path, labels: np.ndarray) -> list[tuple[object, object]]:
    return [(pictures / f"{i:03}.png", int(one)) for i, one in enumerate(labels)]


def test_without_ground_truth_evaluate_says_how_to_give_labels(
    together: StudyResult, call: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "in memory")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "source": None}))
    said = call("evaluate", folder)
    (told,) = said.err.splitlines()
    assert said.code == 1 and "there is no ground truth" in told and "--labels FILE" in told


def test_images_that_have_changed_since_make_all_labelled_ones_new(
    together: StudyResult, pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "changed")
    settings = (folder / "settings.json").read_text()
    hashed = open_result(folder).run.settings.content_hash
    (folder / "settings.json").write_text(settings.replace(hashed, "0" * 64))
    truth = data.read_labels(CLEAR)
    assert truth is not None
    file = write_labels(tmp_path / "labels.csv", enumerate_files(pictures, truth))
    with pytest.warns(
        UserWarning, match=r"all labelled images count as new ones: .* not those that the study"
    ):
        found = evaluate_labelled(folder, file)
    assert (found.n_unlabeled, found.n_new) == (0, 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no path"),
        ("image,label\na.png,1\n", "no path"),
        ("path,score\na.png,1\n", "no label"),
        ("path,label\n", "it has no label"),
        ("path,label\na.png,perhaps\n", "line 2: expected one of 0 good .* got 'perhaps'"),
        ("path,label\na.png\n", "line 2: expected one of"),
        ("path,label\nb.png,1\n", "line 2: there is no image 'b.png'"),
        ("path,label\na.png,1\n./a.png,0\n", "line 3: './a.png' has another label further up"),
    ],
)
def test_a_file_of_labels_that_cannot_be_used_is_told_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(
        ValueError, match=rf"labels.csv: cannot be read as labels \(.*{message}.*; write a line"
    ):
        read_label_file(tmp_path / "labels.csv")


def test_labels_are_found_beside_their_file_in_other_columns_with_semicolons_and_a_byte_order_mark(
    tmp_path: Path,
) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (16, 16)).save(tmp_path / name)
    content = "\ufeffPath;score;Label\r\na.png;0,5;NG\r\n\r\nb.png;0,1;ok\r\na.png;0,5;1\r\n"
    (tmp_path / "labels.csv").write_text(content, newline="")
    assert read_label_file(tmp_path / "labels.csv") == {tmp_path / "a.png": 1, tmp_path / "b.png": 0}


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 40)])
def test_the_range_of_a_share_is_that_of_clopper_and_pearson(count: int, total: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(count, total).proportion_ci(0.95, method="exact")
    assert share_range(count, total) == pytest.approx((count / total, expected.low, expected.high))


def test_what_is_no_decision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^labels, alarms: expected as many of 0 and 1"):
        count_alarms([0, 1], [True], 0.1)
    with pytest.raises(ValueError, match=r"^labels, alarms: expected as many of 0 and 1"):
        count_alarms([0, 2], [True, False], 0.1)
    found = count_alarms([0, 0, 1, 1, 1], [True, False, True, False, False], 0.1)
    assert (found.n_good, found.n_anomalous, found.false_alarms, found.misses) == (2, 3, 1, 2)


def test_a_study_without_held_out_images_judges_no_decision() -> None:
    from dataclasses import replace

    from combined_runs import TRAINING

    from ssad_hpo.experiment import run_study
    from ssad_hpo.task import Search

    source = data.Source(CLEAR.loader, {**CLEAR.arguments, "n_held_out": 0})
    result = run_study(source, Search("cutout", n_trials=1), replace(TRAINING, steps=2), tracking_uri=None)
    assert result.evaluation is not None and result.alarms is None
    detector = result.detector()
    assert detector.calibration is None
    task: Task = data.load(source)
    with pytest.raises(ValueError, match=r"^calibration: "):
        detector.p_values(task.unlabeled)
