"""Owns what there is to compute on: this machine's devices, and the Ray to start workers on.
Knows no network, no tiles and no pools."""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workers.spec import WorkerError

_OBJECT_STORE_BYTES = 1 << 30
"""Frames in flight are tens of megabytes; Ray's own default is 30 % of the machine's memory."""

REACH_SECONDS = 10.0
"""A cluster's head that has not answered a connection by then is not there."""

# Ray caches the token for the life of the process, so a second session must come with the same.
_TOKEN = secrets.token_hex(32)


def available_devices() -> list[str]:
    """`cuda:0`, `cuda:1` … as torch sees them, or `cpu` alone."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def pick_device(name: str = "auto") -> str:
    """The device meant by `name`: `auto` is the first CUDA device, else the CPU.

    Raises WorkerError where a device is asked for that is not here.
    """
    if name == "auto":
        return available_devices()[0]
    wanted = "cuda:0" if name == "cuda" else name
    if wanted != "cpu" and wanted not in available_devices():
        raise WorkerError(f"device {name!r} is not here: there is {', '.join(available_devices())}")
    return wanted


@contextmanager
def ray_session(
    address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[None]:
    """Hold a Ray to start workers on: a private local one, or the cluster at `address`.

    What is started here is stopped at the end, whatever happens; a Ray that this process already
    has is used and left running. Counts are for a local Ray and None means all that the machine
    has. Raises WorkerError where Ray cannot start or the cluster cannot be joined.
    """
    if address is None:
        _stay_private()
    import ray

    if ray.is_initialized():
        yield
        return
    # ray.init puts in one that raises SystemExit, and leaves it there: better than the default
    # while the session is open, which would leave Ray's processes, but not than the caller's own.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address, num_cpus, num_gpus)
        if callable(handler):
            _handle_sigterm(handler)
        yield
    finally:
        ray.shutdown()
        _handle_sigterm(handler)


def _connect(address: str | None, num_cpus: int | None, num_gpus: int | None) -> None:
    import ray

    if address is not None:
        _check_reachable(address)
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        # Without "local", a Ray that someone else runs on this machine would be joined.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,  # 0.9 GB, and a port
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        what = "start Ray" if address is None else f"join the Ray cluster at {address}"
        raise WorkerError(f"cannot {what}: {' '.join(str(error).split())}") from error


def _check_reachable(address: str) -> None:
    """Ray itself tries for ten minutes and more to reach a HOST:PORT where nothing answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or error
        raise WorkerError(
            f"cannot join the Ray cluster at {address}: nothing answers there ({cause})"
        ) from error


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _stay_private() -> None:
    """Prepare the environment of a Ray that serves this process alone; before ray is imported.

    Ray listens on every interface and runs what it is sent: ports open to the network, held by
    the token alone (https://docs.ray.io/en/latest/ray-security/token-auth.html). Meant for other
    systems, the first variable has Ray 2.60 take the loopback address as the machine's, on which
    alone it then listens; it is read once, when ray is imported. The second spares the user
    `~/.ray/auth_token`, which Ray else creates, readable by every account. A choice made in the
    environment stands.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
