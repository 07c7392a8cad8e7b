"""The commands that run a study: search, sweep, tune, demo."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource
from click.exceptions import Exit

from ssad_hpo.cli.display import command, run_name, show, warn
from ssad_hpo.cli.live import SearchDisplay, TuningDisplay
from ssad_hpo.cli.options import (
    CLUSTER,
    DEMO_RUN,
    IMAGES,
    ONE_KIND,
    RUN,
    SEARCH,
    SPACE,
    SWEEP,
    SWEEP_RUN,
    TRAINING,
    TRIALS,
    TRUST,
    TUNED_TRAINING,
    TUNING,
    TUNING_RUN,
    Group,
    tracked,
)

if TYPE_CHECKING:
    from ssad_hpo.data import Source
    from ssad_hpo.task import SearchSpace, Training

_place = click.argument("path", required=False)
_resume = click.option("--resume", metavar="RUN", help="Go on with this run, with the settings that it has.")
_trust = click.option(*TRUST[0], **TRUST[1])


@click.command(
    epilog="Examples: `ssad-hpo search mvtec --category cable -a cutout -a cutpaste` · "
    "`ssad-hpo search --train good/ --unlabeled stream/` · `ssad-hpo search grass/cutdiff` · "
    "`ssad-hpo search --resume NAME`"
)
@_place
@IMAGES
@SPACE
@SEARCH
@TRAINING
@RUN
@_resume
@_trust
@click.pass_context
def search(context: click.RichContext, /, **given: Any) -> None:
    """Train detectors with different augmentations and choose one, without labels.

    PATH is a folder in the layout of MVTec AD, or a built-in name such as gravel/cutavg.
    """
    _search(context, given, SEARCH)


@click.command(
    epilog="Examples: `ssad-hpo sweep gravel/cutavg -n 32` · "
    "`ssad-hpo sweep mvtec --category cable --address auto --gpus-per-trial 0.25` · "
    "`ssad-hpo sweep --resume NAME`"
)
@_place
@IMAGES
@CLUSTER
@SPACE
@SWEEP
@TRAINING
@SWEEP_RUN
@_resume
@_trust
@click.pass_context
def sweep(context: click.RichContext, /, **given: Any) -> None:
    """Search on a Ray cluster: many trials at once, on as many nodes as there are.

    PATH is a folder in the layout of MVTec AD, or a built-in name such as gravel/cutavg.
    """
    from ssad_hpo.task import Cluster

    _search(context, given, SWEEP, Cluster(**CLUSTER.taken(given)))


def _search(context: click.Context, given: dict[str, Any], group: Group, cluster: Any = None) -> None:
    """Start a search, here or on a cluster, or go on with one, and show its result."""
    from ssad_hpo.experiment import open_run, resume_study, run_study
    from ssad_hpo.task import Search

    trusted = given.pop("trust_addresses")
    if (run := given.pop("resume")) is not None:
        _alone_with_resume(context, "n_trials", "address", "trust_addresses")
        settings = open_run(run).settings
        if settings.tuning is not None:
            raise click.UsageError(f"--resume {run}: is a tuning, which `tune --resume` goes on with")
        n_trials = given["n_trials"] if _is_given(context, "n_trials") else None
        address = None if cluster is None else cluster.address
        with _kept_on_interrupt(context), SearchDisplay(n_trials or settings.n_trials) as display:
            result = resume_study(
                run,
                n_trials=n_trials,
                address=address,
                trust_addresses=trusted,
                listeners=[display],
                announce=display.announce,
            )
    else:
        _tell_unused(context, given)
        images = _images(context, given)
        method = Search(space=_space_of(**SPACE.taken(given)), **group.taken(given))
        if method.total < method.n_trials and _is_given(context, "n_trials"):
            warn(f"--trials {method.n_trials}: there are only {method.total} candidates to train")
        training = _training(context, images, TRAINING.taken(given), method.seed)
        with _kept_on_interrupt(context), SearchDisplay(method.total) as display:
            result = run_study(
                images,
                method,
                training,
                cluster=cluster,
                listeners=[display],
                announce=display.announce,
                **tracked(given),
            )
    show(result)


@click.command(
    epilog="Examples: `ssad-hpo tune gravel/cutdiff -a cutdiff` · "
    "`ssad-hpo tune --train good/ --unlabeled stream/ -a cutpaste --range cutpaste.angle=0` · "
    "`ssad-hpo tune --resume NAME`"
)
@_place
@IMAGES
@ONE_KIND
@TUNING
@TUNED_TRAINING
@TUNING_RUN
@_resume
@_trust
@click.pass_context
def tune(context: click.RichContext, /, **given: Any) -> None:
    """Tune one augmentation by gradient while its detector trains, without labels.

    It does so from several starting points in turn, of which one is kept. PATH is a folder in the layout of
    MVTec AD, or a built-in name such as gravel/cutavg.
    """
    from ssad_hpo.bilevel import CollapseWarning, Tuning
    from ssad_hpo.experiment import open_run, resume_study, run_study
    from ssad_hpo.task import Training

    with _kept_on_interrupt(context), TuningDisplay() as display, warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # `show` tells them, of every start
        trusted = given.pop("trust_addresses")
        if (run := given.pop("resume")) is not None:
            _alone_with_resume(context, "trust_addresses")
            if open_run(run).settings.tuning is None:
                raise click.UsageError(f"--resume {run}: is a search, which `search --resume` goes on with")
            result = resume_study(
                run, trust_addresses=trusted, listeners=[display], announce=display.announce
            )
        else:
            _tell_unused(context, given)
            images = _images(context, given)
            space = ONE_KIND.taken(given)
            if len(space["kinds"]) != 1:
                got = ", ".join(space["kinds"]) or "none"
                raise click.UsageError(f"--augmentation: expected the one kind to tune, got {got}")
            told = TUNING.taken(given)
            told["starts"] = tuple(start for group in told["starts"] for start in group)
            training = Training(evaluate_at=(1.0,), **TUNED_TRAINING.taken(given))
            result = run_study(
                images,
                Tuning(space=_space_of(**space), **told),
                training,
                listeners=[display],
                announce=display.announce,
                **tracked(given),
            )
    show(result)


@click.command(epilog="Example: `ssad-hpo demo --seed 3`")
@click.option("--hard", is_flag=True, help="Take a harder task: pasted patches.")
@Group("Search", TRIALS, defaults=SEARCH.defaults)
@click.option("--seed", type=int, default=0, help="Fixes the images, the sampler and every training.")
@DEMO_RUN
@click.pass_context
def demo(context: click.RichContext, /, hard: bool, n_trials: int, seed: int, **given: Any) -> None:
    """Search on an embedded texture with known anomalies, then compare the choice with the truth.

    The task, grey patches on gravel, is one that is known to be clear; `--hard` takes pasted patches,
    which look like gravel themselves.
    """
    from ssad_hpo.data import Source, builtin
    from ssad_hpo.experiment import TASK, run_study
    from ssad_hpo.task import Search, SearchSpace

    _tell_unused(context, given)
    name = "gravel/cutpaste" if hard else TASK
    source = builtin(name)
    source = Source(source.loader, {**source.arguments, "seed": seed})
    method = Search(SearchSpace(name.partition("/")[2]), n_trials=n_trials, seed=seed)
    with _kept_on_interrupt(context), SearchDisplay(n_trials) as display:
        result = run_study(source, method, listeners=[display], announce=display.announce, **tracked(given))
    show(result)


def _tell_unused(context: click.Context, given: dict[str, Any]) -> None:
    """Say which of the options that were given have no effect beside the others, and why."""
    evaluations = given.get("evaluate_at", ())
    unused = [
        (given.get("encoder") != "small", ("width",), "it is of the small encoder"),
        (given.get("sampler") != "grid", ("grid_points",), "it is of the sampler grid"),
        (given.get("pruner") != "asha", ("reduction_factor",), "it is of the pruner asha"),
        (
            len(evaluations) == 1 and given.get("pruner") != "none",
            ("pruner",),
            "with one evaluation, at the end, nothing can be stopped early",
        ),
        (True, ("trust_addresses",), "the addresses of a new study are your own"),
        (given.get("no_tracking"), ("experiment", "tracking_uri"), "nothing is written to MLflow"),
    ]
    for holds, names, reason in unused:
        for option in context.command.params if holds else ():
            if option.name in names and _is_given(context, str(option.name)):
                warn(f"{option.opts[0]} has no effect: {reason}")
    for kind in sorted({kind for kind in given.get("kinds", ()) if given["kinds"].count(kind) > 1}):
        warn(f"--augmentation {kind}: was given more than once, and counts once")


def _training(context: click.Context, source: Source, options: dict[str, Any], seed: int) -> Training:
    """What was given, and for the rest what suits the images, unless another encoder is meant."""
    from ssad_hpo.experiment import training_for
    from ssad_hpo.task import Training

    given = {name: value for name, value in options.items() if _is_given(context, name)}
    other = given.keys() & {"encoder", "weights", "width"}
    return replace(Training() if other else training_for(source), seed=seed, **given)


def _images(context: click.Context, given: dict[str, Any]) -> Source:
    """Where the images are, taken out of all that the user gave."""
    path = given.pop("path")
    source = _source_of(path, **IMAGES.taken(given))
    if source.loader not in ("folder", "folders"):
        for name in IMAGES.names:
            if _is_given(context, name):
                option = f"--{name.replace('_', '-')}"
                raise click.UsageError(
                    f"{option} is for folders of images, and {path} is built in; leave it out"
                )
    return source


def _source_of(path: str | None, train: Path | None, unlabeled: Path | None, **of_folder: Any) -> Source:
    """Where the images are: PATH, or the folders of --train and --unlabeled.

    Raises:
        click.UsageError: for none of these, or both. ValueError: for a PATH that is not there.
    """
    from ssad_hpo.data import Source, find_source

    if (train is None) != (unlabeled is None):
        raise click.UsageError("--train and --unlabeled go together")
    if (path is None) == (train is None):
        raise click.UsageError("give PATH, or --train and --unlabeled, or --resume")
    if path is not None:
        return find_source(path, **of_folder)
    if refused := [f"--{name}" for name in ("category", "anomaly") if of_folder.pop(name) is not None]:
        raise click.UsageError(
            f"{refused[0]} is for a folder in the layout of MVTec AD; leave it out, or --train"
        )
    return Source("folders", {"train": str(train), "unlabeled": str(unlabeled), **of_folder})


def _space_of(kinds: tuple[str, ...], ranges: tuple[str, ...]) -> SearchSpace:
    """The kinds of --augmentation with the ranges of --range.

    Raises:
        click.UsageError: for a range that cannot be read, or is of another kind.
        ValueError: for an unknown kind or hyperparameter.
    """
    from ssad_hpo.augment import Range, hyperparameter_of
    from ssad_hpo.task import Search, SearchSpace

    space: dict[str, dict[str, float | Range]] = {kind: {} for kind in kinds or Search().space.kinds}
    for given in ranges:
        name, _, value = given.partition("=")
        kind, _, hyperparameter = name.partition(".")
        if hyperparameter in space.get(kind, {}):
            raise click.UsageError(f"--range {given}: {name} was given before; leave one out")
        if kind not in space:
            raise click.UsageError(f"--range {given}: {kind!r} is not searched; add -a {kind}")
        log = hyperparameter_of(kind, hyperparameter).range.log
        try:
            low, _, high = value.partition(":")
            space[kind][hyperparameter] = Range(float(low), float(high), log) if high else float(low)
        except ValueError as error:
            raise click.UsageError(f"--range {given}: expected KIND.NAME=LOW:HIGH ({error})") from None
    return SearchSpace(space)


def _alone_with_resume(context: click.Context, *others: str) -> None:
    """Refuse whatever was given beside --resume, but for options with these names.

    Raises:
        click.UsageError: naming it.
    """
    given = [
        p.opts[0] if isinstance(p, click.Option) else p.make_metavar(context).strip("[]")
        for p in context.command.params
        if p.name not in ("resume", "debug", *others)
        and context.get_parameter_source(str(p.name)) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"--resume takes its images from the run, and its settings; leave {', '.join(given)} out"
        )


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


@contextlib.contextmanager
def _kept_on_interrupt(context: click.Context) -> Iterator[None]:
    """On Ctrl-C in a study, say which command goes on; if no detector could be trained, say why."""
    from ssad_hpo.experiment import StudyInterrupted
    from ssad_hpo.task import DetectorError

    name = "search" if context.info_name == "demo" else context.info_name
    try:
        yield
    except DetectorError as error:
        warn(str(error))
        raise Exit(1) from None
    except StudyInterrupted as stopped:
        resume = f"{command()} {name} --resume {run_name(stopped.run)}"
        warn(f"stopped; all that is done is kept. Go on with: {resume}")
        raise Exit(130) from None
