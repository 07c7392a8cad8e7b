"""The commands: each parses, calls `ssad_hpo.experiment`, prints."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ssad_hpo.cli.display import Display, announce, command, run_name, say, show, show_ranking, warn
from ssad_hpo.cli.options import (
    Anomaly,
    BatchSize,
    Category,
    Contamination,
    Criterion,
    Device,
    Encoder,
    EvaluateAt,
    GridPoints,
    ImageSize,
    Keep,
    Kinds,
    LearningRate,
    NoTracking,
    Place,
    Precision,
    Ranges,
    ReductionFactor,
    RunName,
    Sampler,
    Score,
    Seed,
    SkipUnreadable,
    Steps,
    Storage,
    Threads,
    TotalTrials,
    TrackingUri,
    Train,
    Trials,
    Unlabeled,
    Width,
    fractions_of,
    source_of,
    space_of,
)

app = typer.Typer(
    name="ssad-hpo",
    help="Tune self-supervised anomaly detection without labels.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


_HARD_TASK = "gravel/cutpaste"


@app.command(epilog="Example: `ssad-hpo demo --seed 3`")
def demo(
    hard: Annotated[bool, typer.Option("--hard", help="A harder task: pasted patches.")] = False,
    trials: Trials = 16,
    seed: Annotated[int, typer.Option(help="Of the images, the sampler and every training.")] = 0,
    threads: Threads = None,
    run: RunName = None,
    tracking_uri: TrackingUri = "default",
    no_tracking: NoTracking = False,
) -> None:
    """Search on an embedded texture with known anomalies, then compare the choice with the truth.

    The task, grey patches on gravel, is one that is known to be clear; `--hard` takes pasted patches,
    which look like gravel themselves.
    """
    from ssad_hpo.data import Source, builtin
    from ssad_hpo.experiment import TASK, run_study

    name = _HARD_TASK if hard else TASK
    source = builtin(name)
    source = Source(source.loader, {**source.arguments, "seed": seed})
    kind = name.partition("/")[2]
    with kept_on_interrupt(), Display(trials) as display:
        result = run_study(
            source,
            space=kind,
            n_trials=trials,
            seed=seed,
            run=run,
            threads=threads,
            listeners=[display],
            announce=announce,
            tracking_uri=None if no_tracking else tracking_uri,
        )
    show(result)


@app.command(
    epilog="Examples: `ssad-hpo search mvtec --category cable -a cutout -a cutpaste` · "
    "`ssad-hpo search --train good/ --unlabeled stream/` · `ssad-hpo search grass/cutdiff` · "
    "`ssad-hpo search --resume NAME`"
)
def search(
    path: Place = None,
    category: Category = None,
    anomaly: Anomaly = None,
    train: Train = None,
    unlabeled: Unlabeled = None,
    image_size: ImageSize = 64,
    skip_unreadable: SkipUnreadable = False,
    augmentation: Kinds = None,
    ranges: Ranges = None,
    criterion: Criterion = "dsv",
    trials: TotalTrials = None,
    sampler: Sampler = "tpe",
    pruner: Annotated[str, typer.Option(help="none, asha or median.")] = "none",
    reduction_factor: ReductionFactor = 4,
    grid_points: GridPoints = 4,
    encoder: Encoder = "small",
    width: Width = 16,
    steps: Steps = None,
    evaluate_at: EvaluateAt = None,
    batch_size: BatchSize = 32,
    learning_rate: LearningRate = 0.03,
    score: Score = "density",
    contamination: Contamination = None,
    precision: Precision = "auto",
    seed: Seed = 0,
    keep: Keep = 3,
    device: Device = "cpu",
    threads: Threads = None,
    run: RunName = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = "default",
    no_tracking: NoTracking = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run; of all else only --trials counts.")
    ] = None,
) -> None:
    """Train detectors with different augmentations and choose one, without labels."""
    from ssad_hpo.experiment import run_study
    from ssad_hpo.task import Training

    if resume is not None:
        go_on(resume, path, train, trials, resumed_by="search")
        return
    total = 16 if trials is None else trials
    source = source_of(
        path,
        train,
        unlabeled,
        category=category,
        anomaly=anomaly,
        image_size=image_size,
        skip_unreadable=skip_unreadable,
    )
    training = Training(
        encoder=encoder,
        width=width,
        steps=Training.steps if steps is None else steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_at=fractions_of(evaluate_at),
        score=score,  # type: ignore[arg-type]
        contamination=contamination,
        precision=precision,  # type: ignore[arg-type]
        seed=seed,
    )
    with kept_on_interrupt(), Display(total) as display:
        result = run_study(
            source,
            criterion=criterion,
            space=space_of(augmentation or ["cutavg"], ranges or []),
            training=training,
            n_trials=total,
            sampler=sampler,
            pruner=pruner,
            reduction_factor=reduction_factor,
            grid_points=grid_points,
            seed=seed,
            keep=keep,
            run=run,
            storage=storage,
            device=device,
            threads=threads,
            listeners=[display],
            announce=announce,
            tracking_uri=None if no_tracking else tracking_uri,
        )
    show(result)


def go_on(
    run: str,
    path: str | None,
    train: Path | None,
    trials: int | None,
    *,
    resumed_by: str,
    address: str | None = None,
) -> None:
    """Go on with a search or a sweep, and show its result."""
    from ssad_hpo.experiment import open_run, resume_study

    if path is not None or train is not None:
        raise typer.BadParameter("--resume takes its images from the run; leave PATH and --train out")
    total = trials or open_run(run).settings.n_trials
    with kept_on_interrupt(resumed_by), Display(total) as display:
        result = resume_study(run, n_trials=trials, address=address, listeners=[display], announce=announce)
    show(result)


@app.command(epilog="Example: `ssad-hpo evaluate gravel-cutavg-20261123-101500-1f3a`")
def evaluate(run: Annotated[str, typer.Argument(help="A run folder, or its name below runs/.")]) -> None:
    """Compare a study's choice with the truth, where there is one, and write it to MLflow."""
    from ssad_hpo.experiment import evaluate_run

    show(evaluate_run(run))


