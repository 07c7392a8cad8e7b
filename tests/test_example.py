"""`ssad-hpo example`: a folder of images that a search takes, and labels that agree with them."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssad_hpo import data
from ssad_hpo.cli import main
from ssad_hpo.data.example import write_example


def pixels(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "images"
    assert write_example(folder) == {"good": 240, "stream": 96, "new": 48}
    return folder


def test_a_seed_makes_the_same_images_anew(made: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "again")
    write_example(tmp_path / "others", seed=1)
    assert pixels(tmp_path / "again") == pixels(made)
    different = pixels(tmp_path / "others")
    assert all(different[name] != digest for name, digest in pixels(made).items())
    assert list(tmp_path.glob(".*")) == []


def test_labels_name_every_image_of_stream_and_new_and_a_quarter_has_a_defect(made: Path) -> None:
    with (made / "labels.csv").open(encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "label"]
    labels = dict(rows)
    assert set(labels) == {p for p in pixels(made) if p.startswith(("stream/", "new/"))}
    for name, defects in (("stream", 24), ("new", 12)):
        assert sum(label == "1" for path, label in labels.items() if path.startswith(name)) == defects


def test_defects_are_where_the_labels_say(made: Path) -> None:
    with (made / "labels.csv").open(encoding="utf-8") as file:
        labels = {path: label == "1" for path, label in list(csv.reader(file))[1:]}
    # A stain is darker than anything on the wall; half of the defects are stains.
    dark = {path for path in labels if np.array(Image.open(made / path)).min() < 20}
    assert 12 <= len(dark) and all(labels[path] for path in dark)


def test_a_search_finds_the_folders_as_they_are(made: Path) -> None:
    folders = {"train": str(made / "good"), "unlabeled": str(made / "stream"), "image_size": 32}
    task, _ = data.load_images(data.Source("folders", {**folders, "held_out_share": None}))
    assert task.held_out is not None and len(task.train) + len(task.held_out) == 240
    assert len(task.unlabeled) == 96


@pytest.mark.parametrize("words", [["made"], ["absent/folder"], ["other", "--seed", "-1"]])
@pytest.mark.usefixtures("workplace")
def test_what_cannot_be_is_refused_and_nothing_is_left(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("made").mkdir()
    monkeypatch.setattr("sys.argv", ["ssad-hpo", "example", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert list(Path().rglob("*")) == [Path("made")]
