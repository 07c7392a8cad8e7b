"""The command line: real processes for the main path, `main()` in this process for the rest."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from conftest import Ended

from ssad_hpo import CRITERIA, data
from ssad_hpo.bilevel import DEFAULT_TRAINING, PATCHES, PATCHES_HELD_OUT, Tuning
from ssad_hpo.cli import app, main
from ssad_hpo.cli.options import CRITERIA_TOLD
from ssad_hpo.experiment import open_result, open_run
from ssad_hpo.search import candidates, select
from ssad_hpo.task import COMBINED, PRETRAINED, Cluster, Range, Search, Training

pytestmark = pytest.mark.usefixtures("workplace")

PROGRAM = [sys.executable, "-m", "ssad_hpo"]
QUICK = "--steps 4 --batch-size 4 --width 2 --image-size 16 --threads 1 --no-tracking".split()
QUICK += ["--evaluate-at", "0.5,0.75,1"]
LEARNING = "--steps 30 --batch-size 8 --width 8 --threads 1 --no-tracking".split()
COMMANDS = list(app.commands)


def process(*words: str | Path) -> Ended:
    ended = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@dataclass(frozen=True)
class Searched:
    place: Path
    images: Path
    said: Ended


@pytest.fixture(scope="module")
def searched_once(tmp_path_factory: pytest.TempPathFactory, make_category: Callable[..., Path]) -> Searched:
    """`ssad-hpo search cloth` in a process of its own, its run in runs/first."""
    place = tmp_path_factory.mktemp("searched")
    images = make_category(place / "cloth")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "SSAD_HPO_CACHE": ""}
    ended = subprocess.run(
        [*PROGRAM, "search", "cloth", "--trials", "4", "--run", "first", *QUICK],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    return Searched(place, images, Ended(ended.returncode, ended.stdout, ended.stderr))


@pytest.fixture
def searched(searched_once: Searched, workplace: Path) -> Searched:
    """A copy of the run, to be changed at will, in this test's working directory."""
    shutil.copytree(searched_once.place / "runs", workplace / "runs")
    return searched_once


# search


def test_searching_a_folder_ends_with_a_table_the_figures_and_the_next_command(searched: Searched) -> None:
    said = searched.said
    assert (said.code, said.err) == (0, "")
    result = open_result("first")
    assert "4 candidates of cutavg, the lowest dsv is chosen, without labels" in said.out
    assert f"run folder {Path('runs', 'first')}" in said.out
    for trial in result.study.trials:
        assert re.search(rf"^trial +{trial.number}  dsv +{trial.value:.3f} ", said.out, re.MULTILINE)
    table = [line for line in said.out.splitlines() if line.startswith("│")]
    ranked = sorted(candidates(result.study), key=lambda c: c.criteria["dsv"])
    assert [int(line.split("│")[1]) for line in table] == [c.number for c in ranked]
    assert ["selected" in line for line in table] == [True, False, False, False]
    assert result.aucs is not None and result.evaluation is not None
    for line, candidate in zip(table, ranked, strict=True):
        assert f"{candidate.criteria['dsv']:.4f}" in line and f"{result.aucs[candidate.number]:.3f}" in line
    figures = result.evaluation
    assert f"AUC selected {figures.auc_selected:.3f}, random {figures.auc_random:.3f}" in said.out
    assert f"oracle {figures.auc_oracle:.3f}" in said.out and f"regret {figures.regret:.3f}" in said.out
    assert "of 4 complete trials" in said.out
    assert said.out.rstrip().endswith("score first IMAGES...")


def test_a_choice_that_learned_nothing_is_told_as_such(
    searched: Searched, call: Callable[..., Ended]
) -> None:
    result = open_result("first")
    assert result.selected.loss == result.study.trials[result.selected.number].user_attrs["loss"]
    hardly = f"trial {result.selected.number} hardly tells augmented images from normal ones"
    assert (hardly in searched.said.out) == (not result.selected.learned)
    large = ("-a", "cutout", "--range", "cutout.patch_area=0.2:0.3")
    learned = call("search", "gravel/cutout", "--trials", "1", *large, *LEARNING)
    assert learned.code == 0 and "hardly tells" not in learned.out
    tiny = ("-a", "cutavg", "--range", "cutavg.patch_area=0.002:0.003")
    blind = call("search", "gravel/cutout", "--trials", "1", *tiny, *LEARNING)
    assert blind.code == 0 and "hardly tells augmented images" in blind.out


