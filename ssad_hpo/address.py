"""Addresses of databases and servers, as they may be written down."""

from __future__ import annotations

import re


def without_password(address: str) -> str:
    """The URL with its password starred out; "scheme://user:***@host"."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", address)


def hides_password(address: str | None) -> bool:
    """Whether `without_password` starred something out."""
    return address is not None and ":***@" in address
