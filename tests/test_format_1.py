"""Run folders of format 1 stay readable: those in format_1/ were made by the last version that wrote them.

A search and a tuning that were stopped half-way, in a folder that is no more; expected.json has what that
version made of them when it went on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssad_hpo.bilevel import Tuning
from ssad_hpo.experiment import (
    RunError,
    StudyResult,
    evaluate_run,
    load_detector,
    open_result,
    open_run,
    read_trajectory,
    report_run,
    resume_study,
    score_images,
)
from ssad_hpo.search import candidates, records
from ssad_hpo.task import Cluster, Search, Training

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]
every_run = pytest.mark.parametrize("name", ["search", "tuning"])

FOLDERS = Path(__file__).parent / "format_1"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text())
# Processors round differently; those of one kind agree to the last bit.
ACCURACY = 1e-3


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a run into a folder of this test's own."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FOLDERS / name, tmp_path / "elsewhere" / name))

    return copy


def change(run: Path, *without: str, **changed: Any) -> None:
    """Change settings of a run where they are kept, or take them away."""
    path = run / "settings.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in without}))


def check_as_expected(result: StudyResult, name: str) -> None:
    """It has the trials that the earlier version found, and chose the same one."""
    trials, expected = result.study.trials, EXPECTED[name]
    assert [trial.number for trial in trials] == [trial["number"] for trial in expected]
    assert [trial.state.name for trial in trials] == [trial["state"] for trial in expected]
    for trial, earlier in zip(trials, expected, strict=True):
        value = earlier["value"]
        assert trial.value == (value if value is None else pytest.approx(value, rel=ACCURACY))
        if name == "search" or trial.number == 0:  # drawn, or finished before
            assert trial.params == earlier["params"]
        else:  # learned
            (kind, *learned), (_, *known) = trial.params.values(), earlier["params"].values()
            assert kind == "cutdiff" and trial.params.keys() == earlier["params"].keys()
            assert learned == pytest.approx(known, rel=ACCURACY)
    assert result.selected.number == EXPECTED[f"{name}_selected"]


def test_the_settings_of_a_search_are_those_that_it_was_made_with(copied: Callable[[str], Path]) -> None:
    settings = open_run(copied("search")).settings
    space = ["cutavg", "cutdiff"]
    assert settings.method == Search(space, n_trials=4, pruner="asha", reduction_factor=3, seed=5, keep=1)
    assert settings.training == Training(
        width=2, steps=8, batch_size=4, evaluate_at=(0.5, 1.0), precision="float32", seed=5
    )
    assert settings.cluster is None and settings.tuning is None
    assert (settings.criterion, settings.n_trials, settings.seed) == ("dsv", 4, 5)
    assert (settings.study_name, settings.threads) == ("search-format-1-e319496e", 1)


def test_the_settings_of_a_tuning_are_those_that_it_was_made_with(copied: Callable[[str], Path]) -> None:
    settings = open_run(copied("tuning")).settings
    assert settings.method == Tuning(
        "cutdiff", detector_steps=2, virtual_images=4, warm_start=0.25, validation_train=8,
        validation_unlabeled=8, starts=(0.4, 0.9), checkpoint_every=2, focus=False,
    )  # fmt: skip
    assert settings.training == Training(
        width=2, steps=16, batch_size=4, evaluate_at=(1.0,), precision="float32", seed=5
    )
    assert (settings.criterion, settings.n_trials, settings.seed) == ("dsv", 2, 5)


def test_a_sweep_has_its_cluster(copied: Callable[[str], Path]) -> None:
    run, rest = copied("search"), {"cpus_per_trial": 0.5, "gpus_per_trial": 0.25, "max_concurrent": 3}
    change(run, cluster={"address": "auto", "storage_path": "/shared/ray", **rest})
    assert open_run(run).settings.cluster == Cluster("auto", "/shared/ray", **rest)


def test_a_run_from_before_asha_had_a_choice_of_factor_goes_on_with_its_own(
    copied: Callable[[str], Path],
) -> None:
    run = copied("search")
    change(run, "reduction_factor", "tuning", "cluster")  # none of them was there
    method = open_run(run).settings.method
    assert isinstance(method, Search) and method.stopping == "asha/2"


@pytest.mark.parametrize("missing", ["n_trials", "space", "training", "experiment"])
def test_settings_that_are_not_whole_are_no_run(copied: Callable[[str], Path], missing: str) -> None:
    run = copied("search")
    change(run, missing)
    with pytest.raises(RunError, match=r"settings.json: cannot be read as a run's settings"):
        open_run(run)


@every_run
def test_what_was_done_can_be_used_before_it_goes_on(copied: Callable[[str], Path], name: str) -> None:
    run = copied(name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = open_result(run)
    earlier = [trial for trial in EXPECTED[name] if trial["state"] == "COMPLETE"]
    finished = candidates(result.study, run / "artifacts")
    assert 0 < len(finished) < len(earlier)
    for start, expected in zip(finished, earlier, strict=False):
        assert start.number == expected["number"] and start.criteria["dsv"] == expected["value"]
        kept = start.kept()
        assert Path(start.address).parent == run / "artifacts"  # not where it was made
        assert kept.detector is not None and kept.detector.augmentation == start.augmentation
        np.testing.assert_allclose(
            kept.detector.density_score(kept.embeddings.unlabeled), kept.scores, rtol=ACCURACY
        )
    assert result.evaluation is not None and result.selected in finished
    assert {path: path.read_bytes() for path in before} == before


@every_run
def test_a_run_goes_on_to_the_same_trials_and_the_same_choice(
    copied: Callable[[str], Path], name: str
) -> None:
    run = copied(name)
    result = resume_study(run)
    check_as_expected(result, name)
    check_as_expected(open_result(run), name)
    check_as_expected(resume_study(run), name)  # of which nothing is left to do
    for kept in candidates(result.study, run / "artifacts"):
        assert Path(kept.address).parent == run / "artifacts" and len(kept.scores()) == 16


def test_a_trial_that_was_interrupted_is_repeated_and_the_best_detectors_alone_are_kept(
    copied: Callable[[str], Path],
) -> None:
    run = copied("search")
    trials = records(resume_study(run).study)
    assert [trial.status for trial in trials] == ["complete", "complete", "interrupted", "complete", "pruned"]
    assert trials[2].reason == "KeyboardInterrupt()" and trials[3].repeats == 2
    # Trial 3 is the best by every criterion. The detectors of 0 and 1 lay in the folder before.
    assert [folder.parent.name[:11] for folder in (run / "artifacts").glob("*/detector")] == ["trial-00003"]


def test_a_tuning_goes_on_from_its_checkpoint(copied: Callable[[str], Path], listener: Any) -> None:
    run = copied("tuning")
    trajectory = (run / "artifacts" / "trial-00000" / "trajectory.csv").read_bytes()
    result = resume_study(run, listeners=[listener])
    assert {trial for trial, *_ in listener.of("ended")} == {"1"}  # start 0 was done
    begun = [step for _, step, _ in listener.of("progress")]
    assert begun[-1] == 16 and len(begun) < len(read_trajectory(result.selected)) == 6
    assert (run / "artifacts" / "trial-00000" / "trajectory.csv").read_bytes() == trajectory


@every_run
def test_a_run_is_evaluated_reported_and_scored(
    copied: Callable[[str], Path], workplace: Path, name: str
) -> None:
    run = copied(name)
    result = resume_study(run)
    evaluated = evaluate_run(run)
    assert evaluated.evaluation is not None and evaluated.evaluation == result.evaluation
    assert evaluated.aucs == result.aucs and evaluated.selected.number == result.selected.number
    page = report_run(run).read_text(encoding="utf-8")
    assert "gravel/cutavg" in page and (run / "report" / "auc.png").is_file()
    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(workplace / "grey.png")
    ((_, score),) = score_images(load_detector(run), [workplace / "grey.png"])
    assert np.isfinite(score)


def test_a_search_with_more_trials_is_written_in_the_format_of_today(copied: Callable[[str], Path]) -> None:
    run = copied("search")
    before = open_run(run).settings
    result = resume_study(run, n_trials=5)
    assert json.loads((run / "settings.json").read_text())["format"] == 2
    after = open_run(run).settings
    assert after.n_trials == 5 and after.training == before.training and after.source == before.source
    earlier = [trial["params"] for trial in EXPECTED["search"]]
    assert [trial.params for trial in result.study.trials][:-1] == earlier
