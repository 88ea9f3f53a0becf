"""The command as a user types it: exit codes by cause, one line on stderr, no partial output."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import names_in, one_line, restore_video
from media import make_clip
from readback import frames_of
from typer.testing import CliRunner

from pipeline import jobs
from pipeline.cli import app


@pytest.fixture
def run(tiny_checkpoint):
    return partial(restore_video, tiny_checkpoint)


def bad_inputs(folder):
    clip = make_clip(folder / "whole.mp4", n_frames=50, size=(160, 120), noise=True)
    data = Path(clip).read_bytes()
    moov = data.index(b"moov")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "moov_missing.mp4").write_bytes(data[: moov - 4])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    make_clip(
        folder / "cut.mp4", n_frames=50, size=(160, 120), noise=True,
        container_options={"movflags": "faststart"},
    )  # fmt: skip
    cut = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(cut[: len(cut) * 6 // 10])
    return ["missing.mp4", "folder.mp4", "text.mp4", "moov_missing.mp4", "empty.mp4", "cut.mp4"]


def test_bad_inputs_end_with_code_3_one_line_and_no_output(run, tmp_path):
    for name in bad_inputs(tmp_path):
        before = sorted(p.name for p in tmp_path.iterdir())
        result = run(tmp_path / name, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 3, (name, result.output)
        assert name in one_line(result)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, name


def test_an_audio_only_file_is_code_3(run, tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        samples = np.zeros((1, 48000), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 48000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    result = run(path, "-o", tmp_path / "out.mp4")
    assert result.exit_code == 3, result.output
    assert "video" in one_line(result)


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--codec", "libx999"], 2, "libx999"),
        (["--preset", "warp"], 2, "warp"),
        (["--pix-fmt", "yuv999"], 2, "yuv999"),
        (["--crf", "99"], 2, "crf"),
        (["--tile", "7"], 2, "tile"),
        (["--tile", "64", "--tile-overlap", "64"], 2, "overlap"),
        (["--device", "cuda:7"], 5, "cuda:7"),
        (["--ss", "1000"], 3, "1000"),
        (["--ss", "2", "--to", "1"], 2, "start"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["-o", "/proc/out.mp4"], 4, "/proc"),
        (["-o", "no/such/folder/out.mp4"], 4, "no/such/folder"),
        (["-o", "out.xyz"], 2, "xyz"),
    ],
)
def test_wrong_options_have_their_code_and_name(run, tmp_path, options, code, word, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "in.mp4")
    result = run("in.mp4", *options)
    assert result.exit_code == code, result.output
    assert word in one_line(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4"]


def test_usage_errors_are_code_2(run):
    assert run().exit_code == 2
    assert run("in.mp4", "--ss", "soon").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [("https://bob:s3cret@host.example/a.mp4",), ("rtsp://bob:s3cret@10.0.0.1/cam?key=s3cret",),
     ("in.mkv", "-o", "s3://key:s3cret@bucket/o.mkv"), ("verify", "in.mkv", "ftp://u:s3cret@h/o"),
     ("https://bob:s3cret@/a.mp4",)],
)  # fmt: skip
def test_a_url_is_refused_without_its_password(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "s3cret" not in result.output
    assert "is a URL" in result.output


def test_the_commands_of_the_readme_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in (".mp4", ".mkv"):
        make_clip(tmp_path / f"input{suffix}", n_frames=60, rate=Fraction(1, 2))
    make_clip(tmp_path / "camera.mp4", n_frames=2)
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    commands = [line.split("#")[0].split()[1:] for line in lines if "restore-video " in line[:14]]
    commands = [c for c in commands if not {"verify", "--help"} & set(c)]
    assert len(commands) > 6
    for command in commands:
        result = CliRunner().invoke(app, [*command, *({"--dry-run"} - set(command))])
        assert result.exit_code == 0, (command, result.output)


def test_an_output_may_be_a_folder(run, tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=2)
    (tmp_path / "out").mkdir()
    assert run(source, "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out/in_restored.mkv").exists()


def test_a_folder_and_a_pipe_are_no_video_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    for name, words in ((".", "is a directory"), ("pipe.mp4", "is a pipe or device")):
        result = run(name)
        assert result.exit_code == 3
        assert f"{name}: {words}" in one_line(result)


@pytest.mark.parametrize("codec", ["prores", "prores_aw", "prores_ks", "mjpeg"])
@pytest.mark.parametrize("quality", ["visually-lossless", "small"])
def test_encoders_open_by_the_names_that_people_type(run, tmp_path, codec, quality):
    source = make_clip(tmp_path / "in.mp4", n_frames=2)
    output = tmp_path / "out.mov"
    result = run(source, "-o", output, "--codec", codec, "--quality", quality)
    assert result.exit_code == 0, result.output
    assert len(frames_of(output)) == 2


def test_a_file_that_nothing_could_read_is_not_made(run, tmp_path):
    source = make_clip(tmp_path / "in.mp4", n_frames=2)
    result = run(source, "-o", tmp_path / "out.mov", "--codec", "rawvideo")
    assert result.exit_code == 2
    assert "rawvideo in .mov cannot be read back" in result.output


def test_an_existing_output_needs_y(run, tmp_path):
    make_clip(tmp_path / "in.mkv")
    assert run(tmp_path / "in.mkv").exit_code == 0
    assert run(tmp_path / "in.mkv").exit_code == 2
    assert run(tmp_path / "in.mkv", "-y").exit_code == 0


def test_ss_and_to_take_clock_times(run, tmp_path):
    make_clip(tmp_path / "in.mkv", n_frames=50)
    assert run(tmp_path / "in.mkv", "--ss", "00:00:00.4", "--to", "0:01.2").exit_code == 0
    assert len(frames_of(tmp_path / "in_restored.mkv")) == 20


def test_quiet_says_nothing(run, tmp_path):
    make_clip(tmp_path / "in.mkv")
    result = run(tmp_path / "in.mkv", "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_json_logs_are_json(run, tmp_path):
    make_clip(tmp_path / "in.mkv")
    result = run(tmp_path / "in.mkv", "--log-format", "json")
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert entries
    assert {"time", "level", "message"} <= set(entries[0])


def test_help_is_quick_and_loads_neither_torch_nor_ray_nor_av():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pipeline.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert '--tile-overlap' in result.output\n"
        "print([m for m in ('torch', 'ray', 'av', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("time", ["inf", "nan", "-1", "1:2:3:4"])
def test_a_time_that_is_none_is_code_2(run, tmp_path, time):
    source = make_clip(tmp_path / "in.mkv", n_frames=3)
    assert run(source, f"--ss={time}").exit_code == 2
    assert run(source, f"--to={time}").exit_code == 2


def test_a_fault_of_this_program_is_one_line_too(run, tmp_path, monkeypatch):
    def broken(model):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(jobs, "describe_weights", broken)
    source = make_clip(tmp_path / "in.mkv", n_frames=3)
    result = run(source)
    assert result.exit_code == 1
    assert "ZeroDivisionError: division by zero; report this" in one_line(result)


# the plan and the comparison


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path):
    font = ("font.ttf", "application/x-truetype-font", b"glyphs")
    source = make_clip(
        tmp_path / "in.mkv", audio="aac", attachment=font, subtitles=[(0.1, 0.3, "eins")]
    )
    result = run(source, "-o", tmp_path / "out.mp4", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{source} → {tmp_path / 'out.mp4'}"
    assert "restored to libx264 yuv420p" in lines[2]
    assert any("lost: mp4 cannot hold it; .mkv can" in line for line in lines)
    assert any("transcoded to mov_text" in line for line in lines)
    assert result.stderr == ""
    assert names_in(tmp_path) == ["in.mkv"]


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--codec", "libx999"], 2, "libx999"),
        (["--codec", "h264_qsv"], 2, "hardware"),
        (["--quality", "small", "--crf", "20"], 2, "choose one"),
        (["--encoder-opt", "warp=9"], 2, "warp"),
        (["--codec", "prores_ks", "-o", "out.mp4"], 2, ".mkv"),
        (["-o", "no/such/folder/out.mp4"], 4, "no/such/folder"),
        (["-o", "in.mkv"], 2, "source itself"),
        (["--ss", "1000"], 3, "1000"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_is_wrong_is_found_before_anything_is_rendered(
    run, tmp_path, monkeypatch, options, code, word, dry
):
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "in.mkv")
    result = run("in.mkv", *options, *dry)
    assert result.exit_code == code, result.output
    assert word in one_line(result)
    assert names_in(tmp_path) == ["in.mkv"]


def test_an_encoder_option_without_a_value_is_a_usage_error(run, tmp_path):
    result = run(make_clip(tmp_path / "in.mkv"), "--encoder-opt", "tune")
    assert result.exit_code == 2
    assert "NAME=VALUE" in result.stderr


def test_encoder_options_and_quality_reach_the_file(run, tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=30, noise=True)
    sizes = []
    for name, options in [
        ("a", []),
        ("b", ["--quality", "small"]),
        ("c", ["--encoder-opt", "qp=51", "--encoder-opt", "x264-params=keyint=3:bframes=0"]),
    ]:
        path = tmp_path / f"{name}.mkv"
        assert run(source, "-o", path, *options).exit_code == 0
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
