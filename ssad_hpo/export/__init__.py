"""Detectors for other programs: as one module from images to scores, in ONNX's and PyTorch's formats."""

from ssad_hpo.export.files import FORMATS, OPSET, export_onnx, export_torch, facts_of
from ssad_hpo.export.module import ScoringModule
from ssad_hpo.export.preparing import prepare

__all__ = [
    "FORMATS",
    "OPSET",
    "ScoringModule",
    "export_onnx",
    "export_torch",
    "facts_of",
    "prepare",
]
