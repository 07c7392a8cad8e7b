"""What Optuna keeps of a trial beside its parameters: named, written and read here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.augment import NONE
from ssad_hpo.bounds import is_number
from ssad_hpo.criteria import VALIDATION_LOSS, measured
from ssad_hpo.files import reading
from ssad_hpo.task import Augmentation, Status

# User attributes of a trial; criteria stand beside them under their own names.
_HYPERPARAMETERS = "hyperparameters"
_FAILURE = "failure"
_INTERRUPTED = "interrupted"
_LOSS = "loss"
_SECONDS = "seconds"
_BUDGET = "budget"
_ADDRESS = "artifacts"
_RETRY_OF = "retry_of"
_RAY_TRIAL = "ray_trial"
_CHECKPOINT = "checkpoint"
_START = "start"
_SIGNS = "collapse"
_IMAGES = "images"
_FROZEN = "frozen"

Attributes = dict[str, Any]


@dataclass(frozen=True)
class TrialRecord:
    """A trial of a search or a sweep, or a starting point of a tuning, as Optuna keeps it.

    Attributes:
        number: of the trial.
        status: how it ended; "running" or "waiting" before.
        augmentation: its static f_aug, in a tuning the learned one; None where it ended before that.
        reason: why it failed (by its own fault) or was interrupted (from outside); None otherwise.
        criteria: every criterion (lower is better) and the unclamped "separability", of a starting point
            also its "validation_loss"; empty unless complete.
        loss: mean cross-entropy of its last stretch of training.
        budget: training steps of a trial that ran all of them.
        address: where its scores, embeddings and detector are; see `store.open_kept`.
        curve: the criterion of the study by training step.
        repeats: number of the interrupted trial that this one repeats.
        signs: of collapse, of a starting point: sentences with their remedy.
        ray_trial: Ray's id of it in a sweep.
        checkpoint: where its last checkpoint is, for a trial that repeats it.
        seconds: of wall-clock time that it took.
        frozen: whether it is the pretrained encoder as it comes, beside which the others were drawn.
    """

    number: int
    status: Status | Literal["running", "waiting"]
    augmentation: Augmentation | None = None
    reason: str | None = None
    criteria: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    budget: int | None = None
    address: str | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    repeats: int | None = None
    signs: tuple[str, ...] = ()
    ray_trial: str | None = None
    checkpoint: str | None = None
    seconds: float | None = None
    frozen: bool = False


def read_trial(trial: FrozenTrial) -> TrialRecord:
    """What is kept of a trial."""
    kept, status = trial.user_attrs, _status(trial)
    complete = status == "complete" and _BUDGET in kept
    names = (*measured(), VALIDATION_LOSS) if complete else ()
    return TrialRecord(
        number=trial.number,
        status=status,
        augmentation=_augmentation(trial),
        reason=kept.get(_FAILURE, kept.get(_INTERRUPTED)),
        criteria={name: kept[name] for name in names if name in kept},
        loss=kept.get(_LOSS),
        budget=kept.get(_BUDGET),
        address=kept.get(_ADDRESS),
        curve=dict(sorted(trial.intermediate_values.items())),
        repeats=kept.get(_RETRY_OF),
        signs=tuple(kept.get(_SIGNS, ())),
        ray_trial=kept.get(_RAY_TRIAL),
        checkpoint=kept.get(_CHECKPOINT),
        seconds=kept.get(_SECONDS),
        frozen=is_frozen(trial),
    )


def _augmentation(trial: FrozenTrial) -> Augmentation | None:
    if is_frozen(trial):
        return Augmentation(NONE)
    drawn = trial.user_attrs.get(_HYPERPARAMETERS)
    return None if drawn is None else Augmentation(trial.params["augmentation"], drawn)


def is_frozen(trial: FrozenTrial) -> bool:
    """Whether it is the pretrained encoder as it comes, which no sampler drew and none may see."""
    return bool(trial.user_attrs.get(_FROZEN, False))


def records(study: optuna.Study) -> list[TrialRecord]:
    """What is kept of every trial of a study, in order."""
    return [_read_whole(trial, study) for trial in study.get_trials(deepcopy=False)]


def _read_whole(trial: FrozenTrial, study: optuna.Study) -> TrialRecord:
    """What is kept of a trial of a study; a complete one has all that a candidate needs."""
    where = f"study {study.study_name!r}"
    with reading(where, f"cannot be read at trial {trial.number}", "restore it from a copy, or search again"):
        read = read_trial(trial)
        if read.criteria:
            numbers = {**read.criteria, "loss": read.loss}
            wrong = [name for name, value in numbers.items() if not is_number(value)]
            if wrong or not isinstance(read.budget, int) or not isinstance(read.address, str):
                wrong = wrong or ["budget or address"]
                raise ValueError(f"expected finite numbers, got something else as {', '.join(wrong)}")
        return read


def _status(trial: FrozenTrial) -> Status | Literal["running", "waiting"]:
    match trial.state:
        case TrialState.COMPLETE:
            return "complete"
        case TrialState.PRUNED:
            return "pruned"
        case TrialState.FAIL:
            return "failed" if _FAILURE in trial.user_attrs else "interrupted"
        case TrialState.RUNNING:
            return "running"
    return "waiting"


def is_final(trial: FrozenTrial) -> bool:
    """Whether a trial need not be run (again): it has a value, was pruned, or failed by its own fault."""
    return _status(trial) in ("complete", "pruned", "failed")


def failed_by_itself(trial: FrozenTrial) -> bool:
    """Whether a failure of the trial's own was noted, be it told to Optuna yet or not."""
    return _FAILURE in trial.user_attrs


