"""Where held-out images come from: set aside by content, of a folder, and of built-in data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import SIZE, colours, make_category, same, save

from ssad_hpo import controlled_data, data, semantic_data
from ssad_hpo.data import DataError, Source, find_source
from ssad_hpo.task import Task


def rows_of(images: torch.Tensor | None) -> list[bytes]:
    assert images is not None
    return sorted(image.numpy().tobytes() for image in images)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 4, 4), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_what_is_set_aside_is_decided_by_content_alone(share: float) -> None:
    images = noise(40)
    task = Task("a", images, noise(5, 1)).set_aside(share)
    assert task.held_out is not None and len(task.held_out) == round(share * 40)
    assert len(task.train) == 40 - round(share * 40) and torch.equal(task.unlabeled, noise(5, 1))
    assert sorted([*rows_of(task.train), *rows_of(task.held_out)]) == rows_of(images)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    other = Task("of another name", images[order], noise(9, 3)).set_aside(share)
    assert rows_of(other.held_out) == rows_of(task.held_out) and rows_of(other.train) == rows_of(task.train)
    # What is set aside says nothing of the images' order or brightness.
    assert rows_of(task.held_out) != rows_of(images[: len(task.held_out)])


def test_another_image_moves_at_most_one_across() -> None:
    images = noise(40)
    before, after = (Task("a", part, noise(5, 1)).set_aside(0.5) for part in (images[:39], images))
    assert len({*rows_of(before.held_out)} - {*rows_of(after.held_out)}) <= 1


def test_images_of_the_same_content_stay_together() -> None:
    images = noise(4)
    for copies in ([9, 9, 9, 9], [30, 2, 2, 2], [2, 2, 2, 30]):
        train = images.repeat_interleave(torch.tensor(copies), dim=0)
        task = Task("copies", train, noise(5, 1)).set_aside(0.3)
        assert not {*rows_of(task.train)} & {*rows_of(task.held_out)}
        assert len(rows_of(task.train)) + len(rows_of(task.held_out)) == len(train)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), float("inf"), "a quarter", None, True])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ValueError, match=r"^held_out_share: expected a share of the train images, 0..1, got"):
        Task("a", noise(10), noise(5, 1)).set_aside(share)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "share"), [(10, 0.1), (10, 0.9), (3, 0.5)])
def test_a_share_that_leaves_too_few_on_a_side_is_refused(n: int, share: float) -> None:
    with pytest.raises(ValueError, match=rf"^held_out_share: {share} of {n} train images leaves fewer than"):
        Task("a", noise(n), noise(5, 1)).set_aside(share)


def test_all_of_one_content_cannot_be_set_aside() -> None:
    with pytest.raises(ValueError, match="leaves fewer than two"):
        Task("a", noise(1).repeat(10, 1, 1, 1), noise(5, 1)).set_aside(0.3)


def test_held_out_images_are_checked_hashed_and_not_set_aside_twice() -> None:
    task = Task("a", noise(10), noise(5, 1), noise(4, 2))
    assert task.content_hash != Task("a", noise(10), noise(5, 1)).content_hash
    assert task.content_hash != Task("a", noise(10), noise(5, 1), noise(4, 3)).content_hash
    with pytest.raises(ValueError, match="has held-out images already"):
        task.set_aside(0.3)
    with pytest.raises(ValueError, match=r"^held_out: expected \(N, C, H, W\) with N >= 2"):
        Task("a", noise(10), noise(5, 1), noise(1))
    with pytest.raises(ValueError, match=r"^held_out: expected images of train's shape \(1, 4, 4\)"):
        Task("a", noise(10), noise(5, 1), noise(8).reshape(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^held_out: expected a uint8 tensor"):
        Task("a", noise(10), noise(5, 1), noise(4).float())


# Folders


def more(place: Path, n: int = 5, first: int = 500) -> Path:
    for i in range(n):
        save(place / f"{i}.png", colours(first + i))
    return place


def test_a_folder_of_held_out_images_joins_a_category_and_leaves_its_other_images(tmp_path: Path) -> None:
    root, extra = make_category(tmp_path / "cloth"), more(tmp_path / "extra")
    plain = data.load(find_source(root, image_size=SIZE))
    task = data.load(find_source(root, image_size=SIZE, held_out=extra))
    assert same(plain, task) and plain.held_out is None and task.held_out is not None
    assert rows_of(task.held_out) == rows_of(data.read_images(sorted(extra.iterdir()), SIZE, 3)[0])
    both = data.load_folders(root / "train", root / "test", image_size=SIZE, held_out=extra)
    assert rows_of(both.task.held_out) == rows_of(task.held_out)
    # Their order says nothing of their names.
    for i, path in enumerate(sorted(extra.iterdir(), reverse=True)):
        path.rename(extra / f"named {i * 7 % 5}.png")
    again = data.load(find_source(root, image_size=SIZE, held_out=extra))
    assert again.held_out is not None and torch.equal(again.held_out, task.held_out)


def test_a_share_of_train_is_set_aside_whatever_its_files_are_called(tmp_path: Path) -> None:
    root = make_category(tmp_path / "cloth", n=8)
    source = find_source(root, image_size=SIZE, held_out_share=0.25)
    task, plain = data.load(source), data.load(find_source(root, image_size=SIZE))
    expected = plain.set_aside(0.25)
    assert same(task, expected) and task.held_out is not None and expected.held_out is not None
    assert torch.equal(task.held_out, expected.held_out) and len(task.held_out) == 2
    assert np.array_equal(data.read_labels(source), data.read_labels(find_source(root, image_size=SIZE)))
    for i, path in enumerate(sorted((root / "train" / "good").iterdir(), reverse=True)):
        path.rename(path.with_name(f"{i * 5 % 8} renamed.png"))
    assert data.load(source).content_hash == task.content_hash


def test_what_is_held_out_is_decided_by_the_files_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_category(tmp_path / "cloth", n=12)
    files = sorted((root / "train" / "good").iterdir())
    monkeypatch.setattr("ssad_hpo.data.folder._LEAST_TO_SHARE", len(files))
    files[0].write_bytes(b"no image")
    source = find_source(root, image_size=SIZE, skip_unreadable=True)
    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        task = data.load(source)
    assert data.holds_out(source) and task.held_out is not None


def test_a_folder_and_a_share_at_once_are_refused(tmp_path: Path) -> None:
    root, extra = make_category(tmp_path / "cloth"), more(tmp_path / "extra")
    with pytest.raises(DataError, match=r"^held_out_share: there is a folder of held-out images already"):
        data.load_folder(root, image_size=SIZE, held_out=extra, held_out_share=0.25)


@pytest.mark.parametrize("other", ["train", "test"])
def test_a_file_in_two_folders_is_refused_and_a_copy_is_told(tmp_path: Path, other: str) -> None:
    root, extra = make_category(tmp_path / "cloth"), more(tmp_path / "extra")
    name = "train" if other == "train" else "unlabeled"
    (extra / "link.png").symlink_to(root / other / "good" / "000.png")
    with pytest.raises(DataError, match=rf"link\.png: is in {name} and in held_out; give folders that share"):
        data.load_folder(root, image_size=SIZE, held_out=extra)
    with pytest.raises(DataError, match=rf"is in {name} and in held_out"):
        data.load_folders(root / "train", root / "test", image_size=SIZE, held_out=root / other / "good")
    (extra / "link.png").unlink()
    (extra / "copy.png").write_bytes((root / other / "good" / "000.png").read_bytes())
    told = rf"1 of 6 held_out images have the same content as one in {name}; what is to be judged"
    with pytest.warns(UserWarning, match=told):
        data.load_folder(root, image_size=SIZE, held_out=extra)


def test_a_folder_without_enough_held_out_images_is_named(tmp_path: Path) -> None:
    root = make_category(tmp_path / "cloth")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", more(tmp_path / "one", n=1), tmp_path / "missing"):
        with pytest.raises(DataError, match=folder.name):
            data.load_folder(root, image_size=SIZE, held_out=folder)


def test_the_address_of_a_run_keeps_the_folder_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_category(tmp_path / "cloth"), more(tmp_path / "extra")
    monkeypatch.chdir(tmp_path)
    source = find_source("cloth", image_size=SIZE, held_out="extra")
    assert source.arguments["held_out"] == str(tmp_path / "extra")
    monkeypatch.chdir("/")
    assert data.load(source).held_out is not None


def test_an_address_without_held_out_images_is_that_of_an_older_run(tmp_path: Path) -> None:
    root = make_category(tmp_path / "cloth")
    older = {"root": str(root), "category": None, "anomaly": None, "image_size": 16}
    older |= {"keep_ratio": True, "skip_unreadable": False}
    said = find_source(root, image_size=16, held_out=None, held_out_share=0.0, bit_depth=16)
    assert said.arguments == older
    assert find_source(root, image_size=16).arguments == {**older, "held_out_share": None}  # by their number
    pair = {"train": str(root / "train"), "unlabeled": str(root / "test")}
    assert Source("folders", {**pair, "held_out": None, "held_out_share": 0.0}) == Source("folders", pair)


# Built-in data sets


SMALL = {"image_size": 16, "n_train": 30, "n_unlabeled": 20}


@pytest.mark.parametrize("columns", ["unlabeled", "train"])
def test_held_out_crops_change_no_other_image_or_label(columns: str) -> None:
    plain = controlled_data(**SMALL)
    more = controlled_data(**SMALL, n_held_out=9, held_out_columns=columns)
    assert same(plain.task, more.task) and np.array_equal(plain.labels, more.labels)
    assert plain.task.held_out is None and more.task.held_out is not None
    assert more.task.held_out.shape == (9, 1, 16, 16)


def test_held_out_crops_are_of_the_columns_that_were_asked_for() -> None:
    """Every crop is found again in its part of the photograph, and not in the other."""
    from skimage.data import gravel

    photograph = gravel()
    parts = {"train": photograph[:, :300], "unlabeled": photograph[:, 300:]}
    windows = {
        name: {w.tobytes() for w in np.lib.stride_tricks.sliding_window_view(part, (8, 8)).reshape(-1, 8, 8)}
        for name, part in parts.items()
    }
    for columns, other in (("unlabeled", "train"), ("train", "unlabeled")):
        task = controlled_data(**SMALL, n_held_out=40, held_out_columns=columns).task
        assert task.held_out is not None
        corners = [image[0, :8, :8].numpy().tobytes() for image in task.held_out]
        assert all(corner in windows[columns] for corner in corners)
        assert not any(corner in windows[other] for corner in corners)


@pytest.mark.parametrize("anomalies", ["others", "rotated"])
def test_held_out_digits_change_no_other_image_and_are_used_once(anomalies: str) -> None:
    size = {"normal": 3, "image_size": 8, "n_train": 40, "n_unlabeled": 30, "anomalies": anomalies}
    plain, more = semantic_data(**size), semantic_data(**size, n_held_out=20)
    assert same(plain.task, more.task) and np.array_equal(plain.labels, more.labels)
    images = [*rows_of(more.task.held_out), *rows_of(more.task.train)]
    upright = rows_of(more.task.unlabeled[torch.from_numpy(more.labels == 0)])
    assert len(set(images) | set(upright)) == len({*images}) + len({*upright}) and len(images) == 60


@pytest.mark.parametrize("count", [1, -1, 2.5, "two"])
def test_a_number_of_held_out_images_that_cannot_be_is_named(count: object) -> None:
    for make in (controlled_data, semantic_data):
        with pytest.raises(ValueError, match=r"n_held_out: expected"):
            make(n_held_out=count)
    with pytest.raises(ValueError, match=r"^held_out_columns: expected 'unlabeled' or 'train', got 'both'"):
        controlled_data(n_held_out=4, held_out_columns="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_train, n_unlabeled, n_held_out: expected no more than the"):
        semantic_data(n_held_out=170)


def test_a_ready_made_source_takes_held_out_images() -> None:
    task = data.load(Source("controlled", {**SMALL, "n_held_out": 7}))
    assert task.held_out is not None and len(task.held_out) == 7
