"""The result of a study: the choice, and its comparison with the ground truth where there is one.

Selecting comes first and sees no label; only then is the ground truth read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.storages import BaseStorage

from ssad_hpo import data
from ssad_hpo.calibration import Calibration, Decided
from ssad_hpo.combined import Combination, CombinedDetector
from ssad_hpo.detector import Detector
from ssad_hpo.evaluate import Alarms, StudyEvaluation, auc, count_alarms, evaluate_candidates
from ssad_hpo.experiment.combining import Evidence, combined_detector, evidence_of
from ssad_hpo.experiment.confirming import Confirmation, confirmation_of, trainings_to_come
from ssad_hpo.experiment.run_folder import Run, RunError, locked, open_run
from ssad_hpo.search import Candidate, candidates, read_reseeded, records, select
from ssad_hpo.task import StudyRecorder, Task

_DIGITS = 6  # of figures in MLflow, whose tables show all that there are


@dataclass(frozen=True, repr=False)
class StudyResult:
    """What came out of a study.

    Printed, it is the choice in a line, and its figures where the truth is known.

    Attributes:
        run: its folder and settings.
        study: Optuna's study.
        selected: the candidate with the lowest criterion, or the lowest mean over seeds where the best were
            trained again; chosen without labels.
        evidence: what held-out images say, the combined detector among it; None without such images.
        aucs: AUC of every candidate by trial number; None where there is no ground truth.
        evaluation: selected, oracle, random and worst AUC; None where there is no ground truth.
        alarms: how its decisions fit the ground truth, where there are held-out images to decide by.
        confirmation: the best candidates with other seeds; None where that was not asked for.
        undelivered: records that did not reach MLflow yet; `sync_run` delivers them.
        lost: records that could not even be kept for it, as on a full disk.
        trouble: why MLflow did not take all, in a sentence; None where it did.
    """

    run: Run
    study: optuna.Study
    selected: Candidate
    evidence: Evidence | None = None
    aucs: dict[int, float] | None = None
    evaluation: StudyEvaluation | None = None
    alarms: Alarms | None = None
    confirmation: Confirmation | None = None
    undelivered: int = 0
    lost: int = 0
    trouble: str | None = None

    def __repr__(self) -> str:
        settings, selected = self.run.settings, self.selected
        told = (
            f"StudyResult({settings.task_name}: {settings.word} {selected.number}, {selected.augmentation}, "
            f"{settings.criterion} {selected.criteria[settings.criterion]:.4g}"
        )
        if self.evaluation is not None:
            told += "; AUC " + ", ".join(f"{name} {value:.3f}" for name, value in self._figures.items())
            told += f" of {self.evaluation.n_candidates} {settings.word}s"
        return f"{told})"

    @property
    def _figures(self) -> dict[str, float]:
        """Those of the evaluation to look at first; empty without one."""
        found = {} if self.evaluation is None else self.evaluation.metrics()
        names = {"auc_selected": "selected", "auc_combined": self.ending}
        names |= {"auc_random": "random", "auc_oracle": "oracle"}
        return {word: found[name] for name, word in names.items() if name in found}

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        settings, selected = self.run.settings, self.selected
        rows = {
            "task": settings.task_name,
            settings.word: str(selected.number),
            "f_aug": str(selected.augmentation),
            settings.criterion: f"{selected.criteria[settings.criterion]:.4g}",
            **{f"AUC {name}": f"{value:.3f}" for name, value in self._figures.items()},
        }
        cells = "".join(f"<tr><th>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in rows.items())
        return f"<table>{cells}</table>"

    @property
    def combined(self) -> Combination | None:
        """What several candidates make of the images together; None where none are combined."""
        return None if self.evidence is None else self.evidence.combined

    @property
    def ending(self) -> str:
        """What `combined` is called beside figures, where no anomaly is seen not by that name."""
        return "as it comes" if self.evidence is not None and self.evidence.as_it_comes else "combined"

    def detector(self, device: str = "cpu", *, single: bool = False) -> Detector | CombinedDetector:
        """What the study ends with: the combined detector, or where none is combined the selected one.

        Args:
            device: where to score.
            single: the selected one in any case.

        Raises:
            FileNotFoundError: if a detector was not kept.
        """
        if single or self.evidence is None or self.evidence.combined is None:
            return self.selected.detector(device)
        return combined_detector(self.evidence, candidates(self.study, self.run.artifacts), device)

    def scores(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Anomaly scores by that detector, (N_test,) of the unlabelled and (N_held,) of held-out images.

        A combined detector scores them by heads that these images have no part in. The latter are None where
        no images are held out.
        """
        if self.combined is not None:
            return self.combined.scores.numpy(), self.combined.held_out.numpy()
        kept = self.selected.kept(arrays_alone=True)
        return kept.scores, kept.held_out

    def decided(self) -> Decided | None:
        """What is decided of the unlabelled images at the usual alarm rate; None without held-out images."""
        scores, held_out = self.scores()
        if held_out is None:
            return None
        return Calibration(torch.from_numpy(held_out)).decided(torch.from_numpy(scores))


def load_task(run: Run, task: Task | None = None) -> Task:
    """The task of a run, loaded again and recognised by its content.

    Raises:
        RunError: if it lived in memory and is not given, or its images have changed.
    """
    if task is None:
        if run.settings.source is None:
            raise RunError(f"{run.folder}: its images lived in memory; give the task again")
        task = data.load(run.settings.source)
    if task.content_hash != run.settings.content_hash:
        raise RunError(
            f"{run.folder}: the images of {run.settings.task_name} are not those that the study began with; "
            "restore them or start a new study"
        )
    return task


