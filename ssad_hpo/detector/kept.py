"""The files of a detector: safetensors and JSON in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ssad_hpo.bounds import MOST_PIXELS, whole
from ssad_hpo.calibration import MOST_BYTES, take_calibration, tensors_of
from ssad_hpo.detector.model import Detector
from ssad_hpo.detector.patches import PATCHES_FILE, PatchDensity
from ssad_hpo.detector.training import untrained_network
from ssad_hpo.detector.transform import Transform
from ssad_hpo.encoder import network_shapes
from ssad_hpo.files import (
    FileError,
    read_json,
    read_tensors,
    reading,
    replaced,
    tensor_shapes,
    write_tensors,
)
from ssad_hpo.numerics import check_device
from ssad_hpo.task import Augmentation, Range, Training

_FORMAT = 1
_SETTINGS_FILE, _WEIGHTS_FILE = "detector.json", "detector.safetensors"
_HEADER_BYTES = 2**20  # of the weights' file, at most: some 100 for each tensor


def is_detector(folder: Path) -> bool:
    """Whether a folder holds a detector."""
    return (folder / _SETTINGS_FILE).is_file()


def write(detector: Detector, folder: Path) -> None:
    """What `Detector.save` does."""
    if isinstance(detector.augmentation, Transform):
        raise ValueError(f"detector: was trained with {detector.augmentation}, which no file can hold")
    if detector.mean is None or detector.whitening is None:
        raise ValueError("detector: it has no density yet; call fit_density before save")
    if detector.patches is None and detector.training.score == "patches":
        raise ValueError("detector: it has no density of patches yet; call fit_patches before save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": t.contiguous() for name, t in detector.network.state_dict().items()}
    tensors |= {"density.mean": detector.mean, "density.whitening": detector.whitening}
    tensors |= tensors_of(detector.calibration)
    settings = {
        "format": _FORMAT,
        "image_shape": list(detector.image_shape),
        "augmentation": {
            "kind": detector.augmentation.kind,
            "hyperparameters": {
                n: v if isinstance(v, int | float) else asdict(v)
                for n, v in detector.augmentation.hyperparameters.items()
            },
        },
        "training": asdict(detector.training),
    }
    write_tensors(tensors, folder / _WEIGHTS_FILE)
    if detector.patches is None:
        (folder / PATCHES_FILE).unlink(missing_ok=True)  # those of another detector
    else:
        detector.patches.save(folder)
    with replaced(folder / _SETTINGS_FILE) as partial:  # last: a folder with settings is whole
        partial.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read(folder: Path, device: str | torch.device) -> Detector:
    """What `Detector.load` does."""
    check_device(device)
    if not is_detector(folder):
        raise FileNotFoundError(f"{folder}: holds no detector (no {_SETTINGS_FILE})")
    with reading(folder, "cannot be read as a detector", "restore it from a copy, or train it again"):
        return _read(folder, device)


def _read(folder: Path, device: str | torch.device) -> Detector:
    settings = read_json(folder / _SETTINGS_FILE)
    if settings.get("format") != _FORMAT:
        found = f"format {settings['format']!r:.40}" if "format" in settings else "none"
        raise FileError(f"{folder}: expected a detector of format {_FORMAT}, found {found}")
    given = settings["augmentation"]
    augmentation = Augmentation(
        given["kind"],
        {n: Range(**v) if isinstance(v, dict) else v for n, v in given["hyperparameters"].items()},
    )
    training = Training(**settings["training"])
    channels, height, width = settings["image_shape"]
    whole("channels", channels, 1, 3)
    for name, side in (("height", height), ("width", width)):
        whole(name, side, 1, MOST_PIXELS)
    _check_shapes(folder, training, channels, (height, width))
    # All weights are in the file: none is fetched.
    # In float32, as they were written, whatever torch's default is.
    network = untrained_network(replace(training, weights="none"), (channels, height, width)).float()
    most = sum(t.nbytes for t in network.state_dict().values()) + _HEADER_BYTES + MOST_BYTES
    most += 8 * network.features * (network.features + 1)  # the density
    tensors = read_tensors(folder / _WEIGHTS_FILE, most)
    if not_finite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{not_finite[0]} has numbers that are not finite")
    mean, whitening = tensors.pop("density.mean"), tensors.pop("density.whitening")
    calibration = take_calibration(tensors)
    d = network.features
    if mean.shape != (d,) or whitening.shape != (d, d) or {mean.dtype, whitening.dtype} != {torch.float64}:
        raise ValueError(f"density: expected ({d},) and ({d}, {d}) float64 numbers")
    needed, given = network.state_dict(), {n.removeprefix("network."): t for n, t in tensors.items()}
    if other := [n for n, t in given.items() if n in needed and t.dtype != needed[n].dtype]:
        raise ValueError(f"{other[0]}: expected {needed[other[0]].dtype}, got {given[other[0]].dtype}")
    network.load_state_dict(given)
    network.eval()
    shape = channels, height, width
    patches = PatchDensity.load(folder)
    if patches is None and training.score == "patches":
        raise FileError(f"{folder}: lacks {PATCHES_FILE}, which its scores need; restore it from a copy")
    if patches is not None:
        patches.check_fit(network, shape)
    network.to(device)
    return Detector(network, augmentation, training, shape, mean, whitening, patches, calibration)


def _check_shapes(folder: Path, training: Training, channels: int, image_size: tuple[int, int]) -> None:
    """Raise ValueError if the file of weights is not of the network that the settings name.

    Asked before that is built: it takes no more memory than there are weights in the file.
    """
    found = tensor_shapes(folder / _WEIGHTS_FILE)
    needed = network_shapes(training.encoder, channels=channels, image_size=image_size, width=training.width)
    for name, shape in needed.items():
        kept = found.get(f"network.{name}")
        if kept != tuple(shape):
            other = "is missing" if kept is None else f"is {_times(kept)}, expected {_times(shape)}"
            raise ValueError(
                f"{_WEIGHTS_FILE} does not hold the network of {_SETTINGS_FILE}, whose encoder is "
                f"{training.encoder!r:.80}: {name} {other}"
            )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
