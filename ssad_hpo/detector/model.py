"""A trained detector: embed images with it, score them, keep it on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import augment
from ssad_hpo.bounds import MOST_PIXELS, whole
from ssad_hpo.calibration import MOST_BYTES, Calibrated, Calibration, take_calibration, tensors_of
from ssad_hpo.detector.gaussian import fit_gaussian
from ssad_hpo.encoder import Network, build_network
from ssad_hpo.files import FileError, open_regular, read_json, reading
from ssad_hpo.numerics import autocast, check_device, seeded, to_float
from ssad_hpo.task import Augmentation, DetectorError, Range, Task, Training

# Images embedded at once: large enough for the device, small enough for the memory at 256 pixels.
_EMBED_BATCH = 256
# Added to the seed for the augmented images of the criteria, so that they are not those of training.
_EVALUATION_STREAM = 1_000_003
_FORMAT = 1  # of the files that `save` writes
_SETTINGS_FILE, _WEIGHTS_FILE = "detector.json", "detector.safetensors"
_HEADER_BYTES = 2**20  # of the weights' file, at most: some 100 for each tensor


@dataclass(frozen=True)
class Embeddings:
    """What a criterion is computed from: unit rows, (N, D) float32 on the CPU.

    Attributes:
        train, augmented, unlabeled: embeddings of `train`, of `augment(train)` and of `unlabeled`.
        held_out: of held-out normal images; None where there are none.
    """

    train: Tensor
    augmented: Tensor
    unlabeled: Tensor
    held_out: Tensor | None = None


@dataclass(frozen=True)
class Transform:
    """An f_aug beyond `Augmentation`'s kinds, for experiments: any function, known by its name alone.

    Attributes:
        name: tells it from others, so it should say the function's settings too.
        function: of (N, C, H, W) float images in [0, 1] and a generator on their device; gives images of
            the same shape and range. It may draw from that generator only.
    """

    name: str
    function: Callable[[Tensor, torch.Generator], Tensor] = field(repr=False)


def pseudo_anomalies(images: Tensor, f_aug: Augmentation | Transform, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) float images in [0, 1], each changed by f_aug; all randomness is the generator's.

    Raises:
        ValueError: if a patch of an `Augmentation` does not fit the images.
    """
    if isinstance(f_aug, Transform):
        return f_aug.function(images, generator)
    return augment(images, f_aug, generator)


def untrained_network(
    training: Training, image_shape: tuple[int, int, int], device: torch.device | None = None
) -> Network:
    """The network that a training begins with, on the CPU; weights follow the training's seed.

    Raises:
        ValueError: for an encoder that is unknown, or cannot take such images, or weights that cannot be had.
    """
    channels, height, width = image_shape
    with seeded(training.seed, device):
        network = build_network(
            training.encoder,
            channels=channels,
            image_size=(height, width),
            width=training.width,
            weights=training.weights,
        )
    network.hold(training.frozen_stages, batch_norm=training.encoder_batch_norm == "eval")
    return network


