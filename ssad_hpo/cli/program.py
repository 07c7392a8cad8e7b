"""The program: its commands, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import rich_click as click

from ssad_hpo import __version__
from ssad_hpo.address import without_password_of
from ssad_hpo.cli.deploy import export, register
from ssad_hpo.cli.display import warn, write_anything
from ssad_hpo.cli.example import example
from ssad_hpo.cli.runs import evaluate, report, score, select, sync
from ssad_hpo.cli.studies import demo, search, sweep, tune


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.rich_config({"text_markup": "markdown", "commands_before_options": True})
@click.version_option(__version__, prog_name="ssad-hpo")
@click.pass_context
def app(context: click.Context) -> None:
    """Tune self-supervised anomaly detection without labels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


_DEBUG = "--debug"
_ADDRESSES = ("SSAD_HPO_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")  # may hold passwords
_COMMANDS = (demo, example, search, sweep, tune, evaluate, report, score, export, register, select, sync)
for _command in _COMMANDS:
    app.add_command(_command)
for _command in (app, *_COMMANDS):
    # It changes how the program ends, whatever a command makes of its words: `main` looks for it.
    _debug = click.Option([_DEBUG], is_flag=True, expose_value=False, help="Show the traceback of an error.")
    _command.params.append(_debug)


def main() -> None:
    """The entry point: whatever goes wrong ends with one sentence.

    Exit codes: 2 for wrong usage and bad input, 130 for Ctrl-C, 1 for the rest.
    """
    warnings.showwarning = _show_warning
    # What MLflow did not take is told in one sentence at the end; its log has the rest.
    logging.getLogger("ssad_hpo.tracking").addHandler(logging.NullHandler())
    write_anything()
    try:
        if "" in sys.argv[1:]:  # it would stand for the folder that one is in
            raise click.UsageError("an argument is empty; was a variable of the shell not set?")
        code = app(standalone_mode=False)
        sys.stdout.flush()  # a full disk, or a reader that has gone, says so now
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        code = 1
    except (Exception, KeyboardInterrupt) as error:
        if _DEBUG in sys.argv[1:]:
            sys.stderr.write(_starred(traceback.format_exc()))
        code = _tell(error)
    sys.exit(code)


def _starred(text: str) -> str:
    """A text of libraries' without the passwords in the addresses that this process was given."""
    given = [word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in sys.argv]
    given += [os.environ.get(name, "") for name in _ADDRESSES]
    for address in given:
        if "://" in address:
            text = without_password_of(address, text)
    return text


def _warn(text: str) -> None:
    warn(_starred(text))


def _tell(error: BaseException) -> int:
    """Say in a sentence what went wrong, and give the exit code."""
    from click.exceptions import Abort  # of Ctrl-C outside of a study

    if isinstance(error, Abort | KeyboardInterrupt):
        _warn("stopped")
        return 130
    if isinstance(error, click.ClickException):
        _warn(error.format_message())
        return 2
    if is_full(error):
        _warn(f"the disk is full ({error}); free some space and try again, a study goes on with --resume")
        return 1
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "can't allocate memory" in str(error):
        _warn(f"the memory is not enough ({error}); take smaller images, batches or networks")
        return 1
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        _warn(f"{named}: the system refuses it ({error.strerror}); check the path and its permissions")
        return 2
    if isinstance(error, ValueError | OSError):
        _warn(str(error) or type(error).__name__)
        return 2
    if (reason := _of_database(error)) is not None:
        _warn(f"the study's database failed ({reason}); mend it, and go on with --resume")
        return 1
    from ssad_hpo.task import DetectorError  # torch, which help and wrong words need not load

    if isinstance(error, DetectorError):
        _warn(str(error))
        return 1
    told = f"{type(error).__name__}: {error}"
    with tempfile.NamedTemporaryFile(
        "w", prefix="ssad-hpo-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(_starred("".join(traceback.format_exception(error))))
    _warn(f"something unforeseen happened ({told:.300}); what is needed to report it is in {file.name}")
    return 1


def _of_database(error: BaseException | None) -> str | None:
    """What a database's driver says, if it is behind an error."""
    reason = None
    while error is not None:
        if type(error).__name__ == "StorageInternalError" or type(error).__module__.startswith("sqlalchemy"):
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        error = error.__cause__
    return reason


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; libraries put others in place of the system's."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


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
