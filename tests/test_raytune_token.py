"""Ray's token is its owner's alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ssad_hpo.files import write_private

PREPARE = """
import os, sys
os.umask(0)
from ssad_hpo.raytune.token import prepare_token
prepare_token()
from ray._raylet import AuthenticationTokenLoader
print(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
"""


def prepared(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    mine = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    return subprocess.run(
        [sys.executable, "-c", PREPARE],
        env={**mine, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_a_ray_of_this_machine_finds_a_token_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    assert prepared(tmp_path).stdout == "True\n"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    content = token.read_text()
    token.chmod(0o644)
    told = prepared(tmp_path)
    assert f"{token}: other users can read Ray's token; run `chmod 600 {token}`" in told.stderr
    assert token.read_text() == content


@pytest.mark.parametrize("given", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}])
def test_none_is_made_for_who_has_one_or_wants_none(given: dict[str, str], tmp_path: Path) -> None:
    prepared(tmp_path, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_private_file_is_never_replaced_and_never_open(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "a", "first")
    finally:
        os.umask(before)
    write_private(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("what", ["empty", "dangling"])
def test_a_file_without_a_token_gets_one_that_its_owner_alone_can_read(what: str, tmp_path: Path) -> None:
    """Ray would write its own into it, for all to read."""
    token, behind = tmp_path / ".ray" / "auth_token", tmp_path / "kept" / "token"
    token.parent.mkdir()
    if what == "empty":
        token.touch(mode=0o666)
        behind = token
    else:
        token.symlink_to(behind)
    assert prepared(tmp_path).stdout == "True\n"
    assert stat.S_IMODE(behind.stat().st_mode) == 0o600 and len(token.read_text()) == 64


def test_the_folder_of_a_token_is_its_owners_alone(tmp_path: Path) -> None:
    prepared(tmp_path)
    assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == 0o700


def test_a_home_that_takes_no_token_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssad_hpo.raytune.token import prepare_token

    (tmp_path / ".ray").touch()
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"Ray's token cannot be made in ~/.ray .* set RAY_AUTH_TOKEN_PATH"):
        prepare_token()
