"""Owns where a live stream comes from or goes to, and that its secrets are never shown.

An Address prints without password, query or stream key; only `secret` holds them, for FFmpeg.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.errors import ConfigError

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d+)?"
# Some cameras want their password in the path or the query, RTMP servers a stream key at its end.
_KEYED = ("rtmp", "rtmps", "rtmpt")
_IN_PATH = re.compile(r"(user|login|pass|pwd|psw|token|key|auth|secret)[a-z_]*[=:]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Address:
    """A URL that FFmpeg opens, or a local file, folder or device."""

    shown: str
    """For messages, logs and metrics: nothing in it is secret."""
    secret: str = field(repr=False)
    """As FFmpeg wants it: user and password percent-encoded."""
    scheme: str
    """rtsp, rtmp, udp …; empty for a local path."""

    def __str__(self) -> str:
        return self.shown

    def named(self, name: str) -> "Address":
        """The same, which prints as `NAME (URL)`."""
        return replace(self, shown=f"{name} ({self.shown})")

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Take a URL whose password may hold any character, or a path.

        A password with `@ : / #` need not be percent-encoded. Where it could be read in two ways
        everything before the last @ is user and password. Raises ConfigError, without the text.
        """
        scheme, found, rest = text.partition("://")
        if not found:
            return cls(text, text, "")
        scheme = scheme.lower()
        if scheme == "file":
            return cls(text, rest, "")
        user, where = _split(rest)
        if not re.match(rf"@?{_HOST}(?=[/?#]|$)", where):
            raise ConfigError(f"{scheme}://***: not a URL; give SCHEME://[USER:PASSWORD@]HOST/PATH")
        login = "" if user is None else _encoded(user) + "@"
        shown = ("" if user is None else "***@") + _without_secrets(scheme, where)
        return cls(f"{scheme}://{shown}", f"{scheme}://{login}{where}", scheme)

    @classmethod
    def from_environment(cls, name: str, environment: Mapping[str, str] = os.environ) -> "Address":
        """The URL in the variable `name`, or in the file that the variable `name`_FILE names."""
        if name in environment:
            return cls.parse(environment[name].strip())
        if f"{name}_FILE" not in environment:
            raise ConfigError(f"neither {name} nor {name}_FILE is set in the environment; set one")
        path = Path(environment[f"{name}_FILE"])
        try:
            return cls.parse(path.read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the file of {name} cannot be read; check it") from error


def without_secrets(path: str) -> str | None:
    """What a URL shows of itself, also one that was taken for a path (`https:/HOST`); else None."""
    scheme, found, rest = path.partition(":/")
    if not found or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return None
    try:
        return Address.parse(f"{scheme}://{rest.lstrip('/')}").shown
    except ConfigError:
        return f"{scheme}://***"


def _split(rest: str) -> tuple[str | None, str]:
    """User and password, or None, and what follows them."""
    before, at, after = rest.rpartition("@")
    if not at or not before:  # udp://@239.0.0.1:1234 is FFmpeg's way to say "listen there"
        return None, rest
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority and re.fullmatch(_HOST, authority):
        return None, rest  # rtsp://host/path@1
    return before, after


def _encoded(user: str) -> str:
    # What is percent-encoded already stays; a stray % is encoded.
    name, colon, password = user.partition(":")
    return quote(unquote(name), safe="") + colon + quote(unquote(password), safe="")


def _without_secrets(scheme: str, where: str) -> str:
    path, mark, _ = where.partition("?")
    path = path.partition("#")[0]
    if scheme in _KEYED and path.count("/") > 1:
        path = path.rsplit("/", 1)[0] + "/***"
    if found := _IN_PATH.search(path):
        path = path[: found.end()] + "***"
    if "@" in path.lstrip("@"):
        path = "***@" + path.rpartition("@")[2]
    return path + ("?***" if mark else "")
