"""Owns where tiles are restored: on which device, in this process or by Ray; `submit` -> Future.
Knows no video, no files but the weights, and no order of frames."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.cluster import available_devices, pick_device, ray_session
    from workers.crew import RayCrew
    from workers.deadlines import BATCH_TIMEOUT_SECONDS
    from workers.local import LocalPool
    from workers.pool import RayPool, RestorerPool
    from workers.schedule import Crew, Limits, Outcome, spread
    from workers.spec import PlaneSpec, WeightsError, WeightsInfo, WorkerError, WorkerSpec
    from workers.worker import describe_weights

__all__ = [
    "BATCH_TIMEOUT_SECONDS",
    "Crew",
    "Limits",
    "LocalPool",
    "Outcome",
    "PlaneSpec",
    "RayCrew",
    "RayPool",
    "RestorerPool",
    "WeightsError",
    "WeightsInfo",
    "WorkerError",
    "WorkerSpec",
    "available_devices",
    "describe_weights",
    "pick_device",
    "ray_session",
    "spread",
]

# The network shares its cores with decoder and encoder. An OpenMP thread that waits spins for
# milliseconds by default, and where the cores are busy all others wait for it: measured 2 to 4
# times slower beside one busy process. Read when libgomp is loaded; a choice of the user stands
# (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

_MODULES = {
    "workers.cluster": ("available_devices", "pick_device", "ray_session"),
    "workers.crew": ("RayCrew",),
    "workers.deadlines": ("BATCH_TIMEOUT_SECONDS",),
    "workers.schedule": ("Crew", "Limits", "Outcome", "spread"),
    "workers.local": ("LocalPool",),
    "workers.pool": ("RayPool", "RestorerPool"),
    "workers.spec": ("PlaneSpec", "WeightsError", "WeightsInfo", "WorkerError", "WorkerSpec"),
}


def __getattr__(name: str) -> Any:
    # torch costs seconds to import: `import workers` must not, only the first use of a name does.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((m for m, names in _MODULES.items() if name in names), "workers.worker")
    return getattr(import_module(home), name)
