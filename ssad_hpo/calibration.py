"""From scores to decisions: conformal p-values against held-out normal images. Label-free.

A new normal image is as likely as each of the n held-out ones to score highest, second highest and so on. So
p = (1 + how many of these score at least as high) / (n + 1) is at most a for at most a share a of new normal
images, whatever a detector's scores look like (Vovk, Gammerman and Shafer, 2005, section 4; Bates et al.,
Annals of Statistics 2023). It holds on the mean over held-out sets; `realised_rates` says how far one set may
be off. No training and no density may have seen these images. It is exact for a detector that was fixed
before anybody looked at them; one that was chosen among several by how these very images score, or fitted to
them by contrast heads, keeps a rate nearly: 0.05 came out as 0.044 to 0.046 with 99 of them
(studies/results/alarm_rates.md), and can be half as much again with a few dozen and unlike candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import beta, betabinom
from torch import Tensor

from ssad_hpo.bounds import is_number

# The smallest round rate that fifty held-out images, the least that are set aside without being asked for,
# keep by more than a single one of them.
ALARM_RATE = 0.05
CERTAINTY = 0.9  # of `realised_rates`
# A batch is drifted if scores as rare as its own among the lowest third of the held-out ones would take more
# than seven anomalies in ten: normal images that look different are likelier.
LOWER_PART, MOST_ANOMALIES = 1 / 3, 0.7
DRIFT_LEVEL = 0.01  # how often batches of seven anomalies in ten are taken for drifted ones, at most
MOST_BYTES = 2**23  # of what is kept: a million scores
_KEPT = "calibration.held_out"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out normal images by one detector, to decide by.

    >>> import torch
    >>> from ssad_hpo.calibration import Calibration
    >>> calibration = Calibration(torch.arange(19.0))
    >>> calibration.p_values(torch.tensor([-1.0, 9.0, 20.0])).tolist()
    [1.0, 0.55, 0.05]
    >>> calibration.alarms(torch.tensor([17.5, 18.5])).tolist(), calibration.threshold(0.05)
    ([False, True], 18.0)

    Attributes:
        held_out: (N_held,) float64 anomaly scores, higher is more anomalous; kept in rising order.

    Raises:
        ValueError: for none, scores of another shape, or ones that are not finite.
    """

    held_out: Tensor

    def __post_init__(self) -> None:
        scores = _checked("held_out", self.held_out)
        if not len(scores):
            raise ValueError("held_out: expected at least one score, got none")
        object.__setattr__(self, "held_out", scores.sort().values)

    @property
    def least_rate(self) -> float:
        """The smallest alarm rate that so many held-out images can keep, 0..1."""
        return 1 / (len(self.held_out) + 1)

    @property
    def usual_rate(self) -> float:
        """`ALARM_RATE`, or the smallest rate where so few images cannot keep that."""
        return max(ALARM_RATE, self.least_rate)

    def p_values(self, scores: Tensor) -> Tensor:
        """(N,) float64 of (N,) scores, in least_rate..1: how rare so high a score is among normal images.

        Raises:
            ValueError: for scores of another shape, or ones that are not finite.
        """
        scores = _checked("scores", scores)
        n = len(self.held_out)
        below = torch.searchsorted(self.held_out, scores, right=False)
        return (n - below + 1).double() / (n + 1)

    def alarms(self, scores: Tensor, alarm_rate: float = ALARM_RATE) -> Tensor:
        """(N,) bool of (N,) scores: whether the p-value is at most `alarm_rate`.

        Args:
            scores: higher is more anomalous.
            alarm_rate: the share of normal images that may raise an alarm, least_rate..1.

        Raises:
            ValueError: as `p_values`, or for a rate that cannot be kept.
        """
        return _checked("scores", scores) > self.threshold(alarm_rate)

    def threshold(self, alarm_rate: float = ALARM_RATE) -> float:
        """The score above which images raise an alarm.

        Raises:
            ValueError: for a rate that cannot be kept.
        """
        return float(self.held_out[-self._count(alarm_rate)])

    def realised_rates(self, alarm_rate: float = ALARM_RATE) -> tuple[float, float, float]:
        """The rate of false alarms to expect, and the range that it is in with a certainty of 90 %.

        With these n held-out images, alarms are those above the k-th highest of them, k / (n + 1) <=
        `alarm_rate`. The share of all normal images that lies there follows Beta(k, n + 1 - k) over draws of
        the held-out images.

        Returns:
            (its mean, its 5 % quantile, its 95 % quantile), 0..1.

        Raises:
            ValueError: for a rate that cannot be kept.
        """
        k, n = self._count(alarm_rate), len(self.held_out)
        tail = (1 - CERTAINTY) / 2
        low, high = (float(beta.ppf(q, k, n + 1 - k)) for q in (tail, 1 - tail))
        return k / (n + 1), low, high

    def drift(self, scores: Tensor) -> float:
        """How likely so few low scores would be in a batch with seven anomalies in ten; 0..1.

        Where anomalies are the difference, a batch's normal images still score low. If almost none does, they
        look different from the held-out ones, and p-values do not hold for them. Below `DRIFT_LEVEL` a batch
        has drifted; one of fewer than some 40 images cannot, with ten held-out ones none of fewer than 107.

        Args:
            scores: (M,) of new images, higher is more anomalous.

        Raises:
            ValueError: as `p_values`.
        """
        scores = _checked("scores", scores)
        n = len(self.held_out)
        normal = math.ceil(round((1 - MOST_ANOMALIES) * len(scores), 9))  # (1 - 0.7) * 30 is beyond 9
        j = max(1, round(LOWER_PART * n))
        low = int((scores <= self.held_out[j - 1]).sum())
        # How many of the normal images are below the j-th lowest held-out one, if all are exchangeable.
        return float(betabinom.cdf(low, normal, j, n + 1 - j))

    def decided(self, scores: Tensor, alarm_rate: float | None = None) -> Decided:
        """What is decided of a batch of images as a whole.

        Args:
            scores: (M,) of them, higher is more anomalous.
            alarm_rate: the share of normal images that may raise an alarm; None is `usual_rate`.

        Raises:
            ValueError: as `alarms`.
        """
        rate = self.usual_rate if alarm_rate is None else alarm_rate
        expected, low, high = self.realised_rates(rate)
        return Decided(
            n_images=len(scores),
            n_alarms=int(self.alarms(scores, rate).sum()),
            n_held_out=len(self.held_out),
            alarm_rate=rate,
            asked=alarm_rate is not None,
            threshold=self.threshold(rate),
            expected=expected,
            low=low,
            high=high,
            drift=self.drift(scores),
        )

    def check_rate(self, alarm_rate: float) -> None:
        """Raise ValueError for a rate that is no share, or that so few held-out images cannot keep."""
        check_alarm_rate(alarm_rate)
        if alarm_rate < self.least_rate:
            n, most = len(self.held_out), 10**9
            takes = math.ceil(1 / alarm_rate) - 1 if alarm_rate > 1 / most else f"more than {most}"
            raise ValueError(
                f"alarm_rate: {n} held-out images keep rates of {_shown(self.least_rate)} and more, got "
                f"{alarm_rate:g}, which takes {takes}; ask for a higher rate, or "
                "hold out more images (--held-out, --held-out-share)"
            )

    def _count(self, alarm_rate: float) -> int:
        """The largest k with k / (n + 1) <= alarm_rate, as the p-values are rounded."""
        self.check_rate(alarm_rate)
        total = len(self.held_out) + 1
        near = math.floor(alarm_rate * total)
        return next(k for k in (near + 1, near, near - 1) if k / total <= alarm_rate)


