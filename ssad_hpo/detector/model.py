"""A trained detector: embed images with it, score them, keep it on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import augment
from ssad_hpo.calibration import Calibrated, Calibration
from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.detector.patches import PatchDensity, fit_patches, image_scores, maps_of
from ssad_hpo.encoder import Network, build_network, features_and_maps, map_strides
from ssad_hpo.numerics import autocast, prepare_allocator, seeded, to_float
from ssad_hpo.task import Augmentation, DetectorError, Training

# Images embedded at once, of 64 x 64 pixels; fewer of larger ones, so that they take the same memory.
_EMBED_BATCH = 256
_EMBED_PIXELS = _EMBED_BATCH * 64 * 64
# Added to the seed for the augmented images of the criteria, so that they are not those of training.
_EVALUATION_STREAM = 1_000_003
NO_PATCHES = (
    "detector: it has no density of patches, which heat maps need; call fit_patches with its train images, "
    "or name the run that it comes from (ssad-hpo score RUN --heatmaps)"
)


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
        ValueError: for an encoder that is unknown, cannot take such images, or lacks the feature maps that
            scores of patches are made of; or weights that cannot be had.
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
    if training.score == "patches":
        with torch.inference_mode():
            map_strides(network.eval(), torch.zeros(1, *image_shape))
        network.train()
    network.hold(training.frozen_stages, batch_norm=training.encoder_batch_norm == "eval")
    return network


@dataclass(repr=False)
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
        patches: what scores of patches and heat maps need; None before `fit_patches`.
        calibration: what its decisions rest on; None where no normal images were held out.
    """

    network: Network
    augmentation: Augmentation | Transform
    training: Training
    image_shape: tuple[int, int, int]
    mean: Tensor | None = None
    whitening: Tensor | None = None
    patches: PatchDensity | None = None
    calibration: Calibration | None = None

    def __repr__(self) -> str:
        size, weights = " x ".join(map(str, self.image_shape)), self.training.weights
        begun = "" if weights == "none" else ", pretrained"
        return f"Detector({self.augmentation}, {self.training.encoder} encoder{begun}, {size} images)"

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

        `training.score` says which: "density" (Mahalanobis distance of the whole image), "patches" (what is
        most anomalous in it, in standard deviations of normal patches) or "classifier" (the probability of
        "augmented", 0..1).

        Raises:
            ValueError: if the images are of another type or shape, or the density that it needs is lacking.
            DetectorError: if embeddings or scores are not finite.
        """
        return self.embed_and_score(images)[1]

    def embed_and_score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `embed` and `score` give, in one pass of the encoder."""
        embeddings, scores = self.look(images)
        return embeddings, self.finite(self.density_score(embeddings)) if scores is None else scores

    @torch.inference_mode()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings, and scores unless these follow from the embeddings: `score` is "density"."""
        self._check_images(images)
        how, patches = self.training.score, self.patches
        if how == "patches" and patches is None:
            raise ValueError(NO_PATCHES)
        if how == "density":
            return self.embed(images), None
        features, scores = [], []
        for block in self._blocks(images):
            if patches is not None and how == "patches":
                with autocast(self.device, self.training):
                    found, maps = features_and_maps(self.network, to_float(block), patches.strides)
                scores.append(image_scores(patches.scores(maps)))  # float32, as they were fitted
            else:
                with autocast(self.device, self.training):
                    found = self.network.features_of(to_float(block))
                    scores.append(self.network.head(found).float().softmax(1)[:, 1].double().cpu())
            features.append(found.float())
        return self._unit(torch.cat(features)), self.finite(torch.cat(scores))

    def finite(self, scores: Tensor) -> Tensor:
        """The scores; a DetectorError that names the hyperparameters if a diverged network spoilt them."""
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores are not finite under {self.augmentation}")
        return scores

    @torch.inference_mode()
    def heatmaps(self, images: Tensor) -> Tensor:
        """Where images are anomalous, whatever the `training.score` of the whole: distances of patches.

        Args:
            images: (N, C, H, W) uint8 of `image_shape`.

        Returns:
            (N, H, W) float32 on the CPU, in standard deviations of normal images' patches with 0 as what is
            usual at a place; higher is more anomalous.

        Raises:
            ValueError: if the images are of another type or shape, or before `fit_patches`.
        """
        return maps_of(self.patch_scores(images), self.image_shape[1:])

    @torch.inference_mode()
    def patch_scores(self, images: Tensor) -> Tensor:
        """What `heatmaps` is made of: (N, h, w), a value for each cell of the finest feature map."""
        self._check_images(images)
        if self.patches is None:
            raise ValueError(NO_PATCHES)
        found = []
        for block in self._blocks(images):
            with autocast(self.device, self.training):
                _, maps = features_and_maps(self.network, to_float(block), self.patches.strides)
            found.append(self.patches.scores(maps))
        scores = torch.cat(found)
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores of patches are not finite under {self.augmentation}")
        return scores

    @property
    def normal_patch_scores(self) -> Tensor:
        """`patch_scores` (K, h, w) of normal images, which the colours of heat maps are scaled by."""
        if self.patches is None:
            raise ValueError(NO_PATCHES)
        return self.patches.normal_scores

    def fit_patches(self, train: Tensor, held_out: Tensor | None = None) -> None:
        """Learn what patches of normal images look like, as scores of patches and `heatmaps` need it.

        Args:
            train: (N, C, H, W) uint8 normal images.
            held_out: normal images that the network was not trained on, to scale heat maps by. They have no
                part in scores of patches, which are compared with their own.

        Raises:
            ValueError: for an encoder without feature maps.
            DetectorError: if the features are not finite or have no spread; it names the hyperparameters.
        """
        others = None if self.training.score == "patches" else held_out
        try:
            self.patches = fit_patches(self.network, self.training, train, others)
        except DetectorError as error:
            raise DetectorError(f"{error} under {self.augmentation}") from error

    def save(self, folder: Path) -> None:
        """Write the detector into a folder as safetensors and JSON, whole or not at all.

        Raises:
            ValueError: if it has no density yet, or was trained with a `Transform`.
        """
        from ssad_hpo.detector.kept import write

        write(self, folder)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Detector:
        """Read a detector that `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no detector.
            ValueError: if its files are of another format, damaged, or have numbers that are not finite, or
                for a device that is not there.
        """
        from ssad_hpo.detector.kept import read

        return read(folder, device)

    def _embed(self, batches: Iterator[Tensor]) -> Tensor:
        with autocast(self.device, self.training):
            features = [self.network.features_of(batch).float() for batch in batches]
        return self._unit(torch.cat(features))

    def _unit(self, features: Tensor) -> Tensor:
        embeddings = F.normalize(features, dim=1).cpu()
        if not embeddings.isfinite().all():
            raise DetectorError(f"diverged: embeddings are not finite under {self.augmentation}")
        return embeddings

    def _blocks(self, images: Tensor) -> Iterator[Tensor]:
        _, height, width = self.image_shape
        prepare_allocator(self.device, height * width)
        for block in images.split(min(max(_EMBED_PIXELS // (height * width), 8), _EMBED_BATCH)):
            yield block.to(self.device, non_blocking=True)

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images: expected uint8 (N, {expected}), got {images.dtype} {tuple(images.shape)}"
            )
