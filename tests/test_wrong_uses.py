"""Wrong uses of every kind, through the command line in one process: one sentence, and nothing left behind.

Each ends with exit code 1 or 2. A use names what its sentence must name; where files have to be wrong for it,
it says how they are made so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import Ended
from PIL import Image
from tuned_runs import quick

from ssad_hpo.bilevel import CollapseWarning
from ssad_hpo.data import Source
from ssad_hpo.experiment import run_study
from ssad_hpo.task import Search, Training

SEARCH = "search cloth --no-tracking --run new"
TUNE = "tune cloth -a cutdiff --no-tracking --run new"
SWEEP = "sweep cloth --no-tracking --run new"
HUGE = 10**30
# Files of weights that are none: together 150 MB, which no row needs that spoils other files.
WEIGHTS = ("nan.safetensors", "whole.safetensors", "meta.pt", "complex.pt", "text.pt", "empty.pt")

# What is wrong with a number: too small, too large, or none.
NUMBERS = {
    "--width": ("width", "0", "-1", "1000000", "99999999999999999999"),
    "--steps": ("steps", "0", "-5", "100000000000"),
    "--batch-size": ("batch_size", "1", "100000000", "60000"),
    "--learning-rate": ("learning_rate", "-0.1", "nan", "inf", "1e300"),
    "--encoder-learning-rate": ("encoder_learning_rate", "-1", "nan", "1e40"),
    "--contamination": ("contamination", "0", "1", "-1", "nan", "0.9999999999"),
    "--image-size": ("image_size", "0", "-3", "100000", "1000000000000"),
    "--bit-depth": ("bit_depth", "7", "17", "-1"),
    "--threads": ("threads", "0", "-1", "1000000"),
    "--seed": ("seed", "-1", str(2**63), str(HUGE)),
    "--trials": ("n_trials", "-1", "-3", str(HUGE)),
    "--grid-points": ("grid_points", "1", "1000000"),
    "--reduction-factor": ("reduction_factor", "1", str(HUGE)),
    "--keep": ("keep", "0", str(HUGE)),
    "--combine": ("combine", "0", "-1", str(HUGE)),
    "--confirm": ("confirm", "-1", str(HUGE), "x"),
    "--held-out-share": ("held_out_share", "1", "1.5", "-0.5", "nan", "inf", "0.01"),
    "--frozen-stages": ("frozen_stages", "-1", str(HUGE)),
    "--evaluate-at": ("evaluate", "0.5", "1,0.5", "nan", "inf,1", "0.5,0.5,1", "-1,1", "x"),
}
RANGES = (
    "1e300",
    "1e-300",
    "nan",
    "inf",
    "0",
    "-1",
    "0.1:nan",
    "0:0.1",
    "1e-300:1e300",
    "0.2:0.2",
    ":",
    "a:b",
)
TUNED = {
    "--detector-steps": ("detector_steps", "0", str(HUGE)),
    "--warm-start": ("warm_start", "1", "-0.1", "nan"),
    "--starts": ("starts", "nan", "2", "patch_area=inf", "patch_area=1e300"),
    "--order": ("order", "0", "3"),
    "--survivors": ("survivors", "0", str(HUGE)),
    "--look": ("look", "0", "1", "nan", "-0.5"),
    "--combine": ("combine", "0", str(HUGE)),
    "--frozen-stages": ("frozen_stages", "-1", "9"),
    "--encoder-learning-rate": ("encoder_learning_rate", "-1", "nan"),
    "--seed": ("seed", "-1", str(2**63)),
}
SWEPT = {
    "--cpus-per-trial": ("cpus_per_trial", "0", "-1", "nan", "inf", "1e300", "4096"),
    "--gpus-per-trial": ("gpus_per_trial", "-1", "nan", "1e300", "1000"),
    "--max-concurrent": ("max_concurrent", "0", str(HUGE)),
    "--address": ("address", "nonsense", "127.0.0.1:1", "127.0.0.1:999999", "http://host:80", "host:", ":80"),
}


def numbers(command: str, table: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    for option, (named, *values) in table.items():
        for value in values:
            yield f"{command} {option} {value}", named


WORDS = [
    *numbers(SEARCH, NUMBERS),
    *((f"{SEARCH} --range cutavg.patch_area={value}", "patch_area") for value in RANGES),
    *numbers(TUNE, TUNED),
    *numbers(SWEEP, SWEPT),
    (f"{SEARCH} --sampler grid --grid-points 1000 -a cutpaste", "grid_points"),
    (f"{SEARCH} --range cutavg.patch_area=0.1 --range cutavg.patch_area=0.2", "given before"),
    *((f"{SEARCH} --device {device}", "device") for device in ("meta", "mps", "cuda:99", "vulkan", "cpu:x")),
    *((f"score good --device {device} cloth", "device") for device in ("meta", "xla", "cuda:9")),
    (f"{SEARCH} --anomaly ../../etc", "anomaly"),
    *((f"{SEARCH} --criterion {name}", "--held-out-share") for name in ("pu_auc", "excess", "shift")),
    (f"{SWEEP} --criterion pu_auc", "--held-out-share"),
    (f"{TUNE} --choose-by pu_auc", "--held-out-share"),
    (f"{TUNE} --loss pu_auc", "--held-out-share"),
    (f"{TUNE} --loss density_pu_auc --held-out-share 0.3", "order 2"),
    (f"{TUNE} --encoder mobilenet_v3_small --order 2", "use order 1"),
    (f"{SEARCH} --held-out more --held-out-share 0.3", "held_out_share"),
    (f"{SEARCH} --criterion pu_auc --held-out-share 0", "--held-out-share"),
    (f"{SEARCH} --held-out empty", "empty"),
    (f"{SEARCH} --held-out nowhere", "nowhere"),
    (f"{SEARCH} --held-out single", "single"),
    (f"{SEARCH} --held-out cloth/train", "is in train and in held_out"),
    ("search gravel/cutavg --held-out more", "--held-out"),
    ("search gravel/cutavg --held-out-share 0.2", "--held-out-share"),
    ("search gravel/cutavg --criterion pu_auc", "pu_auc"),
    ("select one.npz --by pu_auc", "held_out_scores"),
    ("score good cloth --single --out nowhere/x.csv", "nowhere/x.csv"),
    (f"{SEARCH} --weights cloth", "weights"),
    (f"{SEARCH} --weights missing.pt --encoder resnet18", "weights"),
    (f"{SEARCH} --encoder resnet18 --width 8 --image-size 0", "image_size"),
    (f"{SEARCH} --encoder-batch-norm maybe", "batch_norm"),
    (f"{SEARCH} --precision float16", "precision"),
    (f"{SEARCH} --score guess", "score"),
    ("search gravel/cutavg/1e-300", "gravel/cutavg/1e-300"),
    ("search gravel/cutavg/1e300", "gravel/cutavg/1e300"),
    ("search gravel/cutavg --category x", "category"),
    (f"search gravel/cutavg --seed {2**63}", "seed"),
    (f"demo --seed {2**63}", "seed"),
    ("demo --trials 0", "n_trials"),
    ("search cloth --run " + "x" * 300, "File name too long"),
    ("search cloth --run cloth/train", "exists already"),
    ("search cloth --run good/settings.json/below", "good/settings.json"),
    ("score good", "PATHS"),
    ("score good nowhere", "nowhere"),
    *((f"score good cloth --alarm-rate {rate}", "alarm_rate") for rate in ("0", "1", "-0.1", "nan", "inf")),
    ("score good cloth --alarm-rate 0.1", "--held-out"),
    ("score held more --alarm-rate 0.01", "keep rates of"),
    ("score held more --alarm-rate x", "--alarm-rate"),
    ("evaluate good --alarm-rate 0.1", "--labels"),
    ("evaluate good --labels nowhere.csv", "nowhere.csv"),
    ("evaluate good --labels cloth", "a folder"),
    ("evaluate good --labels one.npz", "one.npz"),
    ("evaluate held --labels labels.csv --alarm-rate 0.01", "keep rates of"),
    ("evaluate good --labels labels.csv --alarm-rate 0.1", "held no normal images out"),
    ("evaluate cloth --labels labels.csv", "holds no run"),
    ("score good cloth --out nowhere/x.csv", "nowhere/x.csv"),
    ("score good cloth --out cloth", "cloth"),
    ("score good cloth --out good/settings.json/x.csv", "x.csv"),
    ("score good cloth --bit-depth 40", "bit_depth"),
    ("score good cloth --heatmaps cloth/maps", "cloth/maps lies among the images"),
    ("score good cloth --heatmaps good/settings.json", "good/settings.json is a file"),
    ("score good cloth/test/good/000.jpg --heatmaps nowhere/x --bit-depth 7", "bit_depth"),
    ("export good", "--out"),
    ("export good --out nowhere/x.onnx", "nowhere/x.onnx"),
    ("export good --out cloth", "cloth"),
    ("export good --out x.lite --format tflite", "tflite"),
    *((f"export good --format {name} --out /dev/null", "a device") for name in ("onnx", "torch")),
    (f"export good --out {'x' * 250}", "File name too long"),
    ("export good --out /proc/x.onnx", "/proc/x.onnx"),
    ("score good cloth --heatmaps /proc/maps-of-mine", "/proc/maps-of-mine"),
    (f"score good cloth --heatmaps {'x' * 300}", "File name too long"),
    ("score good cloth --heatmaps both --out both", "both"),
    ("score good more/0.png --out more/0.png", "is an image that is to be scored"),
    *((f"score held more --alarm-rate {rate}", "keep rates of") for rate in ("1e-300", "5e-324")),
    ("evaluate good --labels /proc/self/mem", "/proc/self/mem"),
    *((f"register good --name {name}", "name") for name in ("it's", 'a"b', "a\x07b", "x" * 251)),
    *((f"search cloth --encoder resnet18 --weights {name}", name) for name in WEIGHTS),
    ("export cloth --out x.onnx", "holds no run"),
    ("register good", "--name"),
    ("register good --name a/b", "name"),
    ("register good --name screws", "without tracking"),
    ("register cloth --name screws", "holds no run"),
    ("score cloth cloth", "holds no run"),
    ("evaluate cloth", "holds no run"),
    ("report empty", "holds no run"),
    ("report good --out cloth", "there is 'cloth'"),
    ("report good --out nowhere/page", "nowhere/page"),
    ("report good --out /proc/page", "/proc/page"),
    (f"report good --out {'x' * 300}", "File name too long"),
    ("sync good", "without tracking"),
    ("search --resume tuned", "tune --resume"),
    ("tune --resume good", "search --resume"),
    (f"search --resume good --trials {HUGE}", "n_trials"),
    ("sweep --resume good --address 127.0.0.1:1", "local search"),
    ("select empty", "empty"),
    ("select cloth/train/good/000.png", "000.png"),
    ("select good/settings.json", "settings.json"),
]


@dataclass(frozen=True)
class Place:
    """A working directory with a search, a tuning and images, to be spoilt."""

    folder: Path

    @property
    def arrays(self) -> Path:
        return next(iter(sorted((self.folder / "good" / "artifacts").glob("*/arrays.npz"))))

    @property
    def detector(self) -> Path:
        return next(iter(sorted((self.folder / "good" / "artifacts").glob("*/detector"))))

    @property
    def held(self) -> Path:
        return next(iter(sorted((self.folder / "held" / "artifacts").glob("*/detector"))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_category: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("wrong") / "place"
    make_category(folder / "cloth", grey=True)
    (folder / "empty").mkdir()
    for name, count in (("more", 3), ("single", 1)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    # The photograph of another place would do as well: addresses of images are absolute.
    training = Training(steps=4, batch_size=4, evaluate_at=(1.0,), width=8)
    source = Source("folder", {"root": str(folder / "cloth"), "image_size": 16})
    run_study(source, Search(n_trials=1), training, run=folder / "good", tracking_uri=None)
    held = Source(
        "folder", {"root": str(folder / "cloth"), "image_size": 16, "held_out": str(folder / "more")}
    )
    run_study(held, Search(n_trials=1), training, run=folder / "held", tracking_uri=None)
    combined = Search(n_trials=2, combine=2)
    run_study(held, combined, training, run=folder / "combined", tracking_uri=None)
    database = f"sqlite:///{folder}/optuna.db"
    run_study(source, Search(n_trials=1), training, run=folder / "kept", tracking_uri=None, storage=database)
    (folder / "labels.csv").write_text("path,label\nmore/0.png,good\n")
    spoil_weights(folder)
    shutil.copy(next((folder / "good" / "artifacts").glob("*/arrays.npz")), folder / "one.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        quick(folder / "tuned")
    return folder


def spoil_weights(folder: Path) -> None:
    """Files of weights that are none, or none of real and finite numbers for each name."""
    from safetensors.torch import save_file

    names = {name: tensor.clone() for name, tensor in torchvision.models.resnet18().state_dict().items()}
    real = {name: tensor for name, tensor in names.items() if tensor.is_floating_point()}
    save_file(names | {"conv1.weight": names["conv1.weight"] * NAN}, folder / "nan.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in names.items()}, folder / "whole.safetensors")
    torch.save({name: tensor.to("meta") for name, tensor in names.items()}, folder / "meta.pt")
    torch.save(names | {name: tensor * 1j for name, tensor in real.items()}, folder / "complex.pt")
    (folder / "text.pt").write_text("no")
    (folder / "empty.pt").write_bytes(b"")


@pytest.fixture
def place(made: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    ignored = shutil.ignore_patterns(*WEIGHTS)
    shutil.copytree(made, workplace, dirs_exist_ok=True, symlinks=True, ignore=ignored)
    monkeypatch.setenv("SSAD_HPO_CACHE", "")
    kept = Path("kept", "settings.json")  # the copy's own database
    kept.write_text(kept.read_text().replace(str(made), str(workplace)))
    return Place(workplace)


def files_in(folder: Path) -> set[str]:
    """All that is there, but for the lock that writing to a run makes."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock"}


