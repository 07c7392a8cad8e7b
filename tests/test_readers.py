"""Properties of every reader and every number: any bytes are read, or refused in our own words."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rich_click as click
import torch
from combined_runs import clear_run
from conftest import Ended
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tuned_runs import SOURCE, TRAINING, TUNING, quick

from ssad_hpo import storage, trust
from ssad_hpo.augment import augment
from ssad_hpo.bilevel import CollapseWarning, Tuning
from ssad_hpo.bilevel.checkpoint import CheckpointFile
from ssad_hpo.bilevel.tuning import prepare
from ssad_hpo.cli.program import app
from ssad_hpo.combined import CombinedDetector
from ssad_hpo.data import (
    DataError,
    Source,
    cache,
    load,
    read_contents,
    read_images,
    read_label_file,
    read_whole,
)
from ssad_hpo.data.reading import common_size
from ssad_hpo.detector import Detector
from ssad_hpo.encoder import NamedEncoder, build_network
from ssad_hpo.encoder.weights import load_weights
from ssad_hpo.experiment import open_run, read_trajectory, run_study
from ssad_hpo.experiment.outcome import chosen
from ssad_hpo.search import select_detectors
from ssad_hpo.search.store import read_arrays
from ssad_hpo.serving import Served, _load_pyfunc
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


def tampered(path: Path, data: Any) -> None:
    """One tensor of a safetensors file, of another type, another shape or with other numbers."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    how = data.draw(st.sampled_from(["gone", "type", "shape", "number", "name"]))
    tensor = tensors.pop(name)
    if how == "type":
        tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
    elif how == "shape":
        tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=4)), dtype=tensor.dtype)
    elif how == "name":
        tensors[data.draw(st.text(max_size=12))] = tensor
    elif how == "number" and tensor.numel():
        reals, wholes = st.floats(width=32), st.integers(-(2**63), 2**63 - 1)
        number = data.draw(reals if tensor.is_floating_point() else wholes)
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = number
        tensors[name] = tensor
    save_file(tensors, path)


def detector_in_our_words(folder: Path) -> None:
    """A detector of spoilt files is refused in a sentence, or gives finite scores and maps, or says not."""
    found = in_our_words(lambda: Detector.load(folder))
    if found is not None:
        images = torch.full((3, *found.image_shape), 100, dtype=torch.uint8)
        for use in (found.score, found.p_values, found.heatmaps):
            try:
                assert use(images).isfinite().all()
            except DetectorError as error:
                assert "not finite" in str(error)
            except ValueError as error:  # it has lost its calibration or its patches
                assert ":" in str(error)


@pytest.fixture(scope="module")
def member(combined: Path) -> Path:
    """A detector with everything: patches and a calibration."""
    return combined / "member-000"


@pytest.mark.parametrize("name", ["detector.safetensors", "patches.safetensors"])
@pytest.mark.parametrize("spoil", [tampered, None])
@quickly
@given(data=st.data())
def test_a_detector_of_tampered_tensors_scores_or_is_refused(
    name: str, spoil: Callable[[Path, Any], None] | None, member: Path, data: Any
) -> None:
    path = member / name
    content = path.read_bytes()
    try:
        if spoil is None:
            path.write_bytes(damaged(content, data))
        else:
            spoil(path, data)
        detector_in_our_words(member)
    finally:
        path.write_bytes(content)


@quickly
@given(data=st.data())
def test_a_combined_detector_of_tampered_tensors_scores_or_is_refused(combined: Path, data: Any) -> None:
    path = combined / "combined.safetensors"
    content = path.read_bytes()
    try:
        tampered(path, data)
        combined_in_our_words(combined)
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


