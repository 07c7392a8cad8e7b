"""A disk that fills up under a run: one sentence, nothing that looks whole, and `--resume` ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from ssad_hpo.experiment import open_run

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


def program(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ssad_hpo", *map(str, words)], capture_output=True, text=True, timeout=300
    )


def trials(run: Path) -> list[tuple[dict[str, float], float | None]]:
    opened = open_run(run)
    study = optuna.load_study(study_name=opened.settings.study_name, storage=opened.open_storage())
    states = (optuna.trial.TrialState.COMPLETE,)
    return [(trial.params, trial.value) for trial in study.get_trials(states=states)]


@pytest.mark.parametrize(
    "words", [["search", "digits/4", *STUDY], ["tune", "digits/4", *TUNING]], ids=["search", "tune"]
)
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    words: list[str], disk: Path, workplace: Path
) -> None:
    whole = program(*words, "--run", workplace / "whole")
    assert whole.returncode == 0, whole.stderr
    took = sum(file.stat().st_size for file in (workplace / "whole").rglob("*") if file.is_file())
    ended = []
    for share in (0.1, 0.45, 0.8):
        run = disk / f"run-{share}"
        leave(disk, int(share * took))
        ended.append(said := program(*words, "--run", run))
        (disk / "ballast").unlink()
        if said.returncode == 0:
            continue
        assert said.returncode in (1, 2) and "Traceback" not in said.stderr, said.stderr
        assert any(words in said.stderr for words in ("disk is full", "No space left")), said.stderr
        if (run / "settings.json").exists():
            again = program(words[0], "--resume", run)
            assert again.returncode == 0, again.stderr
            assert trials(run) == trials(workplace / "whole")
    assert sum(said.returncode != 0 for said in ended) >= 2


def test_scores_on_a_full_disk_leave_no_file_that_looks_whole(disk: Path, workplace: Path) -> None:
    assert program("search", "digits/4", *STUDY, "--run", workplace / "whole").returncode == 0
    assert program("example", workplace / "images").returncode == 0
    leave(disk, 0)
    said = program("score", workplace / "whole", workplace / "images" / "new", "--out", disk / "scores.csv")
    assert said.returncode in (1, 2) and "Traceback" not in said.stderr
    assert not (disk / "scores.csv").exists()
