"""Heat maps: that they find the place, are kept, learned late, and are drawn at an image's own resolution."""

import contextlib
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import torch
from PIL import Image

from ssad_hpo.augment import NONE, Augmentation
from ssad_hpo.combined import CombinedDetector, combine
from ssad_hpo.data import Source
from ssad_hpo.detector import Detector, untrained_detector
from ssad_hpo.encoder import build_network, features_and_maps, map_strides
from ssad_hpo.experiment import Overlays, load_detector, report_run, score_images
from ssad_hpo.judgement import judge
from ssad_hpo.report import overlay
from ssad_hpo.task import Task, Training
from tests.combined_runs import clear_run
from tests.detectors import textures, trained
from tests.image_folders import save

SIZE = 64
PLACE = slice(8, 28), slice(34, 54)  # rows and columns of a defect
NEAR = 12  # pixels: one and a half cells of the finer feature map


@pytest.fixture(scope="module")
def normal():
    return textures(48, size=SIZE)


@pytest.fixture(scope="module")
def defective(normal):
    images = textures(4, size=SIZE, seed=1)
    images[:, :, *PLACE] = 0
    return images


@pytest.fixture(scope="module")
def detector(normal):
    detector = trained(normal, Training(width=8, steps=4, batch_size=4, evaluate_at=(1.0,)))
    detector.fit_patches(normal[:36], normal[36:])
    return detector


def inside_and_outside(map_):
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[PLACE] = True
    return map_[inside].mean(), map_[~inside].mean()


def test_a_heat_map_is_high_where_the_defect_is(detector, defective):
    for map_ in detector.heatmaps(defective):
        inside, outside = inside_and_outside(map_)
        assert inside > outside + 2
        top, left = divmod(int(map_.argmax()), SIZE)
        for at, place in ((top, PLACE[0]), (left, PLACE[1])):
            assert place.start - NEAR <= at < place.stop + NEAR


def test_a_heat_map_of_normal_images_is_about_zero_with_a_spread_of_one(detector):
    maps = detector.heatmaps(textures(24, size=SIZE, seed=2))
    assert abs(float(maps.mean())) < 0.5 and 0.5 < float(maps.std()) < 2


def test_a_heat_map_knows_no_place_of_its_own(detector, defective):
    turned = detector.heatmaps(defective.flip(3)).flip(2)
    inside, outside = inside_and_outside(turned[0])
    assert inside > outside + 2


@pytest.mark.parametrize("encoder", ["small", "tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224"])
def test_every_family_of_encoders_has_heat_maps(encoder, normal):
    size = 224 if "224" in encoder else SIZE
    images = torch.nn.functional.interpolate(normal[:8].float(), size=(size, size)).byte()
    training = Training(encoder=encoder, width=4, precision="float32")
    detector = untrained_detector(training, (1, size, size), Augmentation(NONE), torch.device("cpu"))
    detector.fit_patches(images[:6], images[6:])
    maps = detector.heatmaps(images[:3])
    assert maps.shape == (3, size, size) and maps.isfinite().all() and maps.std() > 0


def test_feature_maps_are_ends_of_stages_and_not_the_next_ones_first_convolution():
    network = build_network("tf_efficientnet_lite0", channels=1, image_size=(64, 96), width=8).eval()
    images = torch.rand(1, 1, 64, 96)
    assert map_strides(network, images) == (8, 16)
    features, (fine, coarse) = features_and_maps(network, images, (8, 16))
    assert torch.equal(features, network.features_of(images))
    assert fine.shape == (1, 40, 8, 12) and coarse.shape == (1, 112, 4, 6)


def test_an_image_of_one_cell_has_no_heat_map():
    detector = untrained_detector(Training(width=4), (1, 2, 2), Augmentation(NONE), torch.device("cpu"))
    with pytest.raises(ValueError, match="no feature maps"):
        detector.fit_patches(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))


def test_a_kept_detector_makes_the_same_heat_maps(detector, defective, tmp_path):
    detector.save(tmp_path / "kept")
    assert torch.equal(Detector.load(tmp_path / "kept").heatmaps(defective), detector.heatmaps(defective))


def test_an_older_detector_loads_and_says_what_heat_maps_need(detector, defective, tmp_path):
    detector.save(tmp_path / "kept")
    (tmp_path / "kept" / "patches.safetensors").unlink()
    old = Detector.load(tmp_path / "kept")
    assert torch.equal(old.score(defective), detector.score(defective))
    with pytest.raises(ValueError, match=r"no density of patches.*fit_patches"):
        old.heatmaps(defective)
    with pytest.raises(ValueError, match="no density of patches"):
        load_detector(tmp_path / "kept", heatmaps=True)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 100])
