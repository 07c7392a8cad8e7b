"""Kills runs of the command line with signal 9 at random moments, again and again: nothing may be lost.

    python -m tests.kill_loops --search 20 --tuning 20 --sweep 5

A search, a tuning and a sweep are each killed so many times, taken up by `--resume` after each kill, and in
the end compared with the same run that nobody disturbed. Prints a table; what was wrong is told below it,
and is the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # as a module of the package as well

import optuna
from alike import (
    check_same_artifacts,
    chosen_position,
    facts,
    finals_by_position,
    finished_so_far,
    study_of_copy,
)
from image_folders import make_category
from optuna.trial import TrialState
from servers import ray_of_two_processors
from told import check_delivered_exactly, records_in, runs_of
from tuned_runs import all_of

from ssad_hpo.experiment import StudyResult, load_detector, open_result, score_images, sync_run

ROOT = Path(__file__).parents[1]
SMALL = "--image-size 32 --width 8 --batch-size 8"
Moment = Literal["start-up", "open", "between", "ending"]
COLUMNS = (
    "loop", "kills", "in an open trial", "in start-up", "between trials", "in ending", "with the writer",
    "resumes", "trials lost", "trials run twice", "values that differ", "files left", "MLflow wrong",
    "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """What is run and killed.

    Attributes:
        command: of ssad-hpo.
        options: of the command, but for images and run.
        trials: how many it has, or starts.
        only_open: whether every kill hits an open trial.
    """

    command: Literal["search", "tune", "sweep"]
    options: str
    trials: int
    only_open: bool = False


@dataclass
class Told:
    """What became of a loop: a row of the table, and what was wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    with_writer: int = 0
    resumes: int = 0
    lost: int = 0
    twice: int = 0
    differ: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    mlflow: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        found = self.differ + self.left + self.mlflow + self.ended
        found += [f"{self.lost} trials lost"] * (self.lost > 0)
        return found + [f"{self.twice} trials run twice"] * (self.twice > 0)

    def row(self, name: str) -> list[str]:
        moments = [self.kills[moment] for moment in ("open", "start-up", "between", "ending")]
        counts = [self.kills.total(), *moments, self.with_writer, self.resumes, self.lost, self.twice]
        counts += [len(self.differ), len(self.left), len(self.mlflow) + len(self.ended)]
        return [name, *map(str, counts), f"{self.seconds:.0f}"]


def search_loop(kills: int) -> Loop:
    options = f"{SMALL} -a cutout -a cutavg --steps 40 --keep 2 --evaluate-at 0.25,0.5,1 --threads 1"
    return Loop("search", options, trials=max(4, kills))