def chosen(run: str | Path, *, trust_addresses: bool = False) -> StudyResult:
    """What a run has chosen; reads neither images nor ground truth.

    Raises:
        RunError: if there is no such run. ValueError: if it has no candidate yet, or for a storage whose
            address needs `trust_addresses` (see `open_run`).
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    with locked(opened.folder, shared=True):
        return choose(opened, _study_of(opened))


def open_result(run: str | Path, *, trust_addresses: bool = False) -> StudyResult:
    """The result of a study as its folder has it; nothing is trained, nothing recorded.

    Raises:
        RunError: if there is no such run, or its images have changed. ValueError: if it has no
            candidate yet, or for a storage whose address needs `trust_addresses` (see `open_run`).
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    with locked(opened.folder, shared=True):
        study = _study_of(opened)
        return compare_with_truth(choose(opened, study))


def choose(run: Run, study: optuna.Study) -> StudyResult:
    """Choose among the candidates of a study, and combine them if that was asked for, without labels."""
    selected, confirmation = select(study, run.settings.criterion, run.artifacts), confirmation_of(run, study)
    if confirmation is not None:
        selected = next(c for c in candidates(study, run.artifacts) if c.number == confirmation.chosen)
    evidence = evidence_of(run, study, selected)
    return StudyResult(run, study, selected, evidence, confirmation=confirmation)


def compare_with_truth(result: StudyResult) -> StudyResult:
    """Read the ground truth, if there is any, and compare what was chosen with the candidates."""
    run, criterion = result.run, result.run.settings.criterion
    if run.settings.source is None:
        return result
    load_task(run)  # the ground truth of other images than those that were scored would mislead silently
    labels = data.read_labels(run.settings.source)
    if labels is None or len(set(labels.tolist())) < 2:
        return result
    choices = candidates(result.study, run.artifacts)
    aucs = {c.number: auc(labels, c.scores()) for c in choices}
    values = {c.number: c.criteria[criterion] for c in choices}
    combined = result.combined
    scores, held_out = result.scores()
    alarms = None
    if held_out is not None:
        calibration = Calibration(torch.from_numpy(held_out))
        raised = calibration.alarms(torch.from_numpy(scores), calibration.usual_rate)
        alarms = count_alarms(labels, raised, calibration.usual_rate)
    return replace(
        result,
        aucs=aucs,
        alarms=alarms,
        evaluation=evaluate_candidates(
            aucs, values, result.selected.number, None if combined is None else auc(labels, combined.scores)
        ),
    )


def record_result(recorder: StudyRecorder, result: StudyResult) -> None:
    """Tell MLflow of the choice, and of its comparison with the ground truth."""
    criterion = result.run.settings.criterion
    chosen_by = {
        "selected_trial": float(result.selected.number),
        f"{criterion}_selected": result.selected.criteria[criterion],
    }
    if (confirmation := result.confirmation) is not None:
        chosen_by["confirmed_trials"] = float(len(confirmation.values))
        chosen_by["choice_stands"] = float(confirmation.stands)
        for number, mean in confirmation.means.items():
            if math.isfinite(mean):  # with a failure among its seeds it has none
                told = {f"{criterion}_mean": mean, f"{criterion}_spread": confirmation.spreads[number]}
                recorder.trial_metrics(str(number), told)
    if result.evidence is not None:
        chosen_by["p_anomalies"] = result.evidence.p_anomalies
        chosen_by["combined_candidates"] = float(len(result.evidence.members))
    if (decided := result.decided()) is not None:
        chosen_by |= {
            "alarm_rate": decided.alarm_rate,
            "alarm_rate_expected": decided.expected,
            "alarm_rate_low": decided.low,
            "alarm_rate_high": decided.high,
            "alarm_threshold": decided.threshold,
            "alarms_unlabeled": float(decided.n_alarms),
            "drift": float(decided.drifted),
        }
    recorder.study_metrics(chosen_by)
    if result.aucs is not None and result.evaluation is not None:
        for number, value in result.aucs.items():
            recorder.trial_metrics(str(number), {"auc": round(value, _DIGITS)})
        figures = result.evaluation.metrics()
        recorder.study_metrics({name: round(value, _DIGITS) for name, value in figures.items()})


def finished_trials(run: Run) -> int:
    """How many trials, or starts, of a run whose folder is locked need not be run any more.

    Trainings with other seeds count as well.
    """
    try:
        study = _study_of(run)
        again = min(len(read_reseeded(study)), trainings_to_come(run))
        return again + sum(t.status in ("complete", "pruned", "failed") for t in records(study))
    except RunError:  # it begins
        return 0


def finished_starts(run: Run) -> dict[str, str]:
    """Status of every start of a tuning, in a folder that is locked, which has ended; by its number."""
    try:
        return {str(t.number): t.status for t in records(_study_of(run)) if not t.frozen}
    except RunError:  # it begins
        return {}


def _study_of(run: Run) -> optuna.Study:
    name = run.settings.study_name

    def load(found: BaseStorage) -> optuna.Study:
        if name not in optuna.get_all_study_names(found):
            raise RunError(f"{run.folder}: its study was stopped before its first trial; resume it")
        return optuna.load_study(study_name=name, storage=found)

    return run.open_study(load)
