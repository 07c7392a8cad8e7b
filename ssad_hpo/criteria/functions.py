"""Label-free criteria of how well f_aug imitates the anomalies hidden in the unlabelled images.

Each criterion is a pure function `f(train, augmented, unlabeled)` of three sets of embeddings, (N, D)
tensors of one floating type on one device (unit rows, when they come from a detector), and returns a
scalar tensor of that type; lower is better. The formulas are those of DSV (Yoo et al., ECML PKDD 2023)
and ST-SSAD (Yoo et al., KDD 2025); d(A, B) is the mean over all pairs of ||a - b|| / 2.

With gradients the pairwise criteria hold all pairs at once, so they are meant for mini-batches; without,
they stream over blocks of pairs in constant memory, and `evaluate_all` shares one pass among all of them.

A new criterion is a function and a row of `CRITERIA`; CONTRIBUTING.md has the recipe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssad_hpo.criteria.pairs import Pairs, check_sets, norm

# Temperature of the soft minima of the alignment losses, in units of the normalised distances.
_SOFT_TEMPERATURE = 0.2


def base(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """d(Z_trn u Z_aug, Z_test); in [0, 1] for unit rows, lower is better.

    Raises:
        DegenerateError: a set is empty, has one row, identical rows, values that are not finite, or
            another D than `train`; the message names it.
    """
    return Pairs(train, augmented, unlabeled).base


def mmd(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of Z_trn u Z_aug and Z_test with the linear kernel; lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    check_sets(train, augmented, unlabeled)
    return (torch.cat([train, augmented]).mean(0) - unlabeled.mean(0)).square().sum()


def mmd_normalised(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """`mmd` after total distance normalisation (MMD2 of ST-SSAD's ablation); lower is better.

    A loss for tuning, and no key of `CRITERIA`: its value does not depend on the scale of the sets.

    Raises:
        DegenerateError: as `base`.
    """
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    return (torch.cat([train, augmented]).mean(0) - unlabeled.mean(0)).square().sum()


def std(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Minus the population standard deviation of all ||z - z'||, z in Z_trn u Z_aug, z' in Z_test.

    Distances are not halved. Never positive; lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    return Pairs(train, augmented, unlabeled).std


def discordance(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_dis = d(Z_trn u Z_aug, Z_test) / (d(Z_trn, Z_aug) + 1e-8) of DSV; positive, lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    return Pairs(train, augmented, unlabeled).discordance


def separability(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_sep of DSV, without the clamp: s / d(Z_trn, Z_aug). A component: positive, *higher* is better.

    s is the standard deviation, over all pairs (z in Z_test, z' in Z_aug), of z's projection on the
    direction from mean(Z_trn) to z'.

    Raises:
        DegenerateError: as `base`.
    """
    return Pairs(train, augmented, unlabeled).separability


def dsv(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Discordance and separability validation, L_dis - min(L_sep, 1/2) / L_dis; lower is better.

    Negative where f_aug imitates the anomalies well, 0.6 and more where everything is mixed around.

    >>> import torch
    >>> from ssad_hpo import dsv
    >>> normal, anomalies = torch.eye(6)[:2], torch.eye(6)[2:4]
    >>> unlabeled = torch.cat([normal, anomalies])
    >>> good, bad = dsv(normal, anomalies, unlabeled), dsv(normal, torch.eye(6)[4:], unlabeled)
    >>> bool(good < bad)
    True

    Raises:
        DegenerateError: as `base`.
    """
    return Pairs(train, augmented, unlabeled).dsv


def dsv_unclamped(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """`dsv` without its clamp, L_dis - L_sep / L_dis, a deviation from the published loss; lower is better.

    The clamp stands against augmented embeddings that fall together with the train ones. It also makes all
    detectors equal in separability that separate well, which is most of them with a pretrained encoder.

    Raises:
        DegenerateError: as `base`.
    """
    return Pairs(train, augmented, unlabeled).dsv_unclamped


def smooth_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_val of ST-SSAD: half the mean, over Z_test, of the distances to mean(Z_trn) and to mean(Z_aug).

    After total distance normalisation. The mean over Z_test, and no sum, makes data sets comparable.
    Positive, lower is better.

    >>> import torch
    >>> from ssad_hpo import smooth_alignment
    >>> normal, augmented, unlabeled = torch.eye(6).split(2)
    >>> _ = augmented.requires_grad_()
    >>> smooth_alignment(normal, augmented, unlabeled).backward()
    >>> augmented.grad.shape
    torch.Size([2, 6])

    Raises:
        DegenerateError: as `base`.
    """
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    to_train = norm(unlabeled - train.mean(0))
    to_augmented = norm(unlabeled - augmented.mean(0))
    return (to_train + to_augmented).mean() / 2


def soft_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Each z in Z_test pays for the nearer of mean(Z_trn) and mean(Z_aug), by a soft minimum.

    -t mean log(exp(-||z - mean Z_trn|| / t) + exp(-||z - mean Z_aug|| / t)), t = 0.2, after total
    distance normalisation. Lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    distances = [norm(unlabeled - train.mean(0)), norm(unlabeled - augmented.mean(0))]
    return _soft_minimum(torch.stack(distances)).mean()


def two_sided_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """`soft_alignment`, and mean(Z_aug) pays in turn for the distance to the z in Z_test near it.

    Added is -t log mean exp(-||z - mean Z_aug|| / t), t = 0.2. Without it augmented embeddings may leave
    everything behind: each z then pays for Z_trn alone, by distances that the normalisation shrinks.
    Lower is better. A loss for tuning, and no key of `CRITERIA`.

    Raises:
        DegenerateError: as `base`.
    """
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    to_train, to_augmented = norm(unlabeled - train.mean(0)), norm(unlabeled - augmented.mean(0))
    from_augmented = _soft_minimum(to_augmented) + _SOFT_TEMPERATURE * math.log(len(unlabeled))
    return _soft_minimum(torch.stack([to_train, to_augmented])).mean() + from_augmented


def _soft_minimum(distances: Tensor) -> Tensor:
    """Over the first dimension; at most the minimum, which it is at temperature 0."""
    return -_SOFT_TEMPERATURE * torch.logsumexp(-distances / _SOFT_TEMPERATURE, 0)


def _normalise(*sets: Tensor) -> list[Tensor]:
    """Total distance normalisation of ST-SSAD: centre all rows together, divide by their root mean square."""
    check_sets(*sets)
    rows = torch.cat(sets)
    centre = rows.mean(0)
    scale = (rows - centre).square().sum(1).mean().sqrt()
    return [(s - centre) / scale for s in sets]
