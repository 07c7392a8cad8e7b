"""What belongs to a whole process: calls in several threads leave it as it was, and it changes no score."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import pytest
import torch

from ssad_hpo.augment import Augmentation
from ssad_hpo.baselines import train_autoencoder
from ssad_hpo.detector import Detector, untrained_detector
from ssad_hpo.encoder.maps import passing
from ssad_hpo.export import ScoringModule
from ssad_hpo.export.files import _quiet
from ssad_hpo.judgement import judge
from ssad_hpo.quiet import without_warnings
from ssad_hpo.raytune.sweeping import surroundings
from ssad_hpo.report.style import picture
from ssad_hpo.task import Task, Training
from tests.detectors import textures

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES = {
    "warnings": lambda path: without_warnings(),
    "an export": lambda path: _quiet(),
    "a picture": lambda path: picture(path, width=2, height=2),
    "a sweep": lambda path: surroundings(),
}


def state():
    loggers = [logging.getLogger(name).level for name in ("ray.tune", "torch.onnx")]
    return dict(os.environ), list(warnings.filters), dict(matplotlib.rcParams), loggers


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_two_threads_change_for_a_time_is_as_before_in_the_end(change, tmp_path):
    before = state()
    inside, left = threading.Event(), threading.Event()

    def second():
        with change(tmp_path / "second.png"):
            inside.set()
            left.wait(20)

    thread = threading.Thread(target=second)
    with change(tmp_path / "first.png"):
        thread.start()
        inside.wait(0.3)  # where one waits for the other, it comes in later
    left.set()
    thread.join()
    assert state() == before


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default dtype": lambda: default_dtype(torch.float64),
    "no gradients": torch.no_grad,
}


@pytest.fixture(scope="module", params=["patches", "density", "classifier"])
def scored(request, tmp_path_factory):
    """A detector, the folder that it is kept in, images, and what it says of them."""
    images = textures(16, size=32)
    training = Training(width=4, precision="float32", score=request.param)
    task = Task("grain", images[:12], images[4:], images[:5])
    kind = Augmentation("cutout")
    detector = untrained_detector(training, (1, 32, 32), kind, torch.device("cpu"))
    judge(detector, task)
    detector.fit_patches(images)
    folder = tmp_path_factory.mktemp("kept")
    detector.save(folder)
    return detector, folder, images


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_kept_detector_says_the_same_whatever_of_torchs_is_around(scored, around):
    detector, folder, images = scored
    expected = detector.score(images), detector.embed(images), detector.heatmaps(images)
    exported = ScoringModule(detector)(images)
    with around():
        loaded = Detector.load(folder)
        found = loaded.score(images), loaded.embed(images), loaded.heatmaps(images)
        loaded.fit_patches(images)
        module = ScoringModule(loaded)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(module(images), exported)
    assert torch.equal(loaded.heatmaps(images), expected[2])


def test_an_autoencoder_scores_the_same_in_a_users_autocast():
    images = textures(8, size=32)
    baseline = train_autoencoder(images, Training(width=4, steps=2, batch_size=4, evaluate_at=(1.0,)))
    with AROUND["autocast"]():
        found = baseline.score(images)
    assert torch.equal(found, baseline.score(images))


def test_what_is_exported_is_no_network_in_the_middle_of_a_pass(scored):
    detector, _, images = scored
    expected = ScoringModule(detector)(images)
    inside, stages = threading.Event(), detector.network.encoder.stages

    def passes():
        with passing(detector.network):
            stages.forward = torch.zeros_like  # as of stages that are passed by
            inside.set()
            copied.wait(0.3)  # where the copy waits for the pass, it comes later
            del stages.forward

    copied, thread = threading.Event(), threading.Thread(target=passes)
    thread.start()
    assert inside.wait(20)
    module = ScoringModule(detector)
    copied.set()
    thread.join()
    assert torch.equal(module(images), expected)


def test_an_export_leaves_the_choice_of_how_processes_start():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    try:
        with _quiet():
            multiprocessing.RLock()  # as progress bars of exporters have
        assert multiprocessing.get_start_method(allow_none=True) is None
    finally:
        multiprocessing.set_start_method(before, force=True)


JOINED = """
import signal
import ray
from ssad_hpo.raytune.sweeping import connected

def own(number, frame):
    pass

signal.signal(signal.SIGTERM, own)
with connected(None):
    assert signal.getsignal(signal.SIGTERM) is not own  # else Ray does so no more
assert signal.getsignal(signal.SIGTERM) is own

first, second = connected(None), connected(None)  # as of two sweeps, of which the first ends first
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)
assert ray.is_initialized() and ray.get(ray.put(1)) == 1
second.__exit__(None, None, None)
assert not ray.is_initialized()

import threading
import time

joined, left = threading.Event(), threading.Event()
def sweep():
    with connected(None):
        joined.set()
        left.wait(300)

thread = threading.Thread(target=sweep)
thread.start()
assert joined.wait(300)
with connected(None):
    left.set()
    thread.join()
    time.sleep(2)  # Ray's processes would be dead by now
    assert [node["Alive"] for node in ray.nodes()] == [True]
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
assert not ray.is_initialized()

ray.init("local", include_dashboard=False, log_to_driver=False)
with connected(None):
    pass
assert ray.is_initialized()  # the user's own
"""


@pytest.mark.slow  # a Ray is started, in a process that has none
def test_a_ray_of_its_own_ends_with_the_last_that_uses_it_and_leaves_the_users_handlers():
    environment = {**os.environ, "RAY_AUTH_TOKEN": os.urandom(16).hex()}
    command = [sys.executable, "-c", JOINED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
