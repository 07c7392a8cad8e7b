"""Properties of every reader and every number: any bytes are read, or refused in our own words."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combined_runs import clear_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tuned_runs import SOURCE, TRAINING, TUNING, quick

from ssad_hpo import storage
from ssad_hpo.augment import augment
from ssad_hpo.bilevel import CollapseWarning, Tuning
from ssad_hpo.bilevel.checkpoint import CheckpointFile
from ssad_hpo.bilevel.tuning import prepare
from ssad_hpo.combined import CombinedDetector
from ssad_hpo.data import Source, load, read_images
from ssad_hpo.detector import Detector
from ssad_hpo.experiment import open_run, read_trajectory
from ssad_hpo.experiment.outcome import chosen
from ssad_hpo.search import select_detectors
from ssad_hpo.search.arrays import read_arrays
from ssad_hpo.task import Augmentation, Cluster, DetectorError, Range, Search, SearchSpace, Task, Training
from ssad_hpo.tracking import pending
from ssad_hpo.tracking.outbox import create_outbox, load_state, read_records, read_settings

quickly = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=5)
# What a JSON file may hold in the place of anything.
plain = st.recursive(
    scalars | st.sampled_from(["meta", "cutavg", "small", "dsv", "../.."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A combined detector, contrast heads in it."""
    return clear_run(tmp_path_factory.mktemp("combined") / "run", combine=2).run.combined


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuning's folder, which has a file of every format."""
    place = tmp_path_factory.mktemp("read") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        quick(place)
    return place


def damaged(content: bytes, data: Any) -> bytes:
    """A file's bytes, cut, overwritten or replaced."""
    how = data.draw(st.sampled_from(["cut", "overwritten", "other"]))
    if how == "other":
        return bytes(data.draw(st.binary(max_size=80)))
    at = data.draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:at]
    put = data.draw(st.binary(min_size=1, max_size=8))
    return content[:at] + put + content[at + len(put) :]


