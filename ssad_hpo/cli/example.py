"""The command that makes images to try the others with."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from ssad_hpo.cli.display import command, plain, say, typed


@click.command(epilog="Example: `ssad-hpo example images`")
@click.argument("folder", type=Path)
@click.option("--seed", type=int, default=0, help="Other images with another number.")
def example(folder: Path, seed: int) -> None:
    """Make a folder of images to try ssad-hpo with.

    FOLDER gets good images, a stream and new images with defects among them, and the labels of these two, for
    `evaluate` alone.
    """
    from ssad_hpo.data.example import write_example

    counts = write_example(folder, seed)
    told = ", ".join(f"{count} in {name}/" for name, count in counts.items())
    say(f"{plain(folder)}: {told}; labels.csv says which of the last two have a defect")
    good, stream = (typed(str(folder / name)) for name in ("good", "stream"))
    say(plain(f"{command()} search --train {good} --unlabeled {stream}"))
