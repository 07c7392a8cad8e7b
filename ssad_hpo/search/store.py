"""What is kept of a finished trial: its scores, its embeddings, and the detectors of the best.

Two stores with one face: a folder, and the memory of this process. Both give an address, a string that
fits into a trial's record, from which `open_kept` reads. A trial is kept under a name that no other trial
has, be it of another study: one store may serve several.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import uuid
import weakref
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from ssad_hpo.bounds import MOST_ARRAY_BYTES
from ssad_hpo.calibration import Calibration
from ssad_hpo.criteria import check_rows, check_sets
from ssad_hpo.detector import Detector, Embeddings
from ssad_hpo.files import check_archive, reading
from ssad_hpo.judgement import Judged

SETS = ("train", "augmented", "unlabeled")
SCORES = "scores"
# Embeddings and scores of held-out images, where there are such.
HELD_OUT, HELD_OUT_SCORES = "held_out", "held_out_scores"
_ARRAYS_FILE, _DETECTOR_FOLDER = "arrays.npz", "detector"
_MEMORY_SCHEME = "memory:"
_FROZEN_NAME = "frozen_name"  # a user attribute of a study
_REMEDY = "restore it from a copy, or search again"


@dataclass(frozen=True)
class Kept:
    """What remains of a trial.

    Attributes:
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous.
        embeddings: the sets that its criteria were computed from.
        detector: None where the trial was not among the best.
        held_out: (N_held,) anomaly scores of held-out normal images; None where there are none.
    """

    scores: np.ndarray
    embeddings: Embeddings
    detector: Detector | None
    held_out: np.ndarray | None = None


class Store(Protocol):
    """Where finished trials are put."""

    def put(self, name: str, judged: Judged, detector: Detector) -> str:
        """Keep a trial under a name of its own, whole or not at all, and return its address."""

    def adopt(self, name: str, folder: Path) -> str:
        """Keep a trial that another process has put into a folder, as `put`; the folder stays."""

    def drop_detectors(self, addresses: Collection[str]) -> None:
        """Forget the detectors of these trials."""

    def discard(self, name: str) -> None:
        """Remove whatever an interrupted trial left."""


class FolderStore:
    """Trials under ROOT/NAME/: arrays.npz (as `read_arrays` has them) and detector/."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        # Trials that this process has seen without a detector: after each trial nearly all others are to be
        # without, and looking for their folders made a search slower with every trial.
        self._bare: set[str] = set()

    def put(self, name: str, judged: Judged, detector: Detector) -> str:
        partial = self._cleared(name)
        partial.mkdir(parents=True)
        write_trial(partial, judged, detector)
        return self._published(name, partial)

    def adopt(self, name: str, folder: Path) -> str:
        partial = self._cleared(name)
        shutil.copytree(folder, partial)
        return self._published(name, partial)

    def _cleared(self, name: str) -> Path:
        """Where a trial is put together, with nothing of an earlier attempt left."""
        self.discard(name)
        return self.root / (name + ".partial")

    def _published(self, name: str, partial: Path) -> str:
        os.replace(partial, self.root / name)
        return str(self.root / name)

    def drop_detectors(self, addresses: Collection[str]) -> None:
        for address in set(addresses) - self._bare:
            folder = self.root / Path(address).name / _DETECTOR_FOLDER
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                self._bare.add(address)

    def discard(self, name: str) -> None:
        self._bare.discard(str(self.root / name))
        shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.rmtree(self.root / (name + ".partial"), ignore_errors=True)


class MemoryStore:
    """The best few trials in this process's memory; a trial whose detector is dropped is forgotten."""

    def __init__(self) -> None:
        self._prefix = f"{_MEMORY_SCHEME}{uuid.uuid4().hex}/"
        self.trials: dict[str, Kept] = {}
        _memory_stores[self._prefix] = self

    def put(self, name: str, judged: Judged, detector: Detector) -> str:
        held_out = None if judged.held_out is None else judged.held_out.numpy()
        self.trials[name] = Kept(judged.scores.numpy(), judged.embeddings, detector, held_out)
        return self._prefix + name

    def adopt(self, name: str, folder: Path) -> str:
        kept = open_kept(str(folder))
        assert kept.detector is not None  # every put has one
        self.trials[name] = kept
        return self._prefix + name

    def drop_detectors(self, addresses: Collection[str]) -> None:
        for address in addresses:
            self.trials.pop(address.removeprefix(self._prefix), None)

    def discard(self, name: str) -> None:
        self.trials.pop(name, None)

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[()]]:
        return MemoryStore, ()  # a copy in another process starts empty: memory cannot be shared


_memory_stores: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()


def write_trial(folder: Path, judged: Judged, detector: Detector) -> None:
    """Write what is kept of a trial into an empty folder."""
    sets = judged.embeddings
    arrays = {name: getattr(sets, name) for name in (*SETS, HELD_OUT)}
    arrays |= {SCORES: judged.scores, HELD_OUT_SCORES: judged.held_out}
    np.savez(
        folder / _ARRAYS_FILE, **{n: tensor.numpy() for n, tensor in arrays.items() if tensor is not None}
    )
    detector.save(folder / _DETECTOR_FOLDER)


def trial_name(study: optuna.Study, trial: optuna.trial.BaseTrial | FrozenTrial) -> str:
    """A name for what is kept of a trial: "trial-00007-" and digits that tell apart trials of two studies."""
    facts = f"{study.study_name} {trial.number} {trial.datetime_start}"
    return f"trial-{trial.number:05d}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def frozen_name(study: optuna.Study) -> str:
    """A name for what is kept of the encoder as it comes; after a kill the study still knows it."""
    name = str(study.user_attrs.get(_FROZEN_NAME, f"frozen-{uuid.uuid4().hex[:8]}"))
    study.set_user_attr(_FROZEN_NAME, name)
    return name


