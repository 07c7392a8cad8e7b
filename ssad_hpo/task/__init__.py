"""What is declared before anything runs: the task, the augmentation, the search space, search and training.

Nothing here draws, trains or reads a file. A `Task` holds images and no label; that every other
room is handed a `Task` is what keeps labels out of training, criteria, search and selection.
"""

from ssad_hpo.augment import Augmentation, Hyperparameters, Range
from ssad_hpo.task.images import DetectorError, Task
from ssad_hpo.task.recorder import Recorder, Status, StudyRecorder, Teller
from ssad_hpo.task.settings import (
    COMBINED,
    PRETRAINED,
    PRUNERS,
    SAMPLERS,
    Cluster,
    Precision,
    Sampler,
    Score,
    Search,
    Training,
)
from ssad_hpo.task.space import SearchSpace

__all__ = [
    "COMBINED",
    "PRETRAINED",
    "PRUNERS",
    "SAMPLERS",
    "Augmentation",
    "Cluster",
    "DetectorError",
    "Hyperparameters",
    "Precision",
    "Range",
    "Recorder",
    "Sampler",
    "Score",
    "Search",
    "SearchSpace",
    "Status",
    "StudyRecorder",
    "Task",
    "Teller",
    "Training",
]
