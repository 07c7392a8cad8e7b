"""What a report shows, as frozen dataclasses; whoever gathers it needs no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssad_hpo.task import Augmentation, SearchSpace, Status


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Attributes:
        number: of the trial.
        status: only "complete" ones are candidates, which compete.
        augmentation: its static f_aug; None where the trial ended before it was drawn.
        value: the criterion after the whole budget, lower is better; None unless complete.
        curve: the criterion by training step, at each evaluation that took place.
        auc: 0..1, higher is better; None without ground truth, or unless complete.
        reason: why it was pruned, failed or interrupted; or what is wrong with a start that is complete.
    """

    number: int
    status: Status
    augmentation: Augmentation | None
    value: float | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    auc: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.status == "complete") != (self.value is not None):
            raise ValueError(f"value: expected one of a complete trial alone, got {self}")


@dataclass(frozen=True, eq=False)
class EmbeddingSets:
    """The embeddings that a trial was judged by.

    Attributes:
        trial: its number.
        train, augmented, unlabeled: (N, D) each, D >= 2.
    """

    trial: int
    train: NDArray[np.floating]
    augmented: NDArray[np.floating]
    unlabeled: NDArray[np.floating]

    def __post_init__(self) -> None:
        for name in ("train", "augmented", "unlabeled"):
            rows = getattr(self, name)
            if (
                rows.ndim != 2
                or 0 in rows.shape
                or rows.shape[1:] != self.train.shape[1:]
                or rows.shape[1] < 2
            ):
                raise ValueError(f"{name}: expected (N, D) with N >= 1, the same D >= 2, got {rows.shape}")


@dataclass(frozen=True, eq=False)
class ImageRow:
    """A few images to look at.

    Attributes:
        name: of the picture's file.
        title: what they are.
        images: (N, C, H, W) uint8, C 1 or 3.
        scores: (N,) anomaly scores, higher is more anomalous; None where they have none.
        anomalous: (N,) whether each is an anomaly; None without ground truth.
    """

    name: str
    title: str
    images: NDArray[np.uint8]
    scores: NDArray[np.floating] | None = None
    anomalous: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Spots:
    """Where an image is anomalous.

    Attributes:
        image: RGB, at its own resolution. heat: the same with its heat map over it.
        caption: its set, rank and score.
    """

    image: Image.Image
    heat: Image.Image
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """How one start of a tuning moved.

    Attributes:
        trial: its number.
        steps: (S,) training steps done at each step of the hyperparameters, rising, S >= 1; or their numbers.
        hyperparameters: for each tuned one its (S + 1,) values before these steps and after the last.
        training_loss: (S,) mean since the step before, NaN before a training.
        validation_loss: (S,) of a mini-batch.
    """

    trial: int
    steps: NDArray[np.integer]
    hyperparameters: Mapping[str, NDArray[np.floating]]
    training_loss: NDArray[np.floating]
    validation_loss: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Course:
    """The course of a tuning.

    Attributes:
        loss: name of the validation loss.
        warm_start: training steps before the hyperparameters moved.
        steps: training steps of each start, or the steps of the hyperparameters before it.
        trajectories: of the starts that are finished.
        examples: images along the way of the selected start; empty where they are not at hand.
        before: whether the hyperparameters moved before any training.
    """

    loss: str
    warm_start: int
    steps: int
    trajectories: tuple[Trajectory, ...]
    examples: tuple[ImageRow, ...] = ()
    before: bool = False


@dataclass(frozen=True)
class Decisions:
    """What is decided of the unlabelled images.

    Attributes:
        threshold: the score of the detector that decides above which images raise an alarm.
        figures: texts by heading. account: sentences.
        drifted: whether the images look unlike held-out ones as a whole.
    """

    threshold: float
    figures: Mapping[str, str]
    account: tuple[str, ...]
    drifted: bool


@dataclass(frozen=True, eq=False)
class Confirmed:
    """The best trials, trained again with other seeds.

    Attributes:
        seeds: of the trainings, the search's own first.
        values: by trial, the search's best first: the criterion with each seed, its mean and its standard
            deviation, lower is better; not finite where a training failed.
        why: what the selected trial was chosen by. account: sentences on what came of it.
    """

    seeds: tuple[int, ...]
    values: Mapping[int, tuple[float, ...]]
    why: str
    account: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Findings:
    """All that a report shows of a study.

    Attributes:
        task: name of the task.
        criterion: the key of the criterion that chose.
        space: what was searched.
        trials: every trial, in any order; the selected one is complete.
        selected: number of the chosen trial.
        settings: what the study was run with, as texts by heading.
        scores: anomaly scores of the selected detector by set: "train", "augmented", "held-out", "unlabeled";
            the last is there always.
        combined: those of the combined detector, "held-out" and "unlabeled"; empty where there is none.
        as_it_comes: whether that is the encoder as it comes, alone.
        account: sentences on what held-out images say, and on what is combined.
        best: embeddings of the selected trial. worst: of the candidate with the highest criterion; None
            if there is one candidate only.
        images: rows of images to look at; empty where the images are not at hand.
        anomalous: (N_test,) whether each unlabelled image is an anomaly; None without ground truth.
        figures: "auc_selected", "auc_oracle", "auc_random", "auc_worst", "regret" and, where defined,
            "spearman" and "auc_combined"; empty without ground truth.
        remarks: sentences about what is not shown, and why, and what to mind about the result.
        spots: the unlabelled images of the highest scores with their heat maps; empty where there are none.
        course: of a tuning, whose starts are the trials; None of a search.
        confirmed: the best trials with other seeds; None where that was not asked for.
        decisions: by the detector that the study ends with; None where no images are held out.

    Raises:
        ValueError: if the selected trial is not among the complete ones.
    """

    task: str
    criterion: str
    space: SearchSpace
    trials: tuple[Trial, ...]
    selected: int
    settings: Mapping[str, str]
    scores: Mapping[str, NDArray[np.floating]]
    best: EmbeddingSets
    worst: EmbeddingSets | None = None
    images: tuple[ImageRow, ...] = ()
    anomalous: NDArray[np.bool_] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    combined: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    account: tuple[str, ...] = ()
    spots: tuple[Spots, ...] = ()
    course: Course | None = None
    confirmed: Confirmed | None = None
    decisions: Decisions | None = None
    as_it_comes: bool = False

    def __post_init__(self) -> None:
        if self.selected not in {t.number for t in self.trials if t.status == "complete"}:
            raise ValueError(f"selected: expected a complete trial, got {self.selected}")

    @property
    def choice(self) -> Trial:
        """The selected trial."""
        return next(t for t in self.trials if t.number == self.selected)

    @property
    def oracle(self) -> Trial | None:
        """The candidate with the best AUC, of equal ones the earliest; None without ground truth."""
        judged = [t for t in self.trials if t.auc is not None]
        return min(judged, key=lambda t: (-(t.auc or 0.0), t.number), default=None)
