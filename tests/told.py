"""What MLflow and Optuna were told, and whether that is what an outbox says."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ssad_hpo.raytune.ledger import CHECKPOINT
from ssad_hpo.tracking.outbox import read_settings


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, experiment: str | None = None) -> dict[str, Any]:
    """All runs, or those of an experiment, by name, the names unique."""
    client = client_of(uri)
    ids = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
    runs = list(client.search_runs(ids))
    names = Counter(run.info.run_name for run in runs)
    assert max(names.values(), default=1) == 1, names
    return {run.info.run_name: run for run in runs}


def history_of(uri: str, run: Any, metric: str) -> list[tuple[int, int, float]]:
    """(step, timestamp, value) of every point, in order."""
    points = client_of(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def records_in(outbox: Path) -> list[dict[str, Any]]:
    records = []
    for line in outbox.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if "study" not in record]


def check_delivered_exactly(uri: str, outbox: Path) -> None:
    """Every trial, status and metric point of the outbox is in its experiment once, and nothing else is."""
    runs = runs_of(uri, read_settings(outbox)["experiment"])
    expected = {
        (record.get("trial", ""), name, record.get("step", 0), record["at"], float(value))
        for record in records_in(outbox)
        for name, value in record.get("metrics", {}).items()
    }
    found = [
        (run.data.tags["ssad_hpo.key"].partition("/")[2], name, *point)
        for run in runs.values()
        for name in run.data.metrics
        for point in history_of(uri, run, name)
    ]
    assert sorted(found) == sorted(expected)
    ends = {run.data.tags["ssad_hpo.key"].partition("/")[2]: run.info.end_time for run in runs.values()}
    last = {record.get("trial", ""): record for record in records_in(outbox) if "status" in record}
    for trial, record in last.items():
        assert record["status"] == "running" or ends[trial] == record["at"]
    trials = {record["trial"] for record in records_in(outbox) if "trial" in record}
    words = [name.split(" ") for name in runs if name.startswith(("trial ", "start "))]
    assert {number for _, number in words} == trials
    assert len(runs) == len(trials) + 1


def reports_and_checkpoints(journal: Path) -> dict[int, list[str]]:
    """For each trial the order in which Optuna was told of its reports and checkpoints."""
    told: dict[int, list[str]] = defaultdict(list)
    for record in map(json.loads, journal.read_text().splitlines()):
        if "intermediate_value" in record:
            told[record["trial_id"]].append("report")
        elif CHECKPOINT in record.get("user_attr", {}):
            told[record["trial_id"]].append("checkpoint")
    return told