@dataclass(frozen=True)
class Decided:
    """What a calibration decides of a batch of images.

    Attributes:
        n_images, n_alarms: how many there are, and how many of them raise an alarm.
        n_held_out: images that decide.
        alarm_rate: the share of normal images that may raise an alarm. asked: whether somebody asked for it.
        threshold: the score above which images raise an alarm.
        expected, low, high: the share of normal images that does raise one; see `Calibration.realised_rates`.
        drift: see `Calibration.drift`.
    """

    n_images: int
    n_alarms: int
    n_held_out: int
    alarm_rate: float
    asked: bool
    threshold: float
    expected: float
    low: float
    high: float
    drift: float

    @property
    def drifted(self) -> bool:
        """Whether the images differ from the held-out ones as a whole, so that p-values do not hold."""
        return self.drift < DRIFT_LEVEL

    @property
    def expectation(self) -> str:
        """How many normal images raise an alarm, for people."""
        return f"{_percent(self.low)} to {_percent(self.high)}, 90 % range"

    def sentences(self, images: str = "images") -> list[str]:
        """How many alarms there are, how many normal images would raise one, and whether all drifted.

        Args:
            images: what they are called, such as "unlabelled images".
        """
        told = []
        if not self.asked and self.alarm_rate > ALARM_RATE:
            told.append(
                f"{self.n_held_out} held-out images keep alarm rates of {_shown(self.alarm_rate)} and more, "
                f"so it is that instead of {ALARM_RATE:g}; a search that holds out more of them (--held-out) "
                "keeps lower ones"
            )
        told.append(
            f"{self.n_alarms} of {self.n_images} {images} raise an alarm; about {_percent(self.expected)} of "
            f"good ones would (from {self.n_held_out} held-out images: {self.expectation})"
        )
        if self.drifted:
            told.append(
                "these images score higher than held-out ones as a whole, the lowest too: most are "
                "anomalies, or good ones look different now (light, focus, material), and then p-values do "
                "not hold; search again with good images as they are now"
            )
        return told


