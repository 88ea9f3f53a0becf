"""What a worker does with a part of a file, and what is an error of the file or of its machine."""

import copy
import tempfile
import threading
from dataclasses import replace
from fractions import Fraction

import pytest
from media import make_clip

import pipeline.in_work
import pipeline.part_job
from pipeline import RestoreError
from pipeline.decode import VideoSource
from pipeline.inputs import list_inputs
from pipeline.part_job import PartJob, weights_of
from pipeline.parts import RestoredPart
from pipeline.report import Journal
from workers import WorkerError

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]  # fmt: skip


def opened(source, tmp_path, settings):
    """A file that a batch has begun, and what does its parts; nothing is on a Ray."""
    (item,) = list_inputs([source], tmp_path / "out", settings, None)
    info, data = weights_of(item.config.model.model)
    file = pipeline.in_work.FileInWork(item, tmp_path, threading.Event())
    journal = Journal(tmp_path / "out")
    file.open("cpu", 1, info.sha256, info.stride, journal)
    journal.close()
    return file, PartJob({item.config.model.model: data}, "cpu", 1)


def test_a_worker_loads_a_network_once(tmp_path, batch_source, batch_settings, monkeypatch):
    loaded = []

    class Counted(pipeline.part_job.LocalPool):
        def __init__(self, spec):
            loaded.append(spec)
            super().__init__(spec)

    monkeypatch.setattr(pipeline.part_job, "LocalPool", Counted)
    file, job = opened(batch_source, tmp_path, batch_settings)
    results = [job(part) for _, part in file.parts()]
    job.close()
    file.fail(RestoreError("not to be finished"))
    assert len(results) == 9
    assert not [result for result in results if isinstance(result, RestoreError)]
    assert len(loaded) == 1


def test_a_worker_needs_no_file_of_the_drivers_for_a_part_that_is_a_whole_file(
    tmp_path, batch_settings
):
    path = make_clip(tmp_path / "in.avi", n_frames=10, time_base=Fraction(1, 25))
    file, job = opened(path, tmp_path, batch_settings)
    ((span, part),) = file.parts()
    assert span is None
    file.fail(RestoreError("not to be finished"))
    path.unlink()  # the worker is another machine
    restored = job(part)
    broken = job(replace(part, piece=replace(part.piece, data=b"no video")))
    job.close()
    assert sum(segment.n_frames for segment, _ in restored.segments) == 10
    assert str(broken).startswith(f"{path}: is not a video file")


def test_what_is_wrong_with_a_machine_is_no_error_of_the_file(
    tmp_path, batch_source, batch_settings
):
    """Its FFmpeg or its weights: the driver's are right, and another worker's may be."""
    file, job = opened(batch_source, tmp_path, batch_settings)
    (_, part), *_ = file.parts()
    file.fail(RestoreError("not to be finished"))
    with pytest.raises(WorkerError, match="another header"):
        job(replace(part, encoding=replace(part.encoding, extradata=b"of another FFmpeg")))
    without = PartJob({}, "cpu", 1)
    model = part.config.model.model_copy(update={"model": str(tmp_path / "absent.safetensors")})
    with pytest.raises(WorkerError, match=r"absent\.safetensors"):
        without(replace(part, config=part.config.model_copy(update={"model": model})))
    job.close()


def test_parts_are_planned_and_decoded_without_a_decoding_device(
    tmp_path, batch_settings, monkeypatch
):
    """A device's pictures may be of another format than those that the plan is for."""
    asked = []
    monkeypatch.setattr(VideoSource, "_find_hardware", lambda video: asked.append(video))
    whole = make_clip(tmp_path / "in.avi", n_frames=10, time_base=Fraction(1, 25))
    file, job = opened(whole, tmp_path, batch_settings | {"decode.hwaccel": "auto"})
    ((span, part),) = file.parts()
    restored = job(part)
    file.fail(RestoreError("not to be finished"))
    job.close()
    assert span is None
    assert sum(segment.n_frames for segment, _ in restored.segments) == 10
    assert not asked


def test_a_machine_keeps_weights_that_were_sent_once_whatever_its_workers(
    tmp_path, batch_source, batch_settings, monkeypatch
):
    """Ray kills workers: nothing of them is asked to clean up. And what is there later is needed:
    to tell how many tiles at once are fastest, and to do a tile again in float32."""
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = batch_settings | {"tile.batch": 2, "tile.size": 32, "tile.overlap": 8}
    file, job = opened(batch_source, tmp_path, settings)
    (_, part), *_ = file.parts()
    for one in (job, copy.deepcopy(job)):
        assert isinstance(one(part), RestoredPart)
        assert len([path for path in temp.rglob("*") if path.is_file()]) == 1
        one.close()
    file.fail(RestoreError("not to be finished"))
