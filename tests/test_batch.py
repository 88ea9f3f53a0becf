"""restore_batch on a real Ray: the bytes of restore-video, whatever fails on the way."""

import json
import os
import shutil
import time
from collections import deque
from fractions import Fraction
from pathlib import Path

import av
import batches
import pytest
from batches import DyingJob, FailingJob, SlowJob, StragglingJob, actors, batch, by_name
from commands import sha256
from media import make_clip
from sample_clips import SHORT_GOPS

import pipeline.batch
import pipeline.in_work
from pipeline import RestoreConfig, RestoreError, cli_batch, restore_file
from pipeline.batch import Cluster
from pipeline.errors import ConfigError, DeviceError

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def by_value(ray_of_two_cpus):
    """The workers cannot import the file from which they get their jobs."""
    # Not at the top: Ray reads when it is imported whether it is to keep to the loopback address.
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(batches)


@pytest.mark.parametrize(
    "more",
    [{}, {"temporal": 0.8, "tile.static_threshold": 30, "start_seconds": 0.7, "end_seconds": 2.5}],
)
def test_many_files_have_the_bytes_of_restore_video(tmp_path, batch_source, batch_settings, more):
    kinds = {
        "open.mp4": {"options": {**SHORT_GOPS, "x264-params": "open-gop=1"}, "n_frames": 60},
        # Not what they look like: they go through as one part.
        "refresh.mp4": {"options": {"g": "20", "x264-params": "intra-refresh=1"}, "noise": True},
        "fields.mkv": {"fields": "tff", "noise": True,
                       "options": {"flags": "+ildct+ilme", "g": "10", "bf": "2"}},
        "old.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "10"},
                    "time_base": Fraction(1, 25)},
        "deep.mkv": {"pix_fmt": "yuv420p10le", "options": {"g": "10"}},
    }  # fmt: skip
    for name, what in kinds.items():
        make_clip(batch_source.with_name(name), **{"n_frames": 40, **what})
    batch_settings = batch_settings | more
    report = batch(batch_source.parent, tmp_path / "out", batch_settings)
    assert report.succeeded, report
    sizes = [file.source.stat().st_size for file in report.files]
    assert len(sizes) == 6
    assert sizes == sorted(sizes, reverse=True)  # so that little is left of each at the end
    for file in report.files:
        config = RestoreConfig.load(overrides=batch_settings | {"pool.kind": "local"})
        expected = restore_file(file.source, tmp_path / f"alone_{file.output.name}", config)
        assert sha256(file.output) == sha256(expected.output), file.source
        assert file.n_frames == expected.n_frames
    assert by_name(report)["a.mkv"].n_segments == (5 if more else 9)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith((".part", ".restore"))]