@app.command(epilog="Example: `ssad-hpo report gravel-cutavg-20261123-101500-1f3a`")
def report(run: Annotated[str, typer.Argument(help="A run folder, or its name below runs/.")]) -> None:
    """Write a page with the choice, its figures and images into the run folder, and to MLflow."""
    import os

    from ssad_hpo.experiment import report_run

    say(f"report in {os.path.relpath(report_run(run))}")


@app.command(epilog="Example: `ssad-hpo sync gravel-cutavg-20261123-101500-1f3a`")
def sync(run: Annotated[str, typer.Argument(help="A run folder, or its name below runs/.")]) -> None:
    """Deliver to MLflow what it could not take while the study ran."""
    from ssad_hpo.experiment import sync_run

    result = sync_run(run)
    say(f"{result.delivered} records delivered, {result.remaining} remain")
    for reason in result.refused:
        warn(f"MLflow refused: {reason}")
    if result.error:
        warn(result.error)
    if result.remaining or result.refused:
        raise typer.Exit(1)


@app.command(epilog="Example: `ssad-hpo select runs/NAME/artifacts/*/arrays.npz --by sel`")
def select(
    files: Annotated[
        list[Path], typer.Argument(help="npz files: train, augmented, unlabeled embeddings and scores.")
    ],
    by: Annotated[str, typer.Option(help="A criterion, or mc, hits or sel.")] = "dsv",
) -> None:
    """Choose among detectors that were trained already, by any label-free selector."""
    from ssad_hpo.search import select_detectors

    show_ranking(select_detectors(files, by))


@app.command(epilog="Example: `ssad-hpo score NAME new/ > scores.csv`")
def score(
    place: Annotated[
        str, typer.Argument(metavar="RUN-or-DETECTOR", help="A run, or the folder of a detector.")
    ],
    paths: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    out: Annotated[Path | None, typer.Option(help="A CSV file; standard output by default.")] = None,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "cpu",
) -> None:
    """Score new images with a run's chosen detector: a CSV of path and score, higher is more anomalous."""
    import csv

    from ssad_hpo.experiment import load_detector, score_images

    rows = list(score_images(load_detector(place, device), paths, skip_unreadable=skip_unreadable))
    with out.open("w", newline="") if out else _stdout() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "score"])
        writer.writerows((str(path), repr(value)) for path, value in rows)
    if out:
        say(f"{len(rows)} scores in {out}")


def main() -> None:
    """The entry point: wrong usage and bad input end with one sentence and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        warn(error.format_message() if hasattr(error, "format_message") else str(error))
        sys.exit(2)
    except (ValueError, OSError) as error:
        warn(str(error))
        sys.exit(2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences for the user; those of libraries stay as they are."""
    if "ssad_hpo" in Path(filename).parts:
        warn(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


@contextlib.contextmanager
def kept_on_interrupt(resumed_by: str = "search") -> Iterator[None]:
    """On Ctrl-C in a study, say which command goes on; if no detector could be trained, say why."""
    from ssad_hpo.experiment import StudyInterrupted
    from ssad_hpo.task import DetectorError

    try:
        yield
    except DetectorError as error:
        warn(str(error))
        raise typer.Exit(1) from None
    except StudyInterrupted as stopped:
        name = run_name(stopped.run)
        warn(f"stopped; all that is done is kept. Go on with: {command()} {resumed_by} --resume {name}")
        raise typer.Exit(130) from None


def _stdout() -> Any:
    return contextlib.nullcontext(sys.stdout)