def test_damaged_patches_are_refused_in_a_sentence(detector, tmp_path, damage):
    detector.save(tmp_path / "kept")
    (tmp_path / "kept" / "patches.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match="kept: cannot be read as a detector"):
        Detector.load(tmp_path / "kept")


def test_a_combined_detector_makes_the_mean_of_its_members_heat_maps(detector, normal, defective, tmp_path):
    other = trained(normal, Training(width=4, steps=4, batch_size=4, seed=1, evaluate_at=(1.0,)))
    task = Task("grain", normal[:36], torch.cat([normal[36:40], defective]), normal[36:])
    from ssad_hpo.search import Kept

    kept = []
    for each in (detector, other):
        judged = judge(each, task)
        kept.append(Kept(judged.scores.numpy(), judged.embeddings, each, judged.held_out.numpy()))
    combined = CombinedDetector((detector, other), combine(kept, heads=False).parts)
    combined.fit_patches(task.train, task.held_out)
    expected = (detector.heatmaps(defective) + other.heatmaps(defective)) / 2
    assert torch.allclose(combined.heatmaps(defective), expected, atol=1e-5)
    combined.save(tmp_path / "combined")
    loaded = CombinedDetector.load(tmp_path / "combined")
    assert torch.equal(loaded.heatmaps(defective), combined.heatmaps(defective))
    assert loaded.normal_patch_scores.mean().abs() < 0.01


def test_an_overlay_changes_nothing_below_the_range_and_reddens_what_is_above():
    image = Image.new("RGB", (300, 200), (100, 110, 120))
    values = np.zeros((10, 15), np.float32)
    values[5, 10] = 9
    drawn = np.asarray(overlay(image.copy(), values, 2.0, 6.0)).astype(int)
    assert drawn.shape == (200, 300, 3)
    assert (drawn[:80, :180] == (100, 110, 120)).all()
    red, green, blue = drawn[110, 210]  # the centre of that cell, of 20 by 20 pixels
    assert red > 150 and green < 60 and blue < 60


def test_an_overlay_in_bands_is_that_of_the_whole(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 53, 3), dtype=np.uint8))
    values = np.random.default_rng(1).random((6, 5), dtype=np.float32)
    whole = np.asarray(overlay(image.copy(), values, 0.2, 0.9))
    monkeypatch.setattr("ssad_hpo.report.heat._BAND", 200)
    assert (np.asarray(overlay(image.copy(), values, 0.2, 0.9)) == whole).all()


@pytest.fixture
def files(tmp_path, defective):
    folder = tmp_path / "new"
    for name, image, size in (
        ("a.png", defective[0], (200, 150)), ("sub/b.jpg", defective[1], (90, 120)),
        ("sub/b.png", defective[2], (64, 64)),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).resize(size).save(path)
    return folder


