"""Tables for a terminal of any width: where there is no room columns are left out, and no number is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssad_hpo.cli.display import console, plain, say

_NARROW = 60  # columns of a terminal below which a table has no lines between its cells


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: above it; may be broken between words.
        cells: one for each row, never broken.
        right: whether they are aligned at the right.
        rank: of what is left out first, the highest; what has 0 stays.
    """

    heading: str
    cells: Sequence[str]
    right: bool = True
    rank: int = 0

    @property
    def least(self) -> int:
        """The narrowest that it can be, in characters."""
        words = [*self.heading.split(), *self.cells]
        return max(map(len, words), default=0)


def print_table(title: str, columns: Sequence[Column], chosen: int | None) -> None:
    """Print a table as wide as the terminal allows.

    Args:
        chosen: the row that is marked, in the last column and by its style; None for no row.
    """
    from rich import box
    from rich.table import Table

    screen = console()
    narrow = screen.width < _NARROW
    rows = len(columns[0].cells)
    word = "*" if narrow else "selected"
    mark = Column("", [word if row == chosen else "" for row in range(rows)], right=False)
    shown, between = [*columns, mark], 2 if narrow else 3
    left_out: list[str] = []
    while sum(c.least + between for c in shown) + 1 > screen.width and any(c.rank for c in shown):
        last = max(shown, key=lambda c: c.rank)
        shown.remove(last)
        left_out.insert(0, last.heading)
    table = Table(title=title, box=None if narrow else box.HEAVY_HEAD, pad_edge=not narrow)
    for c in shown:
        table.add_column(c.heading, justify="right" if c.right else "left", min_width=c.least)
    for row in range(rows):
        style = "bold green" if row == chosen else None
        table.add_row(*(plain(c.cells[row]) for c in shown), style=style)
    screen.print(table, soft_wrap=False)
    if left_out:
        say(f"a wider terminal shows {plain(', '.join(left_out))} as well")
