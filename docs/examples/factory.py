"""A factory's engineer: good images and a stream in, alarms out, in Python.

    python docs/examples/factory.py [GOOD STREAM NEW]     three minutes with the example's images

Without folders of its own it makes the example's.
"""

import sys
from pathlib import Path

import torch

import ssad_hpo
from ssad_hpo.data.example import write_example
from ssad_hpo.task import PRETRAINED

if len(sys.argv) == 4:
    good, stream, new = map(Path, sys.argv[1:])
else:
    images = Path("images")
    if not images.exists():
        write_example(images)
    good, stream, new = images / "good", images / "stream", images / "new"

source = ssad_hpo.Source(
    "folders", {"train": str(good), "unlabeled": str(stream), "image_size": 64, "held_out_share": 0.25}
)
search = ssad_hpo.Search(["cutdiff", "cutpaste"], criterion="shift", n_trials=4, combine=4)
# What `ssad-hpo search` begins with, judged at its end alone.
training = PRETRAINED
result = ssad_hpo.run_study(source, search, training, tracking_uri=None)
print(result)
print("a stream without anomalies would look like this with p =", result.evidence.p_anomalies)

detector = result.detector()  # the combined one, or the encoder as it comes where no anomaly is seen
paths, scores = zip(*ssad_hpo.score_images(detector, [new]), strict=True)
p_values = detector.calibration.p_values(torch.tensor(scores))
rate = detector.calibration.usual_rate  # 0.05, or the least that so few held-out images can keep
for path, p_value in sorted(zip(paths, p_values.tolist(), strict=True), key=lambda pair: pair[1])[:10]:
    print(f"{path}  p = {p_value:.3f}  {'alarm' if p_value <= rate else 'good'}")