def test_overlays_have_the_images_names_and_resolutions(detector, files, tmp_path):
    from ssad_hpo.experiment import files_of

    drawn = Overlays(detector, tmp_path / "maps", [files], files_of([files]))
    scores = dict(score_images(detector, [files], draw=drawn.draw))
    assert len(scores) == drawn.count == 3
    found = {str(p.relative_to(tmp_path / "maps")): Image.open(p) for p in (tmp_path / "maps").rglob("*.*")}
    sizes = {name: (image.mode, image.size) for name, image in found.items()}
    assert sizes == {
        "a.png": ("RGB", (200, 150)), "sub/b.jpg.png": ("RGB", (90, 120)), "sub/b.png.png": ("RGB", (64, 64)),
    }  # fmt: skip
    pixels = np.asarray(found["a.png"]).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    inside = np.zeros((150, 200), bool)
    inside[8 * 150 // 64 : 28 * 150 // 64, 34 * 200 // 64 : 54 * 200 // 64] = True
    assert redness[inside].mean() > redness[~inside].mean() + 30
    assert redness[120:, :60].mean() < 20  # far from it


def test_overlays_refuse_folders_that_would_be_scored_or_written_over(detector, files):
    found = sorted(files.rglob("*.*"))
    with pytest.raises(ValueError, match="lies among the images"):
        Overlays(detector, files / "maps", [files], found)
    single = [files / "a.png"]
    with pytest.raises(ValueError, match="would write over"):
        Overlays(detector, files, single, single)
    with pytest.raises(ValueError, match="is a file"):
        Overlays(detector, files / "a.png", single, single)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return clear_run(tmp_path_factory.mktemp("maps") / "run", combine=3).run.folder


def test_a_finished_study_has_what_heat_maps_need_where_its_detectors_are(run):
    kept = list(run.glob("artifacts/*/detector/patches.safetensors"))
    assert len(kept) >= 3
    assert len(list(run.glob("combined/member-*/patches.safetensors"))) == 3
    for single in (False, True):
        detector = load_detector(run, single=single, heatmaps=True)
        assert detector.heatmaps(torch.zeros(2, 1, 16, 16, dtype=torch.uint8)).shape == (2, 16, 16)


def test_the_detectors_of_an_older_study_learn_it_from_its_train_images(run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    images = torch.full((1, 1, 16, 16), 90, dtype=torch.uint8)
    expected = load_detector(old, heatmaps=True).heatmaps(images)
    for file in old.rglob("patches.safetensors"):
        file.unlink()
    assert torch.equal(load_detector(old, heatmaps=True).heatmaps(images), expected)
    assert len(list(old.glob("artifacts/*/detector/patches.safetensors"))) >= 3


def test_two_readers_of_an_older_study_learn_it_at_once(run, tmp_path, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    images = torch.full((1, 1, 16, 16), 90, dtype=torch.uint8)
    expected = load_detector(old, heatmaps=True).heatmaps(images)
    for file in old.rglob("patches.safetensors"):
        file.unlink()
    both_learnt, both_wrote, fit, replace = Barrier(2), Barrier(2), Detector.fit_patches, os.replace

    def meeting_fit(self, *sets):
        fit(self, *sets)
        meet(both_learnt, 30)

    def meeting_replace(draft, path):
        meet(both_wrote, 0.3)  # as two drafts of one name would
        replace(draft, path)

    monkeypatch.setattr(Detector, "fit_patches", meeting_fit)
    monkeypatch.setattr("os.replace", meeting_replace)
    with ThreadPoolExecutor() as threads:
        readers = [threads.submit(load_detector, old, heatmaps=True) for _ in range(2)]
        found = [reader.result() for reader in readers]
    assert all(torch.equal(detector.heatmaps(images), expected) for detector in found)
    assert not list(old.rglob("*.partial"))


def meet(barrier, seconds):
    with contextlib.suppress(BrokenBarrierError):
        barrier.wait(seconds)


def test_a_study_whose_train_images_are_gone_says_what_heat_maps_need(run, tmp_path, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for file in old.rglob("patches.safetensors"):
        file.unlink()

    def gone(source: Source) -> Task:
        raise ValueError(f"{source.loader}: there is no such folder")

    monkeypatch.setattr("ssad_hpo.data.load", gone)
    with pytest.raises(ValueError, match=r"lack what heat maps need.*train images.*no such folder"):
        load_detector(old, heatmaps=True)


def test_the_report_shows_where_the_highest_images_are_anomalous(run):
    page = report_run(run)
    text = page.read_text()
    assert "Where they are anomalous" in text and "rank 1, score" in text
    with Image.open(page.parent / "spots-1.png") as pair:
        assert pair.size == (2 * 16 + 4, 16)


def test_the_report_shows_images_of_folders_at_their_own_resolution(tmp_path, monkeypatch):
    from ssad_hpo.experiment import run_study
    from ssad_hpo.task import Search

    monkeypatch.setenv("SSAD_HPO_CACHE", "")
    images = {"train": textures(16, size=48), "unlabeled": textures(8, size=48, seed=3)}
    images["unlabeled"][3, :, :16, :16] = 0
    for name, some in images.items():
        for i, image in enumerate(some):
            save(tmp_path / name / f"{i}.png", image[0].numpy())
    source = Source("folders", {n: str(tmp_path / n) for n in images} | {"image_size": 16})
    search = Search("cutout", n_trials=1)
    training = Training(steps=4, batch_size=4, width=4, evaluate_at=(1.0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_study(source, search, training, run=tmp_path / "run", tracking_uri=None)
        page = report_run(result.run.folder)
    ranking = np.argsort(-result.selected.scores())
    with Image.open(page.parent / "spots-1.png") as pair:
        assert pair.size == (2 * 48 + 4, 48)
        shown = np.asarray(pair)[:, :48, 0]
    # The image shown is that of the highest score, before it was made smaller.
    small = np.asarray(Image.fromarray(shown).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    from ssad_hpo.data import load

    assert abs(small - load(source).unlabeled[int(ranking[0])][0].numpy().astype(int)).max() <= 2


def test_heat_maps_are_drawn_from_the_command_line(run, call, tmp_path):
    for i, image in enumerate(textures(3, size=48)):
        save(tmp_path / "new" / f"{i}.png", image[0].numpy())
    said = call("score", run, tmp_path / "new", "--heatmaps", tmp_path / "maps")
    assert said.code == 0, said
    assert len(said.out.splitlines()) == 4  # the scores alone
    assert "3 heat maps in" in said.err and "red is darkest at" in said.err
    for i in range(3):
        with Image.open(tmp_path / "maps" / f"{i}.png") as drawn:
            assert drawn.size == (48, 48) and drawn.mode == "RGB"
