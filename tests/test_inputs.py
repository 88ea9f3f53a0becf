"""What the arguments of restore-batch mean, before any video is opened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.inputs import list_inputs


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mkv", "a.avi", "sub/c.MP4", "notes.txt", ".hidden.mp4", ".cache/d.mp4"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "in"


def listed(folder, *inputs, out="out", settings=None):
    items = list_inputs(inputs, Path(out), settings or {}, None)
    return [(str(item.source.relative_to(folder)), str(item.output)) for item in items]


def test_a_folder_is_taken_with_its_tree(folder):
    assert listed(folder, folder) == [
        ("a.avi", "out/a.mkv"), ("b.mkv", "out/b.mkv"), ("sub/c.MP4", "out/sub/c.MP4"),
    ]  # fmt: skip


def test_what_is_only_read_becomes_mkv(folder):
    (folder / "x.nut").write_bytes(b"")
    assert ("x.nut", "out/x.mkv") in listed(folder, folder)


def test_outputs_below_the_inputs_are_not_inputs_of_the_next_run(folder):
    (folder / "out").mkdir()
    (folder / "out" / "b.mkv").write_bytes(b"")
    assert [source for source, _ in listed(folder, folder, out=folder / "out")] == [
        "a.avi", "b.mkv", "sub/c.MP4",
    ]  # fmt: skip


def test_outputs_among_the_inputs_are_not_inputs_of_the_next_run(folder):
    """Beside them, and where a pattern finds them."""
    (folder / "b.mkv").rename(folder / "sub/b.mkv")
    (folder / "a.mkv").write_bytes(b"")
    assert listed(folder, folder / "a.avi", folder / "a.mkv", out=folder) == [
        ("a.avi", str(folder / "a.mkv"))
    ]
    (folder / "out").mkdir()
    (folder / "out/b.mkv").write_bytes(b"")
    assert listed(folder, str(folder / "**/b.mkv"), out=folder / "out") == [
        ("sub/b.mkv", str(folder / "out/b.mkv"))
    ]


def test_what_could_be_a_source_is_never_replaced(folder):
    (folder / "a.mkv").write_bytes(b"")
    with pytest.raises(ConfigError, match="would both become"):
        listed(folder, folder / "a.avi", folder / "a.mkv", out=folder, settings={"overwrite": True})


def test_what_a_folder_has_beside_video_is_said(folder, caplog):
    for name in ("clip.MOD", "tape.m2t", "scan.jpg", "sub/scan2.JPG"):
        (folder / name).write_bytes(b"")
    found = [source for source, _ in listed(folder, folder)]
    assert found == ["a.avi", "b.mkv", "clip.MOD", "sub/c.MP4", "tape.m2t"]
    assert caplog.messages == [
        f"{folder}: left out, for it is not named as video is: 2 .jpg, 1 .txt"
    ]


def test_an_encoder_that_nobody_knows_is_found_before_any_work(folder):
    with pytest.raises(ConfigError, match="codec 'nope' is unknown"):
        listed(folder, folder, settings={"encode.codec": "nope"})
    (folder / "list.csv").write_text("source,encode.codec\nb.mkv,libx265\na.avi,nope\n")
    with pytest.raises(ConfigError, match=r"list\.csv:3: codec 'nope' is unknown"):
        listed(folder, folder / "list.csv")


def test_files_and_globs(folder):
    assert listed(folder, folder / "b.mkv", str(folder / "*.avi")) == [
        ("b.mkv", "out/b.mkv"), ("a.avi", "out/a.mkv"),
    ]  # fmt: skip
    assert listed(folder, str(folder / "**/*.MP4")) == [("sub/c.MP4", "out/c.MP4")]


def test_a_name_with_brackets_is_a_file(folder):
    (folder / "take [1].mkv").write_bytes(b"")
    assert listed(folder, folder / "take [1].mkv") == [("take [1].mkv", "out/take [1].mkv")]


def test_a_missing_file_is_left_to_the_report(folder):
    assert listed(folder, folder / "none.mkv") == [("none.mkv", "out/none.mkv")]


def test_nothing_found_is_an_error(folder):
    with pytest.raises(ConfigError, match="no video files"):
        list_inputs([str(folder / "*.webm")], Path("out"), {}, None)
    # Also beside others: a slip of the pen is not to be found out when the rest is done.
    with pytest.raises(ConfigError, match=r"\*\.webm: no video files"):
        list_inputs([folder / "b.mkv", str(folder / "*.webm")], Path("out"), {}, None)


def test_what_an_earlier_run_left_below_a_url_is_no_input(tmp_path):
    for name in ("a.mkv", "restored/a.mkv", "restored2/b.mkv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    root = f"local://{tmp_path}"
    for end in ("", "/"):
        items = list_inputs([root], f"{root}/restored{end}", {}, None)
        assert [item.source.name for item in items] == ["a.mkv", "b.mkv"]
    assert len(list_inputs([root], root, {"overwrite": True}, None)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_a_folder_that_may_not_be_entered_is_left_to_the_report(folder):
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    folder.chmod(0o700)
    code = (
        "import os, sys; from pipeline.inputs import list_inputs; os.setuid(65534);"
        "print(len(list_inputs([sys.argv[1]], 'out', {}, None)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(closed)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "1", done.stderr


def test_two_sources_of_one_output_are_an_error(folder):
    (folder / "b.avi").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"b\.avi.*b\.mkv.*manifest"):
        list_inputs([folder], Path("out"), {}, None)


def test_two_parts_of_one_source_need_names_of_their_own(folder):
    manifest = folder / "parts.csv"
    manifest.write_text("source,start_seconds\nb.mkv,0\nb.mkv,60\n")
    with pytest.raises(ConfigError, match="would both become"):
        list_inputs([manifest], folder / "out", {}, None)


def test_the_same_file_twice_is_one(folder):
    assert len(listed(folder, folder / "b.mkv", folder / "b.mkv")) == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest_sets_options_for_each_file(folder, kind):
    manifest = folder / f"list.{kind}"
    if kind == "csv":
        manifest.write_text(
            "source,output,model.strength,encode.crf\na.avi,x/y.mp4,0.5,\nb.mkv,,,20\n"
        )
    else:
        lines = [
            {"source": "a.avi", "output": "x/y.mp4", "model.strength": 0.5},
            {"source": "b.mkv", "output": None, "encode.crf": 20},
        ]
        manifest.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = list_inputs([manifest], Path("out"), {"model.strength": 0.9}, None)
    assert (first.source, first.output) == (folder / "a.avi", Path("out/x/y.mp4"))
    assert (first.config.model.strength, first.config.encode.crf) == (0.5, None)
    assert (second.source, second.output) == (folder / "b.mkv", Path("out/b.mkv"))
    assert (second.config.model.strength, second.config.encode.crf) == (0.9, 20)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "source,model.strenght\na.mkv,0.5\n", r"l\.csv:2: model\.strenght: unknown"),
        ("l.jsonl", '{"source": "a.mkv", "crf": 3}\n', r"l\.jsonl:1: crf: unknown setting"),
        ("l.jsonl", '\n{"source": "a.mkv", "encode.crf": 99}\n', r"l\.jsonl:2: encode\.crf"),
        ("l.csv", "file\na.mkv\n", r"l\.csv:2: no source"),
        ("l.csv", "source\na.mkv,7\n", r"l\.csv.*more cells"),
        ("l.csv", "source,model,model.strength\na.mkv,tiny,0.5\n", r"l\.csv:2: .*model is 'tiny'"),
        ("l.jsonl", '{"source": "a.mkv", "output": 5}\n', r"l\.jsonl:1: output 5 is no file name"),
        ("l.jsonl", "[1]\n", r"l\.jsonl.*no object"),
        ("l.jsonl", "{\n", r"l\.jsonl: not a readable manifest"),
        ("none.csv", None, r"none\.csv: not a readable manifest: No such file"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_an_error_with_its_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        list_inputs([tmp_path / name], Path("out"), {}, None)
