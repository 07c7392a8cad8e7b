"""One detector: train it, embed images with it, score them, keep it on disk.

A detector learns to tell normal images from augmented ones and scores an image by the Mahalanobis distance
of its embedding to a Gaussian fitted to the train embeddings, as in DSV (Yoo et al., ECML PKDD 2023,
section 2.1).
"""

from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.detector.kept import is_detector
from ssad_hpo.detector.model import (
    Detector,
    Embeddings,
    Transform,
    pseudo_anomalies,
    untrained_network,
)
from ssad_hpo.detector.patches import PatchDensity, fit_patches, image_scores, images_of_fit, maps_of
from ssad_hpo.detector.training import Checkpoint, train, untrained_detector
from ssad_hpo.numerics import check_device, resolve_precision

__all__ = [
    "Checkpoint",
    "Detector",
    "Embeddings",
    "PatchDensity",
    "Transform",
    "check_device",
    "fit_gaussian",
    "fit_patches",
    "image_scores",
    "images_of_fit",
    "is_detector",
    "maps_of",
    "pseudo_anomalies",
    "resolve_precision",
    "train",
    "untrained_detector",
    "untrained_network",
]
