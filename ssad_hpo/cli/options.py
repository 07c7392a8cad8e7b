"""The options that several commands have in common, and what is made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssad_hpo.cli.display import Display, announce, command, run_name, show, warn

if TYPE_CHECKING:
    from ssad_hpo.data import Source
    from ssad_hpo.task import SearchSpace

Trials = Annotated[int, typer.Option("--trials", "-n", help="Candidates to train.")]
Seed = Annotated[int, typer.Option(help="Of the sampler and of every training.")]
Threads = Annotated[int | None, typer.Option(help="Processor threads for training; all by default.")]
RunName = Annotated[str | None, typer.Option("--run", help="Run folder: a path, or a name below runs/.")]
TrackingUri = Annotated[
    str, typer.Option(help="MLflow's address; 'default' is MLFLOW_TRACKING_URI or sqlite:///mlflow.db.")
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Write nothing to MLflow.")]
ImagesPath = Annotated[
    str | None,
    typer.Argument(help="A folder in the layout of MVTec AD, or a built-in name: gravel/cutavg."),
]
Category = Annotated[str | None, typer.Option(help="Of a folder that has several.")]
Anomaly = Annotated[str | None, typer.Option(help="Only test/good and test/ANOMALY: a benchmark pair.")]
TrainFolder = Annotated[Path | None, typer.Option(help="A folder of normal images; goes with --unlabeled.")]
UnlabeledFolder = Annotated[Path | None, typer.Option(help="A folder with the unlabelled mixture.")]
ImageSize = Annotated[int, typer.Option(help="Pixels, of images from folders.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and say so.")
]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--augmentation", "-a", help="A kind of f_aug to search; may be repeated. cutavg."),
]
Ranges = Annotated[
    list[str] | None,
    typer.Option("--range", help="cutavg.patch_area=0.01:0.1 or cutavg.patch_aspect=1; repeatable."),
]
Criterion = Annotated[str, typer.Option(help="What chooses, without labels; lower is better.")]
TotalTrials = Annotated[
    int | None, typer.Option("--trials", "-n", help="Candidates to train; 16 by default.")
]
GridPoints = Annotated[int, typer.Option(help="Values per hyperparameter of the grid.")]
Encoder = Annotated[str, typer.Option(help="small, or a torchvision classifier: resnet18.")]
Width = Annotated[int, typer.Option(help="Of the small encoder.")]
Steps = Annotated[int | None, typer.Option(help="Training steps of a candidate.")]
BatchSize = Annotated[int, typer.Option(help="Normal images a step.")]
LearningRate = Annotated[float, typer.Option(help="Of SGD, annealed to 0.")]
Score = Annotated[str, typer.Option(help="density or classifier.")]
Contamination = Annotated[
    float | None, typer.Option(help="The share of anomalies that you believe in, if you do.")
]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Keep = Annotated[int, typer.Option(help="Best detectors to keep.")]
Storage = Annotated[str | None, typer.Option(help="Optuna's database URL; a journal file by default.")]
Resume = Annotated[str | None, typer.Option(help="Go on with this run; of all else only --trials counts.")]


def source_of(
    path: str | None,
    train: Path | None,
    unlabeled: Path | None,
    category: str | None,
    anomaly: str | None,
    image_size: int,
    skip_unreadable: bool,
) -> Source:
    """The images that PATH, or --train and --unlabeled, stand for."""
    from ssad_hpo.data import Source
    from ssad_hpo.experiment import find_source

    if (train is None) != (unlabeled is None):
        raise typer.BadParameter("--train and --unlabeled go together")
    if (path is None) == (train is None):
        raise typer.BadParameter("give PATH, or --train and --unlabeled, or --resume")
    if path is None:
        arguments = {"train": str(train), "unlabeled": str(unlabeled), "image_size": image_size}
        return Source("folders", {**arguments, "skip_unreadable": skip_unreadable})
    return find_source(
        path, category=category, anomaly=anomaly, image_size=image_size, skip_unreadable=skip_unreadable
    )


def space_of(kinds: list[str], ranges: list[str]) -> SearchSpace:
    """The space that --augmentation and --range stand for."""
    from ssad_hpo.task import DEFAULT_RANGES, Range, SearchSpace

    space: dict[str, dict[str, float | Range]] = {kind: {} for kind in kinds}
    for given in ranges:
        name, _, value = given.partition("=")
        kind, _, hyperparameter = name.partition(".")
        if kind not in space:
            raise typer.BadParameter(f"--range {given}: {kind!r} is not searched; add -a {kind}")
        try:
            low, _, high = value.partition(":")
            log = DEFAULT_RANGES.get(kind, {}).get(hyperparameter, Range(0, 1)).log
            space[kind][hyperparameter] = Range(float(low), float(high), log) if high else float(low)
        except ValueError as error:
            raise typer.BadParameter(f"--range {given}: expected KIND.NAME=LOW:HIGH ({error})") from error
    return SearchSpace(space)


def resume(
    run: str, path: str | None, train: Path | None, trials: int | None, address: str | None = None
) -> None:
    """Go on with a run, and show its result."""
    from ssad_hpo.experiment import open_run, resume_study

    if path is not None or train is not None:
        raise typer.BadParameter("--resume takes its images from the run; leave PATH and --train out")
    total = trials or open_run(run).settings.n_trials
    with kept_on_interrupt(), Display(total) as display:
        result = resume_study(run, n_trials=trials, address=address, listeners=[display], announce=announce)
    show(result)


@contextlib.contextmanager
def kept_on_interrupt() -> Iterator[None]:
    """On Ctrl-C in a study, say how to go on."""
    from ssad_hpo.experiment import StudyInterrupted, open_run

    try:
        yield
    except StudyInterrupted as stopped:
        name = run_name(stopped.run)
        word = "search" if open_run(stopped.run).settings.cluster is None else "sweep"
        warn(f"stopped; all that is done is kept. Go on with: {command()} {word} --resume {name}")
        raise typer.Exit(130) from None
