"""Reads the settings of run folders of format 1, of which there are some from before 0.1.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SEARCH = ("criterion", "n_trials", "sampler", "pruner", "reduction_factor", "grid_points", "seed", "keep")


def in_format_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of format 1 as `Settings.to_json` writes them now.

    Format 1 kept the fields of a search for every run; in a tuning most of them said nothing.

    Raises:
        KeyError: if a setting is missing.
    """
    values = dict(values)
    if values["source"] and values["source"]["loader"] in ("folder", "folders"):
        values["source"]["arguments"].setdefault("keep_ratio", False)  # images were squeezed into squares
    values.setdefault("reduction_factor", 2)  # before there was a choice, ASHA let the better half go on
    search = {name: values.pop(name) for name in _SEARCH}
    space, tuning, cluster = values.pop("space"), values.pop("tuning", None), values.pop("cluster", None)
    if cluster is not None:
        cluster["checkpoint_path"] = cluster.pop("storage_path")
    method = {"search": search} if tuning is None else {"tuning": tuning}
    ((name, settings),) = method.items()
    return {**values, "method": {name: {**settings, "space": space}}, "cluster": cluster}
