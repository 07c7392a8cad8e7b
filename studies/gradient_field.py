"""The talk's figure: does the negative gradient of L_val point to perfect alignment?

    python -m studies.gradient_field            half a minute on one core
    python -m studies.gradient_field --smoke    a second

A toy problem without images or a network, so that nothing but the loss is seen. Embeddings are points of
the plane: normal ones lie around 0, anomalies around (1, 1), both with a standard deviation of 0.15, and
f_aug moves normal points by (u1, u2). So (1, 1) is perfect alignment and (0, 0) the collapse, where
augmented and normal points are the same. A trained encoder would move its embeddings along with u; here
they are held, as they are within one step of the hyperparameters.

For each loss, and for half and a fifth of anomalies among the unlabeled points, the picture shows the loss
and the direction of its negative gradient, and the table where descent ends: from every point of the grid
to its lowest neighbour, until there is none. The spread (0.15 rather than 0.3) and the grid, wide enough
to show that losses fall again far away, were chosen after a look at the losses along the diagonal. Writes
gradient_field.png, .md and .csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssad_hpo.bilevel import LOSSES
from studies.lab.figures.gradient_field import Field, gradient_field_figure
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results

ALIGNED, COLLAPSED = (1.0, 1.0), (0.0, 0.0)
SPREAD, POINTS = 0.15, 100
LOW, HIGH, NEAR = -1.0, 3.0, 0.25
CONTAMINATIONS = (0.5, 0.2)
TITLES = {
    "smooth_alignment": "smooth alignment",
    "soft_alignment": "soft alignment",
    "two_sided_alignment": "two-sided alignment",
    "mmd": "MMD1",
    "mmd_normalised": "MMD2 (normalised)",
}


def toy_sets(contamination: float) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The three sets of embeddings as a function of u (2,); the same draws for every u."""
    generator = torch.Generator().manual_seed(0)
    drawn = SPREAD * torch.randn(3, POINTS, 2, generator=generator, dtype=torch.float64)
    train, augmented, unlabeled = drawn - drawn.mean(1, keepdim=True)  # so that (1, 1) is aligned exactly
    unlabeled[: round(contamination * POINTS)] += torch.tensor(ALIGNED, dtype=torch.float64)
    return lambda u: (train, augmented + u, unlabeled)


def field_of(loss: str, contamination: float, per_side: int) -> Field:
    """Loss and gradient over the grid."""
    sets, along = toy_sets(contamination), np.linspace(LOW, HIGH, per_side)
    values, slopes = np.zeros((per_side, per_side)), np.zeros((per_side, per_side, 2))
    for (row, column), _ in np.ndenumerate(values):
        u = torch.tensor([along[column], along[row]], dtype=torch.float64, requires_grad=True)
        value = LOSSES[loss](*sets(u))
        (slope,) = torch.autograd.grad(value, u)
        values[row, column], slopes[row, column] = value.detach(), slope
    return Field(TITLES[loss], along, along, values, slopes)


def ends_of_descent(loss: np.ndarray) -> np.ndarray:
    """(R, C, 2) row and column of the local minimum that each point of a grid (R, C) descends to."""
    rows, columns = loss.shape
    ends = np.zeros((rows, columns, 2), dtype=int)
    for flat in np.argsort(loss, axis=None):  # a point's lower neighbours come before it
        i, j = divmod(int(flat), columns)
        around = np.s_[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        down, right = divmod(int(loss[around].argmin()), loss[around].shape[1])
        lowest = (max(0, i - 1) + down, max(0, j - 1) + right)
        ends[i, j] = (i, j) if lowest == (i, j) else ends[lowest]
    return ends


def row_of(loss: str, contamination: float, field: Field) -> Row:
    """A line of the table: the loss where it matters, and the shares of the grid by where descent ends."""
    ends = ends_of_descent(field.loss)
    at = np.stack([field.u1[ends[..., 1]], field.u2[ends[..., 0]]], axis=-1)
    near = {
        name: np.linalg.norm(at - place, axis=-1) < NEAR
        for name, place in (("aligned", ALIGNED), ("collapsed", COLLAPSED))
    }
    edge = ~near["aligned"] & (np.isclose(at, LOW) | np.isclose(at, HIGH)).any(-1)
    elsewhere = ~(near["aligned"] | near["collapsed"] | edge)
    sets = toy_sets(contamination)
    values = {
        f"loss {name}": float(LOSSES[loss](*sets(torch.tensor(place, dtype=torch.float64))))
        for name, place in (("aligned", ALIGNED), ("collapsed", COLLAPSED))
    }
    i, j = np.unravel_index(field.loss.argmin(), field.loss.shape)
    return {
        "loss": loss,
        "contamination": contamination,
        **values,
        "lowest u1": float(field.u1[j]),
        "lowest u2": float(field.u2[i]),
        **{f"ends {name}": float(share.mean()) for name, share in near.items()},
        "ends at the edge": float(edge.mean()),
        "ends elsewhere": float(elsewhere.mean()),
    }


def page(rows: list[Row], per_side: int, options: argparse.Namespace) -> str:
    def cells(row: Row) -> list[object]:
        lowest = f"({row['lowest u1']:.1f}, {row['lowest u2']:.1f})"
        values = [f"{row[name]:.3f}" for name in ("loss aligned", "loss collapsed")]
        names = ("aligned", "collapsed", "at the edge", "elsewhere")
        shares = [f"{row[f'ends {name}']:.0%}" for name in names]
        return [TITLES[row["loss"]], f"{row['contamination']:.0%}", *values, lowest, *shares]

    titles = ["L_val", "anomalies", "aligned", "collapsed", "lowest at", "to aligned", "to collapsed"]
    return f"""# The gradient field of L_val

Does descent lead to perfect alignment?

{made_by("gradient_field", options)}

Embeddings are points of the plane: normal ones around (0, 0), anomalies around (1, 1), standard deviation
{SPREAD}; augmented ones are normal ones moved by (u1, u2). Perfect alignment is (1, 1); at (0, 0) augmented
and normal points are the same (collapse). The table has the loss at both, where it is lowest, and where
descent over the {per_side} × {per_side} grid ends, as shares of its points: within {NEAR} of either, at the
edge of the grid (it runs away), or elsewhere.

{markdown_table([*titles, "to the edge", "elsewhere"], map(cells, rows))}
![The gradient field of each loss](gradient_field.png)
"""


def main() -> None:
    parser = study_parser("gradient_field", __doc__)
    parser.add_argument("--per-side", type=int, default=41, help="points of the grid along a side")
    options = parse(parser)
    torch.set_num_threads(1)  # the sets are small
    per_side = 9 if options.smoke else options.per_side
    pictures, rows = {}, []
    for contamination in CONTAMINATIONS:
        fields = {loss: field_of(loss, contamination, per_side) for loss in TITLES}
        pictures[f"{contamination:.0%} of the unlabeled points are anomalies"] = list(fields.values())
        rows += [row_of(loss, contamination, field) for loss, field in fields.items()]
    write_results(options, "gradient_field", page(rows, per_side, options), rows)
    gradient_field_figure(pictures, ALIGNED, COLLAPSED, options.out / "gradient_field.png")


if __name__ == "__main__":
    main()