def open_kept(address: str, device: str | torch.device = "cpu", *, arrays_alone: bool = False) -> Kept:
    """Read what was kept of a trial.

    Args:
        arrays_alone: leave its detector on the disk.

    Raises:
        FileNotFoundError: if it is no longer there; the message says why.
    """
    if address.startswith(_MEMORY_SCHEME):
        prefix, _, name = address.rpartition("/")
        store = _memory_stores.get(prefix + "/")
        if store is None or name not in store.trials:
            kind, _, rest = name.partition("-")
            who = f"trial {int(rest.partition('-')[0])}" if kind == "trial" else "the encoder as it comes"
            raise FileNotFoundError(
                f"{who}: nothing of it is kept in this process (only the best few "
                "are); give the objective an artifacts folder to keep every trial"
            )
        return store.trials[name]
    folder = Path(address)
    arrays = read_arrays(_arrays_of(address), _REMEDY)
    sets = {n: torch.from_numpy(arrays[n]) for n in (*SETS, HELD_OUT) if n in arrays}
    detector_folder = folder / _DETECTOR_FOLDER
    wanted = not arrays_alone and detector_folder.is_dir()
    detector = Detector.load(detector_folder, device) if wanted else None
    held_out = arrays.get(HELD_OUT_SCORES)
    if detector is not None and detector.calibration is None and held_out is not None:
        detector.calibration = Calibration(torch.from_numpy(held_out))  # detectors had none of their own once
    return Kept(arrays[SCORES], Embeddings(**sets), detector, held_out)


def keep_patches(address: str, detector: Detector) -> None:
    """Keep with a trial what its detector has learned for heat maps since it was kept."""
    if detector.patches is not None and not address.startswith(_MEMORY_SCHEME):
        detector.patches.save(detector_folder(address))


def keeps_detector(address: str) -> bool:
    """Whether a trial's detector was kept."""
    if address.startswith(_MEMORY_SCHEME):
        return open_kept(address).detector is not None
    return detector_folder(address).is_dir()


def detector_folder(address: str) -> Path:
    """Where a store of folders has a trial's detector."""
    return Path(address) / _DETECTOR_FOLDER


def _arrays_of(address: str) -> Path:
    path = Path(address) / _ARRAYS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{address}: the trial's artifacts are gone; was the folder moved?")
    return path


def load_scores(address: str) -> np.ndarray:
    """The (N_test,) anomaly scores alone; see `open_kept`."""
    if address.startswith(_MEMORY_SCHEME):
        return open_kept(address).scores
    return read_arrays(_arrays_of(address), _REMEDY, names=(SCORES,), optional=())[SCORES]


def read_arrays(
    path: Path,
    remedy: str,
    names: Collection[str] = (*SETS, SCORES),
    optional: Collection[str] = (HELD_OUT, HELD_OUT_SCORES),
    max_bytes: int = MOST_ARRAY_BYTES,
) -> dict[str, NDArray[np.floating]]:
    """Arrays by name, as floating-point numbers; never unpickles.

    Args:
        remedy: for the message, if it cannot be used.
        names: of what must be there: the three sets, (N, D) each, or scores, one for each unlabelled sample.
        optional: what is read if it is there; of held-out samples embeddings (N, D) and scores (N,).
        max_bytes: of all arrays in the file.

    Raises:
        FileError: if it is no such file, lacks an array, or holds one of another type or shape, one whose
            numbers are not finite or whose rows are all the same. OSError: if it cannot be opened.
    """
    with reading(path, "cannot be read as an npz file of arrays", remedy):
        check_archive(path, max_bytes)
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*names, *optional) if name in file}
    with reading(path, "cannot be read as embeddings and scores", remedy):
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"expected arrays train, augmented and unlabeled, without {missing[0]}")
        for name, array in arrays.items():
            if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
                raise ValueError(f"{name}: expected real numbers, got {array.dtype}")
            if array.dtype not in (np.float32, np.float64):
                arrays[name] = array.astype(np.float64)
        if all(name in arrays for name in SETS):
            check_sets(*(torch.from_numpy(arrays[name]) for name in SETS))
        _check_scores(arrays, SCORES, "unlabeled", "unlabelled")
        _check_scores(arrays, HELD_OUT_SCORES, HELD_OUT, "held-out")
        if HELD_OUT in arrays and "train" in arrays:
            check_rows(HELD_OUT, torch.from_numpy(arrays[HELD_OUT]), arrays["train"].shape[-1])
    return arrays


def _check_scores(arrays: dict[str, NDArray[np.floating]], name: str, rows: str, kind: str) -> None:
    """Raise ValueError for scores that are not finite, or not one for each of the embeddings `rows`."""
    if (scores := arrays.get(name)) is None:
        return
    samples = len(arrays[rows]) if rows in arrays else scores.size
    if scores.shape != (samples,):
        raise ValueError(f"{name}: expected one for each of {samples} {kind} samples, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _check_sizes(path: Path) -> None:
    """Raise ValueError for an array that declares another size than it has, before room is made for it."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                declared, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
            if declared != there and not dtype.hasobject:  # objects are refused by numpy
                raise ValueError(f"{member.filename} declares {declared} bytes and has {there}")
