"""Figures of single studies, in the report's style. matplotlib is imported where a figure is drawn."""
