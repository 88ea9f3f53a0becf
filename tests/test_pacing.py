"""The times of a live stream as tables: no clock, no thread, no socket."""

import random
from fractions import Fraction
from itertools import pairwise

import pytest

from pipeline.pacing import LATE_SECONDS, Backoff, OutputClock, Pace, Timeline, ticks

STEP = 0.04


def test_backoff_doubles_to_its_most_with_jitter_and_starts_again():
    backoff = Backoff(0.25, 2.0, None, seed=1)
    for most in (0.25, 0.5, 1.0, 2.0, 2.0, 2.0):
        assert most * 2 / 3 <= backoff.next_delay() <= most
    backoff.succeeded()
    assert backoff.next_delay() <= 0.25
    many = Backoff(0.25, 2.0, None)
    assert all(many.next_delay() <= 2.0 for _ in range(5000))


def test_two_sources_that_fail_together_do_not_come_back_together():
    assert Backoff(1, 1, None).next_delay() != Backoff(1, 1, None).next_delay()


def test_frames_of_a_segment_are_due_as_far_apart_as_they_were_taken():
    pace = Pace()
    assert [round(pace.until_due(100 + n * STEP, 7.0), 3) for n in range(4)] == [
        0,
        0.04,
        0.08,
        0.12,
    ]
    assert pace.until_due(101, 8.1) == 0, "a little late: those that follow catch up"
    assert pace.until_due(101.2, 8.1) == pytest.approx(0.1)


def test_a_segment_that_is_late_or_a_jump_of_the_times_begins_anew():
    pace = Pace()
    pace.until_due(100, 7.0)
    assert pace.until_due(101, 9.0) == 0
    assert pace.until_due(101 + STEP, 9.0) == pytest.approx(STEP), "not a burst to catch up"
    for jump in (5000, 1):
        assert pace.until_due(jump, 10.0) == 0
        assert pace.until_due(jump + STEP, 10.0) == pytest.approx(STEP)


def test_bounded_backoff_ends():
    backoff = Backoff(0.1, 1.0, limit=2)
    assert backoff.next_delay()
    assert backoff.next_delay()
    assert backoff.next_delay() is None


def video(timeline, *arrivals):
    """pts in seconds of frames given as (their pts in seconds, arrival)."""
    pts = [
        timeline.video(None if s is None else Fraction(s).limit_denominator(1000), at, STEP)
        for s, at in arrivals
    ]
    return [p / 90000 for p in pts]


def test_a_session_starts_at_zero_and_keeps_the_sources_own_spacing():
    assert video(Timeline(), (7.0, 100), (7.04, 100.3), (7.1, 100.31)) == [0, 0.04, 0.1]


def test_a_new_connection_goes_on_after_the_time_that_it_was_away():
    # 3 s away: the first frame comes 3 s after the last one, the rest in its own spacing
    timeline = Timeline()
    video(timeline, (7.0, 100), (7.04, 100.04))
    timeline.connected()
    assert video(timeline, (0, 103.04), (0.04, 103.2)) == pytest.approx([3.04, 3.08])


def test_pts_increase_strictly_whatever_the_source_says():
    timeline = Timeline()
    times = video(
        timeline, (1.0, 0), (1.0, 0.04), (0.9, 0.08), (None, 0.12), (500, 0.16), (500.04, 0.2),
        (3, 0.24), (3.04, 0.28),
    )  # fmt: skip
    assert all(a < b for a, b in pairwise(times))
    assert times[-1] < 1, "a clock that jumps does not carry the session with it"


def test_a_burst_after_a_stall_keeps_its_spacing():
    burst = [(1 + i * STEP, 30.0) for i in range(2, 20)]
    times = video(Timeline(), (1, 0), (1 + STEP, STEP), *burst)
    assert times == pytest.approx([i * STEP for i in range(20)], abs=1e-4)


