"""restore_batch on a real Ray: the bytes of restore-video, whatever fails on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import psutil
import pytest
from clips import SHORT_GOPS
from commands import ONE_THREAD, sha256, wait_for
from media import make_clip

import pipeline.batch
import pipeline.in_work
import pipeline.part_job
from pipeline import RestoreConfig, RestoreError, batch_cli, restore_file
from pipeline.batch import Cluster, restore_batch
from pipeline.decode import VideoSource
from pipeline.errors import ConfigError, DeviceError
from pipeline.inputs import list_inputs
from pipeline.part_job import PartJob, weights_of
from pipeline.report import Journal
from workers import WorkerError

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def by_value(ray_of_two_cpus):
    """The workers cannot import this file, from which they get their jobs below."""
    # Not at the top: Ray reads when it is imported whether it is to keep to the loopback address.
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def settings(tiny_checkpoint):
    return {
        "model.model": tiny_checkpoint, "model.strength": 0.5, "segment.frames": 10,
        "encode.preset": "ultrafast",
    }  # fmt: skip


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return make_clip(tmp_path / "in" / "a.mkv", n_frames=90, options=SHORT_GOPS, audio="aac")


@pytest.fixture
def alone(tmp_path, source, settings):
    """What restore-video makes of the source in one go."""
    config = RestoreConfig.load(overrides=settings | {"pool.kind": "local"})
    restore_file(source, tmp_path / "alone.mkv", config)
    return sha256(tmp_path / "alone.mkv")


def batch(inputs, folder, settings, **more):
    items = list_inputs(inputs if isinstance(inputs, list) else [inputs], folder, settings, None)
    return restore_batch(items, folder, **more)


def by_name(report):
    return {file.source.name: file for file in report.files}


class SlowJob(PartJob):
    """Leaves time to be hit; says which process it is."""

    def __call__(self, part):
        time.sleep(0.4)
        return super().__call__(part)


class DyingJob(PartJob):
    """Its process dies of the fourth segment, wherever that is tried."""

    def __call__(self, part):
        if part.piece.span.index == 3:
            os._exit(1)
        return super().__call__(part)


class StragglingJob(PartJob):
    """Whoever gets the seventh segment first hangs at it."""

    seconds = 60

    def with_weights(self, weights, device, threads):
        self.__init__(weights, device, threads)
        return self

    def __call__(self, part):
        if part.piece.span.index == 7:
            with self.log.open("a") as log:
                log.write("x")
            if len(self.log.read_text()) == 1:
                time.sleep(self.seconds)
        return super().__call__(part)


class FailingJob(PartJob):
    """A bug that shows once in each process."""

    seen = False

    def __call__(self, part):
        if part.piece.span.index == 2 and not FailingJob.seen:
            FailingJob.seen = True
            raise ZeroDivisionError("once")
        return super().__call__(part)


def actors():
    return [p for p in psutil.Process().children(recursive=True) if is_actor(p)]


def is_actor(process):
    try:
        return process.cmdline()[0].startswith("ray::_JobWorker")
    except (psutil.Error, IndexError):
        return False


def command(source, folder, settings, *more):
    config = folder.with_name("small.yaml")
    config.write_text("segment: {frames: 10}\nencode: {preset: ultrafast}\n")
    return [
        sys.executable, "-c", "from pipeline.batch_cli import main; main()", str(source),
        "-o", str(folder), "--config", str(config), "--model", settings["model.model"],
        "--strength", "0.5", *more,
    ]  # fmt: skip


SUBMIT = """
import json, subprocess, sys, time, urllib.request
from workers import cluster
cluster._stay_private()
import ray
from ray._private import parameter
honest = parameter.RayParams.__init__  # ray.init has no argument for the agent's port, which the
def any_port(self, **more):            # Ray of the other tests has taken
    honest(self, **{"dashboard_agent_listen_port": 0, **more})
parameter.RayParams.__init__ = any_port
context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1",
    dashboard_port=0, log_to_driver=False, object_store_memory=200 << 20, _temp_dir=sys.argv[2])
# A job joins the Ray named here, as `ray start` does, and else any that it finds on the machine,
# the one of the other tests too: https://github.com/ray-project/ray, find_gcs_addresses.
ray._private.utils.write_ray_address(context.address_info["gcs_address"], sys.argv[2])
submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
    f"http://{context.dashboard_url}", "--", *json.loads(sys.argv[1])]
