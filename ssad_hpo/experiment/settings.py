"""The settings of a run, as its folder keeps them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssad_hpo.address import without_password
from ssad_hpo.bilevel import Tuning
from ssad_hpo.bounds import MOST_THREADS, check_text, check_whole
from ssad_hpo.data import WHOLE_DEPTH, Source
from ssad_hpo.task import Cluster, Range, Search, SearchSpace, Training

# Settings that are told of a study even where they are what they are by default.
_IMPORTANT = {"sampler", "pruner", "combine", "loss", "order", "starts", "encoder", "weights", "steps"}
_IMPORTANT |= {"batch_size", "learning_rate", "precision"}
_PLACES = ("address", "checkpoint_path")
_LIBRARIES = ("ssad-hpo", "torch", "torchvision", "optuna", "scikit-learn", "mlflow")
# Of a search in format 1.
_SEARCH_1 = ("criterion", "n_trials", "sampler", "pruner", "reduction_factor", "grid_points", "seed", "keep")
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
        if "/" in self.study_name:  # Ray makes a folder of that name
            raise ValueError(f"study_name: expected a name without '/', got {self.study_name!r:.80}")
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
    def bit_depth(self) -> int:
        """Bits of grey values in files of 16 bits, as the images of the study were read."""
        return WHOLE_DEPTH if self.source is None else self.source.arguments.get("bit_depth", WHOLE_DEPTH)

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
        order = "with the encoder as it comes" if method.steps_before else f"order {method.order}"
        return f"down {method.loss}, {order}"

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
        if name == "tuning":
            method = {"focus": False, **method}  # tunings did not at first
        method = _METHODS[name](**{**method, "space": SearchSpace.from_json(method["space"])})
        given = {
            "source": Source.from_json(values["source"]) if values["source"] else None,
            "method": method,
            "training": Training(**values["training"]),
            "cluster": Cluster(**values["cluster"]) if values["cluster"] else None,
        }
        return cls(**{**values, **given})

    def flat(self) -> dict[str, Any]:
        """What to compare studies by, for tracking: names with a prefix, plain values, nothing that is None.

        Settings as by default are left out but for the important ones; addresses always. `to_json` has all.
        """
        named = {"task": self.task_name, "criterion": self.criterion, "n_trials": self.n_trials}
        named |= {"seed": self.seed, "machine.device": self.device, "machine.threads": self.threads}
        named |= {f"space.{kind}": text for kind, text in described(self.method.space).items()}
        named |= _told("search" if self.tuning is None else "tuning", self.method, "n_trials", "seed")
        named |= _told("training", self.training, *(["seed"] if self.training.seed == self.seed else []))
        return named | (_told("cluster", self.cluster, *_PLACES) if self.cluster else {})

    @property
    def title(self) -> str:
        """What the study is called where no other is called so: its name without what made it unique."""
        title = self.study_name[:-9] if re.search(r"-[0-9a-f]{8}$", self.study_name) else self.study_name
        return re.sub(r"(-\d{8}-\d{6})-[0-9a-f]{4}$", r"\1", title) or self.study_name

    def _without_passwords(self) -> dict[str, Any]:
        """The fields by name; passwords in addresses are starred out, and are never written down."""
        values = _fields_of(self)
        for name in ("storage", "tracking_uri"):
            values[name] = values[name] and without_password(values[name])
        return values


def in_format_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of format 1 as `Settings.to_json` writes them now.

    Format 1 kept the fields of a search for every run; in a tuning most of them said nothing.

    Raises:
        KeyError: if a setting is missing.
    """
    values = dict(values)
    if values["source"] and values["source"]["loader"] in ("folder", "folders"):
        values["source"]["arguments"].setdefault("keep_ratio", False)  # images were squeezed into squares
    values.setdefault("reduction_factor", 2)  # before there was a choice, ASHA let the better half go on
    search = {name: values.pop(name) for name in _SEARCH_1}
    space, tuning, cluster = values.pop("space"), values.pop("tuning", None), values.pop("cluster", None)
    if cluster is not None:
        cluster["checkpoint_path"] = cluster.pop("storage_path")
    method = {"search": search} if tuning is None else {"tuning": tuning}
    ((name, settings),) = method.items()
    return {**values, "method": {name: {**settings, "space": space}}, "cluster": cluster}


def new_study_name(run: Path) -> str:
    """A name for the study of a run folder that no other study has."""
    return f"{run.name}-{uuid.uuid4().hex[:8]}"


def creation_facts() -> dict[str, Any]:
    """When and with which libraries a study is made: two fields of `Settings`."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": created, "versions": {name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on Python's path, or a library that this study does not use
        return "not installed"


def described(space: SearchSpace) -> dict[str, str]:
    """What is searched of each kind of augmentation, for people."""
    return {
        kind: ", ".join(
            f"{name} {value.low:g} to {value.high:g}{' (log)' if value.log else ''}"
            if isinstance(value, Range)
            else f"{name} {value:g}"
            for name, value in hyperparameters.items()
        )
        for kind, hyperparameters in space.kinds.items()
    }


def method_described(settings: Settings) -> dict[str, str]:
    """How the detectors were found, as texts by heading."""
    method = settings.method
    if not isinstance(method, Tuning):
        return {
            "search": f"{method.n_trials} trials, sampler {method.sampler}, pruner {method.stopping}, "
            f"seed {method.seed}",
        }
    tuning, warm = method, method.warm_start_steps(settings.training.steps)
    down = f"{settings.n_trials} starts down {tuning.loss}"
    if tuning.steps_before:
        trained = settings.n_trials if tuning.survivors is None else min(tuning.survivors, settings.n_trials)
        how = {
            "tuning": f"{down} of the encoder as it comes, {tuning.steps_before} steps of the "
            f"hyperparameters, learning rate {tuning.learning_rate:g}; then the lowest {trained} train",
        }
    else:
        how = {
            "tuning": f"{down}, order {tuning.order}, batch norm in {tuning.batch_norm} mode, learning rate "
            f"{tuning.learning_rate:g}, virtual rate {tuning.virtual_rate:g}, {tuning.detector_steps} "
            "training steps to one of the hyperparameters",
            "warm start": f"{warm} steps on the {tuning.warm_start_on}",
        }
    return {
        **how,
        "starts": "; ".join(
            ", ".join(f"{name} {value:g}" for name, value in start.items())
            if isinstance(start, Mapping)
            else f"{start:g} of the range"
            for start in tuning.starts
        ),
    }


def _told(prefix: str, settings: Any, *without: str) -> dict[str, Any]:
    """Settings by name: the important ones, and those that are not as by default."""
    told = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        left_out = f.name in ("space", "criterion", "choose_by", *without) or value is None
        if not left_out and (f.name in _IMPORTANT or value != default):
            told[f"{prefix}.{f.name}"] = value
    return told


def _fields_of(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in fields(settings)}
