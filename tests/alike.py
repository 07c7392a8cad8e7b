"""Whether a study that was stopped and taken up again is the one that nobody disturbed, to the last bit."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.combined import CombinedDetector
from ssad_hpo.experiment import StudyResult
from ssad_hpo.search import is_final, open_kept, position
from ssad_hpo.search.record import read_trial
from ssad_hpo.storage import open_journal


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """All of a trial that must not depend on interruptions: the time, the place and the number may."""
    changing = ("seconds", "artifacts", "retry_of", "interrupted", "ray_trial", "checkpoint")
    return {
        "state": trial.state.name,
        "params": trial.params,
        "values": trial.values,
        "intermediate": trial.intermediate_values,
        **{name: value for name, value in trial.user_attrs.items() if name not in changing},
    }


def finals_by_position(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """The trials that count, by position; more than one at a position was run twice."""
    finals = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        if is_final(trial):
            finals[position(study, trial)].append(trial)
    return dict(finals)


def final_trials(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The trials that count, by position; there is one for each."""
    finals = finals_by_position(study)
    assert all(len(trials) == 1 for trials in finals.values()), f"run twice: {finals}"
    return {place: trials[0] for place, trials in finals.items()}


def study_of_copy(journal: Path, copy: Path) -> optuna.Study | None:
    """The study in a journal that another process may own, read from a copy; None if there is none yet."""
    if not journal.exists() or b"study_name" not in journal.read_bytes():
        return None
    shutil.copy(journal, copy)
    return optuna.load_study(study_name=None, storage=open_journal(copy))


def finished_so_far(folder: Path, tmp_path: Path) -> dict[int, tuple[dict[str, Any], Any]]:
    """What a killed study's journal has of finished trials."""
    study = study_of_copy(folder / "journal.log", tmp_path / "copy.log")
    trials = [] if study is None else study.trials
    return {t.number: (facts(t), t.datetime_complete) for t in trials if is_final(t)}


def check_equal(result: StudyResult, expected: StudyResult) -> None:
    """A study is the undisturbed one, position by position, in all that it drew, found and kept."""
    trials = result.study.get_trials(deepcopy=False)
    assert not [t.number for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    mine, theirs = final_trials(result.study), final_trials(expected.study)
    assert sorted(mine) == sorted(theirs) == list(range(len(theirs)))
    for place, trial in mine.items():
        assert facts(trial) == facts(theirs[place]), f"position {place}"
        if trial.state == TrialState.COMPLETE:
            check_same_artifacts(trial, theirs[place])
    complete = {f"trial-{t.number:05d}" for t in trials if t.state == TrialState.COMPLETE}
    kept = [path.name for path in result.run.artifacts.glob("*")]
    assert {name.rpartition("-")[0] for name in kept} == complete and len(kept) == len(complete)
    assert chosen_position(result) == chosen_position(expected)
    assert result.selected.criteria == expected.selected.criteria
    check_same_evidence(result, expected)
    check_same_confirmation(result, expected)
    assert not list(result.run.folder.glob("*.lock*"))


def check_same_evidence(result: StudyResult, expected: StudyResult) -> None:
    """What is said of held-out images, and how the combined detector scores, does not depend on a kill."""
    mine, theirs = result.evidence, expected.evidence
    assert (mine is None) == (theirs is None)
    if mine is None or theirs is None:
        return
    assert (mine.p_anomalies, mine.shifted) == (theirs.p_anomalies, theirs.shifted)
    assert (mine.combined is None) == (theirs.combined is None)
    if mine.combined is None or theirs.combined is None:
        assert not result.run.combined.exists()
        return
    for name in ("scores", "held_out"):
        assert torch.equal(getattr(mine.combined, name), getattr(theirs.combined, name))
    one, another = (CombinedDetector.load(r.run.combined) for r in (result, expected))
    for part, other in zip(one.parts, another.parts, strict=True):
        assert (part.scale.centre, part.scale.spread) == (other.scale.centre, other.scale.spread)
    for detector, copy in zip(one.detectors, another.detectors, strict=True):
        states = detector.network.state_dict(), copy.network.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def check_same_confirmation(result: StudyResult, expected: StudyResult) -> None:
    """What other seeds found of the best candidates, position by position."""
    mine, theirs = result.confirmation, expected.confirmation
    assert (mine is None) == (theirs is None)
    if mine is None or theirs is None:
        return
    assert mine.seeds == theirs.seeds
    places = (
        {position(r.study, r.study.trials[number]): values for number, values in found.values.items()}
        for r, found in ((result, mine), (expected, theirs))
    )
    assert next(places) == next(places)


def chosen_position(result: StudyResult) -> int:
    return position(result.study, result.study.trials[result.selected.number])


def check_same_artifacts(a: FrozenTrial, b: FrozenTrial) -> None:
    mine, theirs = (open_kept(str(read_trial(trial).address)) for trial in (a, b))
    assert np.array_equal(mine.scores, theirs.scores)
    assert (mine.held_out is None) == (theirs.held_out is None)
    if mine.held_out is not None and theirs.held_out is not None:
        assert np.array_equal(mine.held_out, theirs.held_out)
        assert torch.equal(mine.embeddings.held_out, theirs.embeddings.held_out)
    for name in ("train", "augmented", "unlabeled"):
        assert torch.equal(getattr(mine.embeddings, name), getattr(theirs.embeddings, name))
    assert (mine.detector is None) == (theirs.detector is None)
