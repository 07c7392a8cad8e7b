"""Starts a study of which every setting is named alone, as tests vary one at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ssad_hpo.experiment import StudyResult, run_study
from ssad_hpo.task import Cluster, Search


def start_study(images: Any, **settings: Any) -> StudyResult:
    """`run_study` with a `Search` of those settings that are its fields."""
    search = {f.name: settings.pop(f.name) for f in fields(Search) if f.name in settings}
    return run_study(images, Search(**search), **settings)


def start_sweep(images: Any, *, pruner: str = "none", **settings: Any) -> StudyResult:
    """`start_study` on Ray, with the settings of a `Cluster` named alone as well."""
    cluster = {f.name: settings.pop(f.name) for f in fields(Cluster) if f.name in settings}
    return start_study(images, pruner=pruner, cluster=Cluster(**cluster), **settings)
