"""What a running job logs."""

import json
import logging
import time

import pytest

from pipeline import monitor
from pipeline.monitor import configure_logging, reporting


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger("pipeline")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def test_a_line_of_json_has_the_traceback_of_what_went_wrong(capfd):
    configure_logging("json", logging.INFO)
    try:
        raise RuntimeError("the cause of it")
    except RuntimeError:
        logging.getLogger("pipeline.live").exception("the reader failed")
    (line,) = capfd.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "the reader failed"
    assert "RuntimeError: the cause of it" in entry["traceback"]
    assert "test_monitor.py" in entry["traceback"]


def test_a_stream_reports_soon_then_seldom_and_at_its_end(capfd, monkeypatch):
    configure_logging("json", logging.INFO)
    monkeypatch.setattr(monitor, "PROGRESS_SECONDS", 0.2)
    assert monitor.STREAM_SECONDS >= 60
    with reporting("camera", lambda: {"frames_in": 5}):
        time.sleep(1.5)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["frames_in"] for line in lines] == [5, 5]
