"""The report of a study: gathers what it shows, has it drawn, hands it to MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ssad_hpo import data
from ssad_hpo.augment import NONE, augment
from ssad_hpo.calibration import Decided
from ssad_hpo.experiment.certainty import how_sure
from ssad_hpo.experiment.confirming import Confirmation
from ssad_hpo.experiment.heatmaps import check_heatmaps, spots_of
from ssad_hpo.experiment.outcome import StudyResult, load_task, open_result
from ssad_hpo.experiment.run_folder import Run, locked, open_run
from ssad_hpo.experiment.settings import described, method_described
from ssad_hpo.experiment.telling import warn_undelivered
from ssad_hpo.experiment.tuning import read_trajectory
from ssad_hpo.files import folder_locked, unmakeable
from ssad_hpo.report import (
    Confirmed,
    Course,
    Decisions,
    EmbeddingSets,
    Findings,
    ImageRow,
    Spots,
    Trajectory,
    Trial,
    write_report,
)
from ssad_hpo.search import Candidate, Kept, TrialRecord, candidates, records
from ssad_hpo.task import Augmentation, DetectorError, Hyperparameters, Task

REPORT = "report"  # the folder, in the run's and among MLflow's artifacts
_IMAGES = 8  # in a row


def report_run(
    run: str | Path, *, task: Task | None = None, out: str | Path | None = None, trust_addresses: bool = False
) -> Path:
    """Write a study's report into its run folder, and hand its files to MLflow.

    The page needs nothing beside itself; its pictures lie beside it as PNG files. What needs ground
    truth is left out where there is none; so are the images of a task that lives in memory, unless it
    is given. A report that is there already is replaced.

    Args:
        run: the run folder, or its name below runs/.
        task: the task, if the study was started on one in memory.
        out: a folder to be made for it instead, as of a run that may only be read; MLflow gets nothing then.
        trust_addresses: vouch for the run's addresses; see `open_run`.

    Returns:
        The page, RUN/report/index.html or OUT/index.html.

    Raises:
        RunError: if there is no such run, another process works on it, it cannot be written, or its images
            have changed. ValueError: if it has no candidate yet, nothing can be made at `out`, or for an
            address that needs `trust_addresses`.
    """
    elsewhere = None if out is None else Path(os.path.abspath(out))
    if elsewhere is not None and (reason := unmakeable(elsewhere)) is not None:
        raise ValueError(f"out: {elsewhere}: {reason}")
    opened = open_run(run, trust_addresses=trust_addresses)
    opened.check_addresses("storage")
    if elsewhere is None:
        opened.check_addresses("tracking_uri")
        with locked(opened.folder):  # said before the work, if that cannot be
            pass
    at_hand = task is not None or opened.settings.source is not None
    shown = load_task(opened, task) if at_hand else None
    findings = _gather(open_result(run, trust_addresses=trust_addresses), shown)
    if elsewhere is not None:
        with folder_locked(elsewhere.parent):
            if (reason := unmakeable(elsewhere)) is not None:  # another process was faster
                raise ValueError(f"out: {elsewhere}: {reason}")
            return write_report(findings, elsewhere)
    with locked(opened.folder), opened.open_recorder() as recorder:
        page = write_report(findings, opened.folder / REPORT)
        for file in sorted(page.parent.iterdir()):
            recorder.artifact(file, REPORT)
    warn_undelivered(opened, recorder.trouble)
    return page


def _gather(result: StudyResult, task: Task | None) -> Findings:
    run, selected = result.run, result.selected
    source, criterion = run.settings.source, run.settings.criterion
    anomalous, remarks = None, []
    if result.aucs is not None and source is not None:
        # The choice was made by `open_result`, without this.
        anomalous = np.asarray(data.read_labels(source)) == 1
    competing = {c.number: c for c in candidates(result.study, run.artifacts)}
    worst = max(competing.values(), key=lambda c: (c.criteria[criterion], c.number))
    kept = selected.kept()
    scores = _scores(selected, kept, task)
    if "train" not in scores:
        remarks.append("The scores of train and augmented images are missing: they need what is not at hand.")
    trials = records(result.study)
    missing = run.settings.n_trials - len(trials)
    evidence, word = result.evidence, run.settings.word
    combined = result.combined
    final = scores["unlabeled"] if combined is None else combined.scores.numpy()
    doubts = [] if evidence is None else evidence.doubts(word, selected.number)
    remarks += [f"{told[0].upper()}{told[1:]}." for told in (*doubts, *how_sure(result))]
    if run.settings.tuning is not None:
        if missing > 0:
            remarks.append(
                f"{missing} of {run.settings.n_trials} starts are not done yet, and are not shown."
            )
        remarks.extend(f"Start {t.number} failed: {t.reason}." for t in trials if t.status == "failed")
    remarks.extend(trials[selected.number].signs)
    if task is None:
        remarks.append("The images lived in memory when the study was made, and are not shown.")
    return Findings(
        task=run.settings.task_name,
        criterion=criterion,
        space=run.settings.method.space,
        trials=_trials(result, trials, competing),
        selected=selected.number,
        settings=_settings(run, task),
        scores=scores,
        best=_sets(selected.number, kept),
        worst=_sets(worst.number, worst.kept()) if len(competing) > 1 else None,
        images=() if task is None else _images(task, selected, final, anomalous),
        anomalous=anomalous,
        figures={} if result.evaluation is None else result.evaluation.metrics(),
        remarks=tuple(remarks),
        combined={} if combined is None else {"held-out": combined.held_out.numpy(), "unlabeled": final},
        account=() if evidence is None else tuple(evidence.account(word)),
        spots=_spots(result, task, final),
        course=_course(run, selected, list(competing.values()), task),
        confirmed=_confirmed(result.confirmation, word),
        decisions=_decisions(result.decided(), _who(result)),
        as_it_comes=evidence is not None and evidence.as_it_comes,
    )


def _who(result: StudyResult) -> str:
    """What the study ends with, and decides by."""
    word, evidence = result.run.settings.word, result.evidence
    if evidence is not None and evidence.as_it_comes:
        return f"{word} {evidence.members[0]}, the encoder as it comes,"
    return f"{word} {result.selected.number}" if result.combined is None else "the combined detector"


def _decisions(found: Decided | None, who: str) -> Decisions | None:
    if found is None:
        return None
    figures = {
        "alarms": f"{found.n_alarms} of {found.n_images}",
        "threshold": f"{found.threshold:.4g}",
        "alarm rate": f"{100 * found.alarm_rate:.2g} %",
        "expected": f"{100 * found.expected:.2g} %",
        "90 % range": f"{100 * found.low:.2g}–{100 * found.high:.2g} %",
    }
    account = (f"{who} decides", *found.sentences("unlabelled images"))
    return Decisions(found.threshold, figures, account, found.drifted)


def _confirmed(found: Confirmation | None, word: str) -> Confirmed | None:
    if found is None:
        return None
    values = {n: (*each, found.means[n], found.spreads[n]) for n, each in found.values.items()}
    return Confirmed(found.seeds, values, found.why(), tuple(found.account(word)))


def _spots(result: StudyResult, task: Task | None, scores: NDArray[np.floating]) -> tuple[Spots, ...]:
    """The unlabelled images of the highest scores with their heat maps, where these can be had."""
    if task is None:
        return ()
    try:
        check_heatmaps(result, task)
        detector = result.detector()
    except (ValueError, OSError, DetectorError):  # an encoder without maps, a detector that was not kept
        return ()
    settings = result.run.settings
    files = None if settings.source is None else data.unlabeled_files(settings.source)
    ranking = np.argsort(-scores, kind="stable")[: min(_IMAGES, len(scores) // 2)]
    return spots_of(detector, task, scores, ranking.tolist(), files, settings.bit_depth)


def _course(run: Run, selected: Candidate, starts: Sequence[Candidate], task: Task | None) -> Course | None:
    """How a tuning's starts moved, with images along the way of the selected one; None of a search."""
    tuning, steps = run.settings.tuning, run.settings.training.steps
    if tuning is None:
        return None
    trajectories, examples = [], []
    for start in starts:
        if start.augmentation.kind == NONE:  # it moved nowhere
            continue
        way, learned = read_trajectory(start), start.augmentation.hyperparameters
        points: list[Hyperparameters] = [outer.hyperparameters for outer in way]
        points.append({name: learned[name] for name in way[0].hyperparameters})
        trajectories.append(
            Trajectory(
                trial=start.number,
                steps=np.array([outer.step for outer in way]),
                hyperparameters={n: np.array([point[n] for point in points]) for n in points[0]},
                training_loss=np.array([outer.training_loss for outer in way], dtype=float),
                validation_loss=np.array([outer.validation_loss for outer in way]),
            )
        )
        if start.number == selected.number and task is not None:
            normal = task.train[:_IMAGES]
            examples.append(ImageRow("normal", "Normal, from train", normal.numpy()))
            for place in sorted({round(share * len(way)) for share in (0, 0.25, 0.5, 1)}):
                augmentation = Augmentation(start.augmentation.kind, {**learned, **points[place]})
                when = "at the end" if place == len(way) else f"at step {way[place].step}"
                values = ", ".join(f"{n.replace('_', ' ')} {value:.3g}" for n, value in points[place].items())
                images = _augmented(normal, augmentation).numpy()
                examples.append(ImageRow(f"step-{place}", f"Augmented {when}: {values}", images))
    loss, warm, before = str(tuning.loss), tuning.warm_start_steps(steps), tuning.steps_before
    return Course(loss, warm, before or steps, tuple(trajectories), tuple(examples), bool(before))


