"""The settings of a run, as its folder keeps them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssad_hpo.address import without_password
from ssad_hpo.bilevel import Tuning
from ssad_hpo.bounds import MOST_THREADS, check_text, check_whole
from ssad_hpo.data import Source
from ssad_hpo.task import Cluster, Search, SearchSpace, Training

_LIBRARIES = ("ssad-hpo", "torch", "torchvision", "optuna", "scikit-learn", "mlflow")
_METHODS: dict[str, type[Search] | type[Tuning]] = {"search": Search, "tuning": Tuning}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        study_name: unique, also in shared storages and on tracking servers.
        source: address of the data; None for a task that lives in the caller's memory only.
        task_name, content_hash: of the task, to recognise it when it is loaded again.
        method: how detectors are found. Every starting point of a tuning is a trial of its study.
        training: of every detector.
        cluster: of a search whose trials run on Ray; None where they run in this process.
        device, threads: where it trains.
        storage: URL of Optuna's storage; None for the journal file in the run folder.
        tracking_uri, experiment: of MLflow; a tracking_uri of None switches tracking off.
        weights_digest: SHA-256 of the encoder as the study begins with it, where it is pretrained.
        created: UTC time. versions: of the libraries that a result depends on.
    """

    study_name: str
    source: Source | None
    task_name: str
    content_hash: str
    method: Search | Tuning
    training: Training
    cluster: Cluster | None
    device: str
    threads: int
    storage: str | None = field(repr=False)  # may hold passwords
    tracking_uri: str | None = field(repr=False)
    experiment: str
    created: str
    versions: dict[str, str]
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        check_text(self, "study_name", "task_name", "content_hash", "device", "experiment", "created")
        optional = ("storage", "tracking_uri", "weights_digest")
        check_text(self, *(name for name in optional if getattr(self, name) is not None))
        check_whole(self, {"threads": (1, MOST_THREADS)})
        if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", self.device):
            raise ValueError(f"device: expected 'cpu' or 'cuda', got {self.device!r:.80}")
        if not all(isinstance(text, str) for pair in self.versions.items() for text in pair):
            raise ValueError("versions: expected texts")

    @property
    def tuning(self) -> Tuning | None:
        """The method, if it is a tuning."""
        return self.method if isinstance(self.method, Tuning) else None

    @property
    def criterion(self) -> str:
        """What chooses, the lowest."""
        return self.method.criterion if isinstance(self.method, Search) else self.method.choose_by

    @property
    def n_trials(self) -> int:
        """How many trials there will be; those of a tuning are its starting points."""
        return self.method.total

    @property
    def addresses(self) -> dict[str, str]:
        """Where the study is kept and told, and computes, by the name of the setting; files included."""
        named = {"storage": self.storage, "tracking_uri": self.tracking_uri}
        if self.cluster is not None:
            named |= {"address": self.cluster.address, "checkpoint_path": self.cluster.checkpoint_path}
        return {name: address for name, address in named.items() if address is not None}

    @property
    def word(self) -> str:
        """What a trial is called: "trial", or the "start" of a tuning."""
        return "trial" if self.tuning is None else "start"

    @property
    def how(self) -> str:
        """How hyperparameters are found, for people."""
        method = self.method
        if isinstance(method, Search):
            return f"sampler {method.sampler}, pruner {method.stopping}"
        return f"down {method.loss}, order {method.order}"

    @property
    def seed(self) -> int:
        """Of the sampler; a tuning has that of the training alone."""
        return self.method.seed if isinstance(self.method, Search) else self.training.seed

    @property
    def tags(self) -> dict[str, str]:
        """What tells this study and its trials from others, for tracking."""
        method = self.method
        own = {"sampler": method.sampler} if isinstance(method, Search) else {"loss": str(method.loss)}
        return {
            "task": self.task_name,
            "criterion": self.criterion,
            "method": "search" if isinstance(method, Search) else "st-ssad",
            **own,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and values; `from_json` gives the same settings back, without passwords."""
        name = next(name for name, kind in _METHODS.items() if isinstance(self.method, kind))
        return {
            **self._without_passwords(),
            "source": self.source.to_json() if self.source else None,
            "method": {name: {**_fields_of(self.method), "space": self.method.space.to_json()}},
            "training": asdict(self.training),
            "cluster": asdict(self.cluster) if self.cluster else None,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: for what it did not write.
        """
        ((name, method),) = values["method"].items()
        method = _METHODS[name](**{**method, "space": SearchSpace.from_json(method["space"])})
        given = {
            "source": Source.from_json(values["source"]) if values["source"] else None,
            "method": method,
            "training": Training(**values["training"]),
            "cluster": Cluster(**values["cluster"]) if values["cluster"] else None,
        }
        return cls(**{**values, **given})

    def flat(self) -> dict[str, Any]:
        """Settings as one level of names and plain values, without passwords: for tracking and showing."""
        values = self._without_passwords()
        for name in ("method", "training", "cluster", "source", "versions"):
            del values[name]
        method = _fields_of(self.method)
        del method["space"]
        if self.tuning is not None:
            method = {"criterion": self.criterion, "n_trials": self.n_trials} | _prefixed("tuning", method)
        return {
            **values,
            **method,
            "space": json.dumps(self.method.space.to_json()),
            "source": json.dumps(self.source.to_json()) if self.source else "in memory",
            **_prefixed("training", _fields_of(self.training)),
            **_prefixed("version", self.versions),
            **(_prefixed("cluster", _fields_of(self.cluster)) if self.cluster else {}),
        }

    def _without_passwords(self) -> dict[str, Any]:
        """The fields by name; passwords in addresses are starred out, and are never written down."""
        values = _fields_of(self)
        for name in ("storage", "tracking_uri"):
            values[name] = values[name] and without_password(values[name])
        return values


def new_study_name(run: Path) -> str:
    """A name for the study of a run folder that no other study has."""
    return f"{run.name}-{uuid.uuid4().hex[:8]}"


def creation_facts() -> dict[str, Any]:
    """When and with which libraries a study is made: two fields of `Settings`."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": created, "versions": {name: version(name) for name in _LIBRARIES}}


def _fields_of(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}
