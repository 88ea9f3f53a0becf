"""A real RTSP server for the tests, as a process of its own: it can be killed, stopped, restarted.

    python tests/rtsp_server.py PORT [USER PASSWORD basic|digest]

Whoever ANNOUNCEs and RECORDs a path is relayed to all who PLAY it: RTP interleaved in the TCP
connection (RFC 2326, 10.12), to players by UDP too. Nothing is stored, nothing is decoded.
"""

import asyncio
import base64
import hashlib
import re
import socket
import sys
from urllib.parse import urlparse

MAX_BEHIND = 4 << 20
"""Bytes that a player may leave unread; it then loses packets, as with any relay."""


class Path:
    """What is published under one name."""

    def __init__(self, sdp):
        self.sdp = sdp
        self.players = set()
        self.reports = {}
        """The last RTCP packet of each track: without one, players cannot tell streams' times."""


class Connection:
    """One client, publisher or player."""

    def __init__(self, server, reader, writer):
        self.server, self.reader, self.writer = server, reader, writer
        self.tracks = {}  # a publisher's channel → (track, is_rtcp)
        self.sends = {}  # (track, is_rtcp) → how a player wants it
        self.path = self.name = None
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))

    async def serve(self):
        try:
            while first := await self.reader.readexactly(1):
                if first == b"$":
                    channel, size = await self.reader.readexactly(1), await self._number()
                    self._relay(channel[0], await self.reader.readexactly(size))
                else:
                    await self._answer(first + await self.reader.readuntil(b"\r\n\r\n"))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._leave()

    async def _number(self):
        return int.from_bytes(await self.reader.readexactly(2), "big")

    def _leave(self):
        if self.path is not None:
            self.path.players.discard(self)
        if self.tracks and self.server.paths.get(self.name) is self.path:
            del self.server.paths[self.name]
            for player in self.path.players:
                player.writer.close()
        self.udp.close()
        self.writer.close()

    def _relay(self, channel, packet):
        if channel not in self.tracks:
            return
        track, is_rtcp = self.tracks[channel]
        if is_rtcp:
            self.path.reports[track] = packet
        for player in self.path.players:
            player.send((track, is_rtcp), packet)

    def send(self, track, packet):
        way = None if self.writer.is_closing() else self.sends.get(track)
        if isinstance(way, tuple):
            self.udp.sendto(packet, way)
        elif way is not None and self.writer.transport.get_write_buffer_size() < MAX_BEHIND:
            self.writer.write(b"$" + bytes([way]) + len(packet).to_bytes(2, "big") + packet)

    async def _answer(self, head):
        first, *lines = head.decode().split("\r\n")
        method, url, _ = first.split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines if ": " in line)
        headers = {key.lower(): value for key, value in headers.items()}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        status, extra, content = "200 OK", {}, b""
        if method != "OPTIONS" and not self.server.admits(method, headers.get("authorization")):
            status, extra = "401 Unauthorized", {"WWW-Authenticate": self.server.challenge}
        else:
            handler = getattr(self, f"_on_{method.lower()}", lambda *_: (status, {}, b""))
            status, extra, content = handler(url, headers, body)
        extra |= {"CSeq": headers["cseq"], "Session": "1", "Content-Length": len(content)}
        text = "".join(f"{key}: {value}\r\n" for key, value in extra.items())
        self.writer.write(f"RTSP/1.0 {status}\r\n{text}\r\n".encode() + content)
        if method == "PLAY":
            for track, report in self.path.reports.items():
                self.send((track, 1), report)
            self.path.players.add(self)
        if method == "TEARDOWN":
            self._leave()

    def _on_options(self, *_):
        return "200 OK", {"Public": "ANNOUNCE, DESCRIBE, SETUP, RECORD, PLAY, TEARDOWN"}, b""

    def _on_announce(self, url, headers, body):
        self.name = urlparse(url).path
        self.path = self.server.paths[self.name] = Path(body)
        return "200 OK", {}, b""

    def _on_describe(self, url, headers, body):
        self.path = self.server.paths.get(urlparse(url).path)
        if self.path is None:
            return "404 Not Found", {}, b""
        return "200 OK", {"Content-Type": "application/sdp"}, self.path.sdp

    def _on_setup(self, url, headers, body):
        track, transport = int(url.rsplit("=", 1)[1]), headers["transport"]
        publishes = "mode=record" in transport.lower()
        if match := re.search(r"interleaved=(\d+)-(\d+)", transport):
            for is_rtcp, channel in enumerate(map(int, match.groups())):
                if publishes:
                    self.tracks[channel] = track, is_rtcp
                else:
                    self.sends[track, is_rtcp] = channel
        elif (match := re.search(r"client_port=(\d+)-(\d+)", transport)) and not publishes:
            host = self.writer.get_extra_info("peername")[0]
            for is_rtcp, port in enumerate(map(int, match.groups())):
                self.sends[track, is_rtcp] = host, port
            port = self.udp.getsockname()[1]
            transport += f";server_port={port}-{port}"
        else:
            return "461 Unsupported Transport", {}, b""
        return "200 OK", {"Transport": transport}, b""


class Server:
    """Paths by name, and who may use them."""

    def __init__(self, user=None, password=None, kind="basic"):
        self.paths = {}
        self.user, self.password, self.kind = user, password, kind
        self.challenge = (
            'Basic realm="t"' if kind == "basic" else 'Digest realm="t", nonce="n0", algorithm=MD5'
        )

    def admits(self, method, authorization):
        if self.user is None:
            return True
        scheme, _, value = (authorization or "").partition(" ")
        if self.kind == "basic":
            known = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            return (scheme, value) == ("Basic", known)
        given = dict(re.findall(r'(\w+)="([^"]*)"', value))

        def md5(*parts):
            return hashlib.md5(":".join(parts).encode()).hexdigest()

        secret = md5(self.user, "t", self.password)
        expected = md5(secret, "n0", md5(method, given.get("uri", "")))
        return given.get("response") == expected

    async def run(self, port):
        async def serve(reader, writer):
            await Connection(self, reader, writer).serve()

        server = await asyncio.start_server(serve, "127.0.0.1", port, reuse_address=True)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(Server(*sys.argv[2:]).run(int(sys.argv[1])))