def _trials(
    result: StudyResult, kept: Sequence[TrialRecord], competing: Mapping[int, Candidate]
) -> tuple[Trial, ...]:
    """Every trial that began, as the report shows it."""
    settings, aucs = result.run.settings, result.aucs or {}
    again = {t.repeats: t.number for t in kept if t.repeats is not None}
    trials = []
    for trial in kept:
        if trial.status == "waiting":
            continue
        number, reason = trial.number, trial.reason
        status = "interrupted" if trial.status == "running" else trial.status
        if status == "pruned":
            steps = settings.training.steps
            before = "trained before" if settings.tuning is None else "stopped before its training"
            reason = f"stopped at step {max(trial.curve)} of {steps}" if trial.curve else before
        elif status == "interrupted":
            reason = reason or "its process ended"
            first = number if trial.repeats is None else trial.repeats
            if again.get(first, number) > number:
                reason += f"; run again as trial {again[first]}"
        elif status == "complete":
            reason = " ".join(trial.signs) or None
        trials.append(
            Trial(
                number=number,
                status=status,
                augmentation=trial.augmentation,
                value=competing[number].criteria[settings.criterion] if number in competing else None,
                curve=trial.curve,
                auc=aucs.get(number),
                reason=reason,
            )
        )
    return tuple(trials)


