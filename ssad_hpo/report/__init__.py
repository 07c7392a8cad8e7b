"""A study's report: one page and its pictures. The only room that may import matplotlib.

It is imported where a figure is drawn, so that importing this room stays fast.
"""

from ssad_hpo.report.findings import (
    Confirmed,
    Course,
    Decisions,
    EmbeddingSets,
    Findings,
    ImageRow,
    Spots,
    Trajectory,
    Trial,
)
from ssad_hpo.report.heat import LONGEST_SIDE, overlay
from ssad_hpo.report.page import write_report

__all__ = [
    "LONGEST_SIDE",
    "Confirmed",
    "Course",
    "Decisions",
    "EmbeddingSets",
    "Findings",
    "ImageRow",
    "Spots",
    "Trajectory",
    "Trial",
    "overlay",
    "write_report",
]