def test_a_file_that_fails_stops_no_other_and_is_named_with_its_cause(
    tmp_path, batch_source, batch_settings, alone
):
    batch_source.with_name("bad.mkv").write_bytes(b"this is no video")
    data = make_clip(batch_source.with_name("cut.mp4"), n_frames=60, noise=True).read_bytes()
    batch_source.with_name("cut.mp4").write_bytes(data[: len(data) // 2])
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "here.mkv").write_bytes(b"the user's own")
    make_clip(batch_source.with_name("here.mkv"))
    report = batch([batch_source.parent, "none.mkv"], folder, batch_settings)
    found = by_name(report)
    assert not report.succeeded
    assert sha256(found["a.mkv"].output) == alone
    failed = {name: file.exit_code for name, file in found.items() if file.status == "failed"}
    assert failed == {"bad.mkv": 3, "cut.mp4": 3, "here.mkv": 2, "none.mkv": 3}
    for name in failed:
        assert name in found[name].error
        assert "\n" not in found[name].error
    assert (folder / "here.mkv").read_bytes() == b"the user's own"
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["counts"] == {"done": 1, "failed": 4}
    assert {f["source"].rpartition("/")[2]: f["status"] for f in written["files"]} == {
        name: file.status for name, file in found.items()
    }


def test_what_a_file_lost_is_reported_as_restore_video_reports_it(
    tmp_path, batch_source, batch_settings
):
    damaged = make_clip(batch_source.with_name("damaged.mkv"), n_frames=60, options={"g": "12"})
    data = bytearray(damaged.read_bytes())
    with av.open(str(damaged)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    for packet in (packets[20], packets[40]):
        place = data.index(bytes(packet))
        data[place : place + packet.size] = bytes(packet.size)
    damaged.write_bytes(data)
    fields = {"fields": "tff", "options": {"flags": "+ildct+ilme", "g": "10", "bf": "2"}}
    woven = make_clip(batch_source.with_name("woven.mkv"), n_frames=45, **fields)
    folder = tmp_path / "out"
    found = by_name(batch(batch_source.parent, folder, batch_settings))
    config = RestoreConfig.load(overrides=batch_settings | {"pool.kind": "local"})
    for clip in (damaged, woven):
        alone = restore_file(clip, tmp_path / f"{clip.stem}.mkv", config)
        assert alone.warnings, clip
        assert found[clip.name].warnings == alone.warnings
        assert found[clip.name].n_frames == alone.n_frames
    assert any("corrupt packets gave no frame" in x for x in found["damaged.mkv"].warnings)
    assert "45 frames are interlaced and were deinterlaced" in found["woven.mkv"].warnings
    assert found["woven.mkv"].n_segments > 2
    assert not found["a.mkv"].warnings


def test_a_bug_that_one_file_meets_stops_no_other(
    tmp_path, batch_source, batch_settings, monkeypatch
):
    make_clip(batch_source.with_name("b.mkv"), n_frames=20)
    honest = pipeline.in_work.CutPlan

    def plan(video, length):
        if video.path.name == "a.mkv":
            raise KeyError("what nobody\nthought of")
        return honest(video, length)

    monkeypatch.setattr(pipeline.in_work, "CutPlan", plan)
    found = by_name(batch(batch_source.parent, tmp_path / "out", batch_settings))
    assert found["b.mkv"].status == "done"
    assert found["a.mkv"].exit_code == 1
    assert "a.mkv: KeyError: " in found["a.mkv"].error


def test_what_is_finished_is_skipped_by_the_journal_not_by_its_name(
    tmp_path, batch_source, batch_settings, monkeypatch
):
    folder = tmp_path / "out"
    make_clip(batch_source.with_name("b.mkv"), n_frames=20)
    known, rename = [], os.replace

    def watched(old, new):
        if Path(new).parent == folder:
            known.append(Path(new).name in (folder / ".restore-batch.jsonl").read_text())
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        assert batch(batch_source.parent, folder, batch_settings).succeeded
    assert known == [True, True]  # killed right after, neither would be in the way of the next run
    again = by_name(batch(batch_source.parent, folder, batch_settings))
    assert [again[name].status for name in ("a.mkv", "b.mkv")] == ["skipped", "skipped"]
    assert again["a.mkv"].n_frames == 90
    (folder / "a.mkv").write_bytes(b"something else")
    (folder / "b.mkv").unlink()
    third = by_name(batch(batch_source.parent, folder, batch_settings))
    assert third["b.mkv"].status == "done"
    assert third["a.mkv"].status == "failed"
    assert "exists already" in third["a.mkv"].error
    fourth = by_name(batch(batch_source.parent, folder, batch_settings | {"overwrite": True}))
    assert (fourth["a.mkv"].status, fourth["b.mkv"].status) == ("done", "skipped")
    other = by_name(batch(batch_source.parent, folder, batch_settings | {"model.strength": 0.4}))
    assert [file.status for file in other.values()] == ["failed", "failed"]


def test_settings_of_one_file_in_a_manifest(tmp_path, batch_source, batch_settings):
    make_clip(batch_source.with_name("b.mkv"), n_frames=20, options=SHORT_GOPS)
    manifest = batch_source.with_name("list.csv")
    manifest.write_text("source,model.strength,encode.codec\na.mkv,0,libx265\nb.mkv,,\n")
    report = by_name(batch(manifest, tmp_path / "out", batch_settings))
    config = RestoreConfig.load(
        overrides=batch_settings
        | {"model.strength": 0, "encode.codec": "libx265", "pool.kind": "local"}
    )
    expected = restore_file(batch_source, tmp_path / "alone.mkv", config).output
    assert sha256(report["a.mkv"].output) == sha256(expected)
    assert report["b.mkv"].status == "done"


def test_a_killed_worker_costs_the_segments_that_it_had(
    tmp_path, batch_source, batch_settings, alone, monkeypatch
):
    monkeypatch.setattr(pipeline.batch, "PartJob", SlowJob)
    killed = []

    def kill_one(progress):
        if progress.n_frames >= 20 and not killed:
            killed.append(actors()[0])
            killed[0].kill()

    report = batch(batch_source, tmp_path / "out", batch_settings, on_progress=kill_one)
    assert report.succeeded
    assert killed
    assert 1 <= report.files[0].n_retries <= 2
    assert sha256(report.files[0].output) == alone


def test_a_segment_that_kills_every_worker_is_given_up_and_named(
    tmp_path, batch_source, batch_settings, alone, monkeypatch
):
    make_clip(batch_source.with_name("b.mkv"), n_frames=30, options=SHORT_GOPS)
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.batch, "PartJob", DyingJob)
        report = batch(batch_source.parent, folder, batch_settings)
    found = by_name(report)
    assert found["b.mkv"].status == "done"
    assert found["a.mkv"].exit_code == 5
    assert "a.mkv: segment 3 (frames 30 to 39): given up after " in found["a.mkv"].error
    assert "finished segments are kept" in found["a.mkv"].error
    # Once that is mended, what was finished is not done again.
    report = batch(batch_source.parent, folder, batch_settings)
    assert sha256(by_name(report)["a.mkv"].output) == alone


def test_a_straggler_is_given_to_a_second_worker_once(
    tmp_path, batch_source, batch_settings, alone, monkeypatch
):
    job = StragglingJob({}, "cpu", 1)
    job.log = tmp_path / "log"
    monkeypatch.setattr(pipeline.batch, "PartJob", lambda *given: job.with_weights(*given))
    began = time.monotonic()
    report = batch(batch_source, tmp_path / "out", batch_settings)
    assert report.succeeded
    assert time.monotonic() - began < StragglingJob.seconds
    assert len(job.log.read_text()) == 2
    assert sha256(report.files[0].output) == alone


def test_what_ends_all_files_is_noted_at_each_alone(
    tmp_path, batch_source, batch_settings, monkeypatch
):
    other = shutil.copy(batch_source, batch_source.with_name("b.mkv"))

    def broken(batch, todo):
        raise DeviceError("no Ray")

    def noted(file, error):
        error.add_note(f"of {file.item.source.name}")
        fail(file, error)

    fail = pipeline.in_work.FileInWork.fail
    monkeypatch.setattr(pipeline.batch._Batch, "_restore", broken)
    monkeypatch.setattr(pipeline.in_work.FileInWork, "fail", noted)
    report = batch([batch_source, other], tmp_path / "out", batch_settings)
    assert {file.source.name: file.error for file in report.files} == {
        name: f"no Ray (of {name})" for name in ("a.mkv", "b.mkv")
    }


def test_a_file_that_is_done_again_is_done_before_others_are_opened():
    """It holds an encoder and its source meanwhile: a thousand of them would be too many."""
    work = pipeline.batch._Batch.__new__(pipeline.batch._Batch)
    work._again = deque()
    taken = []
    for file in work._again_first(iter("abc")):
        taken.append(file)
        if file in "ac":
            work._again.append(file.upper())
    assert taken == ["a", "A", "b", "c", "C"]


def test_an_unforeseen_error_is_tried_again(
    tmp_path, batch_source, batch_settings, alone, monkeypatch
):
    monkeypatch.setattr(pipeline.batch, "PartJob", FailingJob)
    report = batch(batch_source, tmp_path / "out", batch_settings)
    assert report.succeeded
    assert report.files[0].n_retries >= 1
    assert sha256(report.files[0].output) == alone


def test_an_interrupted_batch_goes_on_with_segments_out_of_order(
    tmp_path, batch_source, batch_settings, alone
):
    def interrupt(progress):
        if progress.n_frames >= 40:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        batch(batch_source, folder, batch_settings, on_progress=interrupt)
    work = folder / ".a.mkv.restore"
    assert not (folder / "a.mkv").exists()
    kept = sorted(work.glob("*.segment"))
    assert len(kept) >= 4
    kept[1].unlink()  # as if it had been out while later ones came back
    at_once = []
    report = batch(
        batch_source, folder, batch_settings, on_progress=lambda now: at_once.append(now.n_frames)
    )
    assert at_once[0] == 10 * len(kept)
    assert sha256(report.files[0].output) == alone
    assert not work.exists()


def test_a_device_that_the_workers_do_not_have_is_refused_at_once(
    tmp_path, batch_source, batch_settings
):
    with pytest.raises(ConfigError, match="gpus-per-worker"):
        batch(batch_source, tmp_path / "out", batch_settings | {"model.device": "cuda:1"})
    with pytest.raises(RestoreError, match="none"):
        batch(batch_source, tmp_path / "out", batch_settings | {"model.model": "none"})


def test_workers_that_can_never_fit_here_fail_at_once(tmp_path, batch_source, batch_settings):
    began = time.monotonic()
    report = batch(
        batch_source,
        tmp_path / "out",
        batch_settings,
        cluster=Cluster(gpus_per_worker=1, n_workers=1),
    )
    assert time.monotonic() - began < 60
    assert not report.succeeded
    (error,) = {file.error for file in report.files}
    assert "no worker fits on this machine: each needs 1 CPUs and 1 GPUs" in error
    assert "of 2 CPUs and 0 of 0 GPUs" in error


def test_a_name_that_is_no_text_is_restored_and_reported(
    tmp_path, batch_source, batch_settings, alone
):
    odd = batch_source.with_name(os.fsdecode(b"caf\xe9.mkv"))
    batch_source.rename(odd)
    report = batch(odd.parent, tmp_path / "out", batch_settings)
    assert report.succeeded, report.files
    assert sha256(report.files[0].output) == alone
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert os.fsencode(written["files"][0]["source"]) == os.fsencode(odd)
    assert "caf" in cli_batch._table(report)
    cli_batch._table(report).encode()
    assert batch(odd.parent, tmp_path / "out", batch_settings).files[0].status == "skipped"
