"""The documentation: it builds without a warning, and what it says to type and to run does run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ssad_hpo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
RUN = ("bash", "python")
NOT_RUN = ("text",)  # formulas, and what needs other machines, an engine or an index of packages


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks; directives of the page itself have braces."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Commands are found as a user finds them, by name."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def run(words: list[str], folder: Path) -> str:
    """What a command says; whatever it leaves running ends with it."""
    with (folder / "said").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(), stdout=said, stderr=said, start_new_session=True
        )
        code = process.wait(timeout=900)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        told = said.read()
    assert code == 0, told[-6000:]
    return told


def test_it_builds_without_a_warning_and_every_page_is_reached(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", str(tmp_path / "trees")]
    run([*command, str(DOCS), str(tmp_path / "html")], tmp_path)
    front = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    for name in PAGES:
        assert f'href="{name}.html"' in front or name == "index"
    reference = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    missing = [
        name for name in ssad_hpo.__all__ if name != "__version__" and f"ssad_hpo.{name}" not in reference
    ]
    assert missing == []


def test_pages_fetch_no_picture_from_elsewhere() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    assert re.findall(r"!\[[^]]*\]\(", text) and not re.findall(r"!\[[^]]*\]\(https?:", text)


@pytest.mark.parametrize("name", PAGES)
def test_a_block_says_whether_it_runs(name: str) -> None:
    assert {language for language, _ in blocks(PAGES[name])} <= {*RUN, *NOT_RUN}


def slow(name: str) -> object:
    return pytest.param(name, marks=[pytest.mark.ray] if name in ("clusters", "sweep") else [])


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "name", [slow(name) for name, path in PAGES.items() if any(b[0] in RUN for b in blocks(path))]
)
def test_every_block_of_a_page_runs_in_turn(name: str, workplace: Path) -> None:
    for language, text in blocks(PAGES[name]):
        if language == "bash":
            run(["bash", "-euo", "pipefail", "-c", text], workplace)
        elif language == "python":
            (workplace / "block.py").write_text(text, encoding="utf-8")
            run([sys.executable, "block.py"], workplace)


@pytest.mark.slow
@pytest.mark.parametrize("name", [slow(path.stem) for path in sorted(DOCS.glob("examples/*.py"))])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    assert run([sys.executable, str(DOCS / "examples" / f"{name}.py")], tmp_path).strip()


def test_the_front_page_and_the_readme_name_files_that_are_there() -> None:
    for file in (ROOT / "README.md", *PAGES.values()):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert target.startswith("http") or (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
