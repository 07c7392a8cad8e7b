"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the package: nothing else is edited."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where a block of lines goes, and in which file: the last words of the text above it that say so.
PLACE = re.compile(
    r"(?:at the end of|as a row of `(?P<table>\w+)` in|below `(?P<line>[^`]+)` in)\s+`(?P<file>[\w/]+\.py)`",
    re.I,
)


def recipes():
    """Heading -> [(place, lines)] of every recipe."""
    found = {}
    for section in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, text = section.split("\n", 1)
        if "```python" not in text:  # the way of a search
            continue
        *parts, _ = re.split(r"```python\n(.*?)```\n", text, flags=re.DOTALL)
        found[heading.partition(":")[0]] = [
            (list(PLACE.finditer(above))[-1], lines)
            for above, lines in zip(parts[::2], parts[1::2], strict=True)
        ]
    return found


def insert(source: str, place: re.Match, lines: str) -> str:
    if (line := place["line"]) is not None:
        (at,) = [match.end() for match in re.finditer(rf"^ *{re.escape(line)}\n", source, re.M)]
    elif (table := place["table"]) is not None:
        at = source.index("\n}\n", re.search(rf"^{table}\b.* = {{$", source, re.M).end()) + 1
    else:
        return f"{source}\n\n{lines}"
    return source[:at] + lines + source[at:]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the package in it, and what the recipes add."""
    place = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "ssad_hpo", place / "ssad_hpo", ignore=shutil.ignore_patterns("__pycache__"))
    for blocks in recipes().values():
        for where, lines in blocks:
            file = place / where["file"]
            file.write_text(insert(file.read_text(encoding="utf-8"), where, lines), encoding="utf-8")
    return place


def run(package, *arguments):
    """What a Python with the package says."""
    environment = {
        **os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_recipe_has_its_places_and_few_lines():
    lines = {name: [len(lines.splitlines()) for _, lines in blocks] for name, blocks in recipes().items()}
    assert lines == {
        "An augmentation": [5, 7],
        "A criterion": [3, 1],
        "A data set": [8, 1],
        "A training option": [1, 1, 1],
    }


SEARCH = """
import json
from ssad_hpo import Search, Source, Training, report_run, resume_study, run_study

training = Training(width=2, steps=6, batch_size=4, nesterov=True, evaluate_at=(0.5, 1.0))
search = Search(space="stripe", criterion="nearness", n_trials=3, sampler="random")
first = run_study(Source("ramps", {"seed": 1}), search, training, run="study", tracking_uri=None)
before = [trial.value for trial in first.study.trials]
again = resume_study("study", n_trials=4)
whole = run_study(
    Source("ramps", {"seed": 1}), Search(space="stripe", criterion="nearness", n_trials=4, sampler="random"),
    training, run="whole", tracking_uri=None,
)
page = report_run("study").read_text(encoding="utf-8")
print(json.dumps({
    "values": [before, *([trial.value for trial in result.study.trials] for result in (again, whole))],
    "parameters": [sorted(t.params) for t in again.study.trials],
    "chosen": again.selected.number, "aucs": len(again.aucs),
    "nesterov": again.selected.detector().training.nesterov,
    "shown": [words in page for words in ("stripe", "nearness", "ramps", "nesterov True")],
}))
"""


@pytest.mark.slow
def test_what_the_recipes_add_is_searched_over_reported_and_resumed(package):
    told = json.loads(run(package, "-c", SEARCH).splitlines()[-1])
    first, again, whole = told["values"]
    assert len(first) == 3 and again[:3] == first and again == whole
    assert told["parameters"] == [["augmentation", "stripe.height", "stripe.strength"]] * 4
    assert told["chosen"] == min(range(4), key=again.__getitem__) and told["aucs"] == 4
    assert told["nesterov"] and all(told["shown"])


TUNE = """
import json
from ssad_hpo import Training, Tuning, run_study

tuning = Tuning(space={"stripe": {"height": 0.1}}, starts=(0.5,), choose_by="nearness", warm_start=0.0)
result = run_study("ramps", tuning, Training(width=2, steps=16, batch_size=4), run="tuned", tracking_uri=None)
print(json.dumps(dict(result.selected.augmentation.hyperparameters)))
"""


def test_a_hyperparameter_with_a_linear_coordinate_is_tuned_as_it_is(package):
    learned = json.loads(run(package, "-W", "ignore", "-c", TUNE).splitlines()[-1])
    assert learned["height"] == 0.1 and learned["strength"] != 0.6
    assert 0.6 - 4 * 0.031 < learned["strength"] < 0.6 + 4 * 0.031  # four of Adam's steps of 0.03


def test_the_command_line_has_the_training_option_and_the_data_set(package):
    small = "--width 2 --steps 6 --evaluate-at 1 --batch-size 4 -n 2 -a stripe --range stripe.height=0.05:0.1"
    options = f"search ramps {small} --criterion nearness --nesterov --no-tracking --run cli"
    run(package, "-m", "ssad_hpo", *options.split())
    settings = json.loads((package / "runs" / "cli" / "settings.json").read_text())
    assert settings["training"]["nesterov"] is True and settings["source"]["loader"] == "ramps"
    assert settings["method"]["search"]["space"]["stripe"]["height"] == {
        "low": 0.05,
        "high": 0.1,
        "log": True,
    }
