"""Restore videos: the public API and nothing else."""

from typing import TYPE_CHECKING, Any

from pipeline._version import __version__
from pipeline.config import RestoreConfig
from pipeline.errors import RestoreError

if TYPE_CHECKING:
    from pipeline.batch import restore_batch
    from pipeline.jobs import restore_file, restore_stream

__all__ = [
    "RestoreConfig", "RestoreError", "__version__", "restore_batch", "restore_file",
    "restore_stream",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # jobs.py reaches torch and ray, which take seconds to import: not for `--help`.
    if name in ("restore_file", "restore_stream"):
        from pipeline import jobs

        return getattr(jobs, name)
    if name == "restore_batch":
        from pipeline.batch import restore_batch

        return restore_batch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
