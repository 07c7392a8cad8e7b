"""Studies in cells: each is computed once and kept as a file, so that a killed study goes on where it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from ssad_hpo.numerics import threads

CellT = TypeVar("CellT")


def cell_path(folder: Path, name: str, *settings: object) -> Path:
    """Where a cell is kept: other settings are another file, never taken for this one.

    Args:
        folder: of all cells.
        name: for people; "/" and blanks become "-".
        settings: all that decides the cell's content; told apart by `repr`.
    """
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return folder / f"{name.replace('/', '-').replace(' ', '-')}_{digest}.json"


def run_missing(
    cells: Sequence[CellT],
    path_of: Callable[[CellT], Path],
    work: Callable[[CellT], dict[str, Any]],
    jobs: int,
) -> list[dict[str, Any]]:
    """Compute the cells that are not kept yet, by one thread each, and return all.

    Args:
        cells: cheap to send to a process; of several with one path one is computed.
        path_of: where each is kept.
        work: a function at the top of its module, which gives what is kept as JSON. Its seconds are
            added under "seconds".
        jobs: processes side by side; one is this process.

    Returns:
        What is kept of each cell, in order.
    """
    paths = [path_of(cell) for cell in cells]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    wanted = dict(zip(paths, cells, strict=True))
    missing = [(path, cell) for path, cell in wanted.items() if not path.exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there", flush=True)
    started = time.monotonic()
    if jobs == 1:
        with threads(1):
            for path, cell in missing:
                _keep(work, cell, path)
        return [json.loads(path.read_text()) for path in paths]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=begin_worker, initargs=(os.getpid(),)) as pool:
        futures = [pool.submit(_keep, work, cell, path) for path, cell in missing]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                left = (time.monotonic() - started) / done * (len(missing) - done) / 60
                print(f"{done} of {len(missing)} done, about {left:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is shown now, not after the last cell
            raise
    return [json.loads(path.read_text()) for path in paths]


def begin_worker(parent: int) -> None:
    """One thread for each process; and none of them goes on for a study that was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep(work: Callable[[CellT], dict[str, Any]], cell: CellT, path: Path) -> None:
    """Do the work, and write the file whole or not at all."""
    started = time.monotonic()
    content = work(cell)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**content, "seconds": round(time.monotonic() - started, 2)}))
    os.replace(partial, path)
