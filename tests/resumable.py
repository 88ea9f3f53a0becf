"""Copies a clip in segments, going on where an earlier run stopped, or was killed at a step."""

import subprocess
import sys
from pathlib import Path

from media import make_clip
from sample_clips import SHORT_GOPS

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.segments import plan

X264 = EncodeSettings(preset="ultrafast", options={"bf": "3"})
JOB = {"source": "one", "weights": "two"}


def clip_in(folder):
    return make_clip(
        folder / "in.mkv", n_frames=50, options=SHORT_GOPS, audio="aac",
        chapters=[(0, 1, "one")], attachment=("font.ttf", "font/ttf", b"glyphs"),
    )  # fmt: skip


def run(source_path, path, job=JOB, length=10, on_frame=lambda index: None):
    """Copy a clip in segments, going on where an earlier run stopped; the frames done earlier."""
    with (
        VideoSource(source_path) as source,
        VideoWriter(path, source.info, X264, copy_from=source_path, job=job) as writer,
    ):
        earlier = writer.n_written
        for frame in plan(source.frames(writer.place), length):
            on_frame(frame.index)
            writer.write(frame)
    assert writer.n_written == writer.n_muxed == source.tally.n_decoded
    assert not list(path.parent.glob(".*"))
    return earlier


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from pipeline.encode import VideoWriter
from pipeline import frame_decoder, segments
from resumable import run
kind, count = sys.argv[3], int(sys.argv[4])
home, name = {
    "write": (VideoWriter, "write"), "fsync": (os, "fsync"), "replace": (os, "replace"),
    "unlink": (Path, "unlink"), "rmdir": (Path, "rmdir"), "mkdir": (Path, "mkdir"),
    "read": (segments, "heappush"), "frames": (frame_decoder, "planes_of"),
}[kind]
honest = getattr(home, name)
def counted(*args, **options):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args, **options)
setattr(home, name, counted)
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def killed(source, output, kind, count):
    command = [sys.executable, "-c", DRIVER, str(source), str(output), kind, str(count)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    return done.returncode
