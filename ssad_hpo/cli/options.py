"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ssad_hpo.data import Source
    from ssad_hpo.task import SearchSpace

Place = Annotated[
    str | None,
    typer.Argument(help="A folder in the layout of MVTec AD, or a built-in name: gravel/cutavg."),
]
Category = Annotated[str | None, typer.Option(help="Of a folder that has several.")]
Anomaly = Annotated[str | None, typer.Option(help="Only test/good and test/ANOMALY: a benchmark pair.")]
Train = Annotated[Path | None, typer.Option(help="A folder of normal images; goes with --unlabeled.")]
Unlabeled = Annotated[Path | None, typer.Option(help="A folder with the unlabelled mixture.")]
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
Encoder = Annotated[str, typer.Option(help="small, or a torchvision classifier: resnet18.")]
Width = Annotated[int, typer.Option(help="Of the small encoder.")]
Score = Annotated[str, typer.Option(help="density or classifier.")]
Contamination = Annotated[
    float | None, typer.Option(help="The share of anomalies that you believe in, if you do.")
]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Criterion = Annotated[str, typer.Option(help="What chooses, without labels; lower is better.")]
Sampler = Annotated[str, typer.Option(help="tpe, random, grid or gp (one kind only).")]
GridPoints = Annotated[int, typer.Option(help="Values per hyperparameter of the sampler grid.")]
ReductionFactor = Annotated[int, typer.Option(help="Of ASHA: of every so many trials, the best goes on.")]
EvaluateAt = Annotated[
    str | None,
    typer.Option(help="Shares of the steps at which trials are judged, and stopped. 0.125,0.5,1."),
]
Steps = Annotated[int | None, typer.Option(help="Training steps of a candidate.")]
BatchSize = Annotated[int, typer.Option(help="Normal images a step.")]
LearningRate = Annotated[float, typer.Option(help="Of SGD, annealed to 0.")]
Keep = Annotated[int, typer.Option(help="Best detectors to keep.")]
Storage = Annotated[str | None, typer.Option(help="Optuna's database URL; a journal file by default.")]
TotalTrials = Annotated[
    int | None, typer.Option("--trials", "-n", help="Candidates to train; 16 by default.")
]
Trials = Annotated[int, typer.Option("--trials", "-n", help="Candidates to train.")]
Seed = Annotated[int, typer.Option(help="Of the sampler and of every training.")]
Threads = Annotated[int | None, typer.Option(help="Processor threads for training; all by default.")]
RunName = Annotated[str | None, typer.Option("--run", help="Run folder: a path, or a name below runs/.")]
TrackingUri = Annotated[
    str, typer.Option(help="MLflow's address; 'default' is MLFLOW_TRACKING_URI or sqlite:///mlflow.db.")
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Write nothing to MLflow.")]


def source_of(
    path: str | None,
    train: Path | None,
    unlabeled: Path | None,
    *,
    category: str | None,
    anomaly: str | None,
    image_size: int,
    skip_unreadable: bool,
) -> Source:
    """Where the images are: PATH, or the folders of --train and --unlabeled.

    Raises:
        typer.BadParameter: for none of these, or both. ValueError: for a PATH that is not there.
    """
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


def fractions_of(evaluate_at: str | None) -> tuple[float, ...]:
    """The numbers of --evaluate-at, or the default.

    Raises:
        typer.BadParameter: for what is no list of numbers.
    """
    from ssad_hpo.task import Training

    if evaluate_at is None:
        return Training.evaluate_at
    try:
        return tuple(map(float, evaluate_at.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"--evaluate-at {evaluate_at}: expected numbers as 0.125,0.5,1") from error


def space_of(kinds: list[str], ranges: list[str]) -> SearchSpace:
    """The kinds of --augmentation with the ranges of --range.

    Raises:
        typer.BadParameter: for a range that cannot be read, or is of another kind.
        ValueError: for an unknown kind or hyperparameter.
    """
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