def test_a_folder_of_several_categories_lists_them(
    make_category: Callable[..., Path], call: Callable[..., Ended], workplace: Path
) -> None:
    for name in ("bottle", "cable", "zipper"):
        make_category(Path("mvtec", name))
    said = call("search", "mvtec", "--trials", "1", *QUICK)
    assert said.code == 2 and said.out == ""
    assert "(bottle, cable, zipper)" in said.err and len(said.err.splitlines()) == 1
    assert not (workplace / "runs").exists()
    assert call("search", "mvtec", "--category", "cable", "--trials", "1", "--run", "r", *QUICK).code == 0
    assert open_run("r").settings.task_name == "cable"


def test_a_benchmark_pair_is_one_kind_of_anomaly(
    make_category: Callable[..., Path], call: Callable[..., Ended]
) -> None:
    make_category(Path("cloth"))
    said = call("search", "cloth", "--anomaly", "stain", "--trials", "1", "--run", "r", *QUICK)
    assert said.code == 0 and "cloth/stain" in said.out
    assert len(open_result("r").selected.scores()) == 7 + 4


def test_a_plain_pair_of_folders_is_searched_without_being_judged(
    make_category: Callable[..., Path], call: Callable[..., Ended]
) -> None:
    images = make_category(Path("cloth"))
    pair = ["--train", images / "train", "--unlabeled", images / "test"]
    said = call("search", *pair, "--trials", "2", "--run", "pair", *QUICK)
    assert said.code == 0 and said.err == ""
    assert "AUC" not in said.out
    result = open_result("pair")
    assert f"chosen without labels: trial {result.selected.number}, cutavg(" in said.out
    source, folders = (
        result.run.settings.source,
        {"train": str(images / "train"), "unlabeled": str(images / "test")},
    )
    assert source is not None and source.loader == "folders"
    given = {name: str(Path(folder).absolute()) for name, folder in folders.items()}
    given |= {"image_size": 16, "keep_ratio": True, "skip_unreadable": False, "held_out_share": None}
    assert given.items() <= source.arguments.items()
    assert result.evidence is None  # too few images to hold some out


@pytest.mark.parametrize(
    ("command", "declared"),
    [
        ("search", (Search(), Training())),
        ("sweep", (Search(pruner="asha"), Training(), Cluster())),
        ("tune", (Tuning(), DEFAULT_TRAINING)),
    ],
)
def test_options_have_the_defaults_of_the_product_and_show_them(
    command: str, declared: tuple[object, ...], call: Callable[..., Ended]
) -> None:
    context = app.commands[command].make_context(command, [], resilient_parsing=True)
    options = {option.name: option.get_default(context) for option in app.commands[command].params}
    own = {
        field.name: getattr(settings, field.name)
        for settings in reversed(declared)  # of two seeds and rates, those of the command's own settings
        for field in fields(settings)  # type: ignore[arg-type]
        if field.name in options
    }
    if command == "tune":
        own["learning_rate"] = DEFAULT_TRAINING.learning_rate
    assert len(own) >= 12
    assert {name: options[name] for name in own} == own
    shown = re.sub(r"[│\s]+", " ", call(command, "--help").out)
    for name, value in own.items():
        of_folders = value
        for settings in (PATCHES, PRETRAINED) if command == "tune" else (PRETRAINED,):
            of_folders = getattr(settings, name, of_folders)
        held_out = getattr(PATCHES_HELD_OUT if command == "tune" else COMBINED, name, of_folders)
        told = str(value)
        told += f"; for folders {of_folders}" if of_folders != value else ""
        told += f"; where good images of folders are held out {held_out}" if held_out != of_folders else ""
        if isinstance(value, int | str) and not isinstance(value, bool):
            assert f"[default: {told if told == str(value) else f'({told})'}]" in shown
    assert "(None" not in shown and "((" not in shown  # as Python shows what nobody types


def test_help_names_all_criteria() -> None:
    told = CRITERIA_TOLD.replace("with held-out images ", "").replace(";", ",").split(", ")
    assert sorted(told) == sorted(CRITERIA)