@dataclass
class Detector(Calibrated):
    """A trained network with its density, and the settings that it was trained with.

    >>> from ssad_hpo import Augmentation, Training, controlled_data
    >>> from ssad_hpo.detector import train
    >>> task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    >>> *_, last = train(task.train, Augmentation("cutavg"), Training(steps=8, batch_size=4, width=2))
    >>> last.detector.fit_density(last.detector.embed(task.train))
    >>> last.detector.score(task.unlabeled).shape
    torch.Size([14])

    Attributes:
        network: encoder and head, in evaluation mode.
        augmentation, training: what it was trained with; `training.precision` is the resolved one.
        image_shape: (C, H, W) of the images that it takes.
        mean, whitening: (D,) and (D, D) float64, so that the Mahalanobis distance of an embedding z is
            ||whitening (z - mean)||; None before `fit_density`.
        calibration: what its decisions rest on; None where no normal images were held out.
    """

    network: Network
    augmentation: Augmentation | Transform
    training: Training
    image_shape: tuple[int, int, int]
    mean: Tensor | None = None
    whitening: Tensor | None = None
    calibration: Calibration | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings of images.

        Args:
            images: (N, C, H, W) uint8 of `image_shape`.

        Returns:
            (N, D) float32 on the CPU, rows of length 1.

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if the embeddings are not finite.
        """
        self._check_images(images)
        return self._embed(to_float(block) for block in self._blocks(images))

    @torch.inference_mode()
    def embed_augmented(self, images: Tensor) -> Tensor:
        """Unit embeddings of augmented copies of the train images, as the criteria need them.

        The augmented copies depend on the seed alone: they are the same at every evaluation.

        Args:
            images: (N, C, H, W) uint8, the train images.

        Returns:
            (M, D) float32 on the CPU. M = N, or ceil(c / (1 - c) * N), at least 2, with a `contamination` c.
        """
        self._check_images(images)
        count, c = len(images), self.training.contamination
        if c is not None:
            # 0.9 / (1 - 0.9) is 9.000000000000002; and a criterion needs at least two rows
            count = max(2, math.ceil(round(c / (1 - c) * count, 9)))
            images = images[torch.arange(count) % len(images)]
        generator = torch.Generator(self.device).manual_seed(self.training.seed + _EVALUATION_STREAM)
        return self._embed(
            pseudo_anomalies(to_float(block), self.augmentation, generator) for block in self._blocks(images)
        )

    def embed_task(self, task: Task) -> Embeddings:
        """The sets of embeddings that criteria take; see `embed` and `embed_augmented`."""
        return Embeddings(
            self.embed(task.train),
            self.embed_augmented(task.train),
            self.embed(task.unlabeled),
            None if task.held_out is None else self.embed(task.held_out),
        )

    def fit_density(self, train_embeddings: Tensor) -> None:
        """Fit the Gaussian of the anomaly score to (N, D) train embeddings (Ledoit-Wolf covariance)."""
        try:
            self.mean, self.whitening = fit_gaussian(train_embeddings)
        except ValueError as error:
            raise DetectorError(f"collapsed: the train embeddings of {self.augmentation} {error}") from error

    def density_score(self, embeddings: Tensor) -> Tensor:
        """Mahalanobis distances (N,) float64 of (N, D) embeddings; higher is more anomalous."""
        if self.mean is None or self.whitening is None:
            raise ValueError("detector: it has no density yet; call fit_density on the train embeddings")
        return ((embeddings.double() - self.mean) @ self.whitening.T).norm(dim=1)

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Anomaly scores (N,) float64 of (N, C, H, W) uint8 images; higher is more anomalous.

        `training.score` says which: "density" (Mahalanobis distance) or "classifier" (the probability
        of "augmented", 0..1).

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if embeddings or scores are not finite.
        """
        if self.training.score == "density":
            scores = self.density_score(self.embed(images))
        else:
            self._check_images(images)
            with autocast(self.device, self.training):
                logits = [self.network(to_float(b)).float() for b in self._blocks(images)]
            scores = torch.cat(logits).softmax(1)[:, 1].double().cpu()
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores are not finite under {self.augmentation}")
        return scores

    def save(self, folder: Path) -> None:
        """Write the detector into a folder as safetensors and JSON, whole or not at all.

        Raises:
            ValueError: if it has no density yet, or was trained with a `Transform`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if isinstance(self.augmentation, Transform):
            raise ValueError(f"detector: was trained with {self.augmentation}, which no file can hold")
        if self.mean is None or self.whitening is None:
            raise ValueError("detector: it has no density yet; call fit_density before save")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{name}": t.contiguous() for name, t in self.network.state_dict().items()}
        tensors |= {"density.mean": self.mean, "density.whitening": self.whitening}
        tensors |= tensors_of(self.calibration)
        settings = {
            "format": _FORMAT,
            "image_shape": list(self.image_shape),
            "augmentation": {
                "kind": self.augmentation.kind,
                "hyperparameters": {
                    n: v if isinstance(v, int | float) else asdict(v)
                    for n, v in self.augmentation.hyperparameters.items()
                },
            },
            "training": asdict(self.training),
        }
        partial = folder / (_WEIGHTS_FILE + ".partial")
        try:
            save_file(tensors, partial)
        except SafetensorError as error:  # what becomes of an OSError in it
            raise OSError(f"{partial}: cannot be written ({error})") from error
        os.replace(partial, folder / _WEIGHTS_FILE)
        partial = folder / (_SETTINGS_FILE + ".partial")
        partial.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        os.replace(partial, folder / _SETTINGS_FILE)  # last: a folder with settings is whole

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Detector:
        """Read a detector that `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no detector.
            ValueError: if its files are of another format, damaged, or have numbers that are not finite, or
                for a device that is not there.
        """
        check_device(device)
        if not is_detector(folder):
            raise FileNotFoundError(f"{folder}: holds no detector (no {_SETTINGS_FILE})")
        with reading(folder, "cannot be read as a detector", "restore it from a copy, or train it again"):
            return cls._read(folder, device)

    @classmethod
    def _read(cls, folder: Path, device: str | torch.device) -> Detector:
        from safetensors.torch import load

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
        # All weights are in the file: none is fetched.
        network = untrained_network(replace(training, weights="none"), (channels, height, width))
        with open_regular(folder / _WEIGHTS_FILE) as file:
            most = sum(t.nbytes for t in network.state_dict().values()) + _HEADER_BYTES + MOST_BYTES
            most += 8 * network.features * (network.features + 1)  # the density
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise ValueError(f"{_WEIGHTS_FILE} has {size} bytes, expected at most {most}")
            tensors = load(file.read())
        if not_finite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{not_finite[0]} has numbers that are not finite")
        mean, whitening = tensors.pop("density.mean"), tensors.pop("density.whitening")
        calibration = take_calibration(tensors)
        d = network.features
        if (
            mean.shape != (d,)
            or whitening.shape != (d, d)
            or {mean.dtype, whitening.dtype} != {torch.float64}
        ):
            raise ValueError(f"density: expected ({d},) and ({d}, {d}) float64 numbers")
        network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items()})
        network.to(device).eval()
        image_shape = (channels, height, width)
        return cls(network, augmentation, training, image_shape, mean, whitening, calibration)

    def _embed(self, batches: Iterator[Tensor]) -> Tensor:
        with autocast(self.device, self.training):
            features = [self.network.features_of(batch).float() for batch in batches]
        embeddings = F.normalize(torch.cat(features), dim=1).cpu()
        if not embeddings.isfinite().all():
            raise DetectorError(f"diverged: embeddings are not finite under {self.augmentation}")
        return embeddings

    def _blocks(self, images: Tensor) -> Iterator[Tensor]:
        for block in images.split(_EMBED_BATCH):
            yield block.to(self.device, non_blocking=True)

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images: expected uint8 (N, {expected}), got {images.dtype} {tuple(images.shape)}"
            )


def is_detector(folder: Path) -> bool:
    """Whether a folder holds a detector."""
    return (folder / _SETTINGS_FILE).is_file()
