"""ST-SSAD: an augmentation's hyperparameters tuned by gradient, without labels.

`tune` runs it. The search chooses among detectors that were trained one by one; this trains one detector
for each starting point and moves its augmentation on the way, or before (ST-SSAD: Yoo et al., KDD 2025).
"""

from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.gradient import TrainingBatch, ValidationBatch, bilevel_gradient
from ssad_hpo.bilevel.result import (
    CollapseWarning,
    EndedStart,
    FailedStart,
    OuterStep,
    StoppedStart,
    TunedStart,
    TuningResult,
)
from ssad_hpo.bilevel.settings import (
    HELD_OUT_LOSSES,
    LOSSES,
    PATCHES,
    PATCHES_HELD_OUT,
    PATCHES_IN_TURN,
    PATCHES_IN_TURN_HELD_OUT,
    PATCHES_IN_TURN_TRAINING,
    Tuning,
)
from ssad_hpo.bilevel.tuning import DEFAULT_TRAINING, prepare, tune

__all__ = [
    "DEFAULT_TRAINING",
    "HELD_OUT_LOSSES",
    "LOSSES",
    "PATCHES",
    "PATCHES_HELD_OUT",
    "PATCHES_IN_TURN",
    "PATCHES_IN_TURN_HELD_OUT",
    "PATCHES_IN_TURN_TRAINING",
    "CollapseWarning",
    "Coordinates",
    "Cost",
    "EndedStart",
    "FailedStart",
    "OuterStep",
    "StoppedStart",
    "TrainingBatch",
    "TunedStart",
    "Tuning",
    "TuningResult",
    "ValidationBatch",
    "bilevel_gradient",
    "prepare",
    "tune",
]
