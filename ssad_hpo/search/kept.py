"""What is kept of a finished trial: its scores, its embeddings, and the detectors of the best.

Two stores with one face: a folder, and the memory of this process. Both give an address, a string that
fits into a trial's user attributes, from which `open_kept` reads.
"""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ssad_hpo.detector import Detector, Embeddings

_ARRAYS_FILE, _DETECTOR_FOLDER = "arrays.npz", "detector"
_MEMORY_SCHEME = "memory:"


@dataclass(frozen=True)
class Kept:
    """What remains of a trial.

    Attributes:
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous.
        embeddings: the three sets that its criteria were computed from.
        detector: None where the trial was not among the best.
    """

    scores: np.ndarray
    embeddings: Embeddings
    detector: Detector | None


class Store(Protocol):
    """Where finished trials are put."""

    def put(self, trial: int, scores: torch.Tensor, embeddings: Embeddings, detector: Detector) -> str:
        """Keep a trial, whole or not at all, and return its address."""

    def adopt(self, trial: int, folder: Path) -> str:
        """Keep a trial that another process has put into a folder, as `put`; the folder stays."""

    def drop_detectors(self, trials: Collection[int]) -> None:
        """Forget the detectors of these trials."""


class FolderStore:
    """Trials under ROOT/trial-00007/: arrays.npz (train, augmented, unlabeled, scores) and detector/."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        # Trials that this process has seen without a detector: after each trial nearly all others are to be
        # without, and to look for 500 folders takes some 3 ms.
        self._bare: set[int] = set()

    def put(self, trial: int, scores: torch.Tensor, embeddings: Embeddings, detector: Detector) -> str:
        partial = self._cleared(trial)
        partial.mkdir(parents=True)
        np.savez(
            partial / _ARRAYS_FILE,
            train=embeddings.train.numpy(),
            augmented=embeddings.augmented.numpy(),
            unlabeled=embeddings.unlabeled.numpy(),
            scores=scores.numpy(),
        )
        detector.save(partial / _DETECTOR_FOLDER)
        return self._published(trial, partial)

    def adopt(self, trial: int, folder: Path) -> str:
        partial = self._cleared(trial)
        shutil.copytree(folder, partial)
        return self._published(trial, partial)

    def _cleared(self, trial: int) -> Path:
        """Where a trial is put together, with nothing of an earlier attempt left."""
        self.discard(trial)
        return trial_folder(self.root, trial).with_name(trial_folder(self.root, trial).name + ".partial")

    def _published(self, trial: int, partial: Path) -> str:
        os.replace(partial, trial_folder(self.root, trial))
        return str(trial_folder(self.root, trial))

    def drop_detectors(self, trials: Collection[int]) -> None:
        for trial in set(trials) - self._bare:
            folder = trial_folder(self.root, trial) / _DETECTOR_FOLDER
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                self._bare.add(trial)

    def discard(self, trial: int) -> None:
        """Remove whatever an interrupted trial left."""
        self._bare.discard(trial)
        folder = trial_folder(self.root, trial)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)


class MemoryStore:
    """The best few trials in this process's memory; a trial whose detector is dropped is forgotten."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.trials: dict[int, Kept] = {}
        _memory_stores[self.name] = self

    def put(self, trial: int, scores: torch.Tensor, embeddings: Embeddings, detector: Detector) -> str:
        self.trials[trial] = Kept(scores.numpy(), embeddings, detector)
        return f"{_MEMORY_SCHEME}{self.name}/{trial}"

    def adopt(self, trial: int, folder: Path) -> str:
        kept = open_kept(str(folder))
        assert kept.detector is not None  # every put has one
        return self.put(trial, torch.from_numpy(kept.scores), kept.embeddings, kept.detector)

    def drop_detectors(self, trials: Collection[int]) -> None:
        for trial in trials:
            self.trials.pop(trial, None)

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[()]]:
        return MemoryStore, ()  # a copy in another process starts empty: memory cannot be shared


_memory_stores: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()


def trial_folder(root: Path, trial: int) -> Path:
    return root / f"trial-{trial:05d}"


def open_kept(address: str, device: str | torch.device = "cpu") -> Kept:
    """Read what was kept of a trial.

    Args:
        address: from the trial's user attribute "artifacts".
        device: where the detector goes.

    Raises:
        FileNotFoundError: if it is no longer there; the message says why.
    """
    if address.startswith(_MEMORY_SCHEME):
        name, _, trial = address.removeprefix(_MEMORY_SCHEME).partition("/")
        store = _memory_stores.get(name)
        if store is None or int(trial) not in store.trials:
            raise FileNotFoundError(
                f"trial {trial}: nothing of it is kept in this process (only the best few are); "
                "give the objective an artifacts folder to keep every trial"
            )
        return store.trials[int(trial)]
    folder = Path(address)
    if not (folder / _ARRAYS_FILE).is_file():
        raise FileNotFoundError(f"{folder}: the trial's artifacts are gone; was the folder moved?")
    with np.load(folder / _ARRAYS_FILE) as arrays:
        sets = [torch.from_numpy(arrays[name]) for name in ("train", "augmented", "unlabeled")]
        scores = arrays["scores"]
    detector_folder = folder / _DETECTOR_FOLDER
    detector = Detector.load(detector_folder, device) if detector_folder.is_dir() else None
    return Kept(scores, Embeddings(*sets), detector)


def load_scores(address: str) -> np.ndarray:
    """The (N_test,) anomaly scores alone; see `open_kept`."""
    if address.startswith(_MEMORY_SCHEME):
        return open_kept(address).scores
    with np.load(Path(address) / _ARRAYS_FILE) as arrays:
        return arrays["scores"]
