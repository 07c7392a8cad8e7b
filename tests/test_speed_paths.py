"""What keeps a training fast and cannot be timed in a test: no waiting for the device, no heavy imports.

A GPU works while the host already prepares what comes next, until the host asks for a value. Without a
GPU, the operations that ask are counted as they are dispatched; with one, CUDA itself reports them.
"""

import os
import platform
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from ssad_hpo.augment import KINDS, augment, jitter
from ssad_hpo.data import builtin, load, read_labels
from ssad_hpo.detector import Detector, train
from ssad_hpo.judgement import evaluations
from ssad_hpo.task import Augmentation, Training

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHORT = Training(width=4, steps=8, batch_size=4, evaluate_at=(0.25, 1.0))  # 2 steps, then 6
PATCH = {"patch_area": 0.05, "patch_aspect": 1.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(n, channels=1, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, size, size), generator=generator).to(torch.uint8)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU: values asked for, shapes that depend on
    values, and tensors made of the host's numbers, which have to be copied to the device."""

    ASKING = frozenset(
        "_local_scalar_dense equal is_nonzero nonzero masked_select _unique2 unique_dim unique_consecutive "
        "bincount repeat_interleave lift_fresh".split()
    )

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in self.ASKING or by_mask:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0.5],
        lambda x: x.masked_fill_(x > 0.5, 0).nonzero(),
        lambda x: x * torch.tensor([0.5]),
        lambda x: x.repeat_interleave(torch.arange(len(x)), 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.index_put_((x > 0.5,), torch.zeros(())),
        lambda x: x.unique(),
    ],
    ids=["float", "item", "bool", "mask", "nonzero", "host", "repeats", "equal", "put", "unique"],
)
def test_an_operation_that_waits_is_seen(asks):
    with Waits() as waits:
        asks(torch.rand(4, 4))
    assert waits.seen


CASES = [
    *(("small", channels, Augmentation(kind)) for channels in (1, 3) for kind in KINDS),
    *(("small", 1, Augmentation(kind, PATCH)) for kind in ("cutout", "cutavg", "cutdiff")),
    ("small", 1, Augmentation("rotation", {"angle": 90.0})),
    ("resnet18", 1, Augmentation("cutpaste", PATCH)),
]


@pytest.mark.parametrize(("encoder", "channels", "augmentation"), CASES, ids=str)
def test_a_training_asks_for_a_value_once_a_checkpoint_and_never_in_a_step(encoder, channels, augmentation):
    checkpoints = train(pixels(8, channels), augmentation, replace(SHORT, encoder=encoder))
    next(checkpoints)
    with Waits() as waits:
        next(checkpoints)  # six steps
    assert waits.seen == {"_local_scalar_dense": 1}  # the mean loss


@pytest.mark.parametrize("contamination", [None, 0.2])
def test_embedding_asks_only_whether_all_is_finite_however_many_images_there_are(contamination):
    *_, last = train(pixels(8), Augmentation("cutavg"), replace(SHORT, contamination=contamination))
    for n in (8, 600):  # one block and three
        with Waits() as waits:
            last.detector.embed_augmented(pixels(n))
            last.detector.embed(pixels(n))
        assert waits.seen["_local_scalar_dense"] + waits.seen["is_nonzero"] == 2, waits.seen


