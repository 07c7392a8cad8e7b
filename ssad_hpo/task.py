"""What is declared before anything runs: the task, the augmentation, the search space, the training.

Nothing here draws, trains or reads a file. A `Task` holds images and no label; that every other
room is handed a `Task` is what keeps labels out of training, criteria, search and selection.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    import optuna

Hyperparameters = Mapping[str, "float | Range"]
Status = Literal["complete", "pruned", "failed", "interrupted"]


class DetectorError(RuntimeError):
    """A training gave no usable detector: it diverged, or its embeddings collapsed.

    The one error that a search survives: the trial fails with this reason, the study goes on.
    """


@dataclass(frozen=True, eq=False)
class Task:
    """Images to search on: normal ones, and an unlabelled mixture. No labels, file names or paths.

    Attributes:
        name: what the task is called in tables and tracking, e.g. "gravel/cutavg".
        train: (N_trn, C, H, W) uint8, C 1 or 3, normal images only, N_trn >= 2.
        unlabeled: (N_test, C, H, W) uint8, same C, H, W, N_test >= 2: normal images and anomalies,
            in an order that says nothing about which is which.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    name: str
    train: torch.Tensor
    unlabeled: torch.Tensor

    def __post_init__(self) -> None:
        for field_name in ("train", "unlabeled"):
            images = getattr(self, field_name)
            if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
                came = getattr(images, "dtype", type(images).__name__)
                raise ValueError(f"{field_name}: expected a uint8 tensor, got {came}")
            if images.ndim != 4 or images.shape[0] < 2 or images.shape[1] not in (1, 3):
                raise ValueError(
                    f"{field_name}: expected (N, C, H, W) with N >= 2 and C 1 or 3, got {tuple(images.shape)}"
                )
        if self.train.shape[1:] != self.unlabeled.shape[1:]:
            raise ValueError(
                f"unlabeled: expected images of train's shape {tuple(self.train.shape[1:])}, "
                f"got {tuple(self.unlabeled.shape[1:])}"
            )

    @property
    def content_hash(self) -> str:
        """64 hexadecimal digits that change when any pixel of the task does; the name is not in it."""
        digest = hashlib.sha256()
        for images in (self.train, self.unlabeled):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(images.contiguous().numpy().data.cast("B"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Range:
    """An interval low..high (both included), uniform or, with `log`, log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Range: expected finite low < high, got {self.low}..{self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"Range: a log range needs low > 0, got {self.low}")

    def at(self, fraction: float) -> float:
        """The point a fraction (0..1) of the way from low to high, on the log scale if `log`."""
        if fraction in (0, 1):  # exactly, whatever rounding does in between
            return float(self.high if fraction else self.low)
        if self.log:
            point = self.low * (self.high / self.low) ** fraction
        else:
            point = self.low + (self.high - self.low) * fraction
        return float(min(max(point, self.low), self.high))


_AREA = Range(0.002, 0.3, log=True)
_ASPECT = Range(0.3, 3.3, log=True)

# Every hyperparameter of every augmentation and its default range. Areas are fractions of the image,
# aspects are width / height, angles are degrees. CutPaste's largest area is 0.27, not 0.3: a patch fits
# at every angle only while its diagonal does, area * (aspect + 1 / aspect) <= 1.
DEFAULT_RANGES: dict[str, dict[str, Range]] = {
    "cutout": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "cutavg": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "cutpaste": {
        "patch_area": Range(0.002, 0.27, log=True),
        "patch_aspect": _ASPECT,
        "angle": Range(-45.0, 45.0),
    },
    "cutdiff": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "rotation": {"angle": Range(15.0, 180.0)},
}


@dataclass(frozen=True)
class Augmentation:
    """A kind of f_aug with its hyperparameters: numbers (static) or ranges (drawn for every image).

    Attributes:
        kind: a key of `DEFAULT_RANGES`.
        hyperparameters: a value or a `Range` for each name that the kind has; names left out become
            the kind's default range.

    Raises:
        ValueError: for an unknown kind or name, a value that is not finite, an area or aspect that is
            not positive.
    """

    kind: str
    hyperparameters: Hyperparameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = _ranges_of(self.kind)
        _reject_unknown(self.kind, self.hyperparameters)
        values = {name: self.hyperparameters.get(name, ranges[name]) for name in ranges}
        for name, value in values.items():
            low = value.low if isinstance(value, Range) else value
            if not math.isfinite(low) or (name in ("patch_area", "patch_aspect") and low <= 0):
                raise ValueError(
                    f"{self.kind}.{name}: expected a finite number"
                    f"{'' if name == 'angle' else ' above 0'}, got {low}"
                )
        object.__setattr__(self, "hyperparameters", values)

    def __str__(self) -> str:
        def show(value: float | Range) -> str:
            return f"{value.low:g}..{value.high:g}" if isinstance(value, Range) else f"{value:.4g}"

        return f"{self.kind}({', '.join(f'{k}={show(v)}' for k, v in self.hyperparameters.items())})"


def _ranges_of(kind: str) -> dict[str, Range]:
    if kind not in DEFAULT_RANGES:
        raise ValueError(f"augmentation: expected one of {', '.join(DEFAULT_RANGES)}, got {kind!r}")
    return DEFAULT_RANGES[kind]


def _reject_unknown(kind: str, names: Mapping[str, Any]) -> None:
    known = DEFAULT_RANGES[kind]
    for name in names:
        if name not in known:
            raise ValueError(f"{kind}: expected hyperparameters {', '.join(known)}, got {name!r}")


@dataclass(frozen=True)
class SearchSpace:
    """The augmentations to choose among and the ranges of their hyperparameters.

    `SearchSpace({"cutavg": {}})` searches CutAvg over its default ranges;
    `SearchSpace({"cutout": {"patch_aspect": 1.0}, "cutpaste": {}})` searches two kinds, the first with
    square patches. A kind's hyperparameters exist only where the kind is chosen (a conditional space);
    their names are "KIND.NAME", beside the parameter "augmentation".

    Attributes:
        kinds: for each kind a value or `Range` for any of its hyperparameters (default ranges for the
            others). Also accepts one kind's name, or a sequence of names.

    Raises:
        ValueError: for an empty space, an unknown kind or hyperparameter.
    """

    kinds: Mapping[str, Hyperparameters]

    def __init__(self, kinds: str | Sequence[str] | Mapping[str, Hyperparameters]) -> None:
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, Mapping):
            kinds = {kind: {} for kind in kinds}
        if not kinds:
            raise ValueError("SearchSpace: expected at least one augmentation, got none")
        whole = {kind: Augmentation(kind, given).hyperparameters for kind, given in kinds.items()}
        object.__setattr__(self, "kinds", whole)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Augmentation:
        """Draw one static augmentation through an Optuna trial (or anything with its `suggest_*`)."""
        kind = trial.suggest_categorical("augmentation", list(self.kinds))
        values = {
            name: trial.suggest_float(f"{kind}.{name}", value.low, value.high, log=value.log)
            if isinstance(value, Range)
            else value
            for name, value in self.kinds[kind].items()
        }
        return Augmentation(kind, values)

    def augmentation(self, params: Mapping[str, Any]) -> Augmentation:
        """The static augmentation that drawn parameters ("augmentation", "KIND.NAME") stand for."""
        kind = params["augmentation"]
        fixed = {n: v for n, v in self.kinds[kind].items() if not isinstance(v, Range)}
        drawn = {n: params[f"{kind}.{n}"] for n in self.kinds[kind] if n not in fixed}
        return Augmentation(kind, {**fixed, **drawn})

    def grid(self, points: int) -> list[dict[str, Any]]:
        """Every combination of `points` values per range (ends included), kind by kind, no doubles."""
        if points < 2:
            raise ValueError(f"points: expected at least 2 values per hyperparameter, got {points}")
        candidates = []
        for kind, hyperparameters in self.kinds.items():
            ranges = {f"{kind}.{n}": v for n, v in hyperparameters.items() if isinstance(v, Range)}
            axes = [[r.at(i / (points - 1)) for i in range(points)] for r in ranges.values()]
            for values in itertools.product(*axes):
                candidates.append({"augmentation": kind, **dict(zip(ranges, values, strict=True))})
        return candidates

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers; `from_json` gives the same space back."""
        return {
            kind: {n: asdict(v) if isinstance(v, Range) else v for n, v in values.items()}
            for kind, values in self.kinds.items()
        }

    @classmethod
    def from_json(cls, kinds: Mapping[str, Mapping[str, Any]]) -> SearchSpace:
        """The space that `to_json` wrote."""
        return cls(
            {
                kind: {n: Range(**v) if isinstance(v, Mapping) else float(v) for n, v in values.items()}
                for kind, values in kinds.items()
            }
        )


Precision = Literal["auto", "float32", "bfloat16"]
Score = Literal["density", "classifier"]


@dataclass(frozen=True)
class Training:
    """How one detector is trained and judged; the defaults suit two CPU cores and 64-pixel images.

    The paper's own scale [2] is `Training(encoder="resnet18", steps=10_000)` at 256 pixels.

    Attributes:
        encoder: "small" (the residual encoder of `ssad_hpo.encoder`) or a torchvision classifier.
        width: channels of the small encoder's first stage; no use for torchvision encoders.
        steps: training steps.
        batch_size: normal images a step; as many augmented ones go with them.
        learning_rate, momentum, weight_decay: of SGD; the rate is annealed along a cosine to 0.
        jitter: strength of the color jitter (brightness, contrast, saturation, hue).
        evaluate_at: fractions of `steps` at which criteria are computed and reported, rising; the
            last must be 1. The earlier the first, the more ASHA saves and the more often it misjudges.
        score: "density" (Mahalanobis distance to the train embeddings) or "classifier" (the
            classifier's probability of "augmented").
        contamination: None for as many augmented evaluation images as train ones, or the share c of
            anomalies that the user believes in: then ceil(c / (1 - c) * N_trn).
        precision: "float32", "bfloat16" (autocast) or "auto" (chosen from machine and image size).
        seed: of initial weights, batches and augmentation draws. All trials of a study share it, so
            that candidates differ by their hyperparameters alone, and the same hyperparameters always
            give the same detector.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    encoder: str = "small"
    width: int = 16
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 3e-5  # the published DSV code's
    jitter: float = 0.1
    evaluate_at: tuple[float, ...] = (0.125, 0.5, 1.0)
    score: Score = "density"
    contamination: float | None = None
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluate_at", tuple(self.evaluate_at))
        whole = {"width": 1, "steps": 1, "batch_size": 2, "seed": 0}
        for name, least in whole.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "momentum", "weight_decay", "jitter"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)!r}")
        if self.jitter > 0.5:
            raise ValueError(f"jitter: expected 0..0.5, got {self.jitter}")
        if self.contamination is not None and not 0 < self.contamination < 1:
            raise ValueError(f"contamination: expected a share between 0 and 1, got {self.contamination}")
        for name, choices in (("score", Score), ("precision", Precision)):
            if getattr(self, name) not in choices.__args__:  # type: ignore[attr-defined]
                known = ", ".join(choices.__args__)  # type: ignore[attr-defined]
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        ends_well = self.evaluate_at[-1:] == (1.0,) and all(map(math.isfinite, self.evaluate_at))
        steps = self.evaluation_steps if ends_well else ()
        if not steps or steps[0] < 1 or sorted(set(steps)) != list(steps):
            raise ValueError(
                f"evaluate_at: expected rising fractions of the {self.steps} steps that end with 1, "
                f"got {self.evaluate_at}; give other fractions or more steps"
            )

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """The training steps after which criteria are computed; the last is `steps`."""
        return tuple(round(fraction * self.steps) for fraction in self.evaluate_at)


class Recorder(Protocol):
    """Hears what happens in a search or a tuning. It answers nothing and may not hold the work up.

    `trial` is the trial's key, unique within the study and the same after a resume.
    """

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A trial begins: its parameters, and tags such as the kind of augmentation."""

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        """Finite or not, the values of criteria and losses after a training step."""

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        """A trial is over; `reason` says why when it failed."""
