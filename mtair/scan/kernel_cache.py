"""Owns where Numba keeps the compiled kernels: beside them or in the user's cache, else for now."""

import atexit
import logging
import shutil
import tempfile

from numba import config, njit

logger = logging.getLogger(__name__)


def ensure_kernel_cache() -> None:
    """To be called before a kernel is declared with `cache=True`.

    Numba declares none where neither the folder of its file nor that of the user can be written
    to, as in a container with a read-only file system
    (https://numba.readthedocs.io/en/stable/developer/caching.html#cache-sharing).
    """
    try:
        njit(cache=True)(_kernel)
    except RuntimeError:
        folder = tempfile.mkdtemp(prefix="mtair-kernels-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        config.CACHE_DIR = folder  # type: ignore[attr-defined]
        logger.warning(
            "no folder for compiled kernels: each process compiles them anew; set NUMBA_CACHE_DIR"
        )


def _kernel() -> None:
    """Stands for those of this package."""
