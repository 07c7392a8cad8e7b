"""What MLflow's pages show of an experiment without a click: its kind, its note, a view of its runs.

Of all that was logged, a table of runs begins with names and times. A view is a choice of columns and charts
that MLflow keeps with the experiment, in the tag of a shared view, and opens by an address.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssad_hpo.tracking.outbox import load_state

VIEW, TRIALS_VIEW = "ssad_hpo", "ssad_hpo_trials"  # the keys of the views
_AT_A_GLANCE = (
    *(f"metrics.`{name}`" for name in ("auc_selected", "auc_combined", "auc_random", "auc_oracle", "regret")),
    *(f"metrics.`{name}`" for name in ("p_anomalies", "auc", "dsv", "shift")),
    "params.`augmentation`",
    "tags.`status`",
    "attributes.`Dataset`",
)
_WIDTHS = {"auc_selected": 96, "auc_combined": 107, "auc_oracle": 88, "regret": 82}  # pixels
_CRITERIA, _SECTION = ("dsv", "shift"), "ssad-hpo"  # those that choose by default; the section of charts
_OF_TRIALS = (
    *(f"metrics.`{name}`" for name in ("auc", "dsv", "shift", "pu_auc", "loss")),
    *(f"params.`{name}`" for name in ("augmentation", "patch_area", "patch_aspect", "angle")),
    "tags.`study`",
)


def page(experiment_id: str, run_id: str | None = None) -> str:
    """The part of an address of MLflow's pages that names the view of an experiment, or a run."""
    if run_id is not None:
        return f"#/experiments/{experiment_id}/runs/{run_id}"
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"


def study_page(outbox: Path) -> str | None:
    """Where in MLflow's pages the studies of an outbox's experiment are; None before it was delivered."""
    experiment_id = load_state(outbox).experiment_id
    return None if experiment_id is None else page(experiment_id)


def view_tags() -> dict[str, str]:
    """Tags of an experiment in which studies are: the view of them, and that of their trials, for charts."""
    return {f"mlflow.sharedViewState.{key}": _packed(state) for key, state in _views().items()}


def own_tags(experiment_id: str) -> dict[str, str]:
    """Tags of an experiment that was made for studies: its kind, and a note."""
    charts = f"#/experiments/{experiment_id}/runs?viewStateShareKey={TRIALS_VIEW}&compareRunsMode=CHART"
    note = (
        f"Studies of ssad_hpo: **[all at a glance]({page(experiment_id)})**, with AUC where known, and "
        f"**[charts of their complete trials]({charts})**. A study's own page has a summary."
    )
    return {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": note}


def _packed(state: dict[str, Any]) -> str:
    # MLflow's pages take plain JSON too; packed, a longer view stays below the limit of a tag.
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return f"deflate;{packed}"


def _views() -> dict[str, dict[str, Any]]:
    """What MLflow's pages keep of a view, by its key."""
    return {
        VIEW: {
            "selectedColumns": list(_AT_A_GLANCE),
            "columnOrder": [*_AT_A_GLANCE, "duration"],
            # Five fit beside the names on a screen of 1,500 pixels on which MLflow's assistant is open.
            "columnWidths": {
                **dict.fromkeys(_AT_A_GLANCE[:-1], 94),
                **{f"metrics.`{name}`": width for name, width in _WIDTHS.items()},
            },
            **_charts(
                "Studies",
                _chart("BAR", "aucs", "AUC of every study", metricKey="auc_selected",
                       selectedMetricKeys=["auc_selected", "auc_combined", "auc_random", "auc_oracle"]),
                _chart("BAR", "regret", "Regret", metricKey="regret"),
            ),
        },
        TRIALS_VIEW: {
            # What was stopped early was judged on fewer steps, and is no match for the others.
            "searchFilter": "tags.status = 'complete' AND tags.augmentation LIKE '%'",
            # Sorted by time, trials would be hidden below their studies.
            "orderByKey": "metrics.`auc`",
            "orderByAsc": False,
            "selectedColumns": list(_OF_TRIALS),
            "columnOrder": [*_OF_TRIALS, "duration"],
            "columnWidths": dict.fromkeys(_OF_TRIALS, 98),
            **_charts(
                "Trials",
                *(_chart("SCATTER", f"{criterion}-auc", f"{criterion} against AUC",
                         xaxis={"key": criterion, "type": "METRIC"}, yaxis={"key": "auc", "type": "METRIC"})
                  for criterion in _CRITERIA),
                *(_parallel(("augmentation", "patch_area"), (criterion, "auc")) for criterion in _CRITERIA),
                *(_parallel(("augmentation", "patch_area", "patch_aspect"), (criterion,))
                  for criterion in _CRITERIA),
                *(_chart("LINE", f"{criterion}-steps", f"{criterion} in training", metricKey=criterion,
                         selectedMetricKeys=[criterion])
                  for criterion in _CRITERIA),
            ),
        },
    }  # fmt: skip


def _charts(name: str, *charts: dict[str, Any]) -> dict[str, Any]:
    """A view's charts, in one section."""
    section = {"uuid": _SECTION, "name": name, "display": True, "columns": 2}
    return {
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": list(charts),
        "compareRunSections": [section | dict.fromkeys(("isReordered", "deleted", "isGenerated"), False)],
    }


def _parallel(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    title = ", ".join([*params, *metrics]).replace("_", " ")
    own = {"selectedParams": list(params), "selectedMetrics": list(metrics), "showAllRuns": True}
    return _chart("PARALLEL", f"parallel-{'-'.join([*params, *metrics])}", title, **own)


def _chart(kind: str, name: str, title: str, **own: Any) -> dict[str, Any]:
    base = {"type": kind, "uuid": f"ssad-hpo-{name}", "metricSectionId": _SECTION, "displayName": title}
    return {**base, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **own}
