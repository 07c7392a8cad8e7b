"""Data: testbeds, folders, labels in their own calls, the cache. All images are made here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssad_hpo import data
from ssad_hpo.data import cache, decode, testbed
from ssad_hpo.task import Augmentation, Range, Task

SIZE = 16


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Every test has an empty cache of its own, which trusts files that were written just now."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSAD_HPO_CACHE", str(folder))
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    return folder


def colours(seed, height=24, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def make_category(place, channels=3, defects=("crack", "scratch"), n=4):
    """n train images, n normal test images and n of each defect, all different."""
    seeds = iter(range(1000))
    for folder in ("train/good", "test/good", *(f"test/{defect}" for defect in defects)):
        for i in range(n):
            save(place / folder / f"{i:03}.png", colours(next(seeds), channels=channels))
    save(place / "ground_truth" / "crack" / "000_mask.png", colours(999, channels=1))
    return place


def pixels_of(path, channels=3):
    """The slow, obvious reading of an 8-bit file."""
    image = Image.open(path).convert("RGB" if channels == 3 else "L").resize((SIZE, SIZE), Image.BILINEAR)
    return np.asarray(image).reshape(SIZE, SIZE, channels).transpose(2, 0, 1)


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def same(a: Task, b: Task) -> bool:
    return torch.equal(a.train, b.train) and torch.equal(a.unlabeled, b.unlabeled)


# Folders: what becomes a task


def test_a_task_of_a_folder_has_three_fields_and_no_labels(tmp_path):
    task = data.load_folder(make_category(tmp_path / "bottle"), image_size=SIZE).task
    assert [field.name for field in dataclasses.fields(task)] == ["name", "train", "unlabeled"]
    assert vars(task).keys() == {"name", "train", "unlabeled"}
    assert task.train.shape == (4, 3, SIZE, SIZE) and task.unlabeled.shape == (12, 3, SIZE, SIZE)
    assert task.train.dtype == task.unlabeled.dtype == torch.uint8


def test_images_and_labels_agree_with_a_slow_reading_sorted_by_pixel_digest(tmp_path):
    place = make_category(tmp_path / "bottle")
    rows = [
        (digest(pixels_of(path)), int(path.parent.name != "good"), pixels_of(path))
        for path in (place / "test").rglob("*.png")
    ]
    rows.sort(key=lambda row: row[:2])
    task = data.load_folder(place, image_size=SIZE).task
    labels = data.load_folder(place, image_size=SIZE).labels
    assert np.array_equal(task.unlabeled.numpy(), np.stack([row[2] for row in rows]))
    assert labels.dtype == np.int8 and labels.tolist() == [row[1] for row in rows]
    train = sorted((pixels_of(path) for path in (place / "train").rglob("*.png")), key=digest)
    assert np.array_equal(task.train.numpy(), np.stack(train))


def test_renaming_defect_folders_changes_no_pixel_of_the_task(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    (place / "test" / "crack").rename(place / "test" / "a_new_name")
    (place / "test" / "good").rename(place / "test" / "z")
    assert same(before, data.load_folder(place, image_size=SIZE).task)


def test_shuffling_file_names_across_folders_changes_no_pixel_of_the_task(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    paths = sorted((place / "test").rglob("*.png"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert same(before, data.load_folder(place, image_size=SIZE).task)


@pytest.mark.parametrize("cached", [True, False])
def test_a_plain_pair_of_copied_folders_gives_the_same_task(tmp_path, monkeypatch, cached):
    place = make_category(tmp_path / "bottle")
    if not cached:
        monkeypatch.setenv("SSAD_HPO_CACHE", "")
    published = data.load_folder(place, image_size=SIZE).task
    for half in ("train", "test"):
        for i, path in enumerate(sorted((place / half).rglob("*.png"), reverse=True)):
            copy = tmp_path / "plain" / half / f"{i}.PNG"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    plain = data.load_folders(tmp_path / "plain" / "train", tmp_path / "plain" / "test", image_size=SIZE).task
    assert same(published, plain) and published.content_hash == plain.content_hash
    assert (published.name, plain.name) == ("bottle", "images")


def test_identical_images_are_listed_normal_first_and_keep_their_number(tmp_path):
    place = make_category(tmp_path / "bottle", defects=("crack",), n=2)
    shutil.copy(place / "test" / "crack" / "000.png", place / "test" / "good" / "copy.png")
    save(place / "test" / "good" / "copy.bmp", Image.open(place / "test" / "crack" / "000.png"))
    task = data.load_folder(place, image_size=SIZE).task
    labels = data.load_folder(place, image_size=SIZE).labels
    twin = torch.from_numpy(pixels_of(place / "test" / "crack" / "000.png").copy())
    where = [i for i, image in enumerate(task.unlabeled) if torch.equal(image, twin)]
    assert len(labels) == len(task.unlabeled) == 6
    assert labels[where].tolist() == [0, 0, 1]


def test_an_anomaly_selects_its_folder_and_the_good_one(tmp_path):
    place = make_category(tmp_path / "bottle")
    task = data.load_folder(tmp_path, "bottle", "scratch", image_size=SIZE).task
    wanted = [p for folder in ("good", "scratch") for p in (place / "test" / folder).iterdir()]
    expected = sorted((digest(pixels_of(path)), int(path.parent.name != "good")) for path in wanted)
    assert task.name == "bottle/scratch"
    assert [digest(image.numpy()) for image in task.unlabeled] == [row[0] for row in expected]
    labels = data.load_folder(tmp_path, "bottle", "scratch", image_size=SIZE).labels
    assert labels.tolist() == [row[1] for row in expected]
    assert data.find_anomalies(tmp_path, "bottle") == ["crack", "scratch"]


@pytest.mark.parametrize("anomaly", ["dent", "good", "../train", ""])
def test_an_anomaly_without_a_folder_is_an_error_that_lists_those_there(tmp_path, anomaly):
    make_category(tmp_path / "bottle")
    with pytest.raises(data.DataError, match=r"anomaly: .*found: crack, scratch"):
        data.load_folder(tmp_path, "bottle", anomaly, image_size=SIZE)


@pytest.mark.parametrize("layout", ["images directly in test", "no test/good"])
def test_a_test_folder_without_ground_truth_has_no_labels_and_the_same_task(tmp_path, layout):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    if layout == "no test/good":
        (place / "test" / "good").rename(place / "test" / "part1")
    else:
        (place / "test" / "crack" / "000.png").rename(place / "test" / "000.png")
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    assert data.load_folder(place, image_size=SIZE).labels is None
    with pytest.raises(data.DataError, match="anomaly: expected a folder beside"):
        data.load_folder(place, anomaly="scratch", image_size=SIZE)


def test_train_images_may_lie_directly_in_train(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    for path in (place / "train" / "good").iterdir():
        path.rename(place / "train" / path.name)
    (place / "train" / "good").rmdir()
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    (place / "train").rename(place / "bad")
    (place / "train").mkdir()
    (place / "bad").rename(place / "train" / "bad")
    with pytest.raises(data.DataError, match=r"train/good: .*no such folder"):
        data.load_folder(place, image_size=SIZE)


def test_one_category_needs_no_name_and_several_are_listed(tmp_path):
    make_category(tmp_path / "bottle", n=2)
    (tmp_path / "license").mkdir()
    assert data.load_folder(tmp_path, image_size=SIZE).task.name == "bottle"
    make_category(tmp_path / "cable", n=2)
    assert data.find_categories(tmp_path) == ["bottle", "cable"]
    assert data.find_categories(tmp_path / "cable") == []
    for wrong in (None, "screw", "../bottle"):
        with pytest.raises(data.CategoryError, match="bottle, cable") as caught:
            data.load_folder(tmp_path, wrong, image_size=SIZE)
        assert pickle.loads(pickle.dumps(caught.value)).categories == ("bottle", "cable")
    with pytest.raises(data.DataError, match="expected train/good and test/"):
        data.load_folder(tmp_path / "license")


def test_a_relative_root_gets_its_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_category(tmp_path / "bottle", n=2))
    assert data.load_folder(".", image_size=SIZE).task.name == "bottle"


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    for name in (".DS_Store", "._000.png", "notes.txt", ".thumbs/1.png"):
        path = place / "test" / "good" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    assert same(before, data.load_folder(place, image_size=SIZE).task)


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    (place / "test" / "good").rename(tmp_path / "elsewhere")
    (place / "test" / "good").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(place / "test")
    assert data.find_images(tmp_path / "elsewhere")[0].name == "000.png"
    (tmp_path / "elsewhere" / "circle").unlink()
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    assert data.load_folder(place, image_size=SIZE).labels.sum() == 8


def test_a_pair_of_folders_that_shares_a_file_is_an_error(tmp_path):
    place = make_category(tmp_path / "bottle")
    with pytest.raises(data.DataError, match="is in train and in unlabeled"):
        data.load_folders(place / "train", place)


# Files: formats, modes, channels


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "JPG", "Png", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_is_read_in_grey_and_colour(tmp_path, suffix, channels):
    for half in ("train", "unlabeled"):
        for i in range(2):
            save(tmp_path / half / f"{i}.{suffix}", colours(i, channels=channels))
    task = data.load_folders(tmp_path / "train", tmp_path / "unlabeled", image_size=SIZE).task
    assert task.train.shape == (2, channels, SIZE, SIZE)
    assert torch.equal(task.train, task.unlabeled)
    expected = sorted(
        (pixels_of(tmp_path / "train" / f"{i}.{suffix}", channels) for i in range(2)), key=digest
    )
    assert np.array_equal(task.train.numpy(), np.stack(expected))


def palette_image(grey):
    image = Image.fromarray(colours(5, channels=1) // 2).convert("P")
    rows = [(v, v, v) if grey else (v, 255 - v, v // 2) for v in range(256)]
    image.putpalette([value for row in rows for value in row])
    return image


GREY = {
    "1": lambda: Image.fromarray(colours(1, channels=1)).convert("1"),
    "L": lambda: Image.fromarray(colours(1, channels=1)),
    "LA": lambda: Image.fromarray(colours(1, channels=1)).convert("LA"),
    "I;16": lambda: Image.fromarray(colours(1, channels=1).astype(np.uint16) * 256),
    "grey palette": lambda: palette_image(grey=True),
}
COLOUR = {
    "RGB": lambda: Image.fromarray(colours(1)),
    "RGBA": lambda: Image.fromarray(colours(1)).convert("RGBA"),
    "palette": lambda: palette_image(grey=False),
}


@pytest.mark.parametrize("mode", [*GREY, *COLOUR])
def test_a_task_has_one_channel_only_if_every_image_is_grey(tmp_path, mode):
    for half in ("train", "unlabeled"):
        for i in range(2):
            save(tmp_path / half / f"{i}.png", colours(i, channels=1))
    save(tmp_path / "unlabeled" / "2.png", (GREY | COLOUR)[mode]())
    task = data.load_folders(tmp_path / "train", tmp_path / "unlabeled", image_size=SIZE).task
    assert task.train.shape[1] == task.unlabeled.shape[1] == (1 if mode in GREY else 3)


def read_one(path, channels=1, size=SIZE):
    images, paths = data.read_images([path], size, channels)
    assert paths == [path] and images.shape == (1, channels, size, size) and images.dtype == torch.uint8
    return images[0].numpy()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_a_fixed_rule(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257], [1000, 30000, 65406, 65535]] * 2, np.uint16)
    read = read_one(save(tmp_path / f"deep.{suffix}", values), size=4)
    assert read[0].tolist() == np.round(values / 257).astype(int).tolist()


def test_signed_32_bit_values_are_read_as_16_bit_ones_or_refused(tmp_path):
    values = np.array([[0, 257], [514, 65535]], np.int32)
    assert read_one(save(tmp_path / "a.tif", values), size=2)[0].tolist() == [[0, 1], [2, 255]]
    with pytest.raises(data.DataError, match=r"b.tif: has values -1\.\.5"):
        read_one(save(tmp_path / "b.tif", np.array([[-1, 5]], np.int32)))
    with pytest.raises(data.DataError, match=r"c.tif: has floating-point pixels"):
        read_one(save(tmp_path / "c.tif", np.ones((2, 2), np.float32)))


def test_transparent_pixels_are_black_whatever_hides_beneath(tmp_path):
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[..., 3] = 255
    rgba[:2, :, 3] = 0
    rgba[2:, 0, 3] = 128
    for image, channels in ((Image.fromarray(rgba), 3), (Image.fromarray(rgba).convert("LA"), 1)):
        read = read_one(save(tmp_path / "alpha.png", image), channels, size=4)
        assert (read[:, :2] == 0).all() and (read[:, 2:, 1:] == 200).all()
        assert (abs(read[:, 2:, 0].astype(int) - 100) <= 1).all()


def test_a_transparent_palette_entry_is_black(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    read = read_one(save(tmp_path / "palette.png", image, transparency=0), channels=3, size=2)
    assert read.transpose(1, 2, 0).tolist() == [[[0, 0, 0], [0, 0, 255]], [[0, 0, 255], [0, 0, 0]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, suffix, orientation):
    upright = np.zeros((32, 32), np.uint8)
    upright[:16, :16], upright[:16, 16:] = 255, 128
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned.{suffix}", np.ascontiguousarray(stored), exif=exif)
    assert np.abs(read_one(path, size=32)[0].astype(int) - upright).max() <= 16


def test_the_first_frame_of_several_is_read(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    for suffix in ("tif", "png"):
        path = save(tmp_path / f"pages.{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert (read_one(path) == 10).all()


def test_colour_becomes_luminance_and_grey_three_equal_channels(tmp_path):
    red = save(tmp_path / "red.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
    grey = save(tmp_path / "grey.png", np.full((4, 4), 90, np.uint8))
    assert (read_one(red, 1) == 76).all() and (read_one(grey, 3) == 90).all()
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 255)))
    assert (read_one(cmyk, 3) <= 2).all()


def test_a_large_jpeg_decoded_at_reduced_scale_is_nearly_the_full_decoding(tmp_path):
    y, x = np.mgrid[:640, :512] / 40
    path = save(tmp_path / "wide.jpg", (127 + 80 * np.sin(x) * np.cos(y)).astype(np.uint8), quality=95)
    expected = np.asarray(Image.open(path).resize((64, 64), Image.BILINEAR)).astype(int)
    assert np.abs(read_one(path, size=64)[0] - expected).max() <= 4


def test_new_images_come_in_the_order_given(tmp_path):
    paths = [save(tmp_path / f"{name}.png", colours(i)) for i, name in enumerate("dacb")]
    images, read = data.read_images([str(path) for path in paths], SIZE, 3)
    assert read == paths
    assert np.array_equal(images.numpy(), np.stack([pixels_of(path) for path in paths]))


# Errors: one clear sentence that names file or folder


def break_image(path, how):
    save(path, colours(7, 64, 64), format="JPEG" if path.suffix == ".jpg" else None)
    content = path.read_bytes()
    broken = {"truncated": content[: len(content) // 2], "text": b"not an image", "empty": b""}
    path.write_bytes(broken[how])


BROKEN = {
    ("truncated", "jpg"): "cannot be decoded .*truncated",
    ("truncated", "png"): "cannot be decoded",
    ("truncated", "bmp"): "cannot be decoded .*truncated",
    ("truncated", "tif"): "cannot be decoded",
    ("text", "png"): "is not a PNG, JPEG, BMP or TIFF image",
    ("empty", "jpg"): "is not a PNG, JPEG, BMP or TIFF image",
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
    before = data.load_folder(place, image_size=SIZE).task
    labels = data.load_folder(place, image_size=SIZE).labels
    break_image(place / "test" / "crack" / "000a.png", "truncated")
    break_image(place / "test" / "good" / "000a.jpg", "text")
    (place / "train" / "good" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"bottle: skipped 3 unreadable images: .*gone\.png cannot be read"
        ):
            after = data.load_folder(place, image_size=SIZE, skip_unreadable=True).task
        assert same(before, after)
        skipped = data.load_folder(place, image_size=SIZE, skip_unreadable=True).labels
        assert skipped.tolist() == labels.tolist()
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
    with pytest.warns(UserWarning, match="skipped 2 unreadable images: .*broken.png"):
        images, read = data.read_images(paths, SIZE, 3, skip_unreadable=True)
    assert read == [good[2], good[0], good[1]]
    assert np.array_equal(images.numpy(), np.stack([pixels_of(path) for path in read]))
    with pytest.raises(data.DataError, match=r"missing\.png: cannot be read \(No such file"):
        data.read_images(paths[1:], SIZE, 3)
    with pytest.raises(data.DataError, match="none of the 1 files can be read"):
        data.read_images(paths[:1], SIZE, 3, skip_unreadable=True)
    with pytest.raises(ValueError, match="paths: expected at least one"):
        data.read_images([], SIZE, 3)
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        data.read_images(good, SIZE, 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [300, 100])  # 24 x 20 pixels: PIL warns at the first, refuses at the second
def test_a_decompression_bomb_is_an_error_until_the_limit_is_raised(tmp_path, monkeypatch, limit):
    place = make_category(tmp_path / "bottle")
    save(place / "test" / "good" / "small.png", colours(500, 8, 8))
    save(place / "test" / "good" / "small2.png", colours(501, 8, 8))
    save(place / "train" / "good" / "small.png", colours(502, 8, 8))
    save(place / "train" / "good" / "small2.png", colours(503, 8, 8))
    with monkeypatch.context() as limited:
        limited.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match=rf"000\.png: has more than {limit} pixels"):
            data.load_folder(place, image_size=SIZE)
        with pytest.warns(UserWarning, match="skipped 16 unreadable images"):
            skipped = data.load_folder(place, image_size=SIZE, skip_unreadable=True).task
        assert len(skipped.train) == len(skipped.unlabeled) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = data.load_folder(place, image_size=SIZE, skip_unreadable=True).task
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
        _, read = data.read_images(paths, SIZE, 3, skip_unreadable=True)
    assert 2 <= len(read) < len(paths)


def test_a_file_cannot_reach_other_readers_under_an_image_suffix(tmp_path):
    path = tmp_path / "program.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(data.DataError, match="is not a PNG, JPEG, BMP or TIFF image"):
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


# The cache


@pytest.fixture
def work(monkeypatch):
    """Counts of files read for their digest, and decoded."""
    counts = {"read": 0, "decoded": 0}

    def counted(function, key):
        def count(*args, **options):
            counts[key] += 1
            return function(*args, **options)

        return count

    monkeypatch.setattr(cache, "_read_content", counted(cache._read_content, "read"))
    monkeypatch.setattr(decode, "_decode", counted(decode._decode, "decoded"))
    return counts


def reload_counts(work, place, **options):
    work.update(read=0, decoded=0)
    task = data.load_folder(place, image_size=SIZE, **options).task
    return task, (work["read"], work["decoded"])


def test_a_second_load_reads_and_decodes_nothing_and_gives_the_same_task(tmp_path, monkeypatch, work):
    place = make_category(tmp_path / "bottle")
    first, counts = reload_counts(work, place)
    assert counts == (16, 16)
    second, counts = reload_counts(work, place)
    assert counts == (0, 0)
    monkeypatch.setenv("SSAD_HPO_CACHE", "")
    uncached, counts = reload_counts(work, place)
    assert counts == (16, 16)
    assert same(first, second) and same(first, uncached)


def test_copied_and_touched_files_are_read_but_not_decoded_again(tmp_path, work):
    place = make_category(tmp_path / "bottle")
    first, _ = reload_counts(work, place)
    for path in (place / "train").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    shutil.copytree(place, tmp_path / "copy" / "bottle")
    assert reload_counts(work, place)[1] == (4, 0)
    copy, counts = reload_counts(work, tmp_path / "copy")
    assert counts == (16, 0) and same(first, copy)


def test_a_file_changed_to_another_of_the_same_size_is_seen(tmp_path, work):
    place = make_category(tmp_path / "bottle", n=2)
    path = place / "train" / "good" / "000.bmp"
    save(path, colours(100))
    first, _ = reload_counts(work, place)
    times = path.stat()
    save(path, colours(101))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # even with its time put back
    second, counts = reload_counts(work, place)
    assert counts == (1, 3) and not torch.equal(first.train, second.train)
    assert torch.equal(first.unlabeled, second.unlabeled)


def test_files_written_just_now_are_not_trusted_by_their_stat(tmp_path, monkeypatch, work):
    monkeypatch.setattr(cache, "_SETTLED_NS", 3600 * 10**9)
    place = make_category(tmp_path / "bottle")
    reload_counts(work, place)
    assert reload_counts(work, place)[1] == (16, 0)


def test_settings_have_their_own_cache_entries(tmp_path, work):
    place = make_category(tmp_path / "bottle")
    reload_counts(work, place)
    assert data.load_folder(place, image_size=8).task.train.shape[-1] == 8
    assert reload_counts(work, place, anomaly="crack")[1] == (0, 8)  # train is shared, unlabeled is not
    grey = make_category(tmp_path / "grey", channels=1)
    assert data.load_folder(grey, image_size=SIZE).task.train.shape[1] == 1
    save(grey / "test" / "good" / "colour.png", colours(5000))
    assert data.load_folder(grey, image_size=SIZE).task.train.shape[1] == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"",
        lambda content: b"nothing like it",
    ],
    ids=["one byte short", "half", "one bit flipped", "empty", "something else"],
)
@pytest.mark.parametrize("kind", ["images-*.npy", "images-*.json", "index-*.json"])
def test_damaged_cache_files_are_made_again(tmp_path, cache_folder, work, damage, kind):
    place = make_category(tmp_path / "bottle")
    first, _ = reload_counts(work, place)
    damaged = sorted(cache_folder.glob(kind))
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    second, counts = reload_counts(work, place)
    assert counts == ((16, 0) if kind.startswith("index") else (0, 16)) and same(first, second)
    third, counts = reload_counts(work, place)
    assert counts == (0, 0) and same(first, third)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"digests": 3, "unreadable": {}}', '{"digests": {}}', "null"]
)
def test_a_table_of_another_form_is_made_again(tmp_path, cache_folder, work, content):
    place = make_category(tmp_path / "bottle")
    first, _ = reload_counts(work, place)
    for path in cache_folder.glob("images-*.json"):
        path.write_text(content)
    second, counts = reload_counts(work, place)
    assert counts == (0, 16) and same(first, second)


def test_an_unwritable_cache_is_gone_without(tmp_path, monkeypatch, caplog):
    place = make_category(tmp_path / "bottle")
    (tmp_path / "file").write_text("a file where a folder should be")
    expected = data.load_folder(place, image_size=SIZE).task
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level("DEBUG", logger="ssad_hpo"):
        assert same(expected, data.load_folder(place, image_size=SIZE).task)
    assert "is not written" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, cache_folder, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    place = make_category(tmp_path / "bottle")
    monkeypatch.setattr(np, "save", full)
    data.load_folder(place, image_size=SIZE)
    assert not list(cache_folder.glob("writing-*")) and not list(cache_folder.glob("images-*.npy"))


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("SSAD_HPO_CACHE", "")
    assert cache.cache_folder() is None
    monkeypatch.delenv("SSAD_HPO_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "ssad_hpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "ssad_hpo"


def test_writing_to_a_cached_task_changes_neither_the_cache_nor_the_next_task(tmp_path):
    place = make_category(tmp_path / "bottle")
    data.load_folder(place, image_size=SIZE)
    cached = data.load_folder(place, image_size=SIZE).task
    before = cached.train.clone()
    cached.train.zero_()
    assert torch.equal(data.load_folder(place, image_size=SIZE).task.train, before)


def test_cached_image_files_name_no_path_and_no_folder(tmp_path, cache_folder):
    place = make_category(tmp_path / "bottle")
    data.load_folder(place, image_size=SIZE)
    for path in cache_folder.glob("images-*.json"):
        table = json.loads(path.read_text())
        assert set(table) == {"digests", "unreadable"} and "crack" not in path.read_text()


def test_reordering_in_place_is_indexing(tmp_path):
    generator = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 50):
        rows, order = generator.integers(0, 256, (n, 2, 3)), generator.permutation(n)
        expected = rows[order]
        cache._reorder(rows, order.tolist())
        assert np.array_equal(rows, expected)


# Testbeds


def test_a_controlled_task_shares_no_pixel_between_train_and_unlabeled(monkeypatch):
    columns = torch.arange(512).div(2, rounding_mode="floor").to(torch.uint8).expand(512, 512)
    monkeypatch.setattr(testbed, "_photograph", lambda texture: columns)
    task = data.controlled_data(contamination=0.0, n_train=300, n_unlabeled=300).task
    assert (task.train.min(), task.train.max()) == (0, 149)
    assert (task.unlabeled.min(), task.unlabeled.max()) == (150, 255)


def test_the_controlled_defaults_are_the_published_setting():
    task, labels = data.controlled_data().task, data.controlled_data().labels
    assert task.name == "gravel/cutavg"
    assert task.train.shape == (256, 1, 64, 64) and task.unlabeled.shape == (128, 1, 64, 64)
    assert labels.dtype == np.int8 and labels.shape == (128,) and labels.sum() == 64
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in task.unlabeled]
    assert digests == sorted(digests)


def test_another_texture_can_be_the_anomaly():
    size = {"image_size": 32, "n_train": 4, "n_unlabeled": 20}
    task, labels = (
        data.controlled_data("gravel", "brick", **size).task,
        data.controlled_data("gravel", "brick", **size).labels,
    )
    clean = data.controlled_data("gravel", "brick", contamination=0.0, **size).task
    kept = [(clean.unlabeled == image).flatten(1).all(1).any().item() for image in task.unlabeled]
    assert kept == [label == 0 for label in labels] and task.name == "gravel/brick"
    assert same(data.load(data.builtin("gravel/brick")), data.controlled_data("gravel", "brick").task)


@pytest.mark.parametrize("kind", ["cutout", "cutavg", "cutpaste", "cutdiff", "rotation"])
def test_f_gen_changes_the_labelled_images_and_no_other(kind):
    anomaly = Augmentation(kind, {} if kind == "rotation" else {"patch_area": 0.05})
    size = {"texture": "brick", "n_train": 8, "n_unlabeled": 40, "image_size": 32}
    task = data.controlled_data(anomaly=anomaly, contamination=0.3, **size).task
    clean = data.controlled_data(anomaly=anomaly, contamination=0.0, **size).task
    labels = data.controlled_data(anomaly=anomaly, contamination=0.3, **size).labels
    differing = (task.unlabeled[:, None] != clean.unlabeled[None]).float().mean((2, 3, 4)).amin(1).numpy()
    assert (differing > 0).tolist() == labels.astype(bool).tolist() and labels.sum() == 12
    assert torch.equal(task.train, clean.train)
    if kind in ("cutout", "cutavg"):  # every anomaly differs from its own crop by its patch alone
        assert differing[labels == 1].mean() == pytest.approx(0.05, abs=0.02)


def test_controlled_names_tell_kind_and_area():
    size = {"n_train": 2, "n_unlabeled": 2, "image_size": 32}
    dynamic = Augmentation("cutout", {"patch_area": Range(0.01, 0.1, log=True)})
    assert data.controlled_data("grass", dynamic, **size).task.name == "grass/cutout/0.01-0.1"
    assert data.controlled_data("grass", Augmentation("rotation"), **size).task.name == "grass/rotation"
    small = Augmentation("cutdiff", {"patch_area": 0.01})
    assert data.controlled_data("brick", small, **size).task.name == "brick/cutdiff/0.01"


@pytest.mark.parametrize("load", [data.controlled_data, data.semantic_data])
def test_testbeds_follow_their_seed_alone(load):
    torch.manual_seed(1)
    first = load(seed=3).task
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, load(seed=3).task) and not torch.equal(first.train, load(seed=4).task.train)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texture": "sand"}, "texture: expected one of gravel, brick, grass, got 'sand'"),
        ({"image_size": 213}, r"image_size: expected 1\.\.212 pixels on a texture, got 213"),
        ({"n_train": 1}, "n_train: expected a whole number >= 2, got 1"),
        ({"n_unlabeled": 2.5}, "n_unlabeled: expected a whole number >= 2, got 2.5"),
        ({"contamination": 1.5}, "contamination: expected a share of anomalies, 0..1, got 1.5"),
        ({"contamination": float("nan")}, "contamination: .*got nan"),
    ],
)
def test_controlled_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.controlled_data(**arguments)


def test_photographs_are_read_without_writing_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    for texture in testbed.TEXTURES:
        photograph = testbed._photograph(texture)
        assert photograph.shape == (512, 512) and photograph.float().std() > 10
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("anomalies", ["others", "rotated"])
def test_no_digit_image_is_used_twice(anomalies):
    task = data.semantic_data(4, anomalies).task
    labels = data.semantic_data(4, anomalies).labels
    assert task.train.shape == (90, 1, 32, 32) and task.unlabeled.shape == (80, 1, 32, 32)
    assert labels.shape == (80,) and labels.sum() == 40
    digests = [digest(image.numpy()) for image in (*task.train, *task.unlabeled)]
    assert len(set(digests)) == 170
    turned = {digest(image.rot90(k, (1, 2)).numpy()) for image in task.unlabeled for k in (1, 2, 3)}
    assert not turned & {digest(image.numpy()) for image in task.train}


@pytest.mark.parametrize("anomalies", ["others", "rotated"])
def test_digit_labels_agree_with_the_data_sets_own_targets(anomalies):
    from sklearn.datasets import load_digits

    digits = load_digits()
    originals = np.round(digits.images.astype(np.float32) / 16 * 255).astype(np.uint8)
    target_of = {digest(image): target for image, target in zip(originals, digits.target, strict=True)}
    task = data.semantic_data(4, anomalies, image_size=8).task
    labels = data.semantic_data(4, anomalies, image_size=8).labels
    for image, label in zip(task.unlabeled[:, 0].numpy(), labels, strict=True):
        upright = [target_of.get(digest(np.rot90(image, k))) for k in range(4)]
        if anomalies == "others":
            assert (upright[0] != 4) == label
        else:
            assert 4 in upright and (upright[0] is None) == label
    assert all(target_of[digest(image)] == 4 for image in task.train.numpy())


def test_every_digit_has_enough_images_for_the_defaults():
    for digit in range(10):
        name = data.load(data.builtin(f"digits/{digit}/rotated")).name
        assert name == f"digits/{digit}/rotated"
    assert data.semantic_data(contamination=0.0).task.unlabeled.shape[0] == 80
    assert data.semantic_data(3, "rotated", contamination=1.0, image_size=64).task.train.shape[-1] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normal": 10}, "normal: expected a digit 0..9, got 10"),
        ({"anomalies": "torn"}, "anomalies: expected 'others' or 'rotated', got 'torn'"),
        ({"image_size": 7}, "image_size: expected at least 8 pixels for digits, got 7"),
        ({"n_train": 170}, "expected no more than the 181 images of digit 4 together, got 210"),
        ({"contamination": -0.1}, "contamination: .*got -0.1"),
    ],
)
def test_semantic_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.semantic_data(**arguments)


# Addresses


@pytest.mark.parametrize(
    "labels", [np.zeros(79, np.int8), np.zeros(80), np.full(80, 2, np.int8)], ids=["few", "floats", "twos"]
)
def test_labels_that_do_not_belong_to_the_images_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels: expected \(80,\) int8 of 0 and 1, got"):
        data.DataSet(data.semantic_data().task, labels)


def test_the_name_of_a_loader_stands_for_its_defaults():
    assert data.builtin("semantic") == data.Source("semantic", {})
    with pytest.raises(ValueError, match="there is no such folder; as a built-in arguments: missing"):
        data.find_source("folder")


def test_every_builtin_name_has_a_task_of_that_name_and_labels():
    names = data.builtin_names()
    assert len(names) == len(set(names)) == 38
    for name in ("gravel/cutavg", "brick/cutpaste", "grass/cutdiff/0.01", "digits/4", "digits/7/rotated"):
        source = data.builtin(name)
        task, labels = data.load(source), data.read_labels(source)
        assert task.name == name and len(labels) == len(task.unlabeled) and labels.mean() == 0.5
    assert all(isinstance(data.builtin(name), data.Source) for name in names)
    assert same(data.load(data.builtin("gravel/cutavg")), data.controlled_data().task)


@pytest.mark.parametrize(
    "name",
    ["", "gravel", "sand/cutavg", "gravel/rotation", "gravel/cutavg/big", "gravel/cutavg/1.5",
     "gravel/cutavg/nan", "gravel/cutavg/0.1/2", "digits", "digits/10", "digits/4/others",
     "digits/4/rotated/1", "digits/"],
)  # fmt: skip
def test_an_unknown_name_is_an_error_that_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"TEXTURE/KIND.*gravel, brick, grass.*cutdiff.*digits/DIGIT"):
        data.builtin(name)


def test_an_address_survives_json_and_gives_the_same_task_and_labels(tmp_path, monkeypatch):
    place = make_category(tmp_path / "bottle")
    anomaly = Augmentation("cutpaste", {"patch_area": 0.1, "angle": Range(-10, 10)})
    monkeypatch.chdir(tmp_path)
    addresses = [
        (
            data.Source("controlled", {"anomaly": anomaly, "seed": 2}),
            data.controlled_data(anomaly=anomaly, seed=2).task,
        ),
        (data.Source("semantic", {"normal": 3}), data.semantic_data(3).task),
        (
            data.Source("folder", {"root": Path(), "anomaly": "crack", "image_size": SIZE}),
            data.load_folder(place, anomaly="crack", image_size=SIZE).task,
        ),
    ]
    monkeypatch.chdir("/")
    for source, task in addresses:
        again = data.Source.from_json(json.loads(json.dumps(source.to_json())))
        assert again == source
        assert same(data.load(again), task) and data.load(again).name == task.name
        assert len(data.read_labels(again)) == len(task.unlabeled)


def test_a_plain_pair_of_folders_has_no_labels(tmp_path):
    place = make_category(tmp_path / "bottle")
    arguments = {"train": place / "train", "unlabeled": place / "test", "image_size": SIZE}
    source = data.Source("folders", arguments)
    assert data.read_labels(source) is None
    assert same(data.load(source), data.load_folder(place, image_size=SIZE).task)


@pytest.mark.parametrize(
    ("loader", "arguments", "message"),
    [
        ("web", {}, "loader: expected one of controlled, semantic, folder, folders, got 'web'"),
        ("folder", {}, "arguments: missing a required argument: 'root'"),
        ("semantic", {"digit": 4}, "arguments: got an unexpected keyword argument 'digit'"),
        ("semantic", {"normal": torch.tensor(4)}, "arguments: .*not JSON serializable"),
        ("folder", {"root": None}, "arguments: .*NoneType"),
    ],
)
def test_an_address_that_cannot_be_is_an_error(loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.Source(loader, arguments)
