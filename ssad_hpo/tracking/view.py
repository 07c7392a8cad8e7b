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

VIEW = "ssad_hpo"  # the key of the view
_AT_A_GLANCE = (
    *(f"metrics.`{name}`" for name in ("auc_selected", "auc_combined", "auc_random", "auc_oracle", "regret")),
    *(f"metrics.`{name}`" for name in ("p_anomalies", "auc", "dsv", "shift")),
    "params.`augmentation`",
    "tags.`status`",
    "attributes.`Dataset`",
)
_STUDIES, _TRIALS = "ssad-hpo-studies", "ssad-hpo-trials"  # sections of charts


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
    """Tags of an experiment in which studies are: the view."""
    # MLflow's pages take plain JSON too; packed, a longer view stays below the limit of a tag.
    packed = base64.b64encode(zlib.compress(json.dumps(_view()).encode(), 9)).decode()
    return {f"mlflow.sharedViewState.{VIEW}": f"deflate;{packed}"}


def own_tags(experiment_id: str) -> dict[str, str]:
    """Tags of an experiment that was made for studies: its kind, and a note."""
    note = (
        f"Studies of ssad_hpo. **[All at a glance]({page(experiment_id)})**: selected, combined, random and "
        "oracle AUC of each study, its trials below it, and charts. A study's own page has a summary."
    )
    return {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": note}


def _view() -> dict[str, Any]:
    charts = [
        _chart("BAR", _STUDIES, "aucs", "AUC of every study",
               metricKey="auc_selected",
               selectedMetricKeys=["auc_selected", "auc_combined", "auc_random", "auc_oracle"]),
        _chart("BAR", _STUDIES, "regret", "Regret", metricKey="regret"),
    ]  # fmt: skip
    for criterion in ("dsv", "shift"):
        charts += [
            _parallel(f"{criterion}-auc", ("augmentation", "patch_area"), (criterion, "auc")),
            _parallel(criterion, ("augmentation", "patch_area", "patch_aspect"), (criterion,)),
            _chart("SCATTER", _TRIALS, f"{criterion}-against-auc", f"{criterion} against AUC",
                   xaxis={"key": criterion, "type": "METRIC"}, yaxis={"key": "auc", "type": "METRIC"}),
            _chart("LINE", _TRIALS, f"{criterion}-steps", f"{criterion} in training",
                   metricKey=criterion, selectedMetricKeys=[criterion]),
        ]  # fmt: skip
    return {
        "selectedColumns": list(_AT_A_GLANCE),
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": uuid, "name": name, "display": True}
            | dict.fromkeys(("isReordered", "deleted", "isGenerated"), False)
            for uuid, name in ((_STUDIES, "Studies"), (_TRIALS, "Trials"))
        ],
    }


def _parallel(name: str, params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    title = ", ".join([*params, *metrics]).replace("_", " ")
    own = {"selectedParams": list(params), "selectedMetrics": list(metrics), "showAllRuns": True}
    return _chart("PARALLEL", _TRIALS, f"parallel-{name}", title, **own)


def _chart(kind: str, section: str, name: str, title: str, **own: Any) -> dict[str, Any]:
    base = {"type": kind, "uuid": f"ssad-hpo-{name}", "metricSectionId": section, "displayName": title}
    return {**base, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **own}
