"""Which frames of a live stream are restored, passed through and dropped, as tables of times."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.admission import HOLD_SECONDS, Admission
from pipeline.frames import Frame

STEP = 0.04
PLANES = (np.zeros((2, 2), np.uint8),)


def run(admission, *, seconds, model, step=STEP, start=0.0, smaller=0.0):
    """A source of one frame a `step` before a model that takes `model` seconds a frame.

    `model` may be a function of time; `smaller` is what the smaller one takes. Returns (time
    taken, age when taken, restored by the full model) of each.
    """
    taken, free = [], start
    for i in range(int(seconds / step)):
        now = start + i * step
        while free <= now:  # the model takes what waits as soon as it is free
            got = admission.take(free)
            if got is None:
                break
            frame, treatment = got
            taken.append((free, free - frame.captured_seconds, treatment == "restore"))
            full = model(free) if callable(model) else model
            free += {"restore": full, "pass": 0.001, "smaller": smaller}[treatment]
        if not admission.full:
            admission.offer(Frame(i, i, PLANES, captured_seconds=now), now)
        free = max(free, now)
    return taken


def test_a_fast_model_restores_every_frame():
    admission = Admission("oldest", 0.5, STEP)
    taken = run(admission, seconds=20, model=0.03)
    assert admission.counts["dropped"] == 0
    assert all(restored for *_, restored in taken)
    assert admission.level == "restore"


def test_a_hiccup_is_absorbed():
    admission = Admission("oldest", 0.5, STEP)
    run(admission, seconds=10, model=lambda now: 0.2 if 5 < now < 5.1 else 0.02)
    assert admission.counts["dropped"] == 0


@pytest.mark.parametrize("policy", ["oldest", "latest"])
@pytest.mark.parametrize("model", [0.08, 0.12, 0.7])
def test_a_slow_model_drops_and_no_frame_waits_beyond_the_bound(policy, model):
    admission = Admission(policy, 0.5, STEP)
    taken = run(admission, seconds=60, model=model)
    assert max(age for _, age, _ in taken) <= 0.5
    counts = admission.counts
    assert counts["restored"] + counts["passed"] + counts["dropped"] + len(admission) == 1500
    assert counts["dropped"] > 0


def test_twice_too_slow_drops_half_and_passes_nothing_through():
    admission = Admission("oldest", 0.5, STEP)
    taken = run(admission, seconds=60, model=0.08)
    assert 0.45 < admission.counts["dropped"] / 1500 < 0.55
    assert admission.counts["passed"] == 0
    settled = [age for at, age, _ in taken if at > 5]
    assert max(settled) <= STEP + 1e-9, "dropping keeps the newest frame alone"


def test_ten_times_too_slow_is_passed_through_and_restoring_is_tried_ever_less_often():
    admission = Admission("oldest", 0.5, STEP)
    taken = run(admission, seconds=240, model=0.4)
    assert admission.counts["passed"] > 4000
    trials = [at for (at, _, restored), (_, _, before) in zip(taken[1:], taken, strict=False)
              if restored and not before]  # fmt: skip
    gaps = [b - a for a, b in pairwise(trials)]
    assert gaps
    assert all(b >= a for a, b in pairwise(gaps))
    assert trials[0] < HOLD_SECONDS[0] + 10


@pytest.mark.parametrize("policy", ["oldest", "none"])
def test_the_smaller_model_comes_after_passing_and_stays_while_the_full_one_is_too_slow(policy):
    admission = Admission(policy, 0.5, STEP, has_smaller=True)
    levels = levels_of(admission, 200, model=0.4, smaller=0.02)
    first = list(dict.fromkeys(levels))
    assert first[-2:] == ["pass", "smaller"]
    assert levels.count("pass") * STEP <= HOLD_SECONDS[0] + 1, (
        "once, until the smaller one is known"
    )
    assert levels.count("smaller") * STEP > 150
    trials = [i * STEP for i, (a, b) in enumerate(pairwise(levels)) if (a, b)[0] == "smaller" != b]
    gaps = [b - a for a, b in pairwise(trials)]
    assert all(b >= a - 1 for a, b in pairwise(gaps)), "ever less often"
    counts = admission.counts
    assert 0 < counts["smaller"] < counts["restored"]


def test_a_smaller_model_that_is_too_slow_as_well_gives_way_to_passing():
    admission = Admission("oldest", 0.5, STEP, has_smaller=True)
    levels = levels_of(admission, 200, model=0.8, smaller=0.4)
    assert levels.count("pass") * STEP > 120
    assert levels.count("smaller") > 0


def test_the_full_model_comes_back_from_the_smaller_one_once_it_is_fast():
    admission = Admission("oldest", 0.5, STEP, has_smaller=True)
    run(admission, seconds=120, model=lambda now: 0.4 if now < 30 else 0.02, smaller=0.02)
    assert admission.level == "restore"


def levels_of(admission, seconds, *, model, smaller):
    """The level after each frame offered."""
    levels = []
    original = admission.offer

    def offer(frame, now):
        original(frame, now)
        levels.append(admission.level)

    admission.offer = offer
    run(admission, seconds=seconds, model=model, smaller=smaller)
    return levels


def test_it_restores_again_once_the_model_is_fast_and_does_not_waver():
    admission = Admission("oldest", 0.5, STEP)
    taken = run(admission, seconds=60, model=lambda now: 0.4 if now < 10 else 0.02)
    assert admission.level == "restore"
    assert all(restored for at, _, restored in taken if at > 30)
    assert sum(n for k, n in admission.counts.items() if k.startswith("level_")) <= 6


def test_policy_none_drops_nothing_and_passes_through_what_waited_too_long():
    admission = Admission("none", 0.5, STEP)
    offered = 0
    original = admission.offer

    def offer(frame, now):
        nonlocal offered
        offered += 1
        original(frame, now)

    admission.offer = offer
    run(admission, seconds=60, model=0.08)
    counts = admission.counts
    assert counts["dropped"] == 0
    assert counts["passed"] > 0
    assert counts["restored"] + counts["passed"] + len(admission) == offered
