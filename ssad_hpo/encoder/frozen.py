"""What frozen stages make of images, kept for all networks that share these stages.

Candidates of a search that begin with the same pretrained weights differ above their frozen stages alone, and
so do the members of a combined detector: what lies below, two thirds of a pass through EfficientNet-Lite0 at
256 pixels, they need once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssad_hpo.encoder.maps import features_and_maps, passing
from ssad_hpo.encoder.named import NamedEncoder
from ssad_hpo.encoder.network import Network
from ssad_hpo.numerics import to_float

_MOST_BYTES = 512 * 2**20  # kept; what is beyond them passes through the stages each time
_Pass = tuple[Tensor, list[Tensor]]  # features and feature maps


class FrozenStages:
    """The stages of a network's encoder below all that moves.

    Args:
        network: in evaluation mode.
        precision: that it computes in.

    Attributes:
        modules: the largest ones that these stages consist of, by name, in order; none where all moves.
        ends: the names of those whose outputs the rest of the encoder needs: the last, and those that make
            features.
        key: tells the stages from others by their weights; empty where their outputs are not to be kept.
    """

    def __init__(self, network: Network, precision: str) -> None:
        self.network = network
        self.modules: Mapping[str, nn.Module] = _frozen_modules(network)
        features = getattr(network.encoder, "ends", ())
        last = list(self.modules)[-1:]
        self.ends = [name for name in self.modules if name in features or name in last]
        self.key = ""
        if self.modules and network.mean.device.type == "cpu":
            digest = hashlib.sha256(f"{precision} {torch.get_num_threads()}".encode())
            stages = {f"{stage}.{part}": t for stage, m in self.modules.items() for part, t in _tensors(m)}
            for name, tensor in {**stages, "mean": network.mean, "std": network.std}.items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
            self.key = digest.hexdigest()

    def whole(self, images: Tensor, strides: Sequence[int]) -> tuple[_Pass, list[Tensor]]:
        """`features_and_maps` of images, and the outputs of `ends`; none where these give no tensors."""
        outputs: list[Any] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            # Copies: what follows may compute in place.
            outputs.append(output.clone() if isinstance(output, Tensor) else None)

        with passing(self.network):
            hooks = [self.modules[name].register_forward_hook(keep) for name in self.ends]
            try:
                found = features_and_maps(self.network, images, strides)
            finally:
                for hook in hooks:
                    hook.remove()
        sound = len(outputs) == len(self.ends) and all(output is not None for output in outputs)
        return found, outputs if sound else []

    def behind(self, outputs: Sequence[Tensor], images: Tensor, strides: Sequence[int]) -> _Pass:
        """The same without the work of the stages: `ends` have these outputs, other modules what they get."""
        known = dict(zip(self.ends, outputs, strict=True))
        with passing(self.network):
            for name, module in self.modules.items():
                module.forward = _constant(known[name]) if name in known else _identity
            try:
                return features_and_maps(self.network, images, strides)
            finally:
                for module in self.modules.values():
                    del module.forward

    def follow(self, found: _Pass, outputs: Sequence[Tensor], images: Tensor, strides: Sequence[int]) -> bool:
        """Whether `behind` gives the bits that `whole` gave: not where stages do not follow each other."""
        if not outputs:
            return False
        try:
            again = self.behind(outputs, images, strides)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):  # of shapes that are none
            return False
        return all(map(torch.equal, (found[0], *found[1]), (again[0], *again[1])))


class FrozenOutputs:
    """Outputs of frozen stages on blocks of images; if other stages come, of these instead.

    A pass that takes up its images behind the stages gives the bits of a whole one: it has the same blocks,
    and the first of them is passed in both ways. Encoders for which it does not hold, whose stages do not
    follow each other, pass as a whole.

    Args:
        most_bytes: that are kept.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()  # threads may judge detectors of one task at once
        self._key = ""
        self._kept: dict[str, list[Tensor]] = {}  # by the images' content
        self._bytes = 0
        self._sound: dict[tuple[int, ...], bool] = {}  # by strides: whether passes behind are whole ones

    def passed(self, stages: FrozenStages, block: Tensor, strides: Sequence[int]) -> _Pass:
        """`features_and_maps` of a block of images, from what is kept of it if there is any.

        Args:
            stages: of the network that the images pass through.
            block: (N, C, H, W) uint8.
            strides: of the maps.
        """
        wanted, images = tuple(strides), to_float(block)
        if not stages.key:
            return features_and_maps(stages.network, images, strides)
        # By content: views share memory, and not all that changes it in place counts as a version.
        content = f"{tuple(block.shape)} {hashlib.sha256(block.contiguous().numpy().tobytes()).hexdigest()}"
        with self._lock:
            if stages.key != self._key:
                self._key, self._kept, self._bytes, self._sound = stages.key, {}, 0, {}
            kept, sound = self._kept.get(content), self._sound.get(wanted)
        if kept is not None and sound:
            return stages.behind(kept, images, strides)
        if sound is False:
            return features_and_maps(stages.network, images, strides)
        found, outputs = stages.whole(images, strides)
        sound = sound or stages.follow(found, outputs, images, strides)
        with self._lock:
            if stages.key == self._key:
                self._sound[wanted] = sound
                size = sum(output.numel() * output.element_size() for output in outputs)
                if sound and content not in self._kept and self._bytes + size <= self._most_bytes:
                    self._kept[content], self._bytes = outputs, self._bytes + size
        return found


def _frozen_modules(network: Network) -> dict[str, nn.Module]:
    """The largest modules before the first with weights that move, by their names in the encoder's model."""
    if not isinstance(network.encoder, NamedEncoder):
        return {}
    leaves = [m for m in network.encoder.model.modules() if _own(m)]
    moving = (i for i, m in enumerate(leaves) if any(parameter.requires_grad for parameter in _own(m)))
    frozen = set(leaves[: next(moving, 0)])
    found: dict[str, nn.Module] = {}

    def look(name: str, module: nn.Module) -> None:
        inside = {m for m in module.modules() if _own(m)}
        if inside and inside <= frozen:
            found[name] = module
        elif inside:
            for child, each in module.named_children():
                look(f"{name}.{child}".removeprefix("."), each)

    look("", network.encoder.model)
    return found


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _identity(images: Tensor, *others: Any) -> Tensor:
    return images


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *others: output.clone()
