"""What the command line shows of a result, and how it prints a table and says a sentence."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from ssad_hpo.experiment import Confirmation, StudyResult
    from ssad_hpo.search import Candidate, Ranking


# Headings of the table of ranks, which must fit into 80 columns.
_SHORT = {
    "discordance": "dis",
    "smooth_alignment": "smooth",
    "soft_alignment": "soft",
    "dsv_unclamped": "dsv-u",
}
_NARROW = 60  # columns of a terminal below which a table has no lines between its cells


def show(result: StudyResult) -> None:
    """A study's candidates, the choice, the figures that judge it, and the next commands."""
    from ssad_hpo.experiment import how_sure
    from ssad_hpo.search import candidates, ranked, records

    settings, criterion = result.run.settings, result.run.settings.criterion
    word, trials = settings.word, records(result.study)
    choices = ranked(candidates(result.study), criterion)
    _show_candidates(result, choices)
    if result.confirmation is not None:
        _show_confirmation(result.confirmation, word)
    for trial in trials:
        if trial.status == "failed":
            say(f"{word} {trial.number} failed: {plain(trial.reason or '')}")
        for sign in trial.signs:
            told = f"{word} {trial.number}: {sign}"
            warn(told) if trial.number == result.selected.number else say(plain(told))
    ended, count = len(trials), len(choices)
    if settings.tuning is not None and ended < settings.n_trials:
        resume = f"{command()} tune --resume {run_name(result.run.folder)}"
        say(f"{settings.n_trials - ended} more starts are not done; go on with: {escape(resume)}")
    if others := ended - count:
        say(f"{others} more {word}s were pruned, failed or interrupted; they do not compete")
    if (figures := result.evaluation) is not None:
        say(
            f"AUC selected [bold green]{figures.auc_selected:.3f}[/bold green]"
            + ("" if figures.auc_combined is None else f", {result.ending} {figures.auc_combined:.3f}")
            + f", random {figures.auc_random:.3f}, oracle {figures.auc_oracle:.3f}"
            f", worst {figures.auc_worst:.3f}, regret {figures.regret:.3f}"
            + ("" if figures.spearman is None else f", Spearman {figures.spearman:.2f}")
            + f", of {count} complete {word}{'s' if count > 1 else ''}"
        )
        if result.alarms is not None:
            say(plain(result.alarms.sentence()))
    else:
        say(f"chosen without labels: {word} {result.selected.number}, {result.selected.title}")
    if settings.tuning is None and not result.selected.learned:  # a tuning's signs of collapse say so
        say(
            f"[yellow]trial {result.selected.number} hardly tells augmented images from normal ones: loss "
            f"{result.selected.loss:.2f}, a coin has 0.69; its choice means little, use more --steps[/]"
        )
    _show_evidence(result)
    for sentence in how_sure(result):
        say(f"[yellow]{plain(sentence)}[/]")
    if (decided := result.decided()) is not None:
        for sentence in decided.sentences("unlabelled images"):
            say(sentence)
    _show_next(result)


def _show_candidates(result: StudyResult, choices: Sequence[Candidate]) -> None:
    """The table of candidates, the best first; hyperparameters go first where there is no room."""
    settings, criterion = result.run.settings, result.run.settings.criterion
    values = [choice.augmentation.hyperparameters for choice in choices]
    columns = [
        Column(settings.word, [str(choice.number) for choice in choices]),
        Column("f_aug", [choice.augmentation.kind for choice in choices], right=False, rank=1),
    ]
    for rank, name in enumerate(dict.fromkeys(name for given in values for name in given), start=2):
        cells = [f"{given[name]:.4g}" if name in given else "" for given in values]
        columns.append(Column(name.replace("_", " "), cells, rank=rank))
    heading = criterion.upper() if criterion == "dsv" else criterion.replace("_", " ")
    columns.append(Column(heading, [f"{choice.criteria[criterion]:.4f}" for choice in choices]))
    if (aucs := result.aucs) is not None:
        columns.append(Column("AUC", [f"{aucs[choice.number]:.3f}" for choice in choices]))
    trained = any(choice.budget for choice in choices)
    title = (
        f"{plain(settings.task_name)}: "
        + (f"{settings.training.steps} steps a candidate, " if trained else "")
        + f"{settings.training.precision}, {settings.how}, seed {settings.seed}"
    )
    chosen = [choice.number for choice in choices].index(result.selected.number)
    print_table(title, columns, chosen)