for _ in range(20):
    done = subprocess.run(submit, capture_output=True, text=True)
    if "No available agent" not in done.stderr:
        break
    time.sleep(1)  # it comes up some seconds after ray.init returns
port = ray.nodes()[0]["MetricsExportPort"]
metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
print(metrics, done.stdout, done.stderr)
sys.exit(done.returncode)
"""


@pytest.mark.slow
def test_it_runs_as_a_ray_job_whose_metrics_are_rays(tmp_path, source, settings, alone):
    folder = tmp_path / "out"
    entrypoint = command(source, folder, settings, "--ray-address", "auto")
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has 107 letters
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT, json.dumps(entrypoint), short],
            capture_output=True, text=True, check=False, timeout=180, env=ONE_THREAD,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sha256(folder / "a.mkv") == alone
    assert "1 done, 0 finished before, 0 failed" in done.stdout
    (n_done,) = [
        x for x in done.stdout.splitlines() if x.startswith("ray_restore_parts_done_total{")
    ]
    assert n_done.endswith(" 9.0")
    assert "ray_restore_workers{" in done.stdout


@pytest.mark.parametrize(
    "more",
    [{}, {"temporal": 0.8, "tile.static_threshold": 30, "start_seconds": 0.7, "end_seconds": 2.5}],
)
def test_many_files_have_the_bytes_of_restore_video(tmp_path, source, settings, more):
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
        make_clip(source.with_name(name), **{"n_frames": 40, **what})
    settings = settings | more
    report = batch(source.parent, tmp_path / "out", settings)
    assert report.succeeded, report
    sizes = [file.source.stat().st_size for file in report.files]
    assert len(sizes) == 6
    assert sizes == sorted(sizes, reverse=True)  # so that little is left of each at the end
    for file in report.files:
        config = RestoreConfig.load(overrides=settings | {"pool.kind": "local"})
        expected = restore_file(file.source, tmp_path / f"alone_{file.output.name}", config)
        assert sha256(file.output) == sha256(expected.output), file.source
        assert file.n_frames == expected.n_frames
    assert by_name(report)["a.mkv"].n_segments == (5 if more else 9)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith((".part", ".restore"))]


def test_a_file_that_fails_stops_no_other_and_is_named_with_its_cause(
    tmp_path, source, settings, alone
):
    source.with_name("bad.mkv").write_bytes(b"this is no video")
    data = make_clip(source.with_name("cut.mp4"), n_frames=60, noise=True).read_bytes()
    source.with_name("cut.mp4").write_bytes(data[: len(data) // 2])
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "here.mkv").write_bytes(b"the user's own")
    make_clip(source.with_name("here.mkv"))
    report = batch([source.parent, "none.mkv"], folder, settings)
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


def test_what_a_file_lost_is_reported_as_restore_video_reports_it(tmp_path, source, settings):
    damaged = make_clip(source.with_name("damaged.mkv"), n_frames=60, options={"g": "12"})
    data = bytearray(damaged.read_bytes())
    with av.open(str(damaged)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    for packet in (packets[20], packets[40]):
        place = data.index(bytes(packet))
        data[place : place + packet.size] = bytes(packet.size)
    damaged.write_bytes(data)
    fields = {"fields": "tff", "options": {"flags": "+ildct+ilme", "g": "10", "bf": "2"}}
    woven = make_clip(source.with_name("woven.mkv"), n_frames=45, **fields)
    folder = tmp_path / "out"
    found = by_name(batch(source.parent, folder, settings))
    config = RestoreConfig.load(overrides=settings | {"pool.kind": "local"})
    for clip in (damaged, woven):
        alone = restore_file(clip, tmp_path / f"{clip.stem}.mkv", config)
        assert alone.warnings, clip
        assert found[clip.name].warnings == alone.warnings
        assert found[clip.name].n_frames == alone.n_frames
    assert any("corrupt packets gave no frame" in x for x in found["damaged.mkv"].warnings)
    assert "45 frames are interlaced and were deinterlaced" in found["woven.mkv"].warnings
    assert found["woven.mkv"].n_segments > 2
    assert not found["a.mkv"].warnings


def test_a_bug_that_one_file_meets_stops_no_other(tmp_path, source, settings, monkeypatch):
    make_clip(source.with_name("b.mkv"), n_frames=20)
    honest = pipeline.in_work.CutPlan

    def plan(video, length):
        if video.path.name == "a.mkv":
            raise KeyError("what nobody\nthought of")
        return honest(video, length)

    monkeypatch.setattr(pipeline.in_work, "CutPlan", plan)
    found = by_name(batch(source.parent, tmp_path / "out", settings))
    assert found["b.mkv"].status == "done"
    assert found["a.mkv"].exit_code == 1
    assert "a.mkv: KeyError: " in found["a.mkv"].error


def test_what_is_finished_is_skipped_by_the_journal_not_by_its_name(
    tmp_path, source, settings, monkeypatch
):
    folder = tmp_path / "out"
    make_clip(source.with_name("b.mkv"), n_frames=20)
    known, rename = [], os.replace

    def watched(old, new):
        if Path(new).parent == folder:
            known.append(Path(new).name in (folder / ".restore-batch.jsonl").read_text())
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        assert batch(source.parent, folder, settings).succeeded
    assert known == [True, True]  # killed right after, neither would be in the way of the next run
    again = by_name(batch(source.parent, folder, settings))
    assert [again[name].status for name in ("a.mkv", "b.mkv")] == ["skipped", "skipped"]
    assert again["a.mkv"].n_frames == 90
    (folder / "a.mkv").write_bytes(b"something else")
    (folder / "b.mkv").unlink()
    third = by_name(batch(source.parent, folder, settings))
    assert third["b.mkv"].status == "done"
    assert third["a.mkv"].status == "failed"
    assert "exists already" in third["a.mkv"].error
    fourth = by_name(batch(source.parent, folder, settings | {"overwrite": True}))
    assert (fourth["a.mkv"].status, fourth["b.mkv"].status) == ("done", "skipped")
    other = by_name(batch(source.parent, folder, settings | {"model.strength": 0.4}))
    assert [file.status for file in other.values()] == ["failed", "failed"]


def test_settings_of_one_file_in_a_manifest(tmp_path, source, settings):
    make_clip(source.with_name("b.mkv"), n_frames=20, options=SHORT_GOPS)
    manifest = source.with_name("list.csv")
    manifest.write_text("source,model.strength,encode.codec\na.mkv,0,libx265\nb.mkv,,\n")
    report = by_name(batch(manifest, tmp_path / "out", settings))
    config = RestoreConfig.load(
        overrides=settings | {"model.strength": 0, "encode.codec": "libx265", "pool.kind": "local"}
    )
    expected = restore_file(source, tmp_path / "alone.mkv", config).output
    assert sha256(report["a.mkv"].output) == sha256(expected)
    assert report["b.mkv"].status == "done"


def test_a_killed_worker_costs_the_segments_that_it_had(
    tmp_path, source, settings, alone, monkeypatch
):
    monkeypatch.setattr(pipeline.batch, "PartJob", SlowJob)
    killed = []

    def kill_one(progress):
        if progress.n_frames >= 20 and not killed:
            killed.append(actors()[0])
            killed[0].kill()

    report = batch(source, tmp_path / "out", settings, on_progress=kill_one)
    assert report.succeeded
    assert killed
    assert 1 <= report.files[0].n_retries <= 2
    assert sha256(report.files[0].output) == alone


def test_a_segment_that_kills_every_worker_is_given_up_and_named(
    tmp_path, source, settings, alone, monkeypatch
):
    make_clip(source.with_name("b.mkv"), n_frames=30, options=SHORT_GOPS)
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.batch, "PartJob", DyingJob)
        report = batch(source.parent, folder, settings)
    found = by_name(report)
    assert found["b.mkv"].status == "done"
    assert found["a.mkv"].exit_code == 5
    assert "a.mkv: segment 3 (frames 30 to 39): given up after " in found["a.mkv"].error
    assert "finished segments are kept" in found["a.mkv"].error
    # Once that is mended, what was finished is not done again.
    report = batch(source.parent, folder, settings)
    assert sha256(by_name(report)["a.mkv"].output) == alone


def test_a_straggler_is_given_to_a_second_worker_once(
    tmp_path, source, settings, alone, monkeypatch
):
    job = StragglingJob({}, "cpu", 1)
    job.log = tmp_path / "log"
    monkeypatch.setattr(pipeline.batch, "PartJob", lambda *given: job.with_weights(*given))
    began = time.monotonic()
    report = batch(source, tmp_path / "out", settings)
    assert report.succeeded
    assert time.monotonic() - began < StragglingJob.seconds
    assert len(job.log.read_text()) == 2
    assert sha256(report.files[0].output) == alone


def opened(source, tmp_path, settings):
    """A file that a batch has begun, and what does its parts; nothing is on a Ray."""
    (item,) = list_inputs([source], tmp_path / "out", settings, None)
    info, data = weights_of(item.config.model.model)
    file = pipeline.in_work.FileInWork(item, tmp_path, threading.Event())
    journal = Journal(tmp_path / "out")
    file.open("cpu", 1, info.sha256, info.stride, journal)
    journal.close()
    return file, PartJob({item.config.model.model: data}, "cpu", 1)


def test_a_worker_loads_a_network_once(tmp_path, source, settings, monkeypatch):
    loaded = []

    class Counted(pipeline.part_job.LocalPool):
        def __init__(self, spec):
            loaded.append(spec)
            super().__init__(spec)

    monkeypatch.setattr(pipeline.part_job, "LocalPool", Counted)
    file, job = opened(source, tmp_path, settings)
    results = [job(part) for _, part in file.parts()]
    job.close()
    file.fail(RestoreError("not to be finished"))
    assert len(results) == 9
    assert not [result for result in results if isinstance(result, RestoreError)]
    assert len(loaded) == 1


def test_a_worker_needs_no_file_of_the_drivers_for_a_part_that_is_a_whole_file(tmp_path, settings):
    path = make_clip(tmp_path / "in.avi", n_frames=10, time_base=Fraction(1, 25))
    file, job = opened(path, tmp_path, settings)
    ((span, part),) = file.parts()
    assert span is None
    file.fail(RestoreError("not to be finished"))
    path.unlink()  # the worker is another machine
    restored = job(part)
    broken = job(replace(part, piece=replace(part.piece, data=b"no video")))
    job.close()
    assert sum(segment.n_frames for segment, _ in restored.segments) == 10
    assert str(broken).startswith(f"{path}: is not a video file")


def test_what_is_wrong_with_a_machine_is_no_error_of_the_file(tmp_path, source, settings):
    """Its FFmpeg or its weights: the driver's are right, and another worker's may be."""
    file, job = opened(source, tmp_path, settings)
    (_, part), *_ = file.parts()
    file.fail(RestoreError("not to be finished"))
    with pytest.raises(WorkerError, match="another header"):
        job(replace(part, encoding=replace(part.encoding, extradata=b"of another FFmpeg")))
    without = PartJob({}, "cpu", 1)
    model = part.config.model.model_copy(update={"model": str(tmp_path / "absent.safetensors")})
    with pytest.raises(WorkerError, match=r"absent\.safetensors"):
        without(replace(part, config=part.config.model_copy(update={"model": model})))
    job.close()


def test_parts_are_planned_and_decoded_without_a_decoding_device(tmp_path, settings, monkeypatch):
    """A device's pictures may be of another format than those that the plan is for."""
    asked = []
    monkeypatch.setattr(VideoSource, "_find_hardware", lambda video: asked.append(video))
    whole = make_clip(tmp_path / "in.avi", n_frames=10, time_base=Fraction(1, 25))
    file, job = opened(whole, tmp_path, settings | {"decode.hwaccel": "auto"})
    ((span, part),) = file.parts()
    restored = job(part)
    file.fail(RestoreError("not to be finished"))
    job.close()
    assert span is None
    assert sum(segment.n_frames for segment, _ in restored.segments) == 10
    assert not asked