def test_every_option_of_a_search_reaches_its_settings(
    make_category: Callable[..., Path], call: Callable[..., Ended]
) -> None:
    make_category(Path("cloth"))
    options = (
        "--criterion mmd --sampler random --pruner asha --reduction-factor 3 --evaluate-at 0.5,1 "
        "--grid-points 3 --seed 5 --keep 2 --trials 2 --combine 2 --no-contrast-heads --held-out-share 0.3 "
        "--image-size 16 --steps 6 --batch-size 5 --width 3 --learning-rate 0.02 --score classifier "
        "--contamination 0.3 --precision float32 --threads 1 --no-tracking --device cpu --encoder small "
        "-a cutout -a cutpaste --range cutout.patch_area=0.01:0.05 --range cutpaste.patch_aspect=1 "
        "--range cutpaste.angle=-10:10 --storage sqlite:///studies.db --run all"
    )
    assert call("search", "cloth", *options.split()).code == 0
    settings = open_run("all").settings
    search = settings.method
    assert isinstance(search, Search)
    assert (search.criterion, search.sampler, search.pruner) == ("mmd", "random", "asha")
    assert (search.reduction_factor, settings.training.evaluate_at) == (3, (0.5, 1.0))
    assert (search.grid_points, search.seed, search.keep, search.n_trials) == (3, 5, 2, 2)
    assert (search.combine, search.contrast_heads) == (2, False)
    assert settings.source is not None and settings.source.arguments["held_out_share"] == 0.3
    assert (settings.device, settings.threads, settings.tracking_uri) == ("cpu", 1, None)
    assert settings.storage == f"sqlite:///{Path.cwd()}/studies.db" and Path("studies.db").exists()
    training = settings.training
    assert (training.encoder, training.steps, training.batch_size, training.width) == ("small", 6, 5, 3)
    assert (training.learning_rate, training.score, training.contamination) == (0.02, "classifier", 0.3)
    assert (training.precision, training.seed) == ("float32", 5)
    assert search.space.kinds["cutout"]["patch_area"] == Range(0.01, 0.05, log=True)
    assert search.space.kinds["cutpaste"]["patch_aspect"] == 1.0
    assert search.space.kinds["cutpaste"]["angle"] == Range(-10, 10)
    for candidate in candidates(open_result("all").study):
        values = candidate.augmentation.hyperparameters
        if candidate.augmentation.kind == "cutout":
            assert 0.01 <= float(values["patch_area"]) <= 0.05
        else:
            assert values["patch_aspect"] == 1.0 and -10 <= float(values["angle"]) <= 10


@pytest.mark.slow
def test_the_seed_of_the_demonstration_fixes_images_sampler_and_trainings(call: Callable[..., Ended]) -> None:
    said = call(*"demo -n 1 --seed 5 --no-tracking --run r".split())
    assert said.code == 0 and "1 candidates of cutavg" in said.out
    settings = open_run("r").settings
    assert settings.source is not None and isinstance(settings.method, Search)
    assert settings.source.arguments["seed"] == settings.method.seed == settings.training.seed == 5


def test_failed_and_pruned_trials_are_told_with_their_reason(
    make_category: Callable[..., Path], call: Callable[..., Ended]
) -> None:
    make_category(Path("cloth"))
    options = ["-a", "cutavg", "-a", "cutdiff", "--range", "cutdiff.patch_area=1e6"]
    options += ["--sampler", "random", "--pruner", "asha", "--trials", "10", "--run", "r"]
    said = call("search", "cloth", *options, *QUICK)
    assert said.code == 0 and said.err == ""
    states = {trial.number: trial.state.name for trial in open_result("r").study.trials}
    assert set(states.values()) == {"COMPLETE", "FAIL", "PRUNED"}
    for number, state in states.items():
        assert bool(re.search(rf"^trial +{number} .* pruned", said.out, re.M)) == (state == "PRUNED")
        assert bool(re.search(rf"^trial {number} failed: collapsed", said.out, re.M)) == (state == "FAIL")
    others = sum(state != "COMPLETE" for state in states.values())
    assert f"{others} more trials were pruned, failed or interrupted" in said.out


