"""What MLflow's pages show of a study: a summary in words and figures, a picture, its images."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssad_hpo.augment import NONE, augment
from ssad_hpo.experiment.certainty import how_sure
from ssad_hpo.experiment.outcome import StudyResult
from ssad_hpo.experiment.run_folder import Run, RunError
from ssad_hpo.experiment.settings import Settings
from ssad_hpo.files import read_json, reading, replaced
from ssad_hpo.search import candidates, records
from ssad_hpo.task import StudyRecorder, Task

log = logging.getLogger(__name__)

_PICTURED, _SIDE, _GAP = 6, (72, 128), 4  # images beside each other; pixels of one; between two


def dataset_of(settings: Settings, task: Task) -> dict[str, str]:
    """The images of a study as MLflow's own kind of input: what and where they are; no labels."""
    spec = {"dtype": "uint8", "shape": [-1, *task.train.shape[1:]]}
    features = json.dumps([{"type": "tensor", "tensor-spec": spec}])
    source, place = settings.source, {"tags": {"source": "images in memory"}}
    if source is not None:
        place = {"tags": {"source": source.loader, **{n: str(v) for n, v in source.arguments.items()}}}
    return {
        "name": settings.task_name,
        "digest": settings.content_hash[:32],  # as much as MLflow takes
        "source_type": "code",
        "source": json.dumps(place),
        "schema": json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}}),
        "profile": json.dumps({f"num_{name}": len(images) for name, images in task.sets().items()}),
    }


def tags_of(settings: Settings) -> dict[str, str]:
    """Tags of the run of a study: what tells it from others, and what a result depends on."""
    command = "tune" if settings.tuning is not None else "search" if settings.cluster is None else "sweep"
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    weights = {} if settings.weights_digest is None else {"weights_digest": settings.weights_digest}
    source = {"mlflow.source.name": f"ssad-hpo {command}", "mlflow.source.type": "LOCAL"}
    return {**settings.tags, **source, **weights, "versions": versions, "created": settings.created}


def tell_summary(recorder: StudyRecorder, result: StudyResult, task: Task | None = None) -> None:
    """Give MLflow the summary of a study that has ended, its settings and a picture of what was chosen.

    Args:
        task: its images, to draw the picture; without them one that is there already is shown.
    """
    run = result.run
    if run.settings.tracking_uri is None:
        return
    if task is not None and result.selected.augmentation.kind != NONE:
        try:
            _draw(run, task, result)
        except OSError as error:  # the study has ended, and does without
            log.warning("%s could not be written: %s", run.picture, error)
    recorder.artifact(run.settings_file)
    if run.picture.is_file():
        recorder.artifact(run.picture)
    recorder.study_note(summary(result))


def warn_undelivered(run: Run, trouble: str | None) -> None:
    """Warn where MLflow does not have all that it was told."""
    if count := run.undelivered():
        why = f" ({trouble})" if trouble else ""
        told = f"MLflow did not take {count} records yet{why}; `ssad-hpo sync` delivers them"
        warnings.warn(told, stacklevel=3)
    elif trouble:
        warnings.warn(f"MLflow did not take all: {trouble}", stacklevel=3)


