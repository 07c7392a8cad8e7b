"""The ways to take the training steps of several detectors: apart, or stacked in one network."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from ssad_hpo.augment import augment, jitter
from ssad_hpo.data import controlled_data
from ssad_hpo.detector import untrained_network
from ssad_hpo.encoder import Network, SmallEncoder
from ssad_hpo.task import Augmentation, Training

AREAS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25)  # of the patch, one for each detector


@dataclass(frozen=True)
class Cell:
    """The coordinates of a run: which detectors, and the way that their steps are taken.

    Attributes:
        size: of the grey images, pixels.
        precision: "float32", "bfloat16" (autocast), or "float64" for comparing ways with each other.
        way: "ordinary" (one detector), "vmap" or "grouped".
        detectors, threads, processes: how many; a process has `detectors` of its own.
        batch: normal images a step; as many augmented ones go with them.
    """

    size: int
    precision: str
    way: str
    detectors: int = 1
    threads: int = 1
    processes: int = 1
    batch: int = 32
    device: str = "cpu"


class Trainer:
    """Detectors `first`, `first + 1`, ... that take their steps together; "ordinary" has one only."""

    def __init__(self, cell: Cell, first: int = 0) -> None:
        self.cell, self.device, shape = cell, torch.device(cell.device), (1, cell.size, cell.size)
        dtype = torch.float64 if cell.precision == "float64" else torch.float32  # bf16 is autocast's
        self.settings = [Training(seed=first + k) for k in range(cell.detectors)]
        networks = [untrained_network(settings, shape).to(self.device, dtype) for settings in self.settings]
        if cell.way == "vmap":
            self.parameters, self.buffers = stack_module_state(networks)
            self.network: nn.Module = _AnyLayout(SmallEncoder(1, self.settings[0].width), 1).to("meta")
        else:
            assert cell.way == "grouped" or len(networks) == 1
            self.network = grouped(networks) if cell.way == "grouped" else networks[0]
            self.network.to(self.device, dtype).to(memory_format=torch.channels_last)
            self.parameters = dict(self.network.named_parameters())
            self.buffers = dict(self.network.named_buffers())
        rule = {name: getattr(self.settings[0], name) for name in ("momentum", "weight_decay")}
        self.optimizer = torch.optim.SGD(self.parameters.values(), self.settings[0].learning_rate, **rule)
        self.generators = [torch.Generator(self.device).manual_seed(s.seed) for s in self.settings]
        self.augmentations = [
            Augmentation("cutpaste", {"patch_area": AREAS[s.seed % len(AREAS)], "patch_aspect": 1.0})
            for s in self.settings
        ]
        train = controlled_data(image_size=cell.size, n_train=cell.batch, n_unlabeled=2).task.train
        self.batch = train.to(self.device, dtype) / 255
        self.targets = torch.arange(2, device=self.device).repeat_interleave(cell.batch)

    def step(self) -> Tensor:
        """(K,) losses."""
        pairs = []
        for k, generator in enumerate(self.generators):
            normal = jitter(self.batch, self.settings[k].jitter, generator)
            pairs.append(torch.cat([normal, augment(normal, self.augmentations[k], generator)]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cell.precision == "bfloat16"):
            logits = self.logits(torch.cat(pairs, 1))
        logits = logits.to(self.batch.dtype).flatten(0, 1)
        each = F.cross_entropy(logits, self.targets.repeat(len(pairs)), reduction="none")
        losses = each.view(len(pairs), -1).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def logits(self, images: Tensor) -> Tensor:
        """(K, N, 2) of (N, K, H, W): a channel of the images is a detector's."""
        if self.cell.way != "vmap":
            return self.network(images).unflatten(1, (-1, 2)).transpose(0, 1)
        images = images.contiguous(memory_format=torch.channels_last)
        run = torch.vmap(lambda p, b, x: functional_call(self.network, (p, b), (x,)), in_dims=(0, 0, 1))
        return run(self.parameters, self.buffers, images.unsqueeze(2))

    def state(self, k: int) -> dict[str, Tensor]:
        """Parameters and running statistics of the k-th detector."""
        both = {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items() if t.ndim}
        constant = ("mean", "std", "num_batches_tracked")
        mine = {name: t for name, t in both.items() if name.rpartition(".")[2] not in constant}
        if self.cell.way == "vmap":
            return {name: t[k] for name, t in mine.items()}
        return {name: t.chunk(self.cell.detectors)[k] for name, t in mine.items()}


class _AnyLayout(Network):
    """Under vmap, `contiguous(memory_format=...)` is not implemented."""

    def features_of(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)


class _Linears(nn.Module):
    """A linear layer for each detector: (N, K * before) -> (N, K * after)."""

    def __init__(self, one: nn.Linear, k: int) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.empty(k * one.out_features, one.in_features))
        self.bias = None if one.bias is None else nn.Parameter(torch.empty(k * one.out_features))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("nki,koi->nko", x.unflatten(1, (self.k, -1)), self.weight.unflatten(0, (self.k, -1)))
        return x.flatten(1) if self.bias is None else x.flatten(1) + self.bias


def _wide(one: nn.Conv2d, k: int) -> nn.Conv2d:
    """A convolution without a bias for each detector, as one with groups."""
    wide = copy.deepcopy(one)
    wide.in_channels, wide.out_channels, wide.groups = k * one.in_channels, k * one.out_channels, k
    wide.weight = nn.Parameter(one.weight.detach().repeat(k, 1, 1, 1))
    return wide


def grouped(networks: list[Network]) -> Network:
    """One network whose channels are those of all `networks`, side by side."""
    k, together = len(networks), copy.deepcopy(networks[0])
    for path, module in list(together.named_modules()):
        if isinstance(module, nn.Conv2d):
            wide: nn.Module = _wide(module, k)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            wide = type(module)(k * module.num_features)
        elif isinstance(module, nn.Linear):
            wide = _Linears(module, k)
        else:
            continue
        parent, _, child = path.rpartition(".")
        setattr(together.get_submodule(parent), child, wide)
    states = [network.state_dict() for network in networks]
    whole = {
        name: states[0][name] if states[0][name].shape == own.shape else torch.cat([s[name] for s in states])
        for name, own in together.state_dict().items()
    }
    together.load_state_dict(whole)
    return together
