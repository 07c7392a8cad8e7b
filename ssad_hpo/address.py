"""Addresses of databases and servers, as they may be written down: without passwords and tokens."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

_STARS = "***"
# Parameters of addresses that hold no secret. Of all others nobody knows.
_HARMLESS = frozenset(
    "allow_bucket_creation allow_bucket_deletion application_name cache charset check_same_thread "
    "connect_timeout endpoint_override host immutable isolation_level mode port project_id region "
    "replication retry_limit_seconds scheme sslmode timeout uri".split()
)

_NO_HOSTS = ("sqlite", "databricks")  # schemes of files, and of names in a user's own settings
_BEHIND_PATH, _PARAMETER = re.compile(r"[?#]"), re.compile(r"\?[\w.-]+=")
_HOST = re.compile(r"(\[[^\]]*\]|[^:/]*)(:\d*)?(/[^:]*)?")
# A host forgotten, or an "@" written as %40: what stands there instead may be a password.
_NO_PORT = re.compile(r"^([^:/?#\[\]]*:)(?!\d*(?:[/?#]|$))[^/?#]*")
_QUOTED_USER = re.compile(r"^[^/?#]*%40[^/?#]*")


def without_password(address: str) -> str:
    """The address with stars for whatever may be a password or a token.

    That is the password; a user without one, which servers take for a token; the values of parameters that
    are not known to be harmless; and the fragment. An "@" or "/" may be inside: the host begins behind the
    last "@". Of SQLite's files only parameters are looked at, since paths hold any character.

    >>> without_password("postgresql://me:s3/c@ret@db/studies?sslmode=require&sslpassword=s3cret")
    'postgresql://me:***@db/studies?sslmode=require&sslpassword=***'
    >>> without_password("https://t0ken@mlflow#t0ken")
    'https://***@mlflow#***'
    """
    scheme, mark, rest = address.partition("://") if "://" in address else ("", "", address)
    if scheme.startswith("sqlite") and rest.startswith("/"):
        return scheme + mark + _starred_query(rest)
    user, at, place = _parted(rest)
    name, colon, password = user.partition(":")
    if at:
        user = f"{name}:{_STARS}" if colon and name and password else _STARS
    if scheme and not scheme.startswith(_NO_HOSTS):
        place = _NO_PORT.sub(rf"\1{_STARS}", _QUOTED_USER.sub(_STARS, place))
    place, fragment, _ = place.partition("#")
    return scheme + mark + user + at + _starred_query(place, "?;") + (fragment and fragment + _STARS)


def _parted(rest: str) -> tuple[str, str, str]:
    """User with password, "@", and host with all behind it; without a user the first two are empty.

    Where an "@" may be the user's as well as a parameter's, all on both of its sides is stars.
    """
    user, at, place = rest.rpartition("@")
    begin = _BEHIND_PATH.search(user)
    if begin is None:
        return user, at, place
    before = user[: begin.start()]
    if "@" not in before:
        if not _HOST.fullmatch(before):
            return user, at, place  # a password with "?" or "#" in it
        if _PARAMETER.match(user, begin.start()):
            return "", "", rest
    return _STARS, at, _STARS


def _starred_query(place: str, marks: str = "?") -> str:
    begin = next((i for i, c in enumerate(place) if c in marks), len(place))
    return place[: begin + 1] + re.sub(r"[^&;]+", _starred_parameter, place[begin + 1 :])


def _starred_parameter(parameter: re.Match[str]) -> str:
    name, equals, value = parameter[0].partition("=")
    if name.lower() in _HARMLESS and not set("@?") & set(unquote(value)):  # those of an address within
        return parameter[0]
    return name + equals + _STARS if equals else _STARS


def hides_password(address: str | None) -> bool:
    """Whether `without_password` starred something out."""
    return address is not None and _STARS in address


def without_password_of(address: str, text: str) -> str:
    """A text, such as an error, with stars for all that `without_password` stars out of the address.

    For parts of it as well: who takes a "/" in a password for the end of a port names what is before it.
    """
    kept = without_password(address)
    pattern = "(.*)".join(map(re.escape, kept.split(_STARS)))
    hidden = re.fullmatch(pattern, address, re.DOTALL)
    wholes = [form for whole in (hidden.groups() if hidden else ()) for form in (whole, unquote(whole))]
    parts = {part for whole in wholes for part in (whole, *re.split(r"[/@?#:&=]", whole))}
    secrets = {form for part in parts for form in (part, quote(part), quote(part, safe=""), repr(part)[1:-1])}
    text = text.replace(address, kept)
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) > 2:  # shorter ones are in any text
            text = text.replace(secret, _STARS)
    return text
