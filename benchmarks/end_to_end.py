"""The whole pipeline against its parts, the two pools, and its memory.

    python benchmarks/end_to_end.py CLIP [--frames 300] [--model tiny] [--rounds 3]   # time
    python benchmarks/end_to_end.py --memory [--model tiny] [--size 192x108] [--lengths 300 3000]

Time: restore_file with either pool, the network alone on the same tiles, decode + encode alone,
one after the other in every round, and the medians; the same clip, process and settings. Memory:
a new process per length, peak resident set of it and its children, on a synthesised clip of noise.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from machine import machine

from pipeline import RestoreConfig, restore_file
from pipeline.decode import VideoSource
from pipeline.derived import encode_settings, plan_grid
from pipeline.encode import VideoWriter
from pipeline.pools import open_pool
from workers import describe_weights, pick_device


def cut(clip: Path, frames: int, folder: Path, config: RestoreConfig | None = None) -> Path:
    """The first `frames` frames, re-encoded once so that every run sees one file."""
    target = folder / f"{frames}.mp4"
    with VideoSource(clip) as source:
        settings = encode_settings(target, source.info, config or RestoreConfig())
        with VideoWriter(target, source.info, settings, copy_from=None) as writer:
            for frame in source.frames():
                if frame.index == frames:
                    break
                writer.write(frame)
    return target


def codecs_alone(clip: Path, out: Path) -> float:
    """Seconds to decode and encode, in the job's two threads, with nothing between."""
    from pipeline.stages import DECODE_AHEAD, ENCODE_BEHIND, ahead, behind

    start = time.perf_counter()
    with VideoSource(clip) as source:
        settings = encode_settings(out, source.info, RestoreConfig())
        with VideoWriter(out, source.info, settings, copy_from=None, overwrite=True) as writer:
            for _ in behind(writer.write, ahead(source.frames(), DECODE_AHEAD), ENCODE_BEHIND):
                pass
    return time.perf_counter() - start


def network_alone(clip: Path, config: RestoreConfig) -> tuple[float, int]:
    """Seconds of the pool on the tiles of every frame, already decoded and split."""
    device = pick_device(config.model.device)
    with VideoSource(clip) as source:
        frames = list(source.frames())
        grid = plan_grid(source.info, config, device, describe_weights(config.model.model).stride)
        with open_pool(source.info.pixel_format, config, device) as pool:
            pool.warm_up(grid.split(frames[0].planes)[0])
            batches = [b for frame in frames for b in grid.split(frame.planes)]
            start = time.perf_counter()
            waiting = []
            for batch in batches:
                waiting.append(pool.submit(batch))
                if len(waiting) > 2 * pool.n_workers:  # one is restored, one waits
                    waiting.pop(0).result()
            for future in waiting:
                future.result()
            return time.perf_counter() - start, len(frames)


def time_report(clip: Path, frames: int, model: str, rounds: int) -> None:
    print(f"{clip.name}, at most {frames} frames, {model}, {rounds} rounds; {machine()}\n")
    network, codecs = "network alone on the same tiles", "decode + encode alone"
    rows: dict[str, list[float]] = {network: [], codecs: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = cut(clip, frames, folder)
        configs = {
            kind: RestoreConfig.load(
                overrides={"model.model": model, "pool.kind": kind, "overwrite": True}
            )
            for kind in ("local", "ray")
        }
        for _ in range(rounds):
            seconds, n = network_alone(clip, configs["local"])
            rows[network].append(seconds)
            rows[codecs].append(codecs_alone(clip, folder / "c.mp4"))
            for kind, config in configs.items():
                start = time.perf_counter()
                report = restore_file(clip, folder / f"{kind}.mp4", config)
                whole = time.perf_counter() - start
                rows.setdefault(f"restore_file, {kind} pool", []).append(report.seconds)
                rows.setdefault(f"restore_file, {kind} pool, with start-up", []).append(whole)
    print("| what | seconds | from – to | frames/s |\n| --- | ---: | ---: | ---: |")
    for what, values in rows.items():
        middle = median(values)
        print(
            f"| {what} | {middle:.1f} | {min(values):.1f} – {max(values):.1f} | {n / middle:.2f} |"
        )
    local, ray = rows["restore_file, local pool"], rows["restore_file, ray pool"]
    slower = [max(pair) for pair in zip(rows[network], rows[codecs], strict=True)]
    print(f"\nlocal end to end / the larger of the two alone: {median_ratio(local, slower):.3f}")
    print(f"Ray / local, start-up excluded: {median_ratio(ray, local):.3f}")


def median_ratio(values: list[float], by: list[float]) -> float:
    """Of what was measured in the same round: the pace of a shared machine drifts."""
    return median(a / b for a, b in zip(values, by, strict=True))


MEASURED = """
import resource, sys
from pipeline import RestoreConfig, restore_file
config = RestoreConfig.load(overrides={"model.model": sys.argv[2], "pool.kind": "local"})
report = restore_file(sys.argv[1], sys.argv[1] + ".out.mp4", config)
print(report.n_frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def synthesise(path: Path, frames: int, size: tuple[int, int]) -> Path:
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(frames):
            picture = rng.integers(0, 255, (size[1] * 3 // 2, size[0]), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode(None))
    return path


def memory_report(model: str, size: tuple[int, int], lengths: list[int]) -> None:
    print("{}x{}, {}, local pool; {}\n".format(*size, model, machine()))
    print("| frames | peak resident MiB |\n| ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        for frames in lengths:
            clip = synthesise(Path(name) / f"{frames}.mp4", frames, size)
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, str(clip), model],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            counted, peak = done.stdout.split()[-2:]
            print(f"| {counted} | {peak} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clip", type=Path, nargs="?")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--size", default="192x108")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 3000])
    args = parser.parse_args()
    if args.memory:
        width, height = map(int, args.size.split("x"))
        memory_report(args.model, (width, height), args.lengths)
    else:
        time_report(args.clip, args.frames, args.model, args.rounds)


if __name__ == "__main__":
    main()
