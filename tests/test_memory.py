"""Files that are larger than they look: refused by what they declare, or read in little memory."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ended
from PIL import Image

from ssad_hpo.data import DataError, read_images
from ssad_hpo.search import select_detectors

pytestmark = pytest.mark.usefixtures("workplace")

READ = """
import sys
from pathlib import Path
from ssad_hpo.data import read_images
images, *_ = read_images([Path(sys.argv[1])], 16, 1)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(images.min()), int(images.max()), peak.split()[1])  # kB; what the parent once had is no part of it
"""


def write_png(path: Path, width: int, height: int, colour_type: int, row: bytes) -> None:
    """A PNG of 16 or 8 bits whose rows are all the same, without ever holding them."""
    depth = 16 if colour_type == 0 else 8

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour_type, 0, 0, 0])
    packing = zlib.compressobj(1)
    packed = b"".join(packing.compress(b"\0" + row) for _ in range(height)) + packing.flush()
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("colour_type", "pixel", "expected"),
    [(0, (40 * 257).to_bytes(2, "big"), 40), (6, bytes([9, 9, 9, 255]), 9)],
)
def test_an_image_at_the_limit_is_read_in_1500_mb(
    colour_type: int, pixel: bytes, expected: int, tmp_path: Path
) -> None:
    """Of 16 bits, and with an alpha channel: both have been converted as a whole."""
    write_png(tmp_path / "a.png", 9400, 9400, colour_type, pixel * 9400)
    command = [sys.executable, "-c", READ, str(tmp_path / "a.png")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    least, most, peak = map(int, told.stdout.split())
    assert least == most == expected
    assert peak < 1_500_000  # kB


def test_a_larger_image_is_refused_by_its_header_in_one_sentence(
    tmp_path: Path, call: Callable[..., Ended]
) -> None:
    write_png(tmp_path / "bomb.png", 60000, 60000, 0, b"")  # no pixels: it is not asked for any
    with (
        warnings.catch_warnings(),
        pytest.raises(DataError, match=r"3600000000 pixels, .*--max-pixels 36"),
    ):
        warnings.simplefilter("error")
        read_images([tmp_path / "bomb.png"], 16, 1)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (20, 20), i).save(tmp_path / name / f"{i}.png")
    words = ["--train", tmp_path / "train", "--unlabeled", tmp_path / "test", "--max-pixels", "399"]
    said = call("search", *words, "--no-tracking")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert "has 400 pixels, expected at most 399" in said.err and "--max-pixels 400" in said.err


def test_a_large_image_that_is_allowed_is_read_without_a_word(tmp_path: Path) -> None:
    write_png(tmp_path / "wide.png", 100_000, 900, 0, (7 * 257).to_bytes(2, "big") * 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, *_ = read_images([tmp_path / "wide.png"], 16, 1, max_pixels=10**8)
    assert (images == 7).all()


def declaring(path: Path, shape: tuple[int, ...]) -> None:
    """An npz file whose `train` declares a shape and holds next to nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", header.getvalue() + bytes(64))


def test_an_array_that_declares_more_than_it_has_is_refused_before_room_is_made(tmp_path: Path) -> None:
    declaring(tmp_path / "a.npz", (2**26, 512))  # 256 GiB
    with pytest.raises(ValueError, match=r"train\.npy declares 274877906944 bytes and has 64"):
        select_detectors([tmp_path / "a.npz"])


def test_arrays_that_unpack_to_more_than_their_limit_are_refused(
    tmp_path: Path, call: Callable[..., Ended]
) -> None:
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    np.savez_compressed(path, **{name: rng.random((9, 4)) for name in ("train", "augmented", "unlabeled")})
    assert call("select", path).code == 0
    said = call("select", path, "--max-bytes", "1000")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert "expected at most 1000" in said.err and "--max-bytes" in said.err
    assert "max_bytes: expected a whole number >= 1" in call("select", path, "--max-bytes", "0").err
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("train.npy", "w") as file:
        shape = (2**22, 16)  # 512 MiB of zeros
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        for _ in range(512):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"it unpacks to .* expected at most 1048576"):
        select_detectors([path], max_bytes=2**20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
