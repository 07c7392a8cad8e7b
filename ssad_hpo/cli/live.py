"""What the command line shows of a study while it runs: a bar on a terminal, lines anywhere else."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ssad_hpo.cli.display import console, plain, say

if TYPE_CHECKING:
    from ssad_hpo.data import Source
    from ssad_hpo.experiment import Run
    from ssad_hpo.task import Status

_ROOM = 72  # columns of a terminal that has room for a bar and for what is being done
_LINES = 10  # of a tuning's start, where there is no bar


class _Clock:
    """How long the rest will take, from what this process has done.

    Args:
        total: all work, in any unit.
        done: what is done already, by earlier processes too.
    """

    def __init__(self, total: float, done: float) -> None:
        self.total, self.first, self.begun = total, done, time.monotonic()

    def left(self, done: float) -> str:
        """What to say when so much is done; nothing where nothing is known yet."""
        here = done - self.first
        if here <= 0 or done >= self.total:
            return ""
        return f"about {spoken((time.monotonic() - self.begun) / here * (self.total - done))} left"


def spoken(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Live:
    """A recorder with a live line on a terminal, which is gone when its `with` block is left."""

    def __init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a line a trial of its own stands here
        self.console = console()
        self.progress: Any = None
        self.clock = _Clock(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def start(self, what: str, *columns: Any, total: float, done: float) -> None:
        """Begin with a total of work, of which some is done."""
        from rich.progress import BarColumn, Progress, TextColumn

        self.clock = _Clock(total, done)
        if not self.console.is_terminal:
            return
        room = self.console.width >= _ROOM
        shown = [TextColumn(what), *([BarColumn(20)] if room else []), *columns]
        shown.append(TextColumn("{task.fields[left]}"))
        shown += [TextColumn("{task.description}")] if room else []
        self.progress = Progress(*shown, console=self.console)
        self.progress.start()
        self.bar = self.progress.add_task("", total=total, completed=done, left="")

    def update(self, done: float, description: str = "") -> None:
        """Show how much is done, of which parts of trials are a part, and what is being done."""
        if self.progress is not None:
            left = self.clock.left(done)
            self.progress.update(self.bar, completed=math.floor(done), left=left, description=description)

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False)


@dataclass
class _Running:
    """A trial that is shown."""

    params: Mapping[str, Any]
    criterion: str
    begun: float
    value: float = math.nan
    step: int = 0
    competes: bool = True  # not a trial that is trained again with another seed


class SearchDisplay(_Live):
    """A recorder that shows a study as it runs: a line per finished trial, a bar below them.

    Where there is no terminal, a line at each evaluation as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_trials, self.steps, self.done = 0, 1, 0
        self.best = math.inf
        self.running: dict[str, _Running] = {}  # several at once in a sweep

    def announce(self, run: Run) -> None:
        """The settings of a search that begins or goes on; from here on there is a bar."""
        from rich.progress import MofNCompleteColumn

        from ssad_hpo.experiment import finished_trials, trainings_to_come

        settings, training = run.settings, run.settings.training
        again = trainings_to_come(run)
        self.n_trials = settings.n_trials + (training.weights != "none") + again  # the encoder as it comes
        self.steps, self.done = training.steps, finished_trials(run)
        kinds, batch = ", ".join(settings.method.space.kinds), training.batch_size
        what, steps = "the encoder as it comes alone", ""
        if settings.n_trials:
            what = f"{settings.n_trials} candidates of {kinds}, the lowest {settings.criterion} is chosen"
            steps = f"{training.steps} steps of {batch} + {batch} images, "
        say(
            f"[bold]{plain(settings.task_name)}[/bold]: {what}, without labels"
            + (f", after {again} more trainings of the best with other seeds\n" if again else "\n")
            + f"{training.encoder} encoder, {steps}"
            f"{training.precision}, {settings.device}, {_threads(settings.threads)}; "
            f"{settings.how}, seed {settings.seed}\n"
            f"run folder {plain(os.path.relpath(run.folder))}"
            + (f"; {self.done} of {self.n_trials} trials are done" if self.done else "")
            + _without_held_out(settings.source)
        )
        self.start("trials", MofNCompleteColumn(), total=self.n_trials, done=self.done)

    @property
    def _share(self) -> float:
        """Trials that are done, and parts of those that run."""
        return self.done + sum(min(0.99, running.step / self.steps) for running in self.running.values())

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.running[trial] = _Running(
            params, tags["criterion"], time.monotonic(), competes="repeats" not in tags
        )

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        if (running := self.running.get(trial)) is None:
            return
        running.value, running.step = metrics[running.criterion], step
        now = f"step {step} of {self.steps}: {running.criterion} {running.value:.3f}"
        self.update(self._share, f"trial {trial}, {now}")
        if self.progress is None and step < self.steps:
            self.print("  ".join(filter(None, (f"trial {trial:>3}", now, self.clock.left(self._share)))))

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        running = self.running.pop(trial, None)
        if running is None:  # a trial that an earlier process left
            return
        self.done += status != "interrupted"
        value, seconds = f"{running.criterion} {running.value:7.3f}", time.monotonic() - running.begun
        told = f"{seconds:5.1f} s  {plain(_hyperparameters(running.params))}"
        if status == "complete" and running.competes and running.value < self.best:
            self.best, value = running.value, f"[bold green]{value}[/bold green]"
        if status == "pruned":  # a value on fewer steps is no rival of the others
            there = f"step {running.step} of {self.steps}, {running.criterion} {running.value:.3f} there"
            value = f"[dim]pruned at {there}[/dim]"
        elif status != "complete":
            value, told = f"[yellow]{status}[/yellow]", f"{told}  {plain(reason or '')}"
        left = "" if self.progress is not None else self.clock.left(self._share)
        counted = "" if self.progress is not None else f"({self.done} of {self.n_trials})"
        self.print("  ".join(filter(None, (f"trial {trial:>3}", value, told, counted, left))))
        self.update(self._share)


