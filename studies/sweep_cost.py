"""What a sweep costs beside its trainings: workers that wait, and milliseconds per trial for the books.

    python -m studies.sweep_cost             about 15 minutes on two idle cores
    python -m studies.sweep_cost --smoke     under a minute

Throughput. The same trials of "gravel/cutavg" (random sampler, one seed, no scheduler, `Training`'s
default budget) are swept by `run_study` on Ray with one worker and with two, of one thread each, in turns,
so that whatever disturbs the machine disturbs both. A worker's rate is that of its trials after the first, in
which it still imports; the rates of all workers are added. Beside it stands the rate from the first trial's
start to the last one's end, with late and idle workers.
Three clocks tell where it goes: a recorder in the driver hears of starts, last reports and ends; the search
space notes in the worker when it is asked for a trial's augmentation, which is when training begins; and
the trial's own "seconds" say how long it trained.

Overhead. 500 trials that train next to nothing: one step of two 8-pixel images in the narrowest encoder.
All else is the product's own path (`run_study`, here and on Ray, with the sampler TPE, a journal, every
trial's artifacts kept), so what a trial takes is what drawing, telling, keeping and tracking cost. What the
tiny training itself takes is measured on the same candidates afterwards, and subtracted. A stand-in that
did not train would skip the keeping as well, which is part of the cost.
Writes sweep_cost.md and .csv, a row for every measured value.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.data import builtin, load
from ssad_hpo.experiment import run_study
from ssad_hpo.search.record import read_trial
from ssad_hpo.task import Augmentation, Cluster, Search, SearchSpace, Task, Training
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, spread, write_results
from studies.lab.searching import trained

LIMIT = 50.0  # milliseconds a trial that a local search, tracked, may cost beside its training
TRIVIAL = Training(steps=1, batch_size=2, width=2, evaluate_at=(1.0,), precision="float32")
WAYS = [(runner, tracked) for runner in ("local", "ray") for tracked in (False, True)]
# What a worker's time goes to, in the order of a trial.
PARTS = {
    "fetch": "until the function has its images, from the object store",
    "train": "training and judging, with the checkpoints in its course",
    "warm": "what a worker's first training takes longer: imports, caches",
    "checkpoint": "last checkpoint, written and reported",
    "book": "the driver keeps its artifacts and tells Optuna",
    "next": "until the worker is given its next trial",
    "idle": "before a worker's first trial and after its last",
}
RATE = "trials per minute"
Trained = tuple[float, str, float]  # since when, its number, for how many seconds


class Clock:
    """A recorder that notes when the driver hears of each trial's start, last report and end."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.reported: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.started[trial] = time.time()

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        self.reported[trial] = time.time()

    def trial_ended(
        self, trial: str, status: str, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        self.ended[trial] = time.time()


class NotedSpace(SearchSpace):
    """A space that notes each worker's process, and when it began to train which parameters."""

    notes: Path
    driver: int

    def __init__(self, kinds: str, notes: Path) -> None:
        super().__init__(kinds)
        object.__setattr__(self, "notes", notes)  # the class is frozen
        object.__setattr__(self, "driver", os.getpid())

    def augmentation(self, params: Mapping[str, Any]) -> Augmentation:
        if os.getpid() != self.driver:
            with self.notes.open("a") as lines:
                print(json.dumps([time.time(), os.getpid(), _key(params)]), file=lines)
        return super().augmentation(params)


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


# ------------------------------------------------------------------------------------------ throughput


def throughput(task: Task, training: Training, n_trials: int, workers: int, folder: Path) -> dict[str, float]:
    """Trials per minute, seconds of start and stop of Ray, and seconds per trial and worker of `PARTS`."""
    folder.mkdir()
    clock, notes = Clock(), folder / "notes.jsonl"
    began = time.time()
    result = run_study(
        task,
        Search(NotedSpace("cutavg", notes), n_trials=n_trials, sampler="random"),
        training,
        cluster=Cluster(max_concurrent=workers),
        run=folder / "run",
        tracking_uri=None,
        listeners=[clock],
    )
    returned = time.time()
    first, last = min(clock.started.values()), max(clock.ended.values())
    wall = last - first
    teams = by_worker(notes, result.study.trials)
    parts = account(clock, teams, workers * wall)
    return {
        RATE: 60 * sum(map(partial(rate_after_the_first, clock), teams)),
        "from first start to last end": 60 * len(clock.ended) / wall,
        "seconds until the first trial starts": first - began,
        "seconds from the last end to return": returned - last,
        **{name: seconds / len(clock.ended) for name, seconds in parts.items()},
    }


def by_worker(notes: Path, trials: Sequence[FrozenTrial]) -> list[list[Trained]]:
    """The trials of each worker, in order."""
    noted = {key: (at, worker) for at, worker, key in map(json.loads, notes.read_text().splitlines())}
    teams: dict[int, list[Trained]] = defaultdict(list)
    for trial in trials:
        at, worker = noted[_key(trial.params)]
        teams[worker].append((at, str(trial.number), read_trial(trial).seconds or 0.0))
    return [sorted(mine) for mine in teams.values()]


def rate_after_the_first(clock: Clock, mine: list[Trained]) -> float:
    """Trials per second of a worker; 0 of one that had but one trial."""
    first, last = clock.ended[mine[0][1]], clock.ended[mine[-1][1]]
    return (len(mine) - 1) / (last - first) if len(mine) > 1 else 0.0


def account(clock: Clock, teams: list[list[Trained]], whole: float) -> dict[str, float]:
    """The workers' `whole` seconds, split into `PARTS`."""
    parts = dict.fromkeys(PARTS, 0.0)
    for mine in teams:
        usual = statistics.median(seconds for _, _, seconds in mine[1:] or mine)
        parts["warm"] += mine[0][2] - usual
        parts["train"] -= mine[0][2] - usual
        for began, number, seconds in mine:
            parts["fetch"] += began - clock.started[number]
            parts["train"] += seconds
            parts["checkpoint"] += clock.reported[number] - began - seconds
            parts["book"] += clock.ended[number] - clock.reported[number]
        for (_, before, _), (_, after, _) in itertools.pairwise(mine):
            parts["next"] += clock.started[after] - clock.ended[before]
    return {**parts, "idle": whole - sum(parts.values())}


# -------------------------------------------------------------------------------------------- overhead


def overhead(runner: str, tracked: bool, n_trials: int, folder: Path) -> list[Row]:
    """Milliseconds per trial over the course of a study whose trainings are next to nothing."""
    folder.mkdir()
    task, clock = noise(), Clock()
    children = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    settings: dict[str, Any] = {
        "search": Search(n_trials=n_trials),
        "training": TRIVIAL,
        "run": folder / "run",
        "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}" if tracked else None,
        "listeners": [clock],
    }
    if runner == "local":
        result = run_study(task, threads=1, **settings)
    else:
        result = run_study(task, cluster=Cluster(), **settings)
    returned, spent = time.time(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    begun, ends = min(clock.started.values()), sorted(clock.ended.values())
    values: dict[str, float] = {
        **{f"trials {low} to {high}": _pace(begun, ends, low, high) for low, high in windows(n_trials)},
        "all trials": _pace(begun, ends, 0, n_trials),
        "training alone": training_alone(task, result.study.get_trials(states=[TrialState.COMPLETE])[:50]),
    }
    if runner == "local":  # Ray's processes are children too
        values["CPU of the writer to MLflow"] = 1e3 * (spent - children) / n_trials
    if tracked:
        values["seconds after the last trial"] = returned - ends[-1]
        values["undelivered then"] = result.undelivered
    where = {"part": "overhead", "runner": runner, "tracking": "on" if tracked else "off"}
    return [{**where, "measure": name, "value": f"{value:.3f}"} for name, value in values.items()]


def noise() -> Task:
    images = torch.randint(256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Task("noise", images[:8], images[8:])


def windows(n_trials: int) -> list[tuple[int, int]]:
    """From and to which trial: early, late, and fifths of the study; of 500, 50 to 150 and 400 to 500."""
    fifth = n_trials // 5
    early, fifths = (fifth // 2, fifth // 2 + fifth), [(i * fifth, (i + 1) * fifth) for i in range(5)]
    return [early, *fifths]


def _pace(begun: float, ends: list[float], low: int, high: int) -> float:
    """Mean milliseconds from the end of one trial to that of the next."""
    return 1e3 * (ends[high - 1] - (ends[low - 1] if low else begun)) / (high - low)


def training_alone(task: Task, trials: Sequence[FrozenTrial]) -> float:
    """Mean milliseconds of the same trainings without any study around them."""
    began = time.perf_counter()
    for trial in trials:
        augmentation = read_trial(trial).augmentation
        assert augmentation is not None  # it is complete
        trained(task, augmentation, TRIVIAL)
    return 1e3 * (time.perf_counter() - began) / len(trials)


# ------------------------------------------------------------------------------------------- reporting


def throughput_page(rows: Sequence[Row], rounds: int) -> str:
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        found[row["workers"], row["measure"]].append(float(row["value"]))
    names = list(dict.fromkeys(row["measure"] for row in rows if row["measure"] not in PARTS))
    counts = [1, 2]
    lines = [[name, *(spread(found[workers, name]) for workers in counts)] for name in names]
    one, two = (found[workers, names[0]] for workers in counts)
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    whole = {w: sum(statistics.mean(found[w, part]) for part in PARTS) for w in counts}
    goes = []
    for part, meaning in PARTS.items():
        seconds = [statistics.mean(found[workers, part]) for workers in counts]
        goes.append(
            [meaning, *(f"{s:.3f}, {s / whole[w]:.1%}" for s, w in zip(seconds, counts, strict=True))]
        )
    goes.append(["all", *(f"{whole[workers]:.3f}" for workers in counts)])
    return f"""{markdown_table(["", "1 worker", "2 workers"], lines)}
Two workers do **{spread(ratios)} times** as many trials per minute as one, round by round.

Where a worker's time goes: seconds per trial (means over {rounds} rounds) and share.

{markdown_table(["", "1 worker", "2 workers"], goes)}
The driver, Ray's own processes and two workers share the cores; what two workers train longer than one is
what they take from each other. The checkpoints at the earlier evaluations are within the training, each
about as long as the last.
"""


def overhead_page(rows: Sequence[Row], n_trials: int) -> str:
    found = {(r["runner"], r["tracking"], r["measure"]): float(r["value"]) for r in rows}
    ways = list(dict.fromkeys((r["runner"], r["tracking"]) for r in rows))
    early, *_, late = (f"trials {low} to {high}" for low, high in windows(n_trials))
    shown = ["all trials", early, late, "training alone", "CPU of the writer to MLflow"]
    shown += ["seconds after the last trial", "undelivered then"]
    lines = []
    for name in shown:
        cells = (found.get((*way, name)) for way in ways)
        lines.append([name, *("" if value is None else f"{value:.1f}" for value in cells)])
    said, worst = [], 0.0
    for way in [way for way in ways if way[0] == "local"]:
        first, then = (found[(*way, name)] - found[(*way, "training alone")] for name in (early, late))
        said.append(f"with tracking {way[1]} {first:.0f} ms early and {then:.0f} ms late")
        worst = max(worst, then)
    verdict = "within" if worst <= LIMIT else "**over**"
    return f"""{markdown_table(["milliseconds per trial", *(f"{r}, tracking {t}" for r, t in ways)], lines)}
A local search costs, beside its trainings, {"; ".join(said)}:
{verdict} the limit of {LIMIT:.0f} ms. With Ray the trials of all workers end side by side, so its rows are
what a sweep can do at best, not what one trial takes. Early is {early}, late {late}.
"""


def main() -> None:
    parser = study_parser("sweep_cost", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput of one and of two workers")
    parser.add_argument("--trials", type=int, default=16, help="of a sweep for the throughput")
    parser.add_argument("--trivial", type=int, default=500, help="trials of a study for the overhead")
    options = parse(parser)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task, training, ways = load(builtin("gravel/cutavg")), Training(), WAYS
    if options.smoke:
        task, training = noise(), replace(TRIVIAL, steps=4, evaluate_at=(0.5, 1.0))
        options.rounds, options.trials, options.trivial, ways = 1, 4, 10, [WAYS[1], WAYS[3]]

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sweep_cost-") as name:
        for turn, workers in itertools.product(range(options.rounds), (1, 2)):
            values = throughput(task, training, options.trials, workers, Path(name) / f"{turn}-{workers}")
            where = {"part": "throughput", "round": turn, "workers": workers}
            rows += [{**where, "measure": m, "value": f"{value:.4f}"} for m, value in values.items()]
            print(*(f"{key}: {value}" for key, value in rows[-len(values)].items()), flush=True)
        for runner, tracked in ways:
            rows += overhead(runner, tracked, options.trivial, Path(name) / f"{runner}-{tracked}")
            print(*rows[-1].values(), flush=True)

    of = {part: [row for row in rows if row["part"] == part] for part in ("throughput", "overhead")}
    text = f"""# What a sweep costs beside its trainings

{made_by("sweep_cost", options)}

## Throughput

{options.trials} trials of {task.name}, {training.steps} steps, random sampler, seed 0, no scheduler, a thread
for each worker, {options.rounds} rounds in turns: medians and ranges.

{throughput_page(of["throughput"], options.rounds)}
## Search and tracking

{options.trivial} trials of one training step of two images of 8 pixels; sampler TPE, a journal, MLflow
in SQLite.

{overhead_page(of["overhead"], options.trivial)}"""
    write_results(options, "sweep_cost", text, rows)


if __name__ == "__main__":
    main()
