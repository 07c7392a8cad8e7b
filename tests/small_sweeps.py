"""The images, the training and the search of tests of sweeps: small, and the same in all of them."""

from __future__ import annotations

import optuna

from ssad_hpo import controlled_data
from ssad_hpo.task import Search, SearchSpace, Task, Training

TRAINING = Training(steps=6, batch_size=4, width=4, evaluate_at=(0.5, 1.0), precision="float32")
SPACE = SearchSpace({"cutavg": {}, "cutout": {"patch_aspect": 1.0}})
SEARCH = Search(SPACE, sampler="random")


def small_task() -> Task:
    return controlled_data(image_size=32, n_train=16, n_unlabeled=12).task


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]
