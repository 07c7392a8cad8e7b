"""A descent on its way, with checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from ssad_hpo.bilevel.checkpoint import CheckpointFile
from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.bilevel.result import OuterStep


def advance(descent: Descent, file: CheckpointFile, until: int) -> Iterator[OuterStep]:
    """Every step of the hyperparameters up to a training step, with checkpoints on the way."""
    tuning = descent.problem.tuning
    for _ in warm_up(descent):
        file.progress.current = descent.state()
        file.save()
    for outer in descent.train(until=until):
        yield outer
        if len(descent.trajectory) % tuning.checkpoint_every == 0:
            file.progress.current = descent.state()
            file.save()


def warm_up(descent: Descent) -> Iterator[None]:
    """What is left of a warm start, in stretches as long as those between two checkpoints."""
    stretch = descent.problem.tuning.checkpoint_every * descent.problem.tuning.detector_steps
    while descent.step < descent.problem.warm:
        for _ in descent.train(until=min(descent.step + stretch, descent.problem.warm)):
            pass  # no step of the hyperparameters comes before the end of the warm start
        yield
