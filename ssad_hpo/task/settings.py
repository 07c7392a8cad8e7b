"""How a detector is trained, how a search goes, and where its trials run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ssad_hpo.bounds import (
    MOST_RATE,
    MOST_SEED,
    check_choices,
    check_real,
    check_text,
    check_whole,
    is_number,
    real,
    whole,
)
from ssad_hpo.task.space import SearchSpace

Precision = Literal["auto", "float32", "bfloat16"]
BatchNorm = Literal["train", "eval"]
Score = Literal["density", "patches", "classifier"]
Sampler = Literal["tpe", "random", "grid", "gp"]
Pruner = Literal["none", "asha", "median"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
LARGEST_GRID = 100_000
_MOST_DRAWS = 200_000_000  # images of a training, whose order is drawn at its start
PRUNERS: tuple[str, ...] = get_args(Pruner)


@dataclass(frozen=True)
class Training:
    """How one detector is trained and judged; the defaults suit two CPU cores and 64-pixel images.

    DSV (Yoo et al., ECML PKDD 2023) has `Training(encoder="resnet18", steps=10_000)` at 256 pixels.

    >>> from ssad_hpo import Training
    >>> Training(steps=400, evaluate_at=(0.25, 1)).evaluation_steps
    (100, 400)

    Attributes:
        encoder: "small" (the residual encoder of `ssad_hpo.encoder`), a torchvision classifier, a timm model.
        weights: that the encoder begins with: "none" (drawn by the seed), "pretrained" (see
            `ssad_hpo.encoder.weights`) or a file.
        frozen_stages: the encoder's first stages that stay as they are, which saves their backward pass.
        encoder_batch_norm: of a pretrained encoder's batch norms while it trains: "train" (statistics of the
            batch, running ones move) or "eval" (they stay as pretrained).
        width: channels of the small encoder's first stage; no use for torchvision encoders.
        steps: training steps.
        batch_size: normal images a step; as many augmented ones go with them.
        learning_rate, momentum, weight_decay: of SGD; the rate is annealed along a cosine to 0.
        encoder_learning_rate: of the encoder; by default that of the head, a tenth of it if it is pretrained.
        jitter: strength of the color jitter (brightness, contrast, saturation, hue).
        evaluate_at: fractions of `steps` at which criteria are computed and reported, rising; the
            last must be 1. The earlier the first, the more ASHA saves and the more often it misjudges.
        score: of an image: "density" (Mahalanobis distance of its embedding to the train ones), "patches" (of
            its most anomalous patches, for encoders with feature maps) or "classifier" (the classifier's
            probability of "augmented").
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
    weights: str = "none"
    frozen_stages: int = 0
    encoder_batch_norm: BatchNorm = "train"
    encoder_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_text(self, "encoder", "weights")
        object.__setattr__(self, "evaluate_at", tuple(self.evaluate_at))
        if self.weights not in ("none", "pretrained"):  # a file, which other directories find as well
            object.__setattr__(self, "weights", str(Path(self.weights).absolute()))
        whole_numbers = {"width": (1, 512), "steps": (1, 10_000_000), "batch_size": (2, 4096)}
        check_whole(self, {**whole_numbers, "seed": (0, MOST_SEED), "frozen_stages": (0, 1000)})
        if self.steps * self.batch_size > _MOST_DRAWS:
            raise ValueError(
                f"batch_size: expected at most {_MOST_DRAWS:,} images in all steps, got "
                f"{self.steps} * {self.batch_size}"
            )
        rates = dict.fromkeys(("learning_rate", "weight_decay"), (0, MOST_RATE))
        check_real(self, {**rates, "momentum": (0, 1), "jitter": (0, 0.5)})
        if self.encoder_learning_rate is not None:
            check_real(self, {"encoder_learning_rate": rates["learning_rate"]})
        c = self.contamination  # of 0.99, a hundred augmented images stand for each train image
        if c is not None and not (is_number(c) and 0 < c <= 0.99):
            raise ValueError(f"contamination: expected a share between 0 and 1, at most 0.99, got {c!r:.80}")
        choices = {"score": get_args(Score), "precision": get_args(Precision)}
        check_choices(self, {**choices, "encoder_batch_norm": get_args(BatchNorm)})
        ends_well = self.evaluate_at[-1:] == (1.0,) and all(is_number(share) for share in self.evaluate_at)
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


# What users' own images begin with: chosen by studies/results/pretrained.md.
PRETRAINED = Training(
    encoder="tf_efficientnet_lite0",
    weights="pretrained",
    steps=20,
    batch_size=8,
    frozen_stages=3,
    encoder_batch_norm="eval",
    score="patches",
    evaluate_at=(1.0,),  # judging costs two thirds of what all steps cost: little to stop early
)


