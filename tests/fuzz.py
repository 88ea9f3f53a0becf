"""Restores seeded damaged variants of a clip, one after the other; run by test_untrusted.py.

    python fuzz.py CLIP FOLDER FIRST LAST

Prints one JSON line before each variant and one after it, so that the parent knows which variant
ended the process or never ended.
"""

import faulthandler
import json
import logging
import sys
from pathlib import Path

import av
import numpy as np
from fidelity import identity_network

from pipeline import RestoreConfig, RestoreError, restore_file

SETTINGS = {
    "pool.kind": "local", "resume": False, "overwrite": True, "encode.codec": "ffv1",
    "decode.stall_timeout": 10, "decode.max_pixels": 1 << 20,
}  # fmt: skip


LOGGED: list[str] = []


class _Remember(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.append(record.getMessage())


def damaged(data: bytes, seed: int) -> bytes:
    """Bits flipped anywhere or in the header, the end gone, a stretch overwritten or taken out."""
    random = np.random.default_rng(seed)
    array = np.frombuffer(data, np.uint8).copy()
    size = len(array)
    kind = seed % 5
    if kind in (0, 1):
        places = random.integers(0, size if kind == 0 else min(size, 1024), random.integers(1, 30))
        array[places] ^= (1 << random.integers(0, 8, len(places))).astype(np.uint8)
        return array.tobytes()
    start = int(random.integers(0, size))
    stop = min(size, start + int(random.integers(1, 400)))
    if kind == 2:
        return data[: max(start, 1)]
    if kind == 3:
        array[start:stop] = random.integers(0, 256, stop - start)
        return array.tobytes()
    return data[:start] + data[stop:]


def count(path: Path) -> int:
    """How many pictures of a file FFmpeg decodes, what it cannot decode left out."""
    n_pictures = 0
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                n_pictures += len(packet.decode())
            except av.FFmpegError:
                continue
    return n_pictures


def attempt(source: Path, output: Path) -> dict[str, object]:
    """One variant through a whole job: its exit code and what was written."""
    LOGGED.clear()
    try:
        report = restore_file(source, output, RestoreConfig.load(overrides=SETTINGS))
    except RestoreError as error:
        return {"code": error.exit_code, "message": str(error), "left": output.exists()}
    counts = {"reported": report.n_frames, "written": count(output), "decodable": count(source)}
    return {"code": 0, **counts, "warned": any("corrupt" in line for line in LOGGED)}


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """See the module."""
    clip, folder, first, last = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    faulthandler.enable()
    logging.getLogger("pipeline").addHandler(_Remember())
    logging.getLogger("pipeline").propagate = False
    data = clip.read_bytes()
    source, output = folder / f"variant{clip.suffix}", folder / "out.mkv"
    with identity_network():
        for seed in range(first, last):
            _say({"began": seed})
            source.write_bytes(damaged(data, seed))
            outcome = attempt(source, output)
            output.unlink(missing_ok=True)
            outcome["files"] = sorted(p.name for p in folder.iterdir())
            _say({"seed": seed, **outcome})


if __name__ == "__main__":
    main()
