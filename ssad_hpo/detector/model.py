"""A trained detector: embed images with it, score them, keep it on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.calibration import Calibrated, Calibration
from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.detector.patches import PatchDensity, PatchFit, image_scores, maps_of
from ssad_hpo.detector.transform import Transform, pseudo_anomalies
from ssad_hpo.encoder import FrozenOutputs, FrozenStages, Network, features_and_maps, map_strides
from ssad_hpo.numerics import autocast, prepare_allocator, to_float
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
        return self._unit([features for _, features, _ in self._passes(images)])

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
        rows = []
        with autocast(self.device, self.training):
            for block in self._blocks(images):
                augmented = pseudo_anomalies(to_float(block), self.augmentation, generator)
                rows.append(features_and_maps(self.network, augmented, ())[0])
            return self._unit(rows)

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

    def embed_and_score(self, images: Tensor, shared: FrozenOutputs | None = None) -> tuple[Tensor, Tensor]:
        """What `embed` and `score` give, in one pass of the encoder; the arguments are as of `look`."""
        embeddings, scores = self.look(images, shared)
        return embeddings, self.finite(self.density_score(embeddings)) if scores is None else scores

    @torch.inference_mode()
    def look(self, images: Tensor, shared: FrozenOutputs | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings, and scores unless these follow from the embeddings: `score` is "density".

        Args:
            images: (N, C, H, W) uint8 of `image_shape`.
            shared: what frozen stages make of images, with other detectors that look at the same ones.
        """
        how, patches = self.training.score, self.patches
        if how == "patches" and patches is None:
            raise ValueError(NO_PATCHES)
        strides = patches.strides if patches is not None and how == "patches" else ()
        features, scores = [], []
        for _, found, maps in self._passes(images, strides, shared):
            features.append(found)
            if strides and patches is not None:
                scores.append(image_scores(self._scored(patches, maps)))
            elif how == "classifier":
                with autocast(self.device, self.training):
                    scores.append(self.network.head(found).float().softmax(1)[:, 1].double().cpu())
        return self._unit(features), self.finite(torch.cat(scores)) if scores else None

    def finite(self, scores: Tensor) -> Tensor:
        """The scores; a DetectorError that names the hyperparameters if a diverged network spoilt them."""
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores are not finite under {self.augmentation}")
        return scores

    @torch.inference_mode()
    def heatmaps(self, images: Tensor, shared: FrozenOutputs | None = None) -> Tensor:
        """Where images are anomalous, whatever the `training.score` of the whole: distances of patches.

        Args:
            images: (N, C, H, W) uint8 of `image_shape`.
            shared: as of `look`.

        Returns:
            (N, H, W) float32 on the CPU, in standard deviations of normal images' patches with 0 as what is
            usual at a place; higher is more anomalous.

        Raises:
            ValueError: if the images are of another type or shape, or before `fit_patches`.
        """
        return maps_of(self.patch_scores(images, shared), self.image_shape[1:])

    @torch.inference_mode()
    def patch_scores(self, images: Tensor, shared: FrozenOutputs | None = None) -> Tensor:
        """What `heatmaps` is made of: (N, h, w), a value for each cell of the finest feature map."""
        if self.patches is None:
            raise ValueError(NO_PATCHES)
        passes = self._passes(images, self.patches.strides, shared)
        scores = torch.cat([self._scored(self.patches, maps) for _, _, maps in passes])
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores of patches are not finite under {self.augmentation}")
        return scores

    @property
    def normal_patch_scores(self) -> Tensor:
        """`patch_scores` (K, h, w) of normal images, which the colours of heat maps are scaled by."""
        if self.patches is None:
            raise ValueError(NO_PATCHES)
        return self.patches.normal_scores

    @torch.inference_mode()
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
        fit = self._patch_fit(train, 0 if others is None else len(others))
        for places, _, maps in self._passes(train[fit.of_train], fit.strides):
            fit.see_train(fit.of_train[places], maps)
        if others is not None:
            for places, _, maps in self._passes(others[fit.of_held_out], fit.strides):
                fit.see_held_out(fit.of_held_out[places], maps)
        self._take_patches(fit)

    @torch.inference_mode()
    def learn(self, train: Tensor, shared: FrozenOutputs | None = None) -> Tensor:
        """`embed`, and `fit_patches` where images are scored by patches, in one pass of the train images."""
        if self.training.score != "patches":
            return self._unit([features for _, features, _ in self._passes(train, (), shared)])
        fit, found = self._patch_fit(train), []
        for places, features, maps in self._passes(train, fit.strides, shared):
            fit.see_train(places, maps)
            found.append(features)
        self._take_patches(fit)
        return self._unit(found)

    def _patch_fit(self, train: Tensor, n_held_out: int = 0) -> PatchFit:
        self._check_images(train)
        strides = map_strides(self.network, to_float(train[:1].to(self.device)))
        return PatchFit(self.training.seed, strides, len(train), n_held_out)

    def _scored(self, patches: PatchDensity, maps: Sequence[Tensor]) -> Tensor:
        """Scores of patches in float32, as they were fitted, also where a user's autocast is around."""
        with torch.autocast(self.device.type, enabled=False):
            return patches.scores(maps)

    def _take_patches(self, fit: PatchFit) -> None:
        try:
            self.patches = fit.fitted()
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

    def _passes(
        self, images: Tensor, strides: Sequence[int] = (), shared: FrozenOutputs | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """Places, features and feature maps of images, a block at a time."""
        self._check_images(images)
        stages = None if shared is None else FrozenStages(self.network, self.training.precision)
        start = 0
        for block in self._blocks(images):
            places = torch.arange(start, start + len(block))
            start += len(block)
            with autocast(self.device, self.training):
                if shared is None or stages is None:
                    found = features_and_maps(self.network, to_float(block), strides)
                else:
                    found = shared.passed(stages, block, strides)
            yield places, *found

    def _unit(self, features: Sequence[Tensor]) -> Tensor:
        embeddings = F.normalize(torch.cat([each.float() for each in features]), dim=1).cpu()
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