@dataclass(frozen=True)
class Search:
    """How augmentations are proposed and one is chosen.

    >>> from ssad_hpo import Search
    >>> search = Search(space=["cutavg", "cutpaste"], n_trials=64, pruner="asha")
    >>> search.criterion, search.stopping
    ('dsv', 'asha/4')

    Attributes:
        space: what is searched; also a kind's name, several names, or a mapping as `SearchSpace` takes it.
        criterion: what is minimised and chooses, a key of `ssad_hpo.CRITERIA`.
        n_trials: how many candidates to train; with pretrained weights 0 gives their encoder as it comes.
        sampler: "tpe", "random", "grid" or "gp" (a space of one kind only).
        grid_points: values per hyperparameter of the sampler "grid".
        pruner: "none", "asha" or "median"; stops poor trials at the evaluation steps of the training.
        reduction_factor: of "asha": of the trials that are judged at a rung, the best of every so many go on.
        seed: of the sampler.
        keep: how many of the best detectors to keep; the best one by each other criterion is kept as well.
        combine: how many of the best candidates score together in the end, where there are held-out images; 1
            for none but the selected one.
        contrast_heads: whether these also look for what tells the unlabelled images from held-out ones.
        confirm: how many of the best candidates are trained again with two other seeds each, after which the
            lowest mean over seeds is chosen; 0 for none.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    space: SearchSpace = field(default_factory=lambda: SearchSpace("cutavg"))
    criterion: str = "dsv"
    n_trials: int = 16
    sampler: Sampler = "tpe"
    grid_points: int = 4
    pruner: Pruner = "none"
    # Also Optuna's and Ray's own; what it saves: studies/results/search_cost.md.
    reduction_factor: int = 4
    seed: int = 0
    keep: int = 3
    combine: int = 1
    contrast_heads: bool = True
    confirm: int = 0

    def __post_init__(self) -> None:
        space: Any = self.space
        if not isinstance(space, SearchSpace):
            object.__setattr__(self, "space", SearchSpace(space))
        check_text(self, "criterion")
        many, any_number = (1, 1_000_000), (0, 1_000_000)
        check_whole(self, {"n_trials": any_number, "grid_points": (2, 1000), "reduction_factor": (2, 1000)})
        check_whole(self, {"seed": (0, MOST_SEED), "keep": many, "combine": many, "confirm": any_number})
        if not isinstance(self.contrast_heads, bool):
            raise ValueError(f"contrast_heads: expected true or false, got {self.contrast_heads!r:.80}")
        check_choices(self, {"sampler": SAMPLERS, "pruner": PRUNERS})
        if self.sampler == "gp" and len(self.space.kinds) > 1:
            kinds = ", ".join(self.space.kinds)
            raise ValueError(
                f"sampler: 'gp' needs a space of one kind of augmentation, got {kinds}; use 'tpe'"
            )

        if self.sampler == "grid" and self.space.grid_size(self.grid_points) > LARGEST_GRID:
            raise ValueError(
                f"grid_points: expected a grid of at most {LARGEST_GRID:,} candidates, got "
                f"{self.space.grid_size(self.grid_points):.3g}; use fewer points, or another sampler"
            )

    def check_trials(self, training: Training) -> None:
        """Raise ValueError where no candidate would be judged: none is trained, and no encoder pretrained."""
        if self.n_trials == 0 and training.weights == "none":
            raise ValueError(
                "n_trials: expected a whole number >= 1, got 0, which with pretrained weights alone means "
                "something: their encoder as it comes"
            )

    @property
    def total(self) -> int:
        """How many trials there will be: n_trials, or fewer where a grid or a space without ranges ends."""
        if self.sampler == "grid" or not self.space.is_continuous:
            return min(self.n_trials, self.space.grid_size(self.grid_points))
        return self.n_trials

    @property
    def stopping(self) -> str:
        """The pruner for people: "asha/4" is successive halving with a reduction factor of 4."""
        return f"asha/{self.reduction_factor}" if self.pruner == "asha" else self.pruner


# What a search of users' own images is, where some normal ones are held out: studies/results/choice.md.
COMBINED = Search(
    space=SearchSpace(["cutout", "cutavg", "cutdiff", "cutpaste"]), criterion="shift", combine=8
)


@dataclass(frozen=True)
class Cluster:
    """Where the trials of a search run on Ray, and how many at once.

    Attributes:
        address: of a Ray cluster that this machine is a node of, "auto" or HOST:PORT; None starts a Ray on
            this machine alone.
        checkpoint_path: a folder that every node reaches, or the URI of an object store, for the checkpoints
            of the trials that run; None is a folder in the run folder.
        cpus_per_trial: processors of a trial, which gets as many threads, at least one.
        gpus_per_trial: share of a GPU; 0.25 lets four trials share one, above 0 trains on "cuda".
        max_concurrent: how many trials run at once; None is as many as fit.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    address: str | None = None
    checkpoint_path: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        check_text(self, *(n for n in ("address", "checkpoint_path") if getattr(self, n) is not None))
        real("cpus_per_trial", self.cpus_per_trial, 0, 1_000_000)
        if self.cpus_per_trial == 0:
            raise ValueError("cpus_per_trial: expected a number above 0, got 0")
        real("gpus_per_trial", self.gpus_per_trial, 0, 1024)
        if self.max_concurrent is not None:
            whole("max_concurrent", self.max_concurrent, 1, 100_000)
