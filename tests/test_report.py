"""What a batch leaves in writing, and what is seen of it meanwhile."""

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import pipeline.monitor
from pipeline import RestoreConfig
from pipeline.batch import BatchProgress
from pipeline.cli_batch import _table
from pipeline.errors import SinkError
from pipeline.inputs import BatchItem
from pipeline.report import JOURNAL, BatchReport, FileReport, Journal, state_of

DONE = FileReport(Path("in/a.mkv"), Path("out/a.mkv"), "done", 90, 9)
FAILED = FileReport(
    Path("in/b.mkv"), Path("out/b.mkv"), "failed", error="in/b.mkv: no such file", exit_code=3
)
SKIPPED = FileReport(Path("in/c.mkv"), Path("out/c.mkv"), "skipped", 20)


@pytest.fixture(autouse=True)
def logging_as_before():
    names = ("pipeline", "workers")
    before = [(logging.getLogger(n), dict(vars(logging.getLogger(n)))) for n in names]
    for logger, values in before:
        logger.propagate, logger.handlers = True, []
        values["handlers"] = list(values["handlers"])
    yield
    for logger, values in before:
        logger.propagate, logger.handlers = values["propagate"], values["handlers"]
        logger.setLevel(values["level"])


@pytest.fixture
def item(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"source")
    (tmp_path / "out.mkv").write_bytes(b"restored")
    return BatchItem(tmp_path / "a.mkv", tmp_path / "out.mkv", RestoreConfig())


def test_the_table_ends_with_the_failed_ones_their_causes_and_a_sum():
    assert _table(BatchReport((FAILED, DONE, SKIPPED), 12.34)).splitlines() == [
        "skipped  out/c.mkv  20 frames",
        "done     out/a.mkv  90 frames",
        "failed   in/b.mkv: no such file",
        "1 done, 1 finished before, 1 failed in 12.3 s",
    ]


def test_a_failed_file_is_named_whatever_its_error_is_of():
    other = FileReport(Path("in/c.mkv"), Path("out/c.mkv"), "failed", error="crf 60 is outside 0")
    assert "in/c.mkv: crf 60 is outside 0" in _table(BatchReport((other,), 1))


def test_a_report_succeeds_when_no_file_failed():
    assert BatchReport((DONE, SKIPPED), 1).succeeded
    assert not BatchReport((DONE, FAILED), 1).succeeded


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(SinkError, match=r"none/report\.json"):
        BatchReport((DONE,), 1).write(tmp_path / "none" / "report.json")


def test_the_journal_knows_a_finished_output_until_anything_of_it_changes(tmp_path, item):
    journal = Journal(tmp_path)
    assert journal.finished(item, "abc") is None
    journal.add(item, "abc", 90, state_of(item.source), state_of(item.output))
    journal.close()
    journal = Journal(tmp_path)
    assert journal.finished(item, "abc") == 90
    assert journal.finished(item, "abd") is None
    other = BatchItem(item.source, item.output, RestoreConfig(temporal=0.25))
    assert journal.finished(other, "abc") is None
    for same in (
        {"overwrite": True}, {"decode.stall_timeout": 120}, {"decode.max_pixels": 9999},
        {"live.reconnects": 3}, {"model.fallback": "tiny"}, {"pool.window": 2},
    ):  # fmt: skip
        asked = RestoreConfig.load(overrides=same)
        assert journal.finished(BatchItem(item.source, item.output, asked), "abc") == 90, same
    item.output.write_bytes(b"restored and edited")
    assert journal.finished(item, "abc") is None
    item.output.unlink()
    assert journal.finished(item, "abc") is None
    journal.close()


def test_a_setting_that_a_later_version_adds_makes_nothing_new(tmp_path, item):
    journal = Journal(tmp_path)
    journal.add(item, "abc", 90, state_of(item.source), state_of(item.output))
    journal.close()
    assert json.loads((tmp_path / JOURNAL).read_text())["job"]["settings"] == {}


def test_a_journal_that_was_cut_off_keeps_what_it_has(tmp_path, item):
    journal = Journal(tmp_path)
    journal.add(item, "abc", 90, state_of(item.source), state_of(item.output))
    journal.close()
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"job": {"out')
    journal = Journal(tmp_path)
    assert journal.finished(item, "abc") == 90
    other = BatchItem(item.source, item.output.with_name("b.mkv"), RestoreConfig())
    other.output.write_bytes(b"restored")
    journal.add(other, "abc", 9, state_of(other.source), state_of(other.output))
    journal.close()
    journal = Journal(tmp_path)
    assert [journal.finished(each, "abc") for each in (item, other)] == [90, 9]
    journal.close()


def now(share, n_frames=10, **more):
    values = {"in_work": True, "n_done": 1, "n_failed": 0, "n_files": 4, "share_given": 0.5, **more}
    return BatchProgress("in/a.mkv", n_frames, 90, share=share, **values)


def test_without_a_terminal_it_logs_where_it_is_and_how_long_it_takes(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter([0, 1, 12, 15, 31])
    # Its own, for threads of other tests may still look at the real one.
    monkeypatch.setattr("pipeline.monitor.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pipeline.monitor.batch_progress(bar=False) as on_batch:
        for share in (0.5, 0.6, 0.65, 0.75):  # half was done by an earlier run
            on_batch(now(share))
    values = [record.values for record in caplog.records]
    assert [v["share"] for v in values] == [0.6, 0.75]
    assert values[0]["eta_seconds"] == pytest.approx(0.4 / (0.1 / 12), abs=1)
    assert values[1]["eta_seconds"] == pytest.approx(0.25 / (0.25 / 31), abs=1)
    assert json.dumps(values)


def test_the_workers_log_is_json_too(capsys):
    pipeline.monitor.configure_logging("json", logging.WARNING)
    for name in ("pipeline.batch", "workers.schedule"):
        logging.getLogger(name).warning("A worker was lost")
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["A worker was lost"] * 2


def test_a_terminal_shows_each_file_in_work_and_all(monkeypatch):
    screen = io.StringIO()
    # A segment came back each 80 s, the two of the two workers together.
    times = iter([0, 1000.0, 1080.0, 1081.0])
    monkeypatch.setattr(
        "pipeline.monitor.time", SimpleNamespace(monotonic=lambda: next(times, 1081.0))
    )

    def console(**_):
        return Console(file=screen, force_terminal=True, width=120)

    monkeypatch.setattr(pipeline.monitor, "Console", console)
    with pipeline.monitor.batch_progress(bar=True) as on_batch:
        on_batch(now(0.3, 45, share_given=0.2))
        on_batch(now(0.5, 90, share_given=0.2))
        on_batch(now(0.5, 90, in_work=False, n_done=2, share_given=0.2))
    shown = screen.getvalue()
    assert "a.mkv" in shown
    assert "2 of 4 files, 0 failed" in shown
    assert "0:30:02" in shown