def _sets(number: int, kept: Kept) -> EmbeddingSets:
    sets = kept.embeddings
    return EmbeddingSets(number, sets.train.numpy(), sets.augmented.numpy(), sets.unlabeled.numpy())


def _scores(selected: Candidate, kept: Kept, task: Task | None) -> dict[str, NDArray[np.floating]]:
    """Scores by set; the unlabelled images' alone where the rest would need a detector or images gone."""
    unlabeled, detector = {"unlabeled": kept.scores}, kept.detector
    if kept.held_out is not None:
        unlabeled = {"held-out": kept.held_out, **unlabeled}
    if detector is None:
        return unlabeled
    if detector.training.score == "density":
        train = detector.density_score(kept.embeddings.train)
        augmented = detector.density_score(kept.embeddings.augmented)
    elif task is not None:
        train = detector.score(task.train)
        used = detector.augmentation  # by its criteria, also where the encoder is as it came
        shown = used if isinstance(used, Augmentation) else selected.augmentation
        augmented = detector.score(_augmented(task.train, shown))
    else:
        return unlabeled
    return {"train": train.numpy(), "augmented": augmented.numpy(), **unlabeled}


def _augmented(images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Augmented copies, uint8; always the same, and with patches always in the same places."""
    generator = torch.Generator().manual_seed(0)
    copies = [augment(block / 255, augmentation, generator) for block in images.split(256)]
    return torch.cat(copies).mul(255).round().to(torch.uint8)


def _images(
    task: Task, selected: Candidate, scores: NDArray[np.floating], anomalous: NDArray[np.bool_] | None
) -> tuple[ImageRow, ...]:
    normal = task.train[:_IMAGES]
    kind = selected.augmentation.kind
    rows = [ImageRow("normal", "Normal, from train", normal.numpy())]
    if kind != NONE:
        changed = _augmented(normal, selected.augmentation).numpy()
        rows.append(ImageRow("augmented", f"Augmented, as trial {selected.number} ({kind}) does", changed))
    ranking, count = np.argsort(-scores, kind="stable"), min(_IMAGES, len(scores) // 2)
    for name, places in (("highest", ranking[:count]), ("lowest", ranking[::-1][:count])):
        truth = None if anomalous is None else anomalous[places]
        images = task.unlabeled[torch.from_numpy(places.copy())].numpy()
        rows.append(ImageRow(name, f"Unlabeled, {name} scores", images, scores[places], truth))
    return tuple(rows)


def _settings(run: Run, task: Task | None) -> dict[str, str]:
    """What the study was run with, as texts by heading."""
    settings, training = run.settings, run.settings.training
    texts = {"task": settings.task_name}
    if task is not None:
        channels, height, width = task.train.shape[1:]
        texts["images"] = (
            f"{len(task.train)} train, {len(task.unlabeled)} unlabeled, "
            + ("" if task.held_out is None else f"{len(task.held_out)} held out, ")
            + f"{width} × {height} pixels, "
            + ("grey" if channels == 1 else "colour")
        )
    if settings.source is not None:
        texts["source"] = f"{settings.source.loader}: " + ", ".join(
            f"{name} {value if isinstance(value, str) else json.dumps(value)}"
            for name, value in settings.source.arguments.items()
            if value is not None
        )
    texts |= {f"space of {kind}": text for kind, text in described(settings.method.space).items()}
    return {
        **texts,
        **method_described(settings),
        # All fields, so that a new one is shown as well.
        "training": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(training).items()),
        "machine": f"{settings.device}, {settings.threads} threads",
        "study": f"{settings.study_name}, begun {settings.created}",
        "run folder": str(run.folder),
        "versions": ", ".join(f"{name} {version}" for name, version in settings.versions.items()),
    }
