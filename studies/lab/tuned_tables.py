"""Tables of `studies.tuned_pretrained`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from studies.lab.results import Row, markdown_table


def auc_table(rows: Sequence[Row]) -> str:
    """AUC on unseen images: a line for each method and end, a column for each set; mean over seeds."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["how"], row["method"]][row["set"]].append(row["unseen"])
    lines = []
    for (how, method), values in found.items():
        means = [float(np.mean(values[name])) if name in values else float("nan") for name in sets]
        shown = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        lines.append([how, method, *shown, "–" if np.isnan(means).any() else f"**{np.mean(means):.3f}**"])
    order = list(dict.fromkeys(how for how, _ in found))
    lines.sort(key=lambda line: order.index(line[0]))
    return markdown_table(["end", "method", *sets, "mean"], lines)


def cost_table(rows: Sequence[Row], search: str) -> str:
    """Thousands of images passed, their share of the search's, and seconds, by set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    found = {(row["method"], row["set"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for name in sets:
            row, whole = found.get((method, name)), found.get((search, name))
            if row is None:
                line.append("–")
                continue
            share = "" if whole is None else f" / {row['images'] / whole['images']:.0%}"
            line.append(f"{row['images'] / 1e3:.1f}{share} / {row['seconds']:.0f} s")
        lines.append(line)
    return markdown_table(["method", *sets], lines)


def kinds_table(asked: Sequence[tuple[str, Mapping[str, Sequence[Row]]]], area: float) -> str:
    """How often a loss's lowest end is of the kind of f_gen, and how its area compares; by share.

    Args:
        asked: a task's name ("texture/kind share") and, by loss, the ends, the lowest first.
        area: f_gen's.
    """
    found: dict[tuple[str, str], list[tuple[bool, float]]] = defaultdict(list)
    for name, of_losses in asked:
        task, _, share = name.partition(" ")
        for loss, ends in of_losses.items():
            if ends:
                best = ends[0]
                found[loss, share].append((best["kind"] == task.split("/")[1], best["patch_area"] / area))
    lines = []
    for (loss, share), compared in found.items():
        right = [ratio for is_right, ratio in compared if is_right]
        near = sum(1 / 1.5 <= ratio <= 1.5 for ratio in right)
        median = f"{np.median(right):.2f}" if right else "–"
        lines.append(
            [
                loss,
                f"{float(share):.0%}",
                f"{len(right)} of {len(compared)}",
                f"{near} of {len(right)}",
                median,
            ]
        )
    return markdown_table(["loss", "anomalies", "kind found", "area within 1.5", "median ratio"], lines)


def valley_table(shown: Sequence[tuple[str, Mapping[str, Sequence[float]]]], areas: Sequence[float]) -> str:
    """Where each loss is lowest, and its values from bound to bound."""
    lines = []
    for name, values in shown:
        for loss, found in values.items():
            if loss != "area":
                best = areas[int(np.argmin(found))]
                lines.append([name, loss, f"{best:.3g}", ", ".join(f"{value:.3f}" for value in found)])
    of_areas = ", ".join(f"{area:.2g}" for area in areas)
    return markdown_table(["set", "loss", "lowest at area", f"values at areas {of_areas}"], lines)
