"""What is trained in the throughput study, what a run of it gives, and how memory is read."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.detector import resolve_precision, untrained_network
from ssad_hpo.encoder import Network
from ssad_hpo.task import PRETRAINED, Training

N_IMAGES = 256
PATCH = {"patch_area": 0.05, "patch_aspect": 1.0}  # CutPaste's angle is drawn from -45..45 degrees


@dataclass(frozen=True)
class Cell:
    """The coordinates of a measurement."""

    device: str
    encoder: str
    image_size: int
    augmentation: str

    @property
    def training(self) -> Training:
        """As searches train this encoder: the default one of folders with its weights, some stages frozen."""
        return PRETRAINED if self.encoder == PRETRAINED.encoder else Training(self.encoder)

    @property
    def batch(self) -> int:
        """Normal images a step; as many augmented ones go with them."""
        return self.training.batch_size

    def network(self) -> Network:
        return untrained_network(self.training, (3, self.image_size, self.image_size))

    def images(self) -> Tensor:
        """(N_IMAGES, 3, S, S) uint8: smooth noise. What the pictures show does not change the times."""
        coarse = torch.rand(N_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(coarse, (self.image_size, self.image_size), mode="bilinear")
        return (smooth * 255).to(torch.uint8)

    def precision(self, pipeline: str) -> str:
        if pipeline == "plain":
            return "float32"
        depthwise = self.network().depthwise
        return resolve_precision(
            self.training, torch.device(self.device), self.image_size**2, depthwise=depthwise
        )


@dataclass(frozen=True)
class Run:
    """One measured run: seconds of all its steps, the seconds of its parts, peak memory."""

    seconds: float
    parts: dict[str, float]
    peak_mib: float


def peak_mib(device: str) -> float:
    """Peak resident memory of this process, and what its DataLoader workers hold now beside it, in MiB.

    On a GPU the peak of the device's memory instead. Workers are forked and share most pages with this
    process, so only their private pages are added. Linux; elsewhere not a number.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if not Path("/proc/self/smaps_rollup").exists():
        return math.nan
    # Not getrusage's ru_maxrss, which starts with the memory of the process that started this one.
    kib = _kib(Path("/proc/self/status"), "VmHWM")
    for worker in multiprocessing.active_children():
        kib += _kib(Path(f"/proc/{worker.pid}/smaps_rollup"), "Private_")
    return kib / 1024


def _kib(path: Path, field: str) -> int:
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))
