"""The command `sweep`: a search on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from ssad_hpo.cli import options
from ssad_hpo.cli.commands import app
from ssad_hpo.cli.display import Display, announce, show


@app.command(
    epilog="Examples: `ssad-hpo sweep gravel/cutavg -n 32` · "
    "`ssad-hpo sweep mvtec --category cable --address auto --gpus-per-trial 0.25` · "
    "`ssad-hpo sweep --resume NAME`"
)
def sweep(
    path: options.ImagesPath = None,
    category: options.Category = None,
    anomaly: options.Anomaly = None,
    train: options.TrainFolder = None,
    unlabeled: options.UnlabeledFolder = None,
    image_size: options.ImageSize = 64,
    skip_unreadable: options.SkipUnreadable = False,
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
    augmentation: options.Kinds = None,
    ranges: options.Ranges = None,
    criterion: options.Criterion = "dsv",
    trials: options.TotalTrials = None,
    sampler: Annotated[str, typer.Option(help="tpe, random, grid or gp (one kind only).")] = "tpe",
    scheduler: Annotated[str, typer.Option(help="asha, median or none.")] = "asha",
    grid_points: options.GridPoints = 4,
    encoder: options.Encoder = "small",
    width: options.Width = 16,
    steps: options.Steps = None,
    batch_size: options.BatchSize = 32,
    learning_rate: options.LearningRate = 0.03,
    score: options.Score = "density",
    contamination: options.Contamination = None,
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    keep: options.Keep = 3,
    run: options.RunName = None,
    storage: options.Storage = None,
    tracking_uri: options.TrackingUri = "default",
    no_tracking: options.NoTracking = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run; of all else --trials and --address count.")
    ] = None,
) -> None:
    """Search on a Ray cluster: many trials at once, on as many nodes as there are."""
    from ssad_hpo.experiment import run_sweep
    from ssad_hpo.task import Training

    if resume is not None:
        options.resume(resume, path, train, trials, address)
        return
    total = 16 if trials is None else trials
    source = options.source_of(path, train, unlabeled, category, anomaly, image_size, skip_unreadable)
    training = Training(
        encoder=encoder,
        width=width,
        steps=Training.steps if steps is None else steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        score=score,  # type: ignore[arg-type]
        contamination=contamination,
        precision=precision,  # type: ignore[arg-type]
        seed=seed,
    )
    with options.kept_on_interrupt(), Display(total) as display:
        result = run_sweep(
            source,
            criterion=criterion,
            space=options.space_of(augmentation or ["cutavg"], ranges or []),
            training=training,
            n_trials=total,
            sampler=sampler,
            scheduler=scheduler,
            address=address,
            cpus_per_trial=cpus_per_trial,
            gpus_per_trial=gpus_per_trial,
            max_concurrent=max_concurrent,
            storage_path=storage_path,
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
