"""optuna-dashboard, from elsewhere, opens the study of a run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from servers import free_port, wait_until
from starting import start_study

from ssad_hpo.data import Source
from ssad_hpo.task import Training

DASHBOARD = shutil.which(
    "optuna-dashboard", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
)
TINY = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 1.0))


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.skipif(DASHBOARD is None, reason="there is no optuna-dashboard")
def test_the_journal_of_a_run_opens_in_optunas_dashboard(workplace: Path) -> None:
    images = Source("controlled", {"image_size": 16, "n_train": 20, "n_unlabeled": 14})
    result = start_study(images, n_trials=3, training=TINY, tracking_uri=None, run="first")
    port = free_port()
    words = [str(DASHBOARD), "--server", "wsgiref", "--port", str(port), "runs/first/journal.log"]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)

    def asked(place: str) -> Any:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{place}", timeout=5) as reply:
                return json.load(reply)
        return None

    try:
        wait_until(lambda: asked("studies") is not None, "the dashboard")
        (study,) = asked("studies")["study_summaries"]
        assert study["study_name"] == result.run.settings.study_name
        trials = asked(f"studies/{study['study_id']}?after=0")["trials"]
        assert [trial["values"] for trial in trials] == [[trial.value] for trial in result.study.trials]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
