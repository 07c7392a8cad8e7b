"""Decisions beside scores: what `score` writes of each image, and what it says of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from ssad_hpo.cli.display import say, warn
from ssad_hpo.cli.groups import option

if TYPE_CHECKING:
    from ssad_hpo.calibration import Calibration
    from ssad_hpo.experiment import LabelledEvaluation

ALARM_RATE = option(
    "--alarm-rate", type=float,
    help="Share of good images that may raise an alarm; by default 0.05, or the least that can be kept.",
)  # fmt: skip


_NOTHING_TO_DECIDE_BY = (
    "this detector has no scores of held-out normal images to decide by; search with --held-out DIR or "
    "--held-out-share SHARE"
)


class Decisions:
    """P-values and decisions of scores.

    Args:
        calibration: of the detector that scores; None leaves scores alone, and says why.
        alarm_rate: that was asked for; None is the usual one.

    Raises:
        click.UsageError: for a rate without anything to decide by. ValueError: for one that cannot be kept.
    """

    def __init__(self, calibration: Calibration | None, alarm_rate: float | None) -> None:
        from ssad_hpo.calibration import check_alarm_rate

        self.calibration, self.asked, self.scores = calibration, alarm_rate, list[float]()
        if alarm_rate is not None:
            check_alarm_rate(alarm_rate)
            if calibration is None:
                raise click.UsageError(f"--alarm-rate {alarm_rate:g}: {_NOTHING_TO_DECIDE_BY}")
        if calibration is not None:
            self.alarm_rate = calibration.usual_rate if alarm_rate is None else alarm_rate
            self.threshold = calibration.threshold(self.alarm_rate)

    def of(self, score: float) -> dict[str, str]:
        """What stands beside a score in the table."""
        import torch

        if self.calibration is None:
            return {}
        p_value = float(self.calibration.p_values(torch.tensor([score], dtype=torch.float64)))
        self.scores.append(score)
        return {"p_value": repr(p_value), "decision": "alarm" if score > self.threshold else "good"}

    def tell(self) -> None:
        """Say how many alarms there are and how many good images would raise one, and whether all drifted."""
        import torch

        if self.calibration is None:
            warn(f"scores alone, no p-values and decisions: {_NOTHING_TO_DECIDE_BY}")
            return
        scores = torch.tensor(self.scores, dtype=torch.float64)
        for sentence in self.calibration.decided(scores, self.asked).sentences():
            warn(sentence)


def show_labelled(found: LabelledEvaluation) -> None:
    """How a run's detector fits labels that the user gave."""
    say(f"{found.n_unlabeled} labelled images were among the unlabelled ones, {found.n_new} are new")
    if found.left_out:
        warn(f"{found.left_out} labelled images are left out: the search had them as good ones")
    if found.auc is None:
        say("AUC needs images of both kinds; all of these have the same label")
    else:
        say(f"AUC [bold green]{found.auc:.3f}[/bold green]")
    if found.alarms is None:
        warn("no alarms: the run held no normal images out to decide by; search with --held-out-share")
    else:
        say(found.alarms.sentence())
