"""The documentation: it builds without a warning, and what it says to type and to run does run."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import LONG

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
        try:
            code: int | None = process.wait(timeout=LONG)
        except subprocess.TimeoutExpired:
            code = None
        finally:
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


def steps(name: str) -> tuple[tuple[str, str], ...]:
    """What a page has to be typed and run, in order: (language, text). Commands that a block begins with
    stand alone, without what is remarked on them."""
    found: list[tuple[str, str]] = []
    for language, text in blocks(PAGES[name]):
        lines = text.splitlines()
        while language == "bash" and lines and re.fullmatch(r"ssad-hpo [^\\&$]*", lines[0]):
            found.append(("bash", lines.pop(0).partition("  #")[0]))
        if language in RUN and lines:
            found.append((language, "\n".join(lines)))
    return tuple(found)


RUNNING = [name for name in PAGES if steps(name)]
# Pages begin alike, with the same images, the same search and more, which is then run once: what the folder
# held after those steps.
KEPT: dict[tuple[tuple[str, str], ...], Path] = {}


def alike(name: str, other: str) -> int:
    """With how many steps that are the same two pages begin."""
    pairs = zip(steps(name), steps(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("name", [slow(name) for name in RUNNING])
def test_every_block_of_a_page_runs_in_turn(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    # One place for all pages: the addresses in a run are absolute.
    place, todo = tmp_path_factory.getbasetemp() / "page", steps(name)
    partings = {alike(name, other) for other in RUNNING if other != name}
    shutil.rmtree(place, ignore_errors=True)
    done = max((n for n in range(len(todo) + 1) if todo[:n] in KEPT), default=0)
    if done:
        shutil.copytree(KEPT[todo[:done]], place, symlinks=True)
    else:
        place.mkdir()
    for n, (language, text) in enumerate(todo[done:], done + 1):
        if language == "bash":
            run(["bash", "-euo", "pipefail", "-c", text], place)
        else:
            (place / "block.py").write_text(text, encoding="utf-8")
            run([sys.executable, "block.py"], place)
        if n in partings:
            KEPT[todo[:n]] = shutil.copytree(place, tmp_path_factory.mktemp("kept") / "page", symlinks=True)


def test_the_pages_share_the_steps_that_take_longest() -> None:
    (search,) = {steps(name)[:2] for name in ("first-steps", "deployment", "index")}
    assert [text.split()[1] for _, text in search] == ["example", "search"]
    together = steps("deployment")[: alike("deployment", "first-steps")]
    words = [text.split()[:2] for _, text in together]
    assert [second for first, second in words if first == "ssad-hpo"] == [
        "example", "search", "score", "evaluate", "register", "export",
    ]  # fmt: skip
    assert any("mlflow models serve" in text for _, text in together)


@pytest.mark.slow
@pytest.mark.parametrize("name", [slow(path.stem) for path in sorted(DOCS.glob("examples/*.py"))])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    sizes = {"researcher": ["4", "20"]}.get(name, [])  # trials and steps
    assert run([sys.executable, str(DOCS / "examples" / f"{name}.py"), *sizes], tmp_path).strip()


def test_the_front_page_and_the_readme_name_files_that_are_there() -> None:
    for file in (ROOT / "README.md", *PAGES.values()):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert target.startswith("http") or (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
