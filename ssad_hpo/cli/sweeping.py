"""The command `sweep`: a search on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from ssad_hpo.cli.commands import app, go_on, kept_on_interrupt
from ssad_hpo.cli.display import Display, announce, show
from ssad_hpo.cli.options import (
    Anomaly,
    BatchSize,
    Category,
    Contamination,
    Criterion,
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
    TotalTrials,
    TrackingUri,
    Train,
    Unlabeled,
    Width,
    fractions_of,
    source_of,
    space_of,
)


@app.command(
    epilog="Examples: `ssad-hpo sweep gravel/cutavg -n 32` · "
    "`ssad-hpo sweep mvtec --category cable --address auto --gpus-per-trial 0.25` · "
    "`ssad-hpo sweep --resume NAME`"
)
def sweep(
    path: Place = None,
    category: Category = None,
    anomaly: Anomaly = None,
    train: Train = None,
    unlabeled: Unlabeled = None,
    image_size: ImageSize = 64,
    skip_unreadable: SkipUnreadable = False,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster: auto or HOST:PORT. By default a Ray of its own, on this machine."),
    ] = None,
    cpus_per_trial: Annotated[float, typer.Option(help="Processors of a trial, and its threads.")] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(help="Share of a GPU; 0.25 lets four trials share one. Above 0 trains there.")
    ] = 0.0,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Trials at once; as many as fit by default.")
    ] = None,
    storage_path: Annotated[
        str | None,
        typer.Option(help="A folder or URI that all nodes reach, for checkpoints; in the run folder."),
    ] = None,
    augmentation: Kinds = None,
    ranges: Ranges = None,
    criterion: Criterion = "dsv",
    trials: TotalTrials = None,
    sampler: Sampler = "tpe",
    scheduler: Annotated[str, typer.Option(help="asha, median or none.")] = "asha",
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
    run: RunName = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = "default",
    no_tracking: NoTracking = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run; of all else --trials and --address count.")
    ] = None,
) -> None:
    """Search on a Ray cluster: many trials at once, on as many nodes as there are."""
    from ssad_hpo.experiment import run_sweep
    from ssad_hpo.task import Training

    if resume is not None:
        go_on(resume, path, train, trials, resumed_by="sweep", address=address)
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
    with kept_on_interrupt("sweep"), Display(total) as display:
        result = run_sweep(
            source,
            criterion=criterion,
            space=space_of(augmentation or ["cutavg"], ranges or []),
            training=training,
            n_trials=total,
            sampler=sampler,
            scheduler=scheduler,
            address=address,
            cpus_per_trial=cpus_per_trial,
            gpus_per_trial=gpus_per_trial,
            max_concurrent=max_concurrent,
            storage_path=storage_path,
            reduction_factor=reduction_factor,
            grid_points=grid_points,
            seed=seed,
            keep=keep,
            run=run,
            storage=storage,
            tracking_uri=None if no_tracking else tracking_uri,
            listeners=[display],
            announce=announce,
        )
    show(result)
