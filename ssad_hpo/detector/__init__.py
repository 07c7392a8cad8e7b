"""One detector: train it, embed images with it, score them, keep it on disk.

A detector learns to tell normal images from augmented ones and scores an image by the Mahalanobis distance
of its embedding to a Gaussian fitted to the train embeddings, as in DSV (Yoo et al., ECML PKDD 2023,
section 2.1).
"""

from ssad_hpo.detector.density import fit_gaussian
from ssad_hpo.detector.kept import is_detector
from ssad_hpo.detector.model import Detector, Embeddings
from ssad_hpo.detector.patches import PatchDensity, image_scores, maps_of
from ssad_hpo.detector.training import Checkpoint, train, untrained_detector, untrained_network
from ssad_hpo.detector.transform import Transform, pseudo_anomalies
from ssad_hpo.numerics import check_device, resolve_precision

__all__ = [
    "Checkpoint",
    "Detector",
    "Embeddings",
    "PatchDensity",
    "Transform",
    "check_device",
    "fit_gaussian",
    "image_scores",
    "is_detector",
    "maps_of",
    "pseudo_anomalies",
    "resolve_precision",
    "train",
    "untrained_detector",
    "untrained_network",
]
