"""Runs that may only be read, as on a read-only mount: reading makes nothing in any run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from conftest import Ended
from starting import start_study

from ssad_hpo.experiment import (
    RunError,
    evaluate_labelled,
    evaluate_run,
    load_detector,
    open_result,
    report_run,
    resume_study,
)
from ssad_hpo.experiment.run_folder import locked
from ssad_hpo.files import FileError
from ssad_hpo.task import Training

pytestmark = pytest.mark.usefixtures("workplace")

TRAINING = Training(steps=4, batch_size=4, width=4, evaluate_at=(1.0,))
REFUSED = r"the run folder cannot be written \(Read-only file system\); get the right to it, or use a copy"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    start_study("gravel/cutavg", n_trials=2, training=TRAINING, run=folder, tracking_uri=None)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that can be written."""
    return Path(shutil.copytree(made, tmp_path / "own"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Mounts a folder read-only beside itself."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        place = tmp_path / "seen"
        place.mkdir()
        if subprocess.run(["mount", "-o", "bind,ro", folder, place], capture_output=True).returncode:
            pytest.skip("needs to mount a folder read-only: run as root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.slow  # eight commands
def test_every_command_that_reads_a_run_does_so_on_a_read_only_mount(
    run: Path, read_only: Callable[[Path], Path], workplace: Path, call: Callable[..., Ended]
) -> None:
    before, seen = content(run), read_only(run)
    assert call("example", workplace / "images").code == 0
    new = workplace / "images" / "new"
    scores = [call("score", place, new) for place in (seen, run)]
    assert scores[0].code == 0 and scores[0].out == scores[1].out != ""
    judged = [call("evaluate", place) for place in (seen, run)]
    assert judged[0].code == 0 and judged[0].err == "", judged
    assert "AUC selected" in judged[0].out and "AUC selected" in judged[1].out
    page = workplace / "page"
    reported = call("report", seen, "--out", page)
    assert reported.code == 0 and "report in page/index.html" in reported.out, reported
    assert report_run(run).read_text().count("<img") == (page / "index.html").read_text().count("<img")
    chosen = call("select", *sorted((seen / "artifacts").glob("*/arrays.npz")))
    assert chosen.code == 0, chosen
    shutil.rmtree(run / "report")  # which the one on the folder itself has made
    assert content(run).keys() == before.keys()
    assert all(kept == before[name] for name, kept in content(run).items() if name != "lock")


@pytest.mark.parametrize("mounted", [True, False])
def test_reading_a_run_without_a_lock_makes_none(
    mounted: bool, run: Path, read_only: Callable[[Path], Path], workplace: Path
) -> None:
    (run / "lock").unlink()
    before, place = content(run), read_only(run) if mounted else run
    result = open_result(place)
    assert load_detector(place).image_shape == result.detector().image_shape
    assert report_run(place, out=workplace / "page").is_file()
    assert content(run) == before


def test_what_writes_says_before_its_work_that_a_run_may_only_be_read(
    run: Path, read_only: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    (workplace / "labels.csv").write_text("path,label\nx.png,1\n")
    seen = read_only(run)
    monkeypatch.setattr("ssad_hpo.experiment.reporting._gather", pytest.fail)
    monkeypatch.setattr("ssad_hpo.experiment.evaluating._evaluate", pytest.fail)
    for work in (
        report_run,
        lambda place: resume_study(place, n_trials=3),
        lambda place: evaluate_labelled(place, workplace / "labels.csv"),
    ):
        with pytest.raises(RunError, match=REFUSED):
            work(seen)


def test_figures_of_a_run_that_may_only_be_read_are_shown_and_not_told(
    read_only: Callable[[Path], Path], tmp_path: Path, empty_mlflow: Path, call: Callable[..., Ended]
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path)}"
    own = tmp_path / "told"
    start_study("gravel/cutavg", n_trials=1, training=TRAINING, run=own, tracking_uri=uri)
    before, seen = content(own), read_only(own)
    result = evaluate_run(seen)
    assert result.evaluation is not None and result.undelivered == 0
    assert result.trouble is not None and "cannot be written (Read-only file system)" in result.trouble
    said = call("evaluate", seen)
    assert said.code == 0 and "MLflow did not take all: " in said.err and "AUC selected" in said.out
    assert content(own) == before


def test_a_run_that_another_process_works_on_is_not_read_through_a_read_only_mount(
    run: Path, read_only: Callable[[Path], Path]
) -> None:
    seen = read_only(run)
    with locked(run), pytest.raises(RunError, match="in use by process"):
        open_result(seen)
    assert open_result(seen).selected.number == open_result(run).selected.number


@pytest.mark.parametrize(
    "tail", [b'{"op_code":6,"worker_id":"a, "tri', b'{"op_code":6,"wor\n', b"\0\0\0\0\0\n", b"{"]
)
def test_a_torn_last_line_of_a_journal_that_is_only_read_is_left_out_and_left_there(
    tail: bytes, run: Path
) -> None:
    values = [trial.values for trial in open_result(run).study.trials]
    with (run / "journal.log").open("ab") as journal:
        journal.write(tail)
    before = content(run)
    torn = open_result(run)
    assert [trial.values for trial in torn.study.trials] == values
    with pytest.raises(FileError, match="torn by a kill; resume its run first"):
        torn.study.set_user_attr("a", "b")
    assert content(run) == before
    resume_study(run)  # cuts it
    torn.study.set_user_attr("a", "b")
    assert optuna.load_study(study_name=None, storage=open_result(run).study._storage).user_attrs["a"] == "b"
