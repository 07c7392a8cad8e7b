"""The commands on what a study left: evaluate, report, sync, score; and select, on any detectors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import rich_click as click
from click.exceptions import Exit
from rich.markup import escape

from ssad_hpo.cli.display import say, show, show_ranking, warn
from ssad_hpo.cli.options import DEVICE, SKIP_UNREADABLE


@click.command(epilog="Example: `ssad-hpo evaluate gravel-cutavg-20261123-101500-1f3a`")
@click.argument("run")
def evaluate(run: str) -> None:
    """Compare a study's choice with the truth, where there is one, and write it to MLflow.

    RUN is a run folder, or its name below runs/.
    """
    from ssad_hpo.experiment import evaluate_run

    show(evaluate_run(run))


@click.command(epilog="Example: `ssad-hpo report gravel-cutavg-20261123-101500-1f3a`")
@click.argument("run")
def report(run: str) -> None:
    """Write a page with the choice, its figures and images into the run folder, and to MLflow.

    RUN is a run folder, or its name below runs/.
    """
    from ssad_hpo.experiment import report_run

    say(escape(f"report in {os.path.relpath(report_run(run))}"))


@click.command(epilog="Example: `ssad-hpo sync gravel-cutavg-20261123-101500-1f3a`")
@click.argument("run")
def sync(run: str) -> None:
    """Deliver to MLflow what it could not take while the study ran.

    RUN is a run folder, or its name below runs/.
    """
    from ssad_hpo.experiment import sync_run

    result = sync_run(run)
    say(f"{result.delivered} records delivered, {result.remaining} remain")
    for reason in result.refused:
        warn(f"MLflow refused: {reason}")
    if result.error:
        warn(result.error)
    if result.remaining or result.refused:
        raise Exit(1)


@click.command(epilog="Example: `ssad-hpo select runs/NAME/artifacts/*/arrays.npz --by sel`")
@click.argument("files", type=Path, nargs=-1, required=True)
@click.option("--by", default="dsv", help="What chooses: a criterion, or mc, hits or sel.")
def select(files: tuple[Path, ...], by: str) -> None:
    """Choose among detectors that were trained already, by any label-free selector.

    FILES are npz files with train, augmented and unlabeled embeddings, and scores.
    """
    from ssad_hpo.search import select_detectors

    show_ranking(select_detectors(list(files), by))


@click.command(epilog="Example: `ssad-hpo score NAME new/ > scores.csv`")
@click.argument("place", metavar="RUN-or-DETECTOR")
@click.argument("paths", type=Path, nargs=-1, required=True)
@click.option("--out", type=Path, help="The CSV file to write; by default standard output.")
@click.option(*SKIP_UNREADABLE[0], **SKIP_UNREADABLE[1])
@click.option(*DEVICE[0], **DEVICE[1], default="cpu")
def score(place: str, paths: tuple[Path, ...], out: Path | None, skip_unreadable: bool, device: str) -> None:
    """Score new images with a run's chosen detector: a CSV of path and score, higher is more anomalous.

    The detector is that of a run, or lies in a folder of its own; PATHS are images and folders of images.
    """
    import csv

    from ssad_hpo.experiment import load_detector, score_images

    with _whole(out) as file:
        detector, count = load_detector(place, device), 0
        writer = csv.writer(file, lineterminator="\n")
        for path, value in score_images(detector, list(paths), skip_unreadable=skip_unreadable):
            if not count:
                writer.writerow(["path", "score"])
            writer.writerow([_cell(path), repr(value)])
            count += 1
    if out:
        say(escape(f"{count} scores in {out}"))


def _cell(path: Path) -> str:
    """A path that no spreadsheet takes for a formula."""
    return f"./{path}" if str(path)[0] in "=+-@\t\r" else str(path)


@contextlib.contextmanager
def _whole(out: Path | None) -> Iterator[TextIO]:
    """A file that gets its name when it is whole, and is OUT.partial until then; standard output if None.

    Raises:
        OSError: before anything is done, if it cannot be written.
    """
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8 stay as they are
        yield sys.stdout
        return
    if out.is_dir():
        raise IsADirectoryError(f"--out '{out}': is a folder, expected a file")
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            yield file
        except BaseException:
            file.flush()
            if partial.read_bytes().count(b"\n") > 1:
                warn(f"what was scored before that is in {partial}")
            else:
                partial.unlink()
            raise
    os.replace(partial, out)
