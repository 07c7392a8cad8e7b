"""Studies as tests run them: everything tiny, in this process, which has imported torch already."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

import optuna
import pytest
import torch


def run_study(name: str, *arguments: object) -> str:
    """What `python -m studies.NAME --smoke` prints."""
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    said = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(said):
            patched.setattr(sys, "argv", [f"studies.{name}", "--smoke", *map(str, arguments)])
            torch.set_num_threads(1)
            importlib.import_module(f"studies.{name}").main()
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)
    return said.getvalue()
