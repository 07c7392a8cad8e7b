"""Tunings from the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuned_runs import SOURCE, TRAINING, all_of

from ssad_hpo.bilevel import DEFAULT_TRAINING, Tuning
from ssad_hpo.data import find_source
from ssad_hpo.experiment import StudyResult, open_result, open_run, read_trajectory, run_study
from ssad_hpo.search import candidates
from ssad_hpo.task import Range, Search, SearchSpace, Training

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


QUICK = "--steps 12 --detector-steps 2 --batch-size 4 --width 4 --threads 1 --no-tracking".split()


def test_a_texture_is_tuned_evaluated_scored_and_reported_from_the_command_line(
    call: Callable[..., Any], make_category: Callable[..., Path]
) -> None:
    said = call("tune", "gravel/cutdiff", "-a", "cutdiff", "--starts", "0.5,0.9", "--run", "r", *QUICK)
    assert said.code == 0 and "Traceback" not in said.err
    result = open_result("r")
    assert "cutdiff tuned from 2 starts down two_sided_alignment, order 1; the lowest dsv is kept" in said.out
    for start in candidates(result.study):
        values = start.augmentation.hyperparameters
        assert re.search(
            rf"^start +{start.number}  dsv +{start.criteria['dsv']:.3f} .* became "
            rf"cutdiff\(patch_area={values['patch_area']:.4g}",
            said.out,
            re.MULTILINE,
        )
    last = read_trajectory(candidates(result.study)[1])[-1]
    assert f"start 1, step 12: patch area {last.hyperparameters['patch_area']:.4g}" in said.out
    assert f"validation loss {last.validation_loss:.4g}" in said.out
    assert re.search(r"^start 0, step \d+: .*  about \d+ \w+ left$", said.out, re.MULTILINE)
    table = [line for line in said.out.splitlines() if line.startswith("│")]
    assert ["selected" in line for line in table] == [True, False]
    assert result.evaluation is not None
    figures = f"AUC selected {result.evaluation.auc_selected:.3f}"
    assert figures in said.out and figures in call("evaluate", "r").out

    reported = call("report", "r")
    assert reported.code == 0 and Path("runs/r/report/trajectories.png").is_file()
    pictures = make_category(Path("cloth"), grey=True)
    scored = call("score", "r", pictures / "test")
    assert scored.code == 0 and len(scored.out.splitlines()) == 1 + 15


def test_every_option_of_a_tuning_reaches_its_settings(
    call: Callable[..., Any], make_category: Callable[..., Path]
) -> None:
    make_category(Path("cloth"))
    options = (
        "-a cutpaste --range cutpaste.patch_area=0.01:0.2 --range cutpaste.angle=0 --loss mmd --order 1 "
        "--starts 0.25,0.5 --starts patch_area=0.05,patch_aspect=2 --steps 10 --detector-steps 3 "
        "--warm-start 0.4 --choose-by validation_loss --image-size 16 --encoder small --width 3 "
        "--batch-size 5 --learning-rate 0.02 --score classifier --contamination 0.3 --seed 5 --device cpu "
        "--threads 1 --no-tracking --run all"
    )
    assert call("tune", "cloth", *options.split()).code == 0
    settings = open_run("all").settings
    space = SearchSpace(
        {
            "cutpaste": {
                "patch_area": Range(0.01, 0.2, log=True),
                "patch_aspect": Range(0.3, 3.3, log=True),
                "angle": 0.0,
            }
        }
    )
    assert settings.tuning == Tuning(
        space, loss="mmd", order=1, starts=(0.25, 0.5, {"patch_area": 0.05, "patch_aspect": 2.0}),
        detector_steps=3, warm_start=0.4, choose_by="validation_loss",
    )  # fmt: skip
    assert settings.training == Training(
        width=3, steps=10, batch_size=5, learning_rate=0.02, score="classifier", contamination=0.3, seed=5,
        evaluate_at=(1.0,), precision="float32",
    )  # fmt: skip
    assert (settings.seed, settings.device, settings.threads, settings.tracking_uri) == (5, "cpu", 1, None)
    assert settings.source == find_source("cloth", image_size=16)


def test_the_defaults_of_the_command_are_those_of_the_function(call: Callable[..., Any]) -> None:
    diverging = "--learning-rate 1e30 --steps 20 --threads 1 --no-tracking --run r".split()
    said = call("tune", "digits/4", "-a", "rotation", *diverging)
    assert said.code == 1 and said.err.startswith("ssad-hpo: diverged") and len(said.err.splitlines()) == 1
    settings = open_run("r").settings
    assert settings.tuning == Tuning("rotation")
    assert settings.training == replace(
        DEFAULT_TRAINING, steps=20, learning_rate=1e30, precision="float32", evaluate_at=(1.0,)
    )


def test_collapse_is_told_as_a_sentence_with_its_remedy(call: Callable[..., Any]) -> None:
    narrow = ["--range", "cutdiff.patch_area=0.1:0.102", "--starts", "0.5", "--run", "r"]
    said = call("tune", "gravel/cutdiff", "-a", "cutdiff", *narrow, *QUICK)
    assert said.code == 0
    told = [line for line in said.err.splitlines() if "cutdiff.patch_area ended at its" in line]
    assert len(told) == 1 and told[0].startswith("ssad-hpo: start 0: ")
    assert "start higher" in told[0] or "start elsewhere" in told[0]  # at the lower bound or the upper one
    assert told[0] in call("evaluate", "r").err.splitlines()


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_says_how_to_go_on_and_resume_ends_alike(
    call: Callable[..., Any], make_category: Callable[..., Path], workplace: Path
) -> None:
    make_category(Path("cloth"))
    settings = "--starts 0.5,0.9 --steps 150 --batch-size 8 --width 4 --image-size 16 --threads 1".split()
    words = ["tune", "cloth", "-a", "cutdiff", *settings, "--no-tracking", "--run"]
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ssad_hpo.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words, "r"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    while not Path("runs/r/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert re.fullmatch(r"ssad-hpo: stopped; all that is done is kept. Go on with: .*tune --resume r\n", said)
    assert call("tune", "--resume", "r").code == 0
    assert call(*words, "whole").code == 0
    assert all_of(open_result("r")) == all_of(open_result("whole"))


def test_a_search_and_a_tuning_are_not_resumed_as_each_other(
    tuned: StudyResult, call: Callable[..., Any]
) -> None:
    said = call("search", "--resume", "tuned")
    assert said.code == 2 and re.search(r"is a tuning, which `tune --resume`", said.err)
    run_study(
        SOURCE, Search(n_trials=1), replace(TRAINING, steps=8), tracking_uri=None, run="searched", threads=1
    )
    said = call("tune", "--resume", "searched")
    assert said.code == 2 and re.search(r"is a search, which `search --resume`", said.err)
