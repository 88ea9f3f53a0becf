"""restore_batch from and to a real S3 server on this machine: the bytes of a local run."""

import hashlib
import json
import threading

import pytest
from media import make_clip
from sample_clips import SHORT_GOPS

import pipeline.batch
import pipeline.remote
from pipeline import RestoreConfig, restore_file
from pipeline.batch import Cluster, restore_batch
from pipeline.errors import SinkError
from pipeline.in_work import FileInWork
from pipeline.inputs import BatchItem, list_inputs
from pipeline.remote import Remote, place
from pipeline.report import Journal
from workers import Limits

pytestmark = pytest.mark.timeout(200)
on_ray = [pytest.mark.ray, pytest.mark.usefixtures("ray_of_two_cpus", "one_thread")]


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "a.mkv", n_frames=40, options=SHORT_GOPS, audio="aac")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def body(s3, key, bucket="videos"):
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def keys(s3, bucket="videos"):
    found = s3.list_objects_v2(Bucket=bucket).get("Contents", ())
    return [entry["Key"] for entry in found if "/.restore-batch/" not in entry["Key"]]


def batch(inputs, output, settings, work, **more):
    items = list_inputs(inputs if isinstance(inputs, list) else [inputs], output, settings, None)
    return restore_batch(items, output, work=work, **more)


def alone(clip, settings):
    config = RestoreConfig.load(overrides=settings | {"pool.kind": "local"})
    return sha256_of(restore_file(clip, clip.with_name("alone.mkv"), config).output.read_bytes())


