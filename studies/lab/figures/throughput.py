"""Speed of the detector pipelines, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Two of Okabe and Ito's colours that stay apart for colour-blind readers, and markers in print.
_PIPELINES = {"ours": ("#0072B2", "o"), "plain": ("#D55E00", "s")}


def throughput_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Images per second by image size for the pipelines "ours" and "plain", a panel per device and encoder.

    Points are medians over repeats and augmentations, bars reach from their minimum to their maximum; the
    ratio of the medians stands beside our line.

    Args:
        rows: one per measurement, with "device", "encoder", "image_size" (pixels), "pipeline" and "value"
            (images per second, positive).
        path: of the image to write; its ending says the format.
    """
    from matplotlib.figure import Figure

    speeds: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        panel = speeds.setdefault((row["device"], row["encoder"]), {name: {} for name in _PIPELINES})
        panel[row["pipeline"]].setdefault(row["image_size"], []).append(row["value"])

    figure = Figure(figsize=(4.2 * len(speeds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(speeds), sharey=True, squeeze=False)[0]
    for axes, ((device, encoder), lines) in zip(panels, speeds.items(), strict=True):
        for name, (color, marker) in _PIPELINES.items():
            sizes = sorted(lines[name])
            middle = [median(lines[name][s]) for s in sizes]
            below = [m - min(lines[name][s]) for m, s in zip(middle, sizes, strict=True)]
            above = [max(lines[name][s]) - m for m, s in zip(middle, sizes, strict=True)]
            axes.errorbar(sizes, middle, (below, above), color=color, marker=marker, capsize=3, label=name)
            if name == "ours":
                for size, speed in zip(sizes, middle, strict=True):
                    ratio = f"{speed / median(lines['plain'][size]):.1f}×"
                    axes.annotate(ratio, (size, speed), (0, 7), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yscale("log")
        axes.margins(x=0.12, y=0.15)
        axes.set_title(f"{encoder}, {device}")
        axes.set_xlabel("image size, pixels")
        axes.grid(True, which="both", linewidth=0.4, alpha=0.4)
    panels[0].set_ylabel("images per second (log scale)")
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=150)
