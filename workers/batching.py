"""Owns how many tiles go through the network at once: what each number costs here, measured once.
Knows no network and no device: it times a function, and keeps the seconds in a file."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PASSES = 3
"""Of each number, after one to warm up; the least counts."""
WORTH = 0.03
"""The share of a tile's time that a larger batch must gain: it takes memory, and delays a tile."""

KEPT_SECONDS = 7 * 86400.0
"""What was measured on a machine that was busy with something else does not count for ever."""

Clock = Callable[[], float]


def fastest(
    case: str, most: int, run: Callable[[int], bool], clock: Clock = time.perf_counter
) -> int:
    """How many tiles at once, `most` at most, take the least time each.

    `case` says all that the time depends on; what was measured for it before is used again.
    `run(n)` restores n tiles and is False where memory ran out: no more are tried then. Costs a few
    passes of 1, 2, 4 … tiles, as long as more at once are not slower.
    """
    costs = _read(case)
    best = 1
    for n in _numbers(most):
        if n not in costs:
            seconds = _measured(n, run, clock)
            if seconds is None:
                break
            costs[n] = seconds
            _write(case, costs)
        gain = 1 - (costs[n] / n) / (costs[best] / best)
        if gain > WORTH:
            best = n
        elif gain < -WORTH:
            break
    logger.info(
        "%d tiles at a time (%s ms); %s",
        best, ", ".join(f"{n}: {1e3 * costs[n]:.1f}" for n in sorted(costs)), case,
    )  # fmt: skip
    return best


def _numbers(most: int) -> list[int]:
    """1, 2, 4 … and `most` itself."""
    return [*(1 << i for i in range(math.ceil(math.log2(most)))), most]


def _measured(n: int, run: Callable[[int], bool], clock: Clock) -> float | None:
    times = []
    for _ in range(PASSES + 1):
        start = clock()
        if not run(n):
            return None
        times.append(clock() - start)
    return min(times[1:])


def _file(case: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(case.encode()).hexdigest()[:16]
    return Path(home) / "restore-video" / "batches" / f"{name}.json"


def _read(case: str) -> dict[int, float]:
    """Seconds by number of tiles; nothing where no such file is recent, or it is another's."""
    path = _file(case)
    try:
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            return {}
        kept = json.loads(path.read_text())
        costs = {int(n): float(seconds) for n, seconds in kept["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    sound = kept["case"] == case and all(0 < s < math.inf for s in costs.values())
    return costs if sound else {}


def _write(case: str, costs: dict[int, float]) -> None:
    """Other workers may do the same; without a folder to write to, it is measured again."""
    path = _file(case)
    part = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"case": case, "seconds": costs}))
        part.replace(path)
