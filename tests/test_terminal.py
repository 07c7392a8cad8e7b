"""What a terminal shows: of any width and encoding, or none at all; and what is printed in Python."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Ended
from image_folders import make_category
from starting import start_study

from ssad_hpo import __version__, controlled_data
from ssad_hpo.bilevel import Tuning
from ssad_hpo.cli import app
from ssad_hpo.cli.live import SearchDisplay, TuningDisplay, spoken
from ssad_hpo.data import Source, load_folder, load_folders
from ssad_hpo.data.folder import IMAGE_SIZE
from ssad_hpo.experiment import StudyResult, open_result
from ssad_hpo.search import candidates
from ssad_hpo.task import SearchSpace, Training

pytestmark = pytest.mark.usefixtures("workplace")

TINY = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 1.0))
SMALL = Source("controlled", {"image_size": 16, "n_train": 24, "n_unlabeled": 14, "n_held_out": 12})


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """A study of four trials of two kinds, with ground truth."""
    run = tmp_path_factory.mktemp("kept") / "first"
    space = SearchSpace(["cutavg", "cutpaste"])
    return start_study(SMALL, space=space, n_trials=4, training=TINY, tracking_uri=None, run=run, combine=2)


@pytest.fixture
def study(kept: StudyResult, workplace: Path) -> StudyResult:
    shutil.copytree(kept.run.folder, workplace / "runs" / "first")
    return open_result("first")


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_cuts_no_number(
    width: int, study: StudyResult, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = call("evaluate", "first")
    table = said.out.partition("a wider terminal shows")[0].partition("AUC selected")[0].splitlines()
    assert max(map(len, table)) <= width
    assert "…" not in said.out and study.aucs is not None
    for choice in candidates(study.study, study.run.artifacts):
        (line,) = [line for line in table if re.search(rf"^\W*{choice.number}\s", line)]
        assert f"{choice.criteria['dsv']:.4f}" in line and f"{study.aucs[choice.number]:.3f}" in line
        assert ("selected" in line or "*" in line) == (choice.number == study.selected.number)
    assert ("a wider terminal shows" in said.out) == (width < 80)


@pytest.mark.parametrize("words", [["--help"], ["search", "--help"], ["evaluate", "first"]])
def test_a_terminal_of_ascii_gets_ascii_without_escapes(words: list[str], study: StudyResult) -> None:
    environment = {**os.environ, "LANG": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "90"}
    ended = subprocess.run(
        [sys.executable, "-m", "ssad_hpo", *words], env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.isascii() and not re.search(r"\\[xu][0-9a-f]{2}", ended.stdout)


def test_images_have_the_same_size_by_default_on_the_command_line_and_in_python() -> None:
    for command in ("search", "sweep", "tune"):
        options = {option.name: option.default for option in app.commands[command].params}
        assert options["image_size"] == IMAGE_SIZE
    for function in (load_folder, load_folders):
        assert inspect.signature(function).parameters["image_size"].default == IMAGE_SIZE


def test_the_version_is_told(call: Callable[..., Ended]) -> None:
    assert __version__ in call("--version").out


@pytest.mark.parametrize("command", sorted(app.commands))
def test_every_option_with_a_value_says_what_it_is_by_default(command: str) -> None:
    above = app.make_context("ssad-hpo", [], resilient_parsing=True)
    context = app.commands[command].make_context(command, [], above, resilient_parsing=True)
    for option in app.commands[command].params:
        if option.param_type_name != "option" or option.is_flag or option.required:
            continue
        if option.name in ("resume", "help"):
            continue
        shown = option.get_help_record(context)[1]
        assert "default" in shown.lower() or option.name in WITHOUT or (command, option.name) in NEEDED, (
            f"{option.opts[0]}: {shown}"
        )


NEEDED = {("tune", "kinds")}
# Options without which there is nothing of their kind.
WITHOUT = {"category", "anomaly", "train", "unlabeled", "held_out", "contamination"}


def test_without_a_terminal_every_evaluation_is_a_line_with_what_is_left(
    call: Callable[..., Ended],
) -> None:
    steps = ["--steps", "4", "--batch-size", "4", "--width", "2", "--evaluate-at", "0.5,1", "--no-tracking"]
    said = call("search", "gravel/cutavg", "--trials", "3", "--run", "r", *steps)
    assert said.code == 0
    trials = open_result("r").study.trials
    for trial in trials:
        early = trial.intermediate_values[2]
        assert re.search(rf"^trial +{trial.number}  step 2 of 4: dsv {early:.3f}", said.out, re.M)
    ended = re.findall(r"^trial +\d  dsv .*\((\d) of 3\)(?:  about (.*) left)?$", said.out, re.M)
    assert [count for count, _ in ended] == ["1", "2", "3"]
    assert all(left for _, left in ended[:2]) and not ended[2][1]


@pytest.mark.parametrize(("share", "told"), [((), True), (("0",), False), (("0.5",), False)])
def test_a_search_of_few_images_says_what_it_lacks_without_held_out_ones(
    share: tuple[str, ...], told: bool, call: Callable[..., Ended], workplace: Path
) -> None:
    place = make_category(workplace / "few", n=12)
    steps = ["--encoder", "small", "--image-size", "16", *"--steps 2 --batch-size 2 --width 2".split()]
    given = [*steps, "--evaluate-at", "1", "--no-tracking", "--trials", "1", "--run", "r"]
    said = call("search", str(place), *given, *(f"--held-out-share={value}" for value in share))
    assert said.code == 0, said.err
    assert ("no image is held out, since there are fewer than 200" in " ".join(said.out.split())) == told


def test_what_is_done_already_counts_when_a_search_goes_on(
    study: StudyResult, call: Callable[..., Ended]
) -> None:
    said = call("search", "--resume", "first", "--trials", "6")
    assert said.code == 0 and "4 of 6 trials are done" in said.out
    assert re.findall(r"\((\d) of 6\)", said.out) == ["5", "6"]


def test_a_pruned_trial_is_told_with_its_step_and_never_as_the_best(
    study: StudyResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    display = SearchDisplay()
    display.announce(study.run)
    params = {"augmentation": "cutavg", "patch_area": 0.1}
    for trial, value, status in (("7", 0.9, "complete"), ("8", 0.1, "pruned"), ("9", 0.5, "complete")):
        display.trial_started(trial, params, {"criterion": "dsv"})
        display.trial_progress(trial, 2, {"dsv": value})
        display.trial_ended(trial, status, {})
    display.__exit__()
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if " s  cutavg" in line}
    assert "pruned at step 2 of 4, dsv 0.100" in re.sub(r"\x1b\[[\d;]*m", "", lines["8"])
    green = "\x1b[1;32m"
    assert green not in lines["8"] and green in lines["7"] and green in lines["9"]


def test_a_tuning_that_looks_at_all_starts_first_is_as_far_as_its_steps(
    study: StudyResult, workplace: Path
) -> None:
    tuning = Tuning("cutavg", starts=(0.2, 0.4, 0.6, 0.8), survivors=2, warm_start=0.25, look=0.5)
    settings = replace(
        study.run.settings, method=tuning, training=replace(TINY, steps=16, evaluate_at=(1.0,))
    )
    display = TuningDisplay()
    display.announce(replace(study.run, folder=workplace / "new", settings=settings))
    looked = tuning.look_steps(16)
    assert (tuning.warm_start_steps(16), looked) == (4, 12) and display.clock.total == 2 * 12 + 2 * 8
    done = []
    for trial, step in (*((str(trial), looked) for trial in range(4)), ("2", 14), ("2", 16), ("0", 16)):
        display.trial_started(trial, {"augmentation": "cutavg"}, {})
        display.trial_progress(trial, step, {"dsv": 0.5})
        done.append(display._done)
    assert done == [8, 16, 24, 32, 34, 36, 40]
    display.__exit__()


def test_a_tuning_that_goes_on_counts_what_its_starts_have_done(
    study: StudyResult, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a training: a look is of a few images, and one that is trained after it of many more."""
    tuning = Tuning("cutavg", steps_before=6, validation_train=4, starts=(0.2, 0.4, 0.6), survivors=2)
    settings = replace(study.run.settings, method=tuning, training=replace(TINY, steps=16, batch_size=8))
    ended = {"0": "pruned", "1": "complete"}
    monkeypatch.setattr("ssad_hpo.experiment.finished_starts", lambda run: ended)
    display = TuningDisplay()
    display.announce(replace(study.run, folder=workplace / "new", settings=settings))
    trained = 6 + 4 * 16
    assert display.clock.total == 2 * trained + 6 and display._done == trained + 6
    display.trial_started("2", {"augmentation": "cutavg"}, {})
    display.trial_progress("2", 6, {"validation_loss": 0.5})
    assert display._done == trained + 12
    display.trial_started("3", {"augmentation": "none"}, {})
    display.trial_progress("3", 0, {"dsv": 0.5})
    assert display._done == trained + 12
    display.__exit__()


def test_durations_are_told_as_people_say_them() -> None:
    assert [spoken(s) for s in (12.4, 89, 600, 12600)] == ["12 s", "89 s", "10 min", "3.5 h"]


def test_results_print_in_a_line_each(study: StudyResult) -> None:
    figures = study.evaluation
    assert figures is not None and study.evidence is not None
    for thing in (study, study.selected, study.selected.detector(), study.evidence):
        assert "\n" not in repr(thing) and len(repr(thing)) < 250
    assert f"AUC selected {figures.auc_selected:.3f}" in repr(study)
    assert f"oracle {figures.auc_oracle:.3f} of 4 trials" in repr(study)
    assert f"{figures.auc_oracle:.3f}" in study._repr_html_()
    assert f"<td>{study.selected.criteria['mmd']:.4g}</td>" in study.selected._repr_html_()
    assert "combined detector" in study.evidence._repr_html_()
    assert str(study.selected.augmentation) in repr(study.selected.detector())


def test_a_task_with_a_strange_name_is_safe_in_a_notebook() -> None:
    task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    strange = type(task)("<script>", task.train, task.unlabeled)
    shown = start_study(strange, n_trials=1, training=TINY, tracking_uri=None, run="s")._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