@pytest.mark.parametrize("name", ["combined.json", "member-000/detector.json"])
@quickly
@given(data=st.data())
def test_a_combined_detector_with_anything_in_any_place_scores_or_is_refused(
    name: str, combined: Path, data: Any
) -> None:
    path = combined / name
    content = path.read_text()
    values = json.loads(content)

    def places(inner: Any) -> list[Any]:
        return sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))

    inner, key = values, data.draw(st.sampled_from(places(values)))
    while isinstance(inner[key], (dict, list)) and inner[key] and data.draw(st.booleans()):
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


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run whose study is in a database of its own, and what that holds."""
    place = tmp_path_factory.mktemp("database")
    training = Training(steps=4, batch_size=4, width=8, evaluate_at=(1.0,))
    storage_url = f"sqlite:///{place}/optuna.db"
    search = Search(n_trials=2, sampler="random")
    run_study(SOURCE, search, training, run=place / "run", tracking_uri=None, storage=storage_url)
    return place, (place / "optuna.db").read_bytes()


@quickly
@given(data=st.data())
def test_a_database_of_damaged_bytes_is_a_study_or_refused(database: tuple[Path, bytes], data: Any) -> None:
    place, content = database
    spoilt = bytearray(content)
    for _ in range(data.draw(st.integers(1, 20))):  # in the middle, where its pages are
        at = data.draw(st.integers(0, len(content) - 1))
        spoilt[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    how = data.draw(st.sampled_from([bytes(spoilt), damaged(content, data)]))
    (place / "optuna.db").write_bytes(how)
    in_our_words(lambda: chosen(place / "run"))


@quickly
@given(data=st.data())
def test_a_database_with_anything_in_any_cell_is_a_study_or_refused(
    database: tuple[Path, bytes], data: Any
) -> None:
    place, content = database
    (place / "optuna.db").write_bytes(content)
    with contextlib.closing(sqlite3.connect(place / "optuna.db")) as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type='table'")]
        full = [t for t in tables if connection.execute(f"select count(*) from {t}").fetchone()[0]]
        table = data.draw(st.sampled_from(sorted(full)))
        columns = [row[1] for row in connection.execute(f"pragma table_info({table})")]
        column = data.draw(st.sampled_from(columns))
        value = data.draw(
            st.none()
            | st.integers(-(2**62), 2**62)
            | st.floats(allow_nan=False)
            | st.text(st.characters(codec="utf-8"), max_size=8)
            | plain.map(lambda found: json.dumps(found, ensure_ascii=True))
        )
        with contextlib.suppress(sqlite3.Error), connection:  # what the schema forbids cannot be there
            connection.execute(f"update {table} set {column} = ?", (value,))
    in_our_words(lambda: chosen(place / "run"))


@quickly
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
def test_labels_of_any_bytes_are_labels_or_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    for start in (b"", b"path,label\n0.png,", b"label;path\n"):
        (tmp_path / "labels.csv").write_bytes(start + content)
        found = in_our_words(lambda: read_label_file(tmp_path / "labels.csv"))
        assert found is None or (list(found) == [tmp_path / "0.png"] and set(found.values()) <= {0, 1})


@pytest.fixture(scope="module")
def narrow() -> tuple[NamedEncoder, dict[str, torch.Tensor]]:
    """A small named encoder, and weights that fit."""
    torch.manual_seed(0)
    encoder = build_network("shufflenet_v2_x0_5", channels=3, image_size=(32, 32), width=8).encoder
    assert isinstance(encoder, NamedEncoder)
    tensors = encoder.model.state_dict().items()
    return encoder, {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@quickly
@given(data=st.data())
def test_weights_of_damaged_bytes_or_tampered_tensors_fit_or_are_refused(
    suffix: str, narrow: tuple[NamedEncoder, dict[str, torch.Tensor]], data: Any, tmp_path: Path
) -> None:
    encoder, tensors = narrow
    path = tmp_path / f"weights.{suffix}"
    save_file(tensors, tmp_path / "whole.safetensors")
    if data.draw(st.booleans()):
        tampered(tmp_path / "whole.safetensors", data)
    given = load_file(tmp_path / "whole.safetensors")
    if suffix == "pt":
        torch.save(given, path)
    else:
        save_file(given, path)
    if data.draw(st.booleans()):
        path.write_bytes(damaged(path.read_bytes(), data))
    in_our_words(lambda: load_weights(encoder, "shufflenet_v2_x0_5", str(path)))
    assert all(tensor.isfinite().all() for tensor in encoder.model.state_dict().values())


@quickly
@given(data=st.data())
def test_a_cache_of_damaged_files_gives_the_same_images_as_none(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tmp_path / "images", tmp_path / "cache"
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    monkeypatch.setenv("SSAD_HPO_CACHE", str(kept))
    source = Source("folders", {"train": str(folder / "a"), "unlabeled": str(folder / "b"), "image_size": 8})
    if not folder.exists():
        for place in ("a", "b"):
            (folder / place).mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(ord(place) + i).integers(0, 256, (9, 9), np.uint8)
                Image.fromarray(pixels).save(folder / place / f"{i}.png")
    shutil.rmtree(kept, ignore_errors=True)
    whole = load(source)
    path = data.draw(st.sampled_from(sorted(kept.iterdir())))
    if path.suffix == ".npy" or data.draw(st.booleans()):
        content = damaged(path.read_bytes(), data)
    else:
        values = json.loads(path.read_text())
        inner, key = values, data.draw(st.sampled_from(sorted(values)))
        while isinstance(inner[key], (dict, list)) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner[key] = data.draw(plain)
        content = json.dumps(values).encode()
    path.unlink()  # the images of before are still mapped from it
    path.write_bytes(content)
    assert load(source).content_hash == whole.content_hash


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("[" * 10**5), os.mkdir])
def test_a_cache_of_files_that_are_none_is_gone_without(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "cache"))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for i in range(2):
            Image.fromarray(np.full((9, 9), ord(place) + i, np.uint8)).save(tmp_path / place / f"{i}.png")
    source = Source(
        "folders", {"train": str(tmp_path / "a"), "unlabeled": str(tmp_path / "b"), "image_size": 8}
    )
    whole = load(source).content_hash
    kept = list((tmp_path / "cache").iterdir())
    assert kept
    for path in kept:
        path.unlink()
        make(path)
    assert load(source).content_hash == whole


@quickly
@given(content=st.binary(max_size=40) | plain.map(lambda value: json.dumps({"bit_depth": value}).encode()))
def test_a_served_detector_with_any_settings_is_served_or_refused(content: bytes, member: Path) -> None:
    path = member / "serving.json"
    path.write_bytes(content)
    try:
        found = in_our_words(lambda: _load_pyfunc(str(member)))
        assert found is None or 8 <= found.bit_depth <= 16
    finally:
        path.unlink()


@quickly
@given(values=st.lists(scalars | st.binary(max_size=20), max_size=3), rate=scalars)
def test_whatever_is_asked_of_a_served_detector_is_answered_or_refused(
    values: list[Any], rate: Any, member: Path
) -> None:
    served = Served(Detector.load(member), 16)
    with pytest.raises(ValueError, match=r"^image|^alarm_rate") if values else contextlib.nullcontext():
        served.predict(pd.DataFrame({"image": pd.Series(values, dtype=object)}))
    png = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(png, "PNG")
    in_our_words(lambda: served.predict(pd.DataFrame({"image": [png.getvalue()]}), {"alarm_rate": rate}))


@quickly
@given(data=st.data())
def test_a_sweeps_checkpoint_of_damaged_bytes_or_other_values_is_read_or_refused(
    data: Any, tmp_path: Path
) -> None:
    from ssad_hpo.raytune.worker import read_progress

    report = {"dsv": 0.5, "step": 4, "seconds": 1.0}
    saved: dict[str, Any] = {"reports": [report], "state": {"network": torch.zeros(2)}}
    if data.draw(st.booleans()):
        saved[data.draw(st.sampled_from(["reports", "state"]))] = data.draw(plain)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    content = buffer.getvalue()
    (tmp_path / "progress.pt").write_bytes(damaged(content, data) if data.draw(st.booleans()) else content)
    in_our_words(lambda: read_progress(tmp_path))


@quickly
@given(content=st.binary(max_size=80))
def test_known_addresses_of_any_bytes_make_no_other_address_known(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "ssad_hpo").mkdir(exist_ok=True)
    (tmp_path / "ssad_hpo" / "addresses").write_bytes(content)
    assert not trust.is_known("tracking_uri", "http://elsewhere:5000")


VALUED = [
    (command, option.opts[0])
    for command in ("search", "tune", "sweep", "score", "evaluate", "export", "register", "report", "select")
    for option in app.commands[command].params
    if isinstance(option, click.Option) and not option.is_flag
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.sampled_from(VALUED),
    value=scalars.map(str) | st.text(st.characters(blacklist_characters="\0"), max_size=8),
)
def test_an_option_with_any_value_ends_in_a_sentence(
    at: tuple[str, str], value: str, workplace: Path, call: Callable[..., Ended]
) -> None:
    command, option = at
    value = value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    needed = {"export": ["--out", "x.onnx"], "register": ["--name", "x"], "score": ["nowhere"]}
    said = call(command, "nowhere", *needed.get(command, []), option, value.replace("\0", ""))
    told = [line for line in said.err.splitlines() if " has no effect: " not in line]
    assert said.code in (1, 2) and len(told) == 1 and told[0].startswith("ssad-hpo: "), said
    assert "unforeseen" not in said.err and "Traceback" not in said.err
    assert list(workplace.iterdir()) == []


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
        in_our_words(lambda: read_whole(path))
        with contextlib.suppress(DataError):
            read_contents([path.read_bytes()], (1, 8, 8))
        assert common_size([path], 8)[0] in range(8, 33)


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
