"""The command that tunes by gradient."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from ssad_hpo.cli.commands import app, kept_on_interrupt
from ssad_hpo.cli.display import TuningDisplay, show
from ssad_hpo.cli.options import (
    Anomaly,
    Category,
    Contamination,
    Device,
    Encoder,
    ImageSize,
    NoTracking,
    Place,
    Ranges,
    RunName,
    Score,
    SkipUnreadable,
    Threads,
    TrackingUri,
    Train,
    Unlabeled,
    Width,
    source_of,
    space_of,
)


@app.command(
    epilog="Examples: `ssad-hpo tune gravel/cutdiff -a cutdiff` · "
    "`ssad-hpo tune --train good/ --unlabeled stream/ -a cutpaste --range cutpaste.angle=0` · "
    "`ssad-hpo tune --resume NAME`"
)
def tune(
    path: Place = None,
    category: Category = None,
    anomaly: Anomaly = None,
    train: Train = None,
    unlabeled: Unlabeled = None,
    image_size: ImageSize = 64,
    skip_unreadable: SkipUnreadable = False,
    augmentation: Annotated[
        list[str] | None, typer.Option("--augmentation", "-a", help="The one kind of f_aug that is tuned.")
    ] = None,
    ranges: Ranges = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Goes down: two_sided_alignment, soft_alignment, smooth_alignment, mmd or mmd_normalised."
        ),
    ] = None,
    order: Annotated[
        int | None, typer.Option(help="Of the gradient: 1, or 2 through the virtual step as well.")
    ] = None,
    starts: Annotated[
        list[str] | None,
        typer.Option(
            help="Shares of the first hyperparameter's range, 0.4,0.9, or one start by its values, "
            "patch_area=0.02,patch_aspect=1; repeatable."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each start, the warm start included.")
    ] = None,
    detector_steps: Annotated[
        int | None, typer.Option(help="Training steps to each step of the hyperparameters.")
    ] = None,
    warm_start: Annotated[
        float | None, typer.Option(help="Share of the steps before the hyperparameters move.")
    ] = None,
    choose_by: Annotated[
        str | None, typer.Option(help="What keeps a start, the lowest: a criterion, or validation_loss.")
    ] = None,
    encoder: Encoder = "small",
    width: Width = 16,
    batch_size: Annotated[int | None, typer.Option(help="Normal images a step.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of SGD, which trains the detector.")] = 0.03,
    score: Score = "density",
    contamination: Contamination = None,
    seed: Annotated[int, typer.Option(help="Of every training.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    run: RunName = None,
    tracking_uri: TrackingUri = "default",
    no_tracking: NoTracking = False,
    resume: Annotated[str | None, typer.Option(help="Go on with this run; nothing else counts.")] = None,
) -> None:
    """Tune one augmentation by gradient while its detector trains, without labels.

    From several starting points in turn, of which one is kept.
    """
    from ssad_hpo.bilevel import DEFAULT_TRAINING, CollapseWarning, Tuning
    from ssad_hpo.experiment import resume_tuning, run_tuning
    from ssad_hpo.task import Augmentation, Training

    with kept_on_interrupt("tune"), TuningDisplay() as display, warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # `show` tells them, of every start
        if resume is not None:
            if path is not None or train is not None:
                raise typer.BadParameter("--resume takes its images from the run; leave PATH and --train out")
            result = resume_tuning(resume, listeners=[display], announce=display.announce)
        else:
            source = source_of(
                path,
                train,
                unlabeled,
                category=category,
                anomaly=anomaly,
                image_size=image_size,
                skip_unreadable=skip_unreadable,
            )
            kinds = augmentation or []
            if len(kinds) != 1:
                given = ", ".join(kinds) or "none"
                raise typer.BadParameter(f"--augmentation: expected the one kind to tune, got {given}")
            space = space_of(kinds, ranges or [])
            told = {
                "loss": loss,
                "order": order,
                "starts": _starts(starts) if starts else None,
                "detector_steps": detector_steps,
                "warm_start": warm_start,
                "choose_by": choose_by,
            }
            result = run_tuning(
                source,
                Augmentation(kinds[0], space.kinds[kinds[0]]),
                tuning=Tuning(**{name: value for name, value in told.items() if value is not None}),  # type: ignore[arg-type]
                training=Training(
                    encoder=encoder,
                    width=width,
                    steps=DEFAULT_TRAINING.steps if steps is None else steps,
                    batch_size=DEFAULT_TRAINING.batch_size if batch_size is None else batch_size,
                    learning_rate=learning_rate,
                    evaluate_at=(1.0,),
                    score=score,  # type: ignore[arg-type]
                    contamination=contamination,
                    seed=seed,
                ),
                run=run,
                device=device,
                threads=threads,
                listeners=[display],
                announce=display.announce,
                tracking_uri=None if no_tracking else tracking_uri,
            )
    show(result)


def _starts(given: list[str]) -> tuple[float | dict[str, float], ...]:
    """Starting points: shares of the first range, several in one text, or the values of one by name."""
    starts: list[float | dict[str, float]] = []
    for text in given:
        try:
            if "=" in text:
                pairs = [pair.partition("=") for pair in text.split(",")]
                starts.append({name.strip(): float(value) for name, _, value in pairs})
            else:
                starts.extend(float(share) for share in text.split(","))
        except ValueError as error:
            raise typer.BadParameter(
                f"--starts {text}: expected 0.4,0.9 or NAME=VALUE,... ({error})"
            ) from error
    return tuple(starts)