def _shown(least_rate: float) -> str:
    """A rate in three digits that can be asked for: rounded up."""
    scale = 10 ** (2 - math.floor(math.log10(least_rate)))
    return f"{math.ceil(least_rate * scale) / scale:g}"


class Calibrated:
    """What a detector says of images once it has a calibration: a part of every kind of detector.

    Attributes:
        calibration: None where no normal images were held out.
    """

    calibration: Calibration | None

    def score(self, images: Tensor) -> Tensor:
        """(N,) float64 anomaly scores of (N, C, H, W) uint8 images; higher is more anomalous."""
        raise NotImplementedError

    def p_values(self, images: Tensor) -> Tensor:
        """Conformal p-values (N,) float64 in 0..1 of (N, C, H, W) uint8 images; lower is more anomalous.

        Of new normal images a share of at most a has p <= a, for every a.

        Raises:
            ValueError: if no normal images were held out, or as `score`.
            DetectorError: as `score`.
        """
        return self._own_calibration().p_values(self.score(images))

    def decide(self, images: Tensor, alarm_rate: float = ALARM_RATE) -> Tensor:
        """(N,) bool, whether (N, C, H, W) uint8 images raise an alarm: a p-value of at most `alarm_rate`.

        Args:
            images: of the detector's shape.
            alarm_rate: the share of new normal images that may raise an alarm, at least 1 / (n + 1) with n
                held-out images.

        Raises:
            ValueError: if no normal images were held out, for a rate that cannot be kept, or as `score`.
            DetectorError: as `score`.
        """
        self._own_calibration().check_rate(alarm_rate)
        return self._own_calibration().alarms(self.score(images), alarm_rate)

    def _own_calibration(self) -> Calibration:
        if self.calibration is None:
            raise ValueError(
                "calibration: this detector has no scores of held-out normal images to decide by; search "
                "with some (held_out or held_out_share, --held-out or --held-out-share)"
            )
        return self.calibration


def check_alarm_rate(alarm_rate: float) -> None:
    """Raise ValueError for a rate that is no share between 0 and 1."""
    if not (is_number(alarm_rate) and 0 < alarm_rate < 1):
        raise ValueError(f"alarm_rate: expected a share between 0 and 1, got {alarm_rate!r:.80}")


def tensors_of(calibration: Calibration | None) -> dict[str, Tensor]:
    """What a detector's file keeps of its calibration."""
    return {} if calibration is None else {_KEPT: calibration.held_out}


def take_calibration(tensors: dict[str, Tensor]) -> Calibration | None:
    """The calibration among a file's tensors, which it is taken out of; None where there is none.

    Raises:
        ValueError: for what `tensors_of` does not give.
    """
    held_out = tensors.pop(_KEPT, None)
    return None if held_out is None else Calibration(held_out)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _checked(name: str, scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
        came = (
            f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        )
        raise ValueError(f"{name}: expected (N,) floating-point numbers, got {came}")
    if not scores.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return scores.double().cpu()
