"""The command line of a study: the options that all have, and where results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssad_hpo.numerics import check_device

RESULTS = Path(__file__).parents[1] / "results"


def study_parser(
    name: str, description: str | None, *, cells: bool = False, seeds: int | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m studies.NAME`, with --out and --smoke.

    Args:
        name: of the study's module.
        description: its docstring.
        cells: whether it computes cells; adds --cells (RUNS/NAME as it stands) and --jobs.
        seeds: how many there are unless asked otherwise; adds --seeds. None for a study without.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{name}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder of what is written: studies/results, or runs/smoke of a smoke run")
    add("--smoke", action="store_true", help="everything tiny, only to see that it works")
    if cells:
        add("--cells", type=Path, default=Path("runs") / name, help="folder of the cells that are kept")
        add("--jobs", type=int, default=1, help="cells side by side, one thread each")
    if seeds is not None:
        add("--seeds", type=int, default=seeds, help="how many")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line; a smoke run never writes over results unless told to."""
    options = parser.parse_args()
    try:
        check_device(getattr(options, "device", "cpu"))
    except ValueError as error:
        parser.error(str(error))
    if options.out is None:
        options.out = Path("runs/smoke") if options.smoke else RESULTS
    return options
