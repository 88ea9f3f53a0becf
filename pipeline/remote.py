"""Owns files that are not on this machine: any URL that fsspec opens, such as s3://BUCKET/KEY.

Nothing else imports fsspec. Every error is an OSError whose `strerror` is one line without secrets.
Knows no video and no batch.
"""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from pipeline.address import Address
from pipeline.errors import ConfigError

_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified",
         "modified", "created")  # fmt: skip
"""What tells a store's versions of a file apart: the first of these that it says."""
SILENCE_SECONDS = 60.0
"""A web server that sends nothing for so long is given up."""
_BUCKETS = ("s3", "s3a", "gs", "gcs", "oss")
"""Object stores: they have no folders, and no password in the URL."""


@dataclass(frozen=True)
class Remote:
    """A file or folder at a URL. Prints without password and query."""

    url: str = field(repr=False)
    shown: str

    def __str__(self) -> str:
        return self.shown

    @classmethod
    def parse(cls, url: str) -> "Remote":
        """Raises ConfigError for what is no URL, and for one that nothing installed opens."""
        import fsspec

        remote = cls(url, _masked(url))
        scheme, _, rest = url.partition("://")
        if scheme in _BUCKETS and {":", "@"} & set(rest.partition("/")[0]):
            raise ConfigError(f"{remote}: no bucket's name; credentials go into the environment")
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{remote}: nothing here opens {scheme}:// ({_line(error)}); for s3:// install the "
                "extra [s3], for others what fsspec names"
            ) from error
        return remote

    @property
    def name(self) -> str:
        """The last part of the path; empty for a bucket or host alone."""
        return self._plain.partition("://")[2].rstrip("/").partition("/")[2].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """As of Path: `.mkv`, or nothing."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Remote":
        """The folder that it is in."""
        return self._at(self._plain.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str | PurePath) -> "Remote":
        """What is called `name` in this folder."""
        name = name.as_posix() if isinstance(name, PurePath) else name
        return self._at(f"{self._plain.rstrip('/')}/{name}")

    def state(self) -> list[Any]:
        """What it is known by: its size in bytes and what tells its versions apart."""
        with _errors():
            info = self._fs.info(self._path)
            if info["type"] == "directory":
                raise FileNotFoundError
            found = next((str(info[tag]) for tag in _TAGS if info.get(tag)), "")
            return [int(info["size"] or 0), found.strip('"')]

    def exists(self) -> bool:
        """Whether there is such a file; raises OSError where that cannot be found out."""
        try:
            self.state()
        except FileNotFoundError:
            return False
        return True

    def fetch(self, path: Path, stop: threading.Event | None = None) -> list[Any]:
        """Copy it here, with a time that changes when it does; returns its `state`.

        Once `stop` is set it is given up, with an OSError, and nothing is left here.
        """
        state = self.state()
        part = path.with_name(f"{path.name}.part")
        try:
            with _errors():
                self._fs.get_file(self._path, str(part), callback=_until(stop))
            if self.state() != state or (state[0] and part.stat().st_size != state[0]):
                raise OSError(errno.EIO, "changed while it was fetched; run again")
            # A resumed job asks whether the file is the same: its own time is that of this copy.
            version = int.from_bytes(hashlib.sha256(repr(state).encode()).digest()[:7])
            os.utime(part, ns=(version, version))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return state

    def store(self, path: Path) -> list[Any]:
        """Copy a file there; returns its `state`. Object stores show it only when it is whole."""
        with _errors():
            self._make_folder()
            self._fs.put_file(str(path), self._path)
            return self.state()

    def read(self) -> bytes:
        """All of a small file."""
        with _errors():
            return bytes(self._fs.cat_file(self._path))

    def write(self, data: bytes) -> None:
        """Replace a small file."""
        with _errors():
            self._make_folder()
            self._fs.pipe_file(self._path, data)

    def is_folder(self) -> bool:
        """Whether there is anything below it."""
        with _errors():
            return bool(self._fs.isdir(self._path))

    def below(self) -> list[tuple[str, "Remote"]]:
        """All files below this folder, in order, each with its path from here."""
        with _errors():
            root = self._path.rstrip("/") + "/"
            found = sorted(self._fs.find(root))
            return [(path.removeprefix(root), self._of(path)) for path in found]

    def matches(self) -> list["Remote"]:
        """The files that this URL, a pattern, fits, in order."""
        with _errors():
            found = self._fs.glob(self._path, detail=True)
            return [self._of(p) for p in sorted(found) if found[p]["type"] == "file"]

    @property
    def _plain(self) -> str:
        """Without the query, which may be a signature; a key of a bucket may hold a ?."""
        return self.url.partition("?")[0] if self.url.startswith("http") else self.url

    @property
    def _fs(self) -> Any:
        """Its driver, of which each thread has one of its own."""
        from fsspec.core import url_to_fs

        fs = url_to_fs(self.url, **_options_of(self.url))[0]
        if hasattr(fs, "dircache"):  # what others write meanwhile is to be seen
            fs.dircache.use_listings_cache = False
        return fs

    @property
    def _path(self) -> str:
        path: str = self._fs._strip_protocol(self.url)
        return path

    def _at(self, url: str) -> "Remote":
        return Remote(url, _masked(url))

    def _of(self, path: str) -> "Remote":
        """What fsspec calls `path`, in this URL's store."""
        if "://" in path:
            return self._at(path)
        before = self.url.partition(self._path)[0]
        return self._at(before + path)

    def _make_folder(self) -> None:
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        if not protocols & {*_BUCKETS, "http"}:
            self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)


Place = Path | Remote
"""Where a file or a folder is."""


def place(text: "str | Place") -> Place:
    """A URL as a Remote, all else as a Path; file:// too. Raises ConfigError."""
    if isinstance(text, Path | Remote) or not is_url(text):
        return text if isinstance(text, Remote) else Path(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Remote.parse(text)


def is_url(text: str) -> bool:
    """Whether it names a file by URL and not by path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def _until(stop: threading.Event | None) -> Any:
    """What fsspec calls after each piece of a file: to end the copy it has to raise."""
    from fsspec import Callback

    class Until(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if stop is not None and stop.is_set():
                raise OSError(errno.EINTR, "interrupted")

    return Until()


def _options_of(url: str) -> dict[str, Any]:
    if not url.startswith("http"):
        return {}
    import aiohttp

    # By default a whole request may take five minutes, however large the file
    # (https://docs.aiohttp.org/en/stable/client_quickstart.html#timeouts).
    patience = aiohttp.ClientTimeout(
        total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS
    )
    return {"client_kwargs": {"timeout": patience}}


def _masked(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if {"@", ":", "?"} & set(host) or scheme in ("http", "https"):
        return Address.parse(url).shown
    return url  # a bucket and a key, in which @ and ? are letters


@contextmanager
def _errors() -> Iterator[None]:
    """The drivers raise what they like: OSErrors with a cause come out."""
    try:
        yield
    except FileNotFoundError as error:
        why = f" ({_line(error.__cause__)})" if isinstance(error.__cause__, OSError) else ""
        raise FileNotFoundError(errno.ENOENT, f"no such file or bucket{why}") from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, f"access denied: {_line(error)}") from error
    except Exception as error:
        raise OSError(errno.EIO, _line(error)) from error


def _line(error: BaseException) -> str:
    """What a driver says, in one line; addresses in it without their secrets."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>)]+", _shown_address, text) or type(error).__name__


def _shown_address(found: re.Match[str]) -> str:
    try:
        return Address.parse(found[0]).shown
    except ConfigError:
        return "***"