def in_our_words(read: Callable[[], Any]) -> Any:
    """What is read, or None where it is refused in a sentence; anything else is an error of ours."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        assert ":" in str(error), repr(error)
        return None


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "settings": ("settings.json", lambda path: open_run(path.parent)),
    "arrays": ("arrays.npz", lambda path: read_arrays(path, "search again")),
    "select": ("arrays.npz", lambda path: select_detectors([path])),
    "detector.json": ("detector.json", lambda path: Detector.load(path.parent)),
    "detector.safetensors": ("detector.safetensors", lambda path: Detector.load(path.parent)),
    "journal": ("journal.log", lambda path: chosen(path.parent)),
    "trajectory": ("trajectory.csv", lambda path: read_trajectory(chosen(path.parents[2]).selected)),
}


@pytest.mark.parametrize("name", READERS)
@quickly
@given(data=st.data())
def test_a_reader_of_damaged_bytes_reads_or_refuses_in_our_words(name: str, run: Path, data: Any) -> None:
    file, read = READERS[name]
    path = sorted(run.rglob(file))[0]
    content = path.read_bytes()
    try:
        path.write_bytes(damaged(content, data))
        found = in_our_words(lambda: read(path))
        if isinstance(found, Detector):
            images = torch.zeros((3, *found.image_shape), dtype=torch.uint8)
            try:
                assert found.score(images).isfinite().all()
            except DetectorError as error:
                assert "not finite" in str(error)
    finally:
        path.write_bytes(content)


def combined_in_our_words(folder: Path) -> None:
    """A combined detector of spoilt files is refused in a sentence, or gives finite scores, or says not."""
    found = in_our_words(lambda: CombinedDetector.load(folder))
    if found is not None:
        try:
            assert found.score(torch.zeros((3, *found.image_shape), dtype=torch.uint8)).isfinite().all()
        except DetectorError as error:
            assert "not finite" in str(error)


@pytest.mark.parametrize(
    "name", ["combined.json", "combined.safetensors", "detector.json", "detector.safetensors"]
)
@quickly
@given(data=st.data())
def test_a_combined_detector_of_damaged_bytes_scores_or_is_refused(
    name: str, combined: Path, data: Any
) -> None:
    path = sorted(combined.rglob(name))[-1]
    content = path.read_bytes()
    try:
        path.write_bytes(damaged(content, data))
        combined_in_our_words(combined)
    finally:
        path.write_bytes(content)


@quickly
@given(data=st.data())
def test_a_combined_detector_with_anything_in_any_place_scores_or_is_refused(
    combined: Path, data: Any
) -> None:
    path = combined / "combined.json"
    content = path.read_text()
    values = json.loads(content)

    def places(inner: Any) -> list[Any]:
        return sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))

    inner, key = values, data.draw(st.sampled_from(places(values)))
    while isinstance(inner[key], (dict, list)) and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(places(inner)))
    inner[key] = data.draw(plain)
    try:
        path.write_text(json.dumps(values))
        combined_in_our_words(combined)
    finally:
        path.write_text(content)


@quickly
@given(data=st.data())
def test_settings_with_anything_in_any_place_are_a_run_or_refused(run: Path, data: Any) -> None:
    path = run / "settings.json"
    content = path.read_text()
    values = json.loads(content)
    inner, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner)))
    inner[key] = data.draw(plain)
    try:
        path.write_text(json.dumps(values))
        in_our_words(lambda: open_run(run))
    finally:
        path.write_text(content)


@quickly
@given(data=st.data())
def test_a_checkpoint_of_damaged_bytes_is_read_or_refused(run: Path, data: Any, tmp_path: Path) -> None:
    starts = prepare(load(SOURCE), TUNING, TRAINING)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damaged((run / "checkpoint.pt").read_bytes(), data))
    in_our_words(lambda: CheckpointFile(path, starts))


@quickly
@given(data=st.data())
def test_an_outbox_of_damaged_bytes_is_read_or_refused(data: Any, tmp_path: Path) -> None:
    outbox = tmp_path / "outbox.jsonl"
    outbox.unlink(missing_ok=True)
    create_outbox(outbox, dict.fromkeys(("study", "study_name", "experiment", "tracking_uri"), "x"))
    whole = outbox.read_bytes()
    outbox.with_suffix(".state.json").write_text(
        json.dumps({"study": "x", "tracking_uri": "x", "offset": data.draw(plain), "runs": data.draw(plain)})
    )
    in_our_words(lambda: (load_state(outbox), pending(outbox)))
    line = json.dumps({"v": 1, "at": 5, "metrics": {"dsv": 1.0}, "trial": "0"}).encode() + b"\n"
    outbox.write_bytes(damaged(whole + line, data))
    in_our_words(lambda: (read_settings(outbox), list(read_records(outbox, 0)), pending(outbox)))


@quickly
@given(data=st.data())
def test_a_journal_with_anything_in_a_line_is_read_or_refused(data: Any, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    lines = (run / "journal.log").read_bytes().splitlines()
    lines[data.draw(st.integers(0, len(lines) - 1))] = json.dumps(data.draw(plain)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    in_our_words(lambda: storage.open_journal(path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
@quickly
@given(data=st.data())
def test_an_image_of_damaged_bytes_is_pixels_or_refused(suffix: str, data: Any, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    path.write_bytes(damaged(path.read_bytes(), data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        in_our_words(lambda: read_images([path], 8, 3))


DECLARED: dict[type, tuple[str, ...]] = {
    Training: tuple(Training.__dataclass_fields__),
    Search: tuple(Search.__dataclass_fields__),
    Cluster: tuple(Cluster.__dataclass_fields__),
    Tuning: tuple(Tuning.__dataclass_fields__),
    Range: ("low", "high", "log"),
}


@pytest.mark.parametrize("declared", DECLARED)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_declaration_takes_a_value_or_names_what_is_wrong(declared: type, data: Any) -> None:
    name, value = data.draw(st.sampled_from(DECLARED[declared])), data.draw(scalars)
    given = {"low": 0.1, "high": 0.5, name: value} if declared is Range else {name: value}
    try:
        made = declared(**given)
    except ValueError as error:
        assert ":" in str(error)
    except TypeError:
        assert name in ("evaluate_at", "starts", "space")  # no container: neither words nor files give that
    else:
        if isinstance(made, Training):
            assert 1 <= made.width <= 512
            torch.Generator().manual_seed(made.seed + 10**9)


@settings(max_examples=200, deadline=None)
@given(st.floats(), st.floats())
def test_what_an_augmentation_takes_can_be_applied(area: float, aspect: float) -> None:
    images, generator = torch.full((2, 1, 8, 8), 0.5), torch.Generator().manual_seed(0)
    try:
        augmentation = Augmentation("cutavg", {"patch_area": area, "patch_aspect": aspect})
        changed = augment(images, augmentation, generator)
    except ValueError as error:
        assert ":" in str(error)
    else:
        assert changed.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(st.integers(-5, 10**9), st.integers(-5, 50), st.floats())
def test_arguments_of_a_data_set_are_taken_or_named(size: int, count: int, share: float) -> None:
    source = Source("controlled", {"image_size": size, "n_train": count, "contamination": share})
    try:
        assert isinstance(load(source), Task)
    except ValueError as error:
        assert ":" in str(error)


def test_a_grid_is_counted_before_it_is_listed() -> None:
    with pytest.raises(ValueError, match="grid_points: expected a grid of at most"):
        Search(SearchSpace("cutpaste"), sampler="grid", grid_points=1000)


def test_a_detector_whose_numbers_are_not_finite_gives_no_score(run: Path, tmp_path: Path) -> None:
    detector = Detector.load(shutil.copytree(sorted(run.rglob("detector"))[0], tmp_path / "detector"))
    assert detector.whitening is not None
    detector.whitening[0, 0] = torch.inf
    with pytest.raises(DetectorError, match="scores are not finite"):
        detector.score(torch.zeros((2, *detector.image_shape), dtype=torch.uint8))
