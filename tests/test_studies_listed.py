"""Every study is listed and started in one way, and takes cells, tables and provenance from the lab."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

STUDIES = Path(__file__).parent.parent / "studies"
FILES = {path.stem: path for path in STUDIES.glob("[a-z]*.py")} | {
    path.parent.name: path for path in STUDIES.glob("*/__main__.py")
}

# What a study needed for a command line, a CSV file, kept cells or a provenance of its own.
LABS_OWN = {"csv", "hashlib", "platform", "subprocess", "argparse.ArgumentParser"}


def test_the_list_of_studies_names_each_once():
    listed = re.findall(r"^\| `(\w+)` \|", (STUDIES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(FILES)


def test_make_studies_runs_each_once():
    command = ["make", "--dry-run", "--always-make", "studies"]
    said = subprocess.run(command, cwd=STUDIES.parent, capture_output=True, text=True, check=True).stdout
    (named,) = re.findall(r"^for study in (.+?);", said, re.MULTILINE)
    assert sorted(named.split()) == sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_study_says_how_it_is_started(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert f"    python -m studies.{name}" in (ast.get_docstring(tree) or "")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_study_has_no_table_cells_or_provenance_of_its_own(name):
    of_package = FILES[name].parent.glob("*.py") if FILES[name].stem == "__main__" else [FILES[name]]
    for path in of_package:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        used |= {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not used & LABS_OWN, path


@pytest.mark.parametrize("smoke", [True, False])
def test_a_smoke_run_does_not_write_over_results(smoke, monkeypatch):
    options = importlib.import_module("studies.lab.options")
    monkeypatch.setattr("sys.argv", ["x", *(["--smoke"] if smoke else [])])
    found = options.parse(options.study_parser("x", None)).out
    assert found == (Path("runs/smoke") if smoke else STUDIES / "results")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_study_for_a_gpu_that_is_not_there_says_so(monkeypatch, capsys):
    detectors = importlib.import_module("studies.lab.detectors")
    monkeypatch.setattr("sys.argv", ["x", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("studies.lab.options").parse(detectors.detectors_parser("x", None))
    assert ended.value.code == 2 and "device: expected 'cpu'" in capsys.readouterr().err