def test_what_ends_all_files_is_noted_at_each_alone(tmp_path, source, settings, monkeypatch):
    other = shutil.copy(source, source.with_name("b.mkv"))

    def broken(batch, todo):
        raise DeviceError("no Ray")

    def noted(file, error):
        error.add_note(f"of {file.item.source.name}")
        fail(file, error)

    fail = pipeline.in_work.FileInWork.fail
    monkeypatch.setattr(pipeline.batch._Batch, "_restore", broken)
    monkeypatch.setattr(pipeline.in_work.FileInWork, "fail", noted)
    report = batch([source, other], tmp_path / "out", settings)
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


def test_an_unforeseen_error_is_tried_again(tmp_path, source, settings, alone, monkeypatch):
    monkeypatch.setattr(pipeline.batch, "PartJob", FailingJob)
    report = batch(source, tmp_path / "out", settings)
    assert report.succeeded
    assert report.files[0].n_retries >= 1
    assert sha256(report.files[0].output) == alone


def test_an_interrupted_batch_goes_on_with_segments_out_of_order(tmp_path, source, settings, alone):
    def interrupt(progress):
        if progress.n_frames >= 40:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        batch(source, folder, settings, on_progress=interrupt)
    work = folder / ".a.mkv.restore"
    assert not (folder / "a.mkv").exists()
    kept = sorted(work.glob("*.segment"))
    assert len(kept) >= 4
    kept[1].unlink()  # as if it had been out while later ones came back
    at_once = []
    report = batch(source, folder, settings, on_progress=lambda now: at_once.append(now.n_frames))
    assert at_once[0] == 10 * len(kept)
    assert sha256(report.files[0].output) == alone
    assert not work.exists()


