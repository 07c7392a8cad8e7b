"""The report: a page that needs nothing beside itself, and the pictures in it as files."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from ssad_hpo.augment import hyperparameter_of
from ssad_hpo.report.detectors import embedding_figure, images_figure, scores_figure
from ssad_hpo.report.findings import Course, Findings
from ssad_hpo.report.heat import LONGEST_SIDE, side_by_side
from ssad_hpo.report.style import name_of
from ssad_hpo.report.tables import (
    candidates_table,
    confirmed_table,
    decisions_list,
    figures_list,
    settings_list,
)
from ssad_hpo.report.trajectory import examples_figure, trajectory_figure
from ssad_hpo.report.trials import auc_figure, hyperparameters_figure, learning_curves_figure, searched
from ssad_hpo.task import Range

PAGE = "index.html"


class _Picture(NamedTuple):
    """A picture's file, and what it shows for those who cannot see it."""

    path: Path
    alt: str


class _Section(NamedTuple):
    """Pictures with a heading and a paragraph that says how to read them."""

    heading: str
    text: str
    pictures: list[_Picture]


def write_report(findings: Findings, folder: Path) -> Path:
    """Write the page and its pictures into a folder, which is replaced as a whole.

    Returns:
        The page, FOLDER/index.html.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sections = "\n".join(map(_section, _sections(findings, partial)))
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(findings.task),
        choice=_choice(findings),
        figures=confirmed_table(findings) + figures_list(findings) + decisions_list(findings),
        remarks="".join(f"<p class='remark'>{escape(remark)}</p>" for remark in findings.remarks),
        sections=sections,
        candidates=candidates_table(findings),
        settings=settings_list(findings.settings),
    )
    (partial / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder / PAGE


def _choice(findings: Findings) -> str:
    """What was chosen, by what, among how many: the paragraph below the title."""
    choice, criterion = findings.choice, name_of(findings.criterion)
    assert choice.augmentation is not None
    given = [
        f"{name_of(name)} {value:.4g}{_unit(choice.augmentation.kind, name)}"
        for name, value in choice.augmentation.hyperparameters.items()
        if not isinstance(value, Range)
    ]
    kind = name_of(choice.augmentation.kind)
    values = f" with {escape(', '.join(given))}" if given else ""
    candidates = sum(t.status == "complete" for t in findings.trials)
    among = "the only candidate" if candidates == 1 else f"the lowest of {candidates} candidates"
    by, account = f"{criterion}: {choice.value:.4g}, {among}", findings.account
    if (confirmed := findings.confirmed) is not None:
        by, account = confirmed.why, (*confirmed.account, *account)
    return (
        f"<p class='choice'><strong>Trial {choice.number}: {kind}</strong>{values}."
        f"</p><p>Chosen without labels, by {escape(by)}.</p>"
        + "".join(f"<p>{escape(told[0].upper() + told[1:])}.</p>" for told in account)
    )


def _unit(kind: str, hyperparameter: str) -> str:
    return "°" if hyperparameter_of(kind, hyperparameter).coordinate == "degrees" else ""


def _sections(findings: Findings, folder: Path) -> Iterator[_Section]:
    """Draw every picture into the folder, section by section."""
    if findings.course is not None:
        yield _course(findings, findings.course, folder)
    if findings.images:
        yield _images(findings, folder)
    if findings.spots:
        yield _spots(findings, folder)
    yield _scores(findings, folder)
    if findings.course is not None or any(trial.curve for trial in findings.trials):  # something was trained
        if findings.course is None or findings.anomalous is not None:
            yield _criterion(findings, folder)
        yield _hyperparameters(findings, folder)
    yield _embeddings(findings, folder)


def _course(findings: Findings, course: Course, folder: Path) -> _Section:
    kinds = {t.number: t.augmentation.kind for t in findings.trials if t.augmentation is not None}
    of_kinds = {
        kind: [t for t in course.trajectories if kinds[t.trial] == kind] for kind in findings.space.kinds
    }
    shown = [kind for kind, trajectories in of_kinds.items() if trajectories]
    when = "before the detectors trained, down the loss of the encoder as it comes"
    text = (
        f"How the hyperparameters of {', '.join(map(name_of, shown))} moved, by gradient, "
        f"{when if course.before else 'while the detectors trained'}. A line that runs into the edge of its "
        "panel has left what was allowed"
    )
    trained = (
        ", and a training loss near a coin's means that augmented images could not be told from normal ones"
    )
    text += f"{'' if course.before else trained}."
    pictures = []
    for kind in shown:
        hyperparameters = findings.space.kinds[kind]
        bounds = {name: value for name, value in hyperparameters.items() if isinstance(value, Range)}
        path = folder / ("trajectories.png" if len(shown) == 1 else f"trajectories-{kind}.png")
        part = replace(course, trajectories=tuple(of_kinds[kind]))
        trajectory_figure(part, bounds, findings.selected, path)
        moved = ", ".join(map(name_of, bounds))
        losses = "validation loss" if course.before else "training loss and validation loss"
        said = f"{name_of(kind)}: {moved}, {losses} over {'' if course.before else 'training '}steps"
        pictures.append(_Picture(path, said))
    if course.examples:
        text += " Beside it, the same images as the kept start changed them along its way."
        path = folder / "images-along-the-way.png"
        examples_figure(course.examples, path)
        pictures.append(_Picture(path, "; ".join(row.title for row in course.examples)))
    return _Section("The tuning's course", text, pictures)


def _images(findings: Findings, folder: Path) -> _Section:
    text = "Each augmented image is made of the normal one in the same place. Numbers are anomaly scores"
    if findings.anomalous is not None:
        text += "; frames tell the truth: solid round an anomaly, dotted round a normal image"
    pictures = []
    for row in findings.images:
        path = folder / f"images-{row.name}.png"
        images_figure(row, path)
        pictures.append(_Picture(path, row.title))
    return _Section("Images", text + ".", pictures)


def _spots(findings: Findings, folder: Path) -> _Section:
    text = (
        "The unlabeled images of the highest scores, and beside each the same with the places that look "
        "unlike those of normal images: coloured from where one of a thousand normal patches lies, in one "
        f"scale for all. Images have their own resolution, up to {LONGEST_SIDE} pixels."
    )
    pictures = []
    for rank, spots in enumerate(findings.spots, 1):
        path = folder / f"spots-{rank}.png"
        side_by_side(spots).save(path)
        pictures.append(_Picture(path, f"{spots.caption}; on the right with its heat map"))
    return _Section("Where they are anomalous", text, pictures)


def _scores(findings: Findings, folder: Path) -> _Section:
    text = (
        "Anomaly scores of the selected detector. Anomalies should lie to the right. Train images are those "
        "that it was fitted to, so unlabeled ones may lie somewhat to the right of them without being "
        "anomalous."
    )
    path, decisions = folder / "scores.png", findings.decisions
    threshold = None if decisions is None else decisions.threshold
    alone = None if findings.combined else threshold  # what several decide together is no score of one
    scores_figure(findings.scores, f"Scores of trial {findings.selected}", path, alone)
    pictures = [_Picture(path, "Histograms of the anomaly scores: " + ", ".join(findings.scores))]
    if findings.combined:
        ending = "the encoder as it comes" if findings.as_it_comes else "the combined detector"
        text += (
            f" Those of {ending}, of scores in standard deviations of the held-out images, are beside it: "
            "held-out images are normal ones that no detector has seen, so what lies beyond them is suspect."
        )
        path = folder / "scores-combined.png"
        scores_figure(findings.combined, f"Scores of {ending}", path, threshold)
        pictures.append(_Picture(path, f"Histograms of the anomaly scores of {ending}"))
    if threshold is not None:
        text += " Images to the right of the dashed line raise an alarm."
    if findings.anomalous is not None:
        unlabeled, title = findings.scores["unlabeled"], f"Unlabeled, by truth: AUC {findings.choice.auc:.3f}"
        by_truth = {
            "unlabeled, normal": unlabeled[~findings.anomalous],
            "unlabeled, anomalous": unlabeled[findings.anomalous],
        }
        path = folder / "scores-truth.png"
        scores_figure(by_truth, title, path)
        pictures.append(_Picture(path, f"Histograms of the anomaly scores. {title}"))
    return _Section("Scores", text, pictures)


def _criterion(findings: Findings, folder: Path) -> _Section:
    trials, name = findings.trials, name_of(findings.criterion)
    heading, pictures = f"{name} in the course of the trainings", []
    text = f"{name} at each evaluation. Pruned trials end early and do not compete."
    if findings.anomalous is not None:
        known = (
            "Where the criterion knows the good detectors, points fall from left to right; the leftmost one "
        )
        if findings.course is None:
            heading, text = f"{name}, truth and training", f"{known}is selected. Beside it, {text}"
        else:
            heading, text = f"{name} and truth", f"{known}is kept."
        path = folder / "auc.png"
        auc_figure(trials, findings.selected, findings.criterion, path)
        pictures.append(_Picture(path, f"{name} against AUC, a point per candidate"))
    if findings.course is None:
        path = folder / "learning-curves.png"
        learning_curves_figure(trials, findings.selected, findings.criterion, path)
        pictures.append(_Picture(path, f"{name} over training steps, a line per trial"))
    return _Section(heading, text, pictures)


def _hyperparameters(findings: Findings, folder: Path) -> _Section:
    space, name = findings.space, name_of(findings.criterion)
    text = "Every trial at its hyperparameters; dark is a low, good value, in all pictures the same."
    heading = "Hyperparameters tried"
    if findings.course is not None:
        heading, text = "Hyperparameters learned", text.replace("trial at its", "start at its learned")
    fixed = [name_of(kind) for kind in space.kinds if not searched(space, kind)]
    if fixed:
        text += f" Nothing was searched of {', '.join(fixed)}."
    pictures = []
    for kind in space.kinds:
        for names in searched(space, kind):
            file = "-".join(["tried", kind, *(n for n in names if n)]).replace("_", "-")
            path = folder / f"{file}.png"
            hyperparameters_figure(
                findings.trials, space, kind, names, findings.selected, findings.criterion, path
            )
            shown = " and ".join(name_of(n) for n in names if n)
            pictures.append(_Picture(path, f"{name_of(kind)}: {shown} of every trial, coloured by {name}"))
    return _Section(heading, text, pictures)


def _embeddings(findings: Findings, folder: Path) -> _Section:
    text = (
        "Embeddings in their first two principal components, fitted to all sets of a trial together. Where "
        "f_aug imitates the anomalies, augmented and anomalous images lie together, apart from the rest."
    )
    pictures = []
    for rank, sets in (("best", findings.best), ("worst", findings.worst)):
        if sets is not None:
            value = next(t.value for t in findings.trials if t.number == sets.trial)
            title = f"Trial {sets.trial}, the {rank} {name_of(findings.criterion)} ({value:.3g})"
            path = folder / f"embeddings-{rank}.png"
            embedding_figure(sets, title, path, findings.anomalous)
            pictures.append(_Picture(path, f"Map of the embeddings: {title}"))
    return _Section("Embeddings", text, pictures)


def _section(section: _Section) -> str:
    pictures = "".join(
        f"<a href='{picture.path.name}'><img alt='{escape(picture.alt)}' src='data:image/png;base64,"
        f"{base64.b64encode(picture.path.read_bytes()).decode()}'></a>"
        for picture in section.pictures
    )
    return (
        f"<section><h2>{escape(section.heading)}</h2><p>{escape(section.text)}</p>"
        f"<div class='pictures'>{pictures}</div></section>"
    )
