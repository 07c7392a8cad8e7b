"""The way of a search that CONTRIBUTING.md describes is the one that a search goes."""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from image_folders import make_category

from ssad_hpo.cli import app
from ssad_hpo.data import DataSet
from ssad_hpo.data.cache import DecodedSet
from ssad_hpo.detector import Checkpoint
from ssad_hpo.experiment import StudyResult
from ssad_hpo.judgement import Evaluation, Judged
from ssad_hpo.search import Candidate, TrialRecord
from ssad_hpo.task import Task

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssad_hpo"
ROW = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` \(`([\w.]+)`(?:, (\d+))?\) \|", re.M)
# What a search hands on, as types that nothing else has.
HANDED_ON = (DecodedSet, DataSet, Task, Checkpoint, Judged, Evaluation, TrialRecord, Candidate, StudyResult)
MOST_FILES, MOST_ENTRANCES = 14, 2  # behind the command line; of a room


@dataclass(frozen=True)
class Step:
    """A row of the table: a file, the function by which it is entered, and the file that calls that."""

    file: str
    function: str
    caller: str | None


def steps() -> list[Step]:
    rows = ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    files = {number: file for number, file, *_ in rows}
    return [Step(file, function, files.get(caller)) for _, file, function, caller in rows]


class Follower:
    """Hears of every call in the package, as a tracer does, and keeps where each came from at first.

    Attributes:
        entered: (file, function) -> the files that were on the stack, the command's first.
        made: type of `HANDED_ON` -> those when a function gave the first one back.
    """

    def __init__(self) -> None:
        self.entered: dict[tuple[str, str], list[str]] = {}
        self.made: dict[type, list[str]] = {}

    def called(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        file = file_of(frame)
        if file is None:
            return None
        key = file, frame.f_code.co_qualname
        if key not in self.entered:
            self.entered[key] = files_above(frame)
        frame.f_trace_lines = False
        return self.returns

    def returns(self, frame: FrameType, event: str, value: Any) -> Callable[..., Any]:
        found = next(iter(value), None) if isinstance(value, list) else value
        if event == "return" and type(found) in HANDED_ON and type(found) not in self.made:
            self.made[type(found)] = files_above(frame)
        return self.returns


def file_of(frame: FrameType) -> str | None:
    path = frame.f_code.co_filename
    return path[len(str(PACKAGE)) + 1 :] if path.startswith(f"{PACKAGE}/") else None


def files_above(frame: FrameType | None) -> list[str]:
    """The package's files on the stack, those of calls within a file once."""
    files: list[str] = []
    while frame is not None:
        file = file_of(frame)
        if file is not None and files[-1:] != [file]:
            files.append(file)
        frame = frame.f_back
    return files[::-1]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Follower:
    """A search on a folder of images, by the command, followed from its first call to its last."""
    place = tmp_path_factory.mktemp("way")
    make_category(place / "cloth", channels=1)
    for late in ("torch._dynamo", "sklearn.covariance"):  # of a first training; slow where calls are heard
        importlib.import_module(late)
    small = "--encoder small --width 2 --image-size 16 --batch-size 2 --steps 2 --evaluate-at 0.5,1 -n 1"
    follower, before = Follower(), sys.gettrace()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setenv("SSAD_HPO_CACHE", str(place / "cache"))
        try:
            sys.settrace(follower.called)
            app(f"search cloth {small} --no-tracking".split(), standalone_mode=False)
        finally:
            sys.settrace(before)
    return follower


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.file)
def test_each_file_of_the_way_is_entered_as_its_row_says(step: Step, followed: Follower) -> None:
    above = followed.entered[step.file, step.function]
    assert above[-1] == step.file
    assert above[-2:-1] == ([] if step.caller is None else [step.caller])


@pytest.mark.parametrize("kind", HANDED_ON, ids=lambda kind: kind.__name__)
def test_nothing_is_handed_on_by_a_file_that_is_not_on_the_way(kind: type, followed: Follower) -> None:
    assert set(followed.made[kind]) <= {step.file for step in steps()}


def test_no_file_stands_between_those_of_the_way(followed: Follower) -> None:
    on_the_way = {step.file for step in steps()}
    between = {file for step in steps() for file in followed.entered[step.file, step.function]}
    assert between == on_the_way


def test_the_way_is_short() -> None:
    (command, *files), entrances = steps(), defaultdict(set)
    assert command.file.startswith("cli/") and len({step.file for step in files}) == len(files) <= MOST_FILES
    for step in files:
        if (room := step.file.split("/")[0]) != (step.caller or "").split("/")[0]:
            entrances[room].add(step.caller)
    assert max(map(len, entrances.values())) <= MOST_ENTRANCES