class TestOnRay:
    pytestmark = on_ray

    def test_from_s3_to_s3_the_bytes_are_those_of_a_local_run(
        self, tmp_path, s3, clip, batch_settings, work
    ):
        s3.upload_file(str(clip), "videos", "in/a.mkv")
        other = make_clip(tmp_path / "b.mp4", n_frames=12)
        s3.upload_file(str(other), "videos", "in/tape 1/b.mp4")
        s3.put_object(Bucket="videos", Key="in/notes.txt", Body=b"no video")
        report = batch("s3://videos/in", "s3://videos/out", batch_settings, work)
        assert report.succeeded, report
        assert [str(f.output) for f in report.files if f.n_frames == 40] == [
            "s3://videos/out/a.mkv"
        ]
        assert sha256_of(body(s3, "out/a.mkv")) == alone(clip, batch_settings)
        assert keys(s3) == [
            "in/a.mkv", "in/notes.txt", "in/tape 1/b.mp4", "out/a.mkv", "out/tape 1/b.mp4",
        ]  # fmt: skip
        assert not list(work.rglob("*.*"))
        assert list(work.iterdir()) == []

    def test_what_is_finished_there_is_skipped_and_what_changed_is_not(
        self, s3, clip, batch_settings, work
    ):
        s3.upload_file(str(clip), "videos", "in/a.mkv")
        s3.upload_file(str(clip), "videos", "in/b.mkv")
        url = "s3://videos/in/*.mkv"

        def run(**more):
            report = batch(url, "s3://videos/out", batch_settings | more, work)
            return {file.source.name: file for file in report.files}

        first = run()
        assert [f.status for f in first.values()] == ["done", "done"]
        assert [f.status for f in run().values()] == ["skipped", "skipped"]
        s3.put_object(Bucket="videos", Key="out/a.mkv", Body=b"something else")
        s3.delete_object(Bucket="videos", Key="out/b.mkv")
        again = run()
        assert again["b.mkv"].status == "done"
        assert again["a.mkv"].exit_code == 2
        assert again["a.mkv"].error == (
            "s3://videos/out/a.mkv: exists already; choose another name or allow overwriting"
        )
        assert body(s3, "out/a.mkv") == b"something else"
        assert run(overwrite=True)["a.mkv"].status == "done"
        s3.put_object(Bucket="videos", Key="in/a.mkv", Body=make_clip(clip).read_bytes())
        changed = run(overwrite=True)
        assert (changed["a.mkv"].status, changed["b.mkv"].status) == ("done", "skipped")
        assert changed["a.mkv"].n_frames == 20

    def test_what_cannot_be_reached_is_one_line_each_and_the_others_are_done(
        self, s3, clip, batch_settings, work, a_login_for_videos_alone
    ):
        place("s3://videos/a.mkv").store(clip)
        inputs = [
            "s3://videos/a.mkv", "s3://videos/none.mkv", "s3://nowhere/x.mkv", "s3://closed/y.mkv",
            "s3://nowhere/*.mp4", "s3://closed/folder/",
        ]  # fmt: skip
        report = batch(inputs, "s3://videos/out/", batch_settings, work)
        found = {str(file.source): file for file in report.files}
        assert found.pop("s3://videos/a.mkv").status == "done"
        assert {(file.status, file.exit_code) for file in found.values()} == {("failed", 3)}
        missing, denied = "cannot be read (no such file", "cannot be read (access denied"
        for source, cause in {
            "s3://videos/none.mkv": missing, "s3://nowhere/x.mkv": missing,
            "s3://nowhere/*.mp4": missing, "s3://closed/y.mkv": denied,
            "s3://closed/folder/": denied,
        }.items():  # fmt: skip
            assert found[source].error.startswith(f"{source}: {cause}")
            assert "\n" not in found[source].error

    def test_an_output_that_cannot_be_written_fails_before_any_work(
        self, s3, clip, batch_settings, work, a_login_for_videos_alone
    ):
        for bucket, cause in {"closed": "access denied", "nowhere": "no such file"}.items():
            with pytest.raises(SinkError, match=rf"^s3://{bucket}/out: .*{cause}"):
                batch(clip, f"s3://{bucket}/out", batch_settings, work)

    def test_an_upload_that_broke_off_is_made_up_for_without_restoring_anew(
        self, s3, clip, batch_settings, work, monkeypatch
    ):
        s3.upload_file(str(clip), "videos", "a.mkv")

        def broken(self, path):
            raise OSError(5, "Connection was closed")

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "store", broken)
            (file,) = batch("s3://videos/a.mkv", "s3://videos/out", batch_settings, work).files
        assert file.exit_code == 4
        assert file.error.startswith(
            "s3://videos/out/a.mkv: cannot be written (Connection was closed)"
        )
        assert "finished segments are kept" in file.error
        assert keys(s3) == ["a.mkv"]
        assert not list(work.rglob("source*"))

        class NoWork(pipeline.batch.PartJob):
            def __call__(self, part):
                raise AssertionError("restored again")

        monkeypatch.setattr(pipeline.batch, "PartJob", NoWork)
        report = batch("s3://videos/a.mkv", "s3://videos/out", batch_settings, work)
        assert report.succeeded, report
        assert sha256_of(body(s3, "out/a.mkv")) == alone(clip, batch_settings)

    def test_a_run_killed_right_after_an_upload_does_not_stand_in_its_own_way(
        self, s3, clip, batch_settings, work, monkeypatch
    ):
        honest = Remote.store

        def killed(self, path):
            honest(self, path)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "store", killed)
            with pytest.raises(KeyboardInterrupt):
                batch(clip, "s3://videos/out", batch_settings, work)
        assert keys(s3) == ["out/a.mkv"]
        assert batch(clip, "s3://videos/out", batch_settings, work).succeeded
        (file,) = batch(clip, "s3://videos/out", batch_settings, work).files
        assert file.status == "skipped"

    def test_only_the_files_in_work_are_on_the_disk(self, tmp_path, s3, batch_settings, work):
        tiny = make_clip(tmp_path / "t.mkv", n_frames=2)
        for number in range(40):
            s3.upload_file(str(tiny), "videos", f"in/{number:02}.mkv")
        most = []

        def count(now):
            most.append(len(list(work.rglob("source*"))))

        report = batch("s3://videos/in/", tmp_path / "out", batch_settings, work, on_progress=count)
        assert report.succeeded
        assert len(list((tmp_path / "out").glob("*.mkv"))) == 40
        # Fetched, read ahead, with two workers, waiting to be joined.
        assert max(most) <= 3 + 4 + 2 * 2 + 8
        assert list(work.iterdir()) == []

    def test_a_damaged_file_is_named_by_its_url(self, s3, batch_settings, work):
        s3.put_object(Bucket="videos", Key="bad.mkv", Body=b"this is no video")
        (file,) = batch("s3://videos/bad.mkv", "s3://videos/out", batch_settings, work).files
        assert file.exit_code == 3
        assert file.error.startswith("s3://videos/bad.mkv: ")
        assert str(work) not in file.error

    def test_workers_that_fail_name_the_url_too(self, s3, clip, batch_settings, work, monkeypatch):
        s3.upload_file(str(clip), "videos", "a.mkv")
        monkeypatch.setattr("workers.schedule.Limits", lambda: Limits(no_worker_seconds=1))
        report = batch(
            "s3://videos/a.mkv", "s3://videos/out", batch_settings, work,
            cluster=Cluster(gpus_per_worker=1, n_workers=1),
        )  # fmt: skip
        assert "no worker fits" in report.files[0].error
        assert not list(work.rglob("*.*"))

    def test_the_command_takes_urls_and_leaves_its_report_there(
        self, s3, clip, batch_settings, work
    ):
        from typer.testing import CliRunner

        from pipeline.cli_batch import app

        s3.upload_file(str(clip), "videos", "in/a.mkv")
        s3.put_object(
            Bucket="videos", Key="in/list.csv",
            Body=b"source,output,segment.frames\na.mkv,b.mkv,10\n",
        )  # fmt: skip
        result = CliRunner().invoke(
            app,
            ["s3://videos/in/list.csv", "-o", "s3://videos/out", "--work-dir", str(work),
             "--model", batch_settings["model.model"], "--strength", "0.5", "--preset",
             "ultrafast"],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert sha256_of(body(s3, "out/b.mkv")) == alone(clip, batch_settings)
        report = json.loads(body(s3, "out/restore-batch.json"))
        assert report["files"][0]["source"] == "s3://videos/in/a.mkv"


def test_a_second_run_of_the_same_command_leaves_the_first_ones_file_alone(tmp_path):
    """As where the night's job is not done when the next one begins."""
    import fsspec

    clip = make_clip(tmp_path / "a.mkv", n_frames=3)
    with fsspec.open("memory://in/a.mkv", "wb") as file:
        file.write(clip.read_bytes())
    item = BatchItem(place("memory://in/a.mkv"), tmp_path / "out.mkv", RestoreConfig())
    first, second = (FileInWork(item, tmp_path / "work", threading.Event()) for _ in range(2))
    journal = Journal(tmp_path)
    first.open("cpu", 1, "sha", 16, journal)
    fetched = list((tmp_path / "work").rglob("source*"))
    with pytest.raises(SinkError, match=r"out\.mkv: another job has it in work") as error:
        second.open("cpu", 1, "sha", 16, journal)
    second.fail(error.value)
    assert list((tmp_path / "work").rglob("source*")) == fetched != []
    first.fail(error.value)
    journal.close()
    assert list((tmp_path / "work").iterdir()) == []
