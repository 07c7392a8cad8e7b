"""What cannot be read: one clear sentence that names file or folder, or a warning where it is skipped."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
from image_folders import (
    SIZE,
    break_image,
    colours,
    make_category,
    palette_image,
    pixels_of,
    read_one,
    same,
    save,
)
from PIL import Image

from ssad_hpo import data
from ssad_hpo.data import cache

pytestmark = pytest.mark.usefixtures("cache_folder")


BROKEN = {
    ("truncated", "jpg"): "cannot be decoded .*truncated",
    ("truncated", "png"): "cannot be decoded",
    ("truncated", "bmp"): "cannot be decoded .*truncated",
    ("truncated", "tif"): "cannot be decoded",
    ("text", "png"): "is not a PNG, JPEG, BMP, TIFF or WebP image",
    ("empty", "jpg"): "is not a PNG, JPEG, BMP, TIFF or WebP image",
}


@pytest.mark.parametrize(("how", "suffix"), BROKEN)
def test_an_unreadable_file_is_an_error_that_names_it_and_the_remedy(tmp_path, how, suffix):
    place = make_category(tmp_path / "bottle")
    path = place / "test" / "good" / f"broken.{suffix}"
    break_image(path, how)
    message = rf"{path}: {BROKEN[how, suffix]}.*Repair or remove the file, or skip"
    for _ in range(2):
        with pytest.raises(data.DataError, match=message):
            data.load_folder(place, image_size=SIZE)
    with pytest.raises(data.DataError, match=message):
        data.read_images([path], SIZE, 3)


@pytest.mark.parametrize("cached", [True, False])
def test_skipped_files_are_counted_and_named_and_labels_follow(tmp_path, monkeypatch, cached):
    if not cached:
        monkeypatch.setenv("SSAD_HPO_CACHE", "")
    place = make_category(tmp_path / "bottle")
    loaded = data.load_folder(place, image_size=SIZE)
    before, labels = loaded.task, loaded.labels
    break_image(place / "test" / "crack" / "000a.png", "truncated")
    break_image(place / "test" / "good" / "000a.jpg", "text")
    (place / "train" / "good" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"bottle: skipped 3 unreadable images: .*gone\.png cannot be read"
        ):
            after = data.load_folder(place, image_size=SIZE, skip_unreadable=True)
        assert same(before, after.task)
        assert after.labels.tolist() == labels.tolist()
    for _ in range(2):  # what was cached while skipping is no excuse later
        with pytest.raises(data.DataError, match=r"gone\.png"):
            data.load_folder(place, image_size=SIZE)


def test_an_error_remains_an_error_after_the_same_files_were_skipped(tmp_path):
    place = make_category(tmp_path / "bottle")
    break_image(place / "test" / "good" / "broken.png", "truncated")
    with pytest.warns(UserWarning, match="skipped 1 unreadable image"):
        data.load_folder(place, image_size=SIZE, skip_unreadable=True)
    with pytest.raises(data.DataError, match=r"broken\.png: cannot be decoded"):
        data.load_folder(place, image_size=SIZE)


def test_new_images_that_cannot_be_read_are_left_out_on_request(tmp_path):
    good = [save(tmp_path / f"{i}.png", colours(i)) for i in range(3)]
    break_image(tmp_path / "broken.png", "text")
    paths = [tmp_path / "broken.png", good[2], tmp_path / "missing.png", good[0], good[1]]
    images, read, lost = data.read_images(paths, SIZE, 3, skip_unreadable=True)
    assert [reason.partition(" ")[0] for reason in lost] == [str(paths[0]), str(paths[2])]
    assert read == [good[2], good[0], good[1]]
    assert np.array_equal(images.numpy(), np.stack([pixels_of(path) for path in read]))
    with pytest.raises(data.DataError, match=r"missing\.png: cannot be read \(No such file"):
        data.read_images(paths[1:], SIZE, 3)
    assert len(data.read_images(paths[:1], SIZE, 3, skip_unreadable=True)[0]) == 0
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        data.read_images(good, SIZE, 2)


def test_an_image_of_too_many_pixels_is_an_error_until_the_limit_is_raised(tmp_path, monkeypatch):
    place = make_category(tmp_path / "bottle")
    save(place / "test" / "good" / "small.png", colours(500, 8, 8))
    save(place / "test" / "good" / "small2.png", colours(501, 8, 8))
    save(place / "train" / "good" / "small.png", colours(502, 8, 8))
    save(place / "train" / "good" / "small2.png", colours(503, 8, 8))
    with pytest.raises(data.DataError, match=r"000\.png: has 480 pixels, expected at most 479; .*pixels 480"):
        data.load_folder(place, image_size=SIZE, max_pixels=479)
    with pytest.warns(UserWarning, match="skipped 16 unreadable images"):
        skipped = data.load_folder(place, image_size=SIZE, skip_unreadable=True, max_pixels=479).task
    assert len(skipped.train) == len(skipped.unlabeled) == 2
    # Pillow warns at the first of its own limits and refuses at the second; ours is the one that counts.
    for pillows in (300, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = data.load_folder(place, image_size=SIZE, max_pixels=480).task
    assert (len(whole.train), len(whole.unlabeled)) == (6, 14)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_randomly_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, suffix):
    generator = np.random.default_rng(0)
    modes = [Image.fromarray(colours(1)), Image.fromarray(colours(1, channels=1))]
    modes += [palette_image(grey=False)] if suffix != "jpg" else []
    for i in range(60):
        path = save(tmp_path / "damaged" / f"{i}.{suffix}", modes[i % len(modes)])
        content = bytearray(path.read_bytes())
        for place in generator.integers(0, min(len(content), 200), 4):
            content[place] = generator.integers(256)
        path.write_bytes(content[: generator.integers(1, len(content))] if i % 5 == 0 else content)
    for i in range(2):
        save(tmp_path / "damaged" / f"whole{i}.png", colours(i))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        paths = data.find_images(tmp_path / "damaged")
        cache.identify(tmp_path / "damaged", paths)
        _, read, _ = data.read_images(paths, SIZE, 3, skip_unreadable=True)
    assert 2 <= len(read) < len(paths)


def test_a_file_cannot_reach_other_readers_under_an_image_suffix(tmp_path):
    path = tmp_path / "program.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(data.DataError, match="is not a PNG, JPEG, BMP, TIFF or WebP image"):
        read_one(path)


def test_missing_empty_and_nearly_empty_folders_are_errors_that_name_them(tmp_path):
    with pytest.raises(data.DataError, match=r"nowhere: .*there is no such folder"):
        data.load_folder(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"nowhere: .*there is no such folder"):
        data.find_images(tmp_path / "nowhere")
    place = make_category(tmp_path / "bottle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=r"empty: expected images \(\.bmp, .*found none"):
        data.load_folders(place / "train", tmp_path / "empty")
    save(tmp_path / "one" / "0.png", colours(0))
    with pytest.raises(data.DataError, match=r"one: expected at least 2 readable images in it, found 1"):
        data.load_folders(tmp_path / "one", place / "test", image_size=SIZE)
    break_image(tmp_path / "one" / "1.png", "text")
    with pytest.raises(data.DataError, match=r"one: expected at least 2 readable images in it, found 1"):
        data.load_folders(tmp_path / "one", place / "test", image_size=SIZE, skip_unreadable=True)
    shutil.rmtree(place / "test")
    with pytest.raises(data.DataError, match=r"bottle/test: .*there is no such folder"):
        data.load_folder(place)
    with pytest.raises(ValueError, match="image_size: expected a whole number of pixels >= 1, got 0"):
        data.load_folder(make_category(tmp_path / "cable"), image_size=0)