def _show_confirmation(confirmation: Confirmation, word: str) -> None:
    """The best candidates by seed, and whether the choice stands."""
    values, means, spreads = confirmation.values, confirmation.means, confirmation.spreads
    columns = [Column(word, [str(number) for number in values])]
    for place, seed in enumerate(confirmation.seeds):
        columns.append(Column(f"seed {seed}", [_shown(of[place]) for of in values.values()], rank=place + 1))
    columns.append(Column("mean", [_shown(means[number]) for number in values]))
    columns.append(Column("spread", [_shown(spreads[number]) for number in values]))
    title = f"{confirmation.criterion} with other seeds; the lowest mean is chosen"
    print_table(title, columns, list(values).index(confirmation.chosen))
    for sentence in confirmation.account(word):
        say(plain(sentence))


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "failed"


def _show_next(result: StudyResult) -> None:
    """The commands that go on from here, as they can be typed."""
    from ssad_hpo.tracking import study_page, ui_address, ui_command

    settings, name = result.run.settings, escape(run_name(result.run.folder))
    if result.lost:
        warn(f"{result.lost} records for MLflow could not be kept; is the disk full?")
    if result.undelivered:
        why = f" ({result.trouble})" if result.trouble else ""
        warn(f"MLflow did not take {result.undelivered} records yet{why}; they are kept for `sync`")
    elif result.trouble:
        warn(f"MLflow did not take all: {result.trouble}")
    say("\nnext:")
    if result.undelivered:
        say(f"  {escape(command())} sync {name}")
    elif settings.tracking_uri:
        place = study_page(result.run.outbox) or ""
        say(f"  {plain(ui_command(settings.tracking_uri, place))}")
        if not settings.tracking_uri.startswith(("http://", "https://")):
            say(f"    and open {plain(ui_address(settings.tracking_uri, place))}")
    if settings.storage is None and shutil.which("optuna-dashboard"):
        say(f"  optuna-dashboard {escape(typed(os.path.relpath(result.run.journal)))}")
    say(f"  {escape(command())} report {name}")
    say(f"  {escape(command())} score {name} IMAGES...")


def _show_evidence(result: StudyResult) -> None:
    """What held-out images say: whether anomalies are seen, what is combined, and what is doubtful."""
    evidence = result.evidence
    if evidence is None:
        return
    word = result.run.settings.word
    for sentence in evidence.account(word):
        say(sentence)
    for sentence in evidence.doubts(word, result.selected.number):
        say(f"[yellow]{sentence}[/]")
    if evidence.as_it_comes and evidence.members[0] != result.selected.number:
        say(f"`score` uses {word} {evidence.members[0]}, with --single {word} {result.selected.number}")
    elif evidence.combined is not None and not evidence.as_it_comes:
        say("`score` uses the combined detector, with --single the selected one")


def show_ranking(ranking: Ranking) -> None:
    """Every detector's value and rank by every selector; the chosen one marked."""
    import numpy as np

    order = np.argsort(ranking.ranks[ranking.selector], kind="stable").tolist()
    names = _apart(ranking.paths)
    columns = [Column("detector", [visible(names[i]) for i in order], right=False)]
    for rank, (name, ranks) in enumerate(ranking.ranks.items(), start=1):
        heading = _SHORT.get(name, name.upper())
        stays = name == ranking.selector
        columns.append(Column(heading, [f"{ranks[i]:g}" for i in order], rank=0 if stays else rank))
    title = f"rank by each selector, 1 is best; {ranking.selector} chooses"
    print_table(title, columns, order.index(ranking.selected))
    value = ranking.values[ranking.selector][ranking.selected]
    say(f"chosen by {ranking.selector} ({value:.4g}): {plain(ranking.paths[ranking.selected])}")


