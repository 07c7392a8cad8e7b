"""Files of exported detectors."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ssad_hpo.combined import CombinedDetector
from ssad_hpo.detector import Detector
from ssad_hpo.export.module import ScoringModule
from ssad_hpo.files import replaced, unwritable
from ssad_hpo.quiet import without_warnings

OPSET = 20  # of ONNX: 1.15 and later read it (November 2023), as do OpenVINO and TensorRT of today
_NEEDED = ("onnx", "onnxscript")
_FACTS_FILE = "ssad_hpo.json"


def facts_of(detector: Detector | CombinedDetector) -> dict[str, str]:
    """What a program must know to use a detector: the metadata of exported files, as texts."""
    channels, height, width = detector.image_shape
    if isinstance(detector, CombinedDetector):
        score = f"combined of {len(detector.detectors)}"
    else:
        score = detector.training.score
    calibration = detector.calibration
    alarms = {}
    if calibration is not None:
        alarms = {
            "alarm_rate": repr(calibration.usual_rate),
            "alarm_threshold": repr(calibration.threshold(calibration.usual_rate)),
            "alarm": "where the score is above alarm_threshold",
        }
    return {
        "image_height": str(height),
        "image_width": str(width),
        "image_channels": str(channels),
        "input": "uint8 (N, C, H, W), as read; normalisation is inside",
        "resize": "Pillow's BILINEAR with antialiasing; see ssad_hpo.export.prepare",
        "output": "float32 (N,), anomaly scores; higher is more anomalous",
        "score": score,
        **alarms,
    }


def export_onnx(detector: Detector | CombinedDetector, path: Path) -> None:
    """Write a detector as an ONNX file of opset 20: input `images`, output `scores`, of any batch size.

    Its metadata are those of `facts_of`; how images are to be read says `prepare`.

    It computes in float32. A detector of precision bfloat16 rounds its own scores more coarsely; see
    `ScoringModule` for how much. Of such a one a UserWarning says so.

    Args:
        detector: with its density.
        path: of the file, which is written whole or not at all.

    Raises:
        ValueError: where onnx or onnxscript is not installed, or the encoder has what ONNX lacks.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"onnx: {' and '.join(missing)} are needed; pip install 'ssad-hpo[onnx]'")
    module, images = _module(detector), _example(detector)
    with _quiet(), _whole(path, "ONNX") as partial:
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        program.model.metadata_props.update(facts_of(detector))
        program.save(partial)


def export_torch(detector: Detector | CombinedDetector, path: Path) -> None:
    """Write a detector as a program of PyTorch, which `torch.export.load(path).module()` gives back.

    It runs where PyTorch is and ssad_hpo is not. Its facts (see `facts_of`) are the extra file ssad_hpo.json.

    It computes in float32. A detector of precision bfloat16 rounds its own scores more coarsely; see
    `ScoringModule` for how much. Of such a one a UserWarning says so.

    Args:
        detector: with its density.
        path: of the file, which is written whole or not at all.

    Raises:
        ValueError: if the encoder cannot be exported.
    """
    module, images = _module(detector), _example(detector)
    with _quiet(), _whole(path, "PyTorch's format") as partial:
        program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.export.save(program, buffer, extra_files={_FACTS_FILE: json.dumps(facts_of(detector))})
        partial.write_bytes(buffer.getbuffer())


FORMATS: dict[str, Callable[[Detector | CombinedDetector, Path], None]] = {
    "onnx": export_onnx,
    "torch": export_torch,
}


def _module(detector: Detector | CombinedDetector) -> ScoringModule:
    """What is exported, with a warning where the detector's own scores will differ."""
    members = detector.detectors if isinstance(detector, CombinedDetector) else (detector,)
    if any(member.training.precision == "bfloat16" for member in members):
        warnings.warn(
            "the file computes in float32, this detector in bfloat16: scores of new images differ, half of "
            "them by more than 0.1 to 6 %, single ones by up to a third; a search with precision float32 "
            "(--precision float32) ends with a detector whose file has its very scores",
            stacklevel=3,
        )
    return ScoringModule(detector)


def _example(detector: Detector | CombinedDetector) -> Tensor:
    return torch.zeros(2, *detector.image_shape, dtype=torch.uint8)  # of one, 1 would be taken for fixed


@contextmanager
def _whole(path: Path, what: str) -> Iterator[Path]:
    """A file beside `path` that takes its place in the end."""
    if (reason := unwritable(path)) is not None:
        raise ValueError(f"{path}: {reason}")
    try:
        with replaced(path) as partial:
            yield partial
    except OSError:
        raise
    except Exception as error:  # of PyTorch's exporters: no two alike
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"export: this encoder cannot be written in {what} ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of what does not concern a user. Several threads export one after the other."""
    log = logging.getLogger("torch.onnx")
    with without_warnings():  # whose lock guards the level of logs as well
        level, method = log.level, multiprocessing.get_start_method(allow_none=True)
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
            # A progress bar's lock chooses one, after which the user's own choice would be an error.
            multiprocessing.set_start_method(method, force=True)
