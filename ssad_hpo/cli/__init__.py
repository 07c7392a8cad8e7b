"""The command line of ssad_hpo; `main` is the entry point of `ssad-hpo`."""

from ssad_hpo.cli import sweeping as sweeping  # adds its command to `app`
from ssad_hpo.cli import tuning as tuning
from ssad_hpo.cli.commands import app, main

__all__ = ["app", "main"]