def test_a_device_that_the_workers_do_not_have_is_refused_at_once(tmp_path, source, settings):
    with pytest.raises(ConfigError, match="gpus-per-worker"):
        batch(source, tmp_path / "out", settings | {"model.device": "cuda:1"})
    with pytest.raises(RestoreError, match="none"):
        batch(source, tmp_path / "out", settings | {"model.model": "none"})


def test_workers_that_can_never_fit_here_fail_at_once(tmp_path, source, settings):
    began = time.monotonic()
    report = batch(
        source, tmp_path / "out", settings, cluster=Cluster(gpus_per_worker=1, n_workers=1)
    )
    assert time.monotonic() - began < 60
    assert not report.succeeded
    (error,) = {file.error for file in report.files}
    assert "no worker fits on this machine: each needs 1 CPUs and 1 GPUs" in error
    assert "of 2 CPUs and 0 of 0 GPUs" in error


def test_a_name_that_is_no_text_is_restored_and_reported(tmp_path, source, settings, alone):
    odd = source.with_name(os.fsdecode(b"caf\xe9.mkv"))
    source.rename(odd)
    report = batch(odd.parent, tmp_path / "out", settings)
    assert report.succeeded, report.files
    assert sha256(report.files[0].output) == alone
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert os.fsencode(written["files"][0]["source"]) == os.fsencode(odd)
    assert "caf" in batch_cli._table(report)
    batch_cli._table(report).encode()
    assert batch(odd.parent, tmp_path / "out", settings).files[0].status == "skipped"


