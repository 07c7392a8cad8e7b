"""A detector as MLflow serves it: image files in a column of a table in, scores and decisions out.

MLflow calls `_load_pyfunc` of this module, a copy of which, with the rest of ssad_hpo, is part of every
logged model: ssad_hpo need not be installed where the model is served. What must be is in `requirements`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssad_hpo.bounds import whole
from ssad_hpo.combined import CombinedDetector, is_combined
from ssad_hpo.data import WHOLE_DEPTH, DataError, read_contents
from ssad_hpo.detector import Detector
from ssad_hpo.files import read_json, reading

if TYPE_CHECKING:
    import pandas as pd

COLUMN = "image"
SERVING_FILE = "serving.json"
_BATCH = 64


def requirements(encoder: str) -> list[str]:
    """The packages, beside MLflow itself, that serving detectors of an encoder takes, by name."""
    libraries = [] if encoder == "small" else ["timm", "torchvision"]
    return ["numpy", "pandas", "pillow", "safetensors", *libraries, "torch"]


class Served:
    """A loaded detector, which answers MLflow's calls."""

    def __init__(self, detector: Detector | CombinedDetector, bit_depth: int) -> None:
        self.detector, self.bit_depth = detector, bit_depth

    def predict(self, table: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Anomaly scores of images, higher is more anomalous, and what is decided by them.

        Args:
            table: with a column `image`: files (PNG, JPEG, ...) as bytes, or as texts in base64.
            params: `alarm_rate`, the share of normal images that may raise an alarm; see `Calibration`.

        Returns:
            A table with the index of `table` and the column `score`; of a detector with a calibration also
            `p_value`, 0..1, and `decision`, "alarm" or "good".

        Raises:
            ValueError: if the column is missing, an image cannot be read (the message has its row), or for
                an alarm rate that cannot be kept.
        """
        import pandas as pd

        if COLUMN not in table:
            raise ValueError(f"expected a column {COLUMN!r}, got {', '.join(map(str, table.columns))}")
        contents = [_content(row, value) for row, value in enumerate(table[COLUMN])]
        scores = self._scores(contents)
        answer, calibration = {"score": scores}, self.detector.calibration
        if calibration is not None:
            rate, values = (params or {}).get("alarm_rate", calibration.usual_rate), torch.from_numpy(scores)
            answer["p_value"] = calibration.p_values(values).numpy()
            answer["decision"] = np.where(calibration.alarms(values, rate), "alarm", "good")
        return pd.DataFrame(answer, index=table.index)

    def _scores(self, contents: Sequence[bytes]) -> np.ndarray:
        channels, height, width = self.detector.image_shape
        scores = [np.zeros(0)]
        for start in range(0, len(contents), _BATCH):
            some, shape = contents[start : start + _BATCH], (channels, height, width)
            try:
                images = read_contents(some, shape, bit_depth=self.bit_depth, first=start)
            except DataError as error:
                raise ValueError(str(error)) from error
            scores.append(self.detector.score(torch.from_numpy(images)).numpy())
        return np.concatenate(scores)


def _content(row: int, value: object) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise ValueError(f"{COLUMN} {row}: expected a file's bytes, or base64, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:  # binascii's among them
        raise ValueError(f"{COLUMN} {row}: is not base64 ({error})") from error


def _load_pyfunc(path: str) -> Served:
    folder = Path(path)
    with reading(folder, "cannot be read as a served detector", "log the model again"):
        bit_depth = read_json(folder / SERVING_FILE)["bit_depth"]
        whole("bit_depth", bit_depth, 8, WHOLE_DEPTH)
    load = CombinedDetector.load if is_combined(folder) else Detector.load
    return Served(load(folder), bit_depth)
