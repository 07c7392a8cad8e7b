"""The commands on what a study left: evaluate, report, sync, score; and select, on any detectors."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import sys
from pathlib import Path
from typing import Self

import rich_click as click
from click.exceptions import Exit

from ssad_hpo.cli.decisions import ALARM_RATE, Decisions, show_labelled
from ssad_hpo.cli.display import plain, say, show, show_ranking, warn
from ssad_hpo.cli.options import (
    BIT_DEPTH,
    CRITERIA_TOLD,
    DEVICE,
    MAX_BYTES,
    MAX_PIXELS,
    SKIP_UNREADABLE,
    TRUST,
)


@click.command(
    epilog="Examples: `ssad-hpo evaluate gravel-cutavg-20261123-101500-1f3a` · "
    "`ssad-hpo evaluate NAME --labels labels.csv`"
)
@click.argument("run")
@click.option(
    "--labels",
    type=Path,
    help="A CSV file of path and label (0 or good, 1 or defect); by default the images' own.",
)
@click.option(*ALARM_RATE[0], **ALARM_RATE[1])
@click.option(*TRUST[0], **TRUST[1])
def evaluate(run: str, labels: Path | None, alarm_rate: float | None, trust_addresses: bool) -> None:
    """Compare a study's choice with the truth, where there is one, and write it to MLflow.

    RUN is a run folder, or its name below runs/. With --labels the detector that it ends with is compared
    with these labels, of unlabelled images or of new ones.
    """
    from ssad_hpo.experiment import NoGroundTruthError, evaluate_labelled, evaluate_run

    if labels is not None:
        show_labelled(evaluate_labelled(run, labels, alarm_rate=alarm_rate, trust_addresses=trust_addresses))
        return
    if alarm_rate is not None:
        raise click.UsageError("--alarm-rate goes with --labels; leave it out")
    try:
        show(evaluate_run(run, trust_addresses=trust_addresses))
    except NoGroundTruthError as error:
        warn(str(error))
        raise Exit(1) from None


@click.command(epilog="Example: `ssad-hpo report gravel-cutavg-20261123-101500-1f3a`")
@click.argument("run")
@click.option(
    "--out",
    type=Path,
    help="A folder to be made for it, as of a run that may only be read; MLflow then gets nothing. By "
    "default it is in the run's own.",
)
@click.option(*TRUST[0], **TRUST[1])
def report(run: str, out: Path | None, trust_addresses: bool) -> None:
    """Write a page with the choice, its figures and images into the run folder, and to MLflow.

    RUN is a run folder, or its name below runs/.
    """
    from ssad_hpo.experiment import report_run

    page = report_run(run, out=out, trust_addresses=trust_addresses)
    say(f"report in {plain(os.path.relpath(page))}")


@click.command(epilog="Example: `ssad-hpo sync gravel-cutavg-20261123-101500-1f3a`")
@click.argument("run")
@click.option(*TRUST[0], **TRUST[1])
def sync(run: str, trust_addresses: bool) -> None:
    """Deliver to MLflow what it could not take while the study ran.

    RUN is a run folder, or its name below runs/.
    """
    from ssad_hpo.experiment import sync_run

    result = sync_run(run, trust_addresses=trust_addresses)
    say(f"{result.delivered} records delivered, {result.remaining} remain")
    for reason in result.refused:
        warn(f"MLflow refused: {reason}")
    if result.error:
        warn(result.error)
    if result.remaining or result.refused:
        raise Exit(1)


@click.command(epilog="Example: `ssad-hpo select runs/NAME/artifacts/*/arrays.npz --by sel`")
@click.argument("files", type=Path, nargs=-1, required=True)
@click.option("--by", default="dsv", help=f"What chooses: {CRITERIA_TOLD}; or mc, hits, sel.")
@click.option(*MAX_BYTES[0], **MAX_BYTES[1])
def select(files: tuple[Path, ...], by: str, max_bytes: int) -> None:
    """Choose among detectors that were trained already, by any label-free selector.

    FILES are npz files with embeddings train, augmented and unlabeled, and, where there are any, scores of
    the unlabelled images and held_out_scores.
    """
    from ssad_hpo.search import select_detectors

    show_ranking(select_detectors(list(files), by, max_bytes=max_bytes))


@click.command(epilog="Example: `ssad-hpo score NAME new/ > scores.csv`")
@click.argument("place", metavar="RUN-or-DETECTOR")
@click.argument("paths", type=Path, nargs=-1, required=True)
@click.option("--out", type=Path, help="The CSV file to write; by default standard output.")
@click.option(*SKIP_UNREADABLE[0], **SKIP_UNREADABLE[1])
@click.option(*BIT_DEPTH[0], **BIT_DEPTH[1])
@click.option(
    "--heatmaps", type=Path, help="A folder for a PNG of each image with its heat map; by default none."
)
@click.option("--single", is_flag=True, help="Score by the selected candidate, where several are combined.")
@click.option(*ALARM_RATE[0], **ALARM_RATE[1])
@click.option(*MAX_PIXELS[0], **MAX_PIXELS[1])
@click.option(*DEVICE[0], **DEVICE[1], default="cpu")
@click.option(*TRUST[0], **TRUST[1])
def score(
    place: str,
    paths: tuple[Path, ...],
    out: Path | None,
    heatmaps: Path | None,
    single: bool,
    skip_unreadable: bool,
    bit_depth: int | None,
    alarm_rate: float | None,
    max_pixels: int,
    device: str,
    trust_addresses: bool,
) -> None:
    """Score new images with a run's chosen detector: a CSV of path, score, p_value and decision.

    Higher scores are more anomalous. The p-value says how rare so high a score is among normal images, and
    decides: "alarm" up to --alarm-rate, else "good". Without held-out images there are scores alone.

    The detector is that of a run, or lies in a folder of its own; PATHS are images and folders of images.
    """
    from ssad_hpo.experiment import Overlays, bit_depth_of, files_of, load_detector, score_images

    with _Table(out) as table:  # where they go is looked at before anything is scored
        if missing := [path for path in paths if not path.exists()]:
            raise click.UsageError(f"{missing[0]}: there is no such file or folder of images")
        if out is not None and heatmaps is not None and os.path.abspath(out) == os.path.abspath(heatmaps):
            raise click.UsageError(f"--out {str(out)!r}: is the folder of --heatmaps too; name a file")
        if out is not None and out.is_file() and any(out.samefile(file) for file in files_of(paths)):
            raise click.UsageError(f"--out {str(out)!r}: is an image that is to be scored; name another file")
        detector = load_detector(
            place,
            device,
            single=single,
            heatmaps=heatmaps is not None,
            trust_addresses=trust_addresses,
        )
        decisions = Decisions(detector.calibration, alarm_rate)
        bit_depth = bit_depth_of(place) if bit_depth is None else bit_depth
        overlays = None
        if heatmaps is not None:
            files, limits = files_of(paths), {"bit_depth": bit_depth, "max_pixels": max_pixels}
            overlays = Overlays(detector, heatmaps, paths, files, **limits)
        for path, value in score_images(
            detector,
            list(paths),
            skip_unreadable=skip_unreadable,
            bit_depth=bit_depth,
            max_pixels=max_pixels,
            draw=None if overlays is None else overlays.draw,
        ):
            table.write(path, {"score": repr(value), **decisions.of(value)})
    decisions.tell()
    if overlays is not None:
        (say if out else warn)(plain(overlays.told()))  # the scores alone are on standard output
    if out:
        say(f"{table.count} scores in {plain(out)}")


class _Table:
    """The CSV of scores: standard output, or a file that has its name only when it is whole.

    Raises:
        click.UsageError: if the file cannot be made.
    """

    def __init__(self, out: Path | None) -> None:
        self.out, self.partial, self.count, self.file = out, None, 0, sys.stdout
        # Paths come back from it as the bytes that they are, whatever the terminal's encoding.
        if out is None:
            if isinstance(self.file, io.TextIOWrapper):
                self.file.reconfigure(encoding="utf-8", errors="surrogateescape")
            return
        if out.is_dir() or not out.parent.is_dir():
            raise click.UsageError(f"--out {str(out)!r}: expected a file in a folder that is there")
        if not out.exists() or out.is_file():
            self.partial = out.with_name(out.name + ".partial")
        try:
            place = out if self.partial is None else _own_draft(self.partial)
            self.file = open(place, "w", newline="", encoding="utf-8", errors="surrogateescape")
        except BlockingIOError as error:
            raise click.UsageError(
                f"--out {str(out)!r}: another process writes it; wait for that, or name another file"
            ) from error
        except OSError as error:
            raise click.UsageError(f"--out {str(out)!r}: cannot be written ({error.strerror})") from error

    def write(self, path: Path, values: dict[str, str]) -> None:
        rows = csv.writer(self.file, lineterminator="\n")
        if not self.count:
            rows.writerow(["path", *values])
        # A spreadsheet takes a cell that begins so for a formula; ./ is the same path.
        text = str(path)
        rows.writerow([os.path.join(os.curdir, text) if text[0] in "=+-@\t\r" else text, *values.values()])
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.out is None:
            self.file.flush()
            return
        with self.file:  # closed last: the draft is this process's for as long as it is open
            self.file.flush()
            if self.partial is None:
                return
            if kind is None:
                os.replace(self.partial, self.out)
            elif self.count:
                warn(f"the {self.count} scores before that are in {self.partial}")
            else:
                self.partial.unlink()


def _own_draft(path: Path) -> int:
    """A file to write, empty, which no other process that asks for it gets before this one closes it.

    Raises:
        BlockingIOError: if another process has it. OSError: if it cannot be written.
    """
    while True:
        draft = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            try:
                fcntl.flock(draft, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # file systems of other machines may have no such locks
                pass
            with contextlib.suppress(FileNotFoundError):  # another process has just given it its name
                if os.path.samestat(os.fstat(draft), os.stat(path)):
                    os.ftruncate(draft, 0)
                    return draft
        except BaseException:
            os.close(draft)
            raise
        os.close(draft)