def summary(result: StudyResult) -> str:
    """A study's choice, its figures and what is known of them, in Markdown."""
    settings, selected, criterion = result.run.settings, result.selected, result.run.settings.criterion
    count, word = len(candidates(result.study, result.run.artifacts)), settings.word
    confirmation = result.confirmation
    by = f"{criterion}: {selected.criteria[criterion]:.4g}, the lowest of {count} complete {word}s"
    lines = [
        f"**{word} {selected.number}: {_escaped(selected.title)}** was chosen without labels, by "
        f"{by if confirmation is None else _escaped(confirmation.why())}.",
    ]
    if (figures := result.evaluation) is not None:
        found = figures.metrics()
        names = {"auc_selected": "selected", "auc_combined": result.ending, "auc_random": "random"}
        names |= {"auc_oracle": "oracle", "auc_worst": "worst", "regret": "regret"}
        shown = {word: f"{found[name]:.3f}" for name, word in names.items() if name in found}
        table = (["AUC", *shown], ["---"] * (len(shown) + 1), ["", *shown.values()])
        lines.append("\n".join(f"| {' | '.join(cells)} |" for cells in table))
        lines += [f"Oracle and random are of {count} {word}s. Ground truth was read after the choice."]
    if result.run.picture.is_file():
        shows = "Normal images, and below them what the chosen augmentation makes of them"
        lines.append(f"![{shows}](artifact:{result.run.picture.name})")
    told = [] if confirmation is None else confirmation.account(word)
    told += result.evidence.account(word) if result.evidence is not None else []
    if result.evidence is not None:
        told += result.evidence.doubts(word, selected.number)
    told += how_sure(result)
    if (decided := result.decided()) is not None:
        told += decided.sentences("unlabelled images")
        told.append(
            f"the alarm threshold is a score of {decided.threshold:.4g}, for an alarm rate of "
            f"{decided.alarm_rate:.2g}"
        )
    lines += ["\n".join(f"- {_escaped(sentence)}" for sentence in told)] if told else []
    if later := read_later(result.run):
        lines += ["**Labels that came later**", "\n".join(f"- {_escaped(sentence)}" for sentence in later)]
    statuses = [trial.status for trial in records(result.study)]
    rows = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    trained = f"{settings.training.steps} steps, {settings.how}, " if settings.n_trials else ""
    lines.append(
        f"{len(statuses)} {word}s: {', '.join(f'{n} {status}' for status, n in rows.items())}. "
        f"{settings.training.encoder} encoder, {trained}seed "
        f"{settings.seed}. All settings: `settings.json` among the artifacts."
    )
    return "\n\n".join(lines)


def read_later(run: Run) -> list[str]:
    """What labels that came after a study have said of it, in sentences, the earliest first.

    Raises:
        RunError: if they cannot be read.
    """
    if not run.later.is_file():
        return []
    with reading(run.later, "cannot be read as later evaluations", "remove it", RunError):
        told = read_json(run.later)["evaluations"]
        if not all(isinstance(sentence, str) for sentence in told):
            raise ValueError("expected texts")
        return list(told)


def add_later(run: Run, sentence: str) -> None:
    """Add a sentence to these, whole or not at all."""
    text = json.dumps({"evaluations": [*read_later(run), sentence]}, indent=2) + "\n"
    try:
        with replaced(run.later) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{run.later}: cannot be written ({error.strerror})") from error


def _escaped(text: str) -> str:
    """A sentence in which Markdown sees no mark of its own."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)


def _draw(run: Run, task: Task, result: StudyResult) -> None:
    """A strip of normal images, and below each what the chosen augmentation makes of it."""
    normal = task.train[:_PICTURED]
    generator = torch.Generator().manual_seed(0)
    made = augment(normal / 255, result.selected.augmentation, generator).mul(255).round().to(torch.uint8)
    side = min(max(max(normal.shape[2:]), _SIDE[0]), _SIDE[1])
    rows = [[_image(image, side) for image in images] for images in (normal, made)]
    width, height = rows[0][0].size
    strip = Image.new("RGB", (len(normal) * (width + _GAP) - _GAP, 2 * height + _GAP), "white")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            strip.paste(image, (x * (width + _GAP), y * (height + _GAP)))
    with replaced(run.picture) as partial:
        strip.save(partial, "PNG")


def _image(image: Tensor, side: int) -> Any:
    """(C, H, W) uint8 as a picture whose longer side is `side`."""
    drawn = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).convert("RGB")
    scale = side / max(drawn.size)
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return drawn.resize((round(drawn.width * scale), round(drawn.height * scale)), way)
