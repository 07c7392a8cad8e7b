"""Image files become pixels: formats, modes, channels, orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import SIZE, colours, digest, palette_image, pixels_of, read_one, save
from PIL import ExifTags, Image, ImageDraw

from ssad_hpo import data
from ssad_hpo.data import load_folders, read_images

pytestmark = pytest.mark.usefixtures("cache_folder")


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
    images, read, lost = data.read_images([str(path) for path in paths], SIZE, 3)
    assert read == paths and lost == []
    assert np.array_equal(images.numpy(), np.stack([pixels_of(path) for path in paths]))


# Tall and wide images


def draw(path: Path, size: tuple[int, int], dot: tuple[float, float] = (0.5, 0.5), **save: Any) -> None:
    """Dark, with a bright dot at a place given as shares of width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, 20)
    x, y = dot[0] * size[0], dot[1] * size[1]
    ImageDraw.Draw(image).ellipse((x - 6, y - 6, x + 6, y + 6), 250)
    image.save(path, **save)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(100, 100)], (32, 32)),
        ([(100, 124)], (32, 32)),  # nearly square
        ([(100, 200)], (64, 32)),
        ([(300, 100)], (32, 96)),
        ([(40, 1000)], (128, 32)),  # no longer than four times its width
        ([(100, 200), (100, 210), (500, 100)], (64, 32)),  # the median
    ],
)
def test_tall_and_wide_images_stay_so(
    sizes: list[tuple[int, int]], expected: tuple[int, int], tmp_path: Path
) -> None:
    for i in range(6):
        draw(tmp_path / "train" / f"{i}.png", sizes[i % len(sizes)], (0.3, 0.1 * i))
        draw(tmp_path / "test" / f"{i}.png", (77, 90), (0.6, 0.1 * i))
    task = load_folders(tmp_path / "train", tmp_path / "test", image_size=32).task
    assert tuple(task.train.shape[2:]) == tuple(task.unlabeled.shape[2:]) == expected
    squeezed = load_folders(tmp_path / "train", tmp_path / "test", image_size=32, keep_ratio=False).task
    assert tuple(squeezed.train.shape[2:]) == (32, 32)


def test_a_tall_image_is_not_turned_and_a_turned_one_is_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    for i in range(2):
        draw(tmp_path / "train" / f"{i}.jpg", (200, 100), (0.1, 0.5), exif=exif, quality=95 - i)
        draw(tmp_path / "test" / f"{i}.png", (100, 200), (0.5, 0.1 + i / 10))
    task = load_folders(tmp_path / "train", tmp_path / "test", image_size=32).task
    assert task.train.shape == (2, 1, 64, 32)
    brightest = task.train.flatten(1).argmax(1)
    assert ((brightest // 32) < 16).all()  # the dot was at the left, and is shown above


def test_new_images_are_scored_at_the_shape_that_the_detector_has(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png", (50, 90), (0.5, 0.2 * i))
    images, *_ = read_images([tmp_path / f"{i}.png" for i in range(3)], (64, 24), 1)
    assert images.shape == (3, 1, 64, 24)
