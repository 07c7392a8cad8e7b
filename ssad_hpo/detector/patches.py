"""Where an image is anomalous: distances of its patches to those of train images.

The patches are cells of the encoder's feature maps, as in PaDiM (Defard et al., ICPR 2021), but with one
Gaussian for all places, so that images need not be aligned. studies/results/heatmaps.md compares designs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.encoder import Network, feature_maps, map_strides
from ssad_hpo.files import open_regular
from ssad_hpo.numerics import autocast, to_float
from ssad_hpo.task import DetectorError, Training

PATCHES_FILE = "patches.safetensors"
_MOST_IMAGES = 256  # whose patches make the density: more hardly move it, and cost time
_MOST_PATCHES = 2**14  # drawn from these
_MOST_CHANNELS = 512  # drawn from those of the maps, as in PaDiM: the density grows with their square
_NORMAL_IMAGES = 64  # whose maps are kept to scale others by
_BATCH = 32
_MOST_BYTES = 64 * 2**20  # of a file


@dataclass(frozen=True, eq=False)
class PatchDensity:
    """A Gaussian of feature vectors of train patches, and how far normal images' patches lie from it.

    Attributes:
        strides: of the feature maps, finest first, in pixels.
        channels: (D,) int64, which of the maps' channels, one map behind the other, make a vector.
        mean, whitening: (D,) and (D, D) float32; ||whitening (v - mean)|| is a patch's distance.
        normal: (K, h, w) float32, distances in normal images, held-out ones where there were any.
    """

    strides: tuple[int, ...]
    channels: Tensor
    mean: Tensor
    whitening: Tensor
    normal: Tensor

    def distances(self, network: Network, images: Tensor, training: Training) -> Tensor:
        """(N, h, w) float32 Mahalanobis distances of patches of (N, C, H, W) uint8 images, on the CPU."""
        blocks = vectors(network, images, training, self.strides, self.channels)
        return torch.cat([self._of_vectors(block) for block in blocks])

    def _of_vectors(self, block: Tensor) -> Tensor:
        rows = block.permute(0, 2, 3, 1) - self.mean.to(block.device)
        return (rows @ self.whitening.to(block.device).T).norm(dim=3).cpu()

    def scaled(self, distances: Tensor) -> Tensor:
        """Distances in standard deviations of normal images', 0 at their mean."""
        return (distances - self.normal.mean()) / self.normal.std(correction=0).clamp_min(1e-6)

    def save(self, folder: Path) -> None:
        """Write it beside a detector, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {"channels": self.channels, "mean": self.mean, "whitening": self.whitening}
        tensors |= {"normal": self.normal, "strides": torch.tensor(self.strides)}
        partial = folder / (PATCHES_FILE + ".partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        except SafetensorError as error:  # what becomes of an OSError in it
            raise OSError(f"{partial}: cannot be written ({error})") from error
        os.replace(partial, folder / PATCHES_FILE)

    @classmethod
    def load(cls, folder: Path) -> PatchDensity | None:
        """What `save` wrote; None where there is nothing. Call it under `files.reading`.

        Raises:
            ValueError: for anything else.
        """
        from safetensors.torch import load

        path = folder / PATCHES_FILE
        if not path.exists():
            return None
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
                raise ValueError(f"{PATCHES_FILE} has {size} bytes, expected at most {_MOST_BYTES}")
            kept = load(file.read())
        channels, mean, whitening, normal = (kept[n] for n in ("channels", "mean", "whitening", "normal"))
        d = len(channels)
        sound = mean.shape == (d,) and whitening.shape == (d, d) and normal.ndim == 3 and normal.numel()
        sound = sound and channels.dtype == torch.int64 and int(channels.min()) >= 0
        strides = tuple(kept["strides"].tolist())
        if not sound or any(stride not in (2**power for power in range(1, 8)) for stride in strides):
            raise ValueError(f"{PATCHES_FILE}: expected a density of patches")
        for name, tensor in (("mean", mean), ("whitening", whitening), ("normal", normal)):
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f"{PATCHES_FILE}: {name}: expected finite float32 numbers")
        return cls(strides, channels, mean, whitening, normal)


@torch.inference_mode()
def vectors(
    network: Network,
    images: Tensor,
    training: Training,
    strides: tuple[int, ...],
    channels: Tensor | None = None,
) -> Iterator[Tensor]:
    """Feature vectors of patches, some images at a time.

    Every map is averaged over 3x3 cells, so that a patch knows its surroundings; vectors get the length 1, so
    that contrast and light count less; and all are brought to the resolution of the finest.

    Yields:
        (n, D, h, w) float32 on the network's device.
    """
    device = network.mean.device
    for batch in images.split(_BATCH):
        with autocast(device, training):
            maps = feature_maps(network, to_float(batch.to(device)), strides)
        size = maps[0].shape[2:]
        smooth = [F.normalize(F.avg_pool2d(m.float(), 3, 1, 1, count_include_pad=False), dim=1) for m in maps]
        every = [smooth[0], *(F.interpolate(m, size, mode="bilinear") for m in smooth[1:])]
        whole = torch.cat(every, 1)
        yield whole if channels is None else whole[:, channels.to(device)]


@torch.inference_mode()
def fit_patches(
    network: Network, training: Training, train: Tensor, held_out: Tensor | None = None
) -> PatchDensity:
    """Fit the Gaussian of patches.

    Args:
        network: in evaluation mode.
        training: of the detector; its seed draws patches and channels.
        train: (N, C, H, W) uint8 normal images, of which 256 are taken at even distances.
        held_out: normal images that the network was not trained on, to scale maps by; else train ones.

    Raises:
        ValueError: for an encoder without feature maps.
        DetectorError: if the features are not finite or have no spread.
    """
    generator = torch.Generator().manual_seed(training.seed)
    device = network.mean.device
    strides = map_strides(network, to_float(train[:1].to(device)))
    some = _evenly(train, _MOST_IMAGES)
    rows, each = [], -(-_MOST_PATCHES // len(some))
    channels: Tensor | None = None
    for block in vectors(network, some, training, strides):
        count, d, height, width = block.shape
        if channels is None:
            channels = torch.randperm(d, generator=generator)[:_MOST_CHANNELS].sort().values
        places = torch.rand(count, height * width, generator=generator).argsort(1)[:, :each]
        flat = block[:, channels.to(device)].flatten(2).cpu()
        rows.append(
            flat.gather(2, places[:, None].expand(-1, len(channels), -1)).transpose(1, 2).flatten(0, 1)
        )
    assert channels is not None
    patches = torch.cat(rows)
    if not patches.isfinite().all():
        raise DetectorError("diverged: feature maps are not finite")
    try:
        mean, whitening = fit_gaussian(patches)
    except ValueError as error:
        raise DetectorError(f"collapsed: patches of the train images {error}") from error
    density = PatchDensity(strides, channels, mean.float(), whitening.float(), torch.zeros(1, 1, 1))
    normal = _evenly(train if held_out is None else held_out, _NORMAL_IMAGES)
    return PatchDensity(
        strides, channels, density.mean, density.whitening, density.distances(network, normal, training)
    )


def _evenly(images: Tensor, most: int) -> Tensor:
    """Images at even distances, at most so many."""
    count = min(most, len(images))
    return images[torch.arange(count) * len(images) // count]


def maps_of(distances: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) float32 of (N, h, w) values of patches, smooth in between."""
    return F.interpolate(distances[:, None], size, mode="bicubic")[:, 0]
