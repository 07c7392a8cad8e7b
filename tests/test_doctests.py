"""The examples in docstrings say what comes out, fast, and the most used names have one."""

import doctest
import importlib
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MOST_USED = (
    "Augmentation", "Detector", "Objective", "Range", "Search", "SearchSpace", "Training", "Tuning", "dsv",
    "load_folder", "run_study", "smooth_alignment",
)  # fmt: skip


def examples():
    """Every docstring of the package that has an example, by its dotted name."""
    found = {}
    for file in sorted((ROOT / "ssad_hpo").rglob("*.py")):
        if ">>> " in file.read_text(encoding="utf-8"):  # else it need not be imported, which may take seconds
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            found |= {test.name: test for test in doctest.DocTestFinder().find(module) if test.examples}
    return found


EXAMPLES = examples()


@pytest.mark.usefixtures("workplace")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_does(name):
    started = time.process_time()
    told: list[str] = []
    failed, _ = doctest.DocTestRunner().run(EXAMPLES[name], out=told.append)
    assert not failed, "".join(told)
    assert time.process_time() - started < 5  # under 2 but for what the first one imports


def test_the_most_used_names_have_an_example():
    with_one = {name.rpartition(".")[2] for name in EXAMPLES}
    assert set(MOST_USED) <= with_one and "ready_objective" in with_one  # which `dsv_objective` is
