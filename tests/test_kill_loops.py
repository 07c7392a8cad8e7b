"""A few kills of the command line at random moments; `python -m tests.kill_loops` does many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kill_loops import Loop, kill_loop, search_loop, sweep_loop, tuning_loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


@pytest.mark.parametrize("make", [search_loop, tuning_loop])
def test_a_run_that_is_killed_at_random_moments_ends_like_an_undisturbed_one(
    make: Callable[[int], Loop], tmp_path: Path
) -> None:
    (place := tmp_path / "loop").mkdir()
    told = kill_loop(make(3), 3, place)
    assert told.wrong == []
    assert told.kills.total() == 3


@pytest.mark.services
@pytest.mark.ray
def test_a_sweep_that_is_killed_in_an_open_trial_ends_like_an_undisturbed_one(
    local_ray: str, tmp_path: Path
) -> None:
    (place := tmp_path / "loop").mkdir()
    told = kill_loop(sweep_loop(1), 1, place, more=f"--address {local_ray}")
    assert told.wrong == []
    assert told.kills.total() == 1
