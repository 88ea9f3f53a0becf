"""Owns the HTTP port of live streams: /metrics, /healthz, /readyz. Knows their counters alone."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pipeline.errors import ConfigError
from pipeline.stats import Streams, prometheus


@contextmanager
def serving(where: str, streams: Streams) -> Iterator[int]:
    """Serve `streams` at HOST:PORT until the end; gives the port. Raises ConfigError."""
    try:
        host, port = host_and_port(where)
        kind = _IPv6Server if ":" in host else ThreadingHTTPServer
        server = kind((host, port), _handler(streams))
    except (ValueError, OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or "not HOST:PORT"
        raise ConfigError(f"--metrics {where}: {cause}; choose another") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.1], name="http", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def host_and_port(where: str) -> tuple[str, int]:
    """`HOST:PORT`, `:PORT` or `[::1]:PORT`; the loopback address where none is named.

    Raises ValueError.
    """
    host, _, port = where.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _handler(streams: Streams) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a client that says nothing does not hold a thread

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, prometheus(streams), "text/plain; version=0.0.4; charset=utf-8")
            elif self.path == "/healthz":
                stuck = [f"{name} {thread}".strip() for name, stats in streams.items()
                         for thread in stats.stuck()]  # fmt: skip
                self._answer(503 if stuck else 200, f"stuck: {stuck}\n" if stuck else "ok\n")
            elif self.path == "/readyz":
                away = [f"{name} {end}".strip() for name, stats in streams.items()
                        for end, up in (("source", stats.source_up), ("sink", stats.sink_up))
                        if not up]  # fmt: skip
                text = f"away: {', '.join(away)}\n" if away else "ok\n"
                self._answer(503 if away else 200, text)
            else:
                self._answer(404, "/metrics /healthz /readyz\n")

        def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