def tuning_loop(kills: int) -> Loop:
    starts = max(2, kills // 4)
    shares = ",".join(f"{(i + 0.5) / starts:.3f}" for i in range(starts))
    options = f"{SMALL} -a cutdiff --steps 80 --detector-steps 1 --starts {shares} --threads 1"
    return Loop("tune", options, trials=starts)


def sweep_loop(kills: int) -> Loop:
    """Random draws and no pruner: what a sweep's trials find then depends on nothing but their place."""
    options = f"{SMALL} -a cutout -a cutavg --steps 100 --keep 2 --evaluate-at 0.25,0.5,0.75,1"
    return Loop("sweep", f"{options} --sampler random --pruner none", trials=kills + 3, only_open=True)


@dataclass(frozen=True)
class Progress:
    """How far a run is: trials begun by now (again, if they were cut off), those open, and those ended.

    A sweep's trial is open once its worker has reported.
    """

    begun: int = 0
    open: int = 0
    ended: int = 0


class Killed:
    """A run in a place of its own, and the process that works on it.

    Args:
        place: an empty working directory, with no MLflow yet.
        loop: what is run.
        images: the folder of images.
        more: options, such as the address of a cluster.
    """

    def __init__(self, place: Path, loop: Loop, images: Path, more: str = "") -> None:
        self.place, self.loop, self.folder = place, loop, place / "runs" / "r"
        self.first = [str(images), *loop.options.split(), *loop_trials(loop), "--run", "r", *more.split()]
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: tuple[int, Progress] = (-1, Progress())
        place.mkdir()

    def launch(self) -> bool:
        """Start it, or go on with it where there is something to go on with; whether there was."""
        again = (self.folder / "settings.json").exists()
        words = ["--resume", "r"] if again else self.first
        cleared = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "SSAD_HPO_STORAGE")
        environment = {name: value for name, value in os.environ.items() if name not in cleared}
        environment |= {"OMP_NUM_THREADS": "1", "SSAD_HPO_CACHE": str(self.place / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        with (self.place / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ssad_hpo", self.loop.command, *words],
                cwd=self.place,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        return again

    @property
    def runs(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def kill(self, with_writer: bool) -> None:
        """Signal 9 to its process group, and to what writes to MLflow, which has a group of its own."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        writers = children.read_text().split() if with_writer else []
        os.killpg(self.process.pid, signal.SIGKILL)
        for writer in writers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(writer), signal.SIGKILL)
        self.process.wait()

    def end(self) -> str:
        """Wait for its end; what it said if that was an error."""
        assert self.process is not None
        code = self.process.wait()
        said = (self.place / "errors").read_text(errors="replace").strip()
        return f"{self.loop.command}: exit status {code}: {said[-500:]}" if code else ""

    def progress(self) -> Progress:
        """Read anew where the file that tells it has grown."""
        source = self.folder / ("outbox.jsonl" if self.loop.command == "tune" else "journal.log")
        size = source.stat().st_size if source.exists() else 0
        if size != self._seen[0]:
            self._seen = size, self._tuned() if self.loop.command == "tune" else self._searched()
        return self._seen[1]

    def _searched(self) -> Progress:
        study = study_of_copy(self.folder / "journal.log", self.place / "copy.log")
        if study is None:
            return Progress()
        trials = study.get_trials(deepcopy=False)
        begun = sum(trial.state != TrialState.WAITING for trial in trials)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        if self.loop.command == "sweep":  # else most kills would hit before a worker has its trial
            running = [trial for trial in running if trial.intermediate_values]
        return Progress(begun, len(running), len(finals_by_position(study)))

    def _tuned(self) -> Progress:
        """Optuna has only the starts that ended; the others are in the outbox."""
        told = [r for r in self._outbox() if "trial" in r and "status" in r]
        last = Counter({r["trial"]: r["status"] for r in told}.values())
        begun = sum(r["status"] == "running" for r in told)
        return Progress(begun, last["running"], last["complete"] + last["failed"])

    def studies_begun(self) -> int:
        """How many processes came as far as to tell MLflow that the study begins."""
        return sum(r.get("status") == "running" and "trial" not in r for r in self._outbox())

    def _outbox(self) -> list[dict[str, Any]]:
        outbox = self.folder / "outbox.jsonl"
        return records_in(outbox) if outbox.exists() else []


def loop_trials(loop: Loop) -> list[str]:
    return [] if loop.command == "tune" else ["--trials", str(loop.trials)]


@dataclass(frozen=True)
class Durations:
    """How long the parts of the undisturbed run took, in seconds: what random moments are drawn from."""

    starting: float
    trial: float
    ending: float


def undisturbed(run: Killed) -> Durations:
    """Run it in one go.

    Raises:
        RuntimeError: if it ends with an error.
    """
    began, first, last = time.monotonic(), None, None
    run.launch()
    while run.runs:
        seen = run.progress()
        first = first or (time.monotonic() if seen.begun else None)
        last = last or (time.monotonic() if seen.ended == run.loop.trials else None)
        time.sleep(0.02)
    if said := run.end():
        raise RuntimeError(said)
    ended = time.monotonic()
    first, last = first or ended, last or ended
    return Durations(first - began, (last - first) / run.loop.trials, ended - last)


def draw(chance: random.Random, kill: int, kills: int, loop: Loop) -> Moment:
    """When the next kill is to be; the first in the first second, the last fifth when all trials are over."""
    if loop.only_open:
        return "open"
    if kill == 0:
        return "start-up"
    if kill >= kills - max(1, kills // 5):
        return "ending"
    return chance.choices(("start-up", "open", "between"), (0.25, 0.5, 0.25))[0]


def wait_for(run: Killed, moment: Moment, chance: random.Random, durations: Durations) -> bool:
    """Wait until the moment to kill a process that was just launched; False if that ended before."""
    before = run.progress()

    def alive_until(condition: Callable[[], Any]) -> bool:
        while run.runs:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def all_is_over() -> bool:
        return run.progress().ended >= run.loop.trials

    def open_by_it() -> bool:
        seen = run.progress()
        return seen.open > 0 and seen.begun > before.begun

    if moment == "start-up":
        pause = chance.uniform(0, chance.choice((1.0, durations.starting)))
    elif moment == "open":
        if not alive_until(lambda: open_by_it() or all_is_over()):
            return False
        pause = chance.uniform(0, durations.trial)
    elif moment == "between":
        if not alive_until(lambda: run.progress().ended > before.ended or all_is_over()):
            return False
        pause = 0.0
    else:
        if not alive_until(all_is_over):
            return False
        if before.ended >= run.loop.trials:  # it has only to choose and to tell
            begun = run.studies_begun()
            if not alive_until(lambda: run.studies_begun() > begun):
                return False
        pause = chance.uniform(0, durations.ending)
    until = time.monotonic() + pause
    alive_until(lambda: time.monotonic() >= until)
    return alive_until(open_by_it) if run.loop.only_open else run.runs


def kill_again_and_again(
    run: Killed, kills: int, chance: random.Random, durations: Durations, told: Told
) -> dict[int, Any]:
    """Kill it so many times, then let it end; every trial that was finished at a kill."""
    finished: dict[int, Any] = {}
    for _ in range(5 * kills):
        if told.kills.total() == kills:
            break
        before, begun = run.progress(), run.studies_begun()
        told.resumes += run.launch()
        moment = draw(chance, told.kills.total(), kills, run.loop)
        if not wait_for(run, moment, chance, durations):
            if said := run.end():
                told.ended.append(said)
            continue
        with_writer = chance.random() < 0.5
        told.with_writer += with_writer
        run.kill(with_writer)
        told.kills[moment_of(run, before, begun)] += 1
        for number, trial in finished_so_far(run.folder, run.place).items():
            if finished.setdefault(number, trial) != trial:
                told.lost += 1
    if told.kills.total() < kills:
        told.ended.append(f"{run.loop.command}: ended too often before a kill")
    told.resumes += run.launch()
    if said := run.end():
        told.ended.append(said)
    return finished


def moment_of(run: Killed, before: Progress, studies_begun: int) -> Moment:
    """Where a kill hit, from what the run folder told before the process was launched and tells now."""
    now = run.progress()
    if run.studies_begun() == studies_begun:
        return "start-up"
    if before.ended >= run.loop.trials:
        return "ending"
    if now.begun == before.begun:
        return "start-up"
    if now.open:
        return "open"
    return "ending" if now.ended >= run.loop.trials else "between"


def compare(run: Killed, other: Killed, finished: dict[int, Any], told: Told) -> None:
    """Look for all that a run that was killed has not, has twice or has otherwise than an undisturbed one."""
    result, expected = open_result(run.folder), open_result(other.folder)
    mine, theirs = finals_by_position(result.study), finals_by_position(expected.study)
    told.lost += len(theirs.keys() - mine.keys())
    told.twice += sum(len(trials) - 1 for trials in mine.values()) + len(mine.keys() - theirs.keys())
    for number, (found, ended) in finished.items():
        trial = result.study.trials[number]
        told.lost += (facts(trial), trial.datetime_complete) != (found, ended)
    for place in sorted(mine.keys() & theirs.keys()):
        a, b = facts(mine[place][0]), facts(theirs[place][0])
        names = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
        told.differ += [f"trial {place}: {name}" for name in sorted(names)]
        if a["state"] == b["state"] == "COMPLETE":
            with held(told.differ, f"trial {place}: what is kept of it"):
                check_same_artifacts(mine[place][0], theirs[place][0])
    if chosen_position(result) != chosen_position(expected):
        told.differ.append("the choice")
    if result.selected.criteria != expected.selected.criteria:
        told.differ.append("the criteria of the choice")
    if run.loop.command == "tune" and all_of(result) != all_of(expected):
        told.differ.append("what the tuning found")
    if scores(run) != scores(other):
        told.differ.append("scores.csv")
    told.left += compare_files(run, other)
    told.mlflow += compare_mlflow(run, result)


@contextlib.contextmanager
def held(wrong: list[str], what: str) -> Iterator[None]:
    """An assertion that does not hold is one more thing that is wrong."""
    try:
        yield
    except AssertionError as error:
        wrong.append(f"{what}: {str(error)[:300]}")


def scores(run: Killed) -> list[tuple[str, float]]:
    """What `ssad-hpo score` writes into scores.csv, of the unlabelled images."""
    images = Path(run.first[0]) / "test"
    return [(str(path), value) for path, value in score_images(load_detector(run.folder), [images])]


def compare_files(run: Killed, other: Killed) -> list[str]:
    """Files that one of two runs has more of than the other; names that are made up count as one."""
    a, b = files_of(run), files_of(other)
    return [f"left: {name} x {n}" for name, n in (a - b).items()] + [
        f"missing: {name} x {n}" for name, n in (b - a).items()
    ]


def files_of(run: Killed) -> Counter[str]:
    own = ("copy.log", "errors")
    found = [path for path in run.place.rglob("*") if not path.is_dir() and path.name not in own]
    names = [path.relative_to(run.place).as_posix() for path in found]
    # Ray leaves notes of every Tuner, also where nobody disturbs it; checkpoints are what matters.
    names = [name for name in names if "/ray/" not in name or "/checkpoint_" in name]
    return Counter(re.sub(r"[0-9a-f]{16,}|(?<=trial-)\d{5}-[0-9a-f]{8}", "*", name) for name in names)


def compare_mlflow(run: Killed, result: StudyResult) -> list[str]:
    """What MLflow has otherwise than Optuna: one run of each trial with its end, and one of the study."""
    wrong: list[str] = []
    synced = sync_run(run.folder)
    if synced.remaining or synced.refused or synced.error:
        wrong.append(f"MLflow: {synced}")
    settings = result.run.settings
    uri = str(settings.tracking_uri)
    with held(wrong, "MLflow"):
        check_delivered_exactly(uri, result.run.outbox)
        statuses = {name: r.info.status for name, r in runs_of(uri, settings.experiment).items()}
        ends = {f"{settings.word} {trial.number}": end_of(trial) for trial in result.study.trials}
        expected = {settings.title: "FINISHED", **ends}
        differ = [name for name in statuses.keys() | expected if statuses.get(name) != expected.get(name)]
        told = [f"{name} is {statuses.get(name)} for {expected.get(name)}" for name in sorted(differ)]
        assert not told, "; ".join(told)
    return wrong


def end_of(trial: optuna.trial.FrozenTrial) -> str:
    """The status that MLflow's run of a trial should have."""
    if trial.state == TrialState.FAIL:
        return "FAILED" if "failure" in trial.user_attrs else "KILLED"
    return {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "FINISHED"}.get(trial.state, "an end")


def kill_loop(loop: Loop, kills: int, place: Path, seed: int = 0, more: str = "") -> Told:
    """Kill a run so many times and compare it with an undisturbed one.

    Args:
        loop: what is run.
        kills: how many.
        place: an empty folder.
        seed: of the moments.
        more: options of the command, such as the address of a cluster.
    """
    began, told = time.monotonic(), Told()
    images = make_category(place / "images", n=10)
    other, run = (Killed(place / name, loop, images, more) for name in ("undisturbed", "killed"))
    try:
        durations = undisturbed(other)
        finished = kill_again_and_again(run, kills, random.Random(seed), durations, told)
    finally:
        for some in (other, run):
            if some.process is not None and some.runs:
                some.kill(with_writer=True)
    compare(run, other, finished, told)
    told.seconds = time.monotonic() - began
    return told


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, kills in (("search", 20), ("tuning", 20), ("sweep", 5)):
        parser.add_argument(
            f"--{name}", type=int, default=kills, metavar="N", help=f"kills (default {kills})"
        )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    wrong: list[str] = []
    print(f"{line(COLUMNS)}\n{line(['---'] * len(COLUMNS))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("search", search_loop), ("tuning", tuning_loop), ("sweep", sweep_loop)):
            if (kills := getattr(given, name)) == 0:
                continue
            (place := Path(folder) / name).mkdir()
            with ray_of_two_processors() if name == "sweep" else contextlib.nullcontext() as address:
                more = f"--address {address}" if address else ""
                told = kill_loop(make(kills), kills, place, given.seed, more)
            print(line(told.row(name)), flush=True)
            wrong += [f"- {name}: {what}" for what in told.wrong]
    print("\n" + ("\n".join(wrong) or "Nothing was lost, nothing was run twice, nothing differs."))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
