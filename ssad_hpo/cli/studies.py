"""The commands that run a study: search, sweep, tune, demo."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import rich_click as click
from click.core import ParameterSource
from click.exceptions import Exit

from ssad_hpo.cli.declared import (
    images_of,
    is_given,
    is_in_turn,
    search_of,
    tell_unused,
    training_of,
    tuned_training_of,
    tuning_of,
)
from ssad_hpo.cli.display import command, run_name, show, warn
from ssad_hpo.cli.groups import Group, option
from ssad_hpo.cli.live import SearchDisplay, TuningDisplay
from ssad_hpo.cli.options import (
    CLUSTER,
    DEMO_RUN,
    IMAGES,
    RUN,
    SEARCH,
    SPACE,
    SWEEP,
    SWEEP_RUN,
    TRAINING,
    TRUST,
    TUNED_SPACE,
    TUNED_TRAINING,
    TUNING,
    TUNING_RUN,
    search_of_demo,
    tracked,
    training_of_demo,
)

_place = click.argument("path", required=False)
_resume = click.option("--resume", metavar="RUN", help="Go on with this run, with the settings that it has.")
_trust = click.option(*TRUST[0], **TRUST[1])


@click.command(
    epilog="Examples: `ssad-hpo search mvtec --category cable -a cutout -a cutpaste`; "
    "`ssad-hpo search --train good/ --unlabeled stream/`; `ssad-hpo search grass/cutdiff`; "
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
    epilog="Examples: `ssad-hpo sweep gravel/cutavg -n 32`; "
    "`ssad-hpo sweep mvtec --category cable --address auto --gpus-per-trial 0.25`; "
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

    trusted = given.pop("trust_addresses")
    if (run := given.pop("resume")) is not None:
        _alone_with_resume(context, "n_trials", "address", "trust_addresses")
        settings = open_run(run).settings
        if settings.tuning is not None:
            raise click.UsageError(f"--resume {run}: is a tuning, which `tune --resume` goes on with")
        n_trials = given["n_trials"] if is_given(context, "n_trials") else None
        address = None if cluster is None else cluster.address
        with _kept_on_interrupt(context), SearchDisplay() as display:
            result = resume_study(
                run,
                n_trials=n_trials,
                address=address,
                trust_addresses=trusted,
                listeners=[display],
                announce=display.announce,
            )
    else:
        tell_unused(context, given)
        images = images_of(context, given)
        method = search_of(context, images, given, group)
        if method.total < method.n_trials and is_given(context, "n_trials"):
            warn(f"--trials {method.n_trials}: there are only {method.total} candidates to train")
        training = training_of(context, images, TRAINING.taken(given), method.seed)
        if len(training.evaluate_at) == 1:
            if is_given(context, "pruner") and method.pruner != "none":
                warn(
                    "--pruner has no effect: with one evaluation, at the end, nothing can be stopped early; "
                    "give others with --evaluate-at"
                )
            method = replace(method, pruner="none")
        with _kept_on_interrupt(context), SearchDisplay() as display:
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
    epilog="Examples: `ssad-hpo tune gravel/cutdiff -a cutdiff`; "
    "`ssad-hpo tune --train good/ --unlabeled stream/ -a cutpaste --range cutpaste.angle=0`; "
    "`ssad-hpo tune --resume NAME`"
)
@_place
@IMAGES
@TUNED_SPACE
@TUNING
@TUNED_TRAINING
@TUNING_RUN
@_resume
@_trust
@click.pass_context
def tune(context: click.RichContext, /, **given: Any) -> None:
    """Tune augmentations by gradient, before their detectors train or meanwhile, without labels.

    It does so from several starting points of every kind in turn, of which one is kept. PATH is a folder in
    the layout of MVTec AD, or a built-in name such as gravel/cutavg.
    """
    from ssad_hpo.bilevel import CollapseWarning
    from ssad_hpo.experiment import open_run, resume_study, run_study

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
            tell_unused(context, given)
            images = images_of(context, given)
            in_turn = is_in_turn(context, given)
            training = tuned_training_of(context, images, TUNED_TRAINING.taken(given), in_turn)
            method = tuning_of(context, images, given, training)
            result = run_study(
                images,
                method,
                training,
                listeners=[display],
                announce=display.announce,
                **tracked(given),
            )
    show(result)


@click.command(epilog="Example: `ssad-hpo demo --seed 3`")
@click.option("--hard", is_flag=True, help="Take a harder task, pasted patches, and three times the images.")
@Group(
    "Search",
    option("--trials", "-n", "n_trials", type=int, help="How many candidates to train."),
    defaults=search_of_demo,
)
@click.option("--seed", type=int, default=0, help="Fixes the images, the sampler and every training.")
@DEMO_RUN
@click.pass_context
def demo(context: click.RichContext, /, hard: bool, n_trials: int, seed: int, **given: Any) -> None:
    """Search on an embedded texture with known anomalies, then compare the choice with the truth.

    The task, grey patches on gravel, is one that is known to be clear; `--hard` takes pasted patches,
    which look like gravel themselves, and trains on three times as many images.
    """
    from ssad_hpo.data import Source, builtin
    from ssad_hpo.experiment import TASK, run_study
    from ssad_hpo.task import Search, SearchSpace

    tell_unused(context, given)
    name = "gravel/cutpaste" if hard else TASK
    source = builtin(name)
    source = Source(source.loader, {**source.arguments, "seed": seed})
    method = Search(SearchSpace(name.partition("/")[2]), n_trials=n_trials, seed=seed)
    with _kept_on_interrupt(context), SearchDisplay() as display:
        result = run_study(
            source,
            method,
            training_of_demo(hard, seed),
            listeners=[display],
            announce=display.announce,
            **tracked(given),
        )
    show(result)


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
