"""Figures, and a study's report: one page and its pictures. The only room that may import matplotlib.

matplotlib is imported where a figure is drawn, so that importing this room stays fast.
"""

from ssad_hpo.report.findings import Course, EmbeddingSets, Findings, ImageRow, Trajectory, Trial
from ssad_hpo.report.page import write_report
from ssad_hpo.report.throughput import throughput_figure

__all__ = [
    "Course",
    "EmbeddingSets",
    "Findings",
    "ImageRow",
    "Trajectory",
    "Trial",
    "throughput_figure",
    "write_report",
]