# the command


def test_a_killed_command_is_run_again_and_ends_with_the_same_bytes(
    tmp_path, source, settings, alone
):
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(source, folder, settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )  # fmt: skip
    work = folder / ".a.mkv.restore"
    wait_for(process, lambda: len(list(work.glob("*.segment"))) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "a.mkv").exists()
    source.with_name("bad.mkv").write_bytes(b"this is no video")
    done = subprocess.run(
        command(source.parent, folder, settings, "--log-format", "json"), capture_output=True,
        text=True, check=False, timeout=150, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert sha256(folder / "a.mkv") == alone
    assert "are finished already" in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("done")
    assert lines[0].endswith("90 frames")
    assert lines[1].startswith("failed")
    assert "bad.mkv" in lines[1]
    assert lines[2].startswith("1 done, 0 finished before, 1 failed in ")
    assert all(json.loads(line) for line in done.stderr.splitlines())
    report = json.loads((folder / "restore-batch.json").read_text())
    assert report["counts"] == {"done": 1, "failed": 1}


def test_help_is_quick_and_a_wrong_manifest_is_a_usage_error(tmp_path):
    code = "import sys; from pipeline.batch_cli import app; app(standalone_mode=False); " \
        "sys.exit(bool({'torch', 'ray', 'av'} & set(sys.modules)))"  # fmt: skip
    helped = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert helped.returncode == 0
    assert "--ray-address" in helped.stdout
    (tmp_path / "l.csv").write_text("source,wrong\na.mkv,1\n")
    failed = subprocess.run(
        [sys.executable, "-c", "from pipeline.batch_cli import main; main()",
         str(tmp_path / "l.csv"), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    assert "l.csv:2: wrong: unknown setting" in failed.stderr


# machines

MACHINES = """
import json, sys
from pathlib import Path
from workers import cluster
cluster._stay_private()
import ray
from ray.cluster_utils import Cluster as Machines
sys.path.insert(0, sys.argv[4])
import pipeline.batch
import pipeline.in_work
import pipeline.part_job
from pipeline.inputs import list_inputs
import ray.cloudpickle
import test_batch
from test_batch import SlowJob
from workers import Limits
ray.cloudpickle.register_pickle_by_value(test_batch)
pipeline.batch.PartJob = SlowJob
# A lost machine is no try: else the first one would be the end.
pipeline.part_job.Limits = lambda **more: Limits(tries=1, **more)
small = {"object_store_memory": 200 << 20}
checks = {  # a machine that is gone is given up after 2 s instead of 15, a slow one is not
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4}
machines = Machines(
    initialize_head=True, head_node_args={"num_cpus": 0, **small, "_system_config": checks})
first = machines.add_node(num_cpus=1, **small)
ray.init(address=machines.address, log_to_driver=False)
events = []
def happen(now):
    if now.n_frames >= 20 and not events:
        events.append("one more machine")
        machines.add_node(num_cpus=1, **small)
    if now.n_frames >= 50 and len(events) == 1:
        events.append("the first one is gone")
        machines.remove_node(first, allow_graceful=False)
settings, folder = json.loads(sys.argv[3]), Path(sys.argv[2])
report = pipeline.batch.restore_batch(
    list_inputs([sys.argv[1]], folder, settings, None), folder, on_progress=happen)
report.write(folder / "report.json")
print(events, flush=True)
ray.shutdown()
machines.shutdown()
"""


@pytest.mark.slow
def test_machines_come_and_go_in_the_middle(tmp_path, source, settings, alone):
    folder = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MACHINES, str(source), str(folder), json.dumps(settings),
         str(Path(__file__).parent)],
        capture_output=True, text=True, check=False, timeout=180, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one more machine" in done.stdout
    assert "the first one is gone" in done.stdout
    (file,) = json.loads((folder / "report.json").read_text())["files"]
    assert file["status"] == "done", file
    assert 1 <= file["n_retries"] <= 2
    assert sha256(folder / "a.mkv") == alone


LOST = """
import time
from workers import Limits, RayCrew, cluster, spread
cluster._stay_private()
import ray
from ray.cluster_utils import Cluster as Machines
small = {"object_store_memory": 200 << 20}
machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, **small})
first, second = (machines.add_node(num_cpus=1, **small) for _ in range(2))
ray.init(address=machines.address, log_to_driver=False)
def job(item):
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id(), time.time()
done, died = [], 0
with RayCrew(job) as crew:
    while len(crew.workers()) < 2:
        time.sleep(0.1)
    for outcome in spread(crew, (bytes(2_500_000) for _ in range(12)), Limits(tries=1)):
        assert outcome.error is None, outcome.error
        done.append(outcome.result)
        if len(done) == 4:
            machines.remove_node(first, allow_graceful=False)
            died = time.time()
assert first.node_id in {node for node, _ in done}
print("after", max(ended for _, ended in done) - died)
ray.shutdown()
machines.shutdown()
"""


@pytest.mark.slow
def test_a_lost_machine_is_made_up_for_before_ray_has_found_it_lost():
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, check=False, timeout=180,
        env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("after ")]
    assert float(line.split()[1]) < 12  # 8 items of 0.5 s, some of the machine's; Ray takes 15 s


SHARED_GPUS = """
import os, sys
from workers import RayCrew, ray_session, spread
share, n_gpus = float(sys.argv[1]), int(sys.argv[2])
def job(item):
    import time
    time.sleep(0.2)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]
with ray_session(num_cpus=8, num_gpus=n_gpus), RayCrew(job, num_gpus_per_worker=share) as crew:
    while len(crew.workers()) < n_gpus / share:
        pass
    found = {outcome.result for outcome in spread(crew, range(40))}
print("found", sorted(gpu for _, gpu in found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("share", "n_gpus", "seen"), [(1, 2, list("01")), (0.5, 2, list("0011"))])
def test_each_worker_is_given_its_gpu_or_its_share_of_one(share, n_gpus, seen):
    done = subprocess.run(
        [sys.executable, "-c", SHARED_GPUS, str(share), str(n_gpus)], capture_output=True,
        text=True, check=False, timeout=120, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"found {seen}" in done.stdout


SMALL_STORE = """
from workers import RayCrew, cluster, ray_session, spread
cluster._OBJECT_STORE_BYTES = 80 << 20
def job(data):
    return data[:-1]
with ray_session(num_cpus=2), RayCrew(job) as crew:
    items = (bytes([n]) * (30 << 20) for n in range(10))
    for outcome in spread(crew, items):
        assert outcome.error is None, outcome.error
        assert outcome.result == bytes([outcome.number]) * ((30 << 20) - 1)
print("all of them")
"""


@pytest.mark.slow
def test_an_object_store_that_is_full_loses_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STORE], capture_output=True, text=True, check=False,
        timeout=180, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all of them" in done.stdout
