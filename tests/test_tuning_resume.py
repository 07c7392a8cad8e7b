"""Tunings that were killed or stopped by Ctrl-C at any moment end like undisturbed ones."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuned_runs import Kills, Tracked, all_of, quick

from ssad_hpo.bilevel import CollapseWarning
from ssad_hpo.experiment import StudyInterrupted, StudyResult, load_detector, open_result, resume_study

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

PROCESSES = multiprocessing.get_context("forkserver")  # whose server conftest prepares


def work(folder: Path, event: str, at: int) -> None:
    """What a process of its own does: tune, and die."""
    warnings.simplefilter("ignore", CollapseWarning)
    kills = Kills(event, at)
    if event == "publish":  # just before what is kept of a start gets its name
        sys.addaudithook(
            lambda name, arguments: (
                kills.hear("publish")
                if name == "os.rename" and Path(arguments[1]).name.startswith("trial-")
                else None
            )
        )
    quick(folder, listeners=[kills])


@pytest.fixture(scope="module")
def undisturbed(tracked: Tracked) -> list[Any]:
    return all_of(tracked.result)


@pytest.mark.parametrize(
    ("event", "at", "finished"),
    [("started", 1, 0), ("progress", 1, 0), ("progress", 3, 0), ("ended", 1, 0), ("publish", 1, 0),
     ("progress", 7, 1), ("publish", 2, 1)],
)  # fmt: skip
def test_a_tuning_killed_at_any_moment_ends_like_an_undisturbed_one(
    event: str, at: int, finished: int, tmp_path: Path, undisturbed: list[Any]
) -> None:
    killed = PROCESSES.Process(target=work, args=(tmp_path / "run", event, at))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    if finished:
        assert len(open_result(tmp_path / "run").study.trials) == finished
    again = _Heard()
    assert all_of(resume_study(tmp_path / "run", listeners=[again])) == undisturbed
    # What a checkpoint held is not done again: at most 2 steps of the hyperparameters (checkpoint_every).
    done = {"started": 0, "ended": 4, "publish": 4 * at, "progress": at}[event]
    assert 8 - done <= again.steps <= 8 - done + 2
    assert not list((tmp_path / "run").rglob("*.partial"))


class _Heard:
    """A listener that counts steps of the hyperparameters."""

    steps = 0

    def trial_started(self, trial: str, params: Any, tags: Any) -> None: ...

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        self.steps += 1

    def trial_ended(self, trial: str, status: Any, metrics: Any, reason: str | None = None) -> None: ...


@pytest.mark.parametrize(("event", "at"), [("started", 2), ("progress", 2), ("progress", 6)])
def test_ctrl_c_keeps_what_is_done_and_resumes_alike(
    event: str, at: int, tmp_path: Path, undisturbed: list[Any], listener: Any
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # others may ignore it
    try:
        with pytest.raises(StudyInterrupted, match="resume_study") as stopped:
            quick(tmp_path / "run", listeners=[listener, Kills(event, at, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.run == tmp_path / "run"
    if at != 2 or event == "started":
        assert len(open_result(tmp_path / "run").study.trials) == 1  # and can be used already
        assert load_detector(tmp_path / "run").augmentation.kind == "cutdiff"
    assert all_of(resume_study(tmp_path / "run")) == undisturbed


def test_resuming_a_finished_tuning_trains_nothing(tuned: StudyResult, listener: Any) -> None:
    found = all_of(tuned)
    shutil.rmtree("runs/tuned/artifacts/trial-00000.partial", ignore_errors=True)
    settings = replace(tuned.run.settings, tracking_uri=None)
    replace(tuned.run, settings=settings).write()
    assert all_of(resume_study("tuned", listeners=[listener])) == found
    assert listener.heard == []
