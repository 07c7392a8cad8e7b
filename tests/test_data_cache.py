"""Decoded folders are kept: nothing is read twice, and damage is repaired."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from image_folders import SIZE, colours, make_category, same, save

from ssad_hpo import data
from ssad_hpo.data import cache, pixels

pytestmark = pytest.mark.usefixtures("cache_folder")


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
    monkeypatch.setattr(pixels, "decode", counted(pixels.decode, "decoded"))
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
        if content not in ("[]", "null"):  # of another form, and yet whole
            cache._write_json(path, json.loads(content))
    second, counts = reload_counts(work, place)
    assert counts == (0, 16) and same(first, second)


def test_an_index_that_was_changed_to_another_valid_one_is_made_again(tmp_path, cache_folder, work):
    place = make_category(tmp_path / "bottle")
    first, _ = reload_counts(work, place)
    for path in cache_folder.glob("index-*.json"):
        index = json.loads(path.read_text())
        for entry in index["content"].values():
            entry[-1] = not entry[-1]  # a coloured file called grey, or a grey one coloured
        path.write_text(json.dumps(index))
    second, _ = reload_counts(work, place)
    assert same(first, second)


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


def _written_slowly(folder, pipe):
    def write(file):
        file.write(b"half of it")
        file.flush()
        pipe.send("writing")
        pipe.recv()

    cache._write(folder / "whole", write)


def test_what_a_killed_writer_left_goes_and_a_living_one_goes_on(cache_folder):
    ours, theirs = multiprocessing.Pipe()
    writers = [
        multiprocessing.get_context("fork").Process(target=_written_slowly, args=(cache_folder, theirs))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
        assert ours.recv() == "writing"
    assert len(list(cache_folder.glob("writing-*"))) == 2
    writers[0].kill()
    writers[0].join()
    cache._write_json(cache_folder / "other.json", {})
    assert len(list(cache_folder.glob("writing-*"))) == 1
    ours.send("go on")
    writers[1].join()
    assert sorted(path.name for path in cache_folder.iterdir()) == ["other.json", "whole"]


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
        table = json.loads(path.read_text())["content"]
        assert set(table) == {"digests", "unreadable"} and "crack" not in path.read_text()


def test_reordering_in_place_is_indexing(tmp_path):
    generator = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 50):
        rows, order = generator.integers(0, 256, (n, 2, 3)), generator.permutation(n)
        expected = rows[order]
        cache._reorder(rows, order.tolist())
        assert np.array_equal(rows, expected)
