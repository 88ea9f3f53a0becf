"""The monitor page of live restoration: before and after, charts and the state of each camera.

Owns HTTP and the files of the page; knows no streams: it is given what to show.
"""

import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.serve import host_and_port

_FOLDER = Path(__file__).parent
_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
}
_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CameraFigures:
    """What the page says of one camera; counts are since the start."""

    name: str
    """Unique, and without credentials."""
    state: str
    """`live`, `late` (the model is slower than the source), or the reason why nothing comes."""
    fps: float
    """Restored frames of the last second."""
    latency_ms: dict[str, float]
    """p50, p95 and p99 from capture to output."""
    frames_in: int
    frames_out: int
    dropped: int
    bypassed: int
    """Frames let through unrestored."""
    repeated: int
    """Pictures sent again while the source was away."""
    reconnects: int


def pair_jpeg(before: NDArray[np.uint8], after: NDArray[np.uint8], quality: int = 85) -> bytes:
    """One JPEG of twice the width: the source left, the restored frame right, RGB `[H, W, 3]`.

    In one picture both are of the same frame, whatever the network does.
    """
    both = np.concatenate([before, after], axis=1)[..., ::-1]
    _, data = cv2.imencode(".jpg", both, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def page(
    cameras: Callable[[], list[CameraFigures]], pair: Callable[[str], bytes | None]
) -> FastAPI:
    """The application. `pair(name)` gives what `pair_jpeg` made of the newest frame, or None.

    Both are called in threads of the server and must not wait for frames.
    """
    app = FastAPI(openapi_url=None)

    def serve(path: str, name: str) -> None:
        @app.get(path)
        def file() -> FileResponse:
            return FileResponse(_FOLDER / name, headers=_HEADERS)

    for path, name in _FILES.items():
        serve(path, name)

    @app.get("/cameras")
    def figures() -> list[dict[str, object]]:
        return [asdict(camera) for camera in cameras()]

    @app.get("/cameras/{name:path}/pair.jpg")
    def picture(name: str) -> Response:
        if name not in {camera.name for camera in cameras()}:
            raise HTTPException(404, "no camera of that name")
        data = pair(name)
        if data is None:
            return Response(status_code=204, headers=_HEADERS)
        return Response(data, media_type="image/jpeg", headers=_HEADERS)

    return app


class PageServer:
    """Serves an application in a thread until closed. Raises ConfigError where it cannot listen.

    `where` is HOST:PORT; port 0 takes a free one, `address` says which.
    """

    def __init__(self, app: FastAPI, where: str) -> None:
        try:
            host, port = host_and_port(where)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except (ValueError, OSError, OverflowError) as error:
            cause = getattr(error, "strerror", None) or "not HOST:PORT"
            raise ConfigError(f"--monitor {where}: {cause}; choose another") from error
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="page", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; again does nothing."""
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
