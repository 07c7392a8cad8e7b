"""What a study leaves behind: a page, its rows as CSV, and a sentence on where they come from."""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import os
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def means(rows: Sequence[Row], names: Sequence[str], figures: Sequence[str]) -> list[Row]:
    """A row for each combination of what is named, with the means of figures over all else."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return [
        dict(zip(names, place, strict=True))
        | {f: round(statistics.fmean(row[f] for row in some), 4) for f in figures}
        for place, some in groups.items()
    ]


def write_results(
    options: argparse.Namespace, name: str, page: str, rows: Sequence[Row] | None = None
) -> None:
    """Write the page as NAME.md and the rows, if there are any, as NAME.csv into `options.out`."""
    options.out.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        write_csv(rows, options.out / f"{name}.csv")
    path = options.out / f"{name}.md"
    path.write_text(page, encoding="utf-8")
    print(f"wrote {path}")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows as a CSV file with every name that occurs in one, in order of first occurrence."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(titles: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table that ends with a line break."""
    rows = [list(titles), *([str(cell) for cell in line] for line in lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (minimum–maximum)."""
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}–{high})"


def made_by(command: str, options: argparse.Namespace) -> str:
    """How a page begins: by what it was made, when, where, and a warning where its numbers mean nothing.

    Args:
        command: what follows `python -m studies.`.
        options: of the study; its `smoke` and, where it has one, its `device`.
    """
    warning = "**A smoke run: these numbers mean nothing.**\n\n" if options.smoke else ""
    return f"{warning}Made by `python -m studies.{command}`. {provenance(getattr(options, 'device', 'cpu'))}"


def provenance(device: str = "cpu") -> str:
    """A sentence of date, commit, PyTorch and hardware, for a page of results."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    bf16 = " with bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else ""
    chip = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}{bf16}"
    gpu = f"; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else ""
    return (
        f"{datetime.date.today()}, commit {found or 'unknown'}, PyTorch {torch.__version__}, "
        f"{cores()} cores ({chip}){gpu}."
    )


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
