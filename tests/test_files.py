"""Files that are written whole or not at all, also by several writers of one path."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

from ssad_hpo.files import read_tensors, replaced, write_tensors

KILLED = """
import os, signal, sys
from pathlib import Path
from ssad_hpo.files import replaced
with replaced(Path(sys.argv[1])) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
LETTERS = """
import sys
from pathlib import Path
from ssad_hpo.files import replaced
for _ in range(200):
    with replaced(Path(sys.argv[1])) as draft:
        draft.write_text(sys.argv[2] * 100_000)
"""


def test_a_second_writer_waits_for_the_first_and_both_write_the_whole_file(tmp_path: Path) -> None:
    path, ended = tmp_path / "file", []

    def write() -> None:
        with replaced(path) as draft:
            draft.write_text("second")
        ended.append(True)

    with replaced(path) as draft:
        other = Thread(target=write)
        other.start()
        other.join(0.3)
        draft.write_text("first")
        assert not ended and not path.exists()
    other.join()
    assert ended and path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_processes_that_write_the_same_file_again_and_again_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", LETTERS, path, letter]) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    text = path.read_text()
    assert len(text) == 100_000 and len(set(text)) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -signal.SIGKILL
    assert path.read_text() == "before" and len(os.listdir(tmp_path)) == 2
    with replaced(path) as draft:
        draft.write_text("after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replaced(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_tensors_can_be_read_by_whoever_can_read_other_files_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("as the user's mask has it")
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}
    write_tensors(tensors, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
    found = read_tensors(tmp_path / "tensors", 2**20)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