def check(said: Ended, named: str) -> None:
    assert said.code in (1, 2), said
    told = [line for line in said.err.splitlines() if " has no effect: " not in line]
    assert len(told) == 1 and told[0].startswith("ssad-hpo: "), said
    assert named in told[0] and "Traceback" not in said.err and "unforeseen" not in said.err
    assert not said.out or "run folder" in said.out  # a run that is gone on with is announced


def test_the_table_is_as_long_as_it_was_asked_to_be() -> None:
    assert len(WORDS) + len(SETTINGS) + len(FILES) >= 150


@pytest.fixture(scope="module")
def unspoilt(made: Path) -> set[str]:
    return files_in(made)


@pytest.mark.parametrize(("words", "named"), WORDS, ids=[words[:70] for words, _ in WORDS])
def test_a_wrong_word_is_one_sentence_and_leaves_nothing(
    words: str,
    named: str,
    made: Path,
    unspoilt: set[str],
    workplace: Path,
    call: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(made)  # nothing is spoilt here, so one is enough for all
    check(call(*words.split()), named)
    assert files_in(made) == unspoilt


# Paths into settings.json, and what cannot stand there.
SETTINGS: list[tuple[tuple[str, ...], Any]] = [
    (("format",), 99),
    (("format",), None),
    (("study_name",), 3),
    (("task_name",), ["a"]),
    (("content_hash",), None),
    (("device",), "meta"),
    (("device",), 3),
    (("threads",), "two"),
    (("threads",), 10**9),
    (("threads",), 1.5),
    (("threads",), True),
    (("storage",), 7),
    (("versions",), []),
    (("versions",), {"torch": 2}),
    (("method",), {}),
    (("method",), []),
    (("method", "search"), 3),
    (("method", "search", "criterion"), []),
    (("method", "search", "n_trials"), 1e300),
    (("method", "search", "seed"), HUGE),
    (("method", "search", "combine"), 0),
    (("method", "search", "combine"), "all"),
    (("method", "search", "contrast_heads"), "yes"),
    (("method", "search", "confirm"), -1),
    (("method", "search", "confirm"), "two"),
    (("source", "arguments", "held_out"), "/nowhere/at/all"),
    (("source", "arguments", "held_out"), 3),
    (("source", "arguments", "held_out_share"), "a quarter"),
    (("source", "arguments", "held_out_share"), 2),
    (("method", "search", "sampler"), {}),
    (("method", "search", "space"), {}),
    (("method", "search", "space"), {"cutavg": {"patch_area": "big"}}),
    (("method", "search", "space"), {"cutavg": {"patch_area": {"low": 0.1}}}),
    (("method", "search", "space"), {"cutavg": {"patch_area": {"low": 0.1, "high": HUGE, "log": True}}}),
    (("method", "search", "space"), {"cutavg": {"patch_area": {"low": 0.1, "high": 0.2, "log": "yes"}}}),
    (("training", "width"), "16"),
    (("training", "width"), 10**6),
    (("training", "evaluate_at"), ["x"]),
    (("training", "evaluate_at"), 3),
    (("training", "evaluate_at"), {}),
    (("training", "learning_rate"), None),
    (("training", "weights"), 4),
    (("training", "encoder"), ["small"]),
    (("training", "unknown"), 1),
    (("training",), None),
    (("source",), "cloth"),
    (("source", "loader"), "none"),
    (("source", "loader"), []),
    (("source", "arguments"), {"root": 3}),
    (("source", "arguments", "image_size"), 10**6),
    (("source", "arguments", "image_size"), "large"),
    (("source", "arguments", "keep_ratio"), {}),
    (("source", "arguments", "root"), "/nowhere/at/all"),
    (("cluster",), 3),
    (("cluster",), {"cpus_per_trial": "one"}),
]


@pytest.mark.parametrize(("at", "value"), SETTINGS, ids=[f"{'.'.join(at)}={v}"[:60] for at, v in SETTINGS])
def test_settings_that_cannot_be_are_told_with_their_file(
    at: tuple[str, ...], value: Any, place: Place, call: Callable[..., Ended]
) -> None:
    path = Path("good", "settings.json")
    settings = json.loads(path.read_text())
    inner = settings
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = value
    path.write_text(json.dumps(settings))
    before = files_in(place.folder)
    said = call("search", "--resume", "./good")
    if at == ("source", "arguments", "keep_ratio"):  # anything is true or false
        return
    check(said, "")
    assert files_in(place.folder) == before


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_arrays(path: Path, **changed: Any) -> None:
    with np.load(path) as file:
        arrays = {**file, **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "detector.safetensors")
    change(tensors)
    save_file(tensors, folder / "detector.safetensors")


Tensors = dict[str, torch.Tensor]


def with_tensors(path: Path, change: Callable[[Tensors], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def each(
    ending: str, tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change the tensors whose names end so."""
    names = [name for name in tensors if name.endswith(ending)]
    assert names
    tensors.update({name: change(tensors[name]).contiguous() for name in names})


def fewer(tensors: Tensors) -> None:
    each("normal", tensors, lambda distances: distances[:2])


def as_large(path: Path, size: int = 10**11) -> None:
    """A file with a hole, which takes no room."""
    with path.open("rb+") as file:
        file.truncate(size)


def in_database(statement: str) -> None:
    with contextlib.closing(sqlite3.connect("optuna.db")) as connection:
        connection.executescript(statement)


def with_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def as_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_checkpoint(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    # Its last start is open again, so that the tuning takes it up.


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


NAN = float("nan")
SCORE, RESUME, EVALUATE = "score ./good cloth/test", "tune --resume ./tuned", "evaluate ./good"
RANK = "select x.npz"
HEAT, TOGETHER, OF_DATABASE = f"{SCORE} --heatmaps maps", "score ./combined/combined cloth", "report ./kept"
PATCHES, HEADS, COMBINED = "patches.safetensors", "combined.safetensors", Path("combined", "combined")
LABELS = "evaluate ./held --labels l.csv"


def npz(place: Place, **changed: Any) -> None:
    shutil.copy(place.arrays, "x.npz")
    with_arrays(Path("x.npz"), **changed)


# How a file is made wrong, the words that read it, and what is named.
FILES: list[tuple[str, Callable[[Place], Any], str, str]] = [
    ("settings empty", lambda p: rewrite(Path("good/settings.json"), lambda b: b""), SCORE, "settings.json"),
    ("settings half", lambda p: rewrite(Path("good/settings.json"), half), SCORE, "settings.json"),
    ("settings binary", lambda p: rewrite(Path("good/settings.json"), lambda b: b"\xff"), SCORE, "settings"),
    ("settings a list", lambda p: rewrite(Path("good/settings.json"), lambda b: b"[]"), SCORE, "settings"),
    ("settings deep", lambda p: Path("good/settings.json").write_text("[" * 10**5), SCORE, "settings.json"),
    ("settings NaN", lambda p: Path("good/settings.json").write_text('{"format": NaN}'), SCORE, "settings"),
    ("settings a FIFO", lambda p: as_fifo(Path("good/settings.json")), SCORE, "holds no run"),
    ("journal empty", lambda p: rewrite(Path("good/journal.log"), lambda b: b""), SCORE, "first trial"),
    (
        "journal binary",
        lambda p: rewrite(Path("good/journal.log"), lambda b: b"\xff\n" + b),
        SCORE,
        "journal",
    ),
    (
        "journal [] first",
        lambda p: rewrite(Path("good/journal.log"), lambda b: b"[]\n" + b),
        SCORE,
        "journal",
    ),
    ("journal a FIFO", lambda p: as_fifo(Path("good/journal.log")), SCORE, "is a FIFO"),
    (
        "journal a text for a number",
        lambda p: rewrite(Path("good/journal.log"), lambda b: re.sub(rb'"loss":[^,}]*', b'"loss":"x"', b)),
        SCORE,
        "trial 0",
    ),
    ("arrays gone", lambda p: p.arrays.unlink(), SCORE, "artifacts are gone"),
    ("arrays empty", lambda p: rewrite(p.arrays, lambda b: b""), SCORE, "arrays.npz"),
    ("arrays half", lambda p: rewrite(p.arrays, half), SCORE, "arrays.npz"),
    ("arrays text", lambda p: rewrite(p.arrays, lambda b: b"hello"), EVALUATE, "arrays.npz"),
    (
        "arrays flipped",
        lambda p: rewrite(p.arrays, lambda b: b[:200] + b"xxxx" + b[204:]),
        SCORE,
        "arrays.npz",
    ),
    ("arrays nan", lambda p: with_arrays(p.arrays, scores=np.full(15, NAN)), EVALUATE, "scores"),
    ("arrays few", lambda p: with_arrays(p.arrays, scores=np.ones(2)), SCORE, "scores"),
    ("arrays pickled", lambda p: with_arrays(p.arrays, train=np.array([{}])), SCORE, "arrays.npz"),
    ("arrays complex", lambda p: with_arrays(p.arrays, train=np.ones((3, 4)) * 1j), SCORE, "train"),
    ("arrays without", lambda p: with_arrays(p.arrays, augmented=None), SCORE, "augmented"),
    ("detector gone", lambda p: shutil.rmtree(p.detector), SCORE, "not among the best"),
    ("weights gone", lambda p: (p.detector / "detector.safetensors").unlink(), SCORE, "detector.safetensors"),
    (
        "weights empty",
        lambda p: rewrite(p.detector / "detector.safetensors", lambda b: b""),
        SCORE,
        "detector",
    ),
    ("weights half", lambda p: rewrite(p.detector / "detector.safetensors", half), SCORE, "detector"),
    ("weights FIFO", lambda p: as_fifo(p.detector / "detector.safetensors"), SCORE, "detector.safetensors"),
    (
        "weights nan",
        lambda p: with_weights(p.detector, lambda t: t["density.mean"].fill_(NAN)),
        SCORE,
        "finite",
    ),
    (
        "weights inf",
        lambda p: with_weights(p.detector, lambda t: t["network.head.0.weight"].fill_(NAN)),
        SCORE,
        "finite",
    ),
    (
        "weights less",
        lambda p: with_weights(p.detector, lambda t: t.pop("density.mean")),
        SCORE,
        "density.mean",
    ),
    (
        "weights other",
        lambda p: with_weights(p.detector, lambda t: t.update({"density.mean": torch.zeros(3).double()})),
        SCORE,
        "density",
    ),
    ("detector []", lambda p: (p.detector / "detector.json").write_text("[]"), SCORE, "detector"),
    ("detector old", lambda p: with_json(p.detector / "detector.json", format=0), SCORE, "format"),
    (
        "detector size",
        lambda p: with_json(p.detector / "detector.json", image_shape=[1, 9**9, 2]),
        SCORE,
        "height",
    ),
    ("detector shape", lambda p: with_json(p.detector / "detector.json", image_shape=5), SCORE, "detector"),
    ("detector kind", lambda p: with_json(p.detector / "detector.json", augmentation={}), SCORE, "kind"),
    (
        "detector none",
        lambda p: with_json(p.detector / "detector.json", training={"width": 10**9}),
        SCORE,
        "width",
    ),
    ("checkpoint empty", lambda p: rewrite(Path("tuned/checkpoint.pt"), lambda b: b""), RESUME, "checkpoint"),
    ("checkpoint half", lambda p: rewrite(Path("tuned/checkpoint.pt"), half), RESUME, "checkpoint"),
    ("checkpoint FIFO", lambda p: as_fifo(Path("tuned/checkpoint.pt")), RESUME, "checkpoint"),
    (
        "checkpoint flipped",
        lambda p: rewrite(
            Path("tuned/checkpoint.pt"), lambda b: b[: len(b) // 2] + b"??" + b[len(b) // 2 + 2 :]
        ),
        RESUME,
        "checkpoint",
    ),
    (
        "checkpoint nan",
        lambda p: as_checkpoint(Path("tuned/checkpoint.pt"), lambda c: c["finished"][0]["point"].fill_(NAN)),
        RESUME,
        "finite",
    ),
    (
        "checkpoint less",
        lambda p: as_checkpoint(Path("tuned/checkpoint.pt"), lambda c: c["finished"][0].pop("network")),
        RESUME,
        "network",
    ),
    (
        "checkpoint other",
        lambda p: as_checkpoint(Path("tuned/checkpoint.pt"), lambda c: c.update(finished=[3])),
        RESUME,
        "checkpoint",
    ),
    ("checkpoint list", lambda p: torch.save([1], "tuned/checkpoint.pt"), RESUME, "checkpoint"),
    (
        "trajectory",
        lambda p: next(Path("tuned").rglob("trajectory.csv")).write_text("a,b\n"),
        "report ./tuned",
        "trajectory",
    ),
    ("patches empty", lambda p: rewrite(p.detector / PATCHES, lambda b: b""), SCORE, PATCHES),
    ("patches half", lambda p: rewrite(p.detector / PATCHES, half), HEAT, "detector"),
    ("patches FIFO", lambda p: as_fifo(p.detector / PATCHES), SCORE, PATCHES),
    ("patches large", lambda p: as_large(p.detector / PATCHES), SCORE, PATCHES),
    ("weights large", lambda p: as_large(p.detector / "detector.safetensors"), SCORE, "safetensors"),
    *(
        (
            f"patches {name}",
            lambda p, e=ending, c=change: with_tensors(p.detector / PATCHES, lambda t: each(e, t, c)),
            HEAT,
            "feature map",
        )
        for name, ending, change in (
            ("of other channels", "channels", lambda t: t + 10**6),
            ("of a scalar", "channels", lambda t: t.sum()),
            ("of no channel", "channels", lambda t: t[:0]),
            ("of another size", "normal", lambda t: t.new_zeros(3, 5, 7)),
            ("of another mean", "mean", lambda t: t[1:]),
        )
    ),
    (
        "patches of another stride",
        lambda p: with_tensors(
            p.detector / PATCHES,
            lambda t: t.update({f"128.{n.partition('.')[2]}": v.clone() for n, v in t.items()}),
        ),
        HEAT,
        "stride 128",
    ),
    (
        "patches of different normal images",
        lambda p: with_tensors(
            p.detector / PATCHES, lambda t: t.update({(n := min(m for m in t if "normal" in m)): t[n][:2]})
        ),
        HEAT,
        "as many normal images",
    ),
    (
        "patches huge",
        lambda p: with_tensors(p.detector / PATCHES, lambda t: each("whitening", t, lambda w: w + 3e38)),
        HEAT,
        "patches are not finite",
    ),
    *(
        (
            f"weights {dtype}",
            lambda p, d=dtype: with_weights(
                p.detector, lambda t: each("head.0.weight", t, lambda w: w.to(d))
            ),
            SCORE,
            "expected torch.float32",
        )
        for dtype in (torch.int8, torch.complex64, torch.float16)
    ),
    *(
        (
            f"calibration {name}",
            lambda p, k=kept: with_weights(p.held, lambda t: t.update({"calibration.held_out": k})),
            "score ./held cloth",
            "held_out",
        )
        for name, kept in (
            ("empty", torch.zeros(0)),
            ("whole", torch.arange(3)),
            ("square", torch.zeros(2, 2)),
        )
    ),
    (
        "calibration nan",
        lambda p: with_weights(p.held, lambda t: t["calibration.held_out"].fill_(NAN)),
        "score ./held cloth",
        "finite",
    ),
    (
        "combined empty",
        lambda p: rewrite(COMBINED / "combined.safetensors", lambda b: b""),
        TOGETHER,
        "combined",
    ),
    ("combined large", lambda p: as_large(COMBINED / "combined.safetensors"), TOGETHER, "safetensors"),
    ("combined FIFO", lambda p: as_fifo(COMBINED / "combined.safetensors"), TOGETHER, "FIFO"),
    ("combined gone", lambda p: shutil.rmtree(COMBINED / "member-001"), TOGETHER, "member-001"),
    *(
        (
            f"combined parts {parts!r:.30}",
            lambda p, k=parts: with_json(COMBINED / "combined.json", parts=k),
            TOGETHER,
            "combined",
        )
        for parts in (
            3,
            {},
            [[]],
            [{"scores": [True, True]}] * 2,
            [{"scores": [0, 0]}] * 2,
            [{"scores": [0, 10**400]}] * 2,
            [{"scores": ["a", "b"]}] * 2,
            [{"scores": [0, 1]}] * 10**5,
            [{"scores": [0, 1], "head": [0, 0, 1, 1]}] * 2,
        )
    ),
    (
        "combined maps",
        lambda p: with_tensors(
            COMBINED / "member-001" / PATCHES, lambda t: each("normal", t, lambda n: n[:2])
        ),
        TOGETHER,
        "different normal images",
    ),
    *(
        (f"database {statement[:40]}", lambda p, s=statement: in_database(s), OF_DATABASE, "optuna.db")
        for statement in (
            "drop table trial_values",
            "update trial_user_attributes set value_json=null",
            "update trial_user_attributes set value_json='{'",
            "update trials set state='NONSENSE'",
            "update trials set number=null",
            "update trials set datetime_start='abc'",
            "update trial_values set value=null",
            "update trial_params set distribution_json='{}'",
            "update trial_params set param_value=1e300",
            "update study_directions set direction='MAXIMIZE'",
        )
    ),
    ("database none", lambda p: in_database("delete from studies"), OF_DATABASE, "before its first trial"),
    ("database empty", lambda p: rewrite(Path("optuna.db"), lambda b: b""), OF_DATABASE, "optuna.db"),
    ("database half", lambda p: rewrite(Path("optuna.db"), half), "search --resume ./kept", "optuna.db"),
    ("database FIFO", lambda p: as_fifo(Path("optuna.db")), OF_DATABASE, "optuna.db"),
    ("lock FIFO", lambda p: as_fifo(Path("good/lock")), SCORE, "lock"),
    *(
        (
            f"labels {name}",
            lambda p, c=content: Path("l.csv").write_bytes(c),
            "evaluate ./held --labels l.csv",
            told,
        )
        for name, content, told in (
            ("empty", b"", "no path"),
            ("binary", bytes(range(256)), "no path"),
            ("NUL", b"path,label\na\0b,good\n", "line 2"),
            ("long", b"path,label\n" + b"a" * 5000 + b",good\n", "line 2"),
            ("short", b"label,path\ngood\n", "line 2"),
            ("twice", b"path,label\nmore/0.png,good\n./more/../more/0.png,bad\n", "another label"),
            ("field", b'path,label\n"' + b"x" * 200_000, "field larger"),
        )
    ),
    (
        "labels large",
        lambda p: (Path("l.csv").touch(), as_large(Path("l.csv"))),
        "evaluate ./held --labels l.csv",
        "256 MiB",
    ),
    (
        "heat map in the way",
        lambda p: Path("maps/good/000.png").mkdir(parents=True),
        HEAT,
        "in the way",
    ),
    ("npz text", lambda p: Path("x.npz").write_text("hello"), RANK, "x.npz"),
    ("npz missing", lambda p: None, RANK, "x.npz"),
    ("npz a FIFO", lambda p: as_fifo(Path("x.npz")), RANK, "x.npz"),
    ("npz 1-d", lambda p: npz(p, train=np.ones(4)), RANK, "train"),
    ("npz one row", lambda p: npz(p, train=np.ones((1, 64))), RANK, "train"),
    ("npz wide", lambda p: npz(p, augmented=np.random.default_rng(0).random((3, 2))), RANK, "augmented"),
    ("npz inf", lambda p: npz(p, train=np.full((4, 64), np.inf)), RANK, "train"),
    ("npz same", lambda p: npz(p, train=np.ones((4, 64))), RANK, "train"),
    ("npz text array", lambda p: npz(p, train=np.array([["a"]])), RANK, "train"),
    ("npz huge", lambda p: npz(p, train=np.random.default_rng(0).random((14, 64)) * 1e300), RANK, "x.npz"),
    ("image FIFO", lambda p: as_fifo(Path("cloth/test/good/000.jpg")), SCORE, "FIFO"),
    ("image FIFO in a search", lambda p: as_fifo(Path("cloth/train/good/000.png")), SEARCH, "FIFO"),
    ("image FIFO alone", lambda p: as_fifo(Path("a.png")), "score ./good a.png", "FIFO"),
    ("image half", lambda p: rewrite(Path("cloth/test/good/000.jpg"), half), SCORE, "000.jpg"),
    ("image text", lambda p: Path("cloth/train/good/000.png").write_text("no"), SEARCH, "000.png"),
    (
        "image of floats",
        lambda p: Image.new("F", (9, 9)).save("a.tif"),
        "score ./good a.tif",
        "floating-point",
    ),
    (
        "images all bad",
        lambda p: Path("a.png").write_text(""),
        "score ./good a.png --skip-unreadable",
        "a.png",
    ),
]


@pytest.mark.parametrize(("spoil", "words", "named"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_file_that_cannot_be_used_is_one_sentence(
    spoil: Callable[[Place], Any], words: str, named: str, place: Place, call: Callable[..., Ended]
) -> None:
    spoil(place)
    before = files_in(place.folder)
    check(call(*words.split()), named)
    assert files_in(place.folder) == before


def test_a_socket_among_the_images_is_told(place: Place, call: Callable[..., Ended]) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.png")
        check(call("score", "./good", "s.png"), "socket")


def test_an_address_that_takes_connections_and_is_silent_is_told_within_15_s(
    place: Place, call: Callable[..., Ended]
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        check(call(*SWEEP.split(), "--address", address), "address: no Ray cluster")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", [["score", "./good", ""], ["export", "./good", "--out", ""], ["example", ""]]
)
def test_an_argument_that_a_shell_made_of_nothing_is_told(
    words: list[str], place: Place, call: Callable[..., Ended]
) -> None:
    before = files_in(place.folder)
    check(call(*words), "an argument is empty")
    assert files_in(place.folder) == before


def test_a_database_that_fails_in_the_middle_of_a_study_is_one_sentence(
    place: Place, call: Callable[..., Ended]
) -> None:
    in_database(
        "create trigger broken before update on trials begin select raise(fail, 'the disk has gone'); end"
    )
    check(call("search", "--resume", "./kept", "--trials", "2"), "the disk has gone")
    in_database("drop trigger broken")
    assert call("search", "--resume", "./kept").code == 0


def test_devices_stay_what_they_are(place: Place, call: Callable[..., Ended]) -> None:
    os.mkfifo("fifo")
    for words in ("export good --out fifo", "export good --format torch --out fifo"):
        check(call(*words.split()), "fifo")
    assert Path("fifo").is_fifo()