ALLOCATING = """
import torch
from ssad_hpo.numerics import prepare_allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

prepare_allocator(torch.device("cpu"), pixels={pixels})
torch.ones(8 << 20, dtype=torch.uint8)
before = resident()
torch.ones(64 << 20, dtype=torch.uint8)
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose options are set")
@pytest.mark.parametrize(
    ("pixels", "environment", "kept"),
    [
        (256 * 256, {}, True),
        (64 * 64, {}, False),
        (256 * 256, {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
    ],
    ids=["large images", "small images", "the user's own options"],
)
def test_memory_is_kept_for_the_next_step_with_large_images_unless_the_user_set_malloc(
    pixels, environment, kept
):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    program = ALLOCATING.format(pixels=pixels)
    environment = {**inherited, **environment, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(ended.stdout) > 48) == kept  # of 64 MiB


# With a GPU


@on_cuda
@pytest.mark.parametrize(("encoder", "channels", "augmentation"), CASES, ids=str)
def test_cuda_itself_reports_one_wait_a_checkpoint(encoder, channels, augmentation):
    checkpoints = train(pixels(8, channels), augmentation, replace(SHORT, encoder=encoder), "cuda")
    next(checkpoints)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(checkpoints)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # "called a synchronizing CUDA operation"; that the mode is a prototype is said once a process as well.
    waits = [str(w.message) for w in heard if str(w.message).startswith("called a synchronizing")]
    assert len(waits) == 1, waits


@on_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_and_jittered_images_stay_on_the_gpu(kind, channels):
    images = torch.rand(4, channels, 32, 32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for changed in (augment(images, Augmentation(kind), generator), jitter(images, 0.1, generator)):
        assert changed.device == images.device and changed.dtype == images.dtype
        assert changed.shape == images.shape and 0 <= changed.min() <= changed.max() <= 1


@on_cuda
def test_the_noise_of_a_generator_on_the_cpu_changes_images_on_the_gpu_as_it_does_on_the_cpu():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        here, there = (
            augment(images.to(device), Augmentation(kind), torch.Generator().manual_seed(1)).cpu()
            for device in ("cpu", "cuda")
        )
        # A pixel whose centre lies on a patch's edge may fall on either side of it.
        assert (here - there).abs().gt(1e-3).float().mean() < 0.01, kind


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_detector_on_the_gpu(precision):
    images = pixels(16, 3)
    twice = []
    for _ in range(2):
        *_, last = train(images, Augmentation("cutpaste"), replace(SHORT, precision=precision), "cuda")
        twice.append((last.loss, last.detector.embed(images), last.detector.embed_augmented(images)))
    (loss, *first), (again, *second) = twice
    assert loss == again and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_cuda
def test_a_training_on_the_gpu_gives_finite_criteria_and_about_the_auc_of_the_cpu():
    source = builtin("gravel/cutavg")
    task, truth = load(source), read_labels(source)
    training = Training(steps=150, evaluate_at=(0.5, 1.0), precision="float32")
    aucs = []
    for device in ("cpu", "cuda"):
        for evaluation in evaluations(task, Augmentation("cutavg", PATCH), training, device):
            assert np.isfinite(list(evaluation.criteria.values())).all()
        evaluation.detector.fit_density(evaluation.embeddings.train)
        scores = evaluation.detector.density_score(evaluation.embeddings.unlabeled)
        aucs.append(roc_auc_score(truth, scores))
    assert aucs[0] == pytest.approx(aucs[1], abs=0.1)  # other random numbers: another training


@on_cuda
def test_a_detector_trained_on_the_gpu_scores_alike_on_the_cpu(tmp_path):
    images = pixels(16)
    *_, last = train(images, Augmentation("cutout"), replace(SHORT, precision="float32"), "cuda")
    last.detector.fit_density(last.detector.embed(images))
    last.detector.save(tmp_path)
    here, there = Detector.load(tmp_path).embed(images), last.detector.embed(images)
    torch.testing.assert_close(here, there, atol=1e-2, rtol=0)  # convolutions may round to TF32 there


# Imports

HEAVY = {
    "torch",
    "torchvision",
    "optuna",
    "ray",
    "mlflow",
    "matplotlib",
    "sklearn",
    "skimage",
    "scipy",
    "PIL",
}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import ssad_hpo", set()),
        ("from ssad_hpo import SearchSpace, Training, Task", {"torch", "optuna"}),
        ("from ssad_hpo import load_folder", {"torch", "PIL"}),
        ("from ssad_hpo import Objective, select", {"torch", "optuna", "scipy"}),
    ],
)
def test_an_import_brings_only_the_libraries_that_it_needs(statement, allowed):
    program = f"{statement}\nimport sys\nprint(*{HEAVY!r} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) <= allowed
