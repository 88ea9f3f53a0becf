"""Owns the work folder of a job: which segments are finished, and for which job they hold.

Every change is written under another name, synced and renamed: whatever moment a power cut picks,
the folder holds a ledger and the whole of each segment that it names. Knows no codec.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
from bisect import insort
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from operator import attrgetter
from pathlib import Path

from pipeline.segments import Place, Segment, hash_of_file, write_secured

logger = logging.getLogger(__name__)

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 20
"""How much of a source is hashed: evenly spaced blocks with the first and the last."""

_ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = ("av", "numpy", "torch", "numba", "triton", "mamba-ssm", "opencv-python-headless")


class Ledger:
    """The finished segments of one output, in `.NAME.restore` beside it.

    `job` names what the output depends on and gives a hash for each, as `job_key` does; segments
    of another job stay until this one has finished its first, for a wrong option may be all that
    differs; that is logged in one line. With `job` None nothing is taken up and nothing is kept.
    With `out_of_order` segments are added in any order and those after a gap count too. The caller
    holds the output's lock. Raises OSError.
    """

    def __init__(
        self, output: Path, job: Mapping[str, str] | None, out_of_order: bool = False
    ) -> None:
        self.folder = output.with_name(f".{output.name}.restore")
        self.finished: list[Segment] = []
        """By index."""
        self._of_another: list[Segment] = []
        self._out_of_order = out_of_order
        self._job = None if job is None else dict(job)
        try:
            self.folder.mkdir(exist_ok=True)
            if self._job is not None:
                self.finished = self._take_up(output, self._job)
            self._remove_others()
        except BaseException:
            self.close()
            raise

    @property
    def n_frames(self) -> int:
        """The frames in all finished segments."""
        return sum(segment.n_frames for segment in self.finished)

    @property
    def place(self) -> Place | None:
        """The last source frame that is finished, or None at the start."""
        if not self.finished:
            return None
        last = self.finished[-1]
        return Place(self.n_frames - 1, last.last_pts, last.last_planes, tuple(last.counts))

    def path(self, index: int) -> Path:
        """The file of a segment."""
        return self.folder / f"{index:06d}.segment"

    def add(self, segment: Segment) -> None:
        """Record a segment whose file is complete; it outlives a power cut from here on."""
        insort(self.finished, segment, key=attrgetter("index"))
        if self._job is not None:
            entries = [asdict(s) for s in self.finished]
            text = json.dumps({"job": self._job, "segments": entries}, indent=0)
            write_secured(self._file, text.encode())
        if self._of_another:
            self._of_another = []
            self._remove_others()

    def forget(self) -> None:
        """Remove the finished segments, which are not to be trusted; the job starts over."""
        self.finished, self._of_another = [], []
        self._remove_others()

    def close(self) -> None:
        """Remove the folder unless a later run can go on from it; then `finished` is empty."""
        keep = bool(self._job is not None and (self.finished or self._of_another))
        if not keep:
            self.finished = []
        with contextlib.suppress(OSError):
            self._remove_others()
            if not keep:
                self.folder.rmdir()

    def discard(self) -> None:
        """Remove the folder: the output is complete, or the segments are not to be trusted."""
        self._job, self._of_another = None, []
        self.close()

    @property
    def _file(self) -> Path:
        return self.folder / "ledger.json"

    def _take_up(self, output: Path, job: dict[str, str]) -> list[Segment]:
        try:
            stored = json.loads(self._file.read_text())
            segments = [Segment(**entry) for entry in stored["segments"]]
            before: dict[str, str] = stored["job"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        changed = [name for name in job | before if job.get(name) != before.get(name)]
        if changed:
            logger.warning(
                "%s: %d finished segments are of another job (%s changed) and are done again; "
                "they stay until this one has finished its first",
                output, len(segments), ", ".join(changed),
            )  # fmt: skip
            self._of_another = segments
            return []
        # Up to the first that is missing or damaged: a job in order goes on from one place.
        kept = filter if self._out_of_order else takewhile
        usable = list(kept(self._is_whole, segments))
        if usable:
            logger.warning(
                "%s: %d segments (%d frames) are finished already; going on after them",
                output, len(usable), sum(s.n_frames for s in usable),
            )  # fmt: skip
        return usable

    def _is_whole(self, segment: Segment) -> bool:
        try:
            return hash_of_file(self.path(segment.index)) == segment.sha256
        except OSError:
            return False

    def _remove_others(self) -> None:
        wanted = self.finished or self._of_another
        kept = {self.path(s.index) for s in wanted} | ({self._file} if wanted else set())
        # Only what has our names: the folder may hold something of the user's.
        for pattern in ("*.segment", "*.tmp", "ledger.json"):
            for path in self.folder.glob(pattern):
                if path not in kept:
                    path.unlink()


def job_key(source: Path, weights_sha256: str, settings: Mapping[str, object]) -> dict[str, str]:
    """What the output's bytes depend on, a hash for each kind of cause.

    `settings`: everything asked of the job, as JSON can hold it. Raises OSError.
    """
    return {
        "source": identify(source),
        "weights": weights_sha256,
        "settings": _hash(json.dumps(settings, sort_keys=True, default=str)),
        "code": _code(),
        "machine": _hash(_machine()),
    }


def identify(source: Path) -> str:
    """A hash of size, time of change and up to 64 MiB spread over the file, whatever its size.

    Either alone misses something: the time is kept by `cp -p` and set by `touch`, a block between
    the sampled ones can be edited in place. A file up to 64 MiB is read whole.
    """
    with source.open("rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        last = max(status.st_size - BLOCK_BYTES, 0)
        for number in range(SAMPLED_BLOCKS):
            file.seek(last * number // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


@cache
def _code() -> str:
    """This project's sources and the versions of what computes."""
    digest = hashlib.sha256()
    for path in sorted(
        p for d in ("mtair", "workers", "pipeline") for p in _ROOT.glob(f"{d}/**/*.py")
    ):
        digest.update(path.read_bytes())
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()


def _machine() -> str:
    """The processor and how many of its cores there are to use: sums of floats depend on both."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        model = " ".join(line for line in lines if line.startswith(("model name", "flags")))
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {model} {cores} {os.cpu_count()} {threads}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
