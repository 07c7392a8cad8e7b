"""The program: its commands, and how it ends when something is wrong."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import rich_click as click

from ssad_hpo.cli.display import warn
from ssad_hpo.cli.runs import evaluate, report, score, select, sync
from ssad_hpo.cli.studies import demo, search, sweep, tune


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.rich_config({"text_markup": "markdown", "commands_before_options": True})
@click.pass_context
def app(context: click.Context) -> None:
    """Tune self-supervised anomaly detection without labels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for _command in (demo, search, sweep, tune, evaluate, report, score, select, sync):
    app.add_command(_command)


def main() -> None:
    """The entry point: wrong usage and bad input end with one sentence and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        sys.exit(app(standalone_mode=False))
    except click.ClickException as error:
        warn(error.format_message())
        sys.exit(2)
    except (ValueError, OSError) as error:
        warn(str(error))
        sys.exit(2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences for the user; those of libraries stay as they are."""
    if "ssad_hpo" in Path(filename).parts:
        warn(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
