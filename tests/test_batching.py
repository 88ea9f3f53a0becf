"""How many tiles go through the network at once."""

import os

import pytest

from workers import batching


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Device:
    """Takes `fixed + each * n` seconds for n tiles, and has memory for `room` of them."""

    def __init__(self, fixed, each, room=1000):
        self.fixed, self.each, self.room = fixed, each, room
        self.now, self.seen = 0.0, []

    def __call__(self, n):
        self.seen.append(n)
        first = n not in self.seen[:-1]
        self.now += 50 * first + self.fixed + self.each * n  # a first pass compiles
        return n <= self.room

    def best(self, most, case="a GPU; tiny; 512x512; bf16"):
        return batching.fastest(case, most, self, lambda: self.now)


def test_more_at_once_where_a_call_costs_much_by_itself():
    assert Device(fixed=1.0, each=0.1).best(8) == 8
    assert Device(fixed=1.0, each=0.1).best(6, "another") == 6


def test_one_at_a_time_where_more_gain_nothing():
    device = Device(fixed=0.001, each=1.0)
    assert device.best(8) == 1


def test_nothing_larger_is_tried_once_more_at_once_are_slower():
    class Thrashes(Device):
        def __call__(self, n):
            fits = super().__call__(n)
            self.now += n * n
            return fits

    device = Thrashes(fixed=0.0, each=1.0)
    assert device.best(64) == 1
    assert max(device.seen) == 2


def test_nothing_larger_is_tried_once_memory_ran_out():
    device = Device(fixed=1.0, each=0.1, room=5)
    assert device.best(64) == 4
    assert device.seen.count(8) == 1
    assert max(device.seen) == 8


def test_a_tile_that_does_not_fit_by_itself_is_left_to_be_halved():
    device = Device(fixed=1.0, each=0.1, room=0)
    assert device.best(8) == 1
    assert device.seen == [1]


def test_what_was_measured_is_used_again_for_the_same_case_alone():
    Device(fixed=1.0, each=0.1).best(4)
    again = Device(fixed=1.0, each=0.1)
    assert again.best(4) == 4
    assert again.seen == []
    assert again.best(2) == 2
    assert again.seen == []
    assert again.best(8) == 8
    assert set(again.seen) == {8}
    other = Device(fixed=0.0, each=0.1)
    assert other.best(4, case="a GPU; tiny; 512x512; fp32") == 1
    assert other.seen


def test_what_was_measured_long_ago_perhaps_under_load_is_measured_again(cache):
    Device(fixed=0.0, each=0.1).best(4)
    (kept,) = cache.rglob("*.json")
    os.utime(kept, (0, 0))
    again = Device(fixed=1.0, each=0.1)
    assert again.best(4) == 4
    assert set(again.seen) == {1, 2, 4}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"case": "x", "seconds": {"1": 1.0, "4": 0.1}}', '{"seconds": 3}']
)
def test_a_file_that_is_damaged_or_anothers_is_measured_anew(text, cache):
    Device(fixed=0.0, each=1.0).best(4)
    (kept,) = cache.rglob("*.json")
    kept.write_text(text)
    device = Device(fixed=0.0, each=1.0)
    assert device.best(4) == 1
    assert device.seen


def test_without_a_folder_to_write_to_it_is_measured_all_the_same(cache):
    cache.write_text("a file where the folder should be")
    assert Device(fixed=1.0, each=0.1).best(4) == 4
