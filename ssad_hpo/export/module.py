"""A detector as one module: uint8 images in, scores out, everything between inside."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssad_hpo.combined import LEAST_SCORE, CombinedDetector, Part
from ssad_hpo.detector import Detector, PatchDensity, image_scores
from ssad_hpo.encoder import FrozenStages, Network, features_and_maps
from ssad_hpo.encoder.maps import passing


class ScoringModule(nn.Module):
    """What `score` of a detector computes, in float32 and without checks: for export.

    It normalises images as the encoder expects, and has the density, the contrast heads and the scales of a
    combined detector inside. It has the same scores as the detector to about 1e-5 of them where that computes
    in float32. One of precision bfloat16 rounds every layer, and its density makes more of that: of new
    images half differ by more than 0.1 to 0.4 % (small encoder) or 0.5 to 6 % (EfficientNet-Lite0), single
    ones by up to a third; train images, which the density was fitted to as they were rounded, by 8 to 15 %.

    >>> from ssad_hpo import Augmentation, Training, controlled_data
    >>> from ssad_hpo.detector import train
    >>> from ssad_hpo.export import ScoringModule
    >>> task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    >>> *_, last = train(task.train, Augmentation("cutavg"), Training(steps=8, batch_size=4, width=2))
    >>> last.detector.fit_density(last.detector.embed(task.train))
    >>> ScoringModule(last.detector)(task.unlabeled).shape
    torch.Size([14])

    Args:
        detector: with its density; it stays as it is.
    """

    def __init__(self, detector: Detector | CombinedDetector) -> None:
        super().__init__()
        self.combined = isinstance(detector, CombinedDetector)
        if isinstance(detector, CombinedDetector):
            members = zip(detector.detectors, detector.parts, strict=True)
            self.members = nn.ModuleList([_Member(each, part) for each, part in members])
            _share_weights(self.members)
        else:
            self.members = nn.ModuleList([_Member(detector)])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N,) float32 of (N, C, H, W) uint8 images; higher is more anomalous."""
        pixels = images.to(torch.float32) / 255
        seen: dict[str, list[Tensor]] = {}
        scores = [member(pixels, seen) for member in self.members]
        return torch.stack(scores).mean(0) if self.combined else scores[0]


class _Member(nn.Module):
    """One detector, and how it enters a combination."""

    mean: Tensor
    whitening: Tensor
    head: Tensor

    def __init__(self, detector: Detector, part: Part | None = None) -> None:
        super().__init__()
        if detector.mean is None or detector.whitening is None:
            raise ValueError("detector: it has no density yet; call fit_density before export")
        with passing(detector.network):  # of threads that score meanwhile
            self.network = _quick_to_trace(copy.deepcopy(detector.network).cpu().float().eval())
        self.how = detector.training.score
        self.patches: PatchDensity | None = None
        if self.how == "patches":
            if detector.patches is None:
                raise ValueError("detector: it has no density of patches yet; call fit_patches before export")
            self.patches = detector.patches
        self.strides = self.patches.strides if self.patches is not None else ()
        self.stages = None if part is None else _stages_of(self.network, detector.image_shape, self.strides)
        self.network.requires_grad_(False)
        self.register_buffer("mean", detector.mean.float())
        self.register_buffer("whitening", detector.whitening.float().T.contiguous())
        self.part = part
        if part is not None and part.head is not None:
            self.register_buffer("head", part.head.weights.float())

    def forward(self, pixels: Tensor, seen: dict[str, list[Tensor]]) -> Tensor:
        """Scores, from what frozen stages made of the images if another member has seen them."""
        if self.stages is None:
            features, maps = features_and_maps(self.network, pixels, self.strides)
        elif self.stages.key in seen:
            features, maps = self.stages.behind(seen[self.stages.key], pixels, self.strides)
        else:
            (features, maps), seen[self.stages.key] = self.stages.whole(pixels, self.strides)
        embeddings = F.normalize(features, dim=1)
        if self.patches is not None:
            scores = image_scores(self.patches.scores(maps)).float()
        elif self.how == "density":
            scores = ((embeddings - self.mean) @ self.whitening).square().sum(1).sqrt()
        else:
            scores = self.network.head(features).softmax(1)[:, 1]
        part = self.part
        if part is None:
            return scores
        total = part.scale(scores.clamp_min(LEAST_SCORE).log())
        if part.head is not None and part.head_scale is not None:
            total = total + part.head_weight * part.head_scale(embeddings @ self.head + part.head.bias)
        return total


class _Clamp(nn.Module):
    """`nn.Hardtanh` as one operator, not in place."""

    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.least, self.most = least, most

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.clamp(self.least, self.most)


def _quick_to_trace(network: Network) -> Network:
    """The network, changed to what computes the same and is exported in half the time.

    PyTorch's exporters take Hardtanh and ReLU6 apart, and compare strides of a size that they do not know for
    each operator on channels last.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Hardtanh):
            network.set_submodule(name, _Clamp(module.min_val, module.max_val))
    network.memory_format = torch.contiguous_format
    return network.to(memory_format=torch.contiguous_format)


def _stages_of(
    network: Network, image_shape: tuple[int, int, int], strides: Sequence[int]
) -> FrozenStages | None:
    """The stages that members may share; None where there are none, or none that follow each other."""
    stages = FrozenStages(network, "float32")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *image_shape, generator=generator, dtype=torch.float32)
    with torch.inference_mode():
        found, outputs = stages.whole(image, strides)
        return stages if stages.key and stages.follow(found, outputs, image, strides) else None


def _share_weights(members: Iterable[nn.Module]) -> None:
    """Let members whose frozen stages are equal have the same ones."""
    first: dict[str, FrozenStages] = {}
    for member in members:
        stages = member.stages
        if isinstance(stages, FrozenStages):
            own = first.setdefault(stages.key, stages).modules
            for name, module in own.items() if own is not stages.modules else ():
                stages.network.encoder.get_submodule("model").set_submodule(name, module)
            stages.modules = own
