"""What the options of a command declare: where images are, how to search and how to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from ssad_hpo.cli.display import warn
from ssad_hpo.cli.groups import Group
from ssad_hpo.cli.options import IMAGES, SPACE, TUNED_SPACE, TUNING

if TYPE_CHECKING:
    from ssad_hpo.bilevel import Tuning
    from ssad_hpo.data import Source
    from ssad_hpo.task import Search, SearchSpace, Training


def tell_unused(context: click.Context, given: dict[str, Any]) -> None:
    """Say which of the options that were given have no effect beside the others, and why."""
    unused = [
        (given.get("encoder") != "small", ("width",), "it is of the small encoder"),
        (given.get("sampler") != "grid", ("grid_points",), "it is of the sampler grid"),
        (given.get("pruner") != "asha", ("reduction_factor",), "it is of the pruner asha"),
        (True, ("trust_addresses",), "the addresses of a new study are your own"),
        (given.get("no_tracking"), ("experiment", "tracking_uri"), "nothing is written to MLflow"),
    ]
    for holds, names, reason in unused:
        for option in context.command.params if holds else ():
            if option.name in names and is_given(context, str(option.name)):
                warn(f"{option.opts[0]} has no effect: {reason}")
    for kind in sorted({kind for kind in given.get("kinds", ()) if given["kinds"].count(kind) > 1}):
        warn(f"--augmentation {kind}: was given more than once, and counts once")


def training_of(context: click.Context, source: Source, options: dict[str, Any], seed: int) -> Training:
    """What was given, and for the rest what suits the images, unless another encoder is meant."""
    from ssad_hpo.experiment import training_for
    from ssad_hpo.task import Training

    return replace(_training(context, options, Training(), training_for(source)), seed=seed)


def tuned_training_of(
    context: click.Context, source: Source, options: dict[str, Any], in_turn: bool
) -> Training:
    """The same for a tuning, whose seed is among the options.

    Args:
        in_turn: whether hyperparameters were asked to move while the detector trains (`--steps-before 0`).
    """
    from ssad_hpo.bilevel import DEFAULT_TRAINING, PATCHES, PATCHES_IN_TURN
    from ssad_hpo.experiment import tuned_training_for

    usual = tuned_training_for(source, PATCHES_IN_TURN if in_turn else PATCHES)
    return _training(context, options, DEFAULT_TRAINING, usual)


def is_in_turn(context: click.Context, options: Mapping[str, Any]) -> bool:
    """Whether a tuning was told to move its hyperparameters while the detector trains."""
    return is_given(context, "steps_before") and not options["steps_before"]


def _training(context: click.Context, options: dict[str, Any], plain: Training, usual: Training) -> Training:
    given = {name: value for name, value in options.items() if is_given(context, name)}
    other = given.keys() & {"encoder", "weights", "width"}
    return replace(plain if other else usual, **given)


def tuning_of(context: click.Context, source: Source, options: dict[str, Any], training: Training) -> Tuning:
    """What was given, and for the rest what suits the images and the encoder; see `experiment.tuning_for`.

    Args:
        options: all that was given; those of the space and of the tuning are taken out.

    Raises:
        click.UsageError: for no kind to tune, where none is usual.
    """
    from ssad_hpo.bilevel import Tuning
    from ssad_hpo.experiment import tuning_for

    usual = tuning_for(source, training, in_turn=is_in_turn(context, options))
    space = TUNED_SPACE.taken(options)
    if usual == Tuning() and not space["kinds"]:
        raise click.UsageError("--augmentation: expected at least one kind to tune, got none")
    told = {n: value for n, value in TUNING.taken(options).items() if is_given(context, n)}
    if "starts" in told:
        told["starts"] = tuple(start for group in told["starts"] for start in group)
    tell_uncombined(source, told)
    return replace(usual, space=space_of(**space, usual=usual.space), **told)


def tell_uncombined(source: Source, given: Mapping[str, Any]) -> None:
    """Say that nothing is combined where no images are held out, if that was asked for."""
    from ssad_hpo.data import holds_out

    for name in ("combine", "contrast_heads"):
        if name in given and not holds_out(source):
            flag = name.replace("_", "-") if name == "combine" or given[name] else "no-contrast-heads"
            warn(f"--{flag} has no effect: no normal images are held out")


def search_of(context: click.Context, source: Source, options: dict[str, Any], group: Group) -> Search:
    """What was given, and for the rest what suits the images; see `experiment.search_for`.

    Args:
        options: all that was given; those of the space and of the group are taken out.
    """
    from ssad_hpo.experiment import search_for
    from ssad_hpo.task import Search

    usual = search_for(source)
    own = None if group.defaults is None else group.defaults()
    if usual == Search() and isinstance(own, Search):
        usual = own  # of a command that stops trials early
    space = space_of(**SPACE.taken(options), usual=usual.space)
    given = {n: value for n, value in group.taken(options).items() if is_given(context, n)}
    tell_uncombined(source, given)
    return replace(usual, **{"space": space, **given})


def images_of(context: click.Context, given: dict[str, Any]) -> Source:
    """Where the images are, taken out of all that the user gave."""
    path = given.pop("path")
    source = _source_of(path, **IMAGES.taken(given))
    if source.loader not in ("folder", "folders"):
        for name in IMAGES.names:
            if is_given(context, name):
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


def space_of(
    kinds: tuple[str, ...], ranges: tuple[str, ...], usual: SearchSpace | None = None
) -> SearchSpace:
    """The kinds of --augmentation, or the usual ones, with the ranges of --range.

    Raises:
        click.UsageError: for a range that cannot be read, or is of another kind.
        ValueError: for an unknown kind or hyperparameter.
    """
    from ssad_hpo.augment import Range, hyperparameter_of
    from ssad_hpo.task import SearchSpace

    space: dict[str, dict[str, float | Range]] = {
        kind: {} for kind in kinds or (usual.kinds if usual is not None else ())
    }
    for given in ranges:
        name, _, value = given.partition("=")
        kind, _, hyperparameter = name.partition(".")
        if hyperparameter in space.get(kind, {}):
            raise click.UsageError(f"--range {given}: {name} was given before; leave one out")
        if kind not in space:
            raise click.UsageError(f"--range {given}: {kind!r} is not searched; add -a {kind}")
        log = hyperparameter_of(kind, hyperparameter).range.log
        try:
            low, colon, high = value.partition(":")
            space[kind][hyperparameter] = Range(float(low), float(high), log) if colon else float(low)
        except ValueError as error:
            raise click.UsageError(f"--range {given}: expected KIND.NAME=LOW:HIGH ({error})") from None
    return SearchSpace(space)


def is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE
