"""What the command line shows of a study while it runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ssad_hpo.cli.display import console, plain, say

if TYPE_CHECKING:
    from ssad_hpo.experiment import Run
    from ssad_hpo.task import Status


class _Live:
    """A recorder with a live line, which is gone when its `with` block is left."""

    def __init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a line a trial of its own stands here
        self.progress: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def start(self, *columns: Any, description: str, total: int) -> None:
        from rich.progress import Progress

        self.progress = Progress(*columns, console=console())
        self.progress.start()
        self.bar = self.progress.add_task(description, total=total)

    def print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)


@dataclass
class _Running:
    """A trial that is shown."""

    params: Mapping[str, Any]
    criterion: str
    begun: float
    value: float = math.nan


class SearchDisplay(_Live):
    """A recorder that shows a study as it runs: a line per finished trial, a bar below them."""

    def __init__(self, n_trials: int) -> None:
        super().__init__()
        self.n_trials = n_trials
        self.done = 0
        self.best = math.inf
        self.running: dict[str, _Running] = {}  # several at once in a sweep

    def announce(self, run: Run) -> None:
        """The settings of a search that begins or goes on."""
        settings, training = run.settings, run.settings.training
        self.n_trials += training.weights != "none"  # the encoder as it comes
        kinds, batch = ", ".join(settings.method.space.kinds), training.batch_size
        say(
            f"[bold]{plain(settings.task_name)}[/bold]: {settings.n_trials} candidates of {kinds}, "
            f"the lowest {settings.criterion} is chosen, without labels\n"
            f"{training.encoder} encoder, {training.steps} steps of {batch} + {batch} images, "
            f"{training.precision}, {settings.device}, {settings.threads} threads; "
            f"{settings.how}, seed {settings.seed}\n"
            f"run folder {plain(os.path.relpath(run.folder))}"
        )

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        if self.progress is None:
            columns = [TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self.start(*columns, TextColumn("{task.description}"), description="", total=self.n_trials)
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
        text = "" if status == "complete" else f"  [yellow]{status}[/yellow] {plain(reason or '')}"
        self.print(f"trial {trial:>3}  {value}  {seconds:5.1f} s  {_hyperparameters(running.params)}{text}")
        self.done += status != "interrupted"
        self.progress.update(self.bar, completed=self.done)


class TuningDisplay(_Live):
    """A recorder that shows a tuning as it runs: a line per finished start, a live one below them."""

    def announce(self, run: Run) -> None:
        """The settings of a tuning that begins or goes on; from here on there is a live line."""
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        settings, training, tuning = run.settings, run.settings.training, run.settings.tuning
        assert tuning is not None
        kinds = ", ".join(settings.method.space.kinds)
        batch = training.batch_size
        say(
            f"[bold]{plain(settings.task_name)}[/bold]: {kinds} tuned from {settings.n_trials} starts down "
            f"{tuning.loss}, order {tuning.order}; the lowest {settings.criterion} is kept, without labels\n"
            f"{training.encoder} encoder, {training.steps} steps of {batch} + {batch} images a start, "
            f"{tuning.warm_start_steps(training.steps)} of them before the hyperparameters move; "
            f"{settings.device}, {settings.threads} threads, seed {settings.seed}\n"
            f"run folder {plain(os.path.relpath(run.folder))}"
        )
        self.steps, self.criterion = training.steps, settings.criterion
        columns = [BarColumn(20), TimeRemainingColumn(), TextColumn("{task.description}")]
        self.start(*columns, description="warm start", total=settings.n_trials * training.steps)

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
        self.print(
            f"start {trial:>3}  {self.criterion} {value:7.3f}  {time.monotonic() - self.begun:5.1f} s  "
            f"{_hyperparameters(self.params)} became {_hyperparameters(learned)}"
        )


def _hyperparameters(params: Mapping[str, Any]) -> str:
    if params["augmentation"] == "none":
        return "the encoder as it comes"
    values = ", ".join(f"{k}={v:.4g}" for k, v in params.items() if k != "augmentation")
    return f"{params['augmentation']}({values})"
