"""A few kills of the command line at random moments; `python -m tests.kill_loops` does many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kill_loops import Loop, Told, kill_loop, search_loop, sweep_loop, tuning_loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]


def test_a_search_and_a_tuning_that_are_killed_at_random_moments_end_like_undisturbed_ones(
    tmp_path: Path,
) -> None:
    def kill(loop: Loop) -> Told:
        (place := tmp_path / loop.command).mkdir()
        return kill_loop(loop, 3, place)

    with ThreadPoolExecutor() as both:  # the processes that are killed are beside each other
        for told in both.map(kill, (search_loop(3), tuning_loop(3))):
            assert told.wrong == []
            assert told.kills.total() == 3


@pytest.mark.services
def test_a_sweep_that_is_killed_in_an_open_trial_ends_like_an_undisturbed_one(
    local_ray: str, tmp_path: Path
) -> None:
    (place := tmp_path / "loop").mkdir()
    told = kill_loop(sweep_loop(1), 1, place, more=f"--address {local_ray}")
    assert told.wrong == []
    assert told.kills.total() == 1
