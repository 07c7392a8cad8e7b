"""A detector's settings may name any encoder: one that the file of weights is not of is never built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ssad_hpo.augment import NONE, Augmentation
from ssad_hpo.detector import Detector, untrained_detector
from ssad_hpo.encoder import build_network, network_shapes
from ssad_hpo.files import FileError, tensor_shapes
from ssad_hpo.task import Training
from tests.detectors import textures

MEGABYTES = 2**20


class Largest(TorchDispatchMode):
    """Hears of every tensor that takes memory inside: the bytes of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else (made,):
            if isinstance(one, torch.Tensor) and one.device.type != "meta":
                self.bytes = max(self.bytes, one.nbytes)
        return made


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    detector = untrained_detector(Training(width=2), (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
    detector.fit_density(detector.embed(textures(12)))
    detector.save(tmp_path / "kept")
    return tmp_path / "kept"


def set_training(folder: Path, **settings: Any) -> None:
    path = folder / "detector.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "training": {**found["training"], **settings}}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder": "regnet_y_128gf"}, "regnet_y_128gf'.* is missing"),  # 2.8 GB
        (
            {"encoder": "vit_giant_patch14_clip_224"},
            "vit_giant_patch14_clip_224'.* is missing",
        ),  # 4 GB
        ({"width": 512}, r"'small': encoder\.stem\.weight is 2 x 1 x 3 x 3, expected 512 x 1 x 3 x 3"),
    ],
)
def test_a_network_that_the_weights_are_not_of_is_refused_before_it_takes_memory(
    kept: Path, settings: dict[str, Any], told: str
) -> None:
    set_training(kept, **settings)
    said = rf"kept: cannot be read as a detector .*does not hold the network of detector\.json, .*{told}"
    with Largest() as largest, pytest.raises(FileError, match=said):
        Detector.load(kept)
    assert largest.bytes < MEGABYTES


def test_weights_that_lack_one_or_have_another_shape_are_refused_by_name(kept: Path) -> None:
    path = kept / "detector.safetensors"
    whole = load_file(path)
    name = "network.head.6.bias"
    save_file({n: t for n, t in whole.items() if n != name}, path)
    with pytest.raises(FileError, match=r"head\.6\.bias is missing"):
        Detector.load(kept)
    save_file({**whole, name: torch.zeros(3)}, path)
    with pytest.raises(FileError, match=r"head\.6\.bias is 3, expected 2"):
        Detector.load(kept)
    save_file(whole, path)
    assert Detector.load(kept).image_shape == (1, 32, 32)


def test_what_is_no_file_of_weights_is_refused_at_once(kept: Path) -> None:
    path = kept / "detector.safetensors"
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"detector\.safetensors: .*; restore it from a copy"):
            Detector.load(kept)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileError, match="is a FIFO"):
        Detector.load(kept)


def test_a_files_shapes_are_those_of_its_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "some.safetensors")
    assert tensor_shapes(tmp_path / "some.safetensors") == {"a": (2, 3), "b": (), "c": (0,)}


@pytest.mark.parametrize(
    "encoder", ["small", "resnet18", "regnet_x_400mf", "vit_tiny_patch16_224", "tf_efficientnet_lite0"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_without_memory_are_those_of_the_network_and_draw_nothing(encoder: str, channels: int) -> None:
    given = {"channels": channels, "image_size": (64, 64), "width": 4}
    network_shapes.cache_clear()
    before = torch.get_rng_state()
    with Largest() as largest:
        shapes = network_shapes(encoder, **given)
    assert torch.equal(torch.get_rng_state(), before)
    assert largest.bytes < MEGABYTES
    network = build_network(encoder, **given)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == dict(shapes)
