"""What several test files share: a workplace of its own for each test, folders of images, a listener."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

# The same inputs in each run, so that a change is judged by the change alone. For fresh ones:
# pytest --hypothesis-profile=fresh.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.register_profile("fresh", derandomize=False)
hypothesis.settings.load_profile("same")

# Fresh processes in milliseconds: this server has imported all that a study needs, also what torch and
# others import late (an optimizer imports torch._dynamo, which takes two seconds).
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["pytest", "torch._dynamo", "sklearn.covariance", "safetensors.torch", "skimage", "ssad_hpo.experiment"]
)


# Files of slow tests, longest first, so that no process waits long for another in the end.
LONGEST = (
    "test_docs", "test_cluster", "test_sweep", "test_object_store", "test_kill_loops", "test_sweep_faults",
    "test_studies_speed", "test_docker_services", "test_st_ssad_studies", "test_confirming",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="K/N", help="one in N of the chosen tests alone; which, K tells, any whole number"
    )


@pytest.hookimpl(trylast=True)  # after those that -m leaves out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files are begun in the order of `LONGEST`, each as a whole: its tests share what they have made."""
    last = len(LONGEST)
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem) in LONGEST else last)
    if part := config.getoption("--part"):
        number, count = map(int, part.split("/"))
        # By name, so that another test moves none to another part.
        taken = {item.nodeid for item in items if zlib.crc32(item.nodeid.encode()) % count == number % count}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in taken])
        items[:] = [item for item in items if item.nodeid in taken]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; one thread here and in subprocesses; nothing of the user's is read."""
    import optuna

    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("MLFLOW_TRACKING_URI", "SSAD_HPO_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place = tmp_path / "workplace"
    place.mkdir()
    monkeypatch.chdir(place)
    yield place
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)


@pytest.fixture(scope="session", autouse=True)
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Addresses that studies of tests use are kept for tests alone."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def _patient_delivery() -> None:
    """On a busy machine a writer, which is nice to others, may need longer than a user would wait for it."""
    from ssad_hpo.tracking import MlflowRecorder

    MlflowRecorder.close.__defaults__ = (600.0,)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks and tensors on shared cores are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a test's own, which trusts files that were written just now."""
    from ssad_hpo.data import cache

    folder = tmp_path / "cache"
    monkeypatch.setenv("SSAD_HPO_CACHE", str(folder))
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    return folder


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and no run in it; making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Any:
    """A tuning with ground truth, tracked by a real MLflow: `tuned_runs.Tracked`."""
    import optuna
    from tuned_runs import Tracked, quick

    from ssad_hpo.bilevel import CollapseWarning

    place = tmp_path_factory.mktemp("tracked")
    shutil.copy(empty_mlflow, place / "mlflow.db")
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    uri = f"sqlite:///{place}/mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        result = quick(place / "tuned", tracking_uri=uri)
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(verbosity)
    return Tracked(uri, result)


@pytest.fixture
def tuned(tracked: Any, workplace: Path) -> Any:
    """The tuning in a folder of this test's own, runs/tuned: a `StudyResult`."""
    from ssad_hpo.experiment import open_result

    shutil.copytree(tracked.result.run.folder, workplace / "runs" / "tuned")
    return open_result("tuned")


@pytest.fixture(scope="session")
def make_category(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a category in MVTec AD's layout: woven cloth, png and jpg, of several sizes.

    `make_category(place)` fills `place` with train/good (14 images), test/good (7), test/scratch (4),
    test/stain (4) and a mask in ground_truth/; `grey=True` makes it of grey images.
    """
    counts = {"train/good": 14, "test/good": 7, "test/scratch": 4, "test/stain": 4}

    def cloth(number: int, grey: bool) -> Image.Image:
        width, height = 30 + number % 3 * 6, 30 + number % 2 * 9
        rng = np.random.default_rng(number)
        threads = 110 + 50 * np.sin(np.arange(height)[:, None] * 0.9) * np.cos(np.arange(width) * 0.9)
        pixels = threads[:, :, None] + rng.normal(0, 12, (height, width, 3)) + rng.normal(0, 8, 3)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        return image.convert("L") if grey else image

    def draw(grey: bool) -> Path:
        root = tmp_path_factory.mktemp("cloth") / "cloth"
        number = 0
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True)
            for i in range(count):
                image, number = cloth(number, grey), number + 1
                if folder == "test/scratch":
                    white = 250 if grey else (250, 250, 240)
                    ImageDraw.Draw(image).line((3 + i, 4, 22, 14 + 3 * i), white, 2)
                elif folder == "test/stain":
                    spot = Image.new("L", image.size, 0)
                    ImageDraw.Draw(spot).ellipse((5 + i, 8, 18 + i, 20), 255)
                    dark = Image.new(image.mode, image.size, 30 if grey else (60, 30, 20))
                    image = Image.composite(dark, image, spot.filter(ImageFilter.GaussianBlur(1)))
                image.save(root / folder / f"{i:03}.{'jpg' if number % 3 == 0 else 'png'}")
        (root / "ground_truth" / "scratch").mkdir(parents=True)
        Image.new("L", (30, 30)).save(root / "ground_truth" / "scratch" / "000_mask.png")
        return root

    drawn: dict[bool, Path] = {}

    def make(place: Path, grey: bool = False) -> Path:
        if grey not in drawn:
            drawn[grey] = draw(grey)
        shutil.copytree(drawn[grey], place)
        return place

    return make


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the program in this process."""
    from ssad_hpo.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ssad-hpo", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


class Listener:
    """A recorder that keeps all that it hears, in order: (event, trial, ...)."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.heard.append(("started", trial, dict(params), dict(tags)))

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(("progress", trial, step, dict(metrics)))

    def trial_ended(
        self, trial: str, status: str, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        self.heard.append(("ended", trial, status, dict(metrics), reason))

    def of(self, event: str) -> list[tuple[Any, ...]]:
        """What follows the event's name, for each time that it was heard."""
        return [rest for name, *rest in self.heard if name == event]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """A Ray of two processors, and its address."""
    from servers import ray_of_two_processors

    with ray_of_two_processors() as address:
        yield address
