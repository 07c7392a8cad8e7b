"""Starts a study of which every setting is named alone, as tests vary one at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ssad_hpo.experiment import StudyResult, run_study
from ssad_hpo.task import Search


def start_study(images: Any, **settings: Any) -> StudyResult:
    """`run_study` with a `Search` of those settings that are its fields; `space` as `SearchSpace` takes it."""
    search = {f.name: settings.pop(f.name) for f in fields(Search) if f.name in settings}
    return run_study(images, Search(**search), **settings)
