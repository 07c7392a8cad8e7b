"""A per-image pipeline as such code is usually written: PIL images, a DataLoader, float32."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from studies.throughput.cell import PATCH, Cell, Run, peak_mib

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainImages(Dataset[tuple[Tensor, Tensor]]):
    """The usual data set: one decoded PIL image at a time is jittered, augmented, made a tensor."""

    def __init__(self, images: list[Image.Image], augmentation: str) -> None:
        self.images = images
        self.augment = PIL_AUGMENTATIONS[augmentation]
        self.jitter = transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)
        self.to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        normal = self.jitter(self.images[index])
        augmented = self.augment(normal.copy())
        return self.to_tensor(normal), self.to_tensor(augmented)


def pil_box(image: Image.Image) -> tuple[int, int, int, int]:
    side = round(PATCH["patch_area"] ** 0.5 * image.width)
    left, top = random.randint(0, image.width - side), random.randint(0, image.height - side)
    return left, top, left + side, top + side


def pil_cutout(image: Image.Image) -> Image.Image:
    image.paste((0, 0, 0), pil_box(image))
    return image


def pil_cutavg(image: Image.Image) -> Image.Image:
    box = pil_box(image)
    grey = round(float(np.asarray(image.crop(box)).mean()))
    image.paste((grey, grey, grey), box)
    return image


def pil_cutpaste(image: Image.Image) -> Image.Image:
    patch = image.crop(pil_box(image)).convert("RGBA").rotate(random.uniform(-45, 45), expand=True)
    place = random.randint(0, image.width - patch.width), random.randint(0, image.height - patch.height)
    image.paste(patch, place, mask=patch)
    return image


PIL_AUGMENTATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "cutout": pil_cutout,
    "cutavg": pil_cutavg,
    "cutpaste": pil_cutpaste,
}


def run_plain(cell: Cell, images: Tensor, steps: int, workers: int) -> Run:
    """Train for one step of warm-up and `steps` measured ones: float32, contiguous, loss.item()."""
    settings, count = cell.training, cell.batch
    dataset = PlainImages([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], cell.augmentation)
    # Drawn with replacement and a little more than needed: no epoch ends while the clock runs, so the
    # plain pipeline is spared the restart of its workers, and they always have a next batch to make.
    drawn = (1 + steps + 2 * workers + 1) * count
    loader = DataLoader(
        dataset,
        batch_size=count,
        sampler=RandomSampler(dataset, replacement=True, num_samples=drawn),
        num_workers=workers,
        pin_memory=cell.device == "cuda",
    )
    network = cell.network().to(cell.device).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1 + steps)
    targets = torch.tensor([0] * count + [1] * count, device=cell.device)
    batches = iter(loader)
    waited = total_loss = 0.0
    for step in range(1 + steps):
        if step == 1:
            started, waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        normal, augmented = next(batches)
        waited += time.perf_counter() - asked
        batch = torch.cat([normal, augmented]).to(cell.device)
        # Not network(batch): that would normalise again and make the batch channels-last.
        logits = network.head(network.encoder(batch))
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total_loss += loss.item()
    seconds = time.perf_counter() - started
    parts = {"waiting for data": waited, "copy, forward, backward, optimiser": seconds - waited}
    return Run(seconds, parts, peak_mib(cell.device))