class TuningDisplay(_Live):
    """A recorder that shows a tuning as it runs: a line per finished start, a live one below them.

    Where there is no terminal, some lines a start.
    """

    def announce(self, run: Run) -> None:
        """The settings of a tuning that begins or goes on; from here on there is a live line."""
        from ssad_hpo.experiment import finished_starts

        settings, training, tuning = run.settings, run.settings.training, run.settings.tuning
        assert tuning is not None
        kinds = ", ".join(settings.method.space.kinds)
        batch, warm = training.batch_size, tuning.warm_start_steps(training.steps)
        moving = f"a start, {warm} of them before the hyperparameters move"
        order = f", order {tuning.order}"
        if tuning.steps_before:
            order = " of the encoder as it comes"
            trained = settings.n_trials if tuning.survivors is None else tuning.survivors
            moving = (
                f"for the {trained} that end lowest after {tuning.steps_before} steps of the hyperparameters"
            )
        say(
            f"[bold]{plain(settings.task_name)}[/bold]: {kinds} tuned from {settings.n_trials} starts down "
            f"{tuning.loss}{order}; the lowest {settings.criterion} is kept, without labels\n"
            f"{training.encoder} encoder, {training.steps} steps of {batch} + {batch} images {moving}; "
            f"{settings.device}, {_threads(settings.threads)}, seed {settings.seed}\n"
            f"run folder {plain(os.path.relpath(run.folder))}" + _without_held_out(settings.source)
        )
        self.steps, self.criterion = tuning.last_step(training.steps), settings.criterion
        self.shared, self.before = warm if tuning.warm_start_on == "range" else 0, tuning.steps_before
        # A step before the training passes fewer images than one of it.
        self.weight = max(1, round(2 * batch / tuning.validation_train)) if self.before else 1
        starts, looked = settings.n_trials, self._work(tuning.look_steps(training.steps))
        survivors = starts if tuning.survivors is None else min(starts, tuning.survivors)
        total = survivors * self._work(self.steps) + (starts - survivors) * looked
        self.going, self.told = False, 0
        looked_at = tuning.look_steps(training.steps)
        self.reached = {
            trial: self.steps if status == "complete" else looked_at
            for trial, status in finished_starts(run).items()
        }
        self.start("starts", total=total, done=self._done)
        self.update(self._done, "the encoder as it comes" if tuning.steps_before else "warm start")

    @property
    def _done(self) -> int:
        """Work of all starts, each of which may have gone on after a look at the others."""
        return sum(map(self._work, self.reached.values()))

    def _work(self, step: int) -> int:
        """What a start has done at a step, in its first ones."""
        before = min(step, self.before)
        return before + self.weight * max(0, step - before - self.shared)

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.params, self.begun = params, time.monotonic()
        self.update(self._done)

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        if self.params["augmentation"] == "none":  # the encoder as it comes
            return
        self.reached[trial] = step
        done = self._done
        if not self.going:  # a start that goes on has done some of its steps before: the clock begins here
            self.clock, self.going = _Clock(self.clock.total, done), True
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
        now = f"start {trial}, step {step}: {shown}"
        self.update(done, now)
        lines = done * _LINES // self._work(self.steps)
        if self.progress is None and lines > self.told:
            self.told = lines
            self.print("  ".join(filter(None, (now, self.clock.left(done)))))

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        if status != "complete":  # whoever stopped it says why
            return
        told = _hyperparameters(self.params)
        if self.params["augmentation"] == "none":  # no start, and judged before
            self.print(f"start {trial:>3}  {self.criterion} {metrics[self.criterion]:7.3f}  {told}")
            return
        self.reached[trial] = self.steps
        self.update(self._done)
        value = metrics.get(self.criterion, metrics["finished.validation_loss"])
        learned = {n: metrics.get(f"learned.{n}", v) for n, v in self.params.items()}
        self.print(
            f"start {trial:>3}  {self.criterion} {value:7.3f}  {time.monotonic() - self.begun:5.1f} s  "
            f"{told} became {_hyperparameters(learned)}"
        )


def _without_held_out(source: Source | None) -> str:
    """A line on what a study of few images lacks; nothing where images are held out or were not to be."""
    from ssad_hpo.data import holds_out

    if source is None or source.arguments.get("held_out_share", 0.0) is not None or holds_out(source):
        return ""  # a built-in data set, or none was to be held out
    return (
        "\nno image is held out, since there are fewer than 200 normal ones: one detector is chosen, none "
        "are combined, and `score` will not decide. --held-out DIR names others, --held-out-share 0.25 takes "
        "some of these (with fewer than 50 of them differences between candidates are mostly noise)"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _hyperparameters(params: Mapping[str, Any]) -> str:
    if params["augmentation"] == "none":
        return "the encoder as it comes"
    values = ", ".join(f"{k}={v:.4g}" for k, v in params.items() if k != "augmentation")
    return f"{params['augmentation']}({values})"
