"""A run's combined detector, and whether its unlabelled images show anything to choose by. Label-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import optuna
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.bilevel import Tuning
from ssad_hpo.calibration import Calibration
from ssad_hpo.combined import Combination, CombinedDetector, can_be_combined, combine
from ssad_hpo.criteria import CRITERIA, NO_EVIDENCE, p_anomalies, shifted_as_a_whole
from ssad_hpo.experiment.run_folder import Run
from ssad_hpo.search import Candidate, candidates, keeps_detector, ranked
from ssad_hpo.task import Search

_DRAWN_AT_RANDOM = 10  # trials that TPE and GP begin with


@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
    """What the scores of held-out normal images say of a study.

    Attributes:
        p_anomalies: how likely unlabelled images without anomalies would look as anomalous to any candidate;
            see `criteria.p_anomalies`.
        shifted: whether the unlabelled scores of the selected candidate are shifted as a whole.
        combined: the candidates that work together, best first, and what they make of the images; None where
            that was not asked for. Where no anomaly is seen nothing speaks for one candidate or another: the
            encoder as it comes, if it is among them, then stands alone.
        members: their trials.
        as_it_comes: whether it does.
        fitted: whether the candidates were tuned, or went on, by how these very images score: then
            p_anomalies, which knows of the finished ones alone, is lower than it should be.
    """

    p_anomalies: float
    shifted: bool
    combined: Combination | None = None
    members: tuple[int, ...] = ()
    as_it_comes: bool = False
    fitted: bool = False

    def __repr__(self) -> str:
        seen = "anomalies seen" if self.anomalies_seen else "no anomaly seen"
        shifted = ", shifted as a whole" if self.shifted else ""
        alone = f"; {self.members[0]} alone, the encoder as it comes" if self.as_it_comes else ""
        combined = f"; combined of {', '.join(map(str, self.members))}" if self.members else ""
        return f"Evidence({seen}, p = {self.p_anomalies:.3f}{shifted}{alone or combined})"

    def _repr_html_(self) -> str:
        """Its sentences, for notebooks."""
        told = [*self.account("trial"), *(["no anomaly seen"] if not self.anomalies_seen else [])]
        return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in told)}</ul>"

    @property
    def anomalies_seen(self) -> bool:
        """Whether some candidate sees anomalies among the unlabelled images."""
        return self.p_anomalies < NO_EVIDENCE

    @property
    def heads(self) -> bool:
        """Whether contrast heads are part of the combined detector."""
        return self.combined is not None and self.combined.head_weight > 0

    def doubts(self, word: str, selected: int) -> list[str]:
        """What makes the choice doubtful, in sentences."""
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
        told: list[str] = []
        how = "tuned" if word == "start" else "proposed"
        if self.anomalies_seen:
            told.append(
                "anomalies seen: unlabelled images without any would look like these with p = "
                f"{self.p_anomalies:.3f}"
                + (
                    f", or somewhat more often, since {word}s were {how} by these images"
                    if self.fitted
                    else ""
                )
            )
        if self.as_it_comes:
            told.append(
                f"images are scored by {word} {self.members[0]}, the encoder as it comes: without anomalies "
                f"to be seen nothing speaks for another {word}, or for several"
            )
        elif self.combined is not None:
            *others, last = map(str, self.members)
            whose = (
                f"mean score of {word}s {', '.join(others)} and {last}, each"
                if others
                else (f"score of {word} {last}")
            )
            heads = (
                ", and a linear look at what sets the suspicious unlabelled images apart from held-out ones"
                if self.heads
                else ""
            )
            cost = f"; {len(self.members)} detectors score an image" if others else ""
            told.append(
                f"combined detector: the {whose} in standard deviations of the held-out images{heads}{cost}"
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
    method = run.settings.method
    fitted = _is_fitted(method)
    if method.combine == 1:
        return Evidence(p, shifted, fitted=fitted)
    among = [c for c in choices if c.number in held_out and can_be_combined(held_out[c.number])]
    if not among:
        return Evidence(p, shifted, fitted=fitted)
    members = ranked(among, run.settings.criterion)[: method.combine]
    seen = p < NO_EVIDENCE
    # Runs of earlier versions may not have kept its detector.
    untrained = [c for c in among if not seen and c.augmentation.kind == NONE and keeps_detector(c.address)]
    # Heads would learn the noise that tells two sets of normal images apart.
    heads = method.contrast_heads and seen
    together = untrained or members
    combined = combine([member.kept(arrays_alone=True) for member in together], heads=heads)
    numbers = tuple(member.number for member in together)
    return Evidence(p, shifted, combined, numbers, bool(untrained), fitted)


def _is_fitted(method: Search | Tuning) -> bool:
    """Whether held-out images had a part in a study, and not only in its choice at the end."""
    if isinstance(method, Tuning):
        name, parted = method.look_by, method.survivors is not None and method.survivors < method.total
    else:
        guided = method.sampler in ("tpe", "gp") and method.total > _DRAWN_AT_RANDOM
        name, parted = method.criterion, guided or method.pruner != "none"
    by_held_out = name in CRITERIA and "held_out" in CRITERIA[name].needs
    looked_at = isinstance(method, Tuning) and (method.needs_held_out or method.focuses)
    return looked_at or (parted and by_held_out)


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
