"""A run's combined detector, and whether its unlabelled images show anything to choose by. Label-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
import torch

from ssad_hpo.calibration import Calibration
from ssad_hpo.combined import Combination, CombinedDetector, combine
from ssad_hpo.criteria import NO_EVIDENCE, p_anomalies, shifted_as_a_whole
from ssad_hpo.experiment.run_folder import Run
from ssad_hpo.search import Candidate, candidates
from ssad_hpo.task import Search


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the scores of held-out normal images say of a study.

    Attributes:
        p_anomalies: how likely unlabelled images without anomalies would look as anomalous to any candidate;
            see `criteria.p_anomalies`.
        shifted: whether the unlabelled scores of the selected candidate are shifted as a whole.
        combined: the candidates that work together, best first, and what they make of the images; None where
            that was not asked for.
        members: their trials.
    """

    p_anomalies: float
    shifted: bool
    combined: Combination | None = None
    members: tuple[int, ...] = ()

    @property
    def anomalies_seen(self) -> bool:
        """Whether some candidate sees anomalies among the unlabelled images."""
        return self.p_anomalies < NO_EVIDENCE

    @property
    def heads(self) -> bool:
        """Whether contrast heads are part of the combined detector."""
        return self.combined is not None and self.combined.head_weight > 0

    def doubts(self, word: str, selected: int) -> list[str]:
        """What makes the choice doubtful, in sentences.

        Args:
            word: what a trial is called.
            selected: number of the selected one.
        """
        told = []
        if not self.anomalies_seen:
            told.append(
                "no anomaly seen: the unlabelled images do not stand out against held-out normal ones by any "
                f"{word} (p = {self.p_anomalies:.2f}), so there is nothing to choose by"
            )
        if self.shifted:
            told.append(
                f"the unlabelled scores of {word} {selected} are higher than those of held-out images as a "
                "whole: either most are anomalies, or normal ones look different there; held-out images "
                "should come from the same days and machines"
            )
        return told

    def account(self, word: str) -> list[str]:
        """What was found and combined, in sentences."""
        told = []
        if self.anomalies_seen:
            told.append(
                "anomalies seen: unlabelled images without any would look like these with p = "
                f"{self.p_anomalies:.3f}"
            )
        if self.combined is not None:
            members = ", ".join(map(str, self.members))
            heads = (
                ", and a linear look at what sets the suspicious unlabelled images apart from held-out ones"
                if self.heads
                else ""
            )
            told.append(
                f"combined detector: the mean score of {word}s {members}, each in standard deviations of the "
                f"held-out images{heads}; it costs {len(self.members)} passes an image"
            )
        return told


def evidence_of(run: Run, study: optuna.Study, selected: Candidate) -> Evidence | None:
    """What held-out images say of a run's candidates; None where there are no such images."""
    if selected.kept(arrays_alone=True).held_out is None:
        return None
    choices, scores, held_out = candidates(study, run.artifacts), {}, {}
    for choice in choices:  # of a study of thousands, embeddings would not fit into memory together
        kept = choice.kept(arrays_alone=True)
        if kept.held_out is not None:
            scores[choice.number] = torch.from_numpy(kept.scores)
            held_out[choice.number] = torch.from_numpy(kept.held_out)
    p = p_anomalies(list(scores.values()), list(held_out.values()))
    shifted = shifted_as_a_whole(scores[selected.number], held_out[selected.number])
    search = run.settings.method
    if not isinstance(search, Search) or search.combine == 1:
        return Evidence(p, shifted)
    members = _best([choice for choice in choices if choice.number in held_out], search)
    # Heads would learn the noise that tells two sets of normal images apart.
    heads = search.contrast_heads and p < NO_EVIDENCE
    combined = combine([member.kept(arrays_alone=True) for member in members], heads=heads)
    return Evidence(p, shifted, combined, tuple(member.number for member in members))


def combined_detector(
    evidence: Evidence, choices: Sequence[Candidate], device: str | torch.device = "cpu"
) -> CombinedDetector:
    """The combined detector of a run, to score new images with.

    Raises:
        FileNotFoundError: if the detector of a member was not kept.
    """
    assert evidence.combined is not None
    by_number = {choice.number: choice for choice in choices}
    detectors = tuple(by_number[number].detector(device) for number in evidence.members)
    return CombinedDetector(detectors, evidence.combined.parts, Calibration(evidence.combined.held_out))


def _best(choices: Sequence[Candidate], search: Search) -> list[Candidate]:
    """The candidates that are combined: the lowest by the criterion, earlier ones first among equals."""
    ranked = sorted(choices, key=lambda choice: (choice.criteria[search.criterion], choice.number))
    return ranked[: search.combine]
