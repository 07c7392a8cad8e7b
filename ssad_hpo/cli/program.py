"""The program: its commands, and how it ends when something is wrong."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import rich_click as click

from ssad_hpo import __version__
from ssad_hpo.cli.display import warn
from ssad_hpo.cli.runs import evaluate, report, score, select, sync
from ssad_hpo.cli.studies import demo, search, sweep, tune


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.rich_config({"text_markup": "markdown", "commands_before_options": True})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="ssad-hpo")
@click.pass_context
def app(context: click.Context, debug: bool) -> None:
    """Tune self-supervised anomaly detection without labels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for _command in (demo, search, sweep, tune, evaluate, report, score, select, sync):
    app.add_command(_command)


def main() -> None:
    """The entry point: wrong usage and bad input end with one sentence and exit code 2."""
    # Threads that wait sleep instead of spinning, which on a machine that does anything else costs many
    # times the work (studies/contention.py). OpenMP reads it once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # a terminal of ASCII gets "?" for what it cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    debug = "--debug" in sys.argv[1:2]
    try:
        sys.exit(app(standalone_mode=False))
    except click.ClickException as error:
        warn(error.format_message())
        sys.exit(2)
    except (ValueError, OSError) as error:
        if debug:
            raise
        warn(_one_line(str(error)))
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        reason = _one_line(str(error))[:200]
        warn(f"this was not foreseen: {type(error).__name__}: {reason}; {_written_down()}")
        sys.exit(1)


def _one_line(text: str) -> str:
    """Several lines, and characters that steer a terminal, as one line that does not."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _written_down() -> str:
    """Where the traceback of the error at hand was written, for people."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="ssad-hpo-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            traceback.print_exc(file=file)
        return f"the traceback is in {file.name}; please report it"
    except OSError:
        return "run it again as `ssad-hpo --debug ...` for the traceback"


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
