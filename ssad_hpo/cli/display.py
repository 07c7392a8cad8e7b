"""What the command line shows: a study as it runs, its result, sentences."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from ssad_hpo.experiment import Run, StudyResult
    from ssad_hpo.search import Ranking
    from ssad_hpo.task import Status


# Headings of the table of ranks, which must fit into 80 columns.
_SHORT = {"discordance": "dis", "smooth_alignment": "smooth", "soft_alignment": "soft"}


@dataclass
class _Running:
    """A trial that is shown."""

    params: Mapping[str, Any]
    criterion: str
    begun: float
    value: float = math.nan


class Display:
    """A recorder that shows a study as it runs: a line per finished trial, a bar below them."""

    def __init__(self, n_trials: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a line a trial of its own stands here
        self.n_trials = n_trials
        self.done = 0
        self.best = float("inf")
        self.progress: Any = None
        self.running: dict[str, _Running] = {}  # several at once in a sweep

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.progress is None:
            columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self.progress = Progress(
                TextColumn("trials"), *columns, TextColumn("{task.description}"), console=console()
            )
            self.progress.start()
            self.bar = self.progress.add_task("", total=self.n_trials)
        self.running[trial] = _Running(params, tags["criterion"], time.monotonic())

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        if (running := self.running.get(trial)) is None:
            return
        running.value = metrics[running.criterion]
        self.progress.update(
            self.bar, description=f"trial {trial}, step {step}: {running.criterion} {running.value:.3f}"
        )

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        running = self.running.pop(trial, None)
        if running is None:  # a trial that an earlier process left
            return
        seconds = time.monotonic() - running.begun
        value = f"{running.criterion} {running.value:7.3f}"
        if status == "complete" and running.value < self.best:
            self.best, value = running.value, f"[bold green]{value}[/bold green]"
        text = "" if status == "complete" else f"  [yellow]{status}[/yellow] {escape(reason or '')}"
        self.progress.console.print(
            f"trial {trial:>3}  {value}  {seconds:5.1f} s  {_hyperparameters(running.params)}{text}",
            highlight=False,
        )
        self.done += status != "interrupted"
        self.progress.update(self.bar, completed=self.done)


class TuningDisplay:
    """A recorder that shows a tuning as it runs: a line per finished start, a live one below them."""

    def __init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def __enter__(self) -> TuningDisplay:
        self.progress: Any = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def announce(self, run: Run) -> None:
        """The settings of a tuning that begins or goes on; from here on there is a live line."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        settings, training, tuning = run.settings, run.settings.training, run.settings.tuning
        assert tuning is not None
        (kind,) = settings.space.kinds
        batch = training.batch_size
        say(
            f"[bold]{escape(settings.task_name)}[/bold]: {kind} tuned from {settings.n_trials} starts down "
            f"{tuning.loss}, order {tuning.order}; the lowest {settings.criterion} is kept, without labels\n"
            f"{training.encoder} encoder, {training.steps} steps of {batch} + {batch} images a start, "
            f"{tuning.warm_start_steps(training.steps)} of them before the hyperparameters move; "
            f"{settings.device}, {settings.threads} threads, seed {settings.seed}\n"
            f"run folder {escape(os.path.relpath(run.folder))}"
        )
        self.steps, self.criterion = training.steps, settings.criterion
        columns = [BarColumn(20), TimeRemainingColumn(), TextColumn("{task.description}")]
        self.progress = Progress(*columns, console=console())
        self.progress.start()
        self.bar = self.progress.add_task("warm start", total=settings.n_trials * training.steps)

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.params, self.begun = params, time.monotonic()
        self.progress.update(self.bar, completed=int(trial) * self.steps)

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
        self.progress.update(
            self.bar,
            completed=int(trial) * self.steps + step,
            description=f"start {trial}, step {step}: {shown}",
        )

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        if status != "complete":  # whoever stopped it says why
            return
        self.progress.update(self.bar, completed=(int(trial) + 1) * self.steps)
        value = metrics.get(self.criterion, metrics["finished.validation_loss"])
        learned = {n: metrics.get(f"learned.{n}", v) for n, v in self.params.items()}
        self.progress.console.print(
            f"start {trial:>3}  {self.criterion} {value:7.3f}  {time.monotonic() - self.begun:5.1f} s  "
            f"{_hyperparameters(self.params)} became {_hyperparameters(learned)}",
            highlight=False,
        )


def announce(run: Run) -> None:
    """The settings of a search that begins or goes on."""
    settings, training = run.settings, run.settings.training
    kinds, batch = ", ".join(settings.space.kinds), training.batch_size
    say(
        f"[bold]{escape(settings.task_name)}[/bold]: {settings.n_trials} candidates of {kinds}, "
        f"the lowest {settings.criterion} is chosen, without labels\n"
        f"{training.encoder} encoder, {training.steps} steps of {batch} + {batch} images, "
        f"{training.precision}, {settings.device}, {settings.threads} threads; "
        f"sampler {settings.sampler}, pruner {settings.stopping}, seed {settings.seed}\n"
        f"run folder {escape(os.path.relpath(run.folder))}"
    )


