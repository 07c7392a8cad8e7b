"""A disk that fills up under a run: one sentence, nothing that looks whole, and `--resume` ends it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from conftest import Ended
from PIL import Image

from ssad_hpo.experiment import open_run, run_study
from ssad_hpo.task import Search, Training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]

STUDY = "--trials 4 --steps 4 --batch-size 4 --width 8 --evaluate-at 1 --no-tracking --sampler random".split()
TUNING = "-a cutavg --steps 12 --batch-size 4 --width 8 --starts 0.4,0.9 --no-tracking".split()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB; a file on it takes what a test wants to be taken."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("needs to mount a disk: run as root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def leave(disk: Path, free: int) -> None:
    """Take all of a disk but so many bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    space = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_bsize - free)


def trials(run: Path) -> list[tuple[dict[str, float], float | None]]:
    opened = open_run(run)
    study = optuna.load_study(study_name=opened.settings.study_name, storage=opened.open_storage())
    states = (optuna.trial.TrialState.COMPLETE,)
    return [(trial.params, trial.value) for trial in study.get_trials(states=states)]


@pytest.mark.parametrize(
    "words", [["search", "digits/4", *STUDY], ["tune", "digits/4", *TUNING]], ids=["search", "tune"]
)
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    words: list[str], disk: Path, workplace: Path, call: Callable[..., Ended]
) -> None:
    whole = call(*words, "--run", workplace / "whole")
    assert whole.code == 0, whole.err
    took = sum(file.stat().st_size for file in (workplace / "whole").rglob("*") if file.is_file())
    ended = []
    for share in (0.1, 0.45, 0.8):
        run = disk / f"run-{share}"
        leave(disk, int(share * took))
        ended.append(said := call(*words, "--run", run))
        (disk / "ballast").unlink()
        if said.code == 0:
            continue
        assert said.code in (1, 2) and "Traceback" not in said.err, said.err
        assert any(words in said.err for words in ("disk is full", "No space left")), said.err
        if (run / "settings.json").exists():
            again = call(words[0], "--resume", run)
            assert again.code == 0, again.err
            assert trials(run) == trials(workplace / "whole")
    assert sum(said.code != 0 for said in ended) >= 2


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose detector makes heat maps."""
    place = tmp_path_factory.mktemp("searched") / "whole"
    training = Training(steps=4, batch_size=4, width=8, evaluate_at=(1.0,))
    run_study("gravel/cutavg", Search(n_trials=1), training, run=place, tracking_uri=None)
    return place


def test_scores_on_a_full_disk_leave_no_file_that_looks_whole(
    disk: Path, searched: Path, workplace: Path, call: Callable[..., Ended]
) -> None:
    assert call("example", workplace / "images").code == 0
    leave(disk, 0)
    said = call("score", searched, workplace / "images" / "new", "--out", disk / "scores.csv")
    assert said.code in (1, 2) and "Traceback" not in said.err
    assert not (disk / "scores.csv").exists()


@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(
    file_format: str, disk: Path, searched: Path, call: Callable[..., Ended]
) -> None:
    leave(disk, 2**14)
    said = call("export", searched, "--format", file_format, "--out", disk / "exported")
    last = said.err.splitlines()[-1]  # after a warning, where the detector computes in bfloat16
    assert said.code == 1 and last.startswith("ssad-hpo: the disk is full"), said.err
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_heat_maps_and_example_images_on_a_full_disk_leave_no_half_of_a_file(
    disk: Path, searched: Path, workplace: Path, call: Callable[..., Ended]
) -> None:
    assert call("example", workplace / "images").code == 0
    leave(disk, 2**17)
    said = call("score", searched, workplace / "images" / "new", "--heatmaps", disk / "maps")
    assert said.code == 1 and "the disk is full" in said.err, said.err
    drawn = list((disk / "maps").rglob("*.*"))
    assert drawn
    for path in drawn:
        Image.open(path).load()
    said = call("example", disk / "images")
    assert said.code == 1 and said.err.startswith("ssad-hpo: the disk is full"), said.err
    assert {path.name for path in disk.iterdir()} == {"ballast", "maps"}