def test_a_resumed_run_takes_its_settings_from_its_folder_and_more_trials_from_the_user(
    searched: Searched, call: Callable[..., Ended]
) -> None:
    before = {t.number: t.value for t in open_result("first").study.trials}
    said = call("search", "--resume", "first", "--trials", "6")
    assert said.code == 0 and said.err == ""
    after = {t.number: t.value for t in open_result("first").study.trials}
    assert len(after) == 6 and before.items() <= after.items()
    assert not re.search(r"^trial +[0-3]  ", said.out, re.MULTILINE)
    assert re.search(r"^trial +5  ", said.out, re.MULTILINE)


def on_a_terminal(name: str, *words: str) -> None:
    """What a process of its own does: the program on a terminal."""
    terminal = os.open(name, os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
    os.environ["TERM"], os.environ["COLUMNS"] = "xterm-256color", "120"
    sys.argv = ["ssad-hpo", *words]
    main()


def all_that_is_shown(terminal: int) -> bytes:
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while read := os.read(terminal, 65536):
            shown += read
    return shown


@pytest.mark.slow
def test_a_resumed_search_gives_the_terminal_back_as_it_was(searched: Searched) -> None:
    """The bar hides the cursor; at the end it must be visible again."""
    screen, keyboard = pty.openpty()
    words = ("search", "--resume", "first", "--trials", "5")
    resumed = multiprocessing.get_context("forkserver").Process(
        target=on_a_terminal, args=(os.ttyname(keyboard), *words)
    )
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(all_that_is_shown, screen)
        resumed.start()
        try:
            resumed.join(300)
        finally:
            resumed.kill()
            os.close(keyboard)
        shown = reading.result()
    os.close(screen)
    assert resumed.exitcode == 0
    assert b"trial   4" in shown
    assert b"4/5" in shown and b"0/5" not in shown  # what was done before counts
    assert b"\x1b[?25l" in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")


@pytest.mark.parametrize("name", ["my run", "run [a]"])
def test_the_next_command_can_be_typed_as_it_is_shown(
    name: str, make_category: Callable[..., Path], call: Callable[..., Ended], workplace: Path
) -> None:
    make_category(Path("cloth [wet]"))
    said = call("search", "cloth [wet]", "--run", name, "--trials", "1", *QUICK)
    assert said.code == 0
    assert "cloth [wet]: 1 candidates" in said.out
    words = shlex.split(said.out.rstrip().splitlines()[-1])
    assert words[-3:] == ["score", name, "IMAGES..."]
    assert call(*words[-3:-1], "cloth [wet]").code == 0


# evaluate, select, sync


def test_evaluate_shows_the_same_figures_again(searched: Searched, call: Callable[..., Ended]) -> None:
    said = call("evaluate", "first")
    assert (said.code, said.err) == (0, "")
    figures = [line for line in searched.said.out.splitlines() if line.startswith("AUC selected")]
    assert figures and figures[0] in said.out


def test_select_chooses_among_a_runs_artifacts_as_the_run_did(
    searched: Searched, call: Callable[..., Ended]
) -> None:
    study = open_result("first").study
    files = sorted(Path("runs", "first", "artifacts").glob("*/arrays.npz"))
    assert len(files) == 4
    for criterion in ("dsv", "mmd"):
        said = call("select", *files, "--by", criterion)
        assert (said.code, said.err) == (0, "")
        chosen = re.search(rf"chosen by {criterion} \(.*\): .*trial-(\d+)", said.out)
        assert chosen is not None and int(chosen[1]) == select(study, criterion).number


def test_sync_delivers_what_a_dead_server_did_not_take(
    make_category: Callable[..., Path], call: Callable[..., Ended], empty_mlflow: Path, workplace: Path
) -> None:
    from mlflow import MlflowClient

    make_category(Path("cloth"))
    options = [word for word in QUICK if word != "--no-tracking"]
    dead = ["--tracking-uri", "http://127.0.0.1:9"]
    said = call("search", "cloth", "--trials", "1", "--run", "first", *options, *dead)
    assert said.code == 0
    # study: begin, selection, figures, settings, picture, note, model, end; trial: begin, 3 evaluations, end,
    # AUC
    (told,) = said.err.splitlines()
    assert (
        "MLflow did not take 14 records yet (http://127.0.0.1:9 is out of reach: Connection refused)" in told
    )
    assert re.search(r"^  .*sync first$", said.out, re.MULTILINE)
    failed = call("sync", "first")
    assert failed.code == 1
    assert "0 records delivered, 14 remain" in failed.out and "Connection refused" in failed.err

    shutil.copy(empty_mlflow, workplace / "mlflow.db")
    settings = Path("runs", "first", "settings.json")
    address = f"sqlite:///{workplace}/mlflow.db"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tracking_uri": address}))
    delivered = call("sync", "first")
    assert (delivered.code, delivered.err) == (0, "")
    assert "14 records delivered, 0 remain" in delivered.out
    runs = MlflowClient(address).search_runs(["1"])
    assert sorted("auc" in run.data.metrics for run in runs) == [False, True]


# score


def scores_alone(said: Ended) -> bool:
    """Whether all that was told is that there is nothing to decide by."""
    (told,) = said.err.splitlines()
    return "no p-values and decisions" in told


def test_a_detector_that_another_process_saved_gives_the_scores_that_its_trial_had(
    searched: Searched, call: Callable[..., Ended]
) -> None:
    said = call("score", "first", searched.images / "test")
    assert said.code == 0 and scores_alone(said)
    rows = list(csv.reader(said.out.splitlines()))
    assert rows[0] == ["path", "score"]
    assert [row[0] for row in rows[1:]] == [str(p) for p in data.find_images(searched.images / "test")]
    scores = [float(row[1]) for row in rows[1:]]
    result = open_result("first")
    assert sorted(scores) == pytest.approx(sorted(result.selected.scores()), rel=1e-6)
    # Not only the same numbers: each at its own image.
    images, *_ = data.read_images([row[0] for row in rows[1:]], 16, 3)
    assert scores == pytest.approx(result.selected.detector().score(images).tolist(), rel=1e-6)


def test_scores_go_to_a_file_in_the_order_of_the_images_given(
    searched: Searched, call: Callable[..., Ended]
) -> None:
    images = data.find_images(searched.images / "test")
    given = [images[7], searched.images / "test" / "stain", images[0]]
    said = call("score", "first", *given, "--out", "scores.csv")
    assert said.code == 0 and scores_alone(said) and "6 scores in scores.csv" in said.out
    with open("scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [images[7], *data.find_images(given[1]), images[0]]
    assert [row["path"] for row in rows] == [str(path) for path in expected]

    detector = Path(open_result("first").selected.address) / "detector"
    again = call("score", detector, *given)
    assert [row["score"] for row in csv.DictReader(again.out.splitlines())] == [row["score"] for row in rows]


def test_unreadable_images_are_left_out_and_told_if_that_is_asked_for(
    searched: Searched, call: Callable[..., Ended], tmp_path: Path
) -> None:
    images = shutil.copytree(searched.images / "test" / "good", tmp_path / "new")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more than that")
    refused = call("score", "first", images)
    assert refused.code == 2 and refused.out == ""
    assert "broken.jpg" in refused.err and len(refused.err.splitlines()) == 1
    skipped = call("score", "first", images, "--skip-unreadable")
    assert skipped.code == 0
    assert len(skipped.out.splitlines()) == 1 + 7 and "broken.jpg" not in skipped.out
    assert "broken.jpg" in skipped.err


def test_higher_scores_are_more_anomalous(searched: Searched, call: Callable[..., Ended]) -> None:
    said = call("score", "first", searched.images / "test")
    rows = list(csv.DictReader(said.out.splitlines()))
    result = open_result("first")
    labels = np.array(["good" not in row["path"] for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    won = scores[labels][:, None] > scores[~labels][None, :]
    assert result.evaluation is not None
    assert won.mean() == pytest.approx(result.evaluation.auc_selected)


# Help and wrong usage


def test_help_comes_without_the_heavy_libraries() -> None:
    program = """
import sys
sys.argv = ["ssad-hpo", "--help"]
from ssad_hpo.cli import main
try:
    main()
finally:
    heavy = {"torch", "optuna", "mlflow", "ray", "matplotlib", "sklearn", "scipy"} & set(sys.modules)
    assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    said = process("--help")
    assert (said.code, said.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", said.out) and re.search(rf"│ {command} ", ended.stdout)


def test_the_program_alone_shows_its_help(call: Callable[..., Ended]) -> None:
    said = call()
    assert (said.code, said.err) == (0, "") and "Usage:" in said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_names_it(
    command: str, call: Callable[..., Ended]
) -> None:
    said = call(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert re.search(rf"Examples?: ssad-hpo {command} \S", said.out)


WRONG = [
    ("nonsense", "nonsense"),
    ("search", "give PATH, or --train and --unlabeled, or --resume"),
    ("search nowhere", "nowhere"),
    ("search cloth --train cloth/train", "--train and --unlabeled go together"),
    ("search --train cloth/train", "--train and --unlabeled go together"),
    ("search cloth --train cloth/train --unlabeled cloth/test", "give PATH, or --train and --unlabeled"),
    ("search --train cloth/train --unlabeled empty", "empty"),
    ("search cloth --bogus", "--bogus"),
    ("search cloth --encoder small --trials 0", "n_trials"),
    ("search cloth --trials many", "--trials"),
    ("search cloth --category jeans", "jeans"),
    ("search cloth --anomaly hole", "hole"),
    ("search cloth --criterion auc", "criterion"),
    ("search cloth --sampler cma-es", "sampler"),
    ("search cloth --pruner hyperband", "pruner"),
    ("search cloth --pruner asha --reduction-factor 1", "reduction_factor"),
    ("search cloth --evaluate-at early", "--evaluate-at early: expected numbers"),
    ("search cloth --evaluate-at 0.5,0.9", "evaluate_at"),
    ("search cloth -a blur", "blur"),
    ("search cloth -a cutout -a cutavg --sampler gp", "gp"),
    ("search cloth --range cutavg.patch_area=big", "--range cutavg.patch_area=big"),
    ("search cloth --range cutavg.patch_area=0.2:0.1", "--range cutavg.patch_area=0.2:0.1"),
    ("search cloth --range cutavg.patch_area=0.9", "does not fit"),
    ("search cloth --range cutavg.colour=1", "colour"),
    ("search cloth --range cutout.patch_area=0.1", "add -a cutout"),
    ("search cloth --encoder small --steps 1", "evaluate_at"),
    ("search cloth --learning-rate nan", "learning_rate"),
    ("search cloth --image-size 0", "image_size"),
    ("search cloth --encoder mind", "encoder"),
    ("search cloth --device abacus", "device"),
    ("search cloth --device cuda:99", "device"),
    ("search cloth --threads -1", "threads"),
    ("search cloth --storage nonsense", "storage"),
    ("search cloth --storage sqlite:////nowhere/at/all.db", "storage"),
    ("search cloth --tracking-uri mlruns", "tracking_uri"),
    ("search cloth --run cloth", "exists already"),
    ("search --resume missing", "missing"),
    ("tune", "give PATH, or --train and --unlabeled, or --resume"),
    ("tune gravel/cutavg", "--augmentation: expected at least one kind to tune, got none"),
    ("tune cloth --width 4", "--augmentation: expected at least one kind to tune, got none"),
    ("tune cloth -a blur", "blur"),
    ("tune cloth -a cutdiff --loss dsv", "loss: expected one of smooth_alignment"),
    ("tune cloth -a cutdiff --order 3", "order: expected one of 1, 2"),
    ("tune cloth -a cutdiff --starts 0.4,1.2", "starts: expected a fraction 0..1"),
    ("tune cloth -a cutdiff --starts many", "--starts many: expected 0.4,0.9 or NAME=VALUE"),
    ("tune cloth -a cutdiff --starts angle=3", "starts: expected values of patch_area"),
    ("tune cloth -a cutdiff --starts patch_area=9", "starts: expected patch_area in 0.002..0.3"),
    ("tune cloth -a cutdiff --steps-before 0 --steps 1", "steps: expected at least 2"),
    ("tune cloth -a cutdiff --warm-start 1", "warm_start"),
    ("tune cloth -a cutdiff --detector-steps 0", "detector_steps"),
    ("tune cloth -a cutdiff --detector-steps 8", "use none of these (steps_before=0, --steps-before 0)"),
    (
        "tune cloth -a cutdiff --order 2",
        "order: it is of hyperparameters that move while the detector trains",
    ),
    ("tune cloth -a cutdiff --steps-before -1", "steps_before: expected a whole number"),
    ("tune cloth -a cutdiff --loss density_pu_auc", "use order 2 with steps_before=0, or another loss"),
    ("tune gravel/cutdiff -a cutdiff --steps-before 4", "steps_before: an encoder without weights sees"),
    ("tune cloth -a cutdiff --choose-by auc", "choose_by: expected one of dsv"),
    ("tune cloth -a cutdiff --encoder mind", "encoder"),
    ("tune cloth -a cutdiff --device abacus", "device"),
    ("tune cloth -a cutdiff --threads 0", "threads"),
    ("tune cloth -a cutdiff --tracking-uri mlruns", "tracking_uri"),
    ("tune cloth -a cutdiff --range cutout.patch_area=0.1", "--range cutout.patch_area=0.1"),
    ("tune cloth -a rotation --range rotation.angle=30", "expected a range for what is to be tuned"),
    ("tune cloth -a cutdiff --run cloth", "exists already"),
    ("tune --resume missing", "missing"),
    ("tune cloth -a cutdiff --resume missing", "--resume takes its images from the run"),
    ("search cloth --resume missing", "--resume takes its images from the run"),
    ("search --resume missing --width 3 -n 2", "its settings; leave --width out"),
    ("sweep --resume missing --pruner none", "its settings; leave --pruner out"),
    ("sweep cloth --cpus-per-trial 0", "cpus_per_trial"),
    ("sweep cloth --reduction-factor 1", "reduction_factor"),
    (
        "search --train cloth/train --unlabeled cloth/test --category cloth",
        "--category is for a folder in the layout of MVTec AD",
    ),
    ("search gravel/cutavg --category gravel", "only folders have a category"),
    ("demo --seed -1", "seed"),
    ("demo now", "now"),
    ("evaluate", "'RUN'"),
    ("evaluate missing", "missing"),
    ("sync missing", "missing"),
    ("select missing.npz", "missing.npz"),
    ("score missing cloth", "missing"),
    ("score cloth", "PATHS"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_usage_ends_with_2_and_one_sentence_and_leaves_nothing(
    words: str, named: str, make_category: Callable[..., Path], call: Callable[..., Ended], workplace: Path
) -> None:
    make_category(Path("cloth"))
    Path("empty").mkdir()
    said = call(*words.split())
    assert said.code == 2
    assert len(said.err.splitlines()) == 1 and said.err.startswith("ssad-hpo: ")
    assert named in said.err and "Traceback" not in said.err
    assert said.out == ""
    assert {path.name for path in workplace.iterdir()} == {"cloth", "empty"}


WRONG_ON_A_RUN = [
    ("sync first", "without tracking"),
    ("search --resume first --trials 0", "n_trials"),
    ("tune --resume first", "is a search, which `search --resume`"),
    ("score first missing.png", "missing.png"),
    ("score first IMAGES --out no/such/folder.csv", "no/such/folder.csv"),
    ("score first IMAGES --out .", "'.'"),
    ("score first IMAGES --device abacus", "device"),
]


@pytest.mark.parametrize(("words", "named"), WRONG_ON_A_RUN, ids=[words for words, _ in WRONG_ON_A_RUN])
def test_wrong_usage_of_a_run_is_one_sentence_too(
    words: str, named: str, searched: Searched, call: Callable[..., Ended]
) -> None:
    said = call(*(searched.images if word == "IMAGES" else word for word in words.split()))
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert named in said.err and said.err.startswith("ssad-hpo: ") and said.out == ""


def test_wrong_usage_in_a_real_process_shows_no_traceback() -> None:
    said = process("search", "cloth", "--trials", "many")
    assert said.code == 2 and said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("ssad-hpo: ") and "--trials" in said.err


def test_a_range_without_an_end_is_no_number(call: Callable[..., Ended]) -> None:
    for value in ("0.01:", ":0.1", ":"):
        said = call("search", "gravel/cutavg", "--range", f"cutavg.patch_area={value}")
        assert said.code == 2 and "expected KIND.NAME=LOW:HIGH" in said.err