def show(result: StudyResult) -> None:
    """A study's candidates, the choice, the figures that judge it, and the next commands."""
    from rich.table import Table

    from ssad_hpo.experiment.tuning import COLLAPSE
    from ssad_hpo.search import FAILURE, candidates
    from ssad_hpo.tracking import ui_command

    settings, criterion = result.run.settings, result.run.settings.criterion
    word = "trial" if settings.tuning is None else "start"
    choices = sorted(candidates(result.study), key=lambda c: (c.criteria[criterion], c.number))
    names = list(dict.fromkeys(name for c in choices for name in c.augmentation.hyperparameters))
    how = settings.sampler if settings.tuning is None else str(settings.tuning.loss)
    table = Table(
        title=f"{escape(settings.task_name)}: {settings.training.steps} steps a candidate, "
        f"{settings.training.precision}, {how}, seed {settings.seed}"
    )
    table.add_column(word, justify="right")
    table.add_column("f_aug")
    for heading in (*names, criterion.upper() if criterion == "dsv" else criterion):
        table.add_column(heading.replace("_", " "), justify="right")
    if result.aucs is not None:
        table.add_column("AUC", justify="right")
    table.add_column("")
    for candidate in choices:
        values = candidate.augmentation.hyperparameters
        row = [str(candidate.number), candidate.augmentation.kind]
        row += [f"{values[name]:.4g}" if name in values else "" for name in names]
        row.append(f"{candidate.criteria[criterion]:.4f}")
        if result.aucs is not None:
            row.append(f"{result.aucs[candidate.number]:.3f}")
        chosen = candidate.number == result.selected.number
        table.add_row(*row, "selected" if chosen else "", style="bold green" if chosen else None)
    console().print(table)
    for trial in result.study.get_trials(deepcopy=False):
        if FAILURE in trial.user_attrs:
            say(f"{word} {trial.number} failed: {escape(trial.user_attrs[FAILURE])}")
        for sign in trial.user_attrs.get(COLLAPSE, ()):
            told = f"start {trial.number}: {sign}"
            warn(told) if trial.number == result.selected.number else say(escape(told))
    ended = len(result.study.get_trials(deepcopy=False))
    if settings.tuning is not None and ended < settings.n_trials:
        resume = f"{command()} tune --resume {run_name(result.run.folder)}"
        say(f"{settings.n_trials - ended} more starts are not done; go on with: {escape(resume)}")
    if others := ended - len(choices):
        say(f"{others} more {word}s were pruned, failed or interrupted; they do not compete")
    if (figures := result.evaluation) is not None:
        say(
            f"AUC selected [bold green]{figures.auc_selected:.3f}[/bold green] "
            f"· random {figures.auc_random:.3f} · oracle {figures.auc_oracle:.3f} "
            f"· worst {figures.auc_worst:.3f} · regret {figures.regret:.3f}"
            + ("" if figures.spearman is None else f" · Spearman {figures.spearman:.2f}")
        )
    else:
        say(f"chosen without labels: {word} {result.selected.number}, {result.selected.augmentation}")
    if settings.tuning is None and not result.selected.learned:  # a tuning's signs of collapse say so
        say(
            f"[yellow]trial {result.selected.number} hardly tells augmented images from normal ones: loss "
            f"{result.selected.loss:.2f}, a coin has 0.69; its choice means little, use more --steps[/]"
        )
    say("\nnext:")
    name = escape(run_name(result.run.folder))
    if result.lost:
        warn(f"{result.lost} records for MLflow could not be kept; is the disk full?")
    if result.undelivered:
        warn(f"MLflow did not take {result.undelivered} records yet")
        say(f"  {escape(command())} sync {name}")
    elif settings.tracking_uri:
        say(f"  {escape(ui_command(settings.tracking_uri))}")
    say(f"  {escape(command())} report {name}")
    say(f"  {escape(command())} score {name} IMAGES...")


def show_ranking(ranking: Ranking) -> None:
    """Every detector's value and rank by every selector; the chosen one marked."""
    import numpy as np
    from rich.table import Table

    table = Table(title=f"rank by each selector, 1 is best; {ranking.selector} chooses")
    table.add_column("detector")
    for name in ranking.ranks:
        table.add_column(_SHORT.get(name, name.upper()), justify="right")
    names = _apart(ranking.paths)
    for i in np.argsort(ranking.ranks[ranking.selector], kind="stable"):
        row = [f"{ranks[i]:g}" for ranks in ranking.ranks.values()]
        table.add_row(escape(names[i]), *row, style="bold green" if i == ranking.selected else None)
    console().print(table)
    value = ranking.values[ranking.selector][ranking.selected]
    say(f"chosen by {ranking.selector} ({value:.4g}): {escape(str(ranking.paths[ranking.selected]))}")


def _apart(paths: Sequence[Path]) -> list[str]:
    """Paths without the leading and trailing parts that all of them share."""
    parts = [path.parts for path in paths]
    if len(set(parts)) < 2:
        return [str(path) for path in paths]
    first = next(i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1)
    ends = zip(*(reversed(p[first:]) for p in parts), strict=False)
    last = next((i for i, same in enumerate(ends) if len(set(same)) > 1), 0)
    return ["/".join(p[first : len(p) - last]) for p in parts]


def _hyperparameters(params: Mapping[str, Any]) -> str:
    values = ", ".join(f"{k}={v:.4g}" for k, v in params.items() if k != "augmentation")
    return f"{params['augmentation']}({values})"


def run_name(folder: Path) -> str:
    """The shortest way to name a run on the command line from here, quoted for a shell."""
    return shlex.quote(folder.name if folder == Path("runs", folder.name).absolute() else str(folder))


def command() -> str:
    """How to call this program from here: by its name where that is on the PATH."""
    found = shutil.which("ssad-hpo")
    if found is None and Path(sys.argv[0]).name == "ssad-hpo":
        return os.path.relpath(sys.argv[0])
    return "ssad-hpo" if found else f"{sys.executable} -m ssad_hpo"


def console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True)


def say(text: str) -> None:
    console().print(text, highlight=False)


def warn(text: str) -> None:
    print(f"ssad-hpo: {text}", file=sys.stderr)
