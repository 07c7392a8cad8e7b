"""A trained detector: embed images with it, score them, keep it on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import augment
from ssad_hpo.encoder import Network, build_network
from ssad_hpo.numerics import autocast, check_device, seeded, to_float
from ssad_hpo.task import Augmentation, DetectorError, Range, Training

# Images embedded at once: large enough for the device, small enough for the memory at 256 pixels.
_EMBED_BATCH = 256
# Added to the seed for the augmented images of the criteria, so that they are not those of training.
_EVALUATION_STREAM = 1_000_003
_FORMAT = 1  # of the files that `save` writes
_SETTINGS_FILE, _WEIGHTS_FILE = "detector.json", "detector.safetensors"


@dataclass(frozen=True)
class Embeddings:
    """What a criterion is computed from: unit rows, (N, D) float32 on the CPU.

    Attributes:
        train, augmented, unlabeled: embeddings of `train`, of `augment(train)` and of `unlabeled`.
    """

    train: Tensor
    augmented: Tensor
    unlabeled: Tensor


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
class Detector:
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
    """

    network: Network
    augmentation: Augmentation | Transform
    training: Training
    image_shape: tuple[int, int, int]
    mean: Tensor | None = None
    whitening: Tensor | None = None

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

    def embed_task(self, train: Tensor, unlabeled: Tensor) -> Embeddings:
        """The three sets of embeddings that every criterion takes; see `embed` and `embed_augmented`."""
        return Embeddings(self.embed(train), self.embed_augmented(train), self.embed(unlabeled))

    def fit_density(self, train_embeddings: Tensor) -> None:
        """Fit the Gaussian of the anomaly score to (N, D) train embeddings (Ledoit-Wolf covariance)."""
        from sklearn.covariance import ledoit_wolf  # imported here: slow, and `import ssad_hpo` is not

        rows = train_embeddings.double()
        self.mean = rows.mean(0)
        covariance, _ = ledoit_wolf((rows - self.mean).numpy(), assume_centered=True)
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(covariance))
        if failed:
            raise DetectorError(f"collapsed: the train embeddings of {self.augmentation} have no spread")
        eye = torch.eye(len(lower), dtype=lower.dtype)
        self.whitening = torch.linalg.solve_triangular(lower, eye, upper=False).contiguous()

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
        """
        if self.training.score == "density":
            return self.density_score(self.embed(images))
        self._check_images(images)
        with autocast(self.device, self.training):
            logits = [self.network(to_float(b)).float() for b in self._blocks(images)]
        return torch.cat(logits).softmax(1)[:, 1].double().cpu()

    def save(self, folder: Path) -> None:
        """Write the detector into a folder as safetensors and JSON, whole or not at all.

        Raises:
            ValueError: if it has no density yet, or was trained with a `Transform`.
        """
        from safetensors.torch import save_file

        if isinstance(self.augmentation, Transform):
            raise ValueError(f"detector: was trained with {self.augmentation}, which no file can hold")
        if self.mean is None or self.whitening is None:
            raise ValueError("detector: it has no density yet; call fit_density before save")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{name}": t.contiguous() for name, t in self.network.state_dict().items()}
        tensors |= {"density.mean": self.mean, "density.whitening": self.whitening}
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
        save_file(tensors, partial)
        os.replace(partial, folder / _WEIGHTS_FILE)
        partial = folder / (_SETTINGS_FILE + ".partial")
        partial.write_text(json.dumps(settings, indent=2))
        os.replace(partial, folder / _SETTINGS_FILE)  # last: a folder with settings is whole

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Detector:
        """Read a detector that `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no detector.
            ValueError: if its files are of another format, or for a device that is not there.
        """
        from safetensors.torch import load_file

        check_device(device)
        if not (folder / _SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"{folder}: holds no detector (no {_SETTINGS_FILE})")
        try:
            settings = json.loads((folder / _SETTINGS_FILE).read_text())
            found = settings.get("format")
            if found == _FORMAT:
                return cls._from(settings, load_file(folder / _WEIGHTS_FILE), device)
        except Exception as error:  # of JSON, safetensors, torch, our own settings: no two alike
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{folder}: the detector is damaged ({reason[:200]}); restore it from a copy"
            ) from error
        wrong = "none" if found is None else f"format {found!r}"
        raise ValueError(f"{folder}: expected a detector of format {_FORMAT}, found {wrong}")

    @classmethod
    def _from(
        cls, settings: dict[str, Any], tensors: dict[str, Tensor], device: str | torch.device
    ) -> Detector:
        given = settings["augmentation"]
        augmentation = Augmentation(
            given["kind"],
            {n: Range(**v) if isinstance(v, dict) else v for n, v in given["hyperparameters"].items()},
        )
        training = Training(**settings["training"])
        channels, height, width = map(int, settings["image_shape"])
        # All weights are in the file: none is fetched.
        network = untrained_network(replace(training, weights="none"), (channels, height, width))
        mean, whitening = tensors.pop("density.mean"), tensors.pop("density.whitening")
        network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items()})
        if mean.shape != (network.features,) or whitening.shape != (network.features, network.features):
            raise ValueError("its density is not that of its embeddings")
        if not all(t.isfinite().all() for t in (*network.state_dict().values(), mean, whitening)):
            raise ValueError("it has numbers that are not finite")
        network.to(device).eval()
        return cls(network, augmentation, training, (channels, height, width), mean, whitening)

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
