"""Turns records into MLflow's runs, few calls a run: create, log everything, set the status."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssad_hpo.tracking.artifacts import Refusals, is_refusal, log_artifacts
from ssad_hpo.tracking.models import log_models
from ssad_hpo.tracking.outbox import VERSION, Record, State, read_settings, save_state

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

KEY = "ssad_hpo.key"  # the tag by which a run is found again: STUDY/TRIAL, the parent's is STUDY/
RUN_STATUS = {
    "running": "RUNNING",
    "complete": "FINISHED",
    "pruned": "FINISHED",  # by the study's own decision; the tag `status` tells it from a complete one
    "interrupted": "KILLED",
    "failed": "FAILED",
}
_ARTIFACT = re.compile(r"\(artifact:([\w./-]+)\)")  # the address of a picture in a note


@dataclass
class _Changes:
    """What some records say about one run."""

    since: int  # ms
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, at, step
    status: tuple[str, int] | None = None  # and since when
    artifacts: list[Record] = field(default_factory=list)
    note: str | None = None
    dataset: dict[str, str] | None = None
    models: list[Record] = field(default_factory=list)


def _by_run(records: Sequence[Record]) -> dict[str, _Changes]:
    runs: dict[str, _Changes] = {}
    for record in records:
        at, step = int(record["at"]), int(record.get("step", 0))
        run = runs.setdefault(record.get("trial", ""), _Changes(at))
        for name, value in record.get("params", {}).items():
            if run.params.setdefault(name, value) != value:
                run.tags[f"resumed.{name}"] = value
        run.tags |= record.get("tags", {})
        for name, number in record.get("metrics", {}).items():
            value = float(number)
            if not math.isfinite(value):
                # MLflow's databases would keep inf as 1.8e308 and -inf as the best of all losses.
                run.tags[f"nonfinite.{name}"] = f"{value} at step {step}"
                value = math.nan
            run.metrics.append((name, value, at, step))
        if "status" in record:
            run.status = (record["status"], at)
            run.tags["status"] = record["status"]
        if "artifact" in record:
            run.artifacts.append(record)
        run.note = record.get("note", run.note)
        run.dataset = record.get("dataset", run.dataset)
        if "model" in record:
            run.models.append(record)
    return runs


def send(
    client: MlflowClient, outbox: Path, state: State, records: Sequence[Record], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Bring the runs of these records up to date; returns what MLflow refuses, as `State.refused`.

    Raises:
        MlflowException, OSError: where the server is out of reach or fails; may be repeated then.
        InterruptedError: if asked to `stop`.
    """
    changes = _by_run(records)
    created = _create_runs(client, outbox, state, changes)
    refused = []
    for trial, change in changes.items():
        if stop():
            raise InterruptedError("the study's process is gone")
        run_id, resumed = state.runs[trial], trial not in created
        if resumed and change.params:
            _changed_params_become_tags(change, client.get_run(run_id).data.params)
        if change.note is not None:
            change.tags["mlflow.note.content"] = _ARTIFACT.sub(
                rf"(get-artifact?path=\1&run_uuid={run_id})", change.note
            )
        for record, reason in itertools.chain(
            _log(client, run_id, _items(change)),
            _log_dataset(client, run_id, change.dataset),
            _set_status(client, run_id, change, resumed),
            log_artifacts(client, run_id, change.artifacts, outbox.parent),
            log_models(client, run_id, change.models, outbox.parent),
        ):
            whose = {"trial": trial} if trial else {}
            told = f"{f'trial {trial}' if trial else 'study'}: {reason}"
            log.warning("%s: refused by MLflow: %s", outbox, told)
            refused.append({"record": {"v": VERSION, "at": change.since, **whose, **record}, "reason": told})
    return refused