def _apart(paths: Sequence[Path]) -> list[str]:
    """Paths without the leading and trailing parts that all of them share."""
    parts = [path.parts for path in paths]
    if len(set(parts)) < 2:
        return [str(path) for path in paths]
    first = next(i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1)
    ends = zip(*(reversed(p[first:]) for p in parts), strict=False)
    last = next((i for i, same in enumerate(ends) if len(set(same)) > 1), 0)
    return ["/".join(p[first : len(p) - last]) for p in parts]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: above it; may be broken between words.
        cells: one for each row, never broken.
        right: whether they are aligned at the right.
        rank: of what is left out first, the highest; what has 0 stays.
    """

    heading: str
    cells: Sequence[str]
    right: bool = True
    rank: int = 0

    @property
    def least(self) -> int:
        """The narrowest that it can be, in characters."""
        words = [*self.heading.split(), *self.cells]
        return max(map(len, words), default=0)


def print_table(title: str, columns: Sequence[Column], chosen: int | None) -> None:
    """Print a table as wide as the terminal allows.

    Args:
        chosen: the row that is marked, in the last column and by its style; None for no row.
    """
    from rich import box
    from rich.table import Table

    screen = console()
    narrow = screen.width < _NARROW
    rows = len(columns[0].cells)
    word = "*" if narrow else "selected"
    mark = Column("", [word if row == chosen else "" for row in range(rows)], right=False)
    shown, between = [*columns, mark], 2 if narrow else 3
    left_out: list[str] = []
    while sum(c.least + between for c in shown) + 1 > screen.width and any(c.rank for c in shown):
        last = max(shown, key=lambda c: c.rank)
        shown.remove(last)
        left_out.insert(0, last.heading)
    table = Table(title=title, box=None if narrow else box.HEAVY_HEAD, pad_edge=not narrow)
    for c in shown:
        table.add_column(c.heading, justify="right" if c.right else "left", min_width=c.least)
    for row in range(rows):
        style = "bold green" if row == chosen else None
        table.add_row(*(plain(c.cells[row]) for c in shown), style=style)
    screen.print(table, soft_wrap=False)
    if left_out:
        say(f"a wider terminal shows {plain(', '.join(left_out))} as well")


def run_name(folder: Path) -> str:
    """The shortest way to name a run on the command line from here, quoted for a shell."""
    if folder != Path("runs", folder.name).absolute():
        return typed(str(folder))
    # A bare name could be taken for an option, or for a folder right here.
    bare = not folder.name.startswith("-") and not Path(folder.name).is_dir()
    return typed(folder.name if bare else os.path.join("runs", folder.name))


def command() -> str:
    """How to call this program from here: by its name where that is on the PATH."""
    found = shutil.which("ssad-hpo")
    if found is None and Path(sys.argv[0]).name == "ssad-hpo":
        own = os.path.relpath(sys.argv[0])
        return typed(own if os.sep in own else os.path.join(os.curdir, own))
    return "ssad-hpo" if found else f"{typed(sys.executable)} -m ssad_hpo"


def write_anything() -> None:
    """From here on any text can be written: what a terminal's encoding lacks is shown by its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(text: object) -> str:
    """A path or name from outside for a line of output, in which markup and control characters are shown."""
    return escape(visible(str(text)))


def visible(text: str) -> str:
    """A text of one line, in which what cannot be printed is shown by its number."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def typed(word: str) -> str:
    """A word as it can be typed into a shell, from what this terminal shows; bash and zsh have $'...'."""
    try:
        if word.isprintable() and word.encode(sys.stdout.encoding or "ascii"):
            return shlex.quote(word)
    except UnicodeEncodeError:
        pass
    kept = {byte: chr(byte) for byte in range(32, 127) if chr(byte) not in "'\\"}
    return "$'" + "".join(kept.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"


def console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True, emoji=False)


def say(text: str) -> None:
    console().print(text, highlight=False)


def warn(text: str) -> None:
    """Say one sentence on standard error, on one line."""
    with contextlib.suppress(OSError):  # nobody is left to hear it
        print(f"ssad-hpo: {visible(' '.join(text.split()))}", file=sys.stderr)
