"""The hot functions, timed: `make bench`. Not part of `make test`, where timings would mean nothing.

Each is called with what a step or an evaluation at the demo's size or at the paper's size gives it, on one
thread: several would wait for each other wherever something else needs a core.
"""

import subprocess
import sys

import pytest
import torch

from ssad_hpo.augment import KINDS, augment, jitter
from ssad_hpo.consensus import mc
from ssad_hpo.criteria import evaluate_all
from ssad_hpo.detector import Checkpoint, train
from ssad_hpo.task import Augmentation, Training

DEMO, PAPER = (32, 1, 64, 64), (32, 3, 256, 256)
SHAPES = pytest.mark.parametrize("shape", [DEMO, PAPER], ids=["64px-grey", "256px-rgb"])
CUTPASTE = Augmentation("cutpaste", {"patch_area": 0.05, "patch_aspect": 1.0})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=seeded()).to(torch.uint8)


def unit_rows(n: int, features: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, features, generator=seeded()), dim=1)


@SHAPES
def test_jitter(benchmark, shape):
    images, generator = torch.rand(shape, generator=seeded()), seeded()
    benchmark(jitter, images, 0.1, generator)


@SHAPES
@pytest.mark.parametrize("kind", KINDS)
def test_augment(benchmark, kind, shape):
    images, generator = torch.rand(shape, generator=seeded()), seeded()
    benchmark(augment, images, Augmentation(kind), generator)


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [("small", DEMO), ("small", (32, 3, 128, 128)), ("resnet18", (32, 3, 64, 64))],
    ids=["small-64px", "small-128px", "resnet18-64px"],
)
def test_five_training_steps(benchmark, encoder, shape):
    settings = Training(encoder, steps=35, evaluate_at=tuple(n / 7 for n in range(1, 8)))
    checkpoints = train(pixels(128, *shape[1:]), CUTPASTE, settings)
    next(checkpoints)
    benchmark.pedantic(next, (checkpoints,), rounds=5, warmup_rounds=1)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return next(train(pixels(256, 1, 64, 64), CUTPASTE, Training(steps=4, evaluate_at=(1.0,))))


def test_embedding_256_images(benchmark, checkpoint):
    benchmark(checkpoint.detector.embed, pixels(256, 1, 64, 64))


def test_all_criteria_at_the_demos_size(benchmark):
    rows = unit_rows(640, 128)
    benchmark(evaluate_all, rows[:256], rows[256:512], rows[512:])


def test_all_criteria_at_2000_images_each(benchmark):
    rows = unit_rows(6000, 512)
    benchmark(evaluate_all, rows[:2000], rows[2000:4000], rows[4000:])


@pytest.mark.parametrize("features", [128, 512])
def test_density_fit(benchmark, checkpoint, features):
    benchmark(checkpoint.detector.fit_density, unit_rows(256, features))


def test_density_score(benchmark, checkpoint):
    checkpoint.detector.fit_density(unit_rows(256, 128))
    benchmark(checkpoint.detector.density_score, unit_rows(2000, 128))


def test_model_centrality_of_32_models(benchmark):
    benchmark(mc, torch.rand(128, 32, generator=seeded()).double().numpy())


@pytest.mark.parametrize(
    "program",
    ["import ssad_hpo", "import optuna", "from ssad_hpo import Objective"],
    ids=["ssad_hpo", "optuna-beside-it", "objective"],
)
def test_a_fresh_interpreter_that_imports(benchmark, program):
    command = [sys.executable, "-c", program]
    benchmark.pedantic(subprocess.run, (command,), {"check": True}, rounds=10, warmup_rounds=1)


def test_help_of_the_command_line(benchmark):
    command = [sys.executable, "-m", "ssad_hpo", "--help"]
    how = {"check": True, "stdout": subprocess.DEVNULL}
    benchmark.pedantic(subprocess.run, (command,), how, rounds=10, warmup_rounds=1)
