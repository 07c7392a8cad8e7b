"""What the self-supervised detectors are compared with: an autoencoder, Deep SVDD, random augmentations.

The autoencoder and Deep SVDD are trained on normal images alone: no augmented ones, and no color jitter,
since showing the data as it is is all that they do. Once trained they score images as a detector does.
Of a `Training` they take encoder, width, steps, batch size, weight decay and seed. They have a learning
rate of their own, since Adam's is not SGD's, and always compute in float32: bfloat16 is coarser than the
distances that they score.

Random static (RS-) and random dynamic (RD-) are detectors trained with `random_static(kind, seed)` and
with `Augmentation(kind)`, whose default ranges are drawn anew for every image.
"""

from ssad_hpo.baselines.autoencoder import Autoencoder, train_autoencoder
from ssad_hpo.baselines.deep_svdd import DeepSvdd, train_deep_svdd
from ssad_hpo.baselines.static import random_static

__all__ = [
    "Autoencoder",
    "DeepSvdd",
    "random_static",
    "train_autoencoder",
    "train_deep_svdd",
]
