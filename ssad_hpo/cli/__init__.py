"""The command line of ssad_hpo; `main` is the entry point of `ssad-hpo`."""

from ssad_hpo.cli import sweeping  # noqa: F401  its command is known by being imported
from ssad_hpo.cli.commands import app, main

__all__ = ["app", "main"]