def test_audio_moves_with_the_video_of_its_connection():
    timeline = Timeline()
    assert timeline.audio(Fraction(6)) is None
    video(timeline, (7.0, 100), (7.04, 100.04))
    assert timeline.audio(Fraction(71, 10)) == ticks(0.1)
    assert timeline.audio(Fraction(7)) is None, "it never goes back"
    timeline.connected()
    assert timeline.audio(Fraction(1)) is None
    video(timeline, (1.0, 102.04))
    assert timeline.audio(Fraction(1)) == ticks(2.04)


def test_a_clock_that_jumps_for_the_sound_first_does_not_silence_what_follows():
    """A camera that boots with a wrong date and then hears of the right one."""
    timeline = Timeline()
    video(timeline, (7.0, 100), (7.04, 100.04))
    assert timeline.audio(Fraction(704, 100)) == ticks(0.04)
    assert timeline.audio(Fraction(3600)) is None, "an hour ahead of the frames"
    video(timeline, (3600.04, 100.08))
    assert timeline.audio(Fraction(360006, 100)) == pytest.approx(ticks(0.1), abs=2)


def test_repeats_fill_the_time_and_a_frame_that_they_overtook_is_dropped():
    clock = OutputClock(STEP)
    assert clock.frame(0, now=10.0) == 0
    assert clock.until_repeat(10.03) == pytest.approx(0.01)
    sent = [clock.repeat(10 + STEP * i) for i in range(1, 26)]
    assert sent[-1] == pytest.approx(ticks(1.0), abs=1)
    assert clock.frame(ticks(0.5), now=11.01) is None
    assert clock.frame(ticks(1.04), now=11.04) == ticks(1.04)


def test_a_source_whose_clock_stood_still_is_not_late_for_ever():
    clock = OutputClock(STEP)
    clock.frame(0, now=0.0)
    clock.repeat(5.0)
    outs = [clock.frame(ticks(STEP * i), now=5.0 + STEP * i) for i in range(1, 60)]
    assert outs[0] is None
    kept = [out for out in outs if out is not None]
    assert len(kept) >= 59 - LATE_SECONDS / STEP - 2
    assert all(a < b for a, b in pairwise(kept))
    assert kept[0] > ticks(5.0)
    assert clock.audio(ticks(STEP)) > ticks(3.9), "audio moves with it"


def played(arrivals):
    """What an output makes of frames that arrive as (clock, pts) in seconds: a list of (clock, pts
    that left), None for a frame that was dropped; repeats fill what is longer than 0.25 s."""
    clock, outs, before = OutputClock(STEP), [], None
    for now, pts in arrivals:
        while before is not None and (at := before[0] + 0.25) < now:
            at += max(clock.until_repeat(at), 0)
            if at >= now:
                break
            clock.repeat(at)
            before = at - 0.25 + 1e-9, None
        outs.append((now, clock.frame(ticks(pts), now)))
        before = now, pts
    return outs


def test_the_output_comes_back_to_the_clock_when_a_source_has_caught_up():
    """A link that hangs 5 s in every minute and then delivers what it held at twice the pace."""

    def arrives(pts):
        phase = pts % 60
        return pts - phase + 35 + (phase - 30) / 2 if 30 <= phase < 40 else pts

    outs = played((arrives(n * STEP), n * STEP) for n in range(int(600 / STEP)))
    sent = [out for _, out in outs if out is not None]
    assert all(a < b for a, b in pairwise(sent))
    assert outs[-1][1] == pytest.approx(ticks(outs[-1][0]), abs=ticks(0.1))


@pytest.mark.parametrize(("fps", "jitter"), [(2, 0.03), (2, 0.1), (3, 0.1)])
def test_a_camera_that_slows_down_at_night_loses_no_frame(fps, jitter):
    """Its nominal rate stays, so the gaps are filled with repeats, which some frames come after."""
    chance = random.Random(1)
    outs = played((n / fps + chance.random() * jitter, n / fps) for n in range(fps * 600))
    sent = [out for _, out in outs if out is not None]
    assert len(sent) == fps * 600
    assert all(a < b for a, b in pairwise(sent))
    assert sent[-1] == pytest.approx(ticks(outs[-1][0]), abs=ticks(0.2))
