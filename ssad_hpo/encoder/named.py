"""Encoders by the names of torchvision and timm, as untrained modules that give a feature vector."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STAGES = 3  # the last so many feature maps of a timm model make its features


class NamedEncoder(nn.Module):
    """An encoder that takes three channels; grey images become three equal ones.

    Attributes:
        model: torchvision's or timm's.
        features: length D of the feature vector.
        mean, std: that its pretrained weights expect images to be normalised by.
        stages: names of its modules that follow each other, as `model.named_parameters` begins with them; for
            a stage after which nothing is to move.
        ends: those whose outputs make the features.
    """

    model: nn.Module
    features: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stages: Sequence[str] = ()
    ends: Sequence[str] = ()

    def upto(self, stage: int) -> list[tuple[str, nn.Module]]:
        """The modules with weights of their own up to the end of a stage, counted from 1, in order."""
        modules, last = list(self.model.named_modules()), self.stages[stage - 1]
        (*_, end) = (i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{last}."))
        return [
            (name, m) for name, m in modules[: end + 1] if next(m.parameters(recurse=False), None) is not None
        ]


class ClassifierEncoder(NamedEncoder):
    """A torchvision classifier without its last linear layer."""

    def __init__(self, model: nn.Module, features: int) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.stages = [
            name for name, child in model.named_children() if next(child.parameters(), None) is not None
        ]
        self.ends = self.stages[-1:]

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images.expand(-1, 3, -1, -1))
        # In training, classifiers with auxiliary outputs (GoogLeNet, Inception) give these as well.
        return output if isinstance(output, Tensor) else output[0]


class StageEncoder(NamedEncoder):
    """The spatial means of the last three feature maps of a timm model, one behind the other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.features = sum(model.feature_info.channels())
        self.mean, self.std = model.default_cfg["mean"], model.default_cfg["std"]
        self.stages = _stages(model)
        self.ends = self.stages[-_STAGES:]
        self.channels_at = -1 if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else 1

    def forward(self, images: Tensor) -> Tensor:
        maps = self.model(images.expand(-1, 3, -1, -1))
        over = (1, 2) if self.channels_at == -1 else (2, 3)
        return torch.cat([each.mean(over) for each in maps], 1)


def _stages(model: Any) -> list[str]:
    """Names of a timm model's stages; none where it does not say which modules they are.

    Its description has the names of the model without `features_only`, which lists or wraps its modules.
    """
    there, found = dict(model.named_modules()), []
    for stage in model.feature_info.info:
        name = str(stage["module"])
        ways = [way for way in (name, name.replace(".", "_"), f"model.{name}") if way in there]
        if not ways:
            return []
        found.append(ways[0])
    return found


def named_encoder(name: str, image_size: tuple[int, int]) -> NamedEncoder:
    """An encoder with weights drawn from torch's global generator.

    Raises:
        ValueError: for a name that neither torchvision nor timm has, with the nearest; for one without a
            feature vector, or that cannot take images of this size.
    """
    encoder = built_encoder(name, image_size)
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = image_size
        raise ValueError(
            f"encoder: {name!r} cannot take images of {height}x{width} pixels ({error})"
        ) from error
    if not isinstance(features, Tensor) or features.shape != (2, encoder.features):
        raise ValueError(f"encoder: {name!r} gives no feature vector before its last linear layer")
    return encoder.train()


def built_encoder(name: str, image_size: tuple[int, int]) -> NamedEncoder:
    """As `named_encoder`, but that no image is tried.

    Raises:
        ValueError: for a name that neither torchvision nor timm has, or without feature maps.
    """
    # Imported here, as timm: seconds of start-up that the small encoder does not need.
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    return _of_torchvision(name) if name in known else _of_timm(name, image_size, known)


def _of_torchvision(name: str) -> NamedEncoder:
    import torchvision.models

    model = torchvision.models.get_model(name, weights=None)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"encoder: {name!r} has no last linear layer to take features from")
    path, last = linears[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return ClassifierEncoder(model, last.in_features)


def _of_timm(name: str, image_size: tuple[int, int], others: Sequence[str]) -> NamedEncoder:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, sorted({*others, *timm.list_models()}), n=3, cutoff=0.5)
        meant = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(
            f"encoder: expected 'small' or a torchvision classifier such as 'resnet18' or a timm model, "
            f"got {name!r}{meant}"
        )
    try:
        model = timm.create_model(name, pretrained=False, features_only=True, **_sized(name, image_size))
        info: Any = model.feature_info
        count = len(info.info)
        if count > _STAGES:
            last = tuple(range(count - _STAGES, count))
            model = timm.create_model(
                name, pretrained=False, features_only=True, out_indices=last, **_sized(name, image_size)
            )
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
        raise ValueError(f"encoder: {name!r} gives no feature maps ({error})") from error
    return StageEncoder(model)


def _sized(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """What tells a model that is made for one image size the size of ours."""
    import timm

    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    return {"img_size": image_size} if fixed else {}
