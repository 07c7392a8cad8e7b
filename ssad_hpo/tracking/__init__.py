"""Writes studies and trials to MLflow: a parent run per study, a child per trial.

The only room that knows MLflow. `recorder` appends what it hears to a local file, so that no server can
hold a study up or lose it; `outbox` is that file; `delivery` takes it to MLflow in a process of its own,
as `runs` at a tracking `uri`, with a `view` of them. `listening` has the recorder for studies without
tracking.
"""

from ssad_hpo.tracking.listening import Joined, SilentRecorder
from ssad_hpo.tracking.outbox import pending
from ssad_hpo.tracking.recorder import MlflowRecorder, SyncResult, sync
from ssad_hpo.tracking.uri import (
    URI_VARIABLE,
    absolute_uri,
    default_experiment,
    default_tracking_uri,
    serve_command,
    ui_address,
    ui_command,
)
from ssad_hpo.tracking.view import study_page

__all__ = [
    "URI_VARIABLE",
    "Joined",
    "MlflowRecorder",
    "SilentRecorder",
    "SyncResult",
    "absolute_uri",
    "default_experiment",
    "default_tracking_uri",
    "pending",
    "serve_command",
    "study_page",
    "sync",
    "ui_address",
    "ui_command",
]
