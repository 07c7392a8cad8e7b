"""The networks: a small residual encoder, torchvision's and timm's by name, and the head for training.

An encoder maps normalised images (N, C, H, W) to features (N, D) and tells D as `features`; a network
takes images in [0, 1] and normalises them itself.
"""

from ssad_hpo.encoder.frozen import FrozenOutputs, FrozenStages
from ssad_hpo.encoder.maps import features_and_maps, map_sizes, map_strides
from ssad_hpo.encoder.named import NamedEncoder
from ssad_hpo.encoder.network import (
    Network,
    build_network,
    draws,
    given_weights,
    memory_format_of,
    network_shapes,
)
from ssad_hpo.encoder.small import SmallEncoder
from ssad_hpo.encoder.weights import NONE, digest_of

__all__ = [
    "NONE",
    "FrozenOutputs",
    "FrozenStages",
    "NamedEncoder",
    "Network",
    "SmallEncoder",
    "build_network",
    "digest_of",
    "draws",
    "features_and_maps",
    "given_weights",
    "map_sizes",
    "map_strides",
    "memory_format_of",
    "network_shapes",
]