def _create_runs(client: MlflowClient, outbox: Path, state: State, changes: dict[str, _Changes]) -> list[str]:
    """Create the runs that `state.runs` lacks, the parent first; returns their trials."""
    created = [trial for trial in dict.fromkeys(["", *changes]) if changes and trial not in state.runs]
    if created:
        # Should this process die before the state is saved, the next looks for these runs first.
        state.unsure = True
        save_state(outbox, state)
        settings = read_settings(outbox)
        since = {trial: change.since for trial, change in changes.items()}
        since[""] = min(since.values())
    for trial in created:
        tags = {KEY: f"{state.study}/{trial}", "study": settings["study_name"]}
        if trial:
            tags["mlflow.parentRunId"] = state.runs[""]
        run = client.create_run(
            str(state.experiment_id),
            start_time=since[trial],
            tags=tags,
            run_name=f"{settings.get('word', 'trial')} {trial}"
            if trial
            else _parent_name(client, state, settings),
        )
        state.runs[trial] = run.info.run_id
    state.unsure = False
    return created


def _parent_name(client: MlflowClient, state: State, settings: dict[str, str]) -> str:
    """The title of the study where no other run of its experiment has it, else its unique name."""
    title = settings.get("title", settings["study_name"])
    mark = "'" if "'" not in title else '"'
    if mark in title or "\\" in title:  # a filter cannot ask for it
        return settings["study_name"]
    same = f"attributes.run_name = {mark}{title}{mark}"
    taken = client.search_runs([str(state.experiment_id)], same, max_results=1)
    return settings["study_name"] if taken else title


def _changed_params_become_tags(change: _Changes, known: dict[str, str]) -> None:
    """MLflow's parameters never change; a study resumed with another budget says so in a tag."""
    for name, value in list(change.params.items()):
        if name in known and known[name] != _clipped(value, _longest_param()):
            change.tags[f"resumed.{name}"] = change.params.pop(name)


def _longest_param() -> int:
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    return MAX_PARAM_VAL_LENGTH


def _clipped(text: str, length: int) -> str:
    """MLflow refuses or cuts longer values; the outbox keeps them whole."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _items(change: _Changes) -> list[tuple[Any, Record]]:
    """MLflow's entities, each with the record that would repeat it."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

    return [
        *((Param(n, _clipped(v, _longest_param())), {"params": {n: v}}) for n, v in change.params.items()),
        *((RunTag(n, _clipped(v, MAX_TAG_VAL_LENGTH)), {"tags": {n: v}}) for n, v in change.tags.items()),
        *(
            (Metric(n, v, at, step), {"at": at, "step": step, "metrics": {n: str(v)}})
            for n, v, at, step in change.metrics
        ),
    ]


def _log(client: MlflowClient, run_id: str, items: list[tuple[Any, Record]]) -> Refusals:
    """Log all at once; if MLflow refuses, halve until the culprits are found."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    entities = [entity for entity, _ in items]
    try:
        client.log_batch(
            run_id,
            metrics=[entity for entity in entities if isinstance(entity, Metric)],
            params=[entity for entity in entities if isinstance(entity, Param)],
            tags=[entity for entity in entities if isinstance(entity, RunTag)],
        )
    except MlflowException as error:
        if not is_refusal(error):
            raise
        if len(items) == 1:
            yield items[0][1], str(error)
        else:
            yield from _log(client, run_id, items[: len(items) // 2])
            yield from _log(client, run_id, items[len(items) // 2 :])


def _log_dataset(client: MlflowClient, run_id: str, dataset: dict[str, str] | None) -> Refusals:
    """Log the images of a study as MLflow's own kind of input; the same ones again change nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    if dataset is None:
        return
    try:
        entity = Dataset(**dataset)
        client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "search")])])
    except (MlflowException, TypeError) as error:
        if isinstance(error, MlflowException) and not is_refusal(error):
            raise
        yield {"dataset": dataset}, str(error)


def _set_status(client: MlflowClient, run_id: str, change: _Changes, resumed: bool) -> Refusals:
    from mlflow.exceptions import MlflowException

    if change.status is None:
        return
    word, at = change.status
    try:
        if RUN_STATUS[word] != "RUNNING":
            client.set_terminated(run_id, RUN_STATUS[word], end_time=at)
        elif resumed:
            client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if not is_refusal(error):
            raise
        yield {"status": word, "at": at}, str(error)
