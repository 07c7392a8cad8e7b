"""Where an image is anomalous: distances of its patches to those of train images.

The patches are cells of the encoder's feature maps, as in PaDiM (Defard et al., ICPR 2021), but a map has one
Gaussian for all places, so that images need not be aligned. studies/results/heatmaps.md compares designs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.encoder import Network, map_sizes
from ssad_hpo.files import read_tensors, write_tensors
from ssad_hpo.task import DetectorError

PATCHES_FILE = "patches.safetensors"
_MOST_IMAGES = 128  # whose patches make the density: more hardly move it, and cost time
_MOST_PATCHES = 2**14  # drawn from these
_MOST_CHANNELS = 512  # drawn from those of a map, as in PaDiM: the density grows with their square
_NORMAL_IMAGES = 64  # whose distances are kept to scale others by
_NORMAL_EVERY = 3  # of train images, where there are no others
_TOP_SHARE = 0.01  # of an image's patches, whose mean is its score
_DRAWN_AT_ONCE = 32  # images whose patches are drawn together
_MOST_BYTES = 64 * 2**20  # of a file
_LEAST_SPREAD = 1e-6  # of distances, where normal images are all the same


@dataclass(frozen=True, eq=False)
class MapDensity:
    """A Gaussian of the vectors in one feature map, and how far normal images' vectors lie from it.

    Attributes:
        channels: (D,) int64, those of the map that make a vector.
        mean, whitening: (D,) and (D, D) float32; ||whitening (v - mean)|| is a patch's distance.
        normal: (K, h, w) float32, distances in normal images, held-out ones where there were any.
    """

    channels: Tensor
    mean: Tensor
    whitening: Tensor
    normal: Tensor

    def distances(self, cells: Tensor) -> Tensor:
        """(N, h, w) float32 Mahalanobis distances of (N, C, h, w) vectors, on their device."""
        device = cells.device
        return _distances(cells[:, self.channels.to(device)], self.mean.to(device), self.whitening.to(device))

    def scaled(self, distances: Tensor) -> Tensor:
        """Distances beyond what is usual at their place, in standard deviations of normal images'.

        An encoder pads an image, so that its edges look unlike the rest of it in normal images as well.
        """
        usual = self.normal.mean(0)
        spread = (self.normal - usual).std(correction=0).clamp_min(_LEAST_SPREAD)
        return (distances - usual) / spread


@dataclass(frozen=True, eq=False)
class PatchDensity:
    """What patches of normal images look like, by the strides of the feature maps, finest first."""

    maps: dict[int, MapDensity]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the feature maps, in pixels of the image, finest first."""
        return tuple(self.maps)

    def scores(self, maps: Sequence[Tensor]) -> Tensor:
        """(N, h, w) float32, in standard deviations of normal patches, on the CPU.

        Args:
            maps: (N, C, h, w) of each stride, as `features_and_maps` gives them.
        """
        densities = zip(self.maps.values(), vectors(maps), strict=True)
        return self._joined([density.distances(cells).cpu() for density, cells in densities])

    @torch.inference_mode()
    def check_fit(self, network: Network, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError if it is not of the feature maps that a network makes of images (C, H, W)."""
        image = torch.zeros(1, *image_shape, device=network.mean.device, dtype=network.mean.dtype)
        sizes = map_sizes(network, image)
        counts = {len(density.normal) for density in self.maps.values()}
        for stride, density in self.maps.items():
            channels, *size = sizes.get(stride, (0, 0, 0))
            if list(density.normal.shape[1:]) != size or int(density.channels.max()) >= channels:
                raise ValueError(f"{PATCHES_FILE}: the encoder has no such feature map of stride {stride}")
        if len(counts) > 1:
            raise ValueError(f"{PATCHES_FILE}: expected as many normal images for each feature map")

    @property
    def normal_scores(self) -> Tensor:
        """(K, h, w), `scores` of the normal images."""
        return self._joined([density.normal for density in self.maps.values()])

    def _joined(self, distances: Sequence[Tensor]) -> Tensor:
        """The mean over feature maps, whose spread in normal images is 1 again."""
        spread = self._mean([d.normal for d in self.maps.values()]).std(correction=0)
        return self._mean(distances) / spread.clamp_min(_LEAST_SPREAD)

    def _mean(self, distances: Sequence[Tensor]) -> Tensor:
        scaled = [density.scaled(d) for density, d in zip(self.maps.values(), distances, strict=True)]
        size = scaled[0].shape[1], scaled[0].shape[2]
        finer = [F.interpolate(d[:, None], size, mode="bilinear")[:, 0] for d in scaled[1:]]
        return torch.stack([scaled[0], *finer]).mean(0)

    def save(self, folder: Path) -> None:
        """Write it beside a detector, whole or not at all."""
        tensors = {
            f"{stride}.{name}": tensor.contiguous()
            for stride, density in self.maps.items()
            for name, tensor in vars(density).items()
        }
        write_tensors(tensors, folder / PATCHES_FILE)

    @classmethod
    def load(cls, folder: Path) -> PatchDensity | None:
        """What `save` wrote; None where there is nothing. Call it under `files.reading`.

        Raises:
            ValueError: for anything else.
        """
        path = folder / PATCHES_FILE
        if not path.exists():
            return None
        kept = read_tensors(path, _MOST_BYTES)
        strides = sorted({int(name.partition(".")[0]) for name in kept})
        if not strides or any(stride not in (2**power for power in range(1, 8)) for stride in strides):
            raise ValueError(f"{PATCHES_FILE}: expected densities of feature maps")
        names = ("channels", "mean", "whitening", "normal")
        found = {s: MapDensity(*(kept[f"{s}.{name}"] for name in names)) for s in strides}
        for density in found.values():
            _check(density)
        return cls(found)


def _check(density: MapDensity) -> None:
    """Raise ValueError for tensors that do not fit together."""
    d = density.channels.numel()
    sound = d > 0 and density.channels.shape == (d,)
    sound = sound and density.mean.shape == (d,) and density.whitening.shape == (d, d)
    sound = sound and density.normal.ndim == 3 and density.normal.numel() > 0
    if not sound or density.channels.dtype != torch.int64 or int(density.channels.min()) < 0:
        raise ValueError(f"{PATCHES_FILE}: expected densities of feature maps")
    for tensor in (density.mean, density.whitening, density.normal):
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{PATCHES_FILE}: expected finite float32 numbers")


def image_scores(patch_scores: Tensor) -> Tensor:
    """(N,) float64 above 0 of (N, h, w) patch scores; higher is more anomalous.

    The mean of the highest hundredth of its patches, in standard deviations of normal patches; a softplus
    keeps it above 0, so that it has a logarithm, and changes hardly any score that counts.
    """
    flat = patch_scores.flatten(1)
    return F.softplus(flat.topk(max(1, round(_TOP_SHARE * flat.shape[1])), 1).values.mean(1)).double()


def vectors(maps: Sequence[Tensor]) -> list[Tensor]:
    """Feature vectors of patches: for each map (N, C, h, w) float32, of length 1 along C.

    Every map is averaged over 3x3 cells, so that a patch knows its surroundings; vectors get the length 1, so
    that contrast and light count less.
    """
    around = [F.avg_pool2d(cells.float(), 3, 1, 1, count_include_pad=False) for cells in maps]
    return [F.normalize(cells, dim=1) for cells in around]


class PatchFit:
    """Learns what patches of normal images look like, from their feature maps.

    The Gaussians are of at most 128 train images at even distances. Others scale distances: held-out ones, or
    every third train image for scores that are to be compared with those of held-out images.

    Args:
        seed: of the patches and channels that are drawn.
        strides: of the maps.
        n_train: train images.
        n_held_out: held-out ones; 0 where train images scale.
    """

    def __init__(self, seed: int, strides: Sequence[int], n_train: int, n_held_out: int = 0) -> None:
        self.strides = tuple(strides)
        train = torch.arange(n_train)
        density, scales = (train, torch.arange(n_held_out)) if n_held_out else _apart(train)
        self._density, self._scales = _evenly(density, _MOST_IMAGES), _evenly(scales, _NORMAL_IMAGES)
        self._of_train = not n_held_out
        self._generator = torch.Generator().manual_seed(seed)
        self._channels: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}  # drawn in each image that makes the Gaussians
        self._drawn: dict[int, list[Tensor]] = {stride: [] for stride in self.strides}
        self._normal: dict[int, list[Tensor]] = {stride: [] for stride in self.strides}

    @property
    def of_train(self) -> Tensor:
        """Places of the train images that are needed, in order."""
        return torch.cat([self._density, self._scales]).unique() if self._of_train else self._density

    @property
    def of_held_out(self) -> Tensor:
        """Places of the held-out images that are needed, in order."""
        return self._scales[:0] if self._of_train else self._scales

    def see_train(self, places: Tensor, maps: Sequence[Tensor]) -> None:
        """Take what is needed of the maps (N, C, h, w) of train images at N places, each once, in order."""
        if not self._places:
            self._draw(maps)
        own, rows = _found(self._density, places)
        for stride, cells in self._vectors(maps, rows):
            flat = cells.flatten(2)
            at = self._places[stride][own]
            chosen = flat.gather(2, at[:, None].expand(-1, flat.shape[1], -1))
            self._drawn[stride].append(chosen.transpose(1, 2).flatten(0, 1))
        if self._of_train:
            self._see_normal(places, maps)

    def see_held_out(self, places: Tensor, maps: Sequence[Tensor]) -> None:
        """The same of held-out images, after the train ones."""
        self._see_normal(places, maps)

    def fitted(self) -> PatchDensity:
        """What was learned, once all places are seen.

        Raises:
            DetectorError: if the features are not finite or have no spread.
        """
        maps = {}
        for stride in self.strides:
            patches = torch.cat(self._drawn[stride])
            if not patches.isfinite().all():
                raise DetectorError("diverged: feature maps are not finite")
            try:
                mean, whitening = fit_gaussian(patches)
            except ValueError as error:
                raise DetectorError(f"collapsed: patches of the train images {error}") from error
            mean, whitening = mean.float(), whitening.float()
            with torch.autocast("cpu", enabled=False):  # of a user's
                normal = [_distances(cells, mean, whitening) for cells in self._normal[stride]]
            maps[stride] = MapDensity(self._channels[stride], mean, whitening, torch.cat(normal))
        return PatchDensity(maps)

    def _draw(self, maps: Sequence[Tensor]) -> None:
        each = -(-_MOST_PATCHES // len(self._density))
        found: dict[int, list[Tensor]] = {stride: [] for stride in self.strides}
        for some in self._density.split(_DRAWN_AT_ONCE):
            for stride, cells in zip(self.strides, maps, strict=True):
                _, d, height, width = cells.shape
                if stride not in self._channels:
                    order = torch.randperm(d, generator=self._generator)
                    self._channels[stride] = order[:_MOST_CHANNELS].sort().values
                ranks = torch.rand(len(some), height * width, generator=self._generator)
                found[stride].append(ranks.argsort(1)[:, :each])
        self._places = {stride: torch.cat(places) for stride, places in found.items()}

    def _see_normal(self, places: Tensor, maps: Sequence[Tensor]) -> None:
        _, rows = _found(self._scales, places)
        for stride, cells in self._vectors(maps, rows):
            self._normal[stride].append(cells)

    def _vectors(self, maps: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Stride and (n, D, h, w) vectors on the CPU, of the drawn channels, of images at some rows."""
        if len(rows):
            some = vectors([cells[rows.to(cells.device)] for cells in maps])
            for stride, cells in zip(self.strides, some, strict=True):
                yield stride, cells.cpu()[:, self._channels[stride]]


def _found(wanted: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Where wanted places (rising) are among places (rising): indices into both."""
    own = torch.isin(wanted, places).nonzero()[:, 0]
    return own, torch.searchsorted(places, wanted[own])


def _distances(cells: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """(N, h, w) Mahalanobis distances of (N, D, h, w) vectors."""
    rows = cells.permute(0, 2, 3, 1) - mean
    return (rows @ whitening.T).square().sum(3).sqrt()


def _apart(train: Tensor) -> tuple[Tensor, Tensor]:
    """Train images for the Gaussians and, others where they are enough, to scale by."""
    if len(train) < 2 * _NORMAL_EVERY:
        return train, train
    scales = torch.arange(len(train)) % _NORMAL_EVERY == _NORMAL_EVERY - 1
    return train[~scales], train[scales]


def _evenly(images: Tensor, most: int) -> Tensor:
    """Images at even distances, at most so many."""
    count = min(most, len(images))
    return images[torch.arange(count) * len(images) // count]


def maps_of(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) float32 of (N, h, w) values of patches, smooth in between."""
    return F.interpolate(scores[:, None], size, mode="bicubic")[:, 0]
