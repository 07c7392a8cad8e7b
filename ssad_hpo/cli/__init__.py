"""The command line of ssad_hpo; `main` is the entry point of `ssad-hpo`."""

from ssad_hpo.cli.program import app, main

__all__ = ["app", "main"]
