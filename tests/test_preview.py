"""What the monitor page is given to show of a stream."""

from fractions import Fraction

import cv2
import numpy as np

from pipeline.frames import Frame, PixelFormat, StreamInfo
from pipeline.preview import StreamView
from pipeline.stats import StreamStats

YUV420 = PixelFormat("yuv420p", 3, 1, 1, 8, "bt709", False, "left")


def frame(index, luma, width=64, height=48):
    planes = [np.full(s, 128, np.uint8) for s in YUV420.plane_shapes(width, height)]
    planes[0][:] = luma
    return Frame(index, index, tuple(planes))


def info(width=64, height=48):
    return StreamInfo(width, height, Fraction(1, 25), Fraction(25), YUV420)


def decoded(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_before_is_left_of_after_and_nothing_is_shown_without_a_frame():
    view = StreamView("yard", StreamStats())
    assert view.pair() is None
    view.show(info(), frame(0, 16), frame(0, 235))
    picture = decoded(view.pair())
    assert picture.shape == (48, 128, 3)
    assert picture[:, :60].max() < 10
    assert picture[:, 68:].min() > 245


def test_a_new_frame_is_a_new_picture_and_the_same_frame_is_made_once():
    view = StreamView("yard", StreamStats())
    view.show(info(), frame(0, 16), frame(0, 235))
    first = view.pair()
    assert view.pair() is first
    view.show(info(), frame(1, 100), frame(1, 235))
    assert decoded(view.pair())[:, :60].mean() > 60


def test_a_wide_frame_is_reduced():
    view = StreamView("yard", StreamStats())
    view.show(info(1920, 1080), frame(0, 16, 1920, 1080), frame(0, 16, 1920, 1080))
    assert decoded(view.pair()).shape == (720, 2560, 3)


def test_figures_have_rates_of_the_last_second_however_often_they_are_asked_for():
    now, stats = [100.0], StreamStats()
    view = StreamView("yard", stats, clock=lambda: now[0])
    stats.source_up = stats.sink_up = True
    stats.count("frames_in", 30)
    stats.count("frames_sent", 25)
    now[0] += 0.5
    assert view.figures().fps == 0.0
    now[0] += 0.5
    assert [view.figures().fps for _ in range(3)] == [25.0] * 3
    stats.latency(0.080)
    figures = view.figures()
    assert (figures.name, figures.state, figures.frames_in) == ("yard", "live", 30)
    assert figures.latency_ms == {"p50": 80.0, "p95": 80.0, "p99": 80.0}


def test_the_state_says_what_is_wrong():
    now, stats = [0.0], StreamStats()
    view = StreamView("yard", stats, clock=lambda: now[0])
    assert view.figures().state == "source away"
    stats.source_up = True
    assert view.figures().state == "sink away"
    stats.sink_up = True
    assert view.figures().state == "live"
    stats.count("frames_dropped")
    now[0] = 1.0
    assert view.figures().state == "late"
    now[0] = 2.0
    assert view.figures().state == "live"
