"""restore-video verify, and that it finds faithful what the command made."""

from functools import partial

import pytest
from commands import restore_video
from media import make_clip
from typer.testing import CliRunner

from pipeline.cli import app


@pytest.fixture
def run(tiny_checkpoint):
    return partial(restore_video, tiny_checkpoint)


def verify(*args):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


def test_verify_is_code_0_for_what_this_program_made_and_6_for_what_it_did_not(run, tmp_path):
    source = make_clip(tmp_path / "in.mkv", audio="aac")
    assert run(source).exit_code == 0
    result = verify(source, tmp_path / "in_restored.mkv")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(f"faithful to {source}")
    other = make_clip(tmp_path / "other.mkv", n_frames=19, audio="aac")
    result = verify(source, other)
    assert result.exit_code == 6
    assert "DIFFERS  frames: 20 became 19" in result.stdout
    assert verify(source, other, "-q").stdout.splitlines()[0] == "DIFFERS  frames: 20 became 19"
    assert verify(source, tmp_path / "in_restored.mkv", "-q").stdout == ""
    assert verify(source, tmp_path / "none.mkv").exit_code == 3
    assert verify(source).exit_code == 2


def test_a_job_with_everything_ends_with_a_file_that_verify_finds_faithful(run, tmp_path):
    source = make_clip(
        tmp_path / "in.mkv", audio="aac", subtitles=[(0.1, 0.3, "eins")], start_seconds=5,
        chapters=[(5, 5.4, "one")], metadata={"title": "A"}, rotation=90,
    )  # fmt: skip
    for name in ("out.mkv", "out.mp4", "out.webm"):
        result = run(source, "-o", tmp_path / name, "--tile", "0")
        assert result.exit_code == 0, result.output
        said = result.stderr.count("transcoded") + result.stderr.count("lost")
        assert said == {"out.mkv": 0, "out.mp4": 1, "out.webm": 3}[name]
        result = verify(source, tmp_path / name)
        assert result.exit_code == 0, result.output


def test_a_file_named_verify_can_be_restored(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "clip.mkv").rename(tmp_path / "verify")
    assert run("./verify", "-o", "out.mkv").exit_code == 0
    assert verify("./verify", "out.mkv").exit_code == 0