def first_attempt(trial: FrozenTrial) -> int:
    """Number of the trial that this one repeats; its own if it repeats none."""
    return int(trial.user_attrs.get(_RETRY_OF, trial.number))


def drawn(augmentation: Augmentation) -> Attributes:
    """Attributes of a trial whose parameters are drawn: the whole augmentation, fixed values included."""
    return {_HYPERPARAMETERS: dict(augmentation.hyperparameters)}


def complete(
    criteria: Mapping[str, float], *, loss: float, seconds: float, budget: int, address: str
) -> Attributes:
    """Attributes of a trial that ran its whole budget; see `TrialRecord`."""
    kept = {_LOSS: loss, _SECONDS: round(seconds, 3), _ADDRESS: address, _BUDGET: budget}
    return {**criteria, **kept}


def frozen() -> Attributes:
    """Attributes of the pretrained encoder as it comes."""
    return {_FROZEN: True}


def failed(reason: str) -> Attributes:
    """Attributes of a trial that failed by its own fault: it is not tried again."""
    return {_FAILURE: reason}


def interrupted(reason: str) -> Attributes:
    """Attributes of a trial that was stopped from outside: it is tried again on resume."""
    return {_INTERRUPTED: reason}


def repeats(first: int) -> Attributes:
    """Attributes of a trial that repeats an interrupted one."""
    return {_RETRY_OF: first}


def on_ray(ray_trial: str) -> Attributes:
    """Attributes of a trial of a sweep."""
    return {_RAY_TRIAL: ray_trial}


def checkpointed(address: str) -> Attributes:
    """Attributes of a trial that can be gone on with from a checkpoint."""
    return {_CHECKPOINT: address}


def started_at(start: Augmentation, *, seconds: float, images: int) -> Attributes:
    """Attributes of a tuning's starting point."""
    return {_START: dict(start.hyperparameters), _SECONDS: round(seconds, 3), _IMAGES: images}


def collapsed(signs: Sequence[str]) -> Attributes:
    """Attributes of a starting point with these signs of collapse."""
    return {_SIGNS: list(signs)}


def write(study: optuna.Study, trial: FrozenTrial | optuna.Trial, attributes: Attributes) -> None:
    """Keep attributes with a trial of a study, be it finished or not."""
    storage = study._storage  # `Trial.set_user_attr` needs the object that `ask` gave, which may be gone
    for name, value in attributes.items():
        storage.set_trial_user_attr(trial._trial_id, name, value)
